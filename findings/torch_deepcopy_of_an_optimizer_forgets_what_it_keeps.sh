#!/usr/bin/env bash
# torch 2.13.0: `copy.deepcopy` of an optimizer keeps its groups, state and defaults, and nothing else. Attributes of a
# subclass are gone without a word, and so are its step hooks: a copy of a SAM-like optimizer raises AttributeError at its
# first step, one whose attribute has a default on the class trains by another rule than the original, and weights that a
# post-hook clamps are not clamped. `pickle` does the same. So whoever trains a copy beside the original (a search, a
# look-ahead, a trial of another learning rate) compares two different trainings.
#
# Fails if that is otherwise.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.3.5
cat > "$work/optimizers.py" <<'PY'
import copy
import pickle
import sys

import torch


class Scaled(torch.optim.SGD):
    """Multiplies each gradient by a factor of its own; the class has a default for it."""

    factor = 1.0

    def __init__(self, parameters, lr, factor):
        super().__init__(parameters, lr)
        self.factor = factor

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.grad.mul_(self.factor)
        return super().step(closure)


class Nested(torch.optim.SGD):
    """Keeps another optimizer."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, lr)
        self.inner = torch.optim.SGD(self.param_groups, lr)

    def step(self, closure=None):
        return self.inner.step(closure)


def moved(weight, optimizer):
    """Return where a weight of 1 with a gradient of 1 is after a step."""
    weight.grad = torch.ones(1)
    optimizer.step()
    return round(float(weight.detach()), 3)


def pair(make):
    weight = torch.ones(1, requires_grad=True)
    return weight, make([weight])


found = {}
weight, scaled = pair(lambda p: Scaled(p, 0.1, 5.0))
twin_weight, twin = copy.deepcopy((weight, scaled))
_, stored = pickle.loads(pickle.dumps((weight, scaled)))
found["factor 5, its copy, and through pickle"] = (scaled.factor, twin.factor, stored.factor)
found["after a step: original, copy"] = (moved(weight, scaled), moved(twin_weight, twin))
weight, nested = pair(lambda p: Nested(p, 0.1))
twin_weight, twin = copy.deepcopy((weight, nested))
try:
    moved(twin_weight, twin)
    said = "a step"
except AttributeError as error:
    said = str(error)
found["a copy of one that keeps another"] = said
weight, hooked = pair(lambda p: torch.optim.SGD(p, 5.0))
hooked.register_step_post_hook(lambda o, *_: [p.data.clamp_(min=0) for g in o.param_groups for p in g["params"]])
twin_weight, twin = copy.deepcopy((weight, hooked))
found["clamped by a hook: original, copy"] = (moved(weight, hooked), moved(twin_weight, twin))
print(f"torch {torch.__version__}")
for what, is_so in found.items():
    print(f"{what}: {is_so}")
sys.exit(
    found
    != {
        "factor 5, its copy, and through pickle": (5.0, 1.0, 1.0),
        "after a step: original, copy": (0.5, 0.9),
        "a copy of one that keeps another": "'Nested' object has no attribute 'inner'",
        "clamped by a hook: original, copy": (0.0, -4.0),
    }
)
PY
"$work/venv/bin/python" "$work/optimizers.py"
