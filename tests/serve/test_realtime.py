"""/v1/realtime, driven by OpenAI's official client."""

import asyncio
import base64
import json
from functools import partial

import numpy as np
import pytest
from serving import (
    RATE,
    SAMPLES,
    SECONDS,
    Gate,
    base64_of,
    keep_first_answers,
    running,
    spoken,
)

from minomni.chat.session import Session
from minomni.serve import realtime
from minomni.serve.audio import AudioReceiver, encode
from minomni.serve.input_audio import MAX_IMAGES, MAX_SILENCE_S, SHORT_PADDING_MS
from minomni.serve.realtime_answer import Answer
from minomni.serve.vad import VadOptions, VoiceDetector

openai = pytest.importorskip("openai", reason="the openai client is not installed")

pytestmark = pytest.mark.slow
SENTENCE = "the red circle is above the blue square"
# A spoken request, and the sentence that it asks for.
WISH = "wish.wav"
WISHED = "the yellow square is left of the yellow cross"
SILENCE = bytes(2 * RATE)  # one second


def other_wish() -> tuple[str, str]:
    """Another spoken request, and the sentence that it asks for."""
    entries = json.loads((SAMPLES / "speech" / "index.json").read_text())
    entry = next(
        entry for entry in entries if entry["text"] == "say a red circle and a yellow circle"
    )
    return f"speech/{entry['file']}", entry["text"].removeprefix("say ")


def talk(server, conversation):
    """Run conversation(connection) with a connected client -> its result."""

    async def run():
        address = server.url.replace("http", "ws") + "/v1"
        async with (
            openai.AsyncOpenAI(
                base_url=f"{server.url}/v1", websocket_base_url=address, api_key="none"
            ) as client,
            client.realtime.connect(
                model="tiny", websocket_connection_options={"open_timeout": SECONDS}
            ) as connection,
        ):
            return await asyncio.wait_for(conversation(connection), SECONDS)

    return asyncio.run(run())


async def until(connection, kind: str) -> list:
    """The events up to the first one of a type."""
    events = []
    async for event in connection:
        events.append(event)
        if event.type == kind:
            return events
    raise AssertionError(f"closed before {kind}")


async def send_audio(connection, data: bytes):
    """Send samples in chunks of 100 ms."""
    for start in range(0, len(data), 4_800):
        chunk = base64.b64encode(data[start : start + 4_800]).decode()
        await connection.input_audio_buffer.append(audio=chunk)


async def add(connection, *content):
    item = {"type": "message", "role": "user", "content": list(content)}
    await connection.conversation.item.create(item=item)


def of_kind(events, kind: str) -> list:
    return [event for event in events if event.type == kind]


def samples_of(events) -> np.ndarray:
    """The audio of an answer, 16-bit."""
    deltas = of_kind(events, "response.output_audio.delta")
    return np.frombuffer(b"".join(base64.b64decode(event.delta) for event in deltas), "<i2")


def push_to_talk(**output) -> dict:
    return {"type": "realtime", "audio": {"input": {"turn_detection": None}}, **output}


def test_typed_question(server):
    async def conversation(connection):
        created = await until(connection, "session.created")
        assert created[-1].session.model == "tiny"
        await add(connection, {"type": "input_text", "text": f"say {SENTENCE}"})
        await connection.response.create()
        return await until(connection, "response.done")

    events = talk(server, conversation)
    words = "".join(e.delta for e in of_kind(events, "response.output_audio_transcript.delta"))
    assert words == SENTENCE
    assert np.abs(samples_of(events)).max() > 1000
    done = events[-1].response
    assert done.status == "completed"
    assert done.usage.output_token_details.audio_tokens > 0
    kinds = [event.type for event in events]
    assert kinds.index("response.created") < kinds.index("response.output_item.added")


def test_picture_and_push_to_talk(server):
    async def conversation(connection):
        await connection.session.update(session=push_to_talk(output_modalities=["text"]))
        image = f"data:image/png;base64,{base64_of('scene.png')}"
        await add(connection, {"type": "input_image", "image_url": image})
        await send_audio(connection, spoken())
        await connection.input_audio_buffer.commit()
        await connection.response.create()
        return await until(connection, "response.done")

    events = talk(server, conversation)
    assert len(of_kind(events, "input_audio_buffer.committed")) == 1
    (text,) = of_kind(events, "response.output_text.done")
    assert text.text == "the red circle is left of the black square"


