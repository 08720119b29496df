"""Converts rows of training data in the layouts of other programs to one: messages and options.

- ours: messages; speech (a recording of the last answer), voice (who speaks it),
  use_audio_in_video, speaker (who asks; --held-out names one)
- OpenAI fine-tuning: messages with role, content (a string, or parts: text, image_url,
  input_audio), name, weight
- ms-swift: messages (role, content, loss) whose text has <image>, <audio>, <video>; lists images,
  audios, videos
- ms-swift, older: query, response, history (pairs of a question and an answer), system, and the
  same lists
- ShareGPT, LLaVA: conversations with from (human, gpt, system) and value; system; the same lists,
  or one image, audio or video
- alpaca: instruction, input, output, history, system

The last message is the assistant's. Only this answer is a training target; earlier answers are
context. To train on each of them, write one row for each.

Keys. A key whose value is null counts as missing, since datasets write null for what a row lacks.
A key of another layout than the row's is an error, unless it is empty. Keys that only describe a
row (METADATA) or a message (IGNORED_MESSAGE_KEYS in prompt.py) are skipped, and so are keys of
unsupported features (UNSUPPORTED) if they are empty; all others are errors.

Media. The n-th tag of a kind stands for the n-th entry of its list; media without a tag come before
the first question. A tag whose list is empty is an error. A tag without any list is plain text in
rows with messages or instruction (it may be about HTML); in rows with conversations or query it
always stands for a medium, and is an error. Relative paths are relative to the file.
"""

import re
from collections.abc import Collection
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from minomni.errors import UserError, shorten
from minomni.inputs.prompt import IGNORED_MESSAGE_KEYS
from minomni.inputs.source import is_uri

OWN_KEYS = ("messages", "speech", "voice", "use_audio_in_video", "speaker")
MEDIA_KINDS = {  # kind of the media in each list of a row
    "images": "image",
    "audios": "audio",
    "videos": "video",
    "image": "image",
    "audio": "audio",
    "video": "video",
}
LAYOUTS = {  # the keys that hold the messages, by the key that identifies the layout
    "messages": ("messages", "system"),
    "conversations": ("conversations", "system"),
    "query": ("query", "response", "history", "system"),
    "instruction": ("instruction", "input", "output", "history", "system"),
}
LAYOUT_KEYS = frozenset(chain.from_iterable(LAYOUTS.values()))
# fmt: off
METADATA = frozenset((
    "id", "idx", "index", "source", "dataset", "model", "category", "language", "lang", "meta",
    "metadata", "split", "conversation_id", "hash", "tags", "score", "parallel_tool_calls",
))
UNSUPPORTED = frozenset((
    "tools", "functions", "function_call", "tool_choice", "response_format", "objects", "label",
    "chosen", "rejected", "rejected_response", "rejected_messages", "rejected_images",
))
# fmt: on
UNSUPPORTED_IN_MESSAGE = ("tool_calls", "function_call", "audio", "refusal")
TAGS_ARE_MEDIA = ("conversations", "query")  # layouts in which a tag is never plain text
ROLES = ("system", "user", "assistant")
ROLE_NAMES = {  # roles of other programs
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "system": "system",
    "developer": "system",
}
MESSAGE_KEYS = IGNORED_MESSAGE_KEYS | {"role", "content", "from", "value"}
TAG = re.compile("<(image|audio|video)>")
SURROGATE = re.compile("[\ud800-\udfff]")
# Of a message that is not a target: weight 0 (OpenAI), loss false (ms-swift).
WEIGHT_KEYS = {"weight": "0", "loss": "false"}
# Keys of a content item that may hold a path.
PATH_KEYS = ("image", "audio", "video", "image_url", "audio_url", "video_url", "path", "url")


class Tag(NamedTuple):
    """A tag in text, which stands for a medium of this kind."""

    kind: str


