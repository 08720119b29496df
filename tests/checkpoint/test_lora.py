"""LoRA adapters: ours open in peft and transformers, theirs open here; merged equals adapted."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file

import minomni
from minomni import __main__ as command
from minomni.checkpoint import lora, quantize, saving, weights
from minomni.checkpoint.random_checkpoint import checkpoint_config, make_checkpoint
from minomni.errors import UserError
from minomni.inputs.prompt import Inputs
from minomni.train import finetune

IDS = torch.tensor([[5, 17, 40, 8, 99, 3, 250]])
BOTH = ("thinker", "talker")


@pytest.fixture(autouse=True)
def peft():
    """Imported by the tests alone: every process of pytest-xdist imports every test file."""
    return pytest.importorskip("peft")


def logits(omni) -> dict[str, torch.Tensor]:
    """Logits of Thinker and Talker for fixed inputs."""
    embeds = talker_embeds(omni.config.talker.embedding_size)
    positions = torch.arange(7).expand(3, 1, 7)
    with torch.no_grad():
        talker = omni.talker(embeds, positions, torch.ones(1, 7, dtype=torch.long))
        return {"thinker": omni.thinker(Inputs(IDS, torch.ones_like(IDS))), "talker": talker}


def talker_embeds(size: int) -> torch.Tensor:
    """Inputs of the Talker [1, 7, E], in the Thinker's dimensions."""
    return torch.randn(1, 7, size, generator=torch.Generator().manual_seed(1))


