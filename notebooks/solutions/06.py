"""Solutions of the exercises of notebook 06. The graders are in the notebook."""

import torch


def my_image_ids(start, rows, columns):
    ids = []
    for row in range(rows):
        ids += [(start, start + row, start + column) for column in range(columns)]
    return ids


def my_video_ids(start, seconds, rows, columns):
    ids = []
    for second in seconds:
        time = start + int(torch.tensor(second) * 25)
        for row in range(rows):
            ids += [(time, start + row, start + column) for column in range(columns)]
    return ids


def my_angles(angles, section):
    parts = angles.split(section, dim=-1)
    return torch.cat([part[axis] for axis, part in enumerate(parts)], -1)


def id_after(start, rows, columns):
    return start + max(rows, columns)
