"""Does a Thinker trained on synthetic speech understand recordings of people?

Leave-one-speaker-out evaluation on the free-spoken-digit-dataset: fine-tune the audio encoder and
the decoder on all other speakers, then ask the model which digit it hears. All speakers share one
recipe.
"""

from collections import defaultdict
from dataclasses import replace
from math import exp
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import soxr
import torch
from torch import Tensor
from torch.nn import functional as F

from minomni import load
from minomni.data import text_to_speech
from minomni.data.batching import batched
from minomni.data.corpus import corpus
from minomni.data.examples import append_answer
from minomni.data.grammar import NUMBERS
from minomni.data.jsonl import DIGIT_NAME, WHICH_DIGIT, digit_files
from minomni.errors import UserError
from minomni.inputs.media import load_audio
from minomni.inputs.mel import HOP, log_mel
from minomni.inputs.prompt import Inputs, Processor, collate
from minomni.train import losses
from minomni.train.loop import Recipe, Stage, train
from minomni.train.stages.alignment import word_log_probs

if TYPE_CHECKING:
    from minomni.omni import Omni

RECIPE = Recipe(steps=800, batch=32, lr=3e-3, warmup=20)
SYNTHETIC_SHARE = 0.4  # fraction of synthetic voices in a batch
ANSWERED = 8  # clips of a batch with next-token loss; the encoder needs more examples than that
PADDING = 1600  # samples (100 ms) of silence around a recording; many are cut too tightly
NORMALIZATION = 0.8  # fraction of a clip's own band levels that band_normalized() removes

# Ranges of the augmentations, in units of log_mel: one unit is 40 dB.
RANGE = 2.0  # from a clip's maximum to its floor
NATURAL_LOG = 9.2  # natural logarithm of power per unit: 4 ln 10
SMOOTHING_WIDTHS = (1, 1, 3, 5, 7, 9)  # bands
FREQUENCY_WARP = 0.15  # largest relative shift of all bands
TIME_STRETCH = 0.5  # largest logarithm of the relative length
TEMPO_CHANGE = 0.3  # largest logarithm of the local tempo
SPECTRAL_TILT = 0.3
GAIN = (-0.4, 0.1)
NOISE_PROBABILITY = 0.8
NOISE_LEVEL = 0.6 * RANGE  # largest level above the floor
NOISE_TILT = 0.25
NOISE_STD = 0.12

Clip = tuple[Tensor, int]  # log-mel [128, F] and digit


# ----------------------------------------------------------------------------------------------
# recordings


def recordings_by_speaker(folder: Path) -> dict[str, list[Path]]:
    """Files of each speaker in a folder. Raises UserError for fewer than two speakers."""
    files = defaultdict(list)
    for path in digit_files(folder):
        name = DIGIT_NAME.fullmatch(path.name)
        assert name is not None  # digit_files() returns only such names
        files[name[2]].append(path)
    if len(files) < 2:
        raise UserError(
            f"{folder}: recordings of {len(files)} speakers; leaving one out takes at least two"
        )
    return dict(files)


def check_recordings(folder: Path) -> None:
    """Open every recording once. Raises UserError for what clips_by_speaker() would reject."""
    for files in recordings_by_speaker(folder).values():
        for path in files:
            load_audio(path)


def clips_by_speaker(folder: Path) -> dict[str, list[Clip]]:
    """Log-mels [128, F] and digits by speaker. Raises UserError for fewer than two speakers."""
    clips = {}
    for speaker, files in recordings_by_speaker(folder).items():
        clips[speaker] = [load_clip(path) for path in files]
    return clips


def load_clip(path: Path) -> Clip:
    """Log-mel [128, F] of a recording between silence, and the digit in its file name."""
    wave = F.pad(load_audio(path), (PADDING, PADDING))
    return log_mel(wave), int(path.name[0])


def synthetic_speakers(cache: Path) -> list[Clip]:
    """Log-mels and digits of synthetic voices, low-passed at 4 kHz like the recordings.

    Empty without the text-to-speech engine.
    """
    if not text_to_speech.available():
        return []
    speech = corpus("digits", cache)
    clips = []
    for i, utterance in enumerate(speech.utterances):
        narrowband = soxr.resample(speech.wave(i).numpy(), 2, 1)
        wave = soxr.resample(narrowband, 1, 2)
        clips.append((log_mel(torch.from_numpy(wave)), NUMBERS.index(utterance.text)))
    return clips


# ----------------------------------------------------------------------------------------------
# normalization


