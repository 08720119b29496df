"""Sizes: all rows build, the released one counts to the parameter, config.json is read strictly and written back."""

import ast
import dataclasses
import json
import re
from pathlib import Path

import oracle
import pytest
import torch

import minomni
from minomni.config import QWEN7B, SIZES, OmniConfig
from minomni.config_json import plain, read_config, to_json, write_config
from minomni.errors import UserError
from minomni.omni import Omni

RELEASE = json.loads((Path(__file__).parent / "golden" / "release_config.json").read_text())  # as released, verbatim


def written(tmp_path: Path, data: dict, name: str = "config.json") -> Path:
    (tmp_path / name).write_text(json.dumps(data))
    return tmp_path


def changed(*path, **values) -> dict:
    """The released settings with values set (None: removed) in the object at a path."""
    data = json.loads(json.dumps(RELEASE))
    section = data
    for key in path:
        section = section[key]
    section.update(values)
    for key in [key for key, value in values.items() if value is None]:
        del section[key]
    return data


@pytest.mark.parametrize("name", SIZES)
def test_every_size_builds_without_memory(name):
    with torch.device("meta"):
        omni = Omni(SIZES[name])
    assert all(p.is_meta for p in omni.parameters())
    assert not list(omni.thinker.buffers()) + list(omni.talker.buffers()) + list(omni.token2wav.buffers())


def test_release_counts_to_the_parameter():
    with torch.device("meta"):
        omni = Omni(QWEN7B)
    counts = {"thinker.audio_tower": 639_647_232, "thinker.visual": 676_550_144, "thinker.model": 7_070_619_136,
              "thinker.lm_head": 544_997_376, "talker": 1_351_360_256, "token2wav.code2wav_dit_model": 333_607_760,
              "token2wav.code2wav_bigvgan_model": 115_443_504}
    assert {name: sum(p.numel() for p in omni.get_submodule(name).parameters()) for name in counts} == counts
    assert sum(p.numel() for p in omni.parameters()) == 10_732_225_408 == sum(counts.values())
    assert len(omni.state_dict()) == 2_447


def test_released_config_is_the_released_row(tmp_path):
    assert read_config(written(tmp_path, RELEASE)) == QWEN7B


def test_what_we_write_is_the_release_but_for_what_says_nothing():
    def differences(ours, release, path=()):
        for key, value in release.items():
            if isinstance(value, dict):
                yield from differences(ours[key], value, path + (key,))
            elif key not in ours or ours[key] != value:
                yield key

    silent = set(differences(plain(to_json(QWEN7B)), RELEASE))
    assert silent == {"architectures", "torch_dtype", "transformers_version", "attention_dropout", "activation_dropout",
                      "encoder_layerdrop", "init_std", "initializer_range", "ignore_index", "max_window_layers",
                      "sliding_window", "use_cache", "user_token_id", "embed_dim", "in_chans", "spatial_patch_size",
                      "tokens_per_second", "enc_global_context", "enc_lin_neurons", "num_hidden_layers"}


@pytest.mark.parametrize("config", [*SIZES.values(), oracle.CONFIG], ids=[*SIZES, "oracle"])
def test_round_trip(config, tmp_path):
    write_config(config, tmp_path)
    assert read_config(tmp_path) == config


def test_spelling_of_transformers_is_read(tmp_path):
    data = changed("token2wav_config", "dit_config", dim=None, depth=None, heads=None, hidden_size=1024,
                   num_hidden_layers=22, num_attention_heads=16, block_size=24, look_ahead_layers=[10],
                   look_backward_layers=[0, 20], rope_parameters={"rope_theta": 10000.0, "rope_type": "default"})
    for section in (data["thinker_config"]["text_config"], data["talker_config"]):
        section["rope_parameters"] = {"rope_theta": section.pop("rope_theta"), **section.pop("rope_scaling")}
    data["thinker_config"].pop("vision_token_id")
    assert read_config(written(tmp_path, data)) == QWEN7B


