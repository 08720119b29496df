"""OmniConfig to and from the JSON files of a model folder, in the release's layout.

config.json holds the sizes. It is read strictly: a missing key is an error, and so is an unknown
one. A release lacks three files of ours and takes QWEN7B's values for them: the codec in
codec/config.json, the generation settings in generation_config.json, the media limits in
preprocessor_config.json. A Thinker alone is a model too: its config.json is what the release has
under thinker_config, or it has enable_audio_output turned off.
"""

import dataclasses
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from minomni.checkpoint.packed_weights import PackedFormat, packed_format
from minomni.config import (
    QWEN7B,
    AudioEncoderConfig,
    BigVGANConfig,
    CodecConfig,
    CodeClassifierConfig,
    DecoderConfig,
    DiTConfig,
    FlowConfig,
    MediaConfig,
    OmniConfig,
    SamplingConfig,
    TalkerConfig,
    ThinkerConfig,
    Token2WavConfig,
    TokenIds,
    VisionEncoderConfig,
)
from minomni.errors import UserError, quote_json, short_path, shorten
from minomni.files import write_atomically
from minomni.model_files import read_json_object

# The codec's subfolder. Programs that do not know the codec read all tensors of the folder above.
CODEC_FOLDER = "codec"
# Our names of the token ids, and their keys in thinker_config. talker_config repeats those of
# SHARED_TOKENS and has three more, SPEECH_TOKEN_KEYS.
TOKEN_KEYS = {
    "endoftext": "pad_token_id",
    "im_start": "bos_token_id",
    "im_end": "eos_token_id",
    "audio": "audio_token_index",
    "audio_bos": "audio_start_token_id",
    "audio_eos": "audio_end_token_id",
    "vision_bos": "vision_start_token_id",
    "vision_eos": "vision_end_token_id",
    "vision_pad": "vision_token_id",
    "image": "image_token_index",
    "video": "video_token_index",
}
SPEECH_TOKEN_KEYS = {
    "tts_text_start": "tts_text_start_token_id",
    "tts_text_end": "tts_text_end_token_id",
    "tts_text_pad": "tts_text_pad_token_id",
}
SHARED_TOKENS = ("audio", "audio_bos", "audio_eos", "vision_bos", "vision_eos", "image", "video")
CODEC_KEYS = {
    "codec_pad": "tts_codec_pad_token_id",
    "codec_bos": "tts_codec_start_token_id",
    "codec_eos": "tts_codec_end_token_id",
    "codec_mask": "tts_codec_mask_token_id",
}
# Three DiT sizes: the key that transformers reads and writes, and the release's key.
DIT_SPELLINGS = {"hidden_size": "dim", "num_hidden_layers": "depth", "num_attention_heads": "heads"}
# Keys that the release leaves out, by section, with the values that it is run with.
HF_DEFAULTS: dict[tuple[str, ...], dict[str, Any]] = {
    ("thinker_config", "vision_config"): {"rope_theta": 10_000.0, "rms_norm_eps": 1e-6},
    ("token2wav_config", "dit_config"): {
        "block_size": 24,
        "look_ahead_layers": [10],
        "look_backward_layers": [0, 20],
        "rope_theta": 10_000.0,
    },
}
# Keys of the release, or of files that transformers saves, that do not describe the model.
IGNORED_CONFIG_KEYS = frozenset(
    (
        # the program that wrote the file
        "architectures",
        "_name_or_path",
        "transformers_version",
        "torch_dtype",
        "dtype",
        "_attn_implementation_autoset",
        # how the weights are packed, which read_packing() reads
        "quantization_config",
        # training
        "init_std",
        "initializer_range",
        "ignore_index",
        "problem_type",
        # dropout rates, zero everywhere
        "attention_dropout",
        "activation_dropout",
        "encoder_layerdrop",
        # options of a call
        "use_cache",
        "return_dict",
        "output_attentions",
        "output_hidden_states",
        "chunk_size_feed_forward",
        # written for every model
        "id2label",
        "label2id",
        "is_encoder_decoder",
        # the sliding window, which use_sliding_window turns off
        "max_window_layers",
        "sliding_window",
        "layer_types",
        # read by nothing
        "user_token_id",
        "enc_lin_neurons",
        "enc_global_context",
        # second names of sizes that are there
        "embed_dim",
        "in_chans",
        "spatial_patch_size",
        "tokens_per_second",
    )
)
SECTIONS_WITHOUT_TEXT = ("audio_config", "vision_config", "dit_config", "bigvgan_config")
GENERATION_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")  # used in thinker_config alone
# Keys that mean nothing in one section, by the section's key, but do in another. A section without
# text has no token embeddings that could be tied.
UNUSED_IN = {section: ("tie_word_embeddings",) for section in SECTIONS_WITHOUT_TEXT} | {
    "audio_config": ("tie_word_embeddings", "num_hidden_layers"),
    "dit_config": ("tie_word_embeddings", "max_position_embeddings"),
    "text_config": GENERATION_IDS,
    "talker_config": GENERATION_IDS,
    "": GENERATION_IDS,
}
# transformers before 5 wrote these into every section of every model. They are ignored at these
# values and unknown at any other.
LEGACY_DEFAULTS = {
    "add_cross_attention": False,
    "diversity_penalty": 0.0,
    "do_sample": False,
    "early_stopping": False,
    "encoder_no_repeat_ngram_size": 0,
    "is_decoder": False,
    "length_penalty": 1.0,
    "max_length": 20,
    "min_length": 0,
    "no_repeat_ngram_size": 0,
    "num_beam_groups": 1,
    "num_beams": 1,
    "num_return_sequences": 1,
    "output_scores": False,
    "pruned_heads": {},
    "remove_invalid_values": False,
    "repetition_penalty": 1.0,
    "return_dict_in_generate": False,
    "temperature": 1.0,
    "tf_legacy_loss": False,
    "tie_encoder_decoder": False,
    "tie_word_embeddings": False,
    "top_k": 50,
    "top_p": 1.0,
    "torchscript": False,
    "typical_p": 1.0,
    "use_bfloat16": False,
}
# Where an optional file is a link to nothing, as in a cache from which files were removed.
COPY_AGAIN = "copy or download the file again"
# transformers' keys of sampling, at the top of generation_config.json. vLLM reads them too.
SAMPLING_KEYS = ("do_sample", *(field.name for field in dataclasses.fields(SamplingConfig)))
# Keys beside them that would change the answer, with the values at which they do not.
UNSUPPORTED_GENERATION = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
    "min_p": 0,
    "typical_p": 1,
    "bad_words_ids": [],
    "suppress_tokens": [],
    "begin_suppress_tokens": [],
}
MAX_CONFIG_BYTES = 10_000_000  # the index of 100,000 tensors has eight million
MODEL_TYPE = "qwen2_5_omni"
RELEASE = "Qwen/Qwen2.5-Omni-7B or -3B"
# Ids of the Talker in the configuration of a Thinker alone.
UNUSED_SPEECH_TOKENS = {name: getattr(QWEN7B.thinker.tokens, name) for name in SPEECH_TOKEN_KEYS}
SPEECH_SECTIONS = ("talker_config", "token2wav_config", "codec_config")


