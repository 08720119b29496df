"""Weight-only quantization of linear layers by torchao, applied while a model is loaded.

int8 has one scale for each output of a layer. int4 has a scale and a zero point for each group of
32 to 128 inputs. Activations keep the precision of the model, and Token2Wav stays as it is.
Tensors are quantized one by one as they are read, so memory never holds much more than the
quantized model.
"""

import ctypes
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minomni.errors import UserError, quote
from minomni.omni import Omni

METHODS = ("int8", "int4")
LAYERS = ("thinker.model.layers.", "talker.model.layers.")  # of the two decoders
# What can be quantized besides, always to int8, by the beginning of the names.
EXTRAS = {
    "head": ("thinker.lm_head.", "talker.codec_head."),
    "encoders": ("thinker.audio_tower.", "thinker.visual."),
}
GROUP_SIZES = (128, 64, 32)  # inputs that share a scale in int4; the largest that divides the width
INT4_ROWS = 16  # outputs of a layer come in multiples of this
INT4_CAPABILITY = (8, 0)  # of a GPU: the kernel needs bf16 in hardware
INT4_DEVICES = ("cpu", "cuda")
# Of the activations.
DTYPES = {"int8": (torch.bfloat16, torch.float16, torch.float32), "int4": (torch.bfloat16,)}


@dataclass(frozen=True)
class Quantization:
    """What load(quantize=) and --quantize say."""

    method: str  # of the decoders' layers: int8 or int4
    extras: tuple[str, ...] = ()  # names of EXTRAS

    def method_of(self, name: str) -> str | None:
        """The method for the weight of a linear layer by its name; None where it stays as it is."""
        if name.startswith(LAYERS):
            return self.method
        for extra in self.extras:
            if name.startswith(EXTRAS[extra]):
                return "int8"
        return None


def parse_quantize(text: str | None) -> Quantization | None:
    """int8, int4, int4+head, int4+head+encoders -> what to quantize; None -> None.

    Raises UserError for anything else.
    """
    if text is None:
        return None
    method, *extras = text.split("+") if isinstance(text, str) else [""]
    repeated = len(set(extras)) < len(extras)
    if method not in METHODS or repeated or not set(extras) <= EXTRAS.keys():
        raise UserError(
            f"quantize is {quote(text)}; expected int8 or int4, and behind it +head or +encoders "
            f"for what is quantized to int8 as well, as in int4+head+encoders"
        )
    return Quantization(method, tuple(extras))


def check_quantization(
    quantization: Quantization, device: torch.device, dtype: torch.dtype | None
) -> None:
    """Raise UserError where a device or precision cannot compute with quantized weights, or torchao
    is not installed.
    """
    method = quantization.method
    if dtype not in (None, *DTYPES[method]):
        names = " or ".join(str(known).removeprefix("torch.") for known in DTYPES[method])
        raise UserError(
            f"quantize={method} computes in {names}, and dtype is "
            f"{str(dtype).removeprefix('torch.')}; leave out dtype"
        )
    if method == "int4":
        check_int4_device(device)
    require_torchao()


def check_int4_device(device: torch.device) -> None:
    """Raise UserError for a device without a kernel for int4."""
    if device.type not in INT4_DEVICES:
        raise UserError(
            f"quantize=int4 runs on {' and '.join(INT4_DEVICES)}, not on {device.type}; give int8, "
            f"or another device"
        )
    if device.type != "cuda":
        return
    capability = torch.cuda.get_device_capability(device)
    if capability < INT4_CAPABILITY:
        raise UserError(
            f"quantize=int4 needs a GPU of compute capability {dotted(INT4_CAPABILITY)} or newer; "
            f"this one has {dotted(capability)}; give int8"
        )


def dotted(version: tuple[int, ...]) -> str:
    """(8, 0) -> 8.0"""
    return ".".join(map(str, version))


def require_torchao() -> Any:
    """The module torchao. Raises UserError where it is not installed."""
    try:
        with without_import_notes():
            import torchao.quantization
    except ImportError:
        raise UserError(
            "quantize needs torchao: pip install -r requirements-quantize.txt"
        ) from None
    return torchao


@contextmanager
def without_import_notes() -> Iterator[None]:
    """Hide what is logged while torchao is imported: kernels of other devices that do not load, and
    torch about torchao's use of it.
    """
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(disabled)


