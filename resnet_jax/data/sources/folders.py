"""Folders of image files as a source: PATH/SPLIT/CLASS/image.jpg."""

from __future__ import annotations

import bisect
import collections
import itertools
import os
import stat
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from resnet_jax.data.image_files import IMAGE_SUFFIXES
from resnet_jax.data.sources.base import Label, Source, digest, field_error, one_hot
from resnet_jax.data.sources.splits import (
    HELD_OUT,
    WHOLE_SPLIT,
    Span,
    SplitSpec,
    parse_split,
    select_images,
    split_hint,
)
from resnet_jax.errors import DataError
from resnet_jax.files import open_regular
from resnet_jax.limits import MAX_IMAGE_BYTES

# Images whose headers are read to find the number of channels: evenly from the whole split, and at
# least 16 of each class. Most datasets have color, which is clear after a few.
_PROBED_IMAGES = 1000
_ENOUGH_PROBES = 16  # if they have color, or more channels


class FolderSource(Source):
    """The images in PATH/SPLIT/CLASS, in the class folders or deeper; `root` is PATH."""

    def __init__(self, root: Path, spec: SplitSpec) -> None:
        self.name, self.split = spec.name, spec.split
        parts = _find_splits(root, spec)
        self._root = root / next(iter(parts)) if len(parts) == 1 else root
        self.class_names = spec.classes or _training_classes(root, parts, spec)
        notes = _UnusedFiles()
        files = _selected_files(root, parts, spec, notes)
        missing = spec.check_classes({label for label, _ in files}, self.class_names, notes.text())
        self.left_out = notes.text(missing)
        # The files of one class folder follow each other, in the order of the classes.
        numbers = {label: number for number, label in enumerate(self.class_names)}
        keys = sorted(files, key=lambda key: (numbers[key[0]], key[1]))
        self._labels = [numbers[label] for label, _ in keys]
        self._folders = [label if len(parts) == 1 else f"{name}/{label}" for label, name in keys]
        self._files = [[file for file, _ in files[key]] for key in keys]
        self._ends = list(itertools.accumulate(map(len, self._files)))
        self.channels = stored_channels(
            self._root, self._folders, self._files, spec.field, spec.split
        )
        self.image_shape = None
        if spec.multi_label:
            self.label_shape = (self.num_classes,)
        sizes = [
            f"{folder}/{file} {size}"
            for folder, key in zip(self._folders, keys)
            for file, size in files[key]
        ]
        self.fingerprint = digest([spec.split, len(self), *sizes])

    def __len__(self) -> int:
        return self._ends[-1]

    def labels(self) -> np.ndarray:
        counts = [len(files) for files in self._files]
        labels = np.repeat(np.array(self._labels, np.int32), counts)
        return one_hot(labels, self.num_classes) if self.label_shape else labels

    def _place(self, position: int) -> tuple[Path, int]:
        run = bisect.bisect_right(self._ends, position)
        file = self._files[run][position - self._ends[run]]  # counted from the run's end
        return self._root / self._folders[run] / file, self._labels[run]

    def _name(self, position: int) -> str:
        return str(self._place(position)[0])

    def _read(self, position: int) -> tuple[bytes, Label]:
        path, label = self._place(position)
        return read_image(path), one_hot(label, self.num_classes) if self.label_shape else label


def read_image(path: Path) -> bytes:
    """Reads an encoded image; raises DataError if that fails or the file is not regular."""
    from resnet_jax.data.decode import read_encoded

    try:
        return read_encoded(path)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error


def folder_splits(root: Path, name: str) -> list[str]:
    """The names of the folders in `root`; `name` is `data.name`, for messages."""
    if not os.path.isdir(root):
        raise field_error(
            "data.name", name, f"{root} is not a folder; give PATH of PATH/SPLIT/CLASS"
        )
    return _folders(root, "data.name", name)


def _find_splits(root: Path, spec: SplitSpec) -> dict[str, tuple[Span, ...]]:
    """The folders of the requested splits, and which parts of each."""
    folder_splits(root, spec.name)
    parts = _parts(root, spec.split, spec.field)
    for name in parts:
        if ".." in Path(name).parts or Path(name).is_absolute():
            raise spec.error(f"must be the name of a folder in {root}")
        if not _is_split(root, name):
            raise _missing_split(root, name, spec)
    return parts


