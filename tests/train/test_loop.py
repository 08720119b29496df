"""The training loop: exact resume, the schedule, losses that are not finite, loader processes."""

import pytest
import torch
from training import recordings_only, stage_of, stages  # noqa: F401  (a fixture)

from minomni.errors import UserError
from minomni.train.loop import Recipe, learning_rate, train


@pytest.mark.parametrize("name", stages(["codec", "dit", "thinker2", "talker"]))
def test_resume_is_exact(name, tmp_path):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    train(stage_of(name, steps=4), whole)
    train(stage_of(name, steps=4), halves, until=2)
    path = halves / f"{name}.resume.pt"
    if not path.exists():
        pytest.fail("no checkpoint was left behind")
    train(stage_of(name, steps=4), halves, resume=True)
    assert (whole / f"{name}.safetensors").read_bytes() == (
        halves / f"{name}.safetensors"
    ).read_bytes()


def test_nan_is_named(tmp_path):
    stage = stage_of("language")
    stage.losses = lambda batch: {"text": torch.tensor(float("nan"), requires_grad=True)}
    with pytest.raises(UserError, match="stage language: loss text is nan at step 0"):
        train(stage, tmp_path)


def test_schedule():
    recipe = Recipe(steps=100, batch=1, lr=1.0, warmup=10)
    assert learning_rate(recipe, 0) == pytest.approx(0.1)
    assert learning_rate(recipe, 10) == pytest.approx(1.0)
    assert learning_rate(recipe, 100) == pytest.approx(0.05)


@pytest.mark.parametrize("name", stages(["codec", "language", "talker"]))
def test_loader_processes_change_no_number(name, tmp_path):
    """Noise and dropout of the losses follow the batch, whichever process made it."""
    ends = []
    for workers in (0, 2):
        stage = stage_of(name, steps=3, accumulate=2)
        means = train(stage, tmp_path / str(workers), workers=workers)
        weights = (tmp_path / str(workers) / f"{name}.safetensors").read_bytes()
        ends.append((means, weights, torch.rand(3).tolist()))
    assert ends[0] == ends[1]


@pytest.mark.slow
def test_resume_is_exact_with_loader_processes(tmp_path):
    train(stage_of("codec", steps=4), tmp_path / "whole")
    train(stage_of("codec", steps=4), tmp_path / "halves", until=2, workers=2)
    train(stage_of("codec", steps=4), tmp_path / "halves", resume=True, workers=1)
    whole, halves = (tmp_path / name / "codec.safetensors" for name in ("whole", "halves"))
    assert whole.read_bytes() == halves.read_bytes()


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_in_the_data_is_told_as_it_is(workers, tmp_path):
    def batch(number):
        raise UserError(f"row {number} is broken")

    stage = stage_of("codec")
    stage.batch = batch
    with pytest.raises(UserError) as error:
        train(stage, tmp_path, workers=workers)
    assert str(error.value) == "row 0 is broken"
