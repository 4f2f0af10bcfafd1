"""Folded batch norms: the same outputs, whatever the network is made of."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from jax import lax

import resnet_jax as rj
from tests.variables import random_variables

SIDE = 8


class OneConvBlock(rj.ResidualBlock):
    """As in the docstring of `ResidualBlock`."""

    @nn.compact
    def __call__(self, x, train):
        conv = self.conv_cls(self.width, 3, self.stride, self.dilation, name="conv1")
        y = self.norm_cls(scale_init=self.last_scale_init, name="norm1")(conv(x), train)
        return nn.relu(self.add_shortcut(y, x, train))


class SumBlock(OneConvBlock):
    """Reads the convolution beside its norm."""

    @nn.compact
    def __call__(self, x, train):
        y = self.conv_cls(self.width, 3, self.stride, name="conv1")(x)
        return nn.relu(self.norm_cls(name="norm1")(y, train) + y)


class SharedConvBlock(OneConvBlock):
    """Two norms of one convolution's calls."""

    @nn.compact
    def __call__(self, x, train):
        x = self.conv_cls(self.width, 1, self.stride, name="first")(x)
        conv = self.conv_cls(self.width, 3, name="conv1")
        x = self.norm_cls(name="norm1")(conv(x), train)
        return nn.relu(self.norm_cls(name="norm2")(conv(x), train))


class SharedNormBlock(OneConvBlock):
    """One norm of two convolutions."""

    @nn.compact
    def __call__(self, x, train):
        norm = self.norm_cls(name="norm1")
        x = norm(self.conv_cls(self.width, 3, self.stride, name="conv1")(x), train)
        return nn.relu(norm(self.conv_cls(self.width, 3, name="conv2")(x), train))


class KernelBlock(OneConvBlock):
    """Reads a kernel beside the convolution."""

    @nn.compact
    def __call__(self, x, train):
        conv = self.conv_cls(self.width, 3, self.stride, name="conv1")
        y = self.norm_cls(name="norm1")(conv(x), train)
        return nn.relu(y * conv.filters(x.shape[-1]).mean())


class DoubledNorm(rj.BatchNorm):
    def __call__(self, x, train):
        return 2 * super().__call__(x, train)


class DoubledBlock(OneConvBlock):
    """Has a norm of its own."""

    @nn.compact
    def __call__(self, x, train):
        y = self.conv_cls(self.width, 3, self.stride, name="conv1")(x)
        return nn.relu(DoubledNorm(name="norm1")(y, train))


class NestedBlock(OneConvBlock):
    """Its layers are in a function that JAX transforms."""

    @nn.compact
    def __call__(self, x, train):
        inner = nn.remat(nn.jit(OneConvBlock, static_argnums=2), static_argnums=2)
        return inner(self.width, self.stride, shortcut="none", name="inner")(x, train)


class Float32NormBlock(OneConvBlock):
    """Its norm returns another type than its convolution."""

    @nn.compact
    def __call__(self, x, train):
        y = self.conv_cls(self.width, 3, self.stride, dtype=jnp.bfloat16, name="conv1")(x)
        return nn.relu(rj.BatchNorm(name="norm1")(y, train))


