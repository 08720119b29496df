"""Files of every kind become sound, pictures and clips; what cannot be read is one line with its
name.
"""

import io
import struct
from fractions import Fraction

import av
import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from minomni.config import QWEN7B, TINY
from minomni.errors import UserError
from minomni.inputs.media import Clip, load_audio, load_image, load_video, sample_indices
from minomni.inputs.patches import video_patches

MEDIA = TINY.media


def tone(seconds: float, rate: int = 16_000) -> np.ndarray:
    return (0.3 * np.sin(2 * np.pi * 440 * np.arange(int(seconds * rate)) / rate)).astype(
        np.float32
    )


def picture(i: int, height: int = 64, width: int = 96) -> np.ndarray:
    """A gray level that tells the frame number, its upper left quarter white."""
    frame = np.full((height, width, 3), 5 * i, np.uint8)
    frame[: height // 2, : width // 2] = 255
    return frame


def film(
    path,
    frames: int = 24,
    rate: int = 12,
    sound: float = 0.0,
    codec: str = "libx264",
    tracks: str = "aac",
    height: int = 64,
    width: int = 96,
):
    """A clip of `frames` pictures with `sound` seconds of a tone, on the left of two channels."""
    with av.open(str(path), "w") as container:
        video = container.add_stream(codec, rate=rate)
        video.height, video.width, video.pix_fmt = height, width, "yuv420p"
        audio = container.add_stream(tracks, rate=48_000, layout="stereo") if sound else None
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(i, height, width), format="rgb24")
            frame.pts = i
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        if audio is not None:
            samples = np.stack([tone(sound, 48_000), 0 * tone(sound, 48_000)])
            track = av.AudioFrame.from_ndarray(samples, format="fltp", layout="stereo")
            track.sample_rate, track.pts = 48_000, 0
            resampler = av.AudioResampler(format=audio.format, layout="stereo", rate=48_000)
            for piece in resampler.resample(track):
                container.mux(audio.encode(piece))
            container.mux(audio.encode(None))
    return path


def pitch(wave: torch.Tensor) -> float:
    """Hz of the loudest wave."""
    return float(torch.fft.rfft(wave).abs().argmax()) * 16_000 / len(wave)


# ----------------------------------------------------------------------------------------------
# sound
@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 44_100, 48_000])
@pytest.mark.parametrize("kind", ["wav", "flac", "ogg", "mp3"])
def test_sound_files(tmp_path, kind, rate):
    path = tmp_path / f"tone.{kind}"
    soundfile.write(
        path, np.stack([tone(1, rate), 0 * tone(1, rate)], 1), rate
    )  # stereo, one side silent
    wave = load_audio(path)
    assert wave.dtype == torch.float32
    assert wave.ndim == 1
    assert len(wave) == pytest.approx(
        16_000, abs=1_600 if kind == "mp3" else 1
    )  # mp3 pads with its own frames
    assert pitch(wave) == pytest.approx(440, abs=2)
    assert float(wave.abs().max()) == pytest.approx(0.15, abs=0.02)
    assert torch.equal(load_audio(path.read_bytes()), wave)
    assert torch.equal(load_audio(str(path)), wave)


def test_sound_of_other_containers(tmp_path):
    for name, tracks in (("clip.mp4", "aac"), ("clip.mkv", "flac")):
        wave = load_audio(film(tmp_path / name, sound=1.0, tracks=tracks))
        assert len(wave) == pytest.approx(16_000, abs=700)  # aac comes in blocks of 1024
        assert pitch(wave) == pytest.approx(440, abs=2)
        assert float(wave[2000:14_000].abs().max()) == pytest.approx(0.15, abs=0.02)


