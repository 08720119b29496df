"""/v1/chat/completions, /v1/audio/speech and /v1/audio/transcriptions."""

import asyncio
import base64
import json
import secrets
import time
from collections.abc import AsyncGenerator, Generator
from typing import TYPE_CHECKING

from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from minomni.chat.generate import reply_steps
from minomni.chat.reply import AudioChunk, Reply, ReplyDone, TextChunk, Timings
from minomni.chat.stream_options import LOW_LATENCY, StreamOptions, stream_options
from minomni.data.grammar import TRANSCRIBE
from minomni.inputs.prompt import Inputs
from minomni.serve.audio import MEDIA_TYPES, WIRE_RATE, AudioSender, encode, wav_header
from minomni.serve.chat_request import (
    MAX_TEXT,
    ChatRequest,
    parse_chat,
    parse_json,
    parse_speech,
    parse_transcription,
)
from minomni.serve.errors import ApiError, bad_request
from minomni.serve.response import Stream, until_disconnect, with_client
from minomni.serve.worker import Client, Task
from minomni.token2wav.voice import Voice

if TYPE_CHECKING:
    from minomni.omni import Omni
    from minomni.serve.app import Server

# OpenAI's clients expect a time until which the audio of an answer can be referred to. Nothing is
# stored here.
AUDIO_EXPIRES_S = 3600
STOPPED = ApiError(503, "the server stops")
END_OF_EVENTS = b"data: [DONE]\n\n"
# What the release's model is asked for a transcript (its cookbook).
RELEASE_TRANSCRIBE = "Transcribe the audio into text."


