"""Multi-label measures against scikit-learn, and the same at any batch size, device and host."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

import resnet_jax as rj
from resnet_jax import config as c
from resnet_jax.cli import parser
from resnet_jax.data.pipeline import InMemoryDataset, Shard
from resnet_jax.data.preprocessing import Preprocessing
from resnet_jax.distributed import data_parallel
from resnet_jax.evaluation.evaluator import evaluate_network
from resnet_jax.evaluation.held_out import evaluate_data
from resnet_jax.evaluation.metrics import evaluate, make_evaluation_step
from resnet_jax.evaluation.multi_label import (
    MultiLabelAccumulator,
    average_precision,
    check_scores_memory,
    is_predicted,
)
from resnet_jax.training.loop import train
from resnet_jax.weights.network import sigmoid
from resnet_jax.weights.overrides import Overrides
from resnet_jax.weights.source import open_network
from tests.evaluation.settings import SetsOfLabels, logits, photo, prepare_sets, tiny_network
from tests.variables import random_variables

# --- Against scikit-learn -------------------------------------------------------------------


def draw(images=200, classes=7, seed=0, digits=1):
    """Logits with many ties and labels; class 0 is on no image, class 1 on all of them."""
    rng = np.random.default_rng(seed)
    labels = rng.random((images, classes)) < rng.uniform(0.05, 0.6, classes)
    scores = rng.normal(size=(images, classes)) + labels
    labels[:, 0], labels[:, 1] = False, True
    return scores.round(digits).astype(np.float32), labels


def measure(scores, labels, threshold=0.5, size=64):
    found = MultiLabelAccumulator()
    for start in range(0, len(scores), size):
        found.add(scores[start : start + size], labels[start : start + size])
    return found.compute(threshold)


@pytest.mark.parametrize("digits", [0, 1, 6])
def test_average_precision_is_that_of_scikit_learn(digits):
    scores, labels = draw(digits=digits)
    found = measure(scores, labels)
    expected = [
        sklearn_metrics.average_precision_score(labels[:, k], scores[:, k]) for k in range(1, 7)
    ]
    assert np.isnan(found.average_precision[0])
    np.testing.assert_allclose(found.average_precision[1:], expected, rtol=1e-12)
    np.testing.assert_allclose(found.map, np.mean(expected), rtol=1e-12)
    assert found.absent == 1
    assert found.average_precision[1] == 1


@pytest.mark.parametrize("threshold", [0.5, 0.2, 0.9])
def test_f1_precision_and_recall_are_those_of_scikit_learn(threshold):
    scores, labels = draw()
    labels[:, 2], scores[:, 2] = False, -9.0  # a class that is neither there nor predicted
    found = measure(scores, labels, threshold)
    predicted = 1 / (1 + np.exp(-scores.astype(np.float64))) >= threshold
    options = {"y_true": labels, "y_pred": predicted, "zero_division": np.nan}
    precision, recall, f1, counts = sklearn_metrics.precision_recall_fscore_support(**options)
    np.testing.assert_allclose(found.precision, precision)
    np.testing.assert_allclose(found.recall, recall)
    np.testing.assert_allclose(found.class_f1, f1)
    assert np.isnan(found.class_f1[2])
    assert found.class_f1[0] == 0  # on no image, and predicted for some
    np.testing.assert_array_equal(found.positives, counts)
    np.testing.assert_allclose(found.f1, sklearn_metrics.f1_score(**options, average="macro"))
    np.testing.assert_allclose(found.f1_micro, sklearn_metrics.f1_score(**options, average="micro"))


def test_loss_and_top_k_by_hand():
    scores, labels = draw(digits=6)
    labels[:5] = False
    found = measure(scores, labels)
    p = 1 / (1 + np.exp(-scores.astype(np.float64)))
    np.testing.assert_allclose(found.loss, -np.log(np.where(labels, p, 1 - p)).mean(), rtol=1e-9)
    order = np.argsort(-scores[5:], axis=1)
    for k in (1, 5):
        hits = [labels[5 + n, order[n, :k]].any() for n in range(len(order))]
        assert getattr(found, f"top{k}") == np.mean(hits)
    assert 0.5 < found.top1 < 1


def test_extreme_and_broken_logits():
    scores = np.float32([[1e30, -1e30], [-3e38, 3e38]])
    found = measure(scores, np.array([[1, 0], [0, 1]]))
    assert (found.loss, found.map, found.f1) == (0, 1, 1)
    assert np.isnan(measure(np.float32([[np.nan, 1], [1, 1]]), np.array([[1, 0], [0, 1]])).loss)
    assert np.isnan(measure(np.float32([[np.inf, 1], [1, 1]]), np.array([[1, 0], [0, 1]])).loss)


def test_batches_and_their_order_change_nothing():
    scores, labels = draw(digits=2)
    other = np.random.default_rng(1).permutation(len(scores))
    found = [measure(scores, labels, size=size) for size in (1, 7, 200)]
    found.append(measure(scores[other], labels[other]))
    assert all(each.record() == found[0].record() for each in found)
    for each in found:
        np.testing.assert_array_equal(each.average_precision, found[0].average_precision)


def test_more_images_than_are_sorted_at_once(monkeypatch):
    scores, labels = draw()
    whole = measure(scores, labels)
    monkeypatch.setattr("resnet_jax.evaluation.multi_label._SORTED_AT_ONCE", 400)
    np.testing.assert_array_equal(
        measure(scores, labels).average_precision, whole.average_precision
    )


def test_one_class_alone():
    assert np.isnan(average_precision(np.zeros(0), np.zeros(0, bool)))
    assert average_precision(np.zeros(4), np.array([0, 0, 0, 1], bool)) == 0.25  # all are tied


def test_the_threshold_is_one_of_probabilities():
    values = np.linspace(-4, 4, 801, dtype=np.float32)
    for threshold in (0.1, 0.5, 0.75):
        away = np.abs(sigmoid(values) - threshold) > 1e-6
        expected = sigmoid(values) >= threshold
        np.testing.assert_array_equal(is_predicted(values, threshold)[away], expected[away])
    assert is_predicted(np.float32([0]), 0.5).all()
    assert sigmoid(np.float32([-200, 200])).tolist() == [0, 1]


def test_more_scores_than_memory():
    message = (
        r"data\.eval_split = 'x': mean average precision over 1,000,000,000 images of 1,000,000 "
        r"classes: needs at least 5,000,000\.0 GB of memory, and there are .*; take less"
    )
    with pytest.raises(rj.ConfigError, match=message):
        check_scores_memory(10**9, 10**6, "data.eval_split = 'x'", "take less")


# --- The trainer's evaluation ---------------------------------------------------------------


@functools.cache
def setting():
    model = tiny_network(6).model
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (37, 8, 8, 3), dtype=np.uint8)
    labels = (rng.random((37, 6)) < 0.3).astype(np.uint8)
    labels[:, 5] = 0
    return model, InMemoryDataset(images, labels), random_variables(model)


def evaluated(size, devices=8, shards=1, labels=None):
    model, data, variables = setting()
    data = InMemoryDataset(data.images, data.labels if labels is None else labels)
    devices = jax.devices()[:devices]
    step = data_parallel.parallel_sums(
        make_evaluation_step(model, Preprocessing(mean=(0.5,), std=(0.25,))), devices
    )
    found = [data.eval_batches(size, Shard(index, shards)) for index in range(shards)]
    # The batches of several shards one after the other: what the devices gather from all of them.
    batches = (
        {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        for parts in zip(*found, strict=True)
    )
    return evaluate(lambda v, b: step(v, data_parallel.shard(b, len(devices))), variables, batches)


@pytest.fixture
def unsharded(monkeypatch):
    monkeypatch.setattr("resnet_jax.evaluation.metrics.shard_batch", lambda batch: batch)


@pytest.mark.devices(8)
def test_any_batch_size_number_of_devices_and_hosts(unsharded):
    reference = evaluated(40)
    assert reference["images"] == 37
    assert reference.keys() == {"images", "loss", "top1", "top5", "map", "f1", "f1_micro"}
    for size, devices, shards in ((8, 8, 1), (16, 2, 1), (16, 8, 2), (64, 1, 4)):
        found = evaluated(size, devices, shards)
        for name, value in reference.items():  # logits may differ by rounding
            np.testing.assert_allclose(found[name], value, rtol=1e-6, err_msg=name)
    _, data, variables = setting()
    outputs = np.stack([logits_of(variables, image) for image in data.images])
    expected = measure(outputs.astype(np.float32), data.labels).record()
    for name, value in expected.items():
        np.testing.assert_allclose(reference[name], value, rtol=1e-6, err_msg=name)


def logits_of(variables, image):
    network = dataclasses.replace(tiny_network(6), variables=variables)
    return logits(network, image)


def test_a_head_that_is_wider_than_the_data(unsharded):
    """Its further outputs are classes that no image has, as in training."""
    labels = setting()[1].labels
    np.testing.assert_array_equal(labels[:, 5], 0)
    assert evaluated(16, labels=labels[:, :5]) == evaluated(16)


def test_no_image_has_a_label(unsharded):
    with pytest.raises(rj.DataError, match="none of its images has a label"):
        evaluated(16, labels=np.zeros_like(setting()[1].labels))


# --- The command ----------------------------------------------------------------------------

NAMES = ("cat", "dog", "cow", "emu", "yak")


def examples(count, seed, names=NAMES):
    """Images and sets of labels of which some are empty; nobody has the last class."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        labels = np.flatnonzero(rng.random(len(names) - 1) < 0.4).tolist()
        yield photo(1000 * seed + number, 8, 8), labels


