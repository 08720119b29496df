"""What is not asked for is not read, not kept, and named where it is used."""

import sys

import pytest
import torch
from PIL import Image
from torch import nn

import minomni
from minomni import __main__ as command
from minomni.checkpoint import check_folder, lora, weights
from minomni.checkpoint.memory import needed_bytes
from minomni.checkpoint.parts import ENCODERS, parse_parts
from minomni.cli import options as cli_options
from minomni.config import TINY
from minomni.errors import UserError
from minomni.thinker.thinker import ENCODER_NAMES
from minomni.token2wav.streaming import MelStream, Schedule
from minomni.train import code_pairs, loop, train_encoder

QUESTION = [{"role": "user", "content": "say the red circle is above the blue square"}]
LISTEN = [{"role": "user", "content": [{"type": "audio", "audio": torch.rand(8000).numpy()}]}]
LOOK = [{"role": "user", "content": [{"type": "image", "image": Image.new("RGB", (56, 56))}]}]


@pytest.fixture
def read(monkeypatch):
    """The names of all tensors that are read."""
    names: list[str] = []
    real = weights.map_tensors

    class Spy(dict):
        def __getitem__(self, name):
            names.append(name)
            return super().__getitem__(name)

    monkeypatch.setattr(weights, "map_tensors", lambda file: Spy(real(file)))
    return names


@pytest.mark.parametrize(
    ("parts", "left_out"),
    [
        ("text", ("thinker.audio_tower.", "thinker.visual.", "talker.", "token2wav.", "codec.")),
        ("text+vision+speech", ("thinker.audio_tower.",)),
        ("text+audio+vision+speech", ()),
    ],
)
def test_only_what_is_asked_for_is_read(parts, left_out, tiny_folder, read):
    omni = minomni.load(tiny_folder)
    everything = set(read)
    read.clear()
    omni = minomni.load(tiny_folder, parts=parts)
    # The codec's tensors have names of their own in their file.
    kept = {name for name in everything if not name.startswith(left_out)}
    if "codec." in left_out:
        kept -= {name for name in everything if name.split(".")[0] not in ("thinker",)}
    assert set(read) == kept
    assert not [name for name in omni.state_dict() if name.startswith(left_out)]
    assert all(not tensor.is_meta for tensor in omni.state_dict().values())


def test_what_is_left_answers_as_before(tiny_folder):
    whole = minomni.load(tiny_folder)
    for parts, messages in (("text", QUESTION), ("text+audio", LISTEN), ("text+vision", LOOK)):
        omni = minomni.load(tiny_folder, parts=parts)
        answers = []
        for model in (whole, omni):
            _, inputs = model.prepare(messages, None, False, False)
            answers.append(model.generate(inputs, None, max_new_tokens=8).tokens)
        assert answers[0] == answers[1]


def test_using_what_was_left_out_is_one_line(tiny_folder):
    omni = minomni.load(tiny_folder, parts="text")
    with pytest.raises(UserError, match=r"audio encoder was left out .* \+audio, or give no audio"):
        omni.respond(LISTEN, speech=False)
    with pytest.raises(UserError, match=r"vision encoder was left out .* no images and videos"):
        omni.respond(LOOK, speech=False)
    for ask in (omni.respond, omni.stream):
        with pytest.raises(UserError, match=r"speech was left out .* give speech=False"):
            ask(QUESTION)
    session = omni.listen(speech=False)
    with pytest.raises(UserError, match="vision encoder was left out"):
        session.add_image(Image.new("RGB", (56, 56)))
    assert session.respond("say yes", max_new_tokens=2)  # the session goes on
    with pytest.raises(UserError, match="without its audio and vision and speech"):
        minomni.save(omni, tiny_folder.parent / "saved")
    assert not (tiny_folder.parent / "saved").exists()


@pytest.mark.parametrize(
    "parts", ["speech", "text+text", "text+", "text,audio", "text+talker", "", 3]
)
def test_wrong_parts_are_one_line(parts, tiny_folder):
    with pytest.raises(UserError, match=r"^parts is .*expected text, and behind it \+audio"):
        minomni.load(tiny_folder, parts=parts)


def test_names_of_parts():
    assert parse_parts(None) == ()
    assert parse_parts("text") == ("audio", "vision", "speech")
    assert parse_parts("text+speech+audio") == ("vision",)


