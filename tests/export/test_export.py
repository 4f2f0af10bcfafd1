"""Exported networks, read again: they compute what their source does, or are not written."""

import dataclasses
import functools
import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from safetensors.numpy import load_file

import resnet_jax as rj
from resnet_jax.cli import parser
from resnet_jax.config.schema import Config, Data
from resnet_jax.export import agreement, exporter, hub
from resnet_jax.export.agreement import sample_images, source_logits
from resnet_jax.export.exporter import export_network
from resnet_jax.export.image_sizes import ImageSizes, parse_image_sizes
from resnet_jax.export.stablehlo import open_stablehlo, write_stablehlo
from resnet_jax.models.folding import fold_batch_norm
from resnet_jax.weights.network import Network
from resnet_jax.weights.source import open_network
from tests import speed
from tests.variables import random_variables

ROOT = Path(__file__).parents[2]
SIDE = 16

# Small networks that have, between them, every stem, block, shortcut and norm.
_small = functools.partial(rj.ResNet, stage_sizes=(2, 1), stage_widths=(8, 16), num_classes=5)
_cifar_stem = functools.partial(rj.CifarStem, features=8)
KINDS = {
    "basic A": functools.partial(
        _small, block_cls=rj.BasicBlock, stem_cls=_cifar_stem, shortcut="A"
    ),
    "plain": functools.partial(_small, block_cls=rj.BasicBlock, shortcut="none"),
    "bottleneck C, groups": functools.partial(_small, shortcut="C", cardinality=2, base_width=16),
    "deep D, gates, dilated": functools.partial(
        _small,
        stem_cls=functools.partial(rj.DeepStem, widths=(4, 4, 8)),
        stage_sizes=(2, 1, 1),
        stage_widths=(8, 16, 16),
        shortcut="D",
        se_ratio=0.25,
        output_stride=4,  # stage3's shortcut averages pixels at a distance of 2
    ),
    "deep D": functools.partial(
        _small, stem_cls=functools.partial(rj.DeepStem, widths=(4, 4, 8)), shortcut="D"
    ),
    "deep, strided": functools.partial(
        _small, stem_cls=functools.partial(rj.DeepStem, widths=(4, 4, 8), conv_pool=True)
    ),
    "pre-activation": functools.partial(_small, block_cls=rj.PreActBottleneckBlock),
    "pre-activation, basic": functools.partial(
        _small, block_cls=rj.PreActBasicBlock, stem_cls=_cifar_stem, shortcut="A"
    ),
}
GROUP_NORM = functools.partial(
    _small,
    block_cls=rj.PreActBasicBlock,
    stem_cls=functools.partial(rj.ImageNetStem, zero_pool_padding=True),
    norm="group",
    weight_standardization=True,
)


@functools.cache
def case(kind):
    """A network of a kind, images for it, and its logits."""
    model = GROUP_NORM() if kind == "group norm" else KINDS[kind]()
    variables, preprocessing = random_variables(model), rj.Preprocessing()
    images = noise(*SIZES[0])
    logits = source_logits(model, variables, preprocessing, images)
    return model, variables, preprocessing, images, logits


@functools.cache
def case_logits(kind, size):
    return source_logits(*case(kind)[:3], noise(*size))


def noise(height, width):
    return np.random.default_rng(1).integers(0, 256, (3, height, width, 3)).astype(np.uint8)


# What a graph or program of any size is tried at, from sides of 8 up: odd and even maps.
SIZES = [(17, 17), (8, 24)]
slow = functools.partial(pytest.param, marks=pytest.mark.slow)
ANY_SIZE = ImageSizes(17, 17, least=8, is_open=True)


@pytest.fixture(scope="module")
def weight_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "w.safetensors"
    model = rj.ResNet20(num_classes=7)
    rj.save_weights(path, model, random_variables(model))
    return path


@pytest.fixture(scope="module")
def network(weight_file):
    return open_network(weight_file, model="resnet20", image_size=SIDE)


@pytest.fixture(scope="module")
def images(network):
    return sample_images(network, 3)


@pytest.fixture(scope="module")
def logits(network, images, accelerator):
    return source_logits(network.model, network.variables, network.preprocessing, images)


def close(found, expected, share=1e-5):
    chex.assert_trees_all_close(found, expected, rtol=0, atol=share * np.abs(expected).max())