def configuration(folder, **sections):
    return c.Config(
        model=c.Model(name="tiny"),
        data=c.Data(
            name="tfds:sets", data_dir=str(folder), multi_label=True, image_size=8, threads=2
        ),
        loss=c.Loss(name="bce"),
        train=c.Train(steps=3, batch_size=16, ema_decay=0.5),
        evaluate=c.Evaluate(threshold=0.4),
        log=c.Log(tensorboard=False, every_steps=1),
        **sections,
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_model):
    root = tmp_path_factory.mktemp("sets")
    splits = {"train": examples(40, 0), "test": examples(21, 1)}
    prepare_sets(root, "sets", NAMES, splits)
    train(configuration(root), root / "run")
    return root / "run"


@pytest.mark.parametrize("ema", [False, True])
def test_the_trainers_numbers_to_the_digit(run, ema):
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    (recorded,) = [
        each for each in records if each["split"] == "test" and ("weights" in each) == ema
    ]
    network = open_network(run, ema=ema)
    assert (network.multi_label, network.threshold) == (True, 0.4)
    report = evaluate_data(network)
    found = report.to_json()
    names = ("loss", "top1", "top5", "map", "f1", "f1_micro", "images")
    assert {name: found[name] for name in names} == {name: recorded[name] for name in names}
    labeled = report.images - report.unlabeled
    assert report.hits.sum() / labeled == recorded["top1"]
    assert report.unlabeled > 0


