"""Every registered model: shapes, dtypes, counts, names."""

import re

import chex
import jax
import jax.numpy as jnp
import pytest

import resnet_jax as rj

# Parameters of published networks with their usual number of classes, from torchvision, timm and
# the papers; the rest were counted here once.
PARAMETERS = {
    "plain110": 1_727_962,
    "plain18": 11_515_688,
    "plain20": 269_722,
    "plain32": 464_154,
    "plain34": 21_623_848,
    "plain44": 658_586,
    "plain56": 853_018,
    "resnet101": 44_549_160,
    "resnet101_cifar": 42_512_970,
    "resnet101d": 44_568_392,
    "resnet110": 1_727_962,
    "resnet1202": 19_421_274,
    "resnet152": 60_192_808,
    "resnet152_cifar": 58_156_618,
    "resnet152d": 60_212_040,
    "resnet18": 11_689_512,
    "resnet8_cifar": 1_227_594,
    "resnet18_cifar": 11_173_962,
    "resnet20": 269_722,
    "resnet200": 64_673_832,
    "resnet32": 464_154,
    "resnet34": 21_797_672,
    "resnet34_cifar": 21_282_122,
    "resnet44": 658_586,
    "resnet50": 25_557_032,
    "resnet50_cifar": 23_520_842,
    "resnet50c": 25_576_264,
    "resnet50d": 25_576_264,
    "resnet50t": 25_573_728,
    "resnet56": 853_018,
    "resnetrs101": 63_618_696,
    "resnetrs152": 86_621_576,
    "resnetrs50": 35_691_912,
    "resnetv2_101": 44_541_480,
    "resnetv2_101x1_bit": 44_541_480,
    "resnetv2_110": 1_730_522,
    "resnetv2_152": 60_185_128,
    "resnetv2_164": 1_703_258,
    "resnetv2_18": 11_687_720,
    "resnetv2_200": 64_666_152,
    "resnetv2_34": 21_795_880,
    "resnetv2_50": 25_549_352,
    "resnetv2_50x1_bit": 25_549_352,
    "resnext101_32x8d": 88_791_336,
    "resnext101_64x4d": 83_455_272,
    "resnext50_32x4d": 25_028_904,
    "seresnet101": 49_326_872,
    "seresnet152": 66_821_848,
    "seresnet50": 28_088_024,
    "wide_resnet101_2": 126_886_696,
    "wide_resnet28_10": 36_479_194,
    "wide_resnet50_2": 68_883_240,
    # By name only; counted with timm.
    "resnet26": 15_995_176,
    "resnet50_gn": 25_557_032,
    "resnet10t": 5_435_488,
    "resnet14t": 10_081_632,
    "resnet26t": 16_011_872,
    "resnet18d": 11_708_744,
    "resnet34d": 21_816_904,
    "resnet26d": 16_014_408,
    "resnet200d": 64_693_064,
    "resnet101c": 44_568_392,
    "resnet152c": 60_212_040,
    "resnet50s": 25_680_808,
    "resnet101s": 44_672_936,
    "resnet152s": 60_316_584,
    "resnext101_32x4d": 44_177_704,
    "resnext101_32x16d": 194_026_792,
    "resnext101_32x32d": 468_530_472,
    "resnext50d_32x4d": 25_048_136,
    "seresnext50_32x4d": 27_559_896,
    "seresnext101_32x4d": 48_955_416,
    "seresnext101_32x8d": 93_569_048,
    "seresnext101_64x4d": 88_232_984,
    "seresnext101d_32x8d": 93_588_280,
    "seresnext26d_32x4d": 16_809_512,
    "seresnext26t_32x4d": 16_806_976,
    "seresnet152d": 66_841_080,
    "ecaresnet26t": 16_011_916,
    "ecaresnet50t": 25_573_814,
    "ecaresnet50d": 25_576_350,
    "ecaresnet101d": 44_568_563,
    "ecaresnet269d": 102_093_077,
    "ecaresnetlight": 30_162_046,
    "resnetrs200": 93_209_992,
    "resnetrs270": 129_861_448,
    "resnetrs350": 163_956_168,
    "resnetrs420": 191_891_656,
}


def test_every_model_is_in_the_table():
    assert {name: rj.model_info(name).parameters for name in rj.list_models()} == PARAMETERS


def is_slow(name):
    """Deep ones, and those that differ from others by a field or two."""
    variant = re.match("resnet.*[cdst]$|.*resnext.*d_|ecaresnet|resnetrs|resnext101", name)
    return sum(rj.create_model(name).stage_sizes) > 30 or (variant and name not in _SHOWN)


_SHOWN = ("resnet50d", "resnetrs50", "ecaresnet26t", "seresnext26d_32x4d")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if is_slow(name) else ()) for name in PARAMETERS],
)
def test_counts(name):
    info = rj.model_info(name)
    side = info.image_size
    counts = rj.summary(rj.create_model(name), (1, side, side, 3))
    assert counts.parameters == info.parameters
    assert counts.multiply_adds == info.multiply_adds


