"""Batches split over meshes, with explicit and automatic axes: the values of one device."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import resnet_jax as rj
from tests.variables import random_variables

FIELDS = {"stage_sizes": (1, 1), "stage_widths": (8, 16), "num_classes": 5}
STEMS = {
    "cifar": functools.partial(rj.CifarStem, features=8),
    "imagenet": functools.partial(rj.ImageNetStem, features=8),
    "zero padding": functools.partial(rj.ImageNetStem, features=8, zero_pool_padding=True),
    "deep": functools.partial(rj.DeepStem, widths=(4, 4, 8)),
}
NETWORKS = {
    "basic, A": {"block_cls": rj.BasicBlock, "shortcut": "A", "stem_cls": STEMS["cifar"]},
    "bottleneck, SE": {"stem_cls": STEMS["imagenet"], "se_ratio": 0.25},
    "D, ECA, dilated": {
        "stem_cls": STEMS["deep"],
        "shortcut": "D",
        "eca": True,
        "output_stride": 4,
    },
    "group norm": {
        "block_cls": rj.PreActBottleneckBlock,
        "stem_cls": STEMS["zero padding"],
        "norm": "group",
        "weight_standardization": True,
    },
    "dropout, remat": {
        "stem_cls": STEMS["cifar"],
        "stochastic_depth_rate": 0.3,
        "dropout_rate": 0.2,
        "remat": True,
    },
}
FEW = ("bottleneck, SE",)


def images():
    return np.random.default_rng(0).normal(size=(8, 16, 16, 3)).astype(np.float32)


def train_once(model, variables, x):
    def loss(params, x):
        logits, updates = model.apply(
            {**variables, "params": params},
            x,
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": jax.random.key(1)},
        )
        return jnp.square(logits - 1).mean(), (logits, updates)

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(variables["params"], x)


@pytest.mark.devices(8)
@pytest.mark.parametrize("axis_type", [AxisType.Explicit, AxisType.Auto], ids=str)
@pytest.mark.parametrize(
    "fields",
    [
        pytest.param(fields, id=name, marks=() if name in FEW else pytest.mark.slow)
        for name, fields in NETWORKS.items()
    ],
)
def test_a_step_on_a_mesh_is_that_of_one_device(fields, axis_type):
    model, x = rj.ResNet(**FIELDS, **fields), images()
    variables = random_variables(model, x.shape[1:])
    expected = jax.device_get(jax.jit(functools.partial(train_once, model))(variables, x))
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)
    with jax.set_mesh(mesh):
        split = jax.device_put(x, jax.NamedSharding(mesh, jax.P("data")))
        found = jax.jit(functools.partial(train_once, model))(variables, split)
    assert found[1][1].sharding.spec[0] == "data"  # the gradient with respect to the images
    chex.assert_trees_all_close(jax.device_get(found), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.devices(8)
@pytest.mark.parametrize("name", NETWORKS)
def test_every_kind_traces_on_an_explicit_mesh_without_a_context(name):
    """The sharding of the images says which mesh it is."""
    model = rj.ResNet(**FIELDS, **NETWORKS[name])
    x = images()
    shapes = jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), x)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    x = jax.device_put(x, jax.NamedSharding(mesh, jax.P("data")))
    _, gradients = jax.eval_shape(functools.partial(train_once, model), shapes, x)
    chex.assert_trees_all_equal_shapes_and_dtypes(gradients[0], shapes["params"])


@pytest.mark.devices(8)
def test_shard_map_on_an_explicit_mesh():
    """Over all axes, and over one of two, beside which the other stays explicit."""
    norm = rj.BatchNorm(axis_name="data")
    x = images()
    variables = norm.init(jax.random.key(1), x, train=False)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)

    def apply(x):
        return norm.apply(variables, x, train=True, mutable=["batch_stats"])[0]

    expected, _ = rj.BatchNorm().apply(variables, x, train=True, mutable=["batch_stats"])
    with jax.set_mesh(mesh):
        split = jax.device_put(x, jax.NamedSharding(mesh, jax.P("data")))
        for axes in ({"data", "model"}, {"data"}):
            sharded = jax.shard_map(
                apply, in_specs=jax.P("data"), out_specs=jax.P("data"), axis_names=axes
            )
            chex.assert_trees_all_close(
                np.asarray(jax.jit(sharded)(split)), np.asarray(expected), atol=1e-5
            )


def test_remat_vmap_and_scan_of_flax():
    """Flax's transforms take the networks and blocks as they take any module."""
    fields = {**FIELDS, **NETWORKS["basic, A"]}
    model, x = rj.ResNet(**fields), images()
    variables = random_variables(model, x.shape[1:])
    expected = model.apply(variables, x, train=False)

    @nn.remat
    def run(module, x):
        return module(x, train=False)

    class Recomputed(nn.Module):
        @nn.compact
        def __call__(self, x):
            return run(rj.ResNet(**fields, name="net"), x)

    nested = {kind: {"net": tree} for kind, tree in variables.items()}
    chex.assert_trees_all_close(Recomputed().apply(nested, x), expected, atol=1e-5)

    class Ensemble(nn.Module):
        @nn.compact
        def __call__(self, x):
            members = nn.vmap(
                lambda module, x: module(x, train=False),
                variable_axes={"params": 0, "batch_stats": 0},
                split_rngs={"params": True},
                in_axes=None,
                axis_size=2,
            )
            return members(rj.ResNet(**fields, name="net"), x)

    two = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), nested)
    logits = Ensemble().apply(two, x)
    chex.assert_trees_all_close(logits[1], expected, atol=1e-5)

    class Scanned(nn.Module):
        @nn.compact
        def __call__(self, x):
            blocks = nn.scan(
                lambda block, x, _: (block(x, False), None),
                variable_axes={"params": 0, "batch_stats": 0},
                split_rngs={"params": True},
                length=3,
            )
            return blocks(rj.BasicBlock(width=8, name="blocks"), x, None)[0]

    y, stacked = Scanned().init_with_output(jax.random.key(0), jnp.ones((1, 4, 4, 8)))
    chex.assert_shape(y, (1, 4, 4, 8))
    chex.assert_shape(stacked["params"]["blocks"]["conv1"]["kernel"], (3, 3, 3, 8, 8))


def test_flax_convolutions_have_no_gradient_on_an_explicit_mesh():
    """Why these layers hand the axes to the compiler; if JAX gets a rule, they need not."""
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Explicit,))
    conv, x = nn.Conv(4, (3, 3)), images()
    variables = conv.init(jax.random.key(0), x)
    with jax.set_mesh(mesh):
        split = jax.device_put(x, jax.NamedSharding(mesh, jax.P("data")))
        with pytest.raises(Exception, match="out_sharding"):
            jax.jit(jax.grad(lambda v, x: conv.apply(v, x).sum())).lower(variables, split)
