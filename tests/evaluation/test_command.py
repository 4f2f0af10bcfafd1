"""`python -m resnet_jax evaluate`: what it prints, writes and refuses."""

import json
import os
import pathlib
import shutil

import pytest
from PIL import Image

import resnet_jax as rj
from resnet_jax.cli.parser import main
from tests.evaluation.settings import photo, write_folder
from tests.variables import random_variables


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_model):
    """A weight file of four classes, a folder of ten images in four classes, one damaged image."""
    folder = tmp_path_factory.mktemp("command")
    model = rj.create_model(tiny_model, num_classes=4)
    rj.save_weights(folder / "w.npz", model, random_variables(model))
    write_folder(folder / "data", [(8, 8)] * 9)
    (folder / "data" / "test" / "class0" / "z.png").write_bytes(b"nothing")
    write_folder(folder / "other", [(8, 8)] * 9, classes=3)
    for each in range(2):
        for name in ("x", "y", "z", "a", "b"):
            target = folder / "five" / "test" / name
            target.mkdir(parents=True, exist_ok=True)
            Image.fromarray(photo(each)).save(target / f"{each}.png")
    return folder


def evaluate(place, *flags, data="data"):
    return main(
        [
            "evaluate",
            f"{place}/w.npz",
            "--model=tiny",
            "--image_size=8",
            f"--data=folder:{place}/{data}",
            "--split=test",
            *flags,
        ]
    )


def test_json_and_table(place, tmp_path, capsys):
    assert evaluate(place, "--json=-") == 0
    printed = capsys.readouterr()
    record = json.loads(printed.out, parse_constant=pytest.fail)
    assert "skipped" in printed.err
    assert (record["images"], record["skipped"], record["classes"]) == (9, 1, 4)
    assert 0 <= record["top1"] <= record["top5"] == 1
    assert record["views"] == "one_crop"

    assert evaluate(place, f"--json={tmp_path}/a.json", "--per_class") == 0
    out = capsys.readouterr().out
    assert f"top-1   {record['top1']:.2%}" in out
    assert "9; 1 more cannot be decoded" in out
    assert "confusion matrix" in out
    written = json.loads((tmp_path / "a.json").read_text())
    for each in (record, written):
        each.pop("seconds")
        each.pop("images_per_second")
    assert written == record
    assert os.listdir(tmp_path) == ["a.json"]


def test_the_documented_fields(place, capsys):
    """docs/evaluate.md has a row for every field of the JSON and none for another."""
    assert evaluate(place, "--json=-") == 0
    record = json.loads(capsys.readouterr().out)
    docs = (pathlib.Path(__file__).parents[2] / "docs" / "evaluate.md").read_text()
    rows = [
        line.split("|")[1]
        for line in docs.splitlines()
        if line.startswith("| `") and "--" not in line
    ]
    named = [name for row in rows for name in row.replace("`", "").replace(" ", "").split(",")]
    assert named == list(record)


def test_an_existing_file_stays(place, tmp_path, capsys):
    path = tmp_path / "a.json"
    path.write_text("mine")
    assert evaluate(place, f"--json={path}") == 2
    assert capsys.readouterr().err == f"error: --json={path}: exists; give --force to replace it\n"
    assert path.read_text() == "mine"
    assert evaluate(place, f"--json={path}", "--force", "--max_corrupt=0") == 2
    assert path.read_text() == "mine"  # an evaluation that fails replaces nothing
    assert os.listdir(tmp_path) == ["a.json"]
    assert evaluate(place, f"--json={path}", "--force") == 0
    assert json.loads(path.read_text())["images"] == 9


