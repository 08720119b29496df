"""The one error a person is meant to read."""

LONGEST = 500  # characters of a message


class UserError(ValueError):
    """One clear line: what was given, what was expected, what to do. The command line prints it and exits with 2.

    A message may quote names, values and other programs' errors. Whatever they hold, it stays one line that a terminal
    can print, of at most LONGEST characters.
    """

    def __init__(self, message: str):
        super().__init__(one_line(message))


def one_line(text: str, longest: int = LONGEST) -> str:
    """Text with line feeds, control characters and halves of surrogate pairs escaped, and its middle left out if it is
    longer than `longest` characters."""
    text = str(text)
    if len(text) > longest:
        tail = longest // 3
        text = f"{text[: longest - tail - 5]} ... {text[len(text) - tail :]}"
    if not text.isprintable():
        text = "".join(map(_printable, text))
    return text if len(text) <= longest else f"{text[: longest - 4]} ..."


def _printable(letter: str) -> str:
    """A character as it is, or its escape where a terminal could not show it: a line feed becomes \\n."""
    if letter.isprintable():
        return letter
    return " " if letter.isspace() and letter not in "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029\t" else ascii(letter)[1:-1]
