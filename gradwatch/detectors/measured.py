"""What probes have measured of layers, as detectors and causes ask for it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import Literal

from gradwatch.values.history import History
from gradwatch.values.layer_columns import counts, inside
from gradwatch.values.report import Finding
from gradwatch.values.sequences import RecurrenceName, SequenceStats
from gradwatch.values.snapshot import ActivationStats, FactName, Function, Snapshot
from gradwatch.values.thresholds import (
    CONSTANT_LOSS,
    HALF_DIGITS,
    MISREAD_PROBES,
    MOSTLY_DEAD,
    ROUNDED,
    ROUNDING_SENSITIVITY,
)


def newest_activations(history: History) -> tuple[ActivationStats, ...]:
    """Return what the newest probe saw of the outputs of modules."""
    return history.lasting(_newest_activations)


def activations_by_layer(history: History) -> dict[str, ActivationStats]:
    """Return the same by the layer whose output it is; by module of what is no layer's."""
    return history.lasting(_activations_by_layer)


def _activations_by_layer(history: History) -> dict[str, ActivationStats]:
    layer_of = history.columns.layer_of
    return {layer_of(a.module): a for a in newest_activations(history)}


def _newest_activations(history: History) -> tuple[ActivationStats, ...]:
    return next((s.activations or () for s in history.looks(1)), ())


def newest_update(history: History) -> Snapshot | None:
    """Return the newest snapshot of a step of which it was measured how far it moved the weights; None: of none."""
    return next((s for s in reversed(history.probed) if s.update_ratio is not None), None)


def moves(history: History) -> bool:
    """Tell whether the last step that was measured so moved a weight at an ordinary speed.

    In units of its own size, or of the size that keeps a signal as large as it was, where it is smaller than that: what
    is next to nothing moves fast beside itself, and nothing comes of it.
    """
    probe = newest_update(history)
    if probe is None or probe.weight_norm is None or probe.update_ratio is None:
        return False
    known = zip(probe.model.parameters, probe.update_ratio, probe.weight_norm, strict=True)
    return any(
        ratio * weight >= history.thresholds.slow_update * max(weight, math.sqrt((*p.shape, 1)[0]))
        for p, ratio, weight in known
        if ratio is not None and weight and counts(p)
    )


def constant_loss(history: History) -> bool:
    """Tell whether the loss is the same, to rounding, for all batches and weights, though rounding moves these.

    Where exactly nothing arrives, or moves, it is another finding.
    """
    return history.once(_is_constant)


def _is_constant(history: History) -> bool:
    loss = same_loss(history)
    if loss is None:
        return False
    # Small gradients that are true move weights as slowly as they are small; only where steps have a size of their own
    # does rounding move them as fast as anything. What is as small as rounding itself is nothing else.
    share = history.thresholds.flat_sensitivity if history.adaptive else ROUNDED
    limit = share * abs(loss) if loss else ROUNDING_SENSITIVITY
    return largest_sensitivity(history) < limit and moves(history)


def same_loss(history: History) -> float | None:
    """Return a loss that has been the same, to rounding, at each batch of the window; None: it has not.

    Nor where it had come down to that, goes on coming down by less, or no gradient arrives; nor where it is told in so
    few digits that nobody knows.
    """
    return history.once(_same_loss)


def _same_loss(history: History) -> float | None:
    losses = history.losses(history.thresholds.window)
    if history.improved is True or len(losses) < history.thresholds.window or not any(history.snapshot.norm):
        return None
    low, high = min(losses), max(losses)
    same = math.isfinite(high - low) and high - low <= CONSTANT_LOSS * abs(low) and not _of_few_digits(low)
    if same and low < high and all(b <= a for a, b in itertools.pairwise(losses)):
        return None
    return low if same and (history.improved is False or low == history.first_loss) else None


def _of_few_digits(number: float) -> bool:
    """Tell whether a number, other than a whole one, has no more digits than float16 and bfloat16 have."""
    scaled = math.frexp(number)[0] * 2**HALF_DIGITS
    return scaled == round(scaled) and number != round(number)


def largest_sensitivity(history: History) -> float:
    """Return the largest sensitivity of all layers in the newest snapshot."""
    import numpy as np

    return float(np.fmax.reduce(history.sensitivities(1), axis=None, initial=0.0))


def kinds(history: History) -> dict[str, RecurrenceName | None]:
    """Return what the recurrent modules of the newest look through time are, by name."""
    newest = next(iter(history.sequences(1)), None)
    return {s.module: s.kind for s in newest.sequences or () if s.part == ""} if newest is not None else {}


def saturation(history: History) -> dict[str, tuple[float, Function | Literal["gate"]]]:
    """Return, by layer, the share of what its activation gave that is at an end of its range, and the activation.

    That of a recurrent layer is of its gates; of one that runs in both directions, of the forward one.
    """
    return history.lasting(_saturation)


def _saturation(history: History) -> dict[str, tuple[float, Function | Literal["gate"]]]:
    found: dict[str, tuple[float, Function | Literal["gate"]]] = {
        layer: (a.saturated, a.function)
        for layer, a in activations_by_layer(history).items()
        if a.saturated is not None and a.function is not None
    }
    newest, known = next(iter(history.sequences(1)), None), kinds(history)
    for fact in (newest.facts or ()) if newest is not None else ():
        layer = history.columns.layer_of(fact.place, fact.part)
        if fact.name == "saturated_gates" and fact.value > found.get(layer, (0.0, ""))[0]:
            found[layer] = fact.value, "tanh" if known.get(fact.place) == "RNN" else "gate"
    return found