def read_config(folder: Path) -> OmniConfig:
    """The configuration of a model folder: an official checkpoint's, or one saved here.

    talker, token2wav and codec are None for a Thinker alone. Raises UserError, naming file and key,
    for values that are missing, unknown, of the wrong type, out of bounds or contradictory, and for
    weights that are quantized in a way that is not read here.
    """
    folder = Path(folder)
    file = folder / "config.json"
    data = read_json(file)
    check_quantization_config(data, file)
    try:
        given = normalize_hf_keys(whole_model(data, file), file)
        config = parse(given, folder)
    except UserError:
        raise
    except RecursionError:
        raise UserError(
            f"{short_path(file)}: is nested too deeply for settings; copy it again"
        ) from None
    except ValueError as error:  # sizes that contradict each other
        raise UserError(f"{short_path(file)}: {shorten(error, 260)}") from None
    # Whatever was not read is found by writing the configuration and comparing.
    given.pop("codec_config", None)  # of older folders, checked by parse_codec
    written = normalize_hf_keys(as_json(to_json(config)), file)
    check_round_trip(given, written, short_path(file))
    return config


def quantization_configs(data: dict) -> list[Any]:
    """The descriptions of quantized weights in a config.json, of all sections that may have one."""
    thinker = data.get("thinker_config")
    sections = [data, thinker, data.get("text_config")]
    if isinstance(thinker, dict):
        sections.append(thinker.get("text_config"))
    found = []
    for section in sections:
        if isinstance(section, dict) and section.get("quantization_config") is not None:
            found.append(section["quantization_config"])
    return found