def test_arrays_of_sound():
    wave = tone(0.5)
    for source in (wave, torch.from_numpy(wave), (wave, 16_000), wave.astype(np.float64)):
        assert torch.equal(load_audio(source), torch.from_numpy(wave))
    assert torch.allclose(load_audio((np.stack([wave, wave], 1), 16_000)), torch.from_numpy(wave))
    assert len(load_audio((tone(0.5, 44_100), 44_100))) == 8_000
    whole = np.round(wave * 32_767).astype(np.int16)
    assert torch.allclose(
        load_audio(whole), torch.from_numpy(wave), atol=1e-4
    )  # 16 bits: steps of 3e-5
    assert torch.allclose(
        load_audio((np.round(wave * 127) + 128).astype(np.uint8)), torch.from_numpy(wave), atol=2e-2
    )


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (np.zeros(0, np.float32), "the audio given: 0 ms of audio; more than 20 ms are needed"),
        (np.zeros(320, np.float32), "20 ms of audio"),
        (np.full(9_000, np.nan, np.float32), "NaN or infinite"),
        (np.array([0.0, np.inf] * 900), "NaN or infinite"),
        ((np.zeros(9_000), 0), "0 samples per second"),
        (np.zeros((2, 2, 900)), "expected .samples. or"),
        (np.array(["a", "b"]), "expected numbers"),
        (7, "the audio given: a int cannot be read"),
        ("nowhere.wav", "nowhere.wav: no such file"),
        ("https://example.com/a.wav", "web addresses are not fetched"),
        ("", "an empty path"),
        (".", "not a file"),
        ("a" * 5_000, "aaa"),
        ("a\0b", "no such file|cannot be opened"),
        (b"words, not sound", "the audio given: not readable as audio"),
    ],
)
def test_no_sound(source, says):
    with pytest.raises(UserError, match=says) as error:
        load_audio(source)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


def test_no_sound_in_files(tmp_path):
    (tmp_path / "noise.raw").write_bytes(b"\0" * 999)
    with pytest.raises(UserError, match="noise.raw: (not readable as|holds no) audio"):
        load_audio(tmp_path / "noise.raw")
    with pytest.raises(UserError, match="mute.mp4: holds no audio"):
        load_audio(film(tmp_path / "mute.mp4", frames=2))


