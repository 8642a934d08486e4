"""Layers that get nothing, or next to nothing, for a reason that lies in how the model is built."""

from __future__ import annotations

from collections.abc import Collection

from gradwatch.detectors.measured import facts
from gradwatch.values.autograd import BarrierKind, Cut, Flow
from gradwatch.values.history import History
from gradwatch.values.sequences import reach_of
from gradwatch.values.thresholds import JUNCTION, MOSTLY_DEAD, PASSED_BY


def flows_of(history: History) -> dict[str, Flow]:
    """Return, by the module of a layer, how the gradient comes to it, as it was measured last."""
    return history.lasting(_flows)


def _flows(history: History) -> dict[str, Flow]:
    found: dict[str, Flow] = {}
    for snapshot in history.probed:
        found.update((f.layer, f) for f in snapshot.flows or ())
    return found


def flow_of(history: History, layer: str) -> Flow | None:
    """Return how the gradient comes to a layer; None where that was not measured."""
    return flows_of(history).get(history.columns.module_of(layer))


def cut_of(history: History, layer: str) -> Cut | None:
    """Return where the gradient of a layer ended at the newest look; None where it did not, or nobody knows."""
    return history.lasting(_cuts).get(history.columns.module_of(layer))


def _cuts(history: History) -> dict[str, Cut]:
    looks = (s for s in reversed(history.probed) if s.cuts is not None or s.facts is not None)
    return {cut.layer: cut for cut in reversed(next((s.cuts or () for s in looks), ()))}


def takes_zeros(history: History, layer: str) -> bool:
    """Tell whether what a layer took, when it was looked at last, was zero all over."""
    return history.columns.module_of(layer) in history.lasting(_taking_zeros)


def _taking_zeros(history: History) -> set[str]:
    return {place for (place, name), value in facts(history).items() if name == "input_size" and value == 0}


def before_one_value(history: History) -> set[int]:
    """Return the layers that lead to nothing but a softmax of one value, which is 1 whatever it takes."""
    names = {name for name, flow in flows_of(history).items() if leads_to(flow, "softmax")}
    return _numbers(history, names)


def leads_to(flow: Flow, operation: BarrierKind) -> bool:
    """Tell whether all ways from a layer go through an operation of this kind that lets next to nothing through."""
    return flow.barrier is not None and flow.barrier.operation == operation


def idle(history: History) -> set[int]:
    """Return the layers that are not to get anything, as the model is used.

    Nothing takes what they give, or what their part is of it, their module does without them, they take zeros, or they
    lead to a softmax of one value.
    """
    cuts, flows = history.lasting(_cuts), flows_of(history)
    found = {name for name, flow in flows.items() if leads_to(flow, "softmax")}
    found |= history.lasting(_left_out).keys() | history.lasting(_taking_zeros)
    return _numbers(history, found - cuts.keys() | {n for n, cut in cuts.items() if cut.kind in ("unused", "own")})


def left_out(history: History, layer: str) -> str | None:
    """Return the layer that is one part of a tensor of whose others the rest of the model takes alone.

    It is this one, or one after it that takes from it. None where that is not so.
    """
    taken = history.lasting(_left_out)
    return taken.get(history.columns.module_of(layer))


def _left_out(history: History) -> dict[str, str]:
    flows = flows_of(history)
    found = {name: name for name, flow in flows.items() if flow.whole}
    for i in reversed(history.order) if found else ():
        name = history.model.layers[i].module
        source = flows[name].source if name in found and name in flows and not flows[name].joined else None
        if source is not None:
            found.setdefault(source, found[name])
    return found


def of_parts(history: History) -> set[int]:
    """Return the layers that take the batch, and are one part of such a tensor, by their numbers."""
    flows = flows_of(history)
    takes = {name for name in history.lasting(_left_out) if name in flows and flows[name].source is None}
    return _numbers(history, {name for name in takes if flows[name].fed})


