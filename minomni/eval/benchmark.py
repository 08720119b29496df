"""Latency and cost of streaming, compared with decoding speech after the whole text reply.

measure() benchmarks a trained model; first_audio() measures the time to first audio of any size,
with random weights if there are no others.

The reply lasts ANSWER_S seconds: the codes that end speech are suppressed. Both sides of a ratio
are measured in alternating runs, so that other load on the machine affects them equally.
"""

import dataclasses
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch

from minomni import plot
from minomni.chat.generate import generate_tokens, seeded_generator
from minomni.chat.reply import AudioChunk, Reply, ReplyDone, required_buffer_s
from minomni.chat.static_generate import StaticGenerator
from minomni.config import SIZES, FlowConfig
from minomni.data.corpus import FIRST_VOICE_OFFSET
from minomni.data.vocabulary import world_tokenizer
from minomni.errors import UserError
from minomni.eval.benchmark_utils import Rows, fastest, noise, timed
from minomni.eval.stats import markdown_table
from minomni.files import write_atomically
from minomni.omni import Omni
from minomni.thinker.thinker import PrefillState
from minomni.token2wav.ode_solver import with_euler
from minomni.token2wav.streaming import (
    RELEASE_SCHEDULE,
    MelStream,
    Schedule,
    SpeechStream,
    codes_until_audio,
    low_latency_schedule,
)
from minomni.token2wav.token2wav import Token2Wav
from minomni.token2wav.voice import Voice

ANSWER_S = 10
ROUNDS = 3  # repetitions of each measurement
SESSION_S = 600
WORDS_PER_S = 3  # text tokens per second of speech, at most: random weights never stop
QUESTION = [{"role": "user", "content": "say the red circle is above the blue square"}]
LATENCY_PHASES = {
    "prefill": "end of prefill",
    "text": "first text token",
    "code": "first code",
    "mel": "first mel",
    "audio": "first audio",
}
SCHEDULES = {
    "the release's: 3 blocks, 2 blocks of left context recomputed, 1 block of look-ahead": (
        RELEASE_SCHEDULE
    ),
    "3 blocks, cached left context, no look-ahead": Schedule(((3, 0),)),
    "3 blocks, cached left context, look-ahead of 1": Schedule(((3, 1),)),
    "3 blocks, cached left context, look-ahead of 2": Schedule(((3, 2),)),
    "6 blocks, cached left context, look-ahead of 1": Schedule(((6, 1),)),
}
WHOLE_UTTERANCE = Schedule(((10_000, 0),))


@dataclass
class Streaming:
    """Results of measure()."""

    rows: Rows
    phases: dict[str, tuple[float, float]]  # seconds since the question, predicted and measured
    schedules: dict[str, tuple[int, float]]  # codes before the first audio, distance of the mel

    def ratios(self) -> dict[str, float]:
        """Values of the rows by name."""
        return {name: round(value, 4) for name, (value, _) in self.rows.items()}

    def markdown(self) -> str:
        """All results as Markdown tables."""
        phases = [
            (LATENCY_PHASES[name], f"{1e3 * predicted:.0f}", f"{1e3 * measured:.0f}")
            for name, (predicted, measured) in self.phases.items()
        ]
        schedules = [
            (name, str(codes), f"{distance:.3f}")
            for name, (codes, distance) in self.schedules.items()
        ]
        tables = (
            table(self.rows),
            markdown_table(("until", "predicted, ms", "measured, ms"), phases),
            markdown_table(
                ("schedule", "codes before the first audio", "mel distance to offline decoding"),
                schedules,
            ),
        )
        return "\n\n".join(tables)

    def draw(self, path: Path) -> None:
        """Write a waterfall chart of the phases as PNG. Raises UserError if that fails."""
        import matplotlib

        matplotlib.use("agg")
        count = len(self.phases)
        ax = plot.axes(width=7, height=2.6)
        series = (("predicted", plot.PALE), ("measured", plot.COLORS["audio"]))
        for column, (label, color) in enumerate(series):
            ends = [1e3 * times[column] for times in self.phases.values()]
            begins = [0.0, *ends[:-1]]
            widths = [end - begin for begin, end in zip(begins, ends)]
            rows = [count - i - 0.4 * column for i in range(count)]
            ax.barh(rows, widths, 0.38, begins, color=color, label=label)

        ax.set(yticks=[count - i - 0.2 for i in range(count)], xlabel="ms since the question")
        ax.set_yticklabels([LATENCY_PHASES[name] for name in self.phases])
        ax.legend(frameon=False, fontsize=8)
        write_atomically(path, lambda file: ax.figure.savefig(file, format="png", dpi=100))


