"""The table of input formats in usage.md: what it names is read."""

import base64
import io
import re
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from minomni.config import TINY
from minomni.inputs.audio import load_audio
from minomni.inputs.image import load_image
from minomni.inputs.item import parse_item
from minomni.inputs.options import KEYS_OF
from minomni.inputs.video import load_video

USAGE = (Path(__file__).parents[2] / "notebooks" / "usage.md").read_text(encoding="utf-8")
TABLE = USAGE.split("## Input formats")[1].split("## Broken")[0]
# The rows of the table by their first cell.
ROWS = dict(re.findall(r"^\| ([^|]+) \| (.+) \|$", TABLE, re.MULTILINE))
RATE = 16_000
TONE = (8_000 * np.sin(np.arange(RATE) / 5)).astype(np.int16)  # one second
# File formats of the table: PyAV's names of the format and of the codec.
AUDIO = {"opus": ("ogg", "libopus"), "mp3": ("mp3", "libmp3lame"), "m4a": ("mp4", "aac")}
VIDEO = {"mkv": "matroska", "ts": "mpegts"}  # and of those with another name than their ending


def listed(row: str) -> list[str]:
    """The endings of files that a row names."""
    names = re.search(r"\(((?:\w+, )+\w+)", ROWS[row])[1]
    return names.split(", ")


def audio_file(kind: str) -> bytes:
    """TONE as a file."""
    stream = io.BytesIO()
    if kind not in AUDIO:
        soundfile.write(stream, TONE, RATE, format=kind)
        return stream.getvalue()
    container_format, codec = AUDIO[kind]
    with av.open(stream, "w", format=container_format) as container:
        track = container.add_stream(codec, rate=RATE, layout="mono")
        frame = av.AudioFrame.from_ndarray(TONE[None], format="s16", layout="mono")
        frame.sample_rate = RATE
        container.mux([*track.encode(frame), *track.encode(None)])
    return stream.getvalue()


def video_file(kind: str) -> bytes:
    """Five gray frames, one second."""
    stream = io.BytesIO()
    codec = "libvpx" if kind == "webm" else "libx264"
    with av.open(stream, "w", format=VIDEO.get(kind, kind)) as container:
        track = container.add_stream(codec, rate=5)
        track.height, track.width, track.pix_fmt = 64, 96, "yuv420p"
        for _ in range(5):
            picture = np.full((64, 96, 3), 128, np.uint8)
            container.mux(track.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(track.encode(None))
    return stream.getvalue()


def test_the_table_names_what_is_tested_here():
    assert listed("audio")[:6] == ["wav", "flac", "ogg", "opus", "mp3", "m4a"]
    assert listed("video") == ["mp4", "mov", "mkv", "webm", "avi", "ts"]


@pytest.mark.parametrize("kind", listed("audio")[:6])
def test_audio_files(kind, tmp_path):
    content = audio_file(kind)
    path = tmp_path / f"a {kind}.{kind}"
    path.write_bytes(content)
    uri = "data:audio/x;base64," + base64.b64encode(content).decode()
    waves = [
        load_audio(source)
        for source in (str(path), path.as_uri(), uri, content, io.BytesIO(content))
    ]
    with path.open("rb") as file:
        waves.append(load_audio(file))
    for wave in waves:
        assert wave.shape == waves[0].shape
        assert torch.equal(wave, waves[0])
    assert abs(len(waves[0]) - RATE) < 0.1 * RATE
    middle = waves[0][4_000:12_000]
    assert abs(middle.square().mean().sqrt() - 8_000 / 32_768 / 2**0.5) < 0.02


@pytest.mark.parametrize("dtype", re.findall(r"u?int\d+|float", ROWS["audio"]))
def test_arrays_of_samples(dtype):
    wave = TONE / 32_768
    if dtype == "float":
        samples = wave.astype(np.float32)
    else:
        scale = 2.0 ** (np.dtype(dtype).itemsize * 8 - 1)
        samples = (wave * scale * 0.99 + (scale if dtype[0] == "u" else 0)).astype(dtype)
        if dtype == "int32":
            samples[0] = 2**31 - 1  # shows the scale
    for source in ((samples, RATE), (RATE, samples), {"array": samples, "sampling_rate": RATE}):
        assert load_audio(source).shape == (RATE,)
    stereo = load_audio((np.stack([samples, samples], 1), RATE))
    torch.testing.assert_close(stereo[1:], torch.tensor(wave[1:]).float(), atol=0.02, rtol=0)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_images(channels, tmp_path):
    pixels = np.full((40, 60, channels), 200, np.uint8).squeeze()
    image = Image.fromarray(pixels)
    stream = io.BytesIO()
    image.save(stream, "PNG")
    path = tmp_path / "a.png"
    path.write_bytes(stream.getvalue())
    for source in (pixels, image, str(path), path.as_uri(), stream.getvalue()):
        loaded = load_image(source)
        assert (loaded.width, loaded.height) == (60, 40)


@pytest.mark.parametrize("kind", listed("video"))
def test_video_files(kind, tmp_path):
    content = video_file(kind)
    path = tmp_path / f"a.{kind}"
    path.write_bytes(content)
    for source in (str(path), content, io.BytesIO(content)):
        frames = load_video(source, TINY.media, with_audio=False).frames
        assert len(frames) >= 2
        assert abs(frames.float().mean() - 128) < 4


def test_keys_of_an_item_are_all_in_the_table():
    named = set(re.findall(r"`(\w+)`", ROWS["keys of an item"]))
    assert named == {key for keys in KEYS_OF.values() for key in keys}


def test_names_of_openai_are_read():
    """Each as the item of a message, for the kind of source that it stands for."""
    kinds = {"image_url": "image", "input_audio": "audio", "video_url": "video"}
    kinds |= {"input_image": "image", "input_text": "text"}
    named = re.findall(r"`(\w+)`", ROWS["OpenAI's names"].split(";")[0])
    assert named == list(kinds)
    sources = {
        "image_url": {"image_url": {"url": "data:image/png;base64,AAAA"}},
        "input_audio": {"input_audio": {"data": "AAAA", "format": "wav"}},
        "video_url": {"video_url": {"url": "data:video/mp4;base64,AAAA"}},
        "input_image": {"image_url": "data:image/png;base64,AAAA"},
        "input_text": {"text": "what"},
    }
    for name, kind in kinds.items():
        assert parse_item({"type": name, **sources[name]}).kind == kind
