"""What checks in CI catch: seven sick models and their healthy twins, by one batch, by a few steps, and by a profile.

python -m benchmarks.ci            # a minute; --quick: the same
"""

from __future__ import annotations

import contextlib
import itertools
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import gradwatch
from benchmarks.command import parsed, parser

Setup = tuple[nn.Module, torch.optim.Optimizer, Callable[[nn.Module, Any], Tensor]]


@dataclass
class Case:
    """A model that can be sick."""

    name: str
    make: Callable[[bool], Setup]
    """Takes whether it is to be sick."""
    batch: Callable[[], tuple[Tensor, Tensor]]
    horizon: int | None = None


def rows() -> tuple[Tensor, Tensor]:
    """Return rows of features, and a target."""
    x = torch.randn(64, 16)
    return x, x.sin().sum(1, keepdim=True)


def bars() -> tuple[Tensor, Tensor]:
    """Return windows of bars, and a target."""
    x = torch.randn(32, 80, 4)
    return x, x[:, 10:30, 0].mean(1, keepdim=True)


def fit(model: nn.Module, batch: Any) -> Tensor:
    """Return the squared error."""
    return mse_loss(model(batch[0]), batch[1])


def mlp(layers: int, activation: type[nn.Module] = nn.ReLU, gain: float = 1.0) -> nn.Sequential:
    """Stack linear layers with He initialization."""
    widths = [16, *[32] * layers]
    net = nn.Sequential(
        *(m for a, b in itertools.pairwise(widths) for m in (nn.Linear(a, b), activation())),
        nn.Linear(32, 1),
    )
    for module in net:
        if isinstance(module, nn.Linear):
            nn.init.kaiming_normal_(module.weight)
            nn.init.zeros_(module.bias)
            module.weight.data *= gain
    return net


class Net(nn.Module):
    """Two layers, the first of which may be cut off."""

    def __init__(self, *, cut: bool) -> None:
        """Build it."""
        super().__init__()
        self.first, self.second, self.cut = nn.Linear(16, 32), nn.Linear(32, 1), cut

    def forward(self, x: Tensor) -> Tensor:
        """Return one number a row."""
        hidden = torch.relu(self.first(x))
        return self.second(hidden.detach() if self.cut else hidden)


class Bars(nn.Module):
    """An LSTM with a memory of some bars, and a readout of the newest."""

    def __init__(self, remembers: int | None) -> None:
        """Build it."""
        super().__init__()
        self.memory, self.head = nn.LSTM(4, 24, batch_first=True), nn.Linear(24, 1)
        if remembers is not None:
            with torch.no_grad():
                self.memory.bias_ih_l0[:24] = -math.log(remembers)
                self.memory.bias_ih_l0[24:48] = math.log(remembers)
                self.memory.bias_hh_l0[:48] = 0

    def forward(self, x: Tensor) -> Tensor:
        """Return one number a window."""
        return self.head(self.memory(x)[0][:, -1])


def adam(model: nn.Module, rate: float = 1e-3) -> Setup:
    """Train all of it."""
    return model, torch.optim.Adam(model.parameters(), rate), fit


def deep(sick: bool) -> Setup:  # noqa: FBT001  (one of a table)
    """Stack twelve sigmoids, or ReLU."""
    return adam(mlp(12, nn.Sigmoid if sick else nn.ReLU))


def dead(sick: bool) -> Setup:  # noqa: FBT001
    """Kill the units of a layer by their biases."""
    net = mlp(2)
    net[2].bias.data -= 20 * sick
    return adam(net)


def cut(sick: bool) -> Setup:  # noqa: FBT001
    """Detach the first layer."""
    return adam(Net(cut=sick))


def large(sick: bool) -> Setup:  # noqa: FBT001
    """Begin with weights three times too large."""
    return adam(mlp(12, gain=3.0 if sick else 1.0))


def fast(sick: bool) -> Setup:  # noqa: FBT001
    """Step so far that the loss is not a number soon."""
    net = mlp(3)
    return net, torch.optim.SGD(net.parameters(), 30.0 if sick else 1e-3), fit


def forgetful(sick: bool) -> Setup:  # noqa: FBT001
    """Leave the gates as torch makes them, where 60 bars matter."""
    return adam(Bars(None if sick else 200))


def forgotten(sick: bool) -> Setup:  # noqa: FBT001
    """Leave a layer out of the optimizer."""
    net = mlp(3)
    stepped = [p for n, p in net.named_parameters() if not (sick and n.startswith("2."))]
    return net, torch.optim.Adam(stepped, 1e-3), fit


CASES = (
    Case("twelve sigmoids", deep, rows),
    Case("dead units", dead, rows),
    Case("a layer cut off", cut, rows),
    Case("weights too large", large, rows),
    Case("steps too large", fast, rows),
    Case("a memory too short", forgetful, bars, horizon=60),
    Case("a layer in no optimizer", forgotten, rows),
)


def made(case: Case, *, sick: bool) -> Setup:
    """Make it, always the same."""
    torch.manual_seed(0)
    return case.make(sick)


def caught(check: Callable[[], object]) -> bool:
    """Tell whether a check fails."""
    try:
        check()
    except gradwatch.GradientHealthError:
        return True
    return False


def checks(case: Case, batches: list[tuple[Tensor, Tensor]], golden: Path, *, sick: bool) -> list[bool]:
    """Return what catches a model: one batch, a few steps, and a profile of its healthy twin."""
    x, y = batches[0]

    def error(given: Tensor) -> Tensor:
        return mse_loss(given, y)

    return [
        caught(lambda: gradwatch.assert_healthy(made(case, sick=sick)[0], x, loss=error)),
        caught(lambda: gradwatch.assert_trains(made(case, sick=sick), batches, horizon=case.horizon)),
        caught(lambda: gradwatch.assert_profile(made(case, sick=sick)[0], x, golden, loss=error)),
    ]


def main() -> None:
    """Print the table."""
    parsed(parser(__doc__))
    torch.set_num_threads(1)
    print(f"{'':26} {'one batch':>12} {'few steps':>12} {'profile':>12}    (sick caught / healthy accused)")
    sick_ones, well_ones = [0, 0, 0], [0, 0, 0]
    for case in CASES:
        torch.manual_seed(1)
        batches = [case.batch() for _ in range(20)]
        with tempfile.TemporaryDirectory() as folder:
            golden = Path(folder, "golden.toml")
            with contextlib.suppress(gradwatch.GradientHealthError):  # the profile is written now
                checks(case, batches, golden, sick=False)
            sick, well = (checks(case, batches, golden, sick=ill) for ill in (True, False))
        sick_ones = [n + found for n, found in zip(sick_ones, sick, strict=True)]
        well_ones = [n + found for n, found in zip(well_ones, well, strict=True)]
        both = zip(sick, well, strict=True)
        cells = [f"{'yes' if found else 'no':>6} / {'yes' if accused else 'no':>3}" for found, accused in both]
        print(f"{case.name:26} {' '.join(cells)}", flush=True)
    print(f"{'of seven':26} {' '.join(f'{s:>6} / {w:>3}' for s, w in zip(sick_ones, well_ones, strict=True))}")


if __name__ == "__main__":
    main()
