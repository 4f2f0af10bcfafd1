"""Fields of ResNet: what each changes, and what is refused."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

import resnet_jax as rj
from resnet_jax.models.layers import dropout
from tests.variables import random_variables

SIDE = 32
TINY = {"stage_sizes": (1, 1, 1, 1), "stage_widths": (8, 16, 24, 32), "num_classes": 5}
TINY_STEM = functools.partial(rj.ImageNetStem, features=8)


def tiny(**fields):
    return rj.ResNet(**{**TINY, "stem_cls": TINY_STEM, **fields})


def images(count=4, side=SIDE, channels=3):
    return jax.random.normal(jax.random.key(1), (count, side, side, channels))


def init(model, x):
    return random_variables(model, x.shape[1:])


def run(model, variables, x, **options):
    """`apply` for evaluation, compiled whole: operation by operation takes longer."""
    return jax.jit(functools.partial(model.apply, train=False, **options))(variables, x)


class Variants(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_logits(self):
        model, x = tiny(stage_sizes=(1, 1), stage_widths=(8, 16)), images()
        variables = init(model, x)
        logits = self.variant(functools.partial(model.apply, train=False))(variables, x)
        chex.assert_shape(logits, (4, 5))
        chex.assert_tree_all_finite(logits)


@pytest.mark.parametrize("name", ["resnet50", "resnet20", "resnetv2_18", "resnet50d"])
def test_features_have_the_promised_strides(name):
    model = rj.create_model(name)
    x = jax.ShapeDtypeStruct((2, 64, 96, 3), jnp.float32)
    init_features = functools.partial(model.init_with_output, train=False, method="features")
    maps, _ = jax.eval_shape(init_features, jax.random.key(0), x)
    info = model.feature_info()
    assert next(iter(info)) == "stem"
    assert maps.keys() == info.keys()
    for stage, (channels, stride) in info.items():
        chex.assert_shape(maps[stage], (2, 64 // stride, 96 // stride, channels))


@pytest.mark.parametrize("output_stride", [8])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"block_cls": rj.BasicBlock, "shortcut": "A"},
        {"block_cls": rj.PreActBottleneckBlock},
        *(
            pytest.param(fields, marks=pytest.mark.slow)
            for fields in (
                {"stride_in_1x1": True},
                {"block_cls": rj.BasicBlock},
                {"shortcut": "C"},
            )
        ),
    ],
    ids=str,
)
def test_dilated_maps_contain_the_strided_ones(fields, output_stride):
    """Dilation gives the same values, at more places, with the same weights."""
    fields = {"stage_sizes": (1, 2, 2, 2), **fields}
    model, x = tiny(**fields), images(2, 64)
    dilated = tiny(**fields, output_stride=output_stride)
    variables = init(model, x)
    coarse_map, fine_map = (
        run(each, variables, x, method="features")["stage4"] for each in (model, dilated)
    )
    assert fine_map.shape[1] == 64 // output_stride
    step = 32 // output_stride
    chex.assert_trees_all_close(fine_map[:, ::step, ::step], coarse_map, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("next_dilation", [2, 4])
def test_a_dilated_average_shortcut_is_that_of_timm(next_dilation):
    """The average of four neighbors, whatever the dilation, and zeros beyond the edge."""
    x = jnp.arange(9.0).reshape(1, 3, 3, 1)
    block = rj.BasicBlock(
        width=2, shortcut="D", dilation=next_dilation // 2, next_dilation=next_dilation
    )
    variables = jax.tree.map(jnp.zeros_like, block.init(jax.random.key(0), x, train=False))
    variables["params"]["projection"]["conv1"]["kernel"] = jnp.ones((1, 1, 1, 2))
    variables["params"]["projection"]["norm1"]["scale"] = jnp.full(2, np.sqrt(1 + 1e-5))
    variables["batch_stats"] = jax.tree.map(jnp.zeros_like, variables["batch_stats"])
    variables["batch_stats"]["projection"]["norm1"]["var"] = jnp.ones(2)
    y = block.apply(variables, x, train=False)[0, :, :, 1]
    expected = [[2.0, 3.0, 1.75], [5.0, 6.0, 3.25], [3.25, 3.75, 2.0]]
    chex.assert_trees_all_close(y, jnp.array(expected), rtol=1e-6)


def test_option_a_does_not_drop_channels():
    with pytest.raises(rj.ModelError, match=r"shortcut = 'A' .* 16 channels to 8.*stage_widths"):
        init(rj.ResNet20(stage_widths=(8, 16, 32)), images())


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_stays_close(dtype):
    x = images()
    model, half = tiny(), tiny(dtype=dtype)
    variables = init(model, x)
    logits, low = (run(m, variables, x) for m in (model, half))
    assert low.dtype == jnp.float32
    assert float(jnp.linalg.norm(low - logits) / jnp.linalg.norm(logits)) < 0.02
    maps = run(half, variables, x, method="features")
    assert {m.dtype for m in maps.values()} == {jnp.dtype(dtype)}


def test_remat_changes_nothing():
    x, short = images(), {"stage_sizes": (2,), "stage_widths": (8,)}
    model, remat = tiny(**short), tiny(**short, remat=True)
    variables = init(model, x)
    chex.assert_trees_all_equal_structs(variables, init(remat, x))

    def gradient(m):
        def loss(params):
            logits, updates = m.apply(
                {**variables, "params": params}, x, train=True, mutable=["batch_stats"]
            )
            return jnp.square(logits).mean(), updates

        return jax.jit(jax.grad(loss, has_aux=True))(variables["params"])

    chex.assert_trees_all_close(gradient(model), gradient(remat), rtol=1e-4, atol=1e-6)
    assert "remat" in str(jax.make_jaxpr(lambda: gradient(remat))())


@pytest.mark.parametrize("block_cls", [rj.BottleneckBlock, rj.PreActBasicBlock])
def test_zero_init_residual_starts_as_the_shortcut(block_cls):
    x = images(2, 8, 32)
    block = block_cls(width=32 // block_cls.expansion, zero_init_residual=True)
    out, _ = block.init_with_output(jax.random.key(0), x, train=False)
    expected = x if block_cls.preactivation else jax.nn.relu(x)
    chex.assert_trees_all_close(out, expected)


def test_plain_blocks_have_no_sum():
    x = images(2, 8, 16)
    plain = rj.BasicBlock(width=16, shortcut="none")
    residual = rj.BasicBlock(width=16)
    variables = init(plain, x)
    chex.assert_trees_all_equal_structs(variables, init(residual, x))
    zeroed = jax.tree.map(jnp.zeros_like, variables)
    assert not plain.apply(zeroed, x, train=False).any()
    assert residual.apply(zeroed, x, train=False).any()


def test_stochastic_depth_grows_linearly_and_keeps_the_mean():
    drop = rj.StochasticDepth(rate=0.25)
    x = jnp.ones((4000, 1, 1, 2))
    y = drop.apply({}, x, train=True, rngs={"dropout": jax.random.key(0)})
    assert set(np.unique(y)) == {np.float32(0), np.float32(1 / 0.75)}
    assert (y[..., 0] == y[..., 1]).all()  # whole images
    assert abs(float(y.mean()) - 1) < 0.05
    bound = tiny(stochastic_depth_rate=0.4).bind({})
    rates = [stage.stochastic_depth_rates for stage in bound.stages]
    np.testing.assert_allclose(np.ravel(rates), [0.1, 0.2, 0.3, 0.4])


def test_dropout_needs_training():
    fields = {"stage_sizes": (1, 1), "stage_widths": (8, 16)}
    model, x = tiny(**fields, dropout_rate=0.5), images()
    variables = init(model, x)
    chex.assert_trees_all_equal(run(model, variables, x), run(tiny(**fields), variables, x))
    draws = [
        model.apply(
            variables, x, train=True, mutable=["batch_stats"], rngs={"dropout": jax.random.key(k)}
        )[0]
        for k in range(2)
    ]
    assert not jnp.allclose(*draws)


def test_no_head_gives_pooled_features():
    model, x = tiny(num_classes=0), images()
    variables = init(model, x)
    assert "head" not in variables["params"]
    pooled = run(model, variables, x)
    last = run(model, variables, x, method="features")["stage4"]
    chex.assert_trees_all_close(pooled, last.mean((1, 2)))


def test_train_false_freezes_batch_norm():
    model, x = tiny(), images()
    variables = init(model, x)
    _, updates = run(model, variables, x, mutable=["batch_stats"])
    chex.assert_trees_all_equal(updates["batch_stats"], variables["batch_stats"])


@pytest.mark.parametrize(("group_size", "groups"), [(None, 1), (2, 2), (1, 4)])
@pytest.mark.devices(8)
def test_batch_norm_across_devices(group_size, groups):
    """Devices of a group together give what one device gives for all their images."""
    norm = rj.BatchNorm(axis_name="batch", group_size=group_size)
    alone = rj.BatchNorm()
    x = jax.random.normal(jax.random.key(0), (8, 4, 4, 3)) * 3 + 5
    variables = alone.init(jax.random.key(1), x, train=False)

    def apply(module, x):
        y, updates = module.apply(variables, x, train=True, mutable=["batch_stats"])
        return y, updates["batch_stats"]

    mapped = jax.pmap(functools.partial(apply, norm), axis_name="batch")
    y, statistics = mapped(x.reshape(4, 2, 4, 4, 3))
    for group in range(groups):
        devices = slice(group * 4 // groups, (group + 1) * 4 // groups)
        process_group = x.reshape(4, 2, 4, 4, 3)[devices].reshape(-1, 4, 4, 3)
        expected, expected_statistics = apply(alone, process_group)
        chex.assert_trees_all_close(y[devices].reshape(process_group.shape), expected, atol=1e-5)
        for device in range(devices.start, devices.stop):
            found = jax.tree.map(lambda leaf, device=device: leaf[device], statistics)
            chex.assert_trees_all_close(found, expected_statistics, rtol=1e-5)


def test_batch_norm_under_shard_map():
    norm = rj.BatchNorm(axis_name="batch")
    x = jax.random.normal(jax.random.key(0), (8, 2, 2, 3))
    variables = norm.init(jax.random.key(1), x, train=False)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("batch",))

    def apply(x):
        return norm.apply(variables, x, train=True, mutable=["batch_stats"])[0]

    spec = PartitionSpec("batch")
    sharded = jax.shard_map(apply, mesh=mesh, in_specs=spec, out_specs=spec)
    expected, _ = rj.BatchNorm().apply(variables, x, train=True, mutable=["batch_stats"])
    chex.assert_trees_all_close(sharded(x), expected, atol=1e-5)
    chex.assert_trees_all_close(jax.jit(sharded)(x), expected, atol=1e-5)


def test_gradients_under_shard_map():
    """Both formulas of a platform's choice differ between the same devices."""
    model = tiny(block_cls=rj.BottleneckBlock, axis_name="batch")
    x = images(8)
    variables = init(model, x)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("batch",))

    def loss(variables, x):
        y, _ = model.apply(variables, x, train=True, mutable=["batch_stats"])
        return jax.lax.pmean(jnp.square(y).mean(), "batch")

    everywhere, split = PartitionSpec(), PartitionSpec("batch")
    gradient = jax.shard_map(
        jax.grad(loss), mesh=mesh, in_specs=(everywhere, split), out_specs=everywhere
    )
    found = jax.eval_shape(gradient, variables, x)
    chex.assert_trees_all_equal_shapes(found, variables)


