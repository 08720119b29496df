"""LoRA adapters in peft's format, with transformers' names (arXiv 2106.09685).

A linear layer W x becomes W x + (alpha / r) B A x. W is frozen, A [r, in] and B [out, r] train, and
B starts at zero. peft holds the layers and the file format; here are the names of layers, which
differ between programs, and checks.
"""

import hashlib
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from warnings import catch_warnings

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn

from minomni.arguments import check_bool, check_int, check_number
from minomni.checkpoint.hf_config import read_json
from minomni.checkpoint.quantize import let_gradients_through, without_import_notes
from minomni.checkpoint.saving import VOICES_FILE, write_voices
from minomni.checkpoint.tensor_files import PRECISIONS, read_header, read_headers
from minomni.checkpoint.voices import load_voices
from minomni.errors import UserError, quote, quote_json, short_path, shorten
from minomni.files import sibling_path, writing
from minomni.omni import Omni

ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILES = (ADAPTER_FILE, ADAPTER_CONFIG, VOICES_FILE, "README.md")  # of a folder
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TUNABLE_PARTS = ("thinker", "talker")
RANKS = (1, 4096)
ALPHAS = (1e-3, 1e5)
BASE_KEY = "minomni_base_"  # and a part: the digest of its weights, in the metadata of ADAPTER_FILE
# Entries of adapter_config.json that a plain adapter may have with any value: they say where it
# comes from, how it was trained, and which layers it has, which its tensors say as well.
OTHER_ENTRIES = (
    "auto_mapping",
    "base_model_name_or_path",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "lora_dropout",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
)
# Ways to initialize A and B that leave the weights of the base as they are.
INITIALIZATIONS = (True, False, "gaussian", "orthogonal", "eva")
# The whole name: peft takes a bare q_proj for a suffix, which the encoders' layers have too.
DECODERS = {
    "thinker": r"thinker\.model\.(language_model\.)?layers\.\d+\.\w+\.({layers})",
    "talker": r"talker\.model\.layers\.\d+\.\w+\.({layers})",
}
# transformers 5.x calls the Thinker's decoder thinker.model.language_model, 4.x and the release
# thinker.model; programs that wrap the Thinker alone leave out its prefix.
PREFIX = re.compile(r"^(thinker\.)?(base_model\.model\.)?")


@dataclass(frozen=True)
class LoraOptions:
    """What --lora and --parts say."""

    r: int
    alpha: float
    layers: tuple[str, ...] = LAYERS

    def pattern(self, parts: tuple[str, ...]) -> str:
        """A regular expression of the names of the layers, in our names and transformers'."""
        layers = "|".join(self.layers)
        return "|".join(DECODERS[part].replace("{layers}", layers) for part in parts)


def parse_lora(text: str) -> LoraOptions:
    """r=16,alpha=32,layers=q_proj+v_proj -> options; alpha is 2 r by default. Raises UserError."""
    given = dict(entry.partition("=")[::2] for entry in text.split(","))
    unknown = given.keys() - {"r", "alpha", "layers"}
    if unknown or "r" not in given:
        raise UserError(f"--lora {quote(text)}: expected r=16, with alpha=32 and layers=q_proj+...")
    try:
        r = int(given["r"])
        alpha = float(given.get("alpha", 2 * r))
    except ValueError:
        raise UserError(f"--lora {quote(text)}: r and alpha are numbers, as in r=16") from None
    layers = tuple(given["layers"].split("+")) if "layers" in given else LAYERS
    for layer in layers:
        if layer not in LAYERS:
            raise UserError(
                f"--lora: no layer is called {quote(layer)}; they are {', '.join(LAYERS)}"
            )
    return LoraOptions(
        check_int(r, "--lora r", *RANKS), check_number(alpha, "--lora alpha", *ALPHAS), layers
    )


def require_peft() -> Any:
    """The module peft. Raises UserError where it is not installed."""
    try:
        with without_import_notes():  # peft imports torchao where that is installed
            import peft
    except ImportError:
        raise UserError("LoRA needs peft: pip install -r requirements-tune.txt") from None
    return peft


