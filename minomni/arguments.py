"""Checks of user arguments; each failure is one UserError that names the argument. No PyTorch, as
--help imports this file.
"""

import math
from numbers import Integral, Real

from minomni.errors import UserError, quote

SEEDS = (0, 2**63 - 1)


def check_int(value, name: str, lowest: int, highest: int) -> int:
    """An int of Python or numpy from lowest to highest; bool is not accepted. Raises UserError."""
    is_integer = isinstance(value, Integral) and not isinstance(value, bool)
    if not is_integer or not lowest <= value <= highest:
        raise UserError(
            f"{name} is {quote(value)}; expected a whole number from {lowest} to {highest}"
        )
    return int(value)


def check_number(value, name: str, lowest: float = -math.inf, highest: float = math.inf) -> float:
    """A finite number of Python or numpy from lowest to highest; bool is not accepted. Raises
    UserError.
    """
    result = math.nan
    if isinstance(value, Real) and not isinstance(value, bool):
        try:
            result = float(value)
        except OverflowError:  # an integer beyond the range of float
            result = math.inf
    if not lowest <= result <= highest or math.isinf(result):
        bounds = f" from {lowest:g} to {highest:g}" if math.isfinite(highest) else ""
        raise UserError(f"{name} is {quote(value)}; expected a finite number{bounds}")
    return result


def check_bool(value, name: str) -> bool:
    """True or False, of Python or numpy. Raises UserError."""
    # numpy's type is called bool_ before version 2 and bool since.
    if not isinstance(value, bool) and type(value).__name__ not in ("bool_", "bool"):
        raise UserError(f"{name} is {quote(value)}; expected True or False")
    return bool(value)


def check_seed(value) -> int:
    """The random seed of one answer; None is the default, 0. Raises UserError."""
    if value is None:
        return 0
    lowest, highest = SEEDS
    return check_int(value, "seed", lowest, highest)
