"""The command line: good questions are answered; bad input is one clear line, exit code 2 and
nothing half-written.
"""

import io
import json
import os
import pickle
import select
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from PIL import Image

from minomni import __main__ as command
from minomni.cli import chat
from minomni.cli import options as cli_options
from minomni.config import SIZES

ROOT = Path(__file__).parents[1]


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
    return (0.3 * np.sin(2 * np.pi * 440 * np.arange(int(seconds * rate)) / rate)).astype(
        np.float32
    )


def clip(path, sound: bool, **options):
    """A clip of 2 s, 12 frames per second."""
    with av.open(str(path), "w", options=options) as container:
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
    assert code == 0
    assert set(reply) == {"text", "audio", "seconds", "sample_rate", "total_s"}
    written, rate = soundfile.read(path)
    assert rate == reply["sample_rate"] == 16_000
    assert len(written) / rate == pytest.approx(reply["seconds"], abs=1e-3)


def test_no_speech_writes_no_file(run):
    code, out, _, path = run("--text", "say a", "--no-speech", "--json")
    assert code == 0
    assert json.loads(out)["audio"] is None
    assert not path.exists()


def test_same_seed_same_speech(run):
    first = [run("--text", "say a", "--seed", 5)[3].read_bytes() for _ in range(2)]
    assert first[0] == first[1] != run("--text", "say a", "--seed", 6)[3].read_bytes()


def test_video_with_its_sound(run, tmp_path):
    video = clip(tmp_path / "clip.mp4", sound=True)
    code, out, _, _ = run("--video", video, "--use-audio-in-video", "--text", "what", "--json")
    assert code == 0
    assert json.loads(out)


