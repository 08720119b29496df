"""What the tests of training share: small stages on the committed recordings."""

import tempfile
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from minomni.config import TINY
from minomni.data import text_to_speech
from minomni.omni import Omni
from minomni.train import loop, stage_table
from minomni.train.loop import Recipe, Stage
from minomni.train.stages.dpo import DPOStage

CACHE = Path(tempfile.mkdtemp())


@pytest.fixture(autouse=True)
def recordings_only(monkeypatch):
    """Train on data_samples/ alone: quick, and the same on machines without the synthesizer."""
    monkeypatch.setattr(text_to_speech, "available", lambda: False)
    monkeypatch.setattr(DPOStage, "num_prompts", 16)


def stages(names: Iterable[str], quick: tuple[str, ...] = ("codec",)) -> list:
    """Names of stages as test parameters; all but the quick ones are marked as slow."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]


def stage_of(name: str, batch: int = 4, steps: int = 100, seed: int = 0, **recipe) -> Stage:
    """A stage of random weights, ready to train, without samples: an untrained Talker speaks until
    it is cut off, which is slow.
    """
    torch.manual_seed(seed)
    recipe = Recipe(steps, batch, **{"lr": 5e-3, "warmup": 2, "weight_decay": 0.0, **recipe})
    stage = stage_table.STAGES[name](Omni(TINY), recipe, CACHE, seed)
    loop.run_setup(stage)
    stage.preview_text = lambda: ""
    stage.preview_audio = lambda: None
    return stage
