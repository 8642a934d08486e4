"""What enters the first sequence module of a model, as a tensor by which the output can be differentiated."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn.utils.rnn import PackedSequence

from gradwatch.model.nested import differentiable, tensors_of
from gradwatch.timesteps.adjoint import by_lag
from gradwatch.timesteps.kinds import is_recurrent, time_of
from gradwatch.timesteps.layout import Layout, Packed, Padded
from gradwatch.timesteps.model_gain import ModelGain, Timesteps
from gradwatch.timesteps.output import chosen_of, data_of, time_in


def in_order(module: nn.Module, kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return keyword arguments in the order in which the module declares them."""
    if len(kwargs) < 2:
        return kwargs
    declared = [name for name in inspect.signature(module.forward).parameters if name in kwargs]
    return {name: kwargs[name] for name in (*declared, *kwargs)}


_SEED = 0


class _View(NamedTuple):
    """Where the entries of a tensor lie in the memory of its base."""

    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


@dataclass
class _Call:
    """What entered the sequence module in one call."""

    layout: Layout
    root: tuple[int, int]
    """The tensor with respect to which the derivative is taken."""
    view: _View | None
    shape: torch.Size
    single: bool = False
    """Whether the call is one timestep."""
    time: int = 0
    batched: bool = True
    packed: PackedSequence | None = None
    begins: bool = False
    """Whether it begins a sequence of its own, and does not go on with the state of the call before."""
    blank: Tensor = field(default_factory=lambda: torch.zeros(0, device="cpu"))
    """(T, B): whether the input is exactly zero there, as padding is."""

    def squares(self, tensor: Tensor) -> Tensor:
        """Sum the squares over the features, (T, B), of a tensor that lies as the input does."""
        if self.single:
            tensor = tensor.unsqueeze(0)
        elif self.packed is None and tensor.dim() < 2 + self.batched:  # rows and timesteps without features
            tensor = tensor.unsqueeze(-1)
        return self.layout.every(tensor)[0]


@dataclass
class _Sequence:
    """Calls that follow each other in time."""

    calls: list[_Call] = field(default_factory=list)

    @property
    def steps(self) -> int:
        return sum(call.layout.steps for call in self.calls)

    @property
    def rows(self) -> int:
        return max(call.blank.shape[1] for call in self.calls)


