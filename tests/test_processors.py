"""What is computed, once more as on other kinds of processors: no number may depend on instruction
sets, oneDNN or threads.

A process reads its instruction sets once, when PyTorch starts, so each kind of processor is a
pytest process of its own.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Layers, encoders, decoders and speech against golden files, written-out forms and themselves. The
# official code, which is slow, is not asked again: its answers are in the golden files.
MODEL = (
    "tests/test_layers.py",
    "tests/test_omni.py",
    "tests/test_parity.py",
    "tests/test_sampling.py",
    "tests/chat",
    "tests/checkpoint/test_cpu_products.py",
    "tests/checkpoint/test_weights.py",
    "tests/inputs/test_audio.py",
    "tests/inputs/test_mel.py",
    "tests/inputs/test_patches.py",
    "tests/talker",
    "tests/thinker",
    "tests/token2wav",
    "-m",
    "not slow",
)
TRAINING = (
    "tests/train/test_loop.py",
    "tests/train/test_muon.py",
    "tests/train/test_stages.py",
    "-k",
    "muon or newton or resume_is_exact and (codec or talker)"
    " or overfits_one_batch and (codec or audio_align or language)",
)
# A notebook on training, of which the printed numbers of the marked cells are compared. nbval runs
# it with the solutions of its exercises where a path of tests/ is given, too.
NOTEBOOK = (
    "--nbval-lax",
    "--nbval-current-env",
    "notebooks/13_training.ipynb",
    "tests/notebook/test_attention.py",
)
PROCESSORS = {
    "no AVX, no oneDNN, two threads": {
        "ATEN_CPU_CAPABILITY": "default",
        "MINOMNI_TEST_ONEDNN": "off",
        "MINOMNI_TEST_BF16": "off",
        "OMP_NUM_THREADS": "2",
        "MINOMNI_TEST_THREADS": "2",
    },
    "AVX2, bf16, four threads": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MINOMNI_TEST_BF16": "on",
        "OMP_NUM_THREADS": "4",
        "MINOMNI_TEST_THREADS": "4",
    },
}


def test_continuous_integration_runs_the_quick_tests_in_two_of_these():
    yaml = pytest.importorskip("yaml")
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))
    job = workflow["jobs"]["processors"]
    entries = job["strategy"]["matrix"]["include"]
    assert {entry["name"] for entry in entries} == set(PROCESSORS)
    for entry in entries:
        variables = {}
        for name, value in job["env"].items():
            key = re.fullmatch(r"\$\{\{ matrix\.(\w+) \}\}", value)
            variables[name] = value if key is None else str(entry[key[1]])
        assert PROCESSORS[entry["name"]].items() <= variables.items()
    command = job["steps"][-1]["run"].split()
    assert command[:3] == ["python", "-m", "pytest"]
    assert command[-1] == "tests"
    assert "not slow" in job["steps"][-1]["run"]
    assert {step.get("run") for step in workflow["jobs"]["test"]["steps"]} >= {"python run.py test"}


@pytest.mark.slow
@pytest.mark.parametrize("processor", PROCESSORS)
@pytest.mark.parametrize(
    "tests", [MODEL, TRAINING, NOTEBOOK], ids=["model", "training", "notebook"]
)
def test_numbers_are_those_of_any_processor(tests, processor):
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    run = subprocess.run(
        command,
        cwd=ROOT,
        # Threads sleep while they wait: there may be fewer cores than threads.
        env={**os.environ, **PROCESSORS[processor], "OMP_WAIT_POLICY": "passive"},
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert run.returncode == 0, run.stdout[-3000:]
    assert " passed" in run.stdout
