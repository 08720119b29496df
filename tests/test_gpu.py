"""What only a GPU can show; skipped where there is none. Nothing here is needed by the rest."""

import zlib
from dataclasses import replace
from itertools import count
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from test_parity import ask, compare
from test_run_folder import cache, make  # noqa: F401  (a fixture)

from minomni import load
from minomni.chat.generate import generate_tokens
from minomni.chat.static_generate import StaticStep
from minomni.checkpoint import saving
from minomni.config import QWEN7B, SamplingConfig
from minomni.data import text_to_speech
from minomni.eval import benchmark
from minomni.inputs.mel import voice_mel
from minomni.omni import Omni
from minomni.static_decode import StaticCache, decoder_step
from minomni.token2wav.streaming import RELEASE_SCHEDULE, SpeechStream, low_latency_schedule
from minomni.train import loop, stage_table
from minomni.train.stages import dpo as dpo_stage

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
MEMORY = 100e9  # bytes that both codes take in fp32, side by side
SEVEN = replace(
    QWEN7B,
    thinker=replace(QWEN7B.thinker, tokens=oracle.TOKENS),
    token2wav=replace(QWEN7B.token2wav, dit=replace(QWEN7B.token2wav.dit, num_embeds=8447)),
    thinker_sampling=oracle.CONFIG.thinker_sampling,
    talker_sampling=oracle.CONFIG.talker_sampling,
)
# Ten times what the two were measured to differ by on an H200. Whatever is not listed is an
# integer, and equal.
DEEP = {
    "audio": 1e-4,
    "vision": 6e-4,
    "logits": 6e-3,
    "step_logits": 6e-3,
    "talker_inputs": 1e-3,
    "talker_step_inputs": 1e-3,
    "talker_logits": 5e-3,
    "mel_0": 4e-5,
    "mel_1": 4e-5,
    "wave_0": 2e-5,
    "wave_1": 2e-5,
}


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """No rounding of fp32 to tf32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def there(name: str, like: torch.Tensor) -> torch.Tensor:
    """Numbers that depend on the name alone, drawn where they are wanted."""
    generator = torch.Generator("cuda").manual_seed(zlib.crc32(name.encode()))
    return torch.randn(like.shape, generator=generator, device="cuda")


@pytest.fixture(scope="module")
def seven():
    """The release's sizes, twice: our code and the official one, filled with the same numbers."""
    transformers = pytest.importorskip(
        "transformers", reason="needed to compare with the official code itself"
    )
    if transformers.__version__ != oracle.VERSION or torch.cuda.mem_get_info()[1] < MEMORY:
        pytest.skip(f"needs transformers {oracle.VERSION} and a GPU of {MEMORY / 1e9:.0f} GB")
    small, oracle.CONFIG = oracle.CONFIG, SEVEN
    with torch.device("cuda"):
        official = oracle.hf_model(fill=lambda tensors: oracle.fill(tensors, there))
        omni = Omni(SEVEN).eval()
    oracle.fill(omni.state_dict(), there)
    omni.voices = {
        name: replace(voice, cond=voice.cond.cuda(), ref_mel=voice.ref_mel.cuda())
        for name, voice in oracle.voices().items()
    }
    yield omni, official
    oracle.CONFIG = small


@pytest.mark.parametrize("case", oracle.PROMPTS)
def test_seven_billion_weights_say_what_the_official_code_says(case, seven, monkeypatch):
    omni, official = seven  # the official one draws its noise where it is
    monkeypatch.setattr(
        "minomni.omni.seeded_generator", lambda seed: torch.Generator("cuda").manual_seed(seed)
    )
    mine, theirs = ask(omni, case), oracle.ask_official(official, case)
    far = {
        name: float(np.abs(mine[name].astype(float) - theirs[name]).max())
        for name in theirs
        if name in DEEP
    }
    print(
        case,
        {name: f"{value:.1e} of {np.abs(theirs[name]).max():.1f}" for name, value in far.items()},
    )
    compare(mine, theirs, DEEP)


