"""Qwen2.5-Omni from scratch: every part in plain PyTorch, every part trainable, one code for all sizes.

    inputs/     files and messages  ->  token ids, mels, patches
    thinker/    ids, mels, patches  ->  text, and what the Talker is given of it
    talker/     thoughts            ->  speech codes            (codec.py: speech -> codes, to train it)
    token2wav/  speech codes        ->  mel -> waveform
    train/      a generated world   ->  a model

    omni = minomni.load("tiny")
    reply = omni.respond([{"role": "user", "content": "say the red circle is above the blue square"}])
"""

from pathlib import Path

ROOT = Path(__file__).parents[1]


def load(name: str, device: str = "cpu", dtype=None):
    """A model by the name of a size trained here, or by the folder of a checkpoint -> Omni.

    "tiny" is what `python run.py` trained, or else the one that comes with the project. device: cpu, cuda, mps or auto.
    dtype: of Thinker and Talker; None keeps what a folder stores, and is fp32 for a size. Raises UserError naming what
    is missing or broken.
    """
    import torch

    from . import weights

    folder = folder_of(name)
    return weights.load(folder, device_of(device), dtype if Path(name).is_dir() else dtype or torch.float32)


def save(omni, folder) -> None:
    """Write a model as a folder that load() and transformers read: weights, sizes, voices, tokenizer, processor.

    An existing model folder is replaced; other files of the folder that the model was loaded from are kept. Raises
    UserError, and changes nothing, where folder is a file or holds something else than a model.
    """
    from . import weights

    weights.save(omni, folder)


def device_of(name: str):
    """The torch.device of a name; auto is cuda, else mps, else cpu. Raises UserError naming what is there."""
    import torch

    from .errors import UserError

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    there = [device for device, available in there.items() if available]
    if name == "auto":
        return torch.device(there[0])
    if torch.device(name).type not in there:
        raise UserError(f"device {name}: this machine, with this PyTorch, has {' and '.join(there)}; or use auto")
    return torch.device(name)


def __getattr__(name: str):
    """make_voice(), fetched when first asked for: `import minomni` is to stay quick."""
    if name == "make_voice":
        from .token2wav.speaker import make_voice

        return make_voice
    raise AttributeError(f"module 'minomni' has no attribute {name!r}")


def folder_of(name: str) -> Path:
    """Where the model of a size, or of a checkpoint's folder, lies. Raises UserError where there is none."""
    from . import config
    from .errors import UserError

    if Path(name).is_dir():
        return Path(name)
    if name not in config.SIZES:
        raise UserError(f"{name!r} is neither a folder nor a size; the sizes are {', '.join(config.SIZES)}")
    for folder in (ROOT / "runs" / name / "model", ROOT / "data_samples" / name):
        if folder.is_dir():
            return folder
    raise UserError(f"no model of size {name!r} here; python -m minomni train {name} makes one")
