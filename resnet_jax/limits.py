"""Numbers that are too large for any use, and what is refused before memory is taken for it.

Linux grants more memory than there is, and kills the process when it is used, without a message.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from resnet_jax.errors import ConfigError

try:
    import resource
except ModuleNotFoundError:  # Windows, which the models and their weights work on
    resource = None  # type: ignore[assignment]

# Sides of images in pixels. ResNet-50's first stage makes 4 GB of one image of this size.
MAX_SIDE = 8192
# The encoded file of an image. A JPEG of 200 million pixels has 50 to 100 MB.
MAX_IMAGE_BYTES = 128 * 2**20
# Channels of images; hyperspectral cameras have some hundreds of bands.
MAX_CHANNELS = 1024
# The largest sets of faces have some four million people.
MAX_CLASSES = 10_000_000
# Images of a batch: where they are counted in float32, which larger whole numbers are not exact in.
MAX_BATCH = 2**24
# Everything else that is counted, which devices do in int32.
MAX_COUNT = 2**31 - 1


def host_memory(root: str | os.PathLike[str] = "/") -> int:
    """The memory of this machine, or what a container or `ulimit -v` leaves of it.

    Args:
      root: Folder with "proc" and "sys".

    Returns:
      Bytes.

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
    for limit in (*limits, groups / "memory/memory.limit_in_bytes"):  # the latter: version 1
        if (text := _read(limit).strip()).isdecimal():  # else "max"
            sizes.append(int(text))
    return min(sizes)


def check_host_memory(needed: float, what: str, remedy: str) -> None:
    """Refuses what needs more memory than there is.

    Args:
      needed: A lower bound of it, in bytes.
      what: What needs it, with the name of its field or flag.
      remedy: What makes it smaller.

    Raises:
      ConfigError: It is more than the memory of the host.

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
