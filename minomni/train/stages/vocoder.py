"""Stage vocoder: mel to waveform."""

from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from minomni.inputs.mel import HOP, voice_mel
from minomni.train import losses
from minomni.train.discriminators import Discriminators, fixed
from minomni.train.stages.mel_stage import MelStage

CROP_FRAMES = 32  # mel frames in one training crop
# Spectral losses alone teach most in the first steps, in half the time of a step.
SPECTRAL_STEPS = 2000  # steps before the discriminators join
ADVERSARIAL_WEIGHT = 0.5
FEATURE_WEIGHT = 1.0

Batch = tuple[Tensor, bool]  # waveforms [B, samples], and whether the discriminators take part


class VocoderStage(MelStage):
    """Mel L1 and multi-resolution STFT loss; in long runs discriminators join, as for BigVGAN."""

    name = "vocoder"
    trainable = ("token2wav.code2wav_bigvgan_model.",)
    description = "BigVGAN: mel to waveform by mel and spectrogram distance, then discriminators"
    bf16 = False  # spectra of quiet audio need full precision

    def __init__(self, *args: Any):
        super().__init__(*args)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            self.discriminators = Discriminators().to(self.device)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Those of the vocoder, and of the discriminators, which are not part of the model.

        One clip of the gradient covers both.
        """
        own = self.discriminators.named_parameters(prefix="discriminators")
        return super().parameters() | dict(own)

    def whole_batch(self, number: int) -> Batch:
        random = Random(f"{self.seed}-vocoder-{number}")
        length = CROP_FRAMES * HOP
        crops: list[Tensor] = []
        while len(crops) < self.recipe.batch:
            wave = self.speech.wave(self.draw(random))
            if len(wave) <= length:
                continue
            start = random.randrange(0, len(wave) - length, HOP)
            crops.append(wave[start : start + length])
        step = number // self.recipe.accumulate
        return torch.stack(crops), step >= SPECTRAL_STEPS

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        recordings, with_discriminators = batch
        mel = voice_mel(recordings)  # [B, T, bands]
        wave = self.token2wav.code2wav_bigvgan_model(mel.transpose(1, 2))  # [B, samples]
        spectral = {
            "mel": 2 * losses.mean((voice_mel(wave) - mel).abs()),
            "stft": losses.spectral(wave, recordings),
        }
        if not with_discriminators:
            return spectral
        return spectral | self.adversarial_losses(wave, recordings)

    def adversarial_losses(self, wave: Tensor, recordings: Tensor) -> dict[str, Tensor]:
        """Losses of the vocoder under fixed discriminators, and theirs on fixed waveforms."""
        # The discriminators learn; the waveforms are fixed.
        of_recordings = self.discriminators(recordings)
        of_waves = self.discriminators(wave.detach())
        real_scores = [scores for scores, _ in of_recordings]
        wave_scores = [scores for scores, _ in of_waves]

        # The vocoder learns; the discriminators and the recordings' activations are fixed.
        judged = fixed(self.discriminators, wave)
        targets = [[layer.detach() for layer in layers] for _, layers in of_recordings]
        activations = [layers for _, layers in judged]
        return {
            "adversarial": ADVERSARIAL_WEIGHT
            * losses.adversarial([scores for scores, _ in judged]),
            "features": FEATURE_WEIGHT * losses.feature_matching(targets, activations),
            "discrimination": losses.discrimination(real_scores, wave_scores),
        }

    def preview_audio(self) -> tuple[str, Tensor]:
        mel = self.mel(0).T[None].to(self.device)  # [1, bands, T]
        return self.text, self.token2wav.code2wav_bigvgan_model(mel)[0]
