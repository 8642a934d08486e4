"""What TensorBoard's own readers find in what gradwatch writes."""

from __future__ import annotations

import gc
import io
import math
import random
import re
import warnings

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from truth import decode

import gradwatch
from gradwatch import (
    Alert,
    Finding,
    History,
    LayerInfo,
    ModelInfo,
    ParameterInfo,
    Report,
    Severity,
    Snapshot,
    TensorBoardSink,
)
from gradwatch.sinks.tensorboard.heatmaps import LayerPicture, heatmap
from gradwatch.sinks.tensorboard.scalars import scalars, tag_safe

SUMMARY = {
    f"gradwatch/{name}" for name in ("norm_global", "norm_min", "norm_median", "norm_max", "zero_norms", "alerts_open")
}


class Deep(nn.Module):
    """Sigmoids that let nothing through, and a head."""

    def __init__(self, depth=14):
        super().__init__()
        self.body = nn.Sequential(*(layer for _ in range(depth) for layer in (nn.Linear(6, 6), nn.Sigmoid())))
        self.head = nn.Linear(6, 1)

    def forward(self, x):
        return self.head(self.body(x))


def train(logdir=None, steps=25, sinks=()):
    """Train a sick network and give the reports of its run."""
    torch.manual_seed(0)
    model = Deep()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = torch.randn(8, 6), torch.randn(8, 1)
    reports = []
    with gradwatch.watch(
        model, optimizer, logdir=logdir, sinks=[reports.append, *sinks], on_alert=lambda _: None
    ) as watcher:
        for _ in range(steps):
            optimizer.zero_grad()
            loss = (model(x) - y).square().mean()
            watcher.record(loss)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    return reports


def read(folder):
    """Return TensorBoard's own view of a run, with nothing sampled away."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "histograms": 0, "tensors": 0})
    events.Reload()
    return events


def raw(folder):
    """Return the events of the only file of a folder, read with TensorBoard's own check of every checksum."""
    (file,) = folder.glob("events.out.tfevents.*")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TensorBoard's own readers leave files to the garbage collector
        events = [Event.FromString(e) for e in RawEventFileLoader(str(file)).Load()]
        gc.collect()
    return events


def model_of(*names, kind="Linear"):
    """Describe a model of one weight per layer, in this order."""
    layers = tuple(LayerInfo(name, kind, order) for order, name in enumerate(names))
    return ModelInfo(
        layers,
        tuple(ParameterInfo(f"{name}.weight".lstrip("."), name, (2, 2), "float32", 0, "weight") for name in names),
    )


def report_of(model, norm, step=0, **fields):
    return Report(Snapshot(step, 1e9 + step, model, norm=tuple(norm), **fields))


def write(folder, *reports, **options):
    sink = TensorBoardSink(folder, **options)
    for report in reports:
        sink(report)
    sink.close()
    return read(folder)


def log10_of(value):
    return -45.0 if value == 0 else math.log10(value)


def layers_of(snapshot, column):
    """Fold a column into layers, in plain arithmetic."""
    squares = {}
    for parameter, value in zip(snapshot.model.parameters, column, strict=True):
        if value is not None:
            squares.setdefault(parameter.layer, []).append(value**2)
    return {layer: math.sqrt(math.fsum(values)) for layer, values in squares.items()}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    reports = train(folder)
    return folder / "gradwatch", reports, read(folder / "gradwatch")


def test_the_tags_of_a_run_are_those_of_the_design_and_no_others(run):
    _, reports, events = run
    layers = {layer.name for layer in reports[0].snapshot.model.layers}
    tags = events.Tags()
    scalars = (
        SUMMARY
        | {"gradwatch/loss"}
        | {
            f"{group}/{layer}"
            for group in ("gradwatch_norm", "gradwatch_sensitivity", "gradwatch_update")
            for layer in layers
        }
    )
    assert set(tags["scalars"]) == scalars
    assert tags["images"] == ["gradwatch_heatmap/layers"]
    assert tags["histograms"] == ["gradwatch_profile/layers"]
    assert tags["tensors"] == ["gradwatch/alerts/text_summary"]


