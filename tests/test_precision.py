"""What `precision` reaches: every product of the programs that are lowered for each platform."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import resnet_jax as rj
from resnet_jax import config as c
from resnet_jax.config.model import make_model
from resnet_jax.data.preprocessing import Preprocessing
from resnet_jax.distributed import data_parallel
from resnet_jax.errors import ModelError
from resnet_jax.evaluation.metrics import make_evaluation_step
from resnet_jax.training.optimizer import RunLength, make_optimizer
from resnet_jax.training.state import state_shapes
from resnet_jax.training.step import make_train_step
from tests.variables import random_variables

PLATFORMS = ("cpu", "cuda", "tpu")
CLASSES = 29  # no other array has a side of 29
SMALL = {"stage_sizes": (1, 1), "stage_widths": (8, 16), "num_classes": CLASSES}
SIDE = 16
TINY = {
    "stage_sizes": (1,),
    "stage_widths": (8,),
    "num_classes": CLASSES,
    "block_cls": rj.BasicBlock,
    "stem_cls": functools.partial(rj.CifarStem, features=8),
    "se_ratio": 0.5,
}

_PRODUCT = re.compile(r"stablehlo\.(?:dot_general|convolution|dot)\b.*")
_LEVEL = re.compile(r"\b(DEFAULT|HIGHEST|HIGH)\b")


def products(traced, platform):
    """Of each product in a program: (the precisions of its operands, the types of its arrays)."""
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    found = []
    for line in _PRODUCT.findall(text):
        operation, _, types = line.rpartition(" : ")
        found.append((set(_LEVEL.findall(operation)), re.findall(r"tensor<([^>]*)>", types)))
    return found


def of_the_head(types):
    return any(str(CLASSES) in kind.split("x") for kind in types)


class OneConvBlock(rj.ResidualBlock):
    """A block as a user writes it."""

    @nn.compact
    def __call__(self, x, train):
        y = self.conv_cls(self.features, 3, stride=self.stride, name="conv1")(x)
        y = self.norm_cls(scale_init=self.last_scale_init, name="norm1")(y, train)
        return nn.relu(self.add_shortcut(y, x, train))


NETWORKS = {
    "bottlenecks": {"se_ratio": 0.25, "shortcut": "D", "stem_cls": rj.DeepStem},
    "groups": {"cardinality": 4, "base_width": 32, "output_stride": 4},
    "basic": {
        "block_cls": rj.BasicBlock,
        "shortcut": "A",
        "stem_cls": functools.partial(rj.CifarStem, features=8),
    },
    "preactivation": {"block_cls": rj.PreActBottleneckBlock, "shortcut": "C"},
    "bit": {
        "block_cls": rj.PreActBottleneckBlock,
        "norm": "group",
        "weight_standardization": True,
        "stem_cls": functools.partial(rj.ImageNetStem, zero_pool_padding=True),
    },
    "strided conv": {"stem_cls": functools.partial(rj.DeepStem, conv_pool=True)},
    "own block": {"block_cls": OneConvBlock, "se_ratio": 0.5},
}


def forward(model, variables, images):
    return model.apply(variables, images, train=False)


def loss(model, variables, images):
    logits, _ = model.apply(variables, images, train=True, mutable=["batch_stats"])
    return jnp.square(logits).sum()


def gradient(model, variables, images):
    """Of parameters and images, through a program that is jitted itself."""
    return jax.grad(jax.jit(functools.partial(loss, model)), argnums=(0, 1))(variables, images)


def curvature(model, variables, images):
    """A second derivative: forward mode over reverse mode."""
    return jax.jvp(
        lambda images: gradient(model, variables, images), (images,), (jnp.ones_like(images),)
    )


def reversed_twice(model, variables, images):
    """A second derivative: reverse mode over reverse mode."""

    def size(variables):
        return sum(jnp.square(x).sum() for x in jax.tree.leaves(gradient(model, variables, images)))

    return jax.grad(size)(variables)


@functools.cache
def trace(function, model):
    images = jax.ShapeDtypeStruct((2, SIDE, SIDE, 3), np.float32)
    init = functools.partial(model.init, train=False)
    variables = jax.eval_shape(init, jax.random.key(0), images)
    return jax.jit(functools.partial(function, model)).trace(variables, images)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name == "bottlenecks" else pytest.mark.slow)
        for name in NETWORKS
    ],
)
def test_highest_reaches_every_product_of_values_and_gradients(name):
    model = rj.ResNet(**{**SMALL, **NETWORKS[name]})
    for function, least in ((forward, 1), (gradient, 3)):
        exact = trace(function, model.clone(precision="highest"))
        plain = trace(function, model)
        for platform in PLATFORMS:
            found, default = products(exact, platform), products(plain, platform)
            assert {"HIGHEST"} == set().union(*(levels for levels, _ in found))
            # Nothing became another operation, and by default the levels are JAX's own.
            assert [types for _, types in found] == [types for _, types in default]
            assert "DEFAULT" in set().union(*(levels for levels, _ in default))
            # The head is float32 in both: forwards, and for its kernel and its input.
            heads = [levels for levels, types in default if of_the_head(types)]
            assert len(heads) >= least
            assert all(levels == {"HIGHEST"} for levels in heads)


@pytest.mark.parametrize(
    ("function", "remat"),
    [(curvature, False), pytest.param(reversed_twice, True, marks=pytest.mark.slow)],
)
def test_highest_reaches_second_derivatives(function, remat):
    fields = {**SMALL, **NETWORKS["bottlenecks"], "stage_sizes": (1,), "stage_widths": (8,)}
    exact = trace(function, rj.ResNet(**fields, remat=remat, precision="highest"))
    for platform in PLATFORMS:
        found = products(exact, platform)
        assert len(found) > 40
        assert {"HIGHEST"} == set().union(*(levels for levels, _ in found))


@pytest.mark.parametrize("precision", [lax.Precision.HIGH, "high"])
def test_every_level_arrives(precision):
    found = products(trace(gradient, rj.ResNet(**TINY, precision=precision)), "cuda")
    levels = {of_the_head(types): levels for levels, types in found}
    assert levels == {True: {"HIGHEST"}, False: {"HIGH"}}


def test_half_precision_keeps_a_float32_head():
    for platform in PLATFORMS:
        found = products(trace(gradient, rj.ResNet(**TINY, dtype=jnp.bfloat16)), platform)
        heads = [(levels, types) for levels, types in found if of_the_head(types)]
        assert len(heads) == 3
        for levels, types in heads:
            assert levels == {"HIGHEST"}
            assert all(kind.endswith("xf32") for kind in types)


def test_the_field_counts_more_than_the_process():
    """`jax.default_matmul_precision` is what a network without a precision follows."""
    plain = rj.ResNet(**TINY)
    levels = {}
    for default in ("bfloat16", "highest"):
        with jax.default_matmul_precision(default):
            for model in (plain, plain.clone(precision="highest")):
                for found, types in products(trace.__wrapped__(gradient, model), "cuda"):
                    key = default, model.precision, of_the_head(types)
                    levels.setdefault(key, set()).update(found)
    assert levels.pop(("bfloat16", None, False)) == {"DEFAULT"}
    assert len(levels) == 7
    assert set().union(*levels.values()) == {"HIGHEST"}


def test_a_cpu_computes_the_same_numbers():
    model = rj.ResNet(**TINY, shortcut="C")
    variables = random_variables(model, (SIDE, SIDE, 3))
    images = np.random.default_rng(0).normal(size=(2, SIDE, SIDE, 3)).astype(np.float32)

    def run(model):
        return jax.jit(functools.partial(gradient, model))(variables, images)

    plain, exact = run(model), run(model.clone(precision="highest"))
    jax.tree.map(np.testing.assert_array_equal, plain, exact)


@pytest.mark.parametrize("precision", ["float32", "exact", 3, ("high", "highest")])
def test_other_precisions_are_refused(precision):
    with pytest.raises(ModelError, match=r"precision = .* is not allowed: .*'highest'"):
        rj.ResNet(**SMALL, precision=precision)


def test_a_network_with_a_precision_is_a_static_argument():
    models = [rj.ResNet20(precision=p) for p in (None, "highest", lax.Precision.HIGHEST)]
    assert len({hash(model) for model in models}) == 3


def everything(model, **optimizer):
    """A run that augments in every way, as far as the ways go together."""
    augment = c.Augment(
        **{"flip": True, "pad": 1, "rotate": 10.0, "rand_layers": 2, "brightness": 0.2},
        **{"contrast": 0.2, "saturation": 0.2, "hue": 0.1, "pca": 0.1, "erase": 0.2, "cutout": 3},
        **{"mixup": 0.2, "cutmix": 0.2},
    )
    return c.Config(
        model=c.Model(name=model, precision="highest", bn_sync="all"),
        data=c.Data(image_size=8),
        augment=augment,
        optimizer=c.Optimizer(**optimizer, clip_norm=1.0),
        train=c.Train(batch_size=4, accumulate=2, ema_decay=0.9),
    )


@pytest.mark.parametrize(
    ("optimizer", "platform"),
    [pytest.param("lamb", "tpu", marks=pytest.mark.slow), ("lars", "cuda")],
)
def test_highest_reaches_the_whole_training_step(optimizer, platform, tiny_model):
    """With augmentation, statistics of all devices, clipping, and the norms of lamb and lars."""
    config = everything(tiny_model, name=optimizer)
    length = RunLength(steps=10, steps_per_epoch=5.0)
    model, update = make_model(config, CLASSES), make_optimizer(config, length)
    state = state_shapes(model, update, config, channels=3)
    batch = {
        "images": jax.ShapeDtypeStruct((1, 4, 8, 8, 3), np.uint8),
        "labels": jax.ShapeDtypeStruct((1, 4), np.int32),
    }
    step = make_train_step(model, update, config, length, platform)
    found = float32_products(step, state, batch, platform)
    assert len(found) >= 4 + 4 + 3  # layers, their kernels, and their inputs but for the images
    assert {"HIGHEST"} == set().union(*(levels for levels, _ in found))


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_highest_reaches_the_evaluation(platform, tiny_model):
    config = everything(tiny_model)
    model = make_model(config, CLASSES)
    init = functools.partial(model.clone(axis_name=None).init, train=False)
    variables = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
    batch = {
        "images": jax.ShapeDtypeStruct((1, 4, 8, 8, 3), np.uint8),
        "labels": jax.ShapeDtypeStruct((1, 4), np.int32),
        "weights": jax.ShapeDtypeStruct((1, 4), np.float32),
    }
    step = make_evaluation_step(model, Preprocessing.from_config(config), flip=True)
    found = float32_products(step, variables, batch, platform)
    assert len(found) >= 2 * 4
    assert {"HIGHEST"} == set().union(*(levels for levels, _ in found))


def float32_products(step, state, batch, platform):
    """Of one device's step(state, batch); products of other types have no precision to choose."""
    # `jax.pmap` lowers for the devices of this process only.
    mapped = jax.vmap(step, in_axes=(None, 0), axis_name=data_parallel.AXIS, axis_size=1)
    traced = jax.jit(mapped).trace(state, batch)
    return [
        (levels, types) for levels, types in products(traced, platform) if types[0].endswith("xf32")
    ]
