"""Training data of one's own: bad lines are reported before training, good ones are streamed, and
the tuned model is saved.
"""

import json
import os
import re
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from training import stages

import minomni
from minomni import __main__ as command
from minomni.data import corpus, jsonl
from minomni.errors import UserError
from minomni.eval import held_out_speaker
from minomni.train import finetune
from minomni.train.finetune import FinetuneOptions
from minomni.train.loop import Recipe, train


@pytest.fixture(scope="module")
def recordings():
    return corpus.sample_recordings(held_out=False)


@pytest.fixture
def omni(tiny_folder):
    """A fresh model with random weights."""
    return minomni.load(str(tiny_folder))


@pytest.fixture
def small(monkeypatch, tiny_folder):
    """finetune() starts from the random model and takes two rows per step."""
    monkeypatch.setattr(
        finetune, "load", lambda size, device, **_: minomni.load(str(tiny_folder), device)
    )
    monkeypatch.setitem(finetune.FINETUNE_RECIPES, "tiny", {"chat": (3e-3, 2), "talker": (3e-3, 2)})
    monkeypatch.setattr(finetune.FinetuneChatStage, "preview_text", lambda self: "")


def line(question="say a", answer="a circle", **more) -> dict:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, **more}


def write(folder: Path, rows: list, name="my.jsonl") -> Path:
    """A JSONL file of rows; texts are written as they are."""
    texts = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / name).write_text("\n".join(texts) + "\n")
    return folder / name


@pytest.fixture
def spoken(tmp_path, recordings) -> list[dict]:
    """Four rows whose answers are recordings in tmp_path, two of them by a voice that the model
    does not know.
    """
    rows = []
    for i in range(4):
        soundfile.write(tmp_path / f"{i}.wav", recordings.wave(i), 16_000)
        text = recordings.utterances[i].text
        rows.append(line(f"say {text}", text, speech=f"{i}.wav", voice=("Ann", "Me")[i % 2]))
    return rows


BAD = [
    ("{", "not JSON"),
    ("[" * 100_000, "not JSON"),
    ('{"messages": NaN}', "'messages' is nan; expected a list"),
    ([1], "a list; expected an object with messages"),
    ("null", "null; expected an object"),
    ({"messages": [], "speach": "x.wav"}, "unknown key 'speach'"),
    ({"messages": []}, "at least one question"),
    ({"messages": [{"role": "user", "content": "a"}]}, "the assistant's answer"),
    ({"messages": ["a", "b"]}, "message 1 is a string; expected a dictionary"),
    ({"messages": {"role": "user"}}, "'messages' is an object; expected a list"),
    (
        {"messages": [{"role": ["user"], "content": "a"}, {"role": "assistant", "content": "a"}]},
        "message 1 has no role",
    ),
    ({"messages": [], "conversations": []}, "found messages and conversations"),
    ({"history": []}, "found none"),
    (line(answer=" "), "the answer is empty"),
    (line(answer=[]), "the answer is empty"),
    (line(answer=0.5), "the content of message 2 is 0.5"),
    (line(answer=None), "message 2 has no content"),
    (line(answer=["a"]), "a content item of message 2 is a string"),
    (line(answer=[{"type": "text", "text": ["a"]}]), "text of message 2 is a list"),
    (line(answer="half \udca9"), "half of a character"),
    (line([{"type": "text", "text": "\ud800"}]), "half of a character"),
    (line(answer=[{"type": "image", "image": "x.png"}]), "the answer holds media"),
    (line([{"type": "image", "image": "none.png"}]), "none.png: no such file"),
    (line([{"type": "audio", "audio": "words.wav"}]), "words.wav: not readable as audio"),
    (line([{"type": "smell", "smell": "x"}]), "expected one of"),
    (line([{"type": "audio", "audio": "https://example.org/a.wav"}]), "not fetched"),
    (line([{"type": "text"}]), "text of message 1 is null"),
    (line({"type": "text", "text": "a"}), "the content of message 1 is an object"),
    (line("so long " * 3000), "the context holds 2048"),
    (line(answer="so long " * 3000), "the context holds 2048"),
    (line("<|AUDIO|>"), "which only media may put there"),
    (line(answer="a <|IMAGE|> b"), "which only media may put there"),
    (line(answer="<|vision_bos|>"), "which only media may put there"),
    (line(speech="none.wav"), "none.wav: no such file"),
    (line(speech=3), "'speech' is 3"),
    (line(speech="hush.wav", voice="Me"), "hush.wav: is silent"),
    (line(voice=["Ann"]), "'voice' is a list"),
    (line(use_audio_in_video=1), "'use_audio_in_video' is 1; expected true or false"),
    (
        {"messages": [{"role": "users", "content": "a"}, {"role": "assistant", "content": "a"}]},
        "unknown role 'users'",
    ),
    (line(images=["x.png"], question="<image><image> a"), "more <image> tags than the 1"),
    (line(images=[5]), "an entry of 'images' is 5"),
    ({"query": "a", "response": "b", "history": [["a"]]}, "'history' is not a list of pairs"),
    ({"query": "a"}, "message 2 has no content"),
    (
        {"messages": [*line()["messages"][:1], {"role": "assistant", "content": "a", "weight": 0}]},
        "has weight 0",
    ),
    (
        {
            "conversations": [
                {"from": "human", "value": "a"},
                {"from": "gpt", "value": "b", "loss": False},
            ]
        },
        "has loss false",
    ),
    (
        {
            "messages": [
                {"role": "user", "content": "a", "audios": ["x.wav"]},
                *line()["messages"][1:],
            ]
        },
        "message 1 has the unknown key 'audios'",
    ),
    (
        {
            "messages": [
                *line()["messages"][:1],
                {"role": "assistant", "content": "a", "thought": "hm"},
            ]
        },
        "message 2 has the unknown key 'thought'",
    ),
    (
        {"messages": [{"role": "user", "from": "gpt", "content": "a"}, *line()["messages"][1:]]},
        "both 'role' and 'from'",
    ),
    (
        {"messages": [{"role": "user", "content": "a", "value": "b"}, *line()["messages"][1:]]},
        "both 'content' and 'value'",
    ),
    (line(output="b"), "'output' is not a key of a row with 'messages'"),
    (
        {"conversations": line()["messages"], "history": [["a", "b"]]},
        "'history' is not a key of a row with 'conversations'",
    ),
    ({"query": "a", "response": "b", "input": "c"}, "'input' is not a key of a row with 'query'"),
    (
        {"instruction": "a", "output": "b", "response": "c"},
        "'response' is not a key of a row with 'instruction'",
    ),
    (line([{"type": ["audio"]}], audios=["words.wav"]), "a content item"),
    (
        line([{"type": "text", "text": "<audio> or <audio>"}], audios=["x.wav"]),
        "more <audio> tags than the 1",
    ),
    (
        line("<video> what", videos=[]),
        "<video> stands for no file, since the list 'videos' is empty",
    ),
    (
        line([{"type": "text", "text": "hear <audio>"}], audio=""),
        "<audio> stands for no file, since the list 'audios'",
    ),
    (
        {"query": "<image> or not", "response": "b"},
        "<image> stands for no file, since the list 'images'",
    ),
    ({"conversations": line("a <audio>")["messages"], "image": []}, "<audio> stands for no file"),
    (line(answer="a circle<|im_end|>"), "an answer holds <|im_end|>"),
    (line(answer=[{"text": "b <|endof"}, {"text": "text|>"}]), "an answer holds <|endoftext|>"),
    (
        {"query": "a", "response": "b", "history": [["c", "<|im_start|>d"]]},
        "an answer holds <|im_start|>",
    ),
    (line(objects={"ref": ["a dog"], "bbox": []}), "unknown key 'objects'"),
    (line(rejected_response="no"), "unknown key 'rejected_response'"),
    (line(speach=""), "unknown key 'speach'"),
    (
        {
            "messages": [
                {"role": "assistant", "content": "a", "tool_calls": [{}]},
                *line()["messages"],
            ]
        },
        "'tool_calls'",
    ),
]


