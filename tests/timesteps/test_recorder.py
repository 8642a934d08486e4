"""Gradients through time in every situation of a real training, held against autograd.

Where they cannot be known, nothing wrong is shown, and the reason is given.
"""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.modules import module as torch_modules
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import gradwatch
from gradwatch.measurement.output_gradients import OutputGradients
from gradwatch.measurement.transfer import Transfer
from gradwatch.model.attempts import Attempts
from gradwatch.model.forward_hooks import ModelView, StepView, listening
from gradwatch.timesteps.recorder import Recorder, bytes_per_row
from gradwatch.timesteps.series import Trace, traces
from gradwatch.timesteps.walk import Series
from gradwatch.values.plain import from_json, to_json

T, B, D, H = 12, 3, 4, 5
FUSED = {"RNN": nn.RNN, "LSTM": nn.LSTM, "GRU": nn.GRU}
CELLS = {"RNN": nn.RNNCell, "LSTM": nn.LSTMCell, "GRU": nn.GRUCell}
DOUBLE = {"dtype": torch.float64}
CLOSE = {"rel": 1e-9, "abs": 1e-30}
MODULE = ("lag_gain", "grad_input")
LAYER = ("grad_hidden", "grad_hidden_direct", "carry_ratio", "lag_gain_hidden", "grad_cell", "lag_gain_cell")


