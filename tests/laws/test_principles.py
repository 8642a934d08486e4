"""The principles of verdicts, on real trainings: free of scale, relative, patient, and aware of the loss where known.

They never depend on what a watcher would have to invent.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import gradwatch
from gradwatch import Severity

ROWS = 32


# --- the trainings ---


@dataclasses.dataclass(frozen=True)
class Training:
    """A small training: its model, its data, and learning rates."""

    build: Callable[[], nn.Module]
    lr: float
    adam: float = 1e-2
    steps: int = 30
    shape: tuple[int, ...] = (8,)
    jump: float = 1.0
    """What the learning rate is multiplied by at step 10."""
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


def mlp(depth, activation=nn.ReLU, width=8):
    return nn.Sequential(
        *(m for i in range(depth) for m in (nn.Linear(8 if i == 0 else width, width), activation())),
        nn.Linear(width, 1),
    )


def he(net):
    for m in net.modules():
        if isinstance(m, nn.Linear):
            nn.init.kaiming_normal_(m.weight)
            nn.init.zeros_(m.bias)
    return net


def saturated():
    net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1), nn.Sigmoid())
    nn.init.constant_(net[2].bias, -14.0)
    return net


def with_a_dead_layer():
    net = he(mlp(3, width=16))
    nn.init.constant_(net[2].bias, -12.0)
    return net


class Cut(nn.Module):
    """An encoder that the head looks at from outside of the graph, or of which it takes only a share."""

    def __init__(self, *, cut=True, share=1.0):
        super().__init__()
        self.encoder, self.head, self.cut, self.share = mlp(1), nn.Linear(9, 1), cut, share

    def forward(self, x):
        code = self.encoder(x) * self.share
        return self.head(torch.cat([code.detach() if self.cut else code, x], 1))


class Reader(nn.Module):
    """A recurrent layer and a readout of its last step."""

    def __init__(self, gain=None):
        super().__init__()
        self.rnn, self.head = nn.RNN(3, 8, nonlinearity="relu" if gain else "tanh", batch_first=True), nn.Linear(8, 1)
        if gain:
            with torch.no_grad():
                self.rnn.weight_hh_l0.copy_(gain * torch.eye(8))

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


TRAININGS = {
    "fades-with-depth": Training(lambda: mlp(9, nn.Sigmoid), lr=0.05),
    "is-flat": Training(saturated, lr=0.02),
    "is-healthy": Training(lambda: he(mlp(3, width=16)), lr=0.02, steps=40),
    "is-cut": Training(Cut, lr=0.02),
    "explodes": Training(lambda: mlp(1, nn.Tanh, width=16), lr=0.02, jump=60.0, steps=24),
    "is-dead": Training(with_a_dead_layer, lr=0.02),
    "forgets": Training(Reader, lr=0.02, shape=(30, 3), options={"horizon": 28, "probe_every_n_steps": 7}),
    "grows-with-time": Training(
        functools.partial(Reader, gain=1.5), lr=1e-24, adam=1e-24, shape=(30, 3), options={"probe_every_n_steps": 7}
    ),
}
EXPECTED = {
    "fades-with-depth": {("GW101", "0", Severity.WARNING)},
    "is-flat": {("GW102", "", Severity.WARNING)},
    "is-healthy": set(),
    "is-cut": {("GW401", "encoder.0", Severity.ERROR)},
    "explodes": {("GW203", "", Severity.ERROR)},
    "forgets": {("GW301", "rnn", Severity.WARNING)},
    "grows-with-time": {("GW302", "rnn", Severity.WARNING)},
}
"""What each must at least be found to have; what a dead layer is called depends on the rules there are."""


# --- the ways ---


@dataclasses.dataclass(frozen=True)
class Way:
    """How it is trained. None of it changes what is learned, but for `clip`, `half`, and a rate that does not fit."""

    scale: float = 1.0
    reduction: str = "mean"
    parts: int = 1
    scaler: float | None = None
    dtype: torch.dtype | None = None
    half: bool = False
    clip: float | None = None
    """The norm that gradients are clipped to, as a share of the first."""
    adam: bool = False
    fit: bool = True
    """Whether the learning rate of SGD and the epsilon of Adam go with the scale of the loss."""
    told: bool = True
    explicit: bool = False
    """Whether the loop calls `watcher.step()`, before it unscales and clips."""


SAME = {
    "a loss of 1e-8": {"scale": 1e-8},
    "a loss of 1e4": {"scale": 1e4},
    "a sum": {"reduction": "sum"},
    "a scaler": {"scaler": 2.0**10},
    "a scaler, read before it unscales": {"scaler": 2.0**10, "explicit": True},
    "four micro-batches": {"parts": 4},
}
"""Ways that change nothing."""


def optimizer_of(net, training, way):
    total = way.scale * (ROWS if way.reduction == "sum" else 1) if way.fit else 1.0
    if way.adam:
        return torch.optim.Adam(net.parameters(), lr=training.adam, eps=1e-8 * total)
    return torch.optim.SGD(net.parameters(), lr=training.lr / total)


def train(training, way=None, **options):
    """Train, and return the alerts and the verdicts: code, place, severity, and the step at which each first opened."""
    way = way or Way()
    torch.manual_seed(0)
    net = training.build()
    data = torch.randn(training.steps, ROWS, *training.shape)
    if way.half:
        net, data = net.half(), data.half()
    optimizer = optimizer_of(net, training, way)
    scaler = torch.amp.GradScaler("cpu", init_scale=way.scaler or 1.0, enabled=way.scaler is not None)
    alerts, verdicts, limit = [], {}, float("inf")

    def note(report):
        alerts.extend(report.began)
        for a in report.open:
            verdicts.setdefault((a.finding.code, a.finding.place, a.severity), report.snapshot.step)

    with gradwatch.watch(
        net, optimizer, sinks=[note], on_alert=lambda _: None, scaler=scaler, **training.options, **options
    ) as watcher:
        for step, x in enumerate(data):
            y = x.flatten(1)[:, :8].sum(1, keepdim=True) / 4
            for group in optimizer.param_groups:
                group["lr"] *= training.jump if step == 10 else 1.0
            optimizer.zero_grad()
            for rows in torch.arange(ROWS).chunk(way.parts):
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=way.dtype is not None):
                    out = net(x[rows])
                loss = nn.functional.mse_loss(out if way.half else out.float(), y[rows], reduction=way.reduction) * (
                    way.scale / way.parts
                )
                if way.told:
                    watcher.record(loss * way.parts)
                scaler.scale(loss).backward()
            if way.explicit:
                watcher.step()
            scaler.unscale_(optimizer)
            if way.clip is not None:
                norm = nn.utils.clip_grad_norm_(net.parameters(), limit)
                limit = limit if step else way.clip * norm.item()
            scaler.step(optimizer)
            scaler.update()
    return alerts, verdicts


@functools.cache
def reference(name, *, adam=False):
    return train(TRAININGS[name], Way(adam=adam))


def serious(verdicts):
    return {(code, place) for code, place, severity in verdicts if severity is not Severity.INFO}


def kinds(alerts):
    return {a.finding.kind for a in alerts}


every_training = pytest.mark.parametrize("name", TRAININGS)
either_optimizer = pytest.mark.parametrize(
    "adam", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["sgd", "adam"]
)


# --- free of scale ---


@every_training
@pytest.mark.parametrize("adam", [False, True], ids=["sgd", "adam"])
def test_the_trainings_are_what_they_are_called(name, adam):
    verdicts = reference(name, adam=adam)[1]

    assert EXPECTED.get(name, set()) <= set(verdicts)
    assert bool(serious(verdicts)) == (name != "is-healthy")


@every_training
@pytest.mark.parametrize(
    ("way", "adam"),
    [
        *((way, False) for way in SAME),
        *(pytest.param(way, True, marks=[] if "scale" in SAME[way] else pytest.mark.slow) for way in SAME),
    ],
)
def test_what_changes_nothing_in_training_changes_no_verdict(name, adam, way):
    assert train(TRAININGS[name], Way(adam=adam, **SAME[way]))[1] == reference(name, adam=adam)[1]


@every_training
@either_optimizer
def test_bfloat16_changes_no_verdict_and_its_step_by_a_few(name, adam):
    verdicts, before = train(TRAININGS[name], Way(adam=adam, dtype=torch.bfloat16))[1], reference(name, adam=adam)[1]

    assert set(verdicts) == set(before)
    assert all(abs(verdicts[key] - before[key]) <= 5 for key in before)


@every_training
@pytest.mark.parametrize("explicit", [False, True], ids=["after", "before"])
def test_clipping_changes_no_verdict_that_compares_layers_or_lags(name, explicit):
    def relative(verdicts):
        return {key: step for key, step in verdicts.items() if key[0][:3] in ("GW1", "GW3", "GW4", "GW6")}

    assert relative(train(TRAININGS[name], Way(clip=0.01, explicit=explicit))[1]) == relative(reference(name)[1])


def test_no_norm_is_a_limit_unless_somebody_sets_one():
    healthy, limits = TRAININGS["is-healthy"], gradwatch.Thresholds(norm_below=1e-5, norm_above=1e5)

    assert train(healthy, thresholds=limits)[1] == {}
    assert train(healthy, Way(scaler=2.0**20, explicit=True), thresholds=limits)[1] == {}
    assert {code for code, _, _ in train(healthy, Way(scale=1e-9), thresholds=limits)[1]} == {"GW103"}
    assert {code for code, _, _ in train(healthy, Way(scale=1e9), thresholds=limits)[1]} == {"GW204"}


# --- where scaling truly changes training ---


def test_gradients_below_the_epsilon_of_adam_are_underflow():
    assert "underflow" in kinds(train(TRAININGS["is-healthy"], Way(scale=1e-12, adam=True, fit=False))[0])
    assert kinds(train(TRAININGS["is-healthy"], Way(scale=1e-12, adam=True))[0]) == set()


def test_a_tiny_loss_in_pure_float16_is_underflow():
    slower = dataclasses.replace(
        TRAININGS["is-healthy"], lr=0.01
    )  # in float16 no larger rate than 65504 can go with the loss

    assert "underflow" in kinds(train(slower, Way(scale=4e-7, half=True))[0])
    assert kinds(train(slower, Way(half=True))[0]) == set()


def test_a_learning_rate_that_does_not_go_with_the_loss_explodes():
    assert "exploding" in kinds(train(TRAININGS["is-healthy"], Way(scale=1e4, fit=False))[0])


# --- relative ---


def test_a_layer_whose_weights_are_only_of_another_size_does_not_vanish():
    def scaled():
        net = he(mlp(3, width=16))
        with torch.no_grad():
            net[0].weight.mul_(1e4)  # its gradient is 1e-4 times as large, and that of the next one 1e4 times
            net[2].weight.div_(1e4)
        return net

    assert {code for code, _, _ in train(Training(scaled, lr=1e-12))[1]} <= {"GW903"}  # at that rate nothing moves


# --- patient ---


def test_a_layer_is_judged_by_a_whole_window():
    assert reference("fades-with-depth")[1]["GW101", "0", Severity.WARNING] == gradwatch.Thresholds().window - 1


@pytest.mark.parametrize(("first", "last", "found"), [(4, 9, False), (4, 17, True)])
def test_a_fault_alerts_when_it_lasts_and_clears_when_it_has_gone_for_as_long(first, last, found):
    torch.manual_seed(0)
    net = Cut()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02)
    opened, cleared = [], []
    with gradwatch.watch(
        net,
        optimizer,
        sinks=[lambda r: opened.extend(r.began) or cleared.extend(r.cleared)],
        on_alert=lambda _: None,
        probe_every_n_steps=4,
    ) as w:
        for step in range(60):
            x = torch.randn(ROWS, 8)
            net.cut = first <= step <= last
            optimizer.zero_grad()
            loss = net(x).pow(2).mean()
            loss.backward()
            w.record(loss)
            optimizer.step()

    assert [(a.finding.code, a.began) for a in opened] == [("GW401", first + 9)] * found
    assert [(a.finding.code, a.cleared) for a in cleared] == [("GW401", last + 20)] * found


# --- aware of the loss, where it is known ---


@every_training
@either_optimizer
def test_without_the_loss_nothing_serious_is_found_that_is_not_found_with_it(name, adam):
    assert serious(train(TRAININGS[name], Way(adam=adam, told=False))[1]) <= serious(reference(name, adam=adam)[1])


def test_growth_that_only_the_loss_could_excuse_is_information_without_it():
    explodes = TRAININGS["explodes"]

    assert ("GW201", "", Severity.WARNING) in train(explodes)[1]
    assert set(train(explodes, Way(told=False))[1]) == {("GW201", "", Severity.INFO)}


@pytest.mark.parametrize(
    ("told", "severity"), [(True, Severity.INFO), (False, Severity.WARNING)], ids=["known", "unknown"]
)
def test_a_loss_that_falls_takes_a_warning_back(told, severity):
    faint = Training(functools.partial(Cut, cut=False, share=1e-4), lr=0.05)

    assert set(train(faint, Way(told=told))[1]) == {("GW101", "encoder.0", severity)}


class Line(nn.Sequential):
    """Three matrices whose product is to become a multiple of the identity, at the same rate in every direction."""

    def __init__(self):
        super().__init__(*(nn.Linear(8, 8, bias=False) for _ in range(3)))
        for m in self:
            nn.init.eye_(m.weight)


@pytest.mark.parametrize("told", [False, True], ids=["unknown", "known"])
def test_a_model_that_converges_uniformly_is_healthy(told):
    net, found, x = Line(), [], torch.eye(8)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.5)
    with gradwatch.watch(net, optimizer, on_alert=found.append) as watcher:
        for _ in range(60):
            optimizer.zero_grad()
            loss = (net(x) - 1.5 * x).pow(2).mean()
            if told:
                watcher.record(loss)
            loss.backward()
            optimizer.step()

    assert loss < 1e-11
    assert found == []


# --- a horizon, against a need ---


@pytest.mark.parametrize(("need", "severities"), [(None, {Severity.INFO}), (28, {Severity.WARNING}), (2, set())])
def test_a_short_memory_is_a_fault_only_against_a_declared_need(need, severities):
    training = dataclasses.replace(TRAININGS["forgets"], options={"horizon": need, "probe_every_n_steps": 7})

    assert {severity for _, _, severity in train(training)[1]} == severities


# --- in words ---


@every_training
def test_every_alert_says_what_where_since_when_why_and_what_to_do(name):
    for alert in reference(name)[0]:
        finding = alert.finding

        assert re.fullmatch(r"GW\d{3}", finding.code)
        assert finding.evidence
        assert finding.onset <= alert.began
        assert finding.place in f"{alert.message} {alert.remedy}"
        assert alert.message
        assert alert.cause
        assert alert.remedy


@every_training
def test_every_alert_can_be_muted_by_its_code_and_place(name):
    rules = [f"{code}:{place}" if place else code for code, place, _ in reference(name)[1]]

    assert train(TRAININGS[name], ignore=rules)[1] == {}
