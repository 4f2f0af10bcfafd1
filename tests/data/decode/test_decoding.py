"""Decoding and cropping: Pillow's pixels in evaluation, fair and close crops in training."""

from __future__ import annotations

import io
import struct
import tracemalloc
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

from resnet_jax.config.schema import Data
from resnet_jax.data.decode import crop as crop_module
from resnet_jax.data.decode import decode, eval_crop, jpeg, reading, train_crop
from resnet_jax.data.decode import pixels as pixels_module
from resnet_jax.data.decode.orientation import AS_STORED, orientation_from_tag
from resnet_jax.data.decode.resize import resize_to_square
from resnet_jax.errors import DataError
from tests.data.photos import bombs

FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Noise with the 1 / f amplitudes of photos, mostly in luma."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None])
    frequency[0, 0] = 1.0
    spectra = np.fft.fft2(rng.normal(size=(4, height, width))) / frequency**1.2
    spectra[:, 0, 0] = 0.0
    planes = np.fft.ifft2(spectra).real
    planes *= np.array([45, 15, 15, 15])[:, None, None] / (planes.std((1, 2), keepdims=True) + 1e-9)
    pixels = 128 + planes[0] + planes[1:]
    return Image.fromarray(pixels.transpose(1, 2, 0).clip(0, 255).astype(np.uint8))


def encode(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **({"quality": 90} if kind == "JPEG" else {}) | options)
    return file.getvalue()


def difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    assert a.shape == b.shape
    assert a.dtype == b.dtype == np.uint8
    return np.abs(a.astype(int) - b)


def decode_region(data: bytes, region: tuple[slice, slice], size: int) -> np.ndarray:
    """As a training crop of that size decodes it."""
    shrink = crop_module._largest_shrink(region, size)
    return pixels_module.decode_jpeg_region(data, jpeg.read_jpeg_header(data), 3, region, shrink)


@pytest.fixture(params=["simplejpeg", "pillow"])
def decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "pillow":
        monkeypatch.setattr(jpeg, "simplejpeg", None)
    elif jpeg.simplejpeg is None:
        pytest.skip("simplejpeg is not installed")
    return request.param


def test_a_region_of_a_jpeg_with_several_pictures(decoder):
    """As some cameras write them; Pillow has another name for the format."""
    image = photo(320, 240)
    options = {"quality": 90, "save_all": True, "append_images": [image.rotate(180)]}
    region = slice(80, 240), slice(160, 320)
    found = decode_region(encode(image, "MPO", **options), region, 32)
    assert difference(found, decode_region(encode(image), region, 32)).max() <= 2


# Evaluation.


def torchvision_crop(image: Image.Image, shorter: int, size: int, kind: str) -> np.ndarray:
    """Resize(shorter) and CenterCrop(size) as torchvision's source has them."""
    w, h = image.size
    short, long = (w, h) if w <= h else (h, w)
    long = int(shorter * long / short)
    image = image.resize((shorter, long) if w <= h else (long, shorter), FILTERS[kind])
    top = round((image.height - size) / 2.0)
    left = round((image.width - size) / 2.0)
    return np.asarray(image.crop((left, top, left + size, top + size)))


@pytest.mark.parametrize("kind", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    "sides", [(500, 375), (375, 500), (333, 333), (161, 97), (1024, 301), (257, 400)]
)
@pytest.mark.parametrize(("shorter", "size"), [(256, 224), (0, 96), (235, 224)])
def test_eval_is_torchvisions(decoder, sides, kind, shorter, size):
    data = encode(photo(*sides))
    config = Data(eval_resize=shorter, eval_size=size, interpolation=kind)
    expected = torchvision_crop(Image.open(io.BytesIO(data)), shorter or size, size, kind)
    assert difference(eval_crop(data, config, 3), expected).max() <= 2


