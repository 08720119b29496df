"""Weights in int8 and int4: what is quantized, how much memory loading takes, and how far the
answers are from those in fp32.
"""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import oracle
import pytest
import torch
from live_bytes import LiveBytes
from torch import Tensor, nn

import minomni
from minomni import __main__ as command
from minomni.checkpoint import memory, quantize, saving, weights
from minomni.checkpoint.memory import weight_bytes
from minomni.checkpoint.random_checkpoint import make_checkpoint, scale_widths
from minomni.config import QWEN7B, SamplingConfig
from minomni.errors import UserError
from minomni.inputs.prompt import Processor
from minomni.omni import Omni
from minomni.talker.talker import talker_inputs

ROOT = Path(__file__).parents[2]
TINY = ROOT / "data_samples" / "tiny"
GREEDY = SamplingConfig(
    temperature=0.0, top_k=0, top_p=1.0, repetition_penalty=1.0, max_new_tokens=60
)
SENTENCES = (
    "say the red circle is above the blue square",
    "say the green triangle is left of the yellow star",
    "say the blue square is below the red circle",
    "say yes",
    "say four",
    "say the digit is three",
)


@pytest.fixture(autouse=True, scope="module")
def torchao():
    """Imported by the tests alone: every process of pytest-xdist imports every test file."""
    return pytest.importorskip("torchao")


def wide_talker():
    """The oracle's sizes with a Talker whose width is a multiple of 32."""
    decoder = replace(oracle.CONFIG.talker.decoder, hidden_size=64)
    return replace(oracle.CONFIG, talker=replace(oracle.CONFIG.talker, decoder=decoder))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model with the oracle's weights in fp32."""
    omni = Omni(wide_talker()).eval()
    oracle.fill(omni.state_dict())
    omni.voices = oracle.voices()
    folder = tmp_path_factory.mktemp("models") / "saved"
    saving.save(omni, folder)
    return folder


def quantized_names(omni: Omni) -> set[str]:
    """The names of the weights that are not plain tensors."""
    return {name for name, weight in omni.named_parameters() if type(weight.data) is not Tensor}


def linear_names(omni: Omni, *prefixes: str) -> set[str]:
    """The weights of the linear layers whose names begin so."""
    names = set()
    for name, module in omni.named_modules():
        if isinstance(module, nn.Linear) and name.startswith(prefixes):
            names.add(f"{name}.weight")
    return names


# ----------------------------------------------------------------------------------------------
# what is quantized
@pytest.mark.parametrize("method", ["int8", "int4"])
def test_the_layers_of_both_decoders_are_quantized(method):
    omni = minomni.load(TINY, quantize=method)
    names = quantized_names(omni)
    assert names == linear_names(omni, "thinker.model.layers.", "talker.model.layers.")
    assert len(names) == 7 * 8
    for name, weight in omni.named_parameters():
        expected = torch.bfloat16 if name.startswith(("thinker.", "talker.")) else torch.float32
        assert weight.dtype == expected, name
        assert weight.requires_grad == (name not in names), name
    assert omni.quantized == method


@pytest.mark.slow
def test_head_and_encoders_by_choice():
    omni = minomni.load(TINY, quantize="int4+head+encoders")
    encoders = linear_names(omni, "thinker.audio_tower.", "thinker.visual.")
    heads = {"thinker.lm_head.weight", "talker.codec_head.weight"}
    layers = linear_names(omni, "thinker.model.layers.", "talker.model.layers.")
    assert len(encoders) > 30
    assert quantized_names(omni) == encoders | heads | layers
    image = {"type": "image", "image": str(ROOT / "data_samples" / "scene.png")}
    audio = {"type": "audio", "audio": str(ROOT / "data_samples" / "question.wav")}
    reply = omni.respond([{"role": "user", "content": [image, audio]}])
    assert reply.wave.isfinite().all()
    assert reply.seconds > 0.5


def test_int8_is_within_half_a_step_of_each_row(saved):
    """Of weight and output: the largest number of a row becomes 127."""
    plain = minomni.load(saved)
    omni = minomni.load(saved, quantize="int8", dtype="float32")
    layer, exact = omni.thinker.model.layers[0].mlp.up_proj, plain.thinker.model.layers[0].mlp
    steps = exact.up_proj.weight.abs().amax(1) / 127
    rounded = layer.weight.dequantize()
    assert ((rounded - exact.up_proj.weight).abs() <= 0.505 * steps[:, None]).all()
    x = torch.randn(5, 64)
    assert torch.allclose(layer(x), x @ rounded.T, atol=1e-5)


