"""One training, through every kind of loop that has a face or a recipe: the same steps, norms and alerts."""

from __future__ import annotations

import inspect
import subprocess
import textwrap
import warnings

import pytest
import torch
from accelerate.state import AcceleratorState
from interpreters import warm
from torch import nn
from truth import norms

import gradwatch
from gradwatch import read_runs

STEPS = 30


@pytest.fixture(autouse=True)
def no_format_of_others(monkeypatch):
    """Forget the number format that another test asked for: Accelerate keeps it, and transformers 4 in a variable."""
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)


def network():
    torch.manual_seed(0)
    return nn.Sequential(*[m for _ in range(10) for m in (nn.Linear(8, 8), nn.Sigmoid())])


def data():
    return torch.randn(30 * 16, 8, generator=torch.Generator().manual_seed(1))


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


def loss_of(model, x):
    return (model(x) - x).square().mean()


def batches():
    return data().split(16)


class Heard(list):
    def __call__(self, report):
        self.append(report)


def told(reports):
    """Return steps with norms, and alerts with the steps at which they began."""
    alerts = [(a.finding.code, a.finding.place, a.began) for r in reports for a in r.began]
    return [(r.snapshot.step, norms(r.snapshot)) for r in reports], alerts


def by_hand(model, optimizer, backward):
    heard = Heard()
    with gradwatch.watch(model, optimizer, sinks=[heard], on_alert=lambda _: None) as watcher:
        for x in batches():
            optimizer.zero_grad()
            loss = loss_of(model, x)
            watcher.record(loss)
            backward(loss)
            optimizer.step()
    return told(heard)


def raw(_folder):
    model = network()
    return by_hand(model, sgd(model), torch.Tensor.backward)


def run(folder):
    program = """
    model = network()
    optimizer = sgd(model)
    for x in data().split(16):
        optimizer.zero_grad()
        loss_of(model, x).backward()
        optimizer.step()
    """
    parts = "".join(map(inspect.getsource, (network, data, sgd, loss_of)))
    source = f"import torch\nfrom torch import nn\n{parts}{textwrap.dedent(program)}"
    (folder / "train.py").write_text(source, encoding="utf-8")
    done = subprocess.run(
        [*warm(), "-m", "gradwatch", "run", "train.py"], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (one,) = read_runs(folder / "runs" / "train").values()
    return [(s.step, norms(s)) for s in one.snapshots], [(a.finding.code, a.finding.place, a.began) for a in one.alerts]


def lightning(folder):
    from lightning.pytorch import LightningModule, Trainer
    from torch.utils.data import DataLoader

    from gradwatch.lightning import GradientMonitor

    class Module(LightningModule):
        def __init__(self):
            super().__init__()
            self.net = network()

        def training_step(self, x, _):
            return loss_of(self.net, x)

        def configure_optimizers(self):
            return sgd(self)

    heard = Heard()
    trainer = Trainer(
        max_epochs=1,
        callbacks=[GradientMonitor(sinks=[heard], on_alert=lambda _: None)],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    trainer.fit(Module(), DataLoader(data(), batch_size=16))
    return told(heard)


def fabric(_folder):
    from lightning.fabric import Fabric

    its, model = Fabric(accelerator="cpu", devices=1), network()
    return by_hand(*its.setup(model, sgd(model)), its.backward)


def accelerate(_folder):
    from accelerate import Accelerator

    accelerator, model = Accelerator(cpu=True), network()
    return by_hand(*accelerator.prepare(model, sgd(model)), accelerator.backward)


def ignite(_folder):
    from ignite.engine import Events, create_supervised_trainer

    model = network()
    optimizer, heard = sgd(model), Heard()
    trainer = create_supervised_trainer(model, optimizer, nn.MSELoss())
    with gradwatch.watch(model, optimizer, sinks=[heard], on_alert=lambda _: None) as watcher:
        trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: watcher.record(engine.state.output))
        trainer.run([(x, x) for x in batches()], max_epochs=1)
    return told(heard)


def huggingface(folder):
    from torch.utils.data import SequentialSampler
    from transformers import Trainer, TrainingArguments

    from gradwatch.huggingface import GradientCallback

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = network()

        def forward(self, x):
            return {"loss": loss_of(self.net, x)}

    class InOrder(Trainer):
        def _get_train_sampler(self, *_):
            return SequentialSampler(self.train_dataset)

    model, heard = Model(), Heard()
    InOrder(
        model,
        TrainingArguments(
            folder, per_device_train_batch_size=16, num_train_epochs=1, report_to=[], disable_tqdm=True, use_cpu=True
        ),
        train_dataset=[{"x": x} for x in data()],
        optimizers=(optimizer := sgd(model), torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)),
        callbacks=[GradientCallback(sinks=[heard], on_alert=lambda _: None)],
    ).train()
    return told(heard)


@pytest.fixture(scope="module")
def expected():
    return raw(None)


@pytest.mark.parametrize("loop", [run, lightning, fabric, accelerate, ignite, huggingface])
def test_a_training_is_told_alike_in_every_kind_of_loop(loop, expected, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of their libraries
        steps, alerts = loop(tmp_path)
    bare = [(step, {name.removeprefix("net."): norm for name, norm in its.items()}) for step, its in steps]
    assert [step for step, _ in bare] == [*range(STEPS)]
    for (_, mine), (_, theirs) in zip(bare, expected[0], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-6, abs=0)
    assert [(code, place.removeprefix("net."), began) for code, place, began in alerts] == expected[1]
    assert [code for code, *_ in expected[1]] == ["GW101"]
