"""Optimizers of every make: each step is seen once, and each optimizer is as it was when nobody looks any more."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from loops import Watched, batches, loss_of
from models import tall
from truth import by_hand, same


class Plain(torch.optim.SGD):
    """It inherits its step."""

    trouble = None

    def _init_group(self, *args):
        if self.trouble:
            raise RuntimeError(self.trouble)
        return super()._init_group(*args)


class Troubled(torch.optim.SGD):
    """It raises where it is told to."""

    trouble = None

    def at(self, place):
        if self.trouble == place:
            raise RuntimeError(place)

    def _init_group(self, *args):
        self.at("inside")
        return super()._init_group(*args)


def chain_of(kind):
    """Make optimizer classes new to torch: it prepares `step` for hooks when a class is first instantiated."""

    class Base(Troubled):
        pass

    class Steps(Base):
        def step(self, closure=None):
            self.at("before")
            result = super().step(closure)
            self.at("after")
            return result

    class Inherits(Steps):
        pass

    class Chains(Inherits):
        def step(self, closure=None):
            return super().step(closure)

    class Forgives(Chains):
        def step(self, closure=None):
            try:
                return super().step(closure)
            except RuntimeError:
                return None

    return {"none": Base, "own": Steps, "inherited": Inherits, "chain": Chains, "forgiving": Forgives}[kind]


@pytest.mark.parametrize("bases_ready", [False, True])
@pytest.mark.parametrize("kind", ["none", "own", "inherited", "chain", "forgiving"])
@pytest.mark.parametrize("trouble", [None, "before", "inside", "after"])
@pytest.mark.parametrize("explicit", [False, True])
def test_a_step_counts_once_through_any_chain_of_classes_also_after_one_that_raised(
    bases_ready, kind, trouble, explicit
):
    model = tall()
    made = chain_of(kind)
    if bases_ready:
        for base in reversed([c for c in made.__mro__ if issubclass(c, torch.optim.SGD)]):
            base(model.parameters(), lr=0.1)
    optimizer = made(model.parameters(), lr=0.1)
    watched = Watched(model, optimizer)
    truth = []
    for step, batch in enumerate(batches(7)):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        hand = by_hand(model)
        optimizer.trouble = trouble if step in (2, 3) else None
        if explicit:
            watched.watcher.step(step)
        raised = False
        try:
            optimizer.step()
        except RuntimeError:
            raised = True
        assert raised is (
            optimizer.trouble is not None and kind != "forgiving" and (kind != "none" or trouble == "inside")
        )
        if not raised:
            truth.append(hand)
    same(watched.norms(), truth)


def test_a_closure_may_raise_and_the_next_step_is_whole():
    model = tall()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=3)
    watched = Watched(model, optimizer)
    truth = []
    for step, batch in enumerate(batches(5)):
        calls = itertools.count()

        def closure(step=step, batch=batch, calls=calls):
            call = next(calls)
            if (step, call) in ((1, 0), (3, 1)):
                raise RuntimeError("no data")
            optimizer.zero_grad()
            loss = loss_of(model, batch)
            loss.backward()
            if call == 0:
                truth.append((step, by_hand(model), loss.item()))
            return loss

        if step in (1, 3):
            with pytest.raises(RuntimeError, match="no data"):
                optimizer.step(closure)
        else:
            optimizer.step(closure)
    executed = [t for t in truth if t[0] not in (1, 3)]
    same(watched.norms(), [n for _, n, _ in executed])
    assert [s.loss for s in watched.snapshots] == pytest.approx([loss for _, _, loss in executed])


def test_a_step_that_raised_leaves_no_loss_to_the_next():
    model = tall()
    optimizer = Plain(model.parameters(), lr=0.1)
    watched = Watched(model, optimizer)
    for step, batch in enumerate(batches(3)):
        optimizer.trouble = "no" if step == 1 else None
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        watched.watcher.record(float(step))
        if step == 1:
            with pytest.raises(RuntimeError, match="no"):
                optimizer.step()
        else:
            optimizer.step()
    assert [s.loss for s in watched.snapshots] == [0.0, 2.0]


class Duck:
    """It acts like an optimizer and is none of torch's."""

    def __init__(self, parameters):
        self.param_groups = [{"params": list(parameters)}]
        self.trouble = False
        self.steps = 0

    def step(self, closure=None):
        result = closure() if closure is not None else None
        if self.trouble:
            raise RuntimeError("quack")
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                p.data.sub_(p.grad, alpha=0.1)
        self.steps += 1
        return result


