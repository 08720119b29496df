"""What the benchmarks share: clocks, memory, the bandwidth of a copy, and random sound."""

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from minomni.checkpoint.memory import GIB
from minomni.checkpoint.quantize import plain_parts
from minomni.config import INPUT_SAMPLE_RATE, DecoderConfig

CPU = torch.device("cpu")
MIB = 2**20
STATUS = Path("/proc/self/status")  # where Linux reports the memory of a process

Rows = dict[str, tuple[float, str]]  # by name: value and description


class Clock:
    """Seconds since it was made; waits for the device each time it is read."""

    def __init__(self, device: torch.device):
        self.device = device
        self.times: list[float] = []
        self.start = self.now()

    def now(self) -> float:
        """Wall-clock time, after the device has done all that it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def mark(self) -> float:
        """Record a time -> seconds since the start."""
        self.times.append(self.now() - self.start)
        return self.times[-1]

    def step(self) -> float:
        """Median of the seconds from one recorded time to the next."""
        return median(later - earlier for earlier, later in zip(self.times, self.times[1:]))


def timed(run: Callable[[], Any]) -> tuple[float, float, Any]:
    """-> wall-clock seconds, CPU seconds, and the result of a call."""
    clock = time.perf_counter()
    cpu = time.process_time()
    result = run()
    return time.perf_counter() - clock, time.process_time() - cpu, result


def fastest(
    run: Callable[[], Any], device: torch.device = CPU, times: int = 7, warm_up: int = 0
) -> tuple[float, Any]:
    """Shortest wall-clock time of several calls in seconds, and the result of the last one.

    warm_up: calls before those, whose time does not count.
    """
    for _ in range(warm_up):
        run()
    seconds = []
    for _ in range(times):
        clock = Clock(device)
        result = run()
        seconds.append(clock.mark())
    return min(seconds), result


def copy_bandwidth(device: torch.device, mebibytes: int) -> float:
    """Bytes read and written per second by a copy of a tensor of this size."""
    source = torch.ones(mebibytes * MIB // 4, device=device)  # of 4 bytes each
    target = torch.empty_like(source)
    seconds, _ = fastest(lambda: target.copy_(source), device, times=5, warm_up=1)
    return 2 * source.nbytes / seconds


def process_bytes(name: str) -> int | None:
    """Memory of this process, None where the system does not report it.

    name: "VmRSS", the memory now, or "VmHWM", the largest so far. Both count the pages of the
    files that weights are read from.
    """
    if not STATUS.exists():
        return None
    lines = STATUS.read_text().splitlines()
    line = next(line for line in lines if line.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])


def reset_peak(device: torch.device) -> None:
    """Begin to count the largest memory of a GPU again."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_gib(device: torch.device) -> float | None:
    """The largest memory so far in GiB: of a GPU, or of this process; None where it is not known.

    That of a GPU counts from reset_peak() on.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    peak = process_bytes("VmHWM") if device.type == "cpu" else None
    return None if peak is None else peak / GIB


def weight_bytes(*modules: nn.Module) -> int:
    """Bytes of the parameters of modules, as they are stored."""
    total = 0
    for module in modules:
        for parameter in module.parameters():
            total += sum(part.nbytes for part in plain_parts(parameter))
    return total


def cache_bytes(config: DecoderConfig, length: int, dtype: torch.dtype) -> int:
    """Bytes of keys and values of a row of `length` tokens."""
    per_layer = 2 * config.num_key_value_heads * config.head_dim * dtype.itemsize
    return length * config.num_hidden_layers * per_layer


def noise(seconds: int, generator: torch.Generator) -> Tensor:
    """A waveform [samples] of quiet noise at INPUT_SAMPLE_RATE."""
    return 0.1 * torch.randn(seconds * INPUT_SAMPLE_RATE, generator=generator)
