"""What CI reads: the real command line in a second process, each format read back by a parser of its own."""

from __future__ import annotations

import dataclasses
import html
import json
import re
from pathlib import Path
from xml.etree import ElementTree as ET

import jsonschema
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from torch import nn

import gradwatch
from gradwatch.cli import main
from gradwatch.detectors import RULES
from gradwatch.detectors.rejudge import NOT_RECORDED, rejudged
from gradwatch.sinks.formats.github import command, commands
from gradwatch.sinks.formats.judged import judged
from gradwatch.sinks.formats.junit import junit
from gradwatch.sinks.formats.markdown import escaped, markdown
from gradwatch.sinks.log import one_line, printable
from gradwatch.sinks.reading import Run
from gradwatch.values import configuration
from gradwatch.values.report import Alert, Finding, Severity

SCHEMA = json.loads((Path(__file__).parents[2] / "docs" / "report.schema.json").read_text(encoding="utf-8"))
HOSTILE = "a]0;x\x07\x1b[31m|b`<script>alert(1)</script>\n::error file=x::y %0A [z](http://w) @everyone #1 *c* \x00"


class Classifier(nn.Module):
    """Its lower layers get nothing; it stands in this file."""

    def __init__(self, layers=12, *, activation=nn.Sigmoid, names=None):
        super().__init__()
        self.stack = nn.Sequential()
        for i in range(layers):
            self.stack.add_module(f"{names or 'layer'}{i}", nn.Linear(16, 16))
            self.stack.add_module(f"act{i}", activation())
        self.head = nn.Linear(16, 1)

    def forward(self, x):
        return self.head(self.stack(x))


def train(logdir, model, steps=40, **options):
    torch.manual_seed(0)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    x, y = torch.randn(32, 16), torch.randn(32, 1)
    with gradwatch.watch(model, optimizer, logdir=logdir, on_alert=lambda _: None, **options) as watcher:
        for _ in range(steps):
            optimizer.zero_grad()
            loss = (model(x) - y).square().mean()
            watcher.record(loss)
            loss.backward()
            optimizer.step()


