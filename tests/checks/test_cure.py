"""`gradwatch.cure`: what it says came of a remedy, held against the same thing done by hand."""

from __future__ import annotations

import copy
import math
import statistics
import subprocess
import sys
import textwrap
from dataclasses import replace
from typing import get_args

import pytest
import torch
from interpreters import warm
from torch import nn
from torch.nn.functional import mse_loss, relu
from torch.nn.utils import parametrizations
from torch.utils.data import DataLoader, TensorDataset

import gradwatch
from gradwatch import Alert, Finding, Severity
from gradwatch.checks.cures.changes import NotTried
from gradwatch.checks.cures.trial import OF_THE_MODEL, Ward
from gradwatch.cli import main
from gradwatch.detectors import RULES, remedies
from gradwatch.detectors.causes import Cause
from gradwatch.detectors.remedies import Action, Remedy
from gradwatch.values.sequences import SequenceStats
from gradwatch.watcher.options import Options

STEPS = 30
OTHER = nn.Linear(8, 1)
FLAT_ = torch.randn(4, 8)


class Last(nn.Module):
    """A recurrent module, and a readout of its newest output."""

    def __init__(self, rnn):
        super().__init__()
        self.rnn, self.head = rnn, nn.Linear(rnn.hidden_size, 1)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


def lstm(**options):
    torch.manual_seed(0)
    return Last(nn.LSTM(3, 8, batch_first=True, **options))


def sigmoids(layers=12, width=8):
    torch.manual_seed(0)
    return nn.Sequential(
        *(m for _ in range(layers) for m in (nn.Linear(width, width), nn.Sigmoid())), nn.Linear(width, 1)
    )


def bars(length=60):
    torch.manual_seed(1)
    return torch.randn(16, length, 3)


def rows(width=8):
    torch.manual_seed(1)
    x = torch.randn(32, width)
    return x, x.sin().sum(1, keepdim=True)


def fit(model, batch):
    return mse_loss(model(batch[0]), batch[1])


def of(cures, action, code=None):
    found = [c for c in cures.cures if c.remedy.action == action and code in (None, c.alert.finding.code)]
    assert len(found) == 1, [str(c) for c in cures.cures]
    return found[0]


# --- measured again ---


def test_the_horizon_of_an_lstm_is_said_before_and_after_and_the_best_remedy_is_applied_in_place():
    model, x = lstm(), bars()
    short = gradwatch.horizon(model, x).horizon
    cures = gradwatch.cure(model, x)
    best = cures.best
    assert best.remedy.action == "forget_and_input_bias"
    assert f"horizon {short} -> 60 of 60" in str(best)
    assert gradwatch.horizon(model, x).horizon == short  # it was a copy
    best.apply(model)
    assert gradwatch.horizon(model, x).horizon == 60
    enter, forget, *_ = (model.rnn.bias_ih_l0 + model.rnn.bias_hh_l0).chunk(4)
    assert torch.allclose(forget, torch.full_like(forget, math.log(60)))
    assert torch.allclose(enter, torch.full_like(enter, -math.log(60)))


def test_a_remedy_that_does_not_lengthen_the_horizon_is_said_not_to_have_helped():
    other = of(gradwatch.cure(lstm(), bars()), "input_bias")
    assert str(other).startswith("did not help: input-gate bias of rnn set to -4.1: horizon ")
    assert not other.helped


def test_a_declared_need_is_what_counts():
    x = bars()
    assert not gradwatch.cure(lstm(), x, horizon=3).alerts
    model = lstm()
    with torch.no_grad():
        model.rnn.bias_ih_l0[8:16] = 1.4
    assert 31 < gradwatch.horizon(model, x).horizon < 55
    assert not gradwatch.cure(model, x).alerts  # nobody has said that more matters
    cures = gradwatch.cure(model, x, horizon=58)
    assert "and the need is 58" in cures.alerts[0].message
    assert cures.best.remedy.value == pytest.approx(math.log(58))


def test_without_a_loss_the_alerts_are_those_of_check_and_nothing_is_trained():
    model, (x, _) = sigmoids(), rows()
    cures = gradwatch.cure(model, x)
    assert {a.finding.code for a in cures.alerts} == {a.finding.code for a in gradwatch.check(model, x).open}
    assert cures.steps is None
    assert all(c.before.loss is None for c in cures.cures)
    healed = copy.deepcopy(model)
    cures.best.apply(healed)
    assert not gradwatch.check(healed, x).open


def test_remedies_of_the_training_are_not_tried_without_a_loss():
    torch.manual_seed(0)
    model, (x, _) = nn.Sequential(*(m for _ in range(8) for m in (nn.Linear(8, 8), nn.ReLU())), nn.Linear(8, 1)), rows()
    for layer in model[::2]:
        nn.init.kaiming_normal_(layer.weight)
        layer.weight.data *= 4.0
    clip = of(gradwatch.cure(model, x), "clip")
    assert str(clip) == "not tried: gradient norm clipped at 1: without loss= nothing is trained"
    assert clip.lines == ("+ torch.nn.utils.clip_grad_norm_(model.parameters(), 1)  # before optimizer.step()",)


def test_a_healthy_model_has_nothing_to_cure():
    torch.manual_seed(0)
    model, (x, y) = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1)), rows()
    assert str(gradwatch.cure(model, x)) == (
        "nothing to cure: no alert of severity warning or higher, measured on one batch"
    )
    cures = gradwatch.cure(model, (x, y), loss=fit, steps=STEPS)
    assert str(cures) == f"nothing to cure: no alert of severity warning or higher in {STEPS} steps"
    assert (cures.best, cures.cures, cures.alerts) == (None, (), ())


# --- trained beside a twin, against the same by hand ---


def by_hand(model, optimizer, batches, before_step=lambda i: None):
    losses = []
    for i, batch in enumerate(batches):
        optimizer.zero_grad()
        loss = fit(model, batch)
        loss.backward()
        before_step(i)
        optimizer.step()
        losses.append(loss.item())
    return losses[0], statistics.median(losses[-5:])


def many(count=STEPS):
    torch.manual_seed(2)
    return [(x, x.sin().sum(1, keepdim=True)) for x in torch.randn(count, 32, 8)]


def test_the_twin_and_each_copy_are_trained_as_a_loop_by_hand_trains_them():
    batches, model = many(), sigmoids()
    cures = gradwatch.cure(
        model, batches[0], loss=fit, optimizer=lambda p: torch.optim.SGD(p, 0.1), data=batches, steps=STEPS
    )
    twin = copy.deepcopy(model)
    assert (cures.cures[0].before.first, cures.cures[0].before.loss) == by_hand(
        twin, torch.optim.SGD(twin.parameters(), 0.1), batches
    )
    skip = of(cures, "skip")
    treated = copy.deepcopy(model)
    skip.apply(treated)
    assert (skip.after.first, skip.after.loss) == by_hand(treated, torch.optim.SGD(treated.parameters(), 0.1), batches)


