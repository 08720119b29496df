"""Films as they are: turned, mirrored, of uneven times, of changing sizes, transparent, too large,
or in lists.
"""

import base64
import io
import struct
import subprocess
from dataclasses import replace
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image

from minomni.config import TINY
from minomni.errors import UserError
from minomni.inputs.containers import RisingTimes
from minomni.inputs.media import Clip, load_audio, load_video, sample_indices
from minomni.inputs.options import MediaOptions
from minomni.inputs.video import _times, frame_range, true_rate, upright

MEDIA = TINY.media
ONE = 1 << 16  # of a display matrix
COLORS = {(1, 0, 0): "R", (0, 1, 0): "G", (0, 0, 1): "B", (0, 0, 0): "-"}


def scene(height: int = 64, width: int = 96) -> np.ndarray:
    """Red and green above blue and black."""
    frame = np.zeros((height, width, 3), np.uint8)
    frame[: height // 2, : width // 2, 0] = frame[: height // 2, width // 2 :, 1] = 250
    frame[height // 2 :, : width // 2, 2] = 250
    return frame


def corners(frame) -> str:
    """The colors of the four quarters, row by row."""
    frame = np.asarray(frame)
    height, width = frame.shape[:2]
    places = [(y, x) for y in (height // 4, 3 * height // 4) for x in (width // 4, 3 * width // 4)]
    return "".join(COLORS[tuple(int(level > 125) for level in frame[place])] for place in places)


def film(
    times: list[int],
    size: tuple[int, int] = (64, 96),
    kind: str = "mp4",
    tone_from: float | None = None,
    seconds: float = 4.0,
) -> bytes:
    """A film of scenes shown at times in ms, of a size (height, width), with a tone from a time on
    if there is one.
    """
    stream = io.BytesIO()
    with av.open(
        stream, "w", format={"mkv": "matroska", "ts": "mpegts"}.get(kind, kind)
    ) as container:
        video = container.add_stream("libx264", rate=30)
        video.height, video.width, video.pix_fmt = *size, "yuv444p"
        video.codec_context.time_base = Fraction(1, 1_000)
        audio = (
            None
            if tone_from is None
            else container.add_stream("pcm_s16le", rate=16_000, layout="mono")
        )
        for time in times:
            frame = av.VideoFrame.from_ndarray(scene(*size), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1_000)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        if audio is not None:
            beginning = np.arange(int(seconds * 16_000)) >= tone_from * 16_000
            wave = (10_000 * np.sin(np.arange(len(beginning)) / 3) * beginning).astype(np.int16)
            frame = av.AudioFrame.from_ndarray(wave[None], format="s16", layout="mono")
            frame.sample_rate, frame.pts = 16_000, 0
            container.mux([*audio.encode(frame), *audio.encode(None)])
    return stream.getvalue()


# ----------------------------------------------------------------------------------------------
# orientation
def displayed(content: bytes, a: int, b: int, c: int, d: int) -> bytes:
    """An mp4 whose track header says: show x, y at a x + c y, b x + d y."""
    at = content.index(b"tkhd") + 4 + 40
    matrix = struct.pack(">9i", a * ONE, b * ONE, 0, c * ONE, d * ONE, 0, 0, 0, 1 << 30)
    return content[:at] + matrix + content[at + 36 :]


MATRICES = {
    (1, 0, 0, 1): "RGB-",
    (-1, 0, 0, 1): "GR-B",
    (1, 0, 0, -1): "B-RG",
    (-1, 0, 0, -1): "-BGR",
    (0, 1, 1, 0): "RBG-",
    (0, 1, -1, 0): "BR-G",
    (0, -1, 1, 0): "G-RB",
    (0, -1, -1, 0): "-GBR",
}


@pytest.mark.parametrize(("matrix", "expected"), MATRICES.items())
@pytest.mark.reads(
    "video",
    "video that is mirrored or rotated",
    "upright in all eight orientations, as ffmpeg shows it",
)
def test_all_eight_orientations(matrix, expected):
    frames = load_video(
        displayed(film([0, 250, 500, 750]), *matrix), MEDIA, with_audio=False
    ).frames
    assert {corners(frame) for frame in frames} == {expected}
    assert frames.shape[1:3] == ((56, 84) if matrix[0] else (84, 56))


@pytest.mark.parametrize("matrix", MATRICES)
def test_orientations_are_those_of_ffmpeg(matrix, tmp_path):
    ffmpeg = pytest.importorskip(
        "imageio_ffmpeg", reason="pip's imageio-ffmpeg brings the program ffmpeg"
    )
    path = tmp_path / "film.mp4"
    path.write_bytes(displayed(film([0, 250]), *matrix))
    command = [
        ffmpeg.get_ffmpeg_exe(),
        "-v",
        "error",
        "-i",
        path,
        "-frames:v",
        "1",
        "-f",
        "image2pipe",
        "-c:v",
        "png",
        "-",
    ]
    theirs = Image.open(
        io.BytesIO(subprocess.run(command, capture_output=True, check=True).stdout)
    ).convert("RGB")
    with av.open(str(path)) as container:
        ours = upright(next(container.decode(video=0)))
    assert ours.size == theirs.size
    assert corners(ours) == corners(theirs)


# ----------------------------------------------------------------------------------------------
# times
@pytest.mark.parametrize(
    ("times", "last", "header", "expected"),
    [
        ([0, 0.5, 1.0, 1.5], 0.5, 2, 2),
        ([3, 3.5, 4.0, 4.5], 0.02, 1_000, 2),  # header and last duration are wrong
        ([0, 0.5, 1.0, 1.5], 6.5, 25, 0.5),  # the last frame is shown for long
        (
            [0, 0.033, 0.067, 0.1],
            0.033,
            30,
            30,
        ),  # times rounded to 1 ms: the header is the better one
        ([0, 0.1, 1.0, 1.9, 2.0], 0.5, 25, 2),
        ([7], 0.1, 12, 12),
        ([7, 7], 0, 12, 12),
    ],
)
def test_rate_of_the_frames_themselves(times, last, header, expected):
    assert true_rate(times, last, header) == pytest.approx(expected, rel=1e-6)


@pytest.mark.reads(
    "video",
    "video of a variable frame rate, or of a wrong rate in its header",
    "frames by their real times",
)
def test_slow_films_of_a_fast_header():
    """20 frames, one each 400 ms, in a file that says 30 a second: 8 s make 16 frames."""
    clip = load_video(film([400 * i for i in range(20)], kind="mkv"), MEDIA, with_audio=False)
    assert len(clip.frames) == 16
    assert float(clip.seconds[-1]) == pytest.approx(7.6, abs=2e-3)


@pytest.mark.reads(
    "video",
    "video that begins again midway, with another size and earlier times",
    "the parts follow each other, at the size of the first",
)
def test_films_that_begin_anew():
    """Two recordings in one transport stream, the second one of another size and earlier times: 3 s
    and 2 s.
    """
    parts = (
        film([250 * i for i in range(12)], kind="ts"),
        film([250 * i for i in range(8)], (112, 64), kind="ts"),
    )
    clip = load_video(b"".join(parts), MEDIA, with_audio=False)
    assert clip.frames.shape == (10, 56, 84, 3)  # all at the size of the first
    assert (clip.seconds.diff() > 0.2).all()
    assert float(clip.seconds[-1]) == pytest.approx(4.75, abs=0.06)


@pytest.mark.parametrize("kind", ["ts", "h264"])
@pytest.mark.reads("video", "video that changes size midway", "frames at the size of the first")
def test_films_that_change_their_size(kind):
    """3 s and then 2 s of another size; the times go on, and h264 without a container has none."""
    parts = (
        film([250 * i for i in range(12)], kind=kind),
        # ffmpeg adds the 0.5 s by which x264 decodes ahead, but only to times from 0 on.
        film([500 + 250 * i for i in range(12, 20)], (112, 64), kind=kind),
    )
    clip = load_video(b"".join(parts), MEDIA, False, options=MediaOptions(nframes=20))
    assert clip.frames.shape == (20, 56, 84, 3)
    assert (clip.seconds.diff() > 0).all()
    if kind == "ts":
        assert clip.seconds.diff().tolist() == pytest.approx([0.25] * 19, abs=0.03)


@pytest.mark.parametrize("milliseconds", [300, 700])
@pytest.mark.parametrize("count", [2, 4])
def test_short_films_that_begin_anew(milliseconds, count):
    part = film(list(range(0, milliseconds, 100)), kind="ts")
    clip = load_video(part * count, MEDIA, with_audio=False, options=MediaOptions(fps=10))
    number = count * milliseconds // 100
    assert len(clip.frames) == number // 2 * 2
    assert float(clip.seconds[-1]) == pytest.approx(0.1 * (number - 1), abs=0.15)


@pytest.mark.parametrize("fps", [0.2, 1, 2, 5, 10, 25, 60])
@pytest.mark.parametrize("b_frames", [0, 1, 3, 7, 16])
def test_frames_out_of_order_do_not_begin_anew(fps, b_frames):
    """As avi files store them: each group of b frames behind the one that follows it."""
    rising = RisingTimes()
    order = [0]
    for begin in range(0, 60, b_frames + 1):
        group = list(range(begin + 2, begin + 2 + b_frames))
        order += [*group[::-1], begin + 1]
    for index in order:
        assert rising.repair(index / fps, step=1 / fps) == index / fps
    assert rising.shifts == [0.0]


@pytest.mark.parametrize("fps", [1, 2, 3, 5])
@pytest.mark.parametrize(("b_frames", "pyramid"), [(3, "normal"), (6, "none"), (16, "none")])
def test_avi_films_of_a_slow_rate_do_not_begin_anew(fps, b_frames, pyramid):
    stream = io.BytesIO()
    with av.open(stream, "w", format="avi") as container:
        video = container.add_stream("libx264", rate=fps)
        video.height, video.width, video.pix_fmt = 64, 96, "yuv420p"
        video.options = {"bf": str(b_frames), "b-adapt": "0", "b-pyramid": pyramid}
        for _ in range(40):
            container.mux(video.encode(av.VideoFrame.from_ndarray(scene(), format="rgb24")))
        container.mux(video.encode(None))
    times, rate, shifts = _times(io.BytesIO(stream.getvalue()), "a film", 25.0, 40)
    assert shifts == [0.0]
    assert rate == pytest.approx(fps)
    assert np.diff(times) == pytest.approx(1 / fps)


@pytest.mark.parametrize("fps", [1, 2, 4])
@pytest.mark.parametrize("count", [2, 8, 30])
def test_slow_films_that_begin_anew(fps, count):
    """The second recording begins where the first one did, however short that was."""
    rising = RisingTimes()
    times = [rising.repair(5 + i / fps, step=1 / fps) for i in [*range(count), *range(count)]]
    assert times == pytest.approx([5 + i / fps for i in range(2 * count)])


def test_sound_that_begins_anew_later_than_before():
    """Its blocks are in order: a fall of more than a second tells it, however long a gap is."""
    rising = RisingTimes([0.0, 1.5])
    stored = [0.0, 0.5, 1.0, 1.4, 0.3, 0.8]
    assert [rising.repair(time, step=0.1) for time in stored] == [0.0, 0.5, 1.0, 1.4, 1.8, 2.3]


def test_short_films_that_begin_anew_with_their_sound(tmp_path):
    """A tone in the first 0.2 s of each of three recordings of 0.8 s."""
    path = tmp_path / "a.ts"
    with av.open(path, "w") as container:
        video = container.add_stream("libx264", rate=10)
        video.height, video.width, video.pix_fmt = 64, 96, "yuv420p"
        audio = container.add_stream("mp2", rate=16_000, layout="mono")
        wave = 10_000 * np.sin(np.arange(12_800) / 3)
        wave[3_200:] = 0
        sound = av.AudioFrame.from_ndarray(wave.astype(np.int16)[None], "s16", "mono")
        sound.sample_rate, sound.pts = 16_000, 0
        container.mux(audio.encode(sound))
        for i in range(8):
            frame = av.VideoFrame.from_ndarray(scene(), format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, 10)
            container.mux(video.encode(frame))
        container.mux([*video.encode(None), *audio.encode(None)])

    clip = load_video(path.read_bytes() * 3, MEDIA, True)
    loud = (clip.wave.abs() > 0.05).nonzero()[:, 0] / 16_000
    onsets = [float(loud[0])] + loud[1:][loud.diff() > 0.3].tolist()
    assert onsets == pytest.approx([0.0, 0.8, 1.6], abs=0.11)  # a gap is 0.1 s or more


@pytest.mark.parametrize("start", [None, 3.0])
def test_films_that_begin_anew_with_their_sound(tmp_path, start):
    """A tone from 1 s to 1.2 s of each of two recordings of 4 s is heard twice, 4 s apart."""
    path = tmp_path / "a.ts"
    with av.open(path, "w") as container:
        video = container.add_stream("libx264", rate=4)
        video.height, video.width, video.pix_fmt = 64, 96, "yuv420p"
        audio = container.add_stream("mp2", rate=16_000, layout="mono")
        wave = 10_000 * np.sin(np.arange(64_000) / 3)
        wave[:16_000] = wave[19_200:] = 0
        sound = av.AudioFrame.from_ndarray(wave.astype(np.int16)[None], "s16", "mono")
        sound.sample_rate, sound.pts = 16_000, 0
        container.mux(audio.encode(sound))
        for i in range(16):
            frame = av.VideoFrame.from_ndarray(scene(), format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, 4)
            container.mux(video.encode(frame))
        container.mux([*video.encode(None), *audio.encode(None)])

    options = MediaOptions(video_start=start)
    clip = load_video(path.read_bytes() * 2, MEDIA, True, options=options)
    loud = (clip.wave.abs() > 0.05).nonzero()[:, 0] / 16_000 + (start or 0)
    onsets = [float(loud[0])] + loud[1:][loud.diff() > 0.5].tolist()
    expected = [1.0, 5.0] if start is None else [5.0]
    assert onsets == pytest.approx(expected, abs=0.05)
    assert float(clip.seconds[-1]) + (start or 0) == pytest.approx(7.75, abs=0.3)


@pytest.mark.parametrize("kind", ["mp4", "mov", "mkv"])
@pytest.mark.reads("video", "several tracks, covers", "the tracks that ffmpeg takes")
def test_the_tracks_that_ffmpeg_takes(tmp_path, kind):
    """A cover lies before the moving picture, and the default track behind another one."""
    path = tmp_path / f"a.{kind}"
    with av.open(path, "w") as container:
        cover = container.add_stream("mjpeg", rate=4)
        cover.width, cover.height, cover.pix_fmt = 320, 240, "yuvj420p"
        video = container.add_stream("libx264", rate=4)
        video.width, video.height, video.pix_fmt = 96, 64, "yuv420p"
        cover.disposition = 0
        video.disposition = av.stream.Disposition.default
        tones = []
        for track in range(2):
            tones.append(container.add_stream("aac", rate=16_000, layout="mono"))
            tones[-1].disposition = av.stream.Disposition.default if track else 0
        pages = [(cover, np.full((240, 320, 3), 255, np.uint8))] + [(video, scene())] * 12
        for number, (stream, picture) in enumerate(pages):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = max(0, number - 1), Fraction(1, 4)
            container.mux(stream.encode(frame))
        for stream, hz in zip(tones, (500, 1_000), strict=True):
            wave = 0.3 * np.sin(np.arange(48_000) * 2 * np.pi * hz / 16_000)
            frame = av.AudioFrame.from_ndarray(wave.astype(np.float32)[None], "fltp", "mono")
            frame.sample_rate, frame.pts = 16_000, 0
            container.mux(stream.encode(frame))
        for stream in (cover, video, *tones):
            container.mux(stream.encode(None))

    def pitch(wave) -> int:
        return int(np.abs(np.fft.rfft(wave[16_000:32_000])).argmax())

    clip = load_video(path, MEDIA, with_audio=True)
    assert len(clip.frames) == 6
    assert {corners(frame) for frame in clip.frames} == {"RGB-"}
    assert pitch(clip.wave.numpy()) == pitch(load_audio(path).numpy()) == 1_000

    ffmpeg = pytest.importorskip(
        "imageio_ffmpeg", reason="pip's imageio-ffmpeg brings the program ffmpeg"
    )
    command = [ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", path]
    sound = [*command, "-ar", "16000", "-f", "f32le", "-"]
    theirs = subprocess.run(sound, capture_output=True, check=True).stdout
    assert pitch(np.frombuffer(theirs, "<f4")) == 1_000
    raw = [*command, "-frames:v", "1", "-pix_fmt", "rgb24", "-f", "rawvideo", "-"]
    theirs = subprocess.run(raw, capture_output=True, check=True).stdout
    assert corners(np.frombuffer(theirs, np.uint8).reshape(64, 96, 3)) == "RGB-"


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (None, None, (0, 9)),
        (1.0, None, (2, 9)),
        (1.1, 2.0, (3, 4)),
        (-3, 2.2, (0, 4)),
        (0, 99, (0, 9)),
    ],
)
def test_ranges_of_a_constant_rate(start, end, expected):
    times = [5 + i / 2 for i in range(10)]
    assert (
        frame_range(times, 2.0, MediaOptions(video_start=start, video_end=end), "a film")
        == expected
    )


def test_ranges_of_uneven_times_go_by_the_times():
    times = [0, 0.1, 0.2, 3.0, 4.0, 4.5]
    found = frame_range(times, 6 / 5.4, MediaOptions(video_start=0.15, video_end=4.0), "a film")
    assert found == (2, 4)
    with pytest.raises(
        UserError, match="less than two frames lie from video_start 1 s to video_end 2 s"
    ):
        frame_range(times, 6 / 5.4, MediaOptions(video_start=1, video_end=2), "a film")


def test_parts_of_a_film_with_their_sound():
    """A tone from 2.5 s on; from 2 s to 3.5 s it is heard after half a second."""
    content = film([250 * i for i in range(16)], kind="mkv", tone_from=2.5)
    clip = load_video(
        content, MEDIA, True, options=MediaOptions(video_start=2, video_end=3.5, fps=4)
    )
    assert len(clip.frames) == 6
    assert float(clip.seconds[-1]) == pytest.approx(1.5, abs=2e-3)
    assert len(clip.wave) == 24_000
    assert int((clip.wave.abs() > 0.05).float().argmax()) == pytest.approx(8_000, abs=30)


@pytest.mark.reads(
    "video",
    "sound track that begins before the video",
    "each sample at its own time after the first frame",
)
def test_sound_belongs_to_the_first_picture():
    """Pictures begin 1.5 s after the sound: what was heard before is dropped."""
    content = film([1_500 + 250 * i for i in range(8)], kind="mkv", tone_from=2.0, seconds=3.5)
    wave = load_video(content, MEDIA, with_audio=True).wave
    assert int((wave.abs() > 0.05).float().argmax()) == pytest.approx(8_000, abs=40)


@pytest.mark.parametrize(
    ("options", "total", "says"),
    [
        (
            MediaOptions(nframes=10),
            8,
            "10 frames are asked for; expected an even number from 2 to 8",
        ),
        (MediaOptions(nframes=1), 8, "0 frames"),
        (MediaOptions(max_frames=1), 8, "0 frames"),
        (MediaOptions(nframes=2), 1, "2 frames are asked for"),
    ],
)
def test_frames_that_there_are_not(options, total, says):
    with pytest.raises(UserError, match=says):
        sample_indices(total, 4.0, MEDIA, options)


# ----------------------------------------------------------------------------------------------
# pixels and memory
def test_transparent_films_lie_on_white():
    stream, clear = io.BytesIO(), Image.new("RGBA", (84, 56), (0, 0, 0, 0))
    half = Image.new("RGBA", (84, 56), (255, 0, 0, 128))
    clear.save(stream, "PNG", save_all=True, append_images=[half], duration=500, disposal=1)
    frames = load_video(stream.getvalue(), MEDIA, with_audio=False).frames
    assert frames[0].min() == 255
    assert frames[-1][20, 40].tolist() == pytest.approx([255, 127, 127], abs=1)


@pytest.mark.reads(
    "video",
    "frames of more than 36 million pixels",
    "refused before they are decoded",
)
def test_huge_frames_are_not_decoded():
    stream, image = io.BytesIO(), io.BytesIO()
    Image.new("1", (9_000, 9_000)).save(image, "PNG")
    with av.open(stream, "w", format="mov") as container:
        video = container.add_stream("png", rate=4)
        video.width = video.height = 9_000
        video.pix_fmt = "rgb24"
        packet = av.Packet(image.getvalue())
        packet.stream, packet.pts, packet.dts, packet.time_base = video, 0, 0, Fraction(1, 4)
        container.mux(packet)
    with pytest.raises(
        UserError, match="the video given: (frames of 9000x9000|not a readable video)"
    ):
        load_video(stream.getvalue(), MEDIA, with_audio=False)


@pytest.mark.reads(
    "video",
    "video that needs more tokens than the context holds",
    "refused before it is decoded",
)
def test_long_films_are_refused_by_their_packets(monkeypatch):
    monkeypatch.setattr("minomni.inputs.video._times", None)
    with pytest.raises(
        UserError, match="20 frames of 84x56 pixels are 60 tokens, more than the context holds"
    ):
        load_video(film([250 * i for i in range(40)]), MEDIA, with_audio=False, most_tokens=50)


@pytest.mark.parametrize(("frames", "fits"), [(200, False), (8, True)])
def test_long_films_without_times_are_refused_by_their_packets(monkeypatch, frames, fits):
    """h264 without a container, at 25 frames a second."""
    stream = io.BytesIO()
    with av.open(stream, "w", format="h264") as container:
        video = container.add_stream("libx264", rate=5)
        video.height, video.width, video.pix_fmt = 64, 96, "yuv420p"
        video.options = {"bf": "0"}
        for _ in range(frames):
            container.mux(video.encode(av.VideoFrame.from_ndarray(scene(), format="rgb24")))
        container.mux(video.encode(None))
    load = lambda: load_video(stream.getvalue(), MEDIA, False, most_tokens=20)  # noqa: E731
    if fits:
        assert len(load().frames) > 1
        return
    monkeypatch.setattr("minomni.inputs.video._times", None)
    with pytest.raises(UserError, match="more than the context holds"):
        load()


@pytest.mark.parametrize("kind", ["mp4", "mkv", "avi", "ts"])
@pytest.mark.reads(
    "video",
    "video of more than 500 billion pixels, above two hours of 1920 x 1080",
    "refused before it is decoded",
)
def test_films_of_too_many_pixels_are_refused_before_they_are_decoded(kind, monkeypatch):
    monkeypatch.setattr("minomni.inputs.video.MAX_FILM_PIXELS", 11 * 64 * 96 - 1)
    monkeypatch.setattr("minomni.inputs.video._times", None)
    source = film([100 * i for i in range(11)], kind=kind)
    says = "11 frames of 96x64 pixels take too long to decode"
    for options in (MediaOptions(), MediaOptions(nframes=2)):
        with pytest.raises(UserError, match=says):
            load_video(source, MEDIA, with_audio=False, options=options)


def test_frames_larger_than_the_header_says_are_refused_at_once(monkeypatch):
    """A transport stream tells the size of its first frames; the others are four times as large."""
    parts = (
        film([250 * i for i in range(4)], kind="ts"),
        film([250 * i for i in range(20)], (128, 192), kind="ts"),
    )
    source = b"".join(parts)
    fits = 4 * 64 * 96 + 20 * 128 * 192
    monkeypatch.setattr("minomni.inputs.video.MAX_FILM_PIXELS", fits)
    assert len(load_video(source, MEDIA, with_audio=False).frames) > 4
    monkeypatch.setattr("minomni.inputs.video.MAX_FILM_PIXELS", fits - 1)
    with pytest.raises(UserError, match="20 frames of 192x128 pixels take too long to decode"):
        load_video(source, MEDIA, with_audio=False)


@pytest.mark.parametrize(
    ("codec", "pixels", "bytes_each"),
    [
        ("mpeg4", "yuv420p", 96 * 64 * 3 // 2),
        ("ffv1", "yuv444p10le", 96 * 64 * 6),
        ("ffv1", "gray", 96 * 64),
        ("libx264", "yuv420p10le", 96 * 64 * 3 * 2),  # its decoder holds twice as many
    ],
)
@pytest.mark.reads(
    "video",
    "decoded frames of more than 100 MB; of h264, 50 MB",
    "refused before they are decoded",
)
def test_frames_that_would_fill_the_memory_are_refused(codec, pixels, bytes_each, monkeypatch):
    stream = io.BytesIO()
    with av.open(stream, "w", format="matroska") as container:
        video = container.add_stream(codec, rate=4)
        video.height, video.width, video.pix_fmt = 64, 96, pixels
        for _ in range(4):
            container.mux(video.encode(av.VideoFrame.from_ndarray(scene(), format="rgb24")))
        container.mux(video.encode(None))
    monkeypatch.setattr("minomni.inputs.video.MAX_FRAME_BYTES", bytes_each)
    assert len(load_video(stream.getvalue(), MEDIA, with_audio=False).frames) > 1
    monkeypatch.setattr("minomni.inputs.video.MAX_FRAME_BYTES", bytes_each - 1)
    says = f"96x64 pixels in {pixels} are 0 MB each; of .*, at most 0 MB a frame are read; scale"
    with pytest.raises(UserError, match=says):
        load_video(stream.getvalue(), MEDIA, with_audio=False)


@pytest.mark.parametrize("kind", ["mp4", "mov", "mkv", "avi"])
def test_missing_sound_is_refused_before_pictures_are_decoded(kind, monkeypatch):
    monkeypatch.setattr("minomni.inputs.video._times", None)
    with pytest.raises(UserError, match="the video given: has no audio track"):
        load_video(film([0, 250, 500, 750], kind=kind), MEDIA, with_audio=True)


@pytest.mark.parametrize("kind", ["mov", "mkv", "avi"])
def test_long_sound_is_refused_before_pictures_are_decoded(kind, monkeypatch):
    """8 s of sound are 200 tokens: too many alone, or with those of the frames."""
    source = film([200 * i for i in range(40)], kind=kind, tone_from=0.0, seconds=8.0)
    part = MediaOptions(video_start=1.0, video_end=3.0)
    whole = load_video(source, MEDIA, True, most_tokens=300)
    assert 7.7 * 16_000 < len(whole.wave) <= 8 * 16_000  # avi shows its first frame later
    load_video(source, MEDIA, True, options=part, most_tokens=100)

    monkeypatch.setattr("minomni.inputs.video._times", None)
    says = "the video given: 8 s of audio are 200 tokens, more than the context holds; shorten it"
    with pytest.raises(UserError, match=says):
        load_video(source, MEDIA, True, most_tokens=150)
    with pytest.raises(UserError, match="2 s of audio are 50 tokens"):
        load_video(source, MEDIA, True, options=part, most_tokens=40)
    says = (
        r"\d\d tokens beside 200 of audio, more than the context holds; shorten it, or set video_st"
    )
    with pytest.raises(UserError, match=says):
        load_video(source, MEDIA, True, most_tokens=190)
    monkeypatch.setattr("minomni.inputs.video.MAX_AUDIO_S", 6.0)
    with pytest.raises(UserError, match="8 s of audio are 200 tokens"):
        load_video(source, MEDIA, True)


# ----------------------------------------------------------------------------------------------
# lists of frames
def spellings(tmp_path) -> list:
    """One frame as a path, a PIL image, a data: URI, an array, and bytes."""
    image, stream = Image.fromarray(scene()), io.BytesIO()
    image.save(tmp_path / "frame.png")
    image.save(stream, "PNG")
    uri = f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"
    return [str(tmp_path / "frame.png"), image, uri, scene(), stream.getvalue()]


def test_lists_of_frames(tmp_path):
    clip = load_video(spellings(tmp_path), MEDIA, False, options=MediaOptions(sample_fps=5.0))
    assert clip.frames.shape == (6, 56, 84, 3)  # an odd number gets the last one twice
    assert all(torch.equal(frame, clip.frames[0]) for frame in clip.frames)
    assert corners(clip.frames[0]) == "RGB-"
    assert clip.seconds.tolist() == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])


@pytest.mark.parametrize(
    ("options", "step"),
    [(MediaOptions(), 0.5), (MediaOptions(fps=4), 0.25), (MediaOptions(fps=4, sample_fps=1), 1.0)],
)
def test_rates_of_listed_frames(options, step):
    assert load_video([scene()] * 4, MEDIA, False, options=options).seconds.tolist() == [
        0,
        step,
        2 * step,
        3 * step,
    ]


@pytest.mark.parametrize(
    ("frames", "says"),
    [
        ([], "a list of no frames"),
        ([scene(), 5], "frame 2: the image given"),
        ([scene(), None], "frame 2: "),
        ([scene(), scene(200, 40)], "frame 2 comes at"),
        ([scene(), "nowhere.png"], "frame 2: nowhere.png: no such file"),
        ([scene(), "https://127.0.0.1:9/a.png"], "web addresses are not fetched"),
    ],
)
def test_lists_that_are_no_film(frames, says):
    with pytest.raises(UserError, match=says) as error:
        load_video(frames, MEDIA, with_audio=False)
    assert len(str(error.value)) <= 500


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "bmp", "tiff", "tga", "ico"])
def test_single_pictures_are_no_film(tmp_path, kind):
    path = tmp_path / f"scene.{kind}"
    Image.fromarray(scene()).save(path)
    with pytest.raises(UserError, match=f"scene.{kind}: is an image; give it as image"):
        load_video(path, MEDIA, with_audio=False)


