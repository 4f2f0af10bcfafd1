"""Workdirs of strangers."""

import os

from tests.hostile.corpus import case

READERS = (
    "evaluate {here}/run --data=digits",
    "report {here}/run",
    "predict {here}/run {image}",
    "export {here}/run --format=stablehlo --output={here}/out.stablehlo",
)


@case(*READERS)
def config_is_a_fifo(places):
    """It would be read for ever."""
    path = places.copy_of_run() / "config.json"
    path.unlink()
    os.mkfifo(path)
