"""Diagrams of the notebooks as SVG: the map of the model, pipelines, layouts and recursions."""

from collections.abc import Sequence
from itertools import product

from minomni.notebook.svg import (
    INK,
    SIDE,
    arrow,
    box,
    circle,
    drawing,
    frame,
    line,
    sheet,
    square,
    tensor,
    text,
    width_of,
)
from minomni.plot import COLORS, PALE

MAP = {  # x, y and width of each box of the model
    "log-mel": (58, 20, 66),
    "patches": (58, 75, 66),
    "tokenizer": (58, 130, 76),
    "audio encoder": (158, 20, 104),
    "vision encoder": (158, 75, 104),
    "TMRoPE": (290, 75, 68),
    "Thinker": (386, 75, 68),
    "Talker": (490, 75, 60),
    "codec": (578, 130, 54),
    "DiT": (622, 75, 44),
    "vocoder": (694, 75, 66),
}
MAP_LABELS = {"audio": (4, 40), "image": (4, 95), "text": (4, 150), "speech": (790, 95)}
MAP_LABELS |= {" text ": (402, 34), "codes": (567, 88)}
MAP_ARROWS = (
    ((40, 35), (58, 35)),
    ((40, 90), (58, 90)),
    ((34, 145), (58, 145)),
    ((124, 35), (158, 35)),
    ((124, 90), (158, 90)),
    ((262, 35), (290, 80)),
    ((262, 90), (290, 90)),
    ((134, 145), (290, 100)),
    ((358, 90), (386, 90)),
    ((420, 75), (420, 42)),
    ((454, 90), (490, 90)),
    ((550, 92), (622, 92)),
    ((605, 130), (590, 96)),
    ((666, 90), (694, 90)),
    ((760, 90), (786, 90)),
)
# trellis(): distances between steps and between classes, the first node, the width of a node.
STEP = 150
ROW = 56
FIRST_X = 50
FIRST_Y = 26
NODE = 60


def model_map(*lit: str, steps: Sequence[Sequence[str]] = ()):
    """The whole model, with the boxes of this chapter lit.

    steps: the boxes of each step of an explanation, which get its number, from 1 on.
    """
    parts = [arrow(*ends) for ends in MAP_ARROWS]
    for name, (x, y, width) in MAP.items():
        parts.append(box(x, y, width, name, name in lit))
    for number, names in enumerate(steps, start=1):
        for x, y, _ in map(MAP.__getitem__, names):
            parts.append(circle(x, y, 9))
            parts.append(text(x, y + 4, str(number)))
    for name, (x, y) in MAP_LABELS.items():
        parts.append(f'<text x="{x}" y="{y}" fill="{INK}">{name.strip()}</text>')
    return drawing(840, 172, parts)


def flow(*steps: str, wide: int = 860, repeat: tuple[int, int, str] | None = None):
    """A pipeline: tensors and operations in turn, beginning with a tensor.

    Operations are boxes, tensors stand on the arrows between them. Continues on a new line when it
    is wider than `wide` pixels; the new line repeats the last arrow. repeat: the first and the last
    of some steps on one line that are repeated, and what is written below them.
    """
    parts: list[str] = []
    x, y, right = 4.0, 24, 0.0
    begins: list[tuple[float, int]] = []
    for i, step in enumerate(steps):
        width = width_of(step)
        is_box = i % 2 == 1
        following = width_of(steps[i + 1]) if i + 1 < len(steps) and is_box else 0
        if is_box and x + width + following > wide:
            last = steps[i - 1]
            x, y = 4.0, y + 52
            parts.append(tensor(x, y, last))
            x += width_of(last)
        parts.append(box(x, y, width, step) if is_box else tensor(x, y, step))
        begins.append((x, y))
        x += width
        right = max(right, x)
    if repeat:
        first, last_step, words = repeat
        left, below = begins[first]
        end = begins[last_step][0] + width_of(steps[last_step])
        parts.append(line(left, below + 35, end, below + 35))
        parts.append(text((left + end) / 2, below + 47, words, size=11))
        y = max(y, below + 12)
    return drawing(int(right) + 6, y + 40, parts)


