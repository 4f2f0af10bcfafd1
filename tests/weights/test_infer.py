"""A network told from its weights, by names and shapes alone."""

import functools
import re

import numpy as np
import pytest

import resnet_jax as rj
from resnet_jax.errors import WeightsError
from resnet_jax.weights.convert import variable_shapes
from resnet_jax.weights.infer import infer_model
from resnet_jax.weights.naming import schemes_for

# Networks whose weights are those of another one, and the one that is taken for it.
SAME_WEIGHTS = {f"plain{depth}": f"resnet{depth}" for depth in (20, 32, 44, 56, 110)}


def tensors_of(model, scheme=0, channels=3):
    """A model's tensors by name, all of them one zero: without memory, and hardly a trace.

    A stage's blocks after the second are like it, so that two are traced.
    """
    sizes = model.stage_sizes
    short = model.clone(stage_sizes=tuple(min(size, 2) for size in sizes))
    naming = schemes_for(model)[scheme]
    tensors = {}
    for path, shape in variable_shapes(short, channels).items():
        theirs = (shape[3], shape[2], *shape[:2]) if len(shape) == 4 else shape[::-1]
        if len(shape) == 2 and naming.is_conv(path):
            theirs = (*theirs, 1, 1)
        tensor = np.broadcast_to(np.float32(0), theirs)
        tensors[naming.torch_name(path)] = tensor
        if path[2:3] == ("block2",):
            for block in range(3, sizes[int(path[1].removeprefix("stage")) - 1] + 1):
                later = (*path[:2], f"block{block}", *path[3:])
                tensors[naming.torch_name(later)] = tensor
    return tensors


def is_slow(name):
    sizes = rj.create_model(name).stage_sizes
    return sum(sizes) > 16 or (max(sizes) > 2 and name.startswith(("eca", "se", "resnetrs")))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if is_slow(name) else ())
        for name in rj.list_models()
    ],
)
def test_every_registered_network_is_told_from_its_weights(name):
    model = rj.create_model(name, num_classes=7)
    inferred = infer_model(tensors_of(model))
    assert inferred.name == SAME_WEIGHTS.get(name, name)
    assert inferred.fields == {"num_classes": 7}
    assert (inferred.channels, inferred.image_size) == (3, rj.model_info(name).image_size)
    assert rj.create_model(inferred.name, **inferred.fields) == model.clone(
        shortcut="A" if name in SAME_WEIGHTS else model.shortcut
    )


@pytest.mark.parametrize("scheme", range(4))
def test_every_naming_scheme_tells_the_network(scheme):
    inferred = infer_model(tensors_of(rj.ResNet50(), scheme))
    assert (inferred.name, inferred.fields) == ("resnet50", {"num_classes": 1000})


@pytest.mark.parametrize(
    ("model", "fields"),
    [
        (rj.ResNet18(num_classes=0), {"num_classes": 0}),
        (rj.ResNet18(stage_sizes=(1, 2, 3)[:3], stage_widths=(64, 128, 256)), None),
        (rj.ResNet50(cardinality=8, base_width=16), None),
        (rj.ResNet50(se_ratio=1 / 8, shortcut="D"), None),
        (rj.ResNet50(shortcut="C"), None),
        (rj.ResNet18(norm="group"), None),
        (rj.ResNet18(stem_cls=functools.partial(rj.DeepStem, widths=(8, 16, 64))), None),
        (rj.ResNet20(shortcut="B", stem_cls=functools.partial(rj.CifarStem, features=24)), None),
        (rj.WideResNet28_10(stage_widths=(32, 64, 128)), None),
        (rj.BiTResNet50x1(stage_widths=(192, 384, 768, 1536)), None),
    ],
)
def test_fields_that_no_registered_network_has_are_told(model, fields):
    tensors = tensors_of(model)
    inferred = infer_model(tensors)
    assert fields is None or inferred.fields == fields
    found = rj.create_model(inferred.name, **inferred.fields)
    assert tensors_of(found).keys() == tensors.keys()
    assert {k: v.shape for k, v in tensors_of(found).items()} == {
        k: v.shape for k, v in tensors.items()
    }
    for field in ("shortcut", "norm", "weight_standardization", "block_cls"):
        assert getattr(found, field) == getattr(model, field)