def table(rows: Rows) -> str:
    """Values with their descriptions as a Markdown table."""
    cells = [(name, f"{value:.3g}", description) for name, (value, description) in rows.items()]
    return markdown_table(("measurement", "value", "description"), cells)


# ----------------------------------------------------------------------------------------------
# measurements


@contextmanager
def without_eos(omni: Omni) -> Iterator[None]:
    """Context in which speech lasts ANSWER_S seconds, and the text fits into that time."""
    config = omni.config
    talker = omni.talker
    assert talker is not None  # only models that speak are measured
    talker_config = talker.config
    max_codes = ANSWER_S * token2wav_of(omni).config.codes_per_second
    max_words = ANSWER_S * WORDS_PER_S
    omni.config = dataclasses.replace(
        config,
        talker_sampling=dataclasses.replace(config.talker_sampling, max_new_tokens=max_codes),
        thinker_sampling=dataclasses.replace(config.thinker_sampling, max_new_tokens=max_words),
    )
    # The Talker stops at codec_bos instead, which it never generates.
    talker.config = dataclasses.replace(talker_config, codec_eos=talker_config.codec_bos)
    try:
        yield
    finally:
        omni.config = config
        talker.config = talker_config


def token2wav_of(omni: Omni) -> Token2Wav:
    """The speech decoder of a model that speaks; only such models are measured."""
    assert omni.token2wav is not None
    return omni.token2wav


def streamed(omni: Omni, flow: FlowConfig | None = None) -> tuple[list[AudioChunk], Reply]:
    """Stream the reply to QUESTION -> its audio chunks and the reply."""
    *chunks, done = omni.stream(QUESTION, flow=flow)
    assert isinstance(done, ReplyDone)
    return [chunk for chunk in chunks if isinstance(chunk, AudioChunk)], done.reply


def measure(omni: Omni) -> Streaming:
    """All results for a model, in about two minutes for tiny on two cores.

    Raises UserError for a model without voices.
    """
    omni.respond(QUESTION)  # warm up
    offline_runs = []
    streaming_runs = []
    same_solver_runs = []
    with without_eos(omni):
        for _ in range(ROUNDS):
            offline_runs.append(timed(lambda: omni.respond(QUESTION)))
            streaming_runs.append(timed(lambda: streamed(omni)))
            same_solver_runs.append(timed(lambda: streamed(omni, omni.config.flow)))
        predicted = predict(omni, with_euler(omni.config.flow))

    # Earliest time of each phase over the streaming runs.
    timings = [reply.timings for _, _, (_, reply) in streaming_runs]
    measured = {name: min(timing.first(name) for timing in timings) for name in LATENCY_PHASES}
    phases = {name: (predicted[name], measured[name]) for name in LATENCY_PHASES}

    rows = latency_rows(offline_runs, measured["audio"])
    rows |= cost_rows(offline_runs, streaming_runs, same_solver_runs)
    rows |= playback_rows(omni, streaming_runs)
    ratio = predicted["audio"] / measured["audio"]
    rows["prediction_ratio"] = (ratio, "predicted : measured time to first audio")
    rows["session_growth_mb"] = (
        session_memory_growth(omni),
        f"growth of memory after the first full context in {SESSION_S} s of listening",
    )

    default = low_latency_schedule(token2wav_of(omni))
    schedules = {"low latency, the default of `stream()`": default, **SCHEDULES}
    distances = {name: distance(omni, schedule) for name, schedule in schedules.items()}
    return Streaming(rows, phases, distances)