def test_the_steps_on_the_x_axis_are_those_that_were_measured(run):
    _, reports, events = run
    measured = [r.snapshot.step for r in reports]
    assert measured == list(range(25))
    for tag in (*SUMMARY, "gradwatch_norm/body.0", "gradwatch_norm/head"):
        assert [e.step for e in events.Scalars(tag)] == measured, tag
    probes = [r.snapshot.step for r in reports if r.snapshot.update_ratio is not None]
    assert probes == [0, 1, 10, 20]  # at step 0 for the update alone
    assert [e.step for e in events.Scalars("gradwatch_update/head")] == probes
    assert [e.wall_time for e in events.Scalars("gradwatch/norm_global")] == [r.snapshot.wall_time for r in reports]


def test_a_layers_norm_is_the_log10_of_the_norm_over_its_parameters(run):
    _, reports, events = run
    for layer in reports[0].snapshot.model.layers:
        truth = [math.log10(layers_of(r.snapshot, r.snapshot.norm)[layer.name]) for r in reports]
        assert [e.value for e in events.Scalars(f"gradwatch_norm/{layer.name}")] == pytest.approx(truth, rel=1e-6)


def test_the_summary_is_taken_over_the_layers(run):
    _, reports, events = run
    for i, report in enumerate(reports):
        norms = sorted(layers_of(report.snapshot, report.snapshot.norm).values())
        assert len(norms) == 15
        truth = {
            "norm_global": math.log10(math.sqrt(math.fsum(n * n for n in norms))),
            "norm_min": math.log10(norms[0]),
            "norm_max": math.log10(norms[-1]),
            "norm_median": math.log10(norms[7]),
        }
        for name, value in truth.items():
            assert events.Scalars(f"gradwatch/{name}")[i].value == pytest.approx(value, rel=1e-6), name
        assert events.Scalars("gradwatch/zero_norms")[i].value == 0
        assert events.Scalars("gradwatch/alerts_open")[i].value == sum(a.severity > Severity.INFO for a in report.open)
    assert events.Scalars("gradwatch/alerts_open")[-1].value > 0


def test_the_loss_is_as_it_was_told_and_where_it_was(run, tmp_path):
    _, reports, events = run
    assert [e.value for e in events.Scalars("gradwatch/loss")] == pytest.approx(
        [r.snapshot.loss for r in reports], rel=1e-6
    )
    events = write(
        tmp_path,
        report_of(model_of("a"), (1.0,), 0),
        report_of(model_of("a"), (1.0,), 1, loss=0.0),
        report_of(model_of("a"), (1.0,), 2, loss=-2.5),
    )
    assert [(e.step, e.value) for e in events.Scalars("gradwatch/loss")] == [(1, 0.0), (2, -2.5)]


def test_sensitivity_is_norm_times_weight_norm_without_biases(run):
    _, reports, events = run
    weighed = [r.snapshot for r in reports if r.snapshot.weight_norm is not None]
    for layer in ("body.0", "head"):
        truth = []
        for snapshot in weighed:
            (column,) = (i for i, p in enumerate(snapshot.model.parameters) if p.name == f"{layer}.weight")
            truth.append(math.log10(snapshot.norm[column] * snapshot.weight_norm[column]))
        found = events.Scalars(f"gradwatch_sensitivity/{layer}")
        assert [e.step for e in found] == [s.step for s in weighed]
        assert [e.value for e in found] == pytest.approx(truth, rel=1e-6)


