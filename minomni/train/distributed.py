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

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeGuard

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from minomni.errors import UserError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

    from minomni.train.loop import Stage


def world() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_first() -> bool:
    """Whether this is the process that writes files and prints."""
    return rank() == 0


@contextmanager
def first_goes_first() -> Iterator[None]:
    """The first process runs the block alone, then the others do, and find the files it wrote."""
    if not is_first():
        dist.barrier()
    yield
    if is_first() and world() > 1:
        dist.barrier()


def gather(value: Any) -> list[Any]:
    """The values of all processes in their order."""
    values = [value] * world()
    if world() > 1:
        dist.all_gather_object(values, value)
    return values


def summed(values: Tensor) -> Tensor:
    """The sum over all processes of what each computes from its own rows: any shape -> the same.

    Its gradient reaches the own rows alone: the gradients of all processes are added up later.
    """
    if world() == 1:
        return values
    total = values.detach().clone()
    dist.all_reduce(total)
    return total + (values - values.detach())


def require_same(values: dict[str, Any]) -> None:
    """Raises UserError, naming one that differs, unless all processes have these values."""
    for others in gather(values):
        for name, value in values.items():
            if others[name] != value:
                raise UserError(
                    f"the processes of this run have different {name}; expected the same files, on "
                    f"a disk that all of them see, and the same options"
                )


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


def drop_out(layer: nn.Dropout, rows: int, x: Tensor) -> Tensor:
    """Dropout [B, ...] with the masks of the whole batch, of so many rows, whatever rows this
    process has.
    """
    if not layer.training:
        return x
    mask = F.dropout(x.new_ones(rows, *x.shape[1:]), layer.p)
    return x * own_rows(mask)


def dropouts(model: nn.Module) -> list[nn.Dropout]:
    """The dropout layers of a model."""
    return [layer for layer in model.modules() if isinstance(layer, nn.Dropout)]


class ShardedLosses(nn.Module):
    """The losses of a stage as the forward pass of one module: FSDP's hooks are on forward alone,
    and stages call other methods of the model.
    """

    def __init__(self, stage: "Stage"):
        super().__init__()
        self.losses = stage.losses
        self.used: set[str] = set()  # names of the parameters that had a gradient in this step
        for name, value in vars(stage).items():
            if isinstance(value, nn.Module):
                self.add_module(name, value)

    def forward(self, batch: Any) -> dict[str, Tensor]:
        return self.losses(batch)


def shard(stage: "Stage") -> None:
    """Shard the parameters of a stage that require a gradient over all processes."""
    if world() == 1:
        return
    from torch.distributed.fsdp import fully_shard

    for layer in dropouts(stage.omni):
        layer.forward = partial(drop_out, layer, stage.recipe.batch)  # type: ignore[method-assign]
    module = ShardedLosses(stage)
    frozen = {parameter for parameter in module.parameters() if not parameter.requires_grad}
    mesh = dist.init_device_mesh(stage.device.type, (world(),))
    sharded = fully_shard(module, mesh=mesh, ignored_params=frozen)
    # Each process has the gradient of its own rows.
    sharded.set_gradient_divide_factor(1.0)
    sharded.set_force_sum_reduction_for_comms(True)
    sharded.set_reduce_scatter_unused_params(True)
    stage.losses = module  # type: ignore[method-assign]

    with unsharded(stage):  # hooks are on the whole parameters, which FSDP keeps
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(
                    lambda _, name=name: module.used.add(name)  # type: ignore[misc]
                )


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
    module.used.clear()


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
    for layer in dropouts(stage.omni):
        del layer.forward
    del stage.losses


def is_sharded(value: Any) -> TypeGuard["DTensor"]:
    """Whether a value is a tensor of which this process holds a part."""
    return hasattr(value, "full_tensor")


def divided(function: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
    """A function that maps each item of a batch [n, ...] to one of the same shape. A sharded batch
    is gathered once, each process computes an N-th of the items, and the results are exchanged.
    """
    if not is_sharded(batch):
        return function(batch)
    from torch.distributed.tensor import DTensor, Replicate, Shard

    # By way of the whole: gloo cannot exchange parts of one dimension for those of another.
    gathered, by_item = [Replicate()], [Shard(0)]
    own = batch.redistribute(placements=gathered).redistribute(placements=by_item).to_local()
    results: DTensor = DTensor.from_local(
        function(own), batch.device_mesh, by_item, shape=batch.shape, stride=batch.stride()
    )
    return results.redistribute(placements=gathered).redistribute(placements=batch.placements)


def whole(value: Any) -> Any:
    """A whole tensor for a sharded one, on the CPU of the first process; the others, which write no
    file, keep none. Any other value stays.
    """
    if not is_sharded(value):
        return value
    tensor = value.full_tensor()
    return tensor.cpu() if is_first() else None


def part_of(value: Tensor, like: Any) -> Tensor:
    """The part of a whole tensor that this process holds; `like` is sharded in the same way."""
    if not is_sharded(like) or value.shape != like.shape:  # the step count of AdamW is whole
        return value
    from torch.distributed.tensor import distribute_tensor

    value = value.to(like.device)
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)
