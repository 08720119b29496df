"""Packed training data: read by WebDataset and tar as well, by random access, in bounded memory."""

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tracemalloc
from itertools import islice
from pathlib import Path

import forked
import numpy as np
import pytest
import soundfile
import webdataset
from PIL import Image

import minomni
from minomni import __main__ as command
from minomni.data import jsonl, shards
from minomni.errors import UserError
from minomni.train import distributed, finetune
from minomni.train.finetune import FinetuneChatStage, read_rows
from minomni.train.loop import Recipe, make_loader


@pytest.fixture(scope="module")
def omni(tiny_folder):
    return minomni.load(str(tiny_folder))


@pytest.fixture
def data(tmp_path) -> Path:
    """Six rows with text, images and recordings, in two layouts."""
    noise = np.random.default_rng(0).uniform(-0.3, 0.3, 16_000)
    rows = []
    for i in range(6):
        Image.new("RGB", (56, 56), (40 * i, 0, 0)).save(tmp_path / f"{i}.png")
        soundfile.write(tmp_path / f"{i}.wav", noise, 16_000)
        question = [{"type": "image", "image": f"{i}.png"}, {"type": "text", "text": "what?"}]
        messages = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": f"answer {i}"},
        ]
        rows.append({"messages": messages, "speech": f"{i}.wav", "voice": "Ann"})
    rows[5] = {"query": "<image>what?", "response": "answer 5", "images": ["5.png"]}
    path = tmp_path / "my.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def packed(data, tmp_path) -> Path:
    assert shards.pack(data, tmp_path / "packed", shard_bytes=100_000) == 6
    return tmp_path / "packed"


def test_the_command_packs_all_rows(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["minomni", "pack", str(data), str(tmp_path / "out")])
    assert command.main() == 0
    assert re.search(r"\b6\b", capsys.readouterr().out.replace(str(tmp_path), ""))
    with tarfile.open(tmp_path / "out" / "00000.tar") as shard:
        names = shard.getnames()
    assert sum(name.endswith(".json") for name in names) == 6
    assert command.main() == 2  # the folder is there
    assert capsys.readouterr().err.count("\n") == 1


def test_media_by_uri_and_with_long_names_are_packed(data, tmp_path):
    recording = (tmp_path / "0.wav").rename(tmp_path / f"a.{'x' * 150}")
    row = {"speech": recording.as_uri(), "voice": "Ann"}
    row["messages"] = json.loads(data.read_text().splitlines()[0])["messages"]
    data.write_text(json.dumps(row) + "\n")
    assert shards.pack(data, tmp_path / "packed") == 1
    with tarfile.open(tmp_path / "packed" / "00000.tar") as tar:
        contents = {member.name: tar.extractfile(member).read() for member in tar}
    assert list(contents) == ["000000000.json", "000000000.0.png", "000000000.1"]
    assert json.loads(contents["000000000.json"])["speech"] == "000000000.1"
    assert contents["000000000.1"] == recording.read_bytes()


def test_packed_rows_are_the_rows_of_the_file(data, packed, omni, tmp_path):
    rows = read_rows(data, tmp_path / "run", omni, False)
    same = read_rows(packed, tmp_path / "run", omni, False)
    assert len(same) == len(rows) == 6
    assert list(same.spoken) == list(rows.spoken)
    processor = jsonl.Processor(omni.config, omni.tokenizer)
    for i in (5, 0, 3):  # in any order
        assert same[i].answer == rows[i].answer
        assert same[i].voice == rows[i].voice
        one, two = (jsonl.prompt_inputs(row[i], processor) for row in (rows, same))
        assert one.input_ids.equal(two.input_ids)
        assert one.image_patches.equal(two.image_patches)
        if rows[i].speech:
            assert jsonl.load_audio(same[i].speech).equal(jsonl.load_audio(rows[i].speech))


def test_webdataset_and_tar_read_the_shards(packed, data):
    files = sorted(packed.glob("*.tar"))
    assert len(files) > 1
    dataset = webdataset.WebDataset([str(file) for file in files], shardshuffle=False)
    samples = list(dataset)
    assert [sample["__key__"] for sample in samples] == [f"{i:09}" for i in range(6)]
    for i, sample in enumerate(samples):
        row = json.loads(sample["json"])
        assert row["messages"][-1]["content"] == f"answer {i}"
        assert sample["0.png"] == (data.parent / f"{i}.png").read_bytes()
    members = np.load(packed / "members.npy")
    names = []
    for file in files:
        with tarfile.open(file) as tar:
            names += tar.getmembers()
    assert [entry.offset_data for entry in names] == members[:, 1].tolist()
    assert [entry.size for entry in names] == members[:, 2].tolist()


