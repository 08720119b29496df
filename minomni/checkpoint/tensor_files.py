"""The tensor files of a model folder: which there are, what their headers say, and their tensors,
mapped into memory.

Packed weights count as the floating-point weights that they become.
"""

import math
import os
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minomni.checkpoint.hf_config import (
    CODEC_FOLDER,
    COPY_AGAIN,
    RELEASE,
    read_json,
    read_packing,
)
from minomni.checkpoint.packed_weights import TENSOR_SUFFIXES, PackedFormat, PackedLayer
from minomni.checkpoint.parts import PREFIXES
from minomni.checkpoint.saving import INDEX_FILE, WEIGHTS_FILE
from minomni.errors import UserError, quote_json, short_path, shorten
from minomni.model_files import check_file

SPEECH_PREFIXES = PREFIXES["speech"]  # unused by a model that answers in text alone
MODULE_PREFIXES = ("thinker.", *SPEECH_PREFIXES)
# The precisions that are read, by their names in safetensors.
PRECISIONS = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}
MAPPED_PRECISIONS = PRECISIONS | {"I32": torch.int32}  # also those of packed weights
# Suffixes of the tensors that quantized checkpoints have beside a plain weight, or instead of it.
QUANTIZED = (
    ".qweight",
    ".qzeros",
    ".g_idx",
    ".weight_scale",
    ".weight_scale_inv",
    ".weight_packed",
    ".absmax",
    ".quant_map",
    ".SCB",
)
NUMBERED = re.compile(r"(.+-)(\d{5})(-of-(\d{5})\.safetensors)")
# Weights in formats that are not read, and what to do about them.
UNSUPPORTED_WEIGHTS = {
    "adapter_model.safetensors": (
        "a LoRA adapter alone; merge it into its model first (peft: merge_and_unload)"
    ),
    "*.gguf": f"GGUF files, which are not read here; take the release {RELEASE}",
    "*.bin": (
        "weights as .bin files; save them as safetensors first (transformers: save_pretrained)"
    ),
}


class TensorInfo(NamedTuple):
    """Precision and shape of a tensor, as the header of a file gives them."""

    precision: str
    shape: tuple[int, ...]


def snapshot(folder: Path) -> Path:
    """The folder itself, or the main snapshot of a cache folder of the Hugging Face hub.

    Raises UserError where there is no such folder or snapshot.
    """
    if not os.path.isdir(folder):
        raise UserError(
            f"{short_path(folder)}: no such folder; give one that holds config.json and "
            f"*.safetensors"
        )
    snapshots = folder / "snapshots"
    if os.path.lexists(folder / "config.json") or not snapshots.is_dir():
        return folder
    names = sorted(entry.name for entry in snapshots.iterdir() if entry.is_dir())
    main = folder / "refs" / "main"
    if os.path.lexists(main):
        check_file(main, 200, COPY_AGAIN)
        revision = main.read_text(errors="replace").strip()
        if revision in names:
            return snapshots / revision
    if len(names) == 1:
        return snapshots / names[0]
    if not names:
        raise UserError(
            f"{short_path(folder)}: is a cache folder without snapshots; download the model again"
        )
    raise UserError(
        f"{short_path(folder)}: is a cache folder whose refs/main names none of its snapshots; "
        f"give one of {list_names(names)} in snapshots/"
    )


def list_names(names: list[str], first: int = 3, limit: int = 50) -> str:
    """The first names of a list, each of at most `limit` characters, and how many more follow."""
    text = ", ".join(shorten(name, limit) for name in names[:first])
    more = len(names) - first
    return f"{text} and {more} more" if more > 0 else text


