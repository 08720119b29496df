"""What a run leaves on disk: config.json, log.jsonl, samples/<stage>/<step>.*, checkpoints. A full
disk spoils nothing.

<stage>.resume.pt       parameters, optimizers and step of a stage that is not finished
<stage>.safetensors     what a finished stage learnt
"""

import json
import os
import shutil
import warnings
import zipfile
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from minomni.checkpoint.hf_config import read_config, write_config
from minomni.config import OmniConfig
from minomni.errors import UserError, shorten
from minomni.files import WriteError, open_regular, write_atomically, writing

RUN_FILES = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "log.jsonl",
    "seconds.json",
    "samples",
    "*.safetensors",
    "*.resume.pt",
    "*.part",
)  # all that the folder of a run holds


@contextmanager
def disk_errors(what: Path):
    """Add to the one line about a file that cannot be written how to go on."""
    try:
        with writing(what):
            yield
    except WriteError as error:
        raise UserError(
            f"{error}; make room and go on with --resume, the last checkpoint is whole"
        ) from None


def make_home(folder: Path) -> None:
    """Make the folder of a run, before any work begins.

    Raises UserError where that cannot be: a file, below a file, a name that is too long, a folder
    that may not be written to.
    """
    probe = folder / f"{os.getpid()}.part"
    try:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            probe.touch()
            probe.unlink()
    except WriteError as error:
        raise UserError(f"{error}; --home and --out take a folder that can be written to") from None


def clear_home(folder: Path) -> None:
    """Empty the folder of an earlier run; the folder itself, or a link to it, stays.

    Raises UserError where it holds anything that a run does not write.
    """
    if not folder.exists():
        return
    with writing(folder):
        foreign = [
            entry.name
            for entry in folder.iterdir()
            if not any(entry.match(known) for known in RUN_FILES)
        ]
        if foreign:
            raise UserError(
                f"{shorten(folder, 200)}: holds {shorten(min(foreign), 80)!r}, which --fresh would delete "
                f"although no run wrote it; move it, or work elsewhere"
            )
        for entry in list(folder.iterdir()):
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()


def check_run_config(folder: Path, config: OmniConfig) -> None:
    """Write the sizes of the model into a new run folder. Raises UserError where a run of other
    sizes lies in it.
    """
    if (folder / "config.json").exists():
        if read_config(folder) != config:
            raise UserError(
                f"{folder} holds a run of other sizes; --fresh throws it away, --home works elsewhere"
            )
        return
    with disk_errors(folder / "config.json"):
        write_config(config, folder)


def log(folder: Path, entry: dict) -> None:
    """Append one line to log.jsonl; a line that a full disk has cut is left behind as a line of its
    own.
    """
    path = folder / "log.jsonl"
    with disk_errors(path):
        folder.mkdir(parents=True, exist_ok=True)
        with open(path, "ab+") as file:
            cut = file.seek(0, 2) and file.seek(-1, 2) is not None and file.read(1) != b"\n"
            file.write(b"\n" * cut + json.dumps(entry).encode() + b"\n")


def save_checkpoint(
    folder: Path, name: str, step: int, means: dict, unlocked: dict[str, Tensor], optimizers: list
) -> None:
    """Write all that a stage needs to go on."""
    parameters = {n: p.detach() for n, p in unlocked.items()}
    states = [optimizer.state_dict() for optimizer in optimizers]
    state = {"step": step, "means": means, "parameters": parameters, "optimizers": states}
    path = folder / f"{name}.resume.pt"
    with disk_errors(path):
        write_atomically(path, lambda f: torch.save(state, f))


def load_checkpoint(
    folder: Path, name: str, unlocked: dict[str, Tensor], optimizers: list
) -> tuple[int, dict]:
    """Go back to where a stage was kept -> (step, mean losses), (0, {}) where it was not.

    All of the file is checked before anything is changed. Raises UserError for a damaged file, and
    for the checkpoint of another model.
    """
    path = folder / f"{name}.resume.pt"
    if not path.exists():
        return 0, {}
    state, start_over = read_checked(path), f"--stage {name} --fresh starts this stage over"
    if not is_state(state):
        raise UserError(f"{path}: is not what a stage keeps of itself; {start_over}")
    if {n: p.shape for n, p in state["parameters"].items()} != {
        n: p.shape for n, p in unlocked.items()
    }:
        raise UserError(f"{path} belongs to another model; {start_over}")
    if not all(map(matches_optimizer, state["optimizers"], optimizers)) or len(
        state["optimizers"]
    ) != len(optimizers):
        raise UserError(f"{path} was kept by other optimizers; {start_over}")
    for key, parameter in unlocked.items():
        parameter.data.copy_(state["parameters"][key])
    for optimizer, kept in zip(optimizers, state["optimizers"]):
        optimizer.load_state_dict(kept)
    return state["step"], state["means"]


