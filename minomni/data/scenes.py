"""The generated world's pictures, clips and sounds, each with the questions that it answers."""

from dataclasses import dataclass, field
from random import Random

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from minomni.config import LISTENING_RATE
from minomni.data.grammar import COLORS, GRAMMAR, MOVES, NUMBERS, RELATIONS, SHAPES

SCENE_SIZE, CLIP_SIZE = 112, 84  # pixels
PAIR_SECONDS = (
    0.6,
    1.4,
)  # how long two frames of a clip that belong together last: each pair another time
LONG_PAIR_SECONDS, LONG_PAIRS = (1.0, 1.85), 32  # in long clips, and how many they have at most

ASKED = ("color", "shape", "count", "relation", "describe")  # kinds of questions about a picture


@dataclass
class Example:
    """One thing to learn: what is asked (typed, or spoken where a voice is named), what is seen,
    what is right.
    """

    question: str
    answer: str
    voice: str | None = None  # who speaks the question; None is typed
    image: Image.Image | None = None
    clip: tuple | None = (
        None  # frames uint8 [n, H, W, 3] and when each is shown, float32 [n] in seconds
    )
    sound: np.ndarray | None = None  # the clip's sound track, float32 [samples] at 16 kHz
    heard: str | None = None  # what the recording says, where it is not the question
    wave: Tensor | None = (
        None  # the recording, where it is none of the corpus, float32 [samples] at 16 kHz
    )
    objects: list[list[tuple]] = field(
        default_factory=list
    )  # by grid step: color, shape, (x, y), radius of what is seen
    sound_at: float | None = None  # seconds into the clip
    more: list[tuple[str, str]] = field(
        default_factory=list
    )  # what else can be asked about it, with the answers
    kind: str = ""


# ----------------------------------------------------------------------------------------------
# things to see


