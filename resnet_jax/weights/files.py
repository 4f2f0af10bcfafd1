"""Weight files of PyTorch, NumPy, safetensors, Flax and Keras; read whole, never unpickled.

What a file is shows in its content; only an empty or damaged one is called what its suffix says.
Files may come from strangers: what a header claims is compared with the bytes that are there before
memory is taken for it, and whatever is wrong is a WeightsError. Reading a file takes a few times
its own size, and never more than a few times `_SMALL` beyond that.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import pickle
import pickletools
import re
import threading
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import ml_dtypes
import numpy as np

from resnet_jax.errors import ResNetJaxError, WeightsError, importing, library_errors, reason_of
from resnet_jax.files import atomic_write, read_bytes
from resnet_jax.limits import host_memory
from resnet_jax.models.resnet import ResNet
from resnet_jax.weights.channels import with_channels
from resnet_jax.weights.convert import (
    Variables,
    check_model,
    fit_variables,
    from_torch,
    is_sparse,
    to_torch,
)
from resnet_jax.weights.flax_msgpack import read_msgpack
from resnet_jax.weights.hdf5 import read_hdf5

# The largest network here has 0.5 GB of float32 weights; with the averages of AdamW and EMA, in
# float64, a checkpoint of it has 4 GB.
_MOST_BYTES = 2**33
# What an archive may unpack to, in times its own size, and in bytes whatever its size. Trained
# weights hardly shrink by packing; zeros shrink a thousand times, and so do bombs.
_MOST_UNPACKED = 16
_SMALL = 2**26
# What the tensors of a .pth file may add up to, in times its size: several names may share numbers,
# such as those of a network and its average before the first step, and each is counted.
_MOST_SHARED = 4
# The deepest network here (ResNet-1202) has 7,000 tensors, in a header of 1 MB.
_MOST_TENSORS = 100_000
_MOST_HEADER = 2**24

# The pickle of torch.save before version 1.6 begins with this number.
_LEGACY_TORCH = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_LEGACY_PICKLES = 5  # in front of its storages
# PyTorch's list of what may be unpickled is one for all threads.
_ONE_AT_A_TIME = threading.Lock()
# How a pickle names the function that makes bytes, and the most bytes of a NumPy scalar.
_ENCODE, _MOST_SCALAR = b"_codecs\nencode\n", 64
# Files that are met in the place of weights, by their first bytes.
_NOT_READ = {
    b"\4\0\0\0\1\0\0\0": "a file of Lua Torch (.t7), which PyTorch does not read any more",
    b"\3\0\0\0\1\0\0\0": "a file of Lua Torch (.t7), which PyTorch does not read any more",
    b"version https://git-lfs": "Git LFS's pointer to a file, not the file; run git lfs pull",
    b"<!DOCTYPE": "a page of the web, not a file of weights; download it again",
    b"<html": "a page of the web, not a file of weights; download it again",
}

_SAFETENSORS_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    **{
        f"{kind}{8 * size}": np.dtype(f"{kind.lower()}{size}")
        for kind in "IU"
        for size in (1, 2, 4, 8)
    },
    "BOOL": np.dtype(bool),
}


def load_weights(
    model: ResNet,
    path: str | os.PathLike[str],
    *,
    reset_head: bool = False,
    sha256: str | None = None,
    prefix: str | None = None,
    weights: str | None = None,
    strict: bool = True,
    channels: int | None = None,
) -> Variables:
    """Reads a weight file for a model.

    Args:
      model: The ResNet that the weights are for.
      path: A file of PyTorch (.pth, .pt, .bin, .ckpt, ...), safetensors, NumPy (.npz), Flax
        (.msgpack) or Keras (.h5, .keras), whatever its suffix, with any of the names that
        `from_torch` reads. Or the workdir of a run, of which the best state is taken. PyTorch's
        need torch, Keras's h5py, a workdir the extra `train`.
      reset_head: Leave the file's head out and initialize a new one.
      sha256: Checksum that the file must have, as 64 hexadecimal digits.
      prefix: As for `from_torch`.
      weights: Likewise; of a workdir too.
      strict: Likewise.
      channels: Likewise.

    Returns:
      {"params", "batch_stats"} of float32 NumPy arrays.

    Raises:
      WeightsError: The file is missing, damaged, of another kind, has another checksum, or does
        not fit the model.

    Example:
      >>> import jax, jax.numpy as jnp, tempfile, resnet_jax as rj
      >>> model = rj.ResNet20()
      >>> variables = model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     rj.save_weights(f"{folder}/weights.safetensors", model, variables)
      ...     again = rj.load_weights(model, f"{folder}/weights.safetensors")
      >>> bool((again["params"]["head"]["kernel"] == variables["params"]["head"]["kernel"]).all())
      True
    """
    check_model(model)
    path = _expanded(path)
    if path.is_dir():
        if prefix:
            raise WeightsError(f"{path} is a workdir, whose network has no prefix={prefix!r}")
        return with_channels(_from_workdir(model, path, reset_head, weights), channels)
    state_dict = read_state_dict(path, sha256=sha256)
    try:
        return from_torch(
            model,
            state_dict,
            reset_head=reset_head,
            prefix=prefix,
            weights=weights,
            strict=strict,
            channels=channels,
        )
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error


def read_state_dict(
    path: str | os.PathLike[str], *, sha256: str | None = None
) -> Mapping[str, Any]:
    """Reads a weight file as it is, for whatever model.

    Args:
      path: A file as for `load_weights`.
      sha256: Checksum that the file must have, as 64 hexadecimal digits.

    Returns:
      What the file holds: names to arrays or tensors, or a checkpoint with such a dictionary.
      Keras's names are the paths in the file: "layers/conv2d/vars/0".

    Raises:
      WeightsError: The file is missing, damaged, of another kind, or has another checksum.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     np.savez(f"{folder}/weights.npz", **{"fc.bias": np.zeros(10)})
      ...     sorted(read_state_dict(f"{folder}/weights.npz"))
      ['fc.bias']
    """
    path = _expanded(path)
    if sha256 is not None and not re.fullmatch("[0-9a-fA-F]{64}", sha256):
        raise WeightsError(f"sha256 = {sha256!r} is not a checksum of 64 hexadecimal digits")
    try:
        data = read_bytes(path, min(_MOST_BYTES, host_memory()))
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:  # a path with NUL in it
        raise WeightsError(f"cannot read {str(path)!r}: {error}") from error
    if sha256 is not None and (found := hashlib.sha256(data).hexdigest()) != sha256.lower():
        raise WeightsError(f"{path} has sha256 {found}, not {sha256}; fetch it again")
    try:
        return _READERS[_kind(path, data)](path, data)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error


def _expanded(path: str | os.PathLike[str]) -> Path:
    return Path(os.path.expanduser(path))  # unlike Path's, as it is where ~ is nobody's


def _kind(path: Path, data: bytes) -> str:
    """What a file is, by its first bytes; where these say nothing, by its suffix."""
    for start, reason in _NOT_READ.items():
        if data.startswith(start):
            raise WeightsError(reason)
    suffix = _SUFFIXES.get(path.suffix.lower())
    if data.startswith(b"PK"):
        return _kind_of_zip(data) or suffix or "zip"
    if data.startswith(b"\x89HDF\r\n\x1a\n"):
        return "hdf5"
    if _LEGACY_TORCH in data[:32]:
        return "torch"
    if data[:1] == b"\x80" and data[1:2] in (b"\2", b"\3", b"\4", b"\5"):
        raise WeightsError(
            "a Python pickle, not written by torch.save, which is never unpickled here; where you "
            "trust it, unpickle it and pass its arrays to rj.from_torch"
        )
    if data[257:262] == b"ustar":
        raise WeightsError(
            "a tar archive; if PyTorch before 0.1.10 wrote it, load it with torch and save its "
            "state dict anew, else unpack it"
        )
    if data[8:9] == b"{" and int.from_bytes(data[:8], "little") <= len(data) - 8:
        return "safetensors"
    # msgpack has no signature, only a first byte that begins a dictionary.
    if suffix is None and data[:1] and (0x80 < data[0] < 0x90 or data[0] in (0xDE, 0xDF)):
        return "msgpack"
    if suffix is None:
        raise WeightsError(
            "its content is none of PyTorch's (torch.save), safetensors, NumPy's (.npz), Keras's "
            "(.h5, .keras) and Flax's (.msgpack)"
        )
    return suffix


def _kind_of_zip(data: bytes) -> str | None:
    """What an archive is by its members; None: it is damaged, or of no known kind."""
    try:
        with _open_zip(data) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, ValueError, OSError, EOFError, NotImplementedError) as error:
        if isinstance(error, WeightsError):
            raise
        return None
    members = {name.rpartition("/")[2] for name in names}
    if "constants.pkl" in members:
        raise WeightsError("a TorchScript archive; save the state dict of the network instead")
    if "data.pkl" in members:
        return "torch"
    if "model.weights.h5" in members:
        return "keras"
    return "npz" if members and all(name.endswith(".npy") for name in members) else None


def _from_workdir(model: ResNet, workdir: Path, reset_head: bool, weights: str | None) -> Variables:
    # A loader for what the trainer wrote; imported here, so that weights do not need the trainer.
    with importing(f"{workdir} is a folder, and reading a workdir", WeightsError):
        from resnet_jax.workdirs.checkpoint import load_variables
    try:
        name, variables, _ = load_variables(workdir, ema=weights != "raw")
    except ResNetJaxError as error:
        raise WeightsError(str(error)) from error
    try:
        return fit_variables(model, variables, reset_head=reset_head)
    except WeightsError as error:
        raise WeightsError(f"{workdir} holds a {name}: {error}") from error


def save_weights(path: str | os.PathLike[str], model: ResNet, variables: Mapping[str, Any]) -> None:
    """Writes a model's weights with the names of `to_torch`.

    An existing file, or a link to one, is replaced in one step, so that no reader ever sees half a
    file. A FIFO or a device is not replaced.

    Args:
      path: A .safetensors, .npz or .pth (.pt, .th, .bin, .ckpt) file. .pth needs PyTorch.
      model: The ResNet that the variables belong to.
      variables: {"params", "batch_stats"}.

    Raises:
      WeightsError: Another kind of file, variables of another model, or a folder that cannot
        be written.

    Example:
      >>> import jax, jax.numpy as jnp, tempfile, resnet_jax as rj
      >>> model = rj.ResNet20()
      >>> variables = model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     rj.save_weights(f"{folder}/weights.npz", model, variables)
    """
    check_model(model)
    path = _expanded(path)
    write = _WRITERS.get(path.suffix.lower())
    if write is None:
        raise WeightsError(
            f"cannot write {path}: its name must end in one of {', '.join(_WRITERS)}"
        )
    data = write(to_torch(model, variables))
    try:
        atomic_write(path, data)
    except OSError as error:
        raise WeightsError(f"cannot write {path}: {error.strerror or error}") from error


def _read_safetensors(path: Path, data: bytes) -> dict[str, np.ndarray]:
    import safetensors

    header = int.from_bytes(data[:8], "little")
    if _MOST_HEADER < header <= len(data):
        raise WeightsError(f"its header has {header:,} bytes, more than that of any weights")
    try:
        tensors = safetensors.deserialize(data)
    except safetensors.SafetensorError as error:
        raise WeightsError(f"not a whole safetensors file ({reason_of(error)})") from error
    arrays = {}
    for name, tensor in tensors:
        dtype = _SAFETENSORS_DTYPES.get(tensor["dtype"])
        if dtype is None:
            raise WeightsError(
                f"{name} has type {tensor['dtype']}; floating-point weights have 16 bits or more"
            )
        try:
            arrays[name] = np.frombuffer(tensor["data"], dtype).reshape(tensor["shape"])
        except (ValueError, OverflowError) as error:  # a shape with a 0 may have any other numbers
            raise WeightsError(f"{name} has no array's shape ({reason_of(error)})") from error
    return arrays


def _read_npz(path: Path, data: bytes) -> dict[str, np.ndarray]:
    def broken(error: Exception) -> WeightsError:
        return WeightsError(f"not a whole .npz file of arrays ({reason_of(error)})")

    arrays: dict[str, np.ndarray] = {}
    with library_errors(broken), _open_zip(data) as archive:
        for member in archive.infolist():
            name = member.filename.removesuffix(".npy")
            if name in arrays:
                raise WeightsError(f"holds {name} twice")
            arrays[name] = _read_array(archive.read(member))
    return arrays


def _open_zip(data: bytes) -> zipfile.ZipFile:
    """Opens an archive that stays in bounds: no member gives more bytes than it says here."""
    if data.count(b"PK\1\2") > _MOST_TENSORS:  # entries of its directory
        raise WeightsError(f"has more than {_MOST_TENSORS:,} members, as no weights have")
    archive = zipfile.ZipFile(io.BytesIO(data))
    size = sum(member.file_size for member in archive.infolist())
    if size > max(_MOST_UNPACKED * len(data), _SMALL):
        raise WeightsError(
            f"{len(data):,} bytes would unpack to {size:,}, as no weights do; if you trust the "
            "file, write it anew without compression"
        )
    for member in archive.infolist():
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise WeightsError(f"{member.filename} is packed in a way that no weights are")
    return archive


def _read_array(data: bytes) -> np.ndarray:
    """Reads a .npy file; `np.load` takes the memory that its header claims first."""
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    else:
        shape, fortran, dtype = np.lib.format.read_array_header_2_0(file)
    if dtype.hasobject:
        raise WeightsError("holds Python objects, which are never unpickled here")
    claimed, found = math.prod(shape) * dtype.itemsize, len(data) - file.tell()
    if claimed != found:
        raise ValueError(f"an array of {claimed:,} bytes in a member with {found:,}")
    array = np.frombuffer(data, dtype, offset=file.tell())
    return array.reshape(shape, order="F" if fortran else "C")


def _read_hdf5(path: Path, data: bytes) -> dict[str, np.ndarray]:
    return read_hdf5(data, str(path), max(_MOST_UNPACKED * len(data), _SMALL))


def _read_keras(path: Path, data: bytes) -> dict[str, np.ndarray]:
    def broken(error: Exception) -> WeightsError:
        return WeightsError(f"not a whole .keras file ({reason_of(error)})")

    with library_errors(broken), _open_zip(data) as archive:
        weights = archive.read("model.weights.h5")
    return _read_hdf5(path, weights)


def _read_msgpack(path: Path, data: bytes) -> dict[str, Any]:
    return read_msgpack(data)


def _read_zip(path: Path, data: bytes) -> dict[str, Any]:
    raise WeightsError("a zip archive that is damaged, or of neither PyTorch, NumPy nor Keras")


class _Inert:
    """Stands for an object beside the tensors, such as argparse.Namespace; keeps nothing of it."""

    def __new__(cls, *args: Any) -> _Inert:
        return object.__new__(cls)

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _no_defaults(*_: Any) -> dict[Any, Any]:
    """Makes a plain dictionary in the place of a defaultdict; PyTorch fills no other kind."""
    return {}


# What training scripts keep beside their tensors. Nothing of these is called: _Inert takes their
# places, so that a file cannot use them either.
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


def _read_torch(path: Path, data: bytes) -> Mapping[str, Any]:
    torch = _import_torch(path)

    def explain(error: Exception) -> WeightsError:
        if not (data.startswith(b"PK") or _LEGACY_TORCH in data[:32]):
            return WeightsError("not a PyTorch file")
        if isinstance(error, zipfile.BadZipFile):
            return WeightsError("not a whole PyTorch file: its end is missing; fetch it again")
        if not isinstance(error, pickle.UnpicklingError):
            return WeightsError(f"not a whole PyTorch file of tensors ({reason_of(error)})")
        found = re.search(r"GLOBAL (\S{1,80})", str(error))
        return WeightsError(
            f"holds Python objects beside tensors{f' ({found[1]})' if found else ''}, which are "
            "never unpickled here; where you trust it, load it with torch and pass its state dict "
            "to rj.from_torch"
        )

    with library_errors(explain):
        _check_torch(data)
        inert: list[Any] = [(_Inert, name) for name in _INERT]
        inert.append((_no_defaults, "collections.defaultdict"))
        with _ONE_AT_A_TIME, torch.serialization.safe_globals(inert):
            content = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    if not isinstance(content, dict):
        raise WeightsError(f"holds a {type(content).__name__}, not a state dict")
    content, size = _plain(torch, content)
    if size > max(_MOST_SHARED * len(data), _SMALL):
        raise WeightsError(
            f"its tensors would be {size:,} bytes, and the file has {len(data):,}; if you "
            "trust it, save each tensor's .clone()"
        )
    return content


def _check_torch(data: bytes) -> None:
    """Refuses what torch.load(weights_only=True) allows and what takes more memory than a file has.

    Its pickles may make bytes of any length, and a pickle's objects are 70 times its size.
    """
    if b"bytearray\n" in data:
        raise WeightsError("holds bytes beside its tensors; save the state dict alone")
    pickles = [data]
    if data.startswith(b"PK"):
        with _open_zip(data) as archive:
            pickles = [_pickle(archive, each) for each in archive.infolist() if _is_pickle(each)]
    # Also none where only another reader of archives might find it.
    if sum(each.count(_ENCODE) for each in pickles) != data.count(_ENCODE) or not all(
        map(_makes_short_bytes_only, pickles)
    ):
        raise WeightsError("holds bytes beside its tensors; save the state dict alone")


def _is_pickle(member: zipfile.ZipInfo) -> bool:
    if member.compress_type != zipfile.ZIP_STORED:
        raise WeightsError(f"{member.filename} is packed, which torch.save never does")
    return member.filename.endswith(".pkl")


def _pickle(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    if member.file_size > _MOST_HEADER:
        size = f"{member.file_size:,} bytes"
        raise WeightsError(f"{member.filename} has {size}, more than that of any weights")
    return archive.read(member)


def _makes_short_bytes_only(data: bytes) -> bool:
    """Whether a file's pickles make bytes for NumPy scalars only.

    Bytes are made by _codecs.encode(text, "latin1"), at any length, and by other codecs too, which
    may double them each time. Here each use must be on a short text, spelled out right behind it.
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
            elif name == "BINUNICODE" and len(value) <= _MOST_SCALAR:
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


