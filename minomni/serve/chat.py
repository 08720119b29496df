"""/v1/chat/completions, /v1/audio/speech and /v1/audio/transcriptions."""

import asyncio
import base64
import json
import secrets
import time
from collections.abc import AsyncIterator, Generator
from typing import TYPE_CHECKING

from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from minomni.chat.generate import reply_steps
from minomni.chat.reply import AudioChunk, Reply, ReplyDone, TextChunk, Timings
from minomni.chat.stream_options import LOW_LATENCY, StreamOptions, stream_options
from minomni.data.grammar import TRANSCRIBE
from minomni.errors import quote
from minomni.inputs.prompt import Inputs
from minomni.serve.chat_request import (
    MAX_TEXT,
    ChatRequest,
    parse_chat,
    parse_format,
    parse_json,
    parse_voice,
    typed,
)
from minomni.serve.errors import ApiError, bad_request
from minomni.serve.response import Stream, until_disconnect
from minomni.serve.sound import MEDIA_TYPES, WIRE_RATE, WireAudio, encode, wav_header
from minomni.serve.worker import Client, Task
from minomni.token2wav.voice import Voice

if TYPE_CHECKING:
    from minomni.omni import Omni
    from minomni.serve.app import Server

AUDIO_STORED_S = 3600  # OpenAI's clients expect a time until which an answer's audio is kept
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
        self.name = f"chatcmpl-{secrets.token_hex(12)}"

    async def begin(self, client: Client) -> Task:
        """Read the messages and queue the work. Raises UserError and ApiError."""
        request = self.request
        omni = self.server.omni
        options = stream_options(omni.config, request.seed, LOW_LATENCY, None, request.options)
        # Decoding media is not the model's work and does not hold up the others' steps.
        voice, inputs = await asyncio.to_thread(
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
            "id": self.name,
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


async def whole_reply(task: Task) -> Reply:
    """The reply at the end of a task. Raises ApiError where the task failed."""
    reply = None
    async for event in task:
        if isinstance(event, ReplyDone):
            reply = event.reply
    if reply is None:
        raise ApiError(503, "the server stops")
    return reply


async def chat_completions(request: Request) -> Response:
    """POST /v1/chat/completions."""
    server: Server = request.app.state.server
    body = await asyncio.to_thread(parse_json, await request.body())
    server.check_model(body.get("model"))
    parsed = parse_chat(body)
    answer = Answer(server, parsed)
    client = server.take_client()
    if parsed.stream:
        try:
            task = await answer.begin(client)
        except BaseException:
            server.give_back(client)
            raise
        return Stream(chat_chunks(answer, task), server, client, "text/event-stream")

    async with server.released(client), until_disconnect(request, client):
        reply = await whole_reply(await answer.begin(client))
        message: dict = {"role": "assistant", "content": reply.text, "refusal": None}
        if parsed.speech:
            sound = await asyncio.to_thread(encode, reply.wave, reply.sample_rate, parsed.format)
            message["content"] = None
            message["audio"] = {
                "id": f"audio_{answer.name[9:]}",
                "data": base64.b64encode(sound).decode(),
                "expires_at": answer.created + AUDIO_STORED_S,
                "transcript": reply.text,
            }
        choice = {"index": 0, "message": message, "finish_reason": answer.finish_reason()}
        head = answer.head("chat.completion")
        return JSONResponse(
            {**head, "choices": [{**choice, "logprobs": None}], "usage": answer.usage(reply)}
        )


async def chat_chunks(answer: Answer, task: Task) -> AsyncIterator[bytes]:
    """A streamed answer as server-sent events."""
    head = answer.head("chat.completion.chunk")
    speech = answer.request.speech
    audio_id = f"audio_{answer.name[9:]}"
    usage = {"usage": None} if answer.request.with_usage else {}

    def chunk(delta: dict, finish_reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}
        return sse({**head, "choices": [choice], **usage})

    first: dict = {"role": "assistant", "content": "", "refusal": None}
    if speech:
        first = {"role": "assistant", "audio": {"id": audio_id, "transcript": ""}}
    yield chunk(first)
    wire = WireAudio(answer.server.omni.sample_rate) if speech else None
    try:
        async for event in task:
            if isinstance(event, TextChunk) and speech:
                yield chunk({"audio": {"id": audio_id, "transcript": event.text}})
            elif isinstance(event, TextChunk):
                yield chunk({"content": event.text})
            elif isinstance(event, AudioChunk) and wire is not None:
                data = base64.b64encode(wire.feed(event.wave)).decode()
                yield chunk({"audio": {"id": audio_id, "data": data}})
            elif isinstance(event, ReplyDone):
                if wire is not None:
                    rest = wire.feed(event.reply.wave[:0], last=True)
                    data = base64.b64encode(rest).decode()
                    yield chunk({"audio": {"id": audio_id, "data": data}})
                    expires = answer.created + AUDIO_STORED_S
                    yield chunk({"audio": {"id": audio_id, "expires_at": expires}})
                yield chunk({}, answer.finish_reason())
                if answer.request.with_usage:
                    yield sse({**head, "choices": [], "usage": answer.usage(event.reply)})
    except ApiError as error:
        yield sse(error.body())
    yield b"data: [DONE]\n\n"


def sse(value: dict) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(value).encode() + b"\n\n"


# ------------------------------------------------------------------------------------------ audio


async def speech(request: Request) -> Response:
    """POST /v1/audio/speech: the model says a text. It is asked to, as in a conversation."""
    server: Server = request.app.state.server
    body = parse_json(await request.body())
    body = {key: value for key, value in body.items() if value is not None}
    server.check_model(body.get("model"))
    known = {"model", "input", "voice", "response_format", "speed", "instructions", "stream_format"}
    for name in body:
        if name not in known:
            raise bad_request(f"unknown field {quote(name)}", param=str(name)[:60])
    text = body.get("input")
    if not isinstance(text, str) or not 0 < len(text.strip()) <= MAX_TEXT:
        raise bad_request("input is the text to say", param="input")
    if body.get("speed", 1) != 1:
        raise bad_request("speed is 1: this model has one", param="speed")
    if body.get("instructions"):
        raise bad_request("instructions are not supported; choose a voice", param="instructions")
    if body.get("stream_format", "audio") != "audio":
        raise bad_request("stream_format is audio", param="stream_format")
    name = parse_format(body.get("response_format", "mp3"))
    voice = parse_voice(typed(body, "voice", object, None))

    message = {"role": "user", "content": f"say {text.strip()}"}
    answer = Answer(server, ChatRequest([message], speech=True, voice=voice))
    client = server.take_client()
    if name in ("pcm16", "wav"):
        try:
            task = await answer.begin(client)
        except BaseException:
            server.give_back(client)
            raise
        chunks = sound_chunks(task, server.omni.sample_rate, name)
        return Stream(chunks, server, client, MEDIA_TYPES[name])
    async with server.released(client), until_disconnect(request, client):
        reply = await whole_reply(await answer.begin(client))
        sound = await asyncio.to_thread(encode, reply.wave, reply.sample_rate, name)
        return Response(sound, media_type=MEDIA_TYPES[name])


async def sound_chunks(task: Task, sample_rate: int, name: str) -> AsyncIterator[bytes]:
    """Raw audio while it is generated; an error ends it early."""
    if name == "wav":
        yield wav_header(WIRE_RATE)
    wire = WireAudio(sample_rate)
    async for event in task:
        if isinstance(event, AudioChunk):
            yield wire.feed(event.wave)
        elif isinstance(event, ReplyDone):
            yield wire.feed(event.reply.wave[:0], last=True)


async def transcriptions(request: Request) -> Response:
    """POST /v1/audio/transcriptions: what the model writes down when it is asked to."""
    server: Server = request.app.state.server
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise bad_request("expected multipart/form-data with a file")
    async with request.form(max_files=1, max_fields=32, max_part_size=MAX_TEXT) as form:
        server.check_model(form.get("model"))
        file = form.get("file")
        if not isinstance(file, UploadFile):
            raise bad_request("file is missing: a recording", param="file")
        recording = await file.read()
        shape = form.get("response_format", "json")
        streamed = form.get("stream") in ("true", "True", "1")
        temperature = form.get("temperature")
    if shape not in ("json", "text"):
        raise bad_request("response_format is json or text", param="response_format")
    options = {}
    if temperature is not None:
        options["temperature"] = parse_temperature(temperature)

    trained_here = server.omni.config.codec is not None
    request_text = TRANSCRIBE if trained_here else RELEASE_TRANSCRIBE
    content = [{"type": "audio", "audio": recording}, {"type": "text", "text": request_text}]
    messages = [{"role": "user", "content": content}]
    answer = Answer(server, ChatRequest(messages, options=options))
    client = server.take_client()
    if streamed:
        try:
            task = await answer.begin(client)
        except BaseException:
            server.give_back(client)
            raise
        return Stream(transcript_chunks(task), server, client, "text/event-stream")
    async with server.released(client), until_disconnect(request, client):
        reply = await whole_reply(await answer.begin(client))
        if shape == "text":
            return PlainTextResponse(reply.text + "\n")
        usage = answer.usage(reply)
        counts = {
            "type": "tokens",
            "input_tokens": usage["prompt_tokens"],
            "output_tokens": usage["completion_tokens"],
            "total_tokens": usage["total_tokens"],
        }
        return JSONResponse({"text": reply.text, "usage": counts})


def parse_temperature(text: object) -> float:
    """A number in a form. Raises ApiError."""
    try:
        return float(str(text))
    except ValueError:
        raise bad_request("temperature is no number", param="temperature") from None


async def transcript_chunks(task: Task) -> AsyncIterator[bytes]:
    """A transcript as server-sent events."""
    try:
        async for event in task:
            if isinstance(event, TextChunk):
                yield sse({"type": "transcript.text.delta", "delta": event.text})
            elif isinstance(event, ReplyDone):
                yield sse({"type": "transcript.text.done", "text": event.reply.text})
    except ApiError as error:
        yield sse(error.body())
    yield b"data: [DONE]\n\n"
