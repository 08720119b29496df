"""The outside judges: how words are compared and counted, and what they hear in recordings."""

import ast
from pathlib import Path

import numpy as np
import pytest
import torch

from minomni.data import corpus
from minomni.data.word_errors import edit_distance
from minomni.errors import UserError
from minomni.eval import outside_judges, speech_chain, stats
from minomni.eval.outside_judges import (
    NaturalnessScorer,
    NotInstalled,
    OpenRecognizer,
    SpeakerSimilarity,
    capped_word_errors,
    spoken_words,
)
from minomni.eval.speech_chain import STEPS, VoiceEmbeddings
from minomni.inputs.media import load_audio

ROOT = Path(__file__).parents[2]


def installed(judge):
    """A judge, or a skip that says which package is missing."""
    try:
        return judge()
    except NotInstalled as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def recordings():
    """(text, waveform at 16 kHz, voice) of the first statements in data_samples/speech."""
    speech = corpus.sample_recordings(held_out=False)
    chosen = [i for i, u in enumerate(speech.utterances) if corpus.is_own_statement(u)][:6]
    return [(speech.utterances[i].text, speech.wave(i), speech.utterances[i].voice) for i in chosen]


# ---------------------------------------------------------------------------------------------
# counting


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (" The digit is 7.", "the digit is seven"),
        ("There are three: 3!", "there are three three"),
        ("Blue-green, it's RED", "blue green its red"),
        ("It\u2019s 36", "its three six"),
        ("circle2", "circle two"),
        ("... ?", ""),
    ],
)
def test_words_have_one_form(text, words):
    assert spoken_words(text) == words.split()


def test_reference_and_transcript_meet_in_one_form():
    assert capped_word_errors("the digit is seven", spoken_words("The digit is 7.")) == (0, 4)


def test_no_sentence_is_worse_than_all_wrong():
    text = "the digit is seven"
    assert capped_word_errors(text, ["the", "digit", "is", "eleven"]) == (1, 4)
    assert capped_word_errors(text, []) == (4, 4)
    loop = ["no"] * 100
    assert edit_distance(text.split(), loop) == 100
    assert capped_word_errors(text, loop) == (4, 4)
    pairs = [capped_word_errors(text, loop), capped_word_errors(text, text.split())]
    assert stats.word_error_rate(pairs) == 0.5


def test_mean_of_scores_has_an_interval_and_is_no_percentage():
    row = stats.score_metric("dnsmos", [2.0, 3.0, 4.0])
    assert (row.value, row.n) == (3.0, 3)
    low, high = row.interval()
    assert 2 <= low < 3 < high <= 4
    assert row.format(3.0) == "3.00"
    assert stats.Metric("x", 0.25, 8).format(0.25) == "25.0%"
    assert stats.score_metric("dnsmos", []).value is None


def test_similarity_leaves_the_sentence_itself_out():
    """Two recordings of voice A at right angles, one of voice B between them."""
    x, y = np.array([1.0, 0.0]), np.array([0.0, 1.0])
    sentences = [
        VoiceEmbeddings("A", x, y),
        VoiceEmbeddings("A", y, y),
        VoiceEmbeddings("B", (x + y) / 2**0.5, x),
    ]
    values = speech_chain.similarities(sentences)
    assert values["model"] == pytest.approx([1, 0])  # B has no other recording
    assert values["recordings"] == pytest.approx([0, 0])
    assert values["other_voices"] == pytest.approx([0.5**0.5, 0.5**0.5, 1])


# ---------------------------------------------------------------------------------------------
# judges that only report


def test_nothing_that_trains_imports_the_outside_judges():
    """A judge that also chooses would measure how well it was pleased."""
    for folder in ("train", "data", "chat", "talker", "token2wav", "notebook"):
        for path in sorted((ROOT / "minomni" / folder).rglob("*.py")):
            names = [
                name
                for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
                if isinstance(node, ast.Import | ast.ImportFrom)
                for name in [getattr(node, "module", None) or "", *(a.name for a in node.names)]
            ]
            judges = ("outside_judges", "speech_chain", *outside_judges.WHISPER_MODULES)
            others = (*outside_judges.DNSMOS_MODULES[:2], "resemblyzer")
            for name in names:
                assert name.split(".")[-1] not in judges + others, f"{path} imports {name}"