def draw(
    draw_on: ImageDraw.ImageDraw, shape: str, color: str, centre: tuple[float, float], radius: float
) -> None:
    """Draw one shape of the world."""
    x, y = centre
    box, fill_with = (x - radius, y - radius, x + radius, y + radius), COLORS[color]
    if shape == "circle":
        draw_on.ellipse(box, fill=fill_with)
    elif shape == "square":
        draw_on.rectangle(box, fill=fill_with)
    elif shape == "triangle":
        draw_on.polygon(
            [(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], fill=fill_with
        )
    else:
        draw_on.line((x - radius, y, x + radius, y), fill=fill_with, width=int(radius * 0.7))
        draw_on.line((x, y - radius, x, y + radius), fill=fill_with, width=int(radius * 0.7))


def blank(side: int, random: Random) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """An empty picture on a background that no shape is coloured like."""
    grey = random.randint(110, 190)
    image = Image.new(
        "RGB", (side, side), (grey, grey + random.randint(-8, 8), grey + random.randint(-8, 8))
    )
    return image, ImageDraw.Draw(image)


def random_objects(random: Random, n: int) -> list[tuple[str, str]]:
    """n (color, shape) pairs in which no color and no shape occurs twice, so that each names one
    thing.
    """
    return list(zip(random.sample(list(COLORS), n), random.sample(SHAPES, n)))


def scene(random: Random) -> Example:
    """A picture with one to three shapes and a question about it."""
    kind = random.choices(ASKED, weights=(3, 1, 1, 2, 1))[0]
    n = 2 if kind in ("relation", "describe") else random.randint(1, 3)
    objects = random_objects(random, n)
    if (
        kind in ("relation", "describe") and random.random() < 0.5
    ):  # only the shape tells the two apart
        objects[1] = (objects[0][0], objects[1][1])
    image, pen = blank(SCENE_SIZE, random)
    relation = random.choice(["left of", "right of"] if kind == "describe" else list(RELATIONS))
    dx, dy = RELATIONS[relation]
    third = SCENE_SIZE / 3
    if n == 2:
        places = [
            (SCENE_SIZE / 2 + s * dx * third * 0.75, SCENE_SIZE / 2 + s * dy * third * 0.75)
            for s in (1, -1)
        ]
    else:
        cells = random.sample([(i, j) for i in range(3) for j in range(3)], n)
        places = [((i + 0.5) * third, (j + 0.5) * third) for i, j in cells]
    drawn = [
        (
            color,
            shape,
            (x + random.uniform(-5, 5), y + random.uniform(-5, 5)),
            random.uniform(10, 15),
        )
        for (color, shape), (x, y) in zip(objects, places)
    ]
    for color, shape, centre, radius in drawn:
        draw(pen, shape, color, centre, radius)
    asked = questions_about(objects, relation if n == 2 else None)
    question, answer = random.choice(asked[kind])
    more = [pair for pairs in asked.values() for pair in pairs if pair[0] != question]
    return Example(question, answer, image=image, objects=[drawn], more=more, kind="scene")


def questions_about(
    objects: list[tuple[str, str]], relation: str | None
) -> dict[str, list[tuple[str, str]]]:
    """All that can be asked about a picture's (color, shape) things, by kind: questions with their
    answers.

    relation: of the first thing to the second, where there are two. A color that two things share
    names neither.
    """
    colors = [color for color, _ in objects]
    asked = {
        "color": [
            (f"what color is the {shape}", f"the {shape} is {color}") for color, shape in objects
        ],
        "shape": [
            (f"which shape is {color}", f"the {color} shape is a {shape}")
            for color, shape in objects
            if colors.count(color) == 1
        ],
        "count": [("how many shapes are there", GRAMMAR["count"][len(objects) - 1])],
    }
    if relation:
        there = [" ".join(thing) for thing in objects]
        back = next(
            name
            for name, step in RELATIONS.items()
            if step == tuple(-x for x in RELATIONS[relation])
        )
        asked["relation"] = [
            (f"where is the {a}", f"the {a} is {which} the {b}")
            for a, b, which in ((*there, relation), (*there[::-1], back))
        ]
        if relation in ("left of", "right of"):
            left, right = there if relation == "left of" else there[::-1]
            asked["describe"] = [("what do you see", f"a {left} and a {right}")]
    return asked


def handwriting(random: Random, digits: tuple[np.ndarray, np.ndarray]) -> Example:
    """A real handwritten digit (scikit-learn's), 8x8 grey levels enlarged to 56x56."""
    images, labels = digits
    i = random.randrange(len(labels))
    grey = Image.fromarray((255 - images[i] * (255 / 16)).astype(np.uint8)).resize(
        (56, 56), Image.Resampling.BICUBIC
    )
    return Example(
        "which digit is this",
        f"the digit is {NUMBERS[labels[i]]}",
        image=grey.convert("RGB"),
        kind="handwriting",
    )


def digits(held: bool) -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's 1,797 handwritten digits -> images [n, 8, 8] and labels [n]; every fifth is
    held out.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    chosen = (np.arange(len(data.target)) % 5 == 0) == held
    return data.images[chosen], data.target[chosen]


def draw_clip(
    steps: list[list[tuple]], random: Random, pair_seconds=PAIR_SECONDS
) -> tuple[np.ndarray, np.ndarray]:
    """What is seen in each frame -> uint8 [n, CLIP_SIZE, CLIP_SIZE, 3] and when it is shown,
    float32 [n] in seconds.

    Frames come in pairs of chance length; within a pair the second frame is shown half-way.
    """
    background, frames = random.randint(0, 1 << 30), []
    for things_seen in steps:
        image, pen = blank(CLIP_SIZE, Random(background))
        for color, shape, centre, radius in things_seen:
            draw(pen, shape, color, centre, radius)
        frames.append(np.asarray(image))
    halves = np.repeat([random.uniform(*pair_seconds) / 2 for _ in range(len(steps) // 2)], 2)
    return np.stack(frames), np.concatenate([[0.0], np.cumsum(halves)[:-1]]).astype(np.float32)


def moving_clip(random: Random) -> Example:
    """A silent clip of one shape that moves."""
    (color, shape), move = random_objects(random, 1)[0], random.choice(list(MOVES))
    dx, dy = MOVES[move]
    n, middle, off = random.choice((4, 6, 8)), CLIP_SIZE / 2, random.uniform(-14, 14)
    along = [(i / (n - 1) - 0.5) * CLIP_SIZE * 0.5 for i in range(n)]
    places = [(middle + dx * a + off * abs(dy), middle + dy * a + off * abs(dx)) for a in along]
    halfway = [
        tuple((p + q) / 2 for p, q in zip(*places[i : i + 2])) for i in range(0, n, 2)
    ]  # of the two frames of a step
    return Example(
        "where does the shape go",
        f"the {color} {shape} moves {move}",
        clip=draw_clip([[(color, shape, place, 12)] for place in places], random),
        objects=[[(color, shape, place, 12)] for place in halfway],
        kind="video",
    )


def shown_in_order(random: Random, count: int, n: int) -> tuple[list[list[tuple]], list[int]]:
    """Things that show one after the other in n frames -> what is seen in each frame, where each
    thing begins.

    Things change between two pairs of frames, so that none holds both.
    """
    shown = [
        (*thing, (CLIP_SIZE / 2, CLIP_SIZE / 2), 16) for thing in random_objects(random, count)
    ]
    begins = [0, *sorted(2 * pair for pair in random.sample(range(1, n // 2), count - 1))]
    return [[shown[sum(i >= begin for begin in begins) - 1]] for i in range(n)], begins


def ordered_clip(random: Random) -> Example:
    """A silent clip in which two shapes show one after the other, and which of them was first, or
    last.
    """
    steps, _ = shown_in_order(random, 2, random.choice((4, 6, 8)))
    return first_or_last(steps, draw_clip(steps, random), random)


def long_clip(random: Random, pairs: int) -> Example:
    """The same with two to four shapes in many pairs of frames: LONG_PAIRS of them last up to a
    minute.
    """
    steps, _ = shown_in_order(random, random.randint(2, 4), 2 * pairs)
    return first_or_last(steps, draw_clip(steps, random, LONG_PAIR_SECONDS), random)


def first_or_last(steps: list[list[tuple]], clip: tuple, random: Random) -> Example:
    """The question which thing of a clip was the first, or the last; the other one is left to ask."""
    asked = order_of(steps)
    question, answer = random.choice(asked)
    other = [pair for pair in asked if pair[0] != question]
    return Example(question, answer, clip=clip, objects=steps[::2], more=other, kind="video")


def order_of(steps: list[list[tuple]]) -> list[tuple[str, str]]:
    """What can be asked about the order of a clip's things, with the answers."""
    said = [f"it was the {color} {shape}" for ((color, shape, *_),) in (steps[0], steps[-1])]
    return list(zip(("what was there first", "what was there last"), said))


def clip_with_tone(random: Random) -> Example:
    """A clip in which two shapes show one after the other, with a sound while one of them is there.

    What is asked is which; what was first and what was last is left to ask.
    """
    steps, (_, change) = shown_in_order(random, 2, random.choice((4, 6, 8)))
    frames, seconds = draw_clip(steps, random)
    whole = seconds[-1] + (seconds[-1] - seconds[-2])
    second = random.random() < 0.5
    begin, end = (seconds[change], whole) if second else (0.0, seconds[change])
    at = float(random.uniform(begin + 0.05, end - 0.35))
    color, shape, *_ = steps[-1 if second else 0][0]
    return Example(
        "what was there at the sound",
        f"it was the {color} {shape}",
        clip=(frames, seconds),
        objects=steps[::2],
        sound=tone(random, whole, at),
        sound_at=at,
        more=order_of(steps),
        kind="sync",
    )


def tone(random: Random, seconds: float, at: float) -> np.ndarray:
    """Quiet noise of some length with one beep of 0.3 s -> float32 [samples] at 16 kHz."""
    noise = np.random.RandomState(random.randrange(1 << 31))
    wave = 0.003 * noise.randn(int(seconds * LISTENING_RATE))
    t = np.arange(int(0.3 * LISTENING_RATE)) / LISTENING_RATE
    start = int(at * LISTENING_RATE)
    wave[start : start + len(t)] += (
        0.3 * np.sin(2 * np.pi * random.uniform(400, 1200) * t) * np.hanning(len(t))
    )
    return wave.astype(np.float32)
