"""Messages to the release's ChatML, its placeholders and its order of audio and video."""

import base64
import io
from dataclasses import replace
from itertools import groupby

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from minomni.config import QWEN7B, TINY
from minomni.data.vocabulary import world_tokenizer
from minomni.errors import UserError
from minomni.inputs.interleave import chunk_bounds, interleave
from minomni.inputs.media import Clip
from minomni.inputs.prompt import Processor, render
from minomni.inputs.tokenizer import Tokenizer, special_tokens

TOKENS = TINY.thinker.tokens
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
VIDEO, AUDIO = "<|vision_bos|><|VIDEO|><|vision_eos|>", "<|audio_bos|><|AUDIO|><|audio_eos|>"
IMAGE, REPLY = "<|vision_bos|><|IMAGE|><|vision_eos|>", "<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor(TINY, world_tokenizer(TOKENS))


def user(*content) -> list[dict]:
    return [{"role": "user", "content": list(content)}]


def image(height: int = 84, width: int = 112) -> dict:
    return {
        "type": "image",
        "image": np.random.RandomState(0).randint(0, 255, (height, width, 3), np.uint8),
    }


def audio(samples: int) -> dict:
    return {
        "type": "audio",
        "audio": 0.1 * np.random.RandomState(1).randn(samples).astype(np.float32),
    }


def video(
    frames: int, samples: int | None = None, fps: float = 2.0, size: tuple[int, int] = (84, 84)
) -> dict:
    pixels = torch.from_numpy(
        np.random.RandomState(2).randint(0, 255, (frames, *size, 3), np.uint8)
    )
    wave = None if samples is None else torch.from_numpy(audio(samples)["audio"])
    return {"type": "video", "video": Clip(pixels, torch.arange(frames) / fps, wave)}


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def runs(ids: list[int], tokens=TOKENS) -> list[tuple[str, int]]:
    """Ids as runs of one special token, or of ordinary text."""
    names = {i: name.strip("<|>") for name, i in special_tokens(tokens).items()}
    return [(name, len(list(group))) for name, group in groupby(names.get(i, "text") for i in ids)]


# ----------------------------------------------------------------------------------------------
# text
def test_template():
    assert (
        render([{"role": "user", "content": "hi"}])
        == f"{SYSTEM}<|im_start|>user\nhi<|im_end|>\n{REPLY}"
    )
    own = [
        {"role": "system", "content": [text("Be brief.")]},
        {"role": "user", "content": [text("a"), text("b")]},
        {"role": "assistant", "content": "c"},
    ]
    assert render(own, add_generation_prompt=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nab<|im_end|>\n"
        "<|im_start|>assistant\nc<|im_end|>\n"
    )
    assert render([], add_generation_prompt=False) == SYSTEM


def test_template_numbers_media_on_demand():
    messages = user({"image": 1}, {"audio": 2}, {"video": 3}, {"image": 4}, text("?"))
    plain = f"{SYSTEM}<|im_start|>user\n{IMAGE}{AUDIO}{VIDEO}{IMAGE}?<|im_end|>\n{REPLY}"
    assert render(messages) == plain
    assert render(messages, add_vision_id=True, add_audio_id=True) == plain.replace(
        f"{IMAGE}{AUDIO}{VIDEO}{IMAGE}",
        f"Picture 1: {IMAGE}Audio 1: {AUDIO}Video 1: {VIDEO}Picture 2: {IMAGE}",
    )


