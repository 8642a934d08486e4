"""Several processes that train one model: who speaks for it, and how the numbers of its pieces come together."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import secrets
import time
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch.distributed as dist

from gradwatch.measurement.columns import RAW, Numbers
from gradwatch.values.plain import from_json, to_json

_PATIENCE = 10.0
"""Seconds that another process may be late; it has taken part in the same backward pass."""
_KEPT = 2
"""Messages of one process that may lie unread."""

_here: weakref.WeakSet[Processes] = weakref.WeakSet()
"""Those of this process, until they leave."""


class Processes:
    """The processes that watch one model, each with a copy or with pieces of it.

    The lowest rank that watches a model of these names, nearly always 0, speaks for the others. They send it the
    numbers of their pieces, through the store by which the process group was set up: nobody but the speaker ever waits,
    and it not for long, so that a process that does not watch, fails or leaves can stop nothing. A collective could not
    promise that.
    """

    def __init__(self, names: Iterable[str], *, alone: bool = False) -> None:
        """Take the names of the parameters; with `alone`, seek nobody."""
        digest = hashlib.sha1("\n".join(names).encode(), usedforsecurity=False).hexdigest()
        taken = {other._key for other in _here}
        self._key: str = next(key for k in itertools.count() if (key := f"gradwatch/{digest}/{k}") not in taken)
        self._token = secrets.token_hex(8)
        """The speaker's, so that what was sent to an earlier one is not taken for new."""
        self._store: Any = None
        self._sent: list[str] = []
        self.alone: str | None = None
        """Why the others' numbers are not to be had."""
        self._met = False
        """Whether the others' numbers have been had."""
        self._silent: bool | None = False if alone else None
        self.rank = 0
        if not alone:
            _here.add(self)
        self._meet()
        self._late = self._store is None
        """Whether the others perhaps come after this one."""

    def _meet(self) -> None:
        if (
            self._silent is False
            or self._store is not None
            or not dist.is_available()
            or not dist.is_initialized()
            or dist.get_world_size() == 1
        ):
            return
        self.rank = dist.get_rank()
        with contextlib.suppress(Exception):  # of MPI there is none
            store = dist.distributed_c10d._get_default_store()
            store.set(f"{self._key}/{self.rank}", self._token)
            store.check([f"{self._key}/{self.rank}"])  # `set` waits for no answer, and another process might ask before
            self._store = store

    @property
    def silent(self) -> bool:
        """Whether another process speaks for this one; settled when it is first asked for."""
        if self._silent is None:
            self._meet()
            lower = range(self.rank) if self._store is not None else ()
            speaker = next((rank for rank in lower if self._store.check([f"{self._key}/{rank}"])), self.rank)
            self._silent = speaker != self.rank
            if self._silent:
                self._token = self._store.get(f"{self._key}/{speaker}").decode()
        return self._silent

    def wait(self) -> None:
        """Wait a while for who speaks for this process, or for those that it speaks for: they come as late as this one.

        Of what is watched from its first step on, nothing else has made sure that all are there.
        """
        self._meet()
        if self._store is None or self._silent is not None:
            return
        others = [f"{self._key}/{rank}" for rank in (range(1, dist.get_world_size()) if self.rank == 0 else (0,))]
        deadline = time.monotonic() + _PATIENCE
        while not self._store.check(others) and time.monotonic() < deadline:
            time.sleep(5e-3)

    def send(self, step: str, numbers: Numbers | None, columns: Iterable[int] = ()) -> None:
        """Leave the numbers of the columns of a step for the speaker; None: the measurement has failed."""
        if self._store is None:
            return
        mine = None
        if numbers is not None:
            mine = {
                raw.name: {c: numbers[raw][c] for c in columns if c in numbers[raw]} for raw in RAW if raw in numbers
            }
        self._put(self._message(self.rank, step), to_json(mine))

    def _message(self, rank: int, step: str) -> str:
        return f"{self._key}/{self._token}/{rank}/{step}"

    def _put(self, key: str, text: str) -> None:
        self._store.set(key, text)
        self._sent.append(key)
        while len(self._sent) > _KEPT:  # the speaker takes away what it has read
            self._store.delete_key(self._sent.pop(0))

    def join(self, step: str, numbers: Numbers, holders: Mapping[int, tuple[int, ...]]) -> str | None:
        """Put the numbers of the other processes' pieces to those of this one's, in place.

        Args:
            step: for which it was sent.
            numbers: of this process.
            holders: the ranks that hold pieces, by column.

        Returns:
            What is missing, in words; those columns are then taken out of `numbers`, since a piece says nothing of the
            whole.

        """
        ranks = sorted(set().union(*holders.values()) - {self.rank})
        theirs = self._received(step, ranks) if self.alone is None else None
        if theirs is None:
            for raw in RAW:
                for column in holders:
                    numbers.get(raw, {}).pop(column, None)
            return self.alone or "a process could not measure its part of the parameters"
        for raw in RAW:
            for column, its in holders.items():
                pieces = [(numbers if rank == self.rank else theirs[rank]).get(raw, {}) for rank in its]
                found = [piece[column] for piece in pieces if column in piece]
                if found:
                    numbers.setdefault(raw, {})[column] = raw.whole(found)
                else:
                    numbers.get(raw, {}).pop(column, None)
        return (
            None
            if all(holders.values())
            else "the gradients of parameters that FSDP flattens are not measured:"
            " watch the module that it wraps them in"
        )

    def _received(self, step: str, ranks: list[int]) -> dict[int, Numbers] | None:
        keys = [self._message(rank, step) for rank in ranks]
        if self._store is None or not self._wait(keys, [f"{self._key}/{rank}" for rank in ranks]):
            if self._met:
                self.alone = "a process does not measure its part of the parameters any more"
            else:
                self.alone = (
                    "the parameters are spread over several processes, and not all of them watch: call watch() in each"
                )
            return None
        self._met, self._late = True, False
        texts = [self._store.get(key) for key in keys]
        for key in keys:
            self._store.delete_key(key)
        sent = [from_json(text) for text in texts]
        if None in sent:
            return None
        return {
            rank: {raw: {int(c): n for c, n in one[raw.name].items()} for raw in RAW if raw.name in one}
            for rank, one in zip(ranks, sent, strict=True)
        }

    def _wait(self, messages: list[str], senders: list[str]) -> bool:
        deadline, pause = time.monotonic() + _PATIENCE, 1e-4
        for message, sender in zip(messages, senders, strict=True):
            while not self._store.check([message]):
                if time.monotonic() > deadline or not (self._late or self._store.check([sender])):
                    if self._store.check([message]):  # it has left, and sent its last numbers before
                        break
                    return False
                time.sleep(pause)
                pause = min(2 * pause, 5e-3)
        return True

    def leave(self) -> None:
        """Tell the speaker not to wait for this process any more."""
        if self._store is not None:
            with contextlib.suppress(Exception):  # the processes may have parted before
                self._store.delete_key(f"{self._key}/{self.rank}")
            self._store = None
        _here.discard(self)


def own_name(name: str | None) -> str | None:
    """Return the name under which this process may write: that of rank 0 is the plain one, however late it comes."""
    several = dist.is_available() and dist.is_initialized() and dist.get_rank() > 0
    return name if not several else f"rank{dist.get_rank()}" if name is None else f"{name}-rank{dist.get_rank()}"
