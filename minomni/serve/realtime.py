"""/v1/realtime: a conversation over a WebSocket, with the events of OpenAI's Realtime API (GA).

    client                                        server
    input_audio_buffer.append ...        ->       input_audio_buffer.speech_started, speech_stopped
    (or .commit and response.create)     <-       response.created, deltas of words and sound, done
    response.cancel, or just speak       <-       response.done, status cancelled
    conversation.item.truncate           ->       keep only what was heard

Audio is encoded while it arrives (chat/session.py). Three things are added to OpenAI's events:
input_video_frame.append {image} is a camera frame of the current turn, `timings` in response.done
are the times of the steps, and `minomni` in session.created describes the model.
"""

import asyncio
import base64
import binascii
import io
import json
import secrets
from collections.abc import Callable, Generator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np
from starlette.websockets import WebSocket, WebSocketDisconnect

from minomni.chat.reply import AudioChunk, Reply, ReplyDone, TextChunk
from minomni.chat.session import Session
from minomni.config import INPUT_SAMPLE_RATE
from minomni.errors import UserError, quote
from minomni.inputs.image import load_image
from minomni.serve.chat_request import MAX_TEXT, data_uri, parse_voice, typed
from minomni.serve.errors import ApiError, bad_request, of_user_error
from minomni.serve.sound import WIRE_RATE, Microphone, WireAudio
from minomni.serve.vad import SpeechGoesOn, SpeechStarted, SpeechStopped, VadOptions, VoiceDetector
from minomni.serve.worker import Task

if TYPE_CHECKING:
    from minomni.serve.app import Server

MAX_PENDING = 16 * 2**20  # characters of events that a client has not read
# Seconds of speech that wait for the message how much of the interrupted answer was heard.
HOLD_S = 0.4
FRAME_SIZE = (320, 240)  # pixels: camera frames are reduced to fit
FRAMES_PER_S = 4.0  # camera frames that are kept
PCM = {"type": "audio/pcm", "rate": WIRE_RATE}
PROTOCOL = "realtime"


def new_id(kind: str) -> str:
    return f"{kind}_{secrets.token_hex(10)}"


class Response:
    """One answer of a conversation."""

    def __init__(self, voice: str | None):
        self.id = new_id("resp")
        self.item = new_id("item")
        self.speech = voice is not None
        self.voice = voice
        self.task: Task | None = None
        self.transcript = ""
        self.reason: str | None = None  # why it was cancelled
        self.first_audio_at: float | None = None  # on the event loop's clock
        self.audio_s = 0.0  # seconds of audio sent

    def played_s(self, now: float) -> float:
        """Seconds of the audio that can have been played until now."""
        if self.first_audio_at is None:
            return 0.0
        return min(self.audio_s, now - self.first_audio_at)


