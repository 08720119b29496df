"""Every part is measured beside the official code, on the same inputs, in turns."""

import importlib
import json
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import oracle
import pytest
import torch

from minomni import __main__ as command
from minomni.checkpoint.random_checkpoint import make_checkpoint
from minomni.errors import UserError
from minomni.eval import parts_benchmark
from minomni.eval.backends import (
    SHORT,
    TRANSFORMERS,
    Measurement,
    MinomniBackend,
    count_flops,
    require_transformers,
)
from minomni.eval.parts_benchmark import OURS, ROWS, STATIC, THEIRS, Parts, measure_in_turns

WORKLOAD = replace(SHORT, rounds=3)
# What the outputs of the two backends may differ by in fp32, relative to their largest value.
CLOSE = {
    "log_mel": 1e-4,
    "image": 1e-5,
    "audio_encoder": 1e-4,
    "vision_encoder": 1e-4,
    "prefill": 0,  # ids
    "thinker_step": 0,
    "token2wav": 1e-3,
    "thinker_training": 1e-5,
    "talker_training": 1e-5,
}


@pytest.fixture
def parts():
    return Parts({}, WORKLOAD, {row: {} for row in ROWS})


def backend(times: list[float], calls: list[str], name: str, output=None):
    """A backend that takes these times, and writes its name into `calls`."""
    remaining = iter(times)

    def run() -> Measurement:
        calls.append(name)
        return Measurement({"log_mel": next(remaining)}, output)

    return run


def test_backends_take_turns_and_the_first_one_warms_up(parts):
    calls: list[str] = []
    ours = backend([9, 1, 5, 3], calls, "a", torch.tensor([1.0, -2.0]))
    theirs = backend([0, 8, 2, 6], calls, "b", torch.tensor([1.0, -2.5]))
    measure_in_turns({OURS: ours, THEIRS: theirs}, parts)
    assert calls == ["a", "b"] * 4
    assert parts.rows["log_mel"] == {OURS: 3, THEIRS: 6, "difference": 0.2}
    assert parts.ratio("log_mel") == 2
    assert parts.ratio("image") is None
    assert "| log-mel of the audio, ms | 3e+03 | 6e+03 |" in parts.markdown()
    assert parts.as_json()["rows"]["log_mel"]["ratio"] == 2


def test_a_slow_part_is_measured_once_after_it_has_warmed_up(parts, monkeypatch):
    monkeypatch.setattr(parts_benchmark, "PART_S", -1)
    calls: list[str] = []
    ours = backend([9, 1, 5, 3], calls, "a")
    theirs = backend([0, 8, 2, 6], calls, "b")
    measure_in_turns({OURS: ours, THEIRS: theirs}, parts)
    assert calls == ["a", "b"] * 2
    assert parts.rows["log_mel"] == {OURS: 1, THEIRS: 8}


def test_what_the_official_code_cannot_do_is_a_note(parts):
    def fails() -> Measurement:
        raise ImportError("needs torchvision\nand more")

    calls: list[str] = []
    ours = backend([1] * 4, calls, "a")
    theirs = backend([1] * 4, calls, "b")
    measure_in_turns({OURS: ours, THEIRS: fails, STATIC: theirs}, parts)
    assert parts.notes == ["transformers: log-mel of the audio, ms: ImportError: needs torchvision"]
    assert parts.rows["log_mel"] == {OURS: 1, STATIC: 1}
    assert calls == ["a", "b"] * 4
    assert parts.notes[0] in parts.markdown()
    with pytest.raises(ImportError):
        measure_in_turns({OURS: fails, THEIRS: theirs}, parts)


def test_outputs_of_different_shapes_are_a_note(parts):
    calls: list[str] = []
    ours = backend([1] * 4, calls, "a", torch.zeros(1, 3))
    theirs = backend([2] * 4, calls, "b", torch.zeros(1, 4))
    measure_in_turns({OURS: ours, THEIRS: theirs}, parts)
    assert parts.rows["log_mel"] == {OURS: 1, THEIRS: 2}
    assert parts.notes == [
        "transformers: log-mel of the audio, ms: ValueError: outputs have shapes [1, 3] and [1, 4]"
    ]


def test_a_backend_that_fails_in_a_later_turn_has_no_difference(parts):
    calls: list[str] = []
    ours = backend([1] * 4, calls, "a", torch.ones(3))
    theirs = backend([2] * 2, calls, "b", torch.zeros(3))  # its third turn fails
    measure_in_turns({OURS: ours, THEIRS: theirs}, parts)
    assert parts.rows["log_mel"] == {OURS: 1}
    assert len(parts.notes) == 1
    assert "StopIteration" in parts.notes[0]


