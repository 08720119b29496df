"""Notebooks as committed: executed, small, readable, without copies of the package. (nbval executes
them anew.)
"""

import ast
import base64
import builtins
import re
import subprocess
import sys
from functools import cache
from io import BytesIO
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import pytest
import soundfile
import torch
from exercises import stubs
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image
from refresh_notebooks import BUDGET, FOLDED, clean, fold_answers, small, with_flac
from refresh_notebooks import ROOT as CHECKOUT

from minomni.config import TINY
from minomni.notebook import viz
from minomni.notebook.check import CUT, source_of

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SECTIONS = (
    "it first",
    "By hand",
    "The naive version",
    "Meet the package",
    "Prove it",
    "Look inside",
    "Break it",
    "Three sizes",
    "Exercises",
    "Recap",
)
OWN_SECTION = "LoRA"  # of notebook 16, beside the others
MARK = "# NBVAL_CHECK_OUTPUT"
PROOF = re.compile(r"(?<!try:\n)^ *same\(", re.M)
MACHINE_PATH = re.compile(r"(?<![\w.])/(home|root|Users|work|tmp|usr|mnt|opt)/|[A-Z]:\\\\")
BEGINNING = 'import sys\n\nsys.path.insert(0, "..")  # the package lies beside this folder\n'
# what chapters will teach that are still being written: a chapter that is there has no allowance
LOOSEST = 0.02  # the largest tolerance of a proof
LONGEST_S = 180  # seconds of one notebook, by its header
ALL_S = 2 * 12 * 60  # seconds of all notebooks: twelve minutes on two cores
SHOWN_LINES, SHOWN_COLUMNS = 25, 88  # of source at a time
PRINTED_COLUMNS = 108
SHORT = ("00", "01", "02", "03", "04", "05", "06", "07")
SHORT_CELLS, SHORT_LINES, SHORT_WORDS = 35, 300, 2500
BYTES, CODE_CELLS, CODE_LINES, CELL_LINES, COLUMNS = 600_000, range(20, 46), 460, 25, 100


