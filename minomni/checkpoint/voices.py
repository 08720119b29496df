"""The voices of a model folder, in spk_dict.pt."""

import os
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minomni.checkpoint.hf_config import COPY_AGAIN
from minomni.checkpoint.tensor_files import PRECISIONS
from minomni.config import OmniConfig
from minomni.errors import UserError, quote_json, short_path
from minomni.model_files import check_file
from minomni.token2wav.token2wav import check_voice
from minomni.token2wav.voice import Voice

MAX_VOICES_BYTES = 256_000_000  # of spk_dict.pt, also unpacked; the release's has 260 thousand


def load_voices(
    file: Path, config: OmniConfig, device: str | torch.device = "cpu"
) -> dict[str, Voice]:
    """The voices of a spk_dict.pt; none where there is no file, or where the model has no speech.

    The file is read as data; code in it is refused. Raises UserError for a broken file or voice.
    """
    if config.token2wav is None or not os.path.lexists(file):
        return {}
    check_file(file, MAX_VOICES_BYTES, COPY_AGAIN)
    check_unpacked(file)
    try:
        # torch warns about unusual pickles; the error below says more.
        with warnings.catch_warnings(action="ignore"):
            data = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a broken or hostile pickle can raise any exception
        raise UserError(
            f"{short_path(file)}: is cut short or wants to run code ({type(error).__name__}); "
            f"get it from its source again"
        ) from None
    if not isinstance(data, dict):
        raise UserError(
            f"{short_path(file)}: holds a {type(data).__name__}, not a dictionary of voices"
        )
    dit = config.token2wav.dit
    vocab_size = config.thinker.text.vocab_size
    voices = {}
    for name, entry in data.items():
        title = f"{short_path(file)}: voice {quote_json(name, 40)}"
        bos, cond, ref_mel = voice_entry(entry, title)
        if not 0 <= bos < vocab_size:
            raise UserError(
                f"{title} has bos_token {quote_json(bos, 20)}; expected an id below {vocab_size}"
            )
        check_voice(Voice(str(name), bos, cond, ref_mel), dit, title)
        cond = cond.detach().float()
        ref_mel = ref_mel.detach().float()
        if not (cond.isfinite().all() and ref_mel.isfinite().all()):
            raise UserError(
                f"{title} holds numbers that are not finite; get it from its source again"
            )
        voices[str(name)] = Voice(str(name), bos, cond.to(device), ref_mel.to(device))
    return voices


def check_unpacked(file: Path) -> None:
    """Raise UserError for an archive that would unpack to far more than voices need."""
    try:
        with zipfile.ZipFile(file) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return  # torch reads some of these, and raises for the others
    if unpacked > MAX_VOICES_BYTES:
        raise UserError(
            f"{short_path(file)}: unpacks to {unpacked:,} bytes, expected at most "
            f"{MAX_VOICES_BYTES:,}; get it from its source again"
        )


def voice_entry(entry: Any, title: str) -> tuple[int, Tensor, Tensor]:
    """bos_token, cond and ref_mel of one entry of a spk_dict.pt. Raises UserError for other types.

    title: the voice's file and name, for the message.
    """
    try:
        bos = entry["bos_token"]
        cond = entry["cond"]
        ref_mel = entry["ref_mel"]
        if isinstance(bos, Tensor):
            bos = bos.item()
        valid = is_dense_float(cond) and is_dense_float(ref_mel)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError):
        bos = None
        valid = False
    if not isinstance(bos, int) or isinstance(bos, bool) or not valid:
        raise UserError(
            f"{title} must have an id bos_token and tensors cond and ref_mel of floating-point "
            f"numbers"
        )
    return bos, cond, ref_mel


def is_dense_float(tensor: Tensor) -> bool:
    """Whether a tensor holds floating-point numbers in memory, not sparse and not on meta."""
    dense = tensor.layout == torch.strided and not tensor.is_meta
    return dense and tensor.dtype in PRECISIONS.values()
