"""Graders of the exercises: they accept the solution, refuse plausible bugs, and leave untouched stubs alone."""

import ast
import math
import runpy
import sys
import unicodedata
from collections import Counter
from pathlib import Path

import nbformat
import pytest
import torch
import torch.nn.functional as F

from minomni.check import grade, same, show

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


def pairs(words: dict, weighted: bool = True) -> Counter:
    """How often neighbours occur, or in how many words."""
    counts = Counter()
    for word, often in words.items():
        counts.update({pair: often * n if weighted else 1 for pair, n in Counter(zip(word, word[1:])).items()})
    return counts


def marked(row: list[str], who: str, begin: int, end: int) -> list[int]:
    """1 from `begin` tokens after the start of every turn of somebody to `end` tokens behind its <|im_end|>."""
    marks = [0] * len(row)
    for i in (i for i, token in enumerate(row) if row[i : i + 2] == ["<|im_start|>", who]):
        stop = row.index("<|im_end|>", i) if "<|im_end|>" in row[i:] else len(row) - 1
        marks[i + begin : stop + end] = [1] * len(marks[i + begin : stop + end])
    return marks


def taken(q, k, v, scale: float | None = None, repeat: bool = False) -> torch.Tensor:
    """What each head takes home: q [H, d], k and v [S, H_kv, d] -> [H, d]."""
    group = len(q) // k.shape[1]
    k, v = (x.repeat(1, group, 1) if repeat else x.repeat_interleave(group, 1) for x in (k, v))
    return F.scaled_dot_product_attention(q[:, None], k.transpose(0, 1), v.transpose(0, 1), scale=scale)[:, 0]