@pytest.fixture(scope="module", params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    read = nbformat.read(request.param, as_version=4)
    nbformat.validate(read)
    read.path, read.codes = request.param, [cell for cell in read.cells if cell.cell_type == "code"]
    return read


def test_there_are_notebooks():
    assert NOTEBOOKS


def test_executed_once_from_top_to_bottom(notebook):
    """A notebook without counts and outputs passes nbval silently: nothing would be compared."""
    assert [cell.execution_count for cell in notebook.codes] == list(
        range(1, len(notebook.codes) + 1)
    )
    outputs = [output for cell in notebook.codes for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]


def test_marked_cells_have_outputs(notebook):
    marked = [cell for cell in notebook.codes if cell.source.startswith(MARK)]
    assert len(marked) >= 3
    assert [cell.source for cell in marked if not cell.outputs] == []
    assert not [
        cell.source for cell in notebook.codes if "NBVAL" in cell.source.removeprefix(MARK)
    ], "not the first line"


def test_every_same_is_checked(notebook):
    """Each notebook proves its naive version equal, in cells whose printed line is compared.

    What stands after `try:` is to fail.
    """
    proofs = [cell for cell in notebook.codes if PROOF.search(cell.source)]
    assert proofs
    assert all(cell.source.startswith(MARK) for cell in proofs)
    for cell in proofs:
        assert cell.outputs[0].text.count("same ✓") >= len(PROOF.findall(cell.source))


def test_a_same_that_fails_is_no_proof(notebook):
    """A cell that shows how `same` fails prints what it says."""
    for cell in notebook.codes:
        if failing := re.findall(r"^ *try:\n *same\(", cell.source, re.M):
            printed = "".join(output.get("text", "") for output in cell.outputs)
            assert len(re.findall(r"^same: .*, expected ", printed, re.M)) >= len(failing)


def test_no_trace_of_a_machine(notebook):
    assert not MACHINE_PATH.search(notebook.path.read_text())
    assert all(cell.metadata in ({}, FOLDED) for cell in notebook.codes)


def test_the_answer_to_a_predict_is_folded(notebook):
    """Otherwise it stands below its question: python tests/refresh_notebooks.py README."""
    found = [cell.metadata for cell in notebook.codes]
    fold_answers(notebook)
    assert found == [cell.metadata for cell in notebook.codes]


def test_the_first_output_after_a_predict_is_folded():
    def cell(source):
        return new_code_cell(source, outputs=[new_output("stream", text=source)])

    texts = ["Run it.", "*Predict:* what is printed?"]
    cells = [cell("1"), *map(new_markdown_cell, texts), new_code_cell("x = 2"), *map(cell, "34")]
    cells += [new_markdown_cell("Now predict nothing."), cell("5")]
    book = new_notebook(cells=cells)
    fold_answers(book)
    codes = [cell for cell in book.cells if cell.cell_type == "code"]
    assert [cell.metadata for cell in codes] == [{}, {}, FOLDED, {}, {}]


def test_limits(notebook):
    sources = [cell.source.splitlines() for cell in notebook.codes]
    assert notebook.path.stat().st_size <= BYTES
    assert len(sources) in CODE_CELLS
    # An exercise, with its stub and its cases, is work for the reader and not reading.
    reading = [cell.source.splitlines() for cell in notebook.codes if not stubs(cell.source)]
    assert sum(map(len, reading)) <= CODE_LINES
    assert max(map(len, sources)) <= CELL_LINES
    assert [line for lines in sources for line in lines if len(line) > COLUMNS] == []


def test_the_first_chapters_are_short(notebook):
    """The code that a reader has to get through who leaves out the exercises."""
    if notebook.path.stem[:2] not in SHORT:
        return
    reading = [cell.source.splitlines() for cell in notebook.codes if not stubs(cell.source)]
    assert len(notebook.codes) <= SHORT_CELLS
    assert sum(map(len, reading)) <= SHORT_LINES


def test_the_text_is_short(notebook):
    """What a reader has to get through who unfolds nothing."""
    texts = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    text = re.sub(r"<details>.*?</details>", "", "\n".join(texts), flags=re.DOTALL)
    words = re.sub(r"\]\([^)]*\)", "]", text).split()  # without the addresses of links
    assert len(words) <= SHORT_WORDS


def test_tables_are_no_wider_than_a_page(notebook):
    """JupyterLab wraps a line of more characters, beside its list of files at 1300 pixels."""
    printed = [output.get("text", "") for cell in notebook.codes for output in cell.outputs]
    lines = [line for text in printed for line in text.splitlines()]
    columns = [line for line in lines if "  " in line.strip()]  # and no running text
    assert [line for line in columns if len(line) > PRINTED_COLUMNS] == []


def test_sections_in_order(notebook):
    headings = [
        line
        for cell in notebook.cells
        if cell.cell_type == "markdown"
        for line in cell.source.splitlines()
        if line.startswith("## ") and OWN_SECTION not in line
    ]
    assert len(headings) == len(SECTIONS)
    assert [(h, s) for h, s in zip(headings, SECTIONS) if s not in h] == []


def test_header_says_what_it_costs_and_where_the_code_is(notebook):
    header = notebook.cells[0].source
    assert header.splitlines()[0].startswith("# ")
    assert header.splitlines()[0].endswith("?")
    assert int(BUDGET.search(header)[1]) <= LONGEST_S
    taught = re.findall(r"`(minomni/[\w/]+\.py)`", header)
    assert taught
    assert all((ROOT / path).is_file() for path in taught)


def test_all_notebooks_run_in_twelve_minutes_on_two_cores():
    headers = [nbformat.read(path, as_version=4).cells[0].source for path in NOTEBOOKS]
    assert sum(int(BUDGET.search(header)[1]) for header in headers) <= ALL_S


def defined(source: str) -> dict[str, str]:
    """Functions and classes of a source -> {what they are without name and docstring: name}; stubs
    are left out.
    """
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


@cache
def defined_in_package() -> dict[str, str]:
    package = {}
    for path in (ROOT / "minomni").rglob("*.py"):
        package |= defined(path.read_text())
    return package


def test_nothing_is_copied_from_the_package(notebook):
    """What a notebook derives must differ from what it is compared with, or the comparison proves
    nothing.
    """
    package = defined_in_package()
    own = {}
    for cell in notebook.codes:
        own |= defined(cell.source)
    assert own
    assert {own[key]: package[key] for key in own.keys() & package.keys()} == {}


WRAPPERS = {
    "clone",
    "detach",
    "contiguous",
    "float",
    "double",
    "tolist",
    "tensor",
    "as_tensor",
    "list",
    "tuple",
}


def core(node: ast.expr) -> str:
    """An expression without what copies or converts it."""
    while (
        isinstance(node, ast.Call)
        and getattr(node.func, "attr", getattr(node.func, "id", "")) in WRAPPERS
    ):
        is_method = isinstance(node.func, ast.Attribute) and node.func.attr not in (
            "tensor",
            "as_tensor",
        )
        inside = [node.func.value] if is_method else node.args[:1]
        if not inside:
            break
        node = inside[0]
    return ast.unparse(node)


def is_fixed(node: ast.AST, known: set[str] = frozenset()) -> bool:
    """Whether an expression is what it is whatever the package and the earlier cells do: it reads
    nothing of them.
    """
    return all(
        name.id in known or hasattr(builtins, name.id)
        for name in ast.walk(node)
        if isinstance(name, ast.Name)
    )


def fixed_names(tree: ast.Module) -> set[str]:
    """Names that a cell gives nothing but numbers and texts written in the cell itself."""
    stores = [
        (name.id, node.iter if isinstance(node, (ast.For, ast.comprehension)) else node.value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Assign, ast.AugAssign, ast.For, ast.comprehension))
        for target in getattr(node, "targets", None) or [node.target]
        for name in ast.walk(target)
        if isinstance(name, ast.Name)
    ]
    known = {name for name, _ in stores}
    while fickle := {
        name for name, value in stores if name in known and not is_fixed(value, known)
    }:
        known -= fickle
    return known


