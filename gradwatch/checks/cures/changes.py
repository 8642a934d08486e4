"""A remedy -> a change of a model in place, and the lines of code that do the same."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from gradwatch.detectors.remedies import Remedy
from gradwatch.model.layers import named_modules


class NotTried(Exception):  # noqa: N818  (it is no error: it says why a remedy was not tried)
    """Why a remedy cannot be tried on this model; `lines` are the code that a user would write."""

    def __init__(self, reason: str, lines: Iterable[str] = ()) -> None:
        """Keep the lines beside the reason."""
        super().__init__(reason)
        self.lines = list(lines)


class Patient:
    """A model that is to be changed: its modules by name, and what they take."""

    def __init__(self, model: nn.Module, run: Callable[[], object]) -> None:
        """Take a model, and what runs it on a batch."""
        self.model, self.modules, self._run = model, named_modules(model), run
        self.changed: list[nn.Parameter] = []
        """Parameters that begin anew: what an optimizer remembers of them does not hold any more."""

    def at(self, place: str) -> nn.Module:
        """Return the module at a place, or the one that has the layer of that name in it.

        Raises:
            NotTried: there is none.

        """
        name = place
        while name and name not in self.modules:
            name = name.rpartition(".")[0]
        if place and not name:
            raise NotTried(f"there is no module {place}")
        return self.modules[name]

    def name_of(self, module: nn.Module) -> str:
        """Return the name of a module."""
        return next(name for name, known in self.modules.items() if known is module)

    def code(self, module: nn.Module) -> str:
        """Return how Python spells a module."""
        return spelt(self.name_of(module))

    def among(self, remedy: Remedy, kinds: type[nn.Module] | tuple[type[nn.Module], ...]) -> list[Any]:
        """Return the modules of some kinds that a remedy is for.

        Raises:
            NotTried: there is none of these kinds.

        """
        every, places = list(self.modules.values()), remedy.places
        if not places:
            found = every
        elif remedy.until:
            first, last = every.index(self.at(places[0])), every.index(self.at(remedy.until))
            found = every[min(first, last) : max(first, last) + 1]
        else:
            found = list(dict.fromkeys(module for place in places for module in self.at(place).modules()))
        mine = [module for module in found if isinstance(module, kinds)]
        if not mine:
            names = " or ".join(kind.__name__ for kind in (kinds if isinstance(kinds, tuple) else (kinds,))[:3])
            raise NotTried(f"there is no {names}{f' at {places[0]}' if places else ' in the model'}")
        return mine

    def replace(self, old: nn.Module, new: nn.Module) -> None:
        """Put a module in the place of another, wherever it stands.

        Raises:
            NotTried: it is the model itself.

        """
        if old is self.model:
            raise NotTried("it is the model itself", [f"model = {new}"])
        new.train(old.training)
        for owner in list(self.model.modules()):
            for name, child in list(owner.named_children()):
                if child is old:
                    setattr(owner, name, new)

    def inputs(self, module: nn.Module) -> list[Tensor]:
        """Return the first argument of each call of a module, where that is a tensor."""
        seen: list[Tensor] = []

        def look(_: nn.Module, args: tuple[Any, ...]) -> None:
            seen.extend(arg.detach() for arg in args[:1] if isinstance(arg, Tensor))

        handle = module.register_forward_pre_hook(look)
        try:
            self._run()
        finally:
            handle.remove()
        return seen


def spelt(name: str) -> str:
    """Return how Python spells the way to a module: model.layers[0].linear."""
    parts = (f"[{part}]" if part.isdigit() else f".{part}" for part in name.split(".") if part)
    return "model" + "".join(parts)


def followed_by(model: nn.Module, layer: nn.Module) -> tuple[nn.Sequential, int, list[nn.Module]] | None:
    """Return the Sequential that a layer stands in, its place there, and what comes after it; None where in none."""
    for owner in model.modules():
        # One with a forward of its own may do anything with what it holds.
        if isinstance(owner, nn.Sequential) and type(owner).forward is nn.Sequential.forward:
            children = list(owner)
            for i, child in enumerate(children):
                if child is layer:
                    return owner, i, children[i + 1 :]
    return None


def activations_after(model: nn.Module, layer: nn.Module, kinds: tuple[type[nn.Module], ...]) -> Iterator[nn.Module]:
    """Yield the module that is the activation of a layer: the next one in its Sequential, or those beside it."""
    known = followed_by(model, layer)
    if known is not None:
        for module in known[2]:
            if isinstance(module, kinds):
                yield module
                return
            if next(module.parameters(), None) is not None and not isinstance(module, NORMALIZATIONS):
                return
        return
    owner = next(o for o in model.modules() if any(child is layer for child in o.children()))
    yield from (child for child in owner.children() if isinstance(child, kinds))


NORMALIZATIONS = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)
LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
BOUNDED = (nn.Sigmoid, nn.Tanh, nn.Hardtanh, nn.Hardsigmoid, nn.Softsign, nn.LogSigmoid, nn.Tanhshrink)
RECTIFIED = (nn.ReLU, nn.ReLU6)
SMOOTH = (nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus, nn.PReLU)
ACTIVATIONS = (*BOUNDED, *RECTIFIED, *SMOOTH)