def test_samples_are_real_images(network):
    samples = sample_images(network)
    chex.assert_shape(samples, (8, SIDE, SIDE, 3))
    assert samples.dtype == np.uint8
    assert len(np.unique(samples.reshape(8, -1), axis=0)) == 8
    assert samples.std((1, 2)).min() > 5
    grey = sample_images(dataclasses.replace(network, channels=1))
    chex.assert_shape(grey, (8, SIDE, SIDE, 1))


def test_stablehlo_runs_where_jax_is_all_there_is(network, images, logits, tmp_path):
    """The lines of docs/export.md, with nothing but JAX (and safetensors) to import."""
    done = export_network(network, "stablehlo", tmp_path / "network.stablehlo")
    assert done.difference <= 1e-5 * done.largest
    (tmp_path / "beside").mkdir()
    beside = tmp_path / "beside" / "network.stablehlo"
    done = export_network(network, "stablehlo", beside, weights="beside", fold_batch_norm=True)
    assert sorted(path.name for path in beside.parent.iterdir()) == [
        "network.safetensors",
        "network.stablehlo",
    ]
    assert beside.stat().st_size < 0.2 * done.paths[1].stat().st_size
    np.save(tmp_path / "images.npy", images)
    np.save(beside.parent / "images.npy", images)
    embedded_lines, beside_lines = re.findall(
        r"```python\n(.*?)```", (ROOT / "docs/export.md").read_text(), re.DOTALL
    )[:2]
    code = f"""
import os, sys
sys.modules.update(dict.fromkeys(["resnet_jax", "flax", "optax", "orbax"]))  # not importable
{embedded_lines}
assert program.platforms == ("cpu", "cuda", "tpu"), program.platforms
np.save("embedded.npy", logits)
os.chdir("beside")
{beside_lines}
np.save("beside.npy", logits)
"""
    subprocess.run(
        [sys.executable, "-I", "-c", code], cwd=tmp_path, check=True, timeout=speed.seconds(300)
    )
    close(np.load(tmp_path / "embedded.npy"), logits)
    close(np.load(beside.parent / "beside.npy"), logits)


@pytest.mark.accelerators
def test_one_platform_and_any_number_of_images(network, images, logits, tmp_path):
    path = tmp_path / "network"
    export_network(network, "stablehlo", path, platforms="cpu")
    program = jax.export.deserialize(bytearray(path.read_bytes()))
    assert program.platforms == ("cpu",)
    for count in (1, 2):
        close(open_stablehlo(path, None)(images[:count]), logits[:count])


@pytest.mark.parametrize(
    "kind", ["basic A", "deep D, gates, dilated", *map(slow, ("deep D", "group norm"))]
)
def test_stablehlo_of_any_size(kind, tmp_path):
    model, variables, preprocessing, *_ = case(kind)
    path = tmp_path / "network"
    predict = functools.partial(agreement.predict, model, preprocessing)
    write_stablehlo(predict, variables, ANY_SIZE, 3, ("cpu",), path, None)
    run = open_stablehlo(path, None)
    for size in SIZES:
        close(run(noise(*size)), case_logits(kind, size))


@pytest.fixture
def onnx():
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    return pytest.importorskip("onnx", reason="onnx is not installed")


def facts_of(model):
    return {each.key: json.loads(each.value) for each in model.metadata_props}


def test_onnx_is_a_graph_of_layers(network, images, logits, tmp_path, onnx):
    from resnet_jax.export.onnx import open_onnx

    path = tmp_path / "network.onnx"
    done = export_network(network, "onnx", path)
    assert done.difference <= 1e-5 * done.largest
    run = open_onnx(path)
    for count in (1, 3):
        close(run(images[:count]), logits[:count])
    model = onnx.load(path)
    operators = [node.op_type for node in model.graph.node]
    counts = {name: operators.count(name) for name in ("Conv", "BatchNormalization", "Relu")}
    assert counts == {"Conv": 19, "BatchNormalization": 19, "Relu": 19}
    assert operators.count("Transpose") == 1
    assert operators[-2:] == ["Flatten", "Gemm"]
    assert [each.name for each in model.graph.output] == ["logits"]
    assert (model.opset_import[0].version, model.ir_version) == (21, 10)
    facts = facts_of(model)
    assert facts["class_names"] == list("0123456")
    assert facts["preprocessing"]["image_size"] == SIDE
    described = facts["input"]
    assert "divides by std itself" in described.pop("type")
    assert described == {"layout": "NHWC", "channels": 3, "height": SIDE, "width": SIDE}
    export_network(network, "onnx", path, fold_batch_norm=True, force=True)
    close(open_onnx(path)(images), logits)
    operators = [node.op_type for node in onnx.load(path).graph.node]
    assert operators.count("Mul") == 1  # of the normalization
    assert "BatchNormalization" not in operators


