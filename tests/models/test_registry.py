"""Every registered model: shapes, dtypes, counts, names."""

import csv
import functools
import inspect
import pathlib
import pickle
import re

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import resnet_jax as rj
from resnet_jax.models import registry

# Parameters of published networks are those of torchvision, timm and the papers; multiply-adds, and
# the parameters of the others, were counted here once.
with open(pathlib.Path(__file__).with_name("networks.csv"), newline="") as file:
    NETWORKS = {row["name"]: row for row in csv.DictReader(file)}


def test_every_model_is_in_the_table():
    found = {name: rj.model_info(name).image_size for name in rj.list_models()}
    assert found == {name: int(row["image_size"]) for name, row in NETWORKS.items()}


def is_slow(name):
    """Deep ones, and those that differ from others by a field or two."""
    variant = re.match("resnet.*[cdst]$|.*resnext.*d_|ecaresnet|resnetrs|resnext101", name)
    return sum(rj.create_model(name).stage_sizes) > 30 or (variant and name not in _SHOWN)


_SHOWN = ("resnet50d", "resnetrs50", "ecaresnet26t", "seresnext26d_32x4d")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if is_slow(name) else ()) for name in NETWORKS],
)
def test_counts(name):
    info = rj.model_info(name)
    assert info.parameters == int(NETWORKS[name]["parameters"])
    assert info.multiply_adds == int(NETWORKS[name]["multiply_adds"])


def shallowest_of_each_kind():
    """Names of networks that differ in more than the number of their blocks."""
    kinds = {}
    for name in NETWORKS:
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
            for name in NETWORKS
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


CONSTRUCTORS = {row["constructor"]: name for name, row in NETWORKS.items() if row["constructor"]}


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_constructors(name):
    constructor = getattr(rj, name)
    assert constructor(num_classes=7) == rj.create_model(CONSTRUCTORS[name], num_classes=7)
    assert pickle.loads(pickle.dumps(constructor))() == constructor()  # noqa: S301
    assert name in dir(rj)


def test_constructors_of_the_paper_show_their_fields():
    depths = (18, 34, 50, 101, 152, 20, 32, 44, 56, 110, 1202)
    names = {f"ResNet{depth}" for depth in depths}
    assert {name for name in CONSTRUCTORS if name in rj.__all__} == names
    for name in names:
        fields = inspect.signature(getattr(rj, name)).parameters
        assert fields["stage_sizes"].default == getattr(rj, name)().stage_sizes
        assert {"num_classes", "dtype", "remat"} < fields.keys()


def test_the_default_network_is_resnet50():
    assert rj.ResNet() == rj.ResNet50()


def test_other_constructors_are_made_on_demand():
    from resnet_jax import SEResNet50

    assert SEResNet50().se_ratio
    with pytest.raises(AttributeError, match="SEResNet51"):
        rj.SEResNet51  # noqa: B018


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


@pytest.fixture
def own_names(monkeypatch):
    monkeypatch.setattr(registry, "_ARCHITECTURES", dict(registry._ARCHITECTURES))


FIELDS = {"stage_sizes": (1,), "stage_widths": (16,), "stem_cls": rj.CifarStem}


@pytest.mark.usefixtures("own_names")
def test_a_network_of_ones_own_has_a_name():
    entry = rj.register_model("mynet", image_size=32, paper="A note", num_classes=10, **FIELDS)
    assert rj.list_models("mynet") == ["mynet"]
    assert rj.model_info("mynet") is entry
    assert rj.create_model("mynet", dtype=jnp.bfloat16) == rj.ResNet(
        num_classes=10, dtype=jnp.bfloat16, **FIELDS
    )
    counts = rj.summary(rj.create_model("mynet"), (1, 32, 32, 3))
    assert (entry.parameters, entry.multiply_adds) == (counts.parameters, counts.multiply_adds)
    with pytest.raises(ValueError, match=r"mynet: .*'num_clases'.*'num_classes'"):
        rj.create_model("mynet", num_clases=3)


@pytest.mark.usefixtures("own_names")
def test_a_name_means_one_network():
    rj.register_model("mynet", **FIELDS)
    rj.register_model("mynet", **FIELDS)  # the same: a recipe that is loaded twice
    with pytest.raises(rj.ModelError, match=r"'mynet'.*another network.*replace=True"):
        rj.register_model("mynet", eca=True, **FIELDS)
    rj.register_model("mynet", eca=True, replace=True, **FIELDS)
    assert rj.create_model("mynet").eca
    with pytest.raises(rj.ModelError, match=r"'resnet50'.*another network has this name"):
        rj.register_model("resnet50", replace=True, **FIELDS)


@pytest.mark.usefixtures("own_names")
def test_a_network_with_partials_is_registered_again():
    """As by a cell of a notebook that runs twice."""

    def register(features):
        stem = functools.partial(rj.CifarStem, features=features)
        norm = functools.partial(nn.GroupNorm, num_groups=4)
        return rj.register_model("mynet", **{**FIELDS, "stem_cls": stem, "norm": norm})

    register(features=32)
    register(features=32)
    with pytest.raises(rj.ModelError, match="another network has this name"):
        register(features=16)


class Wider(rj.ResNet):
    factor: int = 2


@pytest.mark.usefixtures("own_names")
def test_a_subclass_has_fields_of_its_own():
    rj.register_model("wider", Wider, factor=3, **FIELDS)
    assert rj.create_model("wider", num_classes=7) == Wider(factor=3, num_classes=7, **FIELDS)


@pytest.mark.usefixtures("own_names")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "my net"}, "name = 'my net'"),
        ({"name": ""}, "name = ''"),
        ({"name": 3}, "name = '3'"),
        ({"model_cls": rj.BasicBlock}, "mynet: model_cls = .*BasicBlock.* is not ResNet"),
        ({"model_cls": functools.partial(rj.ResNet)}, "mynet: model_cls = "),
        ({"image_size": 0}, "mynet: image_size = 0"),
        ({"image_size": "32"}, "mynet: image_size = '32'"),
        ({"num_clases": 3}, "mynet: .*'num_clases'.*'num_classes'"),
        ({"stage_sizes": 3}, "mynet: "),
        ({"shortcut": "E"}, "shortcut = 'E'"),
    ],
)
def test_refused_registrations(arguments, message):
    with pytest.raises(rj.ModelError, match=message):
        rj.register_model(**{"name": "mynet", **arguments})
    assert "mynet" not in rj.list_models()
