"""Every form of training loop, its numbers held against gradients and weights taken by hand in float64."""

from __future__ import annotations

import gc
import io
import itertools
import json
import logging
import math
import os
import subprocess
import warnings
import weakref

import numpy as np
import pytest
import torch
from interpreters import warm
from loops import Watched, batches, loss_of, train
from models import tall
from torch import nn
from torch.nn.modules import module as torch_modules
from truth import by_hand, column, norm64, same, total

import gradwatch
from gradwatch.measurement import updates as measured_updates
from gradwatch.model.gradient_hooks import Sentinel

# --- the loops ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_hook_form_gives_each_step_as_the_optimizer_takes_it(dtype):
    model = tall(dtype=dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watched = Watched(model, optimizer)
    truth = []
    for batch in batches(12, dtype=dtype):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        truth.append(by_hand(model))
        optimizer.step()
    same(watched.norms(), truth)
    assert [s.step for s in watched.snapshots] == list(range(12))
    assert {(s.stage, s.optimizer, s.skipped, s.scale, s.clip_factor, s.loss) for s in watched.snapshots} == {
        ("applied", 0, False, None, None, None)
    }


def test_numbers_are_exact_where_the_step_is_inside_of_autocast():
    model = tall()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watched = Watched(model, optimizer, probe_every_n_steps=1)
    truth = []
    for batch in batches(2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            optimizer.zero_grad()
            loss = loss_of(model, batch)
            loss.backward()
            watched.watcher.record(loss)
            before = {n: p.detach().double().clone() for n, p in model.named_parameters()}
            norms_now = by_hand(model)
            optimizer.step()
        truth.append(
            (
                norms_now,
                {n: norm64(p.detach().double() - before[n]) / norm64(before[n]) for n, p in model.named_parameters()},
            )
        )
    same(watched.norms(), [t[0] for t in truth])
    same([column(s, s.update_ratio) for s in watched.snapshots], [t[1] for t in truth])


def test_the_explicit_form_without_an_optimizer_gives_each_call():
    model = tall()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watched = Watched(model)
    truth = []
    for batch in batches(4):
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        truth.append((by_hand(model), loss.item()))
        watched.watcher.step(loss=loss)
        optimizer.step()
    same(watched.norms(), [norms for norms, _ in truth])
    assert [s.loss for s in watched.snapshots] == pytest.approx([loss for _, loss in truth])
    assert [(s.step, s.stage, s.optimizer) for s in watched.snapshots] == [(i, "before_clip", None) for i in range(4)]


def test_the_explicit_form_numbers_its_steps_as_told():
    model = tall()
    watched = Watched(model)
    for step in (100, 102, 104):
        loss_of(model, batches(1)[0]).backward()
        watched.watcher.step(step)
    loss_of(model, batches(1)[0]).backward()
    watched.watcher.step()
    assert [s.step for s in watched.snapshots] == [100, 102, 104, 106]


@pytest.mark.parametrize("limit", [1e-3, 1e6])
def test_clipping_is_seen_by_the_explicit_form_and_done_for_the_hook_form(limit):
    for explicit in (True, False):
        model = tall()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        watched = Watched(model, optimizer)
        before, after = [], []
        for batch in batches(3):
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            before.append(by_hand(model))
            if explicit:
                watched.watcher.step()
            nn.utils.clip_grad_norm_(model.parameters(), limit)
            after.append(by_hand(model))
            optimizer.step()
        same(watched.norms(), before if explicit else after)
        assert {s.stage for s in watched.snapshots} == {"before_clip" if explicit else "applied"}
        factors = [total(a) / total(b) for a, b in zip(after, before, strict=True)]
        assert [s.clip_factor for s in watched.snapshots] == (
            pytest.approx(factors, rel=1e-6) if explicit else [None] * 3
        )
        assert (max(factors) < 0.01) is (limit < 1)


def test_a_clip_factor_is_right_where_float64_squares_underflow():
    model = tall(dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watched = Watched(model, optimizer)
    (loss_of(model, batches(1, dtype=torch.float64)[0]) * 1e-200).backward()
    watched.watcher.step()
    for p in model.parameters():
        p.grad.mul_(0.25)
    optimizer.step()
    assert watched.snapshots[0].clip_factor == pytest.approx(0.25)


@pytest.mark.parametrize("explicit", [False, True])
def test_accumulated_gradients_are_read_once_and_the_losses_averaged(explicit):
    model = tall()
    optimizer = torch.optim.Adam(model.parameters())
    watched = Watched(model, optimizer)
    truth, losses = [], []
    for group in (
        itertools.batched(batches(6), 3) if hasattr(itertools, "batched") else [batches(6)[:3], batches(6)[3:]]
    ):
        optimizer.zero_grad()
        for batch in group:
            loss = loss_of(model, batch)
            (loss / 3).backward()
            watched.watcher.record(loss)
            losses.append(loss.item())
        truth.append(by_hand(model))
        if explicit:
            watched.watcher.step()
        optimizer.step()
    same(watched.norms(), truth)
    assert [s.loss for s in watched.snapshots] == pytest.approx([sum(losses[:3]) / 3, sum(losses[3:]) / 3])


@pytest.mark.parametrize("explicit", [False, True])
def test_each_of_two_optimizers_has_its_own_steps_and_numbers(explicit):
    model = nn.ModuleDict({"generator": nn.Linear(2, 4), "critic": nn.Linear(4, 1)})
    makes = torch.optim.Adam(model["generator"].parameters())
    judges = torch.optim.SGD(model["critic"].parameters(), lr=0.1)
    watched = Watched(model, [makes, judges])
    generator = torch.Generator().manual_seed(2)
    truth = []
    for step in range(4):
        noise = torch.randn(6, 2, generator=generator)
        for index, optimizer in [(1, judges)] * 2 + [(0, makes)] * (step % 2):  # the critic steps more often
            model.zero_grad()
            loss = model["critic"](model["generator"](noise)).square().mean() * (-1) ** index
            loss.backward()  # gives gradients to both
            prefix = ("generator", "critic")[index]
            truth.append((index, {k: v for k, v in by_hand(model).items() if k.startswith(prefix)}, loss.item()))
            if explicit:
                watched.watcher.step(loss=loss, optimizer=optimizer)
            else:
                watched.watcher.record(loss)
            optimizer.step()
    same(watched.norms(), [n for _, n, _ in truth])  # the parameters of the other one are None
    assert [s.optimizer for s in watched.snapshots] == [i for i, _, _ in truth]
    assert [s.loss for s in watched.snapshots] == pytest.approx([loss for _, _, loss in truth])
    assert [s.step for s in watched.snapshots if s.optimizer == 1] == list(range(8))
    assert [s.step for s in watched.snapshots if s.optimizer == 0] == list(range(2))
    assert {p.name: p.optimizer for p in watched.snapshots[0].model.parameters}["generator.bias"] == 0


def test_two_optimizers_read_together_are_not_called_skipped_when_only_one_steps():
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in model.values()]
    watched = Watched(model, optimizers)
    for step in range(4):
        model.zero_grad()
        model["b"](model["a"](torch.ones(1, 2))).sum().backward()
        watched.watcher.step()
        optimizers[step % 2].step()
    watched.watcher.close()
    assert [(s.optimizer, s.skipped) for s in watched.snapshots] == [(0, False), (1, False)] * 2


@pytest.mark.parametrize("keyword", [False, True])
def test_a_closure_is_read_after_its_first_evaluation_and_gives_the_loss(keyword):
    model = tall()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watched = Watched(model, optimizer)
    truth, losses = [], []
    for batch in batches(3):

        def closure(batch=batch):
            optimizer.zero_grad()
            loss = loss_of(model, batch)
            loss.backward()
            truth.append(by_hand(model))
            losses.append(loss.item())
            return loss

        returned = optimizer.step(closure=closure) if keyword else optimizer.step(closure)
        assert returned.item() == losses[-1]
    same(watched.norms(), truth)
    assert [s.loss for s in watched.snapshots] == pytest.approx(losses)


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
@pytest.mark.parametrize("explicit", [False, True])
def test_lbfgs_gives_one_snapshot_per_step_with_the_gradient_it_starts_from(search, explicit):
    model = tall(dtype=torch.float64)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=5, line_search_fn=search)
    watched = Watched(model, optimizer)
    evaluations = []
    batch = batches(1, dtype=torch.float64)[0]
    for step in range(3):

        def closure(step=step):
            optimizer.zero_grad()
            loss = loss_of(model, batch)
            loss.backward()
            evaluations.append((step, by_hand(model), loss.item()))
            if explicit:
                watched.watcher.step()
            return loss

        optimizer.step(closure)
    first = [next(e for e in evaluations if e[0] == step) for step in range(3)]
    assert len(evaluations) > 6
    same(watched.norms(), [n for _, n, _ in first])
    assert [s.step for s in watched.snapshots] == [0, 1, 2]
    if not explicit:
        assert [s.loss for s in watched.snapshots] == pytest.approx([loss for _, _, loss in first])


def test_a_closure_that_the_optimizer_never_calls_does_not_hide_the_step():
    class Deaf(torch.optim.SGD):
        def step(self, closure=None):
            return super().step()

    model = tall()
    optimizer = Deaf(model.parameters(), lr=0.1)
    watched = Watched(model, optimizer)
    loss_of(model, batches(1)[0]).backward()
    truth = by_hand(model)
    optimizer.step(lambda: torch.zeros(()))
    same(watched.norms(), [truth])


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("before", [True, False])
def test_zero_grad_in_all_its_forms_leaves_zero_zero_and_none_none(set_to_none, before):
    model = nn.ModuleDict({"used": nn.Linear(4, 3), "sometimes": nn.Linear(4, 3), "never": nn.Linear(4, 3)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watched = Watched(model, optimizer)
    truth = []
    for step, (x, y) in enumerate(batches(4)):
        if before:
            optimizer.zero_grad(set_to_none=set_to_none)
        output = model["used"](x)
        if step == 0:
            output = output + model["sometimes"](x)
        (output - y).square().mean().backward()
        truth.append(by_hand(model))
        optimizer.step()
        if not before:
            optimizer.zero_grad(set_to_none=set_to_none)
    same(watched.norms(), truth)
    assert watched.norms()[2].get("sometimes.weight") == (None if set_to_none else 0.0)
    assert "never.weight" not in watched.norms()[2]


# --- loss scaling ---


def scaled_loop(
    optimizer_type,
    *,
    steps,
    overflow=(),
    hold_scaler=False,
    explicit=None,
    probe=None,
    unscale=False,
    **optimizer_options,
):
    """Train under a CPU GradScaler; return what was watched, each step's unscaled truth, and the weights' updates."""
    model = tall()
    optimizer = optimizer_type(model.parameters(), lr=0.01, **optimizer_options)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    watched = Watched(model, optimizer, scaler=scaler if hold_scaler else None, probe_every_n_steps=probe)
    truth = []
    for step, batch in enumerate(batches(steps)):
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        if step in overflow:
            loss = loss * math.inf
        scale = scaler.get_scale()
        scaler.scale(loss).backward()
        truth.append((by_hand(model, scale), scale))
        if explicit == "before unscale":
            watched.watcher.step()
        if unscale:
            scaler.unscale_(optimizer)
        if explicit == "after unscale":
            watched.watcher.step()
        scaler.step(optimizer)
        scaler.update()
    return watched, truth


def test_an_unfused_scaler_has_divided_when_the_hook_form_reads_and_a_skipped_step_is_absent():
    watched, truth = scaled_loop(torch.optim.Adam, steps=6, overflow=(2,))
    same(watched.norms(), [n for i, (n, _) in enumerate(truth) if i != 2])
    assert [s.step for s in watched.snapshots] == [0, 1, 2, 3, 4]  # executed steps
    assert not any(s.skipped for s in watched.snapshots)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscale", [False, True])
def test_the_explicit_form_divides_by_the_scale_of_the_scaler_it_was_given(fused, unscale):
    watched, truth = scaled_loop(
        torch.optim.Adam, steps=6, hold_scaler=True, explicit="before unscale", unscale=unscale, fused=fused
    )
    same(watched.norms(), [n for n, _ in truth])
    assert [s.scale for s in watched.snapshots] == [scale for _, scale in truth]
    assert len({scale for _, scale in truth}) > 1
    assert [s.clip_factor for s in watched.snapshots] == pytest.approx([1.0] * 6)  # nothing was clipped


@pytest.mark.parametrize("fused", [False, True])
def test_the_explicit_form_does_not_divide_again_after_unscale(fused):
    watched, truth = scaled_loop(
        torch.optim.Adam, steps=6, hold_scaler=True, explicit="after unscale", unscale=True, fused=fused
    )
    same(watched.norms(), [n for n, _ in truth])
    assert [s.scale for s in watched.snapshots] == [None] * 6
    assert [s.clip_factor for s in watched.snapshots] == pytest.approx([1.0] * 6)


@pytest.mark.parametrize("explicit", [None, "before unscale"])
def test_a_fused_optimizer_tells_its_scale_and_its_skipped_step(explicit):
    watched, truth = scaled_loop(torch.optim.Adam, steps=6, overflow=(2,), fused=True, explicit=explicit, probe=1)
    sound = [i for i in range(6) if i != 2]
    same([watched.norms()[i] for i in sound], [truth[i][0] for i in sound])
    assert [s.scale for s in watched.snapshots] == [scale for _, scale in truth]
    assert [s.skipped for s in watched.snapshots] == [i == 2 for i in range(6)]
    assert watched.snapshots[2].update_ratio is None
    assert watched.snapshots[3].update_ratio is not None


def test_a_step_that_an_unfused_scaler_skips_is_told_when_the_next_one_begins_or_at_close():
    watched, _ = scaled_loop(torch.optim.SGD, steps=4, overflow=(1, 3), hold_scaler=True, explicit="before unscale")
    assert [(s.step, s.skipped) for s in watched.snapshots] == [(0, False), (1, True), (2, False)]
    assert not all(map(math.isfinite, watched.norms()[1].values()))
    watched.watcher.close()
    assert [(s.step, s.skipped) for s in watched.snapshots][3:] == [(3, True)]


def test_an_alert_about_skipped_steps_is_raised_when_asked_for_and_close_still_closes():
    def overflow(watcher, optimizer, model, scaler):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, batches(1)[0]) * math.inf).backward()
        watcher.step()
        scaler.step(optimizer)
        scaler.update()

    for at_close in (False, True):
        model = tall()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu")
        watcher = gradwatch.watch(
            model, optimizer, scaler=scaler, on_alert="raise", thresholds=gradwatch.Thresholds(skipped_steps=3)
        )
        for _ in range(3):
            overflow(watcher, optimizer, model, scaler)
        with pytest.raises(gradwatch.GradientHealthError, match="skipped 3 steps"):
            watcher.close() if at_close else overflow(watcher, optimizer, model, scaler)
        if not at_close:
            watcher.close()
        assert not optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize("options", [{"foreach": True}, {"foreach": False}, {"fused": True}], ids=str)
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD])
def test_updates_weights_and_rms_are_those_of_the_optimizer(kind, options):
    model = tall()
    optimizer = kind(model.parameters(), lr=0.05, weight_decay=0.01, **options)
    watched = Watched(model, optimizer, probe_every_n_steps=1)
    truth = []
    for batch in batches(4):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        before = {n: p.detach().double().clone() for n, p in model.named_parameters()}
        rms = {n: p.grad.double().square().mean().sqrt().item() for n, p in model.named_parameters()}
        optimizer.step()
        moved = {n: norm64(p.detach().double() - before[n]) / norm64(before[n]) for n, p in model.named_parameters()}
        truth.append((moved, {n: norm64(b) for n, b in before.items()}, rms))
    same([column(s, s.update_ratio) for s in watched.snapshots], [t[0] for t in truth])
    same([column(s, s.weight_norm) for s in watched.snapshots], [t[1] for t in truth])
    same([column(s, s.rms) for s in watched.snapshots], [t[2] for t in truth])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_updates_of_narrow_weights_are_measured_in_float32(dtype):
    model = tall(dtype=dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    watched = Watched(model, optimizer, probe_every_n_steps=1)
    loss_of(model, batches(1, dtype=dtype)[0]).backward()
    before = {n: p.detach().double().clone() for n, p in model.named_parameters()}
    optimizer.step()
    moved = {n: norm64(p.detach().double() - before[n]) / norm64(before[n]) for n, p in model.named_parameters()}
    same([column(s, s.update_ratio) for s in watched.snapshots], [moved])
    same([column(s, s.weight_norm) for s in watched.snapshots], [{n: norm64(b) for n, b in before.items()}])


def test_the_update_of_a_weight_that_was_zero_is_infinite_and_of_one_that_stays_zero():
    model = nn.ParameterDict(
        {
            "opens": nn.Parameter(torch.zeros(3)),
            "stays": nn.Parameter(torch.zeros(3)),
            "still": nn.Parameter(torch.ones(3)),
        }
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watched = Watched(model, optimizer, probe_every_n_steps=1)
    (model["opens"].sum() + 0 * model["stays"].sum() + 0 * model["still"].sum()).backward()
    optimizer.step()
    assert column(watched.snapshots[0], watched.snapshots[0].update_ratio) == {
        "opens": math.inf,
        "stays": 0.0,
        "still": 0.0,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_zeros_and_subnormals_are_shares_of_all_and_of_the_non_zero_entries(dtype):
    limit = torch.finfo(dtype).smallest_normal
    gradient = torch.tensor([0.0, 0.0, limit / 2, limit, -limit / 4, 1.0, -1.0, 0.0], dtype=torch.float64).to(dtype)
    model = nn.ParameterDict({"w": nn.Parameter(torch.ones(8, dtype=dtype))})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watched = Watched(model, optimizer, probe_every_n_steps=1)
    (model["w"] * gradient).sum().backward()
    assert torch.equal(model["w"].grad, gradient)
    optimizer.step()
    snapshot = watched.snapshots[0]
    assert column(snapshot, snapshot.zeros)["w"] == pytest.approx(3 / 8)
    assert column(snapshot, snapshot.subnormal)["w"] == pytest.approx(2 / 5)


def test_zeros_of_a_sparse_and_of_a_complex_gradient_are_shares_of_the_whole_parameter():
    table = nn.Embedding(10, 4, sparse=True)
    optimizer = torch.optim.SGD(table.parameters(), lr=0.1)
    watched = Watched(table, optimizer, probe_every_n_steps=1)
    table(torch.tensor([1, 5, 1])).square().sum().backward()
    truth = norm64(table.weight.grad.to_dense())
    optimizer.step()
    assert column(watched.snapshots[0], watched.snapshots[0].zeros)["weight"] == pytest.approx(0.8)
    same(watched.norms(), [{"weight": truth}])

    model = nn.ParameterDict({"w": nn.Parameter(torch.ones(4, dtype=torch.complex64))})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watched = Watched(model, optimizer, probe_every_n_steps=1)
    model["w"].grad = torch.tensor([0, 3 + 4j, 0, 2 + 1j], dtype=torch.complex64)
    optimizer.step()
    assert column(watched.snapshots[0], watched.snapshots[0].zeros)["w"] == pytest.approx(0.5)
    same(watched.norms(), [{"w": math.sqrt(30)}])
    assert column(watched.snapshots[0], watched.snapshots[0].rms)["w"] == pytest.approx(math.sqrt(30 / 4))


def test_what_arrives_at_a_complex_parameter_is_compared_as_pairs_of_numbers():
    parameter = nn.Parameter(torch.tensor([1 + 2j, 3 - 1j]))
    sentinel = Sentinel()
    sentinel.watch(nn.ParameterDict({"w": parameter}))
    (parameter * torch.tensor([2.0, 1j])).abs().sum().backward()
    assert float(sentinel.difference()) == 0
    parameter.grad *= 1j  # as long, in another direction
    assert float(sentinel.difference()) == pytest.approx(math.sqrt(2), rel=1e-6)


def test_non_finite_entries_are_counted_only_where_a_norm_is_not_finite():
    model = tall()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    watched = Watched(model, optimizer, on_alert=lambda _: None)
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(model, batches(1)[0]).backward()
        if watched.snapshots:
            model[0].weight.grad.view(-1)[:3] = torch.tensor([math.nan, math.inf, -math.inf])
        optimizer.step()
    assert watched.snapshots[0].nonfinite is None
    assert column(watched.snapshots[1], watched.snapshots[1].nonfinite) == {"0.weight": 3.0}


def test_beyond_the_byte_budget_parameters_take_turns_at_the_update(monkeypatch):
    model = nn.ParameterList([nn.Parameter(torch.ones(10)) for _ in range(5)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    monkeypatch.setattr(measured_updates, "BUDGET", 2 * 10 * 4)
    watched = Watched(model, optimizer, probe_every_n_steps=1)
    for _ in range(5):
        for p in model:
            p.grad = p.detach().clone()
        optimizer.step()
    measured = [column(s, s.update_ratio) for s in watched.snapshots]
    assert [sorted(m) for m in measured] == [["0", "1"], ["2", "3"], ["0", "4"], ["1", "2"], ["3", "4"]]
    assert {v for m in measured for v in m.values()} == {0.25}
    assert watched.snapshots[0].notes == (
        "updates are measured in turns: copies of all parameters take more than 0 MiB",
    )


def test_a_parameter_above_the_byte_budget_is_never_copied(monkeypatch):
    model = nn.ParameterList([nn.Parameter(torch.ones(n)) for n in (30, 5, 30, 20)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
    monkeypatch.setattr(measured_updates, "BUDGET", 4 * 20)
    watched = Watched(model, optimizer, probe_every_n_steps=1)
    for _ in range(4):
        for p in model:
            p.grad = p.detach().clone()
        optimizer.step()
    assert [sorted(column(s, s.update_ratio)) for s in watched.snapshots] == [["1"], ["3"], ["1"], ["3"]]
    assert "the update of 0 is not measured: a copy of it takes more than 0 MiB" in watched.snapshots[0].notes


# --- parameters that come, go and change ---


def test_a_frozen_parameter_is_absent_as_frozen_until_it_is_thawed():
    model = tall()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watched = Watched(model, optimizer)
    for step, batch in enumerate(batches(6)):
        model[0].requires_grad_(step not in (2, 3))
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
    reasons = [s.absent and column(s, s.absent) for s in watched.snapshots]
    frozen = {"0.weight": "frozen", "0.bias": "frozen"}
    assert reasons == [None, None, frozen, frozen, None, None]
    assert ["0.weight" in n for n in watched.norms()] == [True, True, False, False, True, True]


def test_a_frozen_parameter_outside_of_the_optimizer_is_absent_as_frozen():
    model = tall()
    model[0].requires_grad_(requires_grad=False)
    optimizer = torch.optim.SGD(model[2].parameters(), lr=0.1)
    watched = Watched(model, optimizer)
    for step, batch in enumerate(batches(4)):
        if step == 3:
            model[0].requires_grad_(requires_grad=True)
            optimizer.add_param_group({"params": list(model[0].parameters())})
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
    frozen = {"0.weight": "frozen", "0.bias": "frozen"}
    assert [s.absent and column(s, s.absent) for s in watched.snapshots] == [frozen, frozen, frozen, None]


def test_a_group_added_later_is_measured_from_then_on():
    model = tall()
    optimizer = torch.optim.SGD(model[2].parameters(), lr=0.1)
    watched = Watched(model, optimizer)
    truth = []
    for step, batch in enumerate(batches(4)):
        if step == 2:
            optimizer.add_param_group({"params": list(model[0].parameters())})
        model.zero_grad()
        loss_of(model, batch).backward()
        truth.append({k: v for k, v in by_hand(model).items() if step >= 2 or k.startswith("2")})
        optimizer.step()
    same(watched.norms(), truth)
    assert [{p.name: p.optimizer for p in s.model.parameters}["0.weight"] for s in watched.snapshots] == [
        None,
        None,
        0,
        0,
    ]


def test_parameters_outside_of_the_model_are_left_out():
    model, other = tall(), nn.Linear(2, 2)
    optimizer = torch.optim.SGD([*other.parameters(), *model.parameters()], lr=0.1)
    watched = Watched(model, optimizer, probe_every_n_steps=1)
    (loss_of(model, batches(1)[0]) + other(torch.ones(2)).sum()).backward()
    truth = by_hand(model)
    optimizer.step()
    same(watched.norms(), [truth])
    assert set(column(watched.snapshots[0], watched.snapshots[0].update_ratio)) == set(truth)


def test_a_description_that_has_not_changed_stays_the_same_object_also_after_a_probe():
    model = tall()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watched = Watched(model, optimizer, probe_every_n_steps=1)
    train(model, optimizer, 4, torch.ones(1, 4))
    assert len({id(s.model) for s in watched.snapshots[1:]}) == 1


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        (
            {"timesteps": True},
            TypeError,
            'timesteps must be "auto", False, or a mapping from names of modules to their dimension of time, got True',
        ),
        ({"timesteps": "all"}, TypeError, "got 'all'"),
        (
            {"timesteps": {"0": 1.5}},
            TypeError,
            r"timesteps must map names of modules to a dimension \(a whole number\) or None, got '0': 1.5",
        ),
        ({"timesteps": {"0": -1}}, ValueError, r"timesteps\['0'\] must be at least 0, got -1"),
        ({"timesteps": {"rnn": 1}}, ValueError, r"timesteps must name modules of the model \('', '0', .*got 'rnn'"),
        ({"horizon": 0}, ValueError, "horizon must be at least 1, got 0"),
        ({"horizon": 2.5}, TypeError, "horizon must be a whole number or None, got 2.5"),
        ({"horizon": {}}, ValueError, "horizon must name at least one module, got an empty mapping"),
        ({"horizon": {"0": 0}}, ValueError, r"horizon\['0'\] must be at least 1, got 0"),
        (
            {"horizon": {"0": None}},
            TypeError,
            "horizon must map names of modules to numbers of timesteps, got '0': None",
        ),
        ({"horizon": {"rnn": 5}}, ValueError, "horizon must name modules of the model .*got 'rnn'"),
        (
            {"horizon": 5, "timesteps": False},
            ValueError,
            "horizon needs gradients through time, and timesteps is False",
        ),
    ],
)
def test_what_is_said_of_time_is_refused_where_it_cannot_be(options, error, says):
    with pytest.raises(error, match=says):
        gradwatch.watch(tall(), **options)


# --- the loss ---


def test_the_loss_is_the_mean_of_what_was_recorded_for_the_step_and_dropped_where_nothing_is_measured():
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    watched = Watched(model, optimizer, every_n_steps=2)
    for losses in (
        [1.5],
        [100.0],
        [torch.tensor(2.0, requires_grad=True), 4.0],
        [],
        [],
        [torch.tensor(50.0)],
        [torch.tensor([3.0, 5.0], dtype=torch.float64)],
    ):
        for loss in losses:
            watched.watcher.record(loss)
        train(model, optimizer, 1)
    assert [(s.step, s.loss) for s in watched.snapshots] == [(0, 1.5), (2, 3.0), (4, None), (6, 4.0)]


def two_halves():
    model = tall()
    return model, [torch.optim.SGD(half.parameters(), lr=0.01) for half in (model[0], model[2])]


def losses_of(watched):
    return [(s.optimizer, s.loss) for s in watched.snapshots]


@pytest.mark.parametrize("explicit", [False, True])
def test_each_optimizer_that_steps_behind_one_backward_has_its_loss_once(explicit):
    model, optimizers = two_halves()
    watched = Watched(model, optimizers)
    for step, batch in enumerate(batches(4)):
        model.zero_grad()
        loss_of(model, batch).backward()
        if step < 3:  # the last is not told, and what was told before is not of it
            for part in (step, step + 1.0):  # accumulated
                watched.watcher.record(part)
        for optimizer in optimizers:
            if explicit:
                watched.watcher.step(optimizer=optimizer)
            optimizer.step()
    assert losses_of(watched) == [(0, 0.5), (1, 0.5), (0, 1.5), (1, 1.5), (0, 2.5), (1, 2.5), (0, None), (1, None)]


def test_of_an_optimizer_that_steps_more_rarely_the_loss_is_that_of_the_step_it_follows():
    model, (often, rarely) = two_halves()
    watched = Watched(model, [often, rarely])
    for step, batch in enumerate(batches(6)):
        model.zero_grad()
        loss_of(model, batch).backward()
        if step != 5:
            watched.watcher.record(float(step))
        often.step()
        if step % 3 == 2:
            rarely.step()
    assert losses_of(watched) == [(0, 0.0), (0, 1.0), (0, 2.0), (1, 2.0), (0, 3.0), (0, 4.0), (0, None), (1, None)]


def test_a_generator_and_a_discriminator_that_record_their_own_losses_have_their_own():
    model, (generator, discriminator) = two_halves()
    watched = Watched(model, [generator, discriminator])
    for step, batch in enumerate(batches(3)):
        for optimizer, sign in ((discriminator, -1.0), (discriminator, -2.0), (generator, 1.0)):
            model.zero_grad()
            loss_of(model, batch).backward()
            watched.watcher.record(sign * (step + 1))
            optimizer.step()
    assert losses_of(watched) == [
        (i, sign * (step + 1)) for step in range(3) for i, sign in ((1, -1.0), (1, -2.0), (0, 1.0))
    ]


@pytest.mark.parametrize("tells", [False, True])
def test_closures_of_two_optimizers_have_their_own_losses_whatever_is_evaluated_again(tells):
    model, (first, second) = two_halves()
    searching = torch.optim.LBFGS(first.param_groups[0]["params"], lr=0.1, max_iter=4)
    watched = Watched(model, [searching, second])
    truth = []
    for batch in batches(3):
        for index, optimizer in enumerate((searching, second)):
            evaluated = []

            def closure(evaluated=evaluated, batch=batch, factor=index + 1):
                model.zero_grad()
                loss = loss_of(model, batch) * factor
                loss.backward()
                evaluated.append(loss.item())
                if tells:
                    watched.watcher.record(loss)
                return loss

            optimizer.step(closure)
            assert len(evaluated) > 1 or index == 1
            truth.append((index, pytest.approx(evaluated[0])))
    assert losses_of(watched) == truth


def test_a_loss_that_is_none_warns_once_and_is_left_out():
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watched = Watched(model, optimizer)

    def told(loss):
        watched.watcher.record(loss)
        train(model, optimizer, 1)

    with pytest.warns(
        gradwatch.GradwatchWarning, match="the loss must be a number or a tensor, got None, and is left out"
    ):
        told(None)
    told("low")  # a second warning would be an error
    told(2.0)
    assert [s.loss for s in watched.snapshots] == [None, None, 2.0]


def test_a_recorded_loss_keeps_no_graph_alive():
    model = tall()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watcher = gradwatch.watch(model, optimizer)
    loss = loss_of(model, batches(1)[0])
    token = nn.Identity()
    loss.grad_fn.register_hook(lambda *_, token=token: None)  # held by the graph
    held = weakref.ref(token)
    del token
    watcher.record(loss)
    loss.backward()
    assert held() is not None
    del loss
    gc.collect()
    assert held() is None
    assert watcher.model is model  # the watcher, and what it was told, is still there


def test_what_the_loop_records_goes_before_what_a_closure_returns():
    model = tall()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watched = Watched(model, optimizer)

    def closure():
        loss = loss_of(model, batches(1)[0])
        loss.backward()
        watched.watcher.record(7.0)
        return loss

    optimizer.step(closure)
    assert watched.snapshots[0].loss == 7.0


# --- arguments ---


def test_what_cannot_be_watched_is_refused_with_what_is_allowed():
    model, other = tall(), nn.Linear(2, 2)
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got str"):
        gradwatch.watch("model")
    with pytest.raises(TypeError, match=r"optimizer must have param_groups and step\(\).*got str"):
        gradwatch.watch(model, "adam")
    with pytest.raises(ValueError, match=r"optimizer must step parameters of the model, and none of the 2 of this SGD"):
        gradwatch.watch(model, torch.optim.SGD(other.parameters(), lr=0.1))
    with pytest.raises(ValueError, match=r'on_alert must be "warn", "raise" or a function'):
        gradwatch.watch(model, on_alert="stop")
    with pytest.raises(TypeError, match=r"ignore must be a list of strings.*got 'GW101'"):
        gradwatch.watch(model, ignore="GW101")
    with pytest.raises(
        TypeError,
        match=r"scaler must have is_enabled\(\) and get_scale\(\), as torch.amp.GradScaler has, or be None, got str",
    ):
        gradwatch.watch(model, scaler="no")
    watcher = gradwatch.watch(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="optimizer must be one of the 1 that are watched"):
        watcher.step(optimizer=torch.optim.SGD(model.parameters(), lr=0.1))


def ruled_by_words(history):
    return []


ruled_by_words.rules = ["GW101"]


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"every_n_steps": 0}, ValueError, "at least 1"),
        ({"detectors": [ruled_by_words]}, TypeError, "must be gradwatch.Rule, got 'GW101' from .*ruled_by_words"),
    ],
)
def test_a_refused_call_leaves_the_earlier_watcher_at_work(options, error, says):
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watched = Watched(model, optimizer)
    with pytest.raises(error, match=says):
        gradwatch.watch(model, optimizer, **options)
    train(model, optimizer, 1)
    assert len(watched.snapshots) == 1


# --- the end ---


def hooks_of(optimizer):
    return len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks)


