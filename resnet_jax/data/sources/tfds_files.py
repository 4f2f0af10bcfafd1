"""Finds prepared TFDS datasets on disk and checks them, without the network."""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from resnet_jax import upstream
from resnet_jax.data.sources.base import check_local, field_error
from resnet_jax.errors import DataError, importing, library_errors, one_line
from resnet_jax.files import MIB, open_regular
from resnet_jax.limits import MAX_CLASSES

# A name may come from a stranger's config.json, and becomes a path in the folder of datasets.
_NAME = re.compile(r"(?P<base>\w[\w.+-]*(/\w[\w.+-]*)?)(:(?P<version>\w[\w.+-]*))?")
# The classes that a description may name. TFDS would import any other class that Python finds, even
# from the current folder.
_TFDS_FEATURE = re.compile(r"tensorflow_datasets\.core\.features\.\w+(\.\w+)*")
_CLASS_KEYS = ("pythonClassName", "python_class_name", "type")
# Other arguments of features: files that TFDS would read, and lengths of lists that it would make.
_PATH_KEYS = ("names_file", "namesFile")
_COUNT_KEYS = ("numClasses", "num_classes")
_RECORD_FORMATS = ("array_record", "tfrecord", "riegeli", "parquet")  # in the names of files
_MAX_DESCRIPTION_BYTES = 64 * MIB


def import_tfds() -> Any:
    """The module tensorflow_datasets, without TensorFlow; DataError if a package is missing."""
    with importing("reading TFDS datasets", DataError):
        return upstream.import_tfds()


def tfds_root(data_dir: str) -> Path:
    """The folder of TFDS datasets, as an absolute path.

    Args:
      data_dir: As in `data.data_dir`; "": TFDS's own default.

    Raises:
      DataError: It is the address of a bucket, or begins with ~ where there is no home directory.

    Example:
      >>> str(tfds_root("/data"))
      '/data'
    """
    tfds = import_tfds()
    with importing("reading TFDS datasets", DataError):
        from etils import epath

        default = tfds.core.constants.DATA_DIR  # TFDS imports its parts on first use
    folder = os.fspath(data_dir or default)
    check_local("data.data_dir", folder, folder)
    path = epath.Path(folder).expanduser()
    if path.parts[:1] == ("~",):  # etils did not expand it
        raise field_error(
            "data.data_dir", data_dir, f"{path}: there is no home directory; name a folder"
        )
    return (
        path if path.is_absolute() else epath.Path(Path.cwd()) / path
    )  # for workers in other folders


def split_version(name: str) -> tuple[str, str]:
    """Splits NAME[/CONFIG][:VERSION] into NAME[/CONFIG], and VERSION or "".

    Example:
      >>> split_version("cifar10:3.0.2")
      ('cifar10', '3.0.2')
      >>> split_version("../secret")
      Traceback (most recent call last):
      resnet_jax.errors.DataError: data.name = 'tfds:../secret': must be tfds:NAME, \
tfds:NAME/CONFIG or tfds:NAME:VERSION
    """
    found = _NAME.fullmatch(name)
    if not found:
        reason = "must be tfds:NAME, tfds:NAME/CONFIG or tfds:NAME:VERSION"
        raise field_error("data.name", f"tfds:{name}", reason)
    return found["base"], found["version"] or ""


def is_known(name: str) -> bool:
    """Whether TFDS has a builder for this NAME[/CONFIG]."""
    return name.partition("/")[0] in _tfds_names()


def _tfds_names() -> list[str]:
    return import_tfds().core.load.list_builders(with_community_datasets=False)


def find_prepared(name: str, data_dir: str) -> Path:
    """The folder of a prepared TFDS dataset; the highest version unless one is named.

    Args:
      name: NAME[/CONFIG][:VERSION], without "tfds:".
      data_dir: As in `data.data_dir`.

    Raises:
      DataError: The dataset is not prepared there.

    Example:
      >>> find_prepared("fashion_mnist", "/nowhere")
      Traceback (most recent call last):
      resnet_jax.errors.DataError: data.name = 'tfds:fashion_mnist': not prepared in \
data.data_dir = '/nowhere'; run: python -m resnet_jax prepare fashion_mnist --data_dir=/nowhere
    """
    base, version = split_version(name)
    root = tfds_root(data_dir)
    place = f"data.data_dir = {str(root)!r}"
    hint = f"run: python -m resnet_jax prepare {name} --data_dir={root}"
    folder = root / base
    entries = _list_names(folder)
    # TFDS writes into incomplete.RANDOM_VERSION and renames the folder when it is complete.
    finished = [each for each in entries if not each.startswith("incomplete.")]
    found = [each for each in finished if (folder / each / "dataset_info.json").exists()]
    if version in found:
        return folder / version
    if found and not version:
        return folder / max(found, key=_version_key)
    if found:
        reason = f"{place} has no version {version} of it, only {', '.join(sorted(found))}"
    elif finished != entries:
        reason = f"half-prepared in {place} (preparing still runs, or was interrupted); {hint}"
    elif configs := [each for each in entries if _has_version(folder / each)]:
        reason = f"has configurations in {place}; choose one, such as tfds:{base}/{configs[0]}"
    elif not is_known(base):
        close = difflib.get_close_matches(base.partition("/")[0], _tfds_names(), n=3)
        guess = f"; did you mean {' or '.join(close)}?" if close else ""
        reason = f"neither prepared in {place} nor known to TFDS{guess}"
    else:
        reason = f"not prepared in {place}; {hint}"
    raise field_error("data.name", f"tfds:{name}", reason)


