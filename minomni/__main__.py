"""Command line: python -m minomni COMMAND; see COMMANDS at the end."""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext, redirect_stdout, suppress
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NoReturn, cast

from minomni import load, paths
from minomni.chat.generation_options import OPTIONS
from minomni.errors import UserError, quote
from minomni.files import is_stream

if TYPE_CHECKING:
    import torch

    from minomni.chat.reply import AudioChunk, Reply, ReplyDone, TextChunk
    from minomni.eval.benchmark import Rows
    from minomni.omni import Omni

STANDARD_OUTPUT = ("/dev/stdout", "/dev/fd/1", "/proc/self/fd/1")
ARTICLES = {"image": "an", "audio": "some", "video": "a", "text": "some"}
DEVICES = ("auto", "cpu", "cuda", "mps")


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, like all others."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


class AppendContent(argparse.Action):
    """Collects --image, --audio, --video and --text in the order in which they are given."""

    def __init__(self, *args, kind: str, **kwargs):
        super().__init__(*args, **kwargs)
        self.kind = kind

    def __call__(self, parser, namespace, values, option_string=None):
        item = {"type": self.kind, self.kind: values}
        namespace.content = [*(namespace.content or []), item]


def whole(lowest: int, below: int) -> Callable[[str], int]:
    """A type for options: whole numbers from lowest up to, not including, below."""

    def convert(text: str) -> int:
        if not text.isdecimal() or not lowest <= int(text) < below:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a whole number from {lowest} to {below - 1}"
            )
        return int(text)

    return convert


def generation_option(name: str) -> Callable[[str], float]:
    """A type for one of the options of generation_options.py."""
    option = OPTIONS[name]

    def convert(text: str) -> float:
        try:
            return option.check(option.parse(text), name)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{quote(text)} is not {option.expected}") from None

    return convert


def width_factor(text: str) -> float:
    """A type for an option: a number from 0.125 to 1."""
    with suppress(ValueError):
        if 0.125 <= float(text) <= 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"{quote(text)} is not a number from 0.125 to 1")


def share(text: str) -> float:
    """A type for an option: a number from 0 to 1."""
    with suppress(ValueError):
        if 0 <= float(text) <= 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"{quote(text)} is not a number from 0 to 1")


def counts(text: str) -> tuple[int, ...]:
    """A type for an option: numbers of processes, with commas."""
    convert = whole(1, 1025)
    return tuple(convert(part) for part in text.split(","))


SEED = whole(0, 2**63)
COUNT = whole(1, 100_000)

# The benchmarks that use an option of `bench`; run_bench_folder() refuses some in its own words.
BENCH_OPTIONS = {
    "model": ("stream", "first", "steps", "answer", "serve", "parts", "gpu"),
    "quantize": ("stream", "first", "steps", "answer", "serve", "parts", "gpu"),
    "random-weights": ("stream", "first", "steps", "serve", "parts", "gpu"),
    "picture": ("stream",),
    "processes": ("processes",),
    "width-factor": ("parts", "gpu"),
    "dtype": ("parts",),
    "compile": ("parts",),
    "short": ("parts", "gpu"),
    "out": ("gpu",),
}


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


def add_train(commands: "argparse._SubParsersAction[Parser]") -> None:
    train = commands.add_parser(
        "train",
        help="train a size from scratch, stage by stage",
        description="Trains every stage that is not finished, two at a time, and writes "
        "runs/SIZE/model. tiny takes 8 GB of memory; on two cores, under an hour or, with "
        "--budget long, some hours.",
    )
    train.add_argument("size", nargs="?", default="tiny", help="tiny (default) or small")
    add_recipe(train)
    add_run(train, "runs/SIZE", "; with --stage, of that stage only")
    train.add_argument(
        "--data",
        type=Path,
        help="fine-tune the trained model on your data: a JSONL file of messages and replies, or a "
        "folder of recordings or of shards that `pack` wrote; --stage chat or talker",
    )
    add_own_data(train)
    add_lora_options(train)
    train.add_argument(
        "--no-progress", action="store_true", help="print lines only, without a progress bar"
    )


