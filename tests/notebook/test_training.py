"""Short runs of a notebook: what they measure, and that they start from the same weights."""

from pathlib import Path
from types import SimpleNamespace

import torch

from minomni.notebook import training
from minomni.train.loop import Recipe, Stage


class Numbers(Stage):
    """A batch is its number, and so is its loss."""

    name = "numbers"

    def batch(self, number):
        return number

    def losses(self, batch):
        return {"text": torch.tensor(float(batch)), "more": torch.tensor(1.0)}

    def preview_text(self):
        return "a line"


class MeasuredNumbers(training.Measured, Numbers):
    repeat = 4


def begin(kind):
    omni = SimpleNamespace(thinker=SimpleNamespace(device="cpu"), weights=[1, 2])
    return omni, training.begin(kind, Recipe(steps=2, batch=1, lr=1.0), omni, Path("nowhere"))


def test_a_measured_stage_notes_both_losses_and_writes_what_the_stage_writes():
    _, stage = begin(MeasuredNumbers)
    assert stage.preview_text() == "a line"
    assert stage.curve == [(2.0, training.UNSEEN + 2.0)]  # means of three batches, and 1


def test_a_run_on_a_few_batches_repeats_them_and_is_measured_on_others():
    _, stage = begin(MeasuredNumbers)
    assert [stage.batch(number) for number in range(6)] == [0, 1, 2, 3, 0, 1]


def test_a_stage_begins_with_a_copy_and_writes_no_samples_unless_it_is_measured():
    omni, stage = begin(Numbers)
    assert stage.omni.weights == omni.weights
    assert stage.omni.weights is not omni.weights
    assert stage.preview_text() == ""
    assert not stage.bf16


def test_a_toy_is_trained_by_the_loop_of_the_package_and_stays_as_it_was():
    toy = training.Toy(Recipe(steps=4, batch=3, lr=0.1, accumulate=2, warmup=2))
    before = [p.detach().clone() for p in toy.parameters().values()]
    once, again = (training.trained(toy, 4) for _ in range(2))
    assert all(map(torch.equal, once, again))
    assert not any(map(torch.equal, once, before))
    assert all(map(torch.equal, toy.parameters().values(), before))
