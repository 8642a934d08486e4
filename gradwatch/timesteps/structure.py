"""Which modules of a model mix timesteps: seen by the graph that their calls leave, and by calls that feed the next.

No name and no class tells that. A module is a sequence module if an operation in it mixes what lies along one dimension
of its input (a convolution, attention, a cumulative sum, a spectrum, a loop), and its output still has that dimension;
of modules in each other the innermost. A module whose calls each take what an earlier one gave, and the next entry of
something, is a cell, of which each call is a timestep.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradwatch.model.nested import floats
from gradwatch.timesteps.kinds import kind_of, may_mix
from gradwatch.timesteps.layout import spaced
from gradwatch.timesteps.mixing import LEAST, Edge, Graph, Seen, entry_of, reaches, seen_in

_MOST = 3000
"""Nodes of the graph that one call is looked at through."""
_NEAR = 64
"""Nodes between what a call of a cell gave and what its next call takes, at most."""
_MODULES, _NUMBERS = 16, 4096
"""Modules that are looked at in a training, and timesteps of those altogether that are no recurrence, at most."""


@dataclass
class _Calls:
    """The last call of a module that may be a cell."""

    gave: Sequence[Tensor]
    first: Tensor
    """What it took first."""
    fed: int = 0
    """How many calls took what the one before gave, and the next entry of something."""


class Structure:
    """Looks for sequence modules in the first step that it sees, and knows them from then on."""

    def __init__(self) -> None:
        """Begin with none known."""
        self.seen: dict[str, Seen] = {}
        """Those that are worth their price at each probe, by name."""
        self._settled = False
        self._names: dict[int, str] = {}
        """The modules to look at, by `id`."""
        self._found: dict[str, Seen] = {}
        self._passed: dict[Any, list[Edge]] = {}
        """By node of the graph that a module's output comes from, those that what it took comes from."""
        self._known: set[str] = set()
        self._calls: dict[str, _Calls] = {}
        self._depth = self._attempt = 0

    def arm(self, modules: Mapping[str, nn.Module]) -> dict[int, nn.Module]:
        """Choose the modules to look at, by `id`; none where it is known."""
        self._names, self._found, self._known = {}, {}, set()
        self._let_go()
        if self._settled:
            return {}
        chosen = {id(module): module for name, module in modules.items() if name and may_mix(module)}
        self._names = {id(module): name for name, module in modules.items() if id(module) in chosen}
        return chosen

    def settle(self) -> bool:
        """Choose among those that were found, if anything ran; tell whether that was done now.

        Cells, loops and scans come first: what attention or a convolution forgets is known from their weights. Of many
        some are chosen that lie evenly over the depth.
        """
        if not self._known:
            return False
        recurrent = {n: s for n, s in self._found.items() if s.mixing not in ("attention", "convolution")}
        others = {n: s for n, s in self._found.items() if n not in recurrent}
        longest = max((s.length for s in others.values()), default=1)
        self.seen = _spaced(recurrent, _MODULES) | _spaced(others, min(max(_NUMBERS // longest, 1), _MODULES))
        self._settled = True
        self.arm({})
        return True

    def _let_go(self) -> None:
        """Let go of the graph: others tell by its nodes what is still there."""
        self._passed, self._calls, self._depth = {}, {}, 0

    def entered(self, attempt: int) -> None:
        """Note that a call begins, within which outermost call: an exception may have ended the one before."""
        if attempt != self._attempt:
            self._attempt = attempt
            self._let_go()
        self._depth += 1

    def left(self, module: nn.Module, inputs: tuple[Any, ...], kwargs: Mapping[str, Any], output: object) -> None:
        """Look at a call that ends; those within it have been looked at."""
        self._depth -= 1
        if self._names:
            self._look(module, inputs, kwargs, output)
        if self._depth <= 0:
            self._let_go()

    def _look(self, module: nn.Module, inputs: tuple[Any, ...], kwargs: Mapping[str, Any], output: object) -> None:
        name = self._names.get(id(module))
        if name is None or not torch.is_grad_enabled() or torch._C._current_graph_task_id() != -1:
            return
        took, gave = floats((*inputs, *kwargs.values())), floats(output)
        if not took or not gave:
            return
        with contextlib.suppress(Exception):  # a graph of another shape than is known here tells nothing
            walked = kind_of(module) is not None  # more is known of that
            if not walked:
                self._look_for_cell(name, took, gave)
            if name not in self._known:
                self._known.add(name)
                begin: list[Edge] = [(t.grad_fn, t.output_nr) for t in took if t.grad_fn is not None]
                ends: list[Any] = [t.grad_fn for t in gave if t.grad_fn is not None]
                says = getattr(module, "batch_first", None)
                batch_first = says if isinstance(says, bool) else None
                graph = self._between(begin, ends)
                seen = None if walked else seen_in(took[0], gave, graph, self._passed, batch_first=batch_first)
                for node in ends:
                    self._passed.setdefault(node, begin)
                if seen is not None:
                    self._found[name] = seen

    def _between(self, begin: Iterable[Edge], ends: Iterable[Any]) -> Graph:
        """Return what lies between what a module took and what it gave; modules inside of it are one node each."""
        found: dict[Any, Sequence[Edge]] = {}
        waiting, outside = list(ends), {node for node, _ in begin}
        while waiting and len(found) < _MOST:
            node = waiting.pop()
            if node is not None and node not in found and node not in outside:
                found[node] = self._passed.get(node, node.next_functions)
                waiting += [next_ for next_, _ in found[node]]
        return found

    def _look_for_cell(self, name: str, took: Sequence[Tensor], gave: Sequence[Tensor]) -> None:
        before, first = self._calls.get(name), took[0]
        self._calls[name] = now = _Calls(gave, first)
        if before is None or first.dim() < 2:
            return
        now.fed = before.fed
        fed = [t for t in took if is_made_of(t, before.gave)]
        if not fed or any(t is first for t in fed) or not self._is_next(name, first, before.first):
            return
        now.fed += 1
        outer = any(name.startswith(f"{other}.") for other, seen in self._found.items() if seen.time is None)
        if now.fed + 1 >= LEAST and not outer:
            for inside in [n for n in self._found if n.startswith(f"{name}.")]:
                del self._found[inside]
            self._found[name] = Seen(None, "cell")

    def _is_next(self, name: str, now: Tensor, before: Tensor) -> bool:
        """Tell whether two calls took different entries of one thing, or what a cell before them gave in turn."""
        for of in (_piece, _entry):
            mine, theirs = of(now), of(before)
            if mine is not None and theirs is not None:
                return mine[0] == theirs[0] and mine[1] != theirs[1]
        others = (calls for other, calls in self._calls.items() if other != name and calls.fed)
        return any(is_made_of(now, calls.gave) for calls in others)


def is_made_of(tensor: Tensor, gave: Iterable[Tensor]) -> bool:
    """Tell whether a tensor is one of some others, or was made of them, not far from them."""
    gave = list(gave)
    if any(tensor is t for t in gave):
        return True
    ends = {t.grad_fn for t in gave if t.grad_fn is not None}
    return bool(ends) and reaches(tensor.grad_fn, ends, _NEAR)


def _piece(tensor: Tensor) -> tuple[Any, int] | None:
    """Return of which storage a tensor is a piece, and where it begins; None: it is all, or a piece of a parameter."""
    storage, base = tensor.untyped_storage(), tensor._base
    if storage.nbytes() <= tensor.numel() * tensor.element_size() or (
        base is not None and isinstance(base, nn.Parameter)
    ):
        return None
    return storage.data_ptr(), int(tensor.storage_offset())


def _entry(tensor: Tensor) -> tuple[Any, int] | None:
    """Return of what the nearest entry was taken that a tensor was made of, and which; None: of nothing near."""
    return entry_of(tensor.grad_fn, _NEAR)


def _spaced(found: dict[str, Seen], most: int) -> dict[str, Seen]:
    names = list(found)
    return {names[k]: found[names[k]] for k in spaced(len(names), most)}
