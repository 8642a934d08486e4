"""The book of losses: each optimizer that steps next has what was told, and once."""

from __future__ import annotations

import pytest
import torch

from gradwatch.watcher.losses import Losses


def test_each_optimizer_has_what_was_told_and_none_has_it_twice():
    losses = Losses()
    losses.record(1.0)
    losses.record(3.0)
    assert losses.fresh
    assert list(losses.of(0)) == [1.0, 3.0]
    losses.taken(0)

    assert not losses.fresh
    assert list(losses.of(0)) == []
    assert list(losses.of(1)) == [1.0, 3.0]


def test_what_is_recorded_after_a_step_is_of_the_next():
    losses = Losses()
    losses.record(1.0)
    losses.taken(0)
    losses.record(2.0)

    assert list(losses.of(0)) == list(losses.of(1)) == [2.0]


def test_what_an_optimizer_has_had_is_of_nobody_once_it_begins_another_step():
    losses = Losses()
    losses.record(1.0)
    losses.begin(0)
    assert list(losses.of(1)) == [1.0]
    losses.taken(0)
    losses.begin(0)

    assert list(losses.of(1)) == []


def test_what_is_told_within_a_step_that_has_its_loss_is_of_nobody():
    losses = Losses()
    losses.record(1.0)
    losses.taken(0)
    losses.end(0)
    assert list(losses.of(1)) == [1.0]
    losses.record(2.0)  # by a closure that is evaluated again
    losses.end(0)

    assert list(losses.of(1)) == []


def test_a_tensor_is_held_without_its_graph_and_what_is_no_number_is_refused():
    losses = Losses()
    losses.record(torch.ones(1, requires_grad=True).sum())
    (held,) = losses.of(0)
    assert held.grad_fn is None
    with pytest.raises(TypeError):
        losses.record(None)
    with pytest.raises(ValueError, match="low"):
        losses.record("low")
    assert list(losses.of(0)) == [held]
