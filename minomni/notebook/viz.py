"""Figures for the notebooks: audio, mels, filters, position ids, settings side by side with buttons
and sliders, and diagrams.

matplotlib and ipywidgets are imported where they are used, so importing this file is cheap.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from html import escape
from itertools import product
from math import pi
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minomni.config import INPUT_SAMPLE_RATE, TokenIds
from minomni.inputs.mel import LOG_BANDS, VOICE_BANDS, hz_to_mel
from minomni.plot import COLORS, PALE, plain
from minomni.plot import axes as plot_axes
from minomni.plot import mel as plot_bands

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from PIL.Image import Image

INK = "#222222"
AXES = ("time", "height", "width")
CELL_PIXELS = 28  # side of the square of an image that is one token
MAX_NUMBERED_TOKENS = 40  # tokens in a row whose ids are still legible


def axes(*args: Any, **options: Any) -> Any:
    """A figure of rows x columns plots, as of minomni.plot.axes, in a notebook at 2x resolution."""
    draw_at_double_resolution()
    return plot_axes(*args, **options)


@cache
def draw_at_double_resolution() -> None:
    """Let a notebook store its figures with twice the pixels, shown at the usual size.

    Outside of a notebook nothing changes.
    """
    try:
        from IPython import get_ipython
        from matplotlib_inline.config import InlineBackend
    except ImportError:
        return
    shell = get_ipython()
    if hasattr(shell, "kernel"):
        InlineBackend.instance(parent=shell).figure_formats = {"retina"}


def waveform(ax: "Axes", wave: Tensor, rate: int = INPUT_SAMPLE_RATE, title: str = "") -> None:
    """Air pressure over time. wave [samples]."""
    seconds = torch.arange(len(wave)) / rate
    ax.plot(seconds, wave, color=COLORS["audio"], linewidth=0.6)
    ax.set(xlabel="seconds", ylabel="pressure", title=title, xlim=(0, len(wave) / rate))


def mel(ax: "Axes", bands: Any, title: str = "", **options: Any) -> None:
    """A mel spectrogram, or a difference of two, over seconds and Hz; options as of
    minomni.plot.mel.

    Other images of bands over frames keep the number of the band as their axis.
    """
    plot_bands(ax, bands, title, **options)
    if len(bands) in (LOG_BANDS, VOICE_BANDS):
        hz_axis(ax, len(bands))


def hz_axis(ax: "Axes", bands: int) -> None:
    """Label the vertical axis of an image of `bands` mel bands in Hz."""
    # The centers of the bands are equally spaced in mels between 0 Hz and the Nyquist limit.
    hz = torch.tensor([500.0, 1000, 2000, 4000, INPUT_SAMPLE_RATE / 2])
    mels = hz_to_mel(hz)
    ticks = mels / mels[-1] * (bands + 1) - 0.5
    ax.set(ylabel="Hz", yticks=ticks.clamp_max(bands), yticklabels=[f"{f:,.0f}" for f in hz])


def filters(
    ax: "Axes", bank: Tensor, top: float = INPUT_SAMPLE_RATE / 2, every: int = 1, title: str = ""
) -> None:
    """A filter bank [bands, bins] over 0 .. top Hz, each `every`-th filter drawn."""
    import matplotlib

    hz = torch.linspace(0, top, bank.shape[1])
    colors = matplotlib.colormaps["viridis"]
    for band in range(0, bank.shape[0], every):
        # The triangle with the zero on either side.
        nonzero = bank[band].nonzero().flatten()
        first = max(int(nonzero[0]) - 1, 0)
        last = int(nonzero[-1]) + 1
        shown = slice(first, last + 1)
        color = colors(0.9 * band / bank.shape[0])
        ax.plot(hz[shown], bank[band, shown], color=color, linewidth=0.9)
    ax.set(xlabel="Hz", ylabel="weight", title=title, xlim=(0, top), ylim=(0, None))


def draw_image(ax: "Axes", pixels: Any, title: str = "") -> None:
    """An image without axes: a PIL image, or [height, width, 3] of bytes or of 0 .. 1.

    Its pixels are drawn as squares.
    """
    image = ax.imshow(pixels)
    height, width = image.get_size()
    space = ax.get_window_extent()
    if min(space.height / height, space.width / width) > 1:
        # matplotlib would smooth an enlarged image and hide what a model is given.
        image.set_interpolation("nearest")
    ax.axis("off")
    ax.set_title(title, fontsize=9)


def lattice(
    ax: "Axes", height: int, width: int, step: int, color: str = "white", linewidth: float = 0.8
) -> None:
    """Lines between the squares of `step` pixels in an image of height x width pixels."""
    edge = -0.5  # where imshow draws the border of the first pixel
    rows = torch.arange(step, height, step) + edge
    columns = torch.arange(step, width, step) + edge
    ax.hlines(rows, edge, width + edge, color, linewidth=linewidth)
    ax.vlines(columns, edge, height + edge, color, linewidth=linewidth)


def tint(ax: "Axes", chosen: Tensor, step: int) -> None:
    """Darken some squares of `step` pixels in an image. chosen: mask [rows, columns]."""
    rows, columns = chosen.shape
    overlay = torch.zeros(rows, columns, 4)  # transparent black
    overlay[..., 3] = 0.3 * chosen
    extent = (-0.5, step * columns - 0.5, step * rows - 0.5, -0.5)
    ax.imshow(overlay.numpy(), interpolation="nearest", extent=extent)


def captioned(ax: "Axes", image: "Image", labels: Sequence[Sequence[str]], title: str = "") -> None:
    """An image with words in its squares of CELL_PIXELS.

    labels: the words of each square, row by row.
    """
    draw_image(ax, image, title)
    lattice(ax, image.height, image.width, CELL_PIXELS)
    for i, words in enumerate(labels):
        row, column = divmod(i, image.width // CELL_PIXELS)
        text = "\n".join(filter(None, words))
        if text:
            x = CELL_PIXELS * (column + 0.5) - 0.5
            y = CELL_PIXELS * (row + 0.5) - 0.5
            box = {"color": "#0009", "pad": 1}
            ax.text(x, y, text, fontsize=8, ha="center", va="center", color="white", bbox=box)


def modalities(ids: list[int], tokens: TokenIds) -> list[str]:
    """The kind of each token, for its color: text, marker, audio, image or video."""
    kinds = {tokens.audio: "audio", tokens.image: "image", tokens.video: "video"}
    marks = (
        tokens.audio_bos,
        tokens.audio_eos,
        tokens.vision_bos,
        tokens.vision_eos,
        tokens.im_start,
        tokens.im_end,
    )
    kinds |= dict.fromkeys(marks, "marker")
    return [kinds.get(token, "text") for token in ids]


def legend(ax: "Axes", kinds: list[str]) -> None:
    """Name the colors that occur, above the plot."""
    from matplotlib.patches import Patch

    present = [kind for kind in COLORS if kind in kinds]
    patches = [Patch(color=COLORS[kind], label=kind) for kind in present]
    ax.legend(
        handles=patches,
        loc="lower right",
        bbox_to_anchor=(1, 1),
        ncols=len(present),
        frameon=False,
        fontsize=8,
        borderaxespad=0,
        handlelength=1,
        columnspacing=1,
    )


def tmrope(ids: Tensor, kinds: list[str], title: str = "") -> None:
    """Position ids [3, L] of one row, as numbered cells if these are legible, else as three plots.

    kinds [L]: what modalities() gives.
    """
    if ids.shape[1] <= MAX_NUMBERED_TOKENS:
        _cells(ids, kinds, title)
    else:
        _tracks(ids, kinds, title)


def _cells(ids: Tensor, kinds: list[str], title: str) -> None:
    """One numbered square per id, a line for each of the three axes."""
    length = ids.shape[1]
    ax = axes(width=max(4.0, 0.36 * length + 1), height=1.7)
    for row, column in product(range(3), range(length)):
        y = 2 - row
        number = int(ids[row, column])
        ax.add_patch(_rectangle(column, y, COLORS[kinds[column]]))
        ax.text(column, y, number, ha="center", va="center", fontsize=8, color=INK)
    ax.set(
        xlim=(-0.6, length - 0.4),
        ylim=(-0.6, 2.6),
        xticks=[],
        yticks=(2, 1, 0),
        yticklabels=AXES,
    )
    ax.set_title(title, loc="left", fontsize=9)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    legend(ax, kinds)


def _rectangle(x: float, y: float, color: str):
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.46, y - 0.44), 0.92, 0.88, facecolor=color, alpha=0.55, linewidth=0)


def _tracks(ids: Tensor, kinds: list[str], title: str) -> None:
    """One scatter plot of ids over tokens for each of the three axes."""
    plots = axes(3, 1, height=1.5, sharex=True)
    colors = [COLORS[kind] for kind in kinds]
    for ax, name, row in zip(plots, AXES, ids, strict=True):
        ax.scatter(range(ids.shape[1]), row, c=colors, s=7)
        ax.set_ylabel(name, fontsize=9)
        ax.grid(color=PALE, linewidth=0.5)
        ax.set_axisbelow(True)
    plots[0].set_title(title, loc="left", fontsize=9)
    plots[-1].set_xlabel("token", fontsize=9)
    legend(plots[0], kinds)


def squares(ax: "Axes", lines: dict[str, list[str]]) -> None:
    """Tokens as squares colored by kind: for each label a line of kinds, the first one on top."""
    longest = max(map(len, lines.values()))
    pixels = ax.get_window_extent().width / longest  # per token
    width = 0.84 if pixels > 8 else 1.0  # thinner gaps would alias
    for y, kinds in enumerate(lines.values()):
        colors = [COLORS[kind] for kind in kinds]
        ax.bar(range(len(kinds)), 0.8, width=width, bottom=y - 0.4, color=colors)
    ax.set(
        xlim=(-0.6, longest - 0.4),
        ylim=(len(lines) - 0.5, -0.5),
        yticks=range(len(lines)),
        yticklabels=list(lines),
    )
    ax.spines[:].set_visible(False)
    ax.tick_params(axis="y", length=0)


def page(
    ax: "Axes", kinds: list[str], messages: Sequence[tuple[str, int]], width: int = 60
) -> None:
    """Tokens as squares colored by kind, `width` a line, with a bracket below each message.

    messages: name and first token of each, in order; the last one is open, its bracket has no end.
    """
    ends = [begin for _, begin in messages[1:]] + [len(kinds)]
    lines = range(0, len(kinds), width)
    for y, start in enumerate(lines):
        colors = [COLORS[kind] for kind in kinds[start : start + width]]
        ax.bar(range(len(colors)), 0.5, width=0.84, bottom=y - 0.4, color=colors)
    for (name, begin), end in zip(messages, ends, strict=True):
        # The part of the message on each of its lines: (tokens, line, first, last).
        parts = []
        for y, start in enumerate(lines):
            first = max(begin, start) - start
            last = min(end, start + width) - start - 1
            if first <= last:
                parts.append((last - first, y, first, last))
                ax.hlines(y + 0.2, first - 0.42, last + 0.42, INK, linewidth=0.8)
        _, y, first, last = max(parts)
        ax.text((first + last) / 2, y + 0.26, name, ha="center", va="top", fontsize=7, color=INK)
        sides = [(parts[0][2] - 0.42, parts[0][1])]
        if end < len(kinds):
            sides.append((parts[-1][3] + 0.42, parts[-1][1]))
        for x, row in sides:
            ax.vlines(x, row + 0.13, row + 0.2, INK, linewidth=0.8)
    ax.set(
        xlim=(-0.6, width - 0.4),
        ylim=(len(lines) - 0.4, -0.5),
        yticks=[y - 0.15 for y in range(len(lines))],
        yticklabels=lines,
        xlabel="token in the line",
        ylabel=f"token ({width} a line)",
    )
    ax.spines[:].set_visible(False)
    ax.tick_params(axis="y", length=0)


def split(ax: "Axes", *heights: float) -> list["Axes"]:
    """Plots stacked in the area of one, with these relative heights; its title stays on top."""
    ax.axis("off")
    total = sum(heights)
    plots = []
    for i in range(len(heights)):
        top = 1 - sum(heights[:i]) / total
        bottom = 1 - sum(heights[: i + 1]) / total
        plots.append(plain(ax.inset_axes((0, bottom, 1, 0.94 * (top - bottom)))))
    return plots


def angles(ax: "Axes", cosines: Tensor, section: tuple[int, int, int]) -> None:
    """Rotation of each token by TMRoPE: cosines [L, pairs], white 0 and black 180 degrees, with a
    key at the right.

    section: how many pairs belong to each of the three axes. An axis whose pairs do not rotate is
    labeled so, because white alone looks like an empty plot.
    """
    ax.imshow(cosines.T, aspect="auto", cmap="Greys_r", vmin=-1, vmax=1, interpolation="nearest")
    # A line between the axes, a label in the middle of each.
    borders = torch.tensor((0, *section)).cumsum(0)
    right = len(cosines) - 0.5
    ax.hlines(borders[1:-1] - 0.5, -0.5, right, color=COLORS["text"], linewidth=0.8)
    middles = (borders[:-1] + borders[1:] - 1) / 2
    for middle, band in zip(middles, cosines.split(section, dim=1), strict=True):
        if band.min() > 0.99:
            ax.text(right / 2, middle, "all angles ≈ 0", fontsize=8, ha="center", va="center")
    ax.set(yticks=middles, yticklabels=AXES, xlabel="token")
    ax.tick_params(axis="y", length=0)
    key = ax.inset_axes((1.02, 0, 0.03, 1))
    shades = torch.linspace(0, pi, 64).cos()[:, None]
    key.imshow(shades, aspect="auto", cmap="Greys_r", vmin=-1, vmax=1, extent=(0, 1, pi, 0))
    key.set(xticks=[], yticks=(0, pi), yticklabels=("0", "π"))
    key.yaxis.tick_right()
    key.tick_params(labelsize=8, length=0)


def explore(
    draw: Callable,
    size: float = 2.6,
    slide: Mapping[str, Sequence] | None = None,
    unit: str = "",
    width: float = 3.0,
    **ranges: Sequence,
) -> None:
    """Show draw(ax, **settings) at many settings: a row of plots, and controls in a live notebook.

    ranges: the values of each setting. The row of plots varies the first setting; the others are at
    their middle value, which is written above it. A title that draw sets is kept. size, width: of a
    plot in inches. slide: the finer values that an ordered quantity has on its slider. Every other
    setting has a button for each value; there are no controls if the row shows all there is. unit:
    of all values, for the titles.
    """
    (first, values), *others = ranges.items()
    middle = {name: options[len(options) // 2] for name, options in others}
    height = size + 0.2 if middle else size  # a line of text above
    plots = axes(1, len(values), width=min(9.0, width * len(values)), height=height)
    if len(values) == 1:
        plots = [plots]
    for ax, value in zip(plots, values, strict=True):
        draw(ax, **{first: value}, **middle)
        ax.set_title(ax.get_title() or f"{first} = {value}{unit}", fontsize=9)
        # The same y label is not repeated: its space goes to the plots.
        if ax is not plots[0] and ax.get_ylabel() == plots[0].get_ylabel():
            ax.set_ylabel("")
    if middle:
        fixed = ", ".join(f"{name} = {value}{unit}" for name, value in middle.items())
        plots[0].figure.suptitle(fixed, x=0.01, ha="left", fontsize=8, color=COLORS["text"])
    has_more = len(ranges) > 1 or bool(slide)
    if has_more and is_interactive():
        _controls(draw, size, unit, ranges, slide or {})


def is_interactive() -> bool:
    """Whether a front end such as JupyterLab runs this cell: it sends the cell's id, scripts do
    not.
    """
    try:
        from IPython import get_ipython

        return "cellId" in get_ipython().kernel.get_parent()["metadata"]
    except (ImportError, AttributeError, KeyError):
        return False


def _controls(
    draw: Callable,
    size: float,
    unit: str,
    ranges: Mapping[str, Sequence],
    slide: Mapping[str, Sequence],
) -> None:
    """Buttons or a slider for each setting; draw is called whenever one changes."""
    import ipywidgets
    import matplotlib.pyplot as plt

    def redraw(**settings):
        ax = axes(width=7, height=1.2 * size)
        draw(ax, **settings)
        chosen = ", ".join(f"{name} = {value}{unit}" for name, value in settings.items())
        ax.set_title(ax.get_title() or chosen, fontsize=9)
        plt.show()

    controls = {}
    for name, values in ranges.items():
        middle = values[len(values) // 2]
        controls[name] = _slider(slide[name], middle) if name in slide else _buttons(values, middle)
    ipywidgets.interact(redraw, **controls)


def _slider(values: Sequence, value: Any) -> Any:
    """A slider over the values of an ordered quantity; it begins at `value`, one of them."""
    import ipywidgets

    return ipywidgets.SelectionSlider(
        options=list(values), value=value, continuous_update=False, layout={"width": "480px"}
    )


def _buttons(values: Sequence, value: Any) -> Any:
    """A button for each value; `value` is the one that is pressed."""
    import ipywidgets

    options = [(str(option), option) for option in values]
    style = {"button_width": "auto"}
    return ipywidgets.ToggleButtons(options=options, value=value, style=style)


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


def model_map(*lit: str, steps: Sequence[Sequence[str]] = ()):
    """The whole model as a diagram (SVG), with the boxes of this chapter lit.

    steps: the boxes of each step of an explanation, which get its number, from 1 on.
    """
    parts = [_arrow(*ends) for ends in MAP_ARROWS]
    for name, (x, y, width) in MAP.items():
        parts.append(_box(x, y, width, name, name in lit))
    for number, names in enumerate(steps, start=1):
        for x, y, _ in map(MAP.__getitem__, names):
            parts.append(f'<circle cx="{x}" cy="{y}" r="9" fill="white" stroke="{INK}"/>')
            parts.append(_text(x, y + 4, str(number)))
    for name, (x, y) in MAP_LABELS.items():
        parts.append(f'<text x="{x}" y="{y}" fill="{INK}">{name.strip()}</text>')
    return _svg(840, 172, parts)


def flow(*steps: str, wide: int = 860, repeat: tuple[int, int, str] | None = None):
    """A pipeline as a diagram (SVG): tensors and operations in turn, beginning with a tensor.

    Operations are boxes, tensors stand on the arrows between them. Continues on a new line when it
    is wider than `wide` pixels; the new line repeats the last arrow. repeat: the first and the last
    of some steps on one line that are repeated, and what is written below them.
    """
    parts: list[str] = []
    x, y, right = 4.0, 24, 0.0
    begins: list[tuple[float, int]] = []
    for i, step in enumerate(steps):
        width = 16 + 6.8 * len(step)
        is_box = i % 2 == 1
        following = 16 + 6.8 * len(steps[i + 1]) if i + 1 < len(steps) and is_box else 0
        if is_box and x + width + following > wide:
            last = steps[i - 1]
            x, y = 4.0, y + 52
            parts.append(_tensor(x, y, last))
            x += 16 + 6.8 * len(last)
        parts.append(_box(x, y, width, step) if is_box else _tensor(x, y, step))
        begins.append((x, y))
        x += width
        right = max(right, x)
    if repeat:
        first, last_step, text = repeat
        left, below = begins[first]
        end = begins[last_step][0] + 16 + 6.8 * len(steps[last_step])
        parts.append(_line(left, below + 35, end, below + 35))
        parts.append(_text((left + end) / 2, below + 47, text, size=11))
        y = max(y, below + 12)
    return _svg(int(right) + 6, y + 40, parts)


def _tensor(x: float, y: float, name: str) -> str:
    """An arrow with the name of a tensor above it."""
    width = 16 + 6.8 * len(name)
    arrow = _arrow((x + 1, y + 15), (x + width - 1, y + 15))
    return arrow + _text(x + width / 2, y + 7, name, size=11)


def cell_order():
    """How patches become rows, as a diagram (SVG): an image of numbered patches and, beside it, the
    same numbers cell by cell.
    """
    cells = 2  # along a side of the image
    inside = 2  # patches along a side of a cell
    side = cells * inside
    parts = []
    for y, x in product(range(side), repeat=2):
        parts.append(_square(4 + 30 * x, 4 + 30 * y, str(side * y + x)))
    for y, x in product(range(cells), repeat=2):
        edge = 30 * inside
        parts.append(_frame(4 + edge * x, 4 + edge * y, edge, edge))
    left = 4 + 30 * side + 76
    middle = 4 + 15 * side
    parts.append(_arrow((left - 68, middle), (left - 12, middle)))
    for row, column, y, x in product(range(cells), range(cells), range(inside), range(inside)):
        cell = cells * row + column
        number = side * (inside * row + y) + inside * column + x
        at = left + 30 * (inside * inside * cell + inside * y + x) + 8 * cell
        parts.append(_square(at, middle - 15, str(number)))
    width = 30 * inside * inside
    for cell in range(cells * cells):
        parts.append(_frame(left + (width + 8) * cell, middle - 15, width, 30))
    right = left + (width + 8) * cells * cells
    return _svg(right, 30 * side + 8, parts)


def patch_axes():
    """The nine axes of an image of 2 x 2 cells, as a diagram (SVG): brackets around the pixels, and
    empty places for the axes in the order of the table. Three pixels stand for the 14 of a patch.
    """
    pixel, left, top = 12, 118, 44
    patch, cell, whole = 3 * pixel, 6 * pixel, 12 * pixel
    inside = COLORS["image"]  # color of what is inside a patch
    parts = [_sheet(left + 6 * depth, top - 6 * depth, whole, PALE) for depth in (4, 3, 2, 1)]
    parts.append(_sheet(left, top, whole, "white"))
    parts.append(_sheet(left, top, patch, inside))
    for step in range(12):
        parts.append(_line(left + pixel * step, top, left + pixel * step, top + whole, PALE))
        parts.append(_line(left, top + pixel * step, left + whole, top + pixel * step, PALE))
    for step in range(4):
        parts.append(_line(left + patch * step, top, left + patch * step, top + whole))
        parts.append(_line(left, top + patch * step, left + whole, top + patch * step))
    for y in (top, top + cell):
        for x in (left, left + cell):
            parts.append(_frame(x, y, cell, cell))

    for level, (row, column, length) in enumerate(
        (("i", "j", patch), ("y", "x", cell), ("Y", "X", whole))
    ):
        x = left - 10 - 28 * level
        y = top + whole + 10 + 28 * level
        parts.append(_line(x, top, x, top + length))
        parts.append(_line(x, top, x + 5, top))
        parts.append(_line(x, top + length, x + 5, top + length))
        parts.append(_text(x - 9, top + length // 2 + 4, row))
        parts.append(_line(left, y, left + length, y))
        parts.append(_line(left, y, left, y - 5))
        parts.append(_line(left + length, y, left + length, y - 5))
        parts.append(_text(left + length / 2, y + 14, column))
    parts.append(_text(left + whole / 2 + 12, top - 30, "sheets behind: c, f, T"))

    middle = top + whole // 2
    parts.append(_arrow((left + whole + 40, middle), (left + whole + 90, middle)))
    across = left + whole + 110
    parts.append(_text(across + 75, middle - 26, "which patch: row"))
    for _ in range(5):
        parts.append(_square(across, middle - 15, "?"))
        across += 30
    across += 20
    parts.append(_text(across + 60, middle - 26, "which number in it: column"))
    for _ in range(4):
        parts.append(_square(across, middle - 15, "?"))
        across += 30
    parts.append(_frame(across - 120, middle - 15, 120, 30))
    return _svg(across + 40, top + whole + 92, parts)


def trellis(symbols: str, steps: int):
    """The forward recursion of CTC as a diagram (SVG): in each node the sum of the probabilities of
    all paths to it, if every class, the blank too, has the same probability at every step.

    symbols: letters with a blank (-) around each. The arrows of skips are dashed, the last two
    nodes lit.
    """
    classes = len(set(symbols))
    parts = []
    paths = [1, 1] + [0] * (len(symbols) - 2)
    for t in range(steps):
        x = 50 + 150 * t
        parts.append(_text(x + 30, 16, f"t = {t + 1}"))
        moved = [0] * len(symbols)
        for s, count in enumerate(paths):
            y = 26 + 56 * s
            is_end = t == steps - 1 and s >= len(symbols) - 2
            probability = f"{count}/{classes ** (t + 1)}" if count else "0"
            parts.append(_box(x, y, 60, probability, is_end))
            reached = [s, s + 1, s + 2] if _may_skip(symbols, s) else [s, s + 1]
            for following in reached:
                if following == len(symbols):
                    continue
                moved[following] += count
                if count and t < steps - 1:
                    end = (x + 150, 26 + 56 * following + 15)
                    parts.append(_arrow((x + 60, y + 15), end, dashed=following == s + 2))
        paths = moved
    for s, symbol in enumerate(symbols):
        parts.append(_text(24, 26 + 56 * s + 19, symbol, 16))
    return _svg(150 * steps - 20, 26 + 56 * len(symbols) - 18, parts)


def _may_skip(symbols: str, s: int) -> bool:
    """Whether an alignment may go from a letter to the next one without the blank between them."""
    return symbols[s] != "-" and s + 2 < len(symbols) and symbols[s] != symbols[s + 2]


def residual(*halves: Sequence[str]):
    """The halves of a decoder layer as a diagram (SVG), one below the other.

    Each is a line of operations and tensors in turn; the residual stream x passes above it and is
    added at its end.
    """
    parts: list[str] = []
    right = 0.0
    for row, half in enumerate(halves):
        y = 34 + 84 * row
        x = 4.0
        for i, step in enumerate(("x [L, D]", *half, "[L, D]")):
            width = 16 + 6.8 * len(step)
            parts.append(_box(x, y, width, step) if i % 2 == 1 else _tensor(x, y, step))
            x += width
        plus = x + 11
        parts.append(f'<circle cx="{plus:g}" cy="{y + 15}" r="11" fill="white" stroke="{INK}"/>')
        parts.append(_text(plus, y + 20, "+", size=16))
        bypass = f"M8 {y + 15} V{y - 22} H{plus:g} V{y + 3}"
        parts.append(
            f'<path d="{bypass}" fill="none" stroke="{COLORS["audio"]}" stroke-width="1.5" '
            'marker-end="url(#tip)"/>'
        )
        parts.append(_text((8 + plus) / 2, y - 8, "x passes unchanged: the residual stream", 11))
        parts.append(_arrow((plus + 12, y + 15), (plus + 76, y + 15)))
        parts.append(_text(plus + 44, y + 7, "x [L, D]", size=11))
        right = max(right, plus + 80)
    return _svg(int(right), 84 * len(halves), parts)


def shared_heads(queries: int, shared: int):
    """Which query heads use which head of keys and values, as a diagram (SVG)."""
    parts = []
    group = queries // shared
    for i in range(shared):
        middle = 4 + 100 * (group * i + group / 2)
        parts.append(_box(middle - 45, 84, 90, f"keys, values {i}"))
        for head in range(group * i, group * (i + 1)):
            left = 9 + 100 * head
            parts.append(_box(left, 4, 90, f"query head {head}"))
            parts.append(_arrow((left + 45, 34), (middle, 84)))
    return _svg(8 + 100 * queries, 118, parts)


def _svg(width: int, height: int, parts: list[str]):
    """A diagram. JupyterLab shows its text in its place until the reader has run the cell."""
    from IPython.display import SVG

    class Diagram(SVG):
        def __repr__(self):
            return "(a diagram: run this cell to see it)"

    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
    head += f'width="{width}" height="{height}" font-family="sans-serif" font-size="12">'
    tip = '<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
    tip += f'orient="auto"><path d="M0 0 8 4 0 8z" fill="{INK}"/></marker>'
    page = f'<rect width="{width}" height="{height}" fill="white"/>'
    return Diagram("".join([head, f"<defs>{tip}</defs>", page, *parts, "</svg>"]))


def _arrow(begin: tuple[float, float], end: tuple[float, float], dashed: bool = False) -> str:
    (x1, y1), (x2, y2) = begin, end
    line = f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="{INK}" '
    line += 'stroke-dasharray="5 3" ' if dashed else ""
    return line + 'marker-end="url(#tip)"/>'


def _box(x: float, y: float, width: float, name: str, lit: bool = False) -> str:
    fill = COLORS["audio"] if lit else "#f2f2f2"
    box = f'<rect x="{x:g}" y="{y}" width="{width:g}" height="30" rx="4" fill="{fill}" '
    return box + f'stroke="{INK}"/>' + _text(x + width / 2, y + 19, name)


def _square(x: float, y: float, name: str) -> str:
    square = f'<rect x="{x:g}" y="{y:g}" width="30" height="30" fill="#f2f2f2" stroke="{PALE}"/>'
    return square + _text(x + 15, y + 19, name)


def _frame(x: float, y: float, width: float, height: float) -> str:
    corner = f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" '
    return corner + f'fill="none" stroke="{INK}" stroke-width="2"/>'


def _text(x: float, y: float, text: str, size: int = 12) -> str:
    style = f'font-size="{size}" text-anchor="middle" fill="{INK}"'
    return f'<text x="{x:g}" y="{y}" {style}>{escape(text)}</text>'


def _sheet(x: float, y: float, side: float, fill: str) -> str:
    """A square with a thin border."""
    square = f'<rect x="{x:g}" y="{y:g}" width="{side:g}" height="{side:g}" '
    return square + f'fill="{fill}" stroke="{INK}" stroke-width="0.6"/>'


def _line(x1: float, y1: float, x2: float, y2: float, color: str = INK) -> str:
    ends = f'x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}"'
    return f'<line {ends} stroke="{color}"/>'
