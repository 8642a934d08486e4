"""The way of a model's data through its modules: places at which to ask how far back the newest output sees."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from gradwatch.model.nested import data_of
from gradwatch.timesteps.axes import axis_along
from gradwatch.timesteps.input_calls import InputCall, InputSequence, Place, Roots
from gradwatch.timesteps.input_gain import Source
from gradwatch.timesteps.kinds import is_recurrent, mixes, time_of
from gradwatch.timesteps.layout import layout_of, spaced
from gradwatch.timesteps.model_inputs import InputSeries
from gradwatch.timesteps.time_axis import Axes

_MOST = 32
"""Places at which a derivative is taken, at most: each costs memory and time."""


class _Time(NamedTuple):
    """Where the timesteps of an input lie in what enters a module."""

    dim: int
    clock: int
    """Timesteps of the input from one to the next."""
    of: tuple[str, ...]
    """Names of the inputs."""


@dataclass
class _Calls:
    """The calls of one module, or of several that took the same first."""

    name: str
    value: Tensor | PackedSequence
    """What entered first."""
    place: Place
    time: int | None
    """The dimension of time that the module itself has; None: that is not known."""
    later: list[tuple[Tensor, Place]] = field(default_factory=list)
    """What entered later of the same shape: each call may be a timestep."""


class Chain:
    """Sees what enters the modules that may mix timesteps."""

    def __init__(self, roots: Roots, axes: Axes) -> None:
        """Begin with nothing; `roots` takes what to differentiate by, `axes` follows the dimensions."""
        self._roots, self._axes = roots, axes
        self._by_place: dict[Place, _Calls] = {}
        self._by_module: dict[int, _Calls] = {}
        self._likely: set[str] = set()
        """Names of modules that mix timesteps by what they are."""

    def entered(self, module: nn.Module, name: str, value: Tensor | PackedSequence) -> None:
        """Take note of what enters a module."""
        data = data_of(value)
        if not data.requires_grad or data.is_leaf or data.is_nested or not data.numel():
            return
        known = self._by_module.get(id(module))
        if known is not None:
            if isinstance(value, Tensor) and value.shape == data_of(known.value).shape:
                known.later.append((value, self._roots.add(value)))
            return
        place = self._roots.add(data)
        calls = self._by_place.get(place)
        if calls is None:
            time = time_of(module, data.dim()) if is_recurrent(module) else None
            calls = self._by_place[place] = _Calls(name, value, place, time)
        elif not calls.name or name.startswith(f"{calls.name}."):
            calls.name = name  # of those that begin with it, the innermost
        self._by_module[id(module)] = calls
        if mixes(module):
            self._likely.add(calls.name)

    def sources(self, series: Sequence[InputSeries], inputs: Iterable[Source]) -> list[Source]:
        """Return the places that have timesteps of the model's inputs, in the order of the forward pass.

        Args:
            series: the inputs.
            inputs: the same, as what is differentiated by; where a module takes one as it is, that is noted there.

        """
        whole = {(c.root, c.view): one for one in inputs for s in one.sequences for c in s.calls if len(s.calls) == 1}
        for place, one in whole.items():
            if (calls := self._by_place.pop(place, None)) is not None:
                one.into = calls.name
        found = list(self._sources(series))
        # Of many, those first that mix timesteps by what they are.
        likely = [source for source in found if source.module in self._likely]
        others = [source for source in found if source.module not in self._likely]
        room = max(_MOST - len(likely), 0)
        chosen = {likely[k] for k in spaced(len(likely), _MOST)} | {others[k] for k in spaced(len(others), room)}
        return [source for source in found if source in chosen]

    def _sources(self, series: Sequence[InputSeries]) -> Iterator[Source]:
        times: dict[torch.Size, _Time] = {}
        every = tuple(s.label for s in series)
        for calls in self._by_place.values():
            value = calls.value
            if not calls.name:  # only the model itself takes it
                continue
            if isinstance(value, PackedSequence):
                yield _source(calls.name, [InputCall.of(value, None, calls.place)], every)
                continue
            time = self._time(value, series) or times.get(value.shape)  # beyond what is followed, as before
            if time is None and calls.time is not None and value.dim() > 1:
                time = _Time(calls.time, 1, every)
            looped = [s.label for s in series if s.steps == 1 + len(calls.later) > 1]
            if time is not None:
                times[value.shape] = time
                if value.shape[time.dim] > 1:
                    yield _source(calls.name, [_call(value, time.dim, calls.place)], time.of, time.clock)
            elif looped and value.dim() == 2:
                each = [(value, calls.place), *calls.later]
                yield _source(calls.name, [_call(v, None, place) for v, place in each], looped)

    def _time(self, value: Tensor, series: Sequence[InputSeries]) -> _Time | None:
        """Return where the timesteps of inputs lie in a tensor; of several clocks, that of the first."""
        known = self._axes.of(value)
        found = [
            (dim, axis.step // s.axis.step, s.label)
            for s in series
            if s.axis is not None
            and (dim := self._axes.time_in(value, s.number, s.axis)) is not None
            and (axis := axis_along(known[s.number], dim)) is not None
        ]
        if not found:
            return None
        dim, clock, _ = found[0]
        return _Time(dim, max(clock, 1), tuple(label for d, c, label in found if (d, c) == (dim, clock)))


def _source(name: str, calls: list[InputCall], of: Iterable[str], clock: int = 1) -> Source:
    one = torch.ones((), device="cpu")
    return Source(
        name,
        "",
        None,
        assumed=False,
        sequences=[InputSequence(calls)],
        joined=True,
        spread=one,
        on_the_way=frozenset(of),
        clock=clock,
    )


def _call(value: Tensor, time: int | None, place: Place) -> InputCall:
    """Describe a call of which it does not matter where its input is zero."""
    layout = layout_of(value, time, rows=1)
    blank = torch.zeros((), dtype=torch.bool, device=value.device).expand(layout.steps, layout.count)
    return InputCall(layout, *place, value.shape, time, None, blank)