class InputTap:
    """Sees what enters the first sequence module of a model, as a tensor by which the output can be differentiated.

    That module is the first that runs of the recurrent ones and of those that are named; where there is none, the model's first floating-point input of
    three or more dimensions counts (time is dimension 1), or what its first embedding gives. Where what enters has no graph, a leaf takes its place.
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
        self._roots: dict[tuple[int, int], tuple[Tensor, GradientEdge]] = {}
        self._module: nn.Module | None = None
        self._calls: list[_Call] = []
        self._waiting: list[int | None] = []
        """The dimension of time of a sequence module that takes no floating-point tensor: its first embedding is meant."""
        self._embedding: nn.Module | None = None
        self._replaced: set[int] = set()
        """Modules that were given or gave another tensor: what a checkpoint computes once more, within the backward pass, must be as it was the first time."""
        self._spare: dict[str, _Call] = {}
        """What counts where no sequence module has run."""
        self._sizes: set[tuple[int, int]] = set()
        self._closed = False

    # --- the forward pass ---

    def arguments(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return copies of the model's arguments that a derivative can be taken by, and that the model may edit in place."""
        mine, keywords = (
            tuple(map(differentiable, args)),
            {name: differentiable(a) for name, a in in_order(model, kwargs).items()},
        )
        tensors = [t for t in tensors_of([*mine, *keywords.values()]) if t.layout is torch.strided and not t.is_nested]
        self._sizes = {(t.shape[0], t.shape[1]) for t in tensors if t.dim() > 1}
        floating = [t for t in tensors if t.requires_grad]
        if self._own:
            time = self._own[""]
            if time is None:
                raise ValueError(
                    "timesteps of the model's own input must be a dimension, and None is for modules that are called once a timestep"
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
        """Take note of what enters a sequence module; in place of an input without a graph, give it one that has one."""
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
                and not call.single
                and (call.packed is not None or (call.layout.steps > 1 and _anew(args, kwargs)))
            )
            self._calls.append(call)
        if changed is value:
            return None
        return (
            tuple(changed if i == key else a for i, a in enumerate(args)),
            {k: changed if k == key else a for k, a in kwargs.items()},
        )

    def after(self, module: nn.Module, _args: object, _kwargs: object, output: Any) -> Any:  # noqa: ANN401  (whatever a module gives)
        """Take note of what the first embedding gives."""
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

    def _call(self, value: Tensor | PackedSequence, time: int | None, name: str) -> _Call:
        tensor = root = data_of(value)
        view = None
        # A tensor that is a view counts as the part of its base that it is: what else uses the base (a skip connection beside a transposed input) counts.
        base = tensor._base
        if (
            base is not None
            and base.requires_grad
            and not base.is_leaf
            and base.dtype is tensor.dtype
            and _apart(tensor)
            and _apart(base)
        ):
            root, view = (
                base,
                _View(tensor.shape, tensor.stride(), int(tensor.storage_offset()) - int(base.storage_offset())),
            )
        key = (id(root), root._version)
        if (
            key not in self._roots
        ):  # the edge, because the tensor itself may be edited in place before the model is done
            self._roots[key] = root, get_gradient_edge(root)
        if isinstance(value, PackedSequence):
            call = _Call(Packed(value, 1), key, view, tensor.shape, packed=value)
        elif time is None:
            call = _Call(
                Padded(torch.Size((1, *tensor.shape)), 0, 1, batched=tensor.dim() > 1),
                key,
                view,
                tensor.shape,
                single=True,
                batched=tensor.dim() > 1,
            )
        elif not -tensor.dim() <= time < tensor.dim():
            raise ValueError(
                f"timesteps of {name} must be a dimension of its input of shape {tuple(tensor.shape)}, got {time}"
            )
        else:
            time %= tensor.dim()
            batched = tensor.dim() > 2 or time == 1
            wide = torch.Size((*tensor.shape, 1)) if tensor.dim() < 2 + batched else tensor.shape
            call = _Call(Padded(wide, time, 1, batched=batched), key, view, tensor.shape, time=time, batched=batched)
        call.blank = call.squares(tensor.detach()) == 0
        return call

    # --- the backward pass ---

    def gain(self, returned: Any, output: Callable[[Any], Any] | None) -> ModelGain:  # noqa: ANN401  (whatever a model returns)
        """Return the gain of the newest output by lag.

        One vector-Jacobian product with a cotangent v ~ N(0, I/R) for each row, R the width of the output: the root mean square of `||J^T v||` over the rows
        estimates the Frobenius norm of the Jacobian over sqrt(R).

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
        chosen = chosen_of(returned, output, last.steps if last.calls[0].single else None)
        newest, lengths = self._newest(chosen, last)
        if newest.is_complex():
            newest = torch.view_as_real(newest)
        rows = last.rows
        width = newest.numel() // rows if rows in newest.shape else newest.numel()
        private = torch.Generator(device="cpu").manual_seed(_SEED)  # drawing from torch's own would change the training
        cotangent = torch.randn(newest.shape, generator=private, device="cpu", dtype=torch.float32).to(
            newest.device, newest.dtype
        ) / math.sqrt(max(width, 1))
        roots = list(dict.fromkeys(call.root for sequence in sequences for call in sequence.calls))
        try:
            found = torch.autograd.grad(
                [newest], [self._roots[key][1] for key in roots], [cotangent], allow_unused=True
            )
        except RuntimeError as error:
            if "checkpoint" in str(error).lower() and ".grad()" in str(error):
                raise RuntimeError(
                    "reentrant activation checkpointing allows no derivative by an input (use_reentrant=False does)"
                ) from error
            raise RuntimeError(f"the derivative by the input of {place or 'the model'} failed: {error}") from error
        with torch.no_grad():
            gradients = {
                key: _in_place(gradient, self._roots[key][0]) for key, gradient in zip(roots, found, strict=True)
            }
            numbers = _by_lag(
                [self._squares(s, gradients, lengths if len(sequences) == 1 else None) for s in sequences]
            )
        note = None
        if all(gradient is None for gradient in found):
            note = f"the output does not depend on what enters {place or 'the model'}"
        elif newest is chosen and newest.dim() > 2 and output is None:
            note = f"the output of shape {tuple(chosen.shape)} has no dimension of {last.steps} timesteps, so that all of it is meant"
        return ModelGain(place, sum(s.rows for s in sequences), numbers, note)

    def _sequences(self) -> tuple[list[_Sequence], str]:
        calls, module = self._calls, self._module if not self._waiting else self._embedding
        if not calls and self._named and self._module is None:
            raise ValueError(
                f"none of the modules that timesteps names ran with gradients: {', '.join(self._names[key] for key in self._named)}"
            )
        if not calls and not self._waiting:
            kind = next(iter(self._spare), None)
            calls, module = (
                ([self._spare[kind]], self._embedding if kind == "embedding" else None) if kind else ([], None)
            )
        if not calls:
            raise ValueError(
                "no sequence was found: no recurrent module ran, and the model has no floating-point input of three or more dimensions and no embedding;"
                ' timesteps={"name of a module": dimension of time} tells where one is'
            )
        found: list[_Sequence] = [_Sequence()]
        for call in calls:
            if call.begins:
                found.append(_Sequence())
            found[-1].calls.append(call)
        return found, "" if module is None else self._names[id(module)]

    def _newest(self, chosen: Tensor | PackedSequence, sequence: _Sequence) -> tuple[Tensor, Tensor | None]:
        """Return the output at the newest timestep of each row, if it has timesteps, and the lengths of the rows, if these are known by now."""
        packed = sequence.calls[0].packed
        if isinstance(chosen, PackedSequence):
            lengths = _lengths(chosen.batch_sizes)
            starts = chosen.batch_sizes.cumsum(0) - chosen.batch_sizes
            newest = starts[lengths - 1] + torch.arange(len(lengths), device="cpu")
            return chosen.data[newest.to(chosen.data.device)], None
        call, rows = sequence.calls[0], sequence.rows
        steps = {sequence.steps}
        if packed is not None:  # it may have been padded to more than its own longest row, as the batch was
            steps |= {
                size
                for pair in self._sizes
                for size, other in (pair, pair[::-1])
                if other == rows and size >= sequence.steps
            }
        time = time_in(
            chosen.shape, steps, rows if call.batched else None, 1 if call.single or packed is not None else call.time
        )
        if time is None:
            return chosen, None
        if not call.batched:
            return chosen.movedim(time, 0)[-1:], None
        laid = chosen.movedim((time, 1 - min(time, 1)), (0, 1))
        order = torch.arange(rows, device=chosen.device)
        if packed is None:
            ends = _ends(~_stacked([c.blank for c in sequence.calls]), only_padding=True)
            return laid[ends.to(chosen.device) - 1, order], ends
        ends = _lengths(packed.batch_sizes).to(chosen.device)
        if packed.unsorted_indices is not None:
            ends = ends[packed.unsorted_indices.to(chosen.device)]
        return laid[ends - 1, order], None

    def _squares(
        self, sequence: _Sequence, gradients: Mapping[tuple[int, int], Tensor | None], lengths: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the squared norms of the gradient, (T, B), and how long each row is."""
        squares = []
        for call in sequence.calls:
            gradient = gradients[call.root]
            if gradient is None:
                gradient = call.blank.new_zeros(call.shape, dtype=torch.float32)
            elif call.view is not None:
                gradient = gradient.as_strided(
                    call.view.shape, call.view.stride, gradient.storage_offset() + call.view.offset
                )
            squares.append(call.squares(gradient))
        packed = sequence.calls[0].packed
        if packed is not None:
            return squares[0], _lengths(packed.batch_sizes).to(squares[0].device)
        every = _stacked(squares)
        return every, _ends(
            ~_stacked([c.blank for c in sequence.calls]) | (every != 0), only_padding=False
        ) if lengths is None else lengths


