"""respond(), stream() and generate(): several conversations at once, options for one call, silence,
wrong arguments.
"""

import copy
import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import minomni
from minomni.chat.reply import ReplyDone
from minomni.errors import UserError

ROOT = Path(__file__).parents[1]

DATA = ROOT / "data_samples"


@pytest.fixture(scope="module")
def omni():
    """The shipped model: short speech, few steps of the flow."""
    torch.set_num_threads(1)
    omni = minomni.load(str(DATA / "tiny"), dtype=torch.float32)
    omni.config = dataclasses.replace(
        omni.config,
        flow=dataclasses.replace(omni.config.flow, solver="euler", points=3),
        talker_sampling=dataclasses.replace(omni.config.talker_sampling, max_new_tokens=14),
    )
    return omni


@pytest.fixture(scope="module")
def random_weights(tiny_folder):
    torch.set_num_threads(1)
    return minomni.load(str(tiny_folder))


def user(*content):
    return {"role": "user", "content": list(content)}


CONVERSATIONS = [
    [user({"text": "say the red circle is above the blue square"})],
    [user({"audio": str(DATA / "wish.wav")})],
    [
        user({"text": "say yes"}),
        {"role": "assistant", "content": "yes"},
        user({"text": "say four"}),
    ],
    [
        {"role": "system", "content": "You are a helpful assistant."},
        user({"image": str(DATA / "scene.png")}, {"text": "which shape is red"}),
    ],
]


# ---------------------------------------------------------------------------- several conversations
@pytest.mark.parametrize(
    "options", [{}, dict(temperature=1.1, talker_temperature=1.2, talker_top_k=0)], ids=str
)
def test_a_batch_gets_the_replies_that_each_gets_alone(omni, options):
    voices, seeds = ["Anna", "Karl", "Adam", "Anna"], [3, 3, 11, 0]
    together = omni.respond(CONVERSATIONS, voice=voices, seed=seeds, **options)
    assert len(together) == 4
    assert len({reply.text for reply in together}) > 2
    for reply, conversation, voice, seed in zip(
        together, CONVERSATIONS, voices, seeds, strict=True
    ):
        alone = omni.respond(conversation, voice=voice, seed=seed, **options)
        assert reply.text == alone.text
        assert reply.codes.tolist() == alone.codes.tolist()
        assert len(reply.codes)
        torch.testing.assert_close(reply.wave, alone.wave, rtol=0, atol=1e-5)
        assert reply.sample_rate == alone.sample_rate
        assert reply.total_s > 0


def test_one_question_with_several_seeds_gets_several_answers(omni):
    replies = omni.respond([CONVERSATIONS[0]] * 3, seed=[1, 2, 1], speech=False, temperature=2.0)
    assert replies[0].text == replies[2].text != replies[1].text
    assert not any(len(reply.wave) for reply in replies)
    one = omni.respond(tuple(map(tuple, CONVERSATIONS[:1])), speech=False)
    assert one.text == [omni.respond(CONVERSATIONS[0], speech=False).text] == [one[0].text]
    assert one[0].text in one._repr_html_()


def test_a_long_prompt_takes_no_context_from_a_short_one(random_weights):
    """Padded to 2,030 tokens, the short prompt would have 18 of 2,048 left for its answer."""
    long, short = [user({"text": "a" * 1980})], [user({"text": "say a"})]
    options = dict(speech=False, max_new_tokens=30, temperature=1.0)
    both = random_weights.respond([long, short], **options)
    assert [reply.text for reply in both] == [
        random_weights.respond(one, **options).text for one in (long, short)
    ]


def test_rows_of_generate_are_independent(omni):
    both = omni.generate(
        omni_inputs(omni, CONVERSATIONS[:2]), "Karl", seed=5, talker_temperature=1.2
    )
    for row in range(2):
        alone = omni.generate(
            omni_inputs(omni, [CONVERSATIONS[row]]), "Karl", seed=5, talker_temperature=1.2
        )
        assert both.tokens[row] == alone.tokens[0]
        assert both.codes[row].tolist() == alone.codes[0].tolist()


