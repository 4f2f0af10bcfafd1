"""Reads and writes weight files of PyTorch, NumPy, safetensors, Flax and Keras.

The first bytes of a file decide its format; the suffix only names what an empty or damaged file
was meant to be. `formats` reads each of them without unpickling, within bounds.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from resnet_jax.errors import ResNetJaxError, WeightsError, importing
from resnet_jax.files import atomic_write, read_bytes
from resnet_jax.limits import host_memory
from resnet_jax.models.resnet import ResNet
from resnet_jax.weights.channels import with_channels
from resnet_jax.weights.convert import Variables, check_model, fit_variables, from_torch, to_torch
from resnet_jax.weights.formats.flax_msgpack import read_msgpack
from resnet_jax.weights.formats.hdf5 import read_hdf5
from resnet_jax.weights.formats.safetensors import (
    is_safetensors,
    read_safetensors,
    write_safetensors,
)
from resnet_jax.weights.formats.torch_pickle import is_legacy_torch, read_torch, write_torch
from resnet_jax.weights.formats.zip_archives import kind_of_zip, read_keras, read_npz, write_npz

# The largest network here has 0.5 GB of float32 weights; a checkpoint of it with the averages of
# AdamW and an EMA, in float64, has 4 GB.
_MAX_BYTES = 2**33

# By the suffix of an empty or damaged file.
_SUFFIXES = {
    ".safetensors": "safetensors",
    ".npz": "npz",
    **dict.fromkeys([".pth", ".pt", ".th", ".bin", ".ckpt", ".tar", ".t7"], "torch"),
    **dict.fromkeys([".h5", ".hdf5"], "hdf5"),
    ".keras": "keras",
    ".msgpack": "msgpack",
}
# Lower-case suffixes by which a path differs from a name on the Hub.
WEIGHT_SUFFIXES: tuple[str, ...] = (*_SUFFIXES, ".pkl")
_WRITERS = {
    ".safetensors": write_safetensors,
    ".npz": write_npz,
    **dict.fromkeys([".pth", ".pt", ".th", ".bin", ".ckpt"], write_torch),
}
# First bytes of other files that users pass as weights.
_IMAGE = "an image, not a file of weights; commands take the network before the images"
_NOT_WEIGHTS = {
    b"\4\0\0\0\1\0\0\0": "a Lua Torch file (.t7), which PyTorch does not read any more",
    b"\3\0\0\0\1\0\0\0": "a Lua Torch file (.t7), which PyTorch does not read any more",
    b"version https://git-lfs": "Git LFS's pointer to a file, not the file; run git lfs pull",
    b"<!DOCTYPE": "a web page, not a file of weights; download the file again",
    b"<html": "a web page, not a file of weights; download the file again",
    **dict.fromkeys([b"\x89PNG", b"\xff\xd8\xff", b"GIF8"], _IMAGE),
}


def load_weights(
    model: ResNet,
    path: str | os.PathLike[str],
    *,
    reset_head: bool = False,
    sha256: str | None = None,
    prefix: str | None = None,
    weights: str | None = None,
    strict: bool = True,
    channels: int | None = None,
) -> Variables:
    """Reads a weight file for a model.

    Args:
      model: The ResNet that the weights are for.
      path: A file of PyTorch (.pth, .pt, .bin, .ckpt, ...), safetensors, NumPy (.npz), Flax
        (.msgpack) or Keras (.h5, .keras), recognized by its content, with any of the names that
        `from_torch` reads. Or the workdir of a run, whose best state is read. PyTorch files need
        torch, Keras files h5py, a workdir the extra `train`.
      reset_head: Leave the file's head out and initialize a new one.
      sha256: Checksum that the file must have, as 64 hexadecimal digits.
      prefix: As for `from_torch`.
      weights: As for `from_torch`; "raw" reads a workdir's weights instead of their moving
        average.
      strict: As for `from_torch`.
      channels: As for `from_torch`.

    Returns:
      {"params", "batch_stats"} of float32 NumPy arrays.

    Raises:
      WeightsError: The file is missing, damaged, of another kind, has another checksum, or does
        not fit the model.

    Example:
      >>> import jax, jax.numpy as jnp, tempfile, resnet_jax as rj
      >>> model = rj.ResNet20()
      >>> variables = model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     rj.save_weights(f"{folder}/weights.safetensors", model, variables)
      ...     again = rj.load_weights(model, f"{folder}/weights.safetensors")
      >>> bool((again["params"]["head"]["kernel"] == variables["params"]["head"]["kernel"]).all())
      True
    """
    check_model(model)
    path = Path(os.path.expanduser(path))
    if path.is_dir():
        if not is_workdir(path):
            raise WeightsError(no_network(path))
        if prefix:
            raise WeightsError(f"{path} is a workdir, whose network has no prefix={prefix!r}")
        return with_channels(_from_workdir(model, path, reset_head, weights), channels)
    hub_name = re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) and path.suffix not in WEIGHT_SUFFIXES
    if hub_name and not os.path.exists(path):
        raise WeightsError(
            f"{path}: there is no such file or folder; read a repository on the Hub with "
            "rj.load_pretrained"
        )
    state_dict = read_state_dict(path, sha256=sha256)
    try:
        return from_torch(
            model,
            state_dict,
            reset_head=reset_head,
            prefix=prefix,
            weights=weights,
            strict=strict,
            channels=channels,
        )
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error


def is_workdir(path: Path) -> bool:
    """Whether a path is the folder of a run."""
    return (path / "checkpoints").is_dir()


def no_network(folder: Path) -> str:
    """A message about a folder that is not a workdir, with what to pass instead."""
    try:
        inside = sorted(folder.iterdir())
    except OSError as error:
        return f"cannot read {folder}: {error.strerror}"
    found = [path for path in inside if path.is_file() and path.suffix in WEIGHT_SUFFIXES]
    if (folder / "config.json").exists() and found:
        return (
            f"{folder} is not a workdir (it has no checkpoints/); pass its file of weights, "
            f"{found[0]}, or read the folder with rj.load_pretrained"
        )
    hint = f"to open a weight file in it, pass the file: {found[0]}" if found else "pass another"
    return (
        f"{folder} is neither a workdir (it has no checkpoints/) nor a folder in the Hub's form "
        f"(it has no config.json); {hint}"
    )


def _from_workdir(model: ResNet, workdir: Path, reset_head: bool, weights: str | None) -> Variables:
    # Imported here, because reading weight files does not need Orbax.
    with importing(f"{workdir} is a folder, and reading a workdir", WeightsError):
        from resnet_jax.workdirs.checkpoint import load_variables
    try:
        name, variables, _ = load_variables(workdir, ema=weights != "raw")
    except ResNetJaxError as error:
        raise WeightsError(str(error)) from error
    try:
        return fit_variables(model, variables, reset_head=reset_head)
    except WeightsError as error:
        raise WeightsError(f"{workdir} holds a {name}: {error}") from error


def save_weights(path: str | os.PathLike[str], model: ResNet, variables: Mapping[str, Any]) -> None:
    """Writes a model's weights with the names of `to_torch`.

    An existing file, or a link to one, is replaced in one step, so that readers never see half a
    file. A FIFO or a device is not replaced.

    Args:
      path: A .safetensors, .npz or .pth (.pt, .th, .bin, .ckpt) file. .pth needs PyTorch.
      model: The ResNet that the variables belong to.
      variables: {"params", "batch_stats"}.

    Raises:
      WeightsError: An unknown suffix, variables of another model, or a folder that cannot be
        written.

    Example:
      >>> import jax, jax.numpy as jnp, tempfile, resnet_jax as rj
      >>> model = rj.ResNet20()
      >>> variables = model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     rj.save_weights(f"{folder}/weights.npz", model, variables)
    """
    check_model(model)
    path = Path(os.path.expanduser(path))
    write = _WRITERS.get(path.suffix.lower())
    if write is None:
        raise WeightsError(
            f"cannot write {path}: its name must end in one of {', '.join(_WRITERS)}"
        )
    data = write(to_torch(model, variables))
    try:
        atomic_write(path, data)
    except OSError as error:
        raise WeightsError(f"cannot write {path}: {error.strerror or error}") from error


def read_state_dict(
    path: str | os.PathLike[str], *, sha256: str | None = None
) -> Mapping[str, Any]:
    """Reads a weight file as it is: a state dict, or a checkpoint with one inside.

    Keras's names are the paths in the file, such as "layers/conv2d/vars/0".
    """
    # Unlike Path.expanduser, this one leaves ~ alone where the user has no home.
    path = Path(os.path.expanduser(path))
    if sha256 is not None and not re.fullmatch("[0-9a-fA-F]{64}", sha256):
        raise WeightsError(f"sha256 = {sha256!r} is not a checksum of 64 hexadecimal digits")
    try:
        data = read_bytes(path, min(_MAX_BYTES, host_memory()))
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:  # a path with NUL in it
        raise WeightsError(f"cannot read {str(path)!r}: {error}") from error
    if sha256 is not None and (found := hashlib.sha256(data).hexdigest()) != sha256.lower():
        raise WeightsError(f"{path} has sha256 {found}, not {sha256}; download it again")
    try:
        return _read(_format_of(path, data), data, str(path))
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error


def _read(format: str, data: bytes, source: str) -> Mapping[str, Any]:
    match format:
        case "safetensors":
            return read_safetensors(data)
        case "npz":
            return read_npz(data)
        case "torch":
            return read_torch(data, source)
        case "hdf5":
            return read_hdf5(data, source)
        case "keras":
            return read_keras(data, source)
        case "msgpack":
            return read_msgpack(data)
    raise WeightsError("a zip archive that is damaged, or of neither PyTorch, NumPy nor Keras")


def _format_of(path: Path, data: bytes) -> str:
    """A file's format, by its first bytes, or else by its suffix."""
    for start, reason in _NOT_WEIGHTS.items():
        if data.startswith(start):
            raise WeightsError(reason)
    suffix = _SUFFIXES.get(path.suffix.lower())
    if data.startswith(b"PK"):
        return kind_of_zip(data) or suffix or "zip"
    if data.startswith(b"\x89HDF\r\n\x1a\n"):
        return "hdf5"
    if is_legacy_torch(data):
        return "torch"
    if data[:1] == b"\x80" and data[1:2] in (b"\2", b"\3", b"\4", b"\5"):
        raise WeightsError(
            "a Python pickle, not written by torch.save, which is never unpickled here; if you "
            "trust it, unpickle it and pass its arrays to rj.from_torch"
        )
    if data[257:262] == b"ustar":
        raise WeightsError(
            "a tar archive; if PyTorch before 0.1.10 wrote it, load it with torch and save its "
            "state dict again, else unpack it"
        )
    if is_safetensors(data):
        return "safetensors"
    # msgpack has no signature, only a first byte that starts a dictionary.
    if suffix is None and data[:1] and (0x80 < data[0] < 0x90 or data[0] in (0xDE, 0xDF)):
        return "msgpack"
    if path.suffix in (".stablehlo", ".onnx"):
        raise WeightsError("an exported program; open what it was exported from")
    if suffix is None:
        raise WeightsError(
            "its content is none of PyTorch's (torch.save), safetensors, NumPy's (.npz), Keras's "
            "(.h5, .keras) and Flax's (.msgpack)"
        )
    return suffix
