"""Products of one row on all cores, and precisions of 16 bits that a CPU emulates."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import minomni
from minomni import devices
from minomni.checkpoint import cpu_products, saving, weights
from minomni.checkpoint.cpu_products import RowLinear, VectorLinear, WideLinear, tell_emulated
from minomni.train.finetune import weights_hash

CPU = torch.device("cpu")


@pytest.fixture
def in_hardware(monkeypatch):
    """A function that sets whether the processor multiplies bf16 and fp16."""
    tell_emulated.cache_clear()

    def choose(bf16: bool) -> None:
        instructions = {"architecture": "x86_64", "avx512_fp16": bf16}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: instructions)
        for module in (devices, cpu_products):
            monkeypatch.setattr(module, "has_bf16", lambda device: bf16)

    yield choose
    tell_emulated.cache_clear()


class Precisions(TorchDispatchMode):
    """Collects the precision of every result that is computed."""

    def __init__(self, found: list):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.found.append(result.dtype)
        return result


@pytest.fixture(scope="module")
def in_bf16(tmp_path_factory):
    """A folder in bf16."""
    omni = minomni.load("tiny", dtype="bf16")
    folder = tmp_path_factory.mktemp("models") / "bf16"
    saving.save(omni, folder)
    return folder


def precisions(omni) -> set[torch.dtype]:
    parts = (omni.thinker, omni.talker)
    return {parameter.dtype for part in parts for parameter in part.parameters()}


def wide_layers(omni) -> int:
    return sum(isinstance(module, WideLinear) for module in omni.modules())


@pytest.mark.parametrize("dtype", [None, "auto"])
def test_without_bf16_a_folder_is_loaded_in_fp32(in_bf16, in_hardware, capfd, dtype):
    in_hardware(False)
    omni = minomni.load(in_bf16, dtype=dtype)
    assert precisions(omni) == {torch.float32}
    assert wide_layers(omni) == 0
    assert omni.stored_dtype == torch.bfloat16
    assert capfd.readouterr().err == ""


def test_with_bf16_a_folder_keeps_it(in_bf16, in_hardware, capfd):
    in_hardware(True)
    omni = minomni.load(in_bf16)
    assert precisions(omni) == {torch.bfloat16}
    assert wide_layers(omni) == 0
    assert omni.stored_dtype is None
    assert capfd.readouterr().err == ""


def test_what_does_not_fit_in_fp32_keeps_bf16_and_one_line_tells_it(
    in_bf16, in_hardware, capfd, monkeypatch
):
    in_hardware(False)
    omni = minomni.load(in_bf16)
    widened = [*omni.thinker.parameters(), *omni.talker.parameters()]  # the rest stays mapped
    needed = 4 * sum(tensor.numel() for tensor in widened)
    monkeypatch.setattr(weights, "free_bytes", lambda device: int(needed / weights.MAX_SHARE) - 9)
    omni = minomni.load(in_bf16)
    assert precisions(omni) == {torch.bfloat16}
    assert wide_layers(omni) > 100
    line = capfd.readouterr().err
    assert line.count("\n") == 1
    assert "no instructions for bfloat16" in line
    assert "does not fit; free some memory, or --quantize int4" in line
    minomni.load(in_bf16)
    assert capfd.readouterr().err == ""  # once in a process

    monkeypatch.setattr(weights, "free_bytes", lambda device: int(needed / weights.MAX_SHARE) + 9)
    assert precisions(minomni.load(in_bf16)) == {torch.float32}


def test_a_precision_that_is_named_is_kept(in_bf16, in_hardware, capfd):
    in_hardware(False)
    assert precisions(minomni.load(in_bf16, dtype="bf16")) == {torch.bfloat16}
    line = capfd.readouterr().err
    assert line.count("\n") == 1
    assert line.endswith("which is the default; leave out dtype=\n")
    assert precisions(minomni.load(in_bf16, dtype="fp32")) == {torch.float32}
    assert capfd.readouterr().err == ""


def test_a_dit_in_bf16_multiplies_many_rows_in_fp32(in_bf16, in_hardware):
    in_hardware(False)
    omni = minomni.load(in_bf16, dit_dtype="bf16")
    assert precisions(omni) == {torch.float32}
    dit = omni.token2wav.code2wav_dit_model
    assert wide_layers(dit) == wide_layers(omni) > 10
    in_hardware(True)
    assert wide_layers(minomni.load(in_bf16, dit_dtype="bf16")) == 0


def test_saving_gives_the_stored_precision_again(in_bf16, in_hardware, tmp_path):
    in_hardware(False)
    saving.save(minomni.load(in_bf16), tmp_path / "again")
    first = load_file(in_bf16 / "model.safetensors")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert first.keys() == again.keys()
    for name, tensor in first.items():
        assert again[name].dtype == tensor.dtype, name
        assert torch.equal(again[name], tensor), name
    assert (in_bf16 / "config.json").read_text() == (tmp_path / "again/config.json").read_text()


def test_int8_multiplies_many_rows_in_fp32(in_bf16, in_hardware, capfd):
    pytest.importorskip("torchao", reason="torchao is not installed")
    in_hardware(False)
    omni = minomni.load(in_bf16, quantize="int8")
    layer = omni.thinker.model.layers[0].mlp.up_proj
    assert isinstance(layer, WideLinear)
    assert capfd.readouterr().err == ""
    x = torch.randn(40, layer.in_features).bfloat16()
    with torch.no_grad():
        wide, plain = layer(x), nn.Linear.forward(layer, x)
    assert wide.dtype == torch.bfloat16
    torch.testing.assert_close(wide, plain, atol=0.03, rtol=0.03)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("rows", "widens"), [(1, False), (15, False), (16, True), (70, True)])
def test_many_rows_are_multiplied_in_fp32(rows, widens, bias, monkeypatch):
    layer = nn.Linear(48, 24, bias=bias).bfloat16().requires_grad_(False)
    x = torch.randn(1, rows, 48).bfloat16()
    exact = layer.float()(x.float())
    layer.bfloat16()
    layer.__class__ = WideLinear
    precisions = []
    plain = nn.functional.linear

    def linear(x, weight, bias):
        precisions.append(weight.dtype)
        return plain(x, weight, bias)

    monkeypatch.setattr(nn.functional, "linear", linear)
    found = layer(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), exact, atol=0.02, rtol=0.02)
    assert precisions == [torch.float32 if widens else torch.bfloat16]


def test_an_encoder_that_runs_on_another_device_multiplies_as_it_is():
    """Such as one that is kept in the host's memory; the meta device stands for a GPU."""
    layer = nn.Linear(48, 24).bfloat16().requires_grad_(False).to("meta")
    layer.__class__ = WideLinear
    x = torch.empty(70, 48, dtype=torch.bfloat16, device="meta")
    precisions = []
    with Precisions(precisions):
        layer(x)
    assert set(precisions) == {torch.bfloat16}


