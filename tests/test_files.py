"""Files of strangers are read up to a limit; files of ours appear whole and replace no more."""

import errno
import os
import subprocess
import sys
import time

import pytest

from resnet_jax import files


def message(call, *arguments):
    with pytest.raises(OSError, match=r".") as caught:
        call(*arguments)
    return caught.value.strerror


def test_only_regular_files_are_read(tmp_path):
    (tmp_path / "file").write_bytes(b"12345")
    (tmp_path / "link").symlink_to("file")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    assert files.read_bytes(tmp_path / "link", 5) == b"12345"
    assert message(files.read_bytes, tmp_path / "file", 4) == "5 bytes, more than the limit of 4"
    assert message(files.read_bytes, tmp_path / "fifo", 9) == "not a regular file"
    assert message(files.read_bytes, "/dev/zero", 9) == "not a regular file"
    assert message(files.read_bytes, tmp_path, 9) == os.strerror(errno.EISDIR)
    assert message(files.read_bytes, tmp_path / "loop", 9) == os.strerror(errno.ELOOP)


def test_what_is_read_is_bounded_also_where_the_size_lies():
    """Files of /proc have no size; one that grows had another. It is read as it was."""
    assert files.read_bytes("/proc/self/status", 4) == b""


def test_a_link_is_replaced_and_not_followed(tmp_path):
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "out").symlink_to("victim")
    files.atomic_write(tmp_path / "out", "new")
    assert (tmp_path / "victim").read_text() == "mine"
    assert (tmp_path / "out").read_text() == "new"
    assert not (tmp_path / "out").is_symlink()
    assert oct((tmp_path / "out").stat().st_mode & 0o777) == oct(0o666 & ~_umask())


def _umask():
    now = os.umask(0)
    os.umask(now)
    return now


def test_what_is_no_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    assert "not replaced" in message(files.atomic_write, tmp_path / "fifo", "x")
    assert message(files.atomic_write, tmp_path / "folder", "x") == os.strerror(errno.EISDIR)
    assert sorted(os.listdir(tmp_path)) == ["fifo", "folder"]


def half_a_file(folder):
    with files.new_file(folder / "out") as file:
        file.write(b"half")
        raise KeyError


def half_a_folder(folder):
    with files.new_folder(folder) as new:
        (new / "half").touch()
        raise KeyError


def test_a_failed_block_leaves_the_old_file(tmp_path):
    (tmp_path / "out").write_text("old")
    for half in (half_a_file, half_a_folder):
        with pytest.raises(KeyError):
            half(tmp_path)
    assert os.listdir(tmp_path) == ["out"]
    assert (tmp_path / "out").read_text() == "old"


KILLED = """
import os, signal, sys
from resnet_jax import files
with files.new_file(sys.argv[1] + "/out") as file, files.new_folder(sys.argv[1]) as folder:
    (folder / "part").write_text("x")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path):
    subprocess.run([sys.executable, "-c", KILLED, tmp_path])
    left = os.listdir(tmp_path)
    assert len(left) == 2
    old = time.time() - 100
    for name in left:
        os.utime(tmp_path / name, (old, old))
    own = tmp_path / ".resnet_jax.thesis.partial"
    own.write_text("not what new_file makes")
    os.utime(own, (old, old))
    with files.new_file(tmp_path / "other"):  # is being written, so it is locked
        [writing] = {*os.listdir(tmp_path)} - {own.name}
        os.utime(tmp_path / writing, (old, old))
        files.remove_leftovers(tmp_path)
        assert {*os.listdir(tmp_path)} == {writing, own.name}
    assert {*os.listdir(tmp_path)} == {"other", own.name}


def test_nothing_is_appended_to_a_link_or_a_pipe(tmp_path):
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "log").symlink_to("victim")
    os.mkfifo(tmp_path / "fifo")
    assert "symbolic link" in message(files.open_to_append, tmp_path / "log")
    assert message(files.open_to_append, tmp_path / "fifo") == "not a regular file"
    (tmp_path / "folder").symlink_to(tmp_path)
    assert "symbolic link" in message(files.make_folder, tmp_path / "folder")


@pytest.mark.parametrize("content", [b"\xff", b"[" * 100_000, b"{", b"1" * 5000])
def test_json_that_is_none(content, tmp_path):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"."):
        files.read_json(tmp_path / "x.json")


def test_a_name_that_is_taken_is_kept_on_demand(tmp_path):
    (tmp_path / "key").write_text("first")
    with pytest.raises(FileExistsError):
        files.atomic_write(tmp_path / "key", "second", replace=False)
    files.atomic_write(tmp_path / "other", "second", mode=0o600, replace=False)
    assert (tmp_path / "key").read_text() == "first"
    assert (tmp_path / "other").stat().st_mode & 0o777 == 0o600
    assert sorted(os.listdir(tmp_path)) == ["key", "other"]


@pytest.mark.parametrize("durable", [True, False])
def test_only_durable_files_wait_for_the_disk(durable, tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", synced.append)
    files.atomic_write(tmp_path / "out", "text", durable=durable)
    assert bool(synced) == durable
    assert (tmp_path / "out").read_text() == "text"
