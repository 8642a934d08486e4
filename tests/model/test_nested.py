"""The one traversal of nested values: what is in them, and the same values with other tensors."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, defaultdict
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from gradwatch.model.nested import detached, differentiable, floats, leaves, mapped, parts, tensors


class Pair(NamedTuple):
    first: Any
    second: Any


@dataclasses.dataclass
class Record:
    value: Any
    name: str = "a name"


@dataclasses.dataclass(frozen=True)
class Frozen:
    value: Any


@dataclasses.dataclass(slots=True)
class Slotted:
    value: Any


class Output(OrderedDict):
    """As in libraries of models: a mapping whose entries are attributes too."""


def numbers(start):
    return torch.arange(3.0) + start


@pytest.fixture
def packed():
    return pack_sequence([numbers(0), numbers(5)[:2]])


NESTS = {
    "list": lambda t: [t, 1],
    "tuple": lambda t: (None, t),
    "named tuple": lambda t: Pair(t, "text"),
    "dict": lambda t: {"x": t, "y": 2.0},
    "ordered": lambda t: Output(x=t),
    "default": lambda t: defaultdict(list, x=t),
    "dataclass": Record,
    "frozen": Frozen,
    "slots": Slotted,
    "deep": lambda t: {"a": [Pair(Record((t,)), None)]},
}


@pytest.mark.parametrize("nest", NESTS.values(), ids=NESTS)
def test_every_kind_of_nest_is_gone_through_and_made_anew(nest):
    given = numbers(1)
    value = nest(given)
    assert [t is given for t in tensors(value)] == [True]
    assert floats(value) == list(leaves(value)) == list(tensors(value))

    made = mapped(value, lambda t: t + 1)

    assert type(made) is type(value)
    assert made is not value
    (other,) = tensors(made)
    assert torch.equal(other, given + 1)
    assert [t is given for t in tensors(value)] == [True]  # what was given is as it was
    assert [p for p in parts(made) if p is None or isinstance(p, str | int | float)] == [
        p for p in parts(value) if p is None or isinstance(p, str | int | float)
    ]


def test_of_a_packed_sequence_the_data_is_the_tensor(packed):
    value = {"x": packed, "y": (numbers(2),)}
    assert [id(t) for t in tensors(value)] == [id(packed.data), id(value["y"][0])]
    assert [type(leaf) for leaf in leaves(value)] == [PackedSequence, torch.Tensor]
    made = mapped(value, lambda t: -t)
    assert torch.equal(made["x"].data, -packed.data)
    assert made["x"].batch_sizes is packed.batch_sizes


def test_order_is_that_of_the_value_and_what_is_no_tensor_is_left_out():
    one, two, three, whole = numbers(1), numbers(2), numbers(3), torch.arange(3)
    value = [one, {"b": two, "a": Pair(whole, three)}, "text", {4}, Record, object()]
    assert [id(t) for t in tensors(value)] == [id(one), id(two), id(whole), id(three)]
    assert [id(t) for t in floats(value)] == [id(one), id(two), id(three)]


def test_what_cannot_be_made_anew_is_left_as_it_is():
    class Own(list):
        pass

    for value in (Own([numbers(1)]), MappingProxyType({"x": numbers(1)}), {numbers(1)}, "text", None, Record):
        assert mapped(value, lambda t: t + 1) is value


def test_a_field_that_was_never_set_is_no_part():
    record = Record(numbers(1))
    del record.value
    assert list(parts(record)) == ["a name"]
    assert not hasattr(mapped(record, lambda t: t + 1), "value")


def test_copies_can_be_differentiated_by_and_edited_and_keep_no_graph(packed):
    leaf = numbers(1).requires_grad_()
    value = {"x": leaf * 2, "n": torch.arange(3), "p": packed, "r": Slotted(numbers(4))}
    made = differentiable(value)
    for tensor in tensors(made):
        assert tensor.requires_grad == tensor.is_floating_point()
        assert not tensor.requires_grad or not tensor.is_leaf
        tensor.add_(1)
    assert torch.equal(value["x"], leaf * 2)
    assert torch.equal(packed.data, pack_sequence([numbers(0), numbers(5)[:2]]).data)
    torch.stack([t.sum() for t in floats(made)]).sum().backward()
    assert leaf.grad is None
    assert not any(t.requires_grad for t in tensors(detached(made)))


def test_a_part_of_what_is_within_may_be_chosen():
    value = [numbers(0), [numbers(1), numbers(2)]]
    last = [t.tolist() for t in leaves(value, lambda v: list(parts(v))[-1:])]
    assert last == [numbers(2).tolist()]
