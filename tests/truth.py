"""What tests hold numbers against: gradients taken by hand in float64, and closed forms."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image


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


def bits(value):
    """Return nested values with every tensor and array as its bytes, so that == is bitwise, for NaN too."""
    if isinstance(value, torch.Tensor):
        value = value.detach()
        value = (value if value.layout is torch.strided else value.to_dense()).contiguous().cpu()
        content = value.reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
        return str(value.dtype), tuple(value.shape), content
    if isinstance(value, np.ndarray):
        return value.tobytes()
    if isinstance(value, dict):
        return [(k, bits(v)) for k, v in value.items()]
    return [bits(v) for v in value] if isinstance(value, list | tuple) else value


def gain(rate, length):
    """Return the gain by lag of what fades by a constant rate."""
    return tuple(rate**lag for lag in range(length))


def codes(findings):
    return [(f.code, f.place, f.severity) for f in findings]


def decode(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def cotangent(shape, width):
    """Return the first random direction that a Jacobian is multiplied with: fixed, of signs over sqrt(width)."""
    signs = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32) * 2 - 1
    return signs.double() / math.sqrt(width)
