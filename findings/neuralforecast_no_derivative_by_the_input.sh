#!/usr/bin/env bash
# neuralforecast 3.3.0: iTransformer, SOFTS and TimeXer, with their defaults, have no derivative by the series that they are
# given. They normalize it in place: the standard deviation is worked out from the centred series, which is then divided by
# it where it stands, so that what autograd has kept for the deviation is overwritten. No training notices, because inputs
# need no gradient there; whoever asks by how much a forecast moves with a value of the past (saliency, integrated
# gradients, adversarial training, a horizon) gets a RuntimeError. DLinear and PatchTST have it.
#
# Fails if that is otherwise.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 neuralforecast==3.3.0
cat > "$work/derivatives.py" <<'PY'
import inspect
import logging
import sys
import warnings

import torch

warnings.simplefilter("ignore")
logging.disable(logging.WARNING)
import neuralforecast  # noqa: E402
from neuralforecast import models  # noqa: E402


def derivative(name):
    """Return whether the forecast can be differentiated by the series, and what torch says."""
    torch.manual_seed(0)
    kind = getattr(models, name)
    several = {"n_series": 3} if "n_series" in inspect.signature(kind).parameters else {}
    model = kind(h=12, input_size=48, max_steps=1, **several)
    past = torch.randn(8, 48, several.get("n_series", 1), requires_grad=True)
    forecast = model({"insample_y": past.clone(), "futr_exog": None, "hist_exog": None, "stat_exog": None})
    try:
        forecast.sum().backward()
    except RuntimeError as error:
        return False, str(error).splitlines()[0][:90]
    return bool(past.grad.abs().sum() > 0), ""


print(f"neuralforecast {neuralforecast.__version__}, torch {torch.__version__}: is there a derivative by the series?")
seen = {name: derivative(name) for name in ("iTransformer", "SOFTS", "TimeXer", "DLinear", "PatchTST")}
for name, said in seen.items():
    print(name, *said)
sys.exit([there for there, _ in seen.values()] != [False, False, False, True, True])
PY
"$work/venv/bin/python" "$work/derivatives.py"
