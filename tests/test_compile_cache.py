"""Compiled programs on disk: found again, replaced where damaged, bounded, never a crash."""

import os
import pwd

import jax
import jax.numpy as jnp
import pytest
from jax._src import compilation_cache

from resnet_jax import compile_cache
from resnet_jax.cli import parser
from resnet_jax.compile_cache import FOLDER, ProgramStore, use_compile_cache
from resnet_jax.config.schema import Config, Log
from resnet_jax.training import loop

KEY = "jit_f-0123456789abcdef"
SETTINGS = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_enable_xla_caches",
)


def lines(caplog):
    return [record.getMessage() for record in caplog.records]


def only_file(folder):
    (path,) = folder.glob("*.xla")
    return path


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def make_folder(path):
    path.unlink()
    path.mkdir()


def make_unreadable(path):
    path.unlink()
    path.symlink_to(path)


def make_fifo(path):
    """Waits for a writer where it is opened to read."""
    path.unlink()
    os.mkfifo(path)


def make_device(path):
    path.unlink()
    path.symlink_to("/dev/zero")


DAMAGE = {
    "cut short": lambda path: os.truncate(path, path.stat().st_size - 1),
    "half its checksum": lambda path: os.truncate(path, 16),
    "empty": lambda path: os.truncate(path, 0),
    "a flipped bit": flip,
    "another kind of file": lambda path: path.write_bytes(b"\x78\x9c" + bytes(100)),
    "unreadable": make_unreadable,
    "a FIFO": make_fifo,
    "a device": make_device,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_what_is_damaged_is_told_once_and_replaced(damage, tmp_path, caplog):
    ProgramStore(tmp_path).put(KEY, b"program" * 100)
    place = only_file(tmp_path)
    damage(place)
    store = ProgramStore(tmp_path)
    assert store.get(KEY) is store.get(KEY) is None
    (line,) = lines(caplog)
    assert line.startswith(f"compile cache: {place} ")
    assert "\n" not in line
    if " is damaged" in line:  # and is removed, because a faster compilation is not written
        assert not [*tmp_path.iterdir()]
    store.put(KEY, b"program" * 100)
    assert ProgramStore(tmp_path).get(KEY) == b"program" * 100
    assert len(lines(caplog)) == 1


def test_a_folder_in_place_of_a_program(tmp_path, caplog):
    ProgramStore(tmp_path).put(KEY, b"program")
    make_folder(only_file(tmp_path))
    store = ProgramStore(tmp_path)
    assert store.get(KEY) is None
    store.put(KEY, b"program")
    assert len(lines(caplog)) == 1
    assert [path.name for path in tmp_path.iterdir()] == [only_file(tmp_path).name]


def test_a_full_disk(small_disk, caplog):
    store = ProgramStore(small_disk)
    store.put("jit_small-1", b"small")
    store.put("jit_large-2", bytes(1 << 20))
    store.put("jit_large-3", bytes(1 << 20))
    (line,) = lines(caplog)
    assert line.startswith(
        f"compile cache: {small_disk} cannot be written (No space left on device)"
    )
    assert store.get("jit_large-2") is None
    assert store.get("jit_small-1") == b"small"
    assert len([*small_disk.iterdir()]) == 1


@pytest.mark.parametrize("small_disk", ["512k,ro"], indirect=True)
def test_a_read_only_folder(small_disk, caplog):
    store = ProgramStore(small_disk)
    assert store.get(KEY) is None
    store.put(KEY, b"program")
    (line,) = lines(caplog)
    assert "cannot be written (Read-only file system)" in line


def test_a_file_in_place_of_the_folder(tmp_path, caplog):
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "folder"):
        store = ProgramStore(place)
        assert store.get(KEY) is None
        store.put(KEY, b"program")
    assert len(lines(caplog)) == 2


def test_the_least_recently_used_are_removed(tmp_path):
    store = ProgramStore(tmp_path, max_bytes=3 * 132)
    for age, name in enumerate("dcba"):
        store.put(f"jit_{name}-0", bytes(100))
        if age < 3:
            os.utime(store._file(f"jit_{name}-0"), (age, age))
    assert [bool(store.get(f"jit_{name}-0")) for name in "abcd"] == [True, True, True, False]
    os.utime(store._file("jit_b-0"), (5, 5))
    os.utime(store._file("jit_c-0"), (6, 6))
    store.get("jit_b-0")  # counts as use
    store.put("jit_e-0", bytes(100))
    assert store.get("jit_c-0") is None
    assert store.get("jit_b-0") == bytes(100)


