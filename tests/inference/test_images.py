"""Images of every mode and orientation against Pillow; where images are found."""

import dataclasses
import io
import os
import sys

import cv2
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageOps

import resnet_jax as rj
from resnet_jax.config.schema import Data
from resnet_jax.data.decode import reading
from resnet_jax.inference import images as module
from resnet_jax.inference.images import ImageFile, in_threads, list_images, read_crop, read_pixels
from tests.data.photos import bombs

RNG = np.random.default_rng(0)
# Smooth in blocks, so that a JPEG keeps it well.
COLOUR = RNG.integers(0, 256, (3, 4, 3), np.uint8).repeat(8, 0).repeat(8, 1)  # [24, 32, 3]
PICTURE = Image.fromarray(COLOUR)


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def with_alpha(mode):
    image = PICTURE.convert("L" if mode == "LA" else "RGB")
    image.putalpha(Image.fromarray(RNG.integers(0, 256, (24, 32), np.uint8)))
    return image


def transparent_palette():
    return encoded(
        PICTURE.convert("P", palette=Image.Palette.ADAPTIVE), "PNG", transparency=b"\0\7"
    )


def animation():
    frames = [PICTURE.convert("P"), Image.new("P", PICTURE.size)]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])


SIXTEEN = RNG.integers(0, 65536, (24, 32), np.uint16)
MODES = {
    "grey": encoded(PICTURE.convert("L"), "PNG"),
    "grey and alpha": encoded(with_alpha("LA"), "PNG"),
    "palette": encoded(PICTURE.convert("P"), "PNG"),
    "palette with transparency": transparent_palette(),
    "RGBA": encoded(with_alpha("RGBA"), "PNG"),
    "CMYK": encoded(PICTURE.convert("CMYK"), "JPEG", quality=95),
    "CMYK TIFF": encoded(PICTURE.convert("CMYK"), "TIFF"),
    "one bit": encoded(PICTURE.convert("1"), "PNG"),
    "animated GIF": animation(),
    "RGB": encoded(PICTURE, "PNG"),
    "RGB WebP": encoded(PICTURE, "WEBP", lossless=True),
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("mode", MODES)
def test_modes_are_pillows(mode, channels):
    with Image.open(io.BytesIO(MODES[mode])) as image:
        # By way of RGBA Pillow does not warn of palettes with transparency.
        expected = np.asarray(image.convert("RGBA").convert("RGB"))
        if channels == 1:
            expected = np.asarray(Image.fromarray(expected).convert("L"))[:, :, None]
    pixels = read_pixels(ImageFile("x", data=MODES[mode]), channels)
    assert pixels.shape == (24, 32, channels)
    # By way of RGB, grey may round twice.
    assert np.abs(pixels.astype(int) - expected).max() <= (channels == 1)


def test_of_16_bits_the_upper_8_are_kept():
    for data in (encoded(Image.fromarray(SIXTEEN), kind) for kind in ("PNG", "TIFF")):
        for channels in (1, 3):
            pixels = read_pixels(ImageFile("x", data=data), channels)
            np.testing.assert_array_equal(pixels, np.stack([SIXTEEN >> 8] * channels, -1))
    colour = np.stack([SIXTEEN, SIXTEEN.T.reshape(24, 32), SIXTEEN[::-1]], -1)
    data = cv2.imencode(".png", colour[:, :, ::-1])[1].tobytes()
    np.testing.assert_array_equal(read_pixels(ImageFile("x", data=data), 3), colour >> 8)


def test_a_jpeg_is_close_to_pillows():
    data = encoded(PICTURE, "JPEG", quality=95)
    expected = np.asarray(Image.open(io.BytesIO(data))).astype(int)
    assert np.abs(read_pixels(ImageFile("x", data=data), 3) - expected).max() <= 2


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientations_are_pillows(kind, orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95}}.get(kind, {})
    path = tmp_path / "photo"
    path.write_bytes(encoded(PICTURE, kind, exif=exif, **options))
    with Image.open(path) as image:
        if kind != "TIFF":  # of which Pillow takes the tag away when it has turned the image
            assert image.getexif()[0x0112] == orientation
        expected = np.asarray(ImageOps.exif_transpose(image)).astype(int)
    assert expected.shape == ((24, 32, 3) if orientation < 5 else (32, 24, 3))
    with Image.open(path) as image:
        for found in (read_pixels(path, 3), read_pixels(image, 3)):
            assert found.shape == expected.shape
            assert np.abs(found - expected).max() <= (2 if kind == "JPEG" else 0)


