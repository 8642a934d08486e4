"""PyTorch Geometric: a graph convolutional network that classifies nodes."""

import torch
from torch_geometric.data import Data
from torch_geometric.nn import GCNConv

torch.manual_seed(0)
labels = torch.randint(0, 3, (100,))
near = torch.stack([torch.randint(0, 100, (4000,)), torch.randint(0, 100, (4000,))])
near = near[:, labels[near[0]] == labels[near[1]]]
data = Data(x=torch.randn(100, 8), edge_index=near, y=labels)


class GCN(torch.nn.Module):
    """Two graph convolutions."""

    def __init__(self):
        super().__init__()
        self.first, self.second = GCNConv(8, 16), GCNConv(16, 3)

    def forward(self, data):
        return self.second(self.first(data.x, data.edge_index).relu(), data.edge_index)


model = GCN()
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, weight_decay=5e-4)
# --- watch here ---
for _ in range(60):
    loss = torch.nn.functional.cross_entropy(model(data), data.y)
    # --- watch here ---
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
print(loss.item())
