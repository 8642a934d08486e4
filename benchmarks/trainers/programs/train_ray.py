"""Ray Train: a loop of one's own in a worker process."""

from pathlib import Path

import ray
import torch
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, prepare_model


def loop():
    torch.manual_seed(0)
    x = torch.randn(256, 8)
    y = x.sum(1, keepdim=True).sin()
    model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
    model = prepare_model(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    # --- watch here ---
    for _ in range(4):
        for i in range(0, 256, 16):
            loss = torch.nn.functional.mse_loss(model(x[i : i + 16]), y[i : i + 16])
            # --- watch here ---
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    print(loss.item())


ray.init(num_cpus=2, include_dashboard=False)
trainer = TorchTrainer(
    loop, scaling_config=ScalingConfig(num_workers=1), run_config=RunConfig(storage_path=str(Path("trained").resolve()))
)
trainer.fit()