def words(events, response_id: str) -> str:
    """The transcript of an answer."""
    deltas = of_kind(events, "response.output_audio_transcript.delta")
    return "".join(event.delta for event in deltas if event.response_id == response_id)


def test_open_microphone(server):
    """Two spoken requests, one after the other: each is answered with its own words."""
    name, sentence = other_wish()

    async def conversation(connection):
        found = []
        for recording in (WISH, name):
            await send_audio(connection, SILENCE + spoken(recording) + SILENCE)
            found.append(await until(connection, "response.done"))
        return found

    items = set()
    for events, expected in zip(talk(server, conversation), (WISHED, sentence), strict=True):
        (started,) = of_kind(events, "input_audio_buffer.speech_started")
        (stopped,) = of_kind(events, "input_audio_buffer.speech_stopped")
        (committed,) = of_kind(events, "input_audio_buffer.committed")
        assert words(events, events[-1].response.id) == expected
        assert started.item_id == stopped.item_id == committed.item_id
        items.add(started.item_id)
    assert len(items) == 2


def test_the_times_of_speech(server):
    """They count from the start of the conversation, as the client sent it."""

    async def conversation(connection):
        await send_audio(connection, SILENCE + spoken(WISH) + SILENCE)
        events = await until(connection, "input_audio_buffer.speech_stopped")
        return of_kind(events, "input_audio_buffer.speech_started")[0], events[-1]

    started, stopped = talk(server, conversation)
    length_ms = 1000 * len(spoken(WISH)) / 2 / RATE
    assert 1000 - 400 < started.audio_start_ms < 1000 + 400
    assert 1000 + length_ms - 400 < stopped.audio_end_ms < 1000 + length_ms + 700


def detection(**fields) -> dict:
    """A session with an open microphone."""
    source = {"turn_detection": {"type": "server_vad", **fields}}
    return {"type": "realtime", "output_modalities": ["text"], "audio": {"input": source}}


def test_an_open_microphone_that_does_not_answer_by_itself(server):
    """create_response: the client asks for the answer to a turn that was found."""

    async def conversation(connection):
        await connection.session.update(session=detection(create_response=False))
        await send_audio(connection, SILENCE + spoken(WISH) + SILENCE)
        events = await until(connection, "input_audio_buffer.committed")
        await connection.send({"type": "the.end"})
        events += await until(connection, "error")  # all of the audio was handled
        await connection.response.create()
        return events, await until(connection, "response.done")

    before, after = talk(server, conversation)
    assert of_kind(before, "response.created") == []
    assert of_kind(after, "response.output_text.done")[0].text == WISHED


def test_an_open_microphone_that_does_not_interrupt(server, monkeypatch):
    """interrupt_response: speech leaves the answer that runs alone."""
    keep_first_answers(monkeypatch)

    async def conversation(connection):
        await connection.session.update(session=detection(interrupt_response=False))
        await add(connection, {"type": "input_text", "text": f"say {SENTENCE}"})
        await connection.response.create()
        await until(connection, "response.output_text.delta")
        await send_audio(connection, SILENCE + spoken(WISH) + SILENCE)
        events = await until(connection, "input_audio_buffer.committed")
        await connection.response.cancel()
        return events + await until(connection, "response.done")

    events = talk(server, conversation)
    assert len(of_kind(events, "input_audio_buffer.speech_started")) == 1
    (done,) = of_kind(events, "response.done")
    assert done.response.status == "cancelled"
    assert done.response.status_details.reason == "client_cancelled"


def test_the_silence_that_ends_a_turn(server):
    """silence_duration_ms: a shorter pause does not end it."""

    async def conversation(connection):
        await connection.session.update(
            session=detection(silence_duration_ms=2000, create_response=False)
        )
        found = []
        for audio in (SILENCE + spoken(WISH) + SILENCE, 2 * SILENCE):
            await send_audio(connection, audio)
            await connection.send({"type": "the.end"})
            events = await until(connection, "error")
            found.append(len(of_kind(events, "input_audio_buffer.speech_stopped")))
        return found

    assert talk(server, conversation) == [0, 1]


