"""Plays a reply while it is generated: a player in the page that receives chunks of audio."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import anywidget
from IPython.display import Audio, display
from torch import Tensor

from minomni.chat.reply import AudioChunk, ReplyDone, TextChunk
from minomni.notebook.viz import is_interactive


class Player(anywidget.AnyWidget):
    """Plays audio chunks back to back, or at once if the one before is over."""

    _esm = Path(__file__).with_name("player.js")

    def feed(self, wave: Tensor, sample_rate: int) -> None:
        """Queue a chunk [samples] behind the earlier ones."""
        self.send({"rate": sample_rate}, [wave.float().cpu().numpy().tobytes()])

    def finish(self) -> None:
        """Tell the page that the reply is complete; it then shows a summary."""
        self.send({"over": True})


def play(
    events: Iterable[TextChunk | AudioChunk | ReplyDone],
) -> Iterator[TextChunk | AudioChunk | ReplyDone]:
    """Pass on the events of a reply and play each audio chunk as it comes, if a person is watching.

    At the end an ordinary player with the whole reply is shown. It also works in a notebook that
    is read without a kernel.
    """
    player = Player() if is_interactive() else None
    if player:
        display(player)
    for event in events:
        if player and isinstance(event, AudioChunk):
            player.feed(event.wave, event.sample_rate)
        if player and isinstance(event, ReplyDone):
            player.finish()
        if isinstance(event, ReplyDone) and len(event.reply.wave):
            display(Audio(event.reply.wave.cpu().numpy(), rate=event.reply.sample_rate))
        yield event
