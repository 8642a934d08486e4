#!/usr/bin/env bash
# neuralforecast 3.3.0: with its defaults TiDE forecasts by a linear map of the past alone. Its last block ends in a
# LayerNorm over the outputs of one time step, of which there is one: that gives its shift whatever it takes. So the
# encoder, the decoders and all exogenous features have no effect on the forecast; only the linear skip has. Their true
# gradient is 0, and what float32 leaves of it is rounding, of which Adam makes steps of ordinary size: the weights move.
#
# What is seen: the forecasts stay exactly the same when every weight but those of the skip and of that LayerNorm is drawn
# anew, and when the exogenous features are; in float64 no gradient reaches those weights. With layernorm=False they change.
# Fails if that is otherwise.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 neuralforecast==3.3.0
cat > "$work/forecasts.py" <<'PY'
import logging
import sys
import warnings

import torch

warnings.simplefilter("ignore")
logging.disable(logging.WARNING)
import neuralforecast  # noqa: E402
from neuralforecast.models import TiDE  # noqa: E402


def tried(**options):
    """Return how far forecasts change with other weights, with other features, and the largest gradient before the end."""
    torch.manual_seed(0)
    model = TiDE(h=12, input_size=24, hist_exog_list=["price"], max_steps=1, dropout=0.0, **options).double().eval()
    past, price = (torch.randn(16, 24, 1, dtype=torch.float64) for _ in range(2))

    def forecasts(features):
        return model({"insample_y": past, "hist_exog": features, "futr_exog": None, "stat_exog": None})

    before = forecasts(price)
    before.square().sum().backward()
    last = ("global_skip", "temporal_decoder.norm")
    inner = [p for name, p in model.named_parameters() if not name.startswith(last)]
    gradient = max(float(p.grad.abs().max()) for p in inner if p.grad is not None)
    with torch.no_grad():
        features = float((forecasts(torch.randn_like(price)) - before).abs().max())
        for p in inner:
            p.normal_()
        return float((forecasts(price) - before).abs().max()), features, gradient


default, without = tried(), tried(layernorm=False)
print(f"neuralforecast {neuralforecast.__version__}, torch {torch.__version__}, TiDE. Forecasts change by this much with")
print(f"other weights, with other features, and the largest gradient that reaches them: {default}; layernorm=False: {without}")
sys.exit(not (max(default) == 0 and min(without) > 0))
PY
"$work/venv/bin/python" "$work/forecasts.py"
