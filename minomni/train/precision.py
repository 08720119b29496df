"""Which number format a device multiplies quickly."""

import torch


def has_bf16(device: torch.device) -> bool:
    """Whether a device multiplies bf16 in hardware. Elsewhere a bf16 product is emulated and slower than fp32.

    On a CPU oneDNN does it, on a processor with AVX-512 BF16 or AMX; switched off or limited by ONEDNN_MAX_CPU_ISA, it
    does not.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    instructions = torch.cpu.get_capabilities()
    in_hardware = instructions.get("avx512_bf16") or instructions.get("amx_bf16")
    in_onednn = torch.backends.mkldnn.enabled and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return bool(in_hardware and in_onednn)
