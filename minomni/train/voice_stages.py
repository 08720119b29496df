"""Stages that make the voice: codec (speech -> codes), vocoder (mel -> sound), dit (codes -> mel)."""

import hashlib
from pathlib import Path
from random import Random

import torch
from torch.nn import functional as F

from minomni.config import MEL_RATE
from minomni.files import write_atomically
from minomni.inputs.mel import voice_mel
from minomni.talker.codec import MEL_CENTRE, MEL_SPREAD, ids_to_letters, letters_to_ids
from minomni.train import losses
from minomni.train.judge import edits
from minomni.train.loop import Stage
from minomni.train.speech import balanced, corpus, kind_of, make_voices, without_long
from minomni.train.vocabulary import english

CROP_BLOCKS = (
    3,
    4,
)  # attention blocks of mel in a training crop of the DiT; short sentences have no more than three
VOCODER_FRAMES = 32  # mel frames in one training crop of the vocoder
DROP_CONDITION = 0.15  # share of rows that teach the DiT its unconditional half


def similar_lengths(
    lengths: list,
    batch: int,
    seed: int,
    step: int,
    weights: list[float] | None = None,
    pool: int = 8,
) -> list[int]:
    """Indices of one batch whose rows are about equally long, so little is padding; a function of
    the step alone.

    lengths: numbers, or tuples of them that are compared in turn. weights: how often each index is
    drawn; None for all alike. pool: of how many batches the rows are drawn and sorted together.
    """
    random = Random(f"{seed}-{step // pool}")
    chosen = random.choices(range(len(lengths)), weights, k=batch * pool)
    chosen.sort(key=lengths.__getitem__)
    batches = [chosen[i : i + batch] for i in range(0, len(chosen), batch)]
    random.shuffle(batches)
    return batches[step % pool]