def normalize_row(row: Any, folder: Path) -> dict:
    """A row in any layout -> a row in ours: messages with role and content, absolute paths.

    The content of a message is a string, or a list of items as respond() takes them. Raises
    UserError if the row is invalid.
    """
    if not isinstance(row, dict):
        raise UserError(f"{kind_of(row)}; expected an object with messages")
    row = without_empty(row)
    check_keys(row)
    written = turns(row)
    messages = [normalize_message(message, number) for number, message in enumerate(written, 1)]
    check_roles(messages)
    check_weight(written[-1])
    put_media(messages, media_of(row))
    for message in messages:
        if isinstance(message["content"], list):
            message["content"] = [absolute_paths(item, folder) for item in message["content"]]
    names = ("voice", "use_audio_in_video", "speaker")
    options = {key: row[key] for key in names if key in row}
    if row.get("speech"):
        options["speech"] = absolute_path(row["speech"], folder)
    return {"messages": messages, **options}


# ----------------------------------------------------------------------------------------------
# checks


def without_empty(row: dict) -> dict:
    """A row without keys that are null, and without unsupported keys that are empty."""
    kept = {}
    for key, value in without_nulls(row).items():
        if key in UNSUPPORTED and is_empty(value):
            continue
        kept[key] = value
    return kept


def check_keys(row: dict) -> None:
    """Raises UserError for unknown keys, and for options of the wrong type."""
    known = METADATA | LAYOUT_KEYS | {*OWN_KEYS, *MEDIA_KINDS}
    unknown = sorted(row.keys() - known)
    if unknown:
        raise UserError(
            f"unknown key {shorten(unknown[0], 60)!r}; keys are {', '.join(OWN_KEYS)}, "
            f"and those of other layouts (jsonl_layouts.py lists them)"
        )
    for key in ("speech", "voice", "speaker"):
        if key in row:
            text_of(row[key], repr(key))
    use_audio = row.get("use_audio_in_video", False)
    if type(use_audio) is not bool:
        raise UserError(f"'use_audio_in_video' is {kind_of(use_audio)}; expected true or false")


def check_roles(messages: list[dict]) -> None:
    """Raises UserError for an unknown role, and unless an answer of the assistant comes last."""
    for message in messages:
        if message["role"] not in ROLES:
            role = shorten(message["role"], 60)
            raise UserError(f"unknown role {role!r}; roles are system, user and assistant")
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise UserError(
            "expected at least one question, and as the last message the assistant's answer"
        )


def check_weight(last: dict) -> None:
    """Raises UserError if the last message, the only target, is excluded from the loss."""
    for key, zero in WEIGHT_KEYS.items():
        if last.get(key) == 0:  # also true of false
            raise UserError(
                f"the last answer has {key} {zero}, and no other is a target; leave the line out"
            )


# ----------------------------------------------------------------------------------------------
# messages


def turns(row: dict) -> list:
    """The messages of a row, in the spelling of its layout.

    Raises UserError if there are none, or keys of two layouts.
    """
    layouts = [key for key in LAYOUTS if key in row]
    if len(layouts) != 1:
        found = " and ".join(layouts) or "none"
        raise UserError(
            f"expected one of messages, conversations, query and instruction; found {found}"
        )
    (layout,) = layouts
    foreign = row.keys() & LAYOUT_KEYS - {*LAYOUTS[layout]}
    for key in sorted(foreign):
        if row[key] not in ("", []):
            raise UserError(
                f"{key!r} is not a key of a row with {layout!r}, and would be ignored; "
                f"put it into {layout!r}, or leave it out"
            )
    system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    if layout in ("query", "instruction"):
        return system + question_and_answer(row, layout)
    if not isinstance(row[layout], list):
        raise UserError(f"{layout!r} is {kind_of(row[layout])}; expected a list of messages")
    return system + row[layout]


def question_and_answer(row: dict, layout: str) -> list[dict]:
    """The messages of a row with query or instruction: its history, the question, the answer."""
    question = text_of(row[layout], repr(layout))
    if row.get("input"):
        question += "\n" + text_of(row["input"], "'input'")
    answer = row.get("response" if layout == "query" else "output")
    history = row.get("history", [])
    pairs = history if isinstance(history, list) else [None]
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise UserError("'history' is not a list of pairs of a question and an answer")
    messages = []
    for asked, answered in [*history, [question, answer]]:
        messages.append({"role": "user", "content": asked})
        messages.append({"role": "assistant", "content": answered})
    return messages


