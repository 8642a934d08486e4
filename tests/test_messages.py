"""Bad input gets an error that says what was given and what is allowed; in a training, a warning.

From someone else's file it gets never more than a warning.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
import warnings

import pytest
import torch
from torch import nn

import gradwatch
from gradwatch import Thresholds
from gradwatch.cli import main
from gradwatch.lightning import GradientMonitor
from gradwatch.sinks import run_directory
from gradwatch.values.plain import to_json

NET = nn.Linear(2, 1)
SGD = torch.optim.SGD(NET.parameters(), lr=0.1)
X = torch.ones(1, 2)
RNN = nn.LSTM(2, 2)


def watch(**options):
    return lambda tmp: gradwatch.watch(NET, SGD, **options)


def state(**changes):
    def call(_tmp):
        with gradwatch.watch(NET, SGD) as watcher:
            watcher.load_state_dict(watcher.state_dict() | changes)

    return call


def a_file(tmp):
    (tmp / "file").write_text("x")
    return tmp / "file"


TABLE = {
    # watch: the model and the optimizer
    "no module": (lambda _: gradwatch.watch(3), TypeError, "model must be a torch.nn.Module, got int"),
    "a class": (lambda _: gradwatch.watch(nn.Linear), TypeError, "model must be a torch.nn.Module, got type"),
    "a model without parameters": (
        lambda _: gradwatch.watch(nn.ReLU()),
        ValueError,
        (
            "model must have parameters, got a ReLU without any"
            " (modules in a plain list or dict are not registered: nn.ModuleList, nn.ModuleDict)"
        ),
    ),
    "an optimizer's name": (
        lambda _: gradwatch.watch(NET, "adam"),
        TypeError,
        "optimizer must have param_groups and step(), as torch.optim.Optimizer has, got str",
    ),
    "an optimizer's class": (
        lambda _: gradwatch.watch(NET, torch.optim.SGD),
        TypeError,
        "optimizer must have param_groups and step(), as torch.optim.Optimizer has, got type",
    ),
    "parameters for an optimizer": (
        lambda _: gradwatch.watch(NET, NET.parameters()),
        TypeError,
        "as torch.optim.Optimizer has, got generator",
    ),
    "an optimizer of another model": (
        lambda _: gradwatch.watch(nn.Linear(2, 1), SGD),
        ValueError,
        "must step parameters of the model, and none of the 2 of this SGD is one of them",
    ),
    "one of two is no optimizer": (lambda _: gradwatch.watch(NET, [SGD, None]), TypeError, "got NoneType"),
    "no optimizer in the list": (
        lambda _: gradwatch.watch(NET, []),
        ValueError,
        "must be an optimizer, several of them, or None, got an empty list",
    ),
    # watch: the options
    "logdir is a number": (watch(logdir=3), TypeError, "logdir must be a path, got 3"),
    "logdir is bytes": (watch(logdir=b"x"), TypeError, "logdir must be a path, got b'x'"),
    "logdir is empty": (watch(logdir=""), ValueError, "logdir must be a path, got ''"),
    "logdir with a null": (watch(logdir="a\0b"), ValueError, "logdir must be a path, got 'a"),
    "logdir is a file": (
        lambda tmp: gradwatch.watch(NET, SGD, logdir=a_file(tmp)),
        NotADirectoryError,
        "logdir must be a folder, got the file",
    ),
    "logdir in a file": (
        lambda tmp: gradwatch.watch(NET, SGD, logdir=a_file(tmp) / "x"),
        NotADirectoryError,
        "cannot be in the file",
    ),
    "name is a number": (watch(name=3), TypeError, "name must be a string or None, got 3"),
    "name is empty": (watch(name=""), ValueError, "name must have 1 to 200 characters, got 0"),
    "name is too long": (watch(name="x" * 5000), ValueError, "name must have 1 to 200 characters, got 5000"),
    "every 0 steps": (watch(every_n_steps=0), ValueError, "every_n_steps must be at least 1, got 0"),
    "every 1.5 steps": (watch(every_n_steps=1.5), TypeError, "every_n_steps must be a whole number or None, got 1.5"),
    "every True steps": (
        watch(every_n_steps=True),
        TypeError,
        "every_n_steps must be a whole number or None, got True",
    ),
    "a probe every -1 steps": (
        watch(probe_every_n_steps=-1),
        ValueError,
        "probe_every_n_steps must be at least 1, got -1",
    ),
    "timesteps is None": (watch(timesteps=None), TypeError, 'timesteps must be "auto", False, or a mapping'),
    "timesteps of no module": (
        watch(timesteps={"x": 0}),
        ValueError,
        "timesteps must name modules of the model (''), got 'x'",
    ),
    "timesteps of a negative dimension": (
        watch(timesteps={"": -1}),
        ValueError,
        "timesteps[''] must be at least 0, got -1",
    ),
    "timesteps by number": (
        watch(timesteps={1: 0}),
        TypeError,
        "must map names of modules to a dimension (a whole number) or None, got 1: 0",
    ),
    "horizon is 0": (watch(horizon=0), ValueError, "horizon must be at least 1, got 0"),
    "horizon is a text": (watch(horizon="a"), TypeError, "horizon must be a whole number or None, got 'a'"),
    "horizon of no module": (
        watch(horizon={"x": 3}),
        ValueError,
        "horizon must name modules of the model (''), got 'x'",
    ),
    "horizon is empty": (watch(horizon={}), ValueError, "horizon must name at least one module, got an empty mapping"),
    "horizon without timesteps": (
        watch(horizon=3, timesteps=False),
        ValueError,
        "horizon needs gradients through time, and timesteps is False; got horizon=3",
    ),
    "scaler is a number": (
        watch(scaler=3),
        TypeError,
        "scaler must have is_enabled() and get_scale(), as torch.amp.GradScaler has, or be None, got int",
    ),
    "thresholds is a dict": (
        watch(thresholds={}),
        TypeError,
        "thresholds must be a gradwatch.Thresholds or None, got {}",
    ),
    "ignore is a text": (
        watch(ignore="GW101"),
        TypeError,
        "ignore must be a list of strings such as [\"GW101:encoder.*\"], got 'GW101'",
    ),
    "detectors is a function": (
        watch(detectors=len),
        TypeError,
        "detectors must be a list or tuple of callables, got <built-in function len>",
    ),
    "sinks of texts": (watch(sinks=["x"]), TypeError, "sinks must be a list or tuple of callables, got ['x']"),
    "on_alert is unknown": (
        watch(on_alert="stop"),
        ValueError,
        'on_alert must be "warn", "raise" or a function that takes an Alert, got \'stop\'',
    ),
    # a watcher
    "a step of another optimizer": (
        lambda _: gradwatch.watch(NET, SGD).step(optimizer=3),
        ValueError,
        "optimizer must be one of the 1 that are watched, got 3",
    ),
    "a state that is none": (
        lambda _: gradwatch.watch(NET, SGD).load_state_dict(3),
        TypeError,
        "state must be what state_dict() gave, got 3",
    ),
    "a state of another format": (
        state(format=2),
        ValueError,
        "state must be of format 1 with a count of steps for each of 1 optimizers, got format 2 for [0]",
    ),
    "a state of two optimizers": (
        state(counts=[1, 2]),
        ValueError,
        "for each of 1 optimizers, got format 1 for [1, 2]",
    ),
    "a state with texts for numbers": (
        state(counts=["x"]),
        ValueError,
        "state must be what state_dict() gave, and could not be read: TypeError",
    ),
    "a state without a history": (
        state(history=None),
        ValueError,
        "state must be what state_dict() gave, and could not be read",
    ),
    "a state with alerts of others": (
        state(alerts=[{"a": 1}]),
        ValueError,
        "state must be what state_dict() gave, and could not be read",
    ),
    # thresholds
    "a negative threshold": (
        lambda _: Thresholds(window=-1),
        ValueError,
        "Thresholds.window must be finite and above 0, got -1",
    ),
    "a threshold of nan": (
        lambda _: Thresholds(share=math.nan),
        ValueError,
        "Thresholds.share must be finite and above 0, got nan",
    ),
    "half a window": (lambda _: Thresholds(window=1.5), TypeError, "Thresholds.window must be a whole number, got 1.5"),
    "a text for a threshold": (
        lambda _: Thresholds(share="x"),
        TypeError,
        "Thresholds.share must be a number, got 'x'",
    ),
    "a share above 1": (lambda _: Thresholds(share=2), ValueError, "Thresholds.share must be at most 1, got 2"),
    "layers in a list": (
        lambda _: Thresholds(layers=[1]),
        TypeError,
        "Thresholds.layers must map patterns of layers to fields and numbers, got [1]",
    ),
    "a layer's number": (
        lambda _: Thresholds(layers={"a": 3}),
        TypeError,
        "must map patterns of layers to fields and numbers, got 'a': 3",
    ),
    "a layer's unknown field": (
        lambda _: Thresholds(layers={"a": {"x": 3}}),
        ValueError,
        "must name fields that are looked up for each layer (vanishing_ratio,",
    ),
    # checks
    "a check of no module": (lambda _: gradwatch.check(3, X), TypeError, "model must be a torch.nn.Module, got int"),
    "a loss that is no function": (
        lambda _: gradwatch.check(NET, X, loss=3),
        TypeError,
        "loss must be a function from what the model returned to a scalar tensor, or None, got 3",
    ),
    "a loss without a graph": (
        lambda _: gradwatch.check(NET, X, loss=lambda y: y.detach().sum()),
        ValueError,
        "got a tensor of shape () without a graph",
    ),
    "thresholds of a check": (
        lambda _: gradwatch.check(NET, X, thresholds={}),
        TypeError,
        "thresholds must be a gradwatch.Thresholds or None, got {}",
    ),
    "what a check ignores": (
        lambda _: gradwatch.assert_healthy(NET, X, ignore="x"),
        TypeError,
        "ignore must be a list of strings",
    ),
    "detectors of a check": (
        lambda _: gradwatch.check(NET, X, detectors=[1]),
        TypeError,
        "detectors must be a list or tuple of callables, got [1]",
    ),
    "a check without parameters": (
        lambda _: gradwatch.check(nn.ReLU(), X),
        ValueError,
        "must hold a floating-point tensor that depends on its parameters, got Tensor",
    ),
    "a horizon of no module": (
        lambda _: gradwatch.horizon(3, X),
        TypeError,
        "model must be a torch.nn.Module, got int",
    ),
    "a horizon without a sequence": (lambda _: gradwatch.horizon(NET, X[0]), ValueError, "no sequence was found"),
    "an output that is no function": (
        lambda _: gradwatch.horizon(RNN, torch.ones(3, 1, 2), output=3),
        TypeError,
        "output must be a function from what the model returned to a tensor, or None, got 3",
    ),
    "a need of 0": (
        lambda _: gradwatch.assert_horizon(RNN, torch.ones(3, 1, 2), at_least=0),
        ValueError,
        "at_least must be at least 1, got 0",
    ),
    "a need of a text": (
        lambda _: gradwatch.assert_horizon(RNN, torch.ones(3, 1, 2), at_least="x"),
        TypeError,
        "at_least must be a whole number of timesteps, got 'x'",
    ),
    # files
    "a record of 0 bytes": (
        lambda tmp: gradwatch.Record(tmp, bound=0),
        ValueError,
        "bound must be at least 1 byte, got 0",
    ),
    "a record of x bytes": (
        lambda tmp: gradwatch.Record(tmp, bound="x"),
        TypeError,
        "bound must be a whole number of bytes, got 'x'",
    ),
    "TensorBoard in a number": (
        lambda _: gradwatch.TensorBoardSink(3),
        TypeError,
        "target must be a directory or a torch.utils.tensorboard.SummaryWriter, got int",
    ),
    "no record there": (lambda tmp: gradwatch.read_run(tmp / "no"), FileNotFoundError, "no record.jsonl in or below"),
    "another file": (lambda tmp: gradwatch.read_run(a_file(tmp)), ValueError, "is not a record of format 1"),
    # the callback
    "a callback every 0 steps": (
        lambda _: GradientMonitor(every_n_steps=0),
        ValueError,
        "every_n_steps must be at least 1, got 0",
    ),
    "a callback's on_alert": (
        lambda _: GradientMonitor(on_alert="x"),
        ValueError,
        '"warn", "raise", "stop" or a function that takes an Alert, got \'x\'',
    ),
}


@pytest.mark.parametrize("case", TABLE)
def test_bad_input_gets_an_error_that_says_what_was_given_and_what_is_allowed(case, tmp_path):
    call, kind, fragment = TABLE[case]

    with pytest.raises(kind) as caught:
        call(tmp_path)

    assert fragment in str(caught.value)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)


def test_what_was_refused_leaves_nothing_behind(tmp_path, monkeypatch):
    hooks = len(SGD._optimizer_step_pre_hooks)
    monkeypatch.setattr("gradwatch.watcher.watcher.ModelMap", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        gradwatch.watch(NET, SGD, logdir=tmp_path)

    assert list(tmp_path.iterdir()) == []
    assert not any(path.is_relative_to(tmp_path.resolve()) for path in run_directory.held())
    assert len(SGD._optimizer_step_pre_hooks) == hooks


def test_a_state_that_is_refused_leaves_the_watcher_as_it_was():
    with gradwatch.watch(NET, SGD, every_n_steps=1) as watcher:
        for _ in range(3):
            NET(X).sum().backward()
            SGD.step()
        before = to_json(watcher.state_dict())
        for wrong in (
            {"counts": ["x"]},
            {"order": 3},
            {"history": {}},
            {"alerts": [{}]},
            {"history": watcher.state_dict()["history"] | {"tracks": [{}]}},
        ):
            with pytest.raises(ValueError, match="could not be read"):
                watcher.load_state_dict(watcher.state_dict() | wrong)

        assert to_json(watcher.state_dict()) == before


@pytest.mark.parametrize("name", ["../../x", "a/b", "..", "ä/ß", "a\0b", "\n", "x" * 200])
def test_a_name_never_leaves_the_log_directory(name, tmp_path):
    top = tmp_path / "runs"
    with gradwatch.watch(NET, SGD, logdir=top, name=name, every_n_steps=1):
        NET(X).sum().backward()
        SGD.step()

    assert [p.name for p in tmp_path.iterdir()] == ["runs"]
    assert [p.parent.parent for p in tmp_path.rglob("record.jsonl")] == [top]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda w: w.record("x"), "the loss must be a number or a tensor, got 'x', and is left out"),
        (lambda w: w.record(None), "the loss must be a number or a tensor, got None, and is left out"),
        (lambda w: w.step("x"), "the number of a step must be a whole number, got 'x'; steps are counted instead"),
        (lambda w: w.step(1.5), "the number of a step must be a whole number, got 1.5; steps are counted instead"),
    ],
)
def test_inside_of_a_training_it_is_said_once_and_the_training_goes_on(call, said):
    reports = []
    with (
        gradwatch.watch(NET, every_n_steps=1, sinks=[reports.append]) as watcher,
        warnings.catch_warnings(record=True) as caught,
    ):
        warnings.simplefilter("always")
        for _ in range(3):
            NET(X).sum().backward()
            call(watcher)
            watcher.step()

    assert [str(w.message) for w in caught] == [f"gradwatch: {said}"]
    assert len(reports) >= 3


# --- records of others ---


def recorded(tmp_path, steps=3):
    net = nn.Linear(2, 1)
    sgd = torch.optim.SGD(net.parameters(), lr=0.1)
    with gradwatch.watch(net, sgd, logdir=tmp_path, every_n_steps=1):
        for _ in range(steps):
            net(X).sum().backward()
            sgd.step()
    return tmp_path / "gradwatch" / "record.jsonl"


HOSTILE = {
    "a line that is nested too deeply": '{"snapshot":' + "[" * 100_000 + "]" * 100_000 + "}",
    "a number of too many digits": '{"snapshot":{"model":0,"step":' + "9" * 10_000 + "}}",
    "another model": '{"snapshot":{"model":7,"step":1,"wall_time":0}}',
    "a negative model": '{"snapshot":{"model":"-1","step":1,"wall_time":0}}',
    "a text for a step": '{"snapshot":{"model":0,"step":"x","wall_time":0}}',
    "texts for norms": '{"snapshot":{"model":0,"step":1,"wall_time":0,"norm":["x","y"]}}',
    "too many norms": '{"snapshot":{"model":0,"step":1,"wall_time":0,"norm":[1,2,3]}}',
    "a list": "[1, 2]",
    "a text": '"x"',
    "not JSON": "\x00\x01\x02",
    "half a line": '{"snapshot":{"mod',
}


@pytest.mark.parametrize("line", HOSTILE)
def test_a_line_that_cannot_be_read_is_left_out_counted_and_told(line, tmp_path, capsys):
    path = recorded(tmp_path)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:3], HOSTILE[line], *lines[3:]]) + "\n")

    run = gradwatch.read_run(path)
    status = main(["check", str(tmp_path)])

    assert [s.step for s in run.snapshots] == [0, 1, 2]
    assert run.broken == 1
    assert status == 2
    assert "1 line" in capsys.readouterr().out


def test_a_line_of_100_megabytes_is_not_read_into_memory(tmp_path):
    path = recorded(tmp_path)
    with path.open("a") as file:
        file.write('{"snapshot":"')
        for _ in range(100):
            file.write("x" * 2**20)
        file.write('"}\n')
    program = (
        "import gradwatch\n"
        f"run = gradwatch.read_run({str(path)!r})\n"
        "peak = next(int(line.split()[1]) for line in open('/proc/self/status') if line.startswith('VmHWM'))\n"
        "print(len(run.snapshots), run.broken, peak // 1024)"
    )
    began = time.monotonic()
    snapshots, broken, megabytes = map(
        int, subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout.split()
    )

    assert (snapshots, broken) == (3, 1)
    assert megabytes < 200  # of which an interpreter with numpy has its share
    assert time.monotonic() - began < 60


def test_a_record_of_more_steps_than_fit_into_memory_is_thinned_as_it_is_read(tmp_path):
    path = recorded(tmp_path, steps=50)
    for most in (2, 3, 20):
        run = gradwatch.read_run(path, most=most)

        assert len(run.snapshots) <= most
        assert run.thinned + len(run.snapshots) == 50
        assert [s.step for s in run.snapshots][-1] == 49
        assert run.snapshots[0].step == 0
    assert gradwatch.read_run(path, most=50).thinned == 0
    with pytest.raises(ValueError, match="most must be at least 2, got 1"):
        gradwatch.read_run(path, most=1)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe\x00{",
        os.urandom(4096),
        "{}\n".encode("utf-16"),
        b"\n\n\n",
        b'{"format": 1e400}\n',
        b'{"format": 4}\n',
        b'{"format": null}\n',
        b'{"model": {}}\n',
    ],
    ids=[
        "empty",
        "UTF-16 begins",
        "noise",
        "UTF-16",
        "newlines",
        "an infinite format",
        "format 4",
        "no format",
        "no first line",
    ],
)
def test_what_is_no_record_is_refused_in_one_line_and_with_status_2(content, tmp_path, capsys):
    (tmp_path / "record.jsonl").write_bytes(content)

    for command in ("check", "report"):
        assert main([command, str(tmp_path)]) == 2
        said = capsys.readouterr().err
        assert "is not a record of format 1" in said
        assert len(said.strip().splitlines()) == 1


def test_pipes_folders_and_loops_of_links_are_no_records(tmp_path, capsys):
    os.mkfifo(tmp_path / "record.jsonl")
    (tmp_path / "folder" / "record.jsonl").mkdir(parents=True)
    (tmp_path / "loop").symlink_to(tmp_path)

    assert main(["check", str(tmp_path)]) == 2
    assert "no record.jsonl in or below" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd",
        "../../../x",
        "\x1b[31mred\x1b[2J",
        "a\nb",
        "[bold]x[/bold]",
        "<script>alert(1)</script>",
        "\u202eabc",
        "x" * 10_000,
        "",
    ],
)
def test_names_of_others_are_shown_and_not_obeyed(name, tmp_path, capsys):
    path = recorded(tmp_path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        if "model" in line:
            line["model"]["layers"][0]["name"] = name
            for parameter in line["model"]["parameters"]:
                parameter["name"], parameter["layer"] = f"{name}.weight", name
    alert = {
        "finding": {"code": "GW101", "kind": "vanishing-depth", "severity": "warning", "place": name, "onset": 0},
        "began": 0,
        "last": 1,
        "message": name,
    }
    path.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"alert": alert}]))
    before = sorted(tmp_path.rglob("*"))

    assert main(["report", str(tmp_path)]) in (0, 1, 2)
    assert main(["check", str(tmp_path)]) in (1, 2)

    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        ([], "usage: gradwatch"),
        (["fly"], "invalid choice: 'fly'"),
        (["check"], "the following arguments are required: RUN"),
        (["check", "no/such/folder"], "no record.jsonl in or below"),
        (["report", "no/such/folder"], "no record.jsonl in or below"),
        (["demo", "--steps", "0"], "must be at least 1, got 0"),
        (["demo", "--steps", "x"], "argument --steps: must be a whole number, got 'x'"),
        (["demo", "--data", "x"], "invalid choice: 'x'"),
        (["demo", "--seed", "x"], "invalid int value: 'x'"),
    ],
)
def test_a_wrong_command_ends_with_status_2_and_says_why(arguments, fragment, capsys):
    with pytest.raises(SystemExit) as ended:
        raise SystemExit(main(arguments))

    assert ended.value.code == 2
    out = capsys.readouterr()
    assert fragment in out.err + out.out
    assert "Traceback" not in out.err
