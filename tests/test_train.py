"""The school: every stage learns, resumes exactly, and never sees what is held out."""

import json
import tempfile
from collections import Counter
from dataclasses import replace
from itertools import product
from math import log
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch

from minomni import load, paths
from minomni.config import IGNORE_INDEX, SMALL, TINY
from minomni.data import codes, corpus, grammar, scenes, text_to_speech
from minomni.data.examples import ExampleBuilder
from minomni.data.vocabulary import english, world_tokenizer
from minomni.data.word_errors import edit_distance, word_error_rate
from minomni.errors import UserError
from minomni.omni import Omni
from minomni.talker.codec import FIRST_CODE, FSQ, Codec, ctc_align, ids_to_letters, letters_to_ids
from minomni.train import losses, muon, pipeline, recipes
from minomni.train.loop import Recipe, Stage, gradients, learning_rate, train
from minomni.train.muon import Muon, orthogonal
from minomni.train.stages.dpo import DPOStage
from minomni.train.stages.speech import code_loss
from minomni.train.stages.thinker import LanguageStage

CACHE = Path(tempfile.mkdtemp())
FAST = dict(warmup=2, weight_decay=0.0)
# Steps and share of the first loss that a stage must fall below on one and the same batch.
OVERFIT = {
    "codec": (25, 0.8),
    "vocoder": (12, 0.9),
    "dit": (25, 0.8),
    "language": (15, 0.4),
    "audio_align": (25, 0.8),
    "vision_align": (20, 0.6),
    "thinker1": (30, 0.8),
    "thinker2": (12, 0.4),
    "thinker3": (10, 0.6),
    "chat": (12, 0.4),
    "talker": (20, 0.6),
    "dpo": (8, 0.95),
    "speakers": (15, 0.7),
}


@pytest.fixture(autouse=True)
def recordings_only(monkeypatch):
    """Train on data_samples/ alone: quick, and what a machine without the synthesiser does."""
    monkeypatch.setattr(text_to_speech, "available", lambda: False)
    monkeypatch.setattr(DPOStage, "prompts", 32)


def stage_of(name: str, batch: int = 4, steps: int = 100, seed: int = 0) -> Stage:
    torch.manual_seed(seed)
    kind = pipeline.STAGES[name]
    stage = kind(Omni(TINY), Recipe(steps=steps, batch=batch, lr=5e-3, **FAST), CACHE, seed)
    stage.sample, stage.sound = (
        lambda: "",
        lambda: None,
    )  # an untrained Talker speaks until it is cut off: slow
    return stage


def test_samples_can_be_drawn_before_any_training():
    torch.manual_seed(0)
    for name in ("codec", "language", "audio_align", "vision_align"):
        kind = pipeline.STAGES[name]
        assert kind(Omni(TINY), Recipe(steps=1, batch=2, lr=1e-3), CACHE, 0).sample()


@pytest.mark.parametrize("name", list(pipeline.STAGES))
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


def test_small_takes_two_steps_of_every_stage(tmp_path, monkeypatch, untrained_tries):
    """The recipe for a GPU, on the CPU: every stage starts from what the ones before it left; then
    it is one model.
    """
    monkeypatch.setattr(DPOStage, "prompts", 2)
    home = tmp_path / "small"
    for name in pipeline.STAGES:
        recipe = replace(recipes.recipe_of(name, "small"), steps=2, batch=2, warmup=1)
        monkeypatch.setitem(recipes.RECIPES["small"], name, recipe)
        stage = pipeline.make_stage(name, "small", home, seed=0)
        stage.sample, stage.sound = lambda: "", lambda: None
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


@pytest.mark.parametrize("name", ["codec", "dit", "thinker2", "talker"])
def test_resume_is_exact(name, tmp_path):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    train(stage_of(name, steps=6), whole)
    train(stage_of(name, steps=6), halves, until=3)
    path = halves / f"{name}.resume.pt"
    if not path.exists():
        pytest.fail("no checkpoint was left behind")
    train(stage_of(name, steps=6), halves, resume=True)
    assert (whole / f"{name}.safetensors").read_bytes() == (
        halves / f"{name}.safetensors"
    ).read_bytes()


