"""Two and four real processes on gloo: what rank 0 says of a model that several train, against the gathered gradients.

Nothing ever waits for gradwatch.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import typing
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from interpreters import warm
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, ShardingStrategy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed import fake_pg  # noqa: F401  (registers a backend that talks to nobody)
from torch.utils._python_dispatch import TorchDispatchMode

import gradwatch
from gradwatch.measurement import norms as stats
from gradwatch.measurement.columns import RAW, Numbers
from gradwatch.measurement.parameters import Parameters
from gradwatch.measurement.processes import Processes
from gradwatch.values.snapshot import Column, Snapshot

STEPS = 4


# --- what the processes do ---


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 1))


def batch(step: int) -> torch.Tensor:
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(100 * step + dist.get_rank()))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().double()


def size(tensor: torch.Tensor) -> float:
    """Norm of a tensor whose squares need not fit into its format."""
    largest = tensor.abs().max()
    return float((tensor / largest).norm() * largest) if 0 < largest < math.inf else float(tensor.norm())


def column_names() -> list[str]:
    """Every column of a snapshot that holds numbers of parameters."""
    return [name for name, hint in typing.get_type_hints(Snapshot).items() if hint in (Column, Column | None)]


def expected(
    read, taken, weights, moved, kinds: list[tuple[torch.dtype, torch.dtype]]
) -> dict[str, list[float | None]]:
    """What a snapshot must say of whole parameters.

    Args:
        read: their gradients where gradwatch reads them.
        taken: as the optimizer takes them.
        weights: before the step.
        moved: how far the step has moved them.
        kinds: formats of the gradients and of the weights.

    """
    entries = [int((g != 0).sum()) for g in read]
    tiny = [
        int(((g != 0) & (g.abs() < torch.finfo(kind).smallest_normal)).sum())
        for g, (kind, _) in zip(read, kinds, strict=True)
    ]
    still = [int(((m == 0) & (g != 0)).sum()) for m, g in zip(moved, taken, strict=True)]
    return {
        "norm": [size(g) for g in read],
        "nonfinite": [float((~g.isfinite()).sum()) for g in read],
        "weight_norm": [size(w) for w in weights],
        "zeros": [float((g == 0).double().mean()) for g in read],
        "subnormal": [t / max(n, 1) for t, n in zip(tiny, entries, strict=True)],
        "update_ratio": [size(m) / size(w) for m, w in zip(moved, weights, strict=True)],
        "lost": [
            s / max(n, 1) if kind.itemsize < 4 else None for s, n, (_, kind) in zip(still, entries, kinds, strict=True)
        ],
    }


class Run:
    """One training with gradwatch, and beside each snapshot the truth, gathered by collectives of the test's own."""

    def __init__(self, forward: nn.Module, model: nn.Module, *, sinks: bool = True, **options: object) -> None:
        self.forward, self.model = forward, model
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        self.reports: list[gradwatch.Report] = []
        self.truth: list[dict[str, list[float]]] = []
        self.watcher = gradwatch.watch(
            model,
            self.optimizer,
            sinks=[self.reports.append] * sinks,
            **{"every_n_steps": 1, "probe_every_n_steps": 1} | options,
        )

    def step(
        self, number: int, *, clip: float | None = None, explicit: bool = False, poison: float | None = None
    ) -> None:
        self.optimizer.zero_grad()
        (self.forward(batch(number)).square().mean() * 10).backward()
        if poison is not None:
            self.poison(poison)
        if explicit:
            self.watcher.step()
        before = [whole(p.grad) for p in self.model.parameters()]
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        after = [whole(p.grad) for p in self.model.parameters()]
        weights = [whole(p) for p in self.model.parameters()]
        self.optimizer.step()
        moved = [whole(p) - w for p, w in zip(self.model.parameters(), weights, strict=True)]
        clipped = math.hypot(*(float(g.norm()) for g in after)) / math.hypot(*(float(g.norm()) for g in before))
        kinds = [(p.grad.dtype, p.dtype) for p in self.model.parameters()]
        self.truth.append(
            expected(before if explicit else after, after, weights, moved, kinds) | {"clip_factor": [clipped]}
        )

    def take(self) -> None:
        """Step with the gradients that are there."""
        parameters = list(self.model.parameters())
        gradients, weights = [whole(p.grad) for p in parameters], [whole(p) for p in parameters]
        self.optimizer.step()
        moved = [whole(p) - w for p, w in zip(parameters, weights, strict=True)]
        kinds = [(p.grad.dtype, p.dtype) for p in parameters]
        self.truth.append(expected(gradients, gradients, weights, moved, kinds) | {"clip_factor": [None]})

    def poison(self, value: float) -> None:
        """Put it into the last row of the first weight, which is not of rank 0."""
        gradient = next(iter(self.model.parameters())).grad
        local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
        if dist.get_rank() == dist.get_world_size() - 1:
            local[-1, -1] = value

    def result(self) -> dict[str, object]:
        self.watcher.close()
        mine = [
            {c: getattr(r.snapshot, c) for c in column_names()} | {"clip_factor": [r.snapshot.clip_factor]}
            for r in self.reports
        ]
        notes = [r.snapshot.notes for r in self.reports]
        return {
            "mine": mine,
            "truth": self.truth,
            "notes": notes,
            "weights": [whole(p).flatten().tolist() for p in self.model.parameters()],
        }


