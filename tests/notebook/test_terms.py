"""Prose of the chapters: the field's terms, formulas, references, what each exercise states."""

import re

import chapters
import pytest
from glossary import unlinked

# Terms of chapters 00 to 07, in bold where they are introduced.
INTRODUCED = {
    "00": (
        "token, mel spectrogram, encoders, Thinker, Talker, codes, DiT, vocoder, codec, "
        "embedding, hidden state, logits, Greedy, autoregressive, sampled, seed, meta device"
    ),
    "01": (
        "sampling rate, harmonics, fundamental frequency, formants, Fourier transform, discrete "
        "Fourier transform, power, bin, Nyquist frequency, aliasing, phase, spectral leakage, "
        "Hann window, mel scale, decibels, dynamic range, short-time Fourier transform, frames, "
        "mel filter bank, log-mel spectrogram, vocoder"
    ),
    "02": (
        "audio encoder, blocks, CTC, dot product, steps, zero padding, stride, channels, GELU, "
        "receptive field, attention mask, attention weights, block-diagonal mask, sinusoidal "
        "position embedding, average pooling, LayerNorm, streaming"
    ),
    "03": (
        "channels, pixels, cut into patches, merge cells, patches, aspect ratio, token budget, "
        "raster order, normalized, temporal patch, interpolation, antialiasing, aliasing, "
        "Nyquist frequency, patch embedding"
    ),
    "04": (
        "vision encoder, vision transformer, window attention, windows, Rotary position "
        "embedding, merge cell, attention weights, RMSNorm, SwiGLU, receptive field"
    ),
    "05": (
        "token, tokenizer, Byte-pair encoding, merges, rank, pre-tokenization, placeholder "
        "token, time-interleaving, Special tokens, chat template, ChatML, left padding, prompt "
        "injection, loss mask"
    ),
    "06": "TMRoPE, position ids, wavelength, fp32, ablation",
    "07": (
        "Thinker, decoder, autoregressive, Attention weights, residual stream, query, key, "
        "value, causal mask, grouped-query attention, logits, Greedy, KV cache, prefill, "
        "attention sink, logit lens, ablation, zero ablation, mean ablation, cross-entropy"
    ),
}
# Terms that chapters 08 to 16 explain or use.
USED = {
    "08": (
        "discrete, quantizer, finite scalar quantization, codebook, straight-through estimator, "
        "commitment loss, dead code, collapses, CTC, blank, alignment, forward recursion, "
        "residual VQ, semantic, acoustic, entropy, upsampling, vocoder"
    ),
    "09": (
        "hidden state, autoregressive, text conditioning, codebook, causal, teacher forcing, "
        "exposure bias, forced alignment, ignore_index, cross-entropy, nats per code, auxiliary "
        "head, repetition penalty, temperature, top-p, top-k, logits, KV cache, monotonic "
        "attention, ablation, prosody, timbre, held-out"
    ),
    "10": (
        "velocity field, conditional flow matching, ordinary differential equation, Euler's "
        "method, Runge-Kutta, Butcher tableau, NFE, sway sampling, classifier-free guidance, "
        "condition dropout, adaLN-zero, speaker embedding, ECAPA-TDNN, receptive field, "
        "trajectory, DDPM, phase"
    ),
    "11": (
        "phase, vocoder, transposed convolution, Griffin, SnakeBeta, Nyquist limit, alias, "
        "low-pass, Kaiser window, decibels, polyphase, dilated, residual block, receptive field, "
        "multi-resolution STFT loss, discriminators, GAN, HiFi-GAN, Vocos"
    ),
    "12": (
        "first-packet latency, real-time factor, jitter buffer, look-ahead, chunk, hidden "
        "state, chunked prefill, causal, sliding window, NFE, KV cache, receptive field, memory "
        "bandwidth, word error rate, full duplex, throughput"
    ),
    "13": (
        "learning rate, gradient accumulation, teacher forcing, cross-entropy, held out, "
        "held-out loss, validation loss, early stopping, by speaker, rehearsal, critical path, "
        "leakage, overfits, fine-tuning, catastrophic forgetting, frozen, activations"
    ),
    "14": (
        "chosen, rejected, reference model, Bradley-Terry, implicit reward, margin, "
        "log-probability, RLHF, KL penalty, PPO, teacher forcing, held out, learning rate, "
        "over-optimization, reward hacking"
    ),
    "15": (
        "meta device, safetensors, little-endian, pickle, memory bandwidth, tokens per second, "
        "prefill, roofline, memory-bound, compute-bound, arithmetic intensity, quantization, "
        "speculative decoding, KV cache, grouped-query attention, activations, real-time "
        "factor, system prompt, memory-mapped, bijection, paged"
    ),
    "16": (
        "learning rate, linear warmup, cosine decay, AdamW, weight decay, L2 regularization, "
        "SGD, Muon, Newton-Schulz, Nesterov momentum, gradient clipping, orthogonalized, "
        "singular value, LoRA, rank"
    ),
}
FORMULAS = dict(zip(INTRODUCED, (4, 4, 5, 4, 4, 5, 2, 6), strict=True))  # displayed ones, at least
# Links out of the course, at least.
REFERENCES = dict(zip(INTRODUCED, (7, 6, 12, 10, 9, 12, 10, 15), strict=True))


def prose(number: str) -> str:
    """The text of a chapter, without its links to the glossary."""
    return unlinked("\n\n".join(chapters.prose(number)))


@pytest.mark.parametrize("number", INTRODUCED)
def test_a_chapter_introduces_its_terms(number):
    text = prose(number)
    terms = INTRODUCED[number].split(", ")
    assert [term for term in terms if f"**{term}**" not in text] == []


@pytest.mark.parametrize("number", USED)
def test_a_chapter_uses_its_terms(number):
    text = " ".join(prose(number).split()).lower()
    missing = []
    for term in USED[number].split(", "):
        whole = rf"(?<![\w-]){re.escape(term.lower())}s?(?!\w)"
        if not re.search(whole, text):
            missing.append(term)
    assert missing == []


@pytest.mark.parametrize("number", USED)
def test_formulas_and_papers(number):
    text = prose(number)
    assert "$$" in text
    assert "](https://arxiv.org/" in text


@pytest.mark.parametrize("number", INTRODUCED)
def test_a_chapter_has_formulas_references_and_the_glossary(number):
    text = prose(number)
    displayed = re.findall(r"\$\$.+?\$\$", text, re.DOTALL)
    assert len(displayed) >= FORMULAS[number]
    assert len(set(re.findall(r"\]\((https://[^)]+)\)", text))) >= REFERENCES[number]
    assert "(glossary.md)" in text


@pytest.mark.parametrize("number", INTRODUCED)
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