def test_only_unlocked_parameters_move(tmp_path):
    stage = stage_of("thinker1", steps=2)
    before = {n: p.clone() for n, p in stage.omni.named_parameters()}
    train(stage, tmp_path)
    moved = {n for n, p in stage.omni.named_parameters() if not torch.equal(p, before[n])}
    assert moved
    assert all(n.startswith(("thinker.audio_tower.", "thinker.visual.")) for n in moved)


def test_nan_is_named(tmp_path):
    stage = stage_of("language")
    stage.losses = lambda batch: {"text": torch.tensor(float("nan"), requires_grad=True)}
    with pytest.raises(UserError, match="stage language: loss text is nan at step 0"):
        train(stage, tmp_path)


def test_schedule():
    recipe = Recipe(steps=100, batch=1, lr=1.0, warmup=10)
    assert learning_rate(recipe, 0) == pytest.approx(0.1)
    assert learning_rate(recipe, 10) == pytest.approx(1.0)
    assert learning_rate(recipe, 100) == pytest.approx(0.05)


def test_needs_come_before():
    names = list(pipeline.STAGES)
    for name, stage in pipeline.STAGES.items():
        assert all(names.index(need) < names.index(name) for need in stage.needs)


def test_a_run_is_never_lost_by_accident(tmp_path):
    pipeline.prepare_run(tmp_path, resume=False, fresh=False)
    (tmp_path / "stages" / "codec.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match="--resume"):
        pipeline.prepare_run(tmp_path, resume=False, fresh=False)
    pipeline.prepare_run(tmp_path, resume=True, fresh=False)
    assert (tmp_path / "stages" / "codec.safetensors").exists()
    pipeline.prepare_run(tmp_path, resume=False, fresh=True)
    assert not (tmp_path / "stages" / "codec.safetensors").exists()


# ----------------------------------------------------------------------------------------------
# held-out material


def test_voice_stages_leave_long_recordings_out():
    first, second = corpus.all_statements(held=False)[:2]
    texts = [first, f"{first} and {second}", "red two up", "a red cross and a blue cross"]
    recordings = corpus.SpeechCorpus(
        np.zeros(1), [corpus.Utterance(text, "Anna", 0, 1) for text in texts]
    )
    assert [u.text for u in corpus.drop_long(recordings).utterances] == [texts[0], *texts[2:]]


def test_lessons_are_fair_to_kinds_of_sentences():
    texts = (
        ["the red circle is above the blue cross"] * 7 + ["the digit is nine"] * 2 + ["red two up"]
    )
    share = corpus.FAIR / 3
    rest = (1 - corpus.FAIR) / 10
    assert corpus.sampling_weights(texts) == pytest.approx(
        [rest + share / 7] * 7 + [rest + share / 2] * 2 + [rest + share]
    )


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


def test_word_strings_hold_no_statement():
    """So none that is held out is copied word by word in training. Words come back: where from is
    not told by them.
    """
    random = Random(0)
    strings = [grammar.word_string(random) for _ in range(300)]
    statements = {text for template in grammar.STATEMENTS for text in grammar.expand(template)}
    assert not any(f" {text} " in f" {string} " for text in statements for string in strings)
    assert sum(len(set(string.split())) < len(string.split()) for string in strings) > 200


@pytest.mark.parametrize("bf16", [True, False])
def test_muon_steps_as_torch_s_does(bf16, monkeypatch):
    """Wide, high and square matrices, two of one shape, one that gets no gradient, weight decay,
    three steps.

    torch's Muon always multiplies in bf16, so the two agree in two digits. In bf16 both round alike
    but for the order of summing.
    """
    monkeypatch.setattr(muon, "has_bf16", lambda device: bf16)
    tolerance = 0.02 if bf16 else 0.05  # five steep polynomials enlarge a rounding of 0.4 %
    generator = torch.Generator().manual_seed(0)
    draw = lambda shape: torch.randn(shape, generator=generator)  # noqa: E731
    ours = [
        torch.nn.Parameter(draw(shape)) for shape in ((8, 24), (24, 8), (8, 24), (16, 16), (4, 6))
    ]
    theirs = [torch.nn.Parameter(matrix.detach().clone()) for matrix in ours]
    mine = Muon(ours, lr=0.02, weight_decay=0.1)
    other = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for a, b in zip(ours[:-1], theirs):
            a.grad = b.grad = draw(a.shape)
        before = [matrix.detach().clone() for matrix in theirs]
        mine.step(), other.step()
        for a, b, c in zip(ours, theirs, before):
            torch.testing.assert_close(
                a, b, rtol=0, atol=tolerance * float((b - c).detach().abs().max())
            )
    assert mine.state_dict()["state"].keys() == other.state_dict()["state"].keys()


def test_newton_schulz_keeps_directions_and_evens_out_lengths():
    """A matrix with known singular vectors, of lengths from 1 to 0.1: afterwards all lie between
    0.6 and 1.3.
    """
    u, v = (
        torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(i))).Q
        for i in (1, 2)
    )
    turned = orthogonal((u @ torch.diag(torch.linspace(1, 0.1, 8)) @ v.T)[None], steps=5)[0].float()
    lengths = u.T @ turned @ v
    assert ((lengths.diagonal() > 0.6) & (lengths.diagonal() < 1.3)).all()
    assert (lengths - lengths.diagonal().diag()).abs().max() < 0.05


