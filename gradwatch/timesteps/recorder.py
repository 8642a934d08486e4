"""Records the calls of sequence modules in one step, from which their gradients through time can be worked out."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils.hooks import unserializable_hook

from gradwatch.model.attempts import Attempts, callers
from gradwatch.model.gradient_hooks import at_output, batched, of_others, transformed
from gradwatch.model.nested import floats
from gradwatch.timesteps.call_records import CallRecord, SequenceCall, SequenceModule, origin_of, outputs_of
from gradwatch.timesteps.kinds import (
    KINDS,
    Kind,
    Recurrence,
    is_cell,
    is_fused,
    kind_of,
    time_of,
)
from gradwatch.timesteps.layout import Layout, blank_of, layout_of
from gradwatch.timesteps.mixing import Seen
from gradwatch.timesteps.structure import Structure

ROWS = 8
"""Rows of a batch that are looked at closely: 8, each with cotangents of its own, give the decay rate within 2 %."""
BUDGET = 256 * 2**20
"""Bytes that the walk back through one module may take; beyond it there are fewer rows."""
_NUMBERS = 40
"""How many numbers per row, timestep and hidden unit the walk back holds at once, about."""


def bytes_per_row(steps: int, hidden: int) -> int:
    """Return about how many bytes walking back takes for each row; `hidden` units are those of all layers together."""
    return steps * hidden * _NUMBERS * 4


def _checkpointed() -> bool:
    """Tell whether torch's activation checkpointing runs this; when it does so again, our hooks may be gone."""
    return any(frame.f_globals.get("__name__") == "torch.utils.checkpoint" for frame in callers())


def first_tensor(value: object) -> Tensor | None:
    """Return the first floating-point tensor of a module's inputs or outputs; of a packed sequence its data."""
    return next(iter(floats(value)), None)


