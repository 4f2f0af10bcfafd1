"""HDF5 files, as Keras writes them: plain arrays are read, whatever else is refused."""

import io
import tracemalloc
import zipfile

import numpy as np
import pytest

import resnet_jax as rj
from resnet_jax.weights.files import read_state_dict

h5py = pytest.importorskip("h5py", reason="h5py is not installed")
ONES = np.ones((2, 3), np.float32)


def hdf5(fill):
    file = io.BytesIO()
    with h5py.File(file, "w") as group:
        fill(group)
    return file.getvalue()


def keras(group):
    """As Keras 2 and 3 name things, with an optimizer's numbers."""
    group["model_weights/conv1_conv/conv1_conv/kernel:0"] = ONES
    group.create_dataset("layers/conv2d/vars/0", data=ONES * 2, chunks=(1, 3), compression="gzip")
    group["layers/names"] = "text"
    group["optimizer_weights/iteration:0"] = 3
    group["optimizer/vars/0"] = ONES
    group.attrs["layer_names"] = ["conv1_conv"]


@pytest.mark.parametrize("suffix", [".h5", ".weights.h5", "", ".pth"])
def test_names_are_paths(suffix, tmp_path):
    (tmp_path / f"w{suffix}").write_bytes(hdf5(keras))
    found = read_state_dict(tmp_path / f"w{suffix}")
    assert found.keys() == {"model_weights/conv1_conv/conv1_conv/kernel:0", "layers/conv2d/vars/0"}
    np.testing.assert_array_equal(found["layers/conv2d/vars/0"], ONES * 2)


def test_keras_archives(tmp_path):
    with zipfile.ZipFile(tmp_path / "w", "w") as archive:
        archive.writestr("config.json", "{}")
        archive.writestr("model.weights.h5", hdf5(keras))
    assert "layers/conv2d/vars/0" in read_state_dict(tmp_path / "w")


def external(group):
    group.create_dataset("a", (9,), "f4", external=[("/etc/passwd", 0, 36)])


def virtual(group):
    layout = h5py.VirtualLayout((2, 3), "f4")
    layout[:] = h5py.VirtualSource("/etc/passwd", "a", (2, 3))
    group.create_virtual_dataset("a", layout)


def link(group):
    group["a"] = h5py.ExternalLink("/etc/passwd", "b")


def soft(group):
    group["a"] = h5py.SoftLink("/b")


def claim(group):
    group.create_dataset("a", (2**20, 2**20), "f4", chunks=(1, 2**10))


def overflow(group):
    group.create_dataset("a", (2**32, 2**32), "f4", chunks=(1, 2**10))


def bomb(group):
    group.create_dataset("a", data=np.zeros(2**25, np.float32), chunks=True, compression="gzip")


def chunk(group):
    group.create_dataset("a", (1,), "f4", chunks=(2**28,), maxshape=(None,))


def many(group):
    for number in range(100):
        group.create_dataset(str(number), (2**20,), "f4")


def deep(group):
    group["/".join("a" * 99)] = ONES


def scale(group):
    group.create_dataset("a", data=ONES, chunks=(1, 3), scaleoffset=3)


@pytest.mark.parametrize(
    ("fill", "message"),
    [
        (external, "a has its values in another file"),
        (virtual, "a has its values in another file"),
        (link, "a is a link, maybe to another file"),
        (soft, "a is a link, maybe to another file"),
        (claim, "a would be 4,398,046,511,104 bytes"),
        (overflow, "a would be 73,786,976,294,838,206,464 bytes"),
        (bomb, "a would be 134,217,728 bytes"),
        (chunk, "a would be 1,073,741,824 bytes"),
        (many, "would be 4,194,304 bytes, more than the file has"),
        (deep, "more objects, or deeper ones"),
        (scale, "a is compressed by an unsupported method"),
    ],
)
def test_hostile_files(fill, message, tmp_path):
    (tmp_path / "w.h5").write_bytes(hdf5(fill))
    tracemalloc.start()
    try:
        with pytest.raises(rj.WeightsError, match=rf"w\.h5: .*{message}"):
            read_state_dict(tmp_path / "w.h5")
        assert tracemalloc.get_traced_memory()[1] < 100_000_000
    finally:
        tracemalloc.stop()


def test_loops_end(tmp_path):
    def loop(group):
        group["a/b"] = ONES
        group["a/c"] = group["/"]

    (tmp_path / "w.h5").write_bytes(hdf5(loop))
    assert list(read_state_dict(tmp_path / "w.h5")) == ["a/b"]


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_truncated_files(share, tmp_path):
    data = hdf5(keras)
    (tmp_path / "w.h5").write_bytes(data[: int(len(data) * share)])
    with pytest.raises(rj.WeightsError, match=r"w\.h5: not a valid HDF5 file"):
        read_state_dict(tmp_path / "w.h5")