def test_watching_again_closes_the_first_watcher():
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first = Watched(model, optimizer)
    train(model, optimizer, 1)
    second = Watched(model, optimizer)
    assert hooks_of(optimizer) == 2
    train(model, optimizer, 1)
    assert (len(first.snapshots), len(second.snapshots)) == (1, 1)


def loss_with_memory():
    """A loss, and a weak reference to what lives as long as anything has its number."""
    numbers = np.ones(1, np.float32)
    return torch.from_numpy(numbers), weakref.ref(numbers)


def test_closing_removes_every_hook_and_a_second_time_does_nothing():
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = {
        name: len(table)
        for name, table in vars(torch_modules).items()
        if name.startswith("_global_") and hasattr(table, "__len__")
    }
    attributes = set(vars(optimizer))
    watched = Watched(model, optimizer)
    train(model, optimizer, 1)  # step 1 is a probe: the forward hook is on
    assert len(torch_modules._global_forward_pre_hooks) == before["_global_forward_pre_hooks"] + 1
    loss, memory = loss_with_memory()
    watched.watcher.record(loss)
    del loss
    assert memory() is not None
    report = watched.watcher.close()
    assert memory() is None
    assert report is watched.reports[-1]
    assert hooks_of(optimizer) == 0
    assert set(vars(optimizer)) == attributes
    assert {name: len(getattr(torch_modules, name)) for name in before} == before
    assert watched.watcher.close() is report
    train(model, optimizer, 2)
    watched.watcher.step()
    watched.watcher.step(optimizer=optimizer)
    loss, memory = loss_with_memory()
    watched.watcher.record(loss)
    del loss
    assert memory() is None
    assert len(watched.reports) == 1


