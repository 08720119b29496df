"""TMRoPE: the position of every token in time, height and width (paper, sec. 2.2).

A sequence consists of segments: text, markers, audio, images and parts of videos. Each segment
starts one after the largest id of the segment before it. Text and audio count t = h = w in steps of
one token, which is 40 ms of audio. The time of an image is constant, and its tokens count rows and
columns. The time of a video follows the real time of its frames.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from minomni.config import ThinkerConfig
from minomni.errors import UserError
from minomni.inputs.interleave import interleave, video_times
from minomni.inputs.mel import num_audio_tokens
from minomni.inputs.patches import Grid
from minomni.inputs.prompt import Inputs


@dataclass
class _Media:
    """The media of a batch in reading order. The rows share the iterators: each takes its own."""

    audio_lengths: Iterator[int]  # tokens of each audio
    image_grids: Iterator[Grid]
    videos: Iterator[tuple[Grid, Tensor]]  # grid (t, rows, columns) and seconds [t] of each video


def position_ids(inputs: Inputs, config: ThinkerConfig) -> Tensor:
    """Inputs of B rows -> position ids [3, B, L] (time, height, width). Padding has the id 1.

    The markers of a video tell whether it has an audio track, so a batch may mix both kinds. Raises
    UserError if the placeholder tokens do not match the media.
    """
    audio_lengths = [num_audio_tokens(mel.shape[-1]) for mel in inputs.mels]
    videos = zip(inputs.video_grids, inputs.video_seconds, strict=False)
    media = _Media(iter(audio_lengths), iter(inputs.image_grids), videos)

    ids = torch.ones(3, *inputs.input_ids.shape, dtype=torch.long)
    for row, mask in enumerate(inputs.attention_mask.bool()):
        tokens = inputs.input_ids[row, mask].tolist()
        try:
            ids[:, row, mask] = _row(tokens, media, config)
        except (StopIteration, IndexError, RuntimeError):
            raise UserError(
                f"row {row}: the placeholder tokens of the prompt do not match the media; build "
                f"the prompt with Processor"
            ) from None
    return ids


def _row(tokens: list[int], media: _Media, config: ThinkerConfig) -> Tensor:
    """Position ids [3, L] of one unpadded row."""
    segments: list[Tensor] = []
    index = 0  # of the first token of the next segment
    start = 0  # its position id
    while index < len(tokens):
        for segment in _next_segments(tokens, index, start, media, config):
            segments.append(segment)
            index += segment.shape[1]
            start = _id_after(segment)
    return torch.cat(segments, 1)


def _next_segments(
    tokens: list[int], index: int, start: int, media: _Media, config: ThinkerConfig
) -> list[Tensor]:
    """The segments [3, n] of the item that begins at tokens[index], from position id `start` on."""
    special = config.tokens
    token = tokens[index]
    if token == special.vision_bos and tokens[index + 1] == special.audio_bos:
        grid, seconds = next(media.videos)
        audio_tokens = next(media.audio_lengths)
        # The two opening markers share one id, and so do the two closing markers.
        opening = torch.full((3, 2), start)
        body = audio_video_positions(start + 1, grid, seconds, audio_tokens, config)
        closing = torch.full((3, 2), _id_after(body[-1]))
        return [opening, *body, closing]
    if token == special.audio:
        return [text_positions(start, next(media.audio_lengths))]
    if token == special.image:
        return [image_positions(start, next(media.image_grids), config)]
    if token == special.video:
        grid, seconds = next(media.videos)
        return [video_positions(start, grid, seconds, config)]
    return [text_positions(start, 1)]  # one text token; a run of text gets the same ids this way


def _id_after(segment: Tensor) -> int:
    """Where the segment after this one [3, n] starts."""
    return int(segment.max()) + 1


def text_positions(start: int, n: int) -> Tensor:
    """Text or audio: t = h = w = start, start + 1, ... -> [3, n]."""
    return torch.arange(start, start + n).expand(3, -1)


def image_positions(start: int, grid: Grid, config: ThinkerConfig) -> Tensor:
    """An image: one time, and the rows and columns of its merge cells -> [3, cells]."""
    times = torch.zeros(1, dtype=torch.long)
    return _grid_positions(start, times, grid, config)


def video_positions(
    start: int,
    grid: Grid,
    seconds: Tensor,
    config: ThinkerConfig,
) -> Tensor:
    """A video: grid step k at time trunc(seconds[k] * 25) -> [3, t * cells].

    Every step has the same rows and columns.
    """
    times = video_times(seconds, config.position_id_per_seconds).long()
    return _grid_positions(start, times, grid, config)


def audio_video_positions(
    start: int, grid: Grid, seconds: Tensor, audio_tokens: int, config: ThinkerConfig
) -> list[Tensor]:
    """A video with its audio track -> segments [3, n] in the order of interleave().

    Both tracks count from the same start.
    """
    video = video_positions(start, grid, seconds, config)
    audio = text_positions(start, audio_tokens)
    cells = video.shape[1] // len(seconds)

    segments = []
    for kind, begin, end in interleave(seconds, audio_tokens, config):
        if kind == "video":
            segments.append(video[:, begin * cells : end * cells])
        else:
            segments.append(audio[:, begin:end])
    return segments


def _grid_positions(
    start: int,
    times: Tensor,
    grid: Grid,
    config: ThinkerConfig,
) -> Tensor:
    """Ids of merge cells at the times [t], row-major in a step -> [3, t * cells]."""
    rows = grid[1] // config.vision.spatial_merge_size
    columns = grid[2] // config.vision.spatial_merge_size
    inside = torch.arange(rows), torch.arange(columns)
    axes = torch.meshgrid(times, *inside, indexing="ij")
    return start + torch.stack([axis.flatten() for axis in axes])
