"""/v1/realtime: a conversation over a WebSocket, with the events of OpenAI's Realtime API (GA).

    client                                        server
    input_audio_buffer.append ...        ->       input_audio_buffer.speech_started, speech_stopped
    (or .commit and response.create)     <-       response.created, deltas of words and audio, done
    response.cancel, or just speak       <-       response.done, status cancelled
    conversation.item.truncate           ->       keep only what was heard

Audio is encoded while it arrives (chat/session.py). Two things are added to OpenAI's events:
input_video_frame.append {image} is a camera frame of the current turn, and `timings` in
response.done are the times of the steps.
"""

import asyncio
import io
from collections.abc import Awaitable, Callable, Coroutine, Generator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from starlette.websockets import WebSocket, WebSocketDisconnect

from minomni.chat.session import Session
from minomni.errors import UserError, quote
from minomni.inputs.image import load_image
from minomni.serve.audio import AudioReceiver
from minomni.serve.chat_request import (
    data_uri,
    parse_text,
    parse_voice,
    refuse_unsupported,
    typed,
)
from minomni.serve.errors import (
    INTERNAL,
    ApiError,
    bad_request,
    log_unexpected,
    of_user_error,
)
from minomni.serve.input_audio import Input, InputTurn
from minomni.serve.outbox import Outbox
from minomni.serve.realtime_answer import Answer
from minomni.serve.realtime_objects import (
    ITEM_FIELDS,
    PART_FIELDS,
    PCM,
    decode_base64,
    described_parts,
    new_id,
    parse_event,
    parse_max_tokens,
    parse_metadata,
    parse_response,
    parse_session,
    parse_turn_detection,
    user_item,
    whole_number,
)
from minomni.serve.vad import SpeechContinued, SpeechStarted, SpeechStopped
from minomni.serve.worker import Task

if TYPE_CHECKING:
    from minomni.serve.app import Server

FRAME_SIZE = (320, 240)  # pixels: camera frames are reduced to fit
IMAGE_SIZE = (2048, 2048)  # pixels: images are reduced to fit
MAX_PARTS = 64  # of an item
MAX_NAME = 64  # characters of an item's id
# Bytes of input that wait for the worker. Above the first number a client has to wait, too; above
# the second one its input is refused.
WAITING_BYTES = 4 * 2**20
MAX_WAITING_BYTES = 64 * 2**20
CALL_BYTES = 4096  # of a call without data
MAX_PLAYED_MS = 10**9
PROTOCOL = "realtime"