def test_template_equals_the_official_one():
    """The release's template in jinja, behavior by behavior; jinja comes with the notebooks."""
    jinja2 = pytest.importorskip("jinja2", reason="jinja2 renders the official template")
    official = jinja2.Template(
        "{% set n = namespace(a=0, v=0, i=0) %}{% for m in messages %}"
        "{% if loop.first and m.role != 'system' %}"
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
        "<|im_start|>{{ m.role }}\n"
        "{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
        "{% if c.type == 'image' or 'image' in c or 'image_url' in c %}{% set n.i = n.i + 1 %}"
        "{% if vision %}Picture {{ n.i }}: {% endif %}<|vision_bos|><|IMAGE|><|vision_eos|>"
        "{% elif c.type == 'audio' or 'audio' in c or 'audio_url' in c %}{% set n.a = n.a + 1 %}"
        "{% if audio %}Audio {{ n.a }}: {% endif %}<|audio_bos|><|AUDIO|><|audio_eos|>"
        "{% elif c.type == 'video' or 'video' in c %}{% set n.v = n.v + 1 %}"
        "{% if vision %}Video {{ n.v }}: {% endif %}<|vision_bos|><|VIDEO|><|vision_eos|>"
        "{% elif 'text' in c %}{{ c.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
        "{% endfor %}"
        "{% if ask %}<|im_start|>assistant\n{% endif %}",
        keep_trailing_newline=True,
    )
    random = np.random.RandomState(0)
    kinds = ("image", "audio", "video", "text")
    for _ in range(100):
        messages = []
        for _ in range(random.randint(1, 5)):
            items = [
                {"type": kind, kind: "x"} for kind in random.choice(kinds, random.randint(0, 4))
            ]
            content = items if random.rand() < 0.7 else "a <b> & c\n"
            messages.append(
                {"role": str(random.choice(["system", "user", "assistant"])), "content": content}
            )
        ask, vision, heard = (bool(x) for x in random.randint(0, 2, 3))
        expected = official.render(messages=messages, ask=ask, vision=vision, audio=heard)
        assert render(messages, ask, vision, heard) == expected


@pytest.mark.parametrize(
    ("item", "kind"),
    [
        ({"type": "image", "image": "x"}, "IMAGE"),
        ({"type": "image", "image_url": "x"}, "IMAGE"),
        ({"type": "image_url", "image_url": "x"}, "IMAGE"),
        ({"image": "x"}, "IMAGE"),
        ({"type": "image", "path": "x"}, "IMAGE"),
        ({"type": "audio", "audio_url": "x"}, "AUDIO"),
        ({"type": "audio", "url": "x"}, "AUDIO"),
        ({"audio": "x"}, "AUDIO"),
        ({"type": "video", "video": "x"}, "VIDEO"),
        ({"video_url": "x"}, "VIDEO"),
        ({"type": "image_url", "image_url": {"url": "x", "detail": "high"}}, "IMAGE"),
        ({"type": "input_image", "image_url": "x", "detail": "auto", "file_id": None}, "IMAGE"),
        ({"type": "video_url", "video_url": {"url": "x"}}, "VIDEO"),
        ({"type": "image", "base64": "eHg="}, "IMAGE"),
        ({"type": "input_audio", "input_audio": {"data": "eHg=", "format": "mp3"}}, "AUDIO"),
        ({"type": "audio", "audio": "x", "image": None, "text": None, "video": None}, "AUDIO"),
    ],
)
def test_every_spelling_of_an_item(item, kind):
    assert f"<|{kind}|>" in render(user(item))


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        (
            [{"role": "usr", "content": "a"}],
            "unknown role 'usr'; roles are system, user, assistant",
        ),
        ([{"content": "a"}], "unknown role None"),
        (
            user({"type": "smell", "smell": "rose"}),
            r"has the keys \['smell', 'type'\]; expected one of image, audio",
        ),
        (user({"type": "image"}), r"has the keys \['type'\]"),
        (user("plain words"), "a content item is a str"),
        (17, "messages is 17; expected a list of dictionaries"),
        ("hi", "messages is 'hi'"),
        ({"role": "user", "content": "hi"}, "messages is a dict"),
        ([[{"role": "user"}]], "message 1 is a list"),
        (
            [{"role": "user", "content": 7.5}],
            "the content of a message is 7.5; expected a string or a list",
        ),
        ([{"role": "user", "content": np.zeros(4)}], "the content of a message is a ndarray"),
        ([{"role": "user", "content": "a", 17**4_000: 1}], "unknown key a very large number"),
        ([{"role": 6**7_000, "content": "a"}], "unknown role a very large number"),
        (user({"text": "a", 10**5_500: 1}), "unknown key a very large number"),
        ([{"role": 3, "content": "a"}], "unknown role 3"),
        ([{"role": ["user"], "content": "a"}], "unknown role a list"),
        ([{"role": "x" * 4_000}], "unknown role 'xxx"),
        ([{"role": "tool", "content": "a"}], "role 'tool' is not known"),
        (
            [{"role": "user", "content": "a", "tool_calls": [1]}],
            "a message has the unknown key 'tool_calls'",
        ),
        (user({1: "a", "b": 2, None: 3}), r"has the keys \['b', 1, None\]"),
        (user({"type": ["text"], "text": "a"}), "of type a list"),
        (
            user({"type": "text", "text": None}),
            r"a text item has the keys \['type'\]; expected one of text, and not None",
        ),
        (user({"text": 4}), "a text item holds 4; expected a string"),
        (
            user({"type": "text", "text": "a", "image": "b.png"}),
            "holds text and image; give two items",
        ),
        (user({"image": "b.png", "text": "a"}), "holds image and text; give two items"),
        (user({"type": "image", "image": "b.png", "url": "c.png"}), "has both image and url"),
        (user({"type": "image", "image": "b.png", "color": "red"}), "unknown key 'color'"),
        (
            user({"type": "input_image", "image_url": None, "file_id": "f"}),
            "expected one of image, image_url",
        ),
        (
            user({"type": "image_url", "image_url": {"uri": "x"}}),
            "image_url has the unknown key 'uri'",
        ),
        (
            user({"type": "video_url", "video_url": {}}),
            r"video_url has the keys \[\]; expected url",
        ),
        (
            user({"type": "input_audio", "input_audio": {"data": "no base64!"}}),
            "input_audio is not base64",
        ),
    ],
)
def test_wrong_messages(messages, says):
    with pytest.raises(UserError, match=says) as error:
        render(messages)
    assert len(str(error.value)) <= 500
    assert "\n" not in str(error.value)