@pytest.mark.parametrize("kind", [*list(KINDS)[::2], *map(slow, list(KINDS)[1::2]), "group norm"])
def test_onnx_knows_every_kind_of_network_at_any_size(kind, tmp_path, onnx):
    from resnet_jax.export.onnx import open_onnx, write_onnx

    source = case(kind)[:3]
    versions = [source[:2]] if kind == "group norm" else [source[:2], fold_batch_norm(*source[:2])]
    for number, (model, variables) in enumerate(versions):
        path = tmp_path / f"{number}.onnx"
        predict = functools.partial(agreement.predict, model, source[2])
        write_onnx(predict, variables, ANY_SIZE, 3, {}, path)
        run = open_onnx(path)
        for size in SIZES:
            close(run(noise(*size)), case_logits(kind, size))


@pytest.mark.parametrize(
    "kind", ["basic A", "deep D, gates, dilated", *map(slow, ("deep D", "group norm"))]
)
def test_onnx_of_every_opset(kind, tmp_path, onnx):
    from resnet_jax.export.onnx import OLDEST_OPSET, open_onnx, write_onnx

    model, variables, preprocessing, images, logits = case(kind)
    sizes = ImageSizes(*images.shape[1:3], least=8)
    predict = functools.partial(agreement.predict, model, preprocessing)
    # onnxruntime 1.20 runs opsets to 21, and each version one more; newer `onnx` can write more.
    runs = int(importlib.metadata.version("onnxruntime").split(".")[1]) + 1
    for opset in range(OLDEST_OPSET, min(runs, onnx.defs.onnx_opset_version()) + 1):
        path = tmp_path / f"{opset}.onnx"
        write_onnx(predict, variables, sizes, 3, {}, path, opset=opset)  # runs onnx's checker
        close(open_onnx(path)(images), logits)
        loaded = onnx.load(path)
        assert loaded.opset_import[0].version == opset
        operators = {node.op_type for node in loaded.graph.node}
        if kind == "group norm":
            expected = "GroupNormalization" if opset >= 21 else "InstanceNormalization"
            assert {each for each in operators if "Normalization" in each} == {expected}


def test_an_average_of_windows_is_one_node(tmp_path, onnx):
    from resnet_jax.export.onnx import write_onnx

    model, variables, preprocessing, *_ = case("deep D")
    predict = functools.partial(agreement.predict, model, preprocessing)
    write_onnx(predict, variables, ANY_SIZE, 3, {}, tmp_path / "x")
    operators = [node.op_type for node in onnx.load(tmp_path / "x").graph.node]
    assert operators.count("AveragePool") == 1
    assert "Div" not in operators
    assert "Shape" not in operators


@pytest.mark.parametrize("format", ["stablehlo", "onnx"])
def test_images_of_any_size(format, network, tmp_path, onnx):
    done = export_network(network, format, tmp_path / "x", input_size="open")
    assert done.sizes == ((SIDE, SIDE), (13, 21), (5, 5))
    assert done.difference <= 1e-5 * done.largest
    assert "8 real images of 16x16, 13x21, 5x5 pixels" in str(done)
    if format == "stablehlo":
        program = jax.export.deserialize(bytearray((tmp_path / "x").read_bytes()))
        assert str(program.in_avals[0]) == "uint8[batch,height,width,3]"
        with pytest.raises(ValueError, match="shapes"):  # said by JAX
            program.call(np.zeros((1, 4, 16, 3), np.uint8))
    else:
        model = onnx.load(tmp_path / "x")
        shape = model.graph.input[0].type.tensor_type.shape.dim
        assert [each.dim_param or each.dim_value for each in shape] == [
            *("batch", "height", "width"),
            3,
        ]
        described = facts_of(model)["input"]
        assert {key: described[key] for key in ("height", "width", "least_side")} == {
            **{"height": "any", "width": "any"},
            "least_side": 5,
        }


