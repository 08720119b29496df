"""Checkpoint folders: the only file that knows foreign tensor names and layouts.

Our modules carry the checkpoint's names, so loading is a bijection: every stored tensor is used
once, every parameter is filled once, every shape is equal, or one error lists the differences.
Nothing is read before that is settled.

On a CPU a tensor whose precision need not change is not copied: it is the file itself, mapped into
memory, and read from the disk when it is first used. Writing to such a tensor changes the memory
alone (the mapping is private). Files are replaced and not overwritten here, so saving a model over
the folder that it was loaded from is safe: the mapping keeps the old file alive. Whoever overwrites
a file in place (cp over it) changes a model that is in use, as it does with transformers. Windows
does not replace mapped files, so there everything is copied.
"""

import os
import re
import warnings
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.overrides import TorchFunctionMode

from minomni.checkpoint.hf_config import (
    CODEC_FOLDER,
    RELEASE,
    read_config,
    read_json,
    without_speech,
)
from minomni.checkpoint.saving import DIT_ANGLES, INDEX, VOICES, WHOLE, save  # noqa: F401, weights.save is its name elsewhere
from minomni.config import OmniConfig
from minomni.devices import device_of, dtype_of
from minomni.errors import UserError, shorten
from minomni.inputs.tokenizer import Tokenizer, special_tokens
from minomni.model_files import check_file, quote, where
from minomni.omni import TEXT_HEAD, Omni
from minomni.token2wav.token2wav import shortest_reference
from minomni.token2wav.voice import Voice

TOKENIZER_FILES = ("tokenizer.json", "vocab.json")  # either is enough to load from
COMPUTED = {DIT_ANGLES}  # stored for transformers 4.x, computed by us
ANY_PRECISION = (
    "thinker.",
    "talker.",
)  # the rest is always fp32, as the release stores and runs it
SPEECH = ("talker.", "token2wav.", "codec.")  # what a model that answers in text alone does without
PARTS = ("thinker.", *SPEECH)
# How safetensors spells the precisions that are read.
PRECISIONS = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}
# Ends of the names that quantized checkpoints have beside, or in place of, a plain weight.
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
# Weights that are there, in a form that is not read: what to do about it.
OTHER_WEIGHTS = {
    "adapter_model.safetensors": "a LoRA adapter alone; merge it into its model first (peft: merge_and_unload)",
    "*.gguf": f"GGUF files, which are not read here; take the release {RELEASE}",
    "*.bin": "weights as .bin files; save them as safetensors first (transformers: save_pretrained)",
}
MOST_VOICES = (
    256_000_000  # bytes of a spk_dict.pt, also when unpacked; the release's has 260 thousand
)
LONGEST_REFERENCE = 30_000  # mel frames (five minutes) of a voice


class Stored(NamedTuple):
    """What the header of a file says about a tensor."""

    precision: str
    shape: tuple[int, ...]


def load(
    folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | str | None = None
) -> Omni:
    """Build the model of a folder (an official checkpoint, or one saved here), with its voices and
    tokenizer.

    A folder with a Thinker alone gives a model that answers in text. A cache folder of the Hugging
    Face hub (models--...) stands for the snapshot that it calls main. device: "cpu", "cuda", "mps"
    or "auto". dtype is that of Thinker and Talker, None or "auto" keeps what is stored, and the
    commonest precision where it differs; Token2Wav and codec are fp32. Tensors are mapped or copied
    as the head of this file says; on a GPU, memory of the host peaks at one shard. omni.loaded_from
    is the folder. Raises UserError naming the file for anything missing, extra, misshapen or
    broken.
    """
    device, dtype = device_of(device), dtype_of(dtype)
    folder = snapshot(Path(folder))
    config = read_config(folder)
    files = headers(folder)
    stored = {name: tensor for names in files.values() for name, tensor in names.items()}
    check_precisions(folder, stored)
    if config.talker is not None and not any(name.startswith(SPEECH) for name in stored):
        config = without_speech(config)
    if config.thinker.tie_word_embeddings and TEXT_HEAD in stored:  # an own table after all
        config = replace(config, thinker=replace(config.thinker, tie_word_embeddings=False))
    omni = empty_model(folder, config)
    check_bijection(folder, {name: tensor.shape for name, tensor in stored.items()}, omni)
    for file, names in files.items():
        tensors = read_shard(file, names, device, dtype or commonest(stored), omni)
        omni.load_state_dict(tensors, strict=False, assign=True)
    omni.thinker.tie_head()
    if config.talker is not None:
        omni.voices = load_voices(folder / VOICES, config, device)
    if any((folder / name).exists() for name in TOKENIZER_FILES):
        omni.tokenizer = Tokenizer.load(folder)
        check_tokenizer(folder, omni.tokenizer, config)
    omni.loaded_from = folder.absolute()
    return omni.eval()


