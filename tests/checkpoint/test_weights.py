"""Model folders: official ones load unchanged, ours round-trip, broken ones are refused with an
error that names the file.
"""

import dataclasses
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from safetensors.torch import load_file, save_file

import minomni
from minomni import make_voice, paths
from minomni.checkpoint import saving, weights
from minomni.checkpoint.check_folder import check_folder
from minomni.checkpoint.tensor_files import map_tensors
from minomni.errors import UserError
from minomni.inputs.tokenizer import Tokenizer, special_tokens
from minomni.omni import TEXT_HEAD, Omni


@pytest.fixture(scope="module")
def omni():
    """A model on the oracle's sizes with its voices and a small tokenizer."""
    torch.manual_seed(0)
    model = Omni(oracle.CONFIG).eval()
    oracle.fill(model.state_dict())
    model.voices = oracle.voices()
    sentences = ["the red circle is left of the blue square"] * 3
    model.tokenizer = Tokenizer.train(sentences, 270, special_tokens(oracle.TOKENS))
    return model


@pytest.fixture(scope="module")
def saved(omni, tmp_path_factory):
    """The model saved in several shards. Copy the folder before changing it."""
    folder = tmp_path_factory.mktemp("models") / "saved"
    saving.save(omni, folder, shard_bytes=2_000_000)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of the saved folder, free to be changed."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def same_tensors(a, b) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def index_of(folder: Path) -> dict:
    return json.loads((folder / saving.INDEX_FILE).read_text())["weight_map"]


def reindex(folder: Path, **changes) -> None:
    (folder / saving.INDEX_FILE).write_text(json.dumps({"weight_map": index_of(folder) | changes}))


def edit(folder: Path, change) -> None:
    """Merge the folder into one file without an index, with its tensors changed."""
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
        file.unlink()
    (folder / saving.INDEX_FILE).unlink(missing_ok=True)
    change(tensors)
    save_file(tensors, folder / saving.WEIGHTS_FILE)


def refuse(folder: Path, *messages: str) -> str:
    with pytest.raises(UserError) as error:
        weights.load(folder)
    for message in messages:
        assert re.search(message, str(error.value)), str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) <= 500
    return str(error.value)


# ----------------------------------------------------------------------------------------------
# round trips
def test_saved_folder_round_trips(omni, saved):
    again = weights.load(saved)
    assert same_tensors(again, omni)
    assert again.config == omni.config
    assert len(list(saved.glob("*.safetensors"))) > 3
    assert again.voices.keys() == omni.voices.keys()
    for name, voice in omni.voices.items():
        assert again.voices[name].bos_token == voice.bos_token
        assert torch.equal(again.voices[name].cond, voice.cond)
        assert torch.equal(again.voices[name].ref_mel, voice.ref_mel)
    text = "the blue circle<|im_end|>"
    assert again.tokenizer.encode(text) == omni.tokenizer.encode(text)
    assert all(p.requires_grad and not p.is_meta for p in again.parameters())


def test_requested_dtype_leaves_token2wav_in_fp32(saved):
    model = weights.load(saved, dtype=torch.bfloat16)
    kinds = {name.split(".")[0]: p.dtype for name, p in model.named_parameters()}
    assert kinds == {
        "thinker": torch.bfloat16,
        "talker": torch.bfloat16,
        "token2wav": torch.float32,
    }
    spoken = model.generate(oracle.inputs("mixed"), "Chelsie")
    assert spoken.waves[0].isfinite().all()
    assert len(spoken.waves[0]) == 480 * len(spoken.codes[0]) > 0


@pytest.mark.skipif(os.name == "nt", reason="everything is copied on Windows")
def test_tensors_are_mapped_from_the_files(folder):
    """Their offsets in memory are those of the file; writing to them leaves the file unchanged."""
    model = weights.load(folder)
    ours = model.state_dict()
    for file in folder.glob("*.safetensors"):
        whole = file.read_bytes()
        header = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])
        header.pop("__metadata__")
        starts = {
            ours[name].data_ptr() - part["data_offsets"][0]
            for name, part in header.items()
            if name in ours
        }
        assert len(starts) == 1
    before = {file: file.read_bytes() for file in folder.glob("*.safetensors")}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert {file: file.read_bytes() for file in folder.glob("*.safetensors")} == before
    assert not same_tensors(weights.load(folder), model)