def band_levels(mels: list[Tensor]) -> Tensor:
    """Mean of each band over all frames of log-mels [128, F] -> [128, 1]."""
    return torch.cat(mels, dim=1).mean(1, keepdim=True)


def band_normalized(mel: Tensor, levels: Tensor) -> Tensor:
    """Shift the bands of a log-mel [128, F] toward `levels` [128, 1] -> [128, F].

    The level of a band is its mean over the louder half of the frames. This removes most of a
    speaker's and a microphone's average spectrum, as cepstral mean subtraction does.
    """
    loudness = mel.mean(0)
    loud = mel[:, loudness >= loudness.median()]
    own_levels = loud.mean(1, keepdim=True)  # [128, 1]
    return mel + NORMALIZATION * (levels - own_levels)


# ----------------------------------------------------------------------------------------------
# augmentations of log-mels [128, F]


def augment(mel: Tensor, random: Random) -> Tensor:
    """Vary speaker, tempo, microphone and room of a log-mel [128, F] -> [128, F']."""
    mel = smooth_bands(mel, random.choice(SMOOTHING_WIDTHS))
    mel = warp_frequency(mel, random)
    mel = warp_time(mel, random)
    mel = pad_silence(mel, random)
    mel = tilt_spectrum(mel, random)
    if random.random() < NOISE_PROBABILITY:
        mel = add_noise_floor(mel, random)
    mel = mel.clamp(min=float(mel.max()) - RANGE)
    return mel + random.uniform(*GAIN)


def smooth_bands(mel: Tensor, width: int) -> Tensor:
    """Average each band with its neighbors, `width` (odd) bands in all: removes the pitch."""
    margin = width // 2
    padded = F.pad(mel.T, (margin, margin), mode="replicate")
    return F.avg_pool1d(padded, width, stride=1).T


def warp_frequency(mel: Tensor, random: Random) -> Tensor:
    """Scale the frequency axis: another vocal tract length moves the formants."""
    bands = mel.shape[0]
    scale = 1 + random.uniform(-FREQUENCY_WARP, FREQUENCY_WARP)
    positions = (torch.arange(bands) * scale).clamp(max=bands - 1)
    return interpolate(mel.T, positions).T


def warp_time(mel: Tensor, random: Random) -> Tensor:
    """Change the length, and the tempo within it."""
    frames = mel.shape[1]
    stretch = exp(random.uniform(-TIME_STRETCH, TIME_STRETCH))
    length = max(8, round(frames * stretch))
    tempo = random_curve(length, TEMPO_CHANGE, 5, random).exp()
    time = tempo.cumsum(0)
    positions = (time - time[0]) / (time[-1] - time[0]) * (frames - 1)
    return interpolate(mel, positions)


def pad_silence(mel: Tensor, random: Random) -> Tensor:
    """Add up to 10 frames at the clip's minimum on either side."""
    before = random.randint(0, 10)
    after = random.randint(0, 10)
    return F.pad(mel, (before, after), value=float(mel.min()))


def tilt_spectrum(mel: Tensor, random: Random) -> Tensor:
    """Add a smooth random spectrum: another microphone."""
    return mel + random_curve(mel.shape[0], SPECTRAL_TILT, 6, random)[:, None]


def add_noise_floor(mel: Tensor, random: Random) -> Tensor:
    """Add stationary colored noise."""
    floor = mel.max() - RANGE
    level = floor + random.uniform(0, NOISE_LEVEL)
    spectrum = level + random_curve(mel.shape[0], NOISE_TILT, 4, random)[:, None]
    generator = torch.Generator().manual_seed(random.getrandbits(48))
    noise = spectrum + NOISE_STD * torch.randn(mel.shape, generator=generator)
    return torch.logaddexp(mel * NATURAL_LOG, noise * NATURAL_LOG) / NATURAL_LOG


def random_curve(size: int, spread: float, knots: int, random: Random) -> Tensor:
    """A random piecewise linear curve [size] with values between -spread and spread."""
    values = [random.uniform(-spread, spread) for _ in range(knots)]
    curve = F.interpolate(torch.tensor([[values]]), size=size, mode="linear", align_corners=True)
    return curve[0, 0]


def interpolate(x: Tensor, positions: Tensor) -> Tensor:
    """Values of x [..., n] at fractional positions [m] between 0 and n - 1 -> [..., m]."""
    last = x.shape[-1] - 1
    below = positions.long().clamp(0, last)
    above = (below + 1).clamp(max=last)
    return torch.lerp(x[..., below], x[..., above], positions - below)


# ----------------------------------------------------------------------------------------------
# fine-tuning and evaluation


