"""Linear layers in the way that a CPU multiplies fastest: one row on all cores, and weights of 16
bits in fp32 where only fp32 is multiplied in hardware.
"""

import math
import sys
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minomni.checkpoint.quantize import is_quantized, plain_weight
from minomni.devices import has_bf16, is_emulated
from minomni.omni import Omni

MIN_ROWS = 16  # of a product; from here its time is longer than that of copying the weight
# Numbers of a weight (2 MiB in fp32); a smaller one is read sooner than other threads have begun.
MIN_WEIGHT = 2**19


class RowLinear(nn.Linear):
    """A linear layer that multiplies one row on all cores. [..., in] -> [..., out].

    A step of decoding is made of such products, and they take as long as reading the weights. MKL
    reads a matrix on one core. So the outputs are cut into equal blocks, at most one for each
    thread, and multiplied as a batch, on views of the weight (lab log: a decoding step on all
    cores).
    """

    def forward(self, x: Tensor) -> Tensor:
        blocks = math.gcd(self.out_features, torch.get_num_threads())
        if x.numel() != self.in_features or blocks == 1 or not x.is_cpu:
            return super().forward(x)
        weights = self.weight.view(blocks, -1, self.in_features)  # [blocks, out / blocks, in]
        rows = x.reshape(1, 1, -1).expand(blocks, -1, -1)  # [blocks, 1, in]
        out = torch.bmm(rows, weights.mT)  # [blocks, 1, out / blocks]
        out = out.view(*x.shape[:-1], self.out_features)
        return out if self.bias is None else out + self.bias.to(out.dtype)  # as under autocast


class VectorLinear(nn.Linear):
    """A linear layer in bf16 that multiplies one row as a vector. [..., in] -> [..., out].

    PyTorch's product of a matrix and a vector reads the weight faster than F.linear, which calls
    oneDNN (lab log: a decoding step in bf16).
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() != self.in_features or not x.is_cpu:
            return super().forward(x)
        out = torch.mv(self.weight, x.reshape(-1)).view(*x.shape[:-1], -1)  # [..., out]
        return out if self.bias is None else out + self.bias


class WideLinear(nn.Linear):
    """A linear layer that copies its weight to fp32 for a product of many rows.
    [..., in] -> [..., out].

    The product of a few rows, as in a step of decoding, takes as long as reading the weight. A
    layer that is trained multiplies as it is, because the copies would stay in memory until the
    backward pass.
    """

    def forward(self, x: Tensor) -> Tensor:
        is_short = x.numel() < MIN_ROWS * self.in_features
        # An encoder that is kept in the host's memory runs on a GPU.
        if is_short or x.requires_grad or not x.is_cpu:
            return super().forward(x)
        weight = plain_weight(self.weight) if is_quantized(self.weight) else self.weight
        bias = None if self.bias is None else self.bias.float()
        return F.linear(x.float(), weight.float(), bias).to(x.dtype)


def choose_products(omni: Omni, methods: dict[str, str]) -> None:
    """Give the linear layers of a model the products that are fastest where their weights are.

    methods: {name of a weight: int8 or int4} of those that are quantized. Those in int4 stay
    as they are: its kernel needs a quarter of the time of int8's (lab log).
    """
    has_mkl = torch.backends.mkl.is_available()
    for name, layer in omni.named_modules():
        if type(layer) is not nn.Linear or methods.get(f"{name}.weight") == "int4":
            continue
        weight = layer.weight
        is_plain = weight.is_cpu and not is_quantized(weight)
        is_large = weight.numel() >= MIN_WEIGHT
        if is_emulated(weight.dtype, weight.device):
            layer.__class__ = WideLinear
        elif is_plain and weight.dtype == torch.bfloat16 and has_bf16(weight.device):
            layer.__class__ = VectorLinear
        elif is_plain and weight.dtype == torch.float32 and has_mkl and is_large:
            layer.__class__ = RowLinear


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
