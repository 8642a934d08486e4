"""The table of programs: which library, where its recipe stands, and what is true of its steps."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from benchmarks.trainers.recipes import PROGRAMS
from benchmarks.trainers.truth import When


@dataclass(frozen=True)
class Library:
    """A program of a library."""

    name: str
    section: str
    """The heading of its recipe in docs/trainers.md."""
    environment: str
    when: When = "step"
    loss: bool = True
    """Whether the recipe tells the loss."""

    @property
    def program(self) -> Path:
        """The program."""
        return PROGRAMS / f"train_{self.name}.py"


LIBRARIES = [
    Library("transformers", "transformers", "huggingface", "before clip"),
    Library("trl", "trl", "huggingface", "before clip"),
    Library("sentence_transformers", "sentence-transformers", "huggingface", "before clip"),
    Library("accelerate", "accelerate", "huggingface"),
    Library("lightning", "Lightning", "general", "before clip"),
    Library("lightning_gan", "Lightning, manual optimization", "general"),
    Library("fabric", "Lightning Fabric", "general"),
    Library("keras", "keras", "general", "backward"),
    Library("stable_baselines3_ppo", "stable-baselines3", "general", loss=False),
    Library("stable_baselines3_sac", "stable-baselines3, SAC", "general", loss=False),
    Library("ray", "ray", "cluster"),
    Library("deepspeed", "deepspeed", "cluster"),
    Library("torch_geometric", "torch_geometric", "general"),
    Library("fastai", "fastai", "general", "backward"),
    Library("darts", "darts", "forecasting", "before clip"),
    Library("neuralforecast", "neuralforecast", "forecasting", "before clip"),
    Library("pytorch_forecasting", "pytorch-forecasting", "forecasting", "before clip"),
    Library("gluonts", "gluonts", "forecasting", "before clip"),
    Library("qlib", "pyqlib", "qlib", loss=False),
    Library("gpytorch", "gpytorch", "general"),
    Library("botorch", "botorch", "general", "reading"),
    Library("pyro", "pyro", "general", "backward"),
    Library("skorch", "skorch", "general"),
    Library("ignite", "pytorch-ignite", "general"),
    Library("opacus", "opacus", "general"),
    Library("torchrl", "torchrl", "general"),
    Library("flair", "flair", "flair", loss=False),
    Library("pypots", "pypots", "pypots", loss=False),
]
