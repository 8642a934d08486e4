"""A record holds what was measured: exactly, also after a kill, within its bound, and enough to find every alert."""

from __future__ import annotations

import dataclasses
import functools
import gc
import io
import itertools
import math
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interpreters import warm
from torch import nn

import gradwatch
from gradwatch import (
    DETECTORS,
    Alert,
    Finding,
    History,
    LayerInfo,
    ModelInfo,
    OptimizerInfo,
    ParameterInfo,
    Record,
    Report,
    Severity,
    Snapshot,
    read_run,
    read_runs,
)
from gradwatch.detectors.alerts import judge
from gradwatch.sinks.record import FORMAT
from gradwatch.sinks.run_directory import RunDirectory, held
from gradwatch.values.autograd import Cut
from gradwatch.values.plain import from_json, from_plain, to_json, to_plain
from gradwatch.values.sequences import SequenceStats
from gradwatch.values.snapshot import ActivationStats, Fact

MODEL = ModelInfo(
    layers=(LayerInfo("body", "Linear", 0, "net.py:3"), LayerInfo("head", "Linear")),
    parameters=(
        ParameterInfo("body.weight", "body", (4, 3), "float32", 0, "weight"),
        ParameterInfo("body.bias", "body", (4,), "bfloat16", None, "bias"),
        ParameterInfo("head.weight", "head", (), "float64", 0, "gain"),
    ),
    optimizers=(OptimizerInfo("Adam", adaptive=True, eps=1e-8),),
)


def same(a, b):
    """Compare like ==, but let NaN be NaN, and tell 0 from None, from False and from -0.0."""
    if dataclasses.is_dataclass(a):
        return type(a) is type(b) and all(same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    if isinstance(a, tuple | list):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, float) and isinstance(b, float):
        return (math.isnan(a) and math.isnan(b)) or (a == b and math.copysign(1, a) == math.copysign(1, b))
    return type(a) is type(b) and a == b


def snapshot(step, model=MODEL, **fields):
    return Snapshot(step, 1e9 + step, model, **{"norm": (1.0, None, 0.0), **fields})


def alert(place="body", began=3, last=5, severity=Severity.WARNING, **fields):
    finding = Finding(
        "GW101",
        "vanishing-depth",
        severity,
        place,
        onset=1,
        evidence={"ratio": 1e-9},
        optimizer=0,
        names={"worst": "body"},
        cause="weak",
    )
    return Alert(finding, began, last, **fields)


def written(folder, *reports, **options):
    record = Record(folder, **options)
    for report in reports:
        record(report)
    record.close()
    return read_run(folder)


# --- the round trip ---


def test_every_number_comes_back_exactly(tmp_path):
    hard = snapshot(
        2**70,
        optimizer=0,
        stage="before_clip",
        loss=math.nan,
        scale=65536.0,
        clip_factor=-0.0,
        skipped=True,
        norm=(math.nan, None, 0.0),
        nonfinite=(1e25, None, 0.0),
        weight_norm=(math.inf, -math.inf, 5e-324),
        zeros=(0.1 + 0.2, None, 1.0),
        subnormal=(None, None, None),
        update_ratio=(math.inf, 0.0, 1.7976931348623157e308),
        absent=(None, "frozen", "disconnected"),
        activations=(
            ActivationStats("body", 1e-45, 0.0, None, 4, scaled=True),
            ActivationStats("head", math.nan, function="tanh"),
        ),
        sequences=(
            SequenceStats(
                "lstm", "l0", 3, 2, grad_hidden=(math.nan, 0.0, math.inf), lag_gain=(), censored=False, note="é\n\u2028"
            ),
        ),
        facts=(Fact("body", "saturation", math.inf), Fact("body", "saturation", 0.5, "l0_reverse")),
        cuts=(Cut("body", "body", "head", graph=True), Cut("head", "head", None, graph=False)),
        computed_in="float16",
        notes=("a", ""),
    )
    run = written(tmp_path, Report(hard))
    assert len(run.snapshots) == 1
    assert same(run.snapshots[0], hard)
    assert same(run.models, (MODEL,))


