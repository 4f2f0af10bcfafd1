"""HDF5, as Keras writes it.

A hostile file may claim arrays larger than it is, refer to other files on the disk, or require a
plugin. Only plain arrays inside the file itself are read, after their sizes are checked.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from resnet_jax.errors import WeightsError, importing, library_errors, one_line
from resnet_jax.weights.formats import MAX_TENSORS, MAX_UNPACKED, SMALL

_MAX_DEPTH = 32
# Filters of every HDF5 library: gzip, shuffle, checksum.
_FILTERS = {1, 2, 3}
# Groups that Keras writes beside the network.
_OPTIMIZERS = ("optimizer", "optimizer_weights")


def read_hdf5(data: bytes, source: str) -> dict[str, np.ndarray]:
    """Reads all arrays of an HDF5 file except an optimizer's; `source` names the file in messages.

    Returns:
      Path in the file, such as "layers/conv2d/vars/0", to array.
    """
    with importing(f"{source} is an HDF5 file, and reading it", WeightsError):
        import h5py

    def broken(error: Exception) -> WeightsError:
        return WeightsError(f"not a valid HDF5 file ({one_line(error)})")

    arrays: dict[str, np.ndarray] = {}
    with library_errors(broken), h5py.File(io.BytesIO(data), "r") as file:
        left = max(MAX_UNPACKED * len(data), SMALL)
        for name, dataset in _datasets(h5py, file):
            if dataset.shape is None or dataset.dtype.kind not in "biuf":
                continue  # strings
            left -= _checked_size(name, dataset, left)
            arrays[name] = np.asarray(dataset[()])
    return arrays


def _datasets(h5py: Any, file: Any) -> Iterator[tuple[str, Any]]:
    seen: set[int] = set()
    waiting, objects = [("", file)], 0
    while waiting:
        path, group = waiting.pop()
        address = h5py.h5o.get_info(group.id).addr
        if address in seen:
            continue
        seen.add(address)
        for key in group:
            objects += 1
            name = f"{path}/{key}" if path else key
            if objects > MAX_TENSORS or name.count("/") > _MAX_DEPTH:
                raise WeightsError("has more objects, or deeper ones, than any weights")
            if name in _OPTIMIZERS:
                continue
            if not isinstance(group.get(key, getlink=True), h5py.HardLink):
                raise WeightsError(f"{name[:80]} is a link, maybe to another file; not followed")
            found = group[key]
            if isinstance(found, h5py.Group):
                waiting.append((name, found))
            elif isinstance(found, h5py.Dataset):
                yield name, found


def _checked_size(name: str, dataset: Any, most_bytes: int) -> int:
    """Bytes of an array that the file holds itself; raises WeightsError for any other."""
    name = name[:80]
    if dataset.external or dataset.is_virtual:
        raise WeightsError(f"{name} has its values in another file, which is not read")
    properties = dataset.id.get_create_plist()
    filters = {properties.get_filter(index)[0] for index in range(properties.get_nfilters())}
    if filters - _FILTERS:
        raise WeightsError(f"{name} is compressed by an unsupported method")
    size = math.prod(dataset.shape) * dataset.dtype.itemsize
    chunk = math.prod(dataset.chunks or ()) * dataset.dtype.itemsize
    if size > most_bytes or chunk > max(2**20, 2 * size):
        raise WeightsError(f"{name} would be {max(size, chunk):,} bytes, more than the file has")
    return size