@pytest.mark.parametrize(
    ("flags", "data", "message"),
    [
        (["--views=center"], "data", "--views: unknown view 'center'"),
        (["--views=multi_scale", "--scales=8;9"], "data", "--scales=8;9: must be pixels"),
        (["--max_corrupt=0"], "data", "data.max_corrupt = 0: more images than that"),
        (["--json=/nowhere/a.json"], "data", "--json=/nowhere/a.json: cannot be written"),
        (["--json=/"], "data", "--json=/: is a folder"),
        ([], "five", "its 5 classes (a, b, x, ...) are not among the 4 of"),
        ([], "other", "its 3 classes (class0, class1, class2) are not among the 4 of"),
        ([], "none", "is not a folder"),
        (["--split=train"], "data", "--split=train: data.eval_split = 'train'"),
        (["--model=resnet20"], "data", "do not fit"),
    ],
)
def test_mistakes_are_one_line(flags, data, message, place, capsys):
    assert evaluate(place, *flags, data=data) == 2
    printed = capsys.readouterr()
    said = ("skipped ", "assumed: ", "the network's 4 outputs are matched")
    lines = [each for each in printed.err.splitlines() if not each.startswith(said)]
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert printed.out == ""


def test_classes_by_order_and_by_name(place, tmp_path, capsys):
    """Names in another order move the outputs; without names their order is guessed, and said."""
    assert evaluate(place, "--json=-") == 0
    printed = capsys.readouterr()
    by_order = json.loads(printed.out)
    assert (by_order["matched_by"], by_order["outputs"]) == ("order", 4)
    assert "matched to the classes of folder:" in printed.err
    assert "by order, not by name (class0 ... class3): --classes=FILE" in printed.err
    assert any("mean" in line for line in by_order["assumed"])
    found = {}
    for names in ("class0 class1 class2 class3", "class1 class0 class2 class3"):
        (tmp_path / "names.txt").write_text(names.replace(" ", "\n"))
        assert evaluate(place, f"--classes={tmp_path}/names.txt", "--json=-") == 0
        printed = capsys.readouterr()
        assert "by order" not in printed.err
        found[names] = json.loads(printed.out)
        assert found[names]["matched_by"] == "name"
    same, moved = found.values()
    assert same["confusion"] == by_order["confusion"]
    assert moved["confusion"] != by_order["confusion"]
    (tmp_path / "names.txt").write_text("class0\nclass1\ncat\ndog\n")
    assert evaluate(place, f"--classes={tmp_path}/names.txt") == 2
    err = capsys.readouterr().err
    assert "2 of its 4 classes (class2, class3) are not among the 4 of" in err
    assert "(cat, dog); take the dataset" in err


def test_the_only_held_out_split_is_the_default(place, tmp_path, capsys):
    shutil.copytree(place / "data", tmp_path / "data")
    command = ["evaluate", f"{place}/w.npz", "--model=tiny", "--image_size=8"]
    assert main([*command, f"--data=folder:{tmp_path}/data", "--json=-"]) == 0
    assert json.loads(capsys.readouterr().out)["split"] == "test"
    shutil.copytree(tmp_path / "data/test", tmp_path / "data/val")
    assert main([*command, f"--data=folder:{tmp_path}/data"]) == 2
    assert "--split: name the split of folder:" in (err := capsys.readouterr().err)
    assert err.endswith("to evaluate; it has: test, val\n")
    assert main([*command, f"--data=folder:{tmp_path}/data/val"]) == 2
    hint = f"; if these are classes: --data=folder:{tmp_path}/data --split=val\n"
    assert capsys.readouterr().err.endswith(hint)
    (tmp_path / "list.csv").write_text("path,label\na.png,a\nb.png,b\n")
    assert main([*command, f"--data=csv:{tmp_path}/list.csv"]) == 2
    assert capsys.readouterr().err.endswith("to evaluate; it has: train\n")
    assert main(command) == 2
    err = capsys.readouterr().err
    assert "error: --data: " in err
    assert "and --split where the data has several" in err


