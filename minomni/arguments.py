"""Checks of what callers pass; a failure is one UserError that names the argument. No PyTorch:
--help needs them.
"""

import math
from numbers import Integral, Real

from minomni.errors import UserError

LONGEST = 60  # characters of a value that a message quotes
SEEDS = 0, 2**63 - 1


def shown(value) -> str:
    """A value as a message quotes it: at most LONGEST characters, and of collections and objects
    only the type.
    """
    if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():
        value = value.item()  # one of numpy's numbers
    if not isinstance(value, (str, int, float, type(None))):
        return f"a {type(value).__name__}"
    try:
        spelling = repr(value[:LONGEST] if isinstance(value, str) else value)
    except ValueError:  # Python spells no whole number of more than 4,300 digits
        return "a very large number"
    return spelling if len(spelling) <= LONGEST else f"{spelling[:LONGEST]}..."


def whole_number(value, name: str, lowest: int, highest: int) -> int:
    """An int of Python or numpy from lowest to highest; bool is none. Raises UserError."""
    if isinstance(value, bool) or not isinstance(value, Integral) or not lowest <= value <= highest:
        raise UserError(
            f"{name} is {shown(value)}; expected a whole number from {lowest} to {highest}"
        )
    return int(value)


def number(value, name: str, lowest: float = -math.inf, highest: float = math.inf) -> float:
    """A finite number of Python or numpy from lowest to highest; bool is none. Raises UserError."""
    try:
        given = (
            float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
        )
    except OverflowError:  # a whole number beyond all floats
        given = math.inf
    if not lowest <= given <= highest or math.isinf(given):
        bounds = f" from {lowest:g} to {highest:g}" if math.isfinite(highest) else ""
        raise UserError(f"{name} is {shown(value)}; expected a finite number{bounds}")
    return given


def flag(value, name: str) -> bool:
    """True or False, of Python or numpy. Raises UserError."""
    if not isinstance(value, bool) and type(value).__name__ not in (
        "bool_",
        "bool",
    ):  # bool_: numpy's name for it
        raise UserError(f"{name} is {shown(value)}; expected True or False")
    return bool(value)


def seed_of(value) -> int:
    """The seed of one answer; None is the default, 0. Raises UserError."""
    return 0 if value is None else whole_number(value, "seed", *SEEDS)
