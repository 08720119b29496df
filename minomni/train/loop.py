"""One loop for every stage: schedule, readable log, samples of fixed prompts, atomic checkpoints, exact resume.

A batch is a function of (seed, step) alone, so a run that stops and goes on sees what an uninterrupted one would have
seen, and the checkpoint needs no position in the data.
"""

import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from tqdm import tqdm

from ..errors import UserError
from ..files import write_atomically

NO_MATRIX = ("embed", "embed_tokens", "token", "head")  # layers whose rows stand for single ids
OTHERS_SHARE = 0.4  # of the rate, for what Muon does not steer


@dataclass(frozen=True)
class Recipe:
    """How long and how fast a stage learns."""

    steps: int
    batch: int
    lr: float
    warmup: int = 30
    weight_decay: float = 0.01
    clip: float = 1.0


class Stage:
    """One lesson. Subclasses say what is learnt (`learns`: parameter name prefixes), from what, by which losses."""

    name: str
    needs: tuple[str, ...] = ()  # stages whose results this one starts from
    learns: tuple[str, ...] = ()
    about: str = ""

    def __init__(self, omni: nn.Module, recipe: Recipe, cache: Path, seed: int):
        self.omni, self.recipe, self.cache, self.seed = omni, recipe, cache, seed

    def batch(self, step: int):
        """What step number `step` learns from; the same for the same seed and step."""
        raise NotImplementedError

    def losses(self, batch) -> dict[str, Tensor]:
        """Weighted losses by name; their sum is what is minimised."""
        raise NotImplementedError

    def sample(self) -> str:
        """One line that shows what the model can do by now, on fixed prompts."""
        return ""

    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters this stage unlocks, by name."""
        chosen = {n: p for n, p in self.omni.named_parameters() if n.startswith(self.learns)}
        if not chosen:
            raise UserError(f"stage {self.name}: no parameter begins with {' or '.join(self.learns)}")
        return chosen


def learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up, then half a cosine down to a twentieth."""
    if step < recipe.warmup:
        return recipe.lr * (step + 1) / recipe.warmup
    progress = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.lr * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))


