"""The speech codes of a corpus, computed once and kept in a cache file."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from minomni.data.batching import batched, pad_mels
from minomni.data.corpus import SpeechCorpus
from minomni.files import write_atomically
from minomni.inputs.mel import voice_mel
from minomni.talker.codec import Codec, CodeClassifier

BATCH = 32  # utterances encoded together


def encode_corpus(codec: Codec, speech: SpeechCorpus, cache: Path) -> list[Tensor]:
    """Codes [C] of every utterance of a corpus, read from the cache file if there is one.

    The file is named by a hash of the codec's weights and the list of utterances, so another codec
    or corpus gets its own. The stages of the DiT and the Talker share it.
    """
    path = cache / f"codes-{cache_key([codec], speech.utterances)}.pt"
    if path.exists():
        saved = torch.load(path, weights_only=True)
        return list(saved["codes"].split(saved["lengths"].tolist()))
    codes = encode_batches(codec, speech)
    saved = {"codes": torch.cat(codes), "lengths": torch.tensor([len(row) for row in codes])}
    write_atomically(path, lambda file: torch.save(saved, file))
    return codes


def cache_key(parts: Iterable[nn.Module], *others: object) -> str:
    """A hash of the weights of some modules and of anything else that a result depends on."""
    digest = hashlib.sha256(str(others).encode())
    for part in parts:
        for parameter in part.parameters():
            digest.update(parameter.detach().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


def encode_batches(codec: Codec, speech: SpeechCorpus) -> list[Tensor]:
    """Codes [C] of every utterance of a corpus on the CPU, encoded in batches of similar length."""
    lengths = [utterance.end - utterance.start for utterance in speech.utterances]
    order = sorted(range(len(speech)), key=lengths.__getitem__)
    codes: dict[int, Tensor] = {}
    for indices in batched(order, BATCH):
        rows = encode_waves(codec, [speech.wave(i) for i in indices])
        codes.update(zip(indices, rows, strict=True))
    return [codes[i] for i in range(len(speech))]


def encode_waves(codec: Codec | CodeClassifier, waves: list[Tensor]) -> list[Tensor]:
    """Waveforms of whole codes [samples] -> their codes [C] on the CPU, encoded as one batch."""
    mels, frames = pad_mels([voice_mel(wave) for wave in waves])
    rows = codec.encode(mels.to(codec.stem.weight.device)).cpu()  # [B, C]
    counts = frames // codec.config.downsample
    return [row[:count] for row, count in zip(rows, counts, strict=True)]