def test_none_stays_none_and_zero_stays_zero(tmp_path):
    run = written(
        tmp_path, Report(snapshot(0, norm=(None, 0.0, -0.0), zeros=None, subnormal=(None, None, 0.0), loss=0.0))
    )
    back = run.snapshots[0]
    assert back.norm[0] is None
    assert same(back.norm, (None, 0.0, -0.0))
    assert back.zeros is None
    assert same(back.subnormal, (None, None, 0.0))
    assert same(back.loss, 0.0)


def test_a_run_shows_how_much_it_holds(tmp_path):
    run = written(tmp_path, Report(snapshot(3), open=(alert(),)), Report(snapshot(7), cleared=(alert(cleared=7),)))
    assert repr(run) == f"Run {tmp_path / 'record.jsonl'}: snapshots 2, steps 3 to 7; alerts 1, open 0"


def test_an_alert_comes_back_as_it_was_last(tmp_path):
    first = alert(last=3, message="m", cause="c", remedy="r")
    later = dataclasses.replace(first, last=7, message="worse")
    worst = dataclasses.replace(
        later, finding=dataclasses.replace(first.finding, severity=Severity.ERROR, evidence={"ratio": math.nan}), last=8
    )
    gone = dataclasses.replace(worst, cleared=12)
    cases = {
        "begun": ([Report(snapshot(3), (first,), (first,))], first),
        "lasted": ([Report(snapshot(3), (first,), (first,)), Report(snapshot(7), (), (later,))], later),
        "worsened": ([Report(snapshot(3), (first,), (first,)), Report(snapshot(8), (), (worst,))], worst),
        "cleared": ([Report(snapshot(3), (first,), (first,)), Report(snapshot(12), (), (), (gone,))], gone),
    }
    for name, (reports, last) in cases.items():
        run = written(tmp_path / name, *reports)
        assert same(run.alerts, (last,)), name


def test_who_reads_while_it_is_written_finds_an_open_alert_at_least_half_as_old_as_it_is(tmp_path):
    record = Record(tmp_path)
    for step in range(3, 400):
        record(Report(snapshot(step), open=(alert(began=3, last=step, message=f"at {step}"),)))
        (read,) = read_run(tmp_path).alerts if step % 20 == 0 or step < 20 else (alert(last=step),)
        assert 2 * (read.last - 3) >= step - 3
    lines = (tmp_path / "record.jsonl").read_text(encoding="utf-8").count('{"alert"')
    assert lines == 1 + (399 - 3).bit_length()
    record.close()
    assert read_run(tmp_path).alerts[0].message == "at 399"


def test_an_alert_that_comes_again_is_a_second_one(tmp_path):
    first, second = alert(began=3, cleared=9), alert(began=20)
    run = written(
        tmp_path,
        Report(snapshot(3), (), (alert(began=3),)),
        Report(snapshot(9), (), (), (first,)),
        Report(snapshot(20), (), (second,)),
    )
    assert [a.began for a in run.alerts] == [3, 20]
    assert run.worst() is Severity.WARNING


def test_each_snapshot_keeps_its_own_model(tmp_path):
    other = dataclasses.replace(MODEL, layers=MODEL.layers[:1])
    run = written(tmp_path, *(Report(snapshot(i, model=m)) for i, m in enumerate((MODEL, MODEL, other, other, MODEL))))
    assert [len(s.model.layers) for s in run.snapshots] == [2, 2, 1, 1, 2]
    assert run.snapshots[0].model is run.snapshots[1].model