@pytest.fixture(autouse=True)
def _wide():
    """Compute in float64, where agreement is agreement; and leave no hook behind."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
    assert not torch_modules._global_forward_hooks
    assert not torch_modules._global_forward_pre_hooks


# --- helpers ---


def sequences(model, run, *, steps=2, optimizer=None, **options):
    """Train; `run(model)` makes the forward and backward pass of a step.

    Return the sequences of the last step by module and part.
    """
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.0)
    reports = []
    with gradwatch.watch(
        model,
        optimizer,
        every_n_steps=1,
        probe_every_n_steps=1,
        sinks=[reports.append],
        detectors=[],
        on_alert=_fail,
        **options,
    ):
        for _ in range(steps):
            optimizer.zero_grad()
            run(model)
            optimizer.step()
    found = reports[-1].snapshot.sequences
    assert found is not None
    assert len({(s.module, s.part) for s in found}) == len(found)
    return {(s.module, s.part): s for s in found}


def recorded(model, run, **options):
    """Let a recorder of its own see one pass; give what comes of it, by module."""
    recorder = Recorder("auto", **options)
    chosen = recorder.arm(dict(model.named_modules()), compiled=False)

    def before(module, args, kwargs):
        return recorder.entered(module, args) or args, kwargs

    with listening(chosen.values(), before, recorder.left):
        run(model)
    found = traces(recorder.targets.values(), torch.Generator().manual_seed(0))
    recorder.clear()
    return {trace.module: trace for trace in found}


def _fail(alert):
    raise AssertionError(alert)


def same(found, true, *, module=MODULE, layer=LAYER):
    """Compare what was seen of two modules: {"": SequenceStats, "l0": ...} each."""
    assert set(found) == set(true)
    for part in found:
        for name in layer if part else module:
            if getattr(true[part], name) is None:
                assert getattr(found[part], name) is None, (part, name)
            else:
                assert getattr(found[part], name) == pytest.approx(getattr(true[part], name), nan_ok=True, **CLOSE), (
                    part,
                    name,
                )


def parts(found, module):
    return {part: stats for (name, part), stats in found.items() if name == module}


def norms(gradients):
    """Frobenius norms by timestep of (T, B, features), or of a list of (B, features) of which an entry may be None."""
    return [0.0 if g is None else float(torch.linalg.vector_norm(g)) for g in gradients]


def size(by_time):
    """Those of a tensor (B, T, features)."""
    return norms(by_time.transpose(0, 1))


def dropped(found, module=""):
    """What the note says where the hidden series are missing."""
    assert set(parts(found, module)) == {""}
    whole = found[module, ""]
    assert whole.lag_gain is None
    return whole.note


class Reader(nn.Module):
    """A fused recurrent module and a readout of all its outputs, or of the last."""

    def __init__(self, kind="LSTM", *, every=False, body=None):
        super().__init__()
        self.rnn = FUSED[kind](D, H, batch_first=True) if body is None else body
        self.head = nn.Linear(H, 2)
        self.every = every

    def forward(self, x):
        y = self.rnn(x)[0]
        return self.head(y if self.every else y[:, -1])


def cell_of(rnn):
    """The cell with the weights of a fused module."""
    kind = rnn.mode.split("_")[0]
    cell = CELLS[kind](rnn.input_size, rnn.hidden_size)
    with torch.no_grad():
        for name, weight in cell.named_parameters():
            weight.copy_(getattr(rnn, f"{name}_l0"))
    return cell


class Loop(nn.Module):
    """The same as `Reader` with a cell in a Python loop, which keeps what it went through."""

    def __init__(self, reader):
        super().__init__()
        self.rnn, self.head, self.every = cell_of(reader.rnn), copy.deepcopy(reader.head), reader.every
        self.went = []

    def forward(self, x, call=None):
        state, outputs, self.went = None, [], []
        for t in range(x.shape[1]):
            state = (call or self.rnn)(x[:, t], state)
            self.went.append(state)
            outputs.append(state[0] if isinstance(state, tuple) else state)
        return self.head(torch.stack(outputs, 1) if self.every else outputs[-1])


def truth(reader, x, loss_of):
    """Return norms by timestep of h's total gradients, and x's gradient, by the cell in a loop, without gradwatch."""
    loop, x = Loop(reader), x.clone().requires_grad_()
    loss = loss_of(loop(x))
    hidden = [state[0] if isinstance(state, tuple) else state for state in loop.went]
    gradients = torch.autograd.grad(loss, [x, *hidden], allow_unused=True)
    return norms(gradients[1:]), gradients[0]


def squared(out):
    return out.square().sum()


def data(*shape):
    return torch.randn(*shape or (B, T, D))


def backward(x, loss_of=squared):
    """A plain training step on one batch."""
    return lambda model: loss_of(model(x)).backward()


@pytest.fixture(params=["RNN", "LSTM", "GRU"])
def kind(request):
    return request.param


@pytest.fixture(params=[False, True], ids=["last", "every"])
def every(request):
    return request.param


# --- the same recurrence, called otherwise ---


def test_a_fused_module_is_what_autograd_says_of_its_cell(kind, every):
    reader, x = Reader(kind, every=every), data()
    found = sequences(reader, backward(x))
    hidden, of_x = truth(reader, x, squared)
    assert found["rnn", "l0"].grad_hidden == pytest.approx(hidden, **CLOSE)
    assert found["rnn", ""].grad_input == pytest.approx(size(of_x), **CLOSE)
    assert found["rnn", ""].note is None


def test_a_cell_in_a_loop_agrees_with_the_fused_module(kind, every):
    reader, x = Reader(kind, every=every), data()
    found = sequences(Loop(reader), backward(x))
    same(parts(found, "rnn"), parts(sequences(reader, backward(x)), "rnn"))
    assert found["rnn", ""].length == T
    assert found["rnn", ""].note is None
    assert found["rnn", ""].adjoint_residual < 1e-12


class InPieces(Reader):
    """Calls its fused module on pieces of the sequence, each with the state of the one before."""

    def __init__(self, *args, pieces, detach=False, **options):
        super().__init__(*args, **options)
        self.pieces, self.detach = pieces, detach

    def forward(self, x):
        state, outputs = None, []
        for piece in x.split(self.pieces, 1):
            y, state = self.rnn(piece, state)
            outputs.append(y)
            if self.detach:
                state = tuple(s.detach() for s in state) if isinstance(state, tuple) else state.detach()
        y = torch.cat(outputs, 1)
        return self.head(y if self.every else y[:, -1])


@pytest.mark.parametrize("pieces", [1, 4, 5], ids="pieces_of_{}".format)
@pytest.mark.parametrize("layers", [1, 2])
def test_pieces_that_are_joined_are_one_sequence(kind, every, pieces, layers):
    body, x = FUSED[kind](D, H, layers, batch_first=True), data()
    torch.manual_seed(1)
    model = InPieces(kind, every=every, body=body, pieces=pieces)
    torch.manual_seed(1)
    whole = sequences(Reader(kind, every=every, body=body), backward(x))
    found = sequences(model, backward(x))
    same(parts(found, "rnn"), parts(whole, "rnn"))
    assert found["rnn", ""].length == T
    assert found["rnn", ""].note is None


def test_pieces_and_cells_agree_with_the_whole_in_float32_and_over_many_rows(kind, every):
    torch.set_default_dtype(torch.float32)  # where other kernels run
    reader, x = Reader(kind, every=every), data(11, T, D)
    pieces = InPieces(kind, every=every, body=reader.rnn, pieces=5)
    pieces.head = reader.head
    true = sequences(reader, backward(x))
    _, layer = recorded(reader, backward(x), rows=11)["rnn"].series
    assert layer.rows == 11
    for model in (pieces, Loop(reader)):
        found = sequences(model, backward(x))
        assert found["rnn", ""].note is None
        assert found["rnn", ""].rows == 8
        for part in ("", "l0"):
            for name in LAYER if part else MODULE:
                # Of cells, the gradients at their states arrive for every row, and are there for nothing.
                wanted = getattr(true["rnn", part], name)
                if isinstance(model, Loop) and name in ("grad_hidden", "grad_cell") and wanted is not None:
                    wanted = layer.values[name].tolist()
                if wanted is not None:
                    assert getattr(found["rnn", part], name) == pytest.approx(wanted, rel=1e-4, abs=0), name


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_dropout_between_layers_is_known_in_every_piece(kind, share):
    body, x = FUSED[kind](D, H, 3, batch_first=True, dropout=share), data()
    found = sequences(InPieces(kind, every=True, body=body, pieces=5), backward(x))
    assert found["rnn", ""].note is None
    assert found["rnn", ""].replay_residual < 1e-12
    assert found["rnn", ""].adjoint_residual < 1e-12
    assert (max(found["rnn", "l0"].grad_hidden) == 0) == (share == 1)


def test_pieces_that_are_detached_end_the_gradient(kind):
    model, x = InPieces(kind, pieces=5, detach=True), data()
    found = sequences(model, backward(x))
    whole, layer = found["rnn", ""], found["rnn", "l0"]
    cut = T - 2  # pieces of 5, 5 and 2
    assert whole.note == "the state is detached between its calls: gradients end 2 timesteps back"
    assert whole.grad_input[:cut] == layer.grad_hidden[:cut] == (0.0,) * cut
    assert min(whole.grad_input[cut:]) > 0
    assert whole.lag_gain[2:] == layer.lag_gain_hidden[2:] == (0.0,) * cut
    assert min(whole.lag_gain[:2]) > 0
    assert (whole.horizon, whole.censored) == (2, False)
    assert (whole.reached, layer.reached) == (2, None)
    last = x[:, cut:].clone().requires_grad_()
    with torch.no_grad():
        _, state = model.rnn(x[:, :cut])
    squared(model.head(model.rnn(last, state)[0][:, -1])).backward()
    assert whole.grad_input[cut:] == pytest.approx(size(last.grad), **CLOSE)


def test_a_loss_on_every_detached_piece_is_seen_within_each(kind):
    model, x = InPieces(kind, every=True, pieces=4, detach=True), data()
    found = sequences(model, backward(x))
    leaf = x.clone().requires_grad_()
    squared(model(leaf)).backward()
    assert found["rnn", ""].grad_input == pytest.approx(size(leaf.grad), **CLOSE)
    assert found["rnn", "l0"].carry_ratio[3] == found["rnn", "l0"].carry_ratio[7] == 0.0
    assert min(found["rnn", "l0"].carry_ratio[4:7]) > 0
    assert "4 timesteps back" in found["rnn", ""].note
    assert found["rnn", ""].reached == 4


def test_of_a_backward_pass_for_each_detached_piece_the_last_is_shown(kind):
    model, x = Reader(kind), data()

    def run(m, x=x):
        state, losses = None, []
        for piece in x.split(4, 1):
            y, state = m.rnn(piece, state)
            state = tuple(s.detach() for s in state) if isinstance(state, tuple) else state.detach()
            losses.append(squared(m.head(y)))
        for loss in losses:
            loss.backward()

    found = sequences(model, run)
    assert "3 backward passes reached it; the last is shown" in found["rnn", ""].note
    leaf = x.clone().requires_grad_()
    run(model, leaf)
    assert found["rnn", ""].grad_input == pytest.approx([0.0] * 8 + size(leaf.grad)[8:], **CLOSE)
    assert found["rnn", "l0"].grad_hidden[:8] == (0.0,) * 8


def test_a_state_carried_from_step_to_step_is_told(kind):
    model, x, carried = Reader(kind), data(), []

    def run(model):
        y, state = model.rnn(x, carried[-1] if carried else None)
        carried.append(tuple(s.detach() for s in state) if isinstance(state, tuple) else state.detach())
        squared(model.head(y[:, -1])).backward()

    found = sequences(model, run)
    assert (
        found["rnn", ""].note
        == "the state that was carried in is detached: the gradient ends where this sequence begins"
    )
    assert (found["rnn", ""].reached, found["rnn", ""].length) == (T, T)
    leaf = x.clone().requires_grad_()
    squared(model.head(model.rnn(leaf, carried[0])[0][:, -1])).backward()
    assert found["rnn", ""].grad_input == pytest.approx(size(leaf.grad), **CLOSE)


def test_a_state_that_learns_or_is_zero_is_not_called_detached():
    model = Reader("GRU")
    start = nn.Parameter(torch.randn(1, B, H))
    for state in (start, torch.zeros(1, B, H)):
        found = sequences(model, lambda m: squared(m.head(m.rnn(data(), state)[0][:, -1])).backward())  # noqa: B023
        assert found["rnn", ""].note is None
        assert found["rnn", ""].reached is None


def test_a_state_that_is_carried_in_and_detached_within_ends_at_the_nearer_cut(kind):
    model, carried = InPieces(kind, pieces=5, detach=True), []

    def run(m):
        state = carried[-1] if carried else None
        for piece in data().split(5, 1):
            y, state = m.rnn(piece, state)
            state = tuple(s.detach() for s in state) if isinstance(state, tuple) else state.detach()
        carried.append(state)
        squared(m.head(y[:, -1])).backward()

    whole = sequences(model, run)["rnn", ""]
    assert (whole.reached, whole.length) == (T - 10, T)
    assert "carried in is detached" in whole.note


@pytest.mark.parametrize("carries", ["between calls", "from step to step"])
def test_a_detached_state_is_found_and_the_record_replayed_finds_the_same(carries, tmp_path):
    model, x, kept, reports = InPieces("LSTM", pieces=5, detach=True), data(), [], []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    options = {"every_n_steps": 1, "probe_every_n_steps": 1, "on_alert": lambda _: None}
    with gradwatch.watch(model, optimizer, logdir=tmp_path, sinks=[reports.append], **options):
        for _ in range(3):
            optimizer.zero_grad()
            if carries == "between calls":
                out = model(x)
            else:
                y, state = model.rnn(x, kept[-1] if kept else None)
                kept.append(tuple(s.detach() for s in state))
                out = model.head(y[:, -1])
            squared(out).backward()
            optimizer.step()

    (alert,) = (a for a in reports[-1].open if a.finding.code == "GW303")
    where = f"the last 2 of {T} timesteps" if carries == "between calls" else f"the {T} timesteps of its sequences"
    assert alert.message == f"the state that rnn carries on is detached: no gradient goes back beyond {where}"
    record = gradwatch.read_run(tmp_path)
    assert [(f.code, f.evidence) for f in replayed(record)] == [
        (a.finding.code, a.finding.evidence) for a in reports[-1].open
    ]


def replayed(run):
    history = gradwatch.History()
    for snapshot in run.snapshots:
        history.add(snapshot)
    return [f for detector in gradwatch.DETECTORS for f in detector(history)]


def test_a_record_of_a_detached_state_from_before_that_was_a_field_is_judged_without_it(tmp_path):
    model = InPieces("LSTM", pieces=5, detach=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with gradwatch.watch(
        model, optimizer, logdir=tmp_path, every_n_steps=1, probe_every_n_steps=1, on_alert=lambda _: None
    ):
        for _ in range(2):
            backward(data())(model)
            optimizer.step()
    (file,) = tmp_path.rglob("record.jsonl")
    new, text = gradwatch.read_run(file), file.read_text()
    lines = [from_json(line) for line in text.splitlines()]
    stats = [s for line in lines if "snapshot" in line for s in line["snapshot"].get("sequences", ())]
    assert [s.pop("reached") for s in stats if "reached" in s] == [2]
    file.write_text("".join(to_json(line) + "\n" for line in lines))
    old = gradwatch.read_run(file)

    assert (old.broken, len(old.snapshots)) == (0, 2)
    assert [s.note for s in old.snapshots[-1].sequences] == [s.note for s in new.snapshots[-1].sequences]
    assert ("GW303" in [f.code for f in replayed(new)], "GW303" in [f.code for f in replayed(old)]) == (True, False)


def test_of_two_sequences_in_one_pass_the_last_is_shown(kind):
    model, first, second = Reader(kind), data(), data(B, T + 3, D)
    found = sequences(model, lambda m: (squared(m(first)) + squared(m(second))).backward())
    assert (
        found["rnn", ""].note == "it ran over 2 sequences in this pass, each with a state of its own; the last is shown"
    )
    hidden, of_x = truth(model, second, squared)
    assert found["rnn", "l0"].grad_hidden == pytest.approx(hidden, **CLOSE)
    assert found["rnn", ""].grad_input == pytest.approx(size(of_x), **CLOSE)


def test_of_two_cell_sequences_in_one_pass_the_last_is_shown(kind):
    reader, first, second = Reader(kind), data(), data(B, T + 3, D)
    found = sequences(Loop(reader), lambda m: (squared(m(first)) + squared(m(second))).backward())
    assert "2 sequences" in found["rnn", ""].note
    assert found["rnn", "l0"].grad_hidden == pytest.approx(truth(reader, second, squared)[0], **CLOSE)


@pytest.mark.parametrize(
    "between",
    [lambda h: functional.dropout(h, 0.5), lambda h: 0.5 * h, functional.layer_norm],
    ids=["dropout", "scaled", "normalized"],
)
def test_a_cell_whose_state_is_changed_between_its_calls_shows_what_autograd_says(kind, between):
    class Changed(Loop):
        def forward(self, x):
            state, self.went, self.handed = None, [], x
            for t in range(x.shape[1]):
                state = self.rnn(x[:, t], state)
                self.went.append(state)
                h = state[0] if isinstance(state, tuple) else state
                h = between(h, (H,)) if between is functional.layer_norm else between(h)
                state = (h, state[1]) if isinstance(state, tuple) else h
            return self.head(h)

    model, x, states = Changed(Reader(kind)), data(), []

    def run(m):
        states.append(torch.get_rng_state())
        squared(m(x)).backward()

    found = sequences(model, run)
    torch.set_rng_state(states[1])
    leaf = x.clone().requires_grad_()
    loss = squared(model(leaf))
    went = [s if isinstance(s, tuple) else (s,) for s in model.went]
    gradients = torch.autograd.grad(loss, [leaf, *(s[0] for s in went), *(s[-1] for s in went)])
    whole, layer = found["rnn", ""], found["rnn", "l0"]
    assert whole.note == "its state is changed between its calls, so how far back it can see is not known"
    assert whole.lag_gain is whole.horizon is None
    assert whole.grad_input == pytest.approx(size(gradients[0]), **CLOSE)
    assert layer.grad_hidden == pytest.approx(norms(gradients[1 : T + 1]), **CLOSE)
    assert layer.grad_cell == (pytest.approx(norms(gradients[T + 1 :]), **CLOSE) if kind == "LSTM" else None)


def test_cell_sequences_that_begin_with_the_same_learned_state_stay_apart():
    reader, start = Reader("GRU"), nn.Parameter(torch.randn(B, H))
    loop, first, second = Loop(reader), data(), data(B, T + 3, D)

    def run(m):
        losses = []
        for x in (first, second):
            h = start
            for t in range(x.shape[1]):
                h = m.rnn(x[:, t], h)
            losses.append(squared(m.head(h)))
        sum(losses).backward()

    found = sequences(loop, run)
    assert found["rnn", ""].length == T + 3
    assert "2 sequences" in found["rnn", ""].note


def test_an_encoder_and_a_decoder_hand_over_a_state_and_stay_two(kind):
    torch.manual_seed(2)
    model = nn.ModuleDict(
        {"encoder": FUSED[kind](D, H, batch_first=True), "decoder": FUSED[kind](D, H, batch_first=True)}
    )
    x = data()

    def run(m):
        _, state = m["encoder"](x)
        squared(m["decoder"](x, state)[0]).backward()

    found = sequences(model, run)
    leaf = x.clone().requires_grad_()
    squared(model["decoder"](x, model["encoder"](leaf)[1])[0]).backward()
    assert found["encoder", ""].grad_input == pytest.approx(size(leaf.grad), **CLOSE)
    assert found["encoder", ""].note is None
    assert found["decoder", ""].note is None
    assert {part for name, part in found if name == "decoder"} == {"", "l0"}


# --- where the input comes from ---


class Embedded(nn.Module):
    def __init__(self, kind="GRU", *, skip=False):
        super().__init__()
        self.embedding, self.reader, self.skip = nn.Embedding(11, D), Reader(kind), skip

    def forward(self, tokens):
        x = self.embedding(tokens)
        out = self.reader(x)
        return out + x.square().sum((1, 2)).unsqueeze(1) if self.skip else out


def test_behind_an_embedding_all_is_known(kind):
    model, tokens = Embedded(kind), torch.randint(11, (B, T))
    found = sequences(model, backward(tokens))
    hidden, of_x = truth(model.reader, model.embedding(tokens).detach(), squared)
    assert found["reader.rnn", ""].grad_input == pytest.approx(size(of_x), **CLOSE)
    assert found["reader.rnn", "l0"].grad_hidden == pytest.approx(hidden, **CLOSE)
    assert found["reader.rnn", ""].adjoint_residual < 1e-12
    assert found["reader.rnn", ""].note is None


def test_an_input_that_is_used_elsewhere_cannot_certify_but_nothing_is_lost(kind):
    model, tokens = Embedded(kind, skip=True), torch.randint(11, (B, T))
    found = sequences(model, backward(tokens))
    x = model.embedding(tokens).detach().requires_grad_()
    shift = x.square().sum((1, 2)).unsqueeze(1)
    squared(model.reader(x) + shift).backward()
    whole = found["reader.rnn", ""]
    assert whole.adjoint_residual is None
    assert whole.note == "its input is used elsewhere too, so the gradient of that cannot certify the hidden series"
    assert whole.grad_input == pytest.approx(size(x.grad), **CLOSE)
    hidden, _ = truth(model.reader, x.detach(), lambda out: squared(out + shift.detach()))
    assert found["reader.rnn", "l0"].grad_hidden == pytest.approx(hidden, **CLOSE)


def test_input_and_state_may_be_keywords(kind):
    model, x = Reader(kind), data()
    state = (torch.randn(1, B, H), torch.randn(1, B, H)) if kind == "LSTM" else torch.randn(1, B, H)
    true = sequences(model, lambda m: squared(m.head(m.rnn(x, state)[0][:, -1])).backward())
    found = sequences(model, lambda m: squared(m.head(m.rnn(x, hx=state)[0][:, -1])).backward())
    same(parts(found, "rnn"), parts(true, "rnn"))
    found = sequences(model, lambda m: squared(m.head(m.rnn(hx=state, input=x)[0][:, -1])).backward())
    same(parts(found, "rnn"), parts(true, "rnn"))
    assert found["rnn", ""].adjoint_residual is None
    found = sequences(
        model, lambda m: squared(m.head(m.rnn(hx=state, input=x.clone().requires_grad_())[0][:, -1])).backward()
    )
    same(parts(found, "rnn"), parts(true, "rnn"))


def test_a_frozen_module_stays_frozen_and_shows_what_passes_through(kind):
    model, x = Reader(kind), data()
    model.rnn.requires_grad_(False)
    outputs = []
    model.rnn.register_forward_hook(lambda m, a, out: outputs.append(out[0]))
    found = sequences(model, backward(x), optimizer=torch.optim.SGD(model.head.parameters(), lr=0.1))
    assert not any(y.requires_grad for y in outputs)
    assert found["rnn", ""].grad_input is None
    assert found["rnn", ""].note == "its input has no gradient, and could not be given one"
    before = Embedded(kind)
    before.reader.rnn.requires_grad_(False)
    tokens = torch.randint(11, (B, T))
    found = sequences(before, backward(tokens))
    hidden, of_x = truth(before.reader, before.embedding(tokens).detach(), squared)
    assert found["reader.rnn", "l0"].grad_hidden == pytest.approx(hidden, **CLOSE)
    assert found["reader.rnn", ""].grad_input == pytest.approx(size(of_x), **CLOSE)


# --- backward passes ---


def test_of_several_backward_passes_the_last_is_shown(kind):
    model, x = Reader(kind, every=True), data()

    def run(m):
        out = m(x)
        squared(out).backward(retain_graph=True)
        out[:, 3].sin().sum().backward()

    found = sequences(model, run)
    assert found["rnn", ""].note == "2 backward passes reached it; the last is shown"
    hidden, of_x = truth(model, x, lambda out: out[:, 3].sin().sum())
    assert found["rnn", ""].grad_input == pytest.approx(size(of_x), **CLOSE)
    assert found["rnn", "l0"].grad_hidden == pytest.approx(hidden, **CLOSE)
    assert found["rnn", ""].scaled is False


@pytest.mark.parametrize("looped", [False, True], ids=["fused", "cell"])
def test_of_accumulated_passes_the_last_is_shown(kind, looped):
    reader, batches = Reader(kind), [data() for _ in range(3)]
    model = Loop(reader) if looped else reader

    def run(m):
        for x in batches:
            squared(m(x)).backward()

    found = sequences(model, run)
    assert found["rnn", ""].note == "3 passes were accumulated in this step; the last is shown"
    hidden, of_x = truth(reader, batches[-1], squared)
    assert found["rnn", ""].grad_input == pytest.approx(size(of_x), **CLOSE)
    assert found["rnn", "l0"].grad_hidden == pytest.approx(hidden, **CLOSE)
    assert found["rnn", ""].scaled is False


def test_passes_that_are_summed_before_one_backward_pass_are_sequences_of_one(kind):
    model, batches = Reader(kind), [data() for _ in range(3)]
    found = sequences(model, lambda m: sum(squared(m(x)) for x in batches).backward())
    assert "3 sequences in this pass" in found["rnn", ""].note
    assert found["rnn", "l0"].grad_hidden == pytest.approx(truth(model, batches[-1], squared)[0], **CLOSE)


def test_a_gradient_of_a_gradient_is_no_gradient_through_time(kind):
    model, x = Reader(kind), data()

    def run(m):
        leaf = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(squared(m(leaf)), leaf, create_graph=True)
        gradient.square().sum().backward()

    found = sequences(model, run)
    assert "gradient of a gradient" in dropped(found, "rnn")


def test_a_penalty_beside_the_loss_is_no_gradient_through_time(kind):
    model, x = Reader(kind), data()

    def run(m):
        leaf = x.clone().requires_grad_()
        loss = squared(m(leaf))
        (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
        (loss + gradient.square().sum()).backward()

    assert "gradient of a gradient" in dropped(sequences(model, run), "rnn")


def test_a_graph_of_the_backward_pass_alone_changes_nothing(kind):
    model, x = Reader(kind), data()

    def run(m):
        parameters = list(m.parameters())
        for p, g in zip(parameters, torch.autograd.grad(squared(m(x)), parameters, create_graph=True), strict=True):
            p.grad = g.detach()

    found = sequences(model, run)
    assert found["rnn", "l0"].grad_hidden == pytest.approx(truth(model, x, squared)[0], **CLOSE)


def test_what_no_gradient_reached_says_so_and_still_shows_how_far_back_it_could_see(kind):
    model, x = Reader(kind), data()
    true = sequences(model, backward(x))

    def run(m):
        m(x)
        squared(m.head(torch.ones(B, H))).backward()

    found = sequences(model, run)
    assert found["rnn", ""].note == "no gradient reached it"
    assert found["rnn", ""].grad_input is None
    assert found["rnn", ""].lag_gain == pytest.approx(true["rnn", ""].lag_gain, **CLOSE)
    assert found["rnn", "l0"].grad_hidden == (0.0,) * T


def test_passes_without_gradients_between_the_steps_are_not_seen(kind):
    model, x = Reader(kind), data()
    true = sequences(model, backward(x))

    def run(m):
        m.eval()
        with torch.no_grad():
            m(data(B + 1, T + 2, D))
        m.train()
        squared(m(x)).backward()
        with torch.inference_mode():
            m(data(B + 2, T - 2, D))

    found = sequences(model, run)
    same(parts(found, "rnn"), parts(true, "rnn"))
    assert found["rnn", ""].note is None


def test_a_validation_with_a_graph_that_nobody_goes_back_is_not_shown(kind):
    model, x = Reader(kind), data()
    true = sequences(model, backward(x))

    def run(m):
        m(data(B + 1, T + 2, D))
        out = m(x)
        m(data(B + 2, T - 2, D))
        squared(out).backward()
        m(data(B + 1, T + 2, D))

    found = sequences(model, run)
    assert found["rnn", ""].grad_input == pytest.approx(true["rnn", ""].grad_input, **CLOSE)
    assert found["rnn", "l0"].grad_hidden == pytest.approx(true["rnn", "l0"].grad_hidden, **CLOSE)


# --- checkpoints: what is computed twice is seen once ---


@pytest.mark.parametrize("validated", [False, True], ids=["alone", "after a validation"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_a_checkpoint_around_the_layer_changes_nothing(kind, reentrant, validated):
    reader, x = Reader(kind), data()
    true = sequences(reader, backward(x))

    def run(m):
        if validated:
            with torch.no_grad():
                m(data())
        # Reentrant checkpoints want an input with a gradient.
        y = checkpoint(lambda x: m.rnn(x)[0], x.clone().requires_grad_(), use_reentrant=reentrant)
        squared(m.head(y[:, -1])).backward()

    found = sequences(reader, run)
    same(parts(found, "rnn"), parts(true, "rnn"))
    assert found["rnn", ""].note is None


@pytest.mark.parametrize("validated", [False, True], ids=["alone", "after a validation"])
def test_a_non_reentrant_checkpoint_of_an_input_without_gradient_changes_nothing(kind, validated):
    reader, x = Reader(kind), data()
    true = sequences(reader, backward(x))

    def run(m):
        if validated:
            with torch.no_grad():
                m(data())
        squared(m.head(checkpoint(lambda x: m.rnn(x)[0], x, use_reentrant=False)[:, -1])).backward()

    found = sequences(reader, run)
    same(parts(found, "rnn"), parts(true, "rnn"))


@pytest.mark.parametrize("to_the_end", [False, True], ids=["as far as needed", "to the end"])
@pytest.mark.parametrize("validated", [False, True], ids=["alone", "after a validation"])
@pytest.mark.parametrize("gradient", [False, True], ids=["x without gradient", "x with gradient"])
def test_non_reentrant_checkpoints_around_each_cell_call_change_nothing(kind, gradient, validated, to_the_end):
    reader, x = Reader(kind), data()
    true = sequences(reader, backward(x))
    loop = Loop(reader)

    def run(m):
        if validated:
            with torch.no_grad():
                m(data())
        with set_checkpoint_early_stop(not to_the_end):
            squared(
                m(x.clone().requires_grad_(gradient), lambda x, state: checkpoint(m.rnn, x, state, use_reentrant=False))
            ).backward()

    found = sequences(loop, run)
    same(parts(found, "rnn"), parts(true, "rnn"))
    assert found["rnn", ""].note is None


def test_reentrant_checkpoints_around_each_cell_call_are_said_to_be_beyond_us(kind):
    reader, x = Reader(kind), data()
    loop = Loop(reader)

    def call(m):
        if kind == "LSTM":
            return lambda x, state: checkpoint(lambda x, *s: m.rnn(x, s or None), x, *(state or ()), use_reentrant=True)
        return lambda x, state: checkpoint(m.rnn, x, state, use_reentrant=True)

    found = sequences(loop, lambda m: squared(m(x.clone().requires_grad_(), call(m))).backward())
    assert parts(found, "rnn").keys() == {""}
    assert found["rnn", ""].grad_input is None
    assert found["rnn", ""].lag_gain is None
    assert "checkpoint" in found["rnn", ""].note


# --- what happens to gradients between the backward pass and the step ---


def scaled_run(x, scaler, optimizer, *, unscale=False):
    def run(m):
        scaler.scale(squared(m(x))).backward()
        if unscale:
            scaler.unscale_(optimizer)

    return run


class Scaled:
    """An optimizer's `zero_grad` and `step` under a scaler."""

    def __init__(self, optimizer, scaler):
        self.optimizer, self.scaler = optimizer, scaler

    def zero_grad(self):
        self.optimizer.zero_grad()

    def step(self):
        self.scaler.step(self.optimizer)
        self.scaler.update()


