"""The API, driven by OpenAI's official client."""

import base64
import io
import json
import re
import shlex
from dataclasses import replace

import httpx
import numpy as np
import pytest
import soundfile
from serving import RATE, SAMPLES, SECONDS, base64_of, running

import minomni
from minomni.serve import chat
from minomni.serve.audio import wav_header

openai = pytest.importorskip("openai", reason="the openai client is not installed")

pytestmark = pytest.mark.slow
SENTENCE = "the red circle is above the blue square"
SAY = [{"role": "user", "content": f"say {SENTENCE}"}]


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def test_models(client, server):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "minomni"
    assert httpx.get(f"{server.url}/health", timeout=SECONDS).json()["status"] == "ok"


def test_text(client, trained):
    answer = client.chat.completions.create(model="tiny", messages=SAY)
    assert answer.choices[0].message.content == SENTENCE
    assert answer.choices[0].finish_reason == "stop"
    _, inputs = trained.prepare(SAY, None, False, False)
    assert answer.usage.prompt_tokens == inputs.input_ids.numel()
    assert answer.usage.completion_tokens == tokens_of(trained, SENTENCE)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def tokens_of(omni, text: str) -> int:
    """Tokens of an answer, with the one that ends it."""
    return len(omni.tokenizer.encode(text)) + 1


def test_the_length_is_limited(client):
    answer = client.chat.completions.create(model="tiny", messages=SAY, max_completion_tokens=2)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 2


def test_speech_equals_the_models_stream(client, trained):
    answer = client.chat.completions.create(
        model="tiny",
        messages=SAY,
        modalities=["text", "audio"],
        audio={"voice": "Karl", "format": "wav"},
        seed=3,
    )
    audio = answer.choices[0].message.audio
    assert audio.transcript == SENTENCE
    wave, rate = soundfile.read(io.BytesIO(base64.b64decode(audio.data)), dtype="float32")
    *_, done = trained.stream(SAY, voice="Karl", seed=3)
    assert rate == trained.sample_rate
    assert wave == pytest.approx(done.reply.wave.numpy(), abs=1e-4)
    text_tokens = tokens_of(trained, SENTENCE)
    assert answer.usage.completion_tokens_details.text_tokens == text_tokens
    assert answer.usage.completion_tokens_details.audio_tokens == len(done.reply.codes)
    assert answer.usage.completion_tokens == text_tokens + len(done.reply.codes)


@pytest.mark.parametrize("document", ["README.md", "README_zh.md"])
def test_the_lines_of_the_readme(server, document):
    """What they send is answered, by the address of this test's server."""
    text = (SAMPLES.parent / document).read_text(encoding="utf-8")
    text = text.replace("http://127.0.0.1:8000", server.url)
    curl = next(line for line in text.splitlines() if line.startswith("curl "))
    (python,) = re.findall("```python\n(client = .*?)```", text, re.DOTALL)

    _, url, _, header, _, body = shlex.split(curl)
    name, value = header.split(": ")
    asked = httpx.post(url, content=body, headers={name: value}, timeout=SECONDS).json()
    said = json.loads(body)["messages"][0]["content"].removeprefix("say ")
    assert asked["choices"][0]["message"]["content"] == said

    names: dict = {"openai": openai}
    exec(python, names)
    audio = names["reply"].choices[0].message.audio
    assert audio.transcript == names["turns"][0]["content"].removeprefix("say ")
    assert soundfile.info(io.BytesIO(base64.b64decode(audio.data))).duration > 0.5


@pytest.mark.parametrize("name", ["flac", "mp3", "opus", "aac", "pcm16"])
def test_formats(client, name):
    answer = client.chat.completions.create(
        model="tiny",
        messages=SAY,
        modalities=["text", "audio"],
        audio={"voice": "Anna", "format": name},
        max_tokens=4,
        extra_body={"top_k": None},
    )
    data = base64.b64decode(answer.choices[0].message.audio.data)
    if name == "pcm16":
        assert len(data) % 2 == 0
        assert len(data) > 10_000
        return
    import av

    with av.open(io.BytesIO(data)) as container:
        samples = sum(frame.samples for frame in container.decode(audio=0))
    assert samples > 5_000


