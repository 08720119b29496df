"""Every test runs on one thread with fixed seeds, so that its numbers repeat on any machine.

test_processors.py runs them as on other processors, by these environment variables:

    MINOMNI_TEST_THREADS=n       n threads instead of one
    MINOMNI_TEST_ONEDNN=off      matrix products and convolutions without oneDNN
    MINOMNI_TEST_BF16=on|off     training as on a processor that multiplies bf16 in hardware, or
                                 on one that does not
"""

import os
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
import torch
from exercises import solved, stubs
from nbformat.v4 import new_code_cell
from nbval.plugin import IPyNbCell

ROOT = Path(__file__).parents[1]
# The files that take longest, the longest first. With pytest-xdist they begin first, so that the
# processes end together.
LONGEST = (
    "tests/test_processors.py",
    "tests/chat/test_generate.py",
    "tests/checkpoint/test_export.py",
    "tests/notebook/test_browser.py",
    "tests/train/test_stages.py",
    "tests/train/test_run_folder.py",
    "tests/eval/test_ablations.py",
    "tests/eval/test_report.py",
    "tests/train/test_loop.py",
    "tests/test_fuzz.py",
    "notebooks/08_codec.ipynb",
    "notebooks/13_training.ipynb",
    "notebooks/14_dpo.ipynb",
    "notebooks/00_hear_it_first.ipynb",
    "tests/train/test_finetune.py",
    "tests/checkpoint/test_weights.py",
    "tests/test_cli.py",
)


def pytest_configure(config):
    config.option.loadscopereorder = False  # keep the order of pytest_collection_modifyitems()


@pytest.fixture(autouse=True)
def repeatable(monkeypatch):
    torch.set_num_threads(int(os.environ.get("MINOMNI_TEST_THREADS", "1")))
    torch.manual_seed(0)
    if os.environ.get("MINOMNI_TEST_ONEDNN") == "off":
        torch.backends.mkldnn.set_flags(_enabled=False)
    bf16 = os.environ.get("MINOMNI_TEST_BF16")
    if bf16:
        monkeypatch.setattr("minomni.devices.has_bf16", lambda device: bf16 == "on")
        monkeypatch.setattr("minomni.train.loop.has_bf16", lambda device: bf16 == "on")
        monkeypatch.setattr("minomni.train.muon.has_bf16", lambda device: bf16 == "on")


@pytest.fixture
def untrained_tries(monkeypatch):
    """Tries of an untrained Talker for DPO: short, as it does not end by itself, each with a better
    and a worse one.
    """
    from minomni.config import SamplingConfig
    from minomni.train.stages import dpo

    short = lambda **sampling: SamplingConfig(**{**sampling, "max_new_tokens": 6})  # noqa: E731
    monkeypatch.setattr(dpo, "SamplingConfig", short)
    worse = count(0, 2)
    monkeypatch.setattr(dpo, "edit_distance", lambda *_: next(worse))


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A tiny model of random weights in a folder: it answers nonsense, briefly, but through the
    real machinery.
    """
    from minomni.checkpoint import saving
    from minomni.config import TINY
    from minomni.data.vocabulary import world_tokenizer
    from minomni.omni import Omni
    from minomni.token2wav.voice import Voice

    torch.manual_seed(0)
    config = replace(
        TINY,
        thinker_sampling=replace(TINY.thinker_sampling, max_new_tokens=4),
        talker_sampling=replace(TINY.talker_sampling, max_new_tokens=6),
        flow=replace(TINY.flow, points=3),
    )
    omni = Omni(config)
    omni.tokenizer = world_tokenizer(config.thinker.tokens)
    omni.voices = {
        name: Voice(name, 500 + i, torch.randn(1, 160), torch.randn(1, 50, 80) - 5)
        for i, name in enumerate(("Ann", "Bob"))
    }
    folder = tmp_path_factory.mktemp("tiny") / "model"
    saving.save(omni, folder)
    return folder


class SolvedCell(IPyNbCell):
    """An exercise with its solution, run in the kernel of its notebook behind the untouched one;
    the rest follows.
    """

    def runtest(self):
        super().runtest()
        said = "".join(output.get("text", "") for output in self.test_outputs)
        if "✓" not in said or "✗" in said:
            self.raise_cell_error(f"the solution is not accepted: {said}")


def start_order(item) -> int:
    """The position of a test's file in LONGEST, or behind all of them."""
    name = item.path.relative_to(ROOT).as_posix() if item.path.is_relative_to(ROOT) else ""
    return LONGEST.index(name) if name in LONGEST else len(LONGEST)


def pytest_collection_modifyitems(items):
    """Step through the notebooks as a reader does who solves each exercise where it stands. The
    files that take longest come first.
    """
    missing = [name for name in LONGEST if not (ROOT / name).exists()]
    assert not missing, f"LONGEST names files that are not there: {missing}"
    items.sort(key=start_order)
    stepping = []
    for item in items:
        stepping.append(item)
        if isinstance(item, IPyNbCell) and stubs(item.cell.source):
            cell = new_code_cell(solved(item.cell.source, item.path.name[:2]))
            stepping.append(
                SolvedCell.from_parent(
                    item.parent,
                    name=f"{item.name}, solved",
                    cell_num=item.cell_num,
                    cell=cell,
                    options=item.options | {"check": False},
                )
            )
    items[:] = stepping
