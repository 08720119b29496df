"""Codes to waveform in one call: the DiT generates a mel, BigVGAN the waveform."""

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn

from minomni.config import DiTConfig, FlowConfig, Token2WavConfig
from minomni.cuda_graphs import Graphs
from minomni.devices import tf32_products
from minomni.errors import UserError, shorten
from minomni.token2wav.bigvgan import BigVGAN
from minomni.token2wav.dit import DiT
from minomni.token2wav.voice import Voice

MAX_REFERENCE_FRAMES = 30_000  # mel frames (five minutes) of a voice


class Token2Wav(nn.Module):
    """DiT and BigVGAN, under the release's names.

    They are float32 whatever the dtype of the rest, as in the release; the DiT may be bf16.
    """

    def __init__(self, config: Token2WavConfig):
        super().__init__()
        self.config = config
        self.code2wav_dit_model = DiT(config.dit)
        self.code2wav_bigvgan_model = BigVGAN(config.bigvgan)
        self.graphs: Graphs | None = None  # of streaming, set by Omni.use_static_steps()
        self.tf32 = False  # on CUDA round the factors of all products to TF32; see devices.py

    @property
    def dit_dtype(self) -> torch.dtype:
        """The precision of the DiT's weights."""
        return self.code2wav_dit_model.proj_out.weight.dtype

    def run_chunk(self, key: Hashable, function: Callable, *inputs: Any) -> Any:
        """function(*inputs) as the settings say; see Graphs.call(). key None: not by a graph."""
        with tf32_products(self.tf32):
            if self.graphs is None or key is None:
                return function(*inputs)
            # A graph keeps the kernels of the precision in which it was recorded.
            return self.graphs.call((key, self.tf32), function, inputs)

    @torch.no_grad()
    def forward(
        self,
        codes: Tensor,
        voice: Voice,
        flow: FlowConfig,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Codes [1, n] -> waveform [n * samples per code] in [-1, 1] at config.sample_rate Hz.

        The generator draws the initial noise: same seed, same waveform. Raises UserError for empty
        codes, for codes without a row in the DiT's embedding table and for a voice that does not
        fit the model.
        """
        dit = self.config.dit
        check_codes(codes, dit)
        check_voice(voice, dit)
        device = self.code2wav_dit_model.proj_out.weight.device

        # Drawn on the generator's device: a CPU generator gives the same noise on every device.
        noise_device = device if generator is None else generator.device
        shape = (1, codes.shape[1] * dit.repeats, dit.mel_dim)
        noise = torch.randn(shape, generator=generator, device=noise_device).to(device)

        cond = voice.cond.float().to(device)
        ref_mel = voice.ref_mel.float().to(device)
        with tf32_products(self.tf32):
            mel = self.code2wav_dit_model.sample(codes.to(device), cond, ref_mel, flow, noise)
            return self.code2wav_bigvgan_model(mel)[0]  # [samples]


def check_codes(codes: Tensor, config: DiTConfig) -> None:
    """Raise UserError for codes of another shape than [1, n] or outside the DiT's table."""
    if codes.ndim != 2 or len(codes) != 1 or not codes.shape[1]:
        raise UserError(
            f"speech codes have shape {list(codes.shape)}, expected [1, at least one code]"
        )
    low, high = codes.aminmax()
    if low < 0 or high > config.num_embeds:
        raise UserError(
            f"speech codes range from {low} to {high}, but this model has sounds for 0 to "
            f"{config.num_embeds}; use codes of its own Talker or codec"
        )


def shortest_reference(config: DiTConfig) -> int:
    """Mel frames that a voice's ref_mel needs: reflect padding needs more frames than it adds."""
    layers = zip(config.enc_kernel_sizes, config.enc_dilations, strict=True)
    receptive_field = max(dilation * (kernel - 1) + 1 for kernel, dilation in layers)
    return receptive_field // 2 + 1


def check_voice(voice: Voice, config: DiTConfig, title: str = "") -> None:
    """Raise UserError unless cond is [1, E] and ref_mel [1, R mel frames, mel_dim].

    title: the name of the voice in the message.
    """
    shortest = shortest_reference(config)
    cond, ref_mel = voice.cond, voice.ref_mel
    fits = (
        cond.shape == (1, config.enc_emb_dim)
        and ref_mel.ndim == 3
        and ref_mel.shape[::2] == (1, config.mel_dim)
        and shortest <= ref_mel.shape[1] <= MAX_REFERENCE_FRAMES
    )
    if not fits:
        title = title or f"voice {voice.name!r}"
        raise UserError(
            f"{title} has cond {shorten(list(cond.shape), 40)} and ref_mel "
            f"{shorten(list(ref_mel.shape), 40)}; expected [1, {config.enc_emb_dim}] and [1, "
            f"{shortest} to {MAX_REFERENCE_FRAMES} frames, {config.mel_dim}]; use a voice made for "
            f"this model"
        )


def check_wave(wave: Tensor) -> Tensor:
    """Return the waveform [samples]. Raises UserError for NaN and infinity, which only damaged
    weights produce.
    """
    if not wave.isfinite().all():
        raise UserError(
            "the weights of token2wav give NaN or infinite samples; the model's files are damaged, "
            "copy them again"
        )
    return wave
