"""The command bench."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from minomni import load
from minomni.cli.options import (
    Conflicts,
    add_device,
    add_model,
    add_quantize,
    is_given,
    number_between,
    refuse,
    whole_number,
)
from minomni.cli.serve import import_server
from minomni.errors import UserError

if TYPE_CHECKING:
    import torch

    from minomni.cli.options import Parser
    from minomni.eval.benchmark_utils import Rows

# The benchmarks that use an option; run_bench_folder() refuses some in its own words.
BENCH_OPTIONS = {
    "model": ("stream", "first", "steps", "answer", "serve", "parts", "gpu"),
    "quantize": ("stream", "first", "steps", "answer", "serve", "parts", "gpu"),
    "random-weights": ("stream", "first", "steps", "serve", "parts", "gpu"),
    "plot": ("stream",),
    "processes": ("processes",),
    "width-factor": ("parts", "gpu"),
    "dtype": ("parts",),
    "compile": ("parts",),
    "short": ("parts", "gpu"),
    "out": ("gpu",),
}
# Options that random weights, or those of --width-factor, do not use -> the message.
REFUSED_WITH_RANDOM_WEIGHTS: Conflicts = {
    ("quantize",): "--quantize goes with the folder of a model; make-checkpoint writes one with "
    "random weights",
}
REFUSED_WITH_WIDTH_FACTOR: Conflicts = {
    ("model",): "--width-factor makes a model instead of --model; leave out one of them",
}


def counts(text: str) -> tuple[int, ...]:
    """A type for an option: numbers of processes, with commas."""
    convert = whole_number(1, 1025)
    return tuple(convert(part) for part in text.split(","))


def add_bench(commands: "argparse._SubParsersAction[Parser]") -> None:
    bench = commands.add_parser(
        "bench", help="measure speed", description="Prints a table of ratios and times."
    )
    add_what(bench)
    add_weights(bench)
    bench.add_argument("--json", action="store_true", help="print one JSON object")
    add_settings(bench)
    add_device(bench)


def add_what(bench: argparse.ArgumentParser) -> None:
    """Which benchmark runs."""
    bench.add_argument(
        "what",
        choices=["stream", "first", "steps", "answer", "serve", "parts", "gpu", "processes"],
        help="stream: streamed speech against speech made after the text; first: latency of the "
        "first audio; steps: a decoding step, plain and with static shapes; answer: loading a "
        "model and a few short answers, with the memory they take; serve: requests per "
        "second and latency of the server; parts: every part beside transformers, which must be "
        "installed, and the limit of the machine; gpu: replayed steps, memory, 20 minutes of "
        "sound, parity and parts on a GPU; begins no piece after nine minutes; not run on a GPU "
        "yet; processes: a training step of tiny by one process and by several",
    )


def add_weights(bench: argparse.ArgumentParser) -> None:
    """Which model is measured."""
    add_model(bench)
    bench.set_defaults(model=None)  # tells "not given" apart, for options that exclude it
    add_quantize(bench)
    bench.add_argument(
        "--random-weights",
        action="store_true",
        help="random weights of the size that --model names, which are as fast as trained ones",
    )


def add_settings(bench: argparse.ArgumentParser) -> None:
    """Options of single benchmarks, which BENCH_OPTIONS names."""
    bench.add_argument(
        "--plot", type=Path, help="plot predicted and measured latency into this PNG (stream)"
    )
    bench.add_argument(
        "--processes",
        type=counts,
        metavar="N,N",
        help="numbers of processes (processes; default 1,2)",
    )
    bench.add_argument(
        "--width-factor",
        type=number_between(0.125, 1),
        metavar="F",
        help="random weights of the release with all widths multiplied by F, from 0.125 to 1, in "
        "place of --model (parts, gpu; 0.25 has 0.9 billion parameters)",
    )
    bench.add_argument(
        "--dtype", choices=["fp32", "bf16"], help="of Thinker and Talker (parts; default fp32)"
    )
    bench.add_argument(
        "--compile",
        action="store_true",
        help="also compile transformers' decoding steps, which takes minutes (parts)",
    )
    bench.add_argument(
        "--short",
        action="store_true",
        help="small inputs, measured once, to see whether all of it runs (parts, gpu)",
    )
    bench.add_argument(
        "--out", type=Path, metavar="DIR", help="folder of gpu.json and gpu.md (gpu)"
    )


def run_bench(arguments: argparse.Namespace) -> None:
    """Measure speed and print ratios and times."""
    from minomni.devices import device_of
    from minomni.eval import benchmark
    from minomni.files import require_possible, writing

    check_bench_options(arguments)
    if arguments.plot:
        require_possible(arguments.plot)
    if arguments.what in ("parts", "gpu"):
        run_bench_folder(arguments)
        return
    device = device_of(arguments.device).type
    if arguments.what == "processes":
        bench_processes(arguments, device)
        return
    if arguments.what == "answer":
        bench_answer(arguments)
        return
    if arguments.random_weights:
        refuse(arguments, REFUSED_WITH_RANDOM_WEIGHTS)
        omni = benchmark.random_model(arguments.model or "tiny", device)
    else:
        omni = load(arguments.model or "tiny", device, quantize=arguments.quantize)

    if arguments.what != "stream":
        if arguments.what == "serve":
            rows = import_server("benchmark").measure(omni)
        elif arguments.what == "first":
            rows = benchmark.first_audio(omni)
        else:
            rows = benchmark.decoding_steps(omni)
        print_rows(rows, arguments.json)
        return

    if arguments.plot:
        with writing(arguments.plot):  # an error here costs no minutes of measuring
            arguments.plot.parent.mkdir(parents=True, exist_ok=True)
    result = benchmark.measure(omni)
    if arguments.plot:
        result.draw(arguments.plot)
    print(json.dumps(result.ratios()) if arguments.json else result.markdown())


def check_bench_options(arguments: argparse.Namespace) -> None:
    """Raises UserError for an option that a benchmark does not use."""
    for option, benchmarks in BENCH_OPTIONS.items():
        if not is_given(arguments, option) or arguments.what in benchmarks:
            continue
        names = ", ".join(benchmarks)
        raise UserError(
            f"--{option} is no option of `bench {arguments.what}`, but of {names}; leave it out"
        )


def bench_processes(arguments: argparse.Namespace, device: str) -> None:
    """Measure training by several processes and print the times."""
    from minomni.eval import process_scaling

    counts = arguments.processes or process_scaling.PROCESSES
    rows = process_scaling.measure(counts, device)
    if arguments.json:
        print(json.dumps([row._asdict() for row in rows]))
    else:
        print(process_scaling.markdown(rows))


def bench_answer(arguments: argparse.Namespace) -> None:
    """Load a model, let it answer, and print memory and times."""
    from minomni.devices import device_of
    from minomni.eval import answer_benchmark

    device = device_of(arguments.device)
    rows = answer_benchmark.measure(arguments.model or "tiny", device, arguments.quantize)
    print_rows(rows, arguments.json)


def print_rows(rows: "Rows", as_json: bool) -> None:
    """Print the values of a benchmark as one JSON object, or with their descriptions as a table."""
    from minomni.eval import benchmark

    if as_json:
        print(json.dumps({name: round(value, 4) for name, (value, _) in rows.items()}))
    else:
        print(benchmark.table(rows))


def run_bench_folder(arguments: argparse.Namespace) -> None:
    """Measure the model in a folder: every part beside transformers, or all of it on a GPU."""
    from minomni import folder_of
    from minomni.devices import device_of
    from minomni.eval import backends, parts_benchmark

    refuse(
        arguments,
        {
            ("random-weights", "quantize"): f"`bench {arguments.what}` measures a folder as it is "
            "stored; leave out --random-weights and --quantize, or give --width-factor for random "
            "weights"
        },
    )
    if arguments.width_factor:
        refuse(arguments, REFUSED_WITH_WIDTH_FACTOR)

    # Everything is checked before a folder of up to 22 GB is written.
    stored = None if arguments.width_factor else folder_of(arguments.model or "tiny")
    device = device_of(arguments.device)
    if arguments.what == "gpu":
        check_bench_gpu(arguments, device)
        run = run_bench_gpu
    else:
        backends.require_transformers()
        run = run_bench_parts
    if stored is not None:
        run(arguments, stored, device)
        return
    with parts_benchmark.random_folder(arguments.width_factor) as folder:
        run(arguments, folder, device)


def run_bench_parts(arguments: argparse.Namespace, folder: Path, device: "torch.device") -> None:
    """Measure every part of a model beside transformers and print one table."""
    from minomni.devices import dtype_of
    from minomni.eval import backends, parts_benchmark

    dtype = dtype_of(arguments.dtype or "fp32")
    assert dtype is not None
    workload = backends.FULL if device.type == "cuda" else backends.ON_CPU
    if arguments.short:
        workload = backends.SHORT
    parts = parts_benchmark.measure(folder, device, dtype, workload, arguments.compile)
    print(json.dumps(parts.as_json()) if arguments.json else parts.markdown())


def check_bench_gpu(arguments: argparse.Namespace, device: "torch.device") -> None:
    """Make the folder of the results. Raises UserError for options that cannot be measured."""
    from minomni.eval import gpu_benchmark

    if arguments.out is None:
        raise UserError("`bench gpu` writes gpu.json and gpu.md; give --out DIR")
    if device.type != "cuda" and not arguments.short:
        raise UserError(
            "`bench gpu` needs --device cuda; with --short it also runs elsewhere, to try it"
        )
    gpu_benchmark.make_folder(arguments.out)


def run_bench_gpu(arguments: argparse.Namespace, folder: Path, device: "torch.device") -> None:
    """Measure a model on a GPU, print one table and write it with all tracebacks."""
    from minomni.eval import gpu_benchmark

    results = gpu_benchmark.measure(folder, device, arguments.out, arguments.short)
    print(json.dumps(results.pieces) if arguments.json else results.markdown())
