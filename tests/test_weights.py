"""Checkpoint folders: official ones load as they are, ours come back as they were, broken ones are refused by name."""

import dataclasses
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from safetensors.torch import load_file, save_file

from minomni import weights
from minomni.errors import UserError
from minomni.inputs.tokenizer import Tokenizer, special_tokens
from minomni.omni import Omni


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
    """It, saved in several shards. Copy before changing anything."""
    folder = tmp_path_factory.mktemp("models") / "saved"
    weights.save(omni, folder, shard_bytes=2_000_000)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy to break."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def same_tensors(a, b) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def index_of(folder: Path) -> dict:
    return json.loads((folder / weights.INDEX).read_text())["weight_map"]


def reindex(folder: Path, **changes) -> None:
    (folder / weights.INDEX).write_text(json.dumps({"weight_map": index_of(folder) | changes}))


def edit(folder: Path, change) -> None:
    """Change the tensors of the folder's one file (a folder of one file has no index)."""
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
        file.unlink()
    (folder / weights.INDEX).unlink(missing_ok=True)
    change(tensors)
    save_file(tensors, folder / weights.WHOLE)


def refuse(folder: Path, *messages: str) -> str:
    with pytest.raises(UserError) as error:
        weights.load(folder)
    for message in messages:
        assert re.search(message, str(error.value)), str(error.value)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---------------------------------------------------------------------------------------------------------- round trips
def test_saved_folder_comes_back(omni, saved):
    again = weights.load(saved)
    assert same_tensors(again, omni) and again.config == omni.config
    assert len(list(saved.glob("*.safetensors"))) > 3
    assert again.voices.keys() == omni.voices.keys()
    for name, voice in omni.voices.items():
        assert again.voices[name].bos_token == voice.bos_token
        assert torch.equal(again.voices[name].cond, voice.cond)
        assert torch.equal(again.voices[name].ref_mel, voice.ref_mel)
    assert again.tokenizer.encode("the blue circle<|im_end|>") == omni.tokenizer.encode("the blue circle<|im_end|>")
    assert all(p.requires_grad and not p.is_meta for p in again.parameters())


def test_requested_precision_spares_the_voice(saved):
    model = weights.load(saved, dtype=torch.bfloat16)
    kinds = {name.split(".")[0]: p.dtype for name, p in model.named_parameters()}
    assert kinds == {"thinker": torch.bfloat16, "talker": torch.bfloat16, "token2wav": torch.float32}
    spoken = model.generate(oracle.inputs("mixed"), "Chelsie")
    assert spoken.waves[0].isfinite().all() and len(spoken.waves[0]) == 480 * len(spoken.codes[0]) > 0


def test_loaded_tensors_outlive_their_files(folder, omni):
    model = weights.load(folder)
    for file in folder.glob("*.safetensors"):
        file.write_bytes(bytes(file.stat().st_size))
    assert same_tensors(model, omni)


# ------------------------------------------------------------------------------------------------------- official code
@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="writes and reads the official folders")


def test_folder_written_by_transformers(transformers, tmp_path):
    official = oracle.hf_model()
    official.save_pretrained(tmp_path, max_shard_size="2MB")
    torch.save(official.speaker_map, tmp_path / weights.VOICES)
    model = weights.load(tmp_path)
    theirs = {oracle.hf_name(name): tensor for name, tensor in official.state_dict().items()}
    ours = model.state_dict()
    assert len(index_of(tmp_path)) == len(ours)
    assert all(torch.equal(theirs[name], tensor) for name, tensor in ours.items())
    assert model.config.talker == oracle.CONFIG.talker and model.config.token2wav == oracle.CONFIG.token2wav
    assert model.config.thinker.text == oracle.CONFIG.thinker.text
    reply = model.thinker.generate(oracle.inputs("mixed"), oracle.CONFIG.thinker_sampling)
    assert reply.tokens == oracle.golden("mixed")["tokens"].tolist()


def test_folder_read_by_transformers(transformers, saved):
    official = transformers.Qwen2_5OmniForConditionalGeneration.from_pretrained(saved, dtype=torch.float32)
    again = {oracle.hf_name(name): p for name, p in official.named_parameters()}
    ours = weights.load(saved).state_dict()
    assert again.keys() == ours.keys() and all(torch.equal(again[name], ours[name]) for name in ours)
    assert set(official.speaker_map) == {"Chelsie", "Ethan"}


# ----------------------------------------------------------------------------------------------------------- bijection
def test_one_error_lists_all_differences(folder):
    def change(tensors):
        del tensors["talker.codec_head.weight"], tensors["thinker.lm_head.weight"]
        tensors["thinker.visual.extra.weight"] = torch.zeros(2)
        tensors["token2wav.code2wav_dit_model.proj_out.bias"] = torch.zeros(7)

    edit(folder, change)
    refuse(folder, re.escape(str(folder)), "2 missing: talker.codec_head.weight, thinker.lm_head.weight",
           "1 extra: thinker.visual.extra.weight",
           r"1 of another shape: token2wav.code2wav_dit_model.proj_out.bias is \[7\], expected \[80\]")


def test_only_the_documented_extra_is_tolerated(folder, omni):
    extra = "token2wav.code2wav_dit_model.rotary_embed.inv_freq"
    edit(folder, lambda tensors: tensors.update({extra: torch.zeros(32)}))
    assert same_tensors(weights.load(folder), omni)
    edit(folder, lambda tensors: tensors.update({extra.replace("dit", "bigvgan"): torch.zeros(32)}))
    refuse(folder, "1 extra: .*bigvgan")


