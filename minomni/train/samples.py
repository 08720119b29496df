"""Previews of a stage in training, in samples/<stage>/: a wav, a mel spectrogram, a transcript."""

from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from torch import Tensor

from minomni import plot
from minomni.files import write_atomically
from minomni.inputs.mel import HOP, VOICE_BANDS, VOICE_FFT, VOICE_WINDOW, mel_filters, voice_mel
from minomni.talker.codec import Codec, ids_to_letters
from minomni.train.run_folder import disk_errors, is_finished, read_tensors, result_file

if TYPE_CHECKING:
    from minomni.train.loop import Stage

GRIFFIN_LIM_STEPS = 32


def write_samples(stage: "Stage", folder: Path, step: int, sample: str) -> None:
    """Write what a stage generates at a step, under samples/<stage>/<step> in the folder.

    A stage with audio: a wav, its mel spectrogram, and its sentence beside the codec's transcript.
    Every stage: `sample`, a line of text, if it has one.
    """
    path = folder / "samples" / stage.name / f"{step:06}"
    audio = stage.preview_audio()
    lines = []
    with disk_errors(path):
        if audio is not None:
            text, generated = audio
            mel, wave = mel_and_wave(generated.float().cpu())
            title = f"{text}, step {step}"
            rate = stage.omni.sample_rate
            write_atomically(path.with_suffix(".wav"), lambda file: write_wav(file, wave, rate))
            write_atomically(path.with_suffix(".png"), lambda file: write_mel(file, mel, title))
            lines.append(f"text        {text!r}")
            lines.append(f"transcript  {transcript(stage, folder, mel)}")
        if sample:
            lines.append(sample)
        if lines:
            content = "".join(f"{line}\n" for line in lines).encode()
            write_atomically(path.with_suffix(".txt"), lambda file: file.write(content))


def transcript(stage: "Stage", folder: Path, mel: Tensor) -> str:
    """The transcript of a mel [T, bands] by a trained codec, or why there is none."""
    codec = trained_codec(stage, folder)
    if codec is None:
        return "none: stage codec is not finished"
    return repr(transcribe(codec, mel))


def trained_codec(stage: "Stage", folder: Path) -> Codec | None:
    """A codec that can transcribe, or None.

    The stage's own if it trains or needs one, otherwise the one in the folder.
    """
    if "codec" in (stage.name, *stage.needs):
        return stage.codec
    if not is_finished(folder, "codec"):
        return None
    tensors = read_tensors(result_file(folder, "codec"))
    weights = {name.removeprefix("codec."): value for name, value in tensors.items()}
    codec = Codec(stage.codec.config)
    codec.load_state_dict(weights)
    return codec


def mel_and_wave(generated: Tensor) -> tuple[Tensor, Tensor]:
    """A waveform [samples] or a mel [T, bands] -> (mel [T, bands], waveform [samples])."""
    if generated.dim() == 1:
        return voice_mel(generated), generated
    return generated, griffin_lim(generated)


def griffin_lim(mel: Tensor) -> Tensor:
    """A waveform [T * 160] whose voice_mel() is close to `mel` [T, bands], without a network.

    Griffin and Lim 1984. librosa's version takes seconds to import and compile in every process.
    """
    # Spread the bands over the STFT bins.
    inverse = torch.linalg.pinv(mel_filters(VOICE_FFT, VOICE_BANDS))  # [bins, bands]
    magnitude = (inverse @ mel.T.exp()).clamp_min(0)  # [bins, T]

    window = torch.hann_window(VOICE_WINDOW)
    stft: dict[str, Any] = {
        "n_fft": VOICE_FFT,
        "hop_length": HOP,
        "win_length": VOICE_WINDOW,
        "window": window,
    }
    samples = len(mel) * HOP

    # From random phases, alternate between a waveform and the phases of its spectrum.
    generator = torch.Generator().manual_seed(0)
    phase = torch.rand(magnitude.shape, generator=generator) * 2 * torch.pi
    spectrum = torch.polar(magnitude, phase)
    for _ in range(GRIFFIN_LIM_STEPS):
        wave = torch.istft(spectrum, **stft, length=samples)
        consistent = torch.stft(wave, **stft, return_complex=True)  # [bins, T + 1]
        spectrum = torch.polar(magnitude, consistent[:, : len(mel)].angle())
    return torch.istft(spectrum, **stft, length=samples).clamp(-1, 1)


def transcribe(codec: Codec, mel: Tensor) -> str:
    """The codec's transcript of a mel [T, bands]."""
    downsample = codec.config.downsample
    frames = len(mel) // downsample * downsample  # whole codes only
    if frames == 0:
        return ""
    grid, _ = codec.quantize(mel[None, :frames].to(codec.ctc_head.weight.device))
    return ids_to_letters(codec.letters(grid)[0].argmax(-1))


def write_wav(file: BinaryIO, wave: Tensor, rate: int) -> None:
    """Write a waveform [samples] as 16-bit PCM."""
    import soundfile

    buffer = BytesIO()  # written to the file by us: soundfile hides the error of a full disk
    soundfile.write(buffer, wave.numpy(), rate, subtype="PCM_16", format="WAV")
    file.write(buffer.getbuffer())


def write_mel(file: BinaryIO, mel: Tensor, title: str) -> None:
    """Write a mel [T, bands] as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 2.4), layout="constrained")  # not pyplot, which needs a display
    plot.mel(plot.plain(figure.subplots()), mel.T.numpy(), title)
    figure.savefig(file, format="png", dpi=80)