def make_bad(kind: str, folder):
    """A file that is wrong in one way, the option it is given to, and what the message must say of
    it.
    """
    path = folder / f"bad_{kind}"
    if kind == "missing":
        return "--image", path.with_suffix(".png"), "no such file"
    if kind == "no_audio":
        path.write_text("words, not sound")
        return "--audio", path, "not readable as audio"
    if kind == "no_image":
        path.write_text("words, not a picture")
        return "--image", path, "not a readable image"
    if kind == "truncated":  # the index stands last: nothing can be decoded
        whole = clip(folder / "whole.mp4", sound=False).read_bytes()
        path.write_bytes(whole[: len(whole) // 3])
        return "--video", path, "cut short"
    if kind == "truncated_late":  # the index stands first: a decoder would play what is left
        whole = clip(folder / "whole.mp4", sound=False, movflags="faststart").read_bytes()
        path.write_bytes(whole[: len(whole) * 9 // 10])
        return "--video", path, "cut short"
    if kind == "truncated_webm":
        whole = clip(folder / "whole.mkv", sound=False).read_bytes()
        path.write_bytes(whole[:200])
        return "--video", path, "cut short"
    if kind == "no_bytes":
        path.write_bytes(b"")
        return "--video", path, "not a readable video"
    if kind in ("empty", "short", "nan"):
        path = path.with_suffix(".wav")
        samples = tone({"empty": 0, "short": 0.015, "nan": 1}[kind])
        samples[99:100] = np.nan if kind == "nan" else 0
        soundfile.write(path, samples, 16_000, subtype="FLOAT")
        return "--audio", path, "NaN" if kind == "nan" else "more than 20 ms"
    path = path.with_suffix(".png")
    Image.new("RGB", (2010, 10)).save(path)
    return "--image", path, "aspect ratio"


@pytest.mark.parametrize(
    "kind",
    [
        "missing",
        "no_audio",
        "no_image",
        "no_bytes",
        "truncated",
        "truncated_late",
        "truncated_webm",
        "empty",
        "short",
        "nan",
        "stretched",
    ],
)
def test_bad_files_are_named(run, tmp_path, kind):
    option, path, says = make_bad(kind, tmp_path)
    code, out, err, reply = run(option, path, "--text", "what is this")
    assert code == 2
    assert out == ""
    assert err.count("\n") == 1
    assert str(path) in err
    assert says in err
    assert not list(tmp_path.glob("reply*"))


def test_twenty_milliseconds_are_the_border(run, tmp_path):
    for samples, expected in ((320, 2), (321, 0)):  # 20 ms make no token, a sample more makes one
        soundfile.write(tmp_path / "click.wav", tone(1)[:samples], 16_000)
        assert run("--audio", tmp_path / "click.wav", "--no-speech")[0] == expected


def test_bad_requests_are_one_line(run, tmp_path):
    for arguments, says in (
        (
            ("--video", clip(tmp_path / "silent.mp4", sound=False), "--use-audio-in-video"),
            "no audio track",
        ),
        (("--text", "say a", "--voice", "Zoe"), "unknown voice 'Zoe'"),
        (("--text", "word " * 5000), "context holds 2048"),
        ((), "nothing was asked"),
        (("--text", "say a", "--seed", "soon"), "'soon' is not a whole number"),
        (("--text", "say a", "--loud"), "unrecognized arguments: --loud"),
        (("--samples", "--json"), "--samples asks its own questions"),
        (("--text", "say a", "--out", tmp_path), f"{tmp_path}: is a folder"),
        (("--text", "say a", "--out", tmp_path / "silent.mp4" / "a.wav"), "cannot be written"),
        (
            ("--text", "say a", "--out", tmp_path / "none" / "a.wav"),
            f"there is no folder {tmp_path / 'none'}",
        ),
        (
            ("--text", "say a", "--out", tmp_path / "reply.txt"),
            "speech is written as .wav, .flac, .ogg, .mp3",
        ),
        (
            ("--text", "say a", "--out", tmp_path / "reply"),
            "speech is written as .wav, .flac, .ogg, .mp3",
        ),
        (("--text", "say a", "--out", ""), "is a folder"),
        (("--text", "say a", "--out", tmp_path / ("n" * 300 + ".wav")), "cannot be written"),
        (("--text", "say a", "--out", tmp_path / "reply.mp3", "--stream"), "--stream writes a wav"),
        (("--text", "say a", "--voice", "Zoe", "--no-speech"), "unknown voice 'Zoe'"),
        (("--text", "say a", "--voice", ""), "unknown voice ''"),
        (
            ("--text", "say a", "--no-speech", "--voice-from", tmp_path / "a.wav"),
            "leave out one of them",
        ),
        (("--samples", "--out", "a.wav"), "leave out --out"),
        (
            ("--text", "say a", "--max-new-tokens", "0"),
            "argument --max-new-tokens: '0' is not a whole number from 1",
        ),
        (
            ("--text", "say a", "--temperature", "nan"),
            "'nan' is not 0, or a number from 0.001 to 100",
        ),
        (
            ("--text", "say a", "--talker-temperature", "-1"),
            "argument --talker-temperature: '-1' is not",
        ),
        (
            ("--text", "say a", "--top-p", "1.5"),
            "argument --top-p: '1.5' is not a number above 0 and up to 1",
        ),
        (
            ("--text", "say a", "--talker-top-k", "2.5"),
            "argument --talker-top-k: '2.5' is not a whole number",
        ),
        (("--text", "say a", "--repetition-penalty", "9" * 6000), "argument --repetition-penalty"),
        (("--text", "say a", "--top-k", "5"), "give a temperature above 0 too"),
    ):
        code, out, err, reply = run(*arguments)
        assert code == 2, (arguments, err)
        assert out == "", arguments
        assert err.count("\n") == 1, (arguments, err)
        assert says in err, arguments
        assert not reply.exists(), arguments


def test_unknown_size_and_folder(run):
    code, _, err, _ = run("--text", "a", model="huge")
    assert code == 2
    assert "'huge' is neither a folder nor a size" in err
    assert all(name in err for name in SIZES)


def spoil(kind: str, folder) -> str:
    """Break a checkpoint folder in one way -> what the message must say."""
    if kind == "no config":
        (folder / "config.json").unlink()
        return f"{folder / 'config.json'}: cannot be read"
    if kind == "short shard":
        shard = folder / "model.safetensors"
        shard.write_bytes(shard.read_bytes()[:-1000])
        return f"{shard}: cut short"
    if kind == "stray index":
        index = folder / "model.safetensors.index.json"
        index.write_text(
            json.dumps({"weight_map": {"thinker.lm_head.weight": "../secret.safetensors"}})
        )
        return f"{index}: names the file '../secret.safetensors', which is outside"

    class Code:
        def __reduce__(self):
            return open, (str(folder.parent / "owned"), "w")

    (folder / "spk_dict.pt").write_bytes(pickle.dumps(Code()))
    return f"{folder / 'spk_dict.pt'}: is cut short or wants to run code"


@pytest.mark.parametrize(
    "kind", ["no config", "short shard", "stray index", "code among the voices"]
)
def test_broken_models_are_named(run, tiny_folder, tmp_path, kind):
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    says = spoil(kind, folder)
    code, out, err, reply = run("--text", "say a", model=folder)
    assert code == 2
    assert out == ""
    assert err.count("\n") == 1
    assert says in err
    assert not reply.exists()
    assert not (tmp_path / "owned").exists()


def test_training_refuses_before_it_writes(monkeypatch, capsys, tmp_path):
    for line, says in (
        (["huge"], "'huge' has no training recipe"),
        (["qwen7b"], "'qwen7b' has no training recipe"),
        (["tiny", "--stage", "naps"], "unknown stage 'naps'"),
        (["tiny", "--set", "naps.steps=5"], "unknown stage 'naps'"),
        (["tiny", "--set", "codec.pace=5"], "unknown field 'pace'"),
        (["tiny", "--set", "codec.steps=0"], "codec.steps is 0; expected a whole number"),
        (["tiny", "--set", "codec.steps"], "expected STAGE.FIELD=VALUE"),
        (["tiny", "--data", "none.jsonl", "--set", "codec.steps=5"], "do not go with --data"),
    ):
        monkeypatch.setattr(
            sys, "argv", ["minomni", "train", *line, "--home", str(tmp_path / "run")]
        )
        assert command.main() == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert says in err
        assert not list(tmp_path.iterdir())


def test_a_process_of_its_own_says_the_same(tmp_path):
    line = [
        sys.executable,
        "-m",
        "minomni",
        "chat",
        "--model",
        str(tmp_path / "nowhere"),
        "--text",
        "a",
    ]
    shown = subprocess.run(line, capture_output=True, text=True, cwd=ROOT)
    assert shown.returncode == 2
    assert shown.stdout == ""
    assert shown.stderr.startswith("minomni: ")
    assert "nowhere" in shown.stderr
    assert shown.stderr.count("\n") == 1


def test_unknown_role(tiny_folder):
    import minomni
    from minomni.errors import UserError

    with pytest.raises(UserError, match="unknown role 'wizard'"):
        minomni.load(str(tiny_folder)).respond([{"role": "wizard", "content": "hello"}])


def test_bytes_and_arrays_are_media_too(tiny_folder):
    import minomni

    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "blue").save(buffer, "PNG")
    content = [
        {"type": "image", "image": buffer.getvalue()},
        {"type": "audio", "audio": tone(0.5)},
        {"type": "image", "image": np.zeros((60, 60, 3), np.uint8)},
        {"type": "text", "text": "what"},
    ]
    reply = minomni.load(str(tiny_folder)).respond(
        [{"role": "user", "content": content}], speech=False
    )
    assert isinstance(reply.text, str)
    assert len(reply.wave) == 0


@pytest.mark.parametrize(
    "command_name", ["train", "chat", "report", "ablate", "bench", "make-checkpoint", "check"]
)
def test_help_is_worth_reading(command_name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["minomni", command_name, "--help"])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 0
    assert len(capsys.readouterr().out.splitlines()) > 8


@pytest.mark.slow
def test_importing_is_quick_and_needs_little():
    heavy = {"transformers", "librosa", "IPython", "jupyterlab", "espeakng_loader", "matplotlib"}
    of_torch = {"torch._dynamo", "torch.distributed.fsdp"}
    code = f"import sys, minomni, minomni.omni; found = {heavy} & set(sys.modules); "
    code += f"import minomni.train.finetune; found |= {of_torch} & set(sys.modules); "
    code += "print(found or 'fine')"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert shown.stdout.strip() == "fine", shown.stderr


def test_stream_writes_and_tells_as_it_goes(run):
    code, out, _, path = run("--text", "say a", "--stream")
    lines = out.splitlines()
    assert code == 0
    assert lines[-1].startswith(f"{path}: ")
    assert any(" s  ~ " in line for line in lines)
    code, out, _, path = run("--text", "say a", "--stream", "--json")
    reply = json.loads(out)
    assert set(reply) == {
        "text",
        "audio",
        "seconds",
        "sample_rate",
        "total_s",
        "first_audio_s",
        "last_text_s",
    }
    assert (
        0 <= reply["last_text_s"] <= reply["first_audio_s"] <= reply["total_s"]
    )  # four words are over at once
    written, rate = soundfile.read(path)
    assert len(written) / rate == pytest.approx(reply["seconds"], abs=1e-3)


def test_stream_without_speech(run):
    code, out, _, path = run("--text", "say a", "--stream", "--no-speech", "--json")
    assert code == 0
    assert json.loads(out)["first_audio_s"] is None
    assert not path.exists()


def test_a_stream_that_breaks_leaves_no_file(run, monkeypatch, tmp_path):
    from minomni.omni import Omni

    def broken(*_, **__):
        yield from ()
        raise KeyboardInterrupt

    monkeypatch.setattr(Omni, "stream", broken)
    code, _, _, path = run("--text", "say a", "--stream")
    assert code == 130
    assert not path.exists()
    code, _, err, _ = run(
        "--text", "say a", "--stream", "--out", tmp_path / "no" / "folder" / "a.wav"
    )
    assert code == 2
    assert "cannot be written" in err
    assert err.count("\n") == 1


@pytest.mark.slow
def test_a_reader_that_leaves_is_no_fault():
    """As in `python -m minomni train tiny --stages | head -1`: no traceback."""
    command_line = [sys.executable, "-m", "minomni", "train", "tiny", "--stages"]
    with subprocess.Popen(
        command_line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.close()
        assert process.wait(120) == 0
        assert process.stderr.read() == b""


# --------------------------------------------------------------------------------------------- how
# an answer is chosen
@pytest.mark.parametrize("option", ["--cuda-graphs", "--tf32"])
def test_options_of_cuda_are_refused_on_a_cpu(run, option):
    code, out, err, _ = run("--text", "say yes", option, model="there is no such folder")
    assert code == 2
    assert err == (f"minomni: {option} needs a GPU; give --device cuda, or leave {option} out\n")


def test_options_of_cuda_reach_the_model(run, monkeypatch):
    """On this machine's processor, taken for a GPU by the check alone."""
    loaded = []
    load = cli_options.load
    monkeypatch.setattr(cli_options, "check_cuda", lambda arguments: None)
    monkeypatch.setattr(
        cli_options, "load", lambda *a, **k: loaded.append(load(*a, **k)) or loaded[0]
    )
    code, *_ = run("--text", "say yes", "--cuda-graphs", "--tf32")
    assert code == 0
    assert loaded[0].token2wav.tf32
    assert loaded[0].static_generator is not None


def test_options_of_the_answer_reach_the_model(run, tiny_folder, monkeypatch):
    import minomni
    from minomni.omni import Omni

    asked, stream = [], Omni.stream
    monkeypatch.setattr(
        Omni,
        "stream",
        lambda self, *given, **named: asked.append(named) or stream(self, *given, **named),
    )
    options = (
        "--max-new-tokens",
        2,
        "--temperature",
        0.5,
        "--top-p",
        0.9,
        "--top-k",
        7,
        "--repetition-penalty",
        1.1,
    )
    of_talker = (
        "--talker-max-new-tokens",
        3,
        "--talker-temperature",
        0.2,
        "--talker-top-p",
        0.6,
        "--talker-top-k",
        8,
        "--talker-repetition-penalty",
        1.2,
    )
    code, out, _, path = run(
        "--text", "say a", "--system", "Be brief.", "--json", *options, *of_talker
    )
    right = dict(
        max_new_tokens=2,
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        repetition_penalty=1.1,
        talker_max_new_tokens=3,
        talker_temperature=0.2,
        talker_top_p=0.6,
        talker_top_k=8,
        talker_repetition_penalty=1.2,
    )
    assert code == 0
    assert right.items() <= asked[0].items()
    reply = minomni.load(str(tiny_folder)).respond(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "say a"}], **right
    )
    assert json.loads(out)["text"] == reply.text
    assert json.loads(out)["seconds"] == pytest.approx(reply.seconds, abs=1e-3)


@pytest.mark.parametrize(
    ("name", "kind", "subtype"),
    [
        ("a.wav", "WAV", "PCM_16"),
        ("a.FLAC", "FLAC", "PCM_16"),
        ("a.ogg", "OGG", "VORBIS"),
        ("a.b.mp3", "MP3", None),
    ],
)
def test_the_name_says_which_kind_of_file_is_written(run, tmp_path, name, kind, subtype):
    code, out, _, _ = run("--text", "say a", "--json", "--out", tmp_path / name)
    info = soundfile.info(tmp_path / name)
    assert code == 0
    assert info.format == kind
    assert info.samplerate == 16_000
    assert subtype in (None, info.subtype)
    assert info.duration == pytest.approx(json.loads(out)["seconds"], abs=0.1)  # mp3 pads


def test_long_speech_is_encoded_in_pieces(tmp_path):
    """Five minutes of Vorbis: some versions of libsndfile crash where they get so much at once."""
    import torch

    from minomni.chat.reply import Reply, Timings

    reply = Reply("", torch.from_numpy(tone(300)), 16_000, torch.zeros(0), 0.0, Timings())
    reply.save(tmp_path / "long.ogg")
    samples, rate = soundfile.read(tmp_path / "long.ogg")
    assert len(samples) / rate == pytest.approx(300, abs=0.2)
    assert np.abs(samples).max() == pytest.approx(0.3, abs=0.05)


def test_a_target_is_checked_before_the_model_is_loaded(run, tmp_path, monkeypatch):
    monkeypatch.setattr(cli_options, "load", lambda *_: pytest.fail("loaded"))
    for out in (tmp_path, tmp_path / "no" / "a.wav", tmp_path / "a.doc"):
        assert run("--text", "say a", "--out", out)[0] == 2


@pytest.mark.slow
def test_bytes_that_are_no_text_are_printed_all_the_same(tiny_folder, tmp_path):
    """In an argument they arrive as halves of surrogate pairs, which no encoding has."""
    line = [
        os.fsencode(sys.executable),
        b"-m",
        b"minomni",
        b"chat",
        b"--model",
        os.fsencode(tiny_folder),
        b"--text",
        b"say a",
        b"--out",
        os.fsencode(tmp_path) + b"/\xff.wav",
    ]
    shown = subprocess.run(line, capture_output=True, cwd=ROOT)
    # 2 where the file system does not allow such names.
    assert shown.returncode in (0, 2), shown.stderr
    assert b"Traceback" not in shown.stderr, shown.stderr
    assert b"udcff.wav" in shown.stdout + shown.stderr


def test_a_path_with_a_line_feed_stays_on_its_line(run, tmp_path):
    out = tmp_path / "my\nreply.wav"
    code, shown, _, _ = run("--text", "say a", "--out", out, "--max-new-tokens", "3")
    assert code == 0
    assert out.is_file()
    assert shown.splitlines()[-1].startswith(f"{tmp_path}/my\\nreply.wav: ")


@pytest.mark.parametrize("name", ["z" * 256, "file/below"])
@pytest.mark.parametrize(
    "line",
    [
        ("make-checkpoint", "qwen7b", "OUT"),
        ("merge", "tiny", "adapter", "OUT"),
        ("bench", "stream", "--plot", "OUT"),
    ],
    ids=lambda line: line[0],
)
def test_what_cannot_be_written_is_told_before_work(line, name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    for work in (
        "cli.checkpoint.load",
        "cli.bench.load",
        "checkpoint.random_checkpoint.empty_model",
    ):
        monkeypatch.setattr(f"minomni.{work}", None)
    monkeypatch.setattr(sys, "argv", ["minomni", *(name if a == "OUT" else a for a in line)])
    assert command.main() == 2
    error = capsys.readouterr().err
    assert "cannot be written" in error
    assert error.count("\n") == 1


def test_a_merge_over_something_else_is_refused_before_work(tmp_path, monkeypatch, capsys):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "mine.txt").write_text("mine")
    monkeypatch.setattr("minomni.checkpoint.lora.load_lora", None)
    monkeypatch.setattr(
        sys, "argv", ["minomni", "merge", "tiny", "adapter", str(tmp_path / "letters")]
    )
    assert command.main() == 2
    assert "something other than a model" in capsys.readouterr().err


def test_a_seed_of_many_digits(run):
    code, _, error, _ = run("--text", "say a", "--seed", "1" * 5000)
    assert code == 2
    assert "is not a whole number from 0 to" in error
    assert error.count("\n") == 1


# The command, which stops once the first audio is written.
STOPPED = """
import sys, time
from minomni import __main__, files
flush = files.GrowingWav.flush
def stop(wav):
    flush(wav)
    print("written", file=sys.stderr, flush=True)
    time.sleep(600)
files.GrowingWav.flush = stop
sys.exit(__main__.main())
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signals for one process")
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("SIGTERM", b"old"),
        pytest.param("SIGTERM", None, marks=pytest.mark.slow),
        pytest.param("SIGHUP", b"old", marks=pytest.mark.slow),
        pytest.param("SIGHUP", None, marks=pytest.mark.slow),
    ],
)
def test_a_stream_that_is_ended_restores_the_old_file(tiny_folder, tmp_path, name, content):
    out = tmp_path / "reply.wav"
    if content is not None:
        out.write_bytes(content)
    options = ["--model", str(tiny_folder), "--text", "say a", "--stream", "--out", str(out)]
    process = subprocess.Popen(
        [sys.executable, "-c", STOPPED, "chat", *options],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )
    with process:
        assert process.stderr is not None
        assert process.stderr.readline() == "written\n"
        assert out.stat().st_size > 100
        number = getattr(signal, name)
        process.send_signal(number)
        assert process.wait(60) == 128 + number
        assert process.stderr.read() == ""
    assert [file.name for file in tmp_path.iterdir()] == ([] if content is None else ["reply.wav"])
    assert content is None or out.read_bytes() == content


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGHUP")
def test_an_ignored_signal_stays_ignored():
    hangup = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    termination = signal.getsignal(signal.SIGTERM)
    try:
        with chat.ended_by_signals():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) != termination
        assert signal.getsignal(signal.SIGTERM) == termination
    finally:
        signal.signal(signal.SIGHUP, hangup)


# ----------------------------------------------------------------------------------------------
# a conversation
class Terminal:
    """`chat` in a process of its own, on a terminal."""

    def __init__(self, *arguments):
        import pty

        self.ours, theirs = pty.openpty()
        line = [sys.executable, "-m", "minomni", "chat", *map(str, arguments)]
        self.process = subprocess.Popen(
            line,
            cwd=ROOT,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env=os.environ | {"OMP_NUM_THREADS": "1", "TERM": "dumb"},
            start_new_session=True,
        )
        os.close(theirs)
        self.shown = ""

    def until(self, text: str) -> str:
        """What was shown since the last call, up to a text."""
        while text not in self.shown:
            assert select.select([self.ours], [], [], 120)[0], (
                f"nothing more came after {self.shown!r}"
            )
            self.shown += os.read(self.ours, 65536).decode(errors="replace")
        before, _, self.shown = self.shown.partition(text)
        return before

    def type(self, keys: bytes) -> None:
        os.write(self.ours, keys)

    def end(self) -> tuple[int, str]:
        """Exit code, and the rest of what was shown."""
        code = self.process.wait(120)
        try:
            while select.select([self.ours], [], [], 0)[0]:
                self.shown += os.read(self.ours, 65536).decode(errors="replace")
        except OSError:  # Linux says so where the other side is closed
            pass
        os.close(self.ours)
        return code, self.shown


needs_a_terminal = pytest.mark.skipif(
    sys.platform == "win32", reason="Windows has no pseudo-terminals"
)


@pytest.mark.slow
@needs_a_terminal
def test_a_conversation_on_a_terminal_remembers_and_numbers_its_answers(tmp_path):
    import minomni

    shipped, brief = (
        ROOT / "data_samples" / "tiny",
        dict(max_new_tokens=12, talker_max_new_tokens=9),
    )
    asked = "say the red circle is above the blue square", "say four \u00e9"
    terminal = Terminal(
        "--model",
        shipped,
        "--out",
        tmp_path / "said.flac",
        "--seed",
        3,
        "--max-new-tokens",
        12,
        "--talker-max-new-tokens",
        9,
    )
    assert "/quit" in terminal.until("> ")
    answers = []
    for question, path in zip(asked, ("said-1.flac", "said-2.flac")):
        terminal.type(f"{question}\n".encode())
        answers.append(terminal.until(f"{tmp_path / path}: "))
        terminal.until("> ")
    terminal.type(b"\n")  # an empty line asks nothing
    terminal.until("> ")
    terminal.type(b"word " * 700 + b"\n")  # at most 4,096 bytes fit a line
    assert "do not fit the context" in terminal.until("> ")
    terminal.type(b"say \xff\n")  # no UTF-8
    assert "Traceback" not in terminal.until("> ")
    terminal.type(b"/new\n")
    terminal.until("> ")
    terminal.type(b"/quit\n")
    code, rest = terminal.end()
    assert code == 0
    assert "Traceback" not in rest

    omni, messages = minomni.load(str(shipped)), []
    for question, shown in zip(asked, answers):
        messages.append({"role": "user", "content": question})
        reply = omni.respond(messages, seed=3, **brief)
        messages.append({"role": "assistant", "content": reply.text})
        assert " ".join(reply.text.split()) in " ".join(shown.split())
    written, rate = soundfile.read(tmp_path / "said-2.flac")
    assert rate == 16_000
    assert len(written) == len(reply.wave)


@pytest.mark.slow
@needs_a_terminal
@pytest.mark.parametrize("keys", [b"\x04", b"\x03"], ids=["end of file", "Ctrl-C"])
def test_a_conversation_ends_cleanly(tiny_folder, tmp_path, keys):
    terminal = Terminal(
        "--model", tiny_folder, "--out", tmp_path / "said.wav", "--no-speech", "--stream"
    )
    terminal.until("> ")
    terminal.type(b"say a\n")
    terminal.until("> ")
    if keys == b"\x03":
        for _ in range(
            20
        ):  # readline overlooks one that comes before it waits for keys; a person presses again
            os.kill(terminal.process.pid, signal.SIGINT)  # what a terminal does for it
            with suppress(subprocess.TimeoutExpired):
                terminal.process.wait(5)
                break
    else:
        terminal.type(keys)
    code, rest = terminal.end()
    assert code == 0
    assert "Traceback" not in rest
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@needs_a_terminal
def test_a_terminal_too_hears_of_a_bad_target_first(tiny_folder, tmp_path):
    terminal = Terminal("--model", tiny_folder, "--out", tmp_path / "none" / "a.wav")
    code, shown = terminal.end()
    assert code == 2
    assert "there is no folder" in shown