@pytest.mark.parametrize("shape", [(5, 5), (3, 7)])
def test_newton_schulz_is_a_polynomial_of_the_singular_values(shape):
    """In fp64, to all digits, against the singular value decomposition."""
    matrices = torch.randn(
        4, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    u, lengths, v = torch.linalg.svd(matrices, full_matrices=False)
    lengths = lengths / lengths.square().sum(-1, keepdim=True).sqrt()
    for _ in range(5):
        lengths = 3.4445 * lengths - 4.7750 * lengths**3 + 2.0315 * lengths**5
    torch.testing.assert_close(
        orthogonal(matrices, 5), u @ torch.diag_embed(lengths) @ v, rtol=0, atol=1e-12
    )


@pytest.mark.parametrize(
    ("given", "in_hardware", "multiplied"),
    [("float32", True, "bfloat16"), ("float32", False, "float32"), ("float64", True, "float64")],
)
def test_newton_schulz_multiplies_in_what_the_device_is_good_at(
    given, in_hardware, multiplied, monkeypatch
):
    monkeypatch.setattr(muon, "has_bf16", lambda device: in_hardware)
    matrices = torch.randn(1, 2, 2, dtype=getattr(torch, given))
    assert orthogonal(matrices, 5).dtype == getattr(torch, multiplied)


def test_the_longest_way_goes_first():
    """By hand: dpo and then speakers wait for chat; whoever is waited for has a longer way than who
    waits.
    """
    seconds = {name: took for name, (took, _) in pipeline.EXPECTED["tiny"].items()}
    assert (
        pipeline.critical_path_s("chat", "tiny")
        == seconds["chat"] + seconds["dpo"] + seconds["speakers"]
    )
    for name, stage in pipeline.STAGES.items():
        assert all(
            pipeline.critical_path_s(need, "tiny") > pipeline.critical_path_s(name, "tiny")
            for need in stage.needs
        )
    assert "dpo" not in pipeline.EXPECTED["small"]
    assert pipeline.critical_path_s("dpo", "small") == (80 + 40) / 4


def test_stages_that_nobody_waits_for_keep_to_the_spare_lane():
    """By hand, two lanes: the vocoder in the third; no dit in a free lane while thinker3 will want
    it; at the end any.
    """
    order = sorted(pipeline.STAGES, key=lambda name: -pipeline.critical_path_s(name, "tiny"))
    running = {}
    while start := pipeline.start_next(order, set(), running, 2):
        running[start[0]] = start[1]
    assert running == {"language": 0, "vision_align": 1, "vocoder": 2}
    done = {"language", "audio_align", "vision_align", "thinker1", "codec", "vocoder"}
    assert pipeline.start_next(order, done, {"thinker2": 0}, 2) == ("dit", 2)
    assert pipeline.start_next(order, done, {"thinker2": 0, "dit": 2}, 2) is None
    done |= {"thinker2", "thinker3", "chat", "talker", "dpo"}
    assert pipeline.start_next(order, done, {"dit": 2}, 2) == ("speakers", 0)
    assert pipeline.start_next(order, done, {}, 1) == ("dit", 0)


@pytest.mark.parametrize("broken", [None, "vision_align"])
def test_all_stages_run_and_the_spare_lane_yields(monkeypatch, tmp_path, broken):
    """With processes that end at once, or one that fails while the others go on for ever: those are
    ended.
    """
    begun, yielded, ended = [], [], []

    class Process:
        def __init__(self, command, cwd):
            self.pid = command[command.index("--stage") + 1]
            self.returncode = int(self.pid == broken)
            begun.append(self.pid)

        def poll(self):
            return self.returncode if broken in (None, self.pid) else None

        def terminate(self):
            ended.append(self.pid)

    monkeypatch.setattr(pipeline.subprocess, "Popen", Process)
    monkeypatch.setattr(
        pipeline.os,
        "setpriority",
        lambda kind, pid, priority: yielded.append((pid, priority)),
        raising=False,
    )
    monkeypatch.setattr(pipeline, "corpus", lambda *_: None)
    if broken:
        with pytest.raises(UserError, match="stage vision_align stopped with exit code 1"):
            pipeline.run_all("tiny", tmp_path, seed=0)
        assert sorted(ended) == ["language", "vocoder"]
        assert len(begun) == 3
        return
    pipeline.run_all("tiny", tmp_path, seed=0)
    assert sorted(begun) == sorted(pipeline.STAGES)
    assert yielded == [("vocoder", 19), ("dit", 19)]
    for name, stage in pipeline.STAGES.items():
        assert all(begun.index(need) < begun.index(name) for need in stage.needs)


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


def test_codes_are_kept_for_the_codec_that_made_them(tmp_path):
    """What is read back is what was encoded, row by row; other recordings, as many, and another
    codec do not meet it.
    """
    spoken, codec = corpus.sample_recordings(held=True), Codec(TINY.codec)
    fresh = codes.encode_corpus(codec, spoken, tmp_path)
    kept = codes.encode_corpus(codec, spoken, tmp_path)
    encoded = codes.encode_batches(codec, spoken)
    assert len(fresh) == len(kept) == len(spoken)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(fresh, kept, encoded))
    others = corpus.SpeechCorpus(spoken.samples, spoken.utterances[::-1])
    turned = codes.encode_corpus(codec, others, tmp_path)
    assert (
        [len(row) for row in turned]
        == [len(row) for row in kept[::-1]]
        != [len(row) for row in kept]
    )
    with torch.no_grad():
        next(codec.parameters()).mul_(2)
    codes.encode_corpus(codec, spoken, tmp_path)
    assert len(list(tmp_path.glob("codes-*.pt"))) == 3


