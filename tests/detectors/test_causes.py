"""What probes measure of units and of layers in question, against what the tensors themselves say."""

from __future__ import annotations

import gc
import logging
import weakref

import pytest
import torch
from models import Model
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import gradwatch
from gradwatch.measurement.norms import spectral_norm


def probes(model, inputs, *, lr=0.0, optimizer=None, skip=1, **options):
    """Train, every step a probe, and return the snapshots after the first `skip`.

    A watcher sees no forward pass before its first step.
    """
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=lr)
    found = []
    with gradwatch.watch(
        model,
        optimizer,
        every_n_steps=1,
        probe_every_n_steps=1,
        sinks=[lambda r: found.append(r.snapshot)],
        on_alert=lambda _: None,
        **options,
    ):
        for x in (*inputs[:1] * skip, *inputs):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    return found[skip:]


def units(snapshot):
    return {
        a.module: (a.units, a.dead, a.saturated)
        for a in snapshot.activations or ()
        if a.units is not None or a.saturated is not None
    }


def facts(snapshot, place):
    return {f.name: f.value for f in snapshot.facts or () if f.place == place}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def silenced(layer, count):
    """Let the first `count` units never be above zero."""
    with torch.no_grad():
        layer.bias.zero_()
        layer.bias[:count] = -1e3
    return layer


WAYS = {
    "module": (lambda m, x: m.head(m.act(m.layer(x))), {"act": nn.ReLU()}),
    "in place": (lambda m, x: m.head(m.act(m.layer(x))), {"act": nn.ReLU(inplace=True)}),
    "function": (lambda m, x: m.head(functional.relu(m.layer(x))), {}),
    "method, with dropout after it": (lambda m, x: m.head(m.drop(m.layer(x).relu())), {"drop": nn.Dropout(0.5)}),
    "hardtanh at zero": (lambda m, x: m.head(functional.relu6(m.layer(x))), {}),
    "hardswish": (lambda m, x: m.head(m.act(m.layer(x))), {"act": nn.Hardswish()}),
    "after a sum": (lambda m, x: m.head(functional.relu(m.layer(x) + x)), {}),
    "checkpoint": (
        lambda m, x: m.head(checkpoint(lambda y: m.act(m.layer(y)), x, use_reentrant=False)),
        {"act": nn.ReLU()},
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_share_of_dead_units_is_that_of_units_that_are_never_above_zero(way):
    run, modules = WAYS[way]
    torch.manual_seed(0)
    model = Model(run, layer=silenced(nn.Linear(8, 8), 6), head=nn.Linear(8, 1), **modules)

    (snapshot,) = probes(model, [draw(100, 8)])

    assert units(snapshot)["layer"][:2] == (8, 0.75)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (lambda: nn.Conv1d(2, 8, 3), (20, 2, 12)),
        (lambda: nn.Conv2d(2, 8, 3), (4, 2, 9, 9)),
        (lambda: nn.ConvTranspose2d(2, 8, 3), (4, 2, 9, 9)),
        (lambda: nn.Linear(8, 8), (5, 20, 8)),
    ],
    ids=["Conv1d", "Conv2d", "ConvTranspose2d", "three dimensions"],
)
def test_units_are_channels_or_features(layer, shape):
    torch.manual_seed(0)
    model = Model(
        lambda m, x: m.layer(x).relu().flatten(1).mean(1, keepdim=True) * m.scale(x.flatten(1)[:, :1]),
        layer=silenced(layer(), 5),
        scale=nn.Linear(1, 1),
    )
    seen = Model(lambda m, x: m.act(m.inner(x)), inner=nn.Sequential(model.layer, nn.ReLU()), act=nn.Identity())

    (snapshot,) = probes(seen, [draw(*shape)])

    assert units(snapshot)["inner.0"][:2] == (8, 5 / 8)


def test_units_belong_to_the_normalization_where_one_stands_in_front():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 8, 3), silenced(nn.BatchNorm2d(8), 6), nn.ReLU(), nn.Conv2d(8, 1, 3))

    (snapshot,) = probes(model, [draw(4, 2, 9, 9)])

    assert units(snapshot) == {"1": (8, 0.75, None)}


