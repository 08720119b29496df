"""Sound of every layout, scale and container: right samples at their right times, or one line."""

import io
import struct
import subprocess
from contextlib import suppress
from fractions import Fraction

import av
import numpy as np
import pytest
import soundfile
import torch

from minomni.errors import UserError
from minomni.inputs.audio import MAX_AUDIO_S, audio_track
from minomni.inputs.media import MediaOptions, load_audio
from minomni.inputs.options import NO_OPTIONS


def tone(seconds: float, rate: int = 16_000, hz: float = 700) -> np.ndarray:
    return (0.25 * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)).astype(
        np.float32
    )


def pitches(wave: torch.Tensor, step: int = 3_200) -> set[int]:
    """Hz of the loudest wave in each fifth of a second, to the nearest 5."""
    pieces = [wave[i : i + step] for i in range(0, len(wave) - step + 1, step)]
    return {int(torch.fft.rfft(piece).abs().argmax()) * 16_000 // step for piece in pieces}


def file_of(samples: np.ndarray, rate: int, kind: str, subtype: str | None = None) -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, samples, rate, format=kind, subtype=subtype)
    return stream.getvalue()


def container(
    path, codec: str, pieces: list[tuple[float, np.ndarray]], rate: int, kind: str | None = None
):
    """A file whose one audio track holds each piece at its own time in seconds."""
    with av.open(path, "w", format=kind) as out:
        stream = out.add_stream(codec, rate=rate, layout="mono")
        for begin, samples in pieces:
            frame = av.AudioFrame.from_ndarray(samples[None], format="fltp", layout="mono")
            frame.sample_rate, frame.pts = rate, round(begin * rate)
            for part in av.AudioResampler(stream.format, "mono", rate).resample(frame):
                out.mux(stream.encode(part))
        out.mux(stream.encode(None))
    return path


def refused(source, *says, options=NO_OPTIONS):
    with pytest.raises(UserError) as error:
        load_audio(source, options)
    message = str(error.value)
    assert all(part in message for part in says), message
    assert "\n" not in message
    assert len(message) <= 500


# ----------------------------------------------------------------------------------------------
# arrays
@pytest.mark.parametrize(
    ("kind", "scale", "middle"),
    [
        ("int8", 127, 0),
        ("uint8", 127, 128),
        ("int16", 32_767, 0),
        (">i2", 32_767, 0),
        ("uint16", 32_767, 32_768),
        ("int32", 2**31 - 256, 0),
        ("float16", 1, 0),
        ("float64", 1, 0),
        (">f4", 1, 0),
    ],
)
def test_types_that_tell_their_scale(kind, scale, middle):
    samples = (tone(0.3).astype(np.float64) * scale + middle).astype(kind)
    tolerance = 0.02 if np.dtype(kind).itemsize == 1 else 2e-4
    assert np.allclose(load_audio(samples), tone(0.3), atol=tolerance)
    if samples.dtype.isnative:
        assert np.allclose(load_audio(torch.from_numpy(samples)), tone(0.3), atol=tolerance)


@pytest.mark.parametrize("kind", ["int64", "uint32", "uint64", "bool"])
@pytest.mark.reads("audio", "integers whose type does not tell their scale", "refused")
def test_types_that_do_not(kind):
    refused((tone(0.3) * 9_000).astype(kind), kind, "give int16")


@pytest.mark.reads("audio", "floats far above 1", "refused")
def test_scales_that_are_not_the_types():
    refused(tone(0.3) * 32_768, "from -1 to 1")
    refused((tone(0.3) * 128).astype(np.float64), "from -1 to 1")
    refused(file_of(tone(0.3) * 2_000, 16_000, "WAV", "FLOAT"), "from -1 to 1")
    refused((tone(0.3) * 32_768).astype(np.int32), "int32", "give int16")
    for top in (33_000, 700_000, 2**23):
        samples = np.linspace(-top, top - 1, 5_000).astype(np.int32)
        refused(samples, "int32", "24-bit", "floats from -1 to 1")
    assert load_audio(np.linspace(-(2**23) - 9, 0, 5_000).astype(np.int32)).min() < -0.003
    assert load_audio(tone(0.3) * 8).abs().max() > 1.9  # overshooting is not unscaled
    assert not load_audio(np.zeros(9_000, np.int32)).any()


