"""Lightning's Trainer with manual optimization: a generator and a critic, each with its optimizer."""

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch.utils.data import DataLoader, TensorDataset

real, fake = torch.ones(16, 1), torch.zeros(16, 1)
judged = torch.nn.functional.binary_cross_entropy_with_logits


class Gan(LightningModule):
    """Two networks against each other."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.generator = torch.nn.Sequential(torch.nn.Linear(4, 32), torch.nn.ReLU(), torch.nn.Linear(32, 2))
        self.critic = torch.nn.Sequential(torch.nn.Linear(2, 32), torch.nn.LeakyReLU(0.2), torch.nn.Linear(32, 1))

    def training_step(self, batch, _):
        generator_optimizer, critic_optimizer = self.optimizers()
        (samples,) = batch

        made = self.generator(torch.randn(16, 4))
        critic_loss = judged(self.critic(samples), real) + judged(self.critic(made.detach()), fake)
        critic_optimizer.zero_grad()
        self.manual_backward(critic_loss)
        critic_optimizer.step()

        self.generator_loss = judged(self.critic(made), real)
        generator_optimizer.zero_grad()
        self.manual_backward(self.generator_loss)
        generator_optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.Adam(net.parameters(), lr=1e-3) for net in (self.generator, self.critic)]


seed_everything(0)
loader = DataLoader(TensorDataset(torch.randn(256, 2) + 2), batch_size=16)
model = Gan()
callbacks = []
# --- watch here ---
trainer = Trainer(callbacks=callbacks, accelerator="cpu", max_epochs=4, enable_progress_bar=False)
trainer.fit(model, loader)
print(model.generator_loss.item())
