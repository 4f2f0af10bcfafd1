"""Starts JAX's backend for a command, with explained errors."""

from __future__ import annotations

import contextlib
import os
import resource
import threading
from pathlib import Path

from resnet_jax.errors import ConfigError, one_line


def start_backend() -> None:
    """Lets JAX find its devices.

    Raises:
      ConfigError: JAX_PLATFORMS names a missing platform, the runtime of a device fails, or not
        enough threads can be started.
    """
    import jax

    _check_threads()
    try:
        jax.devices()
    except (
        RuntimeError,
        AssertionError,
    ) as error:  # the latter if no platform is left
        platforms = jax.config.values["jax_platforms"]
        setting = f"JAX_PLATFORMS={platforms}: " if platforms else ""
        reason = f" ({one_line(error)})" if str(error) else ""
        raise ConfigError(
            f"{setting}JAX finds no device to run on{reason}; see python -m resnet_jax doctor"
        ) from error


def _check_threads() -> None:
    """Starts as many threads as a command needs, if the limit is low.

    XLA and ArrayRecord hang or abort if they cannot start theirs.
    """
    needed = 96 + 2 * (os.cpu_count() or 1)  # a run on two cores used 96
    if _thread_limit() > 10 * needed:
        return
    done = threading.Event()
    started: list[threading.Thread] = []
    try:
        for _ in range(needed):
            thread = threading.Thread(target=done.wait)
            thread.start()
            started.append(thread)
    except RuntimeError as error:
        raise ConfigError(
            f"only {len(started)} of {needed} threads can be started: raise `ulimit -u` or the "
            "container's --pids-limit, or end other processes"
        ) from error
    finally:
        done.set()
        for thread in started:
            thread.join()


def _thread_limit() -> float:
    """The limit on processes and threads of this user or container."""
    limits = [resource.getrlimit(resource.RLIMIT_NPROC)[0]]
    with contextlib.suppress(OSError, ValueError):  # "max"
        limits.append(int(Path("/sys/fs/cgroup/pids.max").read_text()))
    return min((each for each in limits if each != resource.RLIM_INFINITY), default=float("inf"))