class BigDuck(Duck):
    """Its step calls that of its base."""

    def step(self, closure=None):
        return super().step(closure)


@pytest.mark.parametrize("kind", [Duck, BigDuck])
@pytest.mark.parametrize("closures", [False, True])
def test_an_optimizer_without_step_hooks_is_wrapped_and_restored(kind, closures):
    model = tall()
    optimizer = kind(model.parameters())
    watched = Watched(model, optimizer, probe_every_n_steps=1)
    truth = []
    for step, batch in enumerate(batches(5)):

        def closure(batch=batch):
            model.zero_grad()
            loss_of(model, batch).backward()
            truth.append(by_hand(model))
            return 7.0

        optimizer.trouble = step == 1
        if not closures:
            closure()
        if optimizer.trouble:
            with pytest.raises(RuntimeError, match="quack"):
                optimizer.step(closure if closures else None)
            truth.pop()
        else:
            assert optimizer.step(closure if closures else None) == (7.0 if closures else None)
    assert optimizer.steps == 4
    same(watched.norms(), truth)
    assert all(s.update_ratio is not None for s in watched.snapshots)
    watched.watcher.close()
    assert "step" not in vars(optimizer)
    optimizer.trouble = False
    optimizer.step()
    assert len(watched.snapshots) == 4


class Handed(Duck):
    """Its step is its own attribute, as somebody else's wrapper leaves it."""

    def __init__(self, parameters):
        super().__init__(parameters)
        self.step = self.step


@pytest.mark.parametrize("kind", [Duck, BigDuck, Handed])
def test_a_copy_of_an_optimizer_without_step_hooks_steps_itself_and_is_not_watched(kind):
    model = tall()
    optimizer = kind(model.parameters())
    watched = Watched(model, optimizer)
    loss_of(model, batches(1)[0]).backward()
    copied = copy.deepcopy(optimizer)
    copied.step()
    assert (optimizer.steps, copied.steps, len(watched.snapshots)) == (0, 1, 0)
    optimizer.step()
    assert (optimizer.steps, copied.steps, len(watched.snapshots)) == (1, 1, 1)


def test_a_step_that_somebody_wrapped_after_us_stays_theirs():
    model = tall()
    optimizer = Duck(model.parameters())
    watched = Watched(model, optimizer)
    ours = optimizer.step

    def theirs():
        return ours()

    optimizer.step = theirs
    loss_of(model, batches(1)[0]).backward()
    optimizer.step()
    watched.watcher.close()
    assert optimizer.step is theirs
    optimizer.step()
    assert (optimizer.steps, len(watched.snapshots)) == (2, 1)


def test_an_optimizer_that_is_given_twice_is_one():
    model = tall()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    class Wrapper:
        def __init__(self):
            self.optimizer = optimizer

    watched = Watched(model, [optimizer, Wrapper(), optimizer])
    loss_of(model, batches(1)[0]).backward()
    optimizer.step()
    assert [s.optimizer for s in watched.snapshots] == [0]
    assert len(watched.snapshots[0].model.optimizers) == 1


def test_an_optimizer_inside_of_a_wrapper_is_found():
    class Wrapper:
        def __init__(self, optimizer):
            self.optimizer = optimizer

        def step(self):
            self.optimizer.step()

    model = tall()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    outer = Wrapper(Wrapper(inner))
    watched = Watched(model, outer)
    loss_of(model, batches(1)[0]).backward()
    truth = by_hand(model)
    outer.step()
    same(watched.norms(), [truth])
    watched.watcher.step(optimizer=outer)  # also as the one to be read
    inner.step()
    assert [s.stage for s in watched.snapshots] == ["applied", "before_clip"]
