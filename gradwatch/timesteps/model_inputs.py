"""The inputs of a model, as tensors by which its output can be differentiated, each with its own time."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from gradwatch.model.arguments import is_called, labelled
from gradwatch.model.nested import data_of, detached, differentiable, leaves, storage_of
from gradwatch.timesteps.input_calls import InputCall, InputSequence, Place, Roots
from gradwatch.timesteps.time_axis import Axes, Contradiction, TimeAxis

_IN_LIST = re.compile(r"(.*)\[\d+\]")
_LISTED = 3
"""Tensors of one shape from which on a list of them may be one for each timestep."""


def in_order(module: nn.Module, kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return keyword arguments in the order in which the module declares them."""
    if len(kwargs) < 2:
        return kwargs
    declared = [name for name in inspect.signature(module.forward).parameters if name in kwargs]
    return {name: kwargs[name] for name in (*declared, *kwargs)}


def spread_of(value: Tensor | PackedSequence) -> Tensor:
    """Return the standard deviation of a tensor's entries, float64."""
    numbers = data_of(value).detach().double()
    return numbers.std(correction=0) if numbers.numel() else numbers.new_zeros(())


class Embedded(NamedTuple):
    """What an embedding made of whole numbers."""

    output: Tensor
    place: Place
    blank: Tensor
    """Shaped as the numbers, with one feature: 0 where the embedding is all zero, as of padding, else the number."""


@dataclass
class ModelInput:
    """A tensor that the model was called with."""

    label: str
    """The way to it, as `labelled` tells it."""
    value: Tensor | PackedSequence
    """As the caller gave it."""
    number: int
    """Under which its dimensions are followed."""
    place: Place | None
    """What to differentiate by; None for whole numbers."""
    embedded: list[Embedded] = field(default_factory=list)
    """What embeddings made of it."""


class InputSeries(NamedTuple):
    """An input that has timesteps."""

    label: str
    time: int | None
    """Its dimension of time; None: it is packed."""
    sequences: Sequence[InputSequence]
    """Of one input, which embeddings may have made several tensors of."""
    number: int
    axis: TimeAxis | None
    spread: Tensor
    """Standard deviation of its entries."""

    @property
    def steps(self) -> int:
        """How many timesteps it has."""
        return self.sequences[0].steps

    @property
    def assumed(self) -> bool:
        """Whether nothing tells which dimension is time."""
        return self.axis is not None and not self.axis.why


