"""Faulty: something is cut off from the loss, or from the optimizer."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.optim import SGD, Adam

from benchmarks.runs import Net, Tell, Training, clusters, draw, fit, he, mlp, mse, train, waves, xent
from benchmarks.situations.situation import faulty


@faulty(
    "disconnected",
    "exploding",  # of the loss: the encoder runs away from codes that cannot follow
    source="GitHub showlab/Olaf-World issue 8",
    places=("codebook",),
    words="detach",
)
def codebook_loss_of_the_output(*, fixed: bool) -> Training:
    """Take the codebook loss on what the quantizer gives out, where the code is inside of a detach()."""

    def does(n: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        z = n.encoder(x)
        code = n.codebook(torch.cdist(z, n.codebook.weight).argmin(1))
        through = z + (code - z).detach()
        return n.decoder(through), z, through, code

    net = Net(does, encoder=mlp(8, 32, 4), codebook=nn.Embedding(16, 4), decoder=mlp(4, 32, 8))
    mixing = torch.randn(3, 8, generator=draw(1, -1))

    def loss_of(model: Any, i: int) -> Tensor:
        x = torch.tanh(torch.randn(64, 3, generator=draw(1, i)) @ mixing)
        out, z, through, code = model(x)
        learnt = code if fixed else through
        return mse(out, x) + mse(learnt, z.detach()) + mse(z, code.detach())

    return train(net, Adam(net.parameters(), 2e-3), loss_of)


@faulty("disconnected", "stalled", "unstepped", source="GitHub KanishJebaMathewM/Truxify issue 13118")
def meta_learner_through_data(*, fixed: bool) -> Training:
    """Adapt a copy of the meta-model by writing to `.data`, so that the query loss never reaches the meta-model."""
    net = mlp(1, 32, 32, 1, act=nn.Tanh)

    def loss_of(model: Any, i: int) -> Tensor:
        g = draw(2, i)
        total = torch.zeros(())
        for _ in range(4):
            phase, x = torch.rand((), generator=g) * 3, torch.rand(20, 1, generator=g) * 6 - 3
            y = torch.sin(x + phase)
            if fixed:
                weights = dict(model.named_parameters())
                inner = mse(functional_call(model, weights, (x[:10],)), y[:10])
                slopes = torch.autograd.grad(inner, list(weights.values()), create_graph=True)
                adapted = {name: w - 0.1 * s for (name, w), s in zip(weights.items(), slopes, strict=True)}
                total = total + mse(functional_call(model, adapted, (x[10:],)), y[10:])
            else:
                fast = copy.deepcopy(model)
                slopes = torch.autograd.grad(mse(fast(x[:10]), y[:10]), list(fast.parameters()), create_graph=True)
                for w, s in zip(fast.parameters(), slopes, strict=True):
                    w.data -= 0.1 * s
                total = total + mse(fast(x[10:]), y[10:])
        return total / 4

    return train(net, Adam(net.parameters(), 3e-3), loss_of)


@faulty("disconnected", source="GitHub lucidrains/CoCa-pytorch issue 6", places=("vision",), words=r"detach|no_grad")
def feature_extractor_detaches(*, fixed: bool) -> Training:
    """Read an encoder through an extractor that hands out detached features; the fusion above it trains."""

    def does(n: Any, image: Tensor, text: Tensor) -> Tensor:
        seen = n.vision(image)
        return n.fusion(torch.cat([seen if fixed else seen.detach().clone(), n.text(text)], 1))

    net = Net(does, vision=mlp(12, 32, 16, norm=nn.LayerNorm), text=nn.Linear(6, 16), fusion=mlp(32, 32, 1))
    a = torch.randn(12, 6, generator=draw(3, -1)) / 3

    def loss_of(model: Any, i: int) -> Tensor:
        image, text = (torch.randn(64, d, generator=draw(3 + d, i)) for d in (12, 6))
        return mse(model(image, text), (torch.sin(image @ a) * text).sum(1, keepdim=True))

    return train(net, Adam(net.parameters(), 3e-3), loss_of)


@faulty("disconnected", source="GitHub liamb315/CharacterGAN issue 4", places=("writer",), words=r"argmax|differentiab")
def argmax_between_writer_and_reader(*, fixed: bool) -> Training:
    """Send tokens from a writer to a reader by argmax; only the reader learns."""

    def does(n: Any, x: Tensor) -> Tensor:
        logits = n.writer(x).unflatten(1, (4, 8))
        if fixed:
            tokens = functional.gumbel_softmax(logits, hard=True)
        else:
            tokens = functional.one_hot(logits.argmax(2), 8).float()
        return n.reader(tokens.flatten(1))

    net = Net(does, writer=mlp(16, 64, 32), reader=mlp(32, 64, 5))
    return train(net, Adam(net.parameters(), 3e-3), fit(clusters(4), xent))


@faulty(
    "disconnected",
    "vanishing-depth",
    source="GitHub Justin-Tan/generative-compression issue 27",
    places=("analysis",),
    words="round|straight|zero|constant|differentiab",
)
def rounding_without_a_gradient(*, fixed: bool) -> Training:
    """Round the code of a compressing autoencoder: the derivative of round() is 0 everywhere."""

    def does(n: Any, x: Tensor) -> Tensor:
        code = 2 * n.analysis(x)
        rounded = code + (code.round() - code).detach() if fixed else code.round()
        return n.synthesis(rounded)

    net = Net(does, analysis=mlp(16, 32, 4), synthesis=mlp(4, 32, 16))
    mixing = torch.randn(3, 16, generator=draw(5, -1))

    def loss_of(model: Any, i: int) -> Tensor:
        x = torch.randn(64, 3, generator=draw(5, i)) @ mixing
        return mse(model(x), x)

    return train(net, Adam(net.parameters(), 3e-3), loss_of)


@faulty(
    "unstepped",
    "disconnected",
    "stalled",
    source="GitHub microsoft/nni issue 4521; pytorch/pytorch issue 14467",
    places=("hidden", "head"),
    since=40,
    words="optimizer",
)
def pruned_behind_the_optimizers_back(*, fixed: bool) -> Training:
    """Prune a network while it trains: the smaller layers are new objects, which the optimizer has never seen."""
    net = Net(
        lambda n, x: n.head(torch.relu(n.hidden(torch.relu(n.stem(x))))),
        stem=nn.Linear(16, 64),
        hidden=nn.Linear(64, 64),
        head=nn.Linear(64, 5),
    )
    optimizer = SGD(net.parameters(), 0.1)
    plain = train(net, optimizer, fit(clusters(6), xent))

    def step(i: int, tell: Tell) -> None:
        if i == 40:
            torch.manual_seed(0)
            net.hidden, net.head = nn.Linear(64, 24), nn.Linear(24, 5)
            if fixed:
                optimizer.add_param_group({"params": [*net.hidden.parameters(), *net.head.parameters()]})
        plain.step(i, tell)

    return Training(net, [optimizer], step)


@faulty(
    "unstepped",
    "disconnected",
    source="GitHub pytorch/pytorch issues 715, 1053 and 38639",
    words="ModuleList|regist|optimizer|parameters",
)
def layers_in_a_list(*, fixed: bool) -> Training:
    """Keep the hidden layers in a Python list: they run, get gradients, and are neither listed nor stepped."""
    layers = [nn.Linear(48, 48) for _ in range(4)]

    def does(n: Any, x: Tensor) -> Tensor:
        h = torch.tanh(n.stem(x))
        for layer in n.layers if fixed else layers:
            h = torch.tanh(layer(h))
        return n.head(h)

    net = Net(does, stem=nn.Linear(6, 48), head=nn.Linear(48, 1))
    if fixed:
        net.layers = nn.ModuleList(layers)
    return train(net, Adam(net.parameters(), 3e-3), fit(waves(7), mse))


@faulty(
    "disconnected",
    "unstepped",
    "stalled",
    source="PyTorch forums, 'zero_grad before or after backward'; GitHub yunjey/pytorch-tutorial issue 238",
    words="zero_grad|gradient",
)
def zeroed_before_the_step(*, fixed: bool) -> Training:
    """Call zero_grad() between backward() and step(): the optimizer never sees a gradient."""
    net = he(mlp(16, 48, 48, 5))
    optimizer = Adam(net.parameters(), 2e-3)
    batch = clusters(8)

    def step(i: int, tell: Tell) -> None:
        x, y = batch(i)
        if fixed:
            optimizer.zero_grad()
        loss = xent(net(x), y)
        loss.backward()
        if not fixed:
            optimizer.zero_grad()
        tell(loss.detach())
        optimizer.step()

    return Training(net, [optimizer], step)


@faulty(
    "disconnected",
    source="GitHub lucidrains/mixture-of-experts issue 7",
    places=("router",),
    words="argmax|differentiab|index|integer|discrete",
)
def router_by_index_alone(*, fixed: bool) -> Training:
    """Pick one expert by argmax and forget to weight what it gives by the router's probability."""

    def does(n: Any, x: Tensor) -> Tensor:
        p = n.router(x).softmax(1)
        best, which = p.max(1)
        out = torch.stack([expert(x) for expert in n.experts], 1)[torch.arange(len(x)), which]
        return n.head(out * best[:, None] if fixed else out)

    net = Net(
        does,
        router=nn.Linear(16, 4),
        experts=nn.ModuleList(mlp(16, 32, 16) for _ in range(4)),
        head=nn.Linear(16, 5),
    )
    return train(net, Adam(net.parameters(), 3e-3), fit(clusters(9), xent))


