"""No rule divides by zero or stumbles over a number: histories, evidence and causes drawn with everything in them."""

from __future__ import annotations

import dataclasses
import math
import random
import types
import typing

import pytest

from gradwatch import Finding, History, LayerInfo, ModelInfo, OptimizerInfo, ParameterInfo, Severity, Snapshot
from gradwatch.detectors import RULES, explain
from gradwatch.detectors.alerts import judge
from gradwatch.detectors.cause_words import CAUSES
from gradwatch.values.snapshot import Role

EXTREME = (0.0, 5e-324, 1e-310, 1e-45, 3.4e38, math.inf, math.nan)
COUNTED = {"low", "high", "need", "horizon", "length", "reached", "detached"}
"""Timesteps: whole numbers, and at least one."""
KEYS = ("module", "place", "layer", "name", "part")
"""What tells two entries of a row apart; no two have all of it in common."""
SHARES = {"zeros", "subnormal", "lost", "dead", "saturated", "left_over"}
ORDINARY = (1e-30, 1e-9, 1e-4, 0.3, 1.0, 3.0, 50.0, 1e4, 1e30)
WORDS = ("", "l0", "l1", "relu", "tanh", "sigmoid", "LSTM", "GRU", "RNN", "float16", "Adam", "batch")
HOW_MANY = (0, 1, 2, 7, 40, 1000)


class World:
    """A model, and values for whatever a snapshot has: by the types of its fields, so that new ones are drawn too."""

    def __init__(self, seed):
        self.dice = dice = random.Random(seed)
        self.names = ["l0", "l1", "l1.inner", "l2", "l3", "l4", "l5", ""][: dice.randint(1, 8)]
        self.length = dice.choice((1, 2, 13, 60))
        roles = typing.get_args(Role)
        self.model = ModelInfo(
            tuple(
                LayerInfo(n, dice.choice(("Linear", "LSTM")), dice.choice((None, i))) for i, n in enumerate(self.names)
            ),
            tuple(
                ParameterInfo(
                    f"{n}.{role}",
                    n,
                    dice.choice(((4, 4), (4,), (), (0, 3), (2, 3, 3))),
                    dice.choice(("float32", "float32", "float16", "bfloat16")),
                    0,
                    role,
                )
                for n in self.names
                for role in dict.fromkeys(("weight", dice.choice(roles)))
            ),
            (OptimizerInfo("Adam", dice.random() < 0.5, dice.choice((None, 0.0, 1e-8, 1.0))),),
        )
        self.inside = False
        self.wild = dice.choice((0.0, 0.1, 0.5))
        """How often a number is an extreme one."""
        self.change = dice.choice((0.0, 0.05, 0.3))
        """How often a field is another than at the step before; conditions must hold over a window."""

    def number(self, name=""):
        dice = self.dice
        if name in SHARES:
            return dice.choice((0.0, 5e-324, 0.04, 0.7, 0.95, 1.0))
        if dice.random() < self.wild:
            return dice.choice(EXTREME)
        return dice.choice(ORDINARY) * dice.choice((1.0, 1.0, dice.random()))

    def series(self):
        if self.dice.random() < self.wild:
            return tuple(self.number() for _ in range(self.length))
        law = self.dice.choice((0.5, 0.99, 1.0, 1.5))
        return tuple(law**lag for lag in range(self.length))

    def of(self, hint, name=""):
        """Return a value of a type."""
        dice, origin, arguments = self.dice, typing.get_origin(hint), typing.get_args(hint)
        if origin in (typing.Union, types.UnionType):
            some = [a for a in arguments if a is not type(None)]
            return None if dice.random() < 0.3 else self.of(dice.choice(some), name)
        if origin is typing.Literal:
            return dice.choice(arguments)
        if origin is tuple:
            return self.row(arguments, name)
        if dataclasses.is_dataclass(hint):
            return hint(**{n: self.of(h, n) for n, h in typing.get_type_hints(hint).items()})
        if hint is float:
            return self.number(name)
        kinds = {
            bool: lambda: dice.random() < 0.2,
            int: lambda: self.length if name == "length" else dice.choice(HOW_MANY),
            str: lambda: dice.choice(("", "l0") if name == "part" else self.names),
        }
        return kinds[hint]()

    def row(self, arguments, name):
        inner = arguments[0]
        if name in ("beside", "chain"):  # of its own kind: one step deep
            if self.inside:
                return ()
            self.inside = True
            drawn = tuple(self.of(inner) for _ in range(2))
            self.inside = False
            return drawn
        if inner is float:
            return self.series()[: self.length - 1 if name == "carry_ratio" else None]
        if dataclasses.is_dataclass(inner):
            drawn = [self.of(inner) for _ in range(self.dice.choice((0, 1, len(self.names))))]
            return tuple({tuple(getattr(one, key, None) for key in KEYS): one for one in drawn}.values())
        return tuple(self.of(inner, name) for _ in self.model.parameters) if name != "notes" else ()

    def snapshots(self, count):
        hints = {n: h for n, h in typing.get_type_hints(Snapshot).items() if n not in ("step", "model", "optimizer")}
        fields = {name: self.of(hint, name) for name, hint in hints.items()}
        fields["skipped"] = self.dice.random() < 0.1
        for step in range(count):
            again = [name for name in hints if self.dice.random() < self.change]
            fields |= {name: self.of(hints[name], name) for name in again}
            if fields["loss"] is not None and self.dice.random() < 0.1:
                fields["loss"] *= self.dice.choice((-1.0, 0.9, 1.5))
            yield Snapshot(step=step, model=self.model, optimizer=0, **fields)