def test_only_programs_are_removed(tmp_path):
    (tmp_path / "mine.txt").write_bytes(bytes(1000))
    (tmp_path / "jit_f-0123-cache").write_bytes(bytes(1000))  # one of JAX's own store
    (tmp_path / "model-1.xla").write_bytes(bytes(1000))  # a name that is not the store's
    store = ProgramStore(tmp_path, max_bytes=200)
    for name in "ab":
        store.put(f"jit_{name}-0", bytes(150))
    assert len([*tmp_path.iterdir()]) == 4


def test_another_kind_of_cpu_has_programs_of_its_own(tmp_path, monkeypatch):
    store = ProgramStore(tmp_path)
    store.put(KEY, b"program")
    monkeypatch.setattr(compile_cache, "_instructions", lambda: "flags: avx512f")
    assert store.get(KEY) is None


@pytest.fixture
def unset(monkeypatch):
    """JAX as in a process that has no cache yet."""
    before = {name: jax.config.values[name] for name in SETTINGS}
    monkeypatch.setattr(compilation_cache, "get_file_cache", compilation_cache.get_file_cache)
    compilation_cache.reset_cache()
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def compiled_twice(monkeypatch, change=lambda: None):
    """The result of a program, and that after it was forgotten; and how often the disk had it."""
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    events = []
    jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
    function = jax.jit(lambda x: jnp.tanh(x * 3) - 0.25)
    x = jnp.arange(7.0)
    try:
        first = function(x)
        change()
        jax.clear_caches()
        events.clear()
        second = function(x)
    finally:
        jax.monitoring.clear_event_listeners()
    assert (first == second).all()
    return events.count("/jax/compilation_cache/cache_hits")


def test_jax_uses_the_store(unset, tmp_path, monkeypatch, caplog):
    use_compile_cache(str(tmp_path / "made" / "here"))
    assert compiled_twice(monkeypatch) >= 1
    assert [*(tmp_path / "made" / "here").glob("jit*.xla")]
    assert not lines(caplog)


@pytest.mark.parametrize("damage", [*DAMAGE.values(), make_folder], ids=[*DAMAGE, "a folder"])
def test_damage_costs_a_compilation_and_a_line(damage, unset, tmp_path, monkeypatch, caplog):
    """Warnings of JAX's would be errors here."""
    use_compile_cache(str(tmp_path))

    def damage_all():
        for path in tmp_path.glob("*.xla"):
            damage(path)

    assert compiled_twice(monkeypatch, damage_all) == 0
    assert len(lines(caplog)) == 1


def test_a_folder_that_cannot_be_made_costs_a_line(unset, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    use_compile_cache(str(tmp_path / "file"))
    assert compiled_twice(monkeypatch) == 0
    assert len(lines(caplog)) == 1


def test_without_a_home_nothing_is_kept(unset, monkeypatch, caplog):
    def unknown(user):
        raise KeyError(user)

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    use_compile_cache()
    assert jax.config.values["jax_compilation_cache_dir"] is None
    (line,) = lines(caplog)
    assert line.startswith(f"compile cache: {FOLDER}: ")


def test_a_folder_that_jax_was_given_is_left(unset, tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "theirs"))
    use_compile_cache(str(tmp_path / "ours"))
    assert jax.config.values["jax_compilation_cache_dir"] == str(tmp_path / "theirs")
    own, _ = compilation_cache.get_file_cache(str(tmp_path / "theirs"))
    assert not isinstance(own, ProgramStore)


class _UsedError(Exception):
    pass


@pytest.fixture
def told(monkeypatch):
    """Where the cache was asked for; the command ends there."""
    found = []

    def use(*folder):
        found.append(folder)
        raise _UsedError

    monkeypatch.setattr(compile_cache, "use_compile_cache", use)
    monkeypatch.setattr(loop, "use_compile_cache", use)
    return found


@pytest.mark.parametrize(
    "arguments",
    [
        ["evaluate", "SOURCE", "--data=digits"],
        ["predict", "SOURCE", "IMAGE"],
        ["features", "SOURCE", "IMAGE", "--output=x.npz"],
        ["export", "SOURCE", "--format=stablehlo", "--output=x"],
        ["report", "SOURCE"],
    ],
)
def test_commands_use_the_users_folder(arguments, told, tmp_path, monkeypatch):
    """Never one that a stranger's run names."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "IMAGE").touch()
    with pytest.raises(_UsedError):
        parser.main(arguments)
    assert told == [()]


def test_training_uses_its_own(told, tmp_path):
    with pytest.raises(_UsedError):
        loop.train(Config(log=Log(compile_cache="/somewhere")), tmp_path / "run")
    assert told == [("/somewhere",)]
