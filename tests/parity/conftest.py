"""Every test of parity draws the same random numbers each time that it runs."""

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