# ---------------------------------------------------------------------------------------------------------- bad folders
def test_missing_folder_and_files(tmp_path, folder):
    refuse(tmp_path / "nowhere", "no such folder")
    (folder / weights.INDEX).unlink()
    refuse(folder, "neither model.safetensors nor model.safetensors.index.json")
    (folder / weights.INDEX).write_text("{}")
    refuse(folder, "index.json: has no weight_map")


def test_truncated_and_missing_shards(folder):
    shard = sorted(folder.glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    for size in (0, 5, 4000, len(whole) - 1):
        shard.write_bytes(whole[:size])
        refuse(folder, f"{shard.name}: missing, cut short or not a safetensors file")
    shard.unlink()
    refuse(folder, f"{shard.name}: missing")


def test_index_that_disagrees_with_the_files(folder):
    name, file = next(iter(index_of(folder).items()))
    reindex(folder, **{name: sorted(set(index_of(folder).values()) - {file})[0]})
    refuse(folder, f"index and files disagree, first about '{name}'")


@pytest.mark.parametrize("name", ["../model/{}", "sub/{}", "/etc/passwd", "..\\{}", "..", ""])
def test_index_that_points_outside(folder, name):
    tensor, file = next(iter(index_of(folder).items()))
    reindex(folder, **{tensor: name.format(file)})
    refuse(folder, "outside the model's folder|missing, cut short")


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_links_lead_outside_only_in_a_hub_cache(folder, omni, tmp_path):
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "0a1b"
    shutil.copytree(folder, blobs)
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(os.path.join("..", "..", "blobs", file.name))
    assert same_tensors(weights.load(snapshot), omni)
    shard = sorted(folder.glob("*.safetensors"))[0]
    shard.rename(tmp_path / "elsewhere.safetensors")
    shard.symlink_to(tmp_path / "elsewhere.safetensors")
    refuse(folder, f"{shard.name}', which is outside the model's folder")


# -------------------------------------------------------------------------------------------------------------- voices
class Intruder:
    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_voices_that_want_to_run_code(folder, tmp_path):
    mark = tmp_path / "was here"
    torch.save({"Chelsie": Intruder(mark)}, folder / weights.VOICES)
    refuse(folder, "spk_dict.pt: is cut short or wants to run code")
    (folder / weights.VOICES).write_bytes(pickle.dumps(Intruder(mark)))
    refuse(folder, "spk_dict.pt: is cut short or wants to run code")
    assert not mark.exists()


def entry(bos=5, cond=(1, 12), ref_mel=(1, 9, 80)):
    return {"bos_token": bos, "cond": torch.zeros(cond), "ref_mel": torch.zeros(ref_mel)}


@pytest.mark.parametrize("content, message", [
    ([1, 2], "holds a list, not a dictionary of voices"),
    ({"A": {"bos_token": 5}}, "voice 'A' must have"),
    ({"A": 3}, "voice 'A' must have"),
    ({"A": entry(bos=512)}, "bos_token 512.*an id below 512"),
    ({"A": entry(cond=(1, 192))}, r"cond \[1, 192\].*\[1, 12\]"),
    ({"A": entry(ref_mel=(9, 80))}, r"ref_mel \[9, 80\]"),
])
def test_voices_of_another_shape(folder, content, message):
    torch.save(content, folder / weights.VOICES)
    refuse(folder, "spk_dict.pt: ", message)


def test_broken_and_absent_voices(folder):
    whole = (folder / weights.VOICES).read_bytes()
    for size in (0, 20, len(whole) // 2):
        (folder / weights.VOICES).write_bytes(whole[:size])
        refuse(folder, "spk_dict.pt: ")
    (folder / weights.VOICES).unlink()
    silent = weights.load(folder)
    assert len(silent.generate(oracle.inputs("text"), None).tokens[0]) == 8
    with pytest.raises(UserError, match="unknown voice 'Chelsie'; this model has none"):
        silent.generate(oracle.inputs("text"), "Chelsie")


def test_unknown_voice_names_the_known_ones(omni):
    with pytest.raises(UserError, match="unknown voice 'Bob'; this model has Chelsie, Ethan"):
        omni.generate(oracle.inputs("text"), "Bob")


def test_a_silent_reply_has_no_samples(omni):
    first = int(oracle.golden("text")["tokens"][0, 0])
    config = dataclasses.replace(oracle.CONFIG.thinker, tokens=dataclasses.replace(oracle.TOKENS, im_end=first))
    mute = Omni(dataclasses.replace(oracle.CONFIG, thinker=config))
    mute.load_state_dict(omni.state_dict())
    mute.voices = omni.voices
    spoken = mute.generate(oracle.inputs("text"), "Ethan")
    assert spoken.tokens == [[first]] and spoken.codes[0].shape == spoken.waves[0].shape == (0,)


def test_same_seed_same_wave(omni):
    loud = dataclasses.replace(oracle.CONFIG.talker_sampling, temperature=0.9, top_k=40, top_p=0.8, max_new_tokens=12)
    omni = Omni(dataclasses.replace(oracle.CONFIG, talker_sampling=loud)).eval()
    oracle.fill(omni.state_dict())
    omni.voices = oracle.voices()
    a, b, c = (omni.generate(oracle.inputs("text"), "Chelsie", seed) for seed in (1, 1, 2))
    assert torch.equal(a.waves[0], b.waves[0]) and not torch.equal(a.codes[0], c.codes[0])
    assert np.isfinite(a.waves[0].numpy()).all()


def test_importing_needs_no_transformers():
    code = "import minomni.omni, minomni.weights, sys; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
