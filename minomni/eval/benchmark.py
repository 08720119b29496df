"""How soon and how fast: speaking while thinking against speaking afterwards, stage by stage,
measured in one run.

measure() asks a model all that, first_sound() any size how soon it speaks, with weights of chance
where it has no others.

A ten-second answer is asked for by forbidding the codes that end speech. Ratios come from runs that
take turns, so that what else the machine does falls on both alike.
"""

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from minomni import config as sizes
from minomni.chat.generate import generate_tokens, seeded
from minomni.chat.reply import AudioChunk, Reply, required_buffer_s
from minomni.config import FlowConfig
from minomni.errors import UserError
from minomni.files import write_atomically
from minomni.omni import Omni
from minomni.token2wav.ode_solver import with_euler
from minomni.token2wav.streaming import (
    RELEASE_SCHEDULE,
    MelStream,
    Schedule,
    SpeechStream,
    codes_until_audio,
    low_latency_schedule,
)
from minomni.token2wav.voice import Voice

ANSWER_S, ROUNDS, SESSION_S = 10, 3, 600
WORDS_PER_S = 3  # text tokens to a second of speech, at most: chance would go on writing for ever
QUESTION = [{"role": "user", "content": "say the red circle is above the blue square"}]
STAGES = {
    "prefill": "the prompt is read",
    "text": "first word",
    "code": "first code",
    "mel": "first mel",
    "sound": "first sound",
}
SCHEDULES = {
    "serving: 3 blocks, 2 back computed again, 1 ahead": RELEASE_SCHEDULE,
    "3 blocks, the past remembered, 0 ahead": Schedule(((3, 0),)),
    "3 blocks, the past remembered, 1 ahead": Schedule(((3, 1),)),
    "3 blocks, the past remembered, 2 ahead": Schedule(((3, 2),)),
    "6 blocks, the past remembered, 1 ahead": Schedule(((6, 1),)),
}


@dataclass
class Streaming:
    """What measure() found."""

    rows: dict[str, tuple[float, str]]  # by name: value and what it is
    stages: dict[str, tuple[float, float]]  # seconds since the question, predicted and measured
    schedules: dict[
        str, tuple[int, float]
    ]  # codes that the first sound waits for, mean distance of the mel

    def ratios(self) -> dict[str, float]:
        return {name: round(value, 4) for name, (value, _) in self.rows.items()}

    def markdown(self) -> str:
        lines = [table(self.rows), "", "| until | predicted, ms | measured, ms |", "|---|---|---|"]
        lines += [
            f"| {STAGES[name]} | {1e3 * predicted:.0f} | {1e3 * measured:.0f} |"
            for name, (predicted, measured) in self.stages.items()
        ]
        lines += [
            "",
            "| schedule | codes before the first sound | mel distance to the whole utterance |",
            "|---|---|---|",
        ]
        return "\n".join(
            lines
            + [f"| {name} | {codes} | {far:.3f} |" for name, (codes, far) in self.schedules.items()]
        )

    def draw(self, path: Path) -> None:
        """A waterfall of the stages into a png. Raises UserError where it cannot be written."""
        import matplotlib

        matplotlib.use("agg")
        from minomni.notebook import viz

        ax, bottom = viz.axes(width=7, height=2.6), len(self.stages)
        for column, name, color in (
            (0, "predicted", viz.PALE),
            (1, "measured", viz.COLORS["audio"]),
        ):
            ends = [1e3 * times[column] for times in self.stages.values()]
            begins = [0.0, *ends[:-1]]
            rows = [bottom - i - 0.4 * column for i in range(len(ends))]
            ax.barh(
                rows,
                [end - begin for begin, end in zip(begins, ends)],
                0.38,
                begins,
                color=color,
                label=name,
            )
        ax.set(yticks=[bottom - i - 0.2 for i in range(bottom)], xlabel="ms since the question")
        ax.set_yticklabels([STAGES[name] for name in self.stages])
        ax.legend(frameon=False, fontsize=8)
        write_atomically(path, lambda file: ax.figure.savefig(file, format="png", dpi=100))


def table(rows: dict[str, tuple[float, str]]) -> str:
    """Rows, each a value and what it is, as a Markdown table."""
    lines = [f"| {name} | {value:.3g} | {what} |" for name, (value, what) in rows.items()]
    return "\n".join(["| streaming | value | what it is |", "|---|---|---|", *lines])


@contextmanager
def without_eos(omni) -> Iterator[None]:
    """Within it an answer's speech does not end of itself, but after ANSWER_S seconds; its text
    within them.
    """
    config, talker = omni.config, omni.talker.config
    codes = ANSWER_S * config.token2wav.codes_per_second
    omni.config = dataclasses.replace(
        config,
        talker_sampling=dataclasses.replace(config.talker_sampling, max_new_tokens=codes),
        thinker_sampling=dataclasses.replace(
            config.thinker_sampling, max_new_tokens=ANSWER_S * WORDS_PER_S
        ),
    )
    omni.talker.config = dataclasses.replace(
        talker, codec_eos=talker.codec_bos
    )  # which is never spoken
    try:
        yield
    finally:
        omni.config, omni.talker.config = config, talker


