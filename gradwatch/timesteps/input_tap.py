"""What a model was given and what enters its first sequence module, as tensors to differentiate its output by."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn.utils.rnn import PackedSequence

from gradwatch.model.nested import data_of, differentiable, tensors
from gradwatch.timesteps.chain import Chain
from gradwatch.timesteps.input_calls import InputCall, InputSequence, Roots, packed_lengths
from gradwatch.timesteps.input_gain import Source, gains
from gradwatch.timesteps.kinds import is_recurrent, may_mix, time_of
from gradwatch.timesteps.model_gain import ModelGain, Timesteps
from gradwatch.timesteps.model_inputs import InputSeries, ModelInputs, in_order
from gradwatch.timesteps.output import OverBatch, chosen_of, newest_of, over_batch
from gradwatch.timesteps.time_axis import RECURRENT, Axes, Contradiction


class InputTap:
    """Sees what a model is given, and what enters its first sequence module, in one forward pass.

    That module is the first that runs of the recurrent ones and of those that are named. Where what enters has no
    graph, a leaf takes its place.
    """

    def __init__(self, modules: Mapping[str, nn.Module], timesteps: Timesteps) -> None:
        """Take the model's modules by name.

        Raises:
            ValueError, TypeError: `timesteps` is none.

        """
        named = _named(timesteps)
        self.axes, self.roots = Axes(), Roots()
        if "" in named and named[""] is None:
            raise ValueError(
                "timesteps of the model's own input must be a dimension,"
                " and None is for modules that are called once a timestep"
            )
        of_inputs = {name: time for name, time in named.items() if name not in modules or not name}
        self.inputs = ModelInputs(self.roots, self.axes, {n: t for n, t in of_inputs.items() if t is not None})
        self._chain = Chain(self.roots, self.axes)
        self._named = {id(modules[name]): time for name, time in named.items() if name not in of_inputs}
        self._unknown = [name for name, time in of_inputs.items() if time is None]
        self._names = {id(module): name for name, module in modules.items()}
        self._apart = not any(isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training for m in modules.values())
        """Whether rows are to know nothing of each other."""
        self.modules = [
            m
            for m in modules.values()
            if (is_recurrent(m) or isinstance(m, nn.Embedding) or id(m) in self._named or may_mix(m))
            and not isinstance(m, torch.jit.ScriptModule)
        ]
        """Those to listen to."""
        self._module: nn.Module | None = None
        self._attention = ""
        """Name of the first module that attends."""
        self._calls: list[InputCall] = []
        self._waiting: list[int | None] = []
        """The dimension of time of a sequence module that takes no floating-point tensor: its embedding is meant."""
        self._embedding: nn.Module | None = None
        self._replaced: set[int] = set()
        """Modules that were given or gave another tensor: when a checkpoint runs them again, within the backward pass,
        all must be as it was the first time."""
        self._closed = False

    # --- the forward pass ---

    def arguments(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return copies of the model's arguments to differentiate by, which the model may edit in place.

        Raises:
            ValueError: `timesteps` names what is neither a module nor an input, or a dimension that is not there.

        """
        if self._unknown:
            names = ", ".join(map(repr, self._unknown))
            raise ValueError(f"timesteps must name modules of the model, and it has none called {names}")
        return self.inputs.take(model, args, kwargs)

    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Note what enters a sequence module; an input without a graph is replaced by one that has one."""
        with torch._C.DisableTorchFunction():  # what is done here is nothing that the model does
            return self._before(module, args, kwargs) if torch.is_grad_enabled() else None

    def _before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        found = _input(module, args, kwargs)
        if may_mix(module):
            self._note_mixing(module, found)
        recurrent = is_recurrent(module)
        if not (recurrent or id(module) in self._named):
            return None
        if not self._closed:
            self._note_axes(module, found)
            if recurrent:
                self._note_states(args, kwargs)
            self._module = module if self._module is None else self._module
        if module is not self._module:
            return None
        if found is None:
            if not self._closed and not self._calls and not self._waiting:
                self._waiting.append(self._named.get(id(module), 1))
            return None
        key, value = found
        changed = self._with_graph(module, value)
        if not self._closed:
            self._note_call(module, changed, args, kwargs)
        if changed is value:
            return None
        return (
            tuple(changed if i == key else a for i, a in enumerate(args)),
            {k: changed if k == key else a for k, a in kwargs.items()},
        )

    def _note_call(
        self, module: nn.Module, value: Tensor | PackedSequence, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        """Note a call of the first sequence module."""
        recurrent, time = is_recurrent(module), self._named.get(id(module))
        if self._calls and not recurrent and time is not None:
            return
        time = time_of(module, data_of(value).dim()) if recurrent else time
        call = self._call(value, time, self._names[id(module)])
        call.begins = (
            bool(self._calls)
            and not call.layout.single
            and (call.packed is not None or (call.layout.steps > 1 and _anew(args, kwargs)))
        )
        self._calls.append(call)

    def _note_mixing(self, module: nn.Module, found: tuple[int | str, Tensor | PackedSequence] | None) -> None:
        if isinstance(module, nn.MultiheadAttention) and not self._attention:
            self._attention = self._names[id(module)]
        if found is not None and not self._closed:
            with contextlib.suppress(Exception):  # it is told besides
                self._chain.entered(module, self._names[id(module)], found[1])

    def _note_states(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        for state in tensors(args[1] if len(args) > 1 else kwargs.get("hx")):
            self.axes.note_state(state)

    def _note_axes(self, module: nn.Module, found: tuple[int | str, Tensor | PackedSequence] | None) -> None:
        """Note along which dimension of its input a sequence module goes."""
        if found is None or not isinstance(found[1], Tensor):
            return
        value, declared = found[1], id(module) in self._named
        time = self._named[id(module)] if declared else time_of(module, value.dim())
        if time is None or not -value.dim() <= time < value.dim() or value.dim() < 2:
            return
        rows = None if declared or value.dim() < 3 else 1 - time
        what = "timesteps= names what goes" if declared else RECURRENT
        self.axes.note_sequence(value, time, what, declared=declared, rows=rows)

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:  # noqa: ANN401
        """Note what an embedding gives."""
        if not isinstance(module, nn.Embedding) or not torch.is_grad_enabled() or not isinstance(output, Tensor):
            return None
        with torch._C.DisableTorchFunction():  # as above
            return self._after(module, args, kwargs, output)

    def _after(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor
    ) -> Tensor | None:
        changed = self._with_graph(module, output)
        index = args[0] if args else kwargs.get("input")
        if not self._closed and isinstance(index, Tensor):
            known = self.inputs.embed(index, changed)
            if self._waiting and not self._calls:
                self._embedding = module
                self._calls.append(self._call(changed, self._waiting[0], self._names[id(module)]))
            elif known and self._embedding is None:
                self._embedding = module
        return None if changed is output else changed

    def _with_graph(self, module: nn.Module, value: Any) -> Any:  # noqa: ANN401  (a tensor or a packed sequence)
        # A leaf is somebody's own, perhaps a parameter: a derivative by it would call its hooks.
        graph = data_of(value).requires_grad and not data_of(value).is_leaf
        if graph or (self._closed and id(module) not in self._replaced):
            return value
        self._replaced.add(id(module))
        mine = differentiable(value)
        self.axes.copied(data_of(value), data_of(mine))
        return mine

    def _call(self, value: Tensor | PackedSequence, time: int | None, name: str) -> InputCall:
        try:
            return InputCall.of(value, time, self.roots.add(data_of(value)))
        except IndexError as error:
            shape = tuple(data_of(value).shape)
            raise ValueError(
                f"timesteps of {name} must be a dimension of its input of shape {shape}, got {time}"
            ) from error

    # --- the backward pass ---

    def gain(self, returned: Any, output: Callable[[Any], Any] | None) -> ModelGain:  # noqa: ANN401  (any model's)
        """Return the gain of the newest output by lag, from each input of the model and from what enters the module.

        Args:
            returned: by the model.
            output: chooses a tensor of it. Default: the first floating-point one.

        Raises:
            ValueError: there is no such tensor or no sequence, or the tensor has no graph.
            RuntimeError: the backward pass failed.

        """
        self._closed = True
        entered = self._entered()
        steps = entered[-1].steps if entered and entered[-1].calls[0].layout.single else None
        chosen = chosen_of(returned, output, steps, self.inputs.storages)
        self.axes.note_output(data_of(chosen))
        calls = {(call.root, call.view): call for s in entered for call in s.calls}
        series = self.inputs.series(_packed(entered), max((s.steps for s in entered), default=0), calls)
        if not series and not entered:
            raise ValueError(
                "no sequence was found: no recurrent module ran, and the model was given no floating-point input with"
                " a dimension of time, and no whole numbers for an embedding;"
                ' timesteps={"name of a module": dimension of time} tells where one is'
            )
        place = self._place(series)
        self._refuse_batch(chosen, entered, place)
        self._refuse_rows(data_of(chosen).shape, series)
        newest, lengths, reference = self._newest(chosen, series, entered)
        sources = [Source("", s.label, s.time, s.assumed, s.sequences, joined=True, spread=s.spread) for s in series]
        if entered and not _are_inputs(entered, series):
            one = torch.ones((), device="cpu")
            sources.append(Source(place, "", None, assumed=False, sequences=entered, joined=False, spread=one))
        with contextlib.suppress(Exception):  # as above
            sources += self._chain.sources(series, [source for source in sources if source.input])
        known = {} if lengths is None else {id(reference): lengths}
        try:
            found = gains(
                self.roots, newest, reference.rows, sources, known, apart=self._apart and not self.inputs.named
            )
        except RuntimeError as error:
            raise RuntimeError(_why_not(error, place)) from error
        if self.inputs.left_out and not any(source.reached and source.input for source in sources):
            raise Contradiction("; ".join(self.inputs.left_out))
        notes = list(self.inputs.left_out)
        if not any(source.reached for source in sources):
            notes.append(f"the output does not depend on what enters {place or 'the model'}")
        if output is None and isinstance(returned, Distribution):
            notes.append("the model gives a distribution, of which the mean is meant")
        if self._named and self._module is None:
            names = ", ".join(self._names[key] for key in self._named)
            notes.append(f"none of the modules that timesteps names ran with gradients: {names}")
        return ModelGain(place, found, "; ".join(notes) or None)

    def _entered(self) -> list[InputSequence]:
        """Return the sequences that entered the first sequence module."""
        found: list[InputSequence] = []
        for call in self._calls:
            if call.begins or not found:
                found.append(InputSequence())
            found[-1].calls.append(call)
        return found

    def _place(self, series: Sequence[InputSeries]) -> str:
        module = self._module if not self._waiting else self._embedding
        floats = {i.label for i in self.inputs.every if i.place is not None}
        if module is None and not any(s.label in floats for s in series):
            module = self._embedding
        return "" if module is None else self._names[id(module)]

    def _refuse_batch(self, chosen: Tensor | PackedSequence, entered: Sequence[InputSequence], place: str) -> None:
        recurrent = self._module is not None and is_recurrent(self._module)
        if not entered or not recurrent or not isinstance(chosen, Tensor):
            return
        first = entered[-1].calls[0].layout
        if over_batch(chosen.shape, first):
            raise OverBatch(place, chosen.shape, first.steps, first.count)

    def _refuse_rows(self, shape: torch.Size, series: Iterable[InputSeries]) -> None:
        """Refuse what takes rows for timesteps: attention, and what view() has cut anew."""
        for given in series:
            if (taken := self.axes.attends_over_rows(given.number)) is not None:
                raise OverBatch(self._attention, shape, *taken)
            rows = max(s.rows for s in given.sequences)
            if not self.inputs.named and len(shape) > 0 and shape[0] == given.steps > 1 < rows and rows not in shape:
                raise OverBatch("", shape, given.steps, rows)

    def _newest(
        self, chosen: Tensor | PackedSequence, series: Sequence[InputSeries], entered: Sequence[InputSequence]
    ) -> tuple[Tensor, Tensor | None, InputSequence]:
        """Return the output at the newest timestep of each row, their lengths if known, and whose timesteps those are.

        Where the output has no timesteps, all of it is meant.
        """
        longest = sorted(series, key=lambda s: s.steps, reverse=True)
        # Of a few timesteps that are forecast, or that a decoder is given, all outputs are meant.
        longest = [s for s in longest if 2 * s.steps >= longest[0].steps]
        for one in longest:
            time = self.axes.time_in(data_of(chosen), one.number, one.axis) if one.axis is not None else None
            if time is not None and isinstance(chosen, Tensor):
                newest, lengths = newest_of(chosen, one.sequences[0], (), time)
                return _real(newest), lengths, one.sequences[0]
        references = [*entered[-1:], *(s.sequences[0] for s in longest)]
        references = [r for r in references if 2 * r.steps >= max(e.steps for e in references)]
        for reference in references:
            newest, lengths = newest_of(chosen, reference, self.inputs.sizes)
            if newest is not chosen:
                return _real(newest), lengths, reference
        return _real(data_of(chosen)), None, references[0]


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _why_not(error: RuntimeError, place: str) -> str:
    """Say why a derivative could not be taken, and what to do about it."""
    if "checkpoint" in str(error).lower() and ".grad()" in str(error):
        return "reentrant activation checkpointing allows no derivative by an input (use_reentrant=False does)"
    hint = ""
    if "inplace operation" in str(error):
        hint = (
            "; the model writes to its input, or to what it made of that, after it has computed with it, which no"
            " training notices, because inputs have no gradient there: give gradwatch.horizon the module after that"
        )
    return f"the derivative by the input of {place or 'the model'} failed: {error}{hint}"


def _are_inputs(entered: Sequence[InputSequence], series: Sequence[InputSeries]) -> bool:
    """Tell whether what enters the module are inputs of the model itself."""
    mine = {call.root for one in series for s in one.sequences for call in s.calls}
    return mine.issuperset(call.root for s in entered for call in s.calls)


def _packed(entered: Sequence[InputSequence]) -> Tensor | None:
    """Return the lengths of the rows that entered packed, in the order in which the model has them; None: of none."""
    packed = entered[0].packed if len(entered) == 1 else None
    if packed is None:
        return None
    lengths = packed_lengths(packed)
    return lengths if packed.unsorted_indices is None else lengths[packed.unsorted_indices.cpu()]


def _named(timesteps: object) -> dict[str, int | None]:
    if timesteps == "auto":
        return {}
    whole = isinstance(timesteps, Mapping) and all(
        isinstance(name, str) and (time is None or (isinstance(time, int) and not isinstance(time, bool)))
        for name, time in timesteps.items()
    )
    if not isinstance(timesteps, Mapping) or not whole:
        raise TypeError(
            'timesteps must be "auto" or a mapping from names of modules to their dimensions of time,'
            f' such as {{"encoder": 1}}, got {timesteps!r}'
        )
    return dict(timesteps)


def _input(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[int | str, Tensor | PackedSequence] | None:
    """Find the first floating-point tensor among the arguments of a module, in the order in which it declares them."""
    every: list[tuple[int | str, Any]] = [*enumerate(args), *in_order(module, kwargs).items()]
    return next(
        ((key, v) for key, v in every if isinstance(v, Tensor | PackedSequence) and data_of(v).is_floating_point()),
        None,
    )


def _anew(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Tell whether a recurrent module is called without a state, or with one of zeros: for a new sequence, then."""
    state = args[1] if len(args) > 1 else kwargs.get("hx")
    return not any(t.requires_grad or bool(t.any()) for t in tensors(state))
