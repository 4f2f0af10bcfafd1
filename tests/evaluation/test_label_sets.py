"""ImageNet's variants, written with the features and label encodings of TFDS's own builders."""

import dataclasses
import json

import numpy as np
import pytest
import tensorflow_datasets as tfds

from resnet_jax.data.sources import open_source, tfds_files
from resnet_jax.errors import ConfigError, DataError
from resnet_jax.evaluation.evaluator import evaluate_network
from resnet_jax.evaluation.held_out import evaluate_data
from resnet_jax.evaluation.label_sets import (
    ALEXNET_ERRORS,
    data_set_name,
    match_labels,
    subset_ids,
)
from resnet_jax.weights.class_names import imagenet_ids, imagenet_names
from tests.evaluation.settings import (
    SetsOfLabels,
    imagenet_network,
    logits,
    photo,
    prepare,
    softmax,
    tiny_network,
    write_folder,
)

SIDE = 8


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Images that are 8 pixels wide: no resize and no crop is in the way."""
    folder = tmp_path_factory.mktemp("tfds")
    for subset in ("imagenet_a", "imagenet_r"):
        labels = [imagenet_ids().index(each) for each in subset_ids(subset)[::14]]
        prepare(folder, subset, [(photo(n, SIDE, SIDE), label) for n, label in enumerate(labels)])
    for name, config in (("imagenet_v2", "matched-frequency"), ("imagenet_sketch", "")):
        examples = [(photo(n, SIDE, SIDE), 60 * n) for n in range(15)]
        prepare(folder, name, examples, config=config)
    sets = [[], [3], [5, 900], *([n, n + 1, n + 2] for n in range(0, 980, 80))]
    examples = [(photo(n, SIDE, SIDE), labels) for n, labels in enumerate(sets)]
    prepare(folder, "imagenet2012_real", examples, several=True, split="validation")
    return str(folder)


def examples_of(name, split, folder):
    builder = tfds.builder_from_directory(tfds_files.find_prepared(name, folder))
    return list(builder.as_data_source(split, file_format="array_record"))


@pytest.mark.parametrize("name", ["imagenet_a", "imagenet_r"])
def test_two_hundred_classes_compete(name, prepared):
    network = imagenet_network()
    report = evaluate_data(network, f"tfds:{name}", data_dir=prepared, batch_size=8)
    outputs = [imagenet_ids().index(each) for each in subset_ids(name)]
    hits, confidences, unrestricted = [], [], []
    for example in examples_of(name, "test", prepared):
        scores = logits(network, example["image"])
        hits.append(outputs[scores[outputs].argmax()] == example["label"])
        confidences.append(softmax(scores[outputs]).max())
        unrestricted.append(scores.argmax() in outputs)
    assert report.hits.tolist() == hits
    np.testing.assert_allclose(report.confidences, confidences, rtol=2e-5)
    assert not all(unrestricted)  # else the restriction would change nothing
    assert len(report.class_names) == 200
    assert report.class_names[0] == imagenet_names()[outputs[0]]
    assert report.confusion.sum() == 15


def test_a_label_outside_the_subset(tmp_path):
    prepare(tmp_path, "imagenet_a", [(photo(0, SIDE, SIDE), 0)])
    with pytest.raises(DataError, match="tfds:imagenet_a: has an image of n01440764, which is not"):
        evaluate_data(imagenet_network(), "tfds:imagenet_a", data_dir=str(tmp_path))


@pytest.mark.parametrize("name", ["imagenet_v2/matched-frequency", "imagenet_sketch"])
def test_a_thousand_classes_compete(name, prepared):
    network = imagenet_network()
    report = evaluate_data(network, f"tfds:{name}", data_dir=prepared, batch_size=8)
    examples = examples_of(name, "test", prepared)
    expected = [int(logits(network, each["image"]).argmax()) for each in examples]
    assert report.predictions.tolist() == expected
    assert report.labels.tolist() == [each["label"] for each in examples]
    assert len(report.class_names) == 1000


def test_real_labels(prepared):
    network = imagenet_network()
    report = evaluate_data(network, "tfds:imagenet2012_real", data_dir=prepared, batch_size=8)
    top1, top5 = [], []
    for example in examples_of("imagenet2012_real", "validation", prepared):
        right = set(map(int, example["real_label"]))
        if right:
            order = np.argsort(-logits(network, example["image"]))
            top1.append(order[0] in right)
            top5.append(bool(right & set(order[:5].tolist())))
    assert report.hits.tolist() == top1
    assert (report.top1, report.top5) == (np.mean(top1), np.mean(top5))
    assert (report.images, report.unlabeled, report.skipped) == (len(top1), 1, 0)
    assert (report.loss, report.labels, report.confusion, report.per_class) == (None,) * 4
    record = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert record["unlabeled"] == 1
    assert record["ece"] == report.ece
    assert "1 more have no label" in report.table(per_class=True)
    assert f"top-5   {report.top5:.2%}" in report.table()


def test_any_of_several_labels_is_right(tmp_path):
    """Labels that are known to be hit, not hit, and hit among the five."""
    network = imagenet_network()
    pixels = [photo(n, SIDE, SIDE) for n in range(3)]
    order = [np.argsort(-logits(network, each)) for each in pixels]
    sets = [sorted(map(int, (order[0][0], order[0][900]))), [int(order[1][7])]]
    sets.append(sorted(map(int, (order[2][4], order[2][8]))))
    prepare(tmp_path, "imagenet2012_real", zip(pixels, sets), several=True, split="validation")
    report = evaluate_data(network, "tfds:imagenet2012_real", data_dir=str(tmp_path))
    assert sorted(report.hits.tolist()) == [False, False, True]
    assert (report.top1, report.top5) == (1 / 3, 2 / 3)


def test_several_labels_are_trained_on_when_that_is_said(prepared):
    name = "tfds:imagenet2012_real"
    with pytest.raises(DataError, match=r"several labels each .*; set data.multi_label = true"):
        open_source(name, "validation", prepared)
    source = open_source(name, "validation", prepared, multi_label=True)
    assert source.label_shape == (source.num_classes,)
    assert source.labels().shape == (len(source), source.num_classes)


# --- ImageNet-C -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corrupted")
    for number, corruption in enumerate(ALEXNET_ERRORS):
        for severity in range(1, 6):
            if (corruption, severity) != ("fog", 5):
                write_corrupted(folder, corruption, severity, seed=number * 5 + severity)
    return folder


def write_corrupted(folder, corruption, severity, seed):
    """Two images of 8 pixels, of which none, one or both are labelled as the network sees them."""
    network = imagenet_network()
    examples = []
    for n in range(2):
        pixels = np.repeat(np.repeat(photo(100 * seed + n, 4, 4), 2, 0), 2, 1)
        right = n < severity % 3  # 0, 1 or 2 of them
        examples.append((pixels, int(logits(network, pixels).argmax() + (not right)) % 1000))
    config = f"{corruption}_{severity}"
    prepare(folder, "imagenet2012_corrupted", examples, config=config, split="validation")


@pytest.mark.slow
def test_mce(corrupted):
    network = imagenet_network(crop_fraction=0.8)
    report = evaluate_data(network, "tfds:imagenet2012_corrupted", data_dir=str(corrupted))
    assert report.results.keys() == ALEXNET_ERRORS.keys()
    assert (report.mce, report.mean_error) == (None, None)
    assert "no mCE: not all severities of fog are prepared" in report.table()
    write_corrupted(corrupted, "fog", 5, seed=999)
    report = evaluate_data(network, "tfds:imagenet2012_corrupted", data_dir=str(corrupted))
    errors = [0.5, 0.0, 1.0, 0.5, 0.0]
    assert all(report.errors(name) == errors for name in ALEXNET_ERRORS)
    assert report.mean_error == pytest.approx(0.4)
    assert report.mce == pytest.approx(np.mean([0.4 / each for each in ALEXNET_ERRORS.values()]))
    record = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert record["mce"] == report.mce
    assert record["corruptions"]["fog"]["2"]["top1"] == 1.0
    assert f"mCE {report.mce:.2%} (AlexNet: 100%)" in report.table().splitlines()[-1]


def test_corrupted_images_are_crops_already(corrupted):
    """The network would resize to 10 pixels and cut 8 out; here it resizes nothing."""
    network = imagenet_network(crop_fraction=0.8)
    assert network.preprocessing.resize_size == 10
    report = evaluate_data(
        network, "tfds:imagenet2012_corrupted/snow_2", data_dir=str(corrupted), batch_size=8
    )
    assert (report.top1, report.resize_size) == (1.0, 8)


def test_no_corruption_is_prepared(tmp_path):
    with pytest.raises(DataError, match="none of its configurations is prepared; run: python -m"):
        evaluate_data(imagenet_network(), "tfds:imagenet2012_corrupted", data_dir=str(tmp_path))


# --- Classes by name ------------------------------------------------------------------------


def test_subsets_are_imagenets():
    for name in ("imagenet_a", "imagenet_r"):
        assert len(set(subset_ids(name))) == 200
        assert set(subset_ids(name)) < set(imagenet_ids())
        assert list(subset_ids(name)) == sorted(subset_ids(name))
    assert data_set_name("tfds:imagenet_v2/topimages:3.0.0") == "imagenet_v2"


def test_classes_in_another_order(tmp_path):
    """class3, class2, ... of the network; the folder's are sorted."""
    write_folder(tmp_path, [(8, 8)] * 9)
    names = tuple(f"class{number}" for number in (3, 2, 0, 1))
    network = tiny_network(names=names, crop_fraction=1.0)
    source = open_source(f"folder:{tmp_path}", "test", train_split="")
    report = evaluate_network(network, source)
    assert [names[label] for label in report.labels] == [
        source.class_names[source[index][1]] for index in report.indices
    ]
    assert report.class_names == names
    expected = evaluate_network(tiny_network(crop_fraction=1.0), source)
    assert report.predictions.tolist() == expected.predictions.tolist()


