"""Norms of other packages and of users, by the field `ResNet.norm`."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import resnet_jax as rj
from resnet_jax.inference.explain import responses
from tests.variables import random_variables

IMAGES = jax.random.normal(jax.random.key(1), (2, 16, 16, 3))
NET = {"stage_sizes": (1, 1), "stage_widths": (8, 16), "block_cls": rj.BasicBlock}


class Gain(nn.Module):
    """With a module inside, a parameter of another name, and `train`."""

    @nn.compact
    def __call__(self, x, train):
        gain = self.param("gain", nn.initializers.ones, (x.shape[-1],))
        return nn.GroupNorm(4, name="inner")(x) * gain + train


def net(norm, **fields):
    return rj.ResNet(**NET, stem_cls=rj.CifarStem, num_classes=5, norm=norm, **fields)


def init(model):
    return random_variables(model, IMAGES.shape[1:])


def test_a_norm_of_flax_is_that_of_this_package():
    """Same variables, same numbers, and no statistics for the caller to update."""
    ours = net("group", bn_epsilon=1e-3)
    theirs = net(
        lambda scale_init=nn.initializers.ones: _group_norm(epsilon=1e-3, scale_init=scale_init)
    )
    variables = init(ours)
    expected = ours.apply(variables, IMAGES, train=True)
    chex.assert_trees_all_close(theirs.apply(variables, IMAGES, train=True), expected, atol=1e-4)


class _group_norm(nn.Module):  # noqa: N801
    epsilon: float
    scale_init: nn.initializers.Initializer

    @nn.compact
    def __call__(self, x):
        groups = int(np.gcd(32, x.shape[-1]))
        norm = nn.GroupNorm(groups, epsilon=self.epsilon, scale_init=self.scale_init)
        nn.share_scope(self, norm)
        return norm(x)


@pytest.mark.parametrize(
    ("norm", "names"),
    [
        (nn.LayerNorm, {"scale", "bias"}),
        (functools.partial(nn.RMSNorm, epsilon=1e-3), {"scale"}),
        (Gain, {"gain", "inner"}),
        (lambda: nn.LayerNorm(use_bias=False), {"scale"}),
    ],
    ids=["class", "partial", "own", "function"],
)
def test_norms_without_running_statistics(norm, names):
    model = net(norm)
    variables = init(model)
    assert set(variables) == {"params"}
    assert set(variables["params"]["stage1"]["block1"]["norm1"]) == names
    chex.assert_tree_all_finite(model.apply(variables, IMAGES, train=True))
    assert model.apply(variables, IMAGES, train=True, mutable=["batch_stats"])[1] == {}
    counted = rj.summary(model, IMAGES.shape).parameters
    assert counted == sum(leaf.size for leaf in jax.tree.leaves(variables))
    again = rj.from_torch(model, rj.to_torch(model, variables))
    chex.assert_trees_all_equal(again, variables)
    assert len(responses(model, variables, IMAGES)) == 4


def test_running_statistics_of_another_batch_norm():
    model = net(functools.partial(nn.BatchNorm, momentum=0.5))
    variables = init(model)
    with pytest.raises(rj.ModelError, match=r'mutable=\["batch_stats"\]'):
        model.apply(variables, IMAGES, train=True)
    _, updates = model.apply(variables, IMAGES, train=True, mutable=["batch_stats"])
    before, after = (each["batch_stats"]["stem"]["norm1"]["mean"] for each in (variables, updates))
    assert np.abs(after - before).max() > 1e-3
    folded, kept = rj.fold_batch_norm(model, variables)  # another batch norm is left as it is
    logits = model.apply(variables, IMAGES, train=False)
    chex.assert_trees_all_close(folded.apply(kept, IMAGES, train=False), logits, atol=1e-5)


def test_a_batch_norm_of_this_package_folds():
    model = net(functools.partial(rj.BatchNorm, epsilon=1e-2))
    variables = init(model)
    folded, smaller = rj.fold_batch_norm(model, variables)
    assert set(smaller) == {"params"}
    logits = model.apply(variables, IMAGES, train=False)
    chex.assert_trees_all_close(folded.apply(smaller, IMAGES, train=False), logits, atol=1e-4)


def test_fields_that_the_network_gives_to_a_norm():
    seen = []

    def make(**fields):
        seen.append(fields)
        return nn.LayerNorm(**fields)

    net(make, dtype=jnp.bfloat16, zero_init_residual=True).init(
        jax.random.key(0), IMAGES, train=False
    )
    assert {"dtype": jnp.bfloat16} in seen
    assert {"dtype": jnp.bfloat16, "scale_init": nn.initializers.zeros} in seen
    fixed = net(functools.partial(nn.LayerNorm, dtype=jnp.float32), dtype=jnp.bfloat16)
    maps = fixed.init_with_output(jax.random.key(0), IMAGES, train=False, method="features")[0]
    assert maps["stem"].dtype == jnp.float32


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"norm": Gain, "zero_init_residual": True}, "no field `scale_init`"),
        ({"norm": lambda: 3}, "makes a int, no Flax module"),
    ],
)
def test_refused_norms(fields, message):
    with pytest.raises(rj.ModelError, match=message):
        net(**fields).init(jax.random.key(0), IMAGES, train=False)


def test_variables_without_statistics():
    model = net("batch")
    params = {"params": init(model)["params"]}
    for train in (False, True):
        with pytest.raises(rj.ModelError, match="no batch_stats"):
            model.apply(params, IMAGES, train=train)


def test_weight_standardization_goes_with_any_norm_but_batch_norm():
    assert net(nn.LayerNorm, weight_standardization=True).weight_standardization
