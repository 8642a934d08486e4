"""What units give in one step: which stay silent, which are saturated, and of layers in question, why."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradwatch.measurement.activations import SILENT, function_of, is_skip, saturated_share
from gradwatch.measurement.barriers import before, saved
from gradwatch.measurement.graph import MATRIX_PRODUCTS, WIDE, near
from gradwatch.measurement.norms import spectral_norm
from gradwatch.model.attempts import Attempts
from gradwatch.model.forward_hooks import ModelView, Part, Pending, ProbeValues, StepView, Transfer
from gradwatch.model.gradient_hooks import transformed
from gradwatch.model.nested import floats
from gradwatch.values.snapshot import ActivationStats, Fact, FactName, Function
from gradwatch.values.thresholds import FAR_SMALLER, SILENT_ENTRIES, SILENT_SPELLS

_ENTRIES = 4096
"""Entries of a unit that are looked at; of larger batches every n-th row."""
_SAMPLE = 512
"""Entries of a weight that are looked at, to see how far apart they are."""
_WALK = 6
"""Nodes from what a layer gives to what an activation makes of it."""
_CALLS = 8
"""Calls of a layer in one step that are looked at."""
_CONVOLUTIONS = {
    nn.Conv1d: 1,
    nn.Conv2d: 2,
    nn.Conv3d: 3,
    nn.ConvTranspose1d: 1,
    nn.ConvTranspose2d: 2,
    nn.ConvTranspose3d: 3,
}
_CHANNELS_SECOND = (nn.modules.batchnorm._NormBase, nn.GroupNorm)


class UnitSource(NamedTuple):
    """The layer whose output a node computes: written at that node, it is known from there and goes with the graph."""

    layer: str
    dim: int
    """Of the units."""
    shape: torch.Size


class Look(NamedTuple):
    """What an activation made of its units in one call."""

    attempt: int
    """The outermost call that it belongs to."""
    fired: Tensor | None
    """By unit, entries that are not 0; shape (units,)."""
    entries: int
    """Of each unit."""
    saturated: Tensor | None
    """Share of the entries."""


@dataclass
class UnitCounts:
    """What the activation after one layer made of its units in this step."""

    looks: list[Look] = field(default_factory=list)
    """One for each call."""
    function: Function | None = None
    """The activation."""

    def fired(self) -> tuple[Tensor, int] | None:
        """Return the sum over the last calls with the same units; None where no unit can be silent."""
        total: tuple[Tensor, int] | None = None
        for look in self.looks:
            if look.fired is None:
                continue
            if total is not None and total[0].shape == look.fired.shape:
                total = total[0] + look.fired, total[1] + look.entries
            else:
                total = look.fired, look.entries
        return total


class Units:
    """Sees what activations make of the outputs of layers; a `Probe`.

    An activation is known by its node in the graph, whether a module made it or a function, and belongs to the layer
    from whose output it was made.
    """

    def __init__(self, attempts: Attempts) -> None:
        """Begin with nothing; `attempts` knows which calls an exception ended."""
        self._attempts = attempts
        self._mark, self._seen = object(), object()
        """What this one writes at nodes, beside what other watchers write there."""
        self.suspects: Collection[str] = frozenset()
        """Layers in question, of which more is measured."""
        self._names: Mapping[int, str] = {}
        self._units: dict[str, UnitCounts] = {}
        self._facts: dict[tuple[str, FactName], Tensor] = {}
        """By layer and name."""
        self._silent: dict[str, Tensor] = {}
        """By layer and unit, for how many entries of probes in a row it has been silent."""
        self._scratch: Tensor | None = None
        """For what is worked out of one activation after the other: new memory costs as much as the arithmetic."""
        self._skip: str | None = None
        """The first module with a skip connection before or in it."""

    def arm(self, view: ModelView) -> dict[int, nn.Module]:
        """Choose all modules, by `id`; none where torch.compile is at work."""
        self.clear()
        self._names = {} if view.compiled else view.names
        return {} if view.compiled else {id(module): module for module in view.modules.values()}

    def entered(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Look at what a function made on the way from one module to the next."""
        if torch.is_grad_enabled() and not transformed():
            for tensor in floats(inputs):
                self._look(tensor, multiplied=bool(module._parameters))
                if self.suspects and self._skip is None and is_skip(tensor.grad_fn):
                    self._skip = self._names.get(id(module))

    def left(self, module: nn.Module, inputs: object, kwargs: object, output: Any) -> None:  # noqa: ANN401
        """Mark what a layer gives, and look at what an activation does."""
        name = self._names.get(id(module))
        if name is None or transformed() or not torch.is_grad_enabled():
            return
        given = floats(output)
        owner = bool(module._parameters) and any(p is not None for p in module._parameters.values())
        for tensor in given:
            if owner:
                with contextlib.suppress(Exception):  # what has no shape is left out
                    self._write(tensor, name, module)
            self._look(tensor)
            if self.suspects and self._skip is None and is_skip(tensor.grad_fn):
                self._skip = name
        if owner and name in self.suspects and given:
            with contextlib.suppress(Exception):  # and what has no arithmetic
                taken = floats(inputs) or floats(kwargs)
                # Each operation on them would be a collective.
                spread = any(hasattr(t, "placements") for t in (*given, *taken, *module._parameters.values()))
                if given[0].dim() > 1 and not spread:
                    self._question(name, module, taken, given[0])

    def _write(self, tensor: Tensor, name: str, module: nn.Module) -> None:
        """Write at the node of a layer's output whose it is."""
        node = tensor.grad_fn
        if node is not None and tensor.dim() > 1 and not hasattr(tensor, "placements"):
            _notes(node).setdefault(self._mark, UnitSource(name, _dim(module, tensor), tensor.shape))

    def _look(self, tensor: Tensor, *, multiplied: bool = False) -> None:
        """Look at what an activation made, if this is that; `multiplied`: weights are applied to it."""
        node = tensor.grad_fn
        kind = node.name() if node is not None else ""
        function = function_of(node, kind)
        if function is None and node is not None:
            self._look_behind(node, multiplied=multiplied)
        elif function is not None and not hasattr(tensor, "placements"):
            with contextlib.suppress(Exception):  # as above
                self._count(tensor, node, kind, function)

    def _look_behind(self, node: Any, *, multiplied: bool) -> None:  # noqa: ANN401  (as below)
        """Look at what ReLUs made that are functions, and of which products have made what was seen."""
        notes = _notes(node)
        if self._mark in notes or self._seen in notes:
            return
        notes[self._seen] = True
        front, found, around = [(node, multiplied)], list[Any](), set[str]()
        for _ in range(_WALK):
            nearer: list[tuple[Any, bool]] = []
            for one, known in front:
                multiplied = known or one.name() in MATRIX_PRODUCTS
                for n in before(one):
                    if self._mark in _notes(n):
                        around.add(_notes(n)[self._mark].layer)
                    elif n.name() != "ReluBackward0":
                        nearer.append((n, multiplied))
                    elif multiplied:
                        found.append(n)
            front = nearer[:WIDE]
        for one in found:
            source, made = _source(one, self._mark), saved(one, "result")
            # Where what a layer gives goes past it too, it is a part of another function, or of a penalty.
            if source is not None and source.layer not in around and made is not None:
                with contextlib.suppress(Exception):  # as above
                    self._count(made, one, "ReluBackward0", "relu")

    def _count(self, tensor: Tensor, node: Any, kind: str, function: Function) -> None:  # noqa: ANN401  (as below)
        notes = _notes(node)
        if self._seen in notes:
            return
        notes[self._seen] = True
        source = _source(node, self._mark)
        if source is None or source.shape != tensor.shape:
            return
        mine = self._units.get(source.layer)
        if mine is None:
            mine = self._units[source.layer] = UnitCounts()
        mine.function = function
        self._leave_out_void(mine)
        if len(mine.looks) == _CALLS:
            return
        rows = tensor.detach()  # so that nothing of what follows gets a graph
        per_unit = rows.numel() // max(rows.shape[source.dim], 1)
        if per_unit > _ENTRIES and source.dim != 0:
            rows = rows[:: min(per_unit // _ENTRIES, rows.shape[0])]
        fired, saturated = None, saturated_share(rows, node, function)
        if kind in SILENT:
            if self._scratch is None or _form(self._scratch) != _form(rows):
                self._scratch = torch.empty_like(rows)
            fired = _fired(rows, source.dim, self._scratch)
        entries = rows.numel() // max(rows.shape[source.dim], 1)
        mine.looks.append(Look(self._attempts.now, fired, entries, saturated))

    def _leave_out_void(self, units: UnitCounts) -> None:
        if self._attempts.void:
            units.looks = [look for look in units.looks if look.attempt not in self._attempts.void]

    def _question(self, name: str, module: nn.Module, inputs: list[Tensor], output: Tensor) -> None:
        """Measure why units may be silent or saturated: an input off-centre or always the same, or a large bias."""
        dim = _dim(module, output)
        others = [d for d in range(output.dim()) if d != dim]
        bias = module._parameters.get("bias")
        if bias is not None and bias.numel() == output.shape[dim] and output.numel():
            top = output.detach().float().amax(dim=others)
            silent = top <= 0
            by_bias = (silent & (top - bias.detach().float() > 0)).sum().float() / silent.sum().clamp(min=1)
            self._facts[name, "silent_by_bias"] = by_bias
        if not inputs:
            return
        x = torch.view_as_real(inputs[0].detach().resolve_conj()) if inputs[0].is_complex() else inputs[0].detach()
        x = x.float()
        if x.numel():
            self._facts[name, "input_size"] = x.square().mean().sqrt()
        if x.dim() > 1 and x.shape[0] > 1:
            apart = x - x[:1]  # exactly 0 where the input is always the same
            middle = apart.mean(dim=0)
            mean = (x[0] + middle).square_().mean().sqrt()
            spread = apart.sub_(middle).square_().mean().sqrt()
            self._facts[name, "input_offset"] = torch.where(
                spread > 0, mean / spread, torch.inf
            )  # infinite where the input is always the same

    def collect(self, step: StepView, transfer: Transfer) -> Part:
        """Return what this step has brought, by layer, and the facts about those in question."""
        dead: dict[str, tuple[Pending, int]] = {}
        saturated: dict[str, Pending] = {}
        functions: dict[str, Function] = {}
        theirs = {}
        # By entries and units: such layers are judged together.
        alike: dict[tuple[int, int, torch.device], dict[str, Tensor]] = {}
        for name, seen in self._units.items():
            module = step.modules.get(name)
            if step.others and module is not None and step.of_others(set(map(id, module._parameters.values()))):
                theirs[name] = seen
                continue
            self._leave_out_void(seen)
            if (total := seen.fired()) is not None and total[1]:
                fired, entries = total
                alike.setdefault((entries, len(fired), fired.device), {})[name] = fired
            if shares := [look.saturated for look in seen.looks if look.saturated is not None]:
                saturated[name] = transfer.add(torch.stack(shares).mean())
            if seen.looks and seen.function is not None:
                functions[name] = seen.function
        for (entries, units, _), counts in alike.items():
            silent = zip(counts, self._dead(counts, entries), strict=True)
            dead |= {name: (transfer.add(share), units) for name, share in silent}
        facts = {key: transfer.add(value) for key, value in (*self._facts.items(), *self._of_weights(step))}
        skips = () if self._skip is None else (Fact(self._skip, "skip_connection", 1.0),)
        self._units, self._facts, self._scratch, self._skip = theirs, {}, None, None

        def part() -> ProbeValues:
            activations = []
            for name, function in functions.items():
                silent, units = dead.get(name, (None, 0))
                activations.append(
                    ActivationStats(
                        name,
                        dead=silent.value if silent is not None else None,
                        saturated=saturated[name].value if name in saturated else None,
                        units=units or None,
                        function=function,
                    )
                )
            measured = tuple(Fact(place, what, value.value) for (place, what), value in facts.items())
            return ProbeValues(tuple(activations), facts=(*measured, *skips))

        return part

    def _of_weights(self, step: StepView) -> Iterator[tuple[tuple[str, FactName], Tensor]]:
        for name in sorted(self.suspects):
            if name in step.modules and (weights := _weights(step.modules[name])):
                yield (name, "spectral_norm"), spectral_norm(max(weights, key=torch.Tensor.numel))
                yield (name, "far_smaller"), far_smaller(weights)

    def _dead(self, fired: Mapping[str, Tensor], entries: int) -> Sequence[Tensor]:
        """Return, for layers of as many units, the share that has been silent for longer than chance explains."""
        now = torch.stack(list(fired.values()))
        known = [self._silent.get(name) for name in fired]
        before = [
            rows.new_zeros(rows.shape) if old is None or old.shape != rows.shape or old.device != rows.device else old
            for old, rows in zip(known, fired.values(), strict=True)
        ]
        silent = (torch.stack(before) + entries) * (now <= 0)
        self._silent.update(zip(fired, silent.unbind(), strict=True))
        alive = (now > 0).sum(1, keepdim=True)
        rate = now.sum(1, keepdim=True) / (alive * entries).clamp(min=1)
        spells = torch.where(alive > 0, SILENT_SPELLS / rate.clamp(min=1e-9), torch.zeros_like(rate))
        return (silent >= spells.clamp(min=SILENT_ENTRIES)).float().mean(1).unbind()

    def clear(self) -> None:
        """Let go of what was seen in this step, and look no more."""
        self._names, self._units, self._facts, self._scratch = {}, {}, {}, None
        self._skip = None


# Comparisons that give booleans, and sums of those, cost several times as much on CPU as arithmetic that says the same.


def _form(tensor: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    return tensor.shape, tensor.dtype, tensor.device


def _fired(rows: Tensor, dim: int, scratch: Tensor) -> Tensor:
    """Count by unit the entries that are not 0; a unit with a NaN counts with all of them."""
    others = [d for d in range(rows.dim()) if d != dim]
    ones = torch.abs(rows, out=scratch).clamp_(max=1).ceil_()
    fired = ones.sum(others, dtype=torch.float32)
    return torch.nan_to_num_(fired, nan=rows.numel() / max(rows.shape[dim], 1))


def _weights(layer: nn.Module) -> list[Tensor]:
    weights = (p for p in layer._parameters.values() if p is not None and p.dim() > 1)
    return [w.detach() for w in weights if not hasattr(w, "placements") and w.numel()]


def far_smaller(weights: Sequence[Tensor]) -> Tensor:
    """Return the share of entries, zeros aside, that are far smaller than the root mean square; float32, shape ().

    Of normal numbers it is 0.004. Some hundred entries of each weight are looked at, in steps that have no factor in
    common with any of its sides: of a matrix not a single column, of kernels not a single place.
    """
    sampled = []
    for weight in weights:
        size = weight.numel()
        step = next(k for k in itertools.count(max(size // _SAMPLE, 1)) if math.gcd(k, size) == 1)
        some = weight.reshape(-1)[::step]
        sampled.append(some.abs().float() if some.is_complex() else some.float().abs())
    every = torch.cat(sampled)
    limit = FAR_SMALLER * torch.linalg.vector_norm(every) / every.numel() ** 0.5
    found: Tensor = 1 - (every > limit).sum(dtype=torch.float32) / every.count_nonzero().clamp(min=1)
    return found


def _dim(module: nn.Module, output: Tensor) -> int:
    """Return the dimension of a layer's output along which its units lie."""
    spatial = next((n for kind, n in _CONVOLUTIONS.items() if isinstance(module, kind)), None)
    if spatial is not None:
        return max(output.dim() - spatial - 1, 0)
    return 1 if isinstance(module, _CHANNELS_SECOND) else output.dim() - 1


def _notes(node: Any) -> dict[object, Any]:  # noqa: ANN401  (nodes have no common type that tells of this)
    """Return what is written at a node."""
    found: dict[object, Any] = node.metadata
    return found


def _source(node: Any, key: object) -> UnitSource | None:  # noqa: ANN401
    """Return what layer an activation was made from: the nearest on the way back."""
    marks: Iterator[UnitSource | None] = (_notes(one).get(key) for one in near(node, _WALK))
    return next((mark for mark in marks if mark is not None), None)
