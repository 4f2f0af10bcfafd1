"""Workdirs of strangers."""

import json
import os
import shutil

from tests.hostile.corpus import MAKERS, case

READERS = (
    "evaluate {run} --data=digits",
    "report {run}",
    "predict {run} {image}",
    "export {run} --format=stablehlo --output={here}/out.stablehlo",
)
DESCRIPTIONS = ("config.json", "classes.json", "SHA256SUMS")


def change_config(run, **fields):
    """Writes other values into a config.json, as its author can."""
    path = run / "config.json"
    config = json.loads(path.read_text())
    for name, value in fields.items():
        section, _, field = name.partition("__")
        config[section][field] = value
    path.write_text(json.dumps(config))
    (run / "SHA256SUMS").unlink(missing_ok=True)


def digits_of(places):
    """Prepared digits, to be changed."""
    from resnet_jax.data.prepare import prepare

    prepare("digits")
    prepared = os.path.join(os.environ["TFDS_DATA_DIR"], "digits")
    return shutil.copytree(prepared, places.here / "stranger" / "data" / "digits") / "1.0.0"


def payload(places):
    """A module that says that it ran, in the current folder."""
    (places.here / "stranger").mkdir(exist_ok=True)
    (places.here / "stranger" / "payload.py").write_text(
        "import os\nos.environ['HOSTILE_CODE_RAN'] = '1'\n"
    )


@case("evaluate {run}", "report {run}", codes=(0, 2))
def data_that_names_a_class_in_the_current_folder(places):
    """TFDS would import it, and the folder is where the stranger's archive was unpacked."""
    payload(places)
    path = digits_of(places) / "features.json"
    description = json.loads(path.read_text())
    description["pythonClassName"] = "stranger.payload.X"
    path.write_text(json.dumps(description))
    change_config(places.copy_of_run(), data__data_dir="stranger/data")


@case("evaluate {run} --data=digits --data_dir=stranger/data")
def the_same_data_where_the_user_names_it(places):
    data_that_names_a_class_in_the_current_folder(places)


@case("evaluate {run} --data=digits --data_dir=stranger/data", codes=(0,))
def data_whose_builder_is_in_the_current_folder(places):
    """TFDS notes the module of the builder too; it has no need of it."""
    payload(places)
    path = digits_of(places) / "dataset_info.json"
    description = json.loads(path.read_text())
    description["moduleName"] = "stranger.payload"
    path.write_text(json.dumps(description))
    places.copy_of_run()


@case("evaluate {run}", "report {run}", codes=(0, 2))
def data_in_a_folder_of_somebody_else(places):
    """What lay in its digits/1.0.0 was removed, as half of a dataset."""
    change_config(places.copy_of_run(), data__data_dir=str(places.victim))


@case("evaluate {run}", "report {run}", codes=(0, 2))
def data_above_the_folder_of_data_sets(places):
    change_config(places.copy_of_run(), data__name="tfds:../../..")


@case("evaluate {run}", codes=(2,))
def data_in_a_bucket(places):
    change_config(places.copy_of_run(), data__data_dir="gs://nobody/data")


@case("evaluate {run}", "report {run}", codes=(0, 2))
def images_of_somebody_else(places):
    folder = places.victim / "test"
    for label in "ab":
        (folder / label).mkdir(parents=True)
        shutil.copy(places.image, folder / label / "private.png")
    change_config(places.copy_of_run(), data__name=f"folder:{places.victim}")


@case("evaluate {run}", "report {run}", codes=(0, 2))
def list_of_somebody_else(places):
    (places.victim / "list.csv").write_text("path,label,split\nx.png,a,test\ny.png,b,test\n")
    change_config(places.copy_of_run(), data__name=f"csv:{places.victim}/list.csv")


@case("report {run}", "report {run} --force", codes=(0, 2))
def pictures_that_are_links(places):
    run = places.copy_of_run()
    (run / "report").mkdir()
    (run / "report" / "curves.png").symlink_to(places.victim / "config.json")


