"""Where NaN and infinity come from: what modules take and give in one step, and what comes back to them."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from gradwatch.measurement.output_gradients import OutputGradients
from gradwatch.model.arguments import labelled
from gradwatch.model.attempts import Attempts
from gradwatch.model.forward_hooks import ModelView, Part, Pending, ProbeValues, StepView, Transfer
from gradwatch.model.gradient_hooks import transformed
from gradwatch.model.nested import floats
from gradwatch.values.snapshot import NotFinite, Origin

_CALLS = 2**15
"""Calls of modules in one step that are looked at, so that one which never comes takes no more and more memory."""
_WIDE = frozenset({torch.float32, torch.float64, torch.bfloat16})
"""Formats in which sums of sound entries are hardly ever too large."""
SOUND, MINUS, BAD = 0, 1, 2
"""How sound a tensor is: finite; it holds minus infinity, as the logarithm of 0 and what masks; NaN or infinity."""


def soundness(low: float, high: float) -> int:
    """Tell how sound a tensor with this smallest and this largest entry is.

    One whose largest entry is exactly 0 and whose smallest is minus infinity is a mask that is added, and sound.
    """
    if math.isnan(high) or high == math.inf:
        return BAD
    return MINUS if low == -math.inf and high != 0 else SOUND


def named(value: float) -> NotFinite:
    """Return what a number is that is not finite."""
    return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"


def extremes(tensor: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return the smallest and the largest entry, both NaN where there is one; None where that cannot be asked."""
    if not _plain(tensor):
        return None
    try:
        low, high = torch.aminmax(tensor.detach())
    except RuntimeError:  # a format that cannot be compared on this device
        return None
    return low, high


def _plain(tensor: Tensor) -> bool:
    """Tell whether a tensor has entries that can be read; the float8 formats have no arithmetic."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided:
        return False
    return not (tensor.is_nested or tensor.is_meta) and tensor.numel() > 0 and tensor.element_size() > 1


def _adds_up(tensor: Tensor) -> bool:
    """Tell at less than half of the price that all entries are finite: their sum is, which costs no waiting on a CPU.

    Where the sum is not, nobody knows yet: it may be too large for the format.
    """
    return tensor.device.type == "cpu" and tensor.dtype in _WIDE and math.isfinite(tensor.detach().sum().item())


Key = tuple[torch.device, torch.dtype]


@dataclass(eq=False)
class _Seen:
    """A tensor that a module took or gave."""

    tensor: weakref.ref[Tensor]
    version: int
    key: Key
    number: int | None
    """Where its extremes stand among those of its device and format; None: all of it is finite."""
    source: str | None = None
    """The innermost module that gave it; None: none did."""


class _Running(NamedTuple):
    """A call that has not ended."""

    module: int
    """By `id`."""
    began: int
    takes: Sequence[_Seen]
    outside: Sequence[tuple[str, _Seen]]
    """Of an outermost call, what it takes and no module gave, by the name of the argument."""


class _Call(NamedTuple):
    """A call that has ended; `began` and `ended` are of one clock."""

    name: str
    attempt: int
    began: int
    ended: int
    outermost: bool
    takes: Sequence[_Seen]
    outside: Sequence[tuple[str, _Seen]]
    gives: Sequence[_Seen]
    holds: Sequence[_Seen]
    """Buffers that it computes with."""
    weighs: bool
    """Whether it has parameters of its own, so that minus infinity is nothing that it could be meant to take."""
    stock: bool
    """Whether it is one of torch's own modules."""


