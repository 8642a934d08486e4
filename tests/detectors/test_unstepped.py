"""Parameters that are stepped in vain, and parameters that nobody steps: found, and no phase or spare part accused."""

from __future__ import annotations

import gc
import logging

import pytest
import torch
from loops import Watched
from torch import nn
from torch.optim import optimizer as optimizers_of_torch

import gradwatch
from gradwatch import Severity
from gradwatch.values.snapshot import Silence
from gradwatch.values.thresholds import STEPLESS


def quiet(_alert):
    """Take an alert, and say nothing."""


def tower(inputs=4, outputs=3):
    return nn.Sequential(nn.Linear(inputs, 8), nn.Tanh(), nn.Linear(8, outputs))


def sgd(module):
    return torch.optim.SGD(module.parameters(), lr=0.05)


def alerts(watched):
    """Every alert by code and place, in its last state."""
    found = {}
    for report in watched.reports:
        for alert in (*report.open, *report.cleared):
            found[alert.finding.code, alert.finding.place] = alert
    return found


def go(watched, model, optimizers, loss_of, steps, *, explicit=False):
    for _ in range(steps):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss = loss_of(model, torch.randn(6, 4))
        watched.watcher.record(loss)
        loss.backward()
        if explicit:
            watched.watcher.step()
        for optimizer in optimizers:
            optimizer.step()


def cut(model, x):
    loss = model(x).detach().square().mean()
    loss.requires_grad = True
    return loss


def whole(model, x):
    return model(x).square().mean()


# --- an optimizer whose parameters never have a gradient ---


@pytest.mark.parametrize("explicit", [False, True])
def test_a_graph_that_is_cut_before_the_loss_is_an_error_within_ten_steps_and_in_the_record(tmp_path, explicit):
    torch.manual_seed(0)
    model = tower()
    optimizer = sgd(model)
    watched = Watched(model, optimizer, logdir=tmp_path, on_alert=quiet)
    go(watched, model, [optimizer], cut, 10, explicit=explicit)

    (alert,) = watched.reports[-1].began
    assert (alert.finding.code, alert.severity, alert.finding.place) == ("GW901", Severity.ERROR, "")
    assert (alert.began, alert.finding.onset) == (9, 0)
    assert "the output of 2 and the loss" in alert.cause
    assert "requires_grad" in alert.remedy
    go(watched, model, [optimizer], cut, 240, explicit=explicit)
    watched.watcher.close()

    assert list(alerts(watched)) == [("GW901", "")]  # and neither that the gradients show nothing, nor GW401
    run = gradwatch.read_run(tmp_path)
    assert [a.finding.code for a in run.alerts] == ["GW901"]
    assert {(s.norm, s.silence.moved) for s in run.snapshots} == {((None,) * 4, False)}
    assert [s.silence for s in run.snapshots][:2] == [Silence(0, 10, moved=False), Silence(0, 20, moved=False)]


def test_the_fixed_twin_is_silent():
    torch.manual_seed(0)
    model = tower()
    optimizer = sgd(model)
    watched = Watched(model, optimizer, on_alert=quiet)
    go(watched, model, [optimizer], whole, 60)

    assert alerts(watched) == {}
    assert all(s.silence is None for s in watched.snapshots)


@pytest.mark.parametrize("faulty", [True, False])
def test_a_generator_that_is_fed_a_detached_fake_is_told_and_the_critic_is_not(faulty):
    torch.manual_seed(0)
    model = nn.ModuleDict({"generator": tower(4, 4), "critic": tower(4, 1)})
    g, c = sgd(model["generator"]), sgd(model["critic"])
    watched = Watched(model, [g, c], on_alert=quiet)
    for _ in range(40):
        fake = model["generator"](torch.randn(6, 4))
        c.zero_grad()
        (model["critic"](fake.detach()).mean() - model["critic"](torch.randn(6, 4)).mean()).backward()
        c.step()
        g.zero_grad()
        (-model["critic"](fake.detach() if faulty else fake).mean()).backward()
        g.step()

    found = {key: alert for key, alert in alerts(watched).items() if alert.severity > Severity.INFO}
    assert list(found) == [("GW901", "generator")] * faulty
    if faulty:
        alert = found["GW901", "generator"]
        assert (alert.severity, alert.began, alert.finding.optimizer) == (Severity.ERROR, 9, 0)
        assert "comes back to critic" in alert.cause
        assert "detach()" in alert.remedy