def test_a_model_outlives_its_folder(folder, omni):
    """Saving over the folder that it was loaded from, or deleting that, changes no tensor."""
    model = weights.load(folder)
    saving.save(model, folder, shard_bytes=3_000_000)
    assert same_tensors(model, omni)
    assert same_tensors(weights.load(folder), omni)
    before = model.generate(oracle.inputs("mixed"), "Ethan")
    saving.save(model, folder)
    shutil.rmtree(folder)
    after = model.generate(oracle.inputs("mixed"), "Ethan")
    assert before.tokens == after.tokens
    assert torch.equal(before.waves[0], after.waves[0])
    assert same_tensors(model, omni)


@pytest.mark.slow
def test_loading_draws_no_random_numbers(folder):
    """Random numbers on the meta device would cost two seconds of imports at every start."""
    code = f"""
import sys, torch
from minomni.checkpoint import weights
state = torch.get_rng_state()
weights.load({str(folder)!r})
assert torch.equal(state, torch.get_rng_state()) and "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_misaligned_tensors_are_copied(saved, tmp_path):
    """A header whose length is not a multiple of eight misaligns the tensors behind it."""
    folder = Path(shutil.copytree(saved, tmp_path / "model"))
    file = sorted(folder.glob("*.safetensors"))[0]
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header, tensors = data[8 : 8 + size], data[8 + size :]
    file.write_bytes((size + 1).to_bytes(8, "little") + header + b" " + tensors)
    model = weights.load(folder)
    for tensor in model.state_dict().values():
        assert tensor.data_ptr() % tensor.element_size() == 0
    assert same_tensors(model, weights.load(saved))


def test_mapped_tensors_are_those_of_safetensors(tmp_path):
    """All precisions that folders have, scalars and empty tensors, and one after the other."""
    random = torch.Generator().manual_seed(0)
    tensors = {
        "bf16": torch.randn(3, 5, generator=random).bfloat16(),
        "fp16": torch.randn(7, generator=random).half(),
        "fp32": torch.randn(2, 1, 3, generator=random),
        "fp64": torch.randn(4, generator=random).double(),
        "int32": torch.randint(9, (2, 2), generator=random, dtype=torch.int32),
        "scalar": torch.randn((), generator=random),
        "empty": torch.zeros(0, 4),
    }
    file = tmp_path / "model.safetensors"
    save_file(tensors, file, {"format": "pt"})
    mapped = map_tensors(file)
    assert mapped.keys() == tensors.keys()
    for name, tensor in load_file(file).items():
        assert mapped[name].dtype == tensor.dtype
        assert torch.equal(mapped[name], tensor)
    mapped["fp32"].zero_()  # changes memory alone
    assert torch.equal(load_file(file)["fp32"], tensors["fp32"])


# ----------------------------------------------------------------------------------------------
# official code
@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="writes and reads the official folders")


@pytest.mark.slow
def test_folder_written_by_transformers(transformers, tmp_path):
    official = oracle.hf_model()
    official.save_pretrained(tmp_path, max_shard_size="2MB")
    torch.save(official.speaker_map, tmp_path / saving.VOICES_FILE)
    model = weights.load(tmp_path)
    theirs = {oracle.hf_name(name): tensor for name, tensor in official.state_dict().items()}
    ours = model.state_dict()
    assert len(index_of(tmp_path)) == len(ours)
    assert all(torch.equal(theirs[name], tensor) for name, tensor in ours.items())
    assert model.config.talker == oracle.CONFIG.talker
    assert model.config.token2wav == oracle.CONFIG.token2wav
    assert model.config.thinker.text == oracle.CONFIG.thinker.text
    reply = model.thinker.generate(oracle.inputs("mixed"), oracle.CONFIG.thinker_sampling)
    assert reply.tokens == oracle.golden("mixed")["tokens"].tolist()


@pytest.mark.slow
def test_folder_read_by_transformers(transformers, saved):
    official = transformers.Qwen2_5OmniForConditionalGeneration.from_pretrained(
        saved, dtype=torch.float32
    )
    again = {oracle.hf_name(name): p for name, p in official.named_parameters()}
    ours = weights.load(saved).state_dict()
    assert again.keys() == ours.keys()
    assert all(torch.equal(again[name], ours[name]) for name in ours)
    assert set(official.speaker_map) == {"Chelsie", "Ethan"}


# ----------------------------------------------------------------------------------------------
# bijection
def test_one_error_lists_all_differences(folder):
    def change(tensors):
        del tensors["talker.codec_head.weight"], tensors["thinker.lm_head.weight"]
        tensors["thinker.visual.extra.weight"] = torch.zeros(2)
        tensors["token2wav.code2wav_dit_model.proj_out.bias"] = torch.zeros(7)

    edit(folder, change)
    refuse(
        folder,
        re.escape(str(folder)),
        "2 missing: talker.codec_head.weight, thinker.lm_head.weight",
        "1 extra: thinker.visual.extra.weight",
        r"1 of another shape: token2wav.code2wav_dit_model.proj_out.bias is \[7\], expected \[80\]",
    )


def test_a_long_list_is_three_names_and_a_count(folder):
    """However many tensors are missing, extra or misshapen, and however long their names are."""

    def change(tensors):
        for name in list(tensors):
            if name.startswith("token2wav.code2wav_bigvgan_model"):
                del tensors[name]
            elif "visual" in name:
                tensors[name] = torch.zeros(1, 1, 1, 1, 1, 1, 1)
        tensors.update({f"talker.{i}.{'x' * 300}": torch.zeros(1) for i in range(2000)})

    edit(folder, change)
    refuse(
        folder,
        r"\d+ missing: token2wav\S+ and \d+ more; "
        r"2000 extra: talker.0.x+\.\.\.x+ and 1999 more; .* of another sh",
    )


def test_only_the_documented_extra_is_tolerated(folder, omni):
    extra = "token2wav.code2wav_dit_model.rotary_embed.inv_freq"
    edit(folder, lambda tensors: tensors.update({extra: torch.zeros(32)}))
    assert same_tensors(weights.load(folder), omni)
    edit(folder, lambda tensors: tensors.update({extra.replace("dit", "bigvgan"): torch.zeros(32)}))
    refuse(folder, "1 extra: .*bigvgan")


# ----------------------------------------------------------------------------------------------
# bad folders
def test_missing_folder_and_files(tmp_path, folder):
    refuse(tmp_path / "nowhere", "no such folder")
    for text in ("{}", '{"weight_map": {}}', '{"weight_map": {"a": 5}}', '{"weight_map": []}'):
        (folder / saving.INDEX_FILE).write_text(text)
        refuse(folder, "index.json: has no weight_map")
    (folder / saving.INDEX_FILE).unlink()
    for file in folder.glob("*.safetensors"):
        file.unlink()
    refuse(folder, "neither model.safetensors nor model.safetensors.index.json")
    for name, message in (
        ("pytorch_model.bin", "as .bin files; save them as safetensors"),
        ("x.gguf", "GGUF files"),
        ("adapter_model.safetensors", "a LoRA adapter alone; merge it"),
    ):
        (folder / name).write_bytes(b"x")
        refuse(folder, message)
        (folder / name).unlink()


def test_a_missing_index(folder, omni):
    """The headers of the files make up for it, and their names tell how many there are."""
    (folder / saving.INDEX_FILE).unlink()
    assert same_tensors(weights.load(folder), omni)
    first, *_, last = sorted(folder.glob("*.safetensors"))
    shutil.copy(first, folder / "a.safetensors")
    assert same_tensors(weights.load(folder), omni)  # not one of the numbered ones
    (folder / "a.safetensors").unlink()
    last.unlink()
    refuse(folder, f"1 of . files are missing: {last.name}; copy them again")
    shutil.copy(first, last)
    refuse(folder, "tensors lie in more than one file")


def test_truncated_and_missing_shards(folder):
    shard = sorted(folder.glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    for size in (0, 5, 4000, len(whole) - 1):
        shard.write_bytes(whole[:size])
        refuse(folder, f"{shard.name}: (is empty|cut short or not a safetensors file)")
    shard.write_bytes(
        b"version https://git-lfs.github.com/spec/v1\noid sha256:77\nsize 4985055536\n"
    )
    refuse(folder, f"{shard.name}: is a git-LFS pointer.*git lfs pull")
    shard.unlink()
    refuse(folder, f"{shard.name}: cannot be read .No such file")


def test_index_that_disagrees_with_the_files(folder):
    name, file = next(iter(index_of(folder).items()))
    reindex(folder, **{name: sorted(set(index_of(folder).values()) - {file})[0]})
    refuse(folder, f"index and files disagree, first about '{name}'")


@pytest.mark.parametrize("name", ["../model/{}", "sub/{}", "/etc/passwd", "..\\{}", "..", ""])
def test_index_that_points_outside(folder, name):
    tensor, file = next(iter(index_of(folder).items()))
    reindex(folder, **{tensor: name.format(file)})
    refuse(folder, "outside the model's folder")


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_a_hub_cache(folder, omni, tmp_path):
    """Its snapshots hold links to blobs; the snapshot that refs/main names is loaded."""
    home = tmp_path / "models--Qwen--Qwen2.5-Omni-7B"
    blobs, snapshots = home / "blobs", home / "snapshots"
    shutil.copytree(folder, blobs)
    for revision in ("0a1b", "2c3d"):
        (snapshots / revision).mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshots / "0a1b" / file.name).symlink_to(os.path.join("..", "..", "blobs", file.name))
    assert same_tensors(weights.load(snapshots / "0a1b"), omni)
    refuse(
        home,
        "is a cache folder whose refs/main names none of its snapshots; "
        "give one of 0a1b, 2c3d in snapshots/",
    )
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("../../elsewhere")
    refuse(home, "refs/main names none")
    (home / "refs" / "main").write_text("0a1b")
    model = weights.load(home)
    assert same_tensors(model, omni)
    assert model.loaded_from == snapshots / "0a1b"
    blob = next(blobs.glob("*.safetensors"))
    blob.unlink()
    refuse(home, f"{blob.name}: is a link to .*blobs/{blob.name}, which is not there")
    shutil.rmtree(snapshots / "0a1b")
    (home / "refs" / "main").unlink()
    refuse(home, "snapshots/2c3d/config.json: cannot be read")


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_files_linked_from_another_disk(folder, omni, tmp_path):
    (tmp_path / "disk").mkdir()
    for file in (*folder.glob("*.safetensors"), folder / saving.VOICES_FILE):
        file.rename(tmp_path / "disk" / file.name)
        file.symlink_to(tmp_path / "disk" / file.name)
    assert same_tensors(weights.load(folder), omni)


# Files that a folder may lack, and the weights.
LINKED = [
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "codec/config.json",
    "codec/model.safetensors",
    "model.safetensors",
    saving.INDEX_FILE,
    saving.VOICES_FILE,
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
]


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
@pytest.mark.parametrize("name", LINKED)
def test_links_to_nothing_are_no_absent_files(tmp_path, name):
    """A cache from which files were removed keeps their links; defaults would be wrong."""
    folder = tmp_path / "model"
    shutil.copytree(paths.data_samples() / "tiny", folder)
    if name == "processor_config.json":
        (folder / "preprocessor_config.json").unlink()
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("gone")
    message = f"{name}: is a link to gone, which is not there; copy or download the file again$"
    refuse(folder, message)
    assert any(re.search(message, error) for error in check_folder(folder).errors)


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_a_hub_cache_without_its_files(folder, tmp_path):
    home = tmp_path / "models--Qwen--Qwen2.5-Omni-7B"
    (home / "snapshots").mkdir(parents=True)
    refuse(home, "is a cache folder without snapshots; download the model again$")
    (home / "refs").mkdir()
    (home / "refs" / "main").symlink_to("gone")
    refuse(home, "refs/main: is a link to gone, which is not there; copy or download")


@pytest.mark.parametrize("section", ["", "image_processor", "feature_extractor"])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("image_mean", [0.5, 0.5, 0.5]),
        ("image_std", [0.26862954]),
        ("patch_size", 16),
        ("merge_size", "2"),
        ("sampling_rate", 10**400),
        ("hop_length", True),
    ],
)
def test_another_processing_of_media_is_refused(folder, section, key, value):
    """By transformers 4 in preprocessor_config.json, by 5 in a section of processor_config.json."""
    file = folder / ("processor_config.json" if section else "preprocessor_config.json")
    release = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "sampling_rate": 16_000}
    file.write_text(json.dumps({section: release} if section else release))
    weights.load(folder)
    changed = release | {key: value}
    file.write_text(json.dumps({section: changed} if section else changed))
    message = f"{file.name}: {key} is .*, this code can only compute"
    refuse(folder, message)
    assert any(re.search(message, error) for error in check_folder(folder).errors)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes here")
@pytest.mark.parametrize(
    "name",
    [
        saving.INDEX_FILE,
        saving.VOICES_FILE,
        "tokenizer.json",
        "model-00002-of-00006.safetensors",
        "generation_config.json",
    ],
)
def test_pipes_and_devices_are_not_read(folder, name):
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    refuse(folder, f"{name}: is not a regular file")
    (folder / name).unlink()
    (folder / name).symlink_to("/dev/zero")
    refuse(folder, f"{name}: is not a regular file")


# ----------------------------------------------------------------------------------------------
# a Thinker by itself
def thinker_alone(folder: Path, prefix: bool = True, kind: str = "qwen2_5_omni_thinker") -> None:
    """Remove all but the Thinker from a folder. prefix: whether its names keep "thinker."."""

    def change(tensors):
        for name in list(tensors):
            tensor = tensors.pop(name)
            if name.startswith("thinker."):
                tensors[name if prefix else name.removeprefix("thinker.")] = tensor

    edit(folder, change)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    if kind == "qwen2_5_omni_thinker":
        config = config["thinker_config"]
    elif kind == "turned off":
        config["enable_audio_output"] = False
    file.write_text(json.dumps(config))


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("kind", ["qwen2_5_omni_thinker", "turned off", "whole config"])
def test_a_thinker_alone_answers_in_text(folder, omni, tmp_path, prefix, kind):
    thinker_alone(folder, prefix, kind)
    model = weights.load(folder)
    assert same_tensors(model.thinker, omni.thinker)
    assert model.talker is model.token2wav is model.codec is None
    spoken = model.generate(oracle.inputs("mixed"), None)
    assert spoken.tokens == oracle.golden("mixed")["tokens"].tolist()
    assert spoken.waves == []
    asked = [{"role": "user", "content": "the red circle"}]
    reply = model.respond(asked, speech=False)
    assert reply.text == omni.respond(asked, speech=False).text
    assert len(reply.wave) == 0
    for attempt in (
        lambda: model.respond(asked),
        lambda: list(model.stream(asked)),
        lambda: model.generate(oracle.inputs("text"), "Chelsie"),
        lambda: model.listen(),
        lambda: model.respond(asked, speech=True),
    ):
        with pytest.raises(
            UserError, match="this model has no voice: its folder holds the Thinker alone"
        ):
            attempt()
    with pytest.raises(UserError, match="this model has no"):
        make_voice(np.ones(16_000, np.float32), "Ada", model)
    saving.save(model, tmp_path / "again")
    again = weights.load(tmp_path / "again")
    assert same_tensors(again, model)
    assert again.config == model.config


def test_speech_that_is_turned_off_is_not_read(folder, omni):
    """The folder holds the whole model, and its config.json turns speech off."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"enable_audio_output": False}))
    model = weights.load(folder)
    assert same_tensors(model.thinker, omni.thinker)
    assert model.talker is None
    assert not model.voices