def cell_order():
    """How patches become rows: an image of numbered patches and, beside it, the same numbers cell
    by cell.
    """
    cells = 2  # along a side of the image
    inside = 2  # patches along a side of a cell
    side = cells * inside
    parts = []
    for y, x in product(range(side), repeat=2):
        parts.append(square(4 + SIDE * x, 4 + SIDE * y, str(side * y + x)))
    for y, x in product(range(cells), repeat=2):
        edge = SIDE * inside
        parts.append(frame(4 + edge * x, 4 + edge * y, edge, edge))
    left = 4 + SIDE * side + 76
    middle = 4 + SIDE * side // 2
    parts.append(arrow((left - 68, middle), (left - 12, middle)))
    for row, column, y, x in product(range(cells), range(cells), range(inside), range(inside)):
        cell = cells * row + column
        number = side * (inside * row + y) + inside * column + x
        at = left + SIDE * (inside * inside * cell + inside * y + x) + 8 * cell
        parts.append(square(at, middle - 15, str(number)))
    width = SIDE * inside * inside
    for cell in range(cells * cells):
        parts.append(frame(left + (width + 8) * cell, middle - 15, width, SIDE))
    right = left + (width + 8) * cells * cells
    return drawing(right, SIDE * side + 8, parts)


def patch_axes():
    """The nine axes of an image of 2 x 2 cells: brackets around the pixels, and empty places for
    the axes in the order of the table. Three pixels stand for the 14 of a patch.
    """
    pixel, left, top = 12, 118, 44
    patch, cell, whole = 3 * pixel, 6 * pixel, 12 * pixel
    parts = _sheets_of_pixels(left, top, pixel)
    for level, (row, column, length) in enumerate(
        (("i", "j", patch), ("y", "x", cell), ("Y", "X", whole))
    ):
        x = left - 10 - 28 * level
        y = top + whole + 10 + 28 * level
        parts.append(line(x, top, x, top + length))
        parts.append(line(x, top, x + 5, top))
        parts.append(line(x, top + length, x + 5, top + length))
        parts.append(text(x - 9, top + length // 2 + 4, row))
        parts.append(line(left, y, left + length, y))
        parts.append(line(left, y, left, y - 5))
        parts.append(line(left + length, y, left + length, y - 5))
        parts.append(text(left + length / 2, y + 14, column))
    parts.append(text(left + whole / 2 + 12, top - 30, "sheets behind: c, f, T"))

    # The row of axes: five tell which patch, four which number in it.
    middle = top + whole // 2
    parts.append(arrow((left + whole + 40, middle), (left + whole + 90, middle)))
    across = left + whole + 110
    parts.append(text(across + 75, middle - 26, "which patch: row"))
    for _ in range(5):
        parts.append(square(across, middle - 15, "?"))
        across += SIDE
    across += 20
    parts.append(text(across + 60, middle - 26, "which number in it: column"))
    for _ in range(4):
        parts.append(square(across, middle - 15, "?"))
        across += SIDE
    parts.append(frame(across - 120, middle - 15, 120, SIDE))
    return drawing(across + 40, top + whole + 92, parts)


def _sheets_of_pixels(left: int, top: int, pixel: int) -> list[str]:
    """The image of patch_axes(): five sheets, the first with lines between its 12 x 12 pixels, its
    patches and its cells, one patch in color.
    """
    patch, cell, whole = 3 * pixel, 6 * pixel, 12 * pixel
    parts = [sheet(left + 6 * depth, top - 6 * depth, whole, PALE) for depth in (4, 3, 2, 1)]
    parts.append(sheet(left, top, whole, "white"))
    parts.append(sheet(left, top, patch, COLORS["image"]))
    for step in range(12):
        parts.append(line(left + pixel * step, top, left + pixel * step, top + whole, PALE))
        parts.append(line(left, top + pixel * step, left + whole, top + pixel * step, PALE))
    for step in range(4):
        parts.append(line(left + patch * step, top, left + patch * step, top + whole))
        parts.append(line(left, top + patch * step, left + whole, top + patch * step))
    for y, x in product((top, top + cell), (left, left + cell)):
        parts.append(frame(x, y, cell, cell))
    return parts


def trellis(symbols: str, steps: int):
    """The forward recursion of CTC: in each node the sum of the probabilities of all paths to it,
    if every class, the blank too, has the same probability at every step.

    symbols: letters with a blank (-) around each. The arrows of skips are dashed, the last two
    nodes lit.
    """
    classes = len(set(symbols))
    parts = []
    paths = [1, 1] + [0] * (len(symbols) - 2)  # to each node of a step
    for t in range(steps):
        x = FIRST_X + STEP * t
        parts.append(text(x + NODE // 2, 16, f"t = {t + 1}"))
        following_paths = [0] * len(symbols)
        for s, count in enumerate(paths):
            y = FIRST_Y + ROW * s
            is_end = t == steps - 1 and s >= len(symbols) - 2
            probability = f"{count}/{classes ** (t + 1)}" if count else "0"
            parts.append(box(x, y, NODE, probability, is_end))
            for following in _reached(symbols, s):
                following_paths[following] += count
                if count and t < steps - 1:
                    end = (x + STEP, FIRST_Y + ROW * following + 15)
                    parts.append(arrow((x + NODE, y + 15), end, dashed=following == s + 2))
        paths = following_paths
    for s, symbol in enumerate(symbols):
        parts.append(text(24, FIRST_Y + ROW * s + 19, symbol, 16))
    return drawing(STEP * steps - 20, FIRST_Y + ROW * len(symbols) - 18, parts)


def _reached(symbols: str, s: int) -> list[int]:
    """The nodes after node s: itself, the next one, and the next letter if it is another one."""
    may_skip = symbols[s] != "-" and s + 2 < len(symbols) and symbols[s] != symbols[s + 2]
    last = s + 2 if may_skip else min(s + 1, len(symbols) - 1)
    return list(range(s, last + 1))


def residual(*halves: Sequence[str], stream: str = "x", shape: str = "[L, D]"):
    """The halves of a transformer layer, one below the other.

    Each is a line of operations and tensors in turn; the residual stream passes above it and is
    added at its end. stream, shape: the name of the residual stream, and its shape.
    """
    parts: list[str] = []
    right = 0.0
    named = f"{stream} {shape}"
    for row, half in enumerate(halves):
        y = 34 + 84 * row
        x = 4.0
        for i, step in enumerate((named, *half, shape)):
            width = width_of(step)
            parts.append(box(x, y, width, step) if i % 2 == 1 else tensor(x, y, step))
            x += width
        plus = x + 11
        parts.append(circle(plus, y + 15, 11))
        parts.append(text(plus, y + 20, "+", size=16))
        bypass = f"M8 {y + 15} V{y - 22} H{plus:g} V{y + 3}"
        parts.append(
            f'<path d="{bypass}" fill="none" stroke="{COLORS["audio"]}" stroke-width="1.5" '
            'marker-end="url(#tip)"/>'
        )
        passes = f"{stream} passes unchanged: the residual stream"
        parts.append(text((8 + plus) / 2, y - 8, passes, 11))
        parts.append(arrow((plus + 12, y + 15), (plus + 76, y + 15)))
        parts.append(text(plus + 44, y + 7, named, size=11))
        right = max(right, plus + 80)
    return drawing(int(right), 84 * len(halves), parts)


def shared_heads(queries: int, shared: int):
    """Which query heads use which head of keys and values."""
    parts = []
    group = queries // shared
    for i in range(shared):
        middle = 4 + 100 * (group * i + group / 2)
        parts.append(box(middle - 45, 84, 90, f"keys, values {i}"))
        for head in range(group * i, group * (i + 1)):
            left = 9 + 100 * head
            parts.append(box(left, 4, 90, f"query head {head}"))
            parts.append(arrow((left + 45, 34), (middle, 84)))
    return drawing(8 + 100 * queries, 118, parts)
