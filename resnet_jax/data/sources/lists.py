"""Lists of images and labels as a source: CSV and JSON Lines."""

from __future__ import annotations

import collections
import itertools
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from resnet_jax.data.sources.base import Label, Source, digest, shortlist
from resnet_jax.data.sources.folders import read_image, stored_channels
from resnet_jax.data.sources.list_reader import ONLY_SPLIT, ListReader, Row, RowsBySplit
from resnet_jax.data.sources.splits import (
    WHOLE_SPLIT,
    Span,
    SplitSpec,
    parse_split,
    select_images,
    split_hint,
)

# Names for the whole of a list without splits: the default of data.train_split, and what reads
# better for evaluation.
_WHOLE_LIST = (ONLY_SPLIT, "all")


class ListSource(Source):
    """The images and labels that a file of the kind "csv" or "jsonl" lists."""

    def __init__(self, kind: str, path: Path, spec: SplitSpec) -> None:
        self.name, self.split = spec.name, spec.split
        self._folder = str(path.parent)
        reader = ListReader(path, spec)
        rows_by_split = reader.read(kind)
        parts = _find_parts(rows_by_split, reader.has_splits, spec)
        rows = _selected_rows(rows_by_split, parts, reader)
        self.class_names = spec.classes or _training_classes(
            rows_by_split, parts, reader.has_splits, spec
        )
        numbers = {label: number for number, label in enumerate(self.class_names)}
        _check_labels(rows, numbers, reader)
        found = {label for row in rows for label in row.labels}
        missing = spec.check_classes(found, self.class_names)
        sizes = [_size(os.path.join(self._folder, row.path)) for row in rows]
        self.left_out = _left_out_text(missing, rows, sizes, reader)
        # One string of bytes keeps a million paths small, and quick to copy to worker processes.
        paths = [os.fsencode(row.path) for row in rows]
        self._paths, self._path_ends = b"".join(paths), _ends(map(len, paths))
        self._labels = np.array([numbers[x] for row in rows for x in row.labels], np.int32)
        self._label_ends = _ends(len(row.labels) for row in rows)
        self.label_shape = (self.num_classes,) if reader.multi_label else ()
        self.channels = self._find_channels(rows, spec)
        self.image_shape = None
        lines = [f"{row.path} {size} {row.labels}" for row, size in zip(rows, sizes)]
        self.fingerprint = digest([spec.split, len(self), *lines])

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

    def _find_channels(self, rows: list[Row], spec: SplitSpec) -> int:
        by_class: dict[tuple[str, ...], list[str]] = collections.defaultdict(list)
        for row in rows:
            by_class[() if self.label_shape else row.labels].append(row.path)
        files = list(by_class.values())
        folder, no_folders = Path(self._folder), [""] * len(files)
        return stored_channels(folder, no_folders, files, spec.field, spec.split)


def list_splits(kind: str, path: Path, spec: SplitSpec) -> list[str]:
    """The splits of a list in its order; ["train"] if its lines give none."""
    return [*ListReader(path, spec).read(kind)]


def _find_parts(
    rows_by_split: RowsBySplit, has_splits: bool, spec: SplitSpec
) -> dict[str, tuple[Span, ...]]:
    """The requested splits, and which parts of each."""
    parts = _parts(rows_by_split, spec.split, spec.field, has_splits)
    for name in parts:
        if name not in rows_by_split:
            if has_splits:
                shown = [f"{each} ({len(rows):,} images)" for each, rows in rows_by_split.items()]
                more = ", ..." if len(shown) > 8 else ""
                hint = split_hint(name, rows_by_split, spec.field)
                reason = f"the list has no split {name!r}, only {', '.join(shown[:8])}{more}{hint}"
            else:
                reason = (
                    "the list has no 'split' in its lines, so all of it is 'train'; use parts of "
                    "it, such as data.train_split = 'train[:90%]' and "
                    "data.eval_split = 'train[90%:]'"
                )
            raise spec.error(reason)
    return parts


def _parts(
    rows_by_split: RowsBySplit, split: str, field: str, has_splits: bool
) -> dict[str, tuple[Span, ...]]:
    is_expression = set("[+") & set(split) and split not in rows_by_split
    parts = parse_split(split, field) if is_expression else {split: WHOLE_SPLIT}
    if not has_splits and len(parts) == 1 and set(parts) <= set(_WHOLE_LIST):
        return {ONLY_SPLIT: next(iter(parts.values()))}
    return parts


def _training_classes(
    rows_by_split: RowsBySplit,
    parts: dict[str, tuple[Span, ...]],
    has_splits: bool,
    spec: SplitSpec,
) -> tuple[str, ...]:
    """Labels of the training split, or of the split itself if that one is missing.

    A part of a split has the classes of the whole, so they do not depend on the part's size.
    """
    names = set(parts)
    if spec.train_split not in ("", spec.split):
        trained = set(_parts(rows_by_split, spec.train_split, "data.train_split", has_splits))
        names = trained if trained <= set(rows_by_split) else names
    labels = {label for name in names for row in rows_by_split[name] for label in row.labels}
    if all(each.isdecimal() and each.isascii() and len(each) < 20 for each in labels):
        return tuple(sorted(labels, key=lambda each: (int(each), each)))
    return tuple(sorted(labels))


def _selected_rows(
    rows_by_split: RowsBySplit, parts: dict[str, tuple[Span, ...]], reader: ListReader
) -> list[Row]:
    """The rows of the requested parts, in the order of the list."""
    selected: list[Row] = []
    for name, spans in parts.items():
        rows = rows_by_split[name]
        _check_unique(rows, reader)
        if spans != WHOLE_SPLIT:
            rows = [
                of_class[index]
                for of_class in _by_class(rows)
                for index in select_images([row.path for row in of_class], spans)
            ]
        selected += rows
    return sorted(selected)


def _by_class(rows: list[Row]) -> Iterable[list[Row]]:
    """Rows grouped by their rarest label, so that rare labels are in all parts."""
    counts = collections.Counter(label for row in rows for label in row.labels)
    groups: dict[str, list[Row]] = collections.defaultdict(list)
    for row in rows:
        groups[min(row.labels, key=lambda each: (counts[each], each), default="")].append(row)
    return groups.values()


def _check_unique(rows: list[Row], reader: ListReader) -> None:
    lines: dict[str, int] = {}
    for row in rows:
        first = lines.setdefault(row.path, row.line)
        if first != row.line:
            raise reader.error(row.line, f"names the image of line {first:,} again: {row.path}")


def _check_labels(rows: list[Row], numbers: dict[str, int], reader: ListReader) -> None:
    for row in rows:
        for label in row.labels:
            if label not in numbers:
                raise reader.error(
                    row.line,
                    f"the label {shortlist([label], numbers)} is not one of the {len(numbers)} "
                    f"training classes ({shortlist(numbers, [label])})",
                )


def _left_out_text(missing: str, rows: list[Row], sizes: list[int], reader: ListReader) -> str:
    absent = [row for row, size in zip(rows, sizes) if size < 0]
    if absent and len(absent) == len(rows):
        raise reader.error(
            absent[0].line,
            f"there is no file {absent[0].path}, nor any of the others; paths are relative to the "
            "folder of the list",
        )
    count = (
        f"missing files, which count as corrupt: {len(absent):,}, such as {absent[0].path}"
        if absent
        else ""
    )
    return "; ".join(filter(None, (missing, count)))


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:  # is reported when the file is read
        return -1


def _ends(lengths: Iterable[int]) -> np.ndarray:
    return np.array([0, *itertools.accumulate(lengths)], np.int64)
