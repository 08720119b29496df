"""Writing a model folder: one that load() reads, and transformers and vLLM too."""

import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from minomni.checkpoint.hf_config import (
    CODEC_FOLDER,
    MODEL_TYPE,
    read_json,
    write_config,
    write_json,
)
from minomni.checkpoint.processor_files import (
    generation_ids,
    processor_settings,
    write_chat_template,
    write_tokenizer_config,
)
from minomni.config import DiTConfig, OmniConfig
from minomni.errors import UserError, shorten
from minomni.files import beside
from minomni.inputs.tokenizer import Tokenizer
from minomni.omni import Omni

INDEX, WHOLE, VOICES = "model.safetensors.index.json", "model.safetensors", "spk_dict.pt"
SHARD_BYTES = 5_000_000_000
# transformers 4.x stores these numbers although they follow from the sizes, and calls them missing
# where they are not.
DIT_ANGLES = "token2wav.code2wav_dit_model.rotary_embed.inv_freq"
# Files about the tokenizer and the prompt. They are written, or kept from the loaded folder, all
# together.
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
HISTORY = "trained.json"  # how a model came to be; train/ writes it
# What a saved model consists of, beside the shards that its index names. Anything else is foreign.
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    INDEX,
    WHOLE,
    "model-?????-of-?????.safetensors",
    VOICES,
    HISTORY,
    *TOKENIZER_FILES,
)
CODEC_FILES = {"config.json", WHOLE}
# Never copied into another folder: other copies of the weights.
OTHER_WEIGHTS = (
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
    """Write a model, its voices and its tokenizer as a checkpoint folder that load() and
    transformers read.

    Tensors keep their precision; files of Thinker, Talker and Token2Wav hold at most shard_bytes
    each. The codec goes into the subfolder codec/, as other programs do not know it. What else the
    folder held that the model was loaded from (README, license, tokenizer.json, pictures) is kept.

    The folder is written beside the target and renamed at the end. An existing model folder is
    replaced, a link to one is followed. Raises UserError, with the target as it was, where that is
    a file, a device or a folder that holds anything but a model, and where writing fails.
    """
    if not isinstance(omni, Omni):
        raise UserError(
            f"save() was given a {type(omni).__name__} as the model; expected what load() gives"
        )
    if not isinstance(folder, (str, Path)) or not str(folder):
        raise UserError(
            f"save() was given {shorten(repr(folder), 60)} as the folder; expected a path"
        )
    target = Path(folder)
    try:
        folder = Path(os.path.realpath(target))
        check_target(target, folder, omni.loaded_from)
        if omni.talker is None and folder.is_dir() and holds_speech(folder):
            raise UserError(
                f"{target}: holds a model that speaks, and the one to save answers in text alone; choose "
                f"another folder"
            )
        fresh, old = beside(folder, "part"), beside(folder, "old")
    except (OSError, ValueError, SafetensorError) as error:  # ValueError: a path with NUL in it
        if isinstance(error, UserError):
            raise
        raise unwritable(target, error) from None
    try:
        fresh.mkdir(parents=True)
        write_model(omni, fresh, shard_bytes)
        keep_foreign_files(omni.loaded_from, folder, fresh)
        if folder.exists():
            folder.rename(old)
        fresh.rename(folder)
    except (
        OSError,
        SafetensorError,
        RuntimeError,
    ) as error:  # torch.save raises RuntimeError for a full disk
        raise unwritable(target, error) from error
    finally:
        if old.exists() and not folder.exists():  # the second rename failed
            old.rename(folder)
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def unwritable(target: Path, error: Exception) -> UserError:
    reason = getattr(error, "strerror", None) or str(error)[:200]
    return UserError(f"{target}: the model cannot be saved there ({reason}); choose another folder")


def check_target(target: Path, folder: Path, loaded_from: Path | None) -> None:
    """Raise UserError unless a model may be written as `folder`, to which the given path `target`
    leads.
    """
    if not folder.exists():
        if target.is_symlink():
            raise UserError(
                f"{target}: is a link to {folder}, which does not exist; remove the link or make the folder"
            )
        parent = next(parent for parent in folder.parents if parent.exists())
        if not parent.is_dir():
            raise UserError(
                f"{target}: {parent} is a file, so no folder can be made in it; choose another folder"
            )
        return
    if not folder.is_dir():
        kind = "a file" if folder.is_file() else "a device or a pipe"
        raise UserError(f"{target}: is {kind}; a model is saved as a folder, choose another name")
    if loaded_from is not None and same_folder(folder, loaded_from):
        return  # all that it holds is kept
    if any(folder.iterdir()) and not holds_model(folder):
        raise UserError(f"{target}: holds something that is no model; choose another folder")
    known = {file.name for file in copied_files(loaded_from)}
    for entry in sorted(folder.iterdir()):
        if entry.name not in known and not is_model_file(entry):
            raise UserError(
                f"{target}: holds {entry.name!r}, which saving would delete; choose another folder"
            )


def is_model_file(entry: Path) -> bool:
    """Whether a file of a model folder, or its codec folder, belongs to the model."""
    if entry.name == CODEC_FOLDER:
        return entry.is_dir() and {file.name for file in entry.iterdir()} <= CODEC_FILES
    return (
        any(entry.match(pattern) for pattern in MODEL_FILES)
        or entry.name in indexed_tensors(entry.parent).values()
    )


def indexed_tensors(folder: Path) -> dict[str, str]:
    """What the folder's own index says: {tensor: shard}. Nothing where there is none, or a broken
    one.
    """
    try:
        index = read_json(folder / INDEX, optional=True).get("weight_map", {})
    except UserError:
        return {}
    return index if isinstance(index, dict) else {}


def holds_model(folder: Path) -> bool:
    """Whether a folder's config.json is that of a model of this kind."""
    try:
        kind = read_json(folder / "config.json").get("model_type")
    except UserError:
        return False
    return isinstance(kind, str) and kind.startswith(MODEL_TYPE)


def holds_speech(folder: Path) -> bool:
    """Whether a model folder holds tensors of a Talker."""
    names = indexed_tensors(folder)
    if (folder / WHOLE).is_file():
        with safe_open(folder / WHOLE, "pt") as file:
            names = [*names, *file.keys()]
    return any(name.startswith("talker.") for name in names)


def same_folder(a: Path, b: Path) -> bool:
    return a.exists() and b.exists() and os.path.samefile(a, b)


def write_model(omni: Omni, folder: Path, shard_bytes: int) -> None:
    """All files that make up the model, into an empty folder."""
    config, source = omni.config, omni.loaded_from
    write_config(config, folder)
    precision = str(omni.thinker.lm_head.weight.dtype).removeprefix("torch.")
    add_settings(folder / "config.json", {"torch_dtype": precision}, None)
    add_settings(folder / "generation_config.json", generation_ids(config), source)
    add_settings(folder / "preprocessor_config.json", processor_settings(config), source)
    tensors = omni.stored_tensors()
    codec = {name: tensor for name, tensor in tensors.items() if name.startswith("codec.")}
    tensors = {name: tensor for name, tensor in tensors.items() if name not in codec}
    if config.token2wav is not None:
        tensors[DIT_ANGLES] = dit_angles(config.token2wav.dit)
    write_tensors(tensors, folder, shard_bytes)
    if config.codec is not None:
        write_file(codec, folder / CODEC_FOLDER / WHOLE)
    if omni.voices:
        torch.save(
            {
                name: {
                    "bos_token": voice.bos_token,
                    "cond": voice.cond.cpu(),
                    "ref_mel": voice.ref_mel.cpu(),
                }
                for name, voice in omni.voices.items()
            },
            folder / VOICES,
        )
    if omni.tokenizer is not None:
        write_tokenizer(omni.tokenizer, config, folder, source)


def add_settings(file: Path, defaults: dict, source: Path | None) -> None:
    """Add to a JSON file what else belongs there: keys of the same file in the loaded folder, or
    else the defaults.
    """
    theirs = {} if source is None else read_json(source / file.name, optional=True)
    write_json(file, defaults | theirs | read_json(file))


def write_tokenizer(
    tokenizer: Tokenizer, config: OmniConfig, folder: Path, source: Path | None
) -> None:
    """Keep the loaded folder's tokenizer files, if transformers can do with them and they are this
    tokenizer's, or else write our own.
    """
    if (
        source is not None
        and (source / "tokenizer_config.json").is_file()
        and is_tokenizer_of(source, tokenizer)
    ):
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copy2(source / name, folder / name)
        return
    tokenizer.save(folder)
    write_tokenizer_config(tokenizer, config, folder)
    write_chat_template(folder)


def is_tokenizer_of(source: Path, tokenizer: Tokenizer) -> bool:
    try:
        stored = Tokenizer.load(source)
    except UserError:
        return False
    return stored.merges == tokenizer.merges and stored.special_tokens == tokenizer.special_tokens


def dit_angles(dit: DiTConfig) -> Tensor:
    """The rotary frequencies of the DiT, [head_dim / 2] float32."""
    return 1.0 / dit.rope_theta ** (torch.arange(0, dit.head_dim, 2).float() / dit.head_dim)


def write_tensors(tensors: dict[str, Tensor], folder: Path, shard_bytes: int) -> None:
    """Write tensors in order into files of at most shard_bytes (a larger one gets its own), with an
    index if many.
    """
    shards, room = [{}], shard_bytes
    for name, tensor in tensors.items():
        if tensor.nbytes > room and shards[-1]:
            shards.append({})
            room = shard_bytes
        shards[-1][name] = tensor
        room -= tensor.nbytes
    count = len(shards)
    files = (
        [WHOLE]
        if count == 1
        else [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    )
    for file, shard in zip(files, shards):
        write_file(shard, folder / file)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
            "weight_map": {name: file for file, shard in zip(files, shards) for name in shard},
        }
        write_json(folder / INDEX, index)


def write_file(tensors: dict[str, Tensor], file: Path) -> None:
    """One safetensors file beside its config.json, on the disk when this returns."""
    save_file(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
        file,
        {"format": "pt"},
    )
    shutil.copymode(
        file.with_name("config.json"), file
    )  # safetensors makes files that only their owner may read
    with open(file, "rb+") as written:
        os.fsync(written.fileno())


# --------------------------------------------------------------------------------------------------------
# foreign files
def copied_files(source: Path | None) -> list[Path]:
    """The files of a loaded folder that go along into another folder: those at its top that are not
    weights or ours.
    """
    if source is None or not source.is_dir():
        return []
    return [
        file
        for file in sorted(source.iterdir())
        if file.is_file()
        and not file.name.startswith(".")
        and not is_model_file(file)
        and not any(file.match(pattern) for pattern in OTHER_WEIGHTS)
    ]


def keep_foreign_files(source: Path | None, folder: Path, fresh: Path) -> None:
    """Put into the fresh folder what is not ours: all that the folder holds which it replaces, with
    its subfolders, and files of the loaded one. Where both have a file, the replaced folder's
    stays.
    """
    if folder.is_dir():
        for entry in folder.iterdir():
            if entry.name == CODEC_FOLDER and entry.is_dir() and (fresh / CODEC_FOLDER).is_dir():
                for file in entry.iterdir():
                    if file.name not in CODEC_FILES:
                        link(file, fresh / CODEC_FOLDER / file.name)
            elif not is_model_file(entry):
                link(entry, fresh / entry.name)
    if source is not None and same_folder(source, folder) and (folder / HISTORY).is_file():
        link(folder / HISTORY, fresh / HISTORY)
    for file in copied_files(source):
        if not (fresh / file.name).exists():
            shutil.copy2(file, fresh / file.name)


def link(entry: str | Path, to: str | Path) -> None:
    """A file, or all of a folder, under a second name where the first is about to go; a copy where
    a disk has no such links. Symbolic links stay what they are.
    """
    if Path(entry).is_dir() and not Path(entry).is_symlink():
        shutil.copytree(entry, to, symlinks=True, copy_function=link)
        return
    try:
        os.link(entry, to, follow_symlinks=False)
    except OSError:
        shutil.copy2(entry, to, follow_symlinks=False)