@pytest.mark.parametrize("gain", ["gain", "bias", "weight of 0"])
def test_the_sensitivity_that_is_drawn_is_the_one_that_is_judged(gain, tmp_path):
    """Return a layer with a matrix (gradient 1e-3, norm 1), another, and a far larger gradient that does not count."""
    role, norm = {"gain": ("gain", 10.0), "bias": ("bias", 10.0), "weight of 0": ("weight", 0.0)}[gain]
    parameters = (
        ParameterInfo("a.weight", "a", (4, 4), "float32", 0, "weight"),
        ParameterInfo("a.second", "a", (4, 4), "float32", 0, "weight"),
        ParameterInfo("a.other", "a", (4,), "float32", 0, role),
    )
    report = report_of(
        ModelInfo((LayerInfo("a", "Mine", 0),), parameters), (1e-3, 2e-3, 1.0), weight_norm=(1.0, 3.0, norm)
    )
    history = History()
    history.add(report.snapshot)
    judged = float(history.sensitivities(1)[0, 0])

    assert judged == pytest.approx(math.hypot(1e-3, 6e-3))
    assert scalars(report)["gradwatch_sensitivity/a"] == pytest.approx(math.log10(judged), rel=1e-12)
    assert [e.value for e in write(tmp_path, report).Scalars("gradwatch_sensitivity/a")] == pytest.approx(
        [math.log10(judged)], rel=1e-6
    )


def test_what_has_no_sensitivity_to_the_rules_has_none_in_the_charts():
    """A lone gain, and a layer whose weights are all 0."""
    parameters = (
        ParameterInfo("norm.weight", "norm", (4,), "float32", 0, "gain"),
        ParameterInfo("zero.weight", "zero", (4, 4), "float32", 0, "weight"),
        ParameterInfo("head.weight", "head", (4, 4), "float32", 0, "weight"),
    )
    layers = tuple(LayerInfo(name, "Mine", order) for order, name in enumerate(("norm", "zero", "head")))
    report = report_of(ModelInfo(layers, parameters), (1.0, 1.0, 1.0), weight_norm=(1.0, 0.0, 1.0))
    history = History()
    history.add(report.snapshot)

    judged = [layer.name for layer, known in zip(layers, ~np.isnan(history.sensitivities(1)[0]), strict=True) if known]
    assert judged == ["head"]
    assert [tag for tag in scalars(report) if "sensitivity" in tag] == ["gradwatch_sensitivity/head"]


def test_an_update_is_the_log10_of_the_largest_in_its_layer(tmp_path):
    layers = (LayerInfo("a", "Linear", 0),)
    model = ModelInfo(
        layers,
        (
            ParameterInfo("a.weight", "a", (2,), "float32", 0, "weight"),
            ParameterInfo("a.bias", "a", (2,), "float32", 0, "bias"),
        ),
    )
    events = write(tmp_path, report_of(model, (1.0, 1.0), update_ratio=(1e-3, 1e-2)))
    assert [e.value for e in events.Scalars("gradwatch_update/a")] == [-2.0]


def test_a_zero_norm_is_drawn_at_the_floor_and_counted(tmp_path):
    model = model_of("a", "b", "c")
    events = write(tmp_path, report_of(model, (0.0, 1e-40, 0.1)))
    assert events.Scalars("gradwatch_norm/a")[0].value == -45
    assert events.Scalars("gradwatch_norm/b")[0].value == pytest.approx(-40)
    assert events.Scalars("gradwatch/norm_min")[0].value == -45
    assert events.Scalars("gradwatch/zero_norms")[0].value == 1


def test_a_layer_without_a_gradient_has_no_point_and_is_not_counted_as_zero(tmp_path):
    events = write(tmp_path, report_of(model_of("a", "b"), (None, 0.1)))
    assert "gradwatch_norm/a" not in events.Tags()["scalars"]
    assert events.Scalars("gradwatch/zero_norms")[0].value == 0
    assert events.Scalars("gradwatch/norm_min")[0].value == pytest.approx(-1)


