"""Remedies that put other modules into a model: activations, normalization, ways around, another recurrence."""

from __future__ import annotations

import itertools
from typing import Any, cast

import torch
from torch import Tensor, nn

from gradwatch.checks.cures.changes import (
    ACTIVATIONS,
    BOUNDED,
    LINEAR,
    NORMALIZATIONS,
    RECTIFIED,
    NotTried,
    Patient,
    Place,
    like,
    may_begin_anew,
    shown,
)
from gradwatch.detectors.remedies import Remedy

_SHOWN = 6
"""Features whose mean and spread are shown."""


class Skip(nn.Sequential):
    """Modules one after the other, and a way around them: x + f(x)."""

    def forward(self, x: Tensor) -> Tensor:
        """Add what goes in to what comes out, of the same shape."""
        added: Tensor = x + super().forward(x)  # type: ignore[no-untyped-call]  # torch's
        return added


class Standardize(nn.Module):
    """Takes the mean of each feature away, and divides by its spread, both of them fixed."""

    mean: Tensor
    spread: Tensor

    def __init__(self, mean: Tensor, spread: Tensor) -> None:
        """Take mean and spread, of shape (features,) or (channels, 1, ...)."""
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("spread", spread)

    def forward(self, x: Tensor) -> Tensor:
        """Return numbers of mean 0 and spread 1."""
        standard: Tensor = (x - self.mean) / self.spread
        return standard


def activation(patient: Patient, remedy: Remedy) -> list[str]:
    """Put another activation in the place of that after a layer; with ReLU, weights begin as He says."""
    old, new = {
        "relu": (BOUNDED, nn.ReLU),
        "leaky_relu": (RECTIFIED, nn.LeakyReLU),
        "smooth_bound": ((nn.Hardtanh, nn.Hardsigmoid, nn.ReLU6), nn.Tanh),
    }[remedy.action]
    lines, places = list[str](), list[Place]()
    # A clamp has no layer of its own, and may be named itself.
    for layer in patient.among(remedy, (*LINEAR, *NORMALIZATIONS, *old)):
        place = patient.place_of(layer) if isinstance(layer, old) else patient.activation_of(layer, old)
        if place is None:
            continue
        if place not in places:
            spelt = patient.code_at(place)
            lines += [f"- {spelt} = {shown(place.module)}", f"+ {spelt} = torch.nn.{new()}"]
            places.append(place)
        if remedy.action == "relu" and isinstance(layer, LINEAR) and may_begin_anew(layer):
            weight = cast(nn.Parameter, layer.weight)
            nn.init.kaiming_normal_(weight, nonlinearity="relu")
            lines.append(f'+ torch.nn.init.kaiming_normal_({patient.code(layer)}.weight, nonlinearity="relu")')
            patient.changed.append(weight)
    if not places:
        called = {nn.ReLU: "relu", nn.LeakyReLU: "leaky_relu", nn.Tanh: "tanh"}[new]
        raise NotTried(
            "which activation comes after it is code of a forward", [f"+ x = torch.nn.functional.{called}(x)"]
        )
    for place in places:
        place.put(new())
    return lines


def normalize(patient: Patient, remedy: Remedy) -> list[str]:
    """Put a LayerNorm (of a convolution: over channels and positions) between each layer and its activation."""
    lines, unknown = list[str](), list[nn.Module]()
    for layer in patient.among(remedy, LINEAR):
        following = patient.after(layer)
        if not following or not isinstance(following[0].module, ACTIVATIONS):
            unknown.append(layer)
            continue
        own, place = _normalization(layer), following[0]
        spelt, after = patient.code_at(place), place.module
        made = f"torch.nn.{own}{like(f'{patient.code(layer)}.weight', layer.weight)}"
        lines.append(f"+ {spelt} = torch.nn.Sequential({made}, {spelt})")
        patient.added.append((own, layer))
        place.put(nn.Sequential(own, after))
    if not lines:
        first = unknown[0]
        raise NotTried(
            f"what happens between {patient.name_of(first) or 'it'} and what comes after it is code of a forward",
            [
                f"+ self.norm = torch.nn.{_normalization(first)}  # in __init__",
                f"+ x = self.norm(x)  # in the forward, after {patient.code(first)}",
            ],
        )
    return lines