def test_images_that_are_not_square(network, tmp_path, onnx):
    from resnet_jax.export.onnx import open_onnx

    done = export_network(network, "onnx", tmp_path / "x", input_size="12x20")
    assert done.sizes == ((12, 20),)
    images = sample_images(network, size=(12, 20))
    chex.assert_shape(images, (8, 12, 20, 3))
    close(open_onnx(tmp_path / "x")(images), source_logits(*network_parts(network), images))


def network_parts(network):
    return network.model, network.variables, network.preprocessing


def test_the_smallest_image():
    dilated = rj.ResNet50(output_stride=8)
    assert [parse_image_sizes("open", model, 224).least for model in (rj.ResNet50(), dilated)] == [
        32,
        8,
    ]
    with pytest.raises(rj.ExportError, match=r"--input_size=31x64: each side must be from 32 pix"):
        parse_image_sizes("31x64", rj.ResNet50(), 224)


def test_a_graph_that_depends_on_the_size_is_not_open(tmp_path, onnx):
    from resnet_jax.export.onnx import write_onnx

    def predict(variables, images):
        x = images.astype(jnp.float32)
        return (x * x.shape[1]).mean((1, 2))

    write_onnx(predict, {}, ImageSizes(8, 8, least=8), 3, {}, tmp_path / "x")
    with pytest.raises(rj.ExportError, match="depends on the size of its images; give one"):
        write_onnx(predict, {}, ANY_SIZE, 3, {}, tmp_path / "y")
    assert not (tmp_path / "y").exists()


@pytest.mark.parametrize("format", ["stablehlo", "onnx", "hub"])
def test_a_network_without_head(format, tmp_path, onnx):
    model = rj.ResNet20(num_classes=0)
    variables = random_variables(model)
    named = rj.Preprocessing(image_size=SIDE, crop_fraction=1.0)
    network = Network("w.npz", "resnet20", model, variables, named, 3, ())
    done = export_network(network, format, tmp_path / "x")
    assert done.difference <= 1e-5 * done.largest
    if format == "onnx":
        (output,) = onnx.load(tmp_path / "x").graph.output
        assert output.name == "features"
        assert output.type.tensor_type.shape.dim[1].dim_value == 64


def test_the_weights_of_a_graph_beside_it(network, images, logits, tmp_path, monkeypatch, onnx):
    from resnet_jax.export import onnx as ours

    monkeypatch.setattr(ours, "MAX_EMBEDDED", 2**20)  # of 2 GiB
    with pytest.raises(rj.ExportError, match=r"and one file of ONNX holds 2 GB; give --weights=be"):
        export_network(network, "onnx", tmp_path / "network.onnx")
    assert not list(tmp_path.iterdir())
    export_network(network, "onnx", tmp_path / "network.onnx", weights="beside")
    graph, weights = sorted(tmp_path.iterdir())
    assert (graph.name, weights.name) == ("network.onnx", "network.onnx.data")
    assert graph.stat().st_size < 0.1 * weights.stat().st_size
    close(ours.open_onnx(graph)(images), logits)


def test_onnx_names_what_it_cannot_do(tmp_path, onnx):
    from resnet_jax.export.onnx import open_onnx, write_onnx

    def predict(variables, images):
        return jnp.cumsum(images.astype(jnp.float32), 0)

    with pytest.raises(rj.ExportError, match="'cumsum', which the ONNX export does not know"):
        write_onnx(predict, {}, ImageSizes(4, 4, least=4), 3, {}, tmp_path / "network.onnx")
    (tmp_path / "network.onnx").write_bytes(b"no graph")
    with pytest.raises(rj.ExportError, match=r"does not run the graph \(.*\); try another --opset"):
        open_onnx(tmp_path / "network.onnx")


@pytest.mark.parametrize("kind", KINDS)
def test_folding_changes_nothing_but_the_norms(kind):
    model, variables, preprocessing, images, logits = case(kind)
    folded, smaller = fold_batch_norm(model, variables)
    assert set(smaller) == {"params"}
    leaves = traverse_util.flatten_dict(smaller["params"])
    assert not any("scale" in path for path in leaves)
    if "pre-activation" in kind:  # what follows a sum keeps its factor
        blocks = ("stage1/block1", "stage1/block2", "stage2/block1")
        expected = {"final_norm/factor", *(f"{block}/norm1/factor" for block in blocks)}
    else:
        expected = set()
    assert {"/".join(path) for path in leaves if "factor" in path} == expected
    close(source_logits(folded, smaller, preprocessing, images), logits)
    assert fold_batch_norm(folded, smaller) == (folded, smaller)


