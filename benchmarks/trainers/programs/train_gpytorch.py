"""GPyTorch: the hyperparameters of an exact Gaussian process."""

import gpytorch
import torch

torch.manual_seed(0)
x = torch.linspace(0, 1, 50)
y = torch.sin(6 * x) + 0.1 * torch.randn(50)


class Process(gpytorch.models.ExactGP):
    """A constant mean and a kernel of radial basis functions."""

    def __init__(self, x, y, likelihood):
        super().__init__(x, y, likelihood)
        self.mean_module = gpytorch.means.ConstantMean()
        self.covar_module = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel())

    def forward(self, x):
        return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))


likelihood = gpytorch.likelihoods.GaussianLikelihood()
model = Process(x, y, likelihood)
optimizer = torch.optim.Adam(model.parameters(), lr=0.1)  # with those of the likelihood
marginal = gpytorch.mlls.ExactMarginalLogLikelihood(likelihood, model)
# --- watch here ---
for _ in range(50):
    optimizer.zero_grad()
    loss = -marginal(model(x), y)
    # --- watch here ---
    loss.backward()
    optimizer.step()
print(loss.item())
