"""How far back a model can see: one more pass through it, between two steps, of which nothing remains."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from gradwatch.model.forward_hooks import listening
from gradwatch.model.layers import named_modules
from gradwatch.model.nested import differentiable
from gradwatch.model.rerun import as_it_was, without_hooks
from gradwatch.timesteps.input_tap import InputTap
from gradwatch.timesteps.kinds import Fused, is_fused, kind_of
from gradwatch.timesteps.model_gain import ModelGain, Timesteps
from gradwatch.timesteps.recorder import Recorder
from gradwatch.timesteps.series import traces
from gradwatch.values.snapshot import Fact

_WRITES_TO_A_PIECE = (
    "the model cannot run on an input of which a derivative is taken: it writes to a piece of it that split, chunk or"
    " unbind gave, which no training notices, because inputs have no gradient there; write the result to a tensor of"
    " its own (x = x + 1 in place of x += 1), or give gradwatch.horizon the module after that"
)


def model_gain(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    timesteps: Timesteps = "auto",
    output: Callable[[Any], Any] | None = None,
    watched: nn.Module | None = None,
    on_cudnn: Sequence[Fused] | None = None,
) -> ModelGain:
    """Measure the gain by lag of a model on one batch.

    One forward pass, and one vector-Jacobian product by what enters its first sequence module. The model runs as the
    caller has it (its mode, autocast, devices), but without its hooks and not through what wraps it for several
    processes or for torch.compile. Afterwards it, its gradients and all random states are what they were; the caller's
    tensors are not written to.

    Args:
        model: what is run.
        args: its positional arguments.
        kwargs: its keyword arguments.
        timesteps: as for `gradwatch.horizon`.
        output: as for `gradwatch.horizon`.
        watched: the module that names are relative to, if that is not the model.
        on_cudnn: its recurrent modules that cuDNN runs; None: those whose weights are on CUDA devices.

    Raises:
        TypeError, ValueError: an argument, or what the model gave, is not what it should be.
        RuntimeError: the model cannot be run alone, or differentiated, or put back; the text says why. Also whatever
            the model raises.

    """
    model = core(model)
    tap = InputTap(named_modules(model if watched is None else _unwrapped(watched)), timesteps)
    with left_alone(model, on_cudnn) as notes:
        mine, keywords = tap.arguments(model, args, kwargs)
        with listening(tap.modules, tap.before, tap.after):
            try:
                with tap.axes:
                    returned = model(*mine, **keywords)
            except RuntimeError as error:
                if "is a view and is being modified inplace" in str(error):
                    raise RuntimeError(_WRITES_TO_A_PIECE) from error
                raise
            gain = tap.gain(returned, output)
    return dataclasses.replace(gain, note="; ".join([*filter(None, [gain.note]), *notes])) if notes else gain


def recurrence_facts(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], place: str, module: nn.Module
) -> tuple[Fact, ...]:
    """Measure, in one more pass, what makes a recurrent module forget; of another kind of module nothing is known.

    Args:
        model: as for `model_gain`.
        args: as for `model_gain`.
        kwargs: as for `model_gain`.
        place: name of the module.
        module: what that is.

    """
    model = core(model)
    if kind_of(module) is None:
        return ()
    recorder = Recorder("auto")
    recorder.arm({place: module}, compiled=False)

    def before(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return recorder.entered(module, args) or args, kwargs

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
        recorder.left(module, args, kwargs, output)

    with left_alone(model):
        with listening([module], before, after):
            model(*differentiable(args), **differentiable(dict(kwargs)))
        found = traces(recorder.targets.values(), torch.Generator(device="cpu").manual_seed(0))
    return tuple(
        f
        for trace in found
        for f in trace.measured({key: tensor.reshape(-1).tolist() for key, tensor in trace.tensors().items()})
    )


@contextlib.contextmanager
def left_alone(model: nn.Module, on_cudnn: Sequence[Fused] | None = None) -> Iterator[list[str]]:
    """Let a model run with gradients, without its hooks, and leave it as it was; yield what that changed, in words.

    Args:
        model: out of what wraps it, as `core` gives it.
        on_cudnn: as for `model_gain`.

    """
    with (
        as_it_was(model),
        without_hooks(model),
        _runnable(model, _on_cuda(model) if on_cudnn is None else on_cudnn) as notes,
        torch.inference_mode(mode=False),
        torch.enable_grad(),
    ):
        yield notes


def core(model: nn.Module) -> nn.Module:
    """Take a model out of its wrappers, and refuse what cannot be run alone."""
    model = _unwrapped(model)
    reason = next((said for module in model.modules() if (said := _waits(module))), None)
    if reason is None and any(
        hasattr(p, "placements") or getattr(p, "_fsdp_flattened", False) for p in model.parameters()
    ):
        reason = "its parameters are spread over several (DTensor or FSDP)"
    if reason is not None:
        raise RuntimeError(f"the model cannot be run by one process alone: {reason}")
    return model


def _unwrapped(model: nn.Module) -> nn.Module:
    """Take off what wraps a model for several processes or devices, or for torch.compile."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def _waits(module: nn.Module) -> str | None:
    """Say why a pass through this module would wait for other processes, if it would."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # imported by whoever uses it
    if any(
        isinstance(module, kind)
        for name in ("FullyShardedDataParallel", "FSDPModule")
        if (kind := getattr(fsdp, name, None)) is not None
    ):
        return "its parameters are spread over several (FSDP)"
    if isinstance(module, nn.parallel.DistributedDataParallel):
        return "a part of it is wrapped in DistributedDataParallel"
    if isinstance(module, nn.SyncBatchNorm) and module.training and _several():
        return "SyncBatchNorm in training mode averages over several"
    return None


def _several() -> bool:
    known = torch.distributed.is_available() and torch.distributed.is_initialized()
    return known and torch.distributed.get_world_size() > 1


@contextlib.contextmanager
def _runnable(model: nn.Module, on_cudnn: Sequence[Fused]) -> Iterator[list[str]]:
    """Work around two limits of cuDNN's recurrent networks, and yield what that changed, in words.

    In eval mode cuDNN has no backward pass for them: torch's own kernels do. In training mode nobody can save the
    random state of its dropout, and it is drawn anew where torch's own state is written: all dropout is left out then.
    `as_it_was` gives it back.
    """
    notes: list[str] = []
    enabled = torch.backends.cudnn.enabled
    random = [m for m in on_cudnn if m.training and m.dropout > 0]
    if enabled and random:
        notes.append(
            "it was measured without dropout, because cuDNN keeps the random state of recurrent dropout to itself"
        )
        for recurrence in random:
            recurrence.dropout = 0.0
        for module in model.modules():
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.training = False
    try:
        if any(not m.training for m in on_cudnn):
            torch.backends.cudnn.enabled = False
        yield notes
    finally:
        torch.backends.cudnn.enabled = enabled


def _on_cuda(model: nn.Module) -> list[Fused]:
    """Return the recurrent modules that cuDNN runs."""
    return [m for m in model.modules() if is_fused(m) and any(p.is_cuda for p in m.parameters())]