@pytest.mark.parametrize(
    "layout",
    [
        lambda w: w[None],
        lambda w: w[:, None],
        lambda w: np.stack([w] * 3),
        lambda w: np.stack([w] * 3, 1),
        lambda w: np.stack([w] * 8),
    ],
)
def test_channels_are_the_fewer(layout):
    for rate, samples in ((16_000, tone(0.4)), (22_050, tone(0.4, 22_050))):
        wave = load_audio((layout(samples), rate))
        assert len(wave) == 6_400
        assert pitches(wave) == {700}
        assert wave.abs().max() == pytest.approx(0.25, abs=0.01)
        assert torch.equal(load_audio((torch.from_numpy(layout(samples)), rate)), wave)


def test_layouts_that_are_none():
    refused(np.zeros((300, 400), np.float32), "[samples, channels]", "64 channels")
    refused(np.zeros((1, 1, 9_000), np.float32), "[samples, channels]")
    refused(np.array(0.5, np.float32), "[samples]")
    refused(np.zeros((9_000, 0), np.float32), "[samples, channels]")


def test_rate_first_or_last():
    samples = (tone(0.5, 24_000) * 32_767).astype(np.int16)
    wave = load_audio((samples, 24_000))
    assert len(wave) == 8_000
    for pair in (
        (24_000, samples),
        (np.int32(24_000), samples),
        (samples, 24_000.0),
        (samples, torch.tensor(24_000)),
        {"array": samples, "sampling_rate": 24_000, "path": None},
    ):
        assert torch.equal(load_audio(pair), wave)
    listed = {"array": tone(0.1).tolist(), "sampling_rate": 16_000}
    assert torch.equal(load_audio(listed), torch.from_numpy(tone(0.1)))


@pytest.mark.parametrize(
    "rate", [None, 0, -8_000, True, float("nan"), float("inf"), 1e30, 0.1, "16000", [16_000]]
)
def test_rates_that_are_none(rate):
    refused((tone(0.1), rate), "the audio given")
    refused({"array": tone(0.1), "sampling_rate": rate}, "sampling rate in Hz")


def test_tuples_that_are_none():
    for pair in (
        (tone(0.1),),
        (tone(0.1), 16_000, 1),
        (tone(0.1), tone(0.1)),
        ("a.wav", 16_000),
        (1, 2),
        (),
    ):
        refused(pair, "(array, sampling rate in Hz)")


def test_lists_that_are_no_array():
    ragged = [[0.2, 0.1, 0.3], [0.4]]
    for source in ((ragged, 22_050), (22_050, ragged), {"array": ragged, "sampling_rate": 22_050}):
        refused(source, "the audio given: a list whose values cannot be read")
    refused((tone(0.1), ragged), "(array, sampling rate in Hz)")
    refused((tone(0.1), 9**5_000), "a very large number samples per second")
    refused(
        {"array": tone(0.1), "sampling_rate": -(10**4_999)},
        "a very large number samples per second",
    )


def test_tensors_of_every_kind():
    wave = torch.from_numpy(tone(0.3))
    assert torch.allclose(load_audio(wave.bfloat16()), wave, atol=2e-3)
    assert torch.equal(load_audio(wave.clone().requires_grad_()), wave)
    assert torch.equal(load_audio(wave[None].expand(4, -1)), wave)
    for empty in (
        wave.to("meta"),
        wave.to_sparse(),
        torch.quantize_per_tensor(wave, 0.1, 0, torch.qint8),
    ):
        refused(empty, "cannot be read")
    refused(wave + 1j, "expected numbers")


def test_views_of_arrays():
    samples = tone(0.3)
    assert np.array_equal(load_audio(samples[::-1]), samples[::-1])
    assert np.array_equal(load_audio(np.stack([samples, 0 * samples], 1)[:, ::-1]), samples / 2)
    fixed = samples.copy()
    fixed.setflags(write=False)
    wave = load_audio(fixed)
    wave += 1  # the caller's own stays as it was
    assert np.array_equal(fixed, samples)


