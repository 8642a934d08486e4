"""What people read of a report in a terminal, a notebook and an error."""

from __future__ import annotations

import dataclasses
import io
import math
import re

import pytest
import torch
from rich.console import Console
from torch import nn

import gradwatch
from gradwatch import (
    Alert,
    Finding,
    GradientHealthError,
    LayerInfo,
    ModelInfo,
    ParameterInfo,
    Report,
    Severity,
    Snapshot,
)
from gradwatch.sinks.reading import Run
from gradwatch.sinks.tensorboard import scalars
from gradwatch.sinks.terminal import page as terminal
from gradwatch.sinks.terminal.layer_table import layer_table
from gradwatch.values.layer_columns import norms


def model_of(*names):
    layers = tuple(LayerInfo(name, "Linear", order) for order, name in enumerate(names))
    return ModelInfo(
        layers, tuple(ParameterInfo(f"{name}.weight", name, (2, 2), "float32", 0, "weight") for name in names)
    )


def snapshot(*norms, names=None):
    return Snapshot(7, 1e9, model_of(*(names or [f"l{i}" for i in range(len(norms))])), norm=norms, optimizer=0)


def alert(place, severity=Severity.WARNING, code="GW101"):
    return Alert(
        Finding(code, "vanishing-depth", severity, place, onset=2), 3, 5, None, "a message", "a cause", "a remedy"
    )


def shown(content, width=100):
    out = io.StringIO()
    Console(file=out, width=width, color_system=None).print(content)
    return out.getvalue()


def row(text, name):
    (line,) = (line for line in text.splitlines() if line.split()[:1] == [name])
    return line.split()


@pytest.fixture
def watcher():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradwatch.watch(model, optimizer) as watcher:
        model(torch.randn(5, 3)).square().sum().backward()
        optimizer.step()
        yield watcher, model


def test_the_repr_is_the_table_of_layers_with_their_norms(watcher):
    watcher, model = watcher
    text = repr(watcher)
    assert text.splitlines()[0] == "4 of 4 parameters with a gradient at step 0"
    for name in ("0", "2"):
        norm = torch.cat([p.grad.double().flatten() for p in model[int(name)].parameters()]).norm().item()
        assert row(text, name)[1:3] == ["Linear", f"{norm:.2e}"]
    assert all(line == line.rstrip() for line in text.splitlines())
    assert "\x1b" not in text


def test_a_watcher_that_has_seen_nothing_says_so():
    with gradwatch.watch(nn.Linear(2, 1)) as watcher:
        assert repr(watcher).splitlines()[0] == "0 of 2 parameters with a gradient at step 0"
        assert "none" in repr(watcher)


def test_an_alert_is_shown_at_its_layer_and_below_with_cause_and_remedy():
    text = terminal.text(Report(snapshot(1e-9, 1.0), open=(alert("l0"), alert("l0", Severity.ERROR, "GW401"))))
    assert row(text, "l0")[-2:] == ["GW101", "GW401"]
    assert "GW" not in " ".join(row(text, "l1"))
    assert text.index("GW401 vanishing-depth (error) l0") < text.index(
        "GW101 vanishing-depth (warning) l0"
    )  # the gravest first
    for part in ("a message", "why: a cause", "try: a remedy", "alert began at step 3, last seen at step 5"):
        assert part in text


@pytest.mark.parametrize(("steps", "said"), [((0, 0, 1, 1), "0 to 1"), ((0, 1, 2, 0), "0 to 2"), ((5, 0), "0 to 5")])
def test_the_steps_of_a_run_are_those_of_all_its_optimizers(steps, said):
    snapshots = [dataclasses.replace(snapshot(1.0), step=step, optimizer=k % 2) for k, step in enumerate(steps)]
    assert terminal.verdict(Run((), tuple(snapshots), ())) == f"{len(steps)} measured steps, {said}: no alert"


def test_markup_in_names_is_text():
    text = terminal.text(Report(snapshot(1.0, names=["[red]x[/red]"]), open=(alert("[bold]y"),)))
    assert "[red]x[/red]" in text
    assert "[bold]y" in text


def test_nan_infinity_zero_and_none_are_four_things():
    text = terminal.text(Report(snapshot(math.nan, math.inf, 0.0, None, 1e-3)))
    assert [row(text, f"l{i}")[2] for i in range(5)] == ["nan", "inf", "0.00e+00", "none", "1.00e-03"]
    assert all("█" not in "".join(row(text, f"l{i}")) for i in range(4))
    assert "█" in "".join(row(text, "l4"))


