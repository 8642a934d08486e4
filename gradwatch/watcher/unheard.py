"""What is heard of a training while its watcher hears no step: until the first one comes, and not longer."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from gradwatch.measurement.columns import WEIGHT
from gradwatch.measurement.model_map import ModelMap
from gradwatch.measurement.norms import plain
from gradwatch.measurement.parameters import Parameters, undisturbed
from gradwatch.measurement.transfer import Transfer
from gradwatch.values.snapshot import Silence
from gradwatch.values.thresholds import STEPLESS
from gradwatch.watcher.silent_steps import changed


class Unheard:
    """Counts losses, readings, and steps of optimizers that are not watched, and calls back when they are worth a word.

    The hook on all optimizers goes with the first step that is heard, or with the watcher.
    """

    def __init__(
        self,
        model_map: ModelMap,
        optimizers: Collection[object],
        patience: int,
        guard: Callable[..., object],
        tell: Callable[[], object],
    ) -> None:
        """Begin to listen.

        Args:
            model_map: of the model.
            optimizers: those that are watched.
            patience: steps of others that are worth a word.
            guard: the watcher's, which calls its first argument with the others and keeps every failure out of the
                training. One that waits to be called is kept until it knows better.
            tell: the watcher's, which is called at most once.

        """
        self._model_map, self._patience = model_map, patience
        self._guard, self._tell = (_weakly(guard), _weakly(tell)) if optimizers else (guard, tell)
        self._own = {id(optimizer) for optimizer in optimizers}
        self.listening = self.hooked = True
        """Whether there is no step yet, and nobody has been told; whether the hook is there, which may stay longer."""
        self._read = False
        """Whether the readings are the steps, because no optimizer is watched."""
        self._told, self._others, self._by = 0, 0, ""
        self._weights: Mapping[int, float] = {}
        me = weakref.ref(self)

        def stepped(optimizer: Any, *_: object) -> None:  # noqa: ANN401
            if not torch.compiler.is_compiling() and (listener := me()) is not None and listener.listening:
                listener._guard(listener._stepped, optimizer)

        self._stop = weakref.finalize(self, register_optimizer_step_post_hook(stepped).remove)

    def join(self, optimizers: Collection[object]) -> None:
        """Take these for watched too."""
        self._own.update(map(id, optimizers))

    def end(self) -> None:
        """Listen no more: a step has come, or nobody wants to know."""
        self.listening = self.hooked = False
        self._stop()
        self._guard = self._tell = _nothing

    def close(self) -> None:
        """Tell what there is to tell at the end."""
        if self.listening and self._told >= self._patience:
            self._say()

    def told(self, *, read: bool = False) -> None:
        """Take note of a loss, or of gradients that were `read`."""
        if not self.listening:
            self.end()
            return
        self._read = self._read or (read and not self._own)
        self._told += 1
        if self._told == self._patience:
            self._weights = self._weigh()
        elif self._told == STEPLESS:
            self._say()

    def _stepped(self, optimizer: Any) -> None:  # noqa: ANN401
        if id(optimizer) in self._own:  # a step, be it measured or not
            self.listening = False
        elif any(p in self._model_map for group in optimizer.param_groups for p in group["params"]):
            self._others, self._by = self._others + 1, type(optimizer).__name__
            if self._read:
                self.listening = False
            elif self._others == self._patience:
                self._say()

    def _say(self) -> None:
        self.listening = False
        if not self._read or self.silence.moved is False:
            self._tell()

    @property
    def silence(self) -> Silence:
        """What was heard."""
        if self._by:
            return Silence(0, 0, moved=None, told=self._others, by=self._by)
        twice = bool(self._weights) and self._told > self._patience
        moved = changed(self._weights, self._weigh()) if twice else None
        model = self._model_map.model
        bad = model is not None and not finite(p.grad for p in model.parameters())
        return Silence(0, 0, moved=moved, told=self._told, nonfinite=bad)

    def _weigh(self) -> Mapping[int, float]:
        transfer = Transfer()
        measured = Parameters(self._model_map.info, transfer, probe=False)
        every = [p for p in self._model_map.parameters(None) if p in self._model_map]
        with undisturbed():
            measured.weights(self._model_map.columns(map(id, every)), every)
        transfer.run()
        return measured.numbers().get(WEIGHT, {})


def finite(gradients: Iterable[Tensor | None]) -> bool:
    """Tell whether gradients are finite, as far as that can be asked of them."""
    with undisturbed():
        return all(bool(torch.isfinite(plain(g)).all()) for g in gradients if g is not None)


def _nothing(*_: object) -> None:
    pass


def _weakly(method: Callable[..., object]) -> Callable[..., object]:
    """Return what calls a method as long as its object is there."""
    held = weakref.WeakMethod(method)

    def call(*args: object) -> object:
        return None if (alive := held()) is None else alive(*args)

    return call
