"""Checks for the notebooks: live source, equality that raises, and graders for exercises."""

import copy
import dis
import inspect
import runpy
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os.path import commonprefix
from pathlib import Path
from textwrap import dedent
from typing import Any

import torch
from torch import Tensor

STARS = {1: "★☆☆", 2: "★★☆", 3: "★★★"}
DOTS = {1: "●○○", 2: "●●○", 3: "●●●"}
CUT = "# ..."  # stands for lines that show() leaves out
WHOLE = 12  # elements of a tensor that a grader prints whole
LONG = 120  # characters of a value that a grader prints
BEFORE = 20  # characters before a difference that it prints of longer values


@dataclass
class Gradient:
    """A gradient that grade() expects: of the answer's sum, with respect to the first argument."""

    expected: Any


def show(*objects: Any, begin: str = "", end: str = "") -> None:
    """Print the current source of functions, classes or modules, so that no page is out of date.

    In a notebook it is highlighted, by a Markdown block that GitHub renders too. begin, end: show
    the part from the first line that contains `begin` to the one before the next that contains
    `end`; CUT stands for the rest. Raises ValueError if there is no such line.
    """
    sources = [source_of(thing, begin, end) for thing in objects]
    source = "\n\n\n".join(sources)
    if not _in_ipython():
        print(source)
        return
    from IPython.display import display

    display({"text/markdown": f"```python\n{source}\n```", "text/plain": source}, raw=True)


def source_of(thing: Any, begin: str = "", end: str = "") -> str:
    """The source that show() prints of one object."""
    source = dedent(inspect.getsource(inspect.unwrap(thing))).rstrip()
    lines = source.splitlines()
    first = _line_with(begin, lines, 0) if begin else 0
    last = _line_with(end, lines, first + 1) if end else len(lines)
    part = "\n".join(lines[first:last]).rstrip()
    indent = " " * (len(lines[first]) - len(lines[first].lstrip()))
    if begin:
        part = f"{indent}{CUT}\n{part}"
    if end:
        inner = " " * (len(lines[last]) - len(lines[last].lstrip()))
        part = f"{part}\n{inner}{CUT}"
    return part


def _line_with(text: str, lines: list[str], first: int) -> int:
    """The index of the first line from `first` on that contains a text."""
    for i in range(first, len(lines)):
        if text in lines[i]:
            return i
    raise ValueError(f"show: no line contains {text!r}; give a part of a line that is there")


def _in_ipython() -> bool:
    """Whether this process is an IPython kernel or shell. Does not import IPython."""
    return "IPython" in sys.modules and sys.modules["IPython"].get_ipython() is not None


def same(name: str, mine: Any, theirs: Any, tolerance: float = 1e-6) -> None:
    """Print one line if two results agree, raise AssertionError with the worst difference if not.

    mine, theirs: tensors, arrays, numbers or nested lists of one shape; integers must agree
    exactly. The line states the tolerance and not the difference, so it is the same on every
    machine.
    """
    if mine is theirs:
        raise AssertionError(f"{name}: compared with itself, which proves nothing")
    mine = _tensor(mine)
    theirs = _tensor(theirs)
    problem = difference(mine, theirs, tolerance)
    if problem:
        raise AssertionError(f"{name}: {problem}")
    criterion = f"max|Δ| ≤ {tolerance:g}".replace("e-0", "e-")
    if is_exact(theirs):
        criterion = "every number"
    print(f"{name} {list(theirs.shape)} same ✓ ({criterion})")


def difference(mine: Tensor, theirs: Tensor, tolerance: float) -> str:
    """How two tensors differ, in one line: their shapes, or the worst element. Empty if equal."""
    if mine.shape != theirs.shape:
        return f"shape {list(mine.shape)}, expected {list(theirs.shape)}"
    if mine.numel() == 0:
        return ""
    error = (mine.double() - theirs.double()).abs()
    error = torch.where(mine == theirs, 0.0, error)  # equal infinities are equal
    error = error.nan_to_num(nan=float("inf"))
    if error.max() <= (0 if is_exact(theirs) else tolerance):
        return ""
    worst = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
    where = f" at {list(worst)}" if worst else ""
    return f"{mine[worst].item():g}{where}, expected {theirs[worst].item():g}"