def test_eval_of_grey_is_pillows():
    image = photo(300, 200).convert("L")
    config = Data(eval_resize=128, eval_size=112, interpolation="bicubic")
    expected = torchvision_crop(image, 128, 112, "bicubic")[:, :, None]
    assert difference(eval_crop(encode(image, "PNG"), config, 1), expected).max() == 0


def test_eval_falls_back_on_image_size():
    data = encode(photo(90, 70))
    assert eval_crop(data, Data(image_size=48), 3).shape == (48, 48, 3)


@pytest.mark.parametrize("crop", ["center", "random_resized", "scale_jitter"])
def test_the_right_size_passes_unchanged(crop):
    image = photo(32, 32)
    config = Data(
        crop=crop, crop_area=(1.0, 1.0), crop_ratio=(1.0, 1.0), jitter_sides=(32, 32), image_size=32
    )
    data = encode(image, "PNG")
    rng = np.random.default_rng(0)
    assert difference(train_crop(data, config, 3, rng), np.asarray(image)).max() == 0
    assert difference(eval_crop(data, config, 3), np.asarray(image)).max() == 0


def test_a_shorter_side_of_the_right_length_is_only_cut():
    image = photo(50, 33)
    pixels = eval_crop(encode(image, "PNG"), Data(eval_resize=33, eval_size=32), 3)
    assert difference(pixels, np.asarray(image)[0:32, 9:41]).max() == 0


def test_center_is_evaluations_geometry():
    data = encode(photo(120, 90))
    a = train_crop(data, Data(crop="center", image_size=64), 3, np.random.default_rng(0))
    assert difference(a, eval_crop(data, Data(eval_size=64), 3)).max() == 0


@pytest.mark.parametrize("kind", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("resized", "size"), [(0, 64), (71, 64)])
@pytest.mark.parametrize("sides", [(120, 90), (64, 64), (40, 300), (71, 71)])
def test_squashed_images_keep_all_of_the_image(sides, resized, size, kind):
    """Timm's crop_mode "squash": both sides become `eval_resize`, then the centre is cut."""
    image, side = photo(*sides), resized or size
    config = Data(eval_size=size, eval_resize=resized, eval_crop="squash", interpolation=kind)
    left = round((side - size) / 2)
    expected = np.asarray(image.resize((side, side), FILTERS[kind]))
    expected = expected[left : left + size, left : left + size]
    found = eval_crop(encode(image, "PNG"), config, 3)
    assert difference(found, expected).max() == 0
    assert found.flags.c_contiguous


def test_a_strip_can_be_squashed():
    strip = encode(Image.new("RGB", (20_000, 10), (9, 9, 9)), "PNG")
    found = eval_crop(strip, Data(eval_size=32, eval_crop="squash"), 3)
    assert found.shape == (32, 32, 3)
    assert found.min() == found.max() == 9


# Orientation.

KINDS = {"JPEG": {"quality": 95}, "PNG": {}, "WEBP": {"lossless": True}, "TIFF": {}}