def test_shards_of_webdataset_are_read_without_an_index(packed, omni, tmp_path):
    source = webdataset.WebDataset(
        [str(f) for f in sorted(packed.glob("*.tar"))], shardshuffle=False
    )
    (tmp_path / "theirs").mkdir()
    with webdataset.TarWriter(str(tmp_path / "theirs" / "a-000.tar")) as sink:
        for sample in source:
            sink.write({k: v for k, v in sample.items() if k not in ("__url__", "__local_path__")})
    rows = read_rows(tmp_path / "theirs", tmp_path / "run", omni, False)
    assert [row.answer for row in rows] == [f"answer {i}" for i in range(6)]


def damage(packed: Path, member: int) -> None:
    """Flip a byte of a member."""
    shard, offset, size, _ = np.load(packed / "members.npy")[member].tolist()
    with open(sorted(packed.glob("*.tar"))[shard], "rb+") as file:
        file.seek(offset + size // 2)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 1]))


def test_a_damaged_member_is_named_and_skipped_only_if_asked(packed, omni, tmp_path, capsys):
    damage(packed, 4)  # of sample 1, which has three members
    with pytest.raises(UserError, match=r"sample 1: 0000\d.tar: member 000000001.0.png is damaged"):
        read_rows(packed, tmp_path / "run", omni, False)
    rows = read_rows(packed, tmp_path / "run", omni, True)
    assert "skipped: sample 1: " in capsys.readouterr().err
    assert [row.answer for row in rows] == [f"answer {i}" for i in (0, 2, 3, 4, 5)]


@pytest.mark.parametrize("asked", [True, False])
def test_the_command_asks_for_it(asked, packed, tiny_folder, tmp_path, monkeypatch, capsys):
    damage(packed, 4)

    def stop(*_):
        raise UserError("the data is read")

    monkeypatch.setattr(finetune, "stage_names", stop)
    words = ["minomni", "train", tiny_folder, "--data", packed, "--lora", "r=2", "--device", "cpu"]
    words += ["--out", tmp_path / "out", "--home", tmp_path / "home"]
    words += ["--skip-corrupt"] if asked else []
    monkeypatch.setattr(sys, "argv", list(map(str, words)))
    assert command.main() == 2
    errors = capsys.readouterr().err
    assert "member 000000001.0.png is damaged" in errors
    assert ("the data is read" in errors) == asked


def test_errors(data, packed, omni, tmp_path):
    with pytest.raises(UserError, match="exists; give the name of a new folder"):
        shards.pack(data, packed)
    with pytest.raises(UserError, match="--skip-corrupt goes with packed data"):
        read_rows(data, tmp_path / "run", omni, True)
    (data.parent / "3.wav").unlink()
    with pytest.raises(UserError, match=r"row 4: .*3.wav: no such file"):
        shards.pack(data, tmp_path / "other")
    assert not (tmp_path / "other").exists()
    (data.parent / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match=r"empty.jsonl: holds no row"):
        shards.pack(data.parent / "empty.jsonl", tmp_path / "other")


def test_lines_with_commas_are_not_packed(data, tmp_path):
    data.write_text(data.read_text().replace("\n", ",\n"))
    with pytest.raises(UserError, match="my.jsonl: is not one JSON object a line .* as JSONL"):
        shards.pack(data, tmp_path / "packed")


def test_an_index_of_other_shards(packed, omni, tmp_path):
    members = np.load(packed / "members.npy")
    (packed / "00000.tar").rename(packed / "hidden")
    with pytest.raises(UserError, match=r"it is of \d tar files, and the folder has \d\); delete"):
        read_rows(packed, tmp_path / "run", omni, False)
    (packed / "hidden").rename(packed / "00000.tar")
    for content in (members[:-1], members[:, :3], members.astype(float)):
        np.save(packed / "members.npy", content)
        with pytest.raises(UserError, match="its index cannot be used"):
            read_rows(packed, tmp_path / "run", omni, False)
    (packed / "members.npy").write_bytes(b"no array")
    with pytest.raises(UserError, match=r"its index cannot be used .* delete members.npy"):
        read_rows(packed, tmp_path / "run", omni, False)
    (packed / "members.npy").unlink()
    assert len(read_rows(packed, tmp_path / "run", omni, False)) == 6


def test_empty_tar_files(packed, omni, tmp_path):
    """A writer may leave its last file empty. One that came with samples needs a new index."""
    last = packed / "99999.tar"
    tarfile.open(last, "w").close()
    rows = read_rows(packed, tmp_path / "run", omni, False)
    assert [row.answer for row in rows] == [f"answer {i}" for i in range(6)]
    (packed / "members.npy").unlink()
    assert len(read_rows(packed, tmp_path / "run", omni, False)) == 6
    assert len(read_rows(packed, tmp_path / "run", omni, False)) == 6  # by the index of both
    last.write_bytes((packed / "00000.tar").read_bytes())
    with pytest.raises(UserError, match=r"its index cannot be used .* delete members.npy"):
        read_rows(packed, tmp_path / "run", omni, False)
    last.write_bytes(b"no tar")
    with pytest.raises(UserError, match=r"its index cannot be used .*is damaged or no tar file"):
        read_rows(packed, tmp_path / "run", omni, False)


def test_damaged_tar_files(packed, omni, tmp_path):
    """A cut file, one that is compressed, a header whose checksum is wrong: none is cut short in
    silence.
    """
    path = packed / "00000.tar"
    whole = path.read_bytes()
    header = int(np.load(packed / "members.npy")[1, 1]) - tarfile.BLOCKSIZE
    damages = {
        "cut": whole[:-25_000],
        "compressed": gzip.compress(whole),
        "header": whole[: header + 3] + b"!" + whole[header + 4 :],
        "text": b"no tar",
    }
    (packed / "members.npy").unlink()
    for content in damages.values():
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"00000.tar: is damaged or no tar file"):
            read_rows(packed, tmp_path / "run", omni, False)
        assert not (packed / "members.npy").exists()


