"""What each rule finds, and what it must leave alone: trajectories drawn by hand, and small trainings."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from models import deep
from torch import nn
from truth import codes

import gradwatch
from gradwatch import (
    Finding,
    History,
    LayerInfo,
    ModelInfo,
    OptimizerInfo,
    ParameterInfo,
    Severity,
    Snapshot,
    Thresholds,
)
from gradwatch.detectors import RULES, explain
from gradwatch.detectors.alerts import findings
from gradwatch.detectors.suspects import suspects
from gradwatch.values.autograd import Barrier, Flow, Squashed, Stray
from gradwatch.values.sequences import SequenceStats
from gradwatch.values.snapshot import ActivationStats, Fact, Silence


def model(count, *, adaptive=False, order=None):
    names = [f"l{i}" for i in range(count)]
    layers = tuple(LayerInfo(n, "Linear", order=i if order is None else order[i]) for i, n in enumerate(names))
    parameters = tuple(ParameterInfo(f"{n}.weight", n, (4, 4), "float32", 0, "weight") for n in names)
    return ModelInfo(layers, parameters, (OptimizerInfo("Adam" if adaptive else "SGD", adaptive, 1e-8),))


def fold(info, rows, *, losses=None, thresholds=None, weights=1.0, **columns):
    """Fold snapshots with these gradient norms, and give the history and what is found at the last."""
    history = History(thresholds)
    for step, row in enumerate(rows):
        loss = None if losses is None else losses[step]
        weight = tuple(weights for _ in row) if step in (0, 1) else None
        extra = {name: column[step] for name, column in columns.items()}
        history.add(
            Snapshot(
                step,
                0.0,
                info,
                optimizer=0,
                loss=loss,
                norm=tuple(row),
                weight_norm=extra.pop("weight_norm", weight),
                **extra,
            )
        )
    return history, findings(history)


STILL = [1.0] * 200


# --- vanishing through depth ---


def test_a_layer_far_below_later_ones_vanishes_and_neighbours_are_one_finding():
    _, found = fold(model(4), [(1e-6, 1e-5, 0.5, 1.0)] * 20, losses=STILL)

    assert codes(found) == [("GW101", "l0", Severity.WARNING)]
    assert found[0].evidence["ratio"] == pytest.approx(1e-6)
    assert found[0].evidence["layers"] == 2
    assert found[0].names["last"] == "l1"
    assert found[0].onset == 0


def test_the_parameters_of_the_model_itself_have_words_where_they_are_the_worst():
    (found,) = fold(model(2), [(1e-6, 1.0)] * 20, losses=STILL)[1]
    message = explain(dataclasses.replace(found, names={**found.names, "worst": ""})).message

    assert "(worst: the first layer)" in message


def test_it_is_patient():
    assert fold(model(2), [(1e-6, 1.0)] * 19)[1] == []
    assert fold(model(2), [(1.0, 1.0)] * 5 + [(1e-6, 1.0)] * 15, losses=STILL)[1] == []
    assert codes(fold(model(2), [(1.0, 1.0)] * 4 + [(1e-6, 1.0)] * 16, losses=STILL)[1]) == [
        ("GW101", "l0", Severity.WARNING)
    ]


def test_a_layer_that_gets_its_gradient_now_is_not_accused_of_before():
    assert fold(model(2), [(1e-6, 1.0)] * 19 + [(1.0, 1.0)], losses=STILL)[1] == []


@pytest.mark.parametrize(("weight", "cause"), [(1.0, ""), (1e-5, "weak")])
def test_weights_are_the_cause_only_where_they_account_for_what_is_missing(weight, cause):
    # Of shape (4, 4), so half of their norm is the gain: 0.5 of one layer explains no factor of 1e-9.
    (found,) = fold(model(3), [(1e-9, 1.0, 1.0)] * 20, losses=STILL, weights=weight)[1]

    assert found.code == "GW101"
    assert found.cause == cause


def test_onset_is_the_step_at_which_it_began_to_fade():
    _, found = fold(model(2), [(1.0, 1.0)] * 10 + [(1e-6, 1.0)] * 25, losses=STILL)

    assert found[0].onset == 10


def test_a_small_first_layer_is_compared_with_the_layers_behind_it_not_before_it():
    assert fold(model(2), [(1.0, 1e-9)] * 30)[1] == []


def test_later_is_by_the_forward_pass_not_by_registration():
    assert fold(model(2, order=[1, 0]), [(1e-9, 1.0)] * 30)[1] == []
    assert codes(fold(model(2, order=[1, 0]), [(1.0, 1e-9)] * 30)[1]) == [("GW101", "l1", Severity.WARNING)]


def test_adam_like_optimizers_are_allowed_ten_times_less():
    rows = [(3e-4, 1.0)] * 20

    assert codes(fold(model(2), rows)[1]) == [("GW101", "l0", Severity.WARNING)]
    assert fold(model(2, adaptive=True), rows)[1] == []


def test_a_layer_that_is_opening_is_left_alone():
    rising = [(1e-4 * 1.2**i, 1.0) for i in range(12)] + [(5e-4, 1.0)] * 8

    assert fold(model(2), rising)[1] == []


def test_rising_far_below_the_limit_is_not_opening():
    assert codes(fold(model(2), [(1e-16 * 1.2**i, 1.0) for i in range(20)])[1]) == [("GW101", "l0", Severity.WARNING)]


def test_a_layer_that_was_sound_and_fades_while_the_loss_is_at_its_best_has_done_its_work():
    rows = [(1.0, 1.0)] * 10 + [(1e-6, 1.0)] * 25
    falling = [1.0 * 0.9**i for i in range(35)]

    assert codes(fold(model(2), rows, losses=falling)[1]) == [("GW101", "l0", Severity.INFO)]
    assert codes(fold(model(2), rows, losses=None)[1]) == [
        ("GW101", "l0", Severity.INFO)
    ]  # without the loss, who knows
    assert codes(fold(model(2), rows, losses=STILL)[1]) == [("GW101", "l0", Severity.WARNING)]


def test_one_sound_snapshot_at_initialization_proves_nothing():
    # A homogeneous network: at initialization every layer has the same sensitivity.
    assert codes(fold(model(2), [(1.0, 1.0)] + [(1e-6, 1.0)] * 25)[1]) == [("GW101", "l0", Severity.WARNING)]


def test_a_loss_that_falls_is_no_excuse_where_next_to_nothing_arrives():
    falling = [1.0 * 0.9**i for i in range(35)]

    assert codes(fold(model(2), [(1e-4, 1.0)] * 25, losses=falling)[1]) == [("GW101", "l0", Severity.INFO)]
    assert codes(fold(model(2), [(1e-9, 1.0)] * 25, losses=falling)[1]) == [("GW101", "l0", Severity.WARNING)]


def test_zeros_at_the_end_of_a_fade_are_vanishing_and_not_a_cut():
    _, found = fold(model(4), [(0.0, 1e-30, 1e-12, 1.0)] * 25)

    assert codes(found) == [("GW101", "l0", Severity.WARNING)]
    assert found[0].evidence["layers"] == 3


def test_what_leads_to_a_softmax_of_one_value_is_no_fade_and_is_not_forgotten():
    one = Barrier("l40", "softmax", 1)
    rows = [(*(1e-9,) * 40, 0.0, 1e-9, 1.0)] * 20
    known, _ = fold(model(43), rows, flows=[(Flow("l40", barrier=one, peak=1.0),)] * 20)
    unknown, _ = fold(model(43), rows)

    def last(history):
        return {f.names["last"] for f in findings(history) if f.code == "GW101"}

    assert last(unknown) == {"l41"}
    assert "l40" not in {name for f in findings(known) if f.code == "GW101" for name in f.names.values()}
    # Of more layers than there is room for, this is looked at again: else it is an error once that is forgotten.
    assert "l40" in suspects(known, known.model, ())
    assert "l40" not in suspects(unknown, unknown.model, ())


@pytest.mark.parametrize(("joined", "severity"), [(True, Severity.INFO), (False, Severity.WARNING)])
def test_a_branch_that_begins_nearly_shut_ends_where_it_is_added(joined, severity):
    flows = (Flow("l1", source="l0", through=1e-3), Flow("l2", source="l1"), Flow("l3", source="l2", joined=joined))
    rows = [(0.2, 3e-5, 5e-4, 3e-2, 1.0)] * 20

    assert codes(fold(model(5), rows, flows=[flows] * 20)[1]) == [("GW101", "l1", severity)]


@pytest.mark.parametrize(("added", "sound", "said"), [(True, 0.1, []), (False, 0.1, ["l1"]), (True, 1e-6, ["l0"])])
def test_what_is_added_to_what_a_layer_gives_is_judged_with_that_layer(added, sound, said):
    rows, flows = [(sound, 1e-6, 1.0)] * 20, (Flow("l1", source="l0", added=added),)

    assert [place for _, place, _ in codes(fold(model(3), rows, flows=[flows] * 20)[1])] == said


def test_biases_do_not_count():
    info = model(2)
    bias = ParameterInfo("l0.bias", "l0", (4,), "float32", 0, "bias")
    info = ModelInfo(info.layers, (*info.parameters, bias), info.optimizers)

    assert fold(info, [(1.0, 1.0, 1e-12)] * 25)[1] == []


def test_a_layer_whose_weights_are_zero_has_no_sensitivity():
    assert fold(model(2), [(1.0, 1.0)] * 25, weights=0.0)[1] == []


def test_the_same_at_any_scale():
    for scale in (1e-30, 1e-8, 1e4, 1e30):
        _, found = fold(model(3), [(1e-6 * scale, 0.5 * scale, scale)] * 25, losses=[scale] * 25)
        assert codes(found) == [("GW101", "l0", Severity.WARNING)]


def test_nothing_learns_at_all():
    _, found = fold(model(2), [(1e-7, 1e-7)] * 25, losses=[1.0] * 25)

    assert codes(found) == [("GW102", "", Severity.WARNING)]
    assert fold(model(2), [(1e-7, 1e-7)] * 25, losses=[1e-7] * 25)[1] == []  # small only because the loss is
    assert fold(model(2), [(1e-7, 1e-7)] * 25)[1] == []  # who knows


def test_absolute_limits_hold_only_where_somebody_set_them():
    rows = [(1e-9, 1e-9)] * 25

    assert codes(fold(model(2), rows, thresholds=Thresholds(norm_below=1e-6))[1]) == [
        ("GW103", "l0", Severity.WARNING),
        ("GW103", "l1", Severity.WARNING),
    ]
    only = Thresholds(layers={"l1": {"norm_below": 1e-6}})
    assert codes(fold(model(2), rows, thresholds=only)[1]) == [("GW103", "l1", Severity.WARNING)]
    assert codes(fold(model(2), [(9.0, 9.0)], thresholds=Thresholds(norm_above=10.0))[1]) == [
        ("GW204", "", Severity.WARNING)
    ]


def test_a_layer_may_have_a_limit_of_its_own():
    rows = [(1e-4, 1.0)] * 25

    assert fold(model(2), rows, thresholds=Thresholds(layers={"l0": {"vanishing_ratio": 1e-5}}))[1] == []


# --- exploding ---


def test_gradients_that_grow_a_hundredfold_explode_unless_the_loss_is_fine():
    rows = [(1.0, 1.0)] * 20 + [(200.0, 200.0)] * 5

    assert codes(fold(model(2), rows, losses=STILL)[1]) == [("GW201", "", Severity.WARNING)]
    assert codes(fold(model(2), rows)[1]) == [("GW201", "", Severity.INFO)]
    assert fold(model(2), rows, losses=[0.9**i for i in range(25)])[1] == []
    assert fold(model(2), [(1.0, 1.0)] * 20 + [(200.0, 200.0)], losses=STILL)[1] == []  # one spike is none
    # Of a loss below 0 nobody knows whether it is better; one that goes on and on is not.
    assert codes(fold(model(2), rows, losses=[-1.0] * 20 + [-300.0] * 5)[1]) == [("GW201", "", Severity.INFO)]
    assert codes(fold(model(2), rows, losses=[-1.0] * 20 + [-3e4] * 5)[1]) == [("GW201", "", Severity.WARNING)]


@pytest.mark.parametrize(("start", "said"), [(0.01, []), (0.2, [("GW201", "", Severity.WARNING)])])
def test_gradients_that_grow_from_nearly_nothing_to_what_is_ordinary_have_not_exploded(start, said):
    rows = [(start, start)] * 20 + [(500 * start, 500 * start)] * 20

    assert codes(fold(model(2), rows, losses=[1.0] * 40)[1]) == said


def test_updates_larger_than_the_weights_explode_at_the_third_or_when_they_are_huge():
    rows = [(1.0, 1.0)] * 20

    def probes(*ratios):
        return [None] * (20 - len(ratios)) + [(0.01, r) for r in ratios]

    assert codes(fold(model(2), rows, losses=STILL, update_ratio=probes(2.0, 2.0, 2.0))[1]) == [
        ("GW202", "l1", Severity.WARNING)
    ]
    assert fold(model(2), rows, losses=STILL, update_ratio=probes(2.0, 2.0, 0.5))[1] == []
    assert codes(fold(model(2), rows, losses=STILL, update_ratio=probes(50.0))[1]) == [
        ("GW202", "l1", Severity.WARNING)
    ]
    assert fold(model(2), rows, losses=STILL, update_ratio=probes(math.inf))[1] == []  # it began at zero


def test_an_update_of_weights_near_zero_is_held_against_weights_of_ordinary_size():
    rows = [(1.0, 1.0)] * 20
    column = [None] * 19 + [(0.01, 1000.0)]

    def found(weight):
        return fold(model(2), rows, losses=STILL, update_ratio=column, weight_norm=[(1.0, weight)] * 20)[1]

    assert codes(found(1.0)) == [("GW202", "l1", Severity.WARNING)]
    assert found(1e-4) == []  # of shape (4, 4), so 2 / sqrt(3) is ordinary: it moves by 0.09 of that


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e6])
def test_a_loss_that_hangs_on_its_weights_by_a_thousand_times_itself_began_exploded(scale):
    def found(sensitivity, losses):
        rows = [(10.0 * scale, sensitivity * scale)] * 20
        return codes(fold(model(2), rows, losses=[loss * scale for loss in losses])[1])

    assert found(2000.0, STILL[:20]) == [("GW207", "l1", Severity.WARNING)]
    assert found(500.0, STILL[:20]) == []
    assert found(2000.0, [0.01, 20.0] * 10) == []  # small by chance: held against the largest
    assert found(2000.0, [1.0, -1.0] * 10) == []  # without a size of its own
    assert found(2000.0, [3000.0] * 5 + [1.0] * 15) == []


def test_a_jump_has_to_exceed_what_the_loss_scatters_by_itself():
    rng = np.random.default_rng(0)
    wavers = (rng.standard_normal(400) ** 2 * np.exp(-np.arange(400) / 100)).tolist()  # squares of single errors

    def said(losses):
        history, steps = History(), []
        for step, loss in enumerate(losses):
            history.add(Snapshot(step, 0.0, model(1), optimizer=0, loss=loss, norm=(1.0,), weight_norm=(1.0,)))
            steps += [(step, f.onset) for f in findings(history) if f.code == "GW203"]
        return steps

    assert said(wavers) == []
    began, onset = said([*wavers[:60], *(loss * 1e6 for loss in wavers[60:120])])[0]
    assert (began, onset) == (64, 60)
    began, onset = said([1.0] * 30 + [50.0] * 10)[0]
    assert (began, onset) == (34, 30)  # the step of the jump itself


@pytest.mark.parametrize("losses", [[0.0] * 60, [-1.0 - i / 9 for i in range(60)], [3.0 - i / 9 for i in range(60)]])
def test_a_loss_that_has_no_size_is_no_evidence(losses):
    history, found = fold(model(2), [(1e-7, 1e-7)] * 60, losses=losses)

    assert history.improved is None
    assert history.scatter is None
    assert not history.at_best
    assert found == []  # neither standing still (GW102) nor jumped (GW203)


def test_a_loss_that_comes_down_to_zero_has_improved():
    history, _ = fold(model(2), [(1.0, 1.0)] * 40, losses=[1.0] * 10 + [0.0] * 30)

    assert history.improved is True


def test_growth_by_depth_is_excused_only_by_a_loss_that_came_down_as_far():
    many = model(8)
    grown = tuple(ActivationStats(f"l{i}", 10.0 ** ((7 - i) / 2)) for i in range(8))  # 3,162 times

    def said(losses, **kw):
        return codes(fold(many, [(1.0,) * 8] * 20, losses=losses, activations=[grown] * 20, **kw)[1])

    found = [("GW206", "", Severity.WARNING)]
    assert said(STILL) == said(None) == found
    assert said([1e13 * 0.8**i for i in range(20)]) == found  # it comes down, and is no nearer to where it should be
    assert said([1e13] * 5 + [1.0] * 15) == []


def test_a_loss_that_jumps_and_stays_up_explodes():
    rows = [(1.0, 1.0)] * 40

    assert codes(fold(model(2), rows, losses=[1.0] * 30 + [50.0] * 10)[1]) == [("GW203", "", Severity.ERROR)]
    assert fold(model(2), rows, losses=[1.0] * 35 + [50.0] + [1.0] * 4)[1] == []
    assert fold(model(2), rows, losses=[1.0] * 10 + [0.001] * 20 + [0.1] * 10)[1] == []  # near zero a loss may waver


def test_what_grew_before_it_became_infinite_exploded():
    rows = [(10.0**i, 1.0) for i in range(6)] + [(math.nan, math.nan)]

    assert [f.code for f in fold(model(2), rows)[1]] == ["GW501", "GW205"]
    assert [f.code for f in fold(model(2), [(1.0, 1.0)] * 6 + [(math.nan, 1.0)])[1]] == ["GW501"]


def test_a_weight_that_grew_in_the_one_step_before_the_nan_exploded():
    info = model(1)
    columns = {"weight_norm": [(1.0,), (1e6,)]}

    assert [f.code for f in fold(info, [(5.0,), (math.nan,)], **columns)[1]] == ["GW501", "GW205"]


# --- non-finite ---


def test_a_nan_is_found_at_once_at_the_layer_nearest_to_the_loss():
    _, found = fold(model(3), [(1.0, 1.0, 1.0), (math.nan, math.inf, 1.0)])

    assert codes(found) == [("GW501", "l1", Severity.ERROR)]
    assert (found[0].parameter, found[0].onset) == ("l1.weight", 1)


def test_a_step_that_the_scaler_skipped_is_no_alarm_until_it_skips_on_and_on():
    rows = [(math.inf,)] * 26
    skips = [True] * 26

    assert fold(model(1), rows[:24], skipped=skips[:24])[1] == []
    assert codes(fold(model(1), rows, skipped=skips)[1]) == [("GW502", "", Severity.ERROR)]


# --- disconnected ---


def test_a_layer_that_ran_and_got_nothing_ten_times_is_disconnected():
    rows = [(None, None, 1.0)] * 10
    absent = [None] + [("disconnected", "disconnected", None)] * 9

    _, found = fold(model(3), rows, absent=absent)

    assert codes(found) == [("GW401", "l0", Severity.ERROR)]
    assert found[0].names["last"] == "l1"
    assert fold(model(3), rows[:9], absent=absent[:9])[1] == []


@pytest.mark.parametrize("reason", ["unused", "frozen"])
def test_a_layer_that_did_not_run_or_is_frozen_is_not(reason):
    assert fold(model(2), [(None, 1.0)] * 20, absent=[(reason, None)] * 20)[1] == []


def test_a_branch_that_runs_every_other_time_is_not():
    rows = [(None, 1.0) if i % 2 else (1.0, 1.0) for i in range(20)]
    absent = [("disconnected", None) if i % 2 else None for i in range(20)]

    assert fold(model(2), rows, absent=absent)[1] == []


def test_exact_zeros_behind_which_nothing_fades_are_a_cut():
    assert codes(fold(model(3), [(0.0, 1.0, 1.0)] * 20)[1]) == [("GW401", "l0", Severity.ERROR)]
    assert fold(model(3), [(0.0, 1.0, 1.0)] * 19)[1] == []


def test_zeros_behind_a_weight_that_is_zero_are_how_lora_begins():
    weights = [(1.0, 0.0, 1.0)] + [None] * 24

    assert fold(model(3), [(0.0, 1.0, 1.0)] * 25, weight_norm=weights)[1] == []


def test_a_model_that_has_converged_to_the_last_bit_is_not_ill():
    rows = [(1.0, 1.0)] * 10 + [(0.0, 0.0)] * 25
    falling = [1.0 if i < 5 else 0.0 for i in range(35)]

    assert fold(model(2), rows, losses=falling)[1] == []


def test_a_loss_of_zero_from_the_start_and_gradients_of_zero_leave_nothing_to_learn():
    zeros, weighed = [(0.0, 0.0)] * 25, {"weight_norm": [(1.0, 1.0)] * 30}

    _, found = fold(model(2), zeros, losses=[-0.0] * 25, **weighed)
    assert codes(found) == [("GW401", "l0", Severity.WARNING)]
    assert found[0].cause == "no_signal"
    assert "the loss is exactly 0 as well" in explain(found[0]).cause
    assert "rewards or advantages that are all equal" in explain(found[0]).remedy
    # One such batch is no fault, and where there was a gradient before, the task may be done.
    assert fold(model(2), [(0.0, 0.0), (1.0, 1.0)] * 12 + [(0.0, 0.0)], losses=[0.0] * 25, **weighed)[1] == []
    losses, weighed = [-1e-9, 1e-9, -1e-9, 1e-9, -1e-9] + [0.0] * 50, {"weight_norm": [(1.0, 1.0)] * 55}
    _, found = fold(model(2), [(1e-9, 1e-9)] * 5 + zeros * 2, losses=losses, **weighed)
    assert codes(found) == [("GW401", "l0", Severity.INFO)]
    # A dead network has a loss.
    _, found = fold(model(2), zeros, losses=STILL, **weighed)
    assert codes(found) == [("GW401", "l0", Severity.ERROR)]
    assert found[0].cause == ""


def test_below_epsilon_and_then_exactly_zero_is_another_fault():
    rows = [(1e-12, 1e-12)] * 24 + [(0.0, 0.0)]

    assert [f.code for f in fold(model(2, adaptive=True), rows[:24], losses=STILL)[1]] == ["GW102", "GW703"]
    assert [f.code for f in fold(model(2, adaptive=True), rows, losses=STILL)[1]] == ["GW102"]


# --- hysteresis, and words ---


@pytest.mark.parametrize(
    ("code", "place", "rows", "losses"),
    [
        ("GW101", "l0", lambda x: [(1e-3 * x, 1.0)] * 20, None),
        ("GW102", "", lambda x: [(1e-4 * x, 1e-4 * x)] * 25, lambda _: [1.0] * 25),
        ("GW201", "", lambda x: [(1.0, 1.0)] * 20 + [(100 / x, 100 / x)] * 5, lambda _: STILL),
        ("GW203", "", lambda _: [(1.0, 1.0)] * 40, lambda x: [1.0] * 30 + [20 / x] * 10),
    ],
)
def test_an_open_alert_clears_only_well_above_its_limit(code, place, rows, losses):
    def found(times, *opened):
        history, _ = fold(model(2), rows(times), losses=losses and losses(times))
        history.note_open(frozenset((known, at, None, None) for known, at in opened))
        return [(f.code, f.place) for f in findings(history)]

    assert found(0.9) == [(code, place)]  # the number is so many times better than the limit
    assert found(2.0) == []
    assert found(2.0, (code, place)) == [(code, place)]
    assert found(2.0, (code, "l1"), ("GW999", place)) == []
    assert found(3.5, (code, place)) == []


def test_every_rule_is_explained_with_its_place_and_a_remedy():
    samples = {f.code: f for rows, kw in _one_of_each() for f in fold(*rows, **kw)[1]}

    assert set(samples) == set(RULES)
    for code, finding in samples.items():
        said = explain(finding)
        assert said.message, code
        assert not said.message.endswith("."), code
        if code not in ("GW103", "GW204"):  # the user's own limits have no cause of ours
            assert said.cause
            assert said.remedy, code
        if finding.place:
            assert finding.place in f"{said.message} {said.remedy}", code


def _of_parts():
    two, seen = model(2), [(ActivationStats("l1", 1.0),)] * 3
    rested = {"update_ratio": [(0.0, 1e-2)] * 25, "weight_norm": [(1.0, 1.0)] * 25}
    yield (two, [(1.0, 1.0)] * 25), {"losses": STILL, **rested}
    yield (two, [(1.0, 1.0)] * 3), {"crossed": [8] * 3, "activations": seen}
    shut = [(ActivationStats("l0", saturated=1.0, function="tanh"),)] * 27
    yield (two, [(0.0, 1.0), (1.0, 1.0)] * 13 + [(0.0, 1.0)]), {"losses": STILL, "activations": shut}
    yield (two, [(1.0, 1.0)] * 8), {"losses": [math.nan] * 8}
    yield (model(3), [(1.0, 1.0, 1.0)] * 20 + [(None, None, 1.0)] * 50), {}
    yield (two, spiky(8, 400.0)), {"losses": STILL}
    behind = (Fact("l0", "steps_behind", 30.0),)
    yield (two, [(1.0, 1.0)] * 3), {"activations": seen, "facts": [behind] * 3}
    faint = (Fact("l0", "input_size", 1e-6),)
    guess = (Fact("l1", "chance", 0.1), Fact("l1", "cross_entropy", 1.0))
    bias = ParameterInfo("l0.bias", "l0", (4,), "float32", 0, "bias")
    biased = dataclasses.replace(two, parameters=(*two.parameters, bias))
    looks = {"losses": [1.0] * 25, "activations": [seen[0]] * 25}
    yield (biased, [(1.0, 1.0, 1.0)] * 25), {**looks, "facts": [faint] * 25}
    yield (two, [(1.0, 1.0)] * 25), {**looks, "facts": [guess] * 25}
    moved = {"update_ratio": [(1e-2, 1e-2)] * 25, "weight_norm": [(1.0, 1.0)] * 25}
    yield (two, [(1.0, 1.0)] * 25), {"losses": [0.7] * 25, **moved}
    rnn = dataclasses.replace(
        two,
        layers=(LayerInfo("l0", "GRU", 0), LayerInfo("l1", "Linear", 1)),
        parameters=tuple(
            ParameterInfo(f"l0.{kind}_l0", "l0", (4, 4), "float32", 0, "weight")
            for kind in ("weight_ih", "weight_hh", "bias_hh")
        ),
    )
    read = SequenceStats("l0", length=60)
    yield (rnn, [(1.0, 0.0, 1.0)] * 20), {"sequences": [(read,)] * 20}


def _one_of_each():
    yield from _of_parts()
    two, one = model(2), model(1)
    yield (two, [(1e-9, 1.0)] * 20), {}
    yield (two, [(1e-7, 1e-7)] * 25), {"losses": [1.0] * 25}
    yield (two, [(1e-9, 1e-9)] * 25), {"thresholds": Thresholds(norm_below=1e-6)}
    yield (two, [(1.0, 1.0)] * 20 + [(200.0, 200.0)] * 5), {"losses": STILL}
    yield (two, [(1.0, 1.0)] * 20), {"losses": STILL, "update_ratio": [None] * 19 + [(50.0, 0.1)]}
    yield (two, [(1.0, 1.0)] * 40), {"losses": [1.0] * 30 + [50.0] * 10}
    yield (two, [(9.0, 9.0)]), {"thresholds": Thresholds(norm_above=10.0)}
    yield (one, [(1.0,), (1e9,), (math.nan,)]), {}
    yield (two, [(1.0, 2000.0)] * 20), {"losses": STILL}
    yield (two, [(0.0, 1.0)] * 20), {}
    yield (two, [(math.nan, 1.0)]), {}
    yield (one, [(math.inf,)] * 26), {"skipped": [True] * 26}
    many, adam = model(8), model(2, adaptive=True)
    growing = tuple(ActivationStats(f"l{i}", 10.0 ** (7 - i)) for i in range(8))
    yield (many, [(1.0,) * 8] * 20), {"losses": STILL, "activations": [growing] * 20}
    yield (
        (two, [(1.0, 1.0)] * 3),
        {"activations": [(ActivationStats("l0", 1.0, dead=0.75, units=4), ActivationStats("l1", 1.0))] * 3},
    )
    yield (two, [(1e-9, 1e-9)] * 2), {"zeros": [(0.9, 0.9)] * 2, "subnormal": [(1.0, 1.0)] * 2}
    yield (two, [(1.0, 1.0)] * 2), {"zeros": [(0.0, 0.0)] * 2, "lost": [(0.9, 0.9)] * 2}
    narrow = (Flow("l0", barrier=Barrier("l1", "layer_norm", 1)),)
    yield (two, [(1e-8, 1.0)]), {"flows": [narrow]}
    yield (adam, [(1e-12, 1e-12)] * 25), {"losses": [1.0] * 25}
    still = {"update_ratio": [(0.0, 0.0)] * 25, "weight_norm": [(1.0, 1.0)] * 25}
    yield (two, [(1.0, 1.0)] * 25), {"losses": STILL, "rate": [0.0] * 25, **still}
    yield (two, [(1.0, 1.0)] * 25), {"losses": STILL, "clip_factor": [1e-5 + 1e-6 * i for i in range(25)], **still}
    yield (two, [(1.0, 1.0)] * 2), {"left_over": [0.5] * 2}
    yield (two, [(1.0, 1.0)] * 25), {"losses": STILL, "came": [0.02] * 25, "update_ratio": [(1e-2, 1e-2)] * 25}
    yield (one, [(1.0,)] * 50), {"skipped": [i % 3 == 0 for i in range(50)]}
    yield (two, [(1.0, 1.0)] * 200), {"losses": STILL}
    yield (two, [(None, None)]), {"silence": [Silence(0, 0, told=10, by="AdamW")]}
    yield (two, [(None, None)]), {"silence": [Silence(0, 10)], "absent": [("disconnected",) * 2]}
    parameters = (two.parameters[0], dataclasses.replace(two.parameters[1], optimizer=None, trainable=True))
    left_out = dataclasses.replace(two, parameters=parameters)
    yield (left_out, [(1.0, None)] * 20), {}
    strays = (Stray(0, (4, 4), parameter=True, kind="Linear", weight_norm=1.0),)
    seen = [(ActivationStats("l1", 1.0),)] * 3
    yield (two, [(1.0, 1.0)] * 3), {"strays": [strays] * 3, "activations": seen}
    yield (two, [(1.0, 1.0)] * 3), {"squashed": [Squashed("l1", "softmax", "softmax", 5)] * 3, "activations": seen}
    fades, grows = tuple(0.5**lag for lag in range(60)), tuple(1.5**lag for lag in range(60))
    for stats in (
        SequenceStats("l0", length=60, lag_gain=fades),
        SequenceStats("l0", length=60, lag_gain=grows, reached=60),
        SequenceStats("l0", length=60, need=200, lag_gain=grows),
        SequenceStats("l0", length=60, padding=40.0, grad_data=1e-9),
        SequenceStats("l0", length=60, over_batch=True),
    ):
        yield (one, [(1.0,)] * 4), {"sequences": [(stats,)] * 4}
    full = {"forget_gate": 0.99, "input_gate": 0.5, "cell_saturation": 0.8}
    facts = tuple(Fact("l0", name, value, "l0") for name, value in full.items())
    cells = [(SequenceStats("l0", length=60, kind="LSTM"),)] * 12
    yield (one, [(1.0,)] * 12), {"sequences": cells, "facts": [facts] * 12, "losses": [1.0] * 12}


@pytest.mark.parametrize(
    ("dead", "units", "severity"),
    [
        (0.75, 4, Severity.INFO),  # a squeeze rests with three of its four units
        (1.0, 4, Severity.WARNING),
        (0.75, 64, Severity.WARNING),
        (0.625, 8, Severity.WARNING),
    ],
)
def test_a_handful_of_dead_units_is_information_unless_there_are_no_others(dead, units, severity):
    looks = [(ActivationStats("l0", 1.0, dead=dead, units=units), ActivationStats("l1", 1.0))] * 3
    found = fold(model(2), [(1.0, 1.0)] * 3, activations=looks)[1]
    assert [(f.code, f.severity) for f in found if f.code == "GW601"] == [("GW601", severity)]


def test_zeros_beside_entries_of_full_size_are_not_flushed():
    assert fold(model(2), [(1e-9, 1e-9)] * 2, zeros=[(0.9, 0.9)] * 2, subnormal=[(0.1, 0.1)] * 2)[1] == []


def test_of_what_is_not_finite_the_first_step_tells_the_cause():
    _, found = fold(model(2), [(1.0, 1.0), (1.0, math.nan), (math.nan, math.nan)], losses=[1.0, 2.0, math.nan])
    (finding,) = (f for f in found if f.code == "GW501")

    assert (finding.onset, finding.place, finding.evidence["layers"], finding.evidence["loss"]) == (1, "l1", 1.0, 2.0)


def test_a_finding_of_ones_own_is_told_by_its_numbers():
    said = explain(Finding("MY1", "mine", Severity.INFO, "head", evidence={"norm": 1.5e-7}, names={"of": "all"}))

    assert said.message == "head: norm 1.5e-07, of all"


# --- detectors do not cost more than they promise to know: they are pure ---


def test_detectors_do_not_change_the_history():
    history, first = fold(model(3), [(0.0, 1e-9, 1.0)] * 30, losses=STILL)

    assert findings(history) == first


# --- small trainings ---


def train(net, *, steps=60, lr=0.05, scale=1.0, loss=True, optimizer=torch.optim.SGD, seed=0, **options):
    torch.manual_seed(seed)
    opt = optimizer(net.parameters(), lr=lr / scale if optimizer is torch.optim.SGD else lr)
    with gradwatch.watch(net, opt, on_alert=lambda _: None, **options) as watcher:
        alerts = []
        for _ in range(steps):
            x = torch.randn(64, 8)
            value = nn.functional.mse_loss(net(x), x.sum(1, keepdim=True)) * scale
            if loss:
                watcher.record(value)
            opt.zero_grad()
            value.backward()
            opt.step()
            alerts += watcher.report.began
    return [(a.finding.code, a.finding.place, a.severity, a.began) for a in alerts]


def network(activation, depth=16):
    torch.manual_seed(1)
    return deep(depth, 8, activation)


@pytest.mark.parametrize("loss", [True, False])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_a_deep_sigmoid_network_alerts_at_its_first_layer(loss, optimizer):
    assert train(network(nn.Sigmoid), loss=loss, optimizer=optimizer, lr=1e-2) == [("GW101", "0", Severity.WARNING, 19)]


@pytest.mark.parametrize("loss", [True, False])
def test_a_shallow_network_does_not(loss):
    assert train(network(nn.Tanh, depth=2), loss=loss, steps=120) == []


def test_muting_by_code_and_by_place():
    assert train(network(nn.Sigmoid), ignore=["GW101"]) == []
    assert train(network(nn.Sigmoid), ignore=["GW101:0"]) == []
    assert train(network(nn.Sigmoid), ignore=["GW101:head"]) != []


def test_numpy_numbers_do_not_leak_into_findings():
    _, found = fold(model(3), [(1e-9, 1.0, 1.0)] * 25, losses=STILL)

    assert not any(isinstance(v, np.generic) for f in found for v in f.evidence.values())
    assert all(isinstance(v, float) for f in found for v in f.evidence.values())


# --- gradients that spike ---


def spiky(every, height, *, usual=1.0):
    return [(height if step > 20 and step % every == 0 else usual if step > 20 else 1.0, 1.0) for step in range(90)]


def test_a_gradient_that_spikes_again_and_again_while_the_loss_stands_is_told_since_the_first_of_the_last_50_steps():
    (found,) = (f for f in fold(model(2), spiky(8, 400.0), losses=STILL)[1] if f.kind == "exploding")

    assert (found.code, found.severity, found.onset) == ("GW208", Severity.WARNING, 40)
    assert found.evidence["spikes"] == 7
    assert found.evidence["times"] == pytest.approx(400 / math.sqrt(2), rel=1e-3)
    assert "at 7 of the last 50 steps the global gradient norm is 30 to 2.8e+02 times" in explain(found).message


@pytest.mark.parametrize(
    ("rows", "options"),
    [
        (spiky(15, 400.0), {"losses": STILL}),  # now and then
        (spiky(8, 20.0), {"losses": STILL}),
        (spiky(8, 400.0), {"losses": [1.0 / (step + 1) for step in range(90)]}),
        (spiky(8, 400.0), {"losses": [(-1) ** step * 2.0 - step / 50 for step in range(90)]}),  # falls, and crosses 0
        (spiky(8, 400.0), {"losses": STILL, "clip_factor": [1 / 300 if n[0] > 100 else 1.0 for n in spiky(8, 400.0)]}),
        (spiky(8, 400.0), {}),
        (spiky(8, 400.0), {"losses": [-1.0] * 90}),
        (spiky(8, 400.0), {"losses": [None if s > 20 and s % 8 == 0 else 1.0 for s in range(90)]}),  # of another's step
        (spiky(8, 400.0), {"losses": [300.0 if s > 20 and s % 8 == 0 else 1.0 for s in range(90)]}),  # of another loss
        ([(1e-3, 1e-3) if s > 20 and s % 8 else (1.0, 1.0) for s in range(90)], {"losses": STILL}),  # it has faded
        (spiky(8, 400.0), {"losses": STILL, "skipped": [s > 20 and s % 8 == 0 for s in range(90)]}),
    ],
)
def test_what_is_rare_clipped_skipped_or_does_no_harm_is_no_spike(rows, options):
    assert [f for f in fold(model(2), rows, **options)[1] if f.code == "GW208"] == []


class Tagged(nn.Module):
    """Tags words by a conditional random field; what may not follow each other begins, and stays, at -10,000."""

    def __init__(self, forbidden=-1e4):
        super().__init__()
        torch.manual_seed(0)
        self.emit, self.follow = nn.Linear(6, 5), nn.Parameter(0.1 * torch.randn(5, 5))
        with torch.no_grad():
            self.follow[[0, 2, 4], 3] = forbidden

    def forward(self, x, tags):
        scores = self.emit(x)
        told = scores.gather(2, tags[..., None]).sum((1, 2)) + self.follow[tags[:, :-1], tags[:, 1:]].sum(1)
        alpha = scores[:, 0]
        for t in range(1, x.shape[1]):
            alpha = torch.logsumexp(alpha[:, :, None] + self.follow, 1) + scores[:, t]
        return (torch.logsumexp(alpha, 1) - told).mean()


def test_of_weights_whose_norm_a_few_masks_hold_nothing_is_said_that_takes_their_size():
    net, alerts = Tagged(), []
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    with gradwatch.watch(net, optimizer, on_alert=alerts.append) as watcher:
        for step in range(40):
            draw = torch.Generator().manual_seed(step)
            tags = torch.randint(3, (16, 8), generator=draw)
            x = nn.functional.one_hot(tags, 6).float() + 0.3 * torch.randn(16, 8, 6, generator=draw)
            optimizer.zero_grad()
            loss = net(x, tags)
            watcher.record(loss)
            loss.backward()
            sensitivity = net.follow.norm() * net.follow.grad.norm() / loss.detach()
            optimizer.step()
            assert step or sensitivity > Thresholds().explosion_sensitivity  # as the rule sees it
    assert [a for a in alerts if a.severity > Severity.INFO] == []
