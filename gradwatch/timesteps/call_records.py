"""What is kept of a sequence module and its calls in one step, until that is worked out."""

from __future__ import annotations

import enum
import weakref
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils.hooks import RemovableHandle

from gradwatch.model.gradient_hooks import Sentinel
from gradwatch.model.nested import floats
from gradwatch.timesteps.kinds import Kind, Recurrence, is_stock, recurrence_of
from gradwatch.timesteps.layout import Layout
from gradwatch.timesteps.mixing import Seen
from gradwatch.timesteps.structure import is_made_of
from gradwatch.values.sequences import Mixing, RecurrenceName


class StateOrigin(enum.Enum):
    """Where the state came from that a call of a recurrent module began with."""

    NEW = "none was given, or one that no earlier call gave"
    CARRIED = "one without a graph was given to the first call of a pass: of an earlier step, if it is not zero"
    JOINED = "the call before gave it, and the graph goes on through it"
    DETACHED = "the call before gave it, and the graph ends there"
    CHANGED = "of a cell: something was done, within the graph, with what the call before gave, as far as one can tell"

    @property
    def continues(self) -> bool:
        """Whether the call goes on with the sequence of the call before."""
        return self in (StateOrigin.JOINED, StateOrigin.DETACHED, StateOrigin.CHANGED)


@dataclass(kw_only=True)
class CallRecord:
    """One call of a recurrent module: rows of its inputs, states and outputs, and of the gradients that arrived."""

    recurrence: Recurrence
    layout: Layout
    weights: list[Tensor]
    """As `Kind.weights` returns them."""
    x: Tensor
    """(T, R, inputs)"""
    y: Tensor
    """(T, R, directions x width)"""
    h0: Tensor
    """(layers x directions, R, width)"""
    c0: Tensor | None = None
    """(layers x directions, R, hidden); None where the kind has no cell state."""
    origin: StateOrigin = StateOrigin.NEW
    """Where h0 came from."""
    random: Tensor | None = None
    """State of the CPU's generator before the call, where dropout draws from it."""
    narrow: bool = False
    """Whether it ran under autocast: then some of it was computed in a format narrower than that of its outputs."""
    sole_user: bool = False
    """Whether nothing else uses its input: it is a leaf that was put in."""
    c_through_h: bool = False
    """Whether the gradient of its cell state includes what comes through its hidden state, as of a cell not fused."""
    versions: list[int] = field(init=False)
    """Version counters of the weights, to notice an edit."""
    gradients: dict[str, Tensor] = field(default_factory=dict)
    """Like x ("x"), y ("y"), h0 ("h") and c0 ("c"): what arrived at the input, the outputs and the last states."""

    def __post_init__(self) -> None:
        """Read the version counters."""
        self.versions = [w._version for w in self.weights]

    def masks(self) -> list[Tensor]:
        """Return what dropout multiplied with between the layers, drawn again, (T, R, directions x width) each."""
        if self.random is None:
            return []
        generator = torch.Generator(device="cpu")
        generator.set_state(self.random)
        shape = self.layout.inner(self.y.shape[-1])
        keep = 1 - self.recurrence.dropout
        # What the kernels draw does not depend on the format that it is stored in.
        blanks = (torch.empty(shape, dtype=torch.uint8, device="cpu") for _ in range(self.recurrence.layers - 1))
        drawn = (blank.bernoulli_(keep, generator=generator) for blank in blanks)
        return [self.layout.from_inner(mask).to(self.y.dtype) / (keep or 1.0) for mask in drawn]

    @property
    def freed(self) -> bool:
        """Whether the memory of a weight is gone, so that reading it would end the process."""
        return any(w.numel() and not w.untyped_storage().size() for w in self.weights)

    @property
    def edited(self) -> bool:
        """Whether a weight was written to since the call."""
        return any(w._version != version for w, version in zip(self.weights, self.versions, strict=True))


