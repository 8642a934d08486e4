"""What stands in the way of a gradient by how the model is built, in words: cuts, side branches, narrow operations."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from gradwatch.detectors.causes import Cause
from gradwatch.values.report import Finding


def _cut(finding: Finding) -> tuple[str, str]:
    place = finding.place or "the model's own parameters"
    unreached, reached = finding.names["unreached"] or place, finding.names.get("reached")
    reached = "the model" if reached == "" else reached
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


def _leave(finding: Finding) -> str:
    return f"leave it, or call requires_grad_(False) on {finding.place or 'it'}; if it is to learn,"


def _unused(finding: Finding) -> tuple[str, str]:
    at = finding.names["unreached"] or "the model"
    return (
        f"nothing was seen to take what {at} gives",
        (
            f"{_leave(finding)} use its output in the loss, and not by way of detach(), argmax, .item(), a comparison,"
            " or what all_gather() brings from all processes, which has no graph"
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
    at = finding.names["at"] or "the model"
    return (
        f"what {at} takes is exactly zero",
        f"leave it if nothing is to come in there; else look at what feeds {at}",
    )


def _left_out(finding: Finding) -> tuple[str, str]:
    at = finding.names["at"] or "the model"
    return (
        f"what {at} gives is put side by side with something else, and of the whole the loss takes other parts alone",
        (f"{_leave(finding)} let the loss take its part too (behind a causal mask, read the last position)"),
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
    at, evidence = finding.names["at"] or "the model", finding.evidence
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


FLOWS: Mapping[Cause, Callable[[Finding], tuple[str, str]]] = {
    "cut": _cut,
    "inside": _inside,
    "own": _own,
    "unused": _unused,
    "outside": _outside,
    "checkpoint": _checkpoint,
    "zero_input": _zero_input,
    "left_out": _left_out,
    "softmax": _softmax,
    "narrow": _narrow,
    "state": _state,
    "aside": _aside,
}
"""By cause: what it is, and what to try."""
