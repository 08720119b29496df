"""Thinker and Talker: batches equal single rows, teacher forcing equals generation."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from minomni.config import IGNORE_INDEX, TINY
from minomni.errors import UserError
from minomni.inputs.prompt import Inputs
from minomni.talker.talker import (
    Talker,
    TalkerInputs,
    reply_embeds,
    talker_inputs,
    text_at,
)
from minomni.thinker.thinker import Thinker

TOKENS = TINY.thinker.tokens
ROWS = TINY.token2wav.dit.num_embeds + 1
GREEDY = dataclasses.replace(
    TINY.talker_sampling, temperature=0.0, repetition_penalty=1.05, max_new_tokens=12
)
VOICE = 492  # any unused token id
CLOSE = dict(rtol=0, atol=3e-5)  # logits of scale 1 after four layers, padded sums in another order


def prompts(*lengths):
    """Text prompts of random ids, left-padded to one batch."""
    ids, masks = [], []
    for n in lengths:
        row = torch.randint(10, 400, (n,), generator=torch.Generator().manual_seed(n))
        padding = (max(lengths) - n, 0)
        ids.append(F.pad(row, padding, value=TOKENS.endoftext))
        masks.append(F.pad(torch.ones_like(row), padding))
    return text_only(torch.stack(ids), torch.stack(masks))


def text_only(ids, mask):
    return Inputs(ids, mask, [], None, [], None, [], [])


@pytest.fixture(scope="module")
def thinker():
    torch.manual_seed(3)
    return Thinker(TINY.thinker).eval()


@pytest.fixture(scope="module")
def talker():
    torch.manual_seed(4)
    return Talker(TINY.talker).eval()


def stopping_at(thinker, stop):
    """The same weights with another stop id."""
    tokens = dataclasses.replace(TOKENS, im_end=stop)
    other = Thinker(dataclasses.replace(TINY.thinker, tokens=tokens))
    other.load_state_dict(thinker.state_dict())
    return other.eval()


def replies(thinker, inputs, tokens=6):
    sampling = dataclasses.replace(TINY.thinker_sampling, max_new_tokens=tokens)
    return thinker.generate(inputs, sampling)


def reply_inputs(thinker, inputs, tokens=6):
    reply = replies(thinker, inputs, tokens)
    return talker_inputs(reply, [VOICE] * len(reply.tokens), TOKENS, thinker.model.embed_tokens)


def test_thinker_batch_equals_single_rows(thinker):
    both = replies(thinker, prompts(5, 9))
    for row, length in enumerate((5, 9)):
        alone = replies(thinker, prompts(length))
        assert both.tokens[row] == alone.tokens[0]
        assert both.reply_states[row].shape == (5, TINY.thinker.text.hidden_size)
        torch.testing.assert_close(both.reply_states[row], alone.reply_states[0], **CLOSE)
        torch.testing.assert_close(
            both.prompt_hidden[row, 9 - length :], alone.prompt_hidden[0], **CLOSE
        )


def test_reply_states_are_what_a_full_pass_gives(thinker):
    inputs = prompts(7)
    reply = replies(thinker, inputs)
    ids = torch.cat((inputs.input_ids, torch.tensor([reply.tokens[0][:-1]])), dim=1)
    whole = thinker.prefill(text_only(ids, torch.ones_like(ids)))
    torch.testing.assert_close(
        (whole.hidden + whole.text_embeds)[0, 7:], reply.reply_states[0], **CLOSE
    )
    assert thinker.lm_head(whole.hidden[0, 6:]).argmax(-1).tolist() == reply.tokens[0]


def test_stop_id_ends_a_row_and_only_that_row(thinker):
    free = replies(thinker, prompts(5, 9)).tokens
    stop = next(i for i in free[0] if i not in free[1])
    reply = replies(stopping_at(thinker, stop), prompts(5, 9))
    assert reply.tokens == [free[0][: free[0].index(stop) + 1], free[1]]
    assert [len(row) for row in reply.reply_states] == [len(row) - 1 for row in reply.tokens]


def test_penalty_ignores_padding(thinker):
    sampling = dataclasses.replace(TINY.thinker_sampling, repetition_penalty=1.5, max_new_tokens=6)
    both = thinker.generate(prompts(5, 9), sampling).tokens
    assert both == [thinker.generate(prompts(n), sampling).tokens[0] for n in (5, 9)]


def test_prompt_longer_than_the_context_raises(thinker):
    with pytest.raises(UserError, match="2049 tokens and the context holds 2048"):
        replies(thinker, prompts(2049))
    assert len(replies(thinker, prompts(2046)).tokens[0]) == 2  # room for two


def test_media_and_placeholders_must_match(thinker):
    inputs = prompts(9)
    inputs.input_ids[0, 2:5] = TOKENS.audio
    with pytest.raises(UserError, match="3 places for audio"):
        thinker(dataclasses.replace(inputs, mels=[torch.randn(128, 16)]))
    embeds, text_embeds = thinker.embed(dataclasses.replace(inputs, mels=[torch.randn(128, 12)]))
    assert text_embeds[0, 2:5].abs().max() == 0
    assert embeds[0, 2:5].abs().max() > 0
    assert torch.equal(embeds[0, 5:], text_embeds[0, 5:])


def test_gradients_reach_every_part(thinker):
    inputs = prompts(20)
    inputs.input_ids[0, 2:5] = TOKENS.audio
    inputs.input_ids[0, 6:10] = TOKENS.image
    inputs = dataclasses.replace(
        inputs,
        mels=[torch.randn(128, 12)],
        image_patches=torch.randn(16, 1176),
        image_grids=[(1, 4, 4)],
    )
    thinker.zero_grad()
    thinker(inputs).logsumexp(-1).sum().backward()
    without_gradient = []
    for name, p in thinker.named_parameters():
        if p.grad is None or not p.grad.abs().max() > 0:
            without_gradient.append(name)
    assert without_gradient == ["audio_tower.audio_bos_eos_token.weight"]


def test_teacher_forced_logits_equal_generated_ones(thinker, talker):
    both = reply_inputs(thinker, prompts(5, 9))
    codes = talker.generate(both, GREEDY, ROWS)
    codes[1] = codes[1][:4]  # rows of unequal length
    embeds, position_ids, mask, targets = talker.teacher_forced(both, codes)
    logits = talker(embeds, position_ids, mask)
    for row, row_codes in enumerate(codes):
        only = slice(row, row + 1)
        one = TalkerInputs(
            both.prompt[only],
            both.position_ids[:, only],
            both.attention_mask[only],
            both.voice[only],
            both.reply_embeds[only],
        )
        first, state = talker.prefill(one)
        steps = [first]
        for i, code in enumerate(row_codes):
            steps.append(talker.step(code[None], text_at(one, i + 1), state))
        has_loss = targets[row] != IGNORE_INDEX
        torch.testing.assert_close(logits[row, has_loss], torch.cat(steps), **CLOSE)
        assert targets[row, has_loss].tolist() == [*row_codes.tolist(), TINY.talker.codec_eos]


def test_talker_batch_equals_single_rows(thinker, talker):
    both = talker.generate(reply_inputs(thinker, prompts(5, 9)), GREEDY, ROWS)
    assert len(both[0]) > 3
    for row, length in enumerate((5, 9)):
        alone = talker.generate(reply_inputs(thinker, prompts(length)), GREEDY, ROWS)
        assert both[row].tolist() == alone[0].tolist()


def test_a_reply_of_one_token_is_silent(thinker, talker):
    first = [row[0] for row in replies(thinker, prompts(5, 9)).tokens]
    mute = stopping_at(thinker, first[0])
    both = talker.generate(reply_inputs(mute, prompts(5, 9)), GREEDY, ROWS)
    assert len(both[0]) == 0
    assert len(both[1]) > 0
    assert talker.generate(reply_inputs(mute, prompts(5)), GREEDY, ROWS)[0].tolist() == []
    embeds, position_ids, mask, targets = talker.teacher_forced(
        reply_inputs(mute, prompts(5, 9)), both
    )
    assert (targets[0] == IGNORE_INDEX).all()
    assert talker(embeds, position_ids, mask).isfinite().all()


def test_only_codes_of_the_table_and_stop_ids_are_sampled(thinker, talker):
    inputs = reply_inputs(thinker, prompts(5))
    hot = dataclasses.replace(
        TINY.talker_sampling, temperature=50.0, top_k=0, top_p=1.0, max_new_tokens=300
    )
    generator = torch.Generator().manual_seed(0)
    sampled = torch.cat([*talker.steps(inputs, hot, 40, generator)])
    allowed = {*range(40), TINY.talker.codec_pad, TINY.talker.codec_eos}
    assert set(sampled.tolist()) <= allowed
    chosen_from = ~talker.suppressed_ids(40)
    assert set(chosen_from.nonzero()[:, 0].tolist()) == allowed


def test_reply_embeds_end_with_end_and_pad():
    states, end, pad = torch.ones(3, 2), torch.full((2,), 5.0), torch.full((2,), 7.0)
    assert reply_embeds(states, end, pad)[:, 0].tolist() == [1, 1, 1, 5, 7]
    assert reply_embeds(states[:0], end, pad).shape == (0, 2)
