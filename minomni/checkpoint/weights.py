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
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from minomni.arguments import check_bool
from minomni.checkpoint.cpu_products import choose_products, tell_emulated
from minomni.checkpoint.hf_config import COPY_AGAIN, read_config, without_speech
from minomni.checkpoint.memory import (
    ANY_PRECISION,
    FP32,
    check_fits,
    free_bytes,
    needed_bytes,
    precision_of,
)
from minomni.checkpoint.packed_weights import PackedLayer
from minomni.checkpoint.parts import ENCODERS, parse_parts, prefixes_of
from minomni.checkpoint.processor_files import check_processor_files
from minomni.checkpoint.quantize import (
    Quantization,
    check_quantization,
    parse_quantize,
    quantize_tensor,
    quantized_layers,
)
from minomni.checkpoint.saving import DIT_INV_FREQ, VOICES_FILE
from minomni.checkpoint.tensor_files import (
    PRECISIONS,
    SPEECH_PREFIXES,
    TensorInfo,
    check_precisions,
    list_names,
    map_tensors,
    packed_layers,
    read_headers,
    snapshot,
)
from minomni.checkpoint.voices import load_voices
from minomni.config import OmniConfig
from minomni.devices import device_of, dtype_of, is_emulated, memory_errors
from minomni.errors import UserError, quote, short_path, shorten
from minomni.inputs.tokenizer import Tokenizer, special_tokens
from minomni.model_files import check_file
from minomni.omni import TEXT_HEAD, Omni

VOCABULARY_FILES = ("tokenizer.json", "vocab.json")  # either is enough to load from
MERGES_FILES = ("merges.txt", "added_tokens.json")  # beside vocab.json
MAX_SHARE = 0.75  # of the free memory, for weights that could be smaller
COMPUTED = {DIT_INV_FREQ}  # stored for transformers 4.x, computed here
# What to do where the weights take too much memory.
LOAD_ADVICE = (
    "give quantize= int8 or int4 (--quantize), parts= text (--parts), encoders_on_host=True, or "
    "another device, and end other programs that use this one"
)


@dataclass(frozen=True)
class LoadOptions:
    """The arguments of load(), checked."""

    device: torch.device
    dtype: torch.dtype | None  # of Thinker and Talker; None is the stored one
    dit_dtype: torch.dtype
    quantization: Quantization | None
    left_out: tuple[str, ...]  # parts
    on_host: tuple[str, ...]  # beginnings of the names of the tensors that stay on the host


@dataclass(frozen=True)
class LoadPlan:
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


@memory_errors(LOAD_ADVICE)
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
    or "auto" keeps what is stored, and takes the most common precision where tensors differ; on a
    CPU that multiplies that in software it is fp32, where the memory is enough.
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
    options = check_options(device, dtype, quantize, parts, encoders_on_host, dit_dtype)
    folder = snapshot(Path(folder))
    config = read_config(folder)
    files = read_headers(folder)
    packed = packed_layers(folder, files)
    stored = all_tensors(files)

    # Nothing is read before names, shapes and memory are known to be right.
    omni = model_of_stored(folder, config, stored, options)
    check_processor_files(folder, config)
    plan = make_plan(omni, stored, packed, options)
    if chooses_precision(options, plan) and has_room_for_fp32(omni, stored, plan):
        omni.stored_dtype = plan.dtype
        plan = replace(plan, dtype=FP32)
    check_plan(folder, omni, stored, plan, options.quantization)
    fill_model(omni, files, plan)
    choose_products(omni, plan.methods)
    if is_emulated(plan.dtype, plan.device) and options.quantization is None:
        tell_emulated(plan.dtype, is_asked_for=options.dtype is not None)
    omni.quantized = quantize
    add_voices_and_tokenizer(omni, folder, plan.device)
    omni.loaded_from = folder.absolute()
    return omni.eval()


