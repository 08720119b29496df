"""Notebooks as committed: executed, small, readable, without copies of the package. (nbval executes them anew.)"""

import ast
import re
from pathlib import Path

import nbformat
import pytest

from tests.refresh_notebooks import BUDGET

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SECTIONS = ("it first", "By hand", "The naive version", "Meet the package", "Prove it", "Look inside", "Break it",
            "Three sizes", "Exercises", "Recap")
MARK = "# NBVAL_CHECK_OUTPUT"
MACHINE_PATH = re.compile(r"(?<![\w.])/(home|root|Users|work|tmp|usr|mnt|opt)/|[A-Z]:\\\\")
BYTES, CODE_CELLS, CODE_LINES, CELL_LINES, COLUMNS = 400_000, range(20, 36), 300, 25, 88


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    read = nbformat.read(request.param, as_version=4)
    nbformat.validate(read)
    read.path, read.codes = request.param, [cell for cell in read.cells if cell.cell_type == "code"]
    return read


def test_there_are_notebooks():
    assert NOTEBOOKS


def test_executed_once_from_top_to_bottom(notebook):
    """A notebook without counts and outputs passes nbval silently: nothing of it would be compared."""
    assert [cell.execution_count for cell in notebook.codes] == list(range(1, len(notebook.codes) + 1))
    outputs = [output for cell in notebook.codes for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]


def test_marked_cells_have_outputs(notebook):
    marked = [cell for cell in notebook.codes if cell.source.startswith(MARK)]
    assert len(marked) >= 3
    assert [cell.source for cell in marked if not cell.outputs] == []
    assert MARK not in "".join(cell.source.removeprefix(MARK) for cell in notebook.codes), "the mark is a cell's first line"


def test_every_same_is_checked(notebook):
    """Each notebook proves its naive version equal, in cells whose printed line is compared."""
    proofs = [cell for cell in notebook.codes if re.search(r"^\s*same\(", cell.source, re.M)]
    assert proofs and all(cell.source.startswith(MARK) for cell in proofs)
    assert all("same ✓" in cell.outputs[0].text for cell in proofs)


def test_no_trace_of_a_machine(notebook):
    assert not MACHINE_PATH.search(notebook.path.read_text())
    assert all(cell.metadata == {} for cell in notebook.codes)


def test_limits(notebook):
    sources = [cell.source.splitlines() for cell in notebook.codes]
    assert notebook.path.stat().st_size <= BYTES
    assert len(sources) in CODE_CELLS
    assert sum(map(len, sources)) <= CODE_LINES
    assert max(map(len, sources)) <= CELL_LINES
    assert [line for lines in sources for line in lines if len(line) > COLUMNS] == []


def test_sections_in_order(notebook):
    headings = [line for cell in notebook.cells if cell.cell_type == "markdown"
                for line in cell.source.splitlines() if line.startswith("## ")]
    assert len(headings) == len(SECTIONS)
    assert [(h, s) for h, s in zip(headings, SECTIONS) if s not in h] == []


def test_header_says_what_it_costs_and_where_the_code_is(notebook):
    header = notebook.cells[0].source
    assert header.splitlines()[0].startswith("# ") and header.splitlines()[0].endswith("?")
    assert int(BUDGET.search(header)[1]) <= 60
    assert all((ROOT / path).is_file() for path in re.findall(r"`(minomni/[\w/]+\.py)`", header))


def defined(source: str) -> dict[str, str]:
    """Functions and classes of a source -> {what they are without name and docstring: name}; stubs are left out."""
    found = {}
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            continue
        name, node.name = node.name, ""
        if ast.get_docstring(node) is not None:
            node.body = node.body[1:]
        if [ast.unparse(line) for line in node.body] not in ([], ["..."]):
            found[ast.dump(node)] = name
    return found


def test_nothing_is_copied_from_the_package(notebook):
    """What a notebook derives must differ from what it is compared with, or the comparison proves nothing."""
    package = {}
    for path in (ROOT / "minomni").rglob("*.py"):
        package |= defined(path.read_text())
    own = {}
    for cell in notebook.codes:
        own |= defined(cell.source)
    assert own and {own[key]: package[key] for key in own.keys() & package.keys()} == {}


def test_copies_would_be_found():
    assert defined('def f(x):\n    "Doc."\n    return x + 1').keys() == defined("def g(x): return x + 1").keys()
    assert defined("def f(x): ...") == {}