@pytest.mark.parametrize("place", ["session", "response"])
def test_the_length_of_an_answer_is_limited(server, place):
    """It is then incomplete, and the client is told why."""

    async def conversation(connection):
        limit = {"max_output_tokens": 2}
        session = push_to_talk(**(limit if place == "session" else {}))
        await connection.session.update(session=session)
        await add(connection, {"type": "input_text", "text": f"say {SENTENCE}"})
        await connection.response.create(response=limit if place == "response" else {})
        return (await until(connection, "response.done"))[-1].response

    response = talk(server, conversation)
    assert response.usage.output_token_details.text_tokens == 2
    assert response.status == "incomplete"
    assert response.status_details.reason == "max_output_tokens"
    assert response.output[0].status == "incomplete"


def test_instructions(server, trained):
    """They take the place of the system message, until the first input."""
    text = "you know red circles"

    async def conversation(connection):
        await connection.session.update(session=push_to_talk(instructions=text))
        updated = (await until(connection, "session.updated"))[-1]
        await add(connection, {"type": "input_text", "text": f"say {SENTENCE}"})
        await connection.response.create(response={"output_modalities": ["text"]})
        done = (await until(connection, "response.done"))[-1].response
        await connection.session.update(session=push_to_talk(instructions="and blue ones"))
        error = (await until(connection, "error"))[-1].error
        return updated.session.instructions, done.usage.input_tokens, error.param

    session = trained.listen(None, False, text)
    list(session.respond(f"say {SENTENCE}"))
    assert talk(server, conversation) == (text, session.length, "session.instructions")
    assert session.length != plain_length(trained)


def plain_length(omni) -> int:
    """Tokens of the same question with the model's own system message."""
    session = omni.listen(None, False)
    list(session.respond(f"say {SENTENCE}"))
    return session.length


def test_too_many_images(server):
    """They are counted before they are decoded, and over all items of a turn."""
    uri = f"data:image/png;base64,{base64_of('color.png')}"
    image = {"type": "input_image", "image_url": uri}

    async def conversation(connection):
        for count in (MAX_IMAGES + 1, MAX_IMAGES, 1):
            await add(connection, *[image] * count)
        await connection.send({"type": "the.end"})
        events = []
        while not events or "the.end" not in events[-1].error.message:
            events += await until(connection, "error")
        return events

    events = talk(server, conversation)
    messages = [event.error.message for event in of_kind(events, "error")]
    assert messages[:-1] == 2 * [f"a turn has at most {MAX_IMAGES} images"]
    assert len(of_kind(events, "conversation.item.done")) == 1


def test_interruption(server, monkeypatch):
    """The second request interrupts the answer to the first one, and is answered with its own
    words.
    """
    keep_first_answers(monkeypatch)
    name, sentence = other_wish()

    async def conversation(connection):
        await send_audio(connection, SILENCE + spoken(WISH) + SILENCE)
        events = await until(connection, "response.output_audio.delta")
        item = events[-1].item_id
        again = spoken(name)
        await send_audio(connection, again[:RATE])  # half a second
        events += await until(connection, "input_audio_buffer.speech_started")
        await connection.conversation.item.truncate(item_id=item, content_index=0, audio_end_ms=300)
        await send_audio(connection, again[RATE:] + SILENCE)
        events += await until(connection, "response.done")
        return events + await until(connection, "response.done")

    events = talk(server, conversation)
    first, second = of_kind(events, "response.done")
    assert (first.response.status, second.response.status) == ("cancelled", "completed")
    assert len(of_kind(events, "input_audio_buffer.speech_started")) == 2
    assert len(of_kind(events, "conversation.item.truncated")) == 1
    assert WISHED.startswith(words(events, first.response.id))
    assert words(events, second.response.id) == sentence
    # No event of the first answer comes after its end.
    later = events[events.index(first) + 1 :]
    assert first.response.id not in [getattr(event, "response_id", None) for event in later]


def test_a_turn_equals_that_of_the_package(server, trained):
    """What the model gets from an open microphone is what listen() gets from the same audio."""
    audio = SILENCE + spoken(WISH) + SILENCE

    async def conversation(connection):
        await send_audio(connection, audio)
        return await until(connection, "response.done")

    events = talk(server, conversation)
    receiver = AudioReceiver()
    detector = VoiceDetector(VadOptions(prefix_padding_ms=SHORT_PADDING_MS))
    turn = [event.wave for event in detector.feed(receiver.feed(audio)) if hasattr(event, "wave")]
    session = trained.listen(next(iter(trained.voices)))
    session.add_audio(np.concatenate(turn))
    *_, reply = session.respond()
    usage = events[-1].response.usage
    details = usage.output_token_details
    assert details.text_tokens == len(session.reply_ids)
    assert details.audio_tokens == len(reply.reply.codes)
    assert usage.input_tokens == session.length
    assert usage.output_tokens == details.text_tokens + details.audio_tokens
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens
    wave = reply.reply.wave.numpy()
    if trained.sample_rate != RATE:
        import soxr

        wave = soxr.resample(wave, trained.sample_rate, RATE)
    assert samples_of(events) / 32768 == pytest.approx(wave, abs=1e-3)


