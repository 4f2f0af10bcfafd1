"""Faults of other projects that the package works around."""

import functools
import inspect
import pathlib

import jax
import jax.numpy as jnp
import pytest

import resnet_jax as rj
from resnet_jax import upstream
from tests.variables import random_variables


@pytest.mark.parametrize("fields", [{}, {"se_ratio": 0.25}, {"norm": "group"}], ids=str)
def test_bfloat16_networks_are_finite_on_a_cpu(fields):
    """Jaxlib 0.12 fuses the last convolutions with the mean of the last map into NaN."""
    sizes = {"stage_sizes": (1, 1), "stage_widths": (16, 64)}
    model = rj.ResNet20(dtype=jnp.bfloat16, **sizes, **fields)
    images = jax.random.normal(jax.random.key(1), (4, 16, 16, 3))
    variables = random_variables(model, images.shape[1:])
    run = jax.jit(functools.partial(model.apply, train=False))
    exact = run(variables, images)
    assert jnp.isfinite(exact).all()

    def loss(params):
        everything = {**variables, "params": params}
        return model.apply(everything, images, train=True, mutable=["batch_stats"])[0].sum()

    gradients = jax.jit(jax.grad(loss))(variables["params"])
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


def test_other_platforms_have_no_barrier():
    model = rj.ResNet20(dtype=jnp.bfloat16, stage_sizes=(1,), stage_widths=(16,))
    images = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
    init = functools.partial(model.init, train=False)
    variables = jax.eval_shape(init, jax.random.key(0), images)
    traced = jax.jit(functools.partial(model.apply, train=False)).trace(variables, images)
    for platform in ("cuda", "tpu"):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert "optimization_barrier" not in text


def test_every_entry_says_when_it_can_go():
    for name, function in inspect.getmembers(upstream, inspect.isfunction):
        if not name.startswith("_") and function.__module__ == upstream.__name__:
            assert "Can go" in " ".join(function.__doc__.split()), name


def test_private_names_of_jax_are_used_in_one_file():
    root = pathlib.Path(rj.__file__).parent
    users = {
        path.relative_to(root).parts[0]
        for path in root.rglob("*.py")
        if "from jax._src" in path.read_text()
    }
    assert users == {"upstream.py"}
