"""Compares images/s of `predict` with those of reading alone and of the bare network.

    python benchmarks/predict.py PHOTOS [--network=resnet50] [--images=256] [--rounds=5]

PHOTOS is a folder of images of any size. "predict" is the command without its start (reading,
network, CSV lines), "reading" the same threads without a network, and "network" the compiled
function on a batch that is already on the device. On a CPU reading and the network share the cores,
so the result is compared with the slower of the two and with both in sequence. Prints a table and a
JSON line.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from resnet_jax.data.decode import crop_pixels
from resnet_jax.data.preprocessing import Preprocessing
from resnet_jax.distributed.data_parallel import shard_batch
from resnet_jax.inference.classifier import Classifier
from resnet_jax.inference.images import ImageFile, in_threads, list_images, read_pixels
from resnet_jax.inference.writers import write_predictions
from resnet_jax.models.registry import create_model, model_info
from resnet_jax.weights.network import Network


def network(name: str) -> Network:
    """A network with random weights."""
    model, side = create_model(name), model_info(name).image_size
    init = jax.jit(functools.partial(model.init, train=False))
    variables = init(jax.random.key(0), jnp.zeros((1, side, side, 3)))
    names = tuple(map(str, range(model.num_classes)))
    shape = Preprocessing(side, 0.875 if side > 32 else 1.0)
    return Network(name, name, model, jax.device_get(variables), shape, 3, names)


def predict(classifier: Classifier, files: list[ImageFile]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_predictions(lambda: classifier, files, output=f"{folder}/predictions.csv")


def read(classifier: Classifier, files: list[ImageFile]) -> None:
    opened = classifier.network

    def crop(file: ImageFile) -> np.ndarray:
        return crop_pixels(read_pixels(file, opened.channels), opened.crop)

    for _ in in_threads(crop, files, ahead=2 * classifier.outputs.batch_size):
        pass


def run_network(classifier: Classifier, files: list[ImageFile]) -> None:
    predictor, side = classifier.outputs, classifier.network.preprocessing.image_size
    batch = shard_batch(np.zeros((predictor.batch_size, side, side, 3), np.uint8))
    outputs = [predictor._compiled(batch) for _ in range(0, len(files), predictor.batch_size)]
    jax.block_until_ready(outputs)


def seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    """Alternates between tasks, so that other load affects all of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("photos", help="folder of images")
    parser.add_argument("--network", default="resnet50")
    parser.add_argument("--images", type=int, default=256, help="a multiple of the batch size")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch_size", type=int, default=0)
    options = parser.parse_args()
    classifier = Classifier(network(options.network), batch_size=options.batch_size)
    files = list(itertools.islice(itertools.cycle(list_images([options.photos])), options.images))
    tasks = {"predict": predict, "reading": read, "network": run_network}
    times: dict[str, list[float]] = {name: [] for name in tasks}
    for number in range(options.rounds + 1):
        for name, task in tasks.items():
            elapsed = seconds(functools.partial(task, classifier, files))
            if number:  # the first round compiles
                times[name].append(elapsed)
    medians = {name: statistics.median(values) for name, values in times.items()}
    result = {name: round(len(files) / value, 1) for name, value in medians.items()}
    for name, value in result.items():
        print(f"{name:10}{value:10} images/s")
    result["to the slower"] = round(
        max(medians["reading"], medians["network"]) / medians["predict"], 3
    )
    result["to both in sequence"] = round(
        (medians["reading"] + medians["network"]) / medians["predict"], 3
    )
    print(f"predict / slower of the two: {result['to the slower']}")
    print(f"predict / both in sequence: {result['to both in sequence']}")
    facts = {"model": options.network, "batch_size": classifier.outputs.batch_size}
    print(json.dumps({"benchmark": "predict", **facts, "cores": os.cpu_count(), **result}))


if __name__ == "__main__":
    main()
