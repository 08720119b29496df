"""LoRA adapters in peft's format, with transformers' names (arXiv 2106.09685).

A linear layer W x becomes W x + (alpha / r) B A x. W is frozen, A [r, in] and B [out, r] train, and
B starts at zero. peft holds the layers and the file format; here are the names of layers, which
differ between programs, and checks.
"""

import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from warnings import catch_warnings

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from minomni.arguments import check_int, check_number
from minomni.checkpoint.quantize import let_gradients_through, without_import_notes
from minomni.checkpoint.saving import VOICES_FILE, write_voices
from minomni.checkpoint.voices import load_voices
from minomni.errors import UserError, quote, short_path, shorten
from minomni.files import sibling_path, writing
from minomni.omni import Omni

ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILES = (ADAPTER_FILE, ADAPTER_CONFIG, VOICES_FILE, "README.md")  # of a folder
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TUNABLE_PARTS = ("thinker", "talker")
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
        check_int(r, "--lora r", 1, 4096), check_number(alpha, "--lora alpha", 1e-3, 1e5), layers
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
            (fresh / ADAPTER_FILE).write_bytes(save(tensors, {"format": "pt"}))
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


def load_lora(omni: Omni, folder: Path) -> None:
    """Put the adapters of a folder into a model, whichever program of the three spellings wrote it.

    Raises UserError for a folder without one, and for the adapter of another base.
    """
    peft = require_peft()
    label = short_path(folder)
    for file in (ADAPTER_CONFIG, ADAPTER_FILE):
        if not (folder / file).is_file():
            raise UserError(f"{label}: holds no {file}; give the folder of an adapter")
    try:
        config = peft.PeftConfig.from_pretrained(str(folder))
        stored = load_file(folder / ADAPTER_FILE)
    except (OSError, SafetensorError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{label}: the adapter cannot be read ({shorten(error, 100)})") from None
    if not is_plain(config):
        raise UserError(f"{label}: is not a plain LoRA adapter; merge it where it was made")

    tensors = {our_name(name): tensor for name, tensor in stored.items()}
    layers = {re.sub(r"\.lora_\w+(\.weight)?$", "", name) for name in tensors}
    modules = dict(omni.named_modules())
    foreign = sorted(name for name in layers if not isinstance(modules.get(name), nn.Linear))
    if foreign:
        raise UserError(
            f"{label}: belongs to another model: this one has no linear layer {quote(foreign[0])}"
        )
    config.target_modules = layers
    config.exclude_modules = config.layers_to_transform = None  # `layers` are all there are
    inject(config, omni)
    check_shapes(tensors, peft.get_peft_model_state_dict(omni), label)
    peft.set_peft_model_state_dict(omni, tensors)
    if (folder / VOICES_FILE).is_file():
        device = omni.thinker.device
        omni.voices.update(load_voices(folder / VOICES_FILE, omni.config, device))


def is_plain(config: Any) -> bool:
    """Whether an adapter has the matrices of LoRA alone, of one rank and with one alpha."""
    if type(config) is not require_peft().LoraConfig:
        return False
    has_more = config.bias != "none" or config.lora_bias or config.modules_to_save
    return not (has_more or config.rank_pattern or config.alpha_pattern)


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


def check_shapes(stored: dict[str, Tensor], expected: dict[str, Tensor], label: str) -> None:
    """Raises UserError unless an adapter's tensors are those of the injected layers."""
    for name in sorted(stored.keys() | expected.keys()):
        found = tuple(stored[name].shape) if name in stored else "missing"
        wanted = tuple(expected[name].shape) if name in expected else "unknown"
        if found != wanted:
            raise UserError(
                f"{label}: belongs to another model: {shorten(name, 100)} is {found} in the "
                f"adapter and {wanted} here"
            )


def merge_lora(omni: Omni) -> None:
    """Add the adapters of a model to its weights; it has plain linear layers again."""
    from peft.tuners.lora import LoraLayer

    for owner in list(omni.modules()):
        for name, layer in list(owner.named_children()):
            if isinstance(layer, LoraLayer):
                layer.merge(safe_merge=True)  # type: ignore[operator]
                setattr(owner, name, layer.get_base_layer())
    del omni.peft_config
