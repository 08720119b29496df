"""One content item of a message: its kind, its source and its options.

Accepts the spellings of Qwen, of transformers, and of OpenAI's chat and Responses APIs.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minomni.errors import UserError, quote
from minomni.inputs.options import NO_OPTIONS, MediaOptions, options_of, with_article
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
# Keys that other programs write and that could not change a reply here.
IGNORED_ITEM_KEYS = frozenset(
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


@dataclass(frozen=True)
class Item:
    """One content item of a message."""

    kind: str  # image, audio, video or text
    source: Any  # a string, or anything that the loader of this kind reads
    options: MediaOptions = NO_OPTIONS


def parse_item(item: dict) -> Item:
    """A content item as users write it -> Item. A key whose value is None counts as absent.

    Raises UserError for an item that is not a dictionary, has no type or an unknown one, more than
    one source, or an unknown key.
    """
    if not isinstance(item, dict):
        raise UserError(
            f"a content item is a {type(item).__name__}; expected a dictionary with one of image, "
            f"audio, video, text"
        )
    item = {key: value for key, value in item.items() if value is not None}
    kind = _kind(item)
    source_key = _source_key(kind, item)

    # The remaining keys are options.
    given = {}
    for key, value in item.items():
        if key != source_key and key not in IGNORED_ITEM_KEYS:
            given[key] = value
    other_kinds = sorted(key for key in given if key in KIND_OF_TYPE)
    if other_kinds:
        raise UserError(
            f"a content item holds {source_key} and {other_kinds[0]}; give two items, or None for "
            f"the other key"
        )
    source = _source(kind, source_key, item[source_key])
    return Item(kind, source, options_of(kind, given))


def _kind(item: dict) -> str:
    """The kind by the type, or, where there is none, by the first source key."""
    kind = None
    if "type" not in item:
        kind = _kind_by_source(item)
    elif isinstance(item["type"], str):
        kind = KIND_OF_TYPE.get(item["type"])
    if kind is None:
        of_type = f" of type {quote(item['type'])}" if "type" in item else ""
        raise UserError(
            f"a content item{of_type} has the keys {listed(item)}; expected one of image, audio, "
            f"video, text"
        )
    return kind


def _kind_by_source(item: dict) -> str | None:
    """The first kind one of whose own source keys the item has."""
    for kind in KINDS:
        for key in SOURCE_KEYS[kind]:
            if key in KIND_OF_TYPE and key in item:
                return kind
    return None


def _source_key(kind: str, item: dict) -> str:
    """The key of an item that holds its source. Raises UserError for none and for two."""
    found = [key for key in SOURCE_KEYS[kind] if key in item]
    if not found:
        raise UserError(
            f"{with_article(kind)} item has the keys {listed(item)}; expected one of "
            f"{', '.join(SOURCE_KEYS[kind])}, and not None"
        )
    if len(found) > 1:
        raise UserError(f"a content item has both {found[0]} and {found[1]}; give one of them")
    return found[0]


def _source(kind: str, key: str, value: Any) -> Any:
    """The value of a source key, without the dictionary that OpenAI's clients put around it."""
    if kind == "text":
        if not isinstance(value, str):
            raise UserError(f"a text item holds {quote(value)}; expected a string")
        return value
    inner_key = "data" if key == "input_audio" else "url"
    if isinstance(value, dict):
        is_wrapped = key.endswith("_url") or key == "input_audio" or inner_key in value
        if is_wrapped:
            value = _unwrapped(value, key, inner_key)
    is_base64 = key in ("base64", "input_audio") and isinstance(value, str)
    if is_base64 and not value.startswith("data:"):
        return _decoded(value, key)
    if key == "path" and not isinstance(value, (str, Path)):
        raise UserError(f"path is a {type(value).__name__}; expected a string")
    return value


def _unwrapped(wrapper: dict, key: str, inner_key: str) -> Any:
    """The value of inner_key. Raises UserError for other keys in the dictionary under `key`."""
    wrapper = {name: value for name, value in wrapper.items() if value is not None}
    for name in wrapper:
        if name != inner_key and name not in IGNORED_ITEM_KEYS:
            raise UserError(f"{key} has the unknown key {quote(name)}; expected {inner_key}")
    if inner_key not in wrapper:
        raise UserError(f"{key} has the keys {listed(wrapper)}; expected {inner_key}")
    return wrapper[inner_key]


def _decoded(text: str, key: str) -> bytes:
    try:
        return decode_base64(text)
    except ValueError:
        raise UserError(f"{key} is not base64; expected the bytes of a file in base64") from None


def listed(keys: Iterable) -> str:
    """The first eight keys, which may have any type, sorted by their spelling."""
    spellings = sorted(quote(key) for key in keys)
    more = ", ..." if len(spellings) > 8 else ""
    return f"[{', '.join(spellings[:8])}{more}]"