def test_the_voice_of_the_session_and_of_an_answer(server, trained):
    """Each is the one that speaks: the audio is what the package makes in that voice."""
    session_voice, answer_voice = list(trained.voices)[1:3]

    async def conversation(connection):
        output = {"output": {"voice": session_voice}}
        await connection.session.update(session={"type": "realtime", "audio": output})
        found = []
        for response in ({}, {"audio": {"output": {"voice": answer_voice}}}, {}):
            await add(connection, {"type": "input_text", "text": f"say {SENTENCE}"})
            await connection.response.create(response=response)
            found.append(samples_of(await until(connection, "response.done")))
        return found

    of_session, of_answer, later = talk(server, conversation)
    for samples, voice in (
        (of_session, session_voice),
        (of_answer, answer_voice),
        (later, session_voice),
    ):
        *_, done = trained.listen(voice).respond(f"say {SENTENCE}")
        expected = np.frombuffer(encode(done.reply.wave, trained.sample_rate, "pcm16"), "<i2")
        assert samples / 32768 == pytest.approx(expected / 32768, abs=1e-3)
    assert len(of_session) != len(of_answer)


@pytest.mark.parametrize("trained_here", [True, False])
def test_earlier_turns(server, monkeypatch, trained_here):
    """They are part of the conversation, but not for models that were trained on single ones."""
    monkeypatch.setattr(server.server, "trained_here", trained_here)

    async def conversation(connection):
        counts = []
        for _ in range(2):
            await add(connection, {"type": "input_text", "text": f"say {SENTENCE}"})
            await connection.response.create(response={"output_modalities": ["text"]})
            done = (await until(connection, "response.done"))[-1].response
            counts.append((done.usage.input_tokens, done.usage.total_tokens))
        return counts

    (first, first_total), (second, _) = talk(server, conversation)
    if trained_here:
        assert second == first
    else:
        assert second > first_total


def test_only_what_was_heard_is_part_of_the_conversation(server, monkeypatch):
    """conversation.item.truncate takes the words of an answer that were not heard out of it."""
    monkeypatch.setattr(server.server, "trained_here", False)

    async def conversation(connection, end_ms):
        await add(connection, {"type": "input_text", "text": f"say {SENTENCE}"})
        await connection.response.create()
        done = (await until(connection, "response.done"))[-1].response
        item = done.output[0].id
        await connection.conversation.item.truncate(
            item_id=item, content_index=0, audio_end_ms=end_ms
        )
        await until(connection, "conversation.item.truncated")
        await add(connection, {"type": "input_text", "text": "say the digit is three"})
        await connection.response.create(response={"output_modalities": ["text"]})
        later = (await until(connection, "response.done"))[-1].response
        return done.usage.output_token_details.text_tokens, later.usage.input_tokens

    (_, nothing), (text_tokens, everything) = (
        talk(server, partial(conversation, end_ms=end_ms)) for end_ms in (0, 60_000)
    )
    assert everything - nothing == text_tokens - 1  # the one that ends it is always there


def test_speech_does_not_bring_back_what_was_truncated(server, monkeypatch):
    """The client has told that nothing was heard, and speaks once all could have been played."""
    monkeypatch.setattr(server.server, "trained_here", False)
    monkeypatch.setattr(Answer, "played_s", lambda answer, now: answer.audio_s)
    kept = record_played_ids(monkeypatch)

    async def conversation(connection):
        await send_audio(connection, SILENCE + spoken(WISH) + SILENCE)
        done = (await until(connection, "response.done"))[-1].response
        await connection.conversation.item.truncate(
            item_id=done.output[0].id, content_index=0, audio_end_ms=0
        )
        await send_audio(connection, SILENCE + spoken(other_wish()[0]) + SILENCE)
        await until(connection, "response.done")

    talk(server, conversation)
    assert kept == [[]]


def record_played_ids(monkeypatch) -> list[list[int]]:
    """What becomes part of the conversation of each answer."""
    kept = []
    played_ids = Session.played_ids

    def recorded(session):
        kept.append(played_ids(session))
        return kept[-1]

    monkeypatch.setattr(Session, "played_ids", recorded)
    return kept


