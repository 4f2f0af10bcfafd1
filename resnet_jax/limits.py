"""Upper limits of numbers, and a check of host memory before it is allocated.

Linux grants more memory than it has, and kills the process without a message once it is used.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from resnet_jax.errors import ConfigError

try:
    import resource
except ModuleNotFoundError:  # Windows, which supports models and their weights
    resource = None  # type: ignore[assignment]

# The encoded file of an image. A JPEG of 200 million pixels has 50 to 100 MB.
MAX_IMAGE_BYTES = 128 * 2**20
# Side of an image in pixels. The first stage of ResNet-50 needs 4 GB for one image of this size.
MAX_SIDE = 8192
# Channels of an image; hyperspectral cameras have hundreds of bands.
MAX_CHANNELS = 1024
# Classes; the largest face datasets have about four million people.
MAX_CLASSES = 10_000_000
# Images in a batch, which are counted in float32: larger integers would not be exact.
MAX_BATCH = 2**24
# Any other count; devices count in int32.
MAX_COUNT = 2**31 - 1


def host_memory(root: str | os.PathLike[str] = "/") -> int:
    """The memory in bytes that this process may use: of the machine, container or `ulimit -v`.

    Example:
      >>> host_memory() > 2**20
      True
    """
    if resource is None:
        return sys.maxsize
    sizes = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    address_space, _ = resource.getrlimit(resource.RLIMIT_AS)
    if address_space != resource.RLIM_INFINITY:
        sizes.append(address_space)
    groups = Path(root, "sys/fs/cgroup")
    found = re.search(r"^0::/(.*)$", _read(Path(root, "proc/self/cgroup")), re.MULTILINE)
    below = Path(found[1]) if found else Path()
    limits = [groups / each / "memory.max" for each in (below, *below.parents)]
    for limit in (*limits, groups / "memory/memory.limit_in_bytes"):  # the latter is version 1
        if (text := _read(limit).strip()).isdecimal():  # else "max"
            sizes.append(int(text))
    return min(sizes)


def check_host_memory(needed: float, what: str, remedy: str) -> None:
    """Raises ConfigError if `needed` bytes, a lower bound, exceed the host's memory.

    Args:
      needed: Bytes.
      what: What needs the memory, with the name of its field or flag.
      remedy: How to need less.

    Example:
      >>> check_host_memory(2e18, "--batch_size=1000000", "take less")  # doctest: +ELLIPSIS
      Traceback (most recent call last):
      resnet_jax.errors.ConfigError: --batch_size=1000000: needs at least 2,000,000,000.0 GB of \
memory, and there are ...; take less
    """
    there = host_memory()
    if needed > there:
        raise ConfigError(
            f"{what}: needs at least {needed / 1e9:,.1f} GB of memory, and there are "
            f"{there / 1e9:,.1f}; {remedy}"
        )


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
