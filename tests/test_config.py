"""Configurations: every size builds, QWEN7B has the released number of parameters, and config.json
is read strictly and written back.
"""

import ast
import dataclasses
import json
import os
import re
import shutil
from pathlib import Path

import oracle
import pytest
import torch

import minomni
from minomni.checkpoint import hf_config, weights
from minomni.checkpoint.hf_config import (
    IGNORED_CONFIG_KEYS,
    LEGACY_DEFAULTS,
    as_json,
    read_config,
    to_json,
    without_speech,
    write_config,
)
from minomni.checkpoint.random_checkpoint import checkpoint_config
from minomni.config import (
    QWEN7B,
    SIZES,
    SMALL,
    TINY,
    CodecConfig,
    DiTConfig,
    FlowConfig,
    MediaConfig,
    OmniConfig,
    SamplingConfig,
)
from minomni.errors import UserError
from minomni.omni import Omni

GOLDEN = Path(__file__).parent / "golden"
# As released: every key, every null.
RELEASE_FILE = Path(hf_config.__file__).with_name("release_config.json")
RELEASE = json.loads(RELEASE_FILE.read_text())
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4665ca7c\nsize 4967543752\n"
VERSIONS = ("4.57.1", "5.24.0")  # of transformers, whose files make_golden_configs.py has kept


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
    for part in (omni.thinker, omni.talker, omni.token2wav):
        assert not list(part.buffers())


def test_release_has_the_known_number_of_parameters():
    with torch.device("meta"):
        omni = Omni(QWEN7B)
    counts = {
        "thinker.audio_tower": 639_647_232,
        "thinker.visual": 676_550_144,
        "thinker.model": 7_070_619_136,
        "thinker.lm_head": 544_997_376,
        "talker": 1_351_360_256,
        "token2wav.code2wav_dit_model": 333_607_760,
        "token2wav.code2wav_bigvgan_model": 115_443_504,
    }
    assert {
        name: sum(p.numel() for p in omni.get_submodule(name).parameters()) for name in counts
    } == counts
    assert sum(p.numel() for p in omni.parameters()) == 10_732_225_408 == sum(counts.values())
    assert len(omni.state_dict()) == 2_447


def test_released_config_is_the_released_row(tmp_path):
    assert len(RELEASE_FILE.read_bytes()) == 13_186  # not a cleaned copy
    assert read_config(written(tmp_path, RELEASE)) == QWEN7B


@pytest.mark.parametrize("version", VERSIONS)
def test_configs_saved_by_transformers(tmp_path, version):
    shutil.copy(GOLDEN / f"saved_by_{version}.json", tmp_path / "config.json")
    config = read_config(tmp_path)
    unsaved = {"talker_sampling": None, "thinker_sampling": None}
    assert dataclasses.replace(config, **unsaved) == dataclasses.replace(oracle.CONFIG, **unsaved)


@pytest.mark.parametrize("version", VERSIONS)
def test_thinkers_saved_by_transformers(tmp_path, version):
    shutil.copy(GOLDEN / f"thinker_saved_by_{version}.json", tmp_path / "config.json")
    config = read_config(tmp_path)
    assert config.talker is config.token2wav is config.codec is None
    assert config.thinker == without_speech(oracle.CONFIG).thinker


def test_sizes_of_the_3b(tmp_path):
    """As published by third parties: another vocabulary and head size, and an mrope_section with a
    zero.
    """
    text = dict(
        vocab_size=151_936,
        hidden_size=2048,
        intermediate_size=11_008,
        num_hidden_layers=36,
        num_attention_heads=16,
        num_key_value_heads=2,
    )
    data = changed("thinker_config", "text_config", **text)
    data["thinker_config"]["audio_config"]["output_dim"] = 2048
    data["thinker_config"]["vision_config"]["out_hidden_size"] = 2048
    rope = {"mrope_section": [16, 16, 0], "rope_type": "default", "type": "default"}
    data["talker_config"] |= dict(
        embedding_size=2048,
        hidden_size=896,
        intermediate_size=4864,
        num_attention_heads=14,
        num_key_value_heads=2,
        head_dim=64,
        rope_scaling=rope,
    )
    config = read_config(written(tmp_path, data))
    assert config.thinker.text.head_dim == 128
    assert config.talker.decoder.mrope_section == (16, 16, 0)
    with torch.device("meta"), weights.SkipInit():
        omni = Omni(config)
    assert omni.talker.model.embed_tokens.weight.shape == (8448, 2048)
    assert omni.thinker.lm_head.weight.shape == (151_936, 2048)
    assert not config.thinker.tie_word_embeddings