def test_a_wider_big_transfer_network_keeps_its_pool():
    model = rj.BiTResNet50x1(stage_widths=(192, 384, 768, 1536))
    model = model.clone(stem_cls=functools.partial(model.stem_cls, features=192))
    inferred = infer_model(tensors_of(model))
    stem = rj.create_model(inferred.name, **inferred.fields).stem_cls
    assert stem.keywords == {"zero_pool_padding": True, "features": 192}


def test_channels_of_the_images_are_told():
    assert infer_model(tensors_of(rj.ResNet18(), channels=4)).channels == 4


def test_what_weights_do_not_show_is_said():
    resnet50, resnet20, bit = (
        infer_model(tensors_of(model)).assumed
        for model in (rj.ResNet50(), rj.ResNet20(), rj.BiTResNet50x1())
    )
    assert "a bottleneck's stride is on its 3x3 (v1.5)" in resnet50
    assert "the norms' epsilon is 1e-05" in resnet50
    assert any("a plain network has the same weights" in each for each in resnet20)
    assert "kernels are standardized" in bit


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"cls_token": (1, 1, 8), "blocks.0.attn.qkv.weight": (24, 8)}, "a vision transformer's"),
        ({"features.0.weight": (64, 3, 3, 3)}, "a VGG's or AlexNet's (features.0.weight)"),
        ({"stages.0.blocks.0.conv_dw.weight": (8, 1, 7, 7)}, "depthwise convolutions"),
        ({"layer1.0.convs.0.weight": (8, 8, 3, 3)}, "a Res2Net's"),
        ({"layer1.0.conv2.fc1.weight": (8, 8, 1, 1)}, "a ResNeSt's"),
        ({"stages.0.conv_exp.conv.weight": (8, 8, 1, 1)}, "a CSPNet's"),
        ({"attnpool.q_proj.weight": (8, 8)}, "a CLIP's"),
        ({"layer1.0.conv9.weight": (64, 64, 3, 3)}, "no layers such as layer1.0.conv9.weight"),
        ({"layer2.0.conv1.weight": (128, 64, 5, 5)}, "stage2/block1/conv1 has shape"),
        ({"layer1.0.conv2.weight": (64, 32, 3, 3)}, "stage1/block1/conv2 has shape"),
        ({"layer1.0.conv2.weight": (64, 0, 3, 3)}, "stage1/block1/conv2 has shape"),
        ({"layer3.0.conv1.weight": ()}, "stage3/block1/conv1 has shape ()"),
        ({"conv1.weight": (64, 3, 5, 5)}, "first convolution is 5x5"),
        ({"layer4.7.conv1.weight": (512, 512, 3, 3)}, "blocks of stage 4 are 1, 2, 8"),
        ({"layer999999.0.conv1.weight": (512, 512, 3, 3)}, "stages are 1, 2, 3, 4, ..."),
        ({f"layer{'9' * 5000}.0.conv1.weight": (2,)}, ""),
        ({"layer2.1.downsample.0.weight": (128, 128, 1, 1)}, "projections in stage2/block1"),
    ],
)
def test_what_is_no_resnet_is_refused_by_what_was_seen(names, message):
    tensors = tensors_of(rj.ResNet18())
    tensors |= {name: np.broadcast_to(np.float32(0), shape) for name, shape in names.items()}
    if not message:  # a number that no layer has is another network's
        assert infer_model(tensors).name == "resnet18"
        return
    with pytest.raises(WeightsError, match=re.escape(message)):
        infer_model(tensors)


def test_no_tensors_are_no_network():
    with pytest.raises(WeightsError, match="the file has no tensors"):
        infer_model({})
    with pytest.raises(WeightsError, match=r"names such as encoder\.weight"):
        infer_model({"encoder.weight": np.zeros((2, 2), np.float32)})
