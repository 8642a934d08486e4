"""A gradient whose class refuses arithmetic loses its own number, and no other."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import Tensor, nn

import gradwatch

REFUSED = (torch.linalg.vector_norm, torch._foreach_norm, torch.stack)


class Refusing(Tensor):
    """A gradient, as some layouts give them, that an optimizer can take and no norm can be taken of."""

    refused = REFUSED

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function in cls.refused:
            raise NotImplementedError(f"{function.__name__} is not implemented for this layout")
        return super().__torch_function__(function, types, args, kwargs or {})


class Uncountable(Refusing):
    """Its norm is there, but its entries cannot be counted."""

    refused = (torch.Tensor.reshape, torch.count_nonzero)


def trained(net, name, kind, *, explicit):
    snapshots = []
    net = copy.deepcopy(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, foreach=False)
    sinks = [lambda report: snapshots.append(report.snapshot)]
    with gradwatch.watch(net, optimizer, every_n_steps=1, probe_every_n_steps=2, sinks=sinks, detectors=[]) as watcher:
        for _ in range(5):
            optimizer.zero_grad()
            net(torch.ones(2, 3, dtype=net[0].weight.dtype)).square().mean().backward()
            if kind is not None:
                parameter = net.get_parameter(name)
                parameter.grad = parameter.grad.as_subclass(kind)
            if explicit:
                watcher.step()
            optimizer.step()
    return snapshots


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("explicit", [False, True], ids=["hooks", "step"])
@pytest.mark.parametrize("kind", [Refusing, Uncountable])
@pytest.mark.parametrize("name", ["2.weight", "0.bias"])
def test_a_gradient_that_refuses_costs_its_own_number_alone(name, kind, explicit, dtype):
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1)).to(dtype)
    expected, found = (trained(net, name, each, explicit=explicit) for each in (None, kind))

    lost = [p.name for p in found[0].model.parameters].index(name)
    for one, other in zip(expected, found, strict=True):
        assert other.norm[lost] is None or kind is Uncountable
        for column in ("norm", "zeros", "subnormal", "weight_norm", "update_ratio", "lost"):
            values, others = getattr(one, column), getattr(other, column)
            assert (values is None) == (others is None), column
            for number, (value, its) in enumerate(zip(values or (), others or (), strict=True)):
                assert its == value or number == lost, column
        assert [(a.module, a.grad_norm) for a in one.activations or ()] == [
            (a.module, a.grad_norm) for a in other.activations or ()
        ]
        assert other.weight_norm == one.weight_norm
        notes = [
            note
            for note in other.notes
            if note.startswith(f"the gradient of {name} is not measured: NotImplementedError: ")
        ]
        assert len(notes) == 1 or (kind is Uncountable and other.zeros is None)
        assert len(notes) == len(other.notes)
    assert len(found) == 5
    assert found[2].activations


def test_where_all_refuse_each_says_so(recwarn):
    net = nn.Linear(3, 2)
    snapshots = []
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, foreach=False)
    with gradwatch.watch(net, optimizer, every_n_steps=1, sinks=[lambda report: snapshots.append(report.snapshot)]):
        net(torch.ones(2, 3)).square().mean().backward()
        for parameter in net.parameters():
            parameter.grad = parameter.grad.as_subclass(Refusing)
        optimizer.step()

    (snapshot,) = snapshots
    assert dataclasses.astuple(snapshot)
    assert snapshot.norm == (None, None)
    assert [note.split(":")[0] for note in snapshot.notes] == [
        "the gradient of weight is not measured",
        "the gradient of bias is not measured",
    ]
    assert not recwarn.list


@pytest.mark.parametrize("refused", [REFUSED, (torch._foreach_sub_,)], ids=["norms", "differences"])
def test_a_weight_that_refuses_costs_its_own_numbers_alone(refused):
    kind = type("Refuser", (Refusing,), {"refused": refused})
    found = []
    for of in (None, kind):
        torch.manual_seed(0)
        net, snapshots = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)), []
        if of is not None:
            net[0].weight = nn.Parameter(net[0].weight.detach().as_subclass(of))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, foreach=False)
        sinks = [lambda report, snapshots=snapshots: snapshots.append(report.snapshot)]
        with gradwatch.watch(net, optimizer, every_n_steps=1, probe_every_n_steps=1, sinks=sinks, detectors=[]):
            for _ in range(3):
                optimizer.zero_grad()
                net(torch.ones(2, 3)).as_subclass(Tensor).square().mean().backward()
                optimizer.step()
        found.append(snapshots)

    expected, seen = found
    assert len(seen) == 3
    for one, other in zip(expected, seen, strict=True):
        assert other.update_ratio[0] is None
        assert other.update_ratio[1:] == pytest.approx(one.update_ratio[1:])
        assert other.weight_norm[1:] == pytest.approx(one.weight_norm[1:])
        what = "weight" if refused is REFUSED else "update"
        assert any(n.startswith(f"the {what} of 0.weight is not measured: NotImplementedError") for n in other.notes)
