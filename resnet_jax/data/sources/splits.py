"""Splits of image folders and lists, and parts of them: "train[:90%]", "train[:20%]+train[40%:]".

A part has the same percentage of every class. Within a class, images are ordered by a hash of their
names, so a part is the same on every host and every day. Adding an image moves at most one other of
its class across each boundary.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import itertools
import os
import re
from collections.abc import Collection, Iterable, Sequence
from fractions import Fraction

from resnet_jax.data.sources.base import field_error, shortlist
from resnet_jax.errors import DataError

Span = tuple[Fraction, Fraction]  # from and to, as fractions of a split

WHOLE_SPLIT: tuple[Span, ...] = ((Fraction(0), Fraction(1)),)
_TERM = re.compile(r"(?P<name>[^\[\]+]+)(\[(?P<first>[^\[\]:]*):(?P<last>[^\[\]:]*)\])?")
_PERCENT = re.compile(r"-?\d{1,3}(\.\d{1,9})?%")
HELD_OUT = ("test", "val", "valid", "validation")  # usual names of splits for evaluation
_USUAL = {"data.train_split": ("train", "training"), "data.eval_split": HELD_OUT}


@dataclasses.dataclass(frozen=True)
class SplitSpec:
    """Which split of an image folder or a list to open, and what it must hold.

    Args:
      name: As in `data.name`.
      split: As in `data.train_split`.
      field: The configuration's field that names the split, for messages.
      train_split: The training split, which defines the classes; "": `split` does.
      classes: The classes, if they are known already; (): those of `train_split`.
      multi_label: Whether an image has none or several labels. None: as the list says.
      label_separator: Between the labels of an image in a CSV file.
      allow_missing_classes: Whether classes may have no images.
    """

    name: str
    split: str
    field: str
    train_split: str = ""
    classes: tuple[str, ...] = ()
    multi_label: bool | None = None
    label_separator: str = "|"
    allow_missing_classes: bool = False

    def error(self, reason: object) -> DataError:
        """An error about the split."""
        return field_error(self.field, self.split, reason)

    def check_classes(self, found: Collection[str], classes: Sequence[str], notes: str = "") -> str:
        """Compares the classes that have images with all classes.

        Args:
          found: Classes with images.
          classes: All classes.
          notes: What else is in the split and may be meant as images.

        Returns:
          Text about the missing classes, or "".

        Raises:
          DataError: There are unknown classes, or missing ones that are not allowed.
        """
        known, present = set(classes), set(found)
        if unknown := present - known:
            raise self.error(
                f"has {len(unknown)} classes more than data.train_split = {self.train_split!r} "
                f"({shortlist(unknown, known)}); both need the same classes"
            )
        if len(classes) < 2:
            raise self.error(f"has one class, {shortlist(classes)}; needs two")
        missing = known - present
        if not missing:
            return ""
        text = (
            f"no images of {len(missing)} of the {len(known)} classes "
            f"({shortlist(missing, present)})"
        )
        if not self.allow_missing_classes or not present:
            has = f" (it has {notes})" if notes else ""
            raise self.error(
                f"has {text}{has}; add some, or set data.allow_missing_classes = true "
                "(evaluate: --allow_missing_classes)"
            )
        return text


def parse_split(text: str, field: str) -> dict[str, tuple[Span, ...]]:
    """The splits that an expression names, and which parts of each; spans do not overlap.

    Args:
      text: NAME or NAME[FROM%:TO%], several of them joined by "+". As in TFDS, either end may be
        left out, and a negative one counts from the end.
      field: The configuration's field, for messages.

    Raises:
      DataError: The expression is malformed, or selects nothing, or something twice.

    Example:
      >>> parse_split("train[:20%]+train[-25%:]", "data.train_split")
      {'train': ((Fraction(0, 1), Fraction(1, 5)), (Fraction(3, 4), Fraction(1, 1)))}
    """
    found: dict[str, tuple[Span, ...]] = {}
    for term in text.split("+"):
        match = _TERM.fullmatch(term.strip())
        if not match:
            reason = "must be a split or parts of splits, such as train[:90%] or train+val"
            raise field_error(field, text, reason)
        first = _fraction(match["first"] or "0%", text, field)
        last = _fraction(match["last"] or "100%", text, field)
        if first >= last:
            raise field_error(field, text, f"{term.strip()} selects nothing")
        spans = sorted((*found.get(match["name"], ()), (first, last)))
        if any(end > start for (_, end), (start, _) in itertools.pairwise(spans)):
            raise field_error(field, text, f"selects images of {match['name']} twice")
        found[match["name"]] = tuple(spans)
    return found


def _fraction(text: str, whole: str, field: str) -> Fraction:
    position = text.strip()
    if not _PERCENT.fullmatch(position):
        reason = f"{position[:20]} must be a percentage, which is taken of every class"
        raise field_error(field, whole, f"{reason}, such as train[:90%]")
    fraction = Fraction(position[:-1]) / 100
    if not -1 <= fraction <= 1:
        raise field_error(field, whole, f"{position} must be between -100% and 100%")
    return fraction + 1 if fraction < 0 else fraction


def split_hint(split: str, known: Collection[str], field: str) -> str:
    """Which splits a missing one may mean, to append to a message; "" if there is no guess.

    Args:
      split: A split that does not exist, or an expression with one.
      known: The splits that exist.
      field: The configuration's field that names it.

    Example:
      >>> split_hint("trian[:90%]", ["train", "val"], "data.train_split")
      "; did you mean 'train'?"
      >>> split_hint("test", ["train", "val"], "data.eval_split")
      "; did you mean 'val'?"
    """
    names = [term.partition("[")[0].strip() for term in split.split("+")]
    wrong = next((name for name in names if name and name not in known), "")
    if not wrong:
        return ""
    by_lower = {name.lower(): name for name in known}
    close = difflib.get_close_matches(wrong[:100].lower(), by_lower, n=1)
    # Otherwise the split that has the same purpose under another usual name.
    found = close or [name for name in by_lower if name in _USUAL.get(field, ())]
    return f"; did you mean {' or '.join(repr(by_lower[x]) for x in found)}?" if found else ""


def overlap(first: str, second: str) -> bool:
    """Whether two expressions have images in common; False if TFDS alone can parse one of them.

    Example:
      >>> overlap("train", "train[90%:]"), overlap("train[:90%]", "train[90%:]+test")
      (True, False)
    """
    if first == second:
        return True
    try:
        parts, others = parse_split(first, ""), parse_split(second, "")
    except DataError:
        return False
    return any(
        start < other_end and other_start < end
        for name in parts.keys() & others.keys()
        for start, end in parts[name]
        for other_start, other_end in others[name]
    )


def select_images(names: Sequence[str], spans: Iterable[Span]) -> list[int]:
    """The images of one class that are in a part: ascending indices into their names.

    Example:
      >>> names = [f"cat/{number}.jpg" for number in range(8)]
      >>> spans = parse_split("train[:25%]", "data.train_split")["train"]
      >>> [names[index] for index in select_images(names, spans)]
      ['cat/0.jpg', 'cat/3.jpg']
    """
    if spans == WHOLE_SPLIT:
        return list(range(len(names)))
    order = sorted(range(len(names)), key=lambda index: _hash(names[index]))
    return sorted(
        index
        for first, last in spans
        for index in order[_boundary(len(names), first) : _boundary(len(names), last)]
    )


def _hash(name: str) -> bytes:
    return hashlib.sha256(os.fsencode(name)).digest()


def _boundary(count: int, fraction: Fraction) -> int:
    """How many of a class's images come before a position.

    Inside of a split, at least one image lies on either side, so that small classes are in both
    parts.
    """
    if fraction in (0, 1) or count < 2:
        return round(count * fraction)
    return min(max(round(count * fraction), 1), count - 1)
