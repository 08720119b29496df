"""Files are written completely or not at all, and only regular files are replaced."""

import io
import os
import stat
import threading
from pathlib import Path

import numpy as np
import pytest
import soundfile

from minomni.errors import MAX_MESSAGE_LENGTH, UserError, shorten
from minomni.files import WriteError, growing_wav, require_possible, write_atomically

TONE = (0.4 * np.sin(np.arange(4000) / 5)).astype(np.float32)


def by_write_atomically(path):
    write_atomically(path, lambda file: file.write(b"new"))


def by_growing_wav(path):
    with growing_wav(path, 8000) as wav:
        wav.write(TONE)
        wav.flush()


WRITERS = pytest.mark.parametrize("write", [by_write_atomically, by_growing_wav])


def device(path: Path, major: int, minor: int) -> Path:
    """A character device, of which /dev/null is 1, 3 and /dev/full is 1, 7."""
    try:
        os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(major, minor))
        open(path, "wb").close()
    except (OSError, AttributeError):
        pytest.skip("this user cannot make devices here")
    return path


def foreign(folder: Path, *known: str) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name not in known)


@WRITERS
@pytest.mark.reads("output", "an output name that is a device or a pipe", "written through")
def test_a_device_is_written_through(write, tmp_path):
    path = device(tmp_path / "null", 1, 3)
    write(path)
    assert path.is_char_device()
    assert not foreign(tmp_path, "null")


@WRITERS
def test_a_full_device_raises_and_stays(write, tmp_path):
    path = device(tmp_path / "full", 1, 7)
    with pytest.raises(WriteError, match=r"full: cannot be written \(No space left on device\)"):
        write(path)
    assert path.is_char_device()
    assert not foreign(tmp_path, "full")


@WRITERS
def test_a_pipe_gets_the_bytes_and_stays(write, tmp_path):
    path, got = tmp_path / "pipe", []
    os.mkfifo(path)
    reader = threading.Thread(target=lambda: got.append(path.read_bytes()))
    reader.start()
    write(path)
    reader.join(20)
    assert path.is_fifo()
    assert not foreign(tmp_path, "pipe")
    if write is by_write_atomically:
        assert got == [b"new"]
        return
    wave, rate = soundfile.read(io.BytesIO(got[0]))  # whose header does not say how long it is
    assert rate == 8000
    assert np.abs(wave - TONE).max() < 1e-4
    assert len(wave) == len(TONE)


@WRITERS
@pytest.mark.reads("output", "an output name that is a link", "followed, and kept")
def test_links_are_followed_and_stay(write, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "old").write_bytes(b"old")
    for name, target in (("one", "a/old"), ("two", "one"), ("dangling", "a/none")):
        (tmp_path / name).symlink_to(target)
    write(tmp_path / "two")
    write(tmp_path / "dangling")
    assert all((tmp_path / name).is_symlink() for name in ("one", "two", "dangling"))
    assert (tmp_path / "a" / "old").read_bytes() not in (b"old", b"")
    assert not (tmp_path / "a" / "old").is_symlink()
    assert (tmp_path / "a" / "none").is_file()
    assert not foreign(tmp_path / "a", "old", "none")


@WRITERS
def test_an_open_file_of_proc_is_written_through(write, tmp_path):
    """Like /dev/stdout redirected to a file: that file is written to, not replaced."""
    with open(tmp_path / "out", "wb") as file:
        descriptor = Path(f"/proc/self/fd/{file.fileno()}")
        if not descriptor.exists():
            pytest.skip("this system has no /proc")
        (tmp_path / "stdout").symlink_to(descriptor)
        number = os.stat(tmp_path / "out").st_ino
        write(tmp_path / "stdout")
    assert os.stat(tmp_path / "out").st_ino == number
    assert (tmp_path / "out").stat().st_size > 0


@WRITERS
@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("", "is a folder"),
        (".", "is a folder"),
        ("folder", "is a folder"),
        ("file/below", "cannot be written"),
        ("ring", "circle"),
        ("x" * 300, "File name too long"),
        ("x/" * 3000, "File name too long"),
        ("nul\0", "its name cannot be a file's"),
        ("half \ud83d", "its name cannot be a file's"),
        ("line\nfeed/" + "y" * 300, r"line\nfeed"),
    ],
)
def test_unwritable_paths_raise_one_line(write, name, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "ring").symlink_to("ring")
    with pytest.raises(WriteError) as error:
        write(name)
    text = str(error.value)
    if not (write is by_growing_wav and "line" in name):  # it makes no folders, and says so
        assert says in text
    assert text.isprintable()
    assert len(text) <= MAX_MESSAGE_LENGTH
    assert (tmp_path / "file").read_text() == "mine"
    assert not list((tmp_path / "folder").iterdir())


