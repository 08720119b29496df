"""The one error a person is meant to read."""


class UserError(ValueError):
    """One clear line: what was given, what was expected, what to do. The command line prints it and exits with 2."""
