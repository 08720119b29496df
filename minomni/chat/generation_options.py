"""Generation options of one call: the length limit and sampling settings. No PyTorch, as --help
imports this file.

    omni.respond(messages, max_new_tokens=50, temperature=0.7, talker_top_k=20)

Names without a prefix, or with the prefix thinker_, are for the Thinker; talker_ is for the Talker.
The names are those of transformers' Qwen2_5OmniForConditionalGeneration.generate(). Options that
are missing or None keep the value of the model's generation_config.json.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from difflib import get_close_matches

from minomni.arguments import check_bool, check_int, check_number
from minomni.config import SAMPLING_BOUNDS, OmniConfig, SamplingConfig
from minomni.errors import UserError, quote

PREFIXES = ("thinker_", "talker_")


@dataclass(frozen=True)
class Option:
    """One option. check(value, name) returns the value or raises UserError; parse() reads the text
    of a command-line option.
    """

    check: Callable
    parse: Callable[[str], object]
    expected: str
    help: str


def max_new_tokens(value, name: str) -> int:
    """Raises UserError unless the value is a whole number from 1."""
    return check_int(value, name, *SAMPLING_BOUNDS["max_new_tokens"])


def temperature(value, name: str) -> float:
    """Raises UserError unless the value is 0 or within its bounds."""
    low, high = SAMPLING_BOUNDS["temperature"]
    value = check_number(value, name, 0, high)
    if 0 < value < low:
        raise UserError(f"{name} is {value}; expected 0, or a number from {low} to {high}")
    return value


def top_p(value, name: str) -> float:
    """Raises UserError unless the value is above 0 and at most 1."""
    low, high = SAMPLING_BOUNDS["top_p"]
    value = check_number(value, name, 0, high)
    if value < low:
        raise UserError(f"{name} is {value:g}; expected a number above 0 and up to 1")
    return value


def top_k(value, name: str) -> int:
    """-1 and 0 both keep all tokens; returns 0 for them. Raises UserError for anything else but a
    count.
    """
    return max(0, check_int(value, name, *SAMPLING_BOUNDS["top_k"]))


def repetition_penalty(value, name: str) -> float:
    """Raises UserError unless the value is within its bounds."""
    return check_number(value, name, *SAMPLING_BOUNDS["repetition_penalty"])


OPTIONS = {
    "max_new_tokens": Option(
        max_new_tokens,
        int,
        expected="a whole number from 1",
        help="maximum length of the answer in tokens",
    ),
    "temperature": Option(
        temperature,
        float,
        expected="0, or a number from {} to {}".format(*SAMPLING_BOUNDS["temperature"]),
        help="0 takes the most likely token, higher values are more random",
    ),
    "top_p": Option(
        top_p,
        float,
        expected="a number above 0 and up to 1",
        help="sample from the fewest tokens whose probabilities reach this sum",
    ),
    "top_k": Option(
        top_k,
        int,
        expected="a whole number; 0 keeps all",
        help="sample from this many tokens; 0 keeps all",
    ),
    "repetition_penalty": Option(
        repetition_penalty,
        float,
        expected="a number from {} to {}".format(*SAMPLING_BOUNDS["repetition_penalty"]),
        help="above 1 makes repeated tokens less likely",
    ),
    "do_sample": Option(
        check_bool,
        bool,
        expected="True or False",
        help="False takes the most likely token",
    ),
}
# Names in transformers -> what has the same effect here.
RENAMED_OPTIONS = {
    "speaker": "voice=",
    "return_audio": "speech=",
    "generation_mode": "speech=",
    "token2wav_num_steps": "points in flow= of stream()",
    "token2wav_guidance_scale": "guidance in flow= of stream()",
    "token2wav_sway_coefficient": "sway in flow= of stream()",
}


def split_options(options: dict) -> tuple[dict, dict]:
    """Keyword arguments -> checked options of the Thinker and of the Talker, without prefixes.

    Raises UserError for unknown names and wrong values.
    """
    by_prefix: dict[str, dict] = {"": {}, "thinker_": {}, "talker_": {}}
    for name, value in options.items():
        prefix = prefix_of(name)
        key = name.removeprefix(prefix)
        if key not in OPTIONS:
            raise unknown_option(name)
        if value is not None:
            by_prefix[prefix][key] = OPTIONS[key].check(value, name)
    # As in transformers, the name with a prefix takes precedence.
    thinker = by_prefix[""] | by_prefix["thinker_"]
    return thinker, by_prefix["talker_"]


def prefix_of(name: str) -> str:
    """The prefix thinker_ or talker_ of an option's name, or an empty string."""
    for prefix in PREFIXES:
        if name.startswith(prefix):
            return prefix
    return ""


def unknown_option(name: str) -> UserError:
    """The error for an option that does not exist, with the closest one that does."""
    if name in RENAMED_OPTIONS:
        return UserError(f"unknown option {name!r}; here it is {RENAMED_OPTIONS[name]}")
    prefix = prefix_of(name)
    matches = get_close_matches(name.removeprefix(prefix), OPTIONS, n=1)
    suggestion = f", did you mean {prefix}{matches[0]}?" if matches else ";"
    return UserError(
        f"unknown option {quote(name)}{suggestion} the options are {', '.join(OPTIONS)} for the "
        f"Thinker, and the same with the prefix talker_ for the Talker"
    )


def apply_options(stored: SamplingConfig, options: dict) -> SamplingConfig:
    """The model's stored settings of one part with the given options applied.

    A temperature above 0 samples. do_sample=False takes the most likely token whatever the
    temperature; do_sample=True without a temperature samples at the stored one, or at 1.0 where
    that is 0. Raises UserError for options that contradict each other or have no effect.
    """
    changes = dict(options)
    do_sample = changes.pop("do_sample", None)
    has_temperature = "temperature" in options
    if do_sample and has_temperature and options["temperature"] == 0:
        raise UserError(
            "do_sample=True and temperature 0 contradict each other; give a temperature above 0"
        )
    if do_sample is False:
        changes["temperature"] = 0.0
    elif do_sample and not has_temperature and stored.temperature == 0:
        changes["temperature"] = 1.0
    settings = replace(stored, **changes)

    # top_k and top_p have no effect on greedy decoding that was not asked for.
    narrowed = options.get("top_k", 0) > 0 or options.get("top_p", 1) < 1
    if narrowed and settings.temperature == 0 and do_sample is None and not has_temperature:
        raise UserError(
            "top_p and top_k change nothing at this model's temperature of 0, which takes the most "
            "likely token; give a temperature above 0 too"
        )
    return settings


def sampling_configs(config: OmniConfig, options: dict) -> tuple[SamplingConfig, SamplingConfig]:
    """Keyword arguments of one call -> settings of Thinker and Talker. Raises UserError."""
    thinker, talker = split_options(options)
    return apply_options(config.thinker_sampling, thinker), apply_options(
        config.talker_sampling, talker
    )
