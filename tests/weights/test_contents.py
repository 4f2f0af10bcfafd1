"""Checkpoints as they are published: which network of them is taken, and what is left out."""

import functools
import itertools

import chex
import flax.linen as nn
import jax
import numpy as np
import pytest

import resnet_jax as rj
from resnet_jax.weights.contents import find_network
from resnet_jax.weights.convert import head_classes
from tests.variables import random_variables

CLASSES, FEATURES = 5, 32
LEAVES = ("weight", "bias", "running_mean", "running_var")


def tiny(**fields):
    fields = {
        "stage_sizes": (1, 1),
        "stage_widths": (16, FEATURES),
        "num_classes": CLASSES,
    } | fields
    return rj.create_model("resnet20", **fields)


@functools.cache
def variables(model=None):
    return random_variables(model) if model else rj.from_torch(tiny(), network())


def network(kind="raw"):
    """The state dict that is to be found; of another kind, one with other numbers."""
    shapes = {
        "conv1.weight": (16, 3, 3, 3),
        "fc.weight": (CLASSES, FEATURES),
        "fc.bias": (CLASSES,),
    }
    shapes |= {f"bn1.{leaf}": (16,) for leaf in LEAVES}
    for stage, inputs, width in ((1, 16, 16), (2, 16, FEATURES)):
        for number in (1, 2):
            shapes[f"layer{stage}.0.conv{number}.weight"] = (width, inputs, 3, 3)
            shapes |= {f"layer{stage}.0.bn{number}.{leaf}": (width,) for leaf in LEAVES}
            inputs = width
    generator = np.random.default_rng(0 if kind == "raw" else 1)
    return {name: generator.normal(size=x).astype(np.float32) for name, x in shapes.items()}


def backbone(kind="raw"):
    return {name: x for name, x in network(kind).items() if not name.startswith("fc.")}


def renamed(prefix, tensors, head="fc"):
    return {f"{prefix}{name.replace('fc.', f'{head}.')}": x for name, x in tensors.items()}


def dense(name, outputs, inputs, bias=True):
    layer = {f"{name}.weight": np.ones((outputs, inputs), np.float32)}
    return layer | ({f"{name}.bias": np.ones(outputs, np.float32)} if bias else {})


def mlp(name, *sizes, bias=True):
    """Linear, norm, ReLU in turn, as in a projection head."""
    layers = {}
    for index, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
        layers |= dense(f"{name}.{3 * index}", outputs, inputs, bias)
        layers[f"{name}.{3 * index + 1}.running_mean"] = np.ones(outputs, np.float32)
    return layers


def vector(size=3):
    return np.ones(size, np.float32)


HEAD = {"fc.weight": network()["fc.weight"], "fc.bias": network()["fc.bias"]}
SCORES = {"epoch": 7, "arch": "resnet50", "best_acc1": np.float64(0.5)}