def vacuous(source: str) -> list[str]:
    """The checks of a cell that could never fail."""
    tree = ast.parse(source)
    known, found, says = fixed_names(tree), [], []
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert):
            test, sides = node.test, [node.test]
            if isinstance(test, ast.Compare):
                sides = [test.left, *test.comparators]
            always = (
                isinstance(test, ast.Tuple)
                or len(sides) > 1
                and len({core(side) for side in sides}) == 1
            )
            found += [ast.unparse(node)] if always or is_fixed(test, known) else []
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "same":
            says += node.args[1:]
            if any(isinstance(argument, ast.Starred) for argument in node.args):
                continue  # several at once, in a way that says nothing of each
            mine, theirs, *tolerance = [*node.args[1:], *[key.value for key in node.keywords]]
            loose = (
                tolerance
                and isinstance(tolerance[0], ast.Constant)
                and tolerance[0].value > LOOSEST
            )
            if (
                core(mine) == core(theirs)
                or is_fixed(mine, known)
                and is_fixed(theirs, known)
                or loose
            ):
                found.append(ast.unparse(node))
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print":
            says += node.args
    says += [tree.body[-1].value] if tree.body and isinstance(tree.body[-1], ast.Expr) else []
    if source.startswith(MARK) and all(is_fixed(said, known) for said in says):
        found.append("nothing but what is written there is printed")
    return found


def test_no_check_is_vacuous(notebook):
    assert {
        cell.source: checks for cell in notebook.codes if (checks := vacuous(cell.source))
    } == {}


@pytest.mark.parametrize(
    "source",
    [
        "assert True",
        "assert 1 + 1 == 2",
        "assert x == x",
        "assert x.tolist() == x.clone().tolist()",
        "assert (x == y, 'no')",
        "same('x', x, x)",
        "same('x', x.clone(), x)",
        "same('x', torch.tensor(x), x)",
        "same('x', [1, 2], (1, 2))",
        "same('x', x, y, tolerance=1.0)",
        "same('x', x, y, 0.5)",
        f"{MARK}\nprint('loss fell ✓')",
        f"{MARK}\nlen('four')",
        f"{MARK}\nfor i in range(3):\n    y = 2 * i\n    print(y)",
        f"{MARK}\nx = compute()",
    ],
)
def test_vacuous_checks_are_found(source):
    assert vacuous(source)


