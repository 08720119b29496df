"""Steps, batch sizes and learning rates of every stage, by model size, and changes to them."""

from dataclasses import replace
from typing import Any

from minomni.arguments import check_int, check_number
from minomni.errors import UserError, quote
from minomni.train.loop import Recipe

Settings = dict[str, dict[str, Any]]  # {stage: {field of its recipe: value}}

RECIPES = {
    "tiny": {
        "codec": Recipe(steps=600, batch=16, lr=5e-3),
        "vocoder": Recipe(steps=450, batch=16, lr=5e-3),
        "dit": Recipe(steps=1500, batch=8, lr=8e-3),
        "language": Recipe(steps=1200, batch=8, lr=3.5e-3),
        "audio_align": Recipe(steps=550, batch=16, lr=6e-3),
        "vision_align": Recipe(steps=500, batch=32, lr=6e-3),
        "thinker1": Recipe(steps=50, batch=8, lr=5e-4),
        "thinker2": Recipe(steps=300, batch=8, lr=6e-4),
        "thinker3": Recipe(steps=120, batch=4, lr=8e-4),
        "chat": Recipe(steps=450, batch=8, lr=6e-4),
        "talker": Recipe(steps=600, batch=24, lr=5e-3),
        "dpo": Recipe(steps=80, batch=16, lr=2e-3, warmup=16),  # about two epochs
        "speakers": Recipe(steps=40, batch=24, lr=5e-4),
    },
}
# Steps of each stage by budget: `quick` is the recipes as they are, `long` made the shipped model.
BUDGETS: dict[str, dict[str, dict[str, int]]] = {
    "tiny": {
        "quick": {},
        "long": {
            "codec": 1600,
            "vocoder": 3000,
            "dit": 12000,
            "language": 3000,
            "audio_align": 1500,
            "vision_align": 1200,
            "thinker1": 100,
            "thinker2": 1000,
            "thinker3": 300,
            "chat": 1200,
            "talker": 2400,
            "dpo": 160,
            "speakers": 80,
        },
    },
}
# Twelve times the parameters, for a GPU: larger batches, a lower learning rate, and the number of
# steps that an H100 made in ten minutes. It did not reach dpo and speakers: theirs are a guess.
SMALL_STEPS = {
    "codec": 510,
    "vocoder": 670,
    "dit": 1330,
    "language": 810,
    "audio_align": 520,
    "vision_align": 550,
    "thinker1": 40,
    "thinker2": 110,
    "thinker3": 40,
    "chat": 220,
    "talker": 1010,
    "dpo": 80,
    "speakers": 40,
}
RECIPES["small"] = {
    name: Recipe(
        steps=SMALL_STEPS[name],
        batch=2 * tiny.batch,
        lr=tiny.lr / 2,
        warmup=min(100, SMALL_STEPS[name] // 5),
    )
    for name, tiny in RECIPES["tiny"].items()
}

# Fields of a recipe with their smallest and largest values.
WHOLE_FIELDS = {
    "steps": (1, 10**9),
    "batch": (1, 10**6),
    "accumulate": (1, 10**6),
    "warmup": (0, 10**9),
}
REAL_FIELDS = {"lr": (1e-9, 10.0), "weight_decay": (0.0, 10.0), "clip": (1e-6, 1e9)}


def recipe_of(name: str, size: str, settings: Settings | None = None) -> Recipe:
    """The recipe of a stage, changed by the settings.

    Raises UserError for an unknown stage or size.
    """
    check_stage(name)
    if size not in RECIPES:
        raise UserError(
            f"size {size!r} has no training recipe; sizes with one are {', '.join(RECIPES)}"
        )
    changed = (settings or {}).get(name, {})
    return replace(RECIPES[size][name], **changed)


def budget_settings(budget: str, size: str) -> Settings:
    """What a budget changes in the recipes of a size.

    Raises UserError for a size without this budget.
    """
    budgets = BUDGETS.get(size, {"quick": {}})
    if budget not in budgets:
        raise UserError(f"size {size!r} has no budget {budget!r}; it has {', '.join(budgets)}")
    return {stage: {"steps": steps} for stage, steps in budgets[budget].items()}


def merge_settings(settings: Settings, changes: Settings) -> Settings:
    """Settings with changes, field by field."""
    stages = settings | changes
    return {stage: settings.get(stage, {}) | changes.get(stage, {}) for stage in stages}


def parse_settings(assignments: list[str]) -> Settings:
    """What --set takes, "talker.steps=200", as settings; the last of two for one field counts.

    Raises UserError for a string of another form, an unknown stage or field, and a bad value.
    """
    settings: Settings = {}
    for assignment in assignments:
        target, _, value = assignment.partition("=")
        stage, _, field = target.partition(".")
        if not (stage and field and value):
            raise UserError(
                f"--set {quote(assignment)}: expected STAGE.FIELD=VALUE, as in talker.steps=200"
            )
        check_stage(stage)
        settings.setdefault(stage, {})[field] = check_field(stage, field, to_number(value), "--set")
    return settings


def check_settings(data: dict, source: str) -> Settings:
    """The settings that a JSON object holds. source: its name in messages. Raises UserError."""
    settings: Settings = {}
    for stage, fields in data.items():
        check_stage(stage)
        if not isinstance(fields, dict):
            raise UserError(f"{source}: {stage} is {quote(fields)}; expected an object of fields")
        settings[stage] = {
            field: check_field(stage, field, value, source) for field, value in fields.items()
        }
    return settings


def check_stage(name: str) -> None:
    """Raises UserError for an unknown stage."""
    stages = RECIPES["tiny"]
    if name not in stages:
        raise UserError(f"unknown stage {quote(name)}; the stages are {', '.join(stages)}")


def check_field(stage: str, field: str, value: object, source: str) -> float:
    """The value of a recipe's field. source: its name in messages.

    Raises UserError for an unknown field and a bad value.
    """
    label = f"{source}: {stage}.{field}"
    if field in WHOLE_FIELDS:
        return check_int(value, label, *WHOLE_FIELDS[field])
    if field in REAL_FIELDS:
        return check_number(value, label, *REAL_FIELDS[field])
    fields = ", ".join([*WHOLE_FIELDS, *REAL_FIELDS])
    raise UserError(f"{source}: unknown field {quote(field)} of a recipe; the fields are {fields}")


def to_number(text: str) -> object:
    """The int or float that a string spells, or else the string itself."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def format_settings(fields: dict[str, float]) -> str:
    """The settings of one stage for a message."""
    return ", ".join(f"{field}={value:g}" for field, value in fields.items()) or "its own recipe"
