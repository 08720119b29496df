"""What a model folder is, whether every file of it is right, and the memory that it needs, before
any tensor is read.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from minomni.checkpoint import weights
from minomni.checkpoint.hf_config import (
    MODEL_TYPE,
    RELEASE,
    quantization,
    quantization_configs,
    read_config,
    read_json,
    read_packing,
    without_speech,
)
from minomni.checkpoint.memory import ANY_PRECISION, GIB, OPTIONS, needed_bytes
from minomni.checkpoint.packed_weights import packed_format
from minomni.checkpoint.parts import ENCODERS, parse_parts, prefixes_of
from minomni.checkpoint.processor_files import check_processor_files
from minomni.checkpoint.quantize import parse_quantize
from minomni.checkpoint.saving import INDEX_FILE, VOICES_FILE
from minomni.checkpoint.tensor_files import (
    TensorInfo,
    check_precisions,
    packed_layers,
    read_headers,
    snapshot,
)
from minomni.checkpoint.voices import load_voices
from minomni.config import QWEN7B, DecoderConfig, OmniConfig
from minomni.errors import UserError, quote_json, short_path
from minomni.inputs.tokenizer import Tokenizer
from minomni.omni import TEXT_HEAD

TABLE_OPTIONS = (None, *OPTIONS)  # of load(quantize=), a column each
CACHE_LENGTHS = (1024, 4096, 8192, 16384, 32768)  # tokens
TABLE_PARTS = ("text", "text+audio+vision")  # of load(parts=), a row each
AUDIO_TOKENS = 25  # a second
PROMPT_SECONDS = (15, 30, 60)
WIDTHS_3B = (2048, 36)  # hidden size and layers of the Thinker of the 3B (source: Qwen2.5-3B)


@dataclass
class FolderReport:
    """The findings of check_folder()."""

    kind: str  # what the folder is, in words
    lines: list[str] = field(default_factory=list)  # one for each kind of file
    errors: list[str] = field(default_factory=list)  # each in one line
    memory: str = ""  # a Markdown table; empty where the sizes are not known

    def text(self) -> str:
        """The report as it is printed."""
        wrong = [f"WRONG     {error}" for error in self.errors]
        parts = [f"is        {self.kind}", *self.lines, *wrong]
        if self.memory:
            parts += ["", self.memory]
        return "\n".join(parts)


def check_folder(folder: str | Path) -> FolderReport:
    """Check a model folder by its settings and the headers of its tensor files.

    Whatever is wrong is in `errors`, all of it and not only the first. Raises UserError where there
    is no such folder.
    """
    folder = snapshot(Path(folder))
    report = FolderReport(kind_of(folder))
    stored: dict[str, TensorInfo] = {}
    with_error(report, lambda: stored.update(check_files(folder, report)))
    configs: list[OmniConfig] = []
    with_error(report, lambda: configs.append(stored_config(folder, stored)))
    if not configs:
        report.kind = report.kind or f"unknown, because {report.errors[-1]}"
        return report

    [config] = configs
    if report.kind == "":
        report.kind = size_of(config)
        packing = read_packing(folder)
        if packing is not None:
            report.kind += f", packed in 4 bits by {packing.method.upper()}"
    with_error(report, lambda: check_processor_files(folder, config))
    with_error(report, lambda: check_tensors(folder, stored, config, report))
    with_error(report, lambda: check_tokenizer(folder, config, report))
    with_error(report, lambda: check_voices(folder, config, report))
    report.memory = memory_table(config)
    return report


def with_error(report: FolderReport, check: Callable[[], object]) -> None:
    """Run one check and keep its error, unless another check had the same."""
    try:
        check()
    except UserError as error:
        if str(error) not in report.errors:
            report.errors.append(str(error))


# --------------------------------------------------------------------------------------------------
# what it is
def kind_of(folder: Path) -> str:
    """What a folder is that is no plain model of this kind, with the reason; "" for one that is."""
    try:
        data = read_json(folder / "config.json")
    except UserError as error:
        return f"unknown, because {error}"
    model_type = data.get("model_type", MODEL_TYPE)
    if model_type not in (MODEL_TYPE, f"{MODEL_TYPE}_thinker"):
        return (
            f"unknown, because model_type is {quote_json(model_type)} and not '{MODEL_TYPE}'; "
            f"take {RELEASE}"
        )
    for settings in quantization_configs(data):
        if packed_format(settings) is None:
            method = quantization(settings)
            return f"Qwen2.5-Omni with quantized weights ({method}), which are not read here"
    return ""


def size_of(config: OmniConfig) -> str:
    """The name of the release that has these sizes, or the sizes."""
    text = config.thinker.text
    alone = "" if config.talker is not None else ", a Thinker alone: it answers in text"
    if same_sizes(config, QWEN7B):
        return f"Qwen2.5-Omni-7B{alone}"
    widths = (text.hidden_size, text.num_hidden_layers)
    if widths == WIDTHS_3B:
        return f"Qwen2.5-Omni-3B{alone}"
    return f"Qwen2.5-Omni with {widths[1]} layers of width {widths[0]} in the Thinker{alone}"


def same_sizes(config: OmniConfig, release: OmniConfig) -> bool:
    """Whether two models have the same modules; one of them may lack speech."""
    if config.talker is None:
        release = without_speech(release)
    ours = (config.thinker, config.talker, config.token2wav)
    return ours == (release.thinker, release.talker, release.token2wav)


# --------------------------------------------------------------------------------------------------
# files
def check_files(folder: Path, report: FolderReport) -> dict[str, TensorInfo]:
    """Report the tensor files -> the header of every tensor; a packed one counts as unpacked.

    Raises UserError.
    """
    files = read_headers(folder)
    packed_layers(folder, files)
    sizes = [file.stat().st_size for file in files]
    line = f"files     {len(files)} with {sum(sizes):,} bytes, none cut short"
    stored = weights.all_tensors(files)
    if (folder / INDEX_FILE).exists():
        line += f"; {INDEX_FILE} agrees with them"
    report.lines.append(line)
    return stored


def stored_config(folder: Path, stored: dict[str, TensorInfo]) -> OmniConfig:
    """The configuration of the model that load() would build. Raises UserError."""
    config = read_config(folder)
    if stored and not weights.holds_speech(stored):
        config = without_speech(config)
    if config.thinker.tie_word_embeddings and TEXT_HEAD in stored:
        config = replace(config, thinker=replace(config.thinker, tie_word_embeddings=False))
    return config


def check_tensors(
    folder: Path, stored: dict[str, TensorInfo], config: OmniConfig, report: FolderReport
) -> None:
    """Compare names, shapes and precisions with what the configuration describes. Raises
    UserError.
    """
    if not stored:  # reported by check_files()
        return
    check_precisions(folder, stored)
    omni = weights.empty_model(folder, config)
    weights.check_bijection(folder, {name: s.shape for name, s in stored.items()}, omni)
    numbers = sum(math.prod(tensor.shape) for tensor in stored.values())
    report.lines.append(
        f"tensors   {len(stored):,} with {numbers:,} numbers; names and shapes are right"
    )
    report.lines.append(f"stored    {precisions(stored)}")


def precisions(stored: dict[str, TensorInfo]) -> str:
    """The precisions of each part, and which differ from the release's."""
    parts: dict[str, set[str]] = {}
    for name, tensor in stored.items():
        parts.setdefault(name.split(".")[0], set()).add(tensor.precision)
    texts = []
    for part, found in parts.items():
        expected = "BF16" if f"{part}." in ANY_PRECISION else "F32"
        note = "" if found == {expected} else f" (the release has {expected})"
        texts.append(f"{part} {' and '.join(sorted(found))}{note}")
    return ", ".join(texts)


