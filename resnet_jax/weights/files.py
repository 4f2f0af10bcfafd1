"""Weight files: .safetensors, .pth and .npz; read whole or not at all, never unpickled.

They may come from strangers: what a header claims is compared with the bytes that are there before
memory is taken for it, and whatever is wrong is a WeightsError.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from resnet_jax.errors import ResNetJaxError, WeightsError, importing, library_errors
from resnet_jax.files import atomic_write
from resnet_jax.models.resnet import ResNet
from resnet_jax.weights.convert import Variables, check_model, fit_variables, from_torch, to_torch

# What an archive may unpack to, in times its own size, and in bytes whatever its size. Trained
# weights hardly shrink by packing; zeros shrink a thousand times, and so do bombs.
_MOST_UNPACKED = 16
_SMALL = 2**26

_SAFETENSORS_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
}


def load_weights(
    model: ResNet,
    path: str | os.PathLike[str],
    *,
    reset_head: bool = False,
    sha256: str | None = None,
) -> Variables:
    """Reads a weight file for a model.

    Args:
      model: The ResNet that the weights are for.
      path: A .safetensors, .npz or .pth (.pt, .bin, .ckpt, .pth.tar) file with any of the names
        that `from_torch` reads, or the workdir of a run, of which the best state is taken. .pth
        needs PyTorch, a workdir the extra `train`.
      reset_head: Leave the file's head out and initialise a new one.
      sha256: Checksum that the file must have, as 64 hexadecimal digits.

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
    path = Path(path)
    if path.is_dir():
        return _from_workdir(model, path, reset_head)
    state_dict = read_state_dict(path, sha256=sha256)
    try:
        return from_torch(model, state_dict, reset_head=reset_head)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error


def read_state_dict(
    path: str | os.PathLike[str], *, sha256: str | None = None
) -> Mapping[str, Any]:
    """Reads a weight file as it is, for whatever model.

    Args:
      path: A .safetensors, .npz or .pth (.pt, .bin, .ckpt, .pth.tar) file.
      sha256: Checksum that the file must have, as 64 hexadecimal digits.

    Returns:
      What the file holds: names to arrays or tensors, or a checkpoint with such a dictionary.

    Raises:
      WeightsError: The file is missing, damaged, of another kind, or has another checksum.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     np.savez(f"{folder}/weights.npz", **{"fc.bias": np.zeros(10)})
      ...     sorted(read_state_dict(f"{folder}/weights.npz"))
      ['fc.bias']
    """
    path = Path(path)
    read = _choose(path, _READERS)
    if sha256 is not None and not re.fullmatch("[0-9a-fA-F]{64}", sha256):
        raise WeightsError(f"sha256 = {sha256!r} is not a checksum of 64 hexadecimal digits")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror}") from error
    found = hashlib.sha256(data).hexdigest()
    if sha256 is not None and found != sha256.lower():
        raise WeightsError(f"{path} has sha256 {found}, not {sha256}; fetch it again")
    try:
        return read(path, data)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error


def _from_workdir(model: ResNet, workdir: Path, reset_head: bool) -> Variables:
    # A loader for what the trainer wrote; imported here, so that weights do not need the trainer.
    with importing(f"{workdir} is a folder, and reading a workdir", WeightsError):
        from resnet_jax.training.checkpoint import load_variables
    try:
        name, variables, _ = load_variables(workdir)
    except ResNetJaxError as error:
        raise WeightsError(str(error)) from error
    try:
        return fit_variables(model, variables, reset_head=reset_head)
    except WeightsError as error:
        raise WeightsError(f"{workdir} holds a {name}: {error}") from error


def save_weights(path: str | os.PathLike[str], model: ResNet, variables: Mapping[str, Any]) -> None:
    """Writes a model's weights with the names of `to_torch`.

    An existing file, or a link to one, is replaced in one step, so that no reader ever sees half a
    file. A FIFO or a device is not replaced.

    Args:
      path: A .safetensors, .npz or .pth (.pt) file. .pth needs PyTorch.
      model: The ResNet that the variables belong to.
      variables: {"params", "batch_stats"}.

    Raises:
      WeightsError: Another kind of file, variables of another model, or a folder that cannot
        be written.

    Example:
      >>> import jax, jax.numpy as jnp, tempfile, resnet_jax as rj
      >>> model = rj.ResNet20()
      >>> variables = model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     rj.save_weights(f"{folder}/weights.npz", model, variables)
    """
    check_model(model)
    path = Path(path)
    data = _choose(path, _WRITERS)(to_torch(model, variables))
    try:
        atomic_write(path, data)
    except OSError as error:
        raise WeightsError(f"cannot write {path}: {error.strerror or error}") from error


def _choose(path: Path, functions: Mapping[str, Any]) -> Any:
    if path.suffix not in functions:
        raise WeightsError(
            f"{path} is not a weight file; its name must end in one of {', '.join(functions)}"
        )
    return functions[path.suffix]


