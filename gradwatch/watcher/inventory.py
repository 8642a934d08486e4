"""The optimizers and the model as they are now: what is stepped, in which column it stands, what ran, and what has no gradient."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from torch import Tensor, nn

from gradwatch.measurement.measurement import Measurement
from gradwatch.model import layers
from gradwatch.model.forward_hooks import ForwardTrace
from gradwatch.model.optimizer_hooks import StepHooks
from gradwatch.values.snapshot import Absent, ModelInfo


@dataclass
class Slot:
    """One optimizer (None: the loop has none) and where it stands."""

    index: int
    optimizer: Any
    hooks: StepHooks | None = None
    count: int = 0
    """The number of its next step."""
    stride: int = 1
    tracing: bool = False
    """Whether somebody looks at the forward pass of its next step."""
    extra: bool = False
    """Whether its next step is a probe out of turn, because an alert has begun."""
    reading: Measurement | None = None
    owed: str | None = None
    """The step for which the process that speaks for this one waits."""
    ids: list[int] = field(default_factory=list)
    columns: list[int] = field(default_factory=list)
    model: ModelInfo | None = None
    """The description that `columns` belongs to."""
    weighed: bool = False
    """Whether the weights were measured since `columns` was made."""
    absent: dict[int, Absent] = field(default_factory=dict)
    """What the last look at the forward pass said of the columns that have no gradient or may have zeros in its place."""
    spare: dict[int, Tensor] = field(default_factory=dict)
    """By column, memory of the last probe's copies of weights."""
    turn: int = 0
    """The parameter with which the next probe begins to copy, when not all of them fit the budget."""


