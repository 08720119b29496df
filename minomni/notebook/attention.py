"""Attention in the notebooks: a trained Thinker's weights, and figures of them and of rotations.

matplotlib is imported where it is used, so importing this file is cheap.
"""

from collections.abc import Mapping, Sequence
from math import cos, degrees, sin
from typing import TYPE_CHECKING
from unittest.mock import patch

import torch
from torch import Tensor

from minomni import decoder
from minomni.data.examples import with_ids
from minomni.inputs.prompt import Inputs
from minomni.inputs.tokenizer import Tokenizer
from minomni.layers import attention_with_weights
from minomni.notebook.viz import COLORS, INK, PALE, axes, draw_image, legend

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from PIL.Image import Image

    from minomni.thinker.audio_encoder import AudioAttention
    from minomni.thinker.thinker import Thinker

YELLOW = (1.0, 0.75, 0.0)
LEAST = 0.01  # share of the largest weight below which a weight is not drawn
FAINTEST = 0.15  # opacity of the least that is drawn


def watch(thinker: "Thinker", inputs: Inputs, said: list[int]) -> Tensor:
    """Attention weights [layers, heads, L, L] while one prompt and its answer `said` are read."""
    tables = []

    def attend(*arguments):
        out, weights = attention_with_weights(*arguments)
        tables.append(weights[0])
        return out

    ids = torch.cat([inputs.input_ids, torch.tensor([said])], 1)
    with patch.object(decoder, "attention", attend), torch.no_grad():
        thinker.prefill(with_ids(inputs, ids))
    return torch.stack(tables)


def projected(x: Tensor, part: "AudioAttention") -> list[tuple[Tensor, Tensor, Tensor]]:
    """Queries, keys and values [T, d] of each head of the audio encoder's attention.

    x [T, D]; part: its module. A head owns d rows of each of the three matrices; the keys have no
    bias.
    """
    size = x.shape[1] // part.heads
    q = x @ part.q_proj.weight.T + part.q_proj.bias
    k = x @ part.k_proj.weight.T
    v = x @ part.v_proj.weight.T + part.v_proj.bias
    return list(zip(q.split(size, 1), k.split(size, 1), v.split(size, 1), strict=True))


def rotated(ax: "Axes", q_angle: float, k_angle: float, title: str = "") -> None:
    """One pair of numbers of a query and one of a key, at angles in radians.

    The angle between them is marked; the dotted line is angle 0.
    """
    from matplotlib.patches import Arc, Circle

    ax.add_patch(Circle((0, 0), 1, fill=False, edgecolor=PALE))
    ax.plot((0, 1), (0, 0), ":", color=COLORS["text"])
    for name, angle, color in (("q", q_angle, COLORS["audio"]), ("k", k_angle, COLORS["video"])):
        end = (cos(angle), sin(angle))
        arrow = {"arrowstyle": "->", "color": color, "linewidth": 2, "shrinkA": 0, "shrinkB": 0}
        ax.annotate("", end, (0, 0), arrowprops=arrow)
        vertical = "center"
        if q_angle == k_angle:
            vertical = "bottom" if name == "q" else "top"
        ax.text(1.15 * end[0], 1.15 * end[1], name, color=color, ha="center", va=vertical)
    ax.add_patch(Arc((0, 0), 0.6, 0.6, theta1=degrees(q_angle), theta2=degrees(k_angle), color=INK))
    middle = (q_angle + k_angle) / 2
    between = f"{degrees(k_angle - q_angle):.0f}°"
    if q_angle == k_angle:
        between = f"{between}\n\n"  # above the arrows
    ax.text(0.52 * cos(middle), 0.52 * sin(middle), between, fontsize=8, ha="center", va="center")
    ax.set(xlim=(-1.3, 1.3), ylim=(-1.3, 1.3), aspect="equal")
    ax.set_title(title, fontsize=9)
    ax.axis("off")


