"""Speed, memory and parity of a model on a GPU, in one run that begins no piece after LIMIT_S.

It has not been run on a GPU yet. Each piece stands alone: one that fails leaves its traceback in
the results, and the next one begins. Results are written after every piece, so a run that is
stopped keeps what it has.
"""

import gc
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from minomni import load
from minomni.chat.generate import generate_tokens, seeded_generator
from minomni.chat.static_generate import StaticStep
from minomni.checkpoint.check_folder import AUDIO_TOKENS
from minomni.errors import UserError
from minomni.eval import parts_benchmark
from minomni.eval.backends import FULL, SHORT, WORDS_PER_S, Workload, greedy, require_transformers
from minomni.eval.benchmark_utils import noise, peak_gib, reset_peak
from minomni.eval.stats import markdown_table
from minomni.files import write_atomically
from minomni.omni import Omni
from minomni.sampling import Generators

LIMIT_S = 540  # seconds; no piece begins later, and one that has begun is not stopped
PARITY_S = 150  # for the tests of parity
PARITY_TESTS = "seven_billion or captured or flash or vocoder"  # of tests/test_gpu.py
QUANTIZE = (None, "int8", "int4", "int4+head+encoders")  # of load(), each with its memory
VIDEO_S = 15
VIDEO_FPS = 2
LONG_AUDIO_S = 20 * 60
TOKENS_AROUND = 200  # of a prompt, and of its answer


@dataclass
class Results:
    """What each piece gave, in order."""

    folder: Path  # to write into
    pieces: dict[str, dict[str, Any]] = field(default_factory=dict)
    start: float = field(default_factory=time.perf_counter)

    def add(self, name: str, run: Callable[[], dict[str, Any]]) -> None:
        """Run a piece and write the results so far. An error is kept with its traceback."""
        begin = time.perf_counter()
        piece: dict[str, Any] = {}
        if begin - self.start > LIMIT_S:
            piece["error"] = f"not begun: {LIMIT_S} s were over"
        else:
            try:
                piece["values"] = run()
            except Exception as error:
                piece["error"] = f"{type(error).__name__}: {error}"
                piece["traceback"] = traceback.format_exc()
        piece["seconds"] = round(time.perf_counter() - begin, 2)
        self.pieces[name] = piece
        release_memory()
        self.write()

    def write(self) -> None:
        """Write gpu.json and gpu.md."""
        text = json.dumps(self.pieces, indent=1)
        write_atomically(self.folder / "gpu.json", lambda file: file.write(text.encode()))
        table = self.markdown()
        write_atomically(self.folder / "gpu.md", lambda file: file.write(table.encode()))

    def markdown(self) -> str:
        """One row for every value, and for every piece that failed."""
        rows = []
        for name, piece in self.pieces.items():
            for what, value in piece.get("values", {}).items():
                if not isinstance(value, dict):
                    rows.append((name, what, str(value)))
                    continue
                cells = [f"{backend} {number:.4g}" for backend, number in value.items()]
                rows.append((name, what, ", ".join(cells)))
            if "error" in piece:
                rows.append((name, "failed", piece["error"].splitlines()[0][:200]))
            rows.append((name, "seconds", str(piece["seconds"])))
        return markdown_table(("piece", "what", "value"), rows)


def release_memory() -> None:
    """Free what the last piece has left, also in its errors."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measure(model: Path, device: torch.device, out: Path, short: bool = False) -> Results:
    """Run all pieces on the model in a folder, and write gpu.json and gpu.md into `out`.

    short: small inputs, to see whether all of it runs. Raises UserError where `out` cannot be
    written.
    """
    make_folder(out)
    workload = SHORT if short else FULL
    results = Results(out)
    results.add("replay", lambda: check_replay(model, device, workload))
    for quantize in QUANTIZE:
        name = f"memory, {quantize or 'bf16'}"
        results.add(name, lambda: measure_memory(model, device, quantize, workload))  # noqa: B023
    results.add("long audio", lambda: measure_long_audio(model, device, short))
    results.add("parity", run_parity)
    results.add("parts", lambda: measure_parts(model, device, workload))  # takes the longest
    return results


def make_folder(out: Path) -> None:
    """Make the folder of the results. Raises UserError where it cannot be written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be written ({error.strerror}); give a folder") from None


def measure_parts(model: Path, device: torch.device, workload: Workload) -> dict[str, Any]:
    """`bench parts`, without transformers where that is not installed."""
    alone = False
    try:
        require_transformers()
    except UserError:
        alone = True
    parts = parts_benchmark.measure(model, device, torch.bfloat16, workload, alone=alone)
    found = parts.as_json()
    machine = {name: str(value) for name, value in found["machine"].items()}
    rows = {row: values for row, values in found["rows"].items() if values}
    return {**machine, **rows, "notes": "; ".join(found["notes"])}


