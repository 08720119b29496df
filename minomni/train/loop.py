"""One loop for every stage: schedule, gradients in parts, readable log, samples, checkpoints, exact
resume.

A batch is a function of (seed, number) alone, so a run that stops and goes on sees what an
uninterrupted one would have seen, and the checkpoint needs no position in the data. What a run
leaves on disk is in train/checkpoint.py.
"""

import math
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from minomni.devices import has_bf16
from minomni.errors import UserError
from minomni.train import checkpoint, samples
from minomni.train.muon import Muon

NO_MATRIX = ("embed", "embed_tokens", "token", "head")  # layers whose rows stand for single ids
OTHERS_SHARE = 0.4  # of the rate, for what Muon does not steer


@dataclass(frozen=True)
class Recipe:
    """How long and how fast a stage learns."""

    steps: int
    batch: int  # rows that are in memory together
    lr: float
    accumulate: int = 1  # batches in one step, which takes the mean of their gradients
    warmup: int = 30
    weight_decay: float = 0.01
    clip: float = 1.0


class Stage:
    """One lesson. Subclasses say what is learnt (`learns`: parameter name prefixes), from what, by
    which losses.
    """

    name: str
    needs: tuple[str, ...] = ()  # stages whose results this one starts from
    learns: tuple[str, ...] = ()
    about: str = ""
    data: str = ""  # what it learns from
    bf16 = True  # where the device has it

    def __init__(self, omni: nn.Module, recipe: Recipe, cache: Path, seed: int):
        self.omni, self.recipe, self.cache, self.seed = omni, recipe, cache, seed
        self.device = next(omni.parameters()).device

    def setup(self) -> None:
        """Work before the first step, such as data from other models or initialized weights."""

    def batch(self, number: int):
        """Batch number `number` of the stage, recipe.accumulate of them a step; one seed and
        number, one batch.
        """
        raise NotImplementedError

    def losses(self, batch) -> dict[str, Tensor]:
        """Weighted losses by name; their sum is what is minimised."""
        raise NotImplementedError

    def sample(self) -> str:
        """One line that shows what the model can do by now, on fixed prompts."""
        return ""

    def sound(self) -> tuple[str, Tensor] | None:
        """One fixed sentence as the voice says it by now: its text, and its mel [T, bands] or wave
        [samples].
        """
        return None

    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters this stage unlocks, by name."""
        chosen = {n: p for n, p in self.omni.named_parameters() if n.startswith(self.learns)}
        if not chosen:
            raise UserError(
                f"stage {self.name}: no parameter begins with {' or '.join(self.learns)}"
            )
        return chosen


def learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up, then half a cosine down to a twentieth."""
    if step < recipe.warmup:
        return recipe.lr * (step + 1) / recipe.warmup
    progress = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.lr * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))


