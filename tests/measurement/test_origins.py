"""Where NaN and infinity come from, against torch's anomaly mode and a float64 twin that is looked at by hand."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from truth import bits

import gradwatch
from gradwatch.detectors.cause_words import said
from gradwatch.detectors.origins import of_skips
from gradwatch.values.snapshot import Origin


class Does(nn.Module):
    """A module of one's own that computes a function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


def around(function, *, before=None):
    """Return a network in which the function stands between two layers, within a block."""
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(6, 6), before or nn.Identity(), Does(function), nn.Linear(6, 6))
    return nn.Sequential(nn.Linear(6, 6), nn.Tanh(), block, nn.Tanh(), nn.Linear(6, 2))


def zeroed(x):
    """Return it with a first row of zeros, through which the gradient goes on."""
    return torch.cat([x[:1] * 0.0, x[1:]])


def masked_all(x):
    return functional.softmax(x.masked_fill(torch.arange(len(x))[:, None] == 0, -torch.inf), dim=-1)


FORWARD = {
    "softmax over nothing": (masked_all, "softmax"),
    "division by a spread of 0": (
        lambda x: x / (zeroed(x) - zeroed(x).mean(1, keepdim=True)).std(1, keepdim=True),
        "div",
    ),
    "logarithm of a negative number": (lambda x: (x - 10).log(), "log"),
    "root of a negative number": (lambda x: (x - 10).sqrt(), "sqrt"),
    "overflow of an exponential": (lambda x: (x.abs() * 1e3 + 100).exp(), "exp"),
    "logarithm of 0": (lambda x: zeroed(x.abs() + 1).log(), "log"),
    "arc cosine beyond 1": (lambda x: (x * 0 + 1.5).acos(), "acos"),
    "overflow of float16": (lambda x: ((x.half() * 0 + 300) ** 2).float(), "pow"),
    "infinity less infinity": (lambda x: (x * 0 + 1e30) * 1e30, "mul"),
}

BACKWARD = {
    "root at 0": (lambda x: zeroed(x).square().sum(1, keepdim=True).sqrt() * x, "sqrt", "PowBackward0"),
    "norm at 0": (lambda x: (zeroed(x).abs() ** 1.0).pow(0.5), "pow", "AbsBackward0"),
    "arc cosine at 1": (lambda x: torch.cat([x[:1] * 0 + 1.0, x[1:] * 0.1]).acos() * 0 + x, "acos", "AcosBackward0"),
    "a logarithm behind a mask": (
        lambda x: torch.where(x > 0, (x * (x > 0)).log(), torch.zeros(())),
        "log",
        "LogBackward0",
    ),
    "a power behind a mask": (lambda x: torch.where(x > 0, (x * (x > 0)) ** 0.3, x), "pow", "PowBackward0"),
}


# Torch looks for NaN alone: where a slope is infinite it names the next on the way back, which multiplies it by 0.


def named_by_torch(model, loss):
    """Return what torch's anomaly mode names."""
    with warnings.catch_warnings(), torch.autograd.set_detect_anomaly(True):
        warnings.simplefilter("ignore")
        with pytest.raises(RuntimeError) as raised:
            loss(model).backward()
    return str(raised.value).split("'")[1]


def first_not_finite(model, x):
    """Return, by hand and in float64, the first module that gives what is not finite of what is; innermost first."""
    twin, found = model.double(), []
    names = {module: name for name, module in twin.named_modules()}

    def look(module, inputs, output):
        if all(bool(t.isfinite().all()) for t in inputs) and not bool(output.isfinite().all()):
            found.append(names[module])

    for module in names:
        module.register_forward_hook(look)
    twin(x.double())
    return found[0] if found else None


def energy(out):
    return out.square().mean()


def batch():
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("way", FORWARD)
def test_check_names_the_module_and_the_operation_of_the_forward_pass(way):
    function, operation = FORWARD[way]
    single = way in ("overflow of an exponential", "overflow of float16", "infinity less infinity")  # fits in float64
    truth = "2.2" if single else first_not_finite(around(function), batch())

    report = gradwatch.check(around(function), batch(), loss=lambda out: out.square().sum())

    (alert,) = (a for a in report.open if a.finding.code == "GW501")
    assert truth == "2.2"
    assert (report.snapshot.origin.phase, report.snapshot.origin.module) == ("forward", truth)
    assert report.snapshot.origin.operation == operation
    assert (alert.finding.place, alert.finding.cause) == (truth, "born_forward")
    assert f"{operation} in 2.2 gives" in alert.cause
    assert "detect_anomaly" not in alert.remedy