def check_quantization_config(data: dict, file: Path) -> None:
    """Raise UserError for weights that are quantized in a way that is not read here."""
    for settings in quantization_configs(data):
        if packed_format(settings) is None:
            raise UserError(
                f"{short_path(file)}: this model is quantized (quantization_config: "
                f"{quantization(settings)}); such weights are not read here, only those of GPTQ "
                f"and AWQ in 4 bits; take the bf16 release {RELEASE}"
            )


def read_packing(folder: Path) -> PackedFormat | None:
    """How the weights of a folder are packed; None for plain ones. Raises UserError."""
    for settings in quantization_configs(read_json(folder / "config.json")):
        return packed_format(settings)
    return None


def quantization(settings: Any) -> str:
    """Method and bits of a quantization_config, for an error message."""
    if not isinstance(settings, dict):
        return quote_json(settings, 30)
    method = quote_json(settings.get("quant_method", "unknown"), 30)
    if "bits" not in settings:
        return method
    return f"{method}, {quote_json(settings['bits'], 20)} bits"


def whole_model(data: dict, file: Path) -> dict:
    """The settings of a whole model; those of a Thinker alone become its thinker_config.

    Raises UserError for the settings of another kind of model.
    """
    model_type = data.get("model_type", MODEL_TYPE)
    if model_type == f"{MODEL_TYPE}_thinker":
        data = {"enable_audio_output": False, "thinker_config": data}
    elif model_type != MODEL_TYPE:
        raise UserError(
            f"{short_path(file)}: model_type is {quote_json(model_type)}, this code runs "
            f"'{MODEL_TYPE}' and '{MODEL_TYPE}_thinker'; take {RELEASE}"
        )
    if data.get("enable_audio_output") is not False:
        return data
    # transformers writes its default sizes for parts that are turned off.
    unused = (*SPEECH_SECTIONS, "enable_talker")
    return {key: value for key, value in data.items() if key not in unused}


def without_speech(config: OmniConfig) -> OmniConfig:
    """The configuration of the Thinker alone, equal to what read_config gives for its folder."""
    tokens = dataclasses.replace(config.thinker.tokens, **UNUSED_SPEECH_TOKENS)
    thinker = dataclasses.replace(config.thinker, tokens=tokens)
    return dataclasses.replace(config, thinker=thinker, talker=None, token2wav=None, codec=None)


def write_config(config: OmniConfig, folder: Path) -> None:
    """Write config.json, generation_config.json, preprocessor_config.json and, for a model with a
    codec, codec/config.json; read_config gives `config` again.
    """
    folder = Path(folder)
    write_json(folder / "config.json", to_json(config))
    if config.codec is not None:
        write_json(folder / CODEC_FOLDER / "config.json", asdict(config.codec))
    generation = {
        "thinker": asdict(config.thinker_sampling),
        "talker": asdict(config.talker_sampling),
        "flow": asdict(config.flow),
    }
    write_json(folder / "generation_config.json", generation)
    preprocessor = {
        "min_pixels": config.media.image_min_pixels,  # the release's keys
        "max_pixels": config.media.image_max_pixels,
        "media": asdict(config.media),
    }
    write_json(folder / "preprocessor_config.json", preprocessor)


def write_json(file: Path, data: dict) -> None:
    """Write one JSON object. Raises UserError where that fails."""
    text = json.dumps(data, indent=2) + "\n"
    write_atomically(file, lambda f: f.write(text.encode()))


def read_json(
    file: Path,
    optional: bool = False,
    advice: str = "a model folder holds config.json and *.safetensors",
) -> dict:
    """One JSON object from a file; {} where an optional file is absent. Raises UserError, also
    where a link is there and its target is not.
    """
    if optional and not os.path.lexists(file):
        return {}
    return read_json_object(file, advice, MAX_CONFIG_BYTES)


def as_json(data: dict) -> dict:
    """The object as JSON would give it back: tuples become lists."""
    return json.loads(json.dumps(data))


# --------------------------------------------------------------------------------------------------
# one spelling for every setting
def normalize_hf_keys(data: dict, file: Path) -> dict:
    """The settings with the release's keys; absent keys get their defaults, nulls are left out.

    Raises UserError for two spellings of one setting that disagree.
    """
    data = map_sections(remove_unused_keys, data)
    data = map_sections(lambda section, path: rename_keys(section, path, file), data)
    data = map_sections(fill_defaults, data)
    return unify_tying(data, file)


