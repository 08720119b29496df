"""Every test runs on one thread with fixed seeds, so that its numbers repeat on any machine."""

import pytest
import torch


@pytest.fixture(autouse=True)
def repeatable():
    torch.set_num_threads(1)
    torch.manual_seed(0)