class Conversation:
    """One WebSocket: its session of the model, its microphone and its answers."""

    def __init__(self, websocket: WebSocket, server: "Server"):
        self.websocket = websocket
        self.server = server
        self.client = server.take_client()
        self.loop = asyncio.get_running_loop()
        self.outbox = Outbox(websocket, server.settings.send_s)
        self.id = new_id("sess")
        self.session: Session | None = None  # made by the worker, before the first input
        self.inputs: set[asyncio.Task] = set()  # inputs that wait for the worker
        self.waiting_bytes = 0  # the bytes of these inputs
        self.jobs: set[asyncio.Task] = set()  # tasks that send the events of answers
        self.turn = InputTurn(self.submit_to_worker, server.trained_here)

        # Settings of the session.
        omni = server.omni
        self.chosen_voice = None if omni.token2wav is None else next(iter(omni.voices), None)
        self.voice = self.chosen_voice  # None while answers are text only
        self.instructions: str | None = None
        self.max_tokens: int | None = None

        # The answers.
        self.running: Answer | None = None
        self.last: Answer | None = None  # the newest one

    # --------------------------------------------------------------------------------- connection
    async def run(self) -> None:
        """The whole conversation."""
        self.outbox.send("session.created", session=self.describe())
        sender = self.outbox.start()
        receiver = asyncio.ensure_future(self.receive_events())
        try:
            seconds = self.server.settings.session_s
            ended, _ = await asyncio.wait(
                [sender, receiver], timeout=seconds, return_when=asyncio.FIRST_COMPLETED
            )
            if not ended:
                message = f"a conversation lasts at most {seconds:.0f} seconds; begin a new one"
                self.outbox.send_error(ApiError(400, message, code="session_expired"))
                self.outbox.close()
                await asyncio.wait([sender])
        finally:
            self.server.give_back(self.client)
            tasks = (sender, receiver, *self.inputs, *self.jobs)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            with suppress(Exception):
                await asyncio.wait_for(self.websocket.close(), 1)

    async def receive_events(self) -> None:
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
                self.outbox.send_error(error, event)
            except UserError as error:
                self.outbox.send_error(of_user_error(error), event)
            except Exception as error:  # one event must not end the conversation
                log_unexpected("an event", error)
                self.outbox.send_error(INTERNAL, event)

    async def handle(self, event: dict) -> None:
        """Act on one event of the client. Raises ApiError and UserError."""
        handler = HANDLERS.get(event["type"])
        if handler is None:
            raise bad_request(f"the event {quote(event['type'])} is not known here", "type")
        refuse_unsupported(event, {"type", "event_id", *FIELDS[event["type"]]}, NEUTRAL_EVENT)
        await handler(self, event)
        # Other conversations get the event loop, however fast events arrive.
        await asyncio.sleep(0)
        await self.wait_for_worker()

    async def wait_for_worker(self) -> None:
        """Wait while much input waits, so that a fast client does not fill the memory.

        Input behind an answer is not waited for, as the client may want to cancel that answer.
        """
        while self.running is None and self.inputs and self.waiting_bytes > WAITING_BYTES:
            await asyncio.wait(self.inputs, return_when=asyncio.FIRST_COMPLETED)

    # ----------------------------------------------------------------------------------- settings
    async def update_session(self, event: dict) -> None:
        """session.update."""
        changes, source, output = parse_session(event)
        self.server.check_model(changes.get("model"))
        voice = parse_voice(output.get("voice"))
        if voice is not None:
            self.server.omni.voice(voice)  # raises UserError for an unknown one
            self.chosen_voice = voice
        if changes.get("instructions") is not None:
            self.set_instructions(parse_text(changes["instructions"], "session.instructions"))
        self.voice = self.voice_for(changes.get("output_modalities"), self.voice)
        if "max_output_tokens" in changes:
            self.max_tokens = parse_max_tokens(changes["max_output_tokens"])
        if "turn_detection" in source:
            self.turn.set_detection(
                parse_turn_detection(source["turn_detection"], self.turn.padding_ms)
            )
        self.outbox.send("session.updated", session=self.describe())

    def set_instructions(self, text: str) -> None:
        """Replace the system message. Raises ApiError after the first input."""
        if text == self.instructions:
            return
        if self.session is not None or self.inputs:
            raise bad_request(
                "instructions can be set before the first input", "session.instructions"
            )
        self.instructions = text

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

    def describe(self) -> dict:
        """The session as an object of the API."""
        detection = self.turn.detection
        described = None if detection is None else detection.describe()
        source = {"format": PCM, "turn_detection": described, "transcription": None}
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

    # --------------------------------------------------------------------------- the worker's work
    def model_session(self) -> Session:
        """The session of the model, made on first use. Runs in the worker.

        Models trained here answer worse after other turns: a typed request to say a sentence is
        right in 23 of 60 after a question about an image, and in all 60 alone
        (tests/measure_turns.py). Each turn of theirs is a session of its own.
        """
        is_over = self.session is not None and self.session.turn is None
        if self.session is None or (is_over and self.server.trained_here):
            self.session = self.server.omni.listen(None, False, self.instructions)
        return self.session

    def submit_to_worker(self, function: Input, num_bytes: int = 0) -> None:
        """Let the worker do something with the session of the model. An error is an event.

        Raises ApiError where too much waits behind an answer.
        """
        num_bytes += CALL_BYTES
        if self.waiting_bytes + num_bytes > MAX_WAITING_BYTES:
            raise ApiError(
                400,
                "too much input waits for the answer that runs; cancel it, or wait for its end",
                code="input_buffer_full",
            )

        def step() -> None:
            function(self.model_session())

        async def watch(task: Task) -> None:
            try:
                async for _ in task:
                    pass
            except ApiError as error:
                self.outbox.send_error(error)
            finally:
                self.waiting_bytes -= num_bytes

        self.waiting_bytes += num_bytes
        self.start(watch(self.client.call(step)), self.inputs)

    def start(self, coroutine: Coroutine, group: set[asyncio.Task]) -> None:
        """Run a coroutine beside the others; it is in the group until it ends."""

        def end(job: asyncio.Task) -> None:
            group.discard(job)
            error = None if job.cancelled() else job.exception()
            if isinstance(error, Exception):
                log_unexpected("a conversation", error)

        job = asyncio.ensure_future(coroutine)
        group.add(job)
        job.add_done_callback(end)

    # -------------------------------------------------------------------------------------- input
    async def append(self, event: dict) -> None:
        """input_audio_buffer.append."""
        data = decode_base64(event.get("audio"), "audio")
        if len(data) % 2:
            raise bad_request("audio has half a sample at its end; expected pcm16", "audio")
        for found in self.turn.feed(data):
            if isinstance(found, SpeechStarted):
                self.begin_speech(found)
            elif isinstance(found, SpeechContinued):
                self.turn.add_buffer_audio(found.wave)
            else:
                self.end_speech(found)

    def begin_speech(self, found: SpeechStarted) -> None:
        """The user begins to speak, and interrupts an answer that runs or plays."""
        detection = self.turn.detection
        assert detection is not None
        self.outbox.send(
            "input_audio_buffer.speech_started",
            audio_start_ms=found.at_ms,
            item_id=self.turn.item,
        )
        if self.last is not None and detection.interrupt_response:
            now = self.loop.time()
            played_s = self.last.played_s(now)
            is_playing = self.last.is_playing(now)
            if self.running is not None:
                self.cancel("turn_detected")
            # An estimate, until the client tells how much was heard.
            self.submit_to_worker(lambda session: session.interrupt(played_s))
            if is_playing:
                self.turn.hold()
        self.turn.add_buffer_audio(found.wave)

    def end_speech(self, found: SpeechStopped) -> None:
        """The user has spoken: the turn is complete."""
        detection = self.turn.detection
        assert detection is not None
        self.outbox.send(
            "input_audio_buffer.speech_stopped",
            audio_end_ms=found.at_ms,
            item_id=self.turn.item,
        )
        self.commit_audio()
        if detection.create_response and self.running is None:
            self.begin_answer({})

    async def commit(self, event: dict) -> None:
        """input_audio_buffer.commit: the audio so far becomes an item of the conversation."""
        if self.turn.detection is None:
            self.turn.finish_buffer()
        self.commit_audio()

    def commit_audio(self) -> None:
        """Complete the audio of the buffer. Raises ApiError where there is none."""
        item = self.turn.commit()
        previous = self.outbox.last_item
        self.outbox.send("input_audio_buffer.committed", item_id=item, previous_item_id=previous)
        self.send_item(item, [{"type": "input_audio", "transcript": None}])

    async def clear(self, event: dict) -> None:
        """input_audio_buffer.clear: forget the audio that is not committed."""
        self.turn.clear()
        self.outbox.send("input_audio_buffer.cleared")

    async def append_frame(self, event: dict) -> None:
        """input_video_frame.append: a camera frame. It counts where the user speaks."""
        data = decode_base64(event.get("image"), "image")
        image = await self.server.decode(read_image, io.BytesIO(data), FRAME_SIZE)
        self.turn.show(np.asarray(image))

    # -------------------------------------------------------------------------------------- items
    async def create_item(self, event: dict) -> None:
        """conversation.item.create: text, images and recordings of the user."""
        item = typed(event, "item", dict, {})
        refuse_unsupported(item, ITEM_FIELDS, where="item.")
        if event.get("previous_item_id") not in (None, self.outbox.last_item or "root"):
            raise bad_request("an item can be added at the end only", "previous_item_id")
        if item.get("type", "message") != "message" or item.get("role") != "user":
            raise bad_request("an item is a message of the user", "item")
        content = typed(item, "content", list, [])
        if not 0 < len(content) <= MAX_PARTS:
            raise bad_request(f"content is a list of 1 to {MAX_PARTS} parts", "item.content")

        # Images are counted before any is decoded, and all parts are checked before one is added.
        self.turn.check(content)
        actions = [await self.item_action(part) for part in content]
        for action in actions:
            action()
        name = item.get("id")
        if not isinstance(name, str) or len(name) > MAX_NAME:
            name = new_id("item")
        self.send_item(name, described_parts(content))

    async def item_action(self, part: object) -> Callable[[], None]:
        """What to do with one part of an item. Raises ApiError and UserError."""
        if not isinstance(part, dict):
            raise bad_request("a part of an item is no object", "item.content")
        kind = part.get("type")
        if isinstance(kind, str) and kind in PART_FIELDS:
            refuse_unsupported(part, PART_FIELDS[kind], where="item.content.")
        if kind == "input_text":
            text = parse_text(part.get("text"), "item.content")
            return lambda: self.turn.texts.append(text)
        if kind == "input_image":
            uri = data_uri({"image_url": part.get("image_url")}, "image_url")
            image = await self.server.decode(read_image, uri, IMAGE_SIZE)
            return lambda: self.turn.add_image(image)
        if kind == "input_audio":
            data = decode_base64(part.get("audio"), "audio")
            receiver = AudioReceiver()
            samples = receiver.feed(data[: len(data) // 2 * 2])
            samples = np.concatenate((samples, receiver.finish()))
            return lambda: self.turn.add_audio(samples)
        raise bad_request(
            f"a part of type {quote(kind)}; expected input_text, input_image or input_audio",
            "item.content",
        )

    def send_item(self, name: str, content: list[dict]) -> None:
        """Tell the client of a message of the user."""
        item = user_item(name, content)
        previous = self.outbox.send_added(item)
        self.outbox.send("conversation.item.done", item=item, previous_item_id=previous)

    async def truncate(self, event: dict) -> None:
        """conversation.item.truncate: only this much of the newest answer was heard."""
        last = self.last
        if last is None or event.get("item_id") != last.item:
            raise bad_request("only the newest answer can be truncated", "item_id")
        wrong = bad_request("audio_end_ms is a number of milliseconds", "audio_end_ms")
        end_ms = whole_number(event.get("audio_end_ms"), 0, MAX_PLAYED_MS, wrong)
        # Once the next turn has begun, the answer is part of the conversation.
        if self.turn.num_samples == 0 or self.turn.held is not None:
            self.submit_to_worker(lambda session: session.interrupt(end_ms / 1000))
        self.turn.release_held()
        last.audio_s = min(last.audio_s, end_ms / 1000)  # the rest is not played
        self.outbox.send(
            "conversation.item.truncated",
            item_id=last.item,
            content_index=0,
            audio_end_ms=end_ms,
        )

    # ------------------------------------------------------------------------------------ answers
    async def create_response(self, event: dict) -> None:
        """response.create."""
        if self.running is not None:
            raise ApiError(
                400,
                "an answer is running; cancel it, or wait for response.done",
                code="conversation_already_has_active_response",
            )
        if self.turn.speaking:
            self.turn.reset_detector()
        self.begin_answer(event)

    def begin_answer(self, event: dict) -> None:
        """Queue an answer to the current turn, as response.create asks."""
        omni = self.server.omni
        given, output = parse_response(event)
        voice = self.voice_for(given.get("output_modalities"), self.voice)
        if voice is not None and output.get("voice") is not None:
            voice = parse_voice(output["voice"])
            assert voice is not None
            omni.voice(voice)  # raises UserError for an unknown one
        max_tokens = self.max_tokens
        if "max_output_tokens" in given:
            max_tokens = parse_max_tokens(given["max_output_tokens"])
        metadata = parse_metadata(given.get("metadata"))
        self.turn.release_held()

        previous = self.last
        text = " ".join(self.turn.texts)
        end_id = omni.config.thinker.tokens.im_end
        answer = Answer(text, voice, metadata, omni.sample_rate, end_id)
        self.running = answer
        self.last = answer
        answer.task = self.client.submit(self.answer_steps(answer, previous, max_tokens))
        self.start(self.follow(answer, previous), self.jobs)
        self.turn.begin()

    def answer_steps(
        self, answer: Answer, previous: Answer | None, max_tokens: int | None
    ) -> Generator:
        """The steps of an answer. Runs in the worker."""
        session = self.model_session()
        # The answer before belongs to the conversation as far as it was heard, which depends on
        # whether that one was spoken: it is added before the voice changes.
        session.begin_turn()
        session.voice = None if answer.voice is None else self.server.omni.voice(answer.voice)
        # The question of an answer that was cancelled before it began is still part of the turn:
        # its audio is, too.
        if previous is not None and not previous.begun:
            answer.text = f"{previous.text} {answer.text}".strip()
        answer.begun = True
        steps = session.respond_steps(answer.text, max_new_tokens=max_tokens)
        answer.num_input = session.length
        answer.text_ids = session.reply_ids
        yield None
        yield from steps

    async def follow(self, answer: Answer, previous: Answer | None) -> None:
        """Send the events of an answer to its end."""
        await answer.follow(self.outbox, previous)
        if self.running is answer:
            self.running = None

    async def cancel_response(self, event: dict) -> None:
        """response.cancel."""
        if self.running is None:
            raise ApiError(400, "no answer is running", code="response_cancel_not_active")
        if event.get("response_id") not in (None, self.running.id):
            raise ApiError(400, "that answer is not running", code="response_cancel_not_active")
        self.cancel("client_cancelled")

    def cancel(self, reason: str) -> None:
        """Stop the answer that runs, before its next step."""
        answer = self.running
        assert answer is not None and answer.task is not None
        answer.cancel_reason = reason
        answer.task.cancelled = True
        self.running = None
        if self.server.trained_here:  # each of its questions stands by itself
            self.submit_to_worker(lambda session: forget(session, answer))


def forget(session: Session, answer: Answer) -> None:
    """Forget the question of an answer that was cancelled before it began."""
    if not answer.begun:
        answer.begun = True
        session.discard_turn()


def read_image(source: Any, size: tuple[int, int]) -> Image.Image:
    """An image from an open file or a data: URI, reduced to fit a size. Raises UserError."""
    image = load_image(source)
    image.thumbnail(size)
    return image


Handler = Callable[[Conversation, dict], Awaitable[None]]
HANDLERS: dict[str, Handler] = {
    "session.update": Conversation.update_session,
    "input_audio_buffer.append": Conversation.append,
    "input_audio_buffer.commit": Conversation.commit,
    "input_audio_buffer.clear": Conversation.clear,
    "input_video_frame.append": Conversation.append_frame,
    "conversation.item.create": Conversation.create_item,
    "conversation.item.truncate": Conversation.truncate,
    "response.create": Conversation.create_response,
    "response.cancel": Conversation.cancel_response,
}
# Event -> its fields.
FIELDS: dict[str, tuple] = {
    "session.update": ("session",),
    "input_audio_buffer.append": ("audio",),
    "input_audio_buffer.commit": (),
    "input_audio_buffer.clear": (),
    "input_video_frame.append": ("image",),
    "conversation.item.create": ("item", "previous_item_id"),
    "conversation.item.truncate": ("item_id", "audio_end_ms"),
    "response.create": ("response",),
    "response.cancel": ("response_id",),
}
NEUTRAL_EVENT: dict[str, tuple] = {"content_index": (0,)}  # an answer has one part


async def realtime(websocket: WebSocket) -> None:
    """The endpoint /v1/realtime."""
    server: Server = websocket.app.state.server
    server.check_model(websocket.query_params.get("model"))
    conversation = Conversation(websocket, server)  # raises ApiError where all sessions are in use
    try:
        offered = websocket.scope.get("subprotocols", [])
        await websocket.accept(PROTOCOL if PROTOCOL in offered else None)
        with suppress(WebSocketDisconnect):
            await conversation.run()
    finally:
        server.give_back(conversation.client)
