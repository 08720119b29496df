"""The glossary, its links from the chapters, and the references that each chapter ends with."""

import re
from pathlib import Path

import pytest
from chapters import prose
from glossary import link, read_terms, terms, unlinked
from test_terms import INTRODUCED

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
NUMBERS = [f"{number:02}" for number in range(17)]
FEWEST_LINKS = 8  # to the glossary, in a chapter


@pytest.mark.parametrize("number", NUMBERS)
def test_each_term_is_linked_at_its_first_use(number):
    """Otherwise: python tests/glossary.py."""
    texts = prose(number)
    assert link(texts, read_terms()) == texts
    assert "\n".join(texts).count("](glossary.md#") >= FEWEST_LINKS


def test_every_anchor_of_the_glossary_is_there_once():
    text = (NOTEBOOKS / "glossary.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
    anchors = re.findall(r'<a id="([^"]+)"></a>', text)
    assert len(anchors) == len(set(anchors)) == len(rows)
    assert set(terms(text).values()) == set(anchors)


def test_the_terms_of_the_first_chapters_are_in_the_glossary():
    """Terms that are two words of the glossary together, or a plural, need no row of their own."""
    names = {name.lower() for name in read_terms()}
    missing = set()
    for term in ", ".join(INTRODUCED.values()).lower().split(", "):
        if not names & {term, term.removesuffix("s"), term.removesuffix("es")}:
            missing.add(term)
    assert missing == ALLOWED_WITHOUT_ROW


# Explained where they stand; no other chapter uses them.
ALLOWED_WITHOUT_ROW = {
    "block-diagonal mask",
    "cut into patches",
    "fourier transform",
    "fp32",
    "log-mel spectrogram",
    "normalized",
    "steps",
    "windows",
}


@pytest.mark.parametrize("number", NUMBERS)
def test_each_chapter_says_how_others_do_it(number):
    text = unlinked("\n\n".join(prose(number)))
    assert text.count("### How others do it\n") == 1
    section = text.split("### How others do it\n")[1]
    section = re.split(r"^#|^\*\*Next\.\*\*", section, flags=re.MULTILINE)[0]
    assert section.count("](https://") >= 3


NAMES = {"token": "token", "mel": "mel", "attention mask": "attention-mask"}


def test_a_term_is_linked_once_and_the_introduction_in_bold_comes_first():
    texts = ["# A mel\n\n| mel |\n\nA mel, a token.", "The **mel** and a token, `token`, tokens."]
    assert link(texts, NAMES) == [
        "# A mel\n\n| mel |\n\nA mel, a token.",
        "The [**mel**](glossary.md#mel) and a token, `token`, tokens.",
    ]


def test_longer_terms_come_first_and_code_formulas_and_links_are_left_alone():
    text = "$mel$ `mel` [mel](x.md) <b>x</b> ```mel``` Two attention masks, mels and melody."
    linked = link(["", text], NAMES)[1]
    assert linked == (
        "$mel$ `mel` [mel](x.md) <b>x</b> ```mel``` Two "
        "[attention masks](glossary.md#attention-mask), [mels](glossary.md#mel) and melody."
    )
    assert unlinked(linked) == text
    assert link(["", linked], NAMES)[1] == linked
