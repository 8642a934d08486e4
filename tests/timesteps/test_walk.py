"""Gradients through time against an unrolled float64 reference, against closed forms, and against exact Jacobians."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import gradwatch
from gradwatch.model.forward_hooks import listening
from gradwatch.timesteps.recorder import Recorder
from gradwatch.timesteps.walk import gradients_through_time
from gradwatch.values.sequences import horizon_of

INPUTS, HIDDEN, PROJECTED = 3, 4, 2
LOOKED_AT, COTANGENTS = 8, 3
SERIES = (
    "grad_input",
    "grad_hidden",
    "grad_hidden_direct",
    "grad_cell",
    "carry_ratio",
    "lag_gain",
    "lag_gain_hidden",
    "lag_gain_cell",
)
LIMIT = {torch.float64: 1e-10, torch.float32: 1e-4}


# --- the reference: the equations in torch's documentation, one timestep after the other ---


@dataclass
class Track:
    """What one layer and direction went through, by timestep; each name a place where a gradient can be taken."""

    hidden: dict  # h_t, whoever uses it
    own: dict  # h_t as an output of this layer
    handed: dict  # h_t as the next timestep takes it
    cell: dict  # c_t, whoever uses it
    kept: dict  # c_t, but not as h_t uses it
    passed: dict  # c_t as the next timestep takes it


def step(kind, x, h, c, w_ih, w_hh, b_ih, b_hh):
    a, b = x @ w_ih.T + b_ih, h @ w_hh.T + b_hh
    if kind == "LSTM":
        i, f, g, o = (a + b).chunk(4, -1)
        new = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid(), new
    if kind == "GRU":
        (ar, az, an), (br, bz, bn) = a.chunk(3, -1), b.chunk(3, -1)
        z = (az + bz).sigmoid()
        return (1 - z) * (an + (ar + br).sigmoid() * bn).tanh() + z * h, None
    return ((a + b).tanh() if kind == "RNN_TANH" else (a + b).relu()), None


def unrolled(module, x, lengths, h0=None, c0=None, masks=()):
    """Run a recurrent module of torch by hand, in float64.

    Args:
        module: nn.RNN, nn.LSTM or nn.GRU; its weights are read.
        x: (T, B, inputs), float64.
        lengths: of the rows.
        h0, c0: (layers x directions, B, features), float64.
        masks: for each gap between two layers, what dropout multiplies with, (T, B, features).

    Returns:
        Outputs (T, B, features), h_n, c_n (None but for an LSTM), and a Track for each part.

    """
    kind, lstm = module.mode, module.mode == "LSTM"
    directions = 1 + module.bidirectional
    steps, batch = x.shape[:2]
    width = module.proj_size or module.hidden_size
    h0 = x.new_zeros((module.num_layers * directions, batch, width)) if h0 is None else h0
    c0 = x.new_zeros((module.num_layers * directions, batch, module.hidden_size)) if c0 is None else c0
    tracks, h_n, c_n = {}, [], []
    for layer in range(module.num_layers):
        outputs = []
        for direction in range(directions):
            suffix = f"l{layer}" + "_reverse" * direction
            w_ih, w_hh = (getattr(module, f"{name}_{suffix}").detach().double() for name in ("weight_ih", "weight_hh"))
            b_ih, b_hh = (
                getattr(module, f"{name}_{suffix}").detach().double() if module.bias else 0.0
                for name in ("bias_ih", "bias_hh")
            )
            w_hr = getattr(module, f"weight_hr_{suffix}").detach().double() if module.proj_size else None
            h, c = h0[layer * directions + direction], c0[layer * directions + direction]
            last_h, last_c = list(h), list(c)
            track = tracks[suffix] = Track({}, {}, {}, {}, {}, {})
            for t in reversed(range(steps)) if direction else range(steps):
                new, cell = step(kind, x[t], h, c, w_ih, w_hh, b_ih, b_hh)
                if lstm:
                    cell = track.cell[t] = cell + 0.0
                    new = new * cell.tanh()
                    new = new if w_hr is None else new @ w_hr.T
                    kept = track.kept[t] = cell * 1.0
                    passed = track.passed[t] = kept * 1.0
                    final_c = kept * 1.0
                new = track.hidden[t] = new + 0.0
                own, handed = track.own[t], track.handed[t] = new * 1.0, new * 1.0
                there = torch.tensor([[t < n] for n in lengths])
                h = torch.where(there, handed, h)
                c = torch.where(there, passed, c) if lstm else c
                for row, n in enumerate(lengths):
                    if t == (0 if direction else n - 1):
                        last_h[row] = own[row]
                        last_c[row] = final_c[row] if lstm else c[row]
            there = torch.tensor([[[t < n] for n in lengths] for t in range(steps)])
            outputs.append(torch.stack([track.own[t] for t in range(steps)]) * there)
            h_n.append(torch.stack(last_h))
            c_n.append(torch.stack(last_c))
        y = torch.cat(outputs, -1)
        x = y * masks[layer] if masks and layer < module.num_layers - 1 else y
    return y, torch.stack(h_n), torch.stack(c_n) if lstm else None, tracks


def aligned(squares, lengths, rows, *, mean=False):
    """Add up squares[t][row] over rows, each aligned at its own end; the oldest timestep first."""
    longest, found = max(lengths[row] for row in rows), []
    for lag in reversed(range(longest)):
        there = [float(squares[lengths[row] - 1 - lag][row]) for row in rows if lag < lengths[row]]
        found.append(math.fsum(there) / (len(there) if mean else 1))
    return found


def roots(squares):
    return tuple(math.sqrt(s) for s in squares)


def cotangents(rows, width):
    """The first vectors that a watcher draws: of length 1, and orthonormal as far as there is room for that."""
    drawn = torch.randn((width, rows * COTANGENTS), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    blocks = [torch.linalg.qr(drawn[:, k : k + width])[0] for k in range(0, rows * COTANGENTS, width)]
    return torch.cat(blocks, 1).T.reshape(rows, COTANGENTS, width)


class Truth:
    """Every series of a module, from autograd through the unrolled reference."""

    PLACES = ("hidden", "own", "handed", "cell", "kept", "passed")

    def __init__(self, y, tracks, x, lengths, rows, objective):
        self.lengths, self.rows, self.tracks, self.x = lengths, rows, tracks, x
        self.steps = len(x)
        self.series = {}
        self.y = y.detach()
        training = self._gradients(objective, self.PLACES)
        self.reached = training is not None
        lags = {}
        for number in range(COTANGENTS):
            cotangent = torch.zeros_like(y)
            for row, vectors in zip(rows, cotangents(len(rows), y.shape[-1]), strict=True):
                cotangent[lengths[row] - 1, row] = vectors[number]
            for key, squares in self._gradients((y * cotangent).sum(), ("hidden", "cell")).items():
                lags[key] = lags.get(key, 0.0) + squares / COTANGENTS
        whole = self.series[""] = {"lag_gain": roots(reversed(self._sums(lags["", "x"], mean=True)))}
        if self.reached:
            whole["grad_input"] = roots(aligned(training["", "x"], lengths, range(len(lengths))))
        for part, track in tracks.items():
            mine = self.series[part] = {}
            of = {n: training[part, n] if self.reached else torch.zeros(len(x), len(lengths)) for n in self.PLACES}
            mine["grad_hidden"] = roots(self._sums(of["hidden"]))
            mine["grad_hidden_direct"] = roots(self._sums(of["own"]))
            mine["carry_ratio"] = self._carry(of, reverse=part.endswith("_reverse"))
            if track.cell:
                mine["grad_cell"] = roots(self._sums(of["cell"]))
            if not part.endswith("_reverse"):
                mine["lag_gain_hidden"] = roots(reversed(self._sums(lags[part, "hidden"], mean=True)))
                if track.cell:
                    mine["lag_gain_cell"] = roots(reversed(self._sums(lags[part, "cell"], mean=True)))

    def _gradients(self, value, names):
        """Squared norms over the features, by part and place, (T, B)."""
        if value is None or not value.requires_grad:
            return None
        places = [
            (part, name, t)
            for part, track in self.tracks.items()
            for name in names
            for t in range(self.steps)
            if getattr(track, name)
        ]
        tensors = [getattr(self.tracks[part], name)[t] for part, name, t in places]
        found = torch.autograd.grad(value, [self.x, *tensors], retain_graph=True, allow_unused=True)
        squares = {("", "x"): found[0].square().sum(-1) if found[0] is not None else torch.zeros(self.x.shape[:2])}
        for (part, name, t), gradient in zip(places, found[1:], strict=True):
            entry = squares.setdefault((part, name), torch.zeros(self.x.shape[:2], dtype=torch.float64))
            if gradient is not None:
                entry[t] = gradient.square().sum(-1)
        for (part, _), entry in list(squares.items()):
            for name in names if part else ():
                squares.setdefault((part, name), torch.zeros_like(entry))
        return squares

    def _sums(self, squares, *, mean=False):
        return aligned(squares, self.lengths, self.rows, mean=mean)

    def _carry(self, of, *, reverse):
        found = []
        for lag in range(max(self.lengths[r] for r in self.rows) - 1, 0, -1):
            pairs = [(self.lengths[r] - 1 - lag, r) for r in self.rows if lag < self.lengths[r]]
            to, of_ = (1, 0) if reverse else (0, 1)
            carried = math.fsum(float(of["handed"][t + to][r] + of["passed"][t + to][r]) for t, r in pairs)
            state = math.fsum(float(of["hidden"][t + of_][r] + of["kept"][t + of_][r]) for t, r in pairs)
            found.append(math.sqrt(carried / state) if state else math.nan)
        return tuple(found)


def worst_error(found, true):
    """The largest relative error over the entries; what is exactly zero must be exactly zero."""
    assert len(found) == len(true)
    errors = [
        0.0 if f == t or (math.isnan(f) and math.isnan(t)) else abs(f - t) / abs(t) if t else math.inf
        for f, t in zip(found, true, strict=True)
    ]
    return max(errors, default=0.0)


# --- one configuration, trained and watched ---


@dataclass(frozen=True)
class Case:
    mode: str
    layers: int
    bidirectional: bool
    bias: bool
    projected: bool
    state: bool
    dropout: float
    form: str  # time-first, batch-first, unbatched, packed (sorted), shuffled (packed, not sorted)
    loss: str  # all, last, h_n, c_n, both, projection, nothing
    dtype: torch.dtype
    steps: int
    batch: int

    def module(self):
        options = {
            "num_layers": self.layers,
            "bidirectional": self.bidirectional,
            "bias": self.bias,
            "dropout": self.dropout,
            "batch_first": self.form in ("batch-first", "shuffled"),
        }
        if self.mode == "LSTM":
            return nn.LSTM(INPUTS, HIDDEN, proj_size=PROJECTED * self.projected, **options)
        if self.mode == "GRU":
            return nn.GRU(INPUTS, HIDDEN, **options)
        return nn.RNN(INPUTS, HIDDEN, nonlinearity=self.mode.removeprefix("RNN_").lower(), **options)


class Net(nn.Module):
    """A recurrent module under one of several losses."""

    def __init__(self, case):
        super().__init__()
        self.case = case
        self.rnn = case.module()
        self.other = nn.Parameter(torch.ones(2))
        width = (PROJECTED if case.projected else HIDDEN) * (1 + case.bidirectional)
        self.register_buffer("by_step", torch.randn(case.steps, case.batch, width))
        self.register_buffer("mix", torch.randn(width, 5) / 3)
        self.register_buffer("by_state", torch.randn(case.layers * (1 + case.bidirectional), case.batch, HIDDEN))

    def objective(self, y, h, c, lengths):
        """A loss of outputs (T, B, features) and last states; None where it is none of theirs."""
        mix, by_step = self.mix.to(y.dtype), self.by_step.to(y.dtype)
        by_state = self.by_state[..., : h.shape[-1]].to(h.dtype)
        last = torch.stack([y[n - 1, row] for row, n in enumerate(lengths)])
        loss = None
        match self.case.loss:
            case "all":
                loss = (y * by_step).sum()
            case "last":
                loss = (last @ mix).sin().sum()
            case "h_n":
                loss = (h * by_state).sum()
            case "c_n":
                loss = (c * self.by_state.to(c.dtype)).sum()
            case "both":
                loss = (h * by_state).sum() + (y * by_step).sin().sum()
            case "projection":
                loss = (y @ mix).tanh().square().sum()
        return loss

    def forward(self, x, lengths, state):
        """Take x (T, B, inputs) and lay it out as the case wants."""
        form = self.case.form
        if form == "unbatched":
            y, last = self.rnn(
                x[:, 0],
                None if state is None else tuple(s[:, 0] for s in state) if isinstance(state, tuple) else state[:, 0],
            )
            y, last = (
                y.unsqueeze(1),
                tuple(s.unsqueeze(1) for s in last) if isinstance(last, tuple) else last.unsqueeze(1),
            )
        elif form in ("packed", "shuffled"):
            given = x.transpose(0, 1) if form == "shuffled" else x
            packed = pack_padded_sequence(
                given, torch.tensor(lengths), batch_first=form == "shuffled", enforce_sorted=form == "packed"
            )
            y, last = self.rnn(packed, state)
            y, _ = pad_packed_sequence(y)
        elif form == "batch-first":
            y, last = self.rnn(x.transpose(0, 1), state)
            y = y.transpose(0, 1)
        else:
            y, last = self.rnn(x, state)
        h, c = last if isinstance(last, tuple) else (last, None)
        loss = self.objective(y, h, c, lengths)
        return y, self.other.square().sum() if loss is None else loss + 0 * self.other.sum()


def spaced(count, wanted=LOOKED_AT):
    return list(range(count)) if count <= wanted else [round(k * (count - 1) / (wanted - 1)) for k in range(wanted)]


def trained(case, number):
    """Train two steps; give what the second said of the module, and the truth about it."""
    torch.manual_seed(number)
    net = Net(case).to(case.dtype)
    for weight in (
        net.rnn.parameters()
    ):  # torch's default is small, and everything would be nearly linear; without a bound, it must be
        nn.init.normal_(weight, std=0.35 if case.mode == "RNN_RELU" else 0.6)
    if case.form in ("packed", "shuffled"):
        lengths = [case.steps, *(int(n) for n in torch.randint(1, case.steps + 1, (case.batch - 1,)))]
        lengths = (
            sorted(lengths, reverse=True)
            if case.form == "packed"
            else [lengths[k] for k in torch.randperm(case.batch).tolist()]
        )
    else:
        lengths = [case.steps] * case.batch
    x = torch.randn(case.steps, case.batch, INPUTS, dtype=case.dtype)
    state = None
    if case.state:
        number_of = case.layers * (1 + case.bidirectional)
        h0 = torch.randn(number_of, case.batch, PROJECTED if case.projected else HIDDEN, dtype=case.dtype)
        state = (h0, torch.randn(number_of, case.batch, HIDDEN, dtype=case.dtype)) if case.mode == "LSTM" else h0
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    reports = []
    with gradwatch.watch(net, optimizer, every_n_steps=1, probe_every_n_steps=1, sinks=[reports.append], detectors=[]):
        for k in range(2):
            if k == 1:
                before = torch.get_rng_state()
                truth = truth_of(net, x, lengths, state, before)
                torch.set_rng_state(before)
            optimizer.zero_grad()
            y, loss = net(x, lengths, state)
            loss.backward()
            optimizer.step()
    # What dropout kept, and all else, is what the reference went through.
    torch.testing.assert_close(y.double(), truth.y, rtol=LIMIT[case.dtype], atol=LIMIT[case.dtype])
    assert reports[0].snapshot.sequences is None
    return reports[1].snapshot.sequences, truth


def truth_of(net, x, lengths, state, random_state):
    case = net.case
    directions = 1 + case.bidirectional
    width = (PROJECTED if case.projected else HIDDEN) * directions
    masks = []
    torch.set_rng_state(random_state)
    packed = case.form in ("packed", "shuffled")
    if packed:
        whole = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False)
    for _ in range((case.layers - 1) * (case.dropout > 0)):
        if packed:  # dropout acts on what is packed
            data = functional.dropout(torch.ones(len(whole.data), width, dtype=case.dtype), case.dropout)
            mask, _ = pad_packed_sequence(
                PackedSequence(data, whole.batch_sizes, whole.sorted_indices, whole.unsorted_indices)
            )
        else:
            mask = functional.dropout(torch.ones(case.steps, case.batch, width, dtype=case.dtype), case.dropout)
        masks.append(mask.double())
    exact = x.double().requires_grad_()
    h0, c0 = (
        (s.double() for s in state) if isinstance(state, tuple) else (None if state is None else state.double(), None)
    )
    y, h, c, tracks = unrolled(net.rnn, exact, lengths, h0, c0, masks)
    order = whole.sorted_indices.tolist() if packed else list(range(case.batch))
    rows = [order[k] for k in spaced(case.batch)]
    return Truth(y, tracks, exact, lengths, rows, net.objective(y, h, c, lengths))


def check(case, number):
    """Compare every series of one configuration with the truth; give the largest relative error of each."""
    sequences, truth = trained(case, number)
    found = {s.part: s for s in sequences}
    assert set(found) == set(truth.series), case
    assert {s.module for s in sequences} == {"rnn"}
    worst = {}
    for part, series in truth.series.items():
        stats = found[part]
        assert (stats.length, stats.rows, stats.scaled) == (case.steps, min(case.batch, LOOKED_AT), False), case
        for name in SERIES:
            values = getattr(stats, name)
            assert (values is None) == (name not in series), (case, part, name, stats.note)
            if values is not None:
                worst[name] = max(worst.get(name, 0.0), worst_error(values, series[name]))
    notes = found[""].note or ""
    assert ("no gradient reached it" in notes) == (not truth.reached), (case, notes)
    assert ("carried in is detached" in notes) == case.state, (case, notes)
    limit = LIMIT[case.dtype]
    assert found[""].replay_residual is not None, case
    assert found[""].replay_residual <= limit, case
    assert (found[""].adjoint_residual is not None) == truth.reached, case
    assert not truth.reached or found[""].adjoint_residual <= limit, case
    known = horizon_of(truth.series[""]["lag_gain"])
    assert (found[""].horizon, found[""].censored) == (known.timesteps, known.censored), case
    wrong = {name: error for name, error in worst.items() if not error <= limit}
    assert not wrong, (case, number, wrong)
    return worst


def grid():
    """Every combination; the lengths of sequences and batches go around."""
    sizes = itertools.cycle(itertools.product((1, 4, 6, 7), (1, 3, 5, 8, 11)))
    yes_no = (False, True)
    options = itertools.product(
        ("LSTM", "GRU", "RNN_TANH", "RNN_RELU"), (1, 2), yes_no, yes_no, yes_no, yes_no, (0.0, 0.4),
        ("time-first", "batch-first", "unbatched", "packed", "shuffled"),
        ("all", "last", "h_n", "c_n", "both", "projection", "nothing"), LIMIT,
    )  # fmt: skip
    for mode, layers, bidirectional, bias, projected, state, dropout, form, loss, dtype in options:
        if (mode != "LSTM" and (projected or loss == "c_n")) or (layers == 1 and dropout):
            continue
        steps, batch = next(sizes)
        yield Case(
            mode,
            layers,
            bidirectional,
            bias,
            projected,
            state,
            dropout,
            form,
            loss,
            dtype,
            steps,
            1 if form == "unbatched" else batch,
        )


pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


@pytest.mark.parametrize("part", range(8))
def test_every_series_is_that_of_the_unrolled_reference(part):
    sample = random.Random(0).sample(list(enumerate(grid())), 240)
    for number, case in sample[part::8]:
        check(case, number)


@pytest.mark.slow
def test_every_series_is_that_of_the_unrolled_reference_over_the_whole_grid():
    worst, count = {}, 0
    for number, case in enumerate(grid()):
        for name, error in check(case, number).items():
            worst[case.dtype, name] = max(worst.get((case.dtype, name), 0.0), error)
        count += 1
    assert count == 7680
    assert {(dtype, name) for dtype in LIMIT for name in SERIES} == set(worst)


@pytest.mark.parametrize("mode", ["LSTM", "GRU", "RNN_TANH"])
@pytest.mark.parametrize("how", ["autocast", "bfloat16"])
@pytest.mark.parametrize("form", ["batch-first", "shuffled"])
def test_bfloat16_is_a_few_percent_off_and_not_more(mode, how, form):
    case = Case(mode, 2, True, True, False, False, 0.4, form, "projection", torch.float32, 7, 8)
    torch.manual_seed(5)
    net = Net(case)
    if how == "bfloat16":
        net = net.to(torch.bfloat16)
    lengths = [7] * 8 if form == "batch-first" else [3, 7, 1, 7, 5, 2, 6, 4]
    x = torch.randn(7, 8, INPUTS, dtype=net.other.dtype)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    reports = []
    with gradwatch.watch(net, optimizer, every_n_steps=1, probe_every_n_steps=1, sinks=[reports.append], detectors=[]):
        for _ in range(2):
            optimizer.zero_grad()
            before = torch.get_rng_state()
            truth = truth_of(net, x, lengths, None, before)
            torch.set_rng_state(before)
            with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
                _, loss = net(x, lengths, None)
            loss.backward()
            optimizer.step()
    found = {s.part: s for s in reports[1].snapshot.sequences}
    assert set(found) == set(truth.series), found[""].note
    for part, series in truth.series.items():
        for name, values in series.items():
            if name != "grad_hidden_direct":  # the readout's own, in bfloat16
                assert getattr(found[part], name) == pytest.approx(values, rel=0.08, abs=0.01 * max(values)), (
                    part,
                    name,
                )
    assert found[""].scaled is False


# --- closed forms: x = 0 keeps a tanh network at the origin, where it is linear ---


def orthogonal(size, generator):
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]


@pytest.fixture(params=[torch.float64, torch.float32], ids=["float64", "float32"])
def dtype(request):
    return request.param


def seen(model, run, **options):
    """Train two steps with `run(model)`, which gives a loss; give the sequences of the second by module and part."""
    reports = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with gradwatch.watch(
        model, optimizer, every_n_steps=1, probe_every_n_steps=1, sinks=[reports.append], detectors=[], **options
    ):
        for _ in range(2):
            optimizer.zero_grad()
            run(model).backward()
            optimizer.step()
    return {(s.module, s.part): s for s in reports[1].snapshot.sequences}


def close(dtype):
    return {"rel": 1e-10 if dtype is torch.float64 else 1e-4, "abs": 0}


def power(rate, steps=64):
    """rate^lag, the oldest timestep first."""
    return [rate**lag for lag in reversed(range(steps))]


def recurrent(module, dtype, **weights):
    """Set all weights of a recurrent module to zero, but those given."""
    module = module.to(dtype)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(weights[name]) if name in weights else parameter.zero_()
    return module


@pytest.mark.parametrize(("rho", "horizon"), [(0.5, 10), (0.8, 31), (0.9, None), (1.0, None), (1.05, None)])
def test_a_linear_network_forgets_by_its_spectral_radius(rho, horizon, dtype):
    generator = torch.Generator().manual_seed(3)
    rnn = recurrent(
        nn.RNN(16, 16), dtype, weight_hh_l0=rho * orthogonal(16, generator), weight_ih_l0=orthogonal(16, generator)
    )
    u = torch.randn(5, 16, generator=generator, dtype=torch.float64)
    found = seen(rnn, lambda m: (m(torch.zeros(64, 5, 16, dtype=dtype))[0][-1] * u.to(dtype)).sum())
    whole, layer = found["", ""], found["", "l0"]
    size = float(u.norm())
    assert layer.grad_hidden == pytest.approx([size * p for p in power(rho)], **close(dtype))
    assert whole.grad_input == pytest.approx([size * p for p in power(rho)], **close(dtype))
    assert layer.grad_hidden_direct[:-1] == (0.0,) * 63
    assert layer.carry_ratio == pytest.approx([rho] * 63, **close(dtype))
    assert whole.lag_gain == pytest.approx([whole.lag_gain[0] * p for p in reversed(power(rho))], **close(dtype))
    assert layer.lag_gain_hidden == pytest.approx(whole.lag_gain, **close(dtype))
    assert whole.horizon == (horizon or 64)
    assert whole.censored == (horizon is None)
    if rho < 1:
        assert whole.decay_rate == pytest.approx(rho, rel=1e-10 if dtype is torch.float64 else 1e-6)
        assert whole.half_life == pytest.approx(math.log(0.5) / math.log(rho), rel=1e-5)
    else:  # the largest gain is at the oldest timestep, or anywhere
        assert whole.decay_rate is None or whole.decay_rate == pytest.approx(1, rel=1e-6)
        assert whole.half_life is None or whole.half_life > 1e5


def test_a_network_of_active_relus_with_an_identity_remembers_all(dtype):
    rnn = recurrent(nn.RNN(4, 4, nonlinearity="relu"), dtype, weight_hh_l0=torch.eye(4), weight_ih_l0=torch.eye(4))
    u = torch.randn(3, 4, dtype=dtype)
    found = seen(rnn, lambda m: (m(torch.rand(64, 3, 4, dtype=dtype) + 0.1)[0][-1] * u).sum())
    flat = [float(u.double().norm())] * 64
    assert found["", "l0"].grad_hidden == pytest.approx(flat, rel=1e-12)
    assert found["", ""].grad_input == pytest.approx(flat, rel=1e-12)
    assert len(set(found["", ""].lag_gain)) == 1
    assert (found["", ""].horizon, found["", ""].censored) == (64, True)


@pytest.mark.parametrize("bias", [-1.0, 0.0, 1.0, 3.0, 5.0])
def test_an_lstm_without_recurrence_forgets_by_its_forget_gate_and_its_hidden_gradient_is_blind(bias, dtype):
    hidden, inputs = 6, 4
    keep = 1 / (1 + math.exp(-bias))
    into = torch.zeros(4 * hidden, inputs)
    into[2 * hidden : 3 * hidden] = torch.randn(hidden, inputs)
    biases = torch.zeros(4 * hidden)
    biases[hidden : 2 * hidden] = bias
    lstm = recurrent(nn.LSTM(inputs, hidden), dtype, weight_ih_l0=into, bias_ih_l0=biases)
    u = torch.randn(3, hidden, dtype=dtype)
    found = seen(lstm, lambda m: (m(torch.zeros(64, 3, inputs, dtype=dtype))[1][1][0] * u).sum())
    whole, layer = found["", ""], found["", "l0"]
    size = float(u.double().norm())
    assert layer.grad_cell == pytest.approx([size * p for p in power(keep)], **close(dtype))
    assert whole.grad_input == pytest.approx([whole.grad_input[-1] * p for p in power(keep)], **close(dtype))
    assert whole.grad_input[-1] == pytest.approx(
        0.5 * float((u.double() @ into[2 * hidden : 3 * hidden].double()).norm()), rel=1e-5
    )  # i g W_g, i = 1/2
    assert layer.grad_hidden == layer.grad_hidden_direct == (0.0,) * 64
    assert layer.lag_gain_cell == pytest.approx(
        [layer.lag_gain_cell[0] * p for p in reversed(power(keep))], **close(dtype)
    )
    assert layer.lag_gain_hidden[1:] == (0.0,) * 63
    assert whole.decay_rate == pytest.approx(keep, rel=1e-6)
    assert whole.horizon == min(math.ceil(math.log(1e-3) / math.log(keep)), 64)


@pytest.mark.parametrize("bias", [-1.0, 0.0, 2.0, 4.0])
def test_a_gru_without_recurrence_forgets_by_its_update_gate(bias, dtype):
    hidden, inputs = 5, 5
    keep = 1 / (1 + math.exp(-bias))
    biases, into = torch.zeros(3 * hidden), torch.zeros(3 * hidden, inputs)
    biases[hidden : 2 * hidden] = bias
    into[2 * hidden :] = torch.eye(hidden)
    gru = recurrent(nn.GRU(inputs, hidden, batch_first=True), dtype, bias_hh_l0=biases, weight_ih_l0=into)
    u = torch.randn(3, hidden, dtype=dtype)
    found = seen(gru, lambda m: (m(torch.zeros(3, 64, inputs, dtype=dtype))[1][0] * u).sum())
    assert found["", "l0"].grad_hidden == pytest.approx(
        [float(u.double().norm()) * p for p in power(keep)], **close(dtype)
    )
    assert found["", ""].grad_input == pytest.approx(
        [(1 - keep) * g for g in found["", "l0"].grad_hidden], **close(dtype)
    )
    assert found["", ""].decay_rate == pytest.approx(keep, rel=1e-6)
    assert found["", ""].horizon == min(math.ceil(math.log(1e-3) / math.log(keep)), 64)


def test_a_scalar_network_at_its_fixed_point_forgets_by_its_slope_there(dtype):
    w, bias, h = 0.9, 0.3, 0.0
    for _ in range(10_000):
        h = math.tanh(w * h + bias)
    rnn = recurrent(
        nn.RNN(1, 1),
        dtype,
        weight_hh_l0=torch.tensor([[w]]),
        bias_ih_l0=torch.tensor([bias]),
        weight_ih_l0=torch.ones(1, 1),
    )
    start = torch.full((1, 2, 1), h, dtype=dtype)
    found = seen(rnn, lambda m: m(torch.zeros(64, 2, 1, dtype=dtype), start)[0][-1].sum())
    w, bias = (
        float(torch.tensor(v, dtype=torch.float32)) for v in (w, bias)
    )  # as they are kept; the fixed point moves by 1e-8
    rate = w * (1 - h * h)
    limit = {"rel": 1e-4 if dtype is torch.float32 else 1e-5, "abs": 0}
    assert found["", "l0"].grad_hidden == pytest.approx([math.sqrt(2) * p for p in power(rate)], **limit)
    assert found["", ""].decay_rate == pytest.approx(rate, rel=1e-6)


def test_a_loss_at_every_timestep_hides_vanishing_from_the_gradient_but_not_from_the_gain(dtype):
    rho, steps, batch, hidden = 0.7, 50, 4, 3
    rnn = recurrent(
        nn.RNN(hidden, hidden),
        dtype,
        weight_hh_l0=rho * torch.eye(hidden, dtype=torch.float64),
        weight_ih_l0=torch.eye(hidden),
    )
    u = torch.randn(hidden, dtype=dtype)
    found = seen(rnn, lambda m: (m(torch.zeros(steps, batch, hidden, dtype=dtype))[0] @ u).mean())
    layer = found["", "l0"]
    law = [
        float(u.double().norm()) * (1 - rho ** (lag + 1)) / ((1 - rho) * steps * math.sqrt(batch))
        for lag in reversed(range(steps))
    ]
    assert layer.grad_hidden == pytest.approx(law, **close(dtype))
    assert layer.grad_hidden[0] > layer.grad_hidden[-1]
    assert layer.grad_hidden_direct == pytest.approx(
        [float(u.double().norm()) / (steps * math.sqrt(batch))] * steps, **close(dtype)
    )
    assert found["", ""].decay_rate == pytest.approx(rho, rel=1e-6)
    assert found["", ""].horizon == 20  # 0.7^20 = 8e-4


class Causal(nn.Module):
    """Convolutions over the past, dilated 1, 2, 4: it sees 1 + 2 (1 + 2 + 4) = 15 timesteps."""

    def __init__(self, channels):
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv1d(channels, channels, 3, dilation=d) for d in (1, 2, 4))

    def forward(self, x):
        for layer in self.layers:
            x = layer(functional.pad(x, (2 * layer.dilation[0], 0))).tanh()
        return x


class Pooled(nn.Module):
    """A sequence module and its readout."""

    def __init__(self, body, readout):
        super().__init__()
        self.body, self.readout = body, readout

    def forward(self, x):
        return self.readout(self.body(x))


def test_a_convolution_over_time_sees_exactly_its_receptive_field(dtype):
    model = Pooled(Causal(3), lambda y: y[..., -1].sin().sum()).to(dtype)
    x = torch.randn(4, 3, 40, dtype=dtype)
    found = seen(model, lambda m: m(x.requires_grad_()), timesteps={"body": 2})
    gradients = found["body", ""].grad_input
    assert gradients[:-15] == (0.0,) * 25
    assert all(g > 0 for g in gradients[-15:])
    (truth,) = torch.autograd.grad(model(x), x)
    assert gradients == pytest.approx(truth.double().pow(2).sum((0, 1)).sqrt().tolist(), rel=1e-6)


class Attention(nn.Module):
    """Self-attention that gives every timestep it may look at the same weight."""

    def __init__(self, width, *, causal):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 1, batch_first=True)
        self.causal = causal
        with torch.no_grad():
            self.attention.in_proj_weight[: 2 * width] = 0

    def forward(self, x):
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype) if self.causal else None
        return self.attention(x, x, x, attn_mask=mask, need_weights=False)[0]


def test_attention_that_ignores_content_sees_all_timesteps_alike(dtype):
    model = Pooled(Attention(4, causal=False), lambda y: y[:, -1].sin().sum()).to(dtype)
    found = seen(model, lambda m: m(torch.randn(3, 20, 4, dtype=dtype).requires_grad_()), timesteps={"body": 1})
    assert found["body", ""].grad_input == pytest.approx([found["body", ""].grad_input[0]] * 20, rel=1e-5)


def test_causal_attention_gets_nothing_from_after_its_query(dtype):
    model = Pooled(Attention(4, causal=True), lambda y: y[:, 12].sin().sum()).to(dtype)
    found = seen(model, lambda m: m(torch.randn(3, 20, 4, dtype=dtype).requires_grad_()), timesteps={"body": 1})
    gradients = found["body", ""].grad_input
    assert gradients[:13] == pytest.approx([gradients[0]] * 13, rel=1e-5)
    assert gradients[0] > 0
    assert gradients[13:] == (0.0,) * 7


@pytest.mark.parametrize("rho", [0.7, 0.95])
def test_a_random_network_comes_to_forget_by_its_spectral_radius(rho):
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(100, 100, generator=generator, dtype=torch.float64)
    w *= rho / float(torch.linalg.eigvals(w).abs().max())
    rnn = recurrent(nn.RNN(100, 100), torch.float64, weight_hh_l0=w, weight_ih_l0=torch.eye(100))
    found = seen(rnn, lambda m: m(torch.zeros(400, 8, 100, dtype=torch.float64))[0][-1].sum())
    gains = found["", ""].lag_gain
    assert (gains[399] / gains[60]) ** (1 / 339) == pytest.approx(
        rho, rel=2e-3
    )  # after what is left of the other eigenvalues


@pytest.mark.parametrize(("amplitude", "low", "high"), [(0.01, 0.995, 1.001), (0.1, 0.85, 0.99), (1.0, 0.3, 0.7)])
def test_saturation_makes_a_tanh_network_forget_faster_than_its_spectral_radius(amplitude, low, high):
    # Bengio (1994), Pascanu (2013): the spectral radius rules while the network is nearly linear, and not beyond.
    generator = torch.Generator().manual_seed(0)
    rho = 0.9
    rnn = recurrent(
        nn.RNN(64, 64),
        torch.float64,
        weight_hh_l0=rho * orthogonal(64, generator),
        weight_ih_l0=torch.randn(64, 64, generator=generator) / 4,
    )
    x = amplitude * torch.randn(200, 8, 64, generator=generator, dtype=torch.float64)
    found = seen(rnn, lambda m: m(x)[0][-1].sum())
    gains = found["", "l0"].lag_gain_hidden
    rate = (gains[60] / gains[0]) ** (1 / 60)
    assert low < rate / rho < high
    assert all(
        gain <= gains[0] * rho**lag * (1 + 1e-9) for lag, gain in enumerate(gains)
    )  # the largest singular value bounds it


# --- how well eight random cotangents stand for the whole Jacobian ---


def stock(name, inputs, generator):
    module = {"RNN default": nn.RNN, "RNN orthogonal": nn.RNN, "LSTM default": nn.LSTM, "GRU default": nn.GRU}[name](
        inputs, 64
    )
    if name == "RNN orthogonal":
        with torch.no_grad():
            module.weight_hh_l0.copy_(0.95 * orthogonal(64, generator))
    return module


def exact_gain(module, x):
    """||d h_T / d x_{T-lag}||_F / sqrt(R), root mean square over the rows."""
    size, batch = module.hidden_size, x.shape[1]
    x = x.repeat(1, size, 1).requires_grad_()  # each row once for each unit
    last = module(x)[0][-1]
    unit = torch.eye(size, dtype=x.dtype).repeat_interleave(batch, 0)
    squares = torch.autograd.grad(last, x, unit)[0].double().square().sum(-1)
    return (squares.sum(1).flip(0) / (batch * size)).sqrt().tolist()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["RNN orthogonal", "RNN default", "LSTM default", "GRU default"])
@pytest.mark.parametrize("inputs", [32, 4])
def test_the_memory_is_estimated_well_enough(name, inputs):
    trials, generator = 40, torch.Generator().manual_seed(11)
    errors = {"decay_rate": [], "half_life": [], "horizon": []}
    for trial in range(trials):
        torch.manual_seed(trial)
        module = stock(name, inputs, generator)
        x = torch.randn(60, LOOKED_AT, inputs, generator=generator)
        whole = seen(module, lambda m, x=x: m(x)[0][-1].square().sum())["", ""]
        exact = horizon_of(exact_gain(module, x))
        errors["decay_rate"].append(abs(whole.decay_rate / exact.decay_rate - 1))
        errors["half_life"].append(abs(whole.half_life / exact.half_life - 1))
        errors["horizon"].append(abs(whole.horizon - exact.timesteps))
    worst = {what: sorted(values)[math.ceil(0.95 * trials) - 1] for what, values in errors.items()}
    assert worst["decay_rate"] <= 0.02, worst
    assert worst["half_life"] <= 0.05, worst
    assert worst["horizon"] <= 1, worst


# --- working it out ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_working_it_out_twice_gives_the_same_twice_and_leaves_the_records_as_they_are(dtype):
    torch.manual_seed(0)
    cell, x = nn.LSTMCell(INPUTS, HIDDEN, dtype=dtype), torch.randn(6, 5, INPUTS, dtype=dtype, requires_grad=True)
    recorder = Recorder("auto")
    recorder.arm({"cell": cell}, compiled=False)

    def before(module, args, kwargs):
        return recorder.entered(module, args) or args, kwargs

    with listening([cell], before, recorder.left):
        state = None
        for now in x:
            state = cell(now, state)
        (state[0].sin().sum() + state[1].square().sum()).backward()
    (module,) = recorder.targets.values()
    records = [call.record for call in module.calls]
    assert all(record.c_through_h for record in records)  # what comes through h is taken from what arrived at c
    arrived = [{name: gradient.clone() for name, gradient in record.gradients.items()} for record in records]
    assert all({"h", "c"} <= gradients.keys() for gradients in arrived[:-1])

    once, again = (gradients_through_time(records, None, torch.Generator().manual_seed(0)) for _ in range(2))

    for record, before_it in zip(records, arrived, strict=True):
        torch.testing.assert_close(record.gradients, before_it, rtol=0, atol=0)
    assert [s.part for s in once[0]] == [s.part for s in again[0]] == ["", "l0"]
    for one, other in zip(once[0], again[0], strict=True):
        torch.testing.assert_close(one.values, other.values, rtol=0, atol=0)
    torch.testing.assert_close(once[1], again[1], rtol=0, atol=0)
    assert float(once[0][0].values["adjoint_residual"]) < LIMIT[dtype]
