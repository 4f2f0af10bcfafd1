"""Devices that behave towards this package as those of a GPU or a TPU do; the CPU computes.

What only an accelerator reaches is code that no test on a CPU runs: the branch of another platform,
a peak that is known, a compiler that reports no cost. In here that code runs. Two things are those
of a CPU all the same: `device.platform`, which JAX itself needs, and that several processes await
each step.

As a program it is `train.py` on such devices, with more of what happens on real ones:
    python -m tests.fake_accelerator gpu [OPTIONS] FLAGS_OF_TRAIN
"""

import argparse
import contextlib
import functools
import sys
import time
from unittest import mock

import jax
import numpy as np
from jax import lax

# `device_kind` as the runtimes give it.
KINDS = {"gpu": "NVIDIA H100 80GB HBM3", "tpu": "TPU v5 lite"}
MEMORY = {
    "bytes_in_use": 1_000_000,
    "peak_bytes_in_use": 2_000_000,
    "bytes_limit": 16 * 2**30,
    "largest_alloc_size": 500_000,
    "num_allocs": 10,
}


def _platform_dependent(platform, *operands, default=None, **branches):
    """The branch that lowering for the platform would choose."""
    chosen = branches.get("cuda" if platform == "gpu" else platform) or branches.get(platform)
    return (chosen or default)(*operands)


def _device_get(tree, _device_get=jax.device_get):
    """A copy that cannot be written to; a CPU gives views of what may be donated."""

    def copy(x):
        if not isinstance(x, np.ndarray):
            return x
        x = x.copy()
        x.flags.writeable = False
        return x

    return jax.tree.map(copy, _device_get(tree))


@contextlib.contextmanager
def fake_accelerator(platform):
    """Until the end of the block the devices of this process look like accelerators.

    Args:
      platform: "gpu" or "tpu".
    """
    choose = functools.partial(_platform_dependent, platform)
    jax.clear_caches()  # of programs that were traced with the other branches
    with (
        mock.patch.object(jax, "default_backend", return_value=platform),
        mock.patch.object(jax, "device_get", _device_get),
        mock.patch.object(lax, "platform_dependent", choose),
        mock.patch.object(jax.stages.Lowered, "cost_analysis", return_value=None),
        mock.patch.object(jax.Device, "device_kind", KINDS[platform]),
        mock.patch.object(jax.Device, "memory_stats", return_value=MEMORY),
    ):
        yield
    jax.clear_caches()


def swap_indices():
    """Joins the processes such that the runtime numbers them the other way round, as a pod may."""
    from jax._src import distributed

    join = jax.distributed.initialize

    def initialize(address, count, index, **options):
        join(address, count, index, **options)
        distributed.global_state.process_id = count - 1 - index
        jax.devices()  # takes its number from there
        distributed.global_state.process_id = index

    jax.distributed.initialize = initialize


def shorten_exit_barrier(seconds):
    """JAX's own, which aborts processes that wait longer for another one to end."""
    join = jax.distributed.initialize

    def initialize(*arguments, **options):
        join(*arguments, **{**options, "shutdown_timeout_seconds": seconds})

    jax.distributed.initialize = initialize


def slow_down_report(seconds):
    """The page at the end takes so much longer."""
    from resnet_jax.report import page

    write = page.write_report

    def write_report(*arguments, **options):
        time.sleep(seconds)
        return write(*arguments, **options)

    page.write_report = write_report


def fill_memory(index, message="RESOURCE_EXHAUSTED: Out of memory allocating 1073741824 bytes."):
    """The devices of one process have no room for the second step, which it learns of later."""
    from resnet_jax.training import metrics

    wait, calls = metrics._completion_time, []

    def completion_time(metrics):
        calls.append(1)
        if jax.process_index() == index and len(calls) == 2:
            raise jax.errors.JaxRuntimeError(f"{message}\n\nBuffer 1:\n\tSize: 1.00GiB")
        return wait(metrics)

    metrics._completion_time = completion_time


def main():
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("platform", choices=KINDS)
    parser.add_argument("--swap", action="store_true")
    parser.add_argument("--exit_barrier", type=int)
    parser.add_argument("--slow_report", type=float)
    parser.add_argument("--full", type=int, metavar="PROCESS")
    options, flags = parser.parse_known_args()
    if options.swap:
        swap_indices()
    if options.exit_barrier:
        shorten_exit_barrier(options.exit_barrier)
    if options.slow_report:
        slow_down_report(options.slow_report)
    if options.full is not None:
        fill_memory(options.full)
    from resnet_jax.cli import parser

    with fake_accelerator(options.platform):
        return parser.main(["train", *flags])


if __name__ == "__main__":
    sys.exit(main())
