"""What an alert says is wrong is measured, and what it says to do makes it go away: each kind, before and after."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn

import gradwatch
from gradwatch import Severity
from gradwatch.detectors import explain


def batch(step, rows=32, shift=0.0):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(rows, 8, generator=generator)
    return x + shift, x[:, :1] - 0.5 * x[:, 1:2]


def alerts(  # noqa: PLR0913  (the cases of a table)
    net,
    optimizer=None,
    *,
    steps=45,
    lr=0.02,
    shift=0.0,
    loss_scale=1.0,
    scaler=None,
    horizon=None,
    data=batch,
    criterion=nn.functional.mse_loss,
):
    """Train, and give the alerts that are open at the end or were, of warning and worse, the newest last."""
    optimizer = optimizer or torch.optim.SGD(net.parameters(), lr=lr)
    known = {}

    def note(report):
        known.update({a.finding.key: a for a in (*report.open, *report.cleared) if a.severity > Severity.INFO})

    with gradwatch.watch(
        net, optimizer, scaler=scaler, horizon=horizon, sinks=[note], on_alert=lambda _: None
    ) as watcher:
        for step in range(steps):
            optimizer.zero_grad()
            x, y = data(step, shift=shift) if shift else data(step)
            loss = criterion(net(x).float(), y) * loss_scale
            watcher.record(loss)
            (scaler.scale(loss) if scaler else loss).backward()
            if scaler:
                scaler.step(optimizer)
                scaler.update()
            else:
                optimizer.step()
    return list(known.values())


def chain(activation, depth=12, width=24, *, init=None):
    torch.manual_seed(0)
    layers = [nn.Linear(8, width), activation()]
    for _ in range(depth - 1):
        layers += [nn.Linear(width, width), activation()]
    net = nn.Sequential(*layers, nn.Linear(width, 1))
    if init is not None:
        for layer in net[::2]:
            init(layer.weight)
            nn.init.zeros_(layer.bias)
    return net


def of(found, code):
    return next(a for a in found if a.finding.code == code)


def codes(found):
    return {a.finding.code for a in found}


def he(weight):
    nn.init.kaiming_normal_(weight, nonlinearity="relu")


def test_sigmoids_and_weights_that_are_too_small_for_them():
    alert = of(alerts(chain(nn.Sigmoid)), "GW101")

    assert alert.finding.place == "0"
    assert "too small: gain 0.5" in alert.cause  # torch's own initialization: 1/sqrt(3)
    assert "the sigmoid after it needs 4" in alert.cause
    assert "ReLU in place of the sigmoids, with torch.nn.init.kaiming_normal_" in alert.remedy

    assert alerts(chain(nn.ReLU, init=he)) == []


def test_tanh_with_weights_that_are_too_small():
    small = lambda weight: nn.init.normal_(weight, std=0.02)
    alert = of(alerts(chain(nn.Tanh, init=small)), "GW101")

    assert "are too small" in alert.cause
    assert "the tanh after it needs 1.67" in alert.cause
    assert "torch.nn.init.xavier_normal_(weight, gain=5/3)" in alert.remedy

    assert alerts(chain(nn.Tanh, init=lambda weight: nn.init.xavier_normal_(weight, gain=5 / 3))) == []


def test_tanh_that_its_bias_saturates():
    def trained(*between):
        torch.manual_seed(0)
        layers = []
        for _ in range(6):
            layers += [nn.Linear(8, 8), *(kind(8) for kind in between), nn.Tanh()]
            nn.init.constant_(layers[-2 - len(between)].bias, 6.0)
        return alerts(nn.Sequential(*layers, nn.Linear(8, 1)), lr=1e-3)

    alert = of(trained(), "GW101")

    share = alert.finding.evidence["saturated"]
    assert share > 0.8
    assert f"{share:.0%} of the tanh outputs after {alert.finding.names['at']} are saturated" in alert.cause
    assert "normalization before its tanh" in alert.remedy

    assert trained(nn.LayerNorm) == []


def test_an_input_that_is_not_standardized():
    torch.manual_seed(0)
    net = chain(nn.ReLU, depth=2)
    with torch.no_grad():
        net[0].weight.copy_(-net[0].weight.abs())
    alert = of(alerts(net, lr=1e-4, shift=300.0), "GW601")

    assert alert.finding.place == "0"
    assert alert.finding.evidence["offset"] == pytest.approx(300, rel=0.15)
    assert "the input of 0 is off-centre: its mean is" in alert.cause
    assert "standardize the input of 0" in alert.remedy

    assert "GW601" not in codes(alerts(net, lr=1e-2, shift=0.0))


def test_a_bias_that_silences_a_layer():
    def made(bias):
        net = chain(nn.ReLU, depth=3, init=he)
        nn.init.constant_(net[2].bias, bias)
        return net

    found = alerts(made(-12.0))
    alert = of(found, "GW601")

    assert "24 of the 24 units of 2 are dead" in alert.message
    assert alert.cause == "its bias alone keeps 100% of them below zero"
    assert "set the bias of 2 to zero (torch.nn.init.zeros_)" in alert.remedy

    assert alerts(made(0.0)) == []


def test_an_update_that_kills_a_layer():
    def trained(times):
        net = chain(nn.ReLU, depth=2, init=he)

        class Kicked(torch.optim.SGD):
            steps = 0

            def step(self, closure=None):
                super().step(closure)
                if self.steps == 30:
                    with torch.no_grad():
                        net[2].weight.sub_(times * net[2].weight.abs())  # its input is never negative
                self.steps += 1

        return alerts(net, Kicked(net.parameters(), lr=0.01), steps=90)

    alert = of(trained(3.0), "GW601")

    assert alert.finding.place == "2"
    assert "at step 30 an update changed the weights of 2 by 3 times their own size" in alert.cause
    assert "clip the gradient norm, or lower the learning rate or warm it up" in alert.remedy
    assert 30 < alert.finding.onset <= 50

    assert trained(0.0) == []


def test_weights_that_are_too_large():
    def trained(init):
        return alerts(chain(nn.ReLU, depth=10, init=init), lr=1e-3)

    found = [a for a in trained(lambda weight: nn.init.normal_(weight, std=1.5)) if a.finding.kind == "exploding"]

    assert found
    assert "times as large as its activation needs: gain" in found[0].cause
    assert "those of all layers together make the signal" in found[0].cause
    assert "torch.nn.init.kaiming_normal_" in found[0].remedy

    assert trained(he) == []


@pytest.mark.parametrize("times", [2.0, 3.0, 5.0])
@pytest.mark.parametrize("criterion", [nn.functional.mse_loss, nn.functional.l1_loss])
def test_weights_a_few_times_too_large_in_each_of_many_layers(times, criterion):
    def trained(init):
        net = chain(nn.ReLU, depth=12, width=64, init=init)
        return alerts(net, torch.optim.Adam(net.parameters(), lr=1e-3), criterion=criterion)

    def large(weight):
        he(weight)
        weight.data.mul_(times)

    alert = of(trained(large), "GW206")  # though the loss comes down, by orders of magnitude

    assert alert.began <= 10
    assert alert.finding.onset == 1
    assert math.log(alert.finding.evidence["growth"]) == pytest.approx(11 * math.log(times), rel=0.1)
    assert "times as large as its activation needs" in alert.cause
    assert "those of all layers together make the signal" in alert.cause
    assert "torch.nn.init.kaiming_normal_" in alert.remedy

    assert trained(he) == []


def test_residual_branches_that_add_up():
    class Blocks(nn.Module):
        def __init__(self, share):
            super().__init__()
            torch.manual_seed(0)
            self.enter, self.head, self.share = nn.Linear(8, 24), nn.Linear(24, 1), share
            self.blocks = nn.ModuleList(
                nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 24)) for _ in range(20)
            )
            for layer in self.modules():
                if isinstance(layer, nn.Linear):
                    he(layer.weight)

        def forward(self, x):
            x = self.enter(x)
            for block in self.blocks:
                x = x + self.share * block(x)
            return self.head(x)

    def trained(share):
        net = Blocks(share)
        return alerts(net, torch.optim.Adam(net.parameters(), lr=1e-3))

    alert = of(trained(1.0), "GW206")

    assert alert.cause == "cause not found"  # each weight by itself is of the right size
    assert "scale what residual branches add (1/sqrt of their number)" in alert.remedy

    assert trained(20**-0.5) == []


def test_a_recurrent_network_that_begins_exploded():
    def made(init):
        torch.manual_seed(0)
        net = Recurrent(nn.RNN(4, 32, batch_first=True, nonlinearity="relu"))
        init(net.rnn.weight_hh_l0)
        return net

    def expanding(weight):
        with torch.no_grad():
            weight.normal_()
            weight.mul_(1.5 / torch.linalg.eigvals(weight).abs().max())

    def orthogonal(weight):
        nn.init.orthogonal_(weight)

    def data(step):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(32, 100, 4, generator=generator)
        return x, x[:, -1, :1] + 0.5 * x[:, -3, 1:2]

    def trained(init):
        net = made(init)
        return alerts(net, torch.optim.Adam(net.parameters(), lr=1e-3), data=data, steps=25)

    alert = of(trained(expanding), "GW207")
    net, (x, y) = made(expanding).double(), data(0)
    loss = nn.functional.mse_loss(net(x.double()), y.double())
    loss.backward()
    weights = (net.rnn.weight_hh_l0, net.rnn.weight_ih_l0)
    truth = math.hypot(*((w.grad.norm() * w.norm()).item() for w in weights)) / loss.item()

    assert (alert.finding.place, alert.finding.onset) == ("rnn", 0)
    assert alert.finding.evidence["sensitivity"] == pytest.approx(truth, rel=1e-3)
    assert truth > 1000
    assert alert.cause.startswith("the spectral radius of W_hh is 1.5")
    assert "torch.nn.init.orthogonal_" in alert.remedy

    assert trained(orthogonal) == []


def test_a_first_step_that_throws_the_weights():
    def trained(lr):
        net = chain(nn.ReLU, depth=4, width=64, init=he)
        return alerts(net, torch.optim.Adam(net.parameters(), lr=lr), steps=30)

    alert = of(trained(1.0), "GW203")

    assert alert.severity is Severity.ERROR
    assert alert.finding.onset == 1  # the first loss that the step of 0 has spoilt
    assert "at step 0 an update changed the weights of" in alert.cause
    assert "lower the learning rate or warm it up" in alert.remedy

    assert of(trained(10.0), "GW202").began == 0
    assert trained(1e-3) == []


def test_a_learning_rate_that_is_too_large():
    found = alerts(chain(nn.Tanh, depth=2, init=nn.init.xavier_normal_), lr=200.0)
    alert = of(found, "GW202")

    assert "the learning rate is too large for these gradients" in alert.cause
    factor = float(alert.remedy.split("lower the learning rate of 0 by a factor of ")[1].split(",")[0])

    assert alerts(chain(nn.Tanh, depth=2, init=nn.init.xavier_normal_), lr=200.0 / factor) == []


class Cut(nn.Module):
    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.head, self.how = nn.Sequential(nn.Linear(8, 16), nn.Tanh()), nn.Linear(16, 1), how

    def forward(self, x):
        if self.how == "no_grad":
            with torch.no_grad():
                return self.head(self.encoder(x))
        code = self.encoder(x)
        if self.how == "unused":
            return self.head(torch.zeros_like(code))
        return self.head({"detach": code.detach, "round": code.detach().round, "kept": lambda: code}[self.how]())


def test_a_graph_that_is_cut_between_two_modules():
    for how in ("detach", "round"):
        alert = of(alerts(Cut(how)), "GW401")
        assert alert.cause == (
            "the gradient comes back to head and ends there: "
            "the output of encoder has a graph, and head uses none of it"
        )
        assert "look between encoder and head for detach()" in alert.remedy

    assert alerts(Cut("kept")) == []


def test_a_graph_that_is_cut_inside_of_a_module():
    class Inside(Cut):
        def forward(self, x):
            with torch.no_grad():
                code = self.encoder(x)
            return self.head(code)

    alert = of(alerts(Inside("kept")), "GW401")

    assert alert.cause == "the gradient comes back to head and ends there: the output of encoder has no graph"
    of_the_root = dataclasses.replace(alert.finding, names={**alert.finding.names, "reached": ""})
    assert explain(of_the_root).cause.startswith("the gradient comes back to the model and ends there")
    assert "look inside encoder for torch.no_grad() or detach()" in alert.remedy


def test_two_graphs_that_are_cut_are_told_apart():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Sequential(nn.Linear(8, 8), nn.Tanh()), nn.Linear(8, 8)
            self.c, self.d = nn.Sequential(nn.Linear(8, 8), nn.Tanh()), nn.Linear(8, 1)

        def forward(self, x):
            middle = self.b(self.a(x).detach()).tanh()
            with torch.no_grad():
                code = self.c(x)
            return self.d(middle + code)

    causes = {a.finding.place: a.cause for a in alerts(Two()) if a.finding.code == "GW401"}

    assert causes == {
        "a.0": "the gradient comes back to b and ends there: the output of a has a graph, and b uses none of it",
        "c.0": "the gradient comes back to d and ends there: the output of c has no graph",
    }


def test_a_cause_that_was_not_measured_is_not_made_up():
    class Masked(Cut):
        def forward(self, x):
            return self.head(self.encoder(x) * 0.0 + x.new_ones(16))

    alert = of(alerts(Masked("kept")), "GW401")

    assert alert.cause == "cause not found"


def test_a_derivative_that_does_not_exist():
    class Distance(nn.Module):
        def __init__(self, eps):
            super().__init__()
            torch.manual_seed(0)
            self.layer, self.eps = nn.Linear(8, 1), eps

        def forward(self, x):
            return (self.layer(x) - self.layer(x)).square().add(self.eps).sqrt() + self.layer(x)

    alert = of(alerts(Distance(0.0)), "GW501")

    assert "the loss is finite, its derivative is not" in alert.cause
    assert "add an epsilon there" in alert.remedy

    assert alerts(Distance(1e-8)) == []


class Half(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = chain(nn.ReLU, depth=4, width=48, init=he)

    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.float16):
            return self.net(x).float()


def test_a_gradient_that_float16_flushes():
    net = Half()
    found = alerts(net, torch.optim.SGD(net.parameters(), lr=2e2), loss_scale=1e-6)
    alert = of(found, "GW701")

    assert "computed in float16" in alert.cause
    assert "scale the loss (torch.amp.GradScaler)" in alert.remedy
    assert all("float16" in a.cause for a in found)  # what follows from it says so

    net = Half()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
    assert alerts(net, torch.optim.SGD(net.parameters(), lr=2e2), loss_scale=1e-6, scaler=scaler) == []


def test_updates_that_bfloat16_rounds_away():
    def trained(dtype):
        net = chain(nn.ReLU, depth=3, init=he).to(dtype)
        return alerts(
            net,
            lr=1e-3,
            data=lambda step: tuple(t.to(dtype) for t in batch(step)),
            criterion=lambda out, y: (out - y.float()).square().mean(),
        )

    alert = of(trained(torch.bfloat16), "GW702")

    assert "less than bfloat16 can add to a weight of their size (8 bits)" in alert.cause
    assert "keep the weights in float32" in alert.remedy

    assert trained(torch.float32) == []


def test_a_gradient_below_the_optimizers_epsilon():
    def trained(eps):
        net = chain(nn.ReLU, depth=3, init=he)
        return alerts(net, torch.optim.Adam(net.parameters(), lr=1e-3, eps=eps), loss_scale=1e-10)

    alert = of(trained(1e-8), "GW703")
    said = float(alert.remedy.split("eps=")[1].split(" ")[0])

    assert "epsilon divides in place of the gradient's own size" in alert.cause
    assert "GW703" not in codes(trained(said))


def sequences(step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(16, 60, 4, generator=generator)
    return x, x[:, 5, :1]


class Recurrent(nn.Module):
    def __init__(self, rnn):
        super().__init__()
        self.rnn, self.head = rnn, nn.Linear(rnn.hidden_size, 1)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


LENGTH = 50


def adding(step):
    """Draw the adding problem: the sum of two marked numbers, both in the older half of the sequence."""
    generator = torch.Generator().manual_seed(step)
    x, rows = torch.zeros(32, LENGTH, 2), torch.arange(32)
    x[:, :, 0] = torch.rand(32, LENGTH, generator=generator) * 2 - 1
    first = torch.randint(0, LENGTH // 10, (32,), generator=generator)
    second = torch.randint(LENGTH // 10, LENGTH // 2, (32,), generator=generator)
    x[rows, first, 1] = x[rows, second, 1] = 1.0
    return x, ((x[rows, first, 0] + x[rows, second, 0]) / 4).unsqueeze(1)


def cue(step):
    """Draw the sign of the first of 50 timesteps, and noise of the same size after it."""
    x = torch.randint(0, 2, (32, LENGTH, 1), generator=torch.Generator().manual_seed(step)) * 2.0 - 1.0
    marks = torch.zeros(32, LENGTH, 2)
    marks[:, 0, 0] = marks[:, -1, 1] = 1.0
    return torch.cat([x, marks], -1), x[:, 0]


def remembering(rnn, data, *, steps=300, lr=1e-2):
    """Train one recurrent layer, watched; give its warnings and the mean of the last losses."""
    torch.manual_seed(0)
    net, losses = Recurrent(rnn), []
    optimizer = torch.optim.Adam(net.parameters(), lr=lr)

    def criterion(out, y):
        loss = nn.functional.mse_loss(out, y)
        losses.append(loss.item())
        return loss

    def clip(*_):
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)

    optimizer.register_step_pre_hook(clip)
    found = alerts(net, optimizer, horizon=LENGTH, data=data, steps=steps, criterion=criterion)
    return found, sum(losses[-20:]) / 20


def layer(kind, inputs, *biases, **options):
    """Build a recurrent layer with these biases of its first gates, in torch's order; None leaves one as it is."""
    torch.manual_seed(0)
    rnn = kind(inputs, 24, batch_first=True, **options)
    with torch.no_grad():
        for gate, bias in enumerate(biases):
            if bias is not None:
                rnn.bias_ih_l0[24 * gate : 24 * (gate + 1)] = bias
                rnn.bias_hh_l0[24 * gate : 24 * (gate + 1)] = 0.0
    return rnn


