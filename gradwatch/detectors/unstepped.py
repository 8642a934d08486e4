"""Parameters that an optimizer steps in vain, and parameters that no optimizer steps, or that are none of the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from gradwatch.detectors.cause_words import said
from gradwatch.detectors.causes import of_a_cut
from gradwatch.detectors.rule import Rule
from gradwatch.values.autograd import Stray
from gradwatch.values.history import History
from gradwatch.values.layer_columns import around, holder, inside
from gradwatch.values.report import Explanation, Finding, Severity
from gradwatch.values.snapshot import ParameterInfo, Silence, Snapshot
from gradwatch.values.thresholds import LEFT_OUT, NAMED, UPDATE_PROBES


def unstepped(history: History) -> Iterator[Finding]:
    """GW900: nothing steps what is watched. GW901: an optimizer steps, and none of its parameters has a gradient.

    GW902: parameters are in no optimizer. GW906: weights are no parameters.
    """
    yield from _unheard(history)
    yield from _in_vain(history)
    yield from _left_out(history)
    yield from _unregistered(history)


def _unheard(history: History) -> Iterator[Finding]:
    """Find that a training goes on, and that not one step of it came to the watcher."""
    snapshot, silence = history.snapshot, history.snapshot.silence
    if silence is None or silence.steps:
        return
    mine = {p.layer for p in snapshot.model.parameters if p.optimizer == snapshot.optimizer} if silence.watched else ()
    layers = [name for i in history.order if (name := history.model.layers[i].name) in mine]
    yield Finding(
        "GW900",
        "unstepped",
        _of_silence(silence),
        around(layers) if layers else "",
        onset=silence.since,
        evidence={
            "told": float(silence.told),
            **({} if silence.moved is None else {"moved": float(silence.moved)}),
            **({"nonfinite": 1.0} if silence.nonfinite else {}),
            **({"watched": 1.0} if silence.watched else {}),
        },
        names={"optimizer": _kind(snapshot), "by": silence.by},
    )


def _of_silence(silence: Silence) -> Severity:
    """Judge that no step was heard; an optimizer that rests while others step may well have its turn later."""
    if silence.watched and not silence.ended:
        return Severity.INFO
    return Severity.ERROR if silence.moved is False else Severity.WARNING


def _kind(snapshot: Snapshot) -> str:
    """Return what optimizer took the step; "" where the gradients were only read."""
    return "" if snapshot.optimizer is None else snapshot.model.optimizers[snapshot.optimizer].kind


def _in_vain(history: History) -> Iterator[Finding]:
    snapshot, silence = history.snapshot, history.snapshot.silence
    if silence is None or not silence.steps:
        return
    absent = snapshot.absent or (None,) * len(snapshot.model.parameters)
    own = [
        (p, reason)
        for p, reason in zip(snapshot.model.parameters, absent, strict=True)
        if snapshot.optimizer is None or p.optimizer == snapshot.optimizer
    ]
    alive = [(p, reason) for p, reason in own if reason != "frozen"]
    frozen = not alive
    if not own or (frozen and not history.had_gradients()):
        return
    trained = alive or own
    mine, numbers = {p.layer for p, _ in trained}, history.numbers
    layers = [name for i in history.order if (name := history.model.layers[i].name) in mine]
    ran = any(reason == "disconnected" for _, reason in trained)
    whole = mine == numbers.keys()
    severity = Severity.ERROR
    if frozen:  # for a turn of another network's that never ended, or on purpose
        severity = Severity.INFO if history.improved else Severity.WARNING
    elif history.had_gradients():  # a phase in which others train, or an expert that stands idle
        severity = Severity.INFO
    elif silence.moved:  # something else trains them
        severity = Severity.WARNING
    elif not ran and (snapshot.loss is None or history.had_gradients(anywhere=True)):
        severity = Severity.INFO
    yield Finding(
        "GW901",
        "disconnected",
        severity,
        "" if whole else around(layers),
        onset=silence.since,
        evidence={
            "steps": float(silence.steps),
            "parameters": float(len(trained)),
            "ran": float(ran),
            "moved": float(bool(silence.moved)),
            "before": float(history.had_gradients()),
            "frozen": float(frozen),
        },
        names={"optimizer": _kind(snapshot), "first": layers[0], "last": layers[-1], "whole": "yes" if whole else ""},
    )


def _left_out(history: History) -> Iterator[Finding]:
    snapshot, model, t = history.snapshot, history.model, history.thresholds
    left_out = history.columns.unstepped if snapshot.optimizer == 0 else ()  # one speaks for what none steps
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
    order = {history.model.layers[i].name: at for at, i in enumerate(history.order)}
    learning = {p.layer for p, n in zip(model.parameters, snapshot.norm, strict=True) if n}

    def after(layer: str) -> bool:
        """Tell whether a layer learns at, in or before this one."""
        before = (other for other in learning if order[other] <= order[layer])
        return any(inside(other, layer) for other in learning) or any(not inside(layer, other) for other in before)

    # A head that stands still while layers before it learn is forgotten; so is what was frozen or stepped before, a
    # bias whose weight learns, and where the loss stands still, what lies in the middle of what learns. What stands
    # before all that, gets no gradient, as a copy that follows, or is most of a model may well be meant.
    trained = [p for p in model.parameters if p.trainable is not False]
    few = len(left_out) < LEFT_OUT * len(trained)
    small = sum(p.elements for p in left_out) < LEFT_OUT * sum(p.elements for p in trained)
    last = max((order[layer] for layer in learning), default=-1)
    stands = history.improved is False and len(window) >= t.window
    some_biases = not {p for p in trained if p.role != "weight"}.issubset(left_out)  # all are left out by a rule
    empty = sum(optimizer.empty for optimizer in model.optimizers)  # something was to be in there

    def is_forgotten(p: ParameterInfo) -> bool:
        beside = holder(p.layer)  # as the weight that low-rank ones are added to
        alone = p.layer not in learning and not (beside and any(inside(other, beside) for other in learning))
        in_the_middle = stands and alone and after(p.layer) and order[p.layer] < last
        in_parts = small and some_biases and p.layer in learning
        before = p.replaced or p.name in history.track.frozen or p.name in history.track.left
        return bool(empty) or before or in_the_middle or in_parts or (few and after(p.layer))

    forgotten = [p for p in left_out if p in stood and is_forgotten(p)]
    shown = sorted(forgotten or left_out, key=lambda p: (not p.layer, order[p.layer]))  # "" would be the whole model
    yield Finding(
        "GW902",
        "unstepped",
        Severity.WARNING if forgotten else Severity.INFO,
        shown[0].layer,
        onset=still[0].step if forgotten else history.since(s.model.unstepped == model.unstepped for s in window),
        evidence={
            "parameters": float(len(shown)),
            "of": float(len(model.parameters)),
            "forgotten": float(len(forgotten)),
            **({"empty": float(empty)} if empty and forgotten else {}),
            **({"replaced": 1.0} if any(p.replaced for p in forgotten) else {}),
        },
        names={"which": model.named(shown)},
    )


def _unregistered(history: History) -> Iterator[Finding]:
    """Find tensors that get gradients, are none of the model's parameters, and stand still or are made at each step.

    What moves is stepped by somebody. What is held by a module in evaluation mode, as a teacher is, may be meant.
    """
    looks = history.looks(UPDATE_PROBES)
    if not looks or not looks[-1].strays:
        return
    seen = [{stray.number: stray for stray in s.strays or ()} for s in looks]
    if len(seen) < UPDATE_PROBES or not all(seen):
        return
    still = [
        stray
        for stray in seen[-1].values()
        if stray.weight_norm is not None
        and all(
            (was := its.get(stray.number)) is not None
            and (was.weight_norm, was.version) == (stray.weight_norm, stray.version)
            for its in seen
        )
    ]
    found = still or _made_anew(seen)
    if not found:
        return
    shapes = list(dict.fromkeys(str(stray.shape) for stray in found))
    kinds = dict.fromkeys(stray.kind for stray in found if stray.kind)
    yield Finding(
        "GW906",
        "unstepped",
        Severity.WARNING if any(stray.training for stray in found) else Severity.INFO,
        "",
        onset=looks[0].step,
        evidence={
            "tensors": float(len(found)),
            "still": float(bool(still)),
            "parameters": float(any(stray.parameter for stray in found)),
        },
        names={"shapes": ", ".join(shapes[:NAMED]) + ", ..." * (len(shapes) > NAMED), "kinds": ", ".join(kinds)},
    )


def _made_anew(seen: Sequence[Mapping[int, Stray]]) -> list[Stray]:
    """Return the parameters of the last look that no other has seen, if the others had as many of their own."""
    new = [
        [
            stray
            for number, stray in its.items()
            if stray.parameter and not any(number in other for other in seen if other is not its)
        ]
        for its in seen
    ]
    same = len({tuple(sorted(stray.shape for stray in its)) for its in new}) == 1
    return new[-1] if same else []


def _explain_in_vain(finding: Finding) -> Explanation:
    evidence, names = finding.evidence, finding.names
    count, optimizer = evidence["parameters"], names["optimizer"]
    where = f"from {names['first']} to {names['last']}" if names["first"] == finding.place else f"of {finding.place}"
    what = "no parameter" if names["whole"] else f"none of the {count:.0f} parameters {where}"
    stepped = f"{optimizer} has stepped" if optimizer else "gradients were read"
    message = f"{what} has had a gradient since step {finding.onset}: {stepped} {evidence['steps']:.0f} times in vain"
    if evidence["frozen"]:
        return Explanation(
            message,
            "they had one before, and requires_grad is False for all of them since",
            "call requires_grad_(True) on them once the other network has had its turn; where they are to stay frozen,"
            " do not step their optimizer",
        )
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
    evidence, count = finding.evidence, finding.evidence["parameters"]
    every = f"{count:.0f} of {evidence['of']:.0f} parameters {'is' if count == 1 else 'are'} to be trained"
    message = f"{every} and in no optimizer that is watched: {finding.names['which']}"
    if evidence["forgotten"]:
        them = "it" if count == 1 else "them"
        message += f"; a gradient comes at every step, and nothing has moved {them} since step {finding.onset}"
        if "empty" in evidence:
            groups = f"{evidence['empty']:.0f} groups" if evidence["empty"] > 1 else "a group"
            return Explanation(
                message,
                f"{groups} of the optimizer's parameters {'are' if evidence['empty'] > 1 else 'is'} empty: a filter or"
                " generator gives what it has once, and was used up, or a condition fits nothing",
                "list(...) of the filter before anybody goes through it; look at optimizer.param_groups",
            )
        if "replaced" in evidence:
            return Explanation(
                message,
                "the optimizer has others in place of this, without a gradient: layers were replaced after it was made,"
                " as resizing an embedding or adapting a head does",
                "make the optimizer last, over model.parameters()",
            )
        return Explanation(
            message,
            "they were added or replaced after the optimizer was made, or left out of its groups",
            "make the optimizer last, over model.parameters(); if they are meant to stay, call requires_grad_(False)"
            " on them",
        )
    return Explanation(
        message,
        "they are not trained on purpose, or by an optimizer that was not given",
        "give watch() all optimizers of the model; call requires_grad_(False) on what is not to be trained",
    )


def _explain_unregistered(finding: Finding) -> Explanation:
    evidence, names = finding.evidence, finding.names
    count, still, kinds = evidence["tensors"], evidence["still"], names["kinds"]
    one = count == 1
    of = f" of {kinds}" if kinds else ""
    message = (
        f"{count:.0f} tensor{'' if one else 's'}{of} that the model computes with, and that"
        f" get{'s a gradient' if one else ' gradients'}, {'is' if one else 'are'} none of its parameters"
        f" (shape{'' if one else 's'} {names['shapes']}): "
    )
    them = "it" if one else "them"
    if not still:
        return Explanation(
            f"{message}{'it is' if one else 'they are'} made anew at each step, since step {finding.onset}",
            "layers or parameters that forward() makes are gone after it, and in no optimizer",
            "make them once, in __init__, and use them in forward()",
        )
    if kinds:
        cause = "modules in a plain list, dict or other object are not registered, and model.parameters() lacks theirs"
    elif evidence["parameters"]:
        cause = "nn.Parameters in a list, or of which .to() or arithmetic made another before it was assigned, are not"
        cause += " registered"
    else:
        cause = "a tensor with requires_grad=True is no nn.Parameter, and is not registered"
    return Explanation(
        f"{message}nothing has moved {them} since step {finding.onset}",
        cause,
        "nn.ModuleList, nn.ModuleDict, nn.ParameterList, or assign the nn.Parameter itself, before the optimizer is"
        " made; requires_grad_(False) on what is to stay as it is",
    )


def _explain_unheard(finding: Finding) -> Explanation:
    evidence, names = finding.evidence, finding.names
    told, by, optimizer = evidence["told"], names["by"], names["optimizer"]
    if "watched" in evidence:
        return Explanation(
            f"{by} has stepped {told:.0f} times, and the {optimizer} of {finding.place or 'other parameters'} not once,"
            " though gradients come to what it is to step",
            "its step() is never called; another optimizer's may be called in its place",
            f"call step() of the {optimizer} of {finding.place or 'these parameters'} in its turn; nothing, if it waits"
            " on purpose",
        )
    if by and optimizer:
        return Explanation(
            f"{by}, which is not watched, has stepped parameters of this model {told:.0f} times, and {optimizer},"
            " which is, not once: nothing is measured",
            f"{by} trains this model",
            f"give watch() the {by}",
        )
    if by:
        return Explanation(
            f"{by} has stepped parameters of this model {told:.0f} times, and nobody has called watcher.step():"
            " nothing is measured",
            "watch() was given no optimizer",
            f"give watch() the {by}, or call watcher.step() after each backward()",
        )
    what = f"{optimizer} has not stepped once" if optimizer else "nobody has called watcher.step()"
    message = f"{told:.0f} losses or gradients were told, and {what}: no step is measured"
    if evidence.get("nonfinite") and optimizer:
        return Explanation(
            f"{message}; its gradients are NaN or infinite",
            "a GradScaler skips such steps: it does not call the optimizer at all. What overflows in float16 (above"
            " 65,504) does so at any loss scale",
            "gradwatch.check(model, batch, loss=...) names the module and the operation; compute that in float32"
            " (torch.autocast(..., enabled=False)), or all in bfloat16; give watch() the scaler",
        )
    if evidence.get("moved") == 0.0:
        return Explanation(
            f"{message}, and no weight has changed",
            "optimizer.step() is never called, or not of an optimizer that was made of this very model",
            "call optimizer.step() after backward(), of an optimizer over model.parameters() of the model that trains",
        )
    return Explanation(
        message,
        "something else than its step() moves the weights" if evidence.get("moved") else "",
        "give watch() the optimizer whose step() is called, or call watcher.step() after each backward()",
    )


RULES = (
    Rule("GW900", "unstepped", _explain_unheard),
    Rule("GW901", "disconnected", _explain_in_vain, of_a_cut),
    Rule("GW902", "unstepped", _explain_left_out, explains_a_stall=False),
    Rule("GW906", "unstepped", _explain_unregistered, explains_a_stall=False),
)
