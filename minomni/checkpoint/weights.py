"""Loading a model folder: its tensors, voices and tokenizer.

Our modules have the checkpoint's names, so loading is a bijection: every stored tensor is used
once, every parameter is filled once, every shape is equal, or one error lists the differences. The
headers of the files settle this before any tensor is read.

On a CPU a tensor whose precision does not change is not copied. It is mapped into memory and read
from the disk when it is first used. Writing to such a tensor changes memory alone, because the
mapping is private. Saving a model over the folder that it was loaded from is safe: files are
replaced and not overwritten, and the mapping keeps the old file alive. Overwriting a file in place
(cp over it) changes a model in use, as with transformers. Windows cannot replace mapped files, so
everything is copied there.
"""

import math
import os
import re
import warnings
import zipfile
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.overrides import TorchFunctionMode

from minomni.arguments import check_bool
from minomni.checkpoint.hf_config import (
    CODEC_FOLDER,
    RELEASE,
    read_config,
    read_json,
    read_packing,
    without_speech,
)
from minomni.checkpoint.memory import ANY_PRECISION, FP32, check_fits, precision_of
from minomni.checkpoint.packed_weights import PARTS as PACKED_PARTS
from minomni.checkpoint.packed_weights import PackedFormat, PackedLayer
from minomni.checkpoint.parts import ENCODERS, PREFIXES, parse_parts, prefixes_of
from minomni.checkpoint.quantize import (
    check_quantization,
    parse_quantize,
    quantize_tensor,
    quantized_layers,
)
from minomni.checkpoint.saving import DIT_INV_FREQ, INDEX_FILE, VOICES_FILE, WEIGHTS_FILE, save
from minomni.config import OmniConfig
from minomni.devices import device_of, dtype_of
from minomni.errors import UserError, quote, quote_json, short_path, shorten
from minomni.inputs.tokenizer import Tokenizer, special_tokens
from minomni.model_files import check_file
from minomni.omni import TEXT_HEAD, Omni
from minomni.token2wav.token2wav import check_voice
from minomni.token2wav.voice import Voice

__all__ = ["INDEX_FILE", "VOICES_FILE", "WEIGHTS_FILE", "load", "load_voices", "save"]

VOCABULARY_FILES = ("tokenizer.json", "vocab.json")  # either is enough to load from
COMPUTED = {DIT_INV_FREQ}  # stored for transformers 4.x, computed here
SPEECH = PREFIXES["speech"]  # unused by a model that answers in text alone
PARTS = ("thinker.", *SPEECH)
# The precisions that are read, by their names in safetensors.
PRECISIONS = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}
# Suffixes of the tensors that quantized checkpoints have beside, or in place of, a plain weight.
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
MAX_VOICES_BYTES = 256_000_000  # of spk_dict.pt, also unpacked; the release's has 260 thousand


class Stored(NamedTuple):
    """Precision and shape of a tensor, as the header of a file gives them."""

    precision: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Reading:
    """What becomes of the tensors that are read."""

    device: torch.device
    dtype: torch.dtype  # of Thinker and Talker
    dit_dtype: torch.dtype  # of the DiT; the rest becomes fp32
    methods: dict[str, str]  # {name: int8 or int4} of those that are quantized
    packed: dict[str, PackedLayer]  # {name: where its parts are} of those that are unpacked
    on_host: tuple[str, ...]  # beginnings of the names of those that stay on the host

    def device_of(self, name: str) -> torch.device:
        """The device of a tensor."""
        return torch.device("cpu") if name.startswith(self.on_host) else self.device