# Layout -> (the checkpoint, the arguments that it needs, whether it has a head).
LAYOUTS = {
    "torchvision script": (
        {"model": network(), "model_ema": renamed("module.", network("ema")), **SCORES},
        {"weights": "raw"},
        True,
    ),
    "torchvision script, averaged": (
        {
            "model": network("other"),
            "model_ema": {"n_averaged": np.int64(9), **renamed("module.", network())},
        },
        {},
        True,
    ),
    "timm trainer": (
        {"state_dict": network("other"), "state_dict_ema": network(), "optimizer": {"state": {}}},
        {},
        True,
    ),
    "AveragedModel": ({"n_averaged": np.int64(9), **renamed("module.", network())}, {}, True),
    "DataParallel and compile": (renamed("_orig_mod.module.", network()), {}, True),
    "Lightning": (
        {
            "state_dict": {
                **renamed("model.", network()),
                "criterion.weight": vector(),
                "train_acc.correct": np.ones(1, np.int64),
                "loss_fn.pos_weight": vector(),
            },
            "hyper_parameters": {"lr": 0.1},
            "callbacks": {"EarlyStopping": {"wait": 0}},
        },
        {},
        True,
    ),
    "Lightning, backbone and classifier": (
        {"state_dict": {**renamed("backbone.", backbone()), **renamed("", HEAD, "classifier")}},
        {},
        True,
    ),
    "MoCo v1": (
        {
            "state_dict": {
                **renamed("module.encoder_q.", backbone()),
                **dense("module.encoder_q.fc", 128, FEATURES),
                **renamed("module.encoder_k.", backbone("other")),
                **dense("module.encoder_k.fc", 128, FEATURES),
                "module.queue": np.ones((128, 99), np.float32),
                "module.queue_ptr": np.ones(1, np.int64),
            }
        },
        {},
        False,
    ),
    "MoCo v2": (
        {
            "state_dict": {
                **renamed("module.encoder_q.", backbone()),
                **dense("module.encoder_q.fc.0", FEATURES, FEATURES),
                **dense("module.encoder_q.fc.2", 128, FEATURES),
                **renamed("module.encoder_k.", backbone("other")),
                "module.queue": np.ones((128, 99), np.float32),
            }
        },
        {},
        False,
    ),
    "SimCLR": (
        {
            **renamed("encoder.", backbone()),
            **mlp("projector", FEATURES, FEATURES, 8),
        },
        {},
        False,
    ),
    "SimCLR, evaluated": ({"state_dict": renamed("backbone.", network())}, {}, True),
    "BYOL (lucidrains)": (
        {
            **renamed("net.", backbone("other")),
            **renamed("online_encoder.net.", backbone()),
            **mlp("online_encoder.projector.net", FEATURES, 32, 8),
            **renamed("target_encoder.net.", backbone("other")),
            **mlp("target_encoder.projector.net", FEATURES, 32, 8),
            **mlp("online_predictor.net", 8, 32, 8),
        },
        {},
        False,
    ),
    "SwAV": (
        renamed(
            "module.",
            {
                **backbone(),
                **mlp("projection_head", FEATURES, 32, 8),
                **dense("prototypes", 30, 8, bias=False),
            },
        ),
        {},
        False,
    ),
    "DINO, whole": (
        {
            "student": {
                **renamed("module.backbone.", backbone("other")),
                **mlp("module.head.mlp", FEATURES, 32, 8),
            },
            "teacher": {
                **renamed("backbone.", backbone()),
                **mlp("head.mlp", FEATURES, 32, 8),
                "head.last_layer.weight_g": vector(),
            },
            "dino_loss": {"center": vector()},
        },
        {},
        False,
    ),
    "DINO, backbone": (backbone(), {}, False),
    "Barlow Twins": (
        {
            "model": renamed(
                "module.",
                {
                    **renamed("backbone.", backbone()),
                    **mlp("projector", FEATURES, 32, 32, bias=False),
                    "bn.running_mean": vector(),
                },
            ),
            "optimizer": {"state": {0: {"mu": vector()}}, "param_groups": []},
        },
        {},
        False,
    ),
    "VICReg": (
        {
            "model": {
                **renamed("module.backbone.", backbone()),
                **mlp("module.projector", FEATURES, 32, 32),
            }
        },
        {},
        False,
    ),
    "mmpretrain": (
        {
            "meta": {"CLASSES": ("a", "b")},
            "state_dict": {**renamed("backbone.", backbone()), **renamed("", HEAD, "head.fc")},
        },
        {},
        True,
    ),
    "torchvision detection": (
        {
            **renamed("backbone.body.", backbone()),
            "backbone.fpn.inner_blocks.0.0.weight": np.ones((8, 8, 1, 1), np.float32),
            **dense("roi_heads.box_head.fc6", 32, 98),
            **dense("roi_heads.box_predictor.cls_score", 91, 32),
        },
        {},
        False,
    ),
    "children in a Sequential": (
        {
            f"backbone.{name}": x
            for name, x in backbone().items()
            for old, new in (("conv1.", "0."), ("bn1.", "1."), ("layer1.", "4."), ("layer2.", "5."))
            if name.startswith(old)
            for name in [new + name.removeprefix(old)]
        },
        {},
        False,
    ),
    "several networks": (
        {**renamed("models.0.", network("other")), **renamed("models.1.", network())},
        {"prefix": "models.1"},
        True,
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_published_layouts_load(layout):
    checkpoint, arguments, has_head = LAYOUTS[layout]
    model = tiny() if has_head else tiny(num_classes=0)
    found = rj.from_torch(model, checkpoint, **arguments)
    expected = {key: dict(part) for key, part in variables().items()}
    if not has_head:
        expected["params"].pop("head")
    chex.assert_trees_all_equal(found, expected)
    chex.assert_trees_all_equal_structs(
        rj.from_torch(tiny(num_classes=3), checkpoint, reset_head=True, **arguments),
        variables(),
    )


@pytest.mark.parametrize("layout", [name for name, (*_, head) in LAYOUTS.items() if not head])
def test_what_is_said_of_a_missing_head(layout):
    checkpoint, arguments, _ = LAYOUTS[layout]
    with pytest.raises(rj.WeightsError, match="reset_head=True") as caught:
        rj.from_torch(tiny(), checkpoint, **arguments)
    assert len(str(caught.value)) < 1000


def test_what_is_taken_is_said():
    def taken(layout, **arguments):
        return find_network(LAYOUTS[layout][0], **arguments).chosen

    assert taken("timm trainer") == "state_dict_ema, not state_dict"
    assert taken("timm trainer", weights="raw") == "state_dict, not state_dict_ema"
    assert taken("MoCo v1") == "state_dict.module.encoder_q, not state_dict.module.encoder_k"
    assert taken("DINO, whole") == "teacher.backbone, not student.module.backbone"
    assert taken("mmpretrain") == "head.fc as the head"
    assert taken("AveragedModel") == ""


def test_a_network_is_chosen_by_its_prefix():
    moco = LAYOUTS["MoCo v1"][0]
    for prefix in (
        "encoder_k",
        "module.encoder_k",
        "module.encoder_k.",
        "state_dict.module.encoder_k",
    ):
        found = find_network(moco, prefix=prefix).tensors
        np.testing.assert_array_equal(found["bn1.weight"], network("other")["bn1.weight"])
    with pytest.raises(rj.WeightsError, match=r"no network has prefix=.encoder.; there are state_"):
        find_network(moco, prefix="encoder")


@pytest.mark.parametrize(
    ("checkpoint", "arguments", "message"),
    [
        (
            {**renamed("left.", network()), **renamed("right.", network())},
            {},
            r"several networks, choose one by prefix=: there are left \(20\), right \(20\)",
        ),
        ({"student": network(), "teacher": {"layer1.9.a.b": vector(), **network()}}, {}, "prefix="),
        (network(), {"weights": "ema"}, 'weights="ema": there are none'),
        ({"ema": network()}, {"weights": "raw"}, 'weights="raw": there are none'),
        (network(), {"weights": "swa"}, 'must be "ema" or "raw"'),
        (network(), {"prefix": "net"}, "no network has prefix='net'; there are no prefix"),
        ({"a.b": vector()}, {"prefix": "net"}, "no name starts with prefix='net'"),
        (
            {**network(), "layer1.0.conv9.weight": vector(), "layer1.0.bn9.bias": vector()},
            {},
            "more than the model; pass strict=False.*2 unexpected: layer1.0.bn9.bias, layer1.0.c",
        ),
        ({**network(), "extra.weight": vector()}, {}, "1 unexpected: extra.weight"),
        ({**network(), **dense("fc2", 3, FEATURES)}, {}, "2 unexpected: fc2.bias, fc2.weight"),
        (
            {**backbone(), **dense("fc.1", 9, FEATURES)},
            {},
            r"\(fc\.1 as the head\).*its head has 9 classes, the model's 5; pass reset_head=True",
        ),
        ({**backbone(), **dense("top", 5, FEATURES, bias=False)}, {}, "its head may be top, which"),
        ({**backbone(), **dense("top", 5, 99)}, {}, "its head may be top, which"),
        (
            {**backbone(), **dense("fc.0", 9, FEATURES), **dense("fc.3", 5, 9)},
            {},
            r"several linear layers \(fc.0, fc.3\) and none is the head; .* num_classes=0",
        ),
        (backbone(), {}, "they have no head; pass reset_head=True .* num_classes=0"),
    ],
)
def test_what_is_not_clear_is_refused(checkpoint, arguments, message):
    with pytest.raises(rj.WeightsError, match=message) as caught:
        rj.from_torch(tiny(), checkpoint, **arguments)
    assert len(str(caught.value)) < 1000


def test_surplus_that_may_be_a_mistake_is_left_out_when_asked():
    surplus = {
        "layer1.0.conv9.weight": vector(),
        "attention.weight": vector(),
        "layer3.0.a.b": vector(),
    }
    found = rj.from_torch(tiny(), {**network(), **surplus}, strict=False)
    chex.assert_trees_all_equal(found, variables())
    with pytest.raises(rj.WeightsError, match="missing"):  # what is not there cannot be left out
        rj.from_torch(tiny(), {**backbone(), "fc.weight": HEAD["fc.weight"]}, strict=False)


@pytest.mark.parametrize("name", ["fc.1", "1", "top.layer", "last_linear", "classifier", "head"])
def test_a_head_under_another_name(name):
    assert head_classes(tiny(), renamed("", network(), name)) == CLASSES
    found = rj.from_torch(tiny(), renamed("module.", network(), name))
    chex.assert_trees_all_equal(found, variables())


@pytest.mark.parametrize("projection", ["downsample", "shortcut"])
@pytest.mark.parametrize("head", ["fc", "linear"])
def test_names_of_cifar_repositories(projection, head):
    model = tiny(shortcut="B")
    arrays = rj.to_torch(model, variables(model))
    named = {n.replace("downsample", projection): x for n, x in renamed("", arrays, head).items()}
    chex.assert_trees_all_equal(rj.from_torch(model, named), variables(model))
    assert head_classes(model, named) == CLASSES
    rj.from_torch(tiny(shortcut="B", num_classes=3), named, reset_head=True)


def test_classes_of_a_head():
    assert head_classes(tiny(), network()) == CLASSES
    assert head_classes(tiny(), backbone()) == 0
    assert head_classes(tiny(), LAYOUTS["MoCo v2"][0]) == 0


class OwnStem(rj.CifarStem):
    """With names that no repository has."""

    def setup(self):
        self.conv_a = self.conv_cls(16, 3)
        self.norm_a = self.norm_cls()
        self.slope = self.param("slope", jax.nn.initializers.ones, (1,))

    def __call__(self, x, train):
        return self.slope * self.norm_a(self.conv_a(x), train)


class OwnBlock(rj.BasicBlock):
    """With a norm that no repository has."""

    @nn.compact
    def __call__(self, x, train):
        y = self.conv_cls(self.width, 3, stride=self.stride, name="conv1")(x)
        return self.add_shortcut(self.norm_cls(name="norm_b")(y, train), x, train)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("channels", [3, 5])
def test_own_layers_keep_their_paths(suffix, channels, tmp_path):
    model = tiny(stem_cls=OwnStem, block_cls=OwnBlock, stage_widths=(16, 16))
    own = model.init(jax.random.key(0), np.zeros((1, 16, 16, channels), np.float32), train=False)
    own = jax.tree.map(np.asarray, own)
    arrays = rj.to_torch(model, own)
    assert arrays["stem.conv_a.weight"].shape == (16, channels, 3, 3)
    names = (
        "stem.norm_a.running_var",
        "stem.slope",
        "layer2.0.conv1.weight",
        "layer1.0.norm_b.bias",
    )
    assert set(names) <= arrays.keys()
    rj.save_weights(tmp_path / f"w{suffix}", model, own)
    chex.assert_trees_all_equal(rj.load_weights(model, tmp_path / f"w{suffix}"), own)


class ClashingStem(rj.CifarStem):
    def setup(self):
        self.weight = self.param("weight", jax.nn.initializers.ones, (1,))
        self.scale = self.param("scale", jax.nn.initializers.ones, (1,))

    def __call__(self, x, train):
        return x[..., :1] * self.weight * self.scale


def test_pre_activation_with_a_deep_stem_has_the_names_of_timm():
    model = rj.ResNetV2_50(
        stem_cls=rj.DeepStem, shortcut="D", stage_sizes=(1,), stage_widths=(8,), num_classes=3
    )
    arrays = rj.to_torch(model, variables(model))
    stem = {name for name in arrays if name.startswith("stem.")}
    convs = {f"stem.conv{k}.weight" for k in (1, 2, 3)}
    leaves = ("weight", "bias", "running_mean", "running_var")
    assert stem == convs | {f"stem.norm{k}.{leaf}" for k in (1, 2) for leaf in leaves}
    chex.assert_trees_all_equal(rj.from_torch(model, arrays), variables(model))


def test_names_that_clash_are_one_line():
    model = tiny(stem_cls=ClashingStem)
    own = model.init(jax.random.key(0), np.zeros((1, 16, 16, 3), np.float32), train=False)
    with pytest.raises(rj.WeightsError, match=r"several variables would be named stem\.weight"):
        rj.to_torch(model, own)


def test_a_tree_of_dictionaries_has_one_name_for_each_array():
    tree = {"params": {"conv_init": {"kernel": vector()}}, "step": 3, "batch_stats": {}}
    assert list(find_network(tree).tensors) == ["params/conv_init/kernel"]


def test_optimizers_and_loops_cost_little():
    deep = {"state": {str(n): {"layer": vector()} for n in range(10_000)}}
    loop = {**network(), "optimizer": deep}
    loop["self"] = loop
    chex.assert_trees_all_equal(rj.from_torch(tiny(), loop), variables())