NET = functools.partial(
    rj.ResNet,
    stage_sizes=(2, 1),
    stage_widths=(8, 16),
    num_classes=5,
    block_cls=OneConvBlock,
    stem_cls=functools.partial(rj.CifarStem, features=8),
)
# Networks, and how many of their norms leave a bias, a factor and a bias, or stay.
CASES = {
    "own block": (NET, (5, 0, 0)),  # three blocks, the stem and a projection
    "remat": (functools.partial(NET, remat=True), (5, 0, 0)),
    "gates": (functools.partial(NET, eca=True, stochastic_depth_rate=0.5), (5, 0, 0)),
    "standardized": (
        functools.partial(NET, norm="group", weight_standardization=True),
        (0, 0, 5),
    ),
    "zero padding": (
        functools.partial(NET, stem_cls=functools.partial(rj.ImageNetStem, zero_pool_padding=True)),
        (6, 0, 0),
    ),
    "plain pre-activation": (  # a block's output is a feature map, too
        functools.partial(NET, block_cls=rj.PreActBasicBlock, shortcut="none"),
        (3, 4, 0),
    ),
    "sum": (functools.partial(NET, block_cls=SumBlock), (1, 3, 0)),
    "shared convolution": (functools.partial(NET, block_cls=SharedConvBlock), (1, 6, 0)),
    "shared norm": (functools.partial(NET, block_cls=SharedNormBlock), (1, 3, 0)),
    "kernel": (functools.partial(NET, block_cls=KernelBlock), (1, 3, 0)),
    "own norm": (functools.partial(NET, block_cls=DoubledBlock), (1, 0, 3)),
    "nested": (functools.partial(NET, block_cls=NestedBlock), (4, 0, 0)),
    "types": (functools.partial(NET, block_cls=Float32NormBlock), (1, 3, 0)),
}


def outputs(model, variables, images):
    """Logits and feature maps."""
    apply = functools.partial(model.apply, variables, images, train=False)
    return apply(), apply(method="features")


@pytest.mark.parametrize("kind", CASES)
def test_every_network_computes_the_same(kind):
    make, expected = CASES[kind]
    model = make()
    variables = random_variables(model)
    images = np.random.default_rng(0).normal(size=(2, SIDE, SIDE, 3)).astype(np.float32)
    folded, smaller = rj.fold_batch_norm(model, variables)
    leaves = traverse_util.flatten_dict(smaller)
    norms = [path[:-1] for path in leaves if "norm" in path[-2] and path[-1] == "bias"]
    factors = sum((*norm, "factor") in leaves for norm in norms)
    whole = sum((*norm, "scale") in leaves for norm in norms)
    assert (len(norms) - factors - whole, factors, whole) == expected
    assert not folded.weight_standardization

    def compare(variables, images):
        inside = rj.fold_batch_norm(model, variables)
        return [
            outputs(*network, images) for network in ((model, variables), (folded, smaller), inside)
        ]

    plain, found, inside = jax.jit(compare)(variables, images)
    largest = float(jnp.abs(plain[0]).max())
    tolerance = 1e-5 if kind != "types" else 1e-2
    for each in (found, inside):
        chex.assert_trees_all_close(each[0], plain[0], rtol=0, atol=tolerance * largest)
        for name, expected_map in plain[1].items():
            scale = float(jnp.abs(expected_map).max())
            chex.assert_trees_all_close(each[1][name], expected_map, rtol=0, atol=tolerance * scale)


def test_no_training_after_folding():
    model, variables = rj.fold_batch_norm(NET(), random_variables(NET()))
    with pytest.raises(rj.ModelError, match="for inference only"):
        model.apply(variables, jnp.ones((1, 8, 8, 3)), train=True, mutable=["batch_stats"])


def test_forgotten_statistics_are_no_folded_norm():
    variables = {"params": random_variables(NET())["params"]}
    with pytest.raises(Exception, match="batch_stats"):
        NET().apply(variables, jnp.ones((1, 8, 8, 3)), train=False)


def test_the_types_of_each_platform(monkeypatch):
    model = NET(dtype=jnp.bfloat16)
    variables = random_variables(model)
    for platform, expected in (("cpu", jnp.float32), ("tpu", jnp.float32), ("gpu", jnp.bfloat16)):
        monkeypatch.setattr(jax, "default_backend", lambda platform=platform: platform)
        _, folded = rj.fold_batch_norm(model, variables)
        block = folded["params"]["stage1"]["block1"]
        assert block["conv1"]["kernel"].dtype == jnp.bfloat16
        assert block["norm1"]["bias"].dtype == expected
        assert folded["params"]["head"]["kernel"].dtype == jnp.float32
        _, folded = rj.fold_batch_norm(NET(), variables)
        assert folded["params"]["stage1"]["block1"]["norm1"]["bias"].dtype == jnp.float32


# Distance of bfloat16 networks from float32.

