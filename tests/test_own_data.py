"""People's own data: bad lines are named before anything is trained, good ones are streamed, learnt and saved."""

import json
import sys
import tracemalloc
from pathlib import Path

import pytest
import soundfile
import torch
from PIL import Image

import minomni
from minomni import __main__ as command
from minomni.errors import UserError
from minomni.train import own_data, own_lines, speech
from minomni.train.loop import Recipe, train


@pytest.fixture(scope="module")
def recordings():
    return speech.recorded(held=False)


@pytest.fixture
def omni(tiny_folder):
    """A fresh model of random weights."""
    return minomni.load(str(tiny_folder))


@pytest.fixture
def small(monkeypatch, tiny_folder):
    """tune() begins with the random model and takes two lines a step."""
    monkeypatch.setattr(own_data, "load", lambda size, device: minomni.load(str(tiny_folder), device))
    monkeypatch.setitem(own_data.RECIPES, "tiny", {"chat": (3e-3, 2), "talker": (3e-3, 2)})
    monkeypatch.setattr(own_data.OwnChatStage, "sample", lambda self: "")


def line(question="say a", answer="a circle", **more) -> dict:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, **more}


def write(folder: Path, rows: list, name="my.jsonl") -> Path:
    """A JSONL file of rows; those that are texts are written as they stand."""
    texts = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / name).write_text("\n".join(texts) + "\n")
    return folder / name


@pytest.fixture
def spoken(tmp_path, recordings) -> list[dict]:
    """Four lines whose answers are recordings in tmp_path, two of them by a voice that the model does not know."""
    rows = []
    for i in range(4):
        soundfile.write(tmp_path / f"{i}.wav", recordings.wave(i), 16_000)
        text = recordings.utterances[i].text
        rows.append(line(f"say {text}", text, speech=f"{i}.wav", voice=("Ann", "Me")[i % 2]))
    return rows


BAD = [
    ("{", "not JSON"),
    ([1], 'a list "messages"'),
    ({"messages": [], "speach": "x.wav"}, "unknown key 'speach'"),
    ({"messages": []}, "at least one question"),
    ({"messages": [{"role": "user", "content": "a"}]}, "the assistant's answer"),
    ({"messages": ["a", "b"]}, "no dictionary"),
    (line(answer=" "), "the answer is empty"),
    (line(answer=[{"type": "image", "image": "x.png"}]), "the answer holds media"),
    (line([{"type": "image", "image": "none.png"}]), "none.png: no such file"),
    (line([{"type": "audio", "audio": "words.wav"}]), "words.wav: not readable as sound"),
    (line([{"type": "smell", "smell": "x"}]), "expected one of image"),
    (line([{"type": "audio", "audio": "https://example.org/a.wav"}]), "web addresses are not fetched"),
    (line("so long " * 3000), "the context holds 2048"),
    (line(answer="so long " * 3000), "the context holds 2048"),
    (line("<|AUDIO|>"), "which only media may put there"),
    (line(speech="none.wav"), "none.wav: no such file"),
    (line(speech=3), "'speech' is 3"),
    ({"messages": [{"role": "users", "content": "a"}, {"role": "assistant", "content": "a"}]}, "unknown role 'users'"),
]


def test_every_bad_line_is_named_and_nothing_is_trained(tmp_path, small):
    (tmp_path / "words.wav").write_text("words, not sound")
    rows = [row for bad, _ in BAD for row in (bad if isinstance(bad, str) else json.dumps(bad), line())]
    with pytest.raises(UserError) as error:
        own_data.tune("tiny", write(tmp_path, rows), tmp_path / "tuned")
    first, *causes = str(error.value).splitlines()
    assert f"{len(BAD)} bad lines, nothing was trained" in first and len(causes) == len(BAD)
    for i, (cause, (_, says)) in enumerate(zip(causes, BAD)):
        assert cause.startswith(f"line {2 * i + 1}: ") and says in cause
    assert not (tmp_path / "tuned").exists() and not list((tmp_path / "tuned.run" / "stages").iterdir())


def test_at_most_twenty_lines_are_named(tmp_path, omni):
    with pytest.raises(UserError) as error:
        own_lines.checked(write(tmp_path, ["?"] * 50), omni)
    assert len(str(error.value).splitlines()) == 22 and str(error.value).endswith("... and 30 more")


