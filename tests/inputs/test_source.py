"""Where media come from: every way to name or hold a file; what is no file is one short line."""

import base64
import functools
import gzip
import io
import os
import struct
import subprocess
import sys
import tarfile
from pathlib import Path
from urllib.parse import quote

import av
import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from minomni.config import TINY
from minomni.errors import UserError, shorten
from minomni.inputs.audio import load_audio
from minomni.inputs.containers import require_whole
from minomni.inputs.image import load_image
from minomni.inputs.item import parse_item
from minomni.inputs.source import name_of
from minomni.inputs.video import load_video

WAVE = (0.2 * np.sin(np.arange(4_000) / 9)).astype(np.float32)
NAMES = [
    "plain.wav",
    "with blank.wav",
    "a#1?x=2&y.wav",
    "100%.wav",
    "50%20off.wav",
    "größe 音.wav",
    "[a] (b);c,d.wav",
]


def wav() -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, WAVE, 16_000, format="WAV", subtype="FLOAT")
    return stream.getvalue()


def same(source) -> bool:
    return np.array_equal(load_audio(source), WAVE)


def refused(source, *says, load=load_audio):
    with pytest.raises(UserError) as error:
        load(source)
    message = str(error.value)
    assert all(part in message for part in says), message
    assert message.isprintable()
    assert len(message) <= 500