def added(history: History, layers: Collection[int]) -> set[int]:
    """Return those of these layers that are only added to what a layer that is none of these gives, or put beside it.

    They get the gradient that that layer's output gets: of vanishing it tells as much as theirs does.
    """
    numbers, known = history.numbers, flows_of(history)
    flows = {i: known.get(history.model.layers[i].module) for i in layers}
    sources = {i: f.source for i, f in flows.items() if f is not None and f.added}
    return {i for i, s in sources.items() if s is not None and numbers.get(history.columns.layer_of(s)) not in layers}


def without_effect(history: History) -> dict[str, Flow]:
    """Return the layers that lead to nothing but a normalization of one value, which gives its shift whatever it takes.

    Their true gradient is 0, and what arrives is rounding.
    """
    return history.lasting(_without_effect)


def _without_effect(history: History) -> dict[str, Flow]:
    return {
        name: f
        for name, f in flows_of(history).items()
        if f.barrier is not None and f.barrier.operation != "softmax" and f.barrier.values == 1
    }


def rounding(history: History) -> set[int]:
    """Return those layers, and the normalizations at which it ends, by their numbers."""
    flows = without_effect(history)
    names = {*flows, *(f.barrier.at for f in flows.values() if f.barrier is not None)}
    return _numbers(history, names)


def _numbers(history: History, modules: Collection[str]) -> set[int]:
    """Return the layers of these modules, by their numbers."""
    return {i for i, layer in enumerate(history.model.layers) if layer.module in modules} if modules else set()


def fading(history: History) -> set[int]:
    """Return the layers that feed nothing but the initial state of a recurrent layer that forgets it."""
    names = [name for name, flow in flows_of(history).items() if flow.state_of is not None]
    return _numbers(history, {name for name in names if fades_with(history, name) is not None})


def fades_with(history: History, layer: str) -> tuple[str, int, int] | None:
    """Return the recurrent layer whose initial state is all that a layer feeds, its horizon, and its timesteps.

    None where there is none, or it remembers its initial state.
    """
    flow = flow_of(history, layer)
    if flow is None or flow.state_of is None:
        return None
    for snapshot in reversed(history.sequences()):
        for stats in snapshot.sequences or ():
            reach = reach_of(stats) if (stats.module, stats.part) == (flow.state_of, "") else None
            if reach is not None:
                return None if reach.censored else (flow.state_of, reach.timesteps, stats.length)
    return None


def aside(history: History, layers: Collection[int]) -> set[int]:
    """Return those of these layers that lie on a side branch at whose end the gradient is lost, and not by its depth.

    The gradient passes by its first layer, or nothing comes before that; the others take from one another. So it is
    before a product or a gate that begins nearly shut; a softmax with all of its weight on one value is no such thing.
    """
    ratios, numbers, known = history.ratios(1)[-1], history.numbers, flows_of(history)
    if not known:
        return set()
    flows = {i: known[layer.name] for i, layer in enumerate(history.model.layers) if layer.name in known}
    sources = {i: numbers.get(history.columns.layer_of(f.source or ""), -1) for i, f in flows.items()}
    ordered = [i for i in history.order if i in flows]
    shut = {i for i, f in flows.items() if f.peak is not None and f.peak >= MOSTLY_DEAD}
    beside = {i for i, f in flows.items() if not f.fed or (f.through is not None and f.through <= PASSED_BY)} - shut
    while further := {i for i in ordered if sources[i] in beside} - beside:
        beside |= further
    ends = {i: ratios[i] for i in ordered}
    for i in reversed(ordered):  # one after the other, up to where far more arrives
        source = sources[i]
        if flows[i].joined:  # the branch ends before that
            continue
        if source in ends and ratios[i] < JUNCTION * ratios[source]:
            ends[source] = max(ends[source], ends[i])
    lost = {i for i in beside if ends[i] * JUNCTION < 1}
    # Where more is lost on the way through it than at its end, it is its depth that loses it, along the whole way.
    deep = {i for i in lost if ratios[i] < ends[i] ** 2}
    while further := {i for i in lost if sources[i] in deep or any(sources[j] == i for j in deep)} - deep:
        deep |= further
    return {i for i in layers if i in lost - deep}
