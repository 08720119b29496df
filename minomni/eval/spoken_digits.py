"""Real people: does a Thinker raised on a synthesiser understand speakers that it has never heard?

Spoken digits of the free-spoken-digit-dataset, one speaker left out at a time: the others tune the
ears and the decoder, the one left out asks "which digit do you hear". One recipe serves all of
them.
"""

from collections import defaultdict
from dataclasses import replace
from math import exp
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import soxr
import torch
from torch import Tensor
from torch.nn import functional as F

from minomni import load
from minomni.data import text_to_speech
from minomni.data.corpus import corpus
from minomni.data.examples import append_answer
from minomni.data.grammar import NUMBERS
from minomni.data.jsonl import DIGIT_NAME, WHICH_DIGIT, digit_files
from minomni.errors import UserError
from minomni.inputs.media import load_audio
from minomni.inputs.mel import HOP, log_mel
from minomni.inputs.prompt import Inputs, Processor, join
from minomni.train import losses
from minomni.train.loop import Recipe, Stage, train
from minomni.train.stages.alignment import word_log_probs

RECIPE = Recipe(steps=800, batch=32, lr=3e-3, warmup=20)
CROWDED = 0.4  # share of synthetic voices in a batch
ANSWERED = (
    8  # of a batch's clips are answered in words too: the ears need more lessons than the decoder
)
WARP, EQUALISE, STRETCH, HURRY = 0.15, 0.3, 0.5, 0.3  # how far augment() goes
BLURS = 1, 1, 3, 5, 7, 9  # widths in bands, of which augment() draws one
LEVELLED = 0.8  # share of a clip's own level that band_normalized() takes away
QUIET = 1600  # samples (100 ms) of silence around a recording: many are cut within the first sound
RANGE = 2.0  # log_mel's units from a clip's loudest point to its floor (80 dB)


def recordings_by_speaker(folder: Path) -> dict[str, list[Path]]:
    """The recordings of every speaker in a folder. Raises UserError for fewer than two speakers."""
    files = defaultdict(list)
    for path in digit_files(folder):
        files[DIGIT_NAME.fullmatch(path.name)[2]].append(path)
    if len(files) < 2:
        raise UserError(
            f"{folder}: recordings of {len(files)} speakers; leaving one out takes at least two"
        )
    return dict(files)


def check_recordings(folder: Path) -> None:
    """Open every recording once. Raises UserError for what clips_by_speaker() would stop at."""
    for files in recordings_by_speaker(folder).values():
        for path in files:
            load_audio(path)


def clips_by_speaker(folder: Path) -> dict[str, list[tuple[Tensor, int]]]:
    """Log-mels [128, F] and digits of every recording, by speaker. Raises UserError for fewer than
    two speakers.
    """
    return {
        speaker: [
            (log_mel(F.pad(load_audio(path), (QUIET, QUIET))), int(path.name[0])) for path in files
        ]
        for speaker, files in recordings_by_speaker(folder).items()
    }


def random_curve(size: int, spread: float, knots: int, random: Random) -> Tensor:
    """A smooth curve of chance [size] between -spread and spread."""
    heights = torch.tensor([[[random.uniform(-spread, spread) for _ in range(knots)]]])
    return F.interpolate(heights, size=size, mode="linear", align_corners=True)[0, 0]


def resample(x: Tensor, places: Tensor) -> Tensor:
    """Values of x [..., n] at real-valued places [m] between 0 and n - 1 -> [..., m]."""
    below = places.long().clamp(0, x.shape[-1] - 1)
    above = (below + 1).clamp(max=x.shape[-1] - 1)
    return torch.lerp(x[..., below], x[..., above], places - below)


def band_levels(mels: list[Tensor]) -> Tensor:
    """Mean of every band over all frames of log-mels [128, F] -> [128, 1]."""
    return torch.cat(mels, dim=1).mean(1, keepdim=True)


def band_normalized(mel: Tensor, levels: Tensor) -> Tensor:
    """A log-mel [128, F] with its bands drawn to `levels` [128, 1], by their means over the louder
    half of the frames.

    What a throat and a microphone add to everything is mostly gone then: cepstral mean subtraction,
    told of bands.
    """
    loudness = mel.mean(0)
    own = mel[:, loudness >= loudness.median()].mean(1, keepdim=True)  # [128, 1]
    return mel + LEVELLED * (levels - own)


