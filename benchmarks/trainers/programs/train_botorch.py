"""BoTorch: fits a Gaussian process with SciPy, without an optimizer of torch."""

import torch
from botorch.fit import fit_gpytorch_mll
from botorch.models import SingleTaskGP
from gpytorch.mlls import ExactMarginalLogLikelihood

torch.manual_seed(0)
x = torch.rand(30, 3, dtype=torch.float64)
y = torch.sin(6 * x).sum(1, keepdim=True)
model = SingleTaskGP(x, y)
marginal = ExactMarginalLogLikelihood(model.likelihood, model)
optimizer_kwargs = {}
# --- watch here ---
fit_gpytorch_mll(marginal, optimizer_kwargs=optimizer_kwargs)
marginal.train()
print(-marginal(model(x), y.squeeze(1)).item())
