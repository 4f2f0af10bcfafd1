"""What the training loop costs: its steps/s over those of the bare compiled step.

    python benchmarks/loop.py [--config=configs/fashion_mnist.py] [--steps=60] [--rounds=3]

Both run the same step of the same recipe in turn, the bare one on a batch that lies ready. Prints
a table and one JSON line.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from resnet_jax.config.flags import parse_train_flags
from resnet_jax.config.model import make_model
from resnet_jax.distributed import data_parallel
from resnet_jax.training.inputs import channels_of, open_sources
from resnet_jax.training.loop import train
from resnet_jax.training.optimizer import RunLength, make_optimizer
from resnet_jax.training.state import create_state
from resnet_jax.training.step import make_train_step

WINDOW = 10  # steps of one measurement


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/fashion_mnist.py")
    parser.add_argument("--data_dir", default="")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()

    config, _ = parse_train_flags([f"--config={options.config}"])
    config.data.data_dir = options.data_dir
    config.log.every_steps = WINDOW
    config.checkpoint.allow_change = True
    config.evaluate.every_epochs = 1e9
    # The end is evaluated: one small batch of images, so that it takes no time here.
    config.data.eval_split = f"test[:{config.train.batch_size}]"

    bare, whole = [], []
    run_bare = bare_step(config)
    with tempfile.TemporaryDirectory() as workdir:
        for number in range(options.rounds):
            bare += run_bare(options.steps)
            config.train.steps = (number + 1) * (options.steps + WINDOW)
            train(config, workdir)
            lines = Path(workdir, "metrics.jsonl").read_text().splitlines()
            records = [r for r in map(json.loads, lines) if r["split"] == "train"]
            new = records[len(records) - options.steps // WINDOW :]
            whole += [r["images_per_second"] / config.train.batch_size for r in new]

    ratio = statistics.median(whole) / statistics.median(bare)
    print(f"{'':20}  steps/s (median of {len(bare)} windows of {WINDOW} steps)")
    print(f"{'bare step':20}  {statistics.median(bare):.3f}")
    print(f"{'training loop':20}  {statistics.median(whole):.3f}")
    print(f"{'ratio':20}  {ratio:.3f}")
    result = {
        "benchmark": "loop",
        "config": options.config,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "bare_steps_per_second": statistics.median(bare),
        "loop_steps_per_second": statistics.median(whole),
        "ratio": ratio,
    }
    print(json.dumps(result))


def bare_step(config):
    """A function that takes a number of steps on one batch and returns steps/s of each window."""
    source = open_sources(config)["train"]
    model = make_model(config, source.num_classes)
    length = RunLength.of(config, len(source))
    optimizer = make_optimizer(config, length)
    channels, side, size = (
        channels_of(config, source),
        config.data.image_size,
        config.train.batch_size,
    )
    state = create_state(model, optimizer, config, channels)
    step = data_parallel.parallel_step(make_train_step(model, optimizer, config, length))
    images = np.random.default_rng(0).integers(0, 256, (size, side, side, channels), np.uint8)
    batch = data_parallel.shard({"images": images, "labels": np.arange(size, dtype=np.int32) % 10})
    state, metrics = step(state, batch)

    def run(steps):
        nonlocal state, metrics
        rates = []
        for _ in range(steps // WINDOW):
            jax.block_until_ready(metrics)
            start = time.monotonic()
            for _ in range(WINDOW):
                state, metrics = step(state, batch)
            jax.block_until_ready(metrics)
            rates.append(WINDOW / (time.monotonic() - start))
        return rates

    return run


if __name__ == "__main__":
    main()
