"""Optimizers of every make: each step is seen once, and each optimizer is as it was when nobody looks any more."""

from __future__ import annotations

import contextlib
import copy
import itertools

import pytest
import torch
from loops import Watched, batches, loss_of
from models import tall
from truth import by_hand, same

import gradwatch


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


class Bare(torch.optim.Optimizer):
    """It never calls `super().__init__()`, as `DPOptimizer` of Opacus and torch's own `PostLocalSGDOptimizer`."""

    def __init__(self, inner):
        self.original = inner
        self.param_groups = inner.param_groups

    def step(self, closure=None):
        return self.original.step(closure)


class Named:
    """It is no optimizer, and holds one under a name of its own."""

    def __init__(self, inner):
        self.torch_optimizer = inner
        self.name = "adam"


class Delegates(Bare):
    """It steps by itself, and holds nothing."""

    def __init__(self, inner):
        super().__init__(inner)
        self._step = inner.step
        del self.original

    def step(self, closure=None):
        return self._step(closure)


@pytest.mark.parametrize("wrapper", [Bare, Named, Delegates, lambda inner: Named(Bare(inner))])
def test_what_holds_one_optimizer_is_unwrapped_whatever_the_attribute_is_called(wrapper):
    model = tall()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    outer = wrapper(inner)
    watched = Watched(model, outer, probe_every_n_steps=1)
    truth = []
    for batch in batches(3):
        inner.zero_grad()
        loss_of(model, batch).backward()
        truth.append(by_hand(model))
        (inner if isinstance(outer, Named) else outer).step()
    same(watched.norms(), truth)
    assert all(s.update_ratio is not None for s in watched.snapshots)
    watched.watcher.close()
    assert "step" not in vars(outer)


def test_what_has_an_answer_to_everything_is_taken_for_what_it_is():
    model = tall()

    class Any(Duck):
        def __getattr__(self, name):
            return Any([]) if not name.startswith("__") else super().__getattribute__(name)

    optimizer = Any(model.parameters())
    watched = Watched(model, optimizer)
    loss_of(model, batches(1)[0]).backward()
    optimizer.step()
    assert len(watched.snapshots) == 1


def test_what_holds_several_optimizers_must_be_told_apart():
    model = tall()

    class Both:
        def __init__(self):
            self.first = torch.optim.SGD(list(model.parameters())[:2], lr=0.1)
            self.second = torch.optim.SGD(list(model.parameters())[2:], lr=0.1)

    with pytest.raises(ValueError, match=r"a Both that holds 2 \(\.first, \.second\)"):
        Watched(model, Both())


def test_what_steps_for_several_is_itself_the_optimizer():
    model = tall()

    class Both(Duck):
        def __init__(self):
            super().__init__(model.parameters())
            self.first = torch.optim.SGD(list(model.parameters())[:2], lr=0.1)
            self.second = torch.optim.SGD(list(model.parameters())[2:], lr=0.1)

    watched, both = Watched(model, optimizer := Both()), optimizer
    loss_of(model, batches(1)[0]).backward()
    truth = by_hand(model)
    both.step()
    same(watched.norms(), [truth])


def test_an_optimizer_of_other_parameters_that_one_holds_is_no_part_of_it():
    model, other = tall(), tall()
    optimizer = Duck(model.parameters())
    optimizer.teacher = torch.optim.SGD(other.parameters(), lr=0.1)
    watched = Watched(model, optimizer)
    loss_of(model, batches(1)[0]).backward()
    optimizer.step()
    assert len(watched.snapshots) == 1


def test_an_optimizer_of_some_of_the_parameters_that_one_holds_is_a_part_of_it():
    model = tall()
    optimizer = Duck(model.parameters())
    optimizer.matrices = torch.optim.SGD([p for p in model.parameters() if p.ndim == 2], lr=0.1)
    watched = Watched(model, optimizer)
    loss_of(model, batches(1)[0]).backward()
    truth = by_hand(model)
    optimizer.step()
    same(watched.norms(), [truth])


