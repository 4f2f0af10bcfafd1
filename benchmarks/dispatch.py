"""Measures the time of the host per training step, and counts its calls of the devices.

    python benchmarks/dispatch.py [--batch=512] [--steps=1000] [--per_call=1,25]

Runs the real training loop on the digits, as 32x32 images with three channels, with a step that
computes nothing, which leaves batches, transfers, calls and records. Prints a table and one JSON
line per row.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import lax
from replacing import replace_everywhere

from resnet_jax.config.schema import Config, Data, Evaluate, Log, Train
from resnet_jax.distributed import data_parallel
from resnet_jax.training.loop import train


def idle_step(*_, **__):
    """Replaces `make_train_step`: the step reads the labels and changes nothing."""

    def step(state, batch):
        mean = lax.pmean(batch["labels"].astype(jnp.float32).mean(), data_parallel.AXIS)
        names = ("loss", "top1", "top5", "learning_rate")
        metrics = {**dict.fromkeys(names, mean), "skipped": jnp.float32(0)}
        return state.replace(step=state.step + 1), metrics

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--per_call", default="1,25")
    options = parser.parse_args()
    replace_everywhere("make_train_step", lambda _: idle_step)
    print(f"{'steps/call':>13}{'calls':>8}{'host us/step':>16}")
    for per_call in map(int, options.per_call.split(",")):
        row = measure(options.batch, options.steps, per_call)
        print(f"{per_call:13d}{row['calls']:8d}{row['host_us_per_step']:16.0f}", flush=True)
        record = {"benchmark": "dispatch", "batch": options.batch, "steps_per_call": per_call}
        print(json.dumps({**record, "device": jax.devices()[0].device_kind, **row}), flush=True)


def measure(batch: int, steps: int, per_call: int) -> dict:
    calls = 0
    make = data_parallel.parallel_step

    def counting(*arguments, **options):
        step = make(*arguments, **options)

        def call(*arguments):
            nonlocal calls
            calls += 1
            return step(*arguments)

        return call

    config = Config(
        data=Data(name="digits", channels=3, eval_split=f"test[:{jax.device_count()}]"),
        train=Train(steps=steps, batch_size=batch, steps_per_call=per_call),
        evaluate=Evaluate(every_epochs=1e9),
        log=Log(every_steps=100, tensorboard=False),
    )
    data_parallel.parallel_step = counting
    try:
        with tempfile.TemporaryDirectory() as workdir:
            train(config, workdir)
            lines = Path(workdir, "metrics.jsonl").read_text().splitlines()
    finally:
        data_parallel.parallel_step = make
    records = [record for record in map(json.loads, lines) if record["split"] == "train"]
    # The first record includes compilation.
    rates = [record["images_per_second"] / batch for record in records[1:]]
    return {"calls": calls, "host_us_per_step": 1e6 / statistics.median(rates)}


if __name__ == "__main__":
    main()
