"""Weight files and folders in the Hub's form; PyTorch's are in tests/weights/test_torch.py."""

import json
import os

import numpy as np
from safetensors.numpy import save

import resnet_jax as rj
from resnet_jax.weights.convert import variable_shapes
from tests.hostile.corpus import case


def tiny():
    """A state dict that fits the corpus's network."""
    model = rj.create_model("tiny")
    shapes = variable_shapes(model)
    variables = {}
    for (collection, *modules, leaf), shape in shapes.items():
        part = variables.setdefault(collection, {})
        for module in modules:
            part = part.setdefault(module, {})
        part[leaf] = np.ones(shape, np.float32)
    return rj.to_torch(model, variables)


def weight_file(name):
    """Adds a weight file, which the function that is decorated makes at a path."""

    def add(make):
        def at_its_place(places):
            make(places.here / name)

        at_its_place.__name__ = make.__name__
        case(f"predict {{here}}/{name} {{image}} --model=tiny")(at_its_place)
        return make

    return add


@weight_file("w.safetensors")
def weights_are_a_fifo(path):
    os.mkfifo(path)


@weight_file("w.npz")
def weights_never_end(path):
    path.symlink_to("/dev/zero")


@weight_file("w.safetensors")
def weights_are_a_hole(path):
    with path.open("wb") as file:
        file.truncate(100 * 2**30)


@weight_file("w.npz")
def weights_have_thousands_of_names(path):
    arrays = {f"x.{number}": np.zeros(0, np.float32) for number in range(3000)}
    np.savez(path, **arrays)


@weight_file("w.safetensors")
def weights_have_a_name_of_a_megabyte(path):
    path.write_bytes(save({**tiny(), f"x.{'y' * 10**6}\x1b[2J": np.ones(1, np.float32)}))


@weight_file("w.msgpack")
def weights_claim_a_billion_elements(path):
    path.write_bytes(b"\x81\xa1a\xdd\x7f\xff\xff\xff")


@weight_file("w.msgpack")
def weights_are_dictionaries_without_end(path):
    path.write_bytes(b"\x81\xa1a" * 10**6)


@weight_file("w.msgpack")
def weights_claim_a_huge_array(path):
    array = b"\x93\x91\xcf" + (2**40).to_bytes(8, "big") + b"\xa7float32\xc4\x00"
    path.write_bytes(b"\x81\xa1a\xc7" + bytes([len(array), 1]) + array)


@weight_file("w.h5")
def weights_are_a_damaged_hdf5(path):
    path.write_bytes(b"\x89HDF\r\n\x1a\n" + b"\xff" * 1000)


@weight_file("w.t7")
def weights_are_of_lua(path):
    path.write_bytes(b"\4\0\0\0\1\0\0\0\x1b[2J")


@weight_file("w.ckpt")
def weights_are_a_pickle(path):
    path.write_bytes(b"\x80\4cos\nsystem\n(S'touch owned'\ntR.")


@weight_file("w.npz")
def weights_are_of_thousands_of_networks(path):
    arrays = {f"{n}.layer1.0.conv1.weight": np.zeros(0, np.float32) for n in range(3000)}
    np.savez(path, **arrays)


PUBLISHED = {"architecture": "tiny", "num_classes": 10, "input_size": [3, 8, 8]}


def hub(**changes):
    """Makes a folder in the Hub's form, whose config.json is changed."""

    def make(places):
        folder = places.here / "hub"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({**PUBLISHED, **changes}))
        (folder / "model.safetensors").write_bytes(save(tiny()))
        return folder

    return make


OPEN = ("predict {here}/hub {image}",)
_CONFIGURATIONS = {
    "crop_of_nothing": {"crop_pct": 5e-324},
    "no_channels": {"input_size": [0, 8, 8]},
    "a_million_channels": {"input_size": [10**6, 8, 8]},
    "half_a_class": {"num_classes": 10.5},
    "names_that_are_none": {"label_names": dict.fromkeys(map(str, range(10)))},
    "a_deviation_of_nothing": {"std": [5e-324] * 3},
    "a_mean_of_letters": {"mean": "555"},
    "a_name_of_a_megabyte": {"architecture": "x" * 10**6},
    "an_argument_of_a_megabyte": {"model_args": {"x": "y" * 10**6}},
    "millions_of_blocks": {"architecture": "resnet18", "model_args": {"layers": [999] * 999}},
}
for _name, _changes in _CONFIGURATIONS.items():
    _make = hub(**_changes)
    _make.__name__ = f"hub_has_{_name}"
    case(*OPEN)(_make)


@case(*OPEN)
def hub_configuration_is_a_fifo(places):
    folder = hub()(places)
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")


@case(*OPEN)
def hub_of_transformers_has_stages_of_nothing(places):
    config = {"model_type": "resnet", "depths": [1, 1], "hidden_sizes": [[], {}]}
    (hub()(places) / "config.json").write_text(json.dumps(config))


@case(*OPEN)
def hub_of_transformers_has_a_processor_of_nothing(places):
    folder = hub()(places)
    (folder / "config.json").write_text(json.dumps({"model_type": "resnet"}))
    (folder / "preprocessor_config.json").write_text('{"size": {"shortest_edge": 1e999}}')


@case(*OPEN)
def hub_configuration_never_ends(places):
    folder = hub()(places)
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("/dev/zero")


@case(*OPEN)
def hub_weights_are_a_hole(places):
    with (hub()(places) / "model.safetensors").open("wb") as file:
        file.truncate(100 * 2**30)
