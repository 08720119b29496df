"""The report card: what share of held-out items is right, and how much of the speech an outsider
understands.
"""

import json
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from minomni import folder_of, load, paths
from minomni.data import grammar
from minomni.eval.evaluator import ANSWERS, Evaluator
from minomni.eval.spoken_digits import check_recordings, leave_one_out
from minomni.eval.stats import Metric, bootstrap
from minomni.files import write_atomically
from minomni.train.pipeline import TRAINED, commit

MROPE = "sync_mrope.json"  # in the run folder: what `ablate tmrope` measured


@dataclass
class Report:
    """All rows of one measurement."""

    model: str
    rows: list[Metric]
    seconds: float  # that measuring took
    train_seconds: float | None = None  # that training took, where the model's folder says so
    device: str = "cpu"  # where it was measured

    def fractions(self) -> dict[str, float | None]:
        """Row values by name, as fractions."""
        rows = {row.name: None if row.value is None else round(row.value, 4) for row in self.rows}
        return {**rows, "train_seconds": self.train_seconds}

    def markdown(self) -> str:
        """The card as a Markdown table."""
        lines = [f"| {self.model} | value | 95 % interval | items |", "|---|---|---|---|"]
        for row in self.rows:
            if row.value is None:
                lines.append(f"| {row.name} | not measurable here | | |")
            else:
                low, high = row.interval()
                lines.append(
                    f"| {row.name} | {row.value:.1%} | {low:.1%} to {high:.1%} | {row.n} |"
                )
        trained = "" if self.train_seconds is None else f"trained in {self.train_seconds:.0f} s; "
        return (
            "\n".join(lines)
            + f"\n\n{trained}measured in {self.seconds:.0f} s on {hardware(self.device)}, commit {commit()}"
        )


def hardware(device: str = "cpu") -> str:
    """The machine in a few words, with its GPU where that did the work."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = f"one {torch.cuda.get_device_name()} and " if device == "cuda" else ""
    return f"{gpu}{cores} cores ({platform.system()}, {platform.machine()})"


def measure(
    model: str, items: int = 100, digits: Path | None = None, device: str = "cpu"
) -> Report:
    """Score a model by name or folder on held-out material, and on a folder of real spoken digits
    where one is given.

    Raises UserError where there is no such model, folder or device.
    """
    began = time.perf_counter()
    folder = folder_of(model)
    if digits is not None:
        check_recordings(digits)  # before an hour is spent on the other rows
    omni = load(model, device)
    examiner = Evaluator(omni, items)
    rows = [examiner.answers(name, kinds) for name, kinds in ANSWERS.items()]
    rows += [
        mrope_metric(folder.parent / MROPE),
        examiner.spoken_over_typed(),
        examiner.hearing("asr_wer", grammar.LISTENING_VOICES),
        examiner.hearing("asr_wer_unseen_voices", grammar.UNSEEN_VOICES),
    ]
    rows.append(spoken_digits_metric(model, digits))
    rows += examiner.speech() + examiner.preference(folder.parent / "stages") + examiner.english()
    trained = folder / TRAINED
    spent = json.loads(trained.read_text(encoding="utf-8"))["seconds"] if trained.exists() else None
    card = Report(model, rows, time.perf_counter() - began, spent, omni.thinker.device.type)
    write_atomically(paths.runs() / "report.md", lambda f: f.write(card.markdown().encode()))
    return card


def mrope_metric(file: Path) -> Metric:
    """What the same model answers about sounds in clips where it was raised without absolute time;
    None if unknown.
    """
    if not file.exists():
        return Metric("sync_accuracy_mrope", None)
    measured = json.loads(file.read_text(encoding="utf-8"))
    return Metric("sync_accuracy_mrope", measured["sync_accuracy_mrope"], measured["items"])


def spoken_digits_metric(model: str, digits: Path | None) -> Metric:
    """Right answers about real spoken digits; the interval draws speakers anew: those of one go
    wrong together.
    """
    if digits is None:
        return Metric("real_digits_accuracy", None)
    speakers = list(leave_one_out(model, digits, paths.runs() / "corpus").values())
    share = lambda rows: sum(right for right, _ in rows) / sum(count for _, count in rows)  # noqa: E731
    return Metric(
        "real_digits_accuracy",
        share(speakers),
        sum(n for _, n in speakers),
        bootstrap(share, speakers),
    )