class Origins:
    """Sees whether what modules take and give is finite, and finds the first that makes something of it that is not.

    A `Probe`; nothing of the tensors is kept but their extremes.
    """

    def __init__(self, outputs: OutputGradients, attempts: Attempts) -> None:
        """Begin with nothing.

        Args:
            outputs: the probe that knows what came back; it must be collected first.
            attempts: numbers the outermost calls, and knows which an exception ended.

        """
        self._outputs, self._attempts = outputs, attempts
        self._names: Mapping[int, str] = {}
        self._clock = 0
        self._attempt = 0
        """The outermost call that was entered last, and whether it is looked at."""
        self._looks = False
        self._stack: list[_Running] = []
        """What runs within it."""
        self._reset()

    def _reset(self) -> None:
        self._calls: list[_Call] = []
        self._known: dict[int, _Seen] = {}
        """By `id` of the tensor: most are given by several modules, and taken by the next."""
        self._extremes: dict[Key, list[Tensor]] = {}

    def arm(self, view: ModelView) -> dict[int, nn.Module]:
        """Choose all modules, by `id`; none where torch.compile is at work."""
        self.clear()
        self._names = {} if view.compiled else view.names
        return {} if view.compiled else {id(module): module for module in view.modules.values()}

    def entered(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Look at what a module takes, before it may write to that."""
        if transformed() or torch._C._current_graph_task_id() != -1:  # computed once more, by a checkpoint
            return
        if self._attempt != self._attempts.now:  # the outermost one
            self._attempt, self._stack = self._attempts.now, []
            self._looks = torch.is_grad_enabled() or module.training  # else a validation
        if not self._looks or len(self._calls) >= _CALLS:
            return
        self._clock += 1
        takes, outside = [seen for tensor in floats(inputs) if (seen := self._look(tensor)) is not None], []
        if not self._stack:
            outside = self._from_outside(labelled(module, inputs, {}))
        self._stack.append(_Running(id(module), self._clock, takes, outside))

    def left(self, module: nn.Module, _inputs: object, kwargs: Mapping[str, Any], output: Any) -> None:  # noqa: ANN401
        """Look at what it gives, and what it took beside its inputs."""
        name = self._names.get(id(module))
        if name is None or transformed() or torch._C._current_graph_task_id() != -1:
            return
        if all(running.module != id(module) for running in self._stack):
            return
        while self._stack[-1].module != id(module):  # an exception ended it
            self._stack.pop()
        running = self._stack.pop()
        takes, outside = list(running.takes), list(running.outside)
        if kwargs:
            takes += [seen for tensor in floats(kwargs) if (seen := self._look(tensor)) is not None]
            if not self._stack:
                outside += self._from_outside(labelled(module, (), kwargs))
        taken = set(map(id, takes))
        gives = [seen for tensor in floats(output) if (seen := self._look(tensor)) is not None]
        for seen in gives:
            if seen.source is None and id(seen) not in taken:
                seen.source = name
        buffers = module._buffers.values() if not module.training else ()
        holds = [seen for b in floats((*buffers,)) if (seen := self._look(b)) is not None]
        self._clock += 1
        weighs = any(p is not None for p in module._parameters.values())
        stock = type(module).__module__.startswith("torch.nn.")
        times = (running.began, self._clock)
        self._calls.append(
            _Call(name, self._attempt, *times, not self._stack, takes, outside, gives, holds, weighs, stock)
        )

    def _from_outside(self, given: Iterable[tuple[str, Tensor | PackedSequence]]) -> list[tuple[str, _Seen]]:
        looked = ((label, self._look(tensor)) for label, leaf in given for tensor in floats(leaf))
        return [(label, seen) for label, seen in looked if seen is not None and seen.source is None]

    def _look(self, tensor: Tensor) -> _Seen | None:
        """Measure a tensor, unless it was and has not been written to since."""
        version = -1 if tensor.is_inference() else tensor._version
        known = self._known.get(id(tensor))
        if known is not None and known.tensor() is tensor and known.version == version != -1:
            return known
        if not _plain(tensor):
            return None
        key, number = (tensor.device, tensor.dtype), None
        if not _adds_up(tensor):
            if (found := extremes(tensor)) is None:
                return None
            row = self._extremes.setdefault(key, [])
            number = len(row)
            row.extend(found)
        seen = self._known[id(tensor)] = _Seen(weakref.ref(tensor), version, key, number)
        return seen

    def collect(self, _step: StepView, transfer: Transfer) -> Part:
        """Return where the first number of this step that is not finite came from."""
        calls = [call for call in self._calls if call.attempt not in self._attempts.void]
        numbers = {key: transfer.add(torch.stack(row)) for key, row in self._extremes.items()}
        arrived = self._outputs.arrived
        self._reset()

        def value(seen: _Seen) -> float:
            """Return what is not finite in a tensor, or else a number that is."""
            if seen.number is None:
                return 0.0
            low, high = numbers[seen.key].values[seen.number : seen.number + 2]
            return low if soundness(low, high) == MINUS else high

        def part() -> ProbeValues:
            finite = all(math.isfinite(sum(row.values)) for row in numbers.values())  # nearly always, and seen at once
            return ProbeValues(origin=origin([] if finite else [*_births(calls, value)], _backward(calls, arrived)))

        return part

    def clear(self) -> None:
        """Let go of what was seen, and look no more."""
        self._names, self._attempt, self._stack = {}, 0, []
        self._reset()


class _Birth(NamedTuple):
    when: int
    origin: Origin
    led: bool = False
    """Whether minus infinity, where nobody can have meant it, led to it."""


def origin(births: Iterable[_Birth], back: Origin | None) -> Origin | None:
    """Return where the first number that is not finite came from; None where none was seen, or not from where.

    Args:
        births: what came up in the forward pass.
        back: what came up on the way back. Minus infinity counts only where something did: it may be meant.

    """
    births = sorted(births, key=lambda birth: birth.when)
    strong = next((birth for birth in births if birth.origin.value != "-inf"), None)
    minus = next((birth for birth in births if birth.origin.value == "-inf"), None)
    if strong is not None:
        return minus.origin if minus is not None and strong.led and minus.when < strong.when else strong.origin
    if minus is not None and back is not None and back.module in (None, minus.origin.module):
        return minus.origin
    return back


def _births(calls: Sequence[_Call], value: Callable[[_Seen], float]) -> Iterator[_Birth]:
    """Yield what came up where: in what modules were called with, in their buffers, and in the modules themselves."""

    def worst(seen: Sequence[_Seen]) -> float:
        values = [value(one) for one in seen]
        return next((v for v in values if math.isnan(v)), max(map(_badness, values), key=_rank, default=0.0))

    for call in calls:
        for label, seen in call.outside:
            if _rank(given := _badness(value(seen))):
                yield _Birth(call.began, Origin("data", call.name, named(given), argument=label))
        taken, gave = worst(call.takes), worst(call.gives)
        if _rank(gave) <= _rank(taken):
            continue
        if _rank(held := worst(call.holds)):
            yield _Birth(call.ended, Origin("weights", call.name, named(held)))
        elif _rank(taken) < BAD:
            led = call.weighs and _rank(taken) == MINUS
            yield _Birth(call.ended, Origin("forward", call.name, named(gave)), led=led)


def _badness(value: float) -> float:
    return 0.0 if math.isfinite(value) else value


def _rank(value: float) -> int:
    return SOUND if math.isfinite(value) else MINUS if value == -math.inf else BAD


def _backward(calls: Sequence[_Call], arrived: Mapping[str, Pending]) -> Origin | None:
    """Return where the gradient came to be not finite on its way back, as far as outputs of modules tell."""
    norms = {name: norm.value for name, norm in arrived.items()}
    bad = {name: norm for name, norm in norms.items() if not math.isfinite(norm)}
    if not bad:
        return None
    ended = [call for call in calls if call.name in norms]
    last = max((at for at, call in enumerate(ended) if call.name in bad), default=None)
    if last is None:
        return None
    born = next(reversed(_bearing(ended, bad)), None)
    if born is not None:
        back = next(bad[seen.source] for seen in born.takes if seen.source in bad)
        return Origin("backward", born.name, named(back))
    value = named(bad[ended[last].name])
    after = next((call for call in ended[last + 1 :]), None)
    if after is None or ended[last].outermost:
        return Origin("backward", None, value)
    # Between two modules, in the one that calls both.
    return Origin("backward", _around(ended[last].name, after.name), value)


def _bearing(calls: Sequence[_Call], bad: Mapping[str, float]) -> list[_Call]:
    """Return the calls to which a finite gradient comes and that give one back which is not, in their order.

    Of a tensor that several take, only the sum of what they give back is known. Torch's own modules are not suspected;
    one that passes the tensor on to another computes with it itself only where nobody around it does.
    """
    found: list[_Call] = []
    for call in calls:
        taken = [] if call.name in bad else [id(seen) for seen in call.takes if seen.source in bad]
        if not taken:
            continue
        inner = [c for c in calls if call.began < c.began and c.ended < call.ended]
        if call.stock and not inner:
            continue
        passed_on = {id(seen) for c in inner for seen in c.takes}
        if not passed_on.issuperset(taken) or (_in_stock(call, calls) and not any(c in inner for c in found)):
            found.append(call)
    return found


def _in_stock(call: _Call, calls: Sequence[_Call]) -> bool:
    """Tell whether the module that calls it is torch's own, as a `Sequential` is, which computes nothing itself."""
    around = (c for c in calls if c.began < call.began and call.ended < c.ended)
    caller = next(around, None)  # the innermost ends first
    return caller is not None and caller.stock


def _around(one: str, other: str) -> str:
    """Return the innermost module that two modules lie in, or that one of them is."""
    mine, theirs = one.split("."), other.split(".")
    count = next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), min(len(mine), len(theirs)))
    return ".".join(mine[:count])
