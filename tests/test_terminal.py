"""What is printed: names that a terminal would obey, and text in many scripts."""

import io
import json
import math
import re
import unicodedata

import numpy as np
import pytest

from resnet_jax.cli import parser
from resnet_jax.config.schema import Config, Log
from resnet_jax.data.corrupt import CorruptImages
from resnet_jax.evaluation.result import EvaluationResult, dump_json
from resnet_jax.terminal import columns, json_text, log, padded, print_copy, show, visible
from resnet_jax.workdirs.metric_writers import MetricWriters

HOSTILE = [
    ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
    ("\x9b2J\x7f\0", r"\x9b2J\x7f\x00"),
    ("a\r\n\tb", r"a\r\n\tb"),
    ("\u202eexe.\u2066x\u2069\u200e\u200f\u061c", r"\u202eexe.\u2066x\u2069\u200e\u200f\u061c"),
    ("a\u2028b\u2029c\x85d", r"a\u2028b\u2029c\x85d"),
    ("c\u200ba\u2060t\ufeff\u00ad", r"c\u200ba\u2060t\ufeff\xad"),
    ("\udcff.png", r"\udcff.png"),
    ("cat\u3164\u034f\ufe0f", r"cat\u3164\u034f\ufe0f"),
    ("a\u200d\U0001f525", "a\\u200d\U0001f525"),  # joins nothing
    ("\U0001f525\U000e0041\U000e007f", "\U0001f525\\U000e0041\\U000e007f"),  # hidden letters
]
READABLE = [
    "photos/cat 1.png",
    r"C:\n",
    "café",
    "漢字かな",
    "हिन्दी",
    "\U0001f525",
    "\u2764\ufe0f",
    "1\ufe0f\u20e3",
    "\U0001f469\U0001f3fd\u200d\U0001f680",
    "\U0001f3f3\ufe0f\u200d\U0001f308",
]


@pytest.mark.parametrize(("text", "shown"), HOSTILE)
def test_what_a_terminal_obeys_is_shown(text, shown):
    assert visible(text) == shown
    assert visible(shown) == shown


@pytest.mark.parametrize("text", READABLE)
def test_what_people_write_stays(text):
    assert visible(text) == text


def test_no_control_or_format_character_is_left():
    kinds = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
    everything = map(chr, range(0x110000))
    bad = [each for each in everything if unicodedata.category(each) in kinds]
    shown = visible("".join(bad))
    assert len(bad) > 10_000
    assert shown.isascii()
    assert shown.isprintable()


def test_columns_stay_in_line():
    names = ["cat", "漢字", "e\u0301", visible("\x1b[1m")]
    assert [columns(name) for name in names] == [3, 4, 1, 7]
    assert {columns(padded(name, 9)) for name in names} == {9}
    assert padded("longer than that", 9) == "longer than that"


@pytest.mark.parametrize("text", [*(each for each, _ in HOSTILE), *READABLE])
def test_json_is_harmless_and_exact(text):
    written = json_text({text: [text]})
    assert written.isascii()
    assert written.isprintable()
    assert json.loads(written) == {text: [text]}


def test_json_has_no_nan():
    values = {"a": float("nan"), "b": (1.5, float("inf")), "c": [{"d": float("-inf")}, None, True]}
    found = json.loads(json_text(values), parse_constant=pytest.fail)
    assert found == {"a": None, "b": [1.5, None], "c": [{"d": None}, None, True]}


def test_every_way_to_print_escapes(capsys):
    text, shown = HOSTILE[0]
    print_copy(text)
    show(f"{text}\n{text}")
    assert capsys.readouterr().out == f"{shown}\n{shown}\n{shown}\n"
    log(text)
    CorruptImages(limit=1, log=log).add(text, text)
    assert capsys.readouterr().err == f"{shown}\nskipped {shown}: {shown}\n"


def test_errors_are_escaped(capsys):
    name = "nowhere\x1b[2J\u202e\udcff.npz"
    assert parser.main(["predict", name, __file__, "--model=resnet20"]) == 2
    error = capsys.readouterr().err
    assert r"nowhere\x1b[2J\u202e\udcff.npz" in error
    assert error.strip().isprintable()
    # A file's name that looks like a flag, in `predict run *`.
    assert parser.main(["summary", "resnet20", "--\x1b[2J"]) == 2
    assert r"--\x1b[2J" in capsys.readouterr().err


def test_the_training_log_is_escaped(tmp_path):
    text, shown = HOSTILE[0]
    stream = io.StringIO()
    config = Config(log=Log(tensorboard=False))
    writers = MetricWriters(config, tmp_path, 0, 1, 1.0, stream)
    record = {"step": 1, "split": text, "top1": 0.5, "top5": 1.0, "loss": 0.25, "x": float("nan")}
    writers.record(record)
    writers.log(f"skipped {text}")
    writers.close()
    assert re.fullmatch(
        rf"\d\d-\d\d \d\d:\d\d:\d\d  skipped {re.escape(shown)}", stream.getvalue().splitlines()[1]
    )
    assert stream.getvalue().replace("\n", "").isprintable()
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    written = json.loads(line, parse_constant=pytest.fail)
    del written["time"]
    assert written == {**record, "x": None}


def test_tables_of_an_evaluation(capsys):
    names = ("\x1b[2J\x07", "漢字", "cat\u202e", "x" * 10_000)
    labels, predictions = np.array([0, 1, 2, 3]), np.array([1, 1, 0, 3])
    report = EvaluationResult(
        **{"network": "run\x1b", "model": "tiny", "step": 1, "weights": "", "data": "folder:\x9b"},
        **{"split": "te\nst", "views": "one_crop", "image_size": 8, "resize_size": 8},
        **{"scales": (), "batch_size": 4, "skipped": 0, "unlabeled": 0, "loss": math.inf},
        **{"top1": 0.5, "top5": 1.0, "class_names": names, "indices": np.arange(4)},
        **{"labels": labels, "predictions": predictions, "seconds": 1.0},
        **{"confidences": np.full(4, 0.5, np.float32), "hits": labels == predictions},
    )
    text = report.table(per_class=True)
    assert text.replace("\n", "").isprintable()
    lines = text.splitlines()
    assert r"run\x1b (tiny, step 1): one crop of 8 pixels; te\nst of folder:\x9b" in lines[0]
    start = lines.index(next(line for line in lines if line.startswith("class")))
    rows = lines[start + 1 : start + 4]
    assert len(text) < 25_000  # one long name does not widen every row
    assert len({columns(row.partition("%")[0]) for row in rows}) == 1
    record = json.loads(dump_json(report.to_json()), parse_constant=pytest.fail)
    assert record["loss"] is None
    assert record["per_class"][0]["name"] == names[0]
    assert dump_json(report.to_json()).isascii()


def test_a_terminal_of_few_characters(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr("sys.stdout", stream)
    print_copy("café")
    stream.flush()
    assert stream.buffer.getvalue() == rb"caf\xe9" + b"\n"