def test_a_unit_is_not_dead_before_it_was_silent_for_64_entries():
    torch.manual_seed(0)
    model = nn.Sequential(silenced(nn.Linear(8, 8), 6), nn.ReLU(), nn.Linear(8, 1))

    assert [units(s)["0"][1] for s in probes(model, [draw(20, 8, seed=i) for i in range(5)])] == [
        0.0,
        0.0,
        0.0,
        0.75,
        0.75,
    ]


def test_rare_units_are_not_dead():
    # Each of them fires once in a hundred entries: 200 silent ones are chance.
    class Rare(nn.Module):
        def forward(self, x):
            return functional.relu(x)

    model = Model(
        lambda m, x: m.head(m.act(m.layer(x))), layer=nn.Linear(64, 64, bias=False), act=Rare(), head=nn.Linear(64, 1)
    )
    with torch.no_grad():
        model.layer.weight.copy_(torch.eye(64))
    inputs = [(torch.rand(100, 64, generator=torch.Generator().manual_seed(i)) < 0.01).float() - 0.5 for i in range(12)]

    shares = [units(s)["layer"][1] for s in probes(model, inputs)]

    assert max(shares) <= 2 / 64


def test_a_unit_that_fires_again_is_alive():
    model = nn.Sequential(nn.Linear(1, 4), nn.ReLU(), nn.Linear(4, 1))
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[0].bias.zero_()

    shares = [units(s)["0"][1] for s in probes(model, [-torch.ones(100, 1), -torch.ones(100, 1), torch.ones(100, 1)])]

    assert shares == [1.0, 1.0, 0.0]


@pytest.mark.parametrize("activation", [nn.GELU(), nn.SiLU(), nn.LeakyReLU(), nn.ELU()], ids=lambda a: type(a).__name__)
def test_what_has_no_exact_zeros_has_no_dead_units(activation):
    model = nn.Sequential(silenced(nn.Linear(8, 8), 8), activation, nn.Linear(8, 1))

    assert units(probes(model, [draw(100, 8)])[0]) == {}


@pytest.mark.parametrize(
    ("function", "edges"), [(torch.tanh, (-0.98, 0.98)), (torch.sigmoid, (0.01, 0.99))], ids=["tanh", "sigmoid"]
)
def test_the_saturated_share_is_that_in_the_outer_hundredth_of_the_range(function, edges):
    torch.manual_seed(0)
    model = Model(lambda m, x: m.head(function(m.layer(x))), layer=nn.Linear(8, 8), head=nn.Linear(8, 1))
    with torch.no_grad():
        model.layer.weight.mul_(5.0)
        x = draw(100, 8)
        given = function(model.layer(x))
    truth = float(((given < edges[0]) | (given > edges[1])).float().mean())

    assert 0.05 < truth < 0.95
    assert units(probes(model, [x])[0])["layer"][2] == pytest.approx(truth, abs=1e-6)


def test_of_layers_in_question_the_input_and_the_bias_are_measured():
    torch.manual_seed(0)
    model = nn.Sequential(silenced(nn.Linear(8, 8), 6), nn.ReLU(), nn.Linear(8, 1))
    x = draw(100, 8) * 2 + 30

    (snapshot,) = probes(model, [x])

    known = facts(snapshot, "0")
    assert known["input_offset"] == pytest.approx(
        float(x.mean(0).square().mean().sqrt() / x.var(0, correction=0).mean().sqrt()), rel=1e-4
    )
    with torch.no_grad():
        out = model[0](x)
        silent = out.amax(0) <= 0
        by_bias = silent & ((out - model[0].bias).amax(0) > 0)
    assert known["silent_by_bias"] == pytest.approx(float(by_bias.sum() / silent.sum()))
    assert known["spectral_norm"] == pytest.approx(
        float(torch.linalg.matrix_norm(model[0].weight.detach(), 2)), rel=0.05
    )
    assert {a.module: a.function for a in snapshot.activations}["0"] == "relu"


def test_an_input_that_is_always_the_same_is_infinitely_off_centre():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1))

    assert facts(probes(model, [torch.ones(10, 8)])[0], "0")["input_offset"] == float("inf")


