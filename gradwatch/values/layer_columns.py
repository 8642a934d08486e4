"""How columns of parameters fold into layers: norms, sensitivities, ratios and order. Nothing else folds them."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from gradwatch.values.snapshot import Column, ModelInfo, ParameterInfo, Role, Snapshot

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Indices = NDArray[np.intp]


def counts(parameter: ParameterInfo) -> bool:
    """Tell whether a parameter counts for the sensitivity of its layer.

    Biases, lone gains and shifts do not: they may begin at zero and mean something there.
    """
    return parameter.role not in ("bias", "gain")


def norms(model: ModelInfo, column: Column) -> dict[str, float | None]:
    """Return the norm of each layer: the root of the sum of squares over its parameters.

    Args:
        model: its layers are the keys, in the order of the forward pass.
        column: an L2 norm for each of its parameters.

    Returns:
        None for a layer none of whose parameters has a number. NaN and infinity are passed on.

    """
    found = group_norms(column, (p.layer for p in model.parameters))
    return {model.layers[i].name: found.get(model.layers[i].name) for i in model.forward_order}


def group_norms(column: Column, groups: Iterable[str]) -> dict[str, float]:
    """Return the norm of each group of parameters, `groups` naming that of each; one without any number is left out."""
    found: dict[str, list[float]] = {}
    for group, norm in zip(groups, column, strict=True):
        if norm is not None:
            found.setdefault(group, []).append(norm)
    return {group: math.hypot(*values) for group, values in found.items()}


def sensitivities(snapshot: Snapshot) -> Column:
    """Return the norm of the gradient times that of the weight, by parameter, in units of the loss.

    None for what does not count, where one of the two is not known, and where the weight is exactly 0.
    """
    weights = snapshot.weight_norm or (None,) * len(snapshot.norm)
    both = zip(snapshot.norm, weights, snapshot.model.parameters, strict=True)
    return tuple(norm * weight if norm is not None and weight and counts(p) else None for norm, weight, p in both)


def holder(layer: str) -> str:
    """Return the name of the module that holds a layer; "" of one that the model itself holds."""
    return layer.rpartition(".")[0]


def inside(name: str, around: str) -> bool:
    """Tell whether a module is another one, or lies in it; everything lies in the model itself, ""."""
    return not around or name == around or name.startswith(f"{around}.")


def around(layers: Sequence[str]) -> str:
    """Return the innermost module that all of these layers lie in; the first of them where that is the model."""
    module = layers[0]
    while module and not all(inside(layer, module) for layer in layers):
        module = module.rpartition(".")[0]
    return module or layers[0]


def trunk(model: ModelInfo) -> str:
    """Return the deepest module that contains more than half of the layers."""
    names = [layer.module.split(".") for layer in model.layers]
    found: list[str] = []
    while True:
        depth = len(found) + 1
        deeper = [name[:depth] for name in names if name[: depth - 1] == found and len(name) >= depth]
        largest = max(deeper, key=deeper.count, default=found)
        if deeper.count(largest) * 2 <= len(names):
            return ".".join(found)
        found = largest


class LayerColumns:
    """The layers of a model and which of its columns are theirs; worked out once for a model.

    Arrays of layers have one entry for each of `model.layers`, arrays of parameters one for each of `model.parameters`.
    """

    def __init__(self, model: ModelInfo) -> None:
        """Work it out."""
        self.model = model
        self._elements: dict[frozenset[Role], Floats] = {}
        self.order: Sequence[int] = model.forward_order
        """Numbers of the layers in the order of the forward pass."""
        within = {layer.module: i for i, layer in enumerate(model.layers)}
        self.numbers: Mapping[str, int] = within | {layer.name: i for i, layer in enumerate(model.layers)}
        """The number of each layer by its name; of a module that holds several, that of the last, whose output is the
        module's."""

    @functools.cached_property
    def normalized(self) -> frozenset[str]:
        """Names of the layers that hold the gain of a normalization."""
        return frozenset(p.layer for p in self.model.parameters if p.role == "normalization")

    @functools.cached_property
    def unstepped(self) -> Sequence[ParameterInfo]:
        """The parameters that are to be trained and in no optimizer, as `ModelInfo.unstepped`."""
        return self.model.unstepped

    @functools.cached_property
    def innermost(self) -> Sequence[str]:
        """Names of the modules of layers that no other of them lies in, in the order of the forward pass."""
        names = [layer.module for layer in self.model.layers]
        around = {name[:at] for name in names for at, letter in enumerate(name) if letter == "."} | {""}
        return list(dict.fromkeys(names[i] for i in self.order if names[i] not in around))

    def module_of(self, layer: str) -> str:
        """Return the name of the module that holds a layer; a name that is no layer's is returned as it is."""
        number = self.numbers.get(layer)
        return layer if number is None else self.model.layers[number].module

    def layer_of(self, module: str, part: str = "") -> str:
        """Return the name of the layer whose output a module's is, or that a part of a recurrent module is.

        A module that is none is returned as it is.
        """
        number = self.numbers.get(f"{module}.{part}" if module else part) if part else None
        number = self.numbers.get(module) if number is None else number
        return module if number is None else self.model.layers[number].name

    def runs(self, chosen: Collection[int], among: Collection[int]) -> list[list[int]]:
        """Group layers that follow one another in the forward pass: one fault is one finding, however far it reaches.

        Args:
            chosen: numbers of the layers to group.
            among: the layers that count as neighbours; the others are passed over.

        """
        if not chosen:
            return []
        neighbours = [index for index in self.order if index in among]
        grouped = itertools.groupby(neighbours, key=chosen.__contains__)
        return [list(run) for is_chosen, run in grouped if is_chosen]

    def weights(self, known: Mapping[str, float]) -> Floats:
        """Return the norms of the parameters that count, by name known so far; NaN where one is not known, or 0."""
        import numpy as np

        names = [self.model.parameters[i].name for i in self._counted[0]]
        return np.array([known.get(name) or np.nan for name in names], dtype=float)

    def sensitivity(self, norms: Floats, weights: Floats) -> Floats:
        """Return ||gradient|| x ||weight|| of each layer, over the parameters that count; NaN where none has both.

        Args:
            norms: of the gradients, (parameters,).
            weights: as `weights` gives them.

        """
        import numpy as np

        columns, owners, starts = self._counted
        with np.errstate(invalid="ignore", over="ignore"):  # of weights that have run away
            return self._folded(norms[columns] * weights, owners, starts)

    def norms(self, column: Column) -> Floats:
        """Return the norm of each layer, as the function of that name does; NaN where there is none."""
        import numpy as np

        columns, owners, starts = self._all
        return self._folded(np.array(column, dtype=float)[columns], owners, starts)

    def _folded(self, values: Floats, owners: Indices, starts: Indices) -> Floats:
        """Return, by layer, the root of the sum of squares of what is known; NaN where nothing is.

        Args:
            values: one for each parameter, layer by layer.
            owners: the layers that have some.
            starts: where those of each begin.

        """
        import numpy as np

        total = np.full(len(self.model.layers), np.nan)
        if len(values) == len(owners):  # one of each, as mostly
            total[owners] = np.abs(values)
            return total
        known = ~np.isnan(values)
        if len(values):
            total[owners] = np.hypot.reduceat(np.where(known, values, 0.0), starts)
            total[owners[~np.logical_or.reduceat(known, starts)]] = np.nan
        return total

    def over_later(self, sensitivity: Floats) -> Floats:
        """Return the sensitivity of each layer over the largest of the layers after it; NaN where there is none."""
        import numpy as np

        later = self.largest_later(sensitivity)
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            later[~(later > 0)] = np.nan
            found: Floats = sensitivity / later
        return found

    def largest_later(self, values: Floats) -> Floats:
        """Return, of each layer, the largest value of the layers after it in the forward pass; NaN where none is."""
        import numpy as np

        found = np.full(len(values), np.nan)
        found[self._order[:-1]] = np.fmax.accumulate(values[self._order[:0:-1]])[::-1]
        return found

    def gains(self, weight_norms: Column | None) -> Floats:
        """Return, of each layer, `||W|| / sqrt(rows)` of its largest weight: 1 keeps the variance of what enters.

        NaN where it has no weight, or its norm is not known.
        """
        import numpy as np

        found = np.full(len(self.model.layers), np.nan)
        if weight_norms is not None:
            layers, columns, roots = self._largest
            found[layers] = np.array(weight_norms, dtype=float)[columns] / roots
        return found

    def elements(self, roles: Iterable[Role]) -> Floats:
        """Return the number of entries of each parameter, 0 for those of other roles. Shape (parameters,)."""
        import numpy as np

        key = frozenset(roles)
        if key not in self._elements:
            sizes, mine = self._sizes
            self._elements[key] = np.where(np.isin(mine, list(key)), sizes, 0.0)
        return self._elements[key]

    @functools.cached_property
    def _order(self) -> Indices:
        import numpy as np

        return np.array(self.order, dtype=np.intp)

    @functools.cached_property
    def _counted(self) -> tuple[Indices, Indices, Indices]:
        """Parameters that count, layer by layer; the layers that have some; where each of those begins among them."""
        return self._by_layer(i for i, p in enumerate(self.model.parameters) if counts(p))

    @functools.cached_property
    def _all(self) -> tuple[Indices, Indices, Indices]:
        """The same of all parameters."""
        return self._by_layer(range(len(self.model.parameters)))

    def _by_layer(self, chosen: Iterable[int]) -> tuple[Indices, Indices, Indices]:
        import numpy as np

        layer_of = [self.numbers[p.layer] for p in self.model.parameters]
        columns = sorted(chosen, key=layer_of.__getitem__)
        owners, starts = np.unique(np.array([layer_of[i] for i in columns], dtype=np.intp), return_index=True)
        return np.array(columns, dtype=np.intp), owners, starts

    @functools.cached_property
    def _largest(self) -> tuple[Indices, Indices, Floats]:
        """Layers that have a weight, the column of the largest of each, and the root of its number of rows."""
        import numpy as np

        found: dict[int, int] = {}
        for column, p in enumerate(self.model.parameters):
            layer = self.numbers[p.layer]
            size = self.model.parameters[found[layer]].elements if layer in found else 0
            if p.role == "weight" and p.elements > size:
                found[layer] = column
        rows = [max((*self.model.parameters[column].shape, 1)[0], 1) for column in found.values()]
        return np.array(list(found), dtype=np.intp), np.array(list(found.values()), dtype=np.intp), np.sqrt(rows)

    @functools.cached_property
    def _sizes(self) -> tuple[Floats, NDArray[np.str_]]:
        """The number of entries and the role of each parameter."""
        import numpy as np

        parameters = self.model.parameters
        return np.array([p.elements for p in parameters], dtype=float), np.array(
            [p.role for p in parameters], dtype=str
        )
