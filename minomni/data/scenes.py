"""The generated world's images, clips and audio, each with questions about it and answers."""

from dataclasses import dataclass, field
from random import Random
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from minomni.config import INPUT_SAMPLE_RATE
from minomni.data.grammar import COLORS, GRAMMAR, MOVES, NUMBERS, RELATIONS, SHAPES

SCENE_SIZE = 112  # pixels, side of an image
CLIP_SIZE = 84  # pixels, side of a frame
# The frames of a clip come in pairs. Seconds that a pair lasts, drawn for each pair.
PAIR_SECONDS = (0.6, 1.4)
LONG_PAIR_SECONDS = (1.0, 1.85)  # in long clips
LONG_PAIRS = 32  # most pairs in a long clip
FRAMES = (4, 6, 8)  # number of frames of a short clip
TONE_SECONDS = 0.3

# Kinds of questions about an image, and how often each is drawn.
QUESTION_WEIGHTS = {"color": 3, "shape": 1, "count": 1, "relation": 2, "describe": 1}
TWO_OBJECT_QUESTIONS = ("relation", "describe")

Point = tuple[float, float]  # x, y in pixels
QuestionAnswer = tuple[str, str]
# Frames uint8 [n, H, W, 3], and the time in seconds of each, float32 [n].
TimedFrames = tuple[np.ndarray, np.ndarray]


class SceneObject(NamedTuple):
    """One shape in an image or frame, in pixels."""

    color: str
    shape: str
    center: Point
    radius: float


Frame = list[SceneObject]  # what is visible in an image or in a frame of a clip


@dataclass
class Example:
    """One training example: a question (typed, or spoken if a voice is named), media, an answer."""

    question: str
    answer: str
    voice: str | None = None  # who speaks the question; None if it is typed
    image: Image.Image | None = None
    clip: TimedFrames | None = None
    sound: np.ndarray | None = None  # the clip's audio track, float32 [samples] at 16 kHz
    transcript: str | None = None  # text of the recording, if it is not the question
    # The recording, if it is not from the corpus, float32 [samples] at 16 kHz.
    wave: Tensor | None = None
    objects: list[Frame] = field(default_factory=list)  # what is visible at each grid step
    tone_start_s: float | None = None  # when the tone starts, seconds into the clip
    follow_ups: list[QuestionAnswer] = field(default_factory=list)  # other questions, with answers
    kind: str = ""


# ----------------------------------------------------------------------------------------------
# images


def draw_shape(
    draw_on: ImageDraw.ImageDraw, shape: str, color: str, center: Point, radius: float
) -> None:
    """Draw one shape of the world."""
    x, y = center
    box = (x - radius, y - radius, x + radius, y + radius)
    rgb = COLORS[color]
    if shape == "circle":
        draw_on.ellipse(box, fill=rgb)
    elif shape == "square":
        draw_on.rectangle(box, fill=rgb)
    elif shape == "triangle":
        corners = [(x, y - radius), (x - radius, y + radius), (x + radius, y + radius)]
        draw_on.polygon(corners, fill=rgb)
    else:
        width = int(radius * 0.7)
        draw_on.line((x - radius, y, x + radius, y), fill=rgb, width=width)
        draw_on.line((x, y - radius, x, y + radius), fill=rgb, width=width)


def blank_image(side: int, random: Random) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """An empty image whose background differs from the color of every shape."""
    red = random.randint(110, 190)
    green = red + random.randint(-8, 8)
    blue = red + random.randint(-8, 8)
    image = Image.new("RGB", (side, side), (red, green, blue))
    return image, ImageDraw.Draw(image)


def random_objects(random: Random, n: int) -> list[tuple[str, str]]:
    """n (color, shape) pairs. No color or shape occurs twice, so each names one object."""
    colors = random.sample(list(COLORS), n)
    shapes = random.sample(SHAPES, n)
    return list(zip(colors, shapes, strict=True))


def random_scene(random: Random) -> Example:
    """An image with one to three shapes and a question about it."""
    # The question decides how many objects there are.
    kind = random.choices(list(QUESTION_WEIGHTS), weights=list(QUESTION_WEIGHTS.values()))[0]
    needs_two = kind in TWO_OBJECT_QUESTIONS
    n = 2 if needs_two else random.randint(1, 3)
    objects = random_objects(random, n)
    if needs_two and random.random() < 0.5:
        # One color for both: only the shape tells them apart.
        objects[1] = (objects[0][0], objects[1][1])

    # Place and draw the objects.
    image, pen = blank_image(SCENE_SIZE, random)
    relation = random.choice(["left of", "right of"] if kind == "describe" else list(RELATIONS))
    centers = related_centers(relation) if n == 2 else random_cells(random, n)
    placed = [
        random_placement(random, color, shape, center)
        for (color, shape), center in zip(objects, centers, strict=True)
    ]
    for color, shape, center, radius in placed:
        draw_shape(pen, shape, color, center, radius)

    # Ask one question; all others about the image are follow-ups.
    questions = questions_about(objects, relation if n == 2 else None)
    question, answer = random.choice(questions[kind])
    pairs = sum(questions.values(), [])
    more = [pair for pair in pairs if pair[0] != question]
    return Example(question, answer, image=image, objects=[placed], follow_ups=more, kind="scene")


