"""Every part of a model beside the official code and the limit of the machine, in one run.

The backends take turns, so that other load on the machine affects them equally, and each time is a
median. A limit is measured in the same run: the rate of matrix products for work that is bound by
arithmetic, the bandwidth of a copy for decoding steps, which read all weights once.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from minomni import paths
from minomni.checkpoint.random_checkpoint import checkpoint_config, make_checkpoint
from minomni.errors import UserError, shorten
from minomni.eval.backends import (
    Measurement,
    MinomniBackend,
    Row,
    TransformersBackend,
    Workload,
    require_transformers,
)
from minomni.eval.benchmark_utils import copy_bandwidth, fastest
from minomni.eval.stats import markdown_table

OURS, THEIRS = "minomni", "transformers"
STATIC, COMPILED = "static cache", "static cache, compiled"
BACKENDS = (OURS, THEIRS, STATIC, COMPILED)  # columns of the table
ROWS = {
    Row.LOAD: "load, with the tokenizer, s",
    Row.LOAD_MEMORY: "memory that loading takes, MiB",
    Row.LOG_MEL: "log-mel of the audio, ms",
    Row.IMAGE: "preparation of the image, ms",
    Row.VIDEO: "preparation of the video's frames, ms",
    Row.AUDIO_ENCODER: "audio encoder, ms",
    Row.VISION_ENCODER: "vision encoder, ms",
    Row.PREFILL: "Thinker, prefill and first token, ms",
    Row.THINKER_STEP: "Thinker, a token, ms",
    Row.TALKER_STEP: "Talker, a code, ms",
    Row.TOKEN2WAV: "Token2Wav, whole, ms",
    Row.TOKEN2WAV_STREAMED: "Token2Wav, streamed, ms",
    Row.FIRST_AUDIO: "question to first audio, ms",
    Row.THINKER_TRAINING: "Thinker, forward and backward, ms",
    Row.TALKER_TRAINING: "Talker, forward and backward, ms",
}
UNITS = {Row.LOAD: 1.0, Row.LOAD_MEMORY: 1.0}  # of one second or MiB; all other rows are in ms
PART_S = 300  # seconds after which a part is not measured another time
FP32_ROWS = (Row.TOKEN2WAV, Row.TOKEN2WAV_STREAMED)  # the rest has the dtype of the benchmark

# Loading, each time in a new process. Linux reports the largest memory of a process.
LOAD_PROGRAM = """
import json, sys, time
import torch
from minomni.eval.benchmark_utils import process_bytes
{imports}
before = process_bytes("VmRSS")
start = time.perf_counter()
model = {load}
if sys.argv[2] == "cuda":
    torch.cuda.synchronize()
seconds = time.perf_counter() - start
taken = None if before is None else (process_bytes("VmHWM") - before) / 2**20
print(json.dumps([seconds, taken]))
"""
OUR_PROGRAM = LOAD_PROGRAM.format(
    imports="import minomni, minomni.checkpoint.weights",
    load="minomni.load(sys.argv[1], sys.argv[2])",
)
LOAD_PROGRAMS = {
    OURS: OUR_PROGRAM,
    THEIRS: LOAD_PROGRAM.format(
        imports="from transformers import AutoTokenizer\n"
        "from transformers import Qwen2_5OmniForConditionalGeneration as Model",
        load='(Model.from_pretrained(sys.argv[1], dtype="auto").to(sys.argv[2]), '
        "AutoTokenizer.from_pretrained(sys.argv[1]))",
    ),
}


@dataclass
class Parts:
    """Results of measure(). Times are in seconds."""

    machine: dict[str, Any]
    workload: Workload
    rows: dict[str, dict[str, float]]  # by row and backend; "limit" and "difference" are there too
    notes: list[str] = field(default_factory=list)  # what could not be measured, and why

    def ratio(self, row: str) -> float | None:
        """Time of transformers' default : ours."""
        values = self.rows[row]
        if OURS not in values or THEIRS not in values:
            return None
        return values[THEIRS] / values[OURS]

    def as_json(self) -> dict[str, Any]:
        """All results as one JSON object."""
        rows = {}
        for row, values in self.rows.items():
            rows[row] = {name: float(f"{value:.4g}") for name, value in values.items()}
            ratio = self.ratio(row)
            if ratio is not None:
                rows[row]["ratio"] = round(ratio, 3)
        workload = vars(self.workload)
        return {"machine": self.machine, "work": workload, "rows": rows, "notes": self.notes}

    def markdown(self) -> str:
        """All results as one Markdown table, with the machine before it and the notes after it."""
        header = ("work", *BACKENDS, "limit", f"{THEIRS} : {OURS}", "difference of outputs")
        lines = []
        for row, values in self.rows.items():
            factor = UNITS.get(row, 1e3)
            times = [number(values.get(name), factor) for name in (*BACKENDS, "limit")]
            difference = number(values.get("difference"))
            lines.append((ROWS[row], *times, number(self.ratio(row)), difference))
        machine = ", ".join(f"{name} {value}" for name, value in self.machine.items())
        parts = [machine, "", markdown_table(header, lines)]
        if self.notes:
            parts += ["", *self.notes]
        return "\n".join(parts)


