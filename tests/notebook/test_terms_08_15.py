"""The standard terms of the field that each of the chapters 08 to 15 must contain."""

from pathlib import Path

import nbformat
import pytest

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
TERMS = {
    "08": (
        "discrete",
        "quantizer",
        "finite scalar quantization",
        "codebook",
        "straight-through estimator",
        "commitment loss",
        "dead code",
        "collapses",
        "CTC",
        "blank",
        "alignment",
        "forward recursion",
        "residual VQ",
        "semantic",
        "acoustic",
        "entropy",
        "upsampling",
        "vocoder",
    ),
    "09": (
        "hidden state",
        "autoregressive",
        "text conditioning",
        "teacher forcing",
        "ignore_index",
        "cross-entropy",
        "nats per code",
        "auxiliary head",
        "repetition penalty",
        "logits",
        "KV cache",
        "monotonic attention",
        "ablation",
        "prosody",
        "timbre",
        "held-out",
    ),
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
    "11": (
        "phase",
        "vocoder",
        "transposed convolution",
        "Griffin",
        "SnakeBeta",
        "Nyquist limit",
        "alias",
        "low-pass",
        "Kaiser window",
        "decibels",
        "polyphase",
        "dilated",
        "residual block",
        "receptive field",
        "multi-resolution STFT loss",
        "discriminators",
        "GAN",
        "HiFi-GAN",
        "Vocos",
    ),
    "12": (
        "first-packet latency",
        "real-time factor",
        "jitter buffer",
        "look-ahead",
        "chunk",
        "hidden state",
        "prefill",
        "KV cache",
        "receptive field",
        "memory bandwidth",
        "word error rate",
        "full duplex",
        "throughput",
    ),
    "13": (
        "learning rate",
        "linear warmup",
        "cosine decay",
        "AdamW",
        "weight decay",
        "Muon",
        "Newton-Schulz",
        "Nesterov momentum",
        "gradient accumulation",
        "gradient clipping",
        "teacher forcing",
        "cross-entropy",
        "held out",
        "leakage",
        "overfits",
        "fine-tuning",
        "catastrophic forgetting",
        "frozen",
        "activations",
    ),
    "15": (
        "meta device",
        "safetensors",
        "little-endian",
        "pickle",
        "memory bandwidth",
        "tokens per second",
        "prefill",
        "roofline",
        "memory-bound",
        "compute-bound",
        "arithmetic intensity",
        "quantization",
        "speculative decoding",
        "KV cache",
        "grouped-query attention",
        "activations",
        "real-time factor",
        "system prompt",
        "memory-mapped",
        "bijection",
        "paged",
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
