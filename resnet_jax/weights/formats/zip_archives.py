"""Zip archives: NumPy's .npz, Keras's .keras, and the bounds that PyTorch's .pth share."""

from __future__ import annotations

import io
import math
import zipfile

import numpy as np

from resnet_jax.errors import WeightsError, library_errors, reason_of
from resnet_jax.weights.formats import MAX_TENSORS, MAX_UNPACKED, SMALL
from resnet_jax.weights.formats.hdf5 import read_hdf5


def open_zip(data: bytes) -> zipfile.ZipFile:
    """Opens an archive whose members expand to no more than `formats` allows."""
    if data.count(b"PK\1\2") > MAX_TENSORS:  # entries of its directory
        raise WeightsError(
            f"has more than {MAX_TENSORS:,} members, more than any weight file needs"
        )
    archive = zipfile.ZipFile(io.BytesIO(data))
    size = sum(member.file_size for member in archive.infolist())
    if size > max(MAX_UNPACKED * len(data), SMALL):
        raise WeightsError(
            f"{len(data):,} bytes would unpack to {size:,}, more than any weight file needs; "
            "if you trust the file, write it again without compression"
        )
    for member in archive.infolist():
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise WeightsError(f"{member.filename} is compressed by an unsupported method")
    return archive


def kind_of_zip(data: bytes) -> str | None:
    """The format of an archive, by its members; None for a damaged or unknown one."""
    try:
        with open_zip(data) as archive:
            names = archive.namelist()
    except WeightsError:  # of `open_zip`; it is a ValueError too
        raise
    except (
        zipfile.BadZipFile,
        NotImplementedError,  # a version or a flag that is damaged, or from the future
        ValueError,  # a name that is not text, or an offset before the start of the file
    ):
        return None
    members = {name.rpartition("/")[2] for name in names}
    if "constants.pkl" in members:
        raise WeightsError("a TorchScript archive; save the state dict of the network instead")
    if "data.pkl" in members:
        return "torch"
    if "model.weights.h5" in members:
        return "keras"
    return "npz" if members and all(name.endswith(".npy") for name in members) else None


def read_npz(data: bytes) -> dict[str, np.ndarray]:
    """Reads all arrays of a .npz file."""

    def broken(error: Exception) -> WeightsError:
        return WeightsError(f"not a valid .npz file of arrays ({reason_of(error)})")

    arrays: dict[str, np.ndarray] = {}
    with library_errors(broken), open_zip(data) as archive:
        for member in archive.infolist():
            name = member.filename.removesuffix(".npy")
            if name in arrays:
                raise WeightsError(f"holds {name} twice")
            arrays[name] = _read_npy(archive.read(member))
    return arrays


def _read_npy(data: bytes) -> np.ndarray:
    # np.load would allocate the memory that the header claims before it reads on.
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


def write_npz(arrays: dict[str, np.ndarray]) -> bytes:
    """The file's bytes."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def read_keras(data: bytes, source: str) -> dict[str, np.ndarray]:
    """Reads the weights of a Keras 3 archive; `source` names the file in messages."""

    def broken(error: Exception) -> WeightsError:
        return WeightsError(f"not a valid .keras file ({reason_of(error)})")

    with library_errors(broken), open_zip(data) as archive:
        weights = archive.read("model.weights.h5")
    return read_hdf5(weights, source)