def test_english_words_where_there_is_room_for_them():
    """None for tiny, whose corpora stay as they are. Small's come in pieces; a tenth is never
    trained on.
    """
    assert english(TINY.thinker.tokens) == ((), ())
    words, known = english(SMALL.thinker.tokens), world_tokenizer(SMALL.thinker.tokens)
    assert not set(words.trained) & set(words.held)
    assert 0.05 < len(words.held) / len(sum(words, ())) < 0.15
    own = {
        word for text in [*grammar.statements(), *grammar.all_questions()] for word in text.split()
    }
    assert not own & {*words.trained, *words.held, "say"}
    jobs = [job.text for _, job in corpus.speaking_jobs(words) + corpus.listening_jobs(words)]
    said = {word for text in jobs for word in text.split()}
    assert set(words.trained) <= said
    assert not said & set(words.held)
    pieces = {piece for word in said for piece in known.encode(f" {word}")}
    foreign = [word for word in words.held if not set(known.encode(f" {word}")) <= pieces]
    assert len(foreign) < 0.05 * len(
        words.held
    )  # of the others every piece has been heard and said
    tested = [job.text for _, job in corpus.test_jobs(words)][len(corpus.test_jobs()) :]
    assert len(tested) == 96
    assert not set(tested) & set(jobs)
    assert corpus.test_jobs(words)[: -len(tested)] == corpus.test_jobs()


def test_no_trained_sentence_is_held_out():
    trained, held = set(corpus.all_statements(held=False)), set(corpus.all_statements(held=True))
    assert not trained & held
    assert 0.05 < len(held) / len(trained | held) < 0.15
    said = {job.text for _, job in corpus.speaking_jobs()} | {
        job.text.removeprefix("say ") for _, job in corpus.listening_jobs()
    }
    assert not said & held
    words = {word for text in trained for word in text.split()}
    assert {
        word for text in held for word in text.split()
    } <= words  # what nobody has said cannot be learnt
    tested = {job.text.removeprefix("say ") for _, job in corpus.test_jobs()} - set(
        grammar.all_questions()
    )
    assert tested <= held
    assert not {name for name, _ in corpus.listening_jobs()} & set(grammar.UNSEEN_VOICES)


