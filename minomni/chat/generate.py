"""Thinking, talking and sounding at the same time: the one loop behind omni.stream(), respond() and
generate().

    Thinker    t0  t1  t2  t3  ...              a step of each in turn; line i of the Talker's text is the Thinker's
    Talker         c0  c1  c2  ...              state after token i, and is there once token i + 1 has been chosen
    Token2Wav              [mel, sound] ...     as soon as the codes of a chunk are there

There are no threads: whoever reads the events drives the loop, and closing it drops all that it
holds.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from minomni.arguments import number, shown, whole_number
from minomni.chat.generation_options import sampling_configs
from minomni.chat.reply import AudioChunk, Reply, ReplyDone, TextChunk, Timings
from minomni.config import FlowConfig, SamplingConfig
from minomni.errors import UserError
from minomni.talker.talker import TalkerInputs
from minomni.thinker.thinker import PrefillState
from minomni.token2wav.ode_solver import STEPS, with_euler
from minomni.token2wav.streaming import Schedule, SpeechStream, low_latency_schedule
from minomni.token2wav.voice import Voice


def seeded(seed: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Each part draws from a generator of its own, so that it draws the same however the others
    keep pace.
    """
    return torch.Generator(device).manual_seed(seed)


def generators(
    seed: int | list[int], device: torch.device | str
) -> torch.Generator | list[torch.Generator]:
    """One generator for a whole batch, or one for each row."""
    return [seeded(one, device) for one in seed] if isinstance(seed, list) else seeded(seed, device)


@torch.no_grad()
def generate_tokens(
    omni,
    reading: PrefillState,
    bos_tokens: list[int] | None,
    seed: int | list[int],
    sampling: tuple[SamplingConfig, SamplingConfig] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Answer a batch of read prompts: yields ("text", ids [B]) and ("code", ids [B]) in order of
    readiness.

    bos_tokens: the voice's token of each row; None for no speech. seed: one for the batch, or one
    for each row, which then draws as it does alone. sampling: of Thinker and Talker, by default the
    model's. Rows that are done go on with filler, as in Thinker.steps and Talker.steps. Text and
    codes are those of Thinker.generate and then Talker.generate.
    """
    config, tokens, device = omni.config, omni.config.thinker.tokens, omni.thinker.device
    thinking_as, talking_as = sampling or sampling_configs(config, {})
    thoughts = omni.thinker.steps(reading, thinking_as, generators(seed, device))
    if bos_tokens is None:
        yield from (("text", ids) for ids, _ in thoughts)
        return
    end, pad, *voices = omni.thinker.model.embed_tokens(
        torch.tensor([tokens.tts_text_end, tokens.tts_text_pad, *bos_tokens], device=device)
    )  # [E] each
    rows: list[list[Tensor]] = [
        [] for _ in voices
    ]  # lines of text, growing while the Talker reads them
    script = TalkerInputs(
        reading.hidden + reading.text_embeds,
        reading.position_ids,
        reading.attention_mask,
        torch.stack(voices),
        rows,
    )
    talk = omni.talker.steps(script, talking_as, omni.num_codes, generators(seed, device))
    thinking = set(range(len(rows)))
    for ids, states in thoughts:
        yield "text", ids
        if states is not None:
            for row in thinking:
                rows[row].append(states[row])
        for row in thinking & set((ids == tokens.im_end).nonzero()[:, 0].tolist()):
            thinking.remove(row)
            rows[row] += [end, pad] if rows[row] else []
        if states is not None:
            yield from (("code", codes) for codes in [next(talk, None)] if codes is not None)
    for row in thinking:  # cut by the limit
        rows[row] += [end, pad] if rows[row] else []
    yield from (("code", codes) for codes in talk)


def check_schedule(schedule: Schedule | str | None) -> None:
    """Raise UserError for what cuts no sound."""
    if schedule is not None and schedule != "eager" and not isinstance(schedule, Schedule):
        raise UserError(
            f'schedule {shown(schedule)}; give "eager", a Schedule, or None for sound in one go'
        )


def check_flow(flow: FlowConfig | None) -> None:
    """Raise UserError for a flow that cannot be followed, or not in any sensible time."""
    if flow is None:
        return
    if not isinstance(flow, FlowConfig):
        raise UserError(
            f"flow is {shown(flow)}; expected a FlowConfig, such as "
            f"dataclasses.replace(omni.config.flow, points=4)"
        )
    whole_number(flow.points, "flow.points", 2, 1000)
    number(flow.guidance, "flow.guidance", -100, 100)
    number(flow.sway, "flow.sway", -1, 1)
    if not isinstance(flow.solver, str) or flow.solver not in STEPS:
        raise UserError(f"flow.solver is {shown(flow.solver)}; expected one of {', '.join(STEPS)}")


def check_wave(wave: Tensor) -> Tensor:
    """The wave [samples] itself. Raises UserError where weights without sense have made it."""
    if not wave.isfinite().all():
        raise UserError(
            "the weights of token2wav give NaN or infinite samples instead of sound; the model's files are "
            "damaged, copy them again"
        )
    return wave


def stream_reply(
    omni,
    reading: PrefillState,
    voice: Voice | None,
    schedule: Schedule | str | None,
    flow: FlowConfig | None,
    seed: int,
    trace: Timings,
    said: list[int],
    sampling: tuple[SamplingConfig, SamplingConfig] | None = None,
) -> Iterator[TextChunk | AudioChunk | ReplyDone]:
    """Answer one read prompt piece by piece; said is filled with the text ids as they come.

    schedule: how the sound is cut, or "eager"; None makes it at the end, in one go. flow: None for
    the default of omni.stream(). sampling: of Thinker and Talker, by default the model's. Raises
    UserError for weights that give no finite numbers.
    """
    config, generator, codes, waves, text = omni.config, seeded(seed), [], [], ""
    speech, stops, sample_rate = None, (), omni.sample_rate
    flow = flow or (config.flow if schedule is None else with_euler(config.flow))
    if voice is not None:
        stops = config.talker.codec_pad, config.talker.codec_eos
        if schedule is not None:
            schedule = low_latency_schedule(omni.token2wav) if schedule == "eager" else schedule
            speech = SpeechStream(omni.token2wav, voice, flow, schedule, generator, trace.mark)

    def sound(pieces: Iterable[Tensor]) -> Iterator[AudioChunk]:
        for wave in pieces:
            waves.append(check_wave(wave).cpu())
            yield AudioChunk(waves[-1], sample_rate, trace.mark("sound"))

    bos_tokens = None if voice is None else [voice.bos_token]
    for kind, ids in generate_tokens(omni, reading, bos_tokens, seed, sampling):
        token, at = int(ids), trace.mark(kind)
        if kind == "text":
            said.append(token)
            whole = omni.tokenizer.decode(said, skip_special=True)
            if len(whole) > len(text) and not whole.endswith(
                "\N{REPLACEMENT CHARACTER}"
            ):  # half of a letter waits
                yield TextChunk(whole[len(text) :], at)
                text = whole
        elif token not in stops:
            codes.append(token)
            if speech is not None:
                yield from sound(speech.feed(ids[None]))
    spoken = torch.tensor(codes, dtype=torch.long)
    if speech is not None and codes:
        yield from sound(speech.finish())
    elif voice is not None and codes:
        yield from sound([omni.token2wav(spoken[None], voice, flow, generator)])
    yield ReplyDone(
        Reply(
            omni.tokenizer.decode(said, skip_special=True),
            torch.cat(waves) if waves else torch.zeros(0),
            sample_rate,
            spoken,
            trace.mark("end"),
            trace,
        )
    )
