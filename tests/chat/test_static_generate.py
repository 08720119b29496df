"""The static step chooses the ids and codes of the plain one, and a CUDA graph could record it: no
number is read back, none comes from the host, and every buffer stays where it is.
"""

from dataclasses import replace
from itertools import zip_longest
from unittest import mock

import oracle
import pytest
import torch
from operations import Operations
from test_parity import ours
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from minomni.chat.generate import generate_tokens
from minomni.chat.static_generate import ReplyEmbedsBuffer, StaticGenerator
from minomni.config import SamplingConfig
from minomni.errors import UserError
from minomni.static_decode import StaticCache, cache_capacity, decoder_step
from minomni.token2wav.token2wav import Token2Wav

GREEDY = oracle.CONFIG.thinker_sampling
SAMPLED = SamplingConfig(
    temperature=0.9, top_k=40, top_p=0.8, repetition_penalty=1.05, max_new_tokens=12
)


@pytest.fixture(scope="module")
def omni():
    return ours(oracle.CONFIG)


def voices(omni, rows: int) -> list[int]:
    return [omni.voice("Chelsie").bos_token, omni.voice("Ethan").bos_token][:rows]


def answer(omni, case: str, seed, sampling, speech: bool = True, events: int | None = None):
    """The first events of an answer: pairs of a kind and ids."""
    prompt = oracle.inputs(case)
    prefill = omni.thinker.prefill(prompt, omni.thinker.model.new_cache())
    bos_tokens = voices(omni, len(prompt.input_ids)) if speech else None
    steps = generate_tokens(omni, prefill, bos_tokens, seed, sampling)
    result = []
    with torch.no_grad():
        for kind, ids in steps:
            result.append((kind, ids.tolist()))
            if len(result) == events:
                break
        steps.close()
    return result


def both(omni, *arguments, **options):
    """The same answer by plain and by static steps."""
    plain = answer(omni, *arguments, **options)
    omni.use_static_steps()
    try:
        return plain, answer(omni, *arguments, **options)
    finally:
        omni.use_static_steps(False)


# ----------------------------------------------------------------------------------------------
# equal to the plain step, and to the official code
@pytest.mark.parametrize("case", oracle.CASES)
def test_agrees_with_golden_files(case):
    """Ids and codes are those of the official code: single rows, a padded batch, early stops."""
    free = oracle.golden(oracle.EARLY_STOPS.get(case, case))
    model = ours(oracle.stopping(case, free))
    model.use_static_steps()
    expected = oracle.golden(case)
    prompt = oracle.inputs(case)
    with mock.patch.object(Token2Wav, "forward", return_value=torch.zeros(1)):
        spoken = model.generate(prompt, "Chelsie", seed=0)
    for row, (tokens, codes) in enumerate(zip(spoken.tokens, spoken.codes, strict=True)):
        assert tokens == expected["tokens"][row, : len(tokens)].tolist()
        assert codes.tolist() == expected[f"codes_{row}"].tolist()


@pytest.mark.parametrize("case", ["text", "batch"])
@pytest.mark.parametrize("speech", [True, False])
def test_sampled_answers_are_equal(omni, case, speech):
    rows = len(oracle.inputs(case).input_ids)
    sampling = (SAMPLED, replace(SAMPLED, max_new_tokens=20))
    for seed in (3, list(range(rows))):
        plain, static = both(omni, case, seed, sampling, speech=speech)
        assert static == plain
        assert len(plain) == (32 if speech else 12)


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_short_answers_are_equal(omni, limit):
    """The Talker gets the end of the text at the same step."""
    sampling = (replace(GREEDY, max_new_tokens=limit), replace(GREEDY, max_new_tokens=10))
    plain, static = both(omni, "batch", 0, sampling)
    assert static == plain


