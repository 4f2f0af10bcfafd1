"""Which workdirs this user's own trainings wrote.

config.json says where the data of a run lies. A stranger's may name any folder, so the commands
that open a workdir use those places only where this user's trainer wrote them. It signs
config.json with a key that never leaves the user's state folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import secrets
from pathlib import Path

from resnet_jax.files import MIB, atomic_write, read_bytes

SIGNATURE = ".signature"
_BYTES = 32
_LARGEST = 4096  # bytes of a key or a signature
_signed: set[str] = set()  # SHA-256 of what this process has signed, with or without a key


def sign(workdir: Path, content: bytes) -> None:
    """Notes that this user wrote a workdir's config.json.

    Where no key can be kept, as without a home folder, only this process remembers it.

    Args:
      workdir: Folder of the run.
      content: Of its config.json.
    """
    _signed.add(hashlib.sha256(content).hexdigest())
    if key := _key(make=True):
        atomic_write(workdir / SIGNATURE, _signature(key, content) + b"\n")


def is_own(workdir: Path) -> bool:
    """Whether this user's trainer wrote a workdir's config.json.

    Args:
      workdir: Folder of the run.

    Returns:
      False for a stranger's, one that was edited, and one that another user or machine wrote.
    """
    try:
        content = read_bytes(workdir / "config.json", 64 * MIB)
        if hashlib.sha256(content).hexdigest() in _signed:
            return True
        found = read_bytes(workdir / SIGNATURE, _LARGEST)
    except OSError:
        return False
    key = _key(make=False)
    return key is not None and hmac.compare_digest(found.strip(), _signature(key, content))


def _signature(key: bytes, content: bytes) -> bytes:
    return hmac.new(key, content, hashlib.sha256).hexdigest().encode()


def _key(make: bool) -> bytes | None:
    """The user's key; None where there is none."""
    try:
        path = _state_folder() / "key"
        if make and not path.exists():
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            _write_key(path)
        key = read_bytes(path, _LARGEST)
        if make and len(key) != _BYTES:  # damaged: what it signed is nobody's any more
            path.unlink()
            return _key(make)
    except (OSError, RuntimeError):  # the latter from a user without a home
        return None
    return key if len(key) == _BYTES else None


def _write_key(path: Path) -> None:
    """Of two processes that write one at a time, the first one's counts for both."""
    partial = path.with_name(f".{secrets.token_hex(8)}")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with open(descriptor, "wb") as file:
        file.write(secrets.token_bytes(_BYTES))
    try:
        with contextlib.suppress(FileExistsError):
            os.link(partial, path)
    finally:
        partial.unlink()


def _state_folder() -> Path:
    base = os.environ.get("XDG_STATE_HOME", "")
    if not os.path.isabs(base):  # the specification says to ignore it; it would be anyone's folder
        base = str(Path.home() / ".local" / "state")
    return Path(base, "resnet_jax")
