"""The table of chapters in README.md and README_zh.md, written from the headers of the notebooks."""

import re
from pathlib import Path

import nbformat

ROOT = Path(__file__).parents[1]
TABLE = re.compile(r"(?<=<!-- chapters -->\n).*?(?=<!-- end of chapters -->)", re.DOTALL)
HEADS = {
    "README.md": "| chapter | question | what you build | reading | cells run in |\n|---|---|---|---|---|\n",
    "README_zh.md": "| 章 | 问题 | 动手实现 | 阅读 | 运行 |\n|---|---|---|---|---|\n",
}
CHINESE = {
    "00": (
        "从你提问到听见第一个字，中间发生了什么？",
        "不用缓存，手工走完从图片和语音提问到语音回答的全程",
    ),
    "01": ("模型怎样读懂气压？", "分帧、加窗、傅里叶变换、梅尔滤波与取对数"),
    "02": ("怎样以两秒为一块，听一段没有尽头的声音？", "卷积、位置向量、分块注意力与池化"),
    "03": ("图片怎样变成一串数字？", "选尺寸、缩放、切块与视频抽帧"),
    "04": (
        "怎样看一张大图，又不必让每一点都与所有点相比？",
        "带显式掩码的视觉编码器、复数形式的旋转位置编码与合并",
    ),
    "05": ("四种感官怎样排成一行？", "字节级 BPE 分词器、ChatML 模板、音画交错"),
    "06": ("一个 token 在何时、何处？", "文本、声音、图片和有声视频的 TMRoPE 三维位置"),
    "07": ("解码器要怎样，才能又听又看？", "不用缓存的完整解码器，以及下一个词的选取"),
    "08": ("语音怎样变成少量符号？", "语音编解码器：有限标量量化"),
    "09": ("思想怎样变成语音符号？", "Talker：读 Thinker 的状态与文字，逐个写出语音编码"),
    "10": ("噪声怎样变成梅尔谱？", "滑动窗口 DiT 与流匹配"),
    "11": ("声音的图画怎样变回声音？", "转置卷积、Snake 激活、抗混叠滤波与整个声码器"),
    "12": ("句子还没想完，怎么就能开口？", "旧的先后顺序、共用噪声的窗口、分段的声码器"),
    "13": ("怎样从零养大一个小模型？", "从数据到各训练阶段"),
    "14": ("怎样教它说话不含糊？", "面向语音的 DPO"),
    "15": ("同一份代码怎样装下七十亿权重？", "读写官方格式的检查点"),
}


def chapters() -> list[dict[str, str]]:
    """What the header of each notebook says of it: name, number, question, build, minutes and
    seconds.
    """
    return [
        {"name": path.name, **said(nbformat.read(path, as_version=4).cells[0].source)}
        for path in sorted((ROOT / "notebooks").glob("*.ipynb"))
    ]


def said(header: str) -> dict[str, str]:
    """What a header says. The way in which it is proved is left out of what is built."""
    number, question = re.match(r"# (\d\d) · (.*)", header).groups()
    build = re.search(r"\*\*You will build\*\* \| (.*) \|", header)[1]
    minutes, seconds = re.search(r"about (\d+) minutes reading; .* run in (\d+) s", header).groups()
    return {
        "number": number,
        "question": question,
        "minutes": minutes,
        "seconds": seconds,
        "build": re.split(r"[,;]? in about \d|[,;]? and prove", build)[0],
    }


def table(readme: str) -> str:
    """The lines of the table in one of the READMEs."""
    lines = HEADS[readme]
    for x in chapters():
        chinese = CHINESE[x["number"]]
        question, build = chinese if readme == "README_zh.md" else (x["question"], x["build"])
        minutes, seconds = ("分钟", "秒") if readme == "README_zh.md" else ("min", "s")
        lines += (
            f"| [{x['number']}](notebooks/{x['name']}) | {question} | {build} "
            f"| {x['minutes']} {minutes} | {x['seconds']} {seconds} |\n"
        )
    return lines


def write() -> None:
    """Bring the table in both READMEs up to date."""
    for readme in HEADS:
        path = ROOT / readme
        text = path.read_text(encoding="utf-8")
        path.write_text(TABLE.sub(lambda _: table(readme), text), encoding="utf-8")
