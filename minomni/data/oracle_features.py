"""Oracle features: what ideal encoders would give the decoder, as embeddings of words.

An audio token stands for the word that is spoken around it, a merge cell for the words of the
object in it. Where there is no word, it is the embedding of the audio or the image placeholder.
The `language` stage reads such sequences while `audio_align` and `vision_align` learn to produce
them, so all three start independently and fit together.
"""

from collections.abc import Callable
from random import Random
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from minomni.config import IGNORE_INDEX, VisionEncoderConfig
from minomni.data.scenes import Example, SceneObject
from minomni.inputs.audio import TOKENS_PER_S
from minomni.inputs.mel import num_audio_tokens
from minomni.inputs.patches import Grid
from minomni.inputs.prompt import Inputs

if TYPE_CHECKING:
    from minomni.thinker.thinker import Thinker

BORDER = 1.5  # pixels: a center this close to a cell's border may count for either cell
NOISE = 0.3  # relative to the embeddings' standard deviation: real encoders are not exact
EMPTY = -1  # token id of a cell without an object

Encode = Callable[[str], list[int]]  # text to token ids


def audio_words(example: Example, encode: Encode) -> list[int]:
    """Token ids of an example's recording, [] if it has none."""
    return [] if example.voice is None else encode(example.transcript or example.question)


def tone_token(encode: Encode) -> int:
    """The token that stands for audio that is not speech."""
    return encode(" sound")[0]


# ----------------------------------------------------------------------------------------------
# words of an image


