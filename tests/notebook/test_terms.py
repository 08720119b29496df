"""Prose of the chapters of the second edition: the field's terms in bold, formulas, references."""

import re
from pathlib import Path

import nbformat
import pytest
from glossary import unlinked

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
# What a chapter introduces, in bold at first use.
TERMS = {
    "00": (
        "token",
        "mel spectrogram",
        "encoders",
        "Thinker",
        "Talker",
        "codes",
        "DiT",
        "vocoder",
        "codec",
        "embedding",
        "hidden state",
        "logits",
        "Greedy",
        "autoregressive",
        "sampled",
        "seed",
        "meta device",
    ),
    "01": (
        "sampling rate",
        "harmonics",
        "fundamental frequency",
        "formants",
        "Fourier transform",
        "discrete Fourier transform",
        "power",
        "bin",
        "Nyquist frequency",
        "aliasing",
        "phase",
        "spectral leakage",
        "Hann window",
        "mel scale",
        "decibels",
        "dynamic range",
        "short-time Fourier transform",
        "frames",
        "mel filter bank",
        "log-mel spectrogram",
        "vocoder",
    ),
    "02": (
        "audio encoder",
        "blocks",
        "CTC",
        "dot product",
        "steps",
        "zero padding",
        "stride",
        "channels",
        "GELU",
        "receptive field",
        "attention mask",
        "attention weights",
        "block-diagonal mask",
        "sinusoidal position embedding",
        "average pooling",
        "LayerNorm",
        "streaming",
    ),
    "03": (
        "channels",
        "pixels",
        "cut into patches",
        "merge cells",
        "patches",
        "aspect ratio",
        "token budget",
        "raster order",
        "normalized",
        "temporal patch",
        "interpolation",
        "antialiasing",
        "aliasing",
        "Nyquist frequency",
        "patch embedding",
    ),
    "04": (
        "vision encoder",
        "vision transformer",
        "window attention",
        "windows",
        "Rotary position embedding",
        "merge cell",
        "attention weights",
        "RMSNorm",
        "SwiGLU",
        "receptive field",
    ),
    "05": (
        "token",
        "tokenizer",
        "Byte-pair encoding",
        "merges",
        "rank",
        "pre-tokenization",
        "placeholder token",
        "time-interleaving",
        "Special tokens",
        "chat template",
        "ChatML",
        "left padding",
        "prompt injection",
        "loss mask",
    ),
    "06": (
        "TMRoPE",
        "position ids",
        "wavelength",
        "fp32",
        "ablation",
    ),
    "07": (
        "Thinker",
        "decoder",
        "autoregressive",
        "Attention weights",
        "residual stream",
        "query",
        "key",
        "value",
        "causal mask",
        "grouped-query attention",
        "logits",
        "Greedy",
        "KV cache",
        "prefill",
        "attention sink",
        "logit lens",
        "ablation",
        "zero ablation",
        "mean ablation",
        "cross-entropy",
    ),
}
FORMULAS = {
    "00": 4,
    "01": 4,
    "02": 5,
    "03": 4,
    "04": 4,
    "05": 5,
    "06": 2,
    "07": 6,
}  # displayed ones, at least
REFERENCES = {
    "00": 7,
    "01": 6,
    "02": 12,
    "03": 10,
    "04": 9,
    "05": 12,
    "06": 10,
    "07": 15,
}  # links out of the course, at least


def prose(number: str) -> str:
    path = next(NOTEBOOKS.glob(f"{number}_*.ipynb"))
    cells = nbformat.read(path, as_version=4).cells
    return unlinked("\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown"))


@pytest.mark.parametrize("number", TERMS)
def test_a_chapter_introduces_its_terms(number):
    text = prose(number)
    assert [term for term in TERMS[number] if f"**{term}**" not in text] == []


@pytest.mark.parametrize("number", TERMS)
def test_a_chapter_has_formulas_references_and_the_glossary(number):
    text = prose(number)
    displayed = re.findall(r"\$\$.+?\$\$", text, re.DOTALL)
    assert len(displayed) >= FORMULAS[number]
    assert len(set(re.findall(r"\]\((https://[^)]+)\)", text))) >= REFERENCES[number]
    assert "(glossary.md)" in text


@pytest.mark.parametrize("number", TERMS)
def test_every_exercise_states_its_cost_and_explains_its_solution(number):
    text = prose(number)
    headings = re.findall(r"^### Exercise \d+ · (.+)$", text, re.MULTILINE)
    assert headings
    stated = re.compile(r"\(\d+ minutes, [★☆]{3}, importance [●○]{3}\)$")
    assert [heading for heading in headings if not stated.search(heading)] == []
    folded = re.findall(r"<summary>Solution</summary>.+?</details>", text, re.DOTALL)
    assert len(folded) == len(headings)
    # An explanation follows the code.
    assert [part for part in folded if not re.search(r"```\n\S.+\n?</details>", part)] == []
    assert text.count("### Open question") == 1