def test_nan_and_infinity_survive_and_do_not_spoil_the_summary_of_the_others(tmp_path):
    model = model_of("a", "b", "c", "d")
    for norm in ((math.nan, 1e-3, 1e-1, 1e-2), (1e-3, 1e-1, math.nan, 1e-2), (1e-1, 1e-2, 1e-3, math.nan)):
        folder = tmp_path / str(norm.index(next(n for n in norm if math.isnan(n))))
        events = write(folder, report_of(model, norm))
        values = {tag: events.Scalars(tag)[0].value for tag in events.Tags()["scalars"]}
        assert math.isnan(values[f"gradwatch_norm/{'abcd'[int(folder.name)]}"])
        assert math.isnan(values["gradwatch/norm_global"])
        assert (values["gradwatch/norm_min"], values["gradwatch/norm_median"], values["gradwatch/norm_max"]) == (
            -3,
            -2,
            -1,
        )
    events = write(tmp_path / "inf", report_of(model, (math.inf, 1e-3, 1e-1, 1e-2)))
    assert events.Scalars("gradwatch_norm/a")[0].value == math.inf
    assert events.Scalars("gradwatch/norm_max")[0].value == math.inf
    events = write(tmp_path / "nan", report_of(model, (math.nan,) * 4))
    assert math.isnan(events.Scalars("gradwatch/norm_min")[0].value)


def test_the_clip_factor_is_drawn_where_it_is_known(tmp_path):
    model = model_of("a")
    events = write(tmp_path, report_of(model, (1.0,), step=3, clip_factor=0.25), report_of(model, (1.0,), step=4))
    assert [(e.step, e.value) for e in events.Scalars("gradwatch/clip_factor")] == [(3, 0.25)]


def test_every_checksum_holds_and_each_step_is_one_summary(run):
    folder, reports, _ = run
    events = raw(folder)
    assert events[0].file_version == "brain.Event:2"
    with_scalars = [e.step for e in events if any(v.HasField("simple_value") for v in e.summary.value)]
    assert with_scalars == [r.snapshot.step for r in reports]
    assert all(tag.count(t) == 1 for e in events for tag in [[v.tag for v in e.summary.value]] for t in tag)
    assert len(events) == 1 + len(reports) + 1  # the version, the steps, the last picture


def test_tensorboards_reader_would_have_noticed_a_wrong_byte(run, tmp_path):
    folder, reports, _ = run
    (file,) = folder.glob("events.out.tfevents.*")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / file.name).write_bytes(content)
    assert len(raw(tmp_path)) < len(reports) + 2  # it stops there


def test_an_alert_is_told_in_markdown_when_it_begins_and_when_it_clears(tmp_path):
    model = model_of("a", "b")
    finding = Finding("GW101", "vanishing-depth", Severity.WARNING, "a", onset=4)
    alert = Alert(finding, began=7, last=7, message="says | this\nand that", cause="because", remedy="do it")
    cleared = Alert(finding, began=7, last=8, cleared=9, message="m", cause="cause not found", remedy="r")
    first = Report(Snapshot(7, 1e9, model, norm=(1.0, 1.0)), began=(alert,), open=(alert,))
    second = Report(Snapshot(8, 1e9, model, norm=(1.0, 1.0)), open=(alert,))
    third = Report(Snapshot(9, 1e9, model, norm=(1.0, 1.0)), open=(alert,), worsened=(alert,))
    fourth = Report(Snapshot(10, 1e9, model, norm=(1.0, 1.0)), cleared=(cleared,))
    events = write(tmp_path, first, second, third, fourth)
    texts = events.Tensors("gradwatch/alerts/text_summary")
    assert [t.step for t in texts] == [7, 9, 10]
    assert events.SummaryMetadata("gradwatch/alerts/text_summary").plugin_data.plugin_name == "text"
    began, worsened, done = (t.tensor_proto.string_val[0].decode() for t in texts)
    assert began.splitlines() == [
        "**GW101 vanishing-depth** (warning) began at `a`, since step 4",
        "",
        "- **what**: says | this and that",
        "- **likely cause**: because",
        "- **try**: do it",
    ]
    assert worsened.splitlines()[0] == "**GW101 vanishing-depth** (warning) worsened at `a`, since step 4"
    assert done.splitlines() == [
        "**GW101 vanishing-depth** (warning) cleared at `a`, since step 4",
        "",
        "- **what**: m",
        "- Cause not found",
        "- **try**: r",
    ]