def test_programs_are_folded(network, tmp_path):
    """Weights beside a program keep the names of the network's, and it folds them itself."""
    for weights in ("embedded", "beside"):
        path = tmp_path / f"{weights}.stablehlo"
        export_network(network, "stablehlo", path, weights=weights, platforms="cpu")
        program = jax.export.deserialize(bytearray(path.read_bytes())).mlir_module()
        # The roots of 19 norms, or none.
        assert program.count("stablehlo.rsqrt") + program.count("stablehlo.power") == (
            19 if weights == "beside" else 0
        )
    names = set(load_file(tmp_path / "beside.safetensors"))
    assert "batch_stats/stem/norm1/var" in names


def test_group_norm_is_not_folded(tmp_path):
    model = GROUP_NORM()
    network = Network("w.npz", "", model, random_variables(model), rj.Preprocessing(), 3, ())
    with pytest.raises(rj.ExportError, match=r"--fold_batch_norm: norm = 'group' cannot be folded"):
        export_network(network, "stablehlo", tmp_path / "x", fold_batch_norm=True)


def test_hub_folder_is_read_back_whole(network, tmp_path, monkeypatch):
    names = tuple(f"class {k}" for k in range(7))
    lines = [
        {"step": 9, "split": "train", "top1": 0.1, "learning_rate": 0.1, "images_per_second": 1.0},
        {"step": 9, "split": "test", "top1": 0.125, "top5": 0.5, "images": 360},
        {"step": 9, "split": "test", "top1": 0.25, "top5": 0.75, "images": 9, "weights": "ema"},
        {"step": 9, "split": "digits:test", "top1": 0.0, "images": 9, "weights": "ema"},
        {"step": 10, "split": "test", "top1": 1.0, "top5": 1.0, "images": 9, "weights": "ema"},
    ]
    text = "".join(json.dumps({"loss": 1.0, **line}) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text)
    config = Config(data=Data(name="folder:/home/someone/pets"))
    facts = {"source": str(tmp_path), "config": config, "step": 9, "ema": True}
    network = dataclasses.replace(network, class_names=names, **facts)
    done = export_network(network, "hub", tmp_path / "hub")
    assert done.difference == 0
    again = open_network(tmp_path / "hub")
    assert (again.name, again.class_names) == ("resnet20", names)
    assert again.preprocessing == network.preprocessing
    chex.assert_trees_all_equal(again.variables, network.variables)
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "| top-1 (test) | 25.00% |" in card
    assert "| top-5 (test) | 75.00% |" in card
    assert "digits:test" not in card
    assert "| parameters | 269,527 |" in card
    assert "| dataset | folder:pets |" in card
    assert "optimizer.learning_rate = 0.1" in card
    assert "someone" not in card
    assert "import timm" not in card
    assert not list(tmp_path.glob(".*"))


def test_a_model_card_shows_names_and_obeys_none(network, tmp_path):
    line = {"step": 9, "split": "<i>|\u202e", "loss": 1.0, "top1": 0.5, "top5": 1.0, "images": 1}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    config = Config(data=Data(name="folder:/x/<b>[a](b)|\x1b\udcff", eval_split=line["split"]))
    names = ("\x1b[2J", "\u202e", "\ud800", "\u6f22", "4", "5", "6")
    facts = {"source": str(tmp_path), "config": config, "step": 9, "class_names": names}
    network = dataclasses.replace(network, **facts)
    card = hub.model_card(network)
    assert card.replace("\n", "").isprintable()
    assert r"| dataset | folder:\<b\>\[a\](b)\|\\x1b\\udcff |" in card
    assert r"| top-1 (\<i\>\|\\u202e) | 50.00% |" in card
    hub.write_hub(network, tmp_path)
    text = (tmp_path / "config.json").read_text()
    assert text.isascii()
    assert json.loads(text)["label_names"] == list(names)


def test_hub_folder_of_grey_images(tmp_path):
    model = rj.create_model("resnet8_cifar", num_classes=3)
    rj.save_weights(tmp_path / "w.npz", model, random_variables(model, (8, 8, 1)))
    network = open_network(tmp_path / "w.npz", model="resnet8_cifar", image_size=8)
    assert network.preprocessing.mean == (0.449,)  # of ImageNet's three
    preprocessing = dataclasses.replace(network.preprocessing, mean=(0.3, 0.3, 0.3))
    with pytest.raises(rj.ExportError, match="3 means for images of 1 channel"):
        export_network(
            dataclasses.replace(network, preprocessing=preprocessing), "hub", tmp_path / "hub"
        )
    preprocessing = dataclasses.replace(network.preprocessing, mean=(0.3,), std=(0.4,))
    network = dataclasses.replace(network, preprocessing=preprocessing)
    export_network(network, "hub", tmp_path / "hub")
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert config["model_args"] == {"in_chans": 1}
    assert open_network(tmp_path / "hub").channels == 1


