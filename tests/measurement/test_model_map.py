"""The model as it is now, asked while parameters come, go, freeze and die."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

from gradwatch.measurement.model_map import ModelMap


class Net(nn.Module):
    """A layer that runs first, one that runs later, and one that never does."""

    def __init__(self):
        super().__init__()
        self.late, self.early, self.idle = nn.Linear(2, 1), nn.Linear(2, 2), nn.Linear(2, 2, bias=False)


def ids(parameters):
    return list(map(id, parameters))


def names(described, columns):
    return [described.info.parameters[c].name for c in columns]


def test_every_parameter_has_a_column_and_what_is_not_of_the_model_has_none():
    model, other = Net(), nn.Linear(2, 2)
    optimizer = torch.optim.SGD([*model.early.parameters(), *other.parameters()], lr=0.1)
    described = ModelMap(model, [optimizer])
    parameters = described.parameters(optimizer)

    assert names(described, described.columns(ids(parameters))) == ["early.weight", "early.bias"]
    assert [p in described for p in parameters] == [True, True, False, False]
    assert described.parameters(None) == list(model.parameters())


def test_what_other_optimizers_step_is_of_the_model_only():
    model, other = Net(), nn.Linear(2, 2)
    mine = torch.optim.SGD(model.early.parameters(), lr=0.1)
    theirs = torch.optim.SGD([*model.late.parameters(), *other.parameters()], lr=0.1)
    described = ModelMap(model, [mine, theirs])

    assert described.stepped_by_others(mine) == set(ids(model.late.parameters()))
    assert described.stepped_by_others(theirs) == set(ids(model.early.parameters()))
    assert ModelMap(model, [mine]).stepped_by_others(mine) == set()


def test_a_description_that_says_the_same_is_the_same_object_and_a_new_parameter_makes_another():
    model = Net()
    described = ModelMap(model, [])
    before = described.info
    model.early.weight = nn.Parameter(torch.ones(2, 2))
    described.describe()
    assert described.info is before
    assert described.columns([id(model.early.weight)]) == [2]
    model.idle.bias = nn.Parameter(torch.ones(2))
    described.describe()

    assert described.info is not before
    assert described.info.parameters[-1].name == "idle.bias"


def test_the_order_is_that_in_which_layers_first_ran_and_stays():
    model = Net()
    described = ModelMap(model, [])
    described.learn_order(["", "early", "late"], {})
    described.learn_order(["late", "idle", "early"], {})
    described.describe()

    assert dict(described.order) == {"early": 0, "late": 1, "idle": 2}
    assert [layer.order for layer in described.info.layers] == [1, 0, 2]
    again = ModelMap(model, [])
    again.resume({"idle": 0})
    again.describe()
    assert [layer.order for layer in again.info.layers] == [None, None, 0]


def test_what_one_module_holds_and_what_it_does_not_call_is_in_the_order_in_which_it_is_applied():
    kept = nn.ParameterDict({f"{n}/kernel": nn.Parameter(torch.ones(2, 2)) for n in ("10", "2", "unknown", "1")})
    model = nn.ModuleDict({"late": nn.Linear(2, 2), "early": nn.Linear(2, 2), "kept": kept})
    torch.stack([p.sum() for p in model.parameters()]).sum().backward()
    applied = {id(kept[f"{n}/kernel"]): n for n in (1, 2, 10)}
    applied |= {id(model["early"].bias): 20, id(model["early"].weight): 21, id(model["late"].weight): 22}
    described = ModelMap(model, [])
    described.learn_order([""], applied)

    assert list(described.order) == ["kept.1", "kept.2", "kept.10", "kept.unknown", "early", "late"]


@pytest.mark.parametrize(
    ("ran", "grad", "trained", "reason"),
    [
        (True, True, True, None),
        (True, False, True, "disconnected"),
        (False, False, True, "unused"),
        (False, True, True, "unused"),  # zeros, by zero_grad(set_to_none=False)
        (True, False, False, "frozen"),
        (False, False, False, "frozen"),
    ],
)
def test_why_a_parameter_has_no_gradient(ran, grad, trained, reason):
    model = Net()
    weight = model.late.weight.requires_grad_(trained)
    there = {0} if grad else set()
    optimizer = torch.optim.SGD([weight], lr=0.1)
    described = ModelMap(model, [optimizer])
    known = described.without_gradient([0], [weight], there, frozenset({"", "late"} if ran else {""}))

    assert described.absent([0], [weight], there, known)[0] == reason


def test_what_a_look_said_holds_until_a_gradient_is_there_and_without_a_look_it_is_unused():
    model = Net()
    weight = model.late.weight
    described = ModelMap(model, [torch.optim.SGD([weight], lr=0.1)])

    assert described.absent([0], [weight], (), {})[0] == "unused"
    assert described.absent([0], [weight], (), {0: "disconnected"})[0] == "disconnected"
    assert described.absent([0], [weight], {0}, {0: "disconnected"})[0] is None


def test_what_no_optimizer_steps_and_is_frozen_is_known_as_of_the_last_description():
    model = Net()
    described = ModelMap(model, [])
    assert not described.has_frozen
    model.early.bias.requires_grad_(requires_grad=False)
    described.describe()

    assert described.has_frozen
    assert described.absent([], [], (), {}) == [None, None, None, "frozen", None]


def test_neither_model_nor_after_release_optimizer_is_held():
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    described = ModelMap(model, [optimizer])
    model_is, optimizer_is = weakref.ref(model), weakref.ref(optimizer)
    assert described.model is model
    described.release()
    del model, optimizer
    gc.collect()

    assert (model_is(), optimizer_is(), described.model) == (None, None, None)
    with pytest.raises(RuntimeError, match="the watched model is gone"):
        described.parameters(None)
