"""One training loop for all stages: schedule, gradient accumulation, logs, checkpoints, resume.

A batch is a function of (seed, number) alone. A run that stops and resumes sees the batches of an
uninterrupted one, and the checkpoint needs no position in the data. Files of a run: run_folder.py.
"""

import math
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from minomni.devices import has_bf16
from minomni.errors import UserError
from minomni.talker.codec import Codec
from minomni.train import distributed, run_folder, samples
from minomni.train.muon import Muon

if TYPE_CHECKING:
    from minomni.omni import Omni
    from minomni.token2wav.token2wav import Token2Wav

ADAMW_LAYERS = ("embed", "embed_tokens", "token", "head")  # layers whose rows belong to single ids
ADAMW_LR_SCALE = 0.4  # of the learning rate, for the parameters that Muon does not update
LOG_LINES = 8  # per stage, each with a checkpoint and samples
FINAL_LR_SHARE = 0.05  # of the learning rate, after the last step
EMA_DECAY = 0.95  # of the running means of the losses
EMA_UPDATE = 0.05  # 1 - EMA_DECAY, which floating-point numbers would round otherwise


@dataclass(frozen=True)
class Recipe:
    """How long and how fast a stage trains."""

    steps: int
    batch: int  # rows that are in memory together
    lr: float
    accumulate: int = 1  # batches in one step, which takes the mean of their gradients
    warmup: int = 30
    weight_decay: float = 0.01
    clip: float = 1.0


class Stage:
    """One training stage. Subclasses define what it trains, on which data and with which losses.

    `trainable` holds prefixes of parameter names.
    """

    name: str
    needs: tuple[str, ...] = ()  # stages whose results this one starts from
    trainable: tuple[str, ...] = ()
    description: str = ""
    data: str = ""  # what it is trained on
    bf16 = True  # where the device has it
    setup_s: float | None = None  # seconds that setup() took; None until run_setup()

    def __init__(self, omni: "Omni", recipe: Recipe, cache: Path, seed: int):
        self.omni = omni
        self.recipe = recipe
        self.cache = cache
        self.seed = seed
        self.device = omni.thinker.device

    @property
    def codec(self) -> Codec:
        """The speech codec. Every size that is trained here has one."""
        assert isinstance(self.omni.codec, Codec)
        return self.omni.codec

    @property
    def token2wav(self) -> "Token2Wav":
        """The speech decoder. Every size that is trained here has one."""
        assert self.omni.token2wav is not None
        return self.omni.token2wav

    def setup(self) -> None:
        """Work before the first step: read the corpus, encode it, initialize weights from it."""

    def whole_batch(self, number: int) -> Any:
        """Batch `number` of the stage, recipe.accumulate of them per step; a function of the seed
        and the number, on the CPU.

        Rows, or a tuple of which each tensor and list has the rows [B, ...]; several processes
        divide them. All that is random is drawn here, or a seed for each row; dropout is drawn
        for the whole batch, too (drop_out() in distributed.py).
        """
        raise NotImplementedError

    def collate(self, batch: Any) -> Any:
        """Some rows of a batch -> what losses() takes, on the CPU."""
        return batch

    def batch(self, number: int) -> Any:
        """The rows of batch `number` that this process computes, collated."""
        return self.collate(distributed.own_rows(self.whole_batch(number)))

    def losses(self, batch: Any) -> dict[str, Tensor]:
        """Weighted losses by name; their sum is minimized. Each is of the whole batch, also where
        this process has some of its rows (losses.py).
        """
        raise NotImplementedError

    def preview_text(self) -> str:
        """One line of the model's current output on fixed prompts."""
        return ""

    def preview_audio(self) -> tuple[str, Tensor] | None:
        """One fixed sentence as the model currently speaks it: its text, and its mel [T, bands] or
        waveform [samples].
        """
        return None

    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that this stage trains, by name."""
        every = self.omni.named_parameters()
        chosen = {name: p for name, p in every if name.startswith(self.trainable)}
        if not chosen:
            raise UserError(
                f"stage {self.name}: no parameter begins with {' or '.join(self.trainable)}"
            )
        return chosen


def run_setup(stage: Stage) -> None:
    """Call stage.setup() and note how long it took."""
    began = time.perf_counter()
    stage.setup()
    stage.setup_s = time.perf_counter() - began


class StageBatches(Dataset):
    """The batches of a stage by number, each with the generator's state after it.

    A loader process raises nothing: an error is returned instead of a batch.
    """

    def __init__(self, stage: Stage):
        self.stage = stage

    def __getitem__(self, number: int) -> tuple[Any, Tensor]:
        torch.manual_seed(batch_seed(self.stage, number))
        try:
            batch = self.stage.batch(number)
        except UserError as error:
            batch = error
        return batch, torch.get_rng_state()


def make_loader(stage: Stage, first_step: int, last_step: int, workers: int = 0) -> DataLoader:
    """The batches of steps first_step up to, not including, last_step, made by `workers` processes;
    0: by this one, when they are asked for.
    """
    accumulate = stage.recipe.accumulate
    return DataLoader(
        StageBatches(stage),
        sampler=range(first_step * accumulate, last_step * accumulate),
        batch_size=None,  # an item is a whole batch
        collate_fn=unchanged,
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,  # a stage cannot be pickled
    )


def unchanged(batch: Any) -> Any:
    """Keeps the loader from turning NumPy arrays into tensors."""
    return batch


def batch_seed(stage: Stage, number: int) -> int:
    """The seed of all that is random in one batch and its losses."""
    return stage.seed * 1_000_003 + number


def learning_rate(recipe: Recipe, step: int) -> float:
    """Linear warm-up, then cosine decay to FINAL_LR_SHARE of the recipe's learning rate."""
    if step < recipe.warmup:
        return recipe.lr * (step + 1) / recipe.warmup
    progress = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    decay = (1 - FINAL_LR_SHARE) * 0.5 * (1 + math.cos(math.pi * progress))  # falls to 0
    return recipe.lr * (FINAL_LR_SHARE + decay)


