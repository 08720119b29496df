"""Stage codec: speech to discrete codes and back to a mel."""

import torch

from minomni.config import MEL_RATE
from minomni.data.batching import pad_mels, similar_lengths
from minomni.data.word_errors import edit_distance
from minomni.talker.codec import ids_to_letters, letters_to_ids
from minomni.train import losses
from minomni.train.stages.mel_stage import MelStage


class CodecStage(MelStage):
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
        grid, _ = codec.quantize(mels)
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
            wrong, words = wrong + edit_distance(text, self.read(again).split()), words + len(text)
        _, counts = torch.cat(codes).unique(return_counts=True)
        share = counts / counts.sum()
        bits = -(share * share.log2()).sum().item() * MEL_RATE / codec.config.downsample
        return (
            f"{len(counts)} of {codec.config.num_codes} codes used, {bits:.0f} bits/s; re-made and read again: word error "
            f"{wrong / words:.0%}; reads {self.read(self.mel(0)[None].to(self.device))!r}"
        )

    def read(self, mel: torch.Tensor) -> str:
        """What the codec reads in a mel [1, T, bands]."""
        grid, _ = self.omni.codec.quantize(mel)
        return ids_to_letters(self.omni.codec.letters(grid)[0].argmax(-1))

    def sound(self):
        grid, _ = self.omni.codec.quantize(self.mel(0)[None].to(self.device))
        return self.text, self.omni.codec.mel(grid, self.conds([0]).to(self.device))[0]
