"""Gradients that vanish on their way back through the layers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from gradwatch.detectors.cause_words import around, said
from gradwatch.detectors.causes import of_vanishing
from gradwatch.detectors.flows import added, aside, before_one_value, fading, rounding
from gradwatch.detectors.idle import share_left
from gradwatch.detectors.measured import (
    before_misread,
    constant_loss,
    flat,
    largest_sensitivity,
    moves,
    newest_update,
    same_loss,
)
from gradwatch.detectors.rule import Rule
from gradwatch.values.history import History
from gradwatch.values.layer_columns import counts
from gradwatch.values.report import Explanation, Finding, Severity
from gradwatch.values.thresholds import OPENING_FLOOR
from gradwatch.values.track import medians

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def vanishing_depth(history: History) -> Iterator[Finding]:
    """GW101: layers whose sensitivity is far below that of layers after them. GW102: all of them, against the loss."""
    t = history.thresholds
    if len(history.track.snapshots) < t.window:
        return
    limits = _limits(history)
    recent = max(
        round((1 - t.share) * t.window) + 1, 1
    )  # a layer that is below its limit in none of these cannot have its share
    found = list(_vanishing(history, limits)) if (history.ratios(recent) < limits).any() else []
    yield from found or _everywhere(history)
    yield from _absolute(history)


def _vanishing(history: History, limits: NDArray[np.float64]) -> Iterator[Finding]:
    import numpy as np

    t = history.thresholds
    ratios, closed = history.ratios(t.window), flat(history)
    low = ratios < limits  # False for NaN
    # A zero is low where small numbers led to it, in time or from later layers. A layer that stands idle, or that is
    # not opened yet, has zeros too.
    low &= np.maximum.accumulate((ratios > 0) & low) | _fading(history, ratios[-1], limits, closed)
    vanishing = (low.mean(axis=0) >= t.share) & low[-1] & ~_rising(ratios, t.vanishing_rising, limits)
    if not vanishing.any():
        return
    others = before_misread(history) | rounding(history) | before_one_value(history)
    vanishing[list(others)] = False  # those are other kinds
    vanishing &= _small(history, limits)
    vanishing[list(added(history, set(np.flatnonzero(vanishing).tolist())))] = False
    spare = np.zeros_like(vanishing)
    spare[list(_spared(history, vanishing))] = True
    runs = [(run, False) for run in _faults(history, vanishing & ~spare, ratios[-1], closed)]
    runs += [(run, True) for run in _faults(history, vanishing & spare, ratios[-1], closed)]
    now, opened = ratios[-1].tolist(), set(_opened(history))
    for run, is_spare in runs:
        held = [i for i in run if i in opened]
        place = history.model.layers[(held or run)[0]].name
        worst = min(run, key=now.__getitem__)
        ratio = now[worst]
        severity = Severity.INFO if is_spare else _severity(history, run, ratio)
        yield Finding(
            "GW101",
            "vanishing-depth",
            severity,
            place,
            onset=_onset(history, run[0], limits),
            evidence={
                "ratio": ratio,
                "limit": float(limits[worst]),
                "layers": float(len(run)),
                "share": float(low[:, worst].mean()),
            },
            names={
                "begins": history.model.layers[run[0]].name,
                "worst": history.model.layers[worst].name,
                "last": history.model.layers[run[-1]].name,
            },
        )


def _small(history: History, limits: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Tell which layers get little gradient; others may only have weights near 0, which begin to grow."""
    import numpy as np

    norms = np.nan_to_num(history.columns.norms(history.snapshot.norm), nan=0.0, posinf=np.inf)
    later = history.columns.largest_later(norms)
    return np.asarray((norms == 0) | (norms < limits * np.nan_to_num(later, nan=0.0, posinf=np.inf)))


def _spared(history: History, vanishing: NDArray[np.bool_]) -> set[int]:
    """Return the layers of these that the gradient passes by, or that only feed the initial state of a short memory."""
    import numpy as np

    layers = set(np.flatnonzero(vanishing).tolist())
    if not layers:
        return layers
    states = fading(history) & layers
    beside = aside(history, layers)
    # One whose weights a plain step does not move, while it moves others, will not open. Adam's steps grow as soon as
    # its epsilon lets them.
    if not history.adaptive:
        beside -= history.lasting(_still)
    return states | beside


