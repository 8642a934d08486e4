"""Sinks get every report, and one that fails takes nothing from the training nor from the others."""

from __future__ import annotations

import gc
import hashlib
import io
import logging
import math
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from interpreters import warm
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.tensorboard import SummaryWriter

import gradwatch
from gradwatch import GradwatchWarning, Record, Report, TensorBoardSink, read_run
from gradwatch.sinks.run_directory import held


class Net(nn.Sequential):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def steps(model, optimizer, count, poison=()):
    data = torch.Generator().manual_seed(1)
    for step in range(count):
        optimizer.zero_grad()
        loss = model(torch.randn(8, 4, generator=data)).square().mean()
        loss.backward()
        if step in poison:
            model[0].weight.grad[0, 0] = math.nan
        optimizer.step()
        if step in poison:
            with torch.no_grad():
                model[0].weight.nan_to_num_(0.1)


def train(count=12, *, poison=(), **options):
    """Train a small network under watch and give its weights."""
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with gradwatch.watch(model, optimizer, **{"on_alert": lambda _: None, **options}):
        steps(model, optimizer, count, poison)
    return [p.detach().clone() for p in model.parameters()]


@pytest.fixture(scope="module")
def unwatched():
    model = Net()
    steps(model, torch.optim.SGD(model.parameters(), lr=0.05), 12)
    return [p.detach().clone() for p in model.parameters()]


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def warned(**options):
    """Return the weights after a training, and what gradwatch warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        weights = train(**options)
    assert all(w.category is GradwatchWarning for w in caught), [str(w.message) for w in caught]
    return weights, [str(w.message) for w in caught]


class Failing:
    """A sink that works twice and then never again."""

    def __init__(self):
        self.calls = self.closed = 0

    def __call__(self, report):
        self.calls += 1
        if self.calls > 2:
            raise OSError(28, "No space left on device")

    def close(self):
        self.closed += 1
        raise RuntimeError("cannot close either")


def test_any_callable_gets_one_report_for_each_measured_step():
    reports = []
    train(23, sinks=[reports.append], every_n_steps=5, probe_every_n_steps=10)
    assert all(type(r) is Report for r in reports)
    assert [r.snapshot.step for r in reports] == [0, 5, 10, 15, 20]
    assert [r.snapshot.weight_norm is not None for r in reports] == [True, False, True, False, True]


def test_a_sink_that_fails_warns_once_is_switched_off_and_takes_nothing_from_the_others(unwatched, tmp_path):
    first, failing, last = [], Failing(), []
    weights, messages = warned(sinks=[first.append, failing, last.append], logdir=tmp_path)
    assert equal(weights, unwatched)
    assert messages == [
        "gradwatch: the sink Failing failed and is switched off: OSError: [Errno 28] No space left on device"
    ]
    assert failing.calls == 3
    assert failing.closed == 1
    assert len(first) == len(last) == 12
    assert len(read_run(tmp_path).snapshots) == 12


def test_two_sinks_that_fail_are_two_warnings():
    _, messages = warned(sinks=[Failing(), Failing()])
    assert len(messages) == 2


def test_a_sink_that_fails_raises_nothing_under_w_error(unwatched, caplog):
    failing, last = Failing(), []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weights = train(sinks=[failing, last.append])
    assert equal(weights, unwatched)
    assert len(last) == 12
    said = [r for r in caplog.records if "the sink Failing failed" in r.message]
    assert [(r.name, r.levelno) for r in said] == [("gradwatch", logging.WARNING)]


def test_an_interrupt_in_a_sink_is_not_swallowed():
    def interrupt(report):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(sinks=[interrupt])


# --- real failures of files ---


def test_a_logdir_that_is_a_file_is_refused_at_once(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match=r"logdir must be a folder, got the file .*file"):
        gradwatch.watch(Net(), logdir=tmp_path / "file")


@pytest.mark.skipif(sys.platform != "linux", reason="a folder in which nobody can make one")
def test_a_directory_that_cannot_be_made_is_two_warnings_and_no_more(unwatched):
    last = []
    weights, messages = warned(logdir="/proc/gradwatch", sinks=[last.append])
    assert equal(weights, unwatched)
    assert sorted(m.split(" failed")[0] for m in messages) == [
        "gradwatch: the sink Record",
        "gradwatch: the sink TensorBoardSink",
    ]
    assert all("FileNotFoundError" in m for m in messages)
    assert len(last) == 12


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_without_permission_is_two_warnings_and_no_more(unwatched, tmp_path):
    tmp_path.chmod(0o500)
    weights, messages = warned(logdir=tmp_path)
    assert equal(weights, unwatched)
    assert len(messages) == 2
    assert all("PermissionError" in m for m in messages)


def test_a_directory_deleted_during_the_run_is_noticed(unwatched, tmp_path):
    last = []

    def delete(report):
        if report.snapshot.step == 4:
            shutil.rmtree(tmp_path / "gradwatch")
        last.append(report)

    weights, messages = warned(logdir=tmp_path, sinks=[delete])
    assert equal(weights, unwatched)
    assert sorted(m.split(" failed")[0] for m in messages) == [
        "gradwatch: the sink Record",
        "gradwatch: the sink TensorBoardSink",
    ]
    assert all("was deleted while it was written" in m for m in messages)
    assert len(last) == 12


def test_a_directory_that_is_moved_during_the_run_is_written_to_the_end(tmp_path):
    def move(report):
        if report.snapshot.step == 4:
            (tmp_path / "gradwatch").rename(tmp_path / "moved")

    _, messages = warned(logdir=tmp_path, sinks=[move])
    assert messages == []
    assert len(read_run(tmp_path / "moved").snapshots) == 12


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a device that is always full")
def test_a_full_disk_switches_the_record_off_and_leaves_the_events(unwatched, tmp_path):
    (tmp_path / "gradwatch").mkdir()
    (tmp_path / "gradwatch" / "record.jsonl").symlink_to("/dev/full")
    last = []
    weights, messages = warned(logdir=tmp_path, sinks=[last.append])
    assert equal(weights, unwatched)
    assert len(messages) == 1
    assert "the sink Record failed and is switched off" in messages[0]
    assert "No space left on device" in messages[0]
    assert len(last) == 12
    events = EventAccumulator(str(tmp_path / "gradwatch"))
    events.Reload()
    assert [e.step for e in events.Scalars("gradwatch/norm_global")] == list(range(12))


LIMITED = """
import hashlib, resource, sys, torch, gradwatch
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))  # the kernel refuses every write beyond
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
reports = []
watcher = gradwatch.watch(model, optimizer, logdir=sys.argv[1], sinks=[reports.append])
data = torch.Generator().manual_seed(1)
for _ in range(12):
    optimizer.zero_grad()
    model(torch.randn(8, 4, generator=data)).square().mean().backward()
    optimizer.step()
