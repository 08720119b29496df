"""Bytes of tensors that are alive while something runs, and a limit for them."""

import weakref

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def storages(values) -> list[torch.UntypedStorage]:
    """The storages of the tensors in nested lists, tuples and dictionaries."""
    found = []
    for leaf in tree_leaves(values):
        if type(leaf) in (Tensor, nn.Parameter) and not leaf.is_meta:
            found.append(leaf.untyped_storage())
    return found


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations make, until they are freed, and the peak."""

    def __init__(self):
        super().__init__()
        self.alive: dict[int, int] = {}  # bytes by address of the storage's handle
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for storage in storages(result):
            self.count(storage)
        return result

    def count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.alive:
            return
        self.alive[key] = storage.nbytes()
        weakref.finalize(storage, self.alive.pop, key)
        self.peak = max(self.peak, self.live)

    @property
    def live(self) -> int:
        return sum(self.alive.values())


class Limited(LiveBytes):
    """A device with room for `limit` bytes: more raises PyTorch's error for a GPU that is full.

    What operations are given was there before, as weights are, and does not count.
    """

    def __init__(self, limit: float = float("inf")):
        super().__init__()
        self.limit = limit

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {storage._cdata for storage in storages((args, kwargs))}
        for storage in storages(result):
            if storage._cdata not in given:
                self.count(storage)
        return result

    def count(self, storage: torch.UntypedStorage) -> None:
        super().count(storage)
        if self.live > self.limit:
            raise torch.OutOfMemoryError(
                f"CUDA out of memory. Tried to allocate {storage.nbytes()} bytes.\nGPU 0 is full"
            )