def test_where_it_comes_to_life_the_alert_clears():
    torch.manual_seed(0)
    model = tower()
    optimizer = sgd(model)
    watched = Watched(model, optimizer, on_alert=quiet)
    go(watched, model, [optimizer], cut, 12)
    go(watched, model, [optimizer], whole, 25)

    assert alerts(watched)["GW901", ""].cleared is not None
    assert [s.silence for s in watched.snapshots[1:]] == [None] * 25


def test_gradients_that_are_kept_elsewhere_while_the_weights_move_are_a_warning_that_says_so():
    torch.manual_seed(0)
    model = tower()
    optimizer = sgd(model)
    watched = Watched(model, on_alert=quiet)
    for _ in range(20):  # as after zero_grad(), or under DeepSpeed's ZeRO
        whole(model, torch.randn(6, 4)).backward()
        optimizer.step()
        optimizer.zero_grad()
        watched.watcher.step()

    alert = alerts(watched)["GW901", ""]
    assert (alert.severity, alert.began) == (Severity.WARNING, 9)
    assert "the weights move all the same" in alert.cause
    assert all(s.silence.moved for s in watched.snapshots)


def frozen_phase(model, _x):
    model["b"].requires_grad_(False)
    return model["a"](torch.randn(6, 4)).square().mean() + model["b"](torch.randn(6, 4)).sum()


def idle(model, x):
    return model["a"](x).square().mean()


@pytest.mark.parametrize("phase", [frozen_phase, idle], ids=["frozen", "idle"])
def test_what_is_frozen_and_what_stands_idle_is_not_accused(phase):
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": tower(), "b": tower()})
    optimizers = [sgd(model["a"]), sgd(model["b"])]
    watched = Watched(model, optimizers, on_alert=quiet)
    go(watched, model, optimizers, phase, 60)
    go(watched, model, optimizers, lambda m, x: m["a"](x).square().mean() + m["b"](x).square().mean(), 10)

    assert {alert.severity for alert in alerts(watched).values()} <= {Severity.INFO}


def test_phases_in_which_only_one_of_two_trains_are_not_accused():
    torch.manual_seed(0)
    model = nn.ModuleDict({"g": tower(4, 4), "d": tower(4, 1)})
    optimizers = [sgd(model["g"]), sgd(model["d"])]
    watched = Watched(model, optimizers, on_alert=quiet)
    for phase in range(4):
        go(watched, model, optimizers, lambda m, x: m["d"](m["g"](x)).mean(), 5)
        if phase:
            go(watched, model, optimizers, lambda m, x: m["d"](m["g"](x).detach()).mean(), 25)

    assert {alert.severity for alert in alerts(watched).values()} <= {Severity.INFO}


def test_steps_before_the_first_backward_are_not_accused():
    torch.manual_seed(0)
    model = tower()
    optimizer = sgd(model)
    watched = Watched(model, optimizer, on_alert=quiet)
    for _ in range(30):  # as when somebody draws the learning rates of a schedule
        optimizer.step()
    go(watched, model, [optimizer], whole, 30)

    assert {alert.severity for alert in alerts(watched).values()} <= {Severity.INFO}


def test_a_loss_of_a_phase_without_gradients_is_no_loss_of_this_optimizer():
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": tower(), "b": tower()})
    optimizers = [sgd(model["a"]), sgd(model["b"])]
    watched = Watched(model, optimizers, on_alert=quiet)
    go(watched, model, optimizers, lambda m, x: m["a"](x).square().mean() + m["b"](x).square().mean(), 30)
    go(watched, model, optimizers[1:], lambda m, x: 1e4 * m["b"](x).detach().square().mean() + m["a"](x).mean(), 40)

    assert watched.watcher._judge.history.snapshot.silence is not None
    assert max(watched.watcher._judge.history.losses(50)) < 100