def test_a_part_of_what_is_heard_cannot_be_guessed():
    """Words without sense, loose and in frames, by every voice, and with every word of the world
    among them.
    """
    drawn = [
        (name, job.text)
        for name, job in corpus.listening_jobs()
        if job.text not in grammar.all_questions()
    ]
    without = [
        (name, text)
        for name, text in drawn
        if corpus.sentence_kind(text.removeprefix("say ")) == "words"
    ]
    assert len(without) == corpus.HEARD_STRINGS + corpus.HEARD_FRAMED
    assert len(drawn) - len(without) == corpus.HEARD
    assert {name for name, _ in without} == set(grammar.LISTENING_VOICES)
    assert set(grammar.WORDS) <= {word for _, text in without for word in text.split()}


def test_teacher_keeps_to_its_side(tmp_path):
    for held in (False, True):
        teacher, random = ExampleBuilder(TINY, tmp_path, held), Random(0)
        for kind in ("say-typed", "say-spoken"):
            assert all(
                grammar.held_out(teacher.example(kind, random).answer) == held for _ in range(50)
            )
    train_digits, test_digits = scenes.digits(False)[0], scenes.digits(True)[0]
    assert len(train_digits) + len(test_digits) == 1797
    seen = {digit.tobytes() for digit in train_digits}
    assert (
        sum(digit.tobytes() in seen for digit in test_digits) < 3
    )  # the set itself repeats hardly any


def test_recordings_are_drawn_fairly_but_for_tests():
    teacher, random, drawn = ExampleBuilder(TINY, CACHE), Random(0), 4000
    kinds = [
        corpus.sentence_kind(teacher.recorded_text(random).removeprefix("say "))
        for _ in range(drawn)
    ]
    there = Counter(corpus.sentence_kind(text.removeprefix("say ")) for text in teacher.spoken)
    for kind, count in there.items():
        share = (1 - corpus.FAIR) * count / len(teacher.spoken) + corpus.FAIR / len(there)
        assert kinds.count(kind) / drawn == pytest.approx(share, abs=0.03)
    assert ExampleBuilder(TINY, CACHE, held=True).weights is None


def test_kinds_of_sentences():
    for template in grammar.STATEMENTS:
        assert {corpus.sentence_kind(text) for text in grammar.expand(template)} == {template}
    assert corpus.sentence_kind("the cross is red and a red cross and a blue circle") == "long"
    assert corpus.sentence_kind("a red cross and a blue circle and the cross is red") == "long"
    assert (
        corpus.sentence_kind("a red seven and a blue circle")
        == corpus.sentence_kind("cross cross nine")
        == "words"
    )


def test_words_in_frames_are_no_statements():
    random = Random(0)
    drawn = [grammar.framed_words(random) for _ in range(2000)]
    assert not set(drawn) & set(grammar.statements())
    assert len(set(drawn)) > 1000
    little = {word for text in grammar.statements() for word in text.split()}
    assert little == {word for text in drawn for word in text.split()} | {"shape", "shapes"}


def test_what_was_first_and_last_in_a_clip_agrees_with_what_is_seen():
    random = Random(3)
    for made, more in (
        (scenes.ordered_clip, 1),
        (scenes.clip_with_tone, 2),
        (lambda r: scenes.long_clip(r, 12), 1),
    ):
        for _ in range(20):
            example = made(random)
            asked = dict([(example.question, example.answer), *example.more])
            assert len(example.more) == more
            assert len(asked) == more + 1
            for question, seen in (
                ("what was there first", example.objects[0]),
                ("what was there last", example.objects[-1]),
            ):
                assert asked[question] == f"it was the {seen[0][0]} {seen[0][1]}"


def test_answers_agree_with_pictures():
    random = Random(3)
    for _ in range(50):
        example = scenes.scene(random)
        if example.question.startswith("what color is the"):
            color = example.answer.split()[-1]
            pixels = (
                set(example.image.getdata())
                if not hasattr(example.image, "get_flattened_data")
                else set(example.image.get_flattened_data())
            )
            assert grammar.COLORS[color] in pixels