def fast():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))


def test_clipping_warming_up_and_lowering_the_rate_are_done_as_by_hand():
    batches, rate = many(), 4.0
    cures = gradwatch.cure(
        fast(), batches[0], loss=fit, optimizer=lambda p: torch.optim.SGD(p, rate), data=batches, steps=STEPS
    )
    assert cures.alerts, "a rate of 4 should be too large"

    def hand(change):
        model = fast()
        optimizer = torch.optim.SGD(model.parameters(), rate)
        return by_hand(model, optimizer, batches, lambda i: change(i, model, optimizer))

    def clip(_, model, __):
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)

    def warm_up(i, _, optimizer):
        optimizer.param_groups[0]["lr"] = rate * min(1.0, (i + 1) / (STEPS / 3))

    checked = 0
    for cure in cures.cures:
        if cure.remedy.action == "rate":
            expected = hand(lambda _, __, o, value=cure.remedy.value: o.param_groups[0].update(lr=rate * value))
        elif cure.remedy.action in ("clip", "warm_up"):
            expected = hand({"clip": clip, "warm_up": warm_up}[cure.remedy.action])
        else:
            continue
        checked += 1
        assert (cure.after.first, cure.after.loss) == pytest.approx(expected, nan_ok=True), cure
    assert checked >= 2


def exploding():
    torch.manual_seed(0)
    model = nn.Sequential(*(m for _ in range(8) for m in (nn.Linear(8, 8), nn.ReLU())), nn.Linear(8, 1))
    for layer in model[::2]:
        nn.init.kaiming_normal_(layer.weight)
        layer.weight.data *= 4.0
    return model


def test_what_is_warmed_up_and_clipped_is_what_is_judged():
    batches = many()

    def cures(model, rate, **options):
        return gradwatch.cure(
            model, batches[0], loss=fit, optimizer=lambda p: torch.optim.SGD(p, rate), data=batches, **options
        )

    warm = of(cures(fast(), 0.6, steps=STEPS), "warm_up", "GW203")
    assert not math.isnan(warm.after.loss)
    model = fast()
    optimizer = torch.optim.SGD(model.parameters(), 0.6)

    def warm_up(i):
        optimizer.param_groups[0]["lr"] = 0.6 * min(1.0, (i + 1) / (STEPS / 3))

    assert (warm.after.first, warm.after.loss) == by_hand(model, optimizer, batches, warm_up)
    # Gradients are judged as they were before they were clipped.
    found = cures(exploding(), 1e-3, steps=STEPS, thresholds=gradwatch.Thresholds(norm_above=100.0))
    assert "GW204" in {a.finding.code for a in of(found, "clip", "GW202").after.alerts}


def test_copies_begin_at_one_random_state_whatever_was_drawn_for_a_remedy():
    class Noisy(nn.Sequential):
        def forward(self, x):
            return super().forward(nn.functional.dropout(x, 0.5, training=True))

    batches = many()
    cures = gradwatch.cure(
        Noisy(*exploding()), batches[0], loss=fit, optimizer=lambda p: torch.optim.SGD(p, 1e-3), data=batches, steps=5
    )
    actions = [c.remedy.action for c in cures.cures]
    assert actions.index("initialize") < actions.index("clip")
    clip = next(c for c in cures.cures if c.remedy.action == "clip")
    assert clip.after.first == clip.before.first
    again = next(c for c in cures.cures if c.remedy == clip.remedy and c.alert is not clip.alert)
    assert again.after is clip.after  # and is not trained twice


def test_model_optimizer_and_random_states_are_left_as_they_were():
    batches, model = many(), nn.Sequential(*sigmoids(), nn.Dropout(0.5))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    by_hand(model, optimizer, batches[:3])
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict(), torch.get_rng_state()))
    gradients = [p.grad.clone() for p in model.parameters()]
    cures = gradwatch.cure(model, batches[0], loss=fit, optimizer=optimizer, data=batches, steps=STEPS)
    assert cures.cures
    after = (model.state_dict(), optimizer.state_dict(), torch.get_rng_state())
    assert torch.equal(before[2], after[2])
    assert all(torch.equal(a, b) for a, b in zip(before[0].values(), after[0].values(), strict=True))
    assert str(before[1]) == str(after[1])
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))


def test_an_optimizer_goes_on_with_what_it_remembers_and_takes_what_is_new():
    batches, model = many(), sigmoids()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    by_hand(model, optimizer, batches[:3])
    cures = gradwatch.cure(model, batches[0], loss=fit, optimizer=optimizer, data=batches, steps=STEPS)
    twin, its = copy.deepcopy((model, optimizer))
    assert cures.cures[0].before[1:3] == by_hand(twin, its, batches)
    healed, its = copy.deepcopy((model, optimizer))
    new = of(cures, "normalize")
    new.apply(healed)
    known = {id(p) for p in its.param_groups[0]["params"]}
    its.add_param_group({"params": [p for p in healed.parameters() if id(p) not in known], "lr": 1e-2})
    assert new.after[1:3] == by_hand(healed, its, batches)
    other, its = copy.deepcopy((model, optimizer))
    begun = of(cures, "relu")
    state = torch.get_rng_state()
    begun.apply(other)
    torch.set_rng_state(state)
    for name, parameter in other.named_parameters():
        if not torch.equal(parameter, model.get_parameter(name)):
            del its.state[parameter]  # of other weights
    assert begun.after[1:3] == by_hand(other, its, batches)


def test_dropout_draws_the_same_for_all_copies():
    class Noisy(nn.Sequential):
        def forward(self, x):
            return super().forward(nn.functional.dropout(x, 0.5, training=True))

    batches = many()
    cures = gradwatch.cure(
        Noisy(*fast()), batches[0], loss=fit, optimizer=lambda p: torch.optim.SGD(p, 4.0), data=batches, steps=STEPS
    )
    of_the_training = [c for c in cures.cures if c.remedy.action in ("rate", "warm_up", "clip")]
    assert of_the_training
    assert {c.after.first for c in of_the_training} == {of_the_training[0].before.first}


def test_the_best_is_that_with_the_lowest_loss_among_those_that_helped():
    batches = many()
    cures = gradwatch.cure(
        sigmoids(), batches[0], loss=fit, optimizer=lambda p: torch.optim.Adam(p, 1e-2), data=batches, steps=60
    )
    helped = [c for c in cures.cures if c.helped]
    assert cures.best.after.loss == min(c.after.loss for c in helped)
    assert cures.best.after.loss < 0.8 * cures.best.before.loss
    assert str(cures).endswith(f"best: {cures.best.remedy} ({cures.best.alert.finding.code})")


