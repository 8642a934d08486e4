"""Steps that do nothing are found, with what makes them so, and the cure trains; what is meant is left alone."""

from __future__ import annotations

import contextlib
import itertools
import math

import pytest
import torch
from loops import Watched, batches, loss_of
from models import tall
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LinearLR

import gradwatch
from gradwatch import Severity


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1))


def batch(step):
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(step))
    return x, torch.sin(2 * x[:, :1])


class Trained:
    """What was said of a training, and where its loss began and ended."""

    def __init__(
        self, optimizer, steps=60, *, model=None, schedule=None, factor=1.0, size=1.0, told=True, clip=None, **watched
    ):
        model = net() if model is None else model
        optimizer = optimizer(model.parameters())
        schedule = schedule(optimizer) if schedule else None
        self.known, self.losses, self.last = {}, [], None
        with gradwatch.watch(model, optimizer, sinks=[self.note], on_alert=lambda _: None, **watched) as watcher:
            for step in range(steps):
                x, y = batch(step)
                loss = size * (model(x.to(model[0].weight.dtype)).float() - y).square().mean()
                optimizer.zero_grad()
                (factor * loss).backward()
                if told:
                    watcher.record(loss)
                if clip is not None:
                    clip(model)
                optimizer.step()
                if schedule:
                    schedule.step()
                self.losses.append(loss.item())

    def note(self, report):
        self.last = report
        self.known.update({a.finding.code: a for a in (*report.cleared, *report.open)})

    @property
    def serious(self):
        return {code for code, alert in self.known.items() if alert.severity > Severity.INFO}

    @property
    def learned(self):
        return sum(self.losses[-5:]) < 0.5 * sum(self.losses[:5])


def sgd(rate, **options):
    return lambda parameters: torch.optim.SGD(parameters, rate, **options)


def adam(rate, **options):
    return lambda parameters: torch.optim.Adam(parameters, rate, **options)


def to_norm(limit):
    return lambda model: torch.nn.utils.clip_grad_norm_(model.parameters(), limit)


# --- the learning rate ---


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize(
    ("optimizer", "says"),
    [
        (sgd(0.0), "no weight has moved, since step 0. Likely cause: its learning rate is 0"),
        (adam(0.0), "no weight has moved, since step 0. Likely cause: its learning rate is 0"),
        (sgd(1e-9), "its learning rate of 1e-09 is too small for gradients of norm 0."),
        (
            adam(1e-9),
            "of themselves, since step 0. Likely cause: its learning rate of 1e-09 is too small to change them",
        ),
    ],
)
def test_weights_that_never_move_are_found_and_the_rate_is_why(optimizer, says, told):
    found = Trained(optimizer, told=told)

    # Without the loss, nobody knows whether the gradient or the rate of SGD is so small.
    unsure = not told and "gradients of norm" in says
    assert found.known["GW903"].severity is (Severity.INFO if unsure else Severity.WARNING)
    assert found.known.keys() == {"GW903"}
    assert found.known["GW903"].began == 20
    assert says in str(found.known["GW903"])


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("optimizer", [sgd(0.1, momentum=0.9), adam(0.01)])
def test_with_a_learning_rate_they_move(optimizer, told):
    found = Trained(optimizer, 120, told=told)

    assert found.serious == set()
    assert found.learned


def test_without_the_loss_small_steps_of_small_gradients_are_no_evidence_once_the_weights_moved():
    assert (
        "GW903"
        not in Trained(sgd(0.1), 200, told=False, schedule=lambda o: LambdaLR(o, lambda i: 1e-3 ** (i / 50))).serious
    )


def test_a_schedule_that_has_run_out_before_half_of_the_training():
    early = Trained(adam(0.01), 160, schedule=lambda o: LinearLR(o, 1.0, 0.0, 40))
    meant = Trained(adam(0.01), 160, schedule=lambda o: LinearLR(o, 1.0, 0.0, 160))

    assert early.serious == {"GW903"}
    assert "no weight has moved, since step 40. Likely cause: its learning rate is 0: the schedule has run out" in str(
        early.known["GW903"]
    )
    assert meant.known.keys() == set()
    assert sum(meant.losses[-5:]) < 0.5 * sum(early.losses[-5:])