def timed(work: Callable[[], object]) -> tuple[float, float, object]:
    """-> seconds by the clock, seconds of CPU, and what the work gives."""
    clock, cpu = time.perf_counter(), time.process_time()
    result = work()
    return time.perf_counter() - clock, time.process_time() - cpu, result


def streamed(omni, flow: FlowConfig | None = None) -> tuple[list[AudioChunk], Reply]:
    pieces = list(omni.stream(QUESTION, flow=flow))
    return [piece for piece in pieces if isinstance(piece, AudioChunk)], pieces[-1].reply


def measure(omni) -> Streaming:
    """All rows for a model. Takes about two minutes for tiny on two cores. Raises UserError for one
    without voices.
    """
    rows = {}
    omni.respond(QUESTION)  # warm up
    with without_eos(omni):
        whole, live, alike = [], [], []
        for _ in range(ROUNDS):
            whole.append(timed(lambda: omni.respond(QUESTION)))
            live.append(timed(lambda: streamed(omni)))
            alike.append(timed(lambda: streamed(omni, omni.config.flow)))
        predicted = predict(omni, with_euler(omni.config.flow))
    offline_s, offline_cpu = (min(run[i] for run in whole) for i in (0, 1))
    stream_s, stream_cpu, (sounds, reply) = min(live, key=lambda run: run[0])
    alike_cpu = min(run[1] for run in alike)
    first = min(run[2][1].timings.first("sound") for run in live)
    text, codes = (reply.timings.times[kind] for kind in ("text", "code"))
    words, rate = len(text), omni.config.token2wav.codes_per_second
    needed = words * (text[-1] - text[0]) / (words - 1) - words / rate
    rows["first_sound_ms"] = 1e3 * first, "from the question to the first sound"
    rows["first_sound_ratio"] = (
        first / offline_s,
        f"the same : a whole reply of {ANSWER_S} s made afterwards",
    )
    rows["streamed_cost_ratio"] = (
        stream_cpu / offline_cpu,
        "CPU time of a streamed reply : of one made afterwards",
    )
    rows["streamed_cost_ratio_same_solver"] = (
        alike_cpu / offline_cpu,
        ("the same, had it taken the reply's solver and not Euler's"),
    )
    rows["realtime_factor"] = (
        stream_s / reply.seconds,
        "seconds of work for a second of streamed speech",
    )
    rows["player_waits_ms"] = (
        1e3 * required_buffer_s(sounds),
        "how long a player must hold the first sound to play without gap",
    )
    rows["buffer_by_rule_ms"] = (
        1e3 * max(needed, 0),
        (
            f"what a slow Thinker would ask for: N / r - N / R, N = {words} "
            f"tokens at r a second, R = {rate} codes a second"
        ),
    )
    late = sum(at > reply.timings.first("sound") for at in text)
    rows["words_after_first_sound"] = late, "text tokens that come after it"
    rows["prediction_ratio"] = (
        predicted["sound"] / first,
        "predicted : measured time to the first sound",
    )
    rows["session_growth_mb"] = (
        session_memory_growth(omni),
        f"memory that {SESSION_S} s of listening add to the first context",
    )
    stages = {
        name: (predicted[name], min(run[2][1].timings.first(name) for run in live))
        for name in STAGES
    }
    schedules = {
        "eager, the default of stream()": low_latency_schedule(omni.token2wav),
        **SCHEDULES,
    }
    return Streaming(
        rows, stages, {name: distance(omni, schedule) for name, schedule in schedules.items()}
    )


def first_sound(omni) -> dict[str, tuple[float, str]]:
    """How soon a streamed answer is heard, on whatever device the model is, and whether it can be
    kept up.

    Raises UserError for a model that says nothing.
    """
    with without_eos(omni):
        if not streamed(omni)[0]:  # which also warms up
            raise UserError("the model answers without speech; there is no first sound to wait for")
        sounds, reply = min(
            (streamed(omni) for _ in range(ROUNDS)), key=lambda run: run[1].timings.first("sound")
        )
    text, code, sound = (reply.timings.times[kind] for kind in ("text", "code", "sound"))
    needed = codes_until_audio(low_latency_schedule(omni.token2wav), omni.token2wav)
    alone = [later - earlier for earlier, later in zip(code, code[1:]) if earlier > text[-1]]
    return {
        "first_text_ms": (1e3 * text[0], "from the question to the first word"),
        "codes_before_sound": (needed, "that the first sound waits for"),
        "thinker_and_talker_ms": (
            1e3 * (code[needed - 1] - code[0]) / (needed - 1),
            "one step of both",
        ),
        "talker_ms": (1e3 * median(alone or [float("nan")]), "one step of the Talker alone"),
        "mel_and_sound_ms": (
            1e3 * (sound[0] - code[needed - 1]),
            "from the last of those codes to the first sound",
        ),
        "first_sound_ms": (1e3 * sound[0], "from the question to the first sound"),
        "realtime_factor": (
            reply.total_s / reply.seconds,
            "seconds of work for a second of streamed speech",
        ),
        "player_waits_ms": (
            1e3 * required_buffer_s(sounds),
            "how long a player must hold the first sound to play without gap",
        ),
    }