def shard_files(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The folder's tensor files, and its index {tensor: file} or None where there is no index.

    The headers of the files make up for a missing index. Raises UserError for a broken one.
    """
    file = folder / INDEX_FILE
    if not os.path.lexists(file):
        return [folder / name for name in unindexed_files(folder)], None
    index = read_json(file, advice=COPY_AGAIN).get("weight_map")
    valid = isinstance(index, dict) and all(isinstance(name, str) for name in index.values())
    if not index or not valid:
        raise UserError(
            f"{short_path(file)}: has no weight_map from tensor names to file names; copy it again"
        )
    names = sorted(set(index.values()))
    for name in names:
        if not is_plain_name(name):
            raise UserError(
                f"{short_path(file)}: names the file {quote_json(name)}, which is outside the "
                "model's folder; copy it again"
            )
    return [folder / name for name in names], index


def is_plain_name(name: str) -> bool:
    """Whether a name stands for a file of the folder itself, on every system."""
    if name in ("", ".", "..") or "\\" in name or not name.isprintable():
        return False
    return name == Path(name).name


def unindexed_files(folder: Path) -> list[str]:
    """The names of the tensor files of a folder without an index.

    Raises UserError where there is none, or where a numbered one is missing.
    """
    if os.path.lexists(folder / WEIGHTS_FILE):
        return [WEIGHTS_FILE]
    for pattern, content in UNSUPPORTED_WEIGHTS.items():
        if any(folder.glob(pattern)) and not any(folder.glob("model*.safetensors")):
            raise UserError(f"{short_path(folder)}: holds {content}")
    names = []
    for file in sorted(folder.glob("*.safetensors")):
        if file.name != "adapter_model.safetensors" and not file.name.startswith("."):
            names.append(file.name)
    if not names:
        raise UserError(
            f"{short_path(folder)}: holds neither {WEIGHTS_FILE} nor {INDEX_FILE}; give the folder "
            f"of a model"
        )
    for name in names:
        match = NUMBERED.fullmatch(name)
        if match:
            return numbered_files(folder, names, match)
    return names


def numbered_files(folder: Path, names: list[str], match: re.Match) -> list[str]:
    """All numbered files of which `match` is one. Raises UserError where some are missing."""
    start, _, rest, total = match.groups()
    expected = [f"{start}{i + 1:05}{rest}" for i in range(int(total))]
    missing = sorted(set(expected) - set(names))
    if missing:
        raise UserError(
            f"{short_path(folder)}: {len(missing)} of {len(expected)} files are missing: "
            f"{list_names(missing)}; copy them again"
        )
    return expected


def read_headers(folder: Path) -> dict[Path, dict[str, TensorInfo]]:
    """{file: {name in our modules: precision and shape}} of all tensors, none of which is read.

    The tensors of a Thinker saved by itself lack its prefix, which is added. Raises UserError for a
    broken shard or a wrong index.
    """
    files, index = shard_files(folder)
    found = {file: read_header(file) for file in files}
    pairs = []  # of a tensor and its file
    for file, names in found.items():
        pairs += [(name, file.name) for name in names]

    # The index must agree, and no tensor may be stored twice.
    if index is not None and sorted(pairs) != sorted(index.items()):
        name, file_name = min(set(pairs) ^ set(index.items()))
        raise UserError(
            f"{short_path(folder / INDEX_FILE)}: index and files disagree, first about "
            f"{quote_json(name)} in {quote_json(file_name)}; copy the folder again"
        )
    counts = Counter(name for name, _ in pairs)
    repeated = [name for name, times in counts.items() if times > 1]
    if repeated:
        raise UserError(
            f"{short_path(folder)}: {len(repeated)} tensors lie in more than one file: "
            f"{list_names(repeated)}; keep the files of one model"
        )

    if not any(name.startswith(MODULE_PREFIXES) for name in counts):
        for file, names in found.items():
            found[file] = {f"thinker.{name}": tensor for name, tensor in names.items()}
    codec = folder / CODEC_FOLDER / WEIGHTS_FILE
    if os.path.lexists(codec):
        found[codec] = read_header(codec)
    return found


def read_header(file: Path) -> dict[str, TensorInfo]:
    """{tensor: precision and shape} of one file. Raises UserError for a broken one."""
    check_file(file, advice=COPY_AGAIN)
    stored = {}
    try:
        with safe_open(file, "pt") as shard:
            for name in shard.keys():  # noqa: SIM118 (shard is not iterable)
                tensor = shard.get_slice(name)
                stored[name] = TensorInfo(tensor.get_dtype(), tuple(tensor.get_shape()))
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{short_path(file)}: cut short or not a safetensors file ({shorten(error, 100)}); "
            f"copy it again"
        ) from None
    return stored


def map_tensors(file: Path) -> dict[str, Tensor]:
    """{tensor: its values} of one file. A page of the file is read when it is first used.

    safetensors maps tensors too, but reads a first page of each, which takes half of the time of
    loading and 65 MB for the 2,447 tensors of the release. It checks the header here: tensors
    follow each other without holes up to the end of the file. Raises OSError and SafetensorError.
    """
    with safe_open(file, "pt") as shard:
        slices = {name: shard.get_slice(name) for name in shard.offset_keys()}
        stored = {name: (s.get_dtype(), s.get_shape()) for name, s in slices.items()}
    with file.open("rb") as opened:
        header_bytes = int.from_bytes(opened.read(8), "little")
    try:
        data = torch.UntypedStorage.from_file(str(file), shared=False, nbytes=file.stat().st_size)
    except RuntimeError as error:  # it was removed or cut meanwhile, or cannot be mapped
        raise OSError(str(error)) from None

    tensors = {}
    begin = 8 + header_bytes
    for name, (precision, shape) in stored.items():
        dtype = MAPPED_PRECISIONS[precision]
        size = math.prod(shape) * dtype.itemsize
        values = torch.empty(0, dtype=torch.uint8)
        values.set_(data[begin : begin + size])  # a storage of its own, without a copy
        if begin % dtype.itemsize:  # not aligned for its precision
            values = values.clone()
        tensors[name] = values.view(dtype).view(shape)
        begin += size
    return tensors


def packed_layers(folder: Path, files: dict[Path, dict[str, TensorInfo]]) -> dict[str, PackedLayer]:
    """Put weights in the place of their packed parts, in `files` -> {name: where its parts are}.

    A plain folder has none. Raises UserError for parts that are missing or do not fit together.
    """
    packing = read_packing(folder)
    if packing is None:
        return {}
    file_of = {}
    for path, names in files.items():
        file_of.update(dict.fromkeys(names, path))
    layers = [name.removesuffix(".qweight") for name in file_of if name.endswith(".qweight")]
    if not layers:
        raise UserError(
            f"{short_path(folder)}: config.json says that weights are packed by {packing.method}, "
            f"and none are; remove quantization_config from it"
        )
    found = {}
    for layer in layers:
        parts = {part: file_of.get(f"{layer}.{part}") for part in TENSOR_SUFFIXES[packing.method]}
        stored = {}
        for part, file in parts.items():
            if file is None:
                raise UserError(
                    f"{short_path(folder)}: {shorten(layer, 80)} has no {part}, which "
                    f"{packing.method} stores beside qweight; copy the folder again"
                )
            stored[part] = files[file].pop(f"{layer}.{part}")
        shape = packed_shape(folder, layer, stored, packing)
        first = file_of[f"{layer}.qweight"]
        files[first][f"{layer}.weight"] = TensorInfo("BF16", shape)
        kept = {part: file for part, file in parts.items() if file is not None}
        found[f"{layer}.weight"] = PackedLayer(packing, layer, shape, kept)
    return found


def packed_shape(
    folder: Path, layer: str, stored: dict[str, TensorInfo], packing: PackedFormat
) -> tuple[int, int]:
    """The shape [out, in] of a packed weight. Raises UserError unless all parts fit it."""
    qweight = stored["qweight"].shape
    shape = packing.weight_shape(qweight) if len(qweight) == 2 else (0, 0)
    expected = packing.part_shapes(shape) | {"qweight": qweight}
    for part, (precision, part_shape) in stored.items():
        fits = part_shape == expected[part] and len(qweight) == 2
        # The scales are floating-point numbers; all other parts are int32.
        right_dtype = precision != "I32" if part == "scales" else precision == "I32"
        if not fits or not right_dtype:
            raise UserError(
                f"{short_path(folder)}: {shorten(layer, 80)}.{part} is {precision} "
                f"{shorten(list(part_shape), 30)}; beside qweight {shorten(list(qweight), 30)} and "
                f"group_size {packing.group_size}, {packing.method} has "
                f"{shorten(list(expected[part]), 30)}; copy the folder again"
            )
    return shape


def check_precisions(folder: Path, stored: dict[str, TensorInfo]) -> None:
    """Raise UserError for tensors of other than floating-point numbers, such as quantized ones."""
    quantized = [name for name in stored if name.endswith(QUANTIZED)]
    if quantized:
        raise UserError(
            f"{short_path(folder)}: its weights are quantized ({len(quantized)} tensors such as "
            f"{shorten(quantized[0], 80)}); such weights are not read here, take the bf16 release "
            f"{RELEASE}"
        )
    wrong = [name for name, tensor in stored.items() if tensor.precision not in PRECISIONS]
    if wrong:
        raise UserError(
            f"{short_path(folder)}: {len(wrong)} tensors are {stored[wrong[0]].precision}, first "
            f"{shorten(wrong[0], 80)}; only {', '.join(PRECISIONS)} are read here, take the bf16 "
            f"release {RELEASE}"
        )
