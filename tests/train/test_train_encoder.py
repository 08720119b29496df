"""An encoder for the codes of a folder: it learns, resumes, and lets the Talker be tuned."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import soundfile
import torch
from safetensors.torch import load_file

import minomni
from minomni import __main__ as command
from minomni.checkpoint import weights
from minomni.checkpoint.random_checkpoint import checkpoint_config, make_checkpoint
from minomni.config import TINY, OmniConfig
from minomni.data import corpus
from minomni.errors import UserError
from minomni.talker.codec import CodeClassifier, ids_to_letters
from minomni.train import code_pairs, finetune, train_encoder
from minomni.train.code_pairs import PairMaker
from minomni.train.loop import Recipe, train
from minomni.train.stages import encoder
from minomni.train.stages.encoder import EncoderStage, known_letters, varied
from minomni.train.train_encoder import put_classifier, with_classifier


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Four pairs in a file, of half a second each, and two pairs in a step."""
    for module in (code_pairs, encoder):
        monkeypatch.setattr(module, "CHUNK", 4)
    monkeypatch.setattr(code_pairs, "MAX_SECONDS", 1)
    monkeypatch.setattr(code_pairs, "RANDOM_SECONDS", 0.6)
    monkeypatch.setattr(train_encoder, "BATCH", 2)
    monkeypatch.setattr(finetune, "LORA_RECIPE", (1e-2, 2))
    monkeypatch.setattr(sys, "argv", [])


def minomni_command(*words: str | Path) -> int:
    """Run the command line -> its exit code."""
    sys.argv = ["minomni", *map(str, words)]
    return command.main()


def encoder_stage(folder: Path, cache: Path) -> EncoderStage:
    """A stage of 24 steps on four pairs, without varied mels."""
    omni = weights.load(folder)
    maker = PairMaker(omni, None, seed=0, random_share=0.5)
    put_classifier(omni, with_classifier(omni.config, "tiny"), seed=0)
    recipe = Recipe(24, 4, lr=5e-3, warmup=2)
    return EncoderStage(omni, recipe, cache, 0, maker, 4)


