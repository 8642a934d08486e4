"""The contract of the scenarios, in terms of gradwatch's public interface.

PYTHONPATH=../shared python -m scenarios.run --adapter benchmarks/scenarios_adapter.py
"""

from __future__ import annotations

from typing import Any

import gradwatch

VERSION = gradwatch.__version__
PACKAGES = ("gradwatch",)
CAPS = {"alerts", "tb", "log", "resume", "act", "time"}
CLIP = "post"
CLIP_LIGHTNING = "pre"
GRANULARITY = "param"


class Records:
    """Collects the numbers of the snapshots under the numbers of their steps; a sink."""

    def __init__(self) -> None:
        """Begin with none."""
        self.rows: dict[int, dict[str, float]] = {}
        self.activations: dict[int, dict[str, float]] = {}
        self.sequences: dict[int, dict[str, list[float]]] = {}
        self.began: list[gradwatch.Alert] = []

    def __call__(self, report: gradwatch.Report) -> None:
        """Take one snapshot, or what one of several optimizers adds to it; what a scaler skipped is left out."""
        self.began += report.began
        snapshot = report.snapshot
        if not snapshot.skipped:
            self.rows.setdefault(snapshot.step, {}).update(
                {p.name: n for p, n in zip(snapshot.model.parameters, snapshot.norm, strict=True) if n is not None}
            )
        if snapshot.activations is not None:
            self.activations.setdefault(snapshot.step, {}).update(
                {a.module: a.grad_norm for a in snapshot.activations if a.grad_norm is not None and not a.scaled}
            )
        if snapshot.sequences is not None:
            self.sequences.setdefault(snapshot.step, {}).update(
                {
                    s.module: list(s.grad_hidden)
                    for s in snapshot.sequences
                    if s.grad_hidden is not None and not s.scaled
                }
            )

    def step_norms(self) -> dict[int, dict[str, float]]:
        """Return the norms by number of the step."""
        return {step: dict(row) for step, row in list(self.rows.items())}

    def act_norms(self) -> dict[int, dict[str, float]]:
        """Return the gradients of what modules gave, by number of the probe's step."""
        return self.activations

    def time_norms(self) -> dict[int, dict[str, list[float]]]:
        """Return the gradients of hidden states, oldest first, by number of the probe's step."""
        return self.sequences


class Handle(Records):
    """One watcher, and what its sink has collected."""

    watcher: gradwatch.Watcher

    def step(self) -> None:
        """Read the gradients, where there is no optimizer."""
        self.watcher.step()

    def alerts(self) -> list[dict[str, Any]]:
        """Return what began at severity warning or higher."""
        return [
            {"kind": a.finding.kind, "step": a.began, "name": a.finding.parameter or a.finding.place, "message": str(a)}
            for a in self.began
            if a.severity > gradwatch.Severity.INFO
        ]

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the watcher."""
        return self.watcher.state_dict()

    def close(self) -> None:
        """Close the watcher."""
        self.watcher.close()


def attach(
    model: Any,
    optimizer: Any = None,
    every_n_steps: int = 1,
    log_dir: Any = None,
    scaler: Any = None,
    state: Any = None,
    on_alert: Any = "warn",
    prefix: str | None = None,
    **_: Any,
) -> Handle:
    """Watch every step, each of them a probe."""
    handle = Handle()
    handle.watcher = gradwatch.watch(
        model,
        optimizer,
        logdir=log_dir,
        name=prefix,
        every_n_steps=every_n_steps,
        probe_every_n_steps=every_n_steps,
        scaler=scaler,
        on_alert=on_alert,
        sinks=[handle],
    )
    if state:
        handle.watcher.load_state_dict(state)
    return handle


class Callback(Records):
    """The Lightning callback, and what its sink has collected."""

    def __init__(self) -> None:
        """Make the callback."""
        super().__init__()
        from gradwatch.lightning import GradientMonitor

        self.callback = GradientMonitor(every_n_steps=1, probe_every_n_steps=1, sinks=[self])

    def __getstate__(self) -> dict[str, Any]:
        """Leave the callback out of its own copies."""
        return {"rows": self.rows, "began": self.began}

    def close(self) -> None:
        """Leave it to the Trainer, which has closed it."""


def lightning_callback(**_: Any) -> Callback:
    """Return a callback that looks at every step."""
    return Callback()
