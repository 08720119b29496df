"""Codes to sound in one call: the DiT paints a mel in the chosen voice, BigVGAN turns it into a
waveform.
"""

import torch
from torch import Tensor, nn

from minomni.config import DiTConfig, FlowConfig, Token2WavConfig
from minomni.errors import UserError
from minomni.token2wav.bigvgan import BigVGAN
from minomni.token2wav.dit import DiT
from minomni.token2wav.voice import Voice


class Token2Wav(nn.Module):
    """Both networks under the release's names. Keep them in float32 whatever the rest runs in, as
    the release does.
    """

    def __init__(self, config: Token2WavConfig):
        super().__init__()
        self.config = config
        self.code2wav_dit_model = DiT(config.dit)
        self.code2wav_bigvgan_model = BigVGAN(config.bigvgan)

    @torch.no_grad()
    def forward(
        self,
        codes: Tensor,
        voice: Voice,
        flow: FlowConfig,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Codes [1, n] -> waveform [n * samples per code] in [-1, 1] at config.sample_rate Hz.

        The generator draws the noise that the speech is made of: same seed, same waveform. Raises
        UserError for no codes at all, for codes without a row in the DiT's table and for a voice
        that does not fit the model.
        """
        check_codes(codes, self.config.dit)
        check_voice(voice, self.config.dit)
        device = self.code2wav_dit_model.proj_out.weight.device
        shape = 1, codes.shape[1] * self.config.dit.repeats, self.config.dit.mel_dim
        noise = torch.randn(
            shape, generator=generator, device=generator.device if generator else device
        ).to(device)
        cond, ref_mel = voice.cond.float().to(device), voice.ref_mel.float().to(device)
        mel = self.code2wav_dit_model.sample(
            codes.to(device), cond, ref_mel, flow, noise
        )  # [1, 80, T]
        return self.code2wav_bigvgan_model(mel)[0]  # [samples]


def check_codes(codes: Tensor, config: DiTConfig) -> None:
    if codes.ndim != 2 or len(codes) != 1 or not codes.shape[1]:
        raise UserError(
            f"speech codes have shape {list(codes.shape)}, expected [1, at least one code]"
        )
    low, high = codes.aminmax()
    if low < 0 or high > config.num_embeds:
        raise UserError(
            f"speech codes run from {low} to {high}, but this model has sounds for 0 to "
            f"{config.num_embeds}; use codes of its own Talker or codec"
        )


def shortest_reference(config: DiTConfig) -> int:
    """Mel frames that a voice's ref_mel needs: reflect padding needs more frames than it adds."""
    reach = max(d * (k - 1) + 1 for k, d in zip(config.enc_kernel_sizes, config.enc_dilations)) // 2
    return reach + 1


def check_voice(voice: Voice, config: DiTConfig) -> None:
    shortest = shortest_reference(config)
    if list(voice.cond.shape) != [1, config.enc_emb_dim]:
        raise UserError(
            f"voice {voice.name!r}: cond has shape {list(voice.cond.shape)}, this model expects "
            f"[1, {config.enc_emb_dim}]; use a voice made for it"
        )
    frames = voice.ref_mel.shape[1] if voice.ref_mel.ndim == 3 else 0
    if frames < shortest or list(voice.ref_mel.shape) != [1, frames, config.mel_dim]:
        raise UserError(
            f"voice {voice.name!r}: ref_mel has shape {list(voice.ref_mel.shape)}, expected "
            f"[1, at least {shortest} frames, {config.mel_dim}]"
        )