def test_bad_lines_are_reported_and_nothing_is_trained(tmp_path, small):
    (tmp_path / "words.wav").write_text("words, not sound")
    soundfile.write(tmp_path / "hush.wav", torch.zeros(20_000).numpy(), 16_000)
    rows = [
        row for bad, _ in BAD for row in (bad if isinstance(bad, str) else json.dumps(bad), line())
    ]
    with pytest.raises(UserError) as error:
        finetune.finetune("tiny", write(tmp_path, rows), tmp_path / "tuned", FinetuneOptions())
    message = str(error.value)
    assert f"{len(BAD)} bad lines, nothing was trained; line 1: not JSON" in message
    assert len(message) <= 500
    assert "; line 3: " in message
    assert "; line 5: " in message
    assert f"and {len(BAD) - 3} more in" in message
    causes = (tmp_path / "tuned.run" / "bad_lines.txt").read_text().splitlines()
    assert len(causes) == len(BAD)
    for i, (cause, (_, says)) in enumerate(zip(causes, BAD, strict=True)):
        assert cause.startswith(f"line {2 * i + 1}: "), cause
        assert says in cause
    assert not (tmp_path / "tuned").exists()
    assert not list((tmp_path / "tuned.run" / "stages").iterdir())


def test_an_unexpected_exception_names_its_line(tmp_path, omni, monkeypatch):
    """Any exception of a line is reported with its number, and later lines are still validated."""

    def broken(messages, *_):
        raise ZeroDivisionError("of a part that is not ours\nand more")

    monkeypatch.setattr(jsonl.Processor, "__call__", broken)
    with pytest.raises(UserError) as error:
        jsonl.validate(write(tmp_path, [line(), "", line()]), omni)
    text = str(error.value)
    assert "2 bad lines" in text
    assert "line 1: cannot be read (ZeroDivisionError: of a part" in text
    assert "line 3: " in text


def test_message_is_short_and_validation_stops_after_many_errors(tmp_path, omni):
    with pytest.raises(UserError) as error:
        jsonl.validate(write(tmp_path, ["?"] * 5000, name="x" * 200), omni)
    text = str(error.value)
    assert text.isprintable()
    assert len(text) <= 500
    assert "1000 or more bad lines" in text
    assert "and 997 more" in text


