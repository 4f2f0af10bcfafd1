"""Evaluations against plain computations, image by image, and against the trainer's own numbers."""

import collections
import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image

import resnet_jax as rj
from resnet_jax import config as c
from resnet_jax.data import scales as data_scales
from resnet_jax.data.sources import open_source
from resnet_jax.evaluation.evaluator import Evaluator, evaluate_network
from resnet_jax.evaluation.held_out import evaluate_data
from resnet_jax.evaluation.metrics import calibration, expected_calibration_error
from resnet_jax.evaluation.views import default_scales
from resnet_jax.training.loop import train
from resnet_jax.weights.source import open_network
from tests.evaluation.settings import logits, softmax, tiny_network, write_folder

SQUARES = [(10, 10)] * 21


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    root = tmp_path_factory.mktemp("squares")
    return root, write_folder(root, SQUARES)


def open_folder(root):
    return open_source(f"folder:{root}", "test", train_split="")


# --- The trainer's numbers ------------------------------------------------------------------


@pytest.fixture(
    scope="module", params=["stream and flip", pytest.param("memory", marks=pytest.mark.slow)]
)
def run(request, tmp_path_factory, tiny_model):
    """A real short run; its last batch of evaluation is padded."""
    streams = request.param != "memory"
    folder = tmp_path_factory.mktemp("run")
    config = c.Config(
        model=c.Model(name="tiny", precision="highest"),
        data=c.Data(eval_split="test[:100]", image_size=8, memory_gib=0.0 if streams else 2.0),
        augment=c.Augment(mean=(0.3,), std=(0.38,)),
        train=c.Train(steps=4, batch_size=32, ema_decay=0.7),
        evaluate=c.Evaluate(flip=streams),
        log=c.Log(tensorboard=False),
    )
    train(config, folder)
    return folder


@pytest.mark.accelerators
@pytest.mark.parametrize("ema", [False, True])
def test_the_trainers_numbers_to_the_digit(run, ema):
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    (recorded,) = [
        each for each in records if each["split"] != "train" and ("weights" in each) == ema
    ]
    report = evaluate_data(open_network(run, ema=ema))
    names = ("loss", "top1", "top5", "images")
    assert {name: getattr(report, name) for name in names} == {n: recorded[n] for n in names}
    assert (report.weights, report.split) == ("ema" if ema else "", "test[:100]")
    assert report.hits.mean() == recorded["top1"]
    assert report.views == ("flip" if open_network(run).config.evaluate.flip else "one_crop")


def test_a_run_keeps_its_precision(run):
    assert open_network(run).model.precision == "highest"


# --- Views, against one image at a time -----------------------------------------------------


def check(report, expected, labels):
    """Expected: each image's probabilities, or logits whose softmax they are."""
    expected = np.stack(expected)
    np.testing.assert_array_equal(report.labels, labels)
    np.testing.assert_array_equal(report.predictions, expected.argmax(1))
    np.testing.assert_allclose(report.confidences, expected.max(1), rtol=2e-5)
    own = expected[np.arange(len(labels)), labels]
    np.testing.assert_allclose(report.loss, -np.log(own).mean(), rtol=2e-5)
    assert report.top1 == (expected.argmax(1) == labels).mean()
    assert report.indices.tolist() == list(range(len(labels)))


def test_one_crop_and_flip(squares):
    root, images = squares
    network = tiny_network()
    labels = [label for _, label in images]
    crops = [pixels[1:9, 1:9] for pixels, _ in images]
    scores = [logits(network, crop) for crop in crops]
    report = evaluate_network(network, open_folder(root), batch_size=8)
    check(report, [softmax(x) for x in scores], labels)
    assert 0 < report.top1 < 1  # else the comparison would say little
    mirrored = [logits(network, crop[:, ::-1]) for crop in crops]
    report = evaluate_network(network, open_folder(root), "flip", batch_size=8)
    check(report, [softmax((x + y) / 2) for x, y in zip(scores, mirrored)], labels)


def test_ten_crop(squares):
    root, images = squares
    network = tiny_network()
    expected = []
    for pixels, _ in images:
        crops = [pixels[y : y + 8, x : x + 8] for y, x in [(0, 0), (0, 2), (2, 0), (2, 2), (1, 1)]]
        crops += [crop[:, ::-1] for crop in crops]
        expected.append(np.mean([softmax(logits(network, crop)) for crop in crops], axis=0))
    for size in (8, 16):
        report = evaluate_network(network, open_folder(root), "ten_crop", batch_size=size)
        check(report, expected, [label for _, label in images])