def test_the_step_since_which_it_holds_is_told_once(run):
    _, _, events = run
    text = events.Tensors("gradwatch/alerts/text_summary")[0].tensor_proto.string_val[0].decode()
    assert text.count("since step") == 1


def test_the_text_of_a_real_alert_names_layer_cause_and_remedy(run):
    _, reports, events = run
    alerts = [a for r in reports for a in r.began]
    assert alerts
    text = "\n".join(t.tensor_proto.string_val[0].decode() for t in events.Tensors("gradwatch/alerts/text_summary"))
    for alert in alerts:
        assert all(
            part in text for part in (alert.finding.code, alert.message, alert.cause, alert.remedy, alert.finding.place)
        )


def test_the_profile_is_one_bucket_a_layer_as_high_as_its_level_above_1e_12(run, tmp_path):
    _, reports, events = run
    weighed = [r.snapshot for r in reports if r.snapshot.weight_norm is not None]
    profiles = events.Histograms("gradwatch_profile/layers")
    assert [p.step for p in profiles] == [s.step for s in weighed]
    for snapshot, profile in zip(weighed, profiles, strict=True):
        norms = layers_of(snapshot, snapshot.norm)
        ordered = [snapshot.model.layers[i].name for i in snapshot.model.forward_order]
        heights = [max(log10_of(norms[name]) + 12, 0) for name in ordered]
        value = profile.histogram_value
        assert (value.min, value.max) == (-0.5, len(heights) - 0.5)
        assert list(value.bucket_limit) == [i + 0.5 for i in range(len(heights))]
        assert list(value.bucket) == pytest.approx(heights, rel=1e-5)
    profile = write(tmp_path, report_of(model_of("a", "b", "c"), (0.0, None, 1e-2), weight_norm=(1.0,) * 3)).Histograms(
        "gradwatch_profile/layers"
    )[0]
    assert list(profile.histogram_value.bucket) == pytest.approx([0, 0, 10])


def test_tags_hold_only_characters_that_every_logger_takes(tmp_path):
    names = ["a b", "a:b", "a_b", "schön", "a/b", "läge [0]", "deep.layer-1"]
    events = write(
        tmp_path, report_of(model_of(*names), [10.0**-i for i in range(len(names))], weight_norm=(1.0,) * len(names))
    )
    tags = events.Tags()["scalars"]
    assert all(re.fullmatch(r"[A-Za-z0-9_./-]+", tag) for tag in tags)
    assert {"gradwatch_norm/a_b", "gradwatch_norm/a/b", "gradwatch_norm/deep.layer-1"} <= set(tags)


def test_names_that_would_become_one_tag_are_kept_apart(tmp_path):
    names = ["a b", "a:b", "a_b", "a?b"]
    events = write(tmp_path, report_of(model_of(*names), (1.0, 10.0, 100.0, 1000.0)))
    norms = [t for t in events.Tags()["scalars"] if t.startswith("gradwatch_norm/")]
    assert sorted(events.Scalars(t)[0].value for t in norms) == [0, 1, 2, 3]
    assert all(re.fullmatch(r"a_b-[0-9a-f]{4}", tag_safe(name)) for name in ("a b", "a:b"))
    assert len({tag_safe(name) for name in names}) == 4