floats = st.floats(allow_nan=True, allow_infinity=True)
maybe = functools.partial(st.one_of, st.none())
text = st.text(max_size=8)
columns = st.lists(maybe(floats), min_size=3, max_size=3).map(tuple)
series = maybe(st.lists(floats, max_size=4).map(tuple))
steps = st.integers(0, 2**80)
sequences = st.builds(
    SequenceStats,
    text,
    text,
    steps,
    steps,
    *[series] * 8,
    maybe(st.booleans()),
    maybe(floats),
    maybe(floats),
    st.booleans(),
    maybe(text),
    maybe(steps),
    maybe(steps),
)
models = st.builds(
    ModelInfo,
    st.lists(st.builds(LayerInfo, text, text, maybe(steps), maybe(text)), max_size=3).map(tuple),
    st.lists(
        st.builds(
            ParameterInfo,
            text,
            text,
            st.lists(steps, max_size=3).map(tuple),
            text,
            maybe(steps),
            st.sampled_from(["weight", "bias", "gain"]),
        ),
        max_size=3,
    ).map(tuple),
    st.lists(st.builds(OptimizerInfo, text, st.booleans(), maybe(floats)), max_size=2).map(tuple),
)
snapshots = st.builds(
    Snapshot,
    steps,
    floats,
    models,
    maybe(steps),
    st.sampled_from(["applied", "before_clip"]),
    *[maybe(floats)] * 3,
    st.booleans(),
    columns,
    *[maybe(columns)] * 5,
    maybe(st.lists(maybe(st.sampled_from(["frozen", "unused", "disconnected"])), min_size=3, max_size=3).map(tuple)),
    maybe(
        st.lists(
            st.builds(ActivationStats, text, maybe(floats), maybe(floats), maybe(floats), maybe(steps), st.booleans()),
            max_size=2,
        ).map(tuple)
    ),
    maybe(st.lists(sequences, max_size=2).map(tuple)),
    maybe(st.lists(st.builds(Fact, text, text, floats, text), max_size=2).map(tuple)),
    st.lists(text, max_size=2).map(tuple),
    maybe(columns),
    maybe(st.lists(st.builds(Cut, text, text, maybe(text), st.booleans()), max_size=2).map(tuple)),
    maybe(text),
)
findings = st.builds(
    Finding,
    text,
    text,
    st.sampled_from(Severity),
    text,
    maybe(text),
    maybe(steps),
    maybe(steps),
    st.dictionaries(text, st.one_of(floats, text), max_size=3),
    maybe(steps),
)
alerts = st.builds(Alert, findings, steps, steps, maybe(steps), text, text, text)


@given(st.one_of(snapshots, alerts, sequences, models))
@settings(max_examples=200, deadline=None)
def test_any_value_comes_back_through_json_as_it_was(value):
    line = to_json(to_plain(value))
    assert "\n" not in line
    assert same(from_plain(type(value), from_json(line)), value)


# --- finding and refusing ---


def test_a_run_is_found_by_its_record_its_folder_and_its_logdir(tmp_path):
    written(tmp_path / "gradwatch", Report(snapshot(4)))
    for path in (tmp_path / "gradwatch" / "record.jsonl", tmp_path / "gradwatch", tmp_path, str(tmp_path)):
        run = read_run(path)
        assert [s.step for s in run.snapshots] == [4]
        assert run.path == str(tmp_path / "gradwatch" / "record.jsonl")
        assert (run.thinned, run.broken) == (0, 0)


def test_several_runs_are_named_as_seen_from_the_folder(tmp_path):
    for number, name in enumerate(("gradwatch", "gradwatch-critic", "deep/gradwatch")):
        written(tmp_path / name, Report(snapshot(number)))
    runs = read_runs(tmp_path)
    assert {name: run.snapshots[0].step for name, run in runs.items()} == {
        "gradwatch": 0,
        "gradwatch-critic": 1,
        "deep/gradwatch": 2,
    }
    with pytest.raises(ValueError, match=r"holds 3 runs, and one is wanted: .*gradwatch-critic"):
        read_run(tmp_path)


def test_a_truncated_last_line_is_left_out_and_counted(tmp_path):
    written(tmp_path, *(Report(snapshot(i)) for i in range(5)))
    file = tmp_path / "record.jsonl"
    content = file.read_bytes()
    file.write_bytes(content[:-20])
    run = read_run(file)
    assert [s.step for s in run.snapshots] == [0, 1, 2, 3]
    assert run.broken == 1


