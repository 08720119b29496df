"""Objects of OpenAI's Realtime API: what clients send, checked, and what they get."""

import base64
import binascii
import json
import secrets
from dataclasses import dataclass, field

from minomni.serve.audio import WIRE_RATE
from minomni.serve.chat_request import refuse_unsupported, typed
from minomni.serve.errors import ApiError, bad_request
from minomni.serve.vad import VadOptions

PCM = {"type": "audio/pcm", "rate": WIRE_RATE}
# Number of session.audio.input.turn_detection -> lowest and highest value.
VAD_LIMITS = {
    "threshold": (0.0, 1.0),
    "prefix_padding_ms": (0, 2000),
    "silence_duration_ms": (100, 5000),
}
MAX_METADATA = 16  # entries, as OpenAI's API
MAX_METADATA_TEXT = 512  # characters
MAX_OUTPUT_TOKENS = 10**6
# Fields that are read or do not change an answer, and further ones with the values that ask for
# nothing, as in chat_request.py. A client may send a session back as it got it.
SESSION_FIELDS = {
    "type",
    "id",
    "model",
    "output_modalities",
    "instructions",
    "audio",
    "max_output_tokens",
    "tracing",
}
RESPONSE_FIELDS = {"output_modalities", "audio", "max_output_tokens", "metadata"}
NEUTRAL_TOOLS: dict[str, tuple] = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
}
NEUTRAL_SESSION: dict[str, tuple] = {
    "object": ("realtime.session",),
    "include": ([],),
    "truncation": ("auto", "disabled"),  # the default, and what happens here
    "prompt": (),
    "reasoning": (),
    **NEUTRAL_TOOLS,
}
NEUTRAL_RESPONSE: dict[str, tuple] = {
    "conversation": ("auto",),
    "input": (),
    "instructions": (),
    "prompt": (),
    "reasoning": (),
    **NEUTRAL_TOOLS,
}
INPUT_FIELDS = {"format", "turn_detection"}  # of session.audio.input
NEUTRAL_INPUT: dict[str, tuple] = {"transcription": (), "noise_reduction": ()}
OUTPUT_FIELDS = {"format", "voice"}  # of session.audio.output and response.audio.output
NEUTRAL_OUTPUT: dict[str, tuple] = {"speed": (1,)}
TURN_FIELDS = {"type", *VAD_LIMITS, "create_response", "interrupt_response"}
NEUTRAL_TURN: dict[str, tuple] = {"idle_timeout_ms": ()}
ITEM_FIELDS = {"type", "role", "content", "id", "object", "status"}
# Type of a part of an item -> its fields.
PART_FIELDS = {
    "input_text": {"type", "text"},
    "input_image": {"type", "image_url", "detail"},
    "input_audio": {"type", "audio", "transcript"},
}


def new_id(kind: str) -> str:
    return f"{kind}_{secrets.token_hex(10)}"


@dataclass
class TurnDetection:
    """An open microphone: where a turn ends, and what follows."""

    options: VadOptions = field(default_factory=VadOptions)
    create_response: bool = True
    interrupt_response: bool = True

    def describe(self) -> dict:
        """As an object of the API."""
        return {
            "type": "server_vad",
            "threshold": self.options.threshold,
            "prefix_padding_ms": self.options.prefix_padding_ms,
            "silence_duration_ms": self.options.silence_duration_ms,
            "create_response": self.create_response,
            "interrupt_response": self.interrupt_response,
        }


# ----------------------------------------------------------------------------------------- checked


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


def parse_session(event: dict) -> tuple[dict, dict, dict]:
    """The session of session.update -> its fields, and those of audio.input and audio.output.

    Raises ApiError for unknown fields and for values that would be ignored.
    """
    session = typed(event, "session", dict, {})
    refuse_unsupported(session, SESSION_FIELDS, NEUTRAL_SESSION, "session.")
    if session.get("type", "realtime") != "realtime":
        raise bad_request("session.type is realtime", "session.type")
    audio = typed(session, "audio", dict, {})
    refuse_unsupported(audio, {"input", "output"}, where="session.audio.")
    source = typed(audio, "input", dict, {})
    refuse_unsupported(source, INPUT_FIELDS, NEUTRAL_INPUT, "session.audio.input.")
    check_wire_format(source, "session.audio.input.format")
    return session, source, parse_output(audio, "session.audio.output.")