@pytest.mark.parametrize(
    "source",
    [
        "assert x",
        "assert x == 2",
        "assert len(x) == len(y)",
        "same('x', x, [1, 2])",
        "same('x', x, f(x), 1e-4)",
        f"{MARK}\nprint('shape', list(x.shape))",
        f"{MARK}\nfor i in range(3):\n    y = f(i)\n    print(y)",
        f"{MARK}\ndef f(n): return 2 * n\n\n\nprint(f(2))",
        f"{MARK}\ngrade(f, ((1,), 2))",
    ],
)
def test_real_checks_are_not_called_vacuous(source):
    assert vacuous(source) == []


@cache
def taught() -> set[str]:
    """The files and folders that the headers of all notebooks name as theirs."""
    headers = [nbformat.read(path, as_version=4).cells[0].source for path in NOTEBOOKS]
    return set(re.findall(r"`(minomni/[\w/]+(?:\.py|/))`", "\n".join(headers)))


def test_every_file_of_the_package_is_taught():
    """By its name or its folder's. Files without a line of code have nothing to teach."""
    missing = []
    for path in sorted((ROOT / "minomni").rglob("*.py")):
        name = path.relative_to(ROOT).as_posix()
        has_code = len(ast.parse(path.read_text(encoding="utf-8")).body) > 1
        folders = {f"{folder.as_posix()}/" for folder in path.relative_to(ROOT).parents}
        if has_code and not ({name} | folders) & taught():
            missing.append(name)
    assert missing == []


def test_the_first_lines_are_the_same_everywhere(notebook):
    assert notebook.codes[0].source.startswith(BEGINNING)


@pytest.mark.parametrize("folder", ["", "notebooks"])
def test_the_first_lines_find_the_package(folder):
    """Jupyter starts a kernel in its notebook's folder (test_browser.py opens servers in both);
    others do in the root.
    """
    code = f"{BEGINNING}import minomni\n\nprint(minomni.__file__)"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / folder, capture_output=True, text=True, check=True
    )
    assert Path(found.stdout.strip()).resolve() == ROOT / "minomni" / "__init__.py"


def test_shown_source_is_what_is_on_disk(notebook):
    """Otherwise the package has changed since the notebook was refreshed: python
    tests/refresh_notebooks.py.
    """
    package = "\n".join(
        path.read_text(encoding="utf-8") for path in sorted((ROOT / "minomni").rglob("*.py"))
    )
    package += package.replace("\n    ", "\n")  # methods are shown without their indentation
    shown = [
        output.data["text/plain"]
        for cell in notebook.codes
        if cell.source.startswith("show(")
        for output in cell.outputs
    ]
    assert shown
    parts = [part for text in shown for part in without_marks(text).split("\n\n\n")]
    assert [part for part in parts if part not in package] == []


def without_marks(text: str) -> str:
    """Shown source without the lines that stand for what is left out."""
    return "\n".join(line for line in text.splitlines() if line.strip() != CUT)


def shown_now(notebook) -> dict[str, str]:
    """{cell: what it shows} of the cells that show source, as the package is now."""
    trees = [ast.parse(cell.source) for cell in notebook.codes]
    imports = [
        ast.unparse(node)
        for tree in trees
        for node in tree.body
        if isinstance(node, (ast.Import, ast.ImportFrom))
    ]
    names: dict = {}
    exec("\n".join(imports), names)
    shown = {}

    def record(*objects, begin="", end=""):
        parts = [source_of(thing, begin, end) for thing in objects]
        shown[source] = "\n\n\n".join(parts)

    names["show"] = record
    for source in [cell.source for cell in notebook.codes if cell.source.startswith("show(")]:
        exec(source, names)
    return shown


def test_source_is_shown_in_bites(notebook):
    """A reader takes in a screen at a time, and a page has no room for longer lines."""
    shown = shown_now(notebook)
    assert shown
    long = {source: len(text.splitlines()) for source, text in shown.items()}
    assert {source: n for source, n in long.items() if n > SHOWN_LINES} == {}
    lines = [line for text in shown.values() for line in text.splitlines()]
    assert [line for line in lines if len(line) > SHOWN_COLUMNS] == []


def test_a_part_of_a_function_is_shown_with_marks():
    whole = source_of(without_marks)
    assert source_of(without_marks, end='"""').endswith(f"    {CUT}")
    part = source_of(without_marks, begin="return")
    assert part.splitlines()[0] == f"    {CUT}"
    assert without_marks(part) in whole
    with pytest.raises(ValueError, match="no line contains 'nothing of this'"):
        source_of(without_marks, begin="nothing of this")