def test_what_is_not_a_record_is_refused_with_its_name(tmp_path):
    foreign = {
        "text": "hello\n",
        "json": '{"a": 1}\n',
        "list": "[]\n",
        "later": '{"format": 99}\n',
        "binary": "\udc80\udcff\x00",
    }
    for name, content in foreign.items():
        file = tmp_path / f"{name}.jsonl"
        file.write_text(content, encoding="utf-8", errors="surrogateescape")
        with pytest.raises(ValueError, match=rf"{name}\.jsonl is not a record of format 1 to {FORMAT}"):
            read_run(file)


def test_what_is_read_is_bounded_in_depth_and_in_count(tmp_path, monkeypatch):
    record = Record(tmp_path)
    for step in range(6):
        finding = Finding("GW101", "vanishing-depth", Severity.WARNING, f"layer{step}")
        model = dataclasses.replace(MODEL, layers=(LayerInfo("body", f"Kind{step}"), LayerInfo("head", "Linear")))
        alert = Alert(finding, step, step)
        snapshot = Snapshot(step, 0.0, model, norm=(1.0, 1.0, 1.0))
        record(Report(snapshot, began=(alert,), open=(alert,)))
        record(Report(snapshot, open=(dataclasses.replace(alert, last=step + 1),)))
    record.close()
    whole = read_run(tmp_path)
    assert (len(whole.alerts), len(whole.models), whole.broken) == (6, 6, 0)

    monkeypatch.setattr("gradwatch.sinks.reading._MOST_ALERTS", 4)
    some = read_run(tmp_path)
    assert [a.finding.place for a in some.alerts] == [f"layer{i}" for i in range(4)]
    assert some.ruined  # and says so: a judgement of a part would be none
    monkeypatch.setattr("gradwatch.sinks.reading._MOST_ALERTS", 6)
    assert not read_run(tmp_path).ruined  # the same alerts again are no more

    monkeypatch.setattr("gradwatch.sinks.reading._MOST_MODELS", 3)
    assert (len(read_run(tmp_path).models), read_run(tmp_path).ruined) == (3, True)

    with (tmp_path / "record.jsonl").open("a") as stream:
        stream.write('{"alert":' + "[" * 100_000 + "]" * 100_000 + "}\n")
    monkeypatch.undo()
    assert read_run(tmp_path).broken == 1


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "record.jsonl").touch()
    with pytest.raises(ValueError, match="is not a record of format 1 to 3: it is empty"):
        read_run(tmp_path)


def test_where_there_is_no_record_the_error_says_how_one_is_made(tmp_path):
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(FileNotFoundError, match=r"no record\.jsonl in or below .*watch\(\.\.\., logdir=\.\.\.\)"):
            read_run(path)


# --- the bound ---


def test_past_its_bound_a_record_drops_old_snapshots_and_never_an_alert(tmp_path):
    bound = 20_000
    record, alerts, dropped = Record(tmp_path, bound=bound), [], 0
    for step in range(1000):
        began = (alert(f"layer{step}", began=step, last=step),) if step % 100 == 0 else ()
        alerts += [a.finding.place for a in began]
        record(Report(snapshot(step), began, began))
        assert (tmp_path / "record.jsonl").stat().st_size <= bound
    record.close()
    run = read_run(tmp_path)
    assert [a.finding.place for a in run.alerts] == alerts
    kept = [s.step for s in run.snapshots]
    dropped = run.thinned
    assert len(kept) + dropped == 1000
    assert dropped > 0
    assert kept[0] == 0
    assert kept[-20:] == list(range(980, 1000))  # the newest are all there
    assert kept == sorted(kept)
    assert run.broken == 0
    assert (tmp_path / "record.jsonl").stat().st_size <= bound
    assert not (tmp_path / "record.new").exists()


