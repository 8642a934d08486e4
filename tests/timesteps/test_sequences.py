"""A watcher with a need: whose horizon is measured, what is said where it cannot be, and the same in Lightning."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gradwatch

STEPS = 40


class Readout(nn.Module):
    """A recurrent layer and a readout of its last step."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.head = nn.LSTM(4, 8, batch_first=True), nn.Linear(8, 1)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


class Pooled(Readout):
    """The same under a mean over time: the model sees all of it, whatever the layer remembers."""

    def forward(self, x):
        return self.head(self.rnn(x)[0].mean(1))


def train(model, steps=3, forward=None, **options):
    """Train a few steps, each a probe, and give the sequences of the last one and the watcher."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    watcher = gradwatch.watch(
        model, optimizer, every_n_steps=1, probe_every_n_steps=1, on_alert=lambda _: None, **options
    )
    for _ in range(steps):
        optimizer.zero_grad()
        (forward or model)(torch.randn(8, STEPS, 4)).pow(2).mean().backward()
        optimizer.step()
    return watcher.report.snapshot.sequences, watcher


def of(sequences, module, part=""):
    return next(s for s in sequences if (s.module, s.part) == (module, part))


def test_one_number_is_judged_by_the_memory_of_the_model():
    sequences, _ = train(Pooled(), horizon=30)
    model, rnn = of(sequences, "", "model"), of(sequences, "rnn")

    assert (model.need, rnn.need) == (30, None)
    assert (model.horizon, model.censored) == (STEPS, True)
    assert rnn.horizon < 30


def test_a_need_by_name_is_judged_by_the_memory_of_that_module():
    sequences, watcher = train(Pooled(), steps=6, horizon={"rnn": 30})

    assert of(sequences, "rnn").need == 30
    assert not any(s.part == "model" for s in sequences)
    assert [(a.finding.code, a.finding.place) for a in watcher.report.open] == [("GW301", "rnn")]


def test_a_module_that_cannot_be_walked_back_through_is_run_once_more_for_its_need():
    model = nn.Sequential(nn.Conv1d(4, 8, 3, padding=2), nn.Conv1d(8, 8, 3), nn.Flatten(), nn.LazyLinear(1))
    model(torch.randn(8, 4, STEPS))
    sequences, _ = train(model, forward=lambda x: model(x.transpose(1, 2)), timesteps={"0": 2}, horizon={"0": 3})
    convolution = of(sequences, "0")

    assert convolution.need == 3
    assert convolution.lag_gain is not None
    assert len(convolution.grad_input) == STEPS


def test_the_memory_of_the_model_is_that_of_the_outermost_call_where_its_own_forward_is_not_called():
    whole = nn.ModuleDict({"net": Readout()})
    sequences, watcher = train(whole, steps=6, forward=whole["net"], horizon=30)

    assert of(sequences, "", "model").horizon == pytest.approx(of(sequences, "net.rnn").horizon, abs=3)
    assert [(a.finding.code, a.finding.place) for a in watcher.report.open] == [("GW301", "net.rnn")]


def test_where_the_model_cannot_be_run_once_more_that_is_said_and_the_finding_is_info():
    class Once(Readout):
        asked = False

        def forward(self, x):
            if not self.asked:
                raise RuntimeError("not twice")
            self.asked = False
            return super().forward(x)

    model = Once()

    def ask(x):
        model.asked = True
        return model(x)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sequences, watcher = train(model, steps=7, forward=ask, horizon=30)
    found = of(sequences, "", "model")

    assert found.lag_gain is None
    assert "not twice" in found.note
    assert of(sequences, "rnn").lag_gain is not None
    assert watcher.report.open
    assert all(a.severity is gradwatch.Severity.INFO for a in watcher.report.open)


def test_what_fails_while_sequences_are_looked_at_warns_once_and_takes_nothing_from_the_rest(monkeypatch):
    from gradwatch.timesteps.recorder import Recorder

    def broken(*_):
        raise RuntimeError("broken")

    monkeypatch.setattr(Recorder, "left", broken)
    with pytest.warns(
        gradwatch.GradwatchWarning, match="a probe failed and is left out: RuntimeError: broken"
    ) as caught:
        _, watcher = train(Readout())

    assert [str(w.message) for w in caught if w.category is gradwatch.GradwatchWarning] == [
        "gradwatch: a probe failed and is left out: RuntimeError: broken"
    ]
    assert watcher.report.snapshot.step == 2
    assert all(n is not None for n in watcher.report.snapshot.norm)


def test_the_table_of_layers_says_how_far_back_it_learns_between_probes_too():
    model = Readout()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    watcher = gradwatch.watch(model, optimizer, every_n_steps=1, probe_every_n_steps=2, on_alert=lambda _: None)
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.randn(8, STEPS, 4)).pow(2).mean().backward()
        optimizer.step()

    assert watcher.report.snapshot.sequences is None
    assert repr(watcher).startswith("rnn learns from the last ")
    assert "rnn learns from the last " in watcher._repr_html_()


def test_a_check_of_one_batch_shows_how_far_back_it_learns_and_fails_for_no_short_memory():
    report = gradwatch.assert_healthy(Readout(), torch.randn(8, STEPS, 4))

    assert of(report.snapshot.sequences, "rnn").horizon < STEPS


@pytest.mark.parametrize("called", [True, False])
def test_the_callback_measures_the_memory_of_the_model_in_a_fit(called):
    from lightning.pytorch import LightningModule, Trainer

    from gradwatch.lightning import GradientMonitor

    class Net(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Readout()

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, _):
            return (self(batch[0]) if called else self.net(batch[0])).pow(2).mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1e-3)

    reports = []
    monitor = GradientMonitor(
        every_n_steps=1, probe_every_n_steps=1, horizon=30, sinks=[reports.append], on_alert=lambda _: None
    )
    data = DataLoader(TensorDataset(torch.randn(48, STEPS, 4)), batch_size=8)
    options = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    Trainer(max_epochs=1, accelerator="cpu", callbacks=[monitor], **options).fit(Net(), data)

    found = of(reports[-1].snapshot.sequences, "", "model")
    assert (found.need, found.length) == (30, STEPS)
    assert found.horizon < 30
    assert [(a.finding.code, a.finding.place) for a in reports[-1].open] == [("GW301", "net.rnn")]


class Pair(nn.Module):
    """Two recurrent parts, one after the other, or each on its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LSTM(4, 8, batch_first=True), nn.GRU(8, 8, batch_first=True)

    def forward(self, x):
        return self.second(self.first(x)[0])[0][:, -1]


