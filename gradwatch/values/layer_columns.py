"""Columns of parameters and how they fold into layers, as arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gradwatch.values.snapshot import Column, ModelInfo, ParameterInfo, Snapshot

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float64]


def counts(parameter: ParameterInfo) -> bool:
    """Tell whether a parameter counts for the sensitivity of its layer.

    Biases, lone gains and shifts do not: they may begin at zero and mean something there.
    """
    return parameter.role not in ("bias", "scale")


def sensitivities(snapshot: Snapshot) -> Column:
    """Return the norm of the gradient times that of the weight, by parameter, in units of the loss.

    None for what does not count, where one of the two is not known, and where the weight is exactly 0.
    """
    weights = snapshot.weight_norm or (None,) * len(snapshot.norm)
    both = zip(snapshot.norm, weights, snapshot.model.parameters, strict=True)
    return tuple(norm * weight if norm is not None and weight and counts(p) else None for norm, weight, p in both)


@dataclass(frozen=True, eq=False)
class Layout:
    """How the columns of a model fold into its layers; worked out once for a model."""

    model: ModelInfo
    counted: NDArray[np.intp]
    """Parameters that count for the sensitivity; see `counts`."""
    starts: NDArray[np.intp]
    """Where each layer that has such parameters begins among them."""
    owners: NDArray[np.intp]
    """The numbers of those layers."""
    order: NDArray[np.intp]
    """Layers in the order of the forward pass."""
    forward: Sequence[int]
    """The same as plain numbers."""
    numbers: Mapping[str, int]
    inner: Sequence[str]
    weighed: NDArray[np.intp]
    """Numbers of the layers that have a weight."""
    largest: NDArray[np.intp]
    """The parameter that is the largest weight of each of those."""
    rows: Floats
    """The root of its first dimension."""
    elements: Floats
    """Number of entries of each parameter."""
    roles: NDArray[np.str_]
    weights: Floats
    """Last known norm of each counted parameter; NaN where it is not known, or 0."""

    @classmethod
    def of(cls, model: ModelInfo, weight_norms: Mapping[str, float]) -> Layout:
        """Work it out, with the weights' norms as far as they are known."""
        import numpy as np

        index = {layer.name: i for i, layer in enumerate(model.layers)}
        counted = sorted(
            (i for i, p in enumerate(model.parameters) if counts(p)), key=lambda i: index[model.parameters[i].layer]
        )
        layer_of = np.array([index[model.parameters[i].layer] for i in counted], dtype=np.intp)
        owners, starts = np.unique(layer_of, return_index=True)
        sizes, roles = (
            np.array([p.elements for p in model.parameters], dtype=float),
            np.array([p.role for p in model.parameters], dtype=str),
        )
        order = model.forward_order
        around = {
            layer.name[:at] for layer in model.layers for at, letter in enumerate(layer.name) if letter == "."
        } | {""}
        inner = [name for i in order if (name := model.layers[i].name) not in around]
        at = np.array(order, dtype=np.intp)
        largest: dict[int, int] = {}
        for i, p in enumerate(model.parameters):
            mine = index[p.layer]
            if p.role == "weight" and sizes[i] > (sizes[largest[mine]] if mine in largest else 0):
                largest[mine] = i
        weighed, columns = (np.array(list(some), dtype=np.intp) for some in (largest, largest.values()))
        rows = np.sqrt(np.array([max(model.parameters[i].shape[0], 1) for i in largest.values()], dtype=float))
        layout = cls(
            model,
            np.array(counted, dtype=np.intp),
            starts,
            owners,
            at,
            order,
            index,
            inner,
            weighed,
            columns,
            rows,
            sizes,
            roles,
            np.empty(len(counted)),
        )
        layout.weigh(weight_norms)
        return layout

    def weigh(self, weight_norms: Mapping[str, float]) -> None:
        """Take the newest norms of the parameters."""
        self.weights[:] = [weight_norms.get(self.model.parameters[i].name) or float("nan") for i in self.counted]

    def combine(self, norms: Floats) -> Floats:
        """Norm x weight, by root of the sum of squares over the parameters of each layer; NaN where it has none."""
        import numpy as np

        values = norms[self.counted] * self.weights
        known = ~np.isnan(values)
        total = np.full(len(self.model.layers), np.nan)
        if len(values):
            total[self.owners] = np.hypot.reduceat(np.where(known, values, 0.0), self.starts)
            total[self.owners[~np.logical_or.reduceat(known, self.starts)]] = np.nan
        return total

    def over_later(self, sensitivity: Floats) -> Floats:
        """Divide by the largest of the layers after it; NaN where there is none."""
        import numpy as np

        ordered = sensitivity[self.order]
        later = np.append(np.fmax.accumulate(ordered[::-1])[::-1][1:], np.nan)
        ratio = np.empty_like(sensitivity)
        with np.errstate(invalid="ignore", divide="ignore"):
            ratio[self.order] = ordered / np.where(later > 0, later, np.nan)
        return ratio
