"""Graders of the exercises: they accept the solution, refuse plausible bugs, and leave untouched
stubs alone.
"""

import ast
import json
import math
import runpy
import sys
from collections import Counter
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from chapters import cells
from exercises import solved, stubs

from minomni.decoder import DecoderLayer
from minomni.notebook.check import Gradient, grade, same, show, solution

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


def marked(row: list[str], who: str, begin: int, end: int) -> list[int]:
    """1 from `begin` tokens after the start of every turn of `who` to `end` tokens behind its
    <|im_end|>.
    """
    marks = [0] * len(row)
    for i in (i for i, token in enumerate(row) if row[i : i + 2] == ["<|im_start|>", who]):
        stop = row.index("<|im_end|>", i) if "<|im_end|>" in row[i:] else len(row) - 1
        marks[i + begin : stop + end] = [1] * len(marks[i + begin : stop + end])
    return marks


def taken(q, k, v, scale: float | None = None, repeat: bool = False) -> torch.Tensor:
    """What each head takes home: q [H, d], k and v [S, H_kv, d] -> [H, d]."""
    group = len(q) // k.shape[1]
    k, v = (x.repeat(1, group, 1) if repeat else x.repeat_interleave(group, 1) for x in (k, v))
    return F.scaled_dot_product_attention(
        q[:, None], k.transpose(0, 1), v.transpose(0, 1), scale=scale
    )[:, 0]