@case("report {run}")
def pictures_in_a_folder_that_is_a_link(places):
    (places.copy_of_run() / "report").symlink_to(places.victim)


TRAIN = (
    "train --config={root}/tests/tiny.py --workdir={run} --config.data.image_size=8"
    " --config.augment.mean=(0.3,) --config.augment.std=(0.38,) --config.train.steps=2"
    " --config.train.batch_size=16 --config.log.report=false"
)


@case(TRAIN, codes=(0,))
def files_that_are_links(places):
    """Training goes on in the workdir; what the links lead to stays as it is."""
    run = places.copy_of_run()
    for name in (".config.json.partial", "config.json", "environment.json", "metrics.jsonl"):
        target = places.victim / name
        target.write_bytes((run / name).read_bytes() if (run / name).exists() else b"mine")
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(target)


@case(TRAIN)
def a_lock_that_is_a_link(places):
    run = places.copy_of_run()
    (run / ".lock").unlink(missing_ok=True)
    (run / ".lock").symlink_to(places.victim / "config.json")


@case(TRAIN)
def states_in_a_folder_that_is_a_link(places):
    run = places.copy_of_run()
    (run / "checkpoints").rename(places.victim / "checkpoints")
    (run / "checkpoints").symlink_to(places.victim / "checkpoints")


def special(name, kind):
    def make(places):
        path = places.copy_of_run() / name
        path.unlink()
        MAKERS[kind](path)

    make.__name__ = f"{name}_{kind}"
    case(*READERS, codes=(0, 2), slow=(name, kind) != ("config.json", "fifo"))(make)


RECORDS_OF_A_RUN = ("metrics.jsonl", "environment.json")
for name in (*DESCRIPTIONS, "data.json", *RECORDS_OF_A_RUN):
    for kind in MAKERS:
        special(name, kind)


# Records that no run writes.
RECORDS = {
    "nan": b'{"step": 1, "split": "train", "loss": NaN, "top1": 0.5}',
    "text": b'{"step": "1", "split": "test", "loss": 1.0, "top1": 0.5}',
    "zero": b'{"step": 0, "split": "test", "loss": 1.0, "top1": 0.5}',
    "negative": b'{"step": -3, "split": "test", "loss": 1.0, "top1": 0.5}',
    "huge": b'{"step": 1' + b"0" * 400 + b', "split": "test", "loss": 1.0, "top1": 0.5}',
    "longer": b'{"step": 1' + b"0" * 5000 + b', "split": "test", "loss": 1.0, "top1": 0.5}',
    "missing": b'{"step": 1, "split": "train", "loss": 1.0, "top1": 0.5}',
    "list": b"[1, 2]",
    "deep": b"[" * 100_000,
    "utf16": '{"step": 1, "split": "test", "loss": 1.0, "top1": 0.5}'.encode("utf-16"),
    "bool": b'{"step": true, "split": "test", "loss": 1.0, "top1": 0.5}',
    "bytes": b"\xff\xfe\x00",
}


# Names that are shown with escapes.
NAMED = (
    b'{"step": 1, "split": "\\ud800", "loss": 1.0, "top1": 0.5}',
    b'{"step": 1, "split": "\\u001b[2J", "loss": 1.0, "top1": 0.5}',
)


@case("report {run}", "export {run} --format=hub --output={here}/hub", TRAIN, codes=(0,))
def records_of_every_kind_among_good_ones(places):
    with (places.copy_of_run() / "metrics.jsonl").open("ab") as file:
        file.writelines(line + b"\n" for line in (*RECORDS.values(), *NAMED))


@case("report {run}")
def millions_of_lines_that_are_no_records(places):
    (places.copy_of_run() / "metrics.jsonl").write_bytes(b"a\n" * 2**24)


@case("report {run}")
def no_record_but_bad_ones(places):
    lines = [line + b"\n" for line in RECORDS.values()]
    (places.copy_of_run() / "metrics.jsonl").write_bytes(b"".join(lines))
