"""A session prefills the same tokens and states as the whole turn at once, however the input is
split into chunks.
"""

import dataclasses
import gc
import math
import weakref
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

import minomni
from minomni.chat.reply import AudioChunk, ReplyDone, TextChunk
from minomni.config import QWEN7B, TINY
from minomni.errors import UserError
from minomni.inputs.media import Clip
from minomni.inputs.prompt import Processor
from minomni.omni import Omni

ROOT = Path(__file__).parents[2]

CLOSE = dict(rtol=0, atol=1e-5)  # hidden states of scale 1, summed in another order
RATE = 16_000
SCENE = ROOT / "data_samples" / "scene.png"


@pytest.fixture(scope="module")
def omni(tiny_folder):
    """Random weights: every token changes all later states. Replies are short: none is checked."""
    torch.set_num_threads(1)
    return minomni.load(str(tiny_folder))


@pytest.fixture(scope="module")
def shipped():
    torch.set_num_threads(1)
    omni = minomni.load(str(ROOT / "data_samples" / "tiny"), dtype=torch.float32)
    omni.config = dataclasses.replace(
        omni.config,
        flow=dataclasses.replace(omni.config.flow, solver="euler", points=3),
        talker_sampling=dataclasses.replace(omni.config.talker_sampling, max_new_tokens=12),
    )
    return omni


def noise(seconds: float, loud_at: float | None = None) -> torch.Tensor:
    """Quiet noise that fades below 80 dB under its peak, and a loud tone at one time."""
    t = np.arange(int(seconds * RATE)) / RATE
    wave = (
        0.05
        * np.random.RandomState(0).randn(len(t))
        * (0.5 - 0.5 * np.cos(2 * np.pi * t / 1.1)) ** 8
    )
    if loud_at is not None:
        wave += 0.9 * np.sin(2 * np.pi * 440 * t) * (abs(t - loud_at) < 0.1)
    return torch.from_numpy(wave.astype(np.float32))


def clip_of(*seconds: float, size=(40, 60)) -> Clip:
    """One frame for each time."""
    frames = torch.from_numpy(
        np.random.RandomState(1).randint(0, 255, (len(seconds), *size, 3), np.uint8)
    )
    return Clip(frames, torch.tensor(seconds, dtype=torch.float32), None)


def prefill_at_once(omni, *messages, use_audio_in_video=False):
    """Prefill the whole prompt at once."""
    system = {"role": "system", "content": omni.config.media.system_prompt}
    inputs = Processor(omni.config, omni.tokenizer)([[system, *messages]], use_audio_in_video)
    with torch.no_grad():
        return omni.thinker.prefill(inputs, omni.thinker.model.new_cache())


def user(*content) -> dict:
    return {"role": "user", "content": list(content)}


def same(session, whole) -> None:
    reading = session.prefill
    assert reading.input_ids.tolist() == whole.input_ids.tolist()
    assert reading.position_ids.tolist() == whole.position_ids.tolist()
    torch.testing.assert_close(reading.hidden, whole.hidden, **CLOSE)
    torch.testing.assert_close(reading.text_embeds, whole.text_embeds, **CLOSE)
    for mine, theirs in zip(reading.cache.buffers, whole.cache.buffers, strict=True):
        for x, y in zip(mine, theirs, strict=True):
            torch.testing.assert_close(
                x[:, :, : session.length], y[:, :, : session.length], **CLOSE
            )


def split_at(wave: torch.Tensor, borders: str) -> list[torch.Tensor]:
    """Split a wave every so many samples, or at random places."""
    if borders == "anywhere":
        random = np.random.RandomState(2)
        cuts = sorted(random.randint(0, len(wave), 9))
        return list(torch.tensor_split(wave, cuts))
    return list(wave.split(int(borders)))


# ------------------------------------------------------------------ equal to the whole turn at once
@pytest.mark.parametrize("borders", ["160", "4801", "32000", "anywhere", "1000000"])
@pytest.mark.parametrize("seconds", [0.03, 2.0, 4.02, 5.37])
def test_audio_in_chunks_equals_audio_at_once(omni, seconds, borders):
    wave, session = noise(seconds), omni.listen()
    for chunk in split_at(wave, borders):
        session.add_audio(chunk)
    session.respond("what was said")
    same(session, prefill_at_once(omni, user({"audio": wave}, {"text": "what was said"})))


