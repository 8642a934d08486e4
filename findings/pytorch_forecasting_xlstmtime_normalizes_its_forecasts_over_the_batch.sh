#!/usr/bin/env bash
# pytorch-forecasting 1.8.0: xLSTMTime ends with an instance norm over its forecasts, along the rows of the batch. With the
# sLSTM (its default) the forecasts of any batch have mean 0 and deviation 1, in eval mode too: the same series gets another
# forecast in a batch of 4 than in one of 8, and moves when another series does. With the mLSTM the norm goes over
# one value, and every forecast is 0.
#
# Fails if that is otherwise.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 pytorch-forecasting==1.8.0
cat > "$work/forecasts.py" <<'PY'
import logging
import sys
import warnings

import torch

warnings.simplefilter("ignore")
logging.disable(logging.WARNING)
import pytorch_forecasting  # noqa: E402
from pytorch_forecasting.models.xlstm import xLSTMTime  # noqa: E402


def forecasts(kind, series):
    """Return the forecasts of a network as it is made, in eval mode."""
    torch.manual_seed(0)
    model = xLSTMTime(input_size=2, hidden_size=16, output_size=1, xlstm_type=kind).eval()
    with torch.no_grad():
        return model({"encoder_cont": series})["prediction"].flatten()


torch.manual_seed(1)
series = torch.randn(8, 30, 2)
others = torch.cat([series[:-1], series[-1:] + 5])
print(f"pytorch-forecasting {pytorch_forecasting.__version__}, torch {torch.__version__}, 8 series")
whole, half, moved = (forecasts("slstm", x) for x in (series, series[:4], others))
print(f"sLSTM: mean {whole.mean():.3f}, deviation {whole.std(unbiased=False):.3f}")
print(f"the first series' forecast: {whole[0]:.3f} among 8, {half[0]:.3f} among 4, {moved[0]:.3f} once the last is another")
zeros = forecasts("mlstm", series)
print(f"mLSTM: largest forecast {zeros.abs().max():.1e}")
same = abs(whole.mean()) < 1e-3 and abs(whole.std(unbiased=False) - 1) < 0.01
hangs = abs(whole[0] - half[0]) > 0.01 and abs(whole[0] - moved[0]) > 0.001
sys.exit(not (same and hangs and zeros.abs().max() < 1e-3))
PY
"$work/venv/bin/python" "$work/forecasts.py"