def check_tokenizer(folder: Path, config: OmniConfig, report: FolderReport) -> None:
    """Report the tokenizer. Raises UserError for one of another model."""
    if not weights.holds_tokenizer(folder):
        raise UserError(f"{short_path(folder)}: holds no tokenizer; copy tokenizer.json too")
    tokenizer = Tokenizer.load(folder)
    weights.check_tokenizer(folder, tokenizer, config)
    report.lines.append(f"tokenizer {len(tokenizer):,} tokens")


def check_voices(folder: Path, config: OmniConfig, report: FolderReport) -> None:
    """Report the voices. Raises UserError where a model that speaks has none."""
    if config.talker is None:
        return
    voices = load_voices(folder / VOICES_FILE, config)
    if not voices:
        raise UserError(f"{short_path(folder)}: holds no {VOICES_FILE}, so it has no voice")
    report.lines.append(f"voices    {', '.join(voices)}")


# --------------------------------------------------------------------------------------------------
# memory
def cache_bytes(config: DecoderConfig | None) -> int:
    """Bytes of a KV cache in bf16 for one token."""
    if config is None:
        return 0
    return 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim


def prefill_bytes(config: OmniConfig) -> int:
    """Largest bytes of activations for one token of a prompt, in bf16.

    These are a layer's gate and up projections and their product, beside input and residual; a
    visual token is made of four patches of the vision encoder.
    """
    text, vision = config.thinker.text, config.thinker.vision
    decoder = 3 * text.intermediate_size + 4 * text.hidden_size
    patches = vision.spatial_merge_size**2
    encoder = patches * (3 * vision.intermediate_size + 4 * vision.hidden_size)
    return 2 * max(decoder, encoder)


