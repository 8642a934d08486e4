"""What a page shows are the numbers of the record, and nothing of a record becomes markup or a script."""

from __future__ import annotations

import json
import math
import re
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import deep
from torch import nn

import gradwatch
from gradwatch import Alert, Finding, LayerInfo, ModelInfo, ParameterInfo, Record, Report, Severity, Snapshot, read_runs
from gradwatch.cli import main
from gradwatch.sinks.page import columns, lags
from gradwatch.sinks.page.data import page_data, run_data
from gradwatch.sinks.page.render import in_markup, page_html
from gradwatch.sinks.reading import Run
from gradwatch.values.layer_columns import norms
from gradwatch.values.sequences import SequenceStats

CLOSE = 4e-3
"""What packing leaves of a number: half of a seven-hundredth of a power of ten is 0.17 %."""


@given(st.lists(st.floats(1e-45, 1e38) | st.sampled_from([0.0, math.nan, math.inf]), max_size=30))
def test_a_size_comes_back_to_a_third_of_a_percent(sizes):
    back = columns.unpacked(columns.packed(sizes))
    assert len(back) == len(sizes)
    for given_, found in zip(sizes, back, strict=True):
        if math.isnan(given_):
            assert found is None
        elif given_ == 0 or math.isinf(given_):
            assert found == given_
        else:
            assert found == pytest.approx(given_, rel=CLOSE)


def model_of(*names):
    return ModelInfo(
        tuple(LayerInfo(name, "Linear", i) for i, name in enumerate(names)),
        tuple(
            ParameterInfo(f"{n}.{p}", n, (2, 2) if p == "weight" else (2,), "float32", 0, p)
            for n in names
            for p in ("weight", "bias")
        ),
    )


@pytest.mark.parametrize("steps", [[0], [0, 1, 2], range(300), range(1000), [*range(200), *range(200, 5000, 10)]])
def test_every_snapshot_is_in_one_column_and_columns_follow_one_another(steps):
    snapshots = [Snapshot(step, 0.0, model_of("a"), norm=(1.0, 1.0)) for step in steps]
    groups = list(columns.grouped(snapshots))
    assert [s.step for group in groups for s in group] == list(steps)
    assert len(groups) <= columns.COLUMNS
    sizes = {len(group) for group in groups[:-1]} or {1}
    assert len(sizes) == 1


def test_what_is_not_finite_once_is_not_lost_among_many():
    snapshots = [
        Snapshot(step, 0.0, model_of("a", "b"), loss=1.0, norm=(1.0, 1.0, math.nan if step == 4321 else 1.0, 1.0))
        for step in range(9000)
    ]
    data = run_data("", Run((snapshots[0].model,), tuple(snapshots), ()))
    a, b = (columns.unpacked(row) for row in data["columns"]["norm"])
    column = next(i for i, step in enumerate(data["steps"]) if step > 4321) - 1
    assert math.inf not in a
    assert [i for i, value in enumerate(b) if value == math.inf] == [column]
    assert columns.unpacked(data["norm"][2])[column] == math.inf


