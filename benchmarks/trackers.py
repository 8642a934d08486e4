"""The sinks of docs/loops.md for wandb, mlflow and trackio, run with the real libraries; what was logged is read back.

python -m benchmarks.trackers    # those that are installed (pip install wandb mlflow-skinny trackio), all offline
"""

from __future__ import annotations

import importlib.util
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import gradwatch
from benchmarks.command import parsed, parser

PAGE = Path(__file__).parent.parent / "docs" / "loops.md"
STEPS = 5


def logged(tracker: str) -> tuple[dict[str, Any], list[gradwatch.Report]]:
    """Run the lines of the page and train; return their names, and the reports."""
    code = re.search(
        rf"^```py\n(import {tracker}\n.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    assert code is not None, f"there is no such snippet for {tracker}"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    reports: list[gradwatch.Report] = []
    names = {"gradwatch": gradwatch, "model": model, "optimizer": optimizer, "reports": reports}
    exec(code[1], names)
    with gradwatch.watch(model, optimizer, sinks=[names[f"to_{tracker}"], reports.append]):
        for _ in range(STEPS):
            optimizer.zero_grad()
            model(torch.randn(8, 4)).square().mean().backward()
            optimizer.step()
    return names, reports


def of_wandb(names: dict[str, Any], tag: str) -> float:
    """Return the newest number of a tag."""
    names["run"].log({}, commit=True)  # the last step is written with the next, or at the end
    return float(names["run"].summary[tag])


def of_mlflow(names: dict[str, Any], tag: str) -> float:
    """Return the newest number of a tag, as the server would give it."""
    history = names["mlflow"].MlflowClient().get_metric_history(names["run"].info.run_id, tag)
    assert [metric.step for metric in history] == list(range(STEPS))
    return float(history[-1].value)


def of_trackio(names: dict[str, Any], tag: str) -> float:
    """Return the newest number of a tag, from its database."""
    from trackio.sqlite_storage import SQLiteStorage  # type: ignore[import-not-found]

    names["trackio"].finish()
    rows = SQLiteStorage.get_logs("market", names["run"].name)
    assert [row["step"] for row in rows] == list(range(STEPS))
    return float(rows[-1][tag])


READ: dict[str, Callable[[dict[str, Any], str], float]] = {
    "wandb": of_wandb,
    "mlflow": of_mlflow,
    "trackio": of_trackio,
}


def main() -> None:
    """Try those that are there."""
    parsed(parser(__doc__))
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        os.environ |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "TRACKIO_DIR": folder}
        os.environ |= {"MLFLOW_TRACKING_URI": f"file:{folder}/mlruns", "MLFLOW_ALLOW_FILE_STORE": "true"}
        for tracker, read in READ.items():
            if importlib.util.find_spec(tracker) is None:
                print(f"{tracker}: not installed")
                continue
            names, reports = logged(tracker)
            expected = gradwatch.scalars(reports[-1])["gradwatch_norm/0"]
            found = read(names, "gradwatch_norm/0")
            assert abs(found - expected) < 1e-6, (found, expected)
            count = len(gradwatch.scalars(reports[-1]))
            print(f"{tracker} {names[tracker].__version__}: {count} numbers a step, read back")
        os.chdir(PAGE.parent)


if __name__ == "__main__":
    main()
