"""A network as one StableHLO program: uint8 images in, logits out, for several platforms.

JAX alone runs it again; its code is not needed, nor this package.
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
    """Reads the flag --platforms.

    Args:
      text: Names with commas between them.

    Returns:
      The names, with "cpu" among them, because the program is checked there.

    Raises:
      ExportError: An unknown name, or none.

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
    """Writes the program.

    Args:
      predict: (variables, uint8 images [N, H, W, C]) -> logits [N, num_classes].
      variables: Its first argument.
      sizes: H and W, fixed or open; N stays open.
      channels: C.
      platforms: Such as ("cpu", "cuda", "tpu").
      path: Where the program goes.
      weights_path: Where the weights go, as safetensors; None: into the program.
    """
    if importlib.util.find_spec("flatbuffers") is None:
        raise ExportError("--format=stablehlo needs flatbuffers: pip install flatbuffers")
    images = jax.ShapeDtypeStruct((*_batch_and_sides(sizes), channels), jnp.uint8)
    to_program = _exporter(platforms)
    if weights_path is None:
        program = to_program(lambda images: predict(variables, images))(images)
    else:
        from safetensors.numpy import save

        # One flat dictionary, so that what reads a safetensors file is the argument.
        weights = {
            name: np.ascontiguousarray(leaf, np.float32)
            for name, leaf in traverse_util.flatten_dict(variables, sep="/").items()
        }
        weights_path.write_bytes(save(weights))  # save_file lets nobody else read it
        program = to_program(
            lambda weights, images: predict(traverse_util.unflatten_dict(weights, sep="/"), images)
        )(jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), weights), images)
    path.write_bytes(program.serialize())


def _batch_and_sides(sizes: ImageSizes) -> Sequence[Any]:
    """N, H and W: numbers, or names where any number goes."""
    if not sizes.is_open:
        return (*export.symbolic_shape("batch"), sizes.height, sizes.width)
    constraints = [f"{side} >= {sizes.least}" for side in ("height", "width")]
    return export.symbolic_shape("batch, height, width", constraints=constraints)


def _exporter(platforms: Sequence[str]) -> Callable[..., Any]:
    def make(function: Callable[..., jax.Array]) -> Callable[..., export.Exported]:
        return export.export(jax.jit(function), platforms=platforms)  # it takes nothing but jit's

    return make


def open_stablehlo(path: Path, weights_path: Path | None) -> Callable[[np.ndarray], np.ndarray]:
    """Reads a program.

    Args:
      path: What `write_stablehlo` wrote.
      weights_path: Of the weights beside it; None: they are in it.

    Returns:
      uint8 images [N, H, W, C] -> logits [N, num_classes].
    """
    program = export.deserialize(bytearray(path.read_bytes()))
    if weights_path is None:
        return lambda images: np.asarray(program.call(images))
    from safetensors.numpy import load_file

    weights = load_file(weights_path)
    return lambda images: np.asarray(program.call(weights, images))
