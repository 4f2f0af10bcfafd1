"""PyTorch's files (.pth, .pt, .bin, .ckpt): read by `torch.load(weights_only=True)` and checks.

PyTorch's restricted unpickler runs no code of the file's, but it still allows what needs far more
memory than the file has. The pickles are checked for that before PyTorch sees them.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import re
import threading
import zipfile
from collections.abc import Mapping
from typing import Any, cast

import numpy as np

from resnet_jax.errors import WeightsError, importing, library_errors, reason_of
from resnet_jax.weights.formats import MAX_HEADER, SMALL
from resnet_jax.weights.formats.zip_archives import open_zip
from resnet_jax.weights.tensors import is_sparse

# torch.save before version 1.6 starts with the pickle of this number.
_LEGACY_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_LEGACY_PICKLES = 5  # in front of its storages
# Tensors may share numbers under several names, as a network and its average do before the first
# step. Each name counts towards the size, which may be this multiple of the file's.
_MAX_SHARED = 4
# PyTorch keeps one list of allowed classes for all threads.
_LOCK = threading.Lock()
# How a pickle names the function that makes bytes, and the most bytes of a NumPy scalar.
_ENCODE, _MAX_SCALAR = b"_codecs\nencode\n", 64


def is_legacy_torch(data: bytes) -> bool:
    """Whether a file was written by torch.save before version 1.6, which wrote no zip archives."""
    return _LEGACY_MAGIC in data[:32]


class _Inert:
    """Replaces an object that lies beside the tensors, and keeps nothing of it."""

    def __new__(cls, *args: Any) -> _Inert:
        return object.__new__(cls)

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _plain_dict(*_: Any) -> dict[Any, Any]:
    """Replaces a defaultdict, because PyTorch fills no other kind of dictionary."""
    return {}


# Classes that training scripts keep beside their tensors. `_Inert` replaces them, so that a file
# cannot call them.
_INERT = (
    "argparse.Namespace",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
    *(f"builtins.{name}" for name in ("list", "dict", "int", "float")),  # of a defaultdict
    *(
        f"{module}.{kind}Path"
        for module in ("pathlib", "pathlib._local")
        for kind in ("Posix", "Windows", "PurePosix", "PureWindows")
    ),
)


def read_torch(data: bytes, source: str) -> Mapping[str, Any]:
    """Reads a state dict or checkpoint; `source` names the file in messages."""
    torch = _import_torch(source)

    def explain(error: Exception) -> WeightsError:
        if not (data.startswith(b"PK") or is_legacy_torch(data)):
            return WeightsError("not a PyTorch file" if data else "the file is empty")
        if isinstance(error, zipfile.BadZipFile):
            return WeightsError("a truncated PyTorch file; download it again")
        if not isinstance(error, pickle.UnpicklingError):
            return WeightsError(f"not a valid PyTorch file of tensors ({reason_of(error)})")
        found = re.search(r"GLOBAL (\S{1,80})", str(error))
        return WeightsError(
            f"holds Python objects other than tensors{f' ({found[1]})' if found else ''}, which "
            "are never unpickled here; if you trust it, load it with torch and pass its state dict "
            "to rj.from_torch"
        )

    with library_errors(explain):
        _check_pickles(data)
        inert: list[Any] = [(_Inert, name) for name in _INERT]
        inert.append((_plain_dict, "collections.defaultdict"))
        with _LOCK, torch.serialization.safe_globals(inert):
            content = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    if not isinstance(content, dict):
        raise WeightsError(f"holds a {type(content).__name__}, not a state dict")
    content, size = _plain_copy(torch, content)
    if size > max(_MAX_SHARED * len(data), SMALL):
        raise WeightsError(
            f"its tensors would be {size:,} bytes, and the file has {len(data):,}; if you "
            "trust it, save each tensor's .clone()"
        )
    return content


def _check_pickles(data: bytes) -> None:
    """Refuses what torch.load allows and what takes far more memory than the file has.

    Its pickles may make bytes of any length, and a pickle's objects are 70 times its size.
    """
    if b"bytearray\n" in data:
        raise WeightsError("holds bytes beside its tensors; save the state dict alone")
    pickles = [data]
    if data.startswith(b"PK"):
        with open_zip(data) as archive:
            pickles = [_pickle(archive, each) for each in archive.infolist() if _is_pickle(each)]
    # The counts differ where only another reader of archives would find a call.
    if sum(each.count(_ENCODE) for each in pickles) != data.count(_ENCODE) or not all(
        map(_makes_only_short_bytes, pickles)
    ):
        raise WeightsError("holds bytes beside its tensors; save the state dict alone")


def _is_pickle(member: zipfile.ZipInfo) -> bool:
    if member.compress_type != zipfile.ZIP_STORED:
        raise WeightsError(f"{member.filename} is compressed, which torch.save never does")
    return member.filename.endswith(".pkl")


def _pickle(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    if member.file_size > MAX_HEADER:
        size = f"{member.file_size:,} bytes"
        raise WeightsError(f"{member.filename} has {size}, more than any weights need")
    return archive.read(member)


def _makes_only_short_bytes(data: bytes) -> bool:
    """Whether a file's pickles make bytes only for NumPy scalars.

    A pickle makes bytes by _codecs.encode(text, "latin1"), of any length, or by codecs that double
    the length with each call. Only calls on a short text right behind the function are allowed.
    """
    if _ENCODE not in data:
        return True
    file = io.BytesIO(data)
    for _ in range(_LEGACY_PICKLES):
        memo: dict[int, Any] = {}
        pushed: Any = None  # the last object, where it matters: a short text, or `_ENCODE`
        expected: list[Any] = []
        for operation, argument, _ in pickletools.genops(file):
            name, value = operation.name, cast("Any", argument)
            if name in ("BINPUT", "LONG_BINPUT"):
                memo[value] = pushed
                continue
            pushed = None
            if name in ("BINGET", "LONG_BINGET"):
                pushed = memo.get(value)
            elif name == "BINUNICODE" and len(value) <= _MAX_SCALAR:
                pushed = value
            elif name == "GLOBAL" and value == "_codecs encode":
                pushed = _ENCODE
            if expected:
                wanted = expected.pop(0)
                if not (isinstance(pushed, str) if wanted is str else wanted in (pushed, name)):
                    return False
            elif pushed is _ENCODE:
                expected = [str, "latin1", "TUPLE2", "REDUCE"]
        if file.tell() == len(data):
            break
    return True


def _plain_copy(torch: Any, content: dict[Any, Any]) -> tuple[dict[Any, Any], int]:
    """Copies what torch.load returns into plain dictionaries of plain tensors.

    A pickle may replace methods of its tensors and OrderedDicts by attributes, and a dictionary may
    occur several times, or inside itself.

    Returns:
      (the copy, bytes of its tensors; a tensor under several names counts for each).
    """
    copies: dict[int, dict[Any, Any]] = {id(content): {}}
    waiting, size = [content], 0
    while waiting:
        found = waiting.pop()
        for key, value in dict.items(found):
            if isinstance(value, dict):
                if id(value) not in copies:
                    copies[id(value)] = {}
                    waiting.append(value)
                value = copies[id(value)]
            elif isinstance(value, torch.Tensor):
                value = torch.Tensor.detach(value)
                if not (value.is_nested or value.is_meta or is_sparse(value)):
                    size += value.numel() * value.element_size()
            copies[id(found)][key] = value
    return copies[id(content)], size


def write_torch(arrays: dict[str, np.ndarray]) -> bytes:
    """The file's bytes."""
    torch = _import_torch("a .pth file")
    buffer = io.BytesIO()
    torch.save({name: torch.from_numpy(array) for name, array in arrays.items()}, buffer)
    return buffer.getvalue()


def _import_torch(source: str) -> Any:
    with importing(f"{source} (.safetensors does not)", WeightsError):
        import torch
    return torch
