"""Solutions of the exercises of notebook 09. The graders are in the notebook."""


def line_at(step, n):
    return f"r{step}" if step < n - 1 else "end" if step == n - 1 else "pad"


def targets_of(length, codes, eos, longest):
    wanted = [-100] * (length + 1) + codes + [eos]
    return wanted + [-100] * (longest - len(codes))


def never_said(ids, rows, pad, bos, eos):
    return [i for i in range(ids) if i == bos or i >= rows and i not in (pad, eos)]


def ready_at(chosen, cost, count):
    free, times = 0, []
    for i in range(count):
        free = max(free, chosen[min(i + 1, len(chosen) - 1)]) + cost
        times.append(free)
    return times
