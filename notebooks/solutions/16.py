"""Solutions of the exercises of notebook 16. The graders are in the notebook."""

import math

import torch


def my_rate(step, peak, warmup, steps):
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / (steps - warmup)
    floor = peak / 20
    return floor + (peak - floor) * (1 + math.cos(math.pi * progress)) / 2


def my_adamw(weight, gradient, mean, square, t, rate, decay):
    mean = 0.9 * mean + 0.1 * gradient
    square = 0.98 * square + 0.02 * gradient**2
    unbiased = mean / (1 - 0.9**t)
    size = (square / (1 - 0.98**t)).sqrt()
    return weight * (1 - rate * decay) - rate * unbiased / (size + 1e-8), mean, square


def my_direction(gradient):
    unit = gradient / gradient.norm()
    left, values, right = torch.linalg.svd(unit, full_matrices=False)
    for _ in range(5):
        values = 3.4445 * values - 4.775 * values**3 + 2.0315 * values**5
    return 0.2 * max(gradient.shape) ** 0.5 * (left * values) @ right


def my_clip(gradients, limit):
    norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
    factor = min(1.0, limit / (norm + 1e-6))
    return [g * factor for g in gradients]


def my_iteration(gradient):
    x = gradient / gradient.norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x - 4.775 * gram @ x + 2.0315 * gram @ gram @ x
    return x


def my_loop(stage, steps):
    recipe, weights = stage.recipe, stage.parameters()
    memory = {name: [0, 0] for name in weights}
    for step in range(steps):
        # gradients of the step's batches together
        loss, rate = 0, my_rate(step, recipe.lr, recipe.warmup, recipe.steps)
        for number in range(step * recipe.accumulate, (step + 1) * recipe.accumulate):
            torch.manual_seed(stage.seed * 1_000_003 + number)
            loss = loss + sum(stage.losses(stage.batch(number)).values())
        gradients = torch.autograd.grad(loss / recipe.accumulate, weights.values())
        gradients = my_clip(gradients, recipe.clip)
        for (name, p), g in zip(weights.items(), gradients):
            now, decay = p.detach(), recipe.weight_decay if p.dim() > 1 else 0.0
            if p.dim() == 2 and "embed_tokens" not in name and "head" not in name:  # Muon
                mean = memory[name][0] = 0.95 * memory[name][0] + 0.05 * g
                ahead = my_direction(0.95 * mean + 0.05 * g)  # Nesterov momentum
                p.data = now * (1 - rate * decay) - rate * ahead
            else:  # AdamW
                share = 0.4 * rate
                p.data, *memory[name] = my_adamw(now, g, *memory[name], step + 1, share, decay)
    return tuple(weights.values())


def my_lora(x, weight, a, b, alpha):
    return x @ weight.T + alpha / len(a) * (x @ a.T) @ b.T
