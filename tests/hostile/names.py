"""Names that a terminal obeys, and what else is hostile on its way out."""

import json
import os
import shutil

import jax
import numpy as np

import resnet_jax as rj
from tests.hostile.corpus import case

NAMES = (
    "\x1b]0;owned\x07",
    "\x9b2J\x9d",
    "\u202egpj.exe\u202c",
    "\u2066a\u2069\u200e\u200f\u061c",
    "a\u2028b\u2029c\x85d\r\ne",
    "c\u200ba\u2060t\ufeff",
    "cat\u3164\ufe0f",
    "=HYPERLINK(1)",
    "<script>alert(1)</script>",
    "漢字 é",
)


@case(
    "predict {run} {here}/photos",
    "predict {run} {here}/photos --format=csv",
    "predict {run} {here}/photos --format=jsonl",
    "evaluate {run} --data=folder:{here}/data --split=test --per_class",
    "evaluate {run} --data=folder:{here}/data --split=test --max_corrupt=0",
    codes=(0, 1, 2),
)
def names_of_files_and_classes(places):
    """They come from strangers and end up in a terminal."""
    _name_classes(places, sorted(name.replace("/", "") for name in NAMES))
    for number, name in enumerate(NAMES):
        file = name.replace("/", "") + ".png"
        for folder in (f"photos/{number}", f"data/test/{name.replace('/', '')}"):
            (places.here / folder).mkdir(parents=True)
            shutil.copy(places.image, places.here / folder / file)
            (places.here / folder / ("broken" + file)).write_bytes(b"no image")
    with open(os.fsencode(places.here / "photos") + b"/\xff\xfe.png", "wb") as file:
        file.write(b"no image")


@case("report {run} --force", "predict {run} {image}", "evaluate {run} --data=digits", codes=(0, 2))
def class_names_without_text(places):
    """Lone surrogates have no bytes in UTF-8; they stand beside all the others."""
    _name_classes(places, [*NAMES[:8], "\ud800", "\udcff"])


def _name_classes(places, names):
    run = places.copy_of_run()
    (run / "classes.json").write_text(json.dumps(list(names)))
    (run / "SHA256SUMS").unlink(missing_ok=True)  # a stranger's names are sealed as well


@case(
    "predict {here}/nan.npz {image} --model=tiny",
    "predict {here}/nan.npz {image} --model=tiny --format=jsonl",
    "features {here}/nan.npz {image} --model=tiny --output={here}/out.npz",
    "export {here}/nan.npz --model=tiny --format=stablehlo --output={here}/out.stablehlo",
    "evaluate {here}/nan.npz --model=tiny --data=digits --json={here}/out.json",
)
def network_without_numbers(places):
    """It would have a first class with a probability of nan."""
    model = rj.create_model("tiny")
    images = np.zeros((1, 8, 8, 3), np.float32)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
    nan = jax.tree.map(lambda leaf: np.full(leaf.shape, np.nan, leaf.dtype), shapes)
    rj.save_weights(places.here / "nan.npz", model, nan)


@case("report {run} --force", codes=(0,))
def report_writes_through_a_picture(places):
    """The picture is a link to somebody else's file."""
    folder = places.copy_of_run() / "report"
    folder.mkdir()
    (folder / "curves.png").symlink_to(places.victim / "7" / "thesis.txt")
    (folder.parent / "report.html").symlink_to(places.victim / "config.json")


@case("report {run} --force")
def report_writes_through_a_folder(places):
    """The folder of the pictures is a link to somebody else's."""
    (places.copy_of_run() / "report").symlink_to(places.victim)


@case(
    "report {run} --output={here}/fifo.html --force",
    "features {run} {image} --output={here}/fifo.npz --force",
    "export {run} --format=stablehlo --output={here}/fifo.html --force",
)
def outputs_are_fifos(places):
    """They would be replaced by files."""
    places.copy_of_run()
    for name in ("fifo.html", "fifo.npz"):
        os.mkfifo(places.here / name)


@case(
    "predict {run} {image} --output={here}/link.csv",
    "evaluate {run} --data=digits --json={here}/link.csv",
)
def outputs_are_dangling_links(places):
    """They lead to a place where nobody wants a file."""
    places.copy_of_run()
    (places.here / "link.csv").symlink_to(places.victim / "new")