def histories(seeds, count=60):
    """Judge drawn runs, and give each history with all that was found on the way."""
    for seed in seeds:
        world = World(seed)
        history, still_open, found = History(), (), {}
        for snapshot in world.snapshots(count):
            still_open = judge(history, snapshot, still_open).open
            found.update({a.finding.key: a.finding for a in still_open})
        yield world, history, list(found.values())


@pytest.mark.parametrize("block", range(4))
def test_every_history_can_be_judged_and_told(block):
    for _, history, found in histories(range(20 * block, 20 * block + 20)):
        for finding in found:
            rule = RULES[finding.code]
            again = finding if rule.cause is None else rule.cause(history, finding)
            assert explain(again).message


class Whatever(dict):
    """Answers to any key: numbers and names that a rule of another day asks of a finding."""

    def __init__(self, dice, values):
        super().__init__()
        self.dice, self.values_, self.absent = dice, values, set()

    def __missing__(self, key):
        self[key] = self.dice.choice((1.0, 7.0, 200.0) if key in COUNTED else self.values_)
        return self[key]

    def __contains__(self, key):
        if not super().__contains__(key) and key not in self.absent and self.dice.random() < 0.5:
            self.absent.add(key)
        if key not in self.absent:
            self[key]
        return key not in self.absent

    def get(self, key, default=None):
        return self[key] if key in self else default  # noqa: SIM401  (which would call itself)


def finding_of(code, dice, world):
    return Finding(
        code,
        RULES[code].kind,
        Severity.WARNING,
        dice.choice(world.names),
        parameter=dice.choice((None, "l0.weight")),
        lag=dice.choice((None, 0, 7)),
        onset=dice.choice((0, 3)),
        evidence=Whatever(dice, (*EXTREME, *ORDINARY, -1.0)),
        names=Whatever(dice, (*WORDS, *world.names)),
        cause=dice.choice(("", *CAUSES)),
    )


@pytest.mark.parametrize("code", sorted(RULES))
def test_every_rule_has_words_for_any_number(code):
    dice, world = random.Random(code), World(0)
    for _ in range(300):
        finding = finding_of(code, dice, world)
        try:
            said = explain(finding)
        except KeyError:  # by a name that no rule gives
            continue
        assert said.message, finding


@pytest.mark.parametrize("code", sorted(code for code, rule in RULES.items() if rule.cause is not None))
def test_every_cause_is_measured_on_any_history(code):
    for world, history, _ in histories(range(1000, 1012), 25):
        for _ in range(10):
            finding = finding_of(code, world.dice, world)
            finding.names.values_ = world.names
            try:
                RULES[code].cause(history, finding)
            except KeyError:  # of a layer that is none
                continue


@pytest.mark.slow
def test_what_is_drawn_reaches_nearly_every_rule():
    reached = {finding.code for *_, found in histories(range(160)) for finding in found}
    limits = {"GW103", "GW204"}  # which a user must set

    assert len(reached) >= 0.6 * len(RULES.keys() - limits), sorted(RULES.keys() - reached)