def test_parameters_of_the_model_itself_are_not_mixed_with_a_layer_called_model(tmp_path):
    events = write(tmp_path / "plain", report_of(model_of("", "net"), (1e-1, 1e-2)))
    assert events.Scalars("gradwatch_norm/model")[0].value == pytest.approx(-1)
    events = write(tmp_path / "both", report_of(model_of("", "model"), (1e-1, 1e-2)))
    found = {t: events.Scalars(t)[0].value for t in events.Tags()["scalars"] if t.startswith("gradwatch_norm/")}
    assert found["gradwatch_norm/model"] == pytest.approx(-2)
    assert sorted(found.values()) == pytest.approx([-2, -1])


def test_above_64_layers_the_charts_are_of_blocks_and_the_pictures_of_layers(tmp_path):
    names = [f"block.{i}.{part}" for i in range(33) for part in ("one", "two")]
    model = model_of(*names)
    events = write(tmp_path / "66", report_of(model, [3.0, 4.0] * 33, weight_norm=(1.0,) * 66))
    norms = {t: events.Scalars(t)[0].value for t in events.Tags()["scalars"] if t.startswith("gradwatch_norm/")}
    assert norms == {f"gradwatch_norm/block.{i}": pytest.approx(math.log10(5)) for i in range(33)}
    assert len(events.Histograms("gradwatch_profile/layers")[0].histogram_value.bucket) == 66
    events = write(tmp_path / "64", report_of(model_of(*names[:64]), [3.0, 4.0] * 32))
    assert sum(t.startswith("gradwatch_norm/") for t in events.Tags()["scalars"]) == 64


def test_the_heatmap_of_a_hundred_layers_has_a_row_for_each(tmp_path):
    levels = [-20 + 0.2 * i for i in range(100)]  # a plain stack, which has no blocks but one
    events = write(tmp_path, report_of(model_of(*(f"net.{i}" for i in range(100))), [10**v for v in levels]))
    picture = decode(events.Images("gradwatch_heatmap/layers")[-1].encoded_image_string)
    assert len({tuple(p) for p in picture[56 : 56 + 560, 20]}) == 100


def test_charts_of_each_parameter_on_request(tmp_path):
    layers = (LayerInfo("a", "Linear", 0),)
    model = ModelInfo(
        layers,
        (
            ParameterInfo("a.weight", "a", (2,), "float32", 0, "weight"),
            ParameterInfo("a.bias", "a", (2,), "float32", 0, "bias"),
        ),
    )
    events = write(tmp_path, report_of(model, (1e-2, 1e-5)), parameters=True)
    norms = {t: events.Scalars(t)[0].value for t in events.Tags()["scalars"] if t.startswith("gradwatch_norm/")}
    assert norms == {"gradwatch_norm/a.weight": pytest.approx(-2), "gradwatch_norm/a.bias": pytest.approx(-5)}


def test_through_a_users_writer_all_lands_in_the_users_file(tmp_path):
    writer = SummaryWriter(str(tmp_path))
    writer.add_scalar("loss", 0.5, 0)
    reports = train(steps=25, sinks=[TensorBoardSink(writer)])
    writer.add_scalar("loss", 0.25, 25)
    writer.close()
    assert len(list(tmp_path.rglob("events.out.tfevents.*"))) == 1
    events = read(tmp_path)
    assert [e.value for e in events.Scalars("loss")] == [0.5, 0.25]
    assert [e.step for e in events.Scalars("gradwatch/norm_global")] == [r.snapshot.step for r in reports]
    tags = events.Tags()
    assert tags["images"] == ["gradwatch_heatmap/layers"]
    assert tags["histograms"] == ["gradwatch_profile/layers"]
    assert "gradwatch/alerts/text_summary" in tags["tensors"]


def test_the_users_writer_is_not_closed_with_the_watcher(tmp_path):
    with SummaryWriter(str(tmp_path)) as writer:
        train(steps=2, sinks=[TensorBoardSink(writer)])
        writer.add_scalar("later", 1.0, 5)
    assert [e.step for e in read(tmp_path).Scalars("later")] == [5]


