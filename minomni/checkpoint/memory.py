"""The bytes that weights take in each precision, and whether a device has them free."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from minomni.checkpoint.quantize import GROUP_SIZES, Quantization, parse_quantize
from minomni.errors import UserError, short_path

GIB = 2**30
ANY_PRECISION = ("thinker.", "talker.")
DIT = "token2wav.code2wav_dit_model."
FP32 = torch.float32  # of all other tensors, and of the DiT unless told otherwise: as released
SCALE_BYTES = 2  # of a scale and of a zero point, which are bf16
# What load(quantize=) can be given, from the largest model to the smallest.
OPTIONS = ("int8", "int4", "int4+head+encoders")
MEMINFO = Path("/proc/meminfo")
PROCESS_CGROUPS = Path("/proc/self/cgroup")
CGROUPS = Path("/sys/fs/cgroup")


def precision_of(name: str, dtype: torch.dtype, dit_dtype: torch.dtype = FP32) -> torch.dtype:
    """The precision of a tensor of a loaded model.

    dtype: of Thinker and Talker; dit_dtype: of the DiT. The rest is fp32.
    """
    if name.startswith(ANY_PRECISION):
        return dtype
    if name.startswith(DIT):
        return dit_dtype
    return FP32


def weight_bytes(
    tensors: dict[str, Tensor],
    dtype: torch.dtype,
    quantization: Quantization | None,
    mapped: Mapping[str, torch.dtype] | None = None,
    dit_dtype: torch.dtype = FP32,
) -> int:
    """Bytes of a model's tensors, given by name on any device.

    dtype: of Thinker and Talker where they are not quantized. mapped: the precisions of tensors
    that stay in their file, and take no memory, unless their precision changes.
    """
    mapped = mapped or {}
    total = 0
    for name, tensor in tensors.items():
        method = None
        if quantization is not None and tensor.dim() == 2 and name.endswith(".weight"):
            method = quantization.method_of(name)
        if method is not None:
            total += quantized_bytes(tensor, method)
            continue
        precision = precision_of(name, dtype, dit_dtype)
        if mapped.get(name) != precision:
            total += precision.itemsize * tensor.numel()
    return total


def needed_bytes(
    tensors: dict[str, Tensor],
    dtype: torch.dtype,
    quantization: Quantization | None,
    mapped: Mapping[str, torch.dtype] | None = None,
    on_host: tuple[str, ...] = (),
    dit_dtype: torch.dtype = FP32,
) -> int:
    """Most bytes of weights on a device at once: weight_bytes() of what stays there, and of the
    largest part that is copied there while it runs.

    on_host: the beginnings of the tensors' names of each of those parts.
    """
    resident = {name: tensor for name, tensor in tensors.items() if not name.startswith(on_host)}
    copied = [0]
    for prefix in on_host:
        part = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        copied.append(weight_bytes(part, dtype, quantization, dit_dtype=dit_dtype))
    return weight_bytes(resident, dtype, quantization, mapped, dit_dtype) + max(copied)


def quantized_bytes(weight: Tensor, method: str) -> int:
    """Bytes of a weight [out, in] in int8 or int4 with its scales and zero points."""
    out_features, in_features = weight.shape
    if method == "int8":
        return weight.numel() + SCALE_BYTES * out_features
    group_size = next((size for size in GROUP_SIZES if in_features % size == 0), in_features)
    groups = weight.numel() // group_size
    return weight.numel() // 2 + 2 * SCALE_BYTES * groups


@dataclass(frozen=True)
class CgroupFiles:
    """Where a version of Linux's control groups says what memory a container may use."""

    prefix: str  # of the line of /proc/self/cgroup, behind its number
    folder: str
    limit: str
    used: str
    cached: tuple[str, str]  # numbers in memory.stat: pages of files, which can be freed


CGROUP_VERSIONS = (
    CgroupFiles(":", ".", "memory.max", "memory.current", ("inactive_file", "active_file")),
    CgroupFiles(
        "memory:",
        "memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        ("total_inactive_file", "total_active_file"),
    ),
)


def free_bytes(device: torch.device) -> int | None:
    """Bytes that a device can still give, or None where that is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type != "cpu":
        return None
    free = [*meminfo_free(), *cgroups_free()]
    return min(free, default=None)


def meminfo_free() -> Iterator[int]:
    """Free bytes of the machine; nothing where the system is not Linux."""
    with suppress(OSError, ValueError, IndexError):
        for line in MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                yield 1024 * int(line.split()[1])


def cgroups_free() -> Iterator[int]:
    """Free bytes under the limit of this process's control group and of each one around it."""
    with suppress(OSError, ValueError):
        for line in PROCESS_CGROUPS.read_text().splitlines():
            _, group = line.split(":", 1)
            for version in CGROUP_VERSIONS:
                if group.startswith(version.prefix):
                    yield from cgroup_free(group.removeprefix(version.prefix), version)


def cgroup_free(group: str, version: CgroupFiles) -> Iterator[int]:
    """The same for one line of /proc/self/cgroup: "/pod/box" is within "/pod" within "/"."""
    folder = CGROUPS / version.folder
    for part in ("", *group.strip("/").split("/")):
        folder = folder / part
        with suppress(OSError, ValueError):  # no limit, or a folder that is not shown
            limit = int((folder / version.limit).read_text())
            used = int((folder / version.used).read_text())
            yield max(0, limit - used + cached_bytes(folder, version))


def cached_bytes(folder: Path, version: CgroupFiles) -> int:
    """Bytes of a control group's pages of files; 0 where that is not known."""
    with suppress(OSError, ValueError, KeyError):
        lines = (folder / "memory.stat").read_text().splitlines()
        numbers = dict(line.split() for line in lines)
        return sum(int(numbers[name]) for name in version.cached)
    return 0


def check_fits(
    folder: Path,
    tensors: dict[str, Tensor],
    device: torch.device,
    dtype: torch.dtype,
    quantization: Quantization | None,
    mapped: Mapping[str, torch.dtype],
    on_host: tuple[str, ...] = (),
    dit_dtype: torch.dtype = FP32,
) -> None:
    """Raise UserError where a device has too little free memory for the weights, with the options
    that would fit. The arguments are those of needed_bytes().
    """
    free = free_bytes(device)
    needed = needed_bytes(tensors, dtype, quantization, mapped, on_host, dit_dtype)
    if free is None or needed <= free:
        return
    fitting = []
    for option in OPTIONS:
        quantized = parse_quantize(option)
        size = needed_bytes(tensors, torch.bfloat16, quantized, mapped, on_host, dit_dtype)
        if size <= free:
            fitting.append(f"quantize={option} {size / GIB:.1f}")
    advice = "no quantization fits either; give another device"
    if fitting:
        advice = f"these would fit, in GiB: {', '.join(fitting)}"
    raise UserError(
        f"{short_path(folder)}: the weights take {needed / GIB:.1f} GiB of memory, and "
        f"{device.type} has {free / GIB:.1f} GiB free; {advice}"
    )
