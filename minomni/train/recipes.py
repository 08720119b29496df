"""Steps, batch sizes and learning rates of every stage, by model size."""

from minomni.errors import UserError
from minomni.train.loop import Recipe

RECIPES = {
    "tiny": {
        "codec": Recipe(steps=900, batch=16, lr=5e-3),
        "vocoder": Recipe(steps=600, batch=16, lr=5e-3),
        "dit": Recipe(steps=1800, batch=16, lr=8e-3),
        "language": Recipe(steps=3000, batch=8, lr=3.5e-3),
        "audio_align": Recipe(steps=1100, batch=16, lr=6e-3),
        "vision_align": Recipe(steps=1050, batch=32, lr=6e-3),
        "thinker1": Recipe(steps=100, batch=8, lr=5e-4),
        "thinker2": Recipe(steps=800, batch=8, lr=6e-4),
        "thinker3": Recipe(steps=240, batch=4, lr=8e-4),
        "chat": Recipe(steps=1100, batch=8, lr=6e-4),
        "talker": Recipe(steps=1500, batch=24, lr=5e-3),
        "dpo": Recipe(steps=160, batch=16, lr=2e-3, warmup=16),  # about four passes
        "speakers": Recipe(steps=80, batch=24, lr=5e-4),
    },
}
# Twelve times the parameters, for a GPU: in larger batches, at a lower rate, as many steps as an
# H100 did in ten minutes; those of dpo and speakers, which it did not reach, are a guess.
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
        batch=2 * r.batch,
        lr=r.lr / 2,
        warmup=min(100, SMALL_STEPS[name] // 5),
    )
    for name, r in RECIPES["tiny"].items()
}


def recipe_of(name: str, size: str) -> Recipe:
    """Raises UserError for an unknown stage or size."""
    stages = RECIPES["tiny"]
    if name not in stages:
        raise UserError(f"unknown stage {name!r}; the stages are {', '.join(stages)}")
    if size not in RECIPES:
        raise UserError(
            f"size {size!r} has no training recipe; sizes with one are {', '.join(RECIPES)}"
        )
    return RECIPES[size][name]