def load(
    folder: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | str | None = None,
    quantize: str | None = None,
    parts: str | None = None,
    encoders_on_host: bool = False,
    dit_dtype: torch.dtype | str | None = None,
) -> Omni:
    """Build the model of a folder with its voices and tokenizer -> Omni in evaluation mode.

    folder: an official checkpoint, one saved here, or a cache folder of the Hugging Face hub
    (models--...), of which the main snapshot is read. A folder with a Thinker alone gives a model
    that answers in text. device: "cpu", "cuda", "mps" or "auto". dtype: of Thinker and Talker; None
    or "auto" keeps what is stored, and takes the most common precision where tensors differ.
    Token2Wav and codec are fp32; dit_dtype="bf16" halves the memory of the DiT on a GPU. quantize:
    "int8" or "int4" for the linear layers of Thinker and Talker, with "+head" and "+encoders" for
    those in int8 as well; see quantize.py. The rest of both is bf16 then, unless dtype says
    otherwise. parts: "text", with "+audio", "+vision" and "+speech" for what is loaded besides;
    None loads all. encoders_on_host: keep the encoders in the host's memory and copy them to the
    device whenever they run.

    On a CPU tensors are mapped where possible (see above); on a GPU the host's memory peaks at one
    shard. omni.loaded_from is the folder. Raises UserError naming the file for tensors or files
    that are missing, extra, misshapen or broken, and for a device with too little memory.
    """
    device, dtype = device_of(device), dtype_of(dtype)
    dit_dtype = check_dit_dtype(dit_dtype)
    quantization = parse_quantize(quantize)
    if quantization is not None:
        check_quantization(quantization, device, dtype)
        dtype = dtype or torch.bfloat16
    left_out = parse_parts(parts)
    on_host = ENCODERS if check_bool(encoders_on_host, "encoders_on_host") else ()
    folder = snapshot(Path(folder))

    # The tensors that are there decide about speech and about the text head.
    config = read_config(folder)
    files = headers(folder)
    packed = packed_layers(folder, files)
    stored: dict[str, Stored] = {}
    for names in files.values():
        stored |= names
    check_precisions(folder, stored)
    has_speech = config.talker is not None and any(name.startswith(SPEECH) for name in stored)
    reads_speech = has_speech and "speech" not in left_out
    config = config_of_stored(config, reads_speech, has_text_head=TEXT_HEAD in stored)

    # Nothing is read before names and shapes are known to be right.
    omni = empty_model(folder, config)
    leave_out(omni, left_out if has_speech else tuple(p for p in left_out if p != "speech"))
    omni.thinker.encoders_on_host = encoders_on_host
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    check_bijection(folder, shapes, omni)
    dtype = dtype or most_common_dtype(stored)
    methods = {} if quantization is None else quantized_layers(omni, quantization)
    mapped = mapped_tensors(stored, packed) if device.type == "cpu" else {}
    reading = Reading(device, dtype, dit_dtype, methods, packed, on_host)
    copied = on_host if device.type != "cpu" else ()  # a copy on the same device takes no memory
    tensors = omni.stored_tensors()
    check_fits(folder, tensors, device, dtype, quantization, mapped, copied, dit_dtype)
    fill_model(omni, files, reading)
    omni.quantized = quantize

    omni.voices = load_voices(folder / VOICES_FILE, config, device)
    if any((folder / name).exists() for name in VOCABULARY_FILES):
        omni.tokenizer = Tokenizer.load(folder)
        check_tokenizer(folder, omni.tokenizer, config)
    omni.loaded_from = folder.absolute()
    return omni.eval()


def check_dit_dtype(dtype: torch.dtype | str | None) -> torch.dtype:
    """The precision of the DiT; None or "auto" is fp32. Raises UserError for one other than bf16
    and fp32.
    """
    with suppress(UserError):
        found = dtype_of(dtype) or FP32
        if found in (FP32, torch.bfloat16):
            return found
    raise UserError(f"dit_dtype is {quote(dtype)}; expected fp32 or bf16")


def config_of_stored(config: OmniConfig, reads_speech: bool, has_text_head: bool) -> OmniConfig:
    """The config without speech that is not read, and with a text head of its own if there is one.

    Some folders say that the text head is the embedding table, and still store both.
    """
    if config.talker is not None and not reads_speech:
        config = without_speech(config)
    if config.thinker.tie_word_embeddings and has_text_head:
        untied = replace(config.thinker, tie_word_embeddings=False)
        config = replace(config, thinker=untied)
    return config


def leave_out(omni: Omni, parts: tuple[str, ...]) -> None:
    """Mark parts as left out, and remove the encoders among them."""
    omni.left_out = parts
    for part in parts:
        if part != "speech":
            omni.thinker.leave_out(part)


class SkipInit(TorchFunctionMode):
    """Skips the initialization of parameters while modules are built on the meta device.

    Meta tensors hold no values, but torch would still decompose every random draw, which takes
    longer than reading the files.
    """

    SKIPPED = (
        "normal_",
        "uniform_",
        "trunc_normal_",
        "kaiming_uniform_",
        "zeros_",
        "ones_",
        "constant_",
        "zero_",
        "fill_",
    )

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(function, "__name__", "") in self.SKIPPED:
            return args[0] if args else kwargs["tensor"]
        return function(*args, **kwargs)


