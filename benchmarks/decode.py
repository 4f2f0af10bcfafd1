"""Compares libraries at decoding a JPEG and at making a 224-pixel training crop of it.

    python benchmarks/decode.py PHOTOS

PHOTOS is a folder of JPEG photos of any size: they are re-encoded at 500 x 375 pixels, which is
typical of ImageNet, and at 1024 x 768 (baseline, quality 90). Prints a table in ms of processor
time per image, and a JSON line.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import io
import json
import platform
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import simplejpeg
from PIL import Image

from resnet_jax.config.schema import Data
from resnet_jax.data.decode import train_crop
from resnet_jax.data.decode.crop import _random_region
from resnet_jax.data.decode.jpeg import decode_jpeg, read_jpeg_header
from resnet_jax.data.decode.orientation import Region
from resnet_jax.data.decode.resize import resize_to_square

SIZE = 224
Crop = Callable[[bytes, Region], Any]


def encode_photos(folder: str, width: int, height: int) -> list[bytes]:
    """The photos of a folder, resized to cover width x height, cropped to it and encoded."""
    files = []
    for path in sorted(Path(folder).glob("*.jpg")):
        image = Image.open(path).convert("RGB")
        scale = max(width / image.width, height / image.height)
        sides = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
        left, top = (sides[0] - width) // 2, (sides[1] - height) // 2
        image = image.resize(sides, Image.Resampling.BICUBIC)
        file = io.BytesIO()
        image.crop((left, top, left + width, top + height)).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    if not files:
        raise SystemExit(f"{folder} has no .jpg files")
    return files


def shrink_of(region: Region) -> int:
    """The largest power of 2 that leaves SIZE pixels on each side."""
    shortest = min(side.stop - side.start for side in region)
    return next((each for each in (8, 4, 2) if shortest // each >= SIZE), 1)


def crop_region(pixels: np.ndarray, region: Region, shrink: int) -> np.ndarray:
    """The region of a shrunk image."""
    rows, columns = region
    return pixels[
        round(rows.start / shrink) : round(rows.stop / shrink),
        round(columns.start / shrink) : round(columns.stop / shrink),
    ]


def pillow_whole(data: bytes, region: Region) -> Any:
    """Pillow alone, from the whole image."""
    (top, bottom), (left, right) = ((side.start, side.stop) for side in region)
    image = Image.open(io.BytesIO(data))
    box = (left, top, right, bottom)
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=box))


def pillow_draft(data: bytes, region: Region) -> Any:
    """Pillow alone, decoding at a smaller scale where it can."""
    image, shrink = Image.open(io.BytesIO(data)), shrink_of(region)
    image.draft("RGB", (image.width // shrink, image.height // shrink))
    (top, bottom), (left, right) = ((s.start / shrink, s.stop / shrink) for s in region)
    box = (left, top, min(right, image.width), min(bottom, image.height))
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=box))


def opencv_decoded(data: bytes, region: Region, area: bool) -> Any:
    """OpenCV alone; its INTER_AREA, or this package's blur and INTER_CUBIC."""
    shrink = shrink_of(region)
    flag = {
        1: cv2.IMREAD_COLOR,
        2: cv2.IMREAD_REDUCED_COLOR_2,
        4: cv2.IMREAD_REDUCED_COLOR_4,
        8: cv2.IMREAD_REDUCED_COLOR_8,
    }[shrink]
    flag |= cv2.IMREAD_IGNORE_ORIENTATION
    pixels = crop_region(cv2.imdecode(np.frombuffer(data, np.uint8), flag), region, shrink)
    if area and min(pixels.shape[:2]) > SIZE:
        return cv2.resize(pixels, (SIZE, SIZE), interpolation=cv2.INTER_AREA)
    return resize_to_square(pixels, SIZE, "bicubic")