def test_some_of_the_classes(tmp_path):
    write_folder(tmp_path, [(8, 8)] * 9, classes=3)
    network = tiny_network(names=("class2", "other", "class0", "class1"), crop_fraction=1.0)
    source = open_source(f"folder:{tmp_path}", "test", train_split="")
    assert match_labels(network, source).outputs.tolist() == [2, 3, 0]
    report = evaluate_network(network, source)
    assert len(report.class_names) == 3
    assert report.predictions.max() < 3


def test_classes_that_do_not_match(tmp_path):
    write_folder(tmp_path, [(8, 8)] * 4)
    source = open_source(f"folder:{tmp_path}", "test", train_split="")
    with pytest.raises(
        DataError, match=r"its 4 classes .class0, class1, class2, ....* the 6 of net"
    ):
        evaluate_network(tiny_network(classes=6, names=tuple("abcdef")), source)
    # Nobody knows what the outputs of a weight file are called; their number fits.
    match = match_labels(tiny_network(names=tuple("0123")), source)
    assert (match.names, match.by) == (source.class_names, "order")
    assert "by order, not by name (class0 ... class3): --classes=FILE" in match.warning
    # Where somebody says it, other names are another network's.
    known = dataclasses.replace(tiny_network(names=("class0", "class1", "cat", "dog")), named=True)
    with pytest.raises(DataError, match=r"2 of its 4 .*class2, class3.* \(cat, dog\); .*--classes"):
        match_labels(known, source)
    # Some of ImageNet's classes among others are no ImageNet.
    folder = SetsOfLabels([], [], [*imagenet_ids()[:-1], "cat"], sets=False)
    with pytest.raises(DataError, match="its 1000 classes"):
        match_labels(imagenet_network(), folder)
    other = SetsOfLabels([], [], [f"class{number}" for number in range(1000)], sets=False)
    assert match_labels(imagenet_network(), other).by == "order"
    numbers = SetsOfLabels([], [], [*map(str, range(1000))], sets=False)
    assert match_labels(imagenet_network(), numbers).by == "number"


def test_data_that_nobody_named():
    with pytest.raises(ConfigError, match="--data: net is no workdir"):
        evaluate_data(tiny_network())
    with pytest.raises(DataError, match=r"--data=tfds:cifar10: .*prepare cifar10"):
        evaluate_data(tiny_network(), "tfds:cifar10")
    with pytest.raises(DataError, match=r"--data=cifar --split=test: data\.name = 'cifar'"):
        evaluate_data(tiny_network(), "cifar", "test")
