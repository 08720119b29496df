"""Spoken digits: augmentations, fine-tuning, and leave-one-speaker-out evaluation."""

import os
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import soundfile
import torch

import minomni
from minomni.checkpoint import weights
from minomni.data import corpus, text_to_speech
from minomni.errors import UserError
from minomni.eval import spoken_digits
from minomni.train.loop import Recipe, train

ROOT = Path(__file__).parents[2]

DIGITS = Path(os.environ.get("MINOMNI_DIGITS", ROOT.parent / "shared" / "data" / "fsdd"))


@pytest.fixture
def folder(tmp_path) -> Path:
    """Six corpus recordings, named like digits of two speakers."""
    recordings = corpus.sample_recordings(held_out=False)
    for i in range(6):
        speaker = ("ann", "bob")[i % 2]
        soundfile.write(tmp_path / f"{i}_{speaker}_0.wav", recordings.wave(i), 16_000)
    return tmp_path


def test_augmentation_is_deterministic_and_keeps_the_range(folder):
    mel = spoken_digits.clips_by_speaker(folder)["ann"][0][0]
    made = [spoken_digits.augment(mel, Random(i)) for i in range(20)]
    assert torch.equal(made[3], spoken_digits.augment(mel, Random(3)))
    assert not torch.equal(made[3][:, :9], made[4][:, :9])
    for x in made:
        assert x.shape[0] == 128
        assert 0.6 < x.shape[1] / mel.shape[1] < 2
        assert torch.isfinite(x).all()
        assert 0 < x.max() - x.min() <= spoken_digits.RANGE + 1e-5


def test_interpolation_of_known_values():
    x = torch.tensor([[0.0, 1.0, 4.0]])
    assert spoken_digits.interpolate(x, torch.tensor([0.0, 0.5, 1.5, 2.0])).tolist() == [
        [0.0, 0.5, 2.5, 4.0]
    ]


def test_band_normalization_of_known_values(monkeypatch):
    # Loudness 0, 2, 4: the last two frames are the louder half.
    mel = torch.tensor([[0.0, 4.0, 6.0], [0.0, 0.0, 2.0]])
    levels = spoken_digits.band_levels([mel[:, :1], mel[:, 1:]])
    torch.testing.assert_close(levels, torch.tensor([[10 / 3], [2 / 3]]))
    monkeypatch.setattr(spoken_digits, "NORMALIZATION", 0.5)
    normalized = spoken_digits.band_normalized(mel, torch.tensor([[1.0], [1.0]]))  # from 5 and 1
    assert normalized.tolist() == [[-2.0, 2.0, 4.0], [0.0, 0.0, 2.0]]


def test_normalization_removes_a_microphone(folder):
    mel = spoken_digits.clips_by_speaker(folder)["ann"][0][0]
    levels = torch.zeros(128, 1)
    microphone = torch.linspace(-0.3, 0.3, 128)[:, None]
    microphone = microphone - microphone.mean()
    with_microphone = spoken_digits.band_normalized(mel + microphone, levels)
    without = spoken_digits.band_normalized(mel, levels)
    difference = with_microphone - without
    remaining = microphone.expand_as(difference) * (1 - spoken_digits.NORMALIZATION)
    torch.testing.assert_close(difference, remaining)


def test_band_smoothing_of_known_values():
    mel = torch.tensor([[0.0], [3.0], [0.0], [6.0]])
    assert spoken_digits.smooth_bands(mel, 3).flatten().tolist() == [1.0, 1.0, 3.0, 4.0]
    assert torch.equal(spoken_digits.smooth_bands(mel, 1), mel)


def assert_normalized(mels: list[torch.Tensor], clips: list):
    """In the louder half of the frames the bands have the clips' mean levels."""
    wanted = torch.cat([mel for mel, _ in clips], dim=1).mean(1)
    for mel in mels:
        loud = mel[:, mel.mean(0) >= mel.mean(0).median()].mean(1)
        torch.testing.assert_close(loud, wanted, rtol=0, atol=1e-4)


