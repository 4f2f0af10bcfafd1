"""A signature of config.json, which shows whether this user's own training wrote a workdir.

config.json says where the data of a run is. A stranger's may name any folder, so the commands that
open a workdir use those paths only if the signature is valid. The key never leaves the user's state
folder.
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
_KEY_BYTES = 32
_MAX_BYTES = 4096  # of a key or a signature
_signed: set[str] = set()  # SHA-256 of what this process has signed, with or without a key


def sign(workdir: Path, content: bytes) -> None:
    """Signs `content`, that of config.json, for this user.

    If no key can be kept, as without a home folder, only this process remembers it.
    """
    _signed.add(hashlib.sha256(content).hexdigest())
    if key := _read_key(create=True):
        atomic_write(workdir / SIGNATURE, _signature(key, content) + b"\n")


def is_own(workdir: Path) -> bool:
    """Whether this user's training wrote the config.json of a workdir.

    It is False for a stranger's, an edited one, and one from another user or machine.
    """
    try:
        content = read_bytes(workdir / "config.json", 64 * MIB)
        if hashlib.sha256(content).hexdigest() in _signed:
            return True
        found = read_bytes(workdir / SIGNATURE, _MAX_BYTES)
    except OSError:
        return False
    key = _read_key(create=False)
    return key is not None and hmac.compare_digest(found.strip(), _signature(key, content))


def _signature(key: bytes, content: bytes) -> bytes:
    return hmac.new(key, content, hashlib.sha256).hexdigest().encode()


def _read_key(create: bool) -> bytes | None:
    """The user's key, or None without one."""
    try:
        path = _state_folder() / "key"
        if create and not path.exists():
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError):  # another process was faster: use its key
                atomic_write(path, secrets.token_bytes(_KEY_BYTES), mode=0o600, replace=False)
        key = read_bytes(path, _MAX_BYTES)
        if create and len(key) != _KEY_BYTES:  # damaged: what it signed is no longer valid
            path.unlink()
            return _read_key(create)
    except (OSError, RuntimeError):  # the latter from a user without a home
        return None
    return key if len(key) == _KEY_BYTES else None


def _state_folder() -> Path:
    base = os.environ.get("XDG_STATE_HOME", "")
    if not os.path.isabs(base):  # the specification says to ignore relative paths
        base = str(Path.home() / ".local" / "state")
    return Path(base, "resnet_jax")
