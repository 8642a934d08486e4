"""Padding that is read in place of data: measured against autograd in float64, and left alone where it is none."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import gradwatch
from gradwatch import GradientHealthError, Severity

LENGTHS = torch.tensor([5, 9, 14, 7, 30, 6, 8, 11])
"""Of rows that are padded to 40 timesteps."""


class Reader(nn.Module):
    """An embedding and a recurrent layer, of which `read` takes what the head is given."""

    def __init__(self, read, kind=nn.LSTM, padding_idx=0):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(20, 6, padding_idx=padding_idx)
        self.rnn, self.head, self.read = kind(6, 12, batch_first=True), nn.Linear(12, 2), read

    def forward(self, ids):
        return self.head(self.read(self.rnn, self.embed(ids)))


def last(rnn, x):
    return rnn(x)[0][:, -1]


def own_last(rnn, x):
    return rnn(x)[0][torch.arange(len(x)), LENGTHS - 1]


def packed(rnn, x):
    return rnn(pack_padded_sequence(x, LENGTHS, batch_first=True, enforce_sorted=False))[1][0][-1]


def mean(rnn, x):
    return rnn(x)[0].mean(1)


def padded(seed=0, *, front=False):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 20, (8, 40), generator=generator)
    ids = ids.masked_fill(torch.arange(40)[None] >= LENGTHS[:, None], 0)
    return ids.flip(1) if front else ids


def found(model, *, steps=25, improves=False, **options):
    """Train on labels that are noise, and give the alerts that are open at the end."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with gradwatch.watch(model, optimizer, on_alert=lambda _: None, **options) as watcher:
        for step in range(steps):
            loss = nn.functional.cross_entropy(model(padded(step)), torch.arange(8) % 2)
            watcher.record(1.0 / (step + 1) if improves else 1.0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return watcher.report.open


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("padding_idx", [0, None])
def test_what_the_data_gets_is_that_of_autograd(kind, padding_idx):
    model = Reader(last, kind, padding_idx)
    reports = []
    ids = padded()
    with gradwatch.watch(model, sinks=[reports.append], on_alert=lambda _: None) as watcher:
        for _ in range(2):  # the first forward pass that is looked at is that of step 1
            model.zero_grad()
            nn.functional.cross_entropy(model(ids), torch.arange(8) % 2).backward()
            watcher.step()
    (stats,) = (s for s in reports[-1].snapshot.sequences if s.part == "")

    twin = Reader(last, kind, padding_idx).double()
    x = twin.embed(ids).detach().requires_grad_()
    nn.functional.cross_entropy(twin.head(last(twin.rnn, x)), torch.arange(8) % 2).backward()
    norms = x.grad.norm(dim=-1)
    shares = [
        (row[:length].max() / row[length:].max()).item() for row, length in zip(norms, LENGTHS.tolist(), strict=True)
    ]

    assert stats.padding == (40 - LENGTHS).median()
    assert stats.grad_data == pytest.approx(torch.tensor(shares).median().item(), rel=1e-3)


@pytest.mark.parametrize("padding_idx", [0, None])
def test_an_output_that_is_taken_at_the_end_of_the_padding_is_one_alert(padding_idx):
    (alert,) = (a for a in found(Reader(last, padding_idx=padding_idx)) if a.severity >= Severity.WARNING)

    assert (alert.finding.code, alert.finding.kind, alert.finding.place) == ("GW306", "vanishing-time", "rnn")
    assert "the last 31 of 40 timesteps are all the same" in alert.message
    assert "pack_padded_sequence" in alert.remedy


@pytest.mark.parametrize("read", [own_last, packed, mean])
def test_an_output_that_reads_the_data_is_left_alone(read):
    assert not [a for a in found(Reader(read)) if a.finding.code == "GW306" or a.severity >= Severity.WARNING]


def test_padding_in_front_is_left_alone():
    class Front(Reader):
        def forward(self, ids):
            return super().forward(ids.flip(1))

    assert not [a for a in found(Front(last)) if a.severity >= Severity.WARNING]


def test_a_blank_end_that_every_row_has_is_no_padding():
    class Blank(Reader):
        def forward(self, ids):
            return super().forward(torch.cat([ids[:, :5].clamp(min=1), ids.new_zeros(8, 35)], 1))

    assert not [a for a in found(Blank(last)) if a.finding.code == "GW306"]


def test_where_the_loss_comes_down_all_the_same_it_is_information():
    (alert,) = (a for a in found(Reader(last), improves=True) if a.finding.code == "GW306")

    assert alert.severity is Severity.INFO


def test_a_horizon_that_lies_within_the_padding_is_none():
    with pytest.raises(GradientHealthError, match="what is read of embed is its padding") as error:
        gradwatch.assert_horizon(Reader(last), padded(), at_least=5, timesteps={"embed": 1})

    assert "pack_padded_sequence" in str(error.value)
    assert gradwatch.assert_horizon(Reader(packed), padded(), at_least=5).padding is None


def test_one_batch_is_enough_to_see_it():
    (alert,) = (a for a in gradwatch.check(Reader(last), padded()).open if a.severity >= Severity.WARNING)

    assert alert.finding.code == "GW306"
