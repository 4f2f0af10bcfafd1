"""What a saved state costs: how long it holds up the loop, and how long it takes beside it.

    python benchmarks/checkpoint.py [--cases=resnet20,resnet20-ema,resnet50] [--rounds=5]

A case is a network with SGD and momentum; "-ema" keeps the average of its weights as well. Its
compiled step runs as in the training loop, on one batch that lies ready: a few steps alone, and a
few beside a state that is being written. `save` is the call that the loop waits in, `sealed` the
time until the state has its checksums and its name, `gap` the longest time between two steps. Then
the state's checksums are verified and it is read back; from memory, for it was only just written.
Prints a table and one JSON line a case.
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

from resnet_jax.config import schema as c
from resnet_jax.config.model import make_model
from resnet_jax.distributed import data_parallel
from resnet_jax.models.registry import create_model, model_info
from resnet_jax.training.optimizer import RunLength, make_optimizer
from resnet_jax.training.state import create_state, state_shapes
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
    """A network, its state on the devices, and its step."""

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
        self.shapes = state_shapes(model, optimizer, config, channels=3)
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
    """One round, in ms: steps alone, steps from a save on, and the state that came of it."""
    alone = ends(case, steps)
    checkpoints = Checkpoints(folder)
    start = time.perf_counter()
    checkpoints.save(case.state, {})
    saved = time.perf_counter()
    [writing] = checkpoints._pending
    done: list[float] = []
    writing.add_done_callback(lambda _: done.append(time.perf_counter()))
    beside = [start, *ends(case, steps, writing.done)]
    checkpoints.close()
    newest = checkpoints.latest
    assert newest is not None
    path = folder / "checkpoints" / str(newest)
    verify = seconds(lambda: checksums.damage(path))
    restore = seconds(lambda: Checkpoints(folder)._read(newest, case.shapes))
    return {
        "megabytes": sum(x.stat().st_size for x in path.rglob("*") if x.is_file()) / 1e6,
        "step": 1e3 * statistics.median(np.diff(alone)),
        "save": 1e3 * (saved - start),
        "gap_without": 1e3 * max(np.diff(alone)),
        "gap_with": 1e3 * max(np.diff(beside)),
        "sealed": 1e3 * (done[0] - start),
        "verify": 1e3 * verify,
        "restore": 1e3 * restore,
    }


def ends(case: Case, least: int, enough: Any = lambda: True) -> list[float]:
    """When each of the steps ended: so many, and on until it is enough."""
    times = [time.perf_counter()]
    while len(times) <= least or not enough():
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
    parser.add_argument("--batch_sizes", default="128,128,8", help="of each case")
    parser.add_argument("--side", type=int, default=0, help="of the images; 0: the network's own")
    parser.add_argument("--steps", type=int, default=5, help="steps of a measurement, at least")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", default=None, help="on the disk to measure")
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