def mesh(*shape: int):
    return init_device_mesh(
        "cpu", shape or (dist.get_world_size(),), mesh_dim_names=("copies", "pieces")[-max(len(shape), 1) :]
    )


def sharded(model: nn.Sequential, where, **options: object) -> nn.Module:
    if torch.__version__ < "2.7":  # its backward raises, watched or not
        pytest.skip("fully_shard trains on a CPU from torch 2.7 on, which brings torch.cpu.Stream.record_event")
    for layer in (model[0], model[2]):
        fully_shard(layer, mesh=where, **options)
    return fully_shard(model, mesh=where, **options)


def train(run: Run, **options: object) -> dict[str, object]:
    for number in range(STEPS):
        run.step(number, **options)
    return run.result()


def ddp(logdir: Path):
    model = mlp()
    return train(Run(DistributedDataParallel(model), model, logdir=logdir)) | {
        "folders": sorted(p.name for p in logdir.iterdir())
    }


def ddp_wrapped(_: Path):
    wrapper = DistributedDataParallel(mlp())
    return train(Run(wrapper, wrapper))


def ddp_without_synchronisation_between(_: Path):
    model = mlp()
    wrapper = DistributedDataParallel(model)
    run = Run(wrapper, model)
    for number in range(STEPS):
        run.optimizer.zero_grad()
        with wrapper.no_sync():
            wrapper(batch(50 + number)).square().mean().backward()
        kept = [p.grad.clone() for p in model.parameters()]
        run.optimizer.zero_grad = lambda: None
        for p, g in zip(model.parameters(), kept, strict=True):
            p.grad = g
        run.step(number)
        del run.optimizer.zero_grad
    return run.result()


def fsdp(_: Path):
    model = mlp()
    return train(Run(sharded(model, mesh()), model))


def fsdp_before_sharding(_: Path):
    model = mlp()
    run = Run(model, model)
    sharded(model, mesh())
    run.optimizer.param_groups[0]["params"] = list(model.parameters())
    return train(run)


def fsdp_replicated_over_one_dimension(_: Path):
    model = mlp()
    return train(Run(sharded(model, mesh(2, 2)), model))


def fsdp_bfloat16(_: Path):
    model = mlp()
    return train(Run(sharded(model, mesh(), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16)), model))


def narrow(rate: float):
    """Weights in bfloat16: of small updates some are lost, of tiny ones all."""

    def situation(_: Path):
        model = mlp().bfloat16()
        run = Run(sharded(model, mesh()), model)
        run.optimizer.param_groups[0]["lr"] = rate
        run.forward = lambda x: model(x.bfloat16())
        return train(run)

    return situation