def random_model(size: str, device: str) -> Omni:
    """A model of a size with weights of chance, as fast as a trained one: it answers nonsense in a
    voice of noise.

    On a GPU Thinker and Talker are bf16. Raises UserError for an unknown size.
    """
    from minomni.data.vocabulary import world_tokenizer

    torch.manual_seed(0)
    if size not in sizes.SIZES:
        raise UserError(f"unknown size {size!r}; the sizes are {', '.join(sizes.SIZES)}")
    with torch.device(device):
        omni = Omni(sizes.size(size)).eval()
        dit, tokens = omni.config.token2wav.dit, omni.config.thinker.tokens
        noise = torch.randn(1, dit.enc_emb_dim), torch.randn(1, 300, dit.mel_dim) - 5
    if device == "cuda":
        omni.thinker.bfloat16(), omni.talker.bfloat16()
    omni.tokenizer, omni.voices = (
        world_tokenizer(tokens),
        {"chance": Voice("chance", tokens.tts_text_pad + 5, *noise)},
    )
    return omni


def predict(omni, flow: FlowConfig) -> dict[str, float]:
    """Seconds from the question to each stage, added up from what one step of each part takes,
    measured alone.
    """
    config, voice = omni.config, omni.voice(next(iter(omni.voices)))
    cost: dict[str, list[float]] = {"text": [], "code": []}
    _, inputs = omni.prepare(QUESTION, None, True, False)

    def read():
        with torch.no_grad():
            return omni.thinker.read(inputs, omni.thinker.model.new_cache())

    prefill, reading = fastest(lambda: omni.prepare(QUESTION, None, True, False))[0], None
    seconds, reading = fastest(read)
    then = time.perf_counter()
    for kind, _ in generate_tokens(omni, reading, [voice.bos_token], 0):
        now = time.perf_counter()
        cost[kind].append(now - then)
        then = now
    schedule = low_latency_schedule(omni.token2wav)
    codes = torch.zeros(1, codes_until_audio(schedule, omni.token2wav), dtype=torch.long)
    painting, _ = fastest(
        lambda: next(
            MelStream(omni.token2wav.code2wav_dit_model, voice, flow, schedule, seeded(0)).feed(
                codes
            )
        )
    )

    def speech():
        return SpeechStream(omni.token2wav, voice, flow, schedule, seeded(0))

    setting_up, _ = fastest(speech)
    sounding, _ = fastest(lambda: next(wave for wave in speech().feed(codes) if len(wave)))
    early = codes.shape[1]  # later steps have more to look back at
    step = median(cost["text"][2 : early + 1]) + median(cost["code"][1:early])
    until = {"prefill": prefill + seconds}
    until["text"] = until["prefill"] + setting_up + cost["text"][0]
    until["code"] = until["text"] + cost["text"][1] + cost["code"][0]
    until["mel"] = (
        until["code"]
        + (schedule.first_codes(config.token2wav.dit) - 1) * step
        + painting
        - setting_up
    )
    until["sound"] = until["code"] + (codes.shape[1] - 1) * step + sounding - setting_up
    return until


def fastest(work: Callable[[], object], times: int = 7) -> tuple[float, object]:
    """The least of several times, in seconds, and what the work gives."""
    runs = [timed(work) for _ in range(times)]
    return min(run[0] for run in runs), runs[-1][2]


def distance(omni, schedule: Schedule) -> tuple[int, float]:
    """Codes that must be there before the first sound, and how far a schedule's mel is from the
    whole utterance's.

    The mean over frames and bands of the absolute difference, in nats, for one spoken sentence and
    one noise.
    """
    voice, dit = omni.voice(next(iter(omni.voices))), omni.token2wav.code2wav_dit_model
    codes = omni.respond(QUESTION).codes[None]
    mels = []
    for cut in (schedule, Schedule(((10_000, 0),))):
        stream = MelStream(dit, voice, omni.config.flow, cut, seeded(0))
        mels.append(torch.cat([*stream.feed(codes), *stream.finish()], dim=2))
    return codes_until_audio(schedule, omni.token2wav), float((mels[0] - mels[1]).abs().mean())


def session_memory_growth(omni) -> float:
    """Megabytes that SESSION_S seconds of listening add to the process after its first full
    context.

    A context is heard full, which ends in a UserError that says so, and another session begins. NaN
    where the system does not say how large a process is.
    """
    try:
        import resource
    except ImportError:
        return float("nan")
    unit = 2**20 if sys.platform == "darwin" else 2**10
    second = 0.1 * torch.randn(16_000, generator=seeded(0))
    heard, first = 0, None
    while heard < SESSION_S:
        session = omni.listen()
        try:
            while heard < SESSION_S:
                session.add_audio(second)
                heard += 1
        except UserError:
            first = first or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (
        (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - (first or 0)) / unit if first else 0.0
    )
