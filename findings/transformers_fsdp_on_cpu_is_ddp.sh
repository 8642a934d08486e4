#!/usr/bin/env bash
# transformers 5.24.0 with accelerate 1.15.0: a Trainer that is asked for FSDP on the CPU (`fsdp`, `use_cpu=True`, two
# processes on gloo) trains with DistributedDataParallel, and says nothing of it: each process has the whole parameters,
# gradients and optimizer states. accelerate decides by the kind of device before it looks at FSDP. torch itself shards on
# a CPU (`fully_shard`). So a test of sharded training that runs in CI without a GPU tests something else.
#
# Fails if that is otherwise.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 accelerate==1.15.0
cat > "$work/sharded.py" <<'PY'
import json
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainingArguments

transformers.logging.set_verbosity_error()


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 4)

    def forward(self, x):
        return {"loss": self.layer(x).square().mean()}


with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder, max_steps=1, use_cpu=True, fsdp="full_shard", report_to=[], disable_tqdm=True, save_strategy="no"
    )
    trainer = Trainer(Net(), arguments, train_dataset=[{"x": torch.ones(4)}] * 32)
    trainer.train()
there = {
    "asked for": str(arguments.fsdp),
    "wrapper": type(trainer.model_wrapped).__name__,
    "weight in the Trainer": list(trainer.model.layer.weight.shape),
}
own = Net()
fully_shard(own)
there["weight of torch's own fully_shard"] = (
    list(own.layer.weight.to_local().shape) if isinstance(own.layer.weight, DTensor) else "whole"
)
if dist.get_rank() == 0:
    Path(sys.argv[1]).write_text(json.dumps(there))
dist.destroy_process_group()
PY
"$work/venv/bin/python" -m torch.distributed.run --standalone --nproc_per_node 2 "$work/sharded.py" "$work/there.json" \
    > "$work/said" 2>&1 || { cat "$work/said"; exit 1; }
"$work/venv/bin/python" - "$work/there.json" "$work/said" <<'PY'
import json
import sys
from pathlib import Path

there = json.loads(Path(sys.argv[1]).read_text())
for name, value in there.items():
    print(f"{name}: {value}")
said = [line for line in Path(sys.argv[2]).read_text().splitlines() if "fsdp" in line.lower() or "shard" in line.lower()]
print("said of it:", said or "nothing")
expected = there["wrapper"] == "DistributedDataParallel" and there["weight in the Trainer"] == [4, 4]
sys.exit(not expected or there["weight of torch's own fully_shard"] != [2, 4] or any("deprecated" not in s for s in said))
PY
