"""Qwen2.5-Omni from scratch: every part in plain PyTorch, every part trainable, one code for all
sizes.

inputs/     files and messages  ->  token ids, mels, patches
thinker/    ids, mels, patches  ->  text, and what the Talker is given of it
talker/     thoughts            ->  speech codes            (codec.py: speech -> codes, to train it)
token2wav/  speech codes        ->  mel -> waveform
train/      a generated world   ->  a model

omni = minomni.load("tiny")
reply = omni.respond([{"role": "user", "content": "say the red circle is above the blue square"}])
"""

from pathlib import Path


def load(name, device="cpu", dtype=None):
    """A model by the name of a size trained here, or by the folder of a checkpoint -> Omni.

    "tiny" is what `python run.py` trained, or else the one that comes with the project. A folder of
    that name counts only if it holds a config.json. device: cpu, cuda, mps or auto. dtype: of
    Thinker and Talker, a torch.dtype or its name ("bfloat16", "bf16", "torch.bfloat16" ...); None
    or "auto" keeps what a folder stores, and is fp32 for a size. Raises UserError naming what is
    missing or broken, or of the wrong type.
    """
    import torch

    from minomni.checkpoint import weights
    from minomni.devices import dtype_of

    folder, dtype = folder_of(name), dtype_of(dtype)
    named_by_size = folder != Path(name)
    return weights.load(folder, device, torch.float32 if named_by_size and dtype is None else dtype)


def save(omni, folder) -> None:
    """Write a model as a folder that load() and transformers read: weights, sizes, voices,
    tokenizer, processor.

    An existing model folder is replaced; other files of the folder that the model was loaded from
    are kept. Raises UserError, and changes nothing, where folder is a file or holds something else
    than a model.
    """
    from minomni.checkpoint import saving

    saving.save(omni, folder)


def __getattr__(name: str):
    """make_voice(), fetched when first asked for: `import minomni` is to stay quick."""
    if name == "make_voice":
        from minomni.token2wav.voice import make_voice

        return make_voice
    raise AttributeError(f"module 'minomni' has no attribute {name!r}")


def folder_of(name) -> Path:
    """Where the model of a size, or of a checkpoint's folder, lies. Raises UserError where there is
    none.
    """
    import os

    from minomni import config, paths
    from minomni.arguments import shown
    from minomni.errors import UserError

    if not isinstance(name, (str, Path)) or not str(name):
        raise UserError(
            f"a model is the name of a size or a folder, not {shown(name)}; the sizes are "
            f"{', '.join(config.SIZES)}"
        )
    if os.path.isdir(name) and (
        name not in config.SIZES or os.path.exists(os.path.join(name, "config.json"))
    ):
        return Path(name)
    if str(name) not in config.SIZES:
        raise UserError(
            f"{str(name)!a:.200} is neither a folder nor a size; the sizes are {', '.join(config.SIZES)}"
        )
    for folder in (paths.runs() / name / "model", paths.data_samples() / name):
        if folder.is_dir():
            return folder
    if config.SIZES[str(name)].codec is None:  # a size of the release, which is not trained here
        raise UserError(
            f"no model of size {str(name)!r} comes along; give the folder of a checkpoint"
        )
    raise UserError(
        f"no model of size {str(name)!r} here; python -m minomni train {name} makes one"
    )
