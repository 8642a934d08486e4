"""The pytest fixture `gradwatch`: loaded in every pytest run of its environment, so it imports next to nothing."""

from __future__ import annotations

from types import ModuleType

import pytest


@pytest.fixture
def gradwatch() -> ModuleType:
    """Return the package, for `gradwatch.assert_healthy(model, batch)` and all the rest."""
    import gradwatch

    return gradwatch
