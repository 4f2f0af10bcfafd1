"""What leaves the program for a terminal, or as JSON.

Names of classes, files and data sets, and errors that quote them, may come from strangers.
`visible` escapes what a terminal obeys and what a reader cannot see; every line that is printed
goes through it. The rest is standard output where it leads to a full disk, or to a reader that has
seen enough.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import sys
import unicodedata
from collections.abc import Iterator
from typing import Any, TextIO

from resnet_jax.errors import ConfigError, one_line

_ZERO_WIDTH_JOINER = "\u200d"
# Characters that are letters or marks by their category and take no ink.
_INVISIBLE = frozenset(
    "\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u3164\uffa0"
    + "".join(map(chr, [*range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0)]))
)
_EMOJI_STYLE = "\ufe0f"
_SKIN_TONES = "\U0001f3fb\U0001f3fc\U0001f3fd\U0001f3fe\U0001f3ff"


def visible(text: object, keep: str = "") -> str:
    """Escapes control characters and characters that hide or reorder text.

    Escaped are control and format characters (ESC, BEL, C1, bidirectional and zero-width ones),
    line breaks, spaces other than " ", lone surrogates (bytes of a file name that are no text),
    and letters and marks without ink. What joins emoji stays. A backslash is not escaped, so the
    result is for people; it is the same if it is escaped once more.

    Args:
      text: A name or a message; of another object, its string.
      keep: Control characters to leave, such as "\\n".

    Returns:
      The text with \\xHH, \\uHHHH or \\UHHHHHHHH in place of those characters.

    Example:
      >>> print(visible("caf\u00e9 \x1b[2J\u202e"))
      café \\x1b[2J\\u202e
    """
    text = str(text)
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        each if each in keep or _is_visible(text, place) else _escaped(each)
        for place, each in enumerate(text)
    )


def _is_visible(text: str, place: int) -> bool:
    each, before, after = text[place], text[max(0, place - 1) : place], text[place + 1 : place + 2]
    if each == _ZERO_WIDTH_JOINER:
        is_styled = before in (_EMOJI_STYLE, *_SKIN_TONES) and _is_visible(text, place - 1)
        return (is_styled or _is_emoji(before)) and _is_emoji(after)
    if each == _EMOJI_STYLE:
        is_keycap = before in tuple("0123456789#*") and after == "\u20e3"
        return is_keycap or _is_emoji(before)
    return each.isprintable() and each not in _INVISIBLE


def _is_emoji(each: str) -> bool:
    return each != "" and unicodedata.category(each) == "So"


def _escaped(each: str) -> str:
    return each.encode("unicode_escape").decode("ascii")


def columns(text: str) -> int:
    """The columns that a text takes in a terminal.

    Args:
      text: Without control characters.

    Returns:
      Their number: two for a wide character, such as those of Chinese; none for an accent that
      stands above another character.

    Example:
      >>> columns("cat"), columns("\u6f22\u5b57"), columns("e\u0301")
      (3, 4, 1)
    """
    if text.isascii():
        return len(text)
    return sum(map(_columns, text))


def _columns(each: str) -> int:
    if each == _ZERO_WIDTH_JOINER or unicodedata.category(each) in ("Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(each) in "WF" else 1


def padded(text: str, width: int) -> str:
    """Adds spaces at the end of a text up to a number of columns; a longer one stays as it is."""
    return text + " " * (width - columns(text))


def json_text(value: Any, indent: int | None = None) -> str:
    """JSON that any reader takes and that is harmless in a terminal.

    Args:
      value: Of dictionaries, sequences, text, numbers, bools and None.
      indent: Spaces for each level; None: all in one line.

    Returns:
      ASCII text, from which a reader gets the exact names. A number that JSON cannot express (NaN
      and the infinities) is null.

    Example:
      >>> print(json_text({"name": "\x9b\u202e", "loss": float("nan")}))
      {"name": "\\u009b\\u202e", "loss": null}
    """
    return json.dumps(_expressible(value), allow_nan=False, indent=indent)


def _expressible(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _expressible(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_expressible(each) for each in value]
    return value


def show(text: object) -> None:
    """Prints a result: lines on standard output, without what a terminal obeys.

    Example:
      >>> show("a\\tb\\nc")
      a\\tb
      c
    """
    print(visible(text, keep="\n"))


def log(line: object, stream: TextIO | None = None) -> None:
    """Prints a line for the person who watches, on standard error or another stream."""
    print(visible(line), file=stream or sys.stderr, flush=True)


@contextlib.contextmanager
def printing() -> Iterator[None]:
    """Brings what is printed in the block to its end.

    A reader that has gone (`| head`) is no mistake.

    Raises:
      ConfigError: It cannot be written.

    Example:
      >>> with printing():
      ...     print("one line")
      one line
    """
    # In a terminal of few characters the others are shown as their numbers.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        _discard()
    except OSError as error:
        if error.filename is not None:  # of a file, not of this stream
            raise
        _discard()
        raise ConfigError(f"standard output cannot be written ({one_line(error)})") from error


def print_copy(line: str) -> None:
    """Prints a line that is not lost without it: it is also in a file.

    Args:
      line: The line.

    Example:
      >>> print_copy("top-1 98.89%")
      top-1 98.89%
    """
    with contextlib.suppress(ConfigError), printing():
        show(line)


def _discard() -> None:
    """What still waits to be written goes nowhere; else Python would try again at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
