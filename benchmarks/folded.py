"""Compares images/s of a network with and without its batch norms folded into convolutions.

    python benchmarks/folded.py [--model=resnet50] [--batch=8] [--side=224] [--rounds=9]
        [--dtype=float32]

The programs are those of predictions: weights are arguments, which lie as the program reads them.
The networks alternate. Prints a table and one JSON line.
"""

import argparse
import json
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

import resnet_jax as rj
from resnet_jax.distributed.data_parallel import compile_outputs, shard_batch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()

    model = rj.create_model(options.model, dtype=jnp.dtype(options.dtype))
    shape = (options.batch, options.side, options.side, 3)
    images = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    variables = jax.jit(lambda key: model.init(key, images[:1], train=False))(jax.random.key(0))
    networks = {"plain": (model, variables), "folded": rj.fold_batch_norm(model, variables)}
    runs = {name: compiled(*network, images) for name, network in networks.items()}

    seconds = {name: [] for name in runs}
    for _ in range(options.rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run().block_until_ready()
            seconds[name].append(time.perf_counter() - start)
    # Pairs that are adjacent in time, so that other load affects both.
    ratios = [plain / folded for plain, folded in zip(seconds["plain"], seconds["folded"])]
    for name, times in seconds.items():
        print(f"{name:8} {options.batch / statistics.median(times):8.2f} images/s")
    ratio = statistics.median(ratios)
    print(f"folded / plain {ratio:.3f} (median of {options.rounds} pairs)")
    rates = {name: options.batch / statistics.median(times) for name, times in seconds.items()}
    print(json.dumps({"benchmark": "folded", **vars(options), **rates, "ratio": ratio}))


def compiled(model, variables, images):
    """A function without arguments that runs a compiled network; it has run once."""
    program = compile_outputs(
        lambda variables, images: model.apply(variables, images, train=False),
        jax.device_get(variables),
        jax.ShapeDtypeStruct(images.shape, images.dtype),
    )
    images = shard_batch(np.asarray(images))
    program(images).block_until_ready()
    return lambda: program(images)


if __name__ == "__main__":
    main()