def test_other_names_of_roles_and_texts():
    given = [
        {
            "role": "developer",
            "content": [{"type": "input_text", "text": "Be brief."}],
            "name": "me",
            "id": 4,
        },
        {"role": "user", "content": None, "tool_calls": []},
        {"role": "assistant", "content": [{"type": "output_text", "text": "c", "annotations": []}]},
    ]
    assert render(given, add_generation_prompt=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<|im_end|>\n"
        "<|im_start|>assistant\nc<|im_end|>\n"
    )


def test_bytes_in_base64_are_the_file(processor):
    """OpenAI's and transformers' spellings of a picture and a sound, against the same ones given
    directly.
    """
    stream, sound = io.BytesIO(), io.BytesIO()
    Image.fromarray(image()["image"]).save(stream, "PNG")
    soundfile.write(sound, audio(9_000)["audio"], 16_000, format="WAV", subtype="FLOAT")
    picture, recording = (base64.b64encode(x.getvalue()).decode() for x in (stream, sound))
    expected = processor([user(image(), audio(9_000))])
    found = processor(
        [
            user(
                {"type": "image", "base64": picture},
                {"type": "input_audio", "input_audio": {"data": recording, "format": "wav"}},
            )
        ]
    )
    assert torch.equal(found.input_ids, expected.input_ids)
    assert torch.equal(found.image_patches, expected.image_patches)
    assert torch.allclose(found.mels[0], expected.mels[0], atol=1e-4)


@pytest.mark.parametrize(
    "item",
    [
        {"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/a.png"}},
        {"type": "video", "url": "https://127.0.0.1:9/a.mp4"},
        {"audio_url": "https://127.0.0.1:9/a.wav"},
    ],
)
def test_web_addresses_are_not_fetched(processor, item):
    with pytest.raises(UserError, match="web addresses are not fetched"):
        processor([user(item)])


