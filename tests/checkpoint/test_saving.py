"""Saving writes a whole model or nothing, loses nothing, and deletes nothing but models."""

import dataclasses
import json
import os
import shutil
import stat
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

import minomni
from minomni.checkpoint import saving, weights
from minomni.checkpoint.processor_files import CHAT_TEMPLATE
from minomni.config import TINY
from minomni.errors import UserError
from minomni.inputs.prompt import render
from minomni.inputs.tokenizer import Tokenizer, special_tokens
from minomni.omni import Omni
from minomni.token2wav.voice import Voice


@pytest.fixture(scope="module")
def omni():
    """A model with a codec, voices and a tokenizer."""
    torch.manual_seed(1)
    dit = TINY.token2wav.dit
    model = Omni(TINY).eval()
    model.voices = {
        "ada": Voice("ada", 500, torch.ones(1, dit.enc_emb_dim), torch.zeros(1, 50, dit.mel_dim))
    }
    model.tokenizer = Tokenizer.train(
        ["a bird sings in the tree"] * 3, 280, special_tokens(TINY.thinker.tokens)
    )
    return model


@pytest.fixture
def folder(omni, tmp_path):
    """The model saved, alone in its parent folder."""
    minomni.save(omni, tmp_path / "parent" / "model")
    return tmp_path / "parent" / "model"


