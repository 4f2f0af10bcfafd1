"""Seconds from the command to the first step and where they go, peak memory, and import times.

    python benchmarks/startup.py [--config=configs/digits.py] [--config.FIELD=X ...]

One run with an empty and one with a filled compilation cache; and the same for
`python -m resnet_jax predict`, as a whole. Prints tables and one JSON line. The data set must be
prepared (the digits are, after one run).
"""

import argparse
import collections
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
IMPORTS = ("flax.linen", "resnet_jax", "resnet_jax.training.loop")
# What jax.monitoring calls the parts of a compilation; a cached program is read, not compiled.
COMPILATION = {
    "/jax/core/compile/jaxpr_trace_duration": "tracing",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lowering",
    "/jax/core/compile/backend_compile_duration": "compiling",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/digits.py")
    parser.add_argument("--rounds", type=int, default=5, help="of imports and predict")
    parser.add_argument("--model", default="resnet20", help="that predicts")
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
    """The median over new interpreters, without the interpreter's own start."""
    code = f"import time; start = time.perf_counter(); import {name}"
    code += "; print(time.perf_counter() - start)"
    command = [sys.executable, "-c", code]
    return statistics.median(
        float(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
        for _ in range(rounds)
    )


def predict_seconds(folder: Path, name: str, rounds: int) -> dict[str, float]:
    """CPU seconds of `predict` on two images, in turn with an empty and a filled cache; medians."""
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
        # The cache is in the home directory, wherever that is.
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
    """The parts of a run of one step in a new interpreter, and its peak memory."""
    command = [sys.executable, __file__, "measure", str(time.time()), *flags]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(process.stdout.splitlines()[-1])


def measure(started: float, flags: list[str]) -> None:
    """Runs in the new interpreter: trains for a step with a clock on every part."""
    import jax

    from resnet_jax.config.flags import parse_train_flags
    from resnet_jax.training import inputs, loop, run

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

    def first_record(writers, record):
        if record["split"] == "train":
            parts["first step"] = time.time() - started
            listened = sum(parts[f"step: {part}"] for part in COMPILATION.values())
            others = sum(parts.values()) - parts["first step"] - listened
            parts["step: all"] = parts["first step"] - others
        record_before(writers, record)

    def listen(event, seconds, **_):
        # Before the data is loaded it is the compilation of the initial parameters.
        if event in COMPILATION and "loading images" in parts and "first step" not in parts:
            parts[f"step: {COMPILATION[event]}"] += seconds

    record_before, run.MetricWriters.record = run.MetricWriters.record, first_record
    inputs.open_sources = timed("opening the data set", inputs.open_sources)
    run.create_state = timed("initial parameters", run.create_state)
    run.MetricWriters.__init__ = timed("metric writers", run.MetricWriters.__init__)
    run.open_dataset = timed("loading images", run.open_dataset)
    jax.monitoring.register_event_duration_secs_listener(listen)

    loop.train(*parse_train_flags(flags))
    parts["peak memory, MiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(parts))


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        measure(float(sys.argv[2]), sys.argv[3:])
    else:
        main()