def test_a_with_block_closes_also_when_it_is_left_by_an_exception():
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    closed = []

    class Sink:
        def __call__(self, report):
            pass

        def close(self):
            closed.append(True)

    def interrupted():
        with gradwatch.watch(model, optimizer, sinks=[Sink()]):
            train(model, optimizer, 1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert hooks_of(optimizer) == 0
    assert not torch_modules._global_forward_pre_hooks
    assert closed == [True]


def test_closing_within_a_step_ends_it_quietly():
    model = tall()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watched = Watched(model, optimizer)

    def closure():
        loss = loss_of(model, batches(1)[0])
        loss.backward()
        watched.watcher.close()
        return loss

    optimizer.step(closure)
    assert watched.snapshots == []
    assert hooks_of(optimizer) == 0


def test_an_alert_that_closes_the_watcher_leaves_no_hook_behind():
    model = tall()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    alerts = []

    def closing(alert):
        alerts.append(alert)
        watcher.close()

    watcher = gradwatch.watch(model, optimizer, every_n_steps=1, on_alert=closing)
    train(model, optimizer, 5, batches(1)[0][0])
    train(model, optimizer, 3, batches(1)[0][0] * math.nan)
    assert [a.finding.code for a in alerts] == ["GW501"]
    assert hooks_of(optimizer) == 0
    assert not torch_modules._global_forward_pre_hooks
    assert not torch_modules._global_forward_hooks


def test_nothing_is_read_once_a_skipped_step_has_closed_the_watcher(tmp_path):
    model = tall()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    seen = []

    def closing(report):
        seen.append(report.snapshot)
        if report.snapshot.skipped:
            watcher.close()

    watcher = gradwatch.watch(model, optimizer, scaler=scaler, every_n_steps=1, logdir=tmp_path, sinks=[closing])
    for factor in (1.0, 1.0, math.inf, 1.0):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, batches(1)[0]) * factor).backward()
        watcher.step()
        scaler.step(optimizer)
        scaler.update()
    assert [s.skipped for s in seen] == [False, False, True]
    assert [(s.step, s.skipped) for s in gradwatch.read_run(tmp_path).snapshots] == [(0, False), (1, False), (2, True)]