def map_sections(
    function: Callable[[dict, tuple[str, ...]], dict], data: dict, path: tuple[str, ...] = ()
) -> dict:
    """Apply function(section, path of keys) to every object of a JSON tree, outer ones first."""
    result = {}
    for key, value in function(data, path).items():
        if isinstance(value, dict):
            value = map_sections(function, value, (*path, key))
        result[key] = value
    return result


def remove_unused_keys(section: dict, path: tuple[str, ...]) -> dict:
    """The section without the keys that mean nothing there."""
    unused = UNUSED_IN.get(path[-1] if path else "", ())
    return {key: value for key, value in section.items() if key not in unused}


def rename_keys(section: dict, path: tuple[str, ...], file: Path) -> dict:
    """The section with the release's keys, without nulls.

    Raises UserError where two keys of one setting disagree.
    """
    section = {key: value for key, value in section.items() if value is not None}
    name = f"{short_path(file)}: {'.'.join(path)}"

    # Collect (key of the release, value that the section has under another key).
    rope = section.pop("rope_parameters", {})
    check_rope(rope, name)
    renamed = [("rope_theta", rope.get("rope_theta"))]
    if "mrope_section" in rope:
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        renamed.append(("rope_scaling", scaling))
    if "dit_config" in path:
        renamed += [(release, section.pop(key, None)) for key, release in DIT_SPELLINGS.items()]

    # Put them under the release's keys, where another value may be.
    for key, value in renamed:
        if value is None:
            continue
        section.setdefault(key, value)
        if section[key] != value:
            raise UserError(
                f"{name} says both {quote_json(section[key])} and {quote_json(value)} for {key}; "
                "keep one"
            )
    return section


def check_rope(rope: Any, name: str) -> None:
    """Raise UserError unless this code computes what rope_parameters of transformers 5 describe."""
    if not isinstance(rope, dict):
        raise UserError(f"{name}: 'rope_parameters' is {quote_json(rope)}, expected an object")
    if "mrope_section" in rope:
        return
    unknown = rope.keys() - {"rope_theta", "rope_type"}
    if unknown or rope.get("rope_type", "default") not in ("default", "axial"):
        raise UserError(
            f"{name}: 'rope_parameters' is {quote_json(rope, 160)}; this code knows rope_theta "
            "alone here"
        )


def fill_defaults(section: dict, path: tuple[str, ...]) -> dict:
    """The section with the values of the keys that the release leaves out."""
    return HF_DEFAULTS.get(path, {}) | section


def unify_tying(data: dict, file: Path) -> dict:
    """Set tie_word_embeddings in both sections: transformers 4 reads text_config's, 5 reads
    thinker_config's.

    It is true if either is. The tensors decide in the end: a stored text head is not tied. Raises
    UserError for anything but true and false.
    """
    thinker = data.get("thinker_config")
    if not isinstance(thinker, dict):
        return data
    text = thinker.get("text_config")
    tied = False
    for section in (thinker, text):
        if isinstance(section, dict) and "tie_word_embeddings" in section:
            value = section["tie_word_embeddings"]
            if not isinstance(value, bool):
                raise UserError(
                    f"{short_path(file)}, thinker_config: 'tie_word_embeddings' is "
                    f"{quote_json(value)}, expected true or false"
                )
            tied = tied or value
    if isinstance(text, dict):
        thinker = thinker | {"text_config": text | {"tie_word_embeddings": tied}}
    return data | {"thinker_config": thinker | {"tie_word_embeddings": tied}}


