"""Real digits: what augments them, what learns from them, and a count that leaves the tested
speaker out.
"""

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

ROOT = Path(__file__).parents[1]

DIGITS = Path(os.environ.get("MINOMNI_DIGITS", ROOT.parent / "shared" / "data" / "fsdd"))


@pytest.fixture
def folder(tmp_path) -> Path:
    """Six recordings as if two speakers had said digits."""
    recordings = corpus.sample_recordings(held=False)
    for i in range(6):
        soundfile.write(tmp_path / f"{i}_{('ann', 'bob')[i % 2]}_0.wav", recordings.wave(i), 16_000)
    return tmp_path


def test_augmented_mels_stay_mels(folder):
    mel = spoken_digits.clips_by_speaker(folder)["ann"][0][0]
    made = [spoken_digits.augment(mel, Random(i)) for i in range(20)]
    assert torch.equal(made[3], spoken_digits.augment(mel, Random(3)))
    assert not torch.equal(made[3][:, :9], made[4][:, :9])
    for x in made:
        assert x.shape[0] == 128
        assert 0.6 < x.shape[1] / mel.shape[1] < 2
        assert torch.isfinite(x).all()
        assert 0 < x.max() - x.min() <= spoken_digits.RANGE + 1e-5


def test_resampling_by_hand():
    x = torch.tensor([[0.0, 1.0, 4.0]])
    assert spoken_digits.resample(x, torch.tensor([0.0, 0.5, 1.5, 2.0])).tolist() == [
        [0.0, 0.5, 2.5, 4.0]
    ]


def test_levels_by_hand(monkeypatch):
    mel = torch.tensor(
        [[0.0, 4.0, 6.0], [0.0, 0.0, 2.0]]
    )  # loudness 0, 2, 4: the last two frames are the louder half
    levels = spoken_digits.band_levels([mel[:, :1], mel[:, 1:]])
    torch.testing.assert_close(levels, torch.tensor([[10 / 3], [2 / 3]]))
    monkeypatch.setattr(spoken_digits, "LEVELLED", 0.5)
    made = spoken_digits.band_normalized(mel, torch.tensor([[1.0], [1.0]]))  # bands are at 5 and 1
    assert made.tolist() == [[-2.0, 2.0, 4.0], [0.0, 0.0, 2.0]]


def test_a_microphone_is_levelled_out(folder):
    mel = spoken_digits.clips_by_speaker(folder)["ann"][0][0]
    levels, colour = torch.zeros(128, 1), torch.linspace(-0.3, 0.3, 128)[:, None]
    apart = spoken_digits.band_normalized(
        mel + colour - colour.mean(), levels
    ) - spoken_digits.band_normalized(mel, levels)
    torch.testing.assert_close(
        apart, (colour - colour.mean()).expand_as(apart) * (1 - spoken_digits.LEVELLED)
    )


def test_blur_by_hand():
    mel = torch.tensor([[0.0], [3.0], [0.0], [6.0]])
    assert spoken_digits.smooth_bands(mel, 3).flatten().tolist() == [1.0, 1.0, 3.0, 4.0]
    assert torch.equal(spoken_digits.smooth_bands(mel, 1), mel)


def assert_levelled(mels: list[torch.Tensor], clips: list):
    """Their bands, in the louder half of the frames, are where the clips' are on average."""
    wanted = torch.cat([mel for mel, _ in clips], dim=1).mean(1)
    for mel in mels:
        loud = mel[:, mel.mean(0) >= mel.mean(0).median()].mean(1)
        torch.testing.assert_close(loud, wanted, rtol=0, atol=1e-4)


def test_lessons_are_levelled(folder, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(spoken_digits, "LEVELLED", 1.0)
    clips = spoken_digits.clips_by_speaker(folder)
    stage = spoken_digits.DigitsStage(
        minomni.load(str(tiny_folder)),
        Recipe(100, 4, 5e-3),
        tmp_path,
        0,
        clips["ann"],
        clips["bob"],
    )
    assert_levelled(stage.batch(0)[0], clips["ann"])  # the crowd is no measure of people


def test_lessons_are_blurred(folder, monkeypatch):
    mel = spoken_digits.clips_by_speaker(folder)["ann"][0][0]
    monkeypatch.setattr(spoken_digits, "BLURS", (9,))
    made = spoken_digits.augment(mel, Random(0))
    monkeypatch.setattr(spoken_digits, "BLURS", (1,))
    assert torch.equal(made, spoken_digits.augment(spoken_digits.smooth_bands(mel, 9), Random(0)))
    assert not torch.equal(made, spoken_digits.augment(mel, Random(0)))


def test_the_stage_overfits_one_batch(folder, tiny_folder, tmp_path):
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
    assert sorted(digit % 2 for digit in batch[1]) == [
        0,
        0,
        1,
        1,
    ]  # half of a batch are people, half the crowd
    stage.batch = lambda step: batch
    with torch.no_grad():
        before = sum(stage.losses(batch).values())
    train(stage, tmp_path / "run", until=12)
    with torch.no_grad():
        assert sum(stage.losses(batch).values()) < 0.6 * before


def test_the_tested_speaker_is_left_out(folder, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(text_to_speech, "available", lambda: False)
    monkeypatch.setattr(spoken_digits, "RECIPE", replace(spoken_digits.RECIPE, steps=1, batch=2))
    monkeypatch.setattr(spoken_digits, "LEVELLED", 1.0)
    seen, asked, count = [], [], spoken_digits.count_correct
    monkeypatch.setattr(
        spoken_digits,
        "count_correct",
        lambda omni, clips: asked.append(clips) or count(omni, clips),
    )
    stage = spoken_digits.DigitsStage
    monkeypatch.setattr(
        spoken_digits,
        "DigitsStage",
        lambda *a: seen.append(sorted(d for _, d in a[4])) or stage(*a),
    )
    weights.save(
        minomni.load(str(tiny_folder)).half(), tmp_path / "half"
    )  # as the shipped one is stored
    scores = spoken_digits.leave_one_out(str(tmp_path / "half"), folder, tmp_path / "corpus")
    assert scores == {
        "ann": (0, 3),
        "bob": (0, 3),
    }  # a model of random weights answers nothing right
    assert seen == [[1, 3, 5], [0, 2, 4]]  # ann says the even digits
    clips = spoken_digits.clips_by_speaker(folder)
    for held, other in zip(
        asked, ("bob", "ann")
    ):  # ann is asked at bob's level, which does not know hers
        assert_levelled([mel for mel, _ in held], clips[other])
    for path in folder.glob("*_bob_*"):
        path.unlink()
    with pytest.raises(UserError, match="1 speakers; leaving one out takes at least two"):
        spoken_digits.leave_one_out(str(tiny_folder), folder, tmp_path / "corpus")


def test_right_answers_are_counted(folder, monkeypatch, tiny_folder):
    omni = minomni.load(str(tiny_folder))
    says = {
        f: omni.tokenizer.encode(spoken_digits.answer(f)) + [omni.config.thinker.tokens.im_end]
        for f in (0, 2, 3)
    }
    reply = type("Reply", (), {"tokens": [says[0], says[3], says[2]]})
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
