"""Single tensors of a weight file: what they hold, their layout here and in PyTorch, their names.

A tensor is a NumPy array or, from a .pth file, a PyTorch tensor.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from resnet_jax.errors import WeightsError, one_line

_SHOWN_NAMES, _SHOWN_LETTERS = 6, 80  # in one message


def is_array(value: Any) -> bool:
    """Whether a value is an array or tensor."""
    # Asks the class, because the shape of PyTorch's nested tensors raises.
    return hasattr(type(value), "shape") and hasattr(type(value), "dtype")


def shape_of(value: Any) -> tuple[int, ...]:
    """The shape of a tensor or array; () for anything else."""
    if not is_array(value) or getattr(value, "is_nested", False):
        return ()
    return tuple(value.shape)


def is_floating(value: Any) -> bool:
    """Whether a tensor or array holds real floating-point numbers."""
    if hasattr(value, "detach"):
        return bool(value.is_floating_point())
    return bool(jnp.issubdtype(value.dtype, jnp.floating))


def is_sparse(tensor: Any) -> bool:
    """Whether a PyTorch tensor has another layout than one number an element."""
    return str(tensor.layout) != "torch.strided"


def check_readable(name: str, value: Any) -> Any:
    """Returns a tensor or array; raises WeightsError unless it holds floating-point numbers."""
    name = short(name)
    if not hasattr(value, "detach"):  # not a PyTorch tensor
        if not (hasattr(value, "shape") or isinstance(value, float | int)):
            # Nor a list: a hostile one may contain itself, or billions of numbers.
            raise WeightsError(f"{name} is not an array but a {type(value).__name__}")
        array = np.asarray(value)
        if not is_floating(array):
            raise WeightsError(f"{name} holds {array.dtype}, not floating-point numbers")
        return array
    kind = str(value.dtype).removeprefix("torch.")
    if value.is_nested:
        raise WeightsError(f"{name} is a nested tensor, which has no shape")
    if is_sparse(value):
        raise WeightsError(f"{name} is sparse ({value.layout}); save it .to_dense()")
    if value.is_meta:
        raise WeightsError(f"{name} is on PyTorch's meta device, where tensors have no numbers")
    if value.is_quantized:
        raise WeightsError(f"{name} is quantized ({kind}); save it .dequantize()")
    if not value.is_floating_point():
        raise WeightsError(f"{name} holds {kind}, not floating-point numbers")
    return value


def to_numpy(name: str, value: Any) -> np.ndarray:
    """A tensor or array of any floating-point type as a new float32 array."""
    if hasattr(value, "detach"):  # PyTorch cannot convert bfloat16 to NumPy directly
        try:
            value = value.detach().cpu().resolve_neg().float().numpy()
        except (RuntimeError, TypeError) as error:  # packed types, and subclasses of tensors
            raise WeightsError(f"{name} has no numbers to read ({one_line(error)})") from error
    return np.asarray(value).astype(np.float32)


# Layouts. Convolutions are [H, W, in, out] here and [out, in, H, W] in PyTorch, those along one
# axis [K, in, out] and [out, in, K], dense layers [in, out] and [out, in].


def flax_shape(shape: tuple[int, ...], ndim: int) -> tuple[int, ...]:
    """The shape here of a PyTorch tensor, for a leaf with `ndim` dimensions."""
    if len(shape) == 4 and ndim == 2 and shape[2:] == (1, 1):
        shape = shape[:2]
    if len(shape) == 4:
        return (*shape[2:], shape[1], shape[0])
    return shape[::-1] if len(shape) in (2, 3) else shape


def torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The inverse of `flax_shape`, but for dense layers that are 1x1 convolutions in PyTorch."""
    if len(shape) == 4:
        return (shape[3], shape[2], *shape[:2])
    return shape[::-1] if len(shape) in (2, 3) else shape


def to_flax_layout(array: np.ndarray, ndim: int) -> np.ndarray:
    """Transposes an array in PyTorch's layout, also [out, in, 1, 1] to [in, out]."""
    if ndim == 3:
        return np.ascontiguousarray(array.T)
    if ndim == 4:
        return np.ascontiguousarray(array.transpose(2, 3, 1, 0))
    if ndim == 2:
        return np.ascontiguousarray(array.reshape(array.shape[:2]).T)
    return array


def to_torch_layout(leaf: np.ndarray, dense_as_conv: bool) -> np.ndarray:
    """The inverse of `to_flax_layout`, as float32."""
    leaf = leaf.astype(np.float32)
    if leaf.ndim == 4:
        return np.ascontiguousarray(leaf.transpose(3, 2, 0, 1))
    if leaf.ndim == 3:
        return np.ascontiguousarray(leaf.T)
    if leaf.ndim == 2:
        matrix = np.ascontiguousarray(leaf.T)
        return matrix[:, :, None, None] if dense_as_conv else matrix
    return leaf


# Names in messages.


def short(name: str) -> str:
    """A name, cut to the length of a message."""
    return name if len(name) <= _SHOWN_LETTERS else f"{name[:_SHOWN_LETTERS]}..."


def listed(names: Iterable[object], most: int = _SHOWN_NAMES) -> str:
    """The first few names of a list."""
    shown = [short(str(name)) for name in itertools.islice(names, most + 1)]
    return ", ".join(shown if len(shown) <= most else [*shown[:-1], "..."])


def summarized(names: Sequence[str]) -> str:
    """All of a few names; of many, the number with each first part, and examples."""
    if len(names) <= _SHOWN_NAMES:
        return listed(names)
    counts = Counter(short(re.split("[./]", name, maxsplit=1)[0]) for name in names)
    groups = listed(f"{first} ({count})" for first, count in counts.most_common())
    return f"{groups}; such as {listed(names[:3])}"
