"""/v1/realtime, driven by OpenAI's official client."""

import asyncio
import base64

import numpy as np
import pytest
import soundfile
from serving import SAMPLES, base64_of, load_tiny, running

openai = pytest.importorskip("openai", reason="the openai client is not installed")

pytestmark = pytest.mark.slow
SENTENCE = "the red circle is above the blue square"
RATE = 24_000
SECONDS = 300  # of patience with a slow machine


@pytest.fixture(scope="module")
def server():
    with running(load_tiny()) as made:
        yield made


def spoken(name: str = "question.wav") -> bytes:
    """A recording as pcm16 at 24 kHz."""
    import soxr

    wave, rate = soundfile.read(SAMPLES / name, dtype="float32")
    wave = soxr.resample(wave, rate, RATE)
    return np.rint(np.clip(wave, -1, 1) * 32767).astype("<i2").tobytes()


def talk(server, conversation):
    """Run conversation(connection) with a connected client -> its result."""

    async def run():
        address = server.url.replace("http", "ws") + "/v1"
        async with (
            openai.AsyncOpenAI(
                base_url=f"{server.url}/v1", websocket_base_url=address, api_key="none"
            ) as client,
            client.realtime.connect(model="tiny") as connection,
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
    sound = b"".join(
        base64.b64decode(e.delta) for e in of_kind(events, "response.output_audio.delta")
    )
    assert np.abs(np.frombuffer(sound, "<i2")).max() > 1000
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


def test_open_microphone_and_interruption(server):
    silence = bytes(2 * RATE)

    async def conversation(connection):
        image = f"data:image/png;base64,{base64_of('scene.png')}"
        await add(connection, {"type": "input_image", "image_url": image})
        await send_audio(connection, silence + spoken() + silence)
        first = await until(connection, "response.output_audio.delta")
        again = spoken()
        await send_audio(connection, again[:RATE])  # half a second
        interrupted = await until(connection, "input_audio_buffer.speech_started")
        item = of_kind(first, "response.output_audio.delta")[0].item_id
        await connection.conversation.item.truncate(item_id=item, content_index=0, audio_end_ms=300)
        await send_audio(connection, again[RATE:] + silence)
        first_id = of_kind(first, "response.created")[0].response.id
        rest = interrupted + await until(connection, "response.done")
        if rest[-1].response.id == first_id:
            rest += await until(connection, "response.done")
        return first, rest

    first, rest = talk(server, conversation)
    assert len(of_kind(first, "input_audio_buffer.speech_started")) == 1
    assert len(of_kind(first, "input_audio_buffer.speech_stopped")) == 1
    assert len(of_kind(rest, "input_audio_buffer.speech_started")) == 1
    statuses = [event.response.status for event in of_kind(rest, "response.done")]
    assert statuses[-1] == "completed"
    assert len(of_kind(rest, "conversation.item.truncated")) == 1
    # The tiny model is not trained on pictures of earlier turns: its words are not compared.
    assert of_kind(rest, "response.output_audio_transcript.done")[-1].transcript
    assert of_kind(rest, "response.output_audio.delta")


def test_cancel(server):
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


def test_wrong_events_are_answered_and_the_conversation_goes_on(server):
    wrong = [
        {"type": "session.close"},
        {"type": "input_audio_buffer.append", "audio": "&"},
        {"type": "input_audio_buffer.append"},
        {"type": "input_audio_buffer.commit"},
        {"type": "input_video_frame.append", "image": "AAAA"},
        {"type": "conversation.item.create", "item": {"role": "system"}},
        {"type": "conversation.item.truncate", "item_id": "x", "audio_end_ms": 1},
        {"type": "session.update", "session": {"audio": {"output": {"voice": "alloy"}}}},
        {"type": "session.update", "session": {"audio": 3}},
        {"type": "response.create", "response": {"output_modalities": ["smell"]}},
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