def empty_model(folder: Path, config: OmniConfig) -> Omni:
    """The modules of a configuration on the meta device.

    Raises UserError where torch cannot build what the configuration describes.
    """
    try:
        with torch.device("meta"), SkipInit():
            return Omni(config)
    except (
        RuntimeError,
        ValueError,
        TypeError,
        OverflowError,
        ZeroDivisionError,
        MemoryError,
    ) as error:
        raise UserError(
            f"{short_path(folder / 'config.json')}: describes a model that cannot be built "
            f"({shorten(error, 200)})"
        ) from None


# --------------------------------------------------------------------------------------------------
# files and their headers
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
    if (folder / "config.json").exists() or not snapshots.is_dir():
        return folder
    names = sorted(entry.name for entry in snapshots.iterdir() if entry.is_dir())
    main = folder / "refs" / "main"
    if main.exists():
        check_file(main, largest=200)
        revision = main.read_text(errors="replace").strip()
        if revision in names:
            return snapshots / revision
    if len(names) == 1:
        return snapshots / names[0]
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
    if not file.exists():
        return [folder / name for name in unindexed_files(folder)], None
    index = read_json(file).get("weight_map")
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
    if (folder / WEIGHTS_FILE).exists() or (folder / WEIGHTS_FILE).is_symlink():
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


def headers(folder: Path) -> dict[Path, dict[str, Stored]]:
    """{file: {name in our modules: precision and shape}} of all tensors, none of which is read.

    The tensors of a Thinker saved by itself lack its prefix, which is added. Raises UserError for a
    broken shard or a wrong index.
    """
    files, index = shard_files(folder)
    found = {file: header(file) for file in files}
    pairs = [(name, file.name) for file, names in found.items() for name in names]

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

    if not any(name.startswith(PARTS) for name in counts):
        for file, names in found.items():
            found[file] = {f"thinker.{name}": tensor for name, tensor in names.items()}
    codec = folder / CODEC_FOLDER / WEIGHTS_FILE
    if codec.exists():
        found[codec] = header(codec)
    return found


def header(file: Path) -> dict[str, Stored]:
    """{tensor: precision and shape} of one file. Raises UserError for a broken one."""
    check_file(file)
    stored = {}
    try:
        with safe_open(file, "pt") as shard:
            for name in shard.keys():  # noqa: SIM118 (shard is not iterable)
                tensor = shard.get_slice(name)
                stored[name] = Stored(tensor.get_dtype(), tuple(tensor.get_shape()))
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{short_path(file)}: cut short or not a safetensors file ({shorten(error, 100)}); "
            f"copy it again"
        ) from None
    return stored


def packed_layers(folder: Path, files: dict[Path, dict[str, Stored]]) -> dict[str, PackedLayer]:
    """Put weights in the place of their packed parts, in `files` -> {name: where its parts are}.

    A plain folder has none. Raises UserError for parts that are missing or do not fit together.
    """
    packing = read_packing(folder)
    if packing is None:
        return {}
    file_of = {name: file for file, names in files.items() for name in names}
    layers = [name.removesuffix(".qweight") for name in file_of if name.endswith(".qweight")]
    if not layers:
        raise UserError(
            f"{short_path(folder)}: config.json says that weights are packed by {packing.method}, "
            f"and none are; remove quantization_config from it"
        )
    found = {}
    for layer in layers:
        parts = {part: file_of.get(f"{layer}.{part}") for part in PACKED_PARTS[packing.method]}
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
        files[first][f"{layer}.weight"] = Stored("BF16", shape)
        kept = {part: file for part, file in parts.items() if file is not None}
        found[f"{layer}.weight"] = PackedLayer(packing, layer, shape, kept)
    return found


def packed_shape(
    folder: Path, layer: str, stored: dict[str, Stored], packing: PackedFormat
) -> tuple[int, int]:
    """The shape [out, in] of a packed weight. Raises UserError unless all parts fit it."""
    qweight = stored["qweight"].shape
    shape = packing.weight_shape(qweight) if len(qweight) == 2 else (0, 0)
    expected = packing.part_shapes(shape) | {"qweight": qweight}
    for part, (precision, part_shape) in stored.items():
        fits = part_shape == expected[part] and len(qweight) == 2
        if not fits or (precision == "I32") != (part != "scales"):
            raise UserError(
                f"{short_path(folder)}: {shorten(layer, 80)}.{part} is {precision} "
                f"{shorten(list(part_shape), 30)}; beside qweight {shorten(list(qweight), 30)} and "
                f"group_size {packing.group_size}, {packing.method} has "
                f"{shorten(list(expected[part]), 30)}; copy the folder again"
            )
    return shape


