"""Measured causes in words, and what to do about them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from gradwatch.detectors.causes import Cause
from gradwatch.values.report import UNKNOWN, Finding
from gradwatch.values.thresholds import ENOUGH_GAIN, LARGE_GAIN, OFF_CENTRE


def said(finding: Finding, otherwise: str) -> tuple[str, str]:
    """Return cause and remedy in words; `otherwise` is what to try where no cause was found."""
    for cause, words in CAUSES.items():
        if finding.cause == cause:
            return words(finding)
    return UNKNOWN, otherwise


def _at(finding: Finding) -> str:
    return finding.names.get("at", finding.place) or "the model"


def _spectral(finding: Finding) -> str:
    norm = finding.evidence.get("spectral_norm")
    return "" if norm is None else f" (spectral norm {norm:.3g})"


def _dead(finding: Finding) -> tuple[str, str]:
    at = _at(finding)
    cause = f"{finding.evidence['dead']:.0%} of the units of {at} are dead: 0 for every input"
    return cause, f"revive {at}: zero its bias, lower the learning rate, or use LeakyReLU after it"


def _weak(finding: Finding) -> tuple[str, str]:
    evidence, names, function = finding.evidence, finding.names, finding.names["function"]
    count, gain, needed = evidence["weak"], evidence["gain"], evidence["needed"]
    where, more = _at(finding), ""
    if count > 1:
        where, more = f"{names['first']} to {names['until']}", f" ({count:.0f} layers; worst: {where})"
    after = f"the {function} after it" if function else "its activation"
    cause = (
        f"the weights of {where}{more} are too small: gain {gain:.2g}, and {after} needs {needed:.3g}"
        " to keep the gradient from shrinking"
    )
    if function == "sigmoid":
        init = f"ReLU in place of the sigmoids, with torch.nn.init.kaiming_normal_ on the weights of {where}"
    elif function == "tanh":
        init = f"torch.nn.init.xavier_normal_(weight, gain=5/3) on the weights of {where}"
    else:
        init = f"torch.nn.init.kaiming_normal_(weight, nonlinearity='relu') on the weights of {where}"
    return cause, f"{init}; or normalization or skip connections"


def _large(finding: Finding) -> tuple[str, str]:
    at, evidence = _at(finding), finding.evidence
    others = evidence["over"] - 1
    more = f" and {others:.0f} other layer{'s' * (others > 1)}" if others > 0 else ""
    cause = (
        f"the weights of {at} are {evidence['times']:.3g} times as large as its activation needs:"
        f" gain {evidence['gain']:.3g}{_spectral(finding)}"
    )
    return cause, (
        f"torch.nn.init.kaiming_normal_ (ReLU) or xavier_normal_ (tanh) on the weights of {at}{more};"
        " or normalization; or clip the gradient norm"
    )


def _rate(finding: Finding) -> tuple[str, str]:
    cause = (
        "the learning rate is too large for these gradients: the weights themselves are of the size that their"
        " activations need"
    )
    return cause, (
        f"lower the learning rate of {finding.place} by a factor of {finding.evidence['update']:.2g} or more,"
        " warm it up, or clip the gradient norm"
    )


def _format(finding: Finding) -> tuple[str, str]:
    return (
        f"the gradient is computed in {finding.names['format']}, where it is rounded to 0",
        "scale the loss (torch.amp.GradScaler), or compute in bfloat16",
    )


def _constant_input(finding: Finding) -> tuple[str, str]:
    return (
        f"the input of {finding.place} is the same for every sample",
        f"look at what feeds {finding.place}: a dead layer, or a constant",
    )


def _bias(finding: Finding) -> tuple[str, str]:
    return (
        f"its bias alone keeps {finding.evidence['share']:.0%} of them below zero",
        f"set the bias of {finding.place} to zero (torch.nn.init.zeros_)",
    )


def _offset(finding: Finding) -> tuple[str, str]:
    return (
        f"the input of {finding.place} is off-centre: its mean is {finding.evidence['offset']:.3g} times its spread",
        f"standardize the input of {finding.place}",
    )


def _update(finding: Finding) -> tuple[str, str]:
    step, ratio = finding.evidence["when"], finding.evidence["update"]
    return (
        f"at step {step:.0f} an update changed the weights of {_at(finding)} by {ratio:.2g} times their own size",
        "lower the learning rate or warm it up, or clip the gradient norm",
    )


def _saturated(finding: Finding) -> tuple[str, str]:
    at, evidence, function = _at(finding), finding.evidence, finding.names["function"]
    cause = f"{evidence['saturated']:.0%} of the {function or 'activation'} outputs after {at} are saturated"
    offset, gain, enough = evidence.get("offset", 0.0), evidence.get("gain", 0.0), ENOUGH_GAIN.get(function, 1.0)
    if offset >= OFF_CENTRE:
        return (
            f"{cause}: its input is off-centre, its mean {offset:.3g} times its spread",
            f"standardize the input of {at}, or normalize it (LayerNorm, BatchNorm)",
        )
    if gain >= LARGE_GAIN * enough:
        cause += f": its weights have gain {gain:.3g}{_spectral(finding)}, and {enough:.3g} is enough"
    return cause, (
        f"torch.nn.init.xavier_normal_(weight) on {at}, normalization before its {function or 'activation'},"
        " or a ReLU-like activation with He initialization"
    )


def _cut(finding: Finding) -> tuple[str, str]:
    place = finding.place or "the model's own parameters"
    unreached, reached = finding.names["unreached"] or place, finding.names.get("reached")
    if reached is None:
        return (
            f"the gradient reaches nothing after {unreached}: the loss does not use its output",
            f"use the output of {unreached} in the loss, or call requires_grad_(False) on {place}",
        )
    back = f"the gradient comes back to {reached} and ends there"
    if finding.evidence["graph"]:
        return (
            f"{back}: the output of {unreached} has a graph, and {reached} uses none of it",
            f"look between {unreached} and {reached} for detach(), .item(), .numpy(), argmax or round",
        )
    return (
        f"{back}: the output of {unreached} has no graph",
        f"look inside {unreached} for torch.no_grad() or detach()",
    )


def _inside(finding: Finding) -> tuple[str, str]:
    at = finding.names["unreached"] or "the model"
    return (
        f"a gradient arrives at what {at} gives, and none at its weights: its forward passes by them",
        f"look inside {at} for .data, detach(), torch.no_grad() or a copy of its weights",
    )


def _own(finding: Finding) -> tuple[str, str]:
    at = finding.names["unreached"] or "the model"
    return (
        f"a gradient arrives at what {at} gives, and {at} does without this weight of its own",
        "leave it, or call requires_grad_(False) on it; if it is to be used, look for what switches it on",
    )


def _unused(finding: Finding) -> tuple[str, str]:
    at = finding.names["unreached"] or "the model"
    return (
        f"nothing was seen to take what {at} gives",
        (
            f"leave it, or call requires_grad_(False) on {finding.place or 'it'}; if it is to learn, use its output in"
            " the loss, and not by way of argmax, .item() or a comparison"
        ),
    )


def _outside(finding: Finding) -> tuple[str, str]:
    at = finding.names["unreached"] or "the model"
    return (
        f"nothing that the loss depends on is made of what {at} gives",
        f"look between {at} and the loss for detach(), .item(), torch.tensor(), .numpy(), argmax or no_grad()",
    )


def _checkpoint(finding: Finding) -> tuple[str, str]:
    at = finding.names["unreached"] or "the model"
    return (
        f"a reentrant checkpoint runs {at}, and no input of it needs a gradient, so that the graph ends there",
        (
            "torch.utils.checkpoint.checkpoint(..., use_reentrant=False), or let its input need a gradient"
            " (enable_input_require_grads() in transformers)"
        ),
    )


def _zero_input(finding: Finding) -> tuple[str, str]:
    at = _at(finding)
    return (
        f"what {at} takes is exactly zero",
        f"leave it if nothing is to come in there; else look at what feeds {at}",
    )


def _softmax(finding: Finding) -> tuple[str, str]:
    at = finding.names["at"] or "the output"
    return (
        f"it leads to a softmax over one value alone (at {at}), which gives 1 whatever it takes",
        "leave it: with more than one value to choose from it gets a gradient",
    )


def _narrow(finding: Finding) -> tuple[str, str]:
    at, values = finding.names["at"] or "the output", finding.evidence["values"]
    gives = "the same" if values < 2 else "1 and -1"
    return (
        (
            f"all of it goes through a normalization over {values:.0f} value{'s' * (values > 1)} (at {at}), which gives"
            f" {gives} whatever it takes"
        ),
        f"let the normalization at {at} work over more values, or leave it out",
    )


def _state(finding: Finding) -> tuple[str, str]:
    at, evidence = _at(finding), finding.evidence
    return (
        (
            f"it feeds the initial state of {at} alone, which forgets it: the horizon of {at} is"
            f" {evidence['horizon']:.0f} of {evidence['length']:.0f} timesteps"
        ),
        f"leave it, or hand the same to {at} as an input at every timestep",
    )


def _aside(finding: Finding) -> tuple[str, str]:
    names, through = finding.names, finding.evidence.get("through")
    at = f"what {names['at']} gives" if names["at"] else "what it takes"
    if through is None:
        share = f"the gradient that the layers before it get does not come through {names['from']}"
    else:
        share = (
            f"at most {through:.1g} of the gradient at {at} comes through {names['from']}, and the rest passes by it"
        )
    return (
        f"{share}: so it is before a product or a gate that begins near 0, and opens as that grows",
        "leave it while the loss comes down; else begin with larger weights there",
    )


CAUSES: Mapping[Cause, Callable[[Finding], tuple[str, str]]] = {
    "dead": _dead,
    "saturated": _saturated,
    "weak": _weak,
    "large": _large,
    "cut": _cut,
    "inside": _inside,
    "own": _own,
    "unused": _unused,
    "outside": _outside,
    "checkpoint": _checkpoint,
    "zero_input": _zero_input,
    "softmax": _softmax,
    "narrow": _narrow,
    "state": _state,
    "aside": _aside,
    "constant_input": _constant_input,
    "bias": _bias,
    "offset": _offset,
    "update": _update,
    "rate": _rate,
    "format": _format,
}
"""The words of each cause that `causes` measures: what it is, and what to try."""
