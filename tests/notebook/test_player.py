"""The streaming player passes chunks on unchanged and sends their audio to the page."""

import numpy as np
import pytest
import torch

from minomni.chat.reply import AudioChunk, Reply, ReplyDone, TextChunk, Timings
from minomni.notebook import player

WAVES = torch.rand(3), torch.rand(5)


@pytest.fixture
def page(monkeypatch):
    """What a notebook page receives: displayed objects, and messages to the player."""
    got = []
    monkeypatch.setattr(player, "display", lambda thing: got.append(type(thing).__name__))
    monkeypatch.setattr(
        player.Player, "send", lambda self, content, buffers=(): got.append((content, *buffers))
    )
    return got


def pieces(waves=WAVES):
    yield TextChunk("yes", 0.1)
    for wave in waves:
        yield AudioChunk(wave, 16_000, 0.2)
    yield ReplyDone(
        Reply("yes", torch.cat([torch.empty(0), *waves]), 16_000, torch.empty(0), 0.3, Timings())
    )


def test_outside_a_notebook_there_is_one_player_at_the_end(page):
    kinds = [type(piece) for piece in player.play(pieces())]
    assert kinds == [TextChunk, AudioChunk, AudioChunk, ReplyDone]
    assert page == ["Audio"]
    assert [type(piece) for piece in player.play(pieces(()))] == [TextChunk, ReplyDone]
    assert page == ["Audio"]


def test_each_chunk_is_played_before_it_is_yielded(page, monkeypatch):
    monkeypatch.setattr(player, "is_interactive", lambda: True)
    seen = [len(page) for _ in player.play(pieces())]
    assert seen == [1, 2, 3, 5]
    assert page[0] == "Player"
    assert page[-1] == "Audio"
    (first, one), (_, two), over = page[1:4]
    assert first == {"rate": 16_000}
    assert over == ({"over": True},)
    assert np.frombuffer(one + two, np.float32).tolist() == torch.cat(WAVES).tolist()


def test_closing_the_player_closes_the_stream(page):
    stopped = []

    def endless():
        try:
            while True:
                yield AudioChunk(WAVES[0], 16_000, 0.0)
        finally:
            stopped.append(True)

    listening = player.play(endless())
    next(listening)
    listening.close()
    assert stopped == [True]
