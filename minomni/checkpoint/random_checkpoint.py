"""A folder like the release's, filled with random numbers: the same files, tensors, names, shapes
and precisions.

It stands in for the release where the weights are not at hand: for loading, memory, speed and
parity. Tensors are written as they are drawn, in pieces, so the memory needed does not depend on
the size of the model.
"""

import json
import math
import os
import shutil
import zlib
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from minomni.checkpoint.hf_config import DIT_SPELLINGS, as_json, to_json, write_json
from minomni.checkpoint.processor_files import (
    CHAT_TEMPLATE,
    processor_settings,
    write_tokenizer_config,
)
from minomni.checkpoint.saving import (
    INDEX_FILE,
    SHARD_BYTES,
    VOICES_FILE,
    plan_shards,
    write_voices,
)
from minomni.checkpoint.weights import empty_model
from minomni.config import QWEN7B, BigVGANConfig, DecoderConfig, OmniConfig
from minomni.errors import UserError, short_path
from minomni.files import require_possible, sibling_path
from minomni.inputs.tokenizer import BYTE_TOKENS, Tokenizer, special_tokens
from minomni.token2wav.voice import Voice

RELEASE_CONFIG = Path(__file__).with_name("release_config.json")  # every key, as released
RELEASE_BYTES = 22_362_553_344  # of all tensors of the 7B
RELEASE_SHARDS = 5
GENERATION_CONFIG = {"_from_model_config": True, "transformers_version": "4.50.0.dev0"}
VOICES = {"Chelsie": 151872, "Ethan": 151870}  # the release's bos_token of each voice
VOICE_FRAMES = 400  # mel frames of a voice's reference
SPARE_BYTES = 200_000_000  # for the small files, and for whatever else writes to the disk
PIECE = 2**22  # numbers that are drawn at once
SAFETENSORS_TYPES = {torch.bfloat16: "BF16", torch.float32: "F32"}
# Layers that write into the residual stream, as in init_weights().
RESIDUAL = (
    "o_proj.weight",
    "out_proj.weight",
    "down_proj.weight",
    "fc2.weight",
    "attn.proj.weight",
)
LETTERS = [bytes([letter]) for letter in b"etaoinshrdlucmfwypvbgkjqxz"]


# --------------------------------------------------------------------------------------------------
# sizes
def scale(size: int, factor: float, step: int) -> int:
    """The multiple of `step` that is closest to size * factor, at least one step."""
    return max(1, round(size * factor / step)) * step


def scale_decoder(config: DecoderConfig, factor: float) -> DecoderConfig:
    """The decoder with narrower heads: as many layers and heads, and the same ratios of widths."""
    # A head of 16 numbers has the release's sections of rotary pairs, 2 : 3 : 3.
    head_dim = scale(config.head_dim, factor, 16)
    ratio = head_dim / config.head_dim
    time, height, width = (round(pairs * ratio) for pairs in config.mrope_section)
    return replace(
        config,
        head_dim=head_dim,
        hidden_size=round(config.hidden_size * ratio),
        intermediate_size=round(config.intermediate_size * ratio),
        mrope_section=(time, height, width),
    )


def scale_widths(config: OmniConfig, factor: float) -> OmniConfig:
    """The configuration with all widths multiplied by about `factor`.

    Layers, heads and ids stay, so the model has the same tensors by name and takes as many steps.
    """
    assert config.talker is not None
    assert config.token2wav is not None
    audio, vision = config.thinker.audio, config.thinker.vision
    dit, bigvgan = config.token2wav.dit, config.token2wav.bigvgan
    text = scale_decoder(config.thinker.text, factor)
    audio = replace(
        audio,
        d_model=scale(audio.d_model, factor, 2 * audio.encoder_attention_heads),
        encoder_ffn_dim=scale(audio.encoder_ffn_dim, factor, 8),
        output_dim=text.hidden_size,
    )
    vision = replace(
        vision,
        hidden_size=scale(vision.hidden_size, factor, 4 * vision.num_heads),
        intermediate_size=scale(vision.intermediate_size, factor, 4),
        out_hidden_size=text.hidden_size,
    )
    head_dim = scale(dit.head_dim, factor, 2)
    dit = replace(
        dit,
        head_dim=head_dim,
        hidden_size=dit.num_attention_heads * head_dim,
        emb_dim=scale(dit.emb_dim, factor, 8),
    )
    return replace(
        config,
        thinker=replace(config.thinker, audio=audio, vision=vision, text=text),
        talker=replace(
            config.talker,
            embedding_size=text.hidden_size,
            decoder=scale_decoder(config.talker.decoder, factor),
        ),
        token2wav=replace(config.token2wav, dit=dit, bigvgan=scale_vocoder(bigvgan, factor)),
    )


