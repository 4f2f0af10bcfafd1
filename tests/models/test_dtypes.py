"""Types stay what they are under jax_enable_x64 and strict promotion, over two training steps."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import resnet_jax as rj
from resnet_jax import config as c
from resnet_jax.data.preprocessing import Preprocessing
from resnet_jax.training.optimizer import RunLength, make_optimizer
from resnet_jax.training.state import create_state
from resnet_jax.training.step import make_train_step

LENGTH = RunLength(steps=100, steps_per_epoch=10.0)
MODES = pytest.mark.parametrize(
    ("x64", "promotion"),
    [
        pytest.param(True, "standard", marks=pytest.mark.slow),
        pytest.param(False, "strict", marks=pytest.mark.slow),
        (True, "strict"),
    ],
)
NETWORKS = {
    "imagenet": {"stem_cls": functools.partial(rj.ImageNetStem, features=8)},
    "D, SE, bfloat16": {
        "stem_cls": functools.partial(rj.DeepStem, widths=(4, 4, 8)),
        "shortcut": "D",
        "se_ratio": 0.25,
        "dtype": jnp.bfloat16,
    },
    "A, ECA": {
        "block_cls": rj.BasicBlock,
        "stem_cls": functools.partial(rj.CifarStem, features=8),
        "shortcut": "A",
        "eca": True,
    },
    "group norm": {
        "block_cls": rj.PreActBottleneckBlock,
        "norm": "group",
        "weight_standardization": True,
        "stochastic_depth_rate": 0.1,
        "dropout_rate": 0.1,
    },
}


def dtypes(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): jnp.dtype(leaf.dtype) for path, leaf in leaves}


@MODES
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_keeps_float32(name, x64, promotion):
    model = rj.ResNet(stage_sizes=(1, 1), stage_widths=(8, 16), num_classes=5, **NETWORKS[name])
    x = jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32)

    def step(variables, x):
        def loss(params):
            logits, updates = model.apply(
                {**variables, "params": params},
                x,
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": jax.random.key(0)},
            )
            return logits.sum(), (logits, updates)

        gradients, (logits, updates) = jax.grad(loss, has_aux=True)(variables["params"])
        return {**variables, **updates, "params": gradients}, logits

    with jax.enable_x64(x64), jax.numpy_dtype_promotion(promotion):
        init = functools.partial(model.init, train=False)
        variables = jax.eval_shape(init, jax.random.key(0), x)
        first, _ = jax.eval_shape(step, variables, x)
        second, logits = jax.eval_shape(step, first, x)
        evaluated = jax.eval_shape(functools.partial(model.apply, train=False), second, x)
    assert set(dtypes((variables, first, second)).values()) == {jnp.dtype("float32")}
    assert logits.dtype == evaluated.dtype == jnp.float32


AUGMENT = c.Augment(flip=True, pad=1, rotate=5.0, brightness=0.1, hue=0.1, pca=0.1, erase=0.3)
CONFIGS = {
    "sgd": c.Config(
        optimizer=c.Optimizer(clip_norm=1.0, backbone_rate=0.1),
        schedule=c.Schedule(name="cosine", warmup_epochs=1.0),
        train=c.Train(ema_decay=0.99, ema_every=2, accumulate=2),
        loss=c.Loss(label_smoothing=0.1),
    ),
    "lars": c.Config(optimizer=c.Optimizer(name="lars"), schedule=c.Schedule(name="step")),
    "adamw, policy": c.Config(
        optimizer=c.Optimizer(name="adamw"),
        augment=c.Augment(trivial=True, cutout=2),
        loss=c.Loss(name="bce", bce_threshold=0.2),
    ),
    "lamb, mixed": c.Config(
        optimizer=c.Optimizer(name="lamb"),
        augment=dataclasses.replace(AUGMENT, mixup=0.2, cutmix=1.0),
        schedule=c.Schedule(name="plateau"),
    ),
    "float16": c.Config(
        model=c.Model(dtype="float16"),
        augment=c.Augment(rand_layers=2),
        loss=c.Loss(name="focal"),
        schedule=c.Schedule(name="one_cycle"),
    ),
}
# Adam's moments in Optax and the augmentations promote by JAX's usual rules.
STRICT = ("sgd", "lars")


@MODES
@pytest.mark.parametrize("name", CONFIGS)
def test_the_training_step_keeps_the_types_of_its_state(name, x64, promotion):
    if promotion == "strict" and name not in STRICT:
        pytest.skip("augmentations and this optimizer of Optax mix types")
    config = dataclasses.replace(CONFIGS[name], data=c.Data(image_size=8))
    if promotion == "strict":  # Optax's other schedules divide whole numbers by fractions
        config = dataclasses.replace(config, schedule=c.Schedule(name="constant"))
    model = rj.ResNet20(stage_sizes=(1,), stage_widths=(16,), dtype=config.model.dtype)
    batch = {
        "images": jax.ShapeDtypeStruct((1, 16, 8, 8, 3), np.uint8),
        "labels": jax.ShapeDtypeStruct((1, 16), np.int32),
    }
    with jax.enable_x64(x64), jax.numpy_dtype_promotion(promotion):
        optimizer = make_optimizer(config, LENGTH)
        state = create_state(model, optimizer, config, channels=3)
        step = make_train_step(model, optimizer, config, LENGTH)
        devices = jax.vmap(step, in_axes=(None, 0), out_axes=(0, 0), axis_name="batch")

        def run(state, batch):
            return jax.tree.map(lambda x: x[0], devices(state, batch))

        first, _ = jax.eval_shape(run, state, batch)
        second, metrics = jax.eval_shape(run, first, batch)
    assert jnp.dtype("float64") not in dtypes(state).values()
    assert dtypes(state) == dtypes(first) == dtypes(second)
    assert set(dtypes(metrics).values()) == {jnp.dtype("float32")}


def test_normalized_images_are_float32():
    with jax.enable_x64(True):
        images = jnp.zeros((1, 2, 2, 3), jnp.uint8)
        assert Preprocessing().normalize(images).dtype == jnp.float32
