"""Images of any number of channels: .npy files, TIFFs that Pillow does not open, and the rest."""

import contextlib
import io
import pathlib
import struct

import numpy as np
import PIL
import pytest
from PIL import Image

from resnet_jax.config.schema import Data
from resnet_jax.data.decode import (
    arrays,
    budget,
    decode,
    decoded,
    eval_crop,
    read_header,
    tiff,
    train_crop,
)
from resnet_jax.data.sources import open_source
from resnet_jax.errors import DataError
from resnet_jax.inference.images import ImageFile, read_pixels

# Written by tifffile 2026.3.3, of `_pattern`; the last words are channels and type.
FIXTURES = sorted((pathlib.Path(__file__).parent / "fixtures").glob("*.tif"))
RNG = np.random.default_rng(0)


def _pattern(channels, dtype):
    rows, columns, places = np.ogrid[:20, :24, :channels]
    scale = 1 if dtype == "u1" else 257
    return ((7 * rows + 3 * columns + 11 * places) * scale).astype(dtype)


def _npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def _header(text, version=(1, 0), length=None):
    text = text.encode()
    size = struct.pack("<H" if version[0] == 1 else "<I", len(text) if length is None else length)
    return b"\x93NUMPY" + bytes(version) + size + text


def _pixels(channels, height=30, width=40):
    return RNG.integers(0, 256, (height, width, channels), np.uint8)


def _encoded(image, kind):
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_tiffs_are_what_tifffile_wrote(path):
    if path.stem.startswith("zstd") and int(PIL.__version__.split(".")[0]) < 12:
        pytest.skip("Pillow 11 comes without zstd")
    channels, dtype = path.stem.split("_")[-2:]
    expected = _pattern(int(channels), dtype)
    expected = expected if dtype == "u1" else (expected >> 8).astype(np.uint8)
    data = path.read_bytes()
    np.testing.assert_array_equal(decode(data, int(channels)), expected)
    assert read_header(io.BytesIO(data)) == (20, 24, int(channels))


def test_color_with_more_channels_gives_color_where_that_is_asked_for():
    data = next(path for path in FIXTURES if path.stem.startswith("rgb")).read_bytes()
    np.testing.assert_array_equal(decode(data, 3), _pattern(5, "u1")[:, :, :3])
    with pytest.raises(DataError, match="has 5 channels, and 4 are needed"):
        decode(data, 4)


def test_values_of_arrays():
    pixels = _pixels(5)
    for values in (
        pixels,
        np.asfortranarray(pixels),
        pixels.astype("<u2") << 8 | 0xFF,
        pixels.astype(">u2") << 8,
        (pixels / 255).astype("f2"),
        (pixels / 255).astype(">f4"),
        np.asfortranarray(pixels / 255),
    ):
        np.testing.assert_array_equal(decode(_npy(values), 5), pixels)
    np.testing.assert_array_equal(decode(_npy(pixels[:, :, 0]), 1), pixels[:, :, :1])


GREY = (np.arange(48, dtype=np.uint8) * 5).reshape(6, 8)


def _tiff(values):
    return _encoded(Image.fromarray(values), "TIFF")


def _twelve_bits(values):
    """A TIFF of 12 bits a value, two of them in three bytes, as microscopes write it."""
    first, second = values.reshape(-1, 2).astype(np.uint16).T
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], -1)
    data = packed.astype(np.uint8).tobytes()
    tags = {
        **{tiff._WIDTH: (values.shape[1],), tiff._HEIGHT: (values.shape[0],), tiff._BITS: (12,)},
        **{tiff._COMPRESSION: (1,), tiff._PHOTOMETRIC: (1,), tiff._SAMPLES: (1,)},
        **{tiff._ROWS: (values.shape[0],), tiff._STRIPS: (8,), tiff._STRIP_SIZES: (len(data),)},
    }
    return tiff._with_tags(b"II*\0\0\0\0\0" + data, tags)


GREY_FILES = {
    "int32": _tiff(GREY.astype(np.int32)),
    "uint16": _tiff(GREY.astype(np.uint16) << 8 | 0x7F),
    "float32": _tiff(GREY / np.float32(255)),
    "12 bits": _twelve_bits(GREY.astype(np.uint16) << 4 | 7),
    "PGM of 16 bits": b"P5 8 6 65535\n"
    + (GREY.astype(np.uint16) << 8 | 0x7F).astype(">u2").tobytes(),
    **{f".npy {kind}": _npy(GREY.astype(kind)) for kind in ("i2", ">i4", "u4", "i8", "u8")},
    **{f".npy {kind}": _npy((GREY / 255).astype(kind)) for kind in ("f2", ">f4", "f8")},
}


