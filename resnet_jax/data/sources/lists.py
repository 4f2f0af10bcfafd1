"""Lists of images and labels as a source: CSV and JSON Lines."""

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

import numpy as np

from resnet_jax.data.sources.base import Label, Request, Source, digest, fault, named
from resnet_jax.data.sources.folders import read_image, stored_channels
from resnet_jax.data.sources.splits import WHOLE, Span, parse, select
from resnet_jax.errors import DataError, one_line
from resnet_jax.files import MIB, open_regular

_LARGEST = 4096 * MIB  # of a list
_LONGEST = MIB  # of a line
_PATHS = ("path", "image", "file", "filename", "file_name")
# What a list without splits is called as a whole: the default of data.train_split, and what reads
# better where a list is evaluated on.
_WHOLE_LIST = ("train", "all")


class _Row(NamedTuple):
    """What a list says of an image."""

    line: int
    path: str
    labels: tuple[str, ...]


_Groups = dict[str, list[_Row]]  # by split


class ListSource(Source):
    """The images and labels that a CSV or JSON Lines file names.

    Args:
      kind: "csv" or "jsonl".
      path: Of the file.
      request: What is opened.
    """

    def __init__(self, kind: str, path: Path, request: Request) -> None:
        self.name, self.split = request.name, request.split
        self._folder = str(path.parent)
        reader = _Reader(path, request)
        groups = reader.read(kind)
        parts = _find_parts(groups, reader.has_splits, request)
        rows = _chosen(groups, parts, reader)
        self.class_names = request.classes or _training_classes(
            groups, parts, reader.has_splits, request
        )
        numbers = {label: number for number, label in enumerate(self.class_names)}
        _check_known(rows, numbers, reader)
        found = {label for row in rows for label in row.labels}
        missing = request.check_classes(found, self.class_names)
        sizes = [_size(os.path.join(self._folder, row.path)) for row in rows]
        self.left_out = _left_out(missing, rows, sizes, reader)
        # As bytes a million paths are small, and are quickly copied to worker processes.
        paths = [os.fsencode(row.path) for row in rows]
        self._paths, self._path_ends = b"".join(paths), _ends(map(len, paths))
        self._labels = np.array([numbers[x] for row in rows for x in row.labels], np.int32)
        self._label_ends = _ends(len(row.labels) for row in rows)
        self.label_shape = (self.num_classes,) if reader.multi_label else ()
        self.channels = self._find_channels(rows, request)
        self.image_shape = None
        lines = [f"{row.path} {size} {row.labels}" for row, size in zip(rows, sizes)]
        self.fingerprint = digest([request.split, len(self), *lines])

    def __len__(self) -> int:
        return len(self._path_ends) - 1

    def labels(self) -> np.ndarray:
        if not self.label_shape:
            return self._labels
        several = np.zeros((len(self), self.num_classes), np.int32)
        several[np.repeat(np.arange(len(self)), np.diff(self._label_ends)), self._labels] = 1
        return several

    def class_counts(self) -> np.ndarray:
        return np.bincount(self._labels, minlength=self.num_classes)

    def _name(self, position: int) -> str:
        path = self._paths[slice(*self._path_ends[position : position + 2])]
        return os.path.join(self._folder, os.fsdecode(path))

    def _read(self, position: int) -> tuple[bytes, Label]:
        image = read_image(Path(self._name(position)))
        labels = self._labels[slice(*self._label_ends[position : position + 2])]
        if not self.label_shape:
            return image, int(labels[0])
        several = np.zeros(self.label_shape, np.int32)
        several[labels] = 1
        return image, several

    def _find_channels(self, rows: list[_Row], request: Request) -> int:
        groups: dict[tuple[str, ...], list[str]] = collections.defaultdict(list)
        for row in rows:
            groups[() if self.label_shape else row.labels].append(row.path)
        files = list(groups.values())
        folder, none = Path(self._folder), [""] * len(files)
        return stored_channels(folder, none, files, request.field, request.split)


def list_splits(kind: str, path: Path, request: Request) -> list[str]:
    """The splits of a list: ["train"] where its lines do not say any.

    Args:
      kind: "csv" or "jsonl".
      path: Of the file.
      request: What may be opened.

    Returns:
      Their names, in the order of the list.

    Raises:
      DataError: It cannot be read.
    """
    return [*_Reader(path, request).read(kind)]


