"""Batches that are split over a mesh with explicit axes, which newer `jax.make_mesh` makes.

On such a mesh an array's sharding is part of its type, and JAX (0.7 to 0.12) has no rule for some
operations of a network: for the derivatives of a convolution, for windows, for a slice of the
split batch. Functions of images therefore hand these axes to the compiler, which shards by its own
rules, and state the sharding of what they return.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
from jax import lax

# The mapped axis of a training step: each device has its part of the batch.
AXIS = "batch"

BATCH, REPLICATED = True, False  # an output is split as the batch is, or the same on every device


def over_batch(*outputs: bool) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorates a function of images, so that it runs on a mesh with explicit axes.

    `outputs` has `BATCH` or `REPLICATED` for each array that the function returns. Its first
    argument is [N, ...], of which only N stays split; other arrays are positional arguments.
    Without such a mesh the function is called as it is.

    Example:
      >>> @over_batch(BATCH)
      ... def first_row(images):
      ...     return images[:, 0]
      >>> mesh = jax.make_mesh((1,), ("data",), (jax.sharding.AxisType.Explicit,))
      >>> split = jax.NamedSharding(mesh, jax.P("data"))
      >>> images = jax.device_put(jax.numpy.ones((2, 4, 4, 3)), split)
      >>> jax.typeof(jax.jit(first_row)(images))
      ShapedArray(float32[2@data,4,3])
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapped(x: jax.Array, *args: Any, **options: Any) -> Any:
            mesh = _mesh_of(x)
            if not mesh.explicit_axes:
                return function(x, *args, **options)
            split = jax.P(*jax.typeof(x).sharding.spec[:1])
            specs = [split if output is BATCH else jax.P() for output in outputs]
            shardings = tuple(jax.NamedSharding(mesh, spec) for spec in specs)
            arrays = [isinstance(each, jax.Array) for each in args]

            def call(x: jax.Array, *found: jax.Array) -> Any:
                rest = iter(found)
                merged = [next(rest) if a else each for a, each in zip(arrays, args, strict=True)]
                return function(x, *merged, **options)

            out_sharding = shardings if len(shardings) > 1 else shardings[0]
            automatic = jax.sharding.auto_axes(
                call, axes=mesh.explicit_axes, out_sharding=out_sharding
            )
            return automatic(x, *itertools.compress(args, arrays))

        return wrapped

    return decorate


def _mesh_of(x: jax.Array) -> jax.sharding.AbstractMesh:
    """The mesh that `jax.set_mesh` sets, or else that of x."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.typeof(x).sharding.mesh if mesh.empty else mesh


# For `nn.Dense`, whose kernel JAX cannot differentiate by where only the images' type has a mesh.
dot_general = over_batch(BATCH)(lax.dot_general)
