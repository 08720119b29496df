"""The READMEs hold what they promise: the tree is the disk, commands exist, links lead somewhere,
both say the same.
"""

import re
import shlex
import subprocess
from pathlib import Path

import chapters
import pytest
import torch

from minomni.__main__ import parser
from minomni.config import SIZES
from minomni.omni import Omni

ROOT = Path(__file__).parents[1]
README, CHINESE = ROOT / "README.md", ROOT / "README_zh.md"
# sections whose first tables say the same
SECTIONS = {
    "The course": "课程",
    "Report card": "成绩单",
    "Speaking while thinking": "边想边说",
    "Three sizes": "三种大小",
    "What is often told about the release, and what it does": "常见说法与官方发布的实际做法",
}
WHOLE_FOLDERS = ("tests/golden/", "data_samples/*/")  # one line for all that is in them
BRANCH = re.compile(r"(?P<indent>(?:│   |    )*)[├└]── (?P<name>\S+)(?: +(?P<phrase>\S.*))?")
FENCE = re.compile(r"^```(?P<language>\w*)\n(?P<body>.*?)^```", re.MULTILINE | re.DOTALL)


def fences(*languages: str, readme: Path = README) -> list[str]:
    """The README's code blocks in any of the languages."""
    blocks = FENCE.finditer(readme.read_text(encoding="utf-8"))
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
    assert len(blocks) == 1, (
        f"the README has {len(blocks)} trees that begin in minomni/; expected one"
    )
    return read_tree(blocks[0])


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    try:
        listing = subprocess.run(
            ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
        )
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

    A folder's phrase speaks for its __init__.py too, except for the package's own, which holds
    load().
    """
    files = [
        path
        for path in tracked
        if not path.endswith("/__init__.py") or path == "minomni/__init__.py"
    ]
    names = {whole_folder(path) or path for path in files}
    folders = {
        f"{folder.as_posix()}/"
        for name in names
        for folder in Path(name).parents
        if folder != Path(".")
    }
    return names | folders


def test_tree_is_the_disk(tree, tracked):
    wanted = expected(tracked)
    assert sorted(wanted - tree.keys()) == [], "on disk, not in the README's tree"
    assert sorted(tree.keys() - wanted) == [], "in the README's tree, not on disk"


def test_every_line_of_the_tree_has_a_phrase(tree):
    assert [path for path, phrase in tree.items() if len(phrase) < 8] == []


def commands(readme: Path) -> list[list[str]]:
    """The commands in a README's shell blocks, as lists of words."""
    lines = (
        "\n".join(fences("bash", "sh", "shell", "console", readme=readme))
        .replace("\\\n", " ")
        .splitlines()
    )
    return [
        words for line in lines if (words := shlex.split(line.removeprefix("$ "), comments=True))
    ]


@pytest.mark.parametrize("readme", [README, CHINESE], ids=lambda path: path.stem)
def test_commands_exist(readme):
    found = commands(readme)
    assert ["python", "run.py"] in found
    assert ["python", "run.py", "test"] in found
    for words in found:
        if words[0] in ("python", "python3") and words[1:3] == ["-m", "minomni"]:
            parser().parse_args(words[3:])  # raises for options and commands that are not there
        elif words[0] in ("python", "python3") and words[1] != "-m":
            assert (ROOT / words[1]).is_file(), words
        elif words[0] == "make":
            assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text(), words
        for option, value in zip(words, words[1:]):
            assert option != "-r" or (ROOT / value).is_file(), words


@pytest.mark.parametrize("readme", [README, CHINESE], ids=lambda path: path.stem)
def test_links_lead_somewhere(readme):
    links = re.findall(r"\]\((?!https?://|#|mailto:)([^)#\s]+)", readme.read_text(encoding="utf-8"))
    assert [link for link in links if not (ROOT / link).exists()] == []


@pytest.mark.parametrize("readme", chapters.HEADS)
def test_the_table_of_chapters_is_what_the_notebooks_say(readme):
    """Otherwise: python tests/refresh_notebooks.py README."""
    assert chapters.TABLE.search((ROOT / readme).read_text(encoding="utf-8"))[0] == chapters.table(
        readme
    )


def rows(readme: Path, section: str) -> list[list[str]]:
    """The rows of the first table under a heading, its head left out."""
    text = readme.read_text(encoding="utf-8").split(f"\n## {section}\n")[1].split("\n## ")[0]
    table = re.search(r"(?:^\|.*\n)+", text, re.MULTILINE)[0]
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]
    ]


def facts(row: list[str]) -> tuple[str, list[str]]:
    """What a row says in any language: the name that code gives it, if it has one, and its numbers."""
    name = row[0] if re.fullmatch(r"[a-z]+(_[a-z]+)+|\[\d\d\].*", row[0]) else ""
    return name, sorted(re.findall(r"\d[\d,.]*\d|\d", " ".join(row)))


@pytest.mark.parametrize("section", SECTIONS)
def test_the_chinese_readme_says_the_same(section):
    english, chinese = rows(README, section), rows(CHINESE, SECTIONS[section])
    if section == "The course":  # what is built may name a number in one language alone
        english, chinese = ([row[:1] + row[3:] for row in table] for table in (english, chinese))
    if section == "Speaking while thinking":  # its last column is said in the text
        english = [row[:2] for row in english]
    assert len(english) > 5
    assert list(map(facts, chinese)) == list(map(facts, english))


def test_facts_of_a_row():
    assert facts(["asr_wer", "12.8%", "11.6% to 14.4%"]) == ("asr_wer", ["11.6", "12.8", "14.4"])
    assert facts(["DiT，层数 x 宽度", "6 x 1,024"]) == ("", ["1,024", "6"])


def test_reading_a_tree():
    drawn = "x/\n├── a/   phrase a\n│   ├── b.py   phrase b\n│   └── c/   phrase c\n│       └── d.py   phrase d\n└── e   phrase e\n"
    assert read_tree(drawn) == {
        "a/": "phrase a",
        "a/b.py": "phrase b",
        "a/c/": "phrase c",
        "a/c/d.py": "phrase d",
        "e": "phrase e",
    }
    assert expected(["tests/golden/a.npz", "tests/x.py", "data_samples/speech/0.flac"]) == {
        "tests/",
        "tests/golden/",
        "tests/x.py",
        "data_samples/",
        "data_samples/speech/",
    }


def test_parameters_are_those_of_the_sizes():
    names = {"parameters": "", "Talker": "talker.", "BigVGAN": "token2wav.code2wav_bigvgan_model."}
    for column, config in enumerate(SIZES.values(), start=1):
        with torch.device("meta"):
            parameters = dict(Omni(config).named_parameters())
        for row, prefix in names.items():
            line = re.search(rf"^\| {row} \|.*$", README.read_text(encoding="utf-8"), re.MULTILINE)[
                0
            ]
            count = sum(p.numel() for name, p in parameters.items() if name.startswith(prefix))
            assert line.split("|")[column + 1].strip() == f"{count:,}"