# ----------------------------------------------------------------------------------------------
# ids
def test_as_the_official_processor():
    """Qwen2_5OmniProcessor of transformers 5.23.0 with torchvision 0.28.0 on the same conversation,
    bytes as text.
    """
    config = replace(QWEN7B, media=replace(QWEN7B.media, frame_min_pixels=3136))
    official = Processor(config, Tokenizer([], special_tokens(config.thinker.tokens)))
    messages = [
        {"role": "system", "content": [text(config.media.system_prompt)]},
        *user(image(150, 270), audio(48_077), video(12, 100_800, size=(84, 112)), text("What?")),
    ]
    inputs = {sound: official([messages], use_audio_in_video=sound) for sound in (False, True)}
    start = [
        ("im_start", 1),
        ("text", 168),
        ("im_end", 1),
        ("text", 1),
        ("im_start", 1),
        ("text", 5),
        ("vision_bos", 1),
        ("IMAGE", 50),
        ("vision_eos", 1),
        ("audio_bos", 1),
        ("AUDIO", 75),
        ("audio_eos", 1),
        ("vision_bos", 1),
    ]
    end = [
        ("vision_eos", 1),
        ("text", 5),
        ("im_end", 1),
        ("text", 1),
        ("im_start", 1),
        ("text", 10),
    ]
    turns = [
        ("audio_bos", 1),
        ("VIDEO", 24),
        ("AUDIO", 50),
        ("VIDEO", 24),
        ("AUDIO", 50),
        ("VIDEO", 24),
        ("AUDIO", 57),
        ("audio_eos", 1),
    ]
    for sound, body, frames in ((False, [("VIDEO", 72)], [301]), (True, turns, [301, 630])):
        assert (
            runs(inputs[sound].input_ids[0].tolist(), config.thinker.tokens) == start + body + end
        )
        assert [mel.shape for mel in inputs[sound].mels] == [(128, n) for n in frames]
        assert inputs[sound].image_grids == [(1, 10, 20)]
        assert inputs[sound].video_grids == [(6, 6, 8)]
        assert inputs[sound].image_patches.shape == (200, 1176)
        assert inputs[sound].video_patches.shape == (288, 1176)
        assert inputs[sound].video_seconds[0].tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ([0, 25, 50, 75, 100], [(0, 2), (2, 4), (4, 5)]),
        ([0, 12.5, 49.9, 50], [(0, 3), (3, 4)]),
        ([0, 75, 150, 225], [(0, 1), (1, 2), (2, 3), (3, 4)]),  # 3 s a step: a chunk for each
        (
            [0, 120, 130, 140, 151],
            [(0, 1), (1, 2), (2, 4), (4, 5)],
        ),  # 120 crosses 50 alone, so 130 still crosses 100
        ([0], [(0, 1)]),
        ([], [(0, 0)]),
    ],
)
def test_chunks(times, expected):
    assert chunk_bounds(torch.tensor(times), 50) == expected


@pytest.mark.parametrize(
    ("seconds", "audio_tokens", "expected"),
    [
        (
            [0, 1, 2, 3],
            110,
            [
                ("video", 0, 2),
                ("audio", 0, 50),
                ("video", 2, 4),
                ("audio", 50, 100),
                ("audio", 100, 110),
            ],
        ),
        ([0, 1, 2, 4], 3, [("video", 0, 2), ("audio", 0, 3), ("video", 2, 3), ("video", 3, 4)]),
        ([0], 0, [("video", 0, 1)]),
    ],
)
def test_interleave(seconds, audio_tokens, expected):
    """The track that is longer goes on alone, and no segment is empty."""
    assert interleave(torch.tensor(seconds), audio_tokens, TINY.thinker) == expected


