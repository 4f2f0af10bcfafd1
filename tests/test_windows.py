"""On Windows: models and weights work, everything else says in one line that it does not."""

import sys

import pytest

from tests.processes import ROOT, run

# Loaded before the rest, which is to find the modules and names that Windows has. The libraries'
# own code for Windows cannot run here.
WINDOWS = """
import os, signal, sys
import flax.linen, jax, numpy, safetensors.numpy
for name in ("fcntl", "grp", "pwd", "resource", "termios"):
    sys.modules[name] = None
for name in [each for each in dir(os) if each.startswith("O_NO") or each in LACKS]:
    delattr(os, name)
del signal.SIGHUP
sys.platform = "win32"
""".replace("LACKS", repr(("O_CLOEXEC", "O_DIRECTORY", "sysconf", "getuid", "geteuid")))

MODEL = """
import tempfile
import resnet_jax as rj
model = rj.ResNet20()
variables = model.init(jax.random.key(0), numpy.zeros((1, 32, 32, 3)), train=False)
with tempfile.TemporaryDirectory() as folder:
    rj.save_weights(f"{folder}/w.safetensors", model, variables)
    assert [os.path.basename(each) for each in os.listdir(folder)] == ["w.safetensors"]
    loaded = rj.load_weights(model, f"{folder}/w.safetensors")
assert jax.tree.all(jax.tree.map(numpy.array_equal, loaded, variables))
print(rj.summary(model, (1, 32, 32, 3)).parameters)
"""


def _run(code):
    return run(sys.executable, "-c", WINDOWS + code, seconds=300, cwd=ROOT)


def test_models_and_weights_work():
    result = _run(MODEL)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 200_000


@pytest.mark.parametrize(
    "start",
    [
        'import runpy; runpy.run_module("resnet_jax", run_name="__main__")',
        'import runpy; runpy.run_path("train.py", run_name="__main__")',
    ],
)
def test_commands_say_it(start):
    result = _run(start)
    assert result.returncode == 2
    assert result.stderr.startswith("error: Windows supports models and their weights only")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""