def same_tensors(a, b) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(
        torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype for name in a
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


def refuse(omni, target, *parts: str) -> None:
    """Saving raises one line that holds the target and each of `parts`."""
    with pytest.raises(UserError) as error:
        minomni.save(omni, target)
    message = str(error.value)
    assert "\n" not in message
    assert len(message) <= 500
    for part in (str(target), *parts):
        assert part in message, message


# ----------------------------------------------------------------------------------------------
# the codec
def test_codec_has_a_folder_of_its_own(omni, folder):
    assert same_tensors(weights.load(folder), omni)
    assert weights.load(folder).config == omni.config
    top = load_file(folder / "model.safetensors")
    assert {name.split(".")[0] for name in top} == {"thinker", "talker", "token2wav"}
    codec = load_file(folder / "codec" / "model.safetensors")
    assert {name.split(".")[0] for name in codec} == {"codec"}
    assert "codec_config" not in json.loads((folder / "config.json").read_text())
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_codec_of_an_older_folder_is_read(omni, folder):
    """Its tensors are among the others there, and its sizes in config.json."""
    old_layout(folder)
    old = weights.load(folder)
    assert same_tensors(old, omni)
    assert old.config == omni.config
    minomni.save(old, folder)
    assert (folder / "codec" / "model.safetensors").exists()
    assert same_tensors(weights.load(folder), omni)


@pytest.mark.skipif(os.name == "nt", reason="no such rights on Windows")
def test_all_files_have_the_same_permissions(folder):
    modes = {file.stat().st_mode for file in folder.rglob("*") if file.is_file()}
    assert modes == {(folder / "config.json").stat().st_mode}


def old_layout(folder: Path) -> None:
    """Move the codec into the files of the other parts, as older versions stored it."""
    codec, config = folder / "codec", json.loads((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors") | load_file(codec / "model.safetensors")
    config["codec_config"] = json.loads((codec / "config.json").read_text())
    saving.save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    shutil.rmtree(codec)


def test_a_broken_codec_folder_is_named(folder):
    config = json.loads((folder / "codec" / "config.json").read_text())
    (folder / "codec" / "config.json").write_text(json.dumps(config | {"color": 3}))
    with pytest.raises(UserError, match="codec.config.json: unknown key 'color'"):
        weights.load(folder)
    (folder / "codec" / "config.json").write_text(json.dumps({**config, "levels": "many"}))
    with pytest.raises(UserError, match="codec.config.json: 'levels' is 'many'"):
        weights.load(folder)
    (folder / "codec" / "config.json").write_text(json.dumps(config))
    (folder / "codec" / "model.safetensors").write_bytes(b"short")
    with pytest.raises(UserError, match="codec.model.safetensors"):
        weights.load(folder)
    (folder / "codec" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"missing.*codec\."):
        weights.load(folder)


# ----------------------------------------------------------------------------------------------
# round trips
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_loaded_and_saved_again_is_the_same(omni, tmp_path, dtype, monkeypatch):
    """Thinker and Talker in any precision and in several files, Token2Wav in fp32."""
    monkeypatch.setattr(weights, "is_emulated", lambda dtype, device: False)
    first = Omni(TINY).eval()
    first.load_state_dict(omni.state_dict())
    first.thinker.to(dtype), first.talker.to(dtype)
    first.voices, first.tokenizer = omni.voices, omni.tokenizer
    saving.save(first, tmp_path / "one", shard_bytes=3_000_000)
    settings = json.loads((tmp_path / "one" / "config.json").read_text())
    assert settings["torch_dtype"] == str(dtype).split(".")[1]
    once = weights.load(tmp_path / "one")
    saving.save(once, tmp_path / "two", shard_bytes=3_000_000)
    twice = weights.load(tmp_path / "two")
    assert len(list((tmp_path / "one").glob("*.safetensors"))) > 3
    assert same_tensors(first, once)
    assert same_tensors(once, twice)
    assert once.config == twice.config == TINY
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_a_float16_model_loads_with_speech_in_fp32(omni, tmp_path, monkeypatch):
    """All of it is stored in 16 bits; Token2Wav and codec are loaded in fp32, as rounded."""
    monkeypatch.setattr(weights, "is_emulated", lambda dtype, device: False)
    half = Omni(TINY).eval()
    half.load_state_dict(omni.state_dict())
    half.half()
    minomni.save(half, tmp_path / "half")
    stored = load_file(tmp_path / "half" / "model.safetensors")
    stored.pop(saving.DIT_INV_FREQ)
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    again = weights.load(tmp_path / "half")
    assert next(again.thinker.parameters()).dtype == torch.float16
    assert next(again.token2wav.parameters()).dtype == torch.float32
    assert next(again.codec.parameters()).dtype == torch.float32
    rounded = half.state_dict()
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor.half(), rounded[name])


def test_saving_over_the_folder_it_was_loaded_from(folder, omni):
    model = weights.load(folder)
    with torch.no_grad():
        model.thinker.lm_head.weight.mul_(2)
    minomni.save(model, folder)
    again = weights.load(folder)
    assert same_tensors(again, model)
    assert torch.equal(again.thinker.lm_head.weight, 2 * omni.thinker.lm_head.weight)
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


# ----------------------------------------------------------------------------------------------
# foreign files
@pytest.fixture
def official(omni, tmp_path) -> Path:
    """A folder like the release's, with files that load() does not need, in a hub cache."""
    blobs, folder = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "5e1f"
    minomni.save(omni, blobs)
    (blobs / "README.md").write_text("a model")
    (blobs / "LICENSE").write_text("yours")
    (blobs / "plan.png").write_bytes(b"\x89PNG")
    (blobs / "merged.bin").write_bytes(b"foreign weights")
    (blobs / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "TheirsFast", "image_token": "x"})
    )
    (blobs / "chat_template.json").write_text(json.dumps({"chat_template": "theirs"}))
    (blobs / "chat_template.jinja").unlink()
    for name, more in (
        ("generation_config.json", {"eos_token_id": [482, 480], "use_cache": True}),
        ("preprocessor_config.json", {"rescale_factor": 1 / 255, "resample": 3}),
    ):
        settings = json.loads((blobs / name).read_text())
        (blobs / name).write_text(json.dumps(settings | more))
    for file in blobs.rglob("*"):
        if file.is_file():
            link = folder / file.relative_to(blobs)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(file, link.parent))
    return folder


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_foreign_files_of_the_loaded_folder_are_kept(official, tmp_path):
    model = weights.load(official)
    assert model.loaded_from == official
    minomni.save(model, tmp_path / "mine")
    mine = contents(tmp_path / "mine")
    for name in (
        "README.md",
        "LICENSE",
        "plan.png",
        "tokenizer_config.json",
        "chat_template.json",
        "vocab.json",
    ):
        assert mine[name] == (official / name).read_bytes()
    assert "merged.bin" not in mine  # other weights
    assert "chat_template.jinja" not in mine  # a second template
    assert not any(path.is_symlink() for path in (tmp_path / "mine").rglob("*"))
    generation = json.loads(mine["generation_config.json"])
    media = json.loads(mine["preprocessor_config.json"])
    assert generation["eos_token_id"] == [482, 480]
    assert generation["use_cache"]
    assert "thinker" in generation
    assert media["rescale_factor"] == 1 / 255
    assert media["resample"] == 3
    assert media["patch_size"] == 14
    assert same_tensors(weights.load(tmp_path / "mine"), model)
    minomni.save(model, tmp_path / "mine")  # its README.md came from the loaded folder
    assert contents(tmp_path / "mine") == mine


def test_settings_of_the_model_win_over_those_of_the_loaded_folder(official, tmp_path):
    model = weights.load(official)
    media = dataclasses.replace(model.config.media, image_max_pixels=9_408)
    model.config = dataclasses.replace(model.config, media=media)
    minomni.save(model, tmp_path / "mine")
    assert weights.load(tmp_path / "mine").config.media == media
    settings = json.loads((tmp_path / "mine" / "preprocessor_config.json").read_text())
    assert settings["max_pixels"] == 9_408