def test_what_the_command_writes(run, tmp_path, capsys):
    assert parser.main(["evaluate", str(run), f"--json={tmp_path / 'x.json'}", "--per_class"]) == 0
    text = capsys.readouterr().out
    record = json.loads((tmp_path / "x.json").read_text())
    assert record["absent_classes"] == 1
    assert (record["ece"], record["calibration"], record["confusion"]) == (None, None, None)
    rows = {row.pop("name"): row for row in record["per_class"]}
    assert [*rows] == [*NAMES]
    absent = rows["yak"]
    assert absent["average_precision"] is absent["recall"] is None
    known = [row["average_precision"] for name, row in rows.items() if name != "yak"]
    np.testing.assert_allclose(record["map"], np.mean(known))
    assert f"mAP     {record['map']:.2%}  (4 classes; 1 more are on no image)" in text
    assert "of them have no label" in text
    assert text.index("mAP") < text.index("top-1")
    assert [*record].index("map") < [*record].index("top1")
    assert f"cat    {rows['cat']['images']:>6} {rows['cat']['predicted']:>9}" in text


def test_another_threshold_changes_f1_only(run):
    found = [evaluate_data(open_network(run, threshold=t)).to_json() for t in (0.0, 0.9)]
    assert [each["threshold"] for each in found] == [0.4, 0.9]
    assert found[0]["map"] == found[1]["map"]
    assert found[0]["f1_micro"] != found[1]["f1_micro"]


