"""Every test computes on one thread, so that numbers do not depend on the machine."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Keep sums in one order."""
    torch.set_num_threads(1)