def masks(positions, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which patches attend to each other, in window layers and in whole-frame layers."""
    frame = positions[:, :2]
    window = torch.cat([frame, positions[:, 2:] // side], 1)
    return tuple((keys[:, None] == keys).all(2) for keys in (window, frame))


def rotated(x, rows, columns, slow: bool = False, adjacent: bool = False) -> torch.Tensor:
    """2-D rotary embedding; the switches take other frequencies, or pairs 2j, 2j + 1."""
    d = x.shape[1]
    omega = 1e4 ** (-torch.arange(d // 4) * (2 if slow else 4) / d)
    angles = torch.cat([rows[:, None] * omega, columns[:, None] * omega], 1)
    a, b = (x[:, ::2], x[:, 1::2]) if adjacent else x.chunk(2, 1)
    turned = a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()
    return torch.stack(turned, 2).flatten(1) if adjacent else torch.cat(turned, 1)


def headed(q, k, v, mask, scale: float = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of one head, with the scores divided by `scale`."""
    weights = (q @ k.T / scale).masked_fill(~mask, -math.inf).softmax(1)
    return weights @ v, weights


def sorted_by(x, labels, attend, back=torch.argsort) -> torch.Tensor:
    """attend() for each window; back: the sorted order -> the way back, which can be wrong."""
    order = labels.argsort(stable=True)
    found = [attend(x[labels == label]) for label in labels.unique()]
    return torch.cat(found)[back(order)]


def framed(x, size: int, hop: int, repeat: bool = False, mirror_end: bool = False):
    """Centered frames; the switches repeat sample 0 in the mirror, or mirror the end too."""
    half = size // 2
    before = x[: half + 1 - repeat].flip(0)[: len(x)] if repeat else x[1 : half + 1].flip(0)
    after = x.flip(0) if mirror_end else torch.zeros(2 * size)
    long = F.pad(torch.cat([before, x, after]), (half - len(before), 2 * size))
    return torch.stack([long[f * hop : f * hop + size] for f in range(-(-len(x) // hop))])


def floored(steps, dim) -> torch.Tensor:
    """Scaled log10 power; `dim` says which points share a floor, which can be wrong."""
    return (torch.maximum(steps, steps.amax(dim, keepdim=True) - 8) + 4) / 4


def triangles(edges, hz, largest: bool = False, cut: bool = True):
    """Mel filters of height 1; the switches take the larger slope, or let it fall below zero."""
    low, middle, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    slopes = (hz - low) / (middle - low), (high - hz) / (high - middle)
    both = (torch.maximum if largest else torch.minimum)(*slopes)
    return both.clamp_min(0) if cut else both


def cut(
    schedule,
    total: int,
    look: bool = True,
    rest: bool = True,
    last: bool = True,
    always: bool = False,
) -> list[int]:
    """Where the chunks of a schedule end; each switch leaves out, or overdoes, one thing."""
    ends, done = [], 0
    while True:
        blocks, ahead = schedule[
            min(len(ends), len(schedule) - 1) if last else len(ends) % len(schedule)
        ]
        if done + blocks + ahead * look > total:
            return ends + [total] * (rest and done < total or always)
        done += blocks
        ends.append(done)


def read_as(
    probabilities, letters, stay: bool = True, leap: bool = True, equal: bool = False, ends: int = 2
) -> float:
    """CTC's probability of a text, summed over time; each switch leaves out, or overdoes, one
    thing.
    """
    places = [0, *(c for letter in letters for c in (letter, 0))]
    at = [float(probabilities[0][c]) * (s < 2) for s, c in enumerate(places)]
    for row in probabilities[1:]:
        at = [
            float(row[c])
            * (
                at[s] * stay
                + (at[s - 1] if s else 0)
                + (at[s - 2] if leap and s > 1 and c and (equal or c != places[s - 2]) else 0)
            )
            for s, c in enumerate(places)
        ]
    return sum(at[-ends:])


def spoken(chosen, cost, count: int, ahead: int) -> list:
    """When each code is ready if its line comes with the token that many places behind it."""
    times = [0]
    for i in range(count):
        times.append(max(times[-1], chosen[min(i + ahead, len(chosen) - 1)]) + cost)
    return times[1:]


def rounded(x, levels, squash: bool = True, down: bool = False, digits: bool = False):
    """The values of FSQ; each switch does one thing wrong."""
    top = torch.tensor(levels) - 1
    scaled = ((x.tanh() if squash else x) + 1) / 2 * top
    steps = scaled.floor() if down else scaled.round()
    return steps if digits else steps / top * 2 - 1


def twice_as_fine(x, taps, mode: str = "replicate", first: int = 0) -> torch.Tensor:
    """Upsampling by 2; the padding and the place of the zeros can be wrong."""
    reach = len(taps) // 4
    wide = F.pad(x, (reach, reach), mode=mode)
    pair = [wide, torch.zeros_like(wide)]
    spread = torch.stack(pair[::-1] if first else pair, 2).flatten(1)
    return 2 * spread.unfold(1, len(taps), 1)[:, : 2 * x.shape[1]] @ taps


def header(raw: bytes) -> bytes:
    """The JSON of a safetensors file."""
    return raw[8 : 8 + int.from_bytes(raw[:8], "little")]


def stored(raw: bytes, name: str, start: int | None = None, order: str = "little"):
    """A tensor of a safetensors file; start and order can be wrong."""
    entry = json.loads(header(raw))[name]
    first = 8 + int.from_bytes(raw[:8], order) if start is None else start
    begin, end = entry["data_offsets"]
    dtype = {"F32": torch.float32, "BF16": torch.bfloat16}[entry["dtype"]]
    data = bytearray(raw[first + begin : first + end])
    return torch.frombuffer(data, dtype=dtype).view(entry["shape"])


def counted(config) -> int:
    """The weights of a decoder without embeddings, from the modules themselves."""
    with torch.device("meta"):
        layers = [DecoderLayer(config) for _ in range(config.num_hidden_layers)]
    return sum(p.numel() for layer in layers for p in layer.parameters()) + config.hidden_size


def blocks(frames: int, block: int, back: int, ahead: int) -> torch.Tensor:
    """The mask of the DiT, by a loop over frames."""
    rows = []
    for i in range(frames):
        rows.append([-back <= j // block - i // block <= ahead for j in range(frames)])
    return torch.tensor(rows)


def velocity_error(predict, x1, x0, t, sign: int = 1, clean: bool = False) -> torch.Tensor:
    """The loss of flow matching; each switch does one thing wrong."""
    t_column = t[:, None]
    point = x1 if clean else (1 - t_column) * x0 + t_column * x1
    return F.mse_loss(predict(point, t), sign * (x1 - x0))


def steps_of(velocity, x, grid, late: bool = False, even: bool = False) -> torch.Tensor:
    """Euler's method; each switch does one thing wrong."""
    points = [x]
    for start, end in zip(grid, grid[1:]):
        step = (grid[-1] - grid[0]) / (len(grid) - 1) if even else end - start
        points.append(points[-1] + step * velocity(end if late else start, points[-1]))
    return torch.stack(points)


def half_as_fine(x, taps, left: int = 1, first: int = 0, mode: str = "replicate") -> torch.Tensor:
    """Downsampling by 2; the padding and the results that are kept can be wrong."""
    half = len(taps) // 2
    wide = F.pad(x, (half - left, half - 1 + left), mode=mode)
    return wide.unfold(1, len(taps), 1)[:, first::2] @ taps


def snaked(x, a, b) -> torch.Tensor:
    """SnakeBeta of [C, T] without filters, from logarithms [C]."""
    return x + (a.exp()[:, None] * x).sin() ** 2 / b.exp()[:, None]


def stepped(h, f, scale, shift, gate, one: int = 1) -> torch.Tensor:
    """A half of a DiT layer with adaLN; without the one a scale of 0 would be no scale."""
    return h + gate * f(F.layer_norm(h, h.shape[1:], eps=1e-6) * (one + scale) + shift)


def added(r, end, pad, table, before) -> torch.Tensor:
    """Conditioning vectors plus embeddings of the codes in `before`, one of them per step."""
    column = [*r, end, *[pad] * len(before)]
    return torch.stack([x + table[c] for x, c in zip(column, before)])


def aimed(
    length: int, rows, eos: int, first=1, stops: bool = True, fill: int = -100, last: bool = False
) -> torch.Tensor:
    """Targets of teacher forcing. first: positions between the prompt and step 0; stops: with eos;
    fill: what stands where there is no target; last: padding before the codes.
    """
    longest = max(map(len, rows))
    targets = torch.full((len(rows), length + 2 + longest), fill)
    for target, codes in zip(targets, rows):
        answer = [*codes, eos] if stops else codes
        start = length + 1 + longest - len(codes) if last else length + first
        room = target[start : start + len(answer)]
        room[:] = torch.tensor(answer[: len(room)], dtype=torch.long)
    return targets


def decoded(logits_of, choose, banned, stops, most: int, keep: bool = False) -> list[int]:
    """Codes one by one; keep: the stop id too."""
    codes = []
    while len(codes) < most:
        logits = logits_of(codes).index_fill(0, torch.tensor(banned, dtype=torch.long), -math.inf)
        chosen = int(choose(logits))
        if chosen in stops:
            return codes + [chosen] * keep
        codes.append(chosen)
    return codes


def attended_with_offset(q, k, v, offset: int) -> torch.Tensor:
    """Attention of one head in which query i sees keys 0 .. i + offset."""
    mask = torch.ones(len(q), len(k), dtype=torch.bool).tril(offset)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def windows_of(
    frames: int, block: int, chunk=3, back=2, ahead=1, inside: bool = False, clipped: bool = True
) -> list[tuple[int, ...]]:
    """The sliding windows of an utterance; inside: look at the end of the chunk alone, clipped: let
    no window begin before the first frame.
    """
    spans, done = [], 0
    while done < frames:
        end = done + chunk * block
        seen = end + ahead * block
        if (end if inside else seen) > frames:
            end = seen = frames
        begin = done - back * block
        spans.append((max(0, begin) if clipped else begin, done, end, seen))
        done = end
    return spans


def joined(net, mel, step, reach, hop, left: int = 1, right: int = 1, always: bool = False):
    """A waveform in pieces; left, right: 0 gives no context there, always: cuts off as much at the
    beginning as elsewhere.
    """
    waves = []
    for start in range(0, mel.shape[1], step):
        end = min(start + step, mel.shape[1])
        first = max(0, start - left * reach)
        offset = reach if always else start - first
        wave = net(mel[:, first : end + right * reach])
        waves.append(wave[offset * hop : (offset + end - start) * hop])
    return torch.cat(waves)


def rate_of(step, peak, warmup, steps, first: int = 1, floor: float = 0.05, turns: float = 1):
    """The schedule of the learning rate; each switch changes one thing."""
    if step < warmup:
        return peak * (step + first) / warmup
    progress = turns * (step - warmup) / (steps - warmup)
    return peak * (floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2)


def adamw_step(
    w,
    g,
    m,
    v,
    t,
    rate,
    decay,
    unbiased: bool = True,
    coupled: bool = False,
    root: bool = True,
    decays: bool = True,
):
    """A step of AdamW; each switch does one thing wrong."""
    g = g + decay * w if coupled else g
    m, v = 0.9 * m + 0.1 * g, 0.98 * v + 0.02 * g**2
    mean, square = (m / (1 - 0.9**t), v / (1 - 0.98**t)) if unbiased else (m, v)
    size = square.sqrt() if root else square
    kept_share = 1 - rate * decay * (decays and not coupled)
    return w * kept_share - rate * mean / (size + 1e-8), m, v


def orthogonalized(g, norm: bool = True, rounds: int = 5, exact: bool = False, size=max):
    """Muon's direction; each switch does one thing wrong."""
    u, s, vh = torch.linalg.svd(g / g.norm() if norm else g, full_matrices=False)
    for _ in range(rounds):
        s = torch.ones_like(s) if exact else 3.4445 * s - 4.775 * s**3 + 2.0315 * s**5
    return 0.2 * size(g.shape) ** 0.5 * (u * s @ vh)


def stopped(held_out, patience: int, ties: bool = False) -> tuple[int, int]:
    """Early stopping; the switch keeps the last of equal losses."""
    best = 0
    for report, loss in enumerate(held_out):
        if loss < held_out[best] or (ties and loss == held_out[best]):
            best = report
        if report - best >= patience:
            return best, report + 1
    return best, len(held_out)


def clipped(gradients, limit, always: bool = False, root: bool = True) -> list[torch.Tensor]:
    """Gradients scaled to a common norm; each switch does one thing wrong."""
    norm = sum(g.square().sum() for g in gradients) ** (0.5 if root else 1)
    factor = limit / (norm + 1e-6)
    return [g * (factor if always else min(1.0, factor)) for g in gradients]


def iterated(g, norm: bool = True, rounds: int = 5, cubed: bool = True) -> torch.Tensor:
    """The Newton-Schulz iteration; each switch does one thing wrong."""
    x = g / g.norm() if norm else g
    for _ in range(rounds):
        gram = x @ x.T
        x = 3.4445 * x - 4.775 * gram @ (x if cubed else g) + 2.0315 * gram @ gram @ x
    return x


def looped(
    stage,
    steps: int,
    first: bool = False,
    clip: bool = True,
    share: float = 0.4,
    ahead: bool = True,
    all_decay: bool = False,
    everywhere: bool = False,
) -> tuple:
    """A training loop; the switches take the first batches only, leave clipping or Nesterov's step
    out, give AdamW another share of the rate, let biases decay, or give embeddings to Muon.
    """
    recipe, weights = stage.recipe, stage.parameters()
    memory = {name: [0, 0] for name in weights}
    for step in range(steps):
        rate = solution("16", "my_rate")(step, recipe.lr, recipe.warmup, recipe.steps)
        loss = 0
        for number in range(recipe.accumulate):
            number += 0 if first else step * recipe.accumulate
            torch.manual_seed(stage.seed * 1_000_003 + number)
            loss = loss + sum(stage.losses(stage.batch(number)).values()) / recipe.accumulate
        gradients = torch.autograd.grad(loss, weights.values())
        if clip:
            gradients = clipped(gradients, recipe.clip)
        for (name, p), g in zip(weights.items(), gradients):
            decay = recipe.weight_decay if all_decay or p.dim() > 1 else 0.0
            now = p.detach()
            if p.dim() == 2 and (everywhere or "embed_tokens" not in name):
                memory[name][0] = mean = 0.95 * memory[name][0] + 0.05 * g
                turned = orthogonalized(0.95 * mean + 0.05 * g if ahead else mean)
                p.data = now * (1 - rate * decay) - rate * turned
            else:
                p.data, *memory[name] = adamw_step(
                    now, g, *memory[name], step + 1, share * rate, decay
                )
    return tuple(weights.values())


def cross_entropies(parts, fill: int = -100) -> torch.Tensor:
    """The cross-entropy of each target that counts; -100 can be replaced by another id."""
    logits = torch.cat([x for x, _ in parts])
    targets = torch.cat([y for _, y in parts])
    targets = targets.masked_fill(targets == -100, fill)
    return F.cross_entropy(logits, targets, reduction="none")[targets != -100]


def continued(
    weights, mean, first: int, last: int, seed: int, once: bool = False, anew: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Some steps of a run; the switches seed the generator once, or forget the mean at every
    step.
    """
    torch.manual_seed(seed * 1_000_003 + first)
    for number in range(first, last):
        if not once:
            torch.manual_seed(seed * 1_000_003 + number)
        gradient = weights - torch.randn(2)
        mean = gradient if anew else 0.9 * mean + gradient
        weights = weights - 0.1 * mean
    return weights, mean


def preferred(judged, key=lambda sample: sample[0], least: int = 2, empty: bool = False) -> list:
    """Preference pairs; the switches change the order, the difference that counts, and whether an
    empty sample may be chosen.
    """
    pairs = []
    for i, samples in enumerate(judged):
        (first, chosen), *_, (last, rejected) = sorted(samples, key=key)
        if abs(last - first) >= least and (empty or chosen):
            pairs.append((i, chosen, rejected))
    return pairs


def noticed(
    before, after, total: bool = False, short: bool = True, often: bool = False, twice: float = 2
) -> list[str]:
    """What a check for hacked rewards says; each switch makes it look at something else, or at
    less.
    """

    def run(rows):
        if often:  # how often a code occurs, wherever it does
            return max(max(Counter(row).values()) for row in rows)
        return max(len(list(same_codes)) for row in rows for _, same_codes in groupby(row))

    (old, new) = (sum(map(len, rows)) / (1 if total else len(rows)) for rows in (before, after))
    found = ["longer"] * (new > 1.5 * old) + ["shorter"] * (short and new < old / 1.5)
    return found + ["stuck"] * (run(after) > twice * run(before))


def scored(logits, targets, raw: bool = False):
    """Log-probability of the targets of one utterance; the switch leaves the softmax out."""
    counted = targets != -100
    scores = logits if raw else logits.log_softmax(-1)
    return scores[counted].gather(1, targets[counted][:, None]).sum()


FENCE = "\U0010ffff"  # between the words of notebook 05


def frequent(text: str, order, fence: str = FENCE) -> tuple[str, int]:
    """The pair of adjacent characters that is first by order(count, pair), and its count."""
    counts = Counter(pair for pair in zip(text, text[1:]) if fence not in pair)
    pair = min(counts, key=lambda pair: order(counts[pair], pair))
    return "".join(pair), counts[pair]


def pieces(text: str, merges: list, step: int = 1, count: int = -1) -> list[int]:
    """Byte-pair encoding by replacement; the switches change the order or how often."""
    for rank, (left, right) in list(enumerate(merges))[::step]:
        text = text.replace(left + right, chr(256 + rank), count)
    return [ord(token) for token in text if token != FENCE]


def with_system(turns: list) -> list:
    """The same with the default system message, if there is none."""
    default = [("system", "You are a helpful assistant.")]
    return turns if turns[0][0] == "system" else default + turns


def chatml(turns: list, close: str = "<|im_end|>\n", last: str = "<|im_start|>assistant\n") -> str:
    """The template without its default system message."""
    return "".join(f"<|im_start|>{role}\n{text}{close}" for role, text in turns) + last


def alternating(
    seconds, cells, audio_tokens, chunk: int = 2, end=max, order: int = 1, empty: bool = False
) -> list[tuple[str, int]]:
    """The runs of an interleaved video; each switch does one thing wrong."""
    heard = [i / 25 for i in range(audio_tokens)]
    runs = []
    for begin in range(0, int(end(max(seconds), max(heard))) + 1, chunk):
        steps = sum(begin <= t < begin + chunk for t in seconds)
        sounds = sum(begin <= t < begin + chunk for t in heard)
        runs += [("video", steps * cells), ("audio", sounds)][::order]
    return [(kind, n) for kind, n in runs if n or empty]


def attended(
    q, k, v, scale: float | None = None, causal: bool = True, repeat: bool = False
) -> torch.Tensor:
    """Attention of a sequence: q [L, H, d], k and v [L, H_kv, d] -> [L, H, d]."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat(1, group, 1) if repeat else x.repeat_interleave(group, 1) for x in (k, v))
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale)
    return out.transpose(0, 1)


def nucleus(logits, top_p: float, crossing: bool = True, scaled: bool = True) -> torch.Tensor:
    """Top-p; the switches leave out the word that crosses the threshold, or the scaling."""
    p = logits.softmax(0)
    falling, order = p.sort(descending=True)
    reached = falling.cumsum(0) - falling * crossing
    kept = torch.where(reached < top_p, falling, 0.0)
    return torch.zeros_like(p).scatter(0, order, kept / (kept.sum() if scaled else 1))


def convolved(x, weight, bias, stride: int, pad=(1, 1), mode: str = "constant") -> torch.Tensor:
    """A convolution [T, C] -> [T', D]; its padding can be wrong."""
    padded = F.pad(x.T[None], pad, mode=mode)
    return F.conv1d(padded, weight, bias, stride)[0].T


def sinusoid(count: int, size: int, last: int | None = None) -> torch.Tensor:
    """Position embeddings, sines first; `last` is the divisor of the exponent."""
    half = size // 2
    angles = torch.arange(count)[:, None] * 1e4 ** (-torch.arange(half) / (last or half - 1))
    return torch.cat([angles.sin(), angles.cos()], 1)


def diagonal(lengths: list[int]) -> torch.Tensor:
    """A block-diagonal mask."""
    return torch.block_diag(*(torch.ones(n, n) for n in lengths)).bool()


def sized(
    height, width, least, most, first=round, down=math.floor, up=math.ceil, smallest: int = 1
) -> tuple[int, ...]:
    """The size of an image in whole cells; the roundings can be wrong."""
    sides = height, width
    new = [28 * first(side / 28) for side in sides]
    scale = 1.0
    if math.prod(new) > most:
        scale = math.sqrt(most / math.prod(sides))
        new = [28 * max(smallest, down(side * scale / 28)) for side in sides]
    elif math.prod(new) < least:
        scale = math.sqrt(least / math.prod(sides))
        new = [28 * up(side * scale / 28) for side in sides]
    return tuple(new)


def cut_by(frames, axes: tuple[int, ...]) -> torch.Tensor:
    """Patches by one permutation of the nine axes."""
    n, _, height, width = frames.shape
    x = frames.reshape(n // 2, 2, 3, height // 28, 2, 14, width // 28, 2, 14)
    return x.permute(axes).reshape(-1, 1176)


def evenly(total: int, wanted: float, most: int, even: bool = True, last: bool = True) -> list[int]:
    """Indices of frames; the switches leave out the even number, or the last frame."""
    n = int(min(wanted, most, total))
    n = n // 2 * 2 if even else n
    if n < 2:
        return [0]
    return [round(i * (total - 1) / (n - 1) if last else i * total / n) for i in range(n)]


def video(total, wanted, most, frame_pixels, clip_pixels, **switches) -> tuple[list[int], float]:
    """Indices of frames, and the area of each; pairs share the pixels."""
    moments = evenly(total, wanted, most, **switches)
    return moments, min(frame_pixels, 2 * clip_pixels / len(moments))


def written(next_logits, stop: int | None, limit: int) -> list[int]:
    """Greedy decoding."""
    said = []
    while len(said) < limit and stop not in said:
        said.append(int(next_logits(said).argmax()))
    return said


def timed(start, seconds, rows, columns, clock) -> list[tuple[int, int, int]]:
    """Position ids of a video; clock: seconds -> ids since its beginning."""
    cells = [(y, x) for y in range(rows) for x in range(columns)]
    return [(start + clock(t), start + y, start + x) for t in seconds for y, x in cells]


def woven(
    start,
    seconds,
    rows,
    columns,
    audio_tokens,
    chunk: int = 50,
    origin: int | None = None,
    order: int = 1,
    later: int = 0,
    marker=lambda turns: max(turns[-1]) + 1,
) -> list[tuple[int, int, int]]:
    """Position ids of a video with its sound and of the closing marker; each switch does one thing
    wrong.
    """
    video = timed(start, seconds, rows, columns, lambda t: int(torch.tensor(t) * 25))
    first = start if origin is None else origin
    keyed = [((ids[0] - first) // chunk, 0, i, ids) for i, ids in enumerate(video)]
    for i in range(audio_tokens):
        keyed.append((i // chunk, order, i, (start + later + i,) * 3))
    turns = [ids for *_, ids in sorted(keyed)]
    return [*turns, (marker(turns),) * 3]


# Patches in a wrong order of axes, for the slow and the fast function of chapter 03.
WRONG_CUTS = [
    lambda x: cut_by(x, (0, 3, 4, 6, 7, 2, 1, 5, 8)),
    lambda x: cut_by(x, (0, 3, 6, 4, 7, 1, 2, 5, 8)),
    lambda x: cut_by(x, (0, 3, 6, 7, 4, 2, 1, 5, 8)),
    lambda x: cut_by(x, (0, 3, 6, 4, 7, 2, 1, 8, 5)),
    lambda x: cut_by(x, (0, 6, 3, 4, 7, 2, 1, 5, 8)),
    lambda x: x.reshape(-1, 1176),
]
BUGS = {
    "00": {
        "my_placed": [
            lambda x, i, f, t: x.masked_scatter((i == t)[:, None], x[i == t] + f),
            lambda x, i, f, t: torch.cat([f, x[len(f) :]]),
            lambda x, i, f, t: x.masked_scatter((i == t)[:, None], f.flip(0)),
            lambda x, i, f, t: torch.cat([x[i != t], f]),
            lambda x, i, f, t: x.masked_scatter_((i == t)[:, None], f),
        ],
        "my_answer": [
            lambda f, stop, limit: written(f, stop, limit)[:-1],
            lambda f, stop, limit: written(f, None, limit),
            lambda f, stop, limit: written(f, stop, limit + 1),
            lambda f, stop, limit: written(lambda said: f(said[-1:]), stop, limit),
            lambda f, stop, limit: written(lambda said: -f(said), stop, limit),
        ],
        "my_talker_vectors": [
            lambda h, e, m: torch.cat([h, e], 1),
            lambda h, e, m: h + e,
            lambda h, e, m: (h + e).masked_fill(m[:, None], 0),
            lambda h, e, m: h.masked_fill(m[:, None], 0) + e,
            lambda h, e, m: h + e.masked_fill_(m[:, None], 0),
        ],
        "my_step_inputs": [
            lambda w, e, p, n: torch.cat([w, e[None], p.expand(max(n - len(w) - 1, 0), -1)]),
            lambda w, e, p, n: torch.cat([w, e.expand(n, -1)])[:n],
            lambda w, e, p, n: torch.cat([w, p.expand(n, -1)])[:n],
            lambda w, e, p, n: torch.cat([w, p.expand(n - len(w) - 1, -1), e[None]]),
            lambda w, e, p, n: torch.cat([w, e[None], w[-1:].expand(n, -1)])[:n],
        ],
        "lengths": [
            lambda n, h, w, c: ((n // 160 + 1) // 4, h * w // 784, c / 25),
            lambda n, h, w, c: (-(-n // 160) // 4, h * w // 784, c / 25),
            lambda n, h, w, c: (-(-n // 640), h * w // 784, c / 25),
            lambda n, h, w, c: ((-(-n // 160) + 1) // 4, h * w // 196, c / 25),
            lambda n, h, w, c: ((-(-n // 160) + 1) // 4, h * w // 784, c / 50),
            lambda n, h, w, c: ((-(-n // 160) + 1) // 4, h * w // 784, c // 25),
            lambda n, h, w, c: (h * w // 784, (-(-n // 160) + 1) // 4, c / 25),
        ],
    },
    "01": {
        "my_frames": [
            lambda x, size, hop: F.pad(x, (0, 2 * size)).unfold(0, size, hop)[: -(-len(x) // hop)],
            lambda x, size, hop: framed(x, size, hop, repeat=True),
            lambda x, size, hop: framed(x, size, hop, mirror_end=True),
            lambda x, size, hop: framed(x, size, hop)[: len(x) // hop],
        ],
        "my_power": [
            lambda x: torch.fft.rfft(x.float()).abs().T ** 2,
            lambda x: (torch.fft.rfft(x * torch.hann_window(x.shape[1])).abs()).T,
            lambda x: torch.fft.fft(x * torch.hann_window(x.shape[1])).abs().T ** 2,
            lambda x: torch.fft.rfft(x * torch.hann_window(x.shape[1])).abs() ** 2,
            lambda x: (
                torch.fft.rfft(x * torch.hann_window(x.shape[1], periodic=False)).abs().T ** 2
            ),
        ],
        "my_filters": [
            lambda e, hz: triangles(e, hz),
            lambda e, hz: triangles(e, hz) / (e[2:] - e[:-2])[:, None],
            lambda e, hz: triangles(e, hz, largest=True) * 2 / (e[2:] - e[:-2])[:, None],
            lambda e, hz: triangles(e, hz, cut=False) * 2 / (e[2:] - e[:-2])[:, None],
        ],
        "my_log": [
            lambda x: (x.clamp_min(1e-8).log10() + 4) / 4,
            lambda x: (torch.maximum(x.log10(), x.log10().max() - 8) + 4) / 4,
            lambda x: (torch.maximum(x.log10(), x.log10().amax(-1, keepdim=True) - 8) + 4) / 4,
            lambda x: (x.clamp_min(1e-10).log10() + 4) / 4,
            lambda x: (x.clamp_min(1e-8).log() + 4) / 4,
            lambda x: floored(x.log10(), (-2, -1)),
            lambda x: floored(x.clamp_min(1e-10).log10(), -2),
            lambda x: floored(x.clamp_min(1e-10).log10(), -1),
        ],
        "heard_at": [
            lambda hz, rate: hz,
            lambda hz, rate: hz % (rate / 2),
            lambda hz, rate: abs(rate - hz),
            lambda hz, rate: min(hz, rate - hz),
        ],
        "frames_ready": [
            lambda n: n // 160,
            lambda n: max(0, (n - 400) // 160 + 1),
            lambda n: max(0, (n - 199) // 160 + 1),
            lambda n: (n - 200) // 160 + 1,
            lambda n: max(0, (n - 201) // 160 + 1),
        ],
    },
    "02": {
        "my_convolution": [
            lambda x, w, b, s: convolved(x, w, b, s, pad=(0, 0)),
            lambda x, w, b, s: convolved(x, w, b, s, pad=(2, 0)),
            lambda x, w, b, s: convolved(x, w, b, s, mode="replicate"),
            lambda x, w, b, s: convolved(x, w.flip(2), b, s),
            lambda x, w, b, s: convolved(x, w, None, s),
            lambda x, w, b, s: convolved(x, w, b, 1)[1::s] if s > 1 else convolved(x, w, b, 1),
        ],
        "my_positions": [
            lambda n, d: sinusoid(n, d, last=d // 2),
            lambda n, d: sinusoid(n, d).roll(d // 2, 1),
            lambda n, d: sinusoid(n, d).view(n, 2, -1).transpose(1, 2).flatten(1),
            lambda n, d: sinusoid(n + 1, d)[1:],
            lambda n, d: sinusoid(n, d).T,
        ],
        "my_block_attention": [
            lambda q, k, v, n: headed(q, k, v, diagonal(n), scale=1),
            lambda q, k, v, n: headed(q, k, v, diagonal(n), scale=4),
            lambda q, k, v, n: headed(q, k, v, diagonal([sum(n)])),
            lambda q, k, v, n: headed(q, k, v, diagonal(n).tril()),
            lambda q, k, v, n: headed(q, k, v, diagonal([sum(n)]))[1] * diagonal(n),
            lambda q, k, v, n: headed(q, k, v, diagonal(n))[0],
            lambda q, k, v, n: headed(q, k, v, diagonal(n))[::-1],
        ],
        "my_pool": [
            lambda x, n: x[: len(x) // 2 * 2].unflatten(0, (-1, 2)).mean(1),
            lambda x, n: torch.cat([b[: len(b) // 2 * 2 : 2] for b in x.split(n)]),
            lambda x, n: torch.cat([b.view(2, -1, 1).mean(0) for b in x.split(n)]),
            lambda x, n: (
                torch.cat([F.pad(b, (0, 0, 0, len(b) % 2)) for b in x.split(n)])
                .unflatten(0, (-1, 2))
                .mean(1)
            ),
            lambda x, n: torch.cat(
                [
                    b[: len(b) // 2 * 2].unflatten(0, (-1, 2)).sum(1)
                    for b in x.split(n)
                    if len(b) > 1
                ]
            ),
        ],
        "final_tokens": [
            lambda n: n // 32_000 * 50,
            lambda n: max(0, (n - 200) // 160 + 1) // 4,
            lambda n: -(-n // 160) // 200 * 50,
            lambda n: (n - 200) // 32_000 * 50 + 50,
            lambda n: max(0, (n - 200) // 160 + 1) // 200 * 100,
        ],
    },
    "03": {
        "my_size": [
            lambda h, w, least, most: sized(h, w, least, most, first=math.floor),
            lambda h, w, least, most: sized(h, w, least, most, down=round),
            lambda h, w, least, most: sized(h, w, least, most, up=round),
            lambda h, w, least, most: sized(h, w, 0, most),
            lambda h, w, least, most: sized(h, w, least, math.inf),
            lambda h, w, least, most: sized(h, w, least, most)[::-1],
            lambda h, w, least, most: sized(h, w, least, most, smallest=0),
            lambda h, w, least, most: sized(h, w, least, most if h * w > most else math.inf),
            lambda h, w, least, most: sized(h, w, least if h * w < least else 0, most),
        ],
        "my_cut": WRONG_CUTS,
        "my_fast_cut": WRONG_CUTS,
        "my_video": [
            lambda n, rate, most, *area: video(n, 2 * n / rate, most, *area),
            lambda n, rate, most, *area: video(n, max(2 * n / rate, 4), n, *area),
            lambda n, rate, most, *area: video(n, max(2 * n / rate, 4), most, *area, even=False),
            lambda n, rate, most, *area: video(n, max(n / rate, 4), most, *area),
            lambda n, rate, most, *area: video(n, max(2 * n / rate, 4), most, *area, last=False),
            lambda n, rate, most, a, b: video(n, max(2 * n / rate, 4), most, a, b / 2),
            lambda n, rate, most, a, b: video(n, max(2 * n / rate, 4), most, a, math.inf),
            lambda n, rate, most, a, b: video(n, max(2 * n / rate, 4), most, math.inf, b),
        ],
        "row_of": [
            lambda y, x, w: y // 14 * (w // 14) + x // 14,
            lambda y, x, w: 4 * (y // 28 * (w // 28) + x // 28) + x % 28 // 14 * 2 + y % 28 // 14,
            lambda y, x, w: 4 * (x // 28 * (w // 28) + y // 28) + y % 28 // 14 * 2 + x % 28 // 14,
            lambda y, x, w: y // 28 * (w // 28) + x // 28,
        ],
        "halved": [
            lambda w: w[:, :588],
            lambda w: w[:, :588] + w[:, 588:],
            lambda w: w[:, ::2] + w[:, 1::2],
            lambda w: w.view(-1, 3, 2, 196).mean(2).flatten(1),
            lambda w: w.view(-1, 2, 3, 196).sum(1).flatten(1),
        ],
    },
    "04": {
        "my_masks": [
            lambda p, s: [m.new_ones(m.shape) if i else m for i, m in enumerate(masks(p, s))],
            lambda p, s: masks(p, s)[::-1],
            lambda p, s: [masks(p[:, [2, 2, 2, 3]], s)[0], masks(p, s)[1]],
            lambda p, s: [(p[:, None, 2:] - p[:, 2:]).abs().amax(2) < s, masks(p, s)[1]],
            lambda p, s: [masks(p[:, [0, 1, 3, 3]], s)[0], masks(p, s)[1]],
            lambda p, s: [masks(p[:, [0, 1, 2, 2]], s)[0], masks(p, s)[1]],
        ],
        "my_rotate": [
            lambda x, r, c: rotated(x, c, r),
            lambda x, r, c: rotated(x, -r, -c),
            lambda x, r, c: rotated(x, r, c, slow=True),
            lambda x, r, c: rotated(x, r, c, adjacent=True),
            lambda x, r, c: rotated(x, r.sort().values, c.sort().values),
            lambda x, r, c: rotated(x, torch.arange(len(r)) + r[:1], c),
            lambda x, r, c: rotated(x, r[:1], c[:1]),
            lambda x, r, c: rotated(x, r, c.flip(0)),
            lambda x, r, c: rotated(x.roll(x.shape[1] // 2, 1), r, c),
            lambda x, r, c: rotated(torch.ones_like(x), r, c),
        ],
        "my_windows": [
            lambda x, labels, attend: attend(x),
            lambda x, labels, attend: sorted_by(x, labels, attend, back=lambda order: slice(None)),
            lambda x, labels, attend: sorted_by(x, labels, attend, back=lambda order: order),
            lambda x, labels, attend: sorted_by(x.flip(0), labels.flip(0), attend).flip(0),
            lambda x, labels, attend: torch.cat([attend(row[None]) for row in x]),
        ],
        "my_merge": [
            lambda x, r, c: x.reshape(r * c // 4, -1),
            lambda x, r, c: (
                x.view(r // 2, 2, c // 2, 2, -1).permute(0, 2, 3, 1, 4).reshape(r * c // 4, -1)
            ),
            lambda x, r, c: (
                x.view(r // 2, 2, c // 2, 2, -1).permute(2, 0, 1, 3, 4).reshape(r * c // 4, -1)
            ),
            lambda x, r, c: (
                x.view(2, r // 2, 2, c // 2, -1).permute(1, 3, 0, 2, 4).reshape(r * c // 4, -1)
            ),
        ],
        "pairs": [
            lambda r, c, s: (r * c) ** 2,
            lambda r, c, s: r * c * s**2,
            lambda r, c, s: (r // s) * (c // s) * s**4,
            lambda r, c, s: -(-r // s) * -(-c // s) * s**4,
        ],
    },
    "05": {
        "my_best_pair": [
            lambda text, means: frequent(text, lambda n, pair: -n),
            lambda text, means: frequent(text, lambda n, pair: (-n, pair)),
            lambda text, means: frequent(text, lambda n, pair: (-n, pair), fence=""),
            lambda text, means: frequent(text, lambda n, pair: (n, means[pair[0]])),
            lambda text, means: frequent(text, lambda n, pair: (-n, means[pair[0]])),
            lambda text, means: frequent(
                text, lambda n, pair: (-n, b"".join(means[token] for token in pair))
            ),
            lambda text, means: frequent(text, lambda n, pair: (-n, means[pair[0]]))[0],
            lambda text, means: frequent(
                text, lambda n, pair: (-text.count("".join(pair)), means[pair[0]])
            ),
        ],
        "my_pieces": [
            lambda text, merges: pieces(text, merges, step=-1),
            lambda text, merges: pieces(text, merges, count=1),
            lambda text, merges: pieces(text.replace(FENCE, ""), merges),
            lambda text, merges: pieces(text, merges[:1]),
            lambda text, merges: [i % 256 for i in pieces(text, merges)],
            lambda text, merges: list(text),
        ],
        "my_chatml": [
            lambda turns: chatml(turns),
            lambda turns: chatml([("system", "You are a helpful assistant."), *turns]),
            lambda turns: chatml(with_system(turns), close="<|im_end|>"),
            lambda turns: chatml(with_system(turns), last=""),
            lambda turns: chatml(with_system(turns), last="<|im_start|>assistant"),
            lambda turns: chatml(with_system(turns)) + "<|im_end|>\n",
        ],
        "my_runs": [
            lambda seconds, cells, n: [("video", len(seconds) * cells), ("audio", n)],
            lambda seconds, cells, n: alternating(seconds, cells, n, chunk=1),
            lambda seconds, cells, n: alternating(seconds, 1, n),
            lambda seconds, cells, n: alternating(seconds, cells, n, end=min),
            lambda seconds, cells, n: alternating(seconds, cells, n, order=-1),
            lambda seconds, cells, n: alternating(seconds, cells, n, empty=True),
        ],
        "my_loss_mask": [
            lambda row: marked(row, "assistant", 3, 0),
            lambda row: marked(row, "assistant", 0, 1),
            lambda row: marked(row, "assistant", 2, 0),
            lambda row: marked(row, "assistant", 3, 2),
            lambda row: marked(row, "user", 3, 1),
            lambda row: [1] * len(row),
        ],
    },
    "06": {
        "my_image_ids": [
            lambda s, r, c: [(s, s + x, s + y) for y in range(r) for x in range(c)],
            lambda s, r, c: [(s, s + y, s + x) for x in range(c) for y in range(r)],
            lambda s, r, c: [(s, y, x) for y in range(r) for x in range(c)],
            lambda s, r, c: [(s + i,) * 3 for i in range(r * c)],
            lambda s, r, c: [(s + y, s + y, s + x) for y in range(r) for x in range(c)],
        ],
        "my_video_ids": [
            lambda s, ts, r, c: timed(s, ts, r, c, lambda t: int(t * 25)),  # in double precision
            lambda s, ts, r, c: timed(s, ts, r, c, lambda t: round(t * 25)),
            lambda s, ts, r, c: timed(s, ts, r, c, lambda t: int(t) * 25),
            lambda s, ts, r, c: timed(s, ts, r, c, lambda t: math.ceil(t * 25)),
            lambda s, ts, r, c: timed(0, ts, r, c, lambda t: int(torch.tensor(t) * 25)),
            lambda s, ts, r, c: timed(s, ts, 1, c, lambda t: int(torch.tensor(t) * 25)),
        ],
        "my_turns": [
            lambda *x: woven(*x, marker=lambda turns: max(map(max, turns)) + 1),
            lambda *x: woven(*x, marker=lambda turns: max(turns[-1])),
            lambda *x: woven(*x, marker=lambda turns: turns[-1][1] + 1),
            lambda *x: woven(*x)[:-1],
            lambda *x: woven(*x, chunk=1000),  # all frames first
            lambda *x: woven(*x, chunk=1),  # by time
            lambda *x: woven(*x, chunk=25),
            lambda *x: woven(*x, origin=0),
            lambda *x: woven(*x, order=-1),
            lambda *x: woven(*x, later=1),
        ],
        "my_angles": [
            lambda x, s: x[0],
            lambda x, s: x.mean(0),
            lambda x, s: torch.cat([p[2 - i] for i, p in enumerate(x.split(s, -1))], -1),
            lambda x, s: torch.cat([x[i, :, :n] for i, n in enumerate(s)], -1),
        ],
        "closing_id": [
            lambda *x: max(map(max, woven(*x)[:-1])) + 1,
            lambda *x: max(woven(*x)[-1]) + 1,
            lambda *x: woven(*x, chunk=1000)[-1][0],
            lambda *x: woven(*x, marker=lambda turns: turns[-1][0] + 1)[-1][0],
            lambda s, seconds, r, c, n: s + n,
            lambda s, seconds, r, c, n: s + max(n, int(seconds[-1] * 25) + 1),
            lambda s, seconds, r, c, n: s + (n if n / 25 > seconds[-1] else int(seconds[-1] * 25)),
        ],
    },
    "07": {
        "my_norm": [
            lambda x, w, e: w * x / (x.pow(2).sum(-1, keepdim=True) + e).sqrt(),
            lambda x, w, e: w * x / (x.pow(2).mean() + e).sqrt(),
            lambda x, w, e: w * x / (x.pow(2).mean(-1, keepdim=True).sqrt() + e),
            lambda x, w, e: F.layer_norm(x, w.shape, w, eps=e),
            lambda x, w, e: x / (x.pow(2).mean(-1, keepdim=True) + e).sqrt(),
        ],
        "my_attend": [
            lambda q, k, v: attended(q, k, v, scale=1),
            lambda q, k, v: attended(q, k, v, scale=1 / q.shape[2]),
            lambda q, k, v: attended(q, k, v, causal=False),
            lambda q, k, v: attended(q, k, v, repeat=True),
            lambda q, k, v: attended(q, k.flip(1), v.flip(1)),
            lambda q, k, v: attended(q, k, v)[:, 0],
        ],
        "my_mlp": [
            lambda x, g, u, d: (F.silu(x @ u.T) * (x @ g.T)) @ d.T,
            lambda x, g, u, d: ((x @ g.T).sigmoid() * (x @ u.T)) @ d.T,
            lambda x, g, u, d: F.silu((x @ g.T) * (x @ u.T)) @ d.T,
            lambda x, g, u, d: F.silu(x @ g.T) * (x @ u.T),
            lambda x, g, u, d: (F.silu(x @ g.T) + x @ u.T) @ d.T,
        ],
        "my_step": [
            lambda q, k, v: taken(q, k, v, scale=1),
            lambda q, k, v: taken(q, k, v, scale=q.shape[1] ** -1),
            lambda q, k, v: taken(q, k.flip(1), v.flip(1)),
            lambda q, k, v: taken(q, k[:-1], v[:-1]),
            lambda q, k, v: taken(q, k, v, repeat=True),
        ],
        "my_loss": [
            lambda z, x, m: F.cross_entropy(z, x.where(m > 0, -100)),
            lambda z, x, m: F.cross_entropy(z[1:], x[:-1].where(m[1:] > 0, -100)),
            lambda z, x, m: F.cross_entropy(z[:-1], x[1:].where(m[:-1] > 0, -100)),
            lambda z, x, m: F.cross_entropy(z[:-1], x[1:]),
            lambda z, x, m: F.cross_entropy(z[:-1], x[1:].where(m[1:] > 0, -100), reduction="sum"),
            lambda z, x, m: -F.cross_entropy(z[:-1], x[1:].where(m[1:] > 0, -100)),
        ],
    },
    "08": {
        "my_fsq": [
            lambda x, levels: rounded(x, levels, squash=False),
            lambda x, levels: rounded(x, levels, down=True),
            lambda x, levels: rounded(x, levels, digits=True),
            lambda x, levels: rounded(x, [n + 1 for n in levels]),
            lambda x, levels: x.tanh(),
            lambda x, levels: rounded(x, levels),  # no gradient
            lambda x, levels: x + (rounded(x, levels) - x).detach(),  # none of the tanh
        ],
        "my_collapse": [
            lambda path, blank=0: [x for x in path if x != blank],
            lambda path, blank=0: [x for x, _ in groupby(x for x in path if x != blank)],
            lambda path, blank=0: [x for x, _ in groupby(path)],
            lambda path, blank=0: sorted(set(path) - {blank}),
        ],
        "my_forward": [
            lambda p, x: read_as(p, x, stay=False),
            lambda p, x: read_as(p, x, leap=False),
            lambda p, x: read_as(p, x, equal=True),
            lambda p, x: read_as(p, x, ends=1),
            lambda p, x: read_as(p, [c for c, d in zip(x, [0, *x]) if c != d]),
        ],
        "shortest": [
            lambda text: len(text),
            lambda text: 2 * len(text) + 1,
            lambda text: 2 * len(text) - len(set(text)),
            lambda text: len(text) - sum(a == b for a, b in zip(text, text[1:])),
        ],
        "my_nearest": [
            lambda x, book: (x @ book.T).argmax(-1),
            lambda x, book: (x[..., None, :] - book).square().sum(-1).argmax(-1),
            lambda x, book: (x[..., None, :] - book).sum(-1).abs().argmin(-1),
            lambda x, book: (x[..., None, :] - book).square().sum(-1).min(-1).values,
            lambda x, book: (x[..., None, :] - book).square().sum(-1).argmin(-1) + 1,
        ],
    },
    "09": {
        "my_inputs": [
            lambda r, end, pad, table, codes, bos: added(r, end, pad, table, [*codes, bos]),
            lambda r, end, pad, table, codes, bos: added(r, end, end, table, [bos, *codes]),
            lambda r, end, pad, table, codes, bos: added(r, pad, pad, table, [bos, *codes]),
            lambda r, end, pad, table, codes, bos: added(r, end, pad, table, codes),
            lambda r, end, pad, table, codes, bos: added(r, end, pad, table, [0, *codes]),
            lambda r, end, pad, table, codes, bos: added(r[1:], end, pad, table, [bos, *codes]),
        ],
        "my_targets": [
            lambda n, rows, eos: aimed(n, rows, eos, first=0),
            lambda n, rows, eos: aimed(n, rows, eos, first=2),
            lambda n, rows, eos: aimed(n, rows, eos, stops=False),
            lambda n, rows, eos: aimed(n, rows, eos, fill=0),
            lambda n, rows, eos: aimed(n, rows, eos)[:, :-1],
            lambda n, rows, eos: aimed(n, rows, eos, last=True),
        ],
        "my_decode": [
            lambda f, g, banned, stops, most: decoded(f, g, banned, stops, most, keep=True),
            lambda f, g, banned, stops, most: decoded(f, g, banned, stops, most + 1),
            lambda f, g, banned, stops, most: decoded(f, g, [], stops, most),
            lambda f, g, banned, stops, most: decoded(f, g, banned, [], most),
            lambda f, g, banned, stops, most: decoded(lambda _: f([]), g, banned, stops, most),
        ],
        "my_banned": [
            lambda ids, rows, pad, bos, eos: [i for i in range(rows, ids) if i not in (pad, eos)],
            lambda ids, rows, pad, bos, eos: sorted({bos, *range(rows, ids)}),
            lambda ids, rows, pad, bos, eos: [
                i for i in range(ids) if i == bos or i >= rows and i != eos
            ],
            lambda ids, rows, pad, bos, eos: sorted({bos, *range(rows + 1, ids)} - {pad, eos}),
            lambda ids, rows, pad, bos, eos: [i for i in range(rows, ids) if i != pad] + [bos],
        ],
        "ready_at": [
            lambda xs, d, n: spoken(xs, d, n, ahead=0),
            lambda xs, d, n: spoken(xs, d, n, ahead=2),
            lambda xs, d, n: [xs[-1] + d * (i + 1) for i in range(n)],
            lambda xs, d, n: [xs[min(i + 1, len(xs) - 1)] + d for i in range(n)],
            lambda xs, d, n: [xs[1] + d * (i + 1) for i in range(n)],
        ],
        "my_nucleus": [
            lambda x, t, p: nucleus(x * t, p),
            lambda x, t, p: nucleus(x, p) ** (1 / t),
            lambda x, t, p: nucleus(x / t, p, crossing=False),
            lambda x, t, p: nucleus(x / t, p, scaled=False),
            lambda x, t, p: nucleus(x / t, p).sort(descending=True).values,
            lambda x, t, p: (x / t).softmax(0),
        ],
    },
    "10": {
        "my_flow_loss": [
            lambda v, x1, x0, t: ((v((1 - t) * x0 + t * x1, t) - x1 + x0) ** 2).mean(),
            lambda v, x1, x0, t: velocity_error(v, x0, x1, t),
            lambda v, x1, x0, t: velocity_error(v, x1, x0, t, sign=-1),
            lambda v, x1, x0, t: velocity_error(v, x1, x0, t) * x1.numel(),
            lambda v, x1, x0, t: velocity_error(v, x1, x0, t, clean=True),
            lambda v, x1, x0, t: velocity_error(v, x1, x0, t) ** 0.5,
        ],
        "my_euler": [
            lambda v, x, grid: steps_of(v, x, grid, late=True),
            lambda v, x, grid: steps_of(v, x, grid, even=True),
            lambda v, x, grid: steps_of(v, x, grid)[1:],
            lambda v, x, grid: steps_of(v, x, grid)[-1],
            lambda v, x, grid: steps_of(lambda t, y: v(t, x), x, grid),
        ],
        "my_mask": [
            lambda n, b, back, ahead: blocks(n, b, ahead, back),
            lambda n, b, back, ahead: blocks(n, 1, back * b, ahead * b),
            lambda n, b, back, ahead: blocks(n, b, back, max(ahead - 1, 0)),
            lambda n, b, back, ahead: ~blocks(n, b, back, ahead),
            lambda n, b, back, ahead: blocks(n, b, back, ahead).T,
        ],
        "my_step": [
            lambda h, f, scale, shift, gate: stepped(h, f, scale, shift, gate, one=0),
            lambda h, f, scale, shift, gate: stepped(h, f, shift, scale, gate),
            lambda h, f, scale, shift, gate: h + gate * f(h * (1 + scale) + shift),
            lambda h, f, scale, shift, gate: stepped(h, f, scale, shift, gate) - h,
            lambda h, f, scale, shift, gate: stepped(h, f, scale, shift, 1 + gate),
        ],
        "heun_step": [
            lambda f, y, a, b: y + (b - a) * f(a, y),
            lambda f, y, a, b: y + (b - a) * f((a + b) / 2, y + (b - a) / 2 * f(a, y)),
            lambda f, y, a, b: y + (b - a) * (f(a, y) + f(a, y + (b - a) * f(a, y))) / 2,
            lambda f, y, a, b: y + (b - a) * (f(a, y) + f(b, y)) / 2,
            lambda f, y, a, b: y + (b - a) * f(b, y + (b - a) * f(a, y)),
        ],
    },
    "11": {
        "my_transposed": [
            lambda x, w, r: F.conv_transpose1d(x[None], w.flip(2), stride=r)[0],
            lambda x, w, r: F.conv_transpose1d(x[None], w, stride=1)[0],
            lambda x, w, r: F.conv_transpose1d(x[None], w, stride=r)[0][:, : r * x.shape[1]],
            lambda x, w, r: F.conv_transpose1d(x[None], w, stride=r)[0] / r,
            lambda x, w, r: F.conv_transpose1d(x[None], w, stride=r, padding=1)[0],
        ],
        "my_snake": [
            lambda x, a, b: x + (a[:, None] * x).sin() ** 2 / b[:, None],
            lambda x, a, b: x + (a.exp() * x).sin() ** 2 / b.exp(),
            lambda x, a, b: x + (a.exp()[:, None] * x).sin() / b.exp()[:, None],
            lambda x, a, b: x + (b.exp()[:, None] * x).sin() ** 2 / a.exp()[:, None],
            lambda x, a, b: x + (a.exp()[:, None] * x).sin() ** 2 * b.exp()[:, None],
        ],
        "my_double": [
            lambda x, taps: twice_as_fine(x, taps) / 2,
            lambda x, taps: twice_as_fine(x, taps, mode="constant"),
            lambda x, taps: twice_as_fine(x, taps, first=1),
            lambda x, taps: twice_as_fine(x, taps).roll(1, 1),
            lambda x, taps: x.repeat_interleave(2, 1),
        ],
        "my_halve": [
            lambda x, taps: half_as_fine(x, taps, left=0),
            lambda x, taps: half_as_fine(x, taps, first=1),
            lambda x, taps: half_as_fine(x, taps, mode="constant"),
            lambda x, taps: half_as_fine(x, taps) / 2,
            lambda x, taps: x[:, ::2],
        ],
        "my_activation": [
            lambda x, a, b, taps: snaked(x, a, b),
            lambda x, a, b, taps: snaked(half_as_fine(twice_as_fine(x, taps), taps), a, b),
            lambda x, a, b, taps: half_as_fine(snaked(twice_as_fine(x, taps) / 2, a, b), taps),
            lambda x, a, b, taps: snaked(twice_as_fine(x, taps), a, b)[:, ::2],
            lambda x, a, b, taps: half_as_fine(snaked(twice_as_fine(x, taps), b, a), taps),
        ],
        "sees": [
            lambda k, ds: sum(k // 2 * d + k // 2 for d in ds),
            lambda k, ds: sum(5 + k // 2 * d for d in ds),
            lambda k, ds: sum(10 + (k - 1) * d + k - 1 for d in ds),
            lambda k, ds: max(10 + k // 2 * d + k // 2 for d in ds),
        ],
    },
    "12": {
        "my_wait": [
            lambda xs, ns: max(0, xs[-1] - xs[0] - sum(ns[:-1])),
            lambda xs, ns: max(0, *(x - sum(ns[:k]) for k, x in enumerate(xs))),
            lambda xs, ns: max(0, *(x - xs[0] - sum(ns[: k + 1]) for k, x in enumerate(xs))),
            lambda xs, ns: max(x - y for x, y in zip(xs[1:], xs)) - ns[0],
        ],
        "my_chunk_attention": [
            lambda q, k, v: attended_with_offset(q, k, v, offset=0),  # what is_causal=True does
            lambda q, k, v: attended_with_offset(q, k, v, offset=len(k) - len(q) - 1),
            lambda q, k, v: attended_with_offset(q, k, v, offset=len(k)),
            lambda q, k, v: attended_with_offset(
                q * q.shape[1] ** 0.5, k, v, offset=len(k) - len(q)
            ),
            lambda q, k, v: attended_with_offset(q, k[-len(q) :], v[-len(q) :], offset=0),
        ],
        "my_spans": [
            lambda n, b, *x: windows_of(n, b, *x, inside=True),
            lambda n, b, *x: [s for s in windows_of(n, b, *x) if s[3] <= n - n % b],
            lambda n, b, *x: [(s, s, e, w) for _, s, e, w in windows_of(n, b, *x)],
            lambda n, b, *x: [(f, s, w, w) for f, s, _, w in windows_of(n, b, *x)],
            lambda n, b, *x: windows_of(n, b, *x, clipped=False),
        ],
        "my_pieces": [
            lambda net, mel, step, reach, hop: torch.cat([net(p) for p in mel.split(step, 1)]),
            lambda net, mel, step, reach, hop: joined(net, mel, step, reach, hop, left=0),
            lambda net, mel, step, reach, hop: joined(net, mel, step, reach, hop, right=0),
            lambda net, mel, step, reach, hop: joined(net, mel, step, 1, hop),
            lambda net, mel, step, reach, hop: joined(net, mel, step, reach, hop, always=True),
            lambda net, mel, step, reach, hop: joined(net, mel, step, reach, 1),
        ],
        "cuts": [
            lambda s, n: cut(s, n, look=False),
            lambda s, n: cut(s, n, rest=False),
            lambda s, n: cut(s, n, last=False),
            lambda s, n: cut(s, n, always=True),
        ],
    },
    "13": {
        "my_targets": [
            lambda turns: [i for p, a in turns for i in [-100] * len(p) + a],
            lambda turns: [
                i for p, a in turns for i in [-100] * (len(p) - 1) + a[:-1] + [-100, -100]
            ],
            lambda turns: [i for p, a in turns for i in (p + a)][1:] + [-100],
            lambda turns: [i for p, a in turns for i in [0] * (len(p) - 1) + a + [0]],
            lambda turns: [i for p, a in turns for i in [-100] * len(p) + a][1:],
        ],
        "my_mean_loss": [
            lambda parts: sum(F.cross_entropy(x, y) for x, y in parts) / len(parts),
            lambda parts: cross_entropies(parts, fill=0).mean(),
            lambda parts: cross_entropies(parts).sum(),
            lambda parts: cross_entropies(parts).sum() / sum(len(y) for _, y in parts),
            lambda parts: -cross_entropies(parts).mean(),
        ],
        "my_run": [
            lambda w, m, *x: continued(w, m, *x, once=True),
            lambda w, m, *x: continued(w, m, *x, anew=True),
            lambda w, m, first, last, seed: continued(w, m, 0, last - first, seed),
            lambda w, m, first, last, seed: continued(w, m, first, last, 0),
            lambda w, m, first, last, seed: continued(w, m, first, last + 1, seed),
            lambda w, m, *x: continued(w, 0 * m, *x),
            lambda *x: continued(*x)[0],
        ],
        "my_stop": [
            lambda x, n: (x.index(min(x)), len(x)),
            lambda x, n: stopped(x, n + 1),
            lambda x, n: stopped(x, 1),
            lambda x, n: stopped(x, n, ties=True),
            lambda x, n: (stopped(x, n)[0], stopped(x, n)[1] - 1),
            lambda x, n: (stopped(x, n)[1] - 1, stopped(x, n)[1]),
        ],
    },
    "14": {
        "my_sequence_log_prob": [
            lambda x, y: scored(x, y.clamp_min(0)),
            lambda x, y: scored(x, y) / (y != -100).sum(),
            lambda x, y: scored(x, y, raw=True),
            lambda x, y: scored(x, y).exp(),
            lambda x, y: scored(x[:-1], y[1:]),
            lambda x, y: print(scored(x, y)),
        ],
        "my_dpo": [
            lambda w, r, w0, r0, b: -F.logsigmoid(b * (w - r)).mean(),
            lambda w, r, w0, r0, b: -F.logsigmoid(b * (w - w0 + r - r0)).mean(),
            lambda w, r, w0, r0, b: -F.logsigmoid(b * (r - r0 - w + w0)).mean(),
            lambda w, r, w0, r0, b: -F.logsigmoid(b * (w - w0 - r + r0)).sum(),
            lambda w, r, w0, r0, b: -b * F.logsigmoid(w - w0 - r + r0).mean(),
            lambda w, r, w0, r0, b: -(b * (w - w0 - r + r0)).sigmoid().log().mean(),
        ],
        "my_weight": [
            lambda m, b: b * (b * m).sigmoid(),
            lambda m, b: (-b * m).sigmoid(),
            lambda m, b: b * (-m).sigmoid(),
            lambda m, b: -b * (-b * m).sigmoid(),
        ],
        "my_pairs": [
            lambda judged: preferred(judged, least=1),
            lambda judged: preferred(judged, empty=True),
            lambda judged: preferred(judged, key=lambda sample: (sample[0], -len(sample[1]))),
            lambda judged: preferred(judged, key=lambda sample: sample),
            lambda judged: preferred(judged, key=lambda sample: -sample[0]),
            lambda judged: [(i, b, a) for i, a, b in preferred(judged)],
            lambda judged: [pair[1:] for pair in preferred(judged)],
        ],
        "hacks": [
            lambda a, b: noticed(a, b, total=True),
            lambda a, b: noticed(a, b, short=False),
            lambda a, b: noticed(a, b, often=True),
            lambda a, b: noticed(a, b, twice=1),
            lambda a, b: noticed(a, b, twice=math.inf),
        ],
    },
    "15": {
        "my_tensor": [
            lambda raw, name: stored(raw, name, start=0),
            lambda raw, name: stored(raw, name, start=8),
            lambda raw, name: stored(raw, name).flatten(),
            lambda raw, name: stored(raw, name, order="big"),
            lambda raw, name: stored(raw, name).float() * 2,
            lambda raw, name: stored(raw, next(iter(json.loads(header(raw))))),
        ],
        "my_decoder": [
            lambda c: counted(c) - c.hidden_size,
            lambda c: counted(c) - 2 * c.num_hidden_layers * c.hidden_size,
            lambda c: counted(c) + c.num_hidden_layers * c.hidden_size,
            lambda c: counted(replace(c, num_key_value_heads=c.num_attention_heads)),
            lambda c: counted(replace(c, num_hidden_layers=1)),
        ],
        "problems": [
            lambda a, b: [sorted(a.keys() - b.keys()), sorted(b.keys() - a.keys()), []],
            lambda a, b: [
                sorted(b.keys() - a.keys()),
                sorted(a.keys() - b.keys()),
                sorted(n for n in a if n in b and a[n] != b[n]),
            ],
            lambda a, b: [
                [n for n in a if n not in b],
                [n for n in b if n not in a],
                [n for n in a if n in b and a[n] != b[n]],
            ],
            lambda a, b: [
                sorted(a.keys() - b.keys()),
                sorted(b.keys() - a.keys()),
                [n for n in a if n in b and math.prod(a[n]) != math.prod(b[n])],
            ],
        ],
        "cache_bytes": [
            lambda c, n, b=2: c.num_hidden_layers * c.num_key_value_heads * c.head_dim * n * b,
            lambda c, n, b=2: 2 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * n * b,
            lambda c, n, b=2: 2 * c.num_key_value_heads * c.head_dim * n * b,
            lambda c, n, b=2: 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * n * 2,
            lambda c, n, b=2: 2 * c.num_hidden_layers * c.hidden_size * n * b,
        ],
        "pass_ms": [
            lambda n, b, w, g, t: b * n / 8 / g / 1e6 + 2 * n * w / t / 1e9,
            lambda n, b, w, g, t: b * n / 8 / g / 1e6,
            lambda n, b, w, g, t: 2 * n * w / t / 1e9,
            lambda n, b, w, g, t: max(b * n / 8 / g / 1e6, n * w / t / 1e9),
            lambda n, b, w, g, t: min(b * n / 8 / g / 1e6, 2 * n * w / t / 1e9),
            lambda n, b, w, g, t: max(2 * n / g / 1e6, 2 * n * w / t / 1e9),
        ],
    },
    "16": {
        "my_rate": [
            lambda i, top, w, n: rate_of(i, top, w, n, first=0),
            lambda i, top, w, n: rate_of(i, top, w, n, floor=0),
            lambda i, top, w, n: rate_of(i, top, 0, n) if i >= w else rate_of(i, top, w, n),
            lambda i, top, w, n: rate_of(i, top, w, n, turns=2),
            lambda i, top, w, n: min(top * (i + 1) / w, top),
        ],
        "my_adamw": [
            lambda *x: adamw_step(*x, unbiased=False),
            lambda *x: adamw_step(*x, coupled=True),
            lambda *x: adamw_step(*x, root=False),
            lambda *x: adamw_step(*x, decays=False),
            lambda *x: adamw_step(*x)[0],
            lambda w, g, m, v, t, *x: adamw_step(w, g, m, v, t + 1, *x),
            lambda w, g, m, v, *x: (adamw_step(w, g, m, v, *x)[0], m, v),
        ],
        "my_direction": [
            lambda g: orthogonalized(g, norm=False),
            lambda g: orthogonalized(g, rounds=1),
            lambda g: orthogonalized(g, exact=True),
            lambda g: orthogonalized(g, size=min),
            lambda g: orthogonalized(g) / 0.2,
            lambda g: orthogonalized(g).T,
        ],
        "my_clip": [
            lambda gs, c: [clipped([g], c)[0] for g in gs],
            lambda gs, c: clipped(gs, c, always=True),
            lambda gs, c: clipped(gs, c, root=False),
            lambda gs, c: [g.clamp(-c, c) for g in gs],
            lambda gs, c: clipped(gs, 1.0),
        ],
        "my_iteration": [
            lambda g: iterated(g, norm=False),
            lambda g: iterated(g, rounds=4),
            lambda g: iterated(g, cubed=False),
            lambda g: iterated(g) * 0.2 * max(g.shape) ** 0.5,
            lambda g: torch.linalg.svd(g, full_matrices=False)[0],
        ],
        "my_loop": [
            lambda stage, n: looped(stage, n, first=True),
            lambda stage, n: looped(stage, n, clip=False),
            lambda stage, n: looped(stage, n, share=1.0),
            lambda stage, n: looped(stage, n, ahead=False),
            lambda stage, n: looped(stage, n, all_decay=True),
            lambda stage, n: looped(stage, n, everywhere=True),
            lambda stage, n: looped(stage, n)[:1],
        ],
        "my_lora": [
            lambda x, w, a, b, alpha: x @ w.T + alpha * (x @ a.T) @ b.T,
            lambda x, w, a, b, alpha: x @ w.T + (x @ a.T) @ b.T / len(a),
            lambda x, w, a, b, alpha: alpha / len(a) * (x @ a.T) @ b.T,
            lambda x, w, a, b, alpha: x @ w.T + alpha / len(b) * (x @ a.T) @ b.T,
            lambda x, w, a, b, alpha: alpha / len(a) * (x @ w.T + (x @ a.T) @ b.T),
        ],
    },
}
EXERCISES = [(number, name) for number, exercises in BUGS.items() for name in exercises]


def solutions(number: str) -> dict:
    return runpy.run_path(str(NOTEBOOKS / "solutions" / f"{number}.py"))


@pytest.fixture
def verdict(monkeypatch, capsys):
    """verdict(number, name, answer): what the notebook's own grader prints about an answer; None
    leaves the stub.
    """
    monkeypatch.chdir(NOTEBOOKS)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def judge(number, name, answer=None):
        codes = [cell for cell in cells(number) if cell.cell_type == "code"]
        grader = ast.parse(next(cell.source for cell in codes if name in stubs(cell.source)))
        calls = [
            i
            for i, node in enumerate(grader.body)
            if any(getattr(part, "id", "") == "grade" for part in ast.walk(node))
        ]
        del grader.body[calls[-1] + 1 :]  # what follows may need the cells before
        names = {}
        exec(codes[0].source, names)
        if answer is not None:
            grader.body = [node for node in grader.body if getattr(node, "name", "") != name]
            answer.__name__ = name  # of a lambda too: a grader looks its solution up by name
            names[name] = answer
        capsys.readouterr()
        exec(compile(grader, name, "exec"), names)
        return capsys.readouterr().out

    with torch.enable_grad():  # a notebook's first cell may turn gradients off for good
        yield judge


@pytest.mark.parametrize(("number", "name"), EXERCISES)
def test_the_solution_passes_and_the_stub_is_left_alone(number, name, verdict):
    assert "✓" in verdict(number, name, solutions(number)[name])
    assert verdict(number, name).endswith(": not attempted\n")


@pytest.mark.parametrize(("number", "name"), EXERCISES)
def test_bugs_are_refused(number, name, verdict):
    bugs = BUGS[number][name]
    assert len(bugs) >= 3
    assert [i for i, bug in enumerate(bugs) if "✗" not in verdict(number, name, bug)] == []


def test_every_exercise_is_tested_and_its_folded_solution_is_the_tested_one():
    numbers = [path.name[:2] for path in sorted(NOTEBOOKS.glob("*.ipynb"))]
    assert numbers == list(BUGS)
    for number in numbers:
        asked = [
            name
            for cell in cells(number)
            if cell.cell_type == "code"
            for name in stubs(cell.source)
        ]
        assert asked == list(BUGS[number])
        source = (NOTEBOOKS / "solutions" / f"{number}.py").read_text()
        text = "\n".join(cell.source for cell in cells(number) if cell.cell_type == "markdown")
        for node in ast.parse(source).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                assert ast.get_source_segment(source, node) in text, (
                    f"{number} folds another {node.name}"
                )


def test_a_solved_cell_is_the_cell_with_its_solution():
    """What conftest.py runs in each notebook behind the untouched exercise."""
    assert solved("def shortest(words): ...\ngrade(shortest)\nx = 1", "08").splitlines() == [
        "def shortest(text):",
        "    return len(text) + sum((a == b for a, b in zip(text, text[1:])))",
        "grade(shortest)",
        "x = 1",
    ]


def test_grade_shows_the_first_counter_example(capsys):
    grade(lambda x: 2 * x, ((0,), 0), ((1,), 3), ((2,), 9), minutes=1, difficulty=1)
    assert capsys.readouterr().out == "<lambda> (1 min, ★☆☆): ✗ <lambda>(1) gave 2, expected 3\n"
    grade(lambda x: x[5], (([1],), 0), minutes=1, difficulty=1)
    assert "raised IndexError" in capsys.readouterr().out
    grade(lambda x: "two", ((1,), 2), minutes=1, difficulty=1)
    assert "gave 'two', expected 2" in capsys.readouterr().out


def test_grade_tells_a_forgotten_return_from_a_stub_and_names_the_case(capsys):
    def stub(x):
        """Says what to do."""
        ...

    def forgetful(x):
        print(2 * x)

    grade(stub, ((1,), 2), minutes=1, difficulty=1)
    assert capsys.readouterr().out == "stub (1 min, ★☆☆): not attempted\n"
    grade(forgetful, ((1,), 2, "twice"), minutes=1, difficulty=1, importance=2)
    said = capsys.readouterr().out
    assert "importance ●●○): ✗ forgetful(1) returned nothing" in said
    assert said.endswith("(twice)\n")
    parts = (torch.ones(2), torch.zeros(2))
    grade(lambda: parts[::-1], ((), parts), minutes=1, difficulty=1)
    assert "as part 0: [0.0, 0.0], expected [1.0, 1.0]" in capsys.readouterr().out
    about = {"minutes": 1, "difficulty": 1, "parts": ("output", "weights")}
    grade(lambda: parts[::-1], ((), parts), **about)
    said = capsys.readouterr().out
    assert "as output: [0.0, 0.0], expected [1.0, 1.0]; as weights: [1.0, 1.0], expected" in said


def test_grade_shows_where_long_answers_differ_and_few_digits_of_arguments(capsys):
    text = "".join(map(str, range(99)))
    grade(lambda: f"{text}a", ((), f"{text}b"), minutes=1, difficulty=1)
    end = text[-20:]
    assert f"gave ...{end}a', expected ...{end}b'" in capsys.readouterr().out
    grade(lambda x: x, ((torch.tensor([1 / 3, 1e-6]),), [0.0, 0.0]), minutes=1, difficulty=1)
    assert "<lambda>([0.3333, 1e-06]) gave [0.3333, 0.0]" in capsys.readouterr().out


def test_grade_asks_for_gradients(capsys):
    def cubed(x, factor):
        return factor * x**3

    def cut_off(x, factor):
        return (factor * x**3).detach()

    case = ((torch.tensor([1.0, 2.0]), 2), Gradient([6.0, 24.0]), "the slope")
    with torch.no_grad():
        grade(cubed, case, minutes=1, difficulty=1)
        grade(cut_off, case, minutes=1, difficulty=1)
    said = capsys.readouterr().out.splitlines()
    assert said[0].endswith("✓ 1 cases")
    assert said[1].endswith("gave [0.0, 0.0], expected [6.0, 24.0] (the slope)")


def test_grade_goes_on_with_the_solution_until_the_answer_passes():
    def heard_at(hz, rate):
        return min(hz % rate, rate - hz % rate)

    case = ((9_000, 16_000), 7_000)
    about = {"minutes": 1, "difficulty": 1, "chapter": "01"}
    assert grade(heard_at, case, **about) is heard_at
    solved_one = grade(heard_at, ((9_000, 16_000), 1), **about)
    assert solved_one is not heard_at
    assert solved_one(9_000, 16_000) == 7_000


def test_grade_keeps_its_cases_from_being_changed(capsys):
    x = torch.ones(2)
    grade(lambda t: t.mul_(2), ((x,), [2.0, 2.0]), ((x,), [2.0, 2.0]), minutes=1, difficulty=1)
    assert "✓ 2 cases" in capsys.readouterr().out
    assert x.tolist() == [1, 1]


def test_grade_refuses_an_answer_that_changes_its_arguments_where_they_must_stay(capsys):
    def double(x):
        return x.mul_(2)

    case = ((torch.ones(2),), [2.0, 2.0], "twice")
    grade(double, case, minutes=1, difficulty=1)
    assert "✓ 1 cases" in capsys.readouterr().out
    grade(double, case, minutes=1, difficulty=1, keeps=True)
    assert "✗ double([1.0, 1.0]) is right, but has changed `x` itself" in capsys.readouterr().out
    grade(lambda x: 2 * x, case, minutes=1, difficulty=1, keeps=True)
    assert "✓ 1 cases" in capsys.readouterr().out


def test_same_states_what_was_met_and_raises_on_any_difference(capsys):
    same("x", torch.ones(2, 3), torch.ones(2, 3) + 1e-7)
    same("n", [1, 2], torch.tensor([1, 2]))
    assert (
        capsys.readouterr().out == "x [2, 3] same ✓ (max|Δ| ≤ 1e-6)\nn [2] same ✓ (every number)\n"
    )
    x = torch.ones(2)
    for mine, theirs, complaint in (
        (x, x, "itself"),
        (x, torch.ones(3), "shape"),
        (x, x + 1e-5, "expected"),
        ([1, 2], [1, 3], r"2 at \[1\], expected 3"),
        (x * math.nan, x, "nan"),
    ):
        with pytest.raises(AssertionError, match=complaint):
            same("x", mine, theirs)


def test_show_prints_the_file(capsys):
    show(same)
    assert capsys.readouterr().out.startswith("def same(name: str, mine")
