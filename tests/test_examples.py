"""The scripts in examples/ run, with networks and numbers of steps for a test."""

import base64
import dataclasses
import functools
import http.client
import importlib.util
import io
import json
import pathlib
import re
import shutil
import socket
import threading

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import resnet_jax as rj
from resnet_jax.config import Log, Train
from resnet_jax.models import registry
from tests import speed, tiny
from tests.variables import random_variables

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"
SMALL = rj.ResNet(
    stage_sizes=(1,),
    stage_widths=(16,),
    num_classes=10,
    block_cls=rj.BasicBlock,
    stem_cls=rj.CifarStem,
)


def load(name):
    """The module of an example, as `python examples/NAME.py` finds it."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def names():
    return sorted(path.stem for path in EXAMPLES.glob("*.py"))


def test_every_example_has_a_test():
    tested = set(re.findall(r'load\("(\w+)"\)', pathlib.Path(__file__).read_text()))
    assert tested >= set(names())


@pytest.mark.parametrize("name", names())
def test_docstring_says_how_to_run_it(name):
    docstring = (EXAMPLES / f"{name}.py").read_text().split('"""')[1]
    assert re.search(rf"^    python (\S+ )*.*examples/{name}\.py", docstring, re.MULTILINE)


@pytest.mark.parametrize("name", names())
def test_is_short(name):
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) <= 150


def use_devices(monkeypatch, count):
    """Programs that use all devices have `count` of them."""
    mesh = functools.partial(jax.make_mesh, devices=jax.devices()[:count])
    monkeypatch.setattr(jax, "make_mesh", mesh)
    monkeypatch.setattr(jax, "device_count", lambda: count)


def test_own_training_loop(monkeypatch):
    example = load("own_training_loop")
    monkeypatch.setattr(example, "MODEL", SMALL)
    use_devices(monkeypatch, min(2, jax.device_count()))
    assert example.main(epochs=5) > 0.8


@pytest.mark.slow
@pytest.mark.devices(2)
def test_own_training_loop_is_the_same_on_any_number_of_devices(monkeypatch):
    example = load("own_training_loop")
    monkeypatch.setattr(example, "MODEL", SMALL)
    on_all = example.main(epochs=2)
    use_devices(monkeypatch, 1)
    assert abs(example.main(epochs=2) - on_all) < 0.03


def test_ensemble_vmap():
    accuracies, together = load("ensemble_vmap").main(members=2, steps=30)
    assert accuracies.shape == (2,)
    assert len(set(accuracies.tolist())) > 1  # the members differ
    assert together > 0.3  # chance is 0.1


@pytest.mark.skipif(
    flax.__version__ < "0.12", reason="ToNNX of Flax 0.11 loses parameters, as the example says"
)
def test_nnx(monkeypatch):
    example = load("nnx")
    monkeypatch.setattr(example, "LINEN", SMALL)
    assert example.main(epochs=6) > 0.8


def test_nnx_takes_and_returns_linen_variables():
    example = load("nnx")
    variables = random_variables(SMALL, (8, 8, 3))
    images = jnp.ones((1, 8, 8, 3))
    module = example.nnx.bridge.ToNNX(SMALL, rngs=example.nnx.Rngs(0))
    module.lazy_init(images, train=False)
    example.load_variables(module, variables)
    expected = SMALL.apply(variables, images, train=False)
    np.testing.assert_array_equal(module(images, train=False), expected)
    jax.tree.map(np.testing.assert_array_equal, example.linen_variables(module), variables)


def test_features_fpn(monkeypatch):
    example = load("features_fpn")
    monkeypatch.setattr(example, "BACKBONE", example.BACKBONE.clone(stage_widths=(16,) * 4))
    recall, precision = example.main(steps=80, batch_size=8)
    # Measured: 38% both; after one step 0.8% and 0.2%.
    assert recall > 0.25
    assert precision > 0.25


@pytest.fixture
def own_block():
    yield load("own_block")
    registry._ARCHITECTURES.pop("res2net29_cifar")