@pytest.mark.parametrize("data", GREY_FILES.values(), ids=GREY_FILES)
def test_one_rule_of_values(data):
    """Every type is scaled in one way, in training, evaluation and prediction."""
    np.testing.assert_array_equal(decode(data, 1)[:, :, 0], GREY)
    np.testing.assert_array_equal(decode(data, 3), np.stack([GREY] * 3, -1))
    config = Data(image_size=6)
    png = _encoded(Image.fromarray(GREY), "PNG")
    np.testing.assert_array_equal(eval_crop(data, config, 1), eval_crop(png, config, 1))
    found, expected = (train_crop(each, config, 1, RNG) for each in (data, png))
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(read_pixels(ImageFile("x", data=data), 1)[:, :, 0], GREY)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (GREY.astype(np.float32), "floating-point values from 0 to 235; they must be from 0 to 1"),
        (np.full((4, 4), np.nan, np.float32), r"values that are not numbers \(NaN\); they must"),
        (np.full((4, 4), np.inf, np.float32), "values from inf to inf; they must be from 0 to 1"),
        (GREY.astype(np.int32) * 257, "int32 values from 0 to 60395; they must be from 0 to 255"),
        (GREY.astype(np.int32) - 1, "int32 values from -1 to 234; they must be from 0 to 255"),
    ],
)
def test_values_without_a_rule_are_refused(values, message):
    for data in (_tiff(values), _npy(values)):
        for channels in (1, 3):
            with pytest.raises(DataError, match=message):
                decode(data, channels)
    with pytest.raises(DataError, match=message):
        read_pixels(values, 1)
    with pytest.raises(DataError, match=message):
        read_pixels(Image.fromarray(values), 1)


def test_tiffs_of_several_channels_are_turned_where_asked_for(monkeypatch):
    path = next(path for path in FIXTURES if path.stem.endswith("5_u1"))
    read = tiff.read_tiff
    monkeypatch.setattr(tiff, "read_tiff", lambda file: read(file)._replace(orientation=6))
    stored = _pattern(5, "u1")
    data = path.read_bytes()
    for upright, expected in ((False, stored), (True, np.rot90(stored, -1))):
        with decoded(data, 5, upright=upright) as pixels:
            np.testing.assert_array_equal(pixels, expected)


@pytest.mark.parametrize("value", [1.01, -0.01, np.nan, np.inf, 255.0, 1e300])
def test_floating_point_values_lie_between_0_and_1(value):
    values = np.full((4, 4, 5), 0.5)
    values[2, 3, 4] = value
    with pytest.raises(DataError, match="from 0 to 1, or stored as uint8"):
        decode(_npy(values), 5)


def test_color_and_grey_are_converted_as_in_other_files():
    for channels in (1, 3):
        pixels = _pixels(channels)
        png = _encoded(Image.fromarray(pixels.squeeze()), "PNG")
        for needed in (1, 3):
            expected = decode(png, needed)
            np.testing.assert_array_equal(decode(_npy(pixels), needed), expected)


def test_other_channels_are_not_converted():
    grey, color = Image.new("L", (8, 8)), Image.new("RGB", (8, 8))
    jpeg, cmyk = _encoded(color, "JPEG"), _encoded(color.convert("CMYK"), "JPEG")
    for data, found, needed in (
        (_npy(_pixels(5)), 5, 3),
        (_npy(_pixels(2)), 2, 1),
        (_npy(_pixels(3)), 3, 5),
        (jpeg, 3, 5),
        (cmyk, 4, 5),
        (_encoded(grey, "JPEG"), 1, 5),
        (_encoded(grey, "PNG"), 1, 4),
        (_encoded(color.convert("P"), "PNG"), 3, 4),
        (_encoded(color, "TIFF"), 3, 4),
    ):
        expected = f"has {found} channels?, and {needed} are needed"
        with pytest.raises(DataError, match=expected):
            decode(data, needed)
        with pytest.raises(DataError, match=expected):
            train_crop(data, Data(image_size=4, crop="random_resized"), needed, RNG)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_transparency_is_a_channel_where_four_are_asked_for(kind):
    pixels = _pixels(4)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **({"lossless": True, "exact": True}))
    np.testing.assert_array_equal(decode(file.getvalue(), 4), pixels)
    np.testing.assert_array_equal(decode(file.getvalue(), 3), pixels[:, :, :3])
    file.seek(0)
    assert read_header(file).channels == 3