def smooth_bands(mel: Tensor, width: int) -> Tensor:
    """Every band of a log-mel [128, F] as the mean of the `width` (odd) around it: formants stay,
    the pitch goes.
    """
    return F.avg_pool1d(F.pad(mel.T, (width // 2, width // 2), mode="replicate"), width, stride=1).T


def augment(mel: Tensor, random: Random) -> Tensor:
    """A log-mel [128, F] as another throat, another pace, another microphone and another room would
    have it.
    """
    mel = smooth_bands(mel, random.choice(BLURS))
    bands, frames = mel.shape
    throat = (torch.arange(bands) * (1 + random.uniform(-WARP, WARP))).clamp(max=bands - 1)
    mel = resample(mel.T, throat).T  # formants move
    hurry = (
        random_curve(
            max(8, round(frames * exp(random.uniform(-STRETCH, STRETCH)))), HURRY, 5, random
        )
        .exp()
        .cumsum(0)
    )
    mel = resample(
        mel, (hurry - hurry[0]) / (hurry[-1] - hurry[0]) * (frames - 1)
    )  # some parts faster than others
    mel = F.pad(mel, (random.randint(0, 10), random.randint(0, 10)), value=float(mel.min()))
    mel = mel + random_curve(bands, EQUALISE, 6, random)[:, None]
    if (
        random.random() < 0.8
    ):  # noise fills what is quieter than it; a factor of ten is a quarter of a unit
        level = (
            mel.max()
            - RANGE
            + random.uniform(0, 0.6 * RANGE)
            + random_curve(bands, 0.25, 4, random)[:, None]
        )
        noise = level + 0.12 * torch.randn(
            mel.shape, generator=torch.Generator().manual_seed(random.getrandbits(48))
        )
        mel = torch.logaddexp(mel * 9.2, noise * 9.2) / 9.2
    return mel.clamp(min=float(mel.max()) - RANGE) + random.uniform(-0.4, 0.1)


class DigitsStage(Stage):
    """The ears point at the word they hear (as in their first lessons), and the decoder answers the
    question.
    """

    name = "digits"
    learns = (
        "thinker.audio_tower.",
        "thinker.model.layers.",
        "thinker.model.norm.",
        "thinker.lm_head.",
    )

    def __init__(self, omni, recipe: Recipe, cache: Path, seed: int, people: list, crowd: list):
        """people and crowd: (log-mel [128, F], digit) pairs of real and of synthetic speakers."""
        super().__init__(omni, recipe, cache, seed)
        self.people, self.crowd, self.tokens = people, crowd, omni.config.thinker.tokens
        self.levels = band_levels([mel for mel, _ in people])
        self.processor, encode = Processor(omni.config, omni.tokenizer), omni.tokenizer.encode
        self.words = [
            torch.tensor(encode(f" {number}")) + 1 for number in NUMBERS
        ]  # class 0 is silence
        self.answers = [encode(answer(digit)) + [self.tokens.im_end] for digit in range(10)]

    def batch(self, step):
        random = Random(f"{self.seed}-digits-{step}")
        many = round(self.recipe.batch * CROWDED) if self.crowd else 0
        chosen = random.choices(self.people, k=self.recipe.batch - many)
        chosen += random.choices(self.crowd, k=many) if many else []
        random.shuffle(chosen)
        return [band_normalized(augment(mel, random), self.levels) for mel, _ in chosen], [
            digit for _, digit in chosen
        ]

    def losses(self, batch):
        mels, digits = batch
        heard = word_log_probs(self.omni.thinker, mels, self.omni.thinker.audio_tower(mels))
        ctc = losses.ctc(*heard, [self.words[digit] for digit in digits])
        prompts = [question(mel, self.processor) for mel in mels[:ANSWERED]]
        inputs, targets = append_answer(
            prompts, [self.answers[digit] for digit in digits[:ANSWERED]], self.tokens.endoftext
        )
        return {"ctc": ctc, "text": losses.next_token(self.omni.thinker(inputs), targets)}


def answer(digit: int) -> str:
    """What is right to say."""
    return f"the digit is {NUMBERS[digit]}"


def question(mel: Tensor, processor: Processor) -> Inputs:
    """The prompt about a clip that is given as its log-mel [128, F]."""
    silence = torch.zeros(mel.shape[1] * HOP)  # takes as many places
    content = [{"type": "audio", "audio": silence}, {"type": "text", "text": WHICH_DIGIT}]
    return replace(processor([[{"role": "user", "content": content}]]), mels=[mel])


@torch.no_grad()
def count_correct(omni, clips: list[tuple[Tensor, int]], batch: int = 50) -> int:
    """How many clips are answered right to the letter."""
    processor, texts = Processor(omni.config, omni.tokenizer), []
    for begin in range(0, len(clips), batch):
        prompts = [question(mel, processor) for mel, _ in clips[begin : begin + batch]]
        inputs = join(prompts, omni.config.thinker.tokens.endoftext)
        reply = omni.thinker.generate(inputs, omni.config.thinker_sampling)
        texts += [omni.tokenizer.decode(row, skip_special=True) for row in reply.tokens]
    return sum(text == answer(digit) for text, (_, digit) in zip(texts, clips))


def synthetic_speakers(cache: Path) -> list[tuple[Tensor, int]]:
    """Log-mels and digits of synthetic voices, without what is above 4 kHz, where the real
    recordings end as well.

    None without the synthesiser.
    """
    if not text_to_speech.available():
        return []
    speech, clips = corpus("digits", cache), []
    for i, utterance in enumerate(speech.utterances):
        narrow = soxr.resample(soxr.resample(speech.wave(i).numpy(), 2, 1), 1, 2)
        clips.append((log_mel(torch.from_numpy(narrow)), NUMBERS.index(utterance.text)))
    return clips


def leave_one_out(
    model: str, folder: Path, cache: Path, seed: int = 0
) -> dict[str, tuple[int, int]]:
    """For every speaker of a folder, how many recordings a model tuned on all others answers right,
    and of how many.
    """
    clips, others, scores = clips_by_speaker(folder), synthetic_speakers(cache), {}
    for speaker, held in clips.items():
        omni = load(model, dtype=torch.float32)  # whatever the folder stores: it is to be trained
        heard = [clip for name in clips if name != speaker for clip in clips[name]]
        torch.manual_seed(seed)
        stage = DigitsStage(omni, RECIPE, cache, seed, heard, others)
        with TemporaryDirectory() as run:
            train(stage, Path(run))
        asked = [(band_normalized(mel, stage.levels), digit) for mel, digit in held]
        scores[speaker] = count_correct(omni.eval(), asked), len(held)
    return scores
