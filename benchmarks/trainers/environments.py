"""The environments: which libraries at which versions, several together where they agree."""

from __future__ import annotations

import hashlib
import os
import subprocess
import venv
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
_MARK = "gradwatch-trainers"
"""A file in an environment: the digest of what was installed into it."""


@dataclass(frozen=True)
class Environment:
    """What is installed beside gradwatch's own dependencies."""

    pins: tuple[str, ...]
    without_dependencies: tuple[str, ...] = ()
    """Packages that ask for another torch or for torchvision, and do without."""

    @property
    def digest(self) -> str:
        """Tell whether an environment is up to date."""
        asked = f"{self.pins}{self.without_dependencies}{(ROOT / 'constraints.txt').read_text(encoding='utf-8')}"
        return hashlib.sha1(asked.encode()).hexdigest()


ENVIRONMENTS = {
    "huggingface": Environment(
        (
            "transformers==5.24.0",
            "trl==1.16.0",
            "peft==0.21.2",
            "sentence-transformers==6.2.0",
            "accelerate==1.15.0",
        )
    ),
    "general": Environment(
        (
            "lightning==2.6.6",
            "keras==3.15.1",
            "stable-baselines3==2.9.2",
            "torch_geometric==2.8.1",
            "gpytorch==1.15.2",
            "botorch==0.18.1",
            "pyro-ppl==1.9.2",
            "skorch==1.4.0",
            "pytorch-ignite==0.5.5",
            "opacus==1.6.0",
            "torchrl==0.14.1",
            # what fastai's basics need, without torchvision
            *("fastcore==2.2.41", "fastdownload==0.0.8", "fastprogress==1.1.6", "fasttransform==0.0.5"),
            *("plum-dispatch==2.9.0", "matplotlib==3.11.2", "requests==2.34.2", "cloudpickle==3.1.3"),
            *("pandas==3.1.1", "scikit-learn==1.9.1"),
        ),
        without_dependencies=("fastai==2.8.12",),
    ),
    "forecasting": Environment(
        ("darts==0.48.1", "neuralforecast==3.3.0", "pytorch-forecasting==1.8.0", "gluonts==0.17.0")
    ),
    "cluster": Environment(("ray[train]==2.60.0", "deepspeed==0.19.8")),
    "qlib": Environment(
        (
            *("pandas==3.1.1", "scikit-learn==1.9.1", "pyyaml==6.0.4", "ruamel.yaml==0.19.1", "joblib==1.6.0"),
            *("dill==0.4.1", "fire==0.7.1", "filelock==4.3.1", "loguru==0.7.3", "tqdm==4.70.1", "requests==2.34.2"),
            *("pydantic-settings==2.16.3", "redis==8.1.0", "python-redis-lock==4.0.1"),
        ),
        without_dependencies=("pyqlib==0.9.7",),
    ),
    "flair": Environment(("flair==0.15.1",)),
    "pypots": Environment(("pypots==1.5",)),
}


def python(name: str, folder: Path) -> Path:
    """Return the interpreter of an environment in a folder, and make it first where it is missing or out of date."""
    environment, place = ENVIRONMENTS[name], folder / name
    interpreter, mark = place / "bin" / "python", place / _MARK
    if mark.exists() and mark.read_text(encoding="utf-8") == environment.digest:
        return interpreter
    print(f"{name}: making its environment", flush=True)
    venv.create(place, clear=True, with_pip=True)
    install = [str(interpreter), "-m", "pip", "install", "--quiet", "-c", str(ROOT / "constraints.txt")]
    quiet = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    subprocess.run([*install, str(ROOT), *environment.pins], check=True, env=quiet)
    if environment.without_dependencies:
        subprocess.run([*install, "--no-deps", *environment.without_dependencies], check=True, env=quiet)
    mark.write_text(environment.digest, encoding="utf-8")
    return interpreter
