"""Measures augmentation on this machine's device, or estimates it for a TPU without one.

    python benchmarks/augment.py [--batch=128] [--side=224] [--cases=pad,rotate,rand,trivial]
    pip install libtpu
    python benchmarks/augment.py --topology=v5e:2x2

The first form prints milliseconds per batch, the median of several random draws. The second
compiles for one chip and prints the compiler's estimate of cycles. It counts the body of a loop
once, so bodies are listed with their number of runs, which for some depends on the draws (one for
each group of images that need an operation). Gathers and scatters have no estimate; instead the
number of elements that gathers read is printed.
"""

import argparse
import functools
import math
import os
import re
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

from resnet_jax.config.schema import Augment
from resnet_jax.data.augment import augment
from resnet_jax.planning.topology import parse_topology
from resnet_jax.planning.tpu import tpu_devices

CASES = {
    "none": {},
    "flip": {"flip": True},
    "pad": {"pad": 4},
    "rotate": {"rotate": 15.0},
    "rand": {"rand_layers": 1},
    "trivial": {"trivial": True},
    "erase": {"erase": 0.5},
    "cutout": {"cutout": 16},
    "mix": {"mixup": 0.2, "cutmix": 1.0},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--side", type=int, default=224, help="pixels")
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--topology", help="compile for this TPU instead, such as v5e:2x2")
    options = parser.parse_args()
    shape = (options.batch, options.side, options.side, 3)
    for name in options.cases.split(","):
        run = functools.partial(augment, config=Augment(**CASES[name]), num_classes=1000)
        if options.topology:
            print(name, *estimate(run, shape, options.topology), sep="\n  ", flush=True)
        else:
            print(f"{name}: {1e3 * seconds(run, shape):.1f} ms", flush=True)


def seconds(run, shape: tuple[int, ...], draws: int = 16) -> float:
    images = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    labels, run, times = np.zeros(shape[0], np.int32), jax.jit(run), []
    for seed in range(draws + 1):
        start = time.perf_counter()
        jax.block_until_ready(run(images, labels, jax.random.key(seed)))
        times.append(time.perf_counter() - start)
    return float(np.median(times[1:]))  # the first one compiles


def estimate(run, shape: tuple[int, ...], topology: str) -> list[str]:
    sharding = jax.sharding.SingleDeviceSharding(tpu_devices(parse_topology(topology))[0])
    on_tpu = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
    key = jax.eval_shape(jax.random.key, 0)
    arguments = on_tpu(shape, jnp.uint8), on_tpu(shape[:1], jnp.int32), on_tpu((), key.dtype)
    return analyze(jax.jit(run).lower(*arguments).compile().as_text())


def analyze(program: str) -> list[str]:
    """Lines about a compiled program: cycles outside and inside loops, gathers and scatters."""
    parts: dict[str, list[str]] = {}
    for line in program.splitlines():
        if head := re.match(r"(ENTRY )?%([\w.\-]+) .*\{$", line):
            parts["ENTRY" if head[1] else head[2]] = lines = []
        elif parts:
            lines.append(line)
    cycles = {
        name: sum(int(n) for n in re.findall(r'"estimated_cycles":"(\d+)"', "\n".join(lines)))
        for name, lines in parts.items()
    }
    report = [f"{cycles['ENTRY']:,} cycles outside loops"]
    for condition, body in re.findall(
        r" while\(.*condition=%([\w.\-]+), body=%([\w.\-]+)", program
    ):
        limits = re.findall(r"constant\((\d+)\)", "\n".join(parts[condition]))
        runs = f"{limits[0]} times" if limits else "depending on the draws"
        report.append(f"{cycles[body]:,} cycles, {runs}")
    gather = r"= \w+\[([\d,]+)\]\S* gather\(.*slice_sizes=\{([\d,]+)\}"
    gathered = sum(size(result) // size(part) for result, part in re.findall(gather, program))
    indices = r" scatter\(.*?\), update_window_dims=\{([\d,]*)\}"
    scatters = re.findall(indices, program)
    return [
        *report,
        f"{gathered:,} elements gathered, {scatters.count('')} scatters of single numbers",
    ]


def size(dimensions: str) -> int:
    return math.prod(map(int, dimensions.split(",")))


if __name__ == "__main__":
    main()