@pytest.mark.parametrize("name", NAMES)
def test_paths_and_uris(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(wav())
    localhost = path.as_uri().replace("file://", "file://localhost")
    for source in (
        path,
        str(path),
        path.as_uri(),
        localhost,
        path.as_uri().replace("file:///", "file:/"),
        path.as_uri().replace("file:", "FILE:"),
    ):
        assert same(source), source
    if "%" not in name:
        assert same(f"file://{path}")  # as people write it by hand


def test_uris_by_hand(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("30%20off.wav").write_bytes(wav())
    assert same("file://30%20off.wav")
    assert same(f"file://{tmp_path}/30%20off.wav")


@pytest.mark.parametrize(
    "kind", ["audio/wav", "audio", "application/octet-stream", "", "audio/wav;charset=utf-8;x=1"]
)
def test_data_uris(kind):
    text = base64.b64encode(wav()).decode()
    safe = base64.urlsafe_b64encode(wav()).decode().rstrip("=")
    for content in (
        text,
        safe,
        quote(text, safe=""),
        "\n".join(text[i : i + 76] for i in range(0, len(text), 76)),
    ):
        assert same(f"data:{kind};base64,{content}")
    assert same(f"DATA:{kind};BASE64,{text}")
    assert same(f"data:{kind},{quote(wav())}")


@pytest.mark.parametrize(
    ("kind", "key"), [("image", "base64"), ("audio", "base64"), ("input_audio", "input_audio")]
)
def test_base64_of_both_alphabets(kind, key):
    content = bytes(range(256)) + b"\xfb\xff\xfe?"
    usual, safe = base64.b64encode(content).decode(), base64.urlsafe_b64encode(content).decode()
    assert "+" in usual
    assert "/" in usual
    assert "-" in safe
    assert "_" in safe
    for text in (usual, safe, safe.rstrip("="), f"{safe[:40]}\n{safe[40:]}"):
        assert parse_item({"type": kind, key: text}).source == content
    for text in ("a*b", "abcde", "größe"):
        with pytest.raises(UserError, match=f"{key} is not base64"):
            parse_item({"type": kind, key: text})


def test_broken_data_uris():
    refused("data:audio/wav;base64", "the audio given: a data: URI without a comma")
    refused("data:audio/wav;base64,a*b", "base64 is broken")
    refused("data:audio/wav;base64,abcde", "base64 is broken")
    refused("data:audio/wav,", "not readable as audio")
    refused("data:audio/wav;base64," + "A" * 9_000, "the audio given: not readable as audio")


def test_open_files(tmp_path):
    path = tmp_path / "a.wav"
    path.write_bytes(wav())
    held = io.BytesIO()
    held.write(wav())  # and stands at its end, as after writing
    with open(path, "rb") as file, open(path, "rb", buffering=0) as raw:
        for stream in (held, file, raw):
            for _ in range(2):
                assert same(stream)
                assert not stream.closed
    for source in (bytearray(wav()), memoryview(wav())):
        assert same(source)
    with open(path, "rb") as file:
        assert name_of(file, "audio") == str(path)


def test_pictures_from_everywhere(tmp_path):
    path = tmp_path / "ä #.png"
    Image.new("RGB", (5, 3), "red").save(path)
    content = path.read_bytes()
    held = io.BytesIO(content)
    held.read()
    for source in (
        path,
        path.as_uri(),
        content,
        held,
        held,
        {"bytes": content, "path": None},
        {"bytes": None, "path": str(path)},
        f"data:image;base64,{base64.b64encode(content).decode()}",
    ):
        assert load_image(source).getpixel((4, 2)) == (255, 0, 0)
    assert not held.closed


def test_dictionaries_of_datasets(tmp_path):
    path = tmp_path / "a.wav"
    path.write_bytes(wav())
    for source in (
        {"bytes": wav(), "path": "gone.wav"},
        {"bytes": wav(), "path": None},
        {"bytes": None, "path": str(path)},
        {"path": path},
        {"array": None, "bytes": wav()},
    ):
        assert same(source)
    refused({"bytes": None, "path": None}, "both empty")
    refused({"bytes": None, "path": "gone.wav"}, "gone.wav: no such file")
    refused({"a": 1}, "a dict cannot be read")


def test_open_files_that_cannot_be_read(tmp_path):
    path = tmp_path / "a.wav"
    path.write_bytes(wav())
    with open(path, "rb") as closed:
        pass
    refused(closed, "a.wav: an open file that cannot be read")
    with open(path, encoding="latin-1") as text:
        refused(text, "opened as text")
    refused(io.StringIO("x"), "opened as text")

    class Broken(io.RawIOBase):
        def seek(self, *_):
            raise RuntimeError("first\nsecond")

    refused(Broken(), "(first)")
    reader, writer = os.pipe()
    with open(reader, "rb") as pipe, open(writer, "wb"):
        refused(pipe, "an open pipe")


def test_open_files_of_every_mode(tmp_path):
    """The mode of a file belongs to the caller: gzip's is a number, and "a+b" writes."""
    path = tmp_path / "a.wav"
    content = wav()
    path.write_bytes(content)
    with gzip.open(tmp_path / "a.wav.gz", "wb") as packed:
        packed.write(content)
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(path, "a.wav")

    with gzip.open(tmp_path / "a.wav.gz") as packed:
        assert same(packed)
    with tarfile.open(tmp_path / "a.tar") as archive:
        assert same(archive.extractfile("a.wav"))
    for mode in ("a+b", "r+b"):
        with open(path, mode) as file:
            assert same(file)
    assert path.read_bytes() == content


@pytest.mark.parametrize("reads", [2, 4, 6, 9])
def test_open_files_that_fail_later(reads, capfd):
    class Failing(io.BytesIO):
        left = reads

        def read(self, *size):
            self.left -= 1
            if self.left < 0:
                raise KeyError("lost")
            return super().read(*size)

    picture = io.BytesIO()
    Image.fromarray(np.random.RandomState(0).randint(0, 255, (300, 300, 3), np.uint8)).save(
        picture, "PNG"
    )
    says = "an open file that cannot be read ('lost'); give its bytes"
    refused(Failing(wav()), f"the audio given: {says}")
    refused(Failing(picture.getvalue()), f"the image given: {says}", load=load_image)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors(layout):
    nested = torch.nested.nested_tensor([torch.rand(3, 4), torch.rand(2, 4)], layout=layout)
    for source, load in (
        (nested, load_audio),
        ((nested, 16_000), load_audio),
        (nested, load_image),
    ):
        refused(source, "given: a ", "ested", load=load)


@pytest.mark.parametrize(
    "source",
    [
        "http://example.com/a.wav",
        "https://example.com/a.wav",
        "HTTPS://example.com/a",
        "ftp://example.com/a.wav",
        "s3://bucket/a.wav",
        "rtsp://camera/1",
    ],
)
@pytest.mark.reads("media", "web addresses", "refused, nothing is fetched")
def test_nothing_is_fetched(source, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("a connection was opened"))
    refused(source, source, "web addresses are not fetched, download it")
    refused(source, source, "web addresses are not fetched", load=load_image)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_what_is_no_file(tmp_path):
    """In another process, which a reader that waits would keep from ending."""
    os.mkfifo(tmp_path / "pipe.wav")
    (tmp_path / "folder.wav").mkdir()
    (tmp_path / "empty.wav").touch()
    (tmp_path / "link.wav").symlink_to("pipe.wav")
    (tmp_path / "gone.wav").symlink_to("nowhere")
    names = [
        str(tmp_path / name)
        for name in ("pipe.wav", "folder.wav", "empty.wav", "link.wav", "gone.wav")
    ]
    names += [
        "/dev/zero",
        "/dev/null",
        "/proc/kmsg",
        "/proc/self/mem",
        "/proc/self/status",
        "/dev/stdin",
        "/",
    ]
    script = (
        "import sys\nfrom minomni.errors import UserError\n"
        "from minomni.inputs.media import load_audio, load_image\n"
        "for name in sys.argv[1:]:\n    for load in (load_audio, load_image):\n"
        "        try: load(name)\n        except UserError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *names],
        capture_output=True,
        text=True,
        timeout=240,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) == 2 * len(names)
    for kind in ("pipe", "folder", "device"):
        assert f"not a file, but a {kind}" in done.stdout


@pytest.mark.parametrize(
    "path",
    [
        "x" * 5_000,
        "y/" * 3_000 + "z.wav",
        "a\0b.wav",
        "a\nb\r\n\tc.wav",
        "\x1b[31mred.wav",
        "\ud83d.wav",
        "\u202egnp.wav",
        "e" + "\u0301" * 9_000,
    ],
)
def test_names_in_messages(path):
    for load in (load_audio, load_image):
        refused(path, load=load)
        refused(Path(path), load=load)
        refused({"path": path}, load=load)
    str(shorten(path)).encode()


def test_names_keep_their_ends():
    assert name_of("/data/" + "d" * 900 + "/speech_17.wav", "audio").endswith("speech_17.wav")
    assert name_of("a.wav", "audio") == "a.wav"
    assert name_of(Path("b/a.wav"), "audio") == str(Path("b/a.wav"))
    for source in (b"", np.zeros(3), torch.zeros(3)):
        assert name_of(source, "audio") == "the audio given"


@pytest.mark.parametrize("limit", [20, 57, 500])
def test_shortened(limit):
    assert shorten("short", limit) == "short"
    for text in (
        "a" * 5_000,
        "\n" * 5_000,
        "ab\n" * 400,
        "é" * limit,
        "\U0001f600" * 700,
        list(range(10_000)),
    ):
        line = shorten(text, limit)
        assert len(line) <= limit
        assert line.isprintable()
    line = shorten("begin" + "x" * 900 + "end", limit)
    assert line.startswith("begin")
    assert line.endswith("end")


def box(kind: bytes, content: bytes = b"", size: int | None = None) -> bytes:
    return struct.pack(">I4s", 8 + len(content) if size is None else size, kind) + content


FTYP, MOOV, MDAT = box(b"ftyp", b"isom" * 4), box(b"moov", b"m" * 50), box(b"mdat", b"d" * 90)


@pytest.mark.parametrize(
    ("content", "whole"),
    [
        (FTYP + MOOV + MDAT, True),
        (FTYP + MDAT + MOOV, True),
        (MOOV + MDAT, True),
        (box(b"wide") + MDAT + MOOV, True),
        (FTYP + MOOV + MDAT[:-1], False),
        (FTYP + MDAT + MOOV[:-1], False),
        (FTYP + MOOV, False),
        (FTYP + MDAT, False),
        (FTYP + MOOV + box(b"mdat", b"d" * 90, 0), True),
        (FTYP + MOOV + MDAT + b"trailing bytes, no box", True),
        (FTYP + MDAT + MOOV + b"\xff" * 70, True),
        (FTYP + MDAT + MOOV + b"TAG" + b"a" * 125, True),
        (FTYP + MDAT + MOOV + bytes(99), True),
        (FTYP + MOOV + box(b"moof", b"f" * 40) + MDAT + box(b"moof", b"f" * 40)[:-9], False),
        (FTYP + MOOV + box(b"moof", b"f" * 40) + MDAT + box(b"moof", b"f" * 40) + MDAT[:20], False),
        (FTYP + MOOV + box(b"mdat", struct.pack(">Q", 116) + b"d" * 100, 1), True),
        (FTYP + MOOV + box(b"mdat", struct.pack(">Q", 117) + b"d" * 100, 1), False),
    ],
)
@pytest.mark.reads("media", "bytes after the end of an mp4 or m4a", "ignored")
def test_boxes(content, whole):
    if whole:
        require_whole(io.BytesIO(content), "a.mp4")
    else:
        with pytest.raises(UserError, match="a.mp4: cut short"):
            require_whole(io.BytesIO(content), "a.mp4")


@pytest.mark.parametrize(
    ("size", "whole"),
    [
        (b"\xa0", True),
        (b"\xa1", False),
        (b"\x40\x20", True),
        (b"\x40\x21", False),
        (b"\xff", True),
        (b"\x01" + b"\xff" * 7, True),
        (b"\x10\x00\x00\x20", True),
        (b"", True),
    ],
)
def test_segments(size, whole):
    content = b"\x1a\x45\xdf\xa3\x83abc\x18\x53\x80\x67" + size + (b"s" * 32 if size else b"")
    if whole:
        require_whole(io.BytesIO(content), "a.mkv")
    else:
        with pytest.raises(UserError, match="a.mkv: cut short"):
            require_whole(io.BytesIO(content), "a.mkv")


# ----------------------------------------------------------------------------------------------
# broken headers
def counted(content: bytes) -> tuple[io.BytesIO, list]:
    """A stream, and the sizes of all reads from it."""
    reads = []

    class Stream(io.BytesIO):
        def read(self, size=-1):
            reads.append(size)
            return super().read(size)

    return Stream(content), reads


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (
            b"RIFF\x24\x80\0\0WAVE" + bytes(2_000_000),
            "holds zeros where its audio should begin; copy it again",
        ),
        (b"RIFF\x24\x80\0\0AVI " + bytes(700_000), "holds zeros where its images should begin"),
        (
            wav()[:36] + bytes(1_500_000),
            "holds zeros where its audio",
        ),  # the format arrived, the samples did not
        (b"FORM\0\x30\0\0AIFF" + bytes(900_000), "holds zeros where its audio"),
        (b"RIFF\x24\x80\0\0WAVE" + b"junk\0\0\0\0" * 300_000, "more than 10000 chunks"),
        (FTYP + struct.pack(">I4s", 8, b"free") * 200_000, "boxes hold next to nothing"),
        (FTYP + struct.pack(">I4s", 3, b"abcd") * 200_000, "boxes hold next to nothing"),
    ],
)
@pytest.mark.reads(
    "media",
    "files whose content is zeros after the header (a disk that was full)",
    "refused",
)
def test_headers_followed_by_nothing(content, says):
    stream, reads = counted(content)
    with pytest.raises(UserError, match=says):
        require_whole(stream, "a.wav")
    assert len(reads) < 11_000
    refused(content, says)


