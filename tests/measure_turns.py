"""Later turns of a conversation with tiny: one session for all turns, or one for each.

    python tests/measure_turns.py

Held-out conversations of the kinds that the stage `chat` trains on: how many of the last turns are
answered exactly right in a session that holds the earlier turns, in a session of their own (what
the server does), and in one of their own that is shown the last image again. It needs a
synthesizer of requirements-dev.txt, and about ten minutes on a core.
"""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random

import minomni
from minomni.data.examples import ExampleBuilder
from minomni.data.scenes import Example
from minomni.omni import Omni

ITEMS = 60  # conversations of each kind
# Kind of conversation -> its turns. `about` is a further question about the first turn's image;
# `-spoken` questions are spoken where there is a recording.
CONVERSATIONS = {
    "about its image, typed": ("scene-typed", "about-typed"),
    "about its image, spoken": ("scene-spoken", "about-spoken"),
    "about its image, spoken, the fourth": ("scene-spoken",) + ("about-spoken",) * 3,
    "about a new image, typed": ("scene-typed", "scene-typed"),
    "about a new image, spoken": ("scene-spoken", "scene-spoken"),
    "a new digit, typed": ("scene-typed", "handwriting-typed"),
    "say, typed, after an image": ("scene-typed", "say-typed"),
    "say, spoken, after an image": ("scene-spoken", "say-spoken"),
    "say, spoken, after three about an image": (
        "scene-typed",
        "about-typed",
        "about-typed",
        "say-spoken",
    ),
    "say, typed, after say": ("say-typed", "say-typed"),
    "say, spoken, after say": ("say-spoken", "say-spoken"),
    "say, spoken, the fourth": ("say-spoken",) * 4,
}


def conversation(builder: ExampleBuilder, kinds: tuple[str, ...], random: Random) -> list[Example]:
    """The turns of a conversation."""
    turns: list[Example] = []
    for kind in kinds:
        if not kind.startswith("about"):
            turns.append(builder.example(kind, random))
            continue
        question, answer = random.choice(turns[0].follow_ups)
        example = Example(question, answer, kind="scene")
        turns.append(builder.with_voice(example) if kind.endswith("-spoken") else example)
    return turns


def last_is_right(
    omni: Omni, builder: ExampleBuilder, turns: list[Example], random: Random
) -> bool:
    """Whether the last of the turns is answered exactly right in one session."""
    session = omni.listen(speech=False)
    text = ""
    for turn in turns:
        wave = builder.wave(turn, random)
        if turn.image is not None:
            session.add_image(turn.image)
        if wave is not None:
            session.add_audio(wave.numpy())
        *_, done = session.respond("" if wave is not None else turn.question)
        text = done.reply.text
    return text == turns[-1].answer


def with_last_image(turns: list[Example]) -> Example:
    """The last turn with the image that was shown last."""
    images = [turn.image for turn in turns if turn.image is not None]
    return replace(turns[-1], image=images[-1]) if images else turns[-1]


def main() -> None:
    omni = minomni.load("tiny")
    with tempfile.TemporaryDirectory() as cache:
        builder = ExampleBuilder(omni.config, Path(cache), held_out=True)
    sessions: dict[str, Callable[[list[Example]], list[Example]]] = {
        "one": lambda turns: turns,
        "own": lambda turns: turns[-1:],
        "own, last image": lambda turns: [with_last_image(turns)],
    }
    for name, kinds in CONVERSATIONS.items():
        random = Random(f"turns: {name}")
        items = [conversation(builder, kinds, random) for _ in range(ITEMS)]
        right = dict.fromkeys(sessions, 0)
        for number, turns in enumerate(items):
            for session, given in sessions.items():
                # The last turn has the same recording in each.
                waves = Random(f"waves: {name} {number}")
                heard = [replace(turn, wave=builder.wave(turn, waves)) for turn in turns[::-1]]
                right[session] += last_is_right(omni, builder, given(heard[::-1]), waves)
        print(f"{name}: {right} of {ITEMS}", flush=True)


if __name__ == "__main__":
    main()
