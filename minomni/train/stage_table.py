"""The stages in the paper's order, and a table of what each one trains, on what and how long."""

from collections.abc import Iterable

from minomni.train.loop import Stage, format_losses
from minomni.train.measured_runs import measured
from minomni.train.recipes import recipe_of
from minomni.train.stages.audio_align import AudioAlignStage
from minomni.train.stages.codec import CodecStage
from minomni.train.stages.dit import DiTStage
from minomni.train.stages.dpo import DPOStage
from minomni.train.stages.speakers import SpeakersStage
from minomni.train.stages.talker import TalkerStage
from minomni.train.stages.thinker import (
    ChatStage,
    LanguageStage,
    Thinker1Stage,
    Thinker2Stage,
    Thinker3Stage,
)
from minomni.train.stages.vision_align import VisionAlignStage
from minomni.train.stages.vocoder import VocoderStage

STAGES: dict[str, type[Stage]] = {
    stage.name: stage
    for stage in (
        CodecStage,
        VocoderStage,
        DiTStage,
        LanguageStage,
        AudioAlignStage,
        VisionAlignStage,
        Thinker1Stage,
        Thinker2Stage,
        Thinker3Stage,
        ChatStage,
        TalkerStage,
        DPOStage,
        SpeakersStage,
    )
}
COLUMNS = (
    "stage",
    "steps",
    "rows/step",
    "lr",
    "steps*",
    "seconds*",
    "final loss*",
    "trains",
    "frozen",
    "data",
)


def stage_table(size: str) -> str:
    """The stages as a table: parameters that train and that stay frozen, time, data, final losses.

    Time and losses are those of the measured steps. Raises UserError for an unknown size.
    """
    measurements = measured(size)
    rows: list[tuple[str, ...]] = [COLUMNS]
    for name, stage in STAGES.items():
        measured_steps = "-"
        seconds = "-"
        losses = "-"
        if name in measurements:
            measured_steps = str(measurements[name].step)
            seconds = f"{measurements[name].seconds:g}"
            losses = format_losses(measurements[name].losses)
        recipe = recipe_of(name, size)
        row = (
            name,
            str(recipe.steps),
            str(recipe.batch * recipe.accumulate),
            f"{recipe.lr:.0e}",
            measured_steps,
            seconds,
            losses,
            short_names(stage.trainable),
            short_names(frozen_parts(stage)),
            stage.data,
        )
        rows.append(row)

    hardware = " and ".join(sorted({row.hardware for row in measurements.values()}))
    notes = [f"{name:<14}{stage.description}" for name, stage in STAGES.items()]
    footnote = f"* measured on {hardware or 'no machine yet'}; - not measured"
    return "\n".join([*align_columns(rows), "", footnote, "", *notes])


def align_columns(rows: list[tuple[str, ...]]) -> list[str]:
    """Rows of cells as lines whose columns begin below each other."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return lines


def frozen_parts(stage: type[Stage]) -> list[str]:
    """Prefixes of the parameters that earlier stages trained, and that this one uses unchanged."""
    used: set[str] = set()
    for need in stage.needs:
        used.update(part for part in STAGES[need].trainable if not part.startswith(stage.trainable))
    # A prefix such as "thinker." covers the longer ones that begin with it.
    return sorted(part for part in used if not part.startswith(tuple(used - {part})))


def short_names(prefixes: Iterable[str]) -> str:
    """Parameter name prefixes without what repeats the module's name; "-" for none."""
    names = [p.removeprefix("token2wav.code2wav_").removesuffix(".") for p in prefixes]
    return ", ".join(names) or "-"
