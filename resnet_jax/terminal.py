"""Safe output to a terminal or as JSON.

Names of classes, files and datasets, and errors that quote them, may come from strangers. `visible`
escapes characters that control a terminal or cannot be seen; every printed line passes through it.
`printing` handles a standard output that is full or closed.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import shutil
import sys
import unicodedata
from collections.abc import Iterator
from typing import Any, TextIO

from resnet_jax.errors import ConfigError, one_line

_ZERO_WIDTH_JOINER = "\u200d"
# Characters that are letters or marks by their category, but invisible.
_INVISIBLE = frozenset(
    "\u034f\u115f\u1160\u17b4\u17b5\u180b\u180c\u180d\u180f\u3164\uffa0"
    + "".join(map(chr, [*range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0)]))
)
_EMOJI_STYLE = "\ufe0f"
_SKIN_TONES = "\U0001f3fb\U0001f3fc\U0001f3fd\U0001f3fe\U0001f3ff"


def visible(text: object, keep: str = "") -> str:
    """Escapes control characters and characters that hide or reorder text.

    It escapes control and format characters (ESC, BEL, C1, bidirectional and zero-width ones), line
    breaks, spaces other than " ", lone surrogates (bytes of a file name that are not text), and
    invisible letters and marks, as \\xHH, \\uHHHH or \\UHHHHHHHH. Joiners of emoji stay. The result
    is for people: backslashes are not escaped, and escaping it again does not change it.

    Args:
      text: A name or a message, or any object with a string form.
      keep: Control characters to keep, such as "\\n".

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
    """The number of columns of a text without control characters in a terminal.

    A wide character, such as a Chinese one, has two columns; a combining accent has none.

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
    """Appends spaces to a text up to a number of columns; a longer text is unchanged."""
    return text + " " * (width - columns(text))


def shortened(text: str, width: int) -> str:
    """Replaces the middle of a text that has more columns than `width` by an ellipsis.

    The end stays, because names of files and classes often differ only there.

    Example:
      >>> shortened("West Highland white terrier", 15), shortened("dog", 15)
      ('West Hi…terrier', 'dog')
    """
    if columns(text) <= width:
        return text
    left = _fitting(text, width // 2)
    right = _fitting(text[::-1], width - 1 - columns(left))[::-1]
    while right and not _columns(right[0]):  # belongs to a character that is gone
        right = right[1:]
    return left.rstrip(_ZERO_WIDTH_JOINER) + "…" + right


def _fitting(text: str, width: int) -> str:
    """The start of a text that fits into a number of columns."""
    for end, each in enumerate(text):
        width -= _columns(each)
        if width < 0:
            return text[:end]
    return text


def output_width() -> int:
    """The columns of the terminal that standard output is, or of $COLUMNS; 0 if there is none."""
    return shutil.get_terminal_size(fallback=(0, 0)).columns


def json_text(value: Any, indent: int | None = None) -> str:
    """Strict JSON in ASCII, which any parser accepts and no terminal interprets.

    Numbers that JSON cannot express (NaN and infinities) become null.

    Args:
      value: Dictionaries, sequences, text, numbers, bools and None.
      indent: Spaces for each level; None: one line.

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


def program() -> str:
    """The words that start the command line, as the user has called it."""
    name = os.path.basename(sys.argv[0])
    return name if name == "resnet-jax" else "python -m resnet_jax"


def show(text: object) -> None:
    """Prints a result on standard output, line breaks included, with `visible`.

    Example:
      >>> show("a\\tb\\nc")
      a\\tb
      c
    """
    print(visible(text, keep="\n"))


def log(line: object, stream: TextIO | None = None) -> None:
    """Prints a line for people, on standard error or another stream."""
    print(visible(line), file=stream or sys.stderr, flush=True)


@contextlib.contextmanager
def printing() -> Iterator[None]:
    """Flushes standard output at the end of the block; a closed pipe (`| head`) is no error.

    Raises:
      ConfigError: Standard output cannot be written.

    Example:
      >>> with printing():
      ...     print("one line")
      one line
    """
    # Characters that the terminal's encoding lacks are escaped.
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
    """Prints a line that is also in a file, so that a full standard output is no error.

    Example:
      >>> print_copy("top-1 98.89%")
      top-1 98.89%
    """
    with contextlib.suppress(ConfigError), printing():
        show(line)


def _discard() -> None:
    """Discards buffered output, which Python would otherwise try to write when it exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
