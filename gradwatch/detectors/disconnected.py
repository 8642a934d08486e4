"""Layers that take part in the forward pass, are to be trained, and get no gradient."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from gradwatch.detectors.cause_words import said
from gradwatch.detectors.causes import of_a_cut
from gradwatch.detectors.flows import before_one_value, idle, leads_to, of_parts, rounding, without_effect
from gradwatch.detectors.measured import (
    constant_loss,
    flat,
    forward_names,
    nothing_to_learn,
    once_sound,
    zero_weights,
)
from gradwatch.detectors.rule import Rule
from gradwatch.values.autograd import BarrierKind
from gradwatch.values.column import is_zero
from gradwatch.values.history import History
from gradwatch.values.layer_columns import inside
from gradwatch.values.report import Explanation, Finding, Severity
from gradwatch.values.snapshot import Absent
from gradwatch.values.thresholds import KEPT, MUCH, ROUNDED, UPDATE_PROBES

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_BESIDE: tuple[BarrierKind, ...] = ("quotient", "shift")
"""Barriers that are no normalizations."""


def disconnected(history: History) -> Iterator[Finding]:
    """GW401: a layer ran, its optimizer steps it, and nothing, or exactly zero, arrives at snapshot after snapshot.

    GW402: it leads to nothing.
    """
    yield from _worthless(history)
    norm = history.snapshot.norm
    if None not in norm and 0 not in norm:  # nearly always
        return
    if history.snapshot.silence is not None:  # nothing has arrived at any: GW901 says so
        return
    trained, severity = _trained(history), Severity.ERROR
    columns = trained.columns
    if is_zero(norm):  # nothing at all is left: converged to the last bit, or dead from end to end
        nothing = nothing_to_learn(history)
        if history.improved and history.first_loss:
            return
        if any(history.first_norms):
            severity = Severity.INFO if nothing or history.improved is None else severity
        elif nothing:  # rewards may be rare at first
            severity = Severity.WARNING
    without, zero = _without_gradient(history, trained), _with_zeros(history, trained)
    zero -= rounding(history)
    stuck = set(zero_weights(history))  # they take zeros because others are stuck too
    spare = {i for i in (without | zero) & idle(history) if history.model.layers[i].name not in stuck}
    spare |= zero & before_one_value(history)
    # A part of a tensor that the rest does without, as rows that nobody reads, is no fault but where that is what was
    # made of the batch and the loss stands still.
    unread = history.lasting(of_parts) if history.improved is False else set()
    for least, cut, its in (
        ({}, without - spare, severity),
        ({"norm": 0.0}, zero - spare, severity),
        ({}, without & spare, Severity.WARNING if _needed(history, without & spare, columns) else Severity.INFO),
        ({"norm": 0.0}, zero & spare - unread, Severity.INFO),
        ({"norm": 0.0}, zero & spare & unread, Severity.WARNING),
    ):
        for run in history.runs(cut, columns):
            names = [history.model.layers[i].name for i in run]
            onset = history.since(all(not s.norm[column] for column in columns[run[0]]) for s in history.window())
            yield Finding(
                "GW401",
                "disconnected",
                its,
                names[0],
                onset=onset,
                evidence={"layers": float(len(run)), **least},
                names={"last": names[-1]},
            )


def _worthless(history: History) -> Iterator[Finding]:
    """GW402: all that layers lead to is a normalization of one value, so that their gradient is the rounding of a 0.

    What gets more than that gets it beside the model's output: a loss of its own.
    """
    yield from _constant(history)
    flows = without_effect(history)
    if not flows:
        return
    trained, ratios = _trained(history).columns, history.ratios(1)[-1]
    looked = _at_each_look(history)

    def is_rounding(layer: int, module: str) -> bool:
        if leads_to(flows[module], "quotient"):
            return module in looked and not ratios[layer] > ROUNDED
        if leads_to(flows[module], "shift"):
            return module in looked and _is_rounding(history, trained[layer])
        return not ratios[layer] >= history.thresholds.vanishing_ratio

    modules = {i: history.model.layers[i].module for i in trained}
    worthless = {i for i, module in modules.items() if module in flows and is_rounding(i, module)}
    for run in history.runs(worthless, trained):
        names = [history.model.layers[i].name for i in run]
        last = history.columns.module_of(names[-1])
        barrier = flows[last].barrier
        seen = [any(f.layer == last for f in s.flows or ()) for s in history.window()]
        yield Finding(
            "GW402",
            "disconnected",
            Severity.ERROR,
            names[0],
            onset=history.window()[seen.index(True)].step,
            evidence={"layers": float(len(run))},
            names={
                "last": names[-1],
                "at": barrier.at if barrier is not None and not leads_to(flows[last], "shift") else "",
                "operation": next((kind for kind in _BESIDE if leads_to(flows[last], kind)), "normalization"),
            },
        )


def _at_each_look(history: History) -> set[str]:
    """Return the modules of which that holds at each look of several: once, it may be the batch's shape."""
    several = min(UPDATE_PROBES, history.thresholds.window)
    looks = [
        {f.layer for f in s.flows or () if any(leads_to(f, kind) for kind in _BESIDE)} for s in history.looks(several)
    ]
    return set.intersection(*looks) if len(looks) == several else set()