@pytest.mark.parametrize(
    "flag", ["--mean=a,b", "--std=", "--crop_mode=border", "--interpolation=lanczos"]
)
def test_flags_of_preprocessing(flag, place, capsys):
    assert evaluate(place, flag) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error: {flag.partition('=')[0]}")
    assert err.count("\n") == 1


@pytest.mark.parametrize("source", ["nothing.npz", "foreign.npz", "."])
def test_a_missing_or_foreign_network(source, place, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "foreign.npz").write_bytes(b"PK nothing")
    flags = [f"{tmp_path}/{source}", "--model=tiny", f"--data=folder:{place}/data"]
    assert main(["evaluate", *flags, "--split=test"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("kind", ["folder", "csv"])
def test_the_data_of_a_run_is_opened_for_its_user_only(
    kind, tiny_model, tmp_path, capsys, monkeypatch
):
    from resnet_jax import config as c
    from resnet_jax.training.loop import train
    from resnet_jax.workdirs import signature

    data = f"folder:{tmp_path}/data"
    for split in ("train", "test"):
        write_folder(tmp_path / "data", [(8, 8)] * 16, split=split)
    if kind == "csv":
        rows = (
            f"{path},{path.parent.name},{path.parts[-3]}\n"
            for path in sorted((tmp_path / "data").rglob("*.png"))
        )
        (tmp_path / "list.csv").write_text("path,label,split\n" + "".join(rows))
        data = f"csv:{tmp_path}/list.csv"
    config = c.Config(
        model=c.Model(name="tiny"),
        data=c.Data(name=data, image_size=8, threads=2),
        train=c.Train(steps=1, batch_size=16),
        log=c.Log(tensorboard=False),
    )
    top1 = train(config, tmp_path / "run").metrics["top1"]
    monkeypatch.setattr(signature, "_signed", set())  # as another process of this user
    command = ["evaluate", str(tmp_path / "run"), "--json=-"]
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["top1"] == top1
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another user"))
    assert main(command) == 2
    assert capsys.readouterr().err.endswith(f"to use it, pass --data={data}\n")
    assert main([*command, f"--data={data}"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["top1"] == top1
    assert "has changed" not in printed.err
    # The same data, spelled otherwise and from elsewhere, has the same rules.
    monkeypatch.chdir(tmp_path)
    short = data.replace(f"{tmp_path}/", "./")
    moved = tmp_path / "data/test/class1/moved.png"
    (tmp_path / "data/test/class0/0000.png").rename(moved)
    if kind == "csv":
        text = (tmp_path / "list.csv").read_text()
        (tmp_path / "list.csv").write_text(
            text.replace("0/0000.png,class0,te", "1/moved.png,class1,te")
        )
    assert main([*command, f"--data={short}"]) == 0
    assert f"{short} has changed since the run was evaluated on it" in capsys.readouterr().err
    if kind == "folder":
        shutil.rmtree(tmp_path / "data/test/class2")
    else:
        lines = (tmp_path / "list.csv").read_text().splitlines()
        kept = [line for line in lines if not line.endswith("class2,test")]
        (tmp_path / "list.csv").write_text("\n".join(kept))
    assert main([*command, f"--data={short}"]) == 2
    missing = "no images of 1 of the 4 classes (class2)"
    assert f"has {missing}; add some, or set" in capsys.readouterr().err
    assert main([*command, f"--data={short}", "--allow_missing_classes"]) == 0
    printed = capsys.readouterr()
    assert f"in test: {missing}\n" in printed.err
    assert json.loads(printed.out)["classes"] == 4
    # Other data of some of the classes is judged among these, which is said.
    shutil.copytree(tmp_path / "data", tmp_path / "other")
    shutil.rmtree(tmp_path / "other/test/class2", ignore_errors=True)
    assert main([*command, f"--data=folder:{tmp_path}/other", "--split=test"]) == 0
    printed = capsys.readouterr()
    assert "test has 3 of the network's 4 classes, and only these compete" in printed.err
    assert json.loads(printed.out)["classes"] == 3
