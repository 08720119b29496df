"""What ideal senses would tell the decoder: the embeddings of the words for what is there, where
and when it is.

A moment without a word is the embedding of the audio placeholder, an empty cell that of the image
placeholder. The `language` stage reads such sequences, and `ears` and `eyes` learn to make them, so
all three begin apart and fit.
"""

from random import Random

import torch
from torch import Tensor

from minomni.config import IGNORE_INDEX
from minomni.data.scenes import Example
from minomni.inputs.mel import num_audio_tokens
from minomni.inputs.prompt import Inputs

AUDIO_TOKENS_PER_SECOND = 25
HAIR = 1.5  # pixels
NOISE = 0.3  # of an embedding's own spread: real senses are never this exact


def audio_words(example: Example, encode) -> list[int]:
    """Token ids of what the recording of an example says, or [] where nothing is said."""
    return [] if example.voice is None else encode(example.heard or example.question)


def tone_token(encode) -> int:
    """The token that stands for a sound that is no speech."""
    return encode(" sound")[0]


def cell_words(example: Example, grid, vision, encode) -> Tensor:
    """Token ids for each merge cell of a picture or clip [cells, 4]: color, shape, place across,
    place down.

    A digit stands alone, an empty cell is -1. A cell holds the thing whose centre is in it; one
    into which a thing only reaches is empty. IGNORE_INDEX fills what is not said: a place in the middle,
    and cells that the centre misses by a hair.
    """
    steps, rows, columns = grid[0], *(n // vision.spatial_merge_size for n in grid[1:])
    words = torch.full((steps, rows, columns, 4), IGNORE_INDEX)
    words[..., 0] = -1 if example.objects else encode(" " + example.answer.split()[-1])[0]
    for step, things in zip(words, example.objects):
        for _, _, (x, y), _ in things:
            (left, right), (top, bottom) = (
                (int(max(0, v - HAIR) // vision.cell_size), int((v + HAIR) // vision.cell_size) + 1)
                for v in (x, y)
            )
            step[top:bottom, left:right] = IGNORE_INDEX
        for color, shape, (x, y), _ in things:
            said = [
                color,
                shape,
                place(x / columns, vision, "left", "right"),
                place(y / rows, vision, "up", "down"),
            ]
            ids = [encode(f" {word}")[0] if word else IGNORE_INDEX for word in said]
            step[int(y // vision.cell_size), int(x // vision.cell_size)] = torch.tensor(ids)
    return words.flatten(0, 2)


def place(pixels_a_cell: float, vision, low: str, high: str) -> str | None:
    """The word for a place along one side, given as pixels divided by the cells of that side; None
    in the middle.
    """
    share = pixels_a_cell / vision.cell_size
    return low if share < 0.4 else high if share > 0.6 else None


def oracle_embeds(examples: list[Example], inputs: Inputs, thinker, encode) -> Tensor:
    """Input embeddings [B, L, D] of a batch whose media are given as ideal senses would give them.

    Words and noise fall as torch's seed has it.
    """
    random = Random(int(torch.randint(1 << 62, ())))
    table, tokens, config = thinker.model.embed_tokens.weight, thinker.config.tokens, thinker.config
    counts = iter([num_audio_tokens(mel.shape[-1]) for mel in inputs.mels])
    sounds, images, videos = [], [], []
    grids = {"image": iter(inputs.image_grids), "video": iter(inputs.video_grids)}
    for example in examples:
        for kind, thing, seen in (
            ("image", example.image, images),
            ("video", example.clip, videos),
        ):
            if thing is not None:
                seen.append(cell_words(example, next(grids[kind]), config.vision, encode))
        if example.sound is not None:
            sounds.append(
                _spread(
                    [tone_token(encode)], next(counts), tokens.audio, random, at=example.sound_at
                )
            )
        if example.voice is not None:
            sounds.append(_spread(audio_words(example, encode), next(counts), tokens.audio, random))
    embeds = table[inputs.input_ids]  # [B, L, D]
    for token, ids in ((tokens.audio, sounds), (tokens.image, images), (tokens.video, videos)):
        if ids:
            features = _embed(torch.cat(ids).to(table.device), table.detach(), tokens.image)
            embeds = embeds.masked_scatter(
                (inputs.input_ids == token)[..., None].to(table.device), features
            )
    return embeds


def _spread(
    words: list[int], count: int, silence: int, random: Random, at: float | None = None
) -> Tensor:
    """Words at about even distances among `count` moments of silence, or one at its time -> token
    ids [count, 1].
    """
    ids = torch.full((count, 1), silence)
    for i, word in enumerate(words):
        place = (
            (i + random.uniform(0.3, 0.9)) * count / len(words)
            if at is None
            else at * AUDIO_TOKENS_PER_SECOND + random.uniform(0, 6)
        )
        ids[min(int(place), count - 1)] = word
    return ids


def _embed(ids: Tensor, table: Tensor, nothing: int) -> Tensor:
    """Token ids [N, words] -> the sum of their embeddings, with noise [N, D]; below 0: no word; if
    none, nothing.
    """
    said = (ids >= 0)[..., None]
    total = (table[ids.clamp_min(0)] * said).sum(1)
    total = torch.where(said.any(1), total, table[nothing])
    return total + NOISE * table.std() * torch.randn_like(total)
