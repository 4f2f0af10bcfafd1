"""The datasets of `evaluate.also`: their metrics, their records, and mistakes at the start."""

import dataclasses
import json

import pytest

import resnet_jax as rj
from resnet_jax import config as c
from resnet_jax.config.serialization import differences
from resnet_jax.data.pipeline import CorruptImages, open_dataset
from resnet_jax.data.preprocessing import Preprocessing
from resnet_jax.data.sources import open_source
from resnet_jax.distributed.data_parallel import parallel_sums, replicate
from resnet_jax.evaluation.held_out import HeldOutSets, evaluate_data
from resnet_jax.evaluation.metrics import evaluate, make_evaluation_step
from resnet_jax.weights.class_names import imagenet_ids
from resnet_jax.workdirs.evaluations import Evaluations
from resnet_jax.workdirs.records import EVALUATION, parse_record
from tests.evaluation.settings import imagenet_network, photo, prepare, tiny_network, write_folder

DIGITS = tuple("0123456789")


def configuration(*also, name="digits", **data):
    return c.Config(
        data=c.Data(name=name, image_size=8, threads=2, **data),
        augment=c.Augment(mean=(0.3,), std=(0.38,)),
        train=c.Train(batch_size=16),
        evaluate=c.Evaluate(also=also),
    )


def open_digits(*also, **options):
    return HeldOutSets.open(configuration(*also), tiny_network(10).model, DIGITS, 1, **options)


@pytest.mark.parametrize("flip", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_numbers_of_the_trainers_evaluation(flip):
    """A dataset has the same numbers as data.eval_split and as one of evaluate.also."""
    network = tiny_network(10, channels=1)
    config = configuration("digits:test[:100]", "digits:train[:30]")
    config.evaluate.flip = flip
    variables = replicate(network.variables)
    held_out = HeldOutSets.open(config, network.model, DIGITS, 1)
    assert held_out.names == config.evaluate.also
    found = {name: held_out.evaluate(name, variables) for name in held_out.names}
    source = open_source("digits", "test[:100]")
    data = dataclasses.replace(config.data, channels=1)
    dataset = open_dataset(source, data, training=False, corrupt=CorruptImages(0, print))
    step = make_evaluation_step(network.model, Preprocessing.from_config(config), flip)
    expected = evaluate(parallel_sums(step), variables, dataset.eval_batches(16))
    record = found["digits:test[:100]"]
    assert record.pop("images_per_second") > 0
    assert record == expected
    assert found["digits:train[:30]"]["images"] == 30


def test_a_run_without_further_sets():
    assert open_digits().names == ()
    held_out = open_digits("digits:test[:8]", "digits:train[:8]")
    assert held_out.fingerprints.keys() == {"digits:test[:8]", "digits:train[:8]"}


@pytest.fixture(scope="module")
def variants(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    photos = [photo(n, 8, 8) for n in range(9)]
    ids = [imagenet_ids().index(each) for each in ("n01498041", "n01531178")]  # in ImageNet-A
    prepare(folder, "imagenet_a", [(photos[n], ids[n % 2]) for n in range(9)])
    sets = [[], [3], [5, 900], *([n, n + 1] for n in range(6))]
    examples = list(zip(photos, sets))
    prepare(folder, "imagenet2012_real", examples, several=True, split="validation")
    return str(folder)


def test_variants_of_imagenet(variants):
    """As the `evaluate` command measures them: 200 classes compete; ReaL has no loss."""
    also = ("tfds:imagenet_a:test", "tfds:imagenet2012_real:validation")
    config = configuration(*also, name="tfds:imagenet2012", data_dir=variants)
    config.augment.mean, config.augment.std = (0.5,), (0.25,)
    network = imagenet_network()
    held_out = HeldOutSets.open(config, network.model, imagenet_ids(), 3)
    variables = replicate(network.variables)
    found = {name: held_out.evaluate(name, variables) for name in also}
    for name in also:
        data, _, split = name.rpartition(":")
        expected = evaluate_data(network, data, split, data_dir=variants, batch_size=16)
        record = found[name]
        assert (record["top1"], record["top5"]) == (expected.top1, expected.top5)
        assert record.get("loss") == expected.loss
        assert record["images"] == expected.images
    assert "loss" not in found["tfds:imagenet2012_real:validation"]
    # Records without a loss are read back, and do not choose the best state.
    evaluations = Evaluations("top1", config.data.eval_split)
    for name, metrics in found.items():
        record = {"step": 1, "split": name, "kind": EVALUATION, **metrics}
        assert parse_record(json.dumps(record).encode() + b"\n") == record
        evaluations.add(record)
    assert evaluations.best is None


def test_a_split_of_the_runs_own_folder(tmp_path):
    for split, classes in (("test", 4), ("val", 4), ("few", 3)):
        write_folder(tmp_path, [(8, 8)] * 8, classes=classes, split=split)
    names, model = tuple(f"class{n}" for n in range(4)), tiny_network(5).model  # a wider head
    data = f"folder:{tmp_path}"
    held_out = HeldOutSets.open(configuration(f"{data}:val", name=data), model, names, 3)
    variables = replicate(tiny_network(5).variables)
    assert held_out.evaluate(f"{data}:val", variables)["images"] == 8
    with pytest.raises(rj.DataError, match=r"evaluate\.also = '.*:few': .*no images of 1 of the 4"):
        HeldOutSets.open(configuration(f"{data}:few", name=data), model, names, 3)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tfds:cifar10:test", "prepare cifar10"),
        ("digits:validation", "validation"),
        ("folder:/nowhere:test", "is not a folder"),
        ("other:test", "data.name = 'other'"),
        ("FOLDER:test", r"its 4 classes \(class0.* are not among the 10 of the network"),
    ],
)
def test_mistakes_are_found_at_the_start(name, message, tmp_path):
    write_folder(tmp_path, [(8, 8)] * 4)
    name = name.replace("FOLDER", f"folder:{tmp_path}")
    with pytest.raises(rj.DataError, match=message) as caught:
        open_digits("digits:test[:8]", name)
    assert str(caught.value).startswith(f"evaluate.also = {name!r}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("also", [("digits",), ("digits:",), ("digits:test", "digits:test")])
def test_the_form_of_the_field(also):
    with pytest.raises(rj.ConfigError, match=r"evaluate\.also = .*: must be different data, each"):
        c.check(configuration(*also))
    c.check(configuration("tfds:imagenet_v2/matched-frequency:3.0.0:test[:10%]"))
    assert differences(configuration(), json.loads(c.to_json(configuration("digits:test")))) == []


def test_an_image_that_cannot_be_decoded(tmp_path):
    write_folder(tmp_path, [(8, 8)] * 8)
    (tmp_path / "test/class0/0000.png").write_bytes(b"\x89PNG nothing")
    names, data, lines = tuple(f"class{n}" for n in range(4)), f"folder:{tmp_path}", []
    network = tiny_network()
    for most in (10, 0):
        config = configuration(f"{data}:test", name=data, max_corrupt=most)
        held_out = HeldOutSets.open(config, network.model, names, 3, log=lines.append)
        variables = replicate(network.variables)
        if most:
            assert held_out.evaluate(f"{data}:test", variables)["images"] == 7
            assert len(lines) == 1
        else:
            with pytest.raises(rj.DataError, match=r"evaluate\.also = .*data\.max_corrupt = 0"):
                held_out.evaluate(f"{data}:test", variables)