def latency_rows(offline_runs: list, first_audio_s: float) -> Rows:
    """Time to first audio, alone and relative to an offline reply."""
    offline_s = min(seconds for seconds, _, _ in offline_runs)
    return {
        "first_audio_ms": (1e3 * first_audio_s, "time to first audio"),
        "first_audio_ratio": (
            first_audio_s / offline_s,
            f"time to first audio : time of an offline reply of {ANSWER_S} s",
        ),
    }


def cost_rows(offline_runs: list, streaming_runs: list, same_solver_runs: list) -> Rows:
    """CPU time of streaming relative to an offline reply."""
    offline_cpu = min(cpu for _, cpu, _ in offline_runs)
    _, streaming_cpu, _ = fastest_run(streaming_runs)
    same_solver_cpu = min(cpu for _, cpu, _ in same_solver_runs)
    return {
        "streamed_cost_ratio": (
            streaming_cpu / offline_cpu,
            "CPU time of a streamed reply : of an offline reply",
        ),
        "streamed_cost_ratio_same_solver": (
            same_solver_cpu / offline_cpu,
            "the same, with the offline reply's solver instead of Euler's",
        ),
    }


def playback_rows(omni: Omni, streaming_runs: list) -> Rows:
    """Whether a player can play the stream without gaps."""
    seconds, _, (chunks, reply) = fastest_run(streaming_runs)
    text_times = reply.timings.times["text"]
    words = len(text_times)

    # N tokens at r per second, of which the Talker consumes R per second.
    codes_per_s = token2wav_of(omni).config.codes_per_second
    text_s = words * (text_times[-1] - text_times[0]) / (words - 1)
    buffer_s = text_s - words / codes_per_s
    after_audio = [at for at in text_times if at > reply.timings.first("audio")]
    return {
        **gap_rows(seconds, chunks, reply),
        "buffer_by_rule_ms": (
            1e3 * max(buffer_s, 0),
            f"buffer that a slow Thinker would need: N / r - N / R, N = {words} tokens at r a "
            f"second, R = {codes_per_s} codes a second",
        ),
        "words_after_first_audio": (len(after_audio), "text tokens after the first audio"),
    }


def gap_rows(work_s: float, chunks: list[AudioChunk], reply: Reply) -> Rows:
    """Speed of a reply, and the buffer that a player needs."""
    buffer_ms = 1e3 * required_buffer_s(chunks)
    return {
        "realtime_factor": (work_s / reply.seconds, "seconds of work per second of speech"),
        "player_waits_ms": (buffer_ms, "buffer before playback, to play without gaps"),
    }


def fastest_run(runs: list) -> tuple[float, float, Any]:
    """The run of timed() with the shortest wall-clock time."""
    return min(runs, key=lambda run: run[0])


def first_audio(omni: Omni) -> Rows:
    """Time to first audio of a streamed reply and its parts, on the model's device.

    Raises UserError for a model that generates no speech.
    """
    with without_eos(omni):
        chunks, _ = streamed(omni)  # also warms up
        if not chunks:
            raise UserError("the model answers without speech; there is no first audio to wait for")
        runs = [streamed(omni) for _ in range(ROUNDS)]
    chunks, reply = min(runs, key=lambda run: run[1].timings.times["audio"][0])

    times = reply.timings.times
    code_times = times["code"]
    token2wav = token2wav_of(omni)
    needed = codes_until_audio(low_latency_schedule(token2wav), token2wav)
    last_needed = code_times[needed - 1]
    both_s = (last_needed - code_times[0]) / (needed - 1)
    # After the last text token the Talker runs alone.
    talker_steps = [
        later - earlier
        for earlier, later in zip(code_times, code_times[1:])
        if earlier > times["text"][-1]
    ]
    talker_s = median(talker_steps) if talker_steps else float("nan")
    return {
        "first_text_ms": (1e3 * times["text"][0], "time to first text token"),
        "codes_before_audio": (needed, "codes before the first audio"),
        "thinker_and_talker_ms": (1e3 * both_s, "one step of both"),
        "talker_ms": (1e3 * talker_s, "one step of the Talker alone"),
        "mel_and_audio_ms": (
            1e3 * (times["audio"][0] - last_needed),
            "from the last of those codes to the first audio",
        ),
        "first_audio_ms": (1e3 * times["audio"][0], "time to first audio"),
        **gap_rows(reply.total_s, chunks, reply),
    }


