"""Speech synthesis for the generated world.

The voice of a job chooses the synthesizer: `natural:NAME` is a voice of neural_tts, any other name
is one of espeak-ng, from pip's `espeakng-loader`.

espeak-ng keeps state between utterances and seeds its breath noise from the clock. So a corpus is
cut into parts, each made in a fresh process, in a fixed order, with a fixed seed. Then it is
bit-identical wherever the same version runs, on any number of cores. These processes import this
module, which therefore does without PyTorch: importing that takes longer than a short part.
"""

import ctypes
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import soxr

from minomni.config import INPUT_SAMPLE_RATE
from minomni.data import neural_tts
from minomni.errors import UserError

ESPEAK_RATE = 22_050  # Hz, espeak-ng's output
SILENT_SAMPLE = 150  # of 32767: quieter samples at both ends are cut off
MARGIN = 640  # samples (40 ms) of silence at both ends
PART = 500  # utterances per process
INT16 = (-32768, 32767)

# Constants of espeak-ng's speak_lib.h
AUDIO_OUTPUT_SYNCHRONOUS = 2
ESPEAK_RATE_PARAMETER = 1
ESPEAK_PITCH_PARAMETER = 3
POSITION_IN_CHARACTERS = 1
UTF8 = 1


class Job(NamedTuple):
    """One utterance to synthesize."""

    text: str
    voice: str  # espeak-ng's name of it, or "natural:" and a name in neural_tts.VOICES
    rate: int = 180  # words per minute
    pitch: int = 50  # espeak-ng's scale from 0 to 99


def synthesize(jobs: list[Job], seed: int) -> list[np.ndarray]:
    """Synthesize jobs, PART of them per process -> int16 arrays [samples] at 16 kHz.

    The same jobs and seed give the same samples. Raises UserError if the synthesizer is not
    installed or lacks a voice.
    """
    parts = [jobs[begin : begin + PART] for begin in range(0, len(jobs), PART)]
    seeds = range(seed, seed + len(parts))
    waves = []
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for part in threads.map(_in_fresh_process, parts, seeds):
            waves += part
    return waves


def _in_fresh_process(jobs: list[Job], seed: int) -> list[np.ndarray]:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh_process:
        return fresh_process.submit(_synthesize_part, jobs, seed).result()


def available() -> bool:
    """Whether espeak-ng can be loaded on this machine."""
    try:
        import espeakng_loader
    except ImportError:
        return False
    return bool(espeakng_loader.get_library_path())


def _synthesize_part(jobs: list[Job], seed: int) -> list[np.ndarray]:
    """Synthesize jobs in order, each by the synthesizer of its voice."""
    espeak = None  # loaded at its first job
    waves = []
    for job in jobs:
        if job.voice.startswith(neural_tts.PREFIX):
            wave = neural_tts.synthesize(job, seed)
        else:
            espeak = espeak or _load_espeak(seed)
            wave = _synthesize_by_espeak(job, *espeak)
        waves.append(_trim(wave))
    return waves


def _synthesize_by_espeak(job: Job, espeak: Any, chunks: list[np.ndarray]) -> np.ndarray:
    """Synthesize one utterance -> float32 [samples] at 16 kHz on the scale of int16, not trimmed.

    chunks: the list in which the library's callback collects samples. Raises UserError for an
    unknown voice.
    """
    chunks.clear()
    if espeak.espeak_SetVoiceByName(job.voice.encode()) != 0:
        raise UserError(f"espeak-ng has no voice {job.voice!r}")
    espeak.espeak_SetParameter(ESPEAK_RATE_PARAMETER, job.rate, 0)
    espeak.espeak_SetParameter(ESPEAK_PITCH_PARAMETER, job.pitch, 0)
    text = job.text.encode()
    size = len(text) + 1  # bytes, with the closing zero
    # Blocks until all samples have gone through the callback.
    espeak.espeak_Synth(text, size, 0, POSITION_IN_CHARACTERS, 0, UTF8, None, None)
    samples = np.concatenate(chunks)
    return soxr.resample(samples.astype(np.float32), ESPEAK_RATE, INPUT_SAMPLE_RATE)


def _load_espeak(seed: int) -> tuple[Any, list[np.ndarray]]:
    """Load the library and seed its noise -> the library, and the list that collects its samples.

    Raises UserError if it is not installed or does not start.
    """
    if not available():
        raise UserError(
            "espeak-ng is not installed: pip install espeakng-loader, "
            "or train on data_samples/ alone"
        )
    import espeakng_loader

    # Synchronous: the callback runs in this thread. With its own thread espeak-ng would have to be
    # polled every 20 ms.
    espeak: Any = ctypes.CDLL(espeakng_loader.get_library_path())
    data_path = espeakng_loader.get_data_path().encode()
    if espeak.espeak_Initialize(AUDIO_OUTPUT_SYNCHRONOUS, 0, data_path, 0) < 0:
        raise UserError("espeak-ng did not start: its data folder is missing or of another version")

    # The callback copies every chunk of samples into a list.
    chunks: list[np.ndarray] = []
    callback_type = ctypes.CFUNCTYPE(
        ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
    )

    def collect(samples, count, _events):
        if samples and count > 0:
            chunks.append(np.ctypeslib.as_array(samples, shape=(count,)).copy())
        return 0

    espeak.keep_alive = callback_type(collect)  # ctypes does not hold a reference itself
    espeak.espeak_SetSynthCallback(espeak.keep_alive)
    espeak.espeak_ng_SetRandSeed(ctypes.c_long(seed))
    return espeak, chunks


def _trim(wave: np.ndarray) -> np.ndarray:
    """Cut silence at both ends to a fixed margin -> int16 [samples].

    Then speech and text begin and end together.
    """
    loud = np.flatnonzero(np.abs(wave) > SILENT_SAMPLE)
    wave = np.pad(wave[loud[0] : loud[-1] + 1], MARGIN)
    return np.clip(np.round(wave), *INT16).astype(np.int16)