@pytest.mark.parametrize("way", BACKWARD)
def test_check_names_the_module_and_the_operation_of_the_way_back(way):
    function, operation, node = BACKWARD[way]

    def loss(out):
        return out.square().sum()

    assert bool(loss(around(function)(batch())).isfinite())
    truth = named_by_torch(around(function), lambda model: loss(model(batch())))

    report = gradwatch.check(around(function), batch(), loss=loss)

    (alert,) = report.open
    assert truth == node
    assert report.snapshot.origin == Origin("backward", "2.2", report.snapshot.origin.value, operation=operation)
    assert (alert.finding.place, alert.finding.cause) == ("2.2", "born_backward")
    assert "its derivative is not" in alert.cause or "a derivative is not finite" in alert.cause


EPS = 1e-6
CURED = {
    "leave at least one entry": lambda x: functional.softmax(
        x.masked_fill((torch.arange(6) > 0) & (torch.arange(len(x))[:, None] == 0), -torch.inf), dim=-1
    ),
    "mask with a large negative number": lambda x: functional.softmax(
        x.masked_fill(torch.arange(len(x))[:, None] == 0, -1e9), dim=-1
    ),
    "epsilon to what is divided by": lambda x: x / ((zeroed(x) ** 2).mean(1, keepdim=True) + EPS),
    "above 0: clamp it": lambda x: zeroed(x.abs() + 1).clamp(min=EPS).log(),
    "epsilon under the root": lambda x: (zeroed(x).square().sum(1, keepdim=True) + EPS).sqrt() * x,
    "clamp what the exponential takes": lambda x: (x.abs() * 1e3 + 100).clamp(max=10).exp(),
    "the inside of its domain": lambda x: (x * 0 + 1.5).clamp(-1 + EPS, 1 - EPS).acos() * 0 + x,
}
FAULTS = {
    "leave at least one entry": masked_all,
    "mask with a large negative number": masked_all,
    "epsilon to what is divided by": lambda x: x / (zeroed(x) ** 2).mean(1, keepdim=True),
    "above 0: clamp it": FORWARD["logarithm of 0"][0],
    "epsilon under the root": BACKWARD["root at 0"][0],
    "clamp what the exponential takes": FORWARD["overflow of an exponential"][0],
    "the inside of its domain": FORWARD["arc cosine beyond 1"][0],
}


@pytest.mark.parametrize("remedy", CURED)
def test_the_remedy_that_is_named_takes_it_away(remedy):
    (alert,) = (
        a for a in gradwatch.check(around(FAULTS[remedy]), batch(), loss=energy).open if a.finding.code == "GW501"
    )

    assert remedy in alert.remedy
    report = gradwatch.check(around(CURED[remedy]), batch(), loss=energy)
    assert report.snapshot.origin is None
    assert all(a.finding.kind != "non-finite" for a in report.open)


def test_what_is_in_the_batch_is_named_by_its_argument():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 2)

        def forward(self, prices, *, news):
            return self.layer(prices["close"] + news)

    sick = batch()
    sick[2, 3] = torch.nan
    for given, argument in (
        ({"prices": {"close": sick}, "news": batch()}, "prices['close']"),
        ({"prices": {"close": batch()}, "news": sick}, "news"),
    ):
        report = gradwatch.check(Two(), given)
        (alert,) = report.open
        assert report.snapshot.origin == Origin("data", "", "nan", argument=argument)
        assert f"the batch itself holds NaN: it is in the argument {argument} of the model" in alert.cause
        assert "detect_anomaly" not in alert.remedy


def test_an_infinite_target_is_none_of_the_models():
    target = torch.zeros(8, 2)
    target[3, 1] = torch.inf

    report = gradwatch.check(around(torch.tanh), batch(), loss=lambda out: (out - target).square().mean())

    (alert,) = report.open
    assert report.snapshot.origin == Origin("data", None, "inf")
    assert "what the loss takes beside the output of the model" in alert.cause


@pytest.mark.parametrize("loss", [lambda out: (out - out).sqrt().sum(), lambda out: (out * 0.0).log().mean()])
def test_what_the_loss_function_makes_is_none_of_the_models(loss):
    report = gradwatch.check(around(torch.tanh), batch(), loss=loss)

    (alert,) = report.open
    assert report.snapshot.origin.module is None
    assert "the loss function" in alert.cause


