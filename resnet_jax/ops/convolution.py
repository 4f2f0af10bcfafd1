"""Convolution, by the formula that is fastest on the platform it is compiled for.

All formulas give the same values and gradients up to rounding. On a TPU it is always XLA's
convolution. On a GPU a strided convolution of few channels, which is the first of a network, runs
over blocks of pixels (`convolution_of_blocks`). On a CPU XLA's convolution is slow in three places
in float32, which become matrix products:

* a 1x1 convolution is one, forwards and backwards;
* the gradient of a larger kernel is a convolution whose "kernel" is as large as the image. Written
  as one product of (input, shifted by the kernel's rows) and (output gradient, shifted by the
  kernel's columns), it is faster for most shapes of this family, up to three times.

The choice is made when a program is lowered, so that one traced function can be compiled for
several platforms. docs/notes has the measurements.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from resnet_jax import upstream
from resnet_jax.ops.sharding import BATCH, over_batch

# Networks repeat a layer many times. A function decorated with this is traced and differentiated
# once for each set of shapes, which halves the time to trace the gradient of a ResNet; the program
# stays the same.
once_per_shape = functools.partial(jax.jit, inline=True)


# How float32 numbers are multiplied, by JAX's names; None: as `jax.default_matmul_precision` says.
Precision = lax.Precision | str | None
PRECISIONS = ("default", "high", "highest")


class ConvOptions(NamedTuple):
    """How a square kernel moves over the image, and how precisely it is multiplied.

    Padding keeps the image's size at stride 1. Every formula below and its derivatives take these
    options whole, so that all multiply with the same precision.
    """

    stride: int = 1
    dilation: int = 1
    groups: int = 1
    precision: Precision = None


@functools.partial(once_per_shape, static_argnames="options")
@over_batch(BATCH)
def convolve(x: jax.Array, kernel: jax.Array, options: ConvOptions) -> jax.Array:
    """Convolves x [N, H, W, C] with a square kernel [side, side, C / groups, K] of odd side.

    Padding is symmetric; the result is [N, ceil(H / stride), ceil(W / stride), K]. Both arrays have
    the same type.

    Example:
      >>> x, kernel = jnp.ones((1, 8, 8, 3)), jnp.ones((3, 3, 3, 16))
      >>> convolve(x, kernel, ConvOptions(stride=2)).shape
      (1, 4, 4, 16)
    """
    default = functools.partial(xla_convolution, options=options)
    # A CPU's products of bfloat16 numbers are slower than XLA's convolution, which takes float32.
    if options.groups > 1 or x.dtype != jnp.float32:
        on_cpu = upstream.on_cpu(default, x.dtype)
    elif kernel.shape[0] == 1:
        on_cpu = functools.partial(pointwise, options=options)
    else:
        on_cpu = functools.partial(convolution_with_product_gradient, options=options)
    formulas = {} if on_cpu is default else {"cpu": on_cpu}
    known_size = all(isinstance(side, int) for side in x.shape[1:3])  # no symbol of jax.export
    if known_size and _reads_few_channels(x.shape[-1], kernel.shape[0], options):
        formulas["cuda"] = formulas["rocm"] = functools.partial(
            convolution_of_blocks, options=options
        )
    if not formulas:
        return default(x, kernel)
    return lax.platform_dependent(x, kernel, **formulas, default=default)


def _reads_few_channels(channels: int, side: int, options: ConvOptions) -> bool:
    """Whether blocks of pixels have a better number of channels for tensor cores than pixels."""
    strided = 1 < options.stride < side
    return strided and channels <= 4 and options.dilation == options.groups == 1


def xla_convolution(x: jax.Array, kernel: jax.Array, options: ConvOptions) -> jax.Array:
    """`convolve` by XLA's own operation, on every platform."""
    padding = options.dilation * (kernel.shape[0] - 1) // 2
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(options.stride, options.stride),
        padding=((padding, padding), (padding, padding)),
        rhs_dilation=(options.dilation, options.dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=options.groups,
        precision=options.precision,
    )


def bias_type(dtype: Any) -> Any:
    """The type of a bias that is added to a convolution of type `dtype`, on JAX's default platform.

    A GPU adds bias and shortcut and applies ReLU inside the convolution if all have its own type.
    With a bias in float32, it would write the convolution and read it again. Elsewhere float32
    costs nothing and rounds less.
    """
    return dtype if jax.default_backend() == "gpu" else jnp.promote_types(dtype, jnp.float32)