def test_an_lstm_whose_horizon_is_too_short():
    bias = math.log(LENGTH)
    found, loss = remembering(layer(nn.LSTM, 2), adding)
    alert = of(found, "GW301")

    assert "its forget gates keep 0." in alert.cause
    assert "set the forget-gate bias of rnn to 3.9 (the log of 50) and the input-gate bias to -3.9; or" in alert.remedy
    assert loss > 0.03

    found, loss = remembering(layer(nn.LSTM, 2, -bias, bias), adding)

    assert found == []
    assert loss < 0.003


def test_an_lstm_whose_open_cell_adds_everything_up():
    found, loss = remembering(layer(nn.LSTM, 2, None, math.log(LENGTH)), adding, steps=150)
    alert = of(found, "GW305")

    assert "its forget gates keep 0.98 of the cell" in alert.cause
    assert "adds up and saturates" in alert.cause
    assert alert.remedy.startswith("set the input-gate bias of rnn to -3.9")
    assert loss > 0.02  # and the biases that it would then have are those of the test before


def test_a_gru_whose_horizon_is_too_short():
    found, loss = remembering(layer(nn.GRU, 2), adding)
    alert = of(found, "GW301")

    assert "set the update-gate bias of rnn to 3.9 (the log of 50); or" in alert.remedy
    assert loss > 0.03

    found, loss = remembering(layer(nn.GRU, 2, None, math.log(LENGTH)), adding)

    assert found == []
    assert loss < 0.003