class Inventory:
    """Knows the model without holding it, and finds out anew when parameters have come, gone or been replaced."""

    def __init__(self, model: nn.Module, slots: Sequence[Slot], trace: ForwardTrace) -> None:
        """Describe the model as it is."""
        self.model = weakref.ref(model)
        self._slots = slots
        self.trace = trace
        self.order: dict[str, int] = {}
        """Position of each layer in the first forward pass in which a probe has seen it."""
        self.info = self._describe(model)

    def _describe(self, model: nn.Module) -> ModelInfo:
        flat = layers.flattened(model)
        optimizers, shapes = (
            [s.optimizer for s in self._slots if s.optimizer is not None],
            {i: shape for i, (shape, _) in flat.items()},
        )
        info, self._columns = layers.describe(model, optimizers, self.order, shapes)
        self.spread = {self._columns[i]: ranks for i, (_, ranks) in flat.items() if i in self._columns}
        """By column, the ranks that hold pieces of what does not tell that itself, as a DTensor does."""
        known = ((self._columns.get(id(p)), p.requires_grad) for p in model.parameters())
        self.frozen = [
            c for c, trained in known if c is not None and not trained and info.parameters[c].optimizer is None
        ]
        """Columns that are frozen and that no optimizer steps, as of the last description."""
        return info

    def look_ahead(self, slot: Slot) -> bool:
        """Look at the forward pass of the next step of this optimizer; False where torch.compile hides it, but for recurrent modules."""
        model = self.model()
        if not self.trace.armed and model is not None:
            self.trace.arm(layers.named_modules(model))
        slot.tracing = self.trace.armed
        return not self.trace.compiled

    def take_trace(self, slot: Slot) -> frozenset[str] | None:
        """Return the modules that ran in the forward pass of this step; None if nobody looked."""
        if not slot.tracing:
            return None
        slot.tracing = False
        if not any(s.tracing for s in self._slots):
            self.trace.disarm()
        if self.trace.compiled:
            return None
        owners = {layer.name for layer in self.info.layers}
        for name in self._used():
            if name in owners and name not in self.order:
                self.order[name] = len(self.order)
        slot.ids = []  # describe the model anew: for the order, and for parameters that were replaced under the same id
        return frozenset(self.trace.ran)

    def _used(self) -> Iterator[str]:
        """Return the modules in the order of the forward pass, each with those behind it whose weights it uses without calling them.

        Attention does that with its output projection, which would else seem to come last of all.
        """
        ran = dict.fromkeys(self.trace.ran)
        modules = layers.named_modules(model) if (model := self.model()) is not None else {}
        uncalled: dict[str, list[str]] = {}
        for layer in self.info.layers:
            own = modules[layer.name]._parameters.values() if layer.name in modules and layer.name not in ran else ()
            caller = next((name for name in layers.ancestry(layer.name) if name in ran), None)
            if caller is not None and any(p is not None and p.grad is not None for p in own):
                uncalled.setdefault(caller, []).append(layer.name)
        for name in ran:
            yield name
            yield from uncalled.get(name, ())

    def parameters(self, slot: Slot) -> list[Tensor]:
        """Return the parameters that the optimizer steps now, in line with `slot.columns`; what is not of the model is left out."""
        model = self.model()
        if model is None:
            raise RuntimeError("the watched model is gone")
        if slot.optimizer is None:
            every: list[Tensor] = list(model.parameters())
        else:
            every = [p for group in slot.optimizer.param_groups for p in group["params"]]
        ids = list(map(id, every))
        if ids != slot.ids:
            info = self._describe(model)
            if info != self.info:  # equal ones stay the same object, by which the record knows them
                self.info = info
            slot.ids = ids
            slot.model = None
        if slot.model is not self.info:
            slot.model, slot.weighed = self.info, False
            slot.columns = [self._columns[i] for i in ids if i in self._columns]
        return every if len(slot.columns) == len(ids) else [p for p in every if id(p) in self._columns]

    def gradients(self, slot: Slot) -> tuple[list[int], list[Tensor]]:
        """Return the gradients that the optimizer is to step with now, each with its column."""
        parameters = self.parameters(slot)
        found = [(c, g) for c, p in zip(slot.columns, parameters, strict=True) if (g := p.grad) is not None]
        return [c for c, _ in found], [g for _, g in found]

    def absent(self, slot: Slot, parameters: Sequence[Tensor], ran: frozenset[str] | None) -> list[Absent | None]:
        """Say why parameters have no gradient, or will be found to have zeros in its place, given the modules that ran (None: nobody looked)."""
        layers_of = self.info.parameters
        if ran is not None:  # zero_grad(set_to_none=False) leaves zeros to a layer that did not run
            slot.absent = {c: "unused" for c in slot.columns if layers_of[c].layer not in ran}
        reasons: list[Absent | None] = [slot.absent.get(column) for column in range(len(layers_of))]
        for column in self.frozen:
            reasons[column] = "frozen"
        for column, parameter in zip(slot.columns, parameters, strict=True):
            if parameter.grad is not None:
                if reasons[column] != "unused":
                    reasons[column] = None
            elif not parameter.requires_grad:
                reasons[column] = "frozen"
            elif ran is not None and layers_of[column].layer in ran:
                reasons[column] = slot.absent[column] = "disconnected"
            elif reasons[column] is None:
                reasons[column] = "unused"
        return reasons

    def state_dict(self) -> dict[str, Any]:
        """Return where each optimizer stands, what is known of parameters without gradient, by name, and the order of layers, as plain values."""
        names = [p.name for p in self.info.parameters]
        return {
            "counts": [slot.count for slot in self._slots],
            "slots": [
                {
                    "stride": slot.stride,
                    "turn": slot.turn,
                    "extra": slot.extra,
                    "absent": {names[c]: reason for c, reason in slot.absent.items() if c < len(names)},
                }
                for slot in self._slots
            ],
            "order": dict(self.order),
        }

    def reading_state(self, state: Mapping[str, Any]) -> Callable[[], None]:
        """Read what `state_dict` gave, and change nothing before the function that is returned is called.

        Raises:
            KeyError, TypeError, ValueError, AttributeError, OverflowError: it is not what that gives.

        """
        columns = {p.name: c for c, p in enumerate(self.info.parameters)}
        order = {str(name): int(at) for name, at in state["order"].items()}
        read = []
        for slot, count, kept in zip(self._slots, state["counts"], state["slots"], strict=True):
            if not set(kept["absent"].values()) <= set(get_args(Absent)):
                raise ValueError(f"absent must be of {get_args(Absent)}, got {kept['absent']!r:.80}")
            numbers = (
                max(operator.index(count), 0),
                max(operator.index(kept["stride"]), 1),
                max(operator.index(kept["turn"]), 0),
                bool(kept["extra"]),
            )
            read.append(
                (slot, numbers, {columns[name]: reason for name, reason in kept["absent"].items() if name in columns})
            )

        def apply() -> None:
            self.order = order
            for slot, numbers, absent in read:
                slot.count, slot.stride, slot.turn, slot.extra = numbers
                slot.absent = absent

        return apply
