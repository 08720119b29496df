"""The script for a GPU, run on a CPU: every piece, and what happens when one fails."""

import json
import sys
from types import SimpleNamespace

import oracle
import pytest
import torch

from minomni import __main__ as command
from minomni.checkpoint.random_checkpoint import make_checkpoint
from minomni.errors import UserError
from minomni.eval import gpu_benchmark, parts_benchmark
from minomni.eval.backends import SHORT
from minomni.eval.gpu_benchmark import Results

CPU = torch.device("cpu")


@pytest.mark.slow
def test_dry_run(tmp_path, monkeypatch):
    """int4 cannot have the odd widths of this model, and parity is skipped on a CPU: these pieces
    fail and the rest goes on.
    """

    def missing():
        raise UserError("transformers is not installed")

    monkeypatch.setattr(gpu_benchmark, "require_transformers", missing)
    # test_parts_benchmark.py loads in processes of their own.
    monkeypatch.setattr(parts_benchmark, "run_program", lambda *_: (1.0, 1.0))
    pytest.importorskip("torchao", reason="the extra quantize is not installed")
    make_checkpoint(oracle.CONFIG, tmp_path / "model")
    out = tmp_path / "results" / "first"
    results = gpu_benchmark.measure(tmp_path / "model", CPU, out, short=True)
    pieces = json.loads((out / "gpu.json").read_text())
    assert pieces == results.pieces
    assert list(pieces) == [
        "replay",
        "memory, bf16",
        "memory, int8",
        "memory, int4",
        "memory, int4+head+encoders",
        "long audio",
        "parity",
        "parts",
    ]

    failed = {name: piece for name, piece in pieces.items() if "error" in piece}
    if not torch.cuda.is_available():
        assert "skipped" in failed.pop("parity")["error"]
    assert list(failed) == ["memory, int4", "memory, int4+head+encoders"]
    for piece in failed.values():
        assert "quantize=int4 needs inputs in multiples" in piece["error"]
        assert "Traceback" in piece["traceback"]

    # Ours alone, as transformers is missing.
    parts = pieces["parts"]["values"]
    assert parts["transformers"] == "left out"
    assert parts["thinker_step"]["minomni"] > 0
    assert not any("transformers" in value for value in parts.values() if isinstance(value, dict))
    assert pieces["replay"]["values"]["ids and codes equal"] > SHORT.answer_s
    assert pieces["memory, int8"]["values"]["speech, s"] > 0
    assert pieces["long audio"]["values"]["sound, s"] == 10
    table = (out / "gpu.md").read_text()
    assert table == results.markdown()
    assert "| memory, int4 | failed | UserError: quantize=int4 needs" in table
    assert "| parts | thinker_step | minomni " in table


def test_results_are_written_after_every_piece(tmp_path, monkeypatch):
    results = Results(tmp_path)
    results.add("good", lambda: {"a": {"x": 0.123456, "y": 2.0}, "b": 3})
    assert json.loads((tmp_path / "gpu.json").read_text())["good"]["values"]["b"] == 3
    assert "| good | a | x 0.1235, y 2 |" in results.markdown()
    results.add("bad", lambda: {"a": 1 / 0})
    assert results.pieces["bad"]["error"] == "ZeroDivisionError: division by zero"
    assert "1 / 0" in results.pieces["bad"]["traceback"]
    monkeypatch.setattr(gpu_benchmark, "LIMIT_S", -1)
    results.add("late", lambda: {"a": 1})
    assert results.pieces["late"]["error"] == "not begun: -1 s were over"
    assert list(json.loads((tmp_path / "gpu.json").read_text())) == ["good", "bad", "late"]


def test_a_replay_that_differs_fails(monkeypatch):
    answers = iter([[("text", [1])], [("text", [2])]])
    monkeypatch.setattr(gpu_benchmark, "answer_ids", lambda omni, work: next(answers))
    fake = SimpleNamespace(use_static_steps=lambda: None)
    monkeypatch.setattr(gpu_benchmark, "load", lambda *arguments: fake)
    with pytest.raises(RuntimeError, match="differs"):
        gpu_benchmark.check_replay(None, CPU, SHORT)