def test_a_schedule_that_runs_out_at_the_end_is_worth_a_word_and_no_more():
    found = Trained(adam(0.01), 220, schedule=lambda o: LinearLR(o, 1.0, 0.0, 170))

    assert found.learned
    assert {code: a.severity for code, a in found.known.items()} == {"GW903": Severity.INFO}


@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("optimizer", [sgd(0.1, momentum=0.9), adam(0.01)])
@pytest.mark.parametrize("steps", [300, 100_000])
@pytest.mark.parametrize("clip", [None, to_norm(0.1)])
def test_a_warm_up_from_zero_is_no_fault(optimizer, told, steps, clip):
    schedule = lambda o: LambdaLR(o, lambda i: min(i / steps, 1.0))

    assert Trained(optimizer, 80, told=told, schedule=schedule, clip=clip).serious == set()


def test_a_converged_model_is_none():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 1))
    optimizer, known = torch.optim.SGD(model.parameters(), 0.1), []
    x = torch.randn(64, 8)
    y = x @ torch.ones(8, 1)
    with gradwatch.watch(model, optimizer, on_alert=known.append) as watcher:
        for _ in range(400):
            optimizer.zero_grad()
            loss = (model(x) - y).square().mean()
            watcher.record(loss)
            loss.backward()
            optimizer.step()

    assert watcher.report.snapshot.update_global is None or watcher.report.snapshot.update_global < 1e-6
    assert known == []


def test_what_is_frozen_on_purpose_is_none():
    frozen = net()
    frozen[0].requires_grad_(requires_grad=False)
    by_rate = lambda parameters: torch.optim.SGD([{"params": p, "lr": 0.1 * (i > 1)} for i, p in enumerate(parameters)])

    for model, optimizer in ((frozen, sgd(0.1)), (net(), by_rate)):
        assert Trained(optimizer, model=model).serious == set()


def test_a_rate_of_zero_rounds_nothing_away():
    still, moving = (Trained(sgd(rate), model=net().bfloat16()) for rate in (0.0, 1e-6))

    assert still.serious == {"GW903"}
    assert moving.serious == {"GW702"}


def test_an_optimizer_that_puts_the_weights_back():
    class Still(torch.optim.SGD):
        def step(self, closure=None):
            kept = [p.detach().clone() for g in self.param_groups for p in g["params"]]
            super().step(closure)
            with torch.no_grad():
                for p, before in zip((p for g in self.param_groups for p in g["params"]), kept, strict=True):
                    p.copy_(before)

    found = Trained(lambda parameters: Still(parameters, 0.1))

    assert found.serious == {"GW903"}
    assert "Cause not found. Try: look at what the optimizer's step() does" in str(found.known["GW903"])


def test_how_far_all_weights_move_is_that_of_two_copies():
    model = tall()
    watched = Watched(model, optimizer := torch.optim.SGD(model.parameters(), 0.1), probe_every_n_steps=1)
    (batch,) = batches(1)
    truth = []
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        before = torch.cat([p.detach().double().flatten() for p in model.parameters()])
        optimizer.step()
        after = torch.cat([p.detach().double().flatten() for p in model.parameters()])
        truth.append(((after - before).norm() / before.norm()).item())

    assert [s.update_global for s in watched.snapshots] == pytest.approx(truth, rel=1e-5)
    assert [s.rate for s in watched.snapshots] == [0.1] * 3


# --- clipping ---


def amp(form, *, early, told=True):
    """Train with a GradScaler and clip before `unscale_`, or after it as is right."""
    torch.manual_seed(0)
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    scaler, known, losses = torch.amp.GradScaler("cpu", init_scale=2.0**16), {}, []

    def note(report):
        known.update({a.finding.code: a for a in report.open})

    given = {"scaler": scaler} if form == "given" else {}
    with gradwatch.watch(model, optimizer, sinks=[note], on_alert=lambda _: None, **given) as watcher:
        for step in range(120):
            x, y = batch(step)
            loss = (model(x) - y).square().mean()
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            if form != "hooks":
                watcher.step(loss=loss if told else None)
            elif told:
                watcher.record(loss)
            if not early:
                scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.item())
    return known, losses