@pytest.mark.parametrize("kind", ["mp3", "flac", "ogg", "adts"])
def test_zeros_behind_sound_are_not_searched(kind, monkeypatch, capfd):
    """30 GB of zeros behind 2 s of mp3 took minutes."""
    monkeypatch.setattr("minomni.inputs.containers.MAX_ZEROS", 1 << 20)
    content = io.BytesIO()
    codec = {"flac": "flac", "mp3": "mp3", "ogg": "libopus", "adts": "aac"}[kind]
    with av.open(content, "w", format=kind) as container:
        stream = container.add_stream(codec, rate=48_000, layout="mono")
        samples = (0.3 * np.sin(np.arange(96_000) / 9)).astype(np.float32)
        frame = av.AudioFrame.from_ndarray(samples[None], "fltp", "mono")
        frame.sample_rate = 48_000
        for part in av.AudioResampler(stream.format, "mono", 48_000).resample(frame):
            container.mux(stream.encode(part))
        container.mux(stream.encode(None))
    zeros, read = counted(content.getvalue() + bytes(64 << 20))
    refused(zeros, "holds more than 1 MB of zeros")
    assert sum(read) < 16 << 20
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("kind", ["h264", "gif", "flv", "mjpeg", "vob"])
def test_zeros_behind_films_are_not_searched(kind, monkeypatch, capfd):
    monkeypatch.setattr("minomni.inputs.containers.MAX_ZEROS", 1 << 20)
    content = black_film(kind)
    zeros, read = counted(content + bytes(64 << 20))
    load = functools.partial(load_video, media=TINY.media, with_audio=False)
    refused(zeros, "holds more than 1 MB of zeros", load=load)
    assert sum(read) < 16 << 20
    assert capfd.readouterr().err == ""