def test_weights_that_are_not_finite_are_named_and_no_operation_is_blamed():
    model = nn.Sequential(nn.Embedding(5, 6), nn.Linear(6, 6), nn.Linear(6, 2))
    with torch.no_grad():
        model[0].weight[2] = torch.nan

    report = gradwatch.check(model, torch.arange(5))

    (alert,) = report.open
    assert (report.snapshot.origin.phase, report.snapshot.origin.module) == ("weights", "0")
    assert (alert.finding.place, alert.finding.cause) == ("0", "in_weights")
    assert "the origin is gone" in alert.cause


def test_running_statistics_that_are_not_finite_are_named_where_they_count():
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
    model[1].running_mean[1] = torch.nan

    assert gradwatch.check(model.train(), batch()).snapshot.origin is None
    report = gradwatch.check(model.eval(), batch())
    assert (report.snapshot.origin.phase, report.snapshot.origin.module) == ("weights", "1")


# --- in a run ---


def watched(function, steps, sick, *, loss=energy, step=None, **options):
    """Train a network in which a function is called at the steps that are `sick`; return its reports."""
    now, found = [0], []
    model = around(lambda x: function(x) if now[0] in sick else x)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with gradwatch.watch(model, optimizer, sinks=[found.append], on_alert=lambda _: None, **options) as watcher:
        for i in range(steps):
            now[0] = i
            optimizer.zero_grad()
            value = loss(model(batch()))
            value.backward()
            if step is None:
                watcher.record(value)
                optimizer.step()
            else:
                watcher.step(loss=value)
                step(i, optimizer)
    return found


def alerts(reports, code="GW501"):
    return [a for r in reports for a in r.began if a.finding.code == code]


PROBED = {"every_n_steps": 1, "probe_every_n_steps": 1}


@pytest.mark.parametrize("way", FORWARD)
def test_a_probe_finds_the_module_of_the_forward_pass(way):
    function, _ = FORWARD[way]

    found = watched(function, 4, {3}, **PROBED)

    (alert,) = alerts(found)
    assert [r.snapshot.origin for r in found[:3]] == [None] * 3
    assert (alert.finding.place, alert.finding.onset, alert.finding.cause) == ("2.2", 3, "born_forward")
    assert "detect_anomaly" not in alert.remedy


@pytest.mark.parametrize("way", BACKWARD)
def test_a_probe_finds_the_module_of_the_way_back(way):
    function, _, _ = BACKWARD[way]

    (alert,) = alerts(watched(function, 4, {3}, **PROBED))

    assert (alert.finding.place, alert.finding.onset, alert.finding.cause) == ("2.2", 3, "born_backward")
    assert alert.cause.startswith("the loss is finite, its derivative is not: the gradient becomes")


def rooted(x):
    return zeroed(x).square().sqrt()


class Block(nn.Module):
    """Computes with what a layer of it gives, or beside it."""

    def __init__(self, does):
        super().__init__()
        self.norm, self.out, self.does = nn.LayerNorm(6), nn.Linear(6, 6), does

    def forward(self, x):
        return self.does(self, x)


BLOCKS = {
    "between two layers": lambda block, x: block.out(rooted(block.norm(x))),
    "beside a sound layer": lambda block, x: block.out(block.norm(x) + rooted(x)),
    "after its layers": lambda block, x: rooted(block.out(block.norm(x))),
}


@pytest.mark.parametrize("where", BLOCKS)
def test_what_comes_up_between_layers_accuses_none_of_them(where):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), Block(lambda block, x: block.out(block.norm(x))), nn.Linear(6, 2))
    optimizer, found = torch.optim.SGD(model.parameters(), lr=1e-3), []
    with gradwatch.watch(model, optimizer, sinks=[found.append], on_alert=lambda _: None, **PROBED):
        for i in range(3):
            model[1].does = BLOCKS[where] if i == 2 else model[1].does
            optimizer.zero_grad()
            energy(model(batch())).backward()
            optimizer.step()

    (alert,) = alerts(found)
    assert (alert.finding.place, alert.finding.onset, alert.finding.cause) == ("1", 2, "born_backward")