def test_a_layers_norm_is_that_of_all_its_parameters():
    layers = (LayerInfo("a", "Linear", 0), LayerInfo("b", "Linear", 1))
    parameters = tuple(
        ParameterInfo(f"{layer}.{part}", layer, (1,), "float32", 0, "weight") for layer in "ab" for part in ("w", "b")
    )
    step = Snapshot(0, 1e9, ModelInfo(layers, parameters), norm=(3.0, 4.0, None, None), optimizer=0)
    assert norms(step.model, step.norm) == {"a": 5.0, "b": None}
    table = shown(layer_table(step))
    assert [row(table, name)[2] for name in "ab"] == ["5.00e+00", "none"]
    charts = {tag: value for tag, value in scalars(Report(step)).items() if tag.startswith("gradwatch_norm/")}
    assert charts == {"gradwatch_norm/a": math.log10(5.0)}


def test_longer_bars_are_larger_norms():
    text = terminal.text(Report(snapshot(1e-12, 1e-6, 1.0)))
    bars = [text.splitlines()[2 + i].count("█") for i in range(3)]
    assert bars == [0, 6, 12]
    assert "▏" in text.splitlines()[2]  # there is something


def test_a_table_that_is_cut_says_by_how_much_and_keeps_the_smallest_and_those_with_alerts():
    norms = [10.0 ** -(i % 7) * (1 + i / 100) for i in range(30)]
    text = shown(layer_table(snapshot(*norms), (alert("l0"),), most=5))
    names = [line.split()[0] for line in text.splitlines() if line.startswith("l") and line.split()[0] != "layer"]
    smallest = sorted(range(1, 30), key=norms.__getitem__)[:4]
    assert names == [f"l{i}" for i in sorted([0, *smallest])]
    assert "25 more layers" in text
    almost = shown(layer_table(snapshot(*norms), most=29))
    assert "1 more layer" in [line.strip() for line in almost.splitlines()]
    assert "more layer" not in shown(layer_table(snapshot(*norms), most=30))


def test_a_nan_counts_as_worse_than_any_number_when_the_table_is_cut():
    text = shown(layer_table(snapshot(1e-9, math.nan, None, 1e-8), most=1))
    assert row(text, "l1")[2] == "nan"
    assert "3 more layers" in text


@pytest.mark.parametrize(
    ("width", "columns"),
    [
        (30, ["layer", "gradient"]),
        (40, ["layer", "gradient"]),
        (50, ["layer", "gradient", "of later layers"]),
        (60, ["layer", "kind", "gradient", "of later layers"]),
        (80, ["layer", "kind", "gradient", "of later layers", "log10"]),
    ],
)
def test_a_narrow_table_gives_up_bars_kinds_and_shares_but_never_names_norms_and_codes(width, columns):
    names = ["encoder.layers.0", "encoder.layers.1", "head"]
    table = layer_table(
        snapshot(1e-9, 1e-3, 1.0, names=names), (alert("encoder.layers.0"),), sensitivity=dict.fromkeys(names, 0.5)
    )
    lines = [line.rstrip() for line in shown(table, width).splitlines()]
    assert max(map(len, lines)) <= width
    assert re.split(r" {2,}", lines[0]) == columns
    edge = lines[0].index("kind" if "kind" in columns else "gradient")
    assert "".join(line[:edge].strip() for line in lines[1:]) == "".join(names)
    for part in ("1.00e-09", "1.00e-03", "1.00e+00", "GW101"):
        assert part in "\n".join(lines)


def test_the_text_of_the_error_names_what_is_wrong_why_and_the_worst_ten():
    torch.manual_seed(0)
    model = nn.Sequential(*(layer for _ in range(24) for layer in (nn.Linear(16, 16), nn.Sigmoid())))
    with pytest.raises(GradientHealthError) as caught:
        gradwatch.assert_healthy(model, torch.randn(4, 16))
    text, (first, *_) = str(caught.value), caught.value.alerts
    assert text.splitlines()[0].startswith("the gradients of this model are not healthy: vanishing-depth")
    flat = " ".join(text.split())
    for part in (
        first.finding.code,
        first.message,
        f"why: {first.cause}",
        f"try: {first.remedy}",
        "The 10 layers of 24 with the smallest gradients",
    ):
        assert part in flat
    rows = [line.split() for line in text.splitlines() if re.match(r"\d+ +Linear", line)]
    assert len(rows) == 10
    assert rows[0][0] == "0"
    assert float(rows[0][2]) < 1e-15
    assert "14 more layers" in text
    assert all(line == line.rstrip() and len(line) <= 100 for line in text.splitlines())