def prepared_configs(name: str, data_dir: str) -> list[str]:
    """The prepared configurations of the TFDS dataset NAME, as sorted NAME/CONFIG.

    Example:
      >>> prepared_configs("imagenet2012_corrupted", "/nowhere")
      []
    """
    folder = tfds_root(data_dir) / name
    return [f"{name}/{each}" for each in _list_names(folder) if _has_version(folder / each)]


def _list_names(folder: Any) -> list[str]:
    try:
        return sorted(each.name for each in folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise field_error("data.data_dir", str(folder), error.strerror or error) from error


def _has_version(folder: Any) -> bool:
    return folder.is_dir() and any((e / "dataset_info.json").exists() for e in folder.iterdir())


def _version_key(version: str) -> tuple[int, ...]:
    return tuple(int(part) if part.isdecimal() else -1 for part in version.split("."))


def missing_shards(infos: Iterable[Any]) -> list[str]:
    """Sorted names of missing files, by TFDS's descriptions of splits."""
    paths = {path for info in infos for path in info.filepaths}
    return sorted(path.name for path in paths if not path.is_file())


def open_prepared(folder: Path, name: str) -> Any:
    """TFDS's read-only builder for a prepared dataset, which may come from a stranger.

    Args:
      folder: Has dataset_info.json and features.json.
      name: As in `data.name`, for messages.

    Raises:
      DataError: A description is missing, damaged or very old, or names files outside of the folder
        or a class that is not one of TFDS.
    """

    def unreadable(error: Exception) -> DataError:
        reason = f"cannot read its description in {folder} ({one_line(error)})"
        return field_error("data.name", name, reason)

    tfds = import_tfds()
    try:
        _check_files(folder)
        reason = _unsafe_entry(json.loads((folder / "features.json").read_text()))
    except (OSError, ValueError, RecursionError) as error:
        raise unreadable(error) from error
    if reason:
        raise field_error(
            "data.name", name, f"{folder / 'features.json'} {reason}, and is not loaded"
        )
    with library_errors(unreadable):
        builder = tfds.builder_from_directory(folder)
        paths = [path for split in builder.info.splits.values() for path in split.filepaths]
    outside = [path for path in paths if _parent(path) != _parent(folder / "x")]
    if outside:
        raise field_error("data.name", name, f"its file {outside[0]} lies outside of {folder}")
    return builder


def _check_files(folder: Path) -> None:
    """Raises OSError unless the files that TFDS reads in one piece are regular and small."""
    for name in os.listdir(folder):
        if not any(kind in name for kind in _RECORD_FORMATS):  # those are read in pieces
            open_regular(folder / name, _MAX_DESCRIPTION_BYTES).close()


def _parent(path: Any) -> str:
    return os.path.realpath(path.parent)


def _unsafe_entry(description: Any) -> str:
    """What makes a features.json unsafe to load, or ""; its strings may hold JSON, too."""
    if isinstance(description, list):
        return next(filter(None, map(_unsafe_entry, description)), "")
    if not isinstance(description, dict):
        return ""
    for key, value in description.items():
        if "/" in key:  # a feature's name becomes part of a file name
            return f"has a feature with the name {key!r}"
        if key in _CLASS_KEYS and not isinstance(value, dict | list):
            if not isinstance(value, str) or not _TFDS_FEATURE.fullmatch(value):
                return f"names the class {value!r}, which is not one of TFDS"
        elif key in _PATH_KEYS and isinstance(value, str):
            return f"names the file {value!r}"
        elif key in _COUNT_KEYS and not isinstance(value, dict) and int(value or 0) > MAX_CLASSES:
            return f"has {value} classes; the limit is {MAX_CLASSES:,}"
        if reason := _unsafe_entry(json.loads(value) if _is_json(key, value) else value):
            return reason
    return ""


def _is_json(key: str, value: Any) -> bool:
    return key == "json" and isinstance(value, str)


def prepare_digits(data_dir: str) -> Path:
    """Prepares scikit-learn's digits as a TFDS dataset unless they exist; returns its folder.

    Raises:
      DataError: scikit-learn is missing, the folder cannot be written, or holds damaged digits.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     prepare_digits(folder).relative_to(folder).as_posix()
      'digits/1.0.0'
    """
    import_tfds()
    root = tfds_root(data_dir)
    from resnet_jax.data.sources import digits

    folder: Any = root / "digits" / digits.VERSION
    try:
        if not folder.exists():
            with importing("data.name = 'digits'", DataError):
                digits.prepare(root)
    except OSError as error:
        # Renaming fails if another process was faster; its folder is as good.
        if not folder.exists():
            reason = f"cannot write the digits there ({error.strerror or error})"
            raise field_error("data.data_dir", str(root), reason) from error
    # The folder may be anyone's, so nothing in it is replaced.
    complete = (folder / "dataset_info.json").exists()
    if not complete or missing_shards(open_prepared(folder, "digits").info.splits.values()):
        reason = f"the digits in {folder} are not whole; move that folder away"
        raise field_error("data.data_dir", str(root), reason)
    return folder