class DigitsStage(Stage):
    """Fine-tuning on spoken digits: CTC for the audio encoder, next-token loss on the answers."""

    name = "digits"
    trainable = (
        "thinker.audio_tower.",
        "thinker.model.layers.",
        "thinker.model.norm.",
        "thinker.lm_head.",
    )

    def __init__(
        self,
        omni: "Omni",
        recipe: Recipe,
        cache: Path,
        seed: int,
        real: list[Clip],
        synthetic: list[Clip],
    ):
        """real and synthetic: clips of people and of synthetic voices."""
        super().__init__(omni, recipe, cache, seed)
        self.real = real
        self.synthetic = synthetic
        self.tokens = omni.config.thinker.tokens
        self.levels = band_levels([mel for mel, _ in real])
        tokenizer = omni.require_tokenizer()
        self.processor = Processor(omni.config, tokenizer)
        encode = tokenizer.encode
        # CTC classes: 0 is silence, i + 1 the token i.
        self.words = [torch.tensor(encode(f" {number}")) + 1 for number in NUMBERS]
        self.answers = [encode(answer(digit)) + [self.tokens.im_end] for digit in range(10)]

    def batch(self, number: int) -> tuple[list[Tensor], list[int]]:
        random = Random(f"{self.seed}-digits-{number}")
        synthetic = round(self.recipe.batch * SYNTHETIC_SHARE) if self.synthetic else 0
        clips = random.choices(self.real, k=self.recipe.batch - synthetic)
        if synthetic:
            clips += random.choices(self.synthetic, k=synthetic)
        random.shuffle(clips)
        mels = [band_normalized(augment(mel, random), self.levels) for mel, _ in clips]
        digits = [digit for _, digit in clips]
        return mels, digits

    def losses(self, batch: tuple[list[Tensor], list[int]]) -> dict[str, Tensor]:
        mels, digits = batch
        thinker = self.omni.thinker
        log_probs, counts = word_log_probs(thinker, mels, thinker.audio_tower(mels))
        ctc = losses.ctc(log_probs, counts, [self.words[digit] for digit in digits])

        # Next-token loss on the answers to a part of the clips.
        prompts = [question(mel, self.processor) for mel in mels[:ANSWERED]]
        answers = [self.answers[digit] for digit in digits[:ANSWERED]]
        inputs, targets = append_answer(prompts, answers, self.tokens.endoftext)
        return {"ctc": ctc, "text": losses.next_token(thinker(inputs), targets)}


def answer(digit: int) -> str:
    """The correct answer."""
    return f"the digit is {NUMBERS[digit]}"


def question(mel: Tensor, processor: Processor) -> Inputs:
    """The prompt about a clip, given as a log-mel [128, F]."""
    silence = torch.zeros(mel.shape[1] * HOP)  # as many audio tokens as the mel
    content = [{"type": "audio", "audio": silence}, {"type": "text", "text": WHICH_DIGIT}]
    return replace(processor([[{"role": "user", "content": content}]]), mels=[mel])


@torch.no_grad()
def count_correct(omni: "Omni", clips: list[Clip], batch: int = 50) -> int:
    """Number of clips whose answer is exactly right."""
    processor = Processor(omni.config, omni.require_tokenizer())
    texts = []
    for part in batched(clips, batch):
        prompts = [question(mel, processor) for mel, _ in part]
        inputs = collate(prompts, omni.config.thinker.tokens.endoftext)
        reply = omni.thinker.generate(inputs, omni.config.thinker_sampling)
        texts += [omni.decode(row) for row in reply.tokens]
    return sum(text == answer(digit) for text, (_, digit) in zip(texts, clips))


def leave_one_out(
    model: str, folder: Path, cache: Path, seed: int = 0, device: str = "cpu"
) -> dict[str, tuple[int, int]]:
    """Fine-tune on all other speakers and evaluate, for each speaker of a folder.

    -> (correct answers, recordings) by speaker.
    """
    clips = clips_by_speaker(folder)
    synthetic = synthetic_speakers(cache)
    scores = {}
    for speaker, held_out in clips.items():
        omni = load(model, device, torch.float32)  # fp32 for training, whatever the folder stores
        training = []
        for other, other_clips in clips.items():
            if other != speaker:
                training += other_clips

        torch.manual_seed(seed)
        stage = DigitsStage(omni, RECIPE, cache, seed, training, synthetic)
        with TemporaryDirectory() as run:
            train(stage, Path(run))

        test = [(band_normalized(mel, stage.levels), digit) for mel, digit in held_out]
        scores[speaker] = (count_correct(omni.eval(), test), len(held_out))
    return scores