def decoding_steps(omni: Omni) -> Rows:
    """Time of a decoding step, plain and with static shapes (Omni.use_static_steps).

    "both" is a step of the Thinker and one of the Talker.
    """
    voice = default_voice(omni)
    kept = omni.static_generator
    generators: dict[str, StaticGenerator | None] = {"plain": None, "static": StaticGenerator(omni)}
    runs: dict[str, list[float]] = {}
    with without_eos(omni):
        _, prefill = prefill_time(omni)
        voices = {"thinker": None, "both": [voice.bos_token]}
        rounds = range(1 + ROUNDS)  # the first run warms up, and captures graphs on CUDA
        for _, kind, what in product(rounds, generators, voices):
            omni.static_generator = generators[kind]
            step_ms = text_step_ms(omni, prefill, voices[what])
            runs.setdefault(f"{what}_{kind}", []).append(step_ms)
    omni.static_generator = kept

    rows: Rows = {}
    for what in ("thinker", "both"):
        plain = min(runs[f"{what}_plain"][1:])
        static = min(runs[f"{what}_static"][1:])
        rows[f"{what}_plain_ms"] = (plain, f"{what}: one step, plain")
        rows[f"{what}_static_ms"] = (static, f"{what}: one step of static shapes")
        rows[f"{what}_ratio"] = (plain / static, f"{what}: plain : static")
    return rows


def text_step_ms(omni: Omni, prefill: PrefillState, bos_tokens: list[int] | None) -> float:
    """Median milliseconds from text token to text token; with bos_tokens, a code lies between."""
    times = []
    for kind, ids in generate_tokens(omni, prefill, bos_tokens, 0):
        ids.tolist()  # waits for the device
        if kind == "text":
            times.append(time.perf_counter())
    steps = [later - earlier for earlier, later in zip(times[1:], times[2:])]  # without the start
    return 1e3 * median(steps)


def random_model(size: str, device: str) -> Omni:
    """A model of a size with random weights and a random voice, as fast as a trained one.

    On a GPU Thinker and Talker are bf16. Raises UserError for an unknown size.
    """
    torch.manual_seed(0)
    if size not in SIZES:
        raise UserError(f"unknown size {size!r}; the sizes are {', '.join(SIZES)}")
    with torch.device(device):
        omni = Omni(SIZES[size]).eval()
        dit = token2wav_of(omni).config.dit
        cond = torch.randn(1, dit.enc_emb_dim)
        ref_mel = torch.randn(1, 300, dit.mel_dim) - 5
    if device == "cuda":
        assert omni.talker is not None  # every size can speak
        omni.thinker.bfloat16()
        omni.talker.bfloat16()
    tokens = omni.config.thinker.tokens
    omni.tokenizer = world_tokenizer(tokens)
    omni.voices = {
        "random": Voice("random", tokens.tts_text_pad + FIRST_VOICE_OFFSET, cond, ref_mel)
    }
    return omni


# ----------------------------------------------------------------------------------------------
# prediction of the time to first audio


def predict(omni: Omni, flow: FlowConfig) -> dict[str, float]:
    """Seconds from the question to the end of each phase: sums of parts that are measured alone."""
    voice = default_voice(omni)
    token2wav = token2wav_of(omni)
    schedule = low_latency_schedule(token2wav)
    needed = codes_until_audio(schedule, token2wav)
    prefill_s, prefill = prefill_time(omni)
    text_s, code_s = step_times(omni, prefill, voice)
    setup_s, mel_s, audio_s = decoder_times(omni, voice, flow, schedule, needed)

    # Only early steps: later ones attend to a longer cache.
    step = median(text_s[2 : needed + 1]) + median(code_s[1:needed])
    first_mel_codes = schedule.first_codes(token2wav.config.dit)
    until = {"prefill": prefill_s}
    until["text"] = until["prefill"] + setup_s + text_s[0]
    until["code"] = until["text"] + text_s[1] + code_s[0]
    # The decoder's setup is included in mel_s and audio_s, but is over before the first text token.
    until["mel"] = until["code"] + (first_mel_codes - 1) * step + mel_s - setup_s
    until["audio"] = until["code"] + (needed - 1) * step + audio_s - setup_s
    return until


