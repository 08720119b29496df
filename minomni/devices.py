"""Devices and number formats by name, and which format a device multiplies quickly."""

import torch

from minomni.arguments import shown
from minomni.errors import UserError

DTYPES = {
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
    "half": torch.float16,
    "float32": torch.float32,
    "fp32": torch.float32,
    "float": torch.float32,
    "float64": torch.float64,
    "fp64": torch.float64,
    "double": torch.float64,
}


def device_of(name) -> torch.device:
    """The device of a name; auto is cuda, else mps, else cpu. Raises UserError naming what is
    there.
    """
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    there = ["cuda"] * (cards > 0) + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
    if isinstance(name, str) and name == "auto":
        return torch.device(there[0])
    try:
        device = torch.device(name) if isinstance(name, (str, torch.device)) else None
    except RuntimeError:  # not the name of a device
        device = None
    if device is None or device.type not in there or not 0 <= (device.index or 0) < max(cards, 1):
        raise UserError(
            f"device {shown(name)}: this machine, with this PyTorch, has {' and '.join(there)}; or "
            f"use auto"
        )
    return device


def dtype_of(name) -> torch.dtype | None:
    """The dtype of a name, None for None or "auto". Raises UserError for one that a model cannot
    have.
    """
    if name is None or isinstance(name, str) and name == "auto":
        return None
    key = str(name).removeprefix("torch.").lower() if isinstance(name, (str, torch.dtype)) else ""
    if key not in DTYPES:
        raise UserError(
            f"dtype {shown(name)}: expected bfloat16, float16, float32 or float64, as a torch.dtype or a "
            f"text, or auto for what the folder stores"
        )
    return DTYPES[key]


def has_bf16(device: torch.device) -> bool:
    """Whether a device multiplies bf16 in hardware. Elsewhere a bf16 product is emulated and slower
    than fp32.

    On a CPU oneDNN does it, on a processor with AVX-512 BF16 or AMX; switched off or limited by
    ONEDNN_MAX_CPU_ISA, it does not.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    instructions = torch.cpu.get_capabilities()
    in_hardware = instructions.get("avx512_bf16") or instructions.get("amx_bf16")
    in_onednn = torch.backends.mkldnn.enabled and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return bool(in_hardware and in_onednn)