# --------------------------------------------------------------------------------------------------
# encoders on the host
class Encoder(nn.Module):
    """An encoder whose output shows on which device its weights were."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 2))
        self.register_buffer("offset", torch.zeros(2))

    def forward(self, patches, grids):
        return self.weight + self.offset


def test_encoders_visit_the_device_and_stay_on_the_host():
    """The meta device takes the place of a GPU."""
    omni = minomni.omni.Omni(TINY)
    thinker = omni.thinker.to("meta")
    encoder = Encoder()
    thinker.register_module("visual", encoder)
    weight = encoder.weight
    assert thinker.encode_vision(None, []).device.type == "cpu"  # without the option
    thinker.encoders_on_host = True
    assert thinker.encode_vision(None, []).device.type == "meta"
    assert encoder.weight is weight
    assert weight.device.type == encoder.offset.device.type == "cpu"


@pytest.fixture
def on_two_devices(tiny_folder):
    """A model with its encoders on the host and its decoder on the meta device, as of a GPU."""
    omni = minomni.load(tiny_folder, encoders_on_host=True)
    omni.thinker.model.to("meta")
    omni.thinker.lm_head.to("meta")
    assert next(omni.parameters()).device.type == "cpu"
    return omni


def test_training_takes_the_device_of_the_decoder(on_two_devices, tmp_path):
    omni = on_two_devices
    assert loop.Stage(omni, loop.Recipe(1, 1, 1e-3), tmp_path, 0).device.type == "meta"
    assert code_pairs.PairMaker(omni, None, 0, 0.5).device.type == "meta"
    config = train_encoder.with_classifier(omni.config, "tiny")
    train_encoder.put_classifier(omni, config, seed=0)
    assert {parameter.device.type for parameter in omni.codec.parameters()} == {"meta"}


def test_voices_of_an_adapter_go_to_the_device_of_the_decoder(
    on_two_devices, tiny_folder, tmp_path, monkeypatch
):
    pytest.importorskip("peft", reason="the extra tune is not installed")
    adapted = minomni.load(tiny_folder)
    lora.add_lora(adapted, lora.parse_lora("r=2"), ("talker",))
    lora.save_lora(adapted, tmp_path / "adapter", list(adapted.voices)[:1])
    devices = []

    def voices(file, config, device):
        devices.append(device.type)
        return {}

    monkeypatch.setattr(lora, "load_voices", voices)
    monkeypatch.setattr(lora, "base_digests", lambda omni: {})  # of weights without values
    lora.load_lora(on_two_devices, tmp_path / "adapter")
    assert devices == ["meta"]


def test_only_encoders_are_loaded_onto_the_host():
    device = torch.device("cuda")
    for on_host, expected in (((), "cuda"), (ENCODERS, "cpu")):
        plan = weights.LoadPlan(device, torch.bfloat16, torch.float32, {}, {}, on_host)
        assert plan.device_of("thinker.visual.merger.mlp.0.weight").type == expected
        assert plan.device_of("thinker.audio_tower.proj.weight").type == expected
        assert plan.device_of("thinker.model.embed_tokens.weight").type == "cuda"


def test_encoders_on_the_host_give_the_same_answer(tiny_folder):
    answers = []
    for on_host in (False, True):
        omni = minomni.load(tiny_folder, encoders_on_host=on_host)
        assert omni.thinker.encoders_on_host == on_host
        prefills = []
        for messages in (LISTEN, LOOK):
            _, inputs = omni.prepare(messages, None, False, False)
            prefills.append(omni.thinker.prefill(inputs).hidden)
        answers.append(prefills)
    for first, second in zip(*answers, strict=True):
        assert torch.equal(first, second)
    with pytest.raises(UserError, match="encoders_on_host"):
        minomni.load(tiny_folder, encoders_on_host="yes")


# --------------------------------------------------------------------------------------------------
# check and the command line
def test_memory_table_has_a_row_for_parts():
    tensors = {
        "thinker.visual.proj.bias": torch.empty(1000, device="meta"),
        "talker.norm.weight": torch.empty(100, device="meta"),
        "token2wav.norm.weight": torch.empty(10, device="meta"),
    }
    assert check_folder.weight_sizes(tensors, ())[0] == 2 * 1000 + 2 * 100 + 4 * 10
    assert check_folder.weight_sizes(tensors, ENCODERS)[0] == 2 * 100 + 4 * 10
    table = check_folder.memory_table(TINY)
    for row in ("parts=text |", "parts=text+audio+vision |", "encoders_on_host |"):
        assert row in table


def test_an_encoder_on_the_host_takes_memory_of_the_device_while_it_runs(tiny_folder, monkeypatch):
    tensors = {
        "thinker.audio_tower.proj.bias": torch.empty(300, device="meta"),
        "thinker.visual.proj.bias": torch.empty(1000, device="meta"),
        "thinker.model.norm.weight": torch.empty(20, device="meta"),
    }
    needed = needed_bytes(tensors, torch.bfloat16, None, on_host=ENCODERS)
    assert needed == 2 * 20 + 2 * 1000  # the larger encoder, as one runs at a time
    assert needed_bytes(tensors, torch.bfloat16, None) == 2 * (300 + 1000 + 20)
    assert check_folder.weight_sizes(tensors, (), ENCODERS)[0] == needed

    # load() counts so too, before it reads.
    asked = []
    monkeypatch.setattr(weights, "check_fits", lambda *arguments: asked.append(arguments))
    monkeypatch.setattr(weights, "device_of", torch.device)
    monkeypatch.setattr(weights, "fill_model", lambda *arguments: None)
    monkeypatch.setattr(weights, "load_voices", lambda *arguments: {})
    for device, on_host in (("cuda", ENCODERS), ("cpu", ())):
        weights.load(tiny_folder, device, encoders_on_host=True)
        _, counted, *_, copied, _ = asked.pop()
        assert copied == on_host
        assert any(name.startswith(ENCODERS) for name in counted)


def test_names_of_encoders_are_those_of_the_thinker():
    thinker = minomni.omni.Omni(TINY).thinker
    assert ENCODERS == ("thinker.audio_tower.", "thinker.visual.")
    assert set(ENCODER_NAMES.values()) <= {name for name, _ in thinker.named_children()}


def test_the_command_line_names_parts(tiny_folder, monkeypatch, capsys):
    line = ["minomni", "chat", "--model", str(tiny_folder), "--parts", "text", "--text", "say yes"]
    monkeypatch.setattr(sys, "argv", line)
    assert command.main() == 2
    assert "speech was left out" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", [*line, "--no-speech", "--encoders-on-host"])
    assert command.main() == 0


# ----------------------------------------------------------------------------------------------
# the DiT in bf16
@pytest.fixture(scope="module")
def two_precisions():
    """The tiny model that is included, with its DiT in fp32 and in bf16."""
    return minomni.load("tiny"), minomni.load("tiny", dit_dtype="bf16")


def test_the_dit_alone_is_bf16(two_precisions):
    _, omni = two_precisions
    for name, tensor in omni.stored_tensors().items():
        in_bf16 = name.startswith("token2wav.code2wav_dit_model.")
        assert tensor.dtype == (torch.bfloat16 if in_bf16 else torch.float32), name


@torch.no_grad()
def test_a_dit_in_bf16_makes_the_same_mel(two_precisions):
    """Nearer than another noise brings it, whole and streamed."""
    codes = torch.arange(60)[None]
    mels = {}
    for name, omni, seed in zip(
        ("fp32", "bf16", "other noise"),
        (*two_precisions, two_precisions[0]),
        (0, 0, 1),
        strict=True,
    ):
        dit, flow = omni.token2wav.code2wav_dit_model, omni.config.flow
        voice = omni.voices["Anna"]
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(1, 60 * dit.config.repeats, dit.config.mel_dim, generator=generator)
        mels[name] = dit.sample(codes, voice.cond, voice.ref_mel, flow, noise)

        generator = torch.Generator().manual_seed(seed)
        stream = MelStream(dit, voice, flow, Schedule(((10_000, 0),)), generator)
        streamed = torch.cat([*stream.feed(codes), *stream.finish()], dim=2)
        assert streamed.dtype == mels[name].dtype == torch.float32
        # On another processor one rounding in bf16 may fall the other way.
        assert (streamed - mels[name]).abs().mean() < (0.05 if name == "bf16" else 1e-4)
    nearer = (mels["bf16"] - mels["fp32"]).abs().mean()
    farther = (mels["other noise"] - mels["fp32"]).abs().mean()
    assert 0 < nearer < farther / 5


def test_a_dit_in_bf16_takes_half_of_its_memory(tiny_folder, monkeypatch):
    tensors = {
        "token2wav.code2wav_dit_model.proj_out.bias": torch.empty(100, device="meta"),
        "token2wav.code2wav_bigvgan_model.conv_post.weight": torch.empty(10, device="meta"),
    }
    assert needed_bytes(tensors, torch.bfloat16, None) == 4 * 110
    assert needed_bytes(tensors, torch.bfloat16, None, dit_dtype=torch.bfloat16) == 2 * 100 + 4 * 10
    asked = []
    monkeypatch.setattr(weights, "check_fits", lambda *arguments: asked.append(arguments))
    weights.load(tiny_folder, dit_dtype="bf16")
    assert asked[0][-1] == torch.bfloat16


@pytest.mark.parametrize("dtype", ["fp16", "int8", 3])
def test_wrong_precisions_of_the_dit_are_one_line(dtype, tiny_folder):
    with pytest.raises(UserError, match=rf"dit_dtype is .*{dtype}.*; expected fp32 or bf16"):
        minomni.load(tiny_folder, dit_dtype=dtype)


def test_the_command_line_names_the_precision_of_the_dit(tiny_folder, tmp_path, monkeypatch):
    line = ["minomni", "chat", "--model", str(tiny_folder), "--dit-dtype", "bf16"]
    line += ["--text", "say yes", "--out", str(tmp_path / "reply.wav")]
    monkeypatch.setattr(sys, "argv", line)
    loaded = []
    load = cli_options.load
    monkeypatch.setattr(
        cli_options, "load", lambda *a, **k: loaded.append(load(*a, **k)) or loaded[0]
    )
    assert command.main() == 0
    assert loaded[0].token2wav.dit_dtype == torch.bfloat16
    assert (tmp_path / "reply.wav").exists()


def test_a_model_with_a_rounded_dit_is_not_saved(two_precisions, tmp_path):
    with pytest.raises(UserError, match="rounded to bf16; load the model without dit_dtype"):
        minomni.save(two_precisions[1], tmp_path / "model")
    assert not (tmp_path / "model").exists()