def normalize_message(message: Any, number: int) -> dict:
    """A message in the spelling of any layout -> {"role", "content"}. Raises UserError."""
    if not isinstance(message, dict):
        raise UserError(
            f"message {number} is {kind_of(message)}; expected a dictionary with role and content"
        )
    message = without_nulls(message)
    check_message_keys(message, number)
    role = message.get("role", message.get("from"))
    content = message.get("content", message.get("value"))
    if isinstance(content, list):
        content = [checked_item(item, number) for item in content]
    elif content is None:
        raise UserError(f"message {number} has no content")
    else:
        text_of(content, f"the content of message {number}")
    if not isinstance(role, str):
        raise UserError(f"message {number} has no role; roles are system, user and assistant")
    return {"role": ROLE_NAMES.get(role, role), "content": content}


def check_message_keys(message: dict, number: int) -> None:
    """Raises UserError for keys of a message that contradict each other, are unsupported or
    unknown.
    """
    for new, old in (("role", "from"), ("content", "value")):
        if new in message and old in message:
            raise UserError(f"message {number} has both {new!r} and {old!r}; give one of them")
    for key in UNSUPPORTED_IN_MESSAGE:
        if message.get(key):
            raise UserError(f"message {number} has {key!r}, which cannot be trained on here")
    for key, value in message.items():
        if key not in MESSAGE_KEYS and value not in ("", [], {}):
            raise UserError(
                f"message {number} has the unknown key {shorten(key, 60)!r}; "
                f"expected role and content; lists of media stand beside the messages"
            )


def checked_item(item: Any, number: int) -> dict:
    """A content item without nulls. Raises UserError for other types and a text item without text.

    number: that of the message.
    """
    if not isinstance(item, dict):
        raise UserError(
            f"a content item of message {number} is {kind_of(item)}; "
            f"expected a dictionary with one of image, audio, video, text"
        )
    item = without_nulls(item)
    if item.get("type") == "text" or "text" in item:
        text_of(item.get("text"), f"text of message {number}")
    return item


# ----------------------------------------------------------------------------------------------
# media


def media_of(row: dict) -> dict[str, list[str]]:
    """The entries of a row's media lists by kind (image, audio, video).

    Tags of kinds that are missing here are plain text.
    """
    media: dict[str, list[str]] = {}
    if any(key in row for key in TAGS_ARE_MEDIA):
        media = {kind: [] for kind in MEDIA_KINDS.values()}
    for key, kind in MEDIA_KINDS.items():
        if key not in row:
            continue
        entries = row[key] if isinstance(row[key], list) else [row[key]]
        if row[key] == "":
            entries = []
        media.setdefault(kind, []).extend(source_of(entry, kind) for entry in entries)
    return media


class MediaQueue:
    """The media of a row's lists, taken one after the other by tags and by items without source."""

    def __init__(self, media: dict[str, list[str]]):
        self.media = media
        self.left = {kind: list(entries) for kind, entries in media.items()}

    @property
    def kinds(self) -> Collection[str]:
        """Kinds whose tags stand for media."""
        return self.media.keys()

    def take(self, kind: str) -> dict:
        """The next medium of a kind as a content item. Raises UserError if there is none."""
        if not self.media[kind]:
            raise UserError(
                f"<{kind}> stands for no file, since the list '{kind}s' is empty or missing; "
                f"list the file there, or leave the tag out"
            )
        if not self.left[kind]:
            listed = len(self.media[kind])
            raise UserError(f"more <{kind}> tags than the {listed} that '{kind}s' lists")
        return {"type": kind, kind: self.left[kind].pop(0)}

    def rest(self) -> list[dict]:
        """The media that were not taken, as content items."""
        items = []
        for kind, entries in self.left.items():
            items += [{"type": kind, kind: entry} for entry in entries]
        return items


def put_media(messages: list[dict], media: dict[str, list[str]]) -> None:
    """Put a row's media where tags, or items without a source, stand for them.

    The rest comes before the first question. Raises UserError if there is none, or if a tag has no
    medium.
    """
    queue = MediaQueue(media)
    for message in messages:
        message["content"] = with_media(message["content"], queue)
    rest = queue.rest()
    if not rest:
        return
    for message in messages:
        if message["role"] == "user":
            content = message["content"]
            items = [text_item(content)] if isinstance(content, str) else content
            message["content"] = rest + items
            return
    raise UserError(f"there is no question that the {rest[0]['type']} could belong to")


