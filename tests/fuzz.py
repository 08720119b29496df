"""Damages files in random but repeatable ways and reads them: a well-formed answer or one clear
line, and nothing else.

    # all readers, in child processes
    python tests/fuzz.py --cases 20000 --seed 1
    # one case again, in this process, with its traceback
    python tests/fuzz.py --seed 1 --case 1234 --keep DIR

A case is known by its seed and number: they choose the reader, the file and what is done to it
(bits flipped, the end cut off, pieces moved, copied or taken from another file, numbers
overwritten, values of JSON replaced). Every reader runs in a child process with a limit of memory
and of processor time. A fault is: an exception other than UserError, a message of several lines or
more than 500 characters, a wrong answer, a crash, too much memory, no end.

A wrong answer is one that is not well-formed (of the wrong type or shape, empty, NaN). Where the
right answer is known, it is also any other than that: content that the damage left as it was gives
the answer of the whole file, and a file of TELL_THEIR_LENGTH whose end is cut off gives that answer
too, or is refused.
"""

import argparse
import contextlib
import faulthandler
import hashlib
import json
import math
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from fractions import Fraction
from importlib.util import find_spec
from multiprocessing.connection import wait
from pathlib import Path
from random import Random

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

MEMORY = 2 * 2**30  # bytes that one case may take
CPU_SECONDS, WALL_SECONDS = 20, 300  # of one case; the second ends a process that only waits
NO_END, DIED = "no end", "the process died"
TELL_THEIR_LENGTH = (
    ".wav",
    ".flac",
    ".png",
    ".jpg",
    ".webp",
    ".mp4",
    ".mkv",
    ".webm",
)  # so that a cut can be noticed
HEADER = 400  # bytes at the begin of a file in which half of all changes fall
ODD_NUMBERS = (
    0,
    1,
    2,
    3,
    7,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0xFFFF,
    10**6,
    0x7FFF_FFFF,
    0x8000_0000,
    0xFFFF_FFFF,
    2**62,
    2**63 - 1,
    2**64 - 1,
)
ODD_VALUES = (
    None,
    True,
    False,
    0,
    -1,
    1,
    3,
    0.5,
    -0.0,
    1e308,
    float("nan"),
    float("inf"),
    10**6,
    10**9,
    2**63,
    10**400,
    "",
    "0",
    "x",
    "<|AUDIO|>",
    "\ud83d",
    "a\nb",
    "\0",
    "é" * 300,
    [],
    {},
    [[]],
    [None],
    [0, -1],
    {"a": 1},
    {"type": "image"},
    {"url": "x"},
)


# ----------------------------------------------------------------------------------------------
# files to damage


def make_inputs(folder: Path) -> None:
    """Small files of every kind, each in a folder named by its kind; and a model in three ways."""
    makers = {
        "sound": sounds,
        "picture": pictures,
        "film": films,
        "model": models,
        "adapter": adapters,
        "resume": resume_files,
        "data": data_files,
    }
    if find_spec("peft") is None:
        del makers["adapter"]
    for name, make in makers.items():
        (folder / name).mkdir(parents=True)
        make(folder / name)


def sounds(folder: Path) -> None:
    import numpy as np
    import soundfile

    tone = 0.3 * np.sin(np.arange(6000) / 7)
    for name, rate, kind in (
        ("a.wav", 16_000, "PCM_16"),
        ("b.wav", 44_100, "FLOAT"),
        ("c.flac", 22_050, "PCM_16"),
        ("d.ogg", 16_000, "VORBIS"),
        ("e.mp3", 16_000, "MPEG_LAYER_III"),
        ("f.ogg", 48_000, "OPUS"),
    ):
        samples = np.stack([tone, -tone], axis=1) if name == "b.wav" else tone
        soundfile.write(folder / name, samples, rate, subtype=kind)