def add_recipe(train: argparse.ArgumentParser) -> None:
    """Which stages are trained, and how."""
    train.add_argument("--stage", help="run this one stage only; --stages lists them")
    train.add_argument(
        "--stages",
        action="store_true",
        help="list the stages: trained parts, seconds, losses, data",
    )
    train.add_argument(
        "--budget",
        choices=("quick", "long"),
        default="quick",
        help="steps of tiny's stages: quick (default), or long, which made the shipped weights",
    )
    train.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="STAGE.FIELD=VALUE",
        help="change the recipe of a stage, as in --set talker.steps=200; may be repeated. "
        "Fields: steps, batch, lr, accumulate, warmup, weight_decay, clip",
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


def add_own_data(train: argparse.ArgumentParser) -> None:
    """What --data does."""
    train.add_argument(
        "--skip-corrupt",
        action="store_true",
        help="leave out damaged samples of packed data, naming each",
    )
    train.add_argument(
        "--held-out",
        metavar="SPEAKER",
        help="train without the rows of this speaker, and print how well the model answers them "
        'before and after; spoken digits name the speaker in the file, JSONL rows in "speaker"',
    )
    train.add_argument(
        "--epochs", type=COUNT, help="passes over --data (default 3, more if it is small)"
    )
    train.add_argument(
        "--out", type=Path, help="folder of the fine-tuned model (default runs/SIZE/tuned)"
    )


def add_lora_options(train: argparse.ArgumentParser) -> None:
    """Adapters in place of the weights."""
    train.add_argument(
        "--lora",
        metavar="r=N",
        help="train adapters of this rank and leave the weights as they are, as in --lora r=16; "
        "also alpha=32 and layers=q_proj+v_proj; SIZE may then be the folder of any model",
    )
    train.add_argument(
        "--parts",
        metavar="PARTS",
        help="what --lora tunes: thinker, talker, or thinker,talker (default: what the data can)",
    )
    add_quantize(train)


def add_train_encoder(commands: "argparse._SubParsersAction[Parser]") -> None:
    command = commands.add_parser(
        "train-encoder",
        help="train an encoder for the speech codes of a folder that has none",
        description="The model speaks, and an encoder learns to predict the codes of this speech. "
        "Writes the model with the encoder as its codec, which `train --data` needs to tune the "
        "Talker on recordings.",
    )
    command.add_argument("folder", help="folder of a model, or a size trained here")
    command.add_argument(
        "--data",
        type=Path,
        help="rows whose answers the Talker speaks, as for `train` (default: sentences of tiny)",
    )
    command.add_argument(
        "--out", type=Path, help="folder of the new model (default runs/FOLDER/with-encoder)"
    )
    command.add_argument(
        "--size",
        choices=("tiny", "small"),
        default="small",
        help="the encoder is as large as the codec of this size (default small)",
    )
    command.add_argument(
        "--pairs", type=COUNT, default=2000, help="pairs of codes and sound (default 2000)"
    )
    command.add_argument(
        "--steps", type=COUNT, default=3000, help="training steps of 16 pairs (default 3000)"
    )
    command.add_argument(
        "--random-codes",
        type=share,
        default=0.1,
        metavar="SHARE",
        help="share of the pairs, from 0 to 1, whose codes are drawn at random and not spoken by "
        "the Talker (default 0.1)",
    )
    add_run(command, "runs/FOLDER")


def add_pack(commands: "argparse._SubParsersAction[Parser]") -> None:
    pack = commands.add_parser(
        "pack",
        help="write training data with its media as tar shards",
        description="Shards are in WebDataset's format, with an index; train --data reads them.",
    )
    pack.add_argument("data", type=Path, help="a JSONL file, or a folder of recordings")
    pack.add_argument("out", type=Path, help="the folder to write")


def add_merge(commands: "argparse._SubParsersAction[Parser]") -> None:
    merge = commands.add_parser(
        "merge",
        help="add a LoRA adapter to its model",
        description="Writes a model folder without adapters, which every command takes.",
    )
    merge.add_argument("model", help="a size trained here, or the folder of a model")
    merge.add_argument("adapter", type=Path, help="the folder of an adapter, ours or peft's")
    merge.add_argument("out", type=Path, help="the folder to write")


