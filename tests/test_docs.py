"""README and docs/: the code runs, the commands parse, the links lead somewhere, the site builds.

- A `python` block runs, after those above it on its page, in an empty folder.
- A `py` block needs what the tests do not have, and is only compiled.
- Commands in `bash` blocks and in inline code are parsed: their flags, recipes and fields exist.
- `<!-- run as slow -->` above a block: it runs, commands too, in a slow test.

The blocks of architecture.md, predict.md and export.md have tests of their own, and so have the
tutorials.
"""

import functools
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
import tomllib

import numpy as np
import pytest

import resnet_jax as rj
from resnet_jax.cli.parser import _parse, main
from resnet_jax.config import Config, to_flat
from resnet_jax.config.flags import parse_train_flags
from resnet_jax.distributed.launch import FLAGS
from resnet_jax.models import registry

ROOT = pathlib.Path(__file__).parents[1]
GUIDES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
TESTED_ELSEWHERE = ("architecture.md", "predict.md", "export.md")
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]

BLOCK = re.compile(
    r"(?P<slow><!-- run as slow -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
LINK = re.compile(r"""(?:\]\(|src=")(?P<path>(?!\w+:|/)[^)#\s"]*)(?:#(?P<anchor>[^)\s"]*))?[)"]""")
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
COMMAND = re.compile(r"(?:python -m resnet_jax|resnet-jax|python train\.py)(?= )[^|;&`\n]*")
# Words that stand for something in a command.
EXAMPLES = {"RECIPE": "digits", "BATCH": "8", "$model": "plain20", "$seed": "0"}
LAUNCH_FLAGS = tuple(re.findall(r"--\w+", FLAGS))


def blocks(page, *languages, slow=False):
    """The blocks of a page; of slow ones only those that are marked."""
    found = BLOCK.finditer(page.read_text())
    return [
        block
        for block in found
        if block["language"] in languages and (block["slow"] is not None or not slow)
    ]


def with_blocks(pages, *languages, slow=False):
    chosen = [page for page in pages if blocks(page, *languages, slow=slow)]
    return pytest.mark.parametrize("page", chosen, ids=lambda page: page.name)


def run_python(block, page, names):
    exec(compile(block["text"], str(page), "exec"), names)  # noqa: S102


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder with a file that a page reads; what a page registers is forgotten.

    ResNet-18 and ResNet-50 have one block in each stage here: the same shapes.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_ARCHITECTURES", dict(registry._ARCHITECTURES))
    for name in ("ResNet18", "ResNet50"):
        monkeypatch.setattr(
            rj, name, functools.partial(getattr(rj, name), stage_sizes=(1, 1, 1, 1))
        )
    np.save("values.npy", np.full((2, 2, 4), 5_000, np.uint16))


@with_blocks([page for page in GUIDES if page.name not in TESTED_ELSEWHERE], "python")
def test_python_blocks(page, folder):
    names = {"__name__": page.stem}
    for block in blocks(page, "python"):
        if not block["slow"]:
            run_python(block, page, names)


@pytest.mark.slow
@with_blocks(GUIDES, "python", "bash", slow=True)
def test_slow_blocks(page, folder):
    names = {"__name__": page.stem}
    for block in blocks(page, "python", "bash", slow=True):
        if block["language"] == "python":
            run_python(block, page, names)
        else:
            for command in commands(block["text"]):
                assert main(command) == 0, command


def test_blocks_that_are_not_run():
    for page in PAGES:
        for block in blocks(page, "py"):
            compile(block["text"], str(page), "exec")


def commands(text):
    """The arguments of each command of this package in a text."""
    for found in COMMAND.findall(text.replace("\\\n", " ")):
        found = re.sub(r"\[(.*?)\]", r"\1", found) if "'" not in found else found
        for quote in "'\"":  # the end of bash -c '...'
            if found.count(quote) % 2:
                found = found.rpartition(quote)[0]
        words = [
            re.sub(r"\b[A-Z]+\b|\$\w+", lambda word: EXAMPLES.get(word[0], word[0]), word)
            for word in shlex.split(found, comments=True)
            if word != "..." and "FIELD" not in word
        ]
        if words[0] == "resnet-jax":
            yield words[1:]
        else:
            yield ["train", *words[2:]] if words[1] == "train.py" else words[3:]


def code(page):
    """All shell commands of a page."""
    text = page.read_text()
    inline = re.findall(r"(?<!`)`([^`]+)`(?!`)", BLOCK.sub("", text))
    shell = [block["text"] for block in blocks(page, "bash")]
    return "\n".join([*(each.replace("\n", " ") for each in inline), *shell])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    for command in commands(code(page)):
        own_recipe = any(word.endswith(("my_recipe.py", "mine.py")) for word in command)
        if not command[1:] or own_recipe or command[0].isupper():
            continue
        # Help would end here.
        options = _parse([word for word in command if not word.startswith("--help")])
        if command[0] in ("train", "plan", "find_rate"):
            fields = [word for word in options.rest if not word.startswith(LAUNCH_FLAGS)]
            parse_train_flags([word for word in fields if word != "--no-distributed"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_names_of_files_and_extras(page):
    text = code(page).replace("\\\n", " ")
    for script, rest in re.findall(r"python (benchmarks/\w+\.py)([^\n|;&]*)", text):
        source = (ROOT / script).read_text()
        for flag in re.findall(r"--(\w+)", rest):
            assert flag in source, f"{script} --{flag}"
    for path in re.findall(r"(?<![\w/])(tests/[a-z_/.]+)(?!\w)", text):
        assert (ROOT / path).exists(), path
    for names in re.findall(r"'\.\[([\w,-]+)\]'", page.read_text()):
        assert set(names.split(",")) <= set(EXTRAS), names


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_fields(page):
    """Inline code such as `data.workers` or `train.steps = 3` names a field of `Config`."""
    fields = to_flat(Config())
    inline = re.findall(r"(?<!`)`(\w+\.\w+)(?:\s?=[^`]*)?`", BLOCK.sub("", page.read_text()))
    suffixes = ("py", "json", "jsonl", "npz", "safetensors", "apply", "init", "feature_info")
    for section, name in (each.split(".") for each in inline):
        if any(field.startswith(f"{section}.") for field in fields) and name not in suffixes:
            assert f"{section}.{name}" in fields


def slugs(page):
    """The anchors of a page's headings, as GitHub and the site make them."""
    if page.suffix != ".md":
        return set()
    text = BLOCK.sub("", page.read_text())
    found, counts = set(), {}
    for heading in HEADING.findall(text):
        plain = re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", plain.strip().lower()).replace(" ", "-")
        count = counts[slug] = counts.get(slug, -1) + 1
        found.add(f"{slug}-{count}" if count else slug)
    return found


def links(page):
    if page.suffix == ".ipynb":
        cells = json.loads(page.read_text())["cells"]
        text = "\n".join(
            "".join(each["source"]) for each in cells if each["cell_type"] == "markdown"
        )
    else:
        text = re.sub(r"`[^`\n]*`", "", BLOCK.sub("", page.read_text()))
    return LINK.finditer(text)


@pytest.mark.parametrize(
    "page",
    [*PAGES, *sorted((ROOT / "notebooks").glob("*.ipynb"))],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_links(page):
    for link in links(page):
        if link["path"].startswith("../../actions/"):  # badges, which GitHub resolves
            continue
        target = (
            pathlib.Path(os.path.normpath(page.parent / link["path"])) if link["path"] else page
        )
        assert target.exists(), link["path"]
        if link["anchor"] and not link["anchor"].startswith("resnet_jax."):
            assert link["anchor"] in slugs(target), f"{link['path']}#{link['anchor']}"


def test_the_site(tmp_path):
    for module in ("mkdocs", "material", "mkdocstrings_handlers.python"):
        pytest.importorskip(module, reason=f"{module} is not installed: pip install -e '.[docs]'")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        text=True,
        capture_output=True,
    )
    assert built.returncode == 0, built.stderr
    page = (tmp_path / "site" / "api" / "networks" / "index.html").read_text()
    assert 'id="resnet_jax.ResNet"' in page
    assert "stochastic_depth_rate" in page
    assert ">Examples:<" in page  # of docstrings
