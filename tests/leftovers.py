"""What gradwatch could leave behind on a model, its optimizers, and the files of a run."""

from __future__ import annotations

import gc
import io
import sys
from pathlib import Path

import gradwatch


def left_behind(module, optimizers, root):
    """Name all that could be left: hooks anywhere, attributes, claimed folders, open files."""
    found = []
    for home in ("torch.nn.modules.module", "torch.optim.optimizer"):
        found += [
            name
            for name, table in vars(sys.modules[home]).items()
            if name.startswith("_global_") and isinstance(table, dict) and table
        ]
    for place in [*module.modules(), *optimizers]:
        found += [
            f"{type(place).__name__}.{name}" for name, table in vars(place).items() if name.endswith("_hooks") and table
        ]
        found += [
            f"{type(place).__name__}.{name}"
            for name, value in vars(place).items()
            if type(value).__module__.startswith("gradwatch") and name != "_trainer"
        ]
        found += ["step"] if "step" in vars(place) and "gradwatch" in getattr(place.step, "__module__", "") else []
    found += [
        name
        for name, p in module.named_parameters()
        if p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None)
    ]
    found += [str(path) for path in gradwatch.sinks.run_directory.held() if Path(root) in path.parents]
    gc.collect()
    for thing in gc.get_objects():
        # By type(), because isinstance() asks objects for their __class__, and some of torch's answer with a warning.
        if type(thing) in (io.TextIOWrapper, io.BufferedWriter) and not thing.closed and str(root) in str(thing.name):
            found.append(f"open: {thing.name}")
    return found
