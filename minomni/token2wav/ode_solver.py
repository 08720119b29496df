"""ODE solvers for flow matching: a grid of times, and Euler or Runge-Kutta steps along it."""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from minomni.config import FlowConfig
from minomni.errors import UserError

VelocityFn = Callable[[Tensor, Tensor], Tensor]  # (time [], y) -> dy/dt, of the shape of y


def time_grid(flow: FlowConfig, device: torch.device | None = None) -> Tensor:
    """The solver's times on [0, 1] -> [points].

    Sway sampling with -1 places more of them near the noise, where most of the result is decided
    (F5-TTS sec. 3.3).
    """
    u = torch.linspace(0, 1, flow.points, device=device)
    sway = torch.cos(math.pi / 2 * u) - 1 + u
    return u + flow.sway * sway


def solve(velocity_fn: VelocityFn, y: Tensor, grid: Tensor, solver: str) -> Tensor:
    """Integrate dy/dt = velocity_fn(t, y) over the grid.

    Raises UserError for a solver other than euler or rk4.
    """
    if solver not in STEPS:
        raise UserError(f"unknown solver {solver!r}; choose one of {', '.join(STEPS)}")
    step = STEPS[solver]
    for start, end in zip(grid[:-1], grid[1:], strict=True):
        y = step(velocity_fn, y, start, end)
    return y


def with_euler(flow: FlowConfig) -> FlowConfig:
    """The same grid with Euler steps: a quarter of the evaluations of RK4, for low latency."""
    return replace(flow, solver="euler")


def evaluation_times(flow: FlowConfig) -> list[Tensor]:
    """The times, each of shape [], at which solve() evaluates the velocity field, in its order."""
    grid = time_grid(flow)
    step_times = STEP_TIMES[flow.solver]
    times: list[Tensor] = []
    for start, end in zip(grid[:-1], grid[1:], strict=True):
        times += step_times(start, end)
    return times


def euler_times(start: Tensor, end: Tensor) -> list[Tensor]:
    return [start]


def euler_step(velocity_fn: VelocityFn, y: Tensor, start: Tensor, end: Tensor) -> Tensor:
    return y + (end - start) * velocity_fn(start, y)


def rk4_times(start: Tensor, end: Tensor) -> list[Tensor]:
    h = end - start
    return [start, start + h / 3, start + h * 2 / 3, end]


def rk4_step(velocity_fn: VelocityFn, y: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Fourth-order Runge-Kutta by the 3/8 rule: four evaluations a step."""
    h = end - start
    t1, t2, t3, t4 = rk4_times(start, end)
    k1 = velocity_fn(t1, y)
    k2 = velocity_fn(t2, y + h * k1 / 3)
    k3 = velocity_fn(t3, y + h * (k2 - k1 / 3))
    k4 = velocity_fn(t4, y + h * (k1 - k2 + k3))
    return y + h / 8 * (k1 + 3 * (k2 + k3) + k4)


STEPS = {"euler": euler_step, "rk4": rk4_step}
STEP_TIMES = {"euler": euler_times, "rk4": rk4_times}
