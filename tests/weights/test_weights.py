"""Naming schemes, weight files, and what is refused."""

import functools
import hashlib
import io
import json
import pickle
import struct
import tracemalloc
import zipfile

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import ml_dtypes
import msgpack
import numpy as np
import pytest
import safetensors.numpy

import resnet_jax as rj
from resnet_jax.weights.convert import fit_variables, variable_shapes
from resnet_jax.weights.files import read_state_dict
from resnet_jax.weights.naming import schemes_for
from tests.variables import random_variables

SUFFIXES = [".safetensors", ".npz", ".pth"]


@functools.cache
def network(name="resnet20", **fields):
    """(model, variables) with every leaf different from its initial value."""
    model = rj.create_model(name, **fields)
    side = rj.model_info(name).image_size
    shapes = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros((1, side, side, 3)), train=False)
    )
    generator = np.random.default_rng(0)
    fill = lambda leaf: generator.normal(size=leaf.shape).astype(np.float32)  # noqa: E731
    return model, jax.tree.map(fill, shapes)


def renamed(model, state_dict, scheme_index):
    """A state dict with another scheme's names, in the order of to_torch."""
    first, other = (schemes_for(model)[index] for index in (0, scheme_index))
    paths = variable_shapes(model)
    names = {first.torch_name(path): other.torch_name(path) for path in paths}
    return {names[name]: array for name, array in state_dict.items()}


@pytest.mark.parametrize(
    "name",
    [
        *("resnet20", "resnetv2_50", "ecaresnet26t"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("resnet50d", "resnetrs50")),
    ],
)
def test_round_trip_is_exact(name):
    model, variables = network(name)
    again = rj.from_torch(model, rj.to_torch(model, variables))
    chex.assert_trees_all_equal(again, variables)


@pytest.mark.parametrize("scheme", range(4))
def test_every_scheme_is_recognised(scheme):
    model, variables = network("resnet18_cifar")
    state_dict = renamed(model, rj.to_torch(model, variables), scheme)
    chex.assert_trees_all_equal(rj.from_torch(model, state_dict), variables)


def test_names_of_the_schemes():
    model, variables = network("resnet18_cifar")
    state_dict = rj.to_torch(model, variables)
    expected = [
        ("bn1.weight", "layer2.0.downsample.1.running_var", "layer4.1.conv2.weight", "fc.bias"),
        ("bn1.weight", "layer2.0.shortcut.1.running_var", "layer4.1.conv2.weight", "linear.bias"),
        ("conv1.1.weight", "conv3.0.shortcut.1.running_var", "conv5.1.residual_function.3.weight"),
        ("conv3_x.0.shortcut.1.running_var", "conv5_x.1.residual_function.3.weight", "fc.bias"),
    ]
    for scheme, names in enumerate(expected):
        assert set(names) <= renamed(model, state_dict, scheme).keys()


def test_checkpoints_are_unwrapped():
    model, variables = network()
    state_dict = {f"module.{k}": v for k, v in rj.to_torch(model, variables).items()}
    state_dict["module.bn1.num_batches_tracked"] = np.int64(7)
    checkpoint = {"state_dict": state_dict, "best_prec1": 91.7, "epoch": 200}
    chex.assert_trees_all_equal(rj.from_torch(model, checkpoint), variables)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_precisions_load(dtype, tmp_path):
    model, variables = network()
    low = {name: array.astype(dtype) for name, array in rj.to_torch(model, variables).items()}
    loaded = rj.from_torch(model, low)
    chex.assert_trees_all_equal(
        loaded, jax.tree.map(lambda x: x.astype(dtype).astype("f4"), variables)
    )
    if dtype != ml_dtypes.bfloat16:  # safetensors writes bfloat16 through jax only
        safetensors.numpy.save_file(low, tmp_path / "low.safetensors")
        chex.assert_trees_all_equal(rj.load_weights(model, tmp_path / "low.safetensors"), loaded)


def test_bfloat16_file_loads(tmp_path):
    safetensors_flax = pytest.importorskip("safetensors.flax")
    model, variables = network()
    low = {k: jnp.asarray(v, jnp.bfloat16) for k, v in rj.to_torch(model, variables).items()}
    safetensors_flax.save_file(low, tmp_path / "low.safetensors")
    chex.assert_trees_all_equal(
        rj.load_weights(model, tmp_path / "low.safetensors"), rj.from_torch(model, low)
    )