def test_image_and_audio(client, trained):
    content = [
        {
            "type": "image_url",
            "image_url": {"url": f"data:image/png;base64,{base64_of('scene.png')}"},
        },
        {
            "type": "input_audio",
            "input_audio": {"data": base64_of("question.wav"), "format": "wav"},
        },
    ]
    answer = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": content}]
    )
    assert answer.choices[0].message.content == "the red circle is left of the black square"
    media = [
        {"type": "image", "image": str(SAMPLES / "scene.png")},
        {"type": "audio", "audio": str(SAMPLES / "question.wav")},
    ]
    _, inputs = trained.prepare([{"role": "user", "content": media}], None, False, False)
    tokens = trained.config.thinker.tokens
    details = answer.usage.prompt_tokens_details
    assert details.audio_tokens == int((inputs.input_ids == tokens.audio).sum()) > 0
    assert details.image_tokens == int((inputs.input_ids == tokens.image).sum()) > 0
    assert details.audio_tokens != details.image_tokens


def test_video(client, trained):
    item = {
        "type": "video_url",
        "video_url": {"url": f"data:video/mp4;base64,{base64_of('moving.mp4')}"},
    }
    text = {"type": "text", "text": "where does the shape go"}
    answer = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": [item, text]}]
    )
    video = {"type": "video", "video": str(SAMPLES / "moving.mp4")}
    reply = trained.respond([{"role": "user", "content": [video, text]}], speech=False)
    assert answer.choices[0].message.content == reply.text


def test_the_audio_of_a_video(client, trained):
    """It is heard where use_audio_in_video says so, in both places where clients write it."""
    item = {"type": "video_url", "video_url": {"url": data_url("sounding.mp4", "video/mp4")}}
    text = {"type": "text", "text": "what was there at the sound"}
    messages = [{"role": "user", "content": [item, text]}]
    counts = [
        client.chat.completions.create(
            model="tiny", messages=messages, max_tokens=1, extra_body=options
        ).usage
        for options in (
            {},
            {"use_audio_in_video": True},
            {"mm_processor_kwargs": {"use_audio_in_video": True}},
        )
    ]
    silent, *heard = (usage.prompt_tokens_details.audio_tokens for usage in counts)
    video = {"type": "video", "video": str(SAMPLES / "sounding.mp4")}
    _, inputs = trained.prepare([{"role": "user", "content": [video, text]}], None, False, True)
    expected = int((inputs.input_ids == trained.config.thinker.tokens.audio).sum())
    assert silent == 0
    assert heard == [expected, expected]
    assert expected > 0


def data_url(name: str, media_type: str) -> str:
    return f"data:{media_type};base64,{base64_of(name)}"