@pytest.mark.parametrize("bias", [True, False])
def test_under_autocast_a_row_has_its_precision(threads, bias):
    threads(2)
    layer = nn.Linear(12, 20, bias=bias)
    row = torch.randn(1, 12)
    with torch.autocast("cpu", torch.bfloat16):
        expected = layer(row)
        layer.__class__ = RowLinear
        found = layer(row)
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected)


def test_a_layer_that_is_trained_multiplies_as_it_is():
    layer = nn.Linear(48, 24).bfloat16()
    layer.__class__ = WideLinear
    x = torch.randn(70, 48).bfloat16().requires_grad_()
    expected = nn.Linear.forward(layer, x)
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("bf16", [False, True])
def test_which_precisions_a_processor_emulates(in_hardware, monkeypatch, bf16):
    in_hardware(bf16)
    assert devices.is_emulated(torch.bfloat16, CPU) == (not bf16)
    assert not devices.is_emulated(torch.float32, CPU)
    assert not devices.is_emulated(torch.float64, CPU)
    assert not devices.is_emulated(torch.bfloat16, torch.device("cuda"))
    assert devices.is_emulated(torch.float16, CPU) == (not bf16)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "arm64"})
    assert not devices.is_emulated(torch.float16, CPU)


def test_a_run_goes_on_in_another_precision(in_bf16, in_hardware):
    """The digest of a model is that of its folder, with and without room for fp32."""
    in_hardware(False)
    widened = minomni.load(in_bf16)
    in_hardware(True)
    assert weights_hash(widened) == weights_hash(minomni.load(in_bf16))