def pictures(folder: Path) -> None:
    import numpy as np
    from PIL import Image

    colors = np.arange(36 * 48 * 4, dtype=np.uint32).reshape(36, 48, 4) * 37 % 256
    picture = Image.fromarray(colors.astype(np.uint8), "RGBA")
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation
    picture.save(folder / "a.png")
    picture.convert("RGB").quantize(16).save(folder / "b.png")
    picture.convert("RGB").save(folder / "c.jpg", exif=exif.tobytes())
    picture.convert("CMYK").save(folder / "d.jpg", progressive=True)
    picture.save(folder / "e.webp")
    picture.convert("RGB").save(folder / "f.webp", lossless=True, exif=exif.tobytes())


def films(folder: Path) -> None:
    import av
    import numpy as np

    for name, codec, sound in (
        ("a.mp4", "mpeg4", "aac"),
        ("b.mp4", "libx264", "aac"),
        ("c.mkv", "libx264", "libmp3lame"),
        ("d.webm", "libvpx", "libopus"),
    ):
        with av.open(str(folder / name), "w", options={"fflags": "+bitexact"}) as container:
            video = container.add_stream(codec, rate=8)
            video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
            audio = container.add_stream(sound, rate=48_000, layout="mono")
            for i in range(16):
                pixels = np.full((48, 64, 3), 10 * i, np.uint8)
                pixels[8:24, 2 * i : 2 * i + 16] = (200, 50, 20)
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                frame.pts, frame.time_base = i, Fraction(1, 8)
                container.mux(video.encode(frame))
            tone = (0.3 * np.sin(np.arange(96_000) / 20)).astype(np.float32)
            frame = av.AudioFrame.from_ndarray(tone[None], format="fltp", layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = 48_000, 0, Fraction(1, 48_000)
            resampler = av.AudioResampler(
                format=audio.format, layout="mono", rate=48_000, frame_size=audio.frame_size or 960
            )
            for piece in [*resampler.resample(frame), *resampler.resample(None)]:
                container.mux(audio.encode(piece))
            container.mux(video.encode())
            container.mux(audio.encode())


def models(folder: Path) -> None:
    """The model that comes with the project; the same in shards with an index; the same with the
    settings of its media in the file of transformers 5; and its tokenizer as a tokenizer.json.
    """
    import minomni
    from minomni.checkpoint import saving

    shutil.copytree(ROOT / "data_samples" / "tiny", folder / "whole")
    saving.save(minomni.load(str(folder / "whole")), folder / "shards", shard_bytes=10_000_000)
    shutil.copytree(folder / "whole", folder / "newer")
    image_processor = json.loads((folder / "newer" / "preprocessor_config.json").read_text())
    (folder / "newer" / "preprocessor_config.json").unlink()
    settings = json.dumps({"image_processor": image_processor})
    (folder / "newer" / "processor_config.json").write_text(settings)
    vocab, merges, added = (
        folder / "whole" / name for name in ("vocab.json", "merges.txt", "added_tokens.json")
    )
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text(
        json.dumps(
            {
                "model": {
                    "type": "BPE",
                    "vocab": json.loads(vocab.read_text()),
                    "merges": merges.read_text().splitlines()[1:],
                },
                "added_tokens": [
                    {"content": name, "id": i} for name, i in json.loads(added.read_text()).items()
                ],
            }
        )
    )


def adapters(folder: Path) -> None:
    import torch

    import minomni
    from minomni.checkpoint import lora

    omni = minomni.load(str(ROOT / "data_samples" / "tiny"))
    lora.add_lora(omni, lora.parse_lora("r=2,layers=q_proj"), ("thinker", "talker"))
    for name, parameter in omni.named_parameters():
        if ".lora_B" in name:
            torch.nn.init.constant_(parameter, 0.1)
    lora.save_lora(omni, folder / "lora", list(omni.voices)[:1])


def resume_files(folder: Path) -> None:
    from minomni.train import run_folder

    network, optimizers = small_stage()
    for _ in range(2):
        network.zero_grad()
        network(next(network.parameters()).new_ones(4, 5)).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
    run_folder.save_checkpoint(
        folder, "rows", 2, {"square": 0.5}, dict(network.named_parameters()), optimizers
    )


def small_stage():
    """A network of two layers, and the optimizers of a training."""
    import torch

    from minomni.train.loop import Recipe, make_optimizers

    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.Linear(3, 2))
    return network, make_optimizers(
        dict(network.named_parameters()), Recipe(steps=4, batch=2, lr=1e-3)
    )


