"""Seconds from the command to the first step, with an empty and with a filled compilation cache.

    python benchmarks/startup.py [--config=configs/digits.py]

Prints a table and one JSON line. The data set must be prepared (the digits are, after one run).
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/digits.py")
    parser.add_argument("--data_dir", default="")
    options = parser.parse_args()

    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        for cache in ("cold", "warm"):
            seconds[cache] = first_step(options, Path(folder), cache)
    print("compilation cache  seconds to the first step")
    for cache, value in seconds.items():
        print(f"{cache:17}  {value:.1f}")
    print(json.dumps({"benchmark": "startup", "config": options.config, **seconds}))


def first_step(options, folder, run):
    """Starts a run of one step and waits until it is reported."""
    command = [
        sys.executable,
        str(ROOT / "train.py"),
        f"--config={options.config}",
        f"--workdir={folder / run}",
        f"--config.data.data_dir={options.data_dir}",
        "--config.train.steps=1",
        "--config.log.every_steps=1",
        f"--config.log.compile_cache={folder / 'cache'}",
    ]
    start = time.monotonic()
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    for line in process.stderr:
        if line.startswith("step 1/1"):
            elapsed = time.monotonic() - start
            process.communicate()
            return elapsed
    raise SystemExit(f"{' '.join(command)} took no step")


if __name__ == "__main__":
    main()
