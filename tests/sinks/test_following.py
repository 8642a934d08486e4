"""A record that is followed while it grows says at each look what reading it from its beginning would say."""

from __future__ import annotations

import dataclasses
import io
import math
import os
import pty
import re
import subprocess
import sys
import textwrap
import time

import pytest
from interpreters import warm

import gradwatch
from gradwatch import Alert, Finding, LayerInfo, ModelInfo, ParameterInfo, Record, Report, Severity, Snapshot, read_run
from gradwatch.cli import main
from gradwatch.sinks.reading import Following, records
from gradwatch.sinks.terminal.follow import follow

MODEL = ModelInfo(
    (LayerInfo("body", "Linear", 0), LayerInfo("head", "Linear", 1)),
    tuple(ParameterInfo(f"{n}.weight", n, (2, 2), "float32", 0, "weight") for n in ("body", "head")),
)


@pytest.fixture
def opened():
    """Return what opens records that are closed at the end."""
    made = []

    def open_(*arguments, **options):
        made.append(Record(*arguments, **options))
        return made[-1]

    yield open_
    for record in made:
        record.close()


def report(step, *alerts, norm=(1e-3, 1.0), at=1e9):
    snapshot = Snapshot(step, at + step, MODEL, loss=1.0 / (step + 1), norm=norm)
    return Report(snapshot, began=alerts, open=alerts)


def alert(step, place="body"):
    finding = Finding("GW101", "vanishing-depth", Severity.WARNING, place, onset=step, evidence={"layers": 1.0})
    return Alert(finding, step, step, None, "gets nothing", "", "do this", Severity.WARNING)


def test_each_look_says_what_reading_it_all_says(tmp_path, opened):
    record, file = opened(tmp_path), tmp_path / "record.jsonl"
    following = Following(file)
    with pytest.raises(FileNotFoundError):
        following.run()
    for step in range(40):
        record(report(step, *([alert(step)] if step == 7 else [])))
        if step % 3 == 0:
            assert following.run() == read_run(tmp_path)
    whole = following.run()
    assert following.run() is whole  # nothing has come since


def test_half_a_line_is_left_until_it_is_whole(tmp_path, opened):
    record, file = opened(tmp_path), tmp_path / "record.jsonl"
    record(report(0))
    record(report(1))
    record.close()
    text = file.read_bytes()
    last = text[: text[:-1].rfind(b"\n") + 1]
    file.write_bytes(last + text[len(last) : -5])
    following = Following(file)
    assert [s.step for s in following.run().snapshots] == [0]
    assert not following.run().broken
    file.write_bytes(text)
    assert [s.step for s in following.run().snapshots] == [0, 1]


@pytest.mark.parametrize("lines", [3, 60])
def test_a_record_that_is_written_anew_is_read_anew(tmp_path, opened, lines):
    first, second, file = opened(tmp_path / "a"), opened(tmp_path / "b"), tmp_path / "record.jsonl"
    for step in range(30):
        first(report(step))
    for step in range(lines):
        second(report(step, norm=(2.0, 2.0), at=2e9))
    file.write_bytes((tmp_path / "a" / "record.jsonl").read_bytes())
    following = Following(file)
    assert len(following.run().snapshots) == 30
    file.write_bytes((tmp_path / "b" / "record.jsonl").read_bytes())  # the same file, shorter or longer
    assert following.run() == dataclasses.replace(read_run(tmp_path / "b"), path=str(file))


def test_a_record_that_is_thinned_meanwhile_is_followed(tmp_path, opened):
    record = opened(tmp_path, bound=6000)
    following = Following(tmp_path / "record.jsonl")
    for step in range(400):
        record(report(step))
        if step % 7 == 0:
            assert following.run() == read_run(tmp_path)
    assert following.run().thinned > 0


def test_a_run_is_named_by_its_folder(tmp_path, opened):
    opened(tmp_path / "a" / "gradwatch")(report(0))
    assert records(tmp_path) == {"a/gradwatch": tmp_path / "a" / "gradwatch" / "record.jsonl"}
    assert records(tmp_path / "a" / "gradwatch" / "record.jsonl") == {
        "record.jsonl": tmp_path / "a" / "gradwatch" / "record.jsonl"
    }


# --- in a terminal ---


def test_what_is_no_terminal_gets_a_line_for_what_is_new(tmp_path, opened):
    record, out, looks = opened(tmp_path), io.StringIO(), iter(range(5))

    def going():
        look = next(looks)
        if look in (1, 3):
            for step in range(look * 10, look * 10 + 10):
                record(report(step, *([alert(step)] if step == 35 else [])))
        return look < 4

    follow(str(tmp_path), out, every=0.0, going=going)
    assert out.getvalue().splitlines() == [
        f"{tmp_path}: waiting for the first step",
        f"{tmp_path}: step 19, loss 0.05, 1 steps/s; no open alert",
        f"{tmp_path}: step 39, loss 0.025, 1 steps/s; open: GW101 body",
    ]


