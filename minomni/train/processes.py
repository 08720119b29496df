"""The processes that torchrun starts: how they meet, and one line when one of them ends early.

With one process nothing here has an effect. What they compute: distributed.py.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

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
    except (UserError, RuntimeError, SystemExit) as error:
        line = line_of(error)
        if line is None:
            raise
        if is_reported():
            raise SystemExit(2) from None
        raise line from None
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

    before = signal.signal(signal.SIGTERM, end) or signal.SIG_DFL  # None: set by a library in C
    try:
        yield
    except BaseException:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise
    signal.signal(signal.SIGTERM, before)


def line_of(error: BaseException) -> UserError | None:
    """The line with which an error ends this process; None for an error of the program."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, SystemExit) and error.code == TERMINATED:
        return Terminated(
            f"torchrun has ended this process, as it does when another one is lost; {CONTINUE}"
        )
    text = str(error)
    # A collective operation, whose other side has ended.
    if isinstance(error, dist.DistError) or "gloo" in text or "NCCL" in text:
        first_line = (text.splitlines() or [""])[0]
        return UserError(
            f"the connection to another process of this run is lost ({shorten(first_line, 120)}); "
            f"{CONTINUE}"
        )
    return None


def is_reported() -> bool:
    """Report an error of this process -> whether another one has reported one before."""
    address = os.environ["MASTER_ADDR"]
    port = int(os.environ["MASTER_PORT"])
    try:
        store = dist.TCPStore(address, port, timeout=STORE_WAIT, wait_for_workers=False)
        return store.add(REPORTS, 1) > 1
    except dist.DistError:  # the store has ended
        return False


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
