"""Command line: python -m minomni train | chat | report | ablate | bench."""

import argparse
import json
import os
import sys
import time
from contextlib import nullcontext, redirect_stdout, suppress
from pathlib import Path

from minomni import load, paths
from minomni.arguments import shown
from minomni.chat.generation_options import OPTIONS
from minomni.errors import UserError

STANDARD_OUTPUT = ("/dev/stdout", "/dev/fd/1", "/proc/self/fd/1")
ARTICLES = {"image": "an", "audio": "some", "video": "a", "text": "some"}


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line, like all others."""

    def error(self, message):
        raise UserError(f"{message}; see {self.prog} --help")


def whole(lowest: int, below: int):
    """A type for options: whole numbers from lowest up to, not including, below."""

    def convert(text: str) -> int:
        if not text.isdecimal() or not lowest <= int(text) < below:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not a whole number from {lowest} to {below - 1}"
            )
        return int(text)

    return convert


def answer_option(name: str):
    """A type for one of the options of generation_options.py."""
    option = OPTIONS[name]

    def convert(text: str):
        try:
            return option.check(option.read(text), name)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{shown(text)} is not {option.expected}") from None

    return convert


SEED, COUNT, DEVICES = whole(0, 2**63), whole(1, 100_000), ("auto", "cpu", "cuda", "mps")


def parser() -> Parser:
    """The whole command line."""
    top = Parser(
        prog="python -m minomni",
        description="A small Qwen2.5-Omni: train it, talk with it, score it.",
    )
    commands = top.add_subparsers(dest="command", required=True)
    for add in (add_train, add_chat, add_report, add_ablate, add_bench):
        add(commands)
    return top


def add_train(commands) -> None:
    train = commands.add_parser(
        "train",
        help="train a size from scratch, stage by stage",
        description="Trains every stage that is not finished, two at a time, and writes "
        "runs/SIZE/model. tiny takes about half an hour on two cores, and 8 GB "
        "of memory.",
    )
    train.add_argument("size", nargs="?", default="tiny", help="tiny (default) or small")
    train.add_argument("--stage", help="run this one stage only; --stages lists them")
    train.add_argument(
        "--stages",
        action="store_true",
        help="list the stages: what learns, for how long, from what",
    )
    train.add_argument(
        "--resume",
        action="store_true",
        help="go on with an unfinished run, exactly where it stopped",
    )
    train.add_argument(
        "--fresh",
        action="store_true",
        help="throw an earlier run away and start over; with --stage that stage's work alone",
    )
    train.add_argument(
        "--device",
        default="auto",
        choices=DEVICES,
        help="where to compute (default auto: cuda, else mps, else cpu)",
    )
    train.add_argument("--seed", type=SEED, default=0, help="of everything random (default 0)")
    train.add_argument("--home", type=Path, help="where to work (default runs/SIZE)")
    train.add_argument(
        "--data",
        type=Path,
        help="tune the trained model on your own: a JSONL file of messages and "
        "replies, or a folder of recordings; --stage chat or talker",
    )
    train.add_argument(
        "--epochs",
        type=COUNT,
        help="how often --data is gone through (default 3, more if it is small)",
    )
    train.add_argument(
        "--out", type=Path, help="where the tuned model goes (default runs/SIZE/tuned)"
    )
    train.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="STAGE.FIELD=VALUE",
        help="change the recipe of a stage, as --set talker.steps=200; may be repeated. Fields: "
        "steps, batch, lr, accumulate, warmup, weight_decay, clip",
    )
    train.add_argument(
        "--no-progress", action="store_true", help="print lines only, without a progress bar"
    )


def add_chat(commands) -> None:
    chat = commands.add_parser(
        "chat",
        help="ask a question, or hold a conversation, in text and speech",
        description="Media and text are asked in the order given. Without any, on a terminal, "
        "it is a conversation of several turns. "
        "Example: --image scene.png --audio question.wav --out reply.wav",
    )
    for kind in ("image", "audio", "video", "text"):
        chat.add_argument(
            f"--{kind}",
            dest="content",
            action=Item,
            kind=kind,
            metavar="TEXT" if kind == "text" else "FILE",
            help=f"add {ARTICLES[kind]} {kind} to the question; may be repeated",
        )
    chat.add_argument(
        "--samples", action="store_true", help="answer all questions of data_samples/ instead"
    )
    chat.add_argument(
        "--use-audio-in-video", action="store_true", help="listen to the videos' sound tracks too"
    )
    chat.add_argument("--voice", help="who answers (default: the model's first voice)")
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
        help="where the speech goes: a name that ends in .wav, "
        ".flac, .ogg or .mp3 (default reply.wav); the turns of a conversation are numbered",
    )
    chat.add_argument("--no-speech", action="store_true", help="answer in text alone")
    chat.add_argument("--seed", type=SEED, default=0, help="of all that is random (default 0)")
    for prefix, part in (("", "Thinker"), ("talker_", "Talker")):
        for name, option in OPTIONS.items():
            if name != "do_sample":  # the temperature says it
                chat.add_argument(
                    f"--{(prefix + name).replace('_', '-')}",
                    type=answer_option(name),
                    metavar="N",
                    help=f"{option.help} ({part}; default: the model's)",
                )
    chat.add_argument(
        "--model",
        default="tiny",
        help="a size trained here, or a checkpoint's folder (default tiny)",
    )
    chat.add_argument(
        "--stream",
        action="store_true",
        help="speak while thinking: print text and write the wav as they come",
    )
    chat.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object: text, audio, seconds, sample_rate, total_s; with --stream also "
        "first_sound_s, last_text_s",
    )
    chat.add_argument(
        "--device", default="cpu", choices=DEVICES, help="where to compute (default cpu)"
    )


def add_report(commands) -> None:
    report = commands.add_parser(
        "report",
        help="score a model on held-out items with an outside judge",
        description="Prints a report card: what share is right, with 95 %% intervals.",
    )
    report.add_argument(
        "--model",
        default="tiny",
        help="a size trained here, or a checkpoint's folder (default tiny)",
    )
    report.add_argument("--json", action="store_true", help="print one JSON object of fractions")
    report.add_argument(
        "--digits",
        type=Path,
        metavar="FOLDER",
        help="also tune on real spoken digits in the layout "
        "of free-spoken-digit-dataset, and test on the speaker left out",
    )
    report.add_argument("--items", type=COUNT, default=100, help="items a row (default 100)")
    report.add_argument(
        "--device", default="cpu", choices=DEVICES, help="where to compute (default cpu)"
    )


def add_ablate(commands) -> None:
    ablate = commands.add_parser(
        "ablate", help="what a stage is good for", description="Prints a table."
    )
    ablate.add_argument(
        "what",
        choices=["beta", "dpo", "stage3", "tmrope", "tuning"],
        help="beta: that stage with other leashes; dpo: speech before and after it; stage3: long input "
        "before and after it; tmrope: the Thinker raised once more without absolute time; tuning: "
        "the voice breaks when the Thinker is tuned alone, and is repaired",
    )
    ablate.add_argument(
        "--home",
        type=Path,
        default=paths.runs() / "tiny",
        help="of a finished training (default runs/tiny)",
    )
    ablate.add_argument("--items", type=COUNT, default=100, help="sentences a row (default 100)")
    ablate.add_argument("--seed", type=SEED, default=0, help="of everything random (default 0)")


def add_bench(commands) -> None:
    bench = commands.add_parser(
        "bench", help="measure speed", description="Prints a table of ratios and times."
    )
    bench.add_argument(
        "what",
        choices=["stream", "first"],
        help="stream: speaking while thinking against speaking "
        "afterwards; first: how soon the first sound comes",
    )
    bench.add_argument(
        "--model",
        default="tiny",
        help="a size trained here, or a checkpoint's folder (default tiny)",
    )
    bench.add_argument(
        "--chance",
        action="store_true",
        help="the size that --model names with random weights: as fast as trained ones",
    )
    bench.add_argument("--json", action="store_true", help="print one JSON object")
    bench.add_argument(
        "--picture", type=Path, help="draw predicted and measured latency into this png (stream)"
    )
    bench.add_argument(
        "--device", default="cpu", choices=DEVICES, help="where to compute (default cpu)"
    )


class Item(argparse.Action):
    """Collects --image, --audio, --video and --text in the order in which they are given."""

    def __init__(self, *args, kind, **kwargs):
        super().__init__(*args, **kwargs)
        self.kind = kind

    def __call__(self, _parser, arguments, value, _option=None):
        arguments.content = (arguments.content or []) + [{"type": self.kind, self.kind: value}]


def run_train(arguments: argparse.Namespace) -> None:
    """List the stages, fine-tune on own data, run one stage, or train a size from scratch."""
    from minomni.devices import device_of
    from minomni.train import pipeline, recipes

    if arguments.stages:
        print(pipeline.stage_table(arguments.size))
        return
    device = device_of(arguments.device).type
    home = arguments.home or paths.runs() / arguments.size
    if arguments.data:
        run_finetune(arguments, home, device)
        return
    if arguments.epochs or arguments.out:
        raise UserError("--epochs and --out go with --data")

    # Everything is checked before anything is written.
    first_stage = next(iter(pipeline.STAGES))
    recipes.recipe_of(arguments.stage or first_stage, arguments.size)
    settings = recipes.parse_settings(arguments.set)
    pipeline.prepare_run(home, arguments.resume, arguments.fresh, arguments.stage)
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
    from minomni.train import pipeline, scheduler

    began = time.perf_counter()
    try:
        scheduler.run_all(size, home, seed, device)
    finally:
        seconds = pipeline.elapsed_s(home, time.perf_counter() - began)
    pipeline.export_model(size, home, seed)
    print(f"trained in {seconds:.0f} s: {home / 'model'}")


def run_finetune(arguments: argparse.Namespace, home: Path, device: str) -> None:
    """Fine-tune a trained size on the data of --data."""
    from minomni.train.finetune import finetune

    if arguments.set:
        raise UserError("--set changes the stages of a size and does not go with --data")
    folder = finetune(
        arguments.size,
        arguments.data,
        arguments.out or home / "tuned",
        stage=arguments.stage,
        seed=arguments.seed,
        epochs=arguments.epochs,
        resume=arguments.resume,
        fresh=arguments.fresh,
        device=device,
        home=home,
    )
    print(f"tuned: {folder}; python -m minomni chat --model {folder}")


def run_chat(arguments) -> None:
    out = arguments.out or Path("reply.wav")
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
            "--use-audio-in-video goes with --video; a conversation on a terminal has no films"
        )
    if arguments.voice_from and arguments.no_speech:
        raise UserError(
            "--voice-from makes a voice, and --no-speech wants none; leave out one of them"
        )
    omni, voice = load(arguments.model, arguments.device), arguments.voice
    if arguments.voice_from:
        from minomni import make_voice

        voice = arguments.voice_from.stem if voice is None else voice
        omni.voices[voice] = make_voice(arguments.voice_from, voice, omni)
    options = {
        prefix + name: getattr(arguments, prefix + name)
        for prefix in ("", "talker_")
        for name in OPTIONS
        if name != "do_sample"
    }
    text_apart = redirect_stdout(sys.stderr) if str(out) in STANDARD_OUTPUT else nullcontext()
    with text_apart:  # where the speech goes to standard output, the text does not
        if arguments.samples:
            answer_samples(omni, arguments, voice, options)
        elif arguments.content:
            answer_once(omni, arguments, voice, out, options)
        else:
            hold_conversation(omni, arguments, voice, out, options)


def refuse_with_samples(arguments) -> None:
    """--samples asks its own questions and has its own places for the answers."""
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
    """Refuse, before any work is done, a file that cannot be written."""
    from minomni.chat.reply import AUDIO_FILES, audio_file
    from minomni.files import writing

    with writing(path):
        if path.is_dir():
            raise UserError(f"{path}: is a folder; --out takes the name of a sound file")
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


def answer_once(omni, arguments, voice: str | None, out: Path, options: dict) -> None:
    """Answer the question of the command line."""
    messages = [{"role": "user", "content": arguments.content}]
    if arguments.system is not None:
        messages.insert(0, {"role": "system", "content": arguments.system})
    asked = dict(
        messages=messages,
        voice=voice,
        seed=arguments.seed,
        speech=not arguments.no_speech,
        use_audio_in_video=arguments.use_audio_in_video,
        **options,
    )
    tell(
        omni,
        omni.stream(**asked, schedule="eager" if arguments.stream else None),
        arguments,
        None if arguments.no_speech else out,
    )


def hold_conversation(omni, arguments, voice: str | None, out: Path, options: dict) -> None:
    """Answer the lines that are typed, each with all that was said before in mind.

    The speech of turn n goes beside `out`, with -n behind its name. A question that cannot be
    answered is one line, and the conversation goes on.
    """
    with suppress(ImportError):
        import readline  # noqa: F401  input() then knows the arrow keys

    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="replace")  # a terminal may send what is no UTF-8
    print("Type a question. /new begins a new conversation, /quit ends.", file=sys.stderr)
    session, turns = omni.listen(voice, not arguments.no_speech, arguments.system), 0
    while True:
        try:
            question = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if question in ("/quit", "/exit"):
            return
        if question == "/new":
            session = omni.listen(voice, not arguments.no_speech, arguments.system)
        elif question:
            path = None if arguments.no_speech else numbered(out, turns + 1)
            try:
                tell(
                    omni,
                    session.respond(
                        question, arguments.seed, "eager" if arguments.stream else None, **options
                    ),
                    arguments,
                    path,
                )
                turns += 1
            except UserError as error:
                print(f"minomni: {error}", file=sys.stderr)


def numbered(path: Path, number: int) -> Path:
    """reply.wav -> reply-1.wav; a device or a pipe stays as it is."""
    from minomni.chat.reply import is_device

    return path if is_device(path) else path.with_name(f"{path.stem}-{number}{path.suffix}")


def tell(omni, pieces, arguments, path: Path | None) -> None:
    """Print an answer, as it comes or at its end, and write its speech to `path`."""
    if arguments.stream:
        reply = follow(pieces, path, omni.sample_rate, quiet=arguments.json)
    else:
        *_, end = pieces
        reply = end.reply
        if path:
            reply.save(path)
    if arguments.json:
        answer = {
            "text": reply.text,
            "audio": path and str(path),
            "seconds": round(reply.seconds, 3),
            "sample_rate": reply.sample_rate,
            "total_s": round(reply.total_s, 3),
        }
        if arguments.stream:
            times = {
                "first_sound_s": reply.timings.first("sound"),
                "last_text_s": reply.timings.last("text"),
            }
            answer |= {name: time and round(time, 3) for name, time in times.items()}
        print(json.dumps(answer), flush=True)
    else:
        print(reply.text)
        if path:
            print(
                f"{path}: {reply.seconds:.1f} s of speech, made in {reply.total_s:.1f} s",
                flush=True,
            )


def follow(pieces, path: Path | None, sample_rate: int, quiet: bool):
    """Print an answer's pieces as they come, each with its time, and write its sound into a wav
    that grows -> Reply.
    """
    from minomni.chat.reply import AudioChunk, ReplyDone
    from minomni.files import growing_wav

    with growing_wav(path, sample_rate) if path else nullcontext() as wav:
        for piece in pieces:
            if isinstance(piece, ReplyDone):
                return piece.reply
            if isinstance(piece, AudioChunk):
                wav.write(piece.wave.numpy())
                wav.flush()
            if not quiet:
                sound = isinstance(piece, AudioChunk)
                what = (
                    f"~ {len(piece.wave) / sample_rate:.2f} s of sound"
                    if sound
                    else piece.text.strip()
                )
                print(f"{piece.at_s:6.2f} s  {what}", flush=True)


def answer_samples(omni, arguments, voice: str | None, options: dict) -> None:
    """Answer every question of data_samples/questions.json and say where each wav is."""
    folder = paths.runs() / "answers"
    samples = paths.data_samples()
    for entry in json.loads((samples / "questions.json").read_text(encoding="utf-8")):
        content = [
            {kind: value if kind == "text" else str(samples / value)}
            for part in entry["content"]
            for kind, value in part.items()
        ]
        messages = [{"role": "user", "content": content}]
        if arguments.system is not None:
            messages.insert(0, {"role": "system", "content": arguments.system})
        reply = omni.respond(
            messages,
            voice=entry["voice"] if voice is None else voice,
            seed=arguments.seed,
            use_audio_in_video=entry.get("use_audio_in_video", False),
            **options,
        )
        path = folder / f"{entry['name']}.wav"
        reply.save(path)
        print(
            f"{entry['name']}: {entry['asks']}\n  expected  {entry['answer']}\n  answered  {reply.text}\n"
            f"  speech    {path} ({reply.seconds:.1f} s, made in {reply.total_s:.1f} s)"
        )


def run_report(arguments) -> None:
    import torch

    from minomni.eval import report

    torch.set_num_threads(1)  # short replies one by one: a second thread waits more than it works
    card = report.measure(arguments.model, arguments.items, arguments.digits, arguments.device)
    print(json.dumps(card.fractions()) if arguments.json else card.markdown())


def run_ablate(arguments) -> None:
    import torch

    from minomni.eval.ablations import ablate

    torch.set_num_threads(1)
    print(ablate(arguments.what, arguments.home, arguments.items, arguments.seed))


def run_bench(arguments) -> None:
    from minomni.devices import device_of
    from minomni.eval import benchmark
    from minomni.files import writing

    if arguments.picture and arguments.what != "stream":
        raise UserError("--picture draws what `bench stream` measures; leave it out here")
    device = device_of(arguments.device).type
    omni = (
        benchmark.random_model(arguments.model, device)
        if arguments.chance
        else load(arguments.model, device)
    )
    if arguments.what == "first":
        rows = benchmark.first_sound(omni)
        print(
            json.dumps({name: round(value, 4) for name, (value, _) in rows.items()})
            if arguments.json
            else benchmark.table(rows)
        )
        return
    if arguments.picture:
        with writing(arguments.picture):  # before minutes of measuring
            arguments.picture.parent.mkdir(parents=True, exist_ok=True)
    result = benchmark.measure(omni)
    if arguments.picture:
        result.draw(arguments.picture)
    print(json.dumps(result.ratios()) if arguments.json else result.markdown())


def main() -> int:
    """Run one command. Errors that a person can mend are one line on stderr and exit code 2."""
    for stream in (
        sys.stdout,
        sys.stderr,
    ):  # a path may hold bytes, and an answer letters, that cannot be printed
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        arguments = parser().parse_args()
        run = {
            "train": run_train,
            "chat": run_chat,
            "report": run_report,
            "ablate": run_ablate,
            "bench": run_bench,
        }
        run[arguments.command](arguments)
        sys.stdout.flush()
    except (
        BrokenPipeError
    ):  # nobody reads on, as after `| head`; and nobody is to be told so at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except UserError as error:
        print(f"minomni: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
