"""Stage vocoder: mel to waveform."""

from random import Random

import torch

from minomni.inputs.mel import voice_mel
from minomni.train import losses
from minomni.train.stages.mel_stage import MelStage

VOCODER_FRAMES = 32  # mel frames in one training crop of the vocoder


class VocoderStage(MelStage):
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
