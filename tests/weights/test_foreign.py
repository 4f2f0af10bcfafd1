"""Weights of other frameworks give the logits that those frameworks give."""

import jax
import numpy as np
import pytest

import resnet_jax as rj
from resnet_jax.errors import WeightsError
from resnet_jax.weights.foreign import translate
from resnet_jax.weights.infer import infer_model
from tests.weights.foreign_nets import images, numbers, recorded

NETWORKS = recorded()


@pytest.mark.parametrize("name", NETWORKS)
def test_logits_are_those_of_the_other_framework(name):
    tensors = numbers(NETWORKS[name]["shapes"])
    inferred = infer_model(tensors)
    model = rj.create_model(inferred.name, **inferred.fields, precision="highest")
    variables = rj.from_torch(model, tensors)
    found = jax.jit(model.apply, static_argnames="train")(variables, images(), train=False)
    expected = np.asarray(NETWORKS[name]["logits"])
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()


def test_what_a_framework_fixes_is_told_and_asked_for():
    tensors = numbers(NETWORKS["Keras"]["shapes"])
    inferred = infer_model(tensors)
    assert inferred.fields["stride_in_1x1"] is True
    assert inferred.fields["bn_epsilon"] == 1.001e-5
    assert [round(255 * value, 3) for value in inferred.preprocessing["mean"]] == [
        123.68,
        116.779,
        103.939,
    ]
    v15 = rj.create_model(inferred.name, **{**inferred.fields, "stride_in_1x1": False})
    with pytest.raises(WeightsError, match=r"Keras need stride_in_1x1=True"):
        rj.from_torch(v15, tensors)
    # The two epsilons differ less than float32 rounds.
    usual = rj.create_model(inferred.name, **{**inferred.fields, "bn_epsilon": 1e-5})
    rj.from_torch(usual, tensors)


def test_names_of_older_keras_files():
    tensors = numbers(NETWORKS["Keras"]["shapes"])
    older = {name.removeprefix("model_weights/") + ":0": value for name, value in tensors.items()}
    expected, found = translate(tensors).tensors, translate(older).tensors
    assert expected.keys() == found.keys()
    assert all((expected[name] == found[name]).all() for name in expected)


def test_a_backbone_of_transformers_has_no_prefix_and_no_head():
    tensors = numbers(NETWORKS["transformers basic"]["shapes"])
    backbone = {n.removeprefix("resnet."): x for n, x in tensors.items() if "classifier" not in n}
    assert infer_model(backbone).fields["num_classes"] == 0


def test_names_that_no_framework_has_stay():
    tensors = {"layer1.0.conv1.weight": np.zeros((8, 8, 3, 3)), "queue": np.zeros(3)}
    translated = translate(tensors)
    assert translated.tensors == tensors
    assert not translated.framework


def _zeros(**shapes):
    return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}


PREACTIVATION = {
    "conv1.weight": (16, 3, 3, 3),
    "layer1.0.bn1.weight": (16,),
    "layer1.0.conv1.weight": (32, 16, 3, 3),
    "layer1.0.shortcut.0.weight": (32, 16, 1, 1),
}


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (PREACTIVATION, "without a final norm and ReLU, as in kuangliu/pytorch-cifar"),
        ({**PREACTIVATION, "bn1.weight": (32,)}, "stride in their second convolution"),
        ({"block1.layer.0.conv1.weight": (16, 16, 3, 3)}, "a WideResNet of width 1"),
        ({"params/conv_init/kernel": (7, 7, 3, 64)}, 'pads with "SAME"'),
        (
            {"conv1_conv/kernel:0": (7, 7, 3, 64), "conv2_block1_preact_bn/gamma:0": (64,)},
            "strides in the last block",
        ),
        ({"layers/conv2d/vars/0": (3, 3, 3, 8), "layers/conv2d/vars/1": (8,)}, "is not ResNet50"),
        ({"layers/conv2d/vars/0": (7, 7, 3, 8)}, "a Keras network that is not ResNet50"),
        ({"layers/conv2d/vars/0": (), "layers/conv2d/vars/1": ()}, "is not ResNet50"),
        (
            {
                "params/layers_0/ConvBlock_0/Conv_0/kernel": (3, 3, 3, 32),
                "params/layers_2/SplAtConv2d_0/Conv_0/kernel": (1, 1, 32, 128),
            },
            "a ResNeSt of jax-resnet",
        ),
        (
            {
                "conv1_conv/kernel": (7, 7, 3, 64),
                "conv1_conv/bias": (64,),
                "conv1_bn/moving_mean": (32,),
            },
            "moving_mean and its convolution's bias do not fit",
        ),
    ],
)
def test_networks_with_another_function_are_refused(shapes, message):
    with pytest.raises(WeightsError, match=message):
        translate(_zeros(**shapes))


def test_a_norm_after_the_shortcut_is_no_preactivation():
    shapes = {**PREACTIVATION, "layer1.0.bn1.weight": (32,), "layer1.0.shortcut.1.weight": (32,)}
    assert translate(_zeros(**shapes)).tensors.keys() == shapes.keys()
