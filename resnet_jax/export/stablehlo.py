"""A network as one StableHLO program: uint8 images in, logits out, for several platforms.

JAX alone runs it, without this package.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax import export

from resnet_jax.errors import ExportError, unknown_name
from resnet_jax.export.image_sizes import ImageSizes

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def parse_platforms(text: str) -> tuple[str, ...]:
    """Reads --platforms, names separated by commas; adds "cpu", where the program is checked.

    Example:
      >>> parse_platforms("tpu,cuda")
      ('cpu', 'cuda', 'tpu')
    """
    names = {name.strip() for name in text.split(",")}
    for name in sorted(names - set(PLATFORMS)):
        raise ExportError(f"--platforms={text}: {unknown_name('platform', name, PLATFORMS)}")
    return tuple(sorted(names | {"cpu"}))


def write_stablehlo(
    predict: Callable[[Any, jax.Array], jax.Array],
    variables: Any,
    sizes: ImageSizes,
    channels: int,
    platforms: Sequence[str],
    path: Path,
    weights_path: Path | None,
) -> None:
    """Writes the program, and the weights as safetensors beside it if `weights_path` is not None.

    `predict` is (variables, uint8 images [N, H, W, C]) -> logits [N, num_classes]. H and W are
    fixed or open; N is always open.
    """
    if importlib.util.find_spec("flatbuffers") is None:
        raise ExportError("--format=stablehlo needs flatbuffers: pip install flatbuffers")
    images = jax.ShapeDtypeStruct((*_batch_and_sides(sizes), channels), jnp.uint8)
    if weights_path is None:
        program = _export(platforms, lambda images: predict(variables, images), images)
    else:
        from safetensors.numpy import save

        # A flat dictionary, so that the program takes what safetensors' readers return.
        weights = {
            name: np.ascontiguousarray(leaf, np.float32)
            for name, leaf in traverse_util.flatten_dict(variables, sep="/").items()
        }
        weights_path.write_bytes(save(weights))  # save_file hides it from other users
        program = _export(
            platforms,
            lambda weights, images: predict(traverse_util.unflatten_dict(weights, sep="/"), images),
            jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), weights),
            images,
        )
    path.write_bytes(program.serialize())


def _export(
    platforms: Sequence[str], function: Callable[..., jax.Array], *arguments: Any
) -> export.Exported:
    return export.export(jax.jit(function), platforms=platforms)(*arguments)


def _batch_and_sides(sizes: ImageSizes) -> Sequence[Any]:
    """N, H and W: numbers, or symbols for open sizes."""
    if not sizes.is_open:
        return (*export.symbolic_shape("batch"), sizes.height, sizes.width)
    constraints = [f"{side} >= {sizes.least}" for side in ("height", "width")]
    return export.symbolic_shape("batch, height, width", constraints=constraints)


def open_stablehlo(path: Path, weights_path: Path | None) -> Callable[[np.ndarray], np.ndarray]:
    """Reads a program: uint8 images [N, H, W, C] -> logits [N, num_classes]."""
    program = export.deserialize(bytearray(path.read_bytes()))
    if weights_path is None:
        return lambda images: np.asarray(program.call(images))
    from safetensors.numpy import load_file

    weights = load_file(weights_path)
    return lambda images: np.asarray(program.call(weights, images))
