"""`gradwatch run` under torchrun: one record and one report, of whole gradients, and a training that is the same."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import textwrap

import pytest
from truth import norms, same

from gradwatch import read_runs

PROGRAM = """
    import sys, torch, torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    kind, status = sys.argv[1], int(sys.argv[2])
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    net = torch.nn.Sequential(*[m for _ in range(10) for m in (torch.nn.Linear(8, 8), torch.nn.Sigmoid())])
    if kind == "fsdp":
        for layer in net[::2]:
            fully_shard(layer)
        fully_shard(net)
    else:
        net = DistributedDataParallel(net)
    whole = (lambda t: t.full_tensor()) if kind == "fsdp" else (lambda t: t)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    truth = []
    for step in range(25):
        x = torch.randn(8, 8, generator=torch.Generator().manual_seed(100 * step + dist.get_rank()))
        loss = (net(x) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        truth.append([float(whole(p.grad).double().norm()) for p in net.parameters()])
        optimizer.step()
    weights = [float(whole(p).sum()) for p in net.parameters()]
    if dist.get_rank() == 0:
        print((truth, weights))
    dist.barrier()  # gloo fails by itself where one leaves while another still sends
    dist.destroy_process_group()
    sys.exit(status)
"""

# What C++ prints where a thread of torch's own is still running as the process leaves: one launch in 25 of the program
# alone, without gradwatch, on a machine with more to do than cores (torch 2.13.0, gloo).
TORN = "terminate called without an active exception"


def launched(folder, processes, *command):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    for _ in range(3):
        shutil.rmtree(folder / "runs", ignore_errors=True)
        done = subprocess.run([*launch, *command], cwd=folder, capture_output=True, text=True, check=False, timeout=240)
        if TORN not in done.stderr:
            break
    return done


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "processes"), [("ddp", 2), ("ddp", 4), ("fsdp", 2), ("fsdp", 4)])
def test_processes_that_train_one_model_make_one_record_of_the_whole_gradients(tmp_path, kind, processes):
    (tmp_path / "train.py").write_text(textwrap.dedent(PROGRAM), encoding="utf-8")
    alone = launched(tmp_path, processes, "train.py", kind, "0")
    watched = launched(tmp_path, processes, "-m", "gradwatch", "run", "train.py", kind, "0")
    assert (alone.returncode, watched.returncode) == (0, 0), watched.stderr
    truth, weights = ast.literal_eval(watched.stdout)
    assert ast.literal_eval(alone.stdout)[1] == weights
    assert watched.stderr.count("gradwatch: 1 model watched") == 1
    assert watched.stderr.count("GW101 vanishing-depth (warning)") == 1
    (run,) = read_runs(tmp_path / "runs" / "train").values()
    assert len(list((tmp_path / "runs" / "train").iterdir())) == 1
    assert [s.step for s in run.snapshots] == [*range(25)]
    same([list(norms(s).values()) for s in run.snapshots], truth)


@pytest.mark.slow
def test_an_alert_that_is_to_fail_it_fails_it_under_torchrun(tmp_path):
    (tmp_path / "train.py").write_text(textwrap.dedent(PROGRAM), encoding="utf-8")
    failed = launched(tmp_path, 2, "-m", "gradwatch", "run", "--fail-on", "warning", "train.py", "ddp", "0")
    assert failed.returncode == 1
    assert "exitcode  : 1" in failed.stderr


ACCELERATED = """
    import torch
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 8))
    net, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.1))
    truth = []
    for step in range(12):
        x = torch.randn(8, 8, generator=torch.Generator().manual_seed(100 * step + accelerator.process_index))
        optimizer.zero_grad()
        accelerator.backward((net(x) - x).square().mean())
        truth.append([float(p.grad.double().norm()) for p in net.parameters()])
        optimizer.step()
    accelerator.print((accelerator.num_processes, truth, [float(p.sum()) for p in net.parameters()]))
    accelerator.wait_for_everyone()
    accelerator.end_training()
"""
LAUNCH = ("accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--main_process_port", "0")
"""By torchrun's own means, as on several GPUs; for a CPU alone it starts several processes by MPI only."""


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_accelerate_launches_a_module_of_a_package_too(tmp_path, processes):
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "train.py").write_text(textwrap.dedent(ACCELERATED), encoding="utf-8")
    launch = (sys.executable, "-m", *LAUNCH, "--mixed_precision", "no", "--dynamo_backend", "no")
    launch = (*launch, "--num_processes", str(processes), "-m")
    alone, watched = (
        subprocess.run(
            [*launch, *command, "package.train"], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=240
        )
        for command in ((), ("gradwatch", "run", "-m"))
    )
    assert (alone.returncode, watched.returncode) == (0, 0), watched.stderr
    count, truth, weights = ast.literal_eval(watched.stdout)
    assert count == processes
    assert ast.literal_eval(alone.stdout)[2] == weights
    assert watched.stderr.count("gradwatch: 1 model watched") == 1
    (run,) = read_runs(tmp_path / "runs" / "train").values()
    same([list(norms(s).values()) for s in run.snapshots], truth)