def test_stream(client):
    chunks = list(
        client.chat.completions.create(
            model="tiny", messages=SAY, stream=True, stream_options={"include_usage": True}
        )
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == SENTENCE
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage.completion_tokens > 0


def test_stream_of_speech(client):
    words = []
    sound = b""
    stream = client.chat.completions.create(
        model="tiny",
        messages=SAY,
        modalities=["text", "audio"],
        audio={"voice": "Anna", "format": "pcm16"},
        stream=True,
    )
    for chunk in stream:
        audio = chunk.choices[0].delta.audio
        if audio is not None:
            words.append(audio.transcript or "")
            sound += base64.b64decode(audio.data or "")
    assert "".join(words) == SENTENCE
    assert len(sound) / 2 / 24_000 > 1.0


async def _async_answer(url):
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
        answer = await client.chat.completions.create(model="tiny", messages=SAY)
        stream = await client.chat.completions.create(model="tiny", messages=SAY, stream=True)
        words = [chunk.choices[0].delta.content or "" async for chunk in stream]
    return answer.choices[0].message.content, "".join(words)


def test_the_async_client(server):
    import asyncio

    assert asyncio.run(_async_answer(server.url)) == (SENTENCE, SENTENCE)


@pytest.mark.parametrize("name", ["wav", "mp3", "pcm"])
def test_say(client, name):
    sound = client.audio.speech.create(
        model="tiny", voice="Fiona", input=SENTENCE, response_format=name
    ).read()
    assert len(sound) > 5_000
    if name != "pcm":
        import av

        with av.open(io.BytesIO(sound)) as container:
            stream = container.streams.audio[0]
            seconds = sum(frame.samples for frame in container.decode(audio=0)) / stream.rate
            assert 1 < seconds < 3


MEDIA_TYPES = {
    "wav": "audio/wav",
    "pcm": "audio/pcm",
    "flac": "audio/flac",
    "mp3": "audio/mpeg",
    "opus": "audio/ogg",
    "aac": "audio/aac",
}


@pytest.mark.parametrize("name", MEDIA_TYPES)
def test_media_types_of_speech(server, name):
    """A browser and a file manager go by them."""
    body = {"input": "the red circle", "response_format": name}
    answer = httpx.post(f"{server.url}/v1/audio/speech", json=body, timeout=SECONDS)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == MEDIA_TYPES[name]


def test_a_streamed_wav_is_the_streamed_samples(client):
    """After a header that tells their rate."""
    wav, samples = (
        client.audio.speech.create(
            model="tiny", voice="Fiona", input=SENTENCE, response_format=name
        ).read()
        for name in ("wav", "pcm")
    )
    assert wav == wav_header(RATE) + samples


def test_media_types_of_answers(server):
    """Clients that read server-sent events look at them."""
    url = f"{server.url}/v1/chat/completions"
    body = {"messages": SAY, "max_tokens": 2}
    whole = httpx.post(url, json=body, timeout=SECONDS)
    streamed = httpx.post(url, json={**body, "stream": True}, timeout=SECONDS)
    transcript = transcribe(server, stream="true")
    assert whole.headers["content-type"] == "application/json"
    for answer in (streamed, transcript):
        assert answer.headers["content-type"].partition(";")[0] == "text/event-stream"
        assert answer.text.endswith("data: [DONE]\n\n")


def test_say_equals_the_answer_to_the_request_to_say_it(client):
    """In the same voice, sample by sample; another voice sounds otherwise."""
    said = {
        voice: client.audio.speech.create(
            model="tiny", voice=voice, input=SENTENCE, response_format="pcm"
        ).read()
        for voice in ("Fiona", "Karl")
    }
    answer = client.chat.completions.create(
        model="tiny",
        messages=SAY,
        modalities=["text", "audio"],
        audio={"voice": "Fiona", "format": "pcm16"},
    )
    expected = np.frombuffer(base64.b64decode(answer.choices[0].message.audio.data), "<i2")
    samples = np.frombuffer(said["Fiona"], "<i2")
    assert samples / 32768 == pytest.approx(expected / 32768, abs=1e-3)
    assert len(said["Karl"]) != len(said["Fiona"])


def test_sampling_options_reach_the_answer(client, monkeypatch):
    """Those of the request, and the model's own without them."""
    found = []
    answer_steps = chat.answer_steps

    def recorded(omni, inputs, voice, options, ids):
        found.append(options)
        return answer_steps(omni, inputs, voice, options, ids)

    monkeypatch.setattr(chat, "answer_steps", recorded)
    given = {"temperature": 0.7, "top_p": 0.6, "top_k": 5, "repetition_penalty": 1.2}
    seed = 8
    for options in ({}, given):
        client.chat.completions.create(
            model="tiny", messages=SAY, max_tokens=2, seed=seed, extra_body=options
        )
    plain, sampled = (options.sampling[0] for options in found)
    assert sampled == replace(plain, **given)
    assert all(getattr(plain, name) != value for name, value in given.items())
    assert plain.max_new_tokens == 2
    assert {options.seed for options in found} == {seed}


def test_transcript(client, trained):
    with (SAMPLES / "question.wav").open("rb") as file:
        made = client.audio.transcriptions.create(model="tiny", file=file)
    assert made.text == "where is the red circle"
    assert made.usage.output_tokens == tokens_of(trained, made.text)
    assert made.usage.input_tokens > made.usage.output_tokens
    assert made.usage.total_tokens == made.usage.input_tokens + made.usage.output_tokens


def test_transcript_by_a_model_without_speech():
    """It is asked as it was trained to be asked, though it is loaded without its codec."""
    heard = minomni.load("tiny", parts="text+audio")
    with (
        running(heard) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
        (SAMPLES / "question.wav").open("rb") as file,
    ):
        assert server.server.trained_here
        made = client.audio.transcriptions.create(model="tiny", file=file)
    assert made.text == "where is the red circle"


def test_streamed_transcript(client):
    with (SAMPLES / "question.wav").open("rb") as file:
        events = list(client.audio.transcriptions.create(model="tiny", file=file, stream=True))
    assert events[-1].type == "transcript.text.done"
    assert events[-1].text == "where is the red circle"
    assert "".join(event.delta for event in events[:-1]) == "where is the red circle"


WRONG = {
    "no messages": {},
    "no list": {"messages": "hello"},
    "no role": {"messages": [{"content": "x"}]},
    "a tool": {"messages": [{"role": "tool", "content": "x"}]},
    "a web address": {
        "messages": [
            {
                "role": "user",
                "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1/a.png"}}],
            }
        ]
    },
    "a path": {
        "messages": [
            {
                "role": "user",
                "content": [{"type": "image_url", "image_url": {"url": "/etc/passwd"}}],
            }
        ]
    },
    "a file address": {
        "messages": [
            {
                "role": "user",
                "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}],
            }
        ]
    },
    "the path of an image": {
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": str(SAMPLES / "scene.png")}}
                ],
            }
        ]
    },
    "the file address of a recording": {
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "audio_url", "audio_url": {"url": (SAMPLES / "wish.wav").as_uri()}}
                ],
            }
        ]
    },
    "a path item": {
        "messages": [{"role": "user", "content": [{"type": "image", "path": "/etc/passwd"}]}]
    },
    "no image": {
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
                ],
            }
        ]
    },
    "two answers": {"messages": SAY, "n": 2},
    "unknown field": {"messages": SAY, "color_of_answer": 1},
    "unknown voice": {
        "messages": SAY,
        "modalities": ["text", "audio"],
        "audio": {"voice": "alloy", "format": "wav"},
    },
    "unknown format": {
        "messages": SAY,
        "modalities": ["text", "audio"],
        "audio": {"format": "midi"},
    },
    "streamed wav": {
        "messages": SAY,
        "stream": True,
        "modalities": ["text", "audio"],
        "audio": {"format": "wav"},
    },
    "hot": {"messages": SAY, "temperature": 1e9},
    "a top_p of more than all": {"messages": SAY, "top_p": 1.5},
    "a top_k of no tokens": {"messages": SAY, "top_k": -2},
    "a penalty of nothing": {"messages": SAY, "repetition_penalty": 0},
    "wrong seed": {"messages": SAY, "seed": -1},
    "too long": {"messages": [{"role": "user", "content": "red " * 5000}]},
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_requests_are_named(server, name):
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=WRONG[name], timeout=SECONDS)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert "passwd" not in error["message"]


