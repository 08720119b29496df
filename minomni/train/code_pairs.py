"""Pairs of codes and their sound, which a model makes by itself: data to train an encoder on.

The Talker speaks texts, or codes are drawn at random, and Token2Wav turns the codes into sound.
Pairs can be made without end, from a folder without any recording.
"""

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import soxr
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from minomni.config import INPUT_SAMPLE_RATE
from minomni.data.batching import batched
from minomni.data.examples import append_answer
from minomni.data.grammar import framed_words, statement
from minomni.data.jsonl import JsonlRow, JsonlRows, prompt_inputs
from minomni.errors import UserError, shorten
from minomni.files import write_atomically
from minomni.inputs.mel import HOP, voice_mel
from minomni.inputs.prompt import Processor
from minomni.token2wav.token2wav import check_wave
from minomni.token2wav.voice import Voice
from minomni.train.loop import to_device
from minomni.train.run_folder import check_unpacked_size, disk_errors
from minomni.train.stages.speech import TalkerExample, collate, talker_prompts

if TYPE_CHECKING:
    from minomni.omni import Omni

CHUNK = 32  # pairs in a file
BATCH = 8  # texts that the Talker speaks together
MAX_SECONDS = 10  # of the sound of a pair
MIN_SECONDS = 0.5  # of speech; a Talker that says less has not spoken
RANDOM_SECONDS = 2.0  # of the sound of random codes


@dataclass
class Pair:
    """One sound and its codes."""

    mel: Tensor  # [T, bands], voice mel in fp16
    codes: Tensor  # [T / repeats]
    text: str  # that is spoken; empty where there is none, or only a part of it is spoken


class PairMaker:
    """Makes pairs in chunks. A chunk depends on the model, the texts, the seed and its number.

    rows: whose answers the Talker speaks, None for sentences of the generated world. random_share:
    the share of the pairs that have random codes. Raises UserError for a model that cannot speak.
    """

    def __init__(self, omni: "Omni", rows: JsonlRows | None, seed: int, random_share: float):
        self.omni = omni
        self.rows = rows
        self.seed = seed
        self.random_share = random_share
        self.talker, self.token2wav = omni.require_speech()
        if omni.tokenizer is None or not omni.voices:
            raise UserError(
                "an encoder is trained on the speech of its model, and this folder holds no "
                "tokenizer or no voices; copy vocab.json, merges.txt and spk_dict.pt into it"
            )
        self.processor = Processor(omni.config, omni.tokenizer)
        self.codes_per_second = self.token2wav.config.codes_per_second
        self.device = omni.thinker.device

    @torch.no_grad()
    def chunk(self, number: int) -> list[Pair]:
        """The CHUNK pairs of a number: spoken ones, then random ones."""
        random = Random(f"{self.seed}-{number}")
        generator = torch.Generator(self.device).manual_seed(random.getrandbits(32))
        num_random = self.num_random((number + 1) * CHUNK) - self.num_random(number * CHUNK)
        rows = [self.row(random) for _ in range(CHUNK - num_random)]
        voices = list(self.omni.voices.values())
        speakers = [random.choice(voices) for _ in rows]
        codes = []
        for part in batched(list(zip(rows, speakers, strict=True)), BATCH):
            codes += self.spoken_codes(part, generator)

        pairs = []
        for row, row_codes in zip(rows, codes, strict=True):
            is_speech = len(row_codes) >= MIN_SECONDS * self.codes_per_second
            is_whole = len(row_codes) < self.max_codes
            text = row.answer if is_speech and is_whole else ""
            kept = row_codes if is_speech else self.random_codes(random)
            # Codes are not to depend on the voice, so that of Token2Wav is drawn anew.
            pairs.append(self.pair(kept, random.choice(voices), text, generator))
        while len(pairs) < CHUNK:
            codes_of_pair = self.random_codes(random)
            pairs.append(self.pair(codes_of_pair, random.choice(voices), "", generator))
        return pairs

    def num_random(self, count: int) -> int:
        """How many of the first `count` pairs are to have random codes."""
        return int(count * self.random_share)

    def row(self, random: Random) -> JsonlRow:
        """A row of the data, or the request to say a sentence."""
        if self.rows is not None:
            return self.rows[random.randrange(len(self.rows))]
        is_statement = random.random() < 0.5
        text = statement(random, held_out=False) if is_statement else framed_words(random)
        system = {"role": "system", "content": self.omni.config.media.system_prompt}
        question = {"role": "user", "content": f"say {text}"}
        return JsonlRow([system, question], text, None, None, False, None)

    @property
    def max_codes(self) -> int:
        """Speech is cut off there."""
        return MAX_SECONDS * self.codes_per_second

    def spoken_codes(
        self, part: Sequence[tuple[JsonlRow, Voice]], generator: torch.Generator
    ) -> list[Tensor]:
        """What the Talker says for the answers of rows, each by a voice: codes [m] of each row."""
        tokens = self.omni.config.thinker.tokens
        prompts = [prompt_inputs(row, self.processor) for row, _ in part]
        encode = self.processor.tokenizer.encode
        answers = [encode(row.answer) + [tokens.im_end] for row, _ in part]
        batch = append_answer(prompts, answers, tokens.endoftext)
        states = talker_prompts(self.omni.thinker, *to_device(batch, self.device))
        examples = []
        for row_states, (row, voice) in zip(states, part, strict=True):
            no_codes = torch.zeros(0, dtype=torch.long)
            examples.append(TalkerExample(*row_states, voice.bos_token, no_codes, row.answer))
        inputs = collate(examples, tokens, self.omni.thinker.model.embed_tokens)
        sampling = replace(self.omni.config.talker_sampling, max_new_tokens=self.max_codes)
        codes = self.talker.generate(inputs, sampling, self.omni.num_codes, generator)
        return [row_codes.cpu() for row_codes in codes]

    def random_codes(self, random: Random) -> Tensor:
        """Codes [m] that are drawn one by one; 0 is not one of them, see DiT."""
        count = round(RANDOM_SECONDS * self.codes_per_second)
        highest = self.token2wav.config.dit.num_embeds
        return torch.tensor([random.randint(1, highest) for _ in range(count)])

    def pair(self, codes: Tensor, voice: Voice, text: str, generator: torch.Generator) -> Pair:
        """Codes [m] with their sound in a voice."""
        wave = self.token2wav(codes[None], voice, self.omni.config.flow, generator)
        wave = check_wave(wave).float().cpu().numpy()
        wave = torch.from_numpy(soxr.resample(wave, self.omni.sample_rate, INPUT_SAMPLE_RATE))
        samples = len(codes) * self.token2wav.config.dit.repeats * HOP
        wave = F.pad(wave, (0, max(0, samples - len(wave))))[:samples]  # resampling rounds
        return Pair(voice_mel(wave).half(), codes, text)