BUGS = {
    "00": {
        "samples_of": [lambda n, k, r: n * k * sum(r), lambda n, k, r: n * math.prod(r),
                       lambda n, k, r: n * k * 160, lambda n, k, r: n * k * max(r)],
        "clip_tokens": [lambda n, h, w, s: n // 2 * (h // 28) * (w // 28) + (-(-s // 160) + 1) // 4 + (4 if s else 2),
                        lambda n, h, w, s: n * (h // 28) * (w // 28) + (-(-s // 160) + 1) // 4 + (4 if s else 2),
                        lambda n, h, w, s: -(-n // 2) * (h // 28) * (w // 28) + s // 640 + (4 if s else 2),
                        lambda n, h, w, s: -(-n // 2) * (h // 28) * (w // 28) + (-(-s // 160) + 1) // 4 + 2],
        "fed": [lambda w, n: (w + ["over"] + ["silence"] * n)[:n], lambda w, n: (w[:-1] + ["silence"] * n)[:n],
                lambda w, n: (w[:-1] + ["over"] * n)[:n], lambda w, n: w[:-1] + ["over"] + ["silence"] * n],
        "placed": [lambda x, i, f, t: x.masked_scatter((i == t)[:, None], x[i == t] + f),
                   lambda x, i, f, t: torch.cat([f, x[len(f):]]),
                   lambda x, i, f, t: x.masked_scatter((i == t)[:, None], f.flip(0)),
                   lambda x, i, f, t: torch.cat([x[i != t], f])],
    },
    "01": {
        "tokens_of": [lambda n: (n // 160 + 1) // 4, lambda n: -(-n // 160) // 4, lambda n: -(-n // 640),
                      lambda n: n // 640],
        "decibels": [lambda v: 20 * (4 * v - 4), lambda v: 10 * (v - 1) / 4, lambda v: 4 * v - 4,
                     lambda v: 10 * 4 * v - 4],
        "heard_at": [lambda hz, rate: hz, lambda hz, rate: hz % (rate / 2), lambda hz, rate: abs(rate - hz),
                     lambda hz, rate: min(hz, rate - hz)],
        "floored": [lambda x: torch.maximum(x, x.max() - 8), lambda x: torch.maximum(x, x.amax(2, keepdim=True) - 8),
                    lambda x: x.clamp_min(-8), lambda x: torch.maximum(x, x.amin((1, 2), keepdim=True) + 8)],
        "frames_ready": [lambda n: n // 160, lambda n: max(0, (n - 400) // 160 + 1),
                         lambda n: max(0, (n - 199) // 160 + 1), lambda n: (n - 200) // 160 + 1,
                         lambda n: max(0, (n - 201) // 160 + 1)],
    },
    "05": {
        "unmerged": [lambda text: len(text), lambda text: len(text.encode()),
                     lambda text: len(unicodedata.normalize("NFC", text)),
                     lambda text: len(unicodedata.normalize("NFD", text).encode())],
        "next_merge": [lambda w: pairs(w).most_common(1)[0][0], lambda w: min(pairs(w)),
                       lambda w: max((n, pair) for pair, n in pairs(w).items())[1],
                       lambda w: min((-n, pair) for pair, n in pairs(w, weighted=False).items())[1],
                       lambda w: min((-n, pair) for word, n in w.items() for pair in zip(word, word[1:]))[1]],
        "learns": [lambda row: marked(row, "assistant", 3, 0), lambda row: marked(row, "assistant", 0, 1),
                   lambda row: marked(row, "assistant", 2, 0), lambda row: marked(row, "assistant", 3, 2),
                   lambda row: marked(row, "user", 3, 1), lambda row: [1] * len(row)],
        "showable": [lambda data: len(data), lambda data: len(data.decode(errors="ignore")),
                     lambda data: len(data.decode(errors="replace").encode()),
                     lambda data: sum(byte < 128 for byte in data)],
    },
    "06": {
        "id_after": [lambda s, r, c: s + r * c, lambda s, r, c: s + max(r, c) - 1, lambda s, r, c: s + c,
                     lambda s, r, c: s + 1],
        "time_id": [lambda s, t: s + round(t * 25), lambda s, t: s + math.ceil(t * 25), lambda s, t: s + int(t) * 25,
                    lambda s, t: int(t * 25), lambda s, t: s + int(t * 50)],
        "axis_of": [lambda j, s: 0 if j < s[0] else 1 if j < s[0] + s[1] else 2, lambda j, s: j % 3,
                    lambda j, s: 0 if j // 2 < s[0] else 1 if j // 2 < s[0] + s[1] else 2,
                    lambda j, s: 0 if j % sum(s) <= s[0] else 1 if j % sum(s) <= s[0] + s[1] else 2],
        "dealt": [lambda v, a: "v" * v + "a" * a,
                  lambda v, a: "".join("vv" + "a" * 50 for _ in range(max(v // 2, a // 50))),
                  lambda v, a: "".join("v" * min(2, max(0, v - 2 * i)) + "a" * min(50, max(0, a - 50 * i))
                                       for i in range(-(-v // 2))),
                  lambda v, a: "".join("a" * min(50, max(0, a - 50 * i)) + "v" * min(2, max(0, v - 2 * i))
                                       for i in range(max(-(-v // 2), -(-a // 50))))],
        "woven": [lambda x, s: x[0], lambda x, s: x.mean(0),
                  lambda x, s: torch.cat([p[2 - i] for i, p in enumerate(x.split(s, -1))], -1),
                  lambda x, s: torch.cat([x[i, :, :n] for i, n in enumerate(s)], -1)],
    },
    "07": {
        "whose_keys": [lambda h, heads, shared: h % shared, lambda h, heads, shared: h // shared,
                       lambda h, heads, shared: h * shared // (heads - 1)],
        "seen_by": [lambda i, real: [*range(i + 1)], lambda i, real: [j for j in range(i + 1) if real[j]],
                    lambda i, real: [j for j in range(len(real)) if real[j] or j == i],
                    lambda i, real: [j for j in range(i) if real[j]]],
        "normed": [lambda x, w, e: w * x / (x.pow(2).sum(-1, keepdim=True) + e).sqrt(),
                   lambda x, w, e: w * x / (x.pow(2).mean() + e).sqrt(),
                   lambda x, w, e: w * x / (x.pow(2).mean(-1, keepdim=True).sqrt() + e),
                   lambda x, w, e: F.layer_norm(x, w.shape, w, eps=e),
                   lambda x, w, e: x / (x.pow(2).mean(-1, keepdim=True) + e).sqrt()],
        "one_more": [lambda q, k, v: taken(q, k, v, scale=1), lambda q, k, v: taken(q, k, v, scale=q.shape[1] ** -1),
                     lambda q, k, v: taken(q, k.flip(1), v.flip(1)), lambda q, k, v: taken(q, k[:-1], v[:-1]),
                     lambda q, k, v: taken(q, k, v, repeat=True)],
    },
}
EXERCISES = [(number, name) for number, exercises in BUGS.items() for name in exercises]


def stubs(cell) -> list[str]:
    """Names of the functions that a cell leaves to its reader."""
    return [node.name for node in ast.parse(cell.source).body
            if isinstance(node, ast.FunctionDef) and ast.unparse(node.body) == "..."]


def read(number: str):
    return nbformat.read(next(NOTEBOOKS.glob(f"{number}_*.ipynb")), as_version=4).cells


def solutions(number: str) -> dict:
    return runpy.run_path(str(NOTEBOOKS / "solutions" / f"{number}.py"))


@pytest.fixture
def verdict(monkeypatch, capsys):
    """verdict(number, name, answer): what the notebook's own grader prints about an answer; None leaves the stub."""
    monkeypatch.chdir(NOTEBOOKS)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def judge(number, name, answer=None):
        codes = [cell for cell in read(number) if cell.cell_type == "code"]
        grader = ast.parse(next(cell.source for cell in codes if name in stubs(cell)))
        names = {}
        exec(codes[0].source, names)
        if answer is not None:
            grader.body = [node for node in grader.body if getattr(node, "name", "") != name]
            names[name] = answer
        capsys.readouterr()
        exec(compile(grader, name, "exec"), names)
        return capsys.readouterr().out

    return judge


@pytest.mark.parametrize("number, name", EXERCISES)
def test_the_solution_passes_and_the_stub_is_left_alone(number, name, verdict):
    assert "✓" in verdict(number, name, solutions(number)[name])
    assert verdict(number, name).endswith(": not attempted\n")


@pytest.mark.parametrize("number, name", EXERCISES)
def test_bugs_are_refused(number, name, verdict):
    bugs = BUGS[number][name]
    assert len(bugs) >= 3
    assert [i for i, bug in enumerate(bugs) if "✗" not in verdict(number, name, bug)] == []


def test_every_exercise_is_tested_and_its_folded_solution_is_the_tested_one():
    numbers = [path.name[:2] for path in sorted(NOTEBOOKS.glob("*.ipynb"))]
    assert numbers == list(BUGS)
    for number in numbers:
        cells = read(number)
        asked = [name for cell in cells if cell.cell_type == "code" for name in stubs(cell)]
        assert asked == list(BUGS[number])
        source = (NOTEBOOKS / "solutions" / f"{number}.py").read_text()
        text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef):
                assert ast.get_source_segment(source, node) in text, f"{number} folds another {node.name}"


def test_grade_shows_the_first_counter_example(capsys):
    grade(lambda x: 2 * x, ((0,), 0), ((1,), 3), ((2,), 9), minutes=1, difficulty=1)
    assert capsys.readouterr().out == "<lambda> (1 min, ★☆☆): ✗ <lambda>(1) gave 2, expected 3\n"
    grade(lambda x: x[5], (([1],), 0), minutes=1, difficulty=1)
    assert "raised IndexError" in capsys.readouterr().out
    grade(lambda x: "two", ((1,), 2), minutes=1, difficulty=1)
    assert "gave 'two', expected 2" in capsys.readouterr().out


def test_grade_keeps_its_cases_from_being_changed(capsys):
    x = torch.ones(2)
    grade(lambda t: t.mul_(2), ((x,), [2.0, 2.0]), ((x,), [2.0, 2.0]), minutes=1, difficulty=1)
    assert "✓ 2 cases" in capsys.readouterr().out and x.tolist() == [1, 1]


def test_same_states_what_was_met_and_raises_on_any_difference(capsys):
    same("x", torch.ones(2, 3), torch.ones(2, 3) + 1e-7)
    same("n", [1, 2], torch.tensor([1, 2]))
    assert capsys.readouterr().out == "x [2, 3] same ✓ (max|Δ| ≤ 1e-6)\nn [2] same ✓ (every number)\n"
    x = torch.ones(2)
    for mine, theirs, complaint in ((x, x, "itself"), (x, torch.ones(3), "shape"), (x, x + 1e-5, "expected"),
                                    ([1, 2], [1, 3], r"2 at \[1\], expected 3"), (x * math.nan, x, "nan")):
        with pytest.raises(AssertionError, match=complaint):
            same("x", mine, theirs)


def test_show_prints_the_file(capsys):
    show(same)
    assert capsys.readouterr().out.startswith("def same(name: str, mine, theirs")