class Empty(TorchFunctionMode):
    """Skip the first numbers of modules while they are built on meta, where there is no room for
    numbers anyway.

    torch would still decompose every random draw, which takes longer than reading the files.
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
    """The modules of a configuration, on meta. Raises UserError where torch cannot build what it
    describes.
    """
    try:
        with torch.device("meta"), Empty():
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
            f"{where(folder / 'config.json')}: describes a model that cannot be built "
            f"({shorten(error, 200)})"
        ) from None


def snapshot(folder: Path) -> Path:
    """The folder itself, or the main snapshot of a cache folder of the Hugging Face hub. Raises
    UserError.
    """
    if not os.path.isdir(folder):
        raise UserError(
            f"{where(folder)}: no such folder; give one that holds config.json and *.safetensors"
        )
    if (folder / "config.json").exists() or not (folder / "snapshots").is_dir():
        return folder
    there = sorted(entry.name for entry in (folder / "snapshots").iterdir() if entry.is_dir())
    main = folder / "refs" / "main"
    if main.exists():
        check_file(main, largest=200)
        revision = main.read_text(errors="replace").strip()
        if revision in there:
            return folder / "snapshots" / revision
    if len(there) == 1:
        return folder / "snapshots" / there[0]
    raise UserError(
        f"{where(folder)}: is a cache folder whose refs/main names none of its snapshots; give one of "
        f"{count(there)} in snapshots/"
    )


def count(names: list[str], shown: int = 3, room: int = 50) -> str:
    """The first names of a list, and how many more there are."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(shorten(name, room) for name in names[:shown]) + more