def number(value: float | None, factor: float = 1.0) -> str:
    """A cell of the table; empty where nothing was measured."""
    return "" if value is None else f"{factor * value:.3g}"


@contextmanager
def random_folder(width_factor: float) -> Iterator[Path]:
    """A folder like the release's with random weights and narrower layers, deleted at the end."""
    paths.runs().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=paths.runs()) as home:
        folder = Path(home) / "model"
        make_checkpoint(checkpoint_config("qwen7b", width_factor), folder)
        yield folder


def measure(
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    workload: Workload,
    compiled: bool = False,
    alone: bool = False,
) -> Parts:
    """Measure every part of the model in a folder, here and in transformers.

    dtype: of Thinker and Talker. compiled: also compile the static cache's steps, which takes
    minutes. alone: leave out transformers. Raises UserError where transformers is missing, and for
    a model without speech.
    """
    version = "left out" if alone else require_transformers().__version__
    limits = {"fp32": matrix_rate(device, torch.float32, workload)}
    limits["rate"] = matrix_rate(device, dtype, workload)
    limits["bandwidth"] = copy_bandwidth(device, workload.probe_mib)
    machine = machine_of(device, dtype, limits) | {"transformers": version}
    parts = Parts(machine, workload, {row: {} for row in ROWS})
    measure_loading(folder, device, parts, LOAD_PROGRAMS if not alone else {OURS: OUR_PROGRAM})

    ours = MinomniBackend(folder, device, dtype, workload)
    official = None if alone else TransformersBackend(folder, dtype, ours)
    all_parts = measurements(ours, official, compiled)
    for backends in tqdm(all_parts, unit=" parts", leave=False, disable=None):
        measure_in_turns(backends, parts)
    for row, flops in ours.flops().items():
        parts.rows[row]["limit"] = flops / limits["fp32" if row in FP32_ROWS else "rate"]
    for row, num_bytes in ours.step_bytes().items():
        parts.rows[row]["limit"] = num_bytes / limits["bandwidth"]
    return parts


def measurements(
    ours: MinomniBackend, official: TransformersBackend | None, compiled: bool
) -> list[dict[str, Callable[[], Measurement]]]:
    """The parts, each with the backends that measure it."""
    if official is None:
        return [{OURS: run} for run in ours.measurements()]
    thinker = {OURS: ours.thinker, THEIRS: official.thinker, STATIC: official.static_thinker}
    if compiled:
        thinker[COMPILED] = official.compiled_thinker
    return [
        {OURS: ours.log_mel, THEIRS: official.log_mel},
        {OURS: ours.image, THEIRS: official.image},
        {OURS: ours.video, THEIRS: official.video},
        {OURS: ours.audio_encoder, THEIRS: official.audio_encoder},
        {OURS: ours.vision_encoder, THEIRS: official.vision_encoder},
        thinker,
        {OURS: ours.answer, THEIRS: official.answer},
        {OURS: ours.speech, THEIRS: official.speech},
        {OURS: ours.streamed_speech},
        {OURS: ours.thinker_training, THEIRS: official.thinker_training},
        {OURS: ours.talker_training, THEIRS: official.talker_training},
    ]


def measure_in_turns(backends: dict[str, Callable[[], Measurement]], parts: Parts) -> None:
    """Measure one part by the backends in turns, and enter medians and differences.

    There are workload.rounds turns after one that warms up; fewer where they take over PART_S.
    What the official code cannot do here becomes a note, and so do outputs of different shapes;
    an error of ours is raised.
    """
    seconds, measured = run_in_turns(dict(backends), parts)
    for (row, name), values in seconds.items():
        if name in measured:
            parts.rows[row][name] = median(values)
    ours = measured[OURS]
    theirs = measured.get(THEIRS)
    if theirs is None or ours.output is None or theirs.output is None:
        return
    try:
        found = difference(ours.output, theirs.output)
    except ValueError as error:
        parts.notes.append(note(THEIRS, ours, error))
        return
    for row in ours.seconds:
        parts.rows[row]["difference"] = found


