"""One word for one thing: the package and its documents use the standard terms of the field."""

import json
import re
from pathlib import Path

import pytest
from glossary import unlinked

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
    "chances": "probabilities",
    "crowd": "synthetic speakers",
    "fingerprint": "hash, digest",
    "fingerprints": "hashes, digests",
    "graduates": "exports",
    "graduated": "exported",
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
# What the package and its main documents say in their place, besides: an image is what the model
# takes.
PACKAGE = {
    "picture": "image, plot or figure",
    "pictures": "images, plots or figures",
}
# What prose of notebooks says in their place, besides.
PROSE = {
    "dear": "expensive",
    "film": "video",
    "films": "videos",
    "habit": "behavior, convention",
    "knife": "patch size",
    "picture": "image, figure, spectrogram",
    "pictures": "images, figures",
    "purse": "token budget",
    "scalar": "dot (product)",
    "spread": "standard deviation",
    "swing": "cycle",
    "swings": "cycles",
    "walls": "mask",
}
CHAPTERS_IN_STANDARD_WORDS = [f"{number:02}" for number in range(17)]  # of the notebooks
# Terms of the field, other programs, and seeds, whose random numbers depend on their text.
ALLOWED = re.compile(
    r"teacher[ _-]forc\w+|ms-swift|-ears-|-eyes-|finite scalar quantization", re.IGNORECASE
)
# Words of single files: the table of names in the changelog starts with the old ones, the log says
# "at chance", and prompts of the official processor count "Picture 1".
ALLOWED_IN = {
    "notebooks/lab_log.md": {"chance"},
    "minomni/checkpoint/processor_files.py": {"picture"},
    "minomni/inputs/prompt.py": {"picture"},
}
# Tables of old names, of CHANGELOG.md.
RENAMED = re.compile(r"^### Renamed in Python$.*?(?=^### Documents$)", re.MULTILINE | re.DOTALL)
CHAPTERS = re.compile(r"<!-- chapters -->.*?<!-- end of chapters -->", re.DOTALL)  # of notebooks
FILES = [
    *sorted((ROOT / "minomni").rglob("*.py")),
    *sorted((ROOT / "minomni" / "serve" / "static").glob("*.*")),
    *sorted((ROOT / "notebooks").glob("*.md")),
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "run.py",
    *sorted((ROOT / "tests").rglob("*.py")),
]
FILES.remove(Path(__file__))  # lists the words


def words(text: str) -> set[str]:
    """The words of a text in lower case; identifiers are split at _ and at capitals."""
    text = CHAPTERS.sub(" ", text)
    text = ALLOWED.sub(" ", text)
    text = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", text)
    return {word.lower() for word in re.findall(r"[A-Za-z]+", text)}


def is_of_package(name: str) -> bool:
    """Whether a file is code of the package, or a document at the top of the repository."""
    return (name.startswith("minomni/") and name.endswith(".py")) or "/" not in name


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_standard_words(path):
    name = path.relative_to(ROOT).as_posix()
    text = RENAMED.sub("", path.read_text(encoding="utf-8"))
    standard = STANDARD | PACKAGE if is_of_package(name) else STANDARD
    found = (words(text) & standard.keys()) - ALLOWED_IN.get(name, set())
    assert {word: standard[word] for word in sorted(found)} == {}


@pytest.mark.parametrize("number", CHAPTERS_IN_STANDARD_WORDS)
def test_standard_words_in_the_prose_of_a_notebook(number):
    path = next((ROOT / "notebooks").glob(f"{number}_*.ipynb"))
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    # A title is a question in everyday words: README has it too.
    prose = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
    text = unlinked(re.sub(r"^# .*$", "", "\n".join(prose), flags=re.MULTILINE))
    standard = STANDARD | PROSE
    found = words(text) & standard.keys()
    assert {word: standard[word] for word in sorted(found)} == {}


def test_words_of_a_text():
    assert words("EarsStage, teacher_forced and leash_of") == {
        "ears",
        "stage",
        "and",
        "leash",
        "of",
    }
