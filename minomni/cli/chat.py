"""The command chat: one question, the sample questions, or a conversation."""

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from minomni import paths
from minomni.chat.generation_options import OPTIONS
from minomni.cli.options import (
    Conflicts,
    add_cuda,
    add_device,
    add_model,
    add_parts,
    add_quantize,
    add_seed,
    load_parts,
    refuse,
)
from minomni.errors import UserError, escape, quote
from minomni.files import is_stream

if TYPE_CHECKING:
    from minomni.chat.reply import AudioChunk, Reply, ReplyDone, TextChunk
    from minomni.cli.options import Parser
    from minomni.omni import Omni

STANDARD_OUTPUT = ("/dev/stdout", "/dev/fd/1", "/proc/self/fd/1")
ARTICLES = {"image": "an", "audio": "some", "video": "a", "text": "some"}
WITH_SAMPLES = "--samples asks its own questions and writes to runs/answers; leave out "
# Options that --samples, --no-speech or a conversation do not use -> the message.
REFUSED_WITH_SAMPLES: Conflicts = {
    ("content",): f"{WITH_SAMPLES}another question",
    ("json",): f"{WITH_SAMPLES}--json",
    ("stream",): f"{WITH_SAMPLES}--stream",
    ("out",): f"{WITH_SAMPLES}--out",
    ("no-speech",): f"{WITH_SAMPLES}--no-speech",
    ("use-audio-in-video",): f"{WITH_SAMPLES}--use-audio-in-video",
}
REFUSED_WITHOUT_SPEECH: Conflicts = {
    ("voice-from",): "--voice-from makes a voice, and --no-speech needs none; leave out one of "
    "them",
}
REFUSED_IN_CONVERSATIONS: Conflicts = {
    ("use-audio-in-video",): "--use-audio-in-video goes with --video; a conversation on a terminal "
    "has no videos",
}


class AppendContent(argparse.Action):
    """Collects --image, --audio, --video and --text in the order in which they are given."""

    def __init__(self, *args, kind: str, **kwargs):
        super().__init__(*args, **kwargs)
        self.kind = kind

    def __call__(self, parser, namespace, values, option_string=None):
        item = {"type": self.kind, self.kind: values}
        namespace.content = [*(namespace.content or []), item]


def generation_option(name: str) -> Callable[[str], float]:
    """A type for one of the options of generation_options.py."""
    option = OPTIONS[name]

    def convert(text: str) -> float:
        try:
            return option.check(option.parse(text), name)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{quote(text)} is not {option.expected}") from None

    return convert


def add_chat(commands: "argparse._SubParsersAction[Parser]") -> None:
    chat = commands.add_parser(
        "chat",
        help="ask a question or have a conversation, in text and speech",
        description="Media and text form the question in the order given. Without any, on a "
        "terminal, it is a conversation of several turns. "
        "Example: --image scene.png --audio question.wav --out reply.wav",
    )
    add_question(chat)
    add_answer(chat)
    add_seed(chat)
    for prefix, part in (("", "Thinker"), ("talker_", "Talker")):
        add_generation_options(chat, prefix, part)
    add_model(chat)
    add_quantize(chat)
    add_parts(chat)
    add_cuda(chat)
    add_output(chat)
    add_device(chat)


def add_question(chat: argparse.ArgumentParser) -> None:
    """What is asked."""
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


def add_answer(chat: argparse.ArgumentParser) -> None:
    """Who answers, and where the speech goes."""
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


def add_output(chat: argparse.ArgumentParser) -> None:
    """When and how the answer is printed."""
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


def run_chat(arguments: argparse.Namespace) -> None:
    """Answer the sample questions, the question of the command line, or a conversation."""
    out = arguments.out or Path("reply.wav")
    check_chat(arguments, out)
    with ended_by_signals():
        answer(arguments, out)


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP raise SystemExit while the block runs.

    They would end the process at once and leave files that are half written. SIGHUP, of a terminal
    that is closed, does not exist on Windows. Signals that are ignored, as by nohup, stay ignored.
    """
    numbers = [signal.SIGTERM]
    if hasattr(signal, "SIGHUP"):
        numbers.append(signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    handled = [number for number in numbers if before[number] != signal.SIG_IGN]

    def end(number: int, frame: Any) -> None:
        # Another signal must not interrupt the restoring of files.
        for other in handled:
            signal.signal(other, signal.SIG_IGN)
        raise SystemExit(128 + number)

    for number in handled:
        signal.signal(number, end)
    try:
        yield
    finally:
        # After an end by signal they stay ignored until the process has ended.
        for number in handled:
            if signal.getsignal(number) is end:
                signal.signal(number, before[number])


def answer(arguments: argparse.Namespace, out: Path) -> None:
    """Load the model and answer. out: file of the speech."""
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
        refuse(arguments, REFUSED_WITH_SAMPLES)
    elif not arguments.content and not (sys.stdin and sys.stdin.isatty()):
        raise UserError(
            "nothing was asked; give --text, --audio, --image or --video, or run it on a terminal"
        )
    if not (arguments.no_speech or arguments.samples):
        check_out(out, arguments.stream)
    if not arguments.samples and not arguments.content:
        refuse(arguments, REFUSED_IN_CONVERSATIONS)
    if arguments.no_speech:
        refuse(arguments, REFUSED_WITHOUT_SPEECH)


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
        print(f"{escape(str(path))}: {times}", flush=True)


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
        times = f"{reply.seconds:.1f} s, made in {reply.total_s:.1f} s"
        print(f"  speech    {escape(str(path))} ({times})")


def sample_content(entry: dict, samples: Path) -> list[dict]:
    """The content of a sample question, with the paths of its files."""
    content = []
    for part in entry["content"]:
        for kind, value in part.items():
            content.append({kind: value if kind == "text" else str(samples / value)})
    return content
