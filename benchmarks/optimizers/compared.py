"""The same training with and without gradwatch: which bits differ, and which of its numbers are not true."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, distributed

import gradwatch
from benchmarks.optimizers.cases import STEPS_OF_A_RUN
from benchmarks.optimizers.training import Case, Column, Training, Truth, raw
from gradwatch.values.report import GradwatchWarning
from gradwatch.values.snapshot import Snapshot

PROBE_EVERY = 3
"""Steps: not in the rhythm of what wrappers do every 4th, 5th or 10th step."""
NORM, UPDATE = 1e-6, 1e-4
"""How far a norm, or an update or a weight's norm, may be from the truth, relative to that."""
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0)
"""Of a class without a default the first is taken with which the loss halves in as many steps:"""
_HALVES_IN = 100
_SAYS_UNHEARD = "GW900"


@dataclass
class Outcome:
    """What came of a case on a network: of each kind, what is wrong, or nothing."""

    case: Case
    network: str
    alone: str = ""
    """Why it does not train without gradwatch; nothing more was tried."""
    refused: str = ""
    """What gradwatch has raised."""
    bits: list[str] = field(default_factory=list)
    norms: list[str] = field(default_factory=list)
    updates: list[str] = field(default_factory=list)
    snapshots: list[str] = field(default_factory=list)
    unheard: bool = False
    """Whether there is no snapshot of a step, and gradwatch has said so."""
    warned: list[str] = field(default_factory=list)
    """What gradwatch could not do, in its words."""
    alerts: list[str] = field(default_factory=list)

    def lines(self) -> Iterator[str]:
        """Say what is not as it should be."""
        if self.alone:
            yield f"does not train by itself: {self.alone}"
        if self.refused:
            yield f"gradwatch raises {self.refused}"
        if self.unheard:
            yield "not heard, and that is said"
        for kind in ("bits", "norms", "updates", "snapshots", "warned", "alerts"):
            if wrong := getattr(self, kind):
                yield f"{kind}: {'; '.join(wrong)}"


def compared(case: Case, network: str, steps: int, *, alerts: bool) -> Outcome:
    """Train without and with gradwatch, and compare; then once more, for the alerts."""
    with _process_group() if case.distributed else contextlib.nullcontext():
        return _compared(Outcome(case, network), steps, alerts=alerts)


