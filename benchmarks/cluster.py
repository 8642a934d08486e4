r"""Several processes of DeepSpeed and Ray Train, watched: true norms of the whole gradients, and one that speaks.

python3 -m venv cluster && cluster/bin/pip install -c constraints.txt . deepspeed==0.19.8 "ray[train]==2.60.0"
cluster/bin/python -m benchmarks.cluster                                   # two minutes; --quick: fewer steps

ZeRO 1 and 2, each in float32 and bfloat16, as docs/trainers.md says, in two processes on the CPU: the truth is what
DeepSpeed's own function gives. Two and four workers of Ray Train: the truth is what DDP has put into `.grad`. What is
not installed is said and skipped.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable
from pathlib import Path

from benchmarks.command import parsed, parser

CLOSE = 1e-6
"""How far a norm may be from the true one, relative to it."""
ROOT = Path(__file__).parents[1]
PATIENCE = 300
"""Seconds for one program."""
ZERO = """
import json, sys
import deepspeed, torch, gradwatch
from deepspeed.utils import safe_get_full_grad

stage, narrow, steps = int(sys.argv[1]), sys.argv[2] == "bfloat16", int(sys.argv[3])
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
settings = {
    "train_micro_batch_size_per_gpu": 16,
    "gradient_clipping": 0.1,
    "bf16": {"enabled": narrow},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
    "zero_optimization": {"stage": stage},
}
engine, _, _, _ = deepspeed.initialize(model=net, model_parameters=net.parameters(), config=settings)
rank, told, truth = torch.distributed.get_rank(), [], []
watcher = gradwatch.watch(engine.module, sinks=[lambda report: told.append(report.snapshot.norm)])
for step in range(steps):
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(100 * step + rank))
    y = x.sum(1, keepdim=True).sin()
    x, y = (t.bfloat16() if narrow else t for t in (x, y))
    loss = torch.nn.functional.mse_loss(engine(x), y)
    engine.backward(loss)
    truth.append([float(safe_get_full_grad(p).double().norm()) for p in net.parameters()])
    watcher.step(loss=loss)
    engine.step()
watcher.close()
with open(f"{rank}.json", "w") as file:
    json.dump([told, truth], file)
torch.distributed.barrier()
torch.distributed.destroy_process_group()
"""
RAY = """
import json, os, sys
import ray, torch
from ray.train import RunConfig, ScalingConfig, get_context
from ray.train.torch import TorchTrainer, prepare_model

folder, workers, steps = os.getcwd(), int(sys.argv[1]), int(sys.argv[2])


def loop():
    import gradwatch

    torch.manual_seed(0)
    rank, told, truth = get_context().get_world_rank(), [], []
    model = prepare_model(torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watcher = gradwatch.watch(model, optimizer, sinks=[lambda report: told.append(report.snapshot.norm)])
    for step in range(steps):
        x = torch.randn(16, 8, generator=torch.Generator().manual_seed(100 * step + rank))
        loss = torch.nn.functional.mse_loss(model(x), x.sum(1, keepdim=True).sin())
        watcher.record(loss)
        optimizer.zero_grad()
        loss.backward()
        truth.append([float(p.grad.double().norm()) for p in model.parameters()])
        optimizer.step()
    watcher.close()
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump([told, truth], file)


ray.init(num_cpus=workers + 1, include_dashboard=False)
scaling = ScalingConfig(num_workers=workers)
TorchTrainer(loop, scaling_config=scaling, run_config=RunConfig(storage_path=f"{folder}/trained")).fit()
"""


def ended(command: list[str], folder: Path) -> str:
    """Run something in a folder; return what it said last where it failed, else nothing."""
    here = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with Path(folder, "said.txt").open("w+", encoding="utf-8") as said:  # a process of Ray's may stay, and keep a pipe
        done = subprocess.run(
            command, cwd=folder, env=os.environ | here, stdout=said, stderr=said, timeout=PATIENCE, check=False
        )
        said.seek(0)
        return said.read()[-2000:] if done.returncode else ""


def judged(program: str, processes: int, start: Callable[[str], list[str]]) -> tuple[bool, str]:
    """Run a program that leaves what each process was told, and the truth; say whether they agree."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        source = Path(folder, "train.py")
        source.write_text(textwrap.dedent(program), encoding="utf-8")
        if said := ended(start(str(source)), Path(folder)):
            return False, said
        ranks = [json.loads(Path(folder, f"{rank}.json").read_text(encoding="utf-8")) for rank in range(processes)]
    (told, truth), *others = ranks
    alone = all(not its for its, _ in others)
    complete = len(told) == len(truth) > 0 and all(None not in norms for norms in told)
    both = zip(told, truth, strict=True) if complete else ()
    worst = max((abs(a - b) / b for mine, true in both for a, b in zip(mine, true, strict=True)), default=float("inf"))
    figures = f"{len(told)} of {len(truth)} steps told, {'by one process' * alone or 'BY SEVERAL'}"
    return alone and worst < CLOSE, f"{figures}, norms within {worst:.0e}"


def zero(stage: int, kind: str, steps: int) -> tuple[bool, str]:
    """Train with ZeRO in two processes."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return judged(ZERO, 2, lambda source: [*launch, source, str(stage), kind, str(steps)])


def ray(workers: int, steps: int) -> tuple[bool, str]:
    """Train in workers of Ray."""
    return judged(RAY, workers, lambda source: [sys.executable, source, str(workers), str(steps)])


def main() -> int:
    """Print a line for each case; return 1 if one is FAIL."""
    steps = 4 if parsed(parser(__doc__)).quick else 30
    cases: list[tuple[str, str, Callable[[], tuple[bool, str]]]] = [
        (f"DeepSpeed ZeRO {stage}, {kind}, two processes", "deepspeed", lambda s=stage, k=kind: zero(s, k, steps))
        for stage in (1, 2)
        for kind in ("float32", "bfloat16")
    ]
    cases += [(f"Ray Train, {n} workers", "ray", lambda n=n: ray(n, steps)) for n in (2, 4)]
    failed = 0
    for name, package, case in cases:
        if importlib.util.find_spec(package) is None:
            print(f"SKIP {name}: not installed: {package}")
            continue
        right, figures = case()
        failed += not right
        print(f"{'PASS' if right else 'FAIL'} {name}: {figures}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
