"""The chapters: their cells, and the table of them in README.md and README_zh.md."""

import re
from functools import cache
from pathlib import Path

import nbformat

ROOT = Path(__file__).parents[1]
TABLE = re.compile(r"(?<=<!-- chapters -->\n).*?(?=<!-- end of chapters -->)", re.DOTALL)
HEADS = {
    "README.md": "| chapter | question | minutes |\n|---|---|---|\n",
    "README_zh.md": "| 章 | 问题 | 分钟 |\n|---|---|---|\n",
}
CHINESE = {
    "00": "从你提问到听见第一个字，中间发生了什么？",
    "01": "模型怎样读懂气压？",
    "02": "怎样以两秒为一块，听一段没有尽头的声音？",
    "03": "图像怎样变成一串向量？",
    "04": "怎样看一张大图，又不必让每一点都与所有点相比？",
    "05": "文字、声音和图像怎样变成一个序列？",
    "06": "一个 token 在何时、何处？",
    "07": "解码器要怎样，才能又听又看？",
    "08": "语音怎样变成少量符号？",
    "09": "思想怎样变成语音符号？",
    "10": "噪声怎样变成梅尔谱？",
    "11": "声音的图画怎样变回声音？",
    "12": "句子还没想完，怎么就能开口？",
    "13": "怎样从零养大一个小模型？",
    "14": "怎样教它说话不含糊？",
    "15": "同一份代码怎样装下七十亿权重？",
    "16": "一步走多远，朝哪个方向走，动哪些权重？",
}


@cache
def cells(number: str) -> list:
    """The cells of a chapter, not to be changed. Reading them takes a tenth of a second."""
    (path,) = (ROOT / "notebooks").glob(f"{number}_*.ipynb")
    return nbformat.read(path, as_version=4).cells


def prose(number: str) -> list[str]:
    """The texts of a chapter."""
    return [cell.source for cell in cells(number) if cell.cell_type == "markdown"]


def chapters() -> list[dict[str, str]]:
    """Name, number, question and reading minutes of each notebook, from its first cell."""
    paths = sorted((ROOT / "notebooks").glob("*.ipynb"))
    return [{"name": path.name, **parse_header(cells(path.name[:2])[0].source)} for path in paths]


def parse_header(header: str) -> dict[str, str]:
    """The first cell of a notebook -> number, question and reading minutes."""
    number, question = re.match(r"# (\d\d) · (.*)", header).groups()
    minutes = re.search(r"about (\d+) minutes reading", header)[1]
    return {"number": number, "question": question, "minutes": minutes}


def table(readme: str) -> str:
    """The lines of the table in one of the READMEs."""
    lines = [HEADS[readme]]
    for chapter in chapters():
        number = chapter["number"]
        question = CHINESE[number] if readme == "README_zh.md" else chapter["question"]
        link = f"[{number}](notebooks/{chapter['name']})"
        lines.append(f"| {link} | {question} | {chapter['minutes']} |\n")
    return "".join(lines)


def write() -> None:
    """Bring the table in both READMEs up to date."""
    for readme in HEADS:
        path = ROOT / readme
        text = path.read_text(encoding="utf-8")
        new = TABLE.sub(lambda _, readme=readme: table(readme), text)
        path.write_text(new, encoding="utf-8")
