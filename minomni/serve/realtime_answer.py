"""One answer of a realtime conversation, and its events."""

import asyncio
import base64
from typing import Any

from minomni.chat.reply import AudioChunk, Reply, ReplyDone, TextChunk
from minomni.serve.audio import WIRE_RATE, AudioSender
from minomni.serve.errors import ApiError
from minomni.serve.outbox import Outbox
from minomni.serve.realtime_objects import PCM, new_id
from minomni.serve.worker import Task

# Steps whose times are in response.done.
TIMED_STEPS = ("encode", "prefill", "text", "code", "mel", "audio")


class Answer:
    """An answer that is computed, sent, or complete."""

    def __init__(
        self,
        text: str,
        voice: str | None,
        metadata: dict | None,
        sample_rate: int,
        end_id: int,
    ):
        self.id = new_id("resp")
        self.item = new_id("item")
        self.previous_item: str | None = None  # the item before it
        self.text = text  # of the question
        self.voice = voice  # None for text only
        self.metadata = metadata
        self.end_id = end_id  # of the token with which a text ends by itself
        self.task: Task | None = None
        self.transcript = ""
        self.cancel_reason: str | None = None
        self.sender = None if voice is None else AudioSender(sample_rate)
        self.first_audio_at: float | None = None  # on the event loop's clock
        self.audio_s = 0.0  # seconds of audio sent
        self.ended = asyncio.Event()  # whether its last event is queued
        # Set by the worker:
        self.begun = False  # whether the question was ended
        self.num_input = 0  # tokens of the conversation before the answer
        self.text_ids: list[int] = []  # of the answer, which grows

    def played_s(self, now: float) -> float:
        """Seconds of the audio that can have been played until now."""
        if self.first_audio_at is None:
            return 0.0
        return min(self.audio_s, now - self.first_audio_at)

    def is_playing(self, now: float) -> bool:
        """Whether the client still has audio to play."""
        return self.played_s(now) < self.audio_s

    # ----------------------------------------------------------------------------------- events
    async def follow(self, outbox: Outbox, previous: "Answer | None") -> None:
        """Turn the events of the task into those of the API, after all events of the previous
        answer.
        """
        assert self.task is not None
        try:
            if previous is not None:
                await previous.ended.wait()
            self.send_begin(outbox)
            reply: Reply | None = None
            failure: ApiError | None = None
            try:
                async for event in self.task:
                    # What was computed before the worker saw a cancellation is dropped.
                    if self.cancel_reason is None:
                        self.send_event(outbox, event)
                        if isinstance(event, ReplyDone):
                            reply = event.reply
            except ApiError as error:
                failure = error
            self.send_end(outbox, reply, failure)
        finally:
            self.ended.set()

    def send_begin(self, outbox: Outbox) -> None:
        """The events before the first word."""
        item = self.item_object("in_progress", [])
        outbox.send("response.created", response=self.response_object("in_progress"))
        outbox.send("response.output_item.added", response_id=self.id, output_index=0, item=item)
        self.previous_item = outbox.send_added(item)
        outbox.send("response.content_part.added", **self.address(), part=self.part())

    def send_event(self, outbox: Outbox, event: TextChunk | AudioChunk | ReplyDone) -> None:
        """The event of a chunk."""
        if isinstance(event, TextChunk):
            self.transcript += event.text
            outbox.send(f"response.{self.text_kind}.delta", **self.address(), delta=event.text)
        elif self.sender is None:
            return
        elif isinstance(event, AudioChunk):
            self.send_audio(outbox, self.sender.feed(event.wave))
        else:
            self.send_audio(outbox, self.sender.finish())

    def send_audio(self, outbox: Outbox, data: bytes) -> None:
        """The event of 16-bit samples."""
        if not data:
            return
        if self.first_audio_at is None:
            self.first_audio_at = asyncio.get_running_loop().time()
        self.audio_s += len(data) / 2 / WIRE_RATE
        text = base64.b64encode(data).decode()
        outbox.send("response.output_audio.delta", **self.address(), delta=text)

    def send_end(self, outbox: Outbox, reply: Reply | None, failure: ApiError | None) -> None:
        """The events after the last word."""
        status = "completed"
        details: dict | None = None
        if failure is not None and self.cancel_reason is None:
            status = "failed"
            fields = failure.body()["error"]
            error = {"type": fields["type"], "code": fields["code"]}
            details = {"type": "failed", "error": error}
        elif reply is None:
            status = "cancelled"
            details = {"type": "cancelled", "reason": self.cancel_reason}
        elif self.text_ids[-1:] != [self.end_id]:
            status = "incomplete"
            details = {"type": "incomplete", "reason": "max_output_tokens"}

        # The parts of the answer end from the innermost to the outermost.
        text_field = "text" if self.voice is None else "transcript"
        text = {text_field: self.transcript}
        outbox.send(f"response.{self.text_kind}.done", **self.address(), **text)
        if self.voice is not None:
            outbox.send("response.output_audio.done", **self.address())
        outbox.send("response.content_part.done", **self.address(), part=self.part())
        item_status = "completed" if status == "completed" else "incomplete"
        item = self.item_object(item_status, [self.part("output_")])
        outbox.send("response.output_item.done", response_id=self.id, output_index=0, item=item)
        outbox.send("conversation.item.done", item=item, previous_item_id=self.previous_item)

        done = self.response_object(status)
        done["output"] = [item]
        done["status_details"] = details
        if failure is not None and status == "failed":
            outbox.send_error(failure)
        if reply is not None:
            done["usage"] = self.usage(reply)
            done["timings"] = {step: reply.timings.first(step) for step in TIMED_STEPS}
        outbox.send("response.done", response=done)

    # ---------------------------------------------------------------------------------- objects
    @property
    def text_kind(self) -> str:
        return "output_text" if self.voice is None else "output_audio_transcript"

    def address(self) -> dict[str, Any]:
        """Which part of the conversation an event is about."""
        return {
            "response_id": self.id,
            "item_id": self.item,
            "output_index": 0,
            "content_index": 0,
        }

    def response_object(self, status: str) -> dict:
        return {
            "id": self.id,
            "object": "realtime.response",
            "status": status,
            "status_details": None,
            "output": [],
            "output_modalities": ["text"] if self.voice is None else ["audio"],
            "audio": {"output": {"format": PCM, "voice": self.voice}},
            "usage": None,
            "metadata": self.metadata,
        }

    def item_object(self, status: str, content: list[dict]) -> dict:
        """The item of the conversation that the answer is."""
        return {
            "id": self.item,
            "object": "realtime.item",
            "type": "message",
            "status": status,
            "role": "assistant",
            "content": content,
        }

    def part(self, prefix: str = "") -> dict:
        """The one part of the item: speech with its transcript, or text."""
        if self.voice is None:
            return {"type": f"{prefix}text", "text": self.transcript}
        return {"type": f"{prefix}audio", "transcript": self.transcript}

    def usage(self, reply: Reply) -> dict:
        """Numbers of tokens; those of speech are its codes."""
        num_text = len(self.text_ids)
        num_codes = len(reply.codes)
        return {
            "total_tokens": self.num_input + num_text + num_codes,
            "input_tokens": self.num_input,
            "output_tokens": num_text + num_codes,
            "output_token_details": {"text_tokens": num_text, "audio_tokens": num_codes},
        }