def is_exact(x: Tensor) -> bool:
    """Whether x holds integers or booleans, which must agree exactly."""
    return not (x.is_floating_point() or x.is_complex())


def grade(
    function: Callable,
    *cases: tuple,
    minutes: int,
    difficulty: int,
    importance: int = 0,
    tolerance: float = 1e-4,
    chapter: str = "",
    keeps: bool = False,
    parts: Sequence[str] = (),
) -> Callable | None:
    """Print the state of an exercise: not attempted, ✗ with the first counter-example, or ✓.

    cases: (arguments, expected answer) or (arguments, expected answer, what the case is about);
    a Gradient instead of the expected answer holds the gradient instead. A stub whose body is
    `...` is not attempted. minutes: how long the exercise takes. difficulty, importance: 1 to
    3; 0 leaves the importance out. chapter: number of the notebook, of an exercise that later
    cells need. keeps: an answer that changes a tensor among its arguments is wrong. parts:
    names of the tensors of an answer that has several. -> the function that these cells use:
    the reader's if it passes, until then the solution in notebooks/solutions; None without a
    chapter.
    """
    head = f"{function.__name__} ({minutes} min, {STARS[difficulty]}"
    head += f", importance {DOTS[importance]})" if importance else ")"
    problem = ""
    if not _is_stub(function):
        problem = _counter_example(function, cases, tolerance, keeps, parts)
    if _is_stub(function):
        print(f"{head}: not attempted")
    elif problem:
        print(f"{head}: ✗ {problem}")
    else:
        print(f"{head}: ✓ {len(cases)} cases")
        return function if chapter else None
    return solution(chapter, function.__name__) if chapter else None


def solution(chapter: str, name: str) -> Callable:
    """The function of this name in notebooks/solutions of a checkout. Raises KeyError if none."""
    path = Path(__file__).parents[2] / "notebooks" / "solutions" / f"{chapter}.py"
    return runpy.run_path(str(path))[name]


def _is_stub(function: Callable) -> bool:
    """Whether the body of a function is nothing but `...`, with or without a docstring."""
    if not hasattr(function, "__code__"):
        return False
    steps = [step for step in dis.get_instructions(function) if step.opname != "RESUME"]
    names = [step.opname for step in steps]
    returns = names in (["RETURN_CONST"], ["LOAD_CONST", "RETURN_VALUE"])
    return returns and steps[0].argval is None


def _counter_example(
    function: Callable,
    cases: tuple[tuple, ...],
    tolerance: float,
    keeps: bool,
    parts: Sequence[str],
) -> str:
    """The first case that a function fails, in one line; empty if it passes all."""
    for arguments, expected, *names in cases:
        call = f"{function.__name__}({', '.join(map(_brief, arguments))})"
        about = f" ({names[0]})" if names else ""
        try:
            given = copy.deepcopy(arguments)
            if isinstance(expected, Gradient):
                answer, expected = _gradient(function, *given), expected.expected
            else:
                answer = function(*given)
        except Exception as error:  # unfinished code may raise anything: a counter-example too
            return f"{call} raised {type(error).__name__}: {error}{about}"
        if answer is None or answer is ...:
            return f"{call} returned nothing: is a `return` missing?{about}"
        problem = _wrong(answer, expected, tolerance, parts)
        if problem:
            return f"{call} gave {problem}{about}"
        changed = _changed(function, arguments, given) if keeps else ""
        if changed:
            return f"{call} is right, but has changed `{changed}` itself: work on a copy{about}"
    return ""


def _changed(function: Callable, before: tuple, after: tuple) -> str:
    """The first parameter whose tensor a call has changed; empty if none."""
    for name, old, new in zip(inspect.signature(function).parameters, before, after):
        if isinstance(old, Tensor) and not torch.equal(old, new):
            return name
    return ""


