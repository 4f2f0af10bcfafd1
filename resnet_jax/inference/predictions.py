"""Predictions as a table, JSON lines or CSV."""

from __future__ import annotations

import contextlib
import csv
import io
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from resnet_jax.inference.classifier import Classifier, Prediction, check_top
from resnet_jax.inference.images import ImageFile
from resnet_jax.inference.writers import Progress, new_file
from resnet_jax.terminal import columns, json_text, padded, printing, visible

# (name of the image, its predictions) -> lines.
Form = Callable[[str, list[Prediction]], str]
_SUFFIXES = {".jsonl": "jsonl", ".csv": "csv"}
_LONGEST_NAME = 60
# How a formula of a spreadsheet begins, also in full width, and how a marked cell does.
_SPECIAL_STARTS = tuple("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20'")


def write_predictions(
    classifier: Callable[[], Classifier],
    files: Sequence[ImageFile],
    *,
    top: int | None = None,
    form: str = "",
    output: str = "",
    force: bool = False,
) -> int:
    """Predicts images and writes what comes out, batch by batch.

    Args:
      classifier: Makes the classifier, once all else is known to be right.
      files: The images.
      top: Classes of each image; None: as for `Classifier`.
      form: "table", "jsonl" or "csv"; "": as the output's name ends, else a table.
      output: A file, which appears when it is whole; "": standard output.
      force: Replace the file.

    Returns:
      The number of images that were skipped because they cannot be read.

    Raises:
      ConfigError: The output exists or cannot be written, or `top` is below 1.
      DataError: No image could be read.
      WeightsError: The network's outputs are not finite numbers.
    """
    check_top(top)
    form = form or _SUFFIXES.get(Path(output).suffix, "table")
    header, write = _FORMS[form](files)
    with _opened(output, force) as put:
        forward = classifier()
        # No bar between the lines of a table that the same terminal shows.
        progress = Progress(files, bar=bool(output) or not sys.stdout.isatty())
        for file, logits in progress(forward.outputs(files)):
            put(header + write(file.name, forward.best(logits, top)))
            header = ""
    return progress.skipped


@contextlib.contextmanager
def _opened(output: str, force: bool) -> Iterator[Callable[[str], Any]]:
    """A function that writes text to the output."""
    if not output:
        with printing():
            yield sys.stdout.write
        return
    with new_file(output, force, stream=True) as file:
        yield lambda text: file.write(text.encode())


def _table(files: Sequence[ImageFile]) -> tuple[str, Form]:
    width = min(_LONGEST_NAME, max(columns(visible(file.name)) for file in files))

    def write(name: str, predictions: list[Prediction]) -> str:
        shown = visible(name)
        lines = []
        for each in predictions:
            lines.append(
                f"{padded(shown, width)}  {each.probability:11.4f}  {visible(each.name)}\n"
            )
            shown = ""
        return "".join(lines) or f"{padded(shown, width)}  {'-':>11}\n"  # no class is likely

    return f"{padded('image', width)}  probability  class\n", write


def _json_lines(files: Sequence[ImageFile]) -> tuple[str, Form]:
    def write(name: str, predictions: list[Prediction]) -> str:
        found = [
            {"name": each.name, "index": each.index, "probability": _shortest(each)}
            for each in predictions
        ]
        return json_text({"image": name, "predictions": found}) + "\n"

    return "", write


def _csv(files: Sequence[ImageFile]) -> tuple[str, Form]:
    def lines(rows: list[list[object]]) -> str:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        return text.getvalue()

    def write(name: str, predictions: list[Prediction]) -> str:
        found = [
            [_cell(name), rank, each.index, _cell(each.name), _shortest(each)]
            for rank, each in enumerate(predictions, start=1)
        ]
        return lines(found or [[_cell(name), "", "", "", ""]])  # no class is likely

    return lines([["image", "rank", "index", "name", "probability"]]), write


def _cell(name: str) -> str:
    """A name that is neither a formula for a spreadsheet nor a code for a terminal.

    Where it would be, it is written as in Python source, after an apostrophe; docs/predict.md has
    the way back. Line breaks stay: the quotes of CSV hold them.
    """
    if not name.startswith(_SPECIAL_STARTS) and visible(name, keep="\n") == name:
        return name
    return "'" + visible(name.replace("\\", r"\\"), keep="\n")


def _shortest(prediction: Prediction) -> float:
    """The fewest digits that tell the float32 from its neighbours."""
    return float(str(np.float32(prediction.probability)))


_FORMS = {"table": _table, "jsonl": _json_lines, "csv": _csv}
FORMS = tuple(_FORMS)