def test_a_users_writer_in_the_same_logdir_stays_complete_beside_gradwatch(tmp_path):
    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_scalar("loss", 1.0, 0)
        live = read(tmp_path)  # as a TensorBoard that is open all the time
        train(
            tmp_path, steps=12, sinks=[lambda r: (writer.add_scalar("loss", 1.0, r.snapshot.step + 1), writer.flush())]
        )
        writer.add_scalar("loss", 1.0, 13)
    live.Reload()
    assert [e.step for e in live.Scalars("loss")] == list(range(14))
    assert [e.step for e in read(tmp_path).Scalars("loss")] == list(range(14))
    assert [e.step for e in read(tmp_path / "gradwatch").Scalars("gradwatch/norm_global")] == list(range(12))
    assert not any(t.startswith("gradwatch") for t in live.Tags()["scalars"])


def test_neither_a_folder_nor_a_writer_is_refused_with_what_is_allowed():
    with pytest.raises(TypeError, match=r"a directory or a torch\.utils\.tensorboard\.SummaryWriter, got int"):
        TensorBoardSink(3)


# --- the picture ---


def test_the_image_of_a_run_has_the_size_that_it_states_and_is_drawn_at_the_end(run):
    _, reports, events = run
    images = events.Images("gradwatch_heatmap/layers")
    assert images[-1].step == reports[-1].snapshot.step
    for image in images:
        size = Image.open(io.BytesIO(image.encoded_image_string)).size
        assert size == (image.width, image.height)
        assert size[0] == 480


def test_a_run_too_short_for_a_picture_on_the_way_has_one_at_the_end(tmp_path):
    train(tmp_path, steps=3)
    assert [i.step for i in read(tmp_path / "gradwatch").Images("gradwatch_heatmap/layers")] == [2]


def test_a_vanished_top_row_is_darker_than_the_bottom_one(run):
    _, reports, events = run
    assert reports[-1].snapshot.model.layers[0].name == "body.0"
    picture = decode(events.Images("gradwatch_heatmap/layers")[-1].encoded_image_string)
    body = len(picture) - 56 - 32
    top, bottom = picture[56 + 5, 200].sum(), picture[56 + body - 5, 200].sum()
    assert top < 0.75 * bottom


