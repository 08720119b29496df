"""The folder of a run's stages: configuration, settings, log.jsonl, samples, checkpoints.

<stage>.resume.pt       parameters, optimizers and step of a stage that is not finished
<stage>.safetensors     the trained parameters of a finished stage
samples/<stage>/        what the stage could do at some steps

A full disk or a kill damages no file that was complete before.
"""

import json
import os
import shutil
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from minomni.checkpoint.hf_config import read_config, write_config
from minomni.config import OmniConfig
from minomni.errors import UserError, shorten
from minomni.files import WriteError, open_regular, write_atomically, writing
from minomni.train import distributed

# File name patterns of everything that this folder holds.
RUN_FILES = (
    "config.json",
    "settings.json",
    "split.json",
    "generation_config.json",
    "preprocessor_config.json",
    "log.jsonl",
    "seconds.json",
    "samples",
    "*.safetensors",
    "*.resume.pt",
    "*.part",
)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Add to the error about a file that cannot be written how to continue the run."""
    try:
        with writing(path):
            yield
    except WriteError as error:
        raise UserError(
            f"{error}; make room and continue with --resume, the last checkpoint is complete"
        ) from None


def make_stages_folder(folder: Path) -> None:
    """Make the folder of a run's stages before any work begins.

    Raises UserError where that is impossible: a file of this name, a path below a file, a name that
    is too long, a folder without write permission.
    """
    probe = folder / f"{os.getpid()}.part"
    try:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            probe.touch()
            probe.unlink()
    except WriteError as error:
        raise UserError(f"{error}; --home and --out take a folder that can be written to") from None


def clear_stages_folder(folder: Path) -> None:
    """Empty the stages folder of an earlier run; the folder itself, or a link to it, stays.

    Raises UserError where it holds anything that a run does not write.
    """
    if not folder.exists():
        return
    with writing(folder):
        entries = list(folder.iterdir())
        foreign = [entry.name for entry in entries if not is_run_file(entry)]
        if foreign:
            raise UserError(
                f"{shorten(folder, 200)}: holds {shorten(min(foreign), 80)!r}, which --fresh would "
                f"delete although no run wrote it; move it, or give another --home"
            )
        for entry in entries:
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()


def is_run_file(entry: Path) -> bool:
    """Whether a file or folder has a name that runs write."""
    return any(entry.match(pattern) for pattern in RUN_FILES)


def check_run_config(folder: Path, config: OmniConfig) -> None:
    """Write the model's config into a new run folder. Raises UserError where it holds a run with
    another one.
    """
    path = folder / "config.json"
    if not path.exists():
        with disk_errors(path):
            write_config(config, folder)
    elif read_config(folder) != config:
        raise UserError(
            f"{folder} holds a run of other sizes; --fresh deletes it, --home names another folder"
        )


def log(folder: Path, entry: dict) -> None:
    """Append one line to log.jsonl. A line that a full disk has cut stays a line of its own."""
    path = folder / "log.jsonl"
    line = json.dumps(entry).encode() + b"\n"
    with disk_errors(path):
        folder.mkdir(parents=True, exist_ok=True)
        with open(path, "ab+") as file:
            if ends_in_cut_line(file):
                line = b"\n" + line
            file.write(line)


def ends_in_cut_line(file: BinaryIO) -> bool:
    """Whether a file's last line lacks its line break."""
    length = file.seek(0, os.SEEK_END)
    if length == 0:
        return False
    file.seek(-1, os.SEEK_END)
    return file.read(1) != b"\n"


def save_checkpoint(
    folder: Path,
    name: str,
    step: int,
    means: dict,
    trainable: Mapping[str, Tensor],
    optimizers: list,
) -> None:
    """Write everything that a stage needs to resume, with any number of processes."""
    state = {
        "step": step,
        "means": means,
        "parameters": {key: value.detach() for key, value in trainable.items()},
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
    }
    state = tree_map(distributed.whole, state)
    path = folder / f"{name}.resume.pt"
    if distributed.is_first():
        with disk_errors(path):
            write_atomically(path, lambda f: torch.save(state, f))


def load_checkpoint(
    folder: Path, name: str, trainable: Mapping[str, Tensor], optimizers: list
) -> tuple[int, dict]:
    """Restore the last checkpoint of a stage -> (step, running means of the losses), (0, {}) where
    there is none.

    The whole file is checked before anything changes. Raises UserError for a damaged file and for
    the checkpoint of another model.
    """
    path = folder / f"{name}.resume.pt"
    if not path.exists():
        return 0, {}
    state = read_checked(path)
    start_over = f"--stage {name} --fresh starts this stage over"
    if not is_state(state):
        raise UserError(f"{path}: is not the checkpoint of a stage; {start_over}")

    kept_shapes = {key: parameter.shape for key, parameter in state["parameters"].items()}
    if kept_shapes != {key: parameter.shape for key, parameter in trainable.items()}:
        raise UserError(f"{path} belongs to another model; {start_over}")
    kept_optimizers = state["optimizers"]
    same_count = len(kept_optimizers) == len(optimizers)
    if not same_count or not all(map(matches_optimizer, kept_optimizers, optimizers)):
        raise UserError(f"{path} was written with other optimizers; {start_over}")

    for key, parameter in trainable.items():
        parameter.data.copy_(distributed.part_of(state["parameters"][key], parameter))
    for optimizer, kept in zip(optimizers, kept_optimizers, strict=True):
        optimizer.load_state_dict(parts_of_state(kept, optimizer))
    return state["step"], state["means"]