def _is_rounding(history: History, columns: Iterable[int]) -> bool:
    """Tell whether what arrives at parameters may be rounding alone, beside all that arrives.

    What the model keeps aside for the loss is no way that is seen, and what a mask puts in may be of any size.
    """
    total, norm = history.totals[-1], history.snapshot.norm
    return total is not None and all((norm[c] or 0.0) <= ROUNDED * total for c in columns)


def _needed(history: History, layers: Collection[int], trained: Collection[int]) -> bool:
    """Tell whether layers that nothing takes from are much of a model whose loss stands still: then it needs them."""
    return history.improved is False and history.count >= KEPT and len(layers) >= MUCH * len(trained)


def _constant(history: History) -> Iterator[Finding]:
    if constant_loss(history):
        window = history.window(history.thresholds.window)
        evidence = {"loss": history.losses(1)[-1], "layers": float(len(history.model.layers))}
        yield Finding("GW402", "disconnected", Severity.WARNING, "", onset=window[0].step, evidence=evidence)


class _Trained(NamedTuple):
    """What an optimizer is to train."""

    columns: dict[int, list[int]]
    """By the number of the layer."""
    flat: NDArray[np.intp]
    """All of them, layer after layer."""
    starts: NDArray[np.intp]
    """Where those of each layer begin."""

    def all_of(self, mask: NDArray[np.bool_]) -> set[int]:
        """Return the layers of which the mask is true for all columns."""
        import numpy as np

        if not len(self.starts):
            return set()
        whole = np.logical_and.reduceat(mask[self.flat], self.starts)
        return set(itertools.compress(self.columns, whole.tolist()))


def _trained(history: History) -> _Trained:
    """Return what the optimizer of this step is to train.

    Those whose layer is known to stand aside are left out.
    """
    return history.lasting(_all_trained, history.snapshot.optimizer, history.snapshot.absent or ())


def _all_trained(history: History, mine: int | None, absent: Sequence[Absent | None]) -> _Trained:
    import numpy as np

    index = history.numbers
    found: dict[int, list[int]] = {}
    for column, parameter in enumerate(history.model.parameters):
        if parameter.optimizer == mine and not (absent and absent[column] in ("frozen", "unused")):
            found.setdefault(index[parameter.layer], []).append(column)
    sizes = np.array([len(its) for its in found.values()], dtype=np.intp)
    flat = np.array([column for its in found.values() for column in its], dtype=np.intp)
    return _Trained(found, flat, np.cumsum(sizes) - sizes)


def _without_gradient(history: History, trained: _Trained) -> set[int]:
    """Return the layers that ran in the last probe and had no gradient at all at the last snapshots."""
    import numpy as np

    absent = history.snapshot.absent
    window = history.window(history.thresholds.disconnected_steps)
    if absent is None or len(window) < history.thresholds.disconnected_steps:
        return set()
    missing = np.array([reason == "disconnected" for reason in absent])
    if not missing.any():
        return set()
    for s in window:
        # Where no count of what is not finite is there, a NaN of the array is what was None.
        missing &= np.isnan(np.asarray(s.norm, dtype=float)) if s.nonfinite is None else [n is None for n in s.norm]
    return trained.all_of(missing)


def _with_zeros(history: History, trained: _Trained) -> set[int]:
    """Return the layers that ran in the last probe and got exactly zero through the window, that probe included."""
    import numpy as np

    window = history.window(history.thresholds.window)
    if 0 not in window[-1].norm or len(window) < history.thresholds.window:
        return set()
    if all(s.weight_norm is None for s in window) and not history.open_at("GW401"):
        return set()
    always = np.asarray(window[-1].norm, dtype=float) == 0  # NaN, where there is none, is not
    for earlier in window[:-1]:
        always &= np.asarray(earlier.norm, dtype=float) == 0
    # Where the gradient fades after a layer, it was not cut off: it has vanished, which is another kind.
    cut = trained.all_of(always) - _blocked(history) - _faded(history) - flat(history)
    # One that was sound may stand idle for a while, as an expert does that nothing is routed to.
    kept, columns, sound = history.window(), trained.columns, once_sound(history, cut)
    idle = {i for i in sound if len(kept) == KEPT and all(s.norm[c] == 0 for s in kept for c in columns[i])}
    return cut - sound | idle