@pytest.mark.parametrize("form", ["hooks", "read", "given"])
def test_scaled_gradients_that_are_clipped(form):
    known, losses = amp(form, early=True)
    cured, better = amp(form, early=False)

    assert known.keys() == {"GW904"}
    assert known["GW904"].severity is Severity.WARNING
    assert known["GW904"].began == 20
    said = str(known["GW904"])
    share = "the global gradient norm is 1.53e-05 at each step" if form == "hooks" else "clipping leaves "
    assert share in said
    assert "a loss scale of 6.55e+04 is in use. Try: scaler.unscale_(optimizer) before clipping" in said
    assert losses[-1] > 0.8 * losses[0]
    assert {a.severity for a in cured.values()} <= {Severity.INFO}
    assert better[-1] < 0.5 * better[0]


def test_without_the_loss_it_is_for_information():
    assert {a.severity for a in amp("read", early=True, told=False)[0].values()} == {Severity.INFO}


@pytest.mark.parametrize("told", [True, False])
def test_clipping_to_next_to_nothing_stops_sgd_and_not_adam(told):
    stopped, moving = (Trained(o, 120, clip=to_norm(1e-6), told=told) for o in (sgd(0.01), adam(0.01)))

    assert stopped.serious == {"GW904"}
    assert moving.known.keys() == set()
    assert moving.learned


@pytest.mark.parametrize("explicit", [True, False])
def test_strong_clipping_that_trains_is_no_fault(explicit):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    known, losses, factors = [], [], []
    with gradwatch.watch(
        model, optimizer, on_alert=known.append, sinks=[lambda r: factors.append(r.snapshot.clip_factor)]
    ) as watcher:
        for step in range(250):
            x, y = batch(step)
            loss = 1e6 * (model(x) - y).square().mean()
            optimizer.zero_grad()
            loss.backward()
            watcher.step(loss=loss) if explicit else watcher.record(loss)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())

    assert not explicit or max(factors) < 1e-3
    assert losses[-1] < 0.5 * losses[0]
    assert known == []


def test_one_factor_at_each_step_is_a_loss_scale_and_no_clip():
    model, known = net(), []
    optimizer = torch.optim.SGD(model.parameters(), 1e-5)
    with gradwatch.watch(model, optimizer, on_alert=known.append) as watcher:
        for step in range(60):
            x, y = batch(step)
            loss = (model(x) - y).square().mean()
            optimizer.zero_grad()
            (loss * 4096).backward()
            watcher.step(loss=loss)
            for p in model.parameters():
                p.grad /= 4096
            optimizer.step()

    assert watcher.report.snapshot.clip_factor == pytest.approx(1 / 4096)
    assert known == []


# --- a loss that is told and another, by a factor, that is differentiated ---


@pytest.mark.parametrize("optimizer", [adam(1e-3, eps=1e-20), sgd(1e6)])
def test_a_factor_between_the_loss_that_is_told_and_that_of_the_gradient_is_no_fault(optimizer):
    assert Trained(optimizer, 120, factor=1e-8).serious == set()


def test_where_nothing_moves_the_flat_loss_is_still_found():
    assert Trained(sgd(0.01), factor=1e-8).serious == {"GW102"}


def test_weights_of_next_to_nothing_move_fast_beside_themselves_and_learn_nothing():
    model = net()
    for layer in model[::2]:
        nn.init.normal_(layer.weight, std=1e-3)
        nn.init.zeros_(layer.bias)

    assert Trained(sgd(0.01, momentum=0.9), model=model).serious == {"GW102"}


# --- gradients that are not zeroed ---


def accumulating(*, zero="before", none=True, micro=1, explicit=False, clip=None, form=torch.optim.SGD, rate=1e-3):
    model = net()
    optimizer, reports = form(model.parameters(), rate), []
    with gradwatch.watch(model, optimizer, sinks=[reports.append], on_alert=lambda _: None) as watcher:
        for step in range(25):
            if zero == "before":
                optimizer.zero_grad(set_to_none=none)
            for part in range(micro):
                x, y = batch(100 * part + step)
                loss = (model(x) - y).square().mean() / micro
                if zero == "between" and not part:  # the forward pass and backward
                    optimizer.zero_grad(set_to_none=none)
                loss.backward()
            watcher.step(loss=loss) if explicit else watcher.record(loss)
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
    return reports


