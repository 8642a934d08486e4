"""How far back a model learns, as people read it: in a line, as a plot in the terminal, as the text of an error."""

from __future__ import annotations

import io
import math
import os
import subprocess
from dataclasses import replace

import pytest
from interpreters import warm
from rich.console import Console
from truth import gain

from gradwatch import LayerInfo, ModelInfo, ParameterInfo, Record, Report, Snapshot
from gradwatch.detectors.time_words import explain_short, too_short
from gradwatch.sinks.terminal import page as terminal
from gradwatch.sinks.terminal.depth_profile import DepthProfile
from gradwatch.sinks.terminal.errors import horizon_error
from gradwatch.sinks.terminal.lag_profile import LagProfile
from gradwatch.values.sequences import Horizon, SequenceStats, horizon_of, sentence, sentences, shortest
from gradwatch.values.snapshot import Fact

MODEL = ModelInfo((LayerInfo("rnn", "RNN", 0),), (ParameterInfo("rnn.w", "rnn", (2,), "float32", 0, "weight"),))


def error(stats: SequenceStats, need: int, facts=(), *, place="", **kind) -> str:
    place = place or stats.module or next((fact.place for fact in facts), "")
    finding = too_short(stats, stats.reach, facts, place=place, need=need, **kind)
    return horizon_error(replace(stats, need=need), explain_short(finding))


RNN = SequenceStats("rnn", length=250, rows=8, lag_gain=gain(0.64, 250))
LINE = "rnn learns from the last 16 of 250 timesteps (the gain shrinks to 0.64 of itself a step, half-life 1.6 steps)"
WHOLE = SequenceStats("", "model", 250, 8, lag_gain=gain(0.99, 250), need=200)
WHOLE_LINE = (
    "the model learns from at least 250 of 250 timesteps "
    "(the gain shrinks to 0.99 of itself a step, half-life 69.0 steps)"
)


def snapshot(*sequences, step=1):
    return Snapshot(step, 1e9, MODEL, 0, norm=(1.0,), weight_norm=(1.0,), sequences=sequences or None)


def shown(content, width=100, encoding="utf-8", *, colour=False):
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    Console(file=out, width=width, force_terminal=colour, color_system="standard" if colour else None).print(content)
    out.flush()
    return out.buffer.getvalue().decode(encoding)


# --- the line ---


@pytest.mark.parametrize(
    ("lag_gain", "said"),
    [
        (gain(0.64, 250), LINE.removeprefix("rnn ")),
        (gain(0.99, 250), WHOLE_LINE.removeprefix("the model ")),
        (
            gain(0.9972, 250),
            (
                "learns from at least 250 of 250 timesteps "
                "(the gain shrinks to 0.9972 of itself a step, half-life 247 steps)"
            ),
        ),
        (gain(0.999999, 250), "learns from at least 250 of 250 timesteps (the gain does not shrink)"),
        (gain(1.0, 250), "learns from at least 250 of 250 timesteps (the gain does not shrink)"),
        (gain(1.1, 250), "learns from at least 250 of 250 timesteps (the gain does not shrink)"),
        (
            (*gain(1.1, 240), *(1.1**240 * 0.5**lag for lag in range(10))),
            "learns from at least 250 of 250 timesteps (the gain does not shrink)",
        ),
        ((1.0,) * 15 + (0.0,) * 235, "learns from the last 15 of 250 timesteps (the gain does not shrink)"),
        (
            gain(0.002, 250),
            "learns from the last 2 of 250 timesteps (the gain shrinks to 0.002 of itself a step, half-life 0.1 steps)",
        ),
        ((0.0,) * 250, "learns from none of its 250 timesteps"),
    ],
)
def test_the_line_says_how_far_and_how_fast(lag_gain, said):
    assert sentence("rnn", horizon_of(lag_gain), 250) == f"rnn {said}"


