"""make-checkpoint writes what the release has; check says what a folder is and what is wrong."""

import json
import re
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import oracle
import pytest
import torch
from safetensors.torch import load_file, save_file

import minomni
from minomni.checkpoint import random_checkpoint, weights
from minomni.checkpoint.check_folder import check_folder, memory_table, size_of, video_tokens
from minomni.checkpoint.hf_config import read_config, without_speech
from minomni.checkpoint.random_checkpoint import (
    RELEASE_BYTES,
    five_shards,
    make_checkpoint,
    release_json,
    release_tensors,
    scale_widths,
)
from minomni.config import QWEN7B
from minomni.errors import UserError

RELEASE = random_checkpoint.RELEASE_CONFIG.read_text()


def few_layers():
    """The narrowest release with two layers instead of 28 and a vocabulary of 512."""
    config = scale_widths(QWEN7B, 0.125)
    thinker, talker = config.thinker, config.talker
    return replace(
        config,
        thinker=replace(
            thinker,
            audio=replace(thinker.audio, encoder_layers=2),
            vision=replace(thinker.vision, depth=2, fullatt_block_indexes=(1,)),
            text=replace(thinker.text, num_hidden_layers=2, vocab_size=512),
            tokens=oracle.TOKENS,
        ),
        talker=replace(talker, decoder=replace(talker.decoder, num_hidden_layers=2)),
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A written folder. Copy it before changing it."""
    folder = tmp_path_factory.mktemp("made") / "checkpoint"
    make_checkpoint(few_layers(), folder)
    return folder


@pytest.fixture
def folder(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "model"))


# ----------------------------------------------------------------------------------------------
# like the release
def test_tensors_and_shards_are_those_of_the_release():
    tensors = release_tensors(QWEN7B)
    assert len(tensors) == 2447
    assert sum(tensor.nbytes for tensor in tensors.values()) == RELEASE_BYTES
    sizes = [sum(t.nbytes for t in shard.values()) / 1e9 for shard in five_shards(tensors)]
    # As the release's page lists its files, in GB.
    assert sizes == pytest.approx([4.99, 4.99, 4.99, 4.97, 2.43], abs=0.01)


def test_config_is_the_release_s_to_the_byte():
    assert json.dumps(release_json(QWEN7B), indent=2) == RELEASE


def test_narrow_model_has_the_same_tensors():
    narrow = release_tensors(scale_widths(QWEN7B, 0.125))
    assert narrow.keys() == release_tensors(QWEN7B).keys()
    assert len(five_shards(narrow)) == 5
    assert scale_widths(QWEN7B, 1.0) == QWEN7B


def test_folder_loads_and_answers(made):
    assert read_config(made) == few_layers()
    omni = minomni.load(made)
    assert list(omni.voices) == ["Chelsie", "Ethan"]
    stored = omni.stored_dtype or omni.thinker.lm_head.weight.dtype
    assert stored == torch.bfloat16
    messages = [{"role": "user", "content": "say it"}]
    answer = omni.respond(messages, max_new_tokens=4, talker_max_new_tokens=8)
    assert answer.wave.isfinite().all()


def test_tokenizer_spells_every_text(made):
    tokenizer = weights.load(made).tokenizer
    text = "the answer, Ünïcödé 7!<|im_end|>"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert max(tokenizer.bytes_of) == min(tokenizer.special_tokens.values()) - 1


@pytest.fixture(scope="module")
def official(made):
    """The folder in transformers, and what it says of the tensors that it found."""
    transformers = pytest.importorskip("transformers")
    hf_class = transformers.Qwen2_5OmniForConditionalGeneration
    # The class' own from_pretrained fails on output_loading_info, and adds only the voices.
    parent = transformers.PreTrainedModel.from_pretrained.__func__
    _, info = parent(hf_class, made, dtype="auto", output_loading_info=True)
    return hf_class.from_pretrained(made, dtype="auto").eval(), info


@pytest.mark.slow
def test_transformers_loads_the_folder(made, official):
    model, info = official
    problems = {name: found for name, found in info.items() if found}
    assert problems == {}
    assert list(model.speaker_map) == ["Chelsie", "Ethan"]
    theirs = {oracle.hf_name(name): tensor for name, tensor in model.named_parameters()}
    ours = minomni.load(made).state_dict()
    for name, tensor in theirs.items():
        assert torch.equal(tensor, ours[name].to(tensor.dtype)), name
    assert len(theirs) == len(ours)


@pytest.mark.slow
def test_transformers_computes_the_same(made, official):
    model, _ = official
    ids = torch.tensor([oracle.words(1, 12)])
    ones = torch.ones_like(ids)
    inputs = replace(oracle.inputs("text"), input_ids=ids, attention_mask=ones)
    with torch.no_grad():
        theirs = model.thinker.float()(ids, attention_mask=ones).logits
        ours = minomni.load(made, dtype="float32").thinker(inputs)
    assert ours.std() > 0.1
    assert torch.allclose(ours, theirs, atol=1e-3)


@pytest.mark.slow
def test_transformers_reads_the_tokenizer(made):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(made)
    text = "the answer<|im_end|>"
    assert theirs(text)["input_ids"] == weights.load(made).tokenizer.encode(text)


def test_narrow_config_has_the_sizes_by_transformers_names():
    """It reads hidden_size and not dim, num_hidden_layers and not encoder_layers."""
    data = release_json(few_layers())
    dit = data["token2wav_config"]["dit_config"]
    assert dit["hidden_size"] == dit["dim"] == 128
    assert "num_hidden_layers" not in dit  # as many as the release has
    assert data["thinker_config"]["audio_config"]["num_hidden_layers"] == 2


# ----------------------------------------------------------------------------------------------
# writing
def test_same_seed_gives_the_same_bytes(made, tmp_path):
    make_checkpoint(few_layers(), tmp_path / "again")
    make_checkpoint(few_layers(), tmp_path / "other", seed=1)
    name = "model-00005-of-00005.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (made / name).read_bytes()
    assert (tmp_path / "other" / name).read_bytes() != (made / name).read_bytes()


def test_an_existing_folder_is_refused(folder):
    with pytest.raises(UserError, match="exists already"):
        make_checkpoint(few_layers(), folder)


def test_a_full_disk_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    Usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(9e9, 8e9, 1e9))
    with pytest.raises(UserError, match=r"take 22\.4 GB and the disk has 1\.0 GB free"):
        make_checkpoint(QWEN7B, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_nothing_is_left_where_writing_fails(tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(random_checkpoint, "write_shard", fail)
    with pytest.raises(UserError, match="No space left"):
        make_checkpoint(few_layers(), tmp_path / "model")
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------------
# check
def test_a_right_folder_has_no_errors(made):
    report = check_folder(made)
    assert report.errors == []
    assert report.kind == "Qwen2.5-Omni with 2 layers of width 448 in the Thinker"
    text = report.text()
    assert "files     5 with" in text
    assert "thinker BF16, talker BF16, token2wav F32" in text
    assert "voices    Chelsie, Ethan" in text


def test_kinds_of_releases():
    assert size_of(QWEN7B) == "Qwen2.5-Omni-7B"
    assert size_of(without_speech(QWEN7B)).startswith("Qwen2.5-Omni-7B, a Thinker alone")
    text = replace(
        QWEN7B.thinker.text,
        hidden_size=2048,
        num_hidden_layers=36,
        num_attention_heads=16,
        num_key_value_heads=2,
    )
    thinker = replace(
        QWEN7B.thinker,
        text=text,
        audio=replace(QWEN7B.thinker.audio, output_dim=2048),
        vision=replace(QWEN7B.thinker.vision, out_hidden_size=2048),
    )
    alone = replace(without_speech(QWEN7B), thinker=thinker)
    assert size_of(alone).startswith("Qwen2.5-Omni-3B")


def edit_config(folder: Path, **changes) -> None:
    data = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 8}}, r"quantized.*gptq.*8 bits"),
        ({"quantization_config": {"quant_method": "fp8"}}, r"quantized.*fp8"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, r"packed in 4 bits by AWQ"),
        ({"model_type": "qwen2_audio"}, r"unknown, because model_type is 'qwen2_audio'"),
    ],
)
def test_other_kinds_are_named(folder, changes, kind):
    edit_config(folder, **changes)
    report = check_folder(folder)
    assert re.search(kind, report.kind)
    assert report.errors


def test_unreadable_settings_are_the_reason(folder):
    edit_config(folder, color=3)
    report = check_folder(folder)
    assert re.search(r"unknown, because .*unknown key 'color'", report.kind)


def test_every_problem_is_listed(folder):
    """A shard cut short, no voices and another tokenizer: three errors, each in one line."""
    shard = folder / "model-00002-of-00005.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    (folder / "spk_dict.pt").unlink()
    (folder / "vocab.json").write_text('{"a": 0}')
    report = check_folder(folder)
    assert len(report.errors) == 3
    assert "cut short" in report.errors[0]
    assert all("\n" not in error for error in report.errors)
    assert report.memory


def test_wrong_shapes_and_precisions(folder):
    name = min(folder.glob("*.safetensors"))
    tensors = load_file(name)
    first = "thinker.audio_tower.conv1.bias"
    tensors[first] = tensors[first].half()
    save_file(tensors, name)
    report = check_folder(folder)
    assert report.errors == []
    assert "thinker BF16 and F16 (the release has BF16)" in report.text()
    tensors[first] = tensors[first][:-1].clone()
    save_file(tensors, name)
    assert re.search(r"conv1\.bias is \[159\], expected \[160\]", check_folder(folder).errors[0])


def test_memory_table_of_the_release():
    """Weights: the release's bytes; caches: 57,344 bytes a token (Thinker) and 49,152 (Talker)."""
    table = memory_table(QWEN7B)
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ")[1:] for line in table.split("\n")}
    assert rows["weights"][0] == f"{RELEASE_BYTES / 2**30:.2f}"
    cache = (57_344 + 49_152) * 32_768 / 2**30
    assert rows["KV caches of 32,768 tokens"][0] == f"{cache:.2f}"
    # A second of video has 768 cells of 28 x 28 pixels and 25 audio tokens; a minute does not fit.
    video = [name for name in rows if "video" in name]
    assert [name.split()[2] for name in video] == ["15", "30"]
    assert video_tokens(QWEN7B) == 768
    # Linear layers: 6.53 billion weights in the Thinker, 1.31 in the Talker, one byte less each.
    saved = float(rows["weights"][0]) - float(rows["weights"][1])
    assert saved == pytest.approx((6.526e9 + 1.301e9) / 2**30, abs=0.02)
    # In int4 they take 0.53 bytes; then heads and encoders one byte less.
    saved = float(rows["weights"][1]) - float(rows["weights"][2])
    assert saved == pytest.approx((6.526e9 + 1.301e9) * (1 - 0.53125) / 2**30, abs=0.02)
    saved = float(rows["weights"][2]) - float(rows["weights"][3].strip(" |"))
    assert saved == pytest.approx((0.545e9 + 0.008e9 + 1.31e9) / 2**30, abs=0.02)