# --- Views and data of other kinds ----------------------------------------------------------


def multi_label_network(**options):
    network = tiny_network(5, names=NAMES, **options)
    return dataclasses.replace(network, multi_label=True, threshold=0.5)


def test_views_average_probabilities():
    network = multi_label_network()
    pixels = [photo(n, 10, 10) for n in range(13)]
    labels = [np.flatnonzero(np.random.default_rng(n).random(5) < 0.5) for n in range(13)]
    source = SetsOfLabels(pixels, labels, NAMES)
    expected = []
    for image in pixels:
        crops = [image[y : y + 8, x : x + 8] for y, x in [(0, 0), (0, 2), (2, 0), (2, 2), (1, 1)]]
        crops += [crop[:, ::-1] for crop in crops]
        p = np.mean([1 / (1 + np.exp(-logits(network, crop))) for crop in crops], axis=0)
        expected.append(np.log(p / (1 - p)))
    wanted = measure(np.stack(expected).astype(np.float32), source.labels())
    report = evaluate_network(network, source, "ten_crop", batch_size=8)
    for name, value in wanted.record().items():
        np.testing.assert_allclose(getattr(report.multi_label, name), value, rtol=1e-4)
    np.testing.assert_array_equal(report.predictions, np.argmax(expected, 1))
    flat = evaluate_network(network, source, "one_crop", batch_size=8)
    assert flat.loss != report.loss


def test_one_label_an_image_is_a_set_of_one():
    network = multi_label_network(crop_fraction=1.0)
    pixels, labels = [photo(n, 8, 8) for n in range(13)], np.arange(13) % 5
    one = SetsOfLabels(pixels, labels, NAMES, sets=False)
    several = SetsOfLabels(pixels, [[label] for label in labels], NAMES)
    found = [evaluate_network(network, each, batch_size=8) for each in (one, several)]
    assert found[0].multi_label.record() == found[1].multi_label.record()


def test_classes_in_another_order():
    network = multi_label_network(crop_fraction=1.0)
    pixels = [photo(n, 8, 8) for n in range(13)]
    labels = [sorted({n % 5, n % 3}) for n in range(13)]
    turned = [sorted(4 - label for label in each) for each in labels]
    found = [
        evaluate_network(network, SetsOfLabels(pixels, each, names), batch_size=8)
        for each, names in ((labels, NAMES), (turned, NAMES[::-1]))
    ]
    assert found[0].multi_label.record() == found[1].multi_label.record()


def test_a_threshold_of_a_network_with_one_label(run):
    with pytest.raises(rj.ConfigError, match=r"--threshold=0\.3: goes with a multi-label network"):
        Overrides(threshold=0.3).apply(tiny_network())
    with pytest.raises(rj.ConfigError, match=r"--threshold=1\.5: must be a probability"):
        Overrides(threshold=1.5).check()
