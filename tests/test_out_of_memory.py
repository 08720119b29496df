"""Memory that runs out in the middle of a load or of an answer: one line, and memory is given back.

No GPU is needed. An allocator with a limit refuses the tensor that would exceed it, with the error
that CUDA raises.
"""

import gc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from live_bytes import Limited
from torch import nn

import minomni
from minomni.devices import is_out_of_memory, memory_errors
from minomni.errors import OutOfMemory
from minomni.train import finetune, pipeline, train_encoder
from minomni.train.loop import Recipe, Stage, train

DATA = Path(__file__).parents[1] / "data_samples"
CPU_ERROR = (
    "[enforce fail at alloc_cpu.cpp:125] err == 0. DefaultCPUAllocator: can't allocate memory: you "
    "tried to allocate 4000000000000 bytes. Error code 12 (Cannot allocate memory)"
)
MESSAGES = [
    {
        "role": "user",
        "content": [
            {"type": "image", "image": str(DATA / "scene.png")},
            {"type": "audio", "audio": str(DATA / "question.wav")},
        ],
    }
]


@pytest.fixture(scope="module")
def omni(tiny_folder):
    return minomni.load(tiny_folder)


def fill_session(omni):
    session = omni.listen()
    session.add_image(DATA / "scene.png")
    session.add_audio(np.random.default_rng(0).normal(0, 0.1, 48_000).astype(np.float32))
    return list(session.respond("where", talker_max_new_tokens=60))


ANSWERS = {
    "respond": lambda omni: omni.respond(MESSAGES),
    "respond, a batch": lambda omni: omni.respond([MESSAGES, MESSAGES]),
    "stream": lambda omni: list(omni.stream(MESSAGES)),
    "session": fill_session,
}


def run_within(limit: float, run) -> tuple[str, int]:
    """-> the error's line, "" where there is none, and the bytes that are live afterwards."""
    message = ""
    with Limited(limit) as memory:
        try:
            run()
        except OutOfMemory as error:
            message = str(error)
        return message, memory.live


def peak_of(run) -> int:
    with Limited() as memory:
        run()
    return memory.peak


# The prompt's encoders, its prefill, the steps of the answer, and its sound fail at different
# shares of the memory that the whole answer takes.
@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.95])
@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_that_does_not_fit_is_one_line(omni, name, share):
    def run():
        return ANSWERS[name](omni)

    expected = omni.respond(MESSAGES)
    gc.collect()  # of earlier tests
    gc.disable()  # nothing waits for the garbage collector
    try:
        message, live = run_within(share * peak_of(run), run)
    finally:
        gc.enable()
    assert message.startswith("CUDA out of memory. Tried to allocate")
    assert "max_new_tokens" in message
    assert "--quantize" in message
    assert "\n" not in message
    assert len(message) <= 500
    assert live == 0
    again = omni.respond(MESSAGES)
    assert again.text == expected.text
    assert torch.equal(again.wave, expected.wave)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_load_that_does_not_fit_is_one_line(tiny_folder, share):
    def run():
        return minomni.load(tiny_folder, dtype="float64")  # another precision: each is copied

    gc.collect()
    gc.disable()
    try:
        message, live = run_within(share * peak_of(run), run)
    finally:
        gc.enable()
    assert message.startswith("CUDA out of memory.")
    assert "--quantize" in message
    assert "--parts" in message
    assert live == 0


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError(CPU_ERROR),
        RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB)."),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has"),
    ],
)
def test_errors_of_each_device(error):
    assert is_out_of_memory(error)
    with (
        pytest.raises(OutOfMemory, match=r"^[^;]*; do this$") as caught,
        memory_errors("do this"),
    ):
        raise error
    assert str(caught.value).count("out of memory") == 1


def fail() -> None:
    """An error whose frame holds the error itself, a cycle, and a tensor."""
    kept = torch.zeros(1000)
    error = ValueError(f"{len(kept)} numbers")
    raise error


def run_out(is_cause: bool) -> None:
    """Run out of memory while another error is handled, or because of it."""
    try:
        fail()
    except ValueError as error:
        if is_cause:
            raise MemoryError from error
        torch.zeros(10**15)


@pytest.mark.parametrize("is_cause", [False, True])
def test_tensors_of_the_errors_before_it_are_released_too(is_cause):
    def run():
        with memory_errors("do this"):
            run_out(is_cause)

    gc.collect()
    gc.disable()
    try:
        message, live = run_within(1e9, run)
    finally:
        gc.enable()
    assert message.endswith("; do this")
    assert live == 0


class Squares(Stage):
    """A linear map of rows, so many that their products do not fit."""

    name = "squares"
    trainable = ("0.",)
    bf16 = False

    def whole_batch(self, number):
        return torch.ones(1000, 8)

    def losses(self, batch):
        return {"square": self.omni(batch).square().mean()}


def test_training_that_does_not_fit_is_one_line(tmp_path):
    def run():
        model = nn.Sequential(nn.Linear(8, 8))
        model.thinker = SimpleNamespace(device=torch.device("cpu"))  # a stage asks for it
        recipe = Recipe(steps=2, batch=1000, lr=1e-3)
        with memory_errors("do this"):
            train(Squares(model, recipe, tmp_path, 0), tmp_path, progress=False)

    gc.collect()
    gc.disable()
    try:
        message, live = run_within(40_000, run)  # the batch fits, the products with it do not
    finally:
        gc.enable()
    assert message == "CUDA out of memory. Tried to allocate 32000 bytes.; do this"
    assert live == 0


def run_stage(folder: Path) -> None:
    pipeline.run_stage("codec", "tiny", folder, 0, resume=False)


def run_finetune(folder: Path) -> None:
    finetune.finetune("tiny", folder / "rows.jsonl", folder / "out", finetune.FinetuneOptions())


def run_train_encoder(folder: Path) -> None:
    train_encoder.train_encoder("tiny", folder / "out", train_encoder.EncoderOptions())


# What runs, the function in it that runs out of memory, an option that the message names.
TRAINING = [
    (run_stage, pipeline, "make_stage", "--set STAGE.batch=N"),
    (run_finetune, finetune, "load", "--lora r=16"),
    (run_train_encoder, train_encoder, "load", "--size tiny"),
]


@pytest.mark.parametrize(("run", "module", "function", "option"), TRAINING)
def test_each_command_that_trains_names_its_own_options(
    run, module, function, option, tmp_path, monkeypatch
):
    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(module, function, fail)
    (tmp_path / "stages").mkdir()
    (tmp_path / "rows.jsonl").write_text("")
    with pytest.raises(OutOfMemory) as caught:
        run(tmp_path)
    assert option in str(caught.value)
    assert len(str(caught.value)) <= 500


def test_other_errors_stay_as_they_are():
    error = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(RuntimeError) as caught, memory_errors("do this"):
        raise error
    assert caught.value is error
    assert error.__traceback__ is not None