# --- parameters in no optimizer ---


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head, self.gain = tower(4, 8), nn.Linear(8, 3), nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.head(self.body(x).tanh()) * self.gain


def test_a_head_that_no_optimizer_steps_is_said_at_watch_and_a_warning_once_it_has_stood(caplog):
    torch.manual_seed(0)
    model = Tagger()
    optimizer = torch.optim.SGD([*model.body.parameters(), model.gain], lr=0.05)
    with caplog.at_level(logging.INFO, logger="gradwatch"):
        watched = Watched(model, optimizer, on_alert=quiet)
    assert "2 of 7 parameters are in no optimizer that is watched: head" in caplog.text
    assert "in no optimizer" in next(line for line in str(watched.watcher).splitlines() if line.startswith("head"))
    go(watched, model, [optimizer], whole, 30)

    alert = alerts(watched)["GW902", "head"]
    assert (alert.severity, alert.began, alert.finding.onset) == (Severity.WARNING, 10, 0)
    assert "head" in alert.message
    assert list(alerts(watched)) == [("GW902", "head")]


def test_the_remedy_for_a_head_in_no_optimizer_moves_it_and_is_silent():
    torch.manual_seed(0)
    model = Tagger()
    before = model.head.weight.detach().clone()
    optimizer = sgd(model)
    watched = Watched(model, optimizer, on_alert=quiet)
    go(watched, model, [optimizer], whole, 30)

    assert alerts(watched) == {}
    assert not torch.equal(model.head.weight, before)


def outside_steps(model):
    """Another optimizer, which is not watched, steps the rest."""
    return sgd(model.head), whole


def follows(model):
    """It gets no gradient, as the copy of a network that a target is computed with."""

    def loss_of(model, x):
        with torch.no_grad():
            target = model.head(model.body(x))
        return (model.body(x)[:, :3] - target).square().mean() + model.gain.square().sum()

    return None, loss_of


def stands_before(model):
    """What was trained elsewhere, with new layers after it."""
    return None, whole


@pytest.mark.parametrize(
    ("meant", "stepped"),
    [
        (outside_steps, ("body",)),
        (follows, ("body",)),
        (stands_before, ("head",)),
        (stands_before, ("body.2", "head")),
        (stands_before, ("body.0",)),  # as prompts and norms are tuned
    ],
    ids=lambda v: getattr(v, "__name__", str(v)),
)
def test_what_may_be_meant_is_information(meant, stepped):
    torch.manual_seed(0)
    model = Tagger()
    mine = [p for name in stepped for p in model.get_submodule(name).parameters()]
    optimizer = torch.optim.SGD([*mine, model.gain], lr=0.05)
    other, loss_of = meant(model)
    watched = Watched(model, optimizer, on_alert=quiet)
    go(watched, model, [optimizer, *([other] if other else [])], loss_of, 60)

    assert {key[0]: alert.severity for key, alert in alerts(watched).items()} == {"GW902": Severity.INFO}


def test_a_parameter_of_the_models_own_that_was_left_out_is_a_warning():
    torch.manual_seed(0)
    model = Tagger()
    optimizer = torch.optim.SGD([*model.body.parameters(), *model.head.parameters()], lr=0.05)
    watched = Watched(model, optimizer, on_alert=quiet)
    go(watched, model, [optimizer], whole, 20)

    alert = alerts(watched)["GW902", ""]
    assert alert.severity == Severity.WARNING
    assert alert.message.startswith("1 of 7 parameters is to be trained and in no optimizer that is watched: gain")


def with_a_frozen_body():
    torch.manual_seed(0)
    model = Tagger()
    model.body.requires_grad_(False)
    optimizer = torch.optim.SGD([*model.head.parameters(), model.gain], lr=0.05)
    return model, optimizer, Watched(model, optimizer, on_alert=quiet)


