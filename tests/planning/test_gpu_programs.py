"""Programs for GPUs, compiled for an H100 by JAX's CUDA plugin without a card.

Needs the extra `plan-gpu`.
"""

import dataclasses
import importlib.util
import re

import jax
import jax.numpy as jnp
import pytest

import resnet_jax as rj
from resnet_jax import config as c
from resnet_jax.data.preprocessing import Preprocessing
from resnet_jax.data.sources.known_sizes import SizeOnlySource
from resnet_jax.distributed.data_parallel import parallel_outputs, parallel_sums
from resnet_jax.evaluation.metrics import make_evaluation_step
from resnet_jax.planning import aot
from resnet_jax.planning.gpu import COMPILER_OPTIONS, gpu_devices
from resnet_jax.planning.topology import parse_topology
from resnet_jax.planning.traffic import count_traffic

pytestmark = [
    pytest.mark.skipif(
        not any(map(importlib.util.find_spec, ("jax_cuda12_plugin", "jax_cuda13_plugin"))),
        reason="JAX's CUDA plugin is not installed (extra plan-gpu)",
    ),
    pytest.mark.usefixtures("tiny_model"),
]

GPUS, BATCH, SIDE = 2, 8, 16
SOURCE = SizeOnlySource(images=64, classes=10, channels=3)
# The result type of a convolution that cuDNN computes.
CONVOLUTION = re.compile(r'= \((\w+)\[[^)]*\) custom-call\(.*"__cudnn\$conv')


@pytest.fixture(scope="module")
def gpus():
    # Reading a cached program that no device here can run is an error.
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    yield gpu_devices(parse_topology(f"h100:{GPUS}"))
    jax.config.update("jax_enable_compilation_cache", before)


def configuration(**changes):
    """A run with a dataset in memory; changes are such as model__dtype="bfloat16"."""
    config = c.Config(
        model=c.Model(name="tiny", dtype="bfloat16"),
        data=c.Data(name="tfds:cifar10", image_size=SIDE),
        train=c.Train(batch_size=BATCH),
    )
    for name, value in changes.items():
        part, field = name.split("__")
        fields = dataclasses.replace(getattr(config, part), **{field: value})
        config = dataclasses.replace(config, **{part: fields})
    return config


def compiled_text(lowered):
    program = lowered.compile(COMPILER_OPTIONS)
    assert program.memory_analysis().temp_size_in_bytes > 0
    text = program.as_text()
    assert "f64[" not in text
    return text


def check_training(text, dtype):
    """Convolutions and their gradients are computed by cuDNN in the dtype of the network."""
    assert {found[1] for found in CONVOLUTION.finditer(text)} == {dtype}
    assert "__cudnn$convBackwardFilter" in text
    moved = count_traffic(text)
    assert moved.all_reduces >= 1
    # Gradients, 4 bytes for each parameter of a network of thousands.
    assert 4 * 5_000 < moved.all_reduced < moved.memory


class TestTraining:
    @pytest.mark.parametrize(
        ("dtype", "changes"),
        [
            *[("bf16", {}), ("f16", {"model__dtype": "float16"})],
            *[("f32", {"model__dtype": "float32"}), ("bf16", {"train__ema_decay": 0.99})],
            *[("bf16", {"train__accumulate": 2}), ("bf16", {"train__steps_per_call": 2})],
            ("bf16", {"augment__mixup": 0.2, "augment__cutmix": 1.0}),
            ("bf16", {"augment__rand_layers": 2, "augment__flip": True, "augment__pad": 2}),
            ("bf16", {"augment__trivial": True, "augment__erase": 0.1}),
            ("bf16", {"augment__rotate": 5.0, "augment__hue": 0.1, "augment__contrast": 0.1}),
            ("bf16", {"model__remat": True, "model__bn_sync": "train", "model__dropout_rate": 0.1}),
            ("bf16", {"optimizer__name": "lamb", "optimizer__clip_norm": 1.0, "loss__name": "bce"}),
        ],
    )
    def test_compiles(self, gpus, dtype, changes):
        lowered = aot.lower_step(configuration(**changes), gpus, SOURCE)
        check_training(compiled_text(lowered), dtype)

    @pytest.mark.parametrize(
        "name",
        [
            *["plain18", "resnet18", "resnet50", "resnet50d", "resnetv2_18", "resnetv2_50"],
            *["resnext50_32x4d", "seresnet50", "wide_resnet28_10", "resnetv2_50x1_bit"],
            "resnetrs50",
        ],
    )
    def test_families_compile(self, gpus, name, monkeypatch):
        """Two blocks of each family, the second at half the resolution."""

        def small(config, classes):
            sizes = {"stage_sizes": (1, 1), "stage_widths": (16, 32)}
            return rj.create_model(name, num_classes=classes, dtype=jnp.bfloat16, **sizes)

        monkeypatch.setattr(aot, "make_model", small)
        config = configuration(data__image_size=2 * SIDE)
        check_training(compiled_text(aot.lower_step(config, gpus, SOURCE)), "bf16")


class TestInference:
    def lower(self, run):
        """Lowers `run` for variables and a batch [D, N / D, ...]."""
        model = rj.create_model("tiny", dtype=jnp.bfloat16)
        shape = jax.ShapeDtypeStruct
        images = shape((GPUS, BATCH // GPUS, SIDE, SIDE, 3), jnp.uint8)
        numbers = {"labels": jnp.int32, "weights": jnp.float32}
        batch = {name: shape((GPUS, BATCH // GPUS), kind) for name, kind in numbers.items()}
        one = shape((1, SIDE, SIDE, 3), jnp.float32)
        variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), one)
        return run(model, variables, images, batch)

    @pytest.mark.parametrize("flip", [False, True])
    def test_evaluation_compiles(self, gpus, flip):
        def run(model, variables, images, batch):
            step = parallel_sums(make_evaluation_step(model, Preprocessing(), flip), gpus)
            return step.lower(variables, {"images": images, **batch})

        text = compiled_text(self.lower(run))
        assert {found[1] for found in CONVOLUTION.finditer(text)} == {"bf16"}
        assert count_traffic(text).all_reduces >= 1

    def test_prediction_compiles(self, gpus):
        def run(model, variables, images, batch):
            def logits(variables, images):
                return model.apply(variables, Preprocessing().normalize(images), train=False)

            return parallel_outputs(logits, gpus).lower(variables, images)

        text = compiled_text(self.lower(run))
        assert {found[1] for found in CONVOLUTION.finditer(text)} == {"bf16"}
        assert count_traffic(text).all_reduces == 0