def test_copies_would_be_found():
    assert (
        defined('def f(x):\n    "Doc."\n    return x + 1').keys()
        == defined("def g(x): return x + 1").keys()
    )
    assert defined("def f(x): ...") == {}


def test_refreshing_takes_out_what_belongs_to_a_machine():
    pieces = [
        new_output("stream", name="stdout", text=text) for text in ("read ", f"{CHECKOUT}/run.py\n")
    ]
    cell = new_code_cell(
        "x", execution_count=9, outputs=pieces, metadata={"execution": {"started": "today"}}
    )
    book = new_notebook(cells=[cell], metadata={"widgets": {"state": {}}})
    clean(book)
    assert (cell.execution_count, cell.metadata, len(cell.outputs)) == (1, {}, 1)
    assert cell.outputs[0].text == "read run.py\n"
    assert "widgets" not in book.metadata


@pytest.mark.parametrize(("colors", "kind"), [(100, "image/png"), (60_000, "image/jpeg")])
def test_figures_keep_a_palette_and_photographs_become_jpegs(colors, kind):
    numbers = torch.arange(90_000) % colors
    pixels = torch.stack([numbers % 256, numbers // 256, numbers % 7], -1).view(300, 300, 3).byte()
    plt.imsave(file := BytesIO(), pixels.numpy(), format="png")
    [(found, data)] = small(base64.b64encode(file.getvalue()).decode()).items()
    assert found == kind
    assert Image.open(BytesIO(base64.b64decode(data))).size == (300, 300)


def test_a_figure_at_double_resolution_keeps_the_size_at_which_it_is_shown():
    plt.imsave(file := BytesIO(), torch.zeros(8, 6, 3).numpy(), format="png")
    png, size = base64.b64encode(file.getvalue()).decode(), {"width": 3, "height": 4}
    output = new_output("display_data", {"image/png": png}, metadata={"image/png": size})
    cell = new_code_cell("x", outputs=[output])
    clean(new_notebook(cells=[cell]))
    assert cell.outputs[0].metadata == {"image/png": size}


def test_sounds_become_flac_without_losing_a_sample():
    samples = (torch.rand(4000) * 60_000 - 30_000).short().numpy()
    soundfile.write(file := BytesIO(), samples, 16_000, format="WAV", subtype="PCM_16")
    data = base64.b64encode(file.getvalue()).decode()
    page = f'<audio><source src="data:audio/wav;base64,{data}" type="audio/wav" /></audio>'
    found = re.search(r'src="data:audio/flac;base64,([^"]+)" type="audio/flac"', with_flac(page))
    heard, rate = soundfile.read(BytesIO(base64.b64decode(found[1])), dtype="int16")
    assert rate == 16_000
    assert (heard == samples).all()


@pytest.fixture
def controls(monkeypatch):
    """What explore() hands to its buttons and sliders."""
    plt.switch_backend("agg")
    handed = []
    monkeypatch.setattr(
        viz, "_controls", lambda draw, size, unit, *settings: handed.append(settings)
    )
    yield handed
    plt.close("all")


def test_explore_draws_every_setting_and_adds_controls_only_for_a_reader(controls, monkeypatch):
    drawn = []

    def draw(ax, **settings):
        drawn.append(settings)

    viz.explore(draw, a=(1, 2, 3), b=(4, 5, 6))
    assert drawn == [{"a": a, "b": 5} for a in (1, 2, 3)]
    assert controls == []
    assert plt.gcf().get_suptitle() == "b = 5"
    assert [ax.get_title() for ax in plt.gcf().axes] == [
        "a = 1",
        "a = 2",
        "a = 3",
    ]
    monkeypatch.setattr(viz, "is_interactive", lambda: True)
    viz.explore(draw, a=(1, 2))
    assert controls == []  # the row of plots shows both
    viz.explore(draw, slide={"a": range(9)}, a=(1, 2))
    viz.explore(draw, a=(1,), b=(2, 3))
    assert controls == [({"a": (1, 2)}, {"a": range(9)}), ({"a": (1,), "b": (2, 3)}, {})]


def test_a_figure_that_follows_a_control_says_at_which_setting_it_is(monkeypatch):
    plt.switch_backend("agg")
    titles = []
    monkeypatch.setattr(plt, "show", lambda: titles.append(plt.gca().get_title()))
    monkeypatch.setattr("ipywidgets.interact", lambda redraw, **controls: redraw(a=3, b=0.5))
    ranges = {"a": (1, 3), "b": (0.5,)}
    viz._controls(lambda ax, **settings: None, 2, " s", ranges, {})
    viz._controls(lambda ax, **settings: ax.set_title("its own"), 2, " s", ranges, {})
    assert titles == ["a = 3 s, b = 0.5 s", "its own"]
    plt.close("all")


def test_categories_have_buttons_and_ordered_quantities_sliders():
    buttons = viz._buttons(("Anna", "Karl"), "Karl")
    assert type(buttons).__name__ == "ToggleButtons"
    assert (buttons.value, [label for label, _ in buttons.options]) == ("Karl", ["Anna", "Karl"])
    slider = viz._slider(range(0, 9, 2), 4)
    assert type(slider).__name__ == "SelectionSlider"
    assert (slider.value, slider.options) == (4, (0, 2, 4, 6, 8))


def test_the_order_of_patches_is_drawn_cell_by_cell():
    numbers = re.findall(r">(\d+)</text>", viz.cell_order().data)
    assert list(map(int, numbers[:16])) == list(range(16))
    assert list(map(int, numbers[16:])) == [0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15]


def test_a_diagram_that_may_not_be_shown_says_how_to_see_it():
    """JupyterLab shows no SVG of a notebook that its reader has not run."""
    assert repr(viz.flow("mel", "encoder", "tokens")) == "(a diagram: run this cell to see it)"


def test_a_mel_is_labeled_in_hz(controls):
    ax = viz.axes()
    viz.mel(ax, torch.zeros(80, 10), bar=False, cmap="coolwarm")
    assert ax.get_ylabel() == "Hz"
    assert [label.get_text() for label in ax.get_yticklabels()][-1] == "8,000"
    assert ax.get_images()[0].get_cmap().name == "coolwarm"


def test_squares_are_lines_from_the_top(controls):
    ax = viz.axes()
    viz.squares(ax, {"first": ["audio", "image"], "second": ["text"]})
    assert [(bar.get_x() + bar.get_width() / 2, bar.get_y() + 0.4) for bar in ax.patches] == [
        (0, 0),
        (1, 0),
        (0, 1),
    ]
    assert [label.get_text() for label in ax.get_yticklabels()] == [
        "first",
        "second",
    ]
    assert ax.yaxis_inverted()


@pytest.mark.parametrize("length", [3, viz.MAX_NUMBERED_TOKENS, viz.MAX_NUMBERED_TOKENS + 1])
def test_tmrope_pictures_name_the_axes_and_the_kinds(length, controls):
    tokens = TINY.thinker.tokens
    kinds = viz.modalities(
        [7, tokens.audio_bos, tokens.audio] + [tokens.image] * (length - 3), tokens
    )
    assert kinds[:3] == ["text", "marker", "audio"]
    assert set(kinds[3:]) <= {"image"}
    viz.tmrope(torch.arange(length).expand(3, -1), kinds, "title")
    plots = plt.gcf().axes
    names = (
        [p.get_ylabel() for p in plots]
        if len(plots) == 3
        else [t.get_text() for t in plots[0].get_yticklabels()]
    )
    assert names == list(viz.AXES)
    assert [t.get_text() for t in plots[0].get_legend().get_texts()] == [
        kind for kind in viz.COLORS if kind in kinds
    ]


def test_lattice_and_tint_lie_on_the_picture(controls):
    ax = viz.axes()
    viz.draw_image(ax, torch.zeros(56, 84, 3).numpy())
    viz.tint(ax, torch.arange(24).view(4, 6) % 2 == 1, 14)
    viz.lattice(ax, 56, 84, 28)
    under, over = ax.get_images()
    assert over.get_extent() == [-0.5, 83.5, 55.5, -0.5] == list(under.get_extent())
    places = [
        [float(line[0, axis]) for line in lines.get_segments()]
        for axis, lines in zip((1, 0), ax.collections)
    ]
    assert places == [[27.5], [27.5, 55.5]]
