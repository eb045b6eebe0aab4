"""Errors in the source of a grammar."""


class SourceError(Exception):
    """The source is not valid, not supported or too large; the message says what and where."""

    def __init__(self, problem: str, where: str = "") -> None:
        shown = where if len(where) <= 200 else f"{where[:100]}...{where[-60:]}"
        super().__init__(f"{shown}: {problem}" if where else problem)


class TooLargeError(SourceError):
    """All of it together is too large, so no part of it can be blamed or left out."""
