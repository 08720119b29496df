"""Training stages: each learns, trains its own parameters only, and draws its data as planned."""

from dataclasses import replace
from random import Random

import pytest
import torch
from training import CACHE, recordings_only, stage_of, stages  # noqa: F401  (a fixture)

from minomni import load
from minomni.config import IGNORE_INDEX, SMALL, TINY
from minomni.data import corpus
from minomni.data.examples import ExampleBuilder
from minomni.data.vocabulary import world_tokenizer
from minomni.omni import Omni
from minomni.train import loop, muon, pipeline, recipes, stage_table
from minomni.train.loop import Recipe, forward_backward, train
from minomni.train.muon import orthogonal
from minomni.train.stages import speech
from minomni.train.stages.dpo import DPOStage
from minomni.train.stages.speech import code_loss
from minomni.train.stages.thinker import MAX_LATER_TURNS, LanguageStage

# Steps and share of the first loss that a stage must fall below on one and the same batch.
OVERFIT = {
    "codec": (10, 0.8),
    "vocoder": (4, 0.9),
    "dit": (12, 0.8),
    "language": (6, 0.4),
    "audio_align": (5, 0.8),
    "vision_align": (6, 0.6),
    "thinker1": (26, 0.8),
    "thinker2": (6, 0.4),
    "thinker3": (5, 0.6),
    "chat": (6, 0.4),
    "talker": (5, 0.6),
    "dpo": (3, 0.95),
    "speakers": (5, 0.7),
}


@pytest.mark.slow
def test_samples_can_be_drawn_before_any_training():
    torch.manual_seed(0)
    for name in ("codec", "language", "audio_align", "vision_align"):
        stage = stage_table.STAGES[name](Omni(TINY), Recipe(steps=1, batch=2, lr=1e-3), CACHE, 0)
        loop.run_setup(stage)
        assert stage.preview_text()


@pytest.mark.parametrize("name", stages(stage_table.STAGES, quick=("vision_align",)))
def test_every_stage_overfits_one_batch(name, tmp_path):
    stage = stage_of(name)
    batch = stage.batch(0)
    stage.batch = lambda step: batch
    torch.manual_seed(5)
    before = {k: v.item() for k, v in stage.losses(batch).items()}
    steps, share = OVERFIT[name]
    train(stage, tmp_path, until=steps)
    torch.manual_seed(5)
    after = {k: v.item() for k, v in stage.losses(batch).items()}
    first = next(iter(before))
    assert after[first] < share * before[first], f"{before} -> {after}"


@pytest.mark.slow
def test_small_takes_two_steps_of_every_stage(tmp_path, monkeypatch, untrained_tries):
    """The recipe for a GPU, on the CPU: every stage starts from what the ones before it left; then
    it is one model.
    """
    monkeypatch.setattr(DPOStage, "num_prompts", 2)
    # test_muon.py shows that more iterations do what they should; one is a fifth of the time.
    monkeypatch.setattr(muon, "orthogonal", lambda matrices, steps: orthogonal(matrices, 1))
    monkeypatch.setattr(loop, "LOG_LINES", 1)
    home = tmp_path / "small"
    for name in stage_table.STAGES:
        recipe = replace(recipes.recipe_of(name, "small"), steps=2, batch=2, warmup=1)
        monkeypatch.setitem(recipes.RECIPES["small"], name, recipe)
        stage = pipeline.make_stage(name, "small", home, seed=0)
        stage.preview_text = lambda: ""
        stage.preview_audio = lambda: None
        train(stage, home / "stages")
    pipeline.export_model("small", home, seed=0)
    omni = load(home / "model")
    assert omni.config == SMALL
    assert omni.voices
    torch.manual_seed(0)
    before = dict(Omni(SMALL).named_parameters())
    stuck = [
        name for name, parameter in omni.named_parameters() if torch.equal(parameter, before[name])
    ]
    assert stuck == [
        "thinker.audio_tower.audio_bos_eos_token.weight"
    ]  # in the release's files, read by nothing


def test_only_unlocked_parameters_move(tmp_path):
    stage = stage_of("thinker1", steps=2)
    before = {n: p.clone() for n, p in stage.omni.named_parameters()}
    train(stage, tmp_path)
    moved = {n for n, p in stage.omni.named_parameters() if not torch.equal(p, before[n])}
    assert moved
    assert all(n.startswith(("thinker.audio_tower.", "thinker.visual.")) for n in moved)


def test_needs_come_before():
    names = list(stage_table.STAGES)
    for name, stage in stage_table.STAGES.items():
        assert all(names.index(need) < names.index(name) for need in stage.needs)


@pytest.mark.parametrize("name", ["codec", "vocoder", "dit"])
def test_voice_stages_draw_by_weight(name):
    """With all the weight on one recording, every row of a batch is from it."""
    stage = stage_of(name)
    assert stage.weights == corpus.sampling_weights([u.text for u in stage.speech.utterances])
    longest = max(range(len(stage.speech)), key=stage.lengths.__getitem__)
    stage.weights = [float(i == longest) for i in range(len(stage.speech))]
    asked, find = [], stage.speech.wave
    stage.speech.wave = lambda i: asked.append(i) or find(i)
    stage.batch(0)
    assert asked
    assert set(asked) == {longest}


