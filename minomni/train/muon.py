"""Muon for many small matrices: those of one shape are turned together, in as many calls as one of
them takes.
"""

from collections import defaultdict

import torch
from torch import Tensor

from minomni.devices import has_bf16

RMS = 0.2  # of a step of AdamW, which Muon's steps are made as long as (arXiv 2502.16982, sec. 2.2)


class Muon(torch.optim.Muon):
    """torch.optim.Muon with match_rms_adamw, whose steps it takes, matrices of one shape (or one on
    its side) at a time.

    The tiny Thinker's 77 matrices have 8 shapes; its optimizers take 51 ms a step for 76 (one
    thread, lab log). The state and what is saved of it are torch's. torch's Muon always multiplies
    in bf16; see orthogonal() for when this does.
    """

    @torch.no_grad()
    def step(self):
        """One step for all matrices that have a gradient."""
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for matrix in group["params"]:
                if matrix.grad is not None:
                    by_shape[tuple(sorted(matrix.shape))].append(matrix)
            for matrices in by_shape.values():
                self._step_together(matrices, group)

    def _step_together(self, matrices: list[Tensor], group: dict) -> None:
        grads, momentum, lr = [matrix.grad for matrix in matrices], group["momentum"], group["lr"]
        buffers = [
            self.state[matrix].setdefault("momentum_buffer", torch.zeros_like(matrix))
            for matrix in matrices
        ]
        torch._foreach_lerp_(buffers, grads, 1 - momentum)
        wanted = torch._foreach_lerp(grads, buffers, momentum)  # Nesterov: one step ahead
        turned = orthogonal(torch.stack([wide(x) for x in wanted]), group["ns_steps"]).to(
            grads[0].dtype
        )  # [n, r, c]
        torch._foreach_mul_(matrices, 1 - lr * group["weight_decay"])
        length = lr * RMS * max(matrices[0].shape) ** 0.5
        torch._foreach_add_([wide(x) for x in matrices], list(turned.unbind()), alpha=-length)


def wide(matrix: Tensor) -> Tensor:
    """A view of a matrix with no more rows than columns."""
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T


def orthogonal(matrices: Tensor, steps: int) -> Tensor:
    """Matrices [n, r, c], r <= c -> [n, r, c] with the same singular vectors and all singular
    values near 1.

    By Newton-Schulz: each step is a polynomial of the singular values that lifts small ones and
    holds large ones below about 1.2 (Keller Jordan, "Muon", 2024). fp32 is multiplied in bf16 where
    the device does that in hardware, two digits being enough; any other type keeps its digits.
    """
    x = (
        matrices.bfloat16()
        if matrices.dtype == torch.float32 and has_bf16(matrices.device)
        else matrices
    )
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    a, b, c = 3.4445, -4.7750, 2.0315
    for _ in range(steps):
        gram = x @ x.mT  # [n, r, r]
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x
