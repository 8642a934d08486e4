"""The model as it is now: its layers and parameters, in which column each stands, and why some have no gradient."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from gradwatch.model import layers, zero
from gradwatch.model.optimizers import parameters_of
from gradwatch.values.snapshot import Absent, ModelInfo


class ModelMap:
    """Knows the model without holding it, and describes it anew where parameters have come, gone or been replaced."""

    def __init__(self, model: nn.Module, optimizers: Sequence[Any]) -> None:
        """Describe the model as it is, with the optimizers that step its parameters."""
        self._model = weakref.ref(model)
        self._optimizers = list(optimizers)
        self.order: Mapping[str, int] = {}
        """Position of each layer in the first forward pass in which a probe has seen it."""
        self._columns: dict[int, int] = {}
        self._spread: dict[int, tuple[int, ...]] = {}
        self._frozen: list[int] = []
        self._outside: frozenset[int] = frozenset()
        self.whole: frozenset[int] = frozenset()
        """Columns of which every process has the whole weight, and a part of the gradient."""
        self.info = self._describe(model)
        """The newest description; one that says the same is the same object, by which the record knows it."""

    @property
    def model(self) -> nn.Module | None:
        """The model; None once it is gone."""
        return self._model()

    def join(self, optimizer: Any) -> None:  # noqa: ANN401
        """Take one more optimizer that steps its parameters."""
        self._optimizers.append(optimizer)
        self.describe()

    def release(self) -> None:
        """Let go of the optimizers."""
        self._optimizers = []

    # --- what it is ---

    def describe(self) -> None:
        """Describe the model anew."""
        info = self._describe(self._present())
        if info != self.info:
            self.info = info

    def _describe(self, model: nn.Module) -> ModelInfo:
        flat = layers.flattened(model)
        shapes = {i: shape for i, (shape, _) in flat.items()}
        info, self._columns = layers.describe(model, self._optimizers, self.order, shapes)
        self._spread = {self._columns[i]: ranks for i, (_, ranks) in flat.items() if i in self._columns}
        every = list(model.parameters())
        parted = {id(p): ranks for p in every if (ranks := zero.holders(p)) is not None}
        self._spread |= {self._columns[i]: ranks for i, ranks in parted.items()}
        self.whole = frozenset(map(self._columns.__getitem__, parted))
        frozen = (self._columns.get(id(p)) for p in every if not p.requires_grad)
        self._frozen = [c for c in frozen if c is not None and info.parameters[c].optimizer is None]
        unstepped = set(info.unstepped)
        self._outside = frozenset(c for c, p in enumerate(info.parameters) if p in unstepped)
        return info

    def _present(self) -> nn.Module:
        model = self._model()
        if model is None:
            raise RuntimeError("the watched model is gone")
        return model

    def parameters(self, optimizer: Any) -> list[Tensor]:  # noqa: ANN401  (None: the loop has none)
        """Return the parameters that an optimizer steps now, the model's or not; without one, those of the model.

        Raises:
            RuntimeError: the model is gone.

        """
        model = self._present()
        if optimizer is None:
            return list(model.parameters())
        return parameters_of(optimizer)

    def stepped_by_others(self, optimizer: Any) -> set[int]:  # noqa: ANN401
        """Return the parameters of the model, by `id`, that any other optimizer steps now."""
        others = [o for o in self._optimizers if o is not optimizer]
        own = set(map(id, self._present().parameters())) if others else set()
        return {id(p) for o in others for p in self.parameters(o)} & own

    def columns(self, ids: Iterable[int]) -> list[int]:
        """Return the columns of those of these parameters, by `id`, that are the model's."""
        return [self._columns[i] for i in ids if i in self._columns]

    def last_layer(self, columns: Iterable[int]) -> list[str]:
        """Return the layer of these columns that is the last in the forward pass, if there is one."""
        mine = {self.info.parameters[column].layer for column in columns}
        return [name for i in self.info.forward_order if (name := self.info.layers[i].name) in mine][-1:]

    def outside(self) -> tuple[list[int], list[Tensor], list[bool]]:
        """Return columns and parameters that are to be trained, and that none of the optimizers steps.

        And of each whether a gradient is there, and its module in training mode.
        """
        found: dict[int, tuple[Tensor, bool]] = {}
        model = self._model() if self._outside else None
        for module in model.modules() if model is not None else ():
            for parameter in module._parameters.values():
                column = self._columns.get(id(parameter))
                if parameter is not None and column in self._outside and parameter.requires_grad:
                    found.setdefault(column, (parameter, module.training and parameter.grad is not None))
        return list(found), [p for p, _ in found.values()], [there for _, there in found.values()]

    def __contains__(self, parameter: Tensor) -> bool:
        """Tell whether a parameter is the model's."""
        return id(parameter) in self._columns

    def holders(self, columns: Iterable[int]) -> dict[int, tuple[int, ...]]:
        """Return, by column, the ranks that hold pieces of what does not tell that itself, as a DTensor does."""
        return {c: self._spread[c] for c in columns if c in self._spread} if self._spread else {}

    # --- what ran ---

    def learn_order(self, ran: Iterable[str], applied: Mapping[int, int]) -> None:
        """Take note of the order in which modules ran for the first time; the next description has it.

        Args:
            ran: names of modules, in that order.
            applied: by weight, by `id`, when something was made of it; of those of one module that tells the order.

        """
        if all(layer.name in self.order for layer in self.info.layers):
            return
        when: dict[str, int] = {}
        for i, column in self._columns.items():
            if i in applied:
                mine = self.info.parameters[column].layer
                when[mine] = min(applied[i], when.get(mine, applied[i]))
        layers_of: dict[str, list[str]] = {}
        for layer in self.info.layers:
            layers_of.setdefault(layer.module, []).append(layer.name)
        order = dict(self.order)
        latest = max(applied.values(), default=0) + 1
        for names in layers_of.values():
            names.sort(key=lambda name: when.get(name, latest))
        for module in self._used(ran, sorted(layers_of, key=lambda m: when.get(layers_of[m][0], latest))):
            for name in layers_of.get(module, ()):
                order.setdefault(name, len(order))
        self.order = order

    def resume(self, order: Mapping[str, int]) -> None:
        """Take the order of an earlier run."""
        self.order = order

    def _used(self, ran: Iterable[str], owners: Iterable[str]) -> Iterator[str]:
        """Return the modules in the order of the forward pass, after each those whose weights it uses without a call.

        Attention does that with its output projection, which would else seem to come last of all.
        """
        called = dict.fromkeys(ran)
        modules = layers.named_modules(model) if (model := self.model) is not None else {}
        uncalled: dict[str, list[str]] = {}
        for owner in owners:
            known = owner in modules and owner not in called
            own = modules[owner]._parameters.values() if known else ()
            caller = next((name for name in layers.ancestry(owner) if name in called), None)
            if caller is not None and any(p is not None and p.grad is not None for p in own):
                uncalled.setdefault(caller, []).append(owner)
        for name in called:
            yield name
            yield from uncalled.get(name, ())

    # --- what has no gradient ---

    @property
    def has_frozen(self) -> bool:
        """Whether there are parameters that are frozen and that no optimizer steps, as of the last description."""
        return bool(self._frozen)

    def without_gradient(
        self, columns: Sequence[int], parameters: Sequence[Tensor], there: Collection[int], ran: frozenset[str]
    ) -> dict[int, Absent]:
        """Say which columns have no gradient, or may be found to have zeros in its place, given the modules that ran.

        Args:
            columns: those of the parameters.
            parameters: what an optimizer steps.
            there: columns that have a gradient.
            ran: names of the modules that ran in the forward pass.

        """
        found: dict[int, Absent] = {}
        still = {layer.name for layer in self.info.layers if layer.module not in ran}
        for column, parameter in zip(columns, parameters, strict=True):
            if self.info.parameters[column].layer in still:
                found[column] = "unused"  # perhaps with zeros, by zero_grad(set_to_none=False)
            elif column not in there and parameter.requires_grad:
                found[column] = "disconnected"
        return found

    def absent(
        self,
        columns: Sequence[int],
        parameters: Sequence[Tensor],
        there: Collection[int],
        known: Mapping[int, Absent],
    ) -> list[Absent | None]:
        """Say of every column why it has no gradient, if it has none or may be found to have zeros in its place.

        Args:
            columns: those of the parameters.
            parameters: what an optimizer steps.
            there: columns that have a gradient.
            known: what the last look at a forward pass said, as `without_gradient`.

        """
        reasons: list[Absent | None] = [known.get(column) for column in range(len(self.info.parameters))]
        for column in self._frozen:
            reasons[column] = "frozen"
        for column, parameter in zip(columns, parameters, strict=True):
            if column in there:
                if reasons[column] != "unused":
                    reasons[column] = None
            elif not parameter.requires_grad:
                reasons[column] = "frozen"
            elif reasons[column] is None:
                reasons[column] = "unused"
        return reasons
