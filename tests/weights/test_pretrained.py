"""What config.json says: timm's arguments and crops, transformers' networks and processors."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import resnet_jax as rj
from resnet_jax.config.schema import Data
from resnet_jax.data.decode import crop_pixels
from resnet_jax.models.stem import DeepStem, ImageNetStem
from resnet_jax.weights import pretrained
from resnet_jax.weights.pretrained import read_description

FACTS = {"input_size": [3, 64, 64], "interpolation": "bilinear", "crop_pct": 0.9}


def described(folder, config, processor=None, **options):
    (folder / "config.json").write_text(json.dumps(config))
    if processor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return read_description(folder, **options)


def timm(folder, facts=None, use_test_size=False, **top):
    config = {"architecture": "resnet18", "num_classes": 4, **top}
    config["pretrained_cfg"] = {**FACTS, **(facts or {})}
    return described(folder, config, use_test_size=use_test_size)


@pytest.mark.parametrize(
    ("arguments", "fields"),
    [
        ({"num_classes": 5, "in_chans": 4, "global_pool": "avg"}, {"num_classes": 5}),
        ({"pretrained": True, "drop_block_rate": 0.1, "aa_layer": None, "act_layer": "relu"}, {}),
        ({"drop_rate": 0.2}, {"dropout_rate": 0.2}),
        ({"drop_path_rate": 0.1}, {"stochastic_depth_rate": 0.1}),
        ({"zero_init_last": True}, {"zero_init_residual": True}),
        ({"output_stride": 8, "avg_down": True}, {"output_stride": 8, "shortcut": "D"}),
        ({"cardinality": 32, "base_width": 4}, {"cardinality": 32, "base_width": 4}),
        ({"layers": [1, 2], "channels": [8, 16]}, {"stage_sizes": (1, 2), "stage_widths": (8, 16)}),
        ({"norm_layer": "groupnorm"}, {"norm": "group"}),
        ({"block_args": {"attn_layer": "se"}}, {"se_ratio": 1 / 16}),
        ({"stem_width": 32}, {"stem_cls": ImageNetStem}),  # the width is that of deep stems
    ],
)  # fmt: skip
def test_arguments_of_timm(arguments, fields, tmp_path):
    found = timm(tmp_path, architecture="resnet50", model_args=arguments)
    assert found.fields == {"num_classes": 4, **fields}
    rj.create_model(found.name, **found.fields)


@pytest.mark.parametrize(
    ("name", "arguments", "widths", "conv_pool"),
    [
        ("resnet18", {"stem_type": "deep", "stem_width": 32}, (32, 32, 64), False),
        ("resnet18", {"stem_type": "deep_tiered", "stem_width": 32}, (24, 32, 64), False),
        ("resnet50d", {"stem_width": 64}, (64, 64, 128), False),
        ("resnet50d", {"replace_stem_pool": True}, (32, 32, 64), True),
        ("resnet50t", {"stem_type": "deep"}, (32, 32, 64), False),
    ],
)
def test_stems_of_timm(name, arguments, widths, conv_pool, tmp_path):
    stem = timm(tmp_path, architecture=name, model_args=arguments).fields["stem_cls"]
    assert isinstance(stem, functools.partial)
    assert stem.func is DeepStem
    assert stem.keywords == {"widths": widths, "conv_pool": conv_pool}


@pytest.mark.parametrize(
    ("top", "message"),
    [
        ({"model_args": {"global_pool": "max"}}, "global_pool = 'max' has no counterpart here"),
        ({"model_args": {"act_layer": "silu"}}, "act_layer = 'silu' has no counterpart here"),
        ({"model_args": {"block_reduce_first": 2}}, "block_reduce_first = 2 has no"),
        ({"model_args": {"down_kernel_size": 3}}, "down_kernel_size = 3 has no"),
        ({"model_args": {"norm_layer": "frozenbatchnorm2d"}}, "norm_layer = 'frozenbatchnorm2d'"),
        ({"model_args": {"block_args": {"attn_layer": "eca"}}}, "attn_layer = 'eca' has no"),
        ({"model_args": {"block_args": {"drop_block": 1}}}, "block_args.drop_block = 1 has no"),
        ({"model_args": {"features_only": True}}, "features_only = True has no"),
        ({"model_args": {"replace_stem_pool": True}}, "replace_stem_pool = True has no"),
        ({"model_args": {"stem_type": "wide"}}, "stem_type = 'wide' has no"),
        ({"model_args": {"new": 1}}, "new = 1 has no counterpart here"),
        ({"model_args": {"layers": [501, 500]}}, "layers = .*: at most 1,000 blocks in all"),
        ({"model_args": {"layers": [1] * 17}}, "layers = .*: must be a number for each stage"),
        ({"model_args": {"cardinality": 0}}, "cardinality = 0: must be from 1"),
        ({"model_args": {"layers": []}}, "layers = .*: must be a number for each stage"),
        ({"architecture": "resnetv2_50", "model_args": {"avg_down": True}}, "avg_down = True"),
        ({"facts": {"global_pool": "catavgmax"}}, "global_pool = 'catavgmax' has no"),
        ({"facts": {"label_offset": 1}}, "label_offset = 1 has no"),
        ({"facts": {"crop_mode": "border"}}, "crop_mode = 'border': images are prepared"),
        ({"facts": {"input_size": [3, 64, 128]}}, r"input_size = \[3, 64, 128\]: images are"),
        ({"label_names": {"0": 7}}, "label_names: must be a list of names"),
    ],
)  # fmt: skip
def test_another_network_of_timm_is_refused(top, message, tmp_path):
    with pytest.raises(rj.WeightsError, match=message):
        timm(tmp_path, **top)


def test_images_of_timm(tmp_path):
    found = timm(tmp_path, {"crop_mode": "squash", "fixed_input_size": True}).preprocessing
    assert (found.image_size, found.resize_size, found.crop_mode) == (64, 71, "squash")
    facts = {"test_input_size": [3, 96, 96], "test_crop_pct": 1.0}
    for wanted, sides in ((False, (64, 71)), (True, (96, 96))):
        found = timm(tmp_path, facts, use_test_size=wanted).preprocessing
        assert (found.image_size, found.resize_size) == sides
    # What timm assumes where the file does not say.
    found = described(tmp_path, {"architecture": "resnet50"}).preprocessing
    assert found == rj.Preprocessing(interpolation="bicubic")
    assert (
        timm(tmp_path, {"input_size": [3, 224, 224], "crop_pct": 0.95}).preprocessing.resize_size
        == 235
    )


def test_color_beside_other_channels_is_averaged(tmp_path):
    """As timm does, which says "using its mean value"."""
    found = timm(
        tmp_path, {"mean": [0.2, 0.4, 0.6], "std": [0.1, 0.2, 0.3]}, model_args={"in_chans": 4}
    )
    np.testing.assert_allclose(found.preprocessing.mean + found.preprocessing.std, (0.4, 0.2))


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (["a", "b", "c", "d"], ("a", "b", "c", "d")),
        ({"0": "a", "3": "d", "1": "b"}, ("a", "b", "2", "d")),
        ({"4": "e"}, ()),
        ({"x": "e"}, ()),
        ({}, ()),
        (["a"], ()),
    ],
)
def test_labels_by_place_or_number(names, labels, tmp_path):
    assert timm(tmp_path, label_names=names, label_descriptions={"a": "of a"}).class_names == labels


# transformers

RESNET50 = {
    "architectures": ["ResNetForImageClassification"],
    "model_type": "resnet",
    "embedding_size": 64,
    "hidden_sizes": [256, 512, 1024, 2048],
    "depths": [3, 4, 6, 3],
    "layer_type": "bottleneck",
    "hidden_act": "relu",
    "downsample_in_first_stage": False,
    "id2label": {str(number): f"kind {number}" for number in range(1000)},
}
PROCESSOR = {
    "crop_pct": 0.875,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "ConvNextFeatureExtractor",
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "resample": 3,
    "size": 224,
}


def test_networks_of_transformers(tmp_path):
    found = described(tmp_path, RESNET50, PROCESSOR)
    assert found.name == "resnet50"
    assert rj.create_model(found.name, **found.fields) == rj.ResNet50()
    assert found.preprocessing == rj.Preprocessing(interpolation="bicubic")
    assert found.class_names[999] == "kind 999"
    basic = {**RESNET50, "layer_type": "basic", "depths": [2, 2], "hidden_sizes": [16, 32]}
    found = described(tmp_path, {**basic, "embedding_size": 8, "id2label": None})
    assert found.fields["stage_sizes"] == (2, 2)
    assert found.fields["stage_widths"] == (16, 32)
    assert found.fields["stem_cls"].keywords == {"features": 8}
    assert found.fields["num_classes"] == 2  # which transformers does not write
    v1 = described(tmp_path, {**RESNET50, "downsample_in_bottleneck": True})
    assert v1.fields["stride_in_1x1"]
    backbone = described(tmp_path, {**RESNET50, "architectures": ["ResNetModel"]})
    assert (backbone.fields["num_classes"], backbone.class_names) == (0, ())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' has no counterpart"),
        ({"downsample_in_first_stage": True}, "downsample_in_first_stage = True has no"),
        ({"layer_type": "wide"}, "layer_type = 'wide' has no"),
        ({"model_type": "vit"}, "model_type = 'vit'"),
        ({"hidden_sizes": [256, 512]}, "hidden_sizes = .*: must be as many as depths"),
        ({"hidden_sizes": [255, 512, 1024, 2048]}, "multiples of 4"),
        ({"depths": "3463"}, "must be a whole number"),
        ({"downsample_in_bottleneck": 1}, "must be true or false"),
    ],
)
def test_another_network_of_transformers_is_refused(change, message, tmp_path):
    with pytest.raises(rj.WeightsError, match=message):
        described(tmp_path, {**RESNET50, **change})


SQUARE = {"height": 64, "width": 64}
PROCESSORS = [  # what it says, then sides of crop and resized image, and how it is cropped
    ({"size": {"shortest_edge": 64}}, 64, 73, "center"),
    ({"size": {"shortest_edge": 384}}, 384, 384, "squash"),
    ({"image_processor_type": "ViTImageProcessor", "size": SQUARE}, 64, 64, "squash"),
    (
        {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": 80},
            "do_center_crop": True,
            "crop_size": SQUARE,
        },
        *(64, 80, "center"),
    ),
]


@pytest.mark.parametrize(("change", "side", "resized", "mode"), PROCESSORS)
def test_processors_of_transformers(change, side, resized, mode, tmp_path):
    found = described(tmp_path, RESNET50, {**PROCESSOR, **change}).preprocessing
    assert (found.image_size, found.resize_size, found.crop_mode) == (side, resized, mode)


def test_scales_of_processors(tmp_path):
    images = jnp.arange(12, dtype=jnp.uint8).reshape(1, 2, 2, 3) * 20
    for change, expected in (
        ({"do_normalize": False}, images / 255),
        ({"do_normalize": False, "do_rescale": False}, images),
        (
            {"rescale_factor": 1 / 127.5, "image_mean": [1.0], "image_std": [1.0]},
            images / 127.5 - 1,
        ),
    ):
        found = described(tmp_path, RESNET50, {**PROCESSOR, **change}).preprocessing
        np.testing.assert_allclose(found.normalize(images), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": {"height": 64, "width": 32}, "image_processor_type": "ViT"}, "images are square"),
        ({"size": {"longest_edge": 64}}, "size = .* has no counterpart"),
        ({"image_processor_type": "LevitImageProcessor"}, "'LevitImageProcessor' has no"),
        ({"do_resize": False}, "do_resize = False has no"),
        (
            {"image_processor_type": "CLIP", "do_center_crop": False},
            "do_center_crop = False has no",
        ),
        ({"resample": 9}, "resample = 9: must be from 0 to 5"),
        ({"rescale_factor": 0}, "rescale_factor = 0.0: must be a positive"),
        ({"image_std": [0, 0, 0]}, "std = .* positive"),
        ({"size": 10**9}, "size = 1000000000: must be from 1"),
    ],
)
def test_other_processors_are_refused(change, message, tmp_path):
    with pytest.raises(rj.WeightsError, match=rf"preprocessor_config\.json.*{message}"):
        described(tmp_path, RESNET50, {**PROCESSOR, **change})


def test_weights_of_either_kind_from_the_cache(tmp_path, monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    commit = "0123456789" * 4
    snapshot = tmp_path / "models--a--b" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (tmp_path / "models--a--b" / "refs").mkdir()
    (tmp_path / "models--a--b" / "refs" / "main").write_text(commit)
    (snapshot / "config.json").write_text(json.dumps(RESNET50))
    assert read_description(pretrained._folder("a/b", None)).class_names[0] == "kind 0"
    with pytest.raises(rj.WeightsError, match=r"model\.safetensors or pytorch_model\.bin"):
        rj.load_pretrained("a/b")
    for name in ("pytorch_model.bin", "model.safetensors"):
        (snapshot / name).touch()
        assert pretrained._weight_file(pretrained._folder("a/b", None)).name == name


def test_a_network_carries_its_name_and_classes(tmp_path):
    model = rj.create_model("resnet8_cifar", num_classes=2)
    variables = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)), train=False)
    rj.save_weights(tmp_path / "model.safetensors", model, variables)
    config = {"architecture": "resnet8_cifar", "num_classes": 2, "label_names": ["cat", "dog"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = rj.load_pretrained(tmp_path)
    assert (found.name, found.class_names, found.threshold) == (
        "resnet8_cifar",
        ("cat", "dog"),
        None,
    )
    unpacked, _, preprocessing = found
    assert (unpacked, preprocessing) == (found.model, found.preprocessing)
    # The names are not those of a new head.
    assert rj.load_pretrained(tmp_path, num_classes=3, reset_head=True).class_names == ()
    config |= {"problem_type": "multi_label_classification"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert rj.load_pretrained(tmp_path).threshold == 0.5


# Against the libraries themselves.


def photo():
    noise = np.random.default_rng(0).integers(0, 256, (9, 16, 3), np.uint8)
    return Image.fromarray(noise).resize((200, 100), Image.Resampling.BICUBIC)


def prepared(preprocessing):
    config = Data(
        eval_size=preprocessing.image_size,
        eval_resize=preprocessing.resize_size,
        eval_crop=preprocessing.crop_mode,
        interpolation=preprocessing.interpolation,
    )
    crop = crop_pixels(np.asarray(photo()), config)
    return np.asarray(preprocessing.normalize(crop[None])[0]).transpose(2, 0, 1)


@pytest.mark.parametrize("facts", [{}, {"crop_pct": 0.95}, {"crop_mode": "squash"}])
def test_crops_are_timms(facts, tmp_path):
    data = pytest.importorskip("timm.data", reason="compares with timm")
    facts = {**FACTS, "interpolation": "bicubic", **facts}
    transform = data.create_transform(**data.resolve_data_config(pretrained_cfg=facts))
    expected = transform(photo()).numpy()
    np.testing.assert_allclose(prepared(timm(tmp_path, facts).preprocessing), expected, atol=1e-5)


@pytest.mark.parametrize(("change", "side", "resized", "mode"), PROCESSORS)
def test_crops_are_transformers(change, side, resized, mode, tmp_path):
    transformers = pytest.importorskip("transformers", reason="compares with transformers")
    config = {**PROCESSOR, "image_processor_type": "ConvNextImageProcessor", **change}
    name = config.pop("image_processor_type") + "Pil"
    config.pop("feature_extractor_type")
    processor = getattr(transformers, name)(**config)
    expected = np.asarray(processor(photo(), return_tensors="np")["pixel_values"][0])
    found = prepared(described(tmp_path, RESNET50, {**PROCESSOR, **change}).preprocessing)
    np.testing.assert_allclose(found, expected, atol=1e-5)
