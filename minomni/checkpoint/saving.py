"""Writing a model folder: one that load() reads, and transformers and vLLM too."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minomni.checkpoint.hf_config import (
    CODEC_FOLDER,
    MODEL_TYPE,
    SAMPLING_KEYS,
    read_json,
    write_config,
    write_json,
)
from minomni.checkpoint.memory import precision_of
from minomni.checkpoint.processor_files import (
    generation_ids,
    processor_settings,
    write_chat_template,
    write_tokenizer_config,
)
from minomni.config import OmniConfig
from minomni.errors import UserError, shorten
from minomni.files import sibling_path
from minomni.inputs.tokenizer import Tokenizer
from minomni.omni import Omni
from minomni.rotary import rotary_frequencies
from minomni.token2wav.voice import Voice

INDEX_FILE = "model.safetensors.index.json"
WEIGHTS_FILE = "model.safetensors"
VOICES_FILE = "spk_dict.pt"
SHARD_BYTES = 5_000_000_000
# transformers 4.x stores these rotary frequencies, although they follow from the sizes, and reports
# them as missing where they are not stored.
DIT_INV_FREQ = "token2wav.code2wav_dit_model.rotary_embed.inv_freq"
# Files of the tokenizer and the prompt. Either all are written, or all are kept from the folder
# that the model was loaded from.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "chat_template.json",
    "chat_template.jinja",
)
PROVENANCE_FILE = "trained.json"  # how the model was trained; train/ writes it
# The files of a saved model, beside the shards that its index names. Anything else is foreign.
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    INDEX_FILE,
    WEIGHTS_FILE,
    "model-?????-of-?????.safetensors",
    VOICES_FILE,
    PROVENANCE_FILE,
    *TOKENIZER_FILES,
)
CODEC_FILES = {"config.json", WEIGHTS_FILE}
# Other copies of the weights, and how they were packed: never copied into another folder.
OTHER_WEIGHTS = (
    "quant_config.json",
    "quantize_config.json",
    "*.bin",
    "*.bin.index.json",
    "*.pt",
    "*.pth",
    "*.gguf",
    "*.onnx",
    "*.h5",
    "*.msgpack",
    "*.incomplete",
)


def save(omni: Omni, folder: str | Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write a model, its voices and its tokenizer as a folder that load() and transformers read.

    Tensors keep their precision, or get that of the folder where load() chose fp32 in its place
    (omni.stored_dtype); files of Thinker, Talker and Token2Wav hold at most shard_bytes
    each. The codec goes into the subfolder codec/, because other programs do not know it. Other
    files of the folder that the model was loaded from (README, license, tokenizer.json, images) are
    kept.

    The folder is written beside the target and renamed at the end. An existing model folder is
    replaced; a link to one is followed. Raises UserError, and leaves the target as it was, where
    the target is a file, a device or a folder that holds anything but a model, and where writing
    fails.
    """
    target = folder
    folder = check_save(omni, folder)
    fresh = sibling_path(folder, "part")
    old = sibling_path(folder, "old")
    try:
        fresh.mkdir(parents=True)
        write_model(omni, fresh, shard_bytes)
        keep_foreign_files(omni.loaded_from, folder, fresh)
        if folder.exists():
            folder.rename(old)
        fresh.rename(folder)
    except (OSError, SafetensorError, RuntimeError) as error:  # RuntimeError: torch, on a full disk
        raise unwritable(target, error) from error
    finally:
        if old.exists() and not folder.exists():  # the second rename failed
            old.rename(folder)
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


# --------------------------------------------------------------------------------------------------
# what may be replaced
def check_save(omni: Omni, folder: str | Path) -> Path:
    """The folder that save() would write, with links followed. Raises UserError as save() does
    before it writes.
    """
    check_arguments(omni, folder)
    target = Path(folder)
    try:
        resolved = Path(os.path.realpath(target))
        check_target(target, resolved, omni)
        sibling_path(resolved, "part")
    except UserError:
        raise
    except (OSError, ValueError, SafetensorError) as error:  # ValueError: a path with NUL in it
        raise unwritable(target, error) from None
    return resolved