def fail_without_synchronization(device: torch.device, modes: list[str]) -> None:
    with gpu_benchmark.no_synchronization(device):
        assert modes == ["error"]
        raise KeyError


def test_what_is_asked_of_a_gpu(monkeypatch):
    """The lines that a CPU skips, with a stand-in for CUDA."""
    modes: list[str] = []
    resets: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", resets.append)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**29)
    cuda = torch.device("cuda")
    gpu_benchmark.reset_peak(cuda)
    assert resets == [cuda]
    assert gpu_benchmark.gpu_peak(cuda) == 1.5
    with pytest.raises(KeyError):
        fail_without_synchronization(cuda, modes)
    assert modes == ["error", "default"]
    with gpu_benchmark.no_synchronization(CPU):
        assert len(modes) == 2
    assert gpu_benchmark.gpu_peak(CPU) == "not counted on a CPU"


def test_tests_that_fail_or_are_missing(monkeypatch, tmp_path):
    done = SimpleNamespace(returncode=1, stdout="1 failed", stderr="because")
    monkeypatch.setattr(gpu_benchmark.subprocess, "run", lambda *a, **k: done)
    with pytest.raises(RuntimeError, match="1 failedbecause"):
        gpu_benchmark.run_parity()
    done.returncode = 0
    done.stdout = "sss\n3 skipped, 9 deselected in 2.10s\n"  # pytest returns 0 for that
    with pytest.raises(RuntimeError, match="3 skipped"):
        gpu_benchmark.run_parity()
    done.stdout = ""
    with pytest.raises(RuntimeError):
        gpu_benchmark.run_parity()
    done.stdout = "..s\n2 passed, 1 skipped in 2.10s\n"
    assert gpu_benchmark.run_parity() == {"tests": "2 passed, 1 skipped in 2.10s"}
    monkeypatch.setattr(gpu_benchmark, "__file__", str(tmp_path / "a" / "b" / "c.py"))
    with pytest.raises(RuntimeError, match="the tests are not installed"):
        gpu_benchmark.run_parity()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("gpu --short", "give --out DIR"),
        ("gpu --out results", "needs --device cuda"),
        ("gpu --out results --short --dtype fp32", "--dtype is no option of `bench gpu`"),
        ("gpu --out results --short --compile", "--compile is no option of `bench gpu`"),
        ("first --out results", "--out is no option of `bench first`, but of gpu"),
        ("gpu --out results --width-factor 1", "instead of --model"),
        ("gpu --out results --random-weights", "leave out --random-weights and --quantize"),
    ],
)
def test_wrong_options_are_one_line(line, expected, tiny_folder, monkeypatch, capsys):
    arguments = ["minomni", "bench", *line.split(), "--model", str(tiny_folder)]
    monkeypatch.setattr(sys, "argv", arguments)
    assert command.main() == 2
    shown = capsys.readouterr().err
    assert expected in shown
    assert shown.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("gpu --short", "give --out DIR"),
        ("gpu --out {file}/out", "needs --device cuda"),
        ("gpu --short --out {file}/out", "cannot be written"),
        ("gpu --short --out {file}/out --dtype bf16", "--dtype is no option"),
        ("parts --compile", "pip install -r requirements-dev.txt"),
    ],
)
def test_no_weights_are_written_before_the_options_are_checked(
    line, expected, tmp_path, monkeypatch, capsys
):
    def written(width_factor):
        pytest.fail("a folder of weights is written")

    monkeypatch.setattr(parts_benchmark, "random_folder", written)
    monkeypatch.setitem(sys.modules, "transformers", None)
    file = tmp_path / "file"
    file.write_text("")
    words = line.format(file=file).split()
    monkeypatch.setattr(
        sys, "argv", ["minomni", "bench", *words, "--width-factor", "1", "--device", "cpu"]
    )
    assert command.main() == 2
    assert expected in capsys.readouterr().err


def test_an_attribute_is_replaced_for_a_while():
    class Owner:
        value = 1

    def fail() -> None:
        with gpu_benchmark.replaced(Owner, "value", 2):
            assert Owner.value == 2
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert Owner.value == 1


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        gpu_benchmark.measure(tmp_path, CPU, tmp_path / "file" / "out", short=True)