def raw_quantities(_: Path):
    """What each process has measured of its pieces, and what is left of it where it has come together."""
    mine: list[dict[str, dict[int, float]]] = []
    after: list[Numbers] = []
    numbers = Parameters.numbers

    def taken(parameters: Parameters) -> Numbers:
        found = numbers(parameters)
        mine.append(by_name(found))
        after.append(found)  # the same, in which they come together
        return found

    Parameters.numbers = taken
    try:
        model = mlp().bfloat16()
        run = Run(sharded(model, mesh()), model, on_alert=lambda _: None)
        run.forward = lambda x: model(x.bfloat16())
        for number in range(2):
            run.step(number, explicit=True, poison=math.nan if number else None)
        run.watcher.close()
    finally:
        Parameters.numbers = numbers
    return {"mine": mine, "joined": [by_name(found) for found in after]}


def by_name(numbers: Numbers) -> dict[str, dict[int, float]]:
    return {raw.name: dict(of) for raw, of in numbers.items()}


def fsdp_clipped(_: Path):
    model = mlp()
    return train(Run(sharded(model, mesh()), model), clip=0.05)


def fsdp_explicit_and_clipped(_: Path):
    model = mlp()
    return train(Run(sharded(model, mesh()), model), clip=0.05, explicit=True)


def fsdp_nan_elsewhere(_: Path):
    model = mlp()
    run = Run(sharded(model, mesh()), model, on_alert=lambda _: None)
    for number in range(STEPS):
        run.step(number, poison=math.nan if number == STEPS - 1 else None)
    return run.result()


def fsdp_tiny_and_huge(_: Path):
    model = mlp().double()
    run = Run(sharded(model, mesh()), model)
    for number, factor in enumerate((1e-200, 1e200)):
        run.optimizer.zero_grad()
        (run.forward(batch(number).double()).square().mean() * factor).backward()
        run.take()
    return run.result()


def tensor_parallel(_: Path):
    """One layer in columns, one in rows, one on every process; and a gradient that is a sum not taken."""
    model = mlp()
    for layer, placement in ((model[0], Shard(0)), (model[2], Shard(1)), (model[4], Replicate())):
        layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh(), [placement]))
    run = Run(model, model)
    for number in range(STEPS):
        for index, p in enumerate(model.parameters()):
            g = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * number + index))
            p.grad = distribute_tensor(g, mesh(), p.placements) if isinstance(p, DTensor) else g
        if number == STEPS - 1:
            model[4].weight.grad = DTensor.from_local(torch.ones(1, 5), mesh(), [Partial()])
        run.take()
    return run.result()