@pytest.fixture
def long_context(omni):
    """A narrow model with the context of the release."""
    text = dataclasses.replace(
        TINY.thinker.text,
        num_hidden_layers=2,
        max_position_embeddings=QWEN7B.thinker.text.max_position_embeddings,
    )
    audio = dataclasses.replace(TINY.thinker.audio, encoder_layers=1)
    vision = dataclasses.replace(TINY.thinker.vision, depth=1, fullatt_block_indexes=(0,))
    thinker = dataclasses.replace(TINY.thinker, text=text, audio=audio, vision=vision)
    torch.manual_seed(0)
    model = Omni(dataclasses.replace(TINY, thinker=thinker, media=QWEN7B.media)).eval()
    model.tokenizer = omni.tokenizer
    return model


@pytest.mark.slow
def test_twenty_minutes_in_parts_equal_one_prompt(long_context):
    wave = noise(20 * 60, loud_at=1.0)
    session = long_context.listen(speech=False)
    for chunk in wave.split(10 * RATE):
        session.add_audio(chunk)
    session.respond("what was said")
    assert 30_000 < session.length < 32_768
    same(session, prefill_at_once(long_context, user({"audio": wave}, {"text": "what was said"})))


@pytest.mark.slow
def test_three_minutes_of_film_in_parts_equal_one_prompt(long_context):
    """Two frames of the release's least size in a second, and sound: 169 tokens a second."""
    seconds = 185
    clip = clip_of(*(i / 2 for i in range(2 * seconds)))
    clip.wave = noise(seconds, loud_at=1.0)
    session = long_context.listen(speech=False)
    for second, chunk in enumerate(clip.wave.split(RATE)):
        for i in (2 * second, 2 * second + 1):
            session.add_frame(clip.frames[i].numpy(), i / 2)
        session.add_audio(chunk)
    session.respond("what happens")
    assert 30_000 < session.length < 32_768
    message = user({"video": clip}, {"text": "what happens"})
    same(session, prefill_at_once(long_context, message, use_audio_in_video=True))


@pytest.mark.parametrize("loud_at", [0.2, 2.5, 4.05, 5.3])
def test_a_new_peak_prefills_changed_parts_again(omni, loud_at):
    """The peak clips the whole log-mel, so a late peak changes earlier blocks below its 80 dB."""
    wave, session = noise(5.37, loud_at), omni.listen()
    tower = omni.thinker.audio_tower
    with mock.patch.object(tower, "forward", wraps=tower.forward) as forward:
        for chunk in wave.split(1600):
            session.add_audio(chunk)
        session.respond()
    # Three blocks, and again those before the peak.
    assert (forward.call_count > 3) == (loud_at > 2)
    same(session, prefill_at_once(omni, user({"audio": wave})))


TIMES = {
    "even": (0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5),
    "odd": (0, 0.4, 0.8, 1.9, 2.7),
    "pair": (0, 0.5),
    "one": (0,),
    "sparse": (0, 0.5, 7.1, 7.5, 7.9, 8.3),
    "late": (3, 3.5, 4, 6.5, 7.25),
}


@pytest.mark.parametrize("times", TIMES)
def test_frames_one_by_one_equal_a_clip(omni, times):
    clip, session = clip_of(*TIMES[times]), omni.listen()
    for frame, at in zip(clip.frames, TIMES[times], strict=True):
        session.add_frame(frame.numpy(), at)
    session.respond("what happens")
    same(session, prefill_at_once(omni, user({"video": clip}, {"text": "what happens"})))


