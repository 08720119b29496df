"""What a stage is good for: each ablation is one command, `python -m minomni ablate NAME`, and
prints a table.
"""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from minomni import load
from minomni.checkpoint.hf_config import read_json, write_json
from minomni.config import ThinkerConfig
from minomni.data.grammar import statements
from minomni.errors import UserError
from minomni.eval.asr import LONG
from minomni.eval.evaluator import ANSWERS, Evaluator, hard_sentences
from minomni.eval.report import MROPE
from minomni.eval.stats import bootstrap, word_error_metric, word_error_rate
from minomni.inputs.mel import HOP
from minomni.inputs.prompt import Inputs
from minomni.thinker.tmrope import position_ids
from minomni.train.checkpoint import load_stages
from minomni.train.loop import train
from minomni.train.pipeline import STAGES, TRAINED, make_stage
from minomni.train.recipes import recipe_of

BETAS = 0.03, 0.1, 0.3, 1.0
QUIET = 0.01  # of full scale: 10 ms that stay below it are silent
# Steps and rates of the tuning that may break the voice, and of what mends it. The first is five
# times the rate of `chat`, as of somebody who tunes in haste.
TUNING = {"chat": {"steps": 150, "lr": 3e-3}, "talker": {"steps": 200, "lr": 2.5e-3}}


def dpo(home: Path, items: int, seed: int) -> str:
    """Word error of the judge on long sentences that repeat words, before the DPO stage and after
    it.

    Beside it, habits by which a reward is cheated: speech that gets short, silent, or says a code
    again and again.
    """
    examiner, sentences = Evaluator(load(str(home / "model")), items), hard_sentences()[:items]
    rows, replies = {}, {}
    for stage, name in (("talker", "before DPO"), ("dpo", "after DPO")):
        load_stages(examiner.omni, home / "stages", [stage])
        replies[name] = examiner.spoken(sentences)
        rows[name] = examiner.preference_metrics(sentences, replies[name], LONG)
    return "\n\n".join((table(rows), relative_fall(*rows.values()), habits(replies)))


def beta(home: Path, items: int, seed: int) -> str:
    """The DPO stage with other leashes: the smaller beta, the further it may go from where it
    began.

    Scored on sentences of the training's side, since the stage's beta is chosen by this table.
    """
    examiner, sentences = (
        Evaluator(load(str(home / "model")), items),
        hard_sentences(held=False)[:items],
    )
    stage = make_stage("dpo", read_json(home / "model" / TRAINED)["size"], home, seed)
    rows, replies, falls = {}, {}, []
    for value in (None, *BETAS):
        name = "before DPO" if value is None else f"beta {value:g}"
        load_stages(stage.omni, home / "stages", ["talker"])
        if value is not None:
            stage.beta = value
            with TemporaryDirectory() as run:
                train(stage, Path(run))
        examiner.omni.talker.load_state_dict(stage.omni.talker.state_dict())
        replies[name] = examiner.spoken(sentences)
        rows[name] = examiner.preference_metrics(sentences, replies[name], LONG)
        falls.append(f"{name}: {relative_fall(rows['before DPO'], rows[name])}")
    return "\n\n".join((table(rows), "\n".join(falls[1:]), habits(replies)))


def relative_fall(before: list[tuple[int, int]], after: list[tuple[int, int]]) -> str:
    """By how much word error fell, with its interval, in a line."""
    pairs = list(zip(before, after))
    low, high = bootstrap(fall, pairs)
    return f"relative fall {fall(pairs):.1%}, 95 % interval {low:.1%} to {high:.1%}, sentences drawn in pairs"


def habits(replies: dict[str, list]) -> str:
    """Replies to the same sentences by name -> a Markdown table of how they are spoken, whatever is
    understood.
    """
    lines = ["| speech | seconds a sentence | silent | a code said again |", "|---|---|---|---|"]
    for name, spoken in replies.items():
        seconds = sum(reply.seconds for reply in spoken) / len(spoken)
        loud = torch.cat(
            [
                reply.wave.unfold(0, HOP, HOP).abs().amax(1)
                for reply in spoken
                if len(reply.wave) >= HOP
            ]
            or [torch.zeros(1)]
        )  # [frames of 10 ms]
        again = sum(int((reply.codes[1:] == reply.codes[:-1]).sum()) for reply in spoken)
        codes = max(1, sum(len(reply.codes) for reply in spoken))
        lines.append(
            f"| {name} | {seconds:.2f} | {(loud < QUIET).float().mean():.1%} | {again / codes:.1%} |"
        )
    return "\n".join(lines)


def fall(pairs: list[tuple]) -> float:
    """Relative fall of word error over pairs of (edits, words) before and after; 0 where nothing
    was wrong before.
    """
    before, after = (word_error_rate([pair[i] for pair in pairs]) for i in (0, 1))
    return (before - after) / before if before else 0.0


