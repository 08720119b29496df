"""Short training runs on the page of a notebook, all from the same weights."""

import contextlib
import copy
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minomni.train.loop import Recipe, Stage, run_setup, train

if TYPE_CHECKING:
    from minomni.omni import Omni

MEASURED = 3  # batches over which a loss is a mean
UNSEEN = 10**6  # the number of a batch that no short run reaches


class Measured(Stage):
    """Measures the loss at each line of the log; a base class that stands before the stage's own.

    curve: the pairs (loss on the first batches of the run, loss on batches that it never sees).
    """

    repeat = 0  # after so many batches the run begins again with the first; 0: never

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.curve: list[tuple[float, float]] = []

    def batch(self, number: int) -> Any:
        if self.repeat:
            number %= self.repeat
        return super().batch(number)

    def preview_text(self) -> str:
        """What the stage itself writes into its log. train() calls it without gradients."""
        self.curve.append((self.loss_from(0), self.loss_from(UNSEEN)))
        return super().preview_text()

    def loss_from(self, first: int) -> float:
        """The mean loss of some batches, from the one with number `first` on."""
        total = 0.0
        for number in range(first, first + MEASURED):
            losses = self.losses(super().batch(number))
            total += sum(loss.item() for loss in losses.values())
        return total / MEASURED


def begin(kind: type[Stage], recipe: Recipe, omni: "Omni", folder: Path) -> Stage:
    """A stage on a copy of a model, set up, so that every run starts from the same weights.

    One that is not Measured writes no samples, and computes in fp32.
    """
    stage = kind(copy.deepcopy(omni), recipe, folder, 0)
    run_setup(stage)
    if not isinstance(stage, Measured):
        stage.bf16 = False
        stage.preview_text = lambda: ""  # type: ignore[method-assign]
    return stage


def quietly(stage: Stage, name: str, **options: Any) -> Stage:
    """Train a stage in its folder `name`, with the options of train(), and print nothing."""
    with contextlib.redirect_stdout(io.StringIO()):
        train(stage, stage.cache / name, **options)
    return stage
