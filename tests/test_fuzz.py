"""Damaged files of every kind are read: a well-formed answer or one clear line. How, and how to run
more: fuzz.py.
"""

import os
from random import Random

import pytest

pytest.importorskip("resource", reason="this system has no memory limits")

import fuzz  # noqa: E402

ANSWERS = {file: True for file, _, _ in fuzz.FILES}  # of the readers here to whole files
WHOLE = '{"a": [1, {"b": "text"}], "c": -0.5}'
CASES, SEED = int(os.environ.get("MINOMNI_FUZZ_CASES", 1000)), 1


@pytest.mark.slow
@pytest.mark.reads(
    "media",
    "files with flipped bits, cuts, splices and overwritten lengths",
    "read, or refused within 20 s and 2 GB",
)
def test_damaged_files_give_well_formed_answers_or_one_line():
    result = fuzz.fuzz(CASES, SEED)
    assert not result.faults, result.report(SEED)
    counted = sum(result.counts.values(), fuzz.Counter())
    assert counted.total() == CASES
    assert set(result.counts) == {file for file, _, _ in fuzz.FILES}
    assert counted["right"] > CASES / 10
    assert counted["refused"] > CASES / 10


class Planted:
    """Readers with faults, each in a file of its own."""

    def __init__(self, inputs, work):
        self.inputs, self.work = inputs, work
        work.mkdir(exist_ok=True)
        for file, _, _ in fuzz.FILES:
            (work / file).parent.mkdir(parents=True, exist_ok=True)
            (work / file).write_text(WHOLE)

    def sound(self, path):
        raise KeyError("x")

    def picture(self, path):
        return False

    def config(self, path):
        from minomni.errors import UserError

        class Long(UserError):
            def __str__(self):
                return "a\nb"

        raise Long("")

    film = tokenizer = voices = model = adapter = resume = data = lambda self, path: True


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A text in the place of every file: what is damaged matters to none of these tests."""
    folder = tmp_path_factory.mktemp("inputs")
    for file, _, _ in fuzz.FILES:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(WHOLE)
    return folder


def test_planted_faults_are_found(inputs, tmp_path):
    readers, kinds = Planted(inputs, tmp_path / "work"), {}
    for number in range(200):
        outcome = fuzz.run_case(readers, 3, number, ANSWERS)
        kinds.setdefault(dict(fuzz.ROUND)[outcome.file], set()).add(
            (outcome.kind, outcome.what[:16])
        )
    assert kinds["sound"] == {("fault", "KeyError in a li")}
    assert kinds["picture"] == {("fault", "a wrong answer")}
    assert kinds["config"] == {("fault", "a message of 3 c")}
    assert kinds["film"] == {("right", "")}


class Plays(Planted):
    """Readers that give what is in a file, and take whatever is there for whole."""

    def sound(self, path):
        return path.read_bytes() or b"nothing"

    film = picture = config = tokenizer = voices = model = adapter = resume = data = sound


def test_wrong_answers_are_found_where_the_right_one_is_known(inputs, tmp_path):
    readers = Plays(inputs, tmp_path / "work")
    answers, whole, seen = fuzz.whole_answers(readers), WHOLE.encode(), {}
    wrong = {file: b"wrong" for file in answers}
    for number in range(400):
        file, _, content = fuzz.case_of(9, number, inputs)
        cut = content != whole and whole.startswith(content)
        told = file.endswith((".wav", ".flac", ".png", ".jpg", ".webp", ".mp4", ".mkv", ".webm"))
        outcome = fuzz.run_case(readers, 9, number, answers)
        assert outcome.what == (
            "an answer to what is left of a cut file" if cut and told else ""
        ), (file, content)
        seen[cut, told] = seen.get((cut, told), 0) + 1
        if content == whole:
            assert (
                fuzz.run_case(readers, 9, number, wrong).what
                == "another answer to the same content"
            )
            seen["same"] = True
    assert len(seen) == 5
    assert min(seen.values()) > 0


class Hostile(Planted):
    """Readers that end their process, never end, or take 3 GB when they are given damaged files."""

    def film(self, path):
        if path.read_text(errors="replace") != WHOLE:
            os.abort()
        return True

    def data(self, path):
        while path.read_text(errors="replace") != WHOLE:
            pass
        return True

    def voices(self, path):
        return path.read_text(errors="replace") == WHOLE or len(bytearray(3 * 2**30)) > 0

    sound = picture = config = lambda self, path: True


@pytest.mark.slow
def test_crashes_hangs_and_memory_are_found_and_the_rest_goes_on(inputs, monkeypatch):
    monkeypatch.setattr(fuzz, "CPU_SECONDS", 1)
    seen = {}
    for number in range(200):
        file, reader, content = fuzz.case_of(5, number, inputs)
        if reader in ("film", "data", "voices", "tokenizer") and content != WHOLE.encode():
            seen.setdefault(reader, number)
    for reader, number in seen.items():
        result = fuzz.run_cases(range(number, number + 1), 5, inputs, Hostile)
        what = [fault.what for fault in result.faults]
        expected = {
            "film": "the process died (-6)",
            "data": "no end",
            "voices": "MemoryError",
            "tokenizer": None,
        }[reader]
        assert len(what) == (expected is not None), (reader, what)
        assert all(expected in text for text in what), (reader, what)
    assert len(seen) == 4


def test_a_case_is_the_same_every_time(inputs):
    cases = [fuzz.case_of(7, number, inputs) for number in range(300)]
    assert cases == [fuzz.case_of(7, number, inputs) for number in range(300)]
    whole = (inputs / "data/rows.json").read_bytes()
    assert sum(content != whole for _, _, content in cases) > 280
    assert len({content for *_, content in cases}) > 200


def test_values_of_json_are_replaced_and_stay_json(inputs):
    import json

    random, seen = Random(0), set()
    for _ in range(300):
        changed = fuzz.other_value(WHOLE.encode(), "x.json", random)
        seen.add(changed[:200])
        if (
            changed.count(b"[") < 10
            and changed.count(b"{") < 10
            and b"[[[" not in changed
            and b"{{{" not in changed
        ):
            json.loads(changed)
    assert len(seen) > 60