def test_a_color_that_two_things_share_is_not_asked_for():
    for asked, pairs in scenes.questions_about(
        [("red", "circle"), ("red", "cross")], "left of"
    ).items():
        assert asked != "shape" or pairs == []
    asked = scenes.questions_about([("red", "circle"), ("blue", "cross")], "above")
    assert ("where is the blue cross", "the blue cross is below the red circle") in asked[
        "relation"
    ]
    assert "describe" not in asked  # what do you see is answered from left to right


def test_moments_name_what_is_seen_while_it_sounds(tmp_path):
    teacher, random = ExampleBuilder(TINY, tmp_path), Random(0)
    talks = [teacher.dialogue(kind, random) for kind in ("sync-typed", "scene-typed", "sync-typed")]
    examples = sum(talks, [])
    inputs, answers = teacher.collate(talks, random)
    moments = teacher.frame_targets(examples, inputs)
    assert torch.equal(moments != IGNORE_INDEX, inputs.input_ids == TINY.thinker.tokens.audio)
    assert not ((moments != IGNORE_INDEX) & (answers != IGNORE_INDEX)).any()
    for row, talk in ((0, talks[0]), (2, talks[2])):
        example, said = talk[0], moments[row][moments[row] != IGNORE_INDEX]
        change = next(i for i, seen in enumerate(example.objects) if seen != example.objects[0])
        begins = example.clip[1][2 * change]
        for i, word in enumerate(said.tolist()):
            seen = example.objects[0 if i / 25 < begins else -1][0]
            assert teacher.processor.tokenizer.decode([word]).strip() in seen[:2]


def test_a_picture_is_asked_about_several_times(tmp_path):
    teacher = ExampleBuilder(TINY, tmp_path)
    talk = teacher.dialogue("scene-typed", Random(2))
    assert 1 < len(talk) <= 4
    assert len({example.question for example in talk}) == len(talk)
    inputs, targets = teacher.collate([talk], Random(2))
    answers = [teacher.processor.tokenizer.encode(example.answer) for example in talk]
    assert targets[targets != IGNORE_INDEX].tolist() == [
        i for row in answers for i in (*row, teacher.end)
    ]
    assert (
        (inputs.input_ids == TINY.thinker.tokens.image).sum()
        == 16
        == len(inputs.image_patches) // 4
    )


def test_long_lessons_are_long(tmp_path):
    teacher, random, words = ExampleBuilder(TINY, tmp_path), Random(0), 0
    for _ in range(5):
        dictation, clip = (teacher.example(kind, random) for kind in ("hear-long", "video-long"))
        assert 1 < len(dictation.wave) / 16_000 <= 10
        words += len(dictation.answer.split())
        frames, seconds = clip.clip
        assert 10 <= seconds[-1] <= 60
        assert len(frames) == len(seconds) <= 64 == 2 * 32
        assert clip.answer.endswith(
            " ".join(clip.objects[0 if "first" in clip.question else -1][0][:2])
        )
    assert words > 50  # in five dictations: sentences have up to twelve


def test_corpus_hash_is_recorded_and_repeats(monkeypatch, tmp_path):
    monkeypatch.undo()
    if not text_to_speech.available():
        pytest.skip("espeakng-loader is not installed")
    jobs = [
        text_to_speech.Job("the red circle is above the blue square", "en-us+f5"),
        text_to_speech.Job("the digit is two", "en-us+adam"),
    ]
    first, second = text_to_speech.synthesize(jobs, seed=3), text_to_speech.synthesize(jobs, seed=3)
    assert all((a == b).all() for a, b in zip(first, second))
    assert all(0.4 < len(w) / 16_000 < 4 for w in first)
    monkeypatch.setattr(
        text_to_speech, "PART", 1
    )  # each in a process of its own, from a seed of its own
    apart = text_to_speech.synthesize(jobs, seed=3)
    alone = text_to_speech.synthesize(jobs[:1], seed=3) + text_to_speech.synthesize(
        jobs[1:], seed=4
    )
    assert all((a == b).all() for a, b in zip(apart, alone, strict=True))


# ----------------------------------------------------------------------------------------------
# words in their places


