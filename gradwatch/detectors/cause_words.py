"""Measured causes in words, and what to do about them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from gradwatch.detectors.causes import FAR, LARGE, Evidence
from gradwatch.values.report import UNKNOWN

# --- in words ---


def said(evidence: Evidence, place: str, otherwise: str) -> tuple[str, str]:
    """Return cause and remedy in words; `otherwise` is what to try where no cause was found."""
    words = _WORDS.get(str(evidence.get("because", "")))
    return words(evidence, place) if words is not None else (UNKNOWN, otherwise)


def _at(evidence: Evidence) -> str:
    return str(evidence["at"]) or "the model"


def _spectral(evidence: Evidence) -> str:
    return f" (spectral norm {float(evidence['spectral_norm']):.3g})" if "spectral_norm" in evidence else ""


def _dead(evidence: Evidence, _place: str) -> tuple[str, str]:
    at = _at(evidence)
    cause = f"{float(evidence['dead']):.0%} of the units of {at} are dead: 0 for every input"
    return cause, f"revive {at}: zero its bias, lower the learning rate, or use LeakyReLU behind it"


def _weak_weights(evidence: Evidence, _place: str) -> tuple[str, str]:
    at, function, gain, needed = (
        _at(evidence),
        str(evidence["function"]),
        float(evidence["gain"]),
        float(evidence["needed"]),
    )
    count, behind = float(evidence["weak"]), f"the {function} behind it" if function else "its activation"
    where = at if count == 1 else f"{evidence['first']} to {evidence['until']}"
    more = f" ({count:.0f} layers; worst: {at})" if count > 1 else ""
    cause = f"the weights of {where}{more} are too small: gain {gain:.2g}, and {behind} needs {needed:.3g} to hand on the gradient as large as it came"
    if function == "sigmoid":
        return (
            cause,
            f"ReLU in place of the sigmoids, with torch.nn.init.kaiming_normal_ on the weights of {where}; or normalization or skip connections",
        )
    init = (
        "torch.nn.init.xavier_normal_(weight, gain=5/3)"
        if function == "tanh"
        else "torch.nn.init.kaiming_normal_(weight, nonlinearity='relu')"
    )
    return cause, f"{init} on the weights of {where}; or normalization or skip connections"


def _large_weights(evidence: Evidence, _place: str) -> tuple[str, str]:
    at, others = _at(evidence), float(evidence["layers over"])
    times, gain = float(evidence["times"]), float(evidence["gain"])
    cause = f"the weights of {at} are {times:.3g} times as large as its activation needs: gain {gain:.3g}{_spectral(evidence)}"
    more = f" and {others - 1:.0f} other layers" if others > 1 else ""
    return (
        cause,
        f"torch.nn.init.kaiming_normal_ (ReLU) or xavier_normal_ (tanh) on the weights of {at}{more}; or normalization; or clip the gradient norm",
    )


def _rate(evidence: Evidence, place: str) -> tuple[str, str]:
    cause = "the learning rate is too large for these gradients: the weights themselves are of the size that their activations need"
    return (
        cause,
        f"lower the learning rate of {place} by a factor of {float(evidence['update']):.2g} or more, warm it up, or clip the gradient norm",
    )


def _rounded(evidence: Evidence, _place: str) -> tuple[str, str]:
    return (
        f"the gradient is computed in {evidence['format']}, where it is rounded to 0",
        "scale the loss (torch.amp.GradScaler), or compute in bfloat16",
    )


def _constant(_evidence: Evidence, place: str) -> tuple[str, str]:
    return (
        f"the input of {place} is the same for every sample",
        f"look at what feeds {place}: a dead layer, or a constant",
    )


def _bias(evidence: Evidence, place: str) -> tuple[str, str]:
    return (
        f"its bias alone keeps {float(evidence['share']):.0%} of them below zero",
        f"set the bias of {place} to zero (torch.nn.init.zeros_)",
    )


def _offset(evidence: Evidence, place: str) -> tuple[str, str]:
    return (
        f"the input of {place} is off-centre: its mean is {float(evidence['offset']):.3g} times its spread",
        f"standardize the input of {place}",
    )


def _kick(evidence: Evidence, place: str) -> tuple[str, str]:
    at = str(evidence.get("at") or place)
    cause = f"at step {float(evidence['when']):.0f} an update changed the weights of {at} by {float(evidence['update']):.2g} times their own size"
    return cause, "lower the learning rate or warm it up, or clip the gradient norm"


def _saturated(evidence: Evidence, _place: str) -> tuple[str, str]:
    at, spectral = _at(evidence), _spectral(evidence)
    function, share = str(evidence["function"]) or "activation", float(evidence["saturated"])
    cause = f"{share:.0%} of the {function} outputs behind {at} are saturated"
    offset, gain = float(evidence.get("offset", 0.0)), float(evidence.get("gain", 0.0))
    needed = 5 / 3 if function == "tanh" else 1.0
    if offset >= FAR:
        return (
            f"{cause}: its input is off-centre, its mean {offset:.3g} times its spread",
            f"standardize the input of {at}, or normalize it (LayerNorm, BatchNorm)",
        )
    if gain >= LARGE * needed:
        cause += f": its weights have gain {gain:.3g}{spectral}, and {needed:.3g} is enough"
    return (
        cause,
        f"torch.nn.init.xavier_normal_(weight) on {at}, normalization in front of its {function}, or a ReLU-like activation with He initialization",
    )


def _cut(evidence: Evidence, place: str) -> tuple[str, str]:
    unreached, reached, what = (
        str(evidence["unreached"]) or place,
        evidence.get("reached"),
        place or "the model's own parameters",
    )
    if reached is None:
        return (
            f"the gradient reaches nothing behind {unreached}: the loss does not use what it gives",
            f"use the output of {unreached} in the loss, or call requires_grad_(False) on {what}",
        )
    if evidence.get("graph"):
        cause = f"the gradient comes back to {reached} and ends there: {unreached} gives a graph, and {reached} takes none of it"
        return cause, f"look between {unreached} and {reached} for detach(), .item(), .numpy(), argmax or round"
    cause = f"the gradient comes back to {reached} and ends there: what {unreached} gives has no graph"
    return cause, f"look inside of {unreached} for torch.no_grad() or detach()"


_WORDS: Mapping[str, Callable[[Evidence, str], tuple[str, str]]] = {
    "dead": _dead,
    "saturated": _saturated,
    "weak": _weak_weights,
    "large": _large_weights,
    "cut": _cut,
    "constant input": _constant,
    "bias": _bias,
    "offset": _offset,
    "update": _kick,
    "rate": _rate,
    "format": _rounded,
}
