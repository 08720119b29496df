"""Training on several devices with FSDP2: a batch is divided over the processes of torchrun.

    torchrun --nproc-per-node 2 -m minomni train small

A batch is a function of (seed, number). Process r of N computes rows r, r + N, ... of it, and the
losses are means over the rows of all processes (losses.py), so any number of processes computes the
same losses and gradients, up to the order of sums.

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
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from minomni.errors import UserError
from minomni.train.processes import gather, is_first, rank, world

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

    from minomni.train.loop import Stage


def own_rows(batch: Any) -> Any:
    """The rows of a batch that this process computes: rank, rank + world, ... of each tensor and
    list in it. Other parts belong to all rows. Raises UserError for fewer rows than processes.
    """
    if world() == 1:
        return batch
    if isinstance(batch, tuple):
        return tuple(own_rows(part) for part in batch)
    if not isinstance(batch, list) and not (isinstance(batch, Tensor) and batch.dim()):
        return batch
    rows = len(batch)
    if rows < world():
        raise UserError(
            f"a batch has {rows} rows, too few for {world()} processes; start at most {rows}"
        )
    return batch[rank() :: world()]


class RowDropout(nn.Module):
    """Dropout [B, ...] whose masks are those of the whole batch, whatever rows this process has."""

    def __init__(self, p: float, rows: int):
        """rows: of the whole batch."""
        super().__init__()
        self.p = p
        self.rows = rows

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        mask = F.dropout(x.new_ones(self.rows, *x.shape[1:]), self.p)
        return x * own_rows(mask)


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

    rows = stage.recipe.batch
    replace_layers(stage.omni, nn.Dropout, lambda dropout: RowDropout(dropout.p, rows))
    module = ShardedLosses(stage)
    frozen = {parameter for parameter in module.parameters() if not parameter.requires_grad}
    mesh = dist.init_device_mesh(stage.device.type, (world(),))
    sharded = fully_shard(module, mesh=mesh, ignored_params=frozen)
    # Each process has the gradient of its own rows.
    sharded.set_gradient_divide_factor(1.0)
    sharded.set_force_sum_reduction_for_comms(True)
    sharded.set_reduce_scatter_unused_params(True)
    stage.losses = module  # type: ignore[method-assign]


def delete_unused_gradients(stage: "Stage") -> None:
    """Delete the gradients of parameters that no process has used in a step: they are zeros, and
    the optimizers of one process would find none.
    """
    module = stage.losses
    if not isinstance(module, ShardedLosses):
        return
    used = set().union(*gather(module.used))
    for name, parameter in module.named_parameters():
        if name not in used:
            parameter.grad = None
    module.used = set()


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
    replace_layers(stage.omni, RowDropout, lambda dropout: nn.Dropout(dropout.p))
    del stage.losses


def replace_layers(model: nn.Module, kind: type, make: Callable[[Any], nn.Module]) -> None:
    """Put make(layer) in the place of each layer of a kind."""
    for module in model.modules():
        for name, layer in module.named_children():
            if isinstance(layer, kind):
                setattr(module, name, make(layer))


def is_sharded(value: Any) -> TypeGuard["DTensor"]:
    """Whether a value is a tensor of which this process holds a part."""
    return hasattr(value, "full_tensor")


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