# --- what enters ---


def _named(timesteps: object) -> dict[str, int | None]:
    if timesteps == "auto":
        return {}
    whole = isinstance(timesteps, Mapping) and all(
        isinstance(name, str) and (time is None or (isinstance(time, int) and not isinstance(time, bool)))
        for name, time in timesteps.items()
    )
    if not isinstance(timesteps, Mapping) or not whole:
        raise TypeError(
            f'timesteps must be "auto" or a mapping from names of modules to their dimensions of time, such as {{"encoder": 1}}, got {timesteps!r}'
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
    """Tell whether a recurrent module is called without a state, or with one of zeros: on a sequence of its own, then."""
    state = args[1] if len(args) > 1 else kwargs.get("hx")
    return not any(t.requires_grad or bool(t.any()) for t in tensors_of(state))


def _apart(tensor: Tensor) -> bool:
    """Tell whether no two entries of a tensor are the same memory."""
    reach = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1):
        if stride < reach:
            return False
        reach += stride * (size - 1)
    return True


# --- rows and timesteps ---


def _lengths(batch_sizes: Tensor) -> Tensor:
    """Return the lengths of packed rows, longest first, from the number of rows at each timestep."""
    return (batch_sizes.unsqueeze(0) > torch.arange(int(batch_sizes[0]), device="cpu").unsqueeze(1)).sum(1)


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    """Put (T, B) next to each other in time; rows that end earlier than others, in a loop, are blank or zero from there on."""
    most = max(part.shape[1] for part in parts)
    blank = parts[0].dtype is torch.bool
    return torch.cat([nn.functional.pad(part, (0, most - part.shape[1]), value=float(blank)) for part in parts])