@pytest.mark.parametrize("early", [True, False])
def test_speech_takes_what_was_not_played_out_of_the_conversation(server, monkeypatch, early):
    """Until the client tells how much was heard, the time since the first audio counts. Speech
    begins before the first sample was played (early), or after the last one.
    """
    monkeypatch.setattr(server.server, "trained_here", False)
    monkeypatch.setattr(Answer, "played_s", lambda answer, now: 0 if early else answer.audio_s)
    kept = record_played_ids(monkeypatch)

    async def conversation(connection):
        for name in (WISH, other_wish()[0]):
            await send_audio(connection, SILENCE + spoken(name) + SILENCE)
            await until(connection, "response.done")

    talk(server, conversation)
    assert len(kept) == 1
    assert bool(kept[0]) is not early


@pytest.mark.parametrize("silence_s", [0, 0.3, 1.5])
def test_silence_before_a_held_question(server, silence_s):
    """A person presses the button, and speaks a little later."""

    async def conversation(connection):
        await connection.session.update(session=push_to_talk(output_modalities=["text"]))
        await send_audio(connection, bytes(2 * int(silence_s * RATE)) + spoken(WISH))
        await connection.input_audio_buffer.commit()
        await connection.response.create()
        return await until(connection, "response.done")

    (text,) = of_kind(talk(server, conversation), "response.output_text.done")
    assert text.text == WISHED


def test_a_held_question_without_speech(server):
    """The model gets all of it, and says that it is only silence."""

    async def conversation(connection):
        await connection.session.update(session=push_to_talk(output_modalities=["text"]))
        await send_audio(connection, SILENCE)
        await connection.input_audio_buffer.commit()
        await connection.response.create()
        return await until(connection, "response.done")

    events = talk(server, conversation)
    assert events[-1].response.status == "failed"
    assert "only silence" in of_kind(events, "error")[0].error.message


def test_too_much_silence_before_a_held_question(server):
    """It is refused, so that it does not fill the memory; speech is heard after it is cleared."""

    async def conversation(connection):
        await connection.session.update(session=push_to_talk(output_modalities=["text"]))
        for _ in range(MAX_SILENCE_S + 1):
            await send_audio(connection, SILENCE)
        await connection.send({"type": "the.end"})
        refused = (await until(connection, "error"))[-1].error
        await connection.input_audio_buffer.clear()
        await send_audio(connection, spoken(WISH))
        await connection.input_audio_buffer.commit()
        await connection.response.create()
        return refused.message, await until(connection, "response.done")

    message, events = talk(server, conversation)
    assert f"no speech in {MAX_SILENCE_S} seconds" in message
    assert of_kind(events, "response.output_text.done")[0].text == WISHED


def test_audio_that_is_cleared_is_forgotten(server):
    """A picture that was given before stays."""

    async def conversation(connection):
        await connection.session.update(session=push_to_talk(output_modalities=["text"]))
        image = f"data:image/png;base64,{base64_of('scene.png')}"
        await add(connection, {"type": "input_image", "image_url": image})
        await send_audio(connection, spoken(WISH))
        await connection.input_audio_buffer.clear()
        await send_audio(connection, spoken())
        await connection.input_audio_buffer.commit()
        await connection.response.create()
        return await until(connection, "response.done")

    (text,) = of_kind(talk(server, conversation), "response.output_text.done")
    assert text.text == "the red circle is left of the black square"


def test_audio_of_an_item_is_no_audio_of_the_buffer(server):
    """It can be neither committed once more nor cleared."""

    async def conversation(connection):
        await connection.session.update(session=push_to_talk(output_modalities=["text"]))
        audio = base64.b64encode(spoken(WISH)).decode()
        await add(connection, {"type": "input_audio", "audio": audio})
        await connection.input_audio_buffer.commit()
        await connection.input_audio_buffer.clear()
        await connection.response.create()
        return await until(connection, "response.done")

    events = talk(server, conversation)
    (error,) = of_kind(events, "error")
    assert error.error.code == "input_audio_buffer_commit_empty"
    assert of_kind(events, "input_audio_buffer.committed") == []
    assert len(of_kind(events, "input_audio_buffer.cleared")) == 1
    items = of_kind(events, "conversation.item.added")
    assert [item.item.role for item in items].count("user") == 1
    (text,) = of_kind(events, "response.output_text.done")
    assert text.text == WISHED


