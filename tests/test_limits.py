"""What is too large is refused before memory is taken for it."""

import pytest

import resnet_jax as rj
from resnet_jax.cli import parser
from resnet_jax.distributed.device_memory import check_batch_memory
from resnet_jax.errors import ConfigError
from resnet_jax.limits import host_memory

GIB = 2**30


def write(root, name, text):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_memory_is_that_of_the_container(tmp_path):
    there = host_memory(tmp_path)
    assert there > 0
    write(tmp_path, "proc/self/cgroup", "0::/pod/container\n")
    write(tmp_path, "sys/fs/cgroup/pod/container/memory.max", "max\n")
    assert host_memory(tmp_path) == there
    write(tmp_path, "sys/fs/cgroup/pod/memory.max", f"{GIB // 4}\n")
    assert host_memory(tmp_path) == GIB // 4
    write(tmp_path, "sys/fs/cgroup/memory/memory.limit_in_bytes", f"{GIB // 8}\n")
    assert host_memory(tmp_path) == GIB // 8


@pytest.mark.parametrize(
    ("images", "training", "gigabytes"),
    # Two maps of 56 x 56 x 256 numbers of 4 bytes and the pixels; in training those of 16 blocks.
    [(1000, False, "6.6"), (1000, True, "22.2")],
)
def test_memory_of_a_batch(images, training, gigabytes, monkeypatch):
    monkeypatch.setattr("jax.default_backend", lambda: "cpu")
    shape = (images, 224, 224, 3)
    monkeypatch.setattr("resnet_jax.limits.host_memory", lambda: 100 * GIB)
    check_batch_memory(rj.ResNet50(), shape, "--batch_size=1000", training=training)
    monkeypatch.setattr("resnet_jax.limits.host_memory", lambda: GIB)
    message = rf"--batch_size=1000: needs at least {gigabytes} GB of memory, and there are 1\.1;"
    with pytest.raises(ConfigError, match=message):
        check_batch_memory(rj.ResNet50(), shape, "--batch_size=1000", training=training)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["summary"], "the following arguments are required: MODEL; see python -m resnet_jax summ"),
        (["summary", "resnet20", "--channels=x"], "--channels: 'x': must be a whole number"),
        (["summary", "resnet20", "--image_size", "9" * 5000], "--image_size: '999"),
        (
            ["summary", "resnet20", "--image_size=8193"],
            "--image_size=8193: must be from 1 to 8,192",
        ),
        (["summary", "resnet20", "--num_classes=10000001"], "num_classes = 10000001 is not all"),
        (["summary", "resnet20\0"], "an argument contains the character NUL"),
        (
            ["plan", "--images=1000000000001"],
            "--images=1000000000001: must be from 1 to 1,000,000,",
        ),
        (
            ["plan", "--num_classes=10000001"],
            "--num_classes=10000001: must be from 1 to 10,000,000",
        ),
        (
            ["plan", "--batch_per_chip=16777220"],
            "--batch_per_chip=16777220: must be from 1 to 16,7",
        ),
        (["plan", "--images_per_core=5e-324"], "--images_per_core=5e-324: must be from 0.001"),
        (["plan", "--topology=h100:8", "--network_gbits=nan"], "--network_gbits=nan: must be from"),
        (["plan", f"--topology=h100:{'9' * 5000}x8"], "--topology=h100:9999"),
        (["plan", "--topology=h100:100001x8"], "has 100,001 hosts; at most 100,000"),
    ],
)
def test_flags_are_within_bounds(arguments, message, capsys):
    assert parser.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert len(captured.err) < 500