def test_endless_line_is_refused_quickly(tmp_path, omni):
    """20 GB without a line feed, as a sparse file."""
    path = tmp_path / "big.jsonl"
    with open(path, "wb") as file:
        file.write(json.dumps(line()).encode() + b"\n{")
        file.truncate(20_000_000_000)
    with pytest.raises(UserError, match="line 2: is longer than 64 MB"):
        jsonl.read_dataset(path, tmp_path, omni)
    with open(path, "r+b") as file:
        file.write(b"[\n")
    with pytest.raises(UserError, match="larger than 256 MB and not one JSON object a line"):
        jsonl.read_dataset(path, tmp_path, omni)


def test_speech_needs_a_voice_that_can_be_made(tmp_path, omni, recordings):
    soundfile.write(tmp_path / "short.wav", recordings.wave(0)[:4000], 16_000)
    path = write(tmp_path, [line(), line(speech="short.wav", voice="Me")])
    with pytest.raises(
        UserError, match=r"line 2: .*short.wav, of voice .*a voice needs at least 1 s"
    ):
        jsonl.validate(path, omni)
    omni.voices = {}
    with pytest.raises(
        UserError, match='line 1: the model has no voices; give this recording a "voice"'
    ):
        jsonl.validate(write(tmp_path, [line(speech="short.wav")]), omni)


def test_media_paths_are_relative_to_the_file(tmp_path, omni, recordings):
    (tmp_path / "media").mkdir()
    Image.new("RGB", (64, 64), "red").save(tmp_path / "media" / "a.png")
    soundfile.write(tmp_path / "q.wav", recordings.wave(0), 16_000)
    asked = [
        {"type": "image", "image": "media/a.png"},
        {"type": "audio", "audio": str(tmp_path / "q.wav")},
    ]
    turns = [{"role": "user", "content": "say a"}, {"role": "assistant", "content": "a"}]
    lines = jsonl.validate(
        write(tmp_path, ["", {"messages": [*turns, *line(asked)["messages"]]}]), omni
    )
    question = lines[0].question
    assert len(lines) == 1
    assert [message["role"] for message in question] == [
        "system",
        "user",
        "assistant",
        "user",
    ]
    assert question[-1]["content"][0] == {
        "type": "image",
        "image": str(tmp_path / "media" / "a.png"),
    }
    inputs = jsonl.prompt_inputs(lines[0], jsonl.Processor(omni.config, omni.tokenizer))
    assert len(inputs.mels) == 1
    assert len(inputs.image_grids) == 1


def asked(*content) -> list[dict]:
    """The messages of a row whose question is this content."""
    return [
        {"role": "user", "content": content[0] if isinstance(content[0], str) else list(content)}
    ]


