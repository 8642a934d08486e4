"""A loop of one's own with Lightning Fabric."""

import torch
from lightning.fabric import Fabric
from torch.utils.data import DataLoader, TensorDataset

fabric = Fabric(accelerator="cpu", devices=1)
fabric.seed_everything(0)
x = torch.randn(256, 8)
loader = fabric.setup_dataloaders(DataLoader(TensorDataset(x, x.sum(1, keepdim=True).sin()), batch_size=16))
model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
model, optimizer = fabric.setup(model, torch.optim.Adam(model.parameters(), lr=1e-2))
# --- watch here ---
for _ in range(4):
    for inputs, targets in loader:
        loss = torch.nn.functional.mse_loss(model(inputs), targets)
        # --- watch here ---
        optimizer.zero_grad()
        fabric.backward(loss)
        optimizer.step()
print(loss.item())