def test_letters_are_found_where_they_are_said():
    """By hand: a, pause, a again, b drawn out; and what every way through would be, tried one by
    one.
    """
    log_probs = torch.full((6, 3), -5.0)
    log_probs[range(6), [1, 0, 1, 2, 2, 0]] = -0.1
    assert ctc_align(log_probs, torch.tensor([1, 1, 2])).tolist() == [0, 0, 1, 2, 2, 2]
    assert (
        ctc_align(log_probs[:2], torch.tensor([1, 1])) is None
    )  # two of a kind need a pause between them
    random = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    letters = [3, 1, 1]
    ways = [way for way in product(range(4), repeat=5) if squeezed(way) == letters]
    best = max(ways, key=lambda way: sum(float(random[t, c]) for t, c in enumerate(way)))
    said, expected = 0, []
    for before, now in zip((0, *best), best):
        said += now not in (0, before)
        expected.append(max(said - 1, 0))
    assert len(ways) > 3
    assert ctc_align(random, torch.tensor(letters)).tolist() == expected


def squeezed(classes) -> list[int]:
    """Repeats collapse, blanks vanish."""
    return [now for before, now in zip((0, *classes), classes) if now not in (0, before)]


def test_talker_is_asked_for_the_word_it_says():
    stage = stage_of("talker")
    lesson = next(x for x in stage.examples if x.words is not None and len(x.text.split()) > 3)
    assert len(lesson.words) == len(lesson.codes)
    assert (lesson.words.diff() >= 0).all()
    targets = torch.full((1, len(lesson.codes) + 9), IGNORE_INDEX)
    targets[0, 5 : 5 + len(lesson.codes)] = lesson.codes
    places, words = stage.said([lesson], targets)
    assert (places[0, 5 : 5 + len(lesson.codes)] == lesson.words).all()
    assert (places[0, :5] == IGNORE_INDEX).all()
    assert (words[0, 5 + len(lesson.codes) :] == IGNORE_INDEX).all()
    spell = ExampleBuilder(TINY, CACHE).processor.tokenizer.decode
    first = spell([int(words[0, 5])]).strip()
    assert first
    assert lesson.text.split()[int(lesson.words[0])].startswith(first)
    before = {name for name, _ in stage.omni.named_parameters()}
    assert {name for name in stage.parameters() if name not in before} == {
        "place_head.weight",
        "place_head.bias",
    }
    gradients(stage, 0)
    once = stage.place_head.weight.grad.clone()
    gradients(stage, 0)  # what is thrown away later is cleared between steps too
    assert once.abs().max() > 0
    assert torch.equal(stage.place_head.weight.grad, once)


def test_the_better_try_is_a_lesson_as_any_other():
    """Beside the preference: the mean loss of its codes and its stop, at its weight; it is to
    become likelier.
    """
    stage = stage_of("dpo")
    stage.omni.eval()
    pairs, reference, lessons = stage.batch(0)
    with torch.no_grad():
        losses_of = stage.losses((pairs, reference, lessons))
        taught = code_loss(
            stage.omni, [replace(lesson, codes=better) for lesson, better, _ in pairs]
        )
    assert losses_of["better"].item() == pytest.approx(stage.better * taught.item(), rel=1e-4)


# ----------------------------------------------------------------------------------------------
# losses by hand


def test_next_token_by_hand():
    logits = torch.tensor([[[0.0, 0.0], [2.0, 0.0], [5.0, 5.0]]])
    targets = torch.tensor([[0, 1, IGNORE_INDEX]])
    expected = (log(2) + (log(1 + torch.e**2))) / 2
    assert losses.next_token(logits, targets).item() == pytest.approx(expected, rel=1e-5)


def test_parts_of_a_batch_count_as_the_whole():
    logits, targets = torch.randn(4, 3, 5), torch.randint(0, 5, (4, 3))
    targets[0, 1:] = IGNORE_INDEX
    parts = [(logits[:1, :2], targets[:1, :2]), (logits[1:], targets[1:])]
    assert losses.in_parts(parts).item() == pytest.approx(
        losses.next_token(logits, targets).item(), rel=1e-5
    )


def test_dpo_by_hand():
    loss = losses.dpo(
        torch.tensor([-1.0]),
        torch.tensor([-3.0]),
        torch.tensor([-2.0]),
        torch.tensor([-2.0]),
        beta=0.5,
    )
    assert loss.item() == pytest.approx(
        log(1 + torch.e**-1.0), rel=1e-5
    )  # margin (1) - (-1) = 2, times 0.5
    even = losses.dpo(*[torch.tensor([-1.0])] * 4, beta=0.1)
    assert even.item() == pytest.approx(log(2))