def test_rows_run_down_and_columns_run_right():
    values = np.array([[0.0, -1.0], [-2.0, -3.0]])
    width, height, png = heatmap(values, ["first", "last"], [0, 1], title="t")
    picture = decode(png)
    assert picture.shape == (height, width, 3)
    body, inside = height - 56 - 32, width - 8 - 74
    at = {
        (r, c): picture[56 + body // 4 + r * body // 2, 8 + inside // 4 + c * inside // 2]
        for r in (0, 1)
        for c in (0, 1)
    }
    assert list(at[0, 0]) == [253, 231, 37]  # the two ends of viridis
    assert list(at[1, 1]) == [68, 1, 84]
    assert at[0, 0].sum() > at[0, 1].sum() > at[1, 0].sum() > at[1, 1].sum()


def test_exact_zero_is_black_no_gradient_grey_and_nan_red(tmp_path):
    events = write(tmp_path, report_of(model_of("a", "b", "c", "d", "e"), (0.0, None, math.nan, math.inf, 1e-3)))
    picture = decode(events.Images("gradwatch_heatmap/layers")[-1].encoded_image_string)
    row = 160 // 5
    colours = [picture[56 + row // 2 + i * row, 200].tolist() for i in range(5)]
    assert colours == [[0, 0, 0], [150, 150, 150], [220, 0, 0], [220, 0, 0], [253, 231, 37]]


def test_a_vanished_gradient_of_a_double_network_is_not_drawn_as_zero():
    _, _, png = heatmap(np.array([[-60.0], [-45.0], [-1.0]]), ["a", "b", "c"], [0], title="t")
    picture = decode(png)
    assert picture[56 + 20, 100].tolist() == [68, 1, 84]
    assert picture[56 + 75, 100].tolist() == [0, 0, 0]


def test_noise_of_a_healthy_run_is_not_stretched_over_all_colours():
    _, _, png = heatmap(np.array([[-1.0], [-1.1]]), ["a", "b"], [0], title="t")
    picture = decode(png)
    assert abs(picture[56 + 20, 100] - picture[56 + 140, 100]).max() < 40


@pytest.fixture
def written(monkeypatch):
    """What is written into a picture, with where and how it is anchored."""
    found, write = [], ImageDraw.ImageDraw.text

    def text(self, xy, text, **options):
        found.append((text, xy, options["anchor"]))
        write(self, xy, text, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    return found


@pytest.mark.parametrize(
    ("levels", "labels"),
    [((0.9, -2.04), ["0.9", "-0.6", "-2.1"]), ((1.0, -1.0), ["1.0", "-0.5", "-2.0"]), ((1.0, -7.4), ["1", "-3", "-7"])],
)
def test_the_colours_are_labelled_to_a_tenth_where_whole_decades_would_not_tell_them_apart(written, levels, labels):
    heatmap(np.array([levels]).T, ["a", "b"], [0], title="t")
    assert [text for text, (x, _), _ in written if x > 480 - 74] == labels


@pytest.mark.parametrize("count", [3, 4, 17, 239, 240])
def test_the_step_in_the_middle_is_that_of_the_column_above_it(written, count):
    def drawn(marked):
        """Draw the marked columns grey; return the step in the middle, and whether the column above it is grey."""
        written.clear()
        values = np.where(marked, math.nan, -1.0)[None]
        _, _, png = heatmap(values, ["a"], range(0, 10 * count, 10), title="t")
        ((text, (x, _), _),) = [one for one in written if one[2] == "ms"]
        return text, decode(png)[56 + 80, int(x)].tolist() == [150, 150, 150]

    columns = np.arange(count)
    text, _ = drawn(columns < 0)
    (column,) = columns[columns * 10 == int(text)]
    assert drawn(columns == column) == (text, True)
    assert drawn(columns != column) == (text, False)  # nor is it that of any other


def test_a_thousand_layers_lose_no_row():
    values = np.full((1000, 3), -1.0)
    values[5::97] = -45.0
    _, _, png = heatmap(values, [f"l{i}" for i in range(1000)], [0, 1, 2], title="t")
    assert (decode(png)[56:-60, 100] == 0).all(axis=1).sum() == len(range(5, 1000, 97))


def test_the_columns_of_the_heatmap_are_bounded_and_span_the_run():
    picture = LayerPicture()
    for step in range(5000):
        picture.add(step, {"a": -1.0, "b": -2.0}, ["a", "b"])
        assert len(picture.columns.kept) <= 240
    steps = [step for step, _ in picture.columns.kept]
    assert len(steps) > 100
    assert steps[0] == 0
    assert steps[-1] > 4900
    assert len(set(np.diff(steps).tolist())) == 1


def test_rows_that_are_put_in_order_later_keep_their_numbers():
    picture = LayerPicture()
    picture.add(0, {"a": -1.0, "b": -9.0}, ["a", "b"])
    picture.add(1, {"a": -1.0, "b": -9.0}, ["b", "a"])  # the first probe has shown the order of the forward pass
    _, _, png = picture.png()
    body = decode(png)[56:216]
    assert body[20, 100].tolist() == body[20, 300].tolist() == [68, 1, 84]
    assert body[140, 100].tolist() == body[140, 300].tolist() == [253, 231, 37]


def test_pictures_are_drawn_ever_more_rarely():
    picture, drawn = LayerPicture(), []
    for step in range(10_000):
        picture.add(step, {"a": random.random()}, ["a"])
        if picture.columns.due():
            drawn.append(step)
    assert drawn[0] == 19
    assert 10 < len(drawn) < 40
