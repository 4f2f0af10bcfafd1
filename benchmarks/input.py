"""Measures images/s that the host prepares, compared with tf.data on the same files.

    python benchmarks/input.py PHOTOS                         # compared with tf.data, on one core
    python benchmarks/input.py PHOTOS --scaling               # by threads and worker processes
    python benchmarks/input.py PHOTOS --memory_batches=10000  # resident memory over time

PHOTOS is a folder of JPEG photos of any size: they are re-encoded at 500 x 375 pixels, which is
typical of ImageNet. Prints a table and a JSON line.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from decode import encode_photos

from resnet_jax.config.schema import Config, Data, Train
from resnet_jax.data.pipeline import CorruptImages, IndexSampler, StreamedDataset
from resnet_jax.data.sources import Source
from resnet_jax.data.stream import Batches, report_undecodable
from resnet_jax.data.workers import decode_in_processes
from resnet_jax.errors import import_failure

SIZE = 224
BATCH = 64
GOAL = 48_000  # images/s of eight GPUs that train on 6,000 each
WORKERS, THREADS = 4, 12  # simulated: as many cores as there are threads in all workers
# "antialiased" is tf.data with antialiasing, which the crops of this package always have.
COLUMNS = ("resnet_jax", "tf.data", "antialiased", "ratio", "ratio antialiased")


class Files(Source):
    """Encoded images in memory, as a source."""

    channels, image_shape, fingerprint = 3, None, ""
    class_names = ("photo",)

    def __init__(self, files: list[bytes]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def _read(self, position: int) -> tuple[bytes, int]:
        return self.files[position], 0

    def _name(self, position: int) -> str:
        return f"photo {position}"


def our_batches(
    files: list[bytes], interpolation: str, batch: int = BATCH, **options: int
) -> Iterator[np.ndarray]:
    """This package's pipeline; flips come later, on the device."""
    data = Data(
        image_size=SIZE, crop="random_resized", interpolation=interpolation, prefetch=2, **options
    )
    config = Config(data=data, train=Train(batch_size=batch))
    dataset = StreamedDataset(Files(files), data, CorruptImages(0, print))
    batches = dataset.train_batches(IndexSampler(len(files), seed=0), config, 0, 10**6)
    return (made["images"] for made in batches)


