"""Folders of image files as a source: PATH/SPLIT/CLASS/image.jpg."""

from __future__ import annotations

import bisect
import collections
import itertools
import os
from pathlib import Path

import numpy as np

from resnet_jax.data.base import Source, digest, fault
from resnet_jax.data.budget import FILE_BYTES
from resnet_jax.errors import DataError
from resnet_jax.files import open_regular

# What is an image in a folder, by the formats that are decoded.
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    *(".avif", ".jp2", ".ppm", ".pgm", ".pbm", ".npy"),
)
# Images whose headers are read, evenly from all of a split and at least 16 of each class, to learn
# how many channels there are. Most data sets have color, which is clear after a few.
_LOOKED_AT = 1000
_ENOUGH = 16  # that have color, or more channels
_FOLDERS = "/"  # counted among suffixes, none of which can be this


class FolderSource(Source):
    """PATH/SPLIT/CLASS/image files."""

    def __init__(self, name: str, root: Path, split: str, train_split: str, field: str) -> None:
        self.name, self.split = name, split
        self._folder = _split_folder(name, root, split, field)
        classes = _class_folders(self._folder, field, split)
        self.class_names = tuple(classes)
        reference = root / train_split
        if split != train_split and train_split and os.path.isdir(reference):
            trained = _class_folders(reference, "data.train_split", train_split)
            _check_classes(field, split, classes, train_split, trained)
        if len(classes) < 2:
            raise fault(field, split, f"{self._folder} has one class, {classes[0]}; needs two")
        others: collections.Counter[str] = collections.Counter()
        files = {each: _image_files(self._folder / each, field, split, others) for each in classes}
        self.left_out = _left_out(others)
        self._files = [[file for file, _ in files[each]] for each in classes]
        self._ends = list(itertools.accumulate(map(len, self._files)))
        self.channels = _stored_channels(self._folder, classes, self._files, field, split)
        self.image_shape = None
        sizes = [f"{each}/{file} {size}" for each in classes for file, size in files[each]]
        self.fingerprint = digest([split, len(self), *sizes])

    def __len__(self) -> int:
        return self._ends[-1]

    def labels(self) -> np.ndarray:
        counts = [len(files) for files in self._files]
        return np.repeat(np.arange(len(counts), dtype=np.int32), counts)

    def _place(self, position: int) -> tuple[Path, int]:
        label = bisect.bisect_right(self._ends, position)
        file = self._files[label][position - self._ends[label]]  # counted from the class's end
        return self._folder / self.class_names[label] / file, label

    def _name(self, position: int) -> str:
        return str(self._place(position)[0])

    def _read(self, position: int) -> tuple[bytes, int]:
        path, label = self._place(position)
        from resnet_jax.data.decode import read_encoded

        try:
            return read_encoded(path), label
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror or error}") from error


def _split_folder(name: str, root: Path, split: str, field: str) -> Path:
    if not os.path.isdir(root):
        raise fault("data.name", name, f"{root} is not a folder; give PATH of PATH/SPLIT/CLASS")
    folder = root / split
    if ".." in Path(split).parts or Path(split).is_absolute():
        raise fault(field, split, f"must be the name of a folder in {root}")
    if split and os.path.isdir(folder) and folder.resolve() != root.resolve():
        return folder
    there = [each for each in _scan(root, "data.name", name) if os.path.isdir(root / each)]
    if not there:
        raise fault("data.name", name, f"{root} has no folders; it needs {split}/CLASS/image.jpg")
    shown = ", ".join(there[:8]) + (", ..." if len(there) > 8 else "")
    part = "; a part of a folder cannot be chosen" if "[" in split else ""
    raise fault(field, split, f"{root} has no folder of this name{part}; it has: {shown}")


def _class_folders(folder: Path, field: str, split: str) -> list[str]:
    classes = [each for each in _scan(folder, field, split) if os.path.isdir(folder / each)]
    if not classes:
        raise fault(field, split, f"{folder} has no class folders; it needs CLASS/image.jpg")
    return classes


def _check_classes(
    field: str, split: str, classes: list[str], train_split: str, trained: list[str]
) -> None:
    unknown, absent = set(classes) - set(trained), set(trained) - set(classes)
    for which, names in (("more", unknown), ("fewer", absent)):
        if names:
            shown = ", ".join(sorted(names)[:3])
            raise fault(
                field,
                split,
                f"has {len(names)} classes {which} than data.train_split = {train_split!r} "
                f"({shown}); both need the same class folders",
            )


def _image_files(
    folder: Path, field: str, split: str, others: collections.Counter[str]
) -> list[tuple[str, int]]:
    """Names and sizes in bytes, in the order of the names; what else is there is counted.

    Broken links and special files are among them: whoever reads one, names and counts it.
    """
    files = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if os.path.isdir(entry):
                    others[_FOLDERS] += 1
                elif entry.name.lower().endswith(IMAGE_SUFFIXES):
                    files.append((entry.name, _size(entry)))
                else:
                    others[os.path.splitext(entry.name)[1] or entry.name] += 1
    except OSError as error:
        raise fault(field, split, f"cannot read {folder} ({error.strerror or error})") from error
    if not files:
        raise fault(
            field, split, f"class folder {folder} has no images ({', '.join(IMAGE_SUFFIXES)})"
        )
    return sorted(files)


def _left_out(others: collections.Counter[str]) -> str:
    """What is in class folders and is no image by its name; "" where there is nothing."""
    folders = others.pop(_FOLDERS, 0)
    kinds = [kind for kind, _ in others.most_common(5)]
    more = ", ..." if len(others) > 5 else ""
    parts = [f"{others.total():,} files ({', '.join(kinds)}{more})"] if others else []
    parts += [f"{folders:,} folders in class folders"] if folders else []
    return " and ".join(parts)


def _size(entry: os.DirEntry[str]) -> int:
    try:
        return entry.stat().st_size
    except OSError:  # a link to nothing, or to itself
        return -1


def _scan(folder: Path, field: str, value: str) -> list[str]:
    """Names in a folder, sorted, without hidden ones."""
    try:
        return sorted(each for each in os.listdir(folder) if not each.startswith("."))
    except OSError as error:
        raise fault(field, value, f"cannot read {folder} ({error.strerror or error})") from error


def _stored_channels(
    folder: Path, classes: list[str], files: list[list[str]], field: str, split: str
) -> int:
    """The channels of most of the images that are looked at.

    Grey images count as color where any has color. Images of another number of channels are named
    when they are read, like those that cannot be decoded.
    """
    from resnet_jax.data.decode import read_header

    share = max(_LOOKED_AT // len(classes), 16)
    counts: collections.Counter[int] = collections.Counter()
    for each, names in zip(classes, files):
        for name in names[:: -(-len(names) // share)]:
            try:
                with open_regular(folder / each / name, FILE_BYTES) as file:
                    counts[read_header(file).channels] += 1
            except (DataError, OSError):  # is named when it is read as an image of the run
                continue
            # Only after grey images alone can a later one change the answer.
            if counts.total() >= _ENOUGH and _most_common(counts) != 1:
                return _most_common(counts)
    if not counts:
        raise fault(field, split, f"none of the images looked at in {folder} can be opened")
    return _most_common(counts)


def _most_common(counts: collections.Counter[int]) -> int:
    grey = counts[1] if counts[3] else 0
    return max(counts, key=lambda channels: counts[channels] + grey * (channels == 3))
