"""Solutions of the exercises of notebook 13. The graders are in the notebook."""


def shortened(gradients, limit):
    length = sum(g * g for g in gradients) ** 0.5
    return [g * min(1.0, limit / length) for g in gradients]


def wanted(turns):
    marked = []
    for prompt, answer in turns:
        marked += [-100] * len(prompt) + answer
    return marked[1:] + [-100]


def whole_mean(parts):
    return sum(mean * count for mean, count in parts) / sum(count for _, count in parts)


def started(needs, done, running, workers):
    ready = [name for name, wants in needs.items()
             if name not in done + running and set(wants) <= set(done)]
    return ready[: max(0, workers - len(running))]