# --------------------------------------------------------------------------------------------------
# JSON to OmniConfig
class Section:
    """One object of a JSON file, with its name for error messages."""

    def __init__(self, data: dict, name: str):
        self.data = data
        self.name = name

    def __getitem__(self, key: str) -> Any:
        if key not in self.data:
            raise UserError(f"{self.name}: the key {key!r} is missing")
        return self.data[key]

    def section(self, key: str) -> "Section":
        """The object under a key. Raises UserError where there is none."""
        value = self[key]
        if not isinstance(value, dict):
            raise UserError(f"{self.name}: {key!r} is {quote_json(value)}, expected an object")
        return Section(value, f"{self.name}, {key}")

    def build(self, cls: type, keys: dict[str, str] | None = None, **known) -> Any:
        """A config dataclass: a field is `known`, or read from the key of its name or of `keys`.

        Raises UserError naming the section for a value of the wrong type, and for values that the
        dataclass itself rejects.
        """
        keys = keys or {}
        values = {}
        for field in dataclasses.fields(cls):
            if field.name not in known:
                values[field.name] = self.typed(keys.get(field.name, field.name), field.type)
        try:
            return cls(**values, **known)
        except ValueError as error:
            raise UserError(f"{self.name}: {shorten(error, 260)}") from None

    def typed(self, key: str, kind: Any) -> Any:
        """The value of a key, checked against int, float, str, bool or a tuple type."""
        value = self[key]
        json_types: dict[Any, Any] = {int: int, float: (int, float), str: str, bool: bool}
        valid = isinstance(value, json_types.get(kind, list))
        if isinstance(value, bool) and kind is not bool:  # bool is a subclass of int
            valid = False
        if not valid:
            expected = getattr(kind, "__name__", kind)
            raise UserError(f"{self.name}: {key!r} is {quote_json(value)}, expected {expected}")
        return to_tuples(value)


def to_tuples(value: Any) -> Any:
    """The value with every list as a tuple."""
    return tuple(map(to_tuples, value)) if isinstance(value, list) else value


def parse(data: dict, folder: Path) -> OmniConfig:
    """OmniConfig from config.json with normalized keys and the files beside it.

    Adds to `data` the two keys that depend on others: vision_token_id and head_dim.
    """
    root = Section(data, short_path(folder / "config.json"))
    thinker = root.section("thinker_config")
    speech_tokens = UNUSED_SPEECH_TOKENS
    talker = token2wav = codec = None

    # The Talker's section has three of the token ids; without a Talker they are not used.
    if data.get("enable_audio_output") is not False:
        section = root.section("talker_config")
        speech_tokens = {name: section.typed(key, int) for name, key in SPEECH_TOKEN_KEYS.items()}
        talker = section.build(TalkerConfig, CODEC_KEYS, decoder=parse_decoder(section))
        token2wav = parse_token2wav(root.section("token2wav_config"))
        codec = parse_codec(root, folder)

    file = folder / "generation_config.json"
    generation = Section(read_json(file, True, COPY_AGAIN), short_path(file))
    return OmniConfig(
        thinker=parse_thinker(thinker, speech_tokens),
        talker=talker,
        token2wav=token2wav,
        codec=codec,
        media=parse_media(folder),
        thinker_sampling=parse_thinker_sampling(generation),
        talker_sampling=parse_group(generation, "talker", SamplingConfig, QWEN7B.talker_sampling),
        flow=parse_group(generation, "flow", FlowConfig, QWEN7B.flow),
    )


def parse_thinker(section: Section, speech_tokens: dict[str, int]) -> ThinkerConfig:
    """thinker_config; speech_tokens are the ids that talker_config has."""
    vision_pad = section.typed("vision_start_token_id", int) + 2
    section.data.setdefault("vision_token_id", vision_pad)  # left out by transformers
    text = section.section("text_config")
    head_dim = text.typed("hidden_size", int) // max(text.typed("num_attention_heads", int), 1)
    text.data.setdefault("head_dim", head_dim)  # left out by the release
    return section.build(
        ThinkerConfig,
        audio=section.section("audio_config").build(AudioEncoderConfig),
        vision=section.section("vision_config").build(VisionEncoderConfig),
        text=parse_decoder(text),
        tokens=section.build(TokenIds, TOKEN_KEYS, **speech_tokens),
    )


def parse_token2wav(section: Section) -> Token2WavConfig:
    """token2wav_config: the sizes of DiT and BigVGAN."""
    dit = section.section("dit_config").build(DiTConfig, DIT_SPELLINGS)
    bigvgan = section.section("bigvgan_config").build(BigVGANConfig)
    return section.build(Token2WavConfig, dit=dit, bigvgan=bigvgan)


def parse_decoder(section: Section) -> DecoderConfig:
    """The decoder's sizes in text_config or talker_config."""
    mrope_section = section.section("rope_scaling").typed("mrope_section", tuple)
    return section.build(DecoderConfig, mrope_section=mrope_section)


def parse_group(section: Section, key: str, cls: type, default: Any) -> Any:
    """One of our own groups of settings under a key, or the default where the key is absent."""
    if key not in section.data:
        return default
    return parse_own(section.section(key), cls)


