"""The command line under torchrun: stages and fine-tuning, one folder of a model at the end."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def torchrun(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Run `python -m minomni` in two processes, in a folder."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", "0", "--standalone", "-m", "minomni", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_fine_tuning_by_two_processes(tmp_path):
    import minomni

    messages = [{"role": "user", "content": "say a"}, {"role": "assistant", "content": "a circle"}]
    lines = [json.dumps({"messages": messages}) + "\n" for _ in range(20)]
    (tmp_path / "my.jsonl").write_text("".join(lines))
    options = ["--epochs", "1", "--out", "tuned", "--home", "run"]
    done = torchrun(tmp_path, "train", "--data", "my.jsonl", *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("tuned: ") == 1
    assert minomni.load(str(tmp_path / "tuned")).talker is not None
    inputs = json.loads((tmp_path / "run/tuned.run/run_inputs.json").read_text())
    assert inputs["parts"] == 2