SMALL = functools.partial(
    rj.ResNet,
    stage_sizes=(1, 1, 1),
    stage_widths=(8, 16, 32),
    stem_cls=rj.CifarStem,
    num_classes=10,
)


def rounded(x):
    return lax.reduce_precision(x, 8, 7)  # to bfloat16's digits


def round_as_a_gpu(call, args, kwargs, context):
    """Folded, computed in float32: a convolution is rounded once, after bias, shortcut and ReLU."""
    module, y = context.module, call(*args, **kwargs)
    if isinstance(module, rj.BatchNorm):
        return y if module.name == "norm3" else rounded(y)
    return rounded(y) if context.method_name == "add_shortcut" else y


def round_as_unfolded(call, args, kwargs, context):
    if isinstance(context.module, rj.Conv) and context.method_name == "filters":
        return rounded(call(*args, **kwargs))
    y = call(*args, **kwargs)
    layer = isinstance(context.module, rj.Conv | rj.BatchNorm) and context.method_name == "__call__"
    return rounded(y) if layer or context.method_name == "add_shortcut" else y


@pytest.mark.parametrize("statistics", ["usual", "tiny variances, large scales"])
def test_bfloat16_is_no_further_from_float32_than_unfolded(statistics, monkeypatch):
    """On a GPU; the roundings are explicit, because a CPU's compiler leaves some out."""
    model, half = SMALL(), SMALL(dtype=jnp.bfloat16)

    @functools.partial(jax.jit, static_argnums=2)
    def run(variables, images, rounding=None):
        if rounding is None:
            return model.apply(variables, images, train=False)
        with nn.intercept_methods(rounding):
            return model.apply(variables, rounded(images), train=False)

    @jax.jit
    def own_statistics(variables, images):
        now = SMALL(bn_momentum=0.0)
        return now.apply(variables, images, train=True, mutable=["batch_stats"])[1]

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")  # for the type of the biases
    distances = []
    for seed in range(16):
        rng = np.random.default_rng(seed)
        variables = random_variables(model, seed=seed)
        images = rng.normal(size=(8, 16, 16, 3)).astype(np.float32)
        if statistics != "usual":
            for path, leaf in traverse_util.flatten_dict(variables["params"]).items():
                if path[-1] == "kernel" and leaf.ndim == 4:
                    leaf *= (10 ** rng.uniform(-4, 0, leaf.shape[-1])).astype(np.float32)
                if path[-1] == "scale":
                    leaf *= rng.uniform(1, 10, leaf.shape).astype(np.float32)
        variables = {**variables, **own_statistics(variables, images)}
        _, folded = rj.fold_batch_norm(half, variables)
        folded = jax.tree.map(lambda leaf: leaf.astype(np.float32), folded)
        exact = run(variables, images)
        distances.append(
            [
                jnp.sqrt(jnp.square(each - exact).mean()) / exact.std()
                for each in (
                    run(folded, images, round_as_a_gpu),
                    run(variables, images, round_as_unfolded),
                )
            ]
        )
    folded, unfolded = np.mean(distances, axis=0)
    assert 0 < folded <= unfolded < 0.05


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_folding_inside_a_program_for_a_gpu_adds_biases_in_the_type_of_the_convolution(platform):
    """Wherever the program is lowered, as an export is: a bias in float32 is a pass of its own."""
    model = rj.ResNet(
        stage_sizes=(1,), stage_widths=(8,), stem_cls=rj.CifarStem, dtype=jnp.bfloat16
    )
    images = jnp.zeros((2, 8, 8, 3))
    variables = model.init(jax.random.key(0), images, train=False)

    def infer(variables, images):
        folded, variables = rj.fold_batch_norm(model, variables)
        return folded.apply(variables, images, train=False)

    text = jax.jit(infer).trace(variables, images).lower(lowering_platforms=(platform,)).as_text()
    adds = [line for line in text.splitlines() if "stablehlo.add %" in line and "2x8x8x" in line]
    assert adds
    assert all("xbf16>" in line for line in adds) == (platform == "cuda")