def test_of_many_snapshots_some_are_looked_at_and_all_that_are_not_finite():
    snapshots = [Snapshot(step, 0.0, model_of("a"), norm=(math.nan if step == 53 else 1.0, 1.0)) for step in range(100)]
    chosen = [s.step for s in columns.looked_at(snapshots)]
    assert len(chosen) == 25
    assert {0, 53, 99} <= set(chosen)
    assert chosen == sorted(chosen)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return a run that was really trained, with an alert, and the folder of its record."""
    folder = tmp_path_factory.mktemp("runs") / "sick"
    torch.manual_seed(0)
    model = deep(14, 6, nn.Sigmoid)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with gradwatch.watch(model, optimizer, logdir=folder, on_alert=lambda _: None) as watcher:
        for _ in range(60):
            optimizer.zero_grad()
            loss = (model(torch.randn(16, 6)) - 1).square().mean()
            watcher.record(loss)
            loss.backward()
            optimizer.step()
    return folder, gradwatch.read_run(folder)


def test_the_numbers_are_those_of_the_record(run):
    _, read = run
    data = run_data("sick", read)
    assert data["steps"] == [s.step for s in read.snapshots]
    assert [layer["name"] for layer in data["layers"]] == list(norms(read.models[-1], read.snapshots[0].norm))
    weights: dict[str, float] = {}
    for column, snapshot in enumerate(read.snapshots):
        of_layers = norms(snapshot.model, snapshot.norm)
        for row, layer in enumerate(data["layers"]):
            mine = [i for i, p in enumerate(snapshot.model.parameters) if p.layer == layer["name"]]
            cell = {name: columns.unpacked(rows[row])[column] for name, rows in data["columns"].items()}
            assert cell["norm"] == pytest.approx(of_layers[layer["name"]], rel=CLOSE)
            if snapshot.weight_norm is not None:
                weights |= dict(zip((p.name for p in snapshot.model.parameters), snapshot.weight_norm, strict=True))
                assert cell["weight"] == pytest.approx(math.hypot(*(snapshot.weight_norm[i] for i in mine)), rel=CLOSE)
            else:
                assert cell["weight"] is None
            known = [(i, weights.get(snapshot.model.parameters[i].name)) for i in mine]
            of_weights = [snapshot.norm[i] * w for i, w in known if w and snapshot.model.parameters[i].role != "bias"]
            assert cell["sensitivity"] == (pytest.approx(math.hypot(*of_weights), rel=CLOSE) if of_weights else None)
            for name, whole in (("update", snapshot.update_ratio), ("zeros", snapshot.zeros)):
                found = [whole[i] for i in mine if whole[i] is not None] if whole is not None else []
                assert cell[name] == (pytest.approx(max(found), rel=CLOSE) if found else None)
        assert data["loss"][1][column] == pytest.approx(snapshot.loss, rel=1e-5)
        assert columns.unpacked(data["norm"][1])[column] == pytest.approx(snapshot.norm_global, rel=CLOSE)
    assert sum(layer["parameters"] for layer in data["layers"]) == sum(p.elements for p in read.models[-1].parameters)


def test_a_column_of_many_steps_is_their_median_and_the_loss_has_its_extremes():
    rng = np.random.default_rng(0)
    drawn = 10 ** rng.uniform(-6, 0, 6000)
    snapshots = [
        Snapshot(step, 0.0, model_of("a"), loss=float(x), norm=(float(x), 0.0)) for step, x in enumerate(drawn)
    ]
    data = run_data("", Run((snapshots[0].model,), tuple(snapshots), ()))
    assert len(data["steps"]) == columns.COLUMNS
    for column, group in enumerate(columns.grouped(snapshots)):
        losses = [s.loss for s in group]
        assert [band[column] for band in data["loss"]] == [
            pytest.approx(of(losses), rel=1e-5) for of in (min, statistics.median, max)
        ]
        assert columns.unpacked(data["columns"]["norm"][0])[column] == pytest.approx(
            statistics.median(losses), rel=CLOSE
        )


def test_alerts_know_their_layers(run):
    _, read = run
    data = run_data("sick", read)
    (alert,) = data["alerts"]
    finding = read.alerts[0].finding
    assert alert["code"] == "GW101"
    assert (alert["since"], alert["cleared"]) == (finding.onset, None)
    names = [data["layers"][row]["name"] for row in alert["rows"]]
    assert (names[0], names[-1], len(names)) == (finding.place, finding.names["last"], finding.evidence["layers"])
    count = len(names)
    assert data["headline"][0] == {
        "severity": "warning",
        "text": f"{count} of 15 layers ({names[0]} to {names[-1]}) get next to no gradient since step {finding.onset}",
        "remedy": read.alerts[0].remedy,
    }


def test_a_sound_run_says_so_and_an_empty_one_too():
    for count, severity, says in (
        (3, "info", "no alert in 3 measured steps, too few for most verdicts"),
        (30, "ok", "no warning and no error in 30 measured steps"),
    ):
        snapshots = tuple(Snapshot(step, 0.0, model_of("a"), norm=(1.0, 1.0)) for step in range(count))
        assert run_data("", Run((snapshots[0].model,), snapshots, ()))["headline"] == [
            {"severity": severity, "text": says, "remedy": ""}
        ]
    empty = run_data("", Run((), (), ()))
    assert empty["headline"][0]["text"] == "nothing was recorded"
    assert (empty["steps"], empty["layers"], empty["columns"]["norm"]) == ([], [], [])


def test_how_far_back_is_that_of_each_probe():
    gain = tuple(0.9**lag for lag in range(400))
    stats = [
        SequenceStats("", "model", 400, 8, lag_gain=tuple(g**k for g in gain), need=300, input="x", time=1)
        for k in (1, 2)
    ]
    snapshots = [
        Snapshot(
            step, 0.0, model_of("a"), norm=(1.0, 1.0), sequences=(one, SequenceStats("rnn", length=400, note="no"))
        )
        for step, one in zip((1, 10), stats, strict=True)
    ]
    finding = Finding("GW301", "vanishing-time", Severity.WARNING, "a", onset=1)
    said = "the model learns from the last 33 of 400 timesteps of x, and the need is 300"
    alert = Alert(finding, 1, 10, None, said, "", "do", Severity.WARNING)
    data = run_data("", Run((snapshots[0].model,), tuple(snapshots), (alert,)))
    (one,) = data["sequences"]
    assert (one["module"], one["model"], one["length"], one["need"], one["steps"]) == ("", True, 400, 300, [1, 10])
    assert one["horizon"] == [s.horizon for s in stats] == [66, 33]
    assert one["width"] == 3
    for packed, s in zip(one["gain"], stats, strict=True):
        levels = lags.unpacked(packed)
        assert len(levels) == math.ceil(400 / 3)
        for row, level in enumerate(levels):
            true = max(math.log10(max(s.lag_gain[row * 3 : row * 3 + 3])), -12)
            assert level == pytest.approx(true, abs=0.026)
    assert data["headline"] == [{"severity": "warning", "text": f"since step 1 {said}", "remedy": "do"}]
    without = run_data("", Run((snapshots[0].model,), tuple(snapshots), ()))["headline"]
    assert without[1]["text"].startswith("the model learns from the last 33 of 400 timesteps of x")
    assert [one["severity"] for one in without] == ["info", "info"]


def alerts_of(*findings, cleared=None):
    return tuple(Alert(f, f.onset or 0, 9, cleared, f"says {f.code}", "", f"do {f.code}", f.severity) for f in findings)


def told(names, *alerts, steps=30):
    model = model_of(*names)
    snapshots = tuple(Snapshot(step, 0.0, model, norm=(1.0,) * 2 * len(names)) for step in range(steps))
    return [one["text"] for one in run_data("", Run((model,), snapshots, alerts))["headline"]]


def finding(code, place, onset=0, *, severity=Severity.WARNING, kind="", **evidence):
    names = {name: evidence.pop(name) for name in ("first", "last") if name in evidence}
    return Finding(code, kind or code, severity, place, onset=onset, evidence=evidence, names=names)


def test_layers_without_a_gradient_are_counted_once_and_named():
    abcd = ("a", "b", "c", "d")
    everywhere = alerts_of(finding("GW102", "", 3))
    assert told(abcd, *everywhere)[0] == "4 of 4 layers (a to d) get next to no gradient since step 3"
    twice = alerts_of(finding("GW101", "a", 5), finding("GW401", "a", 2))
    assert told(abcd, *twice)[0] == "1 of 4 layers (a) gets next to no gradient since step 2"
    again = alerts_of(finding("GW101", "a", 0), finding("GW101", "a", 4), finding("GW101", "a", 6), cleared=8)
    assert told(abcd, *again)[0] == "1 of 4 layers (a) got next to no gradient since step 0, until step 8"
    part = alerts_of(finding("GW901", "b", 1, first="b", last="d", parameters=6.0))
    assert told(abcd, *part)[0] == "3 of 4 layers (b to d) get next to no gradient since step 1"
    apart = alerts_of(finding("GW101", "a"), finding("GW401", "c"))
    assert told(abcd, *apart)[0] == "2 of 4 layers (a ... c) get next to no gradient since step 0"


def test_no_tick_while_a_warning_is_open_and_what_is_over_is_told_too():
    assert told("a", *alerts_of(finding("GW301", "a", 7))) == ["since step 7 says GW301"]
    over = told("a", *alerts_of(finding("GW301", "a", 7, kind="vanishing-time"), cleared=20))
    assert over == ["vanishing-time: says GW301 (over since step 20)"]
    infos = told("a", *alerts_of(finding("GW401", "a", severity=Severity.INFO)))
    assert infos == ["no warning and no error in 30 measured steps (1 for information, below)"]
    assert told("a", *alerts_of(finding("GW503", "", severity=Severity.ERROR)), *alerts_of(finding("GW101", "a")))[
        0
    ] == ("GW503: says GW503")


def test_steps_that_go_back_or_jump_are_all_there():
    model = model_of("a")
    back = [*range(101), *range(50, 61)]
    data = run_data("", Run((model,), tuple(Snapshot(s, 0.0, model, norm=(1.0, 1.0)) for s in back), ()))
    assert (data["first"], data["last"], data["measured"]) == (0, 100, 101)
    assert data["steps"] == list(range(101))
    far = [*range(1000), *range(10**6, 10**6 + 1000)]
    data = run_data("", Run((model,), tuple(Snapshot(s, 0.0, model, norm=(1.0, 1.0)) for s in far), ()))
    assert len(data["steps"]) > 200
    assert sum(step < 1000 for step in data["steps"]) > 100
    assert all(a <= b for a, b in zip(data["steps"], data["ends"], strict=True))


def test_the_whole_gradient_is_that_of_all_optimizers_of_a_step():
    model = model_of("a", "b")
    snapshots = []
    for step in range(5):
        snapshots.append(Snapshot(step, 0.0, model, optimizer=0, norm=(3.0, 0.0, None, None)))
        snapshots.append(Snapshot(step, 0.0, model, optimizer=1, norm=(None, None, 4.0, 0.0)))
    data = run_data("", Run((model,), tuple(snapshots), ()))
    assert data["measured"] == 5
    assert columns.unpacked(data["norm"][1]) == [pytest.approx(5.0, rel=CLOSE)] * 5


def test_exactly_no_gain_is_told_from_little():
    gain = (1.0, 0.5, 1e-30, 0.0)
    stats = SequenceStats("rnn", length=4, rows=8, lag_gain=gain)
    snapshot = Snapshot(0, 0.0, model_of("rnn"), norm=(1.0, 1.0), sequences=(stats,))
    (one,) = run_data("", Run((snapshot.model,), (snapshot,), ()))["sequences"]
    assert lags.unpacked(one["gain"][0]) == [0.0, pytest.approx(-0.3, abs=0.03), -12.0, -math.inf]


def test_what_turns_lines_around_is_made_visible():
    model = model_of("\u202eevil\u2066")
    snapshot = Snapshot(0, 0.0, model, norm=(1.0, 1.0))
    data = run_data("r\u202eun\nx", Run((model,), (snapshot,), ()))
    assert not re.search("[\u202a-\u202e\u2066-\u2069\n]", json.dumps(data, ensure_ascii=False))
    assert data["layers"][0]["name"] == "\ufffdevil\ufffd"


def test_two_optimizers_and_a_model_that_changes_are_one_picture():
    one, two = model_of("a", "b"), model_of("b", "c")
    snapshots = (
        Snapshot(0, 0.0, one, optimizer=0, norm=(1.0, 0.0, None, None)),
        Snapshot(0, 0.0, one, optimizer=1, norm=(None, None, 4.0, 3.0)),
        Snapshot(1, 0.0, two, optimizer=0, norm=(2.0, 0.0, 7.0, 0.0)),
    )
    data = run_data("", Run((one, two), snapshots, ()))
    assert [layer["name"] for layer in data["layers"]] == ["b", "c", "a"]
    table = [columns.unpacked(row) for row in data["columns"]["norm"]]
    assert table == [
        [pytest.approx(5, rel=CLOSE), pytest.approx(2, rel=CLOSE)],
        [None, pytest.approx(7, rel=CLOSE)],
        [pytest.approx(1, rel=CLOSE), None],
    ]


HOSTILE = [
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<!--",
    "\u2028\u2029\x1b[31m",
    "`${alert(1)}`",
    "'\"&amp;",
    "__proto__",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_names_are_data_and_never_markup(name):
    text = in_markup({"name": name})
    assert json.loads(text) == {"name": name}
    assert not re.search(r"[<>&\u2028\u2029]", text)
    snapshot = Snapshot(0, 0.0, model_of(name), norm=(1.0, 1.0))
    finding = Finding("GW101", name, Severity.ERROR, name)
    alert = Alert(finding, 0, 0, None, name, name, name, Severity.ERROR)
    page = page_html(page_data({name: Run((snapshot.model,), (snapshot,), (alert,))}, "0"), name)
    clean = page_html(page_data({"a": Run((), (), ())}, "0"), "a")
    assert page.count("<script") == clean.count("<script") == 2
    assert page.count("</script") == 2
    assert "<img" not in page
    assert "default-src 'none'" in page


def test_a_page_needs_nothing_but_itself(run):
    folder, _ = run
    page = page_html(page_data(read_runs(folder), gradwatch.__version__), "sick")
    addresses = set(re.findall(r"https?://[^\s\"'<>)]+", page))
    assert addresses == {"http://www.w3.org/2000/svg"}  # the name of a namespace, which nobody asks for
    assert not re.search(r"\b(?:src|href)\s*=", page)
    assert "import " not in page.replace("important", "")


@pytest.mark.slow
def test_64_layers_of_100000_steps_are_less_than_a_megabyte():
    rng = np.random.default_rng(0)
    model = model_of(*(f"blocks.{i // 4}.part{i % 4}.linear" for i in range(64)))
    values = 10 ** rng.uniform(-8, 0, (500, 128))
    rows = [tuple(map(float, row)) for row in values]
    snapshots = tuple(
        Snapshot(
            step,
            0.0,
            model,
            loss=rows[step % 500][0],
            norm=rows[step % 500],
            weight_norm=rows[3] if step % 50 == 1 else None,
            update_ratio=rows[4] if step % 50 == 1 else None,
            zeros=rows[5] if step % 50 == 1 else None,
        )
        for step in range(100_000)
    )
    page = page_html(page_data({"big": Run((model,), snapshots, ())}, "0"), "big")
    assert len(page.encode()) < 2**20


# --- the command ---


def test_the_command_writes_a_page_of_one_run_and_of_several(run, tmp_path, capsys):
    folder, _ = run
    page = tmp_path / "out.html"
    assert main(["report", str(folder), "--html", str(page)]) == 0
    assert capsys.readouterr().out.startswith(f"{page}: 1 run, ")
    assert data_of(page)["runs"][0]["name"] == "sick"
    assert main(["report", str(folder), str(folder.parent), "--html", str(page), "--fail-on", "warning"]) == 1
    assert [r["name"] for r in data_of(page)["runs"]] == [str(folder), str(folder.parent)]
    assert main(["report", str(folder), "--html", str(page), "--ignore", "GW101"]) == 0
    assert data_of(page)["runs"][0]["alerts"] == []
    assert main(["report", str(folder), "--html", str(tmp_path / "no" / "folder.html")]) == 2
    assert "No such file or directory" in capsys.readouterr().err


def test_several_runs_are_told_in_the_terminal_too(run, capsys):
    folder, _ = run
    assert main(["report", str(folder), str(folder.parent)]) == 0
    assert capsys.readouterr().out.count("GW101 vanishing-depth (warning) 0") == 2


def data_of(page):
    text = re.search(r'id="data">(.*?)</script>', page.read_text(encoding="utf-8"))[1]
    return json.loads(text)


def test_the_name_of_a_run_is_that_of_its_folder(tmp_path):
    for name in ("a", "b/c"):
        record = Record(tmp_path / name / "gradwatch")
        record(Report(Snapshot(0, 0.0, model_of("x"), norm=(1.0, 1.0))))
        record.close()
    assert [r["name"] for r in page_data(read_runs(tmp_path), "0")["runs"]] == ["a", "b/c"]
    assert [r["name"] for r in page_data(read_runs(tmp_path / "a"), "0")["runs"]] == ["a"]
    assert [r["name"] for r in page_data(read_runs(tmp_path / "a" / "gradwatch" / "record.jsonl"), "0")["runs"]] == [
        "a"
    ]
