"""`gradwatch diff` of real runs and profiles, in each format."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree as ET

import jsonschema
import pytest
import torch
from torch import nn

import gradwatch
from gradwatch.cli import main
from gradwatch.values.profile import to_toml

SCHEMA = json.loads((Path(__file__).parents[2] / "docs" / "diff.schema.json").read_text(encoding="utf-8"))


class Bars(nn.Module):
    def __init__(self, forget):
        super().__init__()
        torch.manual_seed(0)
        self.lstm, self.head = nn.LSTM(3, 8, batch_first=True), nn.Linear(8, 1)
        with torch.no_grad():
            self.lstm.bias_ih_l0[8:16] = forget

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


def train(logdir, forget, seed=0, scale=1.0):
    model = Bars(forget)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3 / scale)
    torch.manual_seed(seed)
    with gradwatch.watch(model, optimizer, logdir=logdir, on_alert=lambda _: None, horizon={"lstm": 80}) as watcher:
        for _ in range(41):
            optimizer.zero_grad()
            loss = model(torch.randn(16, 100, 3)).square().mean() * scale
            watcher.record(loss)
            loss.backward()
            optimizer.step()


@pytest.fixture(scope="module")
def top(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    train(folder / "long", 5.0)
    train(folder / "again", 5.0, seed=1, scale=1000.0)
    train(folder / "short", 0.0)
    batch = torch.randn(16, 100, 3, generator=torch.Generator().manual_seed(2))
    (folder / "long.toml").write_text(to_toml(gradwatch.profile(Bars(5.0), batch)), encoding="utf-8")
    return folder


@pytest.fixture
def out(capsys):
    def run(*arguments):
        status = main(["diff", *map(str, arguments)])
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    return run


def test_a_memory_that_was_cut_is_the_first_line(top, out):
    status, text = out(top / "long", top / "short")
    lines = text.splitlines()
    assert status == 1
    assert any(line.startswith("warning lstm: at least 100 -> 1") and line.endswith(" timesteps") for line in lines)
    assert any("new alert GW301 vanishing-time" in line for line in lines)
    back = out(top / "short", top / "long")
    assert back[0] == 0
    assert "no alert GW301 vanishing-time any more" in back[1]


def test_another_seed_and_another_scale_of_the_loss_are_no_change(top, out):
    status, text = out(top / "long", top / "again")
    assert status == 0
    assert "gradient" not in text.replace("all gradients are", "")
    assert "horizon" not in text
    assert out(top / "long", top / "long")[1] == "no change in 2 layers\n"


def test_a_run_and_a_profile(top, out):
    assert out(top / "long.toml", top / "short")[0] == 1
    assert "lstm: at least 100 -> 1" in out(top / "long.toml", top / "short")[1]
    assert out(top / "long.toml", top / "long")[0] == 0


@pytest.mark.parametrize(("limit", "status"), [("info", 1), ("warning", 1), ("error", 0), ("never", 0)])
def test_fail_on(top, out, limit, status):
    assert out(top / "long", top / "short", "--fail-on", limit)[0] == status


def test_what_is_ignored_is_no_new_alert(top, out):
    assert "GW301" not in out(top / "long", top / "short", "--ignore", "GW301")[1]


def test_tolerance(top, out):
    tight = json.loads(out(top / "long", top / "short", "--tolerance", "0.001", "--format", "json")[1])
    loose = json.loads(out(top / "long", top / "short", "--tolerance", "9", "--format", "json")[1])
    kinds = [[c["what"] for c in found["runs"][0]["changes"]] for found in (tight, loose)]
    assert "gradient" in kinds[0]
    assert "gradient" not in kinds[1]
    with pytest.raises(SystemExit):
        main(["diff", str(top / "long"), str(top / "short"), "--tolerance", "0"])


def test_json_is_what_its_schema_says(top, out):
    document = json.loads(out(top / "long", top / "short", "--format", "json")[1])
    jsonschema.Draft202012Validator(SCHEMA).validate(document)
    assert document["failed"] is True
    (horizon,) = [c for c in document["runs"][0]["changes"] if c["what"] == "horizon" and c["place"] == "lstm"]
    assert horizon["before"] == 100
    assert horizon["after"] < 30
    assert horizon["fails"] is True


def test_markdown_annotations_and_junit(top, out, tmp_path, monkeypatch):
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    assert "### gradwatch diff: changed" in out(top / "long", top / "short", "--format", "markdown")[1]
    assert "### gradwatch diff: as before" in out(top / "long", top / "long", "--format", "markdown")[1]
    lines = out(top / "long", top / "short", "--format", "github")[1].splitlines()
    assert any(line.startswith("::warning title=horizon%3A lstm::lstm: at least 100 -> 1") for line in lines)
    assert "| warning | lstm | at least 100" in (tmp_path / "summary.md").read_text(encoding="utf-8")
    root = ET.fromstring(out(top / "long", top / "short", "--format", "junit")[1])
    failed = {case.get("name") for case in root.iter("testcase") if case.find("failure") is not None}
    assert {"horizon", "alert"} <= failed
    assert int(root.get("failures")) == len(failed)


def test_folders_of_several_runs_are_compared_by_their_names(top, out, tmp_path):
    status, text = out(top, top)
    assert status == 0
    assert text.count("no change in 2 layers") == 3
    status, text = out(top, top / "short")
    assert status == 2
    assert "give the folders of two runs" in text


def test_what_cannot_be_read(top, out, tmp_path):
    assert out(top / "long", tmp_path)[0] == 2
    (tmp_path / "x.toml").write_text("format = 7")
    status, text = out(top / "long", tmp_path / "x.toml")
    assert status == 2
    assert "x.toml: it must be a profile of format 1, got format 7" in text