def test_what_is_frozen_is_meant_to_be_in_no_optimizer():
    model, optimizer, watched = with_a_frozen_body()
    go(watched, model, [optimizer], whole, 30)

    assert alerts(watched) == {}
    assert "in no optimizer" not in str(watched.watcher)


@pytest.mark.parametrize("stepped", [False, True])
def test_what_is_thawed_and_given_to_no_optimizer_is_forgotten(stepped):
    model, optimizer, watched = with_a_frozen_body()
    go(watched, model, [optimizer], whole, 25)
    assert alerts(watched) == {}
    model.body.requires_grad_(True)
    if stepped:
        optimizer.add_param_group({"params": list(model.body.parameters())})
    go(watched, model, [optimizer], whole, 65)

    said = alerts(watched)
    assert set(said) == (set() if stepped else {("GW902", "body.0")})
    assert all(alert.severity == Severity.WARNING for alert in said.values())


# --- no step at all ---


@pytest.mark.parametrize("watches", [False, True], ids=["none watched", "another watched"])
def test_an_optimizer_that_is_not_watched_and_steps_the_model_is_told_after_ten_steps(tmp_path, watches):
    torch.manual_seed(0)
    model = tower()
    mine, other = sgd(model), torch.optim.AdamW(model.parameters())
    elsewhere = tower()
    watched = Watched(model, mine if watches else None, logdir=tmp_path, on_alert=quiet)
    for step in range(12):
        for net, optimizer in ((elsewhere, sgd(elsewhere)), (model, other)):
            optimizer.zero_grad()
            whole(net, torch.randn(6, 4)).backward()
            optimizer.step()
        assert len(watched.reports) == (step >= 9)
    watched.watcher.close()

    (alert,) = gradwatch.read_run(tmp_path).alerts
    assert (alert.finding.code, alert.finding.kind, alert.severity) == ("GW900", "unstepped", Severity.WARNING)
    assert "AdamW" in alert.message
    assert "AdamW" in alert.remedy
    assert ("SGD" in alert.message) is watches
    assert not optimizers_of_torch._global_optimizer_post_hooks


def test_a_watcher_that_nobody_keeps_and_nobody_calls_says_so_and_goes():
    torch.manual_seed(0)
    model = tower()
    optimizer, heard = sgd(model), []
    gradwatch.watch(model, on_alert=heard.append)
    for _ in range(12):
        whole(model, torch.randn(6, 4)).backward()
        optimizer.step()

    assert [alert.finding.code for alert in heard] == ["GW900"]
    gc.collect()
    assert not optimizers_of_torch._global_optimizer_post_hooks


def test_the_hook_on_all_optimizers_goes_with_the_first_step_that_is_heard():
    hooks = optimizers_of_torch._global_optimizer_post_hooks
    model = tower()
    optimizer = sgd(model)
    watched = Watched(model, optimizer, on_alert=quiet)
    assert len(hooks) == 1
    go(watched, model, [optimizer], whole, 1)
    assert not hooks
    watched = Watched(model, on_alert=quiet)
    go(watched, model, [optimizer], whole, 2, explicit=True)
    assert not hooks


@pytest.mark.parametrize("loop", ["losses", "readings", "readings alone"])
def test_a_training_without_any_step_is_an_error(loop):
    torch.manual_seed(0)
    model = tower()
    watched = Watched(model, None if loop == "readings alone" else sgd(model), on_alert=quiet)
    for _ in range(STEPLESS + 1):
        loss = whole(model, torch.randn(6, 4))
        loss.backward()
        if loop == "losses":
            watched.watcher.record(loss)
        else:
            watched.watcher.step()

    alert = alerts(watched)["GW900", ""]
    assert (alert.severity, alert.finding.evidence["moved"]) == (Severity.ERROR, 0.0)
    assert "optimizer.step() is never called" in alert.cause


