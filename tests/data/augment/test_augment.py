"""Augmentation against Pillow and plain NumPy, its distributions, and its draws on devices."""

import colorsys
import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from resnet_jax.config.schema import Augment
from resnet_jax.data.augment import apply, augment, check_channels, geometry, ops, policy
from resnet_jax.data.preprocessing import normalize
from resnet_jax.errors import ConfigError

HEIGHT, WIDTH, CLASSES = 20, 24, 7
COLORS = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
EVERYTHING = {
    "flip": True,
    "pad": 4,
    "rotate": 10.0,
    "rand_layers": 2,
    "brightness": 0.4,
    "contrast": 0.4,
    "saturation": 0.4,
    "hue": 0.1,
    "pca": 0.1,
    "erase": 0.5,
    "cutout": 5,
    "mixup": 0.2,
    "cutmix": 1.0,
}
WHOLE_LEVELS = ("flip", "pad", "erase", "cutout", "cutmix")
KEY = jax.random.key(0)


def photo(count=None, channels=3, height=HEIGHT, width=WIDTH, seed=0):
    """Smooth gradients under noise, not all levels in use."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(30, 180, width)[None, :, None] * np.linspace(0.5, 1, height)[:, None, None]
    noise = rng.integers(-20, 40, (count or 1, height, width, channels))
    images = np.clip(ramp + noise, 5, 230).astype(np.uint8)
    return images if count else images[0]


def pillow(image):
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def from_pillow(image):
    array = np.asarray(image, np.float32)
    return array if array.ndim == 3 else array[..., None]


@functools.cache
def jitted(config_items):
    config = Augment(**dict(config_items))
    return jax.jit(functools.partial(augment, config=config, num_classes=CLASSES))


def normalized(images, config):
    return normalize(images, config.mean, config.std)


def run(images, labels=None, key=KEY, first=0, **fields):
    labels = np.arange(len(images)) % CLASSES if labels is None else labels
    return jitted(tuple(fields.items()))(images, labels.astype(np.int32), key, first=first)


def without_normalization(images, **fields):
    """Images in 0..255 as they come out of everything before the normalization."""
    return np.asarray(run(images, mean=(0.0,), std=(1 / 255,), **fields)[0])


# Operations of RandAugment and TrivialAugment.

FILL = 99


def affine(*matrix):
    return lambda image, resample: image.transform(
        image.size, Image.AFFINE, matrix, resample=resample, fillcolor=fill_of(image)
    )


def fill_of(image):
    return FILL if image.mode == "L" else (FILL,) * 3


def solarize_add(image, added):
    return image.point(
        [min(i + added, 255) if i < 128 else i for i in range(256)] * len(image.getbands())
    )


# Name, value, Pillow's statement, and levels of tolerance: 1 where Pillow cuts fractions off.
TABLES_AND_BLENDS = [
    ("Identity", 0, lambda x: x, 0),
    ("AutoContrast", 0, ImageOps.autocontrast, 1),
    ("Equalize", 0, ImageOps.equalize, 0),
    ("Invert", 0, ImageOps.invert, 0),
    *(("Posterize", bits, lambda x, b=bits: ImageOps.posterize(x, b), 0) for bits in (1, 4, 8)),
    ("Posterize", 0, lambda x: x.point(lambda level: 0), 0),
    *(("Solarize", t, lambda x, t=t: ImageOps.solarize(x, t), 0) for t in (0, 100, 256)),
    ("SolarizeAdd", 90, lambda x: solarize_add(x, 90), 0),
    *(
        ("Brightness", f, lambda x, f=f: ImageEnhance.Brightness(x).enhance(f), 1)
        for f in (0.1, 1.9)
    ),
    *(("Contrast", f, lambda x, f=f: ImageEnhance.Contrast(x).enhance(f), 1) for f in (0.1, 1.9)),
    *(("Color", f, lambda x, f=f: ImageEnhance.Color(x).enhance(f), 1) for f in (0.1, 1.9)),
    *(("Sharpness", f, lambda x, f=f: ImageEnhance.Sharpness(x).enhance(f), 1) for f in (0.1, 1.9)),
]


def transform(image, operation, value, fill=0.0, nearest=False):
    return policy.transform(jnp.asarray(image, jnp.float32), operation, value, fill, nearest)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("name", "value", "reference", "atol"), TABLES_AND_BLENDS)
def test_levels_are_those_of_pillow(name, value, reference, atol, channels):
    # Large enough for `Equalize` to count several pixels a level.
    image = photo(channels=channels, height=48, width=40)
    expected = from_pillow(reference(pillow(image)))
    chex.assert_trees_all_close(np.asarray(transform(image, name, value)), expected, atol=atol)
    if name != "Identity" and (name, value) not in {("Posterize", 8), ("Solarize", 256)}:
        assert (channels == 1 and name == "Color") or np.abs(expected - image).max() > 5


@pytest.mark.parametrize(
    "image", [np.full((8, 8, 3), 7, np.uint8), np.eye(8, dtype=np.uint8)[..., None]]
)
@pytest.mark.parametrize("name", ["AutoContrast", "Equalize"])
def test_one_or_two_levels_are_stretched_as_pillow_does(name, image):
    reference = ImageOps.autocontrast if name == "AutoContrast" else ImageOps.equalize
    expected = from_pillow(reference(pillow(image)))
    chex.assert_trees_all_equal(np.asarray(transform(image, name, 0.0)), expected)


AFFINE = [
    ("ShearX", 0.3, affine(1, 0.3, 0, 0, 1, 0)),
    ("ShearY", -0.99, affine(1, 0, 0, -0.99, 1, 0)),
    ("TranslateX", 5.0, affine(1, 0, 5, 0, 1, 0)),
    ("TranslateY", -3.0, affine(1, 0, 0, 0, 1, -3)),
    ("TranslateXRel", 0.43, affine(1, 0, 0.43 * WIDTH, 0, 1, 0)),
    ("TranslateYRel", -0.2, affine(1, 0, 0, 0, 1, -0.2 * HEIGHT)),
    *(
        ("Rotate", a, lambda x, r, a=a: x.rotate(a, resample=r, fillcolor=fill_of(x)))
        for a in (27.0, -130.0)
    ),
]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("nearest", [False, True])
@pytest.mark.parametrize(("name", "value", "reference"), AFFINE)
def test_warps_are_those_of_pillow(name, value, reference, nearest, channels):
    image = photo(channels=channels)
    resample = Image.NEAREST if nearest else Image.BILINEAR
    expected = from_pillow(reference(pillow(image), resample))
    difference = np.abs(np.asarray(transform(image, name, value, FILL, nearest)) - expected)
    # Pillow cuts fractions off, and in fixed point the nearest pixel is now and then another.
    assert (difference <= (0 if nearest else 1)).all(-1).mean() > 0.99
    assert (np.abs(expected - image) > 5).mean() > 0.3


def test_magnitudes_are_those_of_timm():
    plus, minus = (
        {
            name: float(value(jnp.float32(0.9), sign))
            for name, value in policy.RAND_OPERATIONS.items()
        }
        for sign in (1.0, -1.0)
    )
    for name in ("Color", "Contrast", "Brightness", "Sharpness"):
        assert (plus[name], minus[name]) == pytest.approx((1.81, 0.19))
    for name, largest in (("Rotate", 30), ("ShearX", 0.3), ("TranslateYRel", 0.45)):
        assert (plus[name], minus[name]) == pytest.approx((0.9 * largest, -0.9 * largest))
    assert (plus["Posterize"], plus["Solarize"], plus["SolarizeAdd"]) == (1, 26, 99)
    assert len(policy.RAND_OPERATIONS) == 15 + 1


def test_magnitudes_are_those_of_torchvision():
    values = {
        name: value(jnp.float32(7 / 30), -1.0) for name, value in policy.TRIVIAL_OPERATIONS.items()
    }
    assert values["TranslateX"] == -7  # int(-32 * 7 / 30)
    assert values["Posterize"] == 8 - round(7 / 5)
    assert values["Solarize"] == pytest.approx(255 - 255 * 7 / 30)
    assert values["Rotate"] == pytest.approx(-135 * 7 / 30)
    assert values["Brightness"] == pytest.approx(1 - 0.99 * 7 / 30)
    assert len(policy.TRIVIAL_OPERATIONS) == 14


def kinds(originals, results, fill):
    """How often the result is a given one of the operations that need no value."""
    names = ("Identity", "Invert", "AutoContrast", "Equalize")
    known = {
        name: jax.vmap(lambda x, n=name: transform(x, n, 0.0, fill))(originals) for name in names
    }
    return {name: float((results == known[name]).all((1, 2, 3)).mean()) for name in names}


RAND = {"rand_layers": 1, "rand_magnitude": 9.0, "rand_magnitude_std": 0.5}
TRIVIAL = {"trivial": True}


def augmented_800(policy_fields, first=0, originals=None):
    """Many images through the whole pipeline with a policy; each policy is compiled once."""
    images = photo(1, height=17, width=17).repeat(800, axis=0) if originals is None else originals
    return without_normalization(images, first=first, **policy_fields).round(), images


def test_rand_augment_draws_each_operation_as_often():
    results, images = augmented_800(RAND)
    shares = kinds(images.astype(np.float32), results, 0.0)
    # Half stay as they are; four standard deviations of 800 draws.
    assert shares["Identity"] == pytest.approx(0.5, abs=0.071)
    for name in ("Invert", "AutoContrast", "Equalize"):
        assert shares[name] == pytest.approx(1 / 30, abs=0.026)


def test_trivial_augment_draws_each_operation_as_often():
    results, images = augmented_800(TRIVIAL)
    shares = kinds(images.astype(np.float32), results, 0.0)
    # The identity, a 1/31 of the eight others with a magnitude of 0, 3/31 of Posterize (8 bits:
    # magnitudes 0 to 2), and translations by less than a pixel.
    expected = (1 + 8 / 31 + 3 / 31) / 14
    assert shares["Identity"] == pytest.approx(expected, abs=0.043)
    for name in ("AutoContrast", "Equalize"):
        assert shares[name] == pytest.approx(1 / 14, abs=0.037)
    # Solarize with a threshold of 0.
    assert shares["Invert"] == pytest.approx(1 / 31 / 14, abs=0.007)


@pytest.mark.parametrize("policy_fields", [RAND, TRIVIAL], ids=["rand", "trivial"])
def test_policies_depend_on_the_place_in_the_whole_batch(policy_fields):
    """Exactly so: neither on the device's other images nor on the place among them."""
    images = photo(800 + 150, height=17, width=17)
    results, _ = augmented_800(policy_fields, 32, images[:800])
    later, _ = augmented_800(policy_fields, 32 + 150, images[150:])
    np.testing.assert_array_equal(results[150:], later[:-150])
    elsewhere, _ = augmented_800(policy_fields, 0, images[:800])
    assert (elsewhere != results).any((1, 2, 3)).mean() > 0.5


