"""The KV cache of the decoders."""

import torch.nn.functional as F
from torch import Tensor

CACHE_STEP = 256  # a full KV cache grows by at least this many positions


class KVCache:
    """Keys and values of past positions, [B, H_kv, length, d] per layer, in buffers that grow."""

    def __init__(self, layers: int):
        self.buffers: list[tuple[Tensor, Tensor] | None] = [None] * layers
        self.lengths = [0] * layers

    @property
    def length(self) -> int:
        """Positions that all layers hold."""
        return self.lengths[-1]

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k, v [B, H_kv, L, d] and return all keys and values of the layer."""
        start = self.lengths[layer]
        end = start + k.shape[2]
        buffers = self.buffers[layer]
        if buffers is None:
            buffers = (k, v)
        elif end > buffers[0].shape[2]:
            # Grow by half of the new length at least, so that copies stay rare.
            room = end - start + max(CACHE_STEP, end // 2)
            keys, values = buffers
            keys = F.pad(keys[:, :, :start], (0, 0, 0, room))
            values = F.pad(values[:, :, :start], (0, 0, 0, room))
            buffers = (keys, values)
        self.buffers[layer] = buffers
        self.lengths[layer] = end

        keys, values = buffers
        keys[:, :, start:end] = k
        values[:, :, start:end] = v
        return keys[:, :, :end], values[:, :, :end]

    def truncate(self, length: int) -> None:
        """Drop all but the first `length` positions."""
        self.lengths = [min(length, current) for current in self.lengths]
