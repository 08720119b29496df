"""The questions with which notebooks count a model's right answers."""

from types import SimpleNamespace

from minomni.config import TINY
from minomni.data.vocabulary import world_tokenizer
from minomni.notebook.ask import COLOR, WHERE, right_answers, scene_questions


def test_questions_are_of_two_kinds_and_always_the_same():
    asked = scene_questions()
    assert {kind: len(questions) for kind, questions in asked.items()} == {
        "where": WHERE,
        "color": COLOR,
    }
    assert [x[1:] for x in scene_questions()["where"]] == [x[1:] for x in asked["where"]]


def test_only_answers_that_are_right_word_for_word_count():
    questions = scene_questions()["color"][:3]
    tokenizer = world_tokenizer(TINY.thinker.tokens)
    texts = [answer for *_, answer in questions]
    texts[1] += " circle"
    tokens = [tokenizer.encode(f"{text}<|im_end|>") for text in texts]
    thinker = SimpleNamespace(generate=lambda inputs, sampling: SimpleNamespace(tokens=tokens))
    omni = SimpleNamespace(
        config=TINY,
        require_tokenizer=lambda: tokenizer,
        thinker=thinker,
    )
    assert right_answers(omni, questions) == 2
