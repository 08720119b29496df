"""Training data in tar shards: WebDataset's format, with an index for random access.

    out/00000.tar       members 000000000.json, 000000000.0.wav, 000000001.json, ...
    out/members.npy     shard, offset, size and CRC-32 of each member [members, 4]
    out/samples.npy     the first member of each sample, and their number [samples + 1]

A sample is one row of the JSONL file, in which the names of members stand for its media. The two
arrays are mapped into memory and members are read by seeking. So a batch stays a function of (seed,
number), which a stream that is shuffled in a buffer cannot offer, and no data is held in memory.
"""

import io
import json
import re
import shutil
import tarfile
import zlib
from array import array
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from minomni.data import jsonl
from minomni.data.jsonl_layouts import PATH_KEYS, normalize_row
from minomni.errors import UserError, shorten
from minomni.files import open_regular, sibling_path, write_atomically, writing
from minomni.inputs.prompt import Processor
from minomni.inputs.source import DATA_URI, FILE_URI, WEB_ADDRESS, open_source

if TYPE_CHECKING:
    from minomni.omni import Omni

SHARD_BYTES = 256 * 2**20
# A member's sample is its name up to the first dot, as WebDataset has it.
WEBDATASET_KEY = re.compile(r"((?:.*/)?[^./]+)\.[^/]*")
SUFFIX = re.compile(r"\.\w{1,10}$")  # of a medium; names of members have at most 100 characters
MEMBERS = "members.npy"
SAMPLES = "samples.npy"


# ----------------------------------------------------------------------------------------------
# writing


def pack(data: Path, out: Path, shard_bytes: int = SHARD_BYTES) -> int:
    """Write a JSONL file or a folder of recordings, with all media, as shards -> number of samples.

    The folder is written completely or not at all. Raises UserError for an existing folder, and for
    a row or a medium that cannot be read, naming the row.
    """
    with writing(out):
        if out.exists():
            raise UserError(f"{shorten(out, 200)}: exists; give the name of a new folder")
        fresh = sibling_path(out, "part")
        fresh.mkdir(parents=True)
    try:
        with writing(out):
            count = write_shards(rows_of(data), data, fresh, shard_bytes)
            write_index(fresh)
            fresh.rename(out)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return count


def rows_of(data: Path) -> Iterator[Any]:
    """The rows of a JSONL file or a folder in a known layout; lines of a file as they are."""
    if jsonl.is_folder(data):
        yield from jsonl.layout(data)
        return
    with open_regular(data, "the data") as file:
        if not jsonl.has_row_per_line(file):
            raise UserError(
                f"{shorten(data, 200)}: is not one JSON object a line in UTF-8; write it as JSONL"
            )
        file.seek(0)
        while line := file.readline(jsonl.MAX_LINE_BYTES):
            if line.strip():
                yield line


def write_shards(rows: Iterator[Any], data: Path, folder: Path, shard_bytes: int) -> int:
    """Write rows into numbered tar files of about shard_bytes -> number of samples."""
    folder_of_media = data if data.is_dir() else data.parent
    tar = None
    count = 0
    shard = 0
    try:
        for count, row in enumerate(tqdm(rows, "packing", leave=False, disable=None), 1):
            members = members_of(row, f"{count - 1:09}", folder_of_media.resolve(), count)
            if tar is None or tar.offset >= shard_bytes:
                if tar is not None:
                    tar.close()
                tar = tarfile.TarFile(folder / f"{shard:05}.tar", "w", format=tarfile.USTAR_FORMAT)
                shard += 1
            for name, content in members.items():
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    finally:
        if tar is not None:
            tar.close()
    if not count:
        raise UserError(f"{shorten(data, 200)}: holds no row")
    return count


