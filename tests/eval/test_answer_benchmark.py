"""`bench answer`: loading a folder and a few short answers."""

import json
import sys

import pytest
import torch

from minomni import __main__ as command
from minomni.chat.reply import Timings
from minomni.errors import UserError
from minomni.eval import answer_benchmark

BANDWIDTH = 1e9


def test_rows_of_tiny(monkeypatch):
    monkeypatch.setattr(answer_benchmark, "copy_bandwidth", lambda device, mebibytes: BANDWIDTH)
    rows = answer_benchmark.measure("tiny", torch.device("cpu"))
    values = {name: value for name, (value, _) in rows.items()}
    assert all(value > 0 for value in values.values())
    assert values["speech_s"] <= answer_benchmark.SPEECH_S
    # Of fp32, 4 bytes a number.
    omni = answer_benchmark.load("tiny")
    layers = sum(p.numel() for p in omni.thinker.model.layers.parameters())
    read = 4 * (layers + omni.thinker.lm_head.weight.numel())
    assert values["tokens_per_s_limit"] == pytest.approx(BANDWIDTH / read)


def test_a_quantized_model_reads_fewer_bytes(monkeypatch):
    pytest.importorskip("torchao", reason="torchao is not installed")
    monkeypatch.setattr(answer_benchmark, "copy_bandwidth", lambda device, mebibytes: BANDWIDTH)
    limits = []
    for quantize in (None, "int8+head"):
        rows = answer_benchmark.measure("tiny", torch.device("cpu"), quantize)
        limits.append(rows["tokens_per_s_limit"][0])
    wide, int8 = limits
    # Of tiny's fp32 a weight keeps one byte of four, and each output has a scale of two.
    assert 3.5 < int8 / wide < 4


def test_steps_are_counted_from_the_event_before():
    timings = Timings()
    timings.times["text"] = [1.0, 1.5, 2.5]
    timings.times["code"] = [1.25, 1.625, 2.75]
    # text: 1.25 -> 1.5, 1.625 -> 2.5; code: 1 -> 1.25, 1.5 -> 1.625, 2.5 -> 2.75
    assert answer_benchmark.step_seconds(timings) == (0.5625, 0.25)


@pytest.mark.parametrize("kind", ["text", "code"])
def test_a_reply_that_stops_at_once_is_one_line(kind):
    timings = Timings()
    timings.times = {"text": [1.0, 2.0], "code": [1.5, 2.5]} | {kind: [1.0]}
    with pytest.raises(UserError, match="stopped at once"):
        answer_benchmark.step_seconds(timings)


def test_the_command_prints_a_table_or_json(monkeypatch, capsys):
    rows = {"load_s": (1.25, "seconds to load")}
    monkeypatch.setattr(answer_benchmark, "measure", lambda model, device, quantize: rows)
    monkeypatch.setattr(sys, "argv", ["minomni", "bench", "answer"])
    assert not command.main()
    assert "| load_s | 1.25 | seconds to load |" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["minomni", "bench", "answer", "--json"])
    assert not command.main()
    assert json.loads(capsys.readouterr().out) == {"load_s": 1.25}


def test_a_model_without_a_voice_is_one_line(monkeypatch):
    omni = answer_benchmark.load("tiny")
    omni.talker = omni.token2wav = None
    monkeypatch.setattr(answer_benchmark, "load", lambda *arguments, **options: omni)
    with pytest.raises(UserError, match="speech"):
        answer_benchmark.measure("tiny", torch.device("cpu"))
