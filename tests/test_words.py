"""One word for one thing: the package and its documents use the standard terms of the field."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A word that is not used -> what to write instead.
STANDARD = {
    # training and evaluation
    "school": "training",
    "teacher": "example builder",
    "lesson": "example",
    "lessons": "examples, stage",
    "graduate": "export, load_stages",
    "graduation": "export",
    "lane": "worker",
    "lanes": "workers",
    "leash": "beta",
    "learnt": "learned",
    "chance": "random (weights), probability",
    "crowd": "synthetic speakers",
    "wishes": "prompts",
    # model
    "ears": "audio encoder",
    "eyes": "vision encoder",
    "thoughts": "hidden states",
    "paint": "generate",
    "paints": "generates",
    "painted": "generated",
    "swift": "Euler solver",
    "throat": "formants",
    "hurry": "tempo",
    # sentences
    "lest": "so that ... not",
    "nobody": "no one, nothing",
    "somebody": "someone, a user",
    "whoever": "the caller",
    "heaped": "collected",
    # one spelling, PyTorch's
    "behaviour": "behavior",
    "centre": "center",
    "colour": "color",
    "colours": "colors",
    "favour": "favor",
    "grey": "gray",
    "initialise": "initialize",
    "initialised": "initialized",
    "minimised": "minimized",
    "neighbourhood": "neighborhood",
    "normalise": "normalize",
    "normalised": "normalized",
    "optimisation": "optimization",
    "penalise": "penalize",
    "quantise": "quantize",
    "quantised": "quantized",
    "recognise": "recognize",
    "recognised": "recognized",
    "synthesise": "synthesize",
    "synthesised": "synthesized",
    "synthesiser": "synthesizer",
}
# Terms of the field, other programs, and seeds, whose random numbers depend on their text.
ALLOWED = re.compile(r"teacher[ _-]forc\w+|ms-swift|-ears-|-eyes-")
CHAPTERS = re.compile(r"<!-- chapters -->.*?<!-- end of chapters -->", re.DOTALL)  # of notebooks
FILES = [
    *sorted((ROOT / "minomni").rglob("*.py")),
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "run.py",
    *(path for path in sorted((ROOT / "tests").rglob("*.py")) if path.parent.name != "notebook"),
]
FILES.remove(Path(__file__))  # lists the words


def words(text: str) -> set[str]:
    """The words of a text in lower case; identifiers are split at _ and at capitals."""
    text = CHAPTERS.sub(" ", text)
    text = ALLOWED.sub(" ", text)
    text = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", text)
    return {word.lower() for word in re.findall(r"[A-Za-z]+", text)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_standard_words(path):
    found = words(path.read_text(encoding="utf-8")) & STANDARD.keys()
    assert {word: STANDARD[word] for word in sorted(found)} == {}


def test_words_of_a_text():
    assert words("EarsStage, teacher_forced and leash_of") == {
        "ears",
        "stage",
        "and",
        "leash",
        "of",
    }