@pytest.mark.parametrize(
    ("frames", "fps", "samples", "expected"),
    [
        (
            12,
            2.0,
            100_800,
            "V18 A50 V18 A50 V18 A57",
        ),  # 157 audio tokens, the rest goes with the last picture
        (
            12,
            2.0,
            16_000,
            "V18 A25 V36",
        ),  # the audio ends first: the last two video chunks are adjacent
        (2, 2.0, 96_000, "V9 A150"),  # the video ends first: the audio goes on
        (8, 0.5, 256_000, "V9 A50 V9 A50 V9 A50 V9 A250"),  # 4 s a step: one step a chunk
    ],
)
def test_audio_and_video_alternate(processor, frames, fps, samples, expected):
    inputs = processor([user(video(frames, samples, fps))], use_audio_in_video=True)
    names = {"VIDEO": "V", "AUDIO": "A"}
    found = runs(inputs.input_ids[0].tolist())
    assert " ".join(f"{names[name]}{n}" for name, n in found if name in names) == expected
    order = [name for name, _ in found if name.endswith(("bos", "eos"))]
    assert order == ["vision_bos", "audio_bos", "audio_eos", "vision_eos"]
    assert len(inputs.mels) == len(inputs.video_seconds) == 1


def test_uneven_times_reach_the_interleaving(processor):
    """A grid step's time is that of its first frame, counted from the first frame of the clip."""
    item = video(8, 64_000)
    item["video"].seconds = torch.tensor([9.0, 9.1, 9.2, 9.3, 12.0, 12.5, 12.9, 13.0])
    inputs = processor([user(item)], use_audio_in_video=True)
    assert torch.allclose(inputs.video_seconds[0], torch.tensor([0.0, 0.2, 3.0, 3.9]), atol=1e-6)
    found = [
        (name, n) for name, n in runs(inputs.input_ids[0].tolist()) if name in ("VIDEO", "AUDIO")
    ]
    assert found == [("VIDEO", 18), ("AUDIO", 50), ("VIDEO", 18), ("AUDIO", 50)]


def test_batches_are_padded_on_the_left(processor):
    short, long = (
        user(text("is there a red circle")),
        user(image(), audio(16_000), text("what is it"), image(56, 56)),
    )
    alone = [processor([row]) for row in (short, long)]
    both = processor([short, long, short])
    assert both.attention_mask.shape == both.input_ids.shape == (3, alone[1].input_ids.shape[1])
    for row, single in enumerate((alone[0], alone[1], alone[0])):
        real = both.input_ids[row][both.attention_mask[row].bool()]
        assert torch.equal(real, single.input_ids[0])
        assert both.attention_mask[row, -1] == 1
        assert (both.input_ids[row][~both.attention_mask[row].bool()] == TOKENS.endoftext).all()


def test_media_come_in_reading_order(processor):
    rows = [
        user(image(56, 56), video(4), audio(8_000), image(56, 84)),
        user(audio(4_000), image(84, 84), video(6)),
    ]
    inputs = processor(rows)
    assert inputs.image_grids == [(1, 4, 4), (1, 4, 6), (1, 6, 6)]
    assert inputs.video_grids == [
        (2, 6, 6),
        (3, 6, 6),
    ]
    assert [mel.shape[1] for mel in inputs.mels] == [50, 25]
    assert inputs.image_patches.shape[0] == 16 + 24 + 36
    assert inputs.video_patches.shape[0] == 72 + 108
    last = processor([user(image(84, 84))]).image_patches
    assert torch.equal(inputs.image_patches[-36:], last)


def test_text_around_media_is_encoded_apart(processor):
    """As in the release, where special tokens cut the text; and neighbouring texts are one."""
    split = processor([user(text("the red "), text("circle"))]).input_ids
    assert torch.equal(split, processor([user(text("the red circle"))]).input_ids)
    ids = processor([user(text("red"), image(56, 56), text("red"))]).input_ids[0].tolist()
    whole = render(user(text("red"), {"image": 0}, text("red"))).replace(
        "<|IMAGE|>", "<|IMAGE|>" * 4
    )
    assert ids == processor.tokenizer.encode(whole)


