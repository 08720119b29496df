"""UserError, the one exception whose message is written for the user."""

LONGEST_MESSAGE = 500  # characters


class UserError(ValueError):
    """One line: what was given, what was expected, what to do. The command line prints it and exits
    with status 2.

    Whatever names, values and errors of other programs a message quotes, it stays one printable
    line of at most LONGEST_MESSAGE characters.
    """

    def __init__(self, message: str):
        super().__init__(shorten(message, LONGEST_MESSAGE))


def shorten(value: object, limit: int = 200) -> str:
    """str(value) on one printable line of at most `limit` characters: its beginning and its end.

    For names and values that a message quotes. Line feeds and other unprintable characters become
    escape sequences.
    """
    try:
        text = str(value)
    except ValueError:  # Python prints no integer of more than 4,300 digits
        text = "a very large number"
    # Cut before escaping, too, so that a text of a gigabyte takes no time.
    return cut_middle(escape(cut_middle(text, limit)), limit)


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
