"""Small networks, folders and TFDS datasets for the tests of evaluation."""

import functools
import io

import jax
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

import resnet_jax as rj
from resnet_jax.data.sources.base import Source
from resnet_jax.weights.class_names import imagenet_ids, imagenet_names
from resnet_jax.weights.network import Network
from tests.variables import random_variables


def tiny_network(classes=4, channels=3, size=8, crop_fraction=0.8, names=None):
    """One block with random weights, whose predictions vary."""
    model = rj.ResNet(
        stage_sizes=(1,),
        stage_widths=(8,),
        block_cls=rj.BasicBlock,
        stem_cls=rj.CifarStem,
        num_classes=classes,
    )
    variables = random_variables(model, (8, 8, channels))
    return Network(
        source="net",
        name="tiny",
        model=model,
        variables=variables,
        preprocessing=rj.Preprocessing(size, crop_fraction, mean=(0.5,), std=(0.25,)),
        channels=channels,
        class_names=names or tuple(f"class{number}" for number in range(classes)),
    )


@functools.cache
def imagenet_network(crop_fraction=1.0):
    return tiny_network(1000, crop_fraction=crop_fraction, names=imagenet_names())


def photo(seed, height=10, width=10):
    """Noise with a colour cast."""
    rng = np.random.default_rng(seed)
    return (rng.integers(0, 256, (height, width, 3)) * rng.uniform(0, 1, 3)).astype(np.uint8)


def encoded(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_folder(root, sizes, classes=4, split="test"):
    """PNGs of given heights and widths, in turn of each class; returns their pixels and labels."""
    found = {}
    for number, (height, width) in enumerate(sizes):
        label = number % classes
        folder = root / split / f"class{label}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = photo(number, height, width)
        Image.fromarray(pixels).save(folder / f"{number:04}.png")
        found[label, number] = pixels
    return [(pixels, label) for (label, _), pixels in sorted(found.items())]


def logits(network, pixels):
    """Of one prepared image, without batches, devices or padding."""
    images = (np.float32(pixels)[None] / 255 - 0.5) / 0.25
    return np.asarray(_apply(network.model)(network.variables, images)[0], np.float64)


@functools.cache
def _apply(model):
    return jax.jit(functools.partial(model.apply, train=False))


def softmax(x):
    return np.exp(x - x.max()) / np.exp(x - x.max()).sum()


def prepare(folder, name, examples, several=False, config="", split="test"):
    """A prepared TFDS dataset with the features that TFDS's own builder of that name has."""
    label = tfds.features.ClassLabel(names=imagenet_ids())
    real = {"original_label": label, "real_label": tfds.features.Sequence(label)}
    kinds = real if several else {"label": label}
    features = {
        "image": tfds.features.Image(encoding_format="png"),
        "file_name": tfds.features.Text(),
        **kinds,
    }
    key = "real_label" if several else "label"

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=config)] if config else []

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(features),
                supervised_keys=("image", key),
            )

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples()}

        def _generate_examples(self):
            for number, (pixels, label) in enumerate(examples):
                facts = {"original_label": (label[:1] and label[0]) or 0} if several else {}
                image = encoded(pixels)
                yield number, {"image": image, "file_name": f"{number}", key: label, **facts}

    Builder.name = name
    options = {"config": config} if config else {}
    Builder(data_dir=str(folder), file_format="array_record", **options).download_and_prepare()


class SetsOfLabels(Source):
    """Images in memory with sets of labels; without `sets`, with one label each."""

    channels, image_shape, fingerprint, name, split = 3, None, "0" * 16, "sets", "test"

    def __init__(self, pixels, labels, class_names, sets=True):
        self.class_names = tuple(class_names)
        self.label_shape = (self.num_classes,) if sets else ()
        self._images = [encoded(each) for each in pixels]
        self._labels = [as_set(each, self.num_classes) if sets else int(each) for each in labels]

    def __len__(self):
        return len(self._images)

    def _read(self, position):
        return self._images[position], self._labels[position]

    def _name(self, position):
        return f"{self.split}[{position}]"


def as_set(labels, classes):
    found = np.zeros(classes, np.int32)
    found[np.asarray(labels, int)] = 1
    return found


def prepare_sets(folder, name, class_names, splits):
    """A prepared TFDS dataset of sets of labels; splits: name to pairs of pixels and labels."""
    label = tfds.features.ClassLabel(names=class_names)
    features = {
        "image": tfds.features.Image(encoding_format="png"),
        "labels": tfds.features.Sequence(label),
    }

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self,
                features=tfds.features.FeaturesDict(features),
                supervised_keys=("image", "labels"),
            )

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(found) for split, found in splits.items()}

        def _generate_examples(self, found):
            for number, (pixels, labels) in enumerate(found):
                yield number, {"image": encoded(pixels), "labels": labels}

    Builder.name = name
    Builder(data_dir=str(folder), file_format="array_record").download_and_prepare()