def test_damaged_tags_do_not_matter():
    data = encoded(PICTURE, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08" + b"\xff" * 20)
    with pytest.warns(UserWarning, match="EXIF"):
        assert read_pixels(ImageFile("x", data=data), 3).shape == (24, 32, 3)


def test_arrays_are_converted_as_files():
    for image in (PICTURE, with_alpha("RGBA"), PICTURE.convert("L")):
        for channels in (1, 3):
            expected = read_pixels(ImageFile("x", data=encoded(image, "PNG")), channels)
            np.testing.assert_array_equal(read_pixels(np.asarray(image), channels), expected)
    grey = np.asarray(PICTURE.convert("L"))[:, :, None]
    np.testing.assert_array_equal(read_pixels(grey, 1), grey)


@pytest.mark.parametrize("data", [b"", b"GIF89a", MODES["RGB"][:60], b"\xff\xd8\xff", b"notes"])
def test_broken_images_are_named(data):
    with pytest.raises(rj.DataError, match=r"^broken\.png: .*(valid|JPEG)"):
        read_pixels(ImageFile("broken.png", data=data), 3)


def test_bombs_are_named_and_passed_over(monkeypatch):
    found = bombs()
    monkeypatch.setattr(module.sys, "stdin", io.TextIOWrapper(io.BytesIO(found["JPEG"])))
    files = [*list_images(["-"]), *(ImageFile(kind, data=data) for kind, data in found.items())]
    results = list(in_threads(lambda file: read_pixels(file, 3), [*files, COLOUR], ahead=16))
    assert [file.name for file in files] == ["-", *found]
    for file, error in zip(files, results[:-1]):
        assert isinstance(error, rj.DataError)
        assert str(error).startswith(f"{file.name}: ")
        assert "200,000,000" in str(error)
    assert results[-1].shape == COLOUR.shape


def test_what_is_in_memory_is_not_counted(monkeypatch):
    monkeypatch.setattr(reading, "MAX_PIXELS", 100)
    assert read_pixels(COLOUR, 3).shape == read_pixels(PICTURE, 3).shape == (24, 32, 3)
    with pytest.raises(rj.DataError, match="x: 32 x 24: more than 100 pixels"):
        read_pixels(ImageFile("x", data=MODES["RGB"]), 3)


def test_a_damaged_image_of_pillows():
    data = bytearray(MODES["RGB"])
    at = data.index(b"IDAT") + 4
    data[at : at + 8] = b"\xff" * 8
    with pytest.raises(rj.DataError, match="an image in memory: not a valid image"):
        read_pixels(Image.open(io.BytesIO(data)), 3)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(rj.DataError, match=r"none\.png: cannot be read"):
        read_pixels(tmp_path / "none.png", 3)


def test_images_as_stored():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(PICTURE, "PNG", exif=exif)
    for image in (ImageFile("x", data=data), Image.open(io.BytesIO(data))):
        np.testing.assert_array_equal(read_pixels(image, 3, upright=False), COLOUR)
        np.testing.assert_array_equal(read_pixels(image, 3), np.rot90(COLOUR, -1))
    config = Data(image_size=24)
    for upright, expected in ((False, COLOUR[:, 4:28]), (True, np.rot90(COLOUR[:, 4:28], -1))):
        found = read_crop(data, 3, dataclasses.replace(config, upright=upright))
        np.testing.assert_array_equal(found, expected)


def test_images_in_memory(tmp_path):
    data = MODES["RGB"]
    path = tmp_path / "x.png"
    path.write_bytes(data)
    at_the_end = io.BytesIO()
    PICTURE.save(at_the_end, "PNG")
    with path.open("rb") as file:
        images = [data, bytearray(data), memoryview(data), io.BytesIO(data), at_the_end, file]
        images += [COLOUR, jnp.asarray(COLOUR), COLOUR / 255, jnp.asarray(COLOUR / np.float32(255))]
        for image in images:
            np.testing.assert_array_equal(read_pixels(image, 3), COLOUR)


def test_open_files_that_give_no_image(tmp_path, monkeypatch):
    path = tmp_path / "x.png"
    path.write_bytes(MODES["RGB"][:60])
    with path.open("rb") as file:
        with pytest.raises(rj.DataError, match=r"x\.png: not a valid image"):
            read_pixels(file, 3)
        monkeypatch.setattr(module, "MAX_IMAGE_BYTES", 59)
        with pytest.raises(rj.DataError, match=r"x\.png: has more than the limit of 59 bytes"):
            read_pixels(file, 3)
    with pytest.raises(rj.DataError, match=r"x\.png: cannot be read .*closed"):
        read_pixels(file, 3)
    with (
        path.open(encoding="latin-1") as file,
        pytest.raises(rj.DataError, match=r'gives text.*"rb"'),
    ):
        read_pixels(file, 3)


# The first bytes of a photo of an iPhone.
HEIC = b"\0\0\0\x1cftypheic\0\0\0\0mif1heicmiaf" + bytes(100)


def test_heic_names_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(rj.DataError, match=r"^a\.heic: an image in HEIC format needs pillow_heif"):
        read_pixels(ImageFile("a.heic", data=HEIC), 3)
    avif = encoded(PICTURE, "AVIF")
    assert b"ftyp" in avif[:12]
    assert read_pixels(ImageFile("a.avif", data=avif), 3).shape == (24, 32, 3)


def test_heic_is_read_and_broken_files_are_named():
    heif = pytest.importorskip("pillow_heif", reason="reads HEIC")
    file = io.BytesIO()
    heif.from_pillow(PICTURE.resize((320, 240))).save(file, quality=95)
    found = read_pixels(file, 3).astype(int)
    assert np.abs(found - np.asarray(PICTURE.resize((320, 240)))).mean() < 6
    for data in (HEIC, file.getvalue()[:-500], HEIC[:20]):
        with pytest.raises(rj.DataError, match=r"^a\.heic: not a valid image"):
            read_pixels(ImageFile("a.heic", data=data), 3)


@pytest.fixture
def folder(tmp_path):
    for name in ("b/2.png", "b/10.JPG", "a/x/1.tiff", "a/notes.txt", "c.gif", "a/.hidden.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    os.symlink(tmp_path, tmp_path / "a" / "circle")
    os.symlink(tmp_path / "b", tmp_path / "linked")
    return tmp_path


def test_folders_in_order_with_labels(folder):
    found = [(os.path.relpath(file.name, folder), file.label) for file in list_images([folder])]
    assert found == [
        ("a/x/1.tiff", "x"),
        ("b/10.JPG", "b"),
        ("b/2.png", "b"),
        ("c.gif", ""),
        ("linked/10.JPG", "linked"),
        ("linked/2.png", "linked"),
    ]
    both = list_images([folder / "c.gif", folder / "b"])
    assert [os.path.basename(file.name) for file in both] == ["c.gif", "10.JPG", "2.png"]


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        (["c.gif", "c.gif"], ["c.gif"]),
        (["c.gif", "./c.gif", "{folder}/c.gif"], ["c.gif"]),
        (["b/2.png", "b"], ["b/2.png", "b/10.JPG"]),
        (["b", "b/2.png", "b/"], ["b/10.JPG", "b/2.png"]),
        (["b/2.png", "linked/2.png"], ["b/2.png", "linked/2.png"]),  # a link is another path
        (["b/2.png", "-"], ["b/2.png", "c.gif"]),
    ],
)
def test_a_path_is_listed_once(inputs, expected, folder, monkeypatch):
    monkeypatch.chdir(folder)
    text = io.TextIOWrapper(io.BytesIO(b"c.gif\nb/2.png\nc.gif\n"))
    monkeypatch.setattr(module.sys, "stdin", text)
    found = list_images([each.format(folder=folder) for each in inputs])
    assert [file.name for file in found] == expected


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (["none"], "none: there is no such file"),
        (["empty"], "empty: the folder has no images"),
        (["-", "-"], "once"),
        (["-"], "standard input is empty"),
    ],
)
def test_mistakes(inputs, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(module.sys, "stdin", io.TextIOWrapper(io.BytesIO(b" \n")))
    with pytest.raises(rj.DataError, match=message):
        list_images(inputs)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"a, b.png\r\n\nb\n", ["a, b.png", "b/1.png"]),
        (os.fsencode("gr\udcfcn.png"), ["gr\udcfcn.png"]),
        (MODES["RGB"], ["-"]),
        (MODES["RGB"][:40], ["-"]),  # no image any more, but no text either
        (b"P3 1 1 255 9 9 9", ["-"]),  # an image that is text
    ],
)
def test_standard_input(data, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "1.png").touch()
    monkeypatch.setattr(module.sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert [file.name for file in list_images(["-"])] == expected


def test_threads_keep_order_and_memory():
    taken = []

    def items():
        for number in range(100):
            taken.append(number)
            yield number

    def read(number):
        if number == 7:
            raise rj.DataError("seven")
        return np.full(1, number)

    results = in_threads(read, items(), ahead=16)
    first = next(results)
    assert len(taken) <= 16 + 4
    found = [first, *results]
    assert isinstance(found[7], rj.DataError)
    assert [int(each[0]) for each in found[:7] + found[8:]] == [*range(7), *range(8, 100)]