@dataclass
class SequenceCall:
    """One call of a sequence module, and what the last backward pass brought to its tensors."""

    layout: Layout
    number: int
    """Which pass of the step it belongs to."""
    attempt: int = 0
    """The outermost call that it belongs to."""
    task: int | None = None
    """The backward pass that reached it last."""
    tasks: set[int] = field(default_factory=set)
    """All that did."""
    squares: dict[str, Tensor] = field(default_factory=dict)
    """Of the gradients that arrived at the input ("x") and, of a cell, the outputs ("h", "c"): (T, B), float64."""
    lengths: Tensor | None = None
    """(B,), where the input was packed."""
    blank: Tensor | None = None
    """Which timesteps of which rows were exactly zero in the input, (T, B): perhaps padding."""
    record: CallRecord | None = None
    """What walking back needs, of a recurrent module."""
    begins: bool = False
    """Whether it begins a sequence of its own, of a cell that was seen."""
    final_state: weakref.ref[Tensor] | None = None
    """The hidden state that it gave."""
    graph: bool = False
    """Whether the last backward pass made a graph of its own."""
    derived: bool = False
    """Whether the one before did, so that gradients of gradients may be in what arrived."""
    batched: bool = False
    """Whether what the last backward pass brought stands for many gradients, and cannot be read."""
    handles: list[RemovableHandle] = field(default_factory=list)
    """Of the hooks on its tensors."""

    @property
    def single(self) -> bool:
        """Whether the call is one timestep."""
        return self.layout.single

    def reached(self, task: int, *, graph: bool) -> None:
        """Note a backward pass, and whether it makes a graph of its own; what an earlier one brought is forgotten."""
        if self.task == task:
            return
        self.derived, self.graph = self.graph, graph
        self.task = task
        self.tasks.add(task)
        self.forget()

    def leave_out(self, broken: AbstractSet[int]) -> None:
        """Let go of what these backward passes brought."""
        self.tasks -= broken
        if self.task in broken:
            self.task = None
            self.forget()

    def forget(self) -> None:
        """Let go of what arrived."""
        self.squares, self.batched = {}, False
        if self.record is not None:
            self.record.gradients = {}

    def drop(self) -> None:
        """Let go of every tensor, and take the hooks off: the graph may live on."""
        self.squares, self.blank, self.lengths, self.record = {}, None, None, None
        for handle in self.handles:
            handle.remove()
        self.handles = []


@dataclass(kw_only=True)
class SequenceModule:
    """A module whose input has a dimension of time, and its calls in this step."""

    name: str
    kind: Kind | None
    """What it is, if it can be walked back through."""
    recurrence: RecurrenceName | None = None
    """What carries its state, as far as that is known."""
    time: int | None
    """Which dimension is time, where the user said so; None there: each call is one timestep."""
    mixing: Mixing = ""
    """By what it was seen to mix timesteps, where nobody named it."""
    parameters: frozenset[int] = frozenset()
    """Its parameters, by `id`."""
    sharded: bool = False
    """Whether its weights are whole only while it runs, and in pieces on several processes else (FSDP)."""
    trusted: bool = False
    """Whether a leaf in place of its input can do no harm."""
    sentinel: Sentinel = field(default_factory=Sentinel)
    candidate: weakref.ref[nn.Module] | None = None
    """The module, if it may turn out to be trusted after this step."""
    calls: list[SequenceCall] = field(default_factory=list)
    """Of this step, oldest first; those of passes before the last that a backward pass has reached are let go of."""
    gave: list[weakref.ref[Tensor]] = field(default_factory=list)
    """What a cell that was seen gave last."""
    leaves: dict[int, weakref.ref[Tensor]] = field(default_factory=dict)
    """Those put in place of its inputs, by `id`."""
    version: int = 0
    """Of the input, before the module ran."""
    random: Tensor | None = None
    """State of the CPU's generator, before the module ran."""
    without_grad: bool = False
    """Whether it ran without a graph: then a run within backward is the real one (reentrant checkpointing)."""
    task: int | None = None
    """The backward pass within which it ran last."""
    repeated: bool = False
    """Whether it ran several times within one backward pass: in an order that is not that of time."""
    passes: set[int] = field(default_factory=set)
    """Passes of this step that a backward pass has reached and whose calls were let go of."""
    note: str | None = None
    _told: bool = False

    @classmethod
    def of(
        cls, name: str, module: nn.Module, kind: Kind | None, seen: Seen | None, *, learned: bool = False
    ) -> SequenceModule:
        """Describe a module.

        Args:
            name: of it.
            module: to describe.
            kind: what it is, if it can be walked back through.
            seen: how it was named or seen, else.
            learned: whether a leaf in place of its input was found to do no harm.

        """
        # A hook of the user's sees the input too, and may do with it what cannot be done with a leaf.
        hooked = module._forward_pre_hooks or module._forward_hooks
        mixing: Mixing = "" if seen is None else seen.mixing
        return cls(
            name=name,
            kind=kind,
            recurrence=recurrence_of(module) if kind is None else kind.name,
            time=None if kind is not None or seen is None else seen.time,
            mixing=mixing,
            parameters=frozenset(map(id, module.parameters())),
            sharded=any(hasattr(p, "placements") or getattr(p, "_fsdp_flattened", False) for p in module.parameters()),
            # Of what was only seen nobody knows what it does with a leaf, at some later step.
            trusted=not hooked and not mixing and ((kind is not None and is_stock(module)) or learned),
        )

    @property
    def recurrent(self) -> bool:
        """Whether it can be walked back through."""
        return self.kind is not None

    def holds_leaf(self, x: Tensor) -> bool:
        """Tell whether this input is a leaf that was put in."""
        leaf = self.leaves.get(id(x))
        return leaf is not None and leaf() is x

    def note_begin(self, call: SequenceCall, states: Iterable[Tensor], gave: Iterable[Tensor]) -> None:
        """Note whether a call of a cell begins a sequence of its own: where it takes nothing of what it gave before."""
        before = [t for ref in self.gave if (t := ref()) is not None]
        call.begins = not any(is_made_of(t, before) if before else t.requires_grad for t in states)
        self.gave = [weakref.ref(t) for t in gave]

    def begins_pass(self, task: int) -> bool:
        """Note a run within a backward pass, and tell whether it is in a later one than the run before."""
        later = self.task is not None and self.task != task
        self.repeated = self.repeated or self.task == task
        self.task = task
        return later

    def leave_out(self, void: AbstractSet[int], broken: AbstractSet[int]) -> None:
        """Let go of what belongs to outermost calls and to backward passes that an exception ended."""
        for call in self.calls:
            call.leave_out(broken)
            if call.attempt in void:
                call.drop()
        self.calls = [call for call in self.calls if call.attempt not in void]
        self.sentinel.forget(broken)

    def let_go(self) -> None:
        """Let go of what was seen in this step."""
        for call in self.calls:
            call.drop()
        self._told = self._told or bool(self.calls)
        self.calls, self.passes, self.leaves, self.gave, self.random = [], set(), {}, [], None
        self.task, self.repeated = None, False
        self.sentinel.remove()

    @property
    def told(self) -> bool:
        """Whether what was seen of it has been told for one of the optimizers that share it, and nothing has come."""
        return self._told and not self.calls