@pytest.mark.parametrize("micro", [1, 3])
@pytest.mark.parametrize("explicit", [True, False])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_gradients_that_nobody_zeroes_are_found(micro, explicit, clip):
    reports = accumulating(zero="never", micro=micro, explicit=explicit, clip=clip)
    began = {a.finding.code: a for r in reports for a in r.began}

    assert began.keys() == {"GW905"}
    assert (began["GW905"].began, began["GW905"].severity) == (10, Severity.WARNING)
    assert "of the gradient that the optimizer takes was there before the forward pass, since step 1" in str(
        began["GW905"]
    )


def test_the_share_that_is_left_over_is_that_of_the_gradients_added_up():
    reports = accumulating(zero="never")
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    shares = {}
    for step in range(11):
        before = [torch.zeros(()) if p.grad is None else p.grad.clone() for p in model.parameters()]
        x, y = batch(step)
        (model(x) - y).square().mean().backward()
        parts = [(b.norm(), (p.grad - b).norm()) for p, b in zip(model.parameters(), before, strict=True)]
        shares[step] = [(old / (old + new)).item() for old, new in parts]
        optimizer.step()

    for step in (1, 10):
        (seen,) = (r.snapshot.left_over for r in reports if r.snapshot.step == step)
        assert any(math.isclose(seen, share, rel_tol=1e-4) for share in shares[step])


@pytest.mark.parametrize("zero", ["before", "between"])
@pytest.mark.parametrize("none", [True, False])
@pytest.mark.parametrize("micro", [1, 3])
@pytest.mark.parametrize(("explicit", "clip"), [(False, None), (False, 0.1), (True, 0.1)])
def test_gradients_that_are_zeroed_anywhere_between_two_steps_are_sound(zero, none, micro, explicit, clip):
    reports = accumulating(zero=zero, none=none, micro=micro, explicit=explicit, clip=clip)

    assert {r.snapshot.left_over for r in reports} == {None, 0.0}


def test_gradients_that_are_read_after_each_micro_batch_are_accumulated_on_purpose():
    model = net()
    optimizer, reports = torch.optim.SGD(model.parameters(), 1e-3), []
    with gradwatch.watch(
        model, optimizer, sinks=[reports.append], probe_every_n_steps=1, on_alert=lambda _: None
    ) as watcher:
        for step in range(60):
            x, y = batch(step)
            loss = (model(x) - y).square().mean()
            loss.backward()
            watcher.step(loss=loss)
            if step % 4 == 3:
                optimizer.step()
                optimizer.zero_grad()

    assert not any(r.snapshot.left_over for r in reports)


@pytest.mark.parametrize("forgets", ["both", "first", "second", "none"])
@pytest.mark.parametrize("apart", [True, False])
def test_of_several_optimizers_that_which_does_not_zero_is_found(forgets, apart):
    first, second = nn.Sequential(net(), nn.ReLU()), nn.Linear(1, 1)
    parts = [[p for p in first.parameters() if p.dim() > 1], [p for p in first.parameters() if p.dim() == 1]]
    if apart:  # each a network of its own
        parts = [list(first.parameters()), list(second.parameters())]
    optimizers = [torch.optim.SGD(part, 1e-3) for part in parts]
    zeroed = {"both": (), "first": (1,), "second": (0,), "none": (0, 1)}[forgets]
    model, reports = nn.ModuleList([first, second]), []
    with gradwatch.watch(model, optimizers, sinks=[reports.append], on_alert=lambda _: None):
        for step in range(40):
            for i in zeroed:
                optimizers[i].zero_grad()
            x, y = batch(step)
            (second(first(x)) - y).square().mean().backward()
            for optimizer in optimizers:
                optimizer.step()

    found = {a.finding.optimizer for r in reports for a in r.open if a.finding.code == "GW905"}
    seen = {r.snapshot.optimizer for r in reports if r.snapshot.left_over is not None}
    assert found == {i for i in seen if i not in zeroed}
    assert seen == ({0} if apart else {0, 1})  # of the module whose output comes first


