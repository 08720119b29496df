"""The generated world: its language, its pictures and clips, and what can be asked about them. Seeded; no download.

Sentences are told apart by their text alone: one in ten is held out for ever, by a hash that no seed can move.
"""

import zlib
from dataclasses import dataclass, field
from random import Random

import numpy as np
from PIL import Image, ImageDraw

from ..config import LISTENING_RATE

COLORS = {
    "red": (214, 40, 40),
    "green": (44, 160, 44),
    "blue": (40, 80, 220),
    "yellow": (240, 200, 20),
    "black": (20, 20, 20),
    "white": (250, 250, 250),
}
SHAPES = ("circle", "square", "triangle", "cross")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
MOVES = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
SCENE_SIZE, CLIP_SIZE = 112, 84  # pixels
CLIP_FPS = 2.0

# How each voice is made: espeak-ng voice. The first four are the voices the model speaks with.
VOICES = {"Anna": "en-us+f5", "Karl": "en-us+klatt", "Fiona": "en-us+f3", "Adam": "en-us+adam"}
LISTENING_VOICES = {**VOICES, "Mike": "en-us+m1", "Max": "en-us+m3", "Nora": "en-us+f4", "Paul": "en-us"}
UNSEEN_VOICES = {"Faye": "en-us+f1", "Klaus": "en-us+klatt2"}  # heard in tests only

# Every sentence the language has, as a grammar: the judge of speech listens with the same one.
GRAMMAR = {
    "color": tuple(COLORS),
    "shape": SHAPES,
    "number": NUMBERS,
    "relation": tuple(RELATIONS),
    "move": tuple(MOVES),
    "count": ("there is one shape", "there are two shapes", "there are three shapes"),
}
STATEMENTS = (
    "the <color> <shape> is <relation> the <color> <shape>",
    "the <color> <shape> moves <move>",
    "the <shape> is <color>",
    "the <color> shape is a <shape>",
    "a <color> <shape> and a <color> <shape>",
    "the digit is <number>",
    "<count>",
    "it was the <color> <shape>",
)
QUESTIONS = (
    "what color is the <shape>",
    "which shape is <color>",
    "how many shapes are there",
    "where is the <color> <shape>",
    "what do you see",
    "which digit is this",
    "where does the shape go",
    "what was there at the sound",
)


@dataclass
class Example:
    """One thing to learn: what is asked (typed, or spoken where a voice is named), what is seen, what is right."""

    question: str
    answer: str
    voice: str | None = None  # who speaks the question; None is typed
    image: Image.Image | None = None
    clip: tuple | None = None  # frames uint8 [n, H, W, 3] and their rate (frames per second)
    sound: np.ndarray | None = None  # the clip's sound track, float32 [samples] at 16 kHz
    heard: str | None = None  # what the recording says, where it is not the question
    objects: list[list[tuple]] = field(
        default_factory=list
    )  # by grid step: color, shape, (x, y), radius of what is seen
    sound_at: float | None = None  # seconds into the clip
    kind: str = ""


def held_out(text: str) -> bool:
    """Whether a sentence belongs to the tenth that is never trained on."""
    return zlib.crc32(text.encode()) % 10 == 0


def fill(template: str, random: Random) -> str:
    """Replace every <name> of a template by one of its words."""
    while "<" in template:
        name = template[template.index("<") + 1 : template.index(">")]
        template = template.replace(f"<{name}>", random.choice(GRAMMAR[name]), 1)
    return template


def statement(random: Random, held: bool) -> str:
    """A statement of the language, from the held-out tenth or from the rest."""
    while True:
        text = fill(random.choices(STATEMENTS, weights=(6, 3, 1, 1, 4, 1, 1, 1))[0], random)
        if held_out(text) == held:
            return text


def expand(template: str) -> list[str]:
    """Every text that a template stands for."""
    if "<" not in template:
        return [template]
    name = template[template.index("<") + 1 : template.index(">")]
    return [t for word in GRAMMAR[name] for t in expand(template.replace(f"<{name}>", word, 1))]


def every_question() -> list[str]:
    """All questions there are; few, so none is held out: what is asked about is."""
    return [text for template in QUESTIONS for text in expand(template)]


# ---------------------------------------------------------------------------------------------- things to see


def draw(draw_on: ImageDraw.ImageDraw, shape: str, color: str, centre: tuple[float, float], radius: float) -> None:
    """Draw one shape of the world."""
    x, y = centre
    box, fill_with = (x - radius, y - radius, x + radius, y + radius), COLORS[color]
    if shape == "circle":
        draw_on.ellipse(box, fill=fill_with)
    elif shape == "square":
        draw_on.rectangle(box, fill=fill_with)
    elif shape == "triangle":
        draw_on.polygon([(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)], fill=fill_with)
    else:
        draw_on.line((x - radius, y, x + radius, y), fill=fill_with, width=int(radius * 0.7))
        draw_on.line((x, y - radius, x, y + radius), fill=fill_with, width=int(radius * 0.7))


def blank(side: int, random: Random) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """An empty picture on a background that no shape is coloured like."""
    grey = random.randint(110, 190)
    image = Image.new("RGB", (side, side), (grey, grey + random.randint(-8, 8), grey + random.randint(-8, 8)))
    return image, ImageDraw.Draw(image)