def test_batches_are_normalized(folder, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(spoken_digits, "NORMALIZATION", 1.0)
    clips = spoken_digits.clips_by_speaker(folder)
    stage = spoken_digits.DigitsStage(
        minomni.load(str(tiny_folder)),
        Recipe(100, 4, 5e-3),
        tmp_path,
        0,
        clips["ann"],
        clips["bob"],
    )
    assert_normalized(stage.batch(0)[0], clips["ann"])  # synthetic voices do not count


def test_augmentation_smooths_bands(folder, monkeypatch):
    mel = spoken_digits.clips_by_speaker(folder)["ann"][0][0]
    monkeypatch.setattr(spoken_digits, "SMOOTHING_WIDTHS", (9,))
    made = spoken_digits.augment(mel, Random(0))
    monkeypatch.setattr(spoken_digits, "SMOOTHING_WIDTHS", (1,))
    assert torch.equal(made, spoken_digits.augment(spoken_digits.smooth_bands(mel, 9), Random(0)))
    assert not torch.equal(made, spoken_digits.augment(mel, Random(0)))


def test_stage_overfits_one_batch(folder, tiny_folder, tmp_path):
    clips = spoken_digits.clips_by_speaker(folder)
    stage = spoken_digits.DigitsStage(
        minomni.load(str(tiny_folder)),
        Recipe(100, 4, 5e-3, warmup=2),
        tmp_path,
        0,
        clips["ann"],
        clips["bob"],
    )
    batch = stage.batch(0)
    # Half of the batch is real, half synthetic.
    assert sorted(digit % 2 for digit in batch[1]) == [0, 0, 1, 1]
    stage.batch = lambda step: batch
    with torch.no_grad():
        before = sum(stage.losses(batch).values())
    train(stage, tmp_path / "run", until=6)
    with torch.no_grad():
        assert sum(stage.losses(batch).values()) < 0.6 * before


@pytest.mark.slow
def test_held_out_speaker_is_not_trained_on(folder, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(text_to_speech, "available", lambda: False)
    monkeypatch.setattr(spoken_digits, "RECIPE", replace(spoken_digits.RECIPE, steps=1, batch=2))
    monkeypatch.setattr(spoken_digits, "NORMALIZATION", 1.0)
    evaluated = []
    trained = []
    count_correct = spoken_digits.count_correct
    stage = spoken_digits.DigitsStage

    def record_evaluated(omni, clips):
        evaluated.append(clips)
        return count_correct(omni, clips)

    def record_trained(*arguments):
        real = arguments[4]
        trained.append(sorted(digit for _, digit in real))
        return stage(*arguments)

    monkeypatch.setattr(spoken_digits, "count_correct", record_evaluated)
    monkeypatch.setattr(spoken_digits, "DigitsStage", record_trained)

    # The shipped model is stored in half precision.
    weights.save(minomni.load(str(tiny_folder)).half(), tmp_path / "half")
    scores = spoken_digits.leave_one_out(str(tmp_path / "half"), folder, tmp_path / "corpus")
    assert scores == {"ann": (0, 3), "bob": (0, 3)}  # random weights answer nothing correctly
    assert trained == [[1, 3, 5], [0, 2, 4]]  # ann speaks the even digits

    # The clips of ann are normalized to the levels of bob, and the other way round.
    clips = spoken_digits.clips_by_speaker(folder)
    for held_out, other in zip(evaluated, ("bob", "ann")):
        assert_normalized([mel for mel, _ in held_out], clips[other])
    for path in folder.glob("*_bob_*"):
        path.unlink()
    with pytest.raises(UserError, match="1 speakers; leaving one out takes at least two"):
        spoken_digits.leave_one_out(str(tiny_folder), folder, tmp_path / "corpus")


def test_correct_answers_are_counted(folder, monkeypatch, tiny_folder):
    omni = minomni.load(str(tiny_folder))
    end = omni.config.thinker.tokens.im_end
    answers = [omni.tokenizer.encode(spoken_digits.answer(digit)) + [end] for digit in (0, 3, 2)]
    reply = type("Reply", (), {"tokens": answers})
    monkeypatch.setattr(omni.thinker, "generate", lambda *_: reply)
    clips = [(torch.zeros(128, 40), digit) for digit in (0, 1, 2)]
    assert spoken_digits.count_correct(omni, clips) == 2


@pytest.mark.skipif(
    not DIGITS.is_dir(),
    reason=f"no real digits in {DIGITS.name}/; MINOMNI_DIGITS names their folder",
)
def test_real_recordings_are_read():
    clips = spoken_digits.clips_by_speaker(DIGITS)
    assert len(clips) >= 4
    for mels in clips.values():
        assert {digit for _, digit in mels} == set(range(10))
        assert all(mel.shape[0] == 128 and 10 <= mel.shape[1] < 250 for mel, _ in mels)