def test_a_question_whose_answer_is_cancelled_before_it_begins(server, monkeypatch):
    """Its words still belong to the turn, as its audio would."""
    monkeypatch.setattr(server.server, "trained_here", False)

    async def conversation(connection):
        await connection.session.update(session=push_to_talk(output_modalities=["text"]))
        await until(connection, "session.updated")
        gate = Gate(server.server.worker)
        await add(connection, {"type": "input_text", "text": "say the red circle"})
        await connection.response.create()
        await connection.response.cancel()
        await add(connection, {"type": "input_text", "text": "is above the blue square"})
        await connection.response.create()
        await connection.send({"type": "the.end"})
        await until(connection, "error")  # all of it was handled
        gate.open()
        first = await until(connection, "response.done")
        return first, await until(connection, "response.done")

    first, second = talk(server, conversation)
    assert first[-1].response.status == "cancelled"
    (text,) = of_kind(second, "response.output_text.done")
    assert text.text == SENTENCE


def test_metadata_is_returned_with_the_answer(server):
    async def conversation(connection):
        await add(connection, {"type": "input_text", "text": f"say {SENTENCE}"})
        await connection.response.create(response={"metadata": {"question": "7"}})
        return await until(connection, "response.done")

    events = talk(server, conversation)
    assert of_kind(events, "response.created")[0].response.metadata == {"question": "7"}
    assert events[-1].response.metadata == {"question": "7"}


def test_much_input_is_slowed_down(server, monkeypatch):
    """A client that sends faster than the model reads waits; nothing is lost."""
    monkeypatch.setattr(realtime, "WAITING_BYTES", 10_000)
    most = []
    wait = realtime.Conversation.wait_for_worker

    async def recorded(conversation):
        most.append(conversation.waiting_bytes)
        await wait(conversation)
        assert conversation.waiting_bytes <= 10_000

    monkeypatch.setattr(realtime.Conversation, "wait_for_worker", recorded)

    async def conversation(connection):
        await connection.session.update(session=push_to_talk(output_modalities=["text"]))
        await send_audio(connection, spoken(WISH))
        await connection.input_audio_buffer.commit()
        await connection.response.create()
        return await until(connection, "response.done")

    (text,) = of_kind(talk(server, conversation), "response.output_text.done")
    assert text.text == WISHED
    assert max(most) < 30_000  # one chunk more


def test_too_much_input_behind_an_answer_is_refused(server, monkeypatch):
    monkeypatch.setattr(realtime, "MAX_WAITING_BYTES", 50_000)

    async def conversation(connection):
        await connection.session.update(session=push_to_talk(output_modalities=["text"]))
        await until(connection, "session.updated")
        gate = Gate(server.server.worker)
        await add(connection, {"type": "input_text", "text": f"say {SENTENCE}"})
        await connection.response.create()
        await send_audio(connection, spoken(WISH))
        refused = await until(connection, "error")
        gate.open()
        return refused[-1].error.code, await until(connection, "response.done")

    code, events = talk(server, conversation)
    assert code == "input_buffer_full"
    assert of_kind(events, "response.output_text.done")[0].text == SENTENCE


def test_a_second_commit_finds_the_buffer_empty(server):
    """It is an error, as is the first commit without audio. What was committed stays."""

    async def conversation(connection):
        await connection.session.update(session=push_to_talk(output_modalities=["text"]))
        await connection.input_audio_buffer.commit()
        events = await until(connection, "error")
        await send_audio(connection, spoken(WISH))
        await connection.input_audio_buffer.commit()
        await connection.input_audio_buffer.commit()
        events += await until(connection, "error")
        await connection.input_audio_buffer.clear()
        await connection.response.create()
        return events + await until(connection, "response.done")

    events = talk(server, conversation)
    errors = [event.error for event in of_kind(events, "error")]
    assert [error.code for error in errors] == 2 * ["input_audio_buffer_commit_empty"]
    assert {error.type for error in errors} == {"invalid_request_error"}
    assert len(of_kind(events, "input_audio_buffer.committed")) == 1
    assert len(of_kind(events, "input_audio_buffer.cleared")) == 1
    (text,) = of_kind(events, "response.output_text.done")
    assert text.text == WISHED