def parse_thinker_sampling(section: Section) -> SamplingConfig:
    """How the Thinker samples: our group "thinker", or the keys of transformers at the top.

    Without do_sample a temperature is used, as in vLLM. Raises UserError where the group and the
    keys disagree, and for keys that would change the answer and are not supported.
    """
    for key, neutral in UNSUPPORTED_GENERATION.items():
        value = section.data.get(key)
        if value is not None and value != neutral:
            raise UserError(
                f"{section.name}: {key} is {quote_json(value)}, which is not supported here; "
                f"remove it"
            )
    sampling = parse_group(section, "thinker", SamplingConfig, QWEN7B.thinker_sampling)
    given = {}
    for field in dataclasses.fields(SamplingConfig):
        if section.data.get(field.name) is not None:
            given[field.name] = section.typed(field.name, field.type)
    if section.data.get("do_sample") is not None:
        if not section.typed("do_sample", bool):
            given["temperature"] = 0.0
        elif "temperature" not in given:
            given["temperature"] = sampling.temperature or 1.0  # transformers' own default
    try:
        result = dataclasses.replace(sampling, **given)
    except ValueError as error:
        raise UserError(f"{section.name}: {shorten(error, 260)}") from None
    for key in given:
        if "thinker" in section.data and getattr(result, key) != getattr(sampling, key):
            raise UserError(
                f"{section.name}: its keys of transformers make {key} {getattr(result, key)}, and "
                f"thinker says {getattr(sampling, key)}; change thinker, and remove the others"
            )
    return result


def parse_own(section: Section, cls: type) -> Any:
    """A section of our own as a config dataclass. Raises UserError for a missing or unknown key."""
    known = {field.name for field in dataclasses.fields(cls)}
    unknown = sorted(set(section.data) - known)
    if unknown:
        raise UserError(f"{section.name}: unknown key {quote_json(unknown[0])}")
    return section.build(cls)


def parse_codec(root: Section, folder: Path) -> CodecConfig | CodeClassifierConfig | None:
    """The codec's sizes from codec/config.json, or in older folders from config.json."""
    file = folder / CODEC_FOLDER / "config.json"
    if os.path.lexists(file):
        section = Section(read_json(file, advice=COPY_AGAIN), short_path(file))
        is_classifier = "num_codes" in section.data
        return parse_own(section, CodeClassifierConfig if is_classifier else CodecConfig)
    return parse_group(root, "codec_config", CodecConfig, None)


def parse_media(folder: Path) -> MediaConfig:
    """Our own media limits, or else the release's with the folder's limits of image sizes.

    Raises UserError where the two disagree.
    """
    section = image_settings(folder)
    limits = image_limits(section)
    try:
        release = dataclasses.replace(QWEN7B.media, **limits)
    except ValueError as error:
        raise UserError(f"{section.name}, min_pixels and max_pixels: {error}") from None
    media = parse_group(section, "media", MediaConfig, release)
    for name, key in (("image_min_pixels", "min_pixels"), ("image_max_pixels", "max_pixels")):
        if section.data.get(key) is not None and getattr(media, name) != limits[name]:
            raise UserError(
                f"{section.name}: {key} is {limits[name]} and media.{name} is "
                f"{getattr(media, name)}; change both, or remove media"
            )
    return media


def image_limits(section: Section) -> dict[str, Any]:
    """The limits of image sizes that a folder gives, by our names, in either of two spellings."""
    limits: dict[str, Any] = {}
    size = section.data.get("size")  # written by transformers when it saves a processor
    for name, key, size_key in (
        ("image_min_pixels", "min_pixels", "shortest_edge"),
        ("image_max_pixels", "max_pixels", "longest_edge"),
    ):
        if section.data.get(key) is not None:
            limits[name] = section.typed(key, int)
        elif isinstance(size, dict) and size.get(size_key) is not None:
            limits[name] = section.section("size").typed(size_key, int)
    return limits


def image_settings(folder: Path) -> Section:
    """preprocessor_config.json, or the section of processor_config.json in which transformers 5
    keeps the same keys.
    """
    file = folder / "preprocessor_config.json"
    newer = folder / "processor_config.json"
    if os.path.lexists(file) or not os.path.lexists(newer):
        return Section(read_json(file, True, COPY_AGAIN), short_path(file))
    processor = Section(read_json(newer, advice=COPY_AGAIN), short_path(newer))
    if "image_processor" in processor.data:
        return processor.section("image_processor")
    return processor