@pytest.mark.parametrize(
    ("in_thinker", "in_text", "tied"),
    [
        (None, None, False),
        (False, False, False),
        (None, True, True),
        (True, None, True),
        (False, True, True),
    ],
)
def test_tying_is_read_from_either_section(tmp_path, in_thinker, in_text, tied):
    data = changed("thinker_config", tie_word_embeddings=in_thinker)
    data["thinker_config"]["text_config"]["tie_word_embeddings"] = in_text
    config = read_config(written(tmp_path, data))
    assert config.thinker == dataclasses.replace(QWEN7B.thinker, tie_word_embeddings=tied)
    write_config(config, tmp_path)
    assert read_config(tmp_path) == config


def test_written_config_equals_the_release_but_for_ignored_keys():
    def differences(ours, release, path=()):
        for key, value in release.items():
            if key in ours and isinstance(value, dict):
                yield from differences(ours[key], value, path + (key,))
            elif value is not None and (key not in ours or ours[key] != value):
                yield key

    ignored = set(differences(as_json(to_json(QWEN7B)), RELEASE))
    assert ignored - set(LEGACY_DEFAULTS) == {
        "architectures",
        "torch_dtype",
        "transformers_version",
        "attention_dropout",
        "activation_dropout",
        "encoder_layerdrop",
        "init_std",
        "initializer_range",
        "ignore_index",
        "max_window_layers",
        "sliding_window",
        "use_cache",
        "user_token_id",
        "embed_dim",
        "in_chans",
        "spatial_patch_size",
        "tokens_per_second",
        "enc_global_context",
        "enc_lin_neurons",
        "num_hidden_layers",
        "_attn_implementation_autoset",
        "_name_or_path",
        "chunk_size_feed_forward",
        "id2label",
        "label2id",
        "is_encoder_decoder",
        "output_attentions",
        "output_hidden_states",
        "return_dict",
    }
    assert ignored - {"num_hidden_layers"} <= IGNORED_CONFIG_KEYS | set(LEGACY_DEFAULTS)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("temperature", 0.7),
        ("pruned_heads", {"1": [0]}),
        ("is_decoder", True),
        ("top_k", 7),
        ("tie_encoder_decoder", True),
    ],
)
def test_legacy_keys_are_ignored_at_their_defaults_only(tmp_path, key, value):
    with pytest.raises(UserError, match=f"vision_config: unknown key '{key}'"):
        read_config(written(tmp_path, changed("thinker_config", "vision_config", **{key: value})))


@pytest.mark.parametrize("config", [*SIZES.values(), oracle.CONFIG], ids=[*SIZES, "oracle"])
def test_round_trip(config, tmp_path):
    write_config(config, tmp_path)
    assert read_config(tmp_path) == config


