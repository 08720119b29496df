"""Stage vocoder: mel to waveform."""

from random import Random

import torch
from torch import Tensor

from minomni.inputs.mel import HOP, voice_mel
from minomni.train import losses
from minomni.train.stages.mel_stage import MelStage

CROP_FRAMES = 32  # mel frames in one training crop


class VocoderStage(MelStage):
    """Mel L1 and multi-resolution STFT loss, without a discriminator."""

    name = "vocoder"
    trainable = ("token2wav.code2wav_bigvgan_model.",)
    description = "BigVGAN: mel to waveform by mel and spectrogram distance"
    bf16 = False  # spectra of quiet audio need full precision

    def batch(self, number: int) -> Tensor:
        random = Random(f"{self.seed}-vocoder-{number}")
        length = CROP_FRAMES * HOP
        crops: list[Tensor] = []
        while len(crops) < self.recipe.batch:
            wave = self.speech.wave(self.draw(random))
            if len(wave) <= length:
                continue
            start = random.randrange(0, len(wave) - length, HOP)
            crops.append(wave[start : start + length])
        return torch.stack(crops)  # [B, samples]

    def losses(self, batch: Tensor) -> dict[str, Tensor]:
        mel = voice_mel(batch)  # [B, T, bands]
        wave = self.token2wav.code2wav_bigvgan_model(mel.transpose(1, 2))
        return {
            "mel": 2 * (voice_mel(wave) - mel).abs().mean(),
            "stft": losses.spectral(wave, batch),
        }

    def sound(self) -> tuple[str, Tensor]:
        mel = self.mel(0).T[None].to(self.device)  # [1, bands, T]
        return self.text, self.token2wav.code2wav_bigvgan_model(mel)[0]