watcher.close()
print(len(reports), hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest())
"""


@pytest.mark.slow
def test_files_that_cannot_grow_are_switched_off_one_by_one_and_stay_readable(unwatched, tmp_path):
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-c", LIMITED, str(tmp_path), "2000"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    count, digest = done.stdout.split()
    assert count == "12"
    assert digest == hashlib.sha256(b"".join(p.numpy().tobytes() for p in unwatched)).hexdigest()
    assert done.stderr.count("the sink Record failed and is switched off: OSError: [Errno 27] File too large") == 1
    assert (
        done.stderr.count("the sink TensorBoardSink failed and is switched off: OSError: [Errno 27] File too large")
        == 1
    )
    assert "Exception ignored" not in done.stderr
    assert "ResourceWarning" not in done.stderr
    run = read_run(tmp_path)
    assert 0 < len(run.snapshots) < 12


def test_a_users_writer_that_was_closed_is_one_warning(unwatched, tmp_path):
    writer = SummaryWriter(str(tmp_path))
    last = []

    def close(report):
        if report.snapshot.step == 4:
            writer.close()
        last.append(report)

    weights, messages = warned(sinks=[TensorBoardSink(writer), close])
    assert equal(weights, unwatched)
    assert len(messages) == 1
    assert "the sink TensorBoardSink failed and is switched off" in messages[0]
    assert len(last) == 12


# --- closing ---


class Closing(list):
    closed = 0

    def __call__(self, report):
        self.append(report)

    def close(self):
        self.closed += 1


def test_sinks_with_close_are_closed_once_after_their_last_report():
    sink, model = Closing(), Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with gradwatch.watch(model, optimizer, sinks=[sink]) as watcher:
        steps(model, optimizer, 3)
        assert sink.closed == 0
    watcher.close()
    watcher.close()
    steps(model, optimizer, 3)
    assert sink.closed == 1
    assert len(sink) == 3


def test_a_sink_whose_close_fails_does_not_keep_the_next_from_being_closed():
    failing, closing = Failing(), Closing()
    failing.calls = -100
    train(3, sinks=[failing, closing])
    assert (failing.closed, closing.closed) == (1, 1)


UNCLOSED = """
import sys, torch, gradwatch
torch.manual_seed(0)
model = torch.nn.Linear(3, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
class Sink:
    def __call__(self, report): pass
    def close(self): print("closed", flush=True)
watcher = gradwatch.watch(model, optimizer, logdir=sys.argv[1], sinks=[Sink()])
for step in range(12):
    optimizer.zero_grad()
    model(torch.randn(4, 3)).sum().backward()
    if step == 9:
        model.weight.grad.fill_(float("nan"))
    optimizer.step()
    with torch.no_grad():
        model.weight.nan_to_num_(0.1)
sys.exit(7)
"""


def test_a_process_that_ends_without_close_leaves_complete_files_and_keeps_its_exit_code(tmp_path):
    done = subprocess.run([*warm(), "-c", UNCLOSED, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 7
    assert done.stdout == "closed\n"
    assert "Traceback" not in done.stderr
    run = read_run(tmp_path)
    assert [s.step for s in run.snapshots] == list(range(12))
    assert [(a.finding.code, a.began, a.last) for a in run.alerts] == [("GW501", 9, 9)]
    events = EventAccumulator(str(tmp_path / "gradwatch"))
    events.Reload()
    assert [e.step for e in events.Scalars("gradwatch/norm_global")] == list(range(12))
    assert [i.step for i in events.Images("gradwatch_heatmap/layers")] == [11]  # the picture of the end


def open_files(root):
    """Return the files below a folder that this process writes."""
    kinds = (io.TextIOWrapper, io.BufferedWriter)
    return [f for f in gc.get_objects() if type(f) in kinds and not f.closed and str(root) in str(f.name)]


def test_the_files_are_closed_with_the_watcher(tmp_path):
    record, board = Record(tmp_path), TensorBoardSink(tmp_path)
    during = []
    train(3, sinks=[record, board, lambda _: during.append(len(open_files(tmp_path)))])
    assert set(during) == {3}  # the record as text and as bytes, and the events
    assert [file.name for file in open_files(tmp_path)] == []


def test_the_files_of_a_watcher_that_nobody_closed_are_finished_when_it_goes(tmp_path):
    model, closing = Net(), Closing()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    sinks = [Record(tmp_path / "mine"), TensorBoardSink(tmp_path / "mine")]
    options = {"logdir": tmp_path, "every_n_steps": 1, "on_alert": lambda _: None}
    watcher = gradwatch.watch(model, optimizer, sinks=[*sinks, closing], **options)
    steps(model, optimizer, 12, poison=(9,))
    assert open_files(tmp_path)
    assert held() == {tmp_path.resolve() / "gradwatch"}

    del watcher, sinks, model, optimizer
    gc.collect()

    assert open_files(tmp_path) == []
    assert held() == frozenset()
    assert closing.closed == 1
    for folder in (
        "gradwatch",
        "mine",
    ):  # with what only a close writes: the last word on an open alert, and the last picture
        run = read_run(tmp_path / folder)
        assert [(a.finding.code, a.began, a.last) for a in run.alerts] == [("GW501", 9, 9)]
        events = EventAccumulator(str(tmp_path / folder))
        events.Reload()
        assert [i.step for i in events.Images("gradwatch_heatmap/layers")] == [11]


# --- the logger ---


def test_the_logger_tells_what_began_and_what_cleared_at_the_level_of_its_severity(caplog):
    caplog.set_level(logging.DEBUG, logger="gradwatch")
    reports = []
    train(60, poison=(9,), on_alert="warn", sinks=[reports.append])
    began = [a for r in reports for a in r.began]
    cleared = [a for r in reports for a in r.cleared]
    assert "GW501" in {a.finding.code for a in began}
    assert "GW501" in {a.finding.code for a in cleared}
    levels = {"info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
    records = [r for r in caplog.records if r.name == "gradwatch"]
    for alert in began:
        assert (levels[alert.severity.value], str(alert)) in [(r.levelno, r.getMessage()) for r in records]
    for alert in cleared:
        place = alert.finding.place or "the whole model"
        said = f"{alert.finding.code} {alert.finding.kind} at {place} cleared at step {alert.cleared}"
        assert (logging.INFO, said) in [(r.levelno, r.getMessage()) for r in records]
    assert len(records) == len(began) + len(cleared)


def test_a_function_that_takes_the_alerts_takes_them_from_the_logger(caplog):
    caplog.set_level(logging.DEBUG, logger="gradwatch")
    taken = []
    train(12, poison=(9,), on_alert=taken.append)
    assert [a.finding.code for a in taken] == ["GW501"]
    assert [r for r in caplog.records if r.name == "gradwatch"] == []