def quantized_layers(omni: Omni, quantization: Quantization) -> dict[str, str]:
    """{name of a weight: method} of the linear layers that will be quantized.

    Raises UserError for layers that int4 cannot have, and for a head that is the embedding table.
    """
    if "head" in quantization.extras and omni.config.thinker.tie_word_embeddings:
        raise UserError(
            "quantize: the text head of this model is its embedding table, which is not quantized; "
            "leave out +head"
        )
    methods = {}
    for name, module in omni.named_modules():
        method = quantization.method_of(f"{name}.weight")
        if method is None or not isinstance(module, nn.Linear):
            continue
        if method == "int4":
            check_int4_sizes(name, module)
        methods[f"{name}.weight"] = method
    return methods


def check_int4_sizes(name: str, layer: nn.Linear) -> None:
    """Raise UserError for a layer whose sizes int4 cannot have."""
    fits = layer.in_features % min(GROUP_SIZES) == 0 and layer.out_features % INT4_ROWS == 0
    if not fits:
        raise UserError(
            f"quantize=int4 needs inputs in multiples of {min(GROUP_SIZES)} and outputs in "
            f"multiples of {INT4_ROWS}; {name} has {layer.in_features} and {layer.out_features}; "
            f"give int8"
        )


def quantize_tensor(weight: Tensor, method: str) -> nn.Parameter:
    """A weight [out, in] as a parameter that F.linear computes with in int8 or int4."""
    torchao = require_torchao()
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    config = torchao_config(method, weight.shape[1], weight.device)
    torchao.quantization.quantize_(layer, config, filter_fn=lambda module, name: True)
    release_freed_memory()
    return layer.weight


def torchao_config(method: str, in_features: int, device: torch.device) -> Any:
    """torchao's configuration of a method for layers with this many inputs.

    Inductor's settings are left alone, because they include the precision of fp32 products.
    """
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig

    if method == "int8":
        return Int8WeightOnlyConfig(set_inductor_config=False)
    group_size = next(size for size in GROUP_SIZES if in_features % size == 0)
    if device.type == "cpu":
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

        return PrototypeInt4WeightOnlyConfig(group_size=group_size, set_inductor_config=False)
    return Int4WeightOnlyConfig(
        group_size=group_size,
        int4_packing_format="tile_packed_to_4d",
        int4_choose_qparams_algorithm="hqq",
        set_inductor_config=False,
    )


class FrozenLinear(nn.Linear):
    """A linear layer with a quantized weight through which gradients flow to its input.

    torchao's kernels for int4 have no derivative, and that for int8 keeps a wide copy of its weight
    until the backward pass.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], in the precision of the scales."""
        y = QuantizedProduct.apply(x.to(self.weight.dtype), self.weight)
        return y if self.bias is None else y + self.bias


class QuantizedProduct(torch.autograd.Function):
    """x W^T for a quantized W, which has no gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.weight = weight
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ plain_weight(ctx.weight).to(gradient.dtype), None


def plain_weight(weight: Tensor) -> Tensor:
    """A quantized weight [out, in] as a plain tensor."""
    try:
        return weight.dequantize()
    except NotImplementedError:  # a packed format: its product with the identity is W^T
        identity = torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)
        return F.linear(identity, weight).T


def is_quantized(weight: Tensor) -> bool:
    """Whether a tensor is one of torchao's."""
    return hasattr(weight, "__tensor_flatten__")


def plain_parts(tensor: Tensor) -> list[Tensor]:
    """The plain tensors of which a quantized tensor consists; of a plain one, itself."""
    if not is_quantized(tensor):
        return [tensor]
    quantized: Any = tensor  # torchao's classes have more methods
    names, _ = quantized.__tensor_flatten__()
    return [getattr(tensor, name) for name in names]


def let_gradients_through(omni: Omni) -> None:
    """Make the quantized layers of a model pass gradients on to their inputs."""
    for layer in omni.modules():
        if isinstance(layer, nn.Linear) and is_quantized(layer.weight):
            layer.__class__ = FrozenLinear


def release_freed_memory() -> None:
    """Return freed memory to the system, which glibc does not do by itself.

    Between the results that stay, it keeps the room of the intermediate tensors of quantization.
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).malloc_trim(0)