def test_missing_unexpected_and_misshapen_names_in_one_error():
    model, variables = network()
    state_dict = rj.to_torch(model, variables)
    del state_dict["layer1.0.conv1.weight"], state_dict["bn1.bias"]
    state_dict["extra.weight"] = np.zeros(3, np.float32)
    state_dict["layer2.0.conv1.weight"] = np.zeros((1, 1, 3, 3), np.float32)
    with pytest.raises(rj.WeightsError) as caught:
        rj.from_torch(model, state_dict)
    message = str(caught.value)
    assert "2 missing: bn1.bias, layer1.0.conv1.weight" in message
    assert "1 unexpected: extra.weight" in message
    assert "1 of the wrong shape: layer2.0.conv1.weight (1, 1, 3, 3) for (32, 16, 3, 3)" in message
    assert "reset_head" not in message


def test_another_depth_is_named():
    _, variables = network()
    with pytest.raises(rj.WeightsError, match=r"its stages have \(3, 3, 3\) blocks.*\(5, 5, 5\)"):
        rj.from_torch(rj.ResNet32(), rj.to_torch(rj.ResNet20(), variables))


@pytest.mark.parametrize("prefix", ["module.", "model.", "_orig_mod.module."])
def test_prefixes_of_wrappers(prefix):
    model, variables = network()
    state_dict = {f"{prefix}{name}": x for name, x in rj.to_torch(model, variables).items()}
    chex.assert_trees_all_equal(rj.from_torch(model, state_dict), variables)


def test_what_is_no_state_dict():
    model, _ = network()
    for content in ({}, {"epoch": 1, "ema": {}}, {"epoch": 1, "args": {"layer1": "0.conv1"}}):
        with pytest.raises(rj.WeightsError, match=r"no state dict.*: (none|epoch, (ema|args))$"):
            rj.from_torch(model, content)
    with pytest.raises(rj.WeightsError, match=r"not a ResNet20Torch; pass network.state_dict()"):
        rj.from_torch(model, type("ResNet20Torch", (), {})())
    with pytest.raises(rj.WeightsError, match="the model is a str"):
        rj.load_weights("resnet20", "weights.npz")


def test_integers_are_refused():
    model, variables = network()
    state_dict = rj.to_torch(model, variables)
    for convert in (np.asarray, *_tensor()):
        damaged = {**state_dict, "conv1.weight": convert(np.zeros((16, 3, 3, 3), np.int8))}
        with pytest.raises(rj.WeightsError, match=r"conv1\.weight holds int8"):
            rj.from_torch(model, damaged)


def _tensor():
    try:
        import torch
    except ImportError:
        return []
    return [torch.from_numpy]


def test_another_head_only_when_asked_for():
    _, variables = network()
    state_dict = rj.to_torch(rj.ResNet20(), variables)
    model = rj.ResNet20(num_classes=37)
    with pytest.raises(rj.WeightsError, match=r"10 classes, the model's 37; pass reset_head=True"):
        rj.from_torch(model, state_dict)
    loaded = rj.from_torch(model, state_dict, reset_head=True)
    chex.assert_shape(loaded["params"]["head"]["kernel"], (64, 37))
    chex.assert_trees_all_equal(loaded["params"]["stage1"], variables["params"]["stage1"])


def test_a_backbone_takes_no_head():
    model, variables = network()
    expected = {**variables, "params": {**variables["params"]}}
    del expected["params"]["head"]
    for reset_head in (False, True):
        backbone = rj.ResNet20(num_classes=0)
        found = rj.from_torch(backbone, rj.to_torch(model, variables), reset_head=reset_head)
        chex.assert_trees_all_equal(found, expected)


def test_any_number_of_image_channels():
    model = rj.ResNet20()
    variables = model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 1)), train=False)
    chex.assert_trees_all_equal(rj.from_torch(model, rj.to_torch(model, variables)), variables)


def test_more_image_channels_than_any_image_has():
    """An array may be larger than memory where it repeats one number."""
    model, variables = network()
    huge = np.broadcast_to(np.float32(1), (16, 2**30, 3, 3))
    with pytest.raises(rj.WeightsError, match=r"conv1\.weight.*1073741824"):
        rj.from_torch(model, {**rj.to_torch(model, variables), "conv1.weight": huge})


def test_variables_of_another_model():
    _, variables = network()
    with pytest.raises(rj.WeightsError, match="not this model's"):
        rj.to_torch(rj.ResNet32(), variables)