def test_what_a_policy_may_not_do_is_minus_infinity_and_no_origin():
    allowed = torch.arange(2) > 0
    policy = nn.Sequential(
        nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2), Does(lambda x: x.masked_fill(~allowed, -torch.inf))
    )

    report = gradwatch.check(policy, batch(), loss=lambda out: functional.cross_entropy(out, torch.ones(8, dtype=int)))

    assert report.snapshot.origin is None
    assert all(a.finding.kind != "non-finite" for a in report.open)


def test_minus_infinity_that_masks_is_no_origin():
    def attention(x):
        mask = torch.full((6, 6), -torch.inf).triu(1)
        return (x[:, :6].T @ x[:, :6] + mask).softmax(-1)[: len(x)].mean() * x

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x, mask):
            return (self.layer(x) + mask).softmax(-1)

    model = Masked()
    mask = torch.full((6, 6), -torch.inf).triu(1)
    assert gradwatch.check(around(attention), batch()).open == ()
    assert gradwatch.check(model, (torch.randn(6, 6), mask)).snapshot.origin is None


@pytest.mark.parametrize(("kind", "cause"), [("forward", "origin_gone"), ("backward", "")])
def test_where_no_probe_looked_the_loss_tells_forward_from_backward(kind, cause):
    function = FORWARD["logarithm of a negative number"][0] if kind == "forward" else BACKWARD["root at 0"][0]

    (alert,) = alerts(watched(function, 6, {4}, every_n_steps=1))

    assert (alert.finding.onset, alert.finding.cause) == (4, cause)
    assert ("the origin is gone" in alert.cause) is (kind == "forward")
    assert ("the loss is finite, its derivative is not" in alert.cause) is (kind == "backward")
    assert "gradwatch.check(model, batch, loss=...)" in alert.remedy
    assert ("the last checkpoint before step 4" in alert.remedy) is (kind == "forward")
    assert ("detect_anomaly" in alert.remedy) is (kind == "backward")


def test_a_nan_that_is_masked_before_the_loss_is_told_by_the_gradients_of_weight_and_bias():
    def masked(out):
        keep = torch.arange(len(out))[:, None] > 0
        return torch.where(keep, out, 0.0).square().mean()

    (alert,) = alerts(watched(masked_all, 6, {4}, loss=masked, every_n_steps=1))

    assert alert.finding.evidence["loss"] > 0
    assert (alert.finding.place, alert.finding.cause) == ("4", "origin_gone")
    assert "what 4 takes is not finite" in alert.cause


def test_the_alert_stays_one_while_what_came_first_is_forgotten():
    found = watched(masked_all, 80, set(range(3, 80)), **PROBED)

    assert [a.finding.place for a in alerts(found)] == ["2.2"]
    assert [a.finding.place for a in found[-1].open if a.finding.code == "GW501"] == ["2.2"]


def test_the_pass_after_a_skipped_step_is_looked_at_and_no_other():
    def never(_i, _optimizer):
        """Skip the step, as a scaler does."""

    def unless_sick(i, optimizer):
        if i not in sick:
            optimizer.step()

    sick = {13, 14, 15, 16}
    found = watched(masked_all, 19, sick, step=unless_sick, scaler=torch.amp.GradScaler("cpu", init_scale=1.0))

    probed = [r.snapshot.step for r in found if r.snapshot.activations is not None]
    origins = {r.snapshot.step: r.snapshot.origin for r in found if r.snapshot.origin is not None}
    assert probed == [1, 10, 15]
    assert origins == {15: Origin("forward", "2.2", "nan")}


def test_steps_skipped_without_end_are_told_where_it_comes_from():
    found = watched(
        masked_all, 40, set(range(1, 60)), step=lambda i, o: i == 0 and o.step(), scaler=torch.amp.GradScaler("cpu")
    )

    (alert,) = alerts(found, "GW502")
    assert alert.finding.cause == "born_forward"
    assert "2.2 gives NaN in the forward pass" in alert.cause


def test_weights_that_an_earlier_step_has_thrown_are_named_in_a_run_too():
    model, found = around(torch.tanh), []
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with gradwatch.watch(model, optimizer, sinks=[found.append], on_alert=lambda _: None, **PROBED):
        for i in range(3):
            if i == 2:
                with torch.no_grad():
                    model[2][0].weight[1, 1] = torch.nan
            optimizer.zero_grad()
            energy(model(batch())).backward()
            optimizer.step()

    (alert,) = alerts(found)
    assert (alert.finding.place, alert.finding.cause) == ("2.0", "in_weights")
    assert "go back to the last checkpoint that is finite" in alert.remedy


