"""Errors advise flags that the command has; conftest.py checks those of all other tests."""

import re

import pytest

from resnet_jax.cli import parser
from tests.advice import foreign_flags


@pytest.mark.parametrize(
    ("command", "message", "foreign"),
    [
        ("summary x", "unknown model 'x' (or --recipe=FILE)", set()),
        ("summary x", "x: take a smaller --batch_size", {"--batch_size"}),
        ("summary x --y=3", "unknown flag '--y'", set()),
        ("plan", "see --help=all, or set --config.train.steps or --workdir", set()),
        ("predict w.pth a.png", "fine-tune it with --config.data.name=X", {"--config"}),
        ("predict w.pth a.png", "fine-tune it (train --config.data.name=X)", set()),
        ("report r", "half-prepared; run: prepare mnist --manual_dir=D; or --split", {"--split"}),
    ],
)
def test_flags_in_a_message(command, message, foreign):
    assert foreign_flags(command.split(), message) == foreign


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("summary resnet5O", r"did you mean .*'resnet50'.*\(--recipe=FILE\)$"),
        ("summary resnet_50_v7x", r"unknown model 'resnet_50_v7x'; .*\(--recipe=FILE\)$"),
        ("summary cifar", "cifar is a recipe; give the name of a network, such as resnet50"),
        ("summary configs/cifar.py:resnet56", "configs/cifar.py:resnet56 is a recipe; "),
        ("summary w.pth", "w.pth is a file; give the name of a network"),
        ("summary .", ". is a folder; give the name of a network"),
        ("summary resnet50 --recipe=none.py", "--recipe=none.py: no such file"),
        ("summary resnet50 --receipt=x", r"unknown flag '--receipt'; did you mean --recipe\?$"),
        ("train --config.model.name=foo", "register_model first, as in a recipe's file$"),
        ("plan --config.model.name=foo", "register_model first, as in a recipe's file$"),
        ("evaluate w.pth --model=foo", r"register_model first, .* \(--recipe=FILE\)$"),
        ("plan --topologi=v5e:4x4", r"unknown flag '--topologi'; did you mean --topology\?$"),
        ("find_rate --step=3", r"unknown flag '--step'; did you mean --steps\?$"),
        ("find_rate --config.zzz=3", "unknown field 'zzz'; see train --help=all$"),
        ("plan --config.evaluate=3", "'evaluate' is a section of fields; train --help=evaluate "),
        ("train --zzz=3", "unknown flag '--zzz'; see --help=all$"),
        ("doctor --netwrok=x", r"unknown flag '--netwrok'; did you mean --network\?$"),
    ],
)
def test_advice(command, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w.pth").touch()
    assert parser.main(command.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(f"^error: .*{message}", line)