@pytest.mark.reads("audio", "arrays that claim more samples than they hold", "refused")
def test_arrays_that_claim_any_length():
    one = np.zeros((1, 1), np.float32)
    refused(np.broadcast_to(one, (10**12, 1)), "more than 1311 s")
    refused((np.broadcast_to(one, (10**9, 64)), 1_000_000), "samples over all channels")
    refused(torch.zeros(1, dtype=torch.bfloat16).expand(10**12), "more than 1311 s")
    refused((np.zeros(2_000, np.float32), 1), "more than 1311 s")


# ----------------------------------------------------------------------------------------------
# start and end
@pytest.mark.slow
@pytest.mark.parametrize("rate", [16_000, 11_025, 22_050, 44_100, 48_000])
@pytest.mark.parametrize(
    ("start", "end"),
    [(None, None), (0.0, 0.3), (0.25, None), (0.1234, 0.777), (0.5, 9.0), (0.3, 1.1)],
)
def test_start_and_end_as_librosa_counts_them(rate, start, end):
    librosa = pytest.importorskip("librosa")
    content = file_of(np.random.RandomState(1).uniform(-0.5, 0.5, (rate + 77, 2)), rate, "WAV")
    expected, _ = librosa.load(
        io.BytesIO(content),
        sr=16_000,
        offset=start or 0.0,
        duration=None if end is None else end - (start or 0.0),
    )
    wave = load_audio(content, MediaOptions(audio_start=start, audio_end=end))
    assert len(wave) == len(expected)
    assert np.allclose(wave, expected, atol=1e-5)


def test_start_and_end_of_arrays():
    samples = tone(0.8)
    for start, end in ((0.1, 0.3), (0.1234, None), (0, 0.5)):
        wave = load_audio(samples, MediaOptions(audio_start=start, audio_end=end))
        assert np.array_equal(
            wave, samples[int(16_000 * start) : None if end is None else int(16_000 * end)]
        )
    assert len(load_audio((tone(0.8, 8_000), 8_000), MediaOptions(audio_start=0.25))) == 8_800


@pytest.mark.parametrize("number", [np.float32, np.float16, Fraction])
def test_start_and_end_of_other_types(number):
    wave = load_audio(tone(0.8), MediaOptions(audio_start=number(0.25), audio_end=number(0.5)))
    assert np.array_equal(wave, tone(0.8)[4_000:8_000])


@pytest.mark.parametrize(
    ("start", "end", "says"),
    [
        pytest.param(7**8_000, None, "audio_start is a very large number", id="large"),
        (np.float32(-2.5), None, "audio_start is -2.5"),
        (-0.1, None, "audio_start is -0.1"),
        (None, -1, "audio_end is -1"),
        (0.3, 0.3, "not behind audio_start"),
        (0.5, 0.2, "not behind audio_start"),
        (7.0, None, "after 7 s"),
        (7.0, 9.0, "after 7 s"),
        ("1", None, "expected seconds"),
        (float("nan"), None, "expected seconds"),
        (0.2, float("inf"), "expected seconds"),
        (True, None, "expected seconds"),
        (0.79, 0.8, "more than 20 ms"),
    ],
)
def test_start_and_end_out_of_range(start, end, says):
    options = MediaOptions(audio_start=start, audio_end=end)
    refused(tone(0.8), says, options=options)
    refused(file_of(tone(0.8), 16_000, "FLAC"), says, options=options)


# ----------------------------------------------------------------------------------------------
# streams that change or begin again
@pytest.mark.parametrize(
    ("kind", "subtype"), [("OGG", "VORBIS"), ("OGG", "OPUS"), ("FLAC", "PCM_16")]
)
@pytest.mark.parametrize(
    "rates", [(48_000, 48_000), (24_000, 48_000), (48_000, 8_000), (8_000, 16_000)]
)
def test_files_behind_each_other(kind, subtype, rates):
    parts = [
        file_of(np.stack([tone(s, r)] * c, 1), r, kind, subtype)
        for s, r, c in zip((0.8, 1.2), rates, (1, 2), strict=True)
    ]
    wave = load_audio(b"".join(parts))
    assert len(wave) == 32_000
    assert pitches(wave) == {700}
    assert torch.allclose(wave[13_200:], load_audio(parts[1])[400:], atol=1e-3)
    piece = load_audio(b"".join(parts), MediaOptions(audio_start=0.5, audio_end=1.5))
    assert len(piece) == pytest.approx(16_000, abs=3)