@contextlib.contextmanager
def _process_group() -> Iterator[None]:
    """Let this process be a group of its own."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def _compared(outcome: Outcome, steps: int, *, alerts: bool) -> Outcome:
    case, network = outcome.case, outcome.network
    try:
        rate = _rate(case, network) if case.needs_rate else None
        alone = Training(case, network, rate).run(steps)
    except Exception as error:  # noqa: BLE001  (of whatever library)
        outcome.alone = _said(error)
        return outcome
    snapshots: list[Snapshot] = []
    try:
        watched = _watched(
            Training(case, network, rate),
            steps,
            outcome,
            every_n_steps=1,
            probe_every_n_steps=PROBE_EVERY,
            sinks=[lambda report: snapshots.append(report.snapshot)],
            on_alert=lambda _: None,
        )
        outcome.bits += _different_bits(alone, watched)
        _judge(outcome, snapshots, watched)
        if alerts:
            _accuse(outcome, rate)
    except Exception as error:  # noqa: BLE001  (gradwatch's own, or what it does to a library)
        outcome.refused = _said(error)
    return outcome


def _rate(case: Case, network: str) -> float:
    """Return a learning rate with which the loss comes down."""
    for rate in RATES:
        with contextlib.suppress(RuntimeError):  # of one that diverges
            losses = [truth.losses[0] for truth in Training(case, network, rate).run(_HALVES_IN).truths]
            if sum(losses[-10:]) < sum(losses[:10]) / 2:
                return rate
    return RATES[0]


def _watched(training: Training, steps: int, outcome: Outcome, **options: Any) -> Training:
    optimizers = training.optimizers
    given = optimizers if len(optimizers) > 1 else optimizers[0]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with gradwatch.watch(training.model, given, **options) as training.watcher:
            training.run(steps)
    texts = [str(w.message) for w in caught if issubclass(w.category, GradwatchWarning)]
    outcome.warned += [text for text in dict.fromkeys(texts) if text not in outcome.warned]
    return training


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".split("\n", 1)[0][:200]


# --- the bits ---


def _different_bits(alone: Training, watched: Training) -> Iterator[str]:
    """Name what differs, and the first step at which it does."""
    for what in ("losses", "weights", "gradients"):
        pairs = zip(alone.truths, watched.truths, strict=True)
        different = [n for n, both in enumerate(pairs) if len({repr(getattr(t, what)) for t in both}) > 1]
        if different:
            yield f"{what} from step {different[0]}"
    one, other = ([dict(_entries(o, _names(t))) for o in t.optimizers] for t in (alone, watched))
    for mine, theirs in zip(one, other, strict=True):
        entries = sorted(k for k in mine.keys() | theirs.keys() if mine.get(k) != theirs.get(k))
        if entries:
            yield f"{len(entries)} entries of the optimizer, of {len(mine)}: {', '.join(entries[:3])}"
    if alone.random_states != watched.random_states:
        yield "random states"


def _names(training: Training) -> dict[int, str]:
    return {id(p): name for name, p in training.model.named_parameters()}


def _entries(value: object, names: Mapping[int, str], path: str = "", seen: tuple[int, ...] = ()) -> Iterator[Any]:
    """Name and give each plain entry of an optimizer and of the optimizers that it wraps, but for what it calls."""
    if isinstance(value, Tensor):
        yield path, names.get(id(value)) or (str(value.dtype), tuple(value.shape), raw(value))
    elif isinstance(value, bool | int | float | str | None):
        yield path, repr(value)
    elif id(value) not in seen:
        for label, part in _parts(value, names):
            yield from _entries(part, names, path + label, (*seen, id(value)))


def _parts(value: object, names: Mapping[int, str]) -> Iterator[tuple[str, object]]:
    if isinstance(value, torch.Generator):
        yield ".state", value.get_state()
    elif isinstance(value, Mapping):
        for number, (key, entry) in enumerate(value.items()):
            yield f"[{names.get(id(key), key if isinstance(key, str) else number)}]", entry
    elif isinstance(value, list | tuple):
        for number, entry in enumerate(value):
            yield f"[{number}]", entry
    elif hasattr(value, "param_groups"):
        for name, entry in vars(value).items():
            yield f".{name}", entry


# --- the numbers ---


def _judge(outcome: Outcome, snapshots: list[Snapshot], training: Training) -> None:
    """Compare what was told with the truth."""
    steps = [s for s in snapshots if s.silence is None]
    outcome.unheard = not steps and any(s.silence is not None and not s.silence.steps for s in snapshots)
    if outcome.unheard:
        return
    expected = len(training.truths) * (1 if outcome.case.in_backward else len(training.optimizers))
    if len(steps) != expected:
        outcome.snapshots.append(f"{len(steps)} in place of {expected}")
    names = list(_names(training).values())
    told = [[s for s in steps if s.step == number] for number in range(len(training.truths))]
    both = list(zip(told, training.truths, strict=True))

    def gradients(truth: Truth) -> list[Column]:
        return truth.gradients_taken(mixes=outcome.case.mixes)

    outcome.norms += _wrong(names, both, "norm", gradients, NORM)
    probes = both[::PROBE_EVERY]
    for column in ("update_ratio", "weight_norm"):
        outcome.updates += _wrong(names, probes, column, lambda t, column=column: [getattr(t, column)], UPDATE)


def _wrong(
    names: list[str],
    both: list[tuple[list[Snapshot], Truth]],
    column: str,
    truths_of: Callable[[Truth], list[Column]],
    tolerance: float,
) -> Iterator[str]:
    """Say at how many steps a column is not as any of the truths, and what it was at the first."""
    wrong, first = 0, ""
    for snapshots, truth in both:
        told = _merged([getattr(s, column) for s in snapshots], len(names))
        truths = truths_of(truth)
        # A parameter that has no gradient is not stepped, and need not be measured.
        idle = [p is None and column != "norm" for p in truth.passes[-1]]
        if any(
            all(skip or _close(*pair, tolerance) for *pair, skip in zip(told, true, idle, strict=True))
            for true in truths
        ):
            continue
        wrong += 1
        if not first:
            pairs = zip(names, told, truths[0], strict=True)
            name, said, true = next((n, s, t) for n, s, t in pairs if not _close(s, t, tolerance))
            first = f"{name} told {_shown(said)}, true {_shown(true)}"
    if wrong:
        yield f"{column} at {wrong} of {len(both)}, first {first}"


def _merged(columns: list[Column | None], length: int) -> Column:
    """Return the numbers of one step's snapshots, each of which holds those of one optimizer."""
    there = [c for c in columns if c]
    return tuple(next((c[i] for c in there if c[i] is not None), None) for i in range(length))


def _close(told: float | None, true: float | None, tolerance: float) -> bool:
    if told is None or true is None:
        return told is true
    if not math.isfinite(told) or not math.isfinite(true):
        return not math.isfinite(told) and not math.isfinite(true)
    return math.isclose(told, true, rel_tol=tolerance)


def _shown(number: float | None) -> str:
    return "nothing" if number is None else f"{number:.4g}"


# --- the alerts ---


def _accuse(outcome: Outcome, rate: float | None) -> None:
    """Train as a user does, and list the alerts."""
    heard: dict[str, gradwatch.Alert] = {}

    def hear(alert: gradwatch.Alert) -> None:
        if alert.severity > gradwatch.Severity.INFO:
            heard.setdefault(f"{alert.finding.code} {alert.severity.value} {alert.finding.place or 'model'}", alert)

    case, network = outcome.case, outcome.network
    try:
        training = _watched(Training(case, network, rate), STEPS_OF_A_RUN, outcome, on_alert=hear)
    except RuntimeError as error:
        try:
            Training(case, network, rate).run(STEPS_OF_A_RUN)
        except RuntimeError as alone:
            if _said(alone) == _said(error):  # so it ends without gradwatch too
                return
        raise
    losses = [truth.losses[0] for truth in training.truths]
    outcome.alerts += [
        f"{text} from step {alert.began}"
        for text, alert in heard.items()
        if not (outcome.unheard and alert.finding.code == _SAYS_UNHEARD)
    ]
    if outcome.alerts:
        outcome.alerts.append(f"loss {losses[0]:.3g} to {losses[-1]:.3g}")