@pytest.mark.parametrize("seconds", [0.5, 3.9, 4.61, 9.0])
@pytest.mark.parametrize("times", TIMES)
def test_audio_and_frames_are_interleaved_as_in_a_clip(omni, times, seconds):
    clip, session = clip_of(*TIMES[times]), omni.listen()
    clip.wave = noise(seconds, loud_at=0.3)
    begin, shown = TIMES[times][0], 0
    for step, chunk in enumerate(clip.wave.split(RATE // 10)):
        while shown < len(clip.frames) and TIMES[times][shown] - begin <= step / 10:
            session.add_frame(clip.frames[shown].numpy(), TIMES[times][shown])
            shown += 1
        session.add_audio(chunk)
    for i in range(shown, len(clip.frames)):
        session.add_frame(clip.frames[i].numpy(), TIMES[times][i])
    session.respond()
    same(session, prefill_at_once(omni, user({"video": clip}), use_audio_in_video=True))


def test_respond_encodes_only_the_last_block(omni):
    session, tower = omni.listen(), omni.thinker.audio_tower
    empty = session.length
    for chunk in noise(7.5, loud_at=0.3).split(1000):
        session.add_audio(chunk)
    before = session.length
    with mock.patch.object(tower, "forward", wraps=tower.forward) as forward:
        session.respond()
    assert forward.call_count == 1
    assert before == empty + 1 + 3 * 50
    assert session.length - before == 37 + 1 + len(
        session.processor.encode("<|im_end|>\n<|im_start|>assistant\n")
    )


# ---------------------------------------------------------------------------------- turn after turn
def reply_text(session, **options) -> str:
    *_, end = session.respond(**options)
    return end.reply.text


def test_second_turn_reuses_the_cache():
    """In float64, as trained weights amplify rounding: in float32 one of 14,464 states differed by
    1.07e-5.
    """
    shipped = minomni.load(str(ROOT / "data_samples" / "tiny"), dtype=torch.float64)
    question, session = ROOT / "data_samples" / "question.wav", shipped.listen(speech=False)
    wave = minomni.inputs.media.load_audio(question)
    session.add_audio(wave)
    answer = reply_text(session)
    cached, session_length = session.prefill.cache, session.length
    session.add_audio(wave)
    session.respond("say yes")
    assert session.prefill.cache is cached
    assert session.length > 2 * session_length - 40
    assert len(answer.split()) > 3
    same(
        session,
        prefill_at_once(
            shipped,
            user({"audio": wave}),
            {"role": "assistant", "content": answer},
            user({"audio": wave}, {"text": "say yes"}),
        ),
    )


def test_session_gives_the_reply_of_respond(shipped):
    wave = minomni.inputs.media.load_audio(ROOT / "data_samples" / "wish.wav")
    session = shipped.listen(voice="Karl")
    session.add_audio(wave)
    *_, end = session.respond(seed=3)
    reply = shipped.respond([user({"audio": wave})], voice="Karl", seed=3)
    assert end.reply.text == reply.text
    assert torch.equal(end.reply.codes, reply.codes)


@pytest.mark.parametrize("played_s", [0.0, 0.3, None])
@pytest.mark.parametrize("when", ["while it speaks", "after its end"])
def test_interrupt_keeps_the_played_text(shipped, played_s, when):
    session = shipped.listen()
    answer, sound_s, ended = "", 0.0, False
    for piece in session.respond("say the red circle is above the blue square"):
        answer += piece.text if isinstance(piece, TextChunk) else ""
        sound_s += len(piece.wave) / RATE if isinstance(piece, AudioChunk) else 0
        ended = isinstance(piece, ReplyDone)
        if when == "while it speaks" and sound_s > 0.3:
            break
    session.interrupt(played_s)
    words = answer.split()
    rate = len(words) / sound_s if ended else 4.0
    kept = (
        len(words)
        if ended and played_s is None
        else min(len(words), math.ceil((sound_s if played_s is None else played_s) * rate))
    )
    session.respond("say yes")
    same(
        session,
        prefill_at_once(
            shipped,
            user({"text": "say the red circle is above the blue square"}),
            {"role": "assistant", "content": " ".join(words[:kept])},
            user({"text": "say yes"}),
        ),
    )


def test_new_audio_interrupts_the_reply(shipped):
    session = shipped.listen()
    answer = session.respond("say the red circle")
    next(answer)
    session.add_audio(noise(0.1, loud_at=0.05))
    assert list(answer) == []
    session.respond()
    with pytest.raises(StopIteration):
        next(answer)


# ------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("chunk", "rate", "says"),
    [
        (torch.zeros(100), 24_000, "24000 Hz; expected 16000 Hz"),
        (torch.zeros(2, 100), RATE, r"shape \[2, 100\]"),
        (torch.zeros(100, dtype=torch.int16), RATE, "type int16; expected floats"),
        (torch.full((100,), torch.nan), RATE, "NaN or infinite"),
        (np.array(["loud"]), RATE, "expected numbers"),
        (torch.zeros(100), 1e30, "1e\\+30 Hz"),
        (torch.zeros(100), "fast", "'fast' Hz"),
        (torch.zeros(100), None, "None Hz"),
        (torch.zeros(100), 10**400, r"a chunk at 10+\.\.\.0+ Hz; expected 16000 Hz"),
        (torch.zeros(100), torch.ones(2), "a Tensor Hz"),
        (np.full(100, 3000.0), RATE, "as high as 3000"),
        ([[0.0], [0.0, 0.1]], RATE, "whose values cannot be read"),
        (None, RATE, "object"),
        (torch.zeros(100, device="meta"), RATE, "whose values cannot be read"),
        (np.zeros(100, complex), RATE, "complex128"),
        (np.broadcast_to(np.float32(0), 10**12), RATE, "the whole context holds 82 s"),
        ({"loud": 1}, RATE, "object"),
    ],
)
def test_bad_chunks_raise_and_change_nothing(omni, chunk, rate, says):
    session, wave = omni.listen(), noise(2.5)
    session.add_audio(wave[:20_000])
    with pytest.raises(UserError, match=says):
        session.add_audio(chunk, rate)
    session.add_audio(wave[20_000:])
    session.respond()
    same(session, prefill_at_once(omni, user({"audio": wave})))


def test_bad_frames_raise(omni):
    session, frame = omni.listen(), clip_of(0).frames[0].numpy()
    session.add_frame(frame, 1.0)
    for bad, at, says in (
        (frame, 1.0, "in order of time"),
        (frame, 0.5, "in order of time"),
        (frame, math.nan, "finite"),
        (frame, "soon", "at_seconds is 'soon'"),
        (frame, None, "None"),
        (frame, 1e9, "more than a day"),
        (frame[:20], 2.0, "60x20 pixels after 60x40"),
        (frame.astype(float), 2.0, "floats from 0 to"),
        (frame, 10**5000, "a very large number"),
    ):
        with pytest.raises(UserError, match=says):
            session.add_frame(bad, at)


def test_kinds_of_input_are_fixed_with_the_first_part(omni):
    session = omni.listen()
    session.add_audio(noise(3))
    with pytest.raises(UserError, match="began without frames"):
        session.add_frame(clip_of(0).frames[0].numpy(), 3.0)
    session.respond()
    for at in (0, 1, 2, 3):
        session.add_frame(clip_of(0).frames[0].numpy(), at)
    with pytest.raises(UserError, match="began without audio"):
        session.add_audio(noise(1))


def test_empty_and_silent_turns_are_refused(omni):
    session = omni.listen()
    empty = session.length
    with pytest.raises(UserError, match="the turn is empty"):
        session.respond()
    for silence, says in (
        (torch.zeros(5 * RATE), "the audio holds only silence"),
        (noise(0.01), "more than 20 ms"),
    ):
        session.add_audio(silence)
        with pytest.raises(UserError, match=says):
            session.respond()
        assert session.length == empty  # the turn was discarded
    session.add_audio(torch.zeros(3 * RATE))
    session.respond("say yes")  # silence with text is accepted
    same(
        session, prefill_at_once(omni, user({"audio": torch.zeros(3 * RATE)}, {"text": "say yes"}))
    )


def test_full_context_raises_and_bounds_memory(omni):
    session = omni.listen()

    def add_seconds(count: int) -> None:
        for _ in range(count):
            session.add_audio(noise(1))

    with pytest.raises(UserError, match="do not fit the context of 2048; begin a new session"):
        add_seconds(90)
    length = session.length
    with pytest.raises(UserError, match="do not fit the context"):
        session.add_audio(noise(1))
    assert length == session.length <= 2048
    with pytest.raises(UserError, match="do not fit the context"):
        session.respond()
    assert session.length < 100  # the turn that was too long was discarded
    session.add_audio(noise(1))
    session.respond()


@pytest.mark.parametrize("answered", [False, True])
def test_dropped_session_is_freed_at_once(shipped, answered):
    """Not only when Python next collects reference cycles: a minute of audio takes memory."""
    session = shipped.listen()
    session.add_audio(noise(2.5))
    if answered:
        list(session.respond())
    gone = weakref.ref(session.prefill.cache)
    gc.disable()
    del session
    gc.enable()
    assert gone() is None


def test_unknown_voice_and_missing_tokenizer_are_refused(omni, monkeypatch):
    with pytest.raises(UserError, match="unknown voice 'Zoe'"):
        omni.listen(voice="Zoe")
    monkeypatch.setattr(omni, "tokenizer", None)
    with pytest.raises(UserError, match="no tokenizer"):
        omni.listen()


def test_audio_of_any_float_type_is_accepted(omni):
    wave = noise(0.5)
    for chunk in (
        wave.double(),
        wave.bfloat16(),
        wave.clone().requires_grad_(),
        wave.numpy()[::-1],
        wave.tolist(),
    ):
        session = omni.listen()
        session.add_audio(chunk)
        session.respond()
        assert session.turn is None


def test_wrong_arguments_raise_and_keep_the_turn(omni):
    session = omni.listen()
    session.add_audio(noise(0.5))
    for arguments, says in (
        ({"text": 5}, "text is 5"),
        ({"seed": 2**70}, "seed is 1180591620717411303424"),
        ({"seed": 1.5}, "seed is 1.5"),
        ({"schedule": 5}, "schedule 5"),
        ({"flow": "x"}, "flow is 'x'"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"length": 5}, "unknown option 'length'"),
    ):
        with pytest.raises(UserError, match=says):
            session.respond(**arguments)
    session.respond(None, seed=None)  # None stands for the default
    same(session, prefill_at_once(omni, user({"audio": noise(0.5)})))
    for bad in ("long", math.nan, -1.0):
        with pytest.raises(UserError, match="played_s is"):
            session.interrupt(bad)
    with pytest.raises(UserError, match="system is 7"):
        omni.listen(system=7)


