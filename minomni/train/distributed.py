"""Training on several devices: torchrun starts one process for each, FSDP2 shards what trains.

    torchrun --nproc-per-node 2 -m minomni train small

A step takes the mean gradient of recipe.accumulate batches, and a batch is a function of (seed,
number). Process r of N computes batches r, r + N, ... of each step. A batch stays whole, because a
loss may be normalized over its tokens, frames or spectra. The numbers are those of one process, up
to the order of sums. With more processes than batches, the others compute a batch that counts zero.

Between steps a process holds one N-th of the trained parameters, their gradients and the state of
their optimizers; during a step it holds all parameters (ZeRO stage 2, arXiv 1910.02054). The model
is one FSDP group: a batch without images does not reach the vision encoder, and groups that only
some processes reach would wait for one another forever.

Without torchrun every function here does nothing.
"""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map

from minomni.errors import UserError, shorten

if TYPE_CHECKING:
    from minomni.train.loop import Stage

LOST = ("gloo", "nccl", "connection", "recv", "timed out")  # in the errors of a lost process


def start(device: str) -> None:
    """Join the processes that torchrun has started. Raises UserError for a device without FSDP."""
    if not dist.is_torchelastic_launched() or dist.is_initialized():
        return
    if device == "mps":
        raise UserError("torchrun trains on cuda and cpu; give --device cpu, or run one process")
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")


def world() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this is the process that writes files and prints."""
    return not dist.is_initialized() or dist.get_rank() == 0


@contextmanager
def first_goes_first() -> Iterator[None]:
    """The first process runs the block alone, then the others do, and find the files it wrote."""
    if world() > 1 and not is_first():
        dist.barrier()
    yield
    if world() > 1 and is_first():
        dist.barrier()


@contextmanager
def lost_process_errors() -> Iterator[None]:
    """Turn the error of a collective whose other side has ended into one UserError."""
    try:
        yield
    except RuntimeError as error:
        if world() == 1 or not any(word in str(error).lower() for word in LOST):
            raise
        first_line = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"another process of this run has ended ({shorten(first_line, 120)}); --resume "
            f"continues from the last checkpoint, with any number of processes"
        ) from None


def share(step: int, parts: int) -> list[tuple[int, float]]:
    """The numbers of the batches of a step that this process computes, each with what its losses
    are divided by: the number of batches, or infinity for a batch that only keeps this process busy
    while others compute theirs.
    """
    first = step * parts
    if world() == 1:
        return [(number, parts) for number in range(first, first + parts)]
    own = list(range(first + dist.get_rank(), first + parts, world()))
    shares: list[tuple[int, float]] = [(number, parts) for number in own]
    idle = math.ceil(parts / world()) - len(own)
    return shares + [(first, math.inf)] * idle


class ShardedLosses(nn.Module):
    """The losses of a stage as the forward pass of one module: FSDP's hooks are on forward alone,
    and stages call other methods of the model.
    """

    def __init__(self, stage: "Stage"):
        super().__init__()
        self.losses = stage.losses
        self.used: set[str] = set()  # names of the parameters that the losses of a step depend on
        for name, value in vars(stage).items():
            if isinstance(value, nn.Module):
                self.add_module(name, value)

    def forward(self, batch: Any) -> dict[str, Tensor]:
        losses = self.losses(batch)
        names = {id(parameter): name for name, parameter in self.named_parameters()}
        self.used |= {names[id(leaf)] for leaf in leaves(losses) if id(leaf) in names}
        return losses


def leaves(losses: dict[str, Tensor]) -> Iterator[Tensor]:
    """The tensors that the gradients of the losses go to."""
    nodes = [loss.grad_fn for loss in losses.values() if loss.grad_fn is not None]
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        if hasattr(node, "variable"):
            yield node.variable
        after = {inner for inner, _ in node.next_functions if inner is not None} - seen
        seen |= after
        nodes.extend(after)


def shard(stage: "Stage") -> None:
    """Shard the parameters of a stage that require a gradient over all processes."""
    if world() == 1:
        return
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
    gathered: list[Any] = [None] * world()
    dist.all_gather_object(gathered, (means, module.used))
    used = set().union(*(names for _, names in gathered))
    for name, parameter in module.named_parameters():
        if name not in used:
            parameter.grad = None
    module.used = set()
    names = dict.fromkeys(name for losses, _ in gathered for name in losses)
    return {name: sum(losses.get(name, 0.0) for losses, _ in gathered) for name in names}


@contextmanager
def unsharded(stage: "Stage") -> Iterator[None]:
    """All processes hold all parameters while the block runs."""
    module: Any = stage.losses  # fully_shard() has added methods to it
    if world() == 1 or not isinstance(module, FSDPModule):
        yield
        return
    module.unshard()
    yield
    module.reshard()


def unshard(stage: "Stage") -> None:
    """Undo shard(): the model has plain parameters again, all of them in each process."""
    module = stage.losses
    if not isinstance(module, ShardedLosses):
        return
    plain: dict[int, nn.Parameter] = {}  # by the sharded parameter, which modules may share
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            if isinstance(parameter, DTensor):
                if id(parameter) not in plain:
                    plain[id(parameter)] = nn.Parameter(parameter.full_tensor().detach())
                setattr(owner, name, plain[id(parameter)])
    del stage.losses


def whole(state: Any) -> Any:
    """A nested state with whole tensors in place of sharded ones, on the CPU of the first process;
    the others, which write no file, keep none.
    """

    def gather(value: Any) -> Any:
        if not isinstance(value, DTensor):
            return value
        tensor = value.full_tensor()
        return tensor.cpu() if is_first() else None

    return tree_map(gather, state)


def part_of(value: Tensor, like: Tensor) -> Tensor:
    """The part of a whole tensor that this process holds; `like` is sharded in the same way."""
    if not isinstance(like, DTensor) or value.shape != like.shape:
        return value
    value = value.to(like.device)
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def parts_of_state(state: dict, optimizer: torch.optim.Optimizer) -> dict:
    """A whole state of an optimizer -> the part of it that this process holds."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    kept = {}
    for index, row in state["state"].items():
        kept[index] = {key: part_of(value, parameters[index]) for key, value in row.items()}
    return {**state, "state": kept}
