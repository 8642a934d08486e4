"""GluonTS on torch: DeepAR on two sine waves."""

import numpy as np
import pandas as pd
from gluonts.dataset.common import ListDataset
from gluonts.torch import DeepAREstimator
from lightning.pytorch import seed_everything

seed_everything(0)
t = np.arange(200)
waves = [np.sin(2 * np.pi * t / period) for period in (12, 20)]
series = ListDataset([{"start": pd.Period("2000-01", "M"), "target": wave} for wave in waves], freq="M")
callbacks = []
# --- watch here ---
estimator = DeepAREstimator(
    freq="M",
    prediction_length=12,
    context_length=24,
    hidden_size=16,
    batch_size=16,
    num_batches_per_epoch=20,
    trainer_kwargs={
        "max_epochs": 2,
        "callbacks": callbacks,
        "accelerator": "cpu",
        "enable_progress_bar": False,
    },
)
result = estimator.train_model(series)
print(result.trainer.callback_metrics["train_loss"].item())