def test_the_client_raises_its_own_errors(client):
    question = ("question.wav", (SAMPLES / "question.wav").read_bytes())
    for ask in (
        lambda: client.chat.completions.create(model="gpt-4", messages=SAY),
        lambda: client.audio.speech.create(model="tts-1", voice="Karl", input=SENTENCE),
        lambda: client.audio.transcriptions.create(model="whisper-1", file=question),
        lambda: client.models.retrieve("gpt-4"),
    ):
        with pytest.raises(openai.NotFoundError) as caught:
            ask()
        assert caught.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="modalities"):
        client.chat.completions.create(model="tiny", messages=SAY, modalities=["smell"])


PICTURE = {"url": f"data:image/png;base64,{base64_of('scene.png')}"}
SOUND = {"data": base64_of("question.wav"), "format": "wav"}


def of_user(*content: dict) -> dict:
    return {"messages": [{"role": "user", "content": list(content)}]}


IGNORED_BEFORE = {
    "audio.foo": {"messages": SAY, "audio": {"voice": "Karl", "foo": 1}},
    "voice.name": {"messages": SAY, "audio": {"voice": {"name": "Karl"}}},
    "stream_options.foo": {"messages": SAY, "stream": True, "stream_options": {"foo": 1}},
    "mm_processor_kwargs.nframes": {"messages": SAY, "mm_processor_kwargs": {"nframes": 2}},
    "messages.content.foo": of_user({"type": "text", "text": "x", "foo": 1}),
    "messages.content.image_url": of_user({"type": "text", "text": "x", "image_url": PICTURE}),
    "messages.content.fps": of_user({"type": "image_url", "image_url": PICTURE, "fps": 2}),
    "messages.content.max_pixels": of_user(
        {"type": "input_audio", "input_audio": SOUND, "max_pixels": 9000}
    ),
    "image_url.audio_end": of_user({"type": "image_url", "image_url": {**PICTURE, "audio_end": 1}}),
    "image_url.foo": of_user({"type": "image_url", "image_url": {**PICTURE, "foo": 1}}),
    "input_audio.foo": of_user({"type": "input_audio", "input_audio": {**SOUND, "foo": 1}}),
}


