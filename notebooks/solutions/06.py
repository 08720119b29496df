"""Solutions of the exercises of notebook 06. The graders are in the notebook."""

import torch


def id_after(start, rows, columns):
    return start + max(rows, columns)


def time_id(start, seconds):
    return start + int(torch.tensor(seconds) * 25)


def axis_of(j, section):
    j = j % sum(section)
    return 0 if j < section[0] else 1 if j < section[0] + section[1] else 2


def dealt(steps, sounds):
    row, pictures, sound = "", "v" * steps, "a" * sounds
    while pictures or sound:
        row += pictures[:2] + sound[:50]
        pictures, sound = pictures[2:], sound[50:]
    return row


def woven(angles, section):
    parts = angles.split(section, dim=-1)
    return torch.cat([part[axis] for axis, part in enumerate(parts)], -1)
