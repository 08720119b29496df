"""Packed training data: read by WebDataset and tar as well, by random access, in bounded memory."""

import json
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import soundfile
import webdataset
from PIL import Image

import minomni
from minomni.data import jsonl, shards
from minomni.errors import UserError
from minomni.train.finetune import read_rows


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


def test_errors(data, packed, omni, tmp_path):
    with pytest.raises(UserError, match="exists; give the name of a new folder"):
        shards.pack(data, packed)
    with pytest.raises(UserError, match="--skip-corrupt goes with packed data"):
        read_rows(data, tmp_path / "run", omni, True)
    (data.parent / "3.wav").unlink()
    with pytest.raises(UserError, match=r"row 4: .*3.wav: no such file"):
        shards.pack(data, tmp_path / "other")
    assert not (tmp_path / "other").exists()
    (packed / "members.npy").write_bytes(b"no array")
    with pytest.raises(UserError, match="its index cannot be read"):
        read_rows(packed, tmp_path / "run", omni, False)
    (packed / "members.npy").unlink()
    (packed / "00000.tar").write_bytes(b"no tar")
    with pytest.raises(UserError, match="00000.tar: is no tar file"):
        read_rows(packed, tmp_path / "run", omni, False)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_data(tmp_path):
    """100,000 samples, packed and read at random: in memory are the index and the offsets."""
    message = json.dumps(
        {
            "messages": [
                {"role": "user", "content": "a " * 500},
                {"role": "assistant", "content": "N"},
            ]
        }
    )
    count = 100_000
    with open(tmp_path / "my.jsonl", "w") as file:
        file.writelines(message.replace('"N"', f'"{i}"') + "\n" for i in range(count))
    tracemalloc.start()
    assert shards.pack(tmp_path / "my.jsonl", tmp_path / "packed", 2**24) == count
    rows = shards.ShardRows(tmp_path / "packed", "system")
    rows.starts.extend(range(count))
    for position in range(2000):
        i = jsonl.epoch_index(0, count, position)
        assert rows[i].answer == str(i)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20_000_000  # of 120 MB of text