def test_an_alert_that_is_gone_at_the_cost_of_the_loss_has_not_helped():
    x = bars()
    y = x[:, -3:, 0].sum(1, keepdim=True)
    cures = gradwatch.cure(
        lstm(), (x, y), loss=fit, optimizer=lambda p: torch.optim.Adam(p, 1e-2), horizon=60, steps=40
    )
    slow = of(cures, "forget_and_input_bias")
    assert slow.eased
    assert not slow.helped
    assert str(slow).startswith("helped, but not the loss: ")
    assert cures.best is None
    assert str(cures).endswith("best: none of these helped")


@pytest.mark.parametrize(
    ("code", "horizons", "first", "was", "now", "eased", "helped"),
    [
        ("GW101", (0, 0), 10.0, 5.0, 5.0, True, True),  # gone, and the loss is no worse
        ("GW101", (0, 0), 10.0, 5.0, 5.2, True, True),  # by 5 % of what it fell: no worse
        ("GW101", (0, 0), 10.0, 5.0, 5.4, True, False),
        ("GW101", (0, 0), None, None, None, True, True),  # nothing was trained
        ("GW102", (0, 0), 10.0, 5.0, 5.0, False, False),  # stays
        ("GW102", (0, 0), 10.0, 5.0, 4.9, False, False),
        ("GW102", (0, 0), 10.0, 5.0, 4.0, False, True),  # stays, and the loss is lower
        ("GW102", (0, 0), 10.0, math.nan, 4.0, False, True),
        ("GW102", (0, 0), 10.0, math.nan, 40.0, False, False),
        ("GW102", (0, 0), 10.0, math.nan, math.nan, False, False),
        ("GW101", (0, 0), 10.0, math.nan, math.inf, True, False),
        ("GW101", (0, 0), 10.0, 5.0, math.nan, True, False),
        ("GW301", (10, 19), 10.0, 5.0, 4.0, False, False),  # the loss is lower, for another reason
        ("GW301", (10, 20), 10.0, 5.0, 5.0, True, True),
        ("GW301", (10, 20), 10.0, 5.0, 9.0, True, False),
        ("GW301", (10, 100), 10.0, 5.0, 5.0, True, True),
    ],
)
def test_what_helped_means(code, horizons, first, was, now, eased, helped):
    def alert(code):
        return Alert(Finding(code, "", Severity.WARNING, "", evidence={"length": 100.0}), 0, 0)

    def reaching(steps):
        return SequenceStats("", "model", 100, 8, lag_gain=(1.0,) * steps + (0.0,) * (100 - steps)) if steps else None

    before = gradwatch.Outcome((alert("GW101"), alert("GW102")), first, was, reaching(horizons[0]))
    after = gradwatch.Outcome((alert("GW102"),), first, now, reaching(horizons[1]))
    cure = gradwatch.Cure(alert(code), Remedy("skip"), (), before, after)
    assert (cure.eased, cure.helped) == (eased, helped)


def test_what_nobody_has_declared_is_information_and_told_where_something_can_be_done():
    (alert,) = gradwatch.cure(lstm(), bars()).alerts
    assert alert.severity is Severity.INFO
    (alert,) = gradwatch.cure(lstm(), bars(), horizon=50).alerts
    assert alert.severity is Severity.WARNING
    torch.manual_seed(0)
    short = nn.Sequential(nn.Conv1d(3, 4, 5), nn.Tanh(), nn.Conv1d(4, 2, 5))
    assert not gradwatch.cure(short, bars().transpose(1, 2)).alerts
    assert gradwatch.cure(short, bars().transpose(1, 2), horizon=50).alerts


def test_a_module_that_is_put_in_is_in_the_mode_of_what_it_replaces():
    model = lstm().eval()
    model.rnn = nn.RNN(3, 8, batch_first=True).eval()
    of(gradwatch.cure(model, bars()), "gru").apply(model)
    assert isinstance(model.rnn, nn.GRU)
    assert not any(module.training for module in model.modules())


def test_a_loss_may_name_the_arguments_of_the_model():
    x = bars()
    cures = gradwatch.cure(lstm(), x, loss=lambda model, batch: model(x=batch).square().mean(), steps=3)
    assert cures.cures[0].before.horizon.timesteps < 30


# --- what is given ---


def test_a_loss_may_take_the_output_or_the_model_and_a_batch():
    x, y = rows()
    one = gradwatch.cure(sigmoids(), x, loss=lambda out: mse_loss(out, y), steps=STEPS)
    both = gradwatch.cure(sigmoids(), (x, y), loss=fit, steps=STEPS)
    assert [str(c) for c in one.cures] == [str(c) for c in both.cures]
    assert one.cures


def test_a_loss_of_two_tensors_is_told_what_it_should_take():
    with pytest.raises(TypeError, match="loss must be a function of what the model returned, or of the model and a"):
        gradwatch.cure(sigmoids(), rows(), loss=mse_loss)


def test_a_loss_that_uses_another_model_is_refused():
    model = sigmoids()
    says = "loss must give a scalar that depends on the parameters of the model that it is given, got "
    with pytest.raises(ValueError, match=says):
        gradwatch.cure(model, rows(), loss=lambda _, batch: fit(model, batch))
    for wrong in (lambda m, b: fit(m, b).detach(), lambda m, b: m(b[0]), lambda m, b: fit(m, b).item()):
        with pytest.raises(ValueError, match=says):
            gradwatch.cure(model, rows(), loss=wrong)
    with pytest.raises(ValueError, match="model must have parameters that need a gradient"):
        gradwatch.cure(copy.deepcopy(model).requires_grad_(requires_grad=False), rows(), loss=fit)
    assert all(p.grad is None for p in model.parameters())


def test_a_loss_may_call_parts_of_the_model():
    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.head = sigmoids()[:-1], nn.Linear(8, 1)

    def loss(model, batch):
        return mse_loss(model.head(model.encoder(batch[0])), batch[1])

    cures = gradwatch.cure(Parts(), rows(), loss=loss, steps=STEPS)
    assert of(cures, "skip").gone


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"steps": 0}, "steps must be a whole number from 1 on, got 0"),
        ({"steps": True}, "steps must be a whole number from 1 on, got True"),
        ({"horizon": 0}, "horizon must be a whole number of timesteps from 1 on, or None, got 0"),
        ({"data": [1]}, "loss must be given where optimizer or data are"),
        ({"optimizer": torch.optim.Adam}, "loss must be given where optimizer or data are"),
        ({"loss": 3}, "loss must be a function of what the model returned, or of the model and a batch, got 3"),
        ({"loss": fit, "data": iter([rows()])}, "data must give 60 batches, and gave 1 batches"),
    ],
)
def test_what_cannot_be_is_refused(options, says):
    with pytest.raises((TypeError, ValueError), match=says):
        gradwatch.cure(sigmoids(), rows(), **options)


