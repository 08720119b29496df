"""Which operations a function runs, and which of them a CUDA graph could not record.

On a CPU a copy between host and device cannot be told from any other copy.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Operations that make the host wait for the device, or copy numbers of the host to it.
WAITS = {
    "aten._local_scalar_dense.default",
    "aten.nonzero.default",
    "aten.masked_select.default",
    "aten._unique2.default",
    "aten.is_nonzero.default",
    "aten.repeat_interleave.Tensor",
    "aten.lift_fresh.default",
    "aten.lift_fresh_copy.default",
}


class Operations(TorchDispatchMode):
    """Collects the names of all operations, and those with a boolean index."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []
        self.waits: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        self.names.append(name)
        if name in WAITS or (name.startswith("aten.index") and has_bool_index(args)):
            self.waits.append(name)
        return function(*args, **(kwargs or {}))


def has_bool_index(arguments) -> bool:
    indexes = arguments[1] if len(arguments) > 1 and isinstance(arguments[1], list) else []
    return any(index is not None and index.dtype == torch.bool for index in indexes)