def test_batch_norm_with_a_large_mean():
    """One pass over the data loses the variance unless the data is centred first."""
    x = 1000 + jax.random.normal(jax.random.key(0), (64, 4, 4, 2))
    norm = rj.BatchNorm()
    variables = norm.init(jax.random.key(1), x, train=False)
    exact = np.asarray(x, np.float64)
    y, _ = norm.apply(variables, x, train=True, mutable=["batch_stats"])
    expected = (exact - exact.mean((0, 1, 2))) / np.sqrt(exact.var((0, 1, 2)) + norm.epsilon)
    assert np.abs(y - expected).max() < 1e-3


def test_any_number_of_channels():
    x = images(2, channels=9)
    chex.assert_shape(run(tiny(), init(tiny(), x), x), (2, 5))


def test_lists_are_fine_and_modules_hash():
    model = rj.ResNet(stage_sizes=[1, 1], stage_widths=[8, 8])
    assert hash(model) == hash(rj.ResNet(stage_sizes=(1, 1), stage_widths=(8, 8)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stage_sizes": (2, 0, 2, 2)}, "stage_sizes"),
        ({"stage_widths": (8, 8)}, "stage_widths"),
        ({"num_classes": -1}, "num_classes = -1"),
        ({"num_classes": "10"}, "num_classes = '10'"),
        ({"dtype": jnp.int32}, "dtype"),
        ({"dtype": "bf16"}, "dtype = 'bf16'.*bfloat16"),
        ({"shortcut": "E"}, "shortcut = 'E'.*'A'"),
        ({"norm": "layer"}, "norm = 'layer'.*'group'"),
        ({"norm": nn.LayerNorm()}, "^norm = LayerNorm[^\n]*'group'"),
        ({"norm": nn.LayerNorm, "axis_name": "batch"}, "axis_name = 'batch'.*norm of your own"),
        ({"cardinality": 2, "block_cls": rj.BasicBlock}, "cardinality = 2"),
        ({"base_width": 128, "block_cls": rj.BasicBlock}, "base_width = 128"),
        ({"se_ratio": -0.5}, "se_ratio"),
        ({"bn_momentum": 1.0}, "bn_momentum"),
        ({"bn_epsilon": 0.0}, "bn_epsilon"),
        ({"bn_group_size": 2}, "bn_group_size = 2.*axis_name"),
        ({"zero_init_residual": True, "shortcut": "none"}, "zero_init_residual"),
        ({"stochastic_depth_rate": 0.1, "shortcut": "none"}, "stochastic_depth_rate"),
        ({"dropout_rate": 1.0}, "dropout_rate"),
        ({"block_cls": "basic"}, "block_cls = 'basic'"),
        ({"stem_cls": nn.Dense}, "stem_cls.*stride"),
        ({"weight_standardization": True}, "weight_standardization"),
        ({"output_stride": 8.0}, "output_stride = 8.0"),
        ({"output_stride": 12}, r"output_stride = 12.*\[4, 8, 16, 32\]"),
    ],
)
def test_refused_fields(fields, message):
    with pytest.raises(rj.ModelError, match=message):
        tiny(**fields)