def test_what_is_no_model_is_refused():
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got function"):
        gradwatch.cure(rows, rows())


def test_a_model_that_cannot_be_copied_is_refused():
    class Uncopied(nn.Sequential):
        def __deepcopy__(self, memo):
            raise RuntimeError("not me")

    with pytest.raises(ValueError, match=r"model must be one that copy.deepcopy can copy, with its optimizer: not me"):
        gradwatch.cure(Uncopied(*sigmoids()), rows()[0])


def test_several_optimizers_are_those_of_the_copy():
    batches, model = many(), sigmoids()
    optimizers = [torch.optim.SGD(model[:12].parameters(), 0.1), torch.optim.Adam(model[12:].parameters(), 1e-2)]
    cures = gradwatch.cure(model, batches[0], loss=fit, optimizer=optimizers, data=batches, steps=STEPS)
    twin, its = copy.deepcopy((model, optimizers))
    losses = []
    for batch in batches:
        for one in its:
            one.zero_grad()
        loss = fit(twin, batch)
        loss.backward()
        for one in its:
            one.step()
        losses.append(loss.item())
    assert cures.cures[0].before.loss == pytest.approx(statistics.median(losses[-5:]), rel=1e-6)


# --- each remedy, and the code that is shown for it ---


class Gated(nn.Module):
    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.cells = nn.ModuleList([kind(3, 8, batch_first=True, num_layers=3, bidirectional=True)])
        self.head = nn.Linear(16, 1)

    def forward(self, x):
        return self.head(self.cells[0](x)[0][:, -1])


class Post(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x):
        return self.blocks(x)


def zeroed():
    model = sigmoids(3)
    nn.init.zeros_(model[2].weight)
    return model


def with_relu(kind=nn.ReLU):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), kind(), nn.Sequential(nn.Linear(8, 8), kind()), nn.Linear(8, 1))


def convolutions():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(3, 4, 3, padding=1), nn.Tanh(), nn.Conv1d(4, 4, 3, padding=1), nn.Tanh())


def normalized():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 1), nn.LayerNorm(1))


FLAT, SERIES = rows()[0], bars(9)
APPLIED = [
    (Remedy("forget_and_input_bias", ("cells.0",), value=3.0), lambda: Gated(nn.LSTM), SERIES),
    (Remedy("input_bias", ("cells.0.l1",), value=-3.0), lambda: Gated(nn.LSTM), SERIES),
    (Remedy("update_bias", value=3.0), lambda: Gated(nn.GRU), SERIES),
    (Remedy("orthogonal"), lambda: Gated(nn.GRU), SERIES),
    (Remedy("orthogonal"), lambda: Gated(nn.RNN), SERIES),
    (Remedy("identity"), lambda: Gated(nn.RNN), SERIES),
    (Remedy("initialize", ("0",), "4"), sigmoids, FLAT),
    (Remedy("initialize", ("0", "2.0")), lambda: with_relu(nn.Tanh), FLAT),
    (Remedy("initialize"), lambda: Gated(nn.LSTM), SERIES),
    (Remedy("begin_small", ("2",)), zeroed, FLAT),
    (Remedy("zero_bias", ("0", "2")), with_relu, FLAT),
    (Remedy("relu", ("0",), "4"), sigmoids, FLAT),
    (Remedy("leaky_relu", ("2.0",)), with_relu, FLAT),
    (Remedy("smooth_bound", ("1",)), lambda: with_relu(nn.Hardtanh), FLAT),
    (Remedy("normalize"), with_relu, FLAT),
    (Remedy("normalize"), convolutions, SERIES.transpose(1, 2)),
    (Remedy("drop_normalization", ("1",)), normalized, FLAT),
    (Remedy("skip"), with_relu, FLAT),
    (Remedy("skip"), convolutions, SERIES.transpose(1, 2)),
    (Remedy("pre_norm"), Post, torch.randn(4, 5, 8)),
    (Remedy("gru", value=3.0), lambda: Gated(nn.RNN), SERIES),
    (Remedy("fewer_layers", ("cells.0",), value=2.0), lambda: Gated(nn.LSTM), SERIES),
    (Remedy("bfloat16"), lambda: with_relu().half(), FLAT),
    (Remedy("float32"), lambda: with_relu().bfloat16(), FLAT),
]


def ward(model, given):
    return Ward(model, given, None, (), (), Options(on_alert=lambda _: None), ())


@pytest.mark.parametrize(("remedy", "make", "x"), APPLIED, ids=[f"{r.action}-{i}" for i, (r, *_) in enumerate(APPLIED)])
def test_the_code_that_is_shown_does_what_is_applied(remedy, make, x):
    applied, written = make(), make()
    torch.manual_seed(5)
    lines, _ = ward(applied, x).change(applied, remedy)
    torch.manual_seed(5)
    code = "\n".join(line[2:] for line in lines if line.startswith("+"))
    names = {"torch": torch, "model": written}
    exec(code, names)
    written = names["model"]
    assert lines
    if remedy.action == "gru":  # begins at random
        assert str(applied) == str(written)
        return
    mine, other = applied.state_dict(), written.state_dict()
    if remedy.action == "fewer_layers":  # the weights that it had stay
        assert all(torch.equal(t, make().state_dict()[n]) for n, t in mine.items())
    assert mine.keys() == other.keys()
    for name in mine:
        assert torch.allclose(mine[name].float(), other[name].float(), atol=2e-2 if "bias" in name else 1e-6), name
    to = next(applied.parameters()).dtype
    assert torch.allclose(applied(x.to(to)).float(), written(x.to(to)).float(), atol=2e-2)
    old = make()
    same = all(
        torch.equal(a, b) for a, b in zip(applied.state_dict().values(), old.state_dict().values(), strict=False)
    )
    assert (
        str(applied) != str(old)
        or not same
        or not torch.equal(applied(x.to(to)), old(x.to(next(old.parameters()).dtype)))
    )


def test_every_action_is_tried_in_a_test_or_changes_the_training():
    assert {r.action for r, *_ in APPLIED} | {"standardize"} == OF_THE_MODEL.keys()
    for action in set(get_args(Action)) - OF_THE_MODEL.keys():
        assert ward(with_relu(), FLAT)._lines(Remedy(action, value=2.0))
    assert all(str(Remedy(action, ("a.b",), value=2.0)) for action in get_args(Action))


def test_standardized_input_has_mean_0_and_spread_1():
    model = Last(nn.GRU(3, 8, batch_first=True))
    x = bars() * torch.tensor([1.0, 100.0, 1e-3]) + torch.tensor([0.0, 5e3, 1.0])
    ward(model, x).change(model, Remedy("standardize", ("rnn",)))
    seen = []
    model.rnn[1].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(x)
    assert torch.allclose(seen[0].mean((0, 1)), torch.zeros(3), atol=1e-3)
    assert torch.allclose(seen[0].std((0, 1), correction=0), torch.ones(3), atol=1e-3)


