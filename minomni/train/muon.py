"""Muon, which orthogonalizes the updates of matrices of equal shape in one batch."""

from collections import defaultdict
from collections.abc import Iterable
from functools import partial
from typing import cast

import torch
from torch import Tensor

from minomni.devices import has_bf16
from minomni.train.distributed import divided

ADAMW_RMS = 0.2  # RMS of an AdamW update, which Muon's updates match (arXiv 2502.16982, sec. 2.2)


class Muon(torch.optim.Optimizer):
    """Muon with the step size of AdamW, for matrices and for the filters of convolutions.

    Source: Keller Jordan, "Muon", 2024; step size and weight decay: arXiv 2502.16982, sec. 2.2. A
    filter [out, in, kernel] is updated as a matrix [out, in * kernel]. Parameters of one shape, or
    its transpose, share one Newton-Schulz iteration: for the 77 matrices of 8 shapes in the tiny
    Thinker, without filters, a step takes 51 ms instead of 76 (one thread, lab log). For matrices,
    update and state are those of torch.optim.Muon with match_rms_adamw, which always multiplies in
    bf16; see orthogonal() for the precision used here.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        ns_steps: int = 5,
    ):
        """params: as for any optimizer, each of two or more dimensions."""
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "ns_steps": ns_steps,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # takes no closure
        """Update all parameters that have a gradient."""
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shape = as_matrix(parameter).shape
                    by_shape[tuple(sorted(shape))].append(parameter)
            for parameters in by_shape.values():
                self._update(parameters, group)

    def _update(self, parameters: list[Tensor], group: dict) -> None:
        """Update matrices of one shape, or its transpose; all have a gradient."""
        grads = [cast(Tensor, parameter.grad) for parameter in parameters]
        buffers = []
        for parameter in parameters:
            state = self.state[parameter]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            buffers.append(state["momentum_buffer"])

        # Nesterov momentum
        momentum = group["momentum"]
        torch._foreach_lerp_(buffers, grads, 1 - momentum)
        updates = torch._foreach_lerp(grads, buffers, momentum)

        # Orthogonalize all updates in one batch.
        stacked = torch.stack([wide(as_matrix(update)) for update in updates])  # [n, r, c]
        iterate = partial(orthogonal, steps=group["ns_steps"])
        orthogonalized = divided(iterate, stacked).to(stacked.dtype)

        # Decoupled weight decay, then a step with the RMS of an AdamW step.
        lr = group["lr"]
        torch._foreach_mul_(parameters, 1 - lr * group["weight_decay"])
        step_size = lr * ADAMW_RMS * max(stacked.shape[1:]) ** 0.5
        wide_matrices = [wide(as_matrix(parameter)) for parameter in parameters]
        torch._foreach_add_(wide_matrices, list(orthogonalized.unbind()), alpha=-step_size)


def as_matrix(parameter: Tensor) -> Tensor:
    """A view [out, ...] -> [out, rest]."""
    return parameter.flatten(1)


def wide(matrix: Tensor) -> Tensor:
    """A view of a matrix with no more rows than columns."""
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T


def orthogonal(matrices: Tensor, steps: int) -> Tensor:
    """Matrices [n, r, c] with r <= c -> [n, r, c] with the same singular vectors, values near 1.

    Newton-Schulz iteration: each step is a polynomial of the singular values that raises small ones
    and keeps large ones below about 1.2 (Keller Jordan, "Muon", 2024). fp32 is multiplied in bf16
    if the device does that in hardware, since two digits suffice; other types keep their precision.
    """
    x = matrices
    if matrices.dtype == torch.float32 and has_bf16(matrices.device):
        x = matrices.bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    a, b, c = 3.4445, -4.7750, 2.0315
    for _ in range(steps):
        gram = x @ x.mT  # [n, r, r]
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x