def black_film(kind: str, size: int = 96) -> bytes:
    codecs = {"h264": "libx264", "flv": "flv1", "vob": "mpeg2video", "avi": "rawvideo"}
    stream = io.BytesIO()
    with av.open(stream, "w", format=kind) as container:
        video = container.add_stream(codecs.get(kind, kind), rate=25)
        video.width = video.height = size
        video.pix_fmt = {"gif": "rgb8", "mjpeg": "yuvj420p", "avi": "bgr24"}.get(kind, "yuv420p")
        for _ in range(20):
            frame = av.VideoFrame.from_ndarray(np.zeros((size, size, 3), np.uint8), "rgb24")
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
    return stream.getvalue()


def test_silence_and_black_may_be_zeros(monkeypatch):
    monkeypatch.setattr("minomni.inputs.containers.MAX_ZEROS", 1 << 18)
    stream = io.BytesIO()
    soundfile.write(stream, np.zeros(400_000, np.float32), 16_000, format="WAV", subtype="FLOAT")
    assert len(load_audio(stream)) == 400_000
    black = black_film("avi")
    assert black.count(0) > 500_000
    assert load_video(black, TINY.media, False, most_tokens=10_000).frames.max() == 0


def test_zeros_behind_the_samples():
    assert same(wav() + bytes(70_001))
    begin = wav().index(b"data")
    assert same(wav()[:begin] + b"junk" + struct.pack("<I", 3_000) + bytes(3_000) + wav()[begin:])


