"""How long an answer gets and how its tokens are chosen, as asked for in one call. No PyTorch:
--help needs it too.

    omni.respond(messages, max_new_tokens=50, temperature=0.7, talker_top_k=20)

A bare name is for the Thinker, and so is one that begins with thinker_; talker_ is for the Talker.
These are the names of transformers' Qwen2_5OmniForConditionalGeneration.generate(). What is not
asked for stays as the model's generation_config.json says. None is the same as not asked.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from difflib import get_close_matches

from minomni.arguments import flag, number, shown, whole_number
from minomni.config import SamplingConfig
from minomni.errors import UserError


@dataclass(frozen=True)
class Option:
    """One option. check(value, name) returns the value or raises UserError; read turns the text of
    an option of the command line into a value.
    """

    check: Callable
    read: Callable[[str], object]
    expected: str
    help: str


def temperature(value, name: str) -> float:
    value = number(value, name, 0, 100)
    if 0 < value < 0.001:  # logits divided by it would leave the range of float32
        raise UserError(f"{name} is {value}; expected 0, or a number from 0.001 to 100")
    return value


def top_p(value, name: str) -> float:
    value = number(value, name, 0, 1)
    if value < 1e-6:
        raise UserError(f"{name} is {value:g}; expected a number above 0 and up to 1")
    return value


def top_k(value, name: str) -> int:
    return max(0, whole_number(value, name, -1, 1_000_000))  # -1 is another spelling of "all"


OPTIONS = {
    "max_new_tokens": Option(
        lambda value, name: whole_number(value, name, 1, 1_000_000),
        int,
        "a whole number from 1",
        "longest answer, in tokens",
    ),
    "temperature": Option(
        temperature,
        float,
        "0, or a number from 0.001 to 100",
        "0 takes the most likely token, more is more random",
    ),
    "top_p": Option(
        top_p,
        float,
        "a number above 0 and up to 1",
        "choose among the fewest tokens whose probabilities reach this sum",
    ),
    "top_k": Option(
        top_k, int, "a whole number; 0 keeps all", "choose among this many tokens; 0 keeps all"
    ),
    "repetition_penalty": Option(
        lambda value, name: number(value, name, 0.01, 100),
        float,
        "a number from 0.01 to 100",
        "above 1 makes repeated tokens less likely",
    ),
    "do_sample": Option(flag, bool, "True or False", "False takes the most likely token"),
}
ELSEWHERE = {  # transformers' words for what has another name here
    "speaker": "voice=",
    "return_audio": "speech=",
    "generation_mode": "speech=",
    "token2wav_num_steps": "points in flow= of stream()",
    "token2wav_guidance_scale": "guidance in flow= of stream()",
    "token2wav_sway_coefficient": "sway in flow= of stream()",
}


def require_known(options: dict) -> tuple[dict, dict]:
    """Keyword arguments -> what is asked of the Thinker and of the Talker, checked. Raises
    UserError.
    """
    bare, thinker, talker = {}, {}, {}
    for name, value in options.items():
        place, key = bare, name
        for prefix, part in (("thinker_", thinker), ("talker_", talker)):
            if name.startswith(prefix):
                place, key = part, name.removeprefix(prefix)
        if key not in OPTIONS:
            raise unknown(name)
        if value is not None:
            place[key] = OPTIONS[key].check(value, name)
    return bare | thinker, talker  # the longer name wins, as in transformers


def unknown(name: str) -> UserError:
    """What to say of an option that does not exist."""
    if name in ELSEWHERE:
        return UserError(f"unknown option {name!r}; here it is {ELSEWHERE[name]}")
    prefix = next((prefix for prefix in ("thinker_", "talker_") if name.startswith(prefix)), "")
    near = get_close_matches(name.removeprefix(prefix), OPTIONS, n=1)
    meant = f", did you mean {prefix}{near[0]}?" if near else ";"
    return UserError(
        f"unknown option {shown(name)}{meant} the options are {', '.join(OPTIONS)}, for the Thinker, and "
        f"the same with talker_ in front for the Talker"
    )


def changed(stored: SamplingConfig, asked: dict) -> SamplingConfig:
    """The stored settings of one part with what is asked of it. Raises UserError where that
    contradicts itself.

    A temperature above 0 samples. do_sample=False takes the most likely token whatever the
    temperature; do_sample=True without a temperature samples at the stored one, or at 1.0 where
    that is 0.
    """
    changes = {name: value for name, value in asked.items() if name != "do_sample"}
    sampled = asked.get("do_sample")
    if sampled and asked.get("temperature") == 0:
        raise UserError(
            "do_sample=True and temperature 0 contradict each other; give a temperature above 0"
        )
    if sampled is False:
        changes["temperature"] = 0.0
    elif sampled and "temperature" not in asked and stored.temperature == 0:
        changes["temperature"] = 1.0
    settings = replace(stored, **changes)
    narrowed = asked.get("top_k", 0) > 0 or asked.get("top_p", 1) < 1
    if narrowed and settings.temperature == 0 and sampled is None and "temperature" not in asked:
        raise UserError(
            "top_p and top_k change nothing at this model's temperature of 0, which takes the most likely "
            "token; give a temperature above 0 too"
        )
    return settings


def sampling_configs(config, options: dict) -> tuple[SamplingConfig, SamplingConfig]:
    """An OmniConfig and keyword arguments -> the settings of Thinker and Talker for one answer.
    Raises UserError.
    """
    thinker, talker = require_known(options)
    return changed(config.thinker_sampling, thinker), changed(config.talker_sampling, talker)