def test_multi_scale(tmp_path, monkeypatch):
    """Images of several shapes, each by itself: nothing that pads or fills enters a result."""
    sizes = [(12, 12), (12, 16), (16, 12), (12, 60), (24, 32)] * 3
    images = write_folder(tmp_path, sizes)
    network = tiny_network()
    shapes = collections.Counter()
    resized = data_scales.resize
    monkeypatch.setattr(
        data_scales, "resize", lambda p, s, i: (shapes.update([s]), resized(p, s, i))[1]
    )
    expected = []
    for pixels, _ in images:
        height, width = pixels.shape[:2]
        each = []
        for scale in (8, 12):
            longer = round(scale * min(3, round(12 * max(height, width) / min(height, width)) / 12))
            new = (longer, scale) if height > width else (scale, longer)
            image = Image.fromarray(pixels)
            if new != (height, width):
                image = image.resize(new[::-1], Image.Resampling.BILINEAR)
            each.append(softmax(logits(network, np.asarray(image))))
        expected.append(np.mean(each, axis=0))
    report = evaluate_network(
        network, open_folder(tmp_path), "multi_scale", scales=(8, 12), batch_size=8
    )
    check(report, expected, [label for _, label in images])
    assert len(shapes) == 8  # 1, 4/3 both ways, and 5 counts as 3: four ratios at two scales
    assert report.scales == (8, 12)


def test_ratios_are_few_and_near():
    ratios = {data_scales.Ratio.of(h, w) for h in range(50, 1000, 7) for w in range(50, 1000, 7)}
    assert len(ratios) == 49
    assert data_scales.Ratio.of(100, 101) == data_scales.Ratio.of(101, 100) == (12, False)
    for height, width in ((333, 500), (500, 375), (480, 640)):
        found = data_scales.Ratio.of(height, width).shape(480)
        stretch = found[1] / found[0] * height / width
        assert abs(stretch - 1) < 0.01


def test_default_scales_are_the_papers():
    assert default_scales(224) == (224, 256, 384, 480, 640)
    assert Evaluator(tiny_network(), "multi_scale").scales == (8, 9, 14, 17, 23)


def test_scales_that_are_too_small():
    network = dataclasses.replace(tiny_network(), model=rj.ResNet20())
    with pytest.raises(rj.ConfigError, match="--scales=2,8: tiny needs at least 4 pixels"):
        Evaluator(network, "multi_scale", scales=(2, 8))


# --- Metrics --------------------------------------------------------------------------------


def test_metrics_of_one_result(squares):
    report = evaluate_network(tiny_network(), open_folder(squares[0]), batch_size=8)
    confusion = np.zeros((4, 4), int)
    for label, prediction in zip(report.labels, report.predictions):
        confusion[label, prediction] += 1
    np.testing.assert_array_equal(report.confusion, confusion)
    for label, each in enumerate(report.per_class):
        assert each.images == confusion[label].sum()
        assert each.top1 == confusion[label, label] / each.images
    record = json.loads(json.dumps(report.to_json(), allow_nan=False))
    rebuilt = np.zeros((4, 4), int)
    for label, prediction, count in record["confusion"]:
        rebuilt[label, prediction] = count
    np.testing.assert_array_equal(rebuilt, confusion)
    assert sum(each["images"] for each in record["calibration"]) == record["images"] == 21
    assert record["ece"] == report.ece
    # Of four classes every image is a hit among five guesses.
    assert record["top5"] == 1
    assert "top-1" in report.table()
    assert "top-5" not in report.table()


def test_calibration_by_hand():
    confidences = np.array([0.95, 0.95, 0.95, 0.95, 0.3, 1 / 15, 1.0])
    hits = np.array([True, True, True, False, False, True, True])
    bins = calibration(confidences, hits)
    assert len(bins) == 15
    assert [each.images for each in bins if each.images] == [1, 1, 5]
    assert (bins[0].accuracy, bins[0].confidence) == (1.0, 1 / 15)  # (low, high]
    gaps = [1 * (1 - 1 / 15), 1 * 0.3, 5 * abs(0.8 - 4.8 / 5)]
    assert expected_calibration_error(bins) == pytest.approx(sum(gaps) / 7)
    assert bins[7] == (7 / 15, 8 / 15, 0, None, None)


# --- PyTorch --------------------------------------------------------------------------------


