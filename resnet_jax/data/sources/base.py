"""What every source of images, and every batch, has in common."""

from __future__ import annotations

import abc
import collections
import concurrent.futures
import dataclasses
import hashlib
import operator
import unicodedata
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import numpy as np

from resnet_jax.errors import DataError, one_line

Batch = dict[str, Any]  # of arrays, by name
Label = int | np.ndarray
_READERS = 16  # threads, where labels lie beside the images


class Source(abc.ABC):
    """Encoded images with labels, in a fixed order and with random access.

    Safe to read from many threads; pickles small and opens its files again after unpickling.

    Attributes:
      class_names: The name of each label.
      channels: As stored: 1 (grey), 3 (color), or another number that all images have.
      image_shape: (height, width) in pixels; None where images differ or it is not known.
      label_shape: () where an image has one label, an int; (num_classes,) where it may have none
        or several: its label is then int32 [num_classes] of 0 and 1.
      name: As in `data.name`.
      split: As in `data.eval_split`.
      fingerprint: 16 hexadecimal digits that change when the data set or its split does.
      left_out: What lies among the images and is not read, or cannot be, and classes without
        images, in words; "" where there is nothing.

    Example:
      >>> import tempfile
      >>> from resnet_jax.data.sources.opening import open_source
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     source = open_source("digits", "test", folder)
      ...     image, label = source[0]
      >>> image[:4], 0 <= label < source.num_classes, source.image_name(0)
      (b'\\x89PNG', True, 'test[0]')
    """

    class_names: tuple[str, ...]
    channels: int
    image_shape: tuple[int, int] | None
    fingerprint: str
    left_out: str = ""
    label_shape: tuple[int, ...] = ()
    name: str = ""
    split: str = ""

    @property
    def num_classes(self) -> int:
        """The number of labels, whether or not the split has images of all of them."""
        return len(self.class_names)

    @abc.abstractmethod
    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[bytes, Label]:
        return self._read(self._position(index))

    def labels(self) -> np.ndarray:
        """The label of each image, int32 [N] or [N, classes], which may take reading them all."""
        with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
            each = [*pool.map(lambda position: self._read(position)[1], range(len(self)))]
        return np.array(each, np.int32)

    def class_counts(self) -> np.ndarray:
        """Images of each class, int64 [classes]."""
        return count_labels(self.labels(), self.num_classes)

    def image_name(self, index: int) -> str:
        """The image's path, or its place in the split, for messages."""
        return self._name(self._position(index))

    @abc.abstractmethod
    def _read(self, position: int) -> tuple[bytes, Label]: ...

    @abc.abstractmethod
    def _name(self, position: int) -> str: ...

    def _position(self, index: int) -> int:
        position = operator.index(index)
        if position < 0:
            position += len(self)
        if not 0 <= position < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        return position


@dataclasses.dataclass(frozen=True)
class Request:
    """What a split of image folders or of a list is opened for.

    Args:
      name: As in `data.name`.
      split: As in `data.train_split`.
      field: The field that says the split, for messages.
      train_split: The split that is trained on, whose classes count; "": those of `split`.
      classes: The classes, where they are known already; (): those of `train_split`.
      multi_label: Whether an image has none or several labels; None: as the list says it.
      label_separator: Between the labels of an image in a CSV file.
      allow_missing_classes: Whether classes may be without images.
    """

    name: str
    split: str
    field: str
    train_split: str = ""
    classes: tuple[str, ...] = ()
    multi_label: bool | None = None
    label_separator: str = "|"
    allow_missing_classes: bool = False

    def fault(self, reason: object) -> DataError:
        """An error about the split."""
        return fault(self.field, self.split, reason)

    def check_classes(self, found: Collection[str], classes: Sequence[str], notes: str = "") -> str:
        """Compares the classes that a split has images of with those that there are.

        Args:
          found: Classes with images.
          classes: All classes.
          notes: What else is in the split and may be meant as images.

        Returns:
          The missing ones, in words; "" where there are none.

        Raises:
          DataError: There are unknown classes, or missing ones that are not allowed.
        """
        known, there = set(classes), set(found)
        if unknown := there - known:
            raise self.fault(
                f"has {len(unknown)} classes more than data.train_split = {self.train_split!r} "
                f"({named(unknown, known)}); both need the same classes"
            )
        if len(classes) < 2:
            raise self.fault(f"has one class, {named(classes)}; needs two")
        missing = known - there
        if not missing:
            return ""
        what = f"no images of {len(missing)} of the {len(known)} classes ({named(missing, there)})"
        if not self.allow_missing_classes or not there:
            there_is = f" (it has {notes})" if notes else ""
            raise self.fault(
                f"has {what}{there_is}; add some, or set data.allow_missing_classes = true "
                "(evaluate: --allow_missing_classes)"
            )
        return what


def count_labels(labels: np.ndarray, classes: int) -> np.ndarray:
    """Images of each class, int64 [classes], by labels [N] or sets of labels [N, classes]."""
    if labels.ndim == 2:
        return np.asarray(labels.sum(0, dtype=np.int64))
    return np.bincount(labels, minlength=classes)


def one_hot(labels: int | np.ndarray, classes: int) -> np.ndarray:
    """Labels as those of images that may have several, int32 [..., classes] of 0 and 1.

    Args:
      labels: One for each image, or for the only one.
      classes: How many there are.

    Returns:
      A single 1 for each image.

    Example:
      >>> one_hot(1, classes=3).tolist()
      [0, 1, 0]
    """
    return np.equal.outer(labels, np.arange(classes)).astype(np.int32)


def named(names: Iterable[str], others: Iterable[str] = ()) -> str:
    """Up to three names for a message; those that look like another are written in ASCII.

    Args:
      names: The names.
      others: Names that the reader may take them for.

    Returns:
      Names with commas, those of a set sorted.

    Example:
      >>> print(named(["cat ", "dog"], ["cat"]))
      'cat ', dog
    """
    names = list(names) if isinstance(names, Sequence) else sorted(names)
    looks = collections.Counter(map(_look, {*names, *others}))
    shown = [ascii(each) if looks[_look(each)] > 1 else each for each in names[:3]]
    return ", ".join(shown) + (", ..." if len(names) > 3 else "")


def _look(name: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", name).split())


def fault(field: str, value: object, reason: object) -> DataError:
    """An error of one line: which field, what it was, and why it will not do.

    Args:
      field: Dotted name of the configuration's field.
      value: What it was set to.
      reason: What is wrong and what to do, as text or as the error that tells it.

    Returns:
      The error, to be raised.

    Example:
      >>> str(fault("data.name", "cifar", "must be digits"))
      "data.name = 'cifar': must be digits"
    """
    return DataError(f"{field} = {value!r}: {one_line(reason)}")


def digest(parts: Sequence[object]) -> str:
    """A fingerprint: 16 hexadecimal digits of the parts' text.

    Args:
      parts: What tells one data set from another.

    Returns:
      The same for the same parts, on every machine.

    Example:
      >>> digest(["digits", "train", 1437]) == digest(["digits", "test", 360])
      False
    """
    return hashlib.sha256("\n".join(map(str, parts)).encode(errors="surrogateescape")).hexdigest()[
        :16
    ]