def tagged(kind: str, orientation: int) -> tuple[bytes, Image.Image]:
    """An encoded photo with that tag, and the photo as it is to be seen."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    # Smooth, because a JPEG may be decoded at half its size.
    smooth = photo(20, 15).resize((150, 110), Image.Resampling.BICUBIC)
    data = encode(smooth, kind, exif=exif, **KINDS[kind])
    with Image.open(io.BytesIO(data)) as image:
        return data, ImageOps.exif_transpose(image)


@pytest.mark.parametrize("crop", ["eval", "squash", "center", "random_resized", "scale_jitter"])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", KINDS)
def test_upright_images_are_those_that_were_turned_before(decoder, kind, orientation, crop):
    data, seen = tagged(kind, orientation)
    training = crop not in ("eval", "squash")
    config = Data(
        image_size=48,
        crop=crop if training else "center",
        eval_crop="squash" if crop == "squash" else "center",
        jitter_sides=(50, 70),
        upright=True,
    )

    def cropped(encoded: bytes) -> np.ndarray:
        if training:
            return train_crop(encoded, config, 3, np.random.default_rng(orientation))
        return eval_crop(encoded, config, 3)

    found, expected = cropped(data), cropped(encode(seen, "PNG"))
    # Half sizes move a JPEG's edges by up to a pixel, turned or not; a wrong turn makes it 30.
    assert difference(found, expected).mean() <= (6 if kind == "JPEG" else 0)
    assert found.flags.c_contiguous


def test_images_are_taken_as_stored_by_default(decoder):
    data, seen = tagged("JPEG", 6)
    stored = encode(seen.transpose(Image.Transpose.ROTATE_90), "PNG")
    for config in (Data(image_size=48), Data(image_size=48, crop="random_resized")):
        assert difference(eval_crop(data, config, 3), eval_crop(stored, config, 3)).mean() <= 3
        found, expected = (
            train_crop(each, config, 3, np.random.default_rng(0)) for each in (data, stored)
        )
        assert difference(found, expected).mean() <= 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_regions_are_found_in_the_stored_image(orientation):
    turn = orientation_from_tag(orientation)
    stored = np.arange(7 * 5).reshape(7, 5, 1)
    seen = turn.apply(stored)
    assert seen.shape[:2] == turn.upright_size(7, 5)
    region = (slice(1, 3), slice(2, 5))
    part = turn.apply(stored[turn.stored_region(region, 7, 5)])
    np.testing.assert_array_equal(part, seen[region])


@pytest.mark.parametrize("value", [0, 9, -1, 2**40, "6", None, 6.0])
def test_strange_tags_turn_nothing(value):
    assert orientation_from_tag(value) == AS_STORED


# Random crops. An image whose red is the column and green the row tells where a crop was.


def ramps(width: int, height: int) -> bytes:
    rows, columns = np.mgrid[:height, :width].astype(np.uint8)
    return encode(Image.fromarray(np.stack([columns, rows, 0 * rows], -1)), "PNG")


def extent(pixels: np.ndarray) -> tuple[float, float, float, float]:
    """Left, top, width and height of the crop of `ramps` that was resized to these pixels."""
    size = pixels.shape[0]
    row, column = pixels[:, size // 2, 1].astype(float), pixels[size // 2, :, 0].astype(float)
    # The middle half, because filters bend the line at the borders.
    middle = slice(size // 4, size - size // 4)
    at = np.arange(size)[middle] + 0.5
    (down, top), (across, left) = (np.polyfit(at, x[middle], 1) for x in (row, column))
    return left + 0.5, top + 0.5, across * size, down * size


def test_random_resized_areas_and_ratios():
    data, total = ramps(250, 200), 250 * 200
    config = Data(crop="random_resized", image_size=64)
    rng = np.random.default_rng(1)
    found = np.array([extent(train_crop(data, config, 3, rng)) for _ in range(400)])
    left, top, width, height = found.T
    assert (left > -1).all()
    assert (top > -1).all()
    assert (left + width < 251).all()
    assert (top + height < 201).all()
    areas, ratios = width * height / total, width / height
    # Sides are whole pixels, the smallest about 55: 2% of area and ratio.
    assert areas.min() > 0.08 * 0.97
    assert areas.max() < 1.01
    assert areas.min() < 0.12
    assert areas.max() > 0.85
    assert ratios.min() > 3 / 4 * 0.97
    assert ratios.max() < 4 / 3 * 1.03
    assert abs(np.log(ratios).mean()) < 0.05  # as often wide as tall
    assert 0.42 < areas.mean() < 0.54  # of 0.08 to 1 without those that do not fit


def test_random_resized_draws_are_torchvisions():
    """The region's law, against the same algorithm written out over many draws."""
    config = Data(crop="random_resized", crop_area=(0.2, 0.5), crop_ratio=(0.5, 1.5))
    rng = np.random.default_rng(0)
    for _ in range(2000):
        rows, columns = crop_module._random_region(60, 90, config, rng)
        h, w = rows.stop - rows.start, columns.stop - columns.start
        assert min(rows.start, 60 - rows.stop, columns.start, 90 - columns.stop) >= 0
        assert 0.2 - 0.01 <= h * w / 5400 <= 0.5 + 0.01
        assert 0.5 - 0.03 <= w / h <= 1.5 + 0.03


