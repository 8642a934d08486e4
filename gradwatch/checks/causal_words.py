"""Why a module looks ahead, and what to do about it."""

from __future__ import annotations

from typing import Any

from torch import nn

from gradwatch.timesteps.kinds import is_recurrent
from gradwatch.values.causality import Leak

_NORMALIZATIONS = (nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm, nn.modules.instancenorm._InstanceNorm)
_POOLS = (nn.modules.pooling._AvgPoolNd, nn.modules.pooling._MaxPoolNd)
_ADAPTIVE = (nn.modules.pooling._AdaptiveAvgPoolNd, nn.modules.pooling._AdaptiveMaxPoolNd)
_ATTENTION = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer, nn.TransformerEncoder)
_MASK = "nn.Transformer.generate_square_subsequent_mask(timesteps)"


def words(module: nn.Module, leak: Leak, *, training: bool) -> tuple[str, str]:
    """Return the cause and the remedy of a leak.

    Args:
        module: the first whose own output leaks, or in which the fault is.
        leak: what was found.
        training: whether it was in training mode.

    """
    name = f"{leak.module} ({leak.kind})" if leak.module else f"the model ({leak.kind})"
    if leak.before is not None:
        return (
            f"what {leak.before} takes leaks already, by what the forward of {name} computes before it",
            _look(leak.before),
        )
    cause, remedy = _of(module, training=training) or (
        "gives what leaks while nothing that it takes does, by what its forward computes itself",
        _look(None),
    )
    return f"{name} {cause}", remedy


def _look(before: str | None) -> str:
    until = f" up to {before}" if before is not None else ""
    return (
        f"look in it{until} for what sees all timesteps at once: a mean, a sum, a sort or a normalization over time"
        " that is given back to them, a reversed or rolled series, cumsum from the end, attention without a mask"
    )


def _of(module: nn.Module, *, training: bool) -> tuple[str, str] | None:  # noqa: PLR0911  (one for each kind)
    """Return what is known of torch's own modules."""
    if is_recurrent(module) and getattr(module, "bidirectional", False):
        return (
            "is bidirectional: one of its directions has read all that follows",
            "bidirectional=False; where the whole window is known, give only the newest output, without the others",
        )
    if isinstance(module, nn.modules.conv._ConvNd):
        return _of_convolution(module)
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and (training or module.running_mean is None):
        return (
            "averages over the timesteps of the batch too, those to come among them",
            "nn.LayerNorm over the features of each timestep; in evaluation mode it takes its running statistics",
        )
    if isinstance(module, _NORMALIZATIONS):
        return (
            "normalizes by a mean and a variance over all timesteps",
            "normalize over the features of each timestep, or by what was known until then",
        )
    if isinstance(module, _ADAPTIVE):
        return "pools over all timesteps", "give back to a timestep only what was pooled up to it"
    if isinstance(module, _POOLS):
        return (
            f"pools over windows of {_number(module.kernel_size)} that reach ahead of their timestep",
            "padding=0, and nn.functional.pad(x, (kernel_size - 1, 0)) before it",
        )
    if isinstance(module, nn.Upsample):
        return (
            f"interpolates ({module.mode}) between timesteps, and so takes from the next",
            "repeat the last value that is known: torch.repeat_interleave along time",
        )
    if isinstance(module, _ATTENTION):
        return (
            "attends to later timesteps",
            f"its mask argument (attn_mask, mask or tgt_mask) as {_MASK}, with is_causal=True",
        )
    if isinstance(module, nn.Linear):
        return (
            f"is applied along time (its in_features {module.in_features} are the timesteps), and mixes all of them",
            "apply it along the features, or keep of its weight the lower triangle (torch.tril)",
        )
    return None


def _of_convolution(module: nn.modules.conv._ConvNd) -> tuple[str, str]:
    kernel, dilation = _number(module.kernel_size), _number(module.dilation)
    needed = dilation * (kernel - 1)
    if module.transposed:
        return (
            f"spreads each timestep over {kernel}, of which padding cuts off the first",
            f"padding=0, and cut off the last {max(needed, 1)} timesteps of what it gives",
        )
    return (
        f"is centred: of its window of {needed + 1} timesteps a part lies ahead, because padding is on both sides",
        f"padding=0, and nn.functional.pad(x, ({needed}, 0)) before it",
    )


def _number(value: Any) -> int:  # noqa: ANN401  (a number, or one for each dimension)
    return int(value[-1] if isinstance(value, tuple) else value)
