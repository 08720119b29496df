"""make_voice(): a voice fits the model, resembles its speaker and is saved; silence raises."""

import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch

import minomni
from minomni import __main__ as command
from minomni.checkpoint import saving
from minomni.config import SIZES
from minomni.data import corpus
from minomni.errors import UserError
from minomni.token2wav.voice import REFERENCE_FRAMES, free_token


@pytest.fixture(scope="module")
def omni(tiny_folder):
    return minomni.load(str(tiny_folder))


@pytest.fixture(scope="module")
def recordings():
    return corpus.sample_recordings(held_out=False)


def spoken_by(recordings, name: str, count: int) -> list[torch.Tensor]:
    """The first recordings of a voice."""
    waves = []
    for index, utterance in enumerate(recordings.utterances):
        if utterance.voice == name and len(waves) < count:
            waves.append(recordings.wave(index))
    return waves


def test_a_voice_fits_the_model_and_speaks(omni, recordings, tmp_path):
    voice = minomni.make_voice(torch.cat(spoken_by(recordings, "Anna", 2)), "me", omni)
    assert voice.name == "me"
    assert voice.cond.shape == (1, 160)
    assert voice.ref_mel.shape == (1, REFERENCE_FRAMES, 80)
    assert voice.bos_token == 502 == free_token(omni)  # this model's own two have 500 and 501
    assert voice.cond.norm().item() == pytest.approx(1, abs=1e-5)
    omni.voices["me"] = voice
    try:
        ours = omni.respond([{"role": "user", "content": "say a"}], voice="me")
        other = omni.respond([{"role": "user", "content": "say a"}], voice="Ann")
        saving.save(omni, tmp_path / "model")
        again = minomni.load(str(tmp_path / "model")).voices["me"]
    finally:
        del omni.voices["me"]
    assert len(ours.wave)
    assert not torch.equal(ours.wave[:100], other.wave[:100])
    assert again.bos_token == 502
    assert torch.equal(again.cond, voice.cond)
    assert torch.equal(again.ref_mel, voice.ref_mel)


def test_the_same_speaker_is_nearest(omni, recordings):
    """Recordings of one speaker are closer than those of two, for any text and level."""
    names = "Anna", "Karl", "Fiona", "Adam"
    pairs = {name: spoken_by(recordings, name, 4) for name in names}
    first = {
        n: minomni.make_voice(torch.cat(waves[:2]), n, omni).cond[0] for n, waves in pairs.items()
    }
    second = {
        n: minomni.make_voice(0.1 * torch.cat(waves[2:]), n, omni).cond[0]
        for n, waves in pairs.items()
    }
    for name in names:
        assert max(names, key=lambda other: float(first[name] @ second[other])) == name


def test_pauses_change_nothing(omni, recordings):
    wave = torch.cat(spoken_by(recordings, "Karl", 2))
    paused = torch.cat([torch.zeros(16_000), wave, torch.zeros(32_000)])
    plain, padded = (minomni.make_voice(w, "x", omni) for w in (wave, paused))
    # only the frames at the cuts differ: some dozen of several hundred
    assert float((plain.cond * padded.cond).sum()) > 0.999


def test_a_path_at_another_rate(omni, recordings, tmp_path):
    wave = spoken_by(recordings, "Adam", 1)[0].numpy()
    soundfile.write(tmp_path / "me.wav", np.repeat(wave, 3), 48_000)
    from_file = minomni.make_voice(tmp_path / "me.wav", "x", omni, bos_token=500)
    assert from_file.bos_token == 500
    direct = minomni.make_voice(wave, "x", omni).cond
    # Repeating samples attenuates the top of the spectrum a little.
    assert float((from_file.cond * direct).sum()) > 0.99


@pytest.mark.parametrize(
    ("samples", "says"),
    [
        (np.zeros(32_000, np.float32), "is silent"),
        (np.full(32_000, 1e-5, np.float32), "is silent"),
        (np.sin(np.arange(400) / 3).astype(np.float32), "better five"),
        (
            np.concatenate([np.random.RandomState(0).randn(8_000) / 9, np.zeros(80_000)]),
            r"0\.[56] s of speech",
        ),
        (np.zeros(100, np.float32), "more than 20 ms"),
        (np.full(32_000, np.nan, np.float32), "NaN"),
    ],
)
def test_recordings_without_speech_raise(omni, samples, says, tmp_path):
    path = tmp_path / "bad.wav"
    soundfile.write(path, samples, 16_000, subtype="FLOAT")
    with pytest.raises(UserError, match=says) as error:
        minomni.make_voice(path, "me", omni)
    assert str(path) in str(error.value)


def test_models_with_other_speaker_vectors_raise(omni, recordings):
    class Release:
        config, voices = SIZES["qwen7b"], {}

    with pytest.raises(UserError, match="not released"):
        minomni.make_voice(spoken_by(recordings, "Anna", 1)[0], "me", Release)


def test_every_voice_gets_its_own_token(omni, recordings):
    wave = spoken_by(recordings, "Anna", 1)[0]
    kept = dict(omni.voices)

    def add_voices():
        while True:
            name = f"voice {len(omni.voices)}"
            omni.voices[name] = minomni.make_voice(wave, name, omni)

    with pytest.raises(UserError, match="all 512 token ids are taken"):
        add_voices()
    tokens = [voice.bos_token for voice in omni.voices.values()]
    omni.voices = kept
    assert len(tokens) == len(set(tokens)) == 12
    assert max(tokens) == 511


def test_the_command_line_accepts_a_recording(
    tiny_folder, recordings, tmp_path, monkeypatch, capsys
):
    soundfile.write(tmp_path / "me.wav", spoken_by(recordings, "Karl", 1)[0], 16_000)
    line = [
        "minomni",
        "chat",
        "--model",
        str(tiny_folder),
        "--text",
        "say a",
        "--out",
        str(tmp_path / "reply.wav"),
    ]
    monkeypatch.setattr(sys, "argv", [*line, "--voice-from", str(tmp_path / "me.wav")])
    assert command.main() == 0
    assert (tmp_path / "reply.wav").exists()
    monkeypatch.setattr(sys, "argv", [*line, "--voice-from", str(tmp_path / "you.wav")])
    assert command.main() == 2
    assert "you.wav: no such file" in capsys.readouterr().err


@pytest.mark.slow
def test_import_is_lazy():
    code = (
        "import sys, minomni; assert 'torch' not in sys.modules; "
        "minomni.make_voice; assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="make_choice"):
        getattr(minomni, "make_choice")  # noqa: B009
