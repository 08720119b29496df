"""Sampling: equal to transformers, independent rows, checked options."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from minomni.chat.generation_options import (
    OPTIONS,
    RENAMED_OPTIONS,
    apply_options,
    sampling_configs,
)
from minomni.config import QWEN7B, TINY, SamplingConfig
from minomni.errors import UserError
from minomni.sampling import process_logits, sample

SETTINGS = [
    dict(temperature=1.3, top_k=0, top_p=1.0, repetition_penalty=1.0),
    dict(temperature=0.9, top_k=40, top_p=0.8, repetition_penalty=1.05),
    dict(temperature=0.3, top_k=5, top_p=0.99, repetition_penalty=1.7),
    dict(temperature=2.5, top_k=0, top_p=0.05, repetition_penalty=0.6),
    dict(temperature=1.0, top_k=1, top_p=0.5, repetition_penalty=1.2),
    dict(temperature=0.7, top_k=5000, top_p=0.6, repetition_penalty=1.0),
]


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


# ----------------------------------------------------------------------------------------------
# Equal to transformers
def expected_scores(logits, ids, settings, suppress):
    """Scores after transformers' own processors, in the order of its generate()."""
    process = pytest.importorskip(
        "transformers.generation.logits_process", reason="transformers is not installed"
    )
    scores = process.RepetitionPenaltyLogitsProcessor(settings["repetition_penalty"])(ids, logits)
    scores = process.SuppressTokensLogitsProcessor(suppress)(ids, scores)
    scores = process.TemperatureLogitsWarper(settings["temperature"])(ids, scores)
    if settings["top_k"]:
        scores = process.TopKLogitsWarper(settings["top_k"])(ids, scores)
    return process.TopPLogitsWarper(settings["top_p"])(ids, scores)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("number", range(len(SETTINGS)))
def test_scores_and_draws_equal_those_of_transformers(number, kind):
    """bfloat16 logits have many ties, also at the border of what top-k and top-p keep."""
    settings, suppress = SETTINGS[number], [3, 700, 41]
    generator = torch.Generator().manual_seed(number)
    logits = (4 * torch.randn(6, 900, generator=generator)).to(kind).float()
    ids = torch.randint(0, 900, (6, 50), generator=generator)
    history = torch.zeros(6, 900, dtype=torch.bool).scatter(1, ids, True)
    scores = expected_scores(logits, ids, settings, suppress)

    config = SamplingConfig(**settings, max_new_tokens=1)
    suppressed = torch.zeros(900, dtype=torch.bool)
    suppressed[suppress] = True
    assert torch.equal(process_logits(logits, history, config, suppressed), scores)
    for seed in range(20):
        drawn = sample(logits, history, config, suppressed, generators(seed)[0])
        assert torch.equal(
            drawn, torch.multinomial(scores.softmax(-1), 1, generator=generators(seed)[0])[:, 0]
        )


# ----------------------------------------------------------------------------------------------
# Independent rows
def test_a_row_with_its_own_generator_does_not_depend_on_its_batch():
    logits = torch.randn(5, 60)
    config = dataclasses.replace(TINY.talker_sampling, temperature=1.5, top_k=0, top_p=1.0)
    for seeds in ((1, 2, 3, 4, 5), (9, 9, 9, 9, 9)):
        batch = generators(*seeds)
        alone = generators(*seeds)
        for _ in range(8):
            together = sample(logits, None, config, generator=batch)
            one_by_one = [
                int(sample(row[None], None, config, generator=own))
                for row, own in zip(logits, alone, strict=True)
            ]
            assert together.tolist() == one_by_one


# ----------------------------------------------------------------------------------------------
# Broken weights
@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize(
    ("bad", "says"),
    [(math.nan, "NaN or infinite"), (math.inf, "NaN or infinite"), (-math.inf, "NaN or infinite")],
)
def test_logits_that_are_not_finite_get_one_line(temperature, bad, says):
    logits = torch.randn(3, 40)
    logits[1, 7] = bad
    config = dataclasses.replace(TINY.talker_sampling, temperature=temperature)
    with pytest.raises(UserError, match=says):
        sample(logits, None, config)
    with pytest.raises(UserError, match="only one number"):
        sample(torch.full((2, 40), 0.25), None, config)


