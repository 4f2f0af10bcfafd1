"""Opens a dataset by its name: the one place that knows all kinds of sources."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from resnet_jax.config.schema import DATA_NAMES, DATA_PLACES, Data
from resnet_jax.data.sources.base import Source, check_local, field_error
from resnet_jax.data.sources.folders import FolderSource, folder_splits
from resnet_jax.data.sources.lists import ListSource, list_splits
from resnet_jax.data.sources.splits import SplitSpec
from resnet_jax.data.sources.tfds import TfdsSource, tfds_splits
from resnet_jax.data.sources.tfds_files import find_prepared, prepare_digits


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
    """Opens one split of a dataset.

    Args:
      name: "digits", "tfds:NAME[:VERSION]", "folder:PATH", "csv:FILE" or "jsonl:FILE", as in
        `data.name`. A TFDS dataset must have been prepared; the digits prepare themselves.
      split: The split, as in `data.train_split`, or parts of splits such as "train[:90%]".
      data_dir: Where TFDS keeps its datasets. Default: TFDS's own default.
      train_split: The training split. It defines the classes of a folder or a list, whichever
        split is opened; "": the split that is opened does.
      classes: Names of the classes of a folder or a list, if they are known. Default: those of
        `train_split`.
      multi_label: Whether an image has none, one or several labels. None: as the dataset has it.
        If True, the label of an image that has one label is a vector with a single 1.
      label_separator: Between the labels of an image in a CSV file.
      allow_missing_classes: Open a folder or a list that has no images of some classes.

    Returns:
      The open source.

    Raises:
      DataError: The dataset or the split is missing, half-prepared, damaged, or has no labeled
        images. The one-line message names the field, its value and what to do.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     len(open_source("digits", "train[:50%]", folder))
      718
    """
    field = "data.train_split" if split == train_split else "data.eval_split"
    kind, place = _parse_name(name)
    if kind in ("digits", "tfds"):
        return TfdsSource(name, _tfds_folder(kind, place, data_dir), split, field, multi_label)
    spec = SplitSpec(
        name=name,
        split=split,
        field=field,
        train_split=train_split,
        classes=tuple(classes),
        multi_label=multi_label,
        label_separator=label_separator,
        allow_missing_classes=allow_missing_classes,
    )
    path = _absolute(place)
    return FolderSource(path, spec) if kind == "folder" else ListSource(kind, path, spec)


def split_names(name: str, data_dir: str = "", label_separator: str = "|") -> list[str]:
    """The names of the splits that a dataset has; the arguments are those of `open_source`.

    Raises:
      DataError: The dataset is missing or damaged.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     split_names("digits", folder)
      ['train', 'test']
    """
    kind, place = _parse_name(name)
    if kind in ("digits", "tfds"):
        return tfds_splits(name, _tfds_folder(kind, place, data_dir))
    if kind == "folder":
        return folder_splits(_absolute(place), name)
    spec = SplitSpec(name, "", "data.eval_split", label_separator=label_separator)
    return list_splits(kind, _absolute(place), spec)


def open_split(data: Data, split: str, **options: Any) -> Source:
    """Opens a split as a configuration says; `options` are of `open_source` and override it.

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


def _parse_name(name: str) -> tuple[str, str]:
    """The kind of a dataset, and its path or its name in TFDS."""
    kind, _, place = name.partition(":")
    if name != "digits" and not (place and kind in ("tfds", *DATA_PLACES)):
        raise field_error("data.name", name, f"must be {DATA_NAMES}")
    check_local("data.name", name, place)
    return kind, place


def _tfds_folder(kind: str, name: str, data_dir: str) -> Path:
    return prepare_digits(data_dir) if kind == "digits" else find_prepared(name, data_dir)


def _absolute(path: str) -> Path:
    return Path(os.path.expanduser(path)).absolute()
