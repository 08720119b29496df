"""The order of video and audio tokens in a video with an audio track (paper, sec. 2.2).

Both tracks are cut every 2 seconds, and their chunks alternate, video first. The rule is defined
only here: inputs/prompt.py orders token ids by it, and thinker/tmrope.py orders position ids.
chat/user_turn.py follows the same rule incrementally, while both tracks are still arriving.
"""

from itertools import zip_longest

import torch
from torch import Tensor

from minomni.config import ThinkerConfig


def video_times(seconds: Tensor, ids_per_second: int) -> Tensor:
    """Seconds [t] of the grid steps -> their times in position ids [t], not yet truncated.

    fp32 like the release.
    """
    return seconds.float() * ids_per_second


def chunk_bounds(times: Tensor, ids_per_chunk: int) -> list[tuple[int, int]]:
    """Cut increasing times [n], in position ids, into chunks -> (begin, end) index pairs.

    A new chunk begins where a time reaches the next multiple of ids_per_chunk. Each crossing raises
    the threshold by one step only, even if a time jumps over several (release behavior). So a video
    with steps longer than a chunk gets one chunk per grid step.
    """
    bounds = []
    begin = 0
    threshold = ids_per_chunk
    for index, time in enumerate(times.tolist()):
        if time >= threshold:
            bounds.append((begin, index))
            begin = index
            threshold += ids_per_chunk
    bounds.append((begin, len(times)))
    return bounds


def interleave(
    seconds: Tensor, audio_tokens: int, config: ThinkerConfig
) -> list[tuple[str, int, int]]:
    """Seconds [t] of the grid steps, number of audio tokens -> segments in their order.

    A segment is (kind, begin, end). For kind "video", begin and end are indices of grid
    steps, each of which has rows * columns tokens; for kind "audio", indices of audio
    tokens. No segment is empty. After the end of one track, the remaining chunks of the
    other are adjacent.
    """
    ids_per_second = config.position_id_per_seconds
    ids_per_chunk = config.seconds_per_chunk * ids_per_second
    video_chunks = chunk_bounds(video_times(seconds, ids_per_second), ids_per_chunk)
    audio_chunks = chunk_bounds(torch.arange(audio_tokens), ids_per_chunk)

    segments = []
    chunks = zip_longest(video_chunks, audio_chunks, fillvalue=(0, 0))
    for video_chunk, audio_chunk in chunks:
        segments.append(("video", *video_chunk))
        segments.append(("audio", *audio_chunk))
    return [(kind, begin, end) for kind, begin, end in segments if begin < end]