def tensor_parallel_layers(_: Path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    parallelize_module(model, mesh(), {"0": ColwiseParallel(), "2": RowwiseParallel()})
    run = Run(model, model)
    run.optimizer.param_groups[0]["foreach"] = False  # which mixes no DTensor with other tensors
    for number in range(STEPS):
        run.optimizer.zero_grad()
        model(torch.randn(8, 6, generator=torch.Generator().manual_seed(number))).square().mean().backward()
        run.take()
    return run.result()


def fsdp1(strategy: ShardingStrategy):
    def situation(_: Path):
        model = mlp()
        where = mesh(2, 2) if strategy is ShardingStrategy.HYBRID_SHARD else None
        wrapper = FullyShardedDataParallel(
            model, sharding_strategy=strategy, use_orig_params=True, device_id=torch.device("cpu"), device_mesh=where
        )
        twin = mlp()  # the truth, by DistributedDataParallel
        reference = Run(DistributedDataParallel(twin), twin, sinks=False)
        reports: list[gradwatch.Report] = []
        optimizer = torch.optim.SGD(wrapper.parameters(), lr=0.1, momentum=0.9)
        watcher = gradwatch.watch(wrapper, optimizer, every_n_steps=1, probe_every_n_steps=1, sinks=[reports.append])
        for number in range(STEPS):
            reference.step(number)
            optimizer.zero_grad()
            (wrapper(batch(number)).square().mean() * 10).backward()
            optimizer.step()
        watcher.close()
        reference.reports = reports
        shapes = [p.shape for p in reports[-1].snapshot.model.parameters] if reports else None
        return reference.result() | {"shapes": shapes}

    return situation


def fsdp1_wrapped_outside_of_what_is_watched(_: Path):
    model = mlp()
    wrapper = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    return several(wrapper, model)


class Collectives(TorchDispatchMode):
    """Counts them."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.namespace in {"c10d", "_c10d_functional"}
        return func(*args, **(kwargs or {}))


def several(
    wrapper: nn.Module,
    model: nn.Module,
    ranks: tuple[int, ...] | None = None,
    steps: int = STEPS,
    meanwhile=lambda number, watcher: None,
):
    """Train, watched in some of the processes only; the collectives are counted too, and the warnings."""
    reports: list[gradwatch.Report] = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mine = ranks is None or dist.get_rank() in ranks
        watcher = (
            gradwatch.watch(model, optimizer, every_n_steps=1, probe_every_n_steps=2, sinks=[reports.append])
            if mine
            else None
        )
        began = time.monotonic()
        with Collectives() as communication:
            for number in range(steps):
                optimizer.zero_grad()
                (wrapper(batch(number)).square().mean() * 10).backward()
                optimizer.step()
                meanwhile(number, watcher)
        seconds = time.monotonic() - began
        if watcher is not None:
            watcher.close()
    said = [str(w.message) for w in caught if issubclass(w.category, gradwatch.GradwatchWarning)]
    return {
        "norms": [r.snapshot.norm for r in reports],
        "notes": [r.snapshot.notes for r in reports],
        "steps": [r.snapshot.step for r in reports],
        "said": said,
        "seconds": seconds,
        "collectives": communication.count,
        "weights": [whole(p).flatten().tolist() for p in model.parameters()],
    }


def watched_nowhere(_: Path):
    return several(model := sharded(mlp(), mesh()), model, ranks=())


def watched_everywhere(_: Path):
    return several(model := sharded(mlp(), mesh()), model)


def watched_on_the_first_only(_: Path):
    return several(model := sharded(mlp(), mesh()), model, ranks=(0,))


def watched_on_the_last_only(_: Path):
    return several(model := sharded(mlp(), mesh()), model, ranks=(dist.get_world_size() - 1,))


def ddp_watched_on_the_last_only(_: Path):
    model = mlp()
    return several(DistributedDataParallel(model), model, ranks=(dist.get_world_size() - 1,))


def a_measurement_fails_elsewhere(_: Path):
    right = stats.measured

    def meanwhile(number: int, _watcher: object) -> None:
        def wrong(_tensors: object) -> torch.Tensor:
            raise RuntimeError("no kernel")

        stats.measured = wrong if number == 0 and dist.get_rank() == 1 else right

    try:
        return several(model := sharded(mlp(), mesh()), model, meanwhile=meanwhile)
    finally:
        stats.measured = right


def one_gives_up_measuring(_: Path):
    right = stats.measured

    def meanwhile(number: int, _watcher: object) -> None:
        def wrong(_tensors: object) -> torch.Tensor:
            raise RuntimeError("no kernel")

        stats.measured = wrong if dist.get_rank() == 1 else right

    try:
        return several(model := sharded(mlp(), mesh()), model, steps=8, meanwhile=meanwhile)
    finally:
        stats.measured = right


def one_closes_early(_: Path):
    def meanwhile(number: int, watcher: gradwatch.Watcher) -> None:
        if number == 1 and dist.get_rank() == 1:
            watcher.close()

    return several(model := sharded(mlp(), mesh()), model, meanwhile=meanwhile)


def each_has_a_stage_of_its_own(logdir: Path):
    model = nn.Sequential(*[nn.Linear(6, 6) for _ in range(dist.get_rank() + 1)])
    reports: list[gradwatch.Report] = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradwatch.watch(model, optimizer, logdir=logdir, sinks=[reports.append]):
        model(batch(0)).sum().backward()
        optimizer.step()
    dist.barrier()
    return {"parameters": [len(r.snapshot.norm) for r in reports], "folders": sorted(p.name for p in logdir.iterdir())}


def nothing_is_left_in_the_store(_: Path):
    model = mlp()
    run = Run(sharded(model, mesh()), model)
    store = dist.distributed_c10d._get_default_store()
    counts = []
    for number in range(12):
        run.step(number)
        dist.barrier()
        counts.append(store.num_keys())
        dist.barrier()
    return run.result() | {"counts": counts}


TRUE = [
    ddp,
    ddp_wrapped,
    ddp_without_synchronisation_between,
    fsdp,
    fsdp_before_sharding,
    fsdp_bfloat16,
    narrow(1e-12),
    narrow(1e-3),
    fsdp_clipped,
    fsdp_explicit_and_clipped,
    fsdp_nan_elsewhere,
    fsdp_tiny_and_huge,
    tensor_parallel,
    tensor_parallel_layers,
    fsdp1(ShardingStrategy.FULL_SHARD),
    fsdp1(ShardingStrategy.NO_SHARD),
]
TRUE[6].__name__, TRUE[7].__name__ = "fsdp_all_updates_lost", "fsdp_some_updates_lost"
TRUE[-2].__name__, TRUE[-1].__name__ = "fsdp1_full", "fsdp1_not_sharded"
FOR_FOUR = [fsdp_replicated_over_one_dimension, fsdp1(ShardingStrategy.HYBRID_SHARD)]
FOR_FOUR[-1].__name__ = "fsdp1_hybrid"
OTHERS = [
    raw_quantities,
    fsdp1_wrapped_outside_of_what_is_watched,
    watched_nowhere,
    watched_everywhere,
    watched_on_the_first_only,
    watched_on_the_last_only,
    ddp_watched_on_the_last_only,
    a_measurement_fails_elsewhere,
    one_gives_up_measuring,
    one_closes_early,
    each_has_a_stage_of_its_own,
    nothing_is_left_in_the_store,
]
NAMES = {2: [f.__name__ for f in (*TRUE, *OTHERS)], 4: [f.__name__ for f in (*TRUE, *FOR_FOUR, *OTHERS)]}
SITUATIONS = {f.__name__: f for f in (*TRUE, *FOR_FOUR, *OTHERS)}


def work(rank: int, world: int, folder: str, port: int) -> None:
    """Go through every situation, and leave what came of it in a file."""
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, world, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    results = {}
    for name in NAMES[world]:
        logdir = Path(folder) / name
        logdir.mkdir(exist_ok=True)
        try:
            with (
                contextlib.nullcontext()
                if name.startswith(("watched", "fsdp1", "one", "a_"))
                else warnings.catch_warnings()
            ):
                warnings.filterwarnings("error", category=gradwatch.GradwatchWarning)
                results[name] = SITUATIONS[name](logdir)
        except pytest.skip.Exception as skipped:
            results[name] = {"skipped": skipped.msg}
        except Exception:  # noqa: BLE001  (told by the test of this situation)
            results[name] = {"error": traceback.format_exc()}
        warnings.resetwarnings()
        dist.barrier()
    Path(folder, f"{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


# --- what must hold ---


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)], ids=["two", "four"])
def ranks(request):
    """By rank, what each process says of each situation."""
    world = request.param
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as folder:
        folders = [str(folder) for folder in Path(__file__).parents[:2]]
        program = f"import sys; sys.path[:0] = {folders}; import test_processes as t; "
        started = [
            subprocess.Popen([*warm(), "-c", f"{program}t.work({rank}, {world}, {folder!r}, {server.port})"])
            for rank in range(world)
        ]
        try:
            assert [process.wait(timeout=500) for process in started] == [0] * world
        finally:
            for process in started:
                process.kill()
                process.wait()
        yield [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(world)]


def results(ranks, name):
    if any(name not in r for r in ranks):
        pytest.skip("for four processes")
    found = [r[name] for r in ranks]
    if "skipped" in found[0]:
        pytest.skip(found[0]["skipped"])
    assert [r.get("error") for r in found] == [None] * len(found)
    return found


@pytest.mark.parametrize("name", [f.__name__ for f in (*TRUE, *FOR_FOUR)])
def test_every_number_is_that_of_the_whole_gradient(ranks, name):
    first, *others = results(ranks, name)

    assert [other["mine"] for other in others] == [[]] * len(others)  # rank 0 speaks for all
    assert len(first["mine"]) == len(first["truth"])
    for step, (mine, truth) in enumerate(zip(first["mine"], first["truth"], strict=True)):
        assert set(mine) == set(truth)  # every column
        for quantity, wanted in truth.items():
            for column, (got, true) in enumerate(zip(mine[quantity] or [None] * len(wanted), wanted, strict=True)):
                if (name, step, column) == ("tensor_parallel", STEPS - 1, 4) and quantity in (
                    "norm",
                    "zeros",
                    "subnormal",
                ):
                    assert got is None  # a sum that nobody has taken
                elif quantity == "nonfinite":  # counted where the norm is not finite
                    assert (got or 0) == true
                elif quantity == "clip_factor" and got is None:  # without the explicit form
                    assert "explicit" not in name
                elif true is None:
                    assert got is None
                else:  # flattened ones are compared with another wrapper's, which rounds otherwise
                    assert got == pytest.approx(
                        true, rel=1e-5 if name.startswith("fsdp1") else 1e-6, abs=0, nan_ok=True
                    ), (quantity, step, column)


def test_where_every_update_is_lost_the_share_is_that_of_the_whole(ranks):
    first = results(ranks, "fsdp_all_updates_lost")[0]

    assert [mine["lost"] for mine in first["mine"]] == [[1.0] * 6] * STEPS


def root(norms):
    return math.nan if any(map(math.isnan, norms)) else math.hypot(*norms)


TOGETHER = {
    "norm": root,
    "applied": root,
    "weight_norm": root,
    "update": root,
    "nonfinite": sum,
    "nonzero": sum,
    "tiny": sum,
    "lost": sum,
}
"""How the raw quantity of a whole parameter comes of those of its pieces."""


def test_every_raw_quantity_of_a_parameter_comes_together(ranks):
    found = results(ranks, "raw_quantities")

    assert {q for r in found for of in r["mine"] for q in of} == set(TOGETHER) == {raw.name for raw in RAW}
    for step, joined in enumerate(found[0]["joined"]):
        pieces = [r["mine"][step] for r in found]
        for quantity in set().union(*pieces):
            for column in set().union(*(p.get(quantity, {}) for p in pieces)):
                wanted = TOGETHER[quantity]([p[quantity][column] for p in pieces if column in p.get(quantity, {})])
                assert joined[quantity][column] == pytest.approx(wanted, rel=1e-12, nan_ok=True), (
                    step,
                    quantity,
                    column,
                )


def test_a_poisoned_piece_of_another_process_is_counted(ranks):
    first = results(ranks, "fsdp_nan_elsewhere")[0]

    assert math.isnan(first["mine"][-1]["norm"][0])
    assert first["mine"][-1]["nonfinite"][0] == 1


@pytest.mark.parametrize("name", ["fsdp_clipped", "fsdp_explicit_and_clipped"])
def test_the_clip_factor_is_global(ranks, name):
    first = results(ranks, name)[0]

    factors = [mine["clip_factor"][0] for mine in first["mine"]]
    if name == "fsdp_clipped":  # the hooks see the gradients after the clipping only
        assert factors == [None] * STEPS
    else:
        assert factors == pytest.approx([truth["clip_factor"][0] for truth in first["truth"]], rel=1e-6)


@pytest.mark.parametrize("name", ["fsdp1_full", "fsdp1_hybrid"])
def test_flattened_parameters_are_described_by_their_own_shape(ranks, name):
    assert [tuple(shape) for shape in results(ranks, name)[0]["shapes"]] == [tuple(p.shape) for p in mlp().parameters()]


def test_flattened_parameters_whose_wrapper_is_not_watched_are_not_measured(ranks):
    first = results(ranks, "fsdp1_wrapped_outside_of_what_is_watched")[0]

    assert {n for norms in first["norms"] for n in norms} == {None}
    assert "watch the module that it wraps them in" in first["notes"][0][0]


def test_only_rank_0_writes(ranks):
    assert results(ranks, "ddp")[0]["folders"] == ["gradwatch"]


def test_a_process_whose_model_nobody_else_has_speaks_for_itself(ranks):
    found = results(ranks, "each_has_a_stage_of_its_own")

    assert [r["parameters"] for r in found] == [[2 * rank + 2] for rank in range(len(found))]
    assert found[0]["folders"] == ["gradwatch", *(f"gradwatch-rank{rank}" for rank in range(1, len(found)))]


WATCHED = [
    "watched_everywhere",
    "watched_on_the_first_only",
    "watched_on_the_last_only",
    "a_measurement_fails_elsewhere",
    "one_closes_early",
]


@pytest.mark.parametrize("name", WATCHED)
def test_not_a_collective_is_added_nor_a_bit_changed_and_nobody_waits(ranks, name):
    unwatched = results(ranks, "watched_nowhere")
    watched = results(ranks, name)

    assert [r["collectives"] for r in watched] == [r["collectives"] for r in unwatched]
    assert [r["weights"] for r in watched] == [r["weights"] for r in unwatched]
    assert max(r["seconds"] for r in watched) < 9  # less than the patience with a process that is late


@pytest.mark.parametrize(("name", "speaker"), [("watched_on_the_first_only", 0), ("watched_on_the_last_only", -1)])
def test_a_piece_is_never_reported_as_the_whole(ranks, name, speaker):
    found = results(ranks, name)[speaker]

    assert {n for norms in found["norms"] for n in norms} == {None}
    assert len(found["said"]) == 1
    assert "call watch() in each" in found["said"][0]
    assert all("call watch() in each" in notes[0] for notes in found["notes"])


def test_a_copy_is_reported_by_the_only_process_that_watches(ranks):
    assert len(results(ranks, "ddp_watched_on_the_last_only")[-1]["norms"]) == STEPS


def test_where_one_process_could_not_measure_the_step_has_no_norm_and_the_next_one_has(ranks):
    whole_run = results(ranks, "watched_everywhere")[0]
    failed = results(ranks, "a_measurement_fails_elsewhere")

    assert failed[0]["norms"][0] == whole_run["norms"][0]
    assert set(failed[0]["norms"][1]) == {None}
    assert failed[0]["notes"][1] == ["a process could not measure its part of the parameters"]
    assert failed[0]["norms"][2:] == whole_run["norms"][2:]
    assert "a measurement failed" in failed[1]["said"][0]


@pytest.mark.parametrize("name", ["one_closes_early", "one_gives_up_measuring"])
def test_a_process_that_leaves_is_not_waited_for(ranks, name):
    found = results(ranks, name)[0]

    assert set(found["norms"][-1]) == {None}
    assert "does not measure its part of the parameters any more" in found["said"][0]
    assert found["seconds"] < 9


def test_messages_between_processes_do_not_pile_up(ranks):
    counts = results(ranks, "nothing_is_left_in_the_store")[0]["counts"]

    assert max(counts[2:]) - min(counts[2:]) <= 2 * len(ranks)


FIT = """
import json, sys
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader, TensorDataset

from gradwatch.lightning import GradientMonitor

class Poisoned(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)

    def training_step(self, batch, number):
        loss = self.layer(batch[0]).square().mean()
        return loss * float("nan") if number == 2 else loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)