def add_chat(commands: "argparse._SubParsersAction[Parser]") -> None:
    chat = commands.add_parser(
        "chat",
        help="ask a question or have a conversation, in text and speech",
        description="Media and text form the question in the order given. Without any, on a "
        "terminal, it is a conversation of several turns. "
        "Example: --image scene.png --audio question.wav --out reply.wav",
    )
    for kind in ("image", "audio", "video", "text"):
        chat.add_argument(
            f"--{kind}",
            dest="content",
            action=AppendContent,
            kind=kind,
            metavar="TEXT" if kind == "text" else "FILE",
            help=f"add {ARTICLES[kind]} {kind} to the question; may be repeated",
        )
    chat.add_argument(
        "--samples", action="store_true", help="answer all questions of data_samples/ instead"
    )
    chat.add_argument(
        "--use-audio-in-video", action="store_true", help="use the audio tracks of the videos too"
    )
    chat.add_argument("--voice", help="voice of the answer (default: the model's first)")
    chat.add_argument(
        "--voice-from",
        type=Path,
        metavar="WAV",
        help="answer in the voice of a few seconds of speech",
    )
    chat.add_argument(
        "--system", metavar="TEXT", help="the system message (default: the model's own)"
    )
    chat.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="file of the speech: a name that ends in .wav, .flac, .ogg or .mp3 (default "
        "reply.wav); the turns of a conversation are numbered",
    )
    chat.add_argument("--no-speech", action="store_true", help="answer in text only")
    add_seed(chat)
    for prefix, part in (("", "Thinker"), ("talker_", "Talker")):
        add_generation_options(chat, prefix, part)
    add_model(chat)
    add_quantize(chat)
    add_parts(chat)
    add_cuda(chat)
    chat.add_argument(
        "--stream",
        action="store_true",
        help="print text and write the wav while they are generated",
    )
    chat.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object: text, audio, seconds, sample_rate, total_s; with --stream "
        "also first_audio_s, last_text_s",
    )
    add_device(chat)


def add_serve(commands: "argparse._SubParsersAction[Parser]") -> None:
    serve = commands.add_parser(
        "serve",
        help="open a page to talk to the model, and the API of OpenAI's clients",
        description="Serves a page with a microphone at http://HOST:PORT, /v1/chat/completions, "
        "/v1/audio/speech, /v1/audio/transcriptions, /v1/realtime and /v1/models. Other machines "
        "reach it only with --host, which needs a token in the environment variable MINOMNI_TOKEN.",
    )
    add_model(serve)
    add_quantize(serve)
    add_parts(serve)
    add_cuda(serve)
    add_device(serve)
    serve.add_argument(
        "--host", default="127.0.0.1", help="address to listen at (default 127.0.0.1)"
    )
    serve.add_argument(
        "--port", type=whole(0, 65_536), default=8000, help="port (default 8000; 0 for any)"
    )
    serve.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a host name that requests may give, such as that of a proxy with https in front",
    )
    serve.add_argument(
        "--sessions",
        type=whole(1, 10_001),
        default=32,
        help="requests and conversations at once; others are told to try later (default 32)",
    )


def generation_names() -> list[str]:
    """The options of an answer, without do_sample: a temperature of 0 means the same."""
    return [name for name in OPTIONS if name != "do_sample"]


def add_generation_options(chat: argparse.ArgumentParser, prefix: str, part: str) -> None:
    """Options of how the Thinker (no prefix) or the Talker ("talker_") generates."""
    for name in generation_names():
        chat.add_argument(
            f"--{(prefix + name).replace('_', '-')}",
            type=generation_option(name),
            metavar="N",
            help=f"{OPTIONS[name].help} ({part}; default: the model's)",
        )


