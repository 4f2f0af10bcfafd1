"""A multi-label network on images: the classes that it predicts, and what it is as a folder."""

import csv
import dataclasses
import io
import json

import jax
import numpy as np
import pytest
from PIL import Image

import resnet_jax as rj
from resnet_jax.cli.parser import main
from resnet_jax.config.schema import Config, Data
from resnet_jax.export.exporter import export_network
from resnet_jax.inference import writers
from resnet_jax.inference.images import ImageFile
from resnet_jax.weights.source import open_network
from tests.variables import random_variables

NAMES = tuple(f"class {number}" for number in range(7))
BATCH = 2 * jax.local_device_count()


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """With metrics beside it, as a run has them."""
    folder = tmp_path_factory.mktemp("network")
    model = rj.ResNet8Cifar(num_classes=7)
    rj.save_weights(folder / "w.safetensors", model, random_variables(model))
    record = {"step": 9, "split": "test", "loss": 0.5, "top1": 0.5, "map": 0.25, "f1": 0.125}
    (folder / "metrics.jsonl").write_text(json.dumps({**record, "f1_micro": 0.375}) + "\n")
    found = open_network(folder / "w.safetensors", model="resnet8_cifar")
    facts = {"source": str(folder), "config": Config(data=Data(multi_label=True)), "step": 9}
    return dataclasses.replace(found, multi_label=True, threshold=0.3, class_names=NAMES, **facts)


@pytest.fixture(scope="module")
def hub(network, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "folder"
    export_network(network, "hub", folder)
    return folder


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)


def test_all_classes_from_the_threshold_up(network, images):
    classifier = rj.Classifier(network, batch_size=BATCH)
    logits = classifier.logits(images).astype(np.float64)
    expected = 1 / (1 + np.exp(-logits))
    np.testing.assert_allclose(classifier.probabilities(images), expected, rtol=1e-5)
    for found, shares in zip(classifier(images), expected):
        assert {each.index for each in found} == {*np.flatnonzero(shares >= 0.3)}
        assert [each.probability for each in found] == sorted(
            (each.probability for each in found), reverse=True
        )
    assert [len(each) for each in classifier(images, top=3)] == [3] * 4
    strict = rj.Classifier(dataclasses.replace(network, threshold=1 - 1e-9), batch_size=BATCH)
    assert strict(images) == [[]] * 4


def test_saturated_probabilities_keep_their_order(network):
    logits = np.float32([50, 60, -60, 40, 0, -50, 1])
    found = rj.Classifier(network, batch_size=BATCH).best(logits)
    assert [each.index for each in found] == [1, 0, 3, 6, 4]


def test_an_image_without_classes_is_in_every_format():
    files = [ImageFile("a.png"), ImageFile("b.png")]
    one = [writers.Prediction("cat", 0, 0.5)]
    forms = {name: make(files)[1] for name, make in writers._FORMS.items()}
    assert forms["table"]("b.png", []).split() == ["b.png", "-"]
    assert json.loads(forms["jsonl"]("b.png", [])) == {"image": "b.png", "predictions": []}
    rows = [*csv.reader(io.StringIO(forms["csv"]("a.png", one) + forms["csv"]("b.png", [])))]
    assert rows == [["a.png", "1", "0", "cat", "0.5"], ["b.png", "", "", "", ""]]


def test_a_folder_says_what_its_outputs_mean(network, hub):
    config = json.loads((hub / "config.json").read_text())
    assert config["problem_type"] == "multi_label_classification"
    again = open_network(hub)
    assert (again.multi_label, again.threshold) == (True, 0.3)
    assert open_network(hub, threshold=0.8).threshold == 0.8
    card = (hub / "README.md").read_text()
    for line in ("mAP (test) | 25.00%", "macro F1 (test) | 12.50%", "micro F1 (test) | 37.50%"):
        assert f"| {line} |" in card
    assert "jax.nn.sigmoid(logits) >= 0.3" in card


@pytest.mark.parametrize("threshold", ["1", "0.0", '"a"', "NaN"])
def test_a_folder_with_a_strange_threshold(threshold, hub, tmp_path):
    text = (hub / "config.json").read_text()
    for name in ("model.safetensors", "README.md"):
        (tmp_path / name).write_bytes((hub / name).read_bytes())
    (tmp_path / "config.json").write_text(text.replace("0.3", threshold, 1))
    with pytest.raises(rj.WeightsError, match="threshold = "):
        open_network(tmp_path)


def test_the_command(hub, images, tmp_path, capsys):
    Image.fromarray(images[0]).save(tmp_path / "a.png")
    arguments = ["predict", str(hub), str(tmp_path / "a.png"), "--format=jsonl"]
    found = []
    for flags in ([], ["--threshold=0.999999"], ["--top=2"]):
        assert main([*arguments, f"--batch_size={BATCH}", *flags]) == 0
        found.append(json.loads(capsys.readouterr().out)["predictions"])
    assert all(each["probability"] >= 0.3 for each in found[0])
    assert len(found[0]) > len(found[1])
    assert len(found[2]) == 2
    assert main([*arguments, "--threshold=2"]) == 2
    assert "error: --threshold=2.0: must be a probability in (0, 1)" in capsys.readouterr().err
