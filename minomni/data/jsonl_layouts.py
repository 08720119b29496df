"""The layouts of a row of training data, as other programs write it, to one: messages and what goes
with them.

| layout | keys of a row |
|---|---|
| ours | messages; speech (a recording of the last answer), voice (who speaks it), use_audio_in_video |
| OpenAI fine-tuning | messages: role, content (a text or parts: text, image_url, input_audio), name, weight |
| ms-swift | messages (role, content, loss) whose texts hold <image>, <audio>, <video>; lists images, audios, videos |
| ms-swift, older | query, response, history (pairs of a question and an answer), system, and the same lists |
| ShareGPT, LLaVA | conversations: from (human, gpt, system), value; system; the same lists, or one image, audio or video |
| alpaca | instruction, input, output, history, system |

The last message is the assistant's. Only this last answer of a conversation is learnt; answers
before it are what was said so far. To learn each of them, write one row for each. A key whose value
is null is no key, since datasets write null for what a row lacks. A key of another layout than the
row's is an error, unless it is empty. The n-th tag of a kind stands for the n-th entry of its list;
media that no tag stands for come before the first question. A tag whose list is empty is an error.
A tag without any list is plain text in rows with messages or instruction (a text may be about
HTML); in rows with conversations or query it always stands for a medium, and is an error. Relative
paths are relative to the file. Keys that only describe a row (NOTES) or a message (prompt.py,
WITHOUT_MEANING) are skipped, and so are those of what is not learnt here (NOT_LEARNT) where they
are empty; others are errors.
"""

import re
from pathlib import Path

from minomni.errors import UserError, shorten
from minomni.inputs.prompt import WITHOUT_MEANING
from minomni.inputs.source import is_uri

OWN_KEYS = ("messages", "speech", "voice", "use_audio_in_video")
LISTS = {
    "images": "image",
    "audios": "audio",
    "videos": "video",
    "image": "image",
    "audio": "audio",
    "video": "video",
}
LAYOUTS = {  # by the key that tells a row's layout: the keys that hold its messages
    "messages": ("messages", "system"),
    "conversations": ("conversations", "system"),
    "query": ("query", "response", "history", "system"),
    "instruction": ("instruction", "input", "output", "history", "system"),
}
TURNS = frozenset(key for keys in LAYOUTS.values() for key in keys)
NOTES = frozenset(
    (
        "id",
        "idx",
        "index",
        "source",
        "dataset",
        "model",
        "category",
        "language",
        "lang",
        "meta",
        "metadata",
        "split",
        "conversation_id",
        "hash",
        "tags",
        "score",
        "parallel_tool_calls",
    )
)
NOT_LEARNT = frozenset(
    (
        "tools",
        "functions",
        "function_call",
        "tool_choice",
        "response_format",
        "objects",
        "label",
        "chosen",
        "rejected",
        "rejected_response",
        "rejected_messages",
        "rejected_images",
    )
)
TAGS_ARE_MEDIA = ("conversations", "query")  # layouts in which a tag is never plain text
ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "system": "system",
    "developer": "system",
}
MESSAGE_KEYS = WITHOUT_MEANING | {"role", "content", "from", "value"}
TAG = re.compile("<(image|audio|video)>")
SURROGATE = re.compile("[\ud800-\udfff]")
NO_WEIGHT = (
    "weight",
    "loss",
)  # of a message: 0 or false where it is not to be learnt (OpenAI; ms-swift)
SOURCES = (
    "image",
    "audio",
    "video",
    "image_url",
    "audio_url",
    "video_url",
    "path",
    "url",
)  # keys that may hold a path


def standard(row, folder: Path) -> dict:
    """A row in any of the layouts -> a row in ours: messages with a role and a content each, paths
    made whole.

    The content of a message is a text, or a list of items as respond() takes them. Raises UserError
    saying what is wrong.
    """
    if not isinstance(row, dict):
        raise UserError(f"{kind_of(row)}; expected an object with messages")
    row = {
        key: value
        for key, value in without_nulls(row).items()
        if key not in NOT_LEARNT or not is_empty(value)
    }
    allowed = {*OWN_KEYS, *LISTS, *TURNS}
    if unknown := sorted(row.keys() - allowed - NOTES):
        raise UserError(
            f"unknown key {shorten(unknown[0], 60)!r}; keys are {', '.join(OWN_KEYS)}, and those of other "
            f"layouts (jsonl_layouts.py lists them)"
        )
    for key in ("speech", "voice"):
        if key in row:
            text_of(row[key], repr(key))
    if type(row.get("use_audio_in_video", False)) is not bool:
        raise UserError(
            f"'use_audio_in_video' is {kind_of(row['use_audio_in_video'])}; expected true or false"
        )
    written = turns(row)
    messages = [spelled_alike(message, i) for i, message in enumerate(written, 1)]
    for message in messages:
        if message["role"] not in ("system", "user", "assistant"):
            raise UserError(
                f"unknown role {shorten(message['role'], 60)!r}; roles are system, user and assistant"
            )
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise UserError(
            "expected at least one question, and as the last message the assistant's answer"
        )
    for key in NO_WEIGHT:
        if written[-1].get(key) == 0:  # false is 0 too
            raise UserError(
                f"the last answer has {key} {'0' if key == 'weight' else 'false'}, and no other is learnt; "
                f"leave the line out"
            )
    put_media(messages, media_of(row))
    for message in messages:
        if isinstance(message["content"], list):
            message["content"] = [whole_paths(item, folder) for item in message["content"]]
    kept = {key: row[key] for key in ("voice", "use_audio_in_video") if key in row}
    if row.get("speech"):
        kept["speech"] = whole_path(row["speech"], folder)
    return {"messages": messages, **kept}