def check_arguments(omni: Omni, folder: str | Path) -> None:
    """Raise UserError for arguments of save() of another type."""
    if not isinstance(omni, Omni):
        raise UserError(
            f"save() was given a {type(omni).__name__} as the model; expected what load() gives"
        )
    if omni.quantized is not None:
        raise UserError(
            f"save() was given a quantized model ({omni.quantized}), which no other program reads; "
            f"load the model without quantize and save that"
        )
    if omni.token2wav is not None and omni.token2wav.dit_dtype == torch.bfloat16:
        raise UserError(
            "save() was given a model whose DiT is rounded to bf16; load the model without "
            "dit_dtype and save that"
        )
    if omni.left_out:
        raise UserError(
            f"save() was given a model without its {' and '.join(omni.left_out)}, which load() "
            f"left out; load the model without parts and save that"
        )
    if not isinstance(folder, (str, Path)) or not str(folder):
        raise UserError(
            f"save() was given {shorten(repr(folder), 60)} as the folder; expected a path"
        )


def unwritable(target: str | Path, error: Exception) -> UserError:
    """The UserError for a failure of the system."""
    reason = getattr(error, "strerror", None) or str(error)[:200]
    return UserError(f"{target}: the model cannot be saved there ({reason}); choose another folder")


def check_target(target: Path, folder: Path, omni: Omni) -> None:
    """Raise UserError unless the model may be written as `folder`, which `target` resolves to."""
    if not folder.exists():
        check_absent_target(target, folder)
        return
    if not folder.is_dir():
        kind = "a file" if folder.is_file() else "a device or a pipe"
        raise UserError(f"{target}: is {kind}; a model is saved as a folder, choose another name")
    if not is_loaded_folder(folder, omni.loaded_from):  # whose other files are all kept
        check_content(target, folder, omni.loaded_from)
    if omni.talker is None and holds_speech(folder):
        raise UserError(
            f"{target}: holds a model that speaks, and the one to save answers in text alone; "
            f"choose another folder"
        )


def check_absent_target(target: Path, folder: Path) -> None:
    """Raise UserError unless a folder can be made that does not exist yet."""
    if target.is_symlink():
        raise UserError(
            f"{target}: is a link to {folder}, which does not exist; remove the link or make the "
            f"folder"
        )
    parent = next(parent for parent in folder.parents if parent.exists())
    if not parent.is_dir():
        raise UserError(
            f"{target}: {parent} is a file, so no folder can be made in it; choose another folder"
        )


def check_content(target: Path, folder: Path, loaded_from: Path | None) -> None:
    """Raise UserError unless an existing folder holds a model and nothing that saving deletes."""
    entries = sorted(folder.iterdir())
    if entries and not holds_model(folder):
        raise UserError(f"{target}: contains something other than a model; choose another folder")
    copied = {file.name for file in copied_files(loaded_from)}
    for entry in entries:
        if entry.name not in copied and not is_model_file(entry):
            raise UserError(
                f"{target}: holds {entry.name!r}, which saving would delete; choose another folder"
            )


def is_model_file(entry: Path) -> bool:
    """Whether an entry of a model folder, a file or the codec's folder, belongs to the model."""
    if entry.name == CODEC_FOLDER:
        return entry.is_dir() and {file.name for file in entry.iterdir()} <= CODEC_FILES
    if any(entry.match(pattern) for pattern in MODEL_FILES):
        return True
    return entry.name in indexed_tensors(entry.parent).values()


def indexed_tensors(folder: Path) -> dict[str, str]:
    """The index {tensor: shard} of a folder; empty where there is none, or a broken one."""
    try:
        index = read_json(folder / INDEX_FILE, optional=True).get("weight_map", {})
    except UserError:
        return {}
    return index if isinstance(index, dict) else {}


def holds_model(folder: Path) -> bool:
    """Whether a folder's config.json is that of a model of this kind."""
    try:
        model_type = read_json(folder / "config.json").get("model_type")
    except UserError:
        return False
    return isinstance(model_type, str) and model_type.startswith(MODEL_TYPE)


def holds_speech(folder: Path) -> bool:
    """Whether a model folder holds tensors of a Talker."""
    names = list(indexed_tensors(folder))
    if (folder / WEIGHTS_FILE).is_file():
        with safe_open(folder / WEIGHTS_FILE, "pt") as file:
            names += file.keys()
    return any(name.startswith("talker.") for name in names)