TEXT = lambda text: {"type": "text", "text": text}  # noqa: E731
LAYOUTS = {  # a row, and its question; the answer is always "a square"
    "ours, with nulls": (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "image": "a.png", "text": None},
                        {"type": "text", "text": "what", "image": None},
                    ],
                },
                {
                    "role": "assistant",
                    "content": [{"type": "text", "text": "a square", "image": None}],
                },
            ],
            "speech": None,
            "voice": None,
            "images": None,
            "tools": None,
        },
        asked({"type": "image", "image": "@a.png"}, TEXT("what")),
    ),
    "openai": (
        {
            "messages": [
                {"role": "developer", "content": "be short"},
                {
                    "role": "user",
                    "name": "Bo",
                    "content": [
                        {"type": "image_url", "image_url": {"url": "a.png"}},
                        {"type": "text", "text": "what"},
                    ],
                },
                {"role": "assistant", "content": "a circle", "weight": 0},
                {"role": "user", "content": "again"},
                {
                    "role": "assistant",
                    "content": "a square",
                    "weight": 1,
                    "refusal": None,
                    "tool_calls": None,
                },
            ]
        },
        [
            {"role": "system", "content": "be short"},
            *asked({"type": "image_url", "image_url": {"url": "@a.png"}}, TEXT("what")),
            {"role": "assistant", "content": "a circle"},
            *asked("again"),
        ],
    ),
    "ms-swift": (
        {
            "messages": [
                {"role": "user", "content": "<image>first, then <audio> and <video>"},
                {"role": "assistant", "content": "a square"},
            ],
            "images": ["a.png"],
            "audios": ["a.wav"],
        },
        asked(
            {"type": "image", "image": "@a.png"},
            TEXT("first, then "),
            {"type": "audio", "audio": "@a.wav"},
            TEXT(" and <video>"),
        ),
    ),
    "ms-swift, without tags": (
        {
            "messages": [
                {"role": "system", "content": "be short"},
                {"role": "user", "content": "what"},
                {"role": "assistant", "content": "a square"},
            ],
            "images": [{"path": "a.png", "bytes": None}],
        },
        [
            {"role": "system", "content": "be short"},
            *asked({"type": "image", "image": "@a.png"}, TEXT("what")),
        ],
    ),
    "ms-swift, older": (
        {
            "query": "and <audio>",
            "response": "a square",
            "history": [["hi", "hello"]],
            "system": "be short",
            "audios": "a.wav",
        },
        [
            {"role": "system", "content": "be short"},
            *asked("hi"),
            {"role": "assistant", "content": "hello"},
            *asked(TEXT("and "), {"type": "audio", "audio": "@a.wav"}),
        ],
    ),
    "sharegpt": (
        {
            "id": 7,
            "conversations": [
                {"from": "system", "value": "be short"},
                {"from": "human", "value": "<image>\nwhat"},
                {"from": "gpt", "value": "a square"},
            ],
            "images": ["a.png"],
        },
        [
            {"role": "system", "content": "be short"},
            *asked({"type": "image", "image": "@a.png"}, TEXT("\nwhat")),
        ],
    ),
    "llava": (
        {
            "id": "x",
            "image": "a.png",
            "conversations": [
                {"from": "human", "value": "what <image>"},
                {"from": "gpt", "value": "a square"},
            ],
        },
        asked(TEXT("what "), {"type": "image", "image": "@a.png"}),
    ),
    "alpaca": (
        {"instruction": "name it", "input": "it has four corners", "output": "a square"},
        asked("name it\nit has four corners"),
    ),
    "alpaca, no input": (
        {"instruction": "name it", "input": "", "output": "a square", "system": ""},
        asked("name it"),
    ),
    "places without sources": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "a square"}]},
            ],
            "images": ["a.png"],
        },
        asked({"type": "image", "image": "@a.png"}, TEXT("what")),
    ),
    "tags in a list of items": (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "<image> or <audio>?"},
                        {"type": "image"},
                        {"text": "what"},
                    ],
                },
                {"role": "assistant", "content": "a square"},
            ],
            "images": ["a.png", "b.png"],
        },
        asked(
            {"type": "image", "image": "@a.png"},
            TEXT(" or <audio>?"),
            {"type": "image", "image": "@b.png"},
            {"text": "what"},
        ),
    ),
    "frames as dictionaries": (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "video", "video": [{"path": "f.png", "bytes": None}, "g.png"]}
                    ],
                },
                {"role": "assistant", "content": "a square"},
            ]
        },
        asked({"type": "video", "video": [{"path": "@f.png"}, "@g.png"]}),
    ),
    "empty keys of another layout": (
        {
            "messages": [
                {"role": "user", "content": "what", "images": [], "id": 3, "loss": True},
                {"role": "assistant", "content": "a square", "loss": True},
            ],
            "history": [],
            "input": "",
        },
        asked("what"),
    ),
    "options of an item stay": (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "video", "video": ["a.png", "/b.png"], "fps": 2.0}],
                },
                {"role": "assistant", "content": "a square"},
            ]
        },
        asked({"type": "video", "video": ["@a.png", "/b.png"], "fps": 2.0}),
    ),
    "text about tags": (
        {
            "messages": [
                {"role": "user", "content": "what is <video>"},
                {"role": "assistant", "content": "a square"},
            ]
        },
        asked("what is <video>"),
    ),
    "empty keys of what is not learned": (
        {
            **line("what", "a square"),
            "tools": " ",
            "functions": [],
            "rejected_response": "",
            "label": None,
            "objects": {"ref": [], "bbox": None},
            "tool_choice": {},
            "rejected_messages": "[]",
        },
        asked("what"),
    ),
    "an instruction about tags": (
        {"instruction": "what is <audio>", "output": "a square"},
        asked("what is <audio>"),
    ),
    "addresses stay": (
        {
            "query": "what",
            "response": "a square",
            "images": ["data:image/png;base64,AAAA", "file:///b.png"],
        },
        asked(
            {"type": "image", "image": "data:image/png;base64,AAAA"},
            {"type": "image", "image": "file:///b.png"},
            TEXT("what"),
        ),
    ),
    "addresses in other spellings": (
        {
            "query": "what",
            "response": "a square",
            "audios": [
                "file:/c.wav",
                "File:///d.wav",
                "Data:audio/wav;base64,AA",
                "HTTPS://e.org/f.wav",
                "data/g.wav",
                "at 1://h.wav",
            ],
        },
        asked(
            *(
                {"type": "audio", "audio": source}
                for source in (
                    "file:/c.wav",
                    "File:///d.wav",
                    "Data:audio/wav;base64,AA",
                    "HTTPS://e.org/f.wav",
                    "@data/g.wav",
                    "@at 1:/h.wav",
                )
            ),
            TEXT("what"),
        ),
    ),
}


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_layouts_of_other_programs(name, tmp_path):
    row, question = LAYOUTS[name]
    parsed = jsonl.parse(json.dumps(row), tmp_path, "be kind")
    wanted = json.loads(json.dumps(question).replace("@", f"{tmp_path}/"))
    if wanted[0]["role"] != "system":
        wanted = [{"role": "system", "content": "be kind"}, *wanted]
    assert parsed.question == wanted
    assert parsed.answer == "a square"
    assert parsed.speech is parsed.voice is None
    assert parsed.use_audio_in_video is False


def test_tools_are_an_unknown_key(tmp_path):
    with pytest.raises(UserError, match="unknown key 'tools'"):
        jsonl.parse(json.dumps(line(tools=[{}])), tmp_path, "")


ROWS = [line("say é [a] {b}", 'a "circle"'), LAYOUTS["alpaca"][0], line("c", "a\nb")]


