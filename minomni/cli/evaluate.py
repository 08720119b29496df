"""The commands report and ablate."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from minomni import paths
from minomni.cli.options import COUNT, add_device, add_model, add_quantize, add_seed

if TYPE_CHECKING:
    from minomni.cli.options import Parser


def add_report(commands: "argparse._SubParsersAction[Parser]") -> None:
    report = commands.add_parser(
        "report",
        help="evaluate a model on held-out items, its speech with an independent recognizer",
        description="Prints a table of metrics with 95 % confidence intervals.",
    )
    add_model(report)
    add_quantize(report)
    report.add_argument("--json", action="store_true", help="print one JSON object of fractions")
    report.add_argument("--items", type=COUNT, default=100, help="items per metric (default 100)")
    add_device(report)


def add_ablate(commands: "argparse._SubParsersAction[Parser]") -> None:
    ablate = commands.add_parser(
        "ablate", help="measure what a stage contributes", description="Prints a table."
    )
    ablate.add_argument(
        "what",
        choices=["beta", "dpo", "stage3", "tmrope", "tuning"],
        help="beta: DPO with several values of beta; dpo: speech before and after DPO; stage3: "
        "long inputs before and after pre-training stage 3; tmrope: the Thinker trained again "
        "without absolute time; tuning: speech after fine-tuning the Thinker alone, and its repair",
    )
    ablate.add_argument(
        "--home",
        type=Path,
        default=paths.runs() / "tiny",
        help="folder of a finished run (default runs/tiny)",
    )
    ablate.add_argument(
        "--items", type=COUNT, default=100, help="sentences per row of the table (default 100)"
    )
    add_seed(ablate)


def run_report(arguments: argparse.Namespace) -> None:
    """Evaluate a model and print the metrics."""
    import torch

    from minomni.eval import report

    torch.set_num_threads(1)  # short replies one by one gain nothing from a second thread
    card = report.measure(
        arguments.model,
        arguments.items,
        arguments.device,
        arguments.quantize,
    )
    print(json.dumps(card.fractions()) if arguments.json else card.markdown())


def run_ablate(arguments: argparse.Namespace) -> None:
    """Run an ablation and print its table."""
    import torch

    from minomni.eval.ablations import ablate

    torch.set_num_threads(1)
    print(ablate(arguments.what, arguments.home, arguments.items, arguments.seed))