def test_of_several_optimizers_one_whose_parameters_are_in_no_module_is_left_out_and_said():
    model = tall()
    temperature = torch.zeros((), requires_grad=True)
    optimizers = [torch.optim.Adam(model.parameters()), torch.optim.Adam([temperature])]
    with pytest.warns(gradwatch.GradwatchWarning, match="one of 2 is left out: .* none of the 1 of this Adam"):
        watched = Watched(model, optimizers)
    loss_of(model, batches(1)[0]).backward()
    optimizers[0].step()
    assert len(watched.snapshots) == 1
    with pytest.raises(ValueError, match="none of the 1 of this Adam"):
        Watched(model, optimizers[1])


class Ahead(Duck):
    """It moves the weights once more after the optimizer that it wraps has stepped, as Lookahead does."""

    def __init__(self, inner):
        super().__init__([p for group in inner.param_groups for p in group["params"]])
        self.base = inner

    def step(self, closure=None):
        result = self.base.step(closure)
        if self.trouble:
            raise RuntimeError("quack")
        for p in self.param_groups[0]["params"]:
            p.data.mul_(0.5)
        return result


class Behind(Ahead):
    """It moves the weights before the optimizer that it wraps steps, as the wrapper of schedule-free does."""

    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p.data.mul_(0.5)
        return self.base.step(closure)


class Averages(Behind):
    """It moves nothing at first, as in a warmup, and weights first once it has moved them: averages are elsewhere."""

    steps = 0

    def step(self, closure=None):
        self.steps += 1
        for group in self.base.param_groups:
            group["lr"] = 0.1 * (self.steps > 2)
        return super().step(closure) if self.steps > 3 else self.base.step(closure)


