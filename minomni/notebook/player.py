"""A reply that is heard while it is made: a player in the page that is fed with pieces of sound."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import anywidget
from IPython.display import Audio, display
from torch import Tensor

from minomni.chat.reply import AudioChunk, ReplyDone, TextChunk
from minomni.notebook.viz import is_interactive


class Player(anywidget.AnyWidget):
    """Plays each piece of sound right behind the one before, or at once if that has been played
    already.
    """

    _esm = Path(__file__).with_name("player.js")

    def feed(self, wave: Tensor, sample_rate: int) -> None:
        """Play a piece [samples] when all before it is over."""
        self.send({"rate": sample_rate}, [wave.float().cpu().numpy().tobytes()])

    def finish(self) -> None:
        """Nothing more comes: the page may say how it went."""
        self.send({"over": True})


def seconds_heard(
    pieces: Iterable[TextChunk | AudioChunk | ReplyDone],
) -> Iterator[TextChunk | AudioChunk | ReplyDone]:
    """The pieces of a reply once more, each of them heard as it passes by where somebody is there
    to hear it.

    At the end comes an ordinary player with the whole, which also works on a page that nobody runs.
    """
    player = Player() if is_interactive() else None
    if player:
        display(player)
    for piece in pieces:
        if player and isinstance(piece, AudioChunk):
            player.feed(piece.wave, piece.sample_rate)
        if player and isinstance(piece, ReplyDone):
            player.finish()
        if isinstance(piece, ReplyDone) and len(piece.reply.wave):
            display(Audio(piece.reply.wave.cpu().numpy(), rate=piece.reply.sample_rate))
        yield piece