@WRITERS
def test_a_write_protected_file_is_refused(write, tmp_path):
    path = tmp_path / "kept"
    path.write_bytes(b"old")
    path.chmod(0o400)
    if os.access(path, os.W_OK):
        pytest.skip("this user may write everything")
    with pytest.raises(WriteError, match="write-protected"):
        write(path)
    assert path.read_bytes() == b"old"


@WRITERS
def test_a_private_file_stays_private(write, tmp_path):
    path = tmp_path / "mine"
    path.write_bytes(b"old")
    path.chmod(0o600)
    write(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.read_bytes() != b"old"


@pytest.mark.parametrize("error", [KeyboardInterrupt, UserError, OSError])
def test_an_interrupted_write_restores_the_old_file(error, tmp_path):
    path = tmp_path / "answer.wav"
    path.write_bytes(b"an old answer")

    def write_and_fail(file: Path) -> None:
        with growing_wav(file, 8000) as wav:
            wav.write(TONE)
            wav.flush()
            raise error("broken")

    for file in (path, tmp_path / "none.wav"):
        with pytest.raises(error):
            write_and_fail(file)
    assert path.read_bytes() == b"an old answer"
    assert not foreign(tmp_path, "answer.wav")
    with pytest.raises(
        (error, WriteError)
    ):  # an error of the system while it writes becomes one line
        write_atomically(
            path, lambda file: (file.write(b"half"), (_ for _ in ()).throw(error("broken")))
        )
    assert path.read_bytes() == b"an old answer"
    assert not foreign(tmp_path, "answer.wav")


def test_a_growing_wav_can_be_played_while_it_grows(tmp_path):
    path = tmp_path / "answer.wav"
    path.write_bytes(b"an old answer")
    with growing_wav(path, 8000) as wav:
        for pieces in (1, 2, 3):
            wav.write(TONE)
            wav.flush()
            assert soundfile.info(path).frames == pieces * len(TONE)
    whole = io.BytesIO()
    soundfile.write(whole, np.tile(TONE, 3), 8000, "PCM_16", format="WAV")
    assert path.read_bytes() == whole.getvalue()
    assert not foreign(tmp_path, "answer.wav")


def test_a_long_name_is_written(tmp_path):
    for name in ("x" * 255, "ü" * 127):
        by_write_atomically(tmp_path / name)
        by_growing_wav(tmp_path / name)
        assert (tmp_path / name).is_file()


def test_errors_of_the_write_function_propagate(tmp_path):
    with pytest.raises(RuntimeError, match="no disk"):
        write_atomically(
            tmp_path / "x", lambda file: (_ for _ in ()).throw(RuntimeError("no disk"))
        )
    with pytest.raises(
        UnicodeEncodeError, match="surrogates not allowed"
    ):  # of the content, not of the name
        write_atomically(tmp_path / "y", lambda file: file.write("a \udcc3".encode()))
    with pytest.raises(ValueError, match="embedded null") as error:
        write_atomically(tmp_path / "z", lambda file: os.stat("a\0b"))
    assert not isinstance(error.value, UserError)
    assert not list(tmp_path.iterdir())


def test_a_message_is_one_line_of_bounded_length():
    assert shorten("a\nb\tc\x1b[31m\ud83dü") == "a\\nb\\tc\\x1b[31m\\ud83dü"
    assert str(UserError("short")) == "short"
    long = str(UserError("begin " + "\n" * 100_000 + " end"))
    assert len(long) <= MAX_MESSAGE_LENGTH
    assert long.startswith("begin ")
    assert long.isprintable()
    assert str(UserError("x" * 9000 + " end")).endswith(" end")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("y" * 256, "File name too long"),
        ("missing/" + "é" * 128, "File name too long"),
        ("y/" * 2500, "File name too long"),
        ("file/below/it", "Not a directory"),
        ("nul\0", "its name cannot be a file's"),
        ("line\nfeed/" + "z" * 256, r"line\nfeed"),
    ],
)
@pytest.mark.reads("output", "an output name that no file can have", "refused before work")
def test_impossible_names_are_known_before_work(name, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(WriteError) as error:
        require_possible(name)
    assert says in str(error.value)
    assert str(error.value).isprintable()


@pytest.mark.parametrize(
    "name", ["y" * 255, "missing/and/below", "file", "line\nfeed", ".", "dead"]
)
def test_possible_names_pass(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "dead").symlink_to("nothing")
    require_possible(name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dead", "file"]
