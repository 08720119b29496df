"""Samples that a run leaves behind: in samples/<stage>/ a wav, a mel as a picture, and what a codec
reads in it.
"""

from io import BytesIO
from pathlib import Path

import torch
from torch import Tensor, nn

from minomni.files import write_atomically
from minomni.inputs.mel import HOP, VOICE_BANDS, VOICE_FFT, VOICE_WINDOW, mel_filters, voice_mel
from minomni.notebook import viz
from minomni.talker.codec import Codec, ids_to_letters
from minomni.train.checkpoint import disk_errors, read_tensors


def write_samples(stage, folder: Path, step: int, shown: str) -> None:
    """Write what a stage can do by now: its line as text; where it makes sound, a wav, a picture
    and what is read.
    """
    place, sound, lines = (
        folder / "samples" / stage.name / f"{step:06}",
        stage.sound(),
        [shown] if shown else [],
    )
    with disk_errors(place):
        if sound is not None:
            text, made = sound
            mel, wave = both(made.float().cpu())
            rate = stage.omni.config.token2wav.sample_rate
            write_atomically(place.with_suffix(".wav"), lambda f: write_wav(f, wave, rate))
            write_atomically(
                place.with_suffix(".png"), lambda f: write_picture(f, mel, f"{text}, step {step}")
            )
            reader = trained_codec(stage, folder)
            heard = (
                "not read: stage codec is not finished"
                if reader is None
                else repr(read(reader, mel))
            )
            lines = [f"said  {text!r}", f"read  {heard}", *lines]
        if lines:
            write_atomically(
                place.with_suffix(".txt"), lambda f: f.write("\n".join([*lines, ""]).encode())
            )


def trained_codec(stage, folder: Path) -> nn.Module | None:
    """A codec that can read: the stage's own where it learns or needs it, or else the folder's."""
    if "codec" in (stage.name, *stage.needs):
        return stage.omni.codec
    if not (folder / "codec.safetensors").exists():
        return None
    codec = Codec(stage.omni.config.codec)
    codec.load_state_dict(
        {k.removeprefix("codec."): v for k, v in read_tensors(folder / "codec.safetensors").items()}
    )
    return codec


def both(made: Tensor) -> tuple[Tensor, Tensor]:
    """A wave [samples] or a mel [T, bands] -> (mel [T, bands], wave [samples])."""
    return (voice_mel(made), made) if made.dim() == 1 else (made, griffin_lim(made))


def griffin_lim(mel: Tensor, rounds: int = 32) -> Tensor:
    """A wave [T * 160] whose voice_mel is about `mel` [T, bands], without any network (Griffin and
    Lim 1984).

    Bands are spread back over the spectrum; then phases are sought that one wave can have, from
    silence on.
    """
    inverse = torch.linalg.pinv(mel_filters(VOICE_FFT, VOICE_BANDS))  # [bins, bands]
    size = (inverse @ mel.T.exp()).clamp_min(0)  # [bins, T]
    window = torch.hann_window(VOICE_WINDOW)
    shape = dict(n_fft=VOICE_FFT, hop_length=HOP, win_length=VOICE_WINDOW, window=window)
    phase = torch.rand(size.shape, generator=torch.Generator().manual_seed(0)) * 2 * torch.pi
    spectrum = torch.polar(size, phase)
    for _ in range(rounds):
        wave = torch.istft(spectrum, **shape, length=len(mel) * HOP)
        phase = torch.stft(wave, **shape, return_complex=True)[
            :, : len(mel)
        ].angle()  # one frame more than T: cut
        spectrum = torch.polar(size, phase)
    return torch.istft(spectrum, **shape, length=len(mel) * HOP).clamp(-1, 1)


def read(codec, mel: Tensor) -> str:
    """The letters that a codec reads in a mel [T, bands]."""
    whole = len(mel) // codec.config.downsample * codec.config.downsample
    if not whole:
        return ""
    grid, _ = codec.quantize(mel[None, :whole].to(codec.ctc_head.weight.device))
    return ids_to_letters(codec.letters(grid)[0].argmax(-1))


def write_wav(file, wave: Tensor, rate: int) -> None:
    """A wave [samples] as 16 bits."""
    import soundfile

    content = BytesIO()  # soundfile would swallow what a full disk says
    soundfile.write(content, wave.numpy(), rate, subtype="PCM_16", format="WAV")
    file.write(content.getbuffer())


def write_picture(file, mel: Tensor, title: str) -> None:
    """A mel [T, bands] as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(
        figsize=(8, 2.4), layout="constrained"
    )  # without pyplot, which would ask for a screen
    viz.mel(viz.plain(figure.subplots()), mel.T.numpy(), title)
    figure.savefig(file, format="png", dpi=80)