@pytest.mark.parametrize("apart", [False, True], ids=["one backward pass", "in turn"])
def test_each_of_several_optimizers_is_told_of_the_modules_that_it_steps(apart):
    model = Pair()
    optimizers = [torch.optim.SGD(part.parameters(), lr=1e-3) for part in (model.first, model.second)]
    snapshots = []
    gradwatch.watch(
        model,
        optimizers,
        every_n_steps=1,
        probe_every_n_steps=1,
        horizon={"second": 5},
        sinks=[lambda r: snapshots.append(r.snapshot)],
        on_alert=lambda _: None,
    )
    for _ in range(3):
        x = torch.randn(8, STEPS, 4)
        for turn in [[o] for o in optimizers] if apart else [optimizers]:
            model.zero_grad()
            model(x).pow(2).mean().backward()
            for optimizer in turn:
                optimizer.step()

    for optimizer, name in enumerate(("first", "second")):
        sequences = [s.sequences for s in snapshots if s.optimizer == optimizer][-1]
        assert {s.module for s in sequences} == {name}
        assert of(sequences, name).grad_input is not None
        assert of(sequences, name, "l0").grad_hidden is not None
        assert of(sequences, name).need == (5 if name == "second" else None)


class Windows(nn.Module):
    """Puts older values beside each timestep before its recurrent layer, and is trained by a function of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.rnn, self.head = nn.Linear(4, 4), nn.LSTM(4, 8, batch_first=True), nn.Linear(8, 1)

    def predict(self, x):
        x = self.into(x)
        return self.head(self.rnn(x + x.roll(20, 1))[0][:, -1])

    forward = predict


def test_of_a_model_whose_parts_the_loop_calls_one_after_the_other_only_a_part_is_told_of():
    model = Windows()
    whole, watcher = train(model, 6, horizon=30)
    assert of(whole, "", "model").horizon > 20
    assert [(a.finding.code, a.severity) for a in watcher.report.open if a.finding.code == "GW301"] == []

    watcher.close()
    pieces, watcher = train(model, 6, forward=model.predict, horizon=30)
    part = of(pieces, "rnn", "model")
    assert (part.need, part.horizon < 20) == (30, True)
    (alert,) = [a for a in watcher.report.open if a.finding.code == "GW301"]
    assert alert.severity is gradwatch.Severity.INFO
    assert alert.message.startswith("rnn learns from the last")
    assert "the loop calls the parts of the model one after the other, rnn among them" in alert.message


def test_a_module_that_did_not_run_takes_nothing_else_along():
    class Spare(Readout):
        def __init__(self) -> None:
            super().__init__()
            self.spare = nn.GRU(4, 4)
            self.rnn = nn.Linear(4, 8)

        def forward(self, x):
            return self.head(self.rnn(x).cumsum(1)[:, -1])

    sequences, _ = train(Spare(), horizon=30)
    assert (of(sequences, "", "model").horizon, of(sequences, "spare").note) == (STEPS, "it did not run in this step")


def test_the_need_is_judged_by_the_data_and_not_by_what_enters_the_recurrent_layer():
    class Attending(Readout):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, dropout=0.0)

        def forward(self, x):
            return super().forward(self.layer(x))

    sequences, watcher = train(Attending(), 6, horizon=30)
    model = of(sequences, "", "model")
    assert (model.input, model.time, model.censored) == ("x", 1, True)
    assert [s.module for s in model.beside] == ["rnn"]
    assert [a for a in watcher.report.open if a.finding.code == "GW301"] == []


def test_time_of_an_input_may_be_said_to_a_watcher():
    class Flipped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(STEPS, 2)

        def forward(self, x):
            return self.head(x.transpose(1, 2))

    sequences, _ = train(Flipped(), horizon=30, timesteps={"x": 2})
    assert [(s.input, s.time, s.length) for s in sequences] == [("x", 2, 4)]