def on_patches(ax: "Axes", image: "Image", weights: Tensor, query: tuple[int, int]) -> None:
    """The weights [rows, columns] with which one patch, marked by a cross, attends to the patches.

    query: its row and column. Yellow over a pale image; less than LEAST is not drawn. Below, the
    scale from 0 to the largest weight.
    """
    pale = image.convert("L").point(lambda level: 170 + level // 3)
    draw_image(ax, pale.convert("RGB"))
    step = image.height / len(weights)
    edges = (-0.5, image.width - 0.5, image.height - 0.5, -0.5)
    ax.imshow(_yellow(weights / weights.max()).numpy(), extent=edges, interpolation="nearest")
    row, column = query
    ax.plot(step * (column + 0.5) - 0.5, step * (row + 0.5) - 0.5, "x", color=INK, markersize=8)

    scale = ax.inset_axes((0.2, -0.12, 0.6, 0.06))
    shares = torch.linspace(0, 1, 100)[None]
    scale.imshow(_yellow(shares).numpy(), extent=(0, 1, 0, 1), aspect="auto")
    scale.set(xticks=(0, 1), xticklabels=("0", f"{weights.max():.2f}"), yticks=[])
    scale.tick_params(labelsize=7, length=0)


def _yellow(shares: Tensor) -> Tensor:
    """Shares [rows, columns] of the largest weight -> yellow of some opacity [rows, columns, 4]."""
    opacity = FAINTEST + (1 - FAINTEST) * shares.sqrt()
    opacity = torch.where(shares >= LEAST, opacity, 0.0)
    color = torch.tensor(YELLOW).expand(*shares.shape, 3)
    return torch.cat([color, opacity[..., None]], 2)


def spoken(thinker: "Thinker", inputs: Inputs, tokenizer: Tokenizer) -> dict[int, str]:
    """The words that the audio encoder reports of one recording: {audio token: word}.

    A token reports the word whose embedding has the largest dot product with it; those that report
    none are left out.
    """
    with torch.no_grad():
        tokens = thinker.audio_tower(inputs.mels)
        reported = (tokens @ thinker.model.embed_tokens.weight.T).argmax(1).tolist()
    silent = thinker.config.tokens.audio
    return {i: tokenizer.decode([t]).strip() for i, t in enumerate(reported) if t != silent}


def word_by_word(
    image: "Image",
    loudness: Tensor,
    spoken: Mapping[int, str],
    looked: Mapping[str, tuple[Tensor, Tensor]],
) -> None:
    """A column for each word of an answer: the attention weights at it on an image and a recording.

    loudness [n]: of each audio token. spoken: as of spoken(). looked: {word: weights on the cells
    [rows, columns] and on the audio tokens [n]}.
    """
    plots = axes(2, len(looked), width=9, height=1.6, height_ratios=(3, 2))
    columns = zip(plots[: len(looked)], plots[len(looked) :], looked.items(), strict=True)
    for above, below, (word, (cells, sound)) in columns:
        on_image_and_sound(above, below, image, cells, loudness, sound)
        above.set_title(word, fontsize=9)
        _label(below, spoken)
    first = plots[len(looked)]
    first.set_ylabel("relative", fontsize=8)
    entries = first.get_legend_handles_labels()
    first.figure.legend(*entries, loc="outside lower right", ncols=2, frameon=False, fontsize=8)


def _label(ax: "Axes", spoken: Mapping[int, str]) -> None:
    """Ticks at the tokens where words begin, the words below them and not over each other."""
    starts = [i for i, word in spoken.items() if spoken.get(i - 1) != word]
    ax.set_xticks(starts, [""] * len(starts))
    below = -3
    for start in starts:
        below = max(start, below + 3)
        name = ax.text(below, -0.06, spoken[start], rotation=90, fontsize=7, ha="center", va="top")
        name.set_transform(ax.get_xaxis_transform())


def on_image_and_sound(
    above: "Axes", below: "Axes", image: "Image", cells: Tensor, loudness: Tensor, sound: Tensor
) -> None:
    """Attention weights of one word, on an image [rows, columns] and on a recording [n].

    Cells with less weight are darker, by its square root; a bar for each audio token stands over
    its loudness [n]. All are relative to their largest value.
    """
    rows, columns = cells.shape
    extent = (0, columns, rows, 0)
    above.imshow(image, extent=extent)
    dark = 0.65 * (1 - (cells / cells.max()).sqrt())
    above.imshow(torch.zeros(rows, columns).numpy(), alpha=dark.numpy(), cmap="gray", extent=extent)
    above.axis("off")
    for name, heights, color in (
        ("loudness", loudness, PALE),
        ("attention weight", sound, COLORS["audio"]),
    ):
        share = (heights / heights.max()).tolist()
        below.bar(range(len(share)), share, color=color, width=1, label=name)
    below.set(xticks=[], yticks=[])
    below.spines["left"].set_visible(False)


def table(ax: "Axes", weights: Tensor, kinds: list[str]) -> None:
    """Attention weights [L, L] of one head, drawn as their square roots; the future is white and
    holds the scale.

    kinds [L]: what viz.modalities() gives, as strips beside the table.
    """
    import matplotlib

    length = len(kinds)
    future = torch.ones(length, length).triu(1).bool()
    cmap = matplotlib.colormaps["magma"].with_extremes(bad="white")
    shown = weights.sqrt().masked_fill(future, float("nan"))
    image = ax.imshow(shown.numpy(), cmap=cmap, vmin=0, vmax=1, interpolation="nearest")
    scale = ax.inset_axes((0.66, 0.74, 0.3, 0.04))
    bar = ax.figure.colorbar(image, cax=scale, orientation="horizontal", ticks=(0, 0.5, 1))
    bar.ax.set_xticklabels(("0", "¼", "1"), fontsize=7)
    bar.outline.set_visible(False)
    colors = [COLORS[kind] for kind in kinds]
    ax.bar(range(length), 3, 1, -5, color=colors)
    ax.barh(range(length), 3, 1, -5, color=colors)
    for kind in ("image", "audio"):
        places = [i for i, k in enumerate(kinds) if k == kind]
        if places:
            middle = sum(places) / len(places)
            ax.text(middle, -6, kind, fontsize=7, ha="center", va="bottom")
            ax.text(-6, middle, kind, fontsize=7, ha="right", va="center", rotation=90)
    ax.set(xlim=(-12, length), ylim=(length, -12), xlabel="key", ylabel="query")
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)