def skip_without_torch(suffix):
    if suffix == ".pth":
        pytest.importorskip("torch", reason="PyTorch is not installed")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_file_round_trip(suffix, tmp_path):
    skip_without_torch(suffix)
    model, variables = network()
    path = tmp_path / f"weights{suffix}"
    rj.save_weights(path, model, variables)
    checksum = hashlib.sha256(path.read_bytes()).hexdigest()
    chex.assert_trees_all_equal(rj.load_weights(model, path, sha256=checksum), variables)
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(rj.WeightsError, match="has sha256"):
        rj.load_weights(model, path, sha256="0" * 64)
    with pytest.raises(rj.WeightsError, match="64 hexadecimal digits"):
        rj.load_weights(model, path, sha256=checksum[:8])


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_truncated_files(suffix, share, tmp_path):
    skip_without_torch(suffix)
    model, variables = network()
    path = tmp_path / f"weights{suffix}"
    rj.save_weights(path, model, variables)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(rj.WeightsError, match=r"weights\.\w+: .*not a valid"):
        rj.load_weights(model, path)


@pytest.mark.parametrize("suffix", [".npz", ".pth"])
def test_nothing_is_unpickled(suffix, tmp_path):
    skip_without_torch(suffix)
    path = tmp_path / f"weights{suffix}"
    if suffix == ".npz":
        np.savez(path, a=np.array([print], dtype=object))
    else:
        import torch

        torch.save({"a": print}, path)
    with pytest.raises(rj.WeightsError, match=r"objects|allow_pickle"):
        rj.load_weights(rj.ResNet20(), path)


def npz_of(header, data=b"", kind=zipfile.ZIP_STORED):
    """An archive with one array, whose header says what it likes."""
    text = repr({"descr": "<f4", "fortran_order": False, "shape": (2,), **header}).encode() + b"\n"
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", kind) as archive:
        member = b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text + data
        archive.writestr("../../a.npy", member)
    return file.getvalue()


def safetensors_of(shape, data=b""):
    header = {"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, len(data)]}}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("w.npz", npz_of({"shape": (2**45,)}), r"an array of 140,737,488,355,328 bytes"),
        ("w.npz", npz_of({"shape": (-1, -2)}, bytes(8)), "not a valid .npz"),
        ("w.npz", npz_of({"descr": "|V0"}), "not a valid .npz"),
        ("w.npz", npz_of({"descr": "|O"}), "objects, which are never unpickled"),
        ("w.npz", npz_of({}, bytes(2**27), zipfile.ZIP_DEFLATED), "would unpack to 134,"),
        ("w.npz", npz_of({}, bytes(8), zipfile.ZIP_LZMA), "compressed by an unsupported method"),
        ("w.safetensors", struct.pack("<Q", 2**63) + b"{}", "not a valid safetensors"),
        ("w.safetensors", safetensors_of([3], bytes(8)), "not a valid safetensors"),
        ("w.safetensors", safetensors_of([0, 2**63]), "a has no array's shape"),
        (
            "w.safetensors",
            struct.pack("<Q", 2**24 + 1) + bytes(2**24 + 1),
            "its header has 16,777,",
        ),
        ("w.npz", npz_of({}, bytes(8)) + b"PK\1\2" * 100_001, "has more than 100,000 members"),
    ],
)
def test_claims_take_no_memory(name, data, message, tmp_path):
    (tmp_path / name).write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(rj.WeightsError, match=rf"{name}: .*{message}"):
            rj.load_weights(rj.ResNet20(), tmp_path / name)
        assert tracemalloc.get_traced_memory()[1] < len(data) + 2_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("suffix", ["", ".pth", ".NPZ", ".weights", ".bin"])
def test_a_file_is_what_it_holds(suffix, tmp_path):
    model, variables = network()
    for written in (".safetensors", ".npz"):
        rj.save_weights(tmp_path / f"w{written}", model, variables)
        path = (tmp_path / f"w{written}").rename(tmp_path / f"w{suffix}")
        chex.assert_trees_all_equal(rj.load_weights(model, path), variables)


def test_suffixes_in_capitals_are_written(tmp_path):
    model, variables = network()
    rj.save_weights(tmp_path / "w.NPZ", model, variables)
    assert np.load(tmp_path / "w.NPZ")["fc.bias"].shape == (10,)