def read_checked(path: Path):
    """What torch.save wrote to a file, read as data: code is refused. Raises UserError for any
    damage.

    torch does not compare the checksums that it writes; zipfile does, so that a flipped bit is not
    learnt from.
    """
    try:
        with open_regular(path, "a checkpoint") as file, zipfile.ZipFile(file) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
            if unpacked > path.stat().st_size:  # torch stores without compression
                raise ValueError("its parts are larger than the file")
            if broken := archive.testzip():
                raise ValueError(f"{broken} was changed")
        with warnings.catch_warnings(action="ignore"):
            return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # what a broken or hostile file raises can be any exception
        reason = shorten((str(error).splitlines() or [""])[0], 120)
        raise UserError(
            f"{shorten(path, 200)}: is damaged or was not written by a training ({type(error).__name__}: "
            f"{reason}); delete it, and what it held is made again"
        ) from None


def is_state(state) -> bool:
    """Whether this is what save_checkpoint() writes, for whatever model."""
    keys = {"step": int, "means": dict, "parameters": dict, "optimizers": list}
    if not isinstance(state, dict) or not all(
        type(state.get(key)) is kind for key, kind in keys.items()
    ):
        return False
    means = all(
        isinstance(name, str) and type(mean) is float for name, mean in state["means"].items()
    )
    return (
        means
        and state["step"] >= 0
        and all(isinstance(p, Tensor) for p in state["parameters"].values())
    )


def matches_optimizer(kept, optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer can go on from a kept state: the same groups, and for each parameter
    tensors of its shape.
    """
    fresh = optimizer.state_dict()["param_groups"]
    if not isinstance(kept, dict) or not isinstance(kept.get("state"), dict):
        return False
    groups, rows = kept.get("param_groups"), kept["state"]
    if not isinstance(groups, list) or len(groups) != len(fresh):
        return False
    for old, new in zip(groups, fresh):
        if not isinstance(old, dict) or old.get("params") != new["params"]:
            return False
        if any(type(old.get(key)) is not type(value) for key, value in new.items()):
            return False
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for i, row in rows.items():
        if type(i) is not int or not 0 <= i < len(parameters) or not isinstance(row, dict):
            return False
        for value in row.values():
            if not isinstance(value, Tensor) or value.shape not in ((), parameters[i].shape):
                return False
    return True


def save_stage(folder: Path, name: str, learnt: dict[str, Tensor]) -> None:
    """Write what a stage learnt and clear away what it needed on its way, halves that a kill left
    behind too.
    """
    tensors = {n: p.detach().cpu().contiguous() for n, p in learnt.items()}
    path = folder / f"{name}.safetensors"
    with disk_errors(path):
        write_atomically(path, lambda f: f.write(save(tensors)))
    for left in (folder / f"{name}.resume.pt", *folder.glob(f"{name}.*.part")):
        left.unlink(missing_ok=True)


def delete_stage(folder: Path, name: str) -> None:
    """Throw away what one stage has left, so that it starts over."""
    for left in (folder / f"{name}.resume.pt", folder / f"{name}.safetensors"):
        left.unlink(missing_ok=True)


def load_stages(omni: nn.Module, folder: Path, stages: list[str]) -> None:
    """Give a model what the named finished stages learnt, in their order.

    Raises UserError for one that is missing or damaged, or belongs to another model.
    """
    parameters = dict(omni.named_parameters())
    for name in stages:
        path = folder / f"{name}.safetensors"
        if not path.exists():
            raise UserError(f"{path} is missing: run stage {name} first")
        learnt = read_tensors(path)
        strange = [
            key
            for key, value in learnt.items()
            if key not in parameters or parameters[key].shape != value.shape
        ]
        if strange:
            raise UserError(
                f"{path} belongs to another model, first {min(strange)!r}; --stage {name} --fresh makes it "
                f"again"
            )
        for key, value in learnt.items():
            parameters[key].data.copy_(value)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name. Raises UserError for a damaged one."""
    open_regular(path, "what a stage learnt").close()
    try:
        return load_file(path)
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{shorten(path, 200)}: cut short or no safetensors file ({shorten(error, 120)}); delete it, "
            f"and run its stage again"
        ) from None
