"""Qwen2.5-Omni from scratch in plain PyTorch: every part trainable, the same code for all sizes.

    inputs/     files and messages       ->  token ids, mel spectrograms, image patches
    thinker/    ids, mels, patches       ->  text, and hidden states for the Talker
    talker/     hidden states            ->  speech codes  (codec.py: speech -> codes, for training)
    token2wav/  speech codes             ->  mel spectrogram -> waveform
    chat/       conversation             ->  streamed replies
    train/      generated data           ->  a model

omni = minomni.load("tiny")
reply = omni.respond([{"role": "user", "content": "say the red circle is above the blue square"}])
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from minomni.omni import Omni

# Functions import PyTorch when they are called, so that `import minomni` is fast.


def load(
    name: str | Path,
    device: "str | torch.device" = "cpu",
    dtype: "str | torch.dtype | None" = None,
    quantize: str | None = None,
    parts: str | None = None,
    encoders_on_host: bool = False,
    dit_dtype: "str | torch.dtype | None" = None,
) -> "Omni":
    """Load a model by the name of a size that is trained here, or by the folder of a checkpoint.

    "tiny" is the model in the runs folder, or else the one that ships with the project. A folder of
    that name counts only if it holds a config.json. device: cpu, cuda, mps or auto. dtype: of
    Thinker and Talker, a torch.dtype or its name ("bfloat16", "bf16", "torch.bfloat16" ...); None
    or "auto" is the dtype of a folder, or fp32 on a CPU that emulates that, where fp32 fits in
    memory; and fp32 for a size. quantize: "int8" or "int4" keeps the linear layers of Thinker and
    Talker in that many bits, with "+head" and "+encoders" also those, in int8
    ("int4+head+encoders"); the rest of both is bf16 unless dtype says otherwise. parts: "text"
    loads the text decoder alone, and "+audio", "+vision" and "+speech" what they name as well
    ("text+audio+speech"); the rest is never read. encoders_on_host: keep the encoders in the host's
    memory and copy them to the device whenever they run. dit_dtype: "bf16" halves the memory of the
    DiT on a GPU; it is fp32 otherwise. Raises UserError naming what is missing, broken or of the
    wrong type.
    """
    import torch

    from minomni.checkpoint import weights
    from minomni.devices import dtype_of

    folder = folder_of(name)
    dtype = dtype_of(dtype)
    is_size = folder != Path(name)
    if is_size and dtype is None and quantize is None:
        dtype = torch.float32
    return weights.load(folder, device, dtype, quantize, parts, encoders_on_host, dit_dtype)


def save(omni: "Omni", folder: str | Path) -> None:
    """Write a model as a folder that load() and transformers read: weights, configuration, voices,
    tokenizer, processor.

    An existing model folder is replaced; other files of the folder that the model was loaded from
    are kept. Raises UserError, and changes nothing, where folder is a file or holds something other
    than a model.
    """
    from minomni.checkpoint import saving

    saving.save(omni, folder)


def __getattr__(name: str):
    """make_voice(), imported on first use."""
    if name == "make_voice":
        from minomni.token2wav.voice import make_voice

        return make_voice
    raise AttributeError(f"module 'minomni' has no attribute {name!r}")


def folder_of(name: str | Path) -> Path:
    """The model folder of a size or of a checkpoint. Raises UserError where there is none."""
    from minomni import config, paths
    from minomni.errors import UserError, quote

    sizes = ", ".join(config.SIZES)
    if not isinstance(name, (str, Path)) or not str(name):
        raise UserError(
            f"a model is the name of a size or a folder, not {quote(name)}; the sizes are {sizes}"
        )

    # A folder named like a size counts only if it holds a model.
    if os.path.isdir(name):
        has_config = os.path.exists(os.path.join(name, "config.json"))
        if name not in config.SIZES or has_config:
            return Path(name)
    size = str(name)
    if size not in config.SIZES:
        raise UserError(f"{size!a:.200} is neither a folder nor a size; the sizes are {sizes}")

    for folder in (paths.runs() / size / "model", paths.data_samples() / size):
        if folder.is_dir():
            return folder
    if not config.SIZES[size].trained_here:  # a size of the release
        raise UserError(f"no model of size {size!r} is included; give the folder of a checkpoint")
    raise UserError(f"no model of size {size!r} here; python -m minomni train {size} makes one")
