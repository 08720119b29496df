"""Ablations: what a stage contributes. `python -m minomni ablate NAME` prints a table."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from minomni import load
from minomni.chat.reply import Reply
from minomni.checkpoint.hf_config import read_json, write_json
from minomni.checkpoint.saving import PROVENANCE_FILE
from minomni.config import ThinkerConfig
from minomni.data.grammar import statements
from minomni.data.word_errors import ErrorPair, word_error_rate
from minomni.errors import UserError
from minomni.eval.asr import LONG_STATEMENT
from minomni.eval.evaluator import ANSWERS, Evaluator, hard_sentences
from minomni.eval.report import MROPE
from minomni.eval.stats import bootstrap, markdown_table, word_error_metric
from minomni.inputs.mel import HOP
from minomni.inputs.prompt import Inputs
from minomni.thinker.tmrope import position_ids
from minomni.train.loop import train
from minomni.train.pipeline import cache_of, make_stage
from minomni.train.recipes import recipe_of
from minomni.train.run_folder import is_finished, load_stages, result_file
from minomni.train.stage_table import STAGES
from minomni.train.stages.dpo import DPOStage

BETAS = (0.03, 0.1, 0.3, 1.0)
SILENT_LEVEL = 0.01  # of full scale: a 10-ms frame that stays below is silent
# Changes to the recipes of the fine-tuning that may break the speech, and of its repair. The first
# learning rate is five times that of stage chat: a careless fine-tuning.
TUNING: dict[str, dict[str, Any]] = {
    "chat": {"steps": 150, "lr": 3e-3},
    "talker": {"steps": 200, "lr": 2.5e-3},
}


def dpo(home: Path, items: int, seed: int) -> str:
    """Word error rate of long sentences with repeated words, before and after stage dpo.

    Beside it, signs of reward hacking: speech that gets short, silent or repetitive.
    """
    evaluator = Evaluator(load(str(home / "model")), items, cache_of(home))
    sentences = hard_sentences()[:items]
    errors = {}
    replies = {}
    for stage, name in (("talker", "before DPO"), ("dpo", "after DPO")):
        load_stages(evaluator.omni, home / "stages", [stage])
        replies[name] = evaluator.speak_all(sentences)
        errors[name] = evaluator.reply_errors(sentences, replies[name], LONG_STATEMENT)
    reduction = relative_reduction(errors["before DPO"], errors["after DPO"])
    return "\n\n".join((error_table(errors), reduction, speech_table(replies)))


def beta(home: Path, items: int, seed: int) -> str:
    """Stage dpo with other values of beta; a smaller beta allows a larger change of the policy.

    The sentences are training sentences, because the stage's beta is chosen by this table.
    """
    evaluator = Evaluator(load(str(home / "model")), items, cache_of(home))
    sentences = hard_sentences(held_out=False)[:items]
    stage = make_stage("dpo", trained_size(home), home, seed)
    assert isinstance(stage, DPOStage)
    assert stage.omni.talker is not None
    assert evaluator.omni.talker is not None
    errors = {}
    replies = {}
    reductions = []
    for value in (None, *BETAS):
        load_stages(stage.omni, home / "stages", ["talker"])
        name = "before DPO"
        if value is not None:
            name = f"beta {value:g}"
            stage.beta = value
            with TemporaryDirectory() as run:
                train(stage, Path(run))

        evaluator.omni.talker.load_state_dict(stage.omni.talker.state_dict())
        replies[name] = evaluator.speak_all(sentences)
        errors[name] = evaluator.reply_errors(sentences, replies[name], LONG_STATEMENT)
        if value is not None:
            reductions.append(f"{name}: {relative_reduction(errors['before DPO'], errors[name])}")
    return "\n\n".join((error_table(errors), "\n".join(reductions), speech_table(replies)))


def tuning(home: Path, items: int, seed: int) -> str:
    """Speech after fine-tuning the Thinker alone, and its repair (Qwen2.5-Omni issue 344).

    After the Thinker's fine-tuning the Talker reads states that it was not trained on. Then the
    Talker is trained on them for some steps.
    """
    omni = load(str(home / "model"))
    size = trained_size(home)
    evaluator = Evaluator(omni, items, cache_of(home))
    folder = home / "ablate-tuning"

    # Sentences of the test recordings, at equal distances.
    recorded = {utterance.text for utterance in evaluator.builder.speech.utterances}
    candidates = sorted(recorded & statements().keys())
    sentences = candidates[:: max(1, len(candidates) // items)][:items]

    errors = {"as trained": evaluator.reply_errors(sentences, evaluator.speak_all(sentences))}
    for name, row in (
        ("chat", "after tuning the Thinker"),
        ("talker", "after tuning the Talker to it"),
    ):
        recipe = replace(recipe_of(name, size), **TUNING[name])
        stage = STAGES[name](omni, recipe, cache_of(home), seed + 1)
        train(stage, folder)
        omni.eval()
        errors[row] = evaluator.reply_errors(sentences, evaluator.speak_all(sentences))
    return error_table(errors)


def stage3(home: Path, items: int, seed: int) -> str:
    """Half a minute of speech and long videos, before and after stage thinker3.

    Short ones are listed too. The examples are long, so there are half as many as in the report.
    """
    evaluator = Evaluator(load(str(home / "model")), items, cache_of(home))
    count = max(2, items // 2)
    columns = []
    for stage in ("thinker2", "thinker3"):
        load_stages(evaluator.omni, home / "stages", [stage])
        columns.append(evaluator.long_metrics(count))

    rows = []
    for before, after in zip(*columns):
        name, *values = after.cells()
        rows.append([name, f"{before.value:.1%}", *values])
    header = ("metric", "before stage 3", "after it", "95 % interval", "n")
    return markdown_table(header, rows)


def tmrope(home: Path, items: int, seed: int) -> str:
    """Accuracy on audio in videos of the model and of one trained with plain M-RoPE.

    Trains the Thinker's stages again, or resumes that. The encoders' first stages are copied,
    because they have no positions in time. The result is also written for the report.
    """
    run = home / "mrope"
    train_plain_mrope(home, run, seed)

    metrics = {}
    for name, position_function, stages in (
        ("TMRoPE", position_ids, home),
        ("plain M-RoPE", plain_mrope, run),
    ):
        evaluator = Evaluator(load(str(home / "model")), items, cache_of(home))
        load_stages(evaluator.omni, stages / "stages", ["chat"])
        evaluator.omni.thinker.position_ids = position_function
        metrics[name] = evaluator.accuracy("sync_accuracy", ANSWERS["sync_accuracy"])
    result = {"sync_accuracy_mrope": metrics["plain M-RoPE"].value, "items": items}
    write_json(home / MROPE, result)

    rows = [[name, *metric.cells()[1:]] for name, metric in metrics.items()]
    return markdown_table(("object visible at the tone", "accuracy", "95 % interval", "n"), rows)


def train_plain_mrope(home: Path, run: Path, seed: int) -> None:
    """Train the Thinker's stages with plain M-RoPE in the folder `run`, from home's encoders."""
    size = trained_size(home)
    (run / "stages").mkdir(parents=True, exist_ok=True)
    for name in ("audio_align", "vision_align"):
        shutil.copy(result_file(home / "stages", name), run / "stages")
    for name in ("language", "thinker1", "thinker2", "thinker3", "chat"):
        stage = make_stage(name, size, run, seed, cache=cache_of(home))
        stage.omni.thinker.position_ids = plain_mrope
        if not is_finished(run / "stages", name):
            train(stage, run / "stages", resume=True)


def plain_mrope(inputs: Inputs, config: ThinkerConfig) -> Tensor:
    """Position ids without absolute time: the grid steps of a video are 0, 1, 2, ...

    Otherwise as position_ids(): inputs of B rows -> [3, B, L].
    """
    ids = position_ids(inputs, config)
    grids = iter(inputs.video_grids)
    for row, tokens in enumerate(inputs.input_ids):
        positions = (tokens == config.tokens.video).nonzero()[:, 0]
        while len(positions):
            steps, height, width = next(grids)
            cells = height * width // config.vision.spatial_merge_size**2
            video = positions[: steps * cells]
            positions = positions[steps * cells :]
            step = torch.arange(steps).repeat_interleave(cells)
            ids[0, row, video] = ids[0, row, video[0]] + step
    return ids


def trained_size(home: Path) -> str:
    """Size of the model that was trained in a run folder."""
    advice = f"python -m minomni train --home {home} makes it"
    return read_json(home / "model" / PROVENANCE_FILE, advice=advice)["size"]


def error_table(errors: dict[str, list[ErrorPair]]) -> str:
    """(edits, words) of the same sentences by name -> a Markdown table of word error rates."""
    rows = [word_error_metric(name, pairs).cells() for name, pairs in errors.items()]
    return markdown_table(("speech", "word error rate", "95 % interval", "words"), rows)


def relative_reduction(before: list[ErrorPair], after: list[ErrorPair]) -> str:
    """Relative reduction of the word error rate with its interval, as one line."""
    pairs = list(zip(before, after))
    low, high = bootstrap(reduced_share, pairs)
    return (
        f"relative reduction {reduced_share(pairs):.1%}, 95 % interval {low:.1%} to {high:.1%}, "
        "sentences drawn in pairs"
    )


def reduced_share(pairs: list[tuple[ErrorPair, ErrorPair]]) -> float:
    """Relative reduction of the word error rate over (before, after); 0 without errors before."""
    before = word_error_rate([before for before, _ in pairs])
    after = word_error_rate([after for _, after in pairs])
    return (before - after) / before if before else 0.0


def speech_table(replies: dict[str, list[Reply]]) -> str:
    """Replies to the same sentences by name -> a Markdown table of length, silence, repetition."""
    rows = []
    for name, spoken in replies.items():
        seconds = sum(reply.seconds for reply in spoken) / len(spoken)
        silent = (peak_levels(spoken) < SILENT_LEVEL).float().mean()
        repeated = sum(int((reply.codes[1:] == reply.codes[:-1]).sum()) for reply in spoken)
        codes = max(1, sum(len(reply.codes) for reply in spoken))
        rows.append([name, f"{seconds:.2f}", f"{silent:.1%}", f"{repeated / codes:.1%}"])
    return markdown_table(("speech", "seconds a sentence", "silent", "repeated codes"), rows)


def peak_levels(replies: list[Reply]) -> Tensor:
    """Peak of each 10-ms frame of the replies [frames]; one frame of zero without any."""
    peaks = []
    for reply in replies:
        if len(reply.wave) >= HOP:
            frames = reply.wave.unfold(0, HOP, HOP)
            peaks.append(frames.abs().amax(1))
    return torch.cat(peaks or [torch.zeros(1)])


ABLATIONS: dict[str, Callable[[Path, int, int], str]] = {
    "beta": beta,
    "dpo": dpo,
    "stage3": stage3,
    "tmrope": tmrope,
    "tuning": tuning,
}


def ablate(name: str, home: Path, items: int, seed: int) -> str:
    """The table of an ablation. Raises UserError if the run folder lacks a file that it needs."""
    stages = home / "stages"
    results = [result_file(stages, name) for name in ("talker", "dpo")]
    for file in (home / "model" / PROVENANCE_FILE, *results):
        if not file.exists():
            raise UserError(f"{file} is missing; python -m minomni train --home {home} makes it")
    return ABLATIONS[name](home, items, seed)