def scaled_sequences(model, x, *, optimizer=torch.optim.SGD, unscale=False, clip=None, explicit=False, given=True):
    inner = optimizer(model.parameters(), lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    reports = []
    options = {"every_n_steps": 1, "probe_every_n_steps": 1, "sinks": [reports.append], "detectors": []}
    with gradwatch.watch(model, inner, scaler=scaler if given else None, **options) as watcher:
        for _ in range(2):
            inner.zero_grad()
            scaler.scale(squared(model(x))).backward()
            if explicit:
                watcher.step()
            if unscale:
                scaler.unscale_(inner)
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            scaler.step(inner)
            scaler.update()
    return {(s.module, s.part): s for s in reports[-1].snapshot.sequences}


@pytest.mark.parametrize(
    "form",
    [
        {},
        {"unscale": True},
        {"unscale": True, "clip": 1e-3},
        {"explicit": True},
        {"explicit": True, "unscale": True, "clip": 1e-3},
    ],
    ids=str,
)
def test_a_scale_that_is_known_is_divided_out(kind, form):
    model, x = Reader(kind), data()
    true = sequences(model, backward(x))
    found = scaled_sequences(model, x, **form)
    same(parts(found, "rnn"), parts(true, "rnn"))
    assert not any(s.scaled for s in found.values())


@pytest.mark.parametrize("form", [{}, {"unscale": True}], ids=str)
def test_a_scale_that_is_not_known_is_noticed(kind, form):
    model, x = Reader(kind), data()
    true = sequences(model, backward(x))
    found = scaled_sequences(model, x, given=False, **form)
    assert all(s.scaled for s in found.values())
    assert found["rnn", ""].lag_gain == pytest.approx(true["rnn", ""].lag_gain, **CLOSE)
    assert found["rnn", "l0"].carry_ratio == pytest.approx(true["rnn", "l0"].carry_ratio, **CLOSE)
    ratio = found["rnn", ""].grad_input[-1] / true["rnn", ""].grad_input[-1]
    assert ratio == pytest.approx(1024)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW])
