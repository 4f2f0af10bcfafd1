"""Files of PyTorch: tensors of every kind are the right values or one line."""

import argparse
import codecs
import collections
import fractions
import functools
import io
import pathlib
import pickle
import tracemalloc
import zipfile

import numpy as np
import pytest

import resnet_jax as rj
from tests.variables import random_variables

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
CONV, HEAD = "layer1.0.conv1.weight", "fc.weight"


@functools.cache
def state_dict():
    model = rj.ResNet20()
    arrays = rj.to_torch(model, random_variables(model))
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def load(content, tmp_path):
    path = tmp_path / "w.pth"
    torch.save(content, path)
    return rj.load_weights(rj.ResNet20(), path)


def with_attributes(tensor):
    tensor = tensor.clone()
    tensor.detach = tensor.numpy = tensor.float = 5
    return tensor


@pytest.mark.parametrize(
    "change",
    [
        torch.Tensor.double,
        torch.Tensor.bfloat16,
        torch.Tensor.half,
        torch.nn.Parameter,
        with_attributes,
        lambda x: torch.complex(x * 0, -x).conj().imag,  # with the negative bit
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: torch.stack([x, x], -1)[..., 0],
        lambda x: x.to(torch.float8_e4m3fn),
    ],
)
def test_values_are_those_of_the_tensor(change, tmp_path):
    tensor = change(state_dict()[CONV])
    kernel = load({**state_dict(), CONV: tensor}, tmp_path)["params"]["stage1"]["block1"]["conv1"]
    expected = torch.Tensor.detach(tensor).resolve_neg().double().permute(2, 3, 1, 0)
    np.testing.assert_array_equal(kernel["kernel"], torch.Tensor.numpy(expected))


def quantized(x):
    return torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)


@pytest.mark.filterwarnings("ignore")  # PyTorch warns of what it may drop one day
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (torch.Tensor.to_sparse, r"is sparse \(torch.sparse_coo\)"),
        (torch.Tensor.to_sparse_csr, r"is sparse \(torch.sparse_csr\)"),
        (torch.Tensor.to_sparse_csc, r"is sparse \(torch.sparse_csc\)"),
        (lambda x: x.to_sparse_bsr((2, 2)), r"is sparse \(torch.sparse_bsr\)"),
        (lambda x: x.to("meta"), "meta device"),
        (lambda _: torch.empty((2**30, 2**20), device="meta"), "meta device"),
        (quantized, r"is quantized \(qint8\)"),
        (lambda x: torch.nested.nested_tensor([x[0], x[0, :3]]), "is a nested tensor"),
        (lambda x: x.to(torch.complex64).conj(), "holds complex64"),
        (lambda x: x > 0, "holds bool"),
        (lambda x: x.untyped_storage(), "is not an array but a"),
        (lambda _: [1.0], "is not an array but a list"),
        (lambda _: functools.reduce(lambda x, _: [x] * 99, range(9), []), "but a list"),
        (lambda _: torch.ones(1, 1).expand(2**24, 64), "its tensors would be 4,29"),
        (lambda _: torch.ones(64).as_strided((2**22, 64), (0, 1)), "its tensors would be 1,07"),
        (lambda _: torch.empty(2**40, 0), r"fc.weight \(1099511627776, 0\) for"),
        (lambda _: b"b" * 99, "holds bytes"),
    ],
)
def test_what_has_no_numbers_is_one_line(change, message, tmp_path):
    tracemalloc.start()
    try:
        with pytest.raises(rj.WeightsError, match=rf"w\.pth: .*{message}"):
            load({**state_dict(), HEAD: change(state_dict()[HEAD])}, tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 50_000_000
    finally:
        tracemalloc.stop()


def test_many_names_of_one_tensor(tmp_path):
    ones = torch.ones(2**18)
    names = {f"x.{number}": ones for number in range(200)}
    with pytest.raises(rj.WeightsError, match="its tensors would be 209,715,200 bytes"):
        load(names, tmp_path)
    averaged = {"state_dict": state_dict(), "ema": state_dict()}
    assert load(averaged, tmp_path)["params"]


class _Call:
    """Is called when it is unpickled."""

    def __init__(self, *reduced):
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


def archive(content, kind=zipfile.ZIP_STORED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", kind) as members:
        members.writestr("w/data.pkl", pickle.dumps(content, protocol=2))
        members.writestr("w/version", "3\n")
    return file.getvalue()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (archive({"a.b": _Call(bytearray, (2**31 - 1,))}), "holds bytes beside its tensors"),
        (archive({"a.b": _Call(codecs.encode, ("x" * 65, "latin1"))}), "holds bytes beside"),
        (archive({"a.b": _Call(codecs.encode, (b"x", "hex"))}), "holds bytes beside"),
        (archive({"a.b": _Call(codecs.encode, ("x", "utf-32"))}), "holds bytes beside"),
        (archive([codecs.encode, "x" * 999]), "holds bytes beside"),
        (archive({"a.b": _Call(np.dtype, ("V2000000000",))}), "no state dict among its keys"),
        (archive("x" * 2**24), "w/data.pkl has 16,7.* bytes, more than any weights need"),
        (
            archive({"a.b": 1}, zipfile.ZIP_DEFLATED),
            "w/data.pkl is compressed, which torch.save never does",
        ),
        (
            archive(_Call(collections.OrderedDict, (), {"items": 5, "get": 6, "keys": 7})),
            "no state dict among its keys: none",
        ),
    ],
    ids=["bytearray", "text", "doubled", "codec", "kept", "dtype", "long", "packed", "attributes"],
)
def test_pickles_that_no_state_dict_has(data, message, tmp_path):
    (tmp_path / "w.pth").write_bytes(data)
    with pytest.raises(rj.WeightsError, match=rf"w\.pth: {message}"):
        rj.load_weights(rj.ResNet20(), tmp_path / "w.pth")