class Answer:
    """One request on its way to an answer."""

    def __init__(self, server: "Server", request: ChatRequest):
        self.server = server
        self.request = request
        self.ids: list[int] = []  # of the text
        self.prompt: Inputs | None = None
        self.created = int(time.time())
        name = secrets.token_hex(12)
        self.id = f"chatcmpl-{name}"
        self.audio_id = f"audio_{name}"

    async def begin(self, client: Client) -> Task:
        """Read the messages and queue the work. Raises UserError and ApiError."""
        request = self.request
        omni = self.server.omni
        options = stream_options(omni.config, request.seed, LOW_LATENCY, None, request.options)
        voice, inputs = await self.server.decode(
            omni.prepare,
            request.messages,
            request.voice,
            request.speech,
            request.use_audio_in_video,
        )
        self.prompt = inputs
        return client.submit(answer_steps(omni, inputs, voice, options, self.ids))

    def finish_reason(self) -> str:
        """Why the answer ended: by itself, or at the limit of its length."""
        im_end = self.server.omni.config.thinker.tokens.im_end
        return "stop" if self.ids and self.ids[-1] == im_end else "length"

    def usage(self, reply: Reply) -> dict:
        """Numbers of tokens. Those of speech are its codes."""
        assert self.prompt is not None
        tokens = self.server.omni.config.thinker.tokens
        prompt_ids = self.prompt.input_ids
        num_prompt = prompt_ids.numel()
        num_text = len(self.ids)
        num_codes = len(reply.codes)
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_text + num_codes,
            "total_tokens": num_prompt + num_text + num_codes,
            "prompt_tokens_details": {
                "audio_tokens": int((prompt_ids == tokens.audio).sum()),
                "image_tokens": int((prompt_ids == tokens.image).sum()),
                "cached_tokens": 0,
            },
            "completion_tokens_details": {"text_tokens": num_text, "audio_tokens": num_codes},
        }

    def head(self, kind: str) -> dict:
        """The fields that every object of an answer begins with."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.server.model_name,
        }


def answer_steps(
    omni: "Omni", inputs: Inputs, voice: Voice | None, options: StreamOptions, ids: list[int]
) -> Generator:
    """The steps of an answer: the prompt, then tokens, codes and chunks. The text's ids are
    appended to `ids`.
    """
    timings = Timings()
    timings.mark("input")
    prefill = omni.thinker.prefill(inputs, omni.thinker.model.new_cache(), timings.mark)
    yield None
    yield from reply_steps(omni, prefill, voice, options, timings, ids)


async def whole_reply(request: Request, answer: Answer, client: Client) -> Reply:
    """Compute all of an answer; the work ends where the client leaves. Raises UserError, and
    ApiError where a step failed.
    """
    async with until_disconnect(request, client):
        async for event in await answer.begin(client):
            if isinstance(event, ReplyDone):
                return event.reply
    raise STOPPED


@with_client
async def chat_completions(request: Request, server: "Server", client: Client) -> Response:
    """POST /v1/chat/completions."""
    body = await asyncio.to_thread(parse_json, await request.body())
    server.check_model(body.get("model"))
    answer = Answer(server, parse_chat(body))
    if answer.request.stream:
        chunks = chat_chunks(answer, await answer.begin(client))
        return Stream(chunks, server, client, "text/event-stream")
    reply = await whole_reply(request, answer, client)
    return JSONResponse(await asyncio.to_thread(completion, answer, reply))


def completion(answer: Answer, reply: Reply) -> dict:
    """A whole answer as an object of the API."""
    message: dict = {"role": "assistant", "content": reply.text, "refusal": None}
    if answer.request.speech:
        data = encode(reply.wave, reply.sample_rate, answer.request.format)
        message["content"] = None
        message["audio"] = {
            "id": answer.audio_id,
            "data": base64.b64encode(data).decode(),
            "expires_at": answer.created + AUDIO_EXPIRES_S,
            "transcript": reply.text,
        }
    choice = {
        "index": 0,
        "message": message,
        "finish_reason": answer.finish_reason(),
        "logprobs": None,
    }
    head = answer.head("chat.completion")
    return {**head, "choices": [choice], "usage": answer.usage(reply)}


class ChatChunks:
    """The objects of a streamed answer."""

    def __init__(self, answer: Answer):
        self.answer = answer
        self.head = answer.head("chat.completion.chunk")
        self.with_usage = answer.request.with_usage
        if self.with_usage:
            self.head["usage"] = None  # in all chunks but the last one
        self.sender: AudioSender | None = None
        if answer.request.speech:
            self.sender = AudioSender(answer.server.omni.sample_rate)

    def chunk(self, delta: dict, finish_reason: str | None = None) -> dict:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}
        return {**self.head, "choices": [choice]}

    def audio(self, **fields: object) -> dict:
        return self.chunk({"audio": {"id": self.answer.audio_id, **fields}})

    def audio_data(self, data: bytes) -> dict:
        return self.audio(data=base64.b64encode(data).decode())

    def first(self) -> dict:
        """The chunk before all others."""
        if self.sender is None:
            return self.chunk({"role": "assistant", "content": "", "refusal": None})
        audio = {"id": self.answer.audio_id, "transcript": ""}
        return self.chunk({"role": "assistant", "audio": audio})

    def of_event(self, event: TextChunk | AudioChunk | ReplyDone) -> list[dict]:
        """The chunks of an event."""
        if isinstance(event, TextChunk):
            if self.sender is None:
                return [self.chunk({"content": event.text})]
            return [self.audio(transcript=event.text)]
        if isinstance(event, AudioChunk):
            assert self.sender is not None
            return [self.audio_data(self.sender.feed(event.wave))]
        return self.last(event.reply)

    def last(self, reply: Reply) -> list[dict]:
        """The chunks after all events."""
        chunks = []
        if self.sender is not None:
            chunks.append(self.audio_data(self.sender.finish()))
            chunks.append(self.audio(expires_at=self.answer.created + AUDIO_EXPIRES_S))
        chunks.append(self.chunk({}, self.answer.finish_reason()))
        if self.with_usage:
            chunks.append({**self.head, "choices": [], "usage": self.answer.usage(reply)})
        return chunks


async def chat_chunks(answer: Answer, task: Task) -> AsyncGenerator[bytes]:
    """A streamed answer as server-sent events. An error is the last one before the end."""
    chunks = ChatChunks(answer)
    yield sse(chunks.first())
    is_complete = False
    try:
        async for event in task:
            for chunk in chunks.of_event(event):
                yield sse(chunk)
            is_complete = isinstance(event, ReplyDone)
        if not is_complete:
            raise STOPPED
    except ApiError as error:
        yield sse(error.body())
    yield END_OF_EVENTS


def sse(value: dict) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(value).encode() + b"\n\n"


# ------------------------------------------------------------------------------------------ audio


@with_client
async def speech(request: Request, server: "Server", client: Client) -> Response:
    """POST /v1/audio/speech: the model says a text. It is asked to, as in a conversation."""
    body = await asyncio.to_thread(parse_json, await request.body())
    server.check_model(body.get("model"))
    parsed = parse_speech(body)
    message = {"role": "user", "content": f"say {parsed.text}"}
    answer = Answer(server, ChatRequest([message], speech=True, voice=parsed.voice))
    media_type = MEDIA_TYPES[parsed.format]
    if parsed.format in ("pcm16", "wav"):
        chunks = speech_chunks(await answer.begin(client), server.omni.sample_rate, parsed.format)
        return Stream(chunks, server, client, media_type)
    reply = await whole_reply(request, answer, client)
    data = await asyncio.to_thread(encode, reply.wave, reply.sample_rate, parsed.format)
    return Response(data, media_type=media_type)


async def speech_chunks(task: Task, sample_rate: int, name: str) -> AsyncGenerator[bytes]:
    """Speech while it is generated. Raises ApiError where it fails, which breaks the response
    off: clients do not take it for complete.
    """
    if name == "wav":
        yield wav_header(WIRE_RATE)
    sender = AudioSender(sample_rate)
    async for event in task:
        if isinstance(event, AudioChunk):
            yield sender.feed(event.wave)
        elif isinstance(event, ReplyDone):
            yield sender.finish()
            return
    raise STOPPED


@with_client
async def transcriptions(request: Request, server: "Server", client: Client) -> Response:
    """POST /v1/audio/transcriptions: what the model writes down when it is asked to."""
    form = await transcription_form(request)
    server.check_model(form.get("model"))
    parsed = parse_transcription(form)
    content = [
        {"type": "audio", "audio": parsed.file},
        {"type": "text", "text": transcription_prompt(server.omni)},
    ]
    message = {"role": "user", "content": content}
    answer = Answer(server, ChatRequest([message], options=parsed.options))
    if parsed.stream:
        chunks = transcript_chunks(await answer.begin(client))
        return Stream(chunks, server, client, "text/event-stream")
    reply = await whole_reply(request, answer, client)
    if parsed.format == "text":
        return PlainTextResponse(reply.text + "\n")
    usage = answer.usage(reply)
    counts = {
        "type": "tokens",
        "input_tokens": usage["prompt_tokens"],
        "output_tokens": usage["completion_tokens"],
        "total_tokens": usage["total_tokens"],
    }
    return JSONResponse({"text": reply.text, "usage": counts})


async def transcription_form(request: Request) -> dict:
    """The fields of an upload; "file" is the recording's bytes. Raises ApiError without one."""
    media_type = request.headers.get("content-type", "").lower()
    if not media_type.startswith("multipart/form-data"):
        raise bad_request("expected multipart/form-data with a file")
    async with request.form(max_files=1, max_fields=32, max_part_size=MAX_TEXT) as form:
        file = form.get("file")
        if not isinstance(file, UploadFile):
            raise bad_request("file is missing: a recording", param="file")
        return {**form, "file": await file.read()}


def transcription_prompt(omni: "Omni") -> str:
    """How this model was trained to be asked for a transcript."""
    return TRANSCRIBE if omni.config.trained_here else RELEASE_TRANSCRIBE


async def transcript_chunks(task: Task) -> AsyncGenerator[bytes]:
    """A transcript as server-sent events. An error is the last one before the end."""
    is_complete = False
    try:
        async for event in task:
            if isinstance(event, TextChunk):
                yield sse({"type": "transcript.text.delta", "delta": event.text})
            elif isinstance(event, ReplyDone):
                is_complete = True
                yield sse({"type": "transcript.text.done", "text": event.reply.text})
        if not is_complete:
            raise STOPPED
    except ApiError as error:
        yield sse(error.body())
    yield END_OF_EVENTS
