"""Figures of the chapters: what they compute and say."""

import math
import re

import matplotlib.pyplot as plt
import pytest
import torch
from PIL import Image

from minomni.notebook import figures, viz
from minomni.notebook.cases import cut_cases
from minomni.notebook.check import solution


@pytest.fixture(autouse=True)
def off_screen():
    plt.switch_backend("agg")
    yield
    plt.close("all")


@pytest.mark.parametrize("hz", [90, 120, 205])
def test_the_fundamental_of_a_voice_is_found_below_stronger_harmonics(hz):
    t = torch.arange(6400) / 16_000
    wave = sum(gain * (2 * math.pi * hz * k * t).sin() for k, gain in ((1, 0.3), (2, 1), (3, 0.6)))
    assert figures.fundamental(wave, 16_000) == pytest.approx(hz, rel=0.02)
    ax = viz.axes()
    figures.low_harmonics(ax, wave, 16_000, "Anna")
    shown = re.fullmatch(r"Anna, (\d+) Hz", ax.get_title())
    assert int(shown[1]) == pytest.approx(hz, rel=0.02)


def test_dot_products_state_their_sums():
    sound = torch.tensor([0.0, 1, 0, -1])
    figures.dot_products(sound, {"itself": sound, "a constant": torch.ones(4)})
    titles = [ax.get_title() for ax in plt.gcf().axes]
    assert titles[1::3] == ["itself", "a constant"]
    assert titles[2::3] == ["product, sum 2", "product, sum 0"]


def test_an_answer_is_drawn_at_four_rates_over_one_time():
    words = ["a", "circle", "(end)", "(padding, from here on)"]
    figures.four_rates(words, torch.arange(25), torch.zeros(80, 100), torch.zeros(16_000), 16_000)
    plots = plt.gcf().axes
    assert [text.get_text() for text in plots[0].texts] == words
    assert {ax.get_xlim() for ax in plots} == {(0, 1)}


def test_boxes_of_the_map_are_numbered_by_step():
    drawn = viz.model_map(steps=(("log-mel", "patches"), ["DiT"])).data
    names = re.findall(r">([^<]+)</text>", drawn)
    assert [name for name in names if name.isdigit()] == ["1", "1", "2"]


def test_an_arrow_ends_at_the_last_place_of_a_path():
    ax = viz.axes()
    figures.point_out(ax, {"hiss": (0.5, 4000), "formant": [(0.1, 500), (0.2, 700), (0.3, 1000)]})
    assert [round(text.xy[0], 1) for text in ax.texts] == [0.5, 0.3]
    assert [line.get_linestyle() for line in ax.lines] == ["-", ":"]
    assert ax.texts[1].xy[1] == ax.lines[1].get_ydata()[-1]


def test_two_places_are_the_ends_of_a_bracket():
    ax = viz.axes()
    figures.point_out(ax, {"hiss": (0.5, 4000), "harmonics": [(0.6, 400), (0.6, 600)]})
    place, bracket = ax.lines
    assert place.get_markersize() == 0  # an arrow is enough
    assert bracket.get_marker() == "_"
    assert bracket.get_markersize() > 0
    assert ax.texts[1].xy[1] == bracket.get_ydata()[1] > bracket.get_ydata()[0]


def test_costs_are_drawn_in_the_order_of_their_names():
    numbers = torch.tensor([1.0, 4.0])
    names = ["whole-frame", "windows", "linear"]
    figures.costs(torch.tensor([112.0, 224.0]), dict.fromkeys(names, numbers), crossing=150.0)
    ax = plt.gca()
    assert [text.get_text() for text in ax.get_legend().get_texts()] == names
    assert [line.get_linestyle() for line in ax.lines] == ["--", "-", "-", ":"]
    assert ax.lines[-1].get_xdata()[0] == 150
    assert [label.get_text() for label in ax.get_xticklabels()][:2] == ["112", "224"]


def test_pairs_of_two_blocks_are_left_out_of_an_attention_map():
    ax = viz.axes()
    words = {0.0: "say", 0.04: "cross"}
    figures.attention_blocks(ax, torch.full((3, 3), 0.5), [2, 1], words, 1.0, "layer 0, head 0")
    drawn = ax.images[0].get_array()
    assert drawn.mask.tolist() == [[False, False, True], [False, False, True], [True, True, False]]
    for labels in (ax.get_xticklabels(), ax.get_yticklabels()):
        assert [label.get_text() for label in labels] == ["say", "cross"]