def pad_mels(mels: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mels of several lengths -> [B, T, bands] filled up with silence, and their lengths [B]."""
    frames = torch.tensor([len(m) for m in mels])
    silence = -11.5129  # log(1e-5), what voice_mel gives for zeros
    return torch.stack(
        [F.pad(m, (0, 0, 0, int(frames.max()) - len(m)), value=silence) for m in mels]
    ), frames


class VoiceStage(Stage):
    """What the three stages share: the speaking corpus and the voices in it."""

    data = "spoken sentences"

    def __init__(self, *args):
        super().__init__(*args)
        self.spoken = corpus("speaking", self.cache, english(self.omni.config.thinker.tokens))
        self.speech = without_long(self.spoken)  # long ones would take steps and teach nothing new
        self.weights = balanced([u.text for u in self.speech.utterances])
        self.voices = make_voices(self.speech, first_bos=0)
        self.lengths = [u.end - u.start for u in self.speech.utterances]
        self.text = self.speech.utterances[0].text  # of the utterance that is sampled

    def draw(self, random: Random) -> int:
        """Index of an utterance."""
        return random.choices(range(len(self.speech)), self.weights)[0]

    def mel(self, index: int) -> torch.Tensor:
        """Voice mel [T, bands] of one utterance."""
        return voice_mel(self.speech.wave(index))

    def conds(self, indices: list[int]) -> torch.Tensor:
        """Speaker vectors [B, E] of the utterances' voices."""
        return torch.cat([self.voices[self.speech.utterances[i].voice].cond for i in indices])


class CodecStage(VoiceStage):
    name, learns = "codec", ("codec.",)
    about = "speech tokenizer: reads letters (CTC) and restores the mel from FSQ codes"

    def batch(self, number):
        indices = similar_lengths(self.lengths, self.recipe.batch, self.seed, number, self.weights)
        mels, frames = pad_mels([self.mel(i) for i in indices])
        letters = [letters_to_ids(self.speech.utterances[i].text) for i in indices]
        progress = number / (self.recipe.steps * self.recipe.accumulate)
        mel_weight = min(1.0, 0.2 + progress / 0.4)  # words first, sound later
        return mels, frames, letters, self.conds(indices), mel_weight

    def losses(self, batch):
        mels, frames, letters, conds, mel_weight = batch
        codec = self.omni.codec
        grid, _ = codec.quantise(mels)
        mel, lengths = codec.mel(grid, conds), frames // codec.config.downsample
        return {
            "ctc": losses.ctc(codec.letters(grid), lengths, letters),
            "mel": mel_weight * losses.masked_l1(mel, mels, frames),
            "even": losses.off_centre(grid, lengths),
        }

    def sample(self):
        """How much of the alphabet is used, how many bits a second it carries, and whether it can
        be read again.
        """
        codec, chosen = self.omni.codec, range(0, len(self.speech), max(1, len(self.speech) // 32))
        codes, wrong, words = [], 0, 0
        for i in chosen:
            codes.append(codec.encode(self.mel(i)[None].to(self.device))[0])
            again = codec.mel(
                codec.fsq.values(codes[-1])[None], self.conds([i]).to(self.device)
            )  # [1, T, bands]
            text = self.speech.utterances[i].text.split()
            wrong, words = wrong + edits(text, self.read(again).split()), words + len(text)
        _, counts = torch.cat(codes).unique(return_counts=True)
        share = counts / counts.sum()
        bits = -(share * share.log2()).sum().item() * MEL_RATE / codec.config.downsample
        return (
            f"{len(counts)} of {codec.config.num_codes} codes used, {bits:.0f} bits/s; re-made and read again: word error "
            f"{wrong / words:.0%}; reads {self.read(self.mel(0)[None].to(self.device))!r}"
        )

    def read(self, mel: torch.Tensor) -> str:
        """What the codec reads in a mel [1, T, bands]."""
        grid, _ = self.omni.codec.quantise(mel)
        return ids_to_letters(self.omni.codec.letters(grid)[0].argmax(-1))

    def sound(self):
        grid, _ = self.omni.codec.quantise(self.mel(0)[None].to(self.device))
        return self.text, self.omni.codec.mel(grid, self.conds([0]).to(self.device))[0]


class VocoderStage(VoiceStage):
    name, learns = "vocoder", ("token2wav.code2wav_bigvgan_model.",)
    about = "BigVGAN: mel to waveform by mel and spectrogram distance"
    bf16 = False  # spectra of quiet sounds want all digits

    def batch(self, number):
        random = Random(f"{self.seed}-vocoder-{number}")
        waves, length = [], VOCODER_FRAMES * 160
        while len(waves) < self.recipe.batch:
            wave = self.speech.wave(self.draw(random))
            if len(wave) > length:
                start = random.randrange(0, len(wave) - length, 160)
                waves.append(wave[start : start + length])
        return torch.stack(waves)  # [B, samples]

    def losses(self, batch):
        mel = voice_mel(batch)  # [B, T, bands]
        made = self.omni.token2wav.code2wav_bigvgan_model(mel.transpose(1, 2))
        return {
            "mel": 2 * (voice_mel(made) - mel).abs().mean(),
            "stft": losses.spectral(made, batch),
        }

    def sound(self):
        return self.text, self.omni.token2wav.code2wav_bigvgan_model(
            self.mel(0).T[None].to(self.device)
        )[0]


class DiTStage(VoiceStage):
    name, learns, needs = "dit", ("token2wav.code2wav_dit_model.",), ("codec",)
    about = "flow-matching DiT: codes to mel in sliding blocks"

    def __init__(self, *args):
        super().__init__(*args)
        with torch.no_grad():
            codes = coded(self.omni.codec, self.spoken, self.cache)
            self.codes = [
                row for row, u in zip(codes, self.spoken.utterances) if kind_of(u.text) != "long"
            ]
            self.start_from_sounds()

    def start_from_sounds(self) -> None:
        """Begin with what each code sounds like on average, so that a thousand rows need not be
        learnt one by one.
        """
        dit = self.omni.token2wav.code2wav_dit_model
        table = dit.text_embed.codec_embed.weight
        sums, counts = (
            torch.zeros(len(table), dit.config.repeats * dit.config.mel_dim),
            torch.zeros(len(table), 1),
        )
        for i in range(0, len(self.speech), max(1, len(self.speech) // 600)):
            pieces = ((self.mel(i) - MEL_CENTRE) / MEL_SPREAD).reshape(
                len(self.codes[i]), -1
            )  # [C, repeats * bands]
            sums.index_add_(0, self.codes[i], pieces)
            counts.index_add_(0, self.codes[i], torch.ones(len(pieces), 1))
        heard = counts[:, 0] > 0
        means = sums[heard] / counts[heard]
        directions = torch.linalg.svd(means - means.mean(0), full_matrices=False).Vh[
            : table.shape[1]
        ]  # principal ones
        places = (means - means.mean(0)) @ directions.T
        rows = F.pad(
            places / places.std(), (0, table.shape[1] - places.shape[1])
        )  # few codes, few directions
        table[heard.to(table.device)] = rows.to(table.device)
        dit.input_embed.proj.weight[:, : dit.config.mel_dim] /= MEL_SPREAD
        dit.proj_out.bias.fill_(MEL_CENTRE)  # velocity starts at the mean mel

    def batch(self, number):
        random, dit = Random(f"{self.seed}-dit-{number}"), self.omni.config.token2wav.dit
        first, last = (
            random.choice(
                (dit.block_size, random.randrange(dit.repeats, dit.block_size, dit.repeats))
            )
            for _ in range(2)
        )  # frames of the outer blocks: streams begin, and speech ends, with short ones
        length = (random.choice(CROP_BLOCKS) - 2) * dit.block_size + first + last
        indices, mels, codes = [], [], []
        while len(indices) < self.recipe.batch:
            i = self.draw(random)
            if len(self.codes[i]) * dit.repeats <= length:
                continue
            mel = self.mel(i)
            start = random.randrange(0, len(mel) - length + 1, dit.repeats)
            indices.append(i)
            mels.append(mel[start : start + length])
            codes.append(self.codes[i][start // dit.repeats : (start + length) // dit.repeats])
        references = torch.cat(
            [self.voices[self.speech.utterances[i].voice].ref_mel for i in indices]
        )
        return (
            torch.stack(mels),
            torch.stack(codes),
            self.conds(indices),
            references,
            dit.block_size - first,
        )

    def losses(self, batch):
        mels, codes, conds, references, lacking = batch
        kept = torch.rand(len(mels), device=self.device) >= DROP_CONDITION
        codes, conds, references = (
            codes * kept[:, None],
            conds * kept[:, None],
            references * kept[:, None, None],
        )
        time = 1 - torch.cos(
            torch.rand(len(mels), device=self.device) * torch.pi / 2
        )  # early times more often, as the solver's sway has it
        dit = self.omni.token2wav.code2wav_dit_model
        return {
            "flow": losses.flow_matching(
                lambda x, t: dit(x, codes, t, conds, references, lacking),
                mels,
                torch.randn_like(mels),
                time,
            )
        }

    def sound(self):
        dit, voice = (
            self.omni.token2wav.code2wav_dit_model,
            self.voices[self.speech.utterances[0].voice],
        )
        noise = torch.randn(
            1, *self.mel(0).shape, generator=torch.Generator().manual_seed(0)
        )  # [1, T, bands]
        inputs = [x.to(self.device) for x in (self.codes[0][None], voice.cond, voice.ref_mel)]
        return self.text, dit.sample(*inputs, self.omni.config.flow, noise.to(self.device))[0].T


def coded(codec, speech, cache: Path) -> list[torch.Tensor]:
    """Codes [C] of every utterance of a corpus. Dit and the Talker's stages share them in a file.

    It is named by the codec and by what the recordings are, so that neither others nor another
    codec meet it.
    """
    path = cache / f"codes-{digest([codec], speech.utterances)}.pt"
    if path.exists():
        kept = torch.load(path, weights_only=True)
        return list(kept["codes"].split(kept["lengths"].tolist()))
    codes = encode_all(codec, speech)
    kept = {"codes": torch.cat(codes), "lengths": torch.tensor([len(row) for row in codes])}
    write_atomically(path, lambda f: torch.save(kept, f))
    return codes


def digest(parts: list, *others) -> str:
    """Stands for the weights of some parts of a model, and for whatever else is given."""
    made_by = hashlib.sha256(str(others).encode())
    for part in parts:
        for parameter in part.parameters():
            made_by.update(parameter.detach().cpu().numpy().tobytes())
    return made_by.hexdigest()[:12]


def encode_all(codec, speech) -> list[torch.Tensor]:
    """Codes [C] of every utterance of a corpus, encoded in batches of about equal length; on the
    CPU.
    """
    order = sorted(
        range(len(speech)), key=lambda i: speech.utterances[i].end - speech.utterances[i].start
    )
    codes, device = [None] * len(speech), codec.to_grid.weight.device
    for begin in range(0, len(order), 32):
        indices = order[begin : begin + 32]
        mels, frames = pad_mels([voice_mel(speech.wave(i)) for i in indices])
        for i, row, n in zip(
            indices, codec.encode(mels.to(device)).cpu(), frames // codec.config.downsample
        ):
            codes[i] = row[:n]
    return codes