class Recorder:
    """Sees the forward pass of one step, as `gradwatch.model.forward_hooks` shows it."""

    def __init__(
        self,
        timesteps: str | Mapping[str, int | None],
        attempts: Attempts | None = None,
        *,
        rows: int = ROWS,
        budget: int = BUDGET,
        kinds: Sequence[Kind] = KINDS,
    ) -> None:
        """Begin with no modules.

        Args:
            timesteps: as for `watch`.
            attempts: knows which calls and backward passes an exception ended.
            rows: of a batch, how many are looked at closely.
            budget: bytes that the walk back through one module may take; beyond it there are fewer rows.
            kinds: those that can be walked back through.

        """
        self._attempts = attempts or Attempts()
        self._named = dict(timesteps) if isinstance(timesteps, Mapping) else {}
        self._rows, self._budget, self._kinds = rows, budget, kinds
        self._structure = Structure()
        self._candidates: dict[str, weakref.ref[nn.Module]] = {}
        """Modules that it looks at."""
        self._learned: dict[str, bool] = {}
        """By name, whether a leaf in place of the input was found to do no harm."""
        self._pass = 0
        self._busy: int | None = None
        """The last backward pass that has brought something since the last forward call."""
        self.targets: dict[int, SequenceModule] = {}
        """The modules that are seen, by `id`."""
        self._model: int | None = None
        """The model itself, by `id`, where it is no sequence module."""
        self.given: torch.Size | None = None
        """The shape of what the model gave last."""

    def arm(self, modules: Mapping[str, nn.Module], *, compiled: bool) -> dict[int, nn.Module]:
        """Choose the modules to see before a step, by `id`; where torch.compile is at work, only fused ones can be."""
        self.clear()
        chosen: dict[int, nn.Module] = {}
        for name, module in modules.items():
            kind = kind_of(module, self._kinds)
            seen = Seen(self._named[name]) if name in self._named else self._structure.seen.get(name)
            if kind is None and seen is None:
                continue
            target = self.targets[id(module)] = SequenceModule.of(
                name, module, kind, seen, learned=self._learned.get(name, False)
            )
            # torch.compile runs fused recurrent networks as they are. In a cell it would compile a hook along, which
            # would split what is compiled.
            if compiled and (not is_fused(module) or getattr(torch._dynamo.config, "allow_rnn", False)):
                target.note = "it is not measured: torch.compile is in use, and compiled code calls no hooks"
            else:
                chosen[id(module)] = module
        if not compiled:
            candidates = self._structure.arm(modules)
            self._candidates = {n: weakref.ref(m) for n, m in modules.items() if id(m) in candidates}
            chosen |= candidates
        model = modules.get("")
        if chosen and model is not None and not compiled and id(model) not in self.targets:
            self._model = id(model)
            chosen[self._model] = model
        return chosen

    def missing(self) -> list[str]:
        """Return the names that the user gave and the model does not have."""
        have = {target.name for target in self.targets.values()}
        return [name for name in self._named if name not in have]

    def owned(self, mine: AbstractSet[int], others: AbstractSet[int]) -> list[SequenceModule]:
        """Return the modules of a step: all but those of whose parameters only other optimizers step some, by `id`."""
        # What several optimizers share is of the first of them that steps, which finds the weights as they were.
        return [t for t in self.targets.values() if not t.told and not of_others(t.parameters, mine, others)]

    def next_step(self, targets: Iterable[SequenceModule]) -> None:
        """Let go of what was seen of these, and look on."""
        if self._structure.settle():  # they are listened to now, and may never be armed for again
            for name, seen in self._structure.seen.items():
                if (found := self._candidates[name]()) is not None and id(found) not in self.targets:
                    self.targets[id(found)] = SequenceModule.of(name, found, None, seen)
        for target in targets:
            candidate, target.candidate = target.candidate, None
            # A reentrant checkpoint cuts off what gets no input with a gradient.
            if candidate is not None and (module := candidate()) is not None:
                self._learned[target.name] = all(p.grad is not None for p in module.parameters() if p.requires_grad)
            target.let_go()

    def clear(self) -> None:
        """Let go of everything, and look no more."""
        self.next_step(self.targets.values())
        self.targets, self._model, self.given = {}, None, None
        self._pass, self._busy = 0, None

    def leave_out_void(self) -> None:
        """Let go of what belongs to calls and backward passes that an exception ended."""
        void, broken = self._attempts.void, self._attempts.broken
        if not void and not broken:  # nearly always
            return
        for target in self.targets.values():
            target.leave_out(void, broken)
            if not target.calls and target.candidate is not None:
                target.candidate = None
                self._learned.pop(target.name)

    # --- what the forward hooks call ---

    def entered(self, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Put a leaf in place of an input that has no gradient, so that it gets one; the numbers stay the same."""
        self._structure.entered(self._attempts.now)
        target = self.targets.get(id(module))
        if target is None or transformed():
            return None
        self.leave_out_void()
        if not torch.is_grad_enabled():
            target.without_grad = target.without_grad or not target.calls
            return None
        x = first_tensor(inputs[0]) if inputs and isinstance(inputs[0], Tensor | PackedSequence) else None
        if x is None:
            return None
        # Where nothing goes back now, a run without a graph was a validation.
        target.without_grad = target.without_grad and torch._C._current_graph_task_id() != -1
        target.version = x._version
        if is_fused(module) and module.dropout and module.training and x.device.type == "cpu":
            target.random = torch.get_rng_state()
        if x.requires_grad or not target.trusted:
            return None
        # In a frozen module the output must not begin to require a gradient. What a checkpoint computes again must save
        # as much as the first time.
        if not any(p.requires_grad for p in module.parameters()) or _checkpointed():
            return None
        leaf = x.detach().requires_grad_()
        target.leaves[id(leaf)] = weakref.ref(leaf)
        leaf.register_post_accumulate_grad_hook(_drop_gradient)  # type: ignore[no-untyped-call]  # torch's
        return _with_data(inputs[0], leaf), *inputs[1:]

    def left(
        self,
        module: nn.Module,
        inputs: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        output: Any,  # noqa: ANN401  (whatever a module gives)
    ) -> None:
        """Copy what is needed of inputs and outputs, and hang hooks on the tensors."""
        self._structure.left(module, inputs, kwargs, output)
        if id(module) == self._model:
            self.given = getattr(first_tensor(output), "shape", None)
        target = self.targets.get(id(module))
        in_backward = torch._C._current_graph_task_id() != -1
        if target is None or transformed() or not torch.is_grad_enabled() or (in_backward and not target.without_grad):
            return
        value = _input_of(target, inputs, kwargs)
        x = first_tensor(value)
        if x is None:
            target.note = target.note or "its first input is not a floating-point tensor"
            return
        if not target.trusted and not target.mixing and not x.requires_grad:
            self._learn(target, module, x, sum(t is x for t in floats((*inputs, *kwargs.values()))), floats(output))
        layout = self._layout(target, module, value if isinstance(value, PackedSequence) else x)
        if layout is None:
            return
        self._count(target)
        call = SequenceCall(layout, self._pass, self._attempts.now)
        if target.mixing == "cell":
            target.note_begin(call, [t for t in floats((*inputs, *kwargs.values())) if t is not x], floats(output))
        tensors = outputs_of(output, recurrent=target.recurrent, single=call.single)
        if target.kind is not None:
            state = inputs[1] if len(inputs) > 1 else kwargs.get("hx")
            self._record(target, target.kind, module, call, x, state, tensors)
        if not isinstance(value, PackedSequence) and not call.single:
            call.blank = blank_of(layout, x)
        target.calls.append(call)
        for name, tensor in ({"x": x} | tensors).items():
            self._hang(tensor, call, name)
        target.sentinel.watch(module)

    # --- parts of that ---

    def _learn(self, target: SequenceModule, module: nn.Module, x: Tensor, times: int, outputs: list[Tensor]) -> None:
        """Find out whether a leaf in place of the input would do harm; `next_step` looks at what backward brought.

        It would where the module is given the input several times, and may ask whether it is the same.
        """
        if self._learned.get(target.name) is False:
            target.note = (
                "its input has no gradient, and with one it might train differently: it edits or keeps the input, or is"
                " given it twice, or a part of it gets no gradient"
            )
        kept = times > 1 or any(value is x for part in module.modules() for value in vars(part).values())
        harmless = not kept and x._version == target.version and bool(outputs) and all(t.requires_grad for t in outputs)
        self._learned[target.name] = False
        target.candidate = weakref.ref(module) if harmless else None

    def _count(self, target: SequenceModule) -> None:
        """Begin another pass, if something runs after a backward pass, or again in a later one."""
        task = torch._C._current_graph_task_id()
        if task == -1:
            begins = self._busy is not None and self._busy not in self._attempts.broken
            self._busy = None
        else:
            begins = target.begins_pass(task)
        if begins:
            self._pass += 1
            self._forget()

    def _forget(self) -> None:
        """Keep the last pass that a backward pass has reached, and what came after it."""
        for target in self.targets.values():
            reached = {call.number for call in target.calls if call.task is not None}
            target.passes |= reached
            last = max(reached, default=-1)
            for call in target.calls:
                if call.number < last:
                    call.drop()
            target.calls = [call for call in target.calls if call.number >= last]

    def _layout(self, target: SequenceModule, module: nn.Module, value: Tensor | PackedSequence) -> Layout | None:
        """Find rows and timesteps in an input; where that is not possible, or only of a part, a note says so."""
        if target.kind is None:
            return self._layout_as_told(target, value)
        if is_cell(module, self._kinds):
            return layout_of(value, None, self._rows)
        hidden = getattr(module, "hidden_size", 1) * getattr(module, "num_layers", 1)
        if isinstance(value, PackedSequence):
            return layout_of(value, 0, self._affordable(len(value.batch_sizes), hidden))
        time = time_of(module, value.dim(), self._kinds)
        assert time is not None
        rows = self._affordable(value.shape[time], hidden)
        if rows < min(self._rows, value.shape[1 - time] if value.dim() == 3 else 1):
            target.note = (
                f"only {rows} row{'s' * (rows > 1)} of the batch {'are' if rows > 1 else 'is'} looked at:"
                f" more would take more than {self._budget >> 20} MiB"
            )
        return layout_of(value, time, rows)

    def _layout_as_told(self, target: SequenceModule, value: Tensor | PackedSequence) -> Layout | None:
        if isinstance(value, PackedSequence):
            return layout_of(value, target.time, self._affordable(len(value.batch_sizes), 1))
        if target.time is not None and value.dim() <= target.time:
            target.note = (
                f"timesteps= says that dimension {target.time} is time (counted from 0),"
                f" and its input has {value.dim()} dimensions"
            )
            return None
        return layout_of(value, target.time)

    def _affordable(self, steps: int, hidden: int) -> int:
        return max(min(self._rows, self._budget // max(bytes_per_row(steps, hidden), 1)), 1)

    @staticmethod
    def _record(
        target: SequenceModule,
        kind: Kind,
        module: nn.Module,
        call: SequenceCall,
        x: Tensor,
        state: Any,  # noqa: ANN401  (None, a tensor or two)
        outputs: Mapping[str, Tensor],
    ) -> None:
        """Copy rows of what a recurrent module took and gave."""
        recurrence, layout = Recurrence.of(module, kind), call.layout
        h0, c0 = (state[0], state[1]) if isinstance(state, tuple | list) else (state, None)
        weights = kind.weights(module)
        y = layout.take(outputs["h" if call.single else "y"])

        def rows_of(given: Tensor | None, width: int) -> Tensor:
            return y.new_zeros((recurrence.parts, layout.rows, width)) if given is None else layout.state(given)

        hidden, width = len(weights[1]) // kind.gates, y.shape[-1] // recurrence.directions
        record = CallRecord(
            recurrence=recurrence,
            layout=layout,
            weights=[w.detach().clone() if target.sharded else w.detach() for w in weights],
            x=layout.take(x),
            y=y,
            h0=rows_of(h0, width),
            c0=rows_of(c0, hidden) if kind.has_cell_state else None,
            random=target.random if recurrence.dropout else None,
            narrow=torch.is_autocast_enabled(x.device.type),
            sole_user=target.holds_leaf(x),
        )
        earlier = [c for c in target.calls if c.number == call.number]
        if isinstance(h0, Tensor):
            record.origin = origin_of(h0, record, earlier)
        # A cell of one kernel has one node in the graph for both.
        c = outputs.get("c")
        record.c_through_h = call.single and c is not None and outputs["h"].grad_fn is not c.grad_fn
        call.record, call.final_state = record, weakref.ref(outputs["h"])

    def _hang(self, tensor: Tensor, call: SequenceCall, name: str) -> None:
        """Keep what arrives at a tensor, reduced or copied at once, because a view would keep all of it."""
        if not tensor.requires_grad:
            return
        recorder_ref, call_ref = weakref.ref(self), weakref.ref(call)

        def hook(gradient: Tensor | None) -> None:
            recorder, call = recorder_ref(), call_ref()
            if recorder is None or call is None or gradient is None:
                return
            graph = torch.is_grad_enabled()
            try:
                with torch.no_grad():
                    recorder._arrived(call, name, gradient, graph=graph)
            except Exception:  # noqa: BLE001  (this runs inside of the user's backward pass)
                call.drop()

        # After the hooks of the user, who may change what goes into the module.
        if name != "x" and tensor.grad_fn is not None:
            call.handles.append(at_output(tensor.grad_fn, tensor.output_nr, hook))
            return
        # A module may keep the tensor as an attribute: saved with it, the hook stays out, and without a warning.
        call.handles.append(tensor.register_hook(unserializable_hook(hook)))  # type: ignore[no-untyped-call]  # torch's

    def _arrived(self, call: SequenceCall, name: str, gradient: Tensor, *, graph: bool) -> None:
        self._busy = task = self._attempts.backward()
        call.reached(task, graph=graph)
        if batched(gradient):
            call.batched = True
            return
        if name == "x" or call.single:
            call.squares[name], call.lengths = call.layout.every(gradient)
        if call.record is not None:
            rows = call.layout.take(gradient) if name in ("x", "y") else call.layout.state(gradient)
            call.record.gradients[name] = rows


def _input_of(target: SequenceModule, inputs: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:  # noqa: ANN401
    """Return what a sequence module goes over: of one that was seen, whatever its arguments are, and are called."""
    if target.mixing:
        return next(iter(floats((*inputs, *kwargs.values()))), None)
    return inputs[0] if inputs else kwargs.get("input")


def _with_data(value: Tensor | PackedSequence, data: Tensor) -> Tensor | PackedSequence:
    """Return the tensor, or the packed sequence that it is the data of."""
    if isinstance(value, PackedSequence):
        return PackedSequence(data, value.batch_sizes, value.sorted_indices, value.unsorted_indices)
    return data


def _drop_gradient(leaf: Tensor) -> None:
    leaf.grad = None
