"""Compiled programs on disk, so that a command compiles only programs that no earlier one has.

JAX's own cache trusts its files: one that a full disk or a killed process has truncated is never
replaced, its size limit stops all writes once one of its files is missing, and XLA may crash on
damaged content. The store below writes files atomically, compares their checksums, and removes
damaged ones.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import platform
import re
from pathlib import Path

import jax

from resnet_jax import upstream
from resnet_jax.errors import ConfigError
from resnet_jax.files import atomic_write, expand_user, read_bytes

FOLDER = "~/.cache/resnet_jax/xla"
MAX_BYTES = 2 * 10**9
_MIN_SECONDS = 0.5  # of compilation; faster programs are not stored
_SUFFIX = ".xla"
_DIGEST = hashlib.sha256().digest_size

_log = logging.getLogger(__name__)


def use_compile_cache(folder: str = FOLDER) -> None:
    """Stores the programs that this process compiles, and loads stored ones.

    If JAX already has a cache folder (JAX_COMPILATION_CACHE_DIR), nothing changes.
    JAX_ENABLE_COMPILATION_CACHE=false turns the cache off.

    Args:
      folder: Created when the first program is stored; "": no cache. Whoever can write to it can
        run code in this process.

    Example:
      >>> use_compile_cache("")
    """
    if not folder or jax.config.values["jax_compilation_cache_dir"]:
        return
    try:
        store = ProgramStore(expand_user(folder))
    except ConfigError as error:  # no home directory
        _log.warning("compile cache: %s; programs are not stored", error)
        return
    upstream.use_program_store(store, str(store.folder))
    jax.config.update("jax_compilation_cache_dir", str(store.folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _MIN_SECONDS)
    # XLA would keep files of its own in the folder, and fail if they cannot be written.
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")


class ProgramStore:
    """A folder of programs with checksums, which removes the least recently used ones.

    After an error, a program is compiled again; the first error of a process is logged.

    Args:
      folder: Created when the first program is stored.
      max_bytes: Largest size of all programs together.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     store = ProgramStore(Path(folder))
      ...     store.put("jit_f-0123", b"program")
      ...     store.get("jit_f-0123"), store.get("jit_f-4567")
      (b'program', None)
    """

    def __init__(self, folder: Path, max_bytes: int = MAX_BYTES) -> None:
        self.folder = self._path = folder  # JAX reads `_path`, for its log
        self._max_bytes = max_bytes
        self._warned = False

    def get(self, key: str) -> bytes | None:
        """The program of a key; None if it is missing or damaged."""
        path = self._file(key)
        try:
            data = read_bytes(path, _DIGEST + self._max_bytes)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            self._warn(
                f"{path} cannot be read ({error.strerror or error}); its program is compiled again"
            )
            return None
        digest, program = data[:_DIGEST], data[_DIGEST:]
        if digest != hashlib.sha256(program).digest():
            self._warn(f"{path} is damaged; its program is compiled again")
            # It would stay if the program compiles too fast this time to be stored again.
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        with contextlib.suppress(OSError):  # the folder may be read-only
            os.utime(path)  # marks it as recently used
        return program

    def put(self, key: str, value: bytes) -> None:
        """Stores a program and removes the least recently used ones if necessary."""
        path = self._file(key)
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if path.exists() and not path.is_file():  # such as a FIFO, which is not replaced
                path.unlink()
            # The checksum detects what a power failure leaves, so nothing waits for the disk.
            data = hashlib.sha256(value).digest() + value
            atomic_write(path, data, mode=0o600, durable=False)
            self._make_room()
        except OSError as error:
            self._warn(
                f"{self.folder} cannot be written ({error.strerror or error}); the next start "
                "compiles its programs again"
            )

    def _file(self, key: str) -> Path:
        # CPU programs depend on its instruction set, and machines may share a home directory.
        instructions = _instructions() if jax.default_backend() == "cpu" else ""
        digest = hashlib.sha256(f"{key}\n{instructions}".encode()).hexdigest()
        return self.folder / f"{key.partition('-')[0][:64]}-{digest[:32]}{_SUFFIX}"

    def _make_room(self) -> None:
        found = []
        for path in filter(_is_ours, self.folder.glob(f"*{_SUFFIX}")):
            try:
                status = path.stat()
            except FileNotFoundError:  # another process has removed it
                continue
            found.append((status.st_mtime, status.st_size, path))
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if total <= self._max_bytes:
                return
            path.unlink(missing_ok=True)
            total -= size

    def _warn(self, text: str) -> None:
        if not self._warned:
            _log.warning("compile cache: %s", text)
        self._warned = True


def _is_ours(path: Path) -> bool:
    # Older versions left "partial-" files of killed processes.
    return re.fullmatch(r"(partial-.+|.+-[0-9a-f]{32})\.xla", path.name) is not None


@functools.cache
def _instructions() -> str:
    """The instruction sets of this machine's CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