def add_lora(omni: Omni, options: LoraOptions, parts: tuple[str, ...], seed: int = 0) -> None:
    """Put fresh adapters into a model: its answers stay the same until they are trained.

    Raises UserError for a part that the model does not have.
    """
    peft = require_peft()
    for part in parts:
        if getattr(omni, part, None) is None:
            raise UserError(f"this model has no {part.title()}; leave it out of --parts")
    config = peft.LoraConfig(
        r=options.r, lora_alpha=options.alpha, target_modules=options.pattern(parts)
    )
    torch.manual_seed(seed)
    omni.adapter_base = base_digests(omni)
    inject(config, omni)


def inject(config: Any, omni: Omni) -> None:
    """Put the layers of a peft configuration into a model, in fp32: bf16 would lose small steps."""
    let_gradients_through(omni)
    with catch_warnings(action="ignore"):  # about merging into quantized layers, which is not done
        require_peft().inject_adapter_in_model(config, omni)
    for name, parameter in omni.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()


def save_lora(omni: Omni, folder: Path, voices: list[str]) -> None:
    """Write the adapters of a model as a folder in peft's format, with the voices that are new.

    An adapter that is there is replaced. Raises UserError where it cannot be written, and where
    the folder holds other files than those of an adapter.
    """
    check_replaceable(folder)
    peft = require_peft()
    tensors = {}
    for name, tensor in peft.get_peft_model_state_dict(omni).items():
        name = name.replace("thinker.model.layers.", "thinker.model.language_model.layers.")
        tensors[f"base_model.model.{name}"] = tensor.detach().cpu().contiguous()
    config: Any = omni.peft_config["default"]  # type: ignore[index, union-attr]
    if omni.loaded_from is not None:
        config.base_model_name_or_path = str(omni.loaded_from)
    config.inference_mode = True
    fresh = sibling_path(folder, "part")
    old = sibling_path(folder, "old")
    try:
        with writing(folder):
            fresh.mkdir(parents=True)
            config.save_pretrained(fresh)
            metadata = {"format": "pt", **omni.adapter_base}
            (fresh / ADAPTER_FILE).write_bytes(safetensors_bytes(tensors, metadata))
            if voices:
                write_voices({name: omni.voices[name] for name in voices}, fresh / VOICES_FILE)
            if folder.exists():
                folder.rename(old)
            fresh.rename(folder)
    finally:
        if old.exists() and not folder.exists():  # the second rename failed
            old.rename(folder)
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def safetensors_bytes(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    """A safetensors file that is the same each time: the library orders metadata at random."""
    plain = save(tensors)
    begin = 8 + int.from_bytes(plain[:8], "little")
    header = json.dumps({"__metadata__": metadata, **json.loads(plain[8:begin])}).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + plain[begin:]


def check_replaceable(folder: Path) -> None:
    """Raises UserError if a folder holds files that do not belong to an adapter."""
    if not folder.is_dir():
        return
    others = sorted({path.name for path in folder.iterdir()} - set(ADAPTER_FILES))
    if others:
        raise UserError(
            f"{short_path(folder)}: holds {shorten(others[0], 60)}, which saving would delete; "
            f"move it away, or give another folder"
        )


def base_digests(omni: Omni) -> dict[str, str]:
    """{metadata key: digest} of the decoders that an adapter may change, by part.

    A digest is of the names, the shapes and, in bf16, the first rows of the linear layers, so it is
    the same in bf16 and fp32, and merging an adapter changes it. Quantized weights are read from
    the model's folder. There is no digest where that holds packed ones or is gone, and none of a
    model in fp16, which rounds bf16.
    """
    digests: dict[str, str] = {}
    if omni.thinker.lm_head.weight.dtype == torch.float16:
        return digests
    for part in TUNABLE_PARTS:
        pattern = re.compile(DECODERS[part].replace("{layers}", "|".join(LAYERS)) + r"\.weight")
        shapes = {}
        for name, parameter in omni.named_parameters():
            if pattern.fullmatch(name):
                shapes[name] = tuple(parameter.shape)
        rows = first_rows(omni, list(shapes))
        if not rows:
            continue
        digest = hashlib.sha256()
        for name, shape in sorted(shapes.items()):
            digest.update(f"{name} {shape} ".encode())
            row = rows[name].detach().cpu().bfloat16().contiguous()
            digest.update(row.view(torch.uint8).numpy().tobytes())
        digests[BASE_KEY + part] = digest.hexdigest()
    return digests


def first_rows(omni: Omni, names: list[str]) -> dict[str, Tensor]:
    """The first rows of matrices [out, in] by name, as they were before they were quantized; {}
    where the model's folder does not hold all of them.
    """
    if omni.quantized is None:
        return {name: omni.get_parameter(name)[0] for name in names}
    rows: dict[str, Tensor] = {}
    if omni.loaded_from is None:
        return rows
    try:
        headers = read_headers(omni.loaded_from)
    except UserError:  # it was moved since
        return rows
    for file, tensors in headers.items():
        with safe_open(file, "pt") as shard:
            in_file = set(shard.keys())
            for name in tensors.keys() & set(names):
                stored = name if name in in_file else name.removeprefix("thinker.")
                rows[name] = shard.get_slice(stored)[0]
    return rows if len(rows) == len(names) else {}


def load_lora(omni: Omni, folder: Path) -> None:
    """Put the adapters of a folder into a model, whichever program of the three spellings wrote it.

    Raises UserError for a folder without one, for an adapter that is more than plain LoRA, and for
    the adapter of another base. All shapes are compared before anything is allocated.
    """
    peft = require_peft()
    label = short_path(folder)
    for file in (ADAPTER_CONFIG, ADAPTER_FILE):
        if not (folder / file).is_file():
            raise UserError(f"{label}: holds no {file}; give the folder of an adapter")
    entries = read_json(folder / ADAPTER_CONFIG, advice="copy the adapter again")
    settings = plain_settings(entries, label)
    header = read_header(folder / ADAPTER_FILE)
    stored_names = {our_name(name): name for name in header}
    shapes = {}
    for name, stored_name in stored_names.items():
        precision, shapes[name] = header[stored_name]
        if precision not in PRECISIONS:
            raise UserError(
                f"{label}: {shorten(name, 100)} is {precision}; only {', '.join(PRECISIONS)} are "
                f"read, so save the adapter in one of them"
            )
    if len(shapes) < len(header):
        raise UserError(f"{label}: holds tensors of one layer in two spellings; merge it elsewhere")

    layers = {re.sub(r"\.lora_\w+(\.weight)?$", "", name) for name in shapes}
    check_shapes(shapes, expected_shapes(omni, layers, settings["r"], label), settings["r"], label)
    digests = base_digests(omni)
    check_base(folder / ADAPTER_FILE, digests, layers, entries, label)
    tensors = load_file(folder / ADAPTER_FILE)
    for name, stored_name in stored_names.items():
        if not tensors[stored_name].isfinite().all():
            raise UserError(
                f"{label}: {shorten(name, 100)} holds NaN or infinite numbers; train it again, or "
                f"copy it again"
            )

    inject(peft.LoraConfig(target_modules=layers, **settings), omni)
    omni.adapter_base = digests
    named = {name: tensors[stored_name] for name, stored_name in stored_names.items()}
    peft.set_peft_model_state_dict(omni, named)
    if (folder / VOICES_FILE).is_file():
        device = omni.thinker.device
        omni.voices.update(load_voices(folder / VOICES_FILE, omni.config, device))


def plain_settings(entries: dict, label: str) -> dict[str, Any]:
    """What adapter_config.json says of an adapter that has the matrices of LoRA alone, of one rank
    and with one alpha -> the arguments of peft's LoraConfig.

    Raises UserError for a wrong value, and for an entry that would change the result otherwise.
    """
    settings = {
        "r": check_int(entries.get("r"), f"{label}: r", *RANKS),
        "lora_alpha": check_number(entries.get("lora_alpha"), f"{label}: lora_alpha", *ALPHAS),
        "use_rslora": check_bool(entries.get("use_rslora", False), f"{label}: use_rslora"),
    }
    for name, value in entries.items():
        if name in settings or name in OTHER_ENTRIES:
            continue
        allowed: tuple[Any, ...] = {
            "peft_type": ("LORA",),
            "bias": ("none",),
            "init_lora_weights": INITIALIZATIONS,
        }.get(name, ())
        is_empty = value is None or value is False or value in ("", [], {})
        if not (value in allowed if allowed else is_empty):
            raise UserError(
                f"{label}: is not a plain LoRA adapter: {shorten(name, 60)} is "
                f"{quote_json(value)}; merge it where it was made"
            )
    return settings


def our_name(name: str) -> str:
    """A tensor's name in an adapter of any program -> its name in our modules.

    >>> our_name("base_model.model.thinker.model.language_model.layers.0.mlp.up_proj.lora_A.weight")
    'thinker.model.layers.0.mlp.up_proj.lora_A.weight'
    >>> our_name("base_model.model.model.layers.0.mlp.up_proj.lora_A.weight")
    'thinker.model.layers.0.mlp.up_proj.lora_A.weight'
    >>> our_name("thinker.base_model.model.model.layers.0.mlp.up_proj.lora_A.weight")
    'thinker.model.layers.0.mlp.up_proj.lora_A.weight'
    """
    name = PREFIX.sub("", name).replace("model.language_model.layers.", "model.layers.")
    is_whole = name.startswith(("thinker.", "talker."))
    return name if is_whole else f"thinker.{name}"


def expected_shapes(omni: Omni, layers: set[str], r: int, label: str) -> dict[str, tuple[int, ...]]:
    """The shapes of A and B of linear layers, by name. Raises UserError for other layers."""
    modules = dict(omni.named_modules())
    expected: dict[str, tuple[int, ...]] = {}
    for layer in sorted(layers):
        linear = modules.get(layer)
        if not isinstance(linear, nn.Linear):
            raise UserError(
                f"{label}: belongs to another model: this one has no linear layer {quote(layer)}"
            )
        expected[f"{layer}.lora_A.weight"] = (r, linear.in_features)
        expected[f"{layer}.lora_B.weight"] = (linear.out_features, r)
    return expected


def check_shapes(
    stored: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]], r: int, label: str
) -> None:
    """Raises UserError unless an adapter's tensors are those of its layers, and there are some."""
    if not stored:
        raise UserError(f"{label}: {ADAPTER_FILE} holds no tensors; copy it again")
    for name in sorted(stored.keys() | expected.keys()):
        found = stored.get(name, "missing")
        wanted = expected.get(name, "unknown")
        if found != wanted:
            raise UserError(
                f"{label}: belongs to another model: {shorten(name, 100)} is {found} in the "
                f"adapter and {wanted} here, with r = {r}"
            )