def with_media(content: str | list[dict], queue: MediaQueue) -> str | list[dict]:
    """The content of a message with media instead of tags and of items without a source."""
    if isinstance(content, str):
        pieces = split_at_tags(content, queue.kinds)
        if pieces == [content]:
            return content
        return fill_tags(text_item(content), queue)
    items = []
    for item in content:
        if is_placeholder(item, queue.kinds):
            items.append(queue.take(item["type"]))
        elif item.get("type", "text") == "text" and "text" in item:
            items += fill_tags(item, queue)
        else:
            items.append(item)
    return items


def fill_tags(item: dict, queue: MediaQueue) -> list[dict]:
    """A text item as items of text and media, split at its tags."""
    items = []
    for piece in split_at_tags(item["text"], queue.kinds):
        items.append(queue.take(piece.kind) if isinstance(piece, Tag) else {**item, "text": piece})
    return items


def text_item(text: str) -> dict:
    """Text as a content item."""
    return {"type": "text", "text": text}


def split_at_tags(text: str, kinds: Collection[str]) -> list[str | Tag]:
    """Text as a list of strings and of tags of these kinds."""
    pieces: list[str | Tag] = []
    end = 0
    for match in TAG.finditer(text):
        kind = match[1]
        if kind not in kinds:
            continue
        if match.start() > end:
            pieces.append(text[end : match.start()])
        pieces.append(Tag(kind))
        end = match.end()
    if end < len(text) or not pieces:
        pieces.append(text[end:])
    return pieces


def is_placeholder(item: Any, kinds: Collection[str]) -> bool:
    """Whether an item gives a kind but no source, as vision datasets of Hugging Face write it."""
    return isinstance(item, dict) and item.keys() == {"type"} and item["type"] in list(kinds)


def source_of(entry: Any, kind: str) -> str:
    """An entry of a media list: a path, or a dictionary with one. Raises UserError for others."""
    if isinstance(entry, dict):
        entry = without_nulls(entry)
        entry = entry.get("path", entry.get("url"))
    if not isinstance(entry, str) or not entry:
        raise UserError(f"an entry of '{kind}s' is {kind_of(entry)}; expected a path")
    return entry


# ----------------------------------------------------------------------------------------------
# paths


def absolute_paths(item: Any, folder: Path) -> Any:
    """A content item with an absolute path, under whichever key."""
    if not isinstance(item, dict):
        return item
    result = dict(item)
    for key in PATH_KEYS:
        if key in result:
            result[key] = absolute_source(result[key], folder)
    return result


def absolute_source(source: Any, folder: Path) -> Any:
    """A path, a dictionary with one, or a list of both (the frames of a video) with absolute paths.

    Anything else is returned as it is.
    """
    if isinstance(source, str):
        return absolute_path(source, folder)
    if isinstance(source, list):
        return [absolute_source(frame, folder) for frame in source]
    if isinstance(source, dict):
        return absolute_paths(without_nulls(source), folder)
    return source


def absolute_path(source: str, folder: Path) -> str:
    """A path relative to the folder as an absolute one; URLs, file: and data: URIs are kept."""
    return source if is_uri(source) else str(folder / source)


# ----------------------------------------------------------------------------------------------
# JSON values


def without_nulls(row: dict) -> dict:
    """The keys that have a value."""
    return {key: value for key, value in row.items() if value is not None}


def is_empty(value: Any) -> bool:
    """Whether a value is empty: "", [], {}, these as JSON in a string, or an object of such."""
    if isinstance(value, dict):
        return all(inner is None or is_empty(inner) for inner in value.values())
    if isinstance(value, str):
        return value.strip() in ("", "[]", "{}")
    return value == []


def text_of(value: Any, what: str) -> str:
    """A value that has to be a string. Raises UserError for other types and for lone surrogates."""
    if not isinstance(value, str):
        raise UserError(f"{what} is {kind_of(value)}; expected a string")
    if SURROGATE.search(value):
        raise UserError(
            f"{what} holds half of a character (a lone surrogate); write the file as UTF-8"
        )
    return value


def kind_of(value: Any) -> str:
    """A JSON value in a few words, for messages."""
    if type(value) in (int, float):
        return repr(value)[:20]
    names = {
        dict: "an object",
        list: "a list",
        str: "a string",
        bool: "true or false",
        type(None): "null",
    }
    return names.get(type(value), type(value).__name__)