def test_sequence_log_prob_skips_ignored():
    logits = torch.zeros(1, 3, 4)
    assert losses.sequence_log_prob(
        logits, torch.tensor([[1, IGNORE_INDEX, 2]])
    ).item() == pytest.approx(-2 * log(4))


def test_flow_matching_is_zero_for_the_right_velocity():
    mel, noise, time = torch.randn(2, 5, 3), torch.randn(2, 5, 3), torch.rand(2)
    assert losses.flow_matching(lambda x, t: mel - noise, mel, noise, time).item() == 0
    seen = []
    losses.flow_matching(lambda x, t: seen.append(x) or x, mel, noise, torch.tensor([0.0, 1.0]))
    assert torch.equal(seen[0][0], noise[0])
    assert torch.allclose(seen[0][1], mel[1])


def test_off_centre_by_hand():
    grid = torch.tensor(
        [[[1.0, -1.0], [0.5, 1.0], [9.0, 9.0]], [[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]]
    )  # [B, C, channels]
    assert losses.off_centre(grid, torch.tensor([2, 3])).item() == pytest.approx(
        (0.75**2 + 0 + 1 + 0) / 2
    )


def test_masked_l1_ignores_padding():
    target = torch.zeros(2, 4, 3)
    predicted = torch.ones(2, 4, 3)
    predicted[1, 2:] = 100
    assert losses.masked_l1(predicted, target, torch.tensor([4, 2])).item() == pytest.approx(1.0)


def test_ctc_is_per_letter():
    log_probs = torch.full((1, 3, 2), 0.5).log()
    # "a" in three frames of {blank, a}: six of the eight paths spell it
    assert losses.ctc(log_probs, torch.tensor([3]), [torch.tensor([1])]).item() == pytest.approx(
        -log(6 / 8), rel=1e-5
    )


# ----------------------------------------------------------------------------------------------
# codec


def test_fsq_is_a_bijection():
    fsq = FSQ((8, 5, 5, 5))
    codes = torch.arange(FIRST_CODE, FIRST_CODE + 1000)
    values = fsq.values(codes)
    assert len({tuple(v) for v in values.tolist()}) == 1000
    inside = torch.atanh(values.clamp(-0.999, 0.999))
    assert torch.equal(fsq(inside)[1], codes)
    assert torch.allclose(fsq(inside)[0], values, atol=1e-6)


def test_fsq_passes_gradients_straight_through():
    x = torch.zeros(4, requires_grad=True)
    FSQ((8, 5, 5, 5))(x)[0].sum().backward()
    assert torch.allclose(
        x.grad, torch.ones(4)
    )  # derivative of tanh at 0, as if nothing were rounded


def test_codec_lengths_and_blocks():
    codec = Codec(TINY.codec)
    mel = torch.randn(1, 480, 80)
    codes = codec.encode(mel)
    assert codes.shape == (1, 120)
    assert codes.min() >= FIRST_CODE
    assert codes.max() <= TINY.codec.num_codes
    changed = mel.clone()
    changed[:, 440:] += 1  # in the third 2-second block: the first must not notice
    assert torch.equal(codec.encode(changed)[:, :45], codes[:, :45])


def test_letters_round_trip():
    classes = torch.stack(
        [letters_to_ids("a shape"), torch.zeros(7, dtype=torch.long)], 1
    ).flatten()
    assert ids_to_letters(classes) == "a shape"


def test_word_error_by_hand():
    assert edit_distance(["a", "b", "c"], ["a", "x", "c", "d"]) == 2
    assert word_error_rate([("a b", "a b"), ("a b c d", "")]) == pytest.approx(4 / 6)


def test_shipped_model_fits_the_code():
    folder = paths.data_samples() / "tiny"
    made = json.loads((folder / pipeline.TRAINED).read_text(encoding="utf-8"))
    assert made["config"] == pipeline.config_hash(TINY), (
        "sizes have changed: train again, then make_data_samples model"
    )
    assert made["command"].startswith("python -m minomni train tiny")
    assert made["seconds"] > 0
    assert sum(file.stat().st_size for file in folder.iterdir()) < 20e6