def check_base(
    file: Path, digests: dict[str, str], layers: set[str], entries: dict, label: str
) -> None:
    """Raises UserError where an adapter says that it was trained on other weights than these.

    Only the parts count that it changes. Adapters of other programs say nothing of their base.
    """
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata() or {}
    for part in TUNABLE_PARTS:
        key = BASE_KEY + part
        is_adapted = any(layer.startswith(f"{part}.") for layer in layers)
        if is_adapted and key in metadata and digests.get(key, metadata[key]) != metadata[key]:
            name = quote_json(entries.get("base_model_name_or_path"), 120)
            raise UserError(
                f"{label}: was trained on other weights of the {part.title()} than this model "
                f"has; give the model that it was trained on, {name}, without it merged in"
            )


def merge_lora(omni: Omni) -> None:
    """Add the adapters of a model to its weights; it has plain linear layers again.

    Raises UserError where a sum is not finite.
    """
    from peft.tuners.lora import LoraLayer

    for owner in list(omni.modules()):
        for name, layer in list(owner.named_children()):
            if isinstance(layer, LoraLayer):
                try:
                    layer.merge(safe_merge=True)  # type: ignore[operator]
                except ValueError:  # of NaN in the sum
                    raise UserError(
                        f"{name}: the sum of weights and adapter is not finite; train the adapter "
                        f"again with a smaller alpha"
                    ) from None
                setattr(owner, name, layer.get_base_layer())
    del omni.peft_config
