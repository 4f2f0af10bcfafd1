"""Memory and time of decoding: the budget, its estimates, and what hostile headers may take."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from resnet_jax.config.schema import Data
from resnet_jax.data.decode import (
    budget,
    decode,
    decoded,
    eval_crop,
    jpeg,
    read_encoded,
    read_header,
    train_crop,
)
from resnet_jax.errors import DataError
from resnet_jax.files import MIB
from resnet_jax.limits import MAX_IMAGE_BYTES
from tests.data.decode.test_decoding import encode, photo

# Bytes of memory that a process has had at most while it ran the code, beside what it had before.
PEAK = """
import io, sys
import numpy as np
from PIL import Image
from resnet_jax.config.schema import Data
from resnet_jax.data import decode
from resnet_jax.errors import DataError

def status(key):
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * next(int(each.split()[1]) for each in lines if each.startswith(key))

decode.decode(open(sys.argv[2], "rb").read(), 3)  # loads what is loaded once
data = open(sys.argv[1], "rb").read()
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
try:
    {call}
except DataError as error:
    print(error, file=sys.stderr)
print(status("VmHWM") - before)
"""
CALLS = {
    "decode": "decode.decode(data, 3)",
    "eval": "decode.eval_crop(data, Data(eval_resize=256, eval_size=224), 3)",
    "train": "decode.train_crop(data, Data(image_size=224, crop='random_resized'), 3, "
    "np.random.default_rng(0))",
}
on_linux = pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's count of memory"
)


def peak(data: bytes, tmp_path, call: str = "decode") -> int:
    """Bytes that a call takes, in a process of its own."""
    file, small = tmp_path / "image", tmp_path / "small"
    file.write_bytes(data)
    small.write_bytes(encode(Image.new("RGB", (8, 8)), "PNG"))
    code = PEAK.format(call=CALLS[call])
    done = subprocess.run(
        [sys.executable, "-c", code, file, small], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


def estimates(data: bytes, call: str, monkeypatch) -> int:
    """The most that a call takes from the budget."""
    taken = [0]

    def reserve(shared, amount):
        taken.append(amount)
        return budget._Reservation(shared, amount)

    monkeypatch.setattr(budget.Budget, "reserve", reserve)
    rng = np.random.default_rng(0)
    {
        "decode": lambda: decode(data, 3),
        "eval": lambda: eval_crop(data, Data(eval_resize=256, eval_size=224), 3),
        "train": lambda: train_crop(data, Data(image_size=224, crop="random_resized"), 3, rng),
    }[call]()
    return max(taken)


KINDS = {
    "JPEG": {},
    "progressive": {"progressive": True, "subsampling": "4:4:4"},
    "CMYK": {"progressive": True},
    "PNG": {"compress_level": 1},
    "PNG of a palette": {"transparency": 3, "compress_level": 1},
    "GIF": {},
    "WEBP": {"lossless": True, "quality": 0, "method": 0},
    "AVIF": {"speed": 10, "subsampling": "4:4:4"},
    "TIFF": {"compression": "tiff_deflate"},
    "BMP": {},
    "PPM": {},
    "JPEG2000": {},
}


@on_linux
@pytest.mark.slow
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", KINDS)
def test_estimates_are_not_exceeded(kind, call, tmp_path, monkeypatch):
    image = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (250, 200, 3), np.uint8)
    ).resize((3200, 4000))
    mode = {"CMYK": "CMYK", "PNG of a palette": "P", "GIF": "P"}.get(kind)
    form = {"progressive": "JPEG", "CMYK": "JPEG", "PNG of a palette": "PNG"}.get(kind, kind)
    data = encode(image if mode is None else image.convert(mode), form, **KINDS[kind])
    estimate = estimates(data, call, monkeypatch)
    assert peak(data, tmp_path, call) <= estimate + 8 * MIB
    # Nor are they so large that photos are refused: 22 million pixels of any format are decoded.
    assert estimate <= 24 * 3200 * 4000


@on_linux
@pytest.mark.slow
@pytest.mark.parametrize("call", CALLS)
def test_what_is_accepted_takes_half_a_gigabyte(call, tmp_path):
    """As many pixels as a PNG may have."""
    row = bytes(1 + 3 * 8500)
    packer = zlib.compressobj(1)
    packed = b"".join(packer.compress(row) for _ in range(8500)) + packer.flush()

    def chunk(kind, content):
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    header = struct.pack(">IIBBBBB", 8500, 8500, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed)
    assert peak(png + chunk(b"IEND", b""), tmp_path, call) <= 540 * MIB


# The budget.


def test_a_share_waits_for_room_and_nobody_overtakes():
    shared, order = budget.Budget(100), []

    def take(name, amount):
        with shared.reserve(amount):
            order.append(name)

    with shared.reserve(80):
        threads = []
        for name, amount in (("large", 90), ("small", 10)):  # the second would fit beside 80
            threads.append(threading.Thread(target=take, args=(name, amount)))
            threads[-1].start()
            while len(shared._waiting) < len(threads):
                time.sleep(0.001)
        assert not order
    for thread in threads:
        thread.join(10)
    assert order == ["large", "small"]
    assert shared.free == 100


def test_an_interrupted_wait_leaves_no_trace(monkeypatch):
    shared = budget.Budget(100)

    def interrupted(timeout=None):
        raise KeyboardInterrupt

    with shared.reserve(80):
        monkeypatch.setattr(shared._changed, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            shared.reserve(30).__enter__()
        assert not shared._waiting
    assert shared.free == 100


def test_threads_share_the_budget(monkeypatch):
    """Eight threads, images that take a third of it: never more than three at a time."""
    data = encode(photo(60, 40), "PNG")
    amount = estimates(data, "decode", monkeypatch)
    monkeypatch.undo()
    monkeypatch.setattr(budget, "BUDGET", budget.Budget(3 * amount))
    now, most = [], []

    def work(_):
        with decoded(data, 3):
            now.append(1)
            most.append(len(now))
            time.sleep(0.005)
            now.pop()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(24)))
    assert max(most) == 3
    assert budget.BUDGET.free == 3 * amount


# What does not fit.


def test_an_image_that_does_not_fit_is_refused_by_its_header(monkeypatch):
    data = encode(Image.new("RGB", (4000, 3000)), "PNG")
    monkeypatch.setattr(budget, "BUDGET", budget.Budget(64 * MIB))
    with pytest.raises(DataError, match=r"^4000 x 3000: .* 12,000,000 pixels .* limit of 64 MiB$"):
        decode(data, 3)


@pytest.mark.parametrize("kind", ["JPEG", "MPO", "JPEG2000"])
@pytest.mark.parametrize("decoder", ["simplejpeg", "pillow"])
def test_formats_with_scales_are_decoded_smaller(kind, decoder, monkeypatch):
    if decoder == "pillow":
        monkeypatch.setattr(jpeg, "simplejpeg", None)
    # Smooth, for the low-pass of each format is another.
    image = photo(50, 38).resize((400, 304), Image.Resampling.BICUBIC)
    several = {"save_all": True, "append_images": [image.rotate(180)]} if kind == "MPO" else {}
    data = encode(image, kind, **several)
    whole = decode(data, 3)
    monkeypatch.setattr(budget, "BUDGET", budget.Budget(budget.BUDGET.total // 300))
    part = decode(data, 3)
    shrink = 304 // part.shape[0]
    assert shrink in (2, 4, 8)
    assert part.shape == (304 // shrink, 400 // shrink, 3)
    # A JPEG's pixels are means of blocks; wavelets keep the first pixel of each.
    expected = whole.reshape(304 // shrink, shrink, 400 // shrink, shrink, 3)
    expected = expected.mean((1, 3)) if kind != "JPEG2000" else expected[:, 0, :, 0].astype(float)
    assert np.abs(part - expected).mean() < 1.5
    assert np.abs(np.roll(part, 1, axis=1) - expected).mean() > 3
    config = Data(image_size=32, eval_size=32, eval_resize=36, crop="random_resized")
    assert eval_crop(data, config, 3).shape == (32, 32, 3)
    assert train_crop(data, config, 3, np.random.default_rng(0)).shape == (32, 32, 3)


def test_too_many_scans():
    data = encode(photo(64, 48), "JPEG", progressive=True)
    assert decode(data, 3).shape == (48, 64, 3)
    at = data.rindex(b"\xff\xda")
    with pytest.raises(DataError, match="scans of 3,072 pixels are not decoded"):
        decode(data[:at] + data[at:-2] * 30_000 + b"\xff\xd9", 3)


# Bands of rows give the same pixels.

MODES = {
    "1": "PNG", "L": "PNG", "P": "PNG", "LA": "PNG", "RGB": "PNG", "RGBA": "PNG", "I;16": "PNG",
    "CMYK": "TIFF", "F": "TIFF",
}  # fmt: skip


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", MODES)
def test_bands_are_converted_alike(mode, channels, monkeypatch):
    image = photo(61, 47)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    if mode == "F":
        image = Image.fromarray(np.asarray(image.convert("L")) / np.float32(255))
    options = {"transparency": bytes(range(64))} if mode == "P" else {}
    data = encode(image if mode == "I;16" else image.convert(mode), MODES[mode], **options)
    whole = decode(data, channels)
    monkeypatch.setattr(budget, "BAND_PIXELS", 300)
    np.testing.assert_array_equal(decode(data, channels), whole)


@pytest.mark.parametrize("kind", ["bilinear", "bicubic"])
@pytest.mark.parametrize("sides", [(61, 47), (47, 61), (20, 300)])
@pytest.mark.parametrize("shorter", [20, 47, 90])
def test_bands_are_resized_alike(sides, kind, shorter, monkeypatch):
    config = Data(eval_resize=shorter, eval_size=16, interpolation=kind)
    for channels in (1, 3):
        data = encode(photo(*sides), "PNG")
        whole = eval_crop(data, config, channels)
        with monkeypatch.context() as patch:
            patch.setattr(budget, "BAND_PIXELS", 300)
            np.testing.assert_array_equal(eval_crop(data, config, channels), whole)


# Files.


def test_large_files_are_judged_by_their_header(tmp_path):
    path = tmp_path / "sparse.jpg"
    path.touch()
    os.truncate(path, 2**26)
    with pytest.raises(DataError, match="unknown format"):
        read_encoded(path)
    os.truncate(path, MAX_IMAGE_BYTES + 1)
    with pytest.raises(OSError, match="more than the limit of 134,217,728"):
        read_encoded(path)


def test_headers_of_webp_take_no_memory():
    """Pillow takes that of two canvases when it opens one."""
    for options in ({}, {"lossless": True}, {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0"}):
        data = encode(photo(61, 47), "WEBP", **options)
        assert budget.webp_size(data[:30]) == (47, 61)
        assert read_header(io.BytesIO(data))[:2] == (47, 61)
