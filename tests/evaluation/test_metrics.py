"""Measures are exact: the same at any batch size and number of devices, each image once."""

import functools

import numpy as np
import pytest

import resnet_jax as rj
from resnet_jax.data.pipeline import InMemoryDataset
from resnet_jax.data.preprocessing import Preprocessing
from resnet_jax.distributed import data_parallel
from resnet_jax.evaluation.metrics import evaluate, make_evaluation_step
from tests.variables import random_variables

HALVED = Preprocessing(mean=(0.5,), std=(0.25,))


@functools.cache
def setting():
    model = rj.ResNet(
        stage_sizes=(1,),
        stage_widths=(8,),
        block_cls=rj.BasicBlock,
        stem_cls=rj.CifarStem,
        num_classes=10,
    )
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (37, 8, 8, 3), dtype=np.uint8)
    labels = rng.integers(0, 10, 37).astype(np.int32)
    return model, InMemoryDataset(images, labels), random_variables(model)


@functools.cache
def expected():
    model, data, variables = setting()
    logits = np.asarray(
        model.apply(variables, HALVED.normalize(data.images), train=False), np.float64
    )
    own = logits[np.arange(37), data.labels]
    rank = (logits >= own[:, None]).sum(1)
    loss = np.log(np.exp(logits).sum(1)) - own
    return {
        "images": 37,
        "loss": loss.mean(),
        "top1": (rank <= 1).mean(),
        "top5": (rank <= 5).mean(),
    }


@pytest.mark.parametrize("size", [8, 16, 40, 64])
def test_any_batch_size(size):
    model, data, variables = setting()
    step = data_parallel.parallel_sums(make_evaluation_step(model, HALVED))
    found = evaluate(step, variables, data.eval_batches(size))
    assert found.keys() == expected().keys()
    for name, value in expected().items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6)


def test_padding_may_be_anything():
    """Images that only fill the last batch count nothing, even where the network gives NaN."""
    model, data, variables = setting()
    broken = InMemoryDataset(data.images[:3], data.labels[:3])
    step = data_parallel.parallel_sums(make_evaluation_step(model, HALVED))
    found = evaluate(step, variables, broken.eval_batches(8))
    assert found["images"] == 3
    assert np.isfinite(found["loss"])


def test_logits_of_an_image_and_its_mirror_image():
    model, data, variables = setting()
    found = [
        evaluate(
            data_parallel.parallel_sums(make_evaluation_step(model, HALVED, flip=True)),
            variables,
            InMemoryDataset(images, data.labels).eval_batches(16),
        )
        for images in (data.images, data.images[:, :, ::-1])
    ]
    plain = evaluate(
        data_parallel.parallel_sums(make_evaluation_step(model, HALVED)),
        variables,
        data.eval_batches(16),
    )
    np.testing.assert_allclose(found[0]["loss"], found[1]["loss"], rtol=1e-6)
    assert abs(found[0]["loss"] - plain["loss"]) > 1e-4