def test_an_alert_that_wavers_for_ever_does_not_fill_the_record(tmp_path):
    bound = 20_000
    record = Record(tmp_path, bound=bound)
    for step in range(500):
        now = alert(began=0, last=step, severity=Severity.WARNING if step % 2 else Severity.ERROR, message=f"at {step}")
        record(Report(snapshot(step), (), (now,)))
    record.close()
    run = read_run(tmp_path)
    assert [a.message for a in run.alerts] == ["at 499"]
    assert (tmp_path / "record.jsonl").stat().st_size <= bound
    assert len(run.snapshots) > 20


def test_a_record_that_alerts_alone_fill_is_not_written_anew_at_every_step(tmp_path):
    record, files = Record(tmp_path, bound=2_000), []
    for step in range(300):
        began = (alert(f"layer{step}", began=step, last=step, cleared=step),)
        record(Report(snapshot(step), began, (), began))
        files.append((tmp_path / "record.jsonl").stat().st_ino)
    record.close()
    assert len(read_run(tmp_path).alerts) == 300
    assert (
        1 < sum(old != new for old, new in itertools.pairwise(files)) < 30
    )  # a new file is never the one that it replaces


def test_a_thinned_run_that_goes_on_remembers_how_much_is_gone(tmp_path):
    written(tmp_path, *(Report(snapshot(i)) for i in range(300)), bound=8_000)
    before = read_run(tmp_path)
    assert before.thinned > 0
    record = Record(tmp_path, bound=8_000)
    record.resume()
    for i in range(300, 600):
        record(Report(snapshot(i)))
    record.close()
    run = read_run(tmp_path)
    assert len(run.snapshots) + run.thinned == 600


# --- real runs ---

