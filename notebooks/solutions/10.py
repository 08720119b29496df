"""Solutions of the exercises of notebook 10. The graders are in the notebook."""

import torch


def my_mask(frames, block, back, ahead):
    number = torch.arange(frames) // block
    gap = number[None, :] - number[:, None]
    return (-back <= gap) & (gap <= ahead)


def my_flow_loss(velocity, x1, x0, t):
    time = t[:, None]
    x_t = (1 - time) * x0 + time * x1
    return (velocity(x_t, t) - (x1 - x0)).square().mean()


def my_euler(velocity, x, grid):
    trajectory = [x]
    for start, end in zip(grid, grid[1:]):
        x = x + (end - start) * velocity(start, x)
        trajectory.append(x)
    return torch.stack(trajectory)


def my_guided(conditional, unconditional, strength):
    return conditional + strength * (conditional - unconditional)


def heun_step(field, y, start, end):
    h = end - start
    first = field(start, y)
    second = field(end, y + h * first)
    return y + h * (first + second) / 2
