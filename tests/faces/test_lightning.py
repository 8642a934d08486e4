"""The callback under real Trainers of both packages, against what the LightningModule itself saw at each step."""

from __future__ import annotations

import copy
import csv
import importlib
import inspect
import logging
import math
import pickle
import signal

import pytest
import torch
from leftovers import left_behind
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.nn import functional
from truth import by_hand

import gradwatch
from gradwatch import GradientHealthError, Severity, Thresholds
from gradwatch.lightning import GradientMonitor

BATCHES = 6


@pytest.fixture(params=["lightning.pytorch", "pytorch_lightning"])
def pl(request):
    """Return the package under either of its names; a Trainer of one refuses the other's classes."""
    logging.getLogger(request.param).setLevel(logging.ERROR)
    return importlib.import_module(request.param)


def small():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))


def sick():
    torch.manual_seed(1)
    deep = [m for _ in range(19) for m in (nn.Linear(8, 8), nn.Sigmoid())]
    return nn.Sequential(nn.Linear(5, 8), nn.Sigmoid(), *deep, nn.Linear(8, 3))


def loader(batches=BATCHES, *, same=False):
    generator = torch.Generator().manual_seed(2)
    inputs, targets = torch.randn(4 * batches, 5, generator=generator), torch.randn(4 * batches, 3, generator=generator)
    if same:
        inputs, targets = inputs[:4].repeat(batches, 1), targets[:4].repeat(batches, 1)
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(inputs, targets), batch_size=4, shuffle=False)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.05)


def make(pl, net=None, *, optimizer=sgd, **methods):
    """Make a LightningModule that writes down what it sees; `methods` replace its own."""

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net if net is not None else small()
            self.before, self.after, self.returned, self.ran = [], [], [], 0

        def loss(self, batch):
            return functional.mse_loss(self.net(batch[0]), batch[1])

        def training_step(self, batch, _index):
            self.ran += 1
            loss = self.loss(batch)
            self.returned.append(loss.item())
            self.log("train_loss", loss)
            return loss

        def configure_optimizers(self):
            return optimizer(self.parameters())

        def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
            self.before.append(by_hand(self))
            self.clip_gradients(
                optimizer, gradient_clip_val=gradient_clip_val, gradient_clip_algorithm=gradient_clip_algorithm
            )
            self.after.append(by_hand(self))

    for name, method in methods.items():
        setattr(Module, name, method)
    return Module()


def trainer(pl, root, *callbacks, **options):
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    fixed = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
        "default_root_dir": root,
    }
    return pl.Trainer(callbacks=list(callbacks), **{**quiet, **fixed, **options})


def watched(**options):
    reports = []
    return GradientMonitor(sinks=[reports.append], **options), reports


def measured(report):
    """Return the norms of a report by name, None left out."""
    snapshot = report.snapshot
    return {p.name: n for p, n in zip(snapshot.model.parameters, snapshot.norm, strict=True) if n is not None}


def assert_norms(reports, truth):
    assert len(reports) == len(truth)
    for report, expected in zip(reports, truth, strict=True):
        assert measured(report) == pytest.approx(expected, rel=1e-6, abs=0)


def total(of):
    return math.hypot(*of.values())


def events(path):
    accumulator = EventAccumulator(
        str(path), size_guidance=dict.fromkeys(("scalars", "images", "histograms", "tensors"), 0)
    )
    accumulator.Reload()
    return accumulator


# --- the numbers ---


def test_the_norms_are_those_before_clipping_and_the_clip_factor_is_what_clipping_did(pl, tmp_path):
    callback, reports = watched()
    module = make(pl)
    trainer(pl, tmp_path, callback, gradient_clip_val=0.3).fit(module, loader())
    assert_norms(reports, module.before)
    for report, before, after in zip(reports, module.before, module.after, strict=True):
        assert report.snapshot.stage == "before_clip"
        assert total(after) < 0.9 * total(before)  # or the clip has done nothing, and the test sees nothing
        assert report.snapshot.clip_factor == pytest.approx(total(after) / total(before), rel=1e-6)


def test_without_clipping_the_clip_factor_is_one(pl, tmp_path):
    callback, reports = watched()
    trainer(pl, tmp_path, callback).fit(make(pl), loader(2))
    assert [r.snapshot.clip_factor for r in reports] == pytest.approx([1.0, 1.0], rel=1e-12)


def test_accumulated_batches_give_one_snapshot_with_the_accumulated_norm_and_the_mean_of_their_losses(pl, tmp_path):
    callback, reports = watched()
    module = make(pl)
    trainer(pl, tmp_path, callback, accumulate_grad_batches=4).fit(module, loader(6))  # 4 and then 2
    assert_norms(reports, module.before)
    mean = [sum(module.returned[:4]) / 4, sum(module.returned[4:]) / 2]
    assert [r.snapshot.loss for r in reports] == pytest.approx(mean, rel=1e-6)
    assert [r.snapshot.step for r in reports] == [0, 1]