def test_own_block(own_block, tmp_path):
    small = {"stage_sizes": (1, 1), "stage_widths": (16, 16)}
    model = rj.create_model("res2net29_cifar", **small)
    variables = random_variables(model)
    images = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    assert model.apply(variables, images, train=False).shape == (2, 10)

    # As for every block, a network that dilates instead of striding computes the same and more.
    dilated = model.clone(output_stride=1)
    maps, finer = (
        each.apply(variables, images, train=False, method="features") for each in (model, dilated)
    )
    assert finer["stage2"].shape == (2, 32, 32, 64)
    np.testing.assert_allclose(finer["stage2"][:, ::2, ::2], maps["stage2"], atol=1e-4)


def test_own_block_is_a_recipe(own_block, tmp_path, monkeypatch):
    monkeypatch.setattr(own_block.Res2NetBlock, "scales", 2)  # compiles faster
    entry = dataclasses.replace(
        registry._ARCHITECTURES["res2net29_cifar"],
        fields={
            **rj.model_info("res2net29_cifar").fields,
            "stage_sizes": (1,),
            "stage_widths": (8,),
        },
    )
    registry._ARCHITECTURES["res2net29_cifar"] = entry
    config = dataclasses.replace(
        own_block.get_config(),
        train=Train(steps=1, batch_size=16),
        log=Log(tensorboard=False, report=False),
    )
    from resnet_jax.training.loop import train

    assert train(config, tmp_path).steps == 1


def test_own_dataset(monkeypatch, tmp_path, tiny_model, capsys):
    example = load("own_dataset")
    monkeypatch.setattr(example, "NETWORK", tiny_model)
    assert 0 <= example.main(tmp_path, epochs=1.0) <= 1
    assert "the first example: digit" in capsys.readouterr().out
    assert set(json.loads((tmp_path / "run" / "classes.json").read_text())) == {
        f"digit {number}" for number in range(10)
    }


def encoded(color, size=(40, 30), kind="JPEG"):
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, kind)
    return file.getvalue()


def save_pretrained(folder):
    """The tiny network as the Hub has networks."""
    folder.mkdir()
    model = rj.create_model(tiny.NAME)
    rj.save_weights(folder / "model.safetensors", model, random_variables(model, (8, 8, 3)))
    facts = {
        "input_size": [3, 8, 8],
        "crop_pct": 1.0,
        "label_names": [f"class {n}" for n in range(10)],
    }
    config = {"architecture": tiny.NAME, "num_classes": 10, "pretrained_cfg": facts}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def test_fine_tune(monkeypatch, tmp_path, tiny_model, capsys):
    example = load("fine_tune")
    for split in ("train", "val"):
        for color in ("red", "blue"):
            folder = tmp_path / "photos" / split / color
            folder.mkdir(parents=True)
            for number in range(4):
                (folder / f"{number}.jpg").write_bytes(encoded(color))

    def short(*arguments, make_config=example.make_config):
        config = make_config(*arguments)
        return dataclasses.replace(
            config,
            train=Train(steps=2, batch_size=8),
            log=Log(tensorboard=False, report=False),
        )

    monkeypatch.setattr(example, "make_config", short)
    example.main(str(tmp_path / "photos"), save_pretrained(tmp_path / "net"), str(tmp_path / "run"))
    out = capsys.readouterr().out
    assert "classified correctly" in out
    assert re.search(r"val/blue/\d\.jpg: (red|blue) \(\d+%\)", out)


@pytest.fixture(scope="module")
def serve():
    return load("serve")


