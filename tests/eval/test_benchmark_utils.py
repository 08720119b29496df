"""Clocks and memory of the benchmarks."""

import sys

import pytest
import torch

from minomni.config import TINY
from minomni.eval import benchmark_utils

CPU = torch.device("cpu")


@pytest.mark.skipif(sys.platform != "linux", reason="Linux reports the memory of a process")
def test_the_peak_of_a_process_is_at_least_its_memory():
    now = benchmark_utils.process_bytes("VmRSS")
    peak = benchmark_utils.process_bytes("VmHWM")
    assert 0 < now <= peak <= benchmark_utils.peak_gib(CPU) * 2**30 + 1


def test_an_unknown_peak_is_none(monkeypatch, tmp_path):
    monkeypatch.setattr(benchmark_utils, "STATUS", tmp_path / "none")
    assert benchmark_utils.peak_gib(CPU) is None
    assert benchmark_utils.peak_gib(torch.device("mps")) is None


def test_calls_that_warm_up_are_not_counted(monkeypatch):
    now = iter([0, 5, 10, 12, 20, 23])
    monkeypatch.setattr(benchmark_utils.time, "perf_counter", lambda: next(now))
    calls: list[int] = []

    def run() -> int:
        calls.append(len(calls))
        return calls[-1]

    assert benchmark_utils.fastest(run, CPU, times=3, warm_up=1) == (2, 3)


def test_bytes_of_a_cache():
    config = TINY.thinker.text
    of_a_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    assert benchmark_utils.cache_bytes(config, 7, torch.bfloat16) == 7 * 2 * of_a_token