def tuning(home: Path, items: int, seed: int) -> str:
    """The fault that users of the release report most (Qwen2.5-Omni issue 344), and its repair.

    The Thinker is tuned some more, alone, so the Talker reads states that it has never seen. Then
    the Talker reads them for some steps.
    """
    omni, size = load(str(home / "model")), read_json(home / "model" / TRAINED)["size"]
    examiner, folder, rows = Evaluator(omni, items), home.parent / "ablate-tuning", {}
    said = sorted({u.text for u in examiner.teacher.speech.utterances} & statements().keys())
    sentences = said[:: max(1, len(said) // items)][:items]
    rows["as trained"] = examiner.preference_metrics(sentences, examiner.spoken(sentences))
    for name, row in (
        ("chat", "after tuning the Thinker"),
        ("talker", "after tuning the Talker to it"),
    ):
        recipe = replace(recipe_of(name, size), **TUNING[name])
        train(STAGES[name](omni, recipe, home.parent / "corpus", seed + 1), folder)
        omni.eval()
        rows[row] = examiner.preference_metrics(sentences, examiner.spoken(sentences))
    return table(rows)


def stage3(home: Path, items: int, seed: int) -> str:
    """Half a minute of speech and a minute of pictures, before the stage of long sequences and
    after it.

    Short ones stand beside them. Fewer items than a row of the card: each is long.
    """
    examiner, count = Evaluator(load(str(home / "model")), items), max(2, items // 2)
    lines = ["| what | before stage 3 | after it | 95 % interval | n |", "|---|---|---|---|---|"]
    columns = []
    for stage in ("thinker2", "thinker3"):
        load_stages(examiner.omni, home / "stages", [stage])
        columns.append(examiner.long_rows(count))
    for before, after in zip(*columns):
        low, high = after.interval()
        values = f"{before.value:.1%} | {after.value:.1%} | {low:.1%} to {high:.1%}"
        lines.append(f"| {before.name} | {values} | {after.n} |")
    return "\n".join(lines)


def tmrope(home: Path, items: int, seed: int) -> str:
    """The Thinker's stages once more with plain M-RoPE, and what that model answers about sounds in
    clips.

    Ears and eyes are taken over as they are: neither knows positions in time. Goes on where it was
    stopped. The result also stands in the report card from then on.
    """
    size, model = read_json(home / "model" / TRAINED)["size"], str(home / "model")
    run = home.parent / f"{home.name}-mrope"
    (run / "stages").mkdir(parents=True, exist_ok=True)
    for name in ("audio_align", "vision_align"):
        shutil.copy(home / "stages" / f"{name}.safetensors", run / "stages")
    for name in ("language", "thinker1", "thinker2", "thinker3", "chat"):
        stage = make_stage(name, size, run, seed)
        stage.omni.thinker.position_ids = plain_mrope
        if not (run / "stages" / f"{name}.safetensors").exists():
            train(stage, run / "stages", resume=True)
    rows = []
    for what, places, stages in (
        ("TMRoPE", position_ids, home),
        ("plain M-RoPE", plain_mrope, run),
    ):
        examiner = Evaluator(load(model), items)
        load_stages(examiner.omni, stages / "stages", ["chat"])
        examiner.omni.thinker.position_ids = places
        rows.append((what, examiner.answers("sync_accuracy", ANSWERS["sync_accuracy"])))
    write_json(home / MROPE, {"sync_accuracy_mrope": rows[1][1].value, "items": items})
    lines = [
        "| which thing was there at the sound | right | 95 % interval | n |",
        "|---|---|---|---|",
    ]
    for what, row in rows:
        low, high = row.interval()
        lines.append(f"| {what} | {row.value:.1%} | {low:.1%} to {high:.1%} | {row.n} |")
    return "\n".join(lines)


def plain_mrope(inputs: Inputs, config: ThinkerConfig) -> Tensor:
    """Position ids as they were before TMRoPE: a video's grid steps are 0, 1, 2, ... whenever they
    are shown.

    Everything else is position_ids(): inputs of B rows -> [3, B, L].
    """
    ids, grids = position_ids(inputs, config), iter(inputs.video_grids)
    for row, tokens in enumerate(inputs.input_ids):
        places = (tokens == config.tokens.video).nonzero()[:, 0]
        while len(places):
            steps, *sides = next(grids)
            cells = sides[0] * sides[1] // config.vision.spatial_merge_size**2
            here, places = places.split([steps * cells, len(places) - steps * cells])
            ids[0, row, here] = ids[0, row, here[0]] + torch.arange(steps).repeat_interleave(cells)
    return ids


def table(rows: dict[str, list[tuple[int, int]]]) -> str:
    """(edits, words) of the same sentences by name -> a Markdown table of word errors."""
    lines = ["| speech | word error by the judge | 95 % interval | words |", "|---|---|---|---|"]
    for name, items in rows.items():
        row = word_error_metric(name, items)
        low, high = row.interval()
        lines.append(f"| {name} | {row.value:.1%} | {low:.1%} to {high:.1%} | {row.n} |")
    return "\n".join(lines)


ABLATIONS: dict[str, Callable[[Path, int, int], str]] = {
    "beta": beta,
    "dpo": dpo,
    "stage3": stage3,
    "tmrope": tmrope,
    "tuning": tuning,
}


def ablate(name: str, home: Path, items: int, seed: int) -> str:
    """A table by name. Raises UserError where the run folder does not hold what it needs."""
    stages = home / "stages"
    for needed in (
        home / "model" / TRAINED,
        stages / "talker.safetensors",
        stages / "dpo.safetensors",
    ):
        if not needed.exists():
            raise UserError(f"{needed} is missing: python -m minomni train tiny makes it")
    return ABLATIONS[name](home, items, seed)
