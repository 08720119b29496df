"""What a stage is good for: each ablation is one command, `python -m minomni ablate NAME`, and prints a table."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from .. import load
from ..config_json import read_json
from ..errors import UserError
from .loop import train
from .report import Examiner, bootstrap, hard_sentences, word_error, word_error_row
from .run_folder import graduate
from .stages import STAGES, TRAINED, recipe_of

TUNING = {"chat": 150, "talker": 200}  # steps of the tuning that breaks the voice, and of what mends it


def dpo(home: Path, items: int, seed: int) -> str:
    """Word error of the judge on long sentences that repeat words, before the DPO stage and after it."""
    examiner, sentences = Examiner(load(str(home / "model")), items), hard_sentences()[:items]
    before, after = [], []
    for stage, kept in (("talker", before), ("dpo", after)):
        graduate(examiner.omni, home / "stages", [stage])
        kept += examiner.understood(sentences)
    pairs = list(zip(before, after))
    low, high = bootstrap(fall, pairs)
    total = f"\n\nrelative fall {fall(pairs):.1%}, 95 % interval {low:.1%} to {high:.1%}, sentences drawn in pairs"
    return table({"before DPO": before, "after DPO": after}) + total


def fall(pairs: list[tuple]) -> float:
    """Relative fall of word error over pairs of (edits, words) before and after; 0 where nothing was wrong before."""
    before, after = (word_error([pair[i] for pair in pairs]) for i in (0, 1))
    return (before - after) / before if before else 0.0


def tuning(home: Path, items: int, seed: int) -> str:
    """The fault that users of the release report most (Qwen2.5-Omni issue 344), and its repair.

    The Thinker is tuned some more, alone, so the Talker reads states that it has never seen. Then the Talker reads them
    for some steps.
    """
    omni, size = load(str(home / "model")), read_json(home / "model" / TRAINED)["size"]
    examiner, folder, rows = Examiner(omni, items), home.parent / "ablate-tuning", {}
    sentences = sorted(examiner.statements())[:: max(1, len(examiner.statements()) // items)][:items]
    rows["as trained"] = examiner.understood(sentences)
    for name, said in (("chat", "after tuning the Thinker"), ("talker", "after tuning the Talker to it")):
        recipe = recipe_of(name, size)
        shorter = replace(recipe, steps=TUNING[name], lr=recipe.lr / 2)
        train(STAGES[name](omni, shorter, home.parent / "corpus", seed + 1), folder)
        omni.eval()
        rows[said] = examiner.understood(sentences)
    return table(rows)


def table(rows: dict[str, list[tuple[int, int]]]) -> str:
    """(edits, words) of the same sentences by name -> a Markdown table of word errors."""
    lines = ["| speech | word error by the judge | 95 % interval | words |", "|---|---|---|---|"]
    for name, items in rows.items():
        row = word_error_row(name, items)
        low, high = row.interval()
        lines.append(f"| {name} | {row.value:.1%} | {low:.1%} to {high:.1%} | {row.n} |")
    return "\n".join(lines)


ABLATIONS: dict[str, Callable[[Path, int, int], str]] = {"dpo": dpo, "tuning": tuning}


def ablate(name: str, home: Path, items: int, seed: int) -> str:
    """A table by name. Raises UserError where the run folder does not hold what it needs."""
    for needed in (home / "model" / TRAINED, home / "stages" / "talker.safetensors", home / "stages" / "dpo.safetensors"):
        if not needed.exists():
            raise UserError(f"{needed} is missing: python -m minomni train tiny makes it")
    return ABLATIONS[name](home, items, seed)
