"""What is found through time, and what is left alone: horizons drawn by hand."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn
from truth import codes, gain

import gradwatch
from gradwatch import (
    DETECTORS,
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
from gradwatch.detectors.alerts import advance
from gradwatch.detectors.time import through_time
from gradwatch.values.sequences import SequenceStats
from gradwatch.values.snapshot import Fact


def model(**kinds):
    layers = tuple(LayerInfo(name.replace("__", "."), kind, order) for order, (name, kind) in enumerate(kinds.items()))
    return ModelInfo(
        layers,
        tuple(ParameterInfo(f"{x.name}.w", x.name, (2,), "float32", 0, "weight") for x in layers),
        (OptimizerInfo("Adam", True, 1e-8),),
    )


RNN = model(rnn="RNN", head="Linear")
TWO = model(encoder="LSTM", decoder="GRU", head="Linear")


def whole(rate, need=200, length=250, **fields):
    return SequenceStats(
        "", "model", length, lag_gain=None if rate is None else gain(rate, length), need=need, **fields
    )


def own(rate, name="rnn", length=250, **fields):
    return SequenceStats(name, "", length, lag_gain=None if rate is None else gain(rate, length), **fields)


def fold(*probes, info=RNN, every=10, facts=(), opened=(), thresholds=None, losses=None):
    """Fold probes every 10 steps, from step 10 on, with nine other steps between, and give the history."""
    history = History(thresholds)
    for number, sequences in enumerate(probes, 1):
        for step in range((number - 1) * every + 1, number * every + 1):
            probe = {"sequences": sequences, "facts": tuple(facts)} if step == number * every else {}
            loss = None if losses is None else losses[step - 1]
            history.add(Snapshot(step, 0.0, info, 0, norm=(1.0,) * len(info.parameters), loss=loss, **probe))
    history.note_open(frozenset((code, place, None, None) for code, place in opened))
    return history


def found(*probes, **options):
    return list(through_time(fold(*probes, **options)))


SHORT, LONG = 0.64, 0.99  # horizons 16, and 688
WARNED = [("GW301", "rnn", Severity.WARNING)]


# --- a need of the model ---


def test_a_model_that_does_not_reach_its_need_at_four_probes_is_warned_of_at_its_sequence_module():
    (finding,) = found(*[(own(SHORT), whole(SHORT))] * 4)

    assert codes([finding]) == WARNED
    assert (finding.kind, finding.lag, finding.onset) == ("vanishing-time", 16, 10)
    assert finding.names["who"] == "the model"
    assert {k: finding.evidence[k] for k in ("horizon", "length", "need")} == {
        "horizon": 16.0,
        "length": 250.0,
        "need": 200.0,
    }
    assert finding.evidence["decay_rate"] == pytest.approx(SHORT)


def test_three_probes_are_not_enough():
    assert found(*[(own(SHORT), whole(SHORT))] * 3) == []


def test_one_probe_that_reaches_it_among_four_is_enough_to_wait():
    assert found((whole(SHORT),), (whole(SHORT),), (whole(LONG),), (whole(SHORT),)) == []


def test_the_horizon_meets_the_need_that_it_is_equal_to():
    probes = [(whole(SHORT, need=16),)] * 4
    assert found(*probes) == []
    assert codes(found(*[(whole(SHORT, need=17),)] * 4)) == [("GW301", "", Severity.WARNING)]


def test_a_short_module_under_a_model_that_reaches_far_is_not_even_information():
    assert found(*[(own(SHORT), whole(1.0))] * 4) == []


def test_a_horizon_that_is_growing_is_opening():
    rates = [0.5, 0.6, 0.7, 0.8]  # horizons 10, 14, 20, 31

    assert found(*[(whole(r),) for r in rates]) == []
    assert codes(found(*[(whole(r),) for r in [0.5, 0.5, 0.5, 0.55]])) == [("GW301", "", Severity.WARNING)]


def test_between_two_probes_the_last_one_holds_however_long():
    history = fold(*[(own(SHORT), whole(SHORT))] * 4)
    for step in range(41, 141):  # more than the window
        history.add(Snapshot(step, 0.0, RNN, 0, norm=(1.0, 1.0)))

    assert codes(through_time(history)) == WARNED


def test_an_open_alert_clears_only_when_two_probes_in_a_row_reach_the_need():
    opened = [("GW301", "rnn")]
    ill, well = (own(SHORT), whole(SHORT)), (own(SHORT), whole(LONG))

    assert codes(found(ill, ill, ill, ill, well, opened=opened)) == WARNED
    assert found(ill, ill, ill, ill, well, opened=opened)[0].lag == 16  # what it tells of is the short one
    assert codes(found(ill, ill, ill, well, ill, opened=opened)) == WARNED
    assert found(ill, ill, ill, well, well, opened=opened) == []
    assert found(ill, ill, ill, well, ill) == []  # which is not enough to begin


def test_an_open_alert_does_not_clear_because_the_horizon_grows():
    rates = [0.5, 0.6, 0.7, 0.8]

    assert codes(found(*[(own(r), whole(r)) for r in rates], opened=[("GW301", "rnn")])) == WARNED


def test_an_alert_lives_from_the_fourth_probe_until_the_second_that_reaches_the_need_and_a_window_more():
    history, alerts, log = History(), (), []
    for step in range(1, 121):
        rate = SHORT if step <= 60 else LONG
        history.note_open(frozenset(a.finding.key for a in alerts))
        history.add(
            Snapshot(
                step, 0.0, RNN, 0, norm=(1.0, 1.0), sequences=(own(SHORT), whole(rate)) if step % 10 == 0 else None
            )
        )
        findings = [dataclasses.replace(f, optimizer=0) for f in through_time(history)]
        began, alerts, cleared = advance(
            alerts, findings, [s.step for s in history.window()], optimizer=0, patience=20, rules=RULES
        )
        log += [("began", step, a.finding.onset) for a in began] + [("cleared", step) for _ in cleared]

    assert log == [("began", 40, 10), ("cleared", 99)]


def test_of_several_modules_the_place_is_the_one_with_the_shortest_horizon_and_stays_so_while_it_is_open():
    a, b = own(0.8, "encoder"), own(0.7, "decoder")

    assert [f.place for f in found(*[(a, b, whole(SHORT))] * 4, info=TWO)] == ["decoder"]
    assert [f.place for f in found(*[(a, b, whole(SHORT))] * 4, info=TWO, opened=[("GW301", "encoder")])] == ["encoder"]


def test_a_sequence_module_without_a_gain_is_still_the_place():
    assert [f.place for f in found(*[(SequenceStats("decoder", grad_input=(1.0,)), whole(SHORT))] * 4, info=TWO)] == [
        "decoder"
    ]


@pytest.mark.parametrize(
    ("layers", "place"),
    [
        (["inp", "blocks.0.attn.q", "blocks.0.attn.k", "blocks.0.ff", "blocks.1.ff", "head"], "blocks"),
        (["inp", "net.blocks.0.a", "net.blocks.0.b", "net.blocks.1.a", "head"], "net.blocks"),
        (["a", "b"], ""),
        (["a.x", "b.x"], ""),
        (["only"], "only"),
        (["net", "net.a", "net.b", "head"], "net"),
    ],
)
def test_without_a_sequence_module_the_place_is_what_holds_most_of_the_layers(layers, place):
    info = model(**dict.fromkeys((x.replace(".", "__") for x in layers), "Linear"))

    assert [f.place for f in found(*[(whole(SHORT),)] * 4, info=info)] == [place]


def test_a_model_that_could_not_be_measured_is_judged_by_its_module_for_information():
    (finding,) = found(*[(own(SHORT), whole(None, note="the model is wrapped in FSDP"))] * 4)

    assert codes([finding]) == [("GW301", "rnn", Severity.INFO)]
    assert explain(finding).message.endswith(
        "and the need is 200 (judged by this module alone: the model is wrapped in FSDP)"
    )
    assert found(*[(own(LONG), whole(None, note="the model is wrapped in FSDP"))] * 4) == []


def test_where_there_is_no_module_either_that_is_said():
    (finding,) = found((whole(None, note="its forward pass failed"),))

    assert codes([finding]) == [("GW304", "", Severity.INFO)]
    assert (
        explain(finding).message
        == "whether the model learns from 200 timesteps is not measured: its forward pass failed"
    )


# --- sequences shorter than the need ---


def test_sequences_that_end_before_the_need_cannot_be_judged_and_say_so_at_once():
    (finding,) = found((own(LONG, length=100), whole(LONG, length=100)))

    assert codes([finding]) == [("GW304", "rnn", Severity.INFO)]
    assert explain(finding).message == "the sequences have 100 timesteps, the need is 200"


@pytest.mark.parametrize(("assumed", "said"), [(True, ", assumed"), (False, "")])
def test_sequences_that_seem_too_short_say_which_dimension_was_taken_for_time(assumed, said):
    seen = {"length": 20, "input": "spect", "time": 2, "time_assumed": assumed}
    (finding,) = found((own(LONG, length=80), whole(LONG, **seen)))
    told = explain(finding)
    assert told.message == f"the sequences have 20 timesteps of spect (time: dimension 2{said}), the need is 200"
    assert told.remedy.startswith("say by timesteps= which dimension is time") == assumed
    assert told.remedy.endswith("sequences of 200 timesteps or more, or lower the need")


def test_a_horizon_that_ends_within_short_sequences_is_judged():
    assert codes(found(*[(own(SHORT, length=100), whole(SHORT, length=100))] * 4)) == WARNED


def test_a_short_batch_among_long_ones_says_nothing():
    cut, ill, well = (whole(LONG, length=100),), (whole(SHORT),), (whole(LONG),)

    assert found(well, cut, well, cut) == []
    assert codes(found(ill, cut, ill, cut, ill, ill)) == [("GW301", "", Severity.WARNING)]
    assert found(ill, cut, ill, cut, ill) == []


# --- a need of a module, and none ---


def test_a_module_with_a_need_is_judged_by_its_own_horizon_and_the_others_are_information():
    findings = found(*[(own(SHORT, "encoder", need=50), own(SHORT, "decoder"))] * 4, info=TWO)

    assert codes(findings) == [("GW301", "encoder", Severity.WARNING), ("GW301", "decoder", Severity.INFO)]
    assert "need" not in findings[1].evidence


def test_without_a_need_a_horizon_of_at_most_half_of_the_sequence_is_information():
    info = [("GW301", "rnn", Severity.INFO)]

    assert codes(found(*[(own(SHORT, length=32),)] * 4)) == info
    assert found(*[(own(SHORT, length=31),)] * 4) == []
    assert found(*[(own(0.99, length=250),)] * 4) == []
    assert (
        codes(found(*[(own(SHORT, length=250),)] * 3 + [(own(LONG, length=250),)], opened=[("GW301", "rnn")])) == info
    )


def test_a_module_with_a_need_of_its_own_that_has_no_gain_says_why():
    (finding,) = found((own(None, need=50, note="it was compiled"),))

    assert codes([finding]) == [("GW304", "rnn", Severity.INFO)]
    assert explain(finding).message == "whether rnn learns from 50 timesteps is not measured: it was compiled"


def test_parts_have_no_horizon_of_their_own_to_judge():
    part = SequenceStats("rnn", "l0", 250, lag_gain_hidden=gain(SHORT, 250))

    assert found(*[(own(LONG), part)] * 4) == []


def test_a_horizon_by_another_share_is_judged_by_it():
    probes = [(whole(0.9, need=60),)] * 4  # 66 at 1e-3, 22 at 0.1

    assert found(*probes) == []
    assert [f.lag for f in found(*probes, thresholds=Thresholds(horizon_gain=0.1))] == [22]
    assert [
        f.lag for f in found(*[(own(0.9, need=60),)] * 4, thresholds=Thresholds(layers={"rnn": {"horizon_gain": 0.1}}))
    ] == [22]


# --- in words ---


def test_the_evidence_is_in_the_words_that_were_asked_for():
    length = 250
    drawn = (*(0.64**lag for lag in range(15)), *(0.64**lag * 1e-6 for lag in range(15, length)))
    stats = SequenceStats("", "model", length, lag_gain=drawn, need=200)
    (finding,) = found(*[(own(SHORT), dataclasses.replace(stats, lag_gain=tuple(drawn)))] * 4)
    rate = finding.evidence["decay_rate"]
    said = explain(
        dataclasses.replace(
            finding, evidence={**finding.evidence, "decay_rate": 0.64, "half_life": math.log(0.5) / math.log(0.64)}
        )
    ).message

    assert rate < 0.64  # the cliff is in the fit
    assert said == (
        "the model learns from the last 15 of 250 timesteps "
        "(the gain shrinks to 0.64 of itself a step, half-life 1.6 steps), and the need is 200"
    )


@pytest.mark.parametrize(
    ("kind", "facts", "cause", "remedy"),
    [
        (
            "LSTM",
            {
                ("forget_gate", "l0"): 0.9,
                ("forget_gate", "l1"): 0.52,
                ("forget_bias", "l0"): 0.01,
                ("forget_bias", "l1"): 0.02,
            },
            "its forget gates keep 0.52 of the cell at each step and their bias is 0.01",
            (
                "set the forget-gate bias of rnn to 5.3 (the log of 200) and the input-gate bias to -5.3; or a skip"
                " connection or attention from the timesteps that matter, or shorter windows"
            ),
        ),
        (
            "LSTM",
            {
                ("forget_gate", "l0"): 0.99,
                ("forget_bias", "l0"): 5.2,
                ("input_gate", "l0"): 0.5,
                ("input_bias", "l0"): 0.0,
                ("cell_saturation", "l0"): 0.82,
            },
            "its forget gates keep 0.99 of the cell and its input gates let in 0.50 of what is new, which adds up",
            "set the input-gate bias of rnn to -5.3; or a skip connection or attention",
        ),
        (
            "LSTM",
            {
                ("forget_gate", "l0"): 0.99,
                ("forget_bias", "l0"): 5.2,
                ("input_bias", "l0"): -5.3,
                ("cell_saturation", "l0"): 0.0,
            },
            "cause not measured: its forget gates keep 0.99 of the cell at each step",
            "a skip connection or attention from the timesteps that matter, or shorter windows",
        ),
        (
            "GRU",
            {("update_gate", "l0"): 0.995},
            "cause not measured: its update gates keep 0.99 of the state at each step",
            "a skip connection or attention from the timesteps that matter, or shorter windows",
        ),
        (
            "GRU",
            {("update_gate", "l0"): 0.48},
            "its update gates keep 0.48 of the state at each step",
            "set the update-gate bias of rnn to 5.3 (the log of 200); or a skip",
        ),
        (
            "RNN",
            {("spectral_radius", "l0"): 0.58, ("spectral_norm", "l0"): 1.1, ("saturation", "l0"): 0.02},
            "the spectral radius of W_hh is 0.58",
            (
                "initialize weight_hh of rnn as an orthogonal matrix, or use a GRU in its place with its update-gate"
                " bias set to 5.3 (the log of 200)"
            ),
        ),
        (
            "RNN",
            {("spectral_radius", "l0"): 1.4, ("saturation", "l0"): 0.34},
            (
                "the spectral radius of W_hh is 1.40, but the derivative of the activation takes more than that away, "
                "and 34% of its outputs are saturated"
            ),
            "initialize weight_hh of rnn",
        ),
        (
            "RNN",
            {("spectral_radius", "l0"): 0.6},
            "the spectral radius of W_hh is 0.60",
            "initialize weight_hh of rnn as the identity matrix, with biases of 0",
        ),
        ("RNN", {}, "cause not measured", "initialize weight_hh of rnn as an orthogonal matrix (tanh) or the identity"),
        ("LSTM", {}, "cause not measured", "set the forget-gate bias of rnn to 5.3"),
        (None, {("update_gate", "l0"): 0.48}, "its update gates keep 0.48", "set the update-gate bias of rnn"),
        (None, {}, "cause not measured", "in rnn: a longer field of view"),
    ],
)
def test_cause_and_remedy_are_those_of_the_module(kind, facts, cause, remedy):
    given = [Fact("rnn", name, value, part) for (name, part), value in facts.items()] + [
        Fact("other", "forget_gate", 0.1, "l0"),
        Fact("other", "saturation", 0.9, "l0"),
    ]
    if kind is None and facts:
        given = given[:-2]
    (finding,) = found(*[(own(SHORT, kind=kind), whole(SHORT))] * 4, facts=given)
    said = explain(finding)

    assert said.cause.startswith(cause)
    assert said.remedy.startswith(remedy)


def test_without_a_need_the_remedy_names_no_number():
    (finding,) = found(*[(own(SHORT, kind="RNN"),)] * 4)

    assert explain(finding).message == (
        "rnn learns from the last 16 of 250 timesteps (the gain shrinks to 0.64 of itself a step, half-life 1.6 steps)"
    )
    assert "to the log of the number of timesteps that matter" in explain(finding).remedy


# --- a state that is cut off ---


def cut(reached, length=64, **fields):
    return own(0.99, length=length, reached=reached, **fields)


def test_a_detached_state_is_information():
    (finding,) = found((own(LONG),), (cut(16),), (cut(16),))

    assert codes([finding]) == [("GW303", "rnn", Severity.INFO)]
    assert (finding.onset, finding.lag) == (20, 16)
    assert (
        explain(finding).message
        == "the state that rnn carries on is detached: no gradient goes back beyond the last 16 of 64 timesteps"
    )
    assert found((cut(16),), (own(LONG),)) == []


def test_a_detached_state_that_ends_before_the_need_is_a_warning_once_it_has_lasted():
    probe = (cut(64), whole(LONG, length=64))
    first, lasting = found(probe), found(*[probe] * 4)

    assert codes(first) == [("GW304", "rnn", Severity.INFO), ("GW303", "rnn", Severity.INFO)]
    assert codes(lasting) == [("GW303", "rnn", Severity.WARNING)]
    assert explain(lasting[0]).message == (
        "the state that rnn carries on is detached: no gradient goes back beyond the 64 timesteps of its sequences,"
        " and the need is 200"
    )
    assert explain(lasting[0]).remedy.startswith("carry the state of rnn on without detach() for 200 timesteps")


def test_a_detached_state_beyond_the_need_is_information_and_asks_for_no_declaration():
    (finding,) = found(*[(cut(64), whole(LONG, length=64, need=50))] * 4)

    assert codes([finding]) == [("GW303", "rnn", Severity.INFO)]
    assert "horizon=" not in explain(finding).remedy


def test_a_detached_state_is_judged_by_the_need_of_its_module_before_that_of_the_model():
    more, less = (found(*[(cut(64, need=need), whole(LONG, length=64, need=64))] * 4) for need in (100, 50))

    assert [(*codes([f]), f.evidence["need"]) for f in more] == [(("GW303", "rnn", Severity.WARNING), 100.0)]
    assert [(*codes([f]), f.evidence["need"]) for f in less] == [(("GW303", "rnn", Severity.INFO), 50.0)]


def test_where_a_need_is_not_met_for_it_the_detached_state_is_the_cause():
    stats = dataclasses.replace(cut(16), lag_gain=(1.0,) * 16 + (0.0,) * 48)
    probe = (stats, dataclasses.replace(stats, module="", part="model", need=64, reached=None))
    (finding,) = found(*[probe] * 4)

    assert codes([finding]) == WARNED
    assert (
        explain(finding).cause
        == "the state that it carries on is detached: no gradient goes back beyond the last 16 timesteps"
    )
    assert (
        explain(finding).remedy
        == "carry the state of rnn on without detach() for 64 timesteps, or feed it windows of that length"
    )
    assert found(probe) == []  # nor is it told apart on the way


def test_a_gain_that_fades_before_the_cut_has_both_causes_and_both_cures():
    stats = dataclasses.replace(cut(30, kind="RNN"), lag_gain=gain(SHORT, 64))
    probe = (stats, dataclasses.replace(stats, module="", part="model", need=64, reached=None))
    said = explain(found(*[probe] * 4, facts=[Fact("rnn", "spectral_radius", 0.58, "l0")])[0])

    assert said.cause == (
        "the spectral radius of W_hh is 0.58; and the state that it carries on is detached: "
        "no gradient goes back beyond the last 30 timesteps"
    )
    assert said.remedy.startswith("initialize weight_hh of rnn")
    assert said.remedy.endswith("; and carry the state of rnn on without detach() for 64 timesteps")


@pytest.mark.parametrize("need", [None, 30])
def test_a_cut_behind_a_gain_that_is_gone_and_all_that_is_needed_is_no_cause(need):
    stats = dataclasses.replace(cut(30, need=need), lag_gain=gain(SHORT, 64))
    (short,) = (
        f for f in found(*[(stats,)] * 4, facts=[Fact("rnn", "spectral_radius", 0.58, "l0")]) if f.code == "GW301"
    )

    assert explain(short).cause == "the spectral radius of W_hh is 0.58"
    assert "detach" not in explain(short).remedy


def test_a_state_cut_off_is_told_with_its_place_also_where_no_gradient_was_measured():
    stats = dataclasses.replace(own(SHORT, length=64, need=64), reached=9)
    said = explain(found(*[(stats,)] * 4)[0])

    assert said.cause == "the state that it carries on is detached: no gradient goes back beyond the last 9 timesteps"
    assert explain(found((dataclasses.replace(stats, need=None),))[0]).message.endswith(
        "no gradient goes back beyond the last 9 of 64 timesteps"
    )


def test_a_verdict_does_not_read_a_note():
    notes = (
        "the extra pass failed: RuntimeError: detached_encoder is detached",
        "the state that was carried in is detached",
        None,
    )
    for note in notes:
        probe = (own(None, "detached_encoder", need=200, note=note), own(SHORT, "decoder", note=note))
        assert [f.code for f in found(*[probe] * 4, info=model(detached_encoder="LSTM", decoder="GRU"))] == [
            "GW304",
            "GW301",
        ]
        assert "detached" not in next(f for f in found(*[probe] * 4) if f.code == "GW301").evidence


class Once(nn.Module):
    """A sequence module whose horizon is not to be had: it cannot run a second time in a step."""

    def __init__(self):
        super().__init__()
        self.inner, self.runs = nn.Linear(3, 3), 0

    def forward(self, x):
        self.runs += 1
        if self.runs > 1:
            raise RuntimeError("once only")
        return self.inner(x)


def test_a_module_called_detached_whose_horizon_cannot_be_measured_has_no_detached_state():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.detached_encoder, self.head = Once(), nn.Linear(3, 1)

        def forward(self, x):
            return self.head(self.detached_encoder(x)[:, -1])

    net, reports = Net(), []
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    asked = {"timesteps": {"detached_encoder": 1}, "horizon": {"detached_encoder": 5}, "probe_every_n_steps": 1}
    with gradwatch.watch(net, optimizer, **asked, sinks=[reports.append], on_alert=lambda _: None):
        for _ in range(2):
            net.detached_encoder.runs = 0
            net(torch.randn(4, 8, 3)).sum().backward()
            optimizer.step()

    (stats,) = (s for s in reports[-1].snapshot.sequences if s.part == "")
    assert "the extra pass failed: RuntimeError: once only" in stats.note
    assert [a.finding.code for a in reports[-1].open] == ["GW304"]


# --- explosion ---

EXPLODED = [("GW302", "rnn", Severity.WARNING)]


def test_a_gain_that_grows_ten_thousandfold_by_a_law_explodes_at_the_second_probe():
    grows = own(1.2, length=60)
    (finding,) = found((grows,), (grows,), (grows,))

    assert codes([finding]) == EXPLODED
    assert finding.evidence["growth"] == pytest.approx(1.2**59)
    assert (finding.evidence["rate"], finding.lag, finding.onset) == (pytest.approx(1.2), 59, 10)
    assert explain(finding).message == (
        "the gain by lag of rnn grows to 4.7e+04 times itself within 59 timesteps on its way back "
        "(1.20 times a step), since step 10"
    )
    assert found((grows,)) == []
    assert found((own(1.0),), (grows,)) == []


@pytest.mark.parametrize(
    "healthy",
    [
        gain(1.08, 60),
        gain(1.0, 2000),
        (*gain(1.02, 100), *gain(0.9, 100)),
        (1e-7, *[1.0] * 249),  # the newest timestep is not used
        (0.0, *[1.0] * 249),
        tuple(1.0 + 0.5 * math.sin(lag) for lag in range(250)),
        (1.0, 1e6, *gain(0.5, 200)),  # a step, not a law
        (0.0,) * 30,
    ],
)
def test_what_rises_mildly_or_by_a_step_or_not_at_all_does_not(healthy):
    stats = SequenceStats("rnn", "", len(healthy), lag_gain=healthy)

    assert [f for f in found((stats,), (stats,), (stats,)) if f.code == "GW302"] == []


def test_a_gain_that_runs_into_infinity_explodes_at_once():
    stats = SequenceStats("rnn", "", 100, lag_gain=(*gain(100.0, 20), *[math.inf] * 80))
    (finding,) = found((stats,))

    assert codes([finding]) == EXPLODED
    assert explain(finding).message == "the gain by lag of rnn is not finite from 20 timesteps back on, since step 10"


@pytest.mark.parametrize("broken", [(math.nan,) * 9, (1.0, 1.0, math.nan, 1.0), (0.0, 1.0, 1.0, math.inf)])
def test_a_nan_that_nothing_grew_to_is_another_kind(broken):
    assert found(*[(SequenceStats("rnn", "", len(broken), lag_gain=broken),)] * 4) == []


def test_clipped_it_may_train_well_and_then_it_is_information():
    grows = own(1.2, length=60)
    losses = [0.9**i for i in range(40)]

    assert codes(found(*[(grows,)] * 4, losses=losses)) == [("GW302", "rnn", Severity.INFO)]
    assert codes(found(*[(grows,)] * 4, losses=[1.0] * 40)) == EXPLODED


def test_the_model_and_its_module_explode_once_and_at_the_module():
    module, worse = own(1.2, length=60), whole(1.25, length=60, need=None)
    for probe in ((module, worse), (worse, module)):
        (finding,) = found(probe, probe)

        assert codes([finding]) == EXPLODED
        assert finding.names["who"] == "the model"


def test_an_open_explosion_clears_only_well_below_the_limit():
    almost = own(5e3 ** (1 / 59), length=60)

    assert found(*[(almost,)] * 2) == []
    assert codes(found(*[(almost,)] * 2, opened=[("GW302", "rnn")])) == EXPLODED


def test_cells_in_a_loop_explode_by_the_gradient_of_their_hidden_state():
    grows, once = gain(1.3, 60)[::-1], (0.0,) * 59 + (1.0,)
    cell = SequenceStats("rnn", "l0", 60, grad_hidden=grows, grad_hidden_direct=once)
    (finding,) = found((cell,), (cell,))

    assert codes([finding]) == EXPLODED
    assert "the gradient of the hidden state of rnn grows to" in explain(finding).message


def test_a_gradient_that_the_loss_itself_feeds_with_ever_more_does_not_explode():
    falls_with_time = gain(1.3, 60)[::-1]  # a loss that is large at the beginning of each sequence
    cell = SequenceStats("rnn", "l0", 60, grad_hidden=falls_with_time, grad_hidden_direct=falls_with_time)
    reverse = SequenceStats(
        "rnn", "l0_reverse", 60, reverse=True, grad_hidden=falls_with_time, grad_hidden_direct=(1.0, *[0.0] * 59)
    )

    assert found((cell, reverse), (cell, reverse)) == []


def test_the_cause_and_the_cure_of_an_explosion():
    finding = found(*[(own(1.2, length=60),)] * 2, facts=[Fact("rnn", "spectral_radius", 1.31, "l0")])[0]

    assert (
        explain(finding).cause
        == "the spectral radius of W_hh is 1.31, and above 1 it multiplies the gradient at each step"
    )
    assert explain(finding).remedy.startswith("scale the recurrent weights of rnn down")
    assert "clip the gradient norm" in explain(finding).remedy


# --- laws ---


def test_no_probe_no_word():
    assert found(None, None) == []
    assert list(through_time(fold((SequenceStats("rnn", note="compiled"),)))) == []


def test_the_unit_of_the_gain_does_not_matter():
    for unit in (1e-150, 1e150):
        scaled = [
            dataclasses.replace(s, lag_gain=tuple(unit * g for g in s.lag_gain)) for s in (own(SHORT), whole(SHORT))
        ]
        assert codes(found(*[tuple(scaled)] * 4)) == WARNED
        growing = own(1.2, length=60)
        assert (
            codes(found(*[(dataclasses.replace(growing, lag_gain=tuple(unit * g for g in growing.lag_gain)),)] * 2))
            == EXPLODED
        )


def test_the_detector_is_one_of_the_default_ones_and_changes_nothing():
    assert through_time in DETECTORS
    history = fold(*[(own(SHORT), whole(SHORT), cut(3))] * 5)

    assert list(through_time(history)) == list(through_time(history))


def test_a_module_may_have_a_limit_of_its_own():
    lenient = Thresholds(layers={"rnn": {"horizon_probes": 6}})

    assert found(*[(own(SHORT, need=50),)] * 5, thresholds=lenient) == []
    assert codes(found(*[(own(SHORT, need=50),)] * 6, thresholds=lenient)) == WARNED