# --------------------------------------------------------------------------------------------------
# tensors
def check_precisions(folder: Path, stored: dict[str, Stored]) -> None:
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


def most_common_dtype(stored: dict[str, Stored]) -> torch.dtype:
    """The precision that most numbers of Thinker and Talker are stored in.

    Both use it, because the Talker reads the Thinker's states.
    """
    counts: Counter[str] = Counter()
    for name, tensor in stored.items():
        if name.startswith(ANY_PRECISION):
            counts[tensor.precision] += math.prod(tensor.shape)
    [(precision, _)] = counts.most_common(1)
    return PRECISIONS[precision]


def mapped_tensors(
    stored: dict[str, Stored], packed: dict[str, PackedLayer]
) -> dict[str, torch.dtype]:
    """The tensors that a CPU leaves in their file where their precision fits, with that."""
    if os.name == "nt":
        return {}
    plain = stored.keys() - packed.keys()
    return {name: PRECISIONS[stored[name].precision] for name in plain}


def is_used(name: str, omni: Omni) -> bool:
    """Whether the model needs a stored tensor. It computes some itself, and may lack parts."""
    if name in COMPUTED or name.startswith(prefixes_of(omni.left_out)):
        return False
    return omni.talker is not None or not name.startswith(SPEECH)


def check_bijection(
    folder: Path,
    stored: dict[str, tuple[int, ...]],
    omni: Omni,
) -> None:
    """Raise one UserError that counts missing, extra and misshapen tensors."""
    tensors = omni.stored_tensors()
    wanted = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    stored = {name: shape for name, shape in stored.items() if is_used(name, omni)}

    missing = sorted(wanted.keys() - stored.keys())
    extra = sorted(stored.keys() - wanted.keys())
    misshapen = []
    for name in sorted(wanted.keys() & stored.keys()):
        if stored[name] != wanted[name]:
            found = shorten(list(stored[name]), 24)
            expected = shorten(list(wanted[name]), 24)
            misshapen.append(f"{shorten(name, 50)} is {found}, expected {expected}")
    if not missing and not extra and not misshapen:
        return

    # Three names of each kind, or one where that makes the message too long.
    for first, limit in ((3, 150), (1, 60)):
        problems = []
        if missing:
            problems.append(f"{len(missing)} missing: {list_names(missing, first, limit)}")
        if extra:
            problems.append(f"{len(extra)} extra: {list_names(extra, first, limit)}")
        if misshapen:
            names = list_names(misshapen, first, 120)
            problems.append(f"{len(misshapen)} of another shape: {names}")
        text = "; ".join(problems)
        if len(text) <= 280:
            break
    raise UserError(
        f"{shorten(folder, 100)}: the tensors are not those that config.json describes; "
        f"{shorten(text, 330)}"
    )


def fill_model(
    omni: Omni,
    files: dict[Path, dict[str, Stored]],
    reading: Reading,
) -> None:
    """Give an empty model its tensors, file by file. Raises as read_shard() does."""
    for file, names in files.items():
        tensors = read_shard(file, names, reading, omni)
        omni.load_state_dict(tensors, strict=False, assign=True)
    for name in reading.methods:
        omni.get_parameter(name).requires_grad_(False)
    omni.thinker.tie_head()


def read_shard(
    file: Path, names: dict[str, Stored], reading: Reading, omni: Omni
) -> dict[str, Tensor]:
    """{name in our modules: tensor} of one file, for the tensors that the model uses.

    A tensor that needs no change stays mapped. Tensors are unpacked and quantized one by one, so
    that only one of them is in memory in full. Raises UserError where reading fails.
    """
    tensors: dict[str, Tensor] = {}
    try:
        with safe_open(file, "pt") as shard:
            inside = set(shard.keys())
            for name in names:
                if not is_used(name, omni):
                    continue
                dtype = precision_of(name, reading.dtype, reading.dit_dtype)
                device = reading.device_of(name)
                if name in reading.packed:
                    tensor = reading.packed[name].read(device, dtype)
                else:
                    key = name if name in inside else name.removeprefix("thinker.")
                    tensor = aligned(shard.get_tensor(key).to(device, dtype))
                if name in reading.methods:
                    tensor = quantize_tensor(tensor, reading.methods[name])
                tensors[name] = tensor
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{short_path(file)}: cannot be read ({shorten(error, 100)}); copy it again"
        ) from None
    return tensors