def make_optimizers(
    parameters: dict[str, nn.Parameter], recipe: Recipe
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices and filters between layers; AdamW, at a share of the learning rate, for
    embeddings, heads, depthwise filters and scales.

    Muon's updates are scaled to the size of AdamW's (arXiv 2502.16982, sec. 2.2), so one learning
    rate suits both.
    """
    matrices = []
    others = []
    scales = []
    for name, parameter in parameters.items():
        layer, _, _ = name.rpartition(".")
        if parameter.dim() <= 1:
            scales.append(parameter)
        elif mixes_channels(parameter) and not layer.endswith(ADAMW_LAYERS):
            matrices.append(parameter)
        else:
            others.append(parameter)

    optimizers: list[torch.optim.Optimizer] = []
    groups = []
    if others:
        decay = recipe.weight_decay
        groups.append({"params": others, "weight_decay": decay, "share": ADAMW_LR_SCALE})
    if scales:
        groups.append({"params": scales, "weight_decay": 0.0, "share": ADAMW_LR_SCALE})
    if groups:
        optimizers.append(torch.optim.AdamW(groups, betas=(0.9, 0.98)))
    if matrices:
        group = {"params": matrices, "share": 1.0}
        optimizers.append(Muon([group], weight_decay=recipe.weight_decay))
    return optimizers


def mixes_channels(parameter: Tensor) -> bool:
    """Whether it is a matrix [out, in] or filter [out, in, kernel], out and in > 1."""
    return parameter.dim() in (2, 3) and min(parameter.shape[:2]) > 1


def train(
    stage: Stage,
    folder: Path,
    resume: bool = False,
    until: int | None = None,
    workers: int = 0,
    progress: bool = True,
) -> dict[str, float]:
    """Run a stage to its end (or to step `until`) and write `<name>.safetensors` to the folder ->
    running means of the losses.

    With resume, continues from `<name>.resume.pt` where there is one; 10 steps equal 5, a restart
    and 5 more to the bit, with any number of loader processes (`workers`). progress: show a bar on
    a terminal. Raises UserError when a loss is not finite, naming it, and when the disk is full.
    """
    recipe = stage.recipe
    trainable, optimizers, step, means = begin_training(stage, folder, resume)
    last = recipe.steps if until is None else until
    log_every = max(1, recipe.steps // LOG_LINES)

    stage.omni.train()
    batches = iter(make_loader(stage, step, last, workers))
    with progress_bar(stage, step, last, progress) as bar:
        began = time.perf_counter()
        first = step
        while step < last:
            losses = forward_backward(stage, step, batches)
            torch.nn.utils.clip_grad_norm_(trainable.values(), recipe.clip)
            optimizer_step(optimizers, learning_rate(recipe, step))
            step += 1
            means = running_means(means, losses)
            bar.set_postfix_str(format_losses(means), refresh=False)
            bar.update()
            if step % log_every and step < last:
                continue

            # The checkpoint is written first, so every step in the log is safe on the disk.
            if step < recipe.steps:
                run_folder.save_checkpoint(folder, stage.name, step, means, trainable, optimizers)
            step_s = (time.perf_counter() - began) / (step - first)
            log_progress(stage, folder, step, means, step_s, bar)
            began = time.perf_counter()
            first = step
    distributed.unshard(stage)
    if step == recipe.steps:
        save_trained(stage, folder)
    return means


def begin_training(
    stage: Stage, folder: Path, resume: bool
) -> tuple[dict[str, nn.Parameter], list[torch.optim.Optimizer], int, dict[str, float]]:
    """Set up a stage, on its checkpoint where it resumes -> the parameters to train by name, their
    optimizers, the step to begin with, running means of the losses.
    """
    if stage.setup_s is None:
        run_setup(stage)
    trainable = freeze_and_shard(stage)
    optimizers = make_optimizers(trainable, stage.recipe)

    step: int = 0
    means: dict[str, float] = {}
    if resume:
        step, means = run_folder.load_checkpoint(folder, stage.name, trainable, optimizers)
    same = {"recipes": stage.recipe, "seeds": stage.seed, "checkpoints": step}
    distributed.require_same(same)
    return trainable, optimizers, step, means


def freeze_and_shard(stage: Stage) -> dict[str, nn.Parameter]:
    """Freeze what a stage does not train, and divide the model among the processes -> the
    parameters to train, by name.
    """
    trainable = stage.parameters()
    for name, parameter in stage.omni.named_parameters():
        parameter.requires_grad_(name in trainable)
    distributed.shard(stage)
    # FSDP replaces the parameters: collect the sharded ones.
    return stage.parameters()


def progress_bar(stage: Stage, step: int, last: int, enabled: bool) -> tqdm:
    """A bar over the steps, counted in items, on a terminal only."""
    return tqdm(
        total=last,
        initial=step,
        desc=stage.name,
        leave=False,
        disable=None if enabled and distributed.is_first() else True,  # None: without a terminal
        unit=" items",
        unit_scale=stage.recipe.batch * stage.recipe.accumulate,
    )


def optimizer_step(optimizers: list[torch.optim.Optimizer], lr: float) -> None:
    """One step of each optimizer; a group takes its share of the learning rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group["share"]
        optimizer.step()


def running_means(means: dict[str, float], losses: dict[str, float]) -> dict[str, float]:
    """Exponential moving averages of the losses, which start at the first value."""
    return {
        name: EMA_DECAY * means.get(name, value) + EMA_UPDATE * value
        for name, value in losses.items()
    }


def save_trained(stage: Stage, folder: Path) -> None:
    """Write the trained parameters of the model, without modules that only the stage has."""
    of_model = dict(stage.omni.named_parameters())
    trained = {name: p for name, p in stage.parameters().items() if name in of_model}
    with distributed.first_goes_first():
        if distributed.is_first():
            run_folder.save_stage(folder, stage.name, trained)


def forward_backward(
    stage: Stage, step: int, batches: Iterator[tuple[Any, Tensor]] | None = None
) -> dict[str, float]:
    """Leave the mean gradient of a step's batches in the parameters -> the mean losses by name.

    batches: an iterator over make_loader(), positioned at this step. The forward pass runs in bf16
    where the stage allows it and the device has it. Raises UserError for a loss that is not finite.
    """
    if batches is None:
        batches = iter(make_loader(stage, step, step + 1))
    device = stage.device
    # Before the forward pass: FSDP would not find the gradients of sharded parameters after it.
    for parameter in stage.parameters().values():
        parameter.grad = None

    means: dict[str, float] = {}
    count = stage.recipe.accumulate
    for number in range(step * count, (step + 1) * count):
        batch, random_state = next(batches)
        if isinstance(batch, UserError):
            raise batch

        # Dropout in losses() continues from the random state that batch() left in its process. It
        # is the same with any number of workers and after a resume.
        torch.manual_seed(batch_seed(stage, number))
        torch.set_rng_state(random_state)
        batch = to_device(batch, device)
        with torch.autocast(device.type, torch.bfloat16) if uses_bf16(stage) else nullcontext():
            losses = stage.losses(batch)
        check_finite(stage.name, step, losses)
        total = reduce(torch.add, losses.values())
        (total / count).backward()
        for name, value in losses.items():
            means[name] = means.get(name, 0.0) + value.item() / count
    distributed.delete_unused_gradients(stage)
    return means


def uses_bf16(stage: Stage) -> bool:
    """Whether the forward pass of a stage runs in bf16."""
    return stage.bf16 and has_bf16(stage.device)


def to_device(batch: Any, device: torch.device) -> Any:
    """The same tuples and lists with their tensors on the device. Other objects in them are moved
    where they are used.
    """
    if isinstance(batch, Tensor):
        return batch.to(device)
    if type(batch) in (tuple, list):
        return type(batch)(to_device(part, device) for part in batch)
    return batch


def check_finite(name: str, step: int, losses: dict[str, Tensor]) -> None:
    """Raises UserError for a loss that is not finite."""
    for key, value in losses.items():
        if not torch.isfinite(value):
            raise UserError(
                f"stage {name}: loss {key} is {value.item()} at step {step}; "
                f"lower the learning rate of this stage"
            )


def format_losses(means: dict[str, float]) -> str:
    """Losses as the progress bar and the printed lines show them."""
    return "  ".join(f"{name} {mean:.3f}" for name, mean in means.items())


def log_progress(
    stage: Stage, folder: Path, step: int, means: dict[str, float], step_s: float, bar: tqdm
) -> None:
    """Print one line, append the same to log.jsonl, and write samples. step_s: seconds per step
    since the last line.
    """
    sample = ""
    stage.omni.eval()
    with torch.no_grad(), distributed.unsharded(stage):
        if distributed.is_first():
            sample = stage.preview_text()
            samples.write_samples(stage, folder, step, sample)
    stage.omni.train()
    if not distributed.is_first():
        return

    items_per_s = stage.recipe.batch * stage.recipe.accumulate / step_s
    left_s = step_s * (stage.recipe.steps - step)
    line = (
        f"{stage.name:<11} {step:>5}/{stage.recipe.steps}  {format_losses(means)}  "
        f"{step_s * 1000:.0f} ms/step  {items_per_s:.0f} items/s  {left_s:.0f} s left"
    )
    bar.write(f"{line}  | {sample}" if sample else line)
    sys.stdout.flush()  # also when the output is a pipe or a file
    entry = {
        "stage": stage.name,
        "step": step,
        **means,
        "ms": round(step_s * 1000),
        "items_per_s": round(items_per_s, 1),
        "sample": sample,
    }
    run_folder.log(folder, entry)