def shard_files(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The folder's tensor files, and what its index says about them: {tensor: file}, None without
    one.

    Where the index of several files is lost, their headers say as much. Raises UserError.
    """
    if not (folder / INDEX).exists():
        return [folder / name for name in unlisted_files(folder)], None
    index = read_json(folder / INDEX).get("weight_map")
    if (
        not isinstance(index, dict)
        or not index
        or not all(isinstance(name, str) for name in index.values())
    ):
        raise UserError(
            f"{where(folder / INDEX)}: has no weight_map from tensor names to file names; copy it again"
        )
    names = sorted(set(index.values()))
    for name in names:
        if (
            name in ("", ".", "..")
            or name != Path(name).name
            or "\\" in name
            or not name.isprintable()
        ):
            raise UserError(
                f"{where(folder / INDEX)}: names the file {quote(name)}, which is outside the model's "
                f"folder; copy it again"
            )
    return [folder / name for name in names], index


def unlisted_files(folder: Path) -> list[str]:
    """The names of the tensor files of a folder without an index. Raises UserError where some are
    missing.
    """
    if (folder / WHOLE).exists() or (folder / WHOLE).is_symlink():
        return [WHOLE]
    for pattern, what in OTHER_WEIGHTS.items():
        if any(folder.glob(pattern)) and not any(folder.glob("model*.safetensors")):
            raise UserError(f"{where(folder)}: holds {what}")
    names = sorted(
        file.name
        for file in folder.glob("*.safetensors")
        if file.name != "adapter_model.safetensors" and not file.name.startswith(".")
    )
    if not names:
        raise UserError(
            f"{where(folder)}: holds neither {WHOLE} nor {INDEX}; give the folder of a model"
        )
    numbered = [match for match in map(NUMBERED.fullmatch, names) if match]
    if numbered:
        start, _, rest, total = numbered[0].groups()
        expected = [f"{start}{i + 1:05}{rest}" for i in range(int(total))]
        lost = sorted(set(expected) - set(names))
        if lost:
            raise UserError(
                f"{where(folder)}: {len(lost)} of {len(expected)} files are missing: {count(lost)}; copy "
                f"them again"
            )
        names = expected
    return names


def headers(folder: Path) -> dict[Path, dict[str, Stored]]:
    """{file: {tensor: what is stored}}, without reading the tensors, by the names that our modules
    have.

    The tensors of a Thinker saved by itself lack its prefix. Raises UserError for a broken shard or
    a wrong index.
    """
    files, index = shard_files(folder)
    found = {file: header(file) for file in files}
    places = [(name, file.name) for file, names in found.items() for name in names]
    if index is not None and sorted(places) != sorted(index.items()):
        name, file = sorted(set(places) ^ set(index.items()))[0]
        raise UserError(
            f"{where(folder / INDEX)}: index and files disagree, first about {quote(name)} in "
            f"{quote(file)}; copy the folder again"
        )
    twice = [name for name, times in Counter(name for name, _ in places).items() if times > 1]
    if twice:
        raise UserError(
            f"{where(folder)}: {len(twice)} tensors lie in more than one file: {count(twice)}; keep the "
            f"files of one model"
        )
    if not any(name.startswith(PARTS) for name, _ in places):
        found = {
            file: {f"thinker.{name}": tensor for name, tensor in names.items()}
            for file, names in found.items()
        }
    codec = folder / CODEC_FOLDER / WHOLE
    return found | ({codec: header(codec)} if codec.exists() else {})


def header(file: Path) -> dict[str, Stored]:
    """{tensor: what is stored} of one file. Raises UserError for a broken one."""
    check_file(file)
    try:
        with safe_open(file, "pt") as shard:
            slices = {name: shard.get_slice(name) for name in shard.keys()}  # noqa: SIM118 (no iterator)
            return {
                name: Stored(part.get_dtype(), tuple(part.get_shape()))
                for name, part in slices.items()
            }
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{where(file)}: cut short or not a safetensors file ({shorten(error, 100)}); copy it "
            f"again"
        ) from None


def check_precisions(folder: Path, stored: dict[str, Stored]) -> None:
    """Raise UserError for tensors that are no plain floating-point numbers: quantized ones, for the
    most part.
    """
    quantized = [name for name in stored if name.endswith(QUANTIZED)]
    if quantized:
        raise UserError(
            f"{where(folder)}: its weights are quantized ({len(quantized)} tensors such as "
            f"{shorten(quantized[0], 80)}); such weights are not read here, take the bf16 release "
            f"{RELEASE}"
        )
    wrong = [name for name, tensor in stored.items() if tensor.precision not in PRECISIONS]
    if wrong:
        raise UserError(
            f"{where(folder)}: {len(wrong)} tensors are {stored[wrong[0]].precision}, first "
            f"{shorten(wrong[0], 80)}; only {', '.join(PRECISIONS)} are read here, take the bf16 release "
            f"{RELEASE}"
        )


def commonest(stored: dict[str, Stored]) -> torch.dtype:
    """The precision that most numbers of Thinker and Talker are stored in; they pass numbers on, so
    they share one.
    """
    numbers = Counter()
    for name, tensor in stored.items():
        if name.startswith(ANY_PRECISION):
            numbers[tensor.precision] += torch.Size(tensor.shape).numel()
    return PRECISIONS[numbers.most_common(1)[0][0]]


def used(name: str, omni: Omni) -> bool:
    """Whether the model needs a stored tensor: it computes some itself, and speech may be turned
    off.
    """
    return name not in COMPUTED and not (omni.talker is None and name.startswith(SPEECH))


def check_bijection(folder: Path, stored: dict[str, tuple[int, ...]], omni: Omni) -> None:
    """Raise one UserError that counts all missing, extra and misshapen tensors, and names the first
    of each.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in omni.stored_tensors().items()}
    stored = {name: shape for name, shape in stored.items() if used(name, omni)}
    missing, extra = sorted(wanted.keys() - stored.keys()), sorted(stored.keys() - wanted.keys())
    shapes = [
        name for name in sorted(wanted.keys() & stored.keys()) if stored[name] != wanted[name]
    ]
    shapes = [
        f"{shorten(name, 50)} is {shorten(list(stored[name]), 24)}, expected {shorten(list(wanted[name]), 24)}"
        for name in shapes
    ]
    problems = [
        (what, names)
        for what, names in (("missing", missing), ("extra", extra), ("of another shape", shapes))
        if names
    ]
    for shown, room in ((3, 150), (1, 60)):  # fewer names where they do not fit
        text = "; ".join(
            f"{len(names)} {what}: {count(names, shown, 120 if names is shapes else room)}"
            for what, names in problems
        )
        if len(text) <= 280:
            break
    if problems:
        raise UserError(
            f"{shorten(folder, 100)}: the tensors are not those that config.json describes; "
            f"{shorten(text, 330)}"
        )


def read_shard(
    file: Path, names: dict[str, Stored], device: torch.device, dtype: torch.dtype, omni: Omni
) -> dict[str, Tensor]:
    """The tensors of one file that the model uses, in their precision, on the device; mapped where
    that is enough.
    """
    tensors = {}
    try:
        with safe_open(file, "pt") as shard:
            inside = set(shard.keys())
            for name in names:
                if used(name, omni):
                    tensor = shard.get_tensor(
                        name if name in inside else name.removeprefix("thinker.")
                    )
                    precision = dtype if name.startswith(ANY_PRECISION) else torch.float32
                    tensors[name] = usable(tensor.to(device, precision))
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{where(file)}: cannot be read ({shorten(error, 100)}); copy it again"
        ) from None
    return tensors


