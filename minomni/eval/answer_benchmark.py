"""Loading a model and a few short answers: the memory that takes, and the speed here.

Each thing is done once, on small inputs, so that it ends in minutes for a model that barely fits.
"""

from itertools import pairwise
from statistics import median
from typing import Any

import torch

from minomni import load
from minomni.chat.generate import seeded_generator
from minomni.chat.reply import Timings
from minomni.errors import UserError
from minomni.eval.backends import FULL
from minomni.eval.benchmark_utils import Clock, Rows, copy_bandwidth, noise, peak_gib, weight_bytes
from minomni.omni import Omni

IMAGE_SIZE = 224  # pixels of the height and width
AUDIO_S = 2
TEXT_TOKENS = 12  # of the spoken answer
SPEECH_S = 1  # of speech, at most


def measure(model: str, device: torch.device, quantize: str | None = None) -> Rows:
    """Load a model, ask about a text, an image and audio, and let it speak.

    model, quantize: as in load(). Raises UserError for a model that does not speak.
    """
    clock = Clock(device)
    omni = load(model, device, quantize=quantize)
    rows: Rows = {"load_s": (clock.mark(), "seconds to load")}
    talker, token2wav = omni.require_speech()

    # Three questions: until the first token of the answer. The first one reads the files.
    contents = questions()
    for name, content in contents.items():
        clock = Clock(device)
        respond(omni, [content], speech=False, max_new_tokens=1)
        rows[f"{name}_s"] = (clock.mark(), f"from {name} alone to the first token of the answer")

    # All in one question, answered in text and speech.
    codes = SPEECH_S * token2wav.config.codes_per_second
    everything = list(contents.values())
    reply = respond(omni, everything, max_new_tokens=TEXT_TOKENS, talker_max_new_tokens=codes)
    text_s, code_s = step_seconds(reply.timings)
    decoding_s = reply.total_s - reply.timings.times["code"][-1]
    peak = peak_gib(device)

    # The limit of a step is the time to read its weights once.
    bandwidth = copy_bandwidth(device, FULL.probe_mib)
    thinker_bytes = weight_bytes(omni.thinker.model.layers, omni.thinker.lm_head)
    talker_bytes = weight_bytes(talker.model.layers, talker.codec_head)
    rows |= {
        "answer_s": (reply.total_s, "a question with all three, and a spoken answer"),
        "speech_s": (reply.seconds, "seconds of speech in that answer"),
        "tokens_per_s": (1 / text_s, "text tokens per second"),
        "tokens_per_s_limit": (bandwidth / thinker_bytes, "the same if a step only read weights"),
        "codes_per_s": (1 / code_s, "speech codes per second"),
        "codes_per_s_limit": (bandwidth / talker_bytes, "the same if a step only read weights"),
        "token2wav_s": (decoding_s / reply.seconds, "Token2Wav, for a second of speech"),
        "copy_gb_per_s": (bandwidth / 1e9, "bandwidth of a copy in memory, GB/s"),
    }
    if peak is not None:
        rows["peak_gib"] = (peak, "largest memory of all this, GiB")
    return rows


def questions() -> dict[str, dict[str, Any]]:
    """Content items of a question, by the row that they are measured in."""
    random = seeded_generator(0)
    pixels = torch.randint(256, (IMAGE_SIZE, IMAGE_SIZE, 3), generator=random).byte()
    wave = noise(AUDIO_S, random)
    return {
        "text": {"type": "text", "text": "What is this?"},
        "image": {"type": "image", "image": pixels.numpy()},
        "audio": {"type": "audio", "audio": wave.numpy()},
    }


def respond(omni: Omni, content: list[dict[str, Any]], **options: Any) -> Any:
    """The reply to one message of a user."""
    return omni.respond([{"role": "user", "content": content}], seed=0, **options)


def step_seconds(timings: Timings) -> tuple[float, float]:
    """Median seconds of a step of the Thinker and of a step of the Talker in one reply.

    Raises UserError for a reply of fewer than two tokens or codes.
    """
    if min(len(timings.times["text"]), len(timings.times["code"])) < 2:
        raise UserError("the model stopped at once; its steps cannot be timed")
    events = []
    for kind in ("text", "code"):
        for at_s in timings.times[kind]:
            events.append((at_s, kind))
    events.sort()
    steps: dict[str, list[float]] = {"text": [], "code": []}
    for (before_s, _), (after_s, kind) in pairwise(events):
        steps[kind].append(after_s - before_s)
    return median(steps["text"]), median(steps["code"])
