"""What is said of an optimizer is what it steps with."""

from __future__ import annotations

import torch

from gradwatch.model.optimizers import optimizer_info


def test_epsilon_is_that_of_the_groups_which_may_have_been_changed():
    optimizer = torch.optim.Adam([torch.zeros(2, requires_grad=True)], eps=1.0)
    assert optimizer_info(optimizer).eps == 1.0
    optimizer.param_groups[0]["eps"] = 1e-8
    assert optimizer_info(optimizer).eps == 1e-8
    assert optimizer_info(torch.optim.SGD([torch.zeros(2, requires_grad=True)])).eps is None