def omni_inputs(omni, rows):
    from minomni.inputs.prompt import Processor

    return Processor(omni.config, omni.tokenizer)(list(rows))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            dict(messages=[CONVERSATIONS[0], {"role": "user", "content": "a"}]),
            "some of the messages are lists",
        ),
        (dict(messages=[CONVERSATIONS[0], []]), "conversation 2 of 2: no messages"),
        (
            dict(messages=[CONVERSATIONS[0], [user({"audio": "nowhere.wav"})]]),
            "conversation 2 of 2: nowhere.wav",
        ),
        (
            dict(messages=[CONVERSATIONS[0]] * 2, voice=["Anna"]),
            "voice has 1 entries for 2 conversations",
        ),
        (dict(messages=[CONVERSATIONS[0]] * 2, seed=[1, 2, 3]), "seed has 3 entries"),
        (
            dict(messages=[CONVERSATIONS[0]] * 2, voice=["Anna", "Zoe"]),
            "conversation 2 of 2: unknown voice 'Zoe'",
        ),
        (dict(messages=[CONVERSATIONS[0]] * 2, seed=[1, 2**63]), "seed is"),
    ],
)
def test_bad_batches_raise(omni, arguments, says):
    with pytest.raises(UserError, match=says):
        omni.respond(**arguments)


def test_a_stream_is_one_conversation(omni):
    with pytest.raises(UserError, match="stream\\(\\) answers one conversation"):
        omni.stream(CONVERSATIONS)


# ------------------------------------------------------------------------------------------ options
def test_options_limit_and_choose(omni):
    question = CONVERSATIONS[0]
    for most in (1, 2, 5):
        limits = dict(thinker_max_new_tokens=most, talker_max_new_tokens=most)
        ids = omni.generate(omni_inputs(omni, [question]), "Anna", **limits)
        assert len(ids.tokens[0]) == most
        assert len(ids.codes[0]) == (0 if most == 1 else most)
    cold = [
        omni.respond(question, talker_do_sample=False, seed=seed, max_new_tokens=4).codes.tolist()
        for seed in (1, 2)
    ]
    hot = [
        omni.respond(
            question,
            talker_temperature=1.5,
            talker_top_k=0,
            talker_top_p=1.0,
            seed=seed,
            max_new_tokens=4,
        ).codes.tolist()
        for seed in (1, 2)
    ]
    assert cold[0] == cold[1]
    assert hot[0] != hot[1]
    *_, end = omni.stream(question, seed=1, talker_do_sample=False, max_new_tokens=4)
    assert isinstance(end, ReplyDone)
    assert end.reply.codes.tolist() == cold[0]


# ------------------------------------------------------------------------------------------ silence
QUIET = 0.0005 * torch.sin(torch.arange(24_000) / 7)


@pytest.mark.parametrize(
    "content",
    [
        [{"audio": torch.zeros(20_000)}],
        [{"audio": QUIET}],
        [{"audio": torch.zeros(9_000)}, {"audio": QUIET}],
        [{"audio": QUIET}, {"text": " \n"}],
    ],
    ids=["zeros", "quiet", "two", "blank text"],
)
@pytest.mark.reads("audio", "silence as the whole question", "refused")
def test_silence_alone_is_refused_as_in_listen(omni, content):
    for earlier in ([], CONVERSATIONS[2][:2]):
        for ask in (omni.respond, omni.stream):
            with pytest.raises(UserError, match="the audio holds only silence"):
                ask([*earlier, user(*content)])
    with pytest.raises(UserError, match="conversation 2 of 2: the audio holds only silence"):
        omni.respond([CONVERSATIONS[0], [user(*content)]])
    session = omni.listen()
    session.add_audio(QUIET)
    with pytest.raises(UserError, match="the audio holds only silence"):
        session.respond(" ")