def test_int4_is_within_half_a_step_of_each_group(saved):
    """A group spans its smallest to its largest number in 15 steps.

    Scale, zero point and output are rounded to bf16, which adds up to a tenth of a step.
    """
    plain = minomni.load(saved)
    omni = minomni.load(saved, quantize="int4")
    layer = omni.thinker.model.layers[0].mlp.down_proj  # 128 inputs
    exact = plain.thinker.model.layers[0].mlp.down_proj.weight.bfloat16().float()
    with torch.no_grad():
        rounded = layer(torch.eye(128, dtype=torch.bfloat16)).float().T
    step = (exact.amax(1) - exact.amin(1)) / 15
    assert ((rounded - exact).abs() <= 0.6 * step[:, None]).all()
    levels = [len(row.unique()) for row in rounded]
    assert max(levels) <= 16


@pytest.mark.slow
def test_plain_and_static_steps_agree(saved):
    """A quantized model decodes by static steps, too."""
    omni = minomni.load(saved, quantize="int8", dtype="float32")
    options = {"max_new_tokens": 6, "talker_max_new_tokens": 8}
    plain = omni.generate(oracle.inputs("batch"), "Chelsie", **options)
    omni.use_static_steps()
    static = omni.generate(oracle.inputs("batch"), "Chelsie", **options)
    assert static.tokens == plain.tokens
    for codes, expected in zip(static.codes, plain.codes, strict=True):
        assert torch.equal(codes, expected)


# ----------------------------------------------------------------------------------------------
# memory
def test_live_bytes_counts():
    with LiveBytes() as counted:
        kept = torch.zeros(100)
        view = kept[10:]
        for _ in range(3):
            torch.zeros(1000) + 1
    assert counted.live == 400
    assert counted.peak == 400 + 2 * 4000
    del kept, view
    assert counted.live == 0


def deep():
    """A model whose bytes are mostly those of the Thinker's layers, as the 7B's are."""
    config = scale_widths(QWEN7B, 0.125)
    thinker, talker = config.thinker, config.talker
    return replace(
        config,
        thinker=replace(
            thinker,
            audio=replace(thinker.audio, encoder_layers=1),
            vision=replace(thinker.vision, depth=1, fullatt_block_indexes=(0,)),
            text=replace(thinker.text, num_hidden_layers=14, vocab_size=512),
            tokens=oracle.TOKENS,
        ),
        talker=replace(
            talker, decoder=replace(talker.decoder, hidden_size=128, num_hidden_layers=2)
        ),
    )


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deep") / "model"
    make_checkpoint(deep(), folder)
    return folder


@pytest.mark.parametrize("method", [pytest.param("int8", marks=pytest.mark.slow), "int4"])
def test_loading_takes_at_most_one_shard_more_than_the_model(shards, method):
    """All bytes of tensors count, also those that are mapped."""
    files = [file.stat().st_size for file in shards.glob("*.safetensors")]
    with LiveBytes() as counted:
        omni = weights.load(shards, quantize=method)
    finished = counted.live
    print(f"{method}: {sum(files):,} stored, {finished:,} loaded, {counted.peak:,} at most")
    assert len(files) == 5
    assert counted.peak <= finished + max(files)
    # Quantizing after loading would not pass.
    assert sum(files) > finished + max(files)
    # The memory table counts the same bytes.
    quantization = quantize.parse_quantize(method)
    expected = weight_bytes(omni.stored_tensors(), torch.bfloat16, quantization)
    assert finished == pytest.approx(expected, rel=0.02)


