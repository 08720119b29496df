"""Every test runs on one thread with fixed seeds, so that its numbers repeat on any machine."""

from dataclasses import replace

import pytest
import torch


@pytest.fixture(autouse=True)
def repeatable():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A tiny model of random weights in a folder: it answers nonsense, briefly, but through the real machinery."""
    from minomni import weights
    from minomni.config import TINY
    from minomni.omni import Omni
    from minomni.token2wav.speaker import Voice
    from minomni.train.vocabulary import world_tokenizer

    torch.manual_seed(0)
    config = replace(
        TINY,
        thinker_sampling=replace(TINY.thinker_sampling, max_new_tokens=4),
        talker_sampling=replace(TINY.talker_sampling, max_new_tokens=6),
        flow=replace(TINY.flow, points=3),
    )
    omni = Omni(config)
    omni.tokenizer = world_tokenizer(config.thinker.tokens)
    omni.voices = {
        name: Voice(name, 500 + i, torch.randn(1, 160), torch.randn(1, 50, 80) - 5)
        for i, name in enumerate(("Ann", "Bob"))
    }
    folder = tmp_path_factory.mktemp("tiny") / "model"
    weights.save(omni, folder)
    return folder
