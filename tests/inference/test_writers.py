"""Where outputs go: what is there and is no file of ours stays as it is."""

import os
import pathlib
import stat
import threading

import jax
import numpy as np
import pytest

import resnet_jax as rj
from resnet_jax.errors import ConfigError, ExportError, WeightsError
from resnet_jax.export.exporter import _staged
from resnet_jax.outputs import open_output

NULL = (1, 3)  # major and minor number of /dev/null


def write(path, force=False, stream=True):
    with open_output(path, force, stream=stream) as file:
        file.write(b"new")


@pytest.fixture
def device(tmp_path):
    """A null device of the test's own."""
    path = tmp_path / "null.npz"
    try:
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(*NULL))
        path.write_bytes(b"x")
    except OSError:
        pytest.skip("device nodes need root")
    return path


@pytest.mark.parametrize("force", [False, True])
def test_a_device_is_written_into(device, force):
    write(device, force)
    assert stat.S_ISCHR(device.stat().st_mode)
    link = device.with_name("link")
    link.symlink_to(device)
    write(link, force)
    assert link.is_symlink()


@pytest.mark.parametrize("force", [False, True])
def test_a_fifo_is_written_into(tmp_path, force):
    path = tmp_path / "fifo"
    os.mkfifo(path)
    read = []
    thread = threading.Thread(target=lambda: read.append(path.read_bytes()), daemon=True)
    thread.start()
    write(path, force)
    thread.join(10)
    assert read == [b"new"]
    assert stat.S_ISFIFO(path.stat().st_mode)
    assert os.listdir(tmp_path) == ["fifo"]


def test_a_format_that_goes_back_needs_a_file(device, tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path, kind in ((device, "a device"), (tmp_path / "fifo", "a FIFO")):
        for force in (False, True):
            with pytest.raises(ConfigError, match=f"is {kind}, which is not replaced") as caught:
                write(path, force, stream=False)
            assert "--force" not in str(caught.value)
    assert stat.S_ISCHR(device.stat().st_mode)


def test_disks_and_sockets_are_not_written(tmp_path):
    try:
        os.mknod(tmp_path / "disk", stat.S_IFBLK | 0o600, os.makedev(0, 0))  # of no driver
    except OSError:
        pytest.skip("device nodes need root")
    with pytest.raises(ConfigError, match="is a block device"):
        write(tmp_path / "disk", force=True)


def test_standard_output_by_its_name(tmp_path):
    """A link to what this process has open, such as /dev/stdout, is written into and stays."""
    with (tmp_path / "out").open("wb", buffering=0) as file:
        file.write(b"old ")
        path = pathlib.Path(f"/proc/self/fd/{file.fileno()}")
        for force in (False, True):
            write(path, force)
        with pytest.raises(ConfigError, match="is a link of the system, which is not replaced"):
            write(path, force=True, stream=False)
    assert (tmp_path / "out").read_bytes() == b"old newnew"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("target", ["there", "missing"])
def test_a_link_is_replaced_not_followed(target, tmp_path):
    (tmp_path / "there").write_text("mine")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / target)
    with pytest.raises(ConfigError, match="exists; give --force"):
        write(link)
    assert link.is_symlink()
    write(link, force=True)
    assert not link.is_symlink()
    assert link.read_bytes() == b"new"
    assert (tmp_path / "there").read_text() == "mine"
    assert not (tmp_path / "missing").exists()


def test_a_link_to_itself_is_said(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(ConfigError, match=r"cannot be written \(Too many levels"):
        write(tmp_path / "loop", force=True)


def test_other_errors_are_not_explained_as_the_output(tmp_path):
    with (
        pytest.raises(FileNotFoundError, match="weights"),
        open_output(tmp_path / "x", force=False),
    ):
        (tmp_path / "other" / "place" / "weights").open()
    assert os.listdir(tmp_path) == []


# Exports and weights.


def test_a_killed_export_does_not_block_the_next(tmp_path):
    """Not even where every process has the number 1."""
    for old in (f".hub.{os.getpid()}.partial", ".resnet_jax.0123456789abcdef.partial"):
        (tmp_path / old).mkdir()
        os.utime(tmp_path / old, (0, 0))
    with _staged(tmp_path / "hub", ["a"], True, False) as (stage, paths):
        (stage / "a").write_text("new")
    assert [path.read_text() for path in paths] == ["new"]
    assert not (tmp_path / ".resnet_jax.0123456789abcdef.partial").exists()  # cleared


def test_a_hub_folder_keeps_what_is_not_ours(tmp_path):
    folder, names = tmp_path / "hub", ["a", "b"]
    folder.mkdir()
    (tmp_path / "theirs").write_text("theirs")
    (folder / "mine").write_text("mine")
    (folder / "a").symlink_to(tmp_path / "theirs")
    with _staged(folder, names, True, True) as (stage, _):
        for name in names:
            (stage / name).write_text("new")
    assert sorted(os.listdir(folder)) == ["a", "b", "mine"]
    assert (folder / "a").read_text() == "new"
    assert (tmp_path / "theirs").read_text() == "theirs"
    (folder / "b").unlink()
    (folder / "b").mkdir()  # known before anything is replaced
    with pytest.raises(ExportError, match="b is a folder"), _staged(folder, names, True, True):
        pytest.fail("began")
    assert sorted(os.listdir(tmp_path)) == ["hub", "theirs"]


def test_an_export_replaces_no_fifo(tmp_path):
    os.mkfifo(tmp_path / "x")
    for force in (False, True):
        with pytest.raises(ExportError, match="is a FIFO") as caught:
            _staged(tmp_path / "x", ["x"], False, force).__enter__()
        assert "--force" not in str(caught.value)


def test_save_weights_replaces_files_only(tmp_path):
    model = rj.create_model("resnet8_cifar")
    variables = jax.eval_shape(
        lambda: model.init(jax.random.key(0), np.zeros((1, 8, 8, 3), np.float32), train=False)
    )
    variables = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), variables)
    (tmp_path / "theirs").write_text("theirs")
    (tmp_path / "w.npz").symlink_to(tmp_path / "theirs")
    (tmp_path / f".w.npz.{os.getpid()}.partial").symlink_to(tmp_path / "theirs")
    rj.save_weights(tmp_path / "w.npz", model, variables)
    assert not (tmp_path / "w.npz").is_symlink()
    assert (tmp_path / "theirs").read_text() == "theirs"
    os.mkfifo(tmp_path / "fifo.npz")
    with pytest.raises(WeightsError, match="not a regular file, and is not replaced"):
        rj.save_weights(tmp_path / "fifo.npz", model, variables)