trainer = Trainer(strategy="ddp", accelerator="cpu", devices=2, max_epochs=1, logger=False, enable_checkpointing=False,
                  enable_progress_bar=False, enable_model_summary=False, callbacks=[GradientMonitor(on_alert="stop")])
trainer.fit(Poisoned(), DataLoader(TensorDataset(torch.randn(64, 4)), batch_size=2))
Path(sys.argv[1], f"{trainer.global_rank}.json").write_text(json.dumps(trainer.global_step))
"""


@pytest.mark.slow
def test_an_alert_of_rank_0_stops_the_fit_in_every_process(tmp_path):
    (tmp_path / "fit.py").write_text(FIT)

    subprocess.run(
        [sys.executable, tmp_path / "fit.py", tmp_path],
        check=True,
        timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )

    assert [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)] == [3, 3]


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="needs a process that can be stopped")
def test_watch_goes_on_only_when_the_store_knows_of_it():
    """Else another process may find no speaker, and speak as well."""
    serve = """
import time
import torch.distributed as dist

store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", serve], stdout=subprocess.PIPE, text=True) as server:
        try:
            store = dist.TCPStore("127.0.0.1", int(server.stdout.readline()), is_master=False)
            dist.init_process_group("fake", store=store, rank=0, world_size=2)
            server.send_signal(signal.SIGSTOP)
            watching = threading.Thread(target=Processes, args=(["weight"],))
            watching.start()
            watching.join(0.5)
            waits = watching.is_alive()
            server.send_signal(signal.SIGCONT)
            watching.join(30)

            assert waits
            assert not watching.is_alive()
        finally:
            server.kill()
            if dist.is_initialized():
                dist.destroy_process_group()
