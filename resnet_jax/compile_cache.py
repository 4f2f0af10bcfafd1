"""Compiled programs on disk, so that a command compiles only what no earlier one has compiled.

JAX's own store trusts what it finds: a file that a full disk or a killed process cut short is never
replaced, its size limit stops all writing once one of its files is missing, and XLA may crash on
damaged content. The store below renames whole files into place, checks their checksums, and
removes what is damaged.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import platform
import re
import tempfile
from pathlib import Path

import jax

from resnet_jax import upstream
from resnet_jax.files import read_bytes

FOLDER = "~/.cache/resnet_jax/xla"
MOST_BYTES = 2 * 10**9
_SECONDS = 0.5  # programs that compile faster are not worth a file
_SUFFIX = ".xla"
_DIGEST = hashlib.sha256().digest_size

_log = logging.getLogger(__name__)


def use_compile_cache(folder: str = FOLDER) -> None:
    """Keeps the programs that this process compiles, and takes those that are there.

    Where JAX has been given a folder already (JAX_COMPILATION_CACHE_DIR) nothing is changed.
    JAX_ENABLE_COMPILATION_CACHE=false turns the cache off.

    Args:
      folder: Made when the first program is written; "": none. Whoever can write to it can run
        code in this process.

    Example:
      >>> use_compile_cache("")
    """
    if not folder or jax.config.values["jax_compilation_cache_dir"]:
        return
    try:
        store = ProgramStore(Path(folder).expanduser())
    except RuntimeError as error:  # no home directory
        _log.warning("compile cache: %s: %s; programs are not kept", folder, error)
        return
    upstream.use_program_store(store, str(store.folder))
    jax.config.update("jax_compilation_cache_dir", str(store.folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", _SECONDS)
    # XLA keeps files of its own in the folder, and fails where those cannot be written.
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")


class ProgramStore:
    """A folder of programs, each with its checksum; the least recently used are removed.

    Errors cost a compilation, and the first of a process one line.

    Args:
      folder: Made when the first program is written.
      most_bytes: That all programs together may take.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     store = ProgramStore(Path(folder))
      ...     store.put("jit_f-0123", b"program")
      ...     store.get("jit_f-0123"), store.get("jit_f-4567")
      (b'program', None)
    """

    def __init__(self, folder: Path, most_bytes: int = MOST_BYTES) -> None:
        self.folder = self._path = folder  # JAX reads `_path`, for its log
        self._most_bytes = most_bytes
        self._warned = False

    def get(self, key: str) -> bytes | None:
        """The program of a key; None if it is not there, or damaged."""
        path = self._file(key)
        try:
            data = read_bytes(path, _DIGEST + self._most_bytes)
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
            # What compiles faster this time is not written again, and would stay damaged.
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        with contextlib.suppress(OSError):  # the folder may be read-only
            os.utime(path)  # used last
        return program

    def put(self, key: str, value: bytes) -> None:
        """Writes a program, and makes room for it."""
        path = self._file(key)
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            # What a killed process leaves of it counts as a program, and is removed like one.
            descriptor, partial = tempfile.mkstemp(_SUFFIX, "partial-", self.folder)
            try:
                with open(descriptor, "wb") as file:
                    file.write(hashlib.sha256(value).digest() + value)
                os.replace(partial, path)
            finally:
                Path(partial).unlink(missing_ok=True)
            self._make_room()
        except OSError as error:
            self._warn(
                f"{self.folder} cannot be written ({error.strerror or error}); what is compiled "
                "now is compiled again at the next start"
            )

    def _file(self, key: str) -> Path:
        # Programs for a CPU use its instructions, and several machines may share a home directory.
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
            if total <= self._most_bytes:
                return
            path.unlink(missing_ok=True)
            total -= size

    def _warn(self, text: str) -> None:
        if not self._warned:
            _log.warning("compile cache: %s", text)
        self._warned = True


def _is_ours(path: Path) -> bool:
    return re.fullmatch(r"(partial-.+|.+-[0-9a-f]{32})\.xla", path.name) is not None


@functools.cache
def _instructions() -> str:
    """The instruction sets of this machine's CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")
