"""What a run makes of classes of different sizes."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from resnet_jax import config as c
from resnet_jax.data.pipeline import (
    BalancedSampler,
    CorruptImages,
    InMemoryDataset,
    StreamedDataset,
)
from resnet_jax.data.sources import Source, open_source
from resnet_jax.data.sources.folders import FolderSource
from resnet_jax.data.sources.known_sizes import SizeOnlySource
from resnet_jax.errors import ConfigError, StoppedError
from resnet_jax.planning.aot import lower_step
from resnet_jax.training import class_balance, run
from resnet_jax.training.inputs import check_source
from resnet_jax.training.loop import train
from resnet_jax.training.step import make_train_step
from tests.training.runs import state_of, stop_after, without_times

pytestmark = pytest.mark.usefixtures("tiny_model")


def configuration(sections=None, **data):
    return c.Config(
        model=c.Model(name="tiny"),
        data=c.Data(**{"image_size": 8, "threads": 2, **data}),
        augment=c.Augment(mean=(0.3,), std=(0.38,)),
        evaluate=c.Evaluate(every_epochs=100),
        log=c.Log(every_steps=1, tensorboard=False),
        **{"train": c.Train(steps=4, batch_size=16), **(sections or {})},
    )


@pytest.mark.parametrize(
    "data",
    [
        {"sampler": "balanced"},
        pytest.param(
            {"sampler": "balanced", "crop": "random_resized", "workers": 1}, marks=pytest.mark.slow
        ),
        {},  # with class weights
    ],
    ids=["in memory", "read by a worker", "weights"],
)
def test_a_run_that_was_stopped_goes_on_exactly(data, tmp_path, monkeypatch):
    loss = c.Loss(class_weights="" if data else "balanced")
    config = configuration({"loss": loss}, **data)
    train(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_after(patch, steps=2)
        with pytest.raises(StoppedError):
            train(config, tmp_path / "parts")
    train(config, tmp_path / "parts")
    assert without_times(tmp_path / "parts") == without_times(tmp_path / "whole")
    jax.tree.map(
        np.testing.assert_array_equal, state_of(tmp_path / "parts"), state_of(tmp_path / "whole")
    )


def test_several_steps_a_call_take_the_same_images(tmp_path):
    """`steps_per_call` gathers on the device what the host would have."""
    records = []
    for steps in (1, 3):
        train_fields = c.Train(steps=3, batch_size=16, steps_per_call=steps)
        config = configuration({"train": train_fields}, sampler="balanced")
        config.log.every_steps = 3
        train(config, tmp_path / str(steps))
        records.append(without_times(tmp_path / str(steps)))
    for one, other in zip(*records):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)


class Enough(Exception):  # noqa: N818
    """Ends a run before it compiles anything."""


def test_the_step_is_given_the_weights(tmp_path, monkeypatch):
    given = []

    def make(*args, **options):
        given.append(options["class_weights"])
        if len(given) > 1:
            raise Enough
        return make_train_step(*args, **options)

    monkeypatch.setattr(run, "make_train_step", make)
    short = c.Train(steps=1, batch_size=16)
    weights = c.Loss(class_weights="balanced")
    config = configuration({"loss": weights, "train": short}, train_split="train[:30%]")
    config.model.num_classes = 12  # more than the dataset has
    train(config, tmp_path / "balanced")
    stored = json.loads((tmp_path / "balanced" / "data.json").read_text())["class_counts"]
    counts = np.array(stored["train"])
    assert counts.sum() == 431
    assert sum(stored["eval"]) == 360
    np.testing.assert_allclose(given[0][:10], 431 / 10 / counts, rtol=1e-6)
    assert given[0][10:].tolist() == [0, 0]
    assert (given[0][:10] * counts).sum() / 431 == pytest.approx(1)

    numbers = ",".join(map(str, range(10)))
    loss = c.Loss(class_weights=numbers)
    with pytest.raises(Enough):
        train(configuration({"loss": loss, "train": short}), tmp_path / "given")
    assert given[1].tolist() == [*range(10)]
    with pytest.raises(Enough):
        train(configuration({"train": short}), tmp_path / "none")
    assert given[2] is None


@pytest.mark.parametrize(
    ("sections", "asked"),
    [
        ({}, False),
        ({"loss": c.Loss(class_weights=",".join("1" * 10))}, False),
        ({"loss": c.Loss(class_weights="balanced")}, True),
        ({"sampler": "balanced"}, True),
    ],
    ids=str,
)
def test_images_are_read_for_their_labels_only_where_that_is_needed(sections, asked, monkeypatch):
    """An ImageNet in TFDS's records would be read whole at each start."""
    sampler = {key: sections[key] for key in sections if key == "sampler"}
    config = configuration({key: x for key, x in sections.items() if key != "sampler"}, **sampler)
    source, read, said = open_source("digits", "train"), [], []
    labels = Source.labels
    monkeypatch.setattr(Source, "labels", lambda self: read.append(self) or labels(self))
    data = StreamedDataset(source, config.data, CorruptImages(0, print))
    found = class_balance.training_sampler(config, data, said.append)
    counts = class_balance.count_classes(config, data, found, 10, said.append)
    assert len(read) == len(said) == asked
    assert counts.sum() == (1437 if asked else 0)
    assert class_balance.known_class_counts(data, 10).size == 0
    assert isinstance(found, BalancedSampler) == bool(sampler)
    if asked:
        assert said[0].startswith("reading all 1,437 training images for their labels, which ")