def test_what_does_not_fit_is_refused_with_what_would(monkeypatch):
    tensors = Omni(wide_talker()).stored_tensors()
    cpu = torch.device("cpu")

    def refusal(free: int) -> str:
        monkeypatch.setattr(memory, "free_bytes", lambda device: free)
        with pytest.raises(UserError) as error:
            memory.check_fits(Path("model"), tensors, cpu, torch.float32, None, {})
        assert "\n" not in str(error.value)
        return str(error.value)

    sizes = {}
    for option in memory.OPTIONS:
        quantization = quantize.parse_quantize(option)
        sizes[option] = weight_bytes(tensors, torch.bfloat16, quantization)
    assert sorted(sizes.values(), reverse=True) == list(sizes.values())
    message = refusal(sizes["int4"])
    assert re.search(
        r"would fit, in GiB: quantize=int4 0\.0, quantize=int4\+head\+encoders 0\.0$", message
    )
    message = refusal(sizes["int4+head+encoders"] - 1)
    assert message.endswith("no quantization fits either; give another device")
    # With an option that fits there is no error.
    four = quantize.parse_quantize("int4")
    monkeypatch.setattr(memory, "free_bytes", lambda device: sizes["int4"])
    memory.check_fits(Path("model"), tensors, cpu, torch.bfloat16, four, {})


def test_load_refuses_before_it_reads(saved, monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 0)
    monkeypatch.setattr(weights, "read_shard", None)
    refuse("the weights take .* and cpu has 0.0 GiB free", saved, dtype="float64")


@pytest.mark.skipif(os.name == "nt", reason="everything is copied on Windows")
def test_mapped_tensors_take_no_memory(saved, monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 0)
    assert minomni.load(saved).thinker.lm_head.weight.dtype == torch.float32


@pytest.mark.skipif(not memory.MEMINFO.exists(), reason="free memory is known on Linux only")
def test_free_bytes_of_this_machine(tmp_path, monkeypatch):
    cpu = torch.device("cpu")
    assert 0 < memory.free_bytes(cpu) < 2**50
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "none")
    monkeypatch.setattr(memory, "PROCESS_CGROUPS", tmp_path / "none")
    assert memory.free_bytes(cpu) is None


CGROUPS = {
    "version 2": ("0::/pod/box", ".", "memory.max", "memory.current", ""),
    "version 1": (
        "7:cpu,cpuacct:/pod/box\n4:memory:/pod/box",
        "memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_",
    ),
}