# --------------------------------------------------------------------------------------------------
# steps that do not wait
@contextmanager
def replaced(owner: type, name: str, value: object) -> Iterator[None]:
    """Context in which a class has another attribute of a name."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def no_synchronization(device: torch.device) -> Iterator[None]:
    """Context in which waiting for a GPU is an error."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def check_replay(model: Path, device: torch.device, workload: Workload) -> dict[str, Any]:
    """The same answer twice by static steps. The second one, whose graphs are captured, may not
    wait for the device when it launches a step. Raises RuntimeError where the two differ.
    """
    omni = load(model, device, torch.bfloat16)
    omni.use_static_steps()
    first = answer_ids(omni, workload)
    launch = StaticStep.launch

    def launch_without_waiting(step: StaticStep, generator: Generators) -> Any:
        with no_synchronization(device):
            return launch(step, generator)

    with replaced(StaticStep, "launch", launch_without_waiting):
        second = answer_ids(omni, workload)
    if first != second:
        raise RuntimeError("a replayed answer differs from the one that was captured")
    return {"ids and codes equal": len(first)}


def answer_ids(omni: Omni, workload: Workload) -> list[tuple[str, list[int]]]:
    """Ids and codes of a spoken answer in the order in which they are generated."""
    messages = [{"role": "user", "content": "say it"}]
    voice, inputs = omni.prepare(messages, None, True, False)
    assert voice is not None
    sampling = (greedy(WORDS_PER_S * workload.answer_s), greedy(10 * workload.answer_s))
    with torch.no_grad():
        prefill = omni.thinker.prefill(inputs, omni.thinker.model.new_cache())
    steps = generate_tokens(omni, prefill, [voice.bos_token], 0, sampling)
    return [(kind, ids.tolist()) for kind, ids in steps]


# --------------------------------------------------------------------------------------------------
# memory and length
def gpu_peak(device: torch.device) -> float | str:
    """The largest memory of a GPU since reset_peak(), in GiB."""
    peak = peak_gib(device) if device.type == "cuda" else None
    return "not counted on a CPU" if peak is None else round(peak, 2)


def measure_memory(
    model: Path, device: torch.device, quantize: str | None, workload: Workload
) -> dict[str, Any]:
    """Memory of loading, and of a spoken answer to a video of 15 s with its sound."""
    reset_peak(device)
    begin = time.perf_counter()
    omni = load(model, device, torch.bfloat16, quantize)
    found: dict[str, Any] = {
        "load, s": round(time.perf_counter() - begin, 2),
        "peak of loading, GiB": gpu_peak(device),
    }
    random = seeded_generator(0)
    seconds = min(VIDEO_S, workload.audio_s)
    shape = (seconds * VIDEO_FPS, *workload.image_size, 3)
    frames = torch.randint(256, shape, generator=random).byte()
    sound = noise(seconds, random)
    content = [
        {"type": "video", "video": (frames.numpy(), VIDEO_FPS)},
        {"type": "audio", "audio": sound.numpy()},
    ]
    reset_peak(device)
    begin = time.perf_counter()
    reply = omni.respond(
        [{"role": "user", "content": content}],
        max_new_tokens=WORDS_PER_S * workload.answer_s,
        talker_max_new_tokens=50 * workload.answer_s,
    )
    found["answer, s"] = round(time.perf_counter() - begin, 2)
    found["speech, s"] = round(reply.seconds, 2)
    found["peak of the answer, GiB"] = gpu_peak(device)
    return found


def measure_long_audio(model: Path, device: torch.device, short: bool) -> dict[str, Any]:
    """Time and memory of an answer to 20 minutes of sound, or to as much as the context holds."""
    omni = load(model, device, torch.bfloat16)
    context = omni.config.thinker.text.max_position_embeddings
    seconds = min(LONG_AUDIO_S, (context - TOKENS_AROUND) // AUDIO_TOKENS)
    if short:
        seconds = min(seconds, 10)
    sound = noise(seconds, seeded_generator(0))
    content = [{"type": "audio", "audio": sound.numpy()}]
    reset_peak(device)
    begin = time.perf_counter()
    omni.respond([{"role": "user", "content": content}], speech=False, max_new_tokens=8)
    return {
        "sound, s": seconds,
        "answer, s": round(time.perf_counter() - begin, 2),
        "peak, GiB": gpu_peak(device),
    }


# --------------------------------------------------------------------------------------------------
# parity
def run_parity() -> dict[str, Any]:
    """The tests of tests/test_gpu.py that compare with the official code and with plain steps.

    Raises RuntimeError where one fails, where all are skipped and where the tests are not there.
    """
    tests = Path(__file__).parents[2] / "tests" / "test_gpu.py"
    if not tests.exists():
        raise RuntimeError("the tests are not installed; run this in the project's folder")
    command = [sys.executable, "-m", "pytest", "-q", "-k", PARITY_TESTS, str(tests)]
    done = subprocess.run(
        command, cwd=tests.parents[1], capture_output=True, text=True, timeout=PARITY_S
    )
    summary = (done.stdout.splitlines() or [""])[-1]
    if done.returncode or " passed" not in summary:  # pytest returns 0 where all are skipped
        raise RuntimeError(done.stdout[-2000:] + done.stderr[-1000:])
    return {"tests": summary}
