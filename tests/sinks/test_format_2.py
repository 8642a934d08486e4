"""A record of format 2, in which columns were lists and every snapshot named its model, is read and goes on."""

from __future__ import annotations

import json
import math

import pytest

from gradwatch import LayerInfo, ModelInfo, ParameterInfo, Record, Report, Snapshot, read_run
from gradwatch.values.column import decode, rounded

MODEL = ModelInfo(
    (LayerInfo("a", "Linear", 0),),
    (
        ParameterInfo("a.weight", "a", (4, 4), "float32", 0, "weight"),
        ParameterInfo("a.bias", "a", (4,), "float32", 0, "bias"),
    ),
)
COLUMNS = ("norm", "weight_norm", "nonfinite")


@pytest.fixture
def snapshots():
    return tuple(
        Snapshot(step, 1e9 + step, MODEL, loss=0.1, norm=(0.1 * step, None), weight_norm=(math.inf, 1.0))
        for step in range(4)
    )


def written(folder, snapshots, *, resume=False):
    record = Record(folder)
    if resume:
        record.resume()
    for snapshot in snapshots:
        record(Report(snapshot))
    record.close()
    return folder / "record.jsonl"


def as_format_2(line):
    if "format" in line:
        return {"format": 2}
    if "snapshot" in line:
        its = line["snapshot"]
        spelled = {n: [{"float": "inf"} if v == math.inf else v for v in decode(its[n])] for n in COLUMNS if n in its}
        return {"snapshot": {"model": 0, **its, **spelled}}
    return line


def test_it_is_read_and_goes_on(tmp_path, snapshots):
    file = written(tmp_path, snapshots)
    lines = [as_format_2(json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")

    assert read_run(tmp_path).snapshots == snapshots
    written(tmp_path, snapshots, resume=True)
    run = read_run(tmp_path)
    assert (run.snapshots, run.broken) == ((*snapshots, *snapshots), 0)


@pytest.mark.parametrize("wrong", ["AAAA", "no base64!", [1.0], [1.0, "a"], 3])
def test_a_column_that_is_none_is_a_broken_line(tmp_path, snapshots, wrong):
    file = written(tmp_path, snapshots)
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    lines[2]["snapshot"]["norm"] = wrong
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")

    run = read_run(tmp_path)
    assert (len(run.snapshots), run.broken) == (3, 1)


def test_a_step_takes_half_of_the_bytes(tmp_path):
    info = ModelInfo(
        MODEL.layers, tuple(ParameterInfo(f"a.{i}", "a", (4,), "float32", 0, "weight") for i in range(100))
    )
    norms = tuple(rounded([1.0 / (i + 3) for i in range(100)]))
    file = written(tmp_path, [Snapshot(step, 1e9, info, loss=0.1, norm=norms) for step in range(10)])
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    now = sum(len(json.dumps(line, separators=(",", ":"))) for line in lines if "snapshot" in line)
    before = sum(len(json.dumps(as_format_2(line), separators=(",", ":"))) for line in lines if "snapshot" in line)
    assert now < before / 2