def test_one_timestep_is_told_without_a_pace():
    assert (
        sentence("rnn", Horizon(1, censored=True, decay_rate=None, half_life=None), 1)
        == "rnn learns from at least 1 of 1 timesteps"
    )


def test_the_models_own_line_comes_first_and_parts_have_none_and_what_is_not_measured_says_why():
    part = SequenceStats("rnn", "l0", 250, lag_gain_hidden=gain(0.5, 250))
    compiled, silent = SequenceStats("other", note="it was compiled"), SequenceStats("encoder", grad_input=(1.0,))
    broken = SequenceStats("bad", length=2, lag_gain=(1.0, math.nan))
    said = [line for _, line in sentences((RNN, part, compiled, silent, broken, WHOLE))]

    assert said == [
        WHOLE_LINE,
        LINE,
        "other: how far back it learns is not measured: it was compiled",
        "bad: its gain by lag is not finite",
    ]


def test_the_shortest_is_a_module_and_not_the_model():
    far, near = (
        SequenceStats("far", length=9, lag_gain=(1.0,) * 9),
        SequenceStats("near", length=9, lag_gain=(1.0,) + (0.0,) * 8),
    )

    assert shortest((WHOLE, far, near)) is near
    assert shortest((SequenceStats("a", note="n"), far)) is far
    assert shortest((SequenceStats("a", note="n"), SequenceStats("b", note="n"))).module == "a"
    assert shortest((WHOLE,)) is None


def test_the_repr_begins_with_it_between_probes_too():
    for text in (
        terminal.text(Report(snapshot(RNN)), width=200),
        terminal.text(Report(snapshot()), sequences=(RNN,), width=200),
    ):
        assert text.splitlines()[:2] == [LINE, "1 of 1 parameters with a gradient at step 1"]
    assert terminal.text(Report(snapshot())).splitlines()[0] == "1 of 1 parameters with a gradient at step 1"


def test_a_model_of_many_sequence_modules_is_told_shortly():
    many = [SequenceStats(f"rnn{i}", length=4, lag_gain=gain(0.5, 4)) for i in range(50)]
    lines = terminal.text(Report(snapshot(*many)), width=200).splitlines()

    assert lines[11].startswith("rnn11 learns")
    assert lines[12] == "(38 more sequence modules)"
    lines = terminal.text(Report(snapshot(*many[:13])), width=200).splitlines()
    assert lines[12] == "(1 more sequence module)"


# --- the plot ---


def plot(stats, width=100, **options):
    return shown(LagProfile(stats), width, **options).splitlines()


def test_the_plot_is_a_decade_a_row_and_points_at_the_horizon():
    stats = SequenceStats("rnn", length=60, lag_gain=gain(10**-0.201, 60))  # a decade in 5 lags

    assert plot(stats, 66) == [
        "",
        "rnn: gain by lag, over its maximum",
        "   1 █▆▅▃▂",
        "     ██████▆▅▃▂",
        "     ███████████▆▅▃▁",
        "1e-3 ████████████████▆▅▃▁",
        "     █████████████████████▆▅▃▁",
        "     ██████████████████████████▆▅▃▁",
        "1e-6 └───────────────────────────────────────────────────────────",
        "                    ^ horizon: 15",
        "     0                                          59 timesteps back",
    ]


def test_a_horizon_at_the_end_is_told_from_the_left_and_the_need_is_marked():
    lines = plot(WHOLE)

    assert lines[-3:] == [
        " " * 5 + f"{'horizon: at least 250 ^':>60}",
        " " * 5 + " " * 48 + "^ need: 200",
        " " * 5 + "0" + f"{'249 timesteps back':>59}",
    ]


def test_a_short_sequence_and_a_long_one_fill_the_same_width():
    for length in (2, 7, 60, 61, 5000):
        stats = SequenceStats("rnn", length=length, lag_gain=(1.0,) * length)
        assert {len(line) for line in plot(stats)[2:9]} == {65}, length