def _still(history: History) -> set[int]:
    """Return the layers that the last step that was measured so has hardly moved, while it moved others as usual."""
    probe = newest_update(history)
    if probe is None:
        return set()
    moved: dict[str, float] = {}
    for p, ratio in zip(probe.model.parameters, probe.update_ratio or (), strict=True):
        if ratio is not None and counts(p):
            moved[p.layer] = max(moved.get(p.layer, 0.0), ratio)
    t = history.thresholds
    if max(moved.values(), default=0.0) < t.ordinary_update:
        return set()
    return {history.numbers[name] for name, most in moved.items() if most < t.slow_update}


def _fading(
    history: History, now: NDArray[np.float64], limits: NDArray[np.float64], closed: set[int]
) -> NDArray[np.bool_]:
    """Tell which layers that are zero now have faded to it.

    The nearest after them that is not zero is below its limit, or one after them is saturated.
    """
    import numpy as np

    found = np.zeros(len(now), dtype=bool)
    found[list(closed)] = True
    found &= now == 0
    fades, ratios, limit = False, now.tolist(), limits.tolist()
    for i in reversed(history.order):
        if ratios[i] > 0:
            fades = ratios[i] < limit[i]
        elif fades and ratios[i] == 0:
            found[i] = True
    return found


def _limits(history: History) -> NDArray[np.float64]:
    """Return the limit of each layer."""
    limits = history.lasting(_sound_limits)
    if opened := _opened(history):
        limits = limits.copy()
        limits[opened] *= history.thresholds.clear_factor
    return limits


def _sound_limits(history: History) -> NDArray[np.float64]:
    """Return the limits where no alert is open."""
    import numpy as np

    t, count, adaptive = history.thresholds, len(history.model.layers), history.adaptive
    limits = np.full(count, t.vanishing_ratio_adaptive if adaptive else t.vanishing_ratio)
    for i in range(count) if t.layers else ():
        mine = history.thresholds_of(i)
        limits[i] = mine.vanishing_ratio_adaptive if adaptive else mine.vanishing_ratio
    return limits


def _opened(history: History) -> list[int]:
    """Return the layers at which an alert is open."""
    places = history.open_at("GW101")
    return [i for i, layer in enumerate(history.model.layers) if layer.name in places] if places else []