@pytest.mark.slow
def test_it_learns_and_resumes(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(EncoderStage, "sample", lambda self: "")
    stage = encoder_stage(tiny_folder, tmp_path / "pairs")
    before = {name: tensor.clone() for name, tensor in stage.omni.state_dict().items()}
    train(stage, tmp_path / "whole")
    entries = [json.loads(line) for line in (tmp_path / "whole/log.jsonl").read_text().splitlines()]
    assert entries[-1]["codes"] < 0.8 * entries[0]["codes"]
    for name, tensor in stage.omni.state_dict().items():
        assert name.startswith("codec.") or tensor.equal(before[name]), name

    train(encoder_stage(tiny_folder, tmp_path / "pairs"), tmp_path / "parts", until=9)
    train(encoder_stage(tiny_folder, tmp_path / "pairs"), tmp_path / "parts", resume=True)
    whole, parts = (
        load_file(tmp_path / name / "encoder.safetensors") for name in ("whole", "parts")
    )
    assert whole.keys() == parts.keys()
    assert all(whole[name].equal(parts[name]) for name in whole)


def test_pairs_are_a_function_of_the_seed_and_their_number(tiny_folder):
    first, again = (PairMaker(weights.load(tiny_folder), None, 3, 0.5) for _ in range(2))
    one, two = first.chunk(1), again.chunk(1)
    assert len(one) == 4
    for pair, same in zip(one, two, strict=True):
        assert pair.codes.equal(same.codes)
        assert pair.mel.equal(same.mel)
        assert len(pair.mel) == TINY.codec.downsample * len(pair.codes)
    assert not one[0].codes.equal(first.chunk(2)[0].codes)


def test_the_sound_is_what_the_model_speaks(tiny_folder, monkeypatch):
    """A spoken pair has the codes of the Talker for its text, as respond() generates them: the
    Talker of random weights is made to speak one code, then to end.
    """
    omni = weights.load(tiny_folder)
    maker = PairMaker(omni, None, 0, 0.0)
    spoken = [torch.full((15,), 7), torch.full((25,), 8), torch.zeros(0, dtype=torch.long)]
    monkeypatch.setattr(omni.talker, "generate", lambda inputs, *_: (spoken * 2)[:4])
    whole, cut, random, _ = maker.chunk(0)
    assert whole.codes.equal(spoken[0])
    assert whole.text
    assert cut.codes.equal(spoken[1])
    assert cut.text == ""  # as long as a pair may be: it may have been cut off
    assert len(random.codes) == 15
    assert random.text == ""


def test_letters_that_are_known():
    assert ids_to_letters(known_letters("Don't stop, two-fold now.")) == "dont stop two fold now"
    assert len(known_letters("7 apples")) == len(known_letters("Äpfel")) == 0


def test_varied_mels_keep_their_frames():
    mel = torch.randn(30, 80) - 5
    first = varied(mel)
    assert first.shape == mel.shape
    assert first.isfinite().all()
    assert not first.equal(varied(mel))
    loud = torch.full((20, 80), -11.0)
    loud[7] = 1.0
    assert varied(loud).mean(1).argmax() == 7


def recorded(folder: Path, voice: str) -> Path:
    """Two rows with recordings of their answers."""
    recordings = corpus.sample_recordings(held_out=False)
    rows = []
    for i in range(2):
        soundfile.write(folder / f"{i}.wav", recordings.wave(i), 16_000)
        text = recordings.utterances[i].text
        messages = [
            {"role": "user", "content": f"say {text}"},
            {"role": "assistant", "content": text},
        ]
        rows.append(json.dumps({"messages": messages, "speech": f"{i}.wav", "voice": voice}))
    (folder / "my.jsonl").write_text("\n".join(rows) + "\n")
    return folder / "my.jsonl"


def tune_with_a_new_encoder(base: Path, folder: Path, voice: str) -> Path:
    """`train-encoder`, then LoRA of the Talker on recordings -> the folder with the encoder."""
    out = folder / "with-encoder"
    data = recorded(folder, voice)
    where = ("--home", folder / "home", "--device", "cpu")
    options = ("--size", "tiny", "--pairs", 4, "--steps", 2, "--random-codes", 0.5)
    assert minomni_command("train-encoder", base, "--out", out, *options, *where) == 0

    adapter = folder / "adapter"
    lora = ("--lora", "r=2", "--parts", "talker", "--epochs", 1, "--out", adapter)
    assert minomni_command("train", out, "--data", data, *lora, *where) == 0
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert {name.split(".")[2] for name in tensors} == {"talker"}
    assert all(tensor.abs().max() > 0 for tensor in tensors.values())
    return out


def test_from_a_folder_without_an_encoder_to_a_tuned_talker(tiny_folder, tmp_path, capsys):
    pytest.importorskip("peft")
    base = tmp_path / "base"
    omni = weights.load(tiny_folder)
    omni.codec = None
    omni.config = replace(omni.config, codec=None)
    weights.save(omni, base)
    before = weights.load(base).state_dict()

    out = tune_with_a_new_encoder(base, tmp_path, "Ann")
    assert "with an encoder: " in capsys.readouterr().out
    new = weights.load(out)
    assert isinstance(new.codec, CodeClassifier)
    assert not new.config.trained_here
    assert new.codec.encode(torch.zeros(1, 40, 80)).shape == (1, 10)
    for name, tensor in new.state_dict().items():
        assert name.startswith("codec.") or tensor.equal(before[name]), name

    # The same again is refused, and continues with --resume from what is finished.
    words = ("train-encoder", base, "--out", out, "--size", "tiny", "--pairs", 4, "--steps", 2)
    words = (*words, "--random-codes", 0.5, "--home", tmp_path / "home", "--device", "cpu")
    assert minomni_command(*words) == 2
    assert "--resume continues it" in capsys.readouterr().err
    assert minomni_command(*words, "--resume") == 0
    assert minomni_command(*words, "--resume", "--steps", 3) == 2
    assert "was begun with other options" in capsys.readouterr().err


def shallow(config: OmniConfig) -> OmniConfig:
    """The configuration with two or three layers in each part."""
    dit = replace(
        config.token2wav.dit,
        num_hidden_layers=3,
        look_ahead_layers=(1,),
        look_backward_layers=(0, 2),
    )
    thinker = replace(
        config.thinker,
        audio=replace(config.thinker.audio, encoder_layers=2),
        vision=replace(config.thinker.vision, depth=2, fullatt_block_indexes=(1,)),
        text=replace(config.thinker.text, num_hidden_layers=2),
    )
    decoder = replace(config.talker.decoder, num_hidden_layers=2)
    return replace(
        config,
        thinker=thinker,
        talker=replace(config.talker, decoder=decoder),
        token2wav=replace(config.token2wav, dit=dit),
    )


@pytest.mark.slow
def test_a_folder_in_the_format_of_the_release(tmp_path):
    """50 codes a second, 8193 of them, 24 kHz, bf16; the voices of the release."""
    pytest.importorskip("peft")
    base = tmp_path / "base"
    make_checkpoint(shallow(checkpoint_config("qwen7b", 0.125)), base)
    out = tune_with_a_new_encoder(base, tmp_path, "Chelsie")
    new = minomni.load(str(out))
    assert new.config.codec.num_codes == 8194
    assert new.thinker.lm_head.weight.dtype == torch.bfloat16
    assert new.codec.encode(torch.zeros(1, 40, 80)).shape == (1, 20)


def test_folders_that_are_refused(tiny_folder, tmp_path):
    omni = weights.load(tiny_folder)
    omni.voices = {}
    with pytest.raises(UserError, match=r"holds no tokenizer or no voices; copy .*spk_dict.pt"):
        PairMaker(omni, None, 0, 0.0)
    alone = replace(omni.config, talker=None, token2wav=None, codec=None)
    with pytest.raises(UserError, match="answers in text alone"):
        with_classifier(alone, "tiny")
    dit = replace(TINY.token2wav.dit, repeats=3)
    odd = replace(TINY, token2wav=replace(TINY.token2wav, dit=dit), codec=None)
    with pytest.raises(UserError, match="no encoder fits this model: downsample 3 must be a power"):
        with_classifier(odd, "tiny")
    (tmp_path / "00000.pt").write_bytes(b"cut")
    with pytest.raises(UserError, match=r"00000.pt: is damaged .*; delete it"):
        code_pairs.read_pairs(tmp_path / "00000.pt")


def test_options_that_are_refused(tiny_folder, tmp_path, capsys):
    for words, says in (
        (("--random-codes", 2), "'2' is not a number from 0 to 1"),
        (("--pairs", 0), "'0' is not a whole number from 1"),
        (("--data", tmp_path / "none.jsonl"), "none.jsonl: no such file"),
    ):
        out = ("--out", tmp_path / "out", "--home", tmp_path / "home", "--fresh")
        assert minomni_command("train-encoder", tiny_folder, *out, *words) == 2
        error = capsys.readouterr().err
        assert says in error
        assert error.count("\n") == 1