@pytest.mark.parametrize("close", [False, True])
def test_steps_that_are_made_in_another_way_are_a_warning_and_the_readings_are_the_steps(close):
    torch.manual_seed(0)
    model = tower()
    optimizer = sgd(model)
    watched = Watched(model, optimizer, on_alert=quiet)
    for _ in range(20 if close else STEPLESS + 50):  # as SAM's first_step() and second_step() do
        model.zero_grad()
        whole(model, torch.randn(6, 4)).backward()
        watched.watcher.step()
        with torch.no_grad():
            for p in model.parameters():
                p.sub_(p.grad, alpha=0.01)
    watched.watcher.close()

    assert {key[0] for key in alerts(watched)} == {"GW900"}  # and not that a GradScaler skips
    alert = alerts(watched)["GW900", ""]
    assert (alert.severity, alert.finding.evidence["moved"]) == (Severity.WARNING, 1.0)
    assert "something else than its step()" in alert.cause
    steps = [s.step for s in watched.snapshots if s.silence is None]
    assert steps == ([] if close else list(range(50)))


@pytest.mark.parametrize("accumulate", [1, 128])
def test_micro_batches_of_the_explicit_form_without_an_optimizer_are_not_accused(accumulate):
    torch.manual_seed(0)
    model = tower()
    optimizer = sgd(model)
    watched = Watched(model, on_alert=quiet)
    for batch in range(STEPLESS + 50):
        whole(model, torch.randn(6, 4)).backward()
        watched.watcher.step()
        if (batch + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
    watched.watcher.close()

    assert alerts(watched) == {}


@pytest.mark.parametrize("thawed", [True, False])
def test_a_network_that_was_frozen_for_a_turn_and_never_thawed_is_told(thawed):
    torch.manual_seed(0)
    model = nn.ModuleDict({"generator": tower(4, 4), "critic": tower(4, 1)})
    g, c = sgd(model["generator"]), sgd(model["critic"])
    watched = Watched(model, [g, c], on_alert=quiet)
    for step in range(40):
        model["critic"].requires_grad_(thawed or step < 5)
        fake = model["generator"](torch.randn(6, 4))
        c.zero_grad()
        loss = model["critic"](fake.detach().requires_grad_()).mean() - model["critic"](torch.randn(6, 4)).mean()
        loss.backward()  # reaches no weight of a frozen critic, and says nothing
        c.step()
        model["critic"].requires_grad_(False)
        g.zero_grad()
        (-model["critic"](fake).mean()).backward()
        g.step()

    found = {key: alert for key, alert in alerts(watched).items() if alert.severity > Severity.INFO}
    assert list(found) == [("GW901", "critic")] * (not thawed)
    if not thawed:
        alert = found["GW901", "critic"]
        assert (alert.severity, alert.finding.onset, alert.finding.optimizer) == (Severity.WARNING, 5, 1)
        assert alert.cause == "they had one before, and requires_grad is False for all of them since"
        assert alert.remedy.startswith("call requires_grad_(True) on them")


# --- groups that are empty, layers that are left in the middle, optimizers that rest ---


def fed(model, optimizers, steps=60, *, standstill=False):
    """Train against targets of the input, or of nothing, and return the alerts at warning or above."""
    generator = torch.Generator().manual_seed(0)
    with gradwatch.watch(model, optimizers, on_alert=quiet) as watcher:
        for _ in range(steps):
            x = torch.randn(32, 4, generator=generator)
            y = torch.randn(32, 3, generator=generator) if standstill else x[:, :3]
            loss = (model(x) - y).square().mean()
            watcher.record(loss)
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
    return [a for a in watcher.report.open if a.severity > Severity.INFO]


def test_a_bias_that_no_group_has_is_told_and_all_biases_or_all_weights_are_not():
    """Tuning biases alone is a method, and so is leaving all of them out."""

    def told(*names):
        torch.manual_seed(0)
        model = tower()
        mine = [p for name, p in model.named_parameters() if name.endswith(names)]
        return [(a.finding.code, a.finding.place) for a in fed(model, [torch.optim.Adam(mine, 0.01)])]

    assert told(".weight", "2.bias") == [("GW902", "0")]
    assert told(".weight") == []
    assert told(".bias") == []


def test_an_empty_group_of_what_is_not_decayed_says_nothing_of_a_body_that_is_left_out():
    torch.manual_seed(0)
    model = tower()
    groups = [{"params": [*model[2].parameters()], "weight_decay": 0.1}, {"params": [], "weight_decay": 0.0}]
    assert fed(model, [torch.optim.AdamW(groups, lr=0.01)]) == []


def test_low_rank_weights_beside_one_that_may_be_trained_are_no_layer_in_the_middle():
    class Added(nn.Module):
        def __init__(self):
            super().__init__()
            self.base, self.down, self.up = nn.Linear(8, 8), nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False)

        def forward(self, x):
            return self.base(x) + self.up(self.down(x))

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), Added(), nn.Tanh(), Added(), nn.Linear(8, 3))
    mine = [p for name, p in model.named_parameters() if "down" in name or "up" in name]
    assert [a for a in fed(model, [torch.optim.Adam(mine, 1e-3)], standstill=True) if a.finding.code == "GW902"] == []


