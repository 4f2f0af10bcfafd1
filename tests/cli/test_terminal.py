"""What the commands print: in terminals of any width, in pipes, and after mistakes."""

import fcntl
import json
import os
import re
import struct
import termios

import jax.numpy as jnp
import pytest

import resnet_jax as rj
from resnet_jax.cli import arguments, commands, parser
from resnet_jax.config.schema import Config, Log
from resnet_jax.terminal import columns
from resnet_jax.workdirs.metric_writers import MetricWriters

COMMANDS = [*arguments.commands_of(arguments.build_parser())]


def print_help(command, capsys):
    if command == ["train"]:
        assert parser.main([*command, "--help"]) == 0
    else:
        with pytest.raises(SystemExit, match=r"^0$"):  # argparse
            parser.main([*command, "--help"])
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("width", [80, 200])
@pytest.mark.parametrize("command", [[], *([each] for each in COMMANDS)], ids=" ".join)
def test_help_fits_the_terminal(command, width, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    lines = print_help(command, capsys)
    assert max(map(len, lines)) <= min(width, 100)
    assert lines[0].startswith(f"usage: python -m resnet_jax {' '.join(command)}".strip())
    assert lines[1] == "" or command == ["train"]  # a usage is one line, where it fits
    assert not any("\x1b" in line for line in lines)


def test_flags_of_numbers_have_short_names(capsys):
    text = "\n".join(print_help(["evaluate"], capsys))
    assert "--image_size N " in text
    assert "--crop_fraction X " in text
    assert "evaluate SOURCE [FLAGS]" in text
    assert "export SOURCE --format=FORMAT --output=PATH [" in "\n".join(
        print_help(["export"], capsys)
    )


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("", "no command; one of train, summary, plan, find_rate, .*resnet_jax --help"),
        ("evaluat x", r"unknown command 'evaluat'; did you mean 'evaluate'\?$"),
        ("foo", "unknown command 'foo'; known: doctor, evaluate, "),
        ("summary", "required: MODEL; see python -m resnet_jax summary --help"),
        ("predict", "required: SOURCE, INPUT; see python -m resnet_jax predict --help"),
        ("evaluate x --viws=3", r"unknown flag '--viws'; did you mean --views\?$"),
        ("summary resnet50 --image-size=3", r"unknown flag '--image-size'; .*--image_size\?"),
        ("summary resnet50 --zzz", "unknown flag '--zzz'; see python -m resnet_jax summary --help"),
        ("summary resnet50 other", "unknown argument 'other'; see "),
        ("evaluate x --state=worst", "--state: invalid choice: 'worst'"),
        ("plan --bogus=1", "unknown flag '--bogus'; see train --help=all"),
        (
            "find_rate --epochs=3",
            r"unknown flag '--epochs'; did you mean '--config.train.epochs'\?",
        ),
        ("train --help=zzz", "--help=zzz: no such section or field; sections: model, data, "),
    ],
)
def test_a_mistake_is_one_line(command, message, capsys):
    assert parser.main(command.split()) == 2
    printed = capsys.readouterr()
    assert re.search(rf"^error: .*{message}", printed.err.rstrip("\n"))
    assert printed.err.count("\n") == 1
    assert not printed.out


def test_the_table_of_a_network_fits_80_columns():
    model = rj.ResNet50()
    text = str(rj.summary(model, (1, 224, 224, 3)))
    assert max(map(columns, text.splitlines())) <= 80
    assert not any(line.endswith(" ") for line in text.splitlines())
    assert "112x112x64" in text
    assert "4.09 G multiply-adds an image" in text
    assert "VGG-16, which the ResNet paper compares with, has 138 M parameters and 15.5 G" in text
    assert "this network has 18% and 26% of them" in text
    assert "VGG" not in str(rj.summary(rj.ResNet20(), (1, 32, 32, 3)))


def run_of_records(width, tmp_path):
    """What a terminal of a width receives of two training records."""
    own, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    config = Config(log=Log(tensorboard=False))
    with open(theirs, "w") as stream:
        writers = MetricWriters(config, tmp_path, 0, 539, 22.0, stream)
        for step in (527, 539):
            values = {"loss": jnp.float32(0.9), "top1": 0.955, "top5": 1.0, "learning_rate": 0.1}
            speed = {"images_per_second": 12_345.6, "skipped": 0}
            writers.advance(step)
            writers.record({"step": step, "split": "train", **values, **speed, "loss": 0.907})
        writers.close()
    received = b""
    while b"\x04" not in received:
        try:
            received += os.read(own, 1 << 16)
        except OSError:  # closed and read
            break
    os.close(own)
    return received.decode()


@pytest.mark.parametrize("width", [80, 200])
def test_a_progress_bar_is_whole(width, tmp_path):
    received = run_of_records(width, tmp_path)
    shown = [each for each in re.split(r"[\r\n]", received) if "images/s" in each]
    assert shown
    for each in shown:
        assert columns(each) <= width
        assert re.search(r"loss 0\.907  top-1 95\.5%  12,346 images/s(\]|$)", each)
    assert any("|" in each for each in shown)  # the bar, beside the lines above it
    assert not re.search(r"\x1b\[\d*m", received)


def test_a_narrow_terminal_has_lines(tmp_path):
    lines = run_of_records(60, tmp_path).splitlines()
    assert len(lines) == 2
    assert re.match(r"\d\d-\d\d [\d:]{8}  step 539/539  epoch 24\.5  loss 0\.907", lines[1])


@pytest.mark.parametrize(
    ("flags", "recipe"),
    [
        ([], "digits"),
        (["--config=cifar:resnet56", "--workdir=x"], "cifar:resnet56"),
        (["--workdir=x", "--config", "my recipe.py"], "my recipe.py"),
        (["--config.train.seed=3"], "digits"),
    ],
)
def test_a_run_records_its_command(flags, recipe, tmp_path):
    commands._record_command(tmp_path, flags)
    found = json.loads((tmp_path / "command.json").read_text())
    assert found == {"recipe": recipe, "arguments": flags}