def test_refused_images():
    with pytest.raises(rj.ModelError, match=r"16x16 pixels are too small.*32x32"):
        init(tiny(), images(side=16))
    with pytest.raises(rj.ModelError, match=r"expected \[N, H, W, C\]"):
        init(tiny(), jnp.zeros((32, 32, 3)))
    with pytest.raises(rj.ModelError, match=r"look like \[N, C, H, W\]"):
        init(tiny(), jnp.zeros((2, 3, 32, 32)))
    with pytest.raises(rj.ModelError, match="have 4 channels, the network's weights take 3"):
        tiny().apply(init(tiny(), images()), images(channels=4), train=False)


def test_training_without_mutable_statistics():
    variables = init(tiny(), images())
    with pytest.raises(rj.ModelError, match=r'mutable=\["batch_stats"\]'):
        tiny().apply(variables, images(), train=True)


def test_tabulate_and_names():
    model = rj.ResNet20(stage_sizes=(1, 1, 1), name="backbone")
    table = model.tabulate(jax.random.key(0), images(), train=False)
    assert "stage3" in table
    assert "_make_stages" not in table
    assert model.name == "backbone"


def test_export_of_any_size():
    n, h, w = jax.export.symbolic_shape("n, h, w", constraints=["h >= 32", "w >= 32"])
    model = rj.ResNet18(num_classes=3, stage_sizes=(1, 1, 1, 1), stage_widths=(8, 8, 8, 8))
    variables = init(model, images())
    forward = jax.jit(lambda x: model.apply(variables, x, train=False))
    exported = jax.export.export(forward)(jax.ShapeDtypeStruct((n, h, w, 3), jnp.float32))
    assert exported.out_avals[0].shape[1] == 3


