"""Folders packed by GPTQ and AWQ load as the numbers that the formats' formulas give."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from safetensors.torch import load_file, save_file

import minomni
from minomni.checkpoint import saving, weights
from minomni.checkpoint.check_folder import check_folder
from minomni.checkpoint.packed_weights import packed_format
from minomni.checkpoint.quantize import quantize_tensor
from minomni.errors import UserError
from minomni.inputs.tokenizer import Tokenizer, special_tokens
from minomni.omni import Omni

# Of the release packed by GPTQModel; AWQ's by AutoAWQ.
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True, "sym": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
FORMATS = {
    "gptq": GPTQ,
    "gptq_v2": {**GPTQ, "checkpoint_format": "gptq_v2"},
    "one group": {**GPTQ, "group_size": -1},
    "awq": AWQ,
}
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the output that AWQ puts into the first, second, ... place
VARIANTS = ("gptq_v2", "one group")
LAYERS = re.compile(r"thinker\.model\.layers\.\d+\.\w+\.\w+_proj\.weight")


def random_parts(settings: dict, in_features: int, out_features: int, seed: int) -> dict:
    """Unpacked parts of a weight: numbers [in, out], zeros [groups, out] and so on."""
    random = np.random.RandomState(seed)
    size = in_features if settings["group_size"] == -1 else settings["group_size"]
    groups = in_features // size
    group_of = np.arange(in_features) // size
    if settings.get("desc_act"):
        random.shuffle(group_of)
    return {
        "numbers": random.randint(0, 16, (in_features, out_features)),
        "zeros": random.randint(1, 16, (groups, out_features)),
        "scales": random.uniform(0.001, 0.02, (groups, out_features)).astype(np.float16),
        "group_of": group_of,
    }


def place(value: int, index: int) -> int:
    """A number of four bits at one of eight places of a word."""
    return value << (4 * index)


def signed(words: np.ndarray) -> torch.Tensor:
    """Words of 32 bits as int32."""
    return torch.from_numpy(words.astype(np.uint32).view(np.int32))


def pack_rows(numbers: np.ndarray) -> torch.Tensor:
    """[n, m] -> int32 [n / 8, m], eight rows in one."""
    words = np.zeros((len(numbers) // 8, numbers.shape[1]), np.int64)
    for row in range(len(numbers)):
        words[row // 8] |= place(numbers[row], row % 8)
    return signed(words)


def pack_columns(numbers: np.ndarray, order: tuple[int, ...]) -> torch.Tensor:
    """[n, m] -> int32 [n, m / 8], eight columns in one, in this order."""
    words = np.zeros((len(numbers), numbers.shape[1] // 8), np.int64)
    for column in range(words.shape[1]):
        for index in range(8):
            words[:, column] |= place(numbers[:, 8 * column + order[index]], index)
    return signed(words)


def pack(settings: dict, parts: dict) -> dict[str, torch.Tensor]:
    """The tensors of a packed weight, as the programs store them."""
    packed = {"scales": torch.from_numpy(parts["scales"])}
    if settings["quant_method"] == "awq":
        packed["qweight"] = pack_columns(parts["numbers"], AWQ_ORDER)
        packed["qzeros"] = pack_columns(parts["zeros"], AWQ_ORDER)
        return packed
    offset = 0 if settings.get("checkpoint_format") == "gptq_v2" else 1
    packed["qweight"] = pack_rows(parts["numbers"])
    packed["qzeros"] = pack_columns(parts["zeros"] - offset, tuple(range(8)))
    packed["g_idx"] = torch.from_numpy(parts["group_of"].astype(np.int32))
    return packed


def weight_of(parts: dict) -> np.ndarray:
    """The weight [out, in] by the formula, input by input."""
    columns = []
    for numbers, group in zip(parts["numbers"], parts["group_of"], strict=True):
        centered = (numbers - parts["zeros"][group]).astype(np.float32)
        columns.append(centered * parts["scales"][group].astype(np.float32))
    return np.stack(columns, axis=1)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A plain folder in bf16."""
    omni = Omni(oracle.CONFIG).eval()
    oracle.fill(omni.state_dict())
    omni.thinker.bfloat16()
    omni.talker.bfloat16()
    omni.voices = oracle.voices()
    omni.tokenizer = Tokenizer.train(["say the red circle"], 270, special_tokens(oracle.TOKENS))
    folder = tmp_path_factory.mktemp("models") / "plain"
    saving.save(omni, folder)
    return folder