class ModelInputs:
    """What a model was called with in one pass, and what of that has timesteps."""

    @property
    def named(self) -> bool:
        """Whether the dimension of time of any of them was named."""
        return bool(self._declared)

    def __init__(self, roots: Roots, axes: Axes, declared: Mapping[str, int]) -> None:
        """Begin with nothing.

        Args:
            roots: takes what to differentiate by.
            axes: follows the dimensions.
            declared: by name, the dimension of time; "" is for all inputs that have it.

        """
        self._roots, self._axes, self._declared = roots, axes, declared
        self.every: list[ModelInput] = []
        self.storages: set[int] = set()
        """What they lie in, as `storage_of`."""
        self.left_out: list[str] = []
        """Why inputs are none of the series, where that is worth telling."""

    @property
    def sizes(self) -> set[tuple[int, int]]:
        """Sizes of the first two dimensions."""
        values = [i.value for i in self.every if isinstance(i.value, Tensor)]
        return {(value.shape[0], value.shape[1]) for value in values if value.dim() > 1}

    def take(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return copies of the model's arguments to differentiate by, which the model may edit in place.

        Raises:
            ValueError: what is declared is an input that is not there, or a dimension that it does not have.

        """
        kwargs = in_order(model, kwargs)
        mine = tuple(map(differentiable, args)), {name: differentiable(a) for name, a in kwargs.items()}
        given = leaves((detached(args), detached(dict(kwargs))))
        for (label, copied), value in zip(labelled(model, *mine), given, strict=True):
            data = data_of(copied)
            if data.layout is not torch.strided or data.is_nested or data.dim() < 1 + (copied is data):
                continue
            self.storages.add(storage_of(data))
            number = self._axes.add(data)
            place = self._roots.add(data) if data.requires_grad else None
            self.every.append(ModelInput(label, value, number, place))
        self._declare()
        return mine

    def _declare(self) -> None:
        for name, time in self._declared.items():
            meant = [i for i in self.every if not name or is_called(i.label, name)]
            fitting = [i for i in meant if -data_of(i.value).dim() <= time < data_of(i.value).dim()]
            if not meant and name:
                known = ", ".join(i.label for i in self.every)
                raise ValueError(
                    f"timesteps must name modules of the model or its inputs ({known}), and none is called {name!r}"
                )
            if not fitting and name:
                shape = tuple(data_of(meant[0].value).shape)
                raise ValueError(f"timesteps of {name} must be a dimension of its shape {shape}, got {time}")
            for one in fitting:
                self._axes.declare(one.number, time)

    def embed(self, index: Tensor, output: Tensor) -> bool:
        """Take what an embedding made of whole numbers; False where they are none of an input's."""
        found = [i for i in self.every if i.number in self._axes.of(output)]
        if not found:
            return False
        blank = torch.where((output.detach() == 0).all(-1), 0.0, index.detach() + 1.0).unsqueeze(-1)
        found[0].embedded.append(Embedded(output, self._roots.add(output), blank))
        return True

    # --- what has timesteps ---

    def series(self, packed: torch.Tensor | None, least: int, calls: Mapping[Place, InputCall]) -> list[InputSeries]:
        """Return what has timesteps, each with its own.

        Two dimensions may be rows and timesteps, or rows and features: they count where something was done along the
        second, or others have as many timesteps, or there is nothing else.

        Args:
            packed: lengths of the rows that the first sequence module took packed, in their order.
            least: timesteps that it took; 0 where there was none.
            calls: of that module, by what it took.

        Raises:
            Contradiction: of none it can be told which dimension is time: what is done with it does not go together.

        """
        lists = self._lists()
        found = [(self._series_of_list(label, those), True) for label, those in lists]
        listed = {label for label, _ in lists}
        wrong: list[str] = []
        for one in sorted(self.every, key=lambda i: i.place is None):  # numbers before words
            in_list = _IN_LIST.fullmatch(one.label)
            if in_list is not None and isinstance(one.value, Tensor) and in_list[1] in listed:
                continue
            try:
                if (series := self._series_of(one, packed, calls)) is not None:
                    sure = series.axis is None or bool(series.axis.why) or data_of(one.value).dim() > 2
                    found.append((series, sure or bool(one.embedded)))
            except Contradiction as error:
                wrong.append(f"{one.label}: {error} (timesteps={{{one.label!r}: its dimension}} says which)")
        lengths = {series.steps for series, sure in found if sure}
        chosen = [s for s, sure in found if sure or s.steps in lengths]
        chosen = chosen or [s for s, _ in found if s.steps >= least]
        several = [s for s in chosen if s.steps > 1]
        if wrong and not several:
            raise Contradiction("; ".join(wrong))
        self.left_out = wrong
        return several or chosen

    def _lists(self) -> list[tuple[str, list[ModelInput]]]:
        """Return lists of tensors of one shape, one for each timestep, with their names."""
        by_list: dict[tuple[str, torch.Size], list[ModelInput]] = {}
        for one in self.every:
            in_list = _IN_LIST.fullmatch(one.label)
            if in_list and one.place is not None and isinstance(one.value, Tensor) and one.value.dim() == 2:
                by_list.setdefault((in_list[1], one.value.shape), []).append(one)
        return [(label, those) for (label, _), those in by_list.items() if len(those) >= _LISTED]

    @staticmethod
    def _series_of_list(label: str, those: Sequence[ModelInput]) -> InputSeries:
        calls = [InputCall.of(one.value, None, one.place) for one in those if one.place is not None]
        return InputSeries(label, None, [InputSequence(calls)], those[0].number, None, spread_of(those[0].value))

    def _series_of(
        self, one: ModelInput, packed: Tensor | None, calls: Mapping[Place, InputCall]
    ) -> InputSeries | None:
        if isinstance(one.value, PackedSequence):
            if one.place is None:
                return None
            call = InputCall.of(one.value, None, one.place)
            return InputSeries(one.label, None, [InputSequence([call])], one.number, None, spread_of(one.value))
        if (one.place is None and not one.embedded) or one.value.dim() < 2 or self._axes.is_state(one.number):
            return None
        time = self._axes.time_of(one.number)
        sequences = [s for e in one.embedded if (s := self._embedded(one, e, time)) is not None]
        if one.place is not None:
            sequences.append(self._own(one.value, time, one.place, packed, calls))
        if not sequences:
            return None
        spread = spread_of(one.value if one.place is not None else one.embedded[0].output)
        return InputSeries(one.label, time.dim, sequences, one.number, time, spread)

    @staticmethod
    def _own(
        value: Tensor, time: TimeAxis, place: Place, packed: Tensor | None, calls: Mapping[Place, InputCall]
    ) -> InputSequence:
        dim = time.dim
        if time.period is not None:  # a flat window
            inner = (-1, time.period // time.step, time.step)
            value, dim = value.reshape(*value.shape[:dim], *inner, *value.shape[dim + 1 :]), dim + 1
        known = calls.get(place)
        if known is not None and known.packed is None and (known.time, known.shape) == (dim % value.dim(), value.shape):
            call = dataclasses.replace(known, given=value, begins=False)
        else:
            call = InputCall.of(value, dim, place)
            call.given = value
        fits = packed is not None and len(packed) == call.layout.count and int(packed.max()) <= call.layout.steps
        return InputSequence([call], packed if fits else None)

    def _embedded(self, one: ModelInput, embedded: Embedded, time: TimeAxis) -> InputSequence | None:
        dim = self._axes.time_in(embedded.output, one.number, time)
        if dim is None:
            return None
        call = InputCall.of(embedded.blank, dim, embedded.place, embedded.output.shape)
        return InputSequence([call])