def aligned(tensor: Tensor) -> Tensor:
    """The tensor itself, or a copy where its mapping is misaligned, and always on Windows."""
    misaligned = tensor.is_cpu and tensor.data_ptr() % tensor.element_size() != 0
    return tensor.clone() if misaligned or os.name == "nt" else tensor


# --------------------------------------------------------------------------------------------------
# tokenizer and voices
def check_tokenizer(folder: Path, tokenizer: Tokenizer, config: OmniConfig) -> None:
    """Raise UserError for a tokenizer of another model.

    Its ids must have an embedding, and its special tokens the ids of config.json.
    """
    vocab_size = config.thinker.text.vocab_size
    largest = max(*tokenizer.bytes_of, *tokenizer.special_tokens.values())
    if largest >= vocab_size:
        raise UserError(
            f"{short_path(folder)}: the tokenizer has the id {largest}, the model embeds ids below "
            f"{vocab_size}; use files of one model"
        )
    for name, token in special_tokens(config.thinker.tokens).items():
        found = tokenizer.special_tokens.get(name, token)
        if found != token:
            raise UserError(
                f"{short_path(folder)}: {name} is {found} in the tokenizer's files and {token} in "
                f"config.json; use files of one model"
            )


def load_voices(
    file: Path, config: OmniConfig, device: str | torch.device = "cpu"
) -> dict[str, Voice]:
    """The voices of a spk_dict.pt; none where there is no file, or where the model has no speech.

    The file is read as data; code in it is refused. Raises UserError for a broken file or voice.
    """
    if config.token2wav is None or not (file.exists() or file.is_symlink()):
        return {}
    check_file(file, MAX_VOICES_BYTES)
    check_unpacked(file)
    try:
        # torch warns about unusual pickles; the error below says more.
        with warnings.catch_warnings(action="ignore"):
            data = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken or hostile pickle can raise any exception
        raise UserError(
            f"{short_path(file)}: is cut short or wants to run code ({type(error).__name__}); "
            f"get it from its source again"
        ) from None
    if not isinstance(data, dict):
        raise UserError(
            f"{short_path(file)}: holds a {type(data).__name__}, not a dictionary of voices"
        )
    dit, vocab_size = config.token2wav.dit, config.thinker.text.vocab_size
    voices = {}
    for name, entry in data.items():
        title = f"{short_path(file)}: voice {quote_json(name, 40)}"
        bos, cond, ref_mel = voice_entry(entry, title)
        if not 0 <= bos < vocab_size:
            raise UserError(
                f"{title} has bos_token {quote_json(bos, 20)}; expected an id below {vocab_size}"
            )
        check_voice(Voice(str(name), bos, cond, ref_mel), dit, title)
        cond = cond.detach().float()
        ref_mel = ref_mel.detach().float()
        if not (cond.isfinite().all() and ref_mel.isfinite().all()):
            raise UserError(
                f"{title} holds numbers that are not finite; get it from its source again"
            )
        voices[str(name)] = Voice(str(name), bos, cond.to(device), ref_mel.to(device))
    return voices


def check_unpacked(file: Path) -> None:
    """Raise UserError for an archive that would unpack to far more than voices need."""
    try:
        with zipfile.ZipFile(file) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return  # torch reads some of these, and raises for the others
    if unpacked > MAX_VOICES_BYTES:
        raise UserError(
            f"{short_path(file)}: unpacks to {unpacked:,} bytes, expected at most "
            f"{MAX_VOICES_BYTES:,}; get it from its source again"
        )


def voice_entry(entry: Any, title: str) -> tuple[int, Tensor, Tensor]:
    """bos_token, cond and ref_mel of one entry of a spk_dict.pt. Raises UserError for other types.

    title: the voice's file and name, for the message.
    """
    try:
        bos, cond, ref_mel = entry["bos_token"], entry["cond"], entry["ref_mel"]
        if isinstance(bos, Tensor):
            bos = bos.item()
        valid = is_dense_float(cond) and is_dense_float(ref_mel)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError):
        bos, valid = None, False
    if not isinstance(bos, int) or isinstance(bos, bool) or not valid:
        raise UserError(
            f"{title} must have an id bos_token and tensors cond and ref_mel of floating-point "
            f"numbers"
        )
    return bos, cond, ref_mel


def is_dense_float(tensor: Tensor) -> bool:
    """Whether a tensor holds floating-point numbers in memory, not sparse and not on meta."""
    dense = tensor.layout == torch.strided and not tensor.is_meta
    return dense and tensor.dtype in PRECISIONS.values()