def test_prices_that_shut_the_gates_are_standardized_and_the_horizon_grows():
    torch.manual_seed(0)
    model, x = lstm(), bars() * 50 + 4000
    cures = gradwatch.cure(model, x, horizon=30)
    standard = of(cures, "standardize", "GW301")
    assert standard.after.horizon.timesteps > cures.cures[0].before.horizon.timesteps
    mean, spread = x.mean((0, 1)), x.std((0, 1), correction=0)
    assert standard.lines == (
        "+ x = (x - mean) / spread  # feature by feature; in this batch"  # noqa: ISC004
        f" mean = [{', '.join(f'{m:.4g}' for m in mean)}], spread = [{', '.join(f'{s:.4g}' for s in spread)}]",
        "+ model.rnn(x)  # in the forward",
    )


@pytest.mark.parametrize(
    ("remedy", "make", "x", "says"),
    [
        (Remedy("forget_and_input_bias"), lambda: lstm(bias=False), SERIES, "rnn has no biases"),
        (Remedy("update_bias"), lstm, SERIES, "there is no GRU or GRUCell in the model"),
        (Remedy("skip"), lambda: nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 1)), FLAT, "no layer in a Seq"),
        (Remedy("fewer_layers", value=2.0), lstm, SERIES, "there is no stack of layers in one module"),
        (Remedy("begin_small", ("1",)), with_relu, FLAT, "there are no weights at 1"),
        (Remedy("zero_bias", ("7",)), with_relu, FLAT, "there is no module 7"),
        (Remedy("bfloat16"), lambda: with_relu().bfloat16(), FLAT, "its weights are in torch.bfloat16: in what"),
        (Remedy("float32"), with_relu, FLAT, "its weights are in torch.float32: in what is computed is chosen in the"),
        (Remedy("standardize"), with_relu, FLAT, "it is the model itself"),
    ],
)
def test_what_cannot_be_done_says_why(remedy, make, x, says):
    model = make()
    with pytest.raises(NotTried, match=says):
        ward(model, x).change(model, remedy)


def test_what_a_sequential_of_its_own_does_is_not_known():
    class Reversed(nn.Sequential):
        def forward(self, x):
            for module in reversed(self):
                x = module(x)
            return x

    model = Reversed(*sigmoids()[:-1])
    for action in ("normalize", "skip"):
        with pytest.raises(NotTried):
            ward(model, FLAT).change(model, Remedy(action))


@pytest.mark.parametrize(
    "options", [{"padding": 0}, {"padding": 1, "stride": 2}, {"padding": 1, "dilation": 2}, {"out_channels": 5}]
)
def test_no_way_leads_around_what_gives_another_shape(options):
    layer = nn.Conv1d(**{"in_channels": 3, "out_channels": 3, "kernel_size": 3, **options})
    model = nn.Sequential(layer, nn.ReLU())
    with pytest.raises(NotTried, match="gives as many features as it takes"):
        ward(model, SERIES.transpose(1, 2)).change(model, Remedy("skip"))


@pytest.mark.parametrize("options", [{"padding": "same", "dilation": 2}, {"padding": 2, "dilation": 2}])
def test_a_way_leads_around_what_keeps_its_shape(options):
    model = nn.Sequential(nn.Conv1d(3, 3, 3, **options), nn.ReLU())
    x = SERIES.transpose(1, 2)
    expected = x + model(x)
    ward(model, x).change(model, Remedy("skip"))
    assert torch.equal(model(x), expected)


def test_a_feature_that_never_changes_stays_finite():
    model, x = lstm(), bars()
    x[:, :, 1] = 7.0
    ward(model, x).change(model, Remedy("standardize", ("rnn",)))
    assert torch.isfinite(model(x)).all()


def test_a_horizon_that_is_lost_elsewhere_than_in_the_recurrence_has_nothing_to_try():
    evidence = {"horizon": 15.0, "length": 100.0, "forget_gate": 0.5}
    lost = Finding("GW301", "vanishing-time", Severity.WARNING, "rnn", evidence=evidence)
    assert remedies.remedies(lost)
    assert not remedies.remedies(replace(lost, names={"entered": "rnn"}))
    assert not remedies.remedies(replace(lost, evidence={**evidence, "detached": 15.0}))
    kept = Finding(
        "GW301", "", Severity.WARNING, "rnn", evidence={**evidence, "update_gate": 0.999}, names={"kind": "GRU"}
    )
    assert not remedies.remedies(kept)
    assert remedies.remedies(replace(kept, evidence={**evidence, "update_gate": 0.5}))