def test_what_only_certain_batches_bring_is_told_so():
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2))
    optimizer, found = torch.optim.SGD(model.parameters(), lr=0.1), []
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    with gradwatch.watch(model, optimizer, sinks=[found.append], scaler=scaler, on_alert=lambda _: None) as watcher:
        for i in range(41):
            x = batch()
            x[0, 0] = torch.nan if i % 20 == 0 and i else x[0, 0]
            optimizer.zero_grad()
            scaler.scale(energy(model(x))).backward()
            watcher.step()
            scaler.step(optimizer)
            scaler.update()

    history = gradwatch.History()
    for report in found:
        history.add(report.snapshot)
    finding = of_skips(history, gradwatch.Finding("MY1", "mine", gradwatch.Severity.INFO, ""))
    cause, _ = said(finding, "")
    assert finding.cause == "in_data"
    assert (finding.evidence["came"], finding.evidence["looked"]) == (2, 6)  # 20 and 40 of 1, 10, 20, 22, 30, 40
    assert cause.startswith("the batch itself holds NaN: it is in the argument input of the model; it was so in 2 of 6")


def test_an_overflow_that_the_loss_scale_brings_is_no_origin_of_skips():
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2))
    optimizer, found = torch.optim.SGD(model.parameters(), lr=0.1), []
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    with gradwatch.watch(
        model, optimizer, sinks=[found.append], scaler=scaler, on_alert=lambda _: None, **PROBED
    ) as watcher:
        for _ in range(4):
            optimizer.zero_grad()
            scaler.scale(energy(model(batch() * 100)) * 1e3).backward()
            watcher.step()
            scaler.step(optimizer)
            scaler.update()

    history = gradwatch.History()
    for report in found:
        history.add(report.snapshot)
    assert any(r.snapshot.skipped for r in found)
    finding = gradwatch.Finding("MY1", "mine", gradwatch.Severity.INFO, "")
    assert of_skips(history, finding) == finding


def test_an_origin_is_recorded_and_judged_the_same(tmp_path):
    found = watched(masked_all, 4, {3}, logdir=tmp_path, **PROBED)

    run = gradwatch.read_run(tmp_path)
    assert run.snapshots[-1].origin == found[-1].snapshot.origin == Origin("forward", "2.2", "nan")
    assert [a.cause for a in run.alerts] == [a.cause for a in found[-1].open]


def test_a_training_that_meets_nan_is_bitwise_that_without_a_watcher():
    def run(*, watching):
        torch.manual_seed(0)
        model, ends = around(lambda x: masked_all(x) if len(ends) in (3, 4) else x, before=nn.Dropout(0.2)), []
        optimizer = torch.optim.Adam(model.parameters())
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        watcher = (
            gradwatch.watch(model, optimizer, scaler=scaler, on_alert=lambda _: None, **PROBED) if watching else None
        )
        for _ in range(8):
            optimizer.zero_grad()
            loss = energy(model(batch()))
            scaler.scale(loss).backward()
            if watcher is not None:
                watcher.step(loss=loss)
            scaler.step(optimizer)
            scaler.update()
            ends.append(loss.detach())
        return bits([ends, model.state_dict(), torch.get_rng_state(), scaler.get_scale()])

    assert run(watching=True) == run(watching=False)


def test_memory_that_is_not_written_to_yet_is_no_origin():
    def copied(x):
        scratch = torch.empty_like(x)
        return (zeroed(scratch.copy_(x)) + 1e30) * 1e30

    torch.use_deterministic_algorithms(True)  # fills what is not written to with NaN
    try:
        report = gradwatch.check(around(copied), batch())
    finally:
        torch.use_deterministic_algorithms(False)

    assert report.snapshot.origin == Origin("forward", "2.2", "inf", operation="mul")


@pytest.mark.parametrize("reentrant", [True, False])
def test_the_layer_after_a_checkpoint_is_not_accused(reentrant):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.into, self.out = nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.out(checkpoint(rooted, self.into(x), use_reentrant=reentrant))

    report = gradwatch.check(Checkpointed(), batch())

    assert (report.snapshot.origin.phase, report.snapshot.origin.module) == ("backward", "")