class _Reader:
    """Reads the rows of a list, and says in which line a mistake is.

    Attributes:
      has_splits: Whether rows say their split.
      multi_label: Whether images have none or several labels.
    """

    def __init__(self, path: Path, request: Request) -> None:
        self.has_splits = False
        self.multi_label = bool(request.multi_label)
        self._path, self._request = path, request
        self._above = f"{path.parent}/"

    def fault(self, line: int, reason: str) -> DataError:
        return fault("data.name", self._request.name, f"line {line:,}: {reason}")

    def read(self, kind: str) -> _Groups:
        """All rows by their splits; of a list without splits they are "train"."""
        groups: _Groups = collections.defaultdict(list)
        rows = self._csv_rows if kind == "csv" else self._json_rows
        try:
            with open_regular(self._path, _LARGEST) as file:
                for split, row in rows(self._lines(file)):
                    groups[split].append(row)
        except OSError as error:
            reason = f"cannot read {self._path} ({error.strerror or error})"
            raise fault("data.name", self._request.name, reason) from error
        if not groups:
            raise fault("data.name", self._request.name, f"{self._path} names no images")
        return dict(groups)

    def _lines(self, file: BinaryIO) -> Iterator[str]:
        for number in itertools.count(1):
            line = file.readline(_LONGEST + 1)
            if number == 1:
                if line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                    raise self.fault(1, "is UTF-16; save the list as UTF-8")
                line = line.removeprefix(codecs.BOM_UTF8)
                if not line:
                    return
            if not line:
                return
            if len(line) > _LONGEST:
                raise self.fault(number, f"has more than {_LONGEST:,} bytes")
            yield line.decode("utf-8", "surrogateescape")  # file names may be any bytes

    def _csv_rows(self, lines: Iterable[str]) -> Iterator[tuple[str, _Row]]:
        reader = csv.reader(lines, skipinitialspace=True, strict=True)
        separator, line = self._request.label_separator, 1
        known: dict[str, tuple[str, ...]] = {}  # most rows have the labels of another one
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
                        raise self.fault(
                            line,
                            f"has {len(fields)} fields and the header {len(header)}; quote a "
                            "field that has a comma in it",
                        )
                    text = fields[label]
                    if (labels := known.get(text)) is None:
                        names = text.split(separator) if several else [text]
                        names = [each.strip() for each in names if each.strip()]
                        labels = known[text] = self._checked_labels(line, names)
                    name = _WHOLE_LIST[0] if split is None else fields[split].strip()
                    yield name, self._row(line, fields[path], labels, name)
                line = reader.line_num + 1
        except csv.Error as error:
            raise self.fault(line, f"is not CSV ({one_line(error)})") from error

    def _columns(self, header: list[str]) -> tuple[int, int, int | None]:
        """The places of path, label and split."""
        several = self._request.multi_label
        labels = ("labels", "label") if several else ("label", "labels")
        found = []
        for wanted in (_PATHS, labels, ("split",)):
            name = next((each for each in wanted if each in header), None)
            if name is not None and header.count(name) > 1:
                raise self.fault(1, f"has the column {name!r} twice")
            found.append(None if name is None else header.index(name))
        path, label, split = found
        if path is None or label is None:
            raise self.fault(
                1,
                f"must name the columns, of which one is {'path' if path is None else 'label'!r}; "
                f"it has {', '.join(header)[:200]!r}",
            )
        self.has_splits = split is not None
        if several is None:
            self.multi_label = header[label] == "labels"
        return path, label, split

    def _json_rows(self, lines: Iterable[str]) -> Iterator[tuple[str, _Row]]:
        first = True
        for line, text in enumerate(lines, 1):
            if not text.strip():
                continue
            try:
                record = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise self.fault(line, f"is not JSON ({one_line(error)})") from error
            if not isinstance(record, dict):
                raise self.fault(line, 'is not an object, such as {"path": "a.jpg", "label": "x"}')
            if first:
                first, self.has_splits = False, "split" in record
                if self._request.multi_label is None:
                    self.multi_label = "labels" in record
            if ("split" in record) != self.has_splits:
                raise self.fault(line, "has a split, or has none, unlike the lines before")
            path = next((record[each] for each in _PATHS if each in record), None)
            if not isinstance(path, str):
                raise self.fault(line, "has no text under the key 'path'")
            name = record.get("split", _WHOLE_LIST[0])
            if not isinstance(name, str):
                raise self.fault(line, "has a split that is no text")
            yield name, self._row(line, path, self._json_labels(line, record), name)

    def _json_labels(self, line: int, record: dict[str, object]) -> tuple[str, ...]:
        labels = record.get("labels")
        if labels is None and "label" in record:
            labels = [record["label"]]
        is_name = (str, int)
        if not isinstance(labels, list) or not all(
            isinstance(each, is_name) and not isinstance(each, bool) for each in labels
        ):
            raise self.fault(
                line, 'needs "label": text or a whole number, or "labels": a list of such'
            )
        return self._checked_labels(line, list(map(str, labels)))

    def _checked_labels(self, line: int, labels: list[str]) -> tuple[str, ...]:
        """An image's labels, each once."""
        if len(labels) != 1 and not self.multi_label:
            what = f"{len(labels)} labels ({', '.join(labels)[:100]})" if labels else "no label"
            raise self.fault(line, f"has {what}; set data.multi_label = true to allow it")
        if not all(map(_is_label, labels)):
            raise self.fault(line, "has an empty label, or one that is not UTF-8")
        return tuple(dict.fromkeys(labels))

    def _row(self, line: int, path: str, labels: tuple[str, ...], split: str) -> _Row:
        if not path:
            raise self.fault(line, "has no path")
        if not split:
            raise self.fault(line, "has no split")
        if "\0" in path or not (path.isascii() or _is_file_name(path)):
            raise self.fault(line, "has a path that no file can have")
        # As in a folder, names are below the list, so that both may move together.
        return _Row(line, path.removeprefix(self._above), labels)


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