def data_files(folder: Path) -> None:
    """Own data in all layouts: one row a line, as an array, and a folder of recordings with
    metadata.csv.
    """
    import numpy as np
    import soundfile
    from PIL import Image

    Image.new("RGB", (56, 56), "red").save(folder / "a.png")
    (folder / "LJ" / "wavs").mkdir(parents=True)
    for path in (folder / "a.wav", folder / "LJ" / "wavs" / "one.wav"):
        soundfile.write(path, 0.1 * np.random.RandomState(0).randn(32_000), 16_000)
    media = [
        {"type": "image", "image": "a.png"},
        {"type": "audio", "audio": "a.wav"},
        {"type": "text", "text": "what"},
    ]
    rows = [
        {"messages": [{"role": "user", "content": "say a"}, {"role": "assistant", "content": "a"}]},
        {
            "messages": [
                {"role": "user", "content": media},
                {"role": "assistant", "content": "a", "weight": 1},
            ]
        },
        {
            "messages": [
                {"role": "user", "content": "<image>what"},
                {"role": "assistant", "content": "b"},
            ],
            "images": ["a.png"],
        },
        {
            "conversations": [{"from": "human", "value": "<audio>"}, {"from": "gpt", "value": "c"}],
            "audios": ["a.wav"],
        },
        {"query": "again", "response": "d", "history": [["x", "y"]], "system": "be kind"},
        {"instruction": "add", "input": "1 2", "output": "3"},
        {
            "messages": [
                {"role": "user", "content": "say e"},
                {"role": "assistant", "content": "e"},
            ],
            "speech": "a.wav",
            "voice": "Ann",
        },
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rows.json").write_text(json.dumps(rows, indent=1))
    (folder / "LJ" / "metadata.csv").write_text(
        "one|say 1|say one\none|a é|a e\n", encoding="utf-8"
    )


# ----------------------------------------------------------------------------------------------
# readers


class Readers:
    """Reads damaged files in a working copy of the inputs.

    A method returns the answer in a form that == compares (tensors as digests), or False where it
    is not well-formed.
    """

    def __init__(self, inputs: Path, work: Path):
        import minomni

        self.inputs, self.work = inputs, work
        shutil.copytree(inputs, work, dirs_exist_ok=True)
        self.omni = minomni.load(str(work / "model" / "whole"))

    def sound(self, path: Path):
        import torch

        from minomni.inputs.media import load_audio

        wave = load_audio(path)
        well_formed = wave.dim() == 1 and len(wave) > 0 and wave.dtype == torch.float32
        return well_formed and bool(torch.isfinite(wave).all()) and digest(wave)

    def picture(self, path: Path):
        from minomni.inputs.media import load_image

        picture = load_image(path)
        pixels = picture.tobytes()
        well_formed = (
            picture.mode == "RGB"
            and min(picture.size) > 0
            and len(pixels) == 3 * picture.width * picture.height
        )
        return well_formed and (picture.size, hashlib.sha256(pixels).hexdigest())

    def film(self, path: Path):
        from minomni.config import TINY
        from minomni.inputs.media import load_video

        silent, clip = load_video(path, TINY.media, False), None
        try:
            clip = load_video(path, TINY.media, True)
        except ValueError as error:  # an audio track that is broken, or gone
            check_message(error)
        same = clip is None or clip.frames.shape == silent.frames.shape
        well_formed = same and len(silent.frames) == len(silent.seconds) > 0
        heard = clip and digest(clip.frames, clip.seconds, clip.wave)
        return well_formed and (digest(silent.frames, silent.seconds), heard)

    def config(self, path: Path):
        """Settings that are read must also give an answer, and codes where there is a codec."""
        import torch

        import minomni

        [model, *_] = path.relative_to(self.work / "model").parts
        omni = minomni.load(str(self.work / "model" / model))
        question = [
            {"type": "image", "image": str(self.inputs / "picture" / "a.png")},
            {"type": "text", "text": "what"},
        ]
        messages = [{"role": "user", "content": question}]
        reply = omni.respond(messages, max_new_tokens=3, talker_max_new_tokens=4)
        codes = torch.zeros(0)
        if omni.codec is not None:
            codes = omni.codec.encode(torch.zeros(1, 16 * omni.codec.config.downsample, 80))
        well_formed = isinstance(reply.text, str) and bool(reply.wave.isfinite().all())
        return well_formed and (omni.config, reply.text, digest(reply.wave, codes))

    def tokenizer(self, path: Path):
        from minomni.inputs.tokenizer import Tokenizer

        tokenizer, text = Tokenizer.load(path.parent), "say the red circle, été 3"
        ids = tokenizer.encode(text)
        return tokenizer.decode(ids) == text and ids

    def voices(self, path: Path):
        from minomni.checkpoint.voices import load_voices

        voices = load_voices(path, self.omni.config)
        well_formed = len(voices) > 0 and all(
            voice.cond.shape == (1, 160) for voice in voices.values()
        )
        return well_formed and {
            name: (voice.bos_token, digest(voice.cond, voice.ref_mel))
            for name, voice in voices.items()
        }

    def model(self, path: Path):
        import minomni

        omni = minomni.load(str(path.parent))
        return omni.config.thinker == self.omni.config.thinker and digest(*omni.parameters())

    def adapter(self, path: Path):
        import copy

        from minomni.checkpoint import lora

        omni = copy.deepcopy(self.omni)
        lora.load_lora(omni, path.parent)
        lora.merge_lora(omni)
        weights = list(omni.parameters())
        return all(bool(weight.isfinite().all()) for weight in weights) and digest(*weights)

    def resume(self, path: Path):
        from minomni.train import run_folder

        network, optimizers = small_stage()
        step, means = run_folder.load_checkpoint(
            path.parent, "rows", dict(network.named_parameters()), optimizers
        )
        return (
            type(step) is int
            and isinstance(means, dict)
            and (step, means, digest(*network.parameters()))
        )

    def data(self, path: Path):
        from minomni.data import jsonl

        given = path.parent if path.name == "metadata.csv" else path
        lines = jsonl.read_dataset(given, self.work / "run", self.omni)
        rows = [lines[i] for i in range(len(lines))]
        return all(row.answer.strip() for row in rows) and rows


def digest(*tensors) -> str:
    """What tensors hold, their types and shapes, in few characters."""
    import torch

    hashed = hashlib.sha256()
    for tensor in tensors:
        hashed.update(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
        hashed.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return hashed.hexdigest()


# How often each file is damaged in a round, and by which reader it is read. A model takes longest.
FILES = [
    *(
        (f"sound/{name}", "sound", 4)
        for name in ("a.wav", "b.wav", "c.flac", "d.ogg", "e.mp3", "f.ogg")
    ),
    *(
        (f"picture/{name}", "picture", 3)
        for name in ("a.png", "b.png", "c.jpg", "d.jpg", "e.webp", "f.webp")
    ),
    *((f"film/{name}", "film", 4) for name in ("a.mp4", "b.mp4", "c.mkv", "d.webm")),
    ("model/whole/config.json", "config", 6),
    ("model/whole/codec/config.json", "config", 3),
    ("model/whole/generation_config.json", "config", 3),
    ("model/whole/preprocessor_config.json", "config", 3),
    ("model/newer/processor_config.json", "config", 3),
    ("model/whole/vocab.json", "tokenizer", 1),
    ("model/whole/merges.txt", "tokenizer", 1),
    ("model/whole/added_tokens.json", "tokenizer", 2),
    ("model/tokenizer/tokenizer.json", "tokenizer", 2),
    ("model/whole/spk_dict.pt", "voices", 4),
    ("model/whole/model.safetensors", "model", 1),
    ("model/shards/model.safetensors.index.json", "model", 1),
    ("adapter/lora/adapter_config.json", "adapter", 4),
    ("adapter/lora/adapter_model.safetensors", "adapter", 3),
    ("resume/rows.resume.pt", "resume", 5),
    ("data/rows.jsonl", "data", 5),
    ("data/rows.json", "data", 3),
    ("data/LJ/metadata.csv", "data", 2),
]
# Adapters need requirements-tune.txt.
if find_spec("peft") is None:
    FILES = [entry for entry in FILES if entry[1] != "adapter"]
ROUND = [(file, reader) for file, reader, times in FILES for _ in range(times)]


# ----------------------------------------------------------------------------------------------
# damage


def damaged(content: bytes, other: bytes, name: str, random: Random) -> bytes:
    """A file's content with one to four things done to it. other: the content of another file."""
    is_json = name.endswith((".json", ".jsonl"))
    for _ in range(random.choice((1, 1, 2, 4))):
        if is_json and random.random() < 0.6:
            content = other_value(content, name, random)
        else:
            content = random.choice((flip, flip, cut, overwrite, overwrite, move, splice, drop))(
                content, other, random
            )
    return content


def place(content: bytes, random: Random) -> int:
    """Somewhere in a file; every other time among its first bytes, where sizes stand."""
    return random.randrange(
        max(1, min(len(content), HEADER) if random.random() < 0.5 else len(content))
    )


def flip(content, other, random):
    changed = bytearray(content)
    for _ in range(random.choice((1, 1, 3, 30)) if content else 0):
        changed[place(content, random)] ^= 1 << random.randrange(8)
    return bytes(changed)


def cut(content, other, random):
    return content[: place(content, random)]


def overwrite(content, other, random):
    size, at = random.choice((1, 2, 4, 8)), place(content, random)
    number = random.choice((*ODD_NUMBERS, random.getrandbits(64))) % 2 ** (8 * size)
    return (
        content[:at]
        + number.to_bytes(size, random.choice(("little", "big")))
        + content[at + size :]
    )


def move(content, other, random):
    a, b, length = place(content, random), place(content, random), random.choice((1, 4, 50, 1000))
    return content[:a] + content[b : b + length] + content[a + random.choice((0, length)) :]


def splice(content, other, random):
    a, b, length = place(content, random), place(other, random), random.choice((4, 50, 1000, 10**6))
    return content[:a] + other[b : b + length] + content[a + random.choice((0, length)) :]


def drop(content, other, random):
    at = place(content, random)
    return content[:at] + content[at + random.choice((1, 2, 16, 300)) :]


def other_value(content: bytes, name: str, random: Random) -> bytes:
    """JSON, or one line of it, in which one value is replaced, removed or wrapped; as it was where
    it is broken.
    """
    lines = content.splitlines(keepends=True) if name.endswith(".jsonl") else [content]
    chosen = random.randrange(len(lines)) if lines else 0
    try:
        whole = json.loads(lines[chosen])
        places = list(nodes(whole))
    except (ValueError, RecursionError, IndexError):
        return content
    if not places:
        return content
    holder, key = random.choice(places)
    value = random.choice((*ODD_VALUES, "bracket"))
    if value == "bracket":
        value = "@brackets@"
    kind = random.random()
    if kind < 0.1:
        del holder[key]
    elif kind < 0.2:
        holder[key] = [holder[key]]
    elif kind < 0.3 and type(holder[key]) in (int, float) and abs(holder[key]) < 1e18:
        holder[key] *= random.choice((-1, 2, 0.5, 1000, 10**12))
    else:
        holder[key] = value
    text = json.dumps(whole).replace(
        '"@brackets@"', random.choice("[{") * random.choice((3, 100_000))
    )
    lines[chosen] = text.encode() + (b"\n" if name.endswith(".jsonl") else b"")
    return b"".join(lines)


def nodes(value):
    """Every place of a JSON value as (dictionary or list, key)."""
    for key in (
        list(value)
        if isinstance(value, dict)
        else range(len(value))
        if isinstance(value, list)
        else ()
    ):
        yield value, key
        yield from nodes(value[key])


def case_of(seed: int, number: int, inputs: Path) -> tuple[str, str, bytes]:
    """A case by seed and number -> (file, reader, damaged content)."""
    random = Random(f"{seed}-{number}")
    file, reader = ROUND[random.randrange(len(ROUND))]
    same = [path for path, kind in dict(ROUND).items() if kind == reader and path != file] or [file]
    others = same if random.random() < 0.7 else [path for path, _, _ in FILES]
    content, other = (inputs / file).read_bytes(), (inputs / random.choice(others)).read_bytes()
    if (
        reader == "model"
    ):  # changed weights are no fault, and all of a model's bytes but few are weights
        head = min(len(content), 200_000)
        return file, reader, damaged(content[:head], other[:head], file, random) + content[head:]
    return file, reader, damaged(content, other, file, random)


# ----------------------------------------------------------------------------------------------
# running


@dataclass
class Outcome:
    """What came of one case."""

    number: int
    file: str
    kind: str  # right (nothing known to be wrong), refused or fault
    what: str = ""  # of a fault: what happened, and where
    timings: str = ""


def check_message(error: ValueError) -> str:
    """The message of a UserError. Raises for one of several lines or too many characters, and any
    other error itself.
    """
    from minomni.errors import UserError

    if not isinstance(error, UserError):
        raise error
    message = str(error)
    if not message.isprintable() or len(message) > 500 or not message:
        raise AssertionError(
            f"a message of {len(message)} characters and {message.count(chr(10)) + 1} lines: "
            f"{message[:200]!r}"
        )
    return message


def whole_answers(readers: Readers) -> dict:
    """What the readers make of the files as they were made, by file."""
    answers = {}
    for file, reader in dict(ROUND).items():
        answers[file] = getattr(readers, reader)(readers.work / file)
        if not answers[file]:
            raise AssertionError(f"{file} as it was made is read wrong")
    return answers


def wrongness(answer, content: bytes, file: str, readers: Readers, answers: dict) -> str:
    """What is wrong with the answer to a damaged file; "" where nothing is known to be."""
    if not answer:
        return "a wrong answer"
    whole = (readers.inputs / file).read_bytes()
    if content == whole and answer != answers[file]:
        return "another answer to the same content"
    if whole.startswith(content) and file.endswith(TELL_THEIR_LENGTH) and answer != answers[file]:
        return "an answer to what is left of a cut file"
    return ""


def run_case(readers: Readers, seed: int, number: int, answers: dict) -> Outcome:
    """Damage a file, read it, and put the whole file back. answers: those of whole_answers()."""
    from minomni.errors import UserError

    file, reader, content = case_of(seed, number, readers.inputs)
    path = readers.work / file
    path.write_bytes(content)
    try:
        wrong = wrongness(getattr(readers, reader)(path), content, file, readers, answers)
        return Outcome(number, file, "fault", wrong) if wrong else Outcome(number, file, "right")
    except UserError as error:
        try:
            return Outcome(number, file, "refused", check_message(error))
        except AssertionError as wrong:
            return Outcome(number, file, "fault", str(wrong))
    except BaseException as error:
        frames = [
            f
            for f in traceback.extract_tb(error.__traceback__)
            if Path(f.filename).is_relative_to(ROOT / "minomni")
        ]
        at = f"{Path(frames[-1].filename).name}, {frames[-1].name}()" if frames else "a library"
        what = f"{type(error).__name__} in {at}: {(str(error).splitlines() or [''])[0][:120]}"
        return Outcome(number, file, "fault", what, traceback.format_exc()[-3000:])
    finally:
        shutil.copyfile(readers.inputs / file, path)


def worker(connection, inputs: Path, seed: int, kind: type) -> None:
    """Child process: take case numbers, send outcomes."""
    os.environ["MALLOC_ARENA_MAX"] = "2"
    os.environ["OMP_NUM_THREADS"] = "1"  # read when a reader imports PyTorch
    with tempfile.TemporaryDirectory() as work:
        readers = kind(inputs, Path(work))
        answers = whole_answers(readers)  # after this, imports and caches are no case's memory
        taken = memory("VmSize")
        if taken:
            resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY + 2**29, resource.RLIM_INFINITY))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libraries print what they think of the files
        connection.send("ready")
        while (number := connection.recv()) is not None:
            reset_peak()
            before = memory("VmRSS")
            outcome = run_case(readers, seed, number, answers)
            grown = memory("VmHWM") - before
            if grown > MEMORY:
                outcome = Outcome(
                    number, outcome.file, "fault", f"{grown / 2**30:.1f} GB of memory"
                )
            connection.send(outcome)


