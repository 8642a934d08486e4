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
    in_worker: bool = False
    """Whether the training is in a process of its own."""
    alone: When | None = "step"
    """As `when`, under `gradwatch run`; None where that sees no step, and says so."""

    @property
    def program(self) -> Path:
        """The program."""
        return PROGRAMS / f"train_{self.name}.py"


LIBRARIES = [
    Library("transformers", "Hugging Face", "huggingface", "before clip"),
    Library("trl", "Hugging Face", "huggingface", "before clip"),
    Library("sentence_transformers", "Hugging Face", "huggingface", "before clip"),
    Library("accelerate", "A loop of your own", "huggingface"),
    Library("lightning", "Lightning", "general", "before clip"),
    Library("lightning_gan", "Lightning", "general"),
    Library("fabric", "A loop of your own", "general"),
    Library("keras", "keras", "general", "backward", alone=None),
    Library("stable_baselines3_ppo", "stable-baselines3: PPO, A2C, DQN", "general", loss=False),
    Library("stable_baselines3_sac", "stable-baselines3: SAC, TD3", "general", loss=False),
    Library("ray", "A loop of your own", "cluster", in_worker=True, alone=None),
    Library("deepspeed", "A loop of your own", "cluster"),
    Library("deepspeed_zero", "deepspeed: ZeRO 1 and 2", "cluster", "telling", alone=None),
    Library("torch_geometric", "A loop of your own", "general"),
    Library("fastai", "fastai", "general", "backward", alone=None),
    Library("darts", "Lightning", "forecasting", "before clip"),
    Library("neuralforecast", "Lightning", "forecasting", "before clip"),
    Library("pytorch_forecasting", "Lightning", "forecasting", "before clip"),
    Library("gluonts", "Lightning", "forecasting", "before clip"),
    Library("qlib", "pyqlib", "qlib", loss=False),
    Library("gpytorch", "A loop of your own", "general"),
    Library("botorch", "botorch", "general", "reading", alone=None),
    Library("pyro", "pyro", "general", "backward", alone="backward"),
    Library("skorch", "skorch", "general"),
    Library("ignite", "pytorch-ignite", "general"),
    Library("opacus", "A loop of your own", "general"),
    Library("torchrl", "A loop of your own", "general"),
    Library("flair", "flair", "flair", loss=False),
    Library("pypots", "pypots", "pypots", loss=False),
]