def test_language_begins_with_pictures_and_then_clips():
    """Of 100 steps of two batches each, those before 25 pictures, those before 45 mostly clips,
    then everything.
    """
    stage = object.__new__(LanguageStage)
    stage.recipe = Recipe(steps=100, batch=8, lr=1e-3, accumulate=2)
    assert stage.mixture_at(0) == stage.mixture_at(49) == {"scene-alone": 1}
    assert (
        set(stage.mixture_at(50))
        == set(stage.mixture_at(89))
        == {"sync-typed", "video-typed", "scene-typed"}
    )
    assert stage.mixture_at(90) == stage.mixture_at(199) == stage.mixture


@pytest.mark.parametrize("name", stages(("talker", "speakers"), quick=("speakers",)))
def test_a_short_stage_prepares_no_more_examples_than_it_draws(name, monkeypatch):
    """The Thinker runs over the recordings that are drawn, and not over the others."""
    # Batches in another order than that of the recordings.
    monkeypatch.setattr(speech, "estimated_tokens", lambda example: len(example.answer))
    short = stage_of(name, batch=3, steps=5)
    every = stage_of(name, batch=len(short.speech), steps=1)
    texts = [utterance.text for utterance in every.speech.utterances]
    assert [example.text for example in every.examples] == texts
    assert 8 < len(short.examples) <= 15
    assert [example.text for example in short.examples] == [texts[i] for i in short.recordings]
    # A state for each token of its own text, though prompts of similar length share a batch.
    encode = world_tokenizer(short.tokens).encode
    lengths = [len(example.states) for example in every.examples]
    assert lengths == [len(encode(text)) for text in texts]
    assert len(set(lengths)) > 3
    for example, index in zip(short.examples, short.recordings, strict=True):
        assert torch.equal(example.codes, every.examples[index].codes)
    # Another seed draws other recordings.
    assert stage_of(name, batch=3, steps=5, seed=1).recordings != short.recordings


def test_talker_is_asked_for_the_word_it_says():
    stage = stage_of("talker")
    example = next(x for x in stage.examples if x.words is not None and len(x.text.split()) > 3)
    assert len(example.words) == len(example.codes)
    assert (example.words.diff() >= 0).all()
    targets = torch.full((1, len(example.codes) + 9), IGNORE_INDEX)
    targets[0, 5 : 5 + len(example.codes)] = example.codes
    places, words = stage.word_targets([example], targets)
    assert (places[0, 5 : 5 + len(example.codes)] == example.words).all()
    assert (places[0, :5] == IGNORE_INDEX).all()
    assert (words[0, 5 + len(example.codes) :] == IGNORE_INDEX).all()
    spell = ExampleBuilder(TINY, CACHE).processor.tokenizer.decode
    first = spell([int(words[0, 5])]).strip()
    assert first
    assert example.text.split()[int(example.words[0])].startswith(first)
    before = {name for name, _ in stage.omni.named_parameters()}
    assert {name for name in stage.parameters() if name not in before} == {
        "word_head.weight",
        "word_head.bias",
    }
    forward_backward(stage, 0)
    once = stage.word_head.weight.grad.clone()
    forward_backward(stage, 0)  # what is thrown away later is cleared between steps too
    assert once.abs().max() > 0
    assert torch.equal(stage.word_head.weight.grad, once)


@pytest.mark.slow
def test_the_better_try_is_a_example_as_any_other():
    """Beside the preference: the mean loss of its codes and its stop, at its weight; it is to
    become likelier.
    """
    stage = stage_of("dpo")
    stage.omni.eval()
    pairs, reference, examples = stage.batch(0)
    with torch.no_grad():
        losses_of = stage.losses((pairs, reference, examples))
        taught = code_loss(
            stage.omni, [replace(example, codes=better) for example, better, _ in pairs]
        )
    assert losses_of["sft"].item() == pytest.approx(stage.sft_weight * taught.item(), rel=1e-4)


def test_a_conversation_asks_about_what_it_has_shown():
    """Its first turn has the image; later ones are about it, then about something else."""
    stage = stage_of("chat")
    random = Random(0)
    with_clip = [stage.dialogue("video-typed", random) for _ in range(40)]
    assert all(example.voice is None for dialogue in with_clip for example in dialogue)

    dialogues = [stage.dialogue("scene-typed", random) for _ in range(60)]
    assert all(dialogue[0].image is not None for dialogue in dialogues)
    conversations = [d for d in dialogues if any(e.kind != "scene-typed" for e in d[1:])]
    assert 15 < len(conversations) < 45  # half of 60
    turns = []
    for dialogue in conversations:
        about_first = [e for e in dialogue[1:] if e.kind == "scene-typed" and e.image is None]
        others = [e for e in dialogue[1:] if e not in about_first]
        assert len(about_first) <= MAX_LATER_TURNS
        assert 1 <= len(others) <= MAX_LATER_TURNS
        assert dialogue[1 : 1 + len(about_first)] == about_first
        answers = {answer for _, answer in dialogue[0].follow_ups}
        assert {example.answer for example in about_first} <= answers
        turns += dialogue[1:]
    assert {turn.voice for turn in turns} == {None, "any"}  # typed and spoken
