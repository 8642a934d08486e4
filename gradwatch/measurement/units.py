"""Sees, in one step, what units give: which stay silent, which are saturated, and of layers in question, why."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradwatch.measurement.norms import spectral_norm
from gradwatch.model.gradient_hooks import of_others, transformed
from gradwatch.model.nested import floats
from gradwatch.values.snapshot import ActivationStats, Fact

Key = tuple[object, ...]

_OUTER = 0.01
"""Share of its range at each end of which a bounded activation counts as saturated: tanh passes 4 % of the gradient there, the sigmoid 1 %."""
_FORMULAS = {
    "TanhBackward0": "tanh",
    "SigmoidBackward0": "sigmoid",
    "ReluBackward0": "relu",
    "ThresholdBackward0": "relu",
    "HardtanhBackward0": "hardtanh",
    "HardswishBackward0": "relu",
    "SoftmaxBackward0": "softmax",
}
"""Activations, by the node that they leave in the graph."""
_SILENT = frozenset({"ReluBackward0", "ThresholdBackward0", "HardtanhBackward0", "HardswishBackward0"})
"""Those whose output is exactly 0 where their derivative is."""
_ENTRIES = 4096
"""Entries of a unit that are looked at; of larger batches every n-th row."""
_WALK = 6
"""Nodes from what a layer gives to what an activation makes of it."""
_CALLS = 8
"""Calls of a layer in one step that are looked at."""
_ENOUGH = 64.0
"""Entries in a row for which a unit must be silent before it counts as dead."""
_SURE = 7.0
"""The same, in entries between two that are not silent as the layer's other units have them: a unit like them is silent for so long by chance once in 1,000."""
_CONVOLUTIONS = {
    nn.Conv1d: 1,
    nn.Conv2d: 2,
    nn.Conv3d: 3,
    nn.ConvTranspose1d: 1,
    nn.ConvTranspose2d: 2,
    nn.ConvTranspose3d: 3,
}
_CHANNELS_SECOND = (nn.modules.batchnorm._NormBase, nn.GroupNorm)


class Given(NamedTuple):
    """What a layer gave, written at its node: so it is known from there, and goes with the graph."""

    layer: str
    dim: int
    """Of the units."""
    shape: torch.Size


@dataclass
class Units:
    """What the activation behind one layer made of its units in this step."""

    fired: Tensor | None = None
    """By unit, entries that are not 0; shape (units,)."""
    entries: int = 0
    """Of each unit."""
    saturated: list[Tensor] = field(default_factory=list)
    """Share of the entries, by call."""
    calls: int = 0
    formula: str = ""


@dataclass
class Seen:
    """What was measured of units and of layers in question, on its way from the device."""

    numbers: Mapping[Key, Tensor] = field(default_factory=dict)
    units: Mapping[str, int] = field(default_factory=dict)
    facts: tuple[Fact, ...] = ()

    def tensors(self) -> Mapping[Key, Tensor]:
        """Return everything that is to be copied."""
        return self.numbers

    def values(
        self, numbers: Mapping[Key, float], heard: tuple[ActivationStats, ...]
    ) -> tuple[tuple[ActivationStats, ...], tuple[Fact, ...]]:
        """Make values of what was copied, put to what was heard of the same modules."""
        known = {stats.module: stats for stats in heard}
        for name, units in self.units.items():
            dead, saturated = numbers.get(("dead", name)), numbers.get(("saturated", name))
            known[name] = dataclasses.replace(
                known.get(name, ActivationStats(name)), units=units or None, dead=dead, saturated=saturated
            )
        facts = [
            Fact(str(place), str(what), numbers["fact", what, place])
            for kind, what, *rest in self.numbers
            if kind == "fact"
            for place in rest
        ]
        return tuple(known.values()), (*self.facts, *facts)


