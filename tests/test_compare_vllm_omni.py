"""What vllm-omni's loaders ask for is what a saved folder has, by the names and shapes that
tests/compare_vllm_omni.py has read from their source. The script itself is tested with a source of
a few lines, so that no network is needed.
"""

import json
from pathlib import Path

import compare_vllm_omni as script
import pytest
import torch
from safetensors.torch import save_file

import minomni

FACTS = json.loads((Path(__file__).parent / "golden" / "vllm_omni_names.json").read_text())


def test_a_saved_folder_has_the_names_that_the_loaders_take(tmp_path):
    minomni.save(minomni.load("tiny"), tmp_path / "saved")
    stored = script.stored_tensors(tmp_path / "saved")
    asked = set(FACTS["names"])
    found = {script.pattern(name) for name in stored}
    # tiny keeps the DiT's frequencies, which the release leaves to the constructor.
    assert found - {"token2wav.code2wav_dit_model.rotary_embed.inv_freq"} == asked


def test_the_releases_size_has_the_names_and_shapes_that_the_loaders_take():
    stored, _ = script.release_size()
    assert script.names_and_shapes(stored) == FACTS["names"]


def test_the_facts_are_of_the_versions_in_the_script():
    assert FACTS["versions"] == script.VERSIONS


SOURCE = {
    "vllm/__init__.py": "",
    "vllm/model_executor/models/registry.py": """
MODELS = {"Decoder": ("decoder", "Decoder"), "Qwen2_5OmniModel": ("decoder", "Alone")}
""",
    "vllm/model_executor/models/utils.py": """
class AutoWeightsLoader:
    REMOVE_UNUSED_ROTARY_EMBEDS_MAPPER = WeightsMapper(orig_to_new_substr={"inv_freq": None})

    def load_weights(self, weights, mapper=None):
        self.ignore_unexpected_suffixes.append(".bias")
""",
    "vllm/model_executor/models/decoder.py": """
import torch.nn as nn
from .utils import AutoWeightsLoader, WeightsMapper

class Decoder(nn.Module):
    hf_to_vllm_mapper = WeightsMapper(orig_to_new_stacked={".q.": (".qkv.", "q"),
        ".k.": (".qkv.", "k"), ".v.": (".qkv.", "v")})

    def __init__(self, *, vllm_config, prefix=""):
        config = vllm_config.model_config.hf_config
        self.embed = VocabParallelEmbedding(config.vocab_size, config.hidden_size)
        self.start, self.end, self.layers = make_layers(config.num_layers, lambda prefix:
            Layer(config))

    def load_weights(self, weights):
        return AutoWeightsLoader(self).load_weights(weights, mapper=self.hf_to_vllm_mapper)

class Alone(nn.Module):
    hf_to_vllm_mapper = WeightsMapper(orig_to_new_prefix={"thinker.model.": "lm.", "talker.": None,
        "token2wav.": None})

    def __init__(self, *, vllm_config):
        config = vllm_config.model_config.hf_config.thinker_config
        self.lm = init_vllm_registered_model(vllm_config=vllm_config,
            hf_config=config.text_config, architectures=["Decoder"])

    def load_weights(self, weights):
        return AutoWeightsLoader(self).load_weights(weights, mapper=self.hf_to_vllm_mapper)

class Layer(nn.Module):
    def __init__(self, config, bias: bool = False):
        self.qkv = QKVParallelLinear(config.hidden_size, 4, config.heads, 1, bias=bias)
        self.norms = nn.ModuleList([nn.LayerNorm(config.hidden_size) for _ in range(2)])
""",
    "vllm_omni/__init__.py": "",
    "vllm_omni/model_executor/models/registry.py": """
OMNI = {
    "Qwen2_5OmniForConditionalGeneration": ("qwen2_5_omni", "root",
        "Qwen2_5OmniForConditionalGeneration"),
    "Thinker": ("qwen2_5_omni", "root", "Thinker"),
    "Talker": ("qwen2_5_omni", "root", "Talker"),
}
""",
    "vllm_omni/model_executor/models/qwen2_5_omni/pipeline.py": """
QWEN2_5_OMNI_PIPELINE = PipelineConfig(model_type="qwen2_5_omni", stages=())
""",
    "vllm_omni/model_executor/models/qwen2_5_omni/root.py": """
import torch.nn as nn
TALKER_CODEC_EOS_TOKEN_ID = 7

class Qwen2_5OmniForConditionalGeneration(nn.Module):
    def __init__(self, *, vllm_config, prefix=""):
        stage = vllm_config.model_config.model_stage
        config = vllm_config.model_config.hf_config
        if stage == "thinker":
            with self.mark(vllm_config):
                self.thinker = init_vllm_registered_model(vllm_config=vllm_config,
                    hf_config=config.thinker_config, architectures=["Thinker"])
        elif stage == "talker":
            self.talker = init_vllm_registered_model(vllm_config=vllm_config,
                hf_config=config.talker_config, architectures=["Talker"])
            self.tts_text_spk_token_ids = {"Ethan": 5}
        else:
            self.token2wav = Vocoder()

    def load_weights(self, weights):
        for name, value in weights:
            if name.startswith("thinker."):
                pass
            elif name.startswith("talker."):
                pass
            elif name.startswith("token2wav."):
                pass

class Thinker(nn.Module):
    hf_to_vllm_mapper = WeightsMapper(orig_to_new_prefix={"thinker.model.": "lm.", "thinker.": ""})

    def __init__(self, *, vllm_config):
        self.lm = init_vllm_registered_model(vllm_config=vllm_config,
            hf_config=vllm_config.model_config.hf_config.text_config, architectures=["Decoder"])

    def load_weights(self, weights):
        skip = ["talker."]
        return AutoWeightsLoader(self).load_weights(weights, mapper=self.hf_to_vllm_mapper
            | WeightsMapper(orig_to_new_prefix={name: None for name in skip}))

class Talker(nn.Module):
    hf_to_vllm_mapper = WeightsMapper(orig_to_new_prefix={"talker.head.": "lm.head.",
        "talker.": ""})

    def __init__(self, config):
        self.lm = Lm(config.hidden_size)
        for i in range(config.layers):
            self.register_buffer("seen", None)
        self.proj = nn.Linear(config.hidden_size, 3)

    def load_weights(self, weights):
        loader = AutoWeightsLoader(self)
        loaded = loader.load_weights(weights, mapper=self.hf_to_vllm_mapper |
            WeightsMapper(orig_to_new_prefix={"token2wav.": None}))
        return loaded

class Vocoder(nn.Module):
    def __init__(self):
        self.token2wav = nn.Conv1d(2, 3, kernel_size=5, bias=False)

class Lm(nn.Module):
    def __init__(self, width):
        self.head = nn.Linear(width, 9, bias=False)
""",
}
CONFIG = {
    "model_type": "qwen2_5_omni",
    "thinker_config": {
        "text_config": {"vocab_size": 6, "hidden_size": 8, "num_layers": 1, "heads": 2}
    },
    "talker_config": {"hidden_size": 8, "layers": 1, "tts_codec_end_token_id": 7},
}
STORED = {
    "thinker.model.embed.weight": (6, 8),
    "thinker.model.layers.0.q.weight": (8, 8),
    "thinker.model.layers.0.k.weight": (4, 8),
    "thinker.model.layers.0.v.weight": (4, 8),
    **{
        f"thinker.model.layers.0.norms.{i}.{name}": (8,)
        for i in (0, 1)
        for name in ("weight", "bias")
    },
    "talker.head.weight": (9, 8),
    "talker.proj.weight": (3, 8),
    "talker.proj.bias": (3,),
    "token2wav.weight": (3, 2, 5),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The source of a server of a few layers, in the style of vllm and vllm-omni."""
    folder = tmp_path_factory.mktemp("source")
    for name, text in SOURCE.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "transformers").mkdir()
    (folder / "transformers" / "__init__.py").touch()
    return folder


def compared(source: Path, stored: script.Stored, config: dict | None = None) -> script.Findings:
    return script.VllmOmni(script.trees(source)).compare(stored, config or CONFIG)


def test_a_folder_that_fits_has_no_problems(source):
    findings = compared(source, STORED)
    assert not any(findings.problems().values()), findings.problems()
    assert set(findings.taken) == set(STORED)
    assert findings.warnings == []
    assert findings.without_shape() == 0


def test_what_does_not_fit_is_named(source):
    stored = dict(STORED)
    stored["thinker.model.layers.0.q.weight"] = (4, 8)  # of another shape
    del stored["thinker.model.layers.0.v.weight"]  # one shard of three
    stored["codec.encoder.weight"] = (2, 2)  # a prefix that the root does not know
    stored["talker.more.weight"] = (2, 2)
    stored["talker.more.bias"] = (2,)  # passed over, as GPTQ writes them
    stored["thinker.model.layers.0.inv_freq"] = (4,)
    findings = compared(source, stored)
    assert list(findings.problems().values()) == [
        ["codec.encoder.weight", "talker.more.weight"],
        ["talker.more.bias", "thinker.model.layers.0.inv_freq"],
        ["thinker.lm.layers.0.qkv.weight"],
        ["thinker.model.layers.0.q.weight [4, 8], asked for [8, 8]"],
    ]
    assert "an error in the loader: 2" in script.report(findings)


def test_vllm_alone_leaves_speech_out(source):
    reader = script.VllmOmni(script.trees(source))
    findings = reader.compare_thinker(STORED, CONFIG)
    assert not any(findings.problems().values()), findings.problems()
    assert set(findings.taken) == {name for name in STORED if name.startswith("thinker.")}
    findings = reader.compare_thinker({**STORED, "codec.weight": (1,)}, CONFIG)
    assert findings.refused == {"codec.weight"}


def test_numbers_in_the_code_are_compared_with_the_config(source):
    talker = {**CONFIG["talker_config"], "tts_codec_end_token_id": 8}
    thinker = {"text_config": {**CONFIG["thinker_config"]["text_config"], "vocab_size": 5}}
    config = {"model_type": "other", "talker_config": talker, "thinker_config": thinker}
    stored = {**STORED, "thinker.model.embed.weight": (5, 8)}
    warnings = compared(source, stored, config).warnings
    assert [warning.split(":")[0] for warning in warnings] == [
        "no stages for the model_type 'other'",
        "speech does not end",
        "no speech",
    ]


def test_the_command_reads_a_folder(source, tmp_path, capsys):
    tensors = {name: torch.zeros(shape) for name, shape in STORED.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    assert script.main([str(tmp_path), "--source", str(source)]) == 0
    assert f"{len(STORED)} tensors are stored, {len(STORED)} are taken" in capsys.readouterr().out
    save_file({"other": torch.zeros(1), **tensors}, tmp_path / "model.safetensors")
    facts = tmp_path / "facts.json"
    assert script.main([str(tmp_path), "--source", str(source), "--facts", str(facts)]) == 1
    assert not facts.exists()


def test_a_source_without_a_package_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="has no vllm"):
        script.trees(tmp_path)