@pytest.fixture(scope="module")
def server(serve, tiny_model, tmp_path_factory):
    """A server that answers in a thread."""
    source = save_pretrained(tmp_path_factory.mktemp("serve") / "net")
    with serve.make_server(source, port=0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(server, method, path, body=None, headers=None):
    """(status, body) of a request."""
    connection = http.client.HTTPConnection(
        "127.0.0.1", server.server_port, timeout=speed.seconds(30)
    )
    connection.request(method, path, body, headers or {})
    response = connection.getresponse()
    return response.status, response.read()


def test_serves_the_page(server):
    status, page = ask(server, "GET", "/")
    assert status == 200
    assert b"<title>What is in this photo?</title>" in page


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_classifies_and_explains_a_photo(server, kind):
    status, body = ask(server, "POST", "/predict", encoded("orange", kind=kind))
    answer = json.loads(body)
    assert status == 200
    probabilities = [each["probability"] for each in answer["classes"]]
    assert len(probabilities) == 3
    assert probabilities == sorted(probabilities, reverse=True)
    assert all(each["name"].startswith("class ") for each in answer["classes"])
    sizes = [png_size(answer["image"]), *(png_size(each["overlay"]) for each in answer["classes"])]
    assert sizes == [(8, 8)] * 4


def png_size(url):
    with Image.open(
        io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,")))
    ) as image:
        return image.size


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        (b"", 422, "no image"),
        (b"<svg></svg>", 422, "no image"),
        (encoded("red")[:200], 422, ""),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), 422, ""),
    ],
)
def test_explains_what_is_no_photo(server, body, status, reason):
    got, answer = ask(server, "POST", "/predict", body)
    line = json.loads(answer)["error"]
    assert got == status
    assert "\n" not in line
    assert len(line) > 10


def test_refuses_a_photo_that_is_too_large(server, serve, monkeypatch):
    monkeypatch.setattr(serve, "MAX_BYTES", 2**20)
    status, answer = ask(server, "POST", "/predict", bytes(3 * 2**20))
    assert status == 413
    assert json.loads(answer) == {"error": "the photo has more than 1 MB"}


@pytest.mark.parametrize("length", ["", "-1", "many", "\u00b2"])
def test_needs_to_know_the_length(server, length):
    with socket.create_connection(
        ("127.0.0.1", server.server_port), timeout=speed.seconds(30)
    ) as client:
        header = f"Content-Length: {length}\r\n" if length else ""
        client.sendall(f"POST /predict HTTP/1.1\r\n{header}\r\n".encode("latin-1"))
        assert client.recv(100).split()[1] == b"411"


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/../serve.py"), ("POST", "/"), ("GET", "/x")]
)
def test_has_nothing_else(server, method, path):
    assert ask(server, method, path, b"")[0] == 404


def test_refuses_more_than_it_can_hold(server, serve):
    for _ in range(serve.MAX_WAITING):
        assert serve.Handler.waiting.acquire(blocking=False)
    try:
        assert ask(server, "POST", "/predict", encoded("red"))[0] == 503
    finally:
        serve.Handler.waiting.release(serve.MAX_WAITING)
    assert ask(server, "POST", "/predict", encoded("red"))[0] == 200


def test_survives_clients_that_hang_up(server, capfd):
    for sent in (b"", b"POST /pre", b"POST /predict HTTP/1.1\r\nContent-Length: 1000\r\n\r\nabc"):
        with socket.create_connection(("127.0.0.1", server.server_port)) as client:
            client.sendall(sent)
            # Closing with a zero linger time resets the connection.
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    assert ask(server, "POST", "/predict", encoded("red"))[0] == 200
    assert "Traceback" not in capfd.readouterr().err


def test_page_in_a_browser(server, tmp_path):
    """As a person uses it: choose a photo, read the classes, look at another class's map."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    (tmp_path / "photo.jpg").write_bytes(encoded("orange"))
    (tmp_path / "notes.txt").write_text("no photo")
    with api.sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        except api.Error as error:
            pytest.skip(f"no browser can be started: {str(error).splitlines()[0]}")
        page = browser.new_page()
        problems = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text))
        page.goto(f"http://127.0.0.1:{server.server_port}/")
        page.set_input_files("input", tmp_path / "photo.jpg")
        page.wait_for_selector("#classes button")
        buttons = page.locator("#classes button")
        assert buttons.count() == 3
        shown = [page.get_attribute("#photo", "src")]
        for pressed in ("true", "false"):  # the evidence for another class, then no evidence
            buttons.nth(1).click()
            assert buttons.nth(1).get_attribute("aria-pressed") == pressed
            shown.append(page.get_attribute("#photo", "src"))
        assert len({*shown}) == 3
        assert problems == []

        page.set_input_files("input", tmp_path / "notes.txt")
        page.wait_for_selector("#status.error")
        assert page.inner_text("#status")
        assert not page.is_visible("#result")
        browser.close()