def _ends(alive: Tensor, *, only_padding: bool) -> Tensor:
    """Return for each row of (T, B) how many timesteps there are up to the last that is alive; all of them where none is.

    `only_padding`: zeros count as padding only where some row goes on to the end, as in a batch that is padded to its longest row.
    """
    steps = len(alive)
    order = torch.arange(1, steps + 1, device=alive.device).unsqueeze(1)
    ends = (alive * order).amax(0)
    ends = torch.where(ends == 0, steps, ends)
    return torch.where((alive[-1]).any(), ends, steps) if only_padding else ends


def _in_place(gradient: Tensor | None, root: Tensor) -> Tensor | None:
    """Lay a gradient out in memory as its tensor is, so that a view of the one is a view of the other."""
    if gradient is None or gradient.stride() == root.stride():
        return gradient
    if not _apart(root):
        return gradient
    return torch.empty_strided(root.shape, root.stride(), dtype=gradient.dtype, device=gradient.device).copy_(gradient)


def _by_lag(found: Sequence[tuple[Tensor, Tensor | None]]) -> Tensor:
    """Return the length of the longest row, and the root mean square by lag over the rows that have this lag."""
    most = max(len(squares) for squares, _ in found)
    device = found[0][0].device
    sums, counts = torch.zeros((2, most), dtype=torch.float64, device=device)
    longest = torch.zeros((), dtype=torch.float64, device=device)
    for squares, lengths in found:
        mine, rows = by_lag(squares, lengths)
        sums[: len(mine)] += mine.to(device)
        counts[: len(rows)] += rows.to(device)
        end = torch.full_like(longest, len(squares)) if lengths is None else lengths.max().to(longest)
        longest = torch.maximum(longest, end)
    return torch.cat([longest.view(1), (sums / counts.clamp(min=1)).sqrt()])
