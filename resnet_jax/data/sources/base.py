"""What a source of images is, and helpers that all sources share."""

from __future__ import annotations

import abc
import collections
import concurrent.futures
import hashlib
import operator
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from resnet_jax.errors import DataError, one_line

Batch = dict[str, Any]  # of arrays, by name
Label = int | np.ndarray
_LABEL_THREADS = 16  # that read labels stored with the images


class Source(abc.ABC):
    """Encoded images with labels, in a fixed order and with random access.

    A source hands out encoded images, so that a crop can be cut while its image is decoded. A new
    kind of source implements `__len__`, `_read` and `_name`, and is opened by `open_source` in
    opening.py. Sources must be safe to read from many threads, pickle small, and open their files
    again after unpickling.

    Attributes:
      class_names: The name of each label.
      channels: As stored: 1 (gray), 3 (color), or another number that all images have.
      image_shape: (height, width) in pixels; None if images differ or it is not known.
      label_shape: () if an image has one label, an int; (num_classes,) if it may have none or
        several: its label is then int32 [num_classes] of 0 and 1.
      name: As in `data.name`.
      split: As in `data.eval_split`.
      fingerprint: 16 hexadecimal digits that change when the dataset or its split does.
      left_out: Text about files that are not used and classes without images, or "".

    Example:
      >>> import tempfile
      >>> from resnet_jax.data.sources import open_source
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
        """The label of each image, int32 [N] or [N, num_classes]; may have to read all images."""
        with concurrent.futures.ThreadPoolExecutor(_LABEL_THREADS) as pool:
            each = [*pool.map(lambda position: self._read(position)[1], range(len(self)))]
        return np.array(each, np.int32)

    def class_counts(self) -> np.ndarray:
        """Images of each class, int64 [num_classes]."""
        return count_labels(self.labels(), self.num_classes)

    def image_name(self, index: int) -> str:
        """The image's path, or its place in the split, for messages."""
        return self._name(self._position(index))

    @abc.abstractmethod
    def _read(self, position: int) -> tuple[bytes, Label]:
        """The encoded image and its label; raises DataError if it cannot be read."""

    @abc.abstractmethod
    def _name(self, position: int) -> str: ...

    def _position(self, index: int) -> int:
        position = operator.index(index)
        if position < 0:
            position += len(self)
        if not 0 <= position < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        return position


def count_labels(labels: np.ndarray, classes: int) -> np.ndarray:
    """Images of each class, int64 [classes], by labels [N] or sets of labels [N, classes]."""
    if labels.ndim == 2:
        return np.asarray(labels.sum(0, dtype=np.int64))
    return np.bincount(labels, minlength=classes)


def one_hot(labels: int | np.ndarray, classes: int) -> np.ndarray:
    """Labels as sets of labels: int32 [..., classes] with a single 1.

    Example:
      >>> one_hot(1, classes=3).tolist()
      [0, 1, 0]
    """
    return np.equal.outer(labels, np.arange(classes)).astype(np.int32)


def shortlist(names: Iterable[str], similar: Iterable[str] = ()) -> str:
    """Up to three names for a message, those of a set sorted.

    A name that looks like another one, or like one of `similar`, is written in ASCII and quotes.

    Example:
      >>> print(shortlist(["cat ", "dog"], ["cat"]))
      'cat ', dog
    """
    names = list(names) if isinstance(names, Sequence) else sorted(names)
    looks = collections.Counter(map(_look, {*names, *similar}))
    shown = [ascii(each) if looks[_look(each)] > 1 else each for each in names[:3]]
    return ", ".join(shown) + (", ..." if len(names) > 3 else "")


def _look(name: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", name).split())


def field_error(field: str, value: object, reason: object) -> DataError:
    """The one-line error for a field of the configuration, its value, and what to do about it.

    Example:
      >>> str(field_error("data.name", "cifar", "must be digits"))
      "data.name = 'cifar': must be digits"
    """
    return DataError(f"{field} = {value!r}: {one_line(reason)}")


def check_local(field: str, value: str, address: str) -> None:
    """Raises DataError for an address in a bucket: datasets are read as files of this machine."""
    found = re.match(r"(\w+)://([^/]*)/*(.*)", address)
    if not found or found[1] == "file":
        return
    scheme, bucket, path = found.groups()
    mount = f"mount it (gcsfuse {bucket} /mnt/{bucket})" if scheme in ("gs", "gcs") else "mount it"
    reason = (
        "datasets are read from folders, not from a bucket, and a package such as gcsfs does not "
        f"change that; {mount} and give /mnt/{bucket}/{path}, or copy it to a disk"
    )
    raise field_error(field, value, reason)


def digest(parts: Sequence[object]) -> str:
    """A fingerprint: 16 hexadecimal digits of the parts' text, the same on every machine.

    Example:
      >>> digest(["digits", "train", 1437]) == digest(["digits", "test", 360])
      False
    """
    text = "\n".join(map(str, parts)).encode(errors="surrogateescape")
    return hashlib.sha256(text).hexdigest()[:16]