def add_report(commands: "argparse._SubParsersAction[Parser]") -> None:
    report = commands.add_parser(
        "report",
        help="evaluate a model on held-out items, its speech with an independent recognizer",
        description="Prints a table of metrics with 95 %% confidence intervals.",
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


def add_bench(commands: "argparse._SubParsersAction[Parser]") -> None:
    bench = commands.add_parser(
        "bench", help="measure speed", description="Prints a table of ratios and times."
    )
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
    add_model(bench)
    bench.set_defaults(model=None)  # tells "not given" apart, for options that exclude it
    add_quantize(bench)
    bench.add_argument(
        "--random-weights",
        action="store_true",
        help="random weights of the size that --model names, which are as fast as trained ones",
    )
    bench.add_argument("--json", action="store_true", help="print one JSON object")
    bench.add_argument(
        "--picture", type=Path, help="plot predicted and measured latency into this PNG (stream)"
    )
    bench.add_argument(
        "--processes",
        type=counts,
        metavar="N,N",
        help="numbers of processes (processes; default 1,2)",
    )
    bench.add_argument(
        "--width-factor",
        type=width_factor,
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
    add_device(bench)


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
        type=width_factor,
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


def run_train(arguments: argparse.Namespace) -> None:
    """List the stages, fine-tune on own data, run one stage, or train a size from scratch."""
    from minomni.devices import device_of
    from minomni.train import pipeline, processes

    if arguments.stages:
        print(pipeline.stage_table(arguments.size))
        return
    device = device_of(arguments.device).type
    home = arguments.home or paths.runs() / Path(arguments.size).resolve().name
    with processes.process_group(device):
        if arguments.data:
            run_finetune(arguments, home, device)
        else:
            run_stages(arguments, home, device)


def run_stages(arguments: argparse.Namespace, home: Path, device: str) -> None:
    """Run one stage, or all stages and the export of the model."""
    from minomni.train import pipeline, processes, recipes

    if arguments.epochs or arguments.out:
        raise UserError("--epochs and --out go with --data")
    if arguments.lora is not None or arguments.parts is not None or arguments.skip_corrupt:
        raise UserError("--lora, --parts and --skip-corrupt go with --data")
    if arguments.held_out:
        raise UserError("--held-out goes with --data")
    if arguments.quantize:
        raise UserError("--quantize goes with --data and --lora")

    # Everything is checked before anything is written.
    first_stage = next(iter(pipeline.STAGES))
    recipes.recipe_of(arguments.stage or first_stage, arguments.size)
    settings = recipes.budget_settings(arguments.budget, arguments.size)
    settings = recipes.merge_settings(settings, recipes.parse_settings(arguments.set))
    with processes.first_goes_first():
        if processes.is_first():
            pipeline.prepare_run(home, arguments.resume, arguments.fresh, arguments.stage)
            world = processes.world()
            settings = pipeline.split_settings(arguments.size, home, settings, world)
            pipeline.record_settings(home, settings)
    if arguments.stage:
        pipeline.run_stage(
            arguments.stage,
            arguments.size,
            home,
            arguments.seed,
            arguments.resume,
            device,
            progress=not arguments.no_progress,
        )
    else:
        train_all(arguments.size, home, arguments.seed, device)


def train_all(size: str, home: Path, seed: int, device: str) -> None:
    """Run all stages that are not finished and export the model."""
    from minomni.train import pipeline, processes, stage_pool

    began = time.perf_counter()
    try:
        if processes.world() == 1:
            stage_pool.run_all(size, home, seed, device)
        else:
            for name in pipeline.STAGES:
                pipeline.run_stage(name, size, home, seed, True, device, progress=False)
    finally:
        seconds = time.perf_counter() - began
        if processes.is_first():
            seconds = pipeline.add_elapsed(home, seconds)
    if not processes.is_first():
        return
    pipeline.export_model(size, home, seed)
    print(f"trained in {seconds:.0f} s: {home / 'model'}")


def run_finetune(arguments: argparse.Namespace, home: Path, device: str) -> None:
    """Fine-tune a trained size on the data of --data."""
    from minomni.checkpoint.lora import parse_lora
    from minomni.train import processes
    from minomni.train.finetune import finetune

    if arguments.set or arguments.budget != "quick":
        raise UserError("--set and --budget change the stages of a size and do not go with --data")
    lora = None if arguments.lora is None else parse_lora(arguments.lora)
    folder = finetune(
        arguments.size,
        arguments.data,
        arguments.out or home / ("adapter" if lora else "tuned"),
        stage=arguments.stage,
        seed=arguments.seed,
        epochs=arguments.epochs,
        resume=arguments.resume,
        fresh=arguments.fresh,
        device=device,
        home=home,
        lora=lora,
        lora_parts=lora_parts(arguments),
        quantize=arguments.quantize,
        skip_corrupt=arguments.skip_corrupt,
        held_out_speaker=arguments.held_out,
    )
    if arguments.held_out and processes.is_first():
        print(held_out_scores(arguments, folder, lora is not None, device))
    if lora and processes.is_first():
        print(f"tuned: {folder}; python -m minomni merge {arguments.size} {folder} OUT")
    elif processes.is_first():
        print(f"tuned: {folder}; python -m minomni chat --model {folder}")


def run_train_encoder(arguments: argparse.Namespace) -> None:
    """Train an encoder for the codes of a folder."""
    from minomni.devices import device_of
    from minomni.train import processes
    from minomni.train.train_encoder import EncoderOptions, train_encoder

    device = device_of(arguments.device).type
    home = arguments.home or paths.runs() / Path(arguments.folder).resolve().name
    options = EncoderOptions(
        arguments.size, arguments.pairs, arguments.steps, arguments.random_codes
    )
    with processes.process_group(device):
        out = train_encoder(
            arguments.folder,
            arguments.out or home / "with-encoder",
            options,
            data=arguments.data,
            seed=arguments.seed,
            resume=arguments.resume,
            fresh=arguments.fresh,
            device=device,
            home=home,
        )
        if processes.is_first():
            command = f"python -m minomni train {out} --data FILE --lora r=16 --parts talker"
            print(f"with an encoder: {out}; {command}")


def held_out_scores(
    arguments: argparse.Namespace, tuned_folder: Path, is_adapter: bool, device: str
) -> str:
    """The answers to the held-out speaker before and after fine-tuning, as a table."""
    from minomni.checkpoint.lora import load_lora
    from minomni.eval import held_out_speaker

    omni = load(arguments.size, device, quantize=arguments.quantize)
    rows = held_out_speaker.held_out_rows(arguments.data, omni, arguments.held_out)
    before = held_out_speaker.answer_metrics(omni, rows)
    if is_adapter:
        load_lora(omni, tuned_folder)
    else:
        omni = load(tuned_folder, device)
    after = held_out_speaker.answer_metrics(omni, rows)
    return held_out_speaker.comparison(before, after)


def lora_parts(arguments: argparse.Namespace) -> tuple[str, ...]:
    """What --parts names. Raises UserError for other names, and without --lora."""
    from minomni.checkpoint.lora import TUNABLE_PARTS

    if arguments.parts is None:
        return ()
    if arguments.lora is None:
        raise UserError("--parts goes with --lora, as in --lora r=16 --parts talker")
    names = tuple(arguments.parts.split(","))
    for name in names:
        if name not in TUNABLE_PARTS:
            raise UserError(f"--parts: {quote(name)} is not one of {', '.join(TUNABLE_PARTS)}")
    return names


def run_pack(arguments: argparse.Namespace) -> None:
    """Write training data as shards."""
    from minomni.data.shards import pack

    count = pack(arguments.data, arguments.out)
    print(f"packed {count} rows: {arguments.out}")


def run_merge(arguments: argparse.Namespace) -> None:
    """Write a model with an adapter added to its weights."""
    from minomni.checkpoint import saving
    from minomni.checkpoint.lora import load_lora, merge_lora

    omni = load(arguments.model)
    load_lora(omni, arguments.adapter)
    merge_lora(omni)
    saving.save(omni, arguments.out)
    print(f"merged: {arguments.out}; python -m minomni chat --model {arguments.out}")


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


def run_chat(arguments: argparse.Namespace) -> None:
    """Answer the sample questions, the question of the command line, or a conversation."""
    out = arguments.out or Path("reply.wav")
    check_chat(arguments, out)
    omni = load_parts(arguments)
    voice = arguments.voice
    if arguments.voice_from:
        from minomni import make_voice

        voice = arguments.voice_from.stem if voice is None else voice
        omni.voices[voice] = make_voice(arguments.voice_from, voice, omni)

    options = {}
    for prefix in ("", "talker_"):
        for name in generation_names():
            options[prefix + name] = getattr(arguments, prefix + name)

    # Where the speech goes to standard output, the text goes to standard error.
    text_apart = redirect_stdout(sys.stderr) if str(out) in STANDARD_OUTPUT else nullcontext()
    with text_apart:
        if arguments.samples:
            answer_samples(omni, arguments, voice, options)
        elif arguments.content:
            answer_once(omni, arguments, voice, out, options)
        else:
            hold_conversation(omni, arguments, voice, out, options)


def check_chat(arguments: argparse.Namespace, out: Path) -> None:
    """Raises UserError for options that do not go together, before the model is loaded."""
    if arguments.samples:
        refuse_with_samples(arguments)
    elif not arguments.content and not (sys.stdin and sys.stdin.isatty()):
        raise UserError(
            "nothing was asked; give --text, --audio, --image or --video, or run it on a terminal"
        )
    if not (arguments.no_speech or arguments.samples):
        check_out(out, arguments.stream)
    if not arguments.samples and not arguments.content and arguments.use_audio_in_video:
        raise UserError(
            "--use-audio-in-video goes with --video; a conversation on a terminal has no videos"
        )
    if arguments.voice_from and arguments.no_speech:
        raise UserError(
            "--voice-from makes a voice, and --no-speech needs none; leave out one of them"
        )


def refuse_with_samples(arguments: argparse.Namespace) -> None:
    """Raises UserError for options that --samples does not use, which has questions of its own."""
    given = {
        "another question": arguments.content,
        "--json": arguments.json,
        "--stream": arguments.stream,
        "--out": arguments.out,
        "--no-speech": arguments.no_speech,
        "--use-audio-in-video": arguments.use_audio_in_video,
    }
    for name, value in given.items():
        if value:
            raise UserError(
                f"--samples asks its own questions and writes to runs/answers; leave out {name}"
            )


def check_out(path: Path, stream: bool) -> None:
    """Raises UserError for a file that cannot be written, before any work is done."""
    from minomni.chat.reply import AUDIO_FILES, audio_file
    from minomni.files import writing

    with writing(path):
        if path.is_dir():
            raise UserError(f"{path}: is a folder; --out takes the name of an audio file")
        kind, _ = audio_file(path)
        if not path.parent.is_dir():
            raise UserError(
                f"{path}: cannot be written, there is no folder {path.parent}; make it first"
            )
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise UserError(f"{path}: cannot be written (no permission)")
    if stream and kind != AUDIO_FILES[".wav"][0]:
        raise UserError(
            f"{path}: --stream writes a wav while it grows; give --out a name that ends in .wav"
        )


def answer_once(
    omni: "Omni", arguments: argparse.Namespace, voice: str | None, out: Path, options: dict
) -> None:
    """Answer the question of the command line."""
    chunks = omni.stream(
        messages=messages_of(arguments.content, arguments.system),
        voice=voice,
        seed=arguments.seed,
        speech=not arguments.no_speech,
        use_audio_in_video=arguments.use_audio_in_video,
        schedule=schedule_of(arguments),
        **options,
    )
    show_reply(omni, chunks, arguments, None if arguments.no_speech else out)


def messages_of(content: list[dict], system: str | None) -> list[dict]:
    """A question with these items, after the system message if there is one."""
    question = {"role": "user", "content": content}
    if system is None:
        return [question]
    return [{"role": "system", "content": system}, question]


def schedule_of(arguments: argparse.Namespace) -> str | None:
    """How audio is chunked: for low latency with --stream, else all at the end."""
    return "low_latency" if arguments.stream else None


def hold_conversation(
    omni: "Omni", arguments: argparse.Namespace, voice: str | None, out: Path, options: dict
) -> None:
    """Answer each line that is typed, in the context of the turns before it.

    The speech of turn n goes to the name of `out` with -n at its end. A question that cannot be
    answered is one line of error, and the conversation goes on.
    """
    with suppress(ImportError):
        import readline  # noqa: F401  makes input() understand the arrow keys

    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")  # a terminal may send bytes that are not UTF-8
    print("Type a question. /new begins a new conversation, /quit ends.", file=sys.stderr)
    speech = not arguments.no_speech
    session = omni.listen(voice, speech, arguments.system)
    turns = 0
    while True:
        try:
            question = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if question in ("/quit", "/exit"):
            return
        if question == "/new":
            session = omni.listen(voice, speech, arguments.system)
            continue
        if not question:
            continue

        path = numbered(out, turns + 1) if speech else None
        try:
            chunks = session.respond(question, arguments.seed, schedule_of(arguments), **options)
            show_reply(omni, chunks, arguments, path)
            turns += 1
        except UserError as error:
            print(f"minomni: {error}", file=sys.stderr)


def numbered(path: Path, number: int) -> Path:
    """reply.wav -> reply-1.wav; a device or a pipe stays as it is."""
    return path if is_stream(path) else path.with_name(f"{path.stem}-{number}{path.suffix}")


def show_reply(
    omni: "Omni",
    chunks: "Iterator[TextChunk | AudioChunk | ReplyDone]",
    arguments: argparse.Namespace,
    path: Path | None,
) -> None:
    """Print a reply, while it is generated or at its end, and write its speech to `path`."""
    if arguments.stream:
        reply = print_stream(chunks, path, omni.sample_rate, quiet=arguments.json)
    else:
        reply = print_stream(chunks, None, omni.sample_rate, quiet=True)
        if path:
            reply.save(path)

    if arguments.json:
        print(json.dumps(reply_fields(reply, path, arguments.stream)), flush=True)
        return
    print(reply.text)
    if path:
        times = f"{reply.seconds:.1f} s of speech, made in {reply.total_s:.1f} s"
        print(f"{path}: {times}", flush=True)


def reply_fields(reply: "Reply", path: Path | None, streamed: bool) -> dict:
    """What --json prints of a reply."""
    fields = {
        "text": reply.text,
        "audio": None if path is None else str(path),
        "seconds": round(reply.seconds, 3),
        "sample_rate": reply.sample_rate,
        "total_s": round(reply.total_s, 3),
    }
    if streamed:
        times = {
            "first_audio_s": reply.timings.first("audio"),
            "last_text_s": reply.timings.last("text"),
        }
        for name, seconds in times.items():
            fields[name] = None if seconds is None else round(seconds, 3)
    return fields


def print_stream(
    chunks: "Iterator[TextChunk | AudioChunk | ReplyDone]",
    path: Path | None,
    sample_rate: int,
    quiet: bool,
) -> "Reply":
    """Print the chunks of a reply as they come, each with its time, and write its audio into a wav
    that grows -> Reply.
    """
    from minomni.chat.reply import AudioChunk, ReplyDone
    from minomni.files import growing_wav

    with growing_wav(path, sample_rate) if path else nullcontext() as wav:
        for chunk in chunks:
            if isinstance(chunk, ReplyDone):
                return chunk.reply
            if isinstance(chunk, AudioChunk):
                if wav is not None:
                    wav.write(chunk.wave.numpy())
                    wav.flush()
                what = f"~ {len(chunk.wave) / sample_rate:.2f} s of audio"
            else:
                what = chunk.text.strip()
            if not quiet:
                print(f"{chunk.at_s:6.2f} s  {what}", flush=True)
    raise AssertionError("a reply ends with ReplyDone")


def answer_samples(
    omni: "Omni", arguments: argparse.Namespace, voice: str | None, options: dict
) -> None:
    """Answer every question of data_samples/questions.json and print where each wav is."""
    folder = paths.runs() / "answers"
    samples = paths.data_samples()
    for entry in json.loads((samples / "questions.json").read_text(encoding="utf-8")):
        answer = omni.respond(
            messages_of(sample_content(entry, samples), arguments.system),
            voice=entry["voice"] if voice is None else voice,
            seed=arguments.seed,
            use_audio_in_video=entry.get("use_audio_in_video", False),
            **options,
        )
        reply = cast("Reply", answer)  # one conversation has one reply
        path = folder / f"{entry['name']}.wav"
        reply.save(path)
        print(f"{entry['name']}: {entry['asks']}")
        print(f"  expected  {entry['answer']}")
        print(f"  answered  {reply.text}")
        print(f"  speech    {path} ({reply.seconds:.1f} s, made in {reply.total_s:.1f} s)")


def sample_content(entry: dict, samples: Path) -> list[dict]:
    """The content of a sample question, with the paths of its files."""
    content = []
    for part in entry["content"]:
        for kind, value in part.items():
            content.append({kind: value if kind == "text" else str(samples / value)})
    return content


def import_server(module: str) -> ModuleType:
    """A module of the server. Raises UserError where its packages are not installed."""
    try:
        return import_module(f"minomni.serve.{module}")
    except ModuleNotFoundError as error:
        raise UserError(
            f"the server needs {error.name}, which is not installed; run: "
            f"pip install -r requirements-serve.txt"
        ) from None


def run_serve(arguments: argparse.Namespace) -> None:
    """Serve the page and the API until Ctrl-C."""
    app = import_server("app")
    settings = app.Settings(
        host=arguments.host,
        port=arguments.port,
        names=tuple(arguments.allow_host),
        token=os.environ.get("MINOMNI_TOKEN") or None,
        sessions=arguments.sessions,
    )
    settings.check()
    omni = load_parts(arguments)
    app.serve(omni, Path(arguments.model).resolve().name, settings)


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


def run_bench(arguments: argparse.Namespace) -> None:
    """Measure speed and print ratios and times."""
    from minomni.devices import device_of
    from minomni.eval import benchmark
    from minomni.files import writing

    check_bench_options(arguments)
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
    if arguments.random_weights and arguments.quantize:
        raise UserError(
            "--quantize goes with the folder of a model; make-checkpoint writes one with random "
            "weights"
        )
    if arguments.random_weights:
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

    if arguments.picture:
        with writing(arguments.picture):  # an error here costs no minutes of measuring
            arguments.picture.parent.mkdir(parents=True, exist_ok=True)
    result = benchmark.measure(omni)
    if arguments.picture:
        result.draw(arguments.picture)
    print(json.dumps(result.ratios()) if arguments.json else result.markdown())


def check_bench_options(arguments: argparse.Namespace) -> None:
    """Raises UserError for an option that a benchmark does not use."""
    for option, benchmarks in BENCH_OPTIONS.items():
        value = getattr(arguments, option.replace("-", "_"))
        if value in (None, False) or arguments.what in benchmarks:
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
    from minomni.eval import parts_benchmark, parts_sides

    if arguments.random_weights or arguments.quantize:
        raise UserError(
            f"`bench {arguments.what}` measures a folder as it is stored; leave out "
            f"--random-weights and --quantize, or give --width-factor for random weights"
        )
    if arguments.width_factor and arguments.model:
        raise UserError("--width-factor makes a model in place of --model; leave out one of them")

    # Everything is checked before a folder of up to 22 GB is written.
    stored = None if arguments.width_factor else folder_of(arguments.model or "tiny")
    device = device_of(arguments.device)
    if arguments.what == "gpu":
        check_bench_gpu(arguments, device)
        run = run_bench_gpu
    else:
        parts_sides.require_transformers()
        run = run_bench_parts
    if stored is not None:
        run(arguments, stored, device)
        return
    with parts_benchmark.random_folder(arguments.width_factor) as folder:
        run(arguments, folder, device)


def run_bench_parts(arguments: argparse.Namespace, folder: Path, device: "torch.device") -> None:
    """Measure every part of a model beside transformers and print one table."""
    from minomni.devices import dtype_of
    from minomni.eval import parts_benchmark, parts_sides

    dtype = dtype_of(arguments.dtype or "fp32")
    assert dtype is not None
    work = parts_sides.FULL if device.type == "cuda" else parts_sides.ON_CPU
    if arguments.short:
        work = parts_sides.SHORT
    parts = parts_benchmark.measure(folder, device, dtype, work, arguments.compile)
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


def run_make_checkpoint(arguments: argparse.Namespace) -> None:
    """Write a checkpoint with random weights."""
    from minomni.checkpoint.random_checkpoint import checkpoint_config, make_checkpoint

    config = checkpoint_config(arguments.size, arguments.width_factor)
    make_checkpoint(config, arguments.folder, arguments.seed)
    print(f"random weights: {arguments.folder}; python -m minomni check {arguments.folder}")


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
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