def without_reading_back(step):
    """A launch in which any wait for the device is an error, once the graph is captured."""

    def launch(self, generator):
        if self.replay.graph is None:
            return step(self, generator)
        torch.cuda.set_sync_debug_mode("error")
        try:
            return step(self, generator)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return launch


def answers(omni, case: str, seed) -> list[tuple[str, list[int]]]:
    """All ids and codes of an answer in the order in which they are generated."""
    prompt = oracle.inputs(case)
    bos_tokens = [omni.voice("Chelsie").bos_token] * len(prompt.input_ids)
    sampled = SamplingConfig(
        temperature=0.9, top_k=40, top_p=0.8, repetition_penalty=1.05, max_new_tokens=40
    )
    with torch.no_grad():
        prefill = omni.thinker.prefill(prompt, omni.thinker.model.new_cache())
        steps = generate_tokens(omni, prefill, bos_tokens, seed, (sampled, sampled))
        return [(kind, ids.tolist()) for kind, ids in steps]


@pytest.mark.parametrize("case", ["text", "batch"])
def test_captured_steps_give_the_ids_of_the_plain_ones(case, monkeypatch):
    """Twice each, as the second answer replays what the first one has captured."""
    omni = Omni(oracle.CONFIG).eval()
    oracle.fill(omni.state_dict())
    omni.voices = oracle.voices()
    omni.cuda()
    monkeypatch.setattr(StaticStep, "launch", without_reading_back(StaticStep.launch))
    plain = [answers(omni, case, seed) for seed in (0, 1)]
    omni.use_static_steps()
    assert [answers(omni, case, seed) for seed in (0, 1)] == plain
    [workspace] = omni.static_generator.free
    assert all(step.replay.graph for step in workspace.steps.values())


@pytest.mark.parametrize("schedule", [None, RELEASE_SCHEDULE], ids=["cached", "recomputed"])
def test_captured_chunks_give_the_speech_of_plain_ones(schedule):
    """Utterances whose shapes repeat: called, captured, replayed, then with another voice."""
    omni = Omni(oracle.CONFIG).eval()
    oracle.fill(omni.state_dict())
    omni.voices = oracle.voices()
    omni.cuda()
    token2wav = omni.token2wav
    chosen = schedule or low_latency_schedule(token2wav)
    codes = torch.randint(0, 8000, (1, 125), generator=torch.Generator().manual_seed(0)).cuda()

    def speech(voice, seed) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        flow = omni.config.flow
        stream = SpeechStream(token2wav, omni.voice(voice), flow, chosen, generator)
        chunks = [chunk for some in codes.split(25, dim=1) for chunk in stream.feed(some)]
        return torch.cat([*chunks, *stream.finish()])

    utterances = [("Chelsie", 0), ("Chelsie", 1), ("Chelsie", 2), ("Ethan", 3)]
    plain = [speech(*utterance) for utterance in utterances]
    omni.use_static_steps()
    for utterance, expected in zip(utterances, plain, strict=True):
        torch.testing.assert_close(speech(*utterance), expected, rtol=0, atol=1e-4)
    assert token2wav.graphs.recordings


def test_the_vocoder_of_a_gpu_equals_that_of_a_cpu():
    vocoder = Omni(oracle.CONFIG).eval().token2wav.code2wav_bigvgan_model
    oracle.fill(vocoder.state_dict())
    mel = torch.randn(1, 80, 50) - 4
    with torch.no_grad():
        expected = vocoder(mel)
        found = vocoder.cuda()(mel.cuda())
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=1e-4)