def test_each_process_needs_room(in_bf16, in_hardware, monkeypatch):
    in_hardware(False)
    omni = minomni.load(in_bf16)
    widened = [*omni.thinker.parameters(), *omni.talker.parameters()]
    needed = 4 * sum(tensor.numel() for tensor in widened)
    monkeypatch.setattr(weights, "free_bytes", lambda device: int(1.5 * needed / weights.MAX_SHARE))
    assert precisions(minomni.load(in_bf16)) == {torch.float32}
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert precisions(minomni.load(in_bf16)) == {torch.bfloat16}


def test_saving_converts_one_shard_at_a_time(in_bf16, in_hardware, tmp_path, monkeypatch):
    """Shards are planned by what is written, which has half of the bytes."""
    in_hardware(False)
    omni = minomni.load(in_bf16)
    write_file = saving.write_file

    def write_unconverted(tensors, *arguments):
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
        write_file(tensors, *arguments)

    monkeypatch.setattr(saving, "write_file", write_unconverted)
    saving.save(omni, tmp_path / "again", shard_bytes=4_000_000)
    index = json.loads((tmp_path / "again/model.safetensors.index.json").read_text())
    sizes = [file.stat().st_size for file in (tmp_path / "again").glob("model-*.safetensors")]
    assert max(sizes) < 4_100_000
    assert 0 <= sum(sizes) - index["metadata"]["total_size"] < 500_000