def check_round_trip(given: dict, written: dict, name: str) -> None:
    """Raise UserError naming the first given key that we would write in another way."""
    for key, value in given.items():
        if key in IGNORED_CONFIG_KEYS:
            continue
        if key not in written:
            if key in LEGACY_DEFAULTS and value == LEGACY_DEFAULTS[key]:
                continue
            raise UserError(
                f"{name}: unknown key {quote_json(key)}; remove it, or use the code "
                "that it was written for"
            )
        if isinstance(value, dict) and isinstance(written[key], dict):
            check_round_trip(value, written[key], f"{name}, {key}")
        elif value != written[key]:
            raise UserError(
                f"{name}: {key!r} is {quote_json(value)}, this code can only be "
                f"{quote_json(written[key])} here"
            )


# --------------------------------------------------------------------------------------------------
# OmniConfig to JSON
def to_json(config: OmniConfig) -> dict:
    """The object of config.json, in the release's layout."""
    thinker = config.thinker
    tied = {"tie_word_embeddings": thinker.tie_word_embeddings}
    has_speech = config.talker is not None
    data = {
        "architectures": ["Qwen2_5OmniForConditionalGeneration"],
        "model_type": MODEL_TYPE,
        "enable_audio_output": has_speech,
        "enable_talker": has_speech,
        "thinker_config": {
            "model_type": f"{MODEL_TYPE}_thinker",
            **{key: getattr(thinker.tokens, name) for name, key in TOKEN_KEYS.items()},
            **time_json(thinker),
            **tied,
            "audio_config": {
                "model_type": f"{MODEL_TYPE}_audio_encoder",
                "activation_function": "gelu",
                "dropout": 0.0,
                "scale_embedding": False,
                **asdict(thinker.audio),
            },
            "vision_config": {
                "model_type": f"{MODEL_TYPE}_vision_encoder",
                "hidden_act": "silu",
                **asdict(thinker.vision),
            },
            "text_config": {
                "model_type": f"{MODEL_TYPE}_text",
                **decoder_json(thinker.text),
                **tied,
            },
        },
    }
    if config.talker is not None and config.token2wav is not None:
        data["talker_config"] = talker_json(config.talker, thinker)
        data["token2wav_config"] = token2wav_json(config.token2wav)
    return data


def time_json(thinker: ThinkerConfig) -> dict:
    """The time base of TMRoPE, which Thinker and Talker share."""
    return {
        "position_id_per_seconds": thinker.position_id_per_seconds,
        "seconds_per_chunk": thinker.seconds_per_chunk,
    }


def talker_json(talker: TalkerConfig, thinker: ThinkerConfig) -> dict:
    """talker_config, which repeats some of the Thinker's settings."""
    tokens = thinker.tokens
    return {
        "model_type": f"{MODEL_TYPE}_talker",
        "embedding_size": talker.embedding_size,
        **decoder_json(talker.decoder),
        **{TOKEN_KEYS[name]: getattr(tokens, name) for name in SHARED_TOKENS},
        **time_json(thinker),
        **{key: getattr(tokens, name) for name, key in SPEECH_TOKEN_KEYS.items()},
        **{key: getattr(talker, name) for name, key in CODEC_KEYS.items()},
        "spatial_merge_size": thinker.vision.spatial_merge_size,
    }


def token2wav_json(token2wav: Token2WavConfig) -> dict:
    """token2wav_config. Three of the DiT's sizes have two keys: transformers reads its own."""
    dit = asdict(token2wav.dit)
    return {
        "model_type": f"{MODEL_TYPE}_token2wav",
        "dit_config": {
            "model_type": f"{MODEL_TYPE}_dit",
            **dit,
            **{release: dit[key] for key, release in DIT_SPELLINGS.items()},
        },
        "bigvgan_config": {
            "model_type": f"{MODEL_TYPE}_bigvgan",
            "use_bias_at_final": False,
            **asdict(token2wav.bigvgan),
        },
    }


def decoder_json(config: DecoderConfig) -> dict:
    """A decoder's sizes in text_config or talker_config."""
    sizes = asdict(config)
    mrope_section = sizes.pop("mrope_section")
    return {
        "hidden_act": "silu",
        "use_sliding_window": False,
        "tie_word_embeddings": False,
        **sizes,
        "rope_scaling": {
            "mrope_section": mrope_section,
            "rope_type": "default",
            "type": "default",
        },
    }
