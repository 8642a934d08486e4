"""Sees, in one step, what units give: which stay silent, which are saturated, and of layers in question, why."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from gradwatch.measurement.norms import spectral_norm
from gradwatch.model.gradient_hooks import of_others, transformed
from gradwatch.model.nested import floats
from gradwatch.values.snapshot import ActivationStats, Cut, Fact, FactName, Function
from gradwatch.values.thresholds import OUTER_SHARE, SILENT_ENTRIES, SILENT_SPELLS

Key = tuple[object, ...]

_SILENT = frozenset({"ReluBackward0", "ThresholdBackward0", "HardtanhBackward0", "HardswishBackward0"})
"""Nodes of activations whose output is exactly 0 where their derivative is."""
_FORMULAS: Mapping[str, Function] = {
    "TanhBackward0": "tanh",
    "SigmoidBackward0": "sigmoid",
    "ReluBackward0": "relu",
    "HardtanhBackward0": "hardtanh",
    "SoftmaxBackward0": "softmax",
}
_ENTRIES = 4096
"""Entries of a unit that are looked at; of larger batches every n-th row."""
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
    formula: Function | None = None


@dataclass
class Seen:
    """What was measured of units and of layers in question, on its way from the device."""

    numbers: Mapping[Key, Tensor] = field(default_factory=dict)
    units: Mapping[str, int] = field(default_factory=dict)
    functions: Mapping[str, Function] = field(default_factory=dict)
    """The activation after each layer."""
    cuts: tuple[Cut, ...] = ()

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
        for name, function in self.functions.items():
            known[name] = dataclasses.replace(known.get(name, ActivationStats(name)), function=function)
        facts = tuple(
            Fact(str(place), cast("FactName", what), numbers["fact", what, place])
            for kind, what, *rest in self.numbers
            if kind == "fact"
            for place in rest
        )
        return tuple(known.values()), facts


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
                with contextlib.suppress(Exception):  # what has no shape or no arithmetic is left out
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
        owner = any(p is not None for p in module._parameters.values())
        with contextlib.suppress(Exception):  # as above
            for tensor in given:
                if tensor.grad_fn is None or hasattr(tensor, "placements"):
                    continue
                if owner and tensor.dim() > 1:
                    _notes(tensor.grad_fn).setdefault(self._mark, Given(name, _dim(module, tensor), tensor.shape))
                self._look(tensor)
            spread = any(
                hasattr(t, "placements") for t in (*given, *floats(inputs), *module._parameters.values())
            )  # each operation on them is a collective
            if owner and name in self.suspects and given and given[0].dim() > 1 and not spread:
                with torch.no_grad():
                    self._question(name, module, floats(inputs), given[0])

    def _look(self, tensor: Tensor) -> None:
        node = tensor.grad_fn
        formula = _FORMULAS.get(node.name(), "relu" if node.name() in _SILENT else None) if node is not None else None
        if node is None or formula is None or self._seen in _notes(node) or hasattr(tensor, "placements"):
            return
        _notes(node)[self._seen] = True
        given = _source(node, self._mark)
        if given is None or given.shape != tensor.shape:
            return
        mine = self._units.setdefault(given.layer, Units())
        mine.calls += 1
        mine.formula = formula
        if mine.calls > _CALLS:
            return
        with torch.no_grad():
            rows = tensor.detach()
            per_unit = rows.numel() // max(rows.shape[given.dim], 1)
            if per_unit > _ENTRIES and given.dim != 0:
                rows = rows[:: min(per_unit // _ENTRIES, rows.shape[0])]
            if node.name() in _SILENT:
                fired = torch.count_nonzero(rows, dim=[d for d in range(rows.dim()) if d != given.dim]).float()
                same = mine.fired is not None and mine.fired.shape == fired.shape
                mine.fired = mine.fired + fired if same and mine.fired is not None else fired
                mine.entries = (mine.entries if same else 0) + rows.numel() // max(rows.shape[given.dim], 1)
            if formula == "tanh":
                mine.saturated.append((rows.abs() > 1 - 2 * OUTER_SHARE).float().mean())
            elif formula == "sigmoid":
                mine.saturated.append(((rows - 0.5).abs() > 0.5 - OUTER_SHARE).float().mean())

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
            spread, mean = x.var(dim=0, correction=0).mean().sqrt(), x.mean(dim=0).square().mean().sqrt()
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
        functions: dict[str, Function] = {}
        theirs = {}
        for name, seen in self._units.items():
            if others and name in modules and of_others(set(map(id, modules[name]._parameters.values())), mine, others):
                theirs[name] = seen
                continue
            if seen.fired is not None and seen.entries:
                numbers["dead", name], units[name] = self._dead(name, seen.fired, seen.entries), len(seen.fired)
            if seen.saturated:
                numbers["saturated", name] = torch.stack(seen.saturated).mean()
                units.setdefault(name, 0)
            if seen.formula is not None:
                functions[name] = seen.formula
        for name in sorted(self.suspects):
            weights = modules[name]._parameters.values() if name in modules else ()
            large = max((p for p in weights if p is not None and p.dim() > 1), key=torch.Tensor.numel, default=None)
            if large is not None and not hasattr(large, "placements"):
                numbers["fact", "spectral_norm", name] = spectral_norm(large.detach())
        cuts = tuple(self._cuts(reached))
        self._units, self._facts, self._completed = theirs, {}, {}
        return Seen(numbers, units, functions, cuts)

    def _dead(self, name: str, fired: Tensor, entries: int) -> Tensor:
        """Return the share of units that have been silent for longer than chance explains."""
        before = self._silent.get(name)
        silent = (
            torch.full_like(fired, entries)
            if before is None or before.shape != fired.shape or before.device != fired.device
            else before + entries
        )
        silent = torch.where(fired > 0, torch.zeros_like(silent), silent)
        self._silent[name] = silent
        alive = (fired > 0).sum()
        rate = fired.sum() / (alive * entries).clamp(min=1)
        enough = torch.where(alive > 0, SILENT_SPELLS / rate.clamp(min=1e-9), torch.zeros_like(rate)).clamp(
            min=SILENT_ENTRIES
        )
        return (silent >= enough).float().mean()

    def _cuts(self, reached: Collection[str]) -> Iterator[Cut]:
        """Tell of each layer in question that the gradient did not reach where it ended."""
        order = list(self._completed)
        for at, name in enumerate(order):
            if name not in self.suspects or name in reached:
                continue
            after = next((i for i in range(at + 1, len(order)) if order[i] in reached), None)
            last = order[(after if after is not None else at + 1) - 1]
            yield Cut(name, last, None if after is None else order[after], graph=self._completed[last])

    def clear(self) -> None:
        """Let go of what was seen in this step, and look no more."""
        self._names, self._units, self._facts, self._completed = {}, {}, {}, {}


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
