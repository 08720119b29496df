"""Objects of OpenAI's Realtime API: what clients send, checked, and what they get."""

import base64
import binascii
import json
import secrets
from dataclasses import dataclass, field

from minomni.serve.audio import WIRE_RATE
from minomni.serve.chat_request import typed
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


def parse_turn_detection(given: object, padding_ms: int) -> TurnDetection | None:
    """An open microphone, or None for push to talk. padding_ms: the default of prefix_padding_ms.
    Raises ApiError.
    """
    if given is None:
        return None
    if not isinstance(given, dict) or given.get("type", "server_vad") != "server_vad":
        raise bad_request("turn_detection is null or of type server_vad", "turn_detection")
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
