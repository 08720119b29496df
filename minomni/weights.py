"""Checkpoint folders: the only file that knows foreign tensor names and layouts.

Our modules carry the checkpoint's names, so loading is a bijection: every stored tensor is used once, every parameter
is filled once, every shape is equal, or one error lists the differences. Nothing is read before that is settled.
"""

import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minomni.config import OmniConfig
from minomni.config_json import CODEC_FOLDER, read_config, read_json
from minomni.errors import UserError
from minomni.inputs.tokenizer import Tokenizer
from minomni.omni import Omni
from minomni.saving import DIT_ANGLES, INDEX, VOICES, WHOLE, save  # noqa: F401, weights.save is its name elsewhere
from minomni.token2wav.speaker import Voice

TOKENIZER_FILES = ("tokenizer.json", "vocab.json")  # either is enough to load from
COMPUTED = {DIT_ANGLES}  # stored for transformers 4.x, computed by us
ANY_PRECISION = ("thinker.", "talker.")  # the rest is always fp32, as the release stores and runs it


def load(folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> Omni:
    """Build the model of a folder (an official checkpoint, or one saved here), with its voices and tokenizer.

    dtype is that of Thinker and Talker, None keeps what is stored; Token2Wav and codec are fp32. Memory peaks at the
    weights plus one shard. Raises UserError naming the file for anything missing, extra, misshapen or broken.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give one that holds config.json and *.safetensors")
    config = read_config(folder)
    with torch.device("meta"):
        omni = Omni(config)
    stored = headers(folder)
    check_bijection(folder, {name: shape for names in stored.values() for name, shape in names.items()}, omni)
    for file, names in stored.items():
        omni.load_state_dict(read_shard(file, names, device, dtype), strict=False, assign=True)
    omni.voices = load_voices(folder / VOICES, config, device)
    if any((folder / name).exists() for name in TOKENIZER_FILES):
        omni.tokenizer = Tokenizer.load(folder)
    omni.loaded_from = folder.absolute()
    return omni.eval()


def shard_files(folder: Path) -> tuple[list[Path], dict[str, str] | None]:
    """The folder's tensor files, and what its index says about them: {tensor: file}. Raises UserError."""
    if not (folder / INDEX).exists():
        if not (folder / WHOLE).exists():
            raise UserError(f"{folder}: holds neither {WHOLE} nor {INDEX}; give the folder of a model")
        return [folder / WHOLE], None
    index = read_json(folder / INDEX).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()):
        raise UserError(f"{folder / INDEX}: has no weight_map from tensor names to file names")
    names = sorted(set(index.values()))
    for name in names:
        if name != Path(name).name or "\\" in name or not inside(folder / name, folder):
            raise UserError(f"{folder / INDEX}: names the file {name!r}, which is outside the model's folder")
    return [folder / name for name in names], index


def inside(file: Path, folder: Path) -> bool:
    """Whether a file really lies in the folder. Hugging Face's cache links from snapshots/x/ to its own blobs/."""
    folder, home = folder.resolve(), file.resolve().parent
    return home == folder or (folder.parent.name == "snapshots" and home == folder.parents[1] / "blobs")


def headers(folder: Path) -> dict[Path, dict[str, tuple[int, ...]]]:
    """{file: {tensor: shape}}, without reading the tensors. Raises UserError for a broken shard or a wrong index."""
    files, index = shard_files(folder)
    found = {file: header(file) for file in files}
    places = [(name, file.name) for file, names in found.items() for name in names]
    if index is not None and sorted(places) != sorted(index.items()):
        name, file = sorted(set(places) ^ set(index.items()))[0]
        raise UserError(f"{folder / INDEX}: index and files disagree, first about {name!r} in {file!r}; "
                        f"copy the folder again")
    codec = folder / CODEC_FOLDER / WHOLE
    return found | ({codec: header(codec)} if codec.exists() else {})


def header(file: Path) -> dict[str, tuple[int, ...]]:
    """{tensor: shape} of one file. Raises UserError for a broken one."""
    try:
        with safe_open(file, "pt") as shard:
            return {name: tuple(shard.get_slice(name).get_shape()) for name in shard.keys()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: missing, cut short or not a safetensors file ({error}); copy it again") from None


def check_bijection(folder: Path, stored: dict[str, tuple[int, ...]], omni: Omni) -> None:
    """Raise one UserError that lists every missing, extra and misshapen tensor."""
    wanted = {name: tuple(tensor.shape) for name, tensor in omni.state_dict().items()}
    stored = {name: shape for name, shape in stored.items() if name not in COMPUTED}
    missing, extra = sorted(wanted.keys() - stored.keys()), sorted(stored.keys() - wanted.keys())
    shapes = [f"{name} is {list(stored[name])}, expected {list(wanted[name])}"
              for name in sorted(wanted.keys() & stored.keys()) if stored[name] != wanted[name]]
    problems = [f"{len(names)} {what}: {', '.join(names)}"
                for what, names in (("missing", missing), ("extra", extra), ("of another shape", shapes)) if names]
    if problems:
        raise UserError(f"{folder}: the tensors are not those that config.json describes; {'; '.join(problems)}")


def read_shard(file: Path, names: dict, device: str | torch.device, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The tensors of one file, copied (so that the file can be replaced), in their precision, on the device."""
    tensors = {}
    with safe_open(file, "pt") as shard:
        for name in names:
            if name not in COMPUTED:
                precision = dtype if name.startswith(ANY_PRECISION) else torch.float32
                tensors[name] = shard.get_tensor(name).to(device, precision, copy=True)
    return tensors


def load_voices(file: Path, config: OmniConfig, device: str | torch.device = "cpu") -> dict[str, Voice]:
    """The voices of a spk_dict.pt, none where there is no file. Read as data, code is refused. Raises UserError."""
    if not file.exists():
        return {}
    try:
        with warnings.catch_warnings(action="ignore"):  # torch's remarks on strange pickles; ours follows
            data = torch.load(file, map_location=device, weights_only=True)
    except Exception as error:  # what a broken or hostile pickle raises is up to its author
        raise UserError(f"{file}: is cut short or wants to run code ({type(error).__name__}); "
                        f"get it from its source again") from None
    if not isinstance(data, dict):
        raise UserError(f"{file}: holds a {type(data).__name__}, not a dictionary of voices")
    return {str(name): voice_from(file, name, entry, config) for name, entry in data.items()}


def voice_from(file: Path, name: str, entry: dict, config: OmniConfig) -> Voice:
    """One entry, checked against the sizes: bos_token, cond [1, E], ref_mel [1, R, mel_dim]."""
    dit, rows = config.token2wav.dit, config.thinker.text.vocab_size
    try:
        bos, cond, ref_mel = int(entry["bos_token"]), entry["cond"].float(), entry["ref_mel"].float()
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(f"{file}: voice {name!r} must have an id bos_token and tensors cond and ref_mel") from None
    fits = cond.shape == (1, dit.enc_emb_dim) and ref_mel.ndim == 3 and ref_mel.shape[::2] == (1, dit.mel_dim)
    if not 0 <= bos < rows or not fits:
        raise UserError(f"{file}: voice {name!r} has bos_token {bos}, cond {list(cond.shape)}, ref_mel "
                        f"{list(ref_mel.shape)}; expected an id below {rows}, [1, {dit.enc_emb_dim}] and "
                        f"[1, frames, {dit.mel_dim}]")
    return Voice(str(name), bos, cond, ref_mel)
