"""One content item of a message: what it is, what it holds, and what it asks for.

Spellings of Qwen's and transformers' users, and of OpenAI's chat and Responses interfaces, are all
read.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minomni.arguments import shown
from minomni.errors import UserError
from minomni.inputs.options import MediaOptions, options_of, with_article
from minomni.inputs.source import decode_base64

KINDS = ("image", "audio", "video", "text")
KIND_OF_TYPE = (
    {kind: kind for kind in KINDS}
    | {f"{kind}_url": kind for kind in ("image", "audio", "video")}
    | {f"input_{kind}": kind for kind in KINDS}
    | {"output_text": "text"}
)
SOURCE_KEYS = {
    "image": ("image", "image_url", "path", "url", "base64"),
    "audio": ("audio", "audio_url", "input_audio", "path", "url", "base64"),
    "video": ("video", "video_url", "path", "url", "base64"),
    "text": ("text",),
}
WITHOUT_MEANING = (
    frozenset(  # written by other programs, and nothing that could change an answer here
        (
            "type",
            "annotations",
            "cache_control",
            "detail",
            "filename",
            "format",
            "id",
            "logprobs",
            "mime_type",
            "raw_fps",
            "uuid",
        )
    )
)


@dataclass(frozen=True)
class Item:
    """One content item of a message."""

    kind: str  # image, audio, video or text
    source: Any  # a text, or whatever the loader of this kind reads
    options: MediaOptions = MediaOptions()


def parse_item(item: dict) -> Item:
    """A content item as users write it -> Item. A key whose value is None counts as absent.

    Raises UserError for what is no dictionary, has no or an unknown type, more than one source, or
    an unknown key.
    """
    if not isinstance(item, dict):
        raise UserError(
            f"a content item is a {type(item).__name__}; expected a dictionary with one of image, audio, "
            f"video, text"
        )
    item = {key: value for key, value in item.items() if value is not None}
    kind = _kind(item)
    places = [key for key in SOURCE_KEYS[kind] if key in item]
    if not places:
        raise UserError(
            f"{with_article(kind)} item has the keys {listed(item)}; expected one of "
            f"{', '.join(SOURCE_KEYS[kind])}, and not None"
        )
    if len(places) > 1:
        raise UserError(f"a content item has both {places[0]} and {places[1]}; give one of them")
    given = {
        key: value for key, value in item.items() if key not in WITHOUT_MEANING and key != places[0]
    }
    if other := sorted(key for key in given if key in KIND_OF_TYPE):
        raise UserError(
            f"a content item holds {places[0]} and {other[0]}; give two items, or None for the other key"
        )
    return Item(kind, _source(kind, places[0], item[places[0]]), options_of(kind, given))


def kind_and_source(item: dict) -> tuple[str, object]:
    """What a content item is (image, audio, video or text), and what it holds. Raises UserError as
    parse_item.
    """
    parsed = parse_item(item)
    return parsed.kind, parsed.source


def _kind(item: dict) -> str:
    """The type decides; where there is none, the first source key."""
    if "type" in item:
        kind = KIND_OF_TYPE.get(item["type"]) if isinstance(item["type"], str) else None
    else:
        kind = next(
            (
                kind
                for kind in KINDS
                for key in SOURCE_KEYS[kind]
                if key in KIND_OF_TYPE and key in item
            ),
            None,
        )
    if kind is None:
        of_type = f" of type {shown(item['type'])}" if "type" in item else ""
        raise UserError(
            f"a content item{of_type} has the keys {listed(item)}; expected one of image, audio, video, "
            f"text"
        )
    return kind


def _source(kind: str, key: str, value):
    """The value of a source key, without the dictionary that OpenAI's clients put around it."""
    if kind == "text":
        if not isinstance(value, str):
            raise UserError(f"a text item holds {shown(value)}; expected a text")
        return value
    inner = "data" if key == "input_audio" else "url"
    if isinstance(value, dict) and (key.endswith("_url") or key == "input_audio" or inner in value):
        held = {name: x for name, x in value.items() if x is not None}
        if unknown := [name for name in held if name != inner and name not in WITHOUT_MEANING]:
            raise UserError(f"{key} has the unknown key {shown(unknown[0])}; expected {inner}")
        if inner not in held:
            raise UserError(f"{key} has the keys {listed(held)}; expected {inner}")
        value = held[inner]
    if (
        key in ("base64", "input_audio")
        and isinstance(value, str)
        and not value.startswith("data:")
    ):
        return _decoded(value, key)
    if key == "path" and not isinstance(value, (str, Path)):
        raise UserError(f"path is a {type(value).__name__}; expected a text")
    return value


def _decoded(text: str, key: str) -> bytes:
    try:
        return decode_base64(text)
    except ValueError:
        raise UserError(f"{key} is no base64; expected the bytes of a file in base64") from None


def listed(keys) -> str:
    """The first keys, in order of their spelling, which may be of any type."""
    spellings = sorted(map(shown, keys))
    return f"[{', '.join(spellings[:8])}{', ...' if len(spellings) > 8 else ''}]"
