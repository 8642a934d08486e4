"""The callback under the real Trainer of transformers, against what the Trainer itself saw at each step."""

from __future__ import annotations

import copy
import gc
import json
import math
import pickle
import types
import weakref

import pytest
import torch
import transformers
from leftovers import left_behind
from packaging.version import Version
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.nn import functional
from torch.nn.modules import module as torch_modules
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.integrations.integration_utils import TensorBoardCallback
from truth import bits, by_hand, norms, same, total

import gradwatch
from gradwatch import GradientHealthError, Severity, Thresholds
from gradwatch.huggingface import GradientCallback

STEPS = 6


class Net(nn.Module):
    """Gives its loss, as models of transformers do."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, labels=None):
        out = self.net(x)
        return {"loss": functional.mse_loss(out, labels), "logits": out}


def small():
    torch.manual_seed(1)
    return Net(nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)))


def sick():
    torch.manual_seed(1)
    deep = [m for _ in range(19) for m in (nn.Linear(8, 8), nn.Sigmoid())]
    return Net(nn.Sequential(nn.Linear(5, 8), nn.Sigmoid(), *deep, nn.Linear(8, 3)))


def rows(count=4 * STEPS):
    generator = torch.Generator().manual_seed(2)
    return [
        {"x": torch.randn(5, generator=generator), "labels": torch.randn(3, generator=generator)} for _ in range(count)
    ]


class Noting(Trainer):
    """Writes down what it sees: gradients before clipping and as they are applied, and each loss that goes backward."""

    scale = 1.0

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.before, self.after, self.losses = [], [], []
        self.clip = self.accelerator.clip_grad_norm_
        self.accelerator.clip_grad_norm_ = self.noted_clip

    def noted_clip(self, *args, **kwargs):
        self.before.append(by_hand(self.model))
        return self.clip(*args, **kwargs)

    def create_optimizer(self, *args):
        super().create_optimizer(*args)
        inner = getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate's own wrapper has no hooks
        self.hook = inner.register_step_pre_hook(lambda *_: self.after.append(by_hand(self.model)))
        return self.optimizer

    def train(self, *args, **kwargs):
        try:
            return super().train(*args, **kwargs)
        finally:
            self.hook.remove()

    def training_step(self, *args, **kwargs):
        backward = torch.Tensor.backward

        def noted(loss, *args, **kwargs):
            self.losses.append(loss.item() / self.scale)
            return backward(loss, *args, **kwargs)

        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(torch.Tensor, "backward", noted)
            return super().training_step(*args, **kwargs)


def trainer(root, *callbacks, model=None, kind=Noting, data=None, args=TrainingArguments, evaluation=None, **options):
    fixed = {
        "output_dir": str(root),
        "per_device_train_batch_size": 4,
        "max_steps": STEPS,
        "learning_rate": 0.01,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch",
        "report_to": [],
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return kind(
        model=small() if model is None else model,
        args=args(**{**fixed, **options}),
        train_dataset=rows() if data is None else data,
        eval_dataset=evaluation,
        callbacks=list(callbacks),
    )


def watched(**options):
    reports = []
    return GradientCallback(sinks=[reports.append], **options), reports


def trained(root, *, options=None, **others):
    callback, reports = watched(**(options or {}))
    run = trainer(root, callback, **others)
    run.train()
    return run, [r.snapshot for r in reports]


def events(path):
    accumulator = EventAccumulator(str(path), dict.fromkeys(("scalars", "images", "histograms", "tensors"), 0))
    accumulator.Reload()
    return accumulator


def recorded(root):
    return [s.step for s in gradwatch.read_run(root).snapshots]


# --- the numbers ---


def test_the_norms_are_those_before_clipping_and_the_clip_factor_is_what_clipping_did(tmp_path):
    run, snapshots = trained(tmp_path, max_grad_norm=0.3)
    same([norms(s) for s in snapshots], run.before)
    for snapshot, before, after in zip(snapshots, run.before, run.after, strict=True):
        assert snapshot.stage == "before_clip"
        assert total(after) < 0.9 * total(before)  # or the clip has done nothing, and the test sees nothing
        assert snapshot.clip_factor == pytest.approx(total(after) / total(before), rel=1e-6)


def test_without_clipping_they_are_those_that_the_optimizer_gets(tmp_path):
    run, snapshots = trained(tmp_path, max_grad_norm=0.0)
    same([norms(s) for s in snapshots], run.after)
    assert {s.stage for s in snapshots} == {"applied"}
    assert [s.loss for s in snapshots] == pytest.approx(run.losses, rel=1e-6)


@pytest.mark.parametrize("clip", [0.3, 0.0])
def test_accumulated_batches_give_one_snapshot_with_the_accumulated_norm_and_the_sum_of_their_parts(tmp_path, clip):
    run, snapshots = trained(
        tmp_path,
        max_grad_norm=clip,
        gradient_accumulation_steps=3,
        max_steps=4,
        logging_strategy="steps",
        logging_steps=1,
    )
    same([norms(s) for s in snapshots], run.before if clip else run.after)
    assert [s.loss for s in snapshots] == pytest.approx([sum(run.losses[i : i + 3]) for i in (0, 3, 6, 9)], rel=1e-6)
    if Version(transformers.__version__).major >= 5:  # some of transformers 4 log another one than they take
        logged = [line["loss"] for line in run.state.log_history if "loss" in line]
        assert [s.loss for s in snapshots] == pytest.approx(logged, abs=1e-4)
    assert [s.step for s in snapshots] == [0, 1, 2, 3]


def test_a_loss_that_accelerate_divides_is_told_divided(tmp_path):
    callback, reports = watched()
    run = trainer(tmp_path, callback)
    run.accelerator.gradient_accumulation_steps = 4
    run.train()
    assert [r.snapshot.loss for r in reports] == pytest.approx(run.losses, rel=1e-6)


def test_a_last_step_of_fewer_batches_has_their_loss(tmp_path):
    run, snapshots = trained(tmp_path, gradient_accumulation_steps=4, max_steps=-1, num_train_epochs=2)
    assert [s.step for s in snapshots] == list(range(len(snapshots)))
    assert len(snapshots) == len(run.before) >= 2
    same([norms(s) for s in snapshots], run.before)
    assert sum(s.loss for s in snapshots) == pytest.approx(sum(run.losses), rel=1e-6)


def test_the_trainers_own_line_of_a_step_says_one_more(tmp_path):
    run, _ = trained(tmp_path, report_to=["tensorboard"], logging_strategy="steps", logging_steps=1)
    (file,) = tmp_path.rglob("*tfevents*")
    seen = events(file)
    ours, logged = seen.Scalars("gradwatch/norm_global"), seen.Scalars("train/grad_norm")
    assert [e.step for e in ours] == list(range(STEPS))
    assert [e.step for e in logged] == [e.step + 1 for e in ours]
    assert [10**e.value for e in ours] == pytest.approx([e.value for e in logged], rel=1e-4)
    assert [10**e.value for e in ours] == pytest.approx([total(b) for b in run.before], rel=1e-5)


def test_evaluation_between_the_steps_changes_nothing(tmp_path):
    callback, reports = watched()
    run = trainer(tmp_path, callback, eval_strategy="steps", eval_steps=1, eval_on_start=True, evaluation=rows(4))
    run.train()
    same([norms(r.snapshot) for r in reports], run.before)
    assert [r.snapshot.step for r in reports] == list(range(STEPS))
    assert reports[-1].snapshot.model.layers[0].order == 0


def scaled(root, *callbacks, init_scale, **options):
    """Make a Trainer that scales the loss, as one does under fp16 on a GPU."""
    run = trainer(root, *callbacks, **options)
    run.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, backoff_factor=2.0**-100)
    run.scale = init_scale
    run.accelerator.unscale_gradients = lambda: run.accelerator.scaler.unscale_(run.optimizer.optimizer)
    return run


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
@pytest.mark.parametrize("clip", [0.3, 0.0])
def test_under_a_scaler_norms_and_loss_are_unscaled(tmp_path, optim, clip):
    truth = trainer(tmp_path, optim=optim, max_grad_norm=clip)  # a scale that is a power of 2 changes no bit
    truth.train()
    callback, reports = watched()
    run = scaled(tmp_path, callback, init_scale=1024.0, optim=optim, max_grad_norm=clip)
    run.train()
    assert run.losses == truth.losses
    same([norms(r.snapshot) for r in reports], truth.before if clip else truth.after)
    assert [r.snapshot.loss for r in reports] == pytest.approx(run.losses, rel=1e-6)
    assert not any(r.snapshot.skipped for r in reports)


def test_an_overflow_is_a_skipped_snapshot(tmp_path):
    callback, reports = watched()
    data = [{**row, "labels": 100 * row["labels"]} for row in rows()]
    run = scaled(tmp_path, callback, init_scale=2.0**127, data=data)
    run.train()
    assert [r.snapshot.skipped for r in reports] == [True] + [False] * (STEPS - 1)
    assert [r.snapshot.step for r in reports] == list(range(STEPS))
    assert all(0 < r.snapshot.loss < math.inf for r in reports)


BERT = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}


def bert():
    torch.manual_seed(1)
    return BertForSequenceClassification(BertConfig(**BERT, max_position_embeddings=8))


def tokens(count=16):
    generator = torch.Generator().manual_seed(2)
    return [
        {"input_ids": torch.randint(0, 20, (8,), generator=generator), "labels": torch.tensor(k % 2)}
        for k in range(count)
    ]


WAYS = {
    "plain": {},
    "bf16": {"bf16": True},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "accumulation": {"gradient_accumulation_steps": 2},
    "no clipping": {"max_grad_norm": 0.0},
}


@pytest.mark.filterwarnings("ignore:.*`gradient_checkpointing` is deprecated.*:FutureWarning")
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_training_is_bitwise_that_without_the_callback_and_the_norms_are_true(tmp_path, way):
    def fitted(*callbacks):
        run = trainer(
            tmp_path, *callbacks, model=bert(), data=tokens(), per_device_train_batch_size=2, max_steps=4, **way
        )
        run.train()
        state = run.optimizer.state_dict()["state"]
        return run, bits([run.model.state_dict(), state, torch.get_rng_state(), run.losses, run.before, run.after])

    callback, reports = watched(probe_every_n_steps=1, every_n_steps=1)
    _, plain = fitted()
    run, seen = fitted(callback)
    assert len(reports) == 4
    assert plain == seen
    same([norms(r.snapshot) for r in reports], run.after if "max_grad_norm" in way else run.before)
    assert "bert.encoder.layer.1.attention.self.query" in [layer.name for layer in reports[0].snapshot.model.layers]


@pytest.mark.slow
def test_a_compiled_model_has_the_same_names_and_true_norms(tmp_path):
    run, snapshots = trained(tmp_path, torch_compile=True, torch_compile_backend="aot_eager")
    same([norms(s) for s in snapshots], run.before)
    assert [p.name for p in snapshots[0].model.parameters] == [
        "net.0.weight",
        "net.0.bias",
        "net.2.weight",
        "net.2.bias",
    ]


def test_a_seq2seq_trainer_is_one_too(tmp_path):
    torch.manual_seed(1)
    config = {"vocab_size": 20, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(**config, decoder_start_token_id=0))
    data = [{"input_ids": torch.arange(1, 6) + k, "labels": torch.arange(3, 7)} for k in range(8)]

    class Sequences(Noting, Seq2SeqTrainer):
        pass

    run, snapshots = trained(tmp_path, model=model, data=data, kind=Sequences, args=Seq2SeqTrainingArguments)
    same([norms(s) for s in snapshots], run.before)


# --- where it goes ---


def test_the_writer_of_the_tensorboard_callback_gets_all_and_the_record_lies_in_the_output_directory(tmp_path):
    trained(tmp_path, model=sick(), report_to=["tensorboard"], max_steps=24)
    (file,) = tmp_path.rglob("*tfevents*")
    tags = events(file).Tags()
    assert {"gradwatch/norm_global", "gradwatch_norm/net.0", "gradwatch_update/net.0", "train/train_loss"} <= set(
        tags["scalars"]
    )
    assert tags["images"] == ["gradwatch_heatmap/layers"]
    last = events(file).Images("gradwatch_heatmap/layers")[-1]
    assert last.step == 23  # drawn before the Trainer closes its writer
    assert "gradwatch/alerts/text_summary" in tags["tensors"]
    run = gradwatch.read_run(tmp_path / "gradwatch")
    assert [s.step for s in run.snapshots] == list(range(24))
    assert [a.finding.code for a in run.alerts] == ["GW101"]


def test_a_tensorboard_callback_that_comes_after_is_found_too(tmp_path):
    callback, _ = watched()
    trainer(tmp_path, callback, TensorBoardCallback()).train()
    (file,) = tmp_path.rglob("*tfevents*")
    assert [e.step for e in events(file).Scalars("gradwatch/norm_global")] == list(range(STEPS))


def noting(module):
    """Make a callback that takes logs, as if it came from a module."""
    got = []

    def on_log(_self, _args, state, _control, logs=None, **_):
        got.append((state.global_step, logs))

    kind = types.new_class(
        "Tracker", (TrainerCallback,), exec_body=lambda names: names.update(on_log=on_log, __module__=module)
    )
    return kind(), got


def test_a_tracker_gets_the_scalars_at_measured_steps_and_no_other_callback_does(tmp_path):
    tracker, got = noting("transformers.integrations.integration_utils")
    other, heard = noting("mine")
    callback, _ = watched(every_n_steps=2)
    run = trainer(tmp_path, tracker, other, callback)
    run.train()
    mine = [(step, logs) for step, logs in got if "gradwatch/norm_global" in logs]
    assert [step for step, _ in mine] == [0, 2, 4]
    assert [logs["gradwatch/norm_global"] for _, logs in mine] == pytest.approx(
        [math.log10(total(b)) for b in run.before[::2]], rel=1e-6
    )
    assert not any("gradwatch/norm_global" in logs for _, logs in heard)
    assert len(got) == len(heard) + 3


def test_without_trackers_there_is_the_record_and_logdir_says_where(tmp_path):
    trained(tmp_path / "out", options={"logdir": tmp_path / "here", "name": "x"})
    assert list(tmp_path.rglob("*tfevents*")) == []
    assert [p.parent for p in tmp_path.rglob("record.jsonl")] == [tmp_path / "here" / "gradwatch-x"]


# --- the end ---


def seams(run):
    """Return what stands on the Trainer and its accelerator instead of their methods."""
    return {
        (type(home).__name__, name): vars(home)[name]
        for home in (run, run.accelerator)
        for name in ("_clip_grad_norm", "clip_grad_norm_", "backward")
        if name in vars(home)
    }


def test_nothing_is_left_behind_after_a_training(tmp_path):
    callback, _ = watched()
    during = []

    class Peek(TrainerCallback):
        def on_step_end(self, *_, **__):
            during.append((left_behind(run.model, [run.optimizer.optimizer], tmp_path), len(seams(run))))

    run = trainer(tmp_path, callback, Peek())
    before = seams(run)
    run.train()
    assert len(during[0][0]) > 3  # so this looks where there is something to see
    assert during[0][1] > len(before)
    assert left_behind(run.model, [run.optimizer.optimizer], tmp_path) == []
    assert seams(run) == before
    assert callback.report is None
    assert b"gradwatch" not in pickle.dumps(run.model)


def broken_at(step):
    class Broken(TrainerCallback):
        def on_step_begin(self, _args, state, _control, **__):
            if state.global_step == step:
                raise RuntimeError("out of memory")

    return Broken()


@pytest.mark.parametrize("again", ["same callback", "other callback", "no callback"])
def test_a_training_after_an_interrupted_one(tmp_path, again):
    callback, reports = watched()
    broken = broken_at(3)
    run = trainer(tmp_path, callback, broken)
    before = seams(run)
    with pytest.raises(RuntimeError, match="out of memory"):
        run.train()
    assert seams(run) != before  # or nothing was left, and the test sees nothing
    first, left = len(run.before), run.optimizer
    run.remove_callback(broken)
    later = []
    if again != "same callback":
        run.remove_callback(callback)
    if again == "other callback":
        run.add_callback(GradientCallback(sinks=[later.append]))
    run.train()
    assert len(run.before) == first + STEPS
    if again == "same callback":
        same([norms(r.snapshot) for r in reports[3:]], run.before[first:])
        assert seams(run) == before
    if again == "other callback":
        same([norms(r.snapshot) for r in later], run.before[first:])
    if again != "no callback":
        assert recorded(tmp_path) == list(range(STEPS))
        assert left_behind(run.model, [left.optimizer, run.optimizer.optimizer], tmp_path) == []


def test_a_callback_of_an_interrupted_training_keeps_neither_trainer_nor_model(tmp_path):
    callback = GradientCallback(on_alert="stop")
    run = trainer(tmp_path, callback, broken_at(1), report_to=["tensorboard"])  # the forward pass is being looked at
    with pytest.raises(RuntimeError, match="out of memory"):
        run.train()
    assert torch_modules._global_forward_pre_hooks
    there = weakref.ref(run), weakref.ref(run.model)
    del run
    gc.collect()
    assert [ref() for ref in there] == [None, None]
    assert callback.report is not None


def test_training_again_and_another_model_begin_with_nothing_remembered(tmp_path):
    callback, reports = watched(thresholds=Thresholds(window=4), on_alert=lambda _: None)
    trainer(tmp_path, callback, model=sick()).train()
    assert [alert.finding.code for alert in reports[-1].open] == ["GW101"]
    trainer(tmp_path, callback).train()
    assert [r.snapshot.step for r in reports[STEPS:]] == list(range(STEPS))
    assert not any(r.open for r in reports[STEPS:])
    assert recorded(tmp_path) == list(range(STEPS))


def test_a_watcher_of_watch_is_closed(tmp_path):
    model, outside = small(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    gradwatch.watch(model, optimizer, sinks=[outside.append])
    trained(tmp_path, model=model)
    optimizer.step()
    assert not outside
    assert not optimizer._optimizer_step_pre_hooks


# --- checkpoints and copies ---


@pytest.mark.parametrize("restore", [False, True])
@pytest.mark.filterwarnings("ignore:.*`lr_scheduler.step\\(\\)`.*")
def test_a_resumed_training_goes_on_with_history_alerts_and_record(tmp_path, restore, caplog):
    def train(steps, *, resume=False):
        callback, reports = watched(thresholds=Thresholds(window=8), on_alert=lambda _: None)
        options = {"restore_callback_states_from_checkpoint": restore, "save_strategy": "steps", "save_steps": STEPS}
        run = trainer(tmp_path, callback, model=sick(), data=rows(8 * STEPS), max_steps=steps, **options)
        del callback
        run.train(resume_from_checkpoint=resume)
        return reports

    first = train(STEPS)
    saved = json.loads((tmp_path / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    state = saved["stateful_callbacks"]["GradientCallback"]
    assert state["args"] == {"name": None}
    assert state["attributes"]["remembered"]["counts"] == [STEPS]
    assert not any(r.open for r in first)
    second = train(2 * STEPS, resume=True)
    assert [r.snapshot.step for r in second] == list(range(STEPS, 2 * STEPS))
    # The window is full at the 8th snapshot of both trainings together; without the state that would be step 13.
    assert [(a.finding.code, a.began) for a in second[-1].open] == [("GW101", 7)]
    assert recorded(tmp_path) == list(range(2 * STEPS))


@pytest.mark.filterwarnings("ignore:.*`lr_scheduler.step\\(\\)`.*")
@pytest.mark.parametrize("clip", [1.0, 0.0])
def test_a_state_that_cannot_be_read_is_no_reason_to_end(tmp_path, clip):
    trainer(tmp_path, GradientCallback(), save_strategy="steps", save_steps=STEPS).train()
    file = tmp_path / f"checkpoint-{STEPS}" / "trainer_state.json"
    saved = json.loads(file.read_text())
    saved["stateful_callbacks"]["GradientCallback"]["attributes"]["remembered"]["history"] = 3
    file.write_text(json.dumps(saved))
    callback, reports = watched()
    with pytest.warns(gradwatch.GradwatchWarning, match="what was remembered in the checkpoint is left out"):
        trainer(tmp_path, callback, max_steps=8, max_grad_norm=clip).train(resume_from_checkpoint=True)
    assert [r.snapshot.step for r in reports] == [6, 7]


@pytest.mark.parametrize("every", [2, STEPS])
def test_two_callbacks_with_different_names_work_side_by_side(tmp_path, every):
    one, two = watched(name="all"), watched(name="second", every_n_steps=2)
    run = trainer(tmp_path, one[0], two[0], save_strategy="steps", save_steps=every)
    before = seams(run)
    run.train()
    same([norms(r.snapshot) for r in one[1]], run.before)
    same([norms(r.snapshot) for r in two[1]], run.before[::2])
    assert [r.snapshot.loss for r in one[1]] == pytest.approx(run.losses, rel=1e-6)
    assert recorded(tmp_path / "gradwatch-second") == [0, 2, 4]
    assert seams(run) == before
    saved = json.loads((tmp_path / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    states = saved["stateful_callbacks"]["GradientCallback"]
    # Before the first checkpoint the Trainer has asked once more; those of earlier ones are not dragged along.
    assert [s["args"]["name"] for s in states] == ["all", "second"] * (1 if every < STEPS else 2)
    three, four = watched(name="all"), watched(name="second")
    trainer(tmp_path, three[0], four[0], max_steps=8).train(resume_from_checkpoint=True)
    assert [[r.snapshot.step for r in its[1]] for its in (three, four)] == [[6, 7], [6, 7]]
    assert recorded(tmp_path / "gradwatch-second") == [0, 2, 4, 6, 7]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))], ids=["deepcopy", "pickle"])
def test_the_callback_can_be_copied_before_during_and_after_a_training(tmp_path, copied):
    during = []

    class Copy(TrainerCallback):
        def on_step_end(self, *_, **__):
            during.append(copied(callback))

    callback = copied(GradientCallback(name="x", every_n_steps=2, thresholds=Thresholds(window=7)))
    trainer(tmp_path, callback, Copy()).train()
    assert recorded(tmp_path / "gradwatch-x") == [0, 2, 4]
    assert all(c.report is None for c in during)  # a copy watches nothing
    again = copied(callback)
    assert repr(again.state()) == repr(callback.state())  # as text, because NaN is not equal to itself
    assert again.state()["attributes"]["remembered"]["counts"] == [STEPS]
    trainer(tmp_path / "other", during[-1]).train()
    assert recorded(tmp_path / "other") == [0, 2, 4]


# --- alerts, failures and options ---


class Nan(Noting):
    """Has a loss of NaN from the third step on."""

    def compute_loss(self, *args, **kwargs):
        return super().compute_loss(*args, **kwargs) * (math.nan if self.state.global_step >= 2 else 1.0)


def test_a_stop_ends_the_training_after_the_step(tmp_path, caplog):
    run, snapshots = trained(tmp_path, options={"on_alert": "stop"}, kind=Nan)
    assert run.state.global_step == len(snapshots) == 3
    assert "GW501" in caplog.text


def test_a_raise_is_for_errors_and_the_next_training_cleans_up(tmp_path):
    callback, _ = watched(on_alert="raise")
    run = trainer(tmp_path, callback, kind=Nan)
    with pytest.raises(GradientHealthError, match="GW501"):
        run.train()
    assert run.state.global_step == 2
    model = small()
    trainer(tmp_path, callback, model=model).train()
    assert left_behind(run.model, [run.optimizer.optimizer], tmp_path) == []


@pytest.mark.parametrize("on_alert", ["raise", "stop"])
def test_a_warning_neither_raises_nor_stops(tmp_path, on_alert, caplog):
    callback, reports = watched(on_alert=on_alert)
    trainer(tmp_path, callback, model=sick(), max_steps=24).train()
    assert reports[-1].snapshot.step == 23
    assert [(a.finding.code, a.severity) for a in reports[-1].open] == [("GW101", Severity.WARNING)]
    assert "GW101" in caplog.text


def test_a_function_gets_each_new_alert_once_and_what_is_muted_is_not_found(tmp_path):
    got, none = [], []
    loud = GradientCallback(name="a", on_alert=got.append)
    muted = GradientCallback(name="b", on_alert=none.append, ignore=["GW101:net.*"])
    trainer(tmp_path, loud, muted, model=sick(), max_steps=24).train()
    assert [(a.finding.code, a.began) for a in got] == [("GW101", 19)]
    assert none == []


FAILURES = {
    "attach": ("gradwatch.huggingface.Watcher.__init__", "the callback failed, and the training goes on: "),
    "read": ("gradwatch.huggingface.Watcher.step", "the callback failed, and the training goes on: "),
    "sink": ("gradwatch.huggingface.TensorBoardSink.__call__", "the sink _Board failed"),
    "end": ("gradwatch.huggingface.Watcher.state_dict", "the callback failed, and the training goes on: "),
}


@pytest.mark.parametrize(("place", "text"), FAILURES.values(), ids=FAILURES)
def test_a_failure_in_gradwatch_is_a_warning(tmp_path, monkeypatch, place, text):
    def fails(*_, **__):
        raise ZeroDivisionError("mine")

    callback, _ = watched()
    run = trainer(tmp_path, callback, report_to=["tensorboard"])
    before = seams(run)
    with monkeypatch.context() as broken:
        broken.setattr(place, fails)
        with pytest.warns(gradwatch.GradwatchWarning, match=text):
            run.train()
    assert run.state.global_step == STEPS
    assert seams(run) == before
    assert left_behind(run.model, [run.optimizer.optimizer], tmp_path) == []


def test_a_logdir_that_is_a_file_is_a_warning(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(gradwatch.GradwatchWarning, match="logdir must be a folder"):
        run, snapshots = trained(tmp_path, options={"logdir": tmp_path / "file"})
    assert run.state.global_step == STEPS
    assert not snapshots


def test_a_loop_that_is_no_trainer_gives_what_the_optimizer_gets(tmp_path):
    callback, reports = watched()
    run = trainer(tmp_path)
    optimizer = torch.optim.SGD(run.model.parameters(), lr=0.1)
    with pytest.warns(gradwatch.GradwatchWarning, match="not called by a transformers.Trainer"):
        callback.on_train_begin(run.args, run.state, run.control, model=run.model, optimizer=optimizer)
    run.model(torch.ones(2, 5), torch.ones(2, 3))["loss"].backward()
    optimizer.step()
    callback.on_train_end(run.args, run.state, run.control)
    same([norms(r.snapshot) for r in reports], [by_hand(run.model)])


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"optimizer": None}, TypeError, "optimizer"),
        ({"scaler": None}, TypeError, "scaler"),
        ({"logdir": 3}, TypeError, "logdir must be a path or None, got 3"),
        ({"every_n_steps": 0}, ValueError, "every_n_steps must be at least 1, got 0"),
        ({"horizon": 0}, ValueError, "horizon must be at least 1, got 0"),
        ({"on_alert": "explode"}, ValueError, 'on_alert must be "warn", "raise", "stop" or a function'),
    ],
)
def test_an_option_that_cannot_be_is_refused_with_what_is_allowed(options, error, text):
    with pytest.raises(error, match=text):
        GradientCallback(**options)


class SquashedTwice(Net):
    """Gives the loss of probabilities in place of scores."""

    def forward(self, x, labels=None):
        out = self.net(x)
        return {"loss": functional.cross_entropy(out.softmax(-1), labels.argmax(-1)), "logits": out}


def test_scores_that_the_loss_squashes_once_more_are_seen(tmp_path):
    alerts = []
    callback, _ = watched(on_alert=alerts.append)
    trainer(tmp_path, callback, model=SquashedTwice(small().net), gradient_accumulation_steps=2).train()
    assert [(a.finding.code, a.finding.place) for a in alerts] == [("GW104", "net.2")]
