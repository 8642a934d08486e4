"""Captured sequences -> gradients per timestep, and how far back a module can see."""

from __future__ import annotations

from gradwatch.timesteps.capture import Recorder
from gradwatch.timesteps.model import ModelGain
from gradwatch.timesteps.result import Trace, traces

__all__ = ["ModelGain", "Recorder", "Trace", "traces"]