@pytest.mark.parametrize(
    "kind",
    [
        "lines",
        "lines with \\r and a mark",
        "array",
        "pretty array",
        "utf-16 lines",
        "utf-16 array",
        "pretty objects",
        "pretty objects and commas",
        "utf-16 pretty objects",
        "lines and commas",
        "utf-16 lines and commas",
        "long lines and commas",
        "several a line",
        "objects without indents",
        "long objects without indents",
        "utf-16 objects without indents",
    ],
)
@pytest.mark.reads(
    "data",
    "training data as one object a line, spread over lines, with commas, an array, in UTF-16",
    "read",
)
def test_files_of_rows(kind, tmp_path, omni):
    plain = [json.dumps(row, ensure_ascii=False) for row in ROWS]
    pretty = [json.dumps(row, indent="\t", ensure_ascii=False) for row in ROWS]
    flat = [re.sub("^ +", "", json.dumps(row, indent=1), flags=re.MULTILINE) for row in ROWS]
    inside = [row.replace("[\n{\n", "[\n{").replace("{\n", "{") for row in flat]
    wide = line("say é [a] {b}", 'a "circle"', voice="v" * 2_000_000)
    content = {
        "lines": "\n".join(plain).encode(),
        "lines with \\r and a mark": "\r\n".join(plain).encode("utf-8-sig"),
        "array": json.dumps(ROWS).encode(),
        "pretty array": ("\n " + json.dumps(ROWS, indent=2, ensure_ascii=False) + "\n").encode(
            "utf-8-sig"
        ),
        "utf-16 lines": "\n".join(plain).encode("utf-16"),
        "utf-16 array": json.dumps(ROWS, indent=1).encode("utf-16"),
        "pretty objects": "\n".join(json.dumps(row, indent=4) for row in ROWS).encode(),
        "pretty objects and commas": ",\r\n".join(pretty).replace("\n", "\r\n").encode("utf-8-sig"),
        "utf-16 pretty objects": "\n\n".join(pretty).encode("utf-16"),
        "lines and commas": ",\n".join(plain).encode(),
        "utf-16 lines and commas": " ,\r\n".join(plain).encode("utf-16"),
        "long lines and commas": ",\n".join([json.dumps(wide), *plain[1:]]).encode("utf-8-sig"),
        "several a line": " ".join(plain).encode(),
        "objects without indents": "\n".join(inside).encode(),
        "long objects without indents": (
            json.dumps(wide).replace(": [", ": [\n") + "\n" + "\n".join(inside[1:])
        ).encode(),
        "utf-16 objects without indents": ",\n".join(inside).encode("utf-16"),
    }[kind]
    (tmp_path / "my.data").write_bytes(content)
    lines = jsonl.read_dataset(tmp_path / "my.data", tmp_path / "run", omni)
    assert [lines[i].answer for i in range(len(lines))] == ['a "circle"', "a square", "a\nb"]
    assert lines[0].question[-1]["content"] == "say é [a] {b}"


def test_media_paths_of_an_array_are_relative_to_it(tmp_path, omni):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.png")
    path = tmp_path / "my.json"
    path.write_text(json.dumps([LAYOUTS["llava"][0]], indent=2))
    lines = jsonl.read_dataset(path, tmp_path / "run", omni)
    assert lines[0].question[-1]["content"][-1]["image"] == str(tmp_path / "a.png")
    path.write_text(json.dumps([line(), 5, line(answer="<|VIDEO|>")], indent=2))
    with pytest.raises(
        UserError, match=r"my.json: 2 bad entries, .*entry 2: 5; expected.*; entry 3: a text holds"
    ):
        jsonl.read_dataset(path, tmp_path / "run", omni)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[", "entry 1 of the array is not JSON"),
        ("[{}", "does not go on after entry 1"),
        ("[{} {}]", "expected , or ]"),
        ("[{}, }]", "entry 2 of the array is not JSON"),
        ("[{}] 5", "something follows the array"),
        ("[]", "holds no line"),
        ("[" * 90_000, "entry 1 of the array is not JSON"),
        ("", "holds no line"),
        ("[5]\n[6]", "line 2: a list"),
    ],
)
def test_broken_arrays(text, says, tmp_path, omni):
    (tmp_path / "my.json").write_text(text)
    with pytest.raises(UserError) as error:
        jsonl.read_dataset(tmp_path / "my.json", tmp_path / "run", omni)
    assert says in str(error.value)
    assert "my.json" in str(error.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{\n "messages": [\n', "object 1, which begins in line 1, is not JSON"),
        (json.dumps(line(), indent=2) + "\n\n{\n 5\n}", "object 2, which begins in line"),
        (json.dumps(line(answer=""), indent=2), "1 bad entry, nothing was trained; entry 1: the"),
        ('{"messages": [\n' + json.dumps(line()), "1 bad line, nothing was trained; line 1"),
        ('{"messages": [{]}\n' + json.dumps(line()), "1 bad line, nothing was trained; line 1"),
        (
            json.dumps(line()) + "]\n" + json.dumps(line()),
            "1 bad line, nothing was trained; line 1",
        ),
        (json.dumps(line()) + ",\n5", "1 bad entry, nothing was trained; entry 2: 5"),
        (json.dumps(line()) + ",\n{]", "object 2, which begins in line 2, is not JSON"),
    ],
)
def test_broken_objects_over_many_lines(text, says, tmp_path, omni):
    (tmp_path / "my.json").write_text(text)
    with pytest.raises(UserError) as error:
        jsonl.read_dataset(tmp_path / "my.json", tmp_path / "run", omni)
    assert says in str(error.value)
    assert "my.json" in str(error.value)


@pytest.mark.parametrize("begin", ["file:", "FILE://", "fIle://localhost"])
def test_image_uris_are_opened(begin, tmp_path, omni):
    Image.new("RGB", (64, 64), "blue").save(tmp_path / "b.png")
    lines = jsonl.validate(
        write(tmp_path, [line("<image> what", images=[f"{begin}{tmp_path}/b.png"])]), omni
    )
    assert (
        len(jsonl.prompt_inputs(lines[0], jsonl.Processor(omni.config, omni.tokenizer)).image_grids)
        == 1
    )


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("none", "no such file"),
        ("pipe", "is a device, a pipe"),
        ("/dev/zero", "is a device, a pipe"),
        ("/proc/self/mem", "the system's own"),
        ("x" * 300, "File name too long"),
        ("nul\0", "its name cannot be"),
    ],
)
def test_not_a_data_file(name, says, tmp_path, omni):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError) as error:
        jsonl.read_dataset(tmp_path / name, tmp_path / "run", omni)
    assert says in str(error.value)
    assert str(error.value).isprintable()