def test_a_thinker_with_half_a_talker_is_refused(folder):
    def change(tensors):
        for name in list(tensors):
            if name.startswith("token2wav."):
                del tensors[name]

    edit(folder, change)
    refuse(folder, r"\d+ missing: token2wav\S+, token2wav\S+, token2wav\S+ and \d+ more$")


# ----------------------------------------------------------------------------------------------
# tied embeddings
def tie(folder: Path, stored: bool) -> None:
    """Turn tying on in config.json. stored: whether the text head stays in the files."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["thinker_config"]["text_config"]["tie_word_embeddings"] = True
    file.write_text(json.dumps(config))
    if not stored:
        edit(folder, lambda tensors: tensors.pop(TEXT_HEAD))


def test_a_tied_head_is_the_embedding_weight(folder, omni, tmp_path):
    tie(folder, stored=False)
    model = weights.load(folder)
    embedding = model.thinker.model.embed_tokens.weight
    assert model.thinker.lm_head.weight is embedding
    assert model.config.thinker.tie_word_embeddings
    assert torch.equal(embedding, omni.thinker.model.embed_tokens.weight)
    saving.save(model, tmp_path / "again")
    again = weights.load(tmp_path / "again")
    assert same_tensors(again, model)
    assert again.config == model.config
    with torch.device("meta"):
        assert Omni(model.config).thinker.lm_head.weight.is_meta


def test_a_head_that_is_stored_is_not_tied(folder, omni):
    tie(folder, stored=True)
    model = weights.load(folder)
    assert same_tensors(model, omni)
    assert not model.config.thinker.tie_word_embeddings


def test_a_missing_head_is_an_error(folder):
    edit(folder, lambda tensors: tensors.pop(TEXT_HEAD))
    refuse(folder, "1 missing: thinker.lm_head.weight")


# ----------------------------------------------------------------------------------------------
# precisions
@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (torch.int8, "I8"),
        (torch.float8_e4m3fn, "F8_E4M3"),
        (torch.int64, "I64"),
        (torch.bool, "BOOL"),
        (torch.uint8, "U8"),
    ],
)
def test_tensors_of_other_dtypes_are_refused(folder, dtype, name):
    one = "talker.model.layers.1.mlp.up_proj.weight"
    edit(folder, lambda tensors: tensors.update({one: tensors[one].to(dtype)}))
    refuse(folder, f"1 tensors are {name}, first {one}; only BF16, F16, F32, F64 are read here")


@pytest.mark.parametrize("suffix", ["qweight", "weight_scale_inv", "weight.absmax", "SCB"])
def test_quantized_folders_are_refused(folder, suffix):
    extra = f"thinker.model.layers.0.mlp.down_proj.{suffix}"
    edit(folder, lambda tensors: tensors.update({extra: torch.zeros(4)}))
    refuse(
        folder,
        f"its weights are quantized .1 tensors such as thinker.*{suffix}.*take the bf16 release",
    )


@pytest.mark.parametrize("emulated", [False, True])
def test_mixed_precisions_become_the_most_common_one(folder, omni, monkeypatch, emulated):
    """Where a CPU emulates that one, fp32 holds its values."""
    monkeypatch.setattr(weights, "is_emulated", lambda dtype, device: emulated)

    def change(tensors):
        for name in list(tensors):
            is_norm = name.startswith("thinker.model.norm")
            tensors[name] = tensors[name] + 1e-4 if is_norm else tensors[name].bfloat16()

    edit(folder, change)
    for dtype in (None, "auto"):
        model = weights.load(folder, dtype=dtype)
        kinds = {name.split(".")[0]: p.dtype for name, p in model.named_parameters()}
        precision = torch.float32 if emulated else torch.bfloat16
        assert kinds == {
            "thinker": precision,
            "talker": precision,
            "token2wav": torch.float32,
        }
        norm = model.thinker.model.norm.weight
        assert torch.equal(norm, norm.bfloat16().to(precision))


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("bf16", torch.bfloat16),
        ("torch.float16", torch.float16),
        (torch.float64, torch.float64),
        ("float", torch.float32),
    ],
)
def test_precisions_by_name(saved, dtype, expected):
    model = minomni.load(str(saved), dtype=dtype)
    assert model.talker.codec_head.weight.dtype == model.thinker.lm_head.weight.dtype == expected


@pytest.mark.parametrize(
    "dtype", ["int8", torch.int32, "fp4", 16, ["bf16"], "x" * 10**6, "", True, np.float32]
)
def test_unknown_dtypes_are_refused(saved, dtype):
    with pytest.raises(
        UserError, match="dtype .*: expected bfloat16, float16, float32 or float64"
    ) as error:
        minomni.load(str(saved), dtype=dtype)
    assert len(str(error.value)) <= 500


@pytest.mark.parametrize(
    "device", ["gpu", "CUDA", "cuda:99", "meta", "", 0, None, ["cpu"], "cpu:x", "y" * 10**6, b"cpu"]
)
def test_unknown_devices_are_refused(saved, device):
    with pytest.raises(
        UserError, match="device .*: this machine, with this PyTorch, has .*cpu; or use auto"
    ) as error:
        weights.load(saved, device)
    assert len(str(error.value)) <= 500
    assert "\n" not in str(error.value)


def test_devices_by_name(saved):
    for device in ("cpu", torch.device("cpu"), "cpu:0"):
        assert next(minomni.load(saved, device).parameters()).device.type == "cpu"


@pytest.mark.parametrize(
    "name",
    [5, None, "", b"tiny", ["tiny"], "no\0where", "a/" * 5000, "huge", "line\nfeed", "half \ud83d"],
)
def test_unknown_models_are_refused(name):
    with pytest.raises(UserError, match="the sizes are tiny, small, qwen7b") as error:
        minomni.load(name)
    assert len(str(error.value)) <= 500
    assert "\n" not in str(error.value)


def test_a_folder_named_like_a_size(saved, tmp_path, monkeypatch):
    """It is used only if it holds a model."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    folder = minomni.folder_of("tiny")
    assert folder == minomni.paths.data_samples() / "tiny" or "runs" in str(folder)
    shutil.copytree(saved, tmp_path / "tiny", dirs_exist_ok=True)
    assert minomni.folder_of("tiny") == Path("tiny")