def test_the_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    model, variables = network()
    rj.save_weights("~/w.npz", model, variables)
    assert [each.name for each in tmp_path.iterdir()] == ["w.npz"]
    chex.assert_trees_all_equal(rj.load_weights(model, "~/w.npz"), variables)
    assert "fc.bias" in read_state_dict("~/w.npz")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "its content is none of PyTorch's"),
        (b"\4\0\0\0\1\0\0\0\3\0\0\0", r"a Lua Torch file \(.t7\)"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS's pointer to a file"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (pickle.dumps({"fc.bias": [1.0]}), "a Python pickle, not written by torch.save"),
        (bytes(257) + b"ustar\0", "a tar archive; if PyTorch before 0.1.10"),
        (b"PK\5\6" + bytes(18), "a zip archive that is damaged, or of neither"),
        (b"PK\3\4", "a zip archive that is damaged"),
        (b"\x81\xa1", "not a valid Flax msgpack file"),
    ],
)
def test_other_files_are_named(data, message, tmp_path):
    (tmp_path / "w").write_bytes(data)
    with pytest.raises(rj.WeightsError, match=f"w: {message}"):
        read_state_dict(tmp_path / "w")


def test_flax_msgpack(tmp_path):
    tree = {
        "params": {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.float32(3)},
        "batch_stats": {"m": np.ones(3, ml_dtypes.bfloat16), "e": np.zeros((0, 3))},
        "step": 300,
        "more": {"list": {"0": -1, "1": 1.5}, "text": "x" * 40, "none": None, "true": True},
    }
    (tmp_path / "w").write_bytes(flax.serialization.msgpack_serialize(tree))
    found = read_state_dict(tmp_path / "w")
    chex.assert_trees_all_equal(found, tree)
    assert found["batch_stats"]["m"].dtype == ml_dtypes.bfloat16
    assert found["batch_stats"]["e"].shape == (0, 3)


def test_own_variables_as_msgpack(tmp_path):
    model, variables = network()
    (tmp_path / "w.msgpack").write_bytes(flax.serialization.to_bytes(variables))
    chex.assert_trees_all_equal(rj.load_weights(model, tmp_path / "w.msgpack"), variables)


def flax_array(shape, dtype, numbers):
    content = msgpack.packb((shape, dtype, numbers))
    return msgpack.packb({"a": msgpack.ExtType(1, content)})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x81\xa1a\xdd\x7f\xff\xff\xff", "not a valid"),  # a list of 2**31 elements
        (b"\x81\xa1a\xc6\x7f\xff\xff\xff", "not a valid"),
        (b"\xdf\x7f\xff\xff\xff", "not a valid"),
        (b"\x81\xa1a" + b"\x91" * 999 + b"\1", "more objects, or deeper ones"),
        (b"\x81\xa1a\xdd\0\x1e\x84\x80" + b"\1" * 2_000_000, "more objects, or deeper ones"),
        (b"\x81\1\1", "a int is not a name"),
        (b"\x81\xa1a\1\1", "it has trailing bytes"),
        (b"\x81\xa1a\xc1", "byte 0xc1 starts no value"),
        (flax_array([2**40], "float32", b"1234"), r"of shape \[1099511627776\] has 4 bytes"),
        (flax_array([-1], "float32", b"1234"), "has no shape"),
        (flax_array([0, 2**63], "float32", b""), "no array's shape|has 0 bytes"),
        (flax_array([1], "O", b"12345678"), "type 'O', not numbers"),
        (flax_array([1], "V4", b"1234"), "type 'V4', not numbers"),
        (flax_array([1], "f4,f4", b"12345678"), "type 'f4,f4', not numbers"),
        (flax_array([1], "x" * 999, b"1234"), "type 'x{80}', which NumPy does not know"),
    ],
)
def test_hostile_msgpack(data, message, tmp_path):
    (tmp_path / "w.msgpack").write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(rj.WeightsError, match=rf"w.msgpack: .*({message})"):
            read_state_dict(tmp_path / "w.msgpack")
        assert tracemalloc.get_traced_memory()[1] < 2 * len(data) + 20_000_000
    finally:
        tracemalloc.stop()


