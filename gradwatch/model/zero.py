"""Gradients that DeepSpeed's ZeRO, of stages 1 and 2, keeps elsewhere than in `.grad`: those parts that are here.

What DeepSpeed offers to gather them is a collective, for which all processes must come together; gradwatch calls none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_MAPPING = "_hp_mapping"
"""Where DeepSpeed notes which part of a parameter this process steps; None there: none of it."""


def gradient_of(parameter: Tensor) -> Tensor | None:
    """Return the gradient of a parameter, or the part of it that ZeRO keeps here; None where there is none."""
    if parameter.grad is not None or not hasattr(parameter, _MAPPING):
        return parameter.grad
    mapping: Any = getattr(parameter, _MAPPING)
    if mapping is None:
        return parameter.detach().new_zeros(0)
    try:
        part: Tensor = mapping.get_lp_grad_fragment(parameter._index_in_param_group).flatten()  # type: ignore[attr-defined]
    except ValueError:  # it is there from the backward pass to the step
        return None
    address = mapping.lp_fragment_address
    whole = part.numel() == parameter.numel()  # in bfloat16 each process sums up all of it
    return part.narrow(0, address.start, address.numel) if whole else part


def holders(parameter: Tensor) -> tuple[int, ...] | None:
    """Return the ranks that each keep a part of a gradient; None where it is not parted."""
    if not hasattr(parameter, _MAPPING):
        return None
    ranks = torch.distributed.get_process_group_ranks(parameter._dp_group)  # type: ignore[attr-defined]
    return tuple(ranks) if len(ranks) > 1 else None
