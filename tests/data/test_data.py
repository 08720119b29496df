"""The generated data: what is held out stays unseen, and answers agree with what is shown."""

import subprocess
import sys
from collections import Counter
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from training import CACHE, recordings_only  # noqa: F401  (a fixture)

from minomni.config import IGNORE_INDEX, SMALL, TINY
from minomni.data import codes, corpus, grammar, scenes, text_to_speech
from minomni.data.examples import ExampleBuilder
from minomni.data.vocabulary import english, world_tokenizer
from minomni.data.word_errors import edit_distance, word_error_rate, word_errors
from minomni.talker.codec import Codec

ROOT = Path(__file__).parents[2]


def test_voice_stages_leave_long_recordings_out():
    first, second = corpus.all_statements(held_out=False)[:2]
    texts = [first, f"{first} and {second}", "red two up", "a red cross and a blue cross"]
    recordings = corpus.SpeechCorpus(
        np.zeros(1), [corpus.Utterance(text, "Anna", 0, 1) for text in texts]
    )
    assert [u.text for u in corpus.drop_long(recordings).utterances] == [texts[0], *texts[2:]]


def test_examples_are_fair_to_kinds_of_sentences():
    texts = (
        ["the red circle is above the blue cross"] * 7 + ["the digit is nine"] * 2 + ["red two up"]
    )
    share = corpus.BALANCED_SHARE / 3
    rest = (1 - corpus.BALANCED_SHARE) / 10
    assert corpus.sampling_weights(texts) == pytest.approx(
        [rest + share / 7] * 7 + [rest + share / 2] * 2 + [rest + share]
    )


def test_word_strings_hold_no_statement():
    """So none that is held out is copied word by word in training. Words come back: where from is
    not told by them.
    """
    random = Random(0)
    strings = [grammar.word_string(random) for _ in range(300)]
    statements = {text for template in grammar.STATEMENTS for text in grammar.expand(template)}
    assert not any(f" {text} " in f" {string} " for text in statements for string in strings)
    assert sum(len(set(string.split())) < len(string.split()) for string in strings) > 200


def test_codes_are_kept_for_the_codec_that_made_them(tmp_path):
    """What is read back is what was encoded, row by row; other recordings, as many, and another
    codec do not meet it.
    """
    spoken, codec = corpus.sample_recordings(held_out=True), Codec(TINY.codec)
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


@pytest.mark.slow
def test_english_words_where_there_is_room_for_them():
    """None for tiny, whose corpora stay as they are. Small's come in pieces; a tenth is never
    trained on.
    """
    assert english(TINY.thinker.tokens) == ((), ())
    words, known = english(SMALL.thinker.tokens), world_tokenizer(SMALL.thinker.tokens)
    assert not set(words.trained) & set(words.held_out)
    assert 0.05 < len(words.held_out) / len(sum(words, ())) < 0.15
    own = {
        word for text in [*grammar.statements(), *grammar.all_questions()] for word in text.split()
    }
    assert not own & {*words.trained, *words.held_out, "say"}
    jobs = [job.text for _, job in corpus.speaking_jobs(words) + corpus.listening_jobs(words)]
    said = {word for text in jobs for word in text.split()}
    assert set(words.trained) <= said
    assert not said & set(words.held_out)
    pieces = {piece for word in said for piece in known.encode(f" {word}")}
    foreign = [word for word in words.held_out if not set(known.encode(f" {word}")) <= pieces]
    assert len(foreign) < 0.05 * len(
        words.held_out
    )  # of the others every piece has been heard and said
    tested = [job.text for _, job in corpus.evaluation_jobs(words)][len(corpus.evaluation_jobs()) :]
    assert len(tested) == 96
    assert not set(tested) & set(jobs)
    assert corpus.evaluation_jobs(words)[: -len(tested)] == corpus.evaluation_jobs()