class Perturbs(torch.optim.SGD):
    """It moves the weights before it evaluates the closure, as SAM does."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.data.mul_(1.5)
        with torch.enable_grad():
            loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                p.data.div_(1.5)
        super().step()
        return loss


def of_weights(model):
    return {name: p.detach().double().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("kind", "closures"), [*itertools.product([Ahead, Behind, Averages], [False, True]), (Perturbs, True)]
)
@pytest.mark.parametrize("explicit", [False, True])
def test_weights_are_those_before_the_outermost_step_and_the_update_is_what_that_has_made_of_them(
    kind, closures, explicit
):
    model = tall()
    inner = (Perturbs if kind is Perturbs else torch.optim.SGD)(model.parameters(), lr=0.1)
    optimizer = inner if kind is Perturbs else kind(inner)
    watched = Watched(model, optimizer, probe_every_n_steps=2)
    for step, batch in enumerate(batches(9)):

        def closure(batch=batch, step=step):
            model.zero_grad()
            loss = loss_of(model, batch)
            loss.backward()
            if explicit:
                watched.watcher.step(step)
            return loss

        before = of_weights(model)
        if closures:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
        after = of_weights(model)
        snapshot = watched.snapshots[-1]
        assert snapshot.step == step
        assert len(watched.snapshots) == step + 1
        if step % 2:
            continue
        for name, was in before.items():
            column = [p.name for p in snapshot.model.parameters].index(name)
            assert snapshot.weight_norm[column] == pytest.approx(float(was.norm()), rel=1e-6)
            assert snapshot.update_ratio[column] == pytest.approx(float((after[name] - was).norm() / was.norm()), 1e-4)


def test_a_wrapper_that_raises_and_is_called_no_more_leaves_the_steps_of_the_inner_one_to_be_seen():
    model = tall()
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    outer = Ahead(inner)
    watched = Watched(model, outer)
    loss_of(model, batches(1)[0]).backward()
    outer.trouble = True
    with pytest.raises(RuntimeError, match="quack"):
        outer.step()
    outer.trouble = False
    outer.step()
    outer.step()
    inner.step()  # nothing wraps this one
    assert [s.step for s in watched.snapshots] == [0, 1, 2, 3]  # also the first, in which the inner one has stepped
    outer.trouble = True
    with pytest.raises(RuntimeError, match="quack"):
        outer.step()
    inner.step()
    assert [s.step for s in watched.snapshots] == [0, 1, 2, 3, 4, 5]


def test_a_step_that_raised_leaves_no_copies_to_the_next():
    model = tall()
    optimizer = Perturbs(model.parameters(), lr=0.1)
    watched = Watched(model, optimizer, probe_every_n_steps=1)

    def broken():
        raise RuntimeError("no data")

    for step, batch in enumerate(batches(6)):

        def closure(batch=batch):
            model.zero_grad()
            loss = loss_of(model, batch)
            loss.backward()
            return loss

        if step in (1, 3):
            with pytest.raises(RuntimeError, match="no data"):
                optimizer.step(broken)
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(0.5)
        before = of_weights(model)
        optimizer.step(closure)
        first = next(iter(before))
        moved = (of_weights(model)[first] - before[first]).norm() / before[first].norm()
        assert watched.snapshots[-1].update_ratio[0] == pytest.approx(float(moved), rel=1e-4)


def test_a_scheduler_takes_a_wrapped_step_for_the_optimizers_own():
    model = tall()
    optimizer = Bare(torch.optim.SGD(model.parameters(), lr=0.1))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer.original, 1)
    watched = Watched(model, Named(optimizer))
    loss_of(model, batches(1)[0]).backward()
    optimizer.step()
    scheduler.step()  # torch warns if something has come between, and here warnings are errors
    assert len(watched.snapshots) == 1


# --- a step in parts ---


@pytest.fixture
def watching():
    """Close what was watched: a hook on a parameter that holds its optimizer is a circle that nobody collects."""
    with contextlib.ExitStack() as stack:

        def watch(*args, **options):
            watched = Watched(*args, **options)
            stack.callback(watched.watcher.close)
            return watched

        yield watch


def released(model, *, skip=()):
    """Let one optimizer for each parameter step within backward, as soon as its gradient is there."""
    optimizers = []
    truth = {}
    for name, parameter in model.named_parameters():
        optimizer = torch.optim.SGD([parameter], lr=0.1)
        optimizers.append(optimizer)

        def step(p, optimizer=optimizer, name=name):
            truth[name] = float(p.grad.detach().double().norm())
            optimizer.step()
            p.grad = None

        if name not in skip:
            parameter.register_post_accumulate_grad_hook(step)
    return optimizers, truth


def test_optimizers_of_one_parameter_each_that_step_within_backward_make_one_snapshot_a_training_step(watching):
    model = tall()
    optimizers, truth = released(model)
    watched = watching(model, optimizers, probe_every_n_steps=2)
    expected = []
    for batch in batches(6):
        truth.clear()
        before = of_weights(model)
        loss = loss_of(model, batch)
        watched.watcher.record(loss)
        loss.backward()
        expected.append((dict(truth), loss.item(), before, of_weights(model)))
    assert [s.step for s in watched.snapshots] == [*range(6)]
    same(watched.norms(), [norms for norms, *_ in expected])
    assert [s.loss for s in watched.snapshots] == pytest.approx([loss for _, loss, *_ in expected])
    assert all(s.absent is None for s in watched.snapshots)
    assert len(watched.snapshots[0].model.optimizers) == 1
    for snapshot, (_, _, before, after) in zip(watched.snapshots, expected, strict=True):
        if snapshot.step % 2 == 0:
            true = [float((after[n] - was).norm() / was.norm()) for n, was in before.items()]
            assert snapshot.update_ratio == pytest.approx(true, rel=1e-4)
            assert snapshot.weight_norm == pytest.approx([float(w.norm()) for w in before.values()], rel=1e-6)


def test_a_parameter_that_never_steps_does_not_hold_up_the_others_of_a_sweep(watching):
    model = tall()
    optimizers, _ = released(model, skip=[next(iter(dict(model.named_parameters())))])
    watched = watching(model, optimizers)
    for batch in batches(5):
        loss_of(model, batch).backward()
    assert [s.step for s in watched.snapshots] == [*range(5)]
    reasons = watched.snapshots[-1].absent
    assert reasons[0] is not None
    assert set(reasons[1:]) == {None}


def test_a_sweep_that_is_under_way_when_the_watcher_closes_is_a_step(watching):
    model = tall()
    optimizers, _ = released(model, skip=[next(iter(dict(model.named_parameters())))])
    watched = watching(model, optimizers)
    loss_of(model, batches(1)[0]).backward()
    assert watched.snapshots == []
    watched.watcher.close()
    assert len(watched.snapshots) == 1


class ByParameter(torch.optim.SGD):
    """Its step takes a parameter, as that of torch-optimi does where gradients are released."""

    def step(self, closure=None, param=None):
        if param is None:
            return super().step(closure)
        param.data.sub_(param.grad, alpha=0.1)
        return None


def test_a_step_for_each_parameter_of_one_optimizer_is_a_part_of_one_step(watching):
    model = tall()
    optimizer = ByParameter(model.parameters(), lr=0.1)
    truth = {}

    def step(p):
        truth[id(p)] = float(p.grad.detach().double().norm())
        optimizer.step(param=p)
        p.grad = None

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    watched = watching(model, optimizer)
    expected = []
    for batch in batches(4):
        loss_of(model, batch).backward()
        expected.append({name: truth[id(p)] for name, p in model.named_parameters()})
    same(watched.norms(), expected)
    for hook in model.parameters():  # and it may step as ever
        hook._post_accumulate_grad_hooks.clear()
    loss_of(model, batches(1)[0]).backward()
    hand = by_hand(model)
    optimizer.step()
    same(watched.norms()[4:], [hand])


def test_optimizers_of_one_parameter_each_that_step_after_backward_make_one_snapshot_too(watching):
    model = tall()
    optimizers = [torch.optim.Adam([p]) for p in model.parameters()]  # as Pyro makes them
    watched = watching(model, optimizers)
    truth = []
    for batch in batches(4):
        model.zero_grad()
        loss_of(model, batch).backward()
        truth.append(by_hand(model))
        for optimizer in optimizers:
            optimizer.step()
    same(watched.norms(), truth)
    assert {s.optimizer for s in watched.snapshots} == {0}


def test_two_optimizers_of_one_parameter_each_with_a_backward_pass_between_see_their_own_gradients(watching):
    first, second = torch.nn.Linear(4, 1, bias=False), torch.nn.Linear(4, 1, bias=False)
    model = torch.nn.ModuleList([first, second])
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.1) for part in model]
    watched = watching(model, optimizers)
    truth = []
    for _ in range(3):
        norms = {}
        for name, part, optimizer in zip(("0.weight", "1.weight"), model, optimizers, strict=True):
            model.zero_grad()
            part(torch.randn(5, 4)).square().mean().backward()
            norms[name] = float(part.weight.grad.double().norm())
            optimizer.step()
        truth.append(norms)
    same(watched.norms(), truth)


def test_the_step_of_two_classes_is_not_one_sweep(watching):
    model = torch.nn.Linear(4, 3)
    optimizers = [torch.optim.SGD([model.weight], lr=0.1), torch.optim.Adam([model.bias])]
    watched = watching(model, optimizers)
    model(torch.ones(1, 4)).sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    assert [s.optimizer for s in watched.snapshots] == [0, 1]


def test_two_optimizers_of_one_parameter_each_among_many_keep_their_own_steps(watching):
    model = tall()
    first, second, *_ = model.parameters()
    optimizers = [torch.optim.SGD([p], lr=0.1) for p in (first, second)]
    watched = watching(model, optimizers)
    for step in range(4):
        model.zero_grad()
        loss_of(model, batches(1)[0]).backward()
        optimizers[0].step()
        if step % 2:
            optimizers[1].step()
    assert [(s.optimizer, s.step) for s in watched.snapshots] == [(0, 0), (0, 1), (1, 0), (0, 2), (0, 3), (1, 1)]


def test_parameters_that_come_back_are_in_the_sweep_at_once(watching):
    model = tall()
    optimizers, truth = released(model)
    watched = watching(model, optimizers)
    expected = []
    for step, batch in enumerate(batches(9)):
        for p in list(model.parameters())[:2]:
            p.requires_grad_(step % 4 < 2)
        truth.clear()
        loss_of(model, batch).backward()
        expected.append(dict(truth))
    watched.watcher.close()
    same(watched.norms(), expected)
