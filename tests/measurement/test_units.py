"""How far apart the weights of a layer are, against all of its entries."""

from __future__ import annotations

import pytest
import torch

from gradwatch.measurement.units import far_smaller


@pytest.mark.parametrize("shape", [(40, 50), (300, 401), (64, 8, 3), (4096, 64)])
@pytest.mark.parametrize("masked", [0.0, 0.1, 0.24, 0.7])
def test_the_share_of_weights_that_are_far_smaller_is_that_of_all_entries(shape, masked):
    torch.manual_seed(0)
    weight = torch.randn(shape)
    weight[torch.rand(shape) < masked] = -1e4
    weight.flatten()[5::2] = 0.0
    weight[..., 0] = 10.0  # by which nobody may go alone
    entries = weight.double()
    few = entries.abs() < 0.005 * entries.square().mean().sqrt()
    truth = (few & (entries != 0)).sum() / (entries != 0).sum()

    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.complex64):
        assert far_smaller([weight.to(dtype)]).dtype is torch.float32
        assert far_smaller([weight.to(dtype)]).item() == pytest.approx(truth.item(), abs=0.1)


def test_weights_of_one_size_are_never_far_smaller_and_those_of_a_module_are_taken_together():
    torch.manual_seed(0)
    transitions = 0.1 * torch.randn(20, 20)
    transitions[torch.rand(20, 20) < 0.05] = -1e4

    assert far_smaller([torch.randn(20, 200) / 14, transitions]).item() > 0.9
    assert far_smaller([torch.randn(3000, 400)]).item() < 0.02
    for plain in (torch.ones(8, 8), torch.zeros(8, 8), torch.eye(32)):
        assert far_smaller([plain]).item() == 0.0 + (not plain.any())


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool, torch.float16, torch.float8_e4m3fn])
def test_it_is_known_of_weights_of_any_format(dtype):
    assert far_smaller([torch.ones(8, 8).to(dtype)]).item() == 0.0