def video_tokens(config: OmniConfig) -> int:
    """Visual tokens of a second of video with the largest frames."""
    vision, media = config.thinker.vision, config.media
    steps = media.fps / vision.temporal_patch_size
    return round(steps * media.frame_max_pixels / vision.cell_size**2)


def weight_sizes(
    tensors: dict[str, Tensor], left_out: tuple[str, ...], on_host: tuple[str, ...] = ()
) -> list[int]:
    """Bytes of weights on a device for each of TABLE_OPTIONS.

    left_out, on_host: the beginnings of the names of those that are not loaded, and of those that
    are there only while they run.
    """
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(left_out)}
    sizes = []
    for option in TABLE_OPTIONS:
        quantization = parse_quantize(option)
        sizes.append(needed_bytes(kept, torch.bfloat16, quantization, on_host=on_host))
    return sizes


def memory_table(config: OmniConfig) -> str:
    """GiB of weights, of the KV cache by context and of a prefill by seconds of media, in Markdown.

    A column for bf16, and for each way to quantize that load() offers; rows of weights for all
    parts and for some. The prefill's rows are estimates.
    """
    tensors = weights.empty_model(Path("."), config).stored_tensors()
    both = [config.thinker.text, None if config.talker is None else config.talker.decoder]
    per_token = sum(cache_bytes(decoder) for decoder in both)
    names = [option or "bf16" for option in TABLE_OPTIONS]
    columns = len(names)
    lines = [f"| GiB | {' | '.join(names)} |", "|---" * (columns + 1) + "|"]

    def row(name: str, values: Sequence[float]) -> None:
        cells = [f"{value / GIB:.2f}" for value in values]
        lines.append(f"| {name} | {' | '.join(cells)} |")

    row("weights", weight_sizes(tensors, ()))
    for parts in TABLE_PARTS:
        left_out = prefixes_of(parse_parts(parts))
        row(f"weights with parts={parts}", weight_sizes(tensors, left_out))
    # One encoder at a time is copied to the device.
    on_host = weight_sizes(tensors, (), ENCODERS)
    row("most weights on the device with encoders_on_host", on_host)
    context = config.thinker.text.max_position_embeddings
    for length in CACHE_LENGTHS:
        if length <= context:
            row(f"KV caches of {length:,} tokens", [per_token * length] * columns)
    video = AUDIO_TOKENS + video_tokens(config)
    for what, rate in (("audio", AUDIO_TOKENS), ("video in the largest size", video)):
        for seconds in PROMPT_SECONDS:
            tokens = rate * seconds
            if tokens <= context:
                needed = tokens * (per_token + prefill_bytes(config))
                row(f"prompt with {seconds} s of {what}, about", [needed] * columns)
    return "\n".join(lines)
