"""TorchRL: its DQN loss on transitions drawn at random."""

import torch
from tensordict import TensorDict
from torchrl.data import OneHot
from torchrl.modules import MLP, QValueActor
from torchrl.objectives import DQNLoss, SoftUpdate

torch.manual_seed(0)
net = MLP(in_features=4, out_features=2, num_cells=[32, 32])
model = QValueActor(net, in_keys=["observation"], spec=OneHot(2))
loss_module = DQNLoss(model, action_space=OneHot(2), delay_value=True)
optimizer = torch.optim.Adam(loss_module.parameters(), lr=1e-3)
updater = SoftUpdate(loss_module, tau=0.01)


def transitions():
    observation = torch.randn(32, 4)
    action = torch.nn.functional.one_hot(torch.randint(0, 2, (32,)), 2)
    reward = (observation[:, :2] * action).sum(1, keepdim=True)
    done = torch.rand(32, 1) < 0.1
    after = {"observation": torch.randn(32, 4), "reward": reward, "done": done, "terminated": done}
    return TensorDict({"observation": observation, "action": action, "next": after}, [32])


# --- watch here ---
for _ in range(60):
    loss = loss_module(transitions())["loss"]
    # --- watch here ---
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    updater.step()
print(loss.item())
