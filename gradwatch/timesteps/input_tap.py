"""What enters the first sequence module of a model, as a tensor by which the output can be differentiated."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from gradwatch.model.nested import data_of, differentiable, leaves, tensors
from gradwatch.timesteps.input_calls import InputCall, InputSequence, Roots, gain_by_lag
from gradwatch.timesteps.kinds import is_recurrent, time_of
from gradwatch.timesteps.model_gain import ModelGain, Timesteps
from gradwatch.timesteps.output import chosen_of, newest_of, over_batch


def in_order(module: nn.Module, kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return keyword arguments in the order in which the module declares them."""
    if len(kwargs) < 2:
        return kwargs
    declared = [name for name in inspect.signature(module.forward).parameters if name in kwargs]
    return {name: kwargs[name] for name in (*declared, *kwargs)}


_SEED = 0
"""Of the cotangent, so that two measurements agree."""


class InputTap:
    """Sees what enters the first sequence module of a model, as a tensor by which the output can be differentiated.

    That module is the first that runs of the recurrent ones and of those that are named; where there is none, the
    model's first floating-point input of three or more dimensions counts (time is dimension 1), or what its first
    embedding gives. Where what enters has no graph, a leaf takes its place.
    """

    def __init__(self, modules: Mapping[str, nn.Module], timesteps: Timesteps) -> None:
        """Take the model's modules by name.

        Raises:
            ValueError, TypeError: `timesteps` is none, or names a module that is not there.

        """
        named = _named(timesteps)
        unknown = [name for name in named if name and name not in modules]
        if unknown:
            raise ValueError(
                f"timesteps must name modules of the model, and it has none called {', '.join(map(repr, unknown))}"
            )
        self._own = {"": named.pop("")} if "" in named else {}
        self._named = {id(modules[name]): time for name, time in named.items()}
        self._names = {id(module): name for name, module in modules.items()}
        self.modules = [
            m
            for m in modules.values()
            if (is_recurrent(m) or isinstance(m, nn.Embedding) or id(m) in self._named)
            and not isinstance(m, torch.jit.ScriptModule)
        ]
        """Those to listen to."""
        self._roots = Roots()
        self._module: nn.Module | None = None
        self._calls: list[InputCall] = []
        self._waiting: list[int | None] = []
        """The dimension of time of a sequence module that takes no floating-point tensor: its embedding is meant."""
        self._embedding: nn.Module | None = None
        self._replaced: set[int] = set()
        """Modules that were given or gave another tensor: when a checkpoint runs them again, within the backward pass,
        all must be as it was the first time."""
        self._spare: dict[str, InputCall] = {}
        """What counts where no sequence module has run."""
        self._sizes: set[tuple[int, int]] = set()
        self._closed = False

    # --- the forward pass ---

    def arguments(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return copies of the model's arguments to differentiate by, which the model may edit in place."""
        mine, keywords = (
            tuple(map(differentiable, args)),
            {name: differentiable(a) for name, a in in_order(model, kwargs).items()},
        )
        every = [t for t in leaves([*mine, *keywords.values()]) if isinstance(t, Tensor)]
        dense = [t for t in every if t.layout is torch.strided and not t.is_nested]
        self._sizes = {(t.shape[0], t.shape[1]) for t in dense if t.dim() > 1}
        floating = [t for t in dense if t.requires_grad]
        if self._own:
            time = self._own[""]
            if time is None:
                raise ValueError(
                    "timesteps of the model's own input must be a dimension,"
                    " and None is for modules that are called once a timestep"
                )
            fitting = next((t for t in floating if -t.dim() <= time < t.dim()), None)
            if fitting is None:
                self._waiting.append(time)
            else:
                self._calls.append(self._call(fitting, time, "the model"))
        if (wide := next((t for t in floating if t.dim() > 2), None)) is not None:
            self._spare["input"] = self._call(wide, 1, "the model")
        return mine, keywords

    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Note what enters a sequence module; an input without a graph is replaced by one that has one."""
        recurrent = is_recurrent(module)
        if self._own or not torch.is_grad_enabled() or not (recurrent or id(module) in self._named):
            return None
        if self._module is None and not self._closed:
            self._module = module
        if module is not self._module:
            return None
        found = _input(module, args, kwargs)
        if found is None:
            if not self._closed and not self._calls and not self._waiting:
                self._waiting.append(self._named.get(id(module), 1))
            return None
        key, value = found
        changed = self._with_graph(module, value)
        time = self._named.get(id(module))
        several = recurrent or (time is None)
        if not self._closed and (several or not self._calls):
            call = self._call(
                changed, time_of(module, data_of(value).dim()) if recurrent else time, self._names[id(module)]
            )
            call.begins = (
                bool(self._calls)
                and not call.layout.single
                and (call.packed is not None or (call.layout.steps > 1 and _anew(args, kwargs)))
            )
            self._calls.append(call)
        if changed is value:
            return None
        return (
            tuple(changed if i == key else a for i, a in enumerate(args)),
            {k: changed if k == key else a for k, a in kwargs.items()},
        )

    def after(self, module: nn.Module, _args: object, _kwargs: object, output: Any) -> Any:  # noqa: ANN401
        """Note what the first embedding gives."""
        if not isinstance(module, nn.Embedding) or not torch.is_grad_enabled() or not isinstance(output, Tensor):
            return None
        changed = self._with_graph(module, output)
        if not self._closed and self._waiting and not self._calls:
            self._embedding = module
            self._calls.append(self._call(changed, self._waiting[0], self._names[id(module)]))
        elif not self._closed and self._module is None and self._embedding is None:
            self._embedding = module
            self._spare["embedding"] = self._call(changed, int(changed.dim() > 2), self._names[id(module)])
        return None if changed is output else changed

    def _with_graph(self, module: nn.Module, value: Any) -> Any:  # noqa: ANN401  (a tensor or a packed sequence)
        # A leaf is somebody's own, perhaps a parameter: a derivative by it would call its hooks.
        graph = data_of(value).requires_grad and not data_of(value).is_leaf
        if graph or (self._closed and id(module) not in self._replaced):
            return value
        self._replaced.add(id(module))
        return differentiable(value)

    def _call(self, value: Tensor | PackedSequence, time: int | None, name: str) -> InputCall:
        try:
            return InputCall.of(value, time, self._roots)
        except IndexError as error:
            shape = tuple(data_of(value).shape)
            raise ValueError(
                f"timesteps of {name} must be a dimension of its input of shape {shape}, got {time}"
            ) from error

    # --- the backward pass ---

    def gain(self, returned: Any, output: Callable[[Any], Any] | None) -> ModelGain:  # noqa: ANN401  (any model's)
        """Return the gain of the newest output by lag.

        One vector-Jacobian product with a cotangent v ~ N(0, I/R) for each row, R the width of the output: the root
        mean square of `||J^T v||` over the rows estimates the Frobenius norm of the Jacobian over sqrt(R).

        Args:
            returned: by the model.
            output: chooses a tensor of it. Default: the first floating-point one.

        Raises:
            ValueError: there is no such tensor or no sequence, or the tensor has no graph.
            RuntimeError: the backward pass failed.

        """
        self._closed = True
        sequences, place = self._sequences()
        last = sequences[-1]
        chosen = chosen_of(returned, output, last.steps if last.calls[0].layout.single else None)
        first = last.calls[0].layout
        recurrent = self._module is not None and is_recurrent(self._module)
        if recurrent and isinstance(chosen, Tensor) and over_batch(chosen.shape, first):
            raise ValueError(
                f"{place or 'the model'} runs over the batch: the output of shape {tuple(chosen.shape)} has a row for"
                f" each of its {first.steps} timesteps and none for its {first.count} rows; set batch_first=True, or"
                " transpose what goes in"
            )
        newest, lengths = newest_of(chosen, last, self._sizes)
        if newest.is_complex():
            newest = torch.view_as_real(newest)
        keys = list(dict.fromkeys(call.root for sequence in sequences for call in sequence.calls))
        try:
            gradients = self._roots.gradients(newest, _cotangent(newest, last.rows), keys)
        except RuntimeError as error:
            if "checkpoint" in str(error).lower() and ".grad()" in str(error):
                raise RuntimeError(
                    "reentrant activation checkpointing allows no derivative by an input (use_reentrant=False does)"
                ) from error
            raise RuntimeError(f"the derivative by the input of {place or 'the model'} failed: {error}") from error
        with torch.no_grad():
            known = lengths if len(sequences) == 1 else None
            gain = gain_by_lag([sequence.squares(gradients, known) for sequence in sequences])
            numbers = torch.cat([last.padding(gradients).to(gain.device), gain])
        note = None
        if all(gradient is None for gradient in gradients.values()):
            note = f"the output does not depend on what enters {place or 'the model'}"
        elif newest is chosen and newest.dim() > 2 and output is None:
            note = (
                f"the output of shape {tuple(chosen.shape)} has no dimension of {last.steps} timesteps,"
                " so that all of it is meant"
            )
        return ModelGain(place, sum(s.rows for s in sequences), numbers, note)

    def _sequences(self) -> tuple[list[InputSequence], str]:
        """Return the sequences that entered, and the name of the module whose input they are."""
        calls, module = self._calls, self._module if not self._waiting else self._embedding
        if not calls and self._named and self._module is None:
            names = ", ".join(self._names[key] for key in self._named)
            raise ValueError(f"none of the modules that timesteps names ran with gradients: {names}")
        if not calls and not self._waiting and self._spare:
            kind, spare = next(iter(self._spare.items()))
            calls, module = [spare], self._embedding if kind == "embedding" else None
        if not calls:
            raise ValueError(
                "no sequence was found: no recurrent module ran, and the model has no floating-point input of three or"
                " more dimensions and no embedding;"
                ' timesteps={"name of a module": dimension of time} tells where one is'
            )
        found = [InputSequence()]
        for call in calls:
            if call.begins:
                found.append(InputSequence())
            found[-1].calls.append(call)
        return found, "" if module is None else self._names[id(module)]


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


def _cotangent(newest: Tensor, rows: int) -> Tensor:
    """Draw v ~ N(0, I/R) for each row of the newest output, R its width."""
    width = newest.numel() // rows if rows in newest.shape else newest.numel()
    private = torch.Generator(device="cpu").manual_seed(_SEED)  # drawing from torch's own would change the training
    drawn = torch.randn(newest.shape, generator=private, device="cpu", dtype=torch.float32)
    return drawn.to(newest.device, newest.dtype) / math.sqrt(max(width, 1))
