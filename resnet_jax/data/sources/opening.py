"""Where images and labels come from: TFDS data sets, folders of files, lists, the embedded digits.

Every source hands out *encoded* images: decoding is the loader's work, so that it can cut a crop
while it decodes. Nothing here needs TensorFlow: TFDS reads ArrayRecord files without it.
"""

from __future__ import annotations

import errno
import os
import resource
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from resnet_jax.config.schema import DATA_NAMES, DATA_PLACES, Data
from resnet_jax.data.sources.base import Label, Request, Source, digest, fault
from resnet_jax.data.sources.folders import FolderSource, folder_splits
from resnet_jax.data.sources.lists import ListSource, list_splits
from resnet_jax.data.sources.tfds_files import (
    find_prepared,
    import_tfds,
    missing_shards,
    open_prepared,
    prepare_digits,
)
from resnet_jax.errors import DataError, library_errors, one_line

__all__ = ["Source", "open_source"]

_FILES = 65_536  # as many as data sets of several thousand shards need
_DAMAGED = "the file is damaged; restore it, or move the folder away and prepare it again"
_NO_DAMAGE = (errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.ENOENT, errno.ENOMEM)


def open_source(
    name: str,
    split: str,
    data_dir: str = "",
    *,
    train_split: str = "train",
    classes: Sequence[str] = (),
    multi_label: bool | None = False,
    label_separator: str = "|",
    allow_missing_classes: bool = False,
) -> Source:
    """Opens one split of a data set.

    Args:
      name: "digits", "tfds:NAME[:VERSION]", "folder:PATH", "csv:FILE" or "jsonl:FILE", as in
        `data.name`. A TFDS data set must have been prepared; the digits prepare themselves.
      split: The split, as in `data.train_split`, or parts of splits such as "train[:90%]".
      data_dir: Where TFDS keeps its data sets; "": TFDS's own default.
      train_split: The split that is trained on. The classes of a folder or a list are those of
        this split, whichever split is opened; "": those of the split that is opened.
      classes: Names of the classes of a folder or a list, where they are known; (): those of
        `train_split`.
      multi_label: Whether an image has none, one or several labels; None: as the data set has it.
        Images of a data set with one label each have labels of one 1 if it is True.
      label_separator: Between the labels of an image in a CSV file.
      allow_missing_classes: Open a folder or a list that has no images of some classes.

    Returns:
      The open source.

    Raises:
      DataError: The data set or the split is missing, half-prepared, damaged or not one of
        labelled images. One line that names the field, its value and what to do.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     len(open_source("digits", "train[:50%]", folder))
      718
    """
    field = "data.train_split" if split == train_split else "data.eval_split"
    kind, _, rest = name.partition(":")
    if name == "digits":
        return _TfdsSource(name, prepare_digits(data_dir), split, field, multi_label)
    if kind == "tfds" and rest:
        return _TfdsSource(name, find_prepared(rest, data_dir), split, field, multi_label)
    if kind not in DATA_PLACES or not rest:
        raise fault("data.name", name, f"must be {DATA_NAMES}")
    request = Request(
        name=name,
        split=split,
        field=field,
        train_split=train_split,
        classes=tuple(classes),
        multi_label=multi_label,
        label_separator=label_separator,
        allow_missing_classes=allow_missing_classes,
    )
    path = Path(os.path.expanduser(rest)).absolute()
    return FolderSource(path, request) if kind == "folder" else ListSource(kind, path, request)


def split_names(name: str, data_dir: str = "", label_separator: str = "|") -> list[str]:
    """The splits that a data set has.

    Args:
      name: As for `open_source`.
      data_dir: Likewise.
      label_separator: Likewise.

    Returns:
      Their names.

    Raises:
      DataError: The data set is missing or damaged.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     split_names("digits", folder)
      ['train', 'test']
    """
    kind, _, rest = name.partition(":")
    if name == "digits" or (kind == "tfds" and rest):
        folder = prepare_digits(data_dir) if name == "digits" else find_prepared(rest, data_dir)
        return [*_open_builder(name, folder).info.splits]
    if kind not in DATA_PLACES or not rest:
        raise fault("data.name", name, f"must be {DATA_NAMES}")
    path = Path(os.path.expanduser(rest)).absolute()
    if kind == "folder":
        return folder_splits(path, name)
    request = Request(name, "", "data.eval_split", label_separator=label_separator)
    return list_splits(kind, path, request)


def open_split(data: Data, split: str, **options: Any) -> Source:
    """Opens a split as a configuration says.

    Args:
      data: The section of a configuration.
      split: One of its splits.
      **options: Of `open_source`, where they differ from the section.

    Returns:
      The open source.

    Raises:
      DataError: As `open_source`.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     open_split(Data(data_dir=folder), "test").num_classes
      10
    """
    fields = {
        "train_split": data.train_split,
        "multi_label": data.multi_label,
        "label_separator": data.label_separator,
        "allow_missing_classes": data.allow_missing_classes,
    }
    return open_source(data.name, split, data.data_dir, **{**fields, **options})