def _rising(ratios: NDArray[np.float64], factor: float, limits: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Tell which layers are opening: the last third of the window is well above the first, and near the limit."""
    import numpy as np

    third = max(len(ratios) // 3, 1)
    with np.errstate(invalid="ignore", over="ignore"):
        first, last = medians(ratios[:third]), medians(ratios[-third:])
        return np.asarray((last > factor * first) & (last > OPENING_FLOOR * limits))


def _faults(
    history: History, vanishing: NDArray[np.bool_], now: NDArray[np.float64], closed: set[int]
) -> list[list[int]]:
    """Group the layers, and leave out zeros that nothing faded to: those are cut off, which is another kind.

    Only a layer that is sound now parts two faults. One at which an alert is open stays of its fault until it is.
    """
    import numpy as np

    sound, ill = now >= history.thresholds.vanishing_sound, vanishing.copy()
    opened = _opened(history)
    ill[opened] |= ~np.isnan(now[opened]) & ~sound[opened]
    runs = history.runs(set(np.flatnonzero(ill).tolist()), set(np.flatnonzero(ill | sound).tolist()))
    runs = [run for run in runs if vanishing[run].any()]
    for run in runs:
        while run and now[run[-1]] == 0 and not history.sound_once(run[-1]) and run[-1] not in closed:
            run.pop()
    return [run for run in runs if run]


def _severity(history: History, run: list[int], ratio: float) -> Severity:
    """Judge by the loss, which may take a warning back: for layers that were sound they may have done their work.

    For layers that never were, a loss that has come down is no excuse once next to nothing arrives: it came down
    without them.
    """
    if history.improved is not False and all(map(history.sound_once, run)):
        return Severity.INFO
    if history.improved and ratio >= history.thresholds.vanishing_hopeless:
        return Severity.INFO
    return Severity.WARNING


def _onset(history: History, index: int, limits: NDArray[np.float64]) -> int:
    import numpy as np

    ratios = history.ratios(len(history.window()))[:, index]
    limit = limits[index]
    return history.since(bool(r < limit) for r in np.nan_to_num(ratios, nan=np.inf))


def _everywhere(history: History) -> Iterator[Finding]:
    import numpy as np

    t = history.thresholds
    if not any(history.snapshot.norm) and history.improved is not True and _closed(history):
        converged = history.improved is None and any(history.first_norms)
        yield Finding(
            "GW102",
            "vanishing-depth",
            Severity.INFO if converged else Severity.WARNING,
            "",
            onset=history.since(not any(s.norm) for s in history.window()),
            evidence={"sensitivity": 0.0, "limit": t.flat_sensitivity},
        )
        return
    losses = history.losses(t.window)
    limit = t.flat_sensitivity * (t.clear_factor if history.is_open("GW102", "") else 1.0)
    if (
        len(losses) < t.window
        or largest_sensitivity(history) >= limit * abs(losses[-1])
        or history.improved is not False
    ):
        return
    largest = np.nan_to_num(history.sensitivities(t.window), nan=0.0).max(axis=1)[-len(losses) :]
    if not np.isfinite(losses).all() or not history.snapshot.finite:
        return
    with np.errstate(over="ignore"):
        share = largest / np.maximum(np.abs(losses), 1e-300)
    nothing = share.max() == 0 and not history.is_open("GW102", "")
    if not nothing and (share < limit).mean() >= t.share and share_left(history) is None:
        found = Finding(
            "GW102",
            "vanishing-depth",
            Severity.WARNING,
            "",
            onset=history.window(len(share))[int((share < limit).argmax())].step,
            evidence={"sensitivity": float(share[-1]), "limit": limit},
        )
        # Of weights that move, and with nothing that makes the loss flat, it is another loss that is told, by a factor;
        # but a loss that falls by a factor of itself would be seen to.
        if not moves(history) or of_vanishing(history, found).cause or _unmoved_by_steps(history):
            yield found


def _unmoved_by_steps(history: History) -> bool:
    """Tell whether the loss is the same to rounding, and no rounding moves the weights."""
    return same_loss(history) is not None and not constant_loss(history)


def _closed(history: History) -> bool:
    """Tell whether through the window every gradient was exactly zero, because the last activation is saturated."""
    recent = history.window(history.thresholds.window)
    return not any(any(s.norm) for s in recent) and len(flat(history)) == len(history.model.layers)


def _absolute(history: History) -> Iterator[Finding]:
    if not history.thresholds.layers and history.thresholds.norm_below is None:
        return
    for number, layer in enumerate(history.model.layers):
        limit = history.thresholds_of(number).norm_below
        columns = [i for i, p in enumerate(history.model.parameters) if p.layer == layer.name]
        window = history.window(history.thresholds.window)
        largest = [max((n for i in columns if (n := s.norm[i]) is not None), default=None) for s in window]
        if limit is not None and all(n is not None and n < limit for n in largest):
            yield Finding(
                "GW103",
                "vanishing-depth",
                Severity.WARNING,
                layer.name,
                onset=window[0].step,
                evidence={"norm": float(largest[-1] or 0.0), "limit": limit},
            )


# --- in words ---


def _explain(finding: Finding) -> Explanation:
    evidence, names = finding.evidence, finding.names
    first, count = names.get("begins", finding.place) or "the first layer", evidence["layers"]
    through = f" to {names['last']} ({count:.0f} layers)" if count > 1 else ""
    worst = f" (worst: {names['worst'] or 'the first layer'})" if names["worst"] != finding.place else ""
    get, their = ("get", "their") if count > 1 else ("gets", "its")
    cause, remedy = said(finding, around(finding, f"in the layers after {finding.place or 'the first'}: "))
    return Explanation(
        f"{first}{through} {get} next to no gradient: a relative change of {their} weights moves the loss"
        f" {evidence['ratio']:.1g} times as much as one of a later layer{worst}, since step {finding.onset}",
        cause,
        remedy,
    )


def _explain_everywhere(finding: Finding) -> Explanation:
    cause, remedy = said(
        finding,
        "look at the range of the output and the last activation; check the scale of the targets and the initialization"
        " of the last layer",
    )
    sensitivity = finding.evidence["sensitivity"]
    what = f"the largest sensitivity is {sensitivity:.1g} of the loss, and the loss stands still"
    if not sensitivity:
        what = "every gradient is exactly zero"
    return Explanation(f"no layer has learned since step {finding.onset}: {what}", cause, remedy)


def _explain_absolute(finding: Finding) -> Explanation:
    norm, limit = finding.evidence["norm"], finding.evidence["limit"]
    return Explanation(
        f"the gradient norm of {finding.place} is {norm:.1g}, below the {limit:.1g} that you set,"
        f" since step {finding.onset}"
    )


RULES = (
    Rule("GW101", "vanishing-depth", _explain, of_vanishing),
    Rule("GW102", "vanishing-depth", _explain_everywhere, of_vanishing),
    Rule("GW103", "vanishing-depth", _explain_absolute),
)
