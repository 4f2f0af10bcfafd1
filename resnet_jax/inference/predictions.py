"""Predictions as a table, JSON lines or CSV."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

import numpy as np

from resnet_jax.inference.classifier import Classifier, Prediction, check_top
from resnet_jax.inference.files import Progress, new_file
from resnet_jax.inference.images import ImageFile
from resnet_jax.output import printing

# (name of the image, its predictions) -> lines.
Form = Callable[[str, list[Prediction]], str]
_SUFFIXES = {".jsonl": "jsonl", ".csv": "csv"}
_LONGEST_NAME = 60


def write_predictions(
    classifier: Callable[[], Classifier],
    files: Sequence[ImageFile],
    *,
    top: int = 5,
    form: str = "",
    output: str = "",
    force: bool = False,
) -> int:
    """Predicts images and writes what comes out, batch by batch.

    Args:
      classifier: Makes the classifier, once all else is known to be right.
      files: The images.
      top: Classes of each image.
      form: "table", "jsonl" or "csv"; "": as the output's name ends, else a table.
      output: A file, which appears when it is whole; "": standard output.
      force: Replace the file.

    Returns:
      The number of images that were skipped because they cannot be read.

    Raises:
      ConfigError: The output exists or cannot be written, or `top` is below 1.
      DataError: No image could be read.
    """
    check_top(top)
    form = form or _SUFFIXES.get(Path(output).suffix, "table")
    header, write = _FORMS[form](files)
    with _opened(output, force) as stream:
        forward = classifier()
        # No bar between the lines of a table that the same terminal shows.
        progress = Progress(files, bar=bool(output) or not sys.stdout.isatty())
        for file, logits in progress(forward.outputs(files)):
            stream.write(header + write(file.name, forward.best(logits, top)))
            header = ""
    return progress.skipped


@contextlib.contextmanager
def _opened(output: str, force: bool) -> Iterator[TextIO]:
    # File names may have bytes that are no text; they come out as they went in.
    if not output:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="surrogateescape")
        with printing():
            yield sys.stdout
        return
    with (
        new_file(output, force) as partial,
        partial.open("w", encoding="utf-8", errors="surrogateescape", newline="") as stream,
    ):
        yield stream


def _table(files: Sequence[ImageFile]) -> tuple[str, Form]:
    width = min(_LONGEST_NAME, max(len(_printable(file.name)) for file in files))

    def write(name: str, predictions: list[Prediction]) -> str:
        shown = _printable(name)
        lines = []
        for prediction in predictions:
            lines.append(f"{shown:{width}}  {prediction.probability:11.4f}  {prediction.name}\n")
            shown = ""
        return "".join(lines)

    return f"{'image':{width}}  probability  class\n", write


def _printable(name: str) -> str:
    """The name without what would break a line or a terminal."""
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in name)


def _json_lines(files: Sequence[ImageFile]) -> tuple[str, Form]:
    def write(name: str, predictions: list[Prediction]) -> str:
        found = [
            {"name": each.name, "index": each.index, "probability": _shortest(each)}
            for each in predictions
        ]
        return json.dumps({"image": name, "predictions": found}) + "\n"

    return "", write


def _csv(files: Sequence[ImageFile]) -> tuple[str, Form]:
    def lines(rows: list[list[object]]) -> str:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        return text.getvalue()

    def write(name: str, predictions: list[Prediction]) -> str:
        return lines(
            [
                [name, rank, each.index, each.name, _shortest(each)]
                for rank, each in enumerate(predictions, start=1)
            ]
        )

    return lines([["image", "rank", "index", "name", "probability"]]), write


def _shortest(prediction: Prediction) -> float:
    """The fewest digits that tell the float32 from its neighbours."""
    return float(str(np.float32(prediction.probability)))


_FORMS = {"table": _table, "jsonl": _json_lines, "csv": _csv}
FORMS = tuple(_FORMS)
