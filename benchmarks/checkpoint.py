"""Measures saving a checkpoint: how long it blocks the loop, and how long it takes in total.

    python benchmarks/checkpoint.py [--cases=resnet20,resnet20-ema,resnet50] [--rounds=5]

A case is a network with SGD and momentum; "-ema" adds the moving average of its parameters. The
compiled step runs as in the training loop, on one batch that is already on the device: a few steps
alone, then a few while a state is written. `save` is the call that blocks the loop, `sealed` the
time until the state has its checksums and its final name, `gap` the longest time between the ends
of two steps. Then the checksums are verified and the state is read back, both from the page cache.
Prints a table and one JSON line per case.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from resnet_jax import config as c
from resnet_jax.config.model import make_model
from resnet_jax.distributed import data_parallel
from resnet_jax.models.registry import create_model, model_info
from resnet_jax.training.optimizer import RunLength, make_optimizer
from resnet_jax.training.state import create_state
from resnet_jax.training.step import make_train_step
from resnet_jax.workdirs import checksums
from resnet_jax.workdirs.checkpoint import Checkpoints

COLUMNS = {
    "megabytes": "MB",
    "step": "step, ms",
    "save": "save, ms",
    "gap_without": "gap, ms",
    "gap_with": "gap with a save, ms",
    "sealed": "sealed after, ms",
    "verify": "verify, ms",
    "restore": "restore, ms",
}


class Case:
    """A network, its state on the devices, and its compiled step."""

    def __init__(self, name: str, batch_size: int, side: int) -> None:
        network, _, ema = name.partition("-")
        self.name, side = name, side or model_info(network).image_size
        config = c.Config(
            model=c.Model(name=network),
            data=c.Data(image_size=side),
            train=c.Train(batch_size=batch_size, ema_decay=0.999 if ema else 0.0),
        )
        model = make_model(config, create_model(network).num_classes)
        length = RunLength.of(config, 50_000)
        optimizer = make_optimizer(config, length)
        self.state = data_parallel.replicate(create_state(model, optimizer, config, channels=3))
        self._step = data_parallel.parallel_step(make_train_step(model, optimizer, config, length))
        images = np.random.default_rng(0).integers(0, 256, (batch_size, side, side, 3), np.uint8)
        labels = np.arange(batch_size, dtype=np.int32) % model.num_classes
        self._batch = data_parallel.shard_batch({"images": images, "labels": labels})
        self.step()  # compiles

    def step(self) -> None:
        self.state, metrics = self._step(self.state, self._batch)
        jax.block_until_ready(metrics)


def measure(case: Case, folder: Path, steps: int) -> dict[str, float]:
    """One round, in ms (and MB): steps alone, steps during a save, and the saved state."""
    alone = step_ends(case, steps)
    checkpoints = Checkpoints(folder)
    start = time.perf_counter()
    checkpoints.save(case.state, {})
    saved = time.perf_counter()
    [writing] = checkpoints._pending
    sealed: list[float] = []
    writing.add_done_callback(lambda _: sealed.append(time.perf_counter()))
    during_save = [start, *step_ends(case, steps, writing.done)]
    checkpoints.close()
    newest = checkpoints.latest
    assert newest is not None
    path = folder / "checkpoints" / str(newest)
    verify = seconds(lambda: checksums.damage(path))
    restore = seconds(lambda: Checkpoints(folder)._read(newest))
    return {
        "megabytes": sum(x.stat().st_size for x in path.rglob("*") if x.is_file()) / 1e6,
        "step": 1e3 * statistics.median(np.diff(alone)),
        "save": 1e3 * (saved - start),
        "gap_without": 1e3 * max(np.diff(alone)),
        "gap_with": 1e3 * max(np.diff(during_save)),
        "sealed": 1e3 * (sealed[0] - start),
        "verify": 1e3 * verify,
        "restore": 1e3 * restore,
    }


def step_ends(case: Case, steps: int, done: Any = lambda: True) -> list[float]:
    """The times when steps end: at least `steps`, and as many as it takes until `done()`."""
    times = [time.perf_counter()]
    while len(times) <= steps or not done():
        case.step()
        times.append(time.perf_counter())
    return times


def seconds(work: Any) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", default="resnet20,resnet20-ema,resnet50")
    parser.add_argument("--batch_sizes", default="128,128,8", help="one for each case")
    parser.add_argument(
        "--side", type=int, default=0, help="pixels; 0: the usual size of the network"
    )
    parser.add_argument("--steps", type=int, default=5, help="steps per measurement, at least")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", default=None, help="a folder on the disk to measure")
    options = parser.parse_args()
    print("  ".join([f"{'':14}", *COLUMNS.values()]))
    lines = []
    for name, size in zip(options.cases.split(","), map(int, options.batch_sizes.split(","))):
        case = Case(name, size, options.side)
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            rounds = [measure(case, Path(folder), options.steps) for _ in range(options.rounds)]
        found = {key: statistics.median(r[key] for r in rounds) for key in COLUMNS}
        cells = [f"{found[key]:{len(title)}.1f}" for key, title in COLUMNS.items()]
        print("  ".join([f"{name:14}", *cells]), flush=True)
        facts = {"benchmark": "checkpoint", "case": name, "batch_size": size}
        device = {"device": jax.devices()[0].device_kind, "load": os.getloadavg()[0]}
        most = {"save_most": max(r["save"] for r in rounds)}
        rounded = {key: round(value, 2) for key, value in {**found, **most}.items()}
        lines.append(json.dumps({**facts, **device, "jax": jax.__version__, **rounded}))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
