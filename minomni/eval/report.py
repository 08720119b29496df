"""The report: accuracy on held-out examples and word error rates of the speech, as one table."""

import os
import platform
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from minomni import folder_of, load, paths
from minomni.checkpoint.hf_config import read_json, write_json
from minomni.checkpoint.saving import PROVENANCE_FILE
from minomni.data import grammar
from minomni.errors import escape
from minomni.eval.evaluator import ANSWERS, Evaluator
from minomni.eval.speech_chain import speech_chain_metrics
from minomni.eval.stats import Metric, markdown_table
from minomni.files import write_atomically
from minomni.train.pipeline import cache_of
from minomni.train.provenance import commit

SILENCE_S = 0.4  # before a recording, as an open microphone has it
MROPE = "sync_mrope.json"  # in the run folder: the result of `ablate tmrope`


@dataclass
class Report:
    """All metrics of one evaluation."""

    model: str
    rows: list[Metric]
    seconds: float  # duration of the evaluation
    train_seconds: float | None = None  # duration of the training, None if unknown
    device: str = "cpu"

    def fractions(self) -> dict[str, float | None]:
        """Metric values by name: fractions and scores; train_seconds in seconds."""
        values: dict[str, float | None] = {}
        for row in self.rows:
            values[row.name] = None if row.value is None else round(row.value, 4)
        values["train_seconds"] = self.train_seconds
        return values

    def json_object(self) -> dict:
        """The report with its intervals, as tests/refresh_readme.py reads it."""
        return {
            "rows": {row.name: row.json_object() for row in self.rows},
            "train_seconds": self.train_seconds,
            "measured_seconds": round(self.seconds),
            "hardware": hardware(self.device),
        }

    def markdown(self) -> str:
        """The report as a Markdown table."""
        header = (self.model, "value", "95 % interval", "items")
        table = markdown_table(header, [row.cells() for row in self.rows])
        footer = f"measured in {self.seconds:.0f} s on {hardware(self.device)}, commit {commit()}"
        if self.train_seconds is not None:
            footer = f"trained in {self.train_seconds:.0f} s; {footer}"
        return f"{table}\n\n{footer}"


def hardware(device: str = "cpu") -> str:
    """Short description of the machine, including the GPU if device is 'cuda'."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    gpu = f"one {torch.cuda.get_device_name()} and " if device == "cuda" else ""
    return f"{gpu}{cores} cores ({platform.system()}, {platform.machine()})"


def measure(
    model: str,
    items: int = 100,
    device: str = "cpu",
    quantize: str | None = None,
) -> Report:
    """Evaluate a model, by name or folder, and write the report to report.md and report.json.

    Both lie in the folder of the model's run, or else in runs/; stderr says where. items: number of
    held-out examples per metric. quantize: as in load(). Raises UserError for an unknown model,
    folder or device, and for a quantization that is not possible.
    """
    start = time.perf_counter()
    folder = folder_of(model)
    omni = load(model, device, quantize=quantize)
    cache = cache_of(home_of_model(folder))
    evaluator = Evaluator(omni, items, cache)
    rows = [evaluator.accuracy(name, kinds) for name, kinds in ANSWERS.items()]
    rows.append(mrope_metric(folder.parent / MROPE))
    rows.append(evaluator.spoken_over_typed())
    known = grammar.LISTENING_VOICES
    rows.append(evaluator.transcription("asr_wer", known))
    rows.append(evaluator.transcription("asr_wer_after_silence", known, silence_s=SILENCE_S))
    rows.append(evaluator.transcription("asr_wer_second_turn", known, second_turn=True))
    rows.append(evaluator.transcription("asr_wer_unseen_voices", grammar.UNSEEN_VOICES))
    unseen_natural = grammar.UNSEEN_NATURAL_VOICES
    rows.append(evaluator.transcription("asr_wer_unseen_natural_voices", unseen_natural))
    rows += evaluator.speech()
    rows += speech_chain_metrics(evaluator)
    rows += evaluator.preference(folder.parent / "stages")
    rows += evaluator.english()

    train_seconds = read_json(folder / PROVENANCE_FILE, optional=True).get("seconds")
    seconds = time.perf_counter() - start
    name = model if quantize is None else f"{model}, {quantize}"
    report = Report(name, rows, seconds, train_seconds, omni.thinker.device.type)
    write_report(report, home_of_model(folder))
    return report


def write_report(report: Report, home: Path) -> None:
    """Write report.md and report.json into a folder, and print the path of the first."""
    markdown = report.markdown().encode()
    write_atomically(home / "report.md", lambda file: file.write(markdown))
    write_json(home / "report.json", report.json_object())
    # Standard output is the report itself.
    print(f"written: {escape(str(home / 'report.md'))}", file=sys.stderr)


def home_of_model(folder: Path) -> Path:
    """The folder of the run that made a model, or runs/ for a model without its run."""
    home = folder.absolute().parent
    return home if (home / "stages").exists() else paths.runs()


def mrope_metric(file: Path) -> Metric:
    """sync_accuracy of the model trained with plain M-RoPE, from the file of `ablate tmrope`.

    The value is None if the file does not exist.
    """
    result = read_json(file, True, "python -m minomni ablate tmrope writes it again")
    return Metric("sync_accuracy_mrope", result.get("sync_accuracy_mrope"), result.get("items", 0))