def _blocked(history: History) -> set[int]:
    """Return the layers in whose way, or in which, a weight stands that is exactly zero and about to move.

    So LoRA begins, and residual branches that are initialized to zero.
    """
    weights = history.weight_norms() or ()
    opening = {
        p.layer
        for w, n, p in zip(weights, history.snapshot.norm, history.model.parameters, strict=False)
        if w == 0 and n and p.role != "bias"
    }
    if not opening:
        return set()
    order, names = history.order, forward_names(history)
    last = max((at for at, name in enumerate(names) if name in opening), default=-1)
    # A module that holds a gain of its own begins before the layers in it.
    within = {i for i, name in zip(order, names, strict=True) if any(inside(name, zero) for zero in opening)}
    return {*order[: last + 1], *within}


def _faded(history: History) -> set[int]:
    """Return the layers towards which those after them fade: their zeros are underflow, the end of vanishing."""
    ratios = history.ratios(1)[-1].tolist()
    found, nearest = set(), 1.0
    for i in reversed(history.order):
        if nearest < history.thresholds_of(i).vanishing_ratio:
            found.add(i)
        if ratios[i] > 0:
            nearest = ratios[i]
    return found


def _explain(finding: Finding) -> Explanation:
    what, last, count = finding.place or "the model's own parameters", finding.names["last"], finding.evidence["layers"]
    through = f" to {last} ({count:.0f} layers)" if count > 1 else ""
    if "norm" in finding.evidence:
        message = f"the gradient of {what}{through} has been exactly zero since step {finding.onset}"
        otherwise = f"check whether the outputs after {last or 'it'} are all zero, clamped, masked or saturated"
    else:
        runs, has = ("run", "have") if count > 1 or not finding.place else ("runs", "has")
        message = f"{what}{through} {runs} in the forward pass and {has} had no gradient since step {finding.onset}"
        otherwise = (
            f"look for detach(), torch.no_grad(), .item(), .numpy(), argmax or round after {last or 'it'}; if it is"
            f" meant to stay as it is, call requires_grad_(False) on {what}, or mute this with ignore="
        )
    cause, remedy = said(finding, otherwise)
    return Explanation(message, cause, remedy)


def _explain_worthless(finding: Finding) -> Explanation:
    if "loss" in finding.evidence:
        return Explanation(
            f"the loss has been {finding.evidence['loss']:.6g} at every batch since step {finding.onset}, whatever the"
            " weights do: the true gradient is 0, and what arrives is rounding noise, of which an Adam-like optimizer"
            " makes steps of ordinary size",
            "it compares things that are always the same: two equal inputs, one row with itself, positions that are"
            " alike in every row, a normalization whose sum or mean is fixed",
            "print what the loss takes for two different batches: it must differ; look at indices and masks",
        )
    what, last, count = finding.place or "the model's own parameters", finding.names["last"], finding.evidence["layers"]
    through = f" to {last} ({count:.0f} layers)" if count > 1 else ""
    do = "do" if count > 1 or not finding.place else "does"
    at = finding.names["at"] or "the last module"
    goes = f"goes through {at} alone, which gives the same for all"
    operation = finding.names.get("operation")
    if operation == "quotient":
        goes = "is divided by itself" + f" (before {at})" * bool(finding.names["at"])
    elif operation == "shift":
        goes = "is added to all that a softmax compares alike"
    message = (
        f"what {what}{through} {do} changes nothing: it {goes}; the true gradient is 0, and what arrives since step"
        f" {finding.onset} is rounding noise, of which an Adam-like optimizer makes steps of ordinary size"
    )
    if operation == "shift":
        return Explanation(
            message,
            "a softmax takes differences alone, and what is broadcast along the dimension that it compares shifts them"
            " all by the same: a bias with a number for each query, and none for each pair",
            "give it a number for each of what is compared (for each pair of query and key), or leave it out",
        )
    if operation == "quotient":
        return Explanation(
            message,
            "the sum or norm that values are divided by goes over one entry, as of a single expert to a token, or of"
            " a dimension of size 1",
            "leave the division out there, or sum over the dimension that was meant",
        )
    return Explanation(
        message,
        f"{at} normalizes over a single value",
        f"take the normalization at {at} out, or let it normalize over more than one value",
    )


RULES = (
    Rule("GW401", "disconnected", _explain, of_a_cut),
    Rule("GW402", "disconnected", _explain_worthless),
)
