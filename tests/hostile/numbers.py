"""Absurd numbers and names in the configuration of a workdir, and in flags."""

import json

from tests.hostile.corpus import case

DIGITS = "9" * 5000
LONG = "x" * 250


def workdir(field, value, *commands):
    """Adds a workdir with another value of a field."""
    section, _, name = field.partition(".")

    def make(places):
        path = places.copy_of_run() / "config.json"
        config = json.loads(path.read_text())
        config[section][name] = value
        path.write_text(json.dumps(config))

    make.__name__ = f"{field}_is_{value!r:.20}"
    case(*commands or ("predict {here}/run {image}",))(make)


workdir("data.eval_size", 10**6)
workdir("data.image_size", 2**70)
workdir("data.eval_resize", 10**6)
workdir("augment.std", [5e-324])
workdir("data.threads", 10**9, "evaluate {here}/run --data=digits")
workdir("data.workers", 10**6, "evaluate {here}/run --data=digits")
workdir("evaluate.batch_size", 10**7, "evaluate {here}/run --data=digits")
workdir("optimizer.learning_rate", 10**30)
workdir("log.profile", f"1:{DIGITS}")
workdir("data.name", "folder:\0")
workdir("model.name", "x" * 10**6)


@case(
    "predict {here}/run {image} --batch_size=1000000000",
    f"predict {{here}}/run {{image}} --batch_size={DIGITS}",
    "predict {here}/run {image} --image_size=1000000",
    "predict {here}/run {image} --image_size=4096 --batch_size=100000",
    "predict {here}/run {image} --crop_fraction=5e-324",
    f"predict {{here}}/run {{image}} --output={{here}}/{LONG}{LONG}.csv",
    f"predict {{here}}/{LONG}{LONG} {{image}}",
    f"predict ~{LONG}/run {{image}}",
    f"predict {{here}}/{LONG}x.safetensors {{image}} --model=tiny",
    "evaluate {here}/run --data=digits --batch_size=16000000",
    "evaluate {here}/run --data=digits --batch_size=1180591620717411303424",
    f"evaluate {{here}}/run --data=digits --views=multi_scale --scales={DIGITS}",
    "evaluate {here}/run --data=digits --views=multi_scale --scales=8,1000000",
    f"evaluate {{here}}/run --data=folder:{{here}}/{LONG}{LONG} --split=test",
    f"evaluate {{here}}/run --data=digits --json={{here}}/{LONG}{LONG}",
    f"features {{here}}/run {{image}} --output={{here}}/{LONG}{LONG}.npz",
    f"export {{here}}/run --format=stablehlo --output={{here}}/{LONG}{LONG}.stablehlo",
    f"export {{here}}/run --format=stablehlo --input_size={DIGITS}x8 --output={{here}}/new",
    f"export {{here}}/run --format=onnx --opset={DIGITS} --output={{here}}/new",
    f"report {{here}}/run --output={{here}}/{LONG}{LONG}.html",
    f"report {{here}}/{LONG}{LONG}",
)
def flags_are_absurd(places):
    places.copy_of_run()


@case(
    "summary tiny --image_size=1180591620717411303424",
    f"summary tiny --image_size={DIGITS}",
    "summary tiny --num_classes=1000000000",
    "summary tiny --channels=0",
    "summary tiny --channels=1000000",
    f"summary {LONG * 100}",
    "plan --images=1000 --num_classes=1000000000",
    f"plan --topology=h100:{DIGITS}x8",
    f"plan --topology=v5e:{DIGITS}x1",
    "train --config.data.image_size=1000000 --workdir={here}/new",
    "train --config.train.batch_size=1180591620717411303424 --workdir={here}/new",
    "train --config.train.epochs=1e308 --workdir={here}/new",
    "train --config.augment.pad=1000000 --workdir={here}/new",
    "train --config.augment.rand_layers=1000000 --workdir={here}/new",
    f"train --config.data.name=folder:{{here}}/{LONG}{LONG} --workdir={{here}}/new",
)
def flags_without_a_run_are_absurd(places):
    pass
