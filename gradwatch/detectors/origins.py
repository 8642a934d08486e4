"""Where NaN and infinity came from: which of what was seen counts, and its words."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

from gradwatch.detectors.causes import Cause, with_cause
from gradwatch.values.history import History
from gradwatch.values.layer_columns import inside
from gradwatch.values.report import Finding
from gradwatch.values.snapshot import NotFinite, Origin, Phase, Snapshot
from gradwatch.values.thresholds import UNMOVED

_CAUSES: Mapping[Phase, Cause] = {
    "data": "in_data",
    "weights": "in_weights",
    "forward": "born_forward",
    "backward": "born_backward",
}
_VALUES: Mapping[NotFinite, str] = {"nan": "NaN", "inf": "infinity", "-inf": "minus infinity"}


def origin_of(history: History, snapshot: Snapshot) -> Origin | None:
    """Return where what was not finite in a step came from; None where it was not looked at, or not seen."""
    found = snapshot.origin
    broken = _broken_weights(history, snapshot)
    if broken:  # whatever is made of them, the origin was before
        around = "" if found is None or found.module is None else found.module
        return Origin("weights", next((layer for layer in broken if inside(layer, around)), broken[0]), "nan")
    if found is not None and (found.phase, found.module) == ("backward", None) and not _finite(snapshot.loss):
        return dataclasses.replace(found, phase="forward")
    return found


def broken_by(history: History, first: Snapshot) -> Snapshot | None:
    """Return the step that made weights of something that is not finite, though its gradient was; None: none was seen.

    Args:
        history: what is remembered.
        first: the first step that found them so.

    """
    before = next((s for s in reversed(history.window()) if s.step < first.step), None)
    if before is None or not (before.finite and _finite(before.loss)) or before.update_ratio is None:
        return None
    moved = zip(before.weight_norm or (), before.update_ratio, strict=False)
    return before if any(w is not None and _finite(w) and not _finite(r) for w, r in moved if w) else None


def epsilon_lost(snapshot: Snapshot) -> bool:
    """Tell whether the epsilon of the optimizer that took a step is 0 in the format of a weight that it steps."""
    optimizer = None if snapshot.optimizer is None else snapshot.model.optimizers[snapshot.optimizer]
    if optimizer is None or not optimizer.adaptive or not optimizer.eps:
        return False
    half = any(p.dtype == "float16" for p in snapshot.model.parameters if p.optimizer == snapshot.optimizer)
    return half and optimizer.eps < UNMOVED / 2


def with_step(finding: Finding, step: Snapshot) -> Finding:
    """Return a finding with the step that made weights of it for its cause."""
    optimizer = None if step.optimizer is None else step.model.optimizers[step.optimizer]
    lost = {"eps": optimizer.eps} if optimizer is not None and optimizer.eps and epsilon_lost(step) else {}
    numbers = {"when": float(step.step), "norm": step.norm_global or 0.0, **lost}
    return with_cause(finding, "by_step", numbers, {"optimizer": "" if optimizer is None else optimizer.kind})


def _broken_weights(history: History, snapshot: Snapshot) -> list[str]:
    """Return the layers whose weights were not finite before the step, in the order of the forward pass."""
    known = zip(snapshot.model.parameters, snapshot.weight_norm or (), strict=False)
    broken = {p.layer for p, norm in known if not _finite(norm)}
    return [name for i in history.order if (name := history.model.layers[i].name) in broken] if broken else []


def _finite(number: float | None) -> bool:
    return number is None or math.isfinite(number)


def entered(history: History, snapshot: Snapshot) -> str | None:
    """Return the first layer that took what was not finite in the forward pass, as its gradients tell; None: unknown.

    The gradient of a bias is the sum of what arrives, and finite only if that is; that of the weight is its product
    with what the layer took.
    """
    norms: dict[str, dict[str, list[float]]] = {}
    for p, norm in zip(snapshot.model.parameters, snapshot.norm, strict=True):
        if norm is not None:
            norms.setdefault(p.layer, {}).setdefault(p.role, []).append(norm)
    for i in history.order:
        mine = norms.get(history.model.layers[i].name, {})
        weights, biases = mine.get("weight", []), mine.get("bias", [])
        if biases and all(map(math.isfinite, biases)) and weights and all(map(math.isnan, weights)):
            return history.model.layers[i].name
    return None


def with_origin(finding: Finding, snapshot: Snapshot, origin: Origin) -> Finding:
    """Return a finding with an origin for its cause."""
    names = {
        "value": _VALUES[origin.value],
        "argument": origin.argument,
        "operation": origin.operation,
        **({} if origin.module is None else {"born": origin.module}),
        **({} if snapshot.computed_in is None else {"format": snapshot.computed_in}),
    }
    loss = {} if snapshot.loss is None else {"loss": snapshot.loss}
    return with_cause(finding, _CAUSES[origin.phase], loss, names)


def of_skips(history: History, finding: Finding) -> Finding:
    """Tell where what made a GradScaler skip came from, where a scale that is too large cannot have brought it."""
    looked = history.looks()
    came = [(s, o) for s in looked if (o := origin_of(history, s)) is not None and (o.phase, o.value) not in _BY_SCALE]
    if not came:
        return finding
    counts = {"came": float(len(came)), "looked": float(len(looked))}
    return with_origin(dataclasses.replace(finding, evidence={**finding.evidence, **counts}), *came[-1])


_BY_SCALE = {("backward", "inf"), ("backward", "-inf")}
"""What a loss scale that is too large may bring."""


# --- words ---

_CHECK = "gradwatch.check(model, batch, loss=...)"


def _where(finding: Finding) -> str:
    born = finding.names.get("born")
    return "the loss function" if born is None else born or "the model itself"


def _with_counts(finding: Finding, cause: str) -> str:
    came, looked = finding.evidence.get("came"), finding.evidence.get("looked")
    if came is None or looked is None or came >= looked:
        return cause
    return f"{cause}; it was so in {came:.0f} of {looked:.0f} steps that were looked at: certain batches bring it"


def _in_data(finding: Finding) -> tuple[str, str]:
    names, value = finding.names, finding.names["value"]
    argument, born = names["argument"], names.get("born")
    if born is None:
        what, which = f"what the loss takes beside the output of the model, such as targets, holds {value}", "targets"
    elif argument:
        of = f"of {born}" if born else "of the model"
        what, which = f"the batch itself holds {value}: it is in the argument {argument} {of}", argument
    else:
        what, which = f"{_where(finding)} takes a tensor from elsewhere that holds {value}", "it"
    tell = "tells which" if which != "it" else "tells where"
    return _with_counts(finding, what), (
        f"look at where the data comes from; torch.isfinite({which}) {tell}: drop or fill such samples before the model"
        " takes them"
    )


def _in_weights(finding: Finding) -> tuple[str, str]:
    where = _where(finding)
    return (
        f"weights or buffers of {where} were not finite before this step: the origin is gone, it was in an earlier one",
        f"go back to the last checkpoint that is finite: {_CHECK} on it names the module and the operation",
    )


def _by_step(finding: Finding) -> tuple[str, str]:
    evidence, optimizer = finding.evidence, finding.names["optimizer"] or "the optimizer"
    made = f"at step {evidence['when']:.0f} {optimizer} made weights NaN or infinite, of a gradient that was finite"
    if "eps" in evidence:
        lost = f"its eps of {evidence['eps']:.0g} is 0 in float16, and so is the square of a small gradient"
        return (
            f"{made}: {lost}, and it divides by 0",
            "keep the weights in float32, and let torch.autocast compute in float16 or bfloat16; or set eps=1e-4",
        )
    made += f" (norm {evidence['norm']:.3g})"
    return (
        f"{made}: the update divides by 0, or is too large for the format of the weights",
        "look at the learning rate, eps and weight decay of that step; go back to the last checkpoint that is finite",
    )


def _born_forward(finding: Finding) -> tuple[str, str]:
    where, names = _where(finding), finding.names
    value, operation = names["value"], names["operation"]
    what = f"{operation} in {where}" if operation else where
    before = "what the model gives is finite" if "born" not in names else f"nothing before it holds {value}"
    cause = f"{what} gives {value} in the forward pass, and {before}"
    if names.get("format") == "float16" and names["value"] != "NaN":
        cause += f"; {names['format']} ends at 65,504"
        return _with_counts(finding, cause), (
            f"compute {where} in float32 (torch.autocast(..., enabled=False)), or all in bfloat16"
        )
    otherwise = (
        f"look at what {where} computes: a softmax over nothing but minus infinity, a logarithm or root of what is not"
        " above 0, a division by 0, an exponential or a product that is too large"
    )
    if not operation:
        otherwise += f"; {_CHECK} names the operation"
    return _with_counts(finding, cause), _remedy(operation, otherwise)


def _born_backward(finding: Finding) -> tuple[str, str]:
    where, names = _where(finding), finding.names
    value, operation, loss = names["value"], names["operation"], finding.evidence.get("loss")
    head = "the loss is finite, its derivative is not" if loss is not None else "a derivative is not finite"
    what = f"that of {operation} in {where}" if operation else f"the gradient becomes {value} in {where}"
    cause = f"{head}: {what}"
    if not operation:
        cause += " (sqrt or norm at 0, log of 0, 0 * inf masked by torch.where)"
    otherwise = (
        f"look at what {where} computes: torch.autograd.set_detect_anomaly(True) for one step, or {_CHECK}, names the"
        " operation; add an epsilon there"
    )
    if operation:
        otherwise = f"keep what {operation} takes in {where} off where its slope is infinite: add an epsilon there"
    return _with_counts(finding, cause), _remedy(operation, otherwise)


def _origin_gone(finding: Finding) -> tuple[str, str]:
    entered = finding.names.get("entered")
    seen = f"what {entered} takes is not finite" if entered is not None else "the loss itself is not finite"
    cause = (
        f"{seen}, so it came up in the forward pass or was in the batch; no probe looked at this step, and with its"
        " update the origin is gone"
    )
    return cause, (
        f"{_CHECK} with the last checkpoint before step {finding.onset} and this batch names the module and the"
        " operation, or the argument of the batch that is not finite"
    )


def _remedy(operation: str, otherwise: str) -> str:
    for family, words in _REMEDIES.items():
        if operation in family:
            return words
    return otherwise


_ROOTS = frozenset(
    {"sqrt", "rsqrt", "norm", "vector_norm", "linalg_vector_norm", "pow", "std", "std_mean", "dist", "cdist", "hypot"}
)
_REMEDIES: Mapping[frozenset[str], str] = {
    frozenset({"softmax", "log_softmax", "scaled_dot_product_attention", "multi_head_attention_forward"}): (
        "leave at least one entry of each row unmasked, or mask with a large negative number in place of minus infinity"
    ),
    frozenset({"log", "log2", "log10", "log1p", "xlogy", "logit"}): (
        "keep what the logarithm takes above 0: clamp it to a small number, or use log_softmax or logsigmoid"
    ),
    _ROOTS: "add a small epsilon under the root: its slope at 0 is infinite, and below 0 there is none",
    frozenset({"div", "true_divide", "truediv", "rtruediv", "rdiv", "reciprocal"}): (
        "add a small epsilon to what is divided by, or clamp it away from 0"
    ),
    frozenset({"exp", "exp2", "expm1", "sinh", "cosh"}): (
        "clamp what the exponential takes, or work with logarithms (torch.logsumexp)"
    ),
    frozenset({"acos", "arccos", "asin", "arcsin", "atanh", "arctanh", "acosh", "arccosh"}): (
        "clamp what it takes to the inside of its domain, by a small epsilon at its ends"
    ),
}
"""By operation, what to try."""

ORIGINS: Mapping[Cause, Callable[[Finding], tuple[str, str]]] = {
    "in_data": _in_data,
    "in_weights": _in_weights,
    "by_step": _by_step,
    "born_forward": _born_forward,
    "born_backward": _born_backward,
    "origin_gone": _origin_gone,
}
"""The words of each origin: what it is, and what to try."""
