"""What a run leaves on disk: config.json, log.jsonl, samples/<stage>/<step>.*, checkpoints. A full disk spoils nothing.

    <stage>.resume.pt       parameters, optimizers and step of a stage that is not finished
    <stage>.safetensors     what a finished stage learnt
"""

import json
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from ..config import OmniConfig
from ..config_json import read_config, write_config
from ..errors import UserError
from ..files import write_atomically


@contextmanager
def room_for(what: Path):
    """Turn a disk that is full, or will not be written, into one clear line."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch.save hides a full disk behind a RuntimeError
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise UserError(
            f"{what}: cannot be written ({cause.strerror or cause}); make room and go on with --resume, the last "
            f"checkpoint is whole"
        ) from None


def claim(folder: Path, config: OmniConfig) -> None:
    """Write the sizes of the model into a new run folder. Raises UserError where a run of other sizes lies in it."""
    if (folder / "config.json").exists():
        if read_config(folder) != config:
            raise UserError(f"{folder} holds a run of other sizes; --fresh throws it away, --home works elsewhere")
        return
    with room_for(folder / "config.json"):
        write_config(config, folder)


def log(folder: Path, entry: dict) -> None:
    """Append one line to log.jsonl; a line that a full disk has cut is left behind as a line of its own."""
    path = folder / "log.jsonl"
    with room_for(path):
        folder.mkdir(parents=True, exist_ok=True)
        with open(path, "ab+") as file:
            cut = file.seek(0, 2) and file.seek(-1, 2) is not None and file.read(1) != b"\n"
            file.write(b"\n" * cut + json.dumps(entry).encode() + b"\n")


def keep(folder: Path, name: str, step: int, means: dict, unlocked: dict[str, Tensor], optimizers: list) -> None:
    """Write all that a stage needs to go on."""
    parameters = {n: p.detach() for n, p in unlocked.items()}
    states = [optimizer.state_dict() for optimizer in optimizers]
    state = {"step": step, "means": means, "parameters": parameters, "optimizers": states}
    path = folder / f"{name}.resume.pt"
    with room_for(path):
        write_atomically(path, lambda f: torch.save(state, f))


def restore(folder: Path, name: str, unlocked: dict[str, Tensor], optimizers: list) -> tuple[int, dict]:
    """Go back to where a stage was kept -> (step, mean losses), (0, {}) where it was not.

    Raises UserError for the checkpoint of another model.
    """
    path = folder / f"{name}.resume.pt"
    if not path.exists():
        return 0, {}
    state = torch.load(path, map_location="cpu", weights_only=True)
    if {n: p.shape for n, p in state["parameters"].items()} != {n: p.shape for n, p in unlocked.items()}:
        raise UserError(f"{path} belongs to another model; --stage {name} --fresh starts this stage over")
    for key, parameter in unlocked.items():
        parameter.data.copy_(state["parameters"][key])
    for optimizer, kept in zip(optimizers, state["optimizers"]):
        optimizer.load_state_dict(kept)
    return state["step"], state["means"]


def finish(folder: Path, name: str, learnt: dict[str, Tensor]) -> None:
    """Write what a stage learnt and clear away what it needed on its way, halves that a kill left behind too."""
    tensors = {n: p.detach().cpu().contiguous() for n, p in learnt.items()}
    path = folder / f"{name}.safetensors"
    with room_for(path):
        write_atomically(path, lambda f: f.write(save(tensors)))
    for left in (folder / f"{name}.resume.pt", *folder.glob(f"{name}.*.part")):
        left.unlink(missing_ok=True)


def forget(folder: Path, name: str) -> None:
    """Throw away what one stage has left, so that it starts over."""
    for left in (folder / f"{name}.resume.pt", folder / f"{name}.safetensors"):
        left.unlink(missing_ok=True)


def graduate(omni: nn.Module, folder: Path, stages: list[str]) -> None:
    """Give a model what the named finished stages learnt, in their order. Raises UserError for one that is missing."""
    parameters = dict(omni.named_parameters())
    for name in stages:
        path = folder / f"{name}.safetensors"
        if not path.exists():
            raise UserError(f"{path} is missing: run stage {name} first")
        for key, value in load_file(path).items():
            parameters[key].data.copy_(value)