def test_pictures_behind_each_other_are_a_film():
    """PNG files, which ffmpeg reads by its format of single pictures."""
    stream = io.BytesIO()
    for frame in (scene(), scene()[::-1], scene(), scene()[:, ::-1]):
        Image.fromarray(frame).save(stream, "PNG")
    assert len(load_video(stream.getvalue(), MEDIA, with_audio=False).frames) >= 2


@pytest.mark.parametrize("ending", ["txt", "nfo", "asc"])
def test_texts_are_no_film(tmp_path, ending):
    path = tmp_path / f"notes.{ending}"
    path.write_text("Bread, milk and 12 eggs.\n" * 70)
    with pytest.raises(UserError, match=f"notes.{ending}: holds no video"):
        load_video(path, MEDIA, with_audio=False)


@pytest.mark.parametrize("kind", ["GIF", "PNG"])
def test_moving_pictures_are_films(kind):
    stream, later = io.BytesIO(), Image.fromarray(scene()[::-1])
    Image.fromarray(scene()).save(stream, kind, save_all=True, append_images=[later], duration=400)
    assert len(load_video(stream.getvalue(), MEDIA, with_audio=False).frames) == 2


def test_sample_fps_is_not_for_files():
    with pytest.raises(UserError, match="sample_fps is for lists of frames"):
        load_video(film([0, 500]), MEDIA, False, options=MediaOptions(sample_fps=2))