def parse_response(event: dict) -> tuple[dict, dict]:
    """The response of response.create -> its fields, and those of audio.output. Raises ApiError as
    parse_session() does.
    """
    response = typed(event, "response", dict, {})
    refuse_unsupported(response, RESPONSE_FIELDS, NEUTRAL_RESPONSE, "response.")
    audio = typed(response, "audio", dict, {})
    refuse_unsupported(audio, {"output"}, where="response.audio.")
    return response, parse_output(audio, "response.audio.output.")


def parse_output(audio: dict, where: str) -> dict:
    """How an answer is spoken. Raises ApiError as parse_session() does."""
    output = typed(audio, "output", dict, {})
    refuse_unsupported(output, OUTPUT_FIELDS, NEUTRAL_OUTPUT, where)
    check_wire_format(output, f"{where}format")
    return output


def check_wire_format(side: dict, name: str) -> None:
    """Raise ApiError for audio of another format."""
    if side.get("format") not in (None, PCM, {"type": "audio/pcm"}):
        raise bad_request(f"{name} is {PCM}", name)


def parse_turn_detection(given: object, padding_ms: int) -> TurnDetection | None:
    """An open microphone, or None for push to talk. padding_ms: the default of prefix_padding_ms.
    Raises ApiError.
    """
    if given is None:
        return None
    if not isinstance(given, dict) or given.get("type", "server_vad") != "server_vad":
        raise bad_request("turn_detection is null or of type server_vad", "turn_detection")
    refuse_unsupported(given, TURN_FIELDS, NEUTRAL_TURN, "turn_detection.")
    options = VadOptions(prefix_padding_ms=padding_ms)
    for name, (low, high) in VAD_LIMITS.items():
        value = given.get(name)
        if value is None:
            continue
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not low <= value <= high:
            raise bad_request(f"{name} is a number from {low} to {high}", name)
        setattr(options, name, value if name == "threshold" else int(value))
    return TurnDetection(
        options,
        create_response=typed(given, "create_response", bool, True),
        interrupt_response=typed(given, "interrupt_response", bool, True),
    )


def parse_max_tokens(value: object) -> int | None:
    """max_output_tokens: a number, or "inf" for the model's own limit."""
    if value in (None, "inf"):
        return None
    wrong = bad_request('max_output_tokens is a number from 1, or "inf"', "max_output_tokens")
    return whole_number(value, 1, MAX_OUTPUT_TOKENS, wrong)


def whole_number(value: object, low: int, high: int, wrong: ApiError) -> int:
    """A number from low to high. Raises the error `wrong` for anything else."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise wrong
    return value


def parse_metadata(given: object) -> dict[str, str] | None:
    """Short texts that a client attaches to an answer and gets back with it."""
    if given is None:
        return None
    wrong = bad_request(
        f"metadata is an object of at most {MAX_METADATA} texts of at most {MAX_METADATA_TEXT} "
        f"characters",
        "metadata",
    )
    if not isinstance(given, dict) or len(given) > MAX_METADATA:
        raise wrong
    for text in (*given.keys(), *given.values()):
        if not isinstance(text, str) or len(text) > MAX_METADATA_TEXT:
            raise wrong
    return given


def decode_base64(text: object, name: str) -> bytes:
    """Bytes in base64. Raises ApiError for anything else."""
    if not isinstance(text, str):
        raise bad_request(f"{name} is missing; expected base64", name)
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise bad_request(f"{name} is not base64", name) from None


# -------------------------------------------------------------------------------------------- made


def user_item(name: str, content: list[dict]) -> dict:
    """A complete message of the user."""
    return {
        "id": name,
        "object": "realtime.item",
        "type": "message",
        "status": "completed",
        "role": "user",
        "content": content,
    }


def described_parts(content: list[dict]) -> list[dict]:
    """The parts of a message as they are echoed: texts, and the types of media."""
    parts = []
    for part in content:
        described = {"type": part["type"]}
        if part["type"] == "input_text":
            described["text"] = part["text"]
        parts.append(described)
    return parts