def test_without_generation_prompt(processor):
    ids = processor([user(text("red"))], add_generation_prompt=False).input_ids[0].tolist()
    assert processor.tokenizer.decode(ids) == f"{SYSTEM}<|im_start|>user\nred<|im_end|>\n"


# ----------------------------------------------------------------------------------------------
# options
def test_size_options_of_items(processor):
    """TINY takes pictures from 3,136 to 12,544 pixels, frames up to 7,056; an item may ask for more
    or less.
    """
    items = [
        image(300, 300),
        image(300, 300) | {"max_pixels": 28 * 28, "min_pixels": 1},
        image(300, 300) | {"resized_height": 60, "resized_width": 100},
        video(4, size=(84, 84)),
        video(4, size=(84, 84)) | {"max_pixels": 3_136},
    ]
    inputs = processor([user(*items)])
    assert inputs.image_grids == [(1, 6, 6), (1, 2, 2), (1, 4, 8)]
    assert inputs.video_grids == [
        (2, 6, 6),
        (2, 4, 4),
    ]


def test_videos_with_and_without_audio(processor):
    loud, mute = video(4, 32_000), video(4)
    inputs = processor(
        [user(loud, mute | {"use_audio_in_video": False}, loud)], use_audio_in_video=True
    )
    names = [name for name, _ in runs(inputs.input_ids[0].tolist()) if name in ("VIDEO", "AUDIO")]
    assert names == ["VIDEO", "AUDIO", "VIDEO", "VIDEO", "AUDIO"]
    assert len(inputs.mels) == 2
    one = processor([user(mute, loud | {"use_audio_in_video": True}, loud)])
    names = [name for name, _ in runs(one.input_ids[0].tolist()) if name in ("VIDEO", "AUDIO")]
    assert names == ["VIDEO", "VIDEO", "AUDIO", "VIDEO"]
    assert len(one.mels) == 1


# ----------------------------------------------------------------------------------------------
# refusals
@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("red \ud83d", "red \ufffd"),
        ("\udcff red", "\ufffd red"),
        ("\ud83d\ude00 red", "\U0001f600 red"),
        ("\ude00\ud83d", "\ufffd\ufffd"),
    ],
)
def test_unpaired_surrogates(processor, written, read):
    assert processor.encode(written) == processor.encode(read)


def test_clips_of_known_size(processor):
    clip = Clip(torch.zeros(2, 56, 84, 3, dtype=torch.uint8), torch.arange(2.0), None, sized=True)
    assert processor([user({"video": clip})]).video_grids == [(1, 4, 6)]
    for item in (
        {"video": clip, "max_pixels": 9_408},
        {"video": replace(clip, frames=clip.frames[:, :, :50])},
    ):
        with pytest.raises(UserError, match="sized=True"):
            processor([user(item)])


def test_combining_marks_are_refused_at_any_length(processor):
    for n in (300, 3_000):
        with pytest.raises(UserError, match="combining marks|too many tokens"):
            processor.encode("e" + "\u0301" * n)


def test_texts_that_cannot_fit_are_not_tokenized(processor, monkeypatch):
    release = Processor(QWEN7B, Tokenizer([], special_tokens(QWEN7B.thinker.tokens)))
    monkeypatch.setattr(Tokenizer, "encode", None)
    for read, words in (
        (processor, "red circle " * 20_000),
        (release, "a\u0301\u0323" + "\u0323" * 60_000),
    ):
        with pytest.raises(
            UserError, match="the prompt has too many tokens and the context holds.*shorten it"
        ):
            read([user(text(words))])


def test_pictures_and_films_that_cannot_fit_are_not_resized(processor):
    huge = np.broadcast_to(np.zeros(1, np.uint8), (90_000, 64, 96, 3))
    for item in (
        {"type": "video", "video": huge},
        {"type": "video", "video": [huge[0]] * 5_000},
        image() | {"min_pixels": 5 * 10**11, "max_pixels": 10**12},
        video(4) | {"resized_height": 10**6, "resized_width": 10**6, "min_pixels": 1},
    ):
        if "resized_height" in item:
            assert processor([user(item)]).video_grids == [
                (2, 8, 8)
            ]  # within the limits of pictures
            continue
        with pytest.raises(UserError, match="context"):
            processor([user(item)])
    with pytest.raises(UserError, match="frames of 20000x20000 pixels"):
        processor([user({"video": np.broadcast_to(np.zeros(1, np.uint8), (4, 20_000, 20_000, 3))})])