class Causes:
    """Visits the forward pass of one step; see `gradwatch.hooks.Visitor`.

    An activation is known by its node in the graph, whether a module made it or a function, and belongs to the layer from whose output it was made.
    """

    def __init__(self) -> None:
        """Begin with nothing."""
        self._mark, self._seen = object(), object()
        """What this one writes at nodes, beside what other watchers write there."""
        self.suspects: Collection[str] = frozenset()
        """Layers in question, of which more is measured."""
        self._names: Mapping[int, str] = {}
        self._units: dict[str, Units] = {}
        self._facts: dict[Key, Tensor] = {}
        self._silent: dict[str, Tensor] = {}
        """By layer and unit, for how many entries of probes in a row it has been silent."""
        self._scratch: Tensor | None = None
        """For what is worked out of one activation after the other: new memory for each costs as much as the arithmetic."""
        self._completed: dict[str, bool] = {}
        """Modules in the order in which they were done, and whether what they gave has a graph."""

    def arm(self, modules: Mapping[str, nn.Module], *, compiled: bool) -> dict[int, nn.Module]:
        """Choose all modules, by `id`; none where torch.compile is at work."""
        self.clear()
        self._names = {} if compiled else {id(module): name for name, module in modules.items()}
        return {} if compiled else {id(module): module for module in modules.values()}

    def entered(self, _module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Look at what a function made on the way from one module to the next."""
        if torch.is_grad_enabled() and not transformed():
            for tensor in floats(inputs):
                self._look(tensor)

    def left(self, module: nn.Module, inputs: tuple[Any, ...], _kwargs: Mapping[str, Any], output: Any) -> None:  # noqa: ANN401
        """Mark what a layer gives, and look at what an activation does."""
        name = self._names.get(id(module))
        if name is None or transformed():
            return
        given = floats(output)
        if torch._C._current_graph_task_id() == -1:
            self._completed.pop(name, None)
            self._completed[name] = any(t.grad_fn is not None for t in given)
        if not torch.is_grad_enabled():
            return
        owner = bool(module._parameters) and any(p is not None for p in module._parameters.values())
        for tensor in given:
            if owner:
                with contextlib.suppress(Exception):  # what has no shape is left out
                    self._write(tensor, name, module)
            self._look(tensor)
        if owner and name in self.suspects and given:
            with contextlib.suppress(Exception):  # and what has no arithmetic
                taken = floats(inputs)
                # Each operation on them would be a collective.
                spread = any(hasattr(t, "placements") for t in (*given, *taken, *module._parameters.values()))
                if given[0].dim() > 1 and not spread:
                    self._question(name, module, taken, given[0])

    def _write(self, tensor: Tensor, name: str, module: nn.Module) -> None:
        """Write at the node of what a layer gives whose it is."""
        node = tensor.grad_fn
        if node is not None and tensor.dim() > 1 and not hasattr(tensor, "placements"):
            _notes(node).setdefault(self._mark, Given(name, _dim(module, tensor), tensor.shape))

    def _look(self, tensor: Tensor) -> None:
        """Look at what an activation made, if this is that."""
        node = tensor.grad_fn
        kind = node.name() if node is not None else ""
        if kind in _FORMULAS and not hasattr(tensor, "placements"):
            with contextlib.suppress(Exception):  # as above
                self._count(tensor, node, kind)

    def _count(self, tensor: Tensor, node: Any, kind: str) -> None:  # noqa: ANN401  (as below)
        notes = _notes(node)
        if self._seen in notes:
            return
        notes[self._seen] = True
        given = _source(node, self._mark)
        if given is None or given.shape != tensor.shape:
            return
        formula = _FORMULAS[kind]
        mine = self._units.get(given.layer)
        if mine is None:
            mine = self._units[given.layer] = Units()
        mine.calls += 1
        mine.formula = formula
        if mine.calls > _CALLS:
            return
        rows = tensor.detach()  # so that nothing of what follows gets a graph
        per_unit = rows.numel() // max(rows.shape[given.dim], 1)
        if per_unit > _ENTRIES and given.dim != 0:
            rows = rows[:: min(per_unit // _ENTRIES, rows.shape[0])]
        if kind in _SILENT:
            if self._scratch is None or _form(self._scratch) != _form(rows):
                self._scratch = torch.empty_like(rows)
            fired = _fired(rows, given.dim, self._scratch)
            same = mine.fired is not None and mine.fired.shape == fired.shape
            mine.fired = mine.fired + fired if same and mine.fired is not None else fired
            mine.entries = (mine.entries if same else 0) + rows.numel() // max(rows.shape[given.dim], 1)
        elif formula == "tanh":
            mine.saturated.append(_share_above(rows, 0.0, 1 - 2 * _OUTER))
        elif formula == "sigmoid":
            mine.saturated.append(_share_above(rows, 0.5, 0.5 - _OUTER))

    def _question(self, name: str, module: nn.Module, inputs: list[Tensor], output: Tensor) -> None:
        """Measure why the units of a layer may be silent or saturated: its input is off-centre or always the same, or its bias is too large."""
        dim = _dim(module, output)
        others = [d for d in range(output.dim()) if d != dim]
        bias = module._parameters.get("bias")
        if bias is not None and bias.numel() == output.shape[dim] and output.numel():
            top = output.detach().float().amax(dim=others)
            silent = top <= 0
            by_bias = (silent & (top - bias.detach().float() > 0)).sum().float() / silent.sum().clamp(min=1)
            self._facts["fact", "silent_by_bias", name] = by_bias
        if inputs and inputs[0].dim() > 1 and inputs[0].shape[0] > 1:
            x = inputs[0].detach().float()
            apart = x - x[:1]  # exactly 0 where the input is always the same
            middle = apart.mean(dim=0)
            mean = (x[0] + middle).square_().mean().sqrt()
            spread = apart.sub_(middle).square_().mean().sqrt()
            self._facts["fact", "input_offset", name] = torch.where(
                spread > 0, mean / spread, torch.inf
            )  # infinite where the input is always the same

    def take(
        self,
        modules: Mapping[str, nn.Module],
        reached: Collection[str],
        mine: AbstractSet[int],
        others: AbstractSet[int],
    ) -> Seen:
        """Return what this step has brought.

        Args:
            modules: of the model, by name.
            reached: modules at whose output a gradient arrived.
            mine: what the optimizer of this step steps, parameters by `id`.
            others: what the others step; of their layers they will ask.

        """
        numbers: dict[Key, Tensor] = dict(self._facts)
        units: dict[str, int] = {}
        facts = []
        theirs = {}
        alike: dict[tuple[int, int, torch.device], dict[str, Tensor]] = {}
        for name, seen in self._units.items():
            if others and name in modules and of_others(set(map(id, modules[name]._parameters.values())), mine, others):
                theirs[name] = seen
                continue
            if seen.fired is not None and seen.entries:
                units[name] = len(seen.fired)
                alike.setdefault((seen.entries, units[name], seen.fired.device), {})[name] = seen.fired
            if seen.saturated:
                numbers["saturated", name] = torch.stack(seen.saturated).mean()
                units.setdefault(name, 0)
            if name in self.suspects:
                facts.append(Fact(name, f"activation {seen.formula}", 1.0))
        for (entries, *_), fired in alike.items():
            for name, share in zip(fired, self._dead(fired, entries), strict=True):
                numbers["dead", name] = share
        for name in sorted(self.suspects):
            weights = modules[name]._parameters.values() if name in modules else ()
            large = max((p for p in weights if p is not None and p.dim() > 1), key=torch.Tensor.numel, default=None)
            if large is not None and not hasattr(large, "placements"):
                numbers["fact", "spectral_norm", name] = spectral_norm(large.detach())
        facts += self._end_of_gradient(reached)
        self._units, self._facts, self._completed, self._scratch = theirs, {}, {}, None
        return Seen(numbers, units, tuple(facts))

    def _dead(self, fired: Mapping[str, Tensor], entries: int) -> Sequence[Tensor]:
        """Return, for layers with as many units each, the share of units that have been silent for longer than chance explains."""
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
        enough = torch.where(alive > 0, _SURE / rate.clamp(min=1e-9), torch.zeros_like(rate)).clamp(min=_ENOUGH)
        return (silent >= enough).float().mean(1).unbind()

    def _end_of_gradient(self, reached: Collection[str]) -> list[Fact]:
        """Give, after each layer in question that the gradient did not reach, the last module that it did not reach and the first behind that it did."""
        order = list(self._completed)
        facts = []
        for at, name in enumerate(order):
            if name not in self.suspects or name in reached:
                continue
            behind = next((i for i in range(at + 1, len(order)) if order[i] in reached), None)
            last = order[(behind if behind is not None else at + 1) - 1]
            facts += [Fact(name, "done", float(at)), Fact(last, "unreached", float(self._completed[last]))]
            if behind is not None:
                facts.append(Fact(order[behind], "reached", float(behind)))
        return facts

    def clear(self) -> None:
        """Let go of what was seen in this step, and look no more."""
        self._names, self._units, self._facts, self._completed, self._scratch = {}, {}, {}, {}, None


# Comparisons that give booleans, and sums of those, cost torch several times as much on CPU as arithmetic that says the same.


def _form(tensor: Tensor) -> tuple[torch.Size, torch.dtype, torch.device]:
    return tensor.shape, tensor.dtype, tensor.device


def _fired(rows: Tensor, dim: int, scratch: Tensor) -> Tensor:
    """Count by unit the entries that are not 0; a unit with a NaN counts with all of them."""
    others = [d for d in range(rows.dim()) if d != dim]
    ones = torch.abs(rows, out=scratch).clamp_(max=1).ceil_()
    fired = ones.sum(others, dtype=torch.float32)
    return torch.nan_to_num_(fired, nan=rows.numel() / max(rows.shape[dim], 1))


def _share_above(rows: Tensor, middle: float, distance: float) -> Tensor:
    """Return the share of entries farther from the middle than this; NaN is not."""
    return (rows - middle).abs_().sub_(distance).clamp_(min=0).sign_().mean(dtype=torch.float32)


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


def _source(node: Any, key: object) -> Given | None:  # noqa: ANN401
    """Return what layer an activation was made from: the nearest on the way back."""
    front = [node]
    for _ in range(_WALK):
        for one in front:
            mark: Given | None = _notes(one).get(key)
            if mark is not None:
                return mark
        front = [n for one in front for n, _ in one.next_functions if n is not None][:8]
    return None
