"""Every optimizer class of the libraries that are there, found in them, and how it is made and called."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import nn

from benchmarks.optimizers import loops
from benchmarks.optimizers.training import Case

STEPS_OF_A_RUN = 150

LOOPS = {
    "SparseAdam": loops.sparse,
    "AliG": loops.closure_that_knows,
    "WSAM": loops.closure,
    "SAMWrapper": loops.closure,
    "MSAMLaProp": loops.closure,
    "SAM": loops.closure_after_backward,
    "BSAM": loops.closure_after_backward,
    "FriendlySAM": loops.closure_after_backward,
    "LookSAM": loops.closure_after_backward,
    "GSAM": loops.inner_closure,
    "PCGrad": loops.projected,
    "LOMO": loops.fused_backward,
    "AdaLOMO": loops.fused_backward,
    "Lomo": loops.fused_backward,
    "AdaLomo": loops.fused_backward,
}
"""How a class is called whose signature does not tell."""
MIXES = ("GSAM", "LookSAM", "OrthoGrad", "SAMWrapper")
"""Classes that step with another gradient than that of one backward pass; and all that have two steps."""
SECOND_ORDER = ("AdaHessian", "SophiaH")
DISTRIBUTED = ("DeMo", "DistributedMuon")
LEFT_OUT = {
    "SafeFP16Optimizer": "keeps master weights, which are no parameters of the model: gradwatch refuses it",
}


def cases(libraries: Iterable[str]) -> tuple[list[Case], list[str]]:
    """Return the cases of the libraries that are there, and a line for each that is not, or that is left out."""
    found, missing = [], []
    for library in libraries:
        module, of_module = LIBRARIES[library]
        try:
            imported = importlib.import_module(module)
        except ImportError as error:
            missing.append(f"{library}: left out ({error})")
            continue
        every = list(of_module(library, imported))
        found += [case for case in every if case.name not in LEFT_OUT]
        missing += [f"{library} {case.name}: {LEFT_OUT[case.name]}" for case in every if case.name in LEFT_OUT]
    return found, missing


def classes(module: ModuleType) -> list[type]:
    """Return the optimizer classes that a library has of its own."""
    package = module.__name__.partition(".")[0] if module is not torch.optim else module.__name__
    return [
        kind
        for _, kind in sorted(vars(module).items())
        if inspect.isclass(kind)
        and kind is not torch.optim.Optimizer
        and callable(getattr(kind, "step", None))
        and callable(getattr(kind, "zero_grad", None))
        and f"{kind.__module__}.".startswith(f"{package}.")
    ]


def required(function: Callable[..., Any]) -> list[str]:
    """Return the names of the arguments that have no default."""
    return [
        p.name
        for p in inspect.signature(function).parameters.values()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.name != "self"
    ]


def made(kind: type, model: nn.Module, rate: float | None) -> Any:
    """Make an optimizer, with what its constructor cannot do without."""
    arguments: dict[str, Callable[[], Any]] = {
        "params": lambda: parameters_of(kind, model),
        "model": lambda: model,
        "lr": lambda: rate,
        "optimizer": lambda: torch.optim.AdamW(model.parameters()),
        "base": lambda: torch.optim.SGD(model.parameters(), lr=0.1),
        "base_optimizer": lambda: (
            torch.optim.SGD(model.parameters()) if "rho_scheduler" in required(kind) else torch.optim.SGD
        ),
        "rho_scheduler": lambda: SimpleNamespace(step=lambda: 0.05),
        "num_iterations": lambda: STEPS_OF_A_RUN,
        "num_data": lambda: 10**6,
        "specs": lambda: [
            {"params": some, "optimizer": importlib.import_module("heavyball").AdamW} for some in by_dimensions(model)
        ],
    }
    return kind(**{name: arguments[name]() for name in required(kind)})


def parameters_of(kind: type, model: nn.Module) -> list[Any]:
    """Return a model's parameters, in the groups that a class wants."""
    matrices, others = by_dimensions(model)
    if takes_matrices(kind):
        return matrices
    if ".muon." not in kind.__module__:
        return list(model.parameters())
    return [{"params": matrices, "use_muon": True}, {"params": others, "use_muon": False}]


def takes_matrices(kind: type) -> bool:
    """Tell whether a class refuses all but matrices, so that another optimizer has to step the rest."""
    return kind.__name__ == "SpectralSphere" or (kind.__name__ == "Muon" and kind.__module__.startswith("torch."))


