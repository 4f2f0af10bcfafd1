"""Training on sets of labels: targets, loss, accuracy, batches, and whole runs of every kind."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

import resnet_jax as rj
from resnet_jax import config as c
from resnet_jax.config.validation import check
from resnet_jax.data import pipeline
from resnet_jax.data.augment.apply import augment, make_targets
from resnet_jax.distributed import data_parallel
from resnet_jax.training.loop import train
from resnet_jax.training.optimizer import RunLength, make_optimizer
from resnet_jax.training.state import create_state
from resnet_jax.training.step import make_train_step, top_k_hits
from tests.data.photos import assert_same, batches_of
from tests.evaluation.settings import SetsOfLabels, photo, prepare_sets, tiny_network
from tests.training.runs import records, state_of, without_times

NAMES = ("cat", "dog", "cow", "emu", "yak")
LENGTH = RunLength(steps=100, steps_per_epoch=10.0)


def sets(count, classes=5, seed=0, share=0.4):
    """Labels of 0 and 1; some images have none."""
    labels = (np.random.default_rng(seed).random((count, classes)) < share).astype(np.uint8)
    labels[::4] = 0
    return labels


# --- Targets, loss and accuracy -------------------------------------------------------------


def test_mixed_targets_are_those_of_both_images():
    labels = jnp.array([[1, 0, 1], [1, 1, 0], [0, 0, 0], [0, 1, 0]], jnp.uint8)
    config = c.Augment(mixup=1.0)
    images = jnp.zeros((4, 8, 8, 3), jnp.uint8)
    _, found = augment(images, labels, jax.random.key(0), config, 4)
    first, second = found[0, 2], found[3, 1]  # shares of the own image in each pair
    expected = [[1, 1 - first, first, 0], [1, first, 1 - first, 0]]
    expected += [[0, 1 - second, 0, 0], [0, second, 0, 0]]
    assert 0 < first < 1
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_any_label_is_a_hit():
    logits = jnp.array([[3.0, 2.0, 1.0, 0.0]] * 5 + [[1.0, 1.0, 1.0, jnp.nan]])
    labels = jnp.array(
        [[0, 1, 1, 0], [1, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 1], [1, 1, 1, 1], [0, 0, 0, 1]], bool
    )
    assert top_k_hits(logits, labels, 1).tolist() == [False, True, False, False, True, False]
    assert top_k_hits(logits, labels, 2).tolist() == [True, True, False, False, True, False]
    tied = jnp.array([[1.0, 1.0, 0.0, 0.0]])
    assert top_k_hits(tied, jnp.array([[1, 1, 0, 0]], bool), 1).tolist() == [True]
    assert top_k_hits(tied, jnp.array([[1, 0, 0, 0]], bool), 1).tolist() == [False]


def run_steps(config, labels, devices=1, steps=1):
    model = tiny_network(5).model.clone(axis_name=data_parallel.AXIS)
    optimizer = make_optimizer(config, LENGTH)
    state = create_state(model, optimizer, config, channels=3)
    step = data_parallel.parallel_step(
        make_train_step(model, optimizer, config, LENGTH), jax.devices()[:devices]
    )
    images = np.random.default_rng(1).integers(0, 256, (len(labels), 8, 8, 3), dtype=np.uint8)
    batch = data_parallel.shard({"images": images, "labels": labels}, devices)
    start = jax.device_get(state)
    for _ in range(steps):
        state, metrics = step(state, batch)
    return model, start, images, jax.device_get((state, metrics))


def configuration(**sections):
    sections = {"schedule": c.Schedule(name="constant"), "loss": c.Loss(name="bce"), **sections}
    return c.Config(data=c.Data(image_size=8, multi_label=True), **sections)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_one_step_by_hand(smoothing):
    """Smoothing leaves each class a share of both outcomes, however many classes there are."""
    labels = sets(8)
    config = configuration(loss=c.Loss(name="bce", label_smoothing=smoothing))
    model, start, images, (_, metrics) = run_steps(config, labels)
    logits, _ = jax.jit(
        jax.vmap(  # for the axis that batch statistics are shared over
            lambda x: model.apply(
                {"params": start.params, "batch_stats": start.batch_stats},
                x,
                train=True,
                mutable=["batch_stats"],
            ),
            axis_name=data_parallel.AXIS,
        )
    )((images / np.float32(255) - 0.5)[None] / 0.25)
    logits = np.asarray(logits[0], np.float64)
    p = 1 / (1 + np.exp(-logits))
    y = np.where(labels, 1 - smoothing / 2, smoothing / 2)
    expected = -(y * np.log(p) + (1 - y) * np.log(1 - p)).mean()
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-4)
    own = labels.any(1)
    hits = labels[np.arange(8), logits.argmax(1)] > 0
    np.testing.assert_allclose(metrics["top1"], hits[own].mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["top5"], 1, rtol=1e-6)


def test_a_batch_without_any_label():
    *_, (state, metrics) = run_steps(configuration(), np.zeros((8, 5), np.uint8))
    assert (metrics["top1"], metrics["top5"], metrics["skipped"]) == (0, 0, 0)
    assert np.isfinite(metrics["loss"])
    assert state.step == 1


@pytest.mark.slow
@pytest.mark.devices(2)
def test_two_devices_and_two_parts_equal_one():
    """Images with labels are not equally many on each device, or in each part."""
    labels = sets(16)
    labels[:8] = 0
    mixes = {"augment": c.Augment(mixup=0.2), "optimizer": c.Optimizer(backbone_rate=0.0)}
    one, two = (run_steps(configuration(**mixes), labels, devices)[-1] for devices in (1, 2))
    chex.assert_trees_all_close(two, one, rtol=2e-4, atol=2e-5)
    halves = configuration(**mixes, train=c.Train(accumulate=2))
    chex.assert_trees_all_close(run_steps(halves, labels)[-1], one, rtol=2e-4, atol=2e-5)


# --- Batches --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source():
    labels = sets(20)
    return SetsOfLabels([photo(n, 8, 8) for n in range(20)], map(np.flatnonzero, labels), NAMES)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_batches_have_the_sets_of_their_images(source, workers):
    """From memory and streamed, by threads and processes, for one shard and for two."""
    sampler = pipeline.IndexSampler(images=20, seed=1)
    corrupt = pipeline.CorruptImages(limit=0, log=print)
    config = c.Data(image_size=8, workers=workers, threads=2)
    data = pipeline.open_dataset(source, config, True, corrupt)
    expected = list(data.train_batches(sampler, batches_of(8), 0, 4))
    streamed = pipeline.StreamedDataset(source, config, corrupt)
    streams = [
        list(streamed.train_batches(sampler, batches_of(8), 0, 4, pipeline.Shard(*shard)))
        for shard in ((0, 1), (0, 2), (1, 2))
    ]
    joined = [{k: np.concatenate([a[k], b[k]]) for k in a} for a, b in zip(*streams[1:])]
    assert_same(streams[0], expected)
    assert_same(joined, expected)
    labels = source.labels()
    for step, batch in enumerate(expected):
        indices = sampler.indices(np.arange(8 * step, 8 * step + 8))
        np.testing.assert_array_equal(batch["labels"], labels[indices])
        assert batch["labels"].dtype == np.uint8


def test_labels_count_for_what_fits_memory():
    pixels = 8 * 8 * 3
    many = SetsOfLabels([photo(0, 8, 8)], [[0]], [*map(str, range(10 * pixels))])
    limit = c.Data(image_size=8, memory_gib=2 * pixels / 2**30)
    assert not pipeline.fits_memory(many, limit, training=True)
    many.label_shape = ()
    assert pipeline.fits_memory(many, limit, training=True)


def test_a_head_that_is_wider_than_the_data():
    assert make_targets(jnp.ones((1, 2), jnp.uint8), 4).tolist() == [[1, 1, 0, 0]]


# --- Whole runs -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    root = tmp_path_factory.mktemp("sets")
    splits = {
        split: [(photo(n, 8, 8), np.flatnonzero(labels)) for n, labels in enumerate(sets(count))]
        for split, count in (("train", 64), ("test", 21))
    }
    prepare_sets(root, "sets", NAMES, splits)
    return root


def run_configuration(folder):
    return c.Config(
        model=c.Model(name="tiny"),
        data=c.Data(
            name="tfds:sets", data_dir=str(folder), multi_label=True, image_size=8, threads=2
        ),
        augment=c.Augment(mixup=0.2),
        loss=c.Loss(name="bce"),
        train=c.Train(steps=4, batch_size=16),
        evaluate=c.Evaluate(every_epochs=2 * 16 / 64),
        log=c.Log(every_steps=2),
        checkpoint=c.Checkpoint(best_metric="map"),
    )


@pytest.fixture(scope="module")
def straight(prepared, tiny_model):
    workdir = prepared / "straight"
    return workdir, train(run_configuration(prepared), workdir)


def test_what_a_run_writes(straight, capsys):
    workdir, result = straight
    evaluations = [each for each in records(workdir) if each["split"] == "test"]
    names = {"loss", "top1", "top5", "map", "f1", "f1_micro"}
    assert len(evaluations) == 2
    assert all(names <= each.keys() for each in evaluations)
    assert result.metrics == {name: evaluations[-1][name] for name in names}
    tags = {}  # the same names in two folders are two curves of a chart
    for split in ("train", "test"):
        (events,) = (workdir / "tensorboard" / split).glob("events.*")
        tags[split] = {tag for event in read_events(events) for tag in event}
    assert names <= tags["test"]
    assert {"loss", "top1"} <= tags["train"]
    assert not any("labeled" in tag for tag in tags["test"])


def read_events(path):
    data = path.read_bytes()
    while data:
        length = int.from_bytes(data[:8], "little")
        yield [value.tag for value in Event.FromString(data[12 : 12 + length]).summary.value]
        data = data[16 + length :]


@pytest.mark.parametrize("change", ["stream", "calls"])
def test_streams_and_several_steps_a_call(change, straight, prepared, tmp_path):
    """The batches are the same, so the states and the measures are, too."""
    config = run_configuration(prepared)
    if change == "stream":
        config.data.memory_gib, config.data.workers = 0.0, 1
    else:
        config.train.steps_per_call = 2
    train(config, tmp_path)
    chex.assert_trees_all_close(state_of(tmp_path), state_of(straight[0]), rtol=1e-4, atol=1e-5)
    found, expected = without_times(tmp_path), without_times(straight[0])
    assert [each.keys() for each in found] == [each.keys() for each in expected]
    for one, other in zip(found, expected):
        for name in ("loss", "map") if "map" in other else ("loss",):
            np.testing.assert_allclose(one[name], other[name], rtol=1e-3)


@pytest.mark.usefixtures("tiny_model")
def test_images_with_one_label_are_sets_of_one(tmp_path):
    config = dataclasses.replace(run_configuration(""), data=c.Data(multi_label=True))
    metrics = train(config, tmp_path / "run").metrics
    assert 0 < metrics["map"] < 1


def test_more_scores_than_memory(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr("resnet_jax.limits.host_memory", lambda: 20_000_000)
    config = run_configuration(prepared)
    config.model.num_classes = 1_000_000
    with pytest.raises(rj.ConfigError):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"loss": c.Loss()},
            r"loss\.name = 'softmax': must be bce or focal with data\.multi_label",
        ),
        (
            {"loss": c.Loss(name="bce", label_smoothing=0.1, bce_threshold=0.2)},
            r"loss\.label_smoothing = 0\.1: must be 0 with loss\.bce_threshold",
        ),
        (
            {"data": c.Data(), "checkpoint": c.Checkpoint(best_metric="f1")},
            r"checkpoint\.best_metric = 'f1': needs data\.multi_label",
        ),
    ],
)
def test_fields_that_do_not_go_together(changes, message):
    config = configuration(checkpoint=c.Checkpoint(best_metric="map"))
    check(config)
    with pytest.raises(rj.ConfigError, match=message):
        check(dataclasses.replace(config, **changes))
