"""The report's metrics are correct, and its speech recognizer is reliable."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import minomni
from minomni import paths
from minomni.config import INPUT_SAMPLE_RATE, SMALL
from minomni.data import corpus, grammar, text_to_speech
from minomni.data.vocabulary import English, english, evaluation_words
from minomni.data.word_errors import edit_distance
from minomni.eval import asr, evaluator, report, speech_chain, stats
from minomni.eval.asr import ENGLISH, LONG_STATEMENT, SpeechRecognizer


def test_wilson_interval_of_known_fractions():
    interval = stats.Metric("x", 0.5, 100).interval()
    assert interval == pytest.approx((0.4038, 0.5962), abs=1e-3)
    assert stats.Metric("x", 0.0, 20).interval()[0] == 0.0
    assert stats.Metric("x", 1.0, 20).interval() == pytest.approx((0.8389, 1.0), abs=1e-3)


def test_report_as_markdown_and_fractions():
    result = report.Report("m", [stats.Metric("a", 0.25, 8), stats.Metric("b", None, 0)], 1.0)
    assert result.fractions() == {"a": 0.25, "b": None, "train_seconds": None}
    assert "| a | 25.0% |" in result.markdown()
    assert "not measurable here" in result.markdown()
    rows = {
        "a": {"value": 0.25, "low": 0.071478, "high": 0.59073, "items": 8},
        "b": {"value": None},
    }
    assert result.json_object()["rows"] == rows


def test_report_lies_in_the_run_of_the_model(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(paths, "runs", lambda: tmp_path / "runs")
    assert report.home_of_model(tmp_path / "tiny" / "model") == tmp_path / "runs"
    home = tmp_path / "tiny"
    (home / "stages").mkdir(parents=True)
    assert report.home_of_model(home / "model") == home
    monkeypatch.chdir(home)
    assert report.home_of_model(Path("model")) == home

    result = report.Report("m", [stats.Metric("a", 0.25, 8)], 1.0)
    report.write_report(result, home)
    assert (home / "report.md").read_text() == result.markdown()
    assert json.loads((home / "report.json").read_text()) == result.json_object()
    printed = capsys.readouterr()
    assert printed.err == f"written: {home / 'report.md'}\n"
    assert printed.out == ""  # `report --json` prints JSON alone


@pytest.mark.slow
def test_every_metric_is_measured(tiny_folder, monkeypatch, tmp_path):
    monkeypatch.setattr(text_to_speech, "available", lambda: False)
    monkeypatch.setattr(paths, "runs", lambda: tmp_path / "runs")
    result = report.measure(str(tiny_folder), items=2)
    values = result.fractions()
    assert json.loads(json.dumps(values)) == values
    assert all(row.n >= 0 for row in result.rows)
    other_metrics = {
        "sync_accuracy_mrope",
        "spoken_over_typed",
        "asr_wer",
        "asr_wer_after_silence",
        "asr_wer_second_turn",
        "asr_wer_unseen_voices",
        "asr_wer_unseen_natural_voices",
        "closed_speech_wer",
        "closed_streamed_speech_wer",
        "closed_natural_speech_wer",
        "stop_errors",
        "voice_accuracy",
    }
    # These need the run folder of a training.
    of_run_folder = {"closed_dpo_wer_before", "closed_dpo_wer_after", "train_seconds"}
    judged = {row.name for row in speech_chain.Judgments().metrics()}
    assert set(evaluator.ANSWERS) | other_metrics | of_run_folder | judged == set(values)
    assert all(values[name] is None for name in of_run_folder)

    # `ablate tmrope` was not run.
    assert values["sync_accuracy_mrope"] is None
    # Without text-to-speech there are no recordings of unseen voices.
    assert values["asr_wer_unseen_voices"] is None
    # A model of random weights speaks no words.
    assert values["closed_natural_speech_wer"] < 0.35 < values["closed_speech_wer"]
    assert (tmp_path / "runs" / "report.md").read_text() == result.markdown()
    assert json.loads((tmp_path / "runs" / "report.json").read_text()) == result.json_object()


def test_recordings_after_silence_and_in_a_second_turn(tiny_folder, monkeypatch, tmp_path):
    """The conversations that are transcribed, and word errors by hand."""
    monkeypatch.setattr(text_to_speech, "available", lambda: False)
    scored = evaluator.Evaluator(minomni.load(str(tiny_folder)), 2, tmp_path)
    asked: list[list[dict]] = []

    def replies(conversations):
        asked.extend(conversations)
        return ["say"] * len(conversations)

    monkeypatch.setattr(scored, "replies", replies)
    voices = {utterance.voice for utterance in scored.builder.speech.utterances}
    metric = scored.transcription("x", dict.fromkeys(voices), silence_s=0.5, second_turn=True)
    spoken = [u for u in scored.builder.speech.utterances if u.text.startswith("say ")][:2]
    words = sum(len(utterance.text.split()) for utterance in spoken)
    assert metric.value == pytest.approx(1 - 2 / words)
    first, second = asked
    assert [turn["role"] for turn in first] == ["user", "assistant", "user"]
    assert first[1]["content"] == spoken[1].text  # the first one follows the last one
    assert second[1]["content"] == spoken[0].text
    wave = second[2]["content"][0]["audio"]
    assert not wave[:8000].any()
    assert wave[8000:].any()


def test_word_error_interval_resamples_sentences():
    row = stats.word_error_metric("x", [(0, 4), (2, 4), (0, 8)])
    assert (row.value, row.n) == (2 / 16, 16)
    low, high = row.interval()
    assert low == 0.0
    assert 0.25 <= high <= 0.5


def test_hard_sentences_are_long_held_out_and_repeat_a_word():
    hard = evaluator.hard_sentences()
    assert len(hard) > 20
    assert hard == evaluator.hard_sentences()
    trained = set(corpus.all_statements(held_out=False))
    for text in hard:
        words = [word for word in text.split() if word not in ("a", "and", "is", "the")]
        assert len(text.split()) >= 9
        assert len(set(words)) < len(words)
        # A statement may contain " and " itself, so every split is tried.
        splits = list(re.finditer(" and ", text))
        assert not trained & {text[: split.start()] for split in splits}
        assert not trained & {text[split.end() :] for split in splits}


def test_english_words_are_scored_without_the_template(monkeypatch):
    """Two recordings with four words each.

    The recognizer gets one word wrong, replaces one and inserts one; errors in the template around
    the words do not count.
    """
    words = ["garden", "window", "silver", "number"]
    texts = [
        "the garden window is above the silver number",
        "the silver garden is left of the number window",
    ]
    utterances = [corpus.Utterance(text, "Anna", i, i + 1) for i, text in enumerate(texts)]
    speech = corpus.SpeechCorpus(np.zeros(4, np.int16), utterances)
    reply = SimpleNamespace(wave=torch.zeros(1), sample_rate=16_000)
    tested = object.__new__(evaluator.Evaluator)
    tested.items = 9
    tested.builder = SimpleNamespace(speech=speech, english=English(tuple(words), ()))
    tested.replies = lambda conversations: ["a garden window above silver", texts[1]]
    tested.speak = lambda text, voice, seed: reply

    # For each recording: the model's speech, then the recording.
    transcripts = iter(
        [
            "the garden garden window is below the silver number",
            texts[0],
            "number",
            texts[1],
        ]
    )
    monkeypatch.setattr(evaluator, "SpeechRecognizer", lambda utterance, words: None)
    monkeypatch.setattr(evaluator, "recognized_words", lambda *_: next(transcripts).split())
    metrics = {metric.name: (metric.value, metric.n) for metric in tested.english()}
    assert metrics == {
        "english_asr_wer": (2 / 8, 8),
        "closed_english_speech_wer": (4 / 8, 8),
        "closed_english_natural_speech_wer": (0, 8),
    }


@pytest.mark.slow
@pytest.mark.skipif(not text_to_speech.available(), reason="no text-to-speech engine")
def test_recognizer_understands_english_words():
    """Fewer than one word in four is wrong in recordings, for trained and for held-out words."""
    words = english(SMALL.thinker.tokens)
    jobs = [job for _, job in corpus.evaluation_jobs(words)[-96:]][::8]
    for vocabulary, chosen in (
        (evaluation_words(words.trained), jobs[:6]),
        (evaluation_words(words.held_out), jobs[6:]),
    ):
        recognizer = SpeechRecognizer(ENGLISH, vocabulary)
        edits = 0
        for job, wave in zip(chosen, text_to_speech.synthesize(chosen, 0)):
            samples = torch.from_numpy(wave) / 32768
            transcript = recognizer.transcribe(samples, INPUT_SAMPLE_RATE).split()
            reference = [word for word in job.text.split() if word in vocabulary]
            edits += edit_distance(reference, [word for word in transcript if word in vocabulary])
        assert edits / (4 * len(chosen)) < 0.25


def test_voice_classifier_on_recordings():
    recordings = corpus.sample_recordings(held_out=False)
    classifier = evaluator.VoiceClassifier(recordings, per_voice=3)
    tested = []
    for name in grammar.VOICES:
        indices = [i for i, u in enumerate(recordings.utterances) if u.voice == name]
        tested += indices[3:]
    correct = sum(
        classifier.predict(recordings.wave(i)) == recordings.utterances[i].voice for i in tested
    )
    assert tested
    assert correct >= 0.7 * len(tested)


def test_recognizer_transcribes_recordings_and_rejects_noise():
    recognizer = SpeechRecognizer()
    recordings = corpus.sample_recordings(held_out=False)
    tested = statements_in(recordings)
    texts = [recordings.utterances[i].text for i in tested]
    transcripts = [recognizer.transcribe(recordings.wave(i), 16_000) for i in tested]
    assert tested
    correct = sum(transcript == text for transcript, text in zip(transcripts, texts))
    assert correct >= 0.7 * len(tested)
    noise = torch.from_numpy((0.1 * np.random.RandomState(0).randn(24_000)).astype(np.float32))
    assert recognizer.transcribe(torch.zeros(16_000), 16_000) == ""
    assert recognizer.transcribe(noise, 16_000) not in texts


def statements_in(recordings) -> list[int]:
    """Indices of the recordings that are statements, not requests."""
    utterances = recordings.utterances
    return [i for i, u in enumerate(utterances) if not u.text.startswith("say ")]


def test_recognizer_grammar_contains_every_statement():
    rules = asr.jsgf_grammar()
    for words in grammar.GRAMMAR.values():
        assert all(word in rules for word in words)
    assert all(template in rules for template in grammar.STATEMENTS)


def test_recognizer_of_long_sentences_accepts_two_statements():
    recordings = corpus.sample_recordings(held_out=False)
    first, second = statements_in(recordings)[:2]
    wave = torch.cat([recordings.wave(first), recordings.wave(second)])
    transcript = SpeechRecognizer(LONG_STATEMENT).transcribe(wave, 16_000).split()
    for i in (first, second):
        assert len(transcript) > len(recordings.utterances[i].text.split())