def test_keys_of_transformers_are_read(tmp_path):
    data = changed(
        "token2wav_config",
        "dit_config",
        dim=None,
        depth=None,
        heads=None,
        hidden_size=1024,
        num_hidden_layers=22,
        num_attention_heads=16,
        block_size=24,
        look_ahead_layers=[10],
        look_backward_layers=[0, 20],
        rope_parameters={"rope_theta": 10000.0, "rope_type": "default"},
    )
    for section in (data["thinker_config"]["text_config"], data["talker_config"]):
        section["rope_parameters"] = {
            "rope_theta": section.pop("rope_theta"),
            **section.pop("rope_scaling"),
        }
    data["thinker_config"].pop("vision_token_id")
    assert read_config(written(tmp_path, data)) == QWEN7B


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            changed("thinker_config", "audio_config", d_model=None),
            "config, audio_config: the key 'd_model' is missing",
        ),
        (changed("talker_config", head_dim=None), "talker_config: the key 'head_dim' is missing"),
        (changed(token2wav_config=None), "the key 'token2wav_config' is missing"),
        (
            changed("thinker_config", "text_config", num_experts=8),
            "text_config: unknown key 'num_experts'",
        ),
        (
            changed("thinker_config", "text_config", hidden_act="relu"),
            "'hidden_act' is 'relu', this code can only be 'sil",
        ),
        (
            changed("thinker_config", "text_config", hidden_size="3584"),
            "'hidden_size' is '3584', expected int",
        ),
        (
            changed("thinker_config", "vision_config", fullatt_block_indexes=7),
            "'fullatt_block_indexes' is 7, expected",
        ),
        (
            changed("talker_config", audio_token_index=5),
            "'audio_token_index' is 5, this code can only be 151646",
        ),
        (
            changed("token2wav_config", "dit_config", hidden_size=512),
            "dit_config says both 1024 and 512 for dim",
        ),
        (changed("thinker_config", "vision_config", rope_theta=5.0), "'rope_theta' is 5.0"),
        (
            changed("talker_config", embedding_size=2048),
            "the Talker reads width 2048, the Thinker writes 3584",
        ),
        (changed(thinker_config=7), "'thinker_config' is 7, expected an object"),
        (
            changed("thinker_config", "audio_config", n_window=75),
            "n_window is 75, expected an even number",
        ),
        (
            changed("thinker_config", "audio_config", num_mel_bins=96),
            "num_mel_bins is 96, expected 128",
        ),
        (changed("thinker_config", "vision_config", in_channels=4), "in_channels is 4, expected 3"),
        (
            changed("thinker_config", "text_config", num_attention_heads=0),
            "num_attention_heads is 0, expected a whole num",
        ),
        (
            changed("talker_config", num_hidden_layers=-2),
            "talker_config: num_hidden_layers is -2, expected",
        ),
        (
            changed("talker_config", num_hidden_layers=10**7),
            "num_hidden_layers is 10000000, expected",
        ),
        (changed("talker_config", hidden_size=True), "'hidden_size' is True, expected int"),
        (
            changed("talker_config", rms_norm_eps=float("nan")),
            "rms_norm_eps is nan, expected a number",
        ),
        (changed("talker_config", rope_theta=-1.0), "rope_theta is -1.0, expected a number"),
        (changed("talker_config", vocab_size=[8448]), "'vocab_size' is [8448], expected int"),
        (
            changed("talker_config", tts_codec_end_token_id=9000),
            "codec_eos is 9000, expected one below vocab_size 8448",
        ),
        (
            changed("thinker_config", eos_token_id=152_064),
            "im_end is 152064, expected one below vocab_size 152064",
        ),
        (
            changed("token2wav_config", "bigvgan_config", upsample_rates=[5, 0, 2, 2, 2, 2]),
            "bigvgan_config: an entry of ups",
        ),
        (
            changed("token2wav_config", "bigvgan_config", upsample_rates=[5, "3", 2, 2, 2, 2]),
            "an entry of upsample_rates is",
        ),
        (
            changed("token2wav_config", "bigvgan_config", upsample_rates=[5, 9, 2, 2, 2, 2]),
            "may be smaller than its rate",
        ),
        (
            changed("token2wav_config", "bigvgan_config", resblock_kernel_sizes=[3] * 900),
            "has 900 entries, expected at m",
        ),
        (
            changed("token2wav_config", "dit_config", enc_channels=[256, 128, 256, 256, 640]),
            "the last must be equal",
        ),
        (
            changed("token2wav_config", "dit_config", block_size=1002),
            "dit_config: block_size is 1002, expected at most 1000 mel frames",
        ),
        (
            changed("thinker_config", tie_word_embeddings="yes"),
            "'tie_word_embeddings' is 'yes', expected true or false",
        ),
        (
            changed("thinker_config", "text_config", rope_parameters=[1]),
            "'rope_parameters' is [1], expected an object",
        ),
        (
            changed(
                "thinker_config",
                "vision_config",
                rope_parameters={"rope_type": "yarn", "factor": 4},
            ),
            "'rope_type': 'ya",
        ),
        (
            changed(quantization_config={"quant_method": "awq", "bits": 3}),
            "this model is quantized (quantization_config: 'a",
        ),
        (
            changed(quantization_config={"quant_method": "awq", "bits": 4, "version": "gemv"}),
            "this model is quantized (quantization_config: 'a",
        ),
        (
            changed("thinker_config", quantization_config={"quant_method": "fp8"}),
            "quantized (quantization_config: 'fp8'",
        ),
        (
            changed(model_type="qwen3_omni_moe"),
            "model_type is 'qwen3_omni_moe', this code runs 'qwen2_5_omni'",
        ),
        (changed("talker_config", head_dim="\n" * 10**6), "'head_dim' is"),
        (changed("talker_config", **{"key" * 10**6: 1}), "unknown key 'keykey"),
    ],
)
def test_bad_config_names_the_key(tmp_path, data, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        read_config(written(tmp_path, data))
    assert "config.json" in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) <= 500