@pytest.mark.parametrize(
    ("sides", "expected"),
    [
        ((400, 30), (slice(0, 30), slice(180, 220))),  # too wide: 30 x 40 at ratio 4 / 3
        ((30, 400), (slice(180, 220), slice(0, 30))),  # too tall
    ],
)
def test_random_resized_falls_back_on_the_centre(sides, expected):
    width, height = sides
    config = Data(crop_area=(0.9, 1.0))
    assert crop_module._random_region(height, width, config, np.random.default_rng(0)) == expected


@pytest.mark.parametrize("crop", ["random_resized", "scale_jitter"])
def test_crops_follow_the_generator(crop):
    data = encode(photo(200, 150))
    config = Data(crop=crop, image_size=48, jitter_sides=(64, 96))
    first, again, other = (
        train_crop(data, config, 3, np.random.default_rng(seed)) for seed in (0, 0, 1)
    )
    assert difference(first, again).max() == 0
    assert difference(first, other).max() > 0


def test_scale_jitter_sides():
    data = ramps(250, 200)
    config = Data(crop="scale_jitter", image_size=64, jitter_sides=(80, 160))
    rng = np.random.default_rng(2)
    found = np.array([extent(train_crop(data, config, 3, rng)) for _ in range(300)])
    left, top, width, height = found.T
    shorter = 64 * 200 / height
    assert np.abs(width / height - 1).max() < 0.04
    assert shorter.min() > 79
    assert shorter.max() < 163
    assert shorter.min() < 84
    assert shorter.max() > 155
    assert abs(shorter.mean() - 120) < 5
    assert left.min() < 10
    assert (left + width).max() > 240
    assert top.min() < 10
    assert (top + height).max() > 190


def test_scale_jitter_is_resize_then_cut():
    image = photo(120, 96)
    config = Data(crop="scale_jitter", image_size=48, jitter_sides=(60, 60))
    pixels = train_crop(encode(image, "PNG"), config, 3, np.random.default_rng(5))
    whole = np.asarray(image.resize((75, 60), FILTERS["bilinear"]))
    windows = np.lib.stride_tricks.sliding_window_view(whole, (48, 48, 3))[:, :, 0]
    found = np.sort(np.abs(windows.astype(int) - pixels).mean((2, 3, 4)).ravel())
    assert found[0] < 0.7 * found[1]  # one window and no other


def test_tiny_images_and_extreme_shapes():
    rng = np.random.default_rng(0)
    for sides in ((1, 1), (1, 90), (90, 1), (7, 5), (3, 300)):
        for kind in ("PNG", "JPEG"):
            data = encode(Image.new("RGB", sides, (200, 30, 60)), kind)
            for crop in ("random_resized", "scale_jitter", "center"):
                config = Data(crop=crop, image_size=32, jitter_sides=(32, 40))
                pixels = train_crop(data, config, 3, rng)
                assert difference(pixels, np.full_like(pixels, (200, 30, 60))).max() <= 4


# Antialiasing and scaled decoding.


@pytest.mark.parametrize("kind", ["bilinear", "bicubic"])
@pytest.mark.parametrize("shrink", [0.6, 1.3, 1.9, 3.0])
def test_training_resize_is_close_to_pillows(kind, shrink):
    image = photo(round(160 * shrink), round(128 * shrink))
    ours = resize_to_square(np.asarray(image), 112, kind)
    pillows = np.asarray(image.resize((112, 112), FILTERS[kind]))
    # Mean of 255 levels.
    assert difference(ours, pillows).mean() < 2