def their_logits(model) -> dict[str, torch.Tensor]:
    """The same of transformers' model, with or without peft around it."""
    talker = model.talker
    embeds = talker_embeds(talker.thinker_to_talker_proj.in_features)
    positions = torch.arange(7).expand(3, 1, 7)
    with torch.no_grad():
        hidden = talker.model(
            inputs_embeds=talker.thinker_to_talker_proj(embeds), position_ids=positions
        ).last_hidden_state
        thinker = model.thinker(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
        return {"thinker": thinker, "talker": talker.codec_head(hidden)}


def largest(one: dict, two: dict) -> dict[str, float]:
    return {name: float((one[name] - two[name]).abs().max()) for name in one}


@pytest.fixture(scope="module")
def hf_class():
    transformers = pytest.importorskip("transformers")
    return transformers.Qwen2_5OmniForConditionalGeneration


def randomize(model: torch.nn.Module) -> None:
    """Give adapters an effect: B is zero before training."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if ".lora_B" in name:
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


@pytest.fixture
def adapted(tiny_folder, tmp_path):
    """A model with adapters in Thinker and Talker, and the folder in which they are saved."""
    omni = minomni.load(str(tiny_folder))
    lora.add_lora(omni, lora.parse_lora("r=4"), BOTH)
    randomize(omni)
    lora.save_lora(omni, tmp_path / "adapter", [])
    return omni, tmp_path / "adapter"


def test_fresh_adapters_change_nothing_and_only_they_train(tiny_folder):
    omni = minomni.load(str(tiny_folder))
    before = logits(omni)
    names = set(omni.state_dict())
    lora.add_lora(omni, lora.parse_lora("r=4,layers=q_proj+v_proj"), ("talker",))
    assert largest(before, logits(omni)) == {"thinker": 0.0, "talker": 0.0}
    added = {name for name, parameter in omni.named_parameters() if ".lora_" in name}
    assert {name for name, p in omni.named_parameters() if p.requires_grad} == added
    assert all(name.startswith("talker.model.layers.") for name in added)
    assert {name.split(".")[5] for name in added} == {"q_proj", "v_proj"}
    assert len(omni.state_dict()) == len(names) + len(added)


def test_options_reach_the_adapter(tiny_folder, tmp_path):
    assert lora.parse_lora("r=4") == lora.LoraOptions(4, 8.0, lora.LAYERS)
    omni = minomni.load(str(tiny_folder))
    lora.add_lora(omni, lora.parse_lora("r=4,alpha=3,layers=o_proj"), ("talker",))
    lora.save_lora(omni, tmp_path / "adapter", [])
    entries = json.loads((tmp_path / "adapter" / lora.ADAPTER_CONFIG).read_text())
    assert (entries["r"], entries["lora_alpha"]) == (4, 3)
    layer = omni.talker.model.layers[0].self_attn.o_proj
    assert layer.scaling["default"] == 3 / 4


def test_ours_in_peft_and_transformers(adapted, tiny_folder, hf_class, peft):
    omni, folder = adapted
    ours = logits(omni)
    plain = their_logits(hf_class.from_pretrained(tiny_folder))
    assert min(largest(ours, plain).values()) > 0.1  # the adapters have an effect
    with_peft = peft.PeftModel.from_pretrained(hf_class.from_pretrained(tiny_folder), folder)
    assert max(largest(ours, their_logits(with_peft.base_model.model)).values()) < 2e-4
    alone = hf_class.from_pretrained(tiny_folder)
    alone.load_adapter(str(folder))
    assert max(largest(ours, their_logits(alone)).values()) < 2e-4


def test_theirs_here(tiny_folder, tmp_path, hf_class, peft):
    pattern = r"(thinker\.model\.language_model|talker\.model)\.layers\.\d+\.\w+\.(q|v|up)_proj"
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=pattern)
    theirs = peft.get_peft_model(hf_class.from_pretrained(tiny_folder), config)
    randomize(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    omni = minomni.load(str(tiny_folder))
    lora.load_lora(omni, tmp_path / "theirs")
    assert max(largest(logits(omni), their_logits(theirs.base_model.model)).values()) < 2e-4


@pytest.mark.parametrize(
    ("begin", "new"),
    [
        ("base_model.model.thinker.model.language_model.", "base_model.model.thinker.model."),
        ("base_model.model.thinker.model.language_model.", "base_model.model.model."),
        (
            "base_model.model.thinker.model.language_model.",
            "base_model.model.model.language_model.",
        ),
        ("base_model.model.thinker.model.language_model.", "thinker.base_model.model.model."),
    ],
)
def test_spellings_of_other_programs(begin, new, adapted, tiny_folder):
    omni, folder = adapted
    tensors = load_file(folder / lora.ADAPTER_FILE)
    assert any(name.startswith(begin) for name in tensors)
    renamed = {name.replace(begin, new): tensor for name, tensor in tensors.items()}
    save_file(renamed, folder / lora.ADAPTER_FILE)
    other = minomni.load(str(tiny_folder))
    lora.load_lora(other, folder)
    assert largest(logits(omni), logits(other)) == {"thinker": 0.0, "talker": 0.0}


def test_merged_is_adapted(adapted, tiny_folder, tmp_path, monkeypatch, capsys, hf_class):
    omni, folder = adapted
    arguments = ["minomni", "merge", str(tiny_folder), str(folder), str(tmp_path / "merged")]
    monkeypatch.setattr(sys, "argv", arguments)
    assert command.main() == 0
    assert "merged" in capsys.readouterr().out
    merged = minomni.load(str(tmp_path / "merged"))
    assert max(largest(logits(omni), logits(merged)).values()) < 2e-4
    theirs = hf_class.from_pretrained(tmp_path / "merged")
    assert max(largest(logits(omni), their_logits(theirs)).values()) < 2e-4
    base, after = (weights.load(path).state_dict() for path in (tiny_folder, tmp_path / "merged"))
    changed = {name for name in base if not base[name].equal(after[name])}
    assert changed
    assert all(name.split(".")[-2] in lora.LAYERS for name in changed)
    assert all(".model.layers." in name for name in changed)


@pytest.fixture
def data(tmp_path) -> Path:
    """Four rows, two of them with a recording."""
    noise = np.random.default_rng(0).uniform(-0.3, 0.3, 16_000)
    soundfile.write(tmp_path / "a.wav", noise, 16_000)
    rows = []
    for i in range(4):
        messages = [
            {"role": "user", "content": "say a"},
            {"role": "assistant", "content": "a circle"},
        ]
        rows.append(
            {"messages": messages, **({"speech": "a.wav", "voice": "Ann"} if i % 2 else {})}
        )
    (tmp_path / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "my.jsonl"


@pytest.fixture
def quick(monkeypatch):
    """Short steps, and no generated samples."""
    monkeypatch.setattr(finetune, "LORA_RECIPE", (1e-2, 2))
    monkeypatch.setattr(finetune.FinetuneChatStage, "preview_text", lambda self: "")


def train(folder, data: Path, out: Path, *options: str) -> int:
    """Run `minomni train FOLDER --data ... --lora ...` -> its exit code."""
    command_line = ["minomni", "train", str(folder), "--data", str(data), "--out", str(out)]
    command_line += ["--home", str(out.parent / "home"), "--device", "cpu", "--no-progress"]
    sys.argv = [*command_line, *options]
    return command.main()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_writes_adapters_alone(dtype, tiny_folder, data, tmp_path, quick, monkeypatch):
    monkeypatch.setattr(sys, "argv", [])
    base = tmp_path / "base"
    saving.save(weights.load(tiny_folder, dtype=dtype), base)
    before = (base / "model.safetensors").read_bytes()
    out = tmp_path / "adapter"
    assert train(base, data, out, "--lora", "r=2", "--epochs", "2") == 0
    assert {file.name for file in out.iterdir()} >= {lora.ADAPTER_FILE, lora.ADAPTER_CONFIG}
    assert not (out / "model.safetensors").exists()
    tensors = load_file(out / lora.ADAPTER_FILE)
    assert {name.split(".")[2] for name in tensors} == {"thinker", "talker"}
    assert all(tensor.abs().max() > 0 for tensor in tensors.values())  # B too: all have trained
    assert (base / "model.safetensors").read_bytes() == before
    omni = minomni.load(str(base))
    lora.load_lora(omni, out)
    stored = weights.load(base).state_dict()
    for name, tensor in omni.state_dict().items():
        if ".lora_" not in name:
            assert tensor.equal(stored[name.replace(".base_layer", "")]), name


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--lora", "r=0"], "--lora r is 0; expected a whole number from 1"),
        (["--lora", "16"], "expected r=16"),
        (["--lora", "r=x"], "r and alpha are numbers"),
        (["--lora", "r=2,layers=lm_head"], "no layer is called 'lm_head'"),
        (["--lora", "r=2", "--parts", "codec"], "'codec' is not one of thinker, talker"),
        (["--lora", "r=2", "--stage", "chat"], "instead of --stage"),
        (["--parts", "talker"], "--parts goes with --lora"),
        (["--lora", ""], "expected r=16"),
        (["--lora", "r=2", "--skip-corrupt"], "--skip-corrupt goes with packed data"),
        (["--quantize", "int8"], "--quantize goes with --lora"),
        (["--lora", "r=2", "--quantize", "int3"], "quantize is 'int3'; expected int8 or int4"),
    ],
)
def test_options_that_are_refused(options, says, tiny_folder, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [])
    assert train(tiny_folder, data, tmp_path / "out", *options) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


QUANTIZED = {"int8": torch.float32, "int4": torch.bfloat16}


@pytest.mark.parametrize("method", QUANTIZED)
def test_gradients_through_quantized_weights(method, tiny_folder):
    """Of the adapters of all layers, against a model with the same weights as plain numbers."""
    pytest.importorskip("torchao")
    dtype = QUANTIZED[method]
    omni = weights.load(tiny_folder, dtype=dtype, quantize=method)
    plain = weights.load(tiny_folder, dtype=dtype)
    for name, weight in omni.named_parameters():
        if quantize.is_quantized(weight):
            plain.get_parameter(name).data = quantize.plain_weight(weight).detach().clone()
    losses = []
    for model in (omni, plain):
        lora.add_lora(model, lora.parse_lora("r=4"), ("thinker",))
        randomize(model)
        output = model.thinker(Inputs(IDS, torch.ones_like(IDS)))
        loss = output.float().square().mean()
        loss.backward()
        losses.append(loss.item())
    tolerance = 1e-4 if dtype == torch.float32 else 0.05  # of bf16, in products of other kernels
    assert losses[0] == pytest.approx(losses[1], rel=tolerance)
    for (name, ours), (_, theirs) in zip(omni.named_parameters(), plain.named_parameters()):
        if ".lora_" in name and name.startswith("thinker."):
            difference = (ours.grad - theirs.grad).norm() / theirs.grad.norm()
            assert difference < tolerance, name


def test_int8_in_peft_and_transformers(adapted, tiny_folder, hf_class, peft):
    """An adapter on a base that torchao has quantized, ours and theirs."""
    torchao = pytest.importorskip("torchao.quantization")
    _, folder = adapted
    omni = weights.load(tiny_folder, dtype=torch.float32, quantize="int8")
    lora.load_lora(omni, folder)
    theirs = hf_class.from_pretrained(tiny_folder, dtype=torch.float32)
    decoders = re.compile(r"(thinker\.model\.language_model|talker\.model)\.layers\.")
    torchao.quantize_(
        theirs,
        torchao.Int8WeightOnlyConfig(set_inductor_config=False),
        lambda module, name: isinstance(module, torch.nn.Linear) and bool(decoders.match(name)),
    )
    theirs = peft.PeftModel.from_pretrained(theirs, folder)
    ours = logits(omni)
    assert max(largest(ours, their_logits(theirs.base_model.model)).values()) < 2e-4
    whole = weights.load(tiny_folder)
    lora.load_lora(whole, folder)
    assert max(largest(ours, logits(whole)).values()) > 0  # the base is another one


@pytest.mark.parametrize("method", QUANTIZED)
def test_training_on_quantized_weights(
    method, tiny_folder, data, tmp_path, quick, monkeypatch, capsys
):
    """The adapters alone are written, in fp32, and fit the folder as it was."""
    pytest.importorskip("torchao")
    monkeypatch.setattr(sys, "argv", [])
    before = (tiny_folder / "model.safetensors").read_bytes()
    out = tmp_path / "adapter"
    options = ["--lora", "r=2", "--epochs", "2", "--quantize", method]
    assert train(tiny_folder, data, out, *options) == 0
    tensors = load_file(out / lora.ADAPTER_FILE)
    assert {name.split(".")[2] for name in tensors} == {"thinker", "talker"}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert all(tensor.abs().max() > 0 for tensor in tensors.values())
    assert (tiny_folder / "model.safetensors").read_bytes() == before

    # Another number of bits is another run.
    other = {"int8": "int4", "int4": "int8"}[method]
    options = ["--lora", "r=2", "--epochs", "2", "--quantize", other, "--resume"]
    assert train(tiny_folder, data, out, *options) == 2
    assert "was begun with other model" in capsys.readouterr().err
    whole = weights.load(tiny_folder)
    lora.load_lora(whole, out)
    lora.merge_lora(whole)


def test_a_model_without_a_talker(tiny_folder, data, tmp_path, quick, capsys, monkeypatch):
    """--parts talker is refused; without it, recordings in the data are not used."""
    monkeypatch.setattr(sys, "argv", [])
    stored = load_file(tiny_folder / "model.safetensors")
    thinker = {n: t for n, t in stored.items() if n.startswith("thinker.")}
    base = tmp_path / "base"
    base.mkdir()
    for file in tiny_folder.iterdir():
        if file.is_file() and file.suffix not in (".safetensors", ".pt"):
            (base / file.name).write_bytes(file.read_bytes())
    save_file(thinker, base / "model.safetensors", {"format": "pt"})
    options = ["--lora", "r=2", "--epochs", "1"]
    assert train(base, data, tmp_path / "out", *options, "--parts", "talker") == 2
    assert "the Talker: this model answers in text alone" in capsys.readouterr().err
    assert train(base, data, tmp_path / "out", *options, "--fresh") == 0
    tensors = load_file(tmp_path / "out" / lora.ADAPTER_FILE)
    assert {name.split(".")[2] for name in tensors} == {"thinker"}


@pytest.mark.slow
def test_a_folder_like_the_release(tmp_path, hf_class, peft):
    """510 million parameters, all layers of the 7B in narrow, without a codec: in peft and
    transformers, merged, and nothing else touched.
    """
    base = tmp_path / "base"
    config = checkpoint_config("qwen7b", 0.125)
    text = replace(config.thinker.text, intermediate_size=8192)
    make_checkpoint(replace(config, thinker=replace(config.thinker, text=text)), base)
    omni = minomni.load(str(base), dtype="float32")
    assert sum(parameter.numel() for parameter in omni.parameters()) > 500e6
    before = {name: tensor.clone() for name, tensor in omni.state_dict().items()}
    lora.add_lora(omni, lora.parse_lora("r=2"), BOTH)
    randomize(omni)
    lora.save_lora(omni, tmp_path / "adapter", [])
    tensors = load_file(tmp_path / "adapter" / lora.ADAPTER_FILE)
    assert len(tensors) == 2 * len(lora.LAYERS) * (28 + 24)
    ours = logits(omni)

    # transformers has one size of Token2Wav, which is not compared here.
    theirs = hf_class.from_pretrained(base, dtype=torch.float32, ignore_mismatched_sizes=True)
    assert min(largest(ours, their_logits(theirs)).values()) > 0.01
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter")
    assert max(largest(ours, their_logits(theirs.base_model.model)).values()) < 2e-4
    theirs.save_pretrained(tmp_path / "theirs")
    del theirs
    again = minomni.load(str(base), dtype="float32")
    lora.load_lora(again, tmp_path / "theirs")
    assert max(largest(ours, logits(again)).values()) == 0
    del again

    lora.merge_lora(omni)
    assert max(largest(ours, logits(omni)).values()) < 2e-4
    after = omni.state_dict()
    changed = {name for name in before if not before[name].equal(after[name])}
    assert after.keys() == before.keys()
    assert len(changed) == len(tensors) // 2
    assert all(name.split(".")[-2] in lora.LAYERS for name in changed)
    assert all(".model.layers." in name for name in changed)


def test_an_adapter_is_replaced_or_kept(adapted, monkeypatch):
    omni, folder = adapted
    (folder / "notes.txt").write_text("of the first")
    with pytest.raises(UserError, match="holds notes.txt, which saving would delete"):
        lora.save_lora(omni, folder, [])
    assert (folder / "notes.txt").read_text() == "of the first"
    (folder / "notes.txt").unlink()
    before = (folder / lora.ADAPTER_FILE).read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as context:
        context.setattr(lora, "save", full)
        with pytest.raises(UserError, match="No space left"):
            lora.save_lora(omni, folder, [])
    assert (folder / lora.ADAPTER_FILE).read_bytes() == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    (folder / lora.ADAPTER_FILE).write_bytes(b"of another adapter")
    lora.save_lora(omni, folder, [])
    assert (folder / lora.ADAPTER_FILE).read_bytes() == before


def test_adapters_that_do_not_fit(adapted, tiny_folder, tmp_path):
    _, folder = adapted
    tensors = load_file(folder / lora.ADAPTER_FILE)
    name = next(name for name in tensors if "lora_B" in name)
    with pytest.raises(UserError, match="holds no adapter_config.json"):
        lora.load_lora(minomni.load(str(tiny_folder)), tmp_path)
    wrong = {
        "linear layer": {**tensors, name.replace("layers.0", "layers.99"): tensors[name].clone()},
        "is missing in the adapter": {n: t for n, t in tensors.items() if n != name},
        "in the adapter and": {**tensors, name: tensors[name][:-1].contiguous()},
    }
    for says, changed in wrong.items():
        save_file(changed, folder / lora.ADAPTER_FILE)
        with pytest.raises(UserError, match=f"belongs to another model.*{says}"):
            lora.load_lora(minomni.load(str(tiny_folder)), folder)


def change_config(folder: Path, **entries) -> None:
    """Replace entries of an adapter's configuration."""
    path = folder / lora.ADAPTER_CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("alpha_pattern", {"q_proj": 8}),  # would be matched with our names, which can differ
        ("rank_pattern", {"q_proj": 8}),
        ("modules_to_save", ["lm_head"]),
        ("bias", "all"),
        ("layer_replication", [[0, 2]]),
        ("megatron_config", {"tensor_parallel": 2}),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("use_dora", True),
        ("peft_type", "IA3"),
        ("an_entry_of_next_year", "yes"),
    ],
)
def test_adapters_of_other_kinds(key, value, adapted, tiny_folder, recwarn):
    _, folder = adapted
    change_config(folder, **{key: value})
    with pytest.raises(UserError, match=f"is not a plain LoRA adapter: {key} is"):
        lora.load_lora(minomni.load(str(tiny_folder)), folder)
    assert not recwarn.list  # peft's own, beside our line


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ({"r": 0}, "r is 0; expected a whole number from 1"),
        ({"r": -1}, "r is -1; expected a whole number"),
        ({"r": None}, "r is None; expected a whole number"),
        ({"r": "2"}, "r is '2'; expected a whole number"),
        ({"r": 2.0}, r"r is 2\.0; expected a whole number"),
        ({"r": 10**7}, "r is 10000000; expected a whole number"),
        ({"r": 4000}, r"is \(4, \d+\) in the adapter and \(4000, \d+\) here, with r = 4000"),
        ({"lora_alpha": "x"}, "lora_alpha is 'x'; expected a finite number"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan; expected a finite number"),
        ({"lora_alpha": 10**400}, "lora_alpha is 1000.*0; expected a finite number"),
        ({"use_rslora": "x"}, "use_rslora is 'x'; expected True or False"),
    ],
)
def test_wrong_numbers_of_an_adapter(entries, says, adapted, tiny_folder, monkeypatch):
    """They are refused before peft allocates anything for them."""
    _, folder = adapted
    change_config(folder, **entries)
    monkeypatch.setattr(lora, "inject", lambda *_: pytest.fail("allocated"))
    with pytest.raises(UserError, match=says):
        lora.load_lora(minomni.load(str(tiny_folder)), folder)