def check_options(
    device: str | torch.device,
    dtype: torch.dtype | str | None,
    quantize: str | None,
    parts: str | None,
    encoders_on_host: bool,
    dit_dtype: torch.dtype | str | None,
) -> LoadOptions:
    """The arguments of load(). Raises UserError for one that is wrong."""
    device = device_of(device)
    dtype = dtype_of(dtype)
    dit_dtype = check_dit_dtype(dit_dtype)
    quantization = parse_quantize(quantize)
    if quantization is not None:
        check_quantization(quantization, device, dtype)
        dtype = dtype or torch.bfloat16
    left_out = parse_parts(parts)
    on_host = ENCODERS if check_bool(encoders_on_host, "encoders_on_host") else ()
    return LoadOptions(device, dtype, dit_dtype, quantization, left_out, on_host)


def check_dit_dtype(dtype: torch.dtype | str | None) -> torch.dtype:
    """The precision of the DiT; None or "auto" is fp32. Raises UserError for one other than bf16
    and fp32.
    """
    with suppress(UserError):
        found = dtype_of(dtype) or FP32
        if found in (FP32, torch.bfloat16):
            return found
    raise UserError(f"dit_dtype is {quote(dtype)}; expected fp32 or bf16")


def all_tensors(files: dict[Path, dict[str, TensorInfo]]) -> dict[str, TensorInfo]:
    """The tensors of all files by name."""
    stored: dict[str, TensorInfo] = {}
    for tensors in files.values():
        stored |= tensors
    return stored


def model_of_stored(
    folder: Path, config: OmniConfig, stored: dict[str, TensorInfo], options: LoadOptions
) -> Omni:
    """The empty model that the stored tensors fill: they decide about speech and the text head.

    Raises UserError for a precision, a name or a shape that is wrong.
    """
    check_precisions(folder, stored)
    has_speech = config.talker is not None and holds_speech(stored)
    reads_speech = has_speech and "speech" not in options.left_out
    config = config_of_stored(config, reads_speech, has_text_head=TEXT_HEAD in stored)
    omni = empty_model(folder, config)
    missing_parts = options.left_out
    if not has_speech:
        # Speech that the folder lacks is not left out.
        missing_parts = tuple(part for part in missing_parts if part != "speech")
    leave_out(omni, missing_parts)
    omni.thinker.encoders_on_host = bool(options.on_host)
    check_bijection(folder, {name: tensor.shape for name, tensor in stored.items()}, omni)
    return omni


def holds_speech(stored: dict[str, TensorInfo]) -> bool:
    """Whether tensors of the parts that speak are stored."""
    return any(name.startswith(SPEECH_PREFIXES) for name in stored)


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
# tensors
def make_plan(
    omni: Omni,
    stored: dict[str, TensorInfo],
    packed: dict[str, PackedLayer],
    options: LoadOptions,
) -> LoadPlan:
    """Settle the device, precision and quantization of every tensor."""
    dtype = options.dtype or most_common_dtype(stored)
    methods = {}
    if options.quantization is not None:
        methods = quantized_layers(omni, options.quantization)
    return LoadPlan(options.device, dtype, options.dit_dtype, methods, packed, options.on_host)


def chooses_precision(options: LoadOptions, plan: LoadPlan) -> bool:
    """Whether load() may take another precision than the stored one, as a CPU emulates that."""
    is_free = options.dtype is None and options.quantization is None
    return is_free and is_emulated(plan.dtype, plan.device)


def has_room_for_fp32(omni: Omni, stored: dict[str, TensorInfo], plan: LoadPlan) -> bool:
    """Whether the weights in fp32 leave memory on a CPU for caches and activations."""
    free = free_bytes(plan.device)
    mapped = mapped_tensors(stored, plan.packed)
    needed = needed_bytes(omni.stored_tensors(), FP32, None, mapped)
    # Each process that torchrun has started here loads the weights.
    needed *= int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return free is None or needed <= MAX_SHARE * free


