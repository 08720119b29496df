"""Memory that runs out in the middle of a load or of an answer: one line, and memory is given back.

No GPU is needed. An allocator with a limit refuses the tensor that would exceed it, with the error
that CUDA raises.
"""

import gc
from pathlib import Path

import numpy as np
import pytest
import torch
from live_bytes import Limited

import minomni
from minomni.devices import is_out_of_memory, memory_errors
from minomni.errors import OutOfMemory

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
    assert message.startswith("out of memory: CUDA out of memory. Tried to allocate")
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
    assert message.startswith("out of memory: CUDA out of memory.")
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
        pytest.raises(OutOfMemory, match=r"^out of memory: .*; do this$"),
        memory_errors("do this"),
    ):
        raise error


def test_other_errors_stay_as_they_are():
    error = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(RuntimeError) as caught, memory_errors("do this"):
        raise error
    assert caught.value is error
    assert error.__traceback__ is not None
