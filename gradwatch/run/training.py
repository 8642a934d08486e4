"""The watchers of `gradwatch run`: one for each model that an optimizer comes to step, told the losses that go back."""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradwatch.run.imports import when_imported
from gradwatch.values.configuration import Configuration

if TYPE_CHECKING:
    from torch import Tensor, nn

    from gradwatch.watcher.losses import Losses
    from gradwatch.watcher.watcher import Watcher

_MOST = 50
"""Models that are watched in one process: a search over networks may train thousands."""
_MOST_OPTIMIZERS = 8
"""Optimizers of one run: where each round of a training makes a new one, another run begins and the old ones can go."""


class Training:
    """What a program trains. Of torch nothing is touched before the program has imported it."""

    def __init__(
        self, logdir: str, *, horizon: int | None, every: int | None, settings: Configuration | None = None
    ) -> None:
        """Wait for torch.

        Args:
            logdir: as for `gradwatch.watch`.
            horizon: as for `gradwatch.watch`.
            every: steps from one that is measured to the next.
            settings: thresholds, and what is muted.

        """
        self._settings = Configuration() if settings is None else settings
        self.logdir = str(Path(logdir).absolute())  # the program may go elsewhere
        self._horizon, self._every = horizon, every
        self._watching: list[tuple[Watcher, int]] = []
        """The watchers, each with the thread that trains its model."""
        self.folders: list[Path] = []
        """Those of the watchers, as far as they have one."""
        self.backwards = 0
        """Backward passes that a loss began."""
        self.beyond = 0
        """Models beyond those that are watched."""
        self._seen: dict[int, weakref.ref[Any]] = {}
        """Optimizers, by `id`: not all of them have a hash."""
        self._witnesses: dict[int, tuple[int, weakref.ref[Tensor]]] = {}
        """By optimizer, by `id`, the thread in which it stepped last, and a parameter that had a gradient then."""
        self._names: dict[str, int] = {}
        self._losses: dict[int, Losses] = {}
        """By thread."""
        self.pid = os.getpid()
        self.first: Callable[[], object] = lambda: None
        """Called when something is made that will be closed at the exit."""
        self._failed = False
        when_imported("torch", self._install)

    def _install(self) -> None:
        import torch
        from torch.autograd.graph import GradientEdge
        from torch.optim.optimizer import register_optimizer_step_pre_hook

        backward = torch.autograd.backward

        @functools.wraps(backward)
        def watched(tensors: Any, grad_tensors: Any = None, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
            if not isinstance(tensors, torch.Tensor | GradientEdge | Sequence):  # it can be read only once
                tensors = tuple(tensors)
            if grad_tensors is not None and not isinstance(grad_tensors, torch.Tensor | Sequence):
                grad_tensors = tuple(grad_tensors)
            self._guarded(self._before_backward, tensors, grad_tensors)
            backward(tensors, grad_tensors, *args, **kwargs)

        torch.autograd.backward = watched
        handle = register_optimizer_step_pre_hook(self._before_step)

        def hide() -> None:
            """Keep what is ours out of what is compiled, once anything can be."""
            untraced: Any = torch.compiler.disable
            if torch.autograd.backward is watched:  # and not the program's own
                torch.autograd.backward = untraced(watched)
            handle.remove()
            register_optimizer_step_pre_hook(untraced(self._before_step))

        when_imported("torch._dynamo", hide)

    def _guarded(self, act: Callable[..., object], *args: Any) -> None:  # noqa: ANN401
        """Keep every failure of ours out of the program; a forked child is none of ours."""
        if self._failed or os.getpid() != self.pid:
            return
        try:
            act(*args)
        except Exception as error:  # noqa: BLE001  (whatever a program holds)
            self._failed = True
            say(f"watching is switched off: {type(error).__name__}: {error}")

    # --- the losses ---

    def _before_backward(self, tensors: Any, grad_tensors: Any) -> None:  # noqa: ANN401  (torch's own arguments)
        import torch

        if torch._C._current_graph_task_id() != -1:  # reentrant checkpointing
            return
        given = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
        weights = [grad_tensors] if grad_tensors is None or isinstance(grad_tensors, torch.Tensor) else grad_tensors
        self.backwards += 1
        here = threading.get_ident()
        for watcher, thread in self._watching:
            if thread == here:
                watcher.end_sweeps()
        if len(weights) not in (1, len(given)):
            return
        if any(not isinstance(loss, torch.Tensor) or loss.numel() != 1 for loss in given):
            return
        losses = self._told()
        if self._thrown_away():
            losses.clear()
        for watcher, thread in self._watching:
            for loss in given if thread == here else ():
                watcher.look_at(loss)
        for loss, weight in zip(given, [*weights, *[None] * (len(given) - len(weights))], strict=True):
            value = loss.detach().reshape(())
            losses.record(value if weight is None else value * weight.detach().reshape(()))

    def _told(self) -> Losses:
        """Return what is told in this thread: another's losses are of other steps."""
        here = threading.get_ident()
        if here not in self._losses:
            from gradwatch.watcher.losses import Losses

            self._losses[here] = Losses(raw=True)
        return self._losses[here]

    def _thrown_away(self) -> bool:
        """Tell whether the gradients of what was told before are gone: of those that stepped last none is there."""
        here = threading.get_ident()
        known = [p for thread, held in self._witnesses.values() if thread == here and (p := held()) is not None]
        return bool(known) and all(p.grad is None for p in known)

    # --- the models ---

    def _before_step(self, optimizer: Any, _args: object, _kwargs: object) -> None:  # noqa: ANN401
        self._guarded(self._hear, optimizer)

    def _hear(self, optimizer: Any) -> None:  # noqa: ANN401
        seen = self._seen.get(id(optimizer))
        if seen is None or seen() is not optimizer:
            self._meet(optimizer)
        parameters = (p for group in optimizer.param_groups for p in group["params"])
        if (witness := next((p for p in parameters if p.grad is not None), None)) is not None:
            self._witnesses[id(optimizer)] = threading.get_ident(), weakref.ref(witness)

    def _meet(self, optimizer: Any) -> None:  # noqa: ANN401
        from gradwatch.model.optimizers import all_of, parameters_of, unwrap
        from gradwatch.watcher.watch import watched

        self._seen.update((id(one), weakref.ref(one)) for one in (optimizer, *all_of(optimizer)))
        parameters = parameters_of(unwrap(optimizer))
        if not parameters or watched(optimizer):
            return
        self._watching = [(w, thread) for w, thread in self._watching if w.model is not None or w.close() is None]
        for watcher, _ in self._watching:
            model = watcher.model
            if model is not None and {id(p) for p in model.parameters()}.issuperset(map(id, parameters)):
                if len(watcher.report.snapshot.model.optimizers) < _MOST_OPTIMIZERS:
                    watcher.join(self._as_part(optimizer, model))
                    return
                watcher.close()
        if (model := self._model_of(parameters, optimizer)) is not None:
            self._watch(model, optimizer)

    def _model_of(self, parameters: list[Tensor], optimizer: Any) -> nn.Module | None:  # noqa: ANN401
        from gradwatch.run.search import held_by_modules, model_of

        if "deepspeed" in sys.modules and not held_by_modules(parameters):
            say(
                f"{type(optimizer).__name__} steps {len(parameters)} flat tensor(s) that no module holds, as ZeRO of"
                " DeepSpeed makes them: gradients by layer are not to be seen there, and it is not watched"
            )
            return None
        if len(self.folders) >= _MOST:
            self.beyond += 1
            return None
        return model_of(parameters, optimizer)

    def _as_part(self, optimizer: Any, model: nn.Module) -> Any:  # noqa: ANN401
        """Return an optimizer of one parameter among many as a sweep that others may come to."""
        from gradwatch.model.optimizers import Sweep, parameters_of, unwrap

        inner = unwrap(optimizer)
        alone = len(parameters_of(inner)) == 1 < sum(p.requires_grad for p in model.parameters())
        return Sweep([inner], grows=True) if alone else optimizer

    def _watch(self, model: nn.Module, optimizer: Any) -> None:  # noqa: ANN401
        from gradwatch.measurement.processes import own_name
        from gradwatch.model.layers import named_modules
        from gradwatch.sinks.run_directory import RunDirectory
        from gradwatch.watcher.options import Options
        from gradwatch.watcher.watch import close_earlier, remember
        from gradwatch.watcher.watcher import Watcher

        kind = type(named_modules(model)[""]).__name__
        count = self._names[kind] = self._names.get(kind, 0) + 1
        options = Options(
            name=kind if count == 1 else f"{kind}-{count}",
            every_n_steps=self._every,
            horizon=self._horizon,
            thresholds=self._settings.thresholds,
            ignore=self._settings.ignore,
        )
        close_earlier(model)
        directory = RunDirectory(self.logdir, own_name(options.name), free=gc.collect)
        watcher = Watcher(model, [self._as_part(optimizer, model)], options, directory=directory, losses=self._told())
        remember(watcher)
        if _of_several_processes(model):
            watcher.wait_for_others()
        self._watching.append((watcher, threading.get_ident()))
        self.folders.append(directory.path)
        self.first()

    # --- the end ---

    def problems(self) -> list[str]:
        """Say why there is less to see than one would expect."""
        found = []
        if self.beyond:
            found.append(f"{self.beyond} further models were not watched: {_MOST} are, in one process")
        if self._failed or self.folders or self._seen:
            return found
        if self.backwards:
            others = ", ".join(sorted(_others())) or "nothing that looks like an optimizer is there any more"
            found.append(
                f"{self.backwards} backward passes were made and no optimizer of torch has stepped. There is: {others}."
                " For a library with an optimizer of its own docs/trainers.md has the lines; else call"
                " gradwatch.watch(model), and watcher.step() after each backward()"
            )
        else:
            found.append(
                "nothing was trained here: "
                + (
                    "no backward() was called, and no optimizer of torch has stepped"
                    if "torch" in sys.modules
                    else "torch was not imported"
                )
                + ("; what other processes do is not seen: call gradwatch.watch in them" if _had_children() else "")
            )
        return found

    def close(self) -> None:
        """Close the watchers."""
        for watcher, _ in self._watching:
            self._guarded(watcher.close)


def _of_several_processes(model: nn.Module) -> bool:
    """Tell whether other processes train the same: then all watch, and one speaks."""
    kinds = {base.__name__ for module in model.modules() for base in type(module).__mro__}
    return not kinds.isdisjoint(("DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule"))


def _had_children() -> bool:
    """Tell whether there are or have been other processes that may have trained something."""
    if "ray" in sys.modules:
        return True
    try:
        import resource
    except ImportError:  # not on Windows
        return "multiprocessing.process" in sys.modules or "subprocess" in sys.modules
    if resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss:  # of those that have ended
        return True
    if not hasattr(os, "waitid"):
        return False
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def _others() -> set[str]:
    """Return the classes of what acts like an optimizer and is none of torch's; else scipy, which fits by functions."""
    kinds = {type(o) for o in gc.get_objects()}
    found = {
        f"{kind.__module__}.{kind.__qualname__}"
        for kind in kinds
        if any("Optimizer" in base.__name__ for base in kind.__mro__)
        and kind.__module__.partition(".")[0] not in ("torch", "gradwatch")
    }
    return found or ({"scipy.optimize"} if "scipy.optimize" in sys.modules else set())


def say(message: str) -> None:
    """Tell the user something, where there is anybody to hear it, and leave what the program prints to the program."""
    if sys.stderr is not None:
        with contextlib.suppress(Exception):
            print(f"gradwatch: {message}", file=sys.stderr)  # noqa: T201  (a command line prints)
