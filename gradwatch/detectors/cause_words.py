"""Measured causes in words, and what to do about them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from gradwatch.detectors.causes import Cause
from gradwatch.detectors.flow_words import FLOWS
from gradwatch.detectors.origins import ORIGINS
from gradwatch.values.report import UNKNOWN, Finding
from gradwatch.values.thresholds import ENOUGH_GAIN, LARGE_GAIN, LARGE_INPUT, OFF_CENTRE, SHRUNK, SOUND_UPDATE

CLIP = (
    "clip the gradient norm (torch.nn.utils.clip_grad_norm_), lower the learning rate or warm it up, or normalize"
    " between the layers"
)
"""What helps against gradients that explode, whatever the cause."""


def said(finding: Finding, otherwise: str) -> tuple[str, str]:
    """Return cause and remedy in words; `otherwise` is what to try where no cause was found."""
    for cause, words in CAUSES.items():
        if finding.cause == cause:
            return words(finding)
    return UNKNOWN, otherwise


def around(finding: Finding, where: str) -> str:
    """Return what keeps a gradient from fading through depth, of that which the network does not have there yet."""
    has = finding.evidence
    if has_both(finding):
        return WARM_UP
    missing = [] if "relus" in has else ["ReLU-like activations with He initialization"]
    missing += [] if "normalized" in has else ["normalization"]
    missing += [] if "skips" in has else ["skip connections"]
    return where + ", ".join(missing[:-1]) + ("," * (len(missing) > 2) + " or " if missing[1:] else "") + missing[-1]


WARM_UP = (
    "warm the learning rate up or lower it, or normalize at the beginning of each block in place of its end (pre-norm,"
    " norm_first=True)"
)
"""What helps a network that has normalization and skip connections."""


def has_both(finding: Finding) -> bool:
    """Tell whether the network has normalization and skip connections, so that they are no remedy."""
    return "normalized" in finding.evidence and "skips" in finding.evidence


def _at(finding: Finding) -> str:
    return finding.names.get("at", finding.place) or "the model"


def _spectral(finding: Finding) -> str:
    norm = finding.evidence.get("spectral_norm")
    return "" if norm is None else f" (spectral norm {norm:.3g})"


def _dead(finding: Finding) -> tuple[str, str]:
    at = _at(finding)
    cause = f"{finding.evidence['dead']:.0%} of the units of {at} are dead: 0 for every input"
    return cause, f"revive {at}: zero its bias, or use LeakyReLU after it; a lower learning rate kills fewer"


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
    return cause, f"{init}; or normalization{'' if 'skips' in evidence else ' or skip connections'}"


def _large(finding: Finding) -> tuple[str, str]:
    at, evidence = _at(finding), finding.evidence
    others = evidence["over"] - 1
    more = f" and {others:.0f} other layer{'s' * (others > 1)}" if others > 0 else ""
    cause = (
        f"the weights of {at} are {evidence['times']:.3g} times as large as its activation needs:"
        f" gain {evidence['gain']:.3g}{_spectral(finding)}"
    )
    if "together" in evidence:
        cause += f"; those of all layers together make the signal {evidence['together']:.2g} times too large"
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
        f"lower the learning rate of {finding.place} by a factor of"
        f" {finding.evidence['update'] / SOUND_UPDATE:.2g}, to steps of {SOUND_UPDATE:.0%} of the weights, warm it up,"
        " or clip the gradient norm"
    )


def _radius(finding: Finding) -> tuple[str, str]:
    radius, place = finding.evidence["spectral_radius"], finding.place
    cause = f"the spectral radius of W_hh is {radius:.2f}, and above 1 it multiplies the gradient at each step"
    return cause, (
        f"scale the recurrent weights of {place} down or initialize them as an orthogonal matrix"
        " (torch.nn.init.orthogonal_), use an LSTM or GRU in its place, or clip the gradient norm"
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
        WARM_UP if has_both(finding) else f"standardize the input of {finding.place}",
    )


def _update(finding: Finding) -> tuple[str, str]:
    evidence = finding.evidence
    now = ""
    if "saturated" in evidence:
        now = f", and {_ends(finding)}"
    elif "dead" in evidence and finding.names.get("at"):
        now = f", and {evidence['dead']:.0%} of its units are dead"
    cause = (
        f"at step {evidence['when']:.0f} an update changed the weights of {_at(finding)} by {evidence['update']:.2g}"
        f" times their own size{now}"
    )
    return cause, "clip the gradient norm, or lower the learning rate or warm it up"


def _ends(finding: Finding) -> str:
    """Say how much of what is saturated."""
    share, function = finding.evidence["saturated"], finding.names["function"]
    if function == "gate":
        return f"{share:.0%} of the gates of {_at(finding)} are saturated, at 0 or 1"
    if function == "clamp":
        return f"{share:.0%} of the output of {_at(finding)} is clamped, where its derivative is 0"
    return f"{share:.0%} of the {function or 'activation'} outputs after {_at(finding)} are saturated"


def _saturated(finding: Finding) -> tuple[str, str]:
    at, evidence, function = _at(finding), finding.evidence, finding.names["function"]
    cause = _ends(finding)
    offset, size = evidence.get("offset", 0.0), evidence.get("size", 0.0)
    gain, enough = evidence.get("gain", 0.0), ENOUGH_GAIN.get(function, 1.0)
    if offset >= OFF_CENTRE or size >= LARGE_INPUT:
        found = [f"off-centre, its mean {offset:.3g} times its spread"] if offset >= OFF_CENTRE else []
        found += [f"far from unit spread, its root mean square {size:.3g}"] if size >= LARGE_INPUT else []
        return (
            f"{cause}: its input is {', and '.join(found)}",
            f"standardize the input of {at}, feature by feature, or normalize it (LayerNorm, BatchNorm)",
        )
    if gain >= LARGE_GAIN * enough:
        cause += f": its weights have gain {gain:.3g}{_spectral(finding)}, and {enough:.3g} is enough"
    if function == "gate":
        return cause, f"torch.nn.init.xavier_normal_(weight) on the weights of {at}, and a lower learning rate"
    if function == "clamp":
        return cause, f"a smooth bound (sigmoid, tanh) in place of the clamp after {at}, or clamp only what is reported"
    if function == "softmax":
        return cause, (
            f"give the loss the numbers before the softmax after {at} (torch.nn.functional.cross_entropy); smaller"
            f" weights of {at}, or a lower learning rate"
        )
    return cause, (
        f"torch.nn.init.xavier_normal_(weight) on {at}, normalization before its {function or 'activation'},"
        " or a ReLU-like activation with He initialization"
    )


def _zero_weights(finding: Finding) -> tuple[str, str]:
    at, after = _at(finding), finding.names.get("activation")
    if finding.evidence["zeros"] > 1:
        return (
            f"the weights of {at} are all exactly 0: each keeps the gradient from the others, and none can move",
            f"leave only one of {at} at zero, and initialize the others as usual (torch.nn.init.kaiming_normal_)",
        )
    why = f", and the {after} after it passes no gradient at 0" if after else ", and no gradient comes to move them"
    return (
        f"the weights of {at} are all exactly 0{why}",
        f"a small initialization of {at} in place of zeros (torch.nn.init.normal_(weight, std=0.02))",
    )


def _flat_loss(finding: Finding) -> tuple[str, str]:
    same = finding.evidence.get("same")
    still = "" if same is None else f", and the loss has been exactly {finding.evidence['loss']:.6g} {same:.0f} times"
    cause = (
        "the gradient is exactly zero already where it comes out of the loss, at the output of the model: the loss is"
        f" flat there, as a clamped or rounded one is{still}"
    )
    return cause, (
        "look in the loss for clamp(), round(), sign(), comparisons and what is saturated; bound it smoothly instead"
        " (limit * torch.tanh(x / limit))"
    )


def _stacked(finding: Finding) -> tuple[str, str]:
    at, kind, count = _at(finding), finding.names["kind"], finding.evidence["stacked"]
    cause = (
        f"{at} is {count:.0f} {kind} layers one upon the other, without a way around, and each takes a share of the"
        " gradient"
    )
    return cause, f"fewer layers in {at} (num_layers=2), or a module for each, with x = x + layer(x) between them"


def _no_signal(_: Finding) -> tuple[str, str]:
    return (
        "the loss is exactly 0 as well: there is nothing in these batches to learn from",
        (
            "look at what the loss is made of: rewards or advantages that are all equal within a group, a mask or"
            " weight of 0, labels that are all ignored"
        ),
    )


def _no_rate(finding: Finding) -> tuple[str, str]:
    if "moved" in finding.evidence:
        return (
            "its learning rate is 0: the schedule has run out",
            "a schedule over as many steps as the training has: count what its step() is called for, batches or epochs",
        )
    return "its learning rate is 0", "look at what sets the learning rate: a schedule, or the units of its time"


def _small_rate(finding: Finding) -> tuple[str, str]:
    rate = f"its learning rate of {finding.evidence['rate']:.2g} is too small"
    if made := finding.evidence.get("made_with"):
        cause = f"{rate}: a schedule has kept it below {SHRUNK:.0%} of the {made:.2g} that the optimizer was made with"
        return cause, "look at what the schedule gives (LambdaLR takes a factor, not the rate itself), and for how long"
    if "norm" in finding.evidence:
        norm = finding.evidence["norm"]
        return f"{rate} for gradients of norm {norm:.2g}", "raise the learning rate, or multiply the loss"
    return f"{rate} to change them", "raise the learning rate"


CAUSES: Mapping[Cause, Callable[[Finding], tuple[str, str]]] = {
    "dead": _dead,
    "saturated": _saturated,
    "weak": _weak,
    "large": _large,
    "constant_input": _constant_input,
    "bias": _bias,
    "offset": _offset,
    "update": _update,
    "rate": _rate,
    "radius": _radius,
    "format": _format,
    **ORIGINS,
    **FLOWS,
    "zero_weights": _zero_weights,
    "flat_loss": _flat_loss,
    "stacked": _stacked,
    "no_signal": _no_signal,
    "no_rate": _no_rate,
    "small_rate": _small_rate,
}
"""The words of each cause that `causes` measures: what it is, and what to try."""
