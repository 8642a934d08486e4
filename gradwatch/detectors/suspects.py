"""The layers of which the next probe is to measure more."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from gradwatch.detectors.flows import flows_of
from gradwatch.detectors.measured import activations_by_layer, steepest
from gradwatch.values.history import History
from gradwatch.values.report import Alert
from gradwatch.values.snapshot import ModelInfo

_MOST, _MOST_AT_FIRST = 32, 256
"""Layers of which a probe measures more."""


def suspects(history: History, model: ModelInfo, open_alerts: Iterable[Alert]) -> frozenset[str]:
    """Return the modules of which a probe is to measure more.

    They are those of the layers with open alerts, of those that look ill now, and of those after them.

    At the first look all are: what explodes at once is gone before a second one.
    """
    if not history.begun or history.count < 2:
        return frozenset(layer.module for layer in model.layers[:_MOST_AT_FIRST])
    t = history.thresholds
    order = [model.layers[i].name for i in model.forward_order]
    ratios = history.ratios(1)[-1]
    chosen = {layer.name for layer, ratio in zip(model.layers, ratios, strict=True) if ratio < t.vanishing_ratio}
    silent = {
        p.layer
        for p, norm in zip(model.parameters, history.snapshot.norm, strict=True)
        if norm == 0 and p.role != "bias"
    }
    cut = {
        p.layer
        for p, reason in zip(model.parameters, history.snapshot.absent or (), strict=False)
        if reason == "disconnected"
    }
    dead = {layer for layer, a in activations_by_layer(history).items() if (a.dead or 0.0) >= t.dead_units}
    places = {history.columns.layer_of(alert.finding.place) for alert in open_alerts}
    named = places | set(steepest(history) if "" in places else ())
    narrow = {history.columns.layer_of(f.layer) for f in flows_of(history).values() if f.barrier is not None}
    chosen |= silent | cut | dead | named | narrow
    after = {order[i + 1] for i in range(len(order) - 1) if order[i] in chosen}
    # Where there is no room for all, what is known of the first of these must not be forgotten.
    modules = (
        layer.module
        for names in (named | narrow, chosen | after)
        for layer in (model.layers[i] for i in model.forward_order)
        if layer.name in names
    )
    return frozenset(itertools.islice(dict.fromkeys(modules), _MOST))
