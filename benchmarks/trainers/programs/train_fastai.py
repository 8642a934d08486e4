"""fastai: its Learner, whose optimizer is fastai's own."""

import torch
from fastai.basics import DataLoader, DataLoaders, Learner, set_seed

set_seed(0)
x = torch.randn(256, 8)
y = x.sum(1, keepdim=True).sin()
rows = list(zip(x, y, strict=True))
loaders = DataLoaders(DataLoader(rows, bs=16), DataLoader(rows[:64], bs=16))
model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
callbacks = []
# --- watch here ---
learner = Learner(loaders, model, loss_func=torch.nn.functional.mse_loss, cbs=callbacks)
learner.fit(4, 1e-2)
print(learner.recorder.values[-1][0])
