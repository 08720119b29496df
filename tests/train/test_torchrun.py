"""The command line under torchrun: stages and fine-tuning, one model at the end, one line for bad
input.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file
from test_distributed import launch_code, without_key_bias

import minomni
from minomni.data import corpus

# Not tried on Windows, where a signal ends a process with another exit code.
pytestmark = pytest.mark.skipif(os.name == "nt", reason="several processes need Linux or macOS")
ROOT = Path(__file__).parents[2]
# `minomni` on the committed recordings, in fp32 and without samples; RANK in an argument becomes
# the number of the process.
CODE = """
import json, os, sys
from minomni import __main__
from minomni.data import text_to_speech
from minomni.train import code_pairs, loop, muon, train_encoder
from minomni.train.finetune import FinetuneChatStage
from minomni.train.stages import encoder
from minomni.train.stages.codec import CodecStage
text_to_speech.available = lambda: False
loop.has_bf16 = muon.has_bf16 = lambda device: False
CodecStage.preview_text = FinetuneChatStage.preview_text = lambda self: ""
CodecStage.preview_audio = lambda self: None
encoder.EncoderStage.preview_text = lambda self: ""
code_pairs.CHUNK = encoder.CHUNK = 4  # pairs in a file, each of 0.6 s
code_pairs.RANDOM_SECONDS = 0.6
train_encoder.BATCH = 3
train_encoder.LEARNING_RATE = 1e-4  # see STAGE_LR in test_distributed.py
words = [word.replace("RANK", os.environ["RANK"]) for word in json.loads(sys.argv[1])]
sys.argv = ["minomni", *words]
sys.exit(__main__.main())
"""


def minomni_by(count: int, folder: Path, *arguments: str) -> tuple[list[int], str, str]:
    """Run the command line by some processes in a folder -> exit codes, stdout and stderr of
    all.
    """
    words = [*arguments, "--device", "cpu"]
    ends = launch_code(count, CODE, [json.dumps(words)], folder)
    codes, outs, errors = zip(*ends, strict=True)
    return list(codes), "".join(outs), "".join(errors)


def refused(folder: Path, *arguments: str) -> str:
    """The one line with which two processes refuse a command."""
    codes, out, errors = minomni_by(2, folder, *arguments)
    assert codes == [2, 2], errors
    assert errors.startswith("minomni: ")
    assert errors.count("\n") == 1, errors
    return errors


@pytest.fixture
def data(tmp_path) -> Path:
    """Four rows, two of them with a recording, in a folder of their own for each process."""
    recordings = corpus.sample_recordings(held_out=False)
    for rank in (0, 1):
        folder = tmp_path / str(rank)
        folder.mkdir()
        rows = []
        for i in range(4):
            text = recordings.utterances[i].text
            messages = [
                {"role": "user", "content": f"say {text}"},
                {"role": "assistant", "content": text},
            ]
            row = {"messages": messages}
            if i % 2:
                soundfile.write(folder / f"{i}.wav", recordings.wave(i), 16_000)
                row |= {"speech": f"{i}.wav", "voice": "Ann"}
            rows.append(json.dumps(row) + "\n")
        (folder / "my.jsonl").write_text("".join(rows))
    return tmp_path


@pytest.mark.slow
def test_a_stage_by_two_processes_is_that_by_one(tmp_path):
    """The same command: three rows, of which the first process computes two."""
    settings = ["--set", "codec.steps=2", "--set", "codec.batch=3"]
    command = ["train", "tiny", "--stage", "codec"]
    assert minomni_by(2, tmp_path, *command, *settings, "--home", "two")[0] == [0, 0]
    given = json.loads((tmp_path / "two/stages/settings.json").read_text())["codec"]
    assert given == {"steps": 2, "batch": 3}

    # The command that began the run continues it, by any number of processes.
    again = [*command, *settings, "--home", "two", "--resume"]
    for count in (1, 2):
        codes, out, errors = minomni_by(count, tmp_path, *again)
        assert codes == [0] * count, errors
        assert "stage codec is finished" in out

    assert minomni_by(1, tmp_path, *command, *settings, "--home", "one")[0] == [0]
    one, two = (load_file(tmp_path / f"{home}/stages/codec.safetensors") for home in ("one", "two"))
    assert one.keys() == two.keys()
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-6

    # Too few rows.
    few = ["--set", "codec.batch=1", "--home", "few"]
    says = "stage codec: a batch has 1 rows, too few for 2 processes; start at most 1, or --set"
    assert says in refused(tmp_path, *command, *few)
    assert says in refused(tmp_path, "train", "tiny", *few)
    assert not (tmp_path / "few").exists()

    # Other sizes, and the checkpoint of another model.
    other = refused(tmp_path, "train", "small", "--stage", "codec", "--home", "two", "--resume")
    assert "holds a run of other sizes" in other
    stages = tmp_path / "two/stages"
    state = {"step": 1, "means": {}, "parameters": {"x": torch.zeros(1)}, "optimizers": []}
    torch.save(state, stages / "codec.resume.pt")
    (stages / "codec.safetensors").unlink()
    assert "belongs to another model" in refused(tmp_path, *command, "--home", "two", "--resume")


@pytest.mark.slow
def test_fine_tuning_by_two_processes(data, tiny_folder):
    """Both stages, by two processes and by one."""
    lora = ["train", str(tiny_folder), "--data", "0/my.jsonl", "--lora", "r=2", "--epochs", "1"]
    codes, out, errors = minomni_by(2, data, *lora, "--out", "adapter", "--home", "two")
    assert codes == [0, 0], errors
    assert out.count("tuned: ") == 1
    assert minomni_by(1, data, *lora, "--out", "same", "--home", "one")[0] == [0]
    one, two = (load_file(data / f"{out}/adapter_model.safetensors") for out in ("same", "adapter"))
    assert {name.split(".")[2] for name in two} == {"thinker", "talker"}
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-6


@pytest.mark.slow
def test_an_encoder_by_two_processes(tiny_folder, tmp_path):
    """The first process makes the pairs, and three of them are divided."""
    command = ["train-encoder", str(tiny_folder), "--size", "tiny", "--home", "home"]
    command += ["--pairs", "4", "--steps", "2", "--random-codes", "1"]
    encoders = []
    for count in (1, 2):
        codes, out, errors = minomni_by(count, tmp_path, *command, "--out", f"by-{count}")
        assert codes == [0] * count, errors
        assert out.count("with an encoder: ") == 1
        encoders.append(load_file(tmp_path / f"home/by-{count}.run/stages/encoder.safetensors"))
    one, two = encoders
    assert one.keys() == two.keys()
    for name in one:
        assert float(without_key_bias(name, one[name] - two[name]).abs().max()) < 1e-6, name


@pytest.mark.slow
def test_bad_input_of_two_processes_is_one_line(data, tiny_folder, tmp_path):
    tune = ["train", str(tiny_folder), "--lora", "r=2", "--home", "run"]
    with open(data / "1/my.jsonl", "a") as file:
        file.write('{"query": "say b", "response": "a circle"}\n')
    other_data = refused(data, *tune, "--data", "RANK/my.jsonl")
    assert "the processes of this run have different data" in other_data
    no_rank = ["train", str(tiny_folder), "--lora", "r=0", "--data", "0/my.jsonl"]
    assert "--lora r is 0; expected a whole number" in refused(data, *no_rank)
    unknown = ["train", str(tiny_folder), "--lora", "r=2,layers=x", "--data", "0/my.jsonl"]
    assert "no layer is called 'x'" in refused(data, *unknown)

    # A Thinker without a Talker.
    stored = load_file(tiny_folder / "model.safetensors")
    base = tmp_path / "base"
    base.mkdir()
    for file in tiny_folder.iterdir():
        if file.is_file() and file.suffix not in (".safetensors", ".pt"):
            (base / file.name).write_bytes(file.read_bytes())
    thinker = {name: tensor for name, tensor in stored.items() if name.startswith("thinker.")}
    save_file(thinker, base / "model.safetensors", {"format": "pt"})
    talker = ["train", "base", "--lora", "r=2", "--parts", "talker", "--data", "0/my.jsonl"]
    assert "this model answers in text alone" in refused(data, *talker, "--fresh", "--home", "run")


@pytest.mark.slow
def test_torchrun(data, tiny_folder):
    """PyTorch's own launcher, and one folder of a model at the end."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--standalone", "-m", "minomni", "train", "tiny", "--data", "0/my.jsonl"]
    command += ["--stage", "chat", "--epochs", "1", "--out", "tuned", "--home", "run"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=data, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("tuned: ") == 1
    assert minomni.load(str(data / "tuned")).talker is not None


# The second of two processes is killed while the first one computes, or while it waits for it.
KILLED = """
import os, sys
import torch
import torch.distributed as dist
from minomni import __main__
from minomni.train import distributed, processes

def train(arguments):
    with processes.process_group("cpu"):
        dist.barrier()
        if distributed.rank() == 1:
            while not os.path.exists("ready"):  # the first process has left the barrier
                pass
            os.kill(os.getpid(), 9)
        open("ready", "w").close()
        while arguments.size == "tiny":
            torch.ones(300, 300) @ torch.ones(300, 300)
        dist.barrier()

__main__.COMMANDS["train"] = train
sys.exit(__main__.main())
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "says"),
    [
        ("tiny", "torchrun has ended this process, as it does when another one is lost; --resume"),
        ("small", "--resume continues from the last checkpoint"),  # connection lost, or ended
    ],
    ids=["computes", "waits"],
)
def test_a_killed_process_ends_torchrun_with_our_line(size, says, tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--standalone", str(script), "train", size]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    ours = [line for line in done.stderr.splitlines() if line.startswith("minomni: ")]
    assert len(ours) == 1, done.stderr
    assert says in ours[0]


ENDED = """
import os, signal, sys
import torch.distributed as dist
from minomni import __main__
from minomni.train import processes

def train(arguments):
    with processes.process_group("cpu"):
        dist.barrier()
        os.kill(os.getpid(), signal.SIGTERM)
        while True:
            pass

__main__.COMMANDS["train"] = train
sys.argv = ["minomni", "train", "tiny"]
sys.exit(__main__.main())
"""


def test_processes_that_are_ended_print_one_line(tmp_path):
    """The first one to notice prints it; its exit code is that of SIGTERM."""
    codes, _, errors = zip(*launch_code(2, ENDED, [], tmp_path), strict=True)
    assert sorted(codes) == [2, 143]
    assert "".join(errors).count("\n") == 1
    assert "minomni: torchrun has ended this process" in "".join(errors)
