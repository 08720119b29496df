"""The import graph: folders form one chain, every arrow points down it, and there is no circle."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "minomni"
# From the bottom to the top: a module imports from its own layer and from layers before it.
LAYERS = (
    {"errors", "arguments", "config", "paths", "files", "model_files", "devices", "plot"},
    {"layers", "rotary", "kv_cache", "decoder", "sampling", "cuda_graphs", "static_decode"},
    {"inputs"},
    {"thinker"},
    {"talker"},
    {"token2wav"},
    {"chat"},
    {"omni"},
    {"checkpoint"},
    {"__init__"},  # load() and save()
    {"data"},
    {"train"},
    {"eval"},
    {"notebook"},
    {"serve"},
    {"cli"},
    {"__main__"},
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def module_name(path: Path) -> str:
    """minomni/thinker/tmrope.py -> thinker.tmrope; minomni/__init__.py -> __init__."""
    name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    return name.removesuffix(".__init__")


def imported(path: Path, modules: set[str]) -> set[str]:
    """The modules of the package that a file imports when it runs, also inside functions."""
    found = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    only_types = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            only_types |= set(node.body)
    for node in ast.walk(tree):
        if node in only_types:
            continue
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "minomni":
                    found.add(alias.name.removeprefix("minomni").removeprefix(".") or "__init__")
            continue
        if not isinstance(node, ast.ImportFrom) or (node.module or "").split(".")[0] != "minomni":
            continue
        folder = node.module.removeprefix("minomni").removeprefix(".")
        for alias in node.names:
            whole = f"{folder}.{alias.name}".removeprefix(".")
            found.add(whole if whole in modules else folder or "__init__")
    return found


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    files = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
    modules = set(files)
    return {name: imported(path, modules) - {name} for name, path in files.items()}


def layer(module: str) -> int:
    return RANK[module.split(".")[0]]


def test_every_module_has_a_layer(graph):
    assert {name.split(".")[0] for name in graph} == RANK.keys()


def test_no_import_points_up(graph):
    upward = [
        f"{module} imports {other}"
        for module, others in graph.items()
        for other in others
        if layer(other) > layer(module)
    ]
    assert upward == []


def test_no_circle(graph):
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"modules import one another: {' -> '.join(error.args[1])}")


def test_an_upward_import_is_found(tmp_path):
    file = tmp_path / "x.py"
    file.write_text(
        "if TYPE_CHECKING:\n    from minomni.omni import Omni\n"
        "def f():\n    from minomni.train import loop\n    from minomni import load\n"
        "    import os, minomni.serve.app, minomni\n"
    )
    expected = {"train.loop", "serve.app", "__init__"}
    assert imported(file, {"train.loop", "train", "serve.app", "omni"}) == expected