def test_flash_attention_of_a_captured_step_in_bf16():
    """One new token against the plain decoder, as bf16 ids would differ by rounding."""
    decoder = Omni(oracle.CONFIG).thinker.model.to("cuda", torch.bfloat16).eval()
    config = decoder.config
    mask = torch.ones(2, 300, dtype=torch.long, device="cuda")
    mask[0, :120] = 0
    static = StaticCache(config, 2, 1024, mask.device, torch.bfloat16)
    assert static.flash
    grown = decoder.new_cache()
    shape = (2, 300, config.hidden_size)
    with torch.no_grad():
        position_ids = (mask.cumsum(1) - 1).clamp(min=0).expand(3, -1, -1)
        decoder(torch.randn(shape).to(mask.device, torch.bfloat16), position_ids, mask, grown)
        static.fill(grown, mask)
        position = mask.sum(1)
        for _ in range(5):
            x = torch.randn(2, config.hidden_size).to(mask.device, torch.bfloat16)
            mask = torch.cat((mask, mask[:, -1:]), 1)
            expected = decoder(x[:, None], position.expand(3, -1)[..., None], mask, grown)[:, 0]
            found = decoder_step(decoder, x, position, static)
            torch.testing.assert_close(found, expected, rtol=0, atol=0.1)
            position = position + 1


def test_steps_of_the_7b_are_measured():
    """Run with -s for the table; nothing is required of the times."""
    omni = benchmark.random_model("qwen7b", "cuda")
    print(benchmark.table(benchmark.decoding_steps(omni)))


def test_the_release_s_folder_loads_onto_a_gpu(tmp_path, monkeypatch):
    """As many weights, in the same files and precisions: loaded, every one as it was stored."""
    omni = benchmark.random_model("qwen7b", "cuda")
    saving.save(omni, tmp_path / "model")
    kept = {name: tensor.cpu() for name, tensor in omni.state_dict().items()}
    del omni
    torch.cuda.empty_cache()
    again = load(str(tmp_path / "model"), "cuda")
    assert again.thinker.lm_head.weight.dtype == torch.bfloat16
    for name, tensor in again.state_dict().items():
        assert tensor.is_cuda, name
        assert torch.equal(tensor.cpu(), kept.pop(name)), name
    assert not kept
    monkeypatch.setattr(benchmark, "ANSWER_S", 1)
    with benchmark.without_eos(again):  # random weights would not stop
        assert len(again.respond(benchmark.QUESTION).wave)


def test_tiny_thinks_and_sounds_the_same_on_a_gpu():
    here, there = load("tiny"), load("tiny", "cuda")
    for content in (
        [{"type": "text", "text": "say the red circle is above the blue square"}],
        [
            {"type": "image", "image": ROOT / "data_samples" / "scene.png"},
            {"type": "audio", "audio": ROOT / "data_samples" / "question.wav"},
        ],
    ):
        asked = [{"role": "user", "content": content}]
        first, second = here.respond(asked), there.respond(asked)
        assert first.text == second.text
        assert 0.5 < second.seconds / first.seconds < 2
        *_, end = there.stream(asked)
        assert end.reply.codes.tolist() == second.codes.tolist()
    with torch.no_grad():
        waves = [
            omni.token2wav(
                first.codes[None].to(omni.thinker.device),
                omni.voice("Anna"),
                omni.config.flow,
                torch.Generator().manual_seed(0),
            ).cpu()
            for omni in (here, there)
        ]
    assert (voice_mel(waves[0]) - voice_mel(waves[1])).abs().mean() < 1e-2


@pytest.mark.parametrize("name", list(stage_table.STAGES))
def test_every_stage_learns_on_a_gpu(name, cache, monkeypatch):  # noqa: F811
    """Losses and gradients are finite, and without random numbers, those of a CPU."""
    monkeypatch.setattr(text_to_speech, "available", lambda: False)
    monkeypatch.setattr(stage_table.STAGES["dpo"], "num_prompts", 4)
    worse = count(0, 2)
    monkeypatch.setattr(
        dpo_stage, "edit_distance", lambda *_: next(worse)
    )  # every try has a better and a worse one
    stage = make(name, cache, "cuda")
    rough = loop.forward_backward(stage, 0)
    assert all(p.grad is None or p.grad.isfinite().all() for p in stage.parameters().values())
    monkeypatch.setattr(loop, "has_bf16", lambda device: False)
    if name not in ("dit", "dpo"):
        exact = loop.forward_backward(stage, 0)
        assert rough == pytest.approx(exact, rel=0.03)
        assert exact == pytest.approx(loop.forward_backward(make(name, cache), 0), rel=1e-3)