def scale_vocoder(config: BigVGANConfig, factor: float) -> BigVGANConfig:
    """The vocoder with fewer channels, which each upsampling halves."""
    channels = scale(config.upsample_initial_channel, factor, 2 ** len(config.upsample_rates))
    return replace(config, upsample_initial_channel=channels)


def release_json(config: OmniConfig) -> dict:
    """The object of config.json with every key that the release has, in its order, and the sizes of
    `config`.
    """
    release = json.loads(RELEASE_CONFIG.read_text())
    ours = as_json(to_json(config))
    del ours["architectures"]  # transformers has renamed the class since
    data = replace_values(release, ours)

    # Second names of sizes, the second of which transformers reads instead of the first.
    thinker = data["thinker_config"]
    thinker["vision_config"]["embed_dim"] = config.thinker.vision.hidden_size
    thinker["audio_config"]["num_hidden_layers"] = config.thinker.audio.encoder_layers

    # transformers does not know the release's names of the DiT's sizes. Where its own names are
    # absent, as in the release, it takes the release's sizes.
    dit = data["token2wav_config"]["dit_config"]
    released = release["token2wav_config"]["dit_config"]
    for key, name in DIT_SPELLINGS.items():
        if dit[name] != released[name]:
            dit[key] = dit[name]
    return data


def replace_values(template: dict, values: dict) -> dict:
    """The template with the values that `values` has for its keys, in all sections."""
    result = {}
    for key, value in template.items():
        if isinstance(value, dict) and isinstance(values.get(key), dict):
            result[key] = replace_values(value, values[key])
        else:
            result[key] = values.get(key, value)
    return result


# --------------------------------------------------------------------------------------------------
# the folder
def make_checkpoint(config: OmniConfig, folder: str | Path, seed: int = 0) -> None:
    """Write a folder with the files of the release, the sizes of `config` and random weights.

    Thinker and Talker are bf16, Token2Wav fp32, in shards as large in proportion as the release's.
    The same seed gives the same bytes. The folder is written beside the target and renamed at the
    end. Raises UserError where the target exists or the disk has too little room.
    """
    target = Path(folder)
    if os.path.lexists(target):
        raise UserError(
            f"{short_path(target)}: exists already; give the name of a folder that does not"
        )
    require_possible(target)
    tensors = release_tensors(config)
    total = sum(tensor.nbytes for tensor in tensors.values())
    check_room(target, total)

    part = sibling_path(target, "part")
    try:
        part.mkdir(parents=True)
        write_settings(config, part, seed)
        write_shards(five_shards(tensors), part, seed)
        part.rename(target)
    except OSError as error:
        raise UserError(
            f"{short_path(target)}: cannot be written ({error.strerror}); choose another folder"
        ) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def check_room(target: Path, needed: int) -> None:
    """Raise UserError unless the disk of `target` has room for tensors of `needed` bytes."""
    parent = next(parent for parent in target.absolute().parents if parent.exists())
    free = shutil.disk_usage(parent).free
    if free < needed + SPARE_BYTES:
        raise UserError(
            f"{short_path(target)}: the tensors take {needed / 1e9:.1f} GB and the disk has "
            f"{free / 1e9:.1f} GB free; give a folder on another disk, or a --width-factor below 1"
        )