def test_a_step_of_a_filter_states_its_sum():
    figures.filter_step(torch.ones(128, 3), torch.full((128, 3), 0.5), -2.0, marked=(2000.0,))
    plots = plt.gcf().axes
    assert plots[3].texts[0].get_text().split("\n")[1::3] == ["+192.00", "-2.00", "+190.00"]
    band = viz.hz_to_mel(torch.tensor(2000.0)) / viz.hz_to_mel(torch.tensor(8000.0)) * 129
    assert plots[0].lines[0].get_ydata()[0] == pytest.approx(float(band) - 1, abs=0.01)


def test_changes_of_nothing_are_drawn_at_the_bottom():
    gap = torch.tensor([0.0, 2.0])
    figures.changes({"stem": gap, "end": gap}, ("step", "token"))
    assert plt.gcf().axes[0].lines[0].get_ydata().tolist() == pytest.approx([1e-6, 2.0])


def test_a_flow_that_continues_repeats_the_last_tensor():
    steps = ("ids [L]", "embed", "[L, D]", "Thinker", "hidden")
    names = re.findall(r">([^<]+)</text>", viz.flow(*steps, wide=200).data)
    assert names == ["ids [L]", "embed", "[L, D]", "[L, D]", "Thinker", "hidden"]
    assert re.findall(r">([^<]+)</text>", viz.flow(*steps).data) == list(steps)


def test_the_axes_of_patches_have_brackets_and_empty_places():
    names = re.findall(r">([^<]+)</text>", viz.patch_axes().data)
    assert "".join(name for name in names if len(name) == 1) == "ijyxYX" + 9 * "?"


def test_pieces_of_an_image_are_its_cells_in_raster_order():
    image = Image.new("RGB", (56, 28))
    image.paste("red", (28, 0, 56, 28))
    figures.pieces(image, line=3)
    drawn = plt.gcf().axes[0].images[0].get_array()
    assert drawn.shape == (34, 3 * 34, 3)
    assert [drawn[0, 34 * i].tolist() for i in range(3)] == [[0] * 3, [255, 0, 0], [255] * 3]


def test_titles_of_settings_have_a_unit():
    viz.explore(lambda ax, **settings: None, unit=" s", block=(1, 2), clip=(4, 8))
    assert [ax.get_title() for ax in plt.gcf().axes] == ["block = 1 s", "block = 2 s"]
    assert plt.gcf().get_suptitle() == "clip = 8 s"


def test_numbered_cells_are_cases_for_a_cut():
    cut = solution("03", "my_cut")
    assert all((cut(*arguments) == expected).all() for arguments, expected, _ in cut_cases())


def test_the_trellis_adds_up_stays_moves_and_skips():
    drawn = viz.trellis("-a-b-", 3).data
    names = re.findall(r">([\d/]+)</text>", drawn)
    assert names[:5] == ["1/3", "1/3", "0", "0", "0"]
    assert names[5:10] == ["1/9", "2/9", "1/9", "1/9", "0"]
    assert names[10:] == ["1/27", "3/27", "3/27", "4/27", "1/27"]
    assert drawn.count("stroke-dasharray") == 2  # one from each of the first two steps
    assert "dasharray" not in viz.trellis("-a-a-", 3).data


def test_letters_that_do_not_fit_are_found_with_their_repeats():
    assert figures.wrong_codes(["a", "a", "", "c", "c", "b", ""], "ab") == [3, 4]
    assert figures.wrong_codes(["a", "", "b"], "ab") == []


def test_seeds_are_dots_around_their_mean():
    figures.over_seeds({"before": torch.tensor([1.0, 3.0])}, "mistakes")
    [ax] = plt.gcf().axes
    assert [line.get_xdata().tolist() for line in ax.lines[:2]] == [[1, 3], [2]]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["before"]


def test_a_chunk_is_played_when_it_is_there_and_those_before_have_been_played():
    _, ax = plt.subplots()
    times = {step: [0.1] for step in ("prefill", "text", "code", "mel", "audio")}
    assert figures.timeline(ax, times, [0.1, 0.2, 0.9], [0.25, 0.25, 0.25]) == pytest.approx(1.15)
    assert [round(bar.get_x()) for bar in ax.patches] == [100, 350, 900]


@pytest.mark.parametrize(("made", "runs_dry"), [(0.5, True), (3.0, False)])
def test_a_player_that_runs_dry_is_marked(made, runs_dry):
    _, ax = plt.subplots()
    figures.made_and_played(ax, [0, 1, 2], [0, made, 3], begin=1, length=3)
    [silence] = ax.collections
    assert bool(silence.get_paths()) == runs_dry


