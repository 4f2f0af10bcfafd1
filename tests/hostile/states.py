"""Checkpoints of strangers, and places for the copy of a run that hold something else."""

import json
import os
import shutil

from resnet_jax.workdirs import checksums
from tests.hostile.corpus import MAKERS, case

READERS = ("evaluate {run} --data=digits", "predict {run} {image}")
TRAIN = (
    "train --config={root}/tests/tiny.py --workdir={run} --config.data.image_size=8"
    " --config.data.threads=2 --config.augment.mean=(0.3,) --config.augment.std=(0.38,)"
    " --config.train.steps=2 --config.train.batch_size=16 --config.log.every_steps=1"
    " --config.log.tensorboard=false --config.log.report=false"
)
COPY = f"{TRAIN} --config.checkpoint.copy_to="


def state_of(places):
    """The only state of a workdir of the case's own."""
    return places.copy_of_run() / "checkpoints" / "2"


def seal_again(folder, progress):
    """As a stranger does who knows how: the checksums are right."""
    (folder / checksums.NAME).unlink()
    (folder / "progress.json").write_bytes(progress)
    checksums.seal(folder)


@case(*READERS, TRAIN)
def a_state_under_another_number(places):
    state_of(places).rename(places.here / "run" / "checkpoints" / "12")


@case(*READERS, TRAIN)
def a_state_that_is_a_link(places):
    state_of(places).rename(places.victim / "2")
    (places.here / "run" / "checkpoints" / "2").symlink_to(places.victim / "2")


@case(TRAIN)
def a_folder_for_what_is_being_written_that_is_a_link(places):
    state_of(places)
    unfinished = places.here / "run" / "checkpoints" / ".unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.symlink_to(places.victim)


@case(*READERS, TRAIN)
def a_name_in_a_state_that_a_terminal_obeys(places):
    (state_of(places) / "default" / "\x1b]0;mine\x07\n\u202e\x9b2J").write_text("")


def special(name, kind):
    def make(places):
        path = state_of(places) / name
        path.unlink()
        MAKERS[kind](path)

    make.__name__ = f"{name.replace('/', '_')}_{kind}"
    by_default = (name, kind) == (checksums.NAME, "zeros")
    case(*READERS, TRAIN, slow=not by_default)(make)


for kind in MAKERS:
    special(checksums.NAME, kind)
    if kind != "sparse":  # its checksum would be taken
        special("progress.json", kind)
        special("default/manifest.ocdbt", kind)


PROGRESS = {
    "empty": b"",
    "list": b"[]",
    "deep": b"[" * 100_000,
    "utf16": '{"step": 2}'.encode("utf-16"),
    "longer": b'{"step": ' + b"9" * 5_000 + b"}",
    "text": b'{"step": "2", "metrics": null, "records": {}}',
    "no_records": b'{"step": 2, "metrics": null}',
    "nan": b'{"step": 2, "metrics": {"top1": NaN}, "records": {"steps": NaN}}',
    "huge": b'{"step": 2, "metrics": {"top1": 1' + b"0" * 400 + b'}, "records": {"steps": 1}}',
    "totals": b'{"step": 2, "metrics": null, "records": {"steps": 1, "totals": {"loss": 1'
    + b"0" * 400
    + b"}}}",
    "negative": b'{"step": 2, "metrics": null, "records": {"steps": -5, "totals": {"loss": 1}}}',
    "surrogate": b'{"step": 2, "metrics": {"top1": "\\ud800"}, "records": {"\\ud800": 1}}',
}


def progress(name):
    def make(places):
        seal_again(state_of(places), PROGRESS[name])

    make.__name__ = f"progress_{name}"
    # The variables do not depend on it: what is sealed and holds its step can be evaluated.
    case("evaluate {run} --data=digits", codes=(0, 2), slow=True)(make)
    case(TRAIN, codes=(0, 2) if name == "huge" else (2,), slow=name != "longer")(make)


for name in PROGRESS:
    progress(name)


# Places for a copy.


@case(f"{COPY}{{victim}}", f"{COPY}file://{{victim}}")
def a_copy_in_a_folder_of_somebody_else(places):
    """A folder with a number for a name was removed there, and config.json written over."""
    places.copy_of_run()


@case(f"{COPY}{{victim}}")
def a_copy_beside_the_states_of_somebody_else(places):
    places.copy_of_run()
    (places.victim / "config.json").unlink()
    (places.victim / "7").rename(places.victim / "checkpoints")


def copy_of(places):
    """A run with a whole copy."""
    run = places.copy_of_run()
    return shutil.copytree(run, places.here / "copy")


@case(f"{COPY}{{here}}/copy")
def a_copy_with_links(places):
    copy = copy_of(places)
    (copy / "checkpoints" / "2").rename(places.victim / "2")
    (copy / "checkpoints" / "2").symlink_to(places.victim / "2")


@case(f"{COPY}{{here}}/copy")
def a_copy_whose_records_are_a_link(places):
    copy = copy_of(places)
    (copy / "metrics.jsonl").unlink()
    (copy / "metrics.jsonl").symlink_to(places.victim / "config.json")


@case(f"{COPY}{{here}}/copy", codes=(0,))
def a_copy_with_files_of_somebody_else(places):
    """They stay; and a name in its manifest that leads elsewhere is only compared."""
    copy = copy_of(places)
    (copy / "thesis.txt").write_text("keep me")
    shutil.copytree(copy / "checkpoints" / "2", copy / "checkpoints" / "3")
    with (copy / "checkpoints" / "3" / checksums.NAME).open("a") as file:
        file.write(f"{'0' * 64}  ../../../../victim/config.json\n")


@case(f"{COPY}{{here}}/copy", codes=(0, 2), slow=True)
def a_copy_whose_configuration_is_a_fifo(places):
    copy = copy_of(places)
    (copy / "config.json").unlink()
    os.mkfifo(copy / "config.json")


@case(f"{COPY}{{here}}/copy", slow=True)
def a_copy_whose_configuration_is_another(places):
    path = copy_of(places) / "config.json"
    config = json.loads(path.read_text())
    config["train"]["seed"] = "\x1b[2J" * 1000
    path.write_text(json.dumps(config))