class Functional(nn.Module):
    """Its activations are called in its forward."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(12))
        self.head = nn.Linear(8, 1)

    def forward(self, x):
        for layer in self.layers:
            x = torch.sigmoid(layer(x))
        return self.head(x)


def test_what_would_change_a_forward_is_shown_and_not_tried():
    cures = gradwatch.cure(Functional(), rows(), loss=fit, steps=STEPS)
    normal = of(cures, "normalize")
    assert normal.after is None
    assert str(normal).startswith("not tried: normalization before the activation: what happens between layers.0 and")
    assert normal.lines[1] == "+ x = self.norm(x)  # in the forward, after model.layers[0]"
    assert of(cures, "relu").why_not == "which activation comes after it is code of a forward"
    with pytest.raises(ValueError, match="was not tried"):
        normal.apply(Functional())


def test_what_does_not_run_any_more_is_not_tried():
    class Reads(nn.Module):
        """Reads an attribute that only a plain RNN has."""

        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.rnn, self.head = nn.RNN(3, 8, batch_first=True), nn.Linear(8, 1)

        def forward(self, x):
            assert self.rnn.nonlinearity == "tanh"
            return self.head(self.rnn(x)[0][:, -1])

    other = of(gradwatch.cure(Reads(), bars()), "gru")
    assert "changed in this way the model does not run: AttributeError" in str(other)


def test_a_change_of_the_training_cannot_be_applied_to_a_model():
    batches = many()
    cures = gradwatch.cure(fast(), batches[0], loss=fit, optimizer=lambda p: torch.optim.SGD(p, 4.0), steps=STEPS)
    clip = next(c for c in cures.cures if c.remedy.action == "clip")
    with pytest.raises(ValueError, match=r"is a change of the training, not of the model\n.*clip_grad_norm_"):
        clip.apply(fast())


def test_a_remedy_is_refused_where_the_model_is_another():
    with pytest.raises(ValueError, match="cannot be done to this model: there is no module rnn"):
        gradwatch.cure(lstm(), bars()).best.apply(sigmoids())
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module"):
        gradwatch.cure(lstm(), bars()).best.apply(3)


def test_what_is_found_at_several_layers_is_treated_at_all_of_them():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))
    with torch.no_grad():
        model[0].bias -= torch.tensor([50.0] * 6 + [0.0] * 2)
        model[2].bias -= torch.tensor([50.0] * 6 + [0.0] * 2)
    batches = [(torch.randn(32, 8), torch.randn(32, 1)) for _ in range(STEPS)]  # there is nothing to learn
    cures = gradwatch.cure(model, batches[0], loss=fit, data=batches)
    zero = of(cures, "zero_bias", "GW601")
    assert zero.gone
    assert zero.lines == ("+ torch.nn.init.zeros_(model[0].bias)", "+ torch.nn.init.zeros_(model[2].bias)")


def test_of_weights_that_are_all_0_one_may_stay_so():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False), nn.Linear(8, 1))
    nn.init.zeros_(model[1].weight)
    nn.init.zeros_(model[2].weight)
    (x, y) = rows()
    small = of(gradwatch.cure(model, x, loss=lambda out: mse_loss(out, y)), "begin_small", "GW401")
    assert small.remedy.places == ("1",)
    assert small.gone
    assert small.lines == ("+ torch.nn.init.normal_(model[1].weight, std=0.02)",)


def test_weights_in_bfloat16_are_kept_in_float32():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.LayerNorm(32), nn.ReLU(), nn.Linear(32, 1)).bfloat16()
    x, y = (t.bfloat16() for t in rows())
    cures = gradwatch.cure(model, (x, y), loss=fit, optimizer=lambda p: torch.optim.Adam(p, 2e-5), steps=60)
    assert of(cures, "float32", "GW702").gone


def test_functions_of_an_epsilon_are_helped_by_a_smaller_one():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
    x, y = rows()
    cures = gradwatch.cure(model, (x, y), loss=fit, optimizer=lambda p: torch.optim.Adam(p, 1e-2, eps=50.0), steps=60)
    eps = of(cures, "epsilon")
    assert eps.gone
    assert eps.after.loss < eps.before.loss
    assert of(cures, "scale_loss", "GW703").after.loss < eps.before.loss


# --- the table of remedies ---


def test_every_cause_has_remedies_or_a_reason():
    assert set(remedies._BY_CAUSE) | set(remedies.NOT_TRIED) == set(get_args(Cause))
    assert not set(remedies._BY_CAUSE) & set(remedies.NOT_TRIED)


def test_rules_without_a_remedy_that_can_be_tried_are_these():
    """A new rule has to be thought of here."""
    without = set(RULES) - set(remedies._BY_CODE)
    assert without == {
        *("GW102", "GW103", "GW104"),  # of the loss; a limit of one's own; how the loss is made
        "GW204",  # a limit of one's own
        *("GW303", "GW304", "GW306", "GW307", "GW308"),  # how a loop feeds a model
        *("GW105", "GW401"),  # by their causes alone
        *("GW501", "GW502", "GW503", "GW504"),  # an operation without a derivative, a term of the loss
        "GW801",  # not known
        *("GW802", "GW803", "GW908"),  # how the loss is made; what a loop has switched off
        *("GW900", "GW901", "GW902", "GW903", "GW904", "GW905", "GW906", "GW907", "GW909", "GW910"),  # the loop
    }


def test_an_alert_without_a_remedy_to_try_says_why():
    class Cut(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 1)

        def forward(self, x):
            return self.second(relu(self.first(x)).detach())

    cures = gradwatch.cure(Cut(), rows()[0])
    assert [a.finding.code for a in cures.alerts] == ["GW401"]
    assert "nothing tried: where the graph is cut is code of the model's own forward; look between" in str(cures)


def test_a_finding_of_somebody_s_own_has_nothing_to_try():
    assert remedies.remedies(Finding("MINE1", "mine", Severity.WARNING, "")) == ()
    assert isinstance(Alert(Finding("MINE1", "mine", Severity.WARNING, ""), 0, 0), Alert)


# --- the command ---

PROGRAM = """
import torch
from torch import nn

def setup():
    torch.manual_seed(0)
    net = nn.Sequential(*[m for _ in range(12) for m in (nn.Linear(8, 8), nn.Sigmoid())], nn.Linear(8, 1))
    x = torch.randn(32, 8)
    return net, x

def well():
    torch.manual_seed(0)
    return {"model": nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1)), "batch": torch.randn(32, 8)}

class Cut(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 1)

    def forward(self, x):
        return self.second(self.first(x).detach())

def cut():
    x, y = torch.randn(32, 8), torch.randn(32, 1)
    return Cut(), x, lambda out: (out - y).square().mean()

def nothing():
    return 3

def imports():
    import no_such_module
