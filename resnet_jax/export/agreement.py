"""Compares an export, read back, with the network it was made from, on real images."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from resnet_jax.data.preprocessing import Preprocessing
from resnet_jax.errors import ExportError, WeightsError, importing
from resnet_jax.models.resnet import ResNet
from resnet_jax.weights.network import Network

# Largest allowed difference as a fraction of the largest output: float32 rounding in the deepest
# networks stays below it, and a wrong constant does not.
TOLERANCE = 1e-4
IMAGES = 8  # that an export is compared on


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How an export agrees with its source.

    Args:
      difference: Largest difference between two outputs (logits, or features without a head).
      largest: Largest absolute output of the source.
      paths: The files that were written.
      sizes: (height, width) of the images that were tried. The numbers are of the size that agrees
        least.
    """

    difference: float
    largest: float
    paths: tuple[Path, ...]
    sizes: tuple[tuple[int, int], ...]

    def __str__(self) -> str:
        size = sum(path.stat().st_size for path in self.paths) / 1e6
        pixels = [f"{height}x{width}" for height, width in self.sizes]
        return (
            f"{', '.join(map(str, self.paths))} ({size:.1f} MB): largest difference from the "
            f"source on {IMAGES} real images of {', '.join(pixels)} pixels {self.difference:.1e}, "
            f"largest output {self.largest:.3g}"
        )


def compare(
    network: Network,
    run: Callable[[np.ndarray], np.ndarray],
    sizes: tuple[tuple[int, int], ...],
    paths: Sequence[Path],
) -> Agreement:
    """Runs an export and its source on real images of each size.

    Raises:
      ExportError: They disagree by more than `TOLERANCE`.
      WeightsError: The network's outputs are not finite.
    """
    found = [_difference(network, run, size) for size in sizes]
    difference, largest = max(found, key=lambda each: each[0] / each[1] if each[1] else 0)
    return Agreement(difference, largest, tuple(paths), sizes)


def _difference(
    network: Network, run: Callable[[np.ndarray], np.ndarray], size: tuple[int, int]
) -> tuple[float, float]:
    """(largest difference of two outputs, largest output of the source) at one size."""
    images = sample_images(network, size=size)
    expected = source_logits(network.model, network.variables, network.preprocessing, images)
    if not np.isfinite(expected).all():
        raise WeightsError(
            f"{network.source}: the network's outputs are not finite numbers; take another state "
            "or file"
        )
    difference = float(np.abs(run(images) - expected).max())
    largest = float(np.abs(expected).max())
    if not difference <= TOLERANCE * largest:  # NaN is a disagreement
        raise ExportError(
            f"the export disagrees with its source by {difference:.1e} on images of "
            f"{size[0]}x{size[1]} pixels; allowed is {TOLERANCE:g} of the largest output, "
            f"{largest:.3g}; nothing was written"
        )
    return difference, largest


def sample_images(
    network: Network, count: int = IMAGES, size: tuple[int, int] | None = None
) -> np.ndarray:
    """Real images, prepared like a network's: scikit-learn's photographs, or its gray digits.

    Returns:
      uint8 [count, H, W, C]; squares of the network's image size, unless `size` is (H, W).

    Example:
      >>> import types  # stands in for a network
      >>> network = types.SimpleNamespace(channels=1, preprocessing=Preprocessing(image_size=32))
      >>> sample_images(network, 4).shape
      (4, 32, 32, 1)
    """
    with importing("an export, which is checked on images of scikit-learn,", ExportError):
        from PIL import Image
        from sklearn import datasets
    height, width = size or (network.preprocessing.image_size,) * 2
    if network.channels == 1:
        digits = datasets.load_digits().images[:count] * (255 / 16)
        pictures = [digit.astype(np.uint8) for digit in digits]
    else:
        photos = datasets.load_sample_images().images  # 427 x 640
        starts = [200 * k // max(1, count // 2) for k in range((count + 1) // 2)]
        pictures = [
            photo[start // 2 :, start : start + 427] for start in starts for photo in photos
        ]
    resized = [
        np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BILINEAR))
        for picture in pictures[:count]
    ]
    stack = np.stack(resized).reshape(count, height, width, -1)
    # For another number of channels, the colors are repeated in turn.
    return np.ascontiguousarray(stack[..., np.arange(network.channels) % stack.shape[-1]])


def predict(
    model: ResNet, preprocessing: Preprocessing, variables: Any, images: jax.Array
) -> jax.Array:
    """The function that is exported: uint8 images [N, H, W, C] -> logits [N, num_classes]."""
    return jnp.asarray(model.apply(variables, preprocessing.normalize(images), train=False))


def source_logits(
    model: ResNet, variables: Any, preprocessing: Preprocessing, images: np.ndarray
) -> np.ndarray:
    """`predict`, compiled for the CPU."""
    with on_cpu():
        return np.asarray(_compiled(model, preprocessing, variables, images))


_compiled = jax.jit(predict, static_argnums=(0, 1))


def on_cpu() -> contextlib.AbstractContextManager[Any]:
    """A context on the CPU, where float32 is not rounded as on accelerators."""
    try:
        return jax.default_device(jax.devices("cpu")[0])
    except RuntimeError as error:
        raise ExportError(
            "JAX_PLATFORMS hides the CPU, on which exports are checked; add cpu to it"
        ) from error