def pointwise(x: jax.Array, kernel: jax.Array, options: ConvOptions) -> jax.Array:
    """`convolve` for a 1x1 kernel: one matrix product over all positions."""
    return _product(subsample(x, options.stride), kernel[0, 0], options.precision)


def subsample(x: jax.Array, stride: int) -> jax.Array:
    """Every `stride`-th row and column of x [N, H, W, C]."""
    if stride == 1:
        return x
    # lax.slice, because x[:, ::stride] has another formula for a symbolic size (jax.export).
    return lax.slice(x, (0, 0, 0, 0), x.shape, (1, stride, stride, 1))


_KEEP = (0, 0, 0)  # lax.pad: nothing before, after or between


def convolution_of_blocks(x: jax.Array, kernel: jax.Array, options: ConvOptions) -> jax.Array:
    """`convolve` with stride 1 over blocks of s x s pixels, s being the stride (space-to-depth).

    Tensor cores multiply channels in groups of eight, and cuDNN fills the three of an image up with
    zeros. A 7x7 kernel with stride 2 on 3 channels becomes a 4x4 kernel on 2 x 2 x 3 = 12 channels,
    filled up to 16. Dilation and groups must be 1.

    Example:
      >>> x, kernel = jnp.ones((1, 4, 4, 1)), jnp.ones((3, 3, 1, 1))
      >>> convolution_of_blocks(x, kernel, ConvOptions(stride=2))[0, :, :, 0].tolist()
      [[4.0, 6.0], [6.0, 9.0]]
    """
    stride, reach = options.stride, (kernel.shape[0] - 1) // 2
    before, after = -(-reach // stride), reach // stride  # blocks beside that of the output
    # Zeros around the image are part of the copy into blocks; cuDNN would need another.
    x = _pad_sides(x, [(stride * before, stride * after + -side % stride) for side in x.shape[1:3]])
    margins = (stride * before - reach, stride * (after + 1) - 1 - reach)
    filters = _pad_sides(kernel.transpose(3, 0, 1, 2), [margins, margins])
    return lax.conv_general_dilated(
        _blocks_as_channels(x, stride),
        _blocks_as_channels(filters, stride),
        window_strides=(1, 1),
        padding="VALID",
        dimension_numbers=("NHWC", "OHWI", "NHWC"),
        precision=options.precision,
    )


def _pad_sides(x: jax.Array, edges: list[tuple[int, int]]) -> jax.Array:
    """Zeros before and after the rows and the columns of x [N, H, W, C]."""
    return lax.pad(x, jnp.zeros((), x.dtype), (_KEEP, *((*edge, 0) for edge in edges), _KEEP))


def _blocks_as_channels(x: jax.Array, side: int) -> jax.Array:
    """[N, H, W, C] to [N, H / side, W / side, side side C], and zeros to a multiple of eight."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // side, side, width // side, side, channels)
    x = x.transpose(0, 1, 3, 2, 4, 5)
    x = x.reshape(*x.shape[:3], side * side * channels)
    return lax.pad(x, jnp.zeros((), x.dtype), (_KEEP, _KEEP, _KEEP, (0, -x.shape[-1] % 8, 0)))


# A rule for tangents, not for gradients: JAX transposes it, and so every kind of derivative
# (forward, reverse, any mix of them) stays possible.
@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def convolution_with_product_gradient(
    x: jax.Array, kernel: jax.Array, options: ConvOptions
) -> jax.Array:
    """`convolve` by XLA's operation; the gradient of the kernel is a matrix product.

    Where it is differentiated, so are the others for some shapes.
    """
    return xla_convolution(x, kernel, options)


@convolution_with_product_gradient.defjvp
def _tangent(
    options: ConvOptions,
    primals: tuple[jax.Array, jax.Array],
    tangents: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array]:
    x, kernel = primals
    x_tangent, kernel_tangent = tangents
    products = _products_are_faster(x.shape, kernel.shape, options)
    formula = convolution_by_product if products else convolution_with_product_gradient
    by_x = formula(x_tangent, kernel, options)
    by_kernel = convolution_by_product(x, kernel_tangent, options)
    return formula(x, kernel, options), by_x + by_kernel


def _products_are_faster(
    shape: tuple[int, ...], kernel_shape: tuple[int, ...], options: ConvOptions
) -> bool:
    """Whether training is faster with a convolution and both gradients as products.

    By measurement, of 3x3 kernels: on maps of few pixels; and before jaxlib 0.11, whose
    convolutions got faster, with few channels or a stride.
    """
    _, height, width, channels = shape
    if kernel_shape[0] != 3 or channels < 16:
        return False
    if height * width <= 49:
        return True
    return upstream.slow_convolutions_on_cpu() and (channels <= 64 or options.stride > 1)


def convolution_by_product(x: jax.Array, kernel: jax.Array, options: ConvOptions) -> jax.Array:
    """`convolve` as one matrix product, made for what its transpose is: the kernel's gradient.

    A kernel of side k at stride s reads k rows and k columns of the image for every output. The
    rows are gathered into channels before the product, and the columns are resolved after it: s
    neighboring columns are one position with s times the channels, and a column of the kernel is
    one of these s groups of channels (`phase`) of a position `shift` to the side. The product makes
    one output for every shift; they are moved into place and added.

    x is [N, H, W, C], kernel [k, k, C, K] and the result [N, ceil(H / s), ceil(W / s), K]; groups
    must be 1.

    Example:
      >>> x, kernel = jnp.ones((1, 4, 4, 1)), jnp.ones((3, 3, 1, 1))
      >>> convolution_by_product(x, kernel, ConvOptions())[0, 0, :, 0].tolist()
      [4.0, 6.0, 6.0, 4.0]
    """
    side, _, channels, features = kernel.shape
    stride, dilation = options.stride, options.dilation
    batch, height, width, _ = x.shape
    rows, columns = -(-height // stride), -(-width // stride)

    reach = dilation * (side - 1) // 2
    x = jnp.pad(x, ((0, 0), (reach, reach), (0, columns * stride - width), (0, 0)))
    last = stride * (rows - 1) + 1
    taps = [x[:, start : start + last : stride] for start in range(0, 2 * reach + 1, dilation)]
    x = _concatenate_channels(taps)  # [N, H / s, W, k C]
    x = x.reshape(batch, rows, columns, stride * side * channels)

    # {(shift, phase): column of the kernel}
    places = {divmod(column * dilation - reach, stride): column for column in range(side)}
    shifts = sorted({shift for shift, _ in places})
    absent = jnp.zeros((side, channels, features), kernel.dtype)
    by_shift = [
        jnp.stack(
            [
                kernel[:, places[shift, phase]] if (shift, phase) in places else absent
                for phase in range(stride)
            ]
        ).reshape(stride * side * channels, features)
        for shift in shifts
    ]
    matrix = jnp.concatenate(by_shift, axis=1)
    y = _product(x, matrix, options.precision)  # [N, H / s, W / s, shifts K]
    # An output takes what lies `shift` positions to its right.
    parts = [y[..., start : start + features] for start in range(0, y.shape[-1], features)]
    return functools.reduce(
        jnp.add,
        (
            lax.pad(part, jnp.zeros((), y.dtype), (_KEEP, _KEEP, (-shift, shift, 0), _KEEP))
            for shift, part in zip(shifts, parts, strict=True)
        ),
    )


def _concatenate_channels(parts: list[jax.Array]) -> jax.Array:
    """Concatenates equal arrays [..., C] -> [..., len(parts) C] as a sum of padded arrays.

    XLA compiles the sum to a faster loop than a concatenation.
    """
    channels, zero = parts[0].shape[-1], jnp.zeros((), parts[0].dtype)
    return functools.reduce(
        jnp.add,
        (
            lax.pad(
                part,
                zero,
                (_KEEP, _KEEP, _KEEP, (index * channels, (len(parts) - 1 - index) * channels, 0)),
            )
            for index, part in enumerate(parts)
        ),
    )


def _product(x: jax.Array, matrix: jax.Array, precision: Precision) -> jax.Array:
    """[N, H, W, C] x [C, K] -> [N, H, W, K].

    Two-dimensional on purpose: XLA transposes the larger operand of the gradient of a product
    with more dimensions, in memory.
    """
    y = jnp.matmul(x.reshape(-1, x.shape[-1]), matrix, precision=precision)
    return y.reshape(*x.shape[:-1], matrix.shape[-1])