class CodePairs(Sequence):
    """Pairs in the files of a folder, mapped into memory. Those that are missing are made."""

    def __init__(self, maker: PairMaker, folder: Path, count: int):
        """count: pairs, rounded up to whole files."""
        chunks = range(-(-count // CHUNK))
        folder.mkdir(parents=True, exist_ok=True)
        self.pairs: list[Pair] = []
        for number in tqdm(chunks, "making pairs", leave=False, disable=None):
            path = folder / f"{number:05}.pt"
            if not path.exists():
                write_pairs(maker.chunk(number), path)
            self.pairs += read_pairs(path)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index):
        return self.pairs[index]


def write_pairs(pairs: list[Pair], path: Path) -> None:
    """Write the pairs of a chunk. Raises UserError where that is impossible."""
    rows = {
        "mels": torch.cat([pair.mel for pair in pairs]),
        "codes": torch.cat([pair.codes for pair in pairs]),
        "lengths": torch.tensor([[len(pair.mel), len(pair.codes)] for pair in pairs]),
        "texts": [pair.text for pair in pairs],
    }
    with disk_errors(path):
        write_atomically(path, lambda file: torch.save(rows, file))


def read_pairs(path: Path) -> list[Pair]:
    """The pairs of a chunk. Raises UserError for a damaged file."""
    try:
        with zipfile.ZipFile(path) as archive:
            check_unpacked_size(archive, path)
        rows = torch.load(path, mmap=True, weights_only=True)
        lengths = rows["lengths"].T.tolist()
        mels = rows["mels"].split(lengths[0])
        codes = rows["codes"].split(lengths[1])
        return [Pair(*parts) for parts in zip(mels, codes, rows["texts"], strict=True)]
    except Exception as error:  # a broken or hostile file can raise any exception
        first_line = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"{shorten(path, 200)}: is damaged, expected pairs of codes and their sound "
            f"({type(error).__name__}: {shorten(first_line, 100)}); delete it, it is made again"
        ) from None