def by_dimensions(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return a model's matrices, and its other parameters."""
    every = list(model.parameters())
    return [p for p in every if p.ndim == 2], [p for p in every if p.ndim != 2]


def case_of(library: str, kind: type) -> Case:
    """Return the case of a class: how it is called is seen by what it has, or stands in a table."""
    loop = LOOPS.get(kind.__name__) or (loops.closure if "closure" in required(kind.step) else loops.plain)
    beside = takes_matrices(kind)

    def make(model: nn.Module, rate: float | None) -> list[Any]:
        return [made(kind, model, rate), *([torch.optim.AdamW(by_dimensions(model)[1])] if beside else [])]

    return Case(
        library,
        f"{kind.__name__} and AdamW" if beside else kind.__name__,
        make,
        loop,
        needs_rate="lr" in required(kind),
        in_backward=loop is loops.fused_backward,
        calls_backward=loop is loops.inner_closure,
        mixes=kind.__name__ in MIXES or hasattr(kind, "second_step"),
        second_order=kind.__name__ in SECOND_ORDER,
        distributed=kind.__name__ in DISTRIBUTED,
    )


def of_library(library: str, module: ModuleType) -> Iterator[Case]:
    """Return a case for each class, and two more for each that can be called in two steps."""
    for kind in classes(module):
        case = case_of(library, kind)
        yield case
        if hasattr(kind, "second_step") and not hasattr(kind, "third_step"):
            for word, loop in (("two calls", loops.two_calls), ("two calls, read", loops.two_calls_and_reading)):
                yield Case(library, f"{kind.__name__}, {word}", case.make, loop, mixes=True)


def of_torch_distributed(library: str, module: ModuleType) -> Iterator[Case]:
    """Return what steps in backward, and what wraps an optimizer; no process group is needed."""

    def applied(kind: type, options: dict[str, float]) -> Callable[[nn.Module, float | None], list[Any]]:
        def make(model: nn.Module, _rate: float | None) -> list[Any]:
            module._apply_optimizer_in_backward(kind, model.parameters(), options)
            return module._get_in_backward_optimizers(model)

        return make

    def averaged(model: nn.Module, _rate: float | None) -> list[Any]:
        calls = iter(range(10**9))

        def average(params: list[dict[str, Any]]) -> None:
            if next(calls) % 4 == 3:  # the other process has weights that are smaller
                torch._foreach_mul_([p.detach() for group in params for p in group["params"]], 0.99)

        averager = SimpleNamespace(average_parameters=average, step=0)
        return [module.PostLocalSGDOptimizer(torch.optim.SGD(model.parameters(), lr=0.01), averager)]

    def named(model: nn.Module, _rate: float | None) -> list[Any]:
        optimizer = module._NamedOptimizer(model.named_parameters(), torch.optim.AdamW, lr=1e-3)
        optimizer.zero_grad = model.zero_grad  # its own misses what `Optimizer.__init__` makes
        return [optimizer]

    for kind, options in ((torch.optim.SGD, {"lr": 0.01, "momentum": 0.9}), (torch.optim.AdamW, {"lr": 1e-3})):
        name = f"apply_optimizer_in_backward, {kind.__name__}"
        yield Case(library, name, applied(kind, options), loops.in_backward, in_backward=True)
    yield Case(library, "PostLocalSGDOptimizer", averaged, loops.plain)
    yield Case(library, "_NamedOptimizer", named, loops.plain)


def of_optimi(library: str, module: ModuleType) -> Iterator[Case]:
    """Return each class, plainly and with gradient release."""

    def released(kind: type) -> Callable[[nn.Module, float | None], list[Any]]:
        def make(model: nn.Module, rate: float | None) -> list[Any]:
            optimizer = kind(model.parameters(), lr=rate, gradient_release=True)
            module.prepare_for_gradient_release(model, optimizer, ignore_existing_hooks=True)
            return [optimizer]

        return make

    for kind in classes(module):
        yield case_of(library, kind)
        name = f"{kind.__name__}, gradient release"
        yield Case(library, name, released(kind), loops.in_backward, needs_rate=True, in_backward=True)


def of_heavyball(library: str, module: ModuleType) -> Iterator[Case]:
    """Return each class, uncompiled."""
    module.utils.compile_mode = None
    yield from (case for case in of_library(library, module) if not case.name.endswith("Base"))


LIBRARIES: dict[str, tuple[str, Callable[[str, ModuleType], Iterator[Case]]]] = {
    "torch.optim": ("torch.optim", of_library),
    "torch.distributed": ("torch.distributed.optim", of_torch_distributed),
    "pytorch-optimizer": ("pytorch_optimizer", of_library),
    "schedulefree": ("schedulefree", of_library),
    "torch-optimi": ("optimi", of_optimi),
    "lomo-optim": ("lomo_optim", of_library),
    "heavyball": ("heavyball", of_heavyball),
}
"""How each is imported, and its cases."""