def turns(row: dict) -> list:
    """The messages of a row, in whatever spelling. Raises UserError where there are none, or keys
    of two layouts.
    """
    ways = [key for key in LAYOUTS if key in row]
    if len(ways) != 1:
        raise UserError(
            f"expected one of messages, conversations, query and instruction; found {' and '.join(ways) or 'none'}"
        )
    for key in sorted(row.keys() & TURNS - {*LAYOUTS[ways[0]]}):
        if row[key] not in ("", []):
            raise UserError(
                f"{key!r} is no key of a row with {ways[0]!r}, and would not be learnt; put it into "
                f"{ways[0]!r}, or leave it out"
            )
    if ways[0] in ("messages", "conversations"):
        if not isinstance(row[ways[0]], list):
            raise UserError(f"{ways[0]!r} is {kind_of(row[ways[0]])}; expected a list of messages")
        before = [{"role": "system", "content": row["system"]}] if row.get("system") else []
        return before + row[ways[0]]
    question = text_of(row[ways[0]], repr(ways[0]))
    if row.get("input"):
        question += "\n" + text_of(row["input"], "'input'")
    answer = row.get("response" if ways[0] == "query" else "output")
    asked = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    history = row.get("history", [])
    if not isinstance(history, list) or not all(
        isinstance(pair, list) and len(pair) == 2 for pair in history
    ):
        raise UserError("'history' is no list of pairs of a question and an answer")
    for earlier in [*history, [question, answer]]:
        asked += [
            {"role": role, "content": content}
            for role, content in zip(("user", "assistant"), earlier)
        ]
    return asked


def spelled_alike(message, number: int) -> dict:
    """A message in the spelling of any layout -> {"role", "content"}. Raises UserError."""
    if not isinstance(message, dict):
        raise UserError(
            f"message {number} is {kind_of(message)}; expected a dictionary with role and content"
        )
    message = without_nulls(message)
    for new, old in (("role", "from"), ("content", "value")):
        if new in message and old in message:
            raise UserError(f"message {number} has both {new!r} and {old!r}; give one of them")
    role, content = (
        message.get("role", message.get("from")),
        message.get("content", message.get("value")),
    )
    for key in ("tool_calls", "function_call", "audio", "refusal"):
        if message.get(key):
            raise UserError(f"message {number} has {key!r}, which cannot be learnt here")
    for key, value in message.items():
        if key not in MESSAGE_KEYS and value not in ("", [], {}):
            raise UserError(
                f"message {number} has the unknown key {shorten(key, 60)!r}; expected role and content; "
                f"lists of media stand beside the messages"
            )
    if isinstance(content, list):
        content = [checked_item(item, number) for item in content]
    elif content is None:
        raise UserError(f"message {number} has no content")
    else:
        text_of(content, f"the content of message {number}")
    if not isinstance(role, str):
        raise UserError(f"message {number} has no role; roles are system, user and assistant")
    return {"role": ROLES.get(role, role), "content": content}


def checked_item(item, number: int) -> dict:
    """A content item without nulls. Raises UserError where it is none, or a text without its text."""
    if not isinstance(item, dict):
        raise UserError(
            f"a content item of message {number} is {kind_of(item)}; expected a dictionary with one of image, "
            f"audio, video, text"
        )
    item = without_nulls(item)
    if item.get("type") == "text" or "text" in item:
        text_of(item.get("text"), f"a text of message {number}")
    return item


def media_of(row: dict) -> dict[str, list]:
    """The entries of a row's lists by kind (image, audio, video). Tags of kinds that are missing
    are plain text.
    """
    media = {}
    if any(key in row for key in TAGS_ARE_MEDIA):
        media = {kind: [] for kind in LISTS.values()}
    for key, kind in LISTS.items():
        if key not in row:
            continue
        entries = row[key] if isinstance(row[key], list) else [row[key]]
        if row[key] == "":
            entries = []
        media.setdefault(kind, []).extend(source_of(entry, kind) for entry in entries)
    return media


