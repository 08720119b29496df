"""Ablations: each makes its table, and what it falls short of is said."""

import shutil

import pytest
import torch
from safetensors.torch import save_file

from minomni import load
from minomni.config_json import write_json
from minomni.errors import UserError
from minomni.train import ablations, report, synthesis
from minomni.train.stages import STAGES, TRAINED


@pytest.fixture
def home(tiny_folder, monkeypatch, tmp_path):
    """The folder of a run that never learnt anything."""
    monkeypatch.setattr(synthesis, "available", lambda: False)
    monkeypatch.setattr(report, "ROOT", tmp_path)
    home = tmp_path / "tiny"
    shutil.copytree(tiny_folder, home / "model")
    write_json(home / "model" / TRAINED, {"size": "tiny", "seconds": 1})
    (home / "stages").mkdir()
    for name in ("talker", "dpo"):
        learnt = {n: p.detach() for n, p in load(str(home / "model")).named_parameters()
                  if n.startswith(STAGES[name].learns)}
        save_file(learnt, home / "stages" / f"{name}.safetensors")
    return home


def test_dpo_table(home):
    text = ablations.ablate("dpo", home, items=2, seed=0)
    assert text.count("\n| ") == 2 and "| before DPO |" in text and "| after DPO |" in text
    assert "relative fall 0.0%" in text  # the two stages hold the same weights


def test_tuning_breaks_and_mends(home, monkeypatch):
    monkeypatch.setattr(ablations, "TUNING", {"chat": 1, "talker": 1})
    before = {n: p.clone() for n, p in load(str(home / "model")).named_parameters()}
    text = ablations.ablate("tuning", home, items=2, seed=0)
    assert text.count("\n| ") == 3 and "after tuning the Thinker" in text
    assert (home.parent / "ablate-tuning" / "chat.safetensors").exists()
    assert all(torch.equal(p, before[n]) for n, p in load(str(home / "model")).named_parameters())  # nothing is lost


def test_fall_by_hand():
    assert ablations.fall([((2, 4), (1, 4)), ((2, 4), (2, 4))]) == 0.25
    assert ablations.fall([((0, 4), (1, 4))]) == 0.0


def test_unfinished_runs_are_named(home):
    (home / "stages" / "dpo.safetensors").unlink()
    with pytest.raises(UserError, match="dpo.safetensors is missing"):
        ablations.ablate("dpo", home, items=2, seed=0)
