"""Where rows and timesteps lie in an input: one rule, for what is watched and for the model's horizon."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

import gradwatch
from gradwatch.timesteps.layout import layout_of


@pytest.mark.parametrize(
    ("shape", "time", "steps", "squares"),
    [
        ((5, 12, 3), 1, 12, (12, 5)),
        ((5, 12, 3), 0, 5, (5, 12)),
        ((5, 3, 12), 2, 12, (12, 5)),
        ((5, 3, 12), -1, 12, (12, 5)),
        ((5, 12), 1, 12, (12, 5)),  # rows and timesteps without features
        ((12, 3), 0, 12, (12, 1)),  # one row
        ((12,), 0, 12, (12, 1)),
        ((5, 3), None, 1, (1, 5)),  # one timestep
        ((3,), None, 1, (1, 1)),
        ((5, 3, 2), None, 1, (1, 5)),
    ],
)
def test_rows_and_timesteps(shape, time, steps, squares):
    x = torch.randn(shape)
    layout = layout_of(x, time)
    found, lengths = layout.every(x)
    assert (layout.steps, tuple(found.shape), lengths) == (steps, squares, None)
    assert float(found.sum()) == pytest.approx(float(x.double().square().sum()))
    assert layout.take(x).shape[:2] == squares
    assert (layout.single, layout.batched, layout.whole) == (time is None, shape not in {(12, 3), (12,), (3,)}, True)
    assert layout_of(x, time, rows=2).rows == min(squares[1], 2)


def test_a_packed_sequence_knows_its_time():
    packed = pack_sequence([torch.randn(4, 3), torch.randn(2, 3)])
    for time in (None, 0, 1):
        layout = layout_of(packed, time)
        assert (layout.steps, layout.rows, layout.lengths, layout.single) == (4, 2, [4, 2], False)


def test_a_dimension_that_is_not_there_is_refused():
    with pytest.raises(IndexError, match=r"time must be a dimension of the input of shape \(5, 12\), got 2"):
        layout_of(torch.randn(5, 12), 2)


def test_rows_without_features_are_rows_when_watched_as_in_the_horizon():
    model, x = nn.Linear(12, 2), torch.randn(5, 12, requires_grad=True)
    optimizer, reports = torch.optim.SGD(model.parameters(), lr=0.0), []
    with gradwatch.watch(
        model, optimizer, probe_every_n_steps=1, timesteps={"": 1}, sinks=[reports.append], on_alert=lambda _: None
    ):
        for _ in range(2):
            model(x).square().sum().backward()
            optimizer.step()
    (found,) = reports[-1].snapshot.sequences
    assert (found.length, found.rows) == (12, 5)
    assert gradwatch.horizon(model, x, timesteps={"": 1}).rows == found.rows