def _gradient(function: Callable, x: Tensor, *others: Any) -> Tensor | None:
    """The gradient of the sum of function(x, *others) with respect to x; 0 where none arrives.

    None for a function that returns nothing.
    """
    with torch.enable_grad():
        answer = function(x.requires_grad_(), *others)
        if not isinstance(answer, Tensor):
            return None
        total = answer.sum()
        found = torch.autograd.grad(total, x, allow_unused=True)[0] if total.requires_grad else None
    return torch.zeros_like(x) if found is None else found


def _wrong(answer: Any, expected: Any, tolerance: float, parts: Sequence[str] = ()) -> str:
    """How an answer differs from the expected one; empty if it does not."""
    if isinstance(expected, dict) or _has_text(expected):
        return "" if answer == expected else _mismatch(answer, expected)
    if isinstance(expected, tuple) and any(isinstance(part, Tensor) for part in expected):
        return _wrong_parts(answer, expected, tolerance, parts)
    try:
        mine, theirs = _tensor(answer), _tensor(expected)
        if mine.is_floating_point():
            theirs = theirs.to(mine.dtype)  # integers in a case stand for floats, too
        problem = difference(mine, theirs, tolerance)
    except (TypeError, ValueError, RuntimeError):
        return _mismatch(answer, expected)
    whole = mine.shape == theirs.shape and 1 < mine.numel() <= WHOLE
    return _mismatch(_rounded(mine), _rounded(theirs)) if problem and whole else problem


def _wrong_parts(answer: Any, expected: tuple, tolerance: float, names: Sequence[str]) -> str:
    """How the differing parts of an answer of several tensors differ."""
    if not isinstance(answer, (tuple, list)) or len(answer) != len(expected):
        return f"{type(answer).__name__}, expected {len(expected)} tensors"
    names = names or [f"part {i}" for i in range(len(expected))]
    problems = []
    for name, mine, theirs in zip(names, answer, expected, strict=True):
        problem = _wrong(mine, theirs, tolerance)
        if problem:
            problems.append(f"as {name}: {problem}")
    return "; ".join(problems)


def _rounded(x: Tensor) -> Tensor:
    """A tensor for reading: four decimals."""
    return x if is_exact(x) or x.is_complex() else (x.double() * 1e4).round() / 1e4


def _mismatch(answer: Any, expected: Any) -> str:
    """The answer and the expected one in one line; of long ones the part where they differ."""
    mine, theirs = _written(answer), _written(expected)
    begin = max(len(commonprefix([mine, theirs])) - BEFORE, 0)
    if max(len(mine), len(theirs)) <= LONG:
        begin = 0
    return f"{_cut(mine, begin)}, expected {_cut(theirs, begin)}"


def _has_text(x: Any) -> bool:
    """Whether x is a string or a nested list that holds one."""
    if isinstance(x, (list, tuple)):
        return any(map(_has_text, x))
    return isinstance(x, str)


def _tensor(x: Any) -> Tensor:
    return x.detach() if isinstance(x, Tensor) else torch.as_tensor(x)


def _brief(x: Any) -> str:
    """A value in at most LONG characters."""
    return _cut(_written(x))


def _written(x: Any) -> str:
    """A value as text, a long tensor as its shape. Floats of a tensor have four decimals."""
    if isinstance(x, Tensor) and x.numel() > WHOLE:
        return f"tensor{list(x.shape)}"
    if isinstance(x, Tensor):
        return str(_short(x.tolist()))
    return repr(x)


def _short(x: Any) -> Any:
    """Nested lists with their floats rounded to four decimals, smaller ones to two digits."""
    if isinstance(x, list):
        return [_short(part) for part in x]
    if isinstance(x, float):
        return round(x, 4) if abs(x) >= 0.001 else float(f"{x:.2g}")
    return x


def _cut(text: str, begin: int = 0) -> str:
    """At most LONG characters of a text, from `begin` on."""
    shown = f"...{text[begin:]}" if begin else text
    return shown if len(shown) <= LONG else shown[: LONG - 3] + "..."