def test_session_takes_the_options_of_respond(omni):
    for most in (1, 3):
        session = omni.listen()
        *_, end = session.respond(
            "say a", max_new_tokens=most, talker_max_new_tokens=2, temperature=0.0
        )
        reply = omni.respond(
            [user({"text": "say a"})], max_new_tokens=most, talker_max_new_tokens=2, temperature=0.0
        )
        assert len(session.reply_ids) == most
        assert end.reply.text == reply.text
        assert end.reply.codes.tolist() == reply.codes.tolist()
        assert len(reply.codes) == (0 if most == 1 else 2)


def test_an_image_is_prefilled_as_in_a_whole_prompt(tiny_folder):
    omni = minomni.load(tiny_folder)
    picture = str(SCENE)
    session = omni.listen(speech=False)
    session.add_image(picture)
    session.end_turn("which shape is red", 0, None, None, {})
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "which shape is red"}]
    _, inputs = omni.prepare([{"role": "user", "content": content}], None, False, False)
    with torch.no_grad():
        whole = omni.thinker.prefill(inputs)
    assert session.prefill.input_ids.equal(whole.input_ids)
    assert session.prefill.position_ids.equal(whole.position_ids)
    torch.testing.assert_close(session.prefill.hidden, whole.hidden, **CLOSE)


def test_an_image_comes_before_the_audio_of_its_turn(tiny_folder):
    session = minomni.load(tiny_folder).listen(speech=False)
    session.add_audio(torch.randn(3_200) / 10)
    with pytest.raises(UserError, match="images first"):
        session.add_image(str(SCENE))


def test_steps_have_the_events_of_respond(tiny_folder):
    texts = []
    for steps in ("respond", "respond_steps"):
        session = minomni.load(tiny_folder).listen()
        events = list(getattr(session, steps)("red circle"))
        if steps == "respond_steps":
            assert None in events
        texts.append([type(event).__name__ for event in events if event is not None])
    assert texts[0] == texts[1]
