"""UserError, the one exception whose message is written for the user."""

MAX_MESSAGE_LENGTH = 500  # characters


class UserError(ValueError):
    """One line: what was given, what was expected, what to do. The command line prints it and exits
    with exit_code.

    Whatever names, values and errors of other programs a message quotes, it stays one printable
    line of at most MAX_MESSAGE_LENGTH characters.
    """

    exit_code = 2

    def __init__(self, message: str):
        super().__init__(shorten(message, MAX_MESSAGE_LENGTH))


class Terminated(UserError):
    """A process that was ended by SIGTERM, and the line that says how to go on."""

    exit_code = 128 + 15  # as shells show the end by this signal


class OutOfMemory(UserError):
    """The memory of a device does not hold what was asked for."""


def shorten(value: object, limit: int = 200) -> str:
    """str(value) on one printable line of at most `limit` characters: its beginning and its end.

    For names and values that a message quotes. Line feeds and other unprintable characters become
    escape sequences.
    """
    try:
        text = str(value)
    except ValueError:  # Python prints no integer of more than 4,300 digits
        text = "a very large number"
    # Cut before escaping, too, so that a string of a gigabyte takes no time.
    return cut_middle(escape(cut_middle(text, limit)), limit)


def short_path(path: object) -> str:
    """A path for an error message: on one line, its beginning and its end if it is long."""
    return shorten(path, 160)


def quote(value: object, limit: int = 60) -> str:
    """An argument for an error message: its repr, or only the type of collections and objects."""
    if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():
        value = value.item()  # type: ignore[attr-defined]
    if not isinstance(value, (str, int, float, type(None))):
        return f"a {type(value).__name__}"
    return quote_json(value, limit)


def quote_json(value: object, limit: int = 80) -> str:
    """A value of a JSON file for an error message: its repr, at most `limit` characters."""
    if isinstance(value, (list, tuple, dict)) and len(value) > limit:
        return f"a {type(value).__name__} of {len(value)} entries"
    if isinstance(value, str):
        value = value[: 2 * limit]
    try:
        return shorten(repr(value), limit)
    except ValueError:  # Python prints no integer of more than 4,300 digits
        return "a very large number"


def escape(text: str) -> str:
    """The text with unprintable characters as escape sequences, such as \\n or \\x1b."""
    pieces = []
    for character in text:
        if character.isprintable():
            pieces.append(character)
        else:
            pieces.append(character.encode("unicode_escape").decode("ascii"))
    return "".join(pieces)


def cut_middle(text: str, limit: int) -> str:
    """The text, or its beginning and its end around "..." where it has more than `limit`
    characters.
    """
    if len(text) <= limit:
        return text
    tail = limit // 2
    return f"{text[: limit - tail - 3]}...{text[-tail:]}"