def test_a_folder_is_counted_by_its_names(tmp_path):
    for label, count in (("cat", 5), ("dog", 1)):
        (tmp_path / "train" / label).mkdir(parents=True)
        for index in range(count):
            image, _ = open_source("digits", "train")[index]
            (tmp_path / "train" / label / f"{index}.png").write_bytes(image)
    source = open_source(f"folder:{tmp_path}", "train")
    assert isinstance(source, FolderSource)
    data = StreamedDataset(source, c.Data(), CorruptImages(0, print))
    assert class_balance.known_class_counts(data, 2).tolist() == [5, 1]


def test_sets_of_labels_are_counted():
    labels = np.array([[1, 1, 0], [0, 1, 0]], np.uint8)
    data = InMemoryDataset(np.zeros((2, 2, 2, 1), np.uint8), labels)
    assert class_balance.known_class_counts(data, 3).tolist() == [1, 2, 0]
    loss = c.Loss(name="bce", class_weights="balanced")
    weights = class_balance.class_weights(loss, np.array([1, 2, 0]), outputs=3)
    assert weights.tolist() == [1.5, 0.75, 0.0]  # 1 on average over the labels


def test_first_lines():
    names, counts = [*map(str, range(30))], np.array([0, 400, *[40] * 27, 8])
    config = configuration(sampler="balanced")
    assert class_balance.describe(config, names, counts, None) == [
        "imbalance: 400 images of 1, 8 of 29, a ratio of 50",
        "data.sampler = 'balanced': 29 classes, 51.31 images of each an epoch: an image of 29 6.41 "
        "times, one of 1 0.128 times",
    ]
    loss = c.Loss(class_weights=",".join(map(str, range(30))))
    config = configuration({"loss": loss})
    weights = class_balance.class_weights(loss, counts, outputs=30)
    _, line = class_balance.describe(config, names, counts, weights)
    mean = (np.arange(30) * counts).sum() / counts.sum()
    text = f"loss.class_weights: from 0 (0) to 29 (29); {mean:.3g} on average over the training "
    assert line == f"{text}images"
    even = np.array([30, 10])
    assert class_balance.describe(configuration(), ["a", "b"], even, None) == []
    assert class_balance.describe(configuration(), ["a", "b"], np.zeros(0, int), None) == []
    shown = class_balance.describe(configuration(), ["\x1b[2J", "b"], np.array([40, 2]), None)
    assert "40 images of \\x1b[2J, 2 of b" in shown[0]


@pytest.mark.parametrize(
    "text", ["equal", "1,two", "1,-2", "1,nan", "1,inf", "0,0", ",", "1,", "1e39,1", "balanced,1"]
)
def test_weights_that_are_none(text):
    with pytest.raises(ConfigError, match=r"loss\.class_weights = .*: must be balanced, or a num"):
        c.check(configuration({"loss": c.Loss(class_weights=text)}))


def test_weights_for_other_classes():
    source = open_source("digits", "train")
    for text in ("1", "1,2.5,1", ",".join("1" * 11)):
        config = configuration({"loss": c.Loss(class_weights=text)})
        c.check(config)
        with pytest.raises(ConfigError, match=r"loss\.class_weights = .*numbers?, and the .* 10"):
            check_source(config, source)
    many = ",".join(["0.12345"] * 21_000)  # ImageNet-21k's
    c.check(configuration({"loss": c.Loss(class_weights=many)}))


def test_what_does_not_go_together():
    config = configuration({"loss": c.Loss(class_weights="balanced")}, sampler="balanced")
    with pytest.raises(ConfigError, match=r"loss\.class_weights = 'balanced': must be empty with"):
        c.check(config)
    config.loss.class_weights = "1,2"
    c.check(config)
    several = dataclasses.replace(config.data, multi_label=True)
    config = dataclasses.replace(config, data=several, loss=c.Loss(name="bce"))
    with pytest.raises(ConfigError, match=r"data\.sampler = 'balanced': must be 'shuffled' with"):
        c.check(config)


@pytest.mark.parametrize("text", ["balanced", "1,2,7"])
def test_plans_compile_the_weights(text):
    """As constants; the numbers of images are not known there, and make no difference."""
    config = configuration({"loss": c.Loss(class_weights=text)})
    lowered = lower_step(config, jax.devices()[:1], SizeOnlySource(100, classes=3, channels=1))
    weights = "2.000000e+00, 1.000000e+00, 0.66" if text == "balanced" else "2.000000e+00, 7.0"
    assert weights in lowered.as_text()