def test_check_leaves_a_sick_model_as_it_was():
    model = around(masked_all, before=nn.BatchNorm1d(6)).train()
    before = bits([model.state_dict(), torch.get_rng_state()])

    gradwatch.check(model, batch())

    assert bits([model.state_dict(), torch.get_rng_state()]) == before
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_where_operations_cannot_be_followed_the_alert_comes_all_the_same():
    torch.manual_seed(0)
    model = torch.jit.script(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 2)))

    report = gradwatch.check(model, batch() * torch.nan)

    assert [a.finding.code for a in report.open] == ["GW501"]


# --- what an optimizer makes of a finite gradient ---


@pytest.mark.parametrize(
    ("dtype", "eps", "kind"),
    [
        (torch.float16, 1e-8, "Adam"),
        (torch.float16, 1e-8, "AdamW"),
        (torch.float16, 1e-4, "Adam"),
        (torch.bfloat16, 1e-8, "Adam"),
        (torch.float32, 1e-8, "Adam"),
    ],
)
def test_an_epsilon_that_is_0_in_the_format_of_the_weights_is_named(dtype, eps, kind):
    torch.manual_seed(0)
    model, found = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1)).to(dtype), []
    optimizer = getattr(torch.optim, kind)(model.parameters(), 1e-3, eps=eps)
    with gradwatch.watch(model, optimizer, sinks=[found.append], on_alert=lambda _: None):
        for _ in range(6):
            optimizer.zero_grad()
            (1e-3 * model(torch.randn(8, 6, dtype=dtype))).float().square().mean().backward()
            optimizer.step()
            finite = all(bool(p.isfinite().all()) for p in model.parameters())
    lost = bool(torch.tensor(eps, dtype=dtype) == 0)  # the truth
    assert lost == (not finite) == (dtype == torch.float16 and eps == 1e-8)
    codes = [a.finding.code for r in found for a in r.began if a.severity > gradwatch.Severity.INFO]
    if not lost:
        assert not {"GW501", "GW205"}.intersection(codes)
        return
    assert codes == ["GW501"]  # and nothing has grown
    (alert,) = alerts(found)
    assert (alert.finding.cause, alert.finding.evidence["when"]) == ("by_step", 0.0)
    assert f"at step 0 {kind} made weights NaN or infinite, of a gradient that was finite" in alert.cause
    assert "its eps of 1e-08 is 0 in float16" in alert.cause
    assert alert.remedy.startswith("keep the weights in float32")


def test_a_rate_without_end_is_named_at_its_step():
    model, found = around(torch.tanh), []
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with gradwatch.watch(model, optimizer, sinks=[found.append], on_alert=lambda _: None, **PROBED):
        for i in range(5):
            optimizer.param_groups[0]["lr"] = float("inf") if i == 3 else 1e-3
            optimizer.zero_grad()
            energy(model(batch())).backward()
            optimizer.step()
    (alert,) = alerts(found)
    assert (alert.finding.cause, alert.finding.evidence["when"]) == ("by_step", 3.0)
    assert "look at the learning rate, eps and weight decay of that step" in alert.remedy


# --- a loss that is not finite, and gradients that are ---


def losses_told(value_at, steps=40):
    """Train, and tell a loss that holds what `value_at` gives at a step, of which no derivative is taken."""
    torch.manual_seed(0)
    model, found = nn.Linear(4, 2), []
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    with gradwatch.watch(model, optimizer, sinks=[found.append], on_alert=lambda _: None) as watcher:
        for i in range(steps):
            loss = model(torch.randn(8, 4)).square().mean() + value_at(i)
            optimizer.zero_grad()
            loss.backward()
            assert all(bool(p.grad.isfinite().all()) for p in model.parameters())
            watcher.record(loss)
            optimizer.step()
    return alerts(found, "GW504")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_while_every_gradient_is_is_told(value):
    (alert,) = losses_told(lambda i: value if i >= 10 else 0.0)
    assert (alert.severity, alert.finding.place, alert.began) == (gradwatch.Severity.WARNING, "", 16)
    what = "NaN" if value != value else "infinite"  # noqa: PLR0124  (NaN is the number that is not itself)
    assert alert.message.startswith(f"the loss has been {what} at 4")
    assert alert.message.endswith("since step 10, and every gradient is finite")
    assert losses_told(lambda i: value if i % 2 else 0.0)  # each second batch has no target


def test_a_batch_without_a_target_now_and_then_is_not():
    assert losses_told(lambda i: float("nan") if i % 4 == 0 else 0.0) == []