KILLED = """
import os, signal, sys, torch, gradwatch
torch.manual_seed(0)
model = torch.nn.Linear(3, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
watcher = gradwatch.watch(model, optimizer, logdir=sys.argv[1])
for step in range(10):
    optimizer.zero_grad()
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
print("trained", flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_run_that_was_killed_can_be_read_to_its_last_step(tmp_path):
    done = subprocess.run([*warm(), "-c", KILLED, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL
    assert done.stdout == "trained\n"
    run = read_run(tmp_path)
    assert [s.step for s in run.snapshots] == list(range(10))
    assert run.broken == 0


class Net(nn.Sequential):
    """A stack of sigmoids, in which the gradient vanishes."""

    def __init__(self, depth=14, width=6):
        torch.manual_seed(0)
        super().__init__(
            *(layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.Sigmoid())), nn.Linear(width, 1)
        )


def train(watcher, model, optimizer, steps, poison=()):
    x, y = (
        torch.randn(8, 6, generator=torch.Generator().manual_seed(1)),
        torch.randn(8, 1, generator=torch.Generator().manual_seed(2)),
    )
    for step in range(steps):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        watcher.record(loss)
        loss.backward()
        if step in poison:
            model[0].weight.grad[0, 0] = math.nan
            for p in list(model.parameters())[1:]:
                p.grad.zero_()
        optimizer.step()
        if step in poison:
            with torch.no_grad():
                model[0].weight.nan_to_num_(0.1)


def test_numbers_of_numpy_are_recorded_like_those_of_python(tmp_path):
    def mine(history):
        evidence = {
            "narrow": np.float32(1.5),
            "bad": np.float32("nan"),
            "whole": np.int64(history.snapshot.step),
            "many": np.ones(2),
        }
        yield Finding("MY1", "mine", Severity.INFO, "0", evidence=evidence)

    model = nn.Linear(6, 1)
    with gradwatch.watch(model, logdir=tmp_path, detectors=[mine]) as watcher:
        for step in range(3):
            model(torch.randn(4, 6)).sum().backward()
            watcher.step(np.int64(10 * step), loss=np.float32(0.5))
    run = read_run(tmp_path)
    assert [(type(s.step), s.step, s.loss) for s in run.snapshots] == [(int, 10 * step, 0.5) for step in range(3)]
    assert same(dict(run.alerts[0].finding.evidence), {"narrow": 1.5, "bad": math.nan, "whole": 20, "many": [1.0, 1.0]})


def test_only_what_is_spelt_as_a_float_is_read_as_one():
    for plain in ({"float": "abc"}, {"float": "1.5"}, {"float": 2.0}, {"float": ["nan"]}, {"float": "infinity"}):
        assert from_json(to_json(plain)) == plain
    assert same(from_json(to_json([math.nan, math.inf, -math.inf])), [math.nan, math.inf, -math.inf])


def watched(logdir, steps=3, **options):
    model = Net(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    watcher = gradwatch.watch(model, optimizer, logdir=logdir, on_alert=lambda _: None, **options)
    train(watcher, model, optimizer, steps)
    watcher.lives = model
    return watcher


def test_directories_of_live_watchers_are_not_shared(tmp_path):
    watchers = [
        watched(tmp_path),
        watched(tmp_path),
        watched(tmp_path, name="critic/b"),
        watched(tmp_path, name="critic/b"),
    ]
    again = watched(tmp_path / ".." / tmp_path.name)  # the same, spelt otherwise
    for watcher in (*watchers, again):
        watcher.close()
    names = {"gradwatch", "gradwatch-2", "gradwatch-3", "gradwatch-critic-b", "gradwatch-critic-b-2"}
    assert {p.name for p in tmp_path.iterdir()} == names
    assert all(len(run.snapshots) == 3 for run in read_runs(tmp_path).values())
    for name in names:
        assert len(list((tmp_path / name).glob("events.out.tfevents.*"))) == 1
    directory = RunDirectory(tmp_path)
    directory.close()
    assert directory.path.name == "gradwatch"  # all have let go


def test_a_directory_that_nobody_claimed_is_left_as_it_is(tmp_path):
    Record(tmp_path).close()
    assert tmp_path.is_dir()

    with gradwatch.watch(nn.Linear(3, 1), logdir=tmp_path / "runs"):
        held = tmp_path / "runs" / "gradwatch"
        Record(held).close()
        assert held.is_dir()
        other = RunDirectory(tmp_path / "runs")
        assert other.path.name == "gradwatch-2"  # the watcher's lock is still on it
        other.close()


def test_a_claimed_directory_goes_with_a_watcher_that_has_reported_nothing(tmp_path):
    gradwatch.watch(nn.Linear(3, 1), logdir=tmp_path).close()
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_is_closed_twice_is_let_go_of_once(tmp_path):
    first = RunDirectory(tmp_path)
    first.close()
    second = RunDirectory(tmp_path)
    first.close()
    assert (second.path.name, second.path.is_dir()) == ("gradwatch", True)
    other = RunDirectory(tmp_path)
    assert other.path.name == "gradwatch-2"
    other.close()
    second.close()


def test_a_file_that_cannot_be_finished_keeps_neither_the_other_open_nor_the_directory_held(tmp_path):
    directory = RunDirectory(tmp_path)
    for sink in directory.sinks:
        sink(Report(snapshot(0)))
    shutil.rmtree(directory.path)
    assert held() == {directory.path}

    with pytest.raises(FileNotFoundError, match="was deleted while it was written"):
        directory.close()  # draws the last picture into the events, which are gone

    assert held() == frozenset()
    kinds = (io.TextIOWrapper, io.BufferedWriter)
    mine = [f for f in gc.get_objects() if type(f) in kinds and str(directory.path) in str(f.name)]
    assert [f for f in mine if not f.closed] == []


def test_a_directory_can_be_without_events(tmp_path):
    directory = RunDirectory(tmp_path, "a/b", events=False)
    for sink in directory.sinks:
        sink(Report(snapshot(0)))
    directory.close()
    assert [p.relative_to(tmp_path.resolve()).as_posix() for p in directory.path.iterdir()] == [
        "gradwatch-a-b/record.jsonl"
    ]


HOLDS = """
import os, signal, sys, torch, gradwatch
model = torch.nn.Linear(3, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
watcher = gradwatch.watch(model, optimizer, logdir=sys.argv[1])
print("ready", flush=True)
for line in sys.stdin:
    if line == "die\\n":
        os.kill(os.getpid(), signal.SIGKILL)
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.randn(4, 3)).sum().backward()
        optimizer.step()
    if line == "close\\n":
        watcher.close()
    print("done", flush=True)