def shallowest_of_each_kind():
    """Names of networks that differ in more than the number of their blocks."""
    kinds = {}
    for name in PARAMETERS:
        fields = vars(rj.create_model(name))
        kind = tuple(value for field, value in fields.items() if field in rj.ResNet.__annotations__)
        sizes = fields["stage_sizes"]
        kinds.setdefault(str([x for x in kind if x != sizes]), []).append((sum(sizes), name))
    return [min(each)[1] for each in kinds.values()]


SHALLOW = shallowest_of_each_kind()


@pytest.mark.parametrize(
    ("dtype", "name", "most_blocks"),
    [
        # With bfloat16 it shows what stays float32: parameters, statistics and logits. The blocks
        # of a stage are alike from the second one on.
        *((jnp.bfloat16, name, 2) for name in SHALLOW),
        (jnp.float32, "resnet50", 999),
        *(
            pytest.param(jnp.float32, name, 999, marks=pytest.mark.slow)
            for name in PARAMETERS
            if name != "resnet50"
        ),
    ],
)
def test_shapes_and_dtypes(dtype, name, most_blocks):
    model = rj.create_model(name, dtype=dtype, num_classes=7)
    model = model.clone(stage_sizes=tuple(min(n, most_blocks) for n in model.stage_sizes))
    side = rj.model_info(name).image_size
    images = jax.ShapeDtypeStruct((2, side, side, 3), jnp.float32)
    variables = jax.eval_shape(
        lambda rng, x: model.init(rng, x, train=False), jax.random.key(0), images
    )
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    logits, updates = jax.eval_shape(
        lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"]), variables, images
    )
    chex.assert_shape(logits, (2, 7))
    assert logits.dtype == jnp.float32
    if "batch_stats" in variables:
        chex.assert_trees_all_equal_shapes_and_dtypes(
            updates["batch_stats"], variables["batch_stats"]
        )
    else:
        assert model.norm == "group"


@pytest.mark.parametrize(
    ("name", "printed"),
    [
        ("resnet18", 1.8),
        ("resnet34", 3.6),
        ("resnet50", 3.8),
        ("resnet101", 7.6),
        ("resnet152", 11.3),
    ],
)
def test_multiply_adds_of_table_1(name, printed):
    """The paper's figures; it rounds some (7.57 to 7.6) and cuts others (3.86 to 3.8)."""
    model = rj.create_model(name, stride_in_1x1=True)
    giga = rj.summary(model, (1, 224, 224, 3)).multiply_adds / 1e9
    assert printed in (round(giga, 1), int(giga * 10) / 10)


def with_two_blocks(name):
    """A model of its family: the second block halves the resolution."""
    return rj.create_model(name, stage_sizes=(1, 1), stage_widths=(64, 128), num_classes=5)


# Of models that differ in depth and width alone, one.
KINDS = {with_two_blocks(name): name for name in rj.list_models()}
FEW = ("resnet50d", "seresnet50", "resnetv2_50x1_bit")


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(model, id=name, marks=[] if name in FEW else pytest.mark.slow)
        for model, name in KINDS.items()
    ],
)
def test_every_kind_of_model_has_a_gradient_under_jit(model):
    """As the training step takes it; nothing is computed."""
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), images)

    @jax.jit
    def gradient(variables, images):
        def loss(params):
            logits, _ = model.apply(
                {**variables, "params": params},
                images,
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": jax.random.key(1)},
            )
            return logits.sum()

        return jax.grad(loss)(variables["params"])

    found = jax.eval_shape(gradient, variables, images)
    chex.assert_trees_all_equal_shapes_and_dtypes(found, variables["params"])


def test_constructors_are_public_or_the_model_has_a_name_only():
    for name in rj.list_models():
        constructor = rj.model_info(name).constructor
        public = getattr(constructor, "__name__", None)
        assert public is None or getattr(rj, public) is constructor
        assert constructor() == rj.create_model(name)


def test_unknown_names_suggest_close_ones():
    with pytest.raises(ValueError, match=r"'resnet5'.*'resnet50'"):
        rj.create_model("resnet5")
    with pytest.raises(ValueError, match=r"'num_clases'.*'num_classes'"):
        rj.create_model("resnet50", num_clases=3)
    with pytest.raises(ValueError, match=r"'num_clases'.*'num_classes'"):
        rj.ResNet50(num_clases=3)
    with pytest.raises(ValueError, match=r"resnet26: .*'num_clases'.*'num_classes'"):
        rj.create_model("resnet26", num_clases=3)
    with pytest.raises(ValueError, match=r"rj\.load_pretrained"):
        rj.ResNet50(pretrained=True)