def make_optimizers(
    parameters: dict[str, nn.Parameter], recipe: Recipe
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices between layers; AdamW, at a share of the rate, for embeddings, heads,
    filters and scales.

    Muon's steps are made as long as AdamW's (arXiv 2502.16982, sec. 2.2), so one rate suits both.
    """
    matrices = {
        n: p
        for n, p in parameters.items()
        if p.dim() == 2 and not n.split(".")[-2].endswith(NO_MATRIX)
    }
    others = [p for n, p in parameters.items() if n not in matrices]
    groups = [
        {"params": [p for p in others if p.dim() > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in others if p.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [{**group, "share": OTHERS_SHARE} for group in groups if group["params"]]
    optimizers = [torch.optim.AdamW(groups, betas=(0.9, 0.98))] if groups else []
    if matrices:
        groups = [{"params": list(matrices.values()), "share": 1.0}]
        optimizers.append(Muon(groups, weight_decay=recipe.weight_decay))
    return optimizers


def train(
    stage: Stage, folder: Path, resume: bool = False, until: int | None = None, slot: int = 0
) -> dict[str, float]:
    """Run a stage to its end (or to step `until`) and leave `<name>.safetensors` in the folder ->
    last mean losses.

    With resume, goes on from `<name>.resume.pt` where there is one; 10 steps equal 5, a restart and
    5 more to the bit. Raises UserError when a loss is not finite, naming it, and when the disk is
    full.
    """
    unlocked, recipe = stage.parameters(), stage.recipe
    for name, parameter in stage.omni.named_parameters():
        parameter.requires_grad_(name in unlocked)
    optimizers = make_optimizers(unlocked, recipe)
    step, means = (
        checkpoint.load_checkpoint(folder, stage.name, unlocked, optimizers) if resume else (0, {})
    )
    stage.omni.train()
    last = recipe.steps if until is None else until
    every = max(1, recipe.steps // 8)
    items = recipe.batch * recipe.accumulate
    with tqdm(total=last, initial=step, desc=stage.name, position=slot, leave=False, disable=None,
              unit=" items", unit_scale=items) as bar:  # fmt: skip
        began, first = time.perf_counter(), step
        while step < last:
            losses = gradients(stage, step)
            torch.nn.utils.clip_grad_norm_(unlocked.values(), recipe.clip)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(recipe, step) * group["share"]
                optimizer.step()
            step += 1
            means = {
                name: 0.95 * means.get(name, value) + 0.05 * value for name, value in losses.items()
            }
            bar.set_postfix_str(in_words(means), refresh=False)
            bar.update()
            if step % every == 0 or step == last:
                if step < recipe.steps:  # before the log speaks of it: what is logged is safe
                    checkpoint.save_checkpoint(
                        folder, stage.name, step, means, unlocked, optimizers
                    )
                report(
                    stage, folder, step, means, (time.perf_counter() - began) / (step - first), bar
                )
                began, first = (
                    time.perf_counter(),
                    step,
                )  # the next line tells the pace since this one
    if step == recipe.steps:
        kept = dict(
            stage.omni.named_parameters()
        )  # a stage may have learnt with parts that it throws away
        checkpoint.save_stage(folder, stage.name, {n: p for n, p in unlocked.items() if n in kept})
    return means


def gradients(stage: Stage, step: int) -> dict[str, float]:
    """Leave the mean gradient of a step's batches in the parameters -> the mean losses by name.

    The forward pass runs in bf16 where the stage allows it and the device has it. Raises UserError
    for a loss that is not finite.
    """
    for parameter in stage.parameters().values():
        parameter.grad = None
    parts, device, means = stage.recipe.accumulate, stage.device, {}
    rough = stage.bf16 and has_bf16(device)
    for number in range(step * parts, (step + 1) * parts):
        torch.manual_seed(
            stage.seed * 1_000_003 + number
        )  # dropout and noise repeat, resumed or not
        batch = to_device(stage.batch(number), device)
        with torch.autocast(device.type, torch.bfloat16) if rough else nullcontext():
            losses = stage.losses(batch)
        _check_finite(stage.name, step, losses)
        (sum(losses.values()) / parts).backward()
        for name, value in losses.items():
            means[name] = means.get(name, 0.0) + value.item() / parts
    return means


def to_device(batch, device: torch.device):
    """The same tuples and lists with their tensors on the device. What else is in them moves where
    it is used.
    """
    if isinstance(batch, Tensor):
        return batch.to(device)
    return (
        type(batch)(to_device(part, device) for part in batch)
        if type(batch) in (tuple, list)
        else batch
    )


def _check_finite(name, step, losses):
    for key, value in losses.items():
        if not torch.isfinite(value):
            raise UserError(
                f"stage {name}: loss {key} is {value.item()} at step {step}; lower the learning rate of this stage"
            )


def in_words(means: dict[str, float]) -> str:
    """Losses as they stand in the bar and in the log's lines."""
    return "  ".join(f"{name} {mean:.3f}" for name, mean in means.items())


def report(
    stage: Stage, folder: Path, step: int, means: dict[str, float], seconds: float, bar: tqdm
) -> None:
    """One line a person can read, the same as JSON in log.jsonl, and samples. seconds: of a step,
    since the last.
    """
    stage.omni.eval()
    with torch.no_grad():
        shown = stage.sample()
        samples.write_samples(stage, folder, step, shown)
    stage.omni.train()
    speed = stage.recipe.batch * stage.recipe.accumulate / seconds
    left = seconds * (stage.recipe.steps - step)
    line = f"{stage.name:<11} {step:>5}/{stage.recipe.steps}  {in_words(means)}"
    line = f"{line}  {seconds * 1000:.0f} ms/step  {speed:.0f} items/s  {left:.0f} s left"
    bar.write(line + (f"  | {shown}" if shown else ""))
    sys.stdout.flush()  # a line is there to be read now, into a pipe or a log file too
    entry = {
        "stage": stage.name,
        "step": step,
        **means,
        "ms": round(seconds * 1000),
        "items_per_s": round(speed, 1),
    }
    checkpoint.log(folder, {**entry, "sample": shown})
