"""Figures that only one or two chapters need.

matplotlib is imported where it is used, so importing this file is cheap.
"""

from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minomni.inputs.mel import LOG_BANDS, hz_to_mel
from minomni.notebook.viz import (
    CELL_PIXELS,
    INK,
    axes,
    draw_image,
    hz_axis,
    lattice,
    mel,
    waveform,
)
from minomni.plot import COLORS, PALE, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HARMONICS_SECONDS = 0.4  # of a voice in low_harmonics()
MUON_BOUNDS = (0.68, 1.2)  # of singular values after five iterations
MUON_LEAST = 0.0015  # of the norm: smaller singular values stay below these bounds
LOWEST_VOICE, HIGHEST_VOICE = 60, 400  # Hz, of a fundamental frequency


def fundamental(wave: Tensor, rate: int) -> float:
    """The median fundamental frequency of a voice in Hz. wave [samples], `rate` of them a second.

    The period of a moment is the shift at which the wave is most like itself.
    """
    longest = rate // LOWEST_VOICE  # samples of a period
    pieces = wave.unfold(0, 2 * longest, rate // 100)  # [moments, samples]
    shifts = range(rate // HIGHEST_VOICE, longest)
    likeness = torch.stack(
        [
            F.cosine_similarity(pieces[:, :longest], pieces[:, shift : shift + longest])
            for shift in shifts
        ]
    )  # [shifts, moments]
    # Two periods are as good as one: the shorter shift wins.
    penalty = torch.linspace(0, 0.2, len(shifts))[:, None]
    best = (likeness - penalty).argmax(0)
    voiced = likeness.amax(0) > 0.7
    period = shifts[0] + float(best[voiced].float().median())
    return rate / period


def low_harmonics(ax: "Axes", wave: Tensor, rate: int, name: str) -> None:
    """The beginning of a voice from 0 to 1,000 Hz, with its fundamental frequency as a line."""
    wave = wave[: int(HARMONICS_SECONDS * rate)]
    size = rate // 16  # 62.5 ms: long enough to separate harmonics
    window = torch.hann_window(size)
    spectrum = torch.stft(wave, size, rate // 200, window=window, return_complex=True).abs()
    top = 1000 * size // rate  # bins below 1,000 Hz
    decibels = 20 * (spectrum[:top] / spectrum.max()).clamp_min(1e-4).log10()
    ax.imshow(
        decibels,
        origin="lower",
        aspect="auto",
        cmap="magma",
        vmin=-50,
        vmax=0,
        extent=(0, HARMONICS_SECONDS, 0, 1000),
    )
    hz = fundamental(wave, rate)
    ax.axhline(hz, color="white", linestyle="--", linewidth=1)
    ax.set(xlabel="seconds", ylabel="Hz", title=f"{name}, {hz:.0f} Hz")


def four_rates(words: Sequence[str], codes: Tensor, bands: Tensor, wave: Tensor, rate: int) -> None:
    """An answer as words, codes [n], a mel [C, 4 n] and a waveform [samples], over one time axis.

    words: what the Talker reads, one at each step; the last one stands for all that follow.
    """
    step = len(wave) / rate / len(codes)  # seconds of a code
    ratios = (0.65, 0.5, 1.3, 1.3)
    top, middle, lower, bottom = axes(4, 1, height=1.1, sharex=True, height_ratios=ratios)
    for i, word in enumerate(words[:-1]):
        place = (step * (i + 0.4), 0.05)
        top.text(*place, word, fontsize=8, rotation=65, rotation_mode="anchor")
    top.text(step * (len(words) + 0.3), 0.05, words[-1], fontsize=8)
    top.set(ylabel="text", yticks=[])
    middle.imshow(
        7 * codes[None] % 20,
        cmap="Purples",
        vmin=-4,
        aspect="auto",
        interpolation="nearest",
        extent=(0, step * len(codes), 0, 1),
    )
    middle.set(ylabel="code", yticks=[])
    mel(lower, bands, bar=False)
    lower.set(xlabel="")
    waveform(bottom, wave, rate)


Place = tuple[float, float]  # seconds and Hz


def point_out(ax: "Axes", places: dict[str, Place | list[Place]]) -> None:
    """Arrows from names above a log-mel spectrogram to places in it.

    A list of places is joined by a line, at whose last place the arrow ends: two places are the
    ends of a bracket, more are the points of a dotted curve.
    """
    from matplotlib import patheffects

    # A dark edge shows white lines on bright places.
    edge = [patheffects.withStroke(linewidth=3.4, foreground=INK)]
    highest = hz_to_mel(torch.tensor(8000.0))
    for name, given in places.items():
        path = given if isinstance(given, list) else [given]
        seconds = [second for second, _ in path]
        mels = hz_to_mel(torch.tensor([float(hz) for _, hz in path]))
        bands = (mels / highest * (LOG_BANDS + 1) - 0.5).tolist()
        look = {"linestyle": ":"} if path[2:] else {"marker": "_", "markersize": 7 * len(path[1:])}
        ax.plot(seconds, bands, color="white", linewidth=1.4, path_effects=edge, **look)
        arrow = {"arrowstyle": "->", "color": "white", "linewidth": 1.4, "path_effects": edge}
        ax.annotate(
            name,
            (seconds[-1], bands[-1]),
            (seconds[-1], LOG_BANDS + 6),
            ha="center",
            fontsize=8,
            color=INK,
            arrowprops=arrow,
            annotation_clip=False,
        )


def leakage(spectra: Mapping[str, Tensor], peak: int, beyond: Sequence[int]) -> None:
    """Spectra [bins] in dB, with a line at each number of bins beyond the peak."""
    ax = axes(width=7, height=2.4)
    for (name, decibels), kind in zip(spectra.items(), ("text", "audio"), strict=True):
        ax.plot(decibels, color=COLORS[kind], label=name)
    for far in beyond:
        ax.axvline(peak + far, color=PALE, zorder=0)
        ax.text(peak + far, -118, f" +{far}", fontsize=8)
    ax.set(xlabel="bin", ylabel="dB relative to the peak", xlim=(0, 100), ylim=(-120, 5))
    ax.set_title("20.5 cycles in 400 samples", fontsize=9)
    ax.legend(frameon=False, fontsize=8)


def spectrogram(ax: "Axes", power: Tensor, title: str, **options: Any) -> None:
    """Bins from 0 to 8,000 Hz [bins, F], all of one width."""
    mel(ax, power, title, bar=False, **options)
    ticks = torch.linspace(0, len(power), 5)
    ax.set(ylabel="Hz", yticks=ticks, yticklabels=[f"{hz:,}" for hz in range(0, 8001, 2000)])


def dot_products(sound: Tensor, waves: dict[str, Tensor]) -> None:
    """A line of plots for each wave: the sound, the wave, their products and the sum of these.

    sound and each wave [samples].
    """
    plots = axes(len(waves), 3, height=1.4, sharex=True, sharey=True)
    for row, (name, wave) in enumerate(waves.items()):
        product = sound * wave
        total = round(float(product.sum()))
        columns = {"the sound": sound, name: wave, f"product, sum {total}": product}
        for column, (title, values) in enumerate(columns.items()):
            ax = plots[3 * row + column]
            color = COLORS["audio"] if column < 2 else INK
            ax.bar(range(len(values)), values, width=0.5, color=color)
            ax.axhline(0, color=PALE, linewidth=0.8, zorder=0)
            ax.set_title(title, fontsize=9)
            ax.set(ylim=(-1.2, 1.2), yticks=(-1, 0, 1))
    for ax in plots[-3:]:
        ax.set_xlabel("sample")


def words_over_time(bands: Tensor, probabilities: Tensor, words: Sequence[str]) -> None:
    """A mel [C, F] above the probability of each word at each token [tokens, words]."""
    ratios = (1, 0.2 + 0.12 * len(words))
    above, ax = axes(2, 1, height=0.7 + 0.12 * len(words), sharex=True, height_ratios=ratios)
    mel(above, bands, bar=False)
    above.set(xlabel="")
    extent = (0, 0.04 * len(probabilities), len(words) - 0.5, -0.5)
    ax.imshow(probabilities.T, aspect="auto", cmap="Greys", vmin=0, vmax=1, extent=extent)
    ax.set(yticks=range(len(words)), yticklabels=words, xlabel="seconds")
    ax.set_title("what each token says (black = probability 1)", fontsize=9)


def filter_step(
    frames: Tensor, weight: Tensor, bias: float, marked: tuple[float, float] | None = None
) -> None:
    """One number of a convolution: frames [bands, 3], a filter [bands, 3], their product.

    marked: two frequencies in Hz, drawn as dotted lines.
    """
    product = frames * weight
    total = float(product.sum())
    images = {
        "three frames": (frames, "magma", None),
        "times a filter": (weight, "RdBu_r", float(weight.abs().max())),
        "product": (product, "RdBu_r", float(product.abs().max())),
    }
    plots = axes(1, 4, width=7.5, height=2.6, width_ratios=(2, 2, 2, 2))
    for ax, (title, (values, colors, limit)) in zip(plots[:3], images.items(), strict=True):
        low = None if limit is None else -limit
        ax.imshow(
            values,
            cmap=colors,
            vmin=low,
            vmax=limit,
            aspect="auto",
            origin="lower",
            interpolation="nearest",
        )
        ax.set(xticks=(0, 1, 2), xticklabels=("left", "itself", "right"))
        hz_axis(ax, len(values))
        ax.set_title(title if limit is None else f"{title}\n(red > 0 > blue)", fontsize=9)
        for hz in marked or ():
            band = hz_to_mel(torch.tensor(hz)) / hz_to_mel(torch.tensor(8000.0)) * (len(values) + 1)
            color = "white" if limit is None else INK
            ax.axhline(float(band) - 1, color=color, linestyle=":", linewidth=1.2)
    for ax in plots[1:3]:
        ax.set(ylabel="", yticklabels=[])
    plots[3].axis("off")
    lines = f"sum of the product\n{total:+.2f}\n\nbias\n{bias:+.2f}\n\noutput\n{total + bias:+.2f}"
    plots[3].text(0.5, 0.5, lines, ha="center", va="center", fontsize=10, color=INK)


def attention_blocks(
    ax: "Axes",
    weights: Tensor,
    lengths: Sequence[int],
    words: dict[float, str],
    high: float,
    title: str,
) -> None:
    """Attention weights [T, T] of steps of 20 ms in blocks of `lengths`; masked pairs are gray.

    words: the second at which each begins; they label queries and keys. high: the weight at the end
    of the color map.
    """
    block = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    allowed = block[:, None] == block
    ax.set_facecolor(PALE)
    seconds = 0.02 * len(weights)
    ax.imshow(
        weights.where(allowed, torch.nan),
        cmap="magma",
        vmin=0,
        vmax=high,
        extent=(0, seconds, seconds, 0),
        interpolation="nearest",
    )
    ax.set_xticks(list(words), list(words.values()), rotation=90, fontsize=6)
    ax.set_yticks(list(words), list(words.values()), fontsize=6)
    ax.set_xlabel("key", fontsize=8)
    ax.set_ylabel("query", fontsize=8)
    ax.set_title(title, fontsize=9)


def positions(vectors: Tensor, chosen: int) -> None:
    """Position embeddings [positions, size], and the dot products of a chosen one with all."""
    left, right = axes(1, 2, height=2.5)
    image = left.imshow(
        vectors.T, aspect="auto", cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest"
    )
    left.figure.colorbar(image, ax=left, ticks=(-1, 0, 1))
    left.figure.get_layout_engine().set(wspace=0.1)
    left.set(xlabel="step", ylabel="component", title="sines above, cosines below")
    right.plot(vectors @ vectors[chosen], color=COLORS["audio"])
    right.set(xlabel="step", ylabel=f"P · P{chosen}", ylim=(0, None))
    right.set_title(f"dot product with step {chosen}")


def reached(ax: "Axes", moved: Tensor, seconds: float, about: str) -> None:
    """Which tokens changed with which frame of a clip: moved [frames, tokens], black where true."""
    ax.imshow(
        moved.T,
        cmap="Greys",
        vmin=0,
        vmax=1,
        aspect="auto",
        origin="lower",
        extent=(0, seconds, 0, seconds),
        interpolation="nearest",
    )
    ax.set(xlabel=f"changed frame, s\n\n{about}", ylabel="token, s")


def changes(gaps: Mapping[str, Tensor], names: Sequence[str]) -> None:
    """How much each of some places changed, a plot for each tensor [places], on one log axis.

    names: what the places are. Less than 1e-6 is drawn at 1e-6.
    """
    plots = axes(1, len(gaps), height=2.3, sharey=True)
    for ax, (title, gap), name in zip(plots, gaps.items(), names, strict=True):
        ax.plot(gap.clamp_min(1e-6), ".", color=COLORS["audio"], markersize=4)
        ax.set(xlabel=name, title=title, yscale="log", ylim=(5e-7, 50))
    plots[0].set(ylabel="largest difference", yticks=(1e-6, 1e-4, 1e-2, 1))
    plots[0].set_yticklabels(("≤ 1e-6", "1e-4", "1e-2", "1"))


def photograph() -> Any:
    """A photograph of a place, by scikit-learn: an RGB image of PIL."""
    from PIL import Image
    from sklearn.datasets import load_sample_image

    return Image.fromarray(load_sample_image("china.jpg"))


def pieces(image: Any, line: int = 50) -> None:
    """An image as the sequence of its cells, `line` of them in a line, with white between them."""
    rows, columns = round(image.height / CELL_PIXELS), round(image.width / CELL_PIXELS)
    resized = image.resize((CELL_PIXELS * columns, CELL_PIXELS * rows))
    pixels = torch.frombuffer(bytearray(resized.tobytes()), dtype=torch.uint8)
    cells = pixels.view(rows, CELL_PIXELS, columns, CELL_PIXELS, 3).transpose(1, 2).flatten(0, 1)
    white = 255
    cells = F.pad(cells, (0, 0, 0, 6, 0, 6, 0, -len(cells) % line), value=white)
    lines = cells.unflatten(0, (-1, line)).transpose(1, 2)  # [lines, height, line, width, 3]
    ax = axes(width=11, height=1.9)
    ax.imshow(lines.flatten(2, 3).flatten(0, 1))
    ax.axis("off")


def budget(ax: "Axes", image: Any, size: tuple[int, int], tokens: int) -> None:
    """An image resized to `size` (height and width), drawn in its old shape, with its cells."""
    from PIL import Image

    height, width = size
    small = image.resize((width, height), Image.Resampling.BICUBIC)
    draw_image(ax, small, title=f"budget {tokens}")
    ax.set_aspect(image.height / image.width * width / height)
    lattice(ax, height, width, CELL_PIXELS, linewidth=0.6 if tokens < 100 else 0.2)
    used = height * width // CELL_PIXELS**2
    about = f"{height} x {width} pixels, {used} tokens"
    ax.text(0, -0.03, about, fontsize=8, va="top", transform=ax.transAxes)


def zoom(whole: "Axes", part: "Axes", image: Any, corner: tuple[int, int], cell: int) -> None:
    """One cell of an image beside it, with its four patches numbered. corner: its top and left."""
    from matplotlib.patches import Rectangle

    top, left = corner
    whole.add_patch(
        Rectangle((left - 0.5, top - 0.5), cell, cell, fill=False, color="gold", linewidth=2.5)
    )
    draw_image(part, image.crop((left, top, left + cell, top + cell)), "one cell = one token")
    half = cell // 2
    lattice(part, cell, cell, half, "gold", 1.5)
    for number in range(4):
        row, column = divmod(number, 2)
        part.text(
            half * column + 1,
            half * row + 1,
            f"patch {number}",
            fontsize=7,
            va="top",
            color="black",
            bbox={"facecolor": "gold", "edgecolor": "none", "pad": 1},
        )


def walk(ax: "Axes", image: Any, places: Tensor, title: str) -> None:
    """A line through the patches of 14 pixels of an image in some order; the first four are
    numbered.

    image: of PIL, drawn dark. places [patches, 2]: row and column of each patch.
    """
    dark = image.convert("L").point(lambda value: value // 2).convert("RGB")
    draw_image(ax, dark, title)
    lattice(ax, image.height, image.width, 14, linewidth=0.4)
    lattice(ax, image.height, image.width, 28, linewidth=1.4)
    x = (14 * places[:, 1] + 7).tolist()
    y = (14 * places[:, 0] + 7).tolist()
    ax.plot(x, y, color="gold", linewidth=1.6, marker="o", markersize=3)
    ax.plot(x[0], y[0], color="white", marker="o", markersize=7)
    for number in range(4):
        ax.text(x[number] - 2, y[number] - 2, str(number), color="white", fontsize=8, ha="right")


def over_offsets(score: Tensor, apart: Tensor, rows: Sequence[int]) -> None:
    """A score [n, n] by how far two patches lie apart, and some of its rows as lines.

    apart [n]: the offsets of both directions, in patches. rows: the offsets of the lines.
    """
    left, right = axes(1, 2, width=8, height=2.9)
    edges = (float(apart[0]) - 0.5, float(apart[-1]) + 0.5)
    shown = left.imshow(score, extent=(*edges, *reversed(edges)), cmap="viridis", vmin=0.5, vmax=1)
    left.figure.colorbar(shown, ax=left, label="score / highest")
    left.set(xlabel="columns apart", ylabel="rows apart", title="all offsets")
    for down in rows:
        line = score[int((apart == down).nonzero())]
        right.plot(apart, line, label=f"{down} rows apart")
    right.set(xlabel="columns apart", ylabel="score / highest", ylim=(0.5, 1.05))
    right.set_title("three rows of the left plot")
    right.legend(frameon=False, fontsize=8)


def costs(sides: Tensor, multiplications: Mapping[str, Tensor], crossing: float) -> None:
    """Multiplications of the vision encoder by the side of a square image, in pixels.

    The names begin with attention without windows, then with them; a dotted line stands at the
    side `crossing`.
    """
    ax = axes(width=7, height=2.9)
    looks = ((COLORS["audio"], "--"), (COLORS["audio"], "-"), (COLORS["text"], "-"))
    for (name, numbers), (color, style) in zip(multiplications.items(), looks, strict=True):
        ax.loglog(sides, numbers, style, color=color, label=name)
    ax.axvline(crossing, color=INK, linestyle=":")
    ax.minorticks_off()
    marks = [112 * 2**i for i in range(6)]
    ax.set(xlabel="side of a square image, pixels", ylabel="multiplications")
    ax.set_xticks(marks, [str(mark) for mark in marks])
    ax.legend(frameon=False, fontsize=8)


def over_seeds(values: Mapping[str, Tensor], label: str) -> None:
    """A line for each name: a dot for each seed, their mean, and their standard deviation as a bar.

    values: of each name [seeds]. label: what they are, with its unit.
    """
    ax = axes(width=7, height=0.35 * len(values) + 0.8)
    for row, seeds in enumerate(values.values()):
        ax.plot(seeds, [row] * len(seeds), "o", color=COLORS["audio"], alpha=0.5)
        mean, deviation = float(seeds.mean()), float(seeds.std())
        ax.errorbar(mean, row - 0.25, xerr=deviation, fmt="o", color=INK, capsize=3, markersize=4)
    ax.set(yticks=range(len(values)), yticklabels=list(values), xlabel=label)
    ax.set_ylim(len(values) - 0.5, -0.6)


def timeline(
    ax: "Axes",
    times: Mapping[str, Sequence[float]],
    arrivals: Sequence[float],
    lengths: Sequence[float],
) -> float:
    """The outputs of each step as marks, and the chunks of audio as they are played, in ms.

    times: of each step the seconds of its outputs. arrivals, lengths: of each chunk, in seconds.
    Returns the second at which a player that starts at once has played all of them.
    """
    steps = ("prefill", "text", "code", "mel", "audio")
    for row, step in enumerate(steps):
        marks = [1000 * at for at in times[step]]
        ax.plot(marks, [row] * len(marks), "|", markersize=11, color=COLORS["audio"])
    end = 0.0  # when all chunks before have been played
    for i, (arrival, length) in enumerate(zip(arrivals, lengths, strict=True)):
        begin = max(end, arrival)
        shade = (0.45, 0.75)[i % 2]
        color = COLORS["audio"]
        ax.barh(len(steps), 1000 * length, 0.5, 1000 * begin, color=color, alpha=shade)
        end = begin + length
    first = 1000 * times["audio"][0]
    ax.axvline(first, color=PALE, zorder=0)
    ax.text(first, -0.3, " first audio", fontsize=8, color=COLORS["text"])
    ax.set(yticks=range(len(steps) + 1), yticklabels=(*steps, "played"))
    ax.set(ylim=(len(steps) + 0.5, -0.5), xlabel="ms since the question")
    return end


def made_and_played(
    ax: "Axes", when: Sequence[float], made: Sequence[float], begin: float, length: float
) -> None:
    """Audio that is there and audio that has been played over time; red where a player runs dry.

    when, made: at each second the seconds of audio that are there from then on. begin: when a
    player begins. length: of the whole answer, in seconds.
    """
    ax.step(when, made, color=COLORS["audio"], where="post", label="made")
    ax.plot([begin, begin + length], [0, length], color="gray", label="played")
    at = torch.linspace(begin, begin + length, 400)
    ready = torch.zeros(len(at))
    for second, seconds_made in zip(when, made, strict=True):
        ready[at >= second - 1e-6] = seconds_made
    dry = at - begin > ready
    shade = dict(color="red", alpha=0.3, linewidth=0, label="silence")
    ax.fill_between(at, at - begin, ready, where=dry.tolist(), **shade)  # type: ignore[arg-type]
    ax.set(xlabel="seconds", ylabel="seconds of audio")
    if ax.get_subplotspec().is_first_col():  # type: ignore[union-attr]  # one legend is enough
        ax.legend(frameon=False, fontsize=8, loc="upper left")


def above_and_below(ax: "Axes") -> list["Axes"]:
    """Two plots in the area of one, with one axis for x."""
    ax.axis("off")
    above = plain(ax.inset_axes((0, 0.58, 1, 0.42)))
    below = plain(ax.inset_axes((0, 0, 1, 0.42), sharex=above))
    above.tick_params(labelbottom=False)
    return [above, below]


def gains(ax: "Axes", history: Tensor) -> None:
    """Mean gains of chosen and rejected samples over the steps of a run, and the margins.

    history [steps, 2, pairs]: after each step, what the chosen and the rejected one of each pair
    have gained.
    """
    start = torch.zeros_like(history[:1])
    chosen, rejected = torch.cat([start, history]).unbind(1)
    margins = chosen - rejected
    ax.plot(chosen.mean(1), color=COLORS["image"], label="chosen")
    ax.plot(rejected.mean(1), color=COLORS["audio"], label="rejected")
    ax.plot(margins.mean(1), color=INK, label="margin")
    names = ["margin of each pair"] + ["_"] * (margins.shape[1] - 1)
    ax.plot(margins, color=COLORS["text"], linewidth=0.6, zorder=0, label=names)
    ax.set_xlabel("step")


def letters_above(ax: "Axes", letters: Sequence[str]) -> None:
    """The letter of each code above its bar, and the end token behind them."""
    place = ax.get_xaxis_transform()
    for i, letter in enumerate(letters):
        ax.text(i, 1.0, letter, ha="center", transform=place)
    ax.text(len(letters) - 0.3, 1.0, "end", transform=place)


def polynomial(at: Tensor, once: Tensor, five_times: Tensor, before: Tensor, after: Tensor) -> None:
    """Muon's polynomial of singular values `at`, and those of a gradient before and after it."""
    left, right = axes(1, 2, height=2.6)
    for bound in MUON_BOUNDS:
        left.axhline(bound, color=PALE, zorder=0)
    left.semilogx(at, once, label="once", color=COLORS["text"])
    left.semilogx(at, five_times, label="five times", color=COLORS["audio"])
    left.set(xlabel="singular value ÷ norm, before", ylabel="after", ylim=(0, 1.65))
    left.legend(frameon=False, fontsize=8, loc="upper left")
    right.axhline(MUON_LEAST, color=PALE, zorder=0)
    right.semilogy(before, label="gradient", color=COLORS["text"])
    right.semilogy(after, label="update", color=COLORS["audio"])
    right.set(xlabel="number of the singular value", ylabel="singular value ÷ norm")
    right.set_ylim(1e-4, 2)
    right.legend(frameon=False, fontsize=8)


def memory(
    ax: "Axes", names: Sequence[str], weights: int, kept: Sequence[int], logits: Sequence[int]
) -> None:
    """Bytes of weights and of keys and values as a bar for each name, and logits as an outline
    behind it.
    """
    rows = range(len(names))
    end = [(weights + cache) / 1e9 for cache in kept]
    sizes = [size / 1e9 for size in logits]
    ax.barh(rows, weights / 1e9, 0.6, color=COLORS["text"], label="weights")
    left = weights / 1e9
    caches = [cache / 1e9 for cache in kept]
    ax.barh(rows, caches, 0.6, left, color=COLORS["audio"], label="keys, values")
    style: dict[str, Any] = {"facecolor": "none", "edgecolor": COLORS["video"], "linestyle": "--"}
    ax.barh(rows, sizes, 0.6, end, label="all logits, not held", **style)
    for row, total in enumerate(end):
        label = f"{total:.1f} GB"
        ax.text(left - 0.4, row, label, ha="right", va="center", color="white", fontsize=8)
    ax.set(xlim=(0, 92), ylim=(len(names) - 0.5, -0.5), xlabel="GB of 10⁹ bytes")
    ax.set_yticks(rows, names)


def trained_or_frozen(table: Tensor, stages: Sequence[str], parts: Sequence[str]) -> None:
    """Which stage trains which part. table [stages, parts]: 2 trained, 1 used and frozen, 0 not
    used.
    """
    ax = axes(width=8, height=3.8)
    ax.imshow(table, cmap="Greys", vmax=2.4, aspect="auto")
    lattice(ax, len(stages), len(parts), 1, PALE)
    for row, column in table.nonzero().tolist():
        is_trained = table[row, column] == 2
        name = "trained" if is_trained else "frozen"
        color = "white" if is_trained else INK
        ax.text(column, row, name, color=color, fontsize=8, ha="center", va="center")
    ax.set_xticks(range(len(parts)), parts)
    ax.set_yticks(range(len(stages)), stages)


def wrong_codes(letters: Sequence[str], text: str) -> list[int]:
    """The codes whose letter does not fit a text. letters: that of each code, "" for a blank."""
    starts = [i for i, letter in enumerate(letters) if letter and letter != ("", *letters)[i]]
    read = "".join(letters[i] for i in starts)
    blocks = SequenceMatcher(None, read, text, autojunk=False).get_matching_blocks()
    right = {starts[block.a + k] for block in blocks for k in range(block.size)}
    wrong = []
    begin = 0
    for i, letter in enumerate(letters):
        begin = i if i in starts else begin
        if letter and begin not in right:
            wrong.append(i)
    return wrong


def follow(ax: "Axes", weights: Tensor, current: Tensor, names: Sequence[str]) -> None:
    """Attention weights [words, steps], 0 to 1, with a frame around the word of each step.

    current [steps]: the index of that word. names: of the words.
    """
    from matplotlib.patches import Rectangle

    image = ax.imshow(weights, aspect="auto", cmap="magma", vmin=0, vmax=1, interpolation="nearest")
    for word in range(len(names)):
        steps = (current == word).nonzero()[:, 0].tolist()
        if steps:
            corner = (steps[0] - 0.5, word - 0.5)
            width = steps[-1] - steps[0] + 1
            ax.add_patch(Rectangle(corner, width, 1, fill=False, edgecolor="white", linewidth=1))
    ax.set(xlabel="code", yticks=range(len(names)), yticklabels=names)
    ax.figure.colorbar(image, ax=ax, pad=0.02).ax.tick_params(labelsize=7)


def snakes(parameters: Sequence[tuple[float, float]]) -> None:
    """SnakeBeta for each pair of alpha and beta, beside a ReLU."""
    ax = axes(width=6, height=2.4)
    x = torch.linspace(-5, 5, 401)
    ax.plot(x, x.clamp_min(0), color=PALE, linewidth=2, label="ReLU")
    for (alpha, beta), color in zip(parameters, ("audio", "image", "video"), strict=True):
        y = x + (alpha * x).sin().square() / beta
        ax.plot(x, y, color=COLORS[color], linewidth=1.2, label=f"α = {alpha:g}, β = {beta:g}")
    ax.set(xlabel="x", ylabel="SnakeBeta(x)")
    ax.legend(frameon=False, fontsize=8)


def token_boxes(lines: Mapping[str, Sequence[Sequence[str]]]) -> None:
    """A named line for each way to split words into tokens: a box for each token.

    The larger the part of its word that a token is, the darker its box. A space is a dot.
    """
    ax = axes(height=0.45 * len(lines))
    for y, words in enumerate(lines.values()):
        x = 0.0
        for tokens in words:
            letters = sum(map(len, tokens))
            for token in tokens:
                shade = 0.1 + 0.5 * len(token) / letters
                ax.barh(y, len(token) - 0.1, 0.8, x, color=COLORS["text"], alpha=shade)
                middle = x + len(token) / 2 - 0.05
                text = token.replace(" ", "·")
                ax.text(middle, y, text, ha="center", va="center", family="monospace")
                x += len(token)
            x += 0.5  # between words
    ax.set(yticks=range(len(lines)), yticklabels=lines, xticks=[])
    ax.invert_yaxis()
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
