"""pytorch-forecasting: its temporal fusion transformer on two sine waves."""

import numpy as np
import pandas as pd
from lightning.pytorch import Trainer, seed_everything
from pytorch_forecasting import TemporalFusionTransformer, TimeSeriesDataSet

seed_everything(0)
t = np.arange(120)
table = pd.concat(
    pd.DataFrame({"series": str(period), "time": t, "value": np.sin(2 * np.pi * t / period)}) for period in (12, 20)
).reset_index(drop=True)
windows = TimeSeriesDataSet(
    table,
    time_idx="time",
    target="value",
    group_ids=["series"],
    static_categoricals=["series"],
    time_varying_known_reals=["time"],
    time_varying_unknown_reals=["value"],
    max_encoder_length=24,
    max_prediction_length=6,
)
model = TemporalFusionTransformer.from_dataset(windows, hidden_size=16, hidden_continuous_size=8, learning_rate=1e-2)
callbacks = []
# --- watch here ---
trainer = Trainer(
    callbacks=callbacks, accelerator="cpu", max_steps=30, gradient_clip_val=0.1, enable_progress_bar=False
)
trainer.fit(model, windows.to_dataloader(train=True, batch_size=16))
print(trainer.callback_metrics["train_loss_step"].item())
