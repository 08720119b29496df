"""The table of training steps by one process and by several."""

import json
import os
import sys

import pytest

from minomni import __main__ as command
from minomni import paths
from minomni.errors import UserError
from minomni.eval import process_scaling
from minomni.eval.process_scaling import Row


@pytest.mark.slow
def test_two_steps_by_one_and_two_processes(tmp_path, monkeypatch):
    """The batch of a step is divided over the processes, and each step is taken once."""
    logs = {}
    median = process_scaling.median_ms

    def kept(log):
        logs[log.parents[1].name] = log.read_text().splitlines()
        return median(log)

    monkeypatch.setattr(process_scaling, "median_ms", kept)
    one, two = process_scaling.measure((1, 2), stages=("codec",), steps=2)
    assert one[:3] == ("codec", 1, 16)
    assert two[:3] == ("codec", 2, 16)
    assert one.speed_up == 1.0
    assert two.speed_up == one.step_ms / two.step_ms
    for name in ("codec-1", "codec-2"):
        entries = [json.loads(line) for line in logs[name]]
        assert [entry["step"] for entry in entries if "step" in entry] == [1, 2]


def test_command(monkeypatch, capsys):
    rows = [Row("codec", 1, 16, 100.0, 1.0), Row("codec", 4, 16, 40.0, 2.5)]

    def measured(counts, device):
        assert counts == (1, 4)
        assert device == "cpu"
        return rows

    monkeypatch.setattr(process_scaling, "measure", measured)
    line = ["minomni", "bench", "processes", "--processes", "1,4", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", line)
    assert command.main() == 0
    assert "| codec | 4 | 16 | 40 | 2.50 |" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [*line, "--json"])
    assert command.main() == 0
    assert json.loads(capsys.readouterr().out)[1]["speed_up"] == 2.5
    monkeypatch.setattr(sys, "argv", [*line[:4], "1,0"])
    assert command.main() == 2
    assert "'0' is not a whole number from 1 to 1024" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["model tiny", "quantize int8", "random-weights", "short"])
def test_options_of_other_benchmarks_are_refused(option, monkeypatch, capsys):
    monkeypatch.setattr(process_scaling, "measure", None)
    monkeypatch.setattr(sys, "argv", ["minomni", "bench", "processes", *f"--{option}".split()])
    assert command.main() == 2
    shown = capsys.readouterr().err
    assert f"--{option.split()[0]} is no option of `bench processes`, but of " in shown
    assert shown.count("\n") == 1


def test_a_number_of_processes_given_twice(monkeypatch, capsys):
    monkeypatch.setattr(process_scaling, "prepare", None)
    monkeypatch.setattr(sys, "argv", ["minomni", "bench", "processes", "--processes", "2,1,2"])
    assert command.main() == 2
    assert "--processes 2,1,2 has a number twice" in capsys.readouterr().err


def test_a_new_process_finds_the_package_and_not_the_current_folder(monkeypatch):
    package = str(paths.PACKAGE.parent)
    for before in (None, ""):
        monkeypatch.delenv("PYTHONPATH", raising=False)
        if before is not None:
            monkeypatch.setenv("PYTHONPATH", before)
        assert paths.environment()["PYTHONPATH"] == package
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    assert paths.environment()["PYTHONPATH"] == package + os.pathsep + "elsewhere"


@pytest.mark.slow
def test_processes_that_fail(tmp_path):
    """The reason is one line: a stage that does not exist."""
    with pytest.raises(UserError, match=r"1 processes on cpu failed: .*unknown stage 'naps'"):
        process_scaling.run_processes("naps", tmp_path, "cpu", 1)
