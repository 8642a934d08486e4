"""PyPOTS: SAITS fills the gaps of sine waves."""

import numpy as np
from pypots.imputation import SAITS
from pypots.utils.random import set_random_seed

set_random_seed(0)
rng = np.random.default_rng(0)
waves = np.sin(np.arange(24)[None, :, None] / 3 + rng.uniform(0, 6, (128, 1, 3)))
gaps = rng.random(waves.shape) < 0.2
sizes = {"n_layers": 1, "d_model": 16, "n_heads": 2, "d_k": 8, "d_v": 8, "d_ffn": 32}
model = SAITS(n_steps=24, n_features=3, batch_size=16, epochs=4, device="cpu", verbose=False, **sizes)
# --- watch here ---
model.fit({"X": np.where(gaps, np.nan, waves)})
filled = model.impute({"X": np.where(gaps, np.nan, waves)})
print(((filled - waves)[gaps] ** 2).mean())
