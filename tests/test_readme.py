"""The README holds what it promises: its tree is the disk, its commands exist, its links lead somewhere."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from minomni.__main__ import parser

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
WHOLE_FOLDERS = ("tests/golden/", "data_samples/*/")  # one line for all that is in them
BRANCH = re.compile(r"(?P<indent>(?:│   |    )*)[├└]── (?P<name>\S+)(?: +(?P<phrase>\S.*))?")
FENCE = re.compile(r"^```(?P<language>\w*)\n(?P<body>.*?)^```", re.MULTILINE | re.DOTALL)


def fences(*languages: str) -> list[str]:
    """The README's code blocks in any of the languages."""
    blocks = FENCE.finditer(README.read_text(encoding="utf-8"))
    return [block["body"] for block in blocks if block["language"] in languages]


def read_tree(block: str) -> dict[str, str]:
    """A drawn tree -> {path: phrase}, folders with a / at their end."""
    tree, folders = {}, []
    for line in block.splitlines():
        if match := BRANCH.fullmatch(line.rstrip()):
            folders = folders[: len(match["indent"]) // 4]
            path = "".join(folders) + match["name"]
            assert path not in tree, f"{path} stands twice in the README's tree"
            tree[path] = match["phrase"] or ""
            if path.endswith("/"):
                folders = [*folders, match["name"]]
    return tree


@pytest.fixture(scope="module")
def tree() -> dict[str, str]:
    blocks = [block for block in fences("", "text") if re.search(r"[├└]── minomni/", block)]
    assert len(blocks) == 1, f"the README has {len(blocks)} trees that begin in minomni/; expected one"
    return read_tree(blocks[0])


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    try:
        listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no git checkout here, so nothing says which files belong to the project")
    return [name for name in listing.stdout.split("\0") if name and (ROOT / name).exists()]


def whole_folder(path: str) -> str | None:
    """The folder that is one line of the tree and holds this path."""
    for pattern in WHOLE_FOLDERS:
        if match := re.match(pattern.replace("*", "[^/]+"), path):
            return match[0]
    return None


def expected(tracked: list[str]) -> set[str]:
    """What the tree has to name: every file but those of whole folders, and every folder.

    A folder's phrase speaks for its __init__.py too, except for the package's own, which holds load().
    """
    files = [path for path in tracked if not path.endswith("/__init__.py") or path == "minomni/__init__.py"]
    names = {whole_folder(path) or path for path in files}
    folders = {f"{folder.as_posix()}/" for name in names for folder in Path(name).parents if folder != Path(".")}
    return names | folders


def test_tree_is_the_disk(tree, tracked):
    wanted = expected(tracked)
    assert sorted(wanted - tree.keys()) == [], "on disk, not in the README's tree"
    assert sorted(tree.keys() - wanted) == [], "in the README's tree, not on disk"


def test_every_line_of_the_tree_has_a_phrase(tree):
    assert [path for path, phrase in tree.items() if len(phrase) < 8] == []


def commands() -> list[list[str]]:
    """The commands in the README's shell blocks, as lists of words."""
    lines = "\n".join(fences("bash", "sh", "shell", "console")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line.removeprefix("$ "), comments=True))]


def test_commands_exist():
    found = commands()
    assert ["python", "run.py"] in found and ["python", "run.py", "test"] in found
    for words in found:
        if words[0] in ("python", "python3") and words[1:3] == ["-m", "minomni"]:
            parser().parse_args(words[3:])  # raises for options and commands that are not there
        elif words[0] in ("python", "python3") and words[1] != "-m":
            assert (ROOT / words[1]).is_file(), words
        elif words[0] == "make":
            assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text(), words
        for option, value in zip(words, words[1:]):
            assert option != "-r" or (ROOT / value).is_file(), words


def test_links_lead_somewhere():
    links = re.findall(r"\]\((?!https?://|#|mailto:)([^)#\s]+)", README.read_text(encoding="utf-8"))
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_reading_a_tree():
    drawn = "x/\n├── a/   phrase a\n│   ├── b.py   phrase b\n│   └── c/   phrase c\n│       └── d.py   phrase d\n└── e   phrase e\n"
    assert read_tree(drawn) == {"a/": "phrase a", "a/b.py": "phrase b", "a/c/": "phrase c", "a/c/d.py": "phrase d",
                                "e": "phrase e"}
    assert expected(["tests/golden/a.npz", "tests/x.py", "data_samples/speech/0.flac"]) == {
        "tests/", "tests/golden/", "tests/x.py", "data_samples/", "data_samples/speech/"}