@pytest.mark.parametrize("every", [1, 2, 5])
@pytest.mark.parametrize("detached", [True, False])
@pytest.mark.parametrize("zeroes", [True, False])
def test_what_the_other_half_of_a_gan_leaves_is_zeroed_before_it_counts(every, detached, zeroes):
    """Each phase fills the gradients of both; whoever zeroes his own at its beginning is sound."""
    generator, critic = net(), nn.Linear(1, 1)
    optimizers = [torch.optim.SGD(critic.parameters(), 1e-3), torch.optim.SGD(generator.parameters(), 1e-3)]
    known = []
    both = nn.ModuleList([generator, critic])
    with gradwatch.watch(both, optimizers, every_n_steps=1, probe_every_n_steps=every, on_alert=known.append):
        for step in range(60):
            x, y = batch(step)
            for optimizer, sign in zip(optimizers, (1, -1), strict=True):
                if zeroes:
                    optimizer.zero_grad()
                fake = generator(x)
                fake = fake.detach() if detached and sign == 1 else fake
                (sign * (critic(fake).mean() - (critic(y).mean() if sign == 1 else 0.0))).backward()
                optimizer.step()

    assert [a.finding.code for a in known if a.finding.code == "GW905"] == ([] if zeroes else ["GW905"])


@pytest.mark.parametrize("every", [1, 3, 5])
def test_an_optimizer_that_waits_for_its_turn_accumulates_on_purpose(every):
    model, head = net(), nn.Linear(1, 1)
    both = nn.ModuleList([model, head])
    fast, slow = torch.optim.SGD(head.parameters(), 1e-3), torch.optim.SGD(model.parameters(), 1e-3)
    known = []
    with gradwatch.watch(both, [fast, slow], every_n_steps=1, probe_every_n_steps=every, on_alert=known.append):
        for step in range(80):
            x, y = batch(step)
            fast.zero_grad()
            (head(model(x)) - y).square().mean().backward()
            fast.step()
            if step % 4 == 3:
                slow.step()
                slow.zero_grad()

    assert known == []


# --- steps that are undone ---


class Averaged:
    """Copies averages of the weights into the model every so many steps, and puts the weights back, or forgets to."""

    def __init__(self, model, every=5, *, restores=False):
        self.model, self.every, self.restores, self.steps = model, every, restores, 0
        self.means = [p.detach().clone() for p in model.parameters()]

    @torch.no_grad()
    def __call__(self):
        self.steps += 1
        own = [p.clone() for p in self.model.parameters()]
        for mean, p in zip(self.means, own, strict=True):
            mean.lerp_(p, 0.001)
        if self.steps % self.every == 0:
            for p, mean in zip(self.model.parameters(), self.means, strict=True):
                p.copy_(mean)
            if self.restores:
                for p, mine in zip(self.model.parameters(), own, strict=True):
                    p.copy_(mine)


class Rounded(Averaged):
    """Rounds the weights to a grid after each step."""

    @torch.no_grad()
    def __call__(self):
        for p in self.model.parameters():
            if p.dim() > 1:
                p.copy_((p * 16).round() / 16)


def after_each_step(does, steps=80, *, rate=1e-3, told=True):
    """Train with something that is done after each step; return the alerts, and what was measured at probes."""
    model, known, came = net(), {}, []
    optimizer, do = torch.optim.Adam(model.parameters(), rate), does(model)

    def hear(report):
        known.update({a.finding.code: a for a in report.open})
        came.append(report.snapshot.came)

    with gradwatch.watch(model, optimizer, sinks=[hear], on_alert=lambda _: None) as watcher:
        for step in range(steps):
            x, y = batch(step)
            loss = (model(x) - y).square().mean()
            optimizer.zero_grad()
            loss.backward()
            if told:
                watcher.record(loss)
            optimizer.step()
            do()
    return known, [one for one in came if one is not None]