def test_a_converted_pytorch_network_image_by_image(tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    from tests.parity.networks import TorchvisionResNet18

    torch.manual_seed(0)
    net = TorchvisionResNet18(num_classes=4)
    torch.nn.init.normal_(net.fc.weight)
    images = write_folder(tmp_path, [(40, 48), (52, 40), (45, 45)] * 8)
    crops = []
    for pixels, _ in images:
        height, width = pixels.shape[:2]
        short = 36
        shape = (
            (short, short * width // height)
            if height <= width
            else (short * height // width, short)
        )
        image = Image.fromarray(pixels).resize(shape[::-1], Image.Resampling.BILINEAR)
        top, left = round((shape[0] - 32) / 2), round((shape[1] - 32) / 2)
        crops.append(np.asarray(image)[top : top + 32, left : left + 32])
    mean, std = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
    batch = torch.tensor((np.stack(crops) / np.float32(255) - mean) / std).permute(0, 3, 1, 2)
    with torch.no_grad():
        net.train()
        for _ in range(3):  # running statistics worth converting
            net(batch)
        probabilities = net.eval()(batch).softmax(1).numpy()
    torch.save(net.state_dict(), tmp_path / "net.pth")
    network = open_network(
        tmp_path / "net.pth", model="resnet18", image_size=32, crop_fraction=32 / 36
    )
    assert network.preprocessing.resize_size == 36
    names = tuple(f"class{number}" for number in range(4))
    network = dataclasses.replace(network, class_names=names)
    report = evaluate_network(network, open_folder(tmp_path), batch_size=8)
    np.testing.assert_array_equal(report.predictions, probabilities.argmax(1))
    assert len(set(report.predictions.tolist())) > 1
    np.testing.assert_allclose(report.confidences, probabilities.max(1), rtol=1e-4)


# --- Mistakes -------------------------------------------------------------------------------


@pytest.mark.parametrize("views", ["one_crop", "stream", "multi_scale"])
def test_images_that_cannot_be_decoded(views, tmp_path):
    images = write_folder(tmp_path, SQUARES)
    for name in ("class1/0005.png", "class0/0004.png"):
        (tmp_path / "test" / name).write_bytes(b"\x89PNG nothing")
    network, lines = tiny_network(), []
    if views == "stream":
        config = c.Config(data=c.Data(memory_gib=0.0))
        network, views = dataclasses.replace(network, config=config), "one_crop"
    source = open_folder(tmp_path)
    report = evaluate_network(network, source, views, batch_size=8, log=lines.append)
    bad = [i for i in range(21) if source.image_name(i)[-8:-4] in ("0005", "0004")]
    assert report.indices.tolist() == [i for i in range(21) if i not in bad]
    assert report.labels.tolist() == [images[i][1] for i in range(21) if i not in bad]
    assert (report.images, report.skipped, len(lines)) == (19, 2, 2)
    assert "2 more cannot be decoded" in report.table()
    with pytest.raises(rj.DataError, match=r"data\.max_corrupt = 1: more images than that"):
        evaluate_network(network, source, views, batch_size=8, max_corrupt=1, log=lines.append)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"views": "five_crop"},
            "--views: unknown view 'five_crop'; did you mean 'one_crop' or 'ten_crop'",
        ),
        ({"views": "flip", "scales": (8,)}, "--scales=8: goes with --views=multi_scale only"),
        ({"views": "multi_scale", "scales": (0,)}, "--scales=0: tiny needs at least 1 pixel"),
        ({"batch_size": 12}, "--batch_size = 12: must be a multiple of 8 devices"),
        ({"batch_size": -8}, "--batch_size=-8: a number of images"),
    ],
)
def test_options_that_cannot_be(options, message, squares):
    if "batch_size" in options and jax.device_count() != 8:
        pytest.skip("needs eight devices")
    with pytest.raises(rj.ConfigError) as caught:
        evaluate_network(tiny_network(), open_folder(squares[0]), **options)
    assert str(caught.value).startswith(message)


def test_ten_crops_that_would_be_one(squares):
    network = tiny_network(size=10, crop_fraction=1.0)
    with pytest.raises(rj.ConfigError, match="--views=ten_crop: crops of 10 pixels from images"):
        evaluate_network(network, open_folder(squares[0]), "ten_crop")


def test_outputs_that_are_not_numbers(squares):
    network = tiny_network()
    head = network.variables["params"]["head"]
    broken = {**network.variables["params"], "head": {**head, "bias": head["bias"] * np.nan}}
    variables = {**network.variables, "params": broken}
    for views in ("one_crop", "ten_crop"):
        with pytest.raises(rj.WeightsError, match="not numbers for 21 of 21 images"):
            evaluate_network(
                dataclasses.replace(network, variables=variables), open_folder(squares[0]), views
            )
