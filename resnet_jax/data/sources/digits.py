"""scikit-learn's handwritten digits as a TFDS dataset: 1,797 gray images of 8x8 pixels.

They come with scikit-learn, so a first run needs no download. This module imports TFDS, so it is
imported only where the digits are prepared.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

VERSION = "1.0.0"


def load() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The two splits as arrays.

    Of the images sorted by class, every fifth is a test image. That gives 360, the classes as equal
    as can be, without a random number generator that might change.

    Returns:
      {"train", "test"}: uint8 images [N, 8, 8] whose 17 levels of gray span 0 to 255, and int64
      labels [N].

    Example:
      >>> [len(labels) for _, labels in load().values()]
      [1437, 360]
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    by_class = np.argsort(digits.target, kind="stable")
    is_test = np.zeros(len(images), bool)
    is_test[by_class[::5]] = True
    return {
        "train": (images[~is_test], digits.target[~is_test]),
        "test": (images[is_test], digits.target[is_test]),
    }


# Not registered: nobody looks this builder up by name in TFDS.
class Digits(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Prepares the digits; `tfds.builder_from_directory` reads them."""

    VERSION = tfds.core.Version(VERSION)

    def _info(self) -> Any:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Handwritten digits of the UCI repository, as in scikit-learn.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager
        return {name: self._generate_examples(*split) for name, split in load().items()}

    def _generate_examples(
        self, images: np.ndarray, labels: np.ndarray
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        from PIL import Image

        for key, (image, label) in enumerate(zip(images, labels)):
            file = io.BytesIO()  # encoded here, because TFDS would call TensorFlow for it
            Image.fromarray(image).save(file, "PNG")
            yield key, {"image": file.getvalue(), "label": int(label)}


def prepare(root: Path) -> None:
    """Writes the dataset into `root`, where it appears when it is complete.

    Raises:
      OSError: The folder cannot be written, or the disk is full; no file is left behind.

    Example:
      >>> import pathlib, tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     prepare(pathlib.Path(folder))
      ...     sorted(path.name for path in pathlib.Path(folder, "digits").iterdir())
      ['1.0.0']
    """
    builder = Digits(data_dir=str(root), file_format="array_record")
    # A tenth of a second needs no progress bars.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            builder.download_and_prepare()
        except RuntimeError as error:  # of riegeli, which writes the files
            for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
                if os.strerror(code) in str(error):
                    raise OSError(code, os.strerror(code), str(root)) from error
            raise
