"""Passes of a model on one batch of which is known where its inputs, its output and what modules give lie in time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from gradwatch.checks.batch import Call
from gradwatch.checks.futures import Timed, along, first_difference, inexact, swapped, when_packed
from gradwatch.model.arguments import is_called, labelled, positional_names
from gradwatch.model.forward_hooks import listening
from gradwatch.model.layers import named_modules
from gradwatch.model.nested import data_of, leaves, mapped, storage_of
from gradwatch.timesteps.input_calls import Root
from gradwatch.timesteps.input_tap import InputTap
from gradwatch.timesteps.model_gain import Timesteps
from gradwatch.timesteps.model_inputs import ModelInput
from gradwatch.timesteps.model_pass import core, left_alone
from gradwatch.timesteps.output import leaves_of
from gradwatch.timesteps.time_axis import Contradiction, TimeAxis


class Place(NamedTuple):
    """Where a leak is."""

    name: str
    """The module; "" is the model itself."""
    module: nn.Module
    before: str | None
    """The module that takes what leaks already, where the fault is in what this one computes around it."""

    @property
    def kind(self) -> str:
        """Class of the module."""
        return type(self.module).__name__


class _Seen(NamedTuple):
    """What a module took or gave."""

    name: str
    gives: bool
    around: str
    """The module that calls it."""
    tensors: Sequence[Tensor]


class TimedPass:
    """One model and one batch, to be run again with other values in it; the model is left as it was each time."""

    def __init__(
        self,
        call: Call,
        timesteps: Timesteps,
        output: Callable[[Any], Any] | None,
        wanted: str | int | tuple[str | int, ...] | None,
        *,
        training: bool,
        number: int = 0,
    ) -> None:
        """Run it once, and find out where everything lies in time.

        Of several outputs that lie in time as the first does, `number` is the one that is meant.

        Raises:
            ValueError: nothing has timesteps, or it cannot be told which dimension they are.

        """
        self._model, self._args, self._kwargs = core(call.module), call.args, call.kwargs
        self._choose, self._training = output, training
        self._modules = named_modules(self._model)
        self._tap = InputTap(self._modules, timesteps)
        self.notes: list[str] = []
        with self._ready(None):
            mine, kwargs = self._tap.arguments(self._model, self._args, self._kwargs)
            with listening(self._tap.modules, self._tap.before, self._tap.after), self._tap.axes:
                returned = self._model(*mine, **kwargs)
        for leaf in leaves_of(returned, ())[::-1]:  # the first has the last word
            self._tap.axes.note_output(data_of(leaf))
        self._times: dict[int, TimeAxis] = {}
        every = self._timed_inputs(wanted, {size for leaf in leaves_of(returned, ()) for size in data_of(leaf).shape})
        self._lengths = {one.steps for one, _ in every if one.steps > 2}
        self._leaf, self._graph, self.output, self.outputs = self._timed_output(returned, every, number)
        self.inputs = self._as_long([one for one, _ in every], wanted)
        """Those whose future is changed."""
        self._long = [(one, its) for one, its in every if one in self.inputs]
        floats = [p for p in (*self._model.parameters(), *(one.data for one in self.inputs)) if p.is_floating_point()]
        self.dtype = floats[0].dtype if floats else torch.float32
        self.whole = Place("", self._model, None)
        """The model itself."""

    # --- where everything lies in time ---

    def _timed_inputs(
        self, wanted: str | int | tuple[str | int, ...] | None, sizes: Collection[int]
    ) -> list[tuple[Timed, ModelInput]]:
        """Return the inputs that have timesteps; `sizes` are those of what the model gives."""
        given = dict(labelled(self._model, self._args, self._kwargs))
        name = positional_names(self._model, wanted + 1)[wanted] if isinstance(wanted, int) else wanted
        meant = [one for one in self._tap.inputs.every if name is None or is_called(one.label, name)]
        found, wrong = list[tuple[Timed, ModelInput]](), list[str]()
        for one in meant:
            try:
                timed = self._timed_input(one, given[one.label], sizes)
            except Contradiction as error:
                wrong.append(f"{one.label}: {error} (timesteps={{{one.label!r}: its dimension}} says which)")
                continue
            if timed is not None:
                found.append((timed, one))
        if name is not None and not found and not wrong:
            known = ", ".join(repr(one.label) for one in self._tap.inputs.every) or "none"
            raise ValueError(f"input must name one of the model's inputs that have timesteps ({known}), got {wanted!r}")
        if not found and wrong:
            raise Contradiction("; ".join(wrong))
        if not found:
            raise ValueError(
                "the model was given no input with a dimension of time: of two dimensions or more, or packed"
            )
        if all(one.steps < 2 for one, _ in found):
            raise ValueError("the batch has 1 timestep, and none comes after it")
        self.notes += wrong
        lengths = {one.steps for one, _ in found}
        flat = [k for k, leaf in given.items() if isinstance(leaf, Tensor) and leaf.dim() == 1 and len(leaf) in lengths]
        if flat:
            self.notes.append(f"Not looked at, for it has no rows: {' and '.join(flat)}")
        return found

    def _timed_input(self, one: ModelInput, leaf: Tensor | PackedSequence, sizes: Collection[int]) -> Timed | None:
        """Return where an input lies in time; None where it has no timesteps.

        Raises:
            Contradiction: which dimension is time cannot be told.

        """
        if isinstance(leaf, PackedSequence):
            return Timed(one.label, leaf.data, when_packed(leaf), len(leaf.batch_sizes))
        if leaf.dim() < 2 or self._tap.axes.is_state(one.number):
            return None
        time = self._tap.axes.time_of(one.number)
        if time.period is not None and leaf.shape[time.dim] in sizes:  # computed in chunks, and no flat window
            time = TimeAxis(time.dim, why=time.why)
        if not time.why:
            self.notes.append(f"Dimension {time.dim} of {one.label} was taken for time, as nothing tells (timesteps=)")
        self._times[one.number] = time
        when = along(leaf, time.dim, period=time.period, step=time.step)
        return Timed(one.label, leaf, when, int(when.max()) + 1)

    def _timed_output(
        self,
        returned: Any,  # noqa: ANN401  (whatever a model returns)
        inputs: Sequence[tuple[Timed, ModelInput]],
        number: int,
    ) -> tuple[int, Tensor, Timed, int]:
        """Return which tensor of what the model gave is meant, that itself, where it lies in time, and how many do."""
        every = self._leaves(returned)
        found: list[tuple[bool, int, Tensor | PackedSequence, Tensor]] = []
        for at, leaf in enumerate(every):
            if (when := self._when(leaf, inputs)) is not None:
                passed_on = storage_of(data_of(leaf)) in self._tap.inputs.storages
                found.append((passed_on or not inexact(data_of(leaf)), at, leaf, when))
        if not found:
            shapes = ", ".join(str(tuple(data_of(leaf).shape)) for leaf in every) or "no tensor"
            steps = " or ".join(str(steps) for steps in dict.fromkeys(one.steps for one, _ in inputs))
            raise ValueError(
                f"the output has no dimension of time: the model gave {shapes}, and of its inputs"
                f" {', '.join(one.label for one, _ in inputs)} each row has {steps} timesteps. Whether a model looks"
                " ahead can be told only of an output for each timestep (output= chooses one, timesteps= says which"
                " dimension of an input is time)"
            )
        found.sort(key=lambda one: one[:2])
        first, shape = data_of(found[0][2]), found[0][3].shape
        alike = [
            one
            for one in found
            if one[0] == found[0][0] and one[3].shape == shape and data_of(one[2]).shape[:2] == first.shape[:2]
        ]
        _, at, leaf, when = alike[number]
        data = data_of(leaf)
        return at, data, Timed("", data.detach(), when, int(when.max()) + 1), len(alike)

    def _leaves(self, returned: Any) -> list[Tensor | PackedSequence]:  # noqa: ANN401
        """Return the tensors in what the model gave, or the one that is meant."""
        if self._choose is None:
            return leaves_of(returned, self._lengths)
        chosen = self._choose(returned)
        if not isinstance(chosen, Tensor | PackedSequence):
            raise TypeError(f"output must give a tensor, got {type(chosen).__name__}")
        return [chosen]

    def _when(self, leaf: Tensor | PackedSequence, inputs: Sequence[tuple[Timed, ModelInput]]) -> Tensor | None:
        """Return the timesteps of a tensor: along the dimension that an input's time has come to, or one as long."""
        if isinstance(leaf, PackedSequence):
            return when_packed(leaf)
        for _, its in inputs:
            time = self._times.get(its.number)
            dim = self._tap.axes.time_in(leaf, its.number, time) if time is not None else None
            if dim is not None and leaf.shape[dim] > 1:
                return along(leaf, dim)
        for one, its in inputs:
            time = self._times.get(its.number)
            first = [] if time is None else [time.dim]
            order = [dim for dim in dict.fromkeys((*first, 1, *range(leaf.dim()))) if dim < leaf.dim()]
            dim = next((dim for dim in order if leaf.shape[dim] == one.steps > 1), None)
            if dim is not None:
                return along(leaf, dim)
        return None

    def _as_long(self, inputs: Sequence[Timed], wanted: object) -> list[Timed]:
        """Return the inputs that have as many timesteps as the output, where there are such; note the others."""
        same = [one for one in inputs if one.steps == self.output.steps]
        if not same:  # those whose time the output has kept, in part
            longest = max(one.steps for one in inputs)
            same = [one for one in inputs if one.steps == longest]
        plain = [one for one in same if not _is_mask(one)]
        if plain and len(plain) < len(same) and wanted is None:
            said = " and ".join(one.label for one in same if one not in plain)
            self.notes.append(f"Left as it is, for it has all timesteps by all timesteps, as a mask: {said}")
            same = plain
        left = [one for one in inputs if one.steps != same[0].steps]
        if left and wanted is None:
            said = " and ".join(f"{one.label} ({one.steps})" for one in left)
            self.notes.append(f"Not looked at, for its other number of timesteps: {said}")
        return same

    # --- once more ---

    @contextlib.contextmanager
    def _ready(self, dtype: torch.dtype | None) -> Iterator[None]:
        """Let the model run in its mode, in a format, and leave it as it was."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(left_alone(self._model))
            self._model.train(self._training)
            if dtype is not None:
                self._model.to(dtype)
                for device in ("cpu", "cuda"):
                    stack.enter_context(torch.autocast(device, enabled=False))
            yield

    def run(self, future: Mapping[int, Tensor], dtype: torch.dtype | None = None, *, scale: float = 1.0) -> Tensor:
        """Run the model, and return the entries of the output that is meant.

        Args:
            future: what takes the place of tensors in the batch, by their `id`.
            dtype: to compute in; None: as it is.
            scale: a factor on all floating-point inputs.

        """
        with self._ready(dtype):
            return self._run(future, dtype, scale)

    def _run(self, future: Mapping[int, Tensor], dtype: torch.dtype | None, scale: float = 1.0) -> Tensor:
        own = swapped(future, dtype, scale)
        returned = self._model(
            *(mapped(a, own) for a in self._args), **{k: mapped(a, own) for k, a in self._kwargs.items()}
        )
        return data_of(self._leaves(returned)[self._leaf]).detach()

    # --- what tells where to look ---

    def derivative(self, t: int, share: float) -> int:
        """Return the last timestep by which the output at one has a derivative of some size; -1: there is none.

        Args:
            t: the timestep of the output.
            share: of the largest derivative, that counts.

        """
        norms = [squares.sqrt() for _, squares in self._squares(t)]
        most = max((float(n.max()) for n in norms), default=0.0)
        reached = [
            int((n > share * most).nonzero().max()) for n in norms if most > 0 and bool((n > share * most).any())
        ]
        return max(reached, default=-1)

    def gradient(self, t: int, label: str, at: int) -> float | None:
        """Return the norm of the derivative of the output at a timestep by an input at another; None: there is none."""
        found = [squares for name, squares in self._squares(t) if name == label]
        return float(found[0][at].sqrt()) if found else None

    def _squares(self, t: int) -> list[tuple[str, Tensor]]:
        """Return by input the squared norms of the derivative of the output at a timestep, by timestep of the input."""
        output = torch.view_as_real(self._graph) if self._graph.is_complex() else self._graph
        if not output.requires_grad:
            return []
        when = self.output.when.unsqueeze(-1) if self._graph.is_complex() else self.output.when
        generator = torch.Generator(device="cpu").manual_seed(t)
        signs = (
            torch.randint(2, output.shape, generator=generator, device="cpu").to(output.device, output.dtype) * 2 - 1
        )
        places = [(one, place, when) for one in self.inputs for place, when in self._places(one)]
        keys = list(dict.fromkeys(place for _, place, _ in places))
        found: dict[str, Tensor] = {}
        with contextlib.suppress(RuntimeError):  # what a model edits in place, or computes again, has no derivative
            gradients = self._tap.roots.gradients(output, signs * (when == t), keys, again=True)
            for one, place, times in places:
                total = found.setdefault(one.label, torch.zeros(one.steps, dtype=torch.float64, device="cpu"))
                if (gradient := gradients[place]) is not None:
                    squares = gradient.abs().double().square().cpu()
                    total.index_add_(0, times.cpu().expand(squares.shape).flatten(), squares.flatten())
        return list(found.items())

    def _places(self, timed: Timed) -> Iterator[tuple[Root, Tensor]]:
        """Yield what to differentiate by for an input, each with the timesteps of its entries."""
        one = next(i for i in self._tap.inputs.every if i.label == timed.label)
        if one.place is not None and one.place[1] is None:
            yield one.place[0], timed.when
        for embedded in one.embedded:
            dim = self._tap.axes.time_in(embedded.output, one.number, self._times[one.number])
            if dim is not None and embedded.place[1] is None:
                yield embedded.place[0], along(embedded.output, dim)

    # --- where ---

    def place(self, future: Mapping[int, Tensor], t: int, dtype: torch.dtype | None, share: float) -> Place | None:
        """Return the first module whose own output up to a timestep changes with the future while its input does not.

        Args:
            future: as for `run`.
            t: the last timestep that is to stay.
            dtype: as for `run`.
            share: of the largest entry, up to which a change is none.

        Returns:
            None where none was seen to.

        """
        before, after = self._seen({}, dtype), self._seen(future, dtype)
        for (one, times), (other, _) in zip(before, after, strict=False):
            if one.name != other.name or one.gives != other.gives or len(one.tensors) != len(other.tensors):
                break  # the model goes another way
            if not self._differs(one.tensors, other.tensors, times, t, share):
                continue
            if one.gives:
                return Place(one.name, self._modules[one.name], None)
            return Place(one.around, self._modules[one.around], one.name)
        return None

    def _differs(
        self, mine: Sequence[Tensor], theirs: Sequence[Tensor], times: Sequence[Tensor | None], t: int, share: float
    ) -> bool:
        for one, other, when in zip(mine, theirs, times, strict=True):
            if (
                when is not None
                and one.numel()
                and first_difference(Timed("", one, when, 0), other, t, share) is not None
            ):
                return True
        return False

    def _seen(
        self, future: Mapping[int, Tensor], dtype: torch.dtype | None
    ) -> list[tuple[_Seen, Sequence[Tensor | None]]]:
        """Run the model, and return what its modules take and give, in order, with the timesteps of each tensor."""
        found: list[tuple[_Seen, Sequence[Tensor | None]]] = []
        names = {id(module): name for name, module in self._modules.items()}
        running: list[str] = []

        def note(module: nn.Module, value: object, *, gives: bool) -> None:
            every = list(leaves(value))
            kept = [data_of(leaf).detach().clone() for leaf in every]
            times = [self._when(leaf, self._long) for leaf in every]
            around = running[-1] if running else ""
            found.append((_Seen(names[id(module)], gives, around, kept), times))

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            note(module, (args, kwargs), gives=False)
            running.append(names[id(module)])

        def after(module: nn.Module, _args: object, _kwargs: object, output: object) -> None:
            while running and running.pop() != names[id(module)]:  # an exception ended it
                pass
            note(module, output, gives=True)

        with self._ready(dtype), listening(self._modules.values(), before, after):
            self._run(future, dtype)
        return found


def _is_mask(one: Timed) -> bool:
    """Tell whether an input may be a mask: something for each pair of timesteps."""
    return one.data.shape[-2:] == (one.steps, one.steps)
