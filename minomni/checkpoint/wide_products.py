"""Weights of 16 bits on a CPU that multiplies only fp32 in hardware."""

import sys
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minomni.checkpoint.quantize import is_quantized, plain_weight
from minomni.devices import is_emulated
from minomni.omni import Omni

MIN_ROWS = 16  # of a product; from here its time is longer than that of copying the weight


class WideLinear(nn.Linear):
    """A linear layer that copies its weight to fp32 for a product of many rows.
    [..., in] -> [..., out].

    The product of a few rows, as in a step of decoding, takes as long as reading the weight. A
    layer that is trained multiplies as it is, because the copies would stay in memory until the
    backward pass.
    """

    def forward(self, x: Tensor) -> Tensor:
        is_short = x.numel() < MIN_ROWS * self.in_features
        if is_short or x.requires_grad:
            return super().forward(x)
        weight = plain_weight(self.weight) if is_quantized(self.weight) else self.weight
        bias = None if self.bias is None else self.bias.float()
        return F.linear(x.float(), weight.float(), bias).to(x.dtype)


def multiply_in_fp32(omni: Omni, methods: dict[str, str]) -> None:
    """Let the linear layers whose precision a CPU emulates multiply in fp32.

    methods: {name of a weight: int8 or int4} of those that are quantized. Those in int4 stay
    as they are: its kernel needs a quarter of the time of int8's (lab log).
    """
    for name, layer in omni.named_modules():
        if type(layer) is not nn.Linear or methods.get(f"{name}.weight") == "int4":
            continue
        if is_emulated(layer.weight.dtype, layer.weight.device):
            layer.__class__ = WideLinear


@cache  # once in a process
def tell_emulated(dtype: torch.dtype, is_asked_for: bool) -> None:
    """Print that a model computes in a precision that the CPU emulates, and what else there is.

    is_asked_for: whether the caller has named the precision; otherwise fp32 did not fit.
    """
    name = str(dtype).removeprefix("torch.")
    advice = "leave out dtype=" if is_asked_for else "free some memory, or --quantize int4"
    print(
        f"minomni: this CPU has no instructions for {name}, so the model answers more slowly than "
        f"in fp32, which {'is the default' if is_asked_for else 'does not fit'}; {advice}",
        file=sys.stderr,
    )
