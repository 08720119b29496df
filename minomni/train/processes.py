"""The processes that torchrun starts: their group, their order, and one line for an error.

With one process every function here does nothing.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from minomni.errors import Terminated, UserError, shorten

LONGEST_WAIT = timedelta(days=1)  # for the first process, which may prepare data for hours
STORE_WAIT = timedelta(seconds=5)  # for torchrun's store, which is there or has ended
CONTINUE = "--resume continues from the last checkpoint, with any number of processes"
TERMINATED = Terminated.exit_code
REPORTS = "minomni/reports"  # in that store: the number of processes that have met an error


@contextmanager
def process_group(device: str) -> Iterator[None]:
    """Work together with the other processes of torchrun while the block runs.

    The process that meets an error first reports it, and the others end without a message. Raises
    UserError for a device that cannot train in this way, where another process has ended, and where
    torchrun ends this one, as it does with all when one is lost.
    """
    if not dist.is_torchelastic_launched() or os.environ["WORLD_SIZE"] == "1":
        yield
        return
    try:
        with terminable():
            join(device)
            yield
    except UserError:
        end_if_reported()
        raise
    except RuntimeError as error:
        if not is_lost_connection(error):
            raise
        end_if_reported()
        first_line = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"the connection to another process of this run is lost ({shorten(first_line, 120)}); "
            f"{CONTINUE}"
        ) from None
    except SystemExit as ending:
        if ending.code != TERMINATED:
            raise
        end_if_reported()
        raise Terminated(
            f"torchrun has ended this process, as it does when another one is lost; {CONTINUE}"
        ) from None
    dist.destroy_process_group()


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM raises SystemExit while the block runs: it would end this process without a word.

    Python does so between two of its instructions, so a call that waits for another process first
    has to return. After an error of the block SIGTERM is ignored, as that error is about to end the
    process. In the main thread only.
    """

    def end(number: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise SystemExit(TERMINATED)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    except BaseException:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise
    # None: the handler before was not Python's.
    signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


def join(device: str) -> None:
    """Connect to the other processes. Raises UserError for a device that cannot train with them."""
    if device == "mps":
        raise UserError("torchrun trains on cuda and cpu; give --device cpu, or run one process")
    if device == "cuda":
        processes = int(os.environ["LOCAL_WORLD_SIZE"])
        gpus = torch.cuda.device_count()
        if processes > gpus:
            raise UserError(
                f"torchrun started {processes} processes for {gpus} GPUs; give it "
                f"--nproc-per-node {gpus}, or --device cpu"
            )
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=LONGEST_WAIT)


def is_lost_connection(error: RuntimeError) -> bool:
    """Whether an error comes from a collective operation, whose other side has ended."""
    return isinstance(error, dist.DistError) or "gloo" in str(error) or "NCCL" in str(error)


def end_if_reported() -> None:
    """End this process without a message where another one has reported an error."""
    address = os.environ["MASTER_ADDR"]
    port = int(os.environ["MASTER_PORT"])
    try:
        store = dist.TCPStore(address, port, timeout=STORE_WAIT, wait_for_workers=False)
        reports = store.add(REPORTS, 1)
    except dist.DistError:  # the store has ended
        return
    if reports > 1:
        raise SystemExit(2)


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
