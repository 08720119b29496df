"""The one error a person is meant to read."""

LONGEST_MESSAGE = 500  # characters


class UserError(ValueError):
    """One clear line: what was given, what was expected, what to do. The command line prints it and exits with 2.

    A message may quote names, values and other programs' errors. Whatever they hold, it stays one line that a terminal
    can print, of at most LONGEST_MESSAGE characters.
    """

    def __init__(self, message: str):
        super().__init__(shorten(message, LONGEST_MESSAGE))


def shorten(text: object, limit: int = 200) -> str:
    """What str() makes of `text`, on one line and of at most `limit` characters: its begin and its end.

    For names and values that a message quotes. Line feeds and other characters that no terminal shows come as escapes.
    """
    text = _without_middle(str(text), limit)  # cut before escaping: a text of a gigabyte takes no time
    if text.isprintable():
        return text
    return _without_middle("".join(map(_printable, text)), limit)


def _without_middle(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    tail = limit // 3
    return f"{text[: limit - tail - 3]}...{text[-tail:]}"


def _printable(character: str) -> str:
    """A character as it is, or its escape where a terminal could not show it: a line feed becomes \\n."""
    return character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