def test_no_trained_sentence_is_held_out():
    trained, held = (
        set(corpus.all_statements(held_out=False)),
        set(corpus.all_statements(held_out=True)),
    )
    assert not trained & held
    assert 0.05 < len(held) / len(trained | held) < 0.15
    said = {job.text for _, job in corpus.speaking_jobs()} | {
        job.text.removeprefix("say ") for _, job in corpus.listening_jobs()
    }
    assert not said & held
    words = {word for text in trained for word in text.split()}
    assert {
        word for text in held for word in text.split()
    } <= words  # what no recording has cannot be learned
    tested = {job.text.removeprefix("say ") for _, job in corpus.evaluation_jobs()} - set(
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
    assert len(without) == corpus.LISTENING_STRINGS + corpus.LISTENING_FRAMED
    assert len(drawn) - len(without) == corpus.LISTENING_STATEMENTS
    assert {name for name, _ in without} == set(grammar.LISTENING_VOICES)
    assert set(grammar.WORDS) <= {word for _, text in without for word in text.split()}


def test_builder_keeps_to_its_side(tmp_path):
    for held in (False, True):
        builder, random = ExampleBuilder(TINY, tmp_path, held), Random(0)
        for kind in ("say-typed", "say-spoken"):
            assert all(
                grammar.is_held_out(builder.example(kind, random).answer) == held for _ in range(50)
            )
    train_digits, test_digits = (
        scenes.handwritten_digits(False)[0],
        scenes.handwritten_digits(True)[0],
    )
    assert len(train_digits) + len(test_digits) == 1797
    seen = {digit.tobytes() for digit in train_digits}
    assert (
        sum(digit.tobytes() in seen for digit in test_digits) < 3
    )  # the set itself repeats hardly any


def test_recordings_are_drawn_fairly_but_for_tests():
    builder, random, drawn = ExampleBuilder(TINY, CACHE), Random(0), 4000
    kinds = [
        corpus.sentence_kind(builder.recorded_text(random).removeprefix("say "))
        for _ in range(drawn)
    ]
    there = Counter(corpus.sentence_kind(text.removeprefix("say ")) for text in builder.spoken)
    for kind, count in there.items():
        share = (1 - corpus.BALANCED_SHARE) * count / len(
            builder.spoken
        ) + corpus.BALANCED_SHARE / len(there)
        assert kinds.count(kind) / drawn == pytest.approx(share, abs=0.03)
    assert ExampleBuilder(TINY, CACHE, held_out=True).weights is None


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
            asked = dict([(example.question, example.answer), *example.follow_ups])
            assert len(example.follow_ups) == more
            assert len(asked) == more + 1
            for question, seen in (
                ("what was there first", example.objects[0]),
                ("what was there last", example.objects[-1]),
            ):
                assert asked[question] == f"it was the {seen[0][0]} {seen[0][1]}"


def test_answers_agree_with_pictures():
    random = Random(3)
    for _ in range(50):
        example = scenes.random_scene(random)
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
    builder, random = ExampleBuilder(TINY, tmp_path), Random(0)
    dialogues = [
        builder.dialogue(kind, random) for kind in ("sync-typed", "scene-typed", "sync-typed")
    ]
    randoms = [random] * len(dialogues)
    inputs, answers = builder.collate(dialogues, randoms)
    moments = builder.frame_targets(dialogues, inputs, randoms)
    assert torch.equal(moments != IGNORE_INDEX, inputs.input_ids == TINY.thinker.tokens.audio)
    assert not ((moments != IGNORE_INDEX) & (answers != IGNORE_INDEX)).any()
    for row, dialogue in ((0, dialogues[0]), (2, dialogues[2])):
        example, said = dialogue[0], moments[row][moments[row] != IGNORE_INDEX]
        change = next(i for i, seen in enumerate(example.objects) if seen != example.objects[0])
        begins = example.clip[1][2 * change]
        for i, word in enumerate(said.tolist()):
            seen = example.objects[0 if i / 25 < begins else -1][0]
            assert builder.processor.tokenizer.decode([word]).strip() in seen[:2]


def test_a_picture_is_asked_about_several_times(tmp_path):
    builder = ExampleBuilder(TINY, tmp_path)
    dialogue = builder.dialogue("scene-typed", Random(2))
    assert 1 < len(dialogue) <= 4
    assert len({example.question for example in dialogue}) == len(dialogue)
    inputs, targets = builder.collate([dialogue], [Random(2)])
    answers = [builder.processor.tokenizer.encode(example.answer) for example in dialogue]
    assert targets[targets != IGNORE_INDEX].tolist() == [
        i for row in answers for i in (*row, builder.end)
    ]
    assert (
        (inputs.input_ids == TINY.thinker.tokens.image).sum()
        == 16
        == len(inputs.image_patches) // 4
    )


def test_long_examples_are_long(tmp_path):
    builder, random, words = ExampleBuilder(TINY, tmp_path), Random(0), 0
    for _ in range(5):
        dictation, clip = (builder.example(kind, random) for kind in ("hear-long", "video-long"))
        assert 1 < len(dictation.wave) / 16_000 <= 10
        words += len(dictation.answer.split())
        frames, seconds = clip.clip
        assert 10 <= seconds[-1] <= 60
        assert len(frames) == len(seconds) <= 64 == 2 * 32
        assert clip.answer.endswith(
            " ".join(clip.objects[0 if "first" in clip.question else -1][0][:2])
        )
    assert words > 50  # in five dictations: sentences have up to twelve


@pytest.mark.slow
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


def test_a_process_that_synthesizes_does_not_import_torch():
    code = "import sys, minomni.data.text_to_speech; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_word_error_by_hand():
    assert edit_distance(["a", "b", "c"], ["a", "x", "c", "d"]) == 2
    assert word_error_rate(
        [word_errors("a b", ["a", "b"]), word_errors("a b c d", [])]
    ) == pytest.approx(4 / 6)
