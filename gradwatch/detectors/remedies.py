"""What a finding's remedy asks for, as something that can be done to a model: `gradwatch.cure` tries it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from gradwatch.detectors.cause_words import has_both
from gradwatch.detectors.causes import Cause
from gradwatch.detectors.time_words import gates_shut, keeps, kind_of
from gradwatch.values.report import Finding
from gradwatch.values.thresholds import NAMED, SOUND_UPDATE
from gradwatch.values.trials import (
    CLIPPED_AT,
    EPSILON_SHARE,
    FASTER_RATE,
    LARGER_LOSS,
    LARGEST_LOSS,
    REMEMBERED,
    SLOWER_RATE,
)

Action = Literal[
    "forget_and_input_bias",
    "input_bias",
    "update_bias",
    "orthogonal",
    "identity",
    "initialize",
    "begin_small",
    "zero_bias",
    "relu",
    "leaky_relu",
    "smooth_bound",
    "normalize",
    "drop_normalization",
    "skip",
    "pre_norm",
    "standardize",
    "gru",
    "fewer_layers",
    "float32",
    "bfloat16",
    "clip",
    "warm_up",
    "rate",
    "epsilon",
    "scale_loss",
]
"""What can be tried."""


@dataclass(frozen=True)
class Remedy:
    """One thing to try."""

    action: Action
    places: tuple[str, ...] = ()
    """Names of layers or modules; none: all of the model."""
    until: str = ""
    """Where the only place is the beginning of a range of layers: its end."""
    value: float | None = None
    """A bias, a factor, a number of layers, an epsilon: what the action takes."""

    def __str__(self) -> str:
        """Return it in a few words."""
        more = len(self.places) - NAMED
        of = " and ".join(self.places[:NAMED]) + (f" and {more} more" if more > 0 else "")
        at = f" of {of}{f' to {self.until}' if self.until else ''}" if of else ""
        return _WORDS[self.action].format(at=at, value=self.value or 0.0)


_WORDS: Mapping[Action, str] = {
    "forget_and_input_bias": "the log of what matters, {value:.1f}, as forget-gate bias{at}, and minus that for input",
    "input_bias": "input-gate bias{at} set to {value:.1f}",
    "update_bias": "update-gate bias{at} set to {value:.1f}",
    "orthogonal": "recurrent weights{at} orthogonal",
    "identity": "recurrent weights{at} the identity, biases 0",
    "initialize": "weights{at} begun by Glorot (bounded activation) or He (others)",
    "begin_small": "weights{at} begun small in place of 0",
    "zero_bias": "bias{at} set to 0",
    "relu": "ReLU with He initialization as activation{at}",
    "leaky_relu": "LeakyReLU as activation{at}",
    "smooth_bound": "tanh in place of the clamp{at}",
    "normalize": "normalization before the activation{at}",
    "drop_normalization": "no normalization in place{at}",
    "skip": "skip connections{at}",
    "pre_norm": "normalization at the beginning of each block",
    "standardize": "input{at} standardized, feature by feature",
    "gru": "a GRU that keeps its state in place{at}",
    "fewer_layers": "{value:.0f} layers in place of all{at}",
    "float32": "weights in float32",
    "bfloat16": "weights in bfloat16",
    "clip": "gradient norm clipped at {value:g}",
    "warm_up": "learning rate warmed up",
    "rate": "learning rate times {value:.2g}",
    "epsilon": "eps of the optimizer set to {value:.1g}",
    "scale_loss": "loss times {value:.2g}",
}

CLIP = Remedy("clip", value=CLIPPED_AT)
WARM_UP = Remedy("warm_up")
SLOWER = Remedy("rate", value=SLOWER_RATE)
PRE_NORM = Remedy("pre_norm")

NOT_TRIED: Mapping[str, str] = {
    "cut": "where the graph is cut is code of the model's own forward",
    "inside": "how a layer takes its weights is code of its own forward",
    "own": "whether a weight is to be used is code of its own forward",
    "unused": "what takes an output is code of the model's own forward, or the loss",
    "outside": "what takes an output is code of the model's own forward, or the loss",
    "checkpoint": "how a checkpoint is called is code of the model's own forward",
    "zero_input": "what feeds the layer is the data, or code of the model's own forward",
    "left_out": "which parts the loss takes is the loss",
    "softmax": "over how many values it chooses is the data",
    "state": "what a recurrent module takes at each timestep is code of the model's own forward",
    "aside": "it opens by itself",
    "constant_input": "what feeds the layer is the data, or code of the model's own forward",
    "in_data": "it is in the data",
    "in_weights": "the weights were not finite before",
    "by_step": "it is in the optimizer, or in the format of the weights",
    "born_forward": "which operation is guarded is code of the model's own forward, or the loss",
    "born_backward": "which operation is guarded is code of the model's own forward, or the loss",
    "origin_gone": "where it came from is not known",
    "flat_loss": "it is in the loss",
    "no_signal": "it is in the loss, or the data",
    "no_rate": "it is in the schedule of the learning rate",
}
"""By cause, why nothing is tried."""


def remedies(finding: Finding) -> tuple[Remedy, ...]:
    """Return what is to be tried against a finding, in the order of its words; nothing where that is other code."""
    if finding.cause in NOT_TRIED:
        return ()
    by = _BY_CAUSE.get(finding.cause) or _BY_CODE.get(finding.code)
    return tuple(by(finding)) if by is not None else ()


def _at(finding: Finding) -> tuple[str, ...]:
    at = finding.names.get("at", finding.place)
    return (at,) if at else ()


def _here(finding: Finding) -> tuple[str, ...]:
    return (finding.place,) if finding.place else ()


def _of_here(finding: Finding, action: Action) -> Remedy:
    """Return a remedy at the place of a finding, or from there to the last layer that it is about."""
    several = finding.code == "GW601" and finding.evidence["layers"] > 1
    return Remedy(action, _here(finding), finding.names["last"] if several else "")


def _dead(finding: Finding) -> Iterable[Remedy]:
    at = _at(finding)
    return Remedy("zero_bias", at), Remedy("leaky_relu", at), SLOWER


def _weak(finding: Finding) -> Iterable[Remedy]:
    names = finding.names
    action: Action = "relu" if names["function"] == "sigmoid" else "initialize"
    if finding.evidence["weak"] > 1:
        yield Remedy(action, (names["first"],), names["until"])
    else:
        yield Remedy(action, (names["at"],))
    yield Remedy("normalize")
    if "skips" not in finding.evidence:
        yield Remedy("skip")


def _large(finding: Finding) -> Iterable[Remedy]:
    return Remedy("initialize", () if finding.evidence["over"] > 1 else _at(finding)), Remedy("normalize"), CLIP


def _rate(finding: Finding) -> Iterable[Remedy]:
    return Remedy("rate", value=SOUND_UPDATE / finding.evidence["update"]), WARM_UP, CLIP


def _radius(finding: Finding) -> Iterable[Remedy]:
    return Remedy("orthogonal", _here(finding)), Remedy("gru", _here(finding)), CLIP


def _offset(finding: Finding) -> Iterable[Remedy]:
    return (WARM_UP, SLOWER, PRE_NORM) if has_both(finding) else (Remedy("standardize", _here(finding)),)


def _saturated(finding: Finding) -> Iterable[Remedy]:
    at, function, evidence = _at(finding), finding.names["function"], finding.evidence
    if "offset" in evidence or "size" in evidence:
        yield Remedy("standardize", at)
    if function == "clamp":
        yield Remedy("smooth_bound", at)
        return
    yield Remedy("initialize", at)
    if function in ("gate", "softmax"):
        yield SLOWER
        return
    yield Remedy("normalize", at)
    yield Remedy("relu", at)


def _zero_weights(finding: Finding) -> Iterable[Remedy]:
    """Return what moves them: of several, one may stay at 0."""
    count = int(finding.evidence["zeros"])
    return (Remedy("begin_small", tuple(finding.names[f"zero_{i}"] for i in range(max(count - 1, 1)))),)


def _around(finding: Finding) -> Iterable[Remedy]:
    """Return what keeps a gradient from fading through depth, of that which the network does not have there yet."""
    has = finding.evidence
    if has_both(finding):
        return (WARM_UP, SLOWER, PRE_NORM)
    every = {"relus": Remedy("relu"), "normalized": Remedy("normalize"), "skips": Remedy("skip")}
    return [remedy for name, remedy in every.items() if name not in has]


def _silent(finding: Finding) -> Iterable[Remedy]:
    if has_both(finding):
        return (WARM_UP, SLOWER, PRE_NORM)
    return *(_of_here(finding, action) for action in ("zero_bias", "leaky_relu", "normalize")), SLOWER


def _exploding(_: Finding) -> Iterable[Remedy]:
    return CLIP, SLOWER, WARM_UP, Remedy("normalize")


def _steep(finding: Finding) -> Iterable[Remedy]:
    here = _here(finding)
    return Remedy("orthogonal", here), Remedy("initialize", here), Remedy("standardize", here), *_exploding(finding)


def _updates(finding: Finding) -> Iterable[Remedy]:
    return Remedy("rate", value=SOUND_UPDATE / finding.evidence["update"]), CLIP


def _short(finding: Finding) -> Iterable[Remedy]:
    """Return what lengthens a horizon."""
    here, evidence = _here(finding), finding.evidence
    if "entered" in finding.names or "detached" in evidence:
        return  # code of the model's own forward, or of the loop
    need = evidence.get("need", evidence["length"])
    kept = math.log(max(need, 2.0))
    if gates_shut(evidence):
        yield Remedy("standardize", here)
        yield Remedy("initialize", here)
    elif (kind := kind_of(finding)) == "LSTM":
        yield Remedy("forget_and_input_bias", here, value=kept)
        yield Remedy("input_bias", here, value=-kept)
    elif kind == "GRU":
        if not keeps(evidence.get("update_gate", 0.0), evidence["horizon"]):
            yield Remedy("update_bias", here, value=kept)
    elif kind == "RNN":
        if "saturation" in evidence or "spectral_radius" not in evidence:
            yield Remedy("orthogonal", here)
        if "saturation" not in evidence:
            yield Remedy("identity", here)
        yield Remedy("gru", here, value=kept)


def _growing(finding: Finding) -> Iterable[Remedy]:
    yield Remedy("orthogonal", _here(finding))
    if kind_of(finding) not in ("LSTM", "GRU"):
        yield Remedy("gru", _here(finding))
    yield CLIP


def _full(finding: Finding) -> Iterable[Remedy]:
    need = finding.evidence.get("need", finding.evidence.get("length", REMEMBERED))
    return (Remedy("input_bias", _here(finding), value=-math.log(max(need, 2.0))),)


def _worthless(finding: Finding) -> Iterable[Remedy]:
    return () if finding.names.get("operation") == "quotient" else (Remedy("drop_normalization", _at(finding)),)


def _half(finding: Finding) -> Iterable[Remedy]:
    if finding.names.get("format") == "float16":
        return Remedy("bfloat16"), Remedy("float32")
    return (Remedy("scale_loss", value=LARGEST_LOSS),)


def _epsilon(finding: Finding) -> Iterable[Remedy]:
    rms, eps = finding.evidence["rms"], finding.evidence["eps"]
    wanted = rms * EPSILON_SHARE
    return (Remedy("scale_loss", value=eps / wanted), Remedy("epsilon", value=wanted)) if rms else ()


_BY_CAUSE: Mapping[Cause | str, Callable[[Finding], Iterable[Remedy]]] = {
    "dead": _dead,
    "weak": _weak,
    "large": _large,
    "rate": _rate,
    "radius": _radius,
    "format": _half,
    "bias": lambda finding: (_of_here(finding, "zero_bias"),),
    "offset": _offset,
    "update": lambda _: (CLIP, SLOWER, WARM_UP),
    "saturated": _saturated,
    "zero_weights": _zero_weights,
    "stacked": lambda finding: (Remedy("fewer_layers", _at(finding), value=2.0),),
    "small_rate": lambda _: (Remedy("rate", value=FASTER_RATE), Remedy("scale_loss", value=LARGER_LOSS)),
    "narrow": lambda finding: (Remedy("drop_normalization", _at(finding)),),
}
_BY_CODE: Mapping[str, Callable[[Finding], Iterable[Remedy]]] = {
    "GW101": _around,
    "GW106": lambda finding: (Remedy("standardize", _here(finding)),),
    "GW201": _exploding,
    "GW202": _updates,
    "GW203": _exploding,
    "GW205": _exploding,
    "GW206": _exploding,
    "GW207": _steep,
    "GW208": lambda _: (CLIP,),
    "GW209": lambda finding: (Remedy("initialize", _here(finding)),),
    "GW301": _short,
    "GW302": _growing,
    "GW305": _full,
    "GW402": _worthless,
    "GW601": _silent,
    "GW701": _half,
    "GW702": lambda _: (Remedy("float32"), Remedy("rate", value=FASTER_RATE)),
    "GW703": _epsilon,
}
