"""The questions with which notebooks count a model's right answers."""

import json
from types import SimpleNamespace

from minomni.config import TINY
from minomni.data.vocabulary import world_tokenizer
from minomni.notebook.ask import COLOR, WHERE, ask_samples, right_answers, scene_questions


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


def test_samples_are_asked_with_their_files_and_the_last_unclear_answer_is_kept(tmp_path, capsys):
    samples = [
        {"asks": "a", "answer": "yes", "voice": "Anna", "content": [{"image": "x.png"}]},
        {"asks": "b", "answer": "no", "voice": "Karl", "content": [{"text": "what"}]},
        {"asks": "c", "answer": "yes", "voice": "Adam", "content": [{"text": "who"}]},
    ]
    (tmp_path / "questions.json").write_text(json.dumps(samples))
    asked = []

    def respond(messages, voice, seed, use_audio_in_video):
        asked.append((messages[0]["content"], voice))
        return SimpleNamespace(text="yes", wave=voice, sample_rate=16_000, seconds=1.0)

    recognizer = SimpleNamespace(transcribe=lambda wave, rate: "no" if wave == "Karl" else "yes")
    unclear = ask_samples(SimpleNamespace(respond=respond), recognizer, tmp_path)
    assert asked[0] == ([{"image": str(tmp_path / "x.png")}], "Anna")
    assert asked[1] == ([{"text": "what"}], "Karl")
    assert unclear.wave == "Karl"
    said = capsys.readouterr().out
    assert "expected, text and heard: yes" in said
    assert said.endswith("of 3: right as text 2, heard as written 2\n")
