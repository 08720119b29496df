"""The figures of attention and of token sequences, by what is written in them."""

import matplotlib.pyplot as plt
import pytest
import torch
from PIL import Image

from minomni.config import TINY
from minomni.data.vocabulary import world_tokenizer
from minomni.inputs.prompt import Processor
from minomni.notebook import attention, viz
from minomni.notebook.ask import mean_features
from minomni.omni import Omni


@pytest.fixture
def ax():
    plt.switch_backend("agg")
    yield viz.axes()
    plt.close("all")


def texts(ax) -> list[str]:
    return [text.get_text() for text in ax.texts if text.get_text()]


def test_the_watched_weights_add_up_to_one_and_are_causal():
    omni = Omni(TINY).eval()
    prompt = [{"role": "user", "content": "what do you see"}]
    inputs = Processor(TINY, world_tokenizer(TINY.thinker.tokens))([prompt])
    weights = attention.watch(omni.thinker, inputs, [5, 6])
    text = TINY.thinker.text
    length = inputs.input_ids.shape[1] + 2
    assert list(weights.shape) == [
        text.num_hidden_layers,
        text.num_attention_heads,
        length,
        length,
    ]
    assert (weights.sum(-1) - 1).abs().max() < 1e-5
    assert weights.triu(1).abs().max() == 0


def test_the_mean_features_are_as_wide_as_an_embedding():
    omni = Omni(TINY).eval()
    with torch.no_grad():
        mean = mean_features(omni, [Image.new("RGB", (56, 56))], [torch.zeros(8000)])
    assert {name: list(x.shape) for name, x in mean.items()} == {
        "image": [TINY.thinker.text.hidden_size],
        "audio": [TINY.thinker.text.hidden_size],
    }


def test_the_angle_between_query_and_key_is_marked(ax):
    attention.rotated(ax, 0.6, 1.6, "title")
    assert texts(ax) == ["q", "k", "57°"]


def test_masked_patches_stay_clear_and_the_scale_ends_at_the_largest_weight(ax):
    weights = torch.tensor([[0.0, 0.2], [0.8, 0.0]])
    attention.on_patches(ax, Image.new("RGB", (28, 28)), weights, (1, 0))
    opacity = ax.get_images()[1].get_array()[..., 3]
    assert (opacity > 0).tolist() == [[False, True], [True, False]]
    assert opacity.max() == 1
    scale = ax.child_axes[0]
    assert [label.get_text() for label in scale.get_xticklabels()] == ["0", "0.80"]


def test_a_word_s_weights_stand_over_the_image_and_the_loudness(ax):
    below = viz.axes()
    image = Image.new("RGB", (28, 28))
    cells, loudness, sound = torch.tensor([[1.0, 0.25]]), torch.ones(3), torch.arange(3.0)
    attention.on_image_and_sound(ax, below, image, cells, loudness, sound)
    assert ax.get_images()[1].get_alpha()[0].tolist() == pytest.approx([0, 0.325])
    assert [bar.get_height() for bar in below.patches] == [1, 1, 1, 0, 0.5, 1]


def test_the_future_is_left_out_of_a_table(ax):
    attention.table(ax, torch.eye(4), ["text", "image", "image", "audio"])
    shown = ax.get_images()[0].get_array()
    assert (shown.mask == torch.ones(4, 4).triu(1).bool().numpy()).all()
    assert texts(ax) == ["image", "image", "audio", "audio"]


def test_a_lens_has_a_line_for_each_layer(ax):
    attention.lens(ax, [["a", "red"], ["the", "red"]], torch.ones(2, 2))
    assert texts(ax) == ["a", "red", "the", "red"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["layer 0", "layer 1"]


def test_a_message_is_named_once_where_it_is_longest(ax):
    viz.page(ax, ["text"] * 9, [("system", 0), ("user", 3)], width=5)
    assert texts(ax) == ["system", "user"]
    assert [text.get_position()[1] > 1 for text in ax.texts] == [False, True]
    brackets = [line.get_segments()[0][0][1] for line in ax.collections[:1]]
    assert brackets == pytest.approx([0.2])
    ends = [line.get_segments()[0] for line in ax.collections]
    vertical = [(a[0], a[1]) for a, b in ends if a[0] == b[0]]
    assert len(vertical) == 3  # the last message is open


def test_captions_stand_in_their_squares(ax):
    viz.captioned(ax, Image.new("RGB", (56, 28)), [["red", "circle"], ["", ""]])
    assert texts(ax) == ["red\ncircle"]
    assert ax.texts[0].get_position() == (13.5, 13.5)


def test_an_axis_that_does_not_rotate_says_so(ax):
    cosines = torch.cat([torch.zeros(6, 2), torch.ones(6, 4)], 1)
    viz.angles(ax, cosines, (2, 1, 3))
    assert texts(ax) == ["all angles ≈ 0"] * 2


def test_a_layer_adds_x_twice_and_heads_share():
    assert viz.residual(("norm", "[L, D]", "mix"), ("norm",)).data.count(">+</text>") == 2
    of_dit = viz.residual(("norm",), stream="h", shape="[T, D]").data
    assert of_dit.count("h [T, D]") == 2
    assert "h passes unchanged" in of_dit
    heads = viz.shared_heads(4, 2).data
    assert heads.count("query head") == 4
    assert heads.count("keys, values") == 2


def test_spoken_words_stand_below_their_first_tokens_and_not_over_each_other():
    plt.switch_backend("agg")
    said = {0: "where", 1: "where", 2: "is", 9: "red"}
    looked = {"red": (torch.ones(2, 2), torch.ones(12)), "left": (torch.eye(2), torch.ones(12))}
    attention.word_by_word(Image.new("RGB", (28, 28)), torch.ones(12), said, looked)
    plots = plt.gcf().axes
    assert [ax.get_title() for ax in plots[:2]] == ["red", "left"]
    assert [tick.item() for tick in plots[2].get_xticks()] == [0, 2, 9]
    assert texts(plots[2]) == ["where", "is", "red"]
    assert [text.get_position()[0] for text in plots[2].texts] == [0, 3, 9]
    plt.close("all")


def test_the_words_of_a_recording_belong_to_its_tokens():
    omni = Omni(TINY).eval()
    tokenizer = world_tokenizer(TINY.thinker.tokens)
    prompt = [{"role": "user", "content": [{"audio": torch.zeros(8000)}]}]
    inputs = Processor(TINY, tokenizer)([prompt])
    n = int((inputs.input_ids == TINY.thinker.tokens.audio).sum())
    assert set(attention.spoken(omni.thinker, inputs, tokenizer)) <= set(range(n))


def test_the_last_bar_has_equal_weights():
    plt.switch_backend("agg")
    answer, kinds = torch.tensor([[1.0, 0, 0, 0]]), ["text", "image", "image", "audio"]
    attention.by_kind(answer, torch.full((4,), 0.25), kinds, heads=1)
    ax = plt.gcf().axes[0]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0.0", "equal"]
    assert [bar.get_height() for bar in ax.patches][:4] == [0, 0.5, 0, 0.25]
    plt.close("all")