def _normalization(layer: Any) -> nn.Module:  # noqa: ANN401  (of `LINEAR`)
    on: Any = {"device": layer.weight.device, "dtype": layer.weight.dtype}
    if isinstance(layer, nn.Linear):
        return nn.LayerNorm(layer.out_features, **on)
    return nn.GroupNorm(1, layer.out_channels, **on)


def drop_normalization(patient: Patient, remedy: Remedy) -> list[str]:
    """Take a normalization out."""
    lines = []
    for module in patient.among(remedy, NORMALIZATIONS):
        place = patient.place_of(module)
        spelt = patient.code_at(place)
        lines += [f"- {spelt} = {shown(module)}", f"+ {spelt} = torch.nn.Identity()"]
        place.put(nn.Identity())
    return lines


def skip(patient: Patient, remedy: Remedy) -> list[str]:
    """Lead a way around each layer that gives as many features as it takes, together with its activation."""
    lines: list[str] = []
    for layer in patient.among(remedy, LINEAR):
        following = patient.after(layer)
        if following is None or not _keeps_its_shape(layer):
            continue
        inside = list(
            itertools.takewhile(lambda p: isinstance(p.module, (*ACTIVATIONS, *NORMALIZATIONS, nn.Dropout)), following)
        )
        if not inside:
            continue  # the last one: what it gives is the output
        places = [patient.place_of(layer), *inside]
        spelt = [patient.code_at(place) for place in places]
        lines = lines or [
            "+ class Skip(torch.nn.Sequential):",
            "+     def forward(self, x): return x + super().forward(x)",
        ]
        lines.append(f"+ {spelt[0]} = Skip({', '.join(spelt)})")
        lines += [f"+ {name} = torch.nn.Identity()" for name in spelt[1:]]
        places[0].put(Skip(*(place.module for place in places)))
        for place in inside:
            place.put(nn.Identity())
    if not lines:
        raise NotTried(
            "no layer in a Sequential gives as many features as it takes", ["+ x = x + layer(x)  # in the forward"]
        )
    return lines


def _keeps_its_shape(layer: Any) -> bool:  # noqa: ANN401  (of `LINEAR`)
    if isinstance(layer, nn.Linear):
        return layer.in_features == layer.out_features
    same: bool = layer.in_channels == layer.out_channels and all(
        step == 1 and (pad == "same" or 2 * pad == spread * (size - 1))
        for step, pad, spread, size in zip(
            layer.stride,
            [layer.padding] * len(layer.stride) if isinstance(layer.padding, str) else layer.padding,
            layer.dilation,
            layer.kernel_size,
            strict=True,
        )
    )
    return same


def pre_norm(patient: Patient, remedy: Remedy) -> list[str]:
    """Normalize at the beginning of each block of a transformer."""
    lines = []
    blocks = patient.among(remedy, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer))
    for block in blocks:
        if not block.norm_first:
            block.norm_first = True
            lines.append(f"+ {patient.code(block)}.norm_first = True")
    if not lines:
        raise NotTried("its blocks normalize at their beginning already")
    return lines


def standardize(patient: Patient, remedy: Remedy) -> list[str]:
    """Standardize what a module takes, feature by feature, with the mean and the spread of this batch."""
    module = patient.at(remedy.places[0] if remedy.places else "")
    seen = [x for x in patient.inputs(module) if x.is_floating_point() and x.dim() > 1]
    if not seen:
        raise NotTried(f"what {patient.name_of(module) or 'the model'} takes is no tensor of numbers")
    convolves = isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    kept = 1 if convolves else seen[0].dim() - 1
    x = seen[0].double()
    others = [d for d in range(x.dim()) if d != kept]
    spread = x.std(others, correction=0)
    if not bool(torch.isfinite(spread).all()):
        raise NotTried("what it takes is not finite")
    spread = torch.where(spread > 0, spread, 1.0)
    shape = [-1] + [1] * (x.dim() - 2) if convolves else [-1]
    first = Standardize(*(n.to(seen[0].dtype).reshape(shape) for n in (x.mean(others), spread)))
    mean, each = (", ".join(f"{n:.4g}" for n in t.flatten()[:_SHOWN].tolist()) for t in (first.mean, first.spread))
    more = ", ..." if first.mean.numel() > _SHOWN else ""
    line = (
        f"+ x = (x - mean) / spread  # feature by feature; in this batch mean = [{mean}{more}], spread = [{each}{more}]"
    )
    if module is patient.model:
        raise NotTried("it is the model itself", [line, "+ model(x)"])
    place = patient.place_of(module)
    lines = [line, f"+ {patient.code(module)}(x)  # in the forward"]
    place.put(nn.Sequential(first, module))
    return lines


