#!/usr/bin/env bash
# transformers 5.24.0: of two callbacks of one class that export their state (`ExportableState`), each checkpoint carries
# the states of all checkpoints before it too: 4, 6, 8, 10 entries after saves 1 to 4, where there are two callbacks. The
# Trainer turns the entry of the class into a list and appends to it at each save, and never begins anew; of a single
# callback of a class the entry is replaced. So `trainer_state.json` grows with every save, and the states that come
# first in it, one for each callback, are those from before the first step.
#
# Fails if that is otherwise.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 accelerate==1.15.0
cat > "$work/states.py" <<'PY'
import json
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState

transformers.logging.set_verbosity_error()


class Counts(TrainerCallback, ExportableState):
    """Counts steps."""

    def __init__(self, name):
        self.name, self.steps = name, 0

    def on_step_end(self, *_, **__):
        self.steps += 1

    def state(self):
        return {"args": {"name": self.name}, "attributes": {"steps": self.steps}}


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def forward(self, x):
        return {"loss": self.layer(x).square().mean()}


def saved(*names):
    """Return what four checkpoints carry of these callbacks: the number of steps of each entry."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=4, save_steps=1, use_cpu=True, report_to=[], disable_tqdm=True, logging_strategy="no"
        )
        rows = [{"x": torch.ones(2)}] * 64
        Trainer(Net(), arguments, train_dataset=rows, callbacks=[Counts(name) for name in names]).train()
        found = []
        for step in range(1, 5):
            state = json.loads(Path(folder, f"checkpoint-{step}", "trainer_state.json").read_text())
            entry = state["stateful_callbacks"]["Counts"]
            entries = entry if isinstance(entry, list) else [entry]
            found.append([one["attributes"]["steps"] for one in entries])
        return found


one, two = saved("a"), saved("a", "b")
print(f"transformers {transformers.__version__}: steps that each checkpoint carries")
print("one callback: ", one)
print("two callbacks:", two)
grows = [len(entries) for entries in two]
sys.exit(one != [[1], [2], [3], [4]] or grows != [4, 6, 8, 10] or two[-1][:2] != [0, 0])
PY
"$work/venv/bin/python" "$work/states.py" 2>/dev/null