@pytest.mark.parametrize("judge", [OpenRecognizer, NaturalnessScorer, SpeakerSimilarity])
def test_missing_package_is_named_with_its_pip_line(judge, monkeypatch):
    monkeypatch.setattr(outside_judges, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install .*==") as caught:
        judge()
    assert "\n" not in str(caught.value)


def test_pip_lines_are_those_of_the_requirements():
    lines = ""
    for name in ("requirements.txt", "requirements-dev.txt"):
        lines += (ROOT / name).read_text(encoding="utf-8")
    for pip in (outside_judges.WHISPER_PIP, outside_judges.DNSMOS_PIP, outside_judges.SPEAKER_PIP):
        for package in pip.split():
            if "==" in package:
                assert package in lines


def test_report_without_judges_has_all_rows_without_values(monkeypatch):
    monkeypatch.setattr(outside_judges, "find_spec", lambda name: None)
    rows = speech_chain.speech_chain_metrics(None)
    assert all(row.value is None for row in rows)
    names = {row.name for row in rows}
    assert {f"open_wer_{step}" for step in STEPS} < names
    assert {f"prompted_wer_{step}" for step in STEPS} < names
    assert {"dnsmos_recordings", "dnsmos_model", "speaker_similarity_model"} < names


def test_prompt_has_three_sentences_of_the_training_set():
    sentences = [s.strip().lower() for s in outside_judges.WORLD_PROMPT.split(".") if s.strip()]
    assert len(sentences) == 3
    assert set(sentences) <= set(corpus.all_statements(held_out=False))


def test_judged_sentences_are_held_out_and_spoken_by_all_voices():
    jobs = corpus.judged_jobs()
    assert len(jobs) == 400
    held = set(corpus.all_statements(held_out=True))
    assert {job.text for _, job in jobs} <= held
    counts = {name: sum(voice == name for voice, _ in jobs) for name in corpus.grammar.VOICES}
    assert set(counts.values()) == {100}


# ---------------------------------------------------------------------------------------------
# the real judges


@pytest.mark.slow
def test_whisper_understands_recordings_and_repeats_itself_exactly(recordings):
    recognizer = installed(OpenRecognizer)
    transcripts = [recognizer.transcribe(wave, 16_000) for _, wave, _ in recordings]
    texts = [text for text, _, _ in recordings]
    open_pairs = [capped_word_errors(t, heard.open) for t, heard in zip(texts, transcripts)]
    prompted = [capped_word_errors(t, heard.prompted) for t, heard in zip(texts, transcripts)]
    assert stats.word_error_rate(open_pairs) < 0.4  # espeak-ng is a hard voice
    assert stats.word_error_rate(prompted) < 0.3
    assert recognizer.transcribe(recordings[0][1], 16_000) == transcripts[0]
    assert recognizer.transcribe(torch.zeros(0), 16_000) == ([], [])


def test_damaged_weights_of_whisper_are_refused(monkeypatch):
    installed(OpenRecognizer)
    monkeypatch.setattr(outside_judges, "WHISPER_SHA256", "0" * 64)
    with pytest.raises(UserError, match="SHA-256"):
        OpenRecognizer()


@pytest.mark.slow
def test_dnsmos_prefers_speech_to_noise(recordings):
    scorer = installed(NaturalnessScorer)
    _, wave, _ = recordings[0]
    noise = torch.randn(len(wave), generator=torch.Generator().manual_seed(0)) * 0.1
    assert 1 <= scorer.score(noise, 16_000) < scorer.score(wave, 16_000) <= 5
    assert scorer.score(torch.zeros(0), 16_000) == 1.0


def test_dnsmos_gives_the_numbers_of_its_package():
    """question.wav by speechmos.dnsmos.run, and six times in a row: several windows."""
    scorer = installed(NaturalnessScorer)
    wave = load_audio(ROOT / "data_samples" / "question.wav")
    assert scorer.score(wave, 16_000) == pytest.approx(2.2054455, abs=1e-4)
    long = wave.repeat(6)
    assert scorer.score(long, 16_000) == pytest.approx(2.2170366, abs=1e-4)


@pytest.mark.slow
def test_voices_resemble_themselves_most(recordings):
    encoder = installed(SpeakerSimilarity)
    speech = corpus.sample_recordings(held_out=False)
    chosen = [i for i, u in enumerate(speech.utterances) if corpus.is_own_statement(u)][:12]
    sentences = []
    for i in chosen:
        embedding = encoder.embedding(speech.wave(i), 16_000)
        assert np.linalg.norm(embedding) == pytest.approx(1, abs=1e-4)
        sentences.append(VoiceEmbeddings(speech.utterances[i].voice, embedding, embedding))
    values = speech_chain.similarities(sentences)
    assert stats.mean(values["recordings"]) > stats.mean(values["other_voices"])
    assert not encoder.embedding(torch.zeros(16_000), 16_000).any()