def test_a_loss_that_is_told_after_the_gradients_were_read_takes_the_place_of_what_was_told_before():
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watched = Watched(model, optimizer)
    for step in range(3):
        optimizer.zero_grad()
        model(torch.ones(4, 2)).sum().backward()
        watched.watcher.step(loss=float(step))
        if step != 1:
            watched.watcher.record(step + 0.5)
        optimizer.step()

    assert [s.loss for s in watched.snapshots] == [0.5, 1.0, 2.5]


# --- failures ---


class Shy(torch.optim.RMSprop):
    """An optimizer that works, and at some steps lets nobody look."""

    shy = False

    @property
    def grad_scale(self):
        if self.shy:
            raise RuntimeError("do not look at me")


def trouble(model, optimizer, steps):
    for optimizer.shy in steps:
        optimizer.zero_grad()
        loss_of(model, batches(1)[0]).backward()
        optimizer.step()


def test_a_measurement_that_fails_warns_once_and_leaves_out_only_its_step():
    model = tall()
    optimizer = Shy(model.parameters(), lr=0.1)
    watched = Watched(model, optimizer)
    with pytest.warns(
        gradwatch.GradwatchWarning, match="a measurement failed and is left out: RuntimeError: do not look at me"
    ) as caught:
        trouble(model, optimizer, [False, True, False, True, True, False])
    assert len(caught) == 1
    assert [s.step for s in watched.snapshots] == [0, 2, 5]


