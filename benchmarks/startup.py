"""Measures the time from the command to the first step and its parts, memory, and imports.

    python benchmarks/startup.py [--config=configs/digits.py] [--config.FIELD=X ...]

Runs once with an empty and once with a filled compilation cache, also for a whole
`python -m resnet_jax predict`. Prints tables and one JSON line. The dataset must be prepared (the
digits are, after one run).
"""

import argparse
import collections
import functools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from replacing import replace_everywhere

# Functions of the trainer whose time is reported, by what they do.
TIMED = {
    "open_sources": "opening the dataset",
    "create_state": "initial parameters",
    "open_dataset": "loading images",
}
ROOT = Path(__file__).parents[1]
IMPORTS = ("flax.linen", "resnet_jax", "resnet_jax.training.loop")
# Events of jax.monitoring; with a filled cache, "compiling" is the time to read the program.
COMPILATION = {
    "/jax/core/compile/jaxpr_trace_duration": "tracing",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lowering",
    "/jax/core/compile/backend_compile_duration": "compiling",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/digits.py")
    parser.add_argument("--rounds", type=int, default=5, help="for imports and predict")
    parser.add_argument("--model", default="resnet20", help="the network of predict")
    options, fields = parser.parse_known_args()

    imports = {name: import_seconds(name, options.rounds) for name in IMPORTS}
    runs = {}
    with tempfile.TemporaryDirectory() as folder:
        for cache in ("cold", "warm"):
            flags = [f"--config={options.config}", f"--workdir={folder}/{cache}", *fields]
            flags += ["--config.train.steps=1", "--config.log.every_steps=1"]
            flags += [f"--config.log.compile_cache={folder}/cache"]
            runs[cache] = first_step(flags)

        predict = predict_seconds(Path(folder), options.model, options.rounds)

    print("seconds                   " + "".join(f"{cache:>8}" for cache in runs))
    for part in runs["cold"]:
        print(f"{part:26}" + "".join(f"{run.get(part, 0):8.2f}" for run in runs.values()))
    print(f"\npredict, {options.model}: CPU seconds, median")
    for cache, seconds in predict.items():
        print(f"{cache:26}{seconds:8.2f}")
    print("\nimport                    seconds, median")
    for name, seconds in imports.items():
        print(f"{name:26}{seconds:8.2f}")
    print(
        json.dumps(
            {
                "benchmark": "startup",
                "config": options.config,
                **runs,
                **imports,
                "predict": predict,
            }
        )
    )


def import_seconds(name: str, rounds: int) -> float:
    """The median over new interpreters, without their start."""
    code = f"import time; start = time.perf_counter(); import {name}"
    code += "; print(time.perf_counter() - start)"
    command = [sys.executable, "-c", code]
    return statistics.median(
        float(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
        for _ in range(rounds)
    )


def predict_seconds(folder: Path, name: str, rounds: int) -> dict[str, float]:
    """Median CPU seconds of `predict` on two images, with an empty and with a filled cache."""
    import jax
    import numpy as np
    from PIL import Image

    import resnet_jax as rj

    side = rj.model_info(name).image_size
    model = rj.create_model(name)
    images = np.random.default_rng(0).integers(0, 256, (2, side, side, 3), np.uint8)
    variables = jax.jit(lambda: model.init(jax.random.key(0), images[:1] / 255.0, train=False))()
    rj.save_weights(folder / "weights.safetensors", model, variables)
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{number}.png")
    command = [sys.executable, "-m", "resnet_jax", "predict", folder / "weights.safetensors"]
    command += [folder / "0.png", folder / "1.png", f"--model={name}"]
    found: dict[str, list[float]] = {"cold": [], "warm": []}
    for number in range(rounds):
        # The cache is in the home directory.
        home = {"HOME": str(folder / f"home{number}"), "PYTHONPATH": str(ROOT)}
        for seconds in found.values():
            start = children_seconds()
            subprocess.run(
                command, env={**os.environ, **home}, stdout=subprocess.DEVNULL, check=True
            )
            seconds.append(children_seconds() - start)
    return {cache: statistics.median(seconds) for cache, seconds in found.items()}


def children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def first_step(flags: list[str]) -> dict[str, float]:
    """The parts of the time of a run of one step in a new interpreter, and its peak memory."""
    command = [sys.executable, __file__, "measure", str(time.time()), *flags]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(process.stdout.splitlines()[-1])


def measure(started: float, flags: list[str]) -> None:
    """Trains for one step in this new interpreter and prints the time of each part."""
    import jax

    from resnet_jax.config.flags import parse_train_flags
    from resnet_jax.training.loop import train
    from resnet_jax.workdirs.metric_writers import MetricWriters

    parts: dict[str, float] = collections.defaultdict(float)
    parts["interpreter and imports"] = time.time() - started

    def timed(name, function):
        def call(*arguments, **keywords):
            start = time.monotonic()
            try:
                return function(*arguments, **keywords)
            finally:
                parts[name] += time.monotonic() - start

        return call

    def record_first(writers, record):
        if record["split"] == "train":
            parts["first step"] = time.time() - started
            compilation = sum(parts[f"step: {part}"] for part in COMPILATION.values())
            others = sum(parts.values()) - parts["first step"] - compilation
            parts["step: all"] = parts["first step"] - others
        record_original(writers, record)

    def listen(event, seconds, **_):
        # Before the data is loaded, only the program of the initial parameters is compiled.
        if event in COMPILATION and "loading images" in parts and "first step" not in parts:
            parts[f"step: {COMPILATION[event]}"] += seconds

    record_original, MetricWriters.record = MetricWriters.record, record_first
    MetricWriters.__init__ = timed("metric writers", MetricWriters.__init__)
    for name, part in TIMED.items():
        replace_everywhere(name, functools.partial(timed, part))
    jax.monitoring.register_event_duration_secs_listener(listen)

    train(*parse_train_flags(flags))
    parts["peak memory, MiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(parts))


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        measure(float(sys.argv[2]), sys.argv[3:])
    else:
        main()
