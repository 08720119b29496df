"""OmniConfig to and from the JSON files of a model folder, in the release's layout.

config.json holds the sizes; what it says must be said completely, and nothing unknown may be said.
Three things of ours are not in a release and take QWEN7B's values there: the codec in
codec/config.json, the generation settings in generation_config.json, the media limits in
preprocessor_config.json. A Thinker alone is a model too: its config.json is what the release says
under thinker_config, or has enable_audio_output turned off.
"""

import dataclasses
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from minomni.config import (
    QWEN7B,
    AudioEncoderConfig,
    BigVGANConfig,
    CodecConfig,
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
from minomni.errors import UserError, shorten
from minomni.files import write_atomically
from minomni.model_files import quote, read_object, where

# the codec's subfolder: programs that do not know it read all tensors of the folder above
CODEC_FOLDER = "codec"
# Our names of the token ids, and their keys in thinker_config; talker_config has three more, and
# repeats some.
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
# The release's spelling of three DiT sizes, and the one that transformers reads and writes.
DIT_SPELLINGS = {"hidden_size": "dim", "num_hidden_layers": "depth", "num_attention_heads": "heads"}
# Keys that the release leaves out, with the values it is run with.
HF_DEFAULTS = {
    ("thinker_config", "vision_config"): {"rope_theta": 10_000.0, "rms_norm_eps": 1e-6},
    ("token2wav_config", "dit_config"): {
        "block_size": 24,
        "look_ahead_layers": [10],
        "look_backward_layers": [0, 20],
        "rope_theta": 10_000.0,
    },
}
# Keys of the release, or of what transformers saves, that say nothing about the model.
IGNORED_KEYS = frozenset(
    (
        "architectures",
        "_name_or_path",
        "transformers_version",
        "torch_dtype",
        "dtype",  # who wrote it and how
        "_attn_implementation_autoset",
        "init_std",
        "initializer_range",
        "ignore_index",
        "problem_type",  # about training
        "attention_dropout",
        "activation_dropout",
        "encoder_layerdrop",  # zero everywhere
        "use_cache",
        "return_dict",
        "output_attentions",
        "output_hidden_states",
        "chunk_size_feed_forward",  # how to call
        "id2label",
        "label2id",
        "is_encoder_decoder",  # written for every model
        "max_window_layers",
        "sliding_window",
        "layer_types",  # of a sliding window that use_sliding_window turns off
        "user_token_id",
        "enc_lin_neurons",
        "enc_global_context",  # read by nothing
        "embed_dim",
        "in_chans",
        "spatial_patch_size",
        "tokens_per_second",  # second names of sizes that are there
    )
)
TOWERS = ("audio_config", "vision_config", "dit_config", "bigvgan_config")
OF_GENERATION = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)  # the Thinker's are the ones that count
# Keys that say nothing in one section, but do elsewhere. A tower has no words whose embeddings
# could be tied.
MEANINGLESS_IN = {section: ("tie_word_embeddings",) for section in TOWERS} | {
    "audio_config": ("tie_word_embeddings", "num_hidden_layers"),
    "dit_config": ("tie_word_embeddings", "max_position_embeddings"),
    "text_config": OF_GENERATION,
    "talker_config": OF_GENERATION,
    "": OF_GENERATION,
}
# What transformers before 5 wrote into every section, whatever the model: without meaning at these
# values alone.
USUAL = {
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
MOST_SETTINGS = 10_000_000  # bytes; the index of 100,000 tensors has eight million
BASE = "qwen2_5_omni"  # the model_type of a whole model
RELEASE = "Qwen/Qwen2.5-Omni-7B or -3B"
SPEECH_SECTIONS = ("talker_config", "token2wav_config", "codec_config")


def read_config(folder: Path) -> OmniConfig:
    """The configuration of a model folder: an official checkpoint's, or one saved here.

    talker, token2wav and codec are None for a Thinker alone. Raises UserError, naming file and key,
    for what is missing, unknown, of the wrong type, out of bounds or contradictory, and for
    quantized models.
    """
    folder = Path(folder)
    file = folder / "config.json"
    data = read_json(file)
    refuse_quantized(data, file)
    try:
        given = normalize_hf_keys(whole_model(data, file), file)
        config = parse(given, folder)
    except UserError:
        raise
    except RecursionError:
        raise UserError(
            f"{where(file)}: is nested too deeply for settings; copy it again"
        ) from None
    except ValueError as error:  # sizes that contradict each other
        raise UserError(f"{where(file)}: {shorten(error, 260)}") from None
    given.pop("codec_config", None)  # of older folders, checked by parse_codec
    compare(given, normalize_hf_keys(plain(to_json(config)), file), where(file))
    return config


def refuse_quantized(data: dict, file: Path) -> None:
    """Raise UserError for a model whose weights were quantized by another program, naming the
    method.
    """
    sections = [data, data.get("thinker_config")]
    sections += [section.get("text_config") for section in sections if isinstance(section, dict)]
    for section in sections:
        if isinstance(section, dict) and section.get("quantization_config") is not None:
            how = section["quantization_config"]
            method = how.get("quant_method", "unknown") if isinstance(how, dict) else how
            bits = (
                f", {quote(how['bits'], 20)} bits"
                if isinstance(how, dict) and "bits" in how
                else ""
            )
            raise UserError(
                f"{where(file)}: this model is quantized (quantization_config: {quote(method, 30)}{bits}); "
                f"such weights are not read here, take the bf16 release {RELEASE}"
            )


def whole_model(data: dict, file: Path) -> dict:
    """The settings of a whole model: those of a Thinker alone are put where the release has them.

    Raises UserError for the settings of another kind of model.
    """
    kind = data.get("model_type", BASE)
    if kind == f"{BASE}_thinker":
        data = {"enable_audio_output": False, "thinker_config": data}
    elif kind != BASE:
        raise UserError(
            f"{where(file)}: model_type is {quote(kind)}, this code runs '{BASE}' and '{BASE}_thinker'; "
            f"take {RELEASE}"
        )
    if data.get("enable_audio_output") is False:
        # Sizes of parts that are turned off say nothing; transformers writes its defaults there.
        data = {
            key: value
            for key, value in data.items()
            if key not in (*SPEECH_SECTIONS, "enable_talker")
        }
    return data


def without_speech(config: OmniConfig) -> OmniConfig:
    """The same model with its Thinker alone, as read_config gives it for a folder that holds no
    more.
    """
    unused = {name: getattr(QWEN7B.thinker.tokens, name) for name in SPEECH_TOKEN_KEYS}
    thinker = dataclasses.replace(
        config.thinker, tokens=dataclasses.replace(config.thinker.tokens, **unused)
    )
    return dataclasses.replace(config, thinker=thinker, talker=None, token2wav=None, codec=None)


def write_config(config: OmniConfig, folder: Path) -> None:
    """Write config.json, generation_config.json, preprocessor_config.json and, for a model with a
    codec, codec/config.json; read_config gives `config` again.
    """
    folder, media = Path(folder), config.media
    write_json(folder / "config.json", to_json(config))
    if config.codec is not None:
        write_json(folder / CODEC_FOLDER / "config.json", asdict(config.codec))
    settings = {
        "thinker": config.thinker_sampling,
        "talker": config.talker_sampling,
        "flow": config.flow,
    }
    write_json(
        folder / "generation_config.json", {key: asdict(value) for key, value in settings.items()}
    )
    pixels = {
        "min_pixels": media.image_min_pixels,
        "max_pixels": media.image_max_pixels,
    }  # as the release says it
    write_json(folder / "preprocessor_config.json", pixels | {"media": asdict(media)})


def write_json(file: Path, data: dict) -> None:
    write_atomically(file, lambda f: f.write(json.dumps(data, indent=2).encode() + b"\n"))


def read_json(file: Path, optional: bool = False) -> dict:
    """One JSON object from a file; {} where an optional file is absent. Raises UserError."""
    if optional and not file.exists():
        return {}
    return read_object(file, "a model folder holds config.json and *.safetensors", MOST_SETTINGS)


def plain(data: dict) -> dict:
    """As JSON would give it back: tuples become lists."""
    return json.loads(json.dumps(data))


def normalize_hf_keys(data: dict, file: Path, path: tuple[str, ...] = ()) -> dict:
    """The same settings with the release's keys, unsaid ones filled in, nulls left out."""
    data = {key: value for key, value in data.items() if value is not None}
    here = f"{where(file)}: {'.'.join(path)}"
    rope = data.pop("rope_parameters", {})
    if not isinstance(rope, dict):
        raise UserError(f"{here}: 'rope_parameters' is {quote(rope)}, expected an object")
    alternatives = [("rope_theta", rope.get("rope_theta"))]
    if "mrope_section" in rope:
        alternatives.append(
            ("rope_scaling", {key: value for key, value in rope.items() if key != "rope_theta"})
        )
    elif rope.keys() - {"rope_theta", "rope_type"} or rope.get("rope_type", "default") not in (
        "default",
        "axial",
    ):
        raise UserError(
            f"{here}: 'rope_parameters' is {quote(rope, 160)}; this code knows rope_theta alone here"
        )
    if "dit_config" in path:
        alternatives += [(short, data.pop(long, None)) for long, short in DIT_SPELLINGS.items()]
    for key, value in alternatives:
        if value is not None and data.setdefault(key, value) != value:
            raise UserError(
                f"{here} says both {quote(data[key])} and {quote(value)} for {key}; keep one"
            )
    for key in MEANINGLESS_IN.get("".join(path[-1:]), ()):
        data.pop(key, None)
    inner = {
        key: normalize_hf_keys(value, file, (*path, key))
        for key, value in data.items()
        if isinstance(value, dict)
    }
    data = HF_DEFAULTS.get(path, {}) | data | inner
    return spell_tying(data, file) if path == ("thinker_config",) else data


def spell_tying(thinker: dict, file: Path) -> dict:
    """Say tie_word_embeddings in both places: transformers 4 reads it in text_config, 5 in
    thinker_config.

    Which of them is right is known from the tensors: where the text head is stored, it is not tied.
    """
    text = thinker.get("text_config")
    said = [
        section["tie_word_embeddings"]
        for section in (thinker, text)
        if isinstance(section, dict) and "tie_word_embeddings" in section
    ]
    for value in said:
        if not isinstance(value, bool):
            raise UserError(
                f"{where(file)}, thinker_config: 'tie_word_embeddings' is {quote(value)}, expected true or "
                f"false"
            )
    if isinstance(text, dict):
        thinker = thinker | {"text_config": text | {"tie_word_embeddings": any(said)}}
    return thinker | {"tie_word_embeddings": any(said)}


class Section:
    """One object of a JSON file, which knows its own name for error messages."""

    def __init__(self, data: dict, name: str):
        self.data, self.name = data, name

    def __getitem__(self, key: str) -> Any:
        if key not in self.data:
            raise UserError(f"{self.name}: the key {key!r} is missing")
        return self.data[key]

    def section(self, key: str) -> "Section":
        if not isinstance(self[key], dict):
            raise UserError(f"{self.name}: {key!r} is {quote(self[key])}, expected an object")
        return Section(self[key], f"{self.name}, {key}")

    def build(self, cls: type, keys: dict[str, str] | None = None, **known) -> Any:
        """A config dataclass: each field from the key of its name, or as `keys` renames it, or as
        `known`.

        Raises UserError naming the section for a value of the wrong type, and for what the
        dataclass itself refuses.
        """
        values = {
            field.name: self.typed((keys or {}).get(field.name, field.name), field.type)
            for field in dataclasses.fields(cls)
            if field.name not in known
        }
        try:
            return cls(**values, **known)
        except ValueError as error:
            raise UserError(f"{self.name}: {shorten(error, 260)}") from None

    def typed(self, key: str, kind: Any) -> Any:
        """The value of a key, checked against int, float, str, bool or a tuple type."""
        value = self[key]
        allowed = {int: int, float: (int, float), str: str, bool: bool}.get(kind, list)
        if not isinstance(value, allowed) or isinstance(value, bool) and kind is not bool:
            raise UserError(
                f"{self.name}: {key!r} is {quote(value)}, expected {getattr(kind, '__name__', kind)}"
            )
        return tuples(value)


def tuples(value: Any) -> Any:
    return tuple(map(tuples, value)) if isinstance(value, list) else value


def parse(data: dict, folder: Path) -> OmniConfig:
    """config.json in the release's spelling, and the two files beside it, as an OmniConfig."""
    root = Section(data, where(folder / "config.json"))
    thinker, talker, token2wav = root.section("thinker_config"), None, None
    speaks = data.get("enable_audio_output") is not False
    if speaks:
        talker, token2wav = root.section("talker_config"), root.section("token2wav_config")
    vision_pad = thinker.typed("vision_start_token_id", int) + 2
    thinker.data.setdefault("vision_token_id", vision_pad)  # left out by transformers
    text = thinker.section("text_config")
    head_dim = text.typed("hidden_size", int) // max(text.typed("num_attention_heads", int), 1)
    text.data.setdefault("head_dim", head_dim)  # left out by the release
    speech = {
        name: getattr(QWEN7B.thinker.tokens, name) for name in SPEECH_TOKEN_KEYS
    }  # of no use without a Talker
    if speaks:
        speech = {name: talker.typed(key, int) for name, key in SPEECH_TOKEN_KEYS.items()}
    file = folder / "generation_config.json"
    generation = Section(read_json(file, optional=True), where(file))
    return OmniConfig(
        thinker=thinker.build(
            ThinkerConfig,
            audio=thinker.section("audio_config").build(AudioEncoderConfig),
            vision=thinker.section("vision_config").build(VisionEncoderConfig),
            text=decoder(text),
            tokens=thinker.build(TokenIds, TOKEN_KEYS, **speech),
        ),
        talker=talker.build(TalkerConfig, CODEC_KEYS, decoder=decoder(talker)) if speaks else None,
        token2wav=parse_token2wav(token2wav) if speaks else None,
        codec=parse_codec(root, folder) if speaks else None,
        media=parse_media(folder),
        thinker_sampling=setting(generation, "thinker", SamplingConfig, QWEN7B.thinker_sampling),
        talker_sampling=setting(generation, "talker", SamplingConfig, QWEN7B.talker_sampling),
        flow=setting(generation, "flow", FlowConfig, QWEN7B.flow),
    )


def parse_token2wav(section: Section) -> Token2WavConfig:
    dit = section.section("dit_config").build(DiTConfig, DIT_SPELLINGS)
    return section.build(
        Token2WavConfig, dit=dit, bigvgan=section.section("bigvgan_config").build(BigVGANConfig)
    )


def decoder(section: Section) -> DecoderConfig:
    return section.build(
        DecoderConfig, mrope_section=section.section("rope_scaling").typed("mrope_section", tuple)
    )


def setting(section: Section, key: str, cls: type, default: Any) -> Any:
    """One of our own groups of settings, complete and without unknown keys, or the default where
    there is none.
    """
    return complete(section.section(key), cls) if key in section.data else default


def complete(group: Section, cls: type) -> Any:
    """All of a group of our own as a config dataclass. Raises UserError for a missing and for an
    unknown key.
    """
    unknown = sorted(set(group.data) - {field.name for field in dataclasses.fields(cls)})
    if unknown:
        raise UserError(f"{group.name}: unknown key {quote(unknown[0])}")
    return group.build(cls)


def parse_codec(root: Section, folder: Path) -> CodecConfig | None:
    """The codec's sizes: a file of the codec's own folder, or in older folders a part of
    config.json.
    """
    file = folder / CODEC_FOLDER / "config.json"
    if file.exists():
        return complete(Section(read_json(file), where(file)), CodecConfig)
    return setting(root, "codec_config", CodecConfig, None)


def parse_media(folder: Path) -> MediaConfig:
    """Our own limits, or the release's with the picture limits that the folder states for
    transformers.
    """
    section = picture_settings(folder)
    size = section.data.get("size")  # as transformers spells the limits when it saves a processor
    spellings = (
        ("image_min_pixels", "min_pixels", "shortest_edge"),
        ("image_max_pixels", "max_pixels", "longest_edge"),
    )
    limits = {}
    for name, key, edge in spellings:
        if section.data.get(key) is not None:
            limits[name] = section.typed(key, int)
        elif isinstance(size, dict) and size.get(edge) is not None:
            limits[name] = section.section("size").typed(edge, int)
    try:
        release = dataclasses.replace(QWEN7B.media, **limits)
    except ValueError as error:
        raise UserError(f"{section.name}, min_pixels and max_pixels: {error}") from None
    media = setting(section, "media", MediaConfig, release)
    for name, key, _ in spellings:
        if section.data.get(key) is not None and getattr(media, name) != limits[name]:
            raise UserError(
                f"{section.name}: {key} is {limits[name]} and media.{name} is {getattr(media, name)}; change "
                f"both, or remove media"
            )
    return media


def picture_settings(folder: Path) -> Section:
    """preprocessor_config.json, or the part of processor_config.json in which transformers 5 keeps
    the same keys.
    """
    file, newer = folder / "preprocessor_config.json", folder / "processor_config.json"
    if not file.exists() and newer.exists():
        whole = Section(read_json(newer), where(newer))
        return whole.section("image_processor") if "image_processor" in whole.data else whole
    return Section(read_json(file, optional=True), where(file))


def compare(given: dict, written: dict, where: str) -> None:
    """Everything given must be what we would write, with the same value. Raises UserError naming
    the first key.
    """
    for key, value in given.items():
        if key in IGNORED_KEYS:
            continue
        if key not in written:
            if key in USUAL and value == USUAL[key]:
                continue
            raise UserError(
                f"{where}: unknown key {quote(key)}; remove it, or use the code that it was written for"
            )
        if isinstance(value, dict) and isinstance(written[key], dict):
            compare(value, written[key], f"{where}, {key}")
        elif value != written[key]:
            raise UserError(
                f"{where}: {key!r} is {quote(value)}, this code can only be {quote(written[key])} here"
            )


def to_json(config: OmniConfig) -> dict:
    """What config.json says, in the release's layout. The DiT's sizes are in both spellings:
    transformers reads one.
    """
    thinker, ids = config.thinker, asdict(config.thinker.tokens)
    time = {
        "position_id_per_seconds": thinker.position_id_per_seconds,
        "seconds_per_chunk": thinker.seconds_per_chunk,
    }
    tied = {"tie_word_embeddings": thinker.tie_word_embeddings}
    data = {
        "architectures": ["Qwen2_5OmniForConditionalGeneration"],
        "model_type": BASE,
        "enable_audio_output": config.talker is not None,
        "enable_talker": config.talker is not None,
        "thinker_config": {
            "model_type": f"{BASE}_thinker",
            **{key: ids[name] for name, key in TOKEN_KEYS.items()},
            **time,
            **tied,
            "audio_config": {
                "model_type": f"{BASE}_audio_encoder",
                "activation_function": "gelu",
                "dropout": 0.0,
                "scale_embedding": False,
                **asdict(thinker.audio),
            },
            "vision_config": {
                "model_type": f"{BASE}_vision_encoder",
                "hidden_act": "silu",
                **asdict(thinker.vision),
            },
            "text_config": {"model_type": f"{BASE}_text", **decoder_json(thinker.text), **tied},
        },
    }
    if config.talker is not None:
        data |= speech_json(config, time)
    return data


def speech_json(config: OmniConfig, time: dict) -> dict:
    """The two sections of config.json that a model without speech leaves out."""
    thinker, talker, token2wav = config.thinker, config.talker, config.token2wav
    ids, dit = asdict(thinker.tokens), asdict(token2wav.dit)
    return {
        "talker_config": {
            "model_type": f"{BASE}_talker",
            "embedding_size": talker.embedding_size,
            **decoder_json(talker.decoder),
            **{TOKEN_KEYS[name]: ids[name] for name in SHARED_TOKENS},
            **time,
            **{key: ids[name] for name, key in SPEECH_TOKEN_KEYS.items()},
            **{key: getattr(talker, name) for name, key in CODEC_KEYS.items()},
            "spatial_merge_size": thinker.vision.spatial_merge_size,
        },
        "token2wav_config": {
            "model_type": f"{BASE}_token2wav",
            "dit_config": {
                "model_type": f"{BASE}_dit",
                **dit,
                **{key: dit[name] for name, key in DIT_SPELLINGS.items()},
            },
            "bigvgan_config": {
                "model_type": f"{BASE}_bigvgan",
                "use_bias_at_final": False,
                **asdict(token2wav.bigvgan),
            },
        },
    }


def decoder_json(config: DecoderConfig) -> dict:
    data = asdict(config)
    rope = {"mrope_section": data.pop("mrope_section"), "rope_type": "default", "type": "default"}
    fixed = {"hidden_act": "silu", "use_sliding_window": False, "tie_word_embeddings": False}
    return fixed | data | {"rope_scaling": rope}