def test_a_share_that_is_away_for_a_while_ends_nothing(tmp_path, opened):
    record, out, looks, file = opened(tmp_path), io.StringIO(), iter(range(5)), tmp_path / "record.jsonl"
    for step in range(20):
        record(report(step))

    def going():
        look = next(looks)
        if look == 1:
            file.rename(tmp_path / "away")
            file.symlink_to(file)  # as a share that lost its connection: there, and cannot be read
            with pytest.raises(OSError, match="Too many levels"):
                file.open()
        if look == 3:
            file.unlink()
            (tmp_path / "away").rename(file)
            record(report(20))
        return look < 4

    follow(str(tmp_path), out, every=0.0, going=going)
    assert out.getvalue().splitlines() == [
        f"{tmp_path}: step 19, loss 0.05, 1 steps/s; no open alert",
        f"{tmp_path}: step 20, loss 0.04762, 1 steps/s; no open alert",
    ]


def test_a_run_that_went_on_from_a_checkpoint_has_no_negative_speed(tmp_path, opened):
    record, out = opened(tmp_path), io.StringIO()
    for number, step in enumerate((100, 101, 50, 51)):
        record(report(step, at=1e9 + number - step))
    follow(str(tmp_path), out, every=0.0, going=lambda: False)
    assert out.getvalue() == f"{tmp_path}: step 51, loss 0.01923; no open alert\n"


@pytest.mark.parametrize("options", [["--html", "x.html"], ["--ignore", "GW101"], ["--format", "json"], ["--rejudge"]])
def test_what_does_not_go_with_following_is_refused(tmp_path, capsys, options):
    assert main(["report", str(tmp_path), "--follow", *options]) == 2
    assert f"--follow shows a run as it is recorded, and takes no {options[0]}" in capsys.readouterr().err


def test_several_runs_are_refused(tmp_path, opened):
    for name in "ab":
        opened(tmp_path / name)(report(0))
    with pytest.raises(ValueError, match="holds 2 runs, and one is wanted: a, b"):
        follow(str(tmp_path), io.StringIO(), going=lambda: False)


TRAINING = """
import sys, time, torch, gradwatch
from torch import nn
torch.manual_seed(0)
model = nn.Sequential(*(m for _ in range(14) for m in (nn.Linear(6, 6), nn.Sigmoid())), nn.Linear(6, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
with gradwatch.watch(model, optimizer, logdir=sys.argv[1], on_alert=lambda _: None) as watcher:
    for step in range(60):
        optimizer.zero_grad()
        loss = (model(torch.randn(16, 6)) - 1).square().mean()
        watcher.record(loss)
        loss.backward()
        optimizer.step()
        time.sleep(0.03)
"""


@pytest.mark.slow
@pytest.mark.parametrize("columns", [100, 40])
def test_a_training_in_another_process_is_shown_live(tmp_path, columns):
    """In a terminal of its own, wide and narrow, until Ctrl-C."""
    training = subprocess.Popen([*warm(), "-c", textwrap.dedent(TRAINING), str(tmp_path / "run")])
    ours, theirs = pty.openpty()
    code = (
        "import fcntl, struct, sys, termios;"
        f"fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack('HHHH', 40, {columns}, 0, 0));"
        "from gradwatch.cli import main; sys.exit(main(['report', sys.argv[1], '--follow']))"
    )
    shown = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "run")],
        stdout=theirs,
        stdin=theirs,
        env={k: v for k, v in os.environ.items() if k != "COLUMNS"} | {"TERM": "xterm-256color"},  # xdist sets it
    )
    os.close(theirs)
    text, deadline = "", time.monotonic() + 60
    try:
        while time.monotonic() < deadline and "GW101" not in text:
            text += os.read(ours, 65536).decode(errors="replace")
    finally:
        training.wait(60)
        shown.send_signal(2)
    assert shown.wait(20) == 0
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    assert "waiting for the first step" in " ".join(plain.split())
    assert "steps/s" in plain
    assert "get next to no gradient since step 0" in " ".join(plain.split())
    assert ("by step" in plain) == (columns == 100)  # the lines behind the layers, where there is room
    assert gradwatch.read_run(tmp_path / "run").alerts


def test_sizes_are_drawn_from_the_smallest_to_the_largest():
    from gradwatch.sinks.terminal.layer_table import _line

    assert str(_line([1e-7, 1e-6, 1e-3, 1.0, 10.0])) == "▁▂▅█" + "█"
    assert str(_line([None, 0.0, math.nan, math.inf, 1.0])) == " 0!!▁"
    assert str(_line([])) == ""
