"""Training by several processes: the numbers of one, checkpoints for any number, a lost process, a
full disk.
"""

import json
import os
import re
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import forked
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.utils._pytree import tree_map
from training import recordings_only, stage_of  # noqa: F401  a fixture

from minomni.errors import UserError
from minomni.train import distributed, loop, losses, processes
from minomni.train.loop import Recipe, Stage, train
from minomni.train.stages.dpo import DPOStage

# Not tried on Windows, where a signal ends a process with another exit code.
pytestmark = pytest.mark.skipif(os.name == "nt", reason="several processes need Linux or macOS")
ROOT = Path(__file__).parents[2]
# What each process does: train stages, as the tests of this file do in their own process.
CODE = """
import json, sys
from minomni.data import text_to_speech
text_to_speech.available = lambda: False
from minomni.errors import UserError
from minomni.train import loop, muon, processes
from test_distributed import run
loop.has_bf16 = muon.has_bf16 = lambda device: False
try:
    with processes.process_group("cpu"):
        for arguments in json.loads(sys.argv[1]):
            run(**arguments)
except UserError as error:
    print(f"minomni: {error}", file=sys.stderr)
    sys.exit(2)
"""


class Toy(nn.Module):
    """A model with all kinds of parameters: an embedding, matrices that no number of processes
    divides, a filter, scales, a frozen layer, a matrix that two layers share, and a branch that
    only some rows use.
    """

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.frozen = nn.Linear(6, 6)
        self.wide = nn.Linear(6, 9)
        self.conv = nn.Conv1d(9, 5, 3, padding=1)
        self.branch = nn.Linear(5, 5)
        self.norm = nn.LayerNorm(5)
        self.head = nn.Linear(5, 11)
        self.tied = nn.Linear(5, 11, bias=False)
        self.tied.weight = self.head.weight
        linears = [nn.Linear(9, 9) for _ in range(3)]  # three equal matrices
        self.deep = nn.Sequential(*linears, nn.Dropout(0.2))
        self.thinker = SimpleNamespace(device=torch.device("cpu"))  # a stage asks for it

    def read(self, ids, uses_branch):
        """Logits [B, L, 11] by a method other than forward. uses_branch: of each row [B]."""
        hidden = torch.tanh(self.wide(self.frozen(self.embed(ids)))).mT
        hidden = self.conv(hidden).mT
        if uses_branch.any():
            hidden = hidden + uses_branch[:, None, None] * self.branch(hidden)
        hidden = self.norm(hidden)
        return self.head(hidden) + self.tied(hidden.roll(1, -1))


class ReadStage(Stage):
    """The next token. Every third batch has a loss of its own, and its first row, which only the
    first process computes, goes through the branch.
    """

    name = "read"
    trainable = ("embed.", "wide.", "conv.", "branch.", "norm.", "head.")

    def whole_batch(self, number):
        with_branch = number % 3 == 0
        uses_branch = torch.tensor([with_branch, False, False])
        return torch.randint(11, (3, 8)), uses_branch, with_branch

    def losses(self, batch):
        ids, uses_branch, with_branch = batch
        logits = self.omni.read(ids, uses_branch)
        result = {"text": losses.next_token(logits[:, :-1], ids[:, 1:])}
        if with_branch:
            result["branch"] = 0.1 * losses.mean(logits.square())
        return result


class NoiseStage(Stage):
    """Some layers, dropout, and a head that belongs to the stage; the losses add noise."""

    name = "noise"
    trainable = ("deep.", "wide.")

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.word_head = nn.Linear(9, 4).to(self.omni.wide.weight.dtype)

    def parameters(self):
        head = {f"word_head.{name}": p for name, p in self.word_head.named_parameters()}
        return super().parameters() | head

    def whole_batch(self, number):
        return torch.randn(5, 6), torch.randn(5, 6)

    def losses(self, batch):
        clean, noise = batch
        inputs = (clean + 0.1 * noise).to(self.omni.wide.weight.dtype)
        hidden = torch.relu(self.omni.deep(self.omni.wide(inputs)))
        return {"noise": losses.mean(self.word_head(hidden).square())}


