"""How a flow is followed: a grid of times, and Euler's or Runge and Kutta's steps along it."""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from minomni.config import FlowConfig
from minomni.errors import UserError


def time_grid(flow: FlowConfig, device: torch.device | None = None) -> Tensor:
    """The solver's points on [0, 1]; sway -1 crowds them near the noise, where most is decided
    (F5-TTS sec. 3.3).
    """
    u = torch.linspace(0, 1, flow.points, device=device)
    return u + flow.sway * (torch.cos(math.pi / 2 * u) - 1 + u)


def solve(
    field: Callable[[Tensor, Tensor], Tensor], y: Tensor, grid: Tensor, solver: str
) -> Tensor:
    """Integrate dy/dt = field(t, y) over the grid. Raises UserError for a solver other than euler
    or rk4.
    """
    if solver not in STEPS:
        raise UserError(f"unknown solver {solver!r}; choose one of {', '.join(STEPS)}")
    for start, end in zip(grid[:-1], grid[1:]):
        y = STEPS[solver](field, y, start, end)
    return y


def with_euler(flow: FlowConfig) -> FlowConfig:
    """The same grid by Euler's steps: a quarter of the looks, for speech that must not wait."""
    return replace(flow, solver="euler")


def evaluation_times(flow: FlowConfig) -> list[Tensor]:
    """The times, each of shape [], at which a solve looks at the field, in its order."""
    times = []
    solve(lambda time, y: times.append(time) or y, torch.zeros(()), time_grid(flow), flow.solver)
    return times


def euler_step(
    field: Callable[[Tensor, Tensor], Tensor], y: Tensor, start: Tensor, end: Tensor
) -> Tensor:
    return y + (end - start) * field(start, y)


def rk4_step(
    field: Callable[[Tensor, Tensor], Tensor], y: Tensor, start: Tensor, end: Tensor
) -> Tensor:
    """Fourth-order Runge-Kutta by the 3/8 rule: four looks at the field for one step."""
    h = end - start
    k1 = field(start, y)
    k2 = field(start + h / 3, y + h * k1 / 3)
    k3 = field(start + h * 2 / 3, y + h * (k2 - k1 / 3))
    k4 = field(end, y + h * (k1 - k2 + k3))
    return y + h / 8 * (k1 + 3 * (k2 + k3) + k4)


STEPS = {"euler": euler_step, "rk4": rk4_step}
