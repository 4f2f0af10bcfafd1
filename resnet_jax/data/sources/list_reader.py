"""Reads CSV and JSON Lines files that list images and labels."""

from __future__ import annotations

import codecs
import collections
import csv
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from resnet_jax.data.sources.base import field_error
from resnet_jax.data.sources.splits import SplitSpec
from resnet_jax.errors import DataError, one_line
from resnet_jax.files import MIB, open_regular

_MAX_LIST_BYTES = 4096 * MIB
_MAX_LINE_BYTES = MIB
_PATH_COLUMNS = ("path", "image", "file", "filename", "file_name")
# The name of the split if lines give none: the default of data.train_split.
ONLY_SPLIT = "train"


class Row(NamedTuple):
    """An image of a list, and the line that names it."""

    line: int
    path: str
    labels: tuple[str, ...]


RowsBySplit = dict[str, list[Row]]


class ListReader:
    """Reads the rows of a list; errors name the line.

    Attributes:
      has_splits: Whether rows give their split; known after `read`.
      multi_label: Whether images have none or several labels; known after `read`.
    """

    def __init__(self, path: Path, spec: SplitSpec) -> None:
        self.has_splits = False
        self.multi_label = bool(spec.multi_label)
        self._path, self._spec = path, spec
        self._folder_prefix = f"{path.parent}/"

    def error(self, line: int, reason: str) -> DataError:
        return field_error("data.name", self._spec.name, f"line {line:,}: {reason}")

    def read(self, kind: str) -> RowsBySplit:
        """All rows by their splits; "train" for a list without splits. `kind`: "csv" or "jsonl"."""
        groups: RowsBySplit = collections.defaultdict(list)
        rows = self._csv_rows if kind == "csv" else self._json_rows
        try:
            with open_regular(self._path, _MAX_LIST_BYTES) as file:
                for split, row in rows(self._lines(file)):
                    groups[split].append(row)
        except OSError as error:
            reason = f"cannot read {self._path} ({error.strerror or error})"
            raise field_error("data.name", self._spec.name, reason) from error
        if not groups:
            raise field_error("data.name", self._spec.name, f"{self._path} names no images")
        return dict(groups)

    def _lines(self, file: BinaryIO) -> Iterator[str]:
        for number in itertools.count(1):
            line = file.readline(_MAX_LINE_BYTES + 1)
            if number == 1:
                if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                    raise self.error(1, "is UTF-16; save the list as UTF-8")
                line = line.removeprefix(codecs.BOM_UTF8)
                if not line:
                    return
            if not line:
                return
            if len(line) > _MAX_LINE_BYTES:
                raise self.error(number, f"has more than {_MAX_LINE_BYTES:,} bytes")
            yield line.decode("utf-8", "surrogateescape")  # file names may be any bytes

    def _csv_rows(self, lines: Iterable[str]) -> Iterator[tuple[str, Row]]:
        reader = csv.reader(lines, skipinitialspace=True, strict=True)
        separator, line = self._spec.label_separator, 1
        known: dict[str, tuple[str, ...]] = {}  # most rows have labels that another row has
        try:
            first = next(filter(any, reader), [])
            if not first:
                return
            header = [each.strip().lower() for each in first]
            path, label, split = self._columns(header)
            several = self.multi_label or header[label] == "labels"
            line = reader.line_num + 1
            for fields in reader:
                if any(fields):
                    if len(fields) != len(header):
                        raise self.error(
                            line,
                            f"has {len(fields)} fields and the header {len(header)}; quote a "
                            "field that has a comma in it",
                        )
                    text = fields[label]
                    if (labels := known.get(text)) is None:
                        names = text.split(separator) if several else [text]
                        names = [each.strip() for each in names if each.strip()]
                        labels = known[text] = self._checked_labels(line, names)
                    name = ONLY_SPLIT if split is None else fields[split].strip()
                    yield name, self._row(line, fields[path], labels, name)
                line = reader.line_num + 1
        except csv.Error as error:
            raise self.error(line, f"is not CSV ({one_line(error)})") from error

    def _columns(self, header: list[str]) -> tuple[int, int, int | None]:
        """The indices of the columns for path, label and split."""
        several = self._spec.multi_label
        labels = ("labels", "label") if several else ("label", "labels")
        found = []
        for wanted in (_PATH_COLUMNS, labels, ("split",)):
            name = next((each for each in wanted if each in header), None)
            if name is not None and header.count(name) > 1:
                raise self.error(1, f"has the column {name!r} twice")
            found.append(None if name is None else header.index(name))
        path, label, split = found
        if path is None or label is None:
            raise self.error(
                1,
                f"must name the columns, one of them {'path' if path is None else 'label'!r}; "
                f"it has {', '.join(header)[:200]!r}",
            )
        self.has_splits = split is not None
        if several is None:
            self.multi_label = header[label] == "labels"
        return path, label, split

    def _json_rows(self, lines: Iterable[str]) -> Iterator[tuple[str, Row]]:
        first = True
        for line, text in enumerate(lines, 1):
            if not text.strip():
                continue
            try:
                record = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise self.error(line, f"is not JSON ({one_line(error)})") from error
            if not isinstance(record, dict):
                raise self.error(line, 'is not an object, such as {"path": "a.jpg", "label": "x"}')
            if first:
                first, self.has_splits = False, "split" in record
                if self._spec.multi_label is None:
                    self.multi_label = "labels" in record
            if ("split" in record) != self.has_splits:
                raise self.error(line, "must have a split if the first line has one, and only then")
            path = next((record[each] for each in _PATH_COLUMNS if each in record), None)
            if not isinstance(path, str):
                raise self.error(line, "needs text under the key 'path'")
            name = record.get("split", ONLY_SPLIT)
            if not isinstance(name, str):
                raise self.error(line, "has a split that is not text")
            yield name, self._row(line, path, self._json_labels(line, record), name)

    def _json_labels(self, line: int, record: dict[str, object]) -> tuple[str, ...]:
        labels = record.get("labels")
        if labels is None and "label" in record:
            labels = [record["label"]]
        name_types = (str, int)
        if not isinstance(labels, list) or not all(
            isinstance(each, name_types) and not isinstance(each, bool) for each in labels
        ):
            raise self.error(
                line, 'needs "label": text or a whole number, or "labels": a list of them'
            )
        return self._checked_labels(line, list(map(str, labels)))

    def _checked_labels(self, line: int, labels: list[str]) -> tuple[str, ...]:
        """The labels of an image without repetitions."""
        if len(labels) != 1 and not self.multi_label:
            what = f"{len(labels)} labels ({', '.join(labels)[:100]})" if labels else "no label"
            raise self.error(line, f"has {what}; set data.multi_label = true to allow it")
        if not all(map(_is_label, labels)):
            raise self.error(line, "has an empty label, or one that is not UTF-8")
        return tuple(dict.fromkeys(labels))

    def _row(self, line: int, path: str, labels: tuple[str, ...], split: str) -> Row:
        if not path:
            raise self.error(line, "has no path")
        if not split:
            raise self.error(line, "has no split")
        if "\0" in path or not (path.isascii() or _is_file_name(path)):
            raise self.error(line, "has a path that is not a valid file name")
        # Paths are kept relative to the list, so that both can be moved together.
        return Row(line, path.removeprefix(self._folder_prefix), labels)


def _is_file_name(path: str) -> bool:
    try:
        return bool(os.fsencode(path))
    except UnicodeEncodeError:  # half of a surrogate pair
        return False


def _is_label(label: str) -> bool:
    try:
        return bool(label.encode())
    except UnicodeEncodeError:
        return False
