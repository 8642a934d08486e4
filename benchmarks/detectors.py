"""What judging costs: all detectors together on one measured snapshot, by number of layers, in sound and ill models.

python -m benchmarks.detectors           # --quick: seconds
"""

from __future__ import annotations

import random
import statistics
import time

from benchmarks.command import parsed, parser
from gradwatch import History
from gradwatch.detectors.alerts import findings
from gradwatch.values.snapshot import (
    ActivationStats,
    Fact,
    LayerInfo,
    ModelInfo,
    OptimizerInfo,
    ParameterInfo,
    Snapshot,
)

LAYERS = (100, 200, 400, 800, 2000)
STATES = ("sound", "vanishing", "dead", "no gradient", "exploding")


def model(layers: int) -> ModelInfo:
    """Make a description of linear layers, each with a weight and a bias."""
    names = [f"blocks.{i}.linear" for i in range(layers)]
    parameters = [
        ParameterInfo(f"{n}.{role}", n, shape, "float32", 0, role)
        for n in names
        for role, shape in (("weight", (64, 64)), ("bias", (64,)))
    ]  # type: ignore[arg-type]  # roles
    return ModelInfo(
        tuple(LayerInfo(n, "Linear", i) for i, n in enumerate(names)),
        tuple(parameters),
        (OptimizerInfo("SGD", adaptive=False),),
    )


def history(layers: int, state: str, seed: int = 0) -> History:
    """Fold 50 snapshots, a probe among ten, of a model in this state."""
    info, draw = model(layers), random.Random(seed)
    found = History()
    for step in range(50):
        norms: list[float | None] = []
        for i in range(layers):
            depth = {"vanishing": 10.0 ** (-8 * (1 - i / layers)), "exploding": 10.0 ** (step / 10)}.get(state, 1.0)
            norm = (
                None
                if state == "no gradient" and i < layers // 2
                else 0.0
                if state == "dead" and i < layers // 2
                else depth * draw.uniform(0.5, 2.0)
            )
            norms += [norm, norm]
        probe = step == 1 or step % 10 == 0 or step == 49
        names = [layer.name for layer in info.layers]
        found.add(
            Snapshot(
                step,
                0.0,
                info,
                optimizer=0,
                loss=2.0 + draw.uniform(0.0, 0.1),
                norm=tuple(norms),
                weight_norm=(8.0, 0.1) * layers if probe else None,
                zeros=(0.1, 0.1) * layers if probe else None,
                subnormal=(0.0, 0.0) * layers if probe else None,
                update_ratio=(1e-3 if state != "exploding" else 40.0, 1e-3) * layers if probe else None,
                absent=tuple(None if n is not None else "disconnected" for n in norms)
                if state == "no gradient"
                else None,
                activations=tuple(
                    ActivationStats(n, 1.0, dead=0.9 if state == "dead" else 0.0, saturated=0.1, units=64)
                    for n in names
                )
                if probe
                else None,
                facts=tuple(Fact(n, "spectral_norm", 2.0) for n in names[:32]) if probe else None,
            )
        )
    return found


def once(told: History, *, probe: bool) -> tuple[float, int]:
    """Time one judgment, between two probes or at one, and count its findings."""
    told.note_open(told.open)  # what was worked out for the last judgment is forgotten
    if probe:  # and here what holds until the next probe
        told.track.lasting.clear()
    begin = time.perf_counter()
    found = len(findings(told))
    return time.perf_counter() - begin, found


def main() -> None:
    """Print a table."""
    quick = parsed(parser(__doc__)).quick
    rounds = 3 if quick else 30
    print(
        f"all detectors on one snapshot; median of {2 * rounds}, lower and upper quartile, in ms; "
        "control: the same history against itself, in turn"
    )
    for state in STATES:
        for layers in LAYERS[:1] if quick else LAYERS:
            one, two = history(layers, state), history(layers, state)
            # Between two probes, again for control, and at a probe.
            times: tuple[list[float], ...] = ([], [], [])
            count = 0
            for _ in range(rounds):
                for which in (0, 1, 2, 2, 1, 0):
                    spent, count = once(two if which == 1 else one, probe=which == 2)
                    times[which].append(spent * 1e3)
                    if which == 2:
                        once(one, probe=False)
            low, middle, high = statistics.quantiles(times[0], n=4)
            control = middle / statistics.median(times[1])
            print(
                f"{state:12} {layers:5} layers  {middle:7.3f}  [{low:.3f}, {high:.3f}]  "
                f"at a probe {statistics.median(times[2]):7.3f}  control {control:.2f}  {count} findings"
            )


if __name__ == "__main__":
    main()