# Formulas for accelerators.


@pytest.fixture
def formulas_of(monkeypatch):
    """Has another platform's formulas run here."""

    def choose(platform):
        monkeypatch.setattr(
            jax.lax,
            "platform_dependent",
            lambda *args, default, **formulas: formulas.get(platform, default)(
                *map(jnp.asarray, args)
            ),
        )

    return choose


VALUES = {
    **dict.fromkeys(policy.EDITS, 0.7),
    **{"Posterize": 3.0, "Solarize": 100.0, "SolarizeAdd": 50.0, "Rotate": -130.0, "ShearX": 0.99},
    **{"ShearY": -0.99, "TranslateX": 3.3, "TranslateY": -2.0},
}


# Operations whose formulas other ones have too.
LIKE_OTHERS = ("ShearY", "TranslateX", "TranslateY", "TranslateYRel", "SolarizeAdd", "Invert")


@pytest.mark.parametrize("shape", [(33, 17, 3), pytest.param((5, 7, 1), marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "operation",
    [
        pytest.param(name, marks=pytest.mark.slow if name in LIKE_OTHERS else [])
        for name in policy.EDITS
    ],
)
def test_operations_are_equal_on_all_platforms(operation, shape, formulas_of):
    image = jnp.asarray(np.random.default_rng(0).integers(0, 256, shape), jnp.float32)
    value, fill = VALUES[operation], jnp.arange(99.5, 99.5 + shape[-1])
    moves = policy.EDITS[operation](image, jnp.float32(value)).matrix[0, 1:].any()
    for nearest in (False, True) if moves else (False,):
        results = []
        for platform in ("cpu", "cuda", "tpu"):
            formulas_of(platform)
            # One operation after another: fused, places of pixels are rounded differently.
            with jax.disable_jit():
                results.append(policy.transform(image, operation, value, fill, nearest))
        chex.assert_trees_all_equal(*results)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (33, 17, 3), (64, 65, 1)])
