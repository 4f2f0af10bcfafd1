"""The packages import each other one way, as docs/architecture.md draws them."""

import ast
import pathlib

import resnet_jax

ROOT = pathlib.Path(resnet_jax.__file__).parent
# From the bottom up; a module may import what stands before its own package, and nothing after it.
LAYERS = (
    *("ops", "models", "config", "data", "distributed", "workdirs", "weights", "evaluation"),
    *("training", "inference", "export", "planning", "report", "doctor", "cli"),
)


def imported(path):
    """Modules of the package that a file imports, also inside of functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield from (f"{node.module}.{each.name}" for each in node.names)


def packages(names):
    parts = (name.split(".") for name in names if name.startswith("resnet_jax."))
    return {part[1] for part in parts if part[1] in LAYERS}


def test_every_package_has_its_place():
    found = {path.name for path in ROOT.iterdir() if (path / "__init__.py").exists()}
    assert found == set(LAYERS)


def test_imports_run_one_way():
    upward = [
        f"{path.relative_to(ROOT)} imports {package}"
        for path in ROOT.rglob("*.py")
        if (own := path.relative_to(ROOT).parts[0]) in LAYERS
        for package in packages(imported(path))
        if LAYERS.index(package) > LAYERS.index(own)
    ]
    assert not upward


def test_what_all_share_imports_no_package():
    shared = {path for path in ROOT.glob("*.py") if path.name not in ("__init__.py", "__main__.py")}
    assert not {path.name: found for path in shared if (found := packages(imported(path)))}


def test_no_circle_between_modules():
    modules = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        modules[".".join(parts).removesuffix(".__init__")] = path
    edges = {
        name: {
            found if found in modules else found.rpartition(".")[0]
            for found in at_the_top(path)
            if found.startswith("resnet_jax.")
        }
        for name, path in modules.items()
    }
    done, open_ = set(), []

    def visit(name):
        assert name not in open_, " -> ".join([*open_[open_.index(name) :], name])
        if name in done:
            return
        open_.append(name)
        for each in sorted(edges.get(name, ())):
            visit(each)
        done.add(open_.pop())

    for name in sorted(edges):
        visit(name)


def at_the_top(path):
    """Modules that a file imports when it is loaded."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{each.name}" for each in node.names)