def test_names_with_folders_are_names(tmp_path):
    (tmp_path / "w.npz").write_bytes(npz_of({}, bytes(8)))
    assert list(read_state_dict(tmp_path / "w.npz")) == ["../../a"]
    assert [path.name for path in tmp_path.rglob("*")] == ["w.npz"]


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_that_is_there_twice(tmp_path):
    with zipfile.ZipFile(tmp_path / "w.npz", "w") as archive:
        for value in (0, 1):
            file = io.BytesIO()
            np.save(file, np.full(2, value, np.float32))
            archive.writestr("fc.bias.npy", file.getvalue())
    with pytest.raises(rj.WeightsError, match=r"holds fc\.bias twice"):
        read_state_dict(tmp_path / "w.npz")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conv1.weight": np.zeros((16, 0, 3, 3), np.float32)}, "of the wrong shape: conv1.weight"),
        ({"conv1.weight": np.zeros((16, 2**40, 0, 3), np.float32)}, "wrong shape: conv1.weight"),
        ({"conv1.weight": 3.0}, "of the wrong shape: conv1.weight"),
        ({"fc.bias": [[1], [2, 3]]}, "fc.bias is not an array"),
        ({5: np.zeros(3)}, "some of its keys are not names"),
        ({"fc.bias": [1.0] * 10}, "fc.bias is not an array but a list"),
        ({"x" * 10**6: np.zeros(3, np.float32)}, r"unexpected: x{80}\.\.\.$"),
        (
            {f"x.{n}": np.zeros(1, np.float32) for n in range(10**4)},
            r"10000 unexpected: x \(10000\); such as x.0, x.1, x.10$",
        ),
    ],
)
def test_state_dicts_of_strangers(change, message):
    state_dict = {**rj.to_torch(*network()), **change}
    with pytest.raises(rj.WeightsError, match=message) as caught:
        rj.from_torch(rj.ResNet20(), state_dict)
    assert len(str(caught.value)) < 1000


def test_memory_is_taken_for_what_fits_only():
    """A tensor may say that it is larger than the numbers it has."""
    ones = np.broadcast_to(np.float32(1), (2**20, 2**16))
    with pytest.raises(rj.WeightsError, match=r"fc.weight \(1048576, 65536\) for \(10, 64\)"):
        rj.from_torch(rj.ResNet20(), {**rj.to_torch(*network()), "fc.weight": ones})


def test_wrappers_end():
    state_dict = rj.to_torch(*network())
    for _ in range(5000):
        state_dict = {"model": state_dict}
    with pytest.raises(rj.WeightsError, match="more than 8"):
        rj.from_torch(rj.ResNet20(), state_dict)
    state_dict = {f"{'a.' * 5000}{name}": x for name, x in rj.to_torch(*network()).items()}
    with pytest.raises(rj.WeightsError, match="more than 8"):
        rj.from_torch(rj.ResNet20(), state_dict)


def test_any_number_of_bands():
    bands = np.ones((16, 7, 3, 3), np.float32)
    found = rj.from_torch(rj.ResNet20(), {**rj.to_torch(*network()), "conv1.weight": bands})
    chex.assert_shape(found["params"]["stem"]["conv1"]["kernel"], (3, 3, 7, 16))


def test_files_that_are_not_there(tmp_path):
    model, variables = network()
    with pytest.raises(rj.WeightsError, match=r"cannot read .*No such file"):
        rj.load_weights(model, tmp_path / "none.safetensors")
    with pytest.raises(rj.WeightsError, match=r"must end in one of \.safetensors"):
        rj.save_weights(tmp_path / "weights.h5", model, variables)
    with pytest.raises(rj.WeightsError, match="cannot write"):
        rj.save_weights(tmp_path / "none" / "weights.npz", model, variables)


CONFIG = {
    "architecture": "resnet20",
    "num_classes": 10,
    "pretrained_cfg": {
        "input_size": [3, 32, 32],
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": [0.5, 0.5, 0.5],
        "std": [0.25, 0.25, 0.25],
    },
}


def make_repository(folder, config=CONFIG):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    rj.save_weights(folder / "model.safetensors", *network())
    return folder


def check_pretrained(pretrained):
    model, variables, preprocessing = pretrained
    assert model == rj.ResNet20()
    chex.assert_trees_all_equal(variables, network()[1])
    assert preprocessing == rj.Preprocessing(32, 0.9, "bicubic", (0.5,) * 3, (0.25,) * 3)


def test_pretrained_from_a_folder(tmp_path):
    folder = make_repository(tmp_path / "net")
    check_pretrained(rj.load_pretrained(folder))
    model, variables, _ = rj.load_pretrained(folder, num_classes=3, reset_head=True)
    chex.assert_shape(variables["params"]["head"]["kernel"], (64, 3))
    assert model.num_classes == 3


