"""Every test computes on one thread and begins with the same random state and nothing left of the last, so that its outcome depends on neither machine nor chance."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator

import pytest
import torch
from torch.nn.modules import module as torch_modules


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Keep sums in one order."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def one_seed() -> None:
    """Begin with the same weights and data, whichever tests ran before."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Forget what a test has compiled, and collect watchers that it has not closed: both are the process's, and the next test would see them."""
    yield
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None and dynamo.utils.counters:
        dynamo.reset()
        dynamo.utils.counters.clear()
    if torch_modules._global_forward_pre_hooks:
        gc.collect()