def test_a_conversation_ends_after_its_time(trained):
    async def conversation(connection):
        return [event async for event in connection]  # to its end

    with running(trained, session_s=0.5) as server:
        events = talk(server, conversation)
    assert [event.type for event in events] == ["session.created", "error"]
    assert events[-1].error.code == "session_expired"


def test_cancel(server, monkeypatch):
    keep_first_answers(monkeypatch, 2)

    async def conversation(connection):
        for _ in range(2):
            await add(connection, {"type": "input_text", "text": f"say {SENTENCE}"})
            await connection.response.create()
            await until(connection, "response.created")
            await connection.response.cancel()
            events = await until(connection, "response.done")
            assert events[-1].response.status == "cancelled"
        await connection.response.cancel()
        return await until(connection, "error")

    events = talk(server, conversation)
    assert events[-1].error.code == "response_cancel_not_active"


def test_a_camera_frame_is_read(server):
    """It adds tokens to those of the same question without it."""

    async def conversation(connection):
        await connection.session.update(session=push_to_talk(output_modalities=["text"]))
        counts = []
        for frames in (0, 1):
            for _ in range(frames):
                image = base64_of("scene.png")
                await connection.send({"type": "input_video_frame.append", "image": image})
            await send_audio(connection, spoken())
            await connection.input_audio_buffer.commit()
            await connection.response.create()
            done = (await until(connection, "response.done"))[-1]
            counts.append(done.response.usage.input_tokens)
        return counts

    without, with_frame = talk(server, conversation)
    assert with_frame > without


def test_the_times_of_camera_frames(server, monkeypatch):
    """A frame stands where the audio was when it came. Of many, four per second are kept."""
    times = []
    add_frame = Session.add_frame

    def recorded(session, frame, at_seconds):
        times.append(at_seconds)
        add_frame(session, frame, at_seconds)

    monkeypatch.setattr(Session, "add_frame", recorded)
    frame = {"type": "input_video_frame.append", "image": base64_of("scene.png")}
    audio = spoken(WISH)
    tenth = RATE // 10 * 2  # bytes of 100 ms

    async def conversation(connection):
        await connection.session.update(session=push_to_talk(output_modalities=["text"]))
        for part in range(15):
            await send_audio(connection, audio[part * tenth : (part + 1) * tenth])
            await connection.send(frame)
        await connection.input_audio_buffer.commit()
        await connection.response.create()
        return (await until(connection, "response.done"))[-1].response.status

    assert talk(server, conversation) == "completed"
    gaps = np.diff(times)
    assert len(times) >= 4
    assert 0.25 <= gaps.min() <= gaps.max() < 0.36


def test_items_name_the_item_before_them(server):
    """Questions, spoken ones too, and answers."""

    async def conversation(connection):
        await connection.session.update(session=push_to_talk(output_modalities=["text"]))
        await add(connection, {"type": "input_text", "text": f"say {SENTENCE}"})
        await connection.response.create()
        events = await until(connection, "response.done")
        await send_audio(connection, spoken(WISH))
        await connection.input_audio_buffer.commit()
        await connection.response.create()
        return events + await until(connection, "response.done")

    events = talk(server, conversation)
    for kind in ("conversation.item.added", "conversation.item.done"):
        items = of_kind(events, kind)
        assert len(items) == 4
        names = [None, *(item.item.id for item in items)]
        assert [item.previous_item_id for item in items] == names[:-1]
    (committed,) = of_kind(events, "input_audio_buffer.committed")
    assert committed.item_id == items[2].item.id
    assert committed.previous_item_id == items[1].item.id


def session_update(**fields) -> dict:
    return {"type": "session.update", "session": fields}


def item_create(**part) -> dict:
    item = {"type": "message", "role": "user", "content": [{"type": "input_text", **part}]}
    return {"type": "conversation.item.create", "item": item}


def response_create(**fields) -> dict:
    return {"type": "response.create", "response": fields}


