"""The callback under Trainers of two processes: DDP, and both kinds of FSDP."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import gradwatch

pytestmark = pytest.mark.slow
STEPS = 4
FSDP = {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "transformer_layer_cls_to_wrap": ["BertLayer"]}
WAYS = {
    "ddp": {},
    "ddp_accumulated": {"gradient_accumulation_steps": 2},
    "ddp_unclipped": {"max_grad_norm": 0.0},
    "fsdp1": {"fsdp": True, "fsdp_config": {**FSDP, "version": 1, "sync_module_states": False}},
    "fsdp2": {"fsdp": True, "fsdp_config": {**FSDP, "version": 2}},
}


def whole(model):
    """Return the norms of whole gradients by name, in float64; called by every process."""
    found = {}
    for name, p in model.named_parameters():
        if p.grad is None or not p.grad.numel():
            squares = torch.zeros((), dtype=torch.float64)
        elif hasattr(p.grad, "full_tensor"):
            found[name] = p.grad.full_tensor().double().norm().item()
            continue
        else:
            squares = p.grad.double().square().sum()
        if getattr(p, "_fsdp_flattened", False):
            dist.all_reduce(squares)
        found[name] = squares.sqrt().item()
    return {
        ".".join(part for part in name.split(".") if part != "_fsdp_wrapped_module"): n for name, n in found.items()
    }


def shard_on_the_cpu() -> None:
    """Have accelerate shard here too: it takes only accelerators for devices on which FSDP works."""
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType
    from torch.distributed.fsdp import FullyShardedDataParallel

    begin = AcceleratorState.__init__

    def begun(self, *args, fsdp_plugin=None, **kwargs):
        begin(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin

    AcceleratorState.__init__ = begun
    wrap = FullyShardedDataParallel.__init__
    FullyShardedDataParallel.__init__ = lambda *args, **kwargs: wrap(
        *args, **kwargs | {"device_id": torch.device("cpu")}
    )


def work(folder: str) -> None:
    """Train with and without the callback, and leave what came of it in a file."""
    import test_huggingface as t

    from gradwatch.huggingface import GradientCallback

    torch.set_num_threads(1)
    shard_on_the_cpu()
    options = json.loads(os.environ["WAY"])

    class Noting(t.Noting):
        def noted_clip(self, *args, **kwargs):
            self.before.append(whole(self.model))
            return self.clip(*args, **kwargs)

        def create_optimizer(self, *args):
            t.Trainer.create_optimizer(self, *args)
            inner = getattr(self.optimizer, "optimizer", self.optimizer)
            self.hook = inner.register_step_pre_hook(lambda *_: self.after.append(whole(self.model)))
            return self.optimizer

    class Late(Noting):
        """Has a loss of NaN from the third step on."""

        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            return loss * float("nan") if self.state.global_step >= 2 else loss

    def trained(*callbacks, kind=Noting, name="plain"):
        torch.manual_seed(0)
        fixed = {"model": t.bert(), "data": t.tokens(64), "per_device_train_batch_size": 2, "max_steps": STEPS}
        run = t.trainer(Path(folder, name), *callbacks, kind=kind, **{**fixed, **options})
        run.train()
        return run

    reports = []
    plain = trained()
    run = trained(GradientCallback(sinks=[reports.append]), name="seen")
    stopped = trained(GradientCallback(on_alert="stop"), kind=Late, name="stopped")
    result = {
        "truth": run.after if "max_grad_norm" in options else run.before,
        "same": [plain.losses == run.losses, t.bits(plain.after) == t.bits(run.after)],
        "measured": [t.norms(r.snapshot) for r in reports],
        "stages": [r.snapshot.stage for r in reports],
        "steps": [r.snapshot.step for r in reports],
        "stopped": stopped.state.global_step,
        "wrapper": type(run.model_wrapped).__name__,
    }
    Path(folder, f"{os.environ['RANK']}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[*((way, 2) for way in WAYS), ("ddp", 4)], ids=lambda way: f"{way[0]}-{way[1]}")
def ranks(request):
    """By rank, what each process says; and the folder."""
    way, count = request.param
    with tempfile.TemporaryDirectory() as folder:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        port = store.port
        del store
        folders = [str(place) for place in Path(__file__).parents[:2]]
        program = f"import sys; sys.path[:0] = {folders}; import test_huggingface_processes as t; t.work({folder!r})"
        shared = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": str(count),
            "OMP_NUM_THREADS": "1",
        }
        started = [
            subprocess.Popen(
                [sys.executable, "-c", program],
                env={
                    **os.environ,
                    **shared,
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WAY": json.dumps(WAYS[way]),
                },
            )
            for rank in range(count)
        ]
        try:
            assert [process.wait(timeout=300) for process in started] == [0] * count
        finally:
            for process in started:
                process.kill()
        yield way, [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(count)], Path(folder)


def test_norms_are_those_of_whole_gradients(ranks):
    way, (first, *others), folder = ranks
    wrappers = {"ddp": "DistributedDataParallel", "fsdp1": "FullyShardedDataParallel"}
    assert first["wrapper"] == wrappers.get(way.split("_")[0], "FSDPBertForSequenceClassification")
    assert [other["measured"] for other in others] == [[]] * len(others)
    assert len(first["measured"]) == STEPS
    for measured, truth in zip(first["measured"], first["truth"], strict=True):
        assert measured == pytest.approx(truth, rel=1e-5)
    assert set(first["stages"]) == {"applied" if way == "ddp_unclipped" else "before_clip"}
    assert "bert.encoder.layer.1.output.dense.weight" in first["measured"][0]
    assert [s.step for s in gradwatch.read_run(folder / "seen").snapshots] == first["steps"] == list(range(STEPS))


def test_training_is_bitwise_that_without_the_callback(ranks):
    assert [its["same"] for its in ranks[1]] == [[True, True]] * len(ranks[1])


def test_a_stop_ends_all_processes_after_the_same_step(ranks):
    assert [its["stopped"] for its in ranks[1]] == [3] * len(ranks[1])