@pytest.mark.parametrize("channels", [2, 4, 5, 13, 130])
@pytest.mark.parametrize("crop", ["center", "random_resized", "scale_jitter"])
def test_each_channel_is_cropped_as_if_it_were_alone(channels, crop):
    pixels = _pixels(channels)
    config = Data(image_size=16, eval_resize=20, crop=crop, jitter_sides=(18, 24))

    def train(part):
        return train_crop(_npy(part), config, part.shape[2], np.random.default_rng(7))

    whole, evaluated = train(pixels), eval_crop(_npy(pixels), config, channels)
    assert whole.shape == evaluated.shape == (16, 16, channels)
    for each in (0, channels // 2, channels - 1):
        alone = pixels[:, :, each : each + 1]
        np.testing.assert_array_equal(whole[:, :, each : each + 1], train(alone))
        expected = eval_crop(_npy(alone), config, 1)
        np.testing.assert_array_equal(evaluated[:, :, each : each + 1], expected)


CODE = "{'descr': __import__('os').system('true'), 'fortran_order': False, 'shape': (2, 2, 5)}"
DAMAGED = {
    "too many values": _header(
        "{'descr': '|u1', 'fortran_order': False, 'shape': (1000000, 1000000, 5)}"
    ),
    "more values than bytes": _header(
        "{'descr': '|u1', 'fortran_order': False, 'shape': (9, 9, 5)}"
    ),
    "code": _header(CODE),
    "code, version 3": _header(CODE, (3, 0)),
    "a long header": _header("{", (2, 0), 2**32 - 1),
    "a deep header": _header("(" * 9000),
    "objects": _npy(np.array([[{}]], object)),
    "records": _npy(np.zeros((4, 4), [("a", "u1"), ("b", "u2")])),
    "cut short": _npy(_pixels(5))[:-1],
    "no header": b"\x93NUMPY",
    "one axis": _npy(np.zeros(9, np.uint8)),
    "nothing": _npy(np.zeros((0, 4, 5), np.uint8)),
    "channels first": _npy(np.zeros((5, 32, 32), np.uint8)),
    "too many channels": _npy(np.zeros((1, 2, 1025), np.uint8)),
    "negative": _header("{'descr': '|u1', 'fortran_order': False, 'shape': (-4, -4, 5)}"),
    "integers above 255": _npy(np.full((4, 4, 5), 256, np.int64)),
    "integers below 0": _npy(np.full((4, 4, 5), -1, np.int8)),
    "truth values": _npy(np.zeros((4, 4, 5), bool)),
}


@pytest.mark.parametrize("data", DAMAGED.values(), ids=DAMAGED)
def test_damaged_arrays(data):
    with pytest.raises(DataError) as caught:
        decode(data, 5)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_damaged_tiffs_are_an_error_or_an_image(path):
    data, channels = path.read_bytes(), int(path.stem.split("_")[-2])
    rng = np.random.default_rng(0)
    for _ in range(60):
        broken = bytearray(data)
        for _ in range(4):
            broken[rng.integers(len(data))] = rng.integers(256)
        with contextlib.suppress(DataError):
            assert decode(bytes(broken), channels).shape[2] == channels
    with pytest.raises(DataError):
        decode(data[: len(data) // 3], channels)


def test_memory_of_arrays_is_counted(monkeypatch):
    data = _npy(np.zeros((100, 100, 5), np.uint16))
    monkeypatch.setattr(budget, "BUDGET", budget.Budget(60_000))
    with pytest.raises(DataError, match="more than the limit"):
        decode(data, 5)
    for path in FIXTURES[:2]:
        file = io.BytesIO(path.read_bytes())
        assert tiff.read_tiff(file).decoding_bytes(0) > np.prod(read_header(file))


def test_a_header_takes_no_memory_for_the_values():
    shape = arrays.read_npy(io.BytesIO(DAMAGED["more values than bytes"])).shape
    assert shape == (9, 9, 5)


def _folder(root, split, files):
    for number, (name, data) in enumerate(files):
        path = root / split / "ab"[number % 2] / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def test_channels_of_a_folder_are_those_of_most(tmp_path):
    five, color = _npy(_pixels(5)), _encoded(Image.new("RGB", (8, 8)), "PNG")
    files = [(f"{number}.npy", five) for number in range(6)]
    _folder(tmp_path, "train", [("0.png", color), ("0b.png", color), *files])
    source = open_source(f"folder:{tmp_path}", "train")
    assert source.channels == 5
    _folder(tmp_path, "test", [("0.png", color), ("1.npy", _npy(_pixels(1)))])
    assert open_source(f"folder:{tmp_path}", "test", train_split="test").channels == 3
