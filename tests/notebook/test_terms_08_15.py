"""The standard terms of the field that each of the chapters 08 to 15 must contain."""

from pathlib import Path

import nbformat
import pytest

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
TERMS = {
    "10": (
        "velocity field",
        "conditional flow matching",
        "ordinary differential equation",
        "Euler's method",
        "Runge-Kutta",
        "Butcher tableau",
        "NFE",
        "sway sampling",
        "classifier-free guidance",
        "condition dropout",
        "adaLN-zero",
        "speaker embedding",
        "ECAPA-TDNN",
        "receptive field",
        "trajectory",
        "DDPM",
        "phase",
    ),
    "14": (
        "chosen",
        "rejected",
        "reference model",
        "Bradley-Terry",
        "implicit reward",
        "margin",
        "log-probability",
        "RLHF",
        "KL penalty",
        "PPO",
        "teacher forcing",
        "held out",
        "learning rate",
        "over-optimization",
        "reward hacking",
    ),
}


@pytest.mark.parametrize("number", TERMS)
def test_terms_of_the_chapter(number):
    path = next(NOTEBOOKS.glob(f"{number}_*.ipynb"))
    cells = nbformat.read(path, as_version=4).cells
    text = " ".join(cell.source for cell in cells if cell.cell_type == "markdown")
    text = " ".join(text.split()).lower()
    assert [term for term in TERMS[number] if term.lower() not in text] == []


@pytest.mark.parametrize("number", TERMS)
def test_formulas_and_links(number):
    path = next(NOTEBOOKS.glob(f"{number}_*.ipynb"))
    cells = nbformat.read(path, as_version=4).cells
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    assert "$$" in text
    assert "](https://arxiv.org/" in text
    assert "### How others do it" in text