def related_centers(relation: str) -> list[Point]:
    """Centers of two objects, the first of which stands in a relation to the second."""
    dx, dy = RELATIONS[relation]
    middle = SCENE_SIZE / 2
    third = SCENE_SIZE / 3
    first = (middle + dx * third * 0.75, middle + dy * third * 0.75)
    second = (middle - dx * third * 0.75, middle - dy * third * 0.75)
    return [first, second]


def random_cells(random: Random, n: int) -> list[Point]:
    """Centers of n different cells of a 3 x 3 grid."""
    third = SCENE_SIZE / 3
    cells = [divmod(index, 3) for index in range(9)]
    return [((i + 0.5) * third, (j + 0.5) * third) for i, j in random.sample(cells, n)]


def random_placement(random: Random, color: str, shape: str, center: Point) -> SceneObject:
    """An object of random size near a point."""
    x = center[0] + random.uniform(-5, 5)
    y = center[1] + random.uniform(-5, 5)
    return SceneObject(color, shape, (x, y), random.uniform(10, 15))


def questions_about(
    objects: list[tuple[str, str]], relation: str | None
) -> dict[str, list[QuestionAnswer]]:
    """All questions about an image's (color, shape) objects, by kind, with their answers.

    relation: of the first object to the second, if there are two. A color that two objects share
    names neither.
    """
    colors = [color for color, _ in objects]
    questions: dict[str, list[QuestionAnswer]] = {"color": [], "shape": []}
    for color, shape in objects:
        questions["color"].append((f"what color is the {shape}", f"the {shape} is {color}"))
        if colors.count(color) == 1:
            answer = f"the {color} shape is a {shape}"
            questions["shape"].append((f"which shape is {color}", answer))
    questions["count"] = [("how many shapes are there", GRAMMAR["count"][len(objects) - 1])]
    if relation is None:
        return questions

    # Each of two objects can be located by the other.
    first, second = (f"{color} {shape}" for color, shape in objects)
    inverse = inverse_relation(relation)
    questions["relation"] = [
        (f"where is the {first}", f"the {first} is {relation} the {second}"),
        (f"where is the {second}", f"the {second} is {inverse} the {first}"),
    ]
    # A description goes from left to right.
    if relation == "left of":
        questions["describe"] = [("what do you see", f"a {first} and a {second}")]
    if relation == "right of":
        questions["describe"] = [("what do you see", f"a {second} and a {first}")]
    return questions


def inverse_relation(relation: str) -> str:
    """The relation of B to A, given that of A to B."""
    dx, dy = RELATIONS[relation]
    return next(name for name, step in RELATIONS.items() if step == (-dx, -dy))


def handwriting(random: Random, digits: tuple[np.ndarray, np.ndarray]) -> Example:
    """A real handwritten digit of scikit-learn: 8x8 gray levels enlarged to 56x56."""
    images, labels = digits
    i = random.randrange(len(labels))
    gray = (255 - images[i] * (255 / 16)).astype(np.uint8)
    enlarged = Image.fromarray(gray).resize((56, 56), Image.Resampling.BICUBIC)
    return Example(
        "which digit is this",
        f"the digit is {NUMBERS[labels[i]]}",
        image=enlarged.convert("RGB"),
        kind="handwriting",
    )


def handwritten_digits(held_out: bool) -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's 1,797 handwritten digits -> images [n, 8, 8] and labels [n].

    Every fifth is held out.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    is_held_out = np.arange(len(data.target)) % 5 == 0
    chosen = is_held_out == held_out
    return data.images[chosen], data.target[chosen]


# ----------------------------------------------------------------------------------------------
# clips


def draw_clip(
    frames: list[Frame], random: Random, pair_seconds: tuple[float, float] = PAIR_SECONDS
) -> TimedFrames:
    """The objects of each frame -> pixels [n, CLIP_SIZE, CLIP_SIZE, 3] and times.

    Frames come in pairs of random duration. The second frame of a pair follows half-way.
    """
    # All frames have the same background.
    background = random.randint(0, 1 << 30)
    images = []
    for objects in frames:
        image, pen = blank_image(CLIP_SIZE, Random(background))
        for color, shape, center, radius in objects:
            draw_shape(pen, shape, color, center, radius)
        images.append(np.asarray(image))
    # A frame is shown until the next one; both frames of a pair for the same time.
    pairs = len(frames) // 2
    half_pairs = [random.uniform(*pair_seconds) / 2 for _ in range(pairs)]
    ends = np.cumsum(np.repeat(half_pairs, 2))
    times = np.concatenate([[0.0], ends[:-1]])
    return np.stack(images), times.astype(np.float32)