def usable(tensor: Tensor) -> Tensor:
    """A tensor as it is, or a copy where the mapping will not do: numbers across addresses, and
    Windows.
    """
    crooked = tensor.is_cpu and tensor.data_ptr() % tensor.element_size()
    return tensor.clone() if crooked or os.name == "nt" else tensor


def check_tokenizer(folder: Path, tokenizer: Tokenizer, config: OmniConfig) -> None:
    """Raise UserError for a tokenizer of another model: ids without an embedding, other ids of
    special tokens.
    """
    rows = config.thinker.text.vocab_size
    largest = max(*tokenizer.bytes_of, *tokenizer.special_tokens.values())
    if largest >= rows:
        raise UserError(
            f"{where(folder)}: the tokenizer has the id {largest}, the model embeds ids below {rows}; use "
            f"files of one model"
        )
    for name, token in special_tokens(config.thinker.tokens).items():
        if tokenizer.special_tokens.get(name, token) != token:
            raise UserError(
                f"{where(folder)}: {name} is {tokenizer.special_tokens[name]} in the tokenizer's files and "
                f"{token} in config.json; use files of one model"
            )


def load_voices(
    file: Path, config: OmniConfig, device: str | torch.device = "cpu"
) -> dict[str, Voice]:
    """The voices of a spk_dict.pt, none where there is no file. Read as data, code is refused.
    Raises UserError.
    """
    if not (file.exists() or file.is_symlink()):
        return {}
    check_file(file, MOST_VOICES)
    check_unpacked(file)
    try:
        with warnings.catch_warnings(
            action="ignore"
        ):  # torch's remarks on strange pickles; ours follows
            data = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # what a broken or hostile pickle raises can be any exception
        raise UserError(
            f"{where(file)}: is cut short or wants to run code ({type(error).__name__}); "
            f"get it from its source again"
        ) from None
    if not isinstance(data, dict):
        raise UserError(f"{where(file)}: holds a {type(data).__name__}, not a dictionary of voices")
    return {
        str(name): voice_from(file, name, entry, config, device) for name, entry in data.items()
    }


def check_unpacked(file: Path) -> None:
    """Raise UserError for an archive that would unpack to far more than voices need."""
    try:
        with zipfile.ZipFile(file) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return  # torch reads what it can, and says what it cannot
    if unpacked > MOST_VOICES:
        raise UserError(
            f"{where(file)}: unpacks to {unpacked:,} bytes, expected at most {MOST_VOICES:,}; get it from "
            f"its source again"
        )


def voice_from(
    file: Path, name: str, entry: dict, config: OmniConfig, device: str | torch.device
) -> Voice:
    """One entry, checked against the sizes: bos_token, cond [1, E], ref_mel [1, R, mel_dim]. Raises
    UserError.
    """
    dit, rows, who = (
        config.token2wav.dit,
        config.thinker.text.vocab_size,
        f"{where(file)}: voice {quote(name, 40)}",
    )
    try:
        bos, cond, ref_mel = entry["bos_token"], entry["cond"], entry["ref_mel"]
        bos = bos.item() if isinstance(bos, Tensor) else bos
        numbers = all(
            x.dtype in PRECISIONS.values() and x.layout == torch.strided and not x.is_meta
            for x in (cond, ref_mel)
        )
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError):
        bos, numbers = None, False
    if not isinstance(bos, int) or isinstance(bos, bool) or not numbers:
        raise UserError(
            f"{who} must have an id bos_token and tensors cond and ref_mel of floating-point numbers"
        )
    shortest, longest = shortest_reference(dit), LONGEST_REFERENCE
    fits = (
        cond.shape == (1, dit.enc_emb_dim)
        and ref_mel.ndim == 3
        and ref_mel.shape[::2] == (1, dit.mel_dim)
    )
    if not 0 <= bos < rows or not fits or not shortest <= ref_mel.shape[1] <= longest:
        raise UserError(
            f"{who} has bos_token {quote(bos, 20)}, cond {shorten(list(cond.shape), 40)}, ref_mel "
            f"{shorten(list(ref_mel.shape), 40)}; expected an id below {rows}, [1, {dit.enc_emb_dim}] and "
            f"[1, {shortest} to {longest} frames, {dit.mel_dim}]"
        )
    cond, ref_mel = cond.detach().float(), ref_mel.detach().float()
    if not (cond.isfinite().all() and ref_mel.isfinite().all()):
        raise UserError(f"{who} holds numbers that are not finite; get it from its source again")
    return Voice(str(name), bos, cond.to(device), ref_mel.to(device))