@pytest.mark.devices(8)
def test_refused_group_size():
    norm = rj.BatchNorm(axis_name="batch", group_size=3)
    x = jnp.zeros((4, 1, 2, 2, 3))
    variables = norm.init(jax.random.key(0), x[0], train=False)
    apply = functools.partial(norm.apply, variables, train=True, mutable=["batch_stats"])
    with pytest.raises(rj.ModelError, match="bn_group_size = 3 does not divide the 4 devices"):
        jax.pmap(apply, axis_name="batch")(x)


def test_from_nnx():
    linen, x = tiny(stage_sizes=(1, 1), stage_widths=(8, 16)), images()
    model = nnx.bridge.ToNNX(linen, rngs=nnx.Rngs(0)).lazy_init(x, train=False)
    logits = model(x, train=False)
    chex.assert_shape(logits, (4, 5))
    before = jax.tree.leaves(nnx.state(model, nnx.BatchStat))
    model(x, train=True, mutable=["batch_stats"])
    after = jax.tree.leaves(nnx.state(model, nnx.BatchStat))
    assert any(not jnp.array_equal(b, a) for b, a in zip(before, after))


def test_dropout_draws_what_flax_draws():
    class Dropped(nn.Module):
        own: bool

        @nn.compact
        def __call__(self, x):
            drop = nn.Dropout(0.5, broadcast_dims=(1, 2, 3))
            return dropout(drop, x, train=True) if self.own else drop(x, deterministic=False)

    rngs, x = {"dropout": jax.random.key(3)}, jnp.ones((32, 1, 1, 1))
    ours, flax = (Dropped(own).apply({}, x, rngs=rngs) for own in (True, False))
    chex.assert_trees_all_equal(ours, flax)
    assert set(np.unique(ours)) == {0, 2}
