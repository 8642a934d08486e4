"""neuralforecast: its stock LSTM on two sine waves."""

import numpy as np
import pandas as pd
from neuralforecast import NeuralForecast
from neuralforecast.models import LSTM

t = np.arange(200)
table = pd.concat(
    pd.DataFrame({"unique_id": f"wave {period}", "ds": t, "y": np.sin(2 * np.pi * t / period)}) for period in (12, 20)
)
callbacks = []
# --- watch here ---
model = LSTM(
    h=12,
    input_size=24,
    encoder_hidden_size=16,
    decoder_hidden_size=16,
    max_steps=40,
    windows_batch_size=16,
    random_seed=0,
    accelerator="cpu",
    enable_progress_bar=False,
    callbacks=callbacks,
)
forecaster = NeuralForecast(models=[model], freq=1)
forecaster.fit(table)
print(forecaster.models[0].train_trajectories[-1][1])