def check_plan(
    folder: Path,
    omni: Omni,
    stored: dict[str, TensorInfo],
    plan: LoadPlan,
    quantization: Quantization | None,
) -> None:
    """Raise UserError where the device has too little memory for the plan."""
    on_cpu = plan.device.type == "cpu"
    mapped = mapped_tensors(stored, plan.packed) if on_cpu else {}
    copied = () if on_cpu else plan.on_host  # a copy on the same device takes no memory
    check_fits(
        folder,
        omni.stored_tensors(),
        plan.device,
        plan.dtype,
        quantization,
        mapped,
        copied,
        plan.dit_dtype,
    )


def most_common_dtype(stored: dict[str, TensorInfo]) -> torch.dtype:
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
    stored: dict[str, TensorInfo], packed: dict[str, PackedLayer]
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
    return omni.talker is not None or not name.startswith(SPEECH_PREFIXES)


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
    files: dict[Path, dict[str, TensorInfo]],
    plan: LoadPlan,
) -> None:
    """Give an empty model its tensors, file by file. Raises as read_shard() does."""
    modules = dict(omni.named_modules())
    for file, names in files.items():
        for name, tensor in read_shard(file, names, plan, omni).items():
            # load_state_dict() would walk through all modules for each file.
            owner, _, attribute = name.rpartition(".")
            parameter = nn.Parameter(tensor, requires_grad=name not in plan.methods)
            setattr(modules[owner], attribute, parameter)
    omni.thinker.tie_head()


def read_shard(
    file: Path, names: dict[str, TensorInfo], plan: LoadPlan, omni: Omni
) -> dict[str, Tensor]:
    """{name in our modules: tensor} of one file, for the tensors that the model uses.

    A tensor that needs no change stays mapped. Tensors are unpacked and quantized one by one, so
    that only one of them is in memory in full. Raises UserError where reading fails.
    """
    tensors: dict[str, Tensor] = {}
    try:
        stored = map_tensors(file)
        for name in names:
            if not is_used(name, omni):
                continue
            dtype = precision_of(name, plan.dtype, plan.dit_dtype)
            device = plan.device_of(name)
            # As stored first, so that the weights are the same on every processor.
            as_stored = precision_of(name, omni.stored_dtype or plan.dtype, plan.dit_dtype)
            if name in plan.packed:
                tensor = plan.packed[name].read(device, as_stored).to(dtype)
            else:
                key = name if name in stored else name.removeprefix("thinker.")
                tensor = own(stored[key].to(device, as_stored).to(dtype))
            if name in plan.methods:
                tensor = quantize_tensor(tensor, plan.methods[name])
            tensors[name] = tensor
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{short_path(file)}: cannot be read ({shorten(error, 100)}); copy it again"
        ) from None
    return tensors


def own(tensor: Tensor) -> Tensor:
    """The tensor itself, or a copy on Windows, where a mapped file cannot be replaced."""
    return tensor.clone() if tensor.is_cpu and os.name == "nt" else tensor


# --------------------------------------------------------------------------------------------------
# tokenizer
def add_voices_and_tokenizer(omni: Omni, folder: Path, device: torch.device) -> None:
    """Load what a folder holds beside its tensors. Raises UserError for what does not fit."""
    omni.voices = load_voices(folder / VOICES_FILE, omni.config, device)
    if holds_tokenizer(folder):
        omni.tokenizer = Tokenizer.load(folder)
        check_tokenizer(folder, omni.tokenizer, omni.config)


def holds_tokenizer(folder: Path) -> bool:
    """Whether a folder has a tokenizer. Raises UserError where one of its files is a link to
    nothing, which would read like a file that is absent.
    """
    for name in (*VOCABULARY_FILES, *MERGES_FILES):
        if (folder / name).is_symlink():
            check_file(folder / name, advice=COPY_AGAIN)
    return any((folder / name).exists() for name in VOCABULARY_FILES)


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