def _find_parts(groups: _Groups, has_splits: bool, request: Request) -> dict[str, tuple[Span, ...]]:
    """The splits that are asked for, and which parts of each."""
    parts = _parts(groups, request.split, request.field, has_splits)
    for name in parts:
        if name not in groups:
            if has_splits:
                shown = [f"{each} ({len(rows):,} images)" for each, rows in groups.items()]
                more = ", ..." if len(shown) > 8 else ""
                reason = f"the list has no split {name!r}, only {', '.join(shown[:8])}{more}"
            else:
                reason = (
                    "the list has no 'split' in its lines, so that all of it is 'train'; take "
                    "parts of that, such as data.train_split = 'train[:90%]' and "
                    "data.eval_split = 'train[90%:]'"
                )
            raise request.fault(reason)
    return parts


def _parts(
    groups: _Groups, split: str, field: str, has_splits: bool
) -> dict[str, tuple[Span, ...]]:
    is_expression = set("[+") & set(split) and split not in groups
    parts = parse(split, field) if is_expression else {split: WHOLE}
    if not has_splits and len(parts) == 1 and set(parts) <= set(_WHOLE_LIST):
        return {_WHOLE_LIST[0]: next(iter(parts.values()))}
    return parts


def _training_classes(
    groups: _Groups, parts: dict[str, tuple[Span, ...]], has_splits: bool, request: Request
) -> tuple[str, ...]:
    """Labels of the training split, or of the split itself where there is no other.

    Of a part of a split they are those of the whole: its classes do not depend on its length.
    """
    names = set(parts)
    if request.train_split not in ("", request.split):
        trained = set(_parts(groups, request.train_split, "data.train_split", has_splits))
        names = trained if trained <= set(groups) else names
    labels = {label for name in names for row in groups[name] for label in row.labels}
    if all(each.isdecimal() and each.isascii() and len(each) < 20 for each in labels):
        return tuple(sorted(labels, key=lambda each: (int(each), each)))
    return tuple(sorted(labels))


def _chosen(groups: _Groups, parts: dict[str, tuple[Span, ...]], reader: _Reader) -> list[_Row]:
    """The rows of a part, in the order of the list."""
    chosen: list[_Row] = []
    for name, spans in parts.items():
        rows = groups[name]
        _check_once(rows, reader)
        if spans != WHOLE:
            rows = [
                alike[place]
                for alike in _by_class(rows)
                for place in select([row.path for row in alike], spans)
            ]
        chosen += rows
    return sorted(chosen)


def _by_class(rows: list[_Row]) -> Iterable[list[_Row]]:
    """Rows of one class each: that of the rarest label, so that rare ones are in all parts."""
    counts = collections.Counter(label for row in rows for label in row.labels)
    groups: dict[str, list[_Row]] = collections.defaultdict(list)
    for row in rows:
        groups[min(row.labels, key=lambda each: (counts[each], each), default="")].append(row)
    return groups.values()


def _check_once(rows: list[_Row], reader: _Reader) -> None:
    lines: dict[str, int] = {}
    for row in rows:
        first = lines.setdefault(row.path, row.line)
        if first != row.line:
            raise reader.fault(row.line, f"names the image of line {first:,} again: {row.path}")


def _check_known(rows: list[_Row], numbers: dict[str, int], reader: _Reader) -> None:
    for row in rows:
        for label in row.labels:
            if label not in numbers:
                raise reader.fault(
                    row.line,
                    f"the label {named([label], numbers)} is none of the {len(numbers)} classes "
                    f"that are trained on ({named(numbers, [label])})",
                )


def _left_out(missing: str, rows: list[_Row], sizes: list[int], reader: _Reader) -> str:
    gone = [row for row, size in zip(rows, sizes) if size < 0]
    if gone and len(gone) == len(rows):
        raise reader.fault(
            gone[0].line,
            f"there is no file {gone[0].path}, nor any of the others; paths are relative to the "
            "folder of the list",
        )
    count = (
        f"missing files, which count as corrupt: {len(gone):,}, such as {gone[0].path}"
        if gone
        else ""
    )
    return "; ".join(filter(None, (missing, count)))


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:  # whoever reads it, names it
        return -1


def _ends(lengths: Iterable[int]) -> np.ndarray:
    return np.array([0, *itertools.accumulate(lengths)], np.int64)
