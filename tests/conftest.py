"""Every test computes on one thread and begins with the same random state and nothing compiled, so that its outcome depends on neither machine nor chance."""

from __future__ import annotations

import sys
from collections.abc import Iterator

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


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    """Forget what a test has compiled: gradwatch asks torch.compile's counters, which are the process's, whether it is in use."""
    yield
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None and dynamo.utils.counters:
        dynamo.reset()
        dynamo.utils.counters.clear()
