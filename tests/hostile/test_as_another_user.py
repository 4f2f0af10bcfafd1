"""The corpus as an ordinary user, where the tests run as root: permissions count then."""

import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

import pytest

ROOT = pathlib.Path(__file__).parents[2]
NOBODY = 65534


@pytest.fixture
def own():
    """A folder of that user; pytest's own are for nobody but root."""
    with tempfile.TemporaryDirectory() as folder:
        os.chown(folder, NOBODY, NOBODY)
        yield folder


@pytest.mark.skipif(os.getuid() != 0 or not shutil.which("setpriv"), reason="needs root, setpriv")
@pytest.mark.faults
def test_the_corpus_as_an_ordinary_user(own):
    user = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    environment = {**os.environ, "HOME": own, "RESNET_JAX_TEST_FOLDER": own}
    options = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True}
    if subprocess.run([*user, sys.executable, "-c", "import jax, tests"], **options).returncode:
        pytest.skip("an ordinary user cannot read this Python or these tests")
    flags = ["-n", "0", "-q", "-p", "no:cacheprovider", f"--basetemp={own}/tests"]
    command = [*user, sys.executable, "-m", "pytest", *flags, "tests/hostile/test_corpus.py"]
    found = subprocess.run(command, **options)
    assert found.returncode == 0, found.stdout[-5000:]
