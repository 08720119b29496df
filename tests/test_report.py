"""The report card counts right, and its judge is one that can be believed."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from minomni import paths
from minomni.config import LISTENING_RATE, SMALL
from minomni.data import corpus, grammar, text_to_speech
from minomni.data.vocabulary import English, english, told_apart
from minomni.data.word_errors import edit_distance
from minomni.errors import UserError
from minomni.eval import asr, evaluator, report, stats
from minomni.eval.asr import ENGLISH, LONG, SpeechRecognizer


def test_interval_by_hand():
    low, high = stats.Metric("x", 0.5, 100).interval()
    assert (low, high) == pytest.approx(
        (0.4038, 0.5962), abs=1e-3
    )  # Wilson's interval for 50 of 100
    assert stats.Metric("x", 0.0, 20).interval()[0] == 0.0
    assert stats.Metric("x", 1.0, 20).interval() == pytest.approx((0.8389, 1.0), abs=1e-3)


def test_card_as_markdown_and_fractions():
    card = report.Report("m", [stats.Metric("a", 0.25, 8), stats.Metric("b", None, 0)], 1.0)
    assert card.fractions() == {"a": 0.25, "b": None, "train_seconds": None}
    assert "| a | 25.0% |" in card.markdown()
    assert "not measurable here" in card.markdown()


def test_every_row_is_measured(tiny_folder, monkeypatch, tmp_path):
    monkeypatch.setattr(text_to_speech, "available", lambda: False)
    monkeypatch.setattr(paths, "runs", lambda: tmp_path / "runs")
    card = report.measure(str(tiny_folder), items=2)
    values = card.fractions()
    assert json.loads(json.dumps(values)) == values
    assert all(row.n >= 0 for row in card.rows)
    others = (
        "real_digits_accuracy sync_accuracy_mrope spoken_over_typed asr_wer asr_wer_unseen_voices speech_wer streamed_speech_wer "
        "natural_speech_wer stop_errors voice_accuracy"
    )
    # only where the stages are kept, and the folder says how long
    kept = "dpo_wer_before dpo_wer_after train_seconds"
    assert set(evaluator.ANSWERS) | set(others.split()) | set(kept.split()) == set(values)
    assert all(values[name] is None for name in kept.split())
    assert (
        values["real_digits_accuracy"] is values["sync_accuracy_mrope"] is None
    )  # no folder was given, nor ablated
    assert (
        values["asr_wer_unseen_voices"] is None
    )  # no recordings of such voices without the synthesiser
    assert (
        values["natural_speech_wer"] < 0.35 < values["speech_wer"]
    )  # a model of random weights says nothing
    assert (tmp_path / "runs" / "report.md").read_text() == card.markdown()


def test_a_folder_of_digits_is_looked_at_before_anything_is_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(report, "load", lambda *_: pytest.fail("work began"))
    (tmp_path / "two").mkdir()
    for name in ("1_ann_0.wav", "2_bob_0.wav"):
        (tmp_path / "two" / name).write_bytes(b"no sound")
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "1_ann_0.wav").write_bytes(b"no sound")
    for name, says in (
        ("none", "holds no"),
        ("one", "recordings of 1 speakers"),
        ("two", "1_ann_0.wav"),
    ):
        with pytest.raises(UserError, match=says):
            report.measure("data_samples/tiny", digits=tmp_path / name)


def test_word_errors_count_sentences_as_a_whole():
    row = stats.word_error_metric("x", [(0, 4), (2, 4), (0, 8)])
    assert (row.value, row.n) == (2 / 16, 16)
    low, high = row.interval()
    assert low == 0.0
    assert 0.25 <= high <= 0.5


def test_hard_sentences_are_long_held_out_and_repeat_a_word():
    hard = evaluator.hard_sentences()
    assert len(hard) > 20
    assert hard == evaluator.hard_sentences()
    trained = set(corpus.all_statements(held=False))
    for text in hard:
        words = [word for word in text.split() if word not in ("a", "and", "is", "the")]
        assert len(text.split()) >= 9
        assert len(set(words)) < len(words)
        halves = [
            text[: at.start()] for at in re.finditer(" and ", text)
        ]  # a statement may hold an "and" of its own
        assert not trained & {*halves, *(text[at.end() :] for at in re.finditer(" and ", text))}


def test_english_words_are_scored_without_the_sentence_around_them(monkeypatch):
    """Two recordings, of four words each: one misheard, one replaced, one word too many, the
    frame's own faults aside.
    """
    few = ["garden", "window", "silver", "number"]
    texts = [
        "the garden window is above the silver number",
        "the silver garden is left of the number window",
    ]
    speeches = corpus.SpeechCorpus(
        np.zeros(4, np.int16),
        [corpus.Utterance(text, "Anna", i, i + 1) for i, text in enumerate(texts)],
    )
    examiner = object.__new__(evaluator.Evaluator)
    examiner.items, examiner.teacher = (
        9,
        SimpleNamespace(speech=speeches, english=English(tuple(few), ())),
    )
    examiner.replies = lambda asked: ["a garden window above silver", texts[1]]
    examiner.say = lambda text, voice, seed: SimpleNamespace(
        wave=torch.zeros(1), sample_rate=16_000
    )
    heard = iter(
        ["the garden garden window is below the silver number", texts[0], "number", texts[1]]
    )
    monkeypatch.setattr(evaluator, "Judge", lambda said, words: (said, words))
    monkeypatch.setattr(evaluator, "recognized_wordsscribe", lambda *_: next(heard).split())
    rows = {row.name: (row.value, row.n) for row in examiner.english()}
    assert rows == {
        "english_asr_wer": (2 / 8, 8),
        "english_speech_wer": (4 / 8, 8),
        "english_natural_speech_wer": (0, 8),
    }


@pytest.mark.skipif(not text_to_speech.available(), reason="no synthesiser here")
def test_judge_knows_english_words_apart():
    """Recordings of words, those that are trained on and those that are not: more than three in
    four are understood.
    """
    words = english(SMALL.thinker.tokens)
    jobs = [job for _, job in corpus.test_jobs(words)[-96:]][::8]
    for few, said in zip((told_apart(words.trained), told_apart(words.held)), (jobs[:6], jobs[6:])):
        judge, right, wrong = SpeechRecognizer(ENGLISH, few), 0, 0
        for job, wave in zip(said, text_to_speech.synthesize(said, 0)):
            heard = judge.transcribe(torch.from_numpy(wave) / 32768, LISTENING_RATE).split()
            wrong += edit_distance(
                [w for w in job.text.split() if w in few], [w for w in heard if w in few]
            )
            right += 4
        assert wrong / right < 0.25


def test_voice_classifier_knows_recordings_apart():
    recordings = corpus.sample_recordings(held=False)
    known = evaluator.VoiceClassifier(recordings, each=3)
    others = [
        i
        for name in grammar.VOICES
        for i in [i for i, u in enumerate(recordings.utterances) if u.voice == name][3:]
    ]
    right = sum(known.name(recordings.wave(i)) == recordings.utterances[i].voice for i in others)
    assert others
    assert right >= 0.7 * len(others)


def test_judge_hears_recordings_and_not_noise():
    judge, recordings = SpeechRecognizer(), corpus.sample_recordings(held=False)
    said = [i for i, u in enumerate(recordings.utterances) if not u.text.startswith("say ")]
    right = sum(
        judge.transcribe(recordings.wave(i), 16_000) == recordings.utterances[i].text for i in said
    )
    assert said
    assert right >= 0.7 * len(said)
    noise = torch.from_numpy((0.1 * np.random.RandomState(0).randn(24_000)).astype(np.float32))
    assert judge.transcribe(torch.zeros(16_000), 16_000) == ""
    assert judge.transcribe(noise, 16_000) not in {recordings.utterances[i].text for i in said}


def test_judge_knows_every_statement():
    rules = asr.jsgf_grammar()
    for words in grammar.GRAMMAR.values():
        assert all(word in rules for word in words)
    assert all(template in rules for template in grammar.STATEMENTS)
    assert judge_of_long_sentences_takes_two()


def judge_of_long_sentences_takes_two() -> bool:
    """Two recordings one after the other are two statements to the judge of long sentences."""
    recordings = corpus.sample_recordings(held=False)
    said = [i for i, u in enumerate(recordings.utterances) if not u.text.startswith("say ")][:2]
    heard = SpeechRecognizer(LONG).transcribe(torch.cat([recordings.wave(i) for i in said]), 16_000)
    return len(heard.split()) > max(len(recordings.utterances[i].text.split()) for i in said)