def packed_folder(plain: Path, folder: Path, settings: dict) -> dict[str, np.ndarray]:
    """Write a folder with the Thinker's layers packed, in two files that split a layer's parts ->
    {name: weight by the formula}.
    """
    shutil.copytree(plain, folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = settings
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    expected = {}
    for seed, name in enumerate([name for name in tensors if LAYERS.fullmatch(name)]):
        out_features, in_features = tensors.pop(name).shape
        parts = random_parts(settings, in_features, out_features, seed)
        expected[name] = weight_of(parts)
        for part, tensor in pack(settings, parts).items():
            tensors[f"{name.removesuffix('weight')}{part}"] = tensor
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    for number in (1, 2):
        half = {name: tensors[name] for name in names[number - 1 :: 2]}
        save_file(half, folder / f"model-{number:05}-of-00002.safetensors")
    return expected


@pytest.mark.parametrize(
    "kind", ["gptq", "awq", *(pytest.param(kind, marks=pytest.mark.slow) for kind in VARIANTS)]
)
def test_packed_folders_load(plain, tmp_path, kind):
    """As bf16, in fp32 without rounding, and so that the model answers."""
    expected = packed_folder(plain, tmp_path / "packed", FORMATS[kind])
    assert len(expected) == 21
    omni = minomni.load(tmp_path / "packed")
    exact = minomni.load(tmp_path / "packed", dtype="float32")
    for name, weight in expected.items():
        found = omni.get_parameter(name)
        assert found.dtype == (torch.float32 if omni.stored_dtype else torch.bfloat16)
        assert torch.equal(exact.get_parameter(name), torch.from_numpy(weight)), name
        assert torch.equal(found, torch.from_numpy(weight).bfloat16().to(found.dtype)), name
    other = minomni.load(plain)
    for name, tensor in other.state_dict().items():
        if name not in expected:
            assert torch.equal(tensor, omni.get_parameter(name)), name
    with torch.no_grad():
        assert omni.thinker(oracle.inputs("text")).isfinite().all()


def test_packed_weights_are_quantized_again(plain, tmp_path):
    """The unpacked weights, in torchao's int8."""
    pytest.importorskip("torchao")
    expected = packed_folder(plain, tmp_path / "packed", GPTQ)
    omni = minomni.load(tmp_path / "packed", quantize="int8")
    for name, weight in expected.items():
        ours = omni.get_parameter(name)
        again = quantize_tensor(torch.from_numpy(weight).bfloat16(), "int8")
        assert torch.equal(ours.qdata, again.qdata), name
        assert torch.equal(ours.scale, again.scale), name


def test_a_packed_thinker_alone(plain, tmp_path):
    """Its tensors have no prefix."""
    folder = tmp_path / "packed"
    expected = packed_folder(plain, folder, AWQ)
    config = json.loads((folder / "config.json").read_text())
    thinker = config["thinker_config"] | {"quantization_config": AWQ}
    (folder / "config.json").write_text(json.dumps(thinker))
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        kept = [name for name in tensors if name.startswith("thinker.")]
        save_file({name.removeprefix("thinker."): tensors[name] for name in kept}, file)
    omni = minomni.load(folder)
    assert omni.talker is None
    for name, weight in expected.items():
        assert torch.equal(
            omni.get_parameter(name).bfloat16(), torch.from_numpy(weight).bfloat16()
        ), name


def test_a_packed_model_is_saved_as_a_plain_one(plain, tmp_path):
    packed_folder(plain, tmp_path / "packed", GPTQ)
    (tmp_path / "packed" / "quantize_config.json").write_text("{}")
    omni = minomni.load(tmp_path / "packed")
    minomni.save(omni, tmp_path / "saved")
    again = minomni.load(tmp_path / "saved")
    for name, tensor in omni.state_dict().items():
        assert torch.equal(tensor, again.get_parameter(name)), name
    assert not (tmp_path / "saved" / "quantize_config.json").exists()
    assert "quantization_config" not in (tmp_path / "saved" / "config.json").read_text()


def test_check_names_the_packing(plain, tmp_path):
    packed_folder(plain, tmp_path / "packed", AWQ)
    report = check_folder(tmp_path / "packed")
    assert report.errors == []
    assert report.kind.endswith("packed in 4 bits by AWQ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, key: t.pop(f"{key}.qzeros"), "has no qzeros, which gptq stores beside"),
        (
            lambda t, key: t.update({f"{key}.scales": t[f"{key}.scales"][:, 1:].contiguous()}),
            r"scales is F16 \[2, 63\]; .*group_size 32, gptq has \[2, 64\]",
        ),
        (
            lambda t, key: t.update({f"{key}.qweight": t[f"{key}.qweight"].float()}),
            r"qweight is F32",
        ),
        (
            lambda t, key: t.update({f"{key}.qweight": torch.zeros(8, dtype=torch.int32)}),
            r"qweight is I32 \[8\]",
        ),
        (
            lambda t, key: t.update({f"{key}.qweight": torch.zeros(0, 64, dtype=torch.int32)}),
            r"qzeros is I32 \[2, 8\]; beside qweight \[0, 64\]",
        ),
        (
            lambda t, key: t[f"{key}.g_idx"].fill_(7),
            r"g_idx names groups outside of 0 to 1",
        ),
    ],
)
def test_broken_parts_are_one_line(plain, tmp_path, change, message):
    folder = tmp_path / "packed"
    packed_folder(plain, folder, GPTQ)
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
        file.unlink()
    change(tensors, "thinker.model.layers.0.self_attn.q_proj")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match=message) as error:
        weights.load(folder)
    assert "\n" not in str(error.value)


def test_a_plain_folder_that_says_it_is_packed(plain, tmp_path):
    folder = Path(shutil.copytree(plain, tmp_path / "plain"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": GPTQ}))
    with pytest.raises(UserError, match="says that weights are packed by gptq, and none are"):
        weights.load(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"bits": 8},
        {"quant_method": "fp8"},
        {"group_size": 0},
        {"group_size": "32"},
        {"checkpoint_format": "marlin"},
        {"checkpoint_format": ["gptq"]},
    ],
)
def test_other_formats_are_not_taken_for_ours(changes):
    assert packed_format(GPTQ) is not None
    assert packed_format(GPTQ | changes) is None


@pytest.mark.parametrize("changes", [{"version": "gemv"}, {"zero_point": False}])
def test_other_formats_of_awq(changes):
    assert packed_format(AWQ) is not None
    assert packed_format(AWQ | changes) is None