class Conversation:
    """One WebSocket: its session of the model, its microphone and its answers."""

    def __init__(self, websocket: WebSocket, server: "Server"):
        self.websocket = websocket
        self.server = server
        self.client = server.take_client()
        self.loop = asyncio.get_running_loop()
        self.id = new_id("sess")
        omni = server.omni
        self.voice: str | None = next(iter(omni.voices), None)
        if omni.token2wav is None:
            self.voice = None
        self.chosen_voice = self.voice  # also while answers are text only
        self.instructions: str | None = None
        self.max_tokens: int | None = None
        self.session: Session | None = None  # made by the worker, before the first input

        self.vad: VadOptions | None = VadOptions()
        self.create_response = True
        self.interrupt_response = True
        self.detector = VoiceDetector(self.vad)
        self.microphone = Microphone()
        self.input_item = new_id("item")
        self.turn_samples = 0  # of the current turn, at 16 kHz
        self.turn_text: list[str] = []
        self.held: list[np.ndarray] | None = None  # speech that waits, see HOLD_S
        self.frame: Any = None  # the newest camera frame outside of speech
        self.last_frame_s = -1.0

        self.response: Response | None = None  # the one that runs
        self.last: Response | None = None  # the newest one
        self.outbox: asyncio.Queue[str | None] = asyncio.Queue()
        self.pending = 0  # characters in the outbox
        self.jobs: set[asyncio.Task] = set()

    # ------------------------------------------------------------------------------------ sending
    def send(self, kind: str, **fields: Any) -> None:
        """Queue an event for the client."""
        text = json.dumps({"type": kind, "event_id": new_id("event"), **fields})
        self.pending += len(text)
        if self.pending > MAX_PENDING:
            self.outbox.put_nowait(None)
        self.outbox.put_nowait(text)

    def send_error(self, error: ApiError, event: object = None) -> None:
        """Tell the client that one of its events failed."""
        fields = error.body()["error"]
        event_id = event.get("event_id") if isinstance(event, dict) else None
        self.send("error", error={**fields, "event_id": event_id})

    async def sender(self) -> None:
        """Send the queued events; return where the client does not read them."""
        while (text := await self.outbox.get()) is not None:
            await asyncio.wait_for(self.websocket.send_text(text), self.server.settings.send_s)
            self.pending -= len(text)

    async def receiver(self) -> None:
        """Handle the client's events until it leaves."""
        while True:
            message = await self.websocket.receive()
            if message["type"] == "websocket.disconnect":
                return
            event: object = None
            try:
                event = parse_event(message.get("text"))
                await self.handle(event)
            except ApiError as error:
                self.send_error(error, event)
            except UserError as error:
                self.send_error(of_user_error(error), event)

    async def run(self) -> None:
        """The whole conversation."""
        self.send("session.created", session=self.describe())
        both = [asyncio.ensure_future(self.sender()), asyncio.ensure_future(self.receiver())]
        try:
            await asyncio.wait(
                both, timeout=self.server.settings.session_s, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            self.server.give_back(self.client)
            for task in (*both, *self.jobs):
                task.cancel()
            await asyncio.gather(*both, *self.jobs, return_exceptions=True)
            with suppress(Exception):
                await asyncio.wait_for(self.websocket.close(), 1)

    def watch(self, task: Task) -> None:
        """Report the errors of a task whose events do not matter."""

        async def follow() -> None:
            try:
                async for _ in task:
                    pass
            except ApiError as error:
                self.send_error(error)

        self.start(follow())

    def start(self, coroutine) -> None:
        job = asyncio.ensure_future(coroutine)
        self.jobs.add(job)
        job.add_done_callback(self.jobs.discard)

    # ------------------------------------------------------------------------------------- events
    async def handle(self, event: dict) -> None:
        """Act on one event of the client. Raises ApiError and UserError."""
        handler = HANDLERS.get(event["type"])
        if handler is None:
            raise bad_request(f"the event {quote(event['type'])} is not known here", "type")
        handler(self, event)
        # Other conversations get the event loop, however fast events arrive.
        await asyncio.sleep(0)

    def update_session(self, event: dict) -> None:
        """session.update."""
        changes = typed(event, "session", dict, {})
        if changes.get("type", "realtime") != "realtime":
            raise bad_request("session.type is realtime", "session.type")
        audio = typed(changes, "audio", dict, {})
        source = typed(audio, "input", dict, {})
        output = typed(audio, "output", dict, {})
        for side in (source, output):
            if side.get("format") not in (None, PCM, {"type": "audio/pcm"}):
                raise bad_request(f"format is {PCM}", "session.audio.format")

        voice = parse_voice(output.get("voice"))
        if voice is not None:
            self.server.omni.voice(voice)
            self.chosen_voice = voice
        instructions = typed(changes, "instructions", str, self.instructions)
        if instructions != self.instructions:
            if self.session is not None or len(instructions) > MAX_TEXT:
                raise bad_request(
                    "instructions can be set before the first input", "session.instructions"
                )
            self.instructions = instructions
        self.voice = self.voice_for(changes.get("output_modalities"), self.voice)
        if "max_output_tokens" in changes:
            self.max_tokens = parse_max_tokens(changes["max_output_tokens"])
        if "turn_detection" in source:
            self.set_turn_detection(source["turn_detection"])
        self.send("session.updated", session=self.describe())

    def voice_for(self, modalities: object, current: str | None) -> str | None:
        """The voice of answers in these modalities: none for text."""
        if modalities is None:
            return self.chosen_voice if current is not None else None
        if modalities == ["text"]:
            return None
        if modalities not in (["audio"], ["text", "audio"], ["audio", "text"]):
            raise bad_request('output_modalities are ["audio"] or ["text"]', "output_modalities")
        if self.chosen_voice is None:
            self.server.omni.choose_voice(None, speech=True)  # raises why there is none
        return self.chosen_voice

    def set_turn_detection(self, given: object) -> None:
        """Open microphone, or None for push to talk."""
        if given is None:
            self.vad = None
            return
        if not isinstance(given, dict) or given.get("type", "server_vad") != "server_vad":
            raise bad_request("turn_detection is null or of type server_vad", "turn_detection")
        options = VadOptions()
        for name, low, high in (
            ("threshold", 0.0, 1.0),
            ("prefix_padding_ms", 0, 2000),
            ("silence_duration_ms", 100, 5000),
        ):
            value = given.get(name)
            if value is None:
                continue
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not is_number or not low <= value <= high:
                raise bad_request(f"{name} is a number from {low} to {high}", name)
            setattr(options, name, value if name == "threshold" else int(value))
        self.create_response = typed(given, "create_response", bool, True)
        self.interrupt_response = typed(given, "interrupt_response", bool, True)
        self.vad = options
        self.detector = VoiceDetector(options)

    def describe(self) -> dict:
        """The session as an object of the API."""
        detection = None
        if self.vad is not None:
            detection = {
                "type": "server_vad",
                "threshold": self.vad.threshold,
                "prefix_padding_ms": self.vad.prefix_padding_ms,
                "silence_duration_ms": self.vad.silence_duration_ms,
                "create_response": self.create_response,
                "interrupt_response": self.interrupt_response,
            }
        source = {"format": PCM, "turn_detection": detection, "transcription": None}
        output = {"format": PCM, "voice": self.chosen_voice, "speed": 1.0}
        default_prompt = self.server.omni.config.media.system_prompt
        return {
            "type": "realtime",
            "object": "realtime.session",
            "id": self.id,
            "model": self.server.model_name,
            "output_modalities": ["text"] if self.voice is None else ["audio"],
            "instructions": self.instructions or default_prompt,
            "audio": {"input": source, "output": output},
            "max_output_tokens": self.max_tokens or "inf",
            "tools": [],
            "tool_choice": "none",
        }

    # -------------------------------------------------------------------------------------- input
    def call(self, function: Callable[[Session], Any]) -> None:
        """Let the worker do something with the session of the model."""

        def step() -> None:
            function(self.model_session())

        self.watch(self.client.call(step))

    def model_session(self) -> Session:
        """The session of the model, made on first use. Runs in the worker."""
        if self.session is None:
            self.session = self.server.omni.listen(None, False, self.instructions)
        return self.session

    def append(self, event: dict) -> None:
        """input_audio_buffer.append."""
        data = decode_base64(event.get("audio"), "audio")
        if len(data) % 2:
            raise bad_request("audio has half a sample at its end; expected pcm16", "audio")
        samples = self.microphone.feed(data)
        if self.vad is None:
            self.add_audio(samples)
            return
        for found in self.detector.feed(samples):
            if isinstance(found, SpeechStarted):
                self.begin_speech(found)
            elif isinstance(found, SpeechGoesOn):
                self.add_audio(found.wave)
            else:
                self.end_speech(found)

    def begin_speech(self, found: SpeechStarted) -> None:
        """The user begins to speak, and interrupts an answer that runs or plays."""
        self.send(
            "input_audio_buffer.speech_started",
            audio_start_ms=max(0, found.at_ms),
            item_id=self.input_item,
        )
        if self.last is not None and self.interrupt_response:
            played_s = self.last.played_s(self.loop.time())
            is_playing = played_s < self.last.audio_s
            if self.response is not None:
                self.cancel("turn_detected")
            self.call(lambda session: session.interrupt(played_s))
            if is_playing:
                self.held = []
        self.add_audio(found.wave)

    def end_speech(self, found: SpeechStopped) -> None:
        """The user has spoken: the turn is complete."""
        self.send(
            "input_audio_buffer.speech_stopped",
            audio_end_ms=found.at_ms,
            item_id=self.input_item,
        )
        self.commit({})
        if self.create_response and self.response is None:
            self.begin_response({})

    def add_audio(self, samples: np.ndarray) -> None:
        """Add audio [samples] at 16 kHz to the current turn."""
        if not len(samples):
            return
        if self.frame is not None and self.turn_samples == 0:
            self.add_frame(self.frame)
            self.frame = None
        self.turn_samples += len(samples)
        if self.held is not None:
            self.held.append(samples)
            if sum(map(len, self.held)) >= HOLD_S * INPUT_SAMPLE_RATE:
                self.release_held()
            return
        self.call(lambda session: session.add_audio(samples))

    def release_held(self) -> None:
        """Add the speech that waited for conversation.item.truncate."""
        held = self.held
        self.held = None
        if held:
            samples = np.concatenate(held)
            self.call(lambda session: session.add_audio(samples))

    def commit(self, event: dict) -> None:
        """input_audio_buffer.commit: the audio so far becomes an item of the conversation."""
        if self.turn_samples == 0:
            raise bad_request("the audio buffer is empty", "audio")
        self.release_held()
        self.send("input_audio_buffer.committed", item_id=self.input_item, previous_item_id=None)
        self.send_item(self.input_item, [{"type": "input_audio", "transcript": None}])
        self.input_item = new_id("item")
        self.last_frame_s = -1.0

    def clear(self, event: dict) -> None:
        """input_audio_buffer.clear."""
        self.held = None
        if self.turn_samples:
            self.call(lambda session: session.discard_turn())
        self.turn_samples = 0
        if self.vad is not None:
            self.detector = VoiceDetector(self.vad)
        self.send("input_audio_buffer.cleared")

    def append_frame(self, event: dict) -> None:
        """input_video_frame.append: a camera frame. It counts where the user speaks."""
        data = decode_base64(event.get("image"), "image")
        image = load_image(io.BytesIO(data))
        image.thumbnail(FRAME_SIZE)
        frame = np.asarray(image)
        if self.turn_samples == 0:
            self.frame = frame  # the first one of the next turn
        else:
            self.add_frame(frame)

    def add_frame(self, frame: np.ndarray) -> None:
        """Add a frame at the time of the audio so far."""
        at_s = self.turn_samples / INPUT_SAMPLE_RATE
        if at_s - self.last_frame_s < 1 / FRAMES_PER_S and self.last_frame_s >= 0:
            return
        self.last_frame_s = at_s
        self.call(lambda session: session.add_frame(frame, at_s))

    def create_item(self, event: dict) -> None:
        """conversation.item.create: text, pictures and recordings of the user."""
        item = typed(event, "item", dict, {})
        if item.get("type", "message") != "message" or item.get("role") != "user":
            raise bad_request("an item is a message of the user", "item")
        content = typed(item, "content", list, [])
        if not content or len(content) > 64:
            raise bad_request("content is a list of 1 to 64 parts", "item.content")
        actions = [self.item_action(part) for part in content]
        for action in actions:
            action()
        name = item.get("id")
        if not isinstance(name, str) or len(name) > 64:
            name = new_id("item")
        kinds = [{"type": part["type"]} for part in content]
        for kind, part in zip(kinds, content, strict=True):
            if part["type"] == "input_text":
                kind["text"] = part["text"]
        self.send_item(name, kinds)

    def item_action(self, part: object) -> Callable[[], None]:
        """What to do with one part of an item. Raises ApiError before anything is done."""
        if not isinstance(part, dict):
            raise bad_request("a part of an item is no object", "item.content")
        kind = part.get("type")
        if kind == "input_text":
            text = part.get("text")
            if not isinstance(text, str) or len(text) > MAX_TEXT:
                raise bad_request("input_text holds a string", "item.content")
            return lambda: self.turn_text.append(text)
        if kind == "input_image":
            uri = data_uri({"image_url": part.get("image_url")}, "image_url")
            image = load_image(uri)
            return lambda: self.call(lambda session: session.add_image(image))
        if kind == "input_audio":
            data = decode_base64(part.get("audio"), "audio")
            samples = Microphone().feed(data[: len(data) // 2 * 2])
            return lambda: self.add_audio(samples)
        raise bad_request(
            f"a part of type {quote(kind)}; expected input_text, input_image or input_audio",
            "item.content",
        )

    def send_item(self, name: str, content: list[dict], role: str = "user") -> None:
        """Tell the client of a complete item."""
        item = {
            "id": name,
            "object": "realtime.item",
            "type": "message",
            "status": "completed",
            "role": role,
            "content": content,
        }
        self.send("conversation.item.added", item=item, previous_item_id=None)
        self.send("conversation.item.done", item=item, previous_item_id=None)

    def truncate(self, event: dict) -> None:
        """conversation.item.truncate: only this much of the newest answer was heard."""
        last = self.last
        if last is None or event.get("item_id") != last.item:
            raise bad_request("only the newest answer can be truncated", "item_id")
        end_ms = event.get("audio_end_ms")
        if isinstance(end_ms, bool) or not isinstance(end_ms, int) or not 0 <= end_ms < 10**9:
            raise bad_request("audio_end_ms is a number of milliseconds", "audio_end_ms")
        if self.turn_samples == 0 or self.held is not None:
            self.call(lambda session: session.interrupt(end_ms / 1000))
        self.release_held()
        self.send(
            "conversation.item.truncated",
            item_id=last.item,
            content_index=0,
            audio_end_ms=end_ms,
        )

    # ------------------------------------------------------------------------------------ answers
    def create(self, event: dict) -> None:
        """response.create."""
        if self.response is not None:
            raise ApiError(
                400,
                "an answer is running; cancel it, or wait for response.done",
                code="conversation_already_has_active_response",
            )
        if self.vad is not None and self.detector.speaking:
            self.detector = VoiceDetector(self.vad)
        self.begin_response(typed(event, "response", dict, {}))

    def begin_response(self, given: dict) -> None:
        """Queue an answer to the current turn."""
        output = typed(typed(given, "audio", dict, {}), "output", dict, {})
        voice = self.voice_for(given.get("output_modalities"), self.voice)
        if voice is not None and output.get("voice") is not None:
            voice = parse_voice(output["voice"])
            assert voice is not None
            self.server.omni.voice(voice)
        max_tokens = self.max_tokens
        if "max_output_tokens" in given:
            max_tokens = parse_max_tokens(given["max_output_tokens"])
        self.release_held()

        response = Response(voice)
        text = " ".join(self.turn_text)
        self.turn_text = []
        self.turn_samples = 0
        self.frame = None
        self.response = response
        self.last = response
        response.task = self.client.submit(self.answer_steps(text, voice, max_tokens))
        self.start(self.follow(response))

    def answer_steps(self, text: str, voice: str | None, max_tokens: int | None) -> Generator:
        """The steps of an answer. Runs in the worker."""
        session = self.model_session()
        session.voice = None if voice is None else self.server.omni.voice(voice)
        steps = session.respond_steps(text, max_new_tokens=max_tokens)
        yield None
        yield from steps

    def cancel_event(self, event: dict) -> None:
        """response.cancel."""
        if self.response is None:
            raise ApiError(400, "no answer is running", code="response_cancel_not_active")
        self.cancel("client_cancelled")

    def cancel(self, reason: str) -> None:
        """Stop the answer that runs, before its next step."""
        response = self.response
        assert response is not None and response.task is not None
        response.reason = reason
        response.task.cancelled = True
        self.response = None

    async def follow(self, response: Response) -> None:
        """Turn the events of an answer into those of the API."""
        self.send("response.created", response=response_object(response, "in_progress"))
        item = answer_item(response, "in_progress")
        place: dict = {"response_id": response.id, "item_id": response.item}
        place |= {"output_index": 0, "content_index": 0}
        part = content_part(response, "")
        self.send("response.output_item.added", response_id=response.id, output_index=0, item=item)
        self.send("conversation.item.added", item=item, previous_item_id=None)
        self.send("response.content_part.added", **place, part=part)
        text_kind = "output_audio_transcript" if response.speech else "output_text"
        wire = WireAudio(self.server.omni.sample_rate) if response.speech else None

        def send_sound(data: bytes) -> None:
            if not data or response.reason is not None:
                return
            if response.first_audio_at is None:
                response.first_audio_at = self.loop.time()
            response.audio_s += len(data) / 2 / WIRE_RATE
            text = base64.b64encode(data).decode()
            self.send("response.output_audio.delta", **place, delta=text)

        reply: Reply | None = None
        failure: ApiError | None = None
        assert response.task is not None
        try:
            async for event in response.task:
                if response.reason is not None:
                    continue  # computed before the worker saw that it is cancelled
                if isinstance(event, TextChunk):
                    response.transcript += event.text
                    self.send(f"response.{text_kind}.delta", **place, delta=event.text)
                elif isinstance(event, AudioChunk) and wire is not None:
                    send_sound(wire.feed(event.wave))
                elif isinstance(event, ReplyDone):
                    reply = event.reply
                    if wire is not None:
                        send_sound(wire.feed(reply.wave[:0], last=True))
        except ApiError as error:
            failure = error
        self.end_response(response, reply, failure, place, text_kind)

    def end_response(
        self,
        response: Response,
        reply: Reply | None,
        failure: ApiError | None,
        place: dict,
        text_kind: str,
    ) -> None:
        """Send the last events of an answer."""
        status = "completed"
        if response.reason is not None or (reply is None and failure is None):
            status = "cancelled"
        elif failure is not None:
            status = "failed"
        text_field = "transcript" if response.speech else "text"
        self.send(f"response.{text_kind}.done", **place, **{text_field: response.transcript})
        if response.speech:
            self.send("response.output_audio.done", **place)
        self.send("response.content_part.done", **place, part=content_part(response, None))
        item_status = "completed" if status == "completed" else "incomplete"
        item = answer_item(response, item_status)
        self.send("response.output_item.done", response_id=response.id, output_index=0, item=item)
        self.send("conversation.item.done", item=item, previous_item_id=None)

        done = response_object(response, status)
        done["output"] = [item]
        if status == "cancelled":
            done["status_details"] = {"type": "cancelled", "reason": response.reason}
        if failure is not None:
            error = {"type": "invalid_request_error", "code": failure.code}
            done["status_details"] = {"type": "failed", "error": error}
            self.send_error(failure)
        if reply is not None and self.session is not None:
            done["usage"] = usage_of(self.session, reply)
            done["timings"] = {
                step: reply.timings.first(step)
                for step in ("encode", "prefill", "text", "code", "mel", "audio")
            }
        if self.response is response:
            self.response = None
        self.send("response.done", response=done)


def usage_of(session: Session, reply: Reply) -> dict:
    """Numbers of tokens of an answer; those of speech are its codes."""
    num_text = len(session.reply_ids)
    num_codes = len(reply.codes)
    return {
        "total_tokens": session.length + num_text + num_codes,
        "input_tokens": session.length,
        "output_tokens": num_text + num_codes,
        "output_token_details": {"text_tokens": num_text, "audio_tokens": num_codes},
    }


def response_object(response: Response, status: str) -> dict:
    """A response as an object of the API."""
    return {
        "id": response.id,
        "object": "realtime.response",
        "status": status,
        "status_details": None,
        "output": [],
        "output_modalities": ["audio"] if response.speech else ["text"],
        "audio": {"output": {"format": PCM, "voice": response.voice}},
        "usage": None,
        "metadata": None,
    }


def answer_item(response: Response, status: str) -> dict:
    """The item of the conversation that an answer is."""
    content = [] if status == "in_progress" else [content_part(response, None, "output_")]
    return {
        "id": response.item,
        "object": "realtime.item",
        "type": "message",
        "status": status,
        "role": "assistant",
        "content": content,
    }


def content_part(response: Response, text: str | None, prefix: str = "") -> dict:
    """The one part of an answer: speech with its transcript, or text."""
    if text is None:
        text = response.transcript
    if response.speech:
        return {"type": f"{prefix}audio", "transcript": text}
    return {"type": f"{prefix}text", "text": text}


def parse_event(text: object) -> dict:
    """A message of the client. Raises ApiError unless it is a JSON object with a type."""
    if not isinstance(text, str):
        raise bad_request("expected JSON as text, not binary data")
    try:
        event = json.loads(text)
    except (ValueError, RecursionError):
        raise bad_request("the message is not JSON") from None
    if not isinstance(event, dict) or not isinstance(event.get("type"), str):
        raise bad_request("an event is a JSON object with a type", "type")
    return event


def parse_max_tokens(value: object) -> int | None:
    """max_output_tokens: a number, or "inf" for the model's own limit."""
    if value in (None, "inf"):
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= 10**6:
        raise bad_request('max_output_tokens is a number from 1, or "inf"', "max_output_tokens")
    return value


def decode_base64(text: object, name: str) -> bytes:
    """Bytes in base64. Raises ApiError for anything else."""
    if not isinstance(text, str):
        raise bad_request(f"{name} is missing; expected base64", name)
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise bad_request(f"{name} is not base64", name) from None


HANDLERS: dict[str, Callable[[Conversation, dict], None]] = {
    "session.update": Conversation.update_session,
    "input_audio_buffer.append": Conversation.append,
    "input_audio_buffer.commit": Conversation.commit,
    "input_audio_buffer.clear": Conversation.clear,
    "input_video_frame.append": Conversation.append_frame,
    "conversation.item.create": Conversation.create_item,
    "conversation.item.truncate": Conversation.truncate,
    "response.create": Conversation.create,
    "response.cancel": Conversation.cancel_event,
}


async def realtime(websocket: WebSocket) -> None:
    """The endpoint /v1/realtime."""
    server: Server = websocket.app.state.server
    server.check_model(websocket.query_params.get("model"))
    conversation = Conversation(websocket, server)  # raises ApiError where all slots are taken
    try:
        offered = websocket.scope.get("subprotocols", [])
        await websocket.accept(PROTOCOL if PROTOCOL in offered else None)
        with suppress(WebSocketDisconnect):
            await conversation.run()
    finally:
        server.give_back(conversation.client)