def memory(what: str, process: str = "self") -> int:
    """Bytes of memory of a process as Linux counts them; 0 elsewhere."""
    try:
        rows = Path(f"/proc/{process}/status").read_text().splitlines()
        return next(int(row.split()[1]) * 1024 for row in rows if row.startswith(f"{what}:"))
    except (OSError, StopIteration):
        return 0


def reset_peak() -> None:
    """Let Linux count the peak of memory anew."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def cpu_seconds(pid: int) -> float:
    """Processor time that a process has used; 0 where that cannot be told."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    except (OSError, IndexError):
        return 0.0


class Child:
    """A worker process and the case it works on. kind: the class of its readers."""

    def __init__(self, inputs: Path, seed: int, kind: type):
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(
            target=worker, args=(theirs, inputs, seed, kind), daemon=True
        )
        self.process.start()
        theirs.close()
        if not self.connection.poll(WALL_SECONDS) or self.connection.recv() != "ready":
            raise RuntimeError("a worker did not start")
        self.number = None

    def give(self, number: int) -> None:
        self.number, self.since, self.cpu = number, time.monotonic(), cpu_seconds(self.process.pid)
        self.connection.send(number)

    def endless(self) -> bool:
        """Whether the case takes more time than any should."""
        return (
            cpu_seconds(self.process.pid) - self.cpu > CPU_SECONDS
            or time.monotonic() - self.since > WALL_SECONDS
        )

    def stop(self) -> None:
        """End an idle child by asking, a busy one by force."""
        try:
            self.connection.send(None)
            self.process.join(5 if self.number is None else 0)
        except OSError:
            pass
        self.process.kill()
        self.process.join()
        self.connection.close()


