"""Files that transformers' AutoTokenizer and AutoProcessor read; this project has a processor of
its own and does not read them.
"""

import math
import os
from itertools import product
from pathlib import Path
from typing import Any

from minomni.checkpoint.hf_config import COPY_AGAIN, read_json, write_json
from minomni.config import INPUT_SAMPLE_RATE, OmniConfig
from minomni.errors import UserError, quote_json, short_path
from minomni.files import write_atomically
from minomni.inputs.mel import HOP, LOG_FFT
from minomni.inputs.patches import CHANNEL_MEAN, CHANNEL_STD
from minomni.inputs.tokenizer import Tokenizer

AUDIO_SECONDS = 300  # audio is padded to this length, or cut
# Settings of images and audio that this project computes at one value only.
FIXED_KEYS = (
    "patch_size",
    "temporal_patch_size",
    "merge_size",
    "image_mean",
    "image_std",
    "feature_size",
    "sampling_rate",
    "n_fft",
    "hop_length",
    "dither",
)
# The special tokens, by their names in the processor of transformers.
PROCESSOR_TOKENS = {
    "image_token": "<|IMAGE|>",
    "audio_token": "<|AUDIO|>",
    "video_token": "<|VIDEO|>",
    "vision_bos_token": "<|vision_bos|>",
    "vision_eos_token": "<|vision_eos|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
}
# render() of inputs/prompt.py in Jinja.
CHAT_TEMPLATE = """\
{%- set count = namespace(picture=0, audio=0, video=0) -%}
{%- if not messages or messages[0]['role'] != 'system' -%}
{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif -%}
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['content'] is string -%}
{{ message['content'] }}
{%- else -%}
{%- for item in message['content'] -%}
{%- if item['type'] in ['image', 'image_url'] or 'image' in item or 'image_url' in item -%}
{%- set count.picture = count.picture + 1 -%}
{{ ('Picture ' ~ count.picture ~ ': ') if add_vision_id else '' }}\
<|vision_bos|><|IMAGE|><|vision_eos|>
{%- elif item['type'] in ['audio', 'audio_url'] or 'audio' in item or 'audio_url' in item -%}
{%- set count.audio = count.audio + 1 -%}
{{ ('Audio ' ~ count.audio ~ ': ') if add_audio_id else '' }}\
<|audio_bos|><|AUDIO|><|audio_eos|>
{%- elif item['type'] in ['video', 'video_url'] or 'video' in item or 'video_url' in item -%}
{%- set count.video = count.video + 1 -%}
{{ ('Video ' ~ count.video ~ ': ') if add_vision_id else '' }}\
<|vision_bos|><|VIDEO|><|vision_eos|>
{%- elif 'text' in item -%}
{{ item['text'] }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- endif -%}
"""


def processor_settings(config: OmniConfig) -> dict:
    """The keys of preprocessor_config.json that transformers reads for images and audio."""
    vision = config.thinker.vision
    return {
        "processor_class": "Qwen2_5OmniProcessor",
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "merge_size": vision.spatial_merge_size,
        "image_mean": [round(x, 8) for x in CHANNEL_MEAN.tolist()],
        "image_std": [round(x, 8) for x in CHANNEL_STD.tolist()],
        "feature_extractor_type": "WhisperFeatureExtractor",
        "feature_size": config.thinker.audio.num_mel_bins,
        "sampling_rate": INPUT_SAMPLE_RATE,
        "n_fft": LOG_FFT,
        "hop_length": HOP,
        "chunk_length": AUDIO_SECONDS,
        "n_samples": AUDIO_SECONDS * INPUT_SAMPLE_RATE,
        "nb_max_frames": AUDIO_SECONDS * INPUT_SAMPLE_RATE // HOP,
        "padding_side": "right",
        "padding_value": 0.0,
        "dither": 0.0,
        "return_attention_mask": True,
    }


def check_processor_files(folder: Path, config: OmniConfig) -> None:
    """Raise UserError where a folder asks for images or audio that are processed in another way
    than here, which would change the answers.
    """
    fixed = processor_settings(config)
    for name in ("preprocessor_config.json", "processor_config.json"):
        file = Path(folder) / name
        if not os.path.lexists(file):
            continue
        data = read_json(file, advice=COPY_AGAIN)
        # transformers 5 has a section for each kind of input.
        sections = [data, data.get("image_processor"), data.get("feature_extractor")]
        for section, key in product(sections, FIXED_KEYS):
            value = section.get(key) if isinstance(section, dict) else None
            if value is not None and not is_close(value, fixed[key]):
                raise UserError(
                    f"{short_path(file)}: {key} is {quote_json(value)}, this code can only compute "
                    f"{quote_json(fixed[key])}; take the file of this model"
                )


def is_close(value: Any, expected: Any) -> bool:
    """Whether a setting is the expected number, or list of numbers, up to rounding."""
    if isinstance(expected, list):
        if not isinstance(value, list) or len(value) != len(expected):
            return False
        return all(is_close(a, b) for a, b in zip(value, expected, strict=True))
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return math.isclose(value, expected, rel_tol=1e-6)
    except OverflowError:  # a whole number beyond all floats
        return False


def generation_ids(config: OmniConfig) -> dict:
    """The keys of generation_config.json that transformers reads."""
    ids = config.thinker.tokens
    return {"bos_token_id": ids.im_start, "eos_token_id": ids.im_end, "pad_token_id": ids.endoftext}


def write_tokenizer_config(tokenizer: Tokenizer, config: OmniConfig, folder: Path) -> None:
    """Write tokenizer_config.json, beside the vocab.json and merges.txt of Tokenizer.save()."""
    special_tokens = tokenizer.special_tokens
    added_tokens = {}
    for token, i in sorted(special_tokens.items(), key=lambda item: item[1]):
        added_tokens[str(i)] = {
            "content": token,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "single_word": False,
            "special": True,
        }
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "processor_class": "Qwen2_5OmniProcessor",
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "model_max_length": config.thinker.text.max_position_embeddings,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": False,
        "errors": "replace",
        "extra_special_tokens": {
            key: token for key, token in PROCESSOR_TOKENS.items() if token in special_tokens
        },
        "added_tokens_decoder": added_tokens,
    }
    write_json(Path(folder) / "tokenizer_config.json", settings)


def write_chat_template(folder: Path) -> None:
    """Write chat_template.jinja."""
    file = Path(folder) / "chat_template.jinja"
    write_atomically(file, lambda f: f.write(CHAT_TEMPLATE.encode()))
