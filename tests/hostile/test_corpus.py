"""Every case of the corpus: one line at most, and nothing changed that is somebody else's."""

import contextlib
import hashlib
import io
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from resnet_jax import config as c
from resnet_jax.cli import parser
from resnet_jax.training.loop import train
from tests.hostile import images, names, numbers, states, weights, workdirs  # noqa: F401
from tests.hostile.corpus import CASES, Places

pytestmark = pytest.mark.usefixtures("tiny_model")
ROOT = pathlib.Path(__file__).parents[2]
SECONDS = 60
MEMORY = 600 * 2**20  # bytes that a case may add to the most that the process has ever held
MARKER = "HOSTILE_CODE_RAN"  # what hostile code does: sets this in os.environ


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_model):
    folder = tmp_path_factory.mktemp("run") / "run"
    config = c.Config(
        model=c.Model(name="tiny"),
        data=c.Data(image_size=8, threads=2),
        augment=c.Augment(mean=(0.3,), std=(0.38,)),
        train=c.Train(steps=2, batch_size=16),
        log=c.Log(every_steps=1, tensorboard=False, report=False),
    )
    train(config, folder)
    return folder


@pytest.fixture
def places(run, tmp_path, monkeypatch):
    here, victim, image = (tmp_path / name for name in ("here", "victim", "image.png"))
    here.mkdir()
    (victim / "digits" / "1.0.0").mkdir(parents=True)
    (victim / "digits" / "1.0.0" / "letter.txt").write_text("keep me")
    (victim / "7").mkdir()
    (victim / "7" / "thesis.txt").write_text("keep me too")
    (victim / "config.json").write_text("{}")
    Image.fromarray(np.arange(300, dtype=np.uint8).reshape(10, 10, 3)).save(image)
    monkeypatch.chdir(here)
    yield Places(here, victim, run, image)
    # Python's rmtree, and so pytest, cannot remove a thousand folders inside of each other.
    subprocess.run([shutil.which("rm"), "-rf", here], check=True)


def contents(folder):
    """Names, kinds and contents below a folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        mode = path.lstat().st_mode
        data = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
        found[str(path.relative_to(folder))] = mode, hashlib.sha256(data).hexdigest()
    return found


@contextlib.contextmanager
def limits():
    """Fails a command that hangs or takes too much memory."""

    def late(*_):
        pytest.fail(f"not done in {SECONDS} s")  # no Exception: nothing catches it

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    taken = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - most) * 1024
    assert taken < MEMORY, f"took {taken / 2**20:.0f} MiB"


def main(arguments):
    """The exit code and what reached standard output and standard error."""
    streams = [io.TextIOWrapper(io.BytesIO(), "utf-8", "surrogateescape") for _ in range(2)]
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        try:
            code = parser.main(arguments)
        except SystemExit as error:  # of the parser
            code = error.code
    for stream in streams:
        stream.flush()
    return code, *(stream.buffer.getvalue().decode("utf-8", "replace") for stream in streams)


@pytest.mark.parametrize(
    ("case", "command"),
    [
        pytest.param(
            case,
            command,
            id=f"{case.name}-{command.split()[0]}{number or ''}",
            marks=[pytest.mark.slow] if case.slow else [],
        )
        for case in CASES
        for number, command in enumerate(case.commands)
    ],
)
def test_a_hostile_input_does_no_harm(case, command, places):
    case.make(places)
    before = contents(places.victim)
    modules = set(sys.modules)
    own = places.here / "run"
    words = {**places._asdict(), "run": own if own.exists() else places.run, "root": ROOT}
    arguments = [word.format(**words) for word in command.split()]
    with limits():
        code, output, errors = main(arguments)
    assert code in case.codes, errors
    told = [line for line in errors.splitlines() if line.startswith(("error: ", "stopped: "))]
    assert len(told) == (code not in (0, 1)), errors
    assert all(len(line) < 5000 for line in told)
    assert "Traceback" not in output + errors
    assert all(each.isprintable() or each in "\n\r\t" for each in output + errors), output + errors
    assert contents(places.victim) == before
    assert MARKER not in os.environ
    assert not [name for name in set(sys.modules) - modules if name.startswith("stranger")]
