"""A reply is heard while it is made: pieces go on unchanged, and into the page as they are."""

import numpy as np
import pytest
import torch

from minomni.chat.reply import AudioChunk, Reply, ReplyDone, TextChunk, Timings
from minomni.notebook import player

WAVES = torch.rand(3), torch.rand(5)


@pytest.fixture
def page(monkeypatch):
    """What a page would get: things shown, and messages to the player."""
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


def test_without_a_reader_there_is_one_player_with_the_whole(page):
    kinds = [type(piece) for piece in player.seconds_heard(pieces())]
    assert kinds == [TextChunk, AudioChunk, AudioChunk, ReplyDone]
    assert page == ["Audio"]
    assert [type(piece) for piece in player.seconds_heard(pieces(()))] == [TextChunk, ReplyDone]
    assert page == ["Audio"]


def test_each_piece_is_in_the_page_before_it_is_handed_on(page, monkeypatch):
    monkeypatch.setattr(player, "is_interactive", lambda: True)
    seen = [len(page) for _ in player.seconds_heard(pieces())]
    assert seen == [1, 2, 3, 5]
    assert page[0] == "Player"
    assert page[-1] == "Audio"
    (first, one), (_, two), over = page[1:4]
    assert first == {"rate": 16_000}
    assert over == ({"over": True},)
    assert np.frombuffer(one + two, np.float32).tolist() == torch.cat(WAVES).tolist()


def test_whoever_stops_listening_stops_the_stream(page):
    stopped = []

    def endless():
        try:
            while True:
                yield AudioChunk(WAVES[0], 16_000, 0.0)
        finally:
            stopped.append(True)

    listening = player.seconds_heard(endless())
    next(listening)
    listening.close()
    assert stopped == [True]
