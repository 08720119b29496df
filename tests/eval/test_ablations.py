"""Ablations: each prints its table, and missing files are reported."""

import shutil
from dataclasses import replace
from random import Random

import pytest
import torch
from safetensors.torch import save_file

from minomni import load, paths
from minomni.checkpoint.hf_config import write_json
from minomni.checkpoint.saving import PROVENANCE_FILE
from minomni.config import TINY
from minomni.data import text_to_speech
from minomni.data.examples import ExampleBuilder
from minomni.errors import UserError
from minomni.eval import ablations, report
from minomni.thinker.tmrope import position_ids
from minomni.train import recipes
from minomni.train.stage_table import STAGES
from minomni.train.stages.dpo import DPOStage
from minomni.train.stages.speech import SpeechStage
from minomni.train.stages.thinker import ThinkerStage


@pytest.fixture
def home(tiny_folder, monkeypatch, tmp_path):
    """A run folder with random weights."""
    monkeypatch.setattr(text_to_speech, "available", lambda: False)
    monkeypatch.setattr(paths, "runs", lambda: tmp_path / "runs")
    # A model of random weights generates until the token limit, which is slow.
    monkeypatch.setattr(ThinkerStage, "preview_text", lambda self: "")
    monkeypatch.setattr(SpeechStage, "preview_text", lambda self: "")
    monkeypatch.setattr(SpeechStage, "preview_audio", lambda self: None)
    monkeypatch.setattr(DPOStage, "num_prompts", 8)
    home = tmp_path / "tiny"
    shutil.copytree(tiny_folder, home / "model")
    write_json(home / "model" / PROVENANCE_FILE, {"size": "tiny", "seconds": 1})
    (home / "stages").mkdir()
    parameters = list(load(str(home / "model")).named_parameters())
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
        weights = {n: p.detach() for n, p in parameters if n.startswith(STAGES[name].trainable)}
        save_file(weights, home / "stages" / f"{name}.safetensors")
    return home


@pytest.mark.slow
def test_dpo_table(home):
    text = ablations.ablate("dpo", home, items=2, seed=0)
    # One table of word error rates and one of length, silence and repetition.
    assert text.count("\n| before DPO |") == 2
    assert text.count("\n| after DPO |") == 2
    assert "relative reduction 0.0%" in text  # both stages have the same weights


@pytest.mark.slow
def test_beta_table(home, monkeypatch):
    monkeypatch.setitem(recipes.RECIPES, "tiny", short())
    monkeypatch.setattr(ablations, "BETAS", (0.1, 1.0))
    text = ablations.ablate("beta", home, items=2, seed=0)
    assert all(text.count(f"| {name} |") == 2 for name in ("before DPO", "beta 0.1", "beta 1"))
    assert text.count("relative reduction") == 2


def short() -> dict:
    """Recipes of one step with a small batch."""
    return {
        name: replace(recipe, steps=1, batch=2) for name, recipe in recipes.RECIPES["tiny"].items()
    }


@pytest.mark.slow
def test_tuning_table(home, monkeypatch):
    monkeypatch.setattr(ablations, "TUNING", {"chat": {"steps": 1}, "talker": {"steps": 1}})
    before = {n: p.clone() for n, p in load(str(home / "model")).named_parameters()}
    text = ablations.ablate("tuning", home, items=2, seed=0)
    assert text.count("\n| ") == 3
    assert "after tuning the Thinker" in text
    assert (home / "ablate-tuning" / "chat.safetensors").exists()
    after = dict(load(str(home / "model")).named_parameters())
    assert all(torch.equal(after[name], before[name]) for name in before)  # the model is unchanged


@pytest.mark.slow
def test_stage3_table(home):
    text = ablations.ablate("stage3", home, items=4, seed=0)
    rows = [line.split(" | ") for line in text.splitlines()[2:]]
    assert [row[0] for row in rows] == [
        "| word error, 30 s of speech",
        "| word error, one sentence",
        "| accuracy, clips of about 45 s",
        "| accuracy, clips of about 3 s",
    ]
    assert all(row[1] == row[2] for row in rows)  # both stages have the same weights


@pytest.mark.slow
def test_tmrope_table_and_metric_in_report(home, monkeypatch):
    monkeypatch.setitem(recipes.RECIPES, "tiny", short())
    text = ablations.ablate("tmrope", home, items=2, seed=0)
    assert text.count("\n| ") == 2
    assert "| plain M-RoPE |" in text
    row = report.mrope_metric(home / report.MROPE)
    assert row.n == 2
    assert row.value is not None
    assert report.mrope_metric(home / "nothing").value is None


def test_relative_reduction_of_known_errors():
    assert ablations.reduced_share([((2, 4), (1, 4)), ((2, 4), (2, 4))]) == 0.25
    assert ablations.reduced_share([((0, 4), (1, 4))]) == 0.0


def test_missing_stage_is_reported(home):
    (home / "stages" / "dpo.safetensors").unlink()
    with pytest.raises(UserError, match="dpo.safetensors is missing"):
        ablations.ablate("dpo", home, items=2, seed=0)


def test_plain_mrope_numbers_steps_where_tmrope_uses_seconds(tmp_path, monkeypatch):
    monkeypatch.setattr(text_to_speech, "available", lambda: False)
    random = Random(0)
    builder = ExampleBuilder(TINY, tmp_path)
    dialogues = [[builder.example("sync-typed", random)], [builder.example("say-typed", random)]]
    inputs, _ = builder.collate(dialogues, [random] * len(dialogues))
    timed = position_ids(inputs, TINY.thinker)
    plain = ablations.plain_mrope(inputs, TINY.thinker)

    # They differ in the temporal ids of the video alone.
    video = inputs.input_ids == TINY.thinker.tokens.video
    assert torch.equal(timed[1:], plain[1:])
    assert torch.equal(timed[0][~video], plain[0][~video])

    steps, height, width = inputs.video_grids[0]
    cells = height * width // 4
    begin = int(timed[0][video][0])
    expected = torch.arange(begin, begin + steps).repeat_interleave(cells)
    assert torch.equal(plain[0][video], expected)
    seconds = inputs.video_seconds[0].tolist()
    assert timed[0][video][::cells].tolist() == [begin + int(25 * s) for s in seconds]
