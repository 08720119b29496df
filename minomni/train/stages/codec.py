"""Stage codec: speech to discrete codes and back to a mel."""

import torch
from torch import Tensor

from minomni.config import MEL_RATE
from minomni.data.batching import pad_mels, similar_lengths
from minomni.data.word_errors import word_error_rate, word_errors
from minomni.talker.codec import letters_to_ids
from minomni.train import losses
from minomni.train.samples import transcribe
from minomni.train.stages.mel_stage import MelStage

# Mels [B, T, bands] and their frames, letters, speaker vectors, weight of the mel loss
Batch = tuple[Tensor, Tensor, list[Tensor], Tensor, float]


class CodecStage(MelStage):
    """CTC loss on letters and L1 losses on the mel, all from the quantized values: one mel is
    predicted from all codes, one from each code alone.
    """

    name = "codec"
    trainable = ("codec.",)
    description = "speech tokenizer: FSQ codes that predict letters (CTC) and reconstruct the mel"

    def whole_batch(self, number: int) -> Batch:
        indices = similar_lengths(self.lengths, self.recipe.batch, self.seed, number, self.weights)
        mels, frames = pad_mels([self.mel(i) for i in indices])
        letters = [letters_to_ids(self.speech.utterances[i].text) for i in indices]
        # First the letters, then the mel as well.
        progress = number / (self.recipe.steps * self.recipe.accumulate)
        mel_weight = min(1.0, 0.2 + progress / 0.4)
        return mels, frames, letters, self.conds(indices), mel_weight

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        mels, frames, letters, conds, mel_weight = batch
        codec = self.codec
        grid, _ = codec.quantize(mels)
        reconstructed = codec.mel(grid, conds)
        without_neighbors = codec.mel_of_codes(grid, conds)
        lengths = frames // codec.config.downsample
        return {
            "ctc": losses.ctc(codec.letters(grid), lengths, letters),
            "mel": mel_weight * losses.masked_l1(reconstructed, mels, frames),
            "code_mel": mel_weight * losses.masked_l1(without_neighbors, mels, frames),
            "fsq_mean": losses.off_center(grid, lengths),
        }

    def preview_text(self) -> str:
        """Codes in use, bits per second, and the word error rate of reconstructed speech."""
        codec = self.codec
        codes = []
        errors = []
        for i in range(0, len(self.speech), max(1, len(self.speech) // 32)):
            mel = self.mel(i)[None].to(self.device)
            codes.append(codec.encode(mel)[0])
            grid = codec.fsq.values(codes[-1])[None]
            reconstructed = codec.mel(grid, self.conds([i]).to(self.device))  # [1, T, bands]
            transcript = transcribe(codec, reconstructed[0])
            errors.append(word_errors(self.speech.utterances[i].text, transcript.split()))

        # Entropy of the codes.
        _, counts = torch.cat(codes).unique(return_counts=True)
        frequencies = counts / counts.sum()
        bits_per_code = -(frequencies * frequencies.log2()).sum().item()
        bits_per_second = bits_per_code * MEL_RATE / codec.config.downsample

        transcript = transcribe(codec, self.mel(0))
        return (
            f"{len(counts)} of {codec.config.num_codes} codes used, {bits_per_second:.0f} bits/s; "
            f"word error rate of reconstructed speech {word_error_rate(errors):.0%}; "
            f"transcript {transcript!r}"
        )

    def preview_audio(self) -> tuple[str, Tensor]:
        grid, _ = self.codec.quantize(self.mel(0)[None].to(self.device))
        return self.text, self.codec.mel(grid, self.conds([0]).to(self.device))[0]