def test_speech_wants_a_voice_that_can_be_made(tmp_path, omni, recordings):
    soundfile.write(tmp_path / "short.wav", recordings.wave(0)[:4000], 16_000)
    path = write(tmp_path, [line(speech="short.wav", voice="Me")])
    with pytest.raises(UserError, match="s of speech; a voice needs at least 1 s"):
        minomni.make_voice(own_lines.checked(path, omni).voices["Me"], "Me", omni)
    omni.voices = {}
    with pytest.raises(UserError, match='line 1: the model has no voices; give this recording a "voice"'):
        own_lines.checked(write(tmp_path, [line(speech="short.wav")]), omni)


def test_media_are_looked_for_beside_the_file(tmp_path, omni, recordings):
    (tmp_path / "media").mkdir()
    Image.new("RGB", (64, 64), "red").save(tmp_path / "media" / "a.png")
    soundfile.write(tmp_path / "q.wav", recordings.wave(0), 16_000)
    asked = [{"type": "image", "image": "media/a.png"}, {"type": "audio", "audio": str(tmp_path / "q.wav")}]
    turns = [{"role": "user", "content": "say a"}, {"role": "assistant", "content": "a"}]
    lines = own_lines.checked(write(tmp_path, ["", {"messages": [*turns, *line(asked)["messages"]]}]), omni)
    question = lines[0].question
    assert len(lines) == 1 and [message["role"] for message in question] == ["system", "user", "assistant", "user"]
    assert question[-1]["content"][0] == {"type": "image", "image": str(tmp_path / "media" / "a.png")}
    inputs = own_lines.prompt(lines[0], own_lines.Processor(omni.config, omni.tokenizer))
    assert len(inputs.mels) == 1 and len(inputs.image_grids) == 1