def gru(patient: Patient, remedy: Remedy) -> list[str]:
    """Put a GRU in the place of a plain recurrent network, that keeps most of its state at each step."""
    lines = []
    for module in patient.among(remedy, nn.RNN):
        options = {
            name: getattr(module, name)
            for name in ("num_layers", "bias", "batch_first", "dropout", "bidirectional")
            if getattr(module, name) != getattr(nn.GRU(1, 1), name)
        }
        first = module.weight_ih_l0
        new = nn.GRU(module.input_size, module.hidden_size, **options).to(first.device, first.dtype)
        place, size = patient.place_of(module), module.hidden_size
        spelt = patient.code_at(place)
        lines += [f"- {spelt} = torch.nn.{module}", f"+ {spelt} = torch.nn.{new}{like(f'{spelt}.weight_ih_l0', first)}"]
        if remedy.value is not None:
            for name, bias in new.named_parameters():
                if name.startswith("bias_"):
                    set_to = remedy.value if name.startswith("bias_ih") else 0.0
                    bias.data[size : 2 * size] = set_to
                    lines.append(f"+ {spelt}.{name}.data[{size}:{2 * size}] = {set_to:.3g}  # update gate")
        patient.added.append((new, module))
        place.put(new)
    return lines


def fewer_layers(patient: Patient, remedy: Remedy) -> list[str]:
    """Keep the first layers of a stack of recurrent ones."""
    kept, lines = int(remedy.value or 1), []
    for module in patient.among(remedy, nn.RNNBase):
        if type(module) not in (nn.RNN, nn.GRU, nn.LSTM) or module.num_layers <= kept or module.proj_size:
            continue
        options: dict[str, Any] = {"nonlinearity": module.nonlinearity} if isinstance(module, nn.RNN) else {}
        new = type(module)(
            module.input_size,
            module.hidden_size,
            num_layers=kept,
            bias=module.bias,
            batch_first=module.batch_first,
            dropout=module.dropout,
            bidirectional=module.bidirectional,
            **options,
        )
        weights = dict(module.named_parameters())
        for name, _ in list(new.named_parameters()):
            setattr(new, name, weights[name])
        place = patient.place_of(module)
        spelt = patient.code_at(place)
        lines += [
            f"+ kept = {spelt}.state_dict()",
            f"- {spelt} = torch.nn.{module}",
            f"+ {spelt} = torch.nn.{new}{like(f'{spelt}.weight_ih_l0', module.weight_ih_l0)}",
            f"+ {spelt}.load_state_dict({{name: kept[name] for name in {spelt}.state_dict()}})",
        ]
        place.put(new)
    if not lines:
        raise NotTried("there is no stack of layers in one module")
    return lines


def number_format(patient: Patient, remedy: Remedy) -> list[str]:
    """Keep weights and compute in another format."""
    to = torch.float32 if remedy.action == "float32" else torch.bfloat16
    low = [p for p in patient.model.parameters() if p.dtype in (torch.float16, torch.bfloat16) and p.dtype != to]
    if not low:
        now = next((str(p.dtype) for p in patient.model.parameters() if p.is_floating_point()), "no number format")
        raise NotTried(f"its weights are in {now}: in what is computed is chosen in the loop (torch.autocast)")
    patient.model.to(to)
    patient.changed += low
    return [f"+ model = model.to({to})"]