def test_sampling_of_the_loaded_folder_is_saved_once(omni, tmp_path):
    """The keys of transformers would disagree with our group once a setting has changed."""
    minomni.save(omni, tmp_path / "theirs")
    file = tmp_path / "theirs" / "generation_config.json"
    file.write_text(json.dumps({"do_sample": True, "temperature": 0.6, "use_cache": True}))
    model = weights.load(tmp_path / "theirs")
    sampling = dataclasses.replace(model.config.thinker_sampling, temperature=0.3)
    model.config = dataclasses.replace(model.config, thinker_sampling=sampling)
    minomni.save(model, tmp_path / "mine")
    assert weights.load(tmp_path / "mine").config.thinker_sampling == sampling
    saved = json.loads((tmp_path / "mine" / file.name).read_text())
    assert saved["use_cache"]
    assert "temperature" not in saved


def test_another_tokenizer_gets_files_of_its_own(official, tmp_path):
    model = weights.load(official)
    model.tokenizer = Tokenizer.train(
        ["quite another text"] * 2, 262, special_tokens(TINY.thinker.tokens)
    )
    minomni.save(model, tmp_path / "mine")
    written = json.loads((tmp_path / "mine" / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "Qwen2Tokenizer"
    assert not (tmp_path / "mine" / "chat_template.json").exists()
    assert weights.load(tmp_path / "mine").tokenizer.merges == model.tokenizer.merges


def test_everything_is_kept_when_saving_over_the_loaded_folder(folder):
    (folder / "README.md").write_text("mine")
    (folder / ".cache" / "hub").mkdir(parents=True)
    (folder / ".cache" / "hub" / "state").write_text("theirs")
    (folder / "old.gguf").write_bytes(b"quantized")
    (folder / "shortcut").symlink_to("README.md")
    model = weights.load(folder)
    minomni.save(model, folder)
    assert (folder / ".cache" / "hub" / "state").read_text() == "theirs"
    assert (folder / "README.md").read_text() == "mine"
    assert (folder / "old.gguf").read_bytes() == b"quantized"
    assert os.readlink(folder / "shortcut") == "README.md"


def test_a_loaded_folder_may_be_gone(folder, tmp_path):
    model = weights.load(folder)
    shutil.rmtree(folder)
    minomni.save(model, tmp_path / "again")
    assert same_tensors(weights.load(tmp_path / "again"), model)


# ----------------------------------------------------------------------------------------------
# targets
def test_an_older_model_is_replaced(folder, omni):
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"an old shard")
    (folder / "model.safetensors.index.json").write_text("{}")
    minomni.save(omni, folder)
    assert {file.name for file in folder.glob("*.safetensors")} == {"model.safetensors"}
    assert same_tensors(weights.load(folder), omni)


@pytest.mark.parametrize("name", ["letters.doc", ".git", "codec2"])
def test_a_folder_with_anything_else_is_refused(folder, omni, name):
    if name == "letters.doc":
        (folder / name).write_text("years of work")
    else:
        (folder / name).mkdir()
    before = contents(folder)
    refuse(omni, folder, f"holds '{name}', which saving would delete")
    assert contents(folder) == before
    assert (folder / name).exists()


def test_foreign_weights_are_not_part_of_the_model(omni, folder, tmp_path):
    """An adapter alone, a codec folder with notes, and an adapter beside a model."""
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "my_lora.safetensors").write_bytes(b"weights")
    refuse(omni, tmp_path / "lora", "contains something other than a model")
    (folder / "codec" / "notes.txt").write_text("mine")
    refuse(omni, folder, "'codec'")
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    loaded = weights.load(folder)
    minomni.save(loaded, folder)
    assert (folder / "codec" / "notes.txt").read_text() == "mine"
    assert (folder / "adapter_model.safetensors").read_bytes() == b"weights"
    assert same_tensors(weights.load(folder), loaded)


@pytest.mark.parametrize("shard_bytes", [saving.SHARD_BYTES, 3_000_000])
def test_a_model_without_speech_does_not_replace_one_that_speaks(
    omni, folder, tmp_path, shard_bytes
):
    saving.save(omni, folder, shard_bytes)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"enable_audio_output": False}))
    silent = weights.load(folder)
    refuse(silent, folder, "holds a model that speaks")
    minomni.save(silent, tmp_path / "text")
    again = weights.load(tmp_path / "text")
    minomni.save(again, tmp_path / "text")
    assert again.talker is None
    assert same_tensors(again, silent)


def test_the_history_of_a_model_stays_with_it(omni, folder):
    (folder / "trained.json").write_text('{"size": "tiny"}')
    minomni.save(weights.load(folder), folder)
    assert (folder / "trained.json").exists()
    minomni.save(omni, folder)  # another model
    assert not (folder / "trained.json").exists()