def test_training_crops_are_antialiased():
    stripes = np.zeros((224, 224, 3), np.uint8)
    stripes[:, ::2] = 255
    pixels = resize_to_square(stripes, 100, "bilinear")
    assert difference(pixels, np.full_like(pixels, 128)).max() < 16  # aliased: 0 to 255


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("sampling", ["4:4:4", "4:2:2", "4:2:0"])
def test_regions_are_those_of_the_full_decode(decoder, progressive, sampling):
    """A smaller height in the header must not change a pixel above it, nor shift one."""
    data = encode(photo(211, 157), progressive=progressive, subsampling=sampling)
    header = jpeg.read_jpeg_header(data)
    full = decode(data, 3)
    for top, bottom in ((0, 1), (3, 16), (20, 64), (100, 157), (0, 157)):
        region = (slice(top, bottom), slice(5, 190))
        part = decode_region(data, region, size=300)
        found = difference(part, full[region])
        # simplejpeg interpolates no color here (fastupsample), which 4:4:4 does not need.
        limit = 0 if decoder == "pillow" else 1.5 if sampling == "4:4:4" else 3.0
        assert found.mean() <= limit
        if decoder == "simplejpeg":
            exact = jpeg.decode_jpeg(data, header, 3, min(157, bottom + 1), 1, exact=True)
            assert difference(exact[top:bottom], full[top:bottom]).max() == 0


@pytest.mark.parametrize("shrink", [2, 4, 8])
def test_scaled_decoding_is_close_to_the_full_decode(decoder, shrink):
    side = 72 * shrink
    data = encode(photo(side + 45, side + 21))
    # On whole pixels of the scaled image, to which other regions are rounded.
    region = (slice(8, 8 + side), slice(16, 16 + side))
    part = decode_region(data, region, size=64)
    assert part.shape == (72, 72, 3)
    scaled = resize_to_square(part, 64, "bicubic")
    full = resize_to_square(decode(data, 3)[region], 64, "bicubic")
    # The blocks' low-pass against a triangle: 1 to 2 levels in photos, as the mean of the pixels
    # is; a shift by one pixel of the result gives 8 and more.
    assert difference(scaled, full).mean() < 3.5
    assert difference(scaled, np.roll(full, 1, axis=1)).mean() > 7


@pytest.mark.parametrize(("side", "shrink"), [(127, 1), (128, 2), (255, 2), (256, 4), (600, 8)])
def test_scaled_decoding_leaves_enough_pixels(decoder, side, shrink):
    data = encode(photo(640, 610))
    region = (slice(3, 3 + side), slice(1, 1 + side + 9))
    part = decode_region(data, region, size=64)
    assert abs(part.shape[0] - side / shrink) <= 1
    assert min(part.shape[:2]) >= 63  # 64 but for the rounding of the edges


# Kinds of image.


def test_modes_become_rgb_and_grey(decoder):
    image = photo(40, 30)
    rgb, grey = np.asarray(image), np.asarray(image.convert("L"))[:, :, None]
    clear = image.copy()
    clear.putalpha(Image.fromarray(np.full((30, 40), 9, np.uint8)))
    deep = Image.fromarray(grey[:, :, 0].astype(np.uint16) * 257)
    cases = {
        "grey": (encode(image.convert("L"), "PNG"), grey.repeat(3, -1), grey),
        "alpha": (encode(clear, "PNG"), rgb, grey),
        "grey alpha": (encode(image.convert("LA"), "PNG"), grey.repeat(3, -1), grey),
        "16 bit": (encode(deep, "PNG"), grey.repeat(3, -1), grey),
        "webp": (encode(image, "WEBP", lossless=True), rgb, grey),
    }
    for name, (data, in_color, in_gray) in cases.items():
        assert difference(decode(data, 3), in_color).max() == 0, name
        assert difference(decode(data, 1), in_gray).max() <= 1, name


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_palettes(kind):
    image = photo(40, 30).quantize(32)
    data = encode(image, kind, transparency=3)
    colors = np.array(image.getpalette()).reshape(-1, 3).astype(np.uint8)
    assert difference(decode(data, 3), colors[np.asarray(image)]).max() == 0