# ----------------------------------------------------------------------------------------------
# files that disagree
def test_a_tokenizer_of_another_model(folder):
    Tokenizer.train(["the red circle"] * 3, 262, {"<|im_end|>": 300}).save(folder)
    refuse(folder, r"<\|im_end\|> is 300 in the tokenizer's files and 409 in config.json")
    Tokenizer.train(["the red circle"] * 3, 262, {"<|other|>": 600}).save(folder)
    refuse(folder, "the tokenizer has the id 600, the model embeds ids below 512")


def test_sizes_that_cannot_be_built(folder):
    config = json.loads((folder / "config.json").read_text())
    config["thinker_config"]["vision_config"] |= {
        "patch_size": 2**20,
        "temporal_patch_size": 2**24,
        "window_size": 2**21,
    }
    (folder / "config.json").write_text(json.dumps(config))
    refuse(folder, "config.json: describes a model that cannot be built")


# ----------------------------------------------------------------------------------------------
# voices
class MaliciousPickle:
    """Makes a file when it is unpickled."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_voices_that_run_code_are_refused(folder, tmp_path):
    file = tmp_path / "executed"
    torch.save({"Chelsie": MaliciousPickle(file)}, folder / saving.VOICES_FILE)
    refuse(folder, "spk_dict.pt: is cut short or wants to run code")
    (folder / saving.VOICES_FILE).write_bytes(pickle.dumps(MaliciousPickle(file)))
    refuse(folder, "spk_dict.pt: is cut short or wants to run code")
    assert not file.exists()


def entry(bos=5, cond=(1, 12), ref_mel=(1, 9, 80)):
    return {"bos_token": bos, "cond": torch.zeros(cond), "ref_mel": torch.zeros(ref_mel)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "holds a list, not a dictionary of voices"),
        ({"A": {"bos_token": 5}}, "voice 'A' must have"),
        ({"A": 3}, "voice 'A' must have"),
        ({"A": entry(bos=512)}, "bos_token 512.*an id below 512"),
        ({"A": entry(cond=(1, 192))}, r"cond \[1, 192\].*\[1, 12\]"),
        ({"A": entry(ref_mel=(9, 80))}, r"ref_mel \[9, 80\]"),
        (
            {"A": entry(ref_mel=(1, 4, 80))},
            r"ref_mel \[1, 4, 80\]; expected .* \[1, \d+ to 30000 frames, 80\]",
        ),
        (
            {"A": entry() | {"ref_mel": torch.zeros(1, 1, 80).expand(1, 10**9, 80)}},
            r"ref_mel \[1, 1000000000, 80\]",
        ),
        (
            {"A": entry() | {"ref_mel": torch.zeros(1, 1, 80).half().expand(1, 10**6, 80)}},
            r"ref_mel \[1, 1000000, 80\]",
        ),
        (
            {"A": entry() | {"cond": torch.full((1, 12), float("nan"))}},
            "numbers that are not finite",
        ),
        (
            {"A": entry() | {"cond": torch.zeros(1, 12, dtype=torch.long)}},
            "tensors cond and ref_mel of floating-point",
        ),
        (
            {"A": entry() | {"cond": torch.zeros(1, 12).to_sparse()}},
            "tensors cond and ref_mel of floating-point",
        ),
        ({"A": entry(bos=True)}, "must have an id bos_token"),
        ({"A": entry(bos=5.5)}, "must have an id bos_token"),
        ({"A": entry(bos=10**30)}, "bos_token 1000"),
        ({"A" * 10**5: entry(bos=-1)}, "voice 'AAA"),
    ],
)
def test_voices_of_another_shape(folder, content, message):
    torch.save(content, folder / saving.VOICES_FILE)
    refuse(folder, "spk_dict.pt: ", message)


def test_broken_and_absent_voices(folder):
    whole = (folder / saving.VOICES_FILE).read_bytes()
    for size in (0, 20, len(whole) // 2):
        (folder / saving.VOICES_FILE).write_bytes(whole[:size])
        refuse(folder, "spk_dict.pt: ")
    (folder / saving.VOICES_FILE).unlink()
    silent = weights.load(folder)
    assert len(silent.generate(oracle.inputs("text"), None).tokens[0]) == 8
    with pytest.raises(UserError, match="unknown voice 'Chelsie'; this model has none"):
        silent.generate(oracle.inputs("text"), "Chelsie")


def test_voices_that_unpack_to_too_much(folder):
    """300 million zeros take 300 thousand bytes in a compressed archive."""
    archive = zipfile.ZipFile(
        folder / saving.VOICES_FILE, "w", zipfile.ZIP_DEFLATED, compresslevel=1
    )
    with archive, archive.open("archive/data/0", "w", force_zip64=True) as file:
        for _ in range(300):
            file.write(bytes(1_000_000))
    refuse(folder, "spk_dict.pt: unpacks to 300,000,000 bytes, expected at most")
    with open(folder / saving.VOICES_FILE, "wb") as file:
        file.truncate(300_000_000)
    refuse(folder, "spk_dict.pt: has 300,000,000 bytes, expected at most")
    (folder / saving.VOICES_FILE).write_bytes(
        b"version https://git-lfs.github.com/spec/v1\noid sha256:9f\nsize 259544\n"
    )
    refuse(folder, "spk_dict.pt: is a git-LFS pointer")


def test_unknown_voice_names_the_known_ones(omni):
    with pytest.raises(UserError, match="unknown voice 'Bob'; this model has Chelsie, Ethan"):
        omni.generate(oracle.inputs("text"), "Bob")


def test_a_silent_reply_has_no_samples(omni):
    first = int(oracle.golden("text")["tokens"][0, 0])
    tokens = dataclasses.replace(oracle.TOKENS, im_end=first)  # ends the reply at once
    thinker = dataclasses.replace(oracle.CONFIG.thinker, tokens=tokens)
    silent = Omni(dataclasses.replace(oracle.CONFIG, thinker=thinker))
    silent.load_state_dict(omni.state_dict())
    silent.voices = omni.voices
    spoken = silent.generate(oracle.inputs("text"), "Ethan")
    assert spoken.tokens == [[first]]
    assert spoken.codes[0].shape == spoken.waves[0].shape == (0,)


def test_same_seed_same_wave(omni):
    sampling = dataclasses.replace(
        oracle.CONFIG.talker_sampling, temperature=0.9, top_k=40, top_p=0.8, max_new_tokens=12
    )
    omni = Omni(dataclasses.replace(oracle.CONFIG, talker_sampling=sampling)).eval()
    oracle.fill(omni.state_dict())
    omni.voices = oracle.voices()
    a, b, c = (omni.generate(oracle.inputs("text"), "Chelsie", seed) for seed in (1, 1, 2))
    assert torch.equal(a.waves[0], b.waves[0])
    assert not torch.equal(a.codes[0], c.codes[0])
    assert np.isfinite(a.waves[0].numpy()).all()


@pytest.mark.slow
def test_importing_needs_no_transformers():
    code = (
        "import minomni.omni, minomni.checkpoint.weights, sys; "
        "assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