def by_kind(answer: Tensor, equal: Tensor, kinds: list[str], heads: int) -> None:
    """A bar for each head of each layer: its weights, added up by kind of key; the last bar is what
    equal weights would give.

    answer [all heads, L], equal [L]. kinds: of the L tokens. heads: of each layer.
    """
    ax = axes(height=2.4)
    rows = torch.cat([answer, equal[None]])
    places = [*range(len(answer)), len(answer) + 0.5]
    bottom = torch.zeros(len(rows))
    for kind in ("image", "audio", "text", "marker"):
        part = rows[:, [k == kind for k in kinds]].sum(1)
        ax.bar(places, part, bottom=bottom, color=COLORS[kind], width=0.8)
        bottom = bottom + part
    names = [f"{i // heads}.{i % heads}" for i in range(len(answer))]
    ax.set(xticks=places, xticklabels=[*names, "equal"], xlabel="layer.head")
    ax.set(ylabel="attention weight", ylim=(0, 1.25), yticks=(0, 0.5, 1))
    legend(ax, kinds)


def lens(ax: "Axes", words: Sequence[Sequence[str]], sure: Tensor) -> None:
    """The likeliest word of each layer at each token, [layers, L]; strong color is likely.

    sure [layers, L]: their probabilities.
    """
    for depth, line in enumerate(words):
        for i, word in enumerate(line):
            opacity = 0.6 * float(sure[depth, i])
            ax.bar(i, 0.9, 0.94, depth - 0.45, color=COLORS["image"], alpha=opacity)
            ax.text(i, depth, word, ha="center", va="center", fontsize=8)
    depths = range(len(words))
    ax.set(xticks=[], yticks=depths, yticklabels=[f"layer {i}" for i in depths])
    ax.set(xlim=(-0.5, len(words[0]) - 0.5), ylim=(len(words) - 0.5, -0.5))
    ax.set_xlabel("word of the answer")
    scale = ax.inset_axes((1.01, 0, 0.012, 1))
    for step in range(50):
        opacity = 0.6 * step / 49
        scale.bar(0, 0.02, 1, step / 50, color=COLORS["image"], alpha=opacity, linewidth=0)
    scale.set(xlim=(-0.5, 0.5), ylim=(0, 1), xticks=[], yticks=(0, 1))
    scale.yaxis.tick_right()
    scale.set_title("prob.", fontsize=7)
    scale.tick_params(labelsize=7, length=0)
