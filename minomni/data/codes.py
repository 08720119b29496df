"""The speech codes of a corpus, computed once and kept in a cache file."""

import hashlib
from pathlib import Path

import torch

from minomni.data.batching import pad_mels
from minomni.files import write_atomically
from minomni.inputs.mel import voice_mel


def encode_corpus(codec, speech, cache: Path) -> list[torch.Tensor]:
    """Codes [C] of every utterance of a corpus. Dit and the Talker's stages share them in a file.

    It is named by the codec and by what the recordings are, so that neither others nor another
    codec meet it.
    """
    path = cache / f"codes-{cache_key([codec], speech.utterances)}.pt"
    if path.exists():
        kept = torch.load(path, weights_only=True)
        return list(kept["codes"].split(kept["lengths"].tolist()))
    codes = encode_batches(codec, speech)
    kept = {"codes": torch.cat(codes), "lengths": torch.tensor([len(row) for row in codes])}
    write_atomically(path, lambda f: torch.save(kept, f))
    return codes


def cache_key(parts: list, *others) -> str:
    """Stands for the weights of some parts of a model, and for whatever else is given."""
    made_by = hashlib.sha256(str(others).encode())
    for part in parts:
        for parameter in part.parameters():
            made_by.update(parameter.detach().cpu().numpy().tobytes())
    return made_by.hexdigest()[:12]


def encode_batches(codec, speech) -> list[torch.Tensor]:
    """Codes [C] of every utterance of a corpus, encoded in batches of about equal length; on the
    CPU.
    """
    order = sorted(
        range(len(speech)), key=lambda i: speech.utterances[i].end - speech.utterances[i].start
    )
    codes, device = [None] * len(speech), codec.to_grid.weight.device
    for begin in range(0, len(order), 32):
        indices = order[begin : begin + 32]
        mels, frames = pad_mels([voice_mel(speech.wave(i)) for i in indices])
        for i, row, n in zip(
            indices, codec.encode(mels.to(device)).cpu(), frames // codec.config.downsample
        ):
            codes[i] = row[:n]
    return codes
