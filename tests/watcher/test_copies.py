"""A watcher that is copied or pickled, perhaps with what holds it, is its last report there, and a watcher here."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from loops import Watched, batches, loss_of
from models import tall


class Learner:
    """It keeps its watcher, and is exported whole, as those of fastai and skorch are."""

    def __init__(self):
        self.model = tall()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.watched = Watched(self.model, self.optimizer, probe_every_n_steps=2)
        self.watcher = self.watched.watcher

    def train(self, steps):
        for batch in batches(steps):
            self.optimizer.zero_grad()
            loss_of(self.model, batch).backward()
            self.optimizer.step()

    def __getstate__(self):
        return {"model": self.model, "watcher": self.watcher}


def saved(learner):
    stream = io.BytesIO()
    torch.save(learner, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o)), saved])
@pytest.mark.parametrize("closed", [False, True])
def test_a_watcher_is_copied_as_its_last_report_and_watches_on(copied, closed):
    learner = Learner()
    learner.train(3)
    if closed:
        learner.watcher.close()
    other = copied(learner)
    assert other.watcher == learner.watcher.report
    assert other.watcher.snapshot.step == 2
    learner.train(1)
    assert len(learner.watched.snapshots) == (3 if closed else 4)
    assert other.watcher.snapshot.step == 2