def test_what_asks_for_an_unknown_scale_and_fails_costs_no_norm(monkeypatch):
    def fails(_self):
        raise RuntimeError("no float64 here")

    monkeypatch.setattr("gradwatch.model.gradient_hooks.Sentinel.difference", fails)
    model = tall()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watched = Watched(model, optimizer, probe_every_n_steps=1)
    with pytest.warns(gradwatch.GradwatchWarning, match="no float64 here"):
        train(model, optimizer, 6, batches(1)[0][0])
    assert len(watched.snapshots) == 6
    assert all(n is not None for s in watched.snapshots for n in s.norm)
    assert all(a.scaled for s in watched.snapshots for a in s.activations or () if a.grad_norm is not None)


def test_measuring_that_keeps_failing_is_switched_off():
    model = tall()
    optimizer = Shy(model.parameters(), lr=0.1)
    watched = Watched(model, optimizer)
    with pytest.warns(gradwatch.GradwatchWarning) as caught:
        trouble(model, optimizer, [True] * 5 + [False])
    assert ["switched off" in str(w.message) for w in caught] == [False, True]
    assert watched.snapshots == []


def test_a_failure_does_not_raise_even_where_warnings_are_errors(caplog):
    model = tall()
    before = model[0].weight.detach().clone()
    optimizer = Shy(model.parameters(), lr=0.1)
    gradwatch.watch(model, optimizer)
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING, "gradwatch"):
        warnings.simplefilter("error")
        trouble(model, optimizer, [True])
    assert not torch.equal(model[0].weight, before)
    assert "do not look at me" in caplog.text


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("explicit", [False, True])
def test_a_forked_child_is_silent(explicit):
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watched = Watched(model, None if explicit else optimizer, probe_every_n_steps=1)

    def step():
        train(model, optimizer, 1)
        if explicit:
            watched.watcher.step()

    step()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            step()
            watched.watcher.step()
            code = 0 if len(watched.snapshots) == 1 else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    step()
    assert len(watched.snapshots) == 2