@faulty(
    "disconnected",
    source="PyTorch forums, 'adding losses with .item()'",
    places=("depth_head",),
    words=r"item|detach|loss|float|number",
)
def second_loss_as_a_number(*, fixed: bool) -> Training:
    """Add a second task's loss with .item(): its head is never trained, the sum looks right."""

    def does(n: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        h = n.trunk(x)
        return n.class_head(h), n.depth_head(h)

    net = Net(
        does,
        trunk=nn.Sequential(mlp(16, 48, 48), nn.ReLU()),
        class_head=nn.Linear(48, 5),
        depth_head=mlp(48, 32, 1),
    )
    batch = clusters(10)

    def loss_of(model: Any, i: int) -> Tensor:
        x, y = batch(i)
        logits, depth = model(x)
        second = mse(depth, x[:, :1] * x[:, 1:2])
        return xent(logits, y) + (second if fixed else second.item())

    return train(net, Adam(net.parameters(), 2e-3), loss_of)


@faulty(
    "unstepped",
    "disconnected",
    source="PyTorch forums, 'unfreezing layers during training'; the optimizer was made with a filter on requires_grad",
    places=("backbone",),
    since=30,
    words="optimizer|param_group",
)
def thawed_but_not_stepped(*, fixed: bool) -> Training:
    """Thaw a backbone after the head has warmed up, with an optimizer that was given the head's parameters only."""
    net = Net(
        lambda n, x: n.head(n.backbone(x)),
        backbone=nn.Sequential(nn.Linear(6, 64), nn.Tanh(), nn.Linear(64, 32), nn.Tanh()),
        head=nn.Linear(32, 1),
    )
    net.backbone.requires_grad_(False)
    optimizer = Adam([p for p in net.parameters() if p.requires_grad], 3e-3)
    plain = train(net, optimizer, fit(waves(11), mse))

    def step(i: int, tell: Tell) -> None:
        if i == 30:
            net.backbone.requires_grad_(True)
            if fixed:
                optimizer.add_param_group({"params": list(net.backbone.parameters())})
        plain.step(i, tell)

    return Training(net, [optimizer], step)


@faulty(
    "disconnected",
    "unstepped",
    "stalled",
    source="GitHub Guitaricet/relora issue 18",
    places=("adapters",),
    words="zero",
)
def adapter_with_both_factors_zero(*, fixed: bool) -> Training:
    """Begin both factors of low-rank adapters at zero: neither ever gets a gradient, only the bias moves."""

    def does(n: Any, x: Tensor) -> Tensor:
        for base, adapter in zip(n.base, n.adapters, strict=True):
            x = torch.tanh(base(x) + adapter(x))
        return n.head(x)

    def adapter() -> nn.Sequential:
        down, up = nn.Linear(32, 4, bias=False), nn.Linear(4, 32, bias=False)
        nn.init.zeros_(up.weight)
        if not fixed:
            nn.init.zeros_(down.weight)
        return nn.Sequential(down, up)

    net = Net(
        does,
        base=nn.ModuleList(nn.Linear(32, 32) for _ in range(3)),
        adapters=nn.ModuleList(adapter() for _ in range(3)),
        head=nn.Linear(32, 5),
    )
    net.base.requires_grad_(False)
    trained = [p for p in net.parameters() if p.requires_grad]
    return train(net, Adam(trained, 5e-3), fit(clusters(12, d=32), xent))
