"""Estimates what `precision` costs on a TPU, by its compiler; no TPU is needed.

    pip install libtpu
    python benchmarks/precision.py [--topology=v5e:2x2]

Compiles one 3x3 convolution (16 images of 28x28 pixels, 256 to 256 channels) and one matrix product
(2048 x 2048 x 2048) and prints the compiler's estimate of cycles, also as a multiple of that for
bfloat16.
"""

import argparse
import os
import re

# Stops libtpu from querying the metadata server for the TPU of this machine.
os.environ.update(
    {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }
)

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from resnet_jax.ops.convolution import ConvOptions, convolve

SHAPES = {
    "convolution": ((16, 28, 28, 256), (3, 3, 256, 256)),
    "product": ((2048, 2048), (2048, 2048)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--topology", default="v5e:2x2")
    options = parser.parse_args()
    topology = topologies.get_topology_desc(platform="tpu", topology_name=options.topology)
    sharding = jax.sharding.SingleDeviceSharding(topology.devices[0])
    for name, shapes in SHAPES.items():
        baseline = cycles(name, shapes, jnp.bfloat16, None, sharding)
        for dtype in (jnp.bfloat16, jnp.float32):
            for precision in (None, "high", "highest"):
                found = cycles(name, shapes, dtype, precision, sharding)
                ratio = found / baseline
                print(f"{name:12} {dtype.__name__:9} {precision!s:8} {found:9,} {ratio:6.2f}")


def cycles(name: str, shapes: tuple, dtype: type, precision: str | None, sharding: object) -> int:
    """The compiler's estimate for the product, the largest part of the program."""

    def compute(x: jax.Array, y: jax.Array) -> jax.Array:
        if name == "product":
            return jnp.matmul(x, y, precision=precision)
        return convolve(x, y, ConvOptions(precision=precision))

    arrays = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape in shapes]
    text = jax.jit(compute).lower(*arrays).compile().as_text()
    return max(map(int, re.findall(r'estimated_cycles":"(\d+)"', text)))


if __name__ == "__main__":
    main()