# ----------------------------------------------------------------------------------------------
# pictures
def bytes_of(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_modes(mode):
    gray = Image.new("L", (8, 8), 255)
    image = (
        Image.fromarray(np.full((8, 8), 65_535, np.uint16))
        if mode == "I;16"
        else gray.convert(mode)
    )
    loaded = load_image(bytes_of(image))
    assert loaded.mode == "RGB"
    assert np.asarray(loaded).min() >= 254


def test_sixteen_bits_are_scaled_and_not_clipped():
    levels = np.linspace(0, 65_535, 64).astype(np.uint16).reshape(8, 8)
    assert np.array_equal(
        np.asarray(load_image(bytes_of(Image.fromarray(levels))))[..., 0], levels // 257
    )


def test_transparency_lies_on_white():
    half = Image.new("RGBA", (4, 4), (255, 0, 0, 128))
    assert load_image(half).getpixel((0, 0)) == (255, 127, 127)
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([0, 0, 0])
    assert load_image(bytes_of(palette, transparency=0)).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_pictures_stand_upright(kind):
    lying = Image.new("RGB", (40, 20), "black")
    exif = lying.getexif()
    exif[0x0112] = 6  # turn by 90 degrees to view
    assert load_image(bytes_of(lying, kind, exif=exif)).size == (20, 40)


def test_arrays_of_pictures():
    array = picture(3)
    for source in (array, torch.from_numpy(array), Image.fromarray(array)):
        assert np.array_equal(np.asarray(load_image(source)), array)
    with pytest.raises(UserError, match=r"expected \[h, w\], \[h, w, 3\] or"):
        load_image(np.zeros((5, 8, 8), np.uint8))


def test_broken_pictures(tmp_path):
    path = tmp_path / "half.png"
    whole = bytes_of(
        Image.fromarray(np.random.RandomState(0).randint(0, 255, (64, 64, 3), np.uint8))
    )
    for content in (whole[: len(whole) // 2], b"", b"words"):
        path.write_bytes(content)
        with pytest.raises(UserError, match="half.png: not a readable image") as error:
            load_image(path)
        assert "0x" not in str(error.value)  # no memory addresses


# ----------------------------------------------------------------------------------------------
# clips
@pytest.mark.parametrize(
    ("total", "rate", "expected"),
    [
        (
            300,
            30,
            [
                0,
                16,
                31,
                47,
                63,
                79,
                94,
                110,
                126,
                142,
                157,
                173,
                189,
                205,
                220,
                236,
                252,
                268,
                283,
                299,
            ],
        ),  # 10 s: 20
        (33, 30, [0, 11, 21, 32]),  # 1.1 s, at least 4
        (9, 3, [0, 2, 3, 5, 6, 8]),  # 3 s: 6
        (7, 2, [0, 1, 2, 4, 5, 6]),  # 7 wanted, an even number taken
        (3, 30, [0, 2]),
        (1, 30, [0]),  # fewer than asked for
    ],
)
def test_which_frames(total, rate, expected):
    """linspace(0, total - 1, n) rounded, n the even part of 2 frames a second, 4 or more (release:
    qwen-omni-utils).
    """
    assert sample_indices(total, rate, MEDIA) == expected


def test_never_more_frames_than_allowed():
    assert len(sample_indices(100_000, 30, QWEN7B.media)) == 768


@pytest.mark.parametrize(
    ("name", "codec", "tracks", "exact"),
    [
        ("a.mp4", "libx264", "aac", 1e-3),
        ("a.webm", "libvpx", "libopus", 1e-3),
        ("a.mkv", "libx264", "aac", 1e-3),
        ("a.avi", "mpeg4", "mp3", 0.09),
        ("b.avi", "libx264", "mp3", 0.09),  # no times, only an order: a frame off at most
    ],
)
def test_containers(tmp_path, name, codec, tracks, exact):
    path = film(tmp_path / name, frames=24, rate=12, sound=2.0, codec=codec, tracks=tracks)
    clip = load_video(path, MEDIA, with_audio=True)
    assert clip.frames.dtype == torch.uint8
    assert clip.frames.shape == (4, 56, 84, 3)
    levels = clip.frames[:, 40, 70].float().mean(1).round()
    assert torch.allclose(levels, 5.0 * torch.tensor([0, 8, 15, 23]), atol=4)  # lossy codecs
    assert torch.allclose(clip.seconds, torch.tensor([0, 8, 15, 23]) / 12, atol=exact)
    assert (clip.seconds.diff() > 0).all()
    assert len(clip.wave) == pytest.approx(32_000, abs=1_600)
    assert pitch(clip.wave) == pytest.approx(440, abs=2)
    silent = load_video(path.read_bytes(), MEDIA, with_audio=False)
    assert silent.wave is None
    assert torch.equal(silent.frames, clip.frames)


def test_times_are_the_files_own(tmp_path):
    """A clip whose pictures come faster and faster, and late after the file's beginning."""
    shown = [0, 400, 700, 900, 1_000]  # ms
    with av.open(str(tmp_path / "uneven.mkv"), "w") as container:
        video = container.add_stream("libx264", rate=5)
        video.height, video.width, video.pix_fmt = 64, 96, "yuv420p"
        video.codec_context.time_base = Fraction(1, 1_000)
        for i, pts in enumerate(shown):
            frame = av.VideoFrame.from_ndarray(picture(i), format="rgb24")
            frame.pts = 3_000 + pts
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
    clip = load_video(tmp_path / "uneven.mkv", MEDIA, with_audio=False)
    assert torch.allclose(
        clip.seconds, torch.tensor([0.0, 0.4, 0.9, 1.0]), atol=1e-3
    )  # frames 0, 1, 3, 4


def test_frames_from_files_are_what_patching_wants(tmp_path):
    """Frames are shrunk as they are decoded; patches must be those of the frames at full size."""
    path = film(tmp_path / "large.mp4", frames=12, rate=6, height=240, width=320)
    with av.open(str(path)) as container:
        whole = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    clip = load_video(path, MEDIA, with_audio=False)
    full = torch.from_numpy(np.stack([whole[i] for i in sample_indices(12, 6, MEDIA)]))
    vision = TINY.thinker.vision
    assert clip.frames[0].numel() < full[0].numel() / 5
    small, large = video_patches(clip.frames, vision, MEDIA), video_patches(full, vision, MEDIA)
    assert small[1] == large[1]
    assert torch.equal(small[0], large[0])


def turned(content: bytes) -> bytes:
    """An mp4 whose track header says: rotate by 90 degrees clockwise to view, as phones do."""
    at = content.index(b"tkhd") + 4 + 40
    one = 1 << 16
    return (
        content[:at] + struct.pack(">9i", 0, one, 0, -one, 0, 0, 0, 0, 1 << 30) + content[at + 36 :]
    )


def test_films_stand_upright(tmp_path):
    content = film(tmp_path / "lying.mp4", frames=4, rate=4).read_bytes()
    lying, upright = (
        load_video(c, MEDIA, with_audio=False).frames[0] for c in (content, turned(content))
    )
    assert lying.shape == (56, 84, 3)
    assert upright.shape == (84, 56, 3)
    assert upright[20, 45].min() > 250
    assert upright[20, 10].max() < 5


def test_arrays_of_frames():
    frames = np.stack([picture(i) for i in range(4)])
    clip = load_video(frames, MEDIA, with_audio=False)
    assert torch.equal(clip.frames, torch.from_numpy(frames))
    assert clip.seconds.tolist() == [
        0.0,
        0.5,
        1.0,
        1.5,
    ]
    assert load_video((torch.from_numpy(frames), 4), MEDIA, False).seconds.tolist() == [
        0.0,
        0.25,
        0.5,
        0.75,
    ]
    ready = Clip(clip.frames, clip.seconds, torch.zeros(9))
    assert load_video(ready, MEDIA, True) is ready


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (np.zeros((4, 8, 8), np.uint8), "frames of shape"),
        (np.zeros((0, 8, 8, 3), np.uint8), "n > 0"),
        (np.zeros((4, 8, 8, 3), np.float32), "expected uint8"),
        ((np.zeros((4, 8, 8, 3), np.uint8), 0), "0 frames per second"),
        (["a.png", "b.png"], "frame 1: a.png: no such file"),
        ("nowhere.mp4", "nowhere.mp4: no such file"),
        (b"words, not a film", "the video given: not a readable video"),
    ],
)
def test_no_clip(source, says):
    with pytest.raises(UserError, match=says):
        load_video(source, MEDIA, with_audio=False)


def test_sound_track_that_was_asked_for(tmp_path):
    mute = film(tmp_path / "mute.mp4")
    assert load_video(mute, MEDIA, with_audio=False).wave is None
    with pytest.raises(UserError, match="mute.mp4: has no audio track"):
        load_video(mute, MEDIA, with_audio=True)
    with pytest.raises(UserError, match="click.mkv: 1[0-9] ms of audio"):
        load_video(film(tmp_path / "click.mkv", sound=0.015, tracks="flac"), MEDIA, with_audio=True)
    soundfile.write(tmp_path / "tone.wav", tone(1), 16_000)
    with pytest.raises(UserError, match="tone.wav: holds no video"):
        load_video(tmp_path / "tone.wav", MEDIA, with_audio=True)


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.99])
def test_films_cut_short(tmp_path, kept):
    content = film(tmp_path / "whole.mp4", sound=1.0).read_bytes()
    path = tmp_path / "cut.mp4"
    path.write_bytes(content[: int(len(content) * kept)])
    for load in (lambda: load_video(path, MEDIA, with_audio=False), lambda: load_audio(path)):
        with pytest.raises(UserError, match="cut.mp4: cut short"):
            load()