class _TfdsSource(Source):
    """One split of a prepared TFDS data set in ArrayRecord files."""

    def __init__(
        self, name: str, folder: Path, split: str, field: str, multi_label: bool | None
    ) -> None:
        self.name, self.split = name, split
        self._folder = str(folder)
        self._set_up()
        _raise_file_limit()
        info = _open_builder(name, folder).info
        self._image_key, self._label_key, label = _keys(name, info, multi_label)
        shape = info.features[self._image_key].shape
        self.class_names = tuple(label.names or map(str, range(label.num_classes)))
        # A sequence of such labels, or one that is to look like it.
        if label is not info.features[self._label_key] or multi_label:
            self.label_shape = (self.num_classes,)
        self.channels = 1 if shape[-1] == 1 else 3
        self.image_shape = None if None in shape[:2] else (shape[0], shape[1])
        self._length = _check_split(name, info, split, field)
        self.fingerprint = digest([info.full_name, split, self._length])
        for position in (0, self._length - 1):  # damage is better found now than in an hour
            self._read(position)

    def _set_up(self) -> None:
        self._records: Any = None
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        # Neither locks nor open files pickle.
        return {k: v for k, v in self.__dict__.items() if k not in ("_records", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._set_up()

    def __len__(self) -> int:
        return self._length

    def _name(self, position: int) -> str:
        return f"{self.split}[{position}]"

    def _read(self, position: int) -> tuple[bytes, Label]:
        with library_errors(lambda error: self._unreadable(position, error)):
            record = self._open()[position]
            image, label = record[self._image_key], record[self._label_key]
        # A file that was cut off at a block's end gives records without content.
        if not image or label is None:
            raise self._fault(position, f"is empty; {_DAMAGED}")
        for each in np.ravel(label).tolist():
            if not 0 <= each < self.num_classes:
                raise DataError(
                    f"{self._name(position)} of {self._folder} has no label ({each}); "
                    "choose another split"
                )
        if not self.label_shape:
            return bytes(image), int(label)
        several = np.zeros(self.label_shape, np.int32)
        several[np.asarray(label, int)] = 1
        return bytes(image), several

    def _unreadable(self, position: int, error: Exception) -> DataError:
        """What riegeli and protobuf raise: the system's own errors are no damage."""
        text = one_line(error)
        if os.strerror(errno.EMFILE) in text or os.strerror(errno.ENFILE) in text:
            most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
            advice = f"at most {most:,} files may be open at a time; raise `ulimit -n`"
        elif any(os.strerror(code) in text for code in _NO_DAMAGE):
            advice = "mend that, and the same command goes on"
        else:
            advice = _DAMAGED
        return self._fault(position, f"cannot be read ({text}); {advice}")

    def _fault(self, position: int, what: str) -> DataError:
        return DataError(f"{self._name(position)} of {self._folder} {what}")

    def _open(self) -> Any:
        if self._records is None:
            with self._lock:
                if self._records is None:
                    self._records = _data_source(self._folder, self.split)
        return self._records


def _raise_file_limit() -> None:
    """Lets the process open more files: each of a data set's shards stays open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _FILES if hard == resource.RLIM_INFINITY else min(hard, _FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _open_builder(name: str, folder: Path) -> Any:
    builder = open_prepared(folder, name)
    formats = {each.value for each in builder.info.available_file_formats()}
    if "array_record" not in formats:
        base, _, version = name.removeprefix("tfds:").partition(":")
        root = folder.parents[base.count("/") + 1]
        raise fault(
            "data.name",
            name,
            f"prepared as {'/'.join(sorted(formats))} in {folder}, and needs array_record; run: "
            f"python -m resnet_jax prepare {base}{version and ':' + version} --data_dir={root} "
            "(converts, without a download)",
        )
    builder.info.set_file_format("array_record", override=True, override_if_initialized=True)
    return builder


def _data_source(folder: str, split: str) -> Any:
    tfds = import_tfds()
    builder = open_prepared(Path(folder), folder)
    # Masks and other images beside the main one would be decoded for nothing.
    decoders = {
        key: tfds.decode.SkipDecoding()
        for key, feature in builder.info.features.items()
        if isinstance(feature, tfds.features.Image)
    }
    return builder.as_data_source(split, decoders=decoders, file_format="array_record")


def _keys(name: str, info: Any, multi_label: bool | None) -> tuple[str, str, Any]:
    """The features that hold the image and the label, and the kind of each single label."""
    features = import_tfds().features
    default = "label" if "label" in info.features else "labels"
    image, label = (info.supervised_keys or ("image", default))[:2]
    known = all(isinstance(key, str) and key in info.features for key in (image, label))
    kind = info.features[label] if known else None
    if isinstance(kind, features.Sequence) and isinstance(kind.feature, features.ClassLabel):
        if multi_label is False:
            reason = f"has images of several labels each ({label}); set data.multi_label = true"
            raise fault("data.name", name, reason)
        kind = kind.feature
    if not isinstance(kind, features.ClassLabel) or not isinstance(
        info.features[image], features.Image
    ):
        raise fault(
            "data.name",
            name,
            f"has no image with one label (its features: {', '.join(info.features)})",
        )
    if (kind.num_classes or 0) < 2:
        raise fault("data.name", name, "has fewer than two classes")
    return image, label, kind


def _check_split(name: str, info: Any, split: str, field: str) -> int:
    """The number of images in a split that exists and is whole."""
    known = ", ".join(info.splits)
    no_split = f"{name} has no such split; its splits: {known}, or parts as train[:90%]"
    with library_errors(lambda error: fault(field, split, no_split)):  # of TFDS's parser
        part = info.splits[split]
    if not part.num_examples:
        raise fault(field, split, f"selects no image of {name}; its splits: {known}")
    if missing := missing_shards([part]):
        raise fault(
            "data.name",
            name,
            f"half-prepared: {len(missing)} files of split {split} are missing, such as "
            f"{missing[0]}; restore them, or move {info.data_dir} away and prepare it again",
        )
    return part.num_examples
