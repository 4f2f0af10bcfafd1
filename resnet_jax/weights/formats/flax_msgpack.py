"""The msgpack files of `flax.serialization`: nested dictionaries of arrays.

msgpack's own reader allocates what a header claims: five bytes may announce an array of a billion
elements. This one allocates nothing before the bytes are there, and counts the objects it makes.
"""

from __future__ import annotations

import math
import struct
from typing import Any

import ml_dtypes
import numpy as np

from resnet_jax.errors import WeightsError

_MAX_OBJECTS = 1_000_000  # two per tensor; ResNet-1202 and its optimizer make 50,000
_MAX_DEPTH = 64
_ARRAY, _SCALAR = 1, 3  # Flax's extension types

# First byte -> struct format of its number.
_NUMBERS = {
    0xCA: ">f",
    0xCB: ">d",
    0xCC: ">B",
    0xCD: ">H",
    0xCE: ">I",
    0xCF: ">Q",
    0xD0: ">b",
    0xD1: ">h",
    0xD2: ">i",
    0xD3: ">q",
}
# First byte -> struct format of the length that follows.
_BYTES = {0xC4: ">B", 0xC5: ">H", 0xC6: ">I"}
_TEXTS = {0xD9: ">B", 0xDA: ">H", 0xDB: ">I"}
_LISTS = {0xDC: ">H", 0xDD: ">I"}
_MAPS = {0xDE: ">H", 0xDF: ">I"}
_EXTENSIONS = {0xC7: ">B", 0xC8: ">H", 0xC9: ">I"}
_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}


def read_msgpack(data: bytes) -> dict[str, Any]:
    """Reads what `flax.serialization.to_bytes` or `msgpack_serialize` wrote.

    Returns:
      Nested dictionaries of arrays and numbers. Arrays share the memory of `data`.

    Example:
      >>> read_msgpack(b"\\x81\\xa4step\\x07")
      {'step': 7}
    """
    reader = _Reader(data)
    value = reader.value()
    if not isinstance(value, dict):
        raise WeightsError(f"holds a {type(value).__name__}, not a dictionary of arrays")
    if reader.at != len(data):
        raise WeightsError("not a Flax msgpack file: it has trailing bytes")
    return value


class _Reader:
    def __init__(self, data: bytes | memoryview) -> None:
        self.data = memoryview(data)
        self.at = 0
        self.objects = 0

    def take(self, count: int) -> memoryview:
        if count > len(self.data) - self.at:
            raise WeightsError("not a valid Flax msgpack file")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, kind: str) -> Any:
        return struct.unpack(kind, self.take(struct.calcsize(kind)))[0]

    def value(self, depth: int = 0) -> Any:
        self.objects += 1
        if self.objects > _MAX_OBJECTS or depth > _MAX_DEPTH:
            raise WeightsError("has more objects, or deeper ones, than any weights")
        first = self.take(1)[0]
        if first < 0x80 or first >= 0xE0:
            return first if first < 0x80 else first - 256
        if first in _CONSTANTS:
            return _CONSTANTS[first]
        if first in _NUMBERS:
            return self.number(_NUMBERS[first])
        if first < 0x90 or first in _MAPS:
            count = self.number(_MAPS[first]) if first in _MAPS else first & 0x0F
            return {self.key(depth): self.value(depth + 1) for _ in range(count)}
        if first < 0xA0 or first in _LISTS:
            count = self.number(_LISTS[first]) if first in _LISTS else first & 0x0F
            return [self.value(depth + 1) for _ in range(count)]
        if first < 0xC0 or first in _TEXTS:
            count = self.number(_TEXTS[first]) if first in _TEXTS else first & 0x1F
            return str(self.take(count), "utf-8", "replace")
        if first in _BYTES:
            return self.take(self.number(_BYTES[first]))
        if 0xD4 <= first <= 0xD8 or first in _EXTENSIONS:
            packed = _EXTENSIONS.get(first)
            count = self.number(packed) if packed else 1 << (first - 0xD4)
            kind = self.number(">b")
            content = self.take(count)
            return _array(content) if kind in (_ARRAY, _SCALAR) else None
        raise WeightsError(f"not a Flax msgpack file: byte {first:#x} starts no value")

    def key(self, depth: int) -> str:
        key = self.value(depth + 1)
        if not isinstance(key, str):
            raise WeightsError(f"not a Flax msgpack file: a {type(key).__name__} is not a name")
        return key


def _array(content: memoryview) -> np.ndarray:
    """Decodes an array, which Flax writes as (shape, name of its type, bytes)."""
    packed = _Reader(content).value()
    if not isinstance(packed, list) or len(packed) != 3:
        raise WeightsError("not a Flax msgpack file: an array needs a shape, a type and values")
    shape, name, numbers = packed
    name = str(name, "ascii", "replace") if isinstance(name, memoryview) else name
    if not isinstance(numbers, memoryview) or not isinstance(name, str):
        raise WeightsError("not a Flax msgpack file: an array has no values")
    few = isinstance(shape, list) and len(shape) <= 32
    if not few or not all(type(n) is int and n >= 0 for n in shape):
        raise WeightsError("not a Flax msgpack file: an array has no shape")
    try:
        dtype = np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)
    except (TypeError, ValueError, SyntaxError) as error:
        raise WeightsError(f"an array has type {name[:80]!r}, which NumPy does not know") from error
    if dtype.kind not in "biufc" and name != "bfloat16":
        raise WeightsError(f"an array has type {name[:80]!r}, not numbers")
    if math.prod(shape) * dtype.itemsize != len(numbers) or not dtype.itemsize:
        raise WeightsError(f"an array of shape {shape} has {len(numbers):,} bytes")
    try:
        return np.frombuffer(numbers, dtype).reshape(shape) if len(numbers) else np.empty(shape)
    except (ValueError, OverflowError) as error:  # beside a 0, any dimension passes the check
        raise WeightsError(f"an array has no array's shape ({error})") from error