TOOL = {"type": "function", "name": "f", "parameters": {}}
UNSUPPORTED = {
    "foo": {"type": "input_audio_buffer.clear", "foo": 1},
    "session.foo": session_update(foo=1),
    "session.tools": session_update(tools=[TOOL]),
    "session.modalities": session_update(modalities=["text"]),
    "session.voice": session_update(voice="Karl"),
    "session.turn_detection": session_update(turn_detection={"type": "server_vad"}),
    "session.audio.foo": session_update(audio={"foo": 1}),
    "session.audio.input.format": session_update(
        audio={"input": {"format": {"type": "audio/pcmu"}}}
    ),
    "session.audio.input.transcription": session_update(
        audio={"input": {"transcription": {"model": "whisper-1"}}}
    ),
    "session.audio.output.speed": session_update(audio={"output": {"speed": 1.5}}),
    "turn_detection.foo": session_update(audio={"input": {"turn_detection": {"foo": 1}}}),
    "model": session_update(model="gpt-realtime"),
    "item.content.foo": item_create(text="x", foo=1),
    "item.content.image_url": item_create(text="x", image_url="data:,"),
    "previous_item_id": {**item_create(text="x"), "previous_item_id": "item_of_no_one"},
    "content_index": {
        "type": "conversation.item.truncate",
        "item_id": "x",
        "content_index": 1,
        "audio_end_ms": 0,
    },
    "response.instructions": response_create(instructions="be brief"),
    "response.tools": response_create(tools=[TOOL]),
    "response.conversation": response_create(conversation="none"),
    "response.audio.output.speed": response_create(audio={"output": {"speed": 2}}),
    "response.audio.output.format": response_create(
        audio={"output": {"format": {"type": "audio/pcmu"}}}
    ),
}


def test_fields_that_would_be_ignored_are_named(server):
    async def conversation(connection):
        found = []
        for event in UNSUPPORTED.values():
            await connection.send(event)
            found.append((await until(connection, "error"))[-1].error.param)
        return found

    assert talk(server, conversation) == list(UNSUPPORTED)


def test_a_session_can_be_sent_back(server):
    """As it was described: its further fields ask for nothing."""

    async def conversation(connection):
        created = (await until(connection, "session.created"))[-1]
        session = created.session.to_dict()
        session["audio"]["input"]["noise_reduction"] = None
        await connection.send({"type": "session.update", "session": session})
        updated = (await until(connection, "session.updated"))[-1]
        return created.session.to_dict(), updated.session.to_dict()

    created, updated = talk(server, conversation)
    assert created == updated


def test_another_answer_is_not_cancelled(server, monkeypatch):
    keep_first_answers(monkeypatch)

    async def conversation(connection):
        await add(connection, {"type": "input_text", "text": f"say {SENTENCE}"})
        await connection.response.create()
        created = (await until(connection, "response.created"))[-1]
        await connection.response.cancel(response_id="resp_of_no_one")
        error = (await until(connection, "error"))[-1].error
        await connection.response.cancel(response_id=created.response.id)
        done = (await until(connection, "response.done"))[-1]
        return error.code, done.response.status

    assert talk(server, conversation) == ("response_cancel_not_active", "cancelled")


def test_wrong_events_are_answered_and_the_conversation_goes_on(server):
    wrong = [
        {"type": "session.close"},
        {"type": "input_audio_buffer.append", "audio": "&"},
        {"type": "input_audio_buffer.append"},
        {"type": "input_audio_buffer.append", "audio": "AAAA"},  # three bytes
        {"type": "input_audio_buffer.commit"},
        {"type": "input_video_frame.append", "image": "AAAA"},
        {"type": "conversation.item.create", "item": {"role": "system"}},
        {"type": "conversation.item.truncate", "item_id": "x", "audio_end_ms": 1},
        {"type": "session.update", "session": {"audio": {"output": {"voice": "alloy"}}}},
        {"type": "session.update", "session": {"audio": 3}},
        {"type": "response.create", "response": {"output_modalities": ["smell"]}},
        {"type": "response.create", "response": {"max_output_tokens": 0}},
        {"type": "response.create", "response": {"metadata": {"question": 7}}},
        {"type": "response.create", "response": {"metadata": {"question": "x" * 513}}},
        {
            "type": "response.create",
            "response": {"metadata": dict.fromkeys("abcdefghijklmnopq", "")},
        },
        item_create(text="x" * 200_001),
    ]

    async def conversation(connection):
        for event in wrong:
            await connection.send({**event, "event_id": "mine"})
            answer = await until(connection, "error")
            assert answer[-1].error.event_id == "mine"
        for text in ("no json", "[]", "{}", "[" * 100_000):
            await connection._connection.send(text)
            await until(connection, "error")
        await add(connection, {"type": "input_text", "text": f"say {SENTENCE}"})
        await connection.response.create(response={"output_modalities": ["text"]})
        return await until(connection, "response.done")

    events = talk(server, conversation)
    assert of_kind(events, "response.output_text.done")[0].text == SENTENCE