def test_what_does_not_change_the_answer_is_not_refused(adapted, tiny_folder, recwarn):
    omni, folder = adapted
    change_config(folder, lora_dropout=0.1, task_type="CAUSAL_LM", init_lora_weights="gaussian")
    other = minomni.load(str(tiny_folder))
    lora.load_lora(other, folder)
    assert largest(logits(omni), logits(other)) == {"thinker": 0.0, "talker": 0.0}
    change_config(folder, use_rslora=True)  # alpha / sqrt(r) instead of alpha / r: twice for r = 4
    twice = minomni.load(str(tiny_folder))
    lora.load_lora(twice, folder)
    layer = "talker.model.layers.0.mlp.up_proj"
    assert twice.get_submodule(layer).scaling == {"default": 4.0}


def test_adapters_with_broken_numbers(adapted, tiny_folder):
    omni, folder = adapted
    tensors = load_file(folder / lora.ADAPTER_FILE)
    name = next(iter(tensors))
    tensors[name][0, 0] = float("nan")
    save_file(tensors, folder / lora.ADAPTER_FILE)
    with pytest.raises(UserError, match="holds NaN or infinite numbers"):
        lora.load_lora(minomni.load(str(tiny_folder)), folder)
    tensors[name] = torch.zeros(tensors[name].shape, dtype=torch.int32)
    save_file(tensors, folder / lora.ADAPTER_FILE)
    with pytest.raises(UserError, match="is I32; only BF16"):
        lora.load_lora(minomni.load(str(tiny_folder)), folder)
    save_file({}, folder / lora.ADAPTER_FILE)
    with pytest.raises(UserError, match="holds no tensors"):
        lora.load_lora(minomni.load(str(tiny_folder)), folder)
    (folder / lora.ADAPTER_FILE).write_bytes(b"cut")
    with pytest.raises(UserError, match="cut short or not a safetensors file"):
        lora.load_lora(minomni.load(str(tiny_folder)), folder)
    for parameter in omni.parameters():
        parameter.data.mul_(1e30)
    with pytest.raises(UserError, match="the sum of weights and adapter is not finite"):
        lora.merge_lora(omni)


