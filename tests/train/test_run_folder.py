"""Runs that people can trust: a run folder to look into, kills, full disks, devices, gradients in
parts, two sizes.
"""

import copy
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path
from random import Random
from types import SimpleNamespace

import forked
import pytest
import soundfile
import torch
from elsewhere import ELSEWHERE, Elsewhere, Factories, Functions, Generator
from torch import nn

from minomni import load
from minomni.checkpoint import hf_config
from minomni.config import SMALL, TINY
from minomni.data import corpus, text_to_speech
from minomni.data.word_errors import edit_distance
from minomni.devices import device_of, has_bf16
from minomni.errors import UserError
from minomni.inputs.mel import HOP, voice_mel
from minomni.omni import Omni
from minomni.train import loop, pipeline, run_folder, samples, stage_table
from minomni.train.loop import Recipe, Stage
from minomni.train.stages.dpo import DPOStage

ROOT = Path(__file__).parents[2]
BRIEF = replace(
    TINY,
    thinker_sampling=replace(TINY.thinker_sampling, max_new_tokens=3),
    talker_sampling=replace(TINY.talker_sampling, max_new_tokens=8),
    flow=replace(TINY.flow, points=3),
)
# The command line on the committed recordings, with a codec stage that takes a second: 16 steps, a
# checkpoint each 2, and no samples, which have a test of their own.
COMMAND = """
import os, sys
from minomni import __main__, files
from minomni.data import text_to_speech
from minomni.train import recipes
from minomni.train.loop import Recipe
from minomni.train.stages.codec import CodecStage
text_to_speech.available = lambda: False
CodecStage.preview_text = lambda self: ""
CodecStage.preview_audio = lambda self: None
recipes.RECIPES["tiny"]["codec"] = Recipe(steps=16, batch=2, lr=1e-3, warmup=2)
{}
sys.exit(__main__.main())
"""


@pytest.fixture(autouse=True)
def recordings_only(monkeypatch):
    monkeypatch.setattr(text_to_speech, "available", lambda: False)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """Where the stages of the Talker share what the same Thinker tells them."""
    return tmp_path_factory.mktemp("cache")


def make(name: str, cache: Path, device="cpu", config=BRIEF, **recipe) -> Stage:
    torch.manual_seed(0)
    recipe = Recipe(**{"steps": 4, "batch": 3, "lr": 1e-3, "warmup": 1, **recipe})
    stage = stage_table.STAGES[name](Omni(config).to(device), recipe, cache, 0)
    loop.run_setup(stage)
    return stage


def command(home: Path, *options: str) -> list[str]:
    return ["train", "tiny", "--stage", "codec", "--home", str(home), *options]


def start(home: Path, *options: str, prelude: str = "") -> subprocess.Popen | forked.Forked:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}
    return forked.start(COMMAND.format(prelude), command(home, *options), ROOT, environment)


# ----------------------------------------------------------------------------------------------
# what a run leaves


@pytest.mark.slow
def test_run_folder_can_be_looked_into(tmp_path):
    loop.train(make("codec", tmp_path, steps=2), tmp_path)
    files = {
        path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()
    }
    assert files == {"log.jsonl", "codec.safetensors"} | {
        f"samples/codec/{step:06}.{kind}" for step in (1, 2) for kind in ("wav", "png", "txt")
    }
    entries = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [1, 2]
    losses = {"ctc", "mel", "code_mel", "fsq_mean"}
    keys = {"stage", "step", "ms", "items_per_s", "sample"} | losses
    assert all(entry.keys() == keys for entry in entries)
    wave, rate = soundfile.read(tmp_path / "samples" / "codec" / "000002.wav")
    assert rate == 16_000
    assert len(wave) == len(corpus.sample_recordings(held_out=False).wave(0))
    assert abs(wave).max() > 0.001
    lines = (tmp_path / "samples" / "codec" / "000002.txt").read_text().splitlines()
    assert lines[0].startswith("text        'say the")
    assert lines[1].startswith("transcript  ")
    assert lines[2:] == [entries[1]["sample"]]


