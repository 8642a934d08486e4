"""The Lightning callback in several processes: they stop together, or go on together."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import pytest

PROGRAM = """
    import json, sys, torch
    from lightning.pytorch import LightningModule, Trainer
    from torch.utils.data import DataLoader
    from gradwatch import Finding, Severity
    from gradwatch.lightning import GradientMonitor

    class Module(LightningModule):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Linear(4, 1)
        def training_step(self, x, _):
            return self.net(x).square().mean()
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    count, worse = map(int, sys.argv[1:])

    def detector(history):  # from step 4 on, which is measured; step 5 is a probe out of turn, as it asks for one
        if history.snapshot.step >= 4:
            severity = Severity.ERROR if history.snapshot.step >= worse else Severity.WARNING
            yield Finding("MY001", "mine", severity, "net")

    monitor = GradientMonitor(every_n_steps=4, detectors=[detector], on_alert="stop")
    trainer = Trainer(
        max_steps=12, accelerator="cpu", devices=count, strategy="ddp", logger=False, callbacks=[monitor],
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(Module(), DataLoader(torch.randn(100, 4), batch_size=4))
    with open(f"rank{trainer.global_rank}.json", "w") as file:
        json.dump(trainer.global_step, file)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("count", "worse", "last"), [(2, 4, 4), (2, 5, 8), (4, 5, 8)])
def test_an_alert_stops_all_processes_after_the_same_batch(tmp_path, count, worse, last):
    (tmp_path / "train.py").write_text(textwrap.dedent(PROGRAM), encoding="utf-8")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    done = subprocess.run(
        [*launch, "train.py", str(count), str(worse)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(count)] == [last + 1] * count
