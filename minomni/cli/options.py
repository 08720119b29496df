"""What several commands share: the parser, types of options, common options and their checks."""

import argparse
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from minomni import load
from minomni.errors import UserError, quote

if TYPE_CHECKING:
    from minomni.omni import Omni

DEVICES = ("auto", "cpu", "cuda", "mps")
# Names of options, without --, -> the message where one of them is given.
Conflicts = dict[tuple[str, ...], str]


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, like all others."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def whole_number(lowest: int, below: int) -> Callable[[str], int]:
    """A type for options: whole numbers from lowest up to, not including, below."""

    def convert(text: str) -> int:
        # Python converts no more than 4,300 digits.
        if not text.isdecimal() or len(text) > 100 or not lowest <= int(text) < below:
            raise argparse.ArgumentTypeError(
                f"{quote(text)} is not a whole number from {lowest} to {below - 1}"
            )
        return int(text)

    return convert


def number_between(low: float, high: float) -> Callable[[str], float]:
    """A type for options: numbers from low to high, both included."""

    def convert(text: str) -> float:
        with suppress(ValueError):
            if low <= float(text) <= high:
                return float(text)
        raise argparse.ArgumentTypeError(f"{quote(text)} is not a number from {low:g} to {high:g}")

    return convert


SEED = whole_number(0, 2**63)
COUNT = whole_number(1, 100_000)


def is_given(arguments: argparse.Namespace, option: str) -> bool:
    """Whether the command line gives an option that has no default, such as "held-out"."""
    return getattr(arguments, option.replace("-", "_")) not in (None, False, [])


def refuse(arguments: argparse.Namespace, conflicts: Conflicts) -> None:
    """Raises UserError where an option is given that does not go with the others."""
    for options, message in conflicts.items():
        if any(is_given(arguments, option) for option in options):
            raise UserError(message)


def add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--model",
        default="tiny",
        help="a size trained here, or the folder of a checkpoint (default tiny)",
    )


def add_quantize(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--quantize",
        metavar="BITS",
        help="int8 or int4: keep the linear layers of Thinker and Talker in so many bits; "
        "int4+head+encoders also quantizes those, to int8 (default: as stored; needs torchao)",
    )


def add_parts(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--parts",
        metavar="PARTS",
        help="text: load the text decoder alone; +audio, +vision and +speech add the encoders and "
        "speech, as in text+audio (default: all)",
    )
    command.add_argument(
        "--encoders-on-host",
        action="store_true",
        help="keep the encoders in the host's memory and copy them to the device when they run",
    )
    command.add_argument(
        "--dit-dtype",
        choices=["fp32", "bf16"],
        help="of the DiT of Token2Wav; bf16 halves its memory on a GPU (default fp32)",
    )


def add_cuda(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--cuda-graphs",
        action="store_true",
        help="with --device cuda: replay decoding steps and chunks of speech as CUDA graphs",
    )
    command.add_argument(
        "--tf32",
        action="store_true",
        help="with --device cuda: let Token2Wav round the factors of its products to TF32",
    )


def add_device(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--device", default="cpu", choices=DEVICES, help="device to compute on (default cpu)"
    )


def add_seed(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--seed", type=SEED, default=0, help="seed of everything random (default 0)"
    )


def add_run(command: argparse.ArgumentParser, home: str, fresh: str = "") -> None:
    """Where a run works, and how it begins. home: its default folder; fresh: more about --fresh."""
    command.add_argument(
        "--resume",
        action="store_true",
        help="continue an unfinished run exactly where it stopped",
    )
    command.add_argument(
        "--fresh",
        action="store_true",
        help=f"delete an earlier run and start over{fresh}",
    )
    command.add_argument(
        "--device",
        default="auto",
        choices=DEVICES,
        help="device to compute on (default auto: cuda, else mps, else cpu)",
    )
    add_seed(command)
    command.add_argument(
        "--home",
        type=Path,
        help=f"folder of the run, which holds all that it writes (default {home})",
    )


def load_parts(arguments: argparse.Namespace) -> "Omni":
    """The model of the command line with the parts and the speed that it names.

    Raises UserError for options of CUDA on another device.
    """
    check_cuda(arguments)
    omni = load(
        arguments.model,
        arguments.device,
        quantize=arguments.quantize,
        parts=arguments.parts,
        encoders_on_host=arguments.encoders_on_host,
        dit_dtype=arguments.dit_dtype,
    )
    if omni.token2wav is not None:
        omni.token2wav.tf32 = arguments.tf32
    if arguments.cuda_graphs:
        omni.use_static_steps()
    return omni


def check_cuda(arguments: argparse.Namespace) -> None:
    """Raises UserError for options of CUDA on another device."""
    from minomni.devices import device_of

    for option, on in (("--cuda-graphs", arguments.cuda_graphs), ("--tf32", arguments.tf32)):
        if on and device_of(arguments.device).type != "cuda":
            raise UserError(f"{option} needs a GPU; give --device cuda, or leave {option} out")