def tensorflow_batches(
    files: list[bytes], interpolation: str, tf: Any, antialias: bool = False
) -> Iterator[Any]:
    """The pipeline of TensorFlow's own ResNet recipes, which do not antialias."""

    def crop(data: Any) -> Any:
        begin, size, _ = tf.image.sample_distorted_bounding_box(
            tf.io.extract_jpeg_shape(data),
            tf.zeros([0, 0, 4]),
            min_object_covered=0.0,  # as in Szegedy et al., only the area is bounded
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
    """Images/s by the clock and by processor time, once the buffers are full."""
    for _ in range(8):
        next(batches)
    count, start, busy = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - start < seconds:
        next(batches)
        count += BATCH
    return count / (time.perf_counter() - start), count / (time.process_time() - busy)


def memory_rate(seconds: float) -> float:
    """Images/s of 32-pixel images gathered from an array, in a new order each epoch."""
    images = np.random.default_rng(0).integers(0, 256, (50_000, 32, 32, 3), np.uint8)
    count, epoch, start = 0, 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        order = np.random.default_rng(epoch).permutation(len(images))
        for first in range(0, len(order) - 127, 128):
            images[order[first : first + 128]]
            count += 128
        epoch += 1
    return count / (time.perf_counter() - start)


class Waiting(Batches):
    """Batches that cost a worker the time of decoding, but no processor.

    So any number of cores can be simulated, to see what the processes cost beside the decoding.
    """

    def __init__(self, files: list[bytes], data: Data, seconds: float) -> None:
        super().__init__(Files(files), data, SIZE, BATCH, 10**6)
        self.seconds = seconds  # per image

    def begin(self, step: int) -> tuple[dict[str, np.ndarray], None]:
        labels = np.zeros(self.batch_size, np.int32)
        undecodable = np.full((self.batch_size, 16), -1)
        return {"labels": labels, "undecodable": undecodable}, None

    def fill(self, batch: dict[str, np.ndarray], images: None, place: int) -> None:
        time.sleep(self.seconds)

    def make(self, step: int, pixels: np.ndarray) -> dict[str, np.ndarray]:
        time.sleep(self.seconds * self.batch_size)
        return {**self.begin(step)[0], "images": pixels}


def waiting_batches(files: list[bytes]) -> Iterator[np.ndarray]:
    """Batches of simulated cores that are just fast enough."""
    data = Data(workers=WORKERS, threads=THREADS, prefetch=THREADS)
    batches = Waiting(files, data, seconds=WORKERS * THREADS / GOAL)
    decoded = report_undecodable(decode_in_processes(batches), batches, CorruptImages(0, print))
    return (made["images"] for made in decoded)


def processor_seconds() -> tuple[float, float]:
    """Of this process, and of all its workers."""
    ticks = 0
    for worker in multiprocessing.active_children():
        fields = Path(f"/proc/{worker.pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])  # in user and in kernel mode
    return time.process_time(), ticks / os.sysconf("SC_CLK_TCK")


def scaling_rates(
    batches: Iterator[Any], seconds: float, warm_up: int
) -> tuple[float, float, float]:
    """Images by second: of the clock, of all processors, and of this process's."""
    for _ in range(warm_up):
        next(batches)
    count, start, (own, others) = 0, time.perf_counter(), processor_seconds()
    while time.perf_counter() - start < seconds:
        next(batches)
        count += BATCH
    clock, (own_now, others_now) = time.perf_counter() - start, processor_seconds()
    own, others = own_now - own, others_now - others
    return count / clock, count / (own + others), count / own


def scaling(files: list[bytes], seconds: float, rounds: int) -> dict[str, Any]:
    """Threads of this process, worker processes, and the cores that eight fast GPUs need.

    With workers, a batch still passes through this process, so the images per second of its
    processor time bound what it can hand on, however many cores its workers have.
    """
    found: dict[str, list[tuple[float, float, float]]] = {}

    def measure(name: str, batches: Iterator[Any], warm_up: int = 8) -> None:
        rates = scaling_rates(batches, seconds, warm_up)
        found.setdefault(name, []).append(rates)

    for _ in range(rounds):
        for n in (1, 2, 4):
            measure(f"{n} threads", our_batches(files, "bicubic", threads=n))
        for n in (1, 2):
            measure(f"{n} workers", our_batches(files, "bicubic", threads=1, workers=n))
    core = statistics.median(each[1] for each in found["1 threads"])
    simulated = f"{WORKERS} workers, {WORKERS * THREADS} simulated cores"
    measure(simulated, waiting_batches(files), warm_up=3 * WORKERS * THREADS)
    result = {
        name: [round(statistics.median(column)) for column in zip(*values, strict=True)]
        for name, values in found.items()
    }
    print(f"{'images by second':40}{'of the clock':>14}{'all processors':>16}{'this process':>14}")
    for name, (clock, everywhere, here) in result.items():
        print(f"{name:40}{clock:14}{everywhere:16}{here:14}")
    handed_on = result[simulated][2]
    print(f"cores for {GOAL} images/s: {GOAL / core:.1f} decode, {GOAL / handed_on:.2f} hand on")
    return result


def resident_memory(files: list[bytes], batches: int) -> list[int]:
    """MiB in use after each tenth of a long run."""
    page, found = os.sysconf("SC_PAGE_SIZE"), []
    for count, _ in enumerate(our_batches(files, "bicubic", threads=2, batch=8), start=1):
        if count % (batches // 10) == 0:
            with open("/proc/self/statm") as file:
                found.append(int(file.read().split()[1]) * page >> 20)
            print(f"{count:8} batches of 8: {found[-1]:6} MiB")
        if count == batches:
            return found
    raise AssertionError("the stream does not end")


def import_tensorflow() -> Any:
    """TensorFlow, or None and a line with the reason."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        import tensorflow as tf
    except ImportError as error:
        print(f"{import_failure(error)}: not compared with it")
        return None
    return tf


def main() -> None:
    """Alternates between pipelines, so that other load affects all of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("photos", help="folder of .jpg photos")
    parser.add_argument("--cores", type=int, default=1)
    parser.add_argument("--threads", type=int, default=0, help="0: as many as cores")
    parser.add_argument("--seconds", type=float, default=3.0, help="per measurement")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--scaling", action="store_true", help="only by threads and processes")
    parser.add_argument("--memory_batches", type=int, default=0, help="batches for the memory test")
    options = parser.parse_args()
    files = encode_photos(options.photos, 500, 375)
    if options.scaling:
        print(json.dumps(scaling(files, options.seconds, options.rounds)))
        return
    if options.memory_batches:
        print(json.dumps({"resident MiB": resident_memory(files, options.memory_batches)}))
        return
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
    tf = import_tensorflow()
    threads = options.threads or options.cores

    result: dict[str, Any] = {"cores": options.cores, "files": len(files)}
    print(f"{'images/s per core':36}" + "".join(f"{name:>18}" for name in COLUMNS))
    for interpolation in ("bicubic", "bilinear"):
        makers: dict[str, Callable[[], Iterator[Any]]] = {
            "resnet_jax": lambda kind=interpolation: our_batches(files, kind, threads=threads)
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
            divisor = 1 if column else options.cores
            row = {
                name: statistics.median(each[column] / divisor for each in values)
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
    for package in ("opencv-python-headless", "pillow", "simplejpeg", "tensorflow-cpu"):
        try:
            result[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            result[package] = None
    print(json.dumps(result))


if __name__ == "__main__":
    main()