def test_errors_name_the_bad_file(tmp_path):
    with pytest.raises(UserError, match="config.json: cannot be read"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json: not valid JSON"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match="config.json: holds a list"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"a":' * 100_000)
    with pytest.raises(UserError, match="nested too deeply"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("")
    with pytest.raises(UserError, match="config.json: is empty"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(UserError, match="config.json: not valid JSON"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_bytes(LFS)
    with pytest.raises(UserError, match="config.json: is a git-LFS pointer.*git lfs pull"):
        read_config(tmp_path)
    with open(tmp_path / "config.json", "wb") as file:
        file.truncate(40_000_000)
    with pytest.raises(UserError, match="config.json: has 40,000,000 bytes, expected at most"):
        read_config(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes here")
def test_pipes_and_devices_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(UserError, match="config.json: is not a regular file"):
        read_config(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").symlink_to("/dev/zero")
    with pytest.raises(UserError, match="config.json: is not a regular file"):
        read_config(tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match="config.json: is a link to .*gone, which is not there"):
        read_config(tmp_path)


def test_a_byte_order_mark_is_accepted(tmp_path):
    (tmp_path / "config.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(RELEASE).encode())
    assert read_config(tmp_path) == QWEN7B


def test_models_of_the_generated_world():
    """They are known by their vocabulary, which a model keeps without its codec or its speech."""
    for size in (TINY, SMALL):
        assert size.trained_here
        assert dataclasses.replace(size, codec=None).trained_here
        assert without_speech(size).trained_here
    for other in (QWEN7B, oracle.CONFIG, checkpoint_config("qwen7b", 0.125)):
        assert not other.trained_here
        assert not without_speech(other).trained_here


def test_speech_turned_off(tmp_path):
    """Sizes of parts that are turned off are ignored, and the rest is a Thinker alone."""
    config = read_config(
        written(tmp_path, changed(enable_audio_output=False, talker_config={"hidden_size": 0}))
    )
    assert config == without_speech(QWEN7B)
    assert config.thinker.text == QWEN7B.thinker.text
    write_config(config, tmp_path)
    assert read_config(tmp_path) == config
    with pytest.raises(ValueError, match="speech needs a Talker and Token2Wav"):
        dataclasses.replace(QWEN7B, talker=None)


@pytest.mark.parametrize(
    ("key", "value", "bounds"),
    [
        ("temperature", -1, "from 0.001 to 1000"),
        ("temperature", float("nan"), "temperature is nan"),
        ("temperature", 1e-30, "from 0.001"),
        ("temperature", float("inf"), "temperature is inf"),
        ("top_p", 0, "top_p is 0"),
        ("top_p", 1.5, "top_p is 1.5"),
        ("top_k", -3, "top_k is -3"),
        ("repetition_penalty", 0, "repetition_penalty is 0"),
        ("repetition_penalty", 1e300, "repetition_penalty is 1e+300"),
        ("max_new_tokens", 0, "max_new_tokens is 0"),
        ("max_new_tokens", 10**12, "max_new_tokens is 1000000000000"),
        ("max_new_tokens", 5.5, "'max_new_tokens' is 5.5, expected int"),
        ("top_p", "all", "'top_p' is 'all'"),
    ],
)
def test_sampling_out_of_bounds(tmp_path, key, value, bounds):
    written(tmp_path, RELEASE)
    group = dict(dataclasses.asdict(QWEN7B.talker_sampling), **{key: value})
    written(tmp_path, {"talker": group}, "generation_config.json")
    with pytest.raises(UserError, match=re.escape(bounds)) as error:
        read_config(tmp_path)
    assert "generation_config.json, talker: " in str(error.value)


def test_top_k_of_minus_one_keeps_all():
    sampling = QWEN7B.talker_sampling
    minus_one, zero = (dataclasses.replace(sampling, top_k=top_k) for top_k in (-1, 0))
    assert minus_one == zero


@pytest.mark.parametrize(
    ("cls", "default", "key", "value"),
    [
        (FlowConfig, QWEN7B.flow, "points", 10**9),
        (FlowConfig, QWEN7B.flow, "points", 1),
        (FlowConfig, QWEN7B.flow, "solver", "midpoint"),
        (FlowConfig, QWEN7B.flow, "guidance", float("inf")),
        (FlowConfig, QWEN7B.flow, "sway", 9.0),
        (MediaConfig, QWEN7B.media, "fps", 0),
        (MediaConfig, QWEN7B.media, "image_max_pixels", 10),
        (MediaConfig, QWEN7B.media, "min_frames", True),
        (SamplingConfig, QWEN7B.thinker_sampling, "top_k", 2.0),
        (DiTConfig, QWEN7B.token2wav.dit, "block_size", 10**6),
        (CodecConfig, TINY.codec, "block_frames", TINY.codec.downsample - 1),
    ],
)
def test_settings_have_bounds_in_python_too(cls, default, key, value):
    with pytest.raises(ValueError, match=key):
        cls(**dataclasses.asdict(default) | {key: value})


def test_settings_beside_config_json(tmp_path):
    """Absent settings are QWEN7B's, partial or unknown ones are errors, the release's pixel limits
    are read.
    """
    written(tmp_path, RELEASE)
    written(tmp_path, {"_from_model_config": True}, "generation_config.json")
    written(
        tmp_path,
        {"min_pixels": 3136, "max_pixels": 100_352, "patch_size": 14},
        "preprocessor_config.json",
    )
    config = read_config(tmp_path)
    assert config.media == dataclasses.replace(QWEN7B.media, image_max_pixels=100_352)
    assert config.flow == QWEN7B.flow
    written(tmp_path, {"min_pixels": "few"}, "preprocessor_config.json")
    with pytest.raises(
        UserError, match="preprocessor_config.json: 'min_pixels' is 'few', expected int"
    ):
        read_config(tmp_path)
    written(tmp_path, {"min_pixels": 3136, "max_pixels": 30}, "preprocessor_config.json")
    with pytest.raises(
        UserError,
        match="preprocessor_config.json, min_pixels and max_pixels: image_min_pixels 3136 is mo",
    ):
        read_config(tmp_path)
    written(tmp_path, {"min_pixels": None}, "preprocessor_config.json")
    written(tmp_path, {"flow": {"points": 10}}, "generation_config.json")
    with pytest.raises(
        UserError, match="generation_config.json, flow: the key 'solver' is missing"
    ):
        read_config(tmp_path)
    written(
        tmp_path,
        {"talker": dict(dataclasses.asdict(QWEN7B.talker_sampling), beams=4)},
        "generation_config.json",
    )
    with pytest.raises(UserError, match="generation_config.json, talker: unknown key 'beams'"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("keys", "changes"),
    [
        ({"temperature": 0.7, "top_k": 20}, {"temperature": 0.7, "top_k": 20}),
        ({"do_sample": True}, {"temperature": 1.0}),
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.9}, {"temperature": 0.6, "top_p": 0.9}),
        ({"do_sample": False, "temperature": 0.6, "top_k": None}, {}),
        ({"max_new_tokens": 5, "repetition_penalty": 1.1, "num_beams": 1}, None),
    ],
)
def test_sampling_keys_of_transformers_are_the_thinkers(tmp_path, keys, changes):
    written(tmp_path, RELEASE)
    written(tmp_path, keys, "generation_config.json")
    if changes is None:
        changes = {"max_new_tokens": 5, "repetition_penalty": 1.1}
    sampling = read_config(tmp_path).thinker_sampling
    assert sampling == dataclasses.replace(QWEN7B.thinker_sampling, **changes)
    assert read_config(tmp_path).talker_sampling == QWEN7B.talker_sampling


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"temperature": "hot"}, "'temperature' is 'hot', expected float"),
        ({"temperature": -1.0}, "temperature is -1.0, expected a number"),
        ({"do_sample": 1}, "'do_sample' is 1, expected bool"),
        ({"num_beams": 4}, "num_beams is 4, which is not supported here; remove it"),
        ({"suppress_tokens": [5]}, "suppress_tokens is \\[5\\], which is not supported here"),
        (
            {"temperature": 0.7, "thinker": dataclasses.asdict(QWEN7B.thinker_sampling)},
            "make temperature 0.7, and thinker says 0.0; change thinker",
        ),
    ],
)
def test_sampling_keys_that_cannot_be_followed(tmp_path, keys, message):
    written(tmp_path, RELEASE)
    written(tmp_path, keys, "generation_config.json")
    with pytest.raises(UserError, match=f"generation_config.json: .*{message}"):
        read_config(tmp_path)


def test_image_limits_and_media_of_a_processor_saved_by_transformers(tmp_path):
    """Version 4 writes the limits as a size; version 5 writes all settings, ours included, into
    another file.
    """
    written(tmp_path, RELEASE)
    size = {"shortest_edge": 6272, "longest_edge": 125_440}
    written(
        tmp_path, {"image_processor": {"size": size, "patch_size": 14}}, "processor_config.json"
    )
    media = read_config(tmp_path).media
    assert (media.image_min_pixels, media.image_max_pixels) == (6272, 125_440)
    own = dataclasses.asdict(dataclasses.replace(QWEN7B.media, max_frames=12))
    written(tmp_path, {"image_processor": {"size": size, "media": own}}, "processor_config.json")
    assert read_config(tmp_path).media.max_frames == 12
    written(tmp_path, {"size": {"longest_edge": 62_720}}, "preprocessor_config.json")
    assert read_config(tmp_path).media == dataclasses.replace(QWEN7B.media, image_max_pixels=62_720)


def test_no_model_file_names_a_size():
    """No identifier or string of the model's code, docstrings aside, names a size."""
    package = Path(minomni.__file__).parent
    names = ("layers", "decoder", "sampling", "omni", "checkpoint/weights")
    files = [package / f"{name}.py" for name in names]
    for part in ("thinker", "talker", "token2wav"):
        files += (package / part).glob("*.py")
    assert len(files) > 12
    for file in files:
        assert not set(SIZES) & set(words_in(ast.parse(file.read_text()))), file.name


def words_in(tree: ast.AST):
    """The words of all identifiers and strings, docstrings aside, in lower case."""
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        names = [getattr(node, field, None) for field in ("id", "attr", "arg", "name", "module")]
        if isinstance(node, ast.Constant) and id(node) not in docstrings:
            names.append(node.value)
        for name in names:
            if isinstance(name, str):
                yield from re.split(r"[^a-z0-9]+", name.lower())


def test_the_scan_finds_a_size():
    assert "tiny" in set(words_in(ast.parse("if config is TINY_ROW: pass")))
    assert isinstance(QWEN7B, OmniConfig)
    assert set(SIZES) == {"tiny", "small", "qwen7b"}
