"""PyTorch-Ignite: its supervised trainer, with gradient accumulation."""

import torch
from ignite.engine import Events, create_supervised_trainer
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
x = torch.randn(256, 8)
loader = DataLoader(TensorDataset(x, x.sum(1, keepdim=True).sin()), batch_size=16)
model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
loss_fn = torch.nn.MSELoss()
# --- watch here ---
trainer = create_supervised_trainer(model, optimizer, loss_fn, gradient_accumulation_steps=2)


@trainer.on(Events.COMPLETED)
def show(engine):
    print(engine.state.output)


trainer.run(loader, max_epochs=8)
