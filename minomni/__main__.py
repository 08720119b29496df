"""Command line: python -m minomni COMMAND; see COMMANDS. The commands are in minomni/cli/."""

import os
import sys

from minomni.cli.bench import add_bench, run_bench
from minomni.cli.chat import add_chat, run_chat
from minomni.cli.checkpoint import (
    add_check,
    add_make_checkpoint,
    add_merge,
    run_check,
    run_make_checkpoint,
    run_merge,
)
from minomni.cli.evaluate import add_ablate, add_report, run_ablate, run_report
from minomni.cli.options import Parser
from minomni.cli.serve import add_serve, run_serve
from minomni.cli.train import (
    add_pack,
    add_train,
    add_train_encoder,
    run_pack,
    run_train,
    run_train_encoder,
)
from minomni.errors import UserError


def parser() -> Parser:
    """The whole command line."""
    top = Parser(
        prog="python -m minomni",
        description="A small Qwen2.5-Omni: train it, chat with it, evaluate it.",
    )
    commands = top.add_subparsers(dest="command", required=True)
    for add in (
        add_train,
        add_train_encoder,
        add_pack,
        add_merge,
        add_chat,
        add_serve,
        add_report,
        add_ablate,
        add_bench,
        add_make_checkpoint,
        add_check,
    ):
        add(commands)
    return top


COMMANDS = {
    "train": run_train,
    "train-encoder": run_train_encoder,
    "pack": run_pack,
    "merge": run_merge,
    "chat": run_chat,
    "serve": run_serve,
    "report": run_report,
    "ablate": run_ablate,
    "bench": run_bench,
    "make-checkpoint": run_make_checkpoint,
    "check": run_check,
}


def main() -> int:
    """Run one command. Errors that the user can correct are one line on stderr and exit code 2."""
    # A path may hold bytes, and an answer letters, that the encoding of the output lacks.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        arguments = parser().parse_args()
        COMMANDS[arguments.command](arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has closed the pipe, as `| head` does. Python would report it again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except UserError as error:
        print(f"minomni: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