def test_films_of_many_fragments():
    fragments = (box(b"moof", b"f" * 90) + box(b"mdat", b"d")) * 9_000
    require_whole(io.BytesIO(FTYP + MOOV + fragments), "a.mp4")
    with pytest.raises(UserError, match="cut short"):
        require_whole(io.BytesIO(FTYP + MOOV + fragments + MDAT[:-7]), "a.mp4")


@pytest.mark.parametrize(
    "content",
    [
        b"\x1a\x45\xdf\xa3" + rest
        for rest in (b"", b"\x02", b"\x01\xff\xff", b"\x00", b"\x81a\x18\x53\x80\x67\x01\x02")
    ]
    + [
        b".snd",
        b".snd\0\0\0",
        b".snd\0\0\0\x1c\0\0\0",
        b"RIFF",
        b"RIFF\0\0\0\0WAVEfmt ",
        b"FORM\0",
        b"RF64\xff\xff",
        b"\0\0\0\x18ftyp",
        b"\0\0\0\1mdat\xff\xff\xff\xff\xff\xff\xff\xff",
        b"\0\0\0\1moov\xff\xff\xff\xff",
    ],
)
def test_headers_cut_short(content, tmp_path):
    refused(content, "the audio given")
    (tmp_path / "a.bin").write_bytes(content)
    refused(
        tmp_path / "a.bin", "a.bin: "
    )  # files refuse places before their beginning, BytesIO does not


def test_streams_that_break_while_their_header_is_read():
    for error in (
        OSError("unplugged"),
        EOFError("unplugged"),
        struct.error("unplugged"),
        ValueError("unplugged"),
    ):

        class Broken(io.BytesIO):
            def seek(self, offset, whence=0, error=error):
                if whence == io.SEEK_END:
                    raise error
                return super().seek(offset, whence)

        refused(Broken(wav()), "(unplugged)")


def test_views_that_skip_bytes():
    spread = np.repeat(np.frombuffer(wav(), np.uint8), 3).tobytes()
    assert same(memoryview(spread)[::3])
    view = memoryview(wav())
    view.release()
    refused(view, "a memoryview that was released")


def test_names_that_raise():
    class Nameless(io.BytesIO):
        @property
        def name(self):
            raise KeyError("no name")

    assert name_of(Nameless(), "audio") == "the audio given"
    refused(Nameless(wav()), "the audio given: an open file that cannot be read")


def test_numbers_that_python_does_not_spell():
    for value in (7**9_000, -(10**4_400), [11**6_000]):
        assert shorten(value) == "a very large number"
    assert str(UserError(3**11_000)) == "a very large number"