@pytest.mark.parametrize("name", IGNORED_BEFORE)
def test_unknown_fields_of_inner_objects_are_named(server, name):
    body = IGNORED_BEFORE[name]
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=SECONDS)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == name
    assert name in answer.json()["error"]["message"]


CLIP = f"data:video/mp4;base64,{base64_of('moving.mp4')}"
# A content item as clients write it, and the same item of the package.
WITH_OPTIONS = {
    "image, beside": (
        {"type": "image_url", "image_url": PICTURE, "max_pixels": 2000, "min_pixels": 784},
        {"image": PICTURE["url"], "max_pixels": 2000, "min_pixels": 784},
    ),
    "image, inside": (
        {"type": "image_url", "image_url": {**PICTURE, "resized_height": 56, "resized_width": 28}},
        {"image": PICTURE["url"], "resized_height": 56, "resized_width": 28},
    ),
    "image, Qwen's": (
        {"type": "image", "image": PICTURE["url"], "max_pixels": 2000, "min_pixels": 784},
        {"image": PICTURE["url"], "max_pixels": 2000, "min_pixels": 784},
    ),
    "audio, beside": (
        {"type": "input_audio", "input_audio": SOUND, "audio_start": 0.2, "audio_end": 0.9},
        {"audio": SAMPLES / "question.wav", "audio_start": 0.2, "audio_end": 0.9},
    ),
    "audio, inside": (
        {"type": "input_audio", "input_audio": {**SOUND, "audio_end": 0.6}},
        {"audio": SAMPLES / "question.wav", "audio_end": 0.6},
    ),
    "video, beside": (
        {"type": "video_url", "video_url": {"url": CLIP}, "fps": 1, "max_frames": 6},
        {"video": CLIP, "fps": 1, "max_frames": 6},
    ),
    "video, inside": (
        {"type": "video_url", "video_url": {"url": CLIP, "nframes": 2, "video_end": 1.5}},
        {"video": CLIP, "nframes": 2, "video_end": 1.5},
    ),
    "video, Qwen's": (
        {"type": "video", "video": CLIP, "nframes": 2, "total_pixels": None},
        {"video": CLIP, "nframes": 2},
    ),
    "video of images": (
        {"type": "video", "video": [PICTURE["url"]] * 4, "sample_fps": 1},
        {"video": [PICTURE["url"]] * 4, "sample_fps": 1},
    ),
}


def prompt_tokens(client, item: dict, **options) -> int:
    """Tokens of a question about an item."""
    answer = client.chat.completions.create(
        model="tiny", **of_user(item), max_tokens=1, extra_body=options
    )
    return answer.usage.prompt_tokens


def package_tokens(omni, item: dict) -> int:
    """Tokens of the same question, asked without a server."""
    _, inputs = omni.prepare([{"role": "user", "content": [item]}], None, False, False)
    return inputs.input_ids.numel()


@pytest.mark.parametrize("name", WITH_OPTIONS)
def test_options_of_items(client, trained, name):
    """They do what they do in the package, and change the prompt."""
    sent, item = WITH_OPTIONS[name]
    source = next(iter(item))
    tokens = prompt_tokens(client, sent)
    assert tokens == package_tokens(trained, item)
    if name != "video of images":
        assert tokens != package_tokens(trained, {source: item[source]})


def test_options_of_all_items(client, trained):
    """mm_processor_kwargs, as vLLM's clients write it. An item's own options come first."""
    image = {"type": "image_url", "image_url": PICTURE}
    video = {"type": "video_url", "video_url": {"url": CLIP}}
    shared = {"max_pixels": 1600, "min_pixels": 784, "fps": 1}
    own = {"max_pixels": 3200}
    own_frames = {"nframes": 6}
    sizes = {"max_pixels": 1600, "min_pixels": 784}
    cases = [
        (image, {"image": PICTURE["url"], **sizes}),
        ({**image, **own}, {"image": PICTURE["url"], **sizes, **own}),
        (video, {"video": CLIP, **shared}),
        ({**video, **own_frames}, {"video": CLIP, **sizes, **own_frames}),
    ]
    for sent, item in cases:
        assert prompt_tokens(client, sent, mm_processor_kwargs=shared) == package_tokens(
            trained, item
        )