@dataclass
class Result:
    """All outcomes of a run."""

    counts: dict[str, Counter] = field(default_factory=lambda: defaultdict(Counter))  # by file
    faults: list[Outcome] = field(default_factory=list)

    def add(self, outcome: Outcome) -> None:
        self.counts[outcome.file][outcome.kind] += 1
        if outcome.kind == "fault":
            self.faults.append(outcome)

    def report(self, seed: int) -> str:
        """A table of the files, and every kind of fault with the first cases that show it."""
        lines = ["| file | right | refused | faults |", "|---|---|---|---|"]
        for file, counts in sorted(self.counts.items()):
            lines.append(
                f"| {file} | {counts['right']} | {counts['refused']} | {counts['fault']} |"
            )
        total = sum(self.counts.values(), Counter())
        lines.append(
            f"| all {total.total()} | {total['right']} | {total['refused']} | {total['fault']} |"
        )
        groups = defaultdict(list)
        for fault in self.faults:
            groups[(fault.file, fault.what)].append(fault.number)
        for (file, what), numbers in sorted(groups.items(), key=lambda group: -len(group[1])):
            cases = " ".join(map(str, numbers[:4]))
            lines.append(f"{len(numbers)} x {file}: {what} (--seed {seed} --case {cases})")
        return "\n".join(lines)