@pytest.mark.parametrize("data, message", [
    (changed("thinker_config", "audio_config", d_model=None), "config, audio_config: the key 'd_model' is missing"),
    (changed("talker_config", head_dim=None), "talker_config: the key 'head_dim' is missing"),
    (changed(token2wav_config=None), "the key 'token2wav_config' is missing"),
    (changed("thinker_config", "text_config", num_experts=8), "text_config: unknown key 'num_experts'"),
    (changed("thinker_config", "text_config", hidden_act="relu"), "'hidden_act' is 'relu', this code can only be 'sil"),
    (changed("thinker_config", "text_config", hidden_size="3584"), "'hidden_size' is '3584', expected int"),
    (changed("thinker_config", "vision_config", fullatt_block_indexes=7), "'fullatt_block_indexes' is 7, expected"),
    (changed("talker_config", audio_token_index=5), "'audio_token_index' is 5, this code can only be 151646"),
    (changed("token2wav_config", "dit_config", hidden_size=512), "dit_config says both 1024 and 512 for dim"),
    (changed("thinker_config", "vision_config", rope_theta=5.0), "'rope_theta' is 5.0"),
    (changed("talker_config", embedding_size=2048), "the Talker reads width 2048, the Thinker writes 3584"),
    (changed(thinker_config=7), "'thinker_config' is 7, expected an object"),
])
def test_bad_config_names_the_key(tmp_path, data, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        read_config(written(tmp_path, data))
    assert "config.json" in str(error.value) and "\n" not in str(error.value)


def test_bad_files_name_themselves(tmp_path):
    with pytest.raises(UserError, match="config.json: cannot be read"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json: not valid JSON"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match="config.json: holds a list"):
        read_config(tmp_path)


def test_settings_beside_config_json(tmp_path):
    """Absent ones are the released row's, partial or unknown ones are errors, the release's pixel limits count."""
    written(tmp_path, RELEASE)
    written(tmp_path, {"_from_model_config": True}, "generation_config.json")
    written(tmp_path, {"min_pixels": 3136, "max_pixels": 100_352, "patch_size": 14}, "preprocessor_config.json")
    config = read_config(tmp_path)
    assert config.media == dataclasses.replace(QWEN7B.media, image_max_pixels=100_352) and config.flow == QWEN7B.flow
    written(tmp_path, {"flow": {"points": 10}}, "generation_config.json")
    with pytest.raises(UserError, match="generation_config.json, flow: the key 'solver' is missing"):
        read_config(tmp_path)
    written(tmp_path, {"talker": dict(dataclasses.asdict(QWEN7B.talker_sampling), beams=4)}, "generation_config.json")
    with pytest.raises(UserError, match="generation_config.json, talker: unknown key 'beams'"):
        read_config(tmp_path)


def test_picture_limits_and_media_of_a_processor_saved_by_transformers(tmp_path):
    """Version 4 spells limits as a size; version 5 puts everything into another file, our own settings too."""
    written(tmp_path, RELEASE)
    size = {"shortest_edge": 6272, "longest_edge": 125_440}
    written(tmp_path, {"image_processor": {"size": size, "patch_size": 14}}, "processor_config.json")
    media = read_config(tmp_path).media
    assert (media.image_min_pixels, media.image_max_pixels) == (6272, 125_440)
    own = dataclasses.asdict(dataclasses.replace(QWEN7B.media, max_frames=12))
    written(tmp_path, {"image_processor": {"size": size, "media": own}}, "processor_config.json")
    assert read_config(tmp_path).media.max_frames == 12
    written(tmp_path, {"size": {"longest_edge": 62_720}}, "preprocessor_config.json")
    assert read_config(tmp_path).media == dataclasses.replace(QWEN7B.media, image_max_pixels=62_720)


def test_no_model_file_knows_a_size():
    """Names and strings (documentation aside) of the model's code, word by word: none is the name of a size."""
    package = Path(minomni.__file__).parent
    files = [package / f"{name}.py" for name in ("layers", "decoder", "sampling", "omni", "weights")]
    files += [file for part in ("thinker", "talker", "token2wav") for file in (package / part).glob("*.py")]
    assert len(files) > 12
    found = [(file.name, word) for file in files for word in spoken_words(ast.parse(file.read_text())) if word in SIZES]
    assert not found


def spoken_words(tree: ast.AST):
    documents = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        names = [getattr(node, field, None) for field in ("id", "attr", "arg", "name", "module")]
        if isinstance(node, ast.Constant) and id(node) not in documents:
            names.append(node.value)
        for name in names:
            if isinstance(name, str):
                yield from re.split(r"[^a-z0-9]+", name.lower())


def test_the_scan_would_see_a_branch():
    assert "tiny" in set(spoken_words(ast.parse("if config is TINY_ROW: pass")))
    assert isinstance(QWEN7B, OmniConfig) and set(SIZES) == {"tiny", "small", "qwen7b"}