def release_tensors(config: OmniConfig) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, on the meta device, in the precisions of the release."""
    omni = empty_model(Path("."), config)
    tensors = {}
    for name, tensor in omni.stored_tensors().items():
        precision = torch.float32 if name.startswith("token2wav.") else torch.bfloat16
        tensors[name] = tensor.detach().to(precision)
    return tensors


def write_settings(config: OmniConfig, folder: Path, seed: int) -> None:
    """Write all files but the tensors: settings, voices, tokenizer and processor."""
    assert config.token2wav is not None
    text = json.dumps(release_json(config), indent=2)  # without a line feed at the end, as released
    (folder / "config.json").write_text(text)
    (folder / "generation_config.json").write_text(json.dumps(GENERATION_CONFIG, indent=2))
    limits = {
        "min_pixels": config.media.image_min_pixels,
        "max_pixels": config.media.image_max_pixels,
    }
    write_json(folder / "preprocessor_config.json", limits | processor_settings(config))
    write_json(folder / "chat_template.json", {"chat_template": CHAT_TEMPLATE})

    dit = config.token2wav.dit
    voices = {}
    for name, bos_token in VOICES.items():
        generator = torch.Generator().manual_seed(seed + bos_token)
        cond = torch.randn(1, dit.enc_emb_dim, generator=generator)
        ref_mel = torch.randn(1, VOICE_FRAMES, dit.mel_dim, generator=generator) - 5
        bos_token = min(bos_token, config.thinker.text.vocab_size - 1)
        voices[name] = Voice(name, bos_token, cond, ref_mel)
    write_voices(voices, folder / VOICES_FILE)

    tokenizer = stand_in_tokenizer(config)
    tokenizer.save(folder)
    write_tokenizer_config(tokenizer, config, folder)
    names = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    write_json(folder / "special_tokens_map.json", names)


def stand_in_tokenizer(config: OmniConfig) -> Tokenizer:
    """A tokenizer with as many tokens as the release's, all ids below the first special one.

    Its tokens are bytes and all strings of two, three and four letters, as many as are needed.
    """
    tokens = special_tokens(config.thinker.tokens)
    count = min(tokens.values()) - len(BYTE_TOKENS)
    pairs = list(product(LETTERS, LETTERS))
    merges = list(pairs)
    for left, right in pairs:
        merges += [(left + right, last) for last in LETTERS]
    for pair in pairs:
        if len(merges) >= count:
            break
        merges += [(b"".join(pair), b"".join(other)) for other in pairs]
    return Tokenizer(merges[: max(count, 0)], tokens)


# --------------------------------------------------------------------------------------------------
# tensors
def five_shards(tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Tensors in shards, as large in proportion as the release's five."""
    total = sum(tensor.nbytes for tensor in tensors.values())
    shard_bytes = SHARD_BYTES * total // RELEASE_BYTES
    shards = plan_shards(tensors, shard_bytes, {})
    # A narrow model has tensors that fill more of a shard.
    while len(shards) > RELEASE_SHARDS:
        shard_bytes += shard_bytes // 20 + 1
        shards = plan_shards(tensors, shard_bytes, {})
    return shards


def write_shards(shards: list[dict[str, Tensor]], folder: Path, seed: int) -> None:
    """Write random values for meta tensors into numbered files with an index."""
    weight_map = {}
    total = 0
    for number, shard in enumerate(shards, 1):
        file_name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_shard(shard, folder / file_name, seed)
        weight_map.update(dict.fromkeys(shard, file_name))
        total += sum(tensor.nbytes for tensor in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(folder / INDEX_FILE, index)


def write_shard(tensors: dict[str, Tensor], file: Path, seed: int) -> None:
    """Write one safetensors file, piece by piece: the library would hold all of it in memory.

    Layout (source: safetensors' README): the length of the header in eight bytes, the header as
    JSON with the byte range of each tensor, the tensors. Larger numbers come first, which keeps all
    of them aligned.
    """
    ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in ordered:
        header[name] = {
            "dtype": SAFETENSORS_TYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.nbytes],
        }
        end += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as output:
        output.write(len(text).to_bytes(8, "little"))
        output.write(text)
        for name, tensor in ordered:
            for piece in random_values(name, tensor, seed):
                output.write(piece.view(torch.uint8).numpy().data)


def random_values(name: str, tensor: Tensor, seed: int) -> Iterator[Tensor]:
    """The values of a tensor in pieces [n] of its precision, which depend on its name and the seed.

    Norms are near one. Weights keep the variance of their input, so that activations stay finite in
    any precision and depth.
    """
    generator = torch.Generator().manual_seed(seed + zlib.crc32(name.encode()))
    is_norm = tensor.dim() == 1 and name.endswith("weight")
    mean = 1.0 if is_norm else 0.0
    std = standard_deviation(name, tensor.shape)
    for start in range(0, tensor.numel(), PIECE):
        count = min(PIECE, tensor.numel() - start)
        values = torch.randn(count, generator=generator)
        yield values.mul_(std).add_(mean).to(tensor.dtype)


def standard_deviation(name: str, shape: torch.Size) -> float:
    """Of the random values of a tensor with this name and shape."""
    if len(shape) == 1:  # norms, biases, alpha and beta of the vocoder
        return 0.1
    if "embed" in name.rsplit(".", 2)[-2]:  # an embedding table
        return 1.0
    std = math.prod(shape[1:]) ** -0.5
    return std / 4 if name.endswith(RESIDUAL) else std


def checkpoint_config(size: str, width_factor: float) -> OmniConfig:
    """The configuration of `make-checkpoint`. Raises UserError for a size that is not released."""
    if size != "qwen7b":
        raise UserError(f"size {size!r}: only qwen7b has a release; give qwen7b")
    return QWEN7B if width_factor == 1 else scale_widths(QWEN7B, width_factor)