def fuzz(
    cases: int, seed: int, seconds: float = math.inf, workers: int = 1, first: int = 0
) -> Result:
    """Run cases first, first + 1, ... in child processes, until all are run or the time is over."""
    with tempfile.TemporaryDirectory() as folder:
        make_inputs(Path(folder) / "inputs")
        return run_cases(
            range(first, first + cases), seed, Path(folder) / "inputs", Readers, seconds, workers
        )


def run_cases(
    cases: range, seed: int, inputs: Path, kind: type, seconds: float = math.inf, workers: int = 1
) -> Result:
    """Give cases to children that are idle, and take what comes of them. A child that fails is
    replaced.
    """
    result, numbers, began = Result(), iter(cases), time.monotonic()
    children = []
    try:
        children += [Child(inputs, seed, kind) for _ in range(workers)]
        while children:
            for child in [child for child in children if child.number is None]:
                number = next(numbers, None) if time.monotonic() - began < seconds else None
                if number is None:
                    child.stop()
                    children.remove(child)
                else:
                    child.give(number)
            ready = wait([child.connection for child in children], timeout=1) if children else []
            for i, child in enumerate(children):
                outcome = received(child, child.connection in ready, seed, inputs)
                if outcome is None:
                    continue
                result.add(outcome)
                if outcome.what == NO_END or outcome.what.startswith(DIED):
                    child.stop()
                    children[i] = Child(inputs, seed, kind)
                child.number = None
    finally:
        for child in children:
            child.stop()
    return result