def outputs_of(output: Any, *, recurrent: bool, single: bool) -> dict[str, Tensor]:  # noqa: ANN401
    """Name what a module gives: outputs "y", hidden states "h", cell states "c"."""
    if single:  # a cell; an unknown one gives its hidden state first, and perhaps once more with its cell state
        return dict(zip(("h", "c"), {id(t): t for t in floats(output)}.values(), strict=False))
    if not recurrent:
        return {}
    y, states = output
    found = {"y": y.data if isinstance(y, PackedSequence) else y}
    return found | dict(zip(("h", "c"), states if isinstance(states, tuple | list) else (states,), strict=False))


def origin_of(h0: Tensor, record: CallRecord, earlier: Sequence[SequenceCall]) -> StateOrigin:
    """Tell where the state came from that a call was given.

    Args:
        h0: the state.
        record: of the call.
        earlier: calls of the module in the same pass, oldest first.

    """
    begun = StateOrigin.NEW if h0.requires_grad else StateOrigin.CARRIED
    if not earlier:
        return begun
    before, layout = earlier[-1], record.layout
    if record.recurrence.directions == 1 and layout.lengths is None and _same_state(before, record, h0):
        return StateOrigin.JOINED if h0.requires_grad else StateOrigin.DETACHED
    if layout.single and h0.requires_grad and before.layout.inner(1) == layout.inner(1):
        first = earlier[0].record
        if first is None or not torch.equal(first.h0, record.h0):  # else a start that learns
            return StateOrigin.CHANGED
        return StateOrigin.NEW
    return begun


def _same_state(before: SequenceCall, record: CallRecord, h0: Tensor) -> bool:
    """Tell whether the state that a call took is the one that the call before gave."""
    earlier = before.record
    if earlier is None or earlier.y.shape[1:] != record.y.shape[1:]:
        return False
    given = before.final_state() if before.final_state is not None else None
    return given is h0 or torch.equal(earlier.y[-1], record.h0[-1])