def test_a_fused_optimizer_knows_its_scale(kind, optimizer):
    model, x = Reader(kind), data()
    true = sequences(model, backward(x))
    found = scaled_sequences(model, x, given=False, optimizer=lambda p, lr: optimizer(p, lr=lr, fused=True))
    same(parts(found, "rnn"), parts(true, "rnn"))
    assert not any(s.scaled for s in found.values())


@pytest.mark.parametrize("clip", [1e-3, 1e9], ids=["clipped", "not clipped"])
def test_clipping_before_the_step_is_an_unknown_factor(kind, clip):
    model, x = Reader(kind), data()

    def run(m):
        squared(m(x)).backward()
        nn.utils.clip_grad_norm_(m.parameters(), clip)

    found = sequences(model, run)
    assert {s.scaled for s in found.values()} == {clip < 1}


@pytest.mark.parametrize(
    "zeroed",
    [
        "before the forward pass",
        "before the backward pass",
        "to zero, before the forward pass",
        "to zero, before the backward pass",
        "never",
    ],
)
def test_gradients_that_stood_there_before_are_no_scale(zeroed):
    model, x, reports = Reader(), data(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def zero(when):
        if zeroed.endswith(when):
            optimizer.zero_grad(set_to_none=not zeroed.startswith("to zero"))

    with gradwatch.watch(
        model, optimizer, every_n_steps=1, probe_every_n_steps=1, sinks=[reports.append], detectors=[]
    ):
        for _ in range(4):
            zero("before the forward pass")
            outputs = model(x), model(2 * x)
            zero("before the backward pass")
            for out in outputs:
                squared(out).backward()
            optimizer.step()
    assert not any(s.scaled for r in reports[1:] for s in r.snapshot.sequences)


@pytest.mark.parametrize("scaler", [None, "not told", "told"])
def test_of_a_frozen_module_another_tells_whether_a_loss_scale_is_on_its_gradients(kind, scaler):
    model, tokens = Embedded(kind), torch.randint(11, (B, T))
    model.reader.rnn.requires_grad_(False)
    true = sequences(model, backward(tokens))
    found = true if scaler is None else scaled_sequences(model, tokens, given=scaler == "told")

    assert {s.scaled for s in found.values()} == {scaler == "not told"}
    ratio = found["reader.rnn", ""].grad_input[-1] / true["reader.rnn", ""].grad_input[-1]
    assert ratio == pytest.approx(1024 if scaler == "not told" else 1)


@pytest.mark.parametrize(
    ("scale", "changed", "unknown"),
    [
        (None, None, True),
        (None, math.nan, True),
        (None, 1.0, True),
        (None, 0.0, False),
        (2.0, None, False),
        (2.0, math.nan, False),
        (2.0, 1.0, False),
    ],
)
def test_whether_an_unknown_loss_scale_is_on_it_has_one_answer(scale, changed, unknown):
    layer, transfer, outputs = nn.Linear(2, 2), Transfer(), OutputGradients(Attempts())
    outputs.arm(ModelView({"": layer}, {id(layer): ""}))
    y = layer(torch.ones(1, 2))
    outputs.left(layer, (), {}, y)
    y.sum().backward()
    told = [None if number is None else transfer.add(torch.tensor(number)) for number in (scale, changed)]
    step = StepView({"": layer}, set(map(id, layer.parameters())), set(), *told)
    series = [Series("", 2, 1, {"grad_input": torch.ones(2)}), Series("l0", 2, 1, {"grad_hidden": torch.ones(2)})]
    seen = outputs.collect(step, transfer)
    values = Trace("rnn", series, arrived=True).collect(step, transfer, 1e-3)
    transfer.run()
    (activation,), (parts, _) = seen().activations, values()

    assert [activation.scaled, *(s.scaled for s in parts)] == [unknown] * 3


@pytest.mark.parametrize("scaled", [False, True])
def test_where_the_gradient_is_nan_a_loss_scale_cannot_be_excluded(scaled):
    model, x, reports = Reader("LSTM"), data(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with gradwatch.watch(
        model, optimizer, every_n_steps=1, probe_every_n_steps=1, sinks=[reports.append], detectors=[]
    ):
        for _ in range(2):
            optimizer.zero_grad()
            (squared(model(x)) * (1024 if scaled else 1) * math.nan).backward()
            optimizer.step()
    snapshot = reports[-1].snapshot
    assert {s.scaled for s in (*snapshot.sequences, *snapshot.activations)} == {True}


# --- what cannot be certified ---


class Doubling(nn.LSTM):
    """Returns other outputs than those of torch's equations."""

    def forward(self, x, hx=None):
        y, state = super().forward(x, hx)
        return 2 * y, state


class Renamed(nn.LSTM):
    """Does what it did."""

    def forward(self, x, hx=None):
        return super().forward(x, hx)


class OutputOnly(nn.LSTM):
    """Returns its outputs alone."""

    def forward(self, x, hx=None):
        return super().forward(x, hx)[0]


def test_an_overridden_forward_is_found_out():
    found = sequences(Reader(body=Doubling(D, H, batch_first=True)), backward(data()), steps=3)
    assert "its outputs are not those of torch's equations" in dropped(found, "rnn")
    assert found["rnn", ""].grad_input is not None


def test_a_gradient_of_the_input_that_only_the_walk_back_gives_is_left_out_with_what_it_rests_on():
    def run(m):
        squared(m.head(checkpoint(lambda x: m.rnn(x)[0], data(), use_reentrant=False)[:, -1])).backward()

    found = sequences(Reader(body=Renamed(D, H, batch_first=True)), run)
    assert found["rnn", ""].grad_input is not None
    assert found["rnn", ""].note is None
    found = sequences(Reader(body=Doubling(D, H, batch_first=True)), run)
    assert found["rnn", ""].grad_input is None
    assert found["rnn", ""].replay_residual == pytest.approx(0.5, abs=0.1)
    assert "the hidden series are left out" in found["rnn", ""].note


def test_the_walk_back_stands_in_for_the_gradient_of_the_input_only_where_it_looks_at_every_row(kind):
    reader, x = Reader(kind), data(9, T, D)
    found = sequences(
        reader, lambda m: squared(m.head(checkpoint(lambda x: m.rnn(x)[0], x, use_reentrant=False)[:, -1])).backward()
    )
    assert found["rnn", ""].grad_input is None
    assert found["rnn", ""].note == "its input has no gradient, and could not be given one"
    assert found["rnn", "l0"].grad_hidden is not None


def test_an_overridden_forward_that_does_the_same_is_certified():
    model, x = Reader(body=Renamed(D, H, batch_first=True)), data()
    found = sequences(
        model, backward(x), steps=3
    )  # the first probe looks whether a leaf in place of the input does harm
    hidden, of_x = truth(model, x, squared)
    assert found["rnn", "l0"].grad_hidden == pytest.approx(hidden, **CLOSE)
    assert found["rnn", ""].grad_input == pytest.approx(size(of_x), **CLOSE)


def test_an_overridden_forward_that_gives_something_else_is_told_and_takes_nothing_along():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.odd, self.reader = OutputOnly(D, D, batch_first=True), Reader()

        def forward(self, x):
            return self.reader(self.odd(x))

    model, x = Two(), data()
    found = sequences(model, backward(x), steps=3)
    assert found["odd", ""].lag_gain is None
    assert found["odd", ""].note is not None
    hidden, of_x = truth(model.reader, model.odd(x).detach(), squared)
    assert found["reader.rnn", "l0"].grad_hidden == pytest.approx(hidden, **CLOSE)
    assert found["reader.rnn", ""].grad_input == pytest.approx(size(of_x), **CLOSE)


def test_a_hook_that_scales_the_gradient_is_part_of_the_truth(kind):
    model, x = Reader(kind, every=True), data()

    def run(m, x=x):
        y, state = m.rnn(x)
        y.register_hook(lambda g: 3 * g)
        (state[0] if isinstance(state, tuple) else state).register_hook(lambda g: g / 2)
        (squared(m.head(y)) + squared(m.head(state[0]))).backward()

    found = sequences(model, run)
    leaf = x.clone().requires_grad_()
    run(model, leaf)
    assert found["rnn", ""].grad_input == pytest.approx(size(leaf.grad), **CLOSE)
    assert found["rnn", ""].adjoint_residual < 1e-12
    last = model.rnn(x)[0][:, -1].detach()
    hidden, _ = truth(model, x, lambda out: 3 * squared(out) + 0.5 * (2 * model.head(last).detach() * out[:, -1]).sum())
    assert found["rnn", "l0"].grad_hidden == pytest.approx(hidden, **CLOSE)


def test_a_hook_that_scales_the_gradient_is_part_of_the_truth_behind_an_embedding(kind):
    model, tokens = Embedded(kind), torch.randint(11, (B, T))

    def run(m):
        y = m.reader.rnn(m.embedding(tokens))[0]
        y.register_hook(lambda g: 3 * g)
        squared(m.reader.head(y[:, -1])).backward()

    found = sequences(model, run)
    hidden, _ = truth(model.reader, model.embedding(tokens).detach(), lambda out: 3 * squared(out))
    assert found["reader.rnn", "l0"].grad_hidden == pytest.approx(hidden, **CLOSE)
    assert found["reader.rnn", ""].adjoint_residual < 1e-12


def test_a_hook_on_the_whole_module_does_not_touch_what_is_inside(kind):
    model, x = Reader(kind), data()
    true = sequences(model, backward(x))
    warnings.simplefilter("ignore")  # torch's, of a step in which the input has no gradient
    model.rnn.register_full_backward_hook(lambda m, into, out: tuple(None if g is None else 3 * g for g in into))
    same(parts(sequences(model, backward(x)), "rnn"), parts(true, "rnn"))


def test_a_hook_that_only_looks_does_no_harm(kind):
    model, tokens = Embedded(kind), torch.randint(11, (B, T))
    true = sequences(model, backward(tokens))

    def run(m):
        y = m.reader.rnn(m.embedding(tokens))[0]
        y.register_hook(lambda g: None)
        y.retain_grad()
        squared(m.reader.head(y[:, -1])).backward()

    same(parts(sequences(model, run), "reader.rnn"), parts(true, "reader.rnn"))


@pytest.mark.parametrize("embedded", [False, True])
def test_an_output_that_is_edited_in_place_is_still_the_modules_own_or_not_shown(kind, embedded):
    model = Embedded(kind) if embedded else Reader(kind)
    reader, name = (model.reader, "reader.rnn") if embedded else (model, "rnn")
    x = torch.randint(11, (B, T)) if embedded else data()

    def loss(m, x, *, leaf=False):
        x = m.embedding(x) if embedded else x
        x = x.detach().requires_grad_() if leaf else x
        y = reader.rnn(x)[0]
        y.mul_(3).add_(1)
        return squared(reader.head(y[:, -1])), x

    value, leaf = loss(model, x, leaf=True)
    value.backward()
    found = sequences(model, lambda m: loss(m, x)[0].backward())
    assert found[name, ""].grad_input == pytest.approx(size(leaf.grad), **CLOSE)
    if kind == "LSTM":  # its output is a view, and the hook on it is lost with the edit
        assert "an edit in place" in dropped(found, name)
        return
    assert found[name, ""].adjoint_residual < 1e-12
    hidden, _ = truth(
        reader,
        leaf.detach(),
        lambda out: squared(3 * out + (reader.head.weight.sum(1) - 2 * reader.head.bias).detach()),
    )
    assert found[name, "l0"].grad_hidden == pytest.approx(hidden, **CLOSE)


def test_an_input_that_is_edited_in_place_before_and_after_is_what_it_was_in_between(kind):
    model, x = Reader(kind), data()
    model.rnn.weight_ih_l0.requires_grad_(False)

    def loss(m, x, *, mine):
        x = x.clone()
        if mine:
            x.requires_grad_()
        given = x * 1.0 if mine else x
        given.mul_(2)
        y = m.rnn(given)[0]
        if not mine:
            given.zero_()
        return squared(m.head(y[:, -1])), x

    true, leaf = loss(model, x, mine=True)
    true.backward()
    found = sequences(model, lambda m: loss(m, x, mine=False)[0].backward())
    assert found["rnn", ""].grad_input == pytest.approx([v / 2 for v in size(leaf.grad)], **CLOSE)
    assert found["rnn", ""].adjoint_residual < 1e-12


@pytest.mark.parametrize("how", ["in place", "by data", "loaded"])
def test_weights_that_are_edited_before_the_step_are_noticed(kind, how):
    model, x = Reader(kind), data()

    def run(m):
        squared(m(x)).backward()
        if how == "in place":
            with torch.no_grad():
                m.rnn.weight_hh_l0.mul_(1.5)
        elif how == "by data":
            m.rnn.weight_hh_l0.data.mul_(1.5)
        else:
            m.load_state_dict({name: 0.5 * value for name, value in m.state_dict().items()})

    note = dropped(sequences(model, run), "rnn")
    assert "the hidden series are left out" in note
    assert ("its weights were edited" in note) == (how != "by data")


def test_an_edit_too_small_to_be_seen_in_the_outputs_is_one_all_the_same(kind):
    model, x = Reader(kind), data()

    def run(m):
        squared(m(x)).backward()
        with torch.no_grad():
            m.rnn.weight_hh_l0.mul_(1 + 1e-12)

    assert "its weights were edited" in dropped(sequences(model, run), "rnn")


@pytest.mark.parametrize("where", ["input", "weight"])
def test_nan_is_not_shown_as_a_number(kind, where):
    model, x = Reader(kind), data()
    if where == "input":
        x[1, 4, 2] = math.nan
    else:
        with torch.no_grad():
            model.rnn.weight_hh_l0[0, 0] = math.nan
    assert "NaN" in dropped(sequences(model, backward(x)), "rnn")


def test_an_infinite_gradient_is_not_shown_as_a_number(kind):
    model, x = Reader(kind), data()
    found = sequences(model, backward(x, lambda out: squared(out) * math.inf))
    assert "the hidden series are left out" in found["rnn", ""].note
    assert set(parts(found, "rnn")) == {""}


# --- weights that are not plain parameters ---


def parametrized(kind, how):
    model = Reader(kind)
    for name in ("weight_ih_l0", "weight_hh_l0"):
        {"weight": parametrizations.weight_norm, "spectral": parametrizations.spectral_norm}[how](model.rnn, name)
    if how == "weight":
        with torch.no_grad():
            model.rnn.parametrizations.weight_hh_l0.original0.mul_(1.7)
    return model


@pytest.mark.parametrize("how", ["weight", "spectral"])
def test_parametrized_weights_are_taken_as_they_are_in_the_call(kind, how):
    model, x = parametrized(kind, how), data()
    model.eval()  # where spectral_norm does not move
    found = sequences(model, backward(x))
    hidden, of_x = truth(model, x, squared)
    assert found["rnn", "l0"].grad_hidden == pytest.approx(hidden, **CLOSE)
    assert found["rnn", ""].grad_input == pytest.approx(size(of_x), **CLOSE)
    model.train()
    found = sequences(model, backward(x))
    assert found["rnn", ""].replay_residual < 1e-12
    assert found["rnn", ""].adjoint_residual < 1e-12


def test_a_module_that_stands_in_two_places_is_one(kind):
    model, x = nn.ModuleDict({"a": FUSED[kind](D, D, batch_first=True)}), data()
    model["b"] = model["a"]
    found = sequences(model, lambda m: squared(m["b"](m["a"](x)[0])[0][:, -1]).backward())
    assert {name for name, _ in found} == {"a"}
    assert "2 sequences" in found["a", ""].note
    middle = model["a"](x)[0].detach().requires_grad_()
    squared(model["a"](middle)[0][:, -1]).backward()
    assert found["a", ""].grad_input == pytest.approx(size(middle.grad), **CLOSE)


def test_modules_that_share_their_weights_are_two(kind):
    model, x = (
        nn.ModuleDict({"a": FUSED[kind](D, D, batch_first=True), "b": FUSED[kind](D, D, batch_first=True)}),
        data(),
    )
    for name, weight in list(model["a"].named_parameters()):
        setattr(model["b"], name, weight)
    found = sequences(model, lambda m: squared(m["b"](m["a"](x)[0])[0][:, -1]).backward())
    leaf = x.clone().requires_grad_()
    middle = model["a"](leaf)[0]
    middle.retain_grad()
    squared(model["b"](middle)[0][:, -1]).backward()
    assert found["a", ""].grad_input == pytest.approx(size(leaf.grad), **CLOSE)
    assert found["b", ""].grad_input == pytest.approx(size(middle.grad), **CLOSE)
    assert found["a", ""].note is found["b", ""].note is None


# --- other modules, by name ---


class Body(nn.Module):
    def __init__(self, body, readout):
        super().__init__()
        self.body, self.head, self.readout = body, nn.Linear(D, 2), readout

    def forward(self, x):
        return self.head(self.readout(self.body(x)))


def convolution():
    return nn.Sequential(
        nn.Conv1d(D, D, 3, padding=2, dilation=2), nn.ReLU(inplace=True), nn.BatchNorm1d(D), nn.Conv1d(D, D, 3)
    )


@pytest.mark.parametrize("inside", [False, True], ids=["x as given", "x from a layer"])
@pytest.mark.parametrize(
    ("body", "time", "readout"),
    [
        (
            lambda: nn.TransformerEncoder(
                nn.TransformerEncoderLayer(D, 2, 8, dropout=0.0, batch_first=True), 2, enable_nested_tensor=False
            ),
            1,
            lambda y: y[:, 0],
        ),
        (
            lambda: nn.TransformerEncoder(
                nn.TransformerEncoderLayer(D, 2, 8, dropout=0.0), 2, enable_nested_tensor=False
            ),
            0,
            lambda y: y[0],
        ),
        (convolution, 2, lambda y: y[:, :, -1]),
    ],
    ids=["encoder", "encoder, time first", "convolution"],
)
def test_any_module_has_its_inputs_gradient_by_time(body, time, readout, inside):
    x = data(*{1: (B, T, D), 0: (T, B, D), 2: (B, D, T)}[time])
    model = (
        nn.Sequential(nn.BatchNorm1d(D) if time == 2 else nn.LayerNorm(D), Body(body(), readout))
        if inside
        else Body(body(), readout)
    )
    name = "1.body" if inside else "body"
    found = sequences(model, backward(x), steps=3, timesteps={name: time})
    inner = model[1] if inside else model
    leaf = (model[0](x) if inside else x).detach().requires_grad_()
    squared(inner(leaf)).backward()
    assert found[name, ""].grad_input == pytest.approx(norms(leaf.grad.movedim(time, 0)), **CLOSE)
    assert found[name, ""].length == T
    assert found[name, ""].note is None


def test_at_the_first_probe_an_input_without_gradient_is_said_to_have_none():
    found = sequences(Body(convolution(), lambda y: y[:, :, -1]), backward(data(B, D, T)), timesteps={"body": 2})
    assert found["body", ""].grad_input is None
    assert "its input has no gradient" in found["body", ""].note


class EditsItsInput(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(D, D)

    def forward(self, x):
        return self.linear(x.mul_(2) if not x.requires_grad else 2 * x)


def test_a_module_that_edits_its_input_is_left_alone():
    model = Body(EditsItsInput(), lambda y: y[:, -1])
    found = sequences(model, lambda m: squared(m(data())).backward(), steps=4, timesteps={"body": 1})
    assert found["body", ""].grad_input is None
    assert found["body", ""].note is not None


class OwnCell(nn.Module):
    """An LSTM cell by hand, which gives its output and its state, as many do."""

    def __init__(self, how):
        super().__init__()
        self.gates, self.how = nn.Linear(D + H, 4 * H), how

    def forward(self, x, state):
        h, c = state
        i, f, g, o = self.gates(torch.cat([x, h], -1)).chunk(4, -1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        return {"h, c": (h, c), "h, (h, c)": (h, (h, c)), "h": h}[self.how]


class OwnLoop(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.cell, self.head, self.went = OwnCell(how), nn.Linear(H, 2), []

    def forward(self, x):
        h = c = torch.zeros(len(x), H)
        self.went = []
        for t in range(x.shape[1]):
            out = self.cell(x[:, t], (h, c))
            h, c = {"h, c": out, "h, (h, c)": out[-1], "h": (out, c)}[self.cell.how]
            self.went.append((h, c))
        return self.head(h)


@pytest.mark.parametrize("how", ["h, c", "h, (h, c)", "h"])
@pytest.mark.parametrize("batch", [B, 11])
def test_a_cell_of_ones_own_shows_its_states(how, batch):
    model, x = OwnLoop(how), data(batch, T, D)
    found = sequences(model, lambda m: squared(m(x.clone().requires_grad_())).backward(), timesteps={"cell": None})
    leaf = x.clone().requires_grad_()
    loss = squared(model(leaf))
    keep_c = how != "h"
    gradients = torch.autograd.grad(
        loss, [leaf, *(h for h, _ in model.went), *(c for _, c in model.went if keep_c)], allow_unused=True
    )
    layer = found["cell", "l0"]
    assert found["cell", ""].grad_input == pytest.approx(size(gradients[0]), **CLOSE)
    assert layer.grad_hidden == pytest.approx(norms(gradients[1 : T + 1]), **CLOSE)
    assert (
        (layer.grad_cell is None)
        if not keep_c
        else layer.grad_cell == pytest.approx(norms(gradients[T + 1 :]), **CLOSE)
    )
    assert layer.rows == batch
    assert layer.length == T


def test_the_models_own_input_has_a_name():
    model, x = Reader("GRU"), data()
    found = sequences(model, backward(x), steps=3, timesteps={"": 1})
    assert found["", ""].grad_input == pytest.approx(size(truth(model, x, squared)[1]), **CLOSE)
    assert found["rnn", ""].grad_input == found["", ""].grad_input


class Takes(nn.Module):
    """A model that takes its batch in one piece."""

    def __init__(self, how):
        super().__init__()
        self.reader, self.how = Reader("GRU"), how

    def forward(self, batch):
        return self.reader(batch["x"] if self.how == "dict" else batch[0])


@pytest.mark.parametrize("how", ["dict", "tuple", "list"])
def test_a_batch_in_one_piece_reaches_the_model_as_it_is(how):
    model, x = Takes(how), data()
    batch = {"dict": {"x": x, "y": 1}, "tuple": (x, 1), "list": [x, 1]}[how]
    found = sequences(model, backward(batch), steps=4, timesteps={"": 1})
    assert found["", ""].note is not None
    assert found["reader.rnn", ""].grad_input == pytest.approx(size(truth(model.reader, x, squared)[1]), **CLOSE)


def test_a_name_that_the_model_does_not_have_is_refused():
    model = Reader()
    with pytest.raises(
        ValueError, match=r"timesteps must name modules of the model \('', 'rnn', 'head'\), got 'encoder'"
    ):
        gradwatch.watch(model, torch.optim.SGD(model.parameters(), lr=0.1), timesteps={"encoder": 1})


def test_a_module_of_whole_numbers_has_no_gradient_and_says_so():
    model = Embedded()
    found = sequences(model, backward(torch.randint(11, (B, T))), timesteps={"embedding": 1})
    assert found["embedding", ""].note == "its first input is not a floating-point tensor"
    assert found["reader.rnn", ""].note is None


def test_a_dimension_that_is_not_there_is_told():
    model = Body(nn.Linear(D, D), lambda y: y[:, -1])
    found = sequences(model, backward(data()), timesteps={"body": 3})
    assert (
        found["body", ""].note
        == "timesteps= says that dimension 3 is time (counted from 0), and its input has 3 dimensions"
    )


def test_a_module_beyond_the_byte_budget_is_looked_at_in_fewer_rows_and_says_so():
    net = nn.LSTM(D, 6, batch_first=True)
    three = 3 * bytes_per_row(steps=10, hidden=6)
    for budget, rows in ((three, 3), (three - 1, 2), (0, 1), (100 * three, 8)):
        found = recorded(net, lambda m: m(data(20, 10, D))[0].sum().backward(), budget=budget)[""]
        assert [s.rows for s in found.series] == [rows, rows]
        what = "row of the batch is" if rows == 1 else "rows of the batch are"
        assert found.notes == ([] if rows == 8 else [f"only {rows} {what} looked at: more would take more than 0 MiB"])


def test_a_batch_without_rows_is_told(kind):
    found = sequences(Reader(kind), backward(data(0, T, D)))
    assert found["rnn", ""].note == "its batch has no rows"
    assert found["rnn", ""].lag_gain is None


def test_the_explicit_form_sees_the_same(kind):
    model, x, reports = Reader(kind), data(), []
    true = sequences(model, backward(x))
    with gradwatch.watch(
        model, every_n_steps=1, probe_every_n_steps=1, sinks=[reports.append], detectors=[]
    ) as watcher:
        for _ in range(2):
            model.zero_grad()
            squared(model(x)).backward()
            watcher.step()
    assert reports[0].snapshot.sequences is None
    same({s.part: s for s in reports[1].snapshot.sequences}, parts(true, "rnn"))


def test_a_module_that_does_not_run_is_told():
    model = Reader()
    model.spare = nn.GRU(D, H)
    found = sequences(model, backward(data()))
    assert found["spare", ""].note == "it did not run in this step"
    assert found["spare", ""].length == 0


def test_without_timesteps_nothing_is_seen():
    model, x = Reader(), data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    reports, hooks = [], []
    with gradwatch.watch(
        model, optimizer, timesteps=False, every_n_steps=1, probe_every_n_steps=1, sinks=[reports.append], detectors=[]
    ):
        for _ in range(3):
            out = model(x)
            hooks.append((len(torch_modules._global_forward_hooks), len(torch_modules._global_forward_pre_hooks)))
            optimizer.zero_grad()
            squared(out).backward()
            optimizer.step()
    assert [r.snapshot.sequences for r in reports] == [None] * 3
    assert hooks == [(0, 0), (1, 1), (1, 1)]  # the order of the layers is still asked for, and what they give
    with gradwatch.watch(model, optimizer, every_n_steps=1, probe_every_n_steps=1, detectors=[]):
        optimizer.step()
        assert len(torch_modules._global_forward_hooks) == 1


# --- rows of different length ---


def test_padded_rows_are_aligned_at_their_own_ends_as_packed_ones_are(kind):
    lengths = [T, 3, 7, 1]
    model = Reader(kind)
    rows = [torch.randn(n, D) for n in lengths]
    x = pad_sequence(rows, batch_first=True)

    def packed(m):
        packed = pack_padded_sequence(x, torch.tensor(lengths), batch_first=True, enforce_sorted=False)
        y, _ = pad_packed_sequence(m.rnn(packed)[0], batch_first=True)
        squared(m.head(y[range(4), [n - 1 for n in lengths]])).backward()

    def padded(m):
        squared(m.head(m.rnn(x)[0][range(4), [n - 1 for n in lengths]])).backward()

    true, found = sequences(model, packed), sequences(model, padded)
    # Packed rows are sorted, so they have other cotangents.
    same(
        parts(found, "rnn"),
        parts(true, "rnn"),
        module=["grad_input"],
        layer=["grad_hidden", "grad_hidden_direct", "grad_cell", "carry_ratio"],
    )
    one = [truth(model, row.unsqueeze(0), squared) for row in rows]
    by_lag = [
        math.sqrt(sum(hidden[-1 - lag] ** 2 for hidden, _ in one if lag < len(hidden))) for lag in reversed(range(T))
    ]
    assert found["rnn", "l0"].grad_hidden == pytest.approx(by_lag, **CLOSE)
    assert found["rnn", ""].length == true["rnn", ""].length == T


def test_what_stands_in_the_padding_of_a_packed_batch_counts_for_nothing(kind):
    lengths, model, x = [3, T, 7, 1], Reader(kind), data(4, T, D)

    def run(filler):
        given = x.clone()
        for row, n in enumerate(lengths):
            given[row, n:] = filler

        def packed(m):
            packed = pack_padded_sequence(given, torch.tensor(lengths), batch_first=True, enforce_sorted=False)
            y, _ = pad_packed_sequence(m.rnn(packed)[0], batch_first=True, padding_value=filler)
            squared(m.head(y[range(4), [n - 1 for n in lengths]])).backward()

        return packed

    true = sequences(model, run(0.0))
    found = sequences(model, run(7.0))
    same(parts(found, "rnn"), parts(true, "rnn"))


def test_a_timestep_of_zeros_that_matters_is_no_padding(kind):
    model, x = Reader(kind), data()
    x[:, -3:] = 0.0
    found = sequences(model, backward(x))
    assert found["rnn", "l0"].grad_hidden == pytest.approx(truth(model, x, squared)[0], **CLOSE)
    x[:] = 0.0
    found = sequences(model, backward(x))
    assert found["rnn", "l0"].grad_hidden == pytest.approx(truth(model, x, squared)[0], **CLOSE)