@pytest.mark.skipif(not shutil.which("tar"), reason="this system has no tar")
def test_shards_of_the_program_tar(packed, omni, tmp_path):
    """Its names begin with ./ and its folders are members too."""
    (tmp_path / "files").mkdir()
    (tmp_path / "theirs").mkdir()
    for file in packed.glob("*.tar"):
        subprocess.run(["tar", "-xf", file, "-C", tmp_path / "files"], check=True)
    into = ["-cf", tmp_path / "theirs/a.tar", "-C", tmp_path / "files"]
    subprocess.run(["tar", "--sort=name", *into, "."], check=True)
    shards.write_index(tmp_path / "theirs")
    samples = np.load(tmp_path / "theirs/samples.npy")
    assert len(samples) == 7
    assert samples[-1] == len(np.load(packed / "members.npy"))


def test_batches_after_a_resume(packed, omni, tmp_path, monkeypatch):
    """A batch is a function of its number: of a fresh reader, and of two processes, each of which
    has one of its two rows.
    """
    recipe = Recipe(steps=4, batch=2, lr=1e-3, accumulate=2)

    def answers(first: int, rank: int = 0, world: int = 1) -> list[list[str]]:
        """Answers of the batches of one process from a step on."""
        monkeypatch.setattr(distributed, "rank", lambda: rank)
        monkeypatch.setattr(distributed, "world", lambda: world)
        rows = read_rows(packed, tmp_path / "run", omni, False)
        stage = FinetuneChatStage(omni, recipe, tmp_path, 0, rows)
        loader = make_loader(stage, first, recipe.steps)
        return [[row.answer for row in batch] for batch, _ in loader]

    whole = answers(0)
    assert len(whole) == 8
    assert whole[4:] == answers(2)
    assert [row[:1] for row in whole[4:]] == answers(2, 0, 2)
    assert [row[1:] for row in whole[4:]] == answers(2, 1, 2)


