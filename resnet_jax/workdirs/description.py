"""The files that describe a run: its configuration, classes and data.

WORKDIR/config.json    the resolved configuration
WORKDIR/classes.json   the name of each label
WORKDIR/data.json      fingerprints of the dataset, and the number of images of each class
WORKDIR/SHA256SUMS     checksums of these three
WORKDIR/.signature     shows that this user's training wrote config.json (signature.py)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from resnet_jax import files
from resnet_jax.config.schema import Config
from resnet_jax.config.serialization import from_json, to_json, with_absolute_paths
from resnet_jax.config.validation import check
from resnet_jax.errors import ConfigError, write_errors
from resnet_jax.files import MIB
from resnet_jax.limits import MAX_COUNT
from resnet_jax.workdirs import signature

SEAL = "SHA256SUMS"
_CLASS_COUNTS = "class_counts"  # in data.json
_MAX_BYTES = 64 * MIB
# The names of ImageNet-21k's classes take 1 MB.
_MAX_NAMES_BYTES, _MAX_NAME_LENGTH = 16 * MIB, 10_000


def write_description(
    workdir: Path,
    config: Config,
    classes: Sequence[str],
    data: Mapping[str, str],
    class_counts: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Writes config.json, classes.json and data.json; called once the run can start.

    Args:
      workdir: Folder of the run.
      config: The resolved configuration.
      classes: Name of each output of the network.
      data: Fingerprints of the dataset by their use, "train" and "eval".
      class_counts: Number of images of each class by the same uses, int [classes]; [0] if they were
        not counted.
    """
    counted = {use: x.tolist() for use, x in (class_counts or {}).items() if x.size}
    contents = {
        "classes.json": json.dumps(list(classes), indent=2) + "\n",
        "data.json": json.dumps({**data, **({_CLASS_COUNTS: counted} if counted else {})}) + "\n",
        "config.json": to_json(with_absolute_paths(config)),
    }
    digests = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in contents.items()}
    contents[SEAL] = "".join(f"{digest}  {name}\n" for name, digest in digests.items())
    for name, text in contents.items():
        # If nothing has changed, a run can resume on a disk that is full by now.
        if not _has_content(workdir / name, text.encode()):
            with write_errors(workdir / name):
                files.atomic_write(workdir / name, text)
    with write_errors(workdir / signature.SIGNATURE):
        signature.sign(workdir, contents["config.json"].encode())


def _has_content(path: Path, content: bytes) -> bool:
    try:
        return not path.is_symlink() and files.read_bytes(path, len(content)) == content
    except OSError:
        return False


def read_description(workdir: Path, name: str) -> bytes:
    """Reads config.json, classes.json or data.json, and compares it with its checksum.

    A workdir without SHA256SUMS is read without the comparison.

    Raises:
      ConfigError: The file cannot be read, or has changed since it was written.
    """
    path = workdir / name
    try:
        content = files.read_bytes(path, _MAX_BYTES)
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read ({error.strerror}); restore it from a copy"
        ) from error
    try:
        seal = files.read_bytes(workdir / SEAL, _MAX_BYTES).decode("utf-8", errors="replace")
    except FileNotFoundError:
        return content
    except OSError as error:
        raise ConfigError(f"{workdir / SEAL} cannot be read ({error.strerror})") from error
    if f"{hashlib.sha256(content).hexdigest()}  {name}" not in seal.split("\n"):
        raise ConfigError(
            f"{path} does not match its checksum in {SEAL}; restore it from a copy, or "
            f"delete {SEAL} to use it as it is"
        )
    return content


def read_config(workdir: Path) -> Config:
    """Reads and checks the configuration of a run.

    Raises:
      ConfigError: It is missing, damaged or invalid.
    """
    content = read_description(workdir, "config.json")
    try:
        config = from_json(content.decode("utf-8"))
        check(config)
    except (ConfigError, UnicodeDecodeError) as error:
        raise ConfigError(f"{workdir / 'config.json'}: {error}") from error
    return config


def read_class_names(workdir: Path) -> tuple[str, ...]:
    """Reads the name of each output of a run's network.

    Raises:
      ConfigError: The names are missing or damaged.
    """
    try:
        content = read_description(workdir, "classes.json")
        if len(content) > _MAX_NAMES_BYTES:
            raise ValueError(f"{len(content):,} bytes, more than the limit of {_MAX_NAMES_BYTES:,}")
        names = json.loads(content.decode("utf-8"))
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError("not a list of names")
        if (longest := max(map(len, names), default=0)) > _MAX_NAME_LENGTH:
            raise ValueError(f"a name has {longest:,} characters")
    except (ValueError, RecursionError) as error:
        path = workdir / "classes.json"
        raise ConfigError(f"{path} cannot be read ({error}); restore it from a copy") from error
    return tuple(names)


def read_class_counts(workdir: Path) -> dict[str, np.ndarray]:
    """Reads the number of images of each class, int64 [classes], by "train" and "eval".

    The result is {} if the run has not counted them.

    Raises:
      ConfigError: data.json is damaged.
    """
    path = workdir / "data.json"
    if not path.exists():
        return {}
    content = read_description(workdir, path.name)
    try:
        stored = json.loads(content.decode("utf-8"))
        found = stored.get(_CLASS_COUNTS, {}) if isinstance(stored, dict) else None
        if not isinstance(found, dict) or not all(map(_are_counts, found.values())):
            raise ValueError(f"{_CLASS_COUNTS} is not what a run writes")
        if found and {len(x) for x in found.values()} != {len(read_class_names(workdir))}:
            raise ValueError(f"{_CLASS_COUNTS} are those of other classes than classes.json has")
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); restore it from a copy") from error
    return {use: np.array(x, np.int64) for use, x in found.items()}


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(x) is int and 0 <= x <= MAX_COUNT for x in values)


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
      ConfigError: The file cannot be read, or holds something else.
    """
    try:
        found = files.read_json(path, _MAX_BYTES)
        if not isinstance(found, dict):
            raise ValueError("not a JSON object")
        return found
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{path} cannot be read ({reason}); restore it from a copy") from error