def is_loaded_folder(folder: Path, loaded_from: Path | None) -> bool:
    """Whether a folder is the one that the model was loaded from."""
    if loaded_from is None or not folder.exists() or not loaded_from.exists():
        return False
    return os.path.samefile(folder, loaded_from)


# --------------------------------------------------------------------------------------------------
# the model's files
def write_model(omni: Omni, folder: Path, shard_bytes: int) -> None:
    """Write all files of the model into an empty folder."""
    config = omni.config
    source = omni.loaded_from

    # Settings: ours, and what transformers adds to the same files.
    write_config(config, folder)
    dtype = omni.stored_dtype or omni.thinker.lm_head.weight.dtype
    precision = str(dtype).removeprefix("torch.")
    add_settings(folder / "config.json", {"torch_dtype": precision}, None)
    add_settings(folder / "generation_config.json", generation_ids(config), source)
    add_settings(folder / "preprocessor_config.json", processor_settings(config), source)

    # Tensors: the codec's apart, since other programs read all tensors of the folder above.
    tensors: dict[str, Tensor] = {}
    codec: dict[str, Tensor] = {}
    dtypes: dict[str, torch.dtype] = {}  # where they are not those in memory
    for name, tensor in omni.stored_tensors().items():
        part = codec if name.startswith("codec.") else tensors
        part[name] = tensor
        if omni.stored_dtype is not None:
            dtypes[name] = precision_of(name, omni.stored_dtype)
    if config.token2wav is not None:
        dit = config.token2wav.dit
        cpu = torch.device("cpu")
        tensors[DIT_INV_FREQ] = rotary_frequencies(dit.head_dim, dit.rope_theta, cpu)
    write_tensors(tensors, folder, shard_bytes, dtypes)
    if config.codec is not None:
        write_file(codec, folder / CODEC_FOLDER / WEIGHTS_FILE)

    if omni.voices:
        write_voices(omni.voices, folder / VOICES_FILE)
    if omni.tokenizer is not None:
        write_tokenizer(omni.tokenizer, config, folder, source)


def add_settings(file: Path, defaults: dict, source: Path | None) -> None:
    """Add keys to a JSON file: those of the same file in the loaded folder, or else the defaults.

    Keys that the file has keep their values. Sampling is left to our group "thinker", whose values
    may have changed since.
    """
    loaded = {} if source is None else read_json(source / file.name, optional=True)
    loaded = {key: value for key, value in loaded.items() if key not in SAMPLING_KEYS}
    write_json(file, defaults | loaded | read_json(file))


def write_voices(voices: dict[str, Voice], file: Path) -> None:
    """Write a spk_dict.pt as the release has it: bos_token, cond and ref_mel by name."""
    entries = {}
    for name, voice in voices.items():
        entries[name] = {
            "bos_token": voice.bos_token,
            "cond": voice.cond.cpu(),
            "ref_mel": voice.ref_mel.cpu(),
        }
    torch.save(entries, file)


def write_tokenizer(
    tokenizer: Tokenizer, config: OmniConfig, folder: Path, source: Path | None
) -> None:
    """Keep the loaded folder's tokenizer files where that is possible, or else write our own."""
    if source is not None and holds_tokenizer(source, tokenizer):
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copy2(source / name, folder / name)
        return
    tokenizer.save(folder)
    write_tokenizer_config(tokenizer, config, folder)
    write_chat_template(folder)


def holds_tokenizer(source: Path, tokenizer: Tokenizer) -> bool:
    """Whether a folder's files are those of a tokenizer and transformers can read them."""
    if not (source / "tokenizer_config.json").is_file():
        return False
    try:
        stored = Tokenizer.load(source)
    except UserError:
        return False
    return stored.merges == tokenizer.merges and stored.special_tokens == tokenizer.special_tokens


def plan_shards(
    tensors: dict[str, Tensor], shard_bytes: int, dtypes: Mapping[str, torch.dtype]
) -> list[dict[str, Tensor]]:
    """Tensors in order, in shards of at most shard_bytes. A larger tensor is alone in its shard.

    dtypes: in which tensors are written, where it is another one than theirs.
    """
    shards: list[dict[str, Tensor]] = [{}]
    room = shard_bytes
    for name, tensor in tensors.items():
        size = written_bytes(tensor, dtypes.get(name))
        if size > room and shards[-1]:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = tensor
        room -= size
    return shards