def test_epoch_contains_every_row_once():
    epochs = [[jsonl.epoch_index(3, 50, 50 * epoch + i) for i in range(50)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != [jsonl.epoch_index(4, 50, i) for i in range(50)]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(tmp_path, omni):
    """Ten times the lines, 8 MB more on disk: only the offsets and the epoch's order may grow."""
    peaks = []
    for count in (200, 2000):
        path = write(tmp_path, [line("a " * 500, f"{i}", voice="v" * 3000) for i in range(count)])
        tracemalloc.start()
        lines = jsonl.validate(path, omni)
        stage = finetune.FinetuneChatStage(
            omni, Recipe(steps=1000, batch=8, lr=1e-3), tmp_path, 0, lines
        )
        seen = {row.answer for step in range(count // 8) for row in stage.batch(step)}
        peaks.append(tracemalloc.get_traced_memory()[1] - sys.getsizeof(seen) - 60 * len(seen))
        tracemalloc.stop()
        assert len(lines) == len(seen) == count
    assert peaks[1] - peaks[0] < 100 * 1800, peaks  # at most 100 bytes a line, of 4,000


@pytest.mark.parametrize("name", stages(finetune.FINETUNE_STAGES, quick=()))
def test_stages_overfit_one_batch_and_resume_exactly(name, tmp_path, omni, tiny_folder, spoken):
    def stage_of(steps):
        fresh = minomni.load(str(tiny_folder))
        lines = jsonl.validate(write(tmp_path, [{**row, "voice": "Ann"} for row in spoken]), fresh)
        stage = finetune.FINETUNE_STAGES[name](
            fresh, Recipe(steps, 2, 5e-3, warmup=2), tmp_path, 0, lines
        )
        stage.preview_text = lambda: ""
        return stage

    stage = stage_of(100)
    batch = stage.batch(0)
    stage.batch = lambda step: batch
    with torch.no_grad():
        before = sum(stage.losses(batch).values())
    train(stage, tmp_path / "one", until=6)
    with torch.no_grad():
        assert sum(stage.losses(batch).values()) < 0.6 * before
    train(stage_of(4), tmp_path / "whole")
    train(stage_of(4), tmp_path / "halves", until=2)
    assert (tmp_path / "halves" / f"{name}.resume.pt").exists()
    train(stage_of(4), tmp_path / "halves", resume=True)
    whole, halves = (
        (tmp_path / run / f"{name}.safetensors").read_bytes() for run in ("whole", "halves")
    )
    assert whole == halves


def test_a_recording_has_the_same_codes_in_any_batch(tmp_path, omni):
    """Beside a longer recording it would be padded with silence, which changes its last codes."""
    generator = np.random.default_rng(0)
    rows = []
    for samples in (9_000, 31_000):
        path = tmp_path / f"{samples}.wav"
        soundfile.write(path, 0.1 * generator.standard_normal(samples), 16_000)
        rows.append(SimpleNamespace(speech=str(path)))
    recipe = Recipe(steps=1, batch=2, lr=1e-3)
    stage = finetune.FinetuneTalkerStage(omni, recipe, tmp_path, 0, None)
    together = stage.codes(rows)
    assert len(together[0]) < len(together[1])
    for codes, row in zip(together, rows, strict=True):
        assert torch.equal(codes, stage.codes([row])[0])


@pytest.mark.slow
def test_load_fine_tuned_model(tmp_path, small, tiny_folder, spoken):
    data, out = write(tmp_path, spoken), tmp_path / "tuned"
    finetune.finetune("tiny", data, out, FinetuneOptions(epochs=1))
    tuned, before = minomni.load(str(out)), minomni.load(str(tiny_folder))
    changed = {
        name.split(".")[0]
        for name, old in before.state_dict().items()
        if not torch.equal(old, tuned.state_dict()[name])
    }
    assert changed == {"thinker", "talker"}
    assert list(tuned.voices) == ["Ann", "Bob", "Me"]
    assert tuned.voices["Me"].bos_token == 502
    assert tuned.respond([{"role": "user", "content": "say a"}], voice="Me")
    assert json.loads((out / "trained.json").read_text())["stages"] == ["chat", "talker"]
    with pytest.raises(UserError, match="--resume continues it"):
        finetune.finetune("tiny", data, out, FinetuneOptions(epochs=1))
    with pytest.raises(UserError, match="begun with other epochs"):
        finetune.finetune("tiny", data, out, FinetuneOptions(epochs=2, resume=True))
    write(tmp_path, spoken[:3])
    with pytest.raises(UserError, match="begun with other data"):
        finetune.finetune("tiny", data, out, FinetuneOptions(epochs=1, resume=True))


@pytest.mark.slow
def test_resume_between_stages_is_exact(tmp_path, small, spoken, monkeypatch):
    data = write(tmp_path, spoken)
    finetune.finetune("tiny", data, tmp_path / "whole", FinetuneOptions(epochs=2))
    with monkeypatch.context() as patch:
        patch.setattr(
            finetune,
            "train",
            lambda stage, *rest, **more: train(
                stage, *rest, **more, until=2 if stage.name == "talker" else None
            ),
        )
        with pytest.raises(UserError, match="talker.safetensors is missing"):
            finetune.finetune("tiny", data, tmp_path / "halves", FinetuneOptions(epochs=2))
    assert not (tmp_path / "halves").exists()
    finetune.finetune("tiny", data, tmp_path / "halves", FinetuneOptions(epochs=2, resume=True))
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "halves")]
    assert files[0] == files[1]


def test_folder_of_spoken_digits(tmp_path, small, recordings):
    folder = tmp_path / "digits" / "recordings"
    folder.mkdir(parents=True)
    for name in ("3_ann_0.wav", "0_bob_12.wav", "readme.wav"):
        soundfile.write(folder / name, recordings.wave(0), 8_000)
    rows = list(jsonl.layout(tmp_path / "digits"))
    assert [row["messages"][-1]["content"] for row in rows] == [
        "the digit is zero",
        "the digit is three",
    ]
    out = tmp_path / "tuned"
    once = FinetuneOptions(epochs=1)
    assert finetune.finetune("tiny", tmp_path / "digits", out, once).is_dir()
    options = FinetuneOptions(stage="talker")
    with pytest.raises(UserError, match='no line has "speech"'):
        finetune.finetune("tiny", tmp_path / "digits", tmp_path / "other", options)


def test_held_out_speaker_is_not_trained_on(tmp_path, small, omni, recordings):
    folder = tmp_path / "digits"
    folder.mkdir()
    for name in ("3_ann_0.wav", "0_bob_12.wav", "7_ann_1.wav", "8_cleo_0.wav"):
        soundfile.write(folder / name, recordings.wave(0), 8_000)
    rows = jsonl.read_dataset(folder, tmp_path, omni, "ann")
    assert [row.speaker for row in (rows[0], rows[1])] == ["bob", "cleo"]
    assert len(rows) == 2
    assert [row.answer for row in rows.held_out()] == ["the digit is three", "the digit is seven"]
    options = FinetuneOptions(epochs=1, held_out_speaker="ann")
    finetune.finetune("tiny", folder, tmp_path / "a", options)
    options = FinetuneOptions(epochs=1, resume=True, held_out_speaker="bob")
    with pytest.raises(UserError, match="begun with other held-out speaker"):
        finetune.finetune("tiny", folder, tmp_path / "a", options)


def test_speaker_of_a_row(tmp_path, omni):
    path = write(tmp_path, [line(speaker="Ada"), line(), line(speaker="Bo")])
    rows = jsonl.read_dataset(path, tmp_path, omni, "Ada")
    assert [rows[0].speaker, rows[1].speaker] == [None, "Bo"]
    assert [row.speaker for row in rows.held_out()] == ["Ada"]
    with pytest.raises(UserError, match="no row has the speaker 'Eve'"):
        jsonl.read_dataset(path, tmp_path, omni, "Eve")
    only = write(tmp_path, [line(speaker="Ada")], name="only.jsonl")
    with pytest.raises(UserError, match="all rows are of the held-out speaker"):
        jsonl.read_dataset(only, tmp_path, omni, "Ada")
    with pytest.raises(UserError, match="'speaker' is 3"):
        jsonl.read_dataset(write(tmp_path, [line(speaker=3)], name="bad.jsonl"), tmp_path, omni)


def test_held_out_speaker_is_scored_before_and_after(
    tmp_path, small, tiny_folder, monkeypatch, capsys
):
    path = write(tmp_path, [line(speaker="Ada"), line(), line("say b", "a square", speaker="Ada")])
    finetune_arguments = ["train", str(tiny_folder), "--data", str(path), "--held-out", "Ada"]
    options = ["--lora", "r=2", "--epochs", "1", "--home", str(tmp_path / "home")]
    monkeypatch.setattr(sys, "argv", ["minomni", *finetune_arguments, *options])
    assert command.main() == 0
    table = capsys.readouterr().out
    assert "| answers_right | 0.0% (" in table
    assert "| answer_wer | " in table


def test_scores_of_a_held_out_speaker(tmp_path, omni, monkeypatch):
    """Of two answers one is right, and of five words two are wrong."""
    path = write(
        tmp_path,
        [
            line("say a", "a circle", speaker="Ada"),
            line("say b", "a red square", speaker="Ada"),
            line(),
        ],
    )
    rows = held_out_speaker.held_out_rows(path, omni, "Ada")
    answers = iter(["a circle", "the black square"])
    monkeypatch.setattr(omni, "respond", lambda *_, **__: SimpleNamespace(text=next(answers)))
    right, errors = held_out_speaker.answer_metrics(omni, rows)
    assert (right.value, right.n) == (0.5, 2)
    assert (errors.value, errors.n) == (0.4, 5)


def test_folder_of_ljspeech(tmp_path, small, recordings):
    folder = tmp_path / "LJ"
    (folder / "wavs").mkdir(parents=True)
    rows = [
        f"LJ-{i}|{recordings.utterances[i].text} 1|{recordings.utterances[i].text} one"
        for i in range(3)
    ]
    (folder / "metadata.csv").write_text("\n".join(rows) + "\n")
    for i in range(2):
        soundfile.write(folder / "wavs" / f"LJ-{i}.wav", recordings.wave(i), 22_050)
    with pytest.raises(UserError, match=r"row 3: .*LJ-2.wav: no such file"):
        finetune.finetune("tiny", folder, tmp_path / "tuned", FinetuneOptions(epochs=1))
    soundfile.write(folder / "wavs" / "LJ-2.wav", recordings.wave(2), 22_050)
    finetune.finetune("tiny", folder, tmp_path / "tuned", FinetuneOptions(epochs=1, resume=True))
    assert "LJ" in minomni.load(str(tmp_path / "tuned")).voices
    (folder / "metadata.csv").write_text("LJ-0 no columns\n")
    with pytest.raises(UserError, match="row 1 has 1 columns"):
        list(jsonl.layout(folder))


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be with a mark", "cp1252", "shift_jis"]
)
def test_metadata_in_any_encoding(encoding, tmp_path):
    (tmp_path / "LJ" / "wavs").mkdir(parents=True)
    mark = "\ufeff" if "mark" in encoding else ""
    text = mark + "Ü-1|ein Ü \u3042|ein Ü\r\nU-2|zwei\u2028Ü|zwei\u2028Ü\r\n"
    text = (
        text
        if encoding.startswith("utf")
        else "U-0|ein\n" + {"cp1252": "Ü-1|Übung\n", "shift_jis": "U-1|\u3042\n"}[encoding]
    )
    (tmp_path / "LJ" / "metadata.csv").write_bytes(text.encode(encoding.split()[0]))
    if not encoding.startswith("utf"):
        with pytest.raises(
            UserError, match=r"metadata.csv: is not UTF-8 \(byte \d+, in line 2\); save it as UTF-8"
        ):
            list(jsonl.layout(tmp_path / "LJ"))
        return
    rows = list(jsonl.layout(tmp_path / "LJ"))
    assert [Path(row["speech"]).name for row in rows] == ["Ü-1.wav", "U-2.wav"]
    assert [row["messages"][-1]["content"] for row in rows] == ["ein Ü", "zwei\u2028Ü"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"a|b\0|c\xff", "is not UTF-8"),
        (b"\xff\xfea", "is not UTF-16"),
        (b"a|" + b"b" * 200_000, "row 1 cannot be read"),
    ],
)
def test_broken_metadata(content, says, tmp_path):
    (tmp_path / "metadata.csv").write_bytes(content)
    with pytest.raises(UserError) as error:
        list(jsonl.layout(tmp_path))
    assert says in str(error.value)
    assert "metadata.csv" in str(error.value)


