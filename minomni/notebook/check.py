"""What a notebook proves itself with: live source, equality that raises, and graders for its
exercises.
"""

import copy
import inspect
import sys
from collections.abc import Callable
from textwrap import dedent

import torch
from torch import Tensor

STARS = {1: "★☆☆", 2: "★★☆", 3: "★★★"}


def show(*objects) -> None:
    """Print the source of functions, classes or modules as it is on disk now, so that no page can
    go stale.

    In a notebook it comes with colours, through a Markdown block that GitHub shows too.
    """
    source = "\n\n\n".join(
        dedent(inspect.getsource(inspect.unwrap(thing))).rstrip() for thing in objects
    )
    if "IPython" not in sys.modules or sys.modules["IPython"].get_ipython() is None:
        print(source)
        return
    from IPython.display import display

    display({"text/markdown": f"```python\n{source}\n```", "text/plain": source}, raw=True)


def same(name: str, mine, theirs, tolerance: float = 1e-6) -> None:
    """Print one line if two results agree, raise AssertionError with the first difference if not.

    mine, theirs: tensors, arrays, numbers or nested lists of one shape; whole numbers must agree
    exactly. The line states the tolerance that was met and not the difference, so that it is equal
    on every machine.
    """
    if mine is theirs:
        raise AssertionError(f"{name}: compared with itself, which proves nothing")
    mine, theirs = _tensor(mine), _tensor(theirs)
    problem = difference(mine, theirs, tolerance)
    if problem:
        raise AssertionError(f"{name}: {problem}")
    met = "every number" if is_whole(theirs) else f"max|Δ| ≤ {tolerance:g}".replace("e-0", "e-")
    print(f"{name} {list(theirs.shape)} same ✓ ({met})")


def difference(mine: Tensor, theirs: Tensor, tolerance: float) -> str:
    """What sets two tensors apart, in one line; empty if nothing does."""
    if mine.shape != theirs.shape:
        return f"shape {list(mine.shape)}, expected {list(theirs.shape)}"
    if mine.numel() == 0:
        return ""
    gaps = (mine.double() - theirs.double()).abs()
    gaps = torch.where(mine == theirs, 0.0, gaps).nan_to_num(
        nan=float("inf")
    )  # equal infinities are equal
    if gaps.max() <= (0 if is_whole(theirs) else tolerance):
        return ""
    worst = tuple(int(i) for i in torch.unravel_index(gaps.argmax(), gaps.shape))
    place = f" at {list(worst)}" if worst else ""
    return f"{mine[worst].item():g}{place}, expected {theirs[worst].item():g}"


def is_whole(x: Tensor) -> bool:
    """Whether x holds integers or booleans, which no rounding excuses."""
    return not (x.is_floating_point() or x.is_complex())


def grade(
    function: Callable,
    *cases: tuple[tuple, object],
    minutes: int,
    difficulty: int,
    tolerance: float = 1e-4,
) -> None:
    """Print how an exercise stands: not attempted, ✗ with the first counter-example, or ✓.

    cases: pairs of (arguments, expected answer). An answer of None or `...` is what an untouched
    stub gives. minutes and difficulty (1 to 3) say what the exercise asks of its reader.
    """
    head = f"{function.__name__} ({minutes} min, {STARS[difficulty]})"
    for arguments, expected in cases:
        call = f"{function.__name__}({', '.join(map(_brief, arguments))})"
        try:
            answer = function(*copy.deepcopy(arguments))
        except (
            Exception
        ) as error:  # a reader's unfinished code may raise anything; it is a counter-example too
            print(f"{head}: ✗ {call} raised {type(error).__name__}: {error}")
            return
        if answer is None or answer is ...:
            print(f"{head}: not attempted")
            return
        problem = _wrong(answer, expected, tolerance)
        if problem:
            print(f"{head}: ✗ {call} gave {problem}")
            return
    print(f"{head}: ✓ {len(cases)} cases")


def _wrong(answer, expected, tolerance: float) -> str:
    """How an answer misses what was expected; empty if it does not."""
    if isinstance(expected, (str, dict)) or _has_text(expected):
        return "" if answer == expected else f"{_brief(answer)}, expected {_brief(expected)}"
    try:
        return difference(_tensor(answer), _tensor(expected), tolerance)
    except (TypeError, ValueError, RuntimeError):
        return f"{_brief(answer)}, expected {_brief(expected)}"


def _has_text(x) -> bool:
    return isinstance(x, (list, tuple)) and any(
        isinstance(item, str) or _has_text(item) for item in x
    )


def _tensor(x) -> Tensor:
    return x.detach() if isinstance(x, Tensor) else torch.as_tensor(x)


def _brief(x) -> str:
    """A value on part of a line."""
    if isinstance(x, Tensor) and x.numel() > 8:
        return f"tensor{list(x.shape)}"
    if isinstance(x, Tensor):
        return str(x.tolist())
    text = repr(x)
    return text if len(text) <= 60 else text[:57] + "..."