def written_bytes(tensor: Tensor, dtype: torch.dtype | None) -> int:
    """Bytes of a tensor in a file, in its own dtype or another one."""
    return tensor.numel() * (dtype or tensor.dtype).itemsize


def write_tensors(
    tensors: dict[str, Tensor],
    folder: Path,
    shard_bytes: int,
    dtypes: Mapping[str, torch.dtype],
) -> None:
    """Write tensors in order into files of at most shard_bytes, and an index where there are many.

    A tensor that is larger gets a file of its own. dtypes: as in plan_shards().
    """
    shards = plan_shards(tensors, shard_bytes, dtypes)
    if len(shards) == 1:
        write_file(shards[0], folder / WEIGHTS_FILE, dtypes)
        return

    weight_map = {}
    for i, shard in enumerate(shards):
        file_name = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        write_file(shard, folder / file_name, dtypes)
        weight_map.update(dict.fromkeys(shard, file_name))
    total_size = sum(written_bytes(tensor, dtypes.get(key)) for key, tensor in tensors.items())
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    write_json(folder / INDEX_FILE, index)


def write_file(
    tensors: dict[str, Tensor], file: Path, dtypes: Mapping[str, torch.dtype] | None = None
) -> None:
    """Write one safetensors file beside its config.json; it is on the disk when this returns.

    dtypes: as in plan_shards().
    """
    written = {}
    for name, tensor in tensors.items():
        dtype = (dtypes or {}).get(name, tensor.dtype)
        written[name] = tensor.detach().to("cpu", dtype).contiguous()
    save_file(written, file, {"format": "pt"})
    # safetensors makes files that only their owner may read.
    shutil.copymode(file.with_name("config.json"), file)
    with open(file, "rb+") as opened:
        os.fsync(opened.fileno())


# --------------------------------------------------------------------------------------------------
# foreign files
def copied_files(source: Path | None) -> list[Path]:
    """The foreign files at the top of a loaded folder that are copied into another folder."""
    if source is None or not source.is_dir():
        return []
    files = []
    for file in sorted(source.iterdir()):
        is_weights = any(file.match(pattern) for pattern in OTHER_WEIGHTS)
        is_hidden = file.name.startswith(".")
        if file.is_file() and not is_hidden and not is_weights and not is_model_file(file):
            files.append(file)
    return files


def keep_foreign_files(source: Path | None, folder: Path, fresh: Path) -> None:
    """Put foreign files into the fresh folder: all of the folder that it replaces, with subfolders,
    and those of the loaded folder. Where both have a file, the replaced folder's is kept.
    """
    if folder.is_dir():
        for entry in folder.iterdir():
            keep_entry(entry, fresh)
    if is_loaded_folder(folder, source) and (folder / PROVENANCE_FILE).is_file():
        link(folder / PROVENANCE_FILE, fresh / PROVENANCE_FILE)
    for file in copied_files(source):
        if not (fresh / file.name).exists():
            shutil.copy2(file, fresh / file.name)


def keep_entry(entry: Path, fresh: Path) -> None:
    """Put an entry of the replaced folder into the fresh one, unless it is the model's own."""
    codec = fresh / CODEC_FOLDER
    if entry.name == CODEC_FOLDER and entry.is_dir() and codec.is_dir():
        for file in entry.iterdir():
            if file.name not in CODEC_FILES:
                link(file, codec / file.name)
    elif not is_model_file(entry):
        link(entry, fresh / entry.name)


def link(entry: str | Path, to: str | Path) -> None:
    """Give a file, or every file of a folder, a second name, since the first is about to go.

    A disk without hard links gets a copy. Symbolic links stay what they are.
    """
    if Path(entry).is_dir() and not Path(entry).is_symlink():
        shutil.copytree(entry, to, symlinks=True, copy_function=link)
        return
    try:
        os.link(entry, to, follow_symlinks=False)
    except OSError:
        shutil.copy2(entry, to, follow_symlinks=False)
