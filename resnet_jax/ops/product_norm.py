"""Batch norm of 1x1 convolutions that widen their input, from the moments of the input.

The mean and variance of a 1x1 convolution follow from the mean m of its input and the mean M of the
products of two channels: x @ kernel has mean m @ kernel, and its squares have mean
diag(kernel^T M kernel). Where the convolution widens its input fourfold, as at the end of a
bottleneck, M is small, and the norm is known before the convolution is computed: it becomes part of
the kernel, and a bias. That is exact, so results differ from the plain order only by rounding.

docs/notes has the measurements.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from resnet_jax.ops.activation import add_bias
from resnet_jax.ops.batch_norm import ALONE, Moments, SyncGroup, batch_moments, normalize
from resnet_jax.ops.convolution import ConvOptions, Precision, convolve, once_per_shape, subsample
from resnet_jax.ops.sharding import BATCH, REPLICATED, over_batch

POINTWISE = ConvOptions()
# The normalized product [N, H, W, K], with its mean and variance.
_Normalized = tuple[jax.Array, jax.Array, jax.Array]


class ProductNorm(NamedTuple):
    """The arrays of a `product_norm`: x [N, H, W, C], kernel [C, K], and [K] of each channel."""

    x: jax.Array
    kernel: jax.Array
    running_mean: jax.Array
    scale: jax.Array
    bias: jax.Array


@functools.partial(once_per_shape, static_argnames=("epsilon", "group", "options"))
@over_batch(BATCH, REPLICATED, REPLICATED)
def product_norm(
    x: jax.Array,
    *arrays: jax.Array,
    epsilon: float,
    group: SyncGroup = ALONE,
    options: ConvOptions = POINTWISE,
) -> _Normalized:
    """Batch norm of a 1x1 convolution, for training, by the platform's faster formula.

    Takes the arrays of a `ProductNorm`, the kernel in float32. Returns the normalized product
    [N, H / stride, W / stride, K] in the type of x with its mean and variance [K].
    """

    def formula(function: Callable[..., Any]) -> Callable[..., Any]:
        return functools.partial(function, epsilon=epsilon, group=group, options=options)

    from_input, from_output = formula(product_norm_from_input), formula(product_norm_from_output)
    return lax.platform_dependent(
        ProductNorm(x, *arrays),
        cpu=from_output,
        # A TPU writes the pixels that the stride keeps to memory before it multiplies them.
        tpu=from_input if options.stride == 1 else from_output,
        default=from_input,
    )


def product_norm_from_output(
    product: ProductNorm,
    epsilon: float,
    group: SyncGroup = ALONE,
    options: ConvOptions = POINTWISE,
) -> _Normalized:
    """`product_norm` in the plain order: the product, its moments, the norm."""
    x, kernel, running_mean, scale, bias = product
    y = pointwise_product(x, kernel, options)
    mean, variance = group.average(*batch_moments(y, running_mean))
    return normalize(y, mean, variance, scale, bias, epsilon).astype(x.dtype), mean, variance


def product_norm_from_input(
    product: ProductNorm,
    epsilon: float,
    group: SyncGroup = ALONE,
    options: ConvOptions = POINTWISE,
) -> _Normalized:
    """`product_norm` with moments from those of x, so that they are known before the product.

    The norm is then a factor and a constant of each output channel: the factor goes into the
    kernel, the constant is added where the product is made, and neither pass needs the product
    before the norm.

    Example:
      >>> keys = jax.random.split(jax.random.key(0))
      >>> x, kernel = jax.random.normal(keys[0], (2, 4, 4, 3)), jax.random.normal(keys[1], (3, 8))
      >>> product = ProductNorm(x, kernel, jnp.zeros(8), jnp.ones(8), jnp.zeros(8))
      >>> y, *_ = product_norm_from_input(product, 1e-5)
      >>> plain, *_ = product_norm_from_output(product, 1e-5)
      >>> bool(jnp.abs(y - plain).max() < 1e-5)
      True
    """
    x, kernel, _, scale, bias = product
    x = subsample(x, options.stride)
    mean, variance = _product_moments(x, kernel, group, options.precision)
    factor = scale * lax.rsqrt(variance + epsilon)
    y = pointwise_product(x, kernel * factor, options._replace(stride=1))
    return add_bias(y, bias - mean * factor), mean, variance


def _product_moments(
    x: jax.Array, kernel: jax.Array, group: SyncGroup, precision: Precision
) -> Moments:
    """Mean and variance [K] of x @ kernel over all pixels of x [N, H, W, C]."""
    # Small matrices, but every output depends on them.
    product = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)
    mean = product(x.mean((0, 1, 2), dtype=jnp.float32), kernel)
    mean_of_squares = (product(mean_outer_product(x, precision), kernel) * kernel).sum(0)
    return group.average(mean, jnp.maximum(mean_of_squares - jnp.square(mean), 0.0))


# A sum [N, H, W, K], with the mean and variance of its first term and those of its second.
_Sum = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]


@functools.partial(once_per_shape, static_argnames=("epsilon", "group", "options"))
@over_batch(BATCH, REPLICATED, REPLICATED, REPLICATED, REPLICATED)
def product_norm_sum(
    x: jax.Array,
    *arrays: jax.Array,
    epsilon: float,
    group: SyncGroup = ALONE,
    options: ConvOptions = POINTWISE,
) -> _Sum:
    """The sum of two `product_norm`s by the platform's faster formula, in the type of x.

    Takes the arrays of one `ProductNorm`, of stride 1, and those of another with `options`.
    """

    def formula(function: Callable[..., Any]) -> Callable[..., Any]:
        return functools.partial(function, epsilon=epsilon, group=group, options=options)

    first, second = ProductNorm(x, *arrays[:4]), ProductNorm(*arrays[4:])
    as_one, of_two = formula(product_norm_sum_as_one), formula(product_norm_sum_of_two)
    # The pixels that a stride keeps are one more array to write. In the later stages, with more
    # channels, two terms are so small that a TPU keeps them in its fast memory anyway.
    saves_traffic = options.stride == 1 or second.x.shape[-1] <= 256
    return lax.platform_dependent(
        first, second, tpu=as_one if saves_traffic else of_two, default=of_two
    )


def product_norm_sum_of_two(
    first: ProductNorm,
    second: ProductNorm,
    epsilon: float,
    group: SyncGroup = ALONE,
    options: ConvOptions = POINTWISE,
) -> _Sum:
    """`product_norm_sum` in the plain order: two norms, then their sum."""
    alone = options._replace(stride=1)
    y1, *moments1 = product_norm(*first, epsilon=epsilon, group=group, options=alone)
    y2, *moments2 = product_norm(*second, epsilon=epsilon, group=group, options=options)
    return y1 + y2, *moments1, *moments2


def product_norm_sum_as_one(
    first: ProductNorm,
    second: ProductNorm,
    epsilon: float,
    group: SyncGroup = ALONE,
    options: ConvOptions = POINTWISE,
) -> _Sum:
    """`product_norm_sum` as one product, so that neither term is stored.

    With moments known from the inputs, the sum is x1 @ k1 + x2 @ k2 plus a constant, which is
    [x1, x2] @ [k1; k2]. In the backward pass the gradient is read once for both kernels.

    Example:
      >>> keys = jax.random.split(jax.random.key(0), 4)
      >>> def term(key, channels):
      ...     x, kernel = jax.random.normal(key, (2, 4, 4, channels)), jnp.eye(channels, 8)
      ...     return ProductNorm(x, kernel, jnp.zeros(8), jnp.ones(8), jnp.zeros(8))
      >>> terms = term(keys[0], 3), term(keys[1], 5)
      >>> y, plain = product_norm_sum_as_one(*terms, 1e-5), product_norm_sum_of_two(*terms, 1e-5)
      >>> bool(jnp.abs(y[0] - plain[0]).max() < 1e-5)
      True
    """
    if options.stride > 1:
        # One array of the pixels that the stride keeps; otherwise every reader slices x anew.
        kept = lax.optimization_barrier(subsample(second.x, options.stride))
        second = second._replace(x=kept)

    def folded(each: ProductNorm) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Kernel and constant with the norm in them, and the moments of the product."""
        mean, variance = _product_moments(each.x, each.kernel, group, options.precision)
        factor = each.scale * lax.rsqrt(variance + epsilon)
        kernel = (each.kernel * factor).astype(each.x.dtype)
        return kernel, each.bias - mean * factor, mean, variance

    kernel1, constant1, mean1, variance1 = folded(first)
    kernel2, constant2, mean2, variance2 = folded(second)
    options = options._replace(stride=1)
    y = _sum_of_products((first.x, second.x), (kernel1, kernel2), options)
    return add_bias(y, constant1 + constant2), mean1, variance1, mean2, variance2


