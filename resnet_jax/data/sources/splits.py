"""Parts of splits of image folders and lists: "train[:90%]", "train[:20%]+train[40%:]".

A part takes its share of every class. Within a class, images are ordered by a hash of their names,
so that a part is the same on every host and day. Adding an image moves at most one other of its
class across each boundary.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
from collections.abc import Iterable, Sequence
from fractions import Fraction

from resnet_jax.data.sources.base import fault
from resnet_jax.errors import DataError

Span = tuple[Fraction, Fraction]  # from and to, as shares of a split

WHOLE: tuple[Span, ...] = ((Fraction(0), Fraction(1)),)
_TERM = re.compile(r"(?P<name>[^\[\]+]+)(\[(?P<first>[^\[\]:]*):(?P<last>[^\[\]:]*)\])?")
_PERCENT = re.compile(r"-?\d{1,3}(\.\d{1,9})?%")


def parse(text: str, field: str) -> dict[str, tuple[Span, ...]]:
    """The splits that an expression names, and which parts of each.

    Args:
      text: NAME or NAME[FROM%:TO%], several of them joined by "+". As in TFDS, either end may be
        left out, and a negative one counts from the end.
      field: Dotted name of the configuration's field, for messages.

    Returns:
      Spans that do not overlap, by the names of the splits.

    Raises:
      DataError: It is no such expression, or selects nothing, or something twice.

    Example:
      >>> parse("train[:20%]+train[-25%:]", "data.train_split")
      {'train': ((Fraction(0, 1), Fraction(1, 5)), (Fraction(3, 4), Fraction(1, 1)))}
    """
    found: dict[str, tuple[Span, ...]] = {}
    for term in text.split("+"):
        match = _TERM.fullmatch(term.strip())
        if not match:
            reason = "must be a split or parts of splits, such as train[:90%] or train+val"
            raise fault(field, text, reason)
        first = _share(match["first"] or "0%", text, field)
        last = _share(match["last"] or "100%", text, field)
        if first >= last:
            raise fault(field, text, f"{term.strip()} selects nothing")
        spans = sorted((*found.get(match["name"], ()), (first, last)))
        if any(end > start for (_, end), (start, _) in itertools.pairwise(spans)):
            raise fault(field, text, f"selects images of {match['name']} twice")
        found[match["name"]] = tuple(spans)
    return found


def _share(text: str, whole: str, field: str) -> Fraction:
    """A position in a split, as a share of it."""
    position = text.strip()
    if not _PERCENT.fullmatch(position):
        reason = f"{position[:20]} must be a percentage: parts are shares of every class"
        raise fault(field, whole, f"{reason}, such as train[:90%]")
    share = Fraction(position[:-1]) / 100
    if not -1 <= share <= 1:
        raise fault(field, whole, f"{position} must be between -100% and 100%")
    return share + 1 if share < 0 else share


def overlap(first: str, second: str) -> bool:
    """Whether two expressions have images in common.

    Args:
      first: As for `parse`.
      second: As for `parse`.

    Returns:
      False where either cannot be parsed: TFDS knows more expressions.

    Example:
      >>> overlap("train", "train[90%:]"), overlap("train[:90%]", "train[90%:]+test")
      (True, False)
    """
    if first == second:
        return True
    try:
        parts, others = parse(first, ""), parse(second, "")
    except DataError:
        return False
    return any(
        start < other_end and other_start < end
        for name in parts.keys() & others.keys()
        for start, end in parts[name]
        for other_start, other_end in others[name]
    )


def select(names: Sequence[str], spans: Iterable[Span]) -> list[int]:
    """The images of one class that are in a part.

    Args:
      names: Of all images of the class, each once.
      spans: From `parse`.

    Returns:
      Indices into `names`, ascending.

    Example:
      >>> names = [f"cat/{number}.jpg" for number in range(8)]
      >>> spans = parse("train[:25%]", "data.train_split")["train"]
      >>> [names[index] for index in select(names, spans)]
      ['cat/0.jpg', 'cat/3.jpg']
    """
    if spans == WHOLE:
        return list(range(len(names)))
    order = sorted(range(len(names)), key=lambda index: _hash(names[index]))
    return sorted(
        index
        for first, last in spans
        for index in order[_boundary(len(names), first) : _boundary(len(names), last)]
    )


def _hash(name: str) -> bytes:
    return hashlib.sha256(os.fsencode(name)).digest()


def _boundary(count: int, share: Fraction) -> int:
    """How many of a class's images lie before a position.

    At least one lies on either side of a position inside of the split, so that small classes are
    in both parts.
    """
    if share in (0, 1) or count < 2:
        return round(count * share)
    return min(max(round(count * share), 1), count - 1)
