"""What the tests of whole runs do with them."""

import json
import os
import signal

from resnet_jax.training.metrics import MetricAccumulator
from resnet_jax.workdirs.checkpoint import Checkpoints


def records(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def without_times(workdir):
    """The records without times and rates, which no two runs share."""
    times = ("time", "images_per_second", "mfu")
    return [{k: v for k, v in x.items() if k not in times} for x in records(workdir)]


def state_of(workdir):
    """The newest state as it lies on disk."""
    return Checkpoints(workdir, read_only=True).read_whole(best=False)


def stop_after(monkeypatch, steps):
    """Sends this process SIGTERM when a number of steps is done."""
    add = MetricAccumulator.add

    def adding(self, done, metrics):
        add(self, done, metrics)
        if done == steps:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(MetricAccumulator, "add", adding)