@pytest.fixture
def threads():
    """A function that sets how many threads PyTorch has, until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def row_layers(omni) -> set[str]:
    return {name for name, module in omni.named_modules() if isinstance(module, RowLinear)}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("size", "inner", "cores"), [(96, 40, 2), (30, 7, 4), (31, 8, 2)])
def test_one_row_is_multiplied_in_blocks_of_outputs(threads, monkeypatch, size, inner, cores, bias):
    """As many as there are threads, or as divide the outputs; several rows are left to PyTorch."""
    threads(cores)
    layer = nn.Linear(inner, size, bias=bias)
    rows = torch.randn(3, 1, inner)
    expected = [layer(row) for row in rows]
    layer.__class__ = RowLinear
    blocks = []
    batched = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda x, w: [blocks.append(len(w)), batched(x, w)][1])
    for row, right in zip(rows, expected, strict=True):
        torch.testing.assert_close(layer(row), right)
        torch.testing.assert_close(layer(row[0]), right[0])
        torch.testing.assert_close(layer(row[None]), right[None])
    several = layer(rows)
    assert blocks == ([2] * 9 if size % 2 == 0 else [])
    assert torch.equal(several, nn.Linear.forward(layer, rows))


def test_on_one_thread_a_row_is_left_to_pytorch(threads, monkeypatch):
    threads(1)
    layer = nn.Linear(16, 32)
    layer.__class__ = RowLinear
    row = torch.randn(1, 16)
    monkeypatch.delattr(torch, "bmm")
    assert torch.equal(layer(row), nn.Linear.forward(layer, row))


def test_gradients_are_those_of_a_linear_layer(threads):
    threads(2)
    layer = nn.Linear(12, 20)
    row = torch.randn(1, 12, requires_grad=True)
    tensors = [row, *layer.parameters()]
    expected = torch.autograd.grad(layer(row).square().sum(), tensors)
    layer.__class__ = RowLinear
    found = torch.autograd.grad(layer(row).square().sum(), tensors)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_large_layers_in_fp32_multiply_one_row_on_all_cores(in_bf16, in_hardware, monkeypatch):
    in_hardware(True)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert row_layers(minomni.load("tiny")) == set()  # its weights are small
    monkeypatch.setattr(cpu_products, "MIN_WEIGHT", 1)
    every = row_layers(minomni.load("tiny"))
    assert {"thinker.lm_head", "talker.codec_head", "thinker.model.layers.0.mlp.up_proj"} <= every
    half = row_layers(minomni.load(in_bf16, dtype="bf16"))
    assert not any(name.startswith(("thinker.", "talker.")) for name in half)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: False)
    assert row_layers(minomni.load("tiny")) == set()


def test_answers_are_the_same_on_all_cores(threads, monkeypatch):
    threads(2)
    question = [{"role": "user", "content": "say the red square is above the blue circle"}]
    # Few codes: on cores that others use, too, each product waits for both threads.
    options = {"temperature": 0, "talker_temperature": 0, "talker_max_new_tokens": 8}
    expected = minomni.load("tiny").respond(question, **options)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(cpu_products, "MIN_WEIGHT", 1)
    omni = minomni.load("tiny")
    assert len(row_layers(omni)) > 50
    answer = omni.respond(question, **options)
    assert answer.text == expected.text
    assert torch.equal(torch.as_tensor(answer.codes), torch.as_tensor(expected.codes))
    torch.testing.assert_close(answer.wave, expected.wave, atol=1e-4, rtol=0)


@pytest.mark.parametrize("bias", [True, False])
def test_one_row_in_bf16_is_a_vector(monkeypatch, bias):
    """Several rows are left to PyTorch, and so are other devices."""
    layer = nn.Linear(40, 96, bias=bias).bfloat16().requires_grad_(False)
    rows = torch.randn(3, 1, 40).bfloat16()
    exact = [nn.Linear.forward(layer, row).float() for row in rows]
    layer.__class__ = VectorLinear
    vectors = []
    product = torch.mv
    monkeypatch.setattr(torch, "mv", lambda w, x: [vectors.append(len(x)), product(w, x)][1])
    for row, right in zip(rows, exact, strict=True):
        for shaped, expected in ((row, right), (row[0], right[0]), (row[None], right[None])):
            found = layer(shaped)
            assert found.dtype == torch.bfloat16
            torch.testing.assert_close(found.float(), expected, atol=0.02, rtol=0.02)
    assert torch.equal(layer(rows), nn.Linear.forward(layer, rows))
    layer.to("meta")(rows[0].to("meta"))
    assert vectors == [40] * 9


def test_layers_in_bf16_multiply_one_row_as_a_vector(in_bf16, in_hardware):
    def vector_layers(omni) -> set[str]:
        return {name for name, layer in omni.named_modules() if isinstance(layer, VectorLinear)}

    in_hardware(True)
    found = vector_layers(minomni.load(in_bf16))
    assert {"thinker.lm_head", "talker.codec_head", "thinker.model.layers.0.mlp.up_proj"} <= found
    assert not any(name.startswith("token2wav.") for name in found)  # it stays in fp32
    in_hardware(False)
    assert vector_layers(minomni.load(in_bf16, dtype="bf16")) == set()


def test_quantized_layers_are_left_alone(monkeypatch):
    pytest.importorskip("torchao", reason="torchao is not installed")
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(cpu_products, "MIN_WEIGHT", 1)
    every = row_layers(minomni.load("tiny", quantize="int8"))
    assert "thinker.model.layers.0.mlp.up_proj" not in every
    assert "codec.ctc_head" in every
