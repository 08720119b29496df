"""Speech for the generated world, by the espeak-ng synthesiser inside pip's `espeakng-loader`.

espeak-ng keeps state between utterances and seeds its breath noise from the clock, so a corpus is
cut into parts, each made in a fresh process, in a fixed order, with a fixed seed: then it is the
same, bit for bit, wherever the same version runs, on however many cores.
"""

import ctypes
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import soxr

from minomni.config import LISTENING_RATE
from minomni.errors import UserError

ESPEAK_RATE = 22_050  # Hz, what espeak-ng makes
SILENCE = 150  # of 32767: quieter samples at both ends are cut off
MARGIN = 640  # samples (40 ms) of quiet kept at both ends
PART = 500  # utterances that one process speaks


class Job(NamedTuple):
    """One utterance to speak."""

    text: str
    voice: str  # espeak-ng's name of it
    rate: int = 180  # words per minute
    pitch: int = 50  # espeak-ng's scale from 0 to 99


def synthesize(jobs: list[Job], seed: int) -> list[np.ndarray]:
    """Speak jobs, PART of them to a process -> int16 arrays [samples] at 16 kHz. Same jobs and
    seed, same samples.

    Raises UserError where the synthesiser is not installed or lacks a voice.
    """
    parts = [jobs[begin : begin + PART] for begin in range(0, len(jobs), PART)]
    with ThreadPoolExecutor(os.cpu_count()) as lanes:
        spoken = lanes.map(_in_fresh_process, parts, range(seed, seed + len(parts)))
        return [wave for part in spoken for wave in part]


def _in_fresh_process(jobs, seed):
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh_process:
        return fresh_process.submit(_speak_all, jobs, seed).result()


def available() -> bool:
    """Whether the synthesiser can be loaded on this machine."""
    try:
        import espeakng_loader
    except ImportError:
        return False
    return bool(espeakng_loader.get_library_path())


def _speak_all(jobs, seed):
    espeak, pieces = _start(seed)
    waves = []
    for job in jobs:
        pieces.clear()
        if espeak.espeak_SetVoiceByName(job.voice.encode()) != 0:
            raise UserError(f"espeak-ng has no voice {job.voice!r}")
        espeak.espeak_SetParameter(1, job.rate, 0)  # 1 = espeakRATE
        espeak.espeak_SetParameter(3, job.pitch, 0)  # 3 = espeakPITCH
        raw = job.text.encode()
        espeak.espeak_Synth(
            raw, len(raw) + 1, 0, 1, 0, 1, None, None
        )  # count in characters, text is UTF-8
        waves.append(_trim(np.concatenate(pieces)))
    return waves


def _start(seed):
    """Load the library, seed its noise and let its samples fall into a list."""
    if not available():
        raise UserError(
            "espeak-ng is not installed: pip install espeakng-loader, or train on data_samples/ alone"
        )
    import espeakng_loader

    espeak = ctypes.CDLL(espeakng_loader.get_library_path())
    # 2 = hand samples over, in the calling thread; espeak-ng's own thread would be asked every 20
    # ms if it is done
    if espeak.espeak_Initialize(2, 0, espeakng_loader.get_data_path().encode(), 0) < 0:
        raise UserError("espeak-ng did not start: its data folder is missing or of another version")
    pieces = []
    callback_type = ctypes.CFUNCTYPE(
        ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
    )

    def collect(samples, count, _events):
        if samples and count > 0:
            pieces.append(np.ctypeslib.as_array(samples, shape=(count,)).copy())
        return 0

    espeak.keep_alive = callback_type(collect)  # ctypes does not hold a reference itself
    espeak.espeak_SetSynthCallback(espeak.keep_alive)
    espeak.espeak_ng_SetRandSeed(ctypes.c_long(seed))
    return espeak, pieces


def _trim(samples):
    """Cut silence to a fixed margin, so that speech and text begin and end together -> int16 at 16
    kHz.
    """
    wave = soxr.resample(samples.astype(np.float32), ESPEAK_RATE, LISTENING_RATE)
    loud = np.flatnonzero(np.abs(wave) > SILENCE)
    wave = np.pad(wave[loud[0] : loud[-1] + 1], MARGIN)
    return np.clip(np.round(wave), -32768, 32767).astype(np.int16)