def put_media(messages: list[dict], media: dict[str, list]) -> None:
    """Put the entries of a row's lists where tags, or items without a source, stand for them.
    Raises UserError.
    """
    left = {kind: list(entries) for kind, entries in media.items()}

    def taken(kind: str) -> dict:
        if not media[kind]:
            raise UserError(
                f"<{kind}> stands for no file, since the list '{kind}s' is empty or missing; list the file "
                f"there, or leave the tag out"
            )
        if not left[kind]:
            raise UserError(f"more <{kind}> tags than the {len(media[kind])} that '{kind}s' lists")
        return {"type": kind, kind: left[kind].pop(0)}

    for message in messages:
        content = message["content"]
        if isinstance(content, str):
            pieces = split_at_tags(content, media.keys())
            if pieces != [content]:
                message["content"] = [
                    text_item(piece) if isinstance(piece, str) else taken(piece[0])
                    for piece in pieces
                ]
            continue
        message["content"] = []
        for item in content:
            if is_place(item, media.keys()):
                message["content"].append(taken(item["type"]))
            elif item.get("type", "text") == "text" and "text" in item:
                pieces = split_at_tags(item["text"], media.keys())
                message["content"] += [
                    {**item, "text": piece} if isinstance(piece, str) else taken(piece[0])
                    for piece in pieces
                ]
            else:
                message["content"].append(item)
    rest = [{"type": kind, kind: source} for kind, entries in left.items() for source in entries]
    first = next((message for message in messages if message["role"] == "user"), None)
    if rest and first is None:
        raise UserError(f"no question, to which the {rest[0]['type']} could belong")
    if rest:
        content = first["content"]
        first["content"] = rest + ([text_item(content)] if isinstance(content, str) else content)


def text_item(text: str) -> dict:
    """A text as a content item."""
    return {"type": "text", "text": text}


def split_at_tags(text: str, kinds) -> list[str | tuple[str]]:
    """A text as a list of texts and of (kind,) for the tags of these kinds."""
    pieces, end = [], 0
    for tag in TAG.finditer(text):
        if tag[1] in kinds:
            pieces += [text[end : tag.start()]] if tag.start() > end else []
            pieces.append((tag[1],))
            end = tag.end()
    return pieces + ([text[end:]] if end < len(text) or not pieces else [])


def is_place(item, kinds) -> bool:
    """Whether an item says what it is and not where it comes from, as the vision datasets of
    Hugging Face write it.
    """
    return isinstance(item, dict) and item.keys() == {"type"} and item["type"] in list(kinds)


def source_of(entry, kind: str):
    """An entry of a list of media: a path, or a dictionary of one. Raises UserError for anything
    else.
    """
    if isinstance(entry, dict):
        entry = without_nulls(entry)
        entry = entry.get("path", entry.get("url"))
    if not isinstance(entry, str) or not entry:
        raise UserError(f"an entry of '{kind}s' is {kind_of(entry)}; expected a path")
    return entry


def whole_paths(item, folder: Path):
    """A content item with its path made whole, whichever key holds it."""
    if not isinstance(item, dict):
        return item
    whole = dict(item)
    for key in SOURCES:
        if key in whole:
            whole[key] = whole_source(whole[key], folder)
    return whole


def whole_source(source, folder: Path):
    """A path, a dictionary of one, or a list of both (a film as frames) with paths made whole;
    others stay.
    """
    if isinstance(source, str):
        return whole_path(source, folder)
    if isinstance(source, list):
        return [whole_source(frame, folder) for frame in source]
    return whole_paths(without_nulls(source), folder) if isinstance(source, dict) else source


def whole_path(source: str, folder: Path) -> str:
    """A path relative to the folder made whole; web addresses, file: and data: URIs stay as they
    are.
    """
    return source if is_uri(source) else str(folder / source)


def without_nulls(row: dict) -> dict:
    """The keys that have a value."""
    return {key: value for key, value in row.items() if value is not None}


def is_empty(value) -> bool:
    """Whether a value holds nothing: "", [], {}, these as JSON in a text, or an object of nothing
    else.
    """
    if isinstance(value, dict):
        return all(inner is None or is_empty(inner) for inner in value.values())
    return value == [] or isinstance(value, str) and value.strip() in ("", "[]", "{}")


def text_of(value, what: str) -> str:
    """A value that has to be a text. Raises UserError for another type, and for halves of
    characters.
    """
    if not isinstance(value, str):
        raise UserError(f"{what} is {kind_of(value)}; expected a text")
    if SURROGATE.search(value):
        raise UserError(
            f"{what} holds half of a character (a lone surrogate); write the file as UTF-8"
        )
    return value


def kind_of(value) -> str:
    """A value of JSON in a few words, for messages."""
    names = {
        dict: "an object",
        list: "a list",
        str: "a text",
        bool: "true or false",
        type(None): "null",
    }
    return (
        repr(value)[:20]
        if type(value) in (int, float)
        else names.get(type(value), type(value).__name__)
    )