def flat(history: History) -> set[int]:
    """Return the layers at or before one whose activation is saturated all over.

    Zeros there are where the gradient faded to, and no cut.
    """
    return history.lasting(_flat)


def _flat(history: History) -> set[int]:
    known = {layer for layer, (share, _) in saturation(history).items() if share >= MOSTLY_DEAD}
    if not known:
        return set()
    last = max((at for at, i in enumerate(history.order) if history.model.layers[i].name in known), default=-1)
    return set(history.order[: last + 1])


def misread(history: History) -> dict[str, SequenceStats]:
    """Return the recurrent modules that read something else than their data, at probe after probe, as seen last.

    And the model, where it reads other rows than that of which it tells something.
    """
    return history.lasting(_misread)


def _misread(history: History) -> dict[str, SequenceStats]:
    probes = history.sequences(min(MISREAD_PROBES, history.thresholds.window))
    found = [{s.module: s for s in p.sequences or () if s.part in ("", "model") and s.misread} for p in probes]
    return {name: stats for name, stats in found[-1].items() if all(name in f for f in found)} if found else {}


def before_misread(history: History) -> set[int]:
    """Return the layers before a recurrent module that does not read its data: that is why they have no gradient."""
    order, names = history.order, [name for name, stats in misread(history).items() if stats.part == ""]
    last = [at for at, i in enumerate(order) for name in names if inside(history.model.layers[i].name, name)]
    return set(order[: max(last, default=0)])


def zero_weights(history: History) -> list[str]:
    """Return the layers whose weights are all exactly 0, in the order of the forward pass."""
    return history.lasting(_zero_weights)


def _zero_weights(history: History) -> list[str]:
    weights = history.weight_norms() or ()
    if 0 not in weights:  # nearly always
        return []
    sizes: dict[str, float] = {}
    for p, norm in zip(history.model.parameters, weights, strict=False):
        if p.role == "weight" and norm is not None:
            sizes[p.layer] = max(sizes.get(p.layer, 0.0), norm)
    return [name for name in forward_names(history) if sizes.get(name) == 0]


def once_sound(history: History, layers: Iterable[int]) -> set[int]:
    """Return those of these layers that `History.sound_once` says so of."""
    if history.thresholds.layers:
        return {i for i in layers if history.sound_once(i)}
    known, best, limit = history.model.layers, history.best_ratio, history.thresholds.vanishing_sound
    return {i for i in layers if best.get(known[i].name, 0.0) >= limit}


def nothing_to_learn(history: History) -> bool:
    """Tell whether every loss of the window was exactly 0, and with it every gradient now."""
    losses = history.losses(history.thresholds.window)
    return bool(losses) and not any(losses) and not any(history.snapshot.norm)


def steepest(history: History, count: int = 4) -> list[str]:
    """Return the layers with the largest weights for their size."""
    import numpy as np

    gains = history.gains()
    order = np.argsort(-np.nan_to_num(gains))[:count]
    return [history.model.layers[i].name for i in order.tolist() if gains[i] > 0]


def fact(history: History, place: str, name: FactName) -> float | None:
    """Return a number of a module as it was measured last; None where it was not."""
    return facts(history).get((place, name))


def facts(history: History) -> dict[tuple[str, FactName], float]:
    """Return what was measured last at modules, by module and name; of parts of one nothing."""
    return history.lasting(_facts)


def _facts(history: History) -> dict[tuple[str, FactName], float]:
    return {(f.place, f.name): f.value for s in history.probed for f in s.facts or () if not f.part}


def spectral_norm(history: History, place: str) -> dict[str, float]:
    """Return the spectral norm of a layer's weight as evidence; nothing where it was not measured."""
    norm = fact(history, place, "spectral_norm")
    return {} if norm is None else {"spectral_norm": norm}


def functions(history: History) -> dict[str, Function]:
    """Return the activation after each layer of which one was seen."""
    return history.lasting(_functions)


def _functions(history: History) -> dict[str, Function]:
    return {layer: a.function for layer, a in activations_by_layer(history).items() if a.function is not None}


def forward_names(history: History) -> list[str]:
    """Return the names of the layers in the order of the forward pass."""
    return history.lasting(_forward_names)


def _forward_names(history: History) -> list[str]:
    return [history.model.layers[i].name for i in history.order]


def reach(history: History, finding: Finding) -> list[str]:
    """Return the layers of a finding and the one after them, in forward order; of the whole model all."""
    order, last = forward_names(history), finding.names.get("last")
    if finding.place not in order or not last:
        return order
    return order[order.index(finding.place) : order.index(last) + 2]


def spectral_radius(history: History, place: str) -> float | None:
    """Return the largest spectral radius of a recurrent module's matrices, as it was measured first; None: of none."""
    facts = ([f for f in s.facts or () if f.place == place] for s in history.probed)
    found = ([f.value for f in mine if f.name == "spectral_radius"] for mine in facts)
    return max(next(filter(None, found), ()), default=None)