def write_tar(path: Path, contents: dict[str, bytes]) -> None:
    """A tar file of members of equal size whose names have 14 characters, written a hundred times
    as fast as by tarfile.
    """
    name, content = next(iter(contents.items()))
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    header = entry.tobuf(tarfile.USTAR_FORMAT)
    # The checksum of a header is the sum of its bytes, with spaces instead of the checksum.
    others = sum(header[14:148]) + sum(header[156:]) + 8 * ord(" ")
    padding = bytes(-len(content) % tarfile.BLOCKSIZE)
    with open(path, "wb") as file:
        for name, content in contents.items():
            checksum = b"%06o\0 " % (others + sum(name.encode()))
            file.write(name.encode() + header[14:148] + checksum + header[156:] + content + padding)
        file.write(bytes(2 * tarfile.BLOCKSIZE))


@pytest.mark.slow
def test_memory_does_not_grow_with_the_data(tmp_path):
    """100,000 samples of 1000 bytes in ten tar files. No content is kept while a tar file is
    indexed or rows are read at random; the index has 32 bytes for each member.
    """
    count = 100_000
    row = '{"query": "%s", "response": "%%06d"}' % ("a " * 500)
    for first in range(0, count, 10_000):
        numbers = range(first, first + 10_000)
        contents = {f"{i:09}.json": (row % i).encode() for i in numbers}
        write_tar(tmp_path / f"{first:06}.tar", contents)

    tracemalloc.start()
    for _ in islice(shards.members_of_tar(tmp_path / "000000.tar"), 5000):
        pass
    iterated = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    shards.write_index(tmp_path)
    assert (tmp_path / "members.npy").stat().st_size < 33 * count

    tracemalloc.start()
    rows = shards.ShardRows(tmp_path, "system")
    rows.starts.extend(range(count))
    for position in range(500):
        i = jsonl.epoch_index(0, count, position)
        assert rows[i].answer == f"{i:06}"
    read = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert iterated < 500_000  # bytes, of five million
    assert read < 40 * count


# `minomni` in a process of its own: a few steps, and the memory that the process takes at most.
FEW_STEPS = """
import resource, sys
from dataclasses import replace
from minomni import __main__
from minomni.train import finetune

make_stage = finetune.make_finetune_stage

def short_stage(*arguments):
    stage = make_stage(*arguments)
    stage.recipe = replace(stage.recipe, steps=3)
    return stage

finetune.make_finetune_stage = short_stage
finetune.FinetuneChatStage.preview_text = lambda self: ""
code = __main__.main()
unit = 1 if sys.platform == "darwin" else 1024
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
sys.exit(code)
"""


@pytest.mark.slow
def test_training_on_many_samples_takes_the_memory_of_few(tiny_folder, tmp_path):
    """`minomni train --data`, where rows that are kept would take a kilobyte each and more."""
    pytest.importorskip("resource", reason="this system does not tell how much memory was taken")
    row = {"messages": [{"role": "user", "content": "say a", "metadata": "x" * 1000}]}
    row["messages"].append({"role": "assistant", "content": "NUMBER"})
    text = json.dumps(row)
    peaks = []
    for count in (1000, 100_000):
        data = tmp_path / f"{count}"
        data.mkdir()
        for first in range(0, count, 10_000):
            numbers = range(first, min(first + 10_000, count))
            contents = {f"{i:09}.json": text.replace("NUMBER", f"{i:06}").encode() for i in numbers}
            write_tar(data / f"{first:06}.tar", contents)
        words = ["train", str(tiny_folder), "--data", str(data), "--lora", "r=2", "--epochs", "1"]
        words += ["--home", "run", "--out", f"adapter-{count}", "--device", "cpu", "--no-progress"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = forked.start(FEW_STEPS, words, tmp_path, environment)
        out, errors = process.communicate()
        assert process.returncode == 0, errors
        assert (tmp_path / f"adapter-{count}").is_dir()
        peaks.append(int(out.split()[-1]))
    assert peaks[1] - peaks[0] < 300 * 100_000  # bytes


@pytest.mark.slow
def test_memory_does_not_grow_while_packing(tmp_path):
    peaks = []
    for count in (100, 600):
        rows = [json.dumps({"query": "a " * 5000, "response": str(i)}) for i in range(count)]
        path = tmp_path / f"{count}.jsonl"
        path.write_text("\n".join(rows))
        tracemalloc.start()
        assert shards.pack(path, tmp_path / f"{count}", 2**20) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 1000 * 500  # bytes, of 10,000 in each row
