"""Every test begins on one thread, with the same random state and nothing left of the last: chance decides nothing."""

from __future__ import annotations

import functools
import gc
import os
import sys
from collections.abc import Generator, Iterator

import pytest
import torch
from torch.nn.modules import module as torch_modules

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":16:8")  # without which sums on a CUDA device have no one order


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let the browser be named."""
    parser.addoption("--browser", default=None, help="a Chromium for the tests of the page")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a device that is not there."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Keep sums in one order."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="module")
def kept_modules() -> None:
    """Let the garbage collector pass over what is imported and stays: each round would walk through all of torch."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def one_seed() -> None:
    """Begin with the same weights and data, whichever tests ran before."""
    torch.manual_seed(0)


@pytest.fixture
def one_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take one cotangent, however sure a horizon is then: what comes of one can be told exactly."""
    monkeypatch.setattr("gradwatch.timesteps.input_gain.COTANGENTS", 1)


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Forget what a test compiled, and collect watchers it left open: both outlive it in this process."""
    yield
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None and dynamo.utils.counters:
        dynamo.reset()
        dynamo.utils.counters.clear()
    if torch_modules._global_forward_pre_hooks:
        gc.collect()  # a watcher that was dropped without close, inside of its optimizer's cycle
    assert not torch_modules._global_forward_pre_hooks


@functools.cache
def lstm_under_autocast() -> bool:
    """Tell whether torch can run an LSTM in bfloat16 here: for some processors its library has no kernel."""
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.nn.LSTM(2, 2)(torch.zeros(2, 1, 2))
    except RuntimeError:
        return False
    return True


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, object, object]:
    """Skip what torch itself cannot do here."""
    try:
        return (yield)
    except RuntimeError as error:
        if "could not create a primitive descriptor for the LSTM" in str(error) and not lstm_under_autocast():
            pytest.skip("torch cannot run an LSTM under bfloat16 autocast on this machine")
        raise