@pytest.mark.parametrize("target", ["a\0b", "n" * 300, "", None, 5])
def test_impossible_paths_are_one_line_errors(omni, target, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError):
        minomni.save(omni, target)
    with pytest.raises(UserError, match="as the model"):
        minomni.save(omni.thinker, tmp_path / "model")
    assert not list(tmp_path.iterdir())


@pytest.mark.reads("output", "an output folder whose name is a file", "refused")
def test_a_file_is_refused(omni, tmp_path):
    (tmp_path / "poem.txt").write_text("mine")
    refuse(omni, tmp_path / "poem.txt", "is a file")
    refuse(omni, tmp_path / "poem.txt" / "a" / "model", f"{tmp_path / 'poem.txt'} is a file")
    assert contents(tmp_path) == {"poem.txt": b"mine"}


@pytest.mark.skipif(os.name == "nt", reason="no such files on Windows")
def test_devices_pipes_and_links_are_refused(omni, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    refuse(omni, tmp_path / "pipe", "is a device or a pipe")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    refuse(omni, os.devnull, "is a device or a pipe")
    (tmp_path / "poem.txt").write_text("mine")
    (tmp_path / "to a file").symlink_to("poem.txt")
    refuse(omni, tmp_path / "to a file", "is a file")
    (tmp_path / "to nothing").symlink_to("nowhere")
    refuse(omni, tmp_path / "to nothing", "is a link to", "which does not exist")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["pipe", "poem.txt", "to a file", "to nothing"]
    refuse(omni, tmp_path / ("long" * 70), "cannot be saved there")


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_a_link_to_a_model_is_followed(folder, omni):
    link = folder.parent / "latest"
    link.symlink_to("model")
    model = weights.load(link)
    with torch.no_grad():
        model.talker.codec_head.weight.zero_()
    minomni.save(model, link)
    assert link.is_symlink()
    assert not weights.load(folder).talker.codec_head.weight.any()
    assert sorted(path.name for path in folder.parent.iterdir()) == ["latest", "model"]


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), SafetensorError("No space left on device")],
    ids=["while opening", "while writing"],
)
def test_a_failed_save_leaves_the_old_model(folder, omni, monkeypatch, error):
    def full_disk(*_):
        raise error

    before = contents(folder)
    monkeypatch.setattr(saving, "save_file", full_disk)
    refuse(omni, folder, "No space left on device")
    refuse(omni, folder.parent / "new", "No space left on device")
    assert contents(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_a_failed_rename_restores_the_old_model(folder, omni, monkeypatch):
    before, rename = contents(folder), Path.rename

    def busy(self, target):
        if self.name.endswith(".part"):
            raise OSError(16, "Device or resource busy")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", busy)
    refuse(omni, folder, "Device or resource busy")
    assert contents(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


# ----------------------------------------------------------------------------------------------
# the processor
CONVERSATIONS = [
    [{"role": "user", "content": "a\n b "}],
    [
        {"role": "system", "content": "Be\nbrief."},
        {"role": "user", "content": [{"type": "text", "text": " what? "}]},
    ],
    [
        {"role": "system", "content": [{"text": "x"}]},
        {
            "role": "user",
            "content": [
                {"type": "image", "image": "p"},
                {"image_url": "u"},
                {"type": "text", "text": "and"},
                {"type": "audio_url", "audio_url": "a"},
                {"audio": "b"},
                {"video": "v"},
                {"type": "video", "path": "w"},
                {"text": "?\n"},
            ],
        },
        {"role": "assistant", "content": "it was {{ this }}"},
        {"role": "user", "content": [{"type": "audio", "audio": "c"}]},
    ],
]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"add_vision_id": True},
        {"add_audio_id": True, "add_generation_prompt": False},
        {"add_vision_id": True, "add_audio_id": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("messages", CONVERSATIONS, ids=len)
def test_the_chat_template_equals_render(messages, options):
    jinja2 = pytest.importorskip("jinja2", reason="transformers renders chat templates with it")
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(CHAT_TEMPLATE)
    text = template.render(messages=messages, **{"add_generation_prompt": True} | options)
    assert text == render(messages, **options)


def test_special_tokens_keep_their_numbers_in_every_file(folder):
    special = special_tokens(TINY.thinker.tokens)
    vocabulary = json.loads((folder / "vocab.json").read_text())
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert {token: vocabulary[token] for token in special} == special
    assert {
        entry["content"]: int(i) for i, entry in config["added_tokens_decoder"].items()
    } == special
    assert set(config["extra_special_tokens"].values()) < special.keys()