@pytest.mark.parametrize(
    "clip",
    [
        Clip(None, None, None),
        Clip(torch.zeros(2, 56, 56, 3), torch.arange(2.0), None),
        Clip(torch.zeros(2, 56, 56, 3, dtype=torch.uint8), torch.arange(3.0), None),
        Clip(torch.zeros(2, 56, 56, 3, dtype=torch.uint8), torch.tensor([1.0, 0.5]), None),
        Clip(torch.zeros(2, 56, 56, 3, dtype=torch.uint8), [0, 1], None),
        Clip(torch.zeros(2, 56, 56, 3, dtype=torch.uint8), torch.arange(2.0), "sound"),
        Clip(
            torch.zeros(2, 56, 56, 3, dtype=torch.uint8), torch.arange(2.0), torch.zeros(2, 9_000)
        ),
        Clip(
            torch.zeros(2, 56, 56, 3, dtype=torch.uint8),
            torch.arange(2.0),
            torch.full((9_000,), float("nan")),
        ),
        Clip(torch.zeros(2, 56, 56, 3, dtype=torch.uint8), torch.tensor([0.0, 1e12]), None),
    ],
)
def test_clips_with_wrong_fields(processor, clip):
    with pytest.raises(UserError) as error:
        processor([user({"video": clip})], use_audio_in_video=True)
    assert len(str(error.value)) <= 500
    assert "\n" not in str(error.value)


def test_too_long_prompts_name_the_longest_item(processor, tmp_path):
    path = tmp_path / "lecture.wav"
    soundfile.write(path, 0.1 * np.random.RandomState(0).randn(90 * 16_000), 16_000)
    says = (
        r"has 22\d\d tokens and the context holds 2048; "
        "the longest item is .*lecture.wav with 2252 tokens, shorten"
    )
    with pytest.raises(UserError, match=says):
        processor([user({"type": "audio", "audio": str(path)}, text("what"))])
    with pytest.raises(UserError, match="the longest item is a text with"):
        processor([user(image(), text("circle " * 3_000))])


def test_prompts_that_are_too_long_already_load_no_more_media(processor, tmp_path):
    path = tmp_path / "lecture.wav"
    soundfile.write(path, 0.1 * np.random.RandomState(0).randn(90 * 16_000), 16_000)
    missing = {"type": "image", "image": str(tmp_path / "missing.png")}
    says = r"the prompt has at least 22\d\d tokens and the context holds 2048; the longest"
    with pytest.raises(UserError, match=says):
        processor([user({"type": "audio", "audio": str(path)}, text("what"), missing)])


@pytest.mark.parametrize(
    "typed", ["<|IMAGE|>", "<|AUDIO|>", "<|VIDEO|>", "<|audio_bos|>", "<|vision_bos|>"]
)
def test_tokens_of_media_in_texts_are_refused(processor, typed):
    with pytest.raises(UserError, match="which only media may put there"):
        processor([user(text(f"see {typed}"))])


def test_missing_audio_track_is_refused(processor):
    with pytest.raises(UserError, match="the video given: has no audio track"):
        processor([user(video(4))], use_audio_in_video=True)


def test_tokenizer_of_another_model():
    with pytest.raises(
        UserError, match=r"<\|endoftext\|> is 151643 in the tokenizer and 480 in the configuration"
    ):
        Processor(TINY, Tokenizer([], special_tokens(QWEN7B.thinker.tokens)))
    with pytest.raises(UserError, match="is None in the tokenizer"):
        Processor(TINY, Tokenizer([], {}))
