"""Limits on the time of what a test starts, by the speed of this machine at this moment.

A limit is there for what hangs. In a fixed number of seconds, a busy machine does not even start
Python and import JAX.
"""

import functools
import math
import subprocess
import sys
import time

_USUAL_SECONDS = 2.0  # of the measurement, on an idle machine with two cores
_MEASURED_LIMIT = 600


@functools.cache
def slowness() -> float:
    """How many times longer than usual a start of JAX takes here, measured once; at least 1."""
    start = time.monotonic()
    code = "import jax, jax.numpy as jnp; jnp.ones(1).block_until_ready()"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=_MEASURED_LIMIT)
    return max(1.0, (time.monotonic() - start) / _USUAL_SECONDS)


def seconds(usual: int) -> int:
    """A limit that is `usual` seconds on an idle machine; whole, as notebooks want it."""
    return math.ceil(usual * slowness())
