"""All processes: what an error says, fit to be shown. Its own code may fail."""

from contextlib import suppress

LONGEST_MESSAGE = 100_000
"""Characters of an error's message or traceback that the notebook is told."""


def note(error: BaseException, text: str) -> None:
    """Add a note to an error, if it takes one: that of a frozen dataclass doesn't."""
    with suppress(Exception):
        error.add_note(text)


def message(error: BaseException) -> str:
    """What an error says, fit to be shown; its own code may fail."""
    try:
        return printable(str(error))
    except BaseException as failed:
        return f"(its message can't be had: {type(failed).__name__})"


def printable(text: str) -> str:
    """A text that any file, terminal or browser takes: lone surrogates are spelt out, and of a huge one the ends stay.

    Examples
    --------
    >>> printable("caf\\udce9")
    'caf\\\\udce9'
    """
    if len(text) > LONGEST_MESSAGE:
        half = LONGEST_MESSAGE // 2
        text = f"{text[:half]}\n... {len(text) - 2 * half:,} characters left out ...\n{text[-half:]}"
    return text.encode("utf-8", "backslashreplace").decode()