def test_the_loss_is_the_one_that_training_step_returned(pl, tmp_path):
    callback, reports = watched()
    module = make(pl)
    trainer(pl, tmp_path, callback).fit(module, loader())
    assert [r.snapshot.loss for r in reports] == pytest.approx(module.returned, rel=1e-6)


def test_a_loss_in_a_dictionary_is_found(pl, tmp_path):
    callback, reports = watched()
    module = make(pl, training_step=lambda self, batch, _: {"loss": self.loss(batch) + 40, "other": 1})
    trainer(pl, tmp_path, callback).fit(module, loader(2))
    assert all(40 < r.snapshot.loss < 50 for r in reports)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_x_axis_is_that_of_self_log(pl, tmp_path, accumulate):
    callback, reports = watched()
    module = make(pl)
    logger = pl.loggers.TensorBoardLogger(tmp_path, name="", version="")
    trainer(pl, tmp_path, callback, logger=logger, max_epochs=2, accumulate_grad_batches=accumulate).fit(
        module, loader()
    )
    file = events(tmp_path)
    logged, ours = file.Scalars("train_loss"), file.Scalars("gradwatch/norm_global")
    assert (
        [e.step for e in ours]
        == [e.step for e in logged]
        == [r.snapshot.step for r in reports]
        == list(range(2 * BATCHES // accumulate))
    )
    assert [e.value for e in ours] == pytest.approx([math.log10(total(b)) for b in module.before], rel=1e-5)
    if accumulate == 1:  # the values belong to the same batches
        assert [e.value for e in logged] == pytest.approx([r.snapshot.loss for r in reports], rel=1e-5)


def test_validation_between_the_steps_changes_nothing(pl, tmp_path):
    class TwoHeads(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(1)
            self.body, self.head, self.other = nn.Linear(5, 7), nn.Linear(7, 3), nn.Linear(7, 3)

        def forward(self, x):
            return (self.head if self.training else self.other)(torch.tanh(self.body(x)))

    callback, reports = watched()
    module = make(pl, TwoHeads(), validation_step=lambda self, batch, _: self.log("val", self.loss(batch)))
    trainer(pl, tmp_path, callback, val_check_interval=1, num_sanity_val_steps=2).fit(module, loader(), loader(2))
    assert_norms(reports, module.before)
    assert [r.snapshot.step for r in reports] == list(range(BATCHES))
    last = reports[-1].snapshot
    assert {p.layer: a for p, a in zip(last.model.parameters, last.absent, strict=True)} == {
        "net.body": None,
        "net.head": None,
        "net.other": "unused",
    }
    assert {layer.name: layer.order for layer in last.model.layers} == {"net.body": 0, "net.head": 1, "net.other": None}


def manual(self, batch, _index):
    for k, optimizer in enumerate(opts if isinstance(opts := self.optimizers(), list) else [opts]):
        part = self.net[k] if isinstance(self.net, nn.ModuleList) else self.net
        optimizer.zero_grad()
        loss = functional.mse_loss(part(batch[0]), batch[1]) * (k + 1)
        self.manual_backward(loss)
        self.clip_gradients(optimizer, gradient_clip_val=0.2, gradient_clip_algorithm="norm")
        names = {id(p): name for name, p in self.named_parameters()}
        self.before.append(
            {names[id(p)]: p.grad.double().norm().item() for group in optimizer.param_groups for p in group["params"]}
        )
        self.returned.append(loss.item())
        optimizer.step()


def test_under_manual_optimization_the_numbers_are_what_the_optimizer_gets(pl, tmp_path):
    callback, reports = watched()
    module = make(pl, training_step=manual)
    module.automatic_optimization = False
    trainer(pl, tmp_path, callback).fit(module, loader())
    assert_norms(reports, module.before)
    assert {r.snapshot.stage for r in reports} == {"applied"}
    assert [r.snapshot.loss for r in reports] == pytest.approx(module.returned, rel=1e-6)
    assert [r.snapshot.step for r in reports] == list(range(BATCHES))


def test_each_of_two_manual_optimizers_reports_its_own_parameters_at_the_step_of_the_batch(pl, tmp_path):
    callback, reports = watched()
    module = make(
        pl,
        nn.ModuleList([small(), small()]),
        training_step=manual,
        configure_optimizers=lambda self: [sgd(self.net[0].parameters()), torch.optim.Adam(self.net[1].parameters())],
    )
    module.automatic_optimization = False
    trainer(pl, tmp_path, callback).fit(module, loader())
    assert_norms(reports, module.before)
    assert [r.snapshot.optimizer for r in reports] == [0, 1] * BATCHES
    assert [r.snapshot.step for r in reports] == [step for step in range(BATCHES) for _ in range(2)]
    assert [r.snapshot.loss for r in reports] == pytest.approx(module.returned, rel=1e-6)
    assert [o.kind for o in reports[0].snapshot.model.optimizers] == ["SGD", "Adam"]


def test_two_manual_optimizers_behind_one_backward_both_have_its_loss(pl, tmp_path):
    def training_step(self, batch, _index):
        loss = self.loss(batch)
        self.returned.append(loss.item())
        self.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()

    callback, reports = watched()
    module = make(
        pl,
        training_step=training_step,
        configure_optimizers=lambda self: [sgd(self.net[0].parameters()), sgd(self.net[2].parameters())],
    )
    module.automatic_optimization = False
    trainer(pl, tmp_path, callback).fit(module, loader())
    assert [r.snapshot.optimizer for r in reports] == [0, 1] * BATCHES
    assert [r.snapshot.loss for r in reports] == pytest.approx(
        [loss for loss in module.returned for _ in range(2)], rel=1e-6
    )


def test_a_step_of_lbfgs_is_one_snapshot_of_its_first_evaluation(pl, tmp_path):
    callback, reports = watched()
    first = []

    def training_step(self, batch, index):
        loss = self.loss(batch)
        if len(first) == index:
            first.append(loss.item())
        self.ran += 1
        return loss

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        if len(self.before) < len(first):
            self.before.append(by_hand(self))

    module = make(
        pl,
        optimizer=lambda p: torch.optim.LBFGS(p, lr=0.3, max_iter=4),
        training_step=training_step,
        configure_gradient_clipping=configure_gradient_clipping,
    )
    trainer(pl, tmp_path, callback).fit(module, loader(3))
    assert module.ran > 6
    assert_norms(reports, module.before)
    assert [r.snapshot.loss for r in reports] == pytest.approx(first, rel=1e-6)
    assert [r.snapshot.step for r in reports] == [0, 1, 2]


def fit_mixed(pl, root, optimizer, init_scale, batches=8):
    """Fit in float16 with a real GradScaler.

    Return the reports, and for each batch the true norms and whether the weights moved.
    """
    precision = importlib.import_module(f"{pl.__name__}.plugins.precision")
    scaler = torch.amp.GradScaler("cpu", init_scale=init_scale)
    handled = getattr(optimizer([nn.Parameter(torch.zeros(1))]), "_step_supports_amp_scaling", False)
    moved, truth = [], []

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        truth.append({name: n / (scaler.get_scale() if handled else 1.0) for name, n in by_hand(self).items()})

    class Moved(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, *_):
            self.weights = [p.detach().clone() for p in pl_module.parameters()]

        def on_train_batch_end(self, trainer, pl_module, *_):
            moved.append(any(not torch.equal(a, b) for a, b in zip(self.weights, pl_module.parameters(), strict=True)))

    callback, reports = watched()
    module = make(pl, optimizer=optimizer, configure_gradient_clipping=configure_gradient_clipping)
    plugin = precision.MixedPrecision("16-mixed", "cpu", scaler=scaler)
    trainer(pl, root, callback, Moved(), plugins=[plugin]).fit(module, loader(batches))
    return module, reports, truth, moved


OPTIMIZERS = {"sgd": sgd, "fused adam": lambda p: torch.optim.Adam(p, lr=1e-3, fused=True)}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_under_a_scaler_norms_and_loss_are_unscaled(pl, tmp_path, optimizer):
    module, reports, truth, moved = fit_mixed(pl, tmp_path, optimizer, 1024.0)
    assert all(moved)
    assert_norms(reports, truth)
    assert [r.snapshot.loss for r in reports] == pytest.approx(module.returned, rel=1e-5)
    assert not any(r.snapshot.skipped for r in reports)


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_an_overflow_is_a_skipped_snapshot_and_no_alert(pl, tmp_path, optimizer):
    _, reports, _, moved = fit_mixed(pl, tmp_path, optimizer, 2.0**19)
    assert True in moved
    assert False in moved
    assert [not r.snapshot.skipped for r in reports] == moved
    assert [r.snapshot.step for r in reports] == list(range(8))
    assert not any(r.open for r in reports)


def test_a_last_step_that_overflows_is_not_lost(pl, tmp_path):
    _, reports, _, moved = fit_mixed(pl, tmp_path, sgd, 2.0**40, batches=2)
    assert moved == [False, False]
    assert [r.snapshot.skipped for r in reports] == [True, True]


@pytest.mark.filterwarnings("ignore:.*returned `None`.*")
def test_a_batch_whose_training_step_returns_none_gives_no_record(pl, tmp_path):
    callback, reports = watched()

    def training_step(self, batch, index):
        return None if index in (0, 3) else self.loss(batch)

    module = make(pl, training_step=training_step)
    trainer(pl, tmp_path, callback).fit(module, loader())
    assert [r.snapshot.step for r in reports] == [1, 2, 4, 5]
    assert_norms(reports, [truth for truth in module.before if truth])


def test_layers_made_in_configure_model_are_watched_from_the_first_step(pl, tmp_path):
    callback, reports = watched()

    def configure_model(self):
        if isinstance(self.net, nn.Identity):
            self.net = small()

    module = make(pl, nn.Identity(), configure_model=configure_model)
    trainer(pl, tmp_path, callback).fit(module, loader(3))
    assert_norms(reports, module.before)
    assert [layer.name for layer in reports[0].snapshot.model.layers] == ["net.0", "net.2"]


def test_training_is_bitwise_that_without_the_callback(pl, tmp_path):
    def fitted(*callbacks):
        torch.manual_seed(5)
        net = nn.Sequential(nn.Linear(5, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Dropout(0.3), nn.Linear(9, 3))
        module = make(pl, net, optimizer=lambda p: torch.optim.AdamW(p, lr=0.01))
        run = trainer(pl, tmp_path, *callbacks, max_epochs=2, gradient_clip_val=0.4)
        run.fit(module, loader(5))
        state = [t for values in run.optimizers[0].state_dict()["state"].values() for t in values.values()]
        return [
            *module.state_dict().values(),
            *state,
            torch.get_rng_state(),
            torch.tensor(module.returned, dtype=torch.float64),
        ]

    callback, reports = watched(probe_every_n_steps=1, every_n_steps=1)
    plain, seen = fitted(), fitted(callback)
    assert len(reports) == 10
    assert all(torch.equal(a, b) for a, b in zip(plain, seen, strict=True))


# --- loggers ---


def test_a_tensorboard_logger_gets_all_in_its_own_file_and_the_record_lies_beside(pl, tmp_path):
    logger = pl.loggers.TensorBoardLogger(tmp_path, name="", version="")
    trainer(pl, tmp_path, GradientMonitor(), logger=logger).fit(make(pl, sick()), loader(24))
    (file,) = tmp_path.rglob("*tfevents*")
    assert file.parent == tmp_path
    seen = events(file)
    tags = seen.Tags()
    assert "train_loss" in tags["scalars"]
    assert {
        "gradwatch/norm_global",
        "gradwatch_norm/net.0",
        "gradwatch_sensitivity/net.0",
        "gradwatch_update/net.0",
    } <= set(tags["scalars"])
    assert tags["images"] == ["gradwatch_heatmap/layers"]
    assert seen.Images("gradwatch_heatmap/layers")[-1].encoded_image_string.startswith(b"\x89PNG")
    assert tags["histograms"] == ["gradwatch_profile/layers"]
    (alert,) = seen.Tensors("gradwatch/alerts/text_summary")
    assert "GW101" in alert.tensor_proto.string_val[0].decode()
    run = gradwatch.read_run(tmp_path / "gradwatch")
    assert [s.step for s in run.snapshots] == list(range(24))
    assert [a.finding.code for a in run.alerts] == ["GW101"]
    assert seen.Scalars("gradwatch_norm/net.0")[0].value == pytest.approx(
        math.log10(
            math.hypot(
                *(n for n, p in zip(run.snapshots[0].norm, run.models[0].parameters, strict=True) if p.layer == "net.0")
            )
        ),
        rel=1e-5,
    )


def test_a_csv_logger_gets_the_scalars(pl, tmp_path):
    logger = pl.loggers.CSVLogger(tmp_path, name="", version="v")
    module = make(pl)
    trainer(pl, tmp_path, GradientMonitor(), logger=logger).fit(module, loader())
    with (tmp_path / "v" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["gradwatch/norm_global"]]
    assert [int(row["step"]) for row in rows] == list(range(BATCHES))
    assert [float(row["gradwatch/norm_global"]) for row in rows] == pytest.approx(
        [math.log10(total(b)) for b in module.before], rel=1e-6
    )
    assert len(gradwatch.read_run(tmp_path / "v").snapshots) == BATCHES


def test_of_two_loggers_each_gets_its_share_and_the_record_lies_with_the_first(pl, tmp_path):
    table = pl.loggers.CSVLogger(tmp_path / "csv", name="", version="v")
    board = pl.loggers.TensorBoardLogger(tmp_path / "board", name="", version="")
    trainer(pl, tmp_path, GradientMonitor(), logger=[table, board]).fit(make(pl), loader())
    assert [e.step for e in events(tmp_path / "board").Scalars("gradwatch/norm_global")] == list(range(BATCHES))
    assert "gradwatch_norm/net.0" in (tmp_path / "csv" / "v" / "metrics.csv").read_text()
    assert [path.parent for path in tmp_path.rglob("record.jsonl")] == [tmp_path / "csv" / "v" / "gradwatch"]


def test_a_folder_that_is_named_takes_the_record_with_and_without_a_logger(pl, tmp_path):
    for logger in (False, pl.loggers.CSVLogger(tmp_path / "csv")):
        trainer(pl, tmp_path, GradientMonitor(logdir=tmp_path / "mine"), logger=logger).fit(make(pl), loader())
        assert [path.parent for path in tmp_path.rglob("record.jsonl")] == [tmp_path / "mine" / "gradwatch"]
        assert len(gradwatch.read_run(tmp_path / "mine").snapshots) == BATCHES


def test_a_logger_of_the_users_own_gets_the_scalars_and_needs_no_folder(pl, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    got = []

    class Own(pl.loggers.Logger):
        name, version = "own", 0

        def log_metrics(self, metrics, step=None):
            got.append((step, metrics))

        def log_hyperparams(self, *_, **__):
            pass

    trainer(pl, tmp_path, GradientMonitor(), logger=Own()).fit(make(pl), loader(3))
    assert [step for step, metrics in got if "gradwatch_norm/net.0" in metrics] == [0, 1, 2]
    assert list(tmp_path.rglob("record.jsonl")) == []


def test_without_a_logger_alerts_still_arrive_and_nothing_is_written(pl, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="gradwatch"):
        trainer(pl, tmp_path, GradientMonitor()).fit(make(pl, sick()), loader(24))
    began, ended = (r for r in caplog.records if "GW101" in r.message and "net.0" in r.message)
    assert (began.levelname, ended.levelname) == ("WARNING", "WARNING")
    assert ended.message.startswith("at the end 1 alert is open: GW101 vanishing-depth at net.0")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("logger", [True, False])
def test_fast_dev_run_works(pl, tmp_path, logger):
    callback, reports = watched()
    module = make(pl)
    trainer(pl, tmp_path, callback, fast_dev_run=3, logger=logger).fit(module, loader())
    assert_norms(reports, module.before)
    assert list(tmp_path.rglob("record.jsonl")) == []


# --- the end ---


def test_nothing_is_left_behind_after_a_fit(pl, tmp_path):
    callback, reports = watched()
    module = make(pl)
    during = []

    class Peek(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, index):
            during.append(left_behind(pl_module, trainer.optimizers, tmp_path))

    run = trainer(pl, tmp_path, callback, Peek(), logger=pl.loggers.CSVLogger(tmp_path, name="", version="v"))
    run.fit(module, loader())
    assert "_global_forward_pre_hooks" in during[0]  # step 1 is a probe: so this looks where there is something to see
    assert any("SGD._optimizer_step_pre_hooks" in found for found in during)
    assert any(found.startswith("open: ") for found in during[0])
    assert left_behind(module, run.optimizers, tmp_path) == []
    assert callback.report is None
    assert b"gradwatch" not in pickle.dumps(module.net)
    assert len(reports) == BATCHES


@pytest.mark.parametrize("error", [ZeroDivisionError("mine"), KeyboardInterrupt()], ids=["exception", "interrupt"])
def test_nothing_is_left_behind_after_an_exception_which_is_passed_on_unchanged(pl, tmp_path, error):
    def training_step(self, batch, index):
        if index == 1:  # a probe: the forward pass is being looked at
            raise error
        return self.loss(batch)

    callback, reports = watched()
    module = make(pl, training_step=training_step)
    run = trainer(pl, tmp_path, callback, logger=pl.loggers.CSVLogger(tmp_path, name="", version="v"))
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises((ZeroDivisionError, SystemExit, KeyboardInterrupt)) as caught:
            run.fit(module, loader())
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning ignores further interrupts while it goes down
    assert caught.value is error or caught.value.__context__ is error
    assert isinstance(error, KeyboardInterrupt) or caught.value is error
    assert left_behind(module, run.optimizers, tmp_path) == []
    assert callback.report is None
    assert [s.step for s in gradwatch.read_run(tmp_path).snapshots] == [r.snapshot.step for r in reports] == [0]


def test_a_watcher_that_cannot_be_attached_leaves_its_folder_to_the_next(pl, tmp_path, monkeypatch):
    logger = pl.loggers.CSVLogger(tmp_path, name="", version="v")
    with monkeypatch.context() as broken:
        broken.setattr("gradwatch.watcher.watcher.Judge", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            trainer(pl, tmp_path, watched()[0], logger=logger).fit(make(pl), loader())
    trainer(pl, tmp_path, watched()[0], logger=logger).fit(make(pl), loader())
    assert [p.parent.name for p in tmp_path.rglob("record.jsonl")] == ["gradwatch"]
    assert not list(tmp_path.rglob("gradwatch-2"))


def test_a_second_fit_goes_on(pl, tmp_path):
    callback, reports = watched()
    module = make(pl)
    run = trainer(pl, tmp_path, callback, logger=pl.loggers.CSVLogger(tmp_path, name="", version="v"))
    run.fit(module, loader())
    run.fit_loop.max_epochs = 2
    run.fit(module, loader())
    assert [r.snapshot.step for r in reports] == list(range(2 * BATCHES))
    assert_norms(reports, module.before)
    assert [s.step for s in gradwatch.read_run(tmp_path).snapshots] == list(range(2 * BATCHES))
    assert left_behind(module, run.optimizers, tmp_path) == []


def test_the_callback_can_be_used_again_for_another_model_with_other_optimizers(pl, tmp_path):
    callback, reports = watched()
    trainer(pl, tmp_path, callback).fit(make(pl), loader(2))
    other = make(
        pl,
        nn.ModuleList([small(), small()]),
        training_step=manual,
        configure_optimizers=lambda self: [sgd(self.net[0].parameters()), sgd(self.net[1].parameters())],
    )
    other.automatic_optimization = False
    trainer(pl, tmp_path, callback).fit(other, loader(2))
    assert_norms(reports[2:], other.before)


@pytest.mark.parametrize("other", ["model", "clock"])
def test_another_model_and_a_clock_that_went_back_begin_with_nothing_remembered(pl, tmp_path, other):
    callback, reports = watched(thresholds=Thresholds(window=4), on_alert=lambda _: None)
    module = make(pl, sick())
    trainer(pl, tmp_path, callback).fit(module, loader())
    assert [alert.finding.code for alert in reports[-1].open] == ["GW101"]
    alone, expected = watched(thresholds=Thresholds(window=4), on_alert=lambda _: None)
    again = make(pl, small()) if other == "model" else module
    trainer(pl, tmp_path, alone).fit(copy.deepcopy(again), loader())
    trainer(pl, tmp_path, callback).fit(again, loader())

    later = reports[BATCHES:]
    assert [r.snapshot.norm for r in later] == [r.snapshot.norm for r in expected]
    assert [(r.snapshot.step, r.began, r.open) for r in later] == [(r.snapshot.step, r.began, r.open) for r in expected]


@pytest.mark.filterwarnings("ignore:The dirpath has changed", "ignore:The `test_dataloader` does not have")
def test_a_checkpoint_that_a_test_has_loaded_is_not_where_the_next_fit_goes_on(pl, tmp_path):
    callback, reports = watched(on_alert=lambda _: None)
    saver = importlib.import_module(f"{pl.__name__}.callbacks").ModelCheckpoint(dirpath=tmp_path, save_last=True)
    module = make(pl, test_step=lambda self, batch, _: self.loss(batch))
    run = trainer(pl, tmp_path, callback, saver, enable_checkpointing=True)
    run.fit(module, loader())
    safely = {"weights_only": True} if "weights_only" in inspect.signature(run.test).parameters else {}  # from 2.6 on
    run.test(module, loader(1), ckpt_path=tmp_path / "last.ckpt", verbose=False, **safely)
    trainer(pl, tmp_path, callback).fit(make(pl), loader(2))

    assert callback.state_dict()["counts"] == [2]
    assert len(callback.state_dict()["history"]["tracks"][0]["snapshots"]) == 2
    assert [r.snapshot.step for r in reports[BATCHES:]] == [0, 1]


# --- checkpoints and copies ---


def plain(value):
    if isinstance(value, dict):
        return all(type(k) is str and plain(v) for k, v in value.items())
    if isinstance(value, list):
        return all(map(plain, value))
    return value is None or type(value) in (str, int, float, bool)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_checkpoint_holds_plain_state_and_a_new_trainer_goes_on_from_it(pl, tmp_path):
    def fit(name, epochs, resume=None):
        callback, reports = watched(thresholds=Thresholds(window=8), on_alert=lambda _: None)
        saver = importlib.import_module(f"{pl.__name__}.callbacks").ModelCheckpoint(
            dirpath=tmp_path / name, save_last=True
        )
        logger = pl.loggers.TensorBoardLogger(tmp_path, name="", version="log")
        module = make(pl, sick())
        run = trainer(pl, tmp_path, callback, saver, logger=logger, enable_checkpointing=True, max_epochs=epochs)
        run.fit(module, loader(), ckpt_path=resume)
        return reports, callback

    first, callback = fit("one", 1)
    saved = torch.load(tmp_path / "one" / "last.ckpt", weights_only=True)["callbacks"][callback.state_key]
    assert plain(saved)
    assert saved["counts"] == [BATCHES]
    assert not any(r.open for r in first)
    second, _ = fit("two", 2, tmp_path / "one" / "last.ckpt")
    assert [r.snapshot.step for r in second] == list(range(BATCHES, 2 * BATCHES))
    # The window is full at the 8th snapshot of both fits together; without the state that would be step 13.
    assert [(a.finding.code, a.began) for a in second[-1].open] == [("GW101", 7)]
    assert [s.step for s in gradwatch.read_run(tmp_path / "log").snapshots] == list(range(2 * BATCHES))


def test_two_callbacks_with_different_names_work_side_by_side(pl, tmp_path):
    one, two = watched(name="all"), watched(name="second", every_n_steps=2)
    saver = importlib.import_module(f"{pl.__name__}.callbacks").ModelCheckpoint(
        dirpath=tmp_path / "saved", save_last=True
    )
    module = make(pl)
    run = trainer(
        pl,
        tmp_path,
        one[0],
        two[0],
        saver,
        enable_checkpointing=True,
        logger=pl.loggers.CSVLogger(tmp_path, name="", version="v"),
    )
    run.fit(module, loader())
    assert_norms(one[1], module.before)
    assert_norms(two[1], module.before[::2])
    assert len(gradwatch.read_run(tmp_path / "v" / "gradwatch-all").snapshots) == BATCHES
    assert len(gradwatch.read_run(tmp_path / "v" / "gradwatch-second").snapshots) == BATCHES // 2
    states = torch.load(tmp_path / "saved" / "last.ckpt", weights_only=True)["callbacks"]
    assert [len(states[c.state_key]["history"]["tracks"][0]["snapshots"]) for c, _ in (one, two)] == [
        BATCHES,
        BATCHES // 2,
    ]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))], ids=["deepcopy", "pickle"])
def test_the_callback_can_be_copied_before_during_and_after_a_fit(pl, tmp_path, copied):
    module = make(pl)
    during = []

    class Copy(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            during.append(copied(next(c for c in trainer.callbacks if isinstance(c, GradientMonitor))))

    callback = copied(GradientMonitor(name="x", every_n_steps=2, thresholds=Thresholds(window=7), ignore=["GW201"]))
    run = trainer(pl, tmp_path, callback, Copy(), logger=pl.loggers.CSVLogger(tmp_path, name="", version="v"))
    run.fit(module, loader())
    assert [s.step for s in gradwatch.read_run(tmp_path / "v" / "gradwatch-x").snapshots] == [0, 2, 4]
    assert len(during) == BATCHES
    assert all(c.report is None for c in during)  # a copy watches nothing
    again = copied(callback)
    assert again.state_key == callback.state_key
    assert repr(again.state_dict()) == repr(callback.state_dict())  # as text, because NaN is not equal to itself
    assert b"Module" not in pickle.dumps(callback)  # Lightning hangs methods of the model on every callback
    assert again.state_dict()["counts"] == [BATCHES]
    other = make(pl)
    trainer(pl, tmp_path, during[-1], logger=pl.loggers.CSVLogger(tmp_path, name="", version="w")).fit(other, loader())
    assert [s.step for s in gradwatch.read_run(tmp_path / "w").snapshots] == [0, 2, 4]


# --- alerts and options ---


def nan_at(when):
    def training_step(self, batch, index):
        self.ran += 1
        return self.loss(batch) * (math.nan if index >= when else 1.0)

    return training_step


def test_a_raise_is_for_errors_and_leaves_nothing_behind(pl, tmp_path):
    module = make(pl, training_step=nan_at(3))
    run = trainer(
        pl, tmp_path, GradientMonitor(on_alert="raise"), logger=pl.loggers.CSVLogger(tmp_path, name="", version="v")
    )
    with pytest.raises(GradientHealthError, match="GW501") as caught:
        run.fit(module, loader())
    assert module.ran == 4
    assert caught.value.alerts[0].began == 3
    assert left_behind(module, run.optimizers, tmp_path) == []


@pytest.mark.parametrize("on_alert", ["raise", "stop"])
def test_a_warning_neither_raises_nor_stops(pl, tmp_path, on_alert, caplog):
    callback, reports = watched(on_alert=on_alert)
    module = make(pl, sick(), optimizer=lambda p: torch.optim.SGD(p, lr=1e-6))  # so that the loss stands still
    trainer(pl, tmp_path, callback).fit(module, loader(24, same=True))
    assert module.ran == 24
    assert [(a.finding.code, a.severity) for a in reports[-1].open] == [("GW101", Severity.WARNING)]
    assert "GW101" in caplog.text


def test_a_stop_ends_the_fit_after_the_batch(pl, tmp_path, caplog):
    callback, reports = watched(on_alert="stop")
    module = make(pl, training_step=nan_at(2))
    run = trainer(pl, tmp_path, callback, max_epochs=3)
    run.fit(module, loader())
    assert module.ran == len(reports) == 3
    assert run.should_stop
    assert "GW501" in caplog.text
    assert left_behind(module, run.optimizers, tmp_path) == []


def test_a_function_gets_each_new_alert_once(pl, tmp_path):
    got = []
    trainer(pl, tmp_path, GradientMonitor(on_alert=got.append)).fit(make(pl, sick()), loader(26))
    assert [(a.finding.code, a.finding.place, a.began) for a in got] == [("GW101", "net.0", 19)]


def test_what_is_muted_is_not_found_and_the_thresholds_count(pl, tmp_path):
    muted, silent = watched(name="a", ignore=["GW101:net.*"])
    early, loud = watched(name="b", thresholds=Thresholds(window=5))
    trainer(pl, tmp_path, muted, early).fit(make(pl, sick()), loader(24))
    assert not any(r.open for r in silent)
    assert [r.snapshot.step for r in loud if r.began] == [4]


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"optimizer": None}, TypeError, "optimizer"),
        ({"scaler": None}, TypeError, "scaler"),
        ({"logdir": 7}, TypeError, "logdir must be a path or None, got 7"),
        ({"every_n_steps": 0}, ValueError, "every_n_steps must be at least 1, got 0"),
        ({"probe_every_n_steps": 1.5}, TypeError, "probe_every_n_steps must be a whole number or None, got 1.5"),
        ({"timesteps": "all"}, TypeError, 'timesteps must be "auto", False, or a mapping'),
        ({"horizon": 0}, ValueError, "horizon must be at least 1, got 0"),
        ({"ignore": "GW101"}, TypeError, "ignore must be a list of strings"),
        ({"on_alert": "explode"}, ValueError, 'on_alert must be "warn", "raise", "stop" or a function'),
    ],
)
def test_an_option_that_cannot_be_is_refused_with_what_is_allowed(options, error, text):
    with pytest.raises(error, match=text):
        GradientMonitor(**options)