@pytest.fixture(scope="module")
def top(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    torch.manual_seed(0)
    train(folder / "sick", Classifier())
    train(folder / "well", Classifier(2, activation=nn.Tanh))
    train(folder / "hostile", Classifier(names=HOSTILE.replace(".", "")))
    return folder


@pytest.fixture
def out(capsys):
    def run(*arguments):
        status = main([*map(str, arguments)])
        return status, capsys.readouterr().out

    return run


# --- JSON ---


@pytest.mark.parametrize("run", ["sick", "well", "hostile", ""])
@pytest.mark.parametrize("what", ["check", "report"])
def test_json_is_what_its_schema_says(top, out, run, what):
    status, text = out(what, top / run, "--format", "json")
    document = json.loads(text)
    jsonschema.Draft202012Validator(SCHEMA).validate(document)
    assert status == (int(run != "well") if what == "check" else 0)
    assert document["failed"] is (run != "well" and what == "check")
    names = {""} if run else {"sick/gradwatch", "well/gradwatch", "hostile/gradwatch"}
    assert {one["name"] for one in document["runs"]} == names


def test_json_has_the_numbers_of_the_record(top, out):
    its = json.loads(out("check", top / "sick", "--format", "json")[1])["runs"][0]
    run = gradwatch.read_run(top / "sick")
    (alert,) = run.alerts
    assert its["alerts"][0]["code"] == alert.finding.code == "GW101"
    assert its["alerts"][0]["fails"] is True
    assert its["alerts"][0]["evidence"]["ratio"] == alert.finding.evidence["ratio"]
    assert (its["measured"], its["first_step"], its["last_step"]) == (40, 0, 39)
    assert its["last_loss"] == run.snapshots[-1].loss
    norms = {layer["name"]: layer["gradient_norm"] for layer in its["layers"]}
    first = run.snapshots[-1].norm[:2]
    assert norms["stack.layer0"] == pytest.approx((first[0] ** 2 + first[1] ** 2) ** 0.5)
    assert list(norms)[-1] == "head"


def test_the_schema_can_fail(top, out):
    document = json.loads(out("check", top / "sick", "--format", "json")[1])
    document["runs"][0]["alerts"][0]["severity"] = "fatal"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(SCHEMA).validate(document)


# --- JUnit ---


def test_junit_has_a_case_for_each_rule(top, out):
    status, text = out("check", top / "sick", "--format", "junit")
    root = ET.fromstring(text)
    cases = {case.get("name").split()[0]: case for case in root.iter("testcase")}
    assert status == 1
    assert cases.keys() == RULES.keys()
    assert [code for code, case in cases.items() if case.find("failure") is not None] == ["GW101"]
    assert "try: ReLU" in cases["GW101"].find("failure").text
    assert cases["GW301"].find("skipped").get("message") == "no gradients through time were recorded"
    assert cases["GW101"].find("skipped") is None
    assert (root.get("tests"), root.get("failures")) == (str(len(RULES)), "1")
    assert int(root.get("skipped")) == len([c for c in cases.values() if c.find("skipped") is not None])


def test_junit_of_several_runs_has_a_suite_for_each(top, out):
    root = ET.fromstring(out("check", top, "--format", "junit")[1])
    failures = {suite.get("name"): suite.get("failures") for suite in root}
    assert failures == {
        f"gradwatch {name}/gradwatch": count for name, count in (("hostile", "1"), ("sick", "1"), ("well", "0"))
    }


# --- GitHub ---


def unescaped(line):
    """What the runner makes of a line, as it is documented."""
    name, _, rest = line.removeprefix("::").partition(" ")
    properties, _, message = rest.partition("::")
    signs = {"%0A": "\n", "%0D": "\r", "%3A": ":", "%2C": ",", "%25": "%"}
    back = lambda text: re.sub("%0A|%0D|%3A|%2C|%25", lambda m: signs[m[0]], text)
    pairs = (pair.partition("=") for pair in properties.split(",") if pair)
    return name, {key: back(value) for key, _, value in pairs}, back(message)


def test_github_annotates_the_class_of_the_layer(top, out, monkeypatch):
    monkeypatch.chdir(Path(__file__).parent)
    status, text = out("check", top / "sick", "--format", "github")
    (line,) = text.splitlines()
    name, properties, message = unescaped(line)
    assert (status, name) == (1, "warning")
    assert properties["title"] == "GW101 vanishing-depth: stack.layer0"
    assert properties["file"] == Path(__file__).name
    at = int(properties["line"])
    assert "def forward" in Path(__file__).read_text(encoding="utf-8").splitlines()[at - 1]
    assert message.splitlines()[1].startswith("why: ")


def test_github_appends_markdown_to_the_summary_of_the_step(top, out, monkeypatch, tmp_path):
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    (tmp_path / "summary.md").write_text("before\n")
    out("check", top / "sick", "--format", "github")
    summary = (tmp_path / "summary.md").read_text(encoding="utf-8")
    assert summary.startswith("before\n### gradwatch: failed\n")
    assert "GW101 vanishing-depth" in summary
    out("check", top / "sick", "--format", "markdown")
    assert (tmp_path / "summary.md").read_text(encoding="utf-8") == summary


# --- names that would be obeyed ---


def finding(place, message):
    alert = Finding("GW101", "vanishing-depth", Severity.ERROR, place)
    return Alert(alert, 0, 1, message=message, cause=message, remedy=message, worst=Severity.ERROR)


def rendered(text):
    return MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(text)


MARKS = st.text(st.one_of(st.characters(), st.sampled_from("|`<>*_[]()#-+=:\n\r\\&!@~$%\x1b\ud800\ufffe")), max_size=40)


@settings(max_examples=300, deadline=None)
@given(MARKS, MARKS)
def test_no_text_is_obeyed_by_any_format(place, message):
    found = judged({"a": Run((), (), (finding(place, message),)), f"b{place}": Run((), (), ())}, "warning")
    (line,) = commands(found)
    assert "\n" not in line
    assert line.startswith("::error title=GW101")
    assert line.count("::") == 2
    root = ET.fromstring(junit(found, {}))
    assert len(list(root.iter("failure"))) == 1
    page = rendered(markdown(found))
    tags = set(re.findall(r"</?([a-z0-9]+)", page))
    assert tags <= {"h3", "p", "table", "thead", "tbody", "tr", "th", "td", "strong", "br"}
    assert page.count("<tr>") == 2
    cells = [html.unescape(cell) for cell in re.findall("<td>(.*?)</td>", page, re.DOTALL)]
    assert cells[2] == " ".join(printable(one_line(place) or "the whole model").split())
    assert cells[4] == " ".join(printable(message).split())
    assert len(cells) == 5
    assert page.count("<strong>") == 1


@settings(max_examples=200, deadline=None)
@given(MARKS.map(lambda text: "".join(printable(text).split())).filter(bool))
def test_markdown_shows_a_name_as_it_is(name):
    page = rendered(f"x {escaped(name)} y")
    shown = html.unescape(re.sub("<[^>]*>", "", page)).strip()
    assert shown == f"x {name} y"


@pytest.mark.parametrize("text", ["a:b", "::error::x", "x\n::warning::y", "100%", "%0A", "a,b"])
def test_a_workflow_command_is_read_back_as_it_was(text):
    assert unescaped(command("error", {"title": text}, text)) == ("error", {"title": text}, text)


@pytest.mark.parametrize("kind", ["text", "markdown", "github", "junit", "json"])
def test_a_hostile_name_in_a_real_record_is_harmless(top, out, kind):
    status, text = out("check", top / "hostile", "--format", kind)
    assert status == 1
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", text)
    assert "<script>" not in text or kind in ("text", "json", "github")
    assert not [line for line in text.splitlines() if line.lstrip().startswith(("::error file=x", ": :error file=x"))]


@pytest.mark.parametrize("what", ["check", "report"])
def test_no_line_of_a_report_is_a_command_to_a_runner(tmp_path, out, what):
    torch.manual_seed(0)
    train(tmp_path, Classifier(names="::error::"))
    (tmp_path / "gradwatch").rename(tmp_path / "gradwatch-::stop-commands::x")
    _, text = out(what, tmp_path)
    assert not [line for line in text.splitlines() if "::" in line]
    assert "error" in text


def test_xml_holds_what_it_can():
    text = junit(judged({"": Run((), (), (finding("\ud800\ufffe\uffff\x00", "x"),))}, "warning"), {})
    assert "GW101 vanishing-depth: " + "\N{REPLACEMENT CHARACTER}" * 4 in text


def test_an_alert_that_was_graver_once_fails_as_such():
    milder = dataclasses.replace(finding("a", "b"), finding=Finding("GW101", "vanishing-depth", Severity.INFO, "a"))
    (one,) = judged({"": Run((), (), (milder,))}, "error")
    assert one.failing == (milder,)


def test_an_alert_below_the_limit_is_a_case_that_passes():
    mild = dataclasses.replace(
        finding("a", "b"), finding=Finding("GW301", "x", Severity.INFO, "a"), worst=Severity.INFO
    )
    root = ET.fromstring(junit(judged({"": Run((), (), (mild,))}, "warning"), {"GW302": "y"}))
    passed, skipped = root.iter("testcase")
    assert list(passed) == []
    assert skipped.find("skipped").get("message") == "no step was recorded"


def test_a_module_is_muted_with_all_its_layers(tmp_path, out):
    class Stacked(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = nn.RNN(16, 16, 12, nonlinearity="tanh", batch_first=True), nn.Linear(16, 1)
            for name, parameter in self.rnn.named_parameters():
                parameter.data *= 0.05 if "weight" in name else 1

        def forward(self, x):
            return self.head(self.rnn(x.unsqueeze(1))[0][:, -1])

    torch.manual_seed(0)
    train(tmp_path, Stacked())
    assert [a.finding.place for a in gradwatch.read_run(tmp_path).alerts] == ["rnn.l0"]
    assert out("check", tmp_path)[0] == 1
    assert out("check", tmp_path, "--ignore", "GW101:rnn")[0] == 0


# --- what fails ---


@pytest.mark.parametrize(("limit", "status"), [("info", 1), ("warning", 1), ("error", 0), ("never", 0)])
def test_fail_on(top, out, limit, status):
    assert out("check", top / "sick", "--fail-on", limit)[0] == status
    assert out("report", top / "sick", "--fail-on", limit)[0] == status
    assert "GW101" in out("check", top / "sick", "--fail-on", limit)[1]


def test_a_pattern_that_fits_no_rule_is_told_of(top, capsys):
    assert main(["check", str(top / "sick"), "--ignore", "GW1O1"]) == 1
    assert capsys.readouterr().err == "gradwatch: 'GW1O1' mutes nothing: there is no such rule\n"
    assert main(["check", str(top / "sick"), "--ignore", "GW1*:stack.*"]) == 0
    assert capsys.readouterr().err == ""


def test_ignore_mutes_what_is_recorded(top, out):
    assert out("check", top / "sick", "--ignore", "GW101")[0] == 0
    assert out("check", top / "sick", "--ignore", "GW101:stack.*")[0] == 0
    assert out("check", top / "sick", "--ignore", "GW101:head", "--ignore", "GW3*")[0] == 1
    assert "no alert" in out("check", top / "sick", "--ignore", "GW101")[1]


def write(folder, text, name="pyproject.toml"):
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def test_the_project_says_what_is_ignored_and_what_fails(top, out, tmp_path, monkeypatch):
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "inner")
    write(tmp_path, '[tool.gradwatch]\nignore = ["GW101:stack.*"]\n')
    assert out("check", top / "sick")[0] == 0
    write(tmp_path, '[tool.gradwatch]\nfail-on = "error"\n')
    assert out("check", top / "sick")[0] == 0
    assert out("check", top / "sick", "--fail-on", "warning")[0] == 1
    write(tmp_path, "[tool.other]\nx = 1\n")
    assert out("check", top / "sick")[0] == 1


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.toml", "window = 100\n"),
        ("b.toml", "[thresholds]\nwindow = 100\n"),
        ("c.toml", "[tool.gradwatch.thresholds]\nwindow = 100\n"),
        ("d.yaml", "thresholds:\n  window: 100\n"),
    ],
)
def test_thresholds_of_a_file_judge_again(top, out, tmp_path, name, text):
    assert out("check", top / "sick", "--thresholds", write(tmp_path, text, name))[0] == 0