"""


@pytest.fixture
def program(tmp_path, monkeypatch):
    (tmp_path / "my_setup.py").write_text(textwrap.dedent(PROGRAM))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("my_setup", None)


def test_the_command_tells_what_helped(program):
    done = subprocess.run(
        [*warm(), "-m", "gradwatch", "cure", "my_setup:setup"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("measured again on copies of the model\n\nGW101 vanishing-depth: ")
    assert "best: " in done.stdout


def test_the_command_s_status_is_1_where_nothing_has_helped(program, capsys):
    assert main(["cure", "my_setup:well"]) == 0
    assert "nothing to cure" in capsys.readouterr().out
    assert main(["cure", "my_setup:cut", "--steps", "12"]) == 1
    assert "each trained for 12 steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("my_setup", "MODULE:FUNCTION must be a module and a function in it, got 'my_setup'"),
        ("my_setup:nothing", "my_setup:nothing must return (model, batch, loss, optimizer, data)"),
        ("my_setup:other", "there is no function 'other' in my_setup"),
        ("no_such:other", "there is no module 'no_such'"),
    ],
)
def test_the_command_says_what_is_wrong_with_its_argument(program, capsys, name, says):
    assert main(["cure", name]) == 2
    assert says in capsys.readouterr().err


def test_what_the_function_itself_raises_is_not_hidden(program, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["cure", "my_setup:imports"])
    assert ended.value.code == 2
    assert "No module named 'no_such_module'" in capsys.readouterr().err


# --- what a review broke ---


def shared():
    torch.manual_seed(0)
    activation = nn.Sigmoid()
    return nn.Sequential(*(m for _ in range(12) for m in (nn.Linear(8, 8), activation)), nn.Linear(8, 1))


@pytest.mark.parametrize("action", ["relu", "normalize", "skip"])
def test_an_activation_that_stands_at_several_places_is_treated_at_each_by_itself(action):
    one, other = (of(gradwatch.cure(make(), rows(), loss=fit, steps=STEPS), action) for make in (sigmoids, shared))
    assert (one.after.first, one.after.loss, one.lines) == (other.after.first, other.after.loss, other.lines)
    applied, written = shared(), shared()
    torch.manual_seed(1)
    other.apply(applied)
    torch.manual_seed(1)
    exec("\n".join(line[2:] for line in other.lines if line.startswith("+")), {"torch": torch, "model": written})
    assert torch.equal(applied(FLAT), written(FLAT))


def test_what_data_and_losses_draw_is_put_back():
    generator, mine = torch.Generator().manual_seed(3), torch.Generator().manual_seed(4)
    loader = DataLoader(TensorDataset(*rows()), 8, shuffle=True, generator=generator)
    before = [g.get_state() for g in (torch.default_generator, generator, mine)]

    def loss(model, batch):
        return fit(model, batch) * (1 + torch.rand((), generator=mine))

    cures = gradwatch.cure(fast(), rows(), loss=loss, optimizer=lambda p: torch.optim.SGD(p, 4.0), data=loader, steps=9)
    assert all(
        torch.equal(a, g.get_state()) for a, g in zip(before, (torch.default_generator, generator, mine), strict=True)
    )
    firsts = {c.after.first for c in cures.cures if c.remedy.action in ("rate", "clip", "warm_up")}
    assert firsts == {cures.cures[0].before.first}


def test_each_copy_has_batches_and_a_loss_of_its_own():
    class Annealed:
        steps = 0

        def __call__(self, model, batch):
            self.steps += 1
            batch[0].mul_(1.02)
            return fit(model, (batch[0], batch[1])) * (1 + self.steps / 20)

    loss, batch = Annealed(), rows()
    whole = batch[0].clone()
    teacher = nn.BatchNorm1d(1)
    cures = gradwatch.cure(sigmoids(), batch, loss=loss, steps=STEPS)
    assert loss.steps == 0
    assert torch.equal(batch[0], whole)
    healed, again = sigmoids(), Annealed()
    of(cures, "skip").apply(healed)
    optimizer = torch.optim.Adam(healed.parameters())
    for i in range(STEPS):
        optimizer.zero_grad()
        value = again(healed, rows())
        if i == 0:
            assert value.item() == of(cures, "skip").after.first
        value.backward()
        optimizer.step()

    def distilled(model, batch):
        return (teacher(model(batch[0])) - batch[1]).square().mean()

    state = copy.deepcopy(teacher.state_dict())
    gradwatch.cure(sigmoids(), batch, loss=distilled, steps=5)
    assert all(torch.equal(a, b) for a, b in zip(state.values(), teacher.state_dict().values(), strict=True))
    assert teacher.weight.grad is None


class Flagged(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.rnn, self.head = nn.LSTM(3, 8, batch_first=True), nn.Linear(8, 1)

    def forward(self, x, *, flag=True):
        return self.head(self.rnn(x)[0][:, -1])


class Several(Flagged):
    def forward(self, *xs, flag=True):
        return super().forward(xs[0])


class Stepping(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = Flagged()

    def training_step(self, batch, _):
        return self.net(batch[0], flag=True).square().mean()


@pytest.mark.parametrize(
    ("make", "loss"),
    [
        (lambda: nn.DataParallel(Flagged()), lambda m, b: m(b[0], flag=True).square().mean()),
        (lambda: torch.compile(Flagged(), backend="eager"), lambda m, b: m(b[0], flag=True).square().mean()),
        (Several, lambda m, b: m(b[0], flag=True).square().mean()),
        (Stepping, lambda m, b: m.training_step(b, 0)),
    ],
)
def test_a_need_is_judged_however_the_model_is_called(make, loss):
    cures = gradwatch.cure(make(), (bars(),), loss=loss, steps=3, horizon=50)
    assert cures.alerts[0].finding.code == "GW301"
    assert of(cures, "forget_and_input_bias").gone


def test_a_need_that_cannot_be_judged_is_an_error():
    with pytest.raises(ValueError, match="horizon= is given, and how far back the model learns cannot be measured: "):
        gradwatch.cure(nn.Embedding(5, 3), torch.tensor([1, 2]), loss=torch.sum, steps=3, horizon=50)
    with pytest.raises(
        ValueError, match=r"the sequences have 60 timesteps of x \(time: dimension 1\), the need is 200"
    ):
        gradwatch.cure(remembering(), bars(), horizon=200)


def remembering():
    model = lstm()
    with torch.no_grad():
        model.rnn.bias_ih_l0[:8], model.rnn.bias_ih_l0[8:16], model.rnn.bias_hh_l0[:16] = -5.0, 5.0, 0.0
    return model


class Sharp(torch.optim.SGD):
    """Keeps things of its own, as SAM does, which deepcopy forgets."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, lr)
        self.inner = torch.optim.SGD(self.param_groups, lr)
        self.param_groups = self.inner.param_groups
        self.half = 0.5

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.grad.mul_(self.half)
        return self.inner.step(closure)


def test_an_optimizer_of_somebody_s_own_is_copied_with_what_it_keeps():
    batches, model = many(), sigmoids()
    optimizer = Sharp(model.parameters(), 0.2)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5)
    cures = gradwatch.cure(model, batches[0], loss=fit, optimizer=optimizer, data=batches, steps=STEPS)
    twin = copy.deepcopy(model)
    expected = by_hand(twin, torch.optim.SGD(twin.parameters(), 0.1), batches)
    assert cures.cures[0].before[1:3] == pytest.approx(expected, rel=1e-5)
    assert scheduler.last_epoch == 0
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), sigmoids().parameters(), strict=True))


def test_a_new_layer_is_stepped_as_that_which_it_stands_beside():
    batches, model = many(), sigmoids()
    optimizers = [torch.optim.SGD(model[:20].parameters(), 0.3), torch.optim.SGD(model[20:].parameters(), 0.0)]
    cures = gradwatch.cure(model, batches[0], loss=fit, optimizer=optimizers, data=batches, steps=STEPS)
    healed, its = copy.deepcopy((model, optimizers))
    normal = of(cures, "normalize")
    normal.apply(healed)
    for number in range(1, 20, 2):
        its[0].add_param_group({"params": list(healed[number][0].parameters()), "lr": 0.3})
    losses = []
    for batch in batches:
        its[0].zero_grad()
        loss = fit(healed, batch)
        loss.backward()
        its[0].step()
        losses.append(loss.item())
    assert normal.after.loss == pytest.approx(statistics.median(losses[-5:]), rel=1e-6)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        (
            {"loss": nn.MSELoss()},
            TypeError,
            "loss must be a function of what the model returned, or of the model and a",
        ),
        ({"loss": lambda out: {"loss": out.sum()}}, ValueError, "parameters of the model that it is given, got dict"),
        ({"loss": lambda out: 3.0}, ValueError, "parameters of the model that it is given, got float"),
        ({"loss": lambda out: OTHER(FLAT).sum()}, ValueError, "parameters of the model that it is given, got a tensor"),
        ({"loss": torch.sum, "data": 5}, TypeError, "data must be batches .a list of them, a DataLoader., got int"),
        ({"loss": torch.sum, "data": FLAT_}, TypeError, "data must be batches .*, got Tensor"),
        (
            {"loss": torch.sum, "optimizer": lambda p: None},
            ValueError,
            "optimizer must make an optimizer of parameters",
        ),
        ({"loss": torch.sum, "optimizer": lambda p: 3}, TypeError, "optimizer must have param_groups and step"),
        (
            {"loss": torch.sum, "optimizer": lambda p: torch.optim.SGD(OTHER.parameters(), 0.1)},
            ValueError,
            "optimizer must step parameters of the model",
        ),
        (
            {"loss": torch.sum, "optimizer": torch.optim.LBFGS},
            TypeError,
            "optimizer must step without a closure, which LBFGS does not",
        ),
    ],
)
def test_what_cannot_train_is_refused_in_words(options, error, says):
    with pytest.raises(error, match=says):
        gradwatch.cure(sigmoids(), rows()[0], steps=3, **options)