def run_in_turns(
    backends: dict[str, Callable[[], Measurement]], parts: Parts
) -> tuple[dict[tuple[str, str], list[float]], dict[str, Measurement]]:
    """-> seconds by row and backend, and the last measurement of each backend that did not fail.

    A backend that fails is removed from `backends`.
    """
    seconds: dict[tuple[str, str], list[float]] = {}
    measured: dict[str, Measurement] = {}
    began = time.perf_counter()
    for turn in range(1 + parts.workload.rounds):
        if turn > 1 and time.perf_counter() - began > PART_S:
            break
        for name, run in list(backends.items()):
            try:
                measurement = run()
            except Exception as error:
                if name == OURS:
                    raise
                parts.notes.append(note(name, measured[OURS], error))
                del backends[name]
                measured.pop(name, None)
                continue
            measured[name] = measurement
            if turn:  # the first one warms up
                for row, value in measurement.seconds.items():
                    seconds.setdefault((row, name), []).append(value)
    return seconds, measured


def note(backend: str, ours: Measurement, error: Exception) -> str:
    """One line: a backend, the rows of our measurement, and the error."""
    what = " and ".join(ROWS[row] for row in ours.seconds)
    reason = shorten(f"{type(error).__name__}: {error}".splitlines()[0], 200)
    return f"{backend}: {what}: {reason}"


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference, relative to the largest value; for ids, the share that differs.

    Raises ValueError for outputs of different shapes.
    """
    if ours.shape != theirs.shape:
        raise ValueError(f"outputs have shapes {list(ours.shape)} and {list(theirs.shape)}")
    if not ours.is_floating_point():
        return float((ours != theirs).double().mean())
    ours, theirs = ours.double().cpu(), theirs.double().cpu()
    return float((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-12))


# --------------------------------------------------------------------------------------------------
# loading
def measure_loading(
    folder: Path, device: torch.device, parts: Parts, programs: dict[str, str]
) -> None:
    """Load the folder in new processes, in turns, and enter seconds and memory.

    programs: of LOAD_PROGRAMS.
    """
    runs: dict[str, list[tuple[float, float | None]]] = {name: [] for name in programs}
    for turn in range(1 + parts.workload.rounds):
        for name, program in programs.items():
            run = run_program(program, folder, device)
            if turn:  # the first one reads the files into the memory of the system
                runs[name].append(run)
    for name, found in runs.items():
        parts.rows[Row.LOAD][name] = median(seconds for seconds, _ in found)
        memory = [mebibytes for _, mebibytes in found if mebibytes is not None]
        if memory:
            parts.rows[Row.LOAD_MEMORY][name] = median(memory)


def run_program(program: str, folder: Path, device: torch.device) -> tuple[float, float | None]:
    """Run a program of LOAD_PROGRAMS -> seconds, and MiB where the system reports them.

    Raises UserError where it fails.
    """
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder), device.type],
        env=paths.environment(),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        last_line = (done.stderr.splitlines() or ["?"])[-1]
        raise UserError(f"{folder}: cannot be loaded in a process of its own: {last_line:.300}")
    seconds, mebibytes = json.loads(done.stdout.splitlines()[-1])
    return seconds, mebibytes


# --------------------------------------------------------------------------------------------------
# the machine
def matrix_rate(device: torch.device, dtype: torch.dtype, workload: Workload) -> float:
    """Floating-point operations per second of a product of square matrices."""
    width = workload.probe_width
    matrix = torch.randn(width, width, device=device).to(dtype)
    seconds, _ = fastest(lambda: matrix @ matrix, device, times=5, warm_up=1)
    return 2 * width**3 / seconds


def machine_of(
    device: torch.device, dtype: torch.dtype, limits: dict[str, float]
) -> dict[str, Any]:
    """What is printed above the table."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "device": name,
        "processor": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "copy_gb_per_s": float(f"{limits['bandwidth'] / 1e9:.3g}"),
        "gflops": float(f"{limits['rate'] / 1e9:.3g}"),
        "fp32_gflops": float(f"{limits['fp32'] / 1e9:.3g}"),
    }