def received(child: Child, ready: bool, seed: int, inputs: Path) -> Outcome | None:
    """What came of a child's case by now; None where it goes on."""
    if ready:
        try:
            return child.connection.recv()
        except (EOFError, OSError):
            child.process.join()
            file, _, _ = case_of(seed, child.number, inputs)
            return Outcome(child.number, file, "fault", f"{DIED} ({child.process.exitcode})")
    if child.number is not None and child.endless():
        return Outcome(child.number, case_of(seed, child.number, inputs)[0], "fault", NO_END)
    return None


def again(seed: int, number: int, keep: Path | None) -> Outcome:
    """One case in this process; its damaged file is kept."""
    faulthandler.enable()
    with tempfile.TemporaryDirectory() as folder:
        inputs = Path(folder) / "inputs"
        make_inputs(inputs)
        file, _, content = case_of(seed, number, inputs)
        if keep:
            keep.mkdir(parents=True, exist_ok=True)
            (keep / f"{seed}-{number}-{Path(file).name}").write_bytes(content)
        readers = Readers(inputs, Path(folder) / "work")
        return run_case(readers, seed, number, whole_answers(readers))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=1000, help="how many (default 1000)")
    parser.add_argument("--first", type=int, default=0, help="number of the first case (default 0)")
    parser.add_argument("--seed", type=int, default=1, help="of all damage (default 1)")
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop after this time")
    parser.add_argument("--workers", type=int, default=1, help="child processes (default 1)")
    parser.add_argument("--case", type=int, help="run this one case here, and show its traceback")
    parser.add_argument("--keep", type=Path, help="with --case: a folder for the damaged file")
    arguments = parser.parse_args()
    if arguments.case is not None:
        outcome = again(arguments.seed, arguments.case, arguments.keep)
        print(f"{outcome.file}: {outcome.kind}, {outcome.what}\n{outcome.timings}")
        return outcome.kind == "fault"
    began = time.monotonic()
    result = fuzz(
        arguments.cases, arguments.seed, arguments.seconds, arguments.workers, arguments.first
    )
    print(result.report(arguments.seed))
    print(f"{time.monotonic() - began:.0f} s")
    return bool(result.faults)


if __name__ == "__main__":
    sys.exit(main())