@pytest.mark.parametrize("version", CGROUPS)
@pytest.mark.parametrize("group", ["", "pod", "pod/box"])
def test_free_bytes_of_a_container(version, group, tmp_path, monkeypatch):
    """The limit may be that of a group around the process's own, and pages of files are free."""
    lines, folder, limit, used, prefix = CGROUPS[version]
    (tmp_path / "cgroup").write_text(lines + "\n")
    monkeypatch.setattr(memory, "PROCESS_CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "none")
    monkeypatch.setattr(memory, "CGROUPS", tmp_path / "fs")
    for inside in ("", "pod", "pod/box"):
        files = tmp_path / "fs" / folder / inside
        files.mkdir(parents=True, exist_ok=True)
        (files / limit).write_text("max\n" if version == "version 2" else f"{2**63 - 4096}\n")
        (files / used).write_text("300\n")
        stat = f"{prefix}inactive_file 150\n{prefix}active_file 50\n{prefix}anon 100\n"
        (files / "memory.stat").write_text(stat)
    (tmp_path / "fs" / folder / group / limit).write_text("1000\n")
    assert memory.free_bytes(torch.device("cpu")) == 1000 - 300 + 200

    # The limit counts where cached pages are not told.
    (tmp_path / "fs" / folder / group / "memory.stat").unlink()
    assert memory.free_bytes(torch.device("cpu")) == 1000 - 300


def test_free_bytes_where_the_own_control_group_is_not_shown(tmp_path, monkeypatch):
    """As in a container that sees its own group as the root."""
    (tmp_path / "cgroup").write_text("0::/pod/box\n")
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("300\n")
    monkeypatch.setattr(memory, "PROCESS_CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "none")
    monkeypatch.setattr(memory, "CGROUPS", tmp_path)
    assert memory.free_bytes(torch.device("cpu")) == 1000 - 300


# ----------------------------------------------------------------------------------------------
# quality
@pytest.fixture(scope="module")
def reference():
    """The trained model in fp32, and for each sentence its inputs, reply and codes."""
    torch.set_num_threads(1)
    omni = minomni.load(TINY, dtype="float32")
    processor = Processor(omni.config, omni.tokenizer)
    rows = []
    for sentence in SENTENCES:
        inputs = processor([[{"role": "user", "content": sentence}]])
        reply = omni.thinker.generate(inputs, GREEDY)
        speech = talker_inputs(
            reply,
            [omni.voices["Anna"].bos_token],
            omni.config.thinker.tokens,
            omni.thinker.model.embed_tokens,
        )
        codes = omni.talker.generate(speech, GREEDY, omni.num_codes)
        rows.append((inputs, reply, speech, codes))
    return omni, rows


def text_logits(omni: Omni, inputs, reply) -> Tensor:
    """Logits [n, V] of the reply's tokens, each after those before it."""
    tokens = torch.tensor(reply.tokens)
    ids = torch.cat((inputs.input_ids, tokens), dim=1)
    whole = replace(inputs, input_ids=ids, attention_mask=torch.ones_like(ids))
    return omni.thinker(whole)[0, inputs.input_ids.shape[1] - 1 : -1].float()


def code_logits(omni: Omni, speech, codes) -> Tensor:
    """Logits [n, V] of the codes, each after those before it."""
    dtype = omni.talker.codec_head.weight.dtype
    speech = replace(
        speech,
        prompt=speech.prompt.to(dtype),
        voice=speech.voice.to(dtype),
        reply_embeds=[row.to(dtype) for row in speech.reply_embeds],
    )
    embeds, position_ids, mask, targets = omni.talker.teacher_forced(speech, codes)
    return omni.talker(embeds, position_ids, mask)[0][targets[0] >= 0]


def compare(expected: list[Tensor], found: list[Tensor]) -> tuple[float, float]:
    """Mean KL divergence of the distributions in nats, and the share of equal greedy ids."""
    p, q = torch.cat(expected).log_softmax(-1), torch.cat(found).log_softmax(-1)
    divergence = (p.exp() * (p - q)).sum(-1).mean()
    equal = (p.argmax(-1) == q.argmax(-1)).float().mean()
    return float(divergence), float(equal)


@pytest.mark.parametrize(
    ("method", "dtype", "text_bounds", "code_bounds"),
    [
        ("int8", "float32", (0.005, 0.98), (0.005, 0.98)),
        # In bf16, which also rounds the activations: measured 0.979.
        ("int8", None, (0.005, 0.98), (0.005, 0.97)),
        ("int4", None, (0.05, 0.9), (0.15, 0.8)),
        # The head decides most among codes, of which many are nearly as likely: measured 0.78.
        ("int4+head+encoders", None, (0.05, 0.9), (0.15, 0.75)),
    ],
)
def test_answers_stay_close_to_fp32(reference, method, dtype, text_bounds, code_bounds):
    """KL of the next id's distribution and share of equal greedy ids, for text and for codes."""
    plain, rows = reference
    omni = minomni.load(TINY, dtype=dtype, quantize=method)
    results = {}
    with torch.no_grad():
        results["text"] = compare(
            [text_logits(plain, inputs, reply) for inputs, reply, _, _ in rows],
            [text_logits(omni, inputs, reply) for inputs, reply, _, _ in rows],
        )
        results["codes"] = compare(
            [code_logits(plain, speech, codes) for _, _, speech, codes in rows],
            [code_logits(omni, speech, codes) for _, _, speech, codes in rows],
        )
    for name, (divergence, equal) in results.items():
        print(f"{method} {dtype} {name}: KL {divergence:.5f}, equal {equal:.3f}")
    for name, (most, least) in (("text", text_bounds), ("codes", code_bounds)):
        divergence, equal = results[name]
        assert 0 < divergence < most, name
        assert equal > least, name


# ----------------------------------------------------------------------------------------------
# errors
def refuse(message: str, *arguments, **options) -> None:
    with pytest.raises(UserError, match=message) as error:
        minomni.load(*arguments, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["int2", "", "int4+", "int4+voice", "int4+head+head", "head", 4])
def test_unknown_quantizations(text):
    refuse(r"quantize is .*; expected int8 or int4, and behind it \+head", TINY, quantize=text)


def test_int4_needs_bf16(saved):
    refuse(
        "int4 computes in bfloat16, and dtype is float32", saved, quantize="int4", dtype="float32"
    )


def test_int8_has_no_float64(saved):
    refuse(
        "int8 computes in bfloat16 or float16 or float32, and dtype is float64",
        saved,
        quantize="int8",
        dtype="float64",
    )


def test_int4_needs_a_device_with_a_kernel():
    four = quantize.parse_quantize("int4")
    with pytest.raises(UserError, match="runs on cpu and cuda, not on mps; give int8"):
        quantize.check_quantization(four, torch.device("mps"), None)


def test_int4_needs_a_recent_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    four = quantize.parse_quantize("int4")
    with pytest.raises(UserError, match=r"compute capability 8\.0 or newer; this one has 7\.5"):
        quantize.check_quantization(four, torch.device("cuda"), None)


def test_int4_needs_widths_in_groups():
    """The oracle's Talker is 40 wide."""
    omni = Omni(oracle.CONFIG)
    four = quantize.parse_quantize("int4")
    with pytest.raises(UserError, match=r"talker\.model\.layers\.0\..* has 40 and 64; give int8"):
        quantize.quantized_layers(omni, four)


def test_a_tied_head_is_not_quantized():
    thinker = replace(oracle.CONFIG.thinker, tie_word_embeddings=True)
    omni = Omni(replace(oracle.CONFIG, thinker=thinker))
    with pytest.raises(UserError, match=r"is its embedding table.*leave out \+head"):
        quantize.quantized_layers(omni, quantize.parse_quantize("int8+head"))


def test_without_torchao(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    refuse(
        r"quantize needs torchao: pip install -r requirements-quantize.txt", TINY, quantize="int8"
    )


def test_a_quantized_model_is_not_saved(tmp_path):
    omni = minomni.load(TINY, quantize="int8")
    with pytest.raises(UserError, match=r"a quantized model \(int8\).*load the model without"):
        minomni.save(omni, tmp_path / "model")
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------------
# torchao and the command line
@pytest.mark.slow
def test_torchao_is_silent_and_changes_no_setting():
    code = (
        "import torch, minomni\n"
        f"omni = minomni.load({str(TINY)!r}, quantize='int8')\n"
        f"omni = minomni.load({str(TINY)!r}, quantize='int4')\n"
        "print(torch.get_float32_matmul_precision())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "highest\n"
    assert done.stderr == ""


@pytest.mark.slow
def test_adapters_are_silent_beside_torchao():
    """peft imports it."""
    pytest.importorskip("peft")
    code = (
        "import minomni\n"
        "from minomni.checkpoint.lora import add_lora, parse_lora\n"
        f"omni = minomni.load({str(TINY)!r})\n"
        "add_lora(omni, parse_lora('r=4'), ('thinker',))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0
    assert done.stderr == ""


def test_chat_takes_quantize(tiny_folder, monkeypatch, capsys):
    loaded = []

    def load(*arguments, **options):
        loaded.append(minomni.load(*arguments, **options))
        return loaded[-1]

    line = ["minomni", "chat", "--model", str(tiny_folder), "--text", "say a", "--no-speech"]
    monkeypatch.setattr("minomni.cli.options.load", load)
    monkeypatch.setattr(sys, "argv", [*line, "--quantize", "int4+head"])
    assert command.main() == 0
    assert loaded[0].quantized == "int4+head"
    monkeypatch.setattr(sys, "argv", [*line, "--quantize", "int3"])
    assert command.main() == 2
    assert "quantize is 'int3'; expected int8 or int4" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line", [["serve", "--port", "0"], ["bench", "steps"], ["report", "--items", "1"]]
)
def test_other_commands_take_quantize(monkeypatch, capsys, line):
    given = []

    def load(*arguments, **options):
        given.append(options["quantize"])
        raise UserError("seen")

    for module in ("cli.options", "cli.bench", "eval.report"):
        monkeypatch.setattr(f"minomni.{module}.load", load)
    monkeypatch.setattr(sys, "argv", ["minomni", *line, "--quantize", "int8"])
    assert command.main() == 2
    assert given == ["int8"]
    assert capsys.readouterr().err == "minomni: seen\n"


def test_random_weights_of_bench_are_not_quantized(monkeypatch, capsys):
    line = ["minomni", "bench", "steps", "--random-weights", "--quantize", "int8"]
    monkeypatch.setattr(sys, "argv", line)
    assert command.main() == 2
    assert "--quantize goes with the folder of a model" in capsys.readouterr().err