@pytest.mark.slow
def test_thinker_leaves_text_alone(tmp_path):
    loop.train(make("language", tmp_path, steps=1), tmp_path)
    left = list((tmp_path / "samples").rglob("*.*"))
    assert [path.name for path in left] == ["000001.txt"]
    assert " -> " in left[0].read_text()


def test_vocoder_is_read_once_there_is_a_codec(tmp_path):
    stage = make("vocoder", tmp_path)
    assert samples.trained_codec(stage, tmp_path) is None
    learned = {n: p for n, p in stage.omni.named_parameters() if n.startswith("codec.")}
    run_folder.save_stage(tmp_path, "codec", learned)
    reader = samples.trained_codec(stage, tmp_path)
    assert all(torch.equal(p, learned[f"codec.{n}"]) for n, p in reader.named_parameters())


def test_a_mel_made_audible_still_says_the_same():
    """The trained codec reads in the wave that is made of a mel what was said, but for a letter or
    two.
    """
    codec, spoken = load("data_samples/tiny").codec, corpus.sample_recordings(held_out=False)
    for i in (1, 3):
        mel = voice_mel(spoken.wave(i))
        wave = samples.griffin_lim(mel)
        assert wave.shape == (len(mel) * HOP,)
        assert samples.transcribe(codec, mel) == spoken.utterances[i].text
        assert (
            edit_distance(samples.transcribe(codec, voice_mel(wave)), spoken.utterances[i].text)
            <= 2
        )
        assert (
            voice_mel(wave) - mel
        ).abs().mean() < 0.6  # 0.39 measured; mels are 1.9 apart from their mean


def test_config_is_kept_and_guards(tmp_path):
    run_folder.check_run_config(tmp_path, TINY)
    assert hf_config.read_config(tmp_path) == TINY
    run_folder.check_run_config(tmp_path, TINY)
    with pytest.raises(UserError, match="holds a run of other sizes; --fresh"):
        run_folder.check_run_config(tmp_path, SMALL)


def test_one_stage_starts_over_alone(tmp_path):
    pipeline.prepare_run(tmp_path, resume=False, fresh=False, stage="codec")
    left = [
        tmp_path / "stages" / name
        for name in ("codec.safetensors", "dit.safetensors", "dit.resume.pt")
    ]
    for path in left:
        path.write_bytes(b"x")
    pipeline.prepare_run(tmp_path, resume=False, fresh=False, stage="vocoder")
    with pytest.raises(UserError, match="holds stage dit of an earlier run; --resume"):
        pipeline.prepare_run(tmp_path, resume=False, fresh=False, stage="dit")
    pipeline.prepare_run(tmp_path, resume=False, fresh=True, stage="dit")
    assert [path.exists() for path in left] == [True, False, False]


def test_finished_stage_is_not_done_again(tmp_path, capsys):
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages" / "codec.safetensors").write_bytes(b"x")
    pipeline.run_stage("codec", "tiny", tmp_path, 0, resume=True)
    assert "stage codec is finished" in capsys.readouterr().out


@pytest.mark.slow
def test_settings_of_the_command_line(tmp_path):
    """--set reaches the stage; a resume with other settings is one line of error."""
    process = start(tmp_path, "--set", "codec.steps=4", "--no-progress")
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    assert steps_of(tmp_path / "stages" / "log.jsonl") == [1, 2, 3, 4]
    process = start(tmp_path, "--resume", "--set", "codec.steps=5")
    _, errors = process.communicate()
    assert process.returncode == 2
    assert "stage codec has begun with steps=4 and cannot go on with steps=5" in errors
    assert errors.count("\n") == 1


# ----------------------------------------------------------------------------------------------
# kills and full disks