def _parts(root: Path, split: str, field: str) -> dict[str, tuple[Span, ...]]:
    """The parts that an expression names, unless it is itself the name of a folder."""
    is_expression = set("[+") & set(split) and not _is_split(root, split)
    return parse_split(split, field) if is_expression else {split: WHOLE_SPLIT}


def _is_split(root: Path, name: str) -> bool:
    if not name or ".." in Path(name).parts or Path(name).is_absolute():
        return False
    return os.path.isdir(root / name) and (root / name).resolve() != root.resolve()


def _missing_split(root: Path, split: str, spec: SplitSpec) -> DataError:
    found = folder_splits(root, spec.name)
    if not found:
        reason = f"{root} has no folders; it needs {split}/CLASS/image.jpg"
        return field_error("data.name", spec.name, reason)
    shown = ", ".join(found[:8]) + (", ..." if len(found) > 8 else "")
    reason = f"{root} has no folder {split!r}; it has: {shown}"
    others = [name for name in HELD_OUT if name != root.name and os.path.isdir(root.parent / name)]
    classes = are_classes(root, found)
    if classes and others:
        reason += (
            f". If these are classes, {root.name} is a split of data.name = "
            f"'folder:{root.parent}', beside {others[0]}"
        )
    elif classes:
        reason += (
            f". If these are classes, {root.name} is the split: data.name = "
            f"'folder:{root.parent}', data.train_split = '{root.name}[:90%]' and "
            f"data.eval_split = '{root.name}[90%:]'"
        )
    elif hint := split_hint(split, found, spec.field):
        reason += hint
    elif len(found) == 1 and spec.train_split.partition("[")[0] in ("", found[0]):
        reason += (
            f"; to divide it, set data.train_split = '{found[0]}[:90%]' and data.eval_split = "
            f"'{found[0]}[90%:]'"
        )
    return spec.error(reason)


def are_classes(root: Path, folders: Sequence[str]) -> bool:
    """Whether folders in `root` look like classes instead of splits: the first one has images."""
    return any(each.lower().endswith(IMAGE_SUFFIXES) for each in _scan(root / folders[0], "", ""))


def _training_classes(
    root: Path, parts: dict[str, tuple[Span, ...]], spec: SplitSpec
) -> tuple[str, ...]:
    """The class folders of the training split, or of the split itself if that one is missing."""
    field, names = spec.field, parts
    if spec.train_split not in ("", spec.split):
        trained = _parts(root, spec.train_split, "data.train_split")
        if all(_is_split(root, name) for name in trained):
            field, names = "data.train_split", trained
    return tuple(sorted({label for name in names for label in _classes(root / name, field, name)}))


def _classes(folder: Path, field: str, split: str) -> list[str]:
    classes = _folders(folder, field, split)
    if not classes:
        raise field_error(field, split, f"{folder} has no class folders; it needs CLASS/image.jpg")
    return classes


def _selected_files(
    root: Path, parts: dict[str, tuple[Span, ...]], spec: SplitSpec, notes: _UnusedFiles
) -> dict[tuple[str, str], list[tuple[str, int]]]:
    """Names below the class folder and sizes in bytes, by class and split, without empty ones."""
    selected = {}
    for name, spans in parts.items():
        folder = root / name
        classes = _classes(folder, spec.field, spec.split)
        inside = set(_scan(folder, spec.field, spec.split)) - set(classes)
        notes.outside += sum(each.lower().endswith(IMAGE_SUFFIXES) for each in inside)
        for label in classes:
            files = _image_files(folder / label, spec, notes)
            indices = select_images([f"{label}/{file}" for file, _ in files], spans)
            if indices:
                selected[label, name] = [files[index] for index in indices]
    return selected


