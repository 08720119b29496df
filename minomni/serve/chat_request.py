"""The bodies of /v1/chat/completions and of /v1/audio, checked. Nothing is fetched and no file is
opened: media come as data: URIs and base64 only. A field that is unknown, and a value that would be
ignored, is an error.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from minomni.errors import UserError, quote, shorten
from minomni.inputs.item import IGNORED_ITEM_KEYS
from minomni.inputs.options import KEYS_OF, options_of
from minomni.serve.audio import MEDIA_TYPES
from minomni.serve.errors import bad_request

MAX_MESSAGES = 512
MAX_ITEMS = 256  # of one message
MAX_TEXT = 200_000  # characters of one text
# Field of the request -> option of omni.stream(). OpenAI's names, and those of vLLM.
OPTIONS = {
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "repetition_penalty": "repetition_penalty",
}
CHAT_FIELDS = {
    "model",
    "messages",
    "modalities",
    "audio",
    "stream",
    "stream_options",
    "seed",
    "use_audio_in_video",
    "mm_processor_kwargs",
    *OPTIONS,
    # These do not change an answer.
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
    "reasoning_effort",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
    "verbosity",
}
# Fields that are not supported -> the values that ask for nothing.
NEUTRAL: dict[str, tuple] = {
    "n": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "stop": ([], ""),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "response_format": ({"type": "text"},),
    "min_p": (0,),
}
ITEM_FIELDS = {*IGNORED_ITEM_KEYS, "prompt_cache_breakpoint"}  # of a content item, and the source
AUDIO_FIELDS = {"voice", "format"}
STREAM_FIELDS = {"include_usage", "include_obfuscation"}
SPEECH_FIELDS = {
    "model",
    "input",
    "voice",
    "response_format",
    "speed",
    "instructions",
    "stream_format",
}
TRANSCRIPTION_FIELDS = {
    "file",
    "model",
    "response_format",
    "stream",
    "temperature",
    # Hints, which many clients send; the model hears for itself.
    "language",
    "prompt",
}
NEUTRAL_TRANSCRIPTION: dict[str, tuple] = {
    "chunking_strategy": ("auto",),
    "include[]": (),  # the official client names lists so
    "timestamp_granularities[]": (),
}
FORM_BOOLS = {"true": True, "1": True, "false": False, "0": False, "": False}
TEXT_ITEMS = ("text", "input_text", "output_text")
# Types of media items, OpenAI's and Qwen's. The source stands under the same name.
MEDIA_ITEMS = {
    "image_url": "image",
    "video_url": "video",
    "audio_url": "audio",
    "input_audio": "audio",
    "image": "image",
    "video": "video",
    "audio": "audio",
}
# Options of media that vLLM's clients give for all items of a request. An item's own come first.
SHARED_OPTIONS = ("fps", "min_pixels", "max_pixels")


@dataclass
class ChatRequest:
    """What a client asks."""

    messages: list[dict]
    speech: bool = False
    voice: str | None = None
    format: str = "wav"
    stream: bool = False
    with_usage: bool = False
    seed: int = 0
    use_audio_in_video: bool = False
    options: dict = field(default_factory=dict)


@dataclass
class SpeechRequest:
    """A text to say."""

    text: str
    voice: str | None
    format: str


@dataclass
class TranscriptionRequest:
    """A recording to write down."""

    file: bytes
    format: str  # json or text
    stream: bool
    options: dict


def parse_json(body: bytes) -> dict:
    """The JSON object of a request. Raises ApiError for anything else."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        raise bad_request("the body is not JSON") from None
    if not isinstance(value, dict):
        raise bad_request("the body is not a JSON object")
    return value


def parse_chat(body: dict) -> ChatRequest:
    """Check a request. Raises ApiError that names the field."""
    body = {key: value for key, value in body.items() if value is not None}
    refuse_unsupported(body, CHAT_FIELDS, NEUTRAL)
    stream = typed(body, "stream", bool, False)
    extra = typed(body, "mm_processor_kwargs", dict, {})
    refuse_unsupported(extra, {"use_audio_in_video", *SHARED_OPTIONS}, where="mm_processor_kwargs.")
    request = ChatRequest(
        messages=parse_messages(body.get("messages"), shared_options(extra)),
        stream=stream,
        format="pcm16" if stream else "wav",
        seed=body.get("seed", 0),
    )
    parse_modalities(body, request)
    stream_options = typed(body, "stream_options", dict, {})
    refuse_unsupported(stream_options, STREAM_FIELDS, where="stream_options.")
    request.with_usage = typed(stream_options, "include_usage", bool, False)

    for source in (extra, body):
        if "use_audio_in_video" in source:
            request.use_audio_in_video = typed(source, "use_audio_in_video", bool, False)
    for name, option in OPTIONS.items():
        if name in body:
            request.options[option] = body[name]
    return request