@pytest.mark.slow
def test_kill_loses_only_what_no_checkpoint_holds(tmp_path):
    """Killed from outside, then dead while it writes a checkpoint: the end is the same."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    untouched = start(whole, "--fresh")
    process = start(killed, "--fresh", prelude="import time; go = files.os.replace\n"
                    "files.os.replace = lambda a, b: (go(a, b), time.sleep(0.2))")  # fmt: skip
    folder = killed / "stages"
    log = folder / "log.jsonl"
    while not (log.exists() and log.read_text().count('"step"') >= 2):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.kill()  # SIGKILL, where there are signals
    process.communicate()
    before = torch.load(folder / "codec.resume.pt", weights_only=True)["step"]
    logged = steps_of(log)
    assert 4 <= max(logged) <= before < 16  # what is logged is safe

    # Half a checkpoint is written, and then there is no process any more: no handler, no flush, no
    # clean-up.
    halves = (
        "write = files.write_atomically.__globals__['os'].fsync\nos.fsync = lambda f: os._exit(9)"
    )
    process = start(killed, "--resume", prelude=halves)
    process.communicate()
    assert process.returncode == 9
    assert len(list(folder.glob("codec.resume.pt.*.part"))) == 1
    assert torch.load(folder / "codec.resume.pt", weights_only=True)["step"] == before

    process = start(killed, "--resume")
    process.communicate()
    untouched.communicate()
    assert process.returncode == untouched.returncode == 0
    steps = steps_of(log)
    assert steps[len(logged)] == before + 2
    assert steps[-1] == 16
    assert (whole / "stages" / "codec.safetensors").read_bytes() == (
        folder / "codec.safetensors"
    ).read_bytes()
    assert not list(folder.glob("*.part"))
    assert not (folder / "codec.resume.pt").exists()


def steps_of(log: Path) -> list[int]:
    """The steps that a log.jsonl mentions; setup and the end of training have none."""
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    return [entry["step"] for entry in entries if "step" in entry]


def stopped_early(home: Path) -> bytes:
    """A run folder with a checkpoint at step 4 -> that checkpoint."""
    stage = make("codec", pipeline.cache_of(home), config=TINY, steps=16, batch=2, warmup=2)
    stage.preview_text = lambda: ""
    stage.preview_audio = lambda: None
    run_folder.check_run_config(home / "stages", TINY)
    loop.train(stage, home / "stages", until=4)
    return (home / "stages" / "codec.resume.pt").read_bytes()


def refused(process: subprocess.Popen) -> None:
    _, errors = process.communicate()
    assert process.returncode == 2
    assert "Traceback" not in errors
    lines = [line for line in errors.splitlines() if line.startswith("minomni: ")]
    assert len(lines) == 1, errors
    assert re.search(r"codec\.\S*: cannot be written \(.*\); make room", lines[0]), errors


@pytest.mark.slow
def test_file_that_may_not_grow_leaves_the_last_checkpoint(tmp_path):
    pytest.importorskip("resource", reason="this system has no file size limits")
    kept = stopped_early(tmp_path)
    limit = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))"
    refused(start(tmp_path, "--resume", prelude=limit))
    assert (tmp_path / "stages" / "codec.resume.pt").read_bytes() == kept
    assert not list((tmp_path / "stages").glob("*.part"))


@pytest.mark.slow
def test_full_disk_leaves_the_last_checkpoint(tmp_path):
    """On a real disk that holds one and a half checkpoints."""
    mount = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    disk, out = tmp_path / "disk", tmp_path / "out"
    disk.mkdir(), out.mkdir()
    kept = stopped_early(tmp_path)
    small = f"mount -t tmpfs -o size={3 * len(kept) // 2} tmpfs {disk}"
    if (
        not shutil.which("unshare")
        or subprocess.run([*mount, small], capture_output=True).returncode
    ):
        pytest.skip("this system lets no one mount a small disk")
    script = (
        f'{small} && cp -r {tmp_path}/stages {disk}/ && "$@"; code=$?; '
        f"cp -r {disk}/stages {out}/; exit $code"
    )
    program = [sys.executable, "-c", COMMAND.format("")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    refused(
        subprocess.Popen(
            [*mount, script, "sh", *program, *command(disk, "--resume")],
            cwd=ROOT,
            env=environment,
            **pipes,
        )
    )
    assert (out / "stages" / "codec.resume.pt").read_bytes() == kept
    assert not list((out / "stages").glob("*.part"))


def kept_stage(folder: Path) -> tuple[Stage, Path]:
    """A stage that has learned for two steps, and what it has kept of itself."""
    stage = Rows(Recipe(steps=4, batch=6, lr=1e-3))
    loop.train(stage, folder, until=2)
    return stage, folder / "rows.resume.pt"


def go_back(folder: Path) -> tuple[int, dict]:
    """load_checkpoint() into a fresh stage, of which nothing may have changed where it refuses."""
    stage = Rows(Recipe(steps=4, batch=6, lr=1e-3))
    trainable, before = (
        stage.parameters(),
        [p.detach().clone() for p in stage.parameters().values()],
    )
    try:
        return run_folder.load_checkpoint(
            folder, "rows", trainable, loop.make_optimizers(trainable, stage.recipe)
        )
    except UserError as error:
        assert str(error).isprintable()
        assert len(str(error)) <= 500
        assert "rows.resume.pt" in str(error)
        assert all(map(torch.equal, before, trainable.values()))
        raise


def test_every_damage_of_a_resume_file_is_one_line(tmp_path):
    """A flipped bit, a cut and a splice anywhere: refused, or exactly what was kept."""
    _, path = kept_stage(tmp_path)
    whole, random, refused_ones = path.read_bytes(), Random(5), 0
    kept = torch.load(path, weights_only=True)
    for case in range(150):
        content, at, other = (
            bytearray(whole),
            random.randrange(len(whole)),
            random.randrange(len(whole)),
        )
        if case % 3 == 0:
            content[at] ^= 1 << random.randrange(8)
        elif case % 3 == 1:
            content = content[:at]
        else:
            content[at : at + 40] = content[other : other + 40]
        path.write_bytes(content)
        try:
            assert go_back(tmp_path) == (kept["step"], kept["means"])
        except UserError:
            refused_ones += 1
    assert refused_ones > 100  # the rest hit bytes that say nothing


def test_other_files_in_the_place_of_a_resume_file(tmp_path):
    stage, path = kept_stage(tmp_path)
    good = torch.load(path, weights_only=True)
    states = copy.deepcopy(good["optimizers"])
    states[0]["state"][0]["exp_avg"] = torch.zeros(7)
    groups = copy.deepcopy(good["optimizers"])
    del groups[0]["param_groups"][0]["share"]
    others = [
        [1],
        "text",
        {},
        {**good, "step": "2"},
        {**good, "step": -1},
        {**good, "step": 2.0},
        {**good, "means": None},
        {**good, "means": {"x": "y"}},
        {**good, "parameters": [1]},
        {**good, "parameters": {"0.weight": 1}},
        {**good, "parameters": {}},
        {**good, "optimizers": []},
        {**good, "optimizers": [1]},
        {**good, "optimizers": [{"state": {}, "param_groups": []}]},
        {**good, "optimizers": states},
        {**good, "optimizers": groups},
        {**good, "parameters": {n: p[:1] for n, p in good["parameters"].items()}},
    ]
    for other in others:
        torch.save(other, path)
        with pytest.raises(UserError):
            go_back(tmp_path)
    path.write_bytes(b"")
    with pytest.raises(UserError, match="is damaged or was not written by a training"):
        go_back(tmp_path)
    torch.save(stage.omni, path)  # a pickle that wants to run code
    with pytest.raises(UserError, match="is damaged or was not written by a training"):
        go_back(tmp_path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**6))
    with pytest.raises(UserError, match="its parts are larger than the file"):
        go_back(tmp_path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match="is a device, a pipe"):
        go_back(tmp_path)


def test_what_a_stage_learned_is_checked_before_it_is_used(tmp_path):
    stage, _ = kept_stage(tmp_path)
    path = tmp_path / "rows.safetensors"
    run_folder.save_stage(tmp_path, "rows", stage.parameters())
    run_folder.load_stages(stage.omni, tmp_path, ["rows"])
    whole = path.read_bytes()
    for content in (b"", whole[:100], whole[:-1], b"\xff" * 8 + whole[8:]):
        path.write_bytes(content)
        with pytest.raises(UserError, match="rows.safetensors: cut short or no safetensors file"):
            run_folder.load_stages(stage.omni, tmp_path, ["rows"])
    for other in ({"0.weight": torch.zeros(2, 2)}, {"1.weight": torch.zeros(3, 5)}):
        run_folder.save_stage(tmp_path, "rows", other)
        with pytest.raises(UserError, match="belongs to another model"):
            run_folder.load_stages(stage.omni, tmp_path, ["rows"])


# ----------------------------------------------------------------------------------------------
# where a run may live


@pytest.mark.parametrize(
    ("home", "says"),
    [
        ("file", "cannot be written"),
        ("file/below", "cannot be written"),
        ("x" * 300, "File name too long"),
        ("y/" * 3000, "File name too long"),
        ("/proc/none", "cannot be written"),
        ("nul\0", "its name cannot be a file's"),
    ],
)
def test_a_home_that_cannot_be_is_told_before_work_begins(home, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError) as error:
        pipeline.prepare_run(Path(home), resume=False, fresh=False)
    assert says in str(error.value)
    assert str(error.value).isprintable()
    assert len(str(error.value)) <= 500
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "mine"


def test_fresh_deletes_no_foreign_files(tmp_path):
    """In a folder that has a stages/ of its own, as with --home . in another project."""
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages" / "chapter.txt").write_text("mine")
    with pytest.raises(UserError, match="holds 'chapter.txt', which --fresh would delete"):
        pipeline.prepare_run(tmp_path, resume=False, fresh=True)
    assert (tmp_path / "stages" / "chapter.txt").exists()
    (tmp_path / "stages" / "chapter.txt").unlink()
    for name in (
        "log.jsonl",
        "codec.safetensors",
        "dit.resume.pt",
        "config.json",
        "dit.resume.pt.1234.part",
    ):
        (tmp_path / "stages" / name).write_text("x")
    (tmp_path / "stages" / "samples").mkdir()
    pipeline.prepare_run(tmp_path, resume=False, fresh=True)
    assert not list((tmp_path / "stages").iterdir())


def test_fresh_empties_a_linked_folder_and_keeps_the_link(tmp_path):
    disk, home = tmp_path / "disk", tmp_path / "home"
    (disk / "samples" / "vision_align").mkdir(parents=True)
    (disk / "samples" / "vision_align" / "7.txt").write_text("x")
    (disk / "vision_align.resume.pt").write_text("x")
    (tmp_path / "elsewhere.safetensors").write_text("mine")
    (disk / "audio_align.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    home.mkdir()
    (home / "stages").symlink_to(disk)
    pipeline.prepare_run(home, resume=False, fresh=True)
    assert (home / "stages").is_symlink()
    assert disk.is_dir()
    assert not list(disk.iterdir())
    assert (tmp_path / "elsewhere.safetensors").read_text() == "mine"


def test_a_log_line_that_was_cut_spoils_no_other(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n{"st')
    run_folder.log(tmp_path, {"step": 2})
    run_folder.log(tmp_path, {"step": 3})
    assert (tmp_path / "log.jsonl").read_text().splitlines()[2:] == ['{"step": 2}', '{"step": 3}']


# ----------------------------------------------------------------------------------------------
# devices


@pytest.mark.slow
@pytest.mark.parametrize("name", list(stage_table.STAGES))
def test_every_stage_learns_on_another_device(name, cache, monkeypatch, untrained_tries):
    """On a pretended device that refuses what is not on it, a stage loses and learns what it does
    on the CPU.
    """
    monkeypatch.setattr(torch, "Generator", Generator)
    monkeypatch.setattr(loop, "has_bf16", lambda device: False)  # both count the same digits
    monkeypatch.setattr(DPOStage, "num_prompts", 4)
    with Factories(), Functions():
        away = make(name, cache, ELSEWHERE)
        losses = loop.forward_backward(away, 0)
        away.omni.eval()
        with torch.no_grad():
            away.preview_text(), away.preview_audio()
    here = make(name, cache)
    again = loop.forward_backward(here, 0)
    assert losses == pytest.approx(again, rel=1e-5)  # sums in another order
    for key, parameter in here.parameters().items():
        moved = away.parameters()[key].grad
        assert (moved is None) == (parameter.grad is None)
        if moved is not None:
            assert type(moved) is Elsewhere
            torch.testing.assert_close(moved.held, parameter.grad, rtol=1e-3, atol=1e-4)


def test_the_pretended_device_refuses_to_mix():
    with Factories(), Functions():
        layer = nn.Linear(3, 2).to(ELSEWHERE)
        assert type(layer(torch.ones(4, 3, device=ELSEWHERE))) is Elsewhere
        with pytest.raises(RuntimeError, match="tensors on two devices"):
            layer(torch.ones(4, 3))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["codec", "dit", "language", "audio_align", "vision_align", "talker"]
)
def test_bf16_says_about_the_same(name, cache, monkeypatch):
    """Losses within 2 %, of three digits that bf16 has, and gradients that point the same way."""
    measured = {}
    for bf16 in (True, False):
        monkeypatch.setattr(loop, "has_bf16", lambda device, bf16=bf16: bf16)
        stage = make(name, cache)
        losses = loop.forward_backward(stage, 0)
        measured[bf16] = (
            losses,
            torch.cat(
                [p.grad.flatten() for p in stage.parameters().values() if p.grad is not None]
            ),
        )
    (rough, leaning), (exact, right) = measured.values()
    assert rough != exact
    assert rough == pytest.approx(exact, rel=0.02)
    assert torch.cosine_similarity(leaning, right, dim=0) > 0.99


@pytest.mark.parametrize("frames", [200, 400, 440])
def test_a_codec_in_bf16_takes_any_length(frames):
    torch.manual_seed(0)
    codec = Omni(TINY).codec
    with torch.autocast("cpu", torch.bfloat16):
        grid, codes = codec.quantize(torch.randn(2, frames, TINY.codec.mel_dim) - 5)
        assert codec.letters(grid).shape[:2] == codes.shape == (2, frames // TINY.codec.downsample)


@pytest.mark.parametrize(
    ("instructions", "onednn", "enabled", "expected"),
    [
        ({"avx512_bf16": True}, True, True, True),
        ({"amx_bf16": True}, True, True, True),
        ({"avx2": True}, True, True, False),
        ({"amx_bf16": True}, False, True, False),  # limited by ONEDNN_MAX_CPU_ISA
        ({"avx512_bf16": True}, True, False, False),
    ],
)
def test_bf16_where_the_processor_multiplies_in_it(
    instructions, onednn, enabled, expected, monkeypatch
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: instructions)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn)
    with torch.backends.mkldnn.flags(enabled=enabled):
        assert has_bf16(torch.device("cpu")) == expected


def test_devices_by_name(monkeypatch):
    assert device_of("cpu").type == "cpu"
    there = {"cuda": torch.cuda, "mps": torch.backends.mps}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, next_best in (("cuda", "mps"), ("mps", "cpu")):
        monkeypatch.setattr(there[name], "is_available", lambda: True)
        monkeypatch.setattr(there["mps"], "is_available", lambda: True)
        assert device_of("auto").type == name
        monkeypatch.setattr(there[name], "is_available", lambda: False)
        assert device_of("auto").type == next_best
    with pytest.raises(
        UserError, match="device 'cuda': this machine, with this PyTorch, has cpu; or use auto"
    ):
        device_of("cuda")


# ----------------------------------------------------------------------------------------------
# gradients in parts


class Rows(Stage):
    """A linear map of 96 rows that never change, taken in order."""

    name = "rows"
    trainable = ("0.",)
    bf16 = False  # exact, for comparisons

    def __init__(self, recipe: Recipe):
        torch.manual_seed(1)
        omni = nn.Sequential(nn.Linear(5, 3))
        omni.thinker = SimpleNamespace(device=torch.device("cpu"))  # a stage asks for it
        super().__init__(omni, recipe, Path(), 0)
        self.asked, self.rows = [], torch.randn(96, 5)

    def batch(self, number):
        self.asked.append(number)
        return self.rows[number * self.recipe.batch :][: self.recipe.batch]

    def losses(self, batch):
        return {
            "square": self.omni(batch).square().mean(),
            "size": 0.1 * self.omni(batch).abs().mean(),
        }


def test_a_line_tells_the_pace_since_the_last(tmp_path, monkeypatch):
    """Eight steps of 10 s, as beside other work, then eight of 1 s: the time left is told by the
    second.
    """
    clock = [0.0]
    stage = Rows(Recipe(steps=16, batch=6, lr=1e-3))
    stage.losses = lambda batch: (
        clock.__setitem__(0, clock[0] + (10 if len(stage.asked) <= 8 else 1))
        or {"square": stage.omni(batch).square().mean()}
    )
    stage.preview_text = lambda: (
        clock.__setitem__(0, clock[0] + 100) or ""
    )  # a step does not pay for what is shown
    monkeypatch.setattr(loop.time, "perf_counter", lambda: clock[0])
    loop.train(stage, tmp_path)
    told = [json.loads(line)["ms"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert told == [10_000] * 4 + [1_000] * 4


def test_gradients_in_parts_are_those_of_the_whole():
    whole = Rows(Recipe(steps=6, batch=16, lr=1e-3))
    halves = Rows(Recipe(steps=6, batch=8, lr=1e-3, accumulate=2))
    for step in (0, 4):
        assert loop.forward_backward(halves, step) == pytest.approx(
            loop.forward_backward(whole, step), abs=1e-6
        )
        for a, b in zip(whole.omni.parameters(), halves.omni.parameters()):
            assert a.grad.abs().max() > 1e-2
            torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-6)
    assert whole.asked == [0, 4]
    assert halves.asked == [0, 1, 8, 9]


def test_parts_of_a_real_stage(tmp_path):
    """Two halves of a codec's batch, cut from rows of one length: the mean of their gradients is
    that of all.
    """
    whole = make("codec", tmp_path, batch=4)
    mels, frames, letters, conds, weight = whole.batch(0)
    shortest = int(frames.min()) // 8 * 8
    rows = mels[:, :shortest], torch.full((4,), shortest), [row[:9] for row in letters], conds
    whole.batch = lambda number: (*rows, weight)
    halves = make("codec", tmp_path, batch=2, accumulate=2)
    whole.bf16 = halves.bf16 = False  # its few digits would hide a mistake
    halves.batch = lambda number: (*(part[2 * number :][:2] for part in rows), weight)
    assert loop.forward_backward(halves, 0) == pytest.approx(
        loop.forward_backward(whole, 0), rel=1e-5
    )
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in whole.parameters().values()))
    for key, parameter in whole.parameters().items():
        torch.testing.assert_close(
            halves.parameters()[key].grad, parameter.grad, rtol=0, atol=1e-6 * max(1, norm)
        )


def test_codec_hears_sound_as_late_in_parts(tmp_path):
    """The weight of its mel follows the step and not the number of the batch."""
    whole, parts = make("codec", tmp_path, batch=1), make("codec", tmp_path, batch=1, accumulate=4)
    assert [parts.batch(number)[-1] for number in (0, 4)] == [
        whole.batch(step)[-1] for step in (0, 1)
    ]
