"""Solutions of the exercises of notebook 05. The graders are in the notebook."""

import unicodedata
from collections import Counter


def unmerged(text):
    return len(unicodedata.normalize("NFC", text).encode())


def next_merge(words):
    counts = Counter()
    for word, often in words.items():
        for pair in zip(word, word[1:]):
            counts[pair] += often
    return min(counts, key=lambda pair: (-counts[pair], pair))


def learns(row):
    marks, answering = [], False
    for i, token in enumerate(row):
        marks.append(int(answering))
        if token == "<|im_end|>":
            answering = False
        if row[max(i - 2, 0) : i + 1] == ["<|im_start|>", "assistant", "\n"]:
            answering = True
    return marks


def showable(data):
    return len(data.decode("utf-8", errors="ignore").encode())