def test_a_factory_may_make_several_optimizers():
    cures = gradwatch.cure(
        sigmoids(),
        rows(),
        loss=fit,
        steps=STEPS,
        optimizer=lambda p: [torch.optim.Adam(p[:4]), torch.optim.Adam(p[4:])],
    )
    assert of(cures, "skip").after is not None


def test_a_batch_without_rows_is_refused():
    with pytest.raises(ValueError, match="the batch must have rows, and has none"):
        gradwatch.horizon(lstm(), bars()[:0])


def test_it_works_where_nothing_else_has_a_gradient():
    with torch.inference_mode():
        x, y = rows()
        cures = gradwatch.cure(sigmoids(), (x, y), loss=fit, steps=STEPS)
        assert of(cures, "skip").gone
        assert gradwatch.cure(sigmoids(), x).cures


def test_the_recurrent_matrix_of_each_gate_is_orthogonal_also_behind_a_projection():
    for hidden, projected in ((16, 4), (6, 4)):
        model = nn.LSTM(3, hidden, batch_first=True, proj_size=projected)
        ward(model, SERIES).change(model, Remedy("orthogonal"))
        for gate in model.weight_hh_l0.split(hidden):
            assert torch.allclose(torch.linalg.svdvals(gate), torch.ones(projected), atol=1e-5)


class Named(nn.Module):
    """Holds modules in all ways."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.parts = nn.ModuleDict(
            {"block-1": nn.Sequential(nn.Linear(8, 8), nn.ReLU()), "0": nn.Sequential(nn.Linear(8, 8), nn.PReLU())}
        )
        self.add_module("7", nn.Sequential(nn.Linear(8, 8), nn.ReLU()))

    def forward(self, x):
        return getattr(self, "7")(self.parts["0"](self.parts["block-1"](x)))


@pytest.mark.parametrize("action", ["normalize", "skip", "zero_bias"])
@pytest.mark.parametrize(
    "make",
    [
        Named,
        lambda: Named().double(),
        lambda: nn.DataParallel(Named()),
        lambda: torch.compile(Named(), backend="eager"),
    ],
)
def test_the_code_is_right_wherever_modules_are_held_and_in_whatever_format(action, make):
    applied, written = make(), make()
    lines, _ = ward(applied, FLAT).change(applied, Remedy(action))
    assert any("block-1" in line for line in lines)
    exec("\n".join(line[2:] for line in lines if line.startswith("+")), {"torch": torch, "model": written})
    x = FLAT.to(next(applied.parameters()).dtype)
    assert torch.equal(applied(x), written(x))
    assert not torch.equal(applied(x), make()(x))


def test_the_schedule_that_is_shown_is_the_one_that_was_tried():
    for steps in (60, 30, 7, 2):
        lines = Ward(None, None, None, (), [None] * steps, None, ())._lines(Remedy("warm_up"))
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 4.0)
        names = {"torch": torch, "optimizer": optimizer}
        exec(lines[0][2:], names)
        for step in range(steps):
            warm = max(steps // 3, 1)
            assert optimizer.param_groups[0]["lr"] == pytest.approx(4.0 * min(1.0, (step + 1) / warm), rel=1e-3)
            optimizer.step()
            names["scheduler"].step()


@pytest.mark.parametrize("bind", [parametrizations.weight_norm, parametrizations.spectral_norm, nn.utils.weight_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_weights_that_are_computed_or_frozen_are_not_begun_anew(bind):
    bound, frozen = sigmoids(3), sigmoids(3).requires_grad_(requires_grad=False)
    for number in range(0, 7, 2):
        bind(bound[number])
    for model in (bound, frozen):
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(NotTried, match="its weights are frozen, or computed"):
            ward(model, FLAT).change(model, Remedy("initialize"))
        lines, patient = ward(model, FLAT).change(model, Remedy("relu"))
        assert not any("kaiming" in line for line in lines)
        assert not patient.changed
        assert all(torch.equal(a, before[name]) for name, a in model.state_dict().items())


def test_of_several_activations_beside_a_layer_nobody_knows_which_is_its_own():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.act, self.fc2, self.out = nn.Linear(8, 8), nn.Sigmoid(), nn.Linear(8, 8), nn.Sigmoid()

        def forward(self, x):
            return self.out(self.fc2(self.act(self.fc1(x))))

    model = Two()
    with pytest.raises(NotTried, match="which activation comes after it is code of a forward"):
        ward(model, FLAT).change(model, Remedy("relu", ("fc1",)))
    model.out = nn.Identity()
    ward(model, FLAT).change(model, Remedy("relu", ("fc1",)))
    assert isinstance(model.act, nn.ReLU)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("def setup(): return {'model': M, 'batch': X, 'lr': 3}", "unknown argument 'lr'"),
        ("def setup(): return (M, X, 1, 2, 3, 4)", "got a tuple of 6"),
        ("def setup(): return {'batch': X}", "model"),
        ("def setup(): return (3, X)", "model must be a torch.nn.Module, got int"),
        ("setup = 3", "'setup' in broken is no function"),
        ("def setup(): raise ValueError('my own value')", "my own value"),
        ("def setup(): torch.nn.Foo", "AttributeError"),
        ("torch.nn.Foo\ndef setup(): pass", "AttributeError"),
        ("def setup(:", "SyntaxError"),
    ],
)
def test_the_command_ends_with_2_where_nothing_could_be_tried(tmp_path, body, says):
    (tmp_path / "broken.py").write_text(f"import torch\nM, X = torch.nn.Linear(8, 1), torch.randn(4, 8)\n{body}\n")
    code = (
        "import sys; sys.path.insert(0, ''); from gradwatch.cli import main; sys.exit(main(['cure', 'broken:setup']))"
    )
    done = subprocess.run([*warm(), "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert says in done.stderr
