"""Predictions as a table, JSON lines or CSV, and the progress of commands over many images."""

from __future__ import annotations

import contextlib
import csv
import io
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from resnet_jax.errors import DataError
from resnet_jax.inference.classifier import Classifier, Prediction, check_top
from resnet_jax.inference.images import ImageFile
from resnet_jax.outputs import open_output
from resnet_jax.terminal import columns, json_text, padded, printing, visible

# (name of the image, its predictions) -> lines.
RowFormat = Callable[[str, list[Prediction]], str]
_SUFFIXES = {".jsonl": "jsonl", ".csv": "csv"}
_LONGEST_NAME = 60
# First characters of a spreadsheet's formula, also in full width, and of an escaped cell.
_SPECIAL_STARTS = tuple("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20'")


def write_predictions(
    make_classifier: Callable[[], Classifier],
    files: Sequence[ImageFile],
    *,
    top: int | None = None,
    form: str = "",
    output: str = "",
    force: bool = False,
) -> int:
    """Predicts the classes of images and writes them batch by batch.

    Args:
      make_classifier: Called after all other arguments are checked.
      files: The images.
      top: Number of classes per image. Default: as for `Classifier`.
      form: "table", "jsonl" or "csv". Default: by the output's suffix, else a table.
      output: A file, which appears when it is complete. Default: standard output.
      force: Replace an existing file.

    Returns:
      The number of images that were skipped because they cannot be read.
    """
    check_top(top)
    form = form or _SUFFIXES.get(Path(output).suffix, "table")
    header, format_rows = _FORMS[form](files)
    with _opened(output, force) as write:
        classifier = make_classifier()
        # No bar between the lines of a table on the same terminal.
        progress = Progress(files, bar=bool(output) or not sys.stdout.isatty())
        for file, logits in progress(classifier.outputs(files)):
            write(header + format_rows(file.name, classifier.best(logits, top)))
            header = ""
    return progress.skipped


@contextlib.contextmanager
def _opened(output: str, force: bool) -> Iterator[Callable[[str], Any]]:
    """A function that writes text to the output."""
    if not output:
        with printing():
            yield sys.stdout.write
        return
    with open_output(output, force, stream=True) as file:
        yield lambda text: file.write(text.encode())


def _table(files: Sequence[ImageFile]) -> tuple[str, RowFormat]:
    width = min(_LONGEST_NAME, max(columns(visible(file.name)) for file in files))

    def format_rows(name: str, predictions: list[Prediction]) -> str:
        shown = visible(name)
        lines = []
        for each in predictions:
            lines.append(
                f"{padded(shown, width)}  {each.probability:11.4f}  {visible(each.name)}\n"
            )
            shown = ""
        return "".join(lines) or f"{padded(shown, width)}  {'-':>11}\n"  # multi-label, no class

    return f"{padded('image', width)}  probability  class\n", format_rows


def _json_lines(files: Sequence[ImageFile]) -> tuple[str, RowFormat]:
    def format_rows(name: str, predictions: list[Prediction]) -> str:
        found = [
            {"name": each.name, "index": each.index, "probability": _shortest(each)}
            for each in predictions
        ]
        return json_text({"image": name, "predictions": found}) + "\n"

    return "", format_rows


def _csv(files: Sequence[ImageFile]) -> tuple[str, RowFormat]:
    def lines(rows: list[list[object]]) -> str:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        return text.getvalue()

    def format_rows(name: str, predictions: list[Prediction]) -> str:
        found = [
            [_cell(name), rank, each.index, _cell(each.name), _shortest(each)]
            for rank, each in enumerate(predictions, start=1)
        ]
        return lines(found or [[_cell(name), "", "", "", ""]])  # multi-label, no class

    return lines([["image", "rank", "index", "name", "probability"]]), format_rows


def _cell(name: str) -> str:
    """A name that is neither a spreadsheet's formula nor a terminal's control sequence.

    Such a name is written as in Python source, after an apostrophe; docs/predict.md has the way
    back. Line breaks stay, because CSV quotes them.
    """
    if not name.startswith(_SPECIAL_STARTS) and visible(name, keep="\n") == name:
        return name
    return "'" + visible(name.replace("\\", r"\\"), keep="\n")


def _shortest(prediction: Prediction) -> float:
    """The fewest digits that identify the float32."""
    return float(str(np.float32(prediction.probability)))


_FORMS = {"table": _table, "jsonl": _json_lines, "csv": _csv}


class Progress:
    """Pairs images with results, shows a progress bar, and names the images that are skipped.

    Called with results, it yields (image, result); it raises DataError after the last one if no
    image could be read.

    Example:
      >>> progress = Progress([ImageFile("a.png"), ImageFile("b.png")], bar=False)
      >>> [file.name for file, _ in progress([DataError("a.png: cut short"), np.zeros(3)])]
      ['b.png']
      >>> progress.skipped
      1
    """

    def __init__(self, files: Sequence[ImageFile], bar: bool = True) -> None:
        self._files = files
        self._bar = bar
        self.skipped = 0

    def __call__(
        self, results: Iterable[np.ndarray | DataError]
    ) -> Iterator[tuple[ImageFile, np.ndarray]]:
        first = None
        hidden = None if self._bar else True  # None hides it where standard error is no terminal
        with tqdm(total=len(self._files), unit=" images", disable=hidden) as bar:
            for file, result in zip(self._files, results):
                if isinstance(result, DataError):
                    first = first or result
                    self.skipped += 1
                    if len(self._files) > 1:
                        tqdm.write(visible(f"skipped: {result}"), file=sys.stderr)
                else:
                    yield file, result
                bar.update()
        if first is not None and self.skipped == len(self._files):
            raise DataError(f"no image could be read; {first}" if self.skipped > 1 else str(first))