# ----------------------------------------------------------------------------------------------
# Options
def test_options_change_what_they_name_and_nothing_else():
    asked = dict(max_new_tokens=7, thinker_temperature=0.4, talker_top_k=11, talker_top_p=None)
    thinker, talker = sampling_configs(QWEN7B, asked)
    assert thinker == dataclasses.replace(
        QWEN7B.thinker_sampling, max_new_tokens=7, temperature=0.4
    )
    assert talker == dataclasses.replace(QWEN7B.talker_sampling, top_k=11)
    assert sampling_configs(QWEN7B, {}) == (QWEN7B.thinker_sampling, QWEN7B.talker_sampling)


def test_the_longer_name_wins_as_in_transformers():
    thinker, _ = sampling_configs(TINY, dict(thinker_max_new_tokens=5, max_new_tokens=9))
    assert thinker.max_new_tokens == 5


@pytest.mark.parametrize(
    ("stored", "asked", "temperature"),
    [
        (0.0, dict(do_sample=True), 1.0),
        (0.5, dict(do_sample=True), 0.5),
        (0.5, dict(do_sample=False), 0.0),
        (0.5, dict(do_sample=False, temperature=0.7), 0.0),
        (0.0, dict(do_sample=True, temperature=0.2), 0.2),
        (0.0, dict(temperature=0.2), 0.2),
        (0.0, dict(do_sample=False, top_p=0.5), 0.0),
        (0.0, dict(temperature=0, top_k=5), 0.0),
        (0.0, dict(top_k=-1, top_p=1), 0.0),
    ],
)
def test_sampling_or_the_most_likely_token(stored, asked, temperature):
    model = dataclasses.replace(TINY.thinker_sampling, temperature=stored)
    options = {name: OPTIONS[name].check(value, name) for name, value in asked.items()}
    assert apply_options(model, options).temperature == temperature


def test_numbers_of_numpy_are_numbers():
    thinker, _ = sampling_configs(
        TINY, dict(max_new_tokens=np.int64(3), temperature=np.float32(0.5), top_k=-1)
    )
    assert (thinker.max_new_tokens, thinker.temperature, thinker.top_k) == (3, 0.5, 0)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(max_new_tokens=0), "max_new_tokens is 0; expected a whole number from 1"),
        (dict(max_new_tokens=3.0), "max_new_tokens is 3.0"),
        (dict(max_new_tokens=True), "max_new_tokens is True"),
        (dict(thinker_max_new_tokens="50"), "max_new_tokens is '50'"),
        (dict(talker_max_new_tokens=10**5000), "very large"),
        (dict(temperature=-0.1), "temperature is -0.1"),
        (dict(temperature=math.nan), "temperature is nan"),
        (dict(talker_temperature=math.inf), "temperature is inf"),
        (dict(temperature=1e-30), "0.001"),
        (dict(temperature=[1]), "temperature is a list"),
        (dict(talker_top_p=1.01), "top_p is 1.01"),
        (dict(talker_top_p=0), "above 0"),
        (dict(talker_top_k=-2), "top_k is -2"),
        (dict(talker_top_k=2.5), "top_k is 2.5"),
        (dict(repetition_penalty=0), "repetition_penalty is 0"),
        (dict(talker_do_sample=1), "do_sample is 1"),
        (dict(temperature="x" * 5000), "xxx..."),
        (dict(top_p=0.5), "give a temperature above 0"),
        (dict(thinker_do_sample=True, temperature=0), "contradict"),
        (dict(max_tokens=5), "did you mean max_new_tokens"),
        (dict(talker_speed=2), "'talker_speed'; the options are max_new_tokens, temperature"),
        (dict(num_beams=2), "prefix talker_"),
        *[({name: 1}, f"here it is {word}") for name, word in RENAMED_OPTIONS.items()],
    ],
)
def test_bad_options_get_one_line(options, says):
    with pytest.raises(UserError, match=says) as caught:
        sampling_configs(TINY, options)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) <= 500