def test_dictionaries_that_never_end(tmp_path):
    inside = dict(state_dict())
    inside["model"] = inside
    assert load(inside, tmp_path)["params"]
    deep = functools.reduce(lambda x, _: {"model": x}, range(300), state_dict())
    with pytest.raises(rj.WeightsError, match="below more than 8 dictionaries"):
        load(deep, tmp_path)


def test_checkpoints_of_training_scripts(tmp_path):
    """What timm's trainer, torchvision's script and others keep beside the tensors."""
    checkpoint = {
        "state_dict": state_dict(),
        "args": argparse.Namespace(lr=0.1, out=pathlib.Path("a/b"), sizes=(1, 2)),
        "metric": np.float64(93.1),
        "counts": [np.int64(3), np.float32(0.5), np.bool_(True)],
        "names": collections.Counter({"a": 1}),
        "shape": torch.Size([1, 2]),
        "curves": collections.defaultdict(list, {"loss": [0.5, 0.25]}),
        "hparams": {"path": pathlib.PurePosixPath("a"), "windows": pathlib.PureWindowsPath("b")},
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1}]},
    }
    expected = load(state_dict(), tmp_path)["params"]
    allowed = set(torch.serialization.get_safe_globals())
    for legacy in (False, True):
        path = tmp_path / "checkpoint"  # without a suffix
        torch.save(checkpoint, path, _use_new_zipfile_serialization=not legacy)
        found = rj.load_weights(rj.ResNet20(), path)["params"]
        np.testing.assert_array_equal(found["head"]["kernel"], expected["head"]["kernel"])
    assert set(torch.serialization.get_safe_globals()) == allowed


@pytest.mark.parametrize("suffix", [".th", ".PTH", ".bin", ".ckpt", ".pkl", ".t7", ".npz", ""])
def test_a_file_is_what_it_holds(suffix, tmp_path):
    torch.save(state_dict(), tmp_path / f"w{suffix}")
    assert rj.load_weights(rj.ResNet20(), tmp_path / f"w{suffix}")["params"]


@pytest.mark.parametrize("suffix", [".th", ".PTH", ".pt"])
def test_suffixes_that_are_written(suffix, tmp_path):
    model = rj.ResNet20()
    rj.save_weights(tmp_path / f"w{suffix}", model, random_variables(model))
    written = torch.load(tmp_path / f"w{suffix}").keys()
    assert written == rj.to_torch(model, random_variables(model)).keys()


def test_other_objects_are_not_unpickled(tmp_path):
    for value in (fractions.Fraction(1, 2), print, np.ones(99)):
        with pytest.raises(rj.WeightsError, match=r"Python objects other than tensors|holds bytes"):
            load({"state_dict": state_dict(), "x": value}, tmp_path)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_is_named(tmp_path):
    torch.jit.script(torch.nn.Linear(1, 1)).save(tmp_path / "w.pt")
    with pytest.raises(rj.WeightsError, match="a TorchScript archive; save the state dict"):
        rj.load_weights(rj.ResNet20(), tmp_path / "w.pt")