def test_repeated_steps_of_a_flow_are_underlined_within_their_line():
    steps = ("x", "add", "[D]", "scale", "y")
    diagram = viz.flow(*steps, repeat=(1, 3, "a layer, × 4")).data
    assert "a layer, × 4" in diagram
    x1, x2 = map(
        float, re.findall(r'<line x1="([\d.]+)" y1="59" x2="([\d.]+)" y2="59"', diagram)[0]
    )
    boxes = [float(x) for x in re.findall(r'<rect x="([\d.]+)"', diagram)]
    assert (x1, x2) == pytest.approx((boxes[0], boxes[1] + 16 + 6.8 * len("scale")))


def test_offsets_are_drawn_with_some_rows():
    score = torch.full((5, 5), 0.75)
    score[2] = 1
    figures.over_offsets(score, torch.arange(-2, 3), rows=(0, 2))
    lines = plt.gcf().axes[1].lines
    assert [line.get_ydata().tolist() for line in lines] == [[1] * 5, [0.75] * 5]


def test_attention_that_follows_words_has_a_frame_for_each():
    ax = viz.axes()
    figures.follow(ax, torch.eye(3), torch.tensor([0, 0, 2]), ["a", "b", "c"])
    frames = [(frame.get_xy(), frame.get_width()) for frame in ax.patches]
    assert frames == [((-0.5, -0.5), 2), ((1.5, 1.5), 1)]


def test_snakes_lie_beside_a_relu():
    figures.snakes(((1.0, 1.0), (2.0, 4.0), (3.0, 1.0)))
    relu, snake, *_ = plt.gca().lines
    assert relu.get_label() == "ReLU"
    assert snake.get_ydata()[-1] == pytest.approx(5 + math.sin(5) ** 2)


def test_each_part_of_a_stage_is_named_trained_or_frozen():
    figures.trained_or_frozen(torch.tensor([[2, 0], [1, 2]]), ["codec", "dit"], ["codec", "DiT"])
    [ax] = plt.gcf().axes
    assert [text.get_text() for text in ax.texts] == ["trained", "frozen", "trained"]
    assert [text.get_position() for text in ax.texts] == [(0, 0), (0, 1), (1, 1)]


def test_gains_begin_at_zero():
    ax = viz.axes()
    figures.gains(ax, torch.tensor([[[1.0, 3.0], [-1.0, -2.0]]]))  # one step, two pairs
    lines = [line.get_ydata().tolist() for line in ax.lines]
    assert lines == [[0, 2], [0, -1.5], [0, 3.5], [0, 2], [0, 5]]


def test_two_plots_in_the_place_of_one_share_x():
    above, below = figures.above_and_below(viz.axes())
    above.set_xlim(0, 7)
    assert below.get_xlim() == (0, 7)


def test_the_polynomial_of_muon_has_its_bounds():
    at = torch.logspace(-4, 0, 5)
    figures.polynomial(at, at, at, at, at)
    left, right = plt.gcf().axes
    assert [line.get_ydata()[0] for line in left.lines[:2]] == [0.68, 1.2]
    assert right.lines[0].get_ydata()[0] == 0.0015
    assert right.get_yscale() == "log"


def test_letters_stand_above_their_codes_and_the_end_behind_them():
    ax = viz.axes()
    figures.letters_above(ax, ["a", "", "b"])
    assert [text.get_text() for text in ax.texts] == ["a", "", "b", "end"]
    assert [text.get_position()[0] for text in ax.texts] == [0, 1, 2, pytest.approx(2.7)]


def test_logits_are_drawn_behind_the_bar_and_not_added_to_it():
    ax = viz.axes()
    figures.memory(ax, ["15 s", "30 s"], 20 * 10**9, [10**9, 2 * 10**9], [3 * 10**9, 6 * 10**9])
    assert [text.get_text() for text in ax.texts] == ["21.0 GB", "22.0 GB"]
    outlines = [(bar.get_x(), bar.get_width()) for bar in ax.containers[2]]
    assert outlines == [(21, 3), (22, 6)]


def test_tokens_are_boxes_and_whole_words_are_the_darkest():
    figures.token_boxes({"0 merges": [["r", "e", "d"], [" ", "b"]], "2 merges": [["red"], [" b"]]})
    ax = plt.gca()
    assert [text.get_text() for text in ax.texts] == ["r", "e", "d", "·", "b", "red", "·b"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["0 merges", "2 merges"]
    shades = [box.get_alpha() for box in ax.patches]
    assert shades[5] == shades[6] == max(shades)
    assert ax.yaxis_inverted()
