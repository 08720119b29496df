"""Plots that training, evaluation and the notebooks share: axes, colors and mels.

matplotlib is imported where it is used, so importing this file is cheap.
"""

from typing import TYPE_CHECKING, Any

from torch import Tensor

from minomni.config import MEL_RATE

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes

PALE = "#d9d9d9"
COLORS = {
    "text": "#8c8c8c",
    "marker": "#c8c8c8",
    "audio": "#e08214",
    "image": "#1b7837",
    "video": "#4575b4",
}


def axes(
    rows: int = 1, columns: int = 1, width: float = 9.0, height: float = 2.2, **options: Any
) -> Any:
    """A figure of rows x columns plots, each `height` inches high.

    Returns the plot if there is one, or the list of them row by row.
    """
    import matplotlib.pyplot as plt

    size = (width, height * rows)
    _, grid = plt.subplots(
        rows, columns, figsize=size, layout="constrained", squeeze=False, **options
    )
    plots = [plain(ax) for ax in grid.flat]
    return plots[0] if len(plots) == 1 else plots


def plain(ax: "Axes") -> "Axes":
    """Remove the upper and right border of a plot."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=8)
    return ax


def mel(
    ax: "Axes",
    bands: "Tensor | np.ndarray",
    title: str = "",
    low: float | None = None,
    high: float | None = None,
    bar: bool = True,
    cmap: str = "magma",
) -> None:
    """A mel or any other image of bands over frames. bands [C, F], one frame every 10 ms.

    Low bands are at the bottom. low, high: the values at the ends of the color map `cmap`. bar: add
    a color bar.
    """
    seconds = bands.shape[1] / MEL_RATE
    image = ax.imshow(
        bands,
        origin="lower",
        aspect="auto",
        cmap=cmap,
        vmin=low,
        vmax=high,
        extent=(0, seconds, 0, bands.shape[0]),
        interpolation="nearest",
    )
    ax.set(xlabel="seconds", ylabel="band", title=title)
    if bar:
        ax.figure.colorbar(image, ax=ax, pad=0.01).ax.tick_params(labelsize=8)