def parts_of_state(state: dict, optimizer: torch.optim.Optimizer) -> dict:
    """A whole state of an optimizer -> the part of it that this process holds."""
    parameters = parameters_of(optimizer)
    kept = {}
    for index, row in state["state"].items():
        kept[index] = {
            key: distributed.part_of(value, parameters[index]) for key, value in row.items()
        }
    return {**state, "state": kept}


def parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The parameters of all groups, in the order of the optimizer's state."""
    parameters = []
    for group in optimizer.param_groups:
        parameters += group["params"]
    return parameters


def check_unpacked_size(archive: zipfile.ZipFile, path: Path) -> None:
    """Raises ValueError for an archive that would unpack to more than torch.save writes.

    torch.save stores without compression, so all parts together are smaller than the file.
    """
    unpacked = sum(entry.file_size for entry in archive.infolist())
    if unpacked > path.stat().st_size:
        raise ValueError("its parts are larger than the file")


def read_checked(path: Path):
    """What torch.save wrote to a file, read as data without executing code.

    Raises UserError for any damage.

    torch does not compare the checksums that it writes; zipfile does, so a flipped bit is found.
    """
    try:
        with open_regular(path, "a checkpoint") as file, zipfile.ZipFile(file) as archive:
            check_unpacked_size(archive, path)
            if broken := archive.testzip():
                raise ValueError(f"{broken} was changed")
        with warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # a broken or hostile file can raise any exception
        first_line = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"{shorten(path, 200)}: is damaged or was not written by a training "
            f"({type(error).__name__}: {shorten(first_line, 120)}); delete it to repeat its stage"
        ) from None


def is_state(state: Any) -> bool:
    """Whether this is what save_checkpoint() writes, for any model."""
    kinds = {"step": int, "means": dict, "parameters": dict, "optimizers": list}
    if not isinstance(state, dict):
        return False
    if any(type(state.get(key)) is not kind for key, kind in kinds.items()):
        return False
    if state["step"] < 0:
        return False
    for name, mean in state["means"].items():
        if not isinstance(name, str) or type(mean) is not float:
            return False
    return all(isinstance(parameter, Tensor) for parameter in state["parameters"].values())


def matches_optimizer(kept: Any, optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer can continue from a kept state: the same groups, and for each parameter
    tensors of its shape.
    """
    if not isinstance(kept, dict) or not isinstance(kept.get("state"), dict):
        return False
    if not same_groups(kept.get("param_groups"), optimizer.state_dict()["param_groups"]):
        return False

    parameters = parameters_of(optimizer)
    for index, row in kept["state"].items():
        if type(index) is not int or not 0 <= index < len(parameters) or not isinstance(row, dict):
            return False
        shapes = ((), parameters[index].shape)  # of a counter, and of moments
        for value in row.values():
            if not isinstance(value, Tensor) or value.shape not in shapes:
                return False
    return True


def same_groups(kept: Any, fresh: list[dict]) -> bool:
    """Whether two lists of parameter groups have the same parameters, and options of one type."""
    if not isinstance(kept, list) or len(kept) != len(fresh):
        return False
    for old, new in zip(kept, fresh, strict=True):
        if not isinstance(old, dict) or old.get("params") != new["params"]:
            return False
        if any(type(old.get(key)) is not type(value) for key, value in new.items()):
            return False
    return True


def save_stage(folder: Path, name: str, trained: Mapping[str, Tensor]) -> None:
    """Write the trained parameters of a finished stage and delete its checkpoint, with any
    incomplete file that a kill left.
    """
    tensors = {n: p.detach().cpu().contiguous() for n, p in trained.items()}
    path = result_file(folder, name)
    with disk_errors(path):
        write_atomically(path, lambda f: f.write(save(tensors)))
    for left in (folder / f"{name}.resume.pt", *folder.glob(f"{name}.*.part")):
        left.unlink(missing_ok=True)


def delete_stage(folder: Path, name: str) -> None:
    """Delete the checkpoint and the result of one stage, so that it starts over."""
    for path in stage_files(folder, name):
        path.unlink(missing_ok=True)


def has_begun(folder: Path, name: str) -> bool:
    """Whether a stage has a checkpoint or a result in a run folder."""
    return any(path.exists() for path in stage_files(folder, name))


def is_finished(folder: Path, name: str) -> bool:
    """Whether a stage has a result in a run folder."""
    return result_file(folder, name).exists()


def result_file(folder: Path, name: str) -> Path:
    """The trained parameters of a finished stage."""
    return folder / f"{name}.safetensors"


def stage_files(folder: Path, name: str) -> tuple[Path, Path]:
    """The checkpoint of an unfinished stage and the result of a finished one."""
    return folder / f"{name}.resume.pt", result_file(folder, name)


def load_stages(omni: nn.Module, folder: Path, stages: list[str]) -> None:
    """Load the results of the named finished stages into a model, in their order.

    Raises UserError for one that is missing or damaged, or belongs to another model.
    """
    parameters = dict(omni.named_parameters())
    for name in stages:
        path = result_file(folder, name)
        if not path.exists():
            raise UserError(f"{path} is missing: run stage {name} first")
        trained = read_tensors(path)
        for key in sorted(trained):
            if key not in parameters or parameters[key].shape != trained[key].shape:
                raise UserError(
                    f"{path} belongs to another model, first {key!r}; "
                    f"--stage {name} --fresh trains the stage again"
                )
        for key, value in trained.items():
            parameters[key].data.copy_(value)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name. Raises UserError for a damaged one."""
    open_regular(path, "the result of a stage").close()
    try:
        return load_file(path)
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{shorten(path, 200)}: cut short or no safetensors file ({shorten(error, 120)}); "
            f"delete it, and run its stage again"
        ) from None