def simplejpeg_pillow(data: bytes, region: Region) -> Any:
    """Simplejpeg decodes (scaled), Pillow resizes."""
    height, width = simplejpeg.decode_jpeg_header(data)[:2]
    shrink = shrink_of(region)
    least = {} if shrink == 1 else {"min_height": height // shrink, "min_width": width // shrink}
    pixels = crop_region(simplejpeg.decode_jpeg(data, **least), region, shrink)
    return np.asarray(Image.fromarray(pixels).resize((SIZE, SIZE), Image.Resampling.BICUBIC))


def simplejpeg_opencv(data: bytes, region: Region, fast: bool, crop_rows: bool) -> Any:
    """Simplejpeg decodes (scaled), OpenCV resizes."""
    header = read_jpeg_header(data)
    if header is None:
        raise SystemExit("not a JPEG")
    shrink = shrink_of(region)
    rows = min(header.height, region[0].stop + shrink) if crop_rows else header.height
    pixels = decode_jpeg(data, header, 3, rows, shrink, exact=not fast)
    return resize_to_square(crop_region(pixels, region, shrink), SIZE, "bicubic")


METHODS: dict[str, Crop] = {
    "decode: Pillow": lambda data, _: np.asarray(Image.open(io.BytesIO(data))),
    "decode: OpenCV": lambda data, _: cv2.imdecode(np.frombuffer(data, np.uint8), 1),
    "decode: simplejpeg": lambda data, _: simplejpeg.decode_jpeg(data),
    "decode: simplejpeg, fast": lambda data, _: simplejpeg.decode_jpeg(
        data, fastdct=True, fastupsample=True
    ),
    "crop: Pillow": pillow_whole,
    "crop: Pillow, draft": pillow_draft,
    "crop: OpenCV, area": functools.partial(opencv_decoded, area=True),
    "crop: OpenCV": functools.partial(opencv_decoded, area=False),
    "crop: simplejpeg + Pillow": simplejpeg_pillow,
    "crop: simplejpeg + OpenCV": functools.partial(simplejpeg_opencv, fast=False, crop_rows=False),
    "  the same, fast": functools.partial(simplejpeg_opencv, fast=True, crop_rows=False),
    "  the same, rows cut": functools.partial(simplejpeg_opencv, fast=False, crop_rows=True),
    "  the same, fast, rows cut": functools.partial(simplejpeg_opencv, fast=True, crop_rows=True),
}


def regions(files: list[bytes], width: int, height: int) -> list[Region]:
    """A random resized crop for each file."""
    rng = np.random.default_rng(0)
    return [_random_region(height, width, Data(), rng) for _ in files]


def milliseconds(method: Crop, files: list[bytes], crops: list[Region]) -> float:
    """Processor time for each image."""
    start = time.thread_time()
    for data, region in zip(files, crops):
        method(data, region)
    return 1e3 * (time.thread_time() - start) / len(files)


def crops_for(files: list[bytes], seconds: float) -> int:
    """Number of training crops that one thread makes in a time."""
    config = Data(image_size=SIZE, crop="random_resized", interpolation="bicubic")
    count, end = 0, time.perf_counter() + seconds
    while time.perf_counter() < end:
        rng = np.random.default_rng(count)
        train_crop(files[count % len(files)], config, 3, rng)
        count += 1
    return count


def threads_to_processes(files: list[bytes]) -> float:
    """Crops of 2 threads divided by those of 2 processes; 1 if threads never wait."""
    ratios = []
    with ThreadPoolExecutor(2) as threads, ProcessPoolExecutor(2) as processes:
        for _ in range(9):
            made = [
                sum(pool.map(crops_for, [files] * 2, [1.0] * 2)) for pool in (threads, processes)
            ]
            ratios.append(made[0] / made[1])
    return statistics.median(ratios[1:])  # the first includes the start of the processes


def main() -> None:
    """Alternates between methods and keeps the best time of each, which is least disturbed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("photos", help="folder of .jpg photos")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    sizes = ((500, 375), (1024, 768))
    result: dict[str, Any] = {method.strip(): {} for method in METHODS}
    for width, height in sizes:
        files = encode_photos(options.photos, width, height) * 3
        crops = regions(files, width, height)
        for _ in range(options.rounds):
            for name, method in METHODS.items():
                found = milliseconds(method, files, crops)
                times = result[name.strip()]
                key = f"{width}x{height}"
                times[key] = round(min(times.get(key, found), found), 4)
    print(f"{'ms per image':30} " + " ".join(f"{f'{w}x{h}':>10}" for w, h in sizes))
    for name in METHODS:
        print(f"{name:30} " + " ".join(f"{ms:10.2f}" for ms in result[name.strip()].values()))
    title = "2 threads / 2 processes"
    result[title] = threads_to_processes(encode_photos(options.photos, 500, 375))
    print(f"{title:30} {result[title]:10.2f}")
    for package in ("pillow", "opencv-python-headless", "simplejpeg", "numpy"):
        result[package] = importlib.metadata.version(package)
    result["python"] = platform.python_version()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
