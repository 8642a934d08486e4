"""skorch: a network as an estimator of scikit-learn."""

import numpy as np
import torch
from skorch import NeuralNetRegressor

torch.manual_seed(0)
x = np.random.default_rng(0).standard_normal((256, 8)).astype("float32")
y = np.sin(x.sum(1, keepdims=True))
module = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
callbacks = []
# --- watch here ---
net = NeuralNetRegressor(
    module, optimizer=torch.optim.Adam, lr=1e-2, batch_size=16, max_epochs=4, verbose=0, callbacks=callbacks
)
net.fit(x, y)
print(net.history[-1, "train_loss"])
