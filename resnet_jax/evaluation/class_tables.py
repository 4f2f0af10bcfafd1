"""What an evaluation says about single classes, and its tables of text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from resnet_jax.terminal import columns, padded, shortened

_MAX_CLASSES = 20  # of a confusion matrix that is printed
_WIDEST_NAME = 60  # columns; a longer name stands out
_LEAST_NAME, _NAME = 12, 16  # columns where a width is to be kept: least, and beside many cells


class ClassAccuracy(NamedTuple):
    """The accuracy on the images of one class; None where there are no images."""

    name: str
    images: int
    top1: float | None


class ClassMetrics(NamedTuple):
    """The metrics of one class of a multi-label network.

    `images` have the class. `average_precision` and `recall` are None where no image has it,
    `precision` where it is never predicted, and `f1` where neither is the case.
    """

    name: str
    images: int
    predicted: int
    average_precision: float | None
    precision: float | None
    recall: float | None
    f1: float | None


def class_lines(
    names: Sequence[str],
    classes: Sequence[ClassMetrics] | Sequence[ClassAccuracy] | None,
    confusion: np.ndarray | None,
    width: int = 0,
) -> Iterator[str]:
    """The metrics of each class and, of a few classes, the confusion matrix, as lines of text.

    Args:
      names: Names of the classes, as they are printed.
      classes: Their metrics; None where images have several labels.
      confusion: Images by label and prediction, [classes, classes], or None.
      width: Columns that the lines have to fit into; 0: any number.

    Example:
      >>> classes = [ClassAccuracy("cat", 3, 2 / 3), ClassAccuracy("dog", 1, 1.0)]
      >>> print(*class_lines(["cat", "dog"], classes, np.array([[2, 1], [0, 1]])), sep="\\n")
      class  images   top-1  most often predicted instead
      cat         3  66.67%  dog (1)
      dog         1 100.00%
      <BLANKLINE>
      confusion matrix: a row for each label, a column for each prediction
             0  1
      0 cat  2  1
      1 dog  0  1
    """
    if classes is None:
        yield "no accuracy of each class: images have several labels"
    elif isinstance(classes[0], ClassMetrics):
        yield from _metric_lines(names, classes, width)
    elif confusion is not None:
        yield from _accuracy_lines(names, classes, confusion, width)
        if len(names) <= _MAX_CLASSES:
            yield from ("", *_confusion_lines(names, confusion, width))


def _metric_lines(names: Sequence[str], classes: Sequence[Any], width: int) -> Iterator[str]:
    header = "  images predicted      AP precision  recall      F1"
    names = _fitted(names, width - len(header) if width else 0)
    longest = max(5, _longest(names))
    yield f"{'class':<{longest}}{header}"
    for name, each in zip(names, classes):
        fractions = (each.average_precision, each.precision, each.recall, each.f1)
        cells = ["-" if x is None else f"{x:.2%}" for x in fractions]
        line = f"{padded(name, longest)}  {each.images:>6} {each.predicted:>9}"
        yield line + " {:>7} {:>9} {:>7} {:>7}".format(*cells)


def _accuracy_lines(
    names: Sequence[str], classes: Sequence[Any], confusion: np.ndarray, width: int
) -> Iterator[str]:
    header = "  images   top-1  "
    count = len(f" ({confusion.max()})")
    # A line has two names.
    names = _fitted(names, (width - len(header) - count) // 2 if width else 0)
    longest = max(5, _longest(names))
    yield f"{'class':<{longest}}{header}most often predicted instead"
    for label, each in enumerate(classes):
        errors = confusion[label].copy()
        errors[label] = 0
        most = int(errors.argmax())
        confused = f"  {names[most]} ({errors[most]})" if errors[most] else ""
        top1 = "-" if each.top1 is None else f"{each.top1:.2%}"
        yield f"{padded(names[label], longest)}  {each.images:>6} {top1:>7}{confused}"


def _confusion_lines(names: Sequence[str], confusion: np.ndarray, width: int) -> Iterator[str]:
    """Rows and columns have numbers; what does not fit into the width comes in further blocks."""
    number = len(str(len(names) - 1))
    cell = 1 + max(2, number, len(str(confusion.max())))
    longest = _longest(names)
    together, room = len(names), 0  # columns in a block, and those of the terminal for a name
    if width:
        room = width - number - 1 - together * cell
        if room < min(longest, _LEAST_NAME):
            room = min(longest, _NAME)
            together = max(1, (width - number - 1 - room) // cell)
    names = _fitted(names, room)
    longest = _longest(names)
    yield "confusion matrix: a row for each label, a column for each prediction"
    for start in range(0, len(names), together):
        block = range(start, min(start + together, len(names)))
        if start:
            yield ""
        yield " " * (number + 1 + longest) + "".join(f"{column:>{cell}}" for column in block)
        for label, name in enumerate(names):
            cells = "".join(f"{confusion[label, column]:>{cell}}" for column in block)
            yield f"{label:>{number}} {padded(name, longest)}{cells}"


def _longest(names: Sequence[str]) -> int:
    return min(_WIDEST_NAME, max(map(columns, names)))


def _fitted(names: Sequence[str], width: int) -> list[str]:
    """Names of at most `width` columns, but not of fewer than the least; 0: any number."""
    return [shortened(name, max(width, _LEAST_NAME)) if width else name for name in names]
