"""The files that describe a run: sealed, and signed by the user whose trainer wrote them."""

import os
import shutil
import subprocess

import numpy as np
import pytest

from resnet_jax.config.schema import Checkpoint, Config, Data, Train
from resnet_jax.errors import ConfigError
from resnet_jax.workdirs import description, signature, workdir
from tests.training.runs import records

DESCRIPTIONS = ("config.json", "classes.json", "data.json")


@pytest.fixture
def described(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    description.write_description(folder, Config(), ["cat", "dog"], {"train": "abc"})
    return folder


def test_the_seal_is_one_that_sha256sum_checks(described):
    if shutil.which("sha256sum") is None:
        pytest.skip("needs sha256sum")
    command = ["sha256sum", "--check", "--strict", description.SEAL]
    assert subprocess.run(command, cwd=described, capture_output=True).returncode == 0


@pytest.mark.parametrize("name", [*DESCRIPTIONS, description.SEAL])
def test_every_flipped_bit_is_noticed(name, described):
    path = described / name
    before = path.read_bytes()
    for bit in range(0, 8 * len(before), 7):  # each position in a byte, through the whole file
        data = bytearray(before)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        with pytest.raises(ConfigError, match=r"does not match its checksum"):
            [description.read_description(described, each) for each in DESCRIPTIONS]


def test_without_a_seal_nothing_is_compared(described):
    (described / description.SEAL).unlink()
    (described / "classes.json").write_text('["cow"]')
    assert description.read_class_names(described) == ("cow",)


@pytest.mark.parametrize(
    "content", [f'["{"x" * 20_000}"]', "{", '{"a": 1}', "[1]", "[" * 10_000, "nonsense"]
)
def test_names_that_are_none(content, described):
    (described / description.SEAL).unlink()
    (described / "classes.json").write_text(content)
    with pytest.raises(ConfigError, match=r"classes.json cannot be read"):
        description.read_class_names(described)


def test_class_counts(described):
    assert description.read_class_counts(described) == {}
    counts = {"train": np.array([3, 0]), "eval": np.zeros(0, np.int64)}
    description.write_description(described, Config(), ["cat", "dog"], {"train": "abc"}, counts)
    (found,) = description.read_class_counts(described).items()
    assert (found[0], found[1].tolist()) == ("train", [3, 0])  # what was not counted is not noted
    (described / "checkpoints" / "1").mkdir(parents=True)
    workdir.open_workdir(described, Config(), {"train": "abc"})  # and is none of the fingerprints
    (described / "data.json").unlink()
    assert description.read_class_counts(described) == {}


@pytest.mark.parametrize(
    "counts", ["3", "[3, 4]", '{"train": [1, -2]}', '{"train": [1, 1.5]}', '{"train": [true, 2]}']
    + ['{"train": [1]}', '{"train": {"a": 1}}', '{"train": [1, 99999999999]}', "[" * 10_000],
)  # fmt: skip
def test_class_counts_that_are_none(counts, described):
    (described / description.SEAL).unlink()
    (described / "data.json").write_text(f'{{"class_counts": {counts}}}')
    with pytest.raises(ConfigError, match=r"data.json cannot be read .*; restore it"):
        description.read_class_counts(described)


def test_only_what_differs_is_written(described):
    def times():
        return {name: (described / name).stat().st_mtime_ns for name in DESCRIPTIONS}

    before = times()
    description.write_description(described, Config(), ["cat", "dog"], {"train": "abc"})
    assert times() == before
    changed = Config(train=Train(seed=3))
    description.write_description(described, changed, ["cat", "dog"], {"train": "abc"})
    assert description.read_config(described) == changed


def test_a_damaged_configuration_is_not_called_another_run(described):
    (described / "checkpoints" / "1").mkdir(parents=True)
    path = described / "config.json"
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 8'))
    with pytest.raises(ConfigError, match=r"config.json does not match its checksum"):
        workdir.open_workdir(described, Config(), {"train": "abc"})
    (described / description.SEAL).unlink()
    with pytest.raises(ConfigError, match=r"another configuration \(train.seed: 8 -> 0\)"):
        workdir.open_workdir(described, Config(), {"train": "abc"})


def as_another_process(monkeypatch):
    monkeypatch.setattr(signature, "_signed", set())


def test_whose_workdir_it_is(described, tmp_path, monkeypatch):
    as_another_process(monkeypatch)
    assert signature.is_own(described)
    moved = shutil.copytree(described, tmp_path / "moved")
    assert signature.is_own(moved)
    path = moved / "config.json"
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 8'))
    assert not signature.is_own(moved)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another user"))
    assert not signature.is_own(described)
    (described / signature.SIGNATURE).write_text("0" * 64)
    assert not signature.is_own(described)
    description.write_description(described, Config(), ["cat", "dog"], {"train": "abc"})
    as_another_process(monkeypatch)
    assert signature.is_own(described)
    assert oct((tmp_path / "another user/resnet_jax/key").stat().st_mode & 0o777) == "0o600"


def test_a_damaged_key_is_replaced(described, tmp_path, monkeypatch):
    key = tmp_path / "state" / "resnet_jax" / "key"
    key.parent.mkdir(parents=True)
    key.write_bytes(b"short")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    description.write_description(described, Config(data=Data(threads=3)), ["cat"], {})
    as_another_process(monkeypatch)
    assert signature.is_own(described)


def test_a_relative_state_folder_is_ignored(described, tmp_path, monkeypatch):
    """Else the key would be that of whoever made the current folder."""
    key = tmp_path / "st" / "resnet_jax" / "key"
    key.parent.mkdir(parents=True)
    key.write_bytes(bytes(32))
    content = (described / "config.json").read_bytes()
    (described / signature.SIGNATURE).write_bytes(signature._signature(bytes(32), content))
    as_another_process(monkeypatch)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", "st")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert not signature.is_own(described)


def test_a_workdir_whose_name_is_not_utf8(tmp_path):
    with pytest.raises(ConfigError, match=r"its name is not UTF-8"):
        workdir.open_workdir(f"{tmp_path}/w\udcff", Config(), {})


@pytest.mark.parametrize("place", ["file", "/dev/null", "/proc"])
def test_without_a_place_for_the_key(place, described, tmp_path, monkeypatch):
    """This process knows what it wrote; the next one does not."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", os.path.join(tmp_path, place))
    description.write_description(described, Config(data=Data(threads=3)), ["cat"], {})
    assert signature.is_own(described)
    as_another_process(monkeypatch)
    assert not signature.is_own(described)


def test_without_a_home(described, monkeypatch):
    def nobody(*_):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setattr("pathlib.Path.home", nobody)
    description.write_description(described, Config(data=Data(threads=3)), ["cat"], {})
    as_another_process(monkeypatch)
    assert not signature.is_own(described)


def test_lines_that_are_no_records_are_set_aside(tmp_path):
    from resnet_jax.workdirs.metric_writers import MetricsFile

    path = tmp_path / "metrics.jsonl"
    record = '{"step": %d, "split": "test", "loss": 0.5, "top1": 0.5}\n'
    bad = "nonsense\n" + record.replace("%d", '"1"')
    path.write_text(record % 1 + bad + record % 2 + record % 9 + (record % 3)[:-9])
    file = MetricsFile(path, completed_steps=5)
    file.close()
    assert [each["step"] for each in records(tmp_path)] == [1, 2]
    assert file.set_aside.read_text() == bad
    MetricsFile(path, completed_steps=5).close()
    assert file.set_aside.read_text() == bad


@pytest.mark.parametrize("kind", ["folder", "csv", "jsonl"])
def test_data_may_move(kind, tmp_path, monkeypatch):
    """What it is, its fingerprints tell; where it is may be written in many ways."""
    run = tmp_path / "run"
    (run / "checkpoints" / "1").mkdir(parents=True)
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    description.write_description(
        run, Config(data=Data(name=f"{kind}:data")), ["cat"], {"train": "abc"}
    )
    assert description.read_config(run).data.name == f"{kind}:{tmp_path}/data"
    for path in ("data", "./data/", f"{tmp_path}/data", "/elsewhere"):
        workdir.open_workdir(run, Config(data=Data(name=f"{kind}:{path}")), {"train": "abc"})
        with pytest.raises(ConfigError, match=r"has changed since .*fingerprints: train: abc"):
            workdir.open_workdir(run, Config(data=Data(name=f"{kind}:{path}")), {"train": "x"})
    with pytest.raises(ConfigError, match=rf"data.name: '{kind}:.*' -> 'digits'"):
        workdir.open_workdir(run, Config(data=Data(name="digits")), {"train": "abc"})
    (run / "data.json").unlink()
    with pytest.raises(ConfigError, match=rf"data.name: '{kind}:.*' -> '{kind}:/elsewhere'"):
        workdir.open_workdir(run, Config(data=Data(name=f"{kind}:/elsewhere")), {"train": "abc"})


def test_first_weights_in_another_spelling(tmp_path, monkeypatch):
    run = tmp_path / "run"
    (run / "checkpoints" / "1").mkdir(parents=True)
    (tmp_path / "w.npz").touch()
    monkeypatch.chdir(tmp_path)
    first = Config(checkpoint=Checkpoint(init_from="w.npz"))
    description.write_description(run, first, ["cat"], {})
    workdir.open_workdir(run, first, {})
    again = f"../{tmp_path.name}/w.npz"
    workdir.open_workdir(run, Config(checkpoint=Checkpoint(init_from=again)), {})
    with pytest.raises(ConfigError, match=r"checkpoint.init_from: "):
        workdir.open_workdir(run, Config(checkpoint=Checkpoint(init_from="v.npz")), {})
