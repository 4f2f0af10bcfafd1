"""Every recipe against its source, number by number."""

import json
import pathlib

import pytest

from resnet_jax.config.flags import parse_train_flags
from resnet_jax.config.serialization import json_fields, to_flat
from resnet_jax.errors import ConfigError
from resnet_jax.training.optimizer import RunLength

ROOT = pathlib.Path(__file__).parents[1]

# Values as the sources state them; where ours is derived from theirs, the derivation stands here.
SOURCES = {
    # He et al. 2015 (arXiv:1512.03385v1), section 3.4.
    "imagenet_he2015": {
        "model.stride_in_1x1": True,  # table 1: conv3_1, conv4_1 and conv5_1 have a stride of 2
        "data.crop": "scale_jitter",
        "data.jitter_sides": (256, 480),
        "data.image_size": 224,
        "augment.flip": True,
        "augment.pca": 0.1,  # the color augmentation of Krizhevsky et al. 2012, section 4.1
        "optimizer.name": "sgd",
        "optimizer.learning_rate": 0.1,
        "optimizer.momentum": 0.9,
        "optimizer.nesterov": False,
        "optimizer.weight_decay": 1e-4,
        "optimizer.decay_norms_and_biases": True,
        "schedule.name": "plateau",
        "schedule.factor": 0.1,
        "train.batch_size": 256,
        "train.steps": 600_000,
    },
    # Goyal et al. 2017 (arXiv:1706.02677): sections 2.2, 5.1 and 5.3.
    "imagenet_goyal2017": {
        "model.zero_init_residual": True,
        "model.stride_in_1x1": False,
        "data.crop": "random_resized",
        "optimizer.learning_rate": 0.1,
        "optimizer.base_batch": 256,  # 0.1 times the batch size / 256
        "optimizer.momentum": 0.9,
        "optimizer.nesterov": True,
        "optimizer.weight_decay": 1e-4,
        "optimizer.decay_norms_and_biases": False,
        "schedule.name": "step",
        "schedule.factor": 0.1,
        "schedule.boundaries": (30 / 90, 60 / 90, 80 / 90),
        "schedule.warmup_epochs": 5.0,
        "schedule.warmup_start": 256 / 8192,  # from 0.1 to 3.2 at a batch of 8,192
        "train.epochs": 90.0,
    },
    # github.com/google/flax, examples/imagenet: configs/default.py, input_pipeline.py, train.py.
    "imagenet_flax": {
        "data.image_size": 224,
        "data.eval_resize": 256,  # CROP_PADDING = 32
        "data.interpolation": "bicubic",
        "optimizer.learning_rate": 0.1,
        "optimizer.base_batch": 256,
        "optimizer.momentum": 0.9,
        "optimizer.nesterov": True,
        "optimizer.weight_decay": 1e-4,
        "schedule.name": "cosine",
        "schedule.warmup_epochs": 5.0,
        "train.epochs": 100.0,
    },
    # github.com/pytorch/vision, references/classification/README.md ("new recipe") and train.py;
    # pytorch.org/blog/how-to-train-state-of-the-art-models-using-torchvision-latest-primitives.
    "imagenet_torchvision_v2": {
        "data.image_size": 176,  # --train-crop-size
        "data.eval_resize": 232,  # --val-resize-size
        "data.eval_size": 224,
        "data.repeats": 4,  # --ra-sampler --ra-reps
        "augment.trivial": True,  # --auto-augment ta_wide
        "augment.erase": 0.1,  # --random-erase
        "augment.mixup": 0.2,
        "augment.cutmix": 1.0,
        "optimizer.learning_rate": 0.5,
        "optimizer.momentum": 0.9,
        "optimizer.nesterov": False,
        "optimizer.weight_decay": 2e-5,
        "optimizer.decay_norms_and_biases": False,  # --norm-weight-decay 0.0
        "schedule.name": "cosine",
        "schedule.warmup_epochs": 5.0,
        "schedule.warmup_start": 0.01,  # --lr-warmup-decay
        "loss.label_smoothing": 0.1,
        "train.epochs": 600.0,
        "train.batch_size": 1024,  # 8 GPUs of 128
        # train.py: alpha = (1 - 0.99998) * 8 * 128 * 32 / 600 is what an update takes in.
        "train.ema_decay": 0.9989077333,
        "train.ema_every": 32,
    },
    # Wightman et al. 2021 (arXiv:2110.00476), table 2, and timm's arguments for it.
    "imagenet_timm:a1": {
        "model.stochastic_depth_rate": 0.05,
        "data.image_size": 224,
        "data.eval_resize": 235,  # timm: floor(224 / 0.95)
        "data.repeats": 3,
        "augment.rand_layers": 2,
        "augment.rand_magnitude": 7.0,
        "augment.rand_magnitude_std": 0.5,
        "augment.mixup": 0.2,
        "augment.cutmix": 1.0,
        "optimizer.name": "lamb",
        "optimizer.learning_rate": 5e-3,
        "optimizer.weight_decay": 0.01,
        "schedule.warmup_epochs": 5.0,
        "schedule.final": 2e-4,  # of 5e-3: 1e-6
        "loss.name": "bce",
        "loss.label_smoothing": 0.1,
        "train.epochs": 600.0,
        "train.batch_size": 2048,
    },
    "imagenet_timm:a2": {
        "model.stochastic_depth_rate": 0.05,
        "data.image_size": 224,
        "data.eval_resize": 235,
        "data.repeats": 3,
        "augment.rand_layers": 2,
        "augment.rand_magnitude": 7.0,
        "augment.mixup": 0.1,
        "augment.cutmix": 1.0,
        "optimizer.name": "lamb",
        "optimizer.learning_rate": 5e-3,
        "optimizer.weight_decay": 0.02,
        "schedule.warmup_epochs": 5.0,
        "schedule.final": 2e-4,  # of 5e-3: 1e-6
        "loss.name": "bce",
        "loss.label_smoothing": 0.0,
        "train.epochs": 300.0,
        "train.batch_size": 2048,
    },
    "imagenet_timm:a3": {
        "model.stochastic_depth_rate": 0.0,
        "data.image_size": 160,
        "data.eval_size": 224,
        "data.eval_resize": 235,
        "data.repeats": 1,
        "augment.rand_layers": 2,
        "augment.rand_magnitude": 6.0,
        "augment.mixup": 0.1,
        "augment.cutmix": 1.0,
        "optimizer.name": "lamb",
        "optimizer.learning_rate": 8e-3,
        "optimizer.weight_decay": 0.02,
        "schedule.warmup_epochs": 5.0,
        "schedule.final": 1.25e-4,  # of 8e-3: 1e-6
        "loss.name": "bce",
        "loss.label_smoothing": 0.0,
        "train.epochs": 100.0,
        "train.batch_size": 2048,
    },
    # He et al. 2015, section 4.2: a tenth of the rate at 32k and 48k of 64k iterations, chosen on a
    # split of 45k and 5k images.
    "cifar": {
        "data.train_split": "train[:90%]",
        "augment.flip": True,
        "augment.pad": 4,
        "optimizer.learning_rate": 0.1,
        "optimizer.momentum": 0.9,
        "optimizer.weight_decay": 1e-4,
        "optimizer.decay_norms_and_biases": True,
        "schedule.name": "step",
        "schedule.factor": 0.1,
        "schedule.boundaries": (32 / 64, 48 / 64),
        "train.batch_size": 128,
        "train.steps": 64_000,
    },
    # github.com/weiaicunzai/pytorch-cifar100: README.md ("Training Details") and train.py.
    "wide_cifar100": {
        "augment.flip": True,
        "augment.pad": 4,
        "augment.rotate": 15.0,
        "optimizer.learning_rate": 0.1,
        "optimizer.momentum": 0.9,
        "optimizer.weight_decay": 5e-4,
        "optimizer.decay_norms_and_biases": True,
        "schedule.name": "step",
        "schedule.factor": 0.2,
        "schedule.boundaries": (60 / 200, 120 / 200, 160 / 200),
        "schedule.warmup_epochs": 1.0,
        "train.epochs": 200.0,
        "train.batch_size": 128,
    },
}