_Pair = tuple[jax.Array, jax.Array]


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _sum_of_products(xs: _Pair, kernels: _Pair, options: ConvOptions) -> jax.Array:
    return pointwise_product(jnp.concatenate(xs, -1), jnp.concatenate(kernels), options)


# JAX's own rule would make the gradient of the concatenated inputs, which costs two more passes
# than that of each input does.
@_sum_of_products.defjvp
def _sum_of_products_tangent(
    options: ConvOptions, primals: tuple[_Pair, _Pair], tangents: tuple[_Pair, _Pair]
) -> tuple[jax.Array, jax.Array]:
    (xs, kernels), (xs_tangent, kernels_tangent) = primals, tangents
    tangent = _sum_of_products(xs, kernels_tangent, options)
    for x, kernel in zip(xs_tangent, kernels, strict=True):
        tangent += pointwise_product(x, kernel, options)
    return _sum_of_products(xs, kernels, options), tangent


def pointwise_product(x: jax.Array, kernel: jax.Array, options: ConvOptions) -> jax.Array:
    """A 1x1 convolution of x [N, H, W, C] with kernel [C, K], in the type of x."""
    return convolve(x, kernel.astype(x.dtype)[None, None], options)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def mean_outer_product(x: jax.Array, precision: Precision = None) -> jax.Array:
    """The mean of v v^T over all pixels v of x: [N, H, W, C] -> [C, C], float32.

    Example:
      >>> mean_outer_product(jnp.array([1.0, 2.0]).reshape(1, 1, 1, 2)).tolist()
      [[1.0, 2.0], [2.0, 4.0]]
    """
    return _mean_outer_product(x, x, precision)


# JAX's own rule makes two products of x; by symmetry one is enough.
@mean_outer_product.defjvp
def _mean_outer_product_tangent(
    precision: Precision, primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    (x,), (x_tangent,) = primals, tangents
    half = _mean_outer_product(x, x_tangent, precision)
    return mean_outer_product(x, precision), half + half.T


def _mean_outer_product(x: jax.Array, y: jax.Array, precision: Precision) -> jax.Array:
    pixels = (((0, 1, 2), (0, 1, 2)), ((), ()))
    total = lax.dot_general(x, y, pixels, precision, preferred_element_type=jnp.float32)
    return total / math.prod(x.shape[:3])