@pytest.mark.parametrize(
    "fps",
    [
        pytest.param(9**5_000, id="digits"),
        pytest.param(10**310, id="large"),
        True,
        False,
        np.bool_(True),
        0,
        -3,
        float("inf"),
        float("nan"),
        Fraction(-1, 3),
    ],
)
def test_rates_that_are_none(fps):
    frames = np.stack([scene()] * 2)
    for source in ((frames, fps), ([scene()] * 2, fps)):
        with pytest.raises(
            UserError, match="frames per second; expected a number above zero"
        ) as error:
            load_video(source, MEDIA, with_audio=False)
        assert len(str(error.value)) <= 500
        assert "\n" not in str(error.value)


def test_rates_of_other_types():
    frames = np.stack([scene()] * 3)
    for fps in (Fraction(1, 4), np.float32(0.25)):
        assert load_video((frames, fps), MEDIA, False).seconds.tolist() == [0, 4, 8]
        assert load_video(frames, MEDIA, False, options=MediaOptions(fps=fps)).seconds.tolist() == [
            0,
            4,
            8,
        ]


# ----------------------------------------------------------------------------------------------
# clips of known size
def sized(height: int, width: int) -> Clip:
    return Clip(
        torch.zeros(2, height, width, 3, dtype=torch.uint8), torch.arange(2.0), None, sized=True
    )


@pytest.mark.parametrize(
    "options",
    [
        MediaOptions(min_pixels=9_000),
        MediaOptions(max_pixels=4_000),
        MediaOptions(resized_height=84, resized_width=28),
        MediaOptions(total_pixels=70_000),
    ],
)
def test_clips_of_known_size_take_no_size(options):
    with pytest.raises(
        UserError, match="_(pixels|height) is for frames that are to be resized.*leave it out"
    ):
        load_video(sized(84, 56), MEDIA, False, options=options)
    frames = replace(sized(84, 56), sized=False)
    assert load_video(frames, MEDIA, False, options=options) is frames  # they get their size later


@pytest.mark.parametrize(("height", "width"), [(85, 56), (56, 30), (14, 28), (0, 28)])
def test_clips_of_known_size_fill_their_cells(height, width):
    with pytest.raises(
        UserError, match=f"sized=True of {width}x{height} pixels; expected multiples of 28"
    ):
        load_video(sized(height, width), MEDIA, False)
    assert load_video(sized(112, 28), MEDIA, False).sized