def _read_safetensors(path: Path, data: bytes) -> dict[str, np.ndarray]:
    import safetensors

    try:
        tensors = safetensors.deserialize(data)
    except safetensors.SafetensorError as error:
        raise WeightsError(f"not a whole safetensors file ({_reason(error)})") from error
    arrays = {}
    for name, tensor in tensors:
        dtype = _SAFETENSORS_DTYPES.get(tensor["dtype"])
        if dtype is None:
            raise WeightsError(
                f"{name} has type {tensor['dtype']}; floating-point weights have 16 bits or more"
            )
        try:
            arrays[name] = np.frombuffer(tensor["data"], dtype).reshape(tensor["shape"])
        except (ValueError, OverflowError) as error:  # a shape with a 0 may have any other numbers
            raise WeightsError(f"{name} has no array's shape ({_reason(error)})") from error
    return arrays


def _read_npz(path: Path, data: bytes) -> dict[str, np.ndarray]:
    def broken(error: Exception) -> WeightsError:
        return WeightsError(f"not a whole .npz file of arrays ({_reason(error)})")

    with library_errors(broken), _open_zip(data) as archive:
        return {
            member.filename.removesuffix(".npy"): _read_array(archive.read(member))
            for member in archive.infolist()
        }


def _open_zip(data: bytes) -> zipfile.ZipFile:
    """Opens an archive that stays in bounds: no member gives more bytes than it says here."""
    archive = zipfile.ZipFile(io.BytesIO(data))
    size = sum(member.file_size for member in archive.infolist())
    if size > max(_MOST_UNPACKED * len(data), _SMALL):
        raise WeightsError(
            f"{len(data):,} bytes would unpack to {size:,}, as no weights do; if you trust the "
            "file, write it anew without compression"
        )
    for member in archive.infolist():
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise WeightsError(f"{member.filename} is packed in a way that no weights are")
    return archive


def _read_array(data: bytes) -> np.ndarray:
    """Reads a .npy file; `np.load` takes the memory that its header claims first."""
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    else:
        shape, fortran, dtype = np.lib.format.read_array_header_2_0(file)
    if dtype.hasobject:
        raise WeightsError("holds Python objects, which are never unpickled here")
    claimed, found = math.prod(shape) * dtype.itemsize, len(data) - file.tell()
    if claimed != found:
        raise ValueError(f"an array of {claimed:,} bytes in a member with {found:,}")
    array = np.frombuffer(data, dtype, offset=file.tell())
    return array.reshape(shape, order="F" if fortran else "C")


def _read_torch(path: Path, data: bytes) -> Mapping[str, Any]:
    torch = _import_torch(path)

    def explain(error: Exception) -> WeightsError:
        if not isinstance(error, pickle.UnpicklingError):
            return WeightsError(f"not a whole PyTorch file of tensors ({_reason(error)})")
        if not data.startswith(_TORCH_MAGIC):
            return WeightsError("not a PyTorch file")
        return WeightsError(
            "holds Python objects beside tensors, which are never unpickled here; where you "
            "trust it, load it with torch and pass its state dict to rj.from_torch"
        )

    with library_errors(explain):
        if data.startswith(b"PK"):
            _open_zip(data).close()
        content = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    if not isinstance(content, Mapping):
        raise WeightsError(f"holds a {type(content).__name__}, not a state dict")
    return content


def _reason(error: Exception) -> str:
    """Why a file cannot be read, in one line."""
    return str(error).strip().split("\n")[0] or type(error).__name__


def _write_safetensors(arrays: dict[str, np.ndarray]) -> bytes:
    import safetensors.numpy

    return safetensors.numpy.save(arrays, metadata={"format": "pt"})


def _write_npz(arrays: dict[str, np.ndarray]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def _write_torch(arrays: dict[str, np.ndarray]) -> bytes:
    torch = _import_torch(Path("a .pth file"))
    buffer = io.BytesIO()
    torch.save({name: torch.from_numpy(array) for name, array in arrays.items()}, buffer)
    return buffer.getvalue()


def _import_torch(path: Path) -> Any:
    with importing(f"{path} (.safetensors does not)", WeightsError):
        import torch
    return torch


# A zip archive, or the pickle of versions before 1.6.
_TORCH_MAGIC = (b"PK", b"\x80")
_READERS = {
    ".safetensors": _read_safetensors,
    ".npz": _read_npz,
    ".pth": _read_torch,
    ".pt": _read_torch,
    ".bin": _read_torch,
    ".ckpt": _read_torch,
    ".tar": _read_torch,  # "model_best.pth.tar" is a .pth file
}
WEIGHT_SUFFIXES: tuple[str, ...] = tuple(_READERS)
_WRITERS = {
    ".safetensors": _write_safetensors,
    ".npz": _write_npz,
    ".pth": _write_torch,
    ".pt": _write_torch,
}
