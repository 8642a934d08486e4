"""Pyro: stochastic variational inference with a network in model and guide."""

import pyro
import torch
from pyro.distributions import Normal
from pyro.infer import SVI, Trace_ELBO
from pyro.nn import PyroModule

pyro.set_rng_seed(0)
x = torch.randn(64, 6)


class Autoencoder(PyroModule):
    """A variational autoencoder."""

    def __init__(self):
        super().__init__()
        self.encoder = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
        self.decoder = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.Tanh(), torch.nn.Linear(16, 6))

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", Normal(torch.zeros(len(x), 2), 1.0).to_event(1))
            pyro.sample("x", Normal(self.decoder(z), 0.5).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        mean, log_scale = self.encoder(x).chunk(2, 1)
        with pyro.plate("rows", len(x)):
            pyro.sample("z", Normal(mean, log_scale.exp()).to_event(1))


network = Autoencoder()
optimizer = pyro.optim.Adam({"lr": 1e-2})
svi = SVI(network.model, network.guide, optimizer, loss=Trace_ELBO())
# --- watch here ---
for _ in range(40):
    loss = svi.step(x)
print(loss)
