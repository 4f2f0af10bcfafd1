"""Images a second that the host can prepare, beside a tf.data pipeline on the same files.

Run `python benchmarks/input.py PHOTOS` with a folder of JPEG photos, of any size: they are
encoded anew at 500 x 375 pixels, which is typical of ImageNet. Prints a table and a JSON line.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import grain
import numpy as np
from decode import encode_photos

from resnet_jax.data.decode import train_crop
from resnet_jax.training.config import Data

SIZE = 224
BATCH = 64
# "antialiased" is tf.data with the antialiasing that this package's crops have.
COLUMNS = ("resnet_jax", "tf.data", "antialiased", "ratio", "ratio antialiased")


def grain_batches(files: list[bytes], interpolation: str, threads: int) -> Iterator[np.ndarray]:
    """This package's pipeline; flips come later, on the device."""
    config = Data(image_size=SIZE, crop="random_resized", interpolation=interpolation)

    def crop(data: bytes, rng: np.random.Generator) -> np.ndarray:
        return train_crop(data, config, 3, rng)

    # Grain finds a shuffled position by trial, 0.5 ms each in so few files, hence a long list.
    files = files * (65_536 // len(files))
    dataset = grain.MapDataset.source(files).seed(0).shuffle().repeat().random_map(crop)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    return iter(dataset.batch(BATCH).to_iter_dataset(options))


def tensorflow_batches(
    files: list[bytes], interpolation: str, tf: Any, antialias: bool = False
) -> Iterator[Any]:
    """The pipeline of TensorFlow's own ResNet recipes, which do not antialias."""

    def crop(data: Any) -> Any:
        begin, size, _ = tf.image.sample_distorted_bounding_box(
            tf.io.extract_jpeg_shape(data),
            tf.zeros([0, 0, 4]),
            min_object_covered=0.0,  # as in Szegedy et al.: the area alone has a bound
            area_range=(0.08, 1.0),
            aspect_ratio_range=(3 / 4, 4 / 3),
            max_attempts=10,
            use_image_if_no_bounding_boxes=True,
        )
        window = tf.stack([begin[0], begin[1], size[0], size[1]])
        image = tf.image.decode_and_crop_jpeg(data, window, channels=3)
        image = tf.image.resize(image, [SIZE, SIZE], method=interpolation, antialias=antialias)
        image = tf.image.random_flip_left_right(image)
        return tf.cast(tf.clip_by_value(image, 0.0, 255.0), tf.uint8)

    dataset = tf.data.Dataset.from_tensor_slices(files).shuffle(len(files)).repeat()
    dataset = dataset.map(crop, num_parallel_calls=tf.data.AUTOTUNE)
    return iter(dataset.batch(BATCH).prefetch(tf.data.AUTOTUNE))


def rates(batches: Iterator[Any], seconds: float) -> tuple[float, float]:
    """Images a second and a second of processor time, once the buffers are full."""
    for _ in range(8):
        next(batches)
    count, start, busy = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - start < seconds:
        next(batches)
        count += BATCH
    return count / (time.perf_counter() - start), count / (time.process_time() - busy)


def memory_rate(seconds: float) -> float:
    """Images/s of 32 pixels gathered from an array, in a new order each epoch."""
    images = np.random.default_rng(0).integers(0, 256, (50_000, 32, 32, 3), np.uint8)
    count, epoch, start = 0, 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        order = np.random.default_rng(epoch).permutation(len(images))
        for first in range(0, len(order) - 127, 128):
            images[order[first : first + 128]]
            count += 128
        epoch += 1
    return count / (time.perf_counter() - start)


def import_tensorflow() -> Any:
    """TensorFlow, or None with a line that says what is missing."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        import tensorflow as tf
    except ImportError:
        print("tensorflow is not installed (pip install tensorflow-cpu): not compared with it")
        return None
    return tf


def main() -> None:
    """Measures in turns, so that whatever else the machine does meets both alike."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("photos", help="folder of .jpg photos")
    parser.add_argument("--cores", type=int, default=1)
    parser.add_argument("--threads", type=int, default=0, help="0: as many as cores")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
    files = encode_photos(options.photos, 500, 375)
    tf = import_tensorflow()
    threads = options.threads or options.cores

    result: dict[str, Any] = {"cores": options.cores, "files": len(files)}
    print(f"{'images/s a core':36}" + "".join(f"{name:>18}" for name in COLUMNS))
    for interpolation in ("bicubic", "bilinear"):
        makers: dict[str, Callable[[], Iterator[Any]]] = {
            "resnet_jax": lambda kind=interpolation: grain_batches(files, kind, threads)
        }
        if tf is not None:
            makers["tf.data"] = lambda kind=interpolation: tensorflow_batches(files, kind, tf)
            makers["antialiased"] = lambda kind=interpolation: tensorflow_batches(
                files, kind, tf, antialias=True
            )
        found: dict[str, list[tuple[float, float]]] = {name: [] for name in makers}
        for _ in range(options.rounds):
            for name, make in makers.items():
                found[name].append(rates(make(), options.seconds))
        for column, clock in enumerate(("by the clock", "by processor time")):
            share = 1 if column else options.cores
            row = {
                name: statistics.median(each[column] / share for each in values)
                for name, values in found.items()
            }
            if tf is not None:
                row["ratio"] = row["resnet_jax"] / row["tf.data"]
                row["ratio antialiased"] = row["resnet_jax"] / row["antialiased"]
            title = f"{SIZE} px {interpolation}, {clock}"
            result[title] = {name: round(value, 2) for name, value in row.items()}
            texts = [
                f"{row.get(name, math.nan):18.{0 if name in makers else 2}f}" for name in COLUMNS
            ]
            print(f"{title:36}" + "".join(texts))
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    result["32 px in memory"] = round(memory_rate(options.seconds))
    print(f"{'32 px in memory':36}{result['32 px in memory']:18}")
    for package in ("grain", "opencv-python-headless", "pillow", "simplejpeg", "tensorflow-cpu"):
        try:
            result[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            result[package] = None
    print(json.dumps(result))


if __name__ == "__main__":
    main()