@pytest.mark.parametrize("does", [Averaged, lambda model: Averaged(model, every=10), Rounded])
def test_steps_that_are_undone_between_them_are_found(does):
    known, came = after_each_step(does)
    assert max(came[1:]) < 0.1  # the first probes lie before the first copy
    alert = known["GW907"]
    assert (alert.severity, alert.finding.place) == (Severity.WARNING, "")
    assert alert.began <= 40
    assert "averages that are copied into the model and not taken out again" in alert.cause
    assert after_each_step(does, told=False)[0]["GW907"].severity == Severity.INFO


def test_they_are_found_where_the_step_itself_zeroes_the_gradients():
    class Zeroing(torch.optim.Adam):
        def step(self, closure=None):
            super().step(closure)
            for group in self.param_groups:
                for p in group["params"]:
                    p.grad.zero_()

    model, known = net(), {}
    optimizer, do = Zeroing(model.parameters(), 1e-3), Averaged(model)
    with gradwatch.watch(model, optimizer, on_alert=lambda a: known.setdefault(a.finding.code, a)) as watcher:
        for step in range(80):
            x, y = batch(step)
            loss = (model(x) - y).square().mean()
            optimizer.zero_grad()
            loss.backward()
            watcher.record(loss)
            optimizer.step()
            do()
    assert "GW907" in known


@pytest.mark.parametrize("rate", [1e-5, 1e-3, 0.03])
def test_steps_that_stay_are_not(rate):
    known, came = after_each_step(lambda model: Averaged(model, restores=True), rate=rate)
    assert min(came) > 0.9
    assert "GW907" not in known


def test_how_far_the_weights_came_is_the_median_over_the_matrices():
    model, reports = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)), []
    optimizer, weights = torch.optim.SGD(model.parameters(), 0.1), []
    with gradwatch.watch(model, optimizer, sinks=[reports.append], on_alert=lambda _: None):
        for _ in range(32):
            optimizer.zero_grad()
            (model(torch.randn(16, 8)) - 1).square().mean().backward()
            weights.append([p.detach().double().clone() for p in model.parameters() if p.dim() > 1])
            optimizer.step()
        weights.append([p.detach().double().clone() for p in model.parameters() if p.dim() > 1])
    probes = [r.snapshot.step for r in reports if r.snapshot.came is not None or r.snapshot.step == 1]
    assert len(probes) > 2
    for earlier, now in itertools.pairwise(probes):
        shares = []
        for at in range(3):
            steps = [(weights[s + 1][at] - weights[s][at]).norm() for s in (earlier, now)]
            shares.append(((weights[now][at] - weights[earlier][at]).norm() / min(steps)).item())
        (came,) = (r.snapshot.came for r in reports if r.snapshot.step == now)
        assert came == pytest.approx(sorted(shares)[1], rel=1e-4)


class OneRow(nn.Module):
    """A frozen model whose embedding learns a new word, and nothing else of it is to change."""

    def __init__(self, row):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.row = nn.Embedding(17, 12), row
        self.body = nn.Linear(12, 4).requires_grad_(requires_grad=False)

    def forward(self, x):
        return self.body(self.words(x))


@pytest.mark.parametrize(("row", "undone"), [(16, False), (3, False), (None, True)])
def test_rows_that_are_put_back_because_they_are_not_to_be_learned_are_none(row, undone):
    model, known = OneRow(row), {}
    old = model.words.weight.detach().clone()
    optimizer = torch.optim.AdamW(model.words.parameters(), 1e-2)
    kept = [k for k in range(17) if k != row]
    with gradwatch.watch(model, optimizer, on_alert=lambda a: known.setdefault(a.finding.code, a)) as watcher:
        for _ in range(80):
            x = torch.randint(17, (64,)) if row is None else torch.full((64,), row)
            loss = (model(x) - torch.randn(64, 4) - 2).square().mean()
            optimizer.zero_grad()
            loss.backward()
            watcher.record(loss)
            optimizer.step()
            with torch.no_grad():
                model.words.weight[kept] = old[kept]
    assert ("GW907" in known) is undone


