"""Stage dit: speech codes to mel by flow matching."""

from random import Random

import torch
from torch import Tensor
from torch.nn import functional as F

from minomni.data.codes import encode_corpus
from minomni.data.corpus import sentence_kind
from minomni.talker.codec import MEL_MEAN, MEL_STD
from minomni.token2wav.dit import DiT
from minomni.train import losses
from minomni.train.stages.mel_stage import MelStage

CROP_BLOCKS = (3, 4)  # attention blocks in a training crop; short sentences have at most three
DROP_CONDITION = 0.15  # fraction of rows without condition, for classifier-free guidance
INIT_UTTERANCES = 600  # about how many utterances initialize the code embeddings

# Mels [B, T, bands], noise of their shape, times [B], codes, speaker vectors, reference mels, left
# padding of the first block
Batch = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int]


class DiTStage(MelStage):
    """Flow matching on crops, conditioned on codes, speaker vector and reference mel."""

    name = "dit"
    trainable = ("token2wav.code2wav_dit_model.",)
    needs = ("codec",)
    description = "flow-matching DiT: codes to mel in sliding blocks"

    @property
    def dit(self) -> DiT:
        """The network that this stage trains."""
        return self.token2wav.code2wav_dit_model

    def setup(self) -> None:
        """Also encode the corpus, and initialize the DiT from the mels."""
        super().setup()
        with torch.no_grad():
            codes = encode_corpus(self.codec, self.spoken, self.cache)
            # self.speech lacks the long sentences of self.spoken.
            self.codes = [
                row
                for row, utterance in zip(codes, self.spoken.utterances)
                if sentence_kind(utterance.text) != "long"
            ]
            self.initialize_code_embeddings()
            weight = self.dit.input_embed.proj.weight
            weight[:, : self.dit.config.mel_dim] /= MEL_STD
            self.dit.proj_out.bias.fill_(MEL_MEAN)  # the velocity starts at the mean mel

    def initialize_code_embeddings(self) -> None:
        """Set each code's embedding to the principal components of its mean mel.

        Codes that do not occur keep their random embedding.
        """
        table = self.dit.text_embed.codec_embed.weight
        means, used = self.mean_mels(len(table))
        centered = means - means.mean(0)
        components = torch.linalg.svd(centered, full_matrices=False).Vh[: table.shape[1]]
        coordinates = centered @ components.T
        # Fewer codes than dimensions have fewer components.
        padding = (0, table.shape[1] - coordinates.shape[1])
        embeddings = F.pad(coordinates / coordinates.std(), padding)
        table[used.to(table.device)] = embeddings.to(table.device)

    def mean_mels(self, num_codes: int) -> tuple[Tensor, Tensor]:
        """Mean of the normalized mel frames of each code over a part of the corpus.

        -> means [used codes, repeats * bands], mask of the used codes [num_codes].
        """
        dit = self.dit.config
        sums = torch.zeros(num_codes, dit.repeats * dit.mel_dim)
        counts = torch.zeros(num_codes, 1)
        for i in range(0, len(self.speech), max(1, len(self.speech) // INIT_UTTERANCES)):
            codes = self.codes[i]
            normalized = (self.mel(i) - MEL_MEAN) / MEL_STD
            frames = normalized.reshape(len(codes), -1)  # [C, repeats * bands]
            sums.index_add_(0, codes, frames)
            counts.index_add_(0, codes, torch.ones(len(codes), 1))
        used = counts[:, 0] > 0
        return sums[used] / counts[used], used

    def whole_batch(self, number: int) -> Batch:
        random = Random(f"{self.seed}-dit-{number}")
        dit = self.dit.config

        # The first and last block may be short: streams start, and speech ends, with short blocks.
        first = self.outer_block(random)
        last = self.outer_block(random)
        length = (random.choice(CROP_BLOCKS) - 2) * dit.block_size + first + last  # mel frames

        indices, mel, codes = self.crops(length, random)
        references = torch.cat([self.voice(i).ref_mel for i in indices])
        left_pad = dit.block_size - first

        # Early times are more frequent, as in the sway sampling of the solver.
        uniform = torch.rand(len(mel))
        time = 1 - torch.cos(uniform * torch.pi / 2)
        noise = torch.randn_like(mel)

        # Drop all conditions of some rows.
        keep = torch.rand(len(mel)) >= DROP_CONDITION
        return (
            mel,
            noise,
            time,
            codes * keep[:, None],
            self.conds(indices) * keep[:, None],
            references * keep[:, None, None],
            left_pad,
        )

    def crops(self, length: int, random: Random) -> tuple[list[int], Tensor, Tensor]:
        """Random parts of `length` mel frames, from utterances that are longer.

        -> their indices, mel [B, length, bands], codes [B, length / repeats].
        """
        repeats = self.dit.config.repeats
        indices: list[int] = []
        mels = []
        codes = []
        while len(indices) < self.recipe.batch:
            i = self.draw(random)
            if len(self.codes[i]) * repeats <= length:
                continue
            mel = self.mel(i)
            start = random.randrange(0, len(mel) - length + 1, repeats)
            end = start + length
            indices.append(i)
            mels.append(mel[start:end])
            codes.append(self.codes[i][start // repeats : end // repeats])
        return indices, torch.stack(mels), torch.stack(codes)

    def outer_block(self, random: Random) -> int:
        """Mel frames of the first or last block of a crop: a whole block or a random part."""
        dit = self.dit.config
        part = random.randrange(dit.repeats, dit.block_size, dit.repeats)
        return random.choice((dit.block_size, part))

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        mel, noise, time, codes, conds, references, left_pad = batch

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            return self.dit(x, codes, t, conds, references, left_pad)

        return {"flow": losses.flow_matching(velocity, mel, noise, time)}

    def preview_audio(self) -> tuple[str, Tensor]:
        voice = self.voice(0)
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(1, *self.mel(0).shape, generator=generator)  # [1, T, bands]
        mel = self.dit.sample(
            self.codes[0][None].to(self.device),
            voice.cond.to(self.device),
            voice.ref_mel.to(self.device),
            self.omni.config.flow,
            noise.to(self.device),
        )
        return self.text, mel[0].T