def test_stretched_films():
    frames = load_video(np.zeros((4, 2, 402, 3), np.uint8), MEDIA, with_audio=False).frames
    with pytest.raises(UserError, match="the video: 402x2 pixels; expected an aspect ratio"):
        video_patches(frames, TINY.thinker.vision, MEDIA)


def test_files_are_closed(tmp_path, recwarn):
    path = film(tmp_path / "a.mp4", sound=1.0)
    load_video(path, MEDIA, with_audio=True)
    load_audio(path)
    assert not [w for w in recwarn if w.category is ResourceWarning]
    path.unlink()  # where something still held it, Windows would refuse


def test_files_that_name_other_files_open_none(tmp_path, monkeypatch):
    """ffmpeg opens what a playlist or a list of files names, as the control shows; load_*() not."""
    monkeypatch.chdir(tmp_path)
    soundfile.write("private.wav", tone(1.0), 16_000)
    film(tmp_path / "private.mp4")
    for name in ("private.wav", "private.mp4"):
        listed = f"ffconcat version 1.0\nfile {name}\n".encode()
        with av.open(io.BytesIO(listed)) as container:
            assert next(container.decode(0)) is not None
        playlist = (
            f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{name}\n#EXT-X-ENDLIST\n".encode()
        )
        for content in (listed, playlist):
            with pytest.raises(UserError):
                load_audio(content)
            with pytest.raises(UserError):
                load_video(content, MEDIA, with_audio=False)
