"""The command line: good questions are answered, bad input is one clear line and exit code 2, and nothing is half-written."""

import io
import json
import subprocess
import sys

import av
import numpy as np
import pytest
import soundfile
from PIL import Image

from minomni import __main__ as command
from minomni.config import SIZES


@pytest.fixture
def run(tiny_folder, tmp_path, monkeypatch, capsys):
    """Run `python -m minomni chat ...` in this process -> exit code, stdout, stderr."""
    def call(*arguments, model=tiny_folder):
        out = tmp_path / "reply.wav"
        line = ["minomni", "chat", "--model", str(model), "--out", str(out), *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", line)
        code = command.main()
        captured = capsys.readouterr()
        return code, captured.out, captured.err, out
    return call


def tone(seconds: float, rate: int = 16_000) -> np.ndarray:
    return (0.3 * np.sin(2 * np.pi * 440 * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def clip(path, sound: bool):
    """A clip of 2 s, 12 frames per second."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=12)
        video.width = video.height = 64
        video.pix_fmt = "yuv420p"
        audio = container.add_stream("aac", rate=16_000, layout="mono") if sound else None
        for i in range(24):
            frame = np.random.RandomState(i).randint(0, 255, (64, 64, 3), np.uint8)
            container.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(video.encode(None))
        if audio is not None:
            track = av.AudioFrame.from_ndarray(tone(2)[None], format="fltp", layout="mono")
            track.sample_rate = 16_000
            container.mux(audio.encode(track))
            container.mux(audio.encode(None))
    return path


def test_json_is_one_object(run, tmp_path):
    image = tmp_path / "red.png"
    Image.new("RGB", (64, 64), "red").save(image)
    sound = tmp_path / "tone.wav"
    soundfile.write(sound, tone(0.5), 16_000)
    code, out, _, path = run("--image", image, "--audio", sound, "--text", "what is this", "--json")
    reply = json.loads(out)
    assert code == 0 and set(reply) == {"text", "audio", "seconds", "sample_rate", "total_s"}
    written, rate = soundfile.read(path)
    assert rate == reply["sample_rate"] == 16_000 and len(written) / rate == pytest.approx(reply["seconds"], abs=1e-3)


def test_no_speech_writes_no_file(run):
    code, out, _, path = run("--text", "say a", "--no-speech", "--json")
    assert code == 0 and json.loads(out)["audio"] is None and not path.exists()


def test_same_seed_same_speech(run):
    first = [run("--text", "say a", "--seed", 5)[3].read_bytes() for _ in range(2)]
    assert first[0] == first[1] != run("--text", "say a", "--seed", 6)[3].read_bytes()


def test_video_with_its_sound(run, tmp_path):
    code, out, _, _ = run("--video", clip(tmp_path / "clip.mp4", sound=True), "--use-audio-in-video", "--text", "what", "--json")
    assert code == 0 and json.loads(out)


def make_bad(kind: str, folder):
    """A file that is wrong in one way, the option it is given to, and what the message must say of it."""
    path = folder / f"bad_{kind}"
    if kind == "missing":
        return "--image", path.with_suffix(".png"), "no such file"
    if kind == "no_audio":
        path.write_text("words, not sound")
        return "--audio", path, "not readable as sound"
    if kind == "no_image":
        path.write_text("words, not a picture")
        return "--image", path, "not a readable picture"
    if kind == "truncated":
        whole = clip(folder / "whole.mp4", sound=False).read_bytes()
        path.write_bytes(whole[: len(whole) // 3])
        return "--video", path, "not a readable video"
    if kind in ("empty", "short", "nan"):
        path = path.with_suffix(".wav")
        samples = {"empty": tone(0), "short": tone(0.015), "nan": tone(1) * np.where(np.arange(16_000) == 99, np.nan, 1)}[kind]
        soundfile.write(path, samples, 16_000, subtype="FLOAT")
        return "--audio", path, "NaN" if kind == "nan" else "more than 20 ms"
    path = path.with_suffix(".png")
    Image.new("RGB", (2010, 10)).save(path)
    return "--image", path, "aspect ratio"


@pytest.mark.parametrize("kind", ["missing", "no_audio", "no_image", "truncated", "empty", "short", "nan", "stretched"])
def test_bad_files_are_named(run, tmp_path, kind):
    option, path, says = make_bad(kind, tmp_path)
    code, out, err, reply = run(option, path, "--text", "what is this")
    assert code == 2 and out == "" and err.count("\n") == 1
    assert str(path) in err and says in err and not reply.exists()


def test_bad_requests_are_one_line(run, tmp_path):
    for arguments, says in (
        (("--video", clip(tmp_path / "silent.mp4", sound=False), "--use-audio-in-video"), "no sound track"),
        (("--text", "say a", "--voice", "Nobody"), "unknown voice 'Nobody'"),
        (("--text", "word " * 5000), "context holds 2048"),
        ((), "nothing was asked"),
    ):
        code, out, err, reply = run(*arguments)
        assert code == 2 and out == "" and err.count("\n") == 1 and says in err and not reply.exists(), (arguments, err)


def test_unknown_size_and_folder(run):
    code, _, err, _ = run("--text", "a", model="huge")
    assert code == 2 and "'huge' is neither a folder nor a size" in err and all(name in err for name in SIZES)


def test_unknown_role(tiny_folder):
    import minomni
    from minomni.errors import UserError

    with pytest.raises(UserError, match="unknown role 'wizard'"):
        minomni.load(str(tiny_folder)).respond([{"role": "wizard", "content": "hello"}])


def test_bytes_and_arrays_are_media_too(tiny_folder):
    import minomni

    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "blue").save(buffer, "PNG")
    content = [{"type": "image", "image": buffer.getvalue()}, {"type": "audio", "audio": tone(0.5)},
               {"type": "image", "image": np.zeros((60, 60, 3), np.uint8)}, {"type": "text", "text": "what"}]
    reply = minomni.load(str(tiny_folder)).respond([{"role": "user", "content": content}], speech=False)
    assert isinstance(reply.text, str) and len(reply.wave) == 0


@pytest.mark.parametrize("command_name", ["train", "chat", "report"])
def test_help_is_worth_reading(command_name):
    shown = subprocess.run([sys.executable, "-m", "minomni", command_name, "--help"], capture_output=True, text=True)
    assert shown.returncode == 0 and len(shown.stdout.splitlines()) > 8


def test_importing_is_quick_and_needs_little():
    code = ("import sys, minomni; bad = {'transformers', 'librosa', 'IPython', 'jupyterlab', 'espeakng_loader', 'matplotlib'} "
            "& set(sys.modules); print(bad or 'fine')")
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert shown.stdout.strip() == "fine", shown.stderr