WRONG_OPTIONS = {
    "no number": {"type": "image_url", "image_url": PICTURE, "max_pixels": "large"},
    "not above zero": {"type": "video_url", "video_url": {"url": CLIP, "fps": 0}},
    "no flag": {"type": "video", "video": CLIP, "use_audio_in_video": 1},
    "two rates": {"type": "video_url", "video_url": {"url": CLIP}, "fps": 1, "nframes": 4},
    "one side": {"type": "image", "image": PICTURE["url"], "resized_width": 84},
    "twice": {"type": "video_url", "video_url": {"url": CLIP, "fps": 1}, "fps": 2},
    "the end first": {
        "type": "input_audio",
        "input_audio": {**SOUND, "audio_start": 2, "audio_end": 1},
    },
    "too many pixels": {"type": "image_url", "image_url": PICTURE, "min_pixels": 9e11},
    "too many frames": {"type": "video_url", "video_url": {"url": CLIP}, "nframes": 10**9},
    "a video of nothing": {"type": "video", "video": []},
    "a video of paths": {"type": "video", "video": ["/etc/passwd"] * 2},
    "a path": {"type": "audio", "audio": "/etc/passwd"},
}


@pytest.mark.parametrize("name", WRONG_OPTIONS)
def test_wrong_options_of_items(client, name):
    with pytest.raises(openai.BadRequestError) as caught:
        prompt_tokens(client, WRONG_OPTIONS[name])
    assert caught.value.type == "invalid_request_error"
    assert "passwd" not in caught.value.message


@pytest.mark.parametrize("extra", [{"fps": "fast"}, {"min_pixels": -1}, {"max_pixels": True}])
def test_wrong_options_of_all_items(client, extra):
    with pytest.raises(openai.BadRequestError, match=next(iter(extra))) as caught:
        client.chat.completions.create(
            model="tiny", messages=SAY, extra_body={"mm_processor_kwargs": extra}
        )
    assert caught.value.param == "mm_processor_kwargs"


def test_wrong_options_are_refused_before_anything_is_decoded(server, monkeypatch):
    """Whatever is refused by its value alone needs no decoder."""
    monkeypatch.setattr(server.server, "decode", None)
    for name in ("no number", "not above zero", "no flag", "two rates", "one side", "twice"):
        body = of_user(WRONG_OPTIONS[name])
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=SECONDS)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "messages"


def test_fields_that_ask_for_nothing(client):
    """Values that clients send by default."""
    text = {"type": "text", "text": f"say {SENTENCE}", "cache_control": {"type": "ephemeral"}}
    answer = client.chat.completions.create(
        model="tiny",
        **of_user(text),
        n=1,
        presence_penalty=0,
        tool_choice="auto",
        user="me",
        audio=None,
        extra_body={
            "foo": None,
            "bar": {},
            "min_p": 0,
            "stream_options": {"include_usage": None, "continuous_usage_stats": False},
        },
    )
    assert answer.choices[0].message.content == SENTENCE


def transcribe(server, **fields) -> httpx.Response:
    url = f"{server.url}/v1/audio/transcriptions"
    file = {"file": (SAMPLES / "question.wav").read_bytes()}
    return httpx.post(url, files=file, data=fields, timeout=SECONDS)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("foo", "1"),
        ("file[]", "/etc/passwd"),
        ("include[]", "logprobs"),
        ("timestamp_granularities[]", "word"),
        ("chunking_strategy", "server_vad"),
        ("response_format", "srt"),
        ("stream", "perhaps"),
        ("temperature", "hot"),
    ],
)
def test_wrong_fields_of_a_transcription_are_named(server, name, value):
    answer = transcribe(server, **{name: value})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == name


def test_hints_and_fields_of_a_transcription_that_ask_for_nothing(server):
    neutral = {"language": "en", "prompt": "a", "chunking_strategy": "auto", "stream": "False"}
    answer = transcribe(server, response_format="text", **neutral)
    assert answer.text == "where is the red circle\n"
