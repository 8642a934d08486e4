"""The watchers of `gradwatch run`: one for each model that an optimizer comes to step, told the losses that go back."""

from __future__ import annotations

import functools
import gc
import os
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradwatch.run.imports import when_imported

if TYPE_CHECKING:
    from torch import Tensor, nn

    from gradwatch.watcher.losses import Losses
    from gradwatch.watcher.watcher import Watcher

_MOST = 50
"""Models that are watched in one process: a search over networks may train thousands."""


class Training:
    """What a program trains. Of torch nothing is touched before the program has imported it."""

    def __init__(self, logdir: str, *, horizon: int | None, every: int | None) -> None:
        """Wait for torch.

        Args:
            logdir: as for `gradwatch.watch`.
            horizon: as for `gradwatch.watch`.
            every: steps from one that is measured to the next.

        """
        self.logdir, self._horizon, self._every = logdir, horizon, every
        self.watchers: list[Watcher] = []
        self.folders: list[Path] = []
        """Those of the watchers, as far as they have one."""
        self.backwards = 0
        """Backward passes that a loss began."""
        self.steps_alone = 0
        """Optimizers that step what can be named by nobody."""
        self.beyond = 0
        """Models beyond those that are watched."""
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()
        self._names: dict[str, int] = {}
        self._losses: Losses | None = None
        self._pid = os.getpid()
        self._failed = False
        when_imported("torch", self._install)

    def _install(self) -> None:
        import torch
        from torch.optim.optimizer import register_optimizer_step_pre_hook

        backward = torch.autograd.backward

        @functools.wraps(backward)
        def watched(*args: Any, **kwargs: Any) -> None:  # noqa: ANN401
            self._guarded(self._before_backward, *args, **kwargs)
            backward(*args, **kwargs)

        torch.autograd.backward = watched
        register_optimizer_step_pre_hook(torch.compiler.disable(self._before_step))  # type: ignore[no-untyped-call]

    def _guarded(self, act: Callable[..., object], *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Keep every failure of ours out of the program; a forked child is none of ours."""
        if self._failed or os.getpid() != self._pid:
            return
        try:
            act(*args, **kwargs)
        except Exception as error:  # noqa: BLE001  (whatever a program holds)
            self._failed = True
            say(f"watching is switched off: {type(error).__name__}: {error}")

    # --- the losses ---

    def _before_backward(
        self,
        tensors: Any = (),  # noqa: ANN401  (torch's own signature)
        grad_tensors: Any = None,  # noqa: ANN401
        *_: object,
        **__: object,
    ) -> None:
        import torch

        if torch._C._current_graph_task_id() != -1:  # reentrant checkpointing
            return
        given = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
        weights = [grad_tensors] if grad_tensors is None or isinstance(grad_tensors, torch.Tensor) else grad_tensors
        self.backwards += 1
        for watcher in self.watchers:
            watcher.end_sweeps()
        if any(loss.numel() != 1 for loss in given) or len(weights) not in (1, len(given)):
            return
        losses = self._told()
        if not self._has_gradient():  # that of what was told before has been thrown away
            losses.clear()
        for loss, weight in zip(given, [*weights, *[None] * (len(given) - len(weights))], strict=True):
            value = loss.detach().reshape(())
            losses.record(value if weight is None else value * weight.detach().reshape(()))

    def _told(self) -> Losses:
        if self._losses is None:
            from gradwatch.watcher.losses import Losses

            self._losses = Losses(raw=True)
        return self._losses

    def _has_gradient(self) -> bool:
        models = [model for watcher in self.watchers if (model := watcher.model) is not None]
        return not models or any(p.grad is not None for model in models for p in model.parameters())

    # --- the models ---

    def _before_step(self, optimizer: Any, _args: object, _kwargs: object) -> None:  # noqa: ANN401
        if optimizer not in self._seen:
            self._guarded(self._meet, optimizer)

    def _meet(self, optimizer: Any) -> None:  # noqa: ANN401
        from gradwatch.model.optimizers import all_of, parameters_of, unwrap
        from gradwatch.watcher.watch import watched

        self._seen.update(all_of(optimizer))
        parameters = parameters_of(unwrap(optimizer))
        if not parameters or watched(optimizer):
            return
        self.watchers = [w for w in self.watchers if w.model is not None or w.close() is None]
        for watcher in self.watchers:
            model = watcher.model
            if model is not None and {id(p) for p in model.parameters()}.issuperset(map(id, parameters)):
                watcher.join(self._as_part(optimizer, model))
                return
        if (model := self._model_of(parameters, optimizer)) is not None:
            self._watch(model, optimizer)

    def _model_of(self, parameters: list[Tensor], optimizer: Any) -> nn.Module | None:  # noqa: ANN401
        from gradwatch.run.search import held_by_modules, model_of

        if "deepspeed" in sys.modules and not held_by_modules(parameters):
            self.steps_alone += 1
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
            name=kind if count == 1 else f"{kind}-{count}", every_n_steps=self._every, horizon=self._horizon
        )
        close_earlier(model)
        directory = RunDirectory(self.logdir, own_name(options.name), free=gc.collect)
        watcher = Watcher(model, [self._as_part(optimizer, model)], options, directory=directory, losses=self._told())
        remember(watcher)
        watcher.wait_for_others()
        self.watchers.append(watcher)
        self.folders.append(directory.path)

    # --- the end ---

    def problems(self) -> list[str]:
        """Say why there is less to see than one would expect."""
        if os.getpid() != self._pid:
            return []
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
            elsewhere = [name for name in ("ray", "multiprocessing.process", "subprocess") if name in sys.modules]
            found.append(
                "nothing was trained here"
                + (", and what other processes do is not seen: call gradwatch.watch in them" if elsewhere else "")
            )
        return found

    def close(self) -> None:
        """Close the watchers."""
        for watcher in self.watchers:
            self._guarded(watcher.close)


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
    """Tell the user something, and leave what the program prints to the program."""
    print(f"gradwatch: {message}", file=sys.stderr)  # noqa: T201  (a command line prints)