"""


@pytest.mark.parametrize("column", [f.name for f in dataclasses.fields(Snapshot) if "Column" in str(f.type)])
def test_a_column_that_is_not_as_long_as_there_are_parameters_is_a_broken_line(column, tmp_path):
    model = ModelInfo((LayerInfo("l", "Linear"),), (ParameterInfo("l.weight", "l", (1,), "float32", 0, "weight"),) * 2)
    record = Record(tmp_path)
    record(Report(dataclasses.replace(Snapshot(0, 1.0, model, norm=(1.0, 1.0)), **{column: (1.0,)})))
    record(Report(Snapshot(1, 2.0, model, norm=(1.0, 1.0))))
    record.close()
    run = read_run(tmp_path)

    assert ([s.step for s in run.snapshots], run.broken) == ([1], 1)


def test_two_processes_do_not_share_a_directory_and_one_that_is_gone_leaves_it(tmp_path):
    with subprocess.Popen(
        [*warm(), "-c", HOLDS, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:

        def tell(line):
            other.stdin.write(line + "\n")
            other.stdin.flush()
            assert other.stdout.readline() == "done\n"

        assert other.stdout.readline() == "ready\n"
        mine = watched(tmp_path)
        tell("go on")
        mine.close()
        assert {name: len(run.snapshots) for name, run in read_runs(tmp_path).items()} == {
            "gradwatch": 5,
            "gradwatch-2": 3,
        }
        tell("close")
        watched(tmp_path, steps=4).close()  # it lives, and has let go
        assert len(read_runs(tmp_path)["gradwatch"].snapshots) == 4
        kinds = {path.name.partition(".")[0] for folder in tmp_path.iterdir() for path in folder.iterdir()}
        assert kinds == {"record", "events"}
    with subprocess.Popen(
        [*warm(), "-c", HOLDS, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "ready\n"
        second = RunDirectory(tmp_path)
        second.close()
        assert second.path.name == "gradwatch-2"
        other.stdin.write("die\n")
    assert other.returncode == -signal.SIGKILL
    first = RunDirectory(tmp_path)
    first.close()
    assert first.path.name == "gradwatch"


def test_a_cell_of_a_notebook_that_runs_again_takes_its_own_directory(tmp_path):
    names = {}
    cell = """if True:
        model = Net(1)
        model.itself = [model]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        watcher = gradwatch.watch(model, optimizer, logdir=logdir, on_alert=lambda _: None)
        train(watcher, model, optimizer, 3)
    """
    names |= {"Net": Net, "torch": torch, "gradwatch": gradwatch, "train": train, "logdir": tmp_path}
    for _ in range(4):
        exec(cell, names)
    names["watcher"].close()
    assert [path.name for path in tmp_path.iterdir()] == ["gradwatch"]
    assert len(read_run(tmp_path).snapshots) == 3


def test_a_new_run_in_the_same_logdir_takes_the_place_of_the_old(tmp_path):
    watched(tmp_path, steps=8).close()
    mine = tmp_path / "gradwatch" / "events.out.tfevents.1.mine"
    mine.touch()
    watched(tmp_path, steps=2).close()
    assert len(read_run(tmp_path).snapshots) == 2
    files = sorted(p.name for p in (tmp_path / "gradwatch").glob("events.*"))
    assert len(files) == 2
    assert mine.name in files  # what is not gradwatch's is not touched


def test_a_run_that_goes_on_is_appended(tmp_path):
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    watcher = gradwatch.watch(model, optimizer, logdir=tmp_path, on_alert=lambda _: None)
    train(watcher, model, optimizer, 25)
    state = watcher.state_dict()
    watcher.close()
    before = read_run(tmp_path)
    with (tmp_path / "gradwatch" / "record.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"model":{"layers":[{"na')  # as a kill may leave it
    watcher = gradwatch.watch(model, optimizer, logdir=tmp_path, on_alert=lambda _: None)
    watcher.load_state_dict(state)
    train(watcher, model, optimizer, 15)
    watcher.close()
    run = read_run(tmp_path)
    assert [s.step for s in run.snapshots] == list(range(40))
    assert run.broken == 0
    assert before.alerts
    assert [a.began for a in run.alerts[: len(before.alerts)]] == [a.began for a in before.alerts]
    assert run.alerts[0].last == 39
    events = list((tmp_path / "gradwatch").glob("events.*"))
    assert len(events) == 2
    assert all(file.stat().st_size > 1000 for file in events)


def folded(snapshots, detectors=DETECTORS):
    """Return the alerts that the detectors find in these snapshots, as `Watcher` folds them."""
    history, still, told = History(), (), {}
    for one in snapshots:
        report = judge(history, one, still, detectors=detectors)
        still = report.open
        told.update({(*a.finding.key, a.began): a for a in (*report.open, *report.cleared)})
    return list(told.values())


def by_name(alerts):
    return sorted(alerts, key=lambda a: (a.began, a.finding.code, a.finding.place))


@pytest.mark.parametrize("poison", [(), (30, 31)], ids=["vanishing", "nan"])
def test_the_record_replayed_gives_exactly_the_alerts_of_the_live_run(tmp_path, poison):
    model, live = Net(), {}

    def note(report):
        live.update({(*a.finding.key, a.began): a for a in (*report.open, *report.cleared)})

    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with gradwatch.watch(model, optimizer, logdir=tmp_path, sinks=[note], on_alert=lambda _: None) as watcher:
        train(watcher, model, optimizer, 60, poison)
    run = read_run(tmp_path)
    assert len(run.snapshots) == 60
    codes = {a.finding.code for a in live.values()}
    assert "GW101" in codes
    assert ("GW501" in codes) == bool(poison)
    if poison:
        assert any(a.cleared is not None for a in live.values())
    assert same(by_name(run.alerts), by_name(live.values()))
    assert same(by_name(folded(run.snapshots)), by_name(live.values()))


def test_two_optimizers_are_replayed_too(tmp_path):
    torch.manual_seed(0)
    model, live = Net(), {}
    parameters = list(model.parameters())
    optimizers = [torch.optim.SGD(parameters[:8], lr=0.01), torch.optim.Adam(parameters[8:], lr=0.01)]

    def note(report):
        live.update({(*a.finding.key, a.began): a for a in (*report.open, *report.cleared)})

    with gradwatch.watch(model, optimizers, logdir=tmp_path, sinks=[note], on_alert=lambda _: None) as watcher:
        x = torch.randn(8, 6)
        for _ in range(30):
            model.zero_grad()
            loss = model(x).square().mean()
            watcher.record(loss)
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
    run = read_run(tmp_path)
    assert len(run.snapshots) == 60
    assert live
    assert same(by_name(folded(run.snapshots)), by_name(live.values()))


def test_wall_time_is_the_time_of_the_step(tmp_path):
    before = time.time()
    watched(tmp_path).close()
    assert all(before <= s.wall_time <= time.time() for s in read_run(tmp_path).snapshots)


@pytest.mark.slow
def test_a_model_of_very_many_parameters_is_read_back(tmp_path):
    names = [f"model.layers.{i}.self_attention.projection_of_queries" for i in range(80_000)]
    layers = tuple(gradwatch.LayerInfo(name, "Linear") for name in names)
    parameters = tuple(
        gradwatch.ParameterInfo(f"{name}.weight", name, (4, 4), "float32", None, "weight") for name in names
    )
    model = gradwatch.ModelInfo(layers, parameters, ())
    record = gradwatch.Record(tmp_path)
    record(Report(snapshot(0, model, norm=(1.0,) * len(names))))
    record.close()

    (read,) = gradwatch.read_run(tmp_path).snapshots
    assert read.model == model
