"""Stage dit: speech codes to mel by flow matching."""

from random import Random

import torch
from torch.nn import functional as F

from minomni.data.codes import encode_corpus
from minomni.data.corpus import sentence_kind
from minomni.talker.codec import MEL_CENTRE, MEL_SPREAD
from minomni.train import losses
from minomni.train.stages.mel_stage import CROP_BLOCKS, MelStage

DROP_CONDITION = 0.15  # share of rows that teach the DiT its unconditional half


class DiTStage(MelStage):
    name, learns, needs = "dit", ("token2wav.code2wav_dit_model.",), ("codec",)
    about = "flow-matching DiT: codes to mel in sliding blocks"

    def __init__(self, *args):
        super().__init__(*args)
        with torch.no_grad():
            codes = encode_corpus(self.omni.codec, self.spoken, self.cache)
            self.codes = [
                row
                for row, u in zip(codes, self.spoken.utterances)
                if sentence_kind(u.text) != "long"
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