def test_one_class_serves_the_trainers_of_both_packages():
    for name in ("lightning.pytorch", "pytorch_lightning"):
        assert issubclass(GradientMonitor, importlib.import_module(name).Callback)


# --- watching again ---


def logged(pl, root, version="v"):
    return pl.loggers.TensorBoardLogger(root, name="", version=version)


def interrupted(pl, root, monitor):
    """Fit until the fourth batch fails, and another callback too; return the module and its Trainer.

    So Lightning never tells the monitor.
    """

    class Broken(pl.Callback):
        def on_exception(self, *_):
            raise KeyError("broken")

    def training_step(self, batch, index):
        if index == 3:
            raise RuntimeError("out of memory")
        return self.loss(batch)

    module = make(pl, training_step=training_step)
    run = trainer(pl, root, Broken(), monitor, logger=logged(pl, root))
    with pytest.raises(KeyError, match="broken"):
        run.fit(module, loader())
    return module, run


def test_a_fit_closes_the_watcher_that_an_interrupted_fit_has_left_on_its_module(pl, tmp_path):
    first, reports = watched()
    module, run = interrupted(pl, tmp_path, first)
    assert run.optimizers[0]._optimizer_step_pre_hooks  # or nothing was left, and the test sees nothing
    type(module).training_step = lambda self, batch, _: self.loss(batch)
    second, later = watched()
    trainer(pl, tmp_path, second, logger=logged(pl, tmp_path)).fit(module, loader())

    assert (len(reports), len(later)) == (3, BATCHES)
    assert [path.name for path in (tmp_path / "v").glob("gradwatch*")] == ["gradwatch"]
    assert [s.step for s in gradwatch.read_run(tmp_path / "v").snapshots] == list(range(BATCHES))
    assert left_behind(module, run.optimizers, tmp_path) == []