def test_of_layers_that_nothing_is_wrong_with_nothing_is_measured_but_at_the_first_look():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))

    snapshots = probes(model, [draw(100, 8, seed=i) for i in range(4)])

    assert [bool(s.facts) for s in snapshots] == [True, False, False, False]


@pytest.mark.parametrize("shape", [(20, 30), (30, 20), (8, 4, 3, 3), (1, 9)])
def test_the_spectral_norm_is_from_below_and_within_a_few_percent(shape):
    weight = draw(*shape)
    truth = float(torch.linalg.matrix_norm(weight.flatten(1), 2))

    assert 0.95 * truth <= float(spectral_norm(weight)) <= truth * 1.0001


def test_the_share_of_lost_updates_is_that_of_weights_that_stay():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1)).bfloat16()
    before = [p.detach().clone() for p in model.parameters()]

    (snapshot,) = probes(model, [draw(32, 16).bfloat16()], lr=2e-4, skip=0)

    for share, old, p in zip(snapshot.lost, before, model.parameters(), strict=True):
        moved = p.grad != 0
        assert share == pytest.approx(float(((p == old) & moved).sum() / moved.sum().clamp(min=1)))
    assert 0.1 < snapshot.lost[0] < 0.99
    assert probes(nn.Linear(4, 1), [draw(8, 4)])[0].lost is None


@pytest.mark.parametrize("scale", [1e-6, 1.0])
def test_small_numbers_of_float16_are_seen_in_float32_gradients(scale):
    torch.manual_seed(0)
    layer = nn.Linear(8, 64)

    def run(m, x):
        with torch.autocast("cpu", dtype=torch.float16):
            return m.layer(x).float() * scale

    (snapshot,) = probes(Model(run, layer=layer), [draw(16, 8)])

    column = [p.name for p in snapshot.model.parameters].index("layer.weight")
    gradient = layer.weight.grad
    share = float((gradient.abs() < 2.0**-14).sum() / gradient.numel())
    assert snapshot.zeros[column] == pytest.approx(float((gradient == 0).float().mean()))
    assert snapshot.subnormal[column] * (1 - snapshot.zeros[column]) == pytest.approx(
        share - snapshot.zeros[column], abs=1e-6
    )
    assert (share > 0.9) == (scale < 1)


def test_two_watchers_of_one_model_measure_the_same():
    torch.manual_seed(0)
    model = nn.Sequential(silenced(nn.Linear(8, 8), 6), nn.ReLU(), nn.Linear(8, 1))
    other = []
    with gradwatch.watch(
        model,
        torch.optim.SGD(model.parameters(), lr=0.0),
        every_n_steps=1,
        probe_every_n_steps=1,
        sinks=[other.append],
        on_alert=lambda _: None,
    ) as second:
        found = probes(model, [draw(100, 8)] * 2)
        assert second is not None

    assert units(found[-1])["0"][1] == 0.75


def test_units_are_told_of_at_the_step_of_the_optimizer_that_steps_their_layer():
    torch.manual_seed(0)
    model = nn.Sequential(
        silenced(nn.Linear(8, 8), 6), nn.ReLU(), silenced(nn.Linear(8, 8), 4), nn.ReLU(), nn.Linear(8, 1)
    )
    optimizers = [torch.optim.SGD(model[0].parameters(), lr=0.0), torch.optim.SGD(model[2:].parameters(), lr=0.0)]
    found = []
    with gradwatch.watch(
        model,
        optimizers,
        every_n_steps=1,
        probe_every_n_steps=1,
        sinks=[lambda r: found.append(r.snapshot)],
        on_alert=lambda _: None,
    ):
        for step in range(3):
            model(draw(100, 8, seed=step)).sum().backward()
            for optimizer in optimizers:
                optimizer.step()

    assert {(s.optimizer, name) for s in found[2:] for name in units(s)} == {(0, "0"), (1, "2")}


def test_tensors_of_other_kinds_are_left_out():
    layer, act = nn.Linear(4, 4), nn.ReLU()

    def run(m, x):
        odd = torch.nested.nested_tensor([x[:2], x[:3]], layout=torch.jagged)
        return m.head(m.act(m.layer(x))) + m.act(m.layer(odd)).values().sum()

    (snapshot,) = probes(Model(run, layer=silenced(layer, 2), act=act, head=nn.Linear(4, 1)), [draw(100, 4)])

    assert units(snapshot)["layer"][1] == 0.5


