"""Which dimension of a model's input is time: found by what the model does with it.

No name tells that, and no shape: (batch, time, features), (batch, channels, time) and (time, batch, features) look the
same. What is done with a dimension tells: a convolution slides along it, a recurrent module goes through it, a loop
takes one entry after the other.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gradwatch.timesteps.axes import ENTRIES, TELLING, Axis, Labels, Operation, axes_of, axis_along

RECURRENT = "a recurrent module goes"
"""What is done along a dimension, in words, as others of its kind."""


@dataclass(frozen=True)
class TimeAxis:
    """What is time in an input of the model."""

    dim: int
    period: int | None = None
    """In a flat window, after how many entries along `dim` the timesteps begin anew; None: they never do."""
    step: int = 1
    """Entries along `dim` from one timestep to the next; more than 1 only in a flat window."""
    why: str = ""
    """What was done along it; "" where nothing tells, and it was assumed."""


class Contradiction(ValueError):  # noqa: N818  (it is about the evidence)
    """What is done with the dimensions of an input does not go together."""


@dataclass
class _Evidence:
    """What was done with the dimensions of one input."""

    shape: torch.Size
    ordered: list[tuple[Axis, str]] = field(default_factory=list)
    """Axes along which order matters, and what was done along them."""
    declared: list[tuple[Axis, str]] = field(default_factory=list)
    """The same, as the user said."""
    slid: set[int] = field(default_factory=set)
    """Dimensions along which a convolution or a pool of several sides slides."""
    folded: set[int] = field(default_factory=set)
    """Those of which it left one entry, as a filter over all electrodes does."""
    rows: set[int] = field(default_factory=set)
    """Dimensions that something took for the batch."""
    attended: set[int] = field(default_factory=set)
    """Those that attention took for it."""
    channels: set[int] = field(default_factory=set)
    """Dimensions that a convolution took for features."""
    linked: dict[Axis, set[int]] = field(default_factory=dict)
    """Axes of which single entries were taken, and where those lie that met what was made of an earlier one."""
    features: dict[int, int] = field(default_factory=dict)
    """By dimension along which a recurrent module goes, the one that it takes for features."""
    tails: set[int] = field(default_factory=set)
    """Dimensions of which only the last entries were taken."""
    initial: bool = False
    """Whether a recurrent module took it for its initial state."""
    windows: bool = False
    """Whether windows that may overlap were cut out of it, as patches are."""
    given: Labels = ()
    """Of what the model gave."""

    def votes(self) -> list[tuple[Axis, str]]:
        """Return the axes along which order matters, and what was done along them: what the user said, if he did."""
        looped = [
            (axis, "a loop goes")
            for axis, places in self.linked.items()
            if len(places) + 1 >= max(_LOOP, min(axis.size / 2, _LONG))
        ]
        return self.declared or self.ordered or looped

    def refuse_odd(self, votes: Sequence[tuple[Axis, str]]) -> None:
        """Raise where all that is known is a recurrent module that takes few last entries for timesteps.

        And the more numerous ones before them for features: it may go over the nodes of a graph, or over series.
        """
        last = len(self.shape) - 1
        odd = self.features.get(last) == 1 and self.shape[1] > self.shape[last]
        if odd and not self.declared and {what for _, what in votes} == {RECURRENT}:
            raise Contradiction(
                f"{RECURRENT} along its {self.shape[last]} last entries, with {self.shape[1]} features, and which of"
                " these are the timesteps cannot be told"
            )


class _Made(NamedTuple):
    """What is known of a tensor that was made of inputs."""

    labels: dict[int, Labels]
    """Of its dimensions, by input."""
    entries: dict[int, tuple[Axis, int]]
    """By input, the last entry of an axis that was taken on the way to it, and where that lies."""


_LOOP, _LONG = 3, 16
"""Entries taken one by one along an axis, each meeting what was made of the one before, that make a loop through time:
half of all, at least the first and at most the second number."""
_SIDE_BY_SIDE = frozenset({"stack", "cat", "concat", "concatenate"})
_MOST = 300
"""Operations that are followed in one pass; what comes later is not known."""


class Axes(TorchFunctionMode):
    """Sees every operation on what is made of a model's inputs, and follows their dimensions."""

    def __init__(self) -> None:
        """Begin with no input."""
        super().__init__()
        self._inputs: list[_Evidence] = []
        self._known: dict[int, tuple[weakref.ref[Tensor], _Made]] = {}
        """By tensor, by `id`."""
        self._count = 0

    def add(self, tensor: Tensor) -> int:
        """Follow an input of the model; return its number."""
        number = len(self._inputs)
        self._inputs.append(_Evidence(tensor.shape))
        labels = tuple((Axis(dim, size),) for dim, size in enumerate(tensor.shape))
        self._known[id(tensor)] = weakref.ref(tensor), _Made({number: labels}, {})
        return number

    def copied(self, tensor: Tensor, copy: Tensor) -> None:
        """Take note that a copy stands for a tensor from here on."""
        if (made := self._made(tensor)) is not None:
            self._known[id(copy)] = weakref.ref(copy), made

    # --- what is asked ---

    def of(self, tensor: Tensor) -> Mapping[int, Labels]:
        """Return the labels of a tensor's dimensions, by input that it was made of; none where it is not known."""
        made = self._made(tensor)
        return {} if made is None else made.labels

    def note_sequence(self, tensor: Tensor, time: int, what: str, *, declared: bool, rows: int | None = None) -> None:
        """Note that a sequence module took a tensor: along which of its dimensions, and which are its rows."""
        for number, labels in self.of(tensor).items():
            evidence = self._inputs[number]
            if (axis := axis_along(labels, time)) is not None:
                (evidence.declared if declared else evidence.ordered).append((axis, what))
            if rows is not None and (row := axis_along(labels, rows)) is not None:
                evidence.rows.add(row.dim)
            features = axis_along(labels, -1)
            if axis is not None and features is not None and not declared:
                evidence.features[axis.dim] = features.dim

    def note_state(self, tensor: Tensor) -> None:
        """Note that a tensor is the initial state of a recurrent module: an input that is that has no timesteps."""
        for number, labels in self.of(tensor).items():
            evidence = self._inputs[number]
            left = {axis.dim for axis in axes_of(labels) if axis is not None}
            evidence.initial |= {dim for dim, size in enumerate(evidence.shape) if size > 1} <= left

    def is_state(self, number: int) -> bool:
        """Tell whether an input is such a state."""
        return self._inputs[number].initial

    def declare(self, number: int, time: int) -> None:
        """Take note of what the user says: which dimension of an input is time."""
        evidence = self._inputs[number]
        dim = time % len(evidence.shape)
        evidence.declared = [(Axis(dim, evidence.shape[dim]), "timesteps= says")]

    def note_output(self, tensor: Tensor) -> None:
        """Note what the model gave."""
        for number, labels in self.of(tensor).items():
            self._inputs[number].given = labels

    def time_of(self, number: int) -> TimeAxis:
        """Return which dimension of an input is time.

        Raises:
            Contradiction: order matters along several, or what lies along one may be timesteps or features.

        """
        evidence = self._inputs[number]
        votes = evidence.votes()
        if len({axis.dim for axis, _ in votes}) > 1:
            said = " and ".join(f"{what} along dimension {axis.dim}" for axis, what in _one_of_each(votes))
            raise Contradiction(f"which dimension of it is time cannot be told: {said}")
        if votes:
            evidence.refuse_odd(votes)
            return _finest(evidence, votes)
        first = axis_along(evidence.given, 0)
        no_time = (evidence.rows | evidence.attended or ({0} if first is None else {first.dim})) | evidence.channels
        candidates = [dim for dim, size in enumerate(evidence.shape) if dim not in no_time and size > 1]
        whole = {axis.dim for axis in axes_of(evidence.given) if axis is not None}
        if len(ends := evidence.tails & set(candidates) - whole) == 1:  # of what the output has too, nothing was taken
            return TimeAxis(ends.pop(), why="the last entries are taken")
        slid = [dim for dim in candidates if dim in evidence.slid - evidence.folded]
        if len(slid) == 1:  # of several sides of a picture, that along which it slides: likely, and no more
            candidates = slid
        return TimeAxis(candidates[0] if candidates else min(1, len(evidence.shape) - 1))

    def attends_over_rows(self, number: int) -> tuple[int, int] | None:
        """Return how many timesteps and rows attention takes an input to have, where the rows are its timesteps.

        So it is where the output begins with an entry for each of those timesteps, and has no dimension for the rows.
        """
        evidence = self._inputs[number]
        first, left = axis_along(evidence.given, 0), {axis.dim for axis in axes_of(evidence.given) if axis is not None}
        if evidence.declared or evidence.ordered or first is None or len(evidence.attended) != 1:
            return None
        steps, rows = evidence.shape[first.dim], evidence.shape[(row := next(iter(evidence.attended)))]
        return (steps, rows) if row not in left and rows > 1 and first.size == steps > 1 else None

    def time_in(self, tensor: Tensor, number: int, time: TimeAxis) -> int | None:
        """Return the dimension of a tensor along which the timesteps of an input lie; None where none does.

        Nor does one along which less than half of them lie: as many newest ones as steps are forecast, perhaps.
        """
        axes = axes_of(self.of(tensor).get(number, ()))
        most = time.period or self._inputs[number].shape[time.dim]
        found = [
            at
            for at, axis in enumerate(axes)
            if axis is not None and axis.dim == time.dim and 2 * axis.size * axis.step >= most
        ]
        return found[0] if len(found) == 1 else None

    # --- what is seen ---

    def __torch_function__(
        self,
        func: Any,  # noqa: ANN401  (any operation of torch)
        types: Any,  # noqa: ANN401
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        """Do the operation, and follow its dimensions."""
        given = func(*args, **kwargs) if kwargs else func(*args)
        if self._count >= _MOST:
            return given
        try:
            known = [(t, made) for t in _tensors(args) if (made := self._made(t)) is not None]
            if kwargs:
                known += [(t, made) for t in _tensors(kwargs.values()) if (made := self._made(t)) is not None]
            if known:
                self._count += 1
                self._follow(getattr(func, "__name__", ""), args, kwargs or {}, known, _tensors((given,)))
        except Exception:  # noqa: BLE001, S110  (what this does not understand is not known from here on)
            pass
        return given

    def _made(self, tensor: Tensor) -> _Made | None:
        ref, made = self._known.get(id(tensor), (None, None))
        return made if ref is not None and ref() is tensor else None

    def _follow(
        self,
        name: str,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        known: Sequence[tuple[Tensor, _Made]],
        given: Sequence[Tensor],
    ) -> None:
        entries = self._meet(name, known)
        made: list[_Made] = [_Made({}, dict(entries)) for _ in given]
        for tensor, its in known:
            for number, labels in its.labels.items():
                operation = Operation(name, args, kwargs, tensor, labels)
                if name in TELLING and given:
                    self._note(self._inputs[number], operation, given[0])
                for result, mine in zip(given, made, strict=True):
                    found = operation.labels(result)
                    if found is not None and number not in mine.labels:
                        mine.labels[number] = found
                    if name in ENTRIES and (entry := operation.taken(result)) is not None:
                        mine.entries[number] = entry
                    if name == "__getitem__":
                        self._note_tail(self._inputs[number], operation, result)
        for result, mine in zip(given, made, strict=True):
            if mine.labels or mine.entries:
                self._known[id(result)] = weakref.ref(result), mine

    def _meet(self, name: str, known: Sequence[tuple[Tensor, _Made]]) -> dict[int, tuple[Axis, int]]:
        """Return the entry that what is made of these belongs to; where it meets those of others, take note."""
        found: dict[int, tuple[Axis, int]] = {}
        for _, made in known:
            for number, (axis, place) in made.entries.items():
                other = found.get(number)
                if other is not None and other[0] == axis and other[1] != place and name not in _SIDE_BY_SIDE:
                    self._inputs[number].linked.setdefault(axis, set()).add(max(place, other[1]))
                if other is None or place > other[1]:
                    found[number] = axis, place
        return found

    @staticmethod
    def _note_tail(evidence: _Evidence, operation: Operation, result: Tensor) -> None:
        """Take note of a dimension of which only the last entries are taken."""
        tail = operation.tail(result)
        if tail is not None and tail.size == evidence.shape[tail.dim]:  # else something was put there
            evidence.tails.add(tail.dim)

    @staticmethod
    def _note(evidence: _Evidence, operation: Operation, result: Tensor) -> None:
        """Take note of what an operation tells of the dimensions of an input."""
        for dim, what in operation.ordered():
            if (axis := axis_along(operation.given, dim)) is not None:
                evidence.ordered.append((axis, what))
        rows = evidence.attended if operation.name == "multi_head_attention_forward" else evidence.rows
        for dims, noted in ((operation.rows(), rows), (operation.channels(), evidence.channels)):
            noted |= {axis.dim for dim in dims if (axis := axis_along(operation.given, dim)) is not None}
        for dim, folds in operation.slides(result):
            if (axis := axis_along(operation.given, dim)) is not None:
                evidence.slid.add(axis.dim)
                evidence.folded |= {axis.dim} if folds else set()
        evidence.windows |= operation.name == "unfold"


def _one_of_each(votes: Sequence[tuple[Axis, str]]) -> list[tuple[Axis, str]]:
    """Return one of the votes for each dimension."""
    return sorted({axis.dim: (axis, what) for axis, what in reversed(votes)}.values(), key=lambda vote: vote[0].dim)


def _finest(evidence: _Evidence, votes: Sequence[tuple[Axis, str]]) -> TimeAxis:
    """Return what is time in a dimension along which order matters: of several clocks the finest.

    Raises:
        Contradiction: what lies along it may be timesteps with their features, or patches of timesteps.

    """
    axis, what = min(votes, key=lambda vote: (vote[0].step, vote[0].period is None))
    if axis.period is not None and not evidence.windows:
        return TimeAxis(axis.dim, axis.period, axis.step, what)
    in_pieces = axis.step > 1 and not evidence.windows and len(evidence.shape) < 3
    if in_pieces and not any(a is not axis and a.step == 1 for a, _ in votes):
        raise Contradiction(
            f"it is read in {axis.size} pieces of {axis.step}, and whether these are the features of a timestep or"
            " several timesteps cannot be told; give the model an input with a dimension of time of its own"
        )
    return TimeAxis(axis.dim, why=what)


def _tensors(values: Iterable[object]) -> list[Tensor]:
    """Return the tensors that an operation takes or gives: it knows them alone, and in lists and tuples."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, tuple | list):
            found += _tensors(value)
    return found