def test_flops_of_attention_are_counted():
    """Two products of 2 * heads * queries * keys * width operations; four more for gradients."""
    heads, queries, keys, width = 4, 6, 5, 8
    q = torch.randn(1, heads, queries, width, requires_grad=True)
    k, v = torch.randn(2, 1, heads, keys, width, requires_grad=True)
    expected = 2 * (2 * heads * queries * keys * width)

    def attention() -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    def forward() -> None:
        with torch.no_grad():
            attention()

    assert count_flops(forward) == expected
    assert count_flops(lambda: attention().sum().backward()) == 3 * expected


def test_inputs_of_our_encoders_are_on_the_device(tmp_path):
    """They have the precision of the encoders, so that no copy is timed."""
    make_checkpoint(oracle.CONFIG, tmp_path / "model")
    ours = MinomniBackend(tmp_path / "model", torch.device("cpu"), torch.bfloat16, SHORT)
    for tensor, encoder in (
        (ours.mel, ours.omni.thinker.audio_tower),
        (ours.patches, ours.omni.thinker.visual),
    ):
        weight = next(encoder.parameters())
        assert (tensor.device, tensor.dtype) == (weight.device, weight.dtype)


def test_ids_are_compared_by_the_share_that_differs():
    ids = torch.tensor([[1, 2, 3, 4]])
    assert parts_benchmark.difference(ids, torch.tensor([[1, 2, 0, 4]])) == 0.25
    with pytest.raises(ValueError, match="shapes"):
        parts_benchmark.difference(ids, ids[:, :2])


@pytest.mark.slow
def test_all_parts_are_measured_and_agree(tmp_path, monkeypatch):
    """Loading too, in a process of its own, one for each backend: its result stands for both turns.

    A process that imports transformers takes eight seconds.
    """
    pytest.importorskip("transformers", reason="the official code is not installed")
    monkeypatch.setattr(parts_benchmark, "run_program", cache(parts_benchmark.run_program))
    folder = tmp_path / "model"
    make_checkpoint(oracle.CONFIG, folder)
    device = torch.device("cpu")
    parts = parts_benchmark.measure(folder, device, torch.float32, SHORT)
    rows = json.loads(json.dumps(parts.as_json()))["rows"]
    assert list(rows) == list(ROWS)
    measured = {row for row in ROWS if THEIRS in rows[row]}
    assert all(value > 0 for row in measured for value in (rows[row][OURS], rows[row][THEIRS]))

    # Whatever is missing has a note, or is done by us alone.
    missing = set(ROWS) - measured - {"token2wav_streamed"}
    if sys.platform != "linux":
        missing.discard("load_memory")
    assert missing <= {"video"}
    assert len(parts.notes) == len(missing)
    for row, tolerance in CLOSE.items():
        assert rows[row]["difference"] <= tolerance, row
    assert {"prefill", "thinker_step"} == {row for row in ROWS if STATIC in rows[row]}
    limits = {row for row in ROWS if rows[row].get("limit", 0) > 0}
    assert limits == {
        "audio_encoder",
        "vision_encoder",
        "prefill",
        "thinker_step",
        "talker_step",
        "token2wav",
        "token2wav_streamed",
        "thinker_training",
        "talker_training",
    }


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("first --short", "--short is no option of `bench first`, but of parts, gpu"),
        ("steps --processes 1,2", "--processes is no option of `bench steps`, but of processes"),
        ("parts --processes 1,2", "--processes is no option of `bench parts`"),
        ("parts --quantize int8", "leave out --random-weights and --quantize"),
        ("parts --width-factor 2", "'2' is not a number from 0.125 to 1"),
        ("parts --model nowhere", "neither a folder nor a size"),
    ],
)
def test_wrong_options_are_one_line(line, expected, monkeypatch, capsys):
    monkeypatch.setattr("minomni.eval.backends.require_transformers", lambda: None)
    monkeypatch.setattr(sys, "argv", ["minomni", "bench", *line.split()])
    assert command.main() == 2
    shown = capsys.readouterr().err
    assert expected in shown
    assert shown.count("\n") == 1


def test_without_transformers(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match="pip install -r requirements-dev.txt"):
        parts_benchmark.measure(None, torch.device("cpu"), torch.float32, SHORT)


def test_an_older_transformers(monkeypatch):
    """One that has the model, but not the image processor that is measured."""
    pytest.importorskip("transformers", reason="the official code is not installed")
    package = importlib.import_module("transformers.models.qwen2_vl")
    name = "image_processing_pil_qwen2_vl"
    monkeypatch.delattr(package, name, raising=False)
    monkeypatch.setitem(sys.modules, f"{package.__name__}.{name}", None)
    with pytest.raises(UserError, match=f"transformers {TRANSFORMERS}, "):
        require_transformers()
    required = (Path(__file__).parents[2] / "requirements-dev.txt").read_text()
    assert f"transformers=={TRANSFORMERS} " in required
