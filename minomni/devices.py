"""Devices and number formats by name, bf16 support of a device, and its memory that runs out."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch

from minomni.errors import OutOfMemory, UserError, quote, shorten

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


def device_of(name: str | torch.device) -> torch.device:
    """The device of a name; "auto" is cuda if available, else mps, else cpu. Raises UserError
    listing the available devices.
    """
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    available = ["cpu"]
    if torch.backends.mps.is_available():
        available.insert(0, "mps")
    if num_gpus > 0:
        available.insert(0, "cuda")
    if isinstance(name, str) and name == "auto":
        return torch.device(available[0])

    device = None
    if isinstance(name, (str, torch.device)):
        with suppress(RuntimeError):  # not the name of a device
            device = torch.device(name)
    if device is not None and device.type in available:
        index = device.index or 0
        if 0 <= index < max(num_gpus, 1):
            return device
    raise UserError(
        f"device {quote(name)}: this machine, with this PyTorch, has {' and '.join(available)}; or "
        f"use auto"
    )


def dtype_of(name: str | torch.dtype | None) -> torch.dtype | None:
    """The dtype of a name; None for None or "auto". Raises UserError for one that a model cannot
    have.
    """
    if name is None or (isinstance(name, str) and name == "auto"):
        return None
    key = ""
    if isinstance(name, (str, torch.dtype)):
        key = str(name).removeprefix("torch.").lower()
    if key not in DTYPES:
        raise UserError(
            f"dtype {quote(name)}: expected bfloat16, float16, float32 or float64, as a "
            f"torch.dtype or its name, or auto for the dtype of the folder (see minomni.load)"
        )
    return DTYPES[key]


def has_bf16(device: torch.device) -> bool:
    """Whether a device multiplies bf16 in hardware. Elsewhere bf16 is emulated and slower than
    fp32.

    On a CPU oneDNN needs a processor with AVX-512 BF16 or AMX, must be switched on and must not be
    limited by ONEDNN_MAX_CPU_ISA.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    instructions = torch.cpu.get_capabilities()
    in_hardware = instructions.get("avx512_bf16") or instructions.get("amx_bf16")
    in_onednn = torch.backends.mkldnn.enabled and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return bool(in_hardware and in_onednn)


def is_emulated(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a CPU multiplies a precision of 16 bits in software only, many times as slowly as
    fp32. This was measured on x86 alone, and is False elsewhere.
    """
    instructions = torch.cpu.get_capabilities()
    if device.type != "cpu" or instructions.get("architecture") != "x86_64":
        return False
    if dtype == torch.bfloat16:
        return not has_bf16(device)
    has_fp16 = instructions.get("avx512_fp16") or instructions.get("amx_fp16")
    return dtype == torch.float16 and not has_fp16


@contextmanager
def tf32_products(on: bool) -> Iterator[None]:
    """Context in which matrix products and convolutions of fp32 on CUDA round their factors to
    TF32, with 10 bits of mantissa; off: in which PyTorch's settings stay as they are. PyTorch
    itself rounds convolutions unless told otherwise.
    """
    if not on:
        yield
        return
    settings = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)  # type: ignore[attr-defined]
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "tf32"
        yield
    finally:
        for setting, precision in zip(settings, before, strict=True):
            setting.fp32_precision = precision


# What to do where an answer takes too much memory.
ANSWER_ADVICE = (
    "give shorter or smaller media, fewer messages or a smaller max_new_tokens, or load with "
    "quantize= (--quantize), parts= (--parts) or encoders_on_host=True"
)


@contextmanager
def memory_errors(advice: str) -> Iterator[None]:
    """Context in which running out of a device's memory raises OutOfMemory, one line that ends in
    the advice.

    The tensors of the calls that failed are released first. PyTorch's error would keep them, as
    its traceback holds the local variables of each call.
    """
    reason = ""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = f"{error}".splitlines()[0] if f"{error}" else "no memory is left"
        release_frames(error)
    if reason:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if "out of memory" not in reason.lower():
            reason = f"out of memory: {reason}"
        raise OutOfMemory(f"{shorten(reason, 200)}; {advice}")


def release_frames(error: BaseException) -> None:
    """Let go of the local variables that an error keeps, and those of the errors it came from."""
    pending: list[BaseException | None] = [error]
    seen: set[int] = set()
    while pending:
        cause = pending.pop()
        if cause is None or id(cause) in seen:
            continue
        seen.add(id(cause))
        traceback.clear_frames(cause.__traceback__)
        cause.__traceback__ = None
        pending += [cause.__cause__, cause.__context__]


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out on a GPU or on a CPU, for which PyTorch has no error of its own."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    message = str(error).lower()
    return "can't allocate memory" in message or "out of memory" in message
