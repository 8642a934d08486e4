"""Remedies that put other modules into a model: activations, normalization, ways around, another recurrence."""

from __future__ import annotations

import copy
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
    activations_after,
    followed_by,
)
from gradwatch.detectors.remedies import Remedy


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
    lines, replaced = list[str](), list[nn.Module]()
    # A clamp has no layer of its own, and may be named itself.
    layers = patient.among(remedy, (*LINEAR, *NORMALIZATIONS, *old))
    for layer in layers:
        found = [layer] if isinstance(layer, old) else list(activations_after(patient.model, layer, old))
        for module in found:
            if not any(module is known for known in replaced):
                lines += [
                    f"- {patient.code(module)} = torch.nn.{module}",
                    f"+ {patient.code(module)} = torch.nn.{new()}",
                ]
                replaced.append(module)
        if found and remedy.action == "relu" and isinstance(layer, LINEAR):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            lines.append(f'+ torch.nn.init.kaiming_normal_({patient.code(layer)}.weight, nonlinearity="relu")')
            patient.changed.append(cast(nn.Parameter, layer.weight))
    if not replaced:
        names = ", ".join(kind.__name__ for kind in old[:2])
        raise NotTried(
            f"its activation is none of the modules of the model ({names}): it is called in a forward",
            [f"+ x = torch.nn.functional.{ {nn.ReLU: 'relu', nn.LeakyReLU: 'leaky_relu', nn.Tanh: 'tanh'}[new] }(x)"],
        )
    for module in replaced:
        patient.replace(module, new())
    return lines


def normalize(patient: Patient, remedy: Remedy) -> list[str]:
    """Put a LayerNorm (of a convolution: over channels and positions) between each layer and its activation."""
    lines, seen = list[str](), list[nn.Module]()
    for layer in patient.among(remedy, LINEAR):
        known = followed_by(patient.model, layer)
        if known is None or not known[2] or not isinstance(known[2][0], ACTIVATIONS):
            seen.append(layer)
            continue
        own, after = _normalization(layer), known[2][0]
        lines.append(f"+ {patient.code(after)} = torch.nn.Sequential(torch.nn.{own}, torch.nn.{after})")
        patient.replace(after, nn.Sequential(own, after))
    if not lines:
        first = seen[0]
        name = patient.name_of(first)
        raise NotTried(
            f"what happens between {name} and what comes after it is code of a forward",
            [f"+ self.norm = torch.nn.{_normalization(first)}", f"+ x = self.norm(self.{name}(x))"],
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
        lines += [f"- {patient.code(module)} = torch.nn.{module}", f"+ {patient.code(module)} = torch.nn.Identity()"]
        patient.replace(module, nn.Identity())
    return lines


def skip(patient: Patient, remedy: Remedy) -> list[str]:
    """Lead a way around each layer that gives as many features as it takes, together with its activation."""
    lines: list[str] = []
    for layer in patient.among(remedy, LINEAR):
        known = followed_by(patient.model, layer)
        if known is None or not _keeps_its_shape(layer):
            continue
        owner, at, after = known
        inside: list[nn.Module] = [layer]
        for module in after:
            if not isinstance(module, (*ACTIVATIONS, *NORMALIZATIONS, nn.Dropout)):
                break
            inside.append(module)
        if len(inside) == 1:
            continue  # the last one: what it gives is the output
        where = patient.code(owner)
        mine = [f"{where}[{at + i}]" for i in range(len(inside))]
        lines = lines or [
            "+ class Skip(torch.nn.Sequential):",
            "+     def forward(self, x): return x + super().forward(x)",
        ]
        lines.append(f"+ {mine[0]} = Skip({', '.join(mine)})")
        lines += [f"+ {name} = torch.nn.Identity()" for name in mine[1:]]
        for module in inside[1:]:
            patient.replace(module, nn.Identity())
        patient.replace(layer, Skip(*inside))
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
    name = patient.name_of(module)
    if not name:
        raise NotTried("it is the model itself", ["+ x = (x - mean) / spread  # of each feature, before the model"])
    patient.replace(module, nn.Sequential(first, module))
    return [f"+ x = (x - mean) / spread  # of each feature, over the training data, before {patient.code(module)}"]


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
        spelt, size = patient.code(module), module.hidden_size
        lines += [f"- {spelt} = torch.nn.{module}", f"+ {spelt} = torch.nn.{new}"]
        if remedy.value is not None:
            for name, bias in new.named_parameters():
                if name.startswith("bias_"):
                    set_to = remedy.value if name.startswith("bias_ih") else 0.0
                    bias.data[size : 2 * size] = set_to
                    lines.append(f"+ {spelt}.{name}.data[{size}:{2 * size}] = {set_to:.3g}  # update gate")
        patient.replace(module, new)
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
            setattr(new, name, copy.deepcopy(weights[name]))
        lines += [f"- {patient.code(module)} = torch.nn.{module}", f"+ {patient.code(module)} = torch.nn.{new}"]
        patient.replace(module, new)
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