def test_a_monitor_that_was_left_on_a_module_watches_it_again(pl, tmp_path):
    callback, reports = watched()
    module, run = interrupted(pl, tmp_path, callback)
    type(module).training_step = lambda self, batch, _: self.loss(batch)
    trainer(pl, tmp_path, callback).fit(module, loader())

    assert len(reports) == 3 + BATCHES
    assert left_behind(module, run.optimizers, tmp_path) == []


def test_a_fit_closes_a_watcher_that_watch_has_left_on_its_module_and_watch_one_of_a_fit(pl, tmp_path):
    module = make(pl)
    optimizer, outside, closed = sgd(module.parameters()), [], []
    gradwatch.watch(module, optimizer, sinks=[outside.append])
    callback, reports = watched()

    class Again(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            assert not optimizer._optimizer_step_pre_hooks
            if trainer.global_step == 2:
                gradwatch.watch(pl_module, trainer.optimizers[0], sinks=[closed.append])

    trainer(pl, tmp_path, callback, Again()).fit(module, loader())
    optimizer.step()

    assert (len(outside), len(reports), len(closed)) == (0, 2, BATCHES - 2)


def test_two_callbacks_of_one_fit_do_not_close_each_other(pl, tmp_path):
    (a, of_a), (b, of_b) = watched(name="a"), watched(name="b")
    module = make(pl)
    for _ in range(2):
        trainer(pl, tmp_path, a, b, logger=logged(pl, tmp_path)).fit(module, loader())

    assert (len(of_a), len(of_b)) == (2 * BATCHES, 2 * BATCHES)
    assert sorted(path.name for path in (tmp_path / "v").glob("gradwatch*")) == ["gradwatch-a", "gradwatch-b"]


def test_a_fit_takes_the_directory_of_a_watcher_whose_model_is_gone(pl, tmp_path):
    model = small()
    optimizer = sgd(model.parameters())  # which keeps the watcher
    gradwatch.watch(model, optimizer, logdir=tmp_path / "v")
    del model
    module = make(pl)
    trainer(pl, tmp_path, GradientMonitor(), logger=logged(pl, tmp_path)).fit(module, loader())

    assert [path.name for path in (tmp_path / "v").glob("gradwatch*")] == ["gradwatch"]
    assert left_behind(module, [optimizer], tmp_path) == []


def test_scores_that_the_loss_squashes_once_more_are_seen(pl, tmp_path):
    def loss(self, batch):
        return functional.cross_entropy(self.net(batch[0]).softmax(-1), batch[1].argmax(-1))

    alerts = []
    monitor = GradientMonitor(on_alert=alerts.append)
    trainer(pl, tmp_path, monitor, accumulate_grad_batches=2).fit(make(pl, loss=loss), loader(8))
    assert [(a.finding.code, a.finding.place) for a in alerts] == [("GW104", "net.2")]
