"""Questions about generated scenes, with which a notebook counts the right answers of a model."""

from random import Random
from typing import TYPE_CHECKING

from PIL import Image

from minomni.data.scenes import random_scene
from minomni.inputs.prompt import Processor

if TYPE_CHECKING:
    from minomni.omni import Omni

SCENES = 60
WHERE, COLOR = 24, 12  # questions of each kind
Question = tuple[Image.Image, str, str]  # image, question, answer


def scene_questions() -> dict[str, list[Question]]:
    """{kind: questions}: where something is in an image, and which color it has."""
    asked: list[Question] = []
    for seed in range(SCENES):
        scene = random_scene(Random(seed))
        assert scene.image is not None  # every scene has one
        pairs = [(scene.question, scene.answer), *scene.follow_ups]
        asked += [(scene.image, question, answer) for question, answer in pairs]
    where = [x for x in asked if x[1].startswith("where")]
    color = [x for x in asked if x[1].startswith("what color")]
    return {"where": where[:WHERE], "color": color[:COLOR]}


def right_answers(omni: "Omni", questions: list[Question]) -> int:
    """How many of the questions a model answers word for word, all of them in one batch."""
    conversations = []
    for image, question, _ in questions:
        content = [{"image": image}, {"text": question}]
        conversations.append([{"role": "user", "content": content}])
    tokenizer = omni.require_tokenizer()
    inputs = Processor(omni.config, tokenizer)(conversations)
    replies = omni.thinker.generate(inputs, omni.config.thinker_sampling).tokens

    correct = 0
    for ids, (_, _, answer) in zip(replies, questions, strict=True):
        text = tokenizer.decode(ids, skip_special=True)
        correct += int(text == answer)
    return correct