LEFT = """
import os, pathlib, sys, torch, gradwatch
torch.manual_seed(0)
pairs = ((torch.nn.Linear(6, 6), torch.nn.Sigmoid()) for _ in range(14))
model = torch.nn.Sequential(*(layer for pair in pairs for layer in pair), torch.nn.Linear(6, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
closed = []
class Mine:
    def __call__(self, report): pass
    def close(self): closed.append(os.getpid())
mine = Mine()
watcher = gradwatch.watch(model, optimizer, logdir=sys.argv[1], on_alert=lambda alert: None, sinks=[mine])
def train():
    for _ in range(25):
        optimizer.zero_grad()
        model(torch.randn(4, 6)).square().sum().backward()
        optimizer.step()
train()
content = lambda: {path.name: path.read_bytes() for path in pathlib.Path(sys.argv[1], "gradwatch").iterdir()}
before = content()
child = os.fork()
if child == 0:
    train()
    if sys.argv[2] == "close":
        watcher.close()
        assert closed == []
    sys.exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert content() == before
assert watcher.report.open
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("how", ["exit", "close"])
def test_a_forked_child_that_ends_like_any_process_leaves_the_files_alone(tmp_path, how):
    done = subprocess.run([*warm(), "-c", LEFT, tmp_path, how], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert [a.finding.code for a in gradwatch.read_run(tmp_path).alerts] == ["GW101"]


# --- going on ---


def test_a_saved_state_goes_on_with_step_history_and_open_alerts():
    def fresh_run():
        model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        return model, optimizer, Watched(model, optimizer, on_alert=lambda _: None)

    model, optimizer, watched = fresh_run()
    train(model, optimizer, 3)
    (model(torch.ones(1, 1)).sum() * math.inf).backward()
    optimizer.step()
    state = watched.watcher.state_dict()
    assert watched.watcher.report.open

    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    for kept in (json.loads(json.dumps(state)), torch.load(file, weights_only=True)):
        model, optimizer, watched = fresh_run()
        watched.watcher.load_state_dict(kept)
        assert [a.finding.code for a in watched.watcher.report.open] == ["GW501"]
        assert json.dumps(watched.watcher.state_dict()) == json.dumps(state)  # as text, in which a NaN equals itself
        train(model, optimizer, 1)
        report = watched.reports[0]
        assert report.snapshot.step == 4
        assert report.began == ()
        assert [(a.finding.code, a.began) for a in report.open] == [("GW501", 3)]
        assert report.open[0].finding.onset == 3


def test_a_state_of_another_make_is_refused():
    watcher = gradwatch.watch(tall())
    with pytest.raises(ValueError, match=r"got format 9 for \[0\]"):
        watcher.load_state_dict({**watcher.state_dict(), "format": 9})
    with pytest.raises(ValueError, match=r"of 1 optimizers, got format 1 for \[1, 2\]"):
        watcher.load_state_dict({**watcher.state_dict(), "counts": [1, 2]})
    state = watcher.state_dict()
    with pytest.raises(ValueError, match="format of a history must be 1 to 3, got 4"):
        watcher.load_state_dict({**state, "history": {**state["history"], "format": 4}})


def test_a_watcher_shows_its_layers():
    model = tall()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watched = Watched(model, optimizer)
    loss_of(model, batches(1)[0]).backward()
    optimizer.step()
    assert "Linear" in repr(watched.watcher)
    assert "<table" in watched.watcher._repr_html_() or "<pre" in watched.watcher._repr_html_()


def test_memory_of_copies_is_used_again_and_a_step_that_raises_takes_nothing_with_it():
    class Stumbling(torch.optim.SGD):
        stumbles = False

        def step(self, closure=None):
            if self.stumbles:
                raise RuntimeError("out of luck")
            return super().step(closure)

    model, reports = tall(), []
    optimizer = Stumbling(model.parameters(), lr=0.1)
    with gradwatch.watch(model, optimizer, probe_every_n_steps=1, sinks=[reports.append]):
        for number, batch in enumerate(batches(8)):
            if number == 5:  # others are copied than before
                model[0].weight.grad = None
                model[0].weight.requires_grad_(False)
            optimizer.zero_grad()
            loss_of(model, batch).backward()
            before = {name: p.detach().clone() for name, p in model.named_parameters() if p.grad is not None}
            optimizer.stumbles = number == 3
            if optimizer.stumbles:
                with pytest.raises(RuntimeError, match="out of luck"):
                    optimizer.step()
                continue
            optimizer.step()
            now = dict(model.named_parameters())
            truth = {name: norm64(now[name] - was) / norm64(was) for name, was in before.items()}
            found = column(reports[-1].snapshot, reports[-1].snapshot.update_ratio)
            assert found == pytest.approx(truth, rel=1e-5)
    assert len(reports) == 7
