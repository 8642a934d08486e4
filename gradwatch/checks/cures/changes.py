"""A model that is to be changed: its modules by name and by place, and how Python spells them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.utils import parametrize

from gradwatch.detectors.remedies import Remedy
from gradwatch.model.layers import named_modules


class NotTried(Exception):  # noqa: N818  (it is no error: it says why a remedy was not tried)
    """Why a remedy cannot be tried on this model; `lines` are the code that a user would write."""

    def __init__(self, reason: str, lines: Iterable[str] = ()) -> None:
        """Keep the lines beside the reason."""
        super().__init__(reason)
        self.lines = list(lines)


class Place(NamedTuple):
    """Where a module stands; one module may stand at several places."""

    owner: nn.Module
    key: str

    @property
    def module(self) -> nn.Module:
        """What stands there now."""
        return getattr(self.owner, "_modules")[self.key]  # type: ignore[no-any-return]  # noqa: B009  (torch's table)

    def put(self, module: nn.Module) -> None:
        """Put another module there, in the mode of the old one."""
        module.train(self.module.training)
        self.owner._modules[self.key] = module


class Patient:
    """A model that is to be changed, and what was changed."""

    def __init__(self, model: nn.Module, run: Callable[[], object]) -> None:
        """Take a model, and what runs it on a batch."""
        self.model, self.modules, self._run = model, named_modules(model), run
        self.changed: list[nn.Parameter] = []
        """Parameters that begin anew: what an optimizer remembers of them does not hold any more."""
        self.added: list[tuple[nn.Module, nn.Module]] = []
        """Modules whose parameters are new, each with that which it stands beside, or in the place of."""

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
        """Return how Python spells a module: model.layers[0].linear."""
        path = next(name for name, known in self.model.named_modules() if known is module)
        spelt, now = "model", self.model
        for part in path.split(".") if path else ():
            spelt, now = spelt + _step(now, part), now._modules[part]  # type: ignore[assignment]  # it is there
        return spelt

    def code_at(self, place: Place) -> str:
        """Return how Python spells a place."""
        return self.code(place.owner) + _step(place.owner, place.key)

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

    def place_of(self, module: nn.Module) -> Place:
        """Return where a module stands, if that is one place.

        Raises:
            NotTried: it is the model itself, or stands at several.

        """
        if module is self.model:
            raise NotTried("it is the model itself")
        found = [place for place in self.places() if place.module is module]
        if len(found) != 1:
            raise NotTried(f"{self.name_of(module)} stands at {len(found)} places of the model")
        return found[0]

    def places(self) -> Iterator[Place]:
        """Yield every place at which a module stands."""
        for owner in list(self.model.modules()):
            for key, child in list(owner._modules.items()):
                if child is not None:
                    yield Place(owner, key)

    def after(self, layer: nn.Module) -> list[Place] | None:
        """Return what comes after a layer in the Sequential that it stands in; None where it stands in none.

        One with a forward of its own may do anything with what it holds.
        """
        for place in self.places():
            owner = place.owner
            if place.module is layer and isinstance(owner, nn.Sequential):
                if type(owner).forward is not nn.Sequential.forward:
                    continue
                keys = list(owner._modules)
                return [Place(owner, key) for key in keys[keys.index(place.key) + 1 :]]
        return None

    def activation_of(self, layer: nn.Module, kinds: tuple[type[nn.Module], ...]) -> Place | None:
        """Return where the activation of a layer stands: the next one in its Sequential, or the only one beside it."""
        following = self.after(layer)
        if following is None:
            owner = next((place.owner for place in self.places() if place.module is layer), None)
            if owner is None or isinstance(owner, nn.ModuleList | nn.ModuleDict | nn.Sequential):
                return None
            beside = [Place(owner, key) for key, child in owner._modules.items() if isinstance(child, ACTIVATIONS)]
            return beside[0] if len(beside) == 1 and isinstance(beside[0].module, kinds) else None
        for place in following:
            if isinstance(place.module, kinds):
                return place
            if not isinstance(place.module, (*NORMALIZATIONS, nn.Dropout, nn.Identity)):
                return None
        return None

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


def shown(module: nn.Module) -> str:
    """Return how a module is made, as far as its repr tells."""
    return f"{'torch.nn.' if type(module).__module__.startswith('torch.nn.') else ''}{module!r}"


def may_begin_anew(module: Any) -> bool:  # noqa: ANN401  (a layer)
    """Tell whether the weights of a layer are its own, and are trained."""
    computed = parametrize.is_parametrized(module) or hasattr(module, "weight_g") or hasattr(module, "weight_orig")
    return not computed and all(p.requires_grad for p in module.parameters(recurse=False))


def _step(owner: nn.Module, key: str) -> str:
    """Return how Python spells a child."""
    if isinstance(owner, nn.Sequential | nn.ModuleList):
        return f"[{list(owner._modules).index(key)}]"
    if isinstance(owner, nn.ModuleDict):
        return f"[{key!r}]"
    return f".{key}" if key.isidentifier() else f"._modules[{key!r}]"


def like(code: str, tensor: Tensor) -> str:
    """Return what makes a module on a tensor's device and in its format, where those are not the usual ones."""
    usual = tensor.device.type == "cpu" and str(tensor.dtype) == "torch.float32"
    return "" if usual else f".to({code})"


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
