"""Ablations: each makes its table, and what it falls short of is said."""

import shutil
from dataclasses import replace
from random import Random

import pytest
import torch
from safetensors.torch import save_file

from minomni import load, paths
from minomni.checkpoint.hf_config import write_json
from minomni.config import TINY
from minomni.data import text_to_speech
from minomni.data.examples import ExampleBuilder
from minomni.errors import UserError
from minomni.eval import ablations, report
from minomni.thinker.tmrope import position_ids
from minomni.train import recipes
from minomni.train.pipeline import STAGES, TRAINED
from minomni.train.stages.dpo import DPOStage
from minomni.train.stages.speech import SpeechStage
from minomni.train.stages.thinker import ThinkerStage


@pytest.fixture
def home(tiny_folder, monkeypatch, tmp_path):
    """The folder of a run that never learnt anything."""
    monkeypatch.setattr(text_to_speech, "available", lambda: False)
    monkeypatch.setattr(paths, "runs", lambda: tmp_path / "runs")
    monkeypatch.setattr(
        ThinkerStage, "sample", lambda self: ""
    )  # who has never learnt writes until it is cut off
    monkeypatch.setattr(SpeechStage, "sample", lambda self: "")
    monkeypatch.setattr(SpeechStage, "sound", lambda self: None)
    monkeypatch.setattr(DPOStage, "prompts", 8)
    home = tmp_path / "tiny"
    shutil.copytree(tiny_folder, home / "model")
    write_json(home / "model" / TRAINED, {"size": "tiny", "seconds": 1})
    (home / "stages").mkdir()
    for name in (
        "codec",
        "language",
        "audio_align",
        "vision_align",
        "thinker1",
        "thinker2",
        "thinker3",
        "chat",
        "talker",
        "dpo",
    ):
        learnt = {
            n: p.detach()
            for n, p in load(str(home / "model")).named_parameters()
            if n.startswith(STAGES[name].learns)
        }
        save_file(learnt, home / "stages" / f"{name}.safetensors")
    return home


def test_dpo_table(home):
    text = ablations.ablate("dpo", home, items=2, seed=0)
    assert (
        text.count("\n| before DPO |") == text.count("\n| after DPO |") == 2
    )  # word errors, and habits
    assert "relative fall 0.0%" in text  # the two stages hold the same weights


def test_beta_table(home, monkeypatch):
    monkeypatch.setitem(recipes.RECIPES, "tiny", short())
    monkeypatch.setattr(ablations, "BETAS", (0.1, 1.0))
    text = ablations.ablate("beta", home, items=2, seed=0)
    assert all(text.count(f"| {name} |") == 2 for name in ("before DPO", "beta 0.1", "beta 1"))
    assert text.count("relative fall") == 2


def short() -> dict:
    """Recipes of one small step."""
    return {
        name: replace(recipe, steps=1, batch=2) for name, recipe in recipes.RECIPES["tiny"].items()
    }


def test_tuning_breaks_and_mends(home, monkeypatch):
    monkeypatch.setattr(ablations, "TUNING", {"chat": {"steps": 1}, "talker": {"steps": 1}})
    before = {n: p.clone() for n, p in load(str(home / "model")).named_parameters()}
    text = ablations.ablate("tuning", home, items=2, seed=0)
    assert text.count("\n| ") == 3
    assert "after tuning the Thinker" in text
    assert (home.parent / "ablate-tuning" / "chat.safetensors").exists()
    assert all(
        torch.equal(p, before[n]) for n, p in load(str(home / "model")).named_parameters()
    )  # nothing is lost


def test_stage3_table(home):
    text = ablations.ablate("stage3", home, items=4, seed=0)
    rows = [line.split(" | ") for line in text.splitlines()[2:]]
    assert [row[0] for row in rows] == [
        "| word error, 30 s of speech",
        "| word error, one sentence",
        "| right, clips of about 45 s",
        "| right, clips of about 3 s",
    ]
    assert all(row[1] == row[2] for row in rows)  # the two stages hold the same weights


def test_tmrope_is_ablated_and_the_card_knows(home, monkeypatch):
    monkeypatch.setitem(recipes.RECIPES, "tiny", short())
    text = ablations.ablate("tmrope", home, items=2, seed=0)
    assert text.count("\n| ") == 2
    assert "| plain M-RoPE |" in text
    row = report.mrope_metric(home / report.MROPE)
    assert row.n == 2
    assert row.value is not None
    assert report.mrope_metric(home / "nothing").value is None


def test_fall_by_hand():
    assert ablations.fall([((2, 4), (1, 4)), ((2, 4), (2, 4))]) == 0.25
    assert ablations.fall([((0, 4), (1, 4))]) == 0.0


def test_unfinished_runs_are_named(home):
    (home / "stages" / "dpo.safetensors").unlink()
    with pytest.raises(UserError, match="dpo.safetensors is missing"):
        ablations.ablate("dpo", home, items=2, seed=0)


def test_plain_mrope_counts_steps_where_tmrope_counts_time(tmp_path, monkeypatch):
    monkeypatch.setattr(text_to_speech, "available", lambda: False)
    random, teacher = Random(0), ExampleBuilder(TINY, tmp_path)
    talks = [[teacher.example("sync-typed", random)], [teacher.example("say-typed", random)]]
    inputs, _ = teacher.lesson(talks, random)
    timed, plain = (f(inputs, TINY.thinker) for f in (position_ids, ablations.plain_mrope))
    video = inputs.input_ids == TINY.thinker.tokens.video
    assert torch.equal(timed[1:], plain[1:])
    assert torch.equal(timed[0][~video], plain[0][~video])
    steps, rows, columns = inputs.video_grids[0]
    begin = int(timed[0][video][0])
    assert plain[0][video].tolist() == [
        begin + i for i in range(steps) for _ in range(rows * columns // 4)
    ]
    seconds = inputs.video_seconds[0].tolist()
    assert timed[0][video][:: rows * columns // 4].tolist() == [
        begin + int(25 * s) for s in seconds
    ]
