"""darts: its LSTM on two sine waves."""

import numpy as np
from darts import TimeSeries
from darts.models import BlockRNNModel

t = np.arange(200)
series = [TimeSeries.from_values(np.sin(2 * np.pi * t / period).astype("float32")) for period in (12, 20)]
callbacks = []
# --- watch here ---
model = BlockRNNModel(
    input_chunk_length=24,
    output_chunk_length=12,
    model="LSTM",
    hidden_dim=16,
    batch_size=16,
    n_epochs=2,
    random_state=0,
    pl_trainer_kwargs={"callbacks": callbacks, "accelerator": "cpu", "enable_progress_bar": False},
)
model.fit(series)
print(model.trainer.callback_metrics["train_loss"].item())
