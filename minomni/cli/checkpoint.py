"""The commands merge, make-checkpoint and check."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from minomni import load
from minomni.cli.options import add_seed, number_between
from minomni.errors import UserError, escape
from minomni.files import require_possible

if TYPE_CHECKING:
    from minomni.cli.options import Parser


def add_merge(commands: "argparse._SubParsersAction[Parser]") -> None:
    merge = commands.add_parser(
        "merge",
        help="add a LoRA adapter to its model",
        description="Writes a model folder without adapters, which every command takes.",
    )
    merge.add_argument("model", help="a size trained here, or the folder of a model")
    merge.add_argument("adapter", type=Path, help="the folder of an adapter, ours or peft's")
    merge.add_argument("out", type=Path, help="the folder to write")


def add_make_checkpoint(commands: "argparse._SubParsersAction[Parser]") -> None:
    make = commands.add_parser(
        "make-checkpoint",
        help="write a folder like the release's, with random weights",
        description="Writes the files, tensors, names, shapes and precisions of the release, "
        "filled with random numbers: 22.4 GB for the 7B.",
    )
    make.add_argument("size", choices=["qwen7b"], help="qwen7b, the release's 7B")
    make.add_argument("folder", type=Path, help="folder to write, which must not exist")
    make.add_argument(
        "--width-factor",
        type=number_between(0.125, 1),
        default=1.0,
        metavar="F",
        help="multiply all widths, from 0.125 to 1; layers, heads and vocabulary stay (default 1)",
    )
    add_seed(make)


def add_check(commands: "argparse._SubParsersAction[Parser]") -> None:
    check = commands.add_parser(
        "check",
        help="say what a model folder is, and whether it is complete",
        description="Reads settings and the headers of the tensor files, and prints what the "
        "folder is, everything that is wrong with it, and the memory that it needs.",
    )
    check.add_argument("folder", type=Path, help="folder of a model")


def run_merge(arguments: argparse.Namespace) -> None:
    """Write a model with an adapter added to its weights."""
    from minomni.checkpoint import saving
    from minomni.checkpoint.lora import load_lora, merge_lora

    require_possible(arguments.out)
    omni = load(arguments.model)
    saving.check_save(omni, arguments.out)
    load_lora(omni, arguments.adapter)
    merge_lora(omni)
    saving.save(omni, arguments.out)
    out = escape(str(arguments.out))
    print(f"merged: {out}; python -m minomni chat --model {out}")


def run_make_checkpoint(arguments: argparse.Namespace) -> None:
    """Write a checkpoint with random weights."""
    from minomni.checkpoint.random_checkpoint import checkpoint_config, make_checkpoint

    config = checkpoint_config(arguments.size, arguments.width_factor)
    make_checkpoint(config, arguments.folder, arguments.seed)
    folder = escape(str(arguments.folder))
    print(f"random weights: {folder}; python -m minomni check {folder}")


def run_check(arguments: argparse.Namespace) -> None:
    """Print what a folder is. Raises UserError where something of it is wrong."""
    from minomni.checkpoint.check_folder import check_folder

    report = check_folder(arguments.folder)
    print(report.text())
    if report.errors:
        sys.stdout.flush()
        count = len(report.errors)
        what = "1 problem" if count == 1 else f"{count} problems"
        raise UserError(f"{arguments.folder}: {what}, listed above under WRONG")