def prefill_time(omni: Omni) -> tuple[float, PrefillState]:
    """Seconds to preprocess and prefill QUESTION, and the result."""
    _, inputs = omni.prepare(QUESTION, None, True, False)

    def run_prefill() -> PrefillState:
        with torch.no_grad():
            return omni.thinker.prefill(inputs, omni.thinker.model.new_cache())

    prepare_s, _ = fastest(lambda: omni.prepare(QUESTION, None, True, False))
    prefill_s, prefill = fastest(run_prefill)
    return prepare_s + prefill_s, prefill


def step_times(omni: Omni, prefill: PrefillState, voice: Voice) -> tuple[list[float], list[float]]:
    """Seconds of each step of the Thinker and of the Talker in one reply."""
    seconds: dict[str, list[float]] = {"text": [], "code": []}
    before = time.perf_counter()
    for kind, _ in generate_tokens(omni, prefill, [voice.bos_token], 0):
        now = time.perf_counter()
        seconds[kind].append(now - before)
        before = now
    return seconds["text"], seconds["code"]


def decoder_times(
    omni: Omni, voice: Voice, flow: FlowConfig, schedule: Schedule, needed: int
) -> tuple[float, float, float]:
    """Seconds to set up the decoder, to its first mel, and to its first audio of `needed` codes."""
    codes = torch.zeros(1, needed, dtype=torch.long)
    token2wav = token2wav_of(omni)
    dit = token2wav.code2wav_dit_model

    def new_stream() -> SpeechStream:
        return SpeechStream(token2wav, voice, flow, schedule, seeded_generator(0))

    def first_mel() -> torch.Tensor:
        return next(MelStream(dit, voice, flow, schedule, seeded_generator(0)).feed(codes))

    def first_audio() -> torch.Tensor:
        return next(wave for wave in new_stream().feed(codes) if len(wave))

    mel_s, _ = fastest(first_mel)
    setup_s, _ = fastest(new_stream)
    audio_s, _ = fastest(first_audio)
    return setup_s, mel_s, audio_s


# ----------------------------------------------------------------------------------------------
# quality of a schedule, and memory


def distance(omni: Omni, schedule: Schedule) -> tuple[int, float]:
    """Codes before the first audio, and the distance of the mel to that of the whole utterance.

    The mean absolute difference over frames and bands, in nats, for one sentence and one noise.
    """
    codes = omni.respond(QUESTION).codes[None]
    mel = streamed_mel(omni, codes, schedule)
    whole = streamed_mel(omni, codes, WHOLE_UTTERANCE)
    difference = float((mel - whole).abs().mean())
    return codes_until_audio(schedule, token2wav_of(omni)), difference


def streamed_mel(omni: Omni, codes: torch.Tensor, schedule: Schedule) -> torch.Tensor:
    """Codes [1, n] -> mel [1, bands, T], decoded in the chunks of a schedule."""
    dit = token2wav_of(omni).code2wav_dit_model
    stream = MelStream(dit, default_voice(omni), omni.config.flow, schedule, seeded_generator(0))
    return torch.cat([*stream.feed(codes), *stream.finish()], dim=2)


def default_voice(omni: Omni) -> Voice:
    """The first voice of a model."""
    return omni.voice(next(iter(omni.voices)))


def session_memory_growth(omni: Omni) -> float:
    """Growth of the process in megabytes over SESSION_S seconds of listening.

    Counted from the end of the first context: a full context raises a UserError, and a new session
    starts. NaN if the system does not report the size of a process.
    """
    try:
        import resource
    except ImportError:
        return float("nan")

    def peak_memory() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    second = noise(1, seeded_generator(0))
    listened_s = 0
    first_full = None
    while listened_s < SESSION_S:
        session = omni.listen()
        try:
            while listened_s < SESSION_S:
                session.add_audio(second)
                listened_s += 1
        except UserError:
            first_full = first_full or peak_memory()
    if first_full is None:
        return 0.0
    bytes_per_unit = 1 if sys.platform == "darwin" else 2**10
    return (peak_memory() - first_full) * bytes_per_unit / 2**20
