"""What tests hold numbers against: gradients taken by hand in float64, and closed forms."""

from __future__ import annotations

import math

import pytest
import torch


def norm64(tensor):
    return float(torch.linalg.vector_norm(tensor.detach().double()))


def by_hand(model, scale=1.0):
    return {name: norm64(p.grad) / scale for name, p in model.named_parameters() if p.grad is not None}


def column(snapshot, values):
    return {p.name: v for p, v in zip(snapshot.model.parameters, values, strict=True) if v is not None}


def norms(snapshot):
    return column(snapshot, snapshot.norm)


def total(values):
    return math.hypot(*values.values())


def same(read, truth):
    assert len(read) == len(truth)
    for mine, theirs in zip(read, truth, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-6, abs=0)