def parse_speech(body: dict) -> SpeechRequest:
    """Check a request of /v1/audio/speech. Raises ApiError that names the field."""
    body = {key: value for key, value in body.items() if value is not None}
    refuse_unsupported(body, SPEECH_FIELDS)
    text = parse_text(body.get("input"), "input").strip()
    if not text:
        raise bad_request("input is the text to say", param="input")
    if body.get("speed", 1) != 1:
        raise bad_request("speed is 1: this model has one", param="speed")
    if body.get("instructions"):
        raise bad_request("instructions are not supported; choose a voice", param="instructions")
    if body.get("stream_format", "audio") != "audio":
        raise bad_request("stream_format is audio", param="stream_format")
    return SpeechRequest(
        text,
        parse_voice(body.get("voice")),
        parse_format(body.get("response_format", "mp3")),
    )


def parse_transcription(form: dict) -> TranscriptionRequest:
    """Check the fields of a form; "file" is the recording's bytes. Raises ApiError that names the
    field.
    """
    refuse_unsupported(form, TRANSCRIPTION_FIELDS, NEUTRAL_TRANSCRIPTION)
    shape = form.get("response_format", "json")
    if shape not in ("json", "text"):
        raise bad_request("response_format is json or text", param="response_format")
    stream = FORM_BOOLS.get(str(form.get("stream", "")).lower())
    if stream is None:
        raise bad_request("stream is true or false", param="stream")
    options = {}
    if "temperature" in form:
        options["temperature"] = parse_temperature(form["temperature"])
    return TranscriptionRequest(form["file"], shape, stream, options)


def parse_temperature(text: object) -> float:
    """A number in a form. Raises ApiError."""
    try:
        return float(str(text))
    except ValueError:
        raise bad_request("temperature is no number", param="temperature") from None


def refuse_unsupported(
    given: dict,
    known: Collection[str],
    neutral: Mapping[str, tuple] = MappingProxyType({}),
    where: str = "",
) -> None:
    """Raise ApiError for fields that are unknown, and for values that would be ignored.

    null, false and what is empty ask for nothing, whatever the field. known: fields that may have
    any value here. neutral: further ones -> their values that ask for nothing. where: the place of
    these fields in the request, such as "audio.".
    """
    for name, value in given.items():
        asks_for_nothing = value is None or value is False or value in ([], {})
        if asks_for_nothing or name in known:
            continue
        path = where + name
        if name not in neutral:
            raise bad_request(f"unknown field {quote(path)}", param=shorten(path, 60))
        if value not in neutral[name]:
            raise bad_request(f"{path} is not supported by this model; leave it out", param=path)


def parse_text(text: object, param: str) -> str:
    """A text. Raises ApiError for other types, for a text that is too long, and for half of a
    surrogate pair, which JSON can hold and Unicode cannot.
    """
    if not isinstance(text, str) or len(text) > MAX_TEXT:
        raise bad_request(f"expected a text of at most {MAX_TEXT} characters", param)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise bad_request(
            "the text is not Unicode: it holds half of a surrogate pair", param
        ) from None
    return text


def typed(body: dict, name: str, kind: type, default: Any) -> Any:
    """A field of one type. Raises ApiError for another type."""
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, kind):
        raise bad_request(f"{name} is {quote(value)}; expected a {kind.__name__}", param=name)
    return value


def parse_modalities(body: dict, request: ChatRequest) -> None:
    """Whether to speak, in which voice and format."""
    modalities = typed(body, "modalities", list, ["text"])
    if "text" not in modalities or any(kind not in ("text", "audio") for kind in modalities):
        raise bad_request('modalities are ["text"] or ["text", "audio"]', param="modalities")
    request.speech = "audio" in modalities
    audio = typed(body, "audio", dict, {})
    refuse_unsupported(audio, AUDIO_FIELDS, where="audio.")
    request.voice = parse_voice(audio.get("voice"))
    request.format = parse_format(audio.get("format", request.format))
    if request.stream and request.speech and request.format != "pcm16":
        raise bad_request("a streamed answer has audio of format pcm16", param="audio.format")


def parse_voice(voice: object) -> str | None:
    """The name of a voice: a string, or OpenAI's {"id": NAME}."""
    if isinstance(voice, dict):
        refuse_unsupported(voice, {"id"}, where="voice.")
        voice = voice.get("id")
    if voice is not None and not isinstance(voice, str):
        raise bad_request(f"voice is {quote(voice)}; expected its name", param="voice")
    return voice


def parse_format(name: object) -> str:
    """The name of a format of audio."""
    if name == "pcm":
        name = "pcm16"
    if not isinstance(name, str) or name not in MEDIA_TYPES:
        raise bad_request(
            f"audio of format {quote(name)}; expected one of {', '.join(MEDIA_TYPES)}", "format"
        )
    return name


def shared_options(extra: dict) -> dict:
    """The options of mm_processor_kwargs for all media of the request. Raises ApiError."""
    given = {name: extra[name] for name in SHARED_OPTIONS if extra.get(name) is not None}
    check_options("video", given, "mm_processor_kwargs")  # a video has all of them
    return given