def test_pretrained_from_the_cache(tmp_path, monkeypatch):
    """Offline, the Hub's cache is used; what is not in it is said to be so."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    commit = "0123456789" * 4
    repository = tmp_path / "models--timm--tiny"
    make_repository(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    check_pretrained(rj.load_pretrained("timm/tiny"))
    check_pretrained(rj.load_pretrained("timm/tiny", revision=commit))
    with pytest.raises(
        rj.WeightsError, match=r"^timm/other: .*folder, and the Hub cannot be reached"
    ):
        rj.load_pretrained("timm/other")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "vit_base"}, "unknown model 'vit_base'"),
        ({"architecture": "resnetv2_18"}, "first norm and ReLU"),
        ({"model_args": {"aa_layer": "blur"}}, "model_args.aa_layer = 'blur'"),
        ({"pretrained_cfg": {"input_size": "large"}}, "not a configuration"),
        ({"num_classes": 11}, "reset_head=True"),
        ({"architecture": "../resnet20"}, "unknown model"),
        ({"architecture": ["resnet20"]}, "not a configuration"),
        ({"num_classes": float("inf")}, "not a configuration"),
        ({"model_args": {"drop_rate": "x"}}, "not a configuration"),
        ({"pretrained_cfg": {"crop_pct": 0}}, "crop_pct = 0.0: must be a share"),
        ({"pretrained_cfg": {"input_size": [3, 10**9, 10**9]}}, "input_size = 1000000000: must be"),
        ({"pretrained_cfg": {"mean": [0.5, 0.5]}}, "mean = .* must be 1 or 3"),
        ({"pretrained_cfg": {"std": [0, 0, 0]}}, "std = .* positive"),
        ({"pretrained_cfg": {"std": [5e-324] * 3}}, "std = .* positive"),
        ({"pretrained_cfg": {"mean": "555"}}, "mean = 555: must be a list of numbers"),
        ({"pretrained_cfg": {"crop_pct": 5e-324}}, "resized to inf pixels, where 8,192"),
        ({"pretrained_cfg": {"crop_pct": True}}, "crop_pct = True: must be a number"),
        ({"pretrained_cfg": {"input_size": [0, 32, 32]}}, "input_size = 0: must be from 1 to 1,02"),
        ({"pretrained_cfg": {"input_size": [3, 32.5, 32]}}, "input_size = 32.5: must be a whole"),
        ({"pretrained_cfg": {"label_names": "0123456789"}}, "label_names: must be a list of names"),
        ({"num_classes": 10**9}, "num_classes = 1000000000: must be from 0 to 10,000,000"),
        ({"num_classes": 10.5}, "num_classes = 10.5: must be a whole number"),
        ({"model_args": {"output_stride": 8.5}}, "output_stride = 8.5: must be a whole number"),
    ],
)
def test_other_repositories_are_refused(change, message, tmp_path):
    folder = make_repository(tmp_path / "net", {**CONFIG, **change})
    with pytest.raises(rj.WeightsError, match=message):
        rj.load_pretrained(folder)


def test_tensors_that_nobody_wants_may_have_any_type(tmp_path):
    model, variables = network()
    tensors = rj.to_torch(model, variables)
    tensors |= {"queue_ptr": np.zeros(1, np.uint8), "mask": np.ones(3, bool)}
    safetensors.numpy.save_file(tensors, tmp_path / "w.safetensors")
    chex.assert_trees_all_equal(rj.load_weights(model, tmp_path / "w.safetensors"), variables)


def test_another_familys_weights_are_called_so():
    tensors = {"cls_token": np.zeros((1, 1, 8), "f4"), "blocks.0.norm1.weight": np.ones(8, "f4")}
    with pytest.raises(rj.WeightsError, match=r"but a vision transformer's \(cls_token\)"):
        rj.from_torch(rj.ResNet20(), tensors)


def test_a_file_is_no_repository(tmp_path):
    (tmp_path / "w.pth").write_bytes(b"PK")
    with pytest.raises(rj.WeightsError, match="is a file, not a folder: read it with"):
        rj.load_pretrained(tmp_path / "w.pth")


def test_a_network_without_a_head_takes_the_variables_of_one_with_a_head():
    variables = random_variables(rj.ResNet8Cifar(num_classes=3), (8, 8, 3))
    fitted = fit_variables(rj.ResNet8Cifar(num_classes=0), variables)
    assert "head" not in fitted["params"]
    chex.assert_trees_all_equal(fitted["params"]["stem"], variables["params"]["stem"])
    with pytest.raises(rj.WeightsError, match="head"):
        fit_variables(rj.ResNet8Cifar(num_classes=4), variables)