def test_the_adapter_of_another_base(adapted, tiny_folder, tmp_path, monkeypatch, capsys):
    """Equal shapes do not make it the same model; nor is a model that it was merged into."""
    _, folder = adapted
    merged = tmp_path / "merged"
    monkeypatch.setattr(sys, "argv", ["minomni", "merge", str(tiny_folder), str(folder), ""])
    sys.argv[-1] = str(merged)
    assert command.main() == 0
    sys.argv[2:] = [str(merged), str(folder), str(tmp_path / "twice")]
    assert command.main() == 2
    error = capsys.readouterr().err
    assert "was trained on other weights of the Thinker than this model has" in error
    assert error.count("\n") == 1
    omni = minomni.load(str(tiny_folder))
    lora.load_lora(omni, folder)
    lora.merge_lora(omni)
    with pytest.raises(UserError, match="was trained on other weights"):
        lora.load_lora(omni, folder)

    # The adapter of one part does not ask for the other part's weights.
    omni = minomni.load(str(tiny_folder))
    lora.add_lora(omni, lora.parse_lora("r=2"), ("talker",))
    lora.save_lora(omni, tmp_path / "talker", [])
    other = minomni.load(str(tiny_folder))
    for parameter in other.thinker.parameters():
        parameter.data.mul_(2)
    lora.load_lora(other, tmp_path / "talker")

    # An adapter of another program says nothing of its base.
    save_file(load_file(folder / lora.ADAPTER_FILE), folder / lora.ADAPTER_FILE)
    lora.load_lora(minomni.load(str(merged)), folder)


def test_the_digest_of_a_base_is_the_same_in_every_precision(tiny_folder):
    pytest.importorskip("torchao")
    plain = lora.base_digests(minomni.load(str(tiny_folder)))
    assert set(plain) == {lora.BASE_KEY + part for part in BOTH}
    for options in ({"dtype": "bf16"}, {"quantize": "int8"}, {"quantize": "int4"}):
        assert lora.base_digests(weights.load(tiny_folder, **options)) == plain
