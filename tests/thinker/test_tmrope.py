"""TMRoPE: the time, height and width of every token equal the paper and the official code."""

from dataclasses import replace
from itertools import zip_longest
from random import Random

import numpy as np
import pytest
import torch

from minomni.errors import UserError
from minomni.inputs.prompt import Inputs, collate
from minomni.thinker.tmrope import position_ids
from tests import oracle

CONFIG, ID = oracle.CONFIG.thinker, oracle.TOKENS
LAYOUTS, ROWS = 110, 3  # 330 random rows


class Row:
    """Builds one row of tokens with its media, item by item."""

    def __init__(self):
        self.ids, self.mels, self.images, self.videos, self.seconds = [], [], [], [], []

    def text(self, n: int) -> "Row":
        self.ids += [10] * n
        return self

    def audio(self, tokens: int) -> "Row":
        self.ids += [ID.audio_bos] + [ID.audio] * tokens + [ID.audio_eos]
        self.mels.append(torch.zeros(128, 4 * tokens))
        return self

    def image(self, gh: int, gw: int) -> "Row":
        self.ids += [ID.vision_bos] + [ID.image] * (gh * gw // 4) + [ID.vision_eos]
        self.images.append((1, gh, gw))
        return self

    def video(
        self, t: int, gh: int, gw: int, per_grid: float = 1.0, sound: int | None = None
    ) -> "Row":
        body = [ID.video] * (t * gh * gw // 4)
        seconds = torch.arange(t, dtype=torch.float32) * per_grid
        if sound is not None:
            body = [
                ID.audio_bos,
                *self.turns((seconds * 25).tolist(), gh * gw // 4, sound),
                ID.audio_eos,
            ]
            self.mels.append(torch.zeros(128, 4 * sound))
        self.ids += [ID.vision_bos, *body, ID.vision_eos]
        self.videos.append((t, gh, gw))
        self.seconds.append(seconds)
        return self

    @staticmethod
    def turns(times: list[float], cells: int, sound: int) -> list[int]:
        """The order of a sounding video's tokens, by walking both tracks with a counter each."""

        def pieces(values, token, each):
            out, chunk = [[]], 1
            for value in values:
                if value >= 50 * chunk:
                    out.append([])
                    chunk += 1
                out[-1] += [token] * each
            return out

        seen, heard = pieces(times, ID.video, cells), pieces(range(sound), ID.audio, 1)
        return [i for a, b in zip_longest(seen, heard, fillvalue=[]) for i in a + b]

    def inputs(self) -> Inputs:
        ids = torch.tensor([self.ids])
        return Inputs(
            ids, torch.ones_like(ids), self.mels, None, self.images, None, self.videos, self.seconds
        )


def rows_of(row: Row) -> list[list[int]]:
    return position_ids(row.inputs(), CONFIG)[:, 0].tolist()


def triples(row: Row) -> list[tuple[int, int, int]]:
    return list(zip(*rows_of(row), strict=True))


def test_text_and_image():
    assert triples(Row().text(2).image(4, 4).text(1)) == [
        (0, 0, 0),
        (1, 1, 1),
        (2, 2, 2),
        (3, 3, 3),
        (3, 3, 4),
        (3, 4, 3),
        (3, 4, 4),
        (5, 5, 5),
        (6, 6, 6),
    ]


@pytest.mark.parametrize(
    ("per_grid", "times", "end"), [(1.0, (2, 27, 52), 53), (0.5, (2, 14, 27), 28)]
)
def test_video_follows_real_time(per_grid, times, end):
    expected = (
        [(0, 0, 0), (1, 1, 1)]
        + [(t, 2, w) for t in times for w in (2, 3)]
        + [(end,) * 3, (end + 1,) * 3]
    )
    assert triples(Row().text(1).video(3, 2, 4, per_grid).text(1)) == expected


def test_irregular_frames_keep_their_times():
    row = Row().text(1).video(3, 2, 2).text(1)
    row.seconds = [torch.tensor([0.0, 0.4, 3.0])]
    assert [t for t, _, _ in triples(row)][2:5] == [2, 2 + 10, 2 + 75]


def test_audio_then_image():
    assert triples(Row().text(1).audio(3).text(1).image(2, 4).text(1)) == [
        *((i, i, i) for i in range(8)),
        (8, 8, 8),
        (8, 8, 9),
        (10, 10, 10),
        (11, 11, 11),
    ]


def test_video_with_audio():
    found = triples(Row().text(1).video(3, 2, 4, sound=60).text(1))
    assert found == [
        (0, 0, 0),
        (1, 1, 1),
        (1, 1, 1),
        (2, 2, 2),
        (2, 2, 3),
        (27, 2, 2),
        (27, 2, 3),
        *((i, i, i) for i in range(2, 52)),
        (52, 2, 2),
        (52, 2, 3),
        *((i, i, i) for i in range(52, 62)),
        (62, 62, 62),
        (62, 62, 62),
        (63, 63, 63),
    ]


def test_ids_go_back_after_a_wide_video_with_short_audio():
    """The next segment begins after the last part, the sound, even where the picture reached
    further (release).
    """
    found = triples(Row().text(1).video(1, 4, 28, sound=2).text(1))
    assert max(w for _, _, w in found) == 15
    assert found[-3:] == [(4, 4, 4), (4, 4, 4), (5, 5, 5)]


def test_videos_with_and_without_audio_may_mix():
    """The official code gets these wrong; here each video is what its own markers say."""
    found = triples(Row().video(1, 2, 2).video(1, 2, 2, sound=2).video(1, 2, 2).text(1))
    assert found == [
        (0,) * 3,
        (1,) * 3,
        (2,) * 3,
        (3,) * 3,
        (3,) * 3,
        (4,) * 3,
        (4,) * 3,
        (5,) * 3,
        (6,) * 3,
        (6,) * 3,
        (7,) * 3,
        (8,) * 3,
        (9,) * 3,
        (10,) * 3,
    ]


def test_padding_changes_nothing():
    short, long = Row().text(2).image(4, 4).text(1), Row().text(3).audio(30).video(2, 4, 4).text(2)
    both = collate([short.inputs(), long.inputs()], pad=ID.endoftext)
    found = position_ids(both, CONFIG)
    left = len(long.ids) - len(short.ids)
    assert (found[:, 0, :left] == 1).all()
    assert torch.equal(found[:, 0, left:], position_ids(short.inputs(), CONFIG)[:, 0])
    assert torch.equal(found[:, 1], position_ids(long.inputs(), CONFIG)[:, 0])


@pytest.mark.parametrize(
    "change", [dict(image_grids=[]), dict(image_grids=[(1, 2, 2)]), dict(image_grids=[(1, 8, 8)])]
)
def test_media_that_do_not_match_are_named(change):
    with pytest.raises(UserError, match="do not match the media"):
        position_ids(replace(Row().text(1).image(4, 4).text(1).inputs(), **change), CONFIG)


def random_row(random: Random, sounding: bool) -> Row:
    """Up to six items in any order; videos are all silent or all sounding, since the official code
    cannot mix them.
    """
    row = Row().text(random.randint(1, 4))
    for _ in range(random.randint(0, 6)):
        kind = random.choice(("text", "audio", "image", "video"))
        side = lambda: 2 * random.randint(1, 6)  # noqa: E731
        if kind == "text":
            row.text(random.randint(1, 5))
        elif kind == "audio":
            row.audio(random.randint(1, 120))
        elif kind == "image":
            row.image(side(), side())
        else:
            row.video(
                random.randint(1, 9),
                side(),
                side(),
                random.choice((0.3, 0.5, 1.0, 1.7, 2.5)),
                sound=random.randint(1, 200) if sounding else None,
            )
    return row.text(random.randint(1, 3))


def layouts() -> list[tuple[list[Row], bool]]:
    random = Random(20)
    return [
        ([random_row(random, sounding) for _ in range(ROWS)], sounding)
        for sounding in (random.random() < 0.5 for _ in range(LAYOUTS))
    ]


def official(model, rows: list[Row], inputs: Inputs, sounding: bool) -> torch.Tensor:
    grids = (
        [grid for row in rows for grid in row.images],
        [grid for row in rows for grid in row.videos],
    )
    spacing = [float(s[1] - s[0]) if len(s) > 1 else 1.0 for row in rows for s in row.seconds]
    images, videos = (torch.tensor(grid) if grid else None for grid in grids)
    found, _ = model.thinker.model.get_rope_index(
        inputs.input_ids,
        images,
        videos,
        inputs.attention_mask,
        use_audio_in_video=sounding,
        audio_seqlens=torch.tensor([mel.shape[1] for mel in inputs.mels]) if inputs.mels else None,
        second_per_grids=torch.tensor(spacing) if spacing else None,
    )
    return found.long()


@pytest.mark.slow
def test_equals_the_official_positions_on_random_layouts():
    transformers = pytest.importorskip("transformers", reason="the official code is not installed")
    if transformers.__version__ != oracle.VERSION:
        pytest.skip(
            f"compared with transformers {oracle.VERSION}, here is {transformers.__version__}"
        )
    model, compared = oracle.hf_model(), 0
    for number, (rows, sounding) in enumerate(layouts()):
        inputs = collate([row.inputs() for row in rows], pad=ID.endoftext)
        real = inputs.attention_mask.bool()
        theirs, ours = official(model, rows, inputs, sounding), position_ids(inputs, CONFIG)
        assert torch.equal(ours[:, real], theirs[:, real]), f"layout {number}"
        compared += len(rows)
    assert compared >= 300


def test_equals_what_the_official_code_answered():
    """The golden file holds a checksum of the official ids of each layout, for machines without
    transformers.
    """
    golden = np.load(oracle.GOLDEN / "tmrope.npz")["sums"]
    assert len(golden) == LAYOUTS
    for (rows, _), sums in zip(layouts(), golden, strict=True):
        inputs = collate([row.inputs() for row in rows], pad=ID.endoftext)
        assert checksum(position_ids(inputs, CONFIG), inputs.attention_mask) == sums.tolist()


def checksum(ids: torch.Tensor, mask: torch.Tensor) -> list[int]:
    """Per axis the sum of all real ids, each times its place: any two ids that change places change
    it.
    """
    places = torch.arange(1, mask.numel() + 1).view_as(mask) * mask
    return (ids * places).sum((1, 2)).tolist()


def write_golden() -> None:
    """python -c "from tests.thinker.test_tmrope import write_golden; write_golden()" """
    model, sums = oracle.hf_model(), []
    for rows, sounding in layouts():
        inputs = collate([row.inputs() for row in rows], pad=ID.endoftext)
        sums.append(checksum(official(model, rows, inputs, sounding), inputs.attention_mask))
    np.savez_compressed(oracle.GOLDEN / "tmrope.npz", sums=np.array(sums))
