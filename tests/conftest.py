"""Every test computes on one thread and begins with the same random state, so that its outcome depends on neither machine nor chance."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Keep sums in one order."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def one_seed() -> None:
    """Begin with the same weights and data, whichever tests ran before."""
    torch.manual_seed(0)