# --- a schedule that leaves next to nothing ---


def times(factor):
    return lambda optimizer: LambdaLR(optimizer, lambda i: factor * (1 + 0.005 * i) ** -0.75)


def test_a_schedule_that_multiplies_the_rate_by_itself_is_told_and_a_small_rate_alone_is_information():
    slow = Trained(adam(1e-3), 205, schedule=times(1e-3))
    chosen = Trained(adam(1e-6), 205, schedule=times(1.0))

    assert slow.serious == {"GW903"}
    assert "a schedule has kept it below 1% of the 0.001 that the optimizer was made with" in str(slow.known["GW903"])
    assert "LambdaLR takes a factor" in slow.known["GW903"].remedy
    assert chosen.known["GW903"].severity is Severity.INFO
    assert Trained(adam(1e-3), 205, schedule=times(1.0)).serious == set()


@pytest.mark.parametrize(
    ("rate", "schedule"),
    [
        (1e-3, lambda o: LambdaLR(o, lambda i: 1.0 if i < 12 else 1e-4)),  # it has come down
        (1.0, times(1e-6)),  # it returns the rate itself
    ],
)
def test_a_schedule_that_has_come_down_or_returns_the_rate_itself_has_not_kept_it_down(rate, schedule):
    found = Trained(adam(rate), 220, schedule=schedule)

    assert found.known["GW903"].severity is Severity.INFO
    assert "a schedule has kept" not in str(found.known["GW903"])


# --- copies of weights ---


def autocast(*, around, cache=True):
    """Train under autocast that is entered at each step, or once; return the alerts and the copies that were used."""
    torch.manual_seed(0)
    model, alerts = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1)), {}
    optimizer, used = torch.optim.Adam(model.parameters(), 1e-2), []
    model[0].register_forward_hook(lambda m, args, out: used.append(nn.functional.linear(args[0], m.weight, m.bias)))

    def note(alert):
        alerts[alert.finding.code] = alert

    def steps(count):
        for step in range(count):
            x, y = batch(step)
            with contextlib.nullcontext() if around else torch.autocast("cpu", torch.bfloat16, cache_enabled=cache):
                loss = (model(x).float() - y).square().mean()
            optimizer.zero_grad()
            loss.backward()
            watcher.record(loss)
            optimizer.step()

    with gradwatch.watch(model, optimizer, on_alert=note) as watcher:
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=cache) if around else contextlib.nullcontext():
            steps(45)
        x, _ = batch(44)
        fresh = nn.functional.linear(x.bfloat16(), model[0].weight.bfloat16(), model[0].bias.bfloat16())
    return alerts, (used[-1].float() - fresh.float()).abs().max().item() > 0.2


@pytest.mark.parametrize(("around", "cache", "stale"), [(True, True, True), (True, False, False), (False, True, False)])
def test_old_copies_of_weights_that_one_autocast_around_the_loop_keeps_are_told(around, cache, stale):
    alerts, differs = autocast(around=around, cache=cache)

    assert differs is stale
    assert ("GW910" in alerts) is stale
    if stale:
        alert = alerts["GW910"]
        assert (alert.finding.place, alert.severity) == ("0", Severity.WARNING)
        assert alert.finding.evidence["times"] >= 10
        assert "(2 layers)" in alert.message


def test_two_optimizers_that_take_turns_under_one_autocast_use_copies_of_one_step_and_are_not_told():
    torch.manual_seed(0)
    maker, critic, alerts = nn.Linear(4, 8), nn.Linear(8, 1), []
    both = nn.ModuleList([maker, critic])
    ours, theirs = (torch.optim.AdamW(m.parameters(), 1e-3) for m in (maker, critic))
    with gradwatch.watch(both, [ours, theirs], on_alert=alerts.append):
        for step in range(45):
            x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
            with torch.autocast("cpu", torch.bfloat16):
                for optimizer, sign in ((theirs, -1), (ours, 1)):
                    optimizer.zero_grad()
                    (sign * critic(maker(x)).float().tanh().mean()).backward()
                    optimizer.step()
    assert [a for a in alerts if a.finding.code == "GW910"] == []