def _image_files(folder: Path, spec: SplitSpec, notes: _UnusedFiles) -> list[tuple[str, int]]:
    """Names below a class folder and sizes in bytes, in the order of the names.

    Broken links and special files are included, and reported when they are read. Links to folders
    are followed, but no folder is entered twice, nor one that contains the class folder.
    """
    found, todo = [], [""]
    entered: set[tuple[int, int]] = set()
    while todo:
        below = todo.pop()
        try:
            with os.scandir(folder / below) as entries:
                each_entry = [each for each in entries if not each.name.startswith(".")]
        except OSError as error:
            raise spec.error(f"cannot read {folder / below} ({error.strerror or error})") from error
        for entry in sorted(each_entry, key=lambda entry: entry.name):
            status = _status(entry)
            if status is not None and stat.S_ISDIR(status.st_mode):
                entered = entered or _with_parents(folder)
                if (inode := (status.st_dev, status.st_ino)) not in entered:
                    entered.add(inode)
                    todo.append(f"{below}{entry.name}/")
            elif entry.name.lower().endswith(IMAGE_SUFFIXES):
                found.append((below + entry.name, -1 if status is None else status.st_size))
                notes.broken_links += status is None
            else:
                notes.others[os.path.splitext(entry.name)[1] or entry.name] += 1
    return sorted(found)


def _status(entry: os.DirEntry[str]) -> os.stat_result | None:
    try:
        return entry.stat()
    except OSError:  # a link to nothing, or to itself
        return None


def _with_parents(folder: Path) -> set[tuple[int, int]]:
    """Device and inode of a folder and its parents, by its path and by its path without links."""
    real = Path(os.path.realpath(folder))
    found = [os.stat(each) for each in (folder, *folder.parents, *real.parents)]
    return {(each.st_dev, each.st_ino) for each in found}


class _UnusedFiles:
    """What is in a split and is not used."""

    def __init__(self) -> None:
        self.others: collections.Counter[str] = collections.Counter()  # files, by suffix
        self.outside = 0  # images in no class folder
        self.broken_links = 0

    def text(self, missing: str = "") -> str:
        """A text about all of it, after the one about missing classes; "" if there is nothing."""
        parts = [missing] if missing else []
        if self.others:
            kinds = [kind for kind, _ in self.others.most_common(5)]
            more = ", ..." if len(self.others) > 5 else ""
            count = f"{self.others.total():,} files"
            parts.append(f"{count} that are not images by their names ({', '.join(kinds)}{more})")
        if self.outside:
            parts.append(f"{self.outside:,} images in no class folder")
        if self.broken_links:
            parts.append(f"{self.broken_links:,} broken links, which count as corrupt")
        return "; ".join(parts)


def _folders(folder: Path, field: str, value: str) -> list[str]:
    return [each for each in _scan(folder, field, value) if os.path.isdir(folder / each)]


def _scan(folder: Path, field: str, value: str) -> list[str]:
    """Names in a folder, sorted, without hidden ones."""
    try:
        return sorted(each for each in os.listdir(folder) if not each.startswith("."))
    except OSError as error:
        raise field_error(
            field, value, f"cannot read {folder} ({error.strerror or error})"
        ) from error


def stored_channels(
    folder: Path, classes: list[str], files: list[list[str]], field: str, split: str
) -> int:
    """The number of channels that most images have, judged by the headers of some.

    Gray images count as color if any image has color. Images of other channels are reported when
    they are read, like those that cannot be decoded.
    """
    from resnet_jax.data.decode import read_header

    per_class = max(_PROBED_IMAGES // len(classes), 16)
    counts: collections.Counter[int] = collections.Counter()
    for each, names in zip(classes, files):
        for name in names[:: -(-len(names) // per_class)]:
            try:
                with open_regular(folder / each / name, MAX_IMAGE_BYTES) as file:
                    counts[read_header(file).channels] += 1
            except (DataError, OSError):  # is reported when the run reads it
                continue
            # A later image can only change the answer if all are gray so far.
            if counts.total() >= _ENOUGH_PROBES and _most_common(counts) != 1:
                return _most_common(counts)
    if not counts:
        raise field_error(field, split, f"no image in {folder} can be opened")
    return _most_common(counts)


def _most_common(counts: collections.Counter[int]) -> int:
    gray = counts[1] if counts[3] else 0
    return max(counts, key=lambda channels: counts[channels] + gray * (channels == 3))