@pytest.mark.parametrize(
    ("nonlinearity", "matrix", "remedy"),
    [("tanh", nn.init.orthogonal_, "an orthogonal matrix"), ("relu", nn.init.eye_, "the identity matrix")],
)
def test_an_rnn_whose_horizon_is_too_short(nonlinearity, matrix, remedy):
    rnn = layer(nn.RNN, 3, nonlinearity=nonlinearity)
    found, loss = remembering(rnn, cue, lr=3e-3)

    assert f"initialize weight_hh of rnn as {remedy}" in of(found, "GW301").remedy
    assert loss > 0.8

    rnn.reset_parameters()
    matrix(rnn.weight_hh_l0)
    nn.init.zeros_(rnn.bias_ih_l0)
    nn.init.zeros_(rnn.bias_hh_l0)
    found, loss = remembering(rnn, cue, lr=3e-3)

    assert found == []
    assert loss < 0.05


def test_an_rnn_whose_gradient_grows_through_time():
    def trained(init):
        torch.manual_seed(0)
        net = Recurrent(nn.RNN(4, 16, batch_first=True, nonlinearity="relu"))
        init(net.rnn.weight_hh_l0)
        return [a for a in alerts(net, lr=0.0, data=sequences, steps=35) if a.finding.code == "GW302"]

    (alert,) = trained(lambda weight: weight.data.copy_(1.5 * torch.eye(16)))

    assert "the spectral radius of W_hh is 1.5" in alert.cause
    assert "torch.nn.init.orthogonal_" in alert.remedy

    assert trained(nn.init.orthogonal_) == []
