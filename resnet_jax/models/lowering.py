"""How the functions of the layers are traced, and which of two derivatives a platform gets."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax import lax

# Networks repeat a layer many times. What is called through this is traced and differentiated once
# for each set of shapes, which halves the time to trace the gradient of a ResNet; the program
# stays the same.
once_per_shape = functools.partial(jax.jit, inline=True)


def derivative_on_cpu(of: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates a function that on a CPU shall be differentiated by another formula.

    Args:
      of: Equals the function; where a program for a CPU has a derivative of the function, it
        computes this one and its derivative.

    Returns:
      The decorator. Programs without derivatives are those of the function itself.

    Example:
      >>> @derivative_on_cpu(lambda x: x * x)
      ... def square(x):
      ...     return x**2
      >>> jax.grad(square)(3.0).item()
      6.0
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        # A rule for tangents, so that every kind of derivative stays possible.
        @jax.custom_jvp
        @functools.wraps(function)
        def chosen(*primals: jax.Array) -> Any:
            return function(*primals)

        @chosen.defjvp
        def _tangent(primals: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]) -> Any:
            return lax.platform_dependent(
                primals,
                tangents,
                cpu=functools.partial(jax.jvp, of),
                default=functools.partial(jax.jvp, function),
            )

        return chosen

    return decorate
