"""Writes a network's features of many images: for search, clustering, a classifier on top.

Memory holds one batch and the images' names. The array in a .npz file needs its length first, so
rows go to a temporary file until their number is known; Parquet is written in groups of rows.
"""

from __future__ import annotations

import abc
import contextlib
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import numpy as np

from resnet_jax.errors import ConfigError, ModelError, importing
from resnet_jax.files import expand_user
from resnet_jax.inference.batch_predictor import BatchPredictor
from resnet_jax.inference.images import ImageFile
from resnet_jax.inference.writers import Progress
from resnet_jax.models.resnet import ResNet
from resnet_jax.outputs import open_output
from resnet_jax.weights.naming import unknown_layer
from resnet_jax.weights.network import Network

POOLED = "pooled"
# Bytes of features in a group of rows of a Parquet file.
_GROUP_BYTES = 32 << 20


def write_features(
    open_network: Callable[[], Network],
    files: Sequence[ImageFile],
    output: str | os.PathLike[str],
    *,
    layer: str = POOLED,
    maps: bool = False,
    batch_size: int = 0,
    force: bool = False,
) -> int:
    """Computes features of images and writes them with the images' paths and labels.

    Args:
      open_network: Called after all other arguments are checked.
      files: The images.
      output: A .npz file with the arrays `features` (float32 [N, C] or [N, h, w, C]), `paths` and
        `labels` (text [N]), or a .parquet file with columns of these names (needs pyarrow). A
        label is the folder of an image, "" where it has none.
      layer: As for `feature_function`.
      maps: Write whole maps instead of their means.
      batch_size: Images per batch. Default: a fast size.
      force: Replace the output.

    Returns:
      The number of images that were skipped because they cannot be read.
    """
    with open_output(output, force) as stream:
        writer_class = _writer_class(output)
        network = open_network().folded()
        features = feature_function(network.model, layer, maps)
        predictor = BatchPredictor(network, features, batch_size)
        progress = Progress(files)
        with writer_class(stream, expand_user(output).parent) as writer:
            for file, row in progress(predictor(files)):
                writer.add(file, row)
    return progress.skipped


def feature_function(
    model: ResNet, layer: str = POOLED, maps: bool = False
) -> Callable[[Any, jax.Array], jax.Array]:
    """The function of a batch whose outputs are the features.

    Args:
      model: The network.
      layer: "pooled" for the input of the head, or a feature map: "stem", "stage1", ...
      maps: The whole map instead of its mean over the positions.

    Returns:
      (variables, normalized images [N, H, W, C]) -> float32 [N, K] or [N, h, w, K].

    Raises:
      ModelError: There is no such layer, or it has no map.

    Example:
      >>> import resnet_jax as rj
      >>> model, images = rj.ResNet20(), jnp.ones((2, 32, 32, 3))
      >>> variables = model.init(jax.random.key(0), images, train=False)
      >>> feature_function(model, "stage2", maps=True)(variables, images).shape
      (2, 16, 16, 32)
    """
    known = list(model.feature_info())
    if layer not in (POOLED, *known):
        raise ModelError(f"--layer: {unknown_layer(layer, [POOLED, *known])}")
    if layer == POOLED:
        if maps:
            raise ModelError(f"--maps: {POOLED} has none; take --layer={known[-1]}")
        headless = model.clone(num_classes=0)
        return lambda variables, images: jnp.asarray(
            headless.apply(variables, images, train=False), jnp.float32
        )

    def function(variables: Any, images: jax.Array) -> jax.Array:
        every: Any = model.apply(variables, images, train=False, method="features")
        found = jnp.asarray(every[layer], jnp.float32)  # whatever type the network computes in
        return found if maps else found.mean((1, 2))

    return function


class _Writer(contextlib.AbstractContextManager["_Writer"]):
    """Writes rows to a stream, and finishes the file only without an error."""

    def __init__(self, stream: BinaryIO, folder: Path) -> None:
        self._stream = stream
        self._folder = folder  # on the file system that has room for the output

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, kind: Any, *exception: Any) -> None:
        if kind is None:
            self._finish()

    @abc.abstractmethod
    def add(self, file: ImageFile, row: np.ndarray) -> None: ...

    @abc.abstractmethod
    def _finish(self) -> None: ...


class _Npz(_Writer):
    def __init__(self, stream: BinaryIO, folder: Path) -> None:
        super().__init__(stream, folder)
        # Has no name, so that nothing is left of it however the process ends.
        self._rows = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        self._files: list[ImageFile] = []
        self._shape: tuple[int, ...] = ()

    def __exit__(self, kind: Any, *exception: Any) -> None:
        with self._rows:
            super().__exit__(kind, *exception)

    def add(self, file: ImageFile, row: np.ndarray) -> None:
        self._rows.write(np.ascontiguousarray(row).data)
        self._files.append(file)
        self._shape = row.shape

    def _finish(self) -> None:
        header = {
            "descr": np.lib.format.dtype_to_descr(np.dtype(np.float32)),
            "fortran_order": False,
            "shape": (len(self._files), *self._shape),
        }
        self._rows.seek(0)
        with zipfile.ZipFile(self._stream, "w") as archive:
            with _member(archive, "features") as member:
                np.lib.format.write_array_header_1_0(member, header)
                shutil.copyfileobj(self._rows, member, 1 << 20)
            for name, texts in (
                ("paths", [file.name for file in self._files]),
                ("labels", [file.label for file in self._files]),
            ):
                with _member(archive, name) as member:
                    np.lib.format.write_array(member, np.array(texts), allow_pickle=False)


def _member(archive: zipfile.ZipFile, name: str) -> Any:
    # Without a time stamp, so that the same features give the same bytes.
    return archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True)


class _Parquet(_Writer):
    def __init__(self, stream: BinaryIO, folder: Path) -> None:
        super().__init__(stream, folder)
        self._group: list[tuple[ImageFile, np.ndarray]] = []
        self._file: Any = None

    def __exit__(self, kind: Any, *exception: Any) -> None:
        super().__exit__(kind, *exception)
        if self._file is not None:
            self._file.close()

    def add(self, file: ImageFile, row: np.ndarray) -> None:
        self._group.append((file, row))
        if len(self._group) * row.nbytes >= _GROUP_BYTES:
            self._flush()

    def _finish(self) -> None:
        if self._group:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        rows = np.stack([row for _, row in self._group])
        if rows.ndim == 2:
            features = pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), rows.shape[1])
        else:
            features = pa.FixedShapeTensorArray.from_numpy_ndarray(rows)
        table = pa.table(
            {
                "paths": [_text(file.name) for file, _ in self._group],
                "labels": [_text(file.label) for file, _ in self._group],
                "features": features,
            }
        )
        if self._file is None:
            self._file = pq.ParquetWriter(self._stream, table.schema)
        self._file.write_table(table)
        self._group = []


def _text(name: str) -> str:
    """A file name with replacement characters for bytes that are not text, for Parquet."""
    return os.fsencode(name).decode("utf-8", "replace")


def _writer_class(output: str | os.PathLike[str]) -> Callable[[BinaryIO, Path], _Writer]:
    suffix = Path(output).suffix
    if suffix == ".npz":
        return _Npz
    if suffix != ".parquet":
        raise ConfigError(f"--output={output}: must end in .npz or .parquet")
    with importing(f"--output={output} (.npz does not)", ConfigError):
        import pyarrow.parquet  # noqa: F401
    return _Parquet
