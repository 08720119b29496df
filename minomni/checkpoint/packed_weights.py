"""Weights that GPTQ or AWQ packed in four bits, unpacked to floating-point numbers.

A weight is (number - zero) * scale, with a zero and a scale for each group of inputs of an output.
Eight numbers of four bits are packed in one int32, the first in the lowest bits.

            qweight          qzeros              scales          g_idx
    GPTQ    [in / 8, out]    [groups, out / 8]   [groups, out]   [in], the group of each input
    AWQ     [in, out / 8]    [groups, out / 8]   [groups, out]   none: groups are stretches

GPTQ packs inputs, and stores its zeros less one (the format "gptq_v2" stores them as they are). AWQ
packs outputs, in the order 0 2 4 6 1 3 5 7. Sources: GPTQModel and AutoAWQ (its version "gemm").
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from minomni.errors import UserError, short_path, shorten

BITS = 4
PER_INT = 32 // BITS  # numbers in an int32
# Where AWQ puts the first, second, ... of eight outputs.
AWQ_POSITIONS = (0, 4, 1, 5, 2, 6, 3, 7)
TENSOR_SUFFIXES = {
    "gptq": ("qweight", "qzeros", "scales", "g_idx"),
    "awq": ("qweight", "qzeros", "scales"),
}
ZERO_OFFSETS = {"gptq": 1, "gptq_v2": 0}  # by GPTQ's checkpoint_format


@dataclass(frozen=True)
class PackedFormat:
    """How the weights of a folder are packed."""

    method: str  # gptq or awq
    group_size: int  # inputs of a group; -1 for all inputs in one
    zero_offset: int  # to add to the stored zeros

    def num_groups(self, in_features: int) -> int:
        """The groups of a layer."""
        if self.group_size == -1:
            return 1
        return -(-in_features // self.group_size)

    def weight_shape(self, qweight: tuple[int, ...]) -> tuple[int, int]:
        """The shape [out, in] of a weight from the shape of its qweight."""
        rows, columns = qweight
        if self.method == "gptq":
            return columns, PER_INT * rows
        return PER_INT * columns, rows

    def part_shapes(self, shape: tuple[int, int]) -> dict[str, tuple[int, ...]]:
        """The shapes of the other parts of a weight of shape [out, in]."""
        out_features, in_features = shape
        groups = self.num_groups(in_features)
        return {
            "qzeros": (groups, out_features // PER_INT),
            "scales": (groups, out_features),
            "g_idx": (in_features,),
        }


def packed_format(settings: Any) -> PackedFormat | None:
    """The format that a quantization_config describes, or None for one that is not read here."""
    if not isinstance(settings, dict) or settings.get("bits") != BITS:
        return None
    method = settings.get("quant_method")
    group_size = settings.get("group_size", 128)
    if not isinstance(group_size, int) or group_size == 0 or group_size < -1:
        return None
    if method == "gptq":
        offset = ZERO_OFFSETS.get(str(settings.get("checkpoint_format", "gptq")))
        return None if offset is None else PackedFormat(method, group_size, offset)
    is_gemm = str(settings.get("version", "gemm")).lower() == "gemm"
    if method == "awq" and is_gemm and settings.get("zero_point", True) is True:
        return PackedFormat(method, group_size, 0)
    return None


@dataclass(frozen=True)
class PackedLayer:
    """Where the parts of one packed weight are stored."""

    packing: PackedFormat
    name: str  # of the layer
    shape: tuple[int, int]  # [out, in] of the weight
    files: dict[str, Path]  # {part: its file}

    def read(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The weight [out, in]. Raises UserError for groups that do not exist."""
        parts = {}
        for part, file in self.files.items():
            key = f"{self.name}.{part}"
            with safe_open(file, "pt") as shard:
                inside = shard.keys()
                # A Thinker that is stored alone lacks its prefix.
                stored = key if key in inside else key.removeprefix("thinker.")
                parts[part] = shard.get_tensor(stored).to(device)
        if "g_idx" in parts:
            lowest, highest = parts["g_idx"].aminmax()
            count = len(parts["scales"])
            if lowest < 0 or highest >= count:
                raise UserError(
                    f"{short_path(self.files['g_idx'])}: {shorten(self.name, 80)}.g_idx names "
                    f"groups outside of 0 to {count - 1}; copy it again"
                )
        return unpack(self.packing, parts, dtype)


def four_bits(packed: Tensor) -> Tensor:
    """int32 [..., n] -> int8 [..., n, 8], the numbers 0 to 15, lowest bits first."""
    shifts = torch.arange(0, 32, BITS, dtype=torch.int32, device=packed.device)
    return packed[..., None].bitwise_right_shift(shifts).bitwise_and(15).to(torch.int8)


def unpack(packing: PackedFormat, parts: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    """The parts of a packed weight -> the weight [out, in], computed in fp32."""
    numbers = four_bits(parts["qweight"])
    zeros = four_bits(parts["qzeros"])
    if packing.method == "gptq":
        numbers = numbers.transpose(1, 2).flatten(0, 1)  # [in, out]
        zeros = zeros.flatten(1) + packing.zero_offset  # [groups, out]
        groups = parts["g_idx"].long()  # [in]
    else:
        positions = torch.tensor(AWQ_POSITIONS, device=numbers.device)
        numbers = numbers[..., positions].flatten(1)  # [in, out]
        zeros = zeros[..., positions].flatten(1)
        size = len(numbers) if packing.group_size == -1 else packing.group_size
        groups = torch.arange(len(numbers), device=numbers.device) // size
    centered = numbers - zeros[groups]  # int8: from -16 to 15
    weight = centered * parts["scales"].float()[groups]
    return weight.t().to(dtype).contiguous()