def test_a_single_high_lag_is_not_lost_between_columns():
    drawn = [1e-9] * 5000
    drawn[0], drawn[3211] = 1.0, 1e-1

    assert "█" in plot(SequenceStats("rnn", length=5000, lag_gain=tuple(drawn)))[3][5 + 3211 * 60 // 5000 - 1 :]


@pytest.mark.parametrize("width", [17, 18, 30, 50, 80])
def test_a_narrow_terminal_gets_a_narrow_plot_or_none(width):
    lines = plot(WHOLE, width)

    assert all(len(line) <= width for line in lines)
    assert bool(lines) == (width >= 18)


def test_a_terminal_of_ascii_gets_ascii():
    lines = plot(RNN, encoding="ascii")

    assert lines[2].startswith("   1 #")
    assert lines[8].startswith("1e-6 +---")


def test_there_is_colour_only_in_a_terminal_and_red_beyond_the_horizon():
    stats = SequenceStats("rnn", length=60, lag_gain=gain(10**-0.201, 60))

    assert "\x1b" not in "".join(plot(stats))
    bottom = plot(stats, 66, colour=True)[7]
    assert f"\x1b[32m{'█' * 15}\x1b[0m\x1b[31m{'█' * 11}" in bottom


@pytest.mark.parametrize("lag_gain", [None, (), (0.0, 0.0), (math.nan, 1.0)])
def test_what_has_no_profile_is_not_drawn(lag_gain):
    assert plot(SequenceStats("rnn", length=2, lag_gain=lag_gain)) == []


# --- the error ---


def test_the_error_has_the_horizon_its_definition_the_cause_the_remedy_and_the_plot():
    facts = (Fact("encoder.rnn", "forget_gate", 0.5, "l0"), Fact("encoder.rnn", "forget_bias", 0.01, "l0"))
    text = error(SequenceStats("", "model", 250, 8, lag_gain=gain(0.64, 250)), 200, facts)
    flat = " ".join(text.split())

    assert flat.startswith(LINE.replace("rnn learns", "the model learns") + ", and the need is 200")
    for part in (
        (
            "horizon: the smallest n such that the gain, the norm of d(newest output)/d(input n steps back), "
            "stays below 0.001 of its maximum from there on"
        ),
        "why: its forget gates keep 0.50 of the cell at each step and their bias is 0.01",
        "try: set the forget-gate bias of encoder.rnn to 5.3 (the log of 200) and the input-gate bias to -5.3; or a",
        "^ horizon: 16",
        "^ need: 200",
    ):
        assert part in flat
    assert all(len(line) <= 100 and line == line.rstrip() for line in text.splitlines())


def test_the_error_without_facts_says_so_and_gives_a_remedy_all_the_same():
    text = " ".join(error(RNN, 200, ()).split())

    assert "why: cause not measured" in text
    assert "try: in rnn: a longer field of view" in text
    assert "or an LSTM: set the forget-gate bias to 5.3" in " ".join(
        error(SequenceStats("", "model", 250, lag_gain=gain(0.64, 250)), 200).split()
    )
    assert "set the update-gate bias of rnn to 5.3" in " ".join(error(RNN, 200, (), place="rnn", kind="GRU").split())


# --- the command ---


@pytest.fixture
def run(tmp_path):
    record = Record(tmp_path / "lstm" / "gradwatch")
    for step, sequences in enumerate([(), (WHOLE, RNN), ()]):
        record(Report(snapshot(*sequences, step=step)))
    record.close()
    return tmp_path


def command(path, **environment):
    clean = {
        k: v
        for k, v in os.environ.items()
        if k not in {"COLUMNS", "NO_COLOR", "FORCE_COLOR", "TERM", "PYTHONIOENCODING", "PYTHONUTF8"}
    }
    done = subprocess.run(
        [*warm(), "-m", "gradwatch", "report", str(path)],
        capture_output=True,
        check=True,
        env={**clean, **environment},
    )
    assert done.stderr == b""
    return done.stdout


def test_the_report_of_a_run_begins_with_how_far_back_it_learns_and_draws_it(run):
    lines = command(run / "lstm", COLUMNS="130", PYTHONUTF8="1").decode().splitlines()

    assert lines[:3] == [WHOLE_LINE, LINE, "3 measured steps, 0 to 2: no alert"]
    assert "the model: gain by lag, over its maximum" in lines
    assert "rnn: gain by lag, over its maximum" in lines
    assert not any("\x1b" in line for line in lines)


def test_of_several_runs_each_line_has_its_name(run):
    record = Record(run / "plain" / "gradwatch")
    record(Report(snapshot()))
    record.close()
    lines = command(run, COLUMNS="160", PYTHONUTF8="1").decode().splitlines()

    assert f"lstm/gradwatch: {WHOLE_LINE}" in lines
    assert "plain/gradwatch: 1 measured step, step 1: no alert" in lines


def test_the_report_works_in_a_narrow_pipe_of_ascii_and_in_colour(run):
    narrow = command(run, COLUMNS="40", PYTHONIOENCODING="ascii").decode("ascii")
    assert all(len(line) <= 40 for line in narrow.splitlines())
    assert "horizon: at least 250 ^" in narrow

    assert b"\x1b[32m" in command(run, FORCE_COLOR="1", TERM="xterm", PYTHONUTF8="1")
    assert b"\x1b[3" not in command(run, FORCE_COLOR="1", TERM="xterm", PYTHONUTF8="1", NO_COLOR="1")


# --- the way through a model ---


def place(name, horizon, length, clock=1):
    return SequenceStats(name, "model", length, lag_gain=(1.0,) * horizon + (1e-9,) * (length - horizon), clock=clock)


WAY = replace(
    place("", 72, 96),
    input="x",
    chain=(place("conv", 72, 96), place("a_very_long_name.of_some.encoder.rnn", 15, 24, clock=4)),
)


def way(stats, width=100, encoding="utf-8"):
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    Console(file=out, width=width).print(DepthProfile(stats))
    out.flush()
    return [line.rstrip() for line in out.buffer.getvalue().decode(encoding).splitlines()]


def test_the_way_through_a_model_is_a_strip_for_each_place_on_the_clock_of_the_input():
    assert way(WAY) == [
        "",
        "Through depth: how far back the newest output sees what enters each module (left: newest)",
        f"  {'x into conv':28} {'█' * 36}{' ' * 12} 72 of 96",
        f"  ..._name.of_some.encoder.rnn {'█' * 30}{' ' * 18} 60 of 96",
    ]


def test_a_strip_has_three_decades():
    stats = replace(WAY, lag_gain=tuple(10 ** (-lag / 24) for lag in range(96)), chain=WAY.chain[1:])
    drawn = way(stats)[2][31:79]
    assert drawn == "█" * 2 + "█" * 3 + drawn[5:]
    assert drawn.rstrip() == "".join(sorted(drawn.rstrip(), reverse=True))
    assert len(drawn.rstrip()) == 37  # 1e-3 at lag 72, of 96 in 48 columns
    assert set(way(stats, encoding="ascii")[2][31:79]) == set(" .:#")


@pytest.mark.parametrize("width", [40, 61, 62, 80])
def test_in_a_narrow_terminal_it_is_narrow_or_none(width):
    lines = way(WAY, width)
    assert all(len(line) <= width for line in lines)
    assert bool(lines) == (width >= 62)


def test_many_places_are_counted():
    chain = tuple(place(f"l{i}", 40 - i, 96) for i in range(30))
    lines = way(replace(WAY, chain=chain))
    assert lines[-1] == "  (15 more)"
    assert len(lines) == 2 + 16 + 1


def test_what_has_no_way_is_not_drawn():
    assert way(replace(WAY, chain=())) == []
    assert way(replace(WAY, chain=WAY.chain[:1])) == []  # all of it stands in the profile of the model
    assert way(replace(WAY, lag_gain=None)) == []