def test_an_epoch_holds_every_line_once():
    epochs = [[own_lines.in_turn(3, 50, 50 * epoch + i) for i in range(50)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != [own_lines.in_turn(4, 50, i) for i in range(50)]


def test_memory_does_not_grow_with_the_file(tmp_path, omni):
    """Ten times the lines, 8 MB more on disk: only where lines begin, and an epoch's order, may grow."""
    peaks = []
    for count in (200, 2000):
        path = write(tmp_path, [line("a " * 500, f"{i}", voice="v" * 3000) for i in range(count)])
        tracemalloc.start()
        lines = own_lines.checked(path, omni)
        stage = own_data.OwnChatStage(omni, Recipe(steps=1000, batch=8, lr=1e-3), tmp_path, 0, lines)
        seen = {row.answer for step in range(count // 8) for row in stage.batch(step)}
        peaks.append(tracemalloc.get_traced_memory()[1] - sys.getsizeof(seen) - 60 * len(seen))
        tracemalloc.stop()
        assert len(lines) == len(seen) == count
    assert peaks[1] - peaks[0] < 100 * 1800, peaks  # at most 100 bytes a line, of 4,000


@pytest.mark.parametrize("name", list(own_data.STAGES))
def test_stages_learn_one_batch_and_resume_exactly(name, tmp_path, omni, tiny_folder, spoken):
    def stage_of(steps):
        fresh = minomni.load(str(tiny_folder))
        lines = own_lines.checked(write(tmp_path, [{**row, "voice": "Ann"} for row in spoken]), fresh)
        stage = own_data.STAGES[name](fresh, Recipe(steps, 2, 5e-3, warmup=2), tmp_path, 0, lines)
        stage.sample = lambda: ""
        return stage

    stage = stage_of(100)
    batch = stage.batch(0)
    stage.batch = lambda step: batch
    with torch.no_grad():
        before = sum(stage.losses(batch).values())
    train(stage, tmp_path / "one", until=12)
    with torch.no_grad():
        assert sum(stage.losses(batch).values()) < 0.6 * before
    train(stage_of(6), tmp_path / "whole")
    train(stage_of(6), tmp_path / "halves", until=3)
    assert (tmp_path / "halves" / f"{name}.resume.pt").exists()
    train(stage_of(6), tmp_path / "halves", resume=True)
    whole, halves = ((tmp_path / run / f"{name}.safetensors").read_bytes() for run in ("whole", "halves"))
    assert whole == halves


def test_a_tuned_model_is_loaded_like_any_other(tmp_path, small, tiny_folder, spoken):
    data, out = write(tmp_path, spoken), tmp_path / "tuned"
    own_data.tune("tiny", data, out, epochs=1)
    tuned, before = minomni.load(str(out)), minomni.load(str(tiny_folder))
    changed = {name.split(".")[0] for name, old in before.state_dict().items()
               if not torch.equal(old, tuned.state_dict()[name])}
    assert changed == {"thinker", "talker"}
    assert list(tuned.voices) == ["Ann", "Bob", "Me"] and tuned.voices["Me"].bos_token == 502
    assert tuned.respond([{"role": "user", "content": "say a"}], voice="Me")
    assert json.loads((out / "trained.json").read_text())["stages"] == ["chat", "talker"]
    with pytest.raises(UserError, match="--resume goes on with it"):
        own_data.tune("tiny", data, out, epochs=1)
    with pytest.raises(UserError, match="begun with other epochs"):
        own_data.tune("tiny", data, out, epochs=2, resume=True)
    write(tmp_path, spoken[:3])
    with pytest.raises(UserError, match="begun with other data"):
        own_data.tune("tiny", data, out, epochs=1, resume=True)


def test_a_run_cut_off_between_its_stages_ends_the_same(tmp_path, small, spoken, monkeypatch):
    data = write(tmp_path, spoken)
    own_data.tune("tiny", data, tmp_path / "whole", epochs=2)
    with monkeypatch.context() as patch:
        patch.setattr(own_data, "train", lambda stage, *rest, **more: train(
            stage, *rest, **more, until=2 if stage.name == "talker" else None))
        with pytest.raises(UserError, match="talker.safetensors is missing"):
            own_data.tune("tiny", data, tmp_path / "halves", epochs=2)
    assert not (tmp_path / "halves").exists()
    own_data.tune("tiny", data, tmp_path / "halves", epochs=2, resume=True)
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "halves")]
    assert files[0] == files[1]


def test_folder_of_spoken_digits(tmp_path, small, recordings):
    folder = tmp_path / "digits" / "recordings"
    folder.mkdir(parents=True)
    for name in ("3_ann_0.wav", "0_bob_12.wav", "readme.wav"):
        soundfile.write(folder / name, recordings.wave(0), 8_000)
    rows = list(own_lines.layout(tmp_path / "digits"))
    assert [row["messages"][-1]["content"] for row in rows] == ["the digit is zero", "the digit is three"]
    assert own_data.tune("tiny", tmp_path / "digits", tmp_path / "tuned", epochs=1).is_dir()
    with pytest.raises(UserError, match='no line has "speech"'):
        own_data.tune("tiny", tmp_path / "digits", tmp_path / "other", stage="talker")


def test_folder_of_ljspeech(tmp_path, small, recordings):
    folder = tmp_path / "LJ"
    (folder / "wavs").mkdir(parents=True)
    rows = [f"LJ-{i}|{recordings.utterances[i].text} 1|{recordings.utterances[i].text} one" for i in range(3)]
    (folder / "metadata.csv").write_text("\n".join(rows) + "\n")
    for i in range(2):
        soundfile.write(folder / "wavs" / f"LJ-{i}.wav", recordings.wave(i), 22_050)
    with pytest.raises(UserError, match=r"line 3: .*LJ-2.wav: no such file"):
        own_data.tune("tiny", folder, tmp_path / "tuned", epochs=1)
    soundfile.write(folder / "wavs" / "LJ-2.wav", recordings.wave(2), 22_050)
    own_data.tune("tiny", folder, tmp_path / "tuned", epochs=1, resume=True)
    assert "LJ" in minomni.load(str(tmp_path / "tuned")).voices
    (folder / "metadata.csv").write_text("LJ-0 no columns\n")
    with pytest.raises(UserError, match="row 1 has 1 columns"):
        list(own_lines.layout(folder))


@pytest.mark.parametrize("options, says", [
    (["--data", "none.jsonl"], "no such file or folder"),
    (["--data", "."], "and no metadata.csv"),
    (["--data", "none.jsonl", "--stage", "codec"], "own data has no stage 'codec'"),
    (["huge", "--data", "none.jsonl"], "no recipe tunes 'huge'"),
    (["--epochs", "3"], "go with --data"),
    (["--out", "x"], "go with --data"),
])
def test_the_command_line(options, says, tmp_path, small, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["minomni", "train", *options, "--home", str(tmp_path / "home")])
    assert command.main() == 2
    assert says in capsys.readouterr().err and not (tmp_path / "home" / "tuned").exists()