@pytest.mark.parametrize("rates", [(16_000, 44_100), (44_100, 22_050), (32_000, 48_000)])
@pytest.mark.reads(
    "audio",
    "audio that changes rate or channels midway, or begins again",
    "each part by its own rate",
)
def test_mp3_whose_rate_changes(rates):
    parts = [
        file_of(np.stack([tone(1, rate)] * channels, 1), rate, "MP3")
        for rate, channels in zip(rates, (2, 1), strict=True)
    ]
    wave = load_audio(b"".join(parts))
    assert len(wave) == pytest.approx(32_000, abs=3_500)
    assert pitches(wave) == {700}


def test_aac_whose_rate_changes(tmp_path):
    parts = []
    for rate in (48_000, 32_000):
        path = container(tmp_path / f"{rate}.aac", "aac", [(0, tone(1, rate))], rate, "adts")
        parts.append(path.read_bytes())
    wave = load_audio(b"".join(parts))  # each part has its encoder's own padding
    assert len(wave) == pytest.approx(32_000, abs=3_500)
    assert pitches(wave) <= {695, 700, 705}


def test_too_many_beginnings():
    refused(file_of(tone(0.05), 16_000, "OGG") * 1_001, "begins anew 1001 times")


@pytest.mark.parametrize(
    ("kind", "codec"), [("adts", "aac"), ("mpegts", "aac"), ("mp3", "libmp3lame"), ("ac3", "ac3")]
)
def test_broadcasts_joined_and_left_within_a_frame(tmp_path, kind, codec):
    content = container(
        tmp_path / "whole", codec, [(0, tone(2, 48_000))], 48_000, kind
    ).read_bytes()
    for piece in (
        content[: len(content) // 2 + 37],
        content[len(content) // 5 + 3 : -len(content) // 7],
    ):
        wave = load_audio(piece)
        assert len(wave) == pytest.approx(len(piece) / len(content) * 32_000, abs=2_500)
        assert 700 in pitches(wave)


# ----------------------------------------------------------------------------------------------
# headers that are wrong
def flac_that_claims(samples: int) -> bytes:
    content = bytearray(file_of(tone(1), 16_000, "FLAC"))
    content[21] = content[21] & 0xF0 | samples >> 32
    content[22:26] = struct.pack(">I", samples & 0xFFFFFFFF)
    return bytes(content)


@pytest.mark.parametrize("claim", [0, 2**36 - 1, 2**33 + 5])
@pytest.mark.reads(
    "audio",
    "lengths that were never written, or are absurd (FLAC from a pipe)",
    "what is there is read",
)
def test_flac_of_unknown_length(claim):
    assert np.allclose(load_audio(flac_that_claims(claim)), tone(1), atol=1e-4)


def test_flac_cut_short():
    refused(flac_that_claims(16_001), "cut short, 16000 of 16001 samples")
    content = file_of(tone(1), 16_000, "FLAC")
    refused(content[: len(content) // 2], "the audio given")


def wav_that_claims(riff: int, data: int, seconds: float = 1) -> bytes:
    content = bytearray(file_of(tone(seconds), 16_000, "WAV", "PCM_16"))
    content[4:8], content[40:44] = struct.pack("<I", riff), struct.pack("<I", data)
    return bytes(content)


@pytest.mark.parametrize(
    ("riff", "data"),
    [
        (0, 0),
        (36, 0),
        (2**32 - 1, 2**32 - 1),
        (2**31 - 1, 2**31 - 37),
        (0, 2**32 - 1),
        (2**32 - 1, 2**31 - 4_096),
        (32_036, 32_000),
        (7, 32_000),
    ],
)
def test_wav_of_unknown_length(riff, data):
    assert np.allclose(load_audio(wav_that_claims(riff, data)), tone(1), atol=1e-4)


@pytest.mark.parametrize("kind", ["WAV", "AIFF", "AU", "RF64", "CAF", "W64"])
@pytest.mark.reads("audio", "wav, aiff, au, caf, w64 that are cut short", "refused")
def test_files_cut_short(kind):
    whole = file_of(tone(1), 16_000, kind, "PCM_16")
    assert np.allclose(load_audio(whole), tone(1), atol=1e-4)
    for kept in (0.3, 0.9, 0.998):
        refused(whole[: int(len(whole) * kept)], "cut short")
    if kind != "AU":  # ffmpeg plays what lies behind its samples
        assert len(load_audio(whole + b"\xff" * 99)) == 16_000


@pytest.mark.parametrize(("kind", "codec"), [("caf", "pcm_s16le"), ("flv", "mp3"), ("asf", "mp2")])
def test_files_of_pipes_state_no_length(tmp_path, kind, codec):
    class Pipe(io.RawIOBase):
        def __init__(self):
            self.content = b""

        def write(self, content):
            self.content += bytes(content)
            return len(content)

        def writable(self):
            return True

        def seekable(self):
            return False

    pipe = Pipe()
    with av.open(pipe, "w", format=kind) as out:
        stream = out.add_stream(codec, rate=44_100, layout="mono")
        frame = av.AudioFrame.from_ndarray(tone(1, 44_100)[None], format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 44_100, 0
        for part in av.AudioResampler(stream.format, "mono", 44_100).resample(frame):
            out.mux(stream.encode(part))
        out.mux(stream.encode(None))
    whole = load_audio(pipe.content)
    assert len(whole) == pytest.approx(16_000, abs=1_200)
    half = load_audio(pipe.content[: len(pipe.content) // 2])
    assert 0.3 * len(whole) < len(half) < 0.7 * len(whole)


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("a.mkv", "flac"),
        ("a.webm", "libopus"),
        ("a.mp4", "aac"),
        ("a.mov", "aac"),
        ("a.avi", "mp3"),
        ("a.asf", "mp2"),
        ("a.wma", "pcm_s16le"),
        ("a.flv", "mp3"),
    ],
)
@pytest.mark.reads("media", "mkv, webm, mp4, mov, avi, asf, flv that are cut short", "refused")
def test_containers_cut_short(tmp_path, name, codec):
    content = container(tmp_path / name, codec, [(0, tone(1, 48_000))], 48_000).read_bytes()
    for kept in (0.4, 0.8):
        refused(content[: int(len(content) * kept)], "cut short")
    wave = load_audio(content)
    for trailer in (
        b"TAG" + b"x" * 125,
        b"APETAGEX" + b"\0" * 60,
        b"\0" * 40,
        b"\xff" * 1_000,
        b"--boundary--\r\n",
        b"\x7f\xff\xff\xffcamr1234" * 9,
        struct.pack(">I4s", 24, b"free") + b"\0" * 16 + b"rest",
    ):
        if name.endswith(("mp4", "mov")):
            assert torch.equal(load_audio(content + trailer), wave), trailer[:8]


@pytest.mark.parametrize("channels", [3, 6, 8, 9, 24])
@pytest.mark.parametrize("kind", ["WAV", "FLAC"])
def test_many_channels(channels, kind):
    """Eight planes made PyAV's to_ndarray read beyond them."""
    if kind == "FLAC" and channels > 8:
        pytest.skip("FLAC holds at most eight channels")
    samples = np.stack([tone(0.3) * (1 + i % 2) for i in range(channels)], 1)
    assert np.allclose(load_audio(file_of(samples, 16_000, kind)), samples.mean(1), atol=1e-4)


@pytest.mark.parametrize("kind", ["WAV", "FLAC"])
@pytest.mark.reads(
    "audio",
    "audio longer than the largest context, 1311 s",
    "refused, unless audio_start and audio_end select a part that fits",
)
def test_sound_longer_than_the_context(kind):
    stream = io.BytesIO()
    with soundfile.SoundFile(stream, "w", 8_000, 1, format=kind, subtype="PCM_16") as file:
        file.write(np.zeros(int(8_000 * (MAX_AUDIO_S + 1)), np.int16))
    refused(stream.getvalue(), "more than 1311 s of audio", "context")
    assert (
        len(load_audio(stream.getvalue(), MediaOptions(audio_start=1_300, audio_end=1_301)))
        == 16_000
    )


def long_wav(path, claimed: int, held: int, rate: int = 24_000):
    """A stereo wav of 16 bits whose header claims some bytes of sound, and which holds others, all
    zeros.
    """
    content = wav_that_claims(min(claimed + 36, 2**32 - 1), claimed, 0)[:44]
    with open(path, "wb") as file:
        file.write(content[:22] + struct.pack("<HIIH", 2, rate, 4 * rate, 4) + content[34:])
        file.truncate(44 + held)
    return path


@pytest.mark.reads("audio", "hours of audio in a wav", "refused before they are decoded")
def test_long_wavs_are_refused_by_their_header(tmp_path, monkeypatch):
    path = long_wav(tmp_path / "long.wav", 2_147_400_000, 2_147_400_100)
    assert len(load_audio(path, MediaOptions(audio_start=2, audio_end=2.5))) == 8_000
    lying = long_wav(tmp_path / "lying.wav", 2_147_400_000, 192_000)
    assert len(load_audio(lying)) == 32_000
    monkeypatch.setattr("minomni.inputs.audio._decode_parts", None)
    refused(path, "long.wav: more than 1311 s of audio")
    refused(path, "more than 1311 s", options=MediaOptions(audio_start=100, audio_end=1_500))


def test_decoders_say_nothing_themselves(tmp_path, capfd):
    """mpg123 wrote to stderr before our line; so may ffmpeg."""
    broken = bytearray(file_of(np.random.RandomState(0).uniform(-1, 1, 44_100), 44_100, "MP3"))
    broken[3_000:3_400] = b"\xff\xfb\x90" * 133 + b"\0"
    broken[9_000:9_900] = b"\0" * 900
    (tmp_path / "broken.mp3").write_bytes(broken[:-100])
    capfd.readouterr()
    with suppress(UserError):
        load_audio(tmp_path / "broken.mp3")
    assert capfd.readouterr() == ("", "")


# ----------------------------------------------------------------------------------------------
# tracks at their times
def silence(seconds: float) -> np.ndarray:
    return np.zeros(round(seconds * 48_000), np.float32)


def beep(seconds: float, at: float) -> np.ndarray:
    """Silence with a tone of 100 ms at a time, at 48 kHz."""
    samples = silence(seconds)
    samples[round(at * 48_000) :][:4_800] = tone(0.1, 48_000)
    return samples


def onset(wave: torch.Tensor) -> float:
    return int((wave.abs() > 0.05).float().argmax()) / 16_000


def track(path, origin, end=None):
    with open(path, "rb") as stream:
        return audio_track(stream, path.name, origin, end)


LATE = [(0.7, beep(1.5, 0.4))]
HOLE = [(0.0, silence(0.5)), (1.3, beep(1, 0.25))]
HOLES = [(0.25, silence(0.5)), (1.5, silence(0.5)), (3.0, beep(1, 0.6))]


@pytest.mark.parametrize(("pieces", "at"), [(LATE, 1.1), (HOLE, 1.55), (HOLES, 3.6)])
@pytest.mark.parametrize(
    ("name", "codec"),
    [("a.mkv", "flac"), ("a.webm", "libopus"), ("a.mp4", "aac"), ("a.mkv", "pcm_s16le")],
)
@pytest.mark.reads(
    "audio", "sound track that begins after the video, or has holes", "silence there"
)
def test_samples_go_to_their_times(tmp_path, name, codec, pieces, at):
    path = container(tmp_path / name, codec, pieces, 48_000)
    wave = track(path, 0.0)
    ends = pieces[-1][0] + len(pieces[-1][1]) / 48_000
    assert wave.dtype == torch.float32
    assert len(wave) == pytest.approx(ends * 16_000, abs=1_500)
    assert onset(wave) == pytest.approx(at, abs=0.02)
    assert onset(track(path, 0.35)) == pytest.approx(at - 0.35, abs=0.02)  # what lies before is cut
    assert onset(track(path, -0.5)) == pytest.approx(at + 0.5, abs=0.02)
    assert len(track(path, 0.2, at)) == pytest.approx((at - 0.2) * 16_000, abs=1_500)
    assert len(track(path, 0.2, at)) <= round((at - 0.2) * 16_000)


def test_without_an_origin_samples_follow_each_other(tmp_path):
    path = container(tmp_path / "hole.mkv", "flac", HOLE, 48_000)
    assert onset(track(path, None)) == pytest.approx(0.5 + 0.25, abs=0.01)
    assert onset(load_audio(path)) == pytest.approx(0.5 + 0.25, abs=0.01)


def test_times_that_tremble_are_no_holes(tmp_path):
    """Frames whose times are rounded to 20 ms: the samples follow each other without a click."""
    samples = tone(2, 48_000)
    pieces = [
        (round(i / 48_000 * 50) / 50, samples[i : i + 4_000]) for i in range(0, 96_000, 4_000)
    ]
    wave = track(container(tmp_path / "a.mkv", "pcm_s16le", pieces, 48_000), 0.0)
    assert len(wave) == 32_000
    assert torch.allclose(wave[100:-100], torch.from_numpy(tone(2))[100:-100], atol=1e-3)


def test_no_track_and_no_sound_after_the_origin(tmp_path):
    path = tmp_path / "mute.mkv"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        out.mux(
            stream.encode(
                av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
            )
        )
        out.mux(stream.encode(None))
    assert track(path, 0.0) is None
    assert track(path, None) is None
    path = container(tmp_path / "short.mkv", "flac", [(0, tone(1, 48_000))], 48_000)
    with pytest.raises(UserError, match="short.mkv: 0 ms of audio"):
        track(path, 1.5)
    with pytest.raises(UserError, match="short.mkv: more than 1311 s"):
        track(path, -1e9)


@pytest.mark.parametrize("pieces", [LATE, HOLE, HOLES])
def test_tracks_as_ffmpeg_places_them(tmp_path, pieces):
    ffmpeg = pytest.importorskip(
        "imageio_ffmpeg", reason="imageio-ffmpeg, the reference, is not installed"
    )
    path = container(tmp_path / "a.mkv", "flac", pieces, 48_000)
    command = [
        ffmpeg.get_ffmpeg_exe(),
        "-v",
        "error",
        "-copyts",
        "-i",
        str(path),
        "-af",
        "aresample=async=1:first_pts=0",
        "-ar",
        "16000",
        "-f",
        "f32le",
        "-",
    ]
    expected = np.frombuffer(subprocess.run(command, capture_output=True, check=True).stdout, "<f4")
    wave = track(path, 0.0).numpy()
    assert abs(len(wave) - len(expected)) <= 32
    common = min(len(wave), len(expected))
    assert np.corrcoef(wave[:common], expected[:common])[0, 1] > 0.999


def test_files_are_as_ffmpeg_decodes_them(tmp_path):
    ffmpeg = pytest.importorskip(
        "imageio_ffmpeg", reason="imageio-ffmpeg, the reference, is not installed"
    )
    noise = np.random.RandomState(2).uniform(-0.5, 0.5, 24_000).astype(np.float32)
    for name, codec in (
        ("a.wav", "adpcm_ima_wav"),
        ("a.wav", "pcm_mulaw"),
        ("a.caf", "alac"),
        ("a.mka", "ac3"),
        ("a.w64", "pcm_s24le"),
        ("a.aiff", "pcm_s32be"),
        ("a.mkv", "pcm_f64le"),
    ):
        path = container(tmp_path / name, codec, [(0, noise)], 48_000)
        command = [
            ffmpeg.get_ffmpeg_exe(),
            "-v",
            "error",
            "-i",
            str(path),
            "-ar",
            "48000",
            "-f",
            "f32le",
            "-",
        ]
        expected = np.frombuffer(
            subprocess.run(command, capture_output=True, check=True).stdout, "<f4"
        )
        wave = load_audio(path).numpy()
        expected = load_audio((expected, 48_000)).numpy()
        assert len(wave) == len(expected), (name, codec)
        assert np.allclose(wave, expected, atol=1e-4), (name, codec)