def _plain(torch: Any, content: dict[Any, Any]) -> tuple[dict[Any, Any], int]:
    """Copies what torch.load returns into plain dictionaries of plain tensors.

    The pickle of a tensor or OrderedDict may give it attributes in the place of its methods, and a
    dictionary may be at many places, and in itself.

    Returns:
      (the copy, bytes of its tensors, where one that is at several places counts for each).
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


def _write_safetensors(arrays: dict[str, np.ndarray]) -> bytes:
    import safetensors.numpy

    return safetensors.numpy.save(arrays, metadata={"format": "pt"})


def _write_npz(arrays: dict[str, np.ndarray]) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    return buffer.getvalue()


def _write_torch(arrays: dict[str, np.ndarray]) -> bytes:
    torch = _import_torch(Path("a .pth file"))
    buffer = io.BytesIO()
    torch.save({name: torch.from_numpy(array) for name, array in arrays.items()}, buffer)
    return buffer.getvalue()


def _import_torch(path: Path) -> Any:
    with importing(f"{path} (.safetensors does not)", WeightsError):
        import torch
    return torch


_READERS = {
    "safetensors": _read_safetensors,
    "npz": _read_npz,
    "torch": _read_torch,
    "hdf5": _read_hdf5,
    "keras": _read_keras,
    "msgpack": _read_msgpack,
    "zip": _read_zip,
}
# What a file is said to be where it is empty or damaged.
_SUFFIXES = {
    ".safetensors": "safetensors",
    ".npz": "npz",
    **dict.fromkeys([".pth", ".pt", ".th", ".bin", ".ckpt", ".tar", ".t7"], "torch"),
    **dict.fromkeys([".h5", ".hdf5"], "hdf5"),
    ".keras": "keras",
    ".msgpack": "msgpack",
}
# Suffixes, in lower case, by which a path is told from a name on the Hub.
WEIGHT_SUFFIXES: tuple[str, ...] = (*_SUFFIXES, ".pkl")
_WRITERS = {
    ".safetensors": _write_safetensors,
    ".npz": _write_npz,
    **dict.fromkeys([".pth", ".pt", ".th", ".bin", ".ckpt"], _write_torch),
}
