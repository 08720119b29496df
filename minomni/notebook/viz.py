"""Figures for the notebooks: audio, mels, filters, position ids, and settings side by side with
buttons and sliders. The diagrams are in diagrams.py; notebooks call them by this module, too.

matplotlib and ipywidgets are imported where they are used, so importing this file is cheap.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import product
from math import pi
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minomni.config import INPUT_SAMPLE_RATE, TokenIds
from minomni.inputs.mel import LOG_BANDS, VOICE_BANDS, hz_to_mel
from minomni.notebook.diagrams import (  # noqa: F401
    MAP,
    cell_order,
    flow,
    model_map,
    patch_axes,
    residual,
    shared_heads,
    trellis,
)
from minomni.notebook.svg import INK
from minomni.plot import COLORS, PALE, plain
from minomni.plot import axes as plot_axes
from minomni.plot import mel as plot_bands

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from PIL.Image import Image

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