def test_transparency_for_each_palette_entry():
    image = photo(40, 30).quantize(32)
    data = encode(image, "PNG", transparency=bytes(range(32)))
    assert difference(decode(data, 3), np.asarray(image.convert("RGB"))).max() == 0


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (decode(data, 3) == (255, 0, 0)).all()


def test_jpegs_of_all_kinds_are_pillows(decoder):
    image = photo(61, 47)
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn, which is not applied
    for data in (
        encode(image.convert("CMYK")),
        encode(image.convert("L")),
        encode(image, progressive=True),
        encode(image, exif=exif),
        encode(image, subsampling="4:4:4", restart_marker_blocks=2),
        encode(image, keep_rgb=True),
    ):
        pillows = Image.open(io.BytesIO(data))
        rgb, grey = (np.asarray(pillows.convert(mode)) for mode in ("RGB", "L"))
        assert difference(decode(data, 3), rgb).max() == 0
        # Grey is the luma that the file has, Pillow's is that of colors cut to [0, 255].
        assert difference(decode(data, 1), grey[:, :, None]).mean() < 1
        for crop in ("random_resized", "scale_jitter"):
            config = Data(crop=crop, image_size=16, jitter_sides=(20, 24))
            for channels in (1, 3):
                pixels = train_crop(data, config, channels, np.random.default_rng(0))
                assert pixels.shape == (16, 16, channels)


# Damage.


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "progressive"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 0.6, 0.95])
def test_cut_short(decoder, kind, share):
    progressive = {"progressive": True} if kind == "progressive" else {}
    whole = encode(photo(160, 120), "JPEG" if progressive else kind, **progressive)
    data = whole[: int(len(whole) * share)]
    for seed in range(4):
        config = Data(crop="random_resized", image_size=32)
        with pytest.raises(DataError, match=r"\w"):
            train_crop(data, config, 3, np.random.default_rng(seed))
    for channels in (1, 3):
        with pytest.raises(DataError, match=r"\w"):
            decode(data, channels)
    with pytest.raises(DataError, match=r"\w"):
        eval_crop(data, Data(eval_size=32), 3)


