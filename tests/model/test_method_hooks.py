"""Hooks on a method of one object: what they tell, and that nothing of them stays."""

from __future__ import annotations

import gc
import weakref

import pytest

from gradwatch.model.method_hooks import before_call


class Adder:
    def add(self, a, b=1):
        return a + b


def test_a_listener_has_the_arguments_before_the_call_and_the_result_is_that_of_the_method():
    adder, heard = Adder(), []
    before_call(adder, "add", lambda *args, **kwargs: heard.append((args, kwargs)))

    assert adder.add(2, b=3) == 5
    assert heard == [((2,), {"b": 3})]
    assert Adder().add(1) == 2
    assert len(heard) == 1  # of this one object


def test_the_method_of_the_class_comes_back():
    adder = Adder()
    before_call(adder, "add", print)()

    assert vars(adder) == {}


def test_a_method_that_was_the_objects_own_comes_back():
    adder, own = Adder(), lambda a: -a
    adder.add = own
    undo = before_call(adder, "add", lambda *_: None)

    assert adder.add(2) == -2
    undo()
    assert vars(adder) == {"add": own}


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_of_two_listeners_the_last_that_goes_leaves_nothing_whichever_it_is(order):
    adder, heard = Adder(), []
    undo = [before_call(adder, "add", lambda *_, k=k: heard.append(k)) for k in range(2)]
    adder.add(1)
    undo[order[0]]()
    adder.add(1)
    undo[order[1]]()
    adder.add(1)

    assert heard == [0, 1, order[1]]
    assert vars(adder) == {}


def test_what_somebody_has_put_around_it_since_stays_and_works():
    adder, heard = Adder(), []
    undo = before_call(adder, "add", heard.append)
    ours = adder.add
    adder.add = lambda a: 10 * ours(a)
    theirs = adder.add
    undo()

    assert adder.add is theirs
    assert adder.add(1) == 20
    assert heard == []


def test_what_undoes_it_keeps_neither_the_object_nor_the_listener():
    adder = Adder()
    undo = before_call(adder, "add", lambda *_, mine=adder: mine)
    there = weakref.ref(adder)
    del adder
    gc.collect()

    assert there() is None
    undo()
