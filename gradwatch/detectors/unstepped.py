"""Parameters that an optimizer steps in vain, and parameters that no optimizer steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from gradwatch.detectors.cause_words import said
from gradwatch.detectors.causes import of_a_cut
from gradwatch.detectors.rule import Rule
from gradwatch.values.history import History
from gradwatch.values.report import Explanation, Finding, Severity
from gradwatch.values.thresholds import UPDATE_PROBES


def unstepped(history: History) -> Iterator[Finding]:
    """GW901: an optimizer steps, and none of its parameters has a gradient. GW902: parameters are in no optimizer."""
    yield from _in_vain(history)
    yield from _left_out(history)


def _in_vain(history: History) -> Iterator[Finding]:
    snapshot, silence = history.snapshot, history.snapshot.silence
    if silence is None:
        return
    absent = snapshot.absent or (None,) * len(snapshot.model.parameters)
    trained = [
        (p, reason)
        for p, reason in zip(snapshot.model.parameters, absent, strict=True)
        if reason != "frozen" and (snapshot.optimizer is None or p.optimizer == snapshot.optimizer)
    ]
    if not trained:
        return
    mine, numbers = {p.layer for p, _ in trained}, history.numbers
    layers = [name for i in history.order if (name := history.model.layers[i].name) in mine]
    ran = any(reason == "disconnected" for _, reason in trained)
    whole = mine == numbers.keys()
    severity = Severity.ERROR
    if history.had_gradients():  # a phase in which others train, or an expert that stands idle
        severity = Severity.INFO
    elif silence.moved:  # something else trains them
        severity = Severity.WARNING
    elif not ran and (snapshot.loss is None or history.had_gradients(anywhere=True)):
        severity = Severity.INFO
    optimizer = "" if snapshot.optimizer is None else snapshot.model.optimizers[snapshot.optimizer].kind
    yield Finding(
        "GW901",
        "disconnected",
        severity,
        "" if whole else _common(layers),
        onset=silence.since,
        evidence={
            "steps": float(silence.steps),
            "parameters": float(len(trained)),
            "ran": float(ran),
            "moved": float(bool(silence.moved)),
            "before": float(history.had_gradients()),
        },
        names={"optimizer": optimizer, "first": layers[0], "last": layers[-1], "whole": "yes" if whole else ""},
    )


def _left_out(history: History) -> Iterator[Finding]:
    snapshot, model, t = history.snapshot, history.model, history.thresholds
    left_out = model.unstepped if snapshot.optimizer == 0 else ()  # one speaks for what none steps
    if not left_out:
        return
    window = history.window()
    columns = {p: column for column, p in enumerate(model.parameters)}
    weighed = [s for s in window if s.weight_norm is not None and s.model.parameters == model.parameters]
    if len(weighed) < UPDATE_PROBES and len(window) < t.window:
        return
    still, recent = weighed[-UPDATE_PROBES:], window[-t.disconnected_steps :]
    stood = {
        p
        for p in left_out
        if len(still) == UPDATE_PROBES
        and len({s.weight_norm[columns[p]] for s in still if s.weight_norm is not None}) == 1
        and len(recent) == t.disconnected_steps
        and all(s.absent is not None and s.absent[columns[p]] == "unstepped" for s in recent)
    }
    # A head that stands still while layers before it learn is forgotten. What stands still before them, as what was
    # trained elsewhere, or gets no gradient, as a copy that follows, may well be meant.
    order = {history.model.layers[i].name: at for at, i in enumerate(history.order)}
    learning = [order[p.layer] for p, n in zip(model.parameters, snapshot.norm, strict=True) if n]
    forgotten = [p for p in left_out if p in stood and learning and order[p.layer] > min(learning)]
    shown = forgotten or left_out
    yield Finding(
        "GW902",
        "unstepped",
        Severity.WARNING if forgotten else Severity.INFO,
        min(shown, key=lambda p: order[p.layer]).layer,
        onset=still[0].step if forgotten else window[0].step,
        evidence={
            "parameters": float(len(left_out)),
            "of": float(len(model.parameters)),
            "forgotten": float(len(forgotten)),
            "stood": float(len(stood)),
        },
        names={"which": model.named(left_out)},
    )


def _common(layers: Sequence[str]) -> str:
    """Return the innermost module that all of these layers lie in; the first of them where that is the model."""
    first = layers[0].split(".")
    for depth in range(len(first), 0, -1):
        name = ".".join(first[:depth])
        if all(layer == name or layer.startswith(f"{name}.") for layer in layers):
            return name
    return layers[0]


def _explain_in_vain(finding: Finding) -> Explanation:
    evidence, names = finding.evidence, finding.names
    count, optimizer = evidence["parameters"], names["optimizer"]
    where = f"from {names['first']} to {names['last']}" if names["first"] == finding.place else f"of {finding.place}"
    what = "no parameter" if names["whole"] else f"none of the {count:.0f} parameters {where}"
    stepped = f"{optimizer} has stepped" if optimizer else "gradients were read"
    message = f"{what} has had a gradient since step {finding.onset}: {stepped} {evidence['steps']:.0f} times in vain"
    if evidence["moved"]:
        return Explanation(
            message,
            "the weights move all the same: their gradients are kept elsewhere than in .grad (DeepSpeed ZeRO, an"
            " optimizer that steps within backward), or were set to None before they were read",
            "read them between backward() and zero_grad(); with DeepSpeed look at stage 0",
        )
    if not evidence["ran"]:
        return Explanation(
            message,
            "no forward pass that was looked at has used them",
            "nothing, if they stand idle on purpose; else look where they should have run",
        )
    if evidence["before"]:
        return Explanation(
            message,
            "they had one before, and run still: a phase in which others train, or a detach() that came into play",
            "nothing, if that is meant; else look at what changed at that step",
        )
    last = names["last"] or "the model"
    between = "look for .data, detach(), torch.no_grad(), torch.tensor(...), .item() or argmax between"
    if "reached" in names:
        return Explanation(message, *said(finding, ""))
    if finding.cause:
        cause = f"the graph ends between the output of {last} and the loss"
    else:
        cause = f"{last} runs, and no backward pass comes back to it"
    return Explanation(
        message,
        cause,
        f"{between} {last} and the loss; setting requires_grad on the loss, or on what goes into it, hides that and"
        " trains nothing",
    )


def _explain_left_out(finding: Finding) -> Explanation:
    evidence, which = finding.evidence, finding.names["which"]
    count, of = evidence["parameters"], evidence["of"]
    are = "is" if count == 1 else "are"
    message = f"{count:.0f} of {of:.0f} parameters {are} to be trained and in no optimizer that is watched: {which}"
    if evidence["forgotten"]:
        return Explanation(
            f"{message}; a gradient comes at every step, and nothing has moved them since step {finding.onset}",
            "they were added or replaced after the optimizer was made, or left out of its groups",
            "make the optimizer last, over model.parameters(); if they are meant to stay, call requires_grad_(False)"
            " on them",
        )
    return Explanation(
        message,
        "they are not trained on purpose, or by an optimizer that was not given",
        "give watch() all optimizers of the model; call requires_grad_(False) on what is not to be trained",
    )


RULES = (
    Rule("GW901", "disconnected", _explain_in_vain, of_a_cut),
    Rule("GW902", "unstepped", _explain_left_out, explains_a_stall=False),
)