@pytest.mark.parametrize("events", [1, 2, 5, 14])
def test_stopping_early_gives_the_same_events(omni, events):
    """As a user's interruption does; the next answer does not depend on it."""
    sampling = (GREEDY, replace(GREEDY, max_new_tokens=10))
    plain, static = both(omni, "text", 0, sampling, events=events)
    assert static == plain
    omni.use_static_steps()
    answer(omni, "text", 0, sampling, events=events)
    again = answer(omni, "text", 0, sampling)
    omni.use_static_steps(False)
    assert again == answer(omni, "text", 0, sampling)


def test_steps_are_reused_from_answer_to_answer(omni):
    generator = StaticGenerator(omni)
    omni.static_generator = generator
    sampling = (replace(GREEDY, max_new_tokens=3), replace(GREEDY, max_new_tokens=3))
    answer(omni, "text", 0, sampling)
    [workspace] = generator.free
    steps = dict(workspace.steps)
    pointers = [buffer.data_ptr() for step in steps.values() for buffer in step.state()]
    answer(omni, "mixed", 0, sampling)
    omni.use_static_steps(False)
    assert generator.free == [workspace]
    assert workspace.steps == steps
    assert len(steps) == 2
    after = [buffer.data_ptr() for step in steps.values() for buffer in step.state()]
    assert after == pointers


def test_few_steps_are_cached(omni):
    """Another limit takes the same step, another temperature a new one, instead of an old one."""
    omni.use_static_steps()
    for tokens, temperature in ((3, 0.5), (4, 0.5), (3, 0.6), (3, 0.7), (3, 0.5)):
        sampling = replace(SAMPLED, max_new_tokens=tokens, temperature=temperature)
        found = answer(omni, "text", 0, (sampling, sampling))
    [workspace] = omni.static_generator.free
    assert len(workspace.steps) == 4
    omni.use_static_steps(False)
    assert found == answer(omni, "text", 0, (sampling, sampling))


def test_answers_in_turns_do_not_disturb_each_other(omni):
    """Two answers advance event by event, as a server's conversations do."""
    sampling = (SAMPLED, replace(SAMPLED, max_new_tokens=15))
    expected = [answer(omni, case, 0, sampling) for case in ("text", "mixed")]
    omni.use_static_steps()
    found: list[list] = [[], []]
    streams = []
    for case in ("text", "mixed"):
        prefill = omni.thinker.prefill(oracle.inputs(case), omni.thinker.model.new_cache())
        streams.append(generate_tokens(omni, prefill, voices(omni, 1), 0, sampling))
    for events in zip_longest(*streams):
        for events_found, event in zip(found, events, strict=True):
            if event is not None:
                events_found.append((event[0], event[1].tolist()))
    assert len(omni.static_generator.free) == 2
    omni.use_static_steps(False)
    assert found == expected


def test_decoder_step_gives_the_states_of_the_decoder(omni):
    """Twenty tokens of two rows, of which one has padding on its left."""
    torch.manual_seed(0)
    decoder = omni.thinker.model
    config = decoder.config
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    cache = decoder.new_cache()
    static = StaticCache(config, 2, 64, torch.device("cpu"), torch.float32)
    position_ids = (mask.cumsum(1) - 1).clamp(min=0).expand(3, -1, -1)
    with torch.no_grad():
        decoder(torch.randn(2, 7, config.hidden_size), position_ids, mask, cache)
        static.fill(cache, mask)
        position = mask.sum(1)
        for _ in range(20):
            x = torch.randn(2, config.hidden_size)
            mask = torch.cat((mask, torch.ones(2, 1, dtype=torch.long)), 1)
            expected = decoder(x[:, None], position.expand(3, -1)[..., None], mask, cache)[:, 0]
            found = decoder_step(decoder, x, position, static)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
            position = position + 1
    assert static.lengths.tolist() == [24, 27]


def test_capacities_are_powers_of_two():
    assert [cache_capacity(n) for n in (1, 1024, 1025, 30_000)] == [1024, 1024, 2048, 32_768]