@pytest.mark.parametrize(
    ("out", "says"),
    [
        ("", "expected the name of a folder"),
        (".", "expected the name of a folder"),
        ("..", "expected the name of a folder"),
        ("file", "is a file"),
        ("file/below", "cannot be written"),
        ("full", "contains something other than a model"),
        ("x" * 300, "File name too long"),
        ("x" * 253, "File name too long"),
    ],
)
def test_invalid_output_folder(out, says, tmp_path, monkeypatch):
    """The error comes before the data are read or a model is loaded."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(finetune, "load", lambda *_, **__: pytest.fail("work began"))
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("mine")
    with pytest.raises(UserError) as error:
        finetune.finetune("tiny", tmp_path / "none.jsonl", Path(out), FinetuneOptions())
    assert says in str(error.value)
    assert (tmp_path / "file").read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"file", "full"}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--data", "none.jsonl"], "no such file or folder"),
        (["--data", "."], "and no metadata.csv"),
        (["--data", "none.jsonl", "--stage", "codec"], "fine-tuning has no stage 'codec'"),
        (["huge", "--data", "none.jsonl"], "cannot fine-tune size 'huge'"),
        (["--epochs", "3"], "go with --data"),
        (["--out", "x"], "go with --data"),
        (["--held-out", "ann"], "goes with --data"),
    ],
)
def test_command_line_errors(options, says, tmp_path, small, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys, "argv", ["minomni", "train", *options, "--home", str(tmp_path / "home")]
    )
    assert command.main() == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "home" / "tuned").exists()
