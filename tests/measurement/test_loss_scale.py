"""The loss scale is found where nobody tells it: in the scaler that calls the optimizer."""

from __future__ import annotations

import pytest
import torch
from models import tall
from truth import by_hand, norms

import gradwatch
from gradwatch.measurement import loss_scale


@pytest.mark.parametrize("fused", [False, True])
def test_a_scaler_that_calls_the_optimizer_is_seen_and_its_scale_divided_out(fused):
    model, reports, truth = tall(), [], []
    optimizer = torch.optim.Adam(model.parameters(), fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    scales = []
    with gradwatch.watch(model, optimizer, sinks=[reports.append]) as watcher:
        for _ in range(6):
            optimizer.zero_grad()
            scaler.scale(model(torch.randn(5, 4)).square().mean()).backward()
            scales.append(scaler.get_scale())
            truth.append(by_hand(model, scaler.get_scale()))
            watcher.step()
            scaler.step(optimizer)
            scaler.update()

    seen = [r.snapshot for r in reports]
    assert [s.loss_scale for s in seen] == scales
    assert [s.scale for s in seen][1:] == scales[1:]
    for snapshot, expected in list(zip(seen, truth, strict=True))[1:]:
        assert norms(snapshot) == pytest.approx(expected, rel=1e-6)


def test_in_the_hook_form_nothing_is_divided_and_the_scale_is_known():
    model, reports = tall(), []
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with gradwatch.watch(model, optimizer, sinks=[reports.append]):
        scaler.scale(model(torch.randn(5, 4)).square().mean()).backward()
        expected = by_hand(model, 1024.0)
        scaler.step(optimizer)

    (snapshot,) = (r.snapshot for r in reports)
    assert (snapshot.scale, snapshot.loss_scale) == (None, 1024.0)
    assert norms(snapshot) == pytest.approx(expected, rel=1e-6)


def test_without_a_scaler_none_is_seen():
    assert loss_scale.stepping() is None
    assert loss_scale.of_scaler(None) is None
    assert loss_scale.of_scaler(torch.amp.GradScaler("cpu", enabled=False)) is None
