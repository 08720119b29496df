"""An encoder for the codes of a folder: it learns, resumes, and lets the Talker be tuned."""

import json
import pickle
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import soundfile
import torch
from safetensors.torch import load_file

import minomni
from minomni import __main__ as command
from minomni.checkpoint import saving, weights
from minomni.checkpoint.random_checkpoint import checkpoint_config, make_checkpoint
from minomni.config import TINY, OmniConfig
from minomni.data import corpus
from minomni.data.jsonl import JsonlRow
from minomni.errors import UserError
from minomni.talker.codec import CodeClassifier, letters_to_ids
from minomni.token2wav.voice import Voice
from minomni.train import code_pairs, finetune, train_encoder
from minomni.train.code_pairs import Pair, PairMaker
from minomni.train.loop import Recipe, train
from minomni.train.stages import encoder
from minomni.train.stages.encoder import EncoderStage, known_letters, varied
from minomni.train.train_encoder import EncoderOptions, put_classifier, with_classifier

MIN_SPOKEN = encoder.MIN_SPOKEN


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Four pairs in a file, of half a second each, and two pairs in a step. A Talker of random
    weights need not speak.
    """
    for module in (code_pairs, encoder):
        monkeypatch.setattr(module, "CHUNK", 4)
    monkeypatch.setattr(code_pairs, "MAX_SECONDS", 1)
    monkeypatch.setattr(code_pairs, "RANDOM_SECONDS", 0.6)
    monkeypatch.setattr(encoder, "MIN_SPOKEN", 0)
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
    monkeypatch.setattr(EncoderStage, "preview_text", lambda self: "")
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


@pytest.mark.slow
def test_codes_of_pairs_are_those_of_answers(monkeypatch):
    """The codes of a pair are those of an answer to the same messages by the same voice."""
    monkeypatch.setattr(code_pairs, "MAX_SECONDS", 10)
    omni = minomni.load("tiny", dtype="float32")
    greedy = replace(omni.config.talker_sampling, temperature=0)
    omni.config = replace(omni.config, talker_sampling=greedy)
    names = list(omni.voices)
    system = {"role": "system", "content": omni.config.media.system_prompt}
    part = []
    answers = []
    for text, name in (("the red circle is above the blue square", names[0]), ("four", names[-1])):
        question = [system, {"role": "user", "content": f"say {text}"}]
        reply = omni.respond(question, voice=name, temperature=0)
        row = JsonlRow(question, reply.text, None, None, False, None)
        part.append((row, omni.voices[name]))
        answers.append(reply.codes)
    assert part[0][0].answer == "the red circle is above the blue square"
    maker = PairMaker(omni, None, 0, 0.0)
    codes = maker.spoken_codes(part, torch.Generator().manual_seed(0))
    assert [row.tolist() for row in codes] == [row.tolist() for row in answers]
    # The comparison notices another voice.
    swapped = [(row, omni.voices[names[1]]) for row, _ in part]
    others = maker.spoken_codes(swapped, torch.Generator().manual_seed(0))
    assert not others[0].equal(codes[0])


def silent_pair(codes: torch.Tensor, voice: Voice, text: str, generator: torch.Generator) -> Pair:
    """A pair without the work of Token2Wav, instead of PairMaker.pair()."""
    return Pair(torch.zeros(TINY.codec.downsample * len(codes), 80).half(), codes, text)


def test_a_small_share_of_random_codes(tiny_folder, monkeypatch):
    """One pair in ten, though no file of four has as many as half of one."""
    maker = PairMaker(weights.load(tiny_folder), None, 0, 0.1)
    monkeypatch.setattr(maker, "pair", silent_pair)
    speech = torch.full((15,), 7)
    monkeypatch.setattr(maker, "spoken_codes", lambda part, _: [speech] * len(part))
    texts = [pair.text for number in range(5) for pair in maker.chunk(number)]
    assert len(texts) == 20
    assert texts.count("") == maker.num_random(20) == 2


def test_a_talker_that_says_nothing(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(encoder, "MIN_SPOKEN", MIN_SPOKEN)
    stage = encoder_stage(tiny_folder, tmp_path / "pairs")
    monkeypatch.setattr(stage.maker, "pair", silent_pair)
    nothing = torch.zeros(0, dtype=torch.long)
    monkeypatch.setattr(stage.maker, "spoken_codes", lambda part, _: [nothing] * len(part))
    with pytest.raises(UserError, match=r"the Talker spoke 0 of 2 texts, .*; give --data with"):
        stage.setup()
    # The first file has shown it.
    assert [path.name for path in (tmp_path / "pairs").iterdir()] == ["00000.pt"]

    # Half of them are enough, and where all codes are random none are needed.
    speech = torch.full((15,), 7)
    monkeypatch.setattr(stage.maker, "spoken_codes", lambda part, _: [speech, nothing])
    stage.cache = tmp_path / "half"
    stage.setup()
    assert "the Talker spoke 2 of 4 texts" in stage.preview_text()
    stage.maker.random_share = 1.0
    stage.cache = tmp_path / "random"
    stage.setup()
    assert "spoke" not in stage.preview_text()


def test_letters_that_are_known():
    assert known_letters("Don't stop, two-fold now.") == "dont stop two fold now"
    assert known_letters("7 apples") == known_letters("Äpfel") == known_letters("...") == ""


def test_a_perfect_transcript_has_no_errors(tiny_folder, tmp_path, monkeypatch):
    """The letters that are trained are the reference, not the text as it is written."""
    stage = encoder_stage(tiny_folder, tmp_path / "pairs")
    stage.num_texts = stage.num_spoken = 1
    codes = torch.tensor([3, 1, 4])
    stage.held_out = [Pair(torch.zeros(12, 80), codes, "Don't stop, now.")]
    blank = torch.tensor([0])
    path = torch.cat([torch.stack((i, blank[0])) for i in letters_to_ids("dont stop now")])
    log_probs = torch.nn.functional.one_hot(path, 28).float()[None]
    logits = torch.nn.functional.one_hot(codes, 8).float()[None]
    monkeypatch.setattr(EncoderStage, "classifier", staticmethod(lambda mel: (logits, log_probs)))
    line = stage.preview_text()
    assert line.startswith("100.0% of the held-out codes; word error rate of the letters 0%;")


def test_pairs_of_another_voice_or_sampling_are_others(tiny_folder, tmp_path, monkeypatch):
    """The pairs depend on more than the weights."""
    monkeypatch.setattr(train_encoder, "run_setup", lambda stage: None)
    monkeypatch.setattr(train_encoder, "train_or_load", lambda stage, folder: None)
    monkeypatch.setattr(train_encoder.saving, "save", lambda omni, out: out.mkdir(exist_ok=True))
    caches = []
    stage_of = train_encoder.EncoderStage

    def noted(omni, recipe, cache, *rest):
        caches.append(cache.name)
        return stage_of(omni, recipe, cache, *rest)

    def louder(omni):
        omni.voices["Bob"].ref_mel.add_(1)

    def sampled(omni):
        sampling = replace(omni.config.talker_sampling, temperature=0.25)
        omni.config = replace(omni.config, talker_sampling=sampling)

    def fewer_points(omni):
        omni.config = replace(omni.config, flow=replace(omni.config.flow, points=2))

    monkeypatch.setattr(train_encoder, "EncoderStage", noted)
    for change in (None, None, louder, sampled, fewer_points):
        omni = weights.load(tiny_folder)
        if change:
            change(omni)
        monkeypatch.setattr(train_encoder, "load", lambda folder, device, omni=omni: omni)
        out = tmp_path / "out"
        options = EncoderOptions("tiny", 4, 2)
        train_encoder.train_encoder(str(tiny_folder), out, options, fresh=True)
        (out / "config.json").write_text("{}")
    assert caches[0] == caches[1]
    assert len(set(caches)) == 4


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


def test_from_a_folder_without_an_encoder_to_a_tuned_talker(
    tiny_folder, tmp_path, capsys, monkeypatch
):
    pytest.importorskip("peft")
    base = tmp_path / "base"
    omni = weights.load(tiny_folder)
    omni.codec = None
    omni.config = replace(omni.config, codec=None)
    assert omni.config.trained_here
    saving.save(omni, base)
    before = weights.load(base).state_dict()

    monkeypatch.chdir(base)
    out = tune_with_a_new_encoder(Path("."), tmp_path, "Ann")
    assert json.loads((out / "trained.json").read_text())["size"] == base.name
    assert "with an encoder: " in capsys.readouterr().out
    new = weights.load(out)
    assert isinstance(new.codec, CodeClassifier)
    assert new.config.trained_here  # it still knows the generated world
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
    assert not new.config.trained_here
    assert new.config.codec.num_codes == 8194
    assert load_file(out / "model.safetensors")["thinker.lm_head.weight"].dtype == torch.bfloat16
    assert new.codec.encode(torch.zeros(1, 40, 80)).shape == (1, 20)


def test_folders_that_are_refused(tiny_folder):
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


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(b"cut"),
        lambda path: path.write_bytes(pickle.dumps(print)),
        lambda path: torch.save([1, 2], path),
        lambda path: torch.save({"lengths": 3}, path),
        lambda path: torch.save({"lengths": torch.zeros(0, 2), "mels": 1}, path),
        lambda path: torch.save(Path("."), path),
        lambda path: write_compressed(path),
    ],
    ids=["cut", "pickle", "list", "number", "mels", "class", "compressed"],
)
def test_damaged_pairs(tmp_path, write):
    path = tmp_path / "00000.pt"
    write(path)
    says = r"00000.pt: is damaged, expected pairs of codes .*; delete it, it is made again$"
    with pytest.raises(UserError, match=says) as error:
        code_pairs.read_pairs(path)
    assert "\n" not in str(error.value)


def write_compressed(path: Path) -> None:
    """An archive of pairs that unpacks to far more than its size."""
    torch.save({"lengths": torch.zeros(100_000, 2, dtype=torch.long)}, path)
    with zipfile.ZipFile(path) as stored:
        parts = {name: stored.read(name) for name in stored.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)


def test_a_compressed_archive_of_pairs_is_not_unpacked(tmp_path, monkeypatch):
    path = tmp_path / "00000.pt"
    write_compressed(path)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was unpacked"))
    with pytest.raises(UserError, match="its parts are larger than the file"):
        code_pairs.read_pairs(path)


def test_the_folder_of_a_run(capsys):
    """Help names the folder that the command has."""
    with pytest.raises(SystemExit):
        minomni_command("train-encoder", "--help")
    words = " ".join(capsys.readouterr().out.split())
    assert "(default runs/FOLDER)" in words
    assert "runs/SIZE" not in words
    assert "--stage" not in words


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
