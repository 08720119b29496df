"""The one error a person is meant to read."""


class UserError(ValueError):
    """One clear line: what was given, what was expected, what to do. The command line prints it and
    exits with 2.

    Whatever names, values and other programs' errors a message quotes, it stays one line that a
    terminal can print, of at most LONGEST_MESSAGE characters.
    """

    def __init__(self, message: str):
        super().__init__(shorten(message, LONGEST_MESSAGE))


LONGEST_MESSAGE = 500  # characters


def shorten(text: object, limit: int = 200) -> str:
    """What str() makes of `text`, on one line and of at most `limit` characters: its begin and its
    end.

    For names and values that a message quotes. Line feeds and other characters that no terminal
    shows come as escapes.
    """
    try:
        text = str(text)
    except ValueError:  # Python spells no whole number of more than 4,300 digits
        text = "a very large number"
    if len(text) > limit:  # cut before escaping: a text of a gigabyte takes no time
        tail = limit // 2
        text = f"{text[: limit - tail - 3]}...{text[-tail:]}"
    escaped = "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text
    )
    if len(escaped) > limit:
        tail = limit // 2
        escaped = f"{escaped[: limit - tail - 3]}...{escaped[-tail:]}"
    return escaped