def moving_clip(random: Random) -> Example:
    """A silent clip of one shape that moves."""
    ((color, shape),) = random_objects(random, 1)
    move = random.choice(list(MOVES))
    n = random.choice(FRAMES)
    centers = path_centers(move, n, offset=random.uniform(-14, 14))
    frames = [[SceneObject(color, shape, center, 12)] for center in centers]
    # A grid step covers two frames: its object is half-way between the two positions.
    steps = []
    for (x0, y0), (x1, y1) in zip(centers[::2], centers[1::2], strict=True):
        midpoint = ((x0 + x1) / 2, (y0 + y1) / 2)
        steps.append([SceneObject(color, shape, midpoint, 12)])
    return Example(
        "where does the shape go",
        f"the {color} {shape} moves {move}",
        clip=draw_clip(frames, random),
        objects=steps,
        kind="video",
    )


def path_centers(move: str, n: int, offset: float) -> list[Point]:
    """Centers of a shape in n frames, moving through the frame's middle, shifted sideways."""
    dx, dy = MOVES[move]
    middle = CLIP_SIZE / 2
    centers = []
    for i in range(n):
        distance = (i / (n - 1) - 0.5) * CLIP_SIZE * 0.5
        x = middle + dx * distance + offset * abs(dy)
        y = middle + dy * distance + offset * abs(dx)
        centers.append((x, y))
    return centers


def shown_in_order(random: Random, count: int, n: int) -> tuple[list[Frame], list[int]]:
    """`count` objects shown one after the other in n frames -> the objects of each frame, and the
    first frame of each object.

    Objects change between two pairs of frames, so no pair holds two.
    """
    middle = (CLIP_SIZE / 2, CLIP_SIZE / 2)
    shown = [
        SceneObject(color, shape, middle, 16) for color, shape in random_objects(random, count)
    ]
    changes = sorted(random.sample(range(1, n // 2), count - 1))
    begins = [0, *(2 * pair for pair in changes)]

    # Each object is visible until the next one.
    ends = [*begins[1:], n]
    frames: list[Frame] = []
    for obj, begin, end in zip(shown, begins, ends, strict=True):
        frames += [[obj]] * (end - begin)
    return frames, begins


def ordered_clip(random: Random) -> Example:
    """A silent clip of two shapes, one after the other; the question is which was first or last."""
    frames, _ = shown_in_order(random, 2, random.choice(FRAMES))
    return first_or_last(frames, draw_clip(frames, random), random)


def long_clip(random: Random, pairs: int) -> Example:
    """The same with two to four shapes in many pairs of frames; LONG_PAIRS last up to a minute."""
    frames, _ = shown_in_order(random, random.randint(2, 4), 2 * pairs)
    return first_or_last(frames, draw_clip(frames, random, LONG_PAIR_SECONDS), random)


def first_or_last(frames: list[Frame], clip: TimedFrames, random: Random) -> Example:
    """An example that asks for the first or the last object; the other one is the follow-up."""
    questions = order_of(frames)
    question, answer = random.choice(questions)
    other = [pair for pair in questions if pair[0] != question]
    return Example(question, answer, clip=clip, objects=frames[::2], follow_ups=other, kind="video")


def order_of(frames: list[Frame]) -> list[QuestionAnswer]:
    """The questions about the order of a clip's objects, with their answers."""
    first = frames[0][0]
    last = frames[-1][0]
    return [
        ("what was there first", f"it was the {first.color} {first.shape}"),
        ("what was there last", f"it was the {last.color} {last.shape}"),
    ]


def clip_with_tone(random: Random) -> Example:
    """A clip of two shapes, one after the other, with a tone while one of them is visible.

    The question is which one. The first and the last object are follow-ups.
    """
    frames, (_, change) = shown_in_order(random, 2, random.choice(FRAMES))
    pixels, times = draw_clip(frames, random)
    duration = times[-1] + (times[-1] - times[-2])

    # The tone lies inside the interval of one of the shapes.
    at_second = random.random() < 0.5
    if at_second:
        obj = frames[-1][0]
        begin, end = times[change], duration
    else:
        obj = frames[0][0]
        begin, end = 0.0, times[change]
    tone_start = float(random.uniform(begin + 0.05, end - 0.35))

    return Example(
        "what was there at the sound",
        f"it was the {obj.color} {obj.shape}",
        clip=(pixels, times),
        objects=frames[::2],
        sound=noise_with_tone(random, duration, tone_start),
        tone_start_s=tone_start,
        follow_ups=order_of(frames),
        kind="sync",
    )


def noise_with_tone(random: Random, seconds: float, at: float) -> np.ndarray:
    """Quiet noise of some length with one tone of 0.3 s -> float32 [samples] at 16 kHz."""
    samples = int(seconds * INPUT_SAMPLE_RATE)
    generator = np.random.RandomState(random.randrange(1 << 31))
    wave = 0.003 * generator.randn(samples)

    # The tone is a sine that fades in and out.
    tone_samples = int(TONE_SECONDS * INPUT_SAMPLE_RATE)
    t = np.arange(tone_samples) / INPUT_SAMPLE_RATE
    frequency = random.uniform(400, 1200)
    sine = 0.3 * np.sin(2 * np.pi * frequency * t)
    start = int(at * INPUT_SAMPLE_RATE)
    wave[start : start + tone_samples] += sine * np.hanning(tone_samples)
    return wave.astype(np.float32)