def cell_words(example: Example, grid: Grid, vision: VisionEncoderConfig, encode: Encode) -> Tensor:
    """Token ids for each merge cell of an image or clip [cells, 4]: color, shape, horizontal and
    vertical position.

    A digit fills every cell with its word. An object belongs to the cell of its center; cells that
    it merely overlaps are EMPTY. IGNORE_INDEX marks words that are not predicted: a position in
    the middle, and cells whose border is close to the center.
    """
    steps = grid[0]
    rows = grid[1] // vision.spatial_merge_size
    columns = grid[2] // vision.spatial_merge_size
    words = torch.full((steps, rows, columns, 4), IGNORE_INDEX)
    if not example.objects:
        digit = example.answer.split()[-1]
        words[..., 0] = encode(f" {digit}")[0]
        return words.flatten(0, 2)

    words[..., 0] = EMPTY
    for step, objects in zip(words, example.objects, strict=True):
        # First the cells that are ambiguous, then on top of them those that are certain.
        for obj in objects:
            x, y = obj.center
            step[cells_near(y, vision), cells_near(x, vision)] = IGNORE_INDEX
        for obj in objects:
            x, y = obj.center
            row = int(y // vision.cell_size)
            column = int(x // vision.cell_size)
            step[row, column] = object_words(obj, rows, columns, vision, encode)
    return words.flatten(0, 2)


def cells_near(pixel: float, vision: VisionEncoderConfig) -> slice:
    """The cells along one side in which a coordinate lies, give or take BORDER."""
    first = int(max(0, pixel - BORDER) // vision.cell_size)
    last = int((pixel + BORDER) // vision.cell_size)
    return slice(first, last + 1)


def object_words(
    obj: SceneObject, rows: int, columns: int, vision: VisionEncoderConfig, encode: Encode
) -> Tensor:
    """Token ids of an object's color, shape, horizontal and vertical position [4]."""
    x, y = obj.center
    across = position_word(x / columns / vision.cell_size, "left", "right")
    down = position_word(y / rows / vision.cell_size, "up", "down")
    ids = []
    for word in (obj.color, obj.shape, across, down):
        if word is None:
            ids.append(IGNORE_INDEX)
        else:
            ids.append(encode(f" {word}")[0])
    return torch.tensor(ids)


def position_word(share: float, low: str, high: str) -> str | None:
    """The word for a position, given as a share of a side's length; None in the middle."""
    if share < 0.4:
        return low
    if share > 0.6:
        return high
    return None


# ----------------------------------------------------------------------------------------------
# embeddings of a batch


def oracle_embeds(
    dialogues: list[list[Example]],
    inputs: Inputs,
    seeds: list[int],
    thinker: "Thinker",
    encode: Encode,
) -> Tensor:
    """Input embeddings [B, L, D] of dialogues, with oracle features instead of the encoders'.

    seeds: of the timing of words and of the noise, one for each dialogue.
    """
    tokens = thinker.config.tokens
    media = _words_of_media(dialogues, inputs, seeds, thinker, encode)

    # The embeddings of the words replace those of the placeholders.
    table = thinker.model.embed_tokens.weight
    embeds = table[inputs.input_ids]  # [B, L, D]
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    for placeholder, ids in media.items():
        if not ids:
            continue
        is_placeholder = inputs.input_ids == placeholder  # [B, L]
        noise = _noise(is_placeholder.sum(1).tolist(), table.shape[1], generators)
        features = _embed(torch.cat(ids).to(table.device), noise.to(table), tokens.image, table)
        embeds = embeds.masked_scatter(is_placeholder[..., None].to(table.device), features)
    return embeds


def _words_of_media(
    dialogues: list[list[Example]],
    inputs: Inputs,
    seeds: list[int],
    thinker: "Thinker",
    encode: Encode,
) -> dict[int, list[Tensor]]:
    """The words that each medium stands for: their ids [n, words] in reading order, by the token id
    of the medium's placeholder.
    """
    tokens = thinker.config.tokens
    vision = thinker.config.vision
    audio: list[Tensor] = []
    images: list[Tensor] = []
    videos: list[Tensor] = []
    audio_counts = iter([num_audio_tokens(mel.shape[-1]) for mel in inputs.mels])
    image_grids = iter(inputs.image_grids)
    video_grids = iter(inputs.video_grids)
    for examples, seed in zip(dialogues, seeds, strict=True):
        random = Random(seed)
        for example in examples:
            if example.image is not None:
                images.append(cell_words(example, next(image_grids), vision, encode))
            if example.clip is not None:
                videos.append(cell_words(example, next(video_grids), vision, encode))
            if example.tone_start_s is not None:
                silence = torch.full((next(audio_counts), 1), tokens.audio)
                audio.append(_put_tone(silence, tone_token(encode), example.tone_start_s, random))
            if example.voice is not None:
                silence = torch.full((next(audio_counts), 1), tokens.audio)
                audio.append(_spread_words(silence, audio_words(example, encode), random))
    return {tokens.audio: audio, tokens.image: images, tokens.video: videos}


def _put_tone(ids: Tensor, token: int, start: float, random: Random) -> Tensor:
    """Set one of the audio tokens [count, 1] while the tone sounds. start: its time in seconds."""
    index = int(start * TOKENS_PER_S + random.uniform(0, 6))
    ids[min(index, len(ids) - 1)] = token
    return ids


def _spread_words(ids: Tensor, words: list[int], random: Random) -> Tensor:
    """Set words at roughly equal distances among the audio tokens [count, 1]."""
    count = len(ids)
    for i, word in enumerate(words):
        index = int((i + random.uniform(0.3, 0.9)) * count / len(words))
        ids[min(index, count - 1)] = word
    return ids


def _noise(counts: list[int], width: int, generators: list[torch.Generator]) -> Tensor:
    """Normal noise [sum of counts, width], `count` rows from each generator."""
    rows = []
    for count, generator in zip(counts, generators, strict=True):
        rows.append(torch.randn(count, width, generator=generator))
    return torch.cat(rows)


@torch.no_grad()
def _embed(ids: Tensor, noise: Tensor, empty: int, table: Tensor) -> Tensor:
    """Token ids [N, words] and noise [N, D] -> the sum of the ids' embeddings plus noise [N, D].

    Negative ids add nothing. A row with no other ids is the embedding of `empty`.
    """
    is_word = (ids >= 0)[..., None]  # [N, words, 1]
    embeds = table[ids.clamp_min(0)]  # [N, words, D]
    total = (embeds * is_word).sum(1)
    total = torch.where(is_word.any(1), total, table[empty])
    noise_level = NOISE * table.std()
    return total + noise_level * noise
