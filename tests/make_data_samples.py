"""Makes data_samples/: questions with pictures, sounds and clips, a few recordings for machines
without text-to-speech, and the trained tiny model.

python -m tests.make_data_samples            questions and recordings; needs text-to-speech
python -m tests.make_data_samples model RUN  the model of a run folder, in half precision
"""

import json
import shutil
import sys
from pathlib import Path
from random import Random

import av
import numpy as np
import soundfile

import minomni
from minomni.checkpoint import saving
from minomni.checkpoint.saving import PROVENANCE_FILE
from minomni.data import corpus, grammar, scenes, text_to_speech

FOLDER = Path(__file__).parents[1] / "data_samples"
RATE = 16_000
FPS = 10


def say(text: str, voice: str, name: str) -> str:
    """Write one spoken question as a wav file and return its name."""
    everyone = grammar.LISTENING_VOICES | grammar.UNSEEN_VOICES
    wave = text_to_speech.synthesize([text_to_speech.Job(text, everyone[voice], 172, 47)], seed=99)[
        0
    ]
    soundfile.write(FOLDER / name, wave, RATE)
    return name


def film(example: scenes.Example, name: str) -> str:
    """Write an example's clip with its sound track as an mp4 file, at FPS whatever its pace, and
    return its name.
    """
    frames, seconds = example.clip
    whole = seconds[-1] + (seconds[-1] - seconds[-2])
    frames = frames[np.searchsorted(seconds, np.arange(0, whole, 1 / FPS), side="right") - 1]
    with av.open(str(FOLDER / name), "w") as container:
        video = container.add_stream("libx264", rate=FPS, options={"crf": "12"})
        video.width, video.height, video.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        sound = (
            None if example.sound is None else container.add_stream("aac", rate=RATE, layout="mono")
        )
        for frame in frames:
            container.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(video.encode(None))
        if sound is not None:
            track = av.AudioFrame.from_ndarray(example.sound[None], format="fltp", layout="mono")
            track.sample_rate = RATE
            container.mux(sound.encode(track))
            container.mux(sound.encode(None))
    return name


def questions() -> list[dict]:
    """One question for each way of asking; seeds that training never draws."""
    random = Random("data samples")
    scene = next(
        e
        for e in iter(lambda: scenes.random_scene(random), None)
        if e.question.startswith("where is")
    )
    color = next(
        e
        for e in iter(lambda: scenes.random_scene(random), None)
        if e.question.startswith("what color")
    )
    digit = scenes.handwriting(random, scenes.handwritten_digits(held_out=True))
    move, sound = scenes.moving_clip(random), scenes.clip_with_tone(random)
    statement = grammar.statement(random, held_out=True)
    for example, name in ((scene, "scene.png"), (color, "color.png"), (digit, "digit.png")):
        example.image.save(FOLDER / name)
    return [
        dict(
            name="spoken_about_a_scene",
            asks=f"an image, and a voice asking: {scene.question}",
            answer=scene.answer,
            voice="Anna",
            content=[
                {"image": "scene.png"},
                {"audio": say(scene.question, "Nora", "question.wav")},
            ],
        ),
        dict(
            name="typed_about_a_scene",
            asks=f"an image, and: {color.question}",
            answer=color.answer,
            voice="Karl",
            content=[{"image": "color.png"}, {"text": color.question}],
        ),
        dict(
            name="spoken_wish",
            asks=f"a voice: say {statement}",
            answer=statement,
            voice="Fiona",
            content=[{"audio": say(f"say {statement}", "Mike", "wish.wav")}],
        ),
        dict(
            name="handwriting",
            asks=f"a real handwritten digit, and: {digit.question}",
            answer=digit.answer,
            voice="Adam",
            content=[{"image": "digit.png"}, {"text": digit.question}],
        ),
        dict(
            name="movement",
            asks=f"a silent clip, and: {move.question}",
            answer=move.answer,
            voice="Anna",
            content=[{"video": film(move, "moving.mp4")}, {"text": move.question}],
        ),
        dict(
            name="sound_in_a_clip",
            asks=f"a clip with sound, and: {sound.question}",
            answer=sound.answer,
            voice="Karl",
            use_audio_in_video=True,
            content=[{"video": film(sound, "sounding.mp4")}, {"text": sound.question}],
        ),
    ]


def recordings(count: int = 32) -> None:
    """Write a few recordings for machines without text-to-speech: statements and spoken requests by
    the model's voices.
    """
    random, rows = Random("recordings"), []
    texts = random.sample(corpus.all_statements(held_out=False), count) + random.sample(
        corpus.all_statements(held_out=True), count // 4
    )
    random.shuffle(texts)
    names = list(grammar.VOICES)
    jobs = [(names[i % 4], t if i % 2 else f"say {t}") for i, t in enumerate(texts)]
    waves = text_to_speech.synthesize(
        [text_to_speech.Job(t, grammar.VOICES[v]) for v, t in jobs], seed=5
    )
    (FOLDER / "speech").mkdir(exist_ok=True)
    for i, ((voice, text), wave) in enumerate(zip(jobs, waves)):
        rows.append({"file": f"{i:02d}.flac", "text": text, "voice": voice})
        soundfile.write(FOLDER / "speech" / rows[-1]["file"], np.asarray(wave), RATE)
    (FOLDER / "speech" / "index.json").write_text(json.dumps(rows, indent=1) + "\n")


def model(run: Path) -> None:
    """Keep a run's model as data_samples/tiny, at half its size: load() converts it to fp32.

    The summary of the run's log becomes tiny_log.jsonl.
    """
    saving.save(minomni.load(str(run / "model")).half(), FOLDER / "tiny")
    shutil.copy(run / "model" / PROVENANCE_FILE, FOLDER / "tiny")
    shutil.copy(run / "log.jsonl", FOLDER / "tiny_log.jsonl")


if __name__ == "__main__":
    if sys.argv[1:2] == ["model"]:
        sys.exit(model(Path(sys.argv[2])))
    (FOLDER / "questions.json").write_text(json.dumps(questions(), indent=1) + "\n")
    recordings()