TOYS = {"read": ReadStage, "noise": NoiseStage}
TOY_ROWS = {"read": 3, "noise": 5}
# Two processes add in another order, which changes the last digits of a sum. AdamW divides a
# gradient by its own size, so where it is nearly zero, few digits of a step are right in fp32. A
# small learning rate keeps those steps small.
STAGE_LR = defaultdict(lambda: 1e-3, vocoder=2e-5)


def make_stage(name: str, cache: str, dtype: torch.dtype, accumulate: int) -> Stage:
    """A toy stage, or one of the package."""
    torch.manual_seed(3)
    recipe = {"accumulate": accumulate, "weight_decay": 0.1}
    if name in TOYS:
        stage = TOYS[name](
            Toy().to(dtype), Recipe(4, TOY_ROWS[name], 2e-3, warmup=2, **recipe), Path(cache), 0
        )
    else:
        import training

        training.CACHE = Path(cache)
        DPOStage.preference_pairs = pairs_of_recordings
        with distributed.first_goes_first():
            stage = stage_of(name, batch=3, steps=3, lr=STAGE_LR[name], **recipe)
        for module in vars(stage).values():
            if isinstance(module, nn.Module):
                module.to(dtype)
        original = stage.batch
        stage.batch = lambda number: to_dtype(original(number), dtype)
        if name == "vocoder":  # its discriminators join in the second step
            stage.batch = lambda number: (original(number)[0], number >= accumulate)
    stage.bf16 = False
    stage.preview_text = lambda: ""
    return stage


def pairs_of_recordings(stage: DPOStage) -> list:
    """Recorded codes as chosen samples, reversed ones as rejected: an untrained Talker speaks until
    it is cut off, which is slow.
    """
    return [(example, example.codes, example.codes.flip(0)) for example in stage.examples[:6]]


def to_dtype(batch, dtype: torch.dtype):
    """A batch with its floating-point tensors in a precision."""
    convert = lambda x: x.to(dtype) if torch.is_tensor(x) and x.is_floating_point() else x  # noqa: E731
    return tree_map(convert, batch)


def run(
    name: str,
    folder: str,
    cache: str = "",
    dtype: str = "float64",
    until: int | None = None,
    resume: bool = False,
    accumulate: int = 2,
    kill_at: int | None = None,
    full_at: int | None = None,
    steps_of_second: int | None = None,
    seed_of_second: int | None = None,
) -> None:
    """Train the few steps of a stage; the losses and the norm of the gradients of each step go to
    history.json and norms.json in the folder.

    kill_at: the step at which the second process ends by SIGKILL. full_at: the step from which on
    no file can grow. steps_of_second: in the recipe of the second process. seed_of_second: the seed
    of its batches.
    """
    stage = make_stage(name, cache, getattr(torch, dtype), accumulate)
    history = []
    norms = []
    forward_backward = loop.forward_backward

    def recorded(stage, step, batches=None):
        if step == kill_at and not distributed.is_first():
            os.kill(os.getpid(), 9)
        if step == full_at:
            import resource

            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        history.append(forward_backward(stage, step, batches))
        norms.append(norm_of_gradients(stage))
        return history[-1]

    if not distributed.is_first() and steps_of_second:
        stage.recipe = replace(stage.recipe, steps=steps_of_second)
    if not distributed.is_first() and seed_of_second:
        stage.seed = seed_of_second
    loop.forward_backward = recorded
    try:
        train(stage, Path(folder), resume=resume, until=until, progress=False)
    finally:
        loop.forward_backward = forward_backward
    assert all(type(p) is nn.Parameter for p in stage.omni.parameters())
    assert name not in TOYS or stage.omni.tied.weight is stage.omni.head.weight
    if distributed.is_first():
        Path(folder, "history.json").write_text(json.dumps(history))
        Path(folder, "norms.json").write_text(json.dumps(norms))


