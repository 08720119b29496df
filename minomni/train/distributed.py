"""Training on several devices with FSDP2: a step is divided over the processes of torchrun.

    torchrun --nproc-per-node 2 -m minomni train small

A step takes the mean gradient of recipe.accumulate batches, and a batch is a function of (seed,
number). Process r of N computes batches r, r + N, ... of each step. A batch stays whole, because a
loss may be normalized over its tokens, frames or spectra. The numbers are those of one process with
the same recipe, up to the order of sums. A stage that N processes begin has a recipe of its own,
with more and smaller batches (record_split() in run_settings.py), which are other data.

Between steps a process holds one N-th of the trained parameters, their gradients and the state of
their optimizers. During a step it holds all parameters (ZeRO stage 2, arXiv 1910.02054), and all
updates of one shape while Muon computes them. The model is one FSDP group: a batch without images
does not reach the vision encoder, and groups that only some processes reach would wait for one
another forever.

With one process nothing changes, and FSDP, which is slow to import, is not imported.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from minomni.train.processes import gather, is_first, rank, world

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

    from minomni.train.loop import Stage


def share(step: int, batches: int) -> list[tuple[int, float]]:
    """The numbers of the batches of a step that this process computes, each with what its losses
    are divided by: the number of batches, or infinity for a batch that only keeps this process busy
    while others compute theirs.
    """
    first = step * batches
    numbers = range(first + rank(), first + batches, world())
    own = [(number, float(batches)) for number in numbers]
    idle = math.ceil(batches / world()) - len(own)
    return own + [(first, math.inf)] * idle


class ShardedLosses(nn.Module):
    """The losses of a stage as the forward pass of one module: FSDP's hooks are on forward alone,
    and stages call other methods of the model.
    """

    def __init__(self, stage: "Stage"):
        super().__init__()
        self.losses = stage.losses
        self.has_hooks = False
        self.used: set[str] = set()  # names of the parameters that had a gradient in this step
        for name, value in vars(stage).items():
            if isinstance(value, nn.Module):
                self.add_module(name, value)

    def forward(self, batch: Any) -> dict[str, Tensor]:
        if not self.has_hooks:  # FSDP makes the whole parameters now, and keeps them
            self.has_hooks = True
            for name, parameter in self.named_parameters():
                if parameter.requires_grad:
                    note = lambda _, name=name: self.used.add(name)  # noqa: E731
                    parameter.register_post_accumulate_grad_hook(note)
        return self.losses(batch)


def shard(stage: "Stage") -> None:
    """Shard the parameters of a stage that require a gradient over all processes."""
    if world() == 1:
        return
    from torch.distributed.fsdp import fully_shard

    module = ShardedLosses(stage)
    frozen = {parameter for parameter in module.parameters() if not parameter.requires_grad}
    mesh = dist.init_device_mesh(stage.device.type, (world(),))
    sharded = fully_shard(module, mesh=mesh, ignored_params=frozen)
    # The sum over all processes of losses that are divided by the number of batches is their mean.
    sharded.set_gradient_divide_factor(1.0)
    sharded.set_force_sum_reduction_for_comms(True)
    sharded.set_reduce_scatter_unused_params(True)
    stage.losses = module  # type: ignore[method-assign]


def combine(stage: "Stage", means: dict[str, float]) -> dict[str, float]:
    """Sum the losses of all processes -> by name. Also deletes the gradients of parameters that no
    process has used: they are zeros, and the optimizers of one process would find none.
    """
    module = stage.losses
    if not isinstance(module, ShardedLosses):
        return means
    sums: dict[str, float] = {}
    used: set[str] = set()
    for losses, names in gather((means, module.used)):
        used |= names
        for name, value in losses.items():
            sums[name] = sums.get(name, 0.0) + value
    for name, parameter in module.named_parameters():
        if name not in used:
            parameter.grad = None
    module.used = set()
    return sums


@contextmanager
def unsharded(stage: "Stage") -> Iterator[None]:
    """All processes hold all parameters while the block runs."""
    if not isinstance(stage.losses, ShardedLosses):
        yield
        return
    module: Any = stage.losses  # fully_shard() has added methods to it
    module.unshard()
    yield
    module.reshard()


def unshard(stage: "Stage") -> None:
    """Undo shard(): the model has plain parameters again, all of them in each process."""
    module = stage.losses
    if not isinstance(module, ShardedLosses):
        return
    plain: dict[Tensor, nn.Parameter] = {}  # by the sharded parameter, which modules may share
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            if is_sharded(parameter):
                if parameter not in plain:
                    plain[parameter] = nn.Parameter(parameter.full_tensor().detach())
                setattr(owner, name, plain[parameter])
    del stage.losses


def is_sharded(value: Any) -> TypeGuard["DTensor"]:
    """Whether a value is a tensor of which this process holds a part."""
    if world() == 1:
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)


def divided(function: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
    """A function that maps each item of a batch [n, ...] to one of the same shape. A sharded batch
    is gathered once, each process computes an N-th of the items, and the results are exchanged.
    """
    if not is_sharded(batch):
        return function(batch)
    from torch.distributed.tensor import distribute_tensor

    items = batch.full_tensor()
    # All processes take equally many; the last ones compute some that others compute too.
    count = math.ceil(len(items) / world())
    begins = [min(process * count, len(items) - count) for process in range(world())]
    begin = begins[rank()]
    own = function(items[begin : begin + count]).contiguous()
    parts = [torch.empty_like(own) for _ in begins]
    dist.all_gather(parts, own)
    results = own.new_empty(items.shape)
    for begin, part in zip(begins, parts, strict=True):
        results[begin : begin + count] = part
    return distribute_tensor(results, batch.device_mesh, batch.placements, src_data_rank=None)


def whole(state: Any) -> Any:
    """A nested state with whole tensors in place of sharded ones, on the CPU of the first process;
    the others, which write no file, keep none.
    """

    def whole_tensor(value: Any) -> Any:
        if not is_sharded(value):
            return value
        tensor = value.full_tensor()
        return tensor.cpu() if is_first() else None

    return tree_map(whole_tensor, state)


def part_of(value: Tensor, like: Any) -> Tensor:
    """The part of a whole tensor that this process holds; `like` is sharded in the same way."""
    if not is_sharded(like) or value.shape != like.shape:  # the step count of AdamW is whole
        return value
    from torch.distributed.tensor import distribute_tensor

    value = value.to(like.device)
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The parameters of all groups, in the order of the optimizer's state."""
    parameters = []
    for group in optimizer.param_groups:
        parameters += group["params"]
    return parameters


def parts_of_state(state: dict, optimizer: torch.optim.Optimizer) -> dict:
    """A whole state of an optimizer -> the part of it that this process holds."""
    parameters = parameters_of(optimizer)
    kept = {}
    for index, row in state["state"].items():
        kept[index] = {key: part_of(value, parameters[index]) for key, value in row.items()}
    return {**state, "state": kept}
