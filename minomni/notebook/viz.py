"""Pictures for the notebooks: sound, mels, filters, position ids, and settings side by side or
under a slider.

matplotlib and ipywidgets are imported where they are used, so that importing this file costs
nothing.
"""

from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor

from minomni.config import LISTENING_RATE, MEL_RATE, TokenIds

INK, PALE = "#222222", "#d9d9d9"
COLORS = {
    "text": "#8c8c8c",
    "marker": "#c8c8c8",
    "audio": "#e08214",
    "image": "#1b7837",
    "video": "#4575b4",
}
AXES = ("time", "height", "width")
ROOM_FOR_NUMBERS = 40  # tokens in a row whose ids can still be read


def axes(rows: int = 1, columns: int = 1, width: float = 9.0, height: float = 2.2, **options):
    """A figure of rows x columns plots, each `height` inches high -> one plot, or the list of them
    row by row.
    """
    import matplotlib.pyplot as plt

    size = (width, height * rows)
    _, grid = plt.subplots(
        rows, columns, figsize=size, layout="constrained", squeeze=False, **options
    )
    plots = [plain(ax) for ax in grid.flat]
    return plots[0] if len(plots) == 1 else plots


def plain(ax):
    """Take away the frame that says nothing."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=8)
    return ax


def waveform(ax, wave: Tensor, rate: int = LISTENING_RATE, title: str = "") -> None:
    """Air pressure over time. wave [samples]."""
    ax.plot(torch.arange(len(wave)) / rate, wave, color=COLORS["audio"], linewidth=0.6)
    ax.set(xlabel="seconds", ylabel="pressure", title=title, xlim=(0, len(wave) / rate))


def mel(
    ax,
    bands: Tensor,
    title: str = "",
    low: float | None = None,
    high: float | None = None,
    bar: bool = True,
):
    """A mel or any other picture of bands over frames. bands [C, F], one frame every 10 ms, low
    bands at the bottom.
    """
    seconds = bands.shape[1] / MEL_RATE
    picture = ax.imshow(
        bands,
        origin="lower",
        aspect="auto",
        cmap="magma",
        vmin=low,
        vmax=high,
        extent=(0, seconds, 0, bands.shape[0]),
        interpolation="nearest",
    )
    ax.set(xlabel="seconds", ylabel="band", title=title)
    if bar:
        ax.figure.colorbar(picture, ax=ax, pad=0.01).ax.tick_params(labelsize=8)


def filters(
    ax, bank: Tensor, top: float = LISTENING_RATE / 2, every: int = 1, title: str = ""
) -> None:
    """A filter bank [bands, bins] over 0 .. top Hz, each `every`-th filter drawn."""
    import matplotlib

    hz, colors = torch.linspace(0, top, bank.shape[1]), matplotlib.colormaps["viridis"]
    for band in range(0, bank.shape[0], every):
        heard = bank[band].nonzero().flatten()
        feet = slice(
            max(int(heard[0]) - 1, 0), int(heard[-1]) + 2
        )  # the triangle with the zero on either side
        ax.plot(hz[feet], bank[band, feet], color=colors(0.9 * band / bank.shape[0]), linewidth=0.9)
    ax.set(xlabel="Hz", ylabel="weight", title=title, xlim=(0, top), ylim=(0, None))


def picture(ax, pixels, title: str = "") -> None:
    """A picture without axes: a PIL image, or [height, width, 3] of bytes or of 0 .. 1. Its pixels
    are squares.
    """
    shown, room = ax.imshow(pixels), ax.get_window_extent()
    height, width = shown.get_size()
    if min(room.height / height, room.width / width) > 1:
        shown.set_interpolation(
            "nearest"
        )  # matplotlib would smooth it, and show less of what a model is given
    ax.axis("off")
    ax.set_title(title, fontsize=9)


def lattice(
    ax, height: int, width: int, step: int, color: str = "white", linewidth: float = 0.8
) -> None:
    """Lines between the squares of `step` pixels in a picture of height x width pixels."""
    edge = -0.5  # where imshow lets the first pixel begin
    ax.hlines(
        torch.arange(step, height, step) + edge, edge, width + edge, color, linewidth=linewidth
    )
    ax.vlines(
        torch.arange(step, width, step) + edge, edge, height + edge, color, linewidth=linewidth
    )


def tint(ax, chosen: Tensor, step: int) -> None:
    """Darken some squares of `step` pixels of a picture: chosen [rows, columns] says which."""
    height, width = step * chosen.shape[0], step * chosen.shape[1]
    shade = torch.zeros(*chosen.shape, 4)  # black that cannot be seen
    shade[..., 3] = 0.3 * chosen
    ax.imshow(
        shade.numpy(), interpolation="nearest", extent=(-0.5, width - 0.5, height - 0.5, -0.5)
    )


def modalities(ids: list[int], tokens: TokenIds) -> list[str]:
    """The kind of every token of a row, for its colour: text, marker, audio, image or video."""
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


def legend(ax, kinds: list[str]) -> None:
    """Name the colours that occur, above the plot."""
    from matplotlib.patches import Patch

    present = [Patch(color=color, label=kind) for kind, color in COLORS.items() if kind in kinds]
    ax.legend(
        handles=present,
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
    """Position ids [3, L] of one row: as numbered cells if they can be read, as one plot for each
    axis if not.
    """
    (_cells if ids.shape[1] <= ROOM_FOR_NUMBERS else _tracks)(ids, kinds, title)


def _cells(ids: Tensor, kinds: list[str], title: str) -> None:
    ax = axes(width=max(4.0, 0.36 * ids.shape[1] + 1), height=1.7)
    for row, column in product(range(3), range(ids.shape[1])):
        ax.add_patch(_rectangle(column, 2 - row, COLORS[kinds[column]]))
        ax.text(
            column, 2 - row, int(ids[row, column]), ha="center", va="center", fontsize=8, color=INK
        )
    ax.set(
        xlim=(-0.6, ids.shape[1] - 0.4),
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
    plots = axes(3, 1, height=1.5, sharex=True)
    for ax, name, row in zip(plots, AXES, ids):
        ax.scatter(range(ids.shape[1]), row, c=[COLORS[kind] for kind in kinds], s=7)
        ax.set_ylabel(name, fontsize=9)
        ax.grid(color=PALE, linewidth=0.5)
        ax.set_axisbelow(True)
    plots[0].set_title(title, loc="left", fontsize=9)
    plots[-1].set_xlabel("token", fontsize=9)
    legend(plots[0], kinds)


def squares(ax, lines: dict[str, list[str]]) -> None:
    """Tokens as squares coloured by kind: for each label a line of kinds, the first one on top."""
    longest = max(map(len, lines.values()))
    width = (
        0.84 if ax.get_window_extent().width / longest > 8 else 1.0
    )  # in pixels: smaller gaps would flicker
    for y, kinds in enumerate(lines.values()):
        ax.bar(
            range(len(kinds)),
            0.8,
            width=width,
            bottom=y - 0.4,
            color=[COLORS[kind] for kind in kinds],
        )
    ax.set(
        xlim=(-0.6, longest - 0.4),
        ylim=(len(lines) - 0.5, -0.5),
        yticks=range(len(lines)),
        yticklabels=list(lines),
    )
    ax.spines[:].set_visible(False)
    ax.tick_params(axis="y", length=0)


def split(ax, *heights: float) -> list:
    """Plots one above the other in the place of one, of these shares of its height; its title stays
    above them all.
    """
    ax.axis("off")
    tops = [1 - sum(heights[:i]) / sum(heights) for i in range(len(heights) + 1)]
    return [
        plain(ax.inset_axes((0, low, 1, 0.94 * (top - low)))) for top, low in zip(tops, tops[1:])
    ]


def angles(ax, cosines: Tensor, section: tuple[int, int, int]) -> None:
    """How TMRoPE turns each token: cosines [L, pairs], white not at all, black half round; split by
    axis.
    """
    ax.imshow(cosines.T, aspect="auto", cmap="Greys_r", vmin=-1, vmax=1, interpolation="nearest")
    borders = torch.tensor((0, *section)).cumsum(0)
    ax.hlines(borders[1:-1] - 0.5, -0.5, len(cosines) - 0.5, color=COLORS["audio"], linewidth=0.8)
    ax.set(yticks=(borders[:-1] + borders[1:] - 1) / 2, yticklabels=AXES, xlabel="token")
    ax.tick_params(axis="y", length=0)


def explore(draw: Callable, size: float = 2.6, **ranges) -> None:
    """Show draw(ax, **settings) at every setting: a strip of pictures always, and sliders where
    somebody can drag them.

    ranges: for each setting its values. The strip goes along the first range, with the others at
    their middle value, which stands above it. A title that draw sets is kept. size: height of a
    picture in inches.
    """
    (first, values), *rest = ranges.items()
    middle = {name: options[len(options) // 2] for name, options in rest}
    plots = axes(
        1, len(values), width=min(9.0, 3.0 * len(values)), height=size + 0.2 * bool(middle)
    )
    plots = plots if len(values) > 1 else [plots]
    for ax, value in zip(plots, values):
        draw(ax, **{first: value}, **middle)
        ax.set_title(ax.get_title() or f"{first} = {value}", fontsize=9)
        if ax is not plots[0] and ax.get_ylabel() == plots[0].get_ylabel():
            ax.set_ylabel("")  # said once, and the room goes to the pictures
    if middle:
        fixed = ", ".join(f"{name} = {value}" for name, value in middle.items())
        plots[0].figure.suptitle(fixed, x=0.01, ha="left", fontsize=8, color=COLORS["text"])
    if is_interactive():
        _sliders(draw, size, ranges)


def is_interactive() -> bool:
    """Whether a person's front-end asked for this cell: JupyterLab and its like name the cell,
    programs do not.
    """
    try:
        from IPython import get_ipython

        return "cellId" in get_ipython().kernel.get_parent()["metadata"]
    except (ImportError, AttributeError, KeyError):
        return False


def _sliders(draw: Callable, size: float, ranges: dict) -> None:
    import ipywidgets
    import matplotlib.pyplot as plt

    def redraw(**settings):
        draw(axes(width=7, height=1.2 * size), **settings)
        plt.show()

    ipywidgets.interact(
        redraw,
        **{
            name: ipywidgets.SelectionSlider(
                options=list(values),
                value=values[len(values) // 2],
                continuous_update=False,
                layout={"width": "480px"},
            )
            for name, values in ranges.items()
        },
    )
