"""Small sources of images, and batches of them, for the loader's tests."""

import io
import zlib

import numpy as np
from PIL import Image

from resnet_jax.config.schema import Augment, Config, Data, Train
from resnet_jax.data import pipeline


class Photos:
    """A source of images whose brightness is their label; some may be damaged."""

    class_names = tuple(map(str, range(20)))
    num_classes = 20
    channels = 3

    label_shape = ()

    def __init__(self, count=20, damaged=()):
        self.data = []
        for label in range(count):
            file = io.BytesIO()
            Image.new("RGB", (12, 10), (10 * label,) * 3).save(file, "PNG")
            self.data.append(b"broken" if label in damaged else file.getvalue())

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        return self.data[index], index

    def image_name(self, index):
        return f"photo{index}"


def reports():
    lines = []
    return lines, pipeline.CorruptImages(limit=2, log=lines.append)


def batches_of(batch_size=8, mirror=False):
    """A configuration with what batches depend on beside the dataset and its sampler."""
    return Config(train=Train(batch_size=batch_size), augment=Augment(flip_alternates=mirror))


def stream(source, sampler, start, stop, corrupt=None, mirror=False, shard=pipeline.ALL, workers=0):
    config = Data(image_size=8, crop="random_resized", threads=2, prefetch=2, workers=workers)
    corrupt = corrupt or pipeline.CorruptImages(limit=0, log=print)
    dataset = pipeline.StreamedDataset(source, config, corrupt)
    return list(dataset.train_batches(sampler, batches_of(8, mirror), start, stop, shard))


def assert_same(batches, expected):
    assert len(batches) == len(expected)
    for batch, other in zip(batches, expected):
        assert batch.keys() == other.keys() == {"images", "labels"}
        for name in batch:
            np.testing.assert_array_equal(batch[name], other[name])


def bombs():
    """Files of a few bytes whose headers claim billions of pixels, by format."""

    def encoded(kind, **options):
        file = io.BytesIO()
        Image.new("RGB", (16, 16)).save(file, kind, **options)
        return bytearray(file.getvalue())

    def patched(data, at, value):
        data[at : at + len(value)] = value
        return bytes(data)

    side = (60_000).to_bytes(2, "little")
    jpeg = encoded("JPEG")
    progressive = encoded("JPEG", progressive=True)
    png = encoded("PNG")
    png = patched(png, 16, (60_000).to_bytes(4, "big") * 2)
    tiff = encoded("TIFF")
    # Entries of a TIFF's directory: tag (256 width, 257 height), type, count, value.
    width, height = (tiff.index(tag.to_bytes(2, "little")) for tag in (256, 257))
    tiff = bytearray(patched(tiff, width + 8, side))
    return {
        "JPEG": patched(jpeg, jpeg.index(b"\xff\xc0") + 5, side[::-1] * 2),
        "progressive": patched(progressive, progressive.index(b"\xff\xc2") + 5, side[::-1] * 2),
        "PNG": patched(bytearray(png), 29, zlib.crc32(png[12:29]).to_bytes(4, "big")),
        "GIF": patched(encoded("GIF"), 6, side * 2),
        "BMP": patched(encoded("BMP"), 18, (60_000).to_bytes(4, "little") * 2),
        "TIFF": patched(tiff, height + 8, side),
        "WebP": patched(encoded("WEBP"), 26, (16_383).to_bytes(2, "little") * 2),
        "PPM": b"P6 60000 60000 255\n" + b"\0" * 768,
    }