def parse_messages(messages: object, shared: Mapping[str, Any]) -> list[dict]:
    """Messages whose media hold their own bytes. The rest is checked by omni.prepare().

    shared: options of all media, see shared_options(). Raises ApiError.
    """
    if not isinstance(messages, list) or not 0 < len(messages) <= MAX_MESSAGES:
        raise bad_request(f"messages: expected a list of 1 to {MAX_MESSAGES}", param="messages")
    checked = []
    for message in messages:
        if not isinstance(message, dict):
            raise bad_request("a message is no object", param="messages")
        message = {key: value for key, value in message.items() if value is not None}
        content = message.get("content", "")
        if isinstance(content, str):
            content = [{"type": "text", "text": content}] if content else []
        if not isinstance(content, list) or len(content) > MAX_ITEMS:
            raise bad_request(
                f"the content of a message is a string or a list of up to {MAX_ITEMS} items",
                param="messages",
            )
        if "audio" in message and not content:
            raise bad_request(
                "earlier answers are not stored here; send their text as content", "messages"
            )
        message.pop("audio", None)
        checked.append({**message, "content": [parse_item(item, shared) for item in content]})
    return checked


def parse_item(item: object, shared: Mapping[str, Any]) -> dict:
    """One item of a content, with bytes of its own instead of addresses, and its options.

    shared: options of all media. Raises ApiError.
    """
    if not isinstance(item, dict):
        raise bad_request("a content item is no object", param="messages")
    item = {key: value for key, value in item.items() if value is not None}
    name = item.get("type")
    if isinstance(name, str) and name in TEXT_ITEMS:
        refuse_unsupported(item, {"text", *ITEM_FIELDS}, where="messages.content.")
        return {"type": "text", "text": parse_text(item.get("text"), "messages")}
    if not isinstance(name, str) or name not in MEDIA_ITEMS:
        raise bad_request(
            f"a content item of type {quote(name)}; expected one of text, {', '.join(MEDIA_ITEMS)}",
            param="messages",
        )
    kind = MEDIA_ITEMS[name]
    refuse_unsupported(item, {name, *ITEM_FIELDS, *KEYS_OF[kind]}, where="messages.content.")
    source = media_source(item, name)
    return {"type": kind, **source, **item_options(item, name, shared)}


def media_source(item: dict, name: str) -> dict:
    """The source of an item, under its key. Raises ApiError for web addresses and paths."""
    kind = MEDIA_ITEMS[name]
    source = item.get(name)
    if name == "input_audio":
        if not isinstance(source, dict) or not isinstance(source.get("data"), str):
            raise bad_request("input_audio holds {data: base64, format}", param="messages")
        refuse_unsupported(source, {"data", *ITEM_FIELDS, *KEYS_OF[kind]}, where="input_audio.")
        return {name: {"data": source["data"]}}
    if name == "video" and isinstance(source, list):
        if not 0 < len(source) <= MAX_ITEMS:
            raise bad_request(
                f"a video is a file, or a list of 1 to {MAX_ITEMS} images", "messages"
            )
        return {name: [data_uri({name: frame}, name) for frame in source]}
    return {kind: data_uri(item, name, KEYS_OF[kind])}


def item_options(item: dict, name: str, shared: Mapping[str, Any]) -> dict:
    """The options of an item of media, beside its source or inside of it. Raises ApiError."""
    kind = MEDIA_ITEMS[name]
    given: dict = {}
    for place in (item, item[name]):
        if not isinstance(place, dict):
            continue
        for key in KEYS_OF[kind]:
            if place.get(key) is None:
                continue
            if key in given:
                raise bad_request(f"{key} stands beside {name} and in it; give it once", "messages")
            given[key] = place[key]
    check_options(kind, given, "messages")

    for key, value in shared.items():
        is_replaced = key == "fps" and "nframes" in given
        if key in KEYS_OF[kind] and not is_replaced:
            given.setdefault(key, value)
    return given


def check_options(kind: str, given: dict, param: str) -> None:
    """Raise ApiError for values of options that an item of this kind cannot have."""
    try:
        options_of(kind, given)
    except UserError as error:
        raise bad_request(f"{param}: {error}", param) from None


def data_uri(item: dict, kind: str, options: Collection[str] = ()) -> str:
    """The data: URI of an item. Raises ApiError for web addresses and paths.

    options: fields that may stand beside the address.
    """
    source = item.get(kind)
    if isinstance(source, dict):
        refuse_unsupported(source, {"url", *ITEM_FIELDS, *options}, where=f"{kind}.")
        source = source.get("url")
    if not isinstance(source, str) or source[:5].lower() != "data:":
        raise bad_request(
            f"{kind} is not a data: URI; this server fetches nothing, send the bytes in base64",
            param="messages",
        )
    return source