def norm_of_gradients(stage: Stage) -> float:
    """AdamW and Muon hardly see a factor of all gradients, so a test of weights would miss it."""
    norm = nn.utils.clip_grad_norm_(stage.parameters().values(), float("inf"))
    return float(norm.full_tensor() if distributed.is_sharded(norm) else norm)


def launch(count: int, *runs: dict) -> list[tuple[int, str]]:
    """Run run() with each of the arguments in several processes -> exit code and stderr of each."""
    paths = [str(ROOT / "tests"), str(ROOT / "tests/train")]
    code = f"import sys; sys.path[:0] = {paths}{CODE}"
    return [(end, errors) for end, _, errors in launch_code(count, code, [json.dumps(runs)], ROOT)]


def launch_code(
    count: int, code: str, arguments: list[str], folder: Path
) -> list[tuple[int, str, str]]:
    """Run code in several processes in a folder, with the store and the environment that torchrun
    gives them -> exit code, stdout and stderr of each.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    started = []
    for rank in range(count):
        environment = {
            **os.environ,
            "TORCHELASTIC_RUN_ID": "test",
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "OMP_NUM_THREADS": "1",
        }
        started.append(forked.start(code, arguments, folder, environment))
    ends = []
    for process in started:
        out, errors = process.communicate()
        ends.append((process.returncode, out, errors))
    return ends


def differences(one: Path, two: Path, name: str) -> tuple[float, float]:
    """Largest differences of the losses of two runs, and of their weights."""
    histories = [json.loads((folder / "history.json").read_text()) for folder in (one, two)]
    of_losses = []
    for first, second in zip(*histories, strict=True):
        assert first.keys() == second.keys()
        of_losses += [abs(first[key] - second[key]) for key in first]
    weights = [load_file(folder / f"{name}.safetensors") for folder in (one, two)]
    assert weights[0].keys() == weights[1].keys()
    tensors = []
    for key, value in weights[0].items():
        difference = (value - weights[1][key]).abs()
        if value.dtype == torch.float32:
            difference = without_key_bias(key, difference)
        tensors.append(float(difference.max()))
    return max(of_losses), max(tensors)


def without_key_bias(name: str, values: torch.Tensor) -> torch.Tensor:
    """The softmax hardly depends on a bias of all keys. Its gradient is nearly rounding error, and
    AdamW divides it by its own size: in fp32 it has no digit that is right.
    """
    if name.endswith("qkv.bias"):
        query, key, value = values.chunk(3)
        return torch.cat([query, value])
    return torch.zeros(1) if name.endswith("k_proj.bias") else values


@pytest.fixture(autouse=True)
def full_precision(monkeypatch):
    """Where a processor multiplies bf16, the last bit of a sum would be visible."""
    monkeypatch.setattr("minomni.train.loop.has_bf16", lambda device: False)
    monkeypatch.setattr("minomni.train.muon.has_bf16", lambda device: False)


# Two processes are one: AdamW for embeddings, heads and scales, Muon for matrices and the filter.
# Three rows of one batch and five of the other: the second process has fewer.
CASES = [
    {"name": "read", "dtype": "float64"},
    {"name": "read", "dtype": "float32"},
    {"name": "read", "dtype": "float64", "accumulate": 3},
    {"name": "read", "dtype": "float64", "accumulate": 1},
    {"name": "noise", "dtype": "float64"},
    {"name": "noise", "dtype": "float32"},
]


def check_equal(cases: list[dict], tmp_path: Path, count: int = 2) -> None:
    """Several processes and one have the same losses and weights in each case."""
    pairs = []
    runs = []
    for i, case in enumerate(cases):
        one, two = tmp_path / f"one{i}", tmp_path / f"two{i}"
        case = {**case, "cache": str(tmp_path / "cache")}
        run(**case, folder=str(one))
        runs.append({**case, "folder": str(two)})
        pairs.append((one, two, case))
    assert launch(count, *runs) == [(0, "")] * count
    for one, two, case in pairs:
        of_losses, weights = differences(one, two, case["name"])
        tolerance = {"float64": 1e-8, "float32": 1e-6}[case["dtype"]]
        assert of_losses < tolerance, case
        assert weights < tolerance, case
        norms = [json.loads((folder / "norms.json").read_text()) for folder in (one, two)]
        assert norms[0] == pytest.approx(norms[1], rel=10 * tolerance), case


def test_two_processes_are_one(tmp_path):
    check_equal(CASES, tmp_path)


@pytest.mark.slow
def test_three_processes_are_one(tmp_path):
    """A row for each; of five rows of a matrix the last process holds one."""
    check_equal([CASES[0], CASES[4]], tmp_path, count=3)


# Stages of the package, which call methods of the model other than forward.
STAGES = [
    {"name": "codec", "dtype": "float64"},
    {"name": "codec", "dtype": "float32"},
    {"name": "language", "dtype": "float64"},
    {"name": "language", "dtype": "float32"},
    {"name": "dit", "dtype": "float64", "accumulate": 1},
    {"name": "audio_align", "dtype": "float64", "accumulate": 1},
    {"name": "vision_align", "dtype": "float64", "accumulate": 1},
    {"name": "chat", "dtype": "float64", "accumulate": 1},
    {"name": "talker", "dtype": "float64", "accumulate": 1},
    {"name": "dpo", "dtype": "float64", "accumulate": 1},
]


@pytest.mark.slow
def test_two_processes_are_one_in_stages_of_the_package(tmp_path):
    check_equal(STAGES, tmp_path)


@pytest.mark.slow
def test_two_processes_train_a_vocoder_and_its_discriminators(tmp_path):
    """Its losses are near 4, of which fp32 has six digits after the point. Its weights are not
    compared: some gradients of its activations are rounding errors, which AdamW scales up.
    """
    case = {"name": "vocoder", "dtype": "float32", "cache": str(tmp_path / "cache")}
    run(**case, folder=str(tmp_path / "one"))
    assert launch(2, {**case, "folder": str(tmp_path / "two")}) == [(0, "")] * 2
    histories = [
        json.loads((tmp_path / name / "history.json").read_text()) for name in ("one", "two")
    ]
    for one, two in zip(*histories, strict=True):
        assert two == pytest.approx(one, abs=1e-5)
    assert "discrimination" not in histories[0][0]
    assert "discrimination" in histories[0][1]


def test_a_branch_that_no_batch_uses_stays_as_it_is(tmp_path):
    """Its gradients are zeros with FSDP, and weight decay would shrink it."""
    run_of = {"name": "read", "folder": str(tmp_path), "accumulate": 1, "resume": True}
    states = []
    for until in (1, 2):  # the first batch uses it, the second does not
        assert launch(2, {**run_of, "until": until}) == [(0, ""), (0, "")]
        states.append(torch.load(tmp_path / "read.resume.pt", weights_only=True)["parameters"])
    before = make_stage("read", "", torch.float64, 1).omni.branch.weight
    assert not torch.equal(states[0]["branch.weight"], before)
    assert torch.equal(states[0]["branch.weight"], states[1]["branch.weight"])
    assert not torch.equal(states[0]["wide.weight"], states[1]["wide.weight"])


def test_resume_with_another_number_of_processes(tmp_path):
    """One, two and one again, against one alone; two and two again, to the bit."""
    whole = {"name": "read", "folder": str(tmp_path / "whole")}
    moved = {"name": "read", "folder": str(tmp_path / "moved"), "resume": True}
    run(**whole)
    run(**moved, until=1)
    twice = {"name": "read", "folder": str(tmp_path / "twice"), "resume": True}
    runs = [{**moved, "until": 2}, {**whole, "folder": str(tmp_path / "two")}]
    runs += [{**twice, "until": 2}, twice]
    assert launch(2, *runs) == [(0, ""), (0, "")]
    run(**moved, until=3)
    run(**moved)
    last = json.loads((tmp_path / "whole" / "history.json").read_text())[-1]
    moved_last = json.loads((tmp_path / "moved" / "history.json").read_text())[-1]
    assert moved_last == pytest.approx(last, abs=1e-8)
    results = {f: load_file(tmp_path / f / "read.safetensors") for f in ("whole", "moved")}
    for key, value in results["whole"].items():
        assert torch.allclose(value, results["moved"][key], rtol=0, atol=1e-8)
    files = [(tmp_path / f / "read.safetensors").read_bytes() for f in ("two", "twice")]
    assert files[0] == files[1]


def test_a_killed_process_ends_the_run_with_one_line(tmp_path):
    killed = {"name": "read", "folder": str(tmp_path), "kill_at": 2}
    (first, errors), (second, _) = launch(2, killed)
    assert (first, second) == (2, -9)
    assert re.fullmatch(r"minomni: the connection to another process .* is lost \(.*\n", errors)
    check_resume(tmp_path, 2)


def test_a_full_disk_ends_the_run_with_one_line(tmp_path):
    """Only the first process writes, so only it notices."""
    pytest.importorskip("resource", reason="this system has no file size limits")
    full = {"name": "read", "folder": str(tmp_path), "full_at": 2}
    (first, errors), (second, no_errors) = launch(2, full)
    assert (first, second) == (2, 2)
    assert re.fullmatch(r"minomni: .*read.resume.pt: cannot be written .* --resume, .*\n", errors)
    assert no_errors == ""
    check_resume(tmp_path, 2)


def check_resume(folder: Path, step: int) -> None:
    """The last checkpoint is of a step, and one process goes on from it to the end of a whole
    run.
    """
    assert torch.load(folder / "read.resume.pt", weights_only=True)["step"] == step
    run("read", str(folder), resume=True)
    run("read", str(folder / "whole"))
    ends = [load_file(path / "read.safetensors") for path in (folder, folder / "whole")]
    for name, tensor in ends[0].items():
        assert torch.allclose(tensor, ends[1][name], rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    ("option", "different"), [("steps_of_second", "recipes"), ("seed_of_second", "seeds")]
)
def test_an_error_of_all_processes_is_one_line(option, different, tmp_path):
    """The second process has another recipe, as with another settings file, or another seed."""
    (first, errors), (second, more) = launch(
        2, {"name": "read", "folder": str(tmp_path), option: 5}
    )
    assert (first, second) == (2, 2)
    line = rf"minomni: the processes of this run have different {different}; .*\n"
    assert re.fullmatch(line, errors + more)


def test_rows_of_a_batch(monkeypatch):
    """Each row is computed once, other parts by all; fewer rows than processes are refused."""
    batch = (torch.arange(5), list("abcde"), 0.5, torch.tensor(7))
    assert distributed.own_rows(batch) is batch
    for count in (2, 3, 5):
        monkeypatch.setattr(distributed, "world", lambda count=count: count)
        numbers = []
        letters = []
        for rank in range(count):
            monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
            rows = distributed.own_rows(batch)
            assert rows[0].tolist() == list(range(rank, 5, count))
            assert rows[2:] == batch[2:]
            numbers += rows[0].tolist()
            letters += rows[1]
        assert sorted(numbers) == list(range(5))
        assert sorted(letters) == list("abcde")
    monkeypatch.setattr(distributed, "world", lambda: 6)
    with pytest.raises(UserError, match="a batch has 5 rows, too few for 6 processes"):
        distributed.own_rows(batch)


@pytest.mark.parametrize(
    ("device", "says"),
    [
        ("mps", "torchrun trains on cuda and cpu"),
        ("cuda", "2 processes for 1 GPUs; give it --nproc"),
    ],
)
def test_devices_that_are_refused(device, says, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match=says):
        processes.join(device)
