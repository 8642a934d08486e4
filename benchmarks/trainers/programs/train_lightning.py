"""Lightning's Trainer with automatic optimization: gradient accumulation and clipping."""

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch.utils.data import DataLoader, TensorDataset


class Regression(LightningModule):
    """A small network that Lightning trains."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))

    def training_step(self, batch, _):
        inputs, targets = batch
        return torch.nn.functional.mse_loss(self.net(inputs), targets)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


seed_everything(0)
x = torch.randn(256, 8)
loader = DataLoader(TensorDataset(x, x.sum(1, keepdim=True).sin()), batch_size=16)
model = Regression()
callbacks = []
# --- watch here ---
trainer = Trainer(
    callbacks=callbacks,
    accelerator="cpu",
    max_epochs=10,
    accumulate_grad_batches=4,
    gradient_clip_val=0.1,
    enable_progress_bar=False,
)
trainer.fit(model, loader)
print(torch.nn.functional.mse_loss(model.net(x), x.sum(1, keepdim=True).sin()).item())
