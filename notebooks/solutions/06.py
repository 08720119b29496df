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


def my_turns(start, seconds, rows, columns, audio_tokens):
    keyed = []
    for i, ids in enumerate(my_video_ids(start, seconds, rows, columns)):
        chunk = (ids[0] - start) // 50
        keyed.append(((chunk, 0, i), ids))
    for i in range(audio_tokens):
        keyed.append(((i // 50, 1, i), (start + i,) * 3))
    keyed.sort()
    turns = [ids for _, ids in keyed]
    marker = max(turns[-1]) + 1
    return [*turns, (marker,) * 3]


def my_angles(angles, section):
    parts = angles.split(section, dim=-1)
    return torch.cat([part[axis] for axis, part in enumerate(parts)], -1)


def closing_id(start, seconds, rows, columns, audio_tokens):
    last_pair = int(torch.tensor(seconds[-1]) * 25)  # ids after start
    ends_in_sound = (audio_tokens - 1) // 50 >= last_pair // 50
    if ends_in_sound:
        return start + audio_tokens
    return start + max(last_pair, rows - 1, columns - 1) + 1