@pytest.mark.parametrize("used_up", [True, False])
def test_a_filter_that_was_used_up_leaves_a_group_empty(used_up):
    torch.manual_seed(0)
    model = tower()
    body = filter(lambda p: p.shape[0] == 8, model.parameters())
    chosen = body if used_up else list(body)
    assert sum(p.numel() for p in chosen) == 40  # the user has counted them
    optimizer = torch.optim.AdamW([{"params": chosen}, {"params": model[2].parameters(), "lr": 0.01}], lr=0.01)
    alerts = fed(model, [optimizer])
    assert [(a.finding.code, a.finding.place) for a in alerts] == ([("GW902", "0")] if used_up else [])
    if used_up:
        assert "a group of the optimizer's parameters is empty" in alerts[0].cause
        assert model[0].weight.grad is not None


def test_a_layer_in_the_middle_that_no_optimizer_has_is_told_while_the_loss_stands():
    class Middle(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.rnn, self.last = nn.Linear(4, 6), nn.LSTM(6, 12), nn.Linear(12, 3)

        def forward(self, x):
            return self.last(self.rnn(self.first(x))[0])

    def told(standstill):
        model = Middle()
        named = [p for name, p in model.named_parameters() if name.endswith((".weight", ".bias"))]
        return [
            (a.finding.code, a.finding.place)
            for a in fed(model, [torch.optim.Adam(named, 0.02)], standstill=standstill)
        ]

    assert ("GW902", "rnn") in told(standstill=True)
    assert ("GW902", "rnn") not in told(standstill=False)  # that the rest learns around it may be meant


def adversaries(wrong, steps=170, *, detached=True, ahead=0, close=True, heard=None):
    """Train two towers against each other; `wrong`: in the judge's turn the painter's optimizer steps."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"painter": tower(4, 3), "judge": tower(3, 1)})
    painter, judge = (torch.optim.Adam(model[name].parameters(), 1e-3) for name in ("painter", "judge"))
    with gradwatch.watch(model, [painter, judge], on_alert=quiet) as watcher:
        for step in range(steps):
            if not close and step == steps - 1:
                heard += [(a.finding.code, a.finding.place, a.severity) for a in watcher.report.open]
                return [a for a in watcher.report.open if a.severity > Severity.INFO]
            made = model["painter"](torch.randn(8, 4))
            judge.zero_grad()
            loss = (model["judge"](made.detach() if detached else made) + 1).square().mean()
            loss = loss + (model["judge"](torch.randn(8, 3)) - 1).square().mean()
            loss.backward()
            watcher.record(loss)
            (painter if wrong else judge).step()
            if step < ahead:
                continue
            painter.zero_grad()
            loss = (model["judge"](model["painter"](torch.randn(8, 4))) - 1).square().mean()
            loss.backward()
            watcher.record(loss)
            painter.step()
    return [a for a in watcher.report.open if a.severity > Severity.INFO]


def test_an_optimizer_that_rests_is_information_while_the_training_goes_on():
    codes = []
    assert adversaries(wrong=True, close=False, heard=codes) == []
    assert codes == [("GW900", "judge", Severity.INFO)]


def test_an_optimizer_in_whose_turn_another_steps_is_told_at_the_end():
    (alert,) = adversaries(wrong=True)
    assert (alert.finding.code, alert.finding.place, alert.severity) == ("GW900", "judge", Severity.WARNING)
    assert alert.message.startswith("Adam has stepped 213 times, and the Adam of judge not once")
    assert "another optimizer's may be called in its place" in alert.cause


@pytest.mark.parametrize("options", [{}, {"detached": False}, {"ahead": 160}, {"ahead": 100, "detached": False}])
def test_adversaries_that_take_turns_and_one_that_trains_ahead_are_not(options):
    assert adversaries(wrong=False, **options) == []


def test_an_optimizer_that_a_scaler_never_calls_is_told_with_what_the_scaler_sees():
    torch.manual_seed(0)
    model = tower()
    optimizer = torch.optim.AdamW(model.parameters())
    scaler = torch.amp.GradScaler("cpu")
    with gradwatch.watch(model, optimizer, on_alert=quiet) as watcher:
        for _ in range(20):
            loss = (model(torch.randn(8, 4)).half() * 1e5).float().square().mean()
            watcher.record(loss)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
    (alert,) = watcher.report.open
    assert (alert.finding.code, alert.severity) == ("GW900", Severity.ERROR)
    assert "its gradients are NaN or infinite" in alert.message
    assert alert.cause.startswith("a GradScaler skips such steps")


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(10, 8), nn.Linear(8, 8), nn.Linear(8, 12)

    def resize(self, count):
        old, self.embed = self.embed, nn.Embedding(count, 8)
        with torch.no_grad():
            self.embed.weight[:10] = old.weight


def train_words(model, optimizer, *, beside=None, steps=40):
    watched = Watched(model, optimizer)
    for _ in range(steps):
        optimizer.zero_grad()
        words = torch.randint(10, (16,))
        loss = nn.functional.cross_entropy(model.head(torch.tanh(model.body(model.embed(words)))), words)
        if beside is not None:
            loss = loss * beside.mean().exp() - beside.mean()
        watched.watcher.record(loss.detach())
        loss.backward()
        optimizer.step()
    return alerts(watched)


@pytest.mark.parametrize("early", [True, False])
def test_what_was_replaced_before_it_was_watched_is_told_by_what_the_optimizer_has_in_its_place(early):
    torch.manual_seed(0)
    model = Words()
    if early:
        model.resize(12)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    if not early:
        model.resize(12)
    found = train_words(model, optimizer)

    assert [key for key, alert in found.items() if alert.severity > Severity.INFO] == (
        [] if early else [("GW902", "embed")]
    )
    if not early:
        assert "the optimizer has others in place of this" in found["GW902", "embed"].cause


@pytest.mark.parametrize(
    ("learns", "first", "shape", "kind"),
    [
        (True, True, (10, 8), torch.optim.SGD),
        (True, True, (10, 8), torch.optim.Adam),
        (False, False, (10, 8), torch.optim.Adam),  # elsewhere
        (False, True, (9, 7), torch.optim.Adam),  # of another shape than the words that are left out
    ],
)
def test_what_else_an_optimizer_steps_stands_in_the_place_of_nothing(learns, first, shape, kind):
    torch.manual_seed(0)
    model, other = Words(), nn.Parameter(torch.zeros(shape))
    own = [*model.body.parameters(), *model.head.parameters()]
    optimizer = kind([other, *own] if first else [*own, other], 1e-3)
    found = train_words(model, optimizer, beside=other if learns else None)

    assert {key: alert.severity for key, alert in found.items()} == {("GW902", "embed"): Severity.INFO}