# Every recipe under its first name, as it was before recipes were merged: a run goes on with it.
GOLDEN = json.loads(pathlib.Path(__file__).with_name("recipes.json").read_text())


@pytest.mark.parametrize("name", SOURCES)
def test_a_recipe_is_its_source(name):
    config, _ = parse_train_flags([f"--config={name}"])
    found = to_flat(config)
    found["train.ema_decay"] = round(found["train.ema_decay"], 10)  # is computed
    assert {field: found[field] for field in SOURCES[name]} == SOURCES[name]


def test_the_warm_up_of_the_paper_s_deepest_network():
    """Section 4.2: 0.01 until the training error is below 80%, about 400 iterations."""
    config, _ = parse_train_flags([f"--config={ROOT}/configs/cifar.py:resnet110"])
    assert config.optimizer.learning_rate * config.schedule.warmup_start == pytest.approx(0.01)
    assert config.schedule.warmup_epochs * 45_000 / 128 == pytest.approx(400, rel=0.1)


@pytest.mark.parametrize("name", GOLDEN["recipes"])
@pytest.mark.parametrize("form", ["{}", "configs/{}.py", f"{ROOT}/configs/{{}}.py"])
def test_former_names_give_the_same_configuration(name, form, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe, colon, argument = name.partition(":")
    config, workdir = parse_train_flags([f"--config={form.format(recipe)}{colon}{argument}"])
    expected = {**GOLDEN["defaults"], **GOLDEN["recipes"][name]}
    assert str(workdir) == expected.pop("workdir")
    assert json_fields(config) == expected


@pytest.mark.parametrize(
    ("former", "now"),
    [
        ("cifar10", "cifar"),
        ("cifar10:plain20", "cifar:plain20"),
        ("cifar10:resnet110", "cifar:cifar10,resnet110"),
        ("cifar100", "cifar:cifar100"),
        ("cifar100:resnet56", "configs/cifar.py:cifar100,resnet56"),
        ("imagenet_timm_a1:resnet101", "imagenet_timm:a1,resnet101"),
        ("imagenet_timm_a2", "imagenet_timm.py:a2"),
        ("imagenet_timm_a3", "imagenet_timm"),
    ],
)
def test_a_former_name_is_a_choice_of_a_recipe(former, now):
    assert parse_train_flags([f"--config={former}"])[0] == parse_train_flags([f"--config={now}"])[0]


def test_a_file_of_one_s_own_comes_before_a_former_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cifar10.py").write_text(
        "from resnet_jax.config import Config, Train\n"
        "get_config = lambda: Config(train=Train(seed=7))\n"
    )
    assert parse_train_flags(["--config=cifar10.py"])[0].train.seed == 7
    assert parse_train_flags(["--config=cifar10"])[0].train.seed == 0


def test_a_procedure_that_does_not_exist():
    with pytest.raises(ConfigError, match=r"'resnet50' is not a procedure .* a1, a2 or a3"):
        parse_train_flags(["--config=imagenet_timm:resnet50"])


def test_few_images_are_seen_often_enough():
    """480 images, of which eight epochs in batches of 64 are 60 steps."""
    digits, _ = parse_train_flags(["--config=few_images"])
    photos, _ = parse_train_flags(["--config=few_images:folder:photos"])
    assert (photos.data.name, photos.data.image_size, photos.augment.flip) == (
        "folder:photos",
        32,
        True,
    )
    assert (digits.data.name, digits.data.image_size, digits.augment.flip) == ("digits", 16, False)
    for config in (digits, photos):
        assert RunLength.of(config, 480).steps >= 800