def test_an_end_in_the_middle(decoder):
    """A file cut short and closed again is grey below; Pillow alone does not see that."""
    whole = encode(photo(160, 120))
    data = whole[: len(whole) // 2] + b"\xff\xd9"
    if decoder == "pillow":
        pytest.skip("needs simplejpeg")
    with pytest.raises(DataError, match="premature end"):
        decode(data, 3)
    lower = (slice(80, 120), slice(0, 160))
    with pytest.raises(DataError, match="premature end"):
        decode_region(data, lower, 40)
    nearly = (slice(80, 110), slice(0, 160))
    with pytest.raises(DataError, match="premature end"):
        decode_region(data, nearly, 40)


@pytest.mark.parametrize(
    "data", [b"", b"\xff\xd8", b"\xff\xd8\xff\xda", b"no image", b"\x89PNG\r\n"]
)
def test_no_image(decoder, data):
    with pytest.raises(DataError, match="not a valid image"):
        decode(data, 3)


def test_damaged_png():
    data = bytearray(encode(photo(60, 40), "PNG"))
    at = data.index(b"IDAT") + 40
    data[at : at + 8] = b"\0" * 8
    with pytest.raises(DataError, match="not a valid image"):
        decode(bytes(data), 3)


def test_random_damage_is_an_error_or_an_image(decoder):
    """Whatever the bytes: never another exception, never another shape."""
    whole = encode(photo(80, 60))
    config = Data(crop="random_resized", image_size=16)
    rng = np.random.default_rng(0)
    for _ in range(300):
        data = bytearray(whole)
        for at in rng.integers(2, len(data) if rng.random() < 0.5 else 700, 4):
            data[at] = rng.integers(256)
        try:
            assert train_crop(bytes(data), config, 3, rng).shape == (16, 16, 3)
            assert decode(bytes(data), 3).ndim == 3
        except DataError:
            pass


def test_junk_after_the_end_is_no_damage(decoder):
    whole = encode(photo(80, 60))
    assert difference(decode(whole + b"junk", 3), decode(whole, 3)).max() == 0
    config = Data(crop="random_resized", image_size=16)
    for seed in range(5):
        a, b = (
            train_crop(data, config, 3, np.random.default_rng(seed))
            for data in (whole, whole + b"\0" * 50)
        )
        assert difference(a, b).max() == 0


def test_threads_do_not_disturb_each_other():
    files = [encode(photo(120, 90, seed)) for seed in range(4)]
    config = Data(crop="random_resized", image_size=32)

    def checksum(number: int) -> int:
        return zlib.crc32(train_crop(files[number % 4], config, 3, np.random.default_rng(number)))

    alone = [checksum(number) for number in range(64)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(checksum, range(64))) == alone


# Too many pixels.

BOMBS = bombs()
RANDOM = Data(crop="random_resized", image_size=16)
JITTERED = Data(crop="scale_jitter", image_size=16, jitter_sides=(20, 24))


@pytest.mark.parametrize("kind", BOMBS)
def test_bombs_take_no_memory(decoder, kind):
    rng = np.random.default_rng(0)
    tracemalloc.start()
    try:
        for call in (
            lambda data: decode(data, 3),
            lambda data: eval_crop(data, Data(eval_size=16), 3),
            lambda data: train_crop(data, Data(image_size=16), 3, rng),
            lambda data: train_crop(data, RANDOM, 3, rng),
            lambda data: train_crop(data, JITTERED, 1, rng),
        ):
            with pytest.raises(DataError, match="more than 200,000,000 pixels are not decoded"):
                call(BOMBS[kind])
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP"])
def test_the_limit_itself(decoder, kind, monkeypatch):
    data = encode(photo(30, 20), kind)
    monkeypatch.setattr(reading, "MAX_PIXELS", 600)
    assert decode(data, 3).shape == (20, 30, 3)
    monkeypatch.setattr(reading, "MAX_PIXELS", 599)
    with pytest.raises(DataError, match="30 x 20: more than 599 pixels"):
        decode(data, 3)


def test_strips_are_not_blown_up():
    """A few hundred bytes, within the limit until the short side has its length."""
    data = encode(Image.new("L", (1_000_000, 1)), "PNG")
    assert decode(data, 1).shape == (1, 1_000_000, 1)
    with pytest.raises(DataError, match=r": more than 200,000,000 pixels"):
        eval_crop(data, Data(eval_resize=256, eval_size=224), 1)
    with pytest.raises(DataError, match=r": more than 200,000,000 pixels"):
        train_crop(data, Data(image_size=224), 1, np.random.default_rng(0))
    assert train_crop(data, RANDOM, 1, np.random.default_rng(0)).shape == (16, 16, 1)


def test_pillow_does_not_warn():
    """Between its two limits it would, of an image that is fine here."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        reading._limit_pillow()
        with reading.open_image(io.BytesIO(b"P6 12000 12000 255\n")) as image:
            assert image.size == (12_000, 12_000)
    assert not told


def test_no_interpreter_is_started():
    """Pillow gives PostScript to Ghostscript, whatever the file is called."""
    data = encode(photo(20, 20), "EPS")
    with pytest.raises(DataError, match="unknown format"):
        decode(data, 3)


def test_pillow_does_not_warn_of_tags():
    """A tag that ends behind the file, in EXIF data, as phones and editors write them."""
    tags = struct.pack("<H", 2) + struct.pack("<HHLL", 274, 3, 1, 6)
    tags += struct.pack("<HHLL", 270, 2, 5000, 0x7FFFFF)
    file = io.BytesIO()
    photo(20, 10).save(file, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0" + tags)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert Image.open(file).getexif()[274] == 6
        assert told
        told.clear()
        reading._limit_pillow()
        assert Image.open(file).getexif()[274] == 6
    assert not told
