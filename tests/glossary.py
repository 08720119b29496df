"""The links from the chapters to the glossary: python tests/glossary.py writes them anew.

In each chapter a term is linked once: where it is introduced in bold, otherwise where it is first
used. A term that is also an ordinary word is linked where it is bold only.
"""

import re
from pathlib import Path

import nbformat

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
ROW = re.compile(r'^\| <a id="(?P<anchor>[\w-]+)"></a>(?P<names>[^|]+?) \|', re.MULTILINE)
LINKED = re.compile(r"\[([^\[\]\n]*)\]\(glossary\.md#[^)]*\)")
BOLD = re.compile(r"\*\*([^*\n]+)\*\*")
# Words that mean something else, too.
ORDINARY = {
    "activations",
    "bin",
    "block",
    "channel",
    "chosen",
    "code",
    "decoder",
    "discrete",
    "encoder",
    "frame",
    "frozen",
    "greedy",
    "interpolation",
    "look-ahead",
    "margin",
    "merge",
    "merges",
    "patch",
    "pixel",
    "power",
    "query",
    "key",
    "value",
    "rank",
    "rejected",
    "sampling",
    "seed",
    "semantic",
    "acoustic",
    "shard",
    "step",
    "streaming",
    "token",
    "window",
    "world",
}
# What holds no running text: code, formulas, other links, tags, headings, folded parts.
MASKED = re.compile(
    r"```.*?```|<details>.*?</details>|\$\$.*?\$\$|`[^`]*`|\$[^$\n]*\$|\[[^\[\]]*\]\([^)]*\)"
    r"|<[^>]+>|^#[^\n]*",
    re.DOTALL | re.MULTILINE,
)
TABLE_LINE = re.compile(r"^\|.*$", re.MULTILINE)


def unlinked(text: str) -> str:
    """A text without its links to the glossary: the words alone."""
    return LINKED.sub(r"\1", text)


def terms(glossary: str) -> dict[str, str]:
    """{name or second name of a term: its anchor} of the glossary's text."""
    found = {}
    for row in ROW.finditer(glossary):
        for name in row["names"].split(", "):
            found[name] = row["anchor"]
    return found


def read_terms() -> dict[str, str]:
    return terms((NOTEBOOKS / "glossary.md").read_text(encoding="utf-8"))


def link(texts: list[str], names: dict[str, str]) -> list[str]:
    """The Markdown cells of a chapter with a link at the first use of each term."""
    texts = [unlinked(text) for text in texts]
    masks = [masked(text, is_header=i == 0) for i, text in enumerate(texts)]
    places = []  # (cell, begin, end, anchor)
    done: set[str] = set()
    for find in (bold_use, first_use):
        for name in sorted(names, key=lambda name: (-len(name), name)):
            anchor = names[name]
            if anchor in done:
                continue
            place = find(masks, name)
            if place is None:
                continue
            cell, begin, end = place
            places.append((cell, begin, end, anchor))
            masks[cell] = masks[cell][:begin] + " " * (end - begin) + masks[cell][end:]
            done.add(anchor)
    # From the last to the first, so that earlier places stay where they are.
    for cell, begin, end, anchor in sorted(places, reverse=True):
        text = texts[cell]
        texts[cell] = f"{text[:begin]}[{text[begin:end]}](glossary.md#{anchor}){text[end:]}"
    return texts


def masked(text: str, is_header: bool) -> str:
    """A text of the same length with blanks where no link may stand."""
    blank = MASKED.sub(lambda part: " " * len(part[0]), text)
    return TABLE_LINE.sub(lambda part: " " * len(part[0]), blank) if is_header else blank


def pattern(name: str) -> str:
    """A regular expression for a term, in the singular or the plural."""
    return re.escape(name).replace(r"\ ", r"[ \n]") + "(?:s|es)?"


def bold_use(masks: list[str], name: str) -> tuple[int, int, int] | None:
    """Cell, begin and end of the first place where a term stands in bold, alone or explained."""
    for cell, text in enumerate(masks):
        for found in BOLD.finditer(text):
            inside = re.sub(r" \([^)]*\)$", "", found[1])
            if re.fullmatch(pattern(name), inside, re.IGNORECASE):
                return cell, found.start(), found.end()
    return None


def first_use(masks: list[str], name: str) -> tuple[int, int, int] | None:
    """Cell, begin and end of the first use of a term that is no ordinary word."""
    if name in ORDINARY:
        return None
    whole = re.compile(rf"(?<![\w*-]){pattern(name)}(?![\w*-])")
    for cell, text in enumerate(masks):
        found = whole.search(text)
        if found:
            return cell, found.start(), found.end()
    return None


def main() -> None:
    names = read_terms()
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        book = nbformat.read(path, as_version=4)
        cells = [cell for cell in book.cells if cell.cell_type == "markdown"]
        texts = link([cell.source for cell in cells], names)
        for cell, text in zip(cells, texts, strict=True):
            cell.source = text
        nbformat.write(book, path)
        print(f"{path.name}: {sum(text.count('(glossary.md#') for text in texts)} terms")


if __name__ == "__main__":
    main()