def things(random: Random, n: int) -> list[tuple[str, str]]:
    """n (color, shape) pairs in which no color and no shape occurs twice, so that each names one thing."""
    return list(zip(random.sample(list(COLORS), n), random.sample(SHAPES, n)))


def scene(random: Random) -> Example:
    """A picture with one to three shapes and a question about it."""
    kind = random.choice(("color", "shape", "count", "relation", "describe"))
    n = 2 if kind in ("relation", "describe") else random.randint(1, 3)
    objects = things(random, n)
    image, pen = blank(SCENE_SIZE, random)
    relation = random.choice(list(RELATIONS))
    dx, dy = RELATIONS["right of" if kind == "describe" else relation]
    third = SCENE_SIZE / 3
    if n == 2:
        a, b = [(SCENE_SIZE / 2 + s * dx * third * 0.75, SCENE_SIZE / 2 + s * dy * third * 0.75) for s in (1, -1)]
        places = [b, a] if kind == "describe" else [a, b]
    else:
        cells = random.sample([(i, j) for i in range(3) for j in range(3)], n)
        places = [((i + 0.5) * third, (j + 0.5) * third) for i, j in cells]
    drawn = [
        (color, shape, (x + random.uniform(-5, 5), y + random.uniform(-5, 5)), random.uniform(10, 15))
        for (color, shape), (x, y) in zip(objects, places)
    ]
    for color, shape, centre, radius in drawn:
        draw(pen, shape, color, centre, radius)
    (c0, s0), (c1, s1) = objects[0], objects[-1]
    question, answer = {
        "color": (f"what color is the {s0}", f"the {s0} is {c0}"),
        "shape": (f"which shape is {c0}", f"the {c0} shape is a {s0}"),
        "count": ("how many shapes are there", GRAMMAR["count"][n - 1]),
        "relation": (f"where is the {c0} {s0}", f"the {c0} {s0} is {relation} the {c1} {s1}"),
        "describe": ("what do you see", f"a {c0} {s0} and a {c1} {s1}"),
    }[kind]
    return Example(question, answer, image=image, objects=[drawn], kind="scene")


def handwriting(random: Random, digits: tuple[np.ndarray, np.ndarray]) -> Example:
    """A real handwritten digit (scikit-learn's), 8x8 grey levels enlarged to 56x56."""
    images, labels = digits
    i = random.randrange(len(labels))
    grey = Image.fromarray((255 - images[i] * (255 / 16)).astype(np.uint8)).resize((56, 56), Image.Resampling.BICUBIC)
    return Example(
        "which digit is this", f"the digit is {NUMBERS[labels[i]]}", image=grey.convert("RGB"), kind="handwriting"
    )


def digits(held: bool) -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's 1,797 handwritten digits -> images [n, 8, 8] and labels [n]; every fifth is held out."""
    from sklearn.datasets import load_digits

    data = load_digits()
    chosen = (np.arange(len(data.target)) % 5 == 0) == held
    return data.images[chosen], data.target[chosen]


def film(steps: list[list[tuple]], random: Random) -> tuple[np.ndarray, float]:
    """Frames of a clip, given what is seen in each -> uint8 [n, CLIP_SIZE, CLIP_SIZE, 3] and their rate."""
    background, frames = random.randint(0, 1 << 30), []
    for things_seen in steps:
        image, pen = blank(CLIP_SIZE, Random(background))
        for color, shape, centre, radius in things_seen:
            draw(pen, shape, color, centre, radius)
        frames.append(np.asarray(image))
    return np.stack(frames), CLIP_FPS


def moving(random: Random) -> Example:
    """A silent clip of one shape that moves."""
    (color, shape), move = things(random, 1)[0], random.choice(list(MOVES))
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
        clip=film([[(color, shape, place, 12)] for place in places], random),
        objects=[[(color, shape, place, 12)] for place in halfway],
        kind="video",
    )


def sounding(random: Random) -> Example:
    """A clip in which two shapes show one after the other, with a sound while one of them is there."""
    first, second = ((*thing, (CLIP_SIZE / 2, CLIP_SIZE / 2), 16) for thing in things(random, 2))
    n = random.choice((4, 6, 8))
    change = random.randrange(1, n // 2) * 2  # between two grid steps, so that no frame pair holds both
    steps = [[first if i < change else second] for i in range(n)]
    early = random.random() < 0.5
    begin, end = (0.0, change / CLIP_FPS) if early else (change / CLIP_FPS, n / CLIP_FPS)
    at = random.uniform(begin + 0.1, end - 0.5)
    color, shape, *_ = first if early else second
    return Example(
        "what was there at the sound",
        f"it was the {color} {shape}",
        clip=film(steps, random),
        objects=steps[::2],
        sound=tone(random, n / CLIP_FPS, at),
        sound_at=at,
        kind="sync",
    )


def tone(random: Random, seconds: float, at: float) -> np.ndarray:
    """Quiet noise of some length with one beep of 0.3 s -> float32 [samples] at 16 kHz."""
    noise = np.random.RandomState(random.randrange(1 << 31))
    wave = 0.003 * noise.randn(int(seconds * LISTENING_RATE))
    t = np.arange(int(0.3 * LISTENING_RATE)) / LISTENING_RATE
    start = int(at * LISTENING_RATE)
    wave[start : start + len(t)] += 0.3 * np.sin(2 * np.pi * random.uniform(400, 1200) * t) * np.hanning(len(t))
    return wave.astype(np.float32)
