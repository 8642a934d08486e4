"""Loops that several tests run, and a watcher that keeps what it reports."""

from __future__ import annotations

import torch
from truth import norms

import gradwatch


def batches(count, *, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(5, 4, generator=generator).to(dtype), torch.randn(5, 3, generator=generator).to(dtype))
        for _ in range(count)
    ]


def loss_of(model, batch):
    return (model(batch[0]) - batch[1]).square().mean()


def train(model, optimizer, steps, batch=None):
    x = torch.ones(1, 1) if batch is None else batch
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).sum().backward()
        optimizer.step()


class Watched:
    """A watcher with the snapshots it gave."""

    def __init__(self, model, optimizer=None, **options):
        reports = []
        self.reports = reports
        self.watcher = gradwatch.watch(model, optimizer, sinks=[reports.append], **options)

    @property
    def snapshots(self):
        return [r.snapshot for r in self.reports]

    def norms(self):
        return [norms(s) for s in self.snapshots]
