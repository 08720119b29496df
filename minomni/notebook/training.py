"""Short training runs on the page of a notebook, all from the same weights."""

import contextlib
import copy
import io
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

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


class ToyModel(nn.Module):
    """A table of embeddings and a layer, in fp64."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(5, 6, dtype=torch.float64)
        self.layer = nn.Linear(6, 4, dtype=torch.float64)

    @property
    def thinker(self) -> "ToyModel":
        """What a stage asks for its device."""
        return self


class Toy(Stage):
    """A stage that takes no time: random targets for the rows of a table behind a layer."""

    name = "toy"
    trainable = ("embed_tokens.", "layer.")
    bf16 = False

    def __init__(self, recipe: Recipe):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = ToyModel()
        super().__init__(model, recipe, Path(), 3)  # type: ignore[arg-type]

    def __repr__(self) -> str:
        return "toy"

    def batch(self, number: int) -> tuple[Tensor, Tensor]:
        rows = self.recipe.batch
        return torch.randint(5, (rows,)), torch.randn(rows, 4, dtype=torch.float64)

    def losses(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        ids, wanted = batch
        found = self.omni.layer(self.omni.embed_tokens(ids))  # type: ignore[operator]
        return {"toy": (found - wanted).square().mean()}


def trained(stage: Stage, steps: int) -> tuple[Tensor, ...]:
    """The weights after some steps of the package's loop; the stage stays as it is."""
    stage = copy.deepcopy(stage)
    with tempfile.TemporaryDirectory() as folder:
        stage.cache = Path(folder)
        quietly(stage, "run", until=steps)
    return tuple(p.detach() for p in stage.parameters().values())