def test_reply_embeds_by_hand():
    """Row 0 ends after two tokens, row 1 has no text, row 2 goes on."""
    end, pad = torch.tensor([-1.0]), torch.tensor([-2.0])
    buffer = ReplyEmbedsBuffer(3, 8, end, pad)
    state = torch.tensor([[1.0], [10.0], [100.0]])
    for is_last in ([False, True, False], [False, False, False], [True, False, False]):
        buffer.add(state, torch.tensor(is_last))
        state = state + 1
    buffer.add(state, torch.tensor([False, False, False]))
    assert buffer.count.tolist() == [4, 0, 4]
    assert buffer.embeds[0, :4, 0].tolist() == [1, 2, -1, -2]
    assert buffer.embeds[2, :4, 0].tolist() == [100, 101, 102, 103]
    assert buffer.at(torch.tensor([9]))[[0, 2], 0].tolist() == [-2, 103]


def test_broken_weights_are_reported_at_the_first_step():
    model = ours(oracle.CONFIG)
    with torch.no_grad():
        model.thinker.lm_head.weight[0] = float("nan")
    model.use_static_steps()
    with pytest.raises(UserError, match="NaN or infinite"):
        answer(model, "text", 0, (GREEDY, GREEDY))


# ----------------------------------------------------------------------------------------------
# a CUDA graph could record it
def begun(omni, part: str, sampling=SAMPLED):
    """A Thinker's or Talker's step with two rows in the middle of an answer."""
    omni.use_static_steps()
    generator = omni.static_generator
    answer(omni, "batch", 0, (sampling, sampling), events=7)
    omni.use_static_steps(False)
    [workspace] = generator.free
    [step] = [step for step in workspace.steps.values() if type(step).__name__ == f"{part}Step"]
    return step


def test_the_check_finds_what_it_is_for():
    x = torch.arange(3.0)
    with Operations() as operations:
        bool(x.all())
        x[x > 1]
        torch.tensor([1.0, 2.0])
    assert "aten._local_scalar_dense.default" in operations.waits
    assert "aten.lift_fresh.default" in operations.waits
    assert len(operations.waits) >= 3


@pytest.mark.parametrize("part", ["Thinker", "Talker"])
@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED])
@torch.no_grad()
def test_a_step_never_waits_for_the_device(omni, part, sampling):
    step = begun(omni, part, sampling)
    runs = []
    for _ in range(2):
        with Operations() as operations:
            step.step()
        assert operations.waits == []
        runs.append(operations.names)
    assert runs[0] == runs[1]  # as many launches at every length


@pytest.mark.parametrize("part", ["Thinker", "Talker"])
@torch.no_grad()
def test_a_step_runs_without_data(omni, part):
    """Under fake tensors whatever depends on a value raises."""
    step = begun(omni, part)
    with FakeTensorMode(allow_non_fake_inputs=True):
        step.step()


@pytest.mark.parametrize("part", ["Thinker", "Talker"])
@torch.no_grad()
def test_a_recorded_step_can_be_replayed(omni, part):
    """A number of the host would be fixed in the record; then the replayed steps would differ."""
    step, other = begun(omni, part), begun(omni, part)
    record = make_fx(lambda: step.step())()  # not the method itself, which has an argument
    for buffer, value in zip(step.state(), other.state(), strict=True):
        buffer.copy_(value)
    for _ in range(19):
        record()
        other.step()
        assert torch.equal(step.ids, other.ids)
        torch.testing.assert_close(step.logits, other.logits, rtol=0, atol=1e-5)
    assert step.count.tolist() == other.count.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("part", ["Thinker", "Talker"])
@torch.no_grad()
def test_a_step_compiles_once(omni, part):
    step = begun(omni, part)
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(step.step, backend=counter, fullgraph=True, dynamic=False)
    compiled()
    with torch.compiler.set_stance("fail_on_recompile"):
        for _ in range(19):
            compiled()
    assert counter.frame_count == 1