def test_a_network_that_its_name_does_not_describe_is_no_hub_folder(network, tmp_path):
    other = dataclasses.replace(network, model=network.model.clone(bn_epsilon=1e-3))
    with pytest.raises(rj.ExportError, match=r"has bn_epsilon = 0.001, which config.json"):
        export_network(other, "hub", tmp_path / "hub")
    assert not list(tmp_path.iterdir())


def test_push(network, tmp_path, monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub", reason="the Hub's client is missing")
    calls = []
    monkeypatch.setattr(huggingface_hub, "create_repo", lambda *a, **k: calls.append((a, k)))
    monkeypatch.setattr(huggingface_hub, "upload_folder", lambda **k: calls.append(k))
    export_network(network, "hub", tmp_path / "hub", push="me/net")
    assert calls[0] == (("me/net",), {"exist_ok": True})
    assert calls[1]["repo_id"] == "me/net"
    assert (calls[1]["folder_path"] / "model.safetensors").is_file()

    def refuse(*args, **kwargs):
        raise OSError("401 Unauthorized\nlong story")

    monkeypatch.setattr(huggingface_hub, "create_repo", refuse)
    with pytest.raises(rj.ExportError, match=r"refused \(OSError: 401 Unauthorized\)"):
        export_network(network, "hub", tmp_path / "hub", push="me/net", force=True)


def test_timm_reads_the_folder(tmp_path):
    timm = pytest.importorskip("timm", reason="timm is not installed")
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    model = rj.ResNet18(num_classes=4)
    rj.save_weights(tmp_path / "w.safetensors", model, random_variables(model))
    network = open_network(tmp_path / "w.safetensors", model="resnet18", image_size=64)
    export_network(network, "hub", tmp_path / "hub")
    theirs = timm.create_model(f"local-dir:{tmp_path}/hub", pretrained=True).eval()
    images = sample_images(network, 2)
    logits = source_logits(network.model, network.variables, network.preprocessing, images)
    prepared = np.asarray(network.preprocessing.normalize(images)).transpose(0, 3, 1, 2)
    with torch.no_grad():
        close(theirs(torch.from_numpy(prepared.copy())).numpy(), logits)
    assert theirs.pretrained_cfg["label_names"] == ["0", "1", "2", "3"]
    assert tuple(theirs.pretrained_cfg["input_size"]) == (3, 64, 64)


def test_the_list_of_timms_networks():
    timm = pytest.importorskip("timm", reason="timm is not installed")
    theirs = {name for name in rj.list_models() if timm.is_model(name)}
    # Two have timm's names and another function; they are refused when read back.
    assert {name for name in rj.list_models() if hub.in_timm(name)} == theirs


def test_a_network_without_numbers_is_named(network, tmp_path):
    variables = jax.tree.map(np.array, network.variables)
    variables["params"]["head"]["bias"][0] = np.inf
    broken = dataclasses.replace(network, variables=variables)
    with pytest.raises(rj.WeightsError, match=r"w\.safetensors: the network's outputs are not"):
        export_network(broken, "hub", tmp_path / "hub")
    assert not list(tmp_path.iterdir())


def test_an_export_that_disagrees_leaves_nothing_behind(network, tmp_path, monkeypatch):
    path = tmp_path / "network.stablehlo"
    right = export_network(network, "stablehlo", path, platforms="cpu")
    before = path.read_bytes()

    def wrong(job):
        job.files[0].write_bytes(b"wrong")

        def run(images):
            logits = source_logits(*network_parts(job.network), images)
            return logits + 2 * agreement.TOLERANCE * right.largest

        return run

    monkeypatch.setitem(exporter._WRITERS, "stablehlo", wrong)
    with pytest.raises(rj.ExportError, match="disagrees with its source"):
        export_network(network, "stablehlo", path, force=True)
    assert path.read_bytes() == before
    with pytest.raises(rj.ExportError, match="disagrees with its source"):
        export_network(network, "stablehlo", tmp_path / "other")
    assert [each.name for each in tmp_path.iterdir()] == ["network.stablehlo"]


def test_force_replaces_its_own_files_only(network, tmp_path):
    folder = tmp_path / "hub"
    folder.mkdir()
    (folder / "config.json").write_text("old")
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(rj.ExportError, match="exists; take another, or give --force"):
        export_network(network, "hub", folder)
    assert (folder / "config.json").read_text() == "old"
    export_network(network, "hub", folder, force=True)
    assert open_network(folder).name == "resnet20"
    assert (folder / "notes.txt").read_text() == "mine"
    with pytest.raises(rj.ExportError, match="is a folder; remove it"):
        export_network(network, "stablehlo", folder, force=True)


MISTAKES = [
    (["nowhere.npz", "--format=onnx", "--output=x"], "nowhere.npz"),
    (["{w}", "--format=onxx", "--output=x"], "--format=onxx: .*did you mean 'onnx'"),
    (
        ["{w}", "--format=stablehlo", "--platforms=cpu,gpus", "--output=x"],
        "unknown platform 'gpus'",
    ),
    (["{w}", "--format=stablehlo", "--platforms=,", "--output=x"], "unknown platform ''"),
    (["{w}", "--format=stablehlo", "--weights=apart", "--output=x"], "--weights=apart: unknown"),
    (["{w}", "--format=hub", "--weights=beside", "--output=x"], "stablehlo or onnx, not hub"),
    (["{w}", "--format=hub", "--input_size=open", "--output=x"], "stablehlo or onnx, not hub"),
    (["{w}", "--format=onnx", "--input_size=32", "--output=x"], "=32: is not HEIGHTxWIDTH"),
    (["{w}", "--format=onnx", "--input_size=4x32", "--output=x"], "each side must be from 5 "),
    (["{w}", "--format=onnx", "--input_size=32x9000", "--output=x"], "to 8,192"),
    (["{w}", "--format=stablehlo", "--opset=17", "--output=x"], "goes with --format=onnx"),
    (["{w}", "--format=onnx", "--opset=16", "--output=x"], r"--opset=16: must be from 17 to \d\d"),
    (["{w}", "--format=onnx", "--opset=99", "--output=x"], r"--opset=99: must be from 17 to \d\d"),
    (["{w}", "--format=onnx", "--opset=new", "--output=x"], "--opset: 'new': must be a whole"),
    (["{w}", "--format=onnx", "--platforms=cpu", "--output=x"], "goes with --format=stablehlo"),
    (["{w}", "--format=onnx", "--push=a/b", "--output=x"], "goes with --format=hub"),
    (["{w}", "--format=hub", "--push=b", "--output=x"], "--push=b: is not OWNER/NAME"),
    (["{w}", "--format=hub", "--fold_batch_norm", "--output=x"], "stablehlo or onnx, not hub"),
    (["{w}", "--format=stablehlo", "--output=there"], "there exists; take another"),
    (["{w}", "--format=hub", "--output=there", "--force"], "there: is a file; remove it"),
    (["{w}", "--format=onnx", "--output=no/such/x"], r"cannot be written \(No such file"),
    (["{w}", "--format=stablehlo", "--weights=beside", "--output=x.safetensors"], "take another"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_mistakes_end_in_one_line(arguments, message, weight_file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("there").write_text("mine")
    flags = [each.format(w=weight_file) for each in arguments]
    assert parser.main(["export", *flags, f"--image_size={SIDE}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert re.search(message, line), line
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("there", "mine")]


def test_a_missing_package_is_named(network, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("resnet_jax.export.onnx")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(
        rj.ExportError, match=r"--format=onnx needs onnx.*, which is not installed: pip"
    ):
        export_network(network, "onnx", tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_command(weight_file, tmp_path, capsys):
    flags = ["--model=resnet20", "--format=stablehlo", "--platforms=tpu", "--input_size=12x20"]
    assert parser.main(["export", str(weight_file), *flags, f"--output={tmp_path}/x"]) == 0
    line = capsys.readouterr().out
    shown = r"x \(1\.1 MB\): largest difference .* on 8 real images of 12x20 pixels \d\.\de-\d\d"
    assert re.search(shown, line), line
    program = jax.export.deserialize(bytearray((tmp_path / "x").read_bytes()))
    assert str(program.in_avals[0]) == "uint8[batch,12,20,3]"