def test_thresholds_of_layers_are_read(tmp_path):
    file = write(tmp_path, '[thresholds.layers."stack.*"]\nvanishing_ratio = 1e-5\n', "t.toml")
    assert configuration.read(file).thresholds == gradwatch.Thresholds(layers={"stack.*": {"vanishing_ratio": 1e-5}})


def test_thresholds_of_the_project_hold_for_rejudging(top, out, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "[tool.gradwatch.thresholds]\nwindow = 100\n")
    assert out("check", top / "sick")[0] == 1
    assert out("check", top / "sick", "--rejudge")[0] == 0


def test_rejudging_mutes(top, out):
    assert out("check", top / "sick", "--rejudge")[0] == 1
    assert out("check", top / "sick", "--rejudge", "--ignore", "GW101")[0] == 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("window = -1\n", "Thresholds.window must be finite and above 0, got -1"),
        ("windo = 1\n", "got 'windo'"),
        ("[thresholds]\nwindo = 1\n", "thresholds must have fields of gradwatch.Thresholds, got 'windo'"),
        ('thresholds = "x"\n', "thresholds must be a table, got 'x'"),
        ("ignore = 3\n", "ignore must be a list of strings"),
        ('fail-on = "fatal"\n', "fail-on must be one of info, warning, error, never, got 'fatal'"),
        ("[x\n", "is not TOML"),
    ],
)
def test_a_file_that_says_what_is_not_known(top, tmp_path, capsys, text, said):
    file = write(tmp_path, text, "set.toml")
    assert main(["check", str(top / "sick"), "--thresholds", str(file)]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "set.toml" in error


def test_a_file_that_is_not_there(top, capsys):
    assert main(["check", str(top / "sick"), "--thresholds", "nowhere.toml"]) == 2
    assert "nowhere.toml" in capsys.readouterr().err


# --- judged again ---


class Late(Classifier):
    """Its first layer gets a gradient from step 15 on."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        hidden = self.stack[0](x)
        return self.head(self.stack[1:](hidden.detach() if self.calls < 16 else hidden))


def test_alerts_that_clear_clear_again(tmp_path):
    torch.manual_seed(0)
    train(tmp_path, Late(2, activation=nn.Tanh), steps=60)
    recorded = gradwatch.read_run(tmp_path)
    assert [(a.finding.code, a.cleared is not None) for a in recorded.alerts] == [("GW401", True)]
    assert [a.cleared for a in rejudged(recorded.snapshots)] == [a.cleared for a in recorded.alerts]


@pytest.mark.parametrize("run", ["sick", "well", "hostile"])
def test_the_same_rules_say_the_same_again(top, run):
    recorded = gradwatch.read_run(top / run)
    again = rejudged(recorded.snapshots)
    assert [a.finding.key for a in again] == [a.finding.key for a in recorded.alerts]
    assert [(a.began, a.last, a.cleared, a.message, a.remedy) for a in again] == [
        (a.began, a.last, a.cleared, a.message, a.remedy) for a in recorded.alerts
    ]


class Narrow(Classifier):
    """Multiplies by next to nothing on the way, which no probe accounts for."""

    def forward(self, x):
        first, rest = self.stack[0], self.stack[1:]
        hidden = first(x)
        return self.head(rest(hidden * 1e-6 + hidden.detach() * (1 - 1e-6)))


def test_a_cause_that_was_not_measured_is_said_to_be_not_recorded(tmp_path):
    torch.manual_seed(0)
    train(tmp_path, Narrow(3, activation=nn.Tanh))
    recorded = gradwatch.read_run(tmp_path)
    assert [a.cause for a in recorded.alerts] == ["cause not found"]
    assert [a.cause for a in rejudged(recorded.snapshots)] == [NOT_RECORDED]


def test_rejudging_says_how_many_snapshots_are_gone(tmp_path, out):
    record = gradwatch.Record(tmp_path / "thin", bound=60_000)
    torch.manual_seed(0)
    train(None, Classifier(), steps=120, every_n_steps=1, sinks=[record])
    record.close()
    run = gradwatch.read_run(tmp_path / "thin")
    assert run.thinned > 0
    status, text = out("check", tmp_path / "thin", "--rejudge", "--format", "json")
    assert status == 1
    assert json.loads(text)["runs"][0]["thinned"] == run.thinned
    assert f"{run.thinned} of the older snapshots were dropped" in json.loads(text)["runs"][0]["notes"][0]