def test_histograms_and_look_ups(platform, shape, formulas_of):
    formulas_of(platform)
    rng = np.random.default_rng(0)
    image, table = rng.integers(0, 256, shape), rng.integers(0, 256, (256, shape[-1]))
    image.flat[:: image.size // 3 + 1] = 255
    counts = [np.bincount(channel.ravel(), minlength=256) for channel in image.T]
    image = image.astype(np.float32)
    found = np.asarray(ops.histogram(image)), np.asarray(ops.look_up(image, np.float32(table)))
    chex.assert_trees_all_equal(found[0], np.stack(counts, 1).astype(np.int32))
    expected = np.take_along_axis(table[None], image.astype(int).reshape(1, -1, shape[-1]), 1)
    chex.assert_trees_all_equal(found[1], expected.reshape(shape).astype(np.float32))


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_crops_on_all_platforms(platform, formulas_of):
    formulas_of(platform)
    test_crops_of_the_padded_image()


def test_a_warp_of_fractions_is_equal_on_all_platforms(formulas_of):
    image = np.random.default_rng(0).normal(100, 50, (33, 17, 3)).astype(np.float32)
    results = []
    for platform in ("cpu", "tpu"):
        formulas_of(platform)
        with jax.disable_jit():
            results.append(
                geometry.warp(image, geometry.rotation(30.0, 33, 17), np.float32([1, 2, 3]))
            )
    chex.assert_trees_all_equal(*results)


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
@pytest.mark.parametrize("count", [1, 3, 5, 10])
def test_functions_are_applied_where_needed(count, platform, formulas_of, monkeypatch):
    formulas_of(platform)
    monkeypatch.setattr(ops, "GROUP", 6)  # three images of two numbers
    values = np.arange(1.0, 2 * count + 1, dtype=np.float32).reshape(count, 2)
    factors = np.arange(count, dtype=np.float32) + 2
    for number in {0, 1, count // 2, count}:
        needed = np.random.default_rng(count).permutation(count) < number
        chosen = np.where(needed, factors, 1)
        results = ops.apply_where_needed(jnp.multiply, needed, values, chosen)
        chex.assert_trees_all_equal(np.asarray(results), values * chosen[:, None])


@functools.cache
def lowered(platform, field_items):
    config = Augment(**dict(field_items))
    step = functools.partial(augment, config=config, num_classes=CLASSES)
    trace = jax.jit(step).trace(jnp.asarray(photo(16)), jnp.arange(16), KEY)
    return trace.lower(lowering_platforms=(platform,)).as_text()


def pixels_one_by_one(program):
    """Gathers and scatters at more places than there are images."""
    pattern = r"stablehlo\.(?:gather|scatter).*?: \((tensor<\S+>), tensor<([\dx]*)x?i32>"
    found = re.findall(pattern, program, flags=re.DOTALL)
    assert found
    places = [np.prod([int(n) for n in sizes.split("x") if n][:-1]) for _, sizes in found]
    return sum(number > 16 for number in places)


POLICIES = [{"rand_layers": 1}, {"trivial": True}]


@pytest.mark.parametrize("fields", [*POLICIES, {"pad": 4, "rotate": 10.0}])
def test_a_tpu_gathers_no_single_pixels(fields):
    assert pixels_one_by_one(lowered("tpu", tuple(fields.items()))) == 0
    assert pixels_one_by_one(lowered("cuda", tuple(fields.items()))) > 0


@pytest.mark.parametrize("fields", [*POLICIES, {"pad": 4, "rotate": 10.0}])
def test_products_do_not_depend_on_the_platforms_precision(fields):
    """By default a TPU rounds the float32 operands of a product to bfloat16."""
    products = re.findall(r"stablehlo\.dot_general.*", lowered("tpu", tuple(fields.items())))
    assert products
    for line in products:
        operands = line.split(" : (")[1].split(" -> ")[0]
        assert "f32" not in operands.replace("bf16", "") or "[HIGHEST, HIGHEST]" in line


# The other transforms, with what was drawn made explicit.


def test_crops_of_the_padded_image():
    image, fill = photo(), np.float32([1, 2, 3])
    padded = np.broadcast_to(fill, (HEIGHT + 8, WIDTH + 8, 3)).copy()
    padded[4:-4, 4:-4] = image
    for top, left in ((0, 0), (8, 3), (4, 4)):
        window = padded[top : top + HEIGHT, left : left + WIDTH]
        chex.assert_trees_all_equal(
            np.asarray(geometry.pad_and_crop(image, 4, top, left, fill)), window
        )


@pytest.mark.parametrize("channels", [1, 3])
def test_contrast_and_saturation(channels):
    image = photo(channels=channels).astype(np.float32)
    weights = np.float32([0.299, 0.587, 0.114] if channels == 3 else [1])
    grey = (image * weights).sum(-1, keepdims=True)
    for factor in (0.3, 1.7):
        blended = [
            np.clip(factor * image + (1 - factor) * other, 0, 255) for other in (grey.mean(), grey)
        ]
        ours = ops.adjust_contrast(image, factor), ops.blend(image, ops.luma(image), factor)
        chex.assert_trees_all_close([*map(np.asarray, ours)], blended, atol=1e-3)


@pytest.mark.parametrize("shift", [-0.5, -0.1, 0.0, 0.25])
def test_hue_turns_the_circle(shift):
    image = photo(height=8, width=8)
    image[0, 0], image[0, 1] = (9, 9, 9), (0, 0, 0)  # no hue

    def turn(pixel):
        hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
        return colorsys.hsv_to_rgb((hue + shift) % 1, saturation, value)

    expected = np.apply_along_axis(turn, -1, image / 255) * 255
    ours = np.asarray(ops.adjust_hue(image.astype(np.float32), shift))
    chex.assert_trees_all_close(ours, expected.astype(np.float32), atol=1e-2)


def test_color_shift():
    image, weights = photo().astype(np.float32), np.float32([0.1, -0.2, 0.05])
    shift = 255 * np.float32(ops.PCA_VECTORS) @ (np.float32(ops.PCA_VALUES) * weights)
    chex.assert_trees_all_close(
        np.asarray(ops.shift_colors(image, weights)), image + shift, atol=1e-3
    )
    # Eigenvectors are orthogonal and have length 1, up to the four published digits.
    vectors = np.array(ops.PCA_VECTORS)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(3), atol=1e-3)


@pytest.mark.parametrize(
    ("top", "left", "height", "width"), [(2, 3, 4, 5), (-2, 20, 4, 9), (18, -1, 9, 3)]
)
def test_boxes_are_cut_off_at_the_border(top, left, height, width):
    expected = np.zeros((HEIGHT, WIDTH), bool)
    expected[max(top, 0) : top + height, max(left, 0) : left + width] = True
    chex.assert_trees_all_equal(
        np.asarray(ops.box((HEIGHT, WIDTH), top, left, height, width)), expected
    )


# Distributions, through the whole pipeline.


def test_half_of_the_images_are_mirrored():
    images = photo(400)
    results = without_normalization(images, flip=True)
    kept, mirrored = ((results.round() == x).all((1, 2, 3)) for x in (images, images[:, :, ::-1]))
    assert (kept ^ mirrored).all()
    assert mirrored.mean() == pytest.approx(0.5, abs=0.1)  # four standard deviations


@pytest.mark.parametrize("channels", [1, 3])
def test_shifts_are_uniform_and_the_border_is_the_mean_color(channels):
    colors = COLORS if channels == 3 else {}
    images = np.full((400, HEIGHT, WIDTH, channels), 255, np.uint8)
    results, _ = run(images, pad=2, **colors)
    inside = (np.asarray(results) != 0).all(-1)
    white = normalized(images[:1, :1, :1], Augment(**colors))[0, 0, 0]
    assert (np.asarray(results)[inside] == white).all()
    # Where the first and the last row and column of the border lie: -2 to 2, each way.
    down = inside.any(2).argmax(1) - inside.any(2)[:, ::-1].argmax(1)
    right = inside.any(1).argmax(1) - inside.any(1)[:, ::-1].argmax(1)
    for shifts in (down, right):
        values, counts = np.unique(shifts, return_counts=True)
        assert values.tolist() == [-2, -1, 0, 1, 2]
        assert counts / 400 == pytest.approx(0.2, abs=0.08)
    assert abs(np.corrcoef(down, right)[0, 1]) < 0.2


def test_rotations_stay_within_their_limit_and_fill_with_the_mean_color():
    images = np.zeros((200, 21, 21, 3), np.uint8)
    images[:, 10, 13:] = 255  # a hand that points right
    results = without_normalization(images, rotate=90.0)
    rows, columns = np.mgrid[:21, :21] - 10
    weights = results[..., 0] / results[..., 0].sum((1, 2), keepdims=True)
    angles = np.degrees(np.arctan2(-(weights * rows).sum((1, 2)), (weights * columns).sum((1, 2))))
    assert -90.5 <= angles.min() < -80
    assert 80 < angles.max() <= 90.5
    assert np.mean(angles) == pytest.approx(0, abs=4 * 52 / 200**0.5)  # sigma of +-90: 52
    white = np.full((8, HEIGHT, WIDTH, 3), 255, np.uint8)
    corners = np.asarray(run(white, rotate=90.0, **COLORS)[0])
    assert (np.abs(corners).min((1, 2, 3)) < 1e-5).all()


def test_erased_boxes():
    images = np.full((400, 32, 32, 3), 255, np.uint8)
    results = np.asarray(run(images, erase=0.4)[0])
    erased = (results == 0).all(-1)
    assert (results[~erased] == 2.0).all()
    area = erased.mean((1, 2))[erased.any((1, 2))]
    assert len(area) / 400 == pytest.approx(0.4, abs=0.1)
    # Rounding of sides to whole pixels: half a pixel of at least two.
    assert 0.015 < area.min() < 0.05
    assert 0.28 < area.max() < 0.345
    assert area.mean() == pytest.approx(0.175, abs=4 * 0.09 / len(area) ** 0.5)
    height, width = erased.any(2).sum(1), erased.any(1).sum(1)
    assert (height * width == erased.sum((1, 2))).all()  # one box each
    assert (height > width).sum() == pytest.approx((height < width).sum(), abs=55)


def test_cutout_keeps_its_side_and_is_cut_off_at_the_border():
    images = np.full((400, HEIGHT, WIDTH, 1), 255, np.uint8)
    erased = np.asarray(run(images, cutout=5)[0])[..., 0] == 0
    height, width = erased.any(2).sum(1), erased.any(1).sum(1)
    assert (height * width == erased.sum((1, 2))).all()
    # The centre is uniform: 2 of the rows at each end leave 3 or 4 rows.
    assert sorted(set(height)) == [3, 4, 5]
    assert (height == 5).mean() == pytest.approx(1 - 4 / HEIGHT, abs=0.08)
    assert (width == 5).mean() == pytest.approx(1 - 4 / WIDTH, abs=0.075)


@pytest.mark.parametrize(
    ("field", "value", "low", "high"),
    [("brightness", 0.4, 0.6, 1.4), ("contrast", 0.4, 0.6, 1.4)],
)
def test_factors_fill_their_range(field, value, low, high):
    images = photo(300, channels=1).clip(90, 140)
    results = without_normalization(images, **{field: value})
    factors = results.std((1, 2, 3)) / images.std((1, 2, 3))
    assert low - 1e-3 < factors.min() < low + 0.03
    assert high - 0.03 < factors.max() < high + 1e-3
    means = results.mean((1, 2, 3)) / images.mean((1, 2, 3))
    chex.assert_trees_all_close(
        means, factors if field == "brightness" else 0 * means + 1, atol=1e-3
    )


def test_color_shifts_have_their_standard_deviation():
    images = np.full((500, 2, 2, 3), 128, np.uint8)
    shifts = (without_normalization(images, pca=0.1)[:, 0, 0] - 128) / 255
    along = shifts @ np.array(ops.PCA_VECTORS)
    expected = 0.1 * np.array(ops.PCA_VALUES)
    np.testing.assert_allclose(along.std(0), expected, rtol=0.13)  # four standard deviations


@pytest.mark.parametrize("field", ["saturation", "hue", "pca"])
def test_color_transforms_keep_one_channel_and_change_three(field):
    value = {field: 0.5}
    for channels in (1, 3):
        images = photo(4, channels=channels)
        same = np.allclose(without_normalization(images, **value), images, atol=1e-3)
        assert same == (channels == 1)


# Mixing.


def solid(count, channels=3):
    """Image i is of level 10 i, of class i."""
    levels = np.arange(count, dtype=np.uint8)[:, None, None, None] * 10
    return np.broadcast_to(levels, (count, 16, 16, channels))


def test_mixup_mixes_neighbors_with_one_share():
    count = CLASSES - 1
    images, targets = run(solid(count), mixup=1.0, mean=(0.0,), std=(1 / 255,))
    share = np.asarray(targets)[np.arange(count), np.arange(count) ^ 1]
    expected = (1 - share) * np.eye(CLASSES)[:count].T + share * np.eye(CLASSES)[
        np.arange(count) ^ 1
    ].T
    chex.assert_trees_all_close(np.asarray(targets), expected.T.astype(np.float32), atol=1e-6)
    assert (share[::2] == share[1::2]).all()
    assert len(set(share.tolist())) == count // 2
    levels = 10 * ((1 - share) * np.arange(count) + share * (np.arange(count) ^ 1))
    chex.assert_trees_all_close(
        np.asarray(images), np.broadcast_to(levels[:, None, None, None], images.shape), atol=1e-3
    )


def test_cutmix_pastes_the_same_box_of_both_and_counts_its_pixels():
    images, targets = run(solid(CLASSES - 1), cutmix=1.0, mean=(0.0,), std=(1 / 255,))
    images, targets = np.asarray(images).round(), np.asarray(targets)
    pasted_parts = set()
    for i in range(CLASSES - 1):
        pasted = (images[i] == 10 * (i ^ 1)).all(-1)
        assert ((images[i] == 10 * i).all(-1) ^ pasted).all()
        rows, columns = np.flatnonzero(pasted.any(1)), np.flatnonzero(pasted.any(0))
        assert len(rows) * len(columns) == pasted.sum()
        assert targets[i, i ^ 1] == pytest.approx(pasted.mean())
        assert targets[i].sum() == pytest.approx(1)
        partner = (images[i ^ 1] == 10 * i).all(-1)
        assert (pasted == partner).all()
        pasted_parts.add(pasted.mean())
    assert len(pasted_parts) > 1


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_shares_have_a_beta_distribution(alpha):
    config = Augment(mixup=alpha)
    draw = jax.jit(jax.vmap(lambda key: apply._draw_fraction(key, (8, 8), config)[0, 0]))
    shares = np.asarray(draw(jax.random.split(KEY, 1000)))
    variance = 1 / (4 * (2 * alpha + 1))
    assert shares.mean() == pytest.approx(0.5, abs=4 * (variance / 1000) ** 0.5)
    assert shares.var() == pytest.approx(variance, rel=0.15)


def test_cutmix_boxes_have_the_area_drawn_unless_cut_off():
    """Half of a uniform area is less than a half; the border only takes away."""
    config = Augment(cutmix=1.0)
    draw = jax.jit(jax.vmap(lambda key: apply._draw_fraction(key, (64, 64), config)))
    areas = np.asarray(draw(jax.random.split(KEY, 500))).mean((1, 2))
    # E over lambda and the centre, whose box of side s keeps s - s^2 / 4 a way (s = the ratio).
    side = np.sqrt(np.linspace(0, 1, 1001))
    assert areas.mean() == pytest.approx(np.mean((side - side**2 / 4) ** 2), abs=0.04)


def test_both_mixings_are_drawn_as_often():
    images = solid(2).repeat(200, axis=0).reshape(2, 200, 16, 16, 3).swapaxes(0, 1)
    images = images.reshape(400, 16, 16, 3)
    labels = np.tile([0, 1], 200)
    results, targets = run(images, labels, mixup=1.0, cutmix=1.0, mean=(0.0,), std=(1 / 255,))
    results = np.asarray(results)[::2]
    whole = np.isclose(results, results.round(), atol=1e-4) & ((results < 0.1) | (results > 9.9))
    assert whole.all((1, 2, 3)).mean() == pytest.approx(0.5, abs=0.15)
    chex.assert_trees_all_close(np.asarray(targets).sum(1), np.ones(400, np.float32), atol=1e-6)


@pytest.mark.parametrize("fields", [{"mixup": 0.2}, {"cutmix": 1.0}])
def test_an_odd_number_of_images_cannot_be_mixed(fields):
    with pytest.raises(ConfigError, match=r"train\.batch_size.*3 images"):
        run(photo(3), **fields)


# The pipeline as a whole.


@pytest.mark.parametrize("channels", [1, 3])
def test_all_off_is_the_normalization(channels):
    images = photo(4, channels=channels)
    config = Augment(**COLORS) if channels == 3 else Augment()
    results, targets = augment(images, np.arange(4), KEY, config, CLASSES)
    assert results.dtype == targets.dtype == jnp.float32
    chex.assert_trees_all_equal(results, normalized(images, config))
    chex.assert_trees_all_equal(np.asarray(targets), np.eye(CLASSES, dtype=np.float32)[:4])
    mean, std = np.float32(config.mean), np.float32(config.std)
    chex.assert_trees_all_close(np.asarray(results), (images / 255 - mean) / std, atol=1e-5)
    jaxpr = jax.make_jaxpr(functools.partial(augment, config=config, num_classes=CLASSES))
    assert "random_bits" not in str(jaxpr(images, np.arange(4), KEY))


def test_colors_must_fit_the_channels():
    with pytest.raises(ConfigError, match=r"augment\.mean = \(0\.485"):
        check_channels(Augment(**COLORS), 1)
    with pytest.raises(ConfigError, match=r"augment\.std = "):
        check_channels(Augment(std=(0.2, 0.2)), 3)


def on_devices(images, labels, config, first):
    """As the step does it: eight devices, each with its part of the batch."""
    part = len(images) // 8
    call = jax.pmap(
        lambda x, y: augment(
            x, y, KEY, config, CLASSES, first=first + part * jax.lax.axis_index("devices")
        ),
        axis_name="devices",
    )
    parts = call(images.reshape(8, part, *images.shape[1:]), labels.reshape(8, part))
    return jax.tree.map(lambda x: np.asarray(x).reshape(-1, *x.shape[2:]), parts)


@pytest.mark.parametrize("channels", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_images_do_not_depend_on_the_number_of_devices(channels):
    """Exactly so for all that computes with whole levels."""
    images = photo(16, channels=channels, height=16, width=16)
    labels = np.arange(16, dtype=np.int32) % CLASSES
    fields = {name: EVERYTHING[name] for name in WHOLE_LEVELS}
    fields = {**fields, **(COLORS if channels == 3 else {})}
    whole = jax.tree.map(np.asarray, run(images, labels, first=32, **fields))
    chex.assert_tree_all_finite(whole)
    chex.assert_trees_all_equal(whole, on_devices(images, labels, Augment(**fields), 32))
    assert np.abs(whole[0] - run(images, labels, first=0, **fields)[0]).max() > 0.1


@pytest.mark.slow
def test_fractions_of_levels_depend_on_devices_by_rounding_only():
    images, labels = photo(16, height=16, width=16), np.arange(16, dtype=np.int32) % CLASSES
    fields = {**EVERYTHING, **COLORS, "rand_layers": 0}
    whole = run(images, labels, first=32, **fields)
    chex.assert_trees_all_close(
        whole, on_devices(images, labels, Augment(**fields), 32), rtol=1e-5, atol=2e-5
    )


def test_switching_one_on_keeps_the_draws_of_the_others():
    images = photo(400, channels=1)  # as another test has it
    alone, both = (
        np.asarray(run(images, cutout=5, **fields)[0]) for fields in ({}, {"flip": True})
    )
    hole = (alone == 0).all(-1)
    assert (both[hole] == 0).all()


def test_without_jit():
    """As someone tries it in a notebook."""
    images = photo(4, height=16, width=16)
    fields = {"flip": True, "pad": 4, **COLORS}
    results = augment(images, np.arange(4), KEY, Augment(**fields), CLASSES)
    chex.assert_shape(results[0], (4, 16, 16, 3))
    chex.assert_trees_all_close(results, run(images, **fields), rtol=1e-5, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{"rand_layers": 1}, {"trivial": True}])
def test_policies_without_jit(fields):
    images = photo(8, height=16, width=16)
    results, _ = augment(images, np.arange(8), KEY, Augment(**fields), CLASSES)
    # Rounding after a fused multiplication: a level now and then.
    assert np.isclose(results, run(images, **fields)[0], atol=1e-5).mean() > 0.999


def test_the_images_that_the_loader_names_are_mirrored():
    images = np.random.default_rng(0).integers(0, 256, (4, 6, 5, 3)).astype(np.uint8)
    mirrored = np.array([True, False, False, True])
    found, _ = augment(
        jnp.asarray(images),
        jnp.zeros(4, jnp.int32),
        jax.random.key(0),
        Augment(flip_alternates=True),
        num_classes=2,
        mirrored=jnp.asarray(mirrored),
    )
    expected = np.where(mirrored[:, None, None, None], images[:, :, ::-1], images)
    np.testing.assert_array_equal(found, normalized(expected, Augment()))


@pytest.mark.parametrize("channels", [pytest.param(2, marks=pytest.mark.slow), 5])
def test_other_channels_are_moved_as_each_alone(channels):
    images = photo(4, channels)
    moves = {"flip": True, "pad": 3, "rotate": 20.0, "brightness": 0.4, "erase": 1.0, "cutout": 5}
    moves |= {"mixup": 0.2, "cutmix": 1.0}
    whole, _ = run(images, **moves)
    for each in range(channels):
        alone, _ = run(images[..., each : each + 1], **moves)
        chex.assert_trees_all_close(whole[..., each : each + 1], alone, atol=1e-4)


@pytest.mark.parametrize("operation", ["AutoContrast", "Equalize", "Rotate", "Sharpness"])
def test_operations_take_each_channel_alone(operation):
    image = photo(channels=5, height=48, width=40)
    whole = transform(image, operation, 3.0)
    alone = transform(image[..., 4:], operation, 3.0)
    chex.assert_trees_all_close(whole[..., 4:], alone, atol=1e-3)


def test_contrast_of_other_channels_is_to_their_mean():
    image = jnp.asarray(photo(channels=5), jnp.float32)
    expected = np.clip(image.mean() + 1.5 * (image - image.mean()), 0, 255)
    chex.assert_trees_all_close(ops.adjust_contrast(image, 1.5), expected, atol=1e-2)
    mean = np.floor(jnp.floor(image.mean(-1) + 0.5).mean() + 0.5)
    expected = np.floor(np.clip(mean + 1.5 * (image - mean), 0, 255) + 0.5)
    chex.assert_trees_all_close(policy.transform(image, "Contrast", 1.5), expected, atol=1)
    chex.assert_trees_all_equal(policy.transform(image, "Color", 1.5), image)


@pytest.mark.parametrize("name", ["saturation", "hue", "pca"])
def test_colors_are_not_changed_where_there_are_none(name):
    config = Augment(**{name: 0.1})
    with pytest.raises(ConfigError, match=rf"augment\.{name} = 0\.1: must be 0 for .* 5 channels"):
        augment(photo(2, 5), jnp.zeros(2, int), KEY, config, CLASSES)
    grey = photo(2, 1)
    images, _ = augment(grey, jnp.zeros(2, int), KEY, config, CLASSES)
    chex.assert_trees_all_close(images, normalized(grey, config))


def test_a_mean_for_each_of_five_channels():
    config = Augment(mean=(0.1, 0.2, 0.3, 0.4, 0.5), std=(0.25,) * 5)
    images = normalized(np.full((1, 2, 2, 5), 255, np.uint8), config)
    chex.assert_trees_all_close(images[0, 0, 0], np.array([3.6, 3.2, 2.8, 2.4, 2.0]), rtol=1e-5)
    with pytest.raises(ConfigError, match="must have 1 number or 3, since the images have 3 chan"):
        normalized(np.zeros((1, 2, 2, 3), np.uint8), config)