def test_silence_with_other_input_is_accepted(omni):
    loud = torch.cat([torch.zeros(8_000), 0.002 * torch.ones(8_000)])
    for content in (
        [{"audio": QUIET}, {"text": "say yes"}],
        [{"image": str(DATA / "scene.png")}, {"audio": QUIET}],
        [{"audio": QUIET}, {"audio": loud}],
    ):
        assert omni.respond([user(*content)], speech=False).text.strip()
    answered = [
        user({"audio": QUIET}),
        {"role": "assistant", "content": "yes"},
        user({"text": "say four"}),
    ]
    assert omni.respond(answered, speech=False).text


# ---------------------------------------------------------------------------------- wrong arguments
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (dict(messages="hello"), "messages is 'hello'; expected a list of dictionaries"),
        (dict(messages=7), "messages is 7"),
        (dict(messages={"role": "user"}), "messages is a dict"),
        (dict(messages=None), "messages is None"),
        (dict(messages=["hi", "there"]), "message 1 is 'hi'"),
        (dict(messages=[user(), 3]), "message 2 is 3"),
        (dict(messages=np.zeros(3)), "messages is a ndarray"),
        (dict(voice=["Anna"]), "voice is a list"),
        (dict(voice=3), "voice is 3"),
        (dict(voice=""), "unknown voice ''"),
        (dict(voice="zoe", speech=False), "unknown voice 'zoe'"),
        (dict(seed=2**64), "seed is 18446744073709551616"),
        (dict(seed=0.5), "seed is 0.5"),
        (dict(seed=-1), "seed is -1"),
        (dict(seed="x"), "seed is 'x'"),
        (dict(seed=[1]), "seed is a list"),
        (dict(seed=True), "seed is True"),
        (dict(speech="no"), "speech is 'no'"),
        (dict(use_audio_in_video=2), "use_audio_in_video is 2"),
        (dict(max_words=3), "unknown option 'max_words'"),
        (dict(speaker="Anna"), "here it is voice="),
    ],
)
def test_wrong_arguments_raise(omni, arguments, says):
    for ask in (omni.respond, omni.stream):
        with pytest.raises(UserError, match=says):
            ask(**{"messages": CONVERSATIONS[0], **arguments})


def test_a_seed_of_none_is_the_default(omni):
    one, other = (
        omni.respond(CONVERSATIONS[2], seed=seed).codes.tolist() for seed in (None, np.int64(0))
    )
    assert one == other


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (dict(schedule=5), "schedule 5"),
        (dict(schedule=[(1, 0)]), "schedule a list"),
        (dict(flow="x"), "flow is 'x'"),
        (dict(flow={"points": 3}), "flow is a dict"),
    ],
)
def test_wrong_schedules_and_flows_are_refused_before_the_first_piece(omni, arguments, says):
    with pytest.raises(UserError, match=says):
        omni.stream(CONVERSATIONS[0], **arguments)


@pytest.mark.parametrize(
    "changes",
    [
        dict(points=0),
        dict(points=-3),
        dict(points=10**9),
        dict(points=2.5),
        dict(points=None),
        dict(solver="heun"),
        dict(solver=None),
        dict(guidance=math.nan),
        dict(sway=9.0),
    ],
    ids=str,
)
def test_wrong_flows_raise(omni, changes):
    with pytest.raises(
        ValueError, match=f"{next(iter(changes))} is"
    ) as caught:  # by the flow itself, or by stream()
        omni.stream(CONVERSATIONS[0], flow=dataclasses.replace(omni.config.flow, **changes))
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("chunks", "more"),
    [
        (5, {}),
        ("ab", {}),
        (((1,),), {}),
        ((1, 0), {}),
        (((1.0, 0),), {}),
        (((1, None),), {}),
        (((10**12, 0),), {}),
        (((1, 0),), dict(back="all")),
        (((1, 0),), dict(first_block_codes=0.5)),
        (((1, 0),), dict(first_block_codes=True)),
    ],
    ids=str,
)
def test_wrong_schedules_raise(chunks, more):
    from minomni.token2wav.streaming import Schedule

    with pytest.raises(UserError, match="a schedule of chunks"):
        Schedule(chunks, **more)


