"""Prepared TFDS datasets as a source, read from their ArrayRecord files."""

from __future__ import annotations

import errno
import os
import resource
import threading
from pathlib import Path
from typing import Any

import numpy as np

from resnet_jax.data.sources.base import Label, Source, digest, field_error
from resnet_jax.data.sources.splits import split_hint
from resnet_jax.data.sources.tfds_files import import_tfds, missing_shards, open_prepared
from resnet_jax.errors import DataError, library_errors, one_line

_MAX_OPEN_FILES = 65_536  # as many as datasets of several thousand shards need
_DAMAGED = "the file is damaged; restore it, or move the folder away and prepare it again"
_SYSTEM_ERRORS = (errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.ENOENT, errno.ENOMEM)


class TfdsSource(Source):
    """One split of a prepared TFDS dataset."""

    def __init__(
        self, name: str, folder: Path, split: str, field: str, multi_label: bool | None
    ) -> None:
        self.name, self.split = name, split
        self._folder = str(folder)
        self._set_up()
        _raise_file_limit()
        info = _open_builder(name, folder).info
        self._image_key, self._label_key, label = _find_features(name, info, multi_label)
        shape = info.features[self._image_key].shape
        self.class_names = tuple(label.names or map(str, range(label.num_classes)))
        # A sequence of such labels, or single labels that are wanted as vectors.
        if label is not info.features[self._label_key] or multi_label:
            self.label_shape = (self.num_classes,)
        self.channels = 1 if shape[-1] == 1 else 3
        self.image_shape = None if None in shape[:2] else (shape[0], shape[1])
        self._length = _check_split(name, info, split, field)
        self.fingerprint = digest([info.full_name, split, self._length])
        for position in (0, self._length - 1):  # finds damage now, not in an hour
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
        # A file that is cut off at the end of a block has records without content.
        if not image or label is None:
            raise self._error(position, f"is empty; {_DAMAGED}")
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
        """Explains what riegeli and protobuf raise: damage, unless it is an error of the system."""
        text = one_line(error)
        if os.strerror(errno.EMFILE) in text or os.strerror(errno.ENFILE) in text:
            most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
            advice = f"at most {most:,} files may be open at a time; raise `ulimit -n`"
        elif any(os.strerror(code) in text for code in _SYSTEM_ERRORS):
            advice = "fix that, then run the same command again"
        else:
            advice = _DAMAGED
        return self._error(position, f"cannot be read ({text}); {advice}")

    def _error(self, position: int, what: str) -> DataError:
        return DataError(f"{self._name(position)} of {self._folder} {what}")

    def _open(self) -> Any:
        if self._records is None:
            with self._lock:
                if self._records is None:
                    self._records = _open_records(self._folder, self.split)
        return self._records


def _raise_file_limit() -> None:
    """Lets the process open more files: each shard of a dataset stays open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _MAX_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def tfds_splits(name: str, folder: Path) -> list[str]:
    """The names of a prepared dataset's splits."""
    return [*_open_builder(name, folder).info.splits]


def _open_builder(name: str, folder: Path) -> Any:
    builder = open_prepared(folder, name)
    formats = {each.value for each in builder.info.available_file_formats()}
    if "array_record" not in formats:
        base, _, version = name.removeprefix("tfds:").partition(":")
        root = folder.parents[base.count("/") + 1]
        raise field_error(
            "data.name",
            name,
            f"prepared as {'/'.join(sorted(formats))} in {folder}, and needs array_record; run: "
            f"python -m resnet_jax prepare {base}{version and ':' + version} --data_dir={root} "
            "(converts, without a download)",
        )
    builder.info.set_file_format("array_record", override=True, override_if_initialized=True)
    return builder


def _open_records(folder: str, split: str) -> Any:
    tfds = import_tfds()
    builder = open_prepared(Path(folder), folder)
    # Otherwise masks and other images of an example would be decoded, too.
    decoders = {
        key: tfds.decode.SkipDecoding()
        for key, feature in builder.info.features.items()
        if isinstance(feature, tfds.features.Image)
    }
    return builder.as_data_source(split, decoders=decoders, file_format="array_record")


def _find_features(name: str, info: Any, multi_label: bool | None) -> tuple[str, str, Any]:
    """The keys of the image and the label, and the feature of a single label."""
    features = import_tfds().features
    default = "label" if "label" in info.features else "labels"
    image, label = (info.supervised_keys or ("image", default))[:2]
    known = all(isinstance(key, str) and key in info.features for key in (image, label))
    kind = info.features[label] if known else None
    if isinstance(kind, features.Sequence) and isinstance(kind.feature, features.ClassLabel):
        if multi_label is False:
            reason = f"has images of several labels each ({label}); set data.multi_label = true"
            raise field_error("data.name", name, reason)
        kind = kind.feature
    if not isinstance(kind, features.ClassLabel) or not isinstance(
        info.features[image], features.Image
    ):
        raise field_error(
            "data.name",
            name,
            f"needs an image with a class label; its features: {', '.join(info.features)}",
        )
    if (kind.num_classes or 0) < 2:
        raise field_error("data.name", name, "has fewer than two classes")
    return image, label, kind


def _check_split(name: str, info: Any, split: str, field: str) -> int:
    """The number of images in a split; raises DataError unless it exists and is whole."""
    known = ", ".join(info.splits)
    hint = split_hint(split, info.splits, field)
    no_split = f"{name} has no such split; its splits: {known}, or parts as train[:90%]{hint}"
    with library_errors(lambda error: field_error(field, split, no_split)):  # of TFDS's parser
        part = info.splits[split]
    if not part.num_examples:
        raise field_error(field, split, f"selects no image of {name}; its splits: {known}")
    if missing := missing_shards([part]):
        raise field_error(
            "data.name",
            name,
            f"half-prepared: {len(missing)} files of split {split} are missing, such as "
            f"{missing[0]}; restore them, or move {info.data_dir} away and prepare it again",
        )
    return part.num_examples
