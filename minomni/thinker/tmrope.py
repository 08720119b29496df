"""TMRoPE: every token's place in time, height and width (paper, sec. 2.2).

A sequence is a row of segments: runs of text, markers, sounds, pictures, parts of videos. Each
begins one after the largest id of the segment before it. Sound and text count t = h = w in steps of
40 ms or one token; pictures stand still in time and count rows and columns; videos tick with the
real time of their frames.
"""

from itertools import zip_longest

import torch
from torch import Tensor

from minomni.config import ThinkerConfig
from minomni.errors import UserError
from minomni.inputs.mel import num_audio_tokens
from minomni.inputs.prompt import Inputs, chunk_bounds, video_times


def position_ids(inputs: Inputs, config: ThinkerConfig) -> Tensor:
    """Inputs of B rows -> position ids [3, B, L] (time, height, width); padding holds 1.

    Whether a video carries its sound is read off its markers, so silent and sounding ones may mix.
    Raises UserError where the markers and the media do not match.
    """
    ids = torch.ones(3, *inputs.input_ids.shape, dtype=torch.long)
    sounds = iter([num_audio_tokens(mel.shape[-1]) for mel in inputs.mels])
    images, videos = iter(inputs.image_grids), iter(zip(inputs.video_grids, inputs.video_seconds))
    for row, (tokens, mask) in enumerate(
        zip(inputs.input_ids.tolist(), inputs.attention_mask.bool())
    ):
        real = [token for token, there in zip(tokens, mask.tolist()) if there]
        try:
            ids[:, row, mask] = _row(real, sounds, images, videos, config)
        except (StopIteration, IndexError, RuntimeError):
            raise UserError(
                f"row {row}: the prompt's places for media do not match the media; build it with "
                f"Processor"
            ) from None
    return ids


def _row(tokens: list[int], sounds, images, videos, config: ThinkerConfig) -> Tensor:
    """Position ids [3, L] of one unpadded row; takes its media from the iterators."""
    special, parts, at, start = config.tokens, [], 0, 0

    def add(segment: Tensor) -> None:
        nonlocal at, start
        parts.append(segment)
        at, start = at + segment.shape[1], int(segment.max()) + 1

    while at < len(tokens):
        token = tokens[at]
        if token == special.vision_bos and tokens[at + 1] == special.audio_bos:
            grid, seconds = next(videos)
            both = torch.full((3, 1), start)
            parts += [both, both]  # the two opening markers share one id
            at, start = at + 2, start + 1
            for segment in audio_video_positions(start, grid, seconds, next(sounds), config):
                add(segment)
            both = torch.full((3, 1), start)
            parts += [both, both]  # so do the two closing ones
            at, start = at + 2, start + 1
        elif token == special.audio:
            add(text_positions(start, next(sounds)))
        elif token == special.image:
            add(image_positions(start, next(images), config))
        elif token == special.video:
            grid, seconds = next(videos)
            add(video_positions(start, grid, seconds, config))
        else:
            add(text_positions(start, 1))  # text, one token at a time: the same ids as a run of it
    return torch.cat(parts, 1)


def text_positions(start: int, n: int) -> Tensor:
    """Text or sound: t = h = w = start, start + 1, ... -> [3, n]."""
    return torch.arange(start, start + n).expand(3, -1)


def image_positions(start: int, grid, config: ThinkerConfig) -> Tensor:
    """A picture: one moment, rows and columns of its merge cells -> [3, cells]."""
    return _cells(start, torch.zeros(1, dtype=torch.long), grid, config)


def video_positions(start: int, grid, seconds: Tensor, config: ThinkerConfig) -> Tensor:
    """A video: grid step k at trunc(seconds[k] * 25), every step with the same rows and columns ->
    [3, t * cells].
    """
    return _cells(start, video_times(seconds, config.position_id_per_seconds).long(), grid, config)


def audio_video_positions(
    start: int, grid, seconds: Tensor, audio_tokens: int, config: ThinkerConfig
) -> list[Tensor]:
    """Both tracks count from the same start and take turns in 2-second chunks, picture first ->
    segments [3, n].
    """
    picture, sound = (
        video_positions(start, grid, seconds, config),
        text_positions(start, audio_tokens),
    )
    per_chunk = config.seconds_per_chunk * config.position_id_per_seconds
    times = video_times(seconds, config.position_id_per_seconds)
    cells = picture.shape[1] // len(times)
    pictures = [picture[:, a * cells : b * cells] for a, b in chunk_bounds(times, per_chunk)]
    sounds = [sound[:, a:b] for a, b in chunk_bounds(torch.arange(audio_tokens), per_chunk)]
    turns = [part for turn in zip_longest(pictures, sounds) for part in turn]
    return [part for part in turns if part is not None and part.shape[1]]


def _cells(start, times, grid, config):
    """Ids of t steps of merge cells, row-major inside a step -> [3, t * rows * columns]."""
    rows, columns = (n // config.vision.spatial_merge_size for n in grid[1:])
    axes = (times, torch.arange(rows), torch.arange(columns))
    return start + torch.stack([x.flatten() for x in torch.meshgrid(*axes, indexing="ij")])