# ------------------------------------------------------------------------------------ broken voices
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(bos_token=151_872), "bos_token of voice 'Zoe' is 151872"),
        (dict(bos_token=-1), "bos_token of voice"),
        (dict(bos_token="five"), "bos_token of voice 'Zoe' is 'five'"),
        (dict(cond=torch.zeros(1, 7)), r"has cond \[1, 7\]"),
        (dict(ref_mel=torch.full((1, 50, 80), math.nan)), "NaN"),
    ],
)
def test_a_wrong_voice_raises_before_the_first_chunk(omni, monkeypatch, change, says):
    monkeypatch.setitem(
        omni.voices, "Zoe", dataclasses.replace(omni.voices["Anna"], name="Zoe", **change)
    )
    with pytest.raises(UserError, match=says):
        omni.stream(CONVERSATIONS[0], voice="Zoe")
    monkeypatch.setitem(omni.voices, "Zoe", "Anna")
    with pytest.raises(UserError, match="expected a Voice"):
        omni.respond(CONVERSATIONS[0], voice="Zoe")


def test_make_voice_checks_its_name_and_token(omni):
    speech = 0.3 * torch.randn(32_000)
    for arguments, says in (
        (("",), "the name of a voice is ''"),
        ((3,), "the name of a voice is 3"),
        (("Zoe", 10**6), "bos_token is 1000000"),
        (("Zoe", 1.5), "bos_token is 1.5"),
    ):
        with pytest.raises(UserError, match=says):
            minomni.make_voice((speech.numpy(), 16_000), arguments[0], omni, *arguments[1:])


# ----------------------------------------------------------------------------------- broken weights
@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0])
@pytest.mark.parametrize("part", ["thinker.lm_head", "thinker.model.norm", "talker.codec_head"])
def test_damaged_weights_raise(random_weights, part, value):
    broken = copy.deepcopy(random_weights)
    broken.get_submodule(part).weight.data.fill_(value)
    for ask in (
        lambda: broken.respond(CONVERSATIONS[0]),
        lambda: list(broken.stream(CONVERSATIONS[0])),
        lambda: broken.respond(CONVERSATIONS[:1] * 2),
    ):
        with pytest.raises(UserError, match="the model's weights give") as caught:
            ask()
        assert "\n" not in str(caught.value)


def test_damaged_vocoder_raises(random_weights):
    broken = copy.deepcopy(random_weights)
    next(broken.token2wav.code2wav_bigvgan_model.parameters()).data.fill_(math.nan)
    for ask in (
        broken.respond,
        lambda messages: list(broken.stream(messages)),
        lambda one: broken.respond([one, one]),
    ):
        with pytest.raises(UserError, match="weights of token2wav give NaN"):
            ask(CONVERSATIONS[0])


# ---------------------------------------------------------------------------------- a Thinker alone
def test_a_model_without_a_talker_answers_in_text(random_weights):
    text_only = copy.deepcopy(random_weights)
    text_only.talker = text_only.token2wav = None
    whole = random_weights.respond(CONVERSATIONS[0], speech=False)
    reply = text_only.respond(CONVERSATIONS[0], speech=False)
    assert reply.text == whole.text
    assert reply.seconds == 0
    *_, end = text_only.stream(CONVERSATIONS[0], speech=False)
    assert end.reply.text == whole.text
    for ask in (text_only.respond, text_only.stream, lambda _: text_only.listen()):
        with pytest.raises(UserError, match="this model has no voice"):
            ask(CONVERSATIONS[0])
