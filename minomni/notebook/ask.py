"""Questions with which a notebook counts the right answers of a model: about generated scenes, and
those that come with the project; and the mean features of its encoders.
"""

import json
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from minomni.chat.reply import Reply
from minomni.data.scenes import random_scene
from minomni.inputs.mel import log_mel
from minomni.inputs.patches import image_patches
from minomni.inputs.prompt import Processor

if TYPE_CHECKING:
    from minomni.eval.asr import SpeechRecognizer
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


def answer_sample(omni: "Omni", sample: dict, folder: Path) -> Reply:
    """The answer to one entry of questions.json, whose files lie in `folder`."""
    content = []
    for part in sample["content"]:
        for kind, item in part.items():
            content.append({kind: item if kind == "text" else str(folder / item)})
    with_sound = sample.get("use_audio_in_video", False)
    messages = [{"role": "user", "content": content}]
    return omni.respond(messages, sample["voice"], seed=7, use_audio_in_video=with_sound)


def ask_samples(omni: "Omni", recognizer: "SpeechRecognizer", folder: str | Path) -> Reply:
    """Ask the questions of questions.json in `folder`; print what is expected, written and heard by
    a speech recognizer, and how many answers are right as text and how many are heard as written.

    -> the last answer that is heard otherwise, or the first of all
    """
    folder = Path(folder)
    samples = json.loads((folder / "questions.json").read_text(encoding="utf-8"))
    right_text = right_speech = 0
    unclear: Reply | None = None
    for sample in samples:
        reply = answer_sample(omni, sample, folder)
        heard = recognizer.transcribe(reply.wave, reply.sample_rate)
        right_text += reply.text == sample["answer"]
        right_speech += heard == reply.text
        if unclear is None or heard != reply.text:
            unclear = reply

        print(f"{sample['asks']} ({sample['voice']}, {reply.seconds:.1f} s)")
        lines = {"expected": sample["answer"], "text": reply.text, "heard": heard}
        if len(set(lines.values())) == 1:
            print(f"   expected, text and heard: {heard}")
        else:
            for name, line in lines.items():
                print(f"   {name + ':':9} {line}")
    assert unclear is not None
    print(f"of {len(samples)}: right as text {right_text}, heard as written {right_speech}")
    return unclear


def mean_features(
    omni: "Omni", images: list[Image.Image], recordings: list[Tensor]
) -> dict[str, Tensor]:
    """The mean output vector [D] of each encoder: {"image": over images, "audio": over recordings}.

    recordings: waves [samples] at 16 kHz.
    """
    thinker = omni.thinker
    tokens = []
    for image in images:
        patches, grid = image_patches(image, omni.config.thinker.vision, omni.config.media)
        tokens.append(thinker.visual(patches, [grid]))
    sounds = thinker.audio_tower([log_mel(wave) for wave in recordings])
    return {"image": torch.cat(tokens).mean(0), "audio": sounds.mean(0)}