def make_optimizers(parameters: dict[str, nn.Parameter], recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices between layers; AdamW, at a share of the rate, for embeddings, heads, filters and scales.

    Muon's steps are made as long as AdamW's (arXiv 2502.16982, sec. 2.2), so one rate suits both.
    """
    matrices = {n: p for n, p in parameters.items() if p.dim() == 2 and not n.split(".")[-2].endswith(NO_MATRIX)}
    others = [p for n, p in parameters.items() if n not in matrices]
    groups = [
        {"params": [p for p in others if p.dim() > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in others if p.dim() <= 1], "weight_decay": 0.0},
    ]
    groups = [{**group, "share": OTHERS_SHARE} for group in groups if group["params"]]
    optimizers = [torch.optim.AdamW(groups, betas=(0.9, 0.98))] if groups else []
    if matrices:
        groups = [{"params": list(matrices.values()), "share": 1.0}]
        optimizers.append(
            torch.optim.Muon(groups, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw")
        )
    return optimizers


def train(
    stage: Stage, folder: Path, resume: bool = False, until: int | None = None, slot: int = 0
) -> dict[str, float]:
    """Run a stage to its end (or to step `until`) and leave `<name>.safetensors` in the folder -> last mean losses.

    With resume, goes on from `<name>.resume.pt` where there is one; 10 steps equal 5, a restart and 5 more to the bit.
    Raises UserError when a loss is not finite, naming it.
    """
    unlocked, recipe = stage.parameters(), stage.recipe
    for name, parameter in stage.omni.named_parameters():
        parameter.requires_grad_(name in unlocked)
    optimizers = make_optimizers(unlocked, recipe)
    step, means = 0, {}
    if resume and (folder / f"{stage.name}.resume.pt").exists():
        step, means = _restore(stage, optimizers, folder)
    stage.omni.train()
    last = recipe.steps if until is None else until
    every = max(1, recipe.steps // 8)
    with tqdm(total=last, initial=step, desc=stage.name, position=slot, leave=False, disable=None) as bar:
        began, first = time.perf_counter(), step
        while step < last:
            torch.manual_seed(stage.seed * 1_000_003 + step)  # dropout and noise repeat, resumed or not
            losses = stage.losses(stage.batch(step))
            _check_finite(stage.name, step, losses)
            stage.omni.zero_grad(set_to_none=True)
            sum(losses.values()).backward()
            torch.nn.utils.clip_grad_norm_(unlocked.values(), recipe.clip)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(recipe, step) * group["share"]
                optimizer.step()
            step += 1
            for name, value in losses.items():
                means[name] = 0.95 * means.get(name, value.item()) + 0.05 * value.item()
            bar.update()
            if step % every == 0 or step == last:
                _report(stage, folder, step, means, (time.perf_counter() - began) / (step - first), bar)
                if step < recipe.steps:
                    _keep(stage, optimizers, folder, step, means)
    if step == recipe.steps:
        _finish(stage, folder, unlocked)
    return means


def _check_finite(name, step, losses):
    for key, value in losses.items():
        if not torch.isfinite(value):
            raise UserError(
                f"stage {name}: loss {key} is {value.item()} at step {step}; lower the learning rate of this stage"
            )


def _report(stage, folder, step, means, seconds_per_step, bar):
    """One line a person can read, and the same as JSON in log.jsonl."""
    stage.omni.eval()
    with torch.no_grad():
        shown = stage.sample()
    stage.omni.train()
    left = seconds_per_step * (stage.recipe.steps - step)
    losses = "  ".join(f"{k} {v:.3f}" for k, v in means.items())
    speed = f"{seconds_per_step * 1000:.0f} ms/step  {left:.0f} s left"
    line = f"{stage.name:<11} {step:>5}/{stage.recipe.steps}  {losses}  {speed}"
    bar.write(line + (f"  | {shown}" if shown else ""))
    sys.stdout.flush()  # a line is there to be read now, into a pipe or a log file too
    entry = {"stage": stage.name, "step": step, **means, "ms": round(seconds_per_step * 1000), "sample": shown}
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "log.jsonl", "a", encoding="utf-8") as log:
        log.write(json.dumps(entry) + "\n")


def _keep(stage, optimizers, folder, step, means):
    unlocked = {n: p.detach() for n, p in stage.parameters().items()}
    states = [optimizer.state_dict() for optimizer in optimizers]
    state = {"step": step, "means": means, "parameters": unlocked, "optimizers": states}
    write_atomically(folder / f"{stage.name}.resume.pt", lambda f: torch.save(state, f))


def _restore(stage, optimizers, folder):
    state = torch.load(folder / f"{stage.name}.resume.pt", weights_only=True)
    unlocked = stage.parameters()
    if state["parameters"].keys() != unlocked.keys():
        raise UserError(f"{folder / stage.name}.resume.pt belongs to another model; --fresh starts this stage over")
    for name, parameter in unlocked.items():
        parameter.data.copy_(state["parameters"][name])
    for optimizer, kept in zip(optimizers, state["optimizers"]):
        optimizer.load_state_dict(kept)
    return state["step"], state["means"]


def _finish(stage, folder, unlocked):
    kept = dict(stage.omni.named_parameters())  # a stage may have learnt with parts that it throws away
    tensors = {n: p.detach().contiguous() for n, p in unlocked.items() if n in kept}
    write_atomically(folder / f"{stage.name}.safetensors", lambda f: f.write(save(tensors)))
    (folder / f"{stage.name}.resume.pt").unlink(missing_ok=True)


def graduate(omni: nn.Module, folder: Path, stages: list[str]) -> None:
    """Give a model what the named finished stages learnt, in their order. Raises UserError for one that is missing."""
    parameters = dict(omni.named_parameters())
    for name in stages:
        path = folder / f"{name}.safetensors"
        if not path.exists():
            raise UserError(f"{path} is missing: run stage {name} first")
        for key, value in load_file(path).items():
            parameters[key].data.copy_(value)
