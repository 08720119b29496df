"""Runs: folders, settings, setup, the table of stages, measured logs, the shipped model."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from training import recordings_only  # noqa: F401  (a fixture)

from minomni import paths
from minomni.checkpoint.saving import PROVENANCE_FILE
from minomni.config import SMALL, TINY
from minomni.data import corpus
from minomni.errors import UserError
from minomni.inputs.mel import HOP
from minomni.omni import Omni
from minomni.train import (
    finetune,
    loop,
    measured_runs,
    pipeline,
    provenance,
    recipes,
    run_settings,
    stage_table,
)
from minomni.train.stages.codec import CodecStage

ROOT = Path(__file__).parents[2]


# ----------------------------------------------------------------------------------------------
# the folder of a run


def test_a_run_is_never_lost_by_accident(tmp_path):
    pipeline.prepare_run(tmp_path, resume=False, fresh=False)
    (tmp_path / "stages" / "codec.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match="--resume"):
        pipeline.prepare_run(tmp_path, resume=False, fresh=False)
    pipeline.prepare_run(tmp_path, resume=True, fresh=False)
    assert (tmp_path / "stages" / "codec.safetensors").exists()
    pipeline.prepare_run(tmp_path, resume=False, fresh=True)
    assert not (tmp_path / "stages" / "codec.safetensors").exists()


def finish(home: Path, stage: str) -> None:
    """Pretend that a stage has finished."""
    (home / "stages").mkdir(parents=True, exist_ok=True)
    (home / "stages" / f"{stage}.safetensors").write_bytes(b"x")


def test_settings_are_parsed_and_change_the_recipe():
    texts = ["talker.steps=200", "talker.lr=1e-3", "codec.batch=3", "codec.batch=4", "dit.clip=2"]
    settings = recipes.parse_settings(texts)
    assert settings == {
        "talker": {"steps": 200, "lr": 0.001},
        "codec": {"batch": 4},
        "dit": {"clip": 2.0},
    }
    changed = recipes.recipe_of("talker", "tiny", settings)
    assert changed == replace(recipes.RECIPES["tiny"]["talker"], steps=200, lr=1e-3)
    assert recipes.recipe_of("chat", "tiny", settings) == recipes.RECIPES["tiny"]["chat"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("steps=200", "expected STAGE.FIELD=VALUE"),
        ("talker.steps", "expected STAGE.FIELD=VALUE"),
        ("talker.steps=", "expected STAGE.FIELD=VALUE"),
        ("", "expected STAGE.FIELD=VALUE"),
        ("talkers.steps=200", "unknown stage 'talkers'"),
        ("talker.speed=2", "unknown field 'speed'"),
        ("talker.steps=2.5", "talker.steps is 2.5; expected a whole number from 1"),
        ("talker.steps=0", "expected a whole number from 1"),
        ("talker.steps=many", "talker.steps is 'many'"),
        ("talker.steps=" + "9" * 6000, "talker.steps is"),
        ("talker.lr=nan", "expected a finite number"),
        ("talker.lr=-1", "expected a finite number"),
        ("talker.weight_decay=x", "talker.weight_decay is 'x'"),
    ],
)
def test_bad_settings_are_one_line(text, says):
    with pytest.raises(UserError) as error:
        recipes.parse_settings([text])
    assert says in str(error.value)
    assert str(error.value).isprintable()
    assert len(str(error.value)) <= 500


def test_settings_stay_with_the_run(tmp_path):
    """A stage that has begun keeps its settings; the others, and a stage begun anew, may change."""
    pipeline.prepare_run(tmp_path, resume=False, fresh=False)
    run_settings.record_settings(tmp_path, {"codec": {"steps": 20}})
    finish(tmp_path, "codec")
    pipeline.prepare_run(tmp_path, resume=True, fresh=False)
    run_settings.record_settings(tmp_path, {})
    run_settings.record_settings(tmp_path, {"codec": {"steps": 20}, "dit": {"lr": 0.01}})
    assert run_settings.read_settings(tmp_path) == {"codec": {"steps": 20}, "dit": {"lr": 0.01}}
    with pytest.raises(UserError, match="has begun with steps=20 and cannot go on with steps=30"):
        run_settings.record_settings(tmp_path, {"codec": {"steps": 30}})

    pipeline.prepare_run(tmp_path, resume=False, fresh=True, stage="codec")
    assert run_settings.read_settings(tmp_path) == {"dit": {"lr": 0.01}}
    run_settings.record_settings(tmp_path, {"codec": {"steps": 30}})
    finish(tmp_path, "vocoder")
    with pytest.raises(UserError, match="vocoder has begun with its own recipe"):
        run_settings.record_settings(tmp_path, {"vocoder": {"batch": 2}})
    pipeline.prepare_run(tmp_path, resume=False, fresh=True)
    assert run_settings.read_settings(tmp_path) == {}


@pytest.mark.parametrize(
    "content", ['{"codec": 5}', '{"codec": {"steps": "many"}}', '{"naps": {}}', "[", "[1]"]
)
def test_damaged_settings_are_one_line(content, tmp_path):
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages" / "settings.json").write_text(content)
    with pytest.raises(UserError):
        run_settings.read_settings(tmp_path)


def test_the_command_repeats_the_run():
    command = provenance.training_command("tiny", 3, {"codec": {"steps": 20, "lr": 0.01}})
    assert command == (
        "python -m minomni train tiny --seed 3 --set codec.steps=20 --set codec.lr=0.01"
    )


def test_a_budget_changes_the_steps_and_is_part_of_the_command():
    of_budget = recipes.budget_settings("long", "tiny")
    assert of_budget.keys() == recipes.RECIPES["tiny"].keys()
    assert of_budget["dit"] == {"steps": recipes.BUDGETS["tiny"]["long"]["dit"]}
    assert recipes.budget_settings("quick", "tiny") == {}
    assert recipes.budget_settings("quick", "small") == {}

    settings = recipes.merge_settings(of_budget, {"dit": {"lr": 0.01}, "codec": {"batch": 4}})
    assert settings["dit"] == {"steps": of_budget["dit"]["steps"], "lr": 0.01}
    assert provenance.training_command("tiny", 0, settings) == (
        "python -m minomni train tiny --seed 0 --budget long --set codec.batch=4 --set dit.lr=0.01"
    )
    # A run with other steps than the budget's is repeated field by field.
    settings = recipes.merge_settings(of_budget, {"dit": {"steps": 7}})
    command = provenance.training_command("tiny", 0, settings)
    assert "--budget" not in command
    assert "--set dit.steps=7" in command

    with pytest.raises(UserError, match="size 'small' has no budget 'long'; it has quick"):
        recipes.budget_settings("long", "small")


def test_everything_lies_under_home(tmp_path):
    home = tmp_path / "home"
    stage = pipeline.make_stage("codec", "tiny", home, seed=0)
    assert stage.cache == pipeline.cache_of(home)
    assert {path.name for path in tmp_path.iterdir()} <= {"home"}
    assert finetune.working_folder(Path("x/tuned"), home) == home / "tuned.run"
    assert finetune.working_folder(Path("x/tuned"), None) == Path("x/tuned.run")


# ----------------------------------------------------------------------------------------------
# setup and the log


def test_a_stage_is_set_up_once_and_timed(tmp_path, monkeypatch):
    calls = []
    setup = CodecStage.setup
    monkeypatch.setattr(CodecStage, "setup", lambda self: calls.append(setup(self)))
    monkeypatch.setattr(CodecStage, "preview_text", lambda self: "")
    monkeypatch.setattr(CodecStage, "preview_audio", lambda self: None)
    monkeypatch.setitem(recipes.RECIPES["tiny"], "codec", loop.Recipe(steps=2, batch=2, lr=1e-3))
    run_settings.record_settings(tmp_path, {"codec": {"steps": 3}})
    pipeline.run_stage("codec", "tiny", tmp_path, 0, resume=False)
    assert len(calls) == 1
    log = tmp_path / "stages" / "log.jsonl"
    setup_entry, *steps, end = measured_runs.read_log(log)
    assert [entry["step"] for entry in steps] == [1, 2, 3]  # as --set has it
    for entry, event in ((setup_entry, "setup"), (end, "train")):
        assert entry.keys() == {"stage", "event", "seconds", "hardware"}
        assert entry["event"] == event
        assert 0 <= entry["seconds"] < 600

    measured_runs.write_summary(log, tmp_path / "log.jsonl")
    (summary,) = measured_runs.read_log(tmp_path / "log.jsonl")
    assert summary["step"] == 3
    assert summary["losses"] == {
        key: round(steps[-1][key], 3) for key in ("ctc", "mel", "code_mel", "fsq_mean")
    }
    assert summary["seconds"] == pytest.approx(setup_entry["seconds"] + end["seconds"], abs=0.1)
    assert summary.keys() == vars(measured_runs.measured("tiny")["codec"]).keys()


def test_train_sets_up_a_stage_once(tmp_path):
    class Late(loop.Stage):
        name = "late"
        trainable = ("0.",)

        def setup(self):
            self.rows = torch.ones(2, 3)

        def batch(self, number):
            return self.rows

        def losses(self, batch):
            return {"square": self.omni(batch).square().mean()}

    model = torch.nn.Sequential(torch.nn.Linear(3, 1))
    model.thinker = SimpleNamespace(device=torch.device("cpu"))  # a stage asks for it
    stage = Late(model, loop.Recipe(steps=1, batch=2, lr=1e-3), tmp_path, 0)
    loop.train(stage, tmp_path)
    assert stage.setup_s is not None


# ----------------------------------------------------------------------------------------------
# the table of stages, sizes and recipes


def test_stage_table_holds_the_measurements():
    table = stage_table.stage_table("tiny")
    rows = {line.split()[0]: line for line in table.split("\n\n")[0].splitlines()}
    assert rows.keys() == {"stage", *stage_table.STAGES}
    assert "two cores" in table
    trained, frozen = "thinker.visual", "thinker.lm_head, thinker.model"
    assert rows["thinker1"].index(trained) < rows["thinker1"].index(frozen)
    assert all(
        stage.data and stage.data in rows[name] for name, stage in stage_table.STAGES.items()
    )
    measured = measured_runs.measured("tiny")
    assert measured.keys() == stage_table.STAGES.keys()
    for name, row in measured.items():
        assert f" {row.seconds:g} " in rows[name]
        assert loop.format_losses(row.losses) in rows[name]
        assert row.step == recipes.BUDGETS["tiny"]["long"][name]
    assert " - " in stage_table.stage_table("small")  # dpo and speakers were not measured
    assert measured_runs.measured("qwen7b") == {}


def test_readme_expects_the_same():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    for name, row in measured_runs.measured("tiny").items():
        losses = loop.format_losses(row.losses).replace("  ", ", ")
        cells = f" | {row.seconds:g} | {losses} |"
        assert [line for line in lines if line.startswith(f"| {name} |") and cells in line], name


@pytest.mark.parametrize("config", [TINY, SMALL], ids=["tiny", "small"])
def test_sizes_fit_the_stages(config):
    """What every stage assumes of a size that it trains."""
    with torch.device("meta"):
        omni = Omni(config)
    count = sum(parameter.numel() for parameter in omni.parameters())
    assert (5e6 < count < 1e7) if config is TINY else (3e7 < count < 1e8)
    assert (
        config.token2wav.sample_rate == 100 * HOP == 16_000
    )  # the corpus is at 16 kHz, and so the vocoder's target
    assert config.codec.num_codes < config.talker.codec_pad
    assert config.codec.mel_dim == config.token2wav.dit.mel_dim
    assert config.token2wav.dit.enc_emb_dim == 2 * config.codec.mel_dim  # speaker vectors
    tokens = config.thinker.tokens
    assert tokens.tts_text_pad + corpus.FIRST_VOICE_OFFSET + 4 <= config.thinker.text.vocab_size
    for name, kind in stage_table.STAGES.items():
        there = [
            any(n.startswith(prefix) for n, _ in omni.named_parameters())
            for prefix in kind.trainable
        ]
        assert there, name
        assert all(there), name


@pytest.mark.parametrize("size", list(recipes.RECIPES))
def test_recipes_can_be_followed(size):
    for name in stage_table.STAGES:
        recipe = recipes.recipe_of(name, size)
        assert 0 < recipe.warmup < recipe.steps
        assert recipe.batch > 1
        assert recipe.accumulate >= 1
        assert recipe.lr < 0.02


def test_shipped_model_fits_the_code():
    folder = paths.data_samples() / "tiny"
    made = json.loads((folder / PROVENANCE_FILE).read_text(encoding="utf-8"))
    assert made["config"] == provenance.config_hash(TINY), (
        "sizes have changed: train again, then make_data_samples model"
    )
    assert made["command"].startswith("python -m minomni train tiny")
    assert made["seconds"] > 0
    assert sum(file.stat().st_size for file in folder.iterdir()) < 20e6
