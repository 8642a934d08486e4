"""The command line as a shell sees it: what is printed, and the exit status."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from interpreters import warm
from models import deep
from torch import nn

import gradwatch
from gradwatch.cli import main


def train(logdir, *, sick, steps=25, **options):
    torch.manual_seed(0)
    act = nn.Sigmoid if sick else nn.Tanh
    depth = 14 if sick else 2
    model = deep(depth, 6, act)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x, y = torch.randn(16, 6), torch.randn(16, 1)
    with gradwatch.watch(model, optimizer, logdir=logdir, on_alert=lambda _: None, **options) as watcher:
        for _ in range(steps):
            optimizer.zero_grad()
            loss = (model(x) - y).square().mean()
            watcher.record(loss)
            loss.backward()
            optimizer.step()
    return watcher.report


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    top = tmp_path_factory.mktemp("runs")
    train(top / "sick", sick=True)
    train(top / "well", sick=False)
    return top


def gradwatch_(*arguments, **environment):
    clean = {
        k: v
        for k, v in os.environ.items()
        if k not in {"COLUMNS", "NO_COLOR", "FORCE_COLOR", "TERM", "PYTHONIOENCODING"}
    }
    command = [*warm(), "-m", "gradwatch", *map(str, arguments)]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        encoding="utf-8",
        env={**clean, "PYTHONUTF8": "1", **environment},
    )


def test_check_is_0_for_a_healthy_run_and_1_for_a_sick_one(runs):
    well, sick = gradwatch_("check", runs / "well"), gradwatch_("check", runs / "sick")
    assert (well.returncode, well.stderr) == (0, "")
    assert well.stdout == "25 measured steps, 0 to 24: no alert\n"
    assert (sick.returncode, sick.stderr) == (1, "")
    assert "GW101" in sick.stdout


def test_check_judges_alerts_that_have_cleared_too_and_passes_over_infos(tmp_path):
    finding = gradwatch.Finding("GW501", "non-finite", gradwatch.Severity.ERROR, "head")
    info = gradwatch.Alert(gradwatch.Finding("GW101", "vanishing-depth", gradwatch.Severity.INFO, "body"), 0, 0)
    model = gradwatch.ModelInfo((), ())
    for name, fields in {
        "cleared": {"cleared": (gradwatch.Alert(finding, 0, 0, cleared=0),)},
        "info": {"open": (info,)},
    }.items():
        record = gradwatch.Record(tmp_path / name)
        record(gradwatch.Report(gradwatch.Snapshot(0, 1e9, model), **fields))
        record.close()
    assert gradwatch_("check", tmp_path / "cleared").returncode == 1
    done = gradwatch_("check", tmp_path / "info")
    assert done.returncode == 0
    assert "GW101" not in done.stdout


def test_report_is_0_also_for_a_sick_run(runs):
    for name in ("sick", "well"):
        done = gradwatch_("report", runs / name)
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("command", ["report", "check"])
def test_layer_step_cause_and_remedy_are_named(runs, command):
    alert = next(a for a in gradwatch.read_run(runs / "sick").alerts if a.finding.code == "GW101")
    printed = " ".join(gradwatch_(command, runs / "sick", COLUMNS="300").stdout.split())
    for part in (
        alert.finding.place,
        f"began at step {alert.began}",
        f"last seen at step {alert.last}",
        alert.message,
        f"why: {alert.cause}",
        f"try: {alert.remedy}",
    ):
        assert part in printed


def test_the_report_shows_the_layers_in_forward_order_with_their_norms(runs):
    run = gradwatch.read_run(runs / "sick")
    lines = gradwatch_("report", runs / "sick", COLUMNS="100").stdout.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("layer "))
    rows = [line.split() for line in lines[start + 1 : start + 16]]
    last = run.snapshots[-1]
    for row, index in zip(rows, last.model.forward_order, strict=True):
        layer = last.model.layers[index]
        norm = sum(n**2 for n, p in zip(last.norm, last.model.parameters, strict=True) if p.layer == layer.name) ** 0.5
        assert row[:3] == [layer.name, "Linear", f"{norm:.2e}"]
    assert rows[0][-1] == "GW101"


def test_an_unreadable_run_is_2_and_one_line(tmp_path):
    (tmp_path / "foreign.jsonl").write_text("hello\n")
    for path, said in (
        (tmp_path / "nothing", "no record.jsonl in or below"),
        (tmp_path / "foreign.jsonl", "is not a record of format 1"),
    ):
        for command in ("report", "check"):
            done = gradwatch_(command, path)
            assert done.returncode == 2
            assert done.stdout == ""
            assert done.stderr.startswith(f"gradwatch {command}: ")
            assert said in done.stderr
            assert done.stderr.count("\n") == 1


def test_check_is_2_where_the_record_tells_nothing_or_is_ruined_and_not_for_the_half_line_of_a_killed_run(
    runs, tmp_path
):
    lines = (runs / "well" / "gradwatch" / "record.jsonl").read_text().splitlines(keepends=True)
    spoiled = [*lines[:5], "#" + lines[5], *lines[6:]]
    cases = {
        "killed": ([*lines[:-1], lines[-1][:20]], 0, "1 line of the record could not be read"),
        "spoiled": (spoiled, 2, "1 line of the record could not be read"),
        "both": ([*spoiled, '{"snap'], 2, "2 lines of the record could not be read"),
        "empty": (lines[:2], 2, "no step was recorded"),
        "alerts only": ([lines[0], *("#" + line for line in lines[1:])], 2, "lines of the record could not be read"),
    }
    for name, (content, status, note) in cases.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "record.jsonl").write_text("".join(content))
        done = gradwatch_("check", tmp_path / name)
        assert (done.returncode, done.stderr) == (status, "")
        assert f"Note: {note}" in done.stdout or name == "alerts only"
        assert note in gradwatch_("report", tmp_path / name).stdout
    assert gradwatch_("check", tmp_path).returncode == 2  # one of several is enough


@pytest.mark.parametrize(
    "arguments",
    [(), ("nonsense",), ("check",), ("check", "a", "b"), ("check", "--nonsense", "a"), ("demo", "--steps", "0")],
)
def test_wrong_usage_is_2_with_the_usage(arguments):
    done = gradwatch_(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: gradwatch")
    assert "Traceback" not in done.stderr


def test_the_help_of_check_says_what_its_exit_status_means(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["check", "--help"])

    said = " ".join(capsys.readouterr().out.split())
    assert "exit status 0: none of --fail-on or higher, 1: some, 2: unreadable" in said


def test_the_version_is_the_packages():
    done = gradwatch_("--version")
    assert (done.returncode, done.stdout) == (0, f"gradwatch {gradwatch.__version__}\n")


def test_several_runs_are_each_named_and_one_that_is_sick_is_enough(runs):
    done = gradwatch_("check", runs)
    assert done.returncode == 1
    assert "sick/gradwatch: 25 measured steps, 0 to 24: " in done.stdout
    assert "well/gradwatch: 25 measured steps, 0 to 24: no alert" in done.stdout
    done = gradwatch_("report", runs)
    assert done.returncode == 0
    assert done.stdout.index("sick/gradwatch: ") < done.stdout.index("well/gradwatch: ")


def test_a_run_with_brackets_in_its_name_keeps_them(tmp_path):
    for name in ("lr[0.1]", "lr[red]"):
        train(tmp_path / name, sick=False, steps=1)
    for command in ("check", "report"):
        printed = gradwatch_(command, tmp_path).stdout
        assert "lr[0.1]/gradwatch: " in printed
        assert "lr[red]/gradwatch: " in printed


def test_two_optimizers_are_two_tables(tmp_path):
    torch.manual_seed(0)
    model = nn.ModuleDict({"generator": nn.Linear(4, 4), "critic": nn.Linear(4, 1)})
    optimizers = [
        torch.optim.SGD(model["generator"].parameters(), lr=0.1),
        torch.optim.Adam(model["critic"].parameters()),
    ]
    with gradwatch.watch(model, optimizers, logdir=tmp_path):
        model["critic"](model["generator"](torch.randn(8, 4))).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
    lines = gradwatch_("report", tmp_path, COLUMNS="200").stdout.splitlines()
    rows = {name: [line for line in lines if line.startswith(name)] for name in ("generator", "critic")}
    for found in rows.values():
        assert len(found) == 1
        assert "none" not in found[0].split()[2]
    assert any("SGD 0" in line for line in lines)
    assert any("Adam 1" in line for line in lines)


# --- terminals ---


@pytest.mark.parametrize("environment", [{}, {"NO_COLOR": "1"}, {"TERM": "xterm-256color"}], ids=str)
def test_what_goes_into_a_pipe_has_no_escape_codes_and_no_padding(runs, environment):
    for command in ("report", "check"):
        printed = gradwatch_(command, runs / "sick", **environment).stdout
        assert "\x1b" not in printed
        assert all(line == line.rstrip() for line in printed.splitlines())


def in_terminal(*arguments, columns=80, **environment):
    """Run in a real pseudo-terminal and give what it shows."""
    import pty

    keeper, terminal = pty.openpty()
    clean = {k: v for k, v in os.environ.items() if k not in {"NO_COLOR", "FORCE_COLOR"}}
    env = {**clean, "TERM": "xterm-256color", "COLUMNS": str(columns), "PYTHONUTF8": "1", **environment}
    process = subprocess.Popen([*warm(), "-m", "gradwatch", *map(str, arguments)], stdout=terminal, env=env)
    os.close(terminal)
    shown = b""
    try:
        while part := os.read(keeper, 65536):
            shown += part
    except OSError:  # how Linux says that the other end is closed
        pass
    finally:
        os.close(keeper)
        process.wait()
    return shown.decode()


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_a_terminal_gets_colours_unless_no_color_is_set(runs):
    assert "\x1b[33m" in in_terminal("report", runs / "sick")
    plain = in_terminal("report", runs / "sick", NO_COLOR="1")
    assert "\x1b[3" not in plain
    assert "GW101" in plain


@pytest.mark.parametrize("columns", [40, 60, 80])
def test_no_line_is_wider_than_the_terminal_and_names_norms_and_codes_stay_whole(runs, columns):
    run = gradwatch.read_run(runs / "sick")
    for command in ("report", "check"):
        lines = gradwatch_(command, runs / "sick", COLUMNS=str(columns)).stdout.splitlines()
        assert max(map(len, lines)) <= columns
    lines = [line.split() for line in gradwatch_("report", runs / "sick", COLUMNS=str(columns)).stdout.splitlines()]
    for layer in run.snapshots[-1].model.layers:
        (row,) = (line for line in lines if line[:1] == [layer.name] and any("e-" in cell for cell in line))
        assert not any("…" in cell for cell in row)
        assert ("GW101" in row) == (
            layer.name == next(a.finding.place for a in run.alerts if a.finding.code == "GW101")
        )


def test_a_reader_that_has_seen_enough_is_no_failure(runs):
    for command, status in (("check", 1), ("report", 0)):
        process = subprocess.Popen(
            [sys.executable, "-m", "gradwatch", command, str(runs / "sick")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        process.stdout.close()  # before it has written anything, as `| head -0` may
        error = process.stderr.read()
        process.stderr.close()
        assert process.wait() == status
        assert error == b""


def test_a_terminal_that_lacks_the_bars_shows_the_rest(runs):
    done = subprocess.run(
        [*warm(), "-m", "gradwatch", "report", str(runs / "sick")],
        capture_output=True,
        check=False,
        env={**os.environ, "PYTHONIOENCODING": "ascii", "COLUMNS": "100"},
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"GW101" in done.stdout


def test_the_command_line_imports_no_torch(runs):
    code = "import sys, gradwatch.cli as c; s = c.main(['check', sys.argv[1]]); print(s, 'torch' in sys.modules)"
    done = subprocess.run([*warm(), "-c", code, str(runs / "well")], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "0 False"
    code = "import sys, gradwatch.cli, gradwatch.watcher.watcher; print('torch' in sys.modules)"
    assert (
        subprocess.run([*warm(), "-c", code], capture_output=True, text=True, check=False).stdout == "True\n"
    )  # it would be seen
