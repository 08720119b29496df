"""Loading some parts of a model: the rest is neither read from the disk nor kept in memory."""

from minomni.errors import UserError, quote
from minomni.thinker.thinker import ENCODER_NAMES

# By the beginning of the tensors' names. The text decoder, "text", is always loaded.
PREFIXES = {
    **{part: (f"thinker.{name}.",) for part, name in ENCODER_NAMES.items()},
    "speech": ("talker.", "token2wav.", "codec."),
}
ENCODERS = tuple(f"thinker.{name}." for name in ENCODER_NAMES.values())  # of their tensors


def parse_parts(text: str | None) -> tuple[str, ...]:
    """What load(parts=) and --parts say -> the parts that are left out, of PREFIXES.

    None leaves nothing out. Raises UserError for anything but text and the names of parts.
    """
    if text is None:
        return ()
    first, *others = text.split("+") if isinstance(text, str) else [""]
    repeated = len(set(others)) < len(others)
    if first != "text" or repeated or not set(others) <= PREFIXES.keys():
        raise UserError(
            f"parts is {quote(text)}; expected text, and behind it +audio, +vision or +speech for "
            f"what is loaded besides, as in text+audio+speech"
        )
    return tuple(part for part in PREFIXES if part not in others)


def prefixes_of(parts: tuple[str, ...]) -> tuple[str, ...]:
    """The beginnings of the names of these parts' tensors."""
    prefixes: list[str] = []
    for part in parts:
        prefixes += PREFIXES[part]
    return tuple(prefixes)