def members_of(row: Any, key: str, folder: Path, number: int) -> dict[str, bytes]:
    """The members of a row by name: its media, and the row with their names instead of paths."""
    members: dict[str, bytes] = {}

    def add(path: str) -> str:
        if DATA_URI.match(path) or (WEB_ADDRESS.match(path) and not FILE_URI.match(path)):
            return path
        suffix = SUFFIX.search(path)
        name = f"{key}.{len(members)}{suffix[0].lower() if suffix else ''}"
        with open_source(path, shorten(path, 120)) as file:
            members[name] = file.read()
        return name

    try:
        if isinstance(row, bytes):
            row = json.loads(row)
        row = normalize_row(row, folder)
        for message in row["messages"]:
            if isinstance(message["content"], list):
                message["content"] = [map_paths(item, add) for item in message["content"]]
        if "speech" in row:
            row["speech"] = add(row["speech"])
    except UserError as error:
        raise UserError(f"row {number}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"row {number}: is not JSON ({shorten(error, 100)})") from None
    return {f"{key}.json": json.dumps(row).encode(), **members}


def map_paths(item: Any, change: Callable[[str], Any]) -> Any:
    """A content item with changed paths, under whichever key, in dictionaries and lists too."""
    if isinstance(item, str):
        return change(item)
    if isinstance(item, list):
        return [map_paths(entry, change) for entry in item]
    if isinstance(item, dict):
        return {
            key: map_paths(value, change) if key in PATH_KEYS else value
            for key, value in item.items()
        }
    return item


def write_index(folder: Path) -> None:
    """Write members.npy and samples.npy for the tar files of a folder. In memory are 32 bytes for
    each member. Raises UserError for a damaged tar file.
    """
    members = array("q")
    samples = array("q")
    for shard, path in enumerate(shard_files(folder)):
        last_key = None
        for name, offset, content in members_of_tar(path):
            match = WEBDATASET_KEY.fullmatch(name)
            if match is None:
                continue
            if match[1] != last_key:
                samples.append(len(members) // 4)
            last_key = match[1]
            members.extend((shard, offset, len(content), zlib.crc32(content)))
    samples.append(len(members) // 4)
    arrays = {MEMBERS: np.asarray(members).reshape(-1, 4), SAMPLES: np.asarray(samples)}
    for name, values in arrays.items():
        write_atomically(folder / name, partial(np.save, arr=values))


def members_of_tar(path: Path) -> Iterator[tuple[str, int, bytes]]:
    """Name, offset and content of each file in a tar file. Raises UserError for a damaged one."""
    try:
        with tarfile.open(path, "r:") as tar:  # without compression, in which one cannot seek
            for entry in tar:
                file = tar.extractfile(entry) if entry.isreg() else None
                if file is not None:
                    yield entry.name, entry.offset_data, file.read()
                tar.members = []  # type: ignore[attr-defined]  # tarfile would keep all of them

            # tarfile takes a damaged header for the end, which is a block of zeros.
            with open(path, "rb") as whole:
                whole.seek(tar.offset)
                if whole.read(tarfile.BLOCKSIZE).strip(b"\0"):
                    raise tarfile.ReadError(f"the header at byte {tar.offset} is damaged")
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(
            f"{shorten(path, 200)}: is damaged or no tar file ({shorten(error, 100)})"
        ) from None


def holds_samples(path: Path) -> bool:
    """Whether a tar file has a member that belongs to a sample. Raises UserError for a damaged
    file.
    """
    return any(WEBDATASET_KEY.fullmatch(name) for name, _, _ in members_of_tar(path))


def shard_files(folder: Path) -> list[Path]:
    """The tar files of a folder in order."""
    return sorted(folder.glob("*.tar"))


# ----------------------------------------------------------------------------------------------
# reading


class ShardRows(jsonl.JsonlRows):
    """The rows of a folder of shards, read from disk one by one. In memory are 8 bytes per row."""

    def __init__(self, folder: Path, system_prompt: str):
        super().__init__(folder, system_prompt, Path())
        self.shards = shard_files(folder)
        self.skipped: list[str] = []  # damaged samples that were left out
        try:
            self.members = np.load(folder / MEMBERS, mmap_mode="r")
            self.samples = np.load(folder / SAMPLES, mmap_mode="r")
            self.check_index()
        except (OSError, ValueError) as error:
            raise UserError(
                f"{self.label}: its index cannot be used ({shorten(error, 100)}); "
                f"delete {MEMBERS}, and it is made again"
            ) from None

    def check_index(self) -> None:
        """Raises ValueError unless the index can be that of these shards."""
        members, samples = self.members, self.samples
        if members.dtype != np.int64 or members.shape[1:] != (4,):
            raise ValueError(f"{MEMBERS} has no four columns of integers")
        is_list = samples.dtype == np.int64 and samples.ndim == 1 and len(samples) > 0
        if not is_list or samples[-1] != len(members):
            raise ValueError(f"{SAMPLES} belongs to another {MEMBERS}")
        shards = int(members[:, 0].max(initial=-1)) + 1
        others = self.shards[shards:]  # a writer may leave its last tar file empty
        if shards > len(self.shards) or any(map(holds_samples, others)):
            raise ValueError(f"it is of {shards} tar files, and the folder has {len(self.shards)}")

    def __getitem__(self, i: int) -> jsonl.JsonlRow:
        return self.read(self.starts[i])

    def read(self, sample: int) -> jsonl.JsonlRow:
        """The row of a sample, with the bytes of its media. Raises UserError naming a damaged
        member.
        """
        first, end = self.samples[sample : sample + 2]
        members = dict(self.member(index) for index in range(first, end))
        texts = [content for name, content in members.items() if name.endswith(".json")]
        if len(texts) != 1:
            raise UserError(f"holds {len(texts)} members that end in .json; expected one")
        row = jsonl.parse(texts[0], self.folder, self.system_prompt)

        def content_of(path: str) -> Any:
            return {"bytes": members[path], "path": path} if path in members else path

        for message in row.question:
            if isinstance(message["content"], list):
                message["content"] = [map_paths(item, content_of) for item in message["content"]]
        if row.speech:
            row.speech = content_of(row.speech)
        return row

    def member(self, index: int) -> tuple[str, bytes]:
        """Name and content of a member. Raises UserError for a damaged one, naming it."""
        shard, offset, size, crc = self.members[index].tolist()
        path = self.shards[shard]
        with open_regular(path, "a tar file") as file:
            file.seek(offset - tarfile.BLOCKSIZE)
            header = file.read(tarfile.BLOCKSIZE)
            content = file.read(size)
        try:
            name = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").name
        except tarfile.HeaderError:
            raise UserError(f"{path.name}: the member at byte {offset} is damaged") from None
        if len(content) != size or zlib.crc32(content) != crc:
            raise UserError(f"{path.name}: member {name} is damaged")
        return name, content


def read_shards(folder: Path, run: Path, omni: "Omni", skip_corrupt: bool = False) -> ShardRows:
    """A folder of shards -> its rows, all of which are checked as those of a JSONL file are.

    A missing index is made. Raises one UserError that names the first bad samples; with
    skip_corrupt they are left out and listed in `skipped`.
    """
    if not (folder / MEMBERS).exists() or not (folder / SAMPLES).exists():
        write_index(folder)
    rows = ShardRows(folder, omni.config.media.system_prompt)
    assert omni.tokenizer is not None  # load() sets it
    processor = Processor(omni.config, omni.tokenizer)
    damaged: list[str] = []
    for sample in tqdm(range(len(rows.samples) - 1), "checking", leave=False, disable=None):
        label = f"sample {sample}"
        read = partial(rows.read, sample)
        error = jsonl.add_row(rows, read, sample, processor, omni, label)
        if error is None:
            first, end = rows.samples[sample : sample + 2]
            rows.digest.update(rows.members[first:end].tobytes())
            continue
        damaged.append(f"{label}: {error}")
        if len(damaged) >= jsonl.MAX_ERRORS and not skip_corrupt:
            break

    if skip_corrupt:
        rows.skipped = damaged
    errors = damaged if damaged and not skip_corrupt else jsonl.voice_errors(rows, omni)
    if errors:
        raise UserError(jsonl.bad_rows_message(rows.label, errors, run, "sample"))
    if not len(rows):
        raise UserError(f"{rows.label}: holds no sample that can be read")
    return rows
