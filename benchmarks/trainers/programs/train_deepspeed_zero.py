"""DeepSpeed with ZeRO stage 2: gradients and optimizer states are parted among the processes; here there is one."""

import os

import deepspeed
import torch

os.environ.update(
    {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29534"}
)
torch.manual_seed(0)
x = torch.randn(256, 8)
y = x.sum(1, keepdim=True).sin()
net = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
settings = {
    "train_micro_batch_size_per_gpu": 16,
    "gradient_clipping": 0.1,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
    "zero_optimization": {"stage": 2},
}
engine, _, _, _ = deepspeed.initialize(model=net, model_parameters=net.parameters(), config=settings)
# --- watch here ---
for _ in range(4):
    for i in range(0, 256, 16):
        loss = torch.nn.functional.mse_loss(engine(x[i : i + 16]), y[i : i + 16])
        engine.backward(loss)
        # --- watch here ---
        engine.step()
print(loss.item())