def test_what_is_written_at_nodes_goes_with_the_graph():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    watcher = gradwatch.watch(model, optimizer, every_n_steps=1, probe_every_n_steps=1)
    for _ in range(2):
        out = model(draw(10, 8))
        out.sum().backward()
        optimizer.step()
    gone = weakref.ref(out)
    del out
    gc.collect()

    assert gone() is None
    assert not any(p.grad_fn for p in model.parameters())
    watcher.close()


def test_when_a_run_is_closed_one_line_says_what_is_still_open(caplog):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with caplog.at_level(logging.INFO, "gradwatch"), gradwatch.watch(model, optimizer) as watcher:
        for _ in range(3):
            optimizer.zero_grad()
            (model(draw(10, 8)).sum() * float("nan")).backward()
            optimizer.step()
        watcher.close()

    assert [r.getMessage() for r in caplog.records if "at the end" in r.getMessage()] == [
        "at the end 1 alert is open: GW501 non-finite at 1 since step 0"
    ]


def test_where_the_gradient_ends_is_one_value_with_both_sides():
    torch.manual_seed(0)
    modules = {"a": nn.Linear(8, 8), "b": nn.Linear(8, 8), "c": nn.Linear(8, 1)}

    def detached(m, x):
        return m.c(m.b(m.a(x)).detach())

    def without_graph(m, x):
        with torch.no_grad():
            given = m.b(m.a(x))
        return m.c(given)

    def unused(m, x):
        m.b(m.a(x))
        return m.c(x)

    for run, cuts in {
        detached: {"a": ("b", "c", True), "b": ("b", "c", True)},
        without_graph: {"a": ("b", "c", False), "b": ("b", "c", False)},
    }.items():
        (snapshot,) = probes(Model(run, **modules), [draw(16, 8)])
        assert {c.layer: (c.unreached, c.reached, c.graph) for c in snapshot.cuts} == cuts
    (snapshot,) = probes(Model(unused, **modules), [draw(16, 8)])
    assert {c.layer: c.graph for c in snapshot.cuts} == {"a": True, "b": True}
    assert not any(f.name == "done" for f in snapshot.facts)


def test_the_activation_after_every_layer_is_known_also_where_nothing_is_wrong():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))

    for snapshot in probes(model, [draw(100, 8, seed=i) for i in range(3)]):
        assert {a.module: a.function for a in snapshot.activations if a.function} == {"0": "relu", "2": "tanh"}


def test_the_format_that_computed_the_gradients_is_a_field():
    torch.manual_seed(0)
    layer = nn.Linear(8, 8)

    def run(m, x):
        with torch.autocast("cpu", dtype=torch.float16):
            return m.layer(x).float()

    assert probes(Model(run, layer=layer), [draw(16, 8)])[0].computed_in == "float16"
    assert probes(Model(lambda m, x: m.layer(x), layer=layer), [draw(16, 8)])[0].computed_in is None


def test_where_the_gradient_ends_is_the_same_place_whichever_optimizer_trains_what_lies_beyond():
    torch.manual_seed(0)
    modules = {name: nn.Linear(8, 8) for name in ("a", "b", "head", "out")}
    net = Model(lambda m, x: m.out(m.head(m.b(m.a(x)).detach())), **modules)
    first = torch.optim.SGD([p for name in ("a", "b", "out") for p in modules[name].parameters()], lr=0.1)
    second = torch.optim.SGD(modules["head"].parameters(), lr=0.1)
    snapshots = []
    sinks = [lambda report: snapshots.append(report.snapshot)]
    options = {"every_n_steps": 1, "probe_every_n_steps": 1}
    with gradwatch.watch(net, [first, second], sinks=sinks, **options):
        for _ in range(6):
            net(draw(16, 8)).square().mean().backward()
            first.step()
            second.step()
            net.zero_grad()
    found = [{c.layer: (c.unreached, c.reached) for c in s.cuts} for s in snapshots if s.cuts]
    assert found
    assert all(cuts == {"a": ("b", "head"), "b": ("b", "head")} for cuts in found)
