r"""Prove, without gradwatch, that what it accuses of the stock models whose loss comes down is a fault.

python -m benchmarks.stock.proofs --library transformers      # in the environments of `benchmarks.stock`
python -m benchmarks.stock.proofs --library darts
python -m benchmarks.stock.proofs --library neuralforecast
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.command import parser
from benchmarks.stock import tasks

STEPS = 200
LR = 1e-3


def alive(modules: Mapping[str, nn.Module], run: Callable[[], object]) -> dict[str, int]:
    """Return, of modules before a ReLU, how many units are above 0 for any input of what runs."""
    seen: dict[str, Tensor] = {}

    def look(name: str, channels: int) -> Callable[[Any, Any, Tensor], None]:
        def hook(_module: nn.Module, _args: object, output: Tensor) -> None:
            positive = (output > 0).transpose(channels, -1).flatten(0, -2).any(0)
            seen[name] = positive | seen.get(name, torch.zeros_like(positive))

        return hook

    handles = [
        module.register_forward_hook(look(name, 1 if isinstance(module, nn.Conv1d) else -1))
        for name, module in modules.items()
    ]
    with torch.no_grad():
        run()
    for handle in handles:
        handle.remove()
    return {name: int(units.sum()) for name, units in seen.items()}


def mobilebert() -> Iterator[str]:
    """GW601: most units of its feed-forward layers are dead; with a normalization none is, and the loss is lower."""
    from transformers import MobileBertForMaskedLM

    from benchmarks.stock.transformers_models import configured, masked

    for norm in ("no_norm", "layer_norm"):
        torch.manual_seed(0)
        sizes = dict.fromkeys(("embedding_size", "intra_bottleneck_size", "true_hidden_size"), 16)
        model = MobileBertForMaskedLM(configured("mobilebert", 32, {**sizes, "normalization_type": norm}))
        losses = fitted(model, lambda m=model: m(**masked()).loss)  # type: ignore[misc]
        layers = {name: m for name, m in model.named_modules() if name.endswith("intermediate.dense")}
        units = alive(layers, lambda m=model: [m(**masked()) for _ in range(60)])  # type: ignore[misc]
        yield f"MobileBERT, {norm}: loss {losses[-1]:.3g}; alive on 960 sequences, of 128 units: {[*units.values()]}"


def mobilenet() -> Iterator[str]:
    """GW207: its loss is far above that of guessing, from the beginning to the end."""
    from transformers import MobileNetV1ForImageClassification

    from benchmarks.stock.transformers_models import configured
    from benchmarks.stock.transformers_sight import pictures

    torch.manual_seed(0)
    model = MobileNetV1ForImageClassification(configured("mobilenet_v1", 256, {"depth_multiplier": 1.0}))
    losses = fitted(model, lambda: model(**pictures()).loss)
    yield f"MobileNetV1: loss {losses[0]:.3g} -> {losses[-1]:.3g}; that of guessing is {math.log(tasks.CLASSES):.3g}"


def fitted(model: nn.Module, loss_of: Callable[[], Tensor]) -> list[float]:
    """Train, and return the means of the first and of the last ten losses."""
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=LR), []
    model.train()
    for _ in range(STEPS):
        loss = loss_of()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return [sum(losses[:10]) / 10, sum(losses[-10:]) / 10]


def tcn() -> Iterator[str]:
    """GW601: at its default learning rate most units of two convolutions are dead; at a tenth of it few are."""
    from darts import TimeSeries
    from darts.models import TCNModel

    from benchmarks.stock.forecasting import AHEAD, PAST, QUIET, ROWS, series

    values = [one.astype("float32") for one in series()]
    pieces = [TimeSeries.from_values(v[i : i + PAST]) for v in values for i in range(0, len(v) - PAST, 3)]
    for lr in (LR, LR / 10):
        built = TCNModel(
            input_chunk_length=PAST,
            output_chunk_length=AHEAD,
            batch_size=ROWS,
            random_state=0,
            n_epochs=1000,
            num_filters=256,
            optimizer_kwargs={"lr": lr},
            pl_trainer_kwargs={**QUIET, "max_steps": STEPS},
        )
        built.fit([TimeSeries.from_values(v) for v in values], verbose=False)
        layers = {f"res_blocks.{k}.conv1": built.model.res_blocks[k].conv1 for k in (1, 2)}
        units = alive(layers, lambda b=built: b.predict(AHEAD, series=pieces, verbose=False))  # type: ignore[misc]
        yield f"TCNModel, lr {lr:g}: of 256 units each, alive on {len(pieces)} windows: {units}"


def tide() -> Iterator[str]:
    """GW402: a LayerNorm over one value gives its shift whatever it takes: no gradient comes through, in float64."""
    from neuralforecast.models import TiDE

    torch.manual_seed(0)
    decoder = TiDE(h=12, input_size=24, hidden_size=32, max_steps=1).temporal_decoder.double()
    x = torch.randn(16, 12, decoder.lin1.in_features, dtype=torch.float64, requires_grad=True)
    out = decoder(x)
    (gradient,) = torch.autograd.grad((out * torch.randn_like(out)).sum(), x)
    yield (
        f"TiDE: {decoder.norm} at the end of its decoder; spread of what that gives over inputs"
        f" {float(out.std()):.1g}, largest gradient at what it takes {float(gradient.abs().max()):.1g}"
    )


def time_series_transformer() -> Iterator[str]:
    """GW101: at width 256 its encoder gives the same for all windows; with that of others the loss is the same."""
    from transformers import TimeSeriesTransformerForPrediction

    from benchmarks.stock.transformers_models import configured
    from benchmarks.stock.transformers_others import LAGGED, series

    for width in (32, 256):
        torch.manual_seed(0)
        model = TimeSeriesTransformerForPrediction(configured("time_series_transformer", width, dict(LAGGED)))
        fitted(model, lambda m=model: m(**series()).loss)  # type: ignore[misc]
        model.eval()
        batches, given = [series() for _ in range(20)], []

        def loss(m: nn.Module = model, batches: list[Any] = batches) -> float:
            with torch.no_grad():
                return sum(float(m(**batch).loss) for batch in batches) / len(batches)

        def swap(_module: nn.Module, _args: object, output: Any) -> Any:
            output.last_hidden_state = output.last_hidden_state.flip(0)
            return output

        encoder = model.model.encoder
        handle = encoder.register_forward_hook(lambda _m, _a, out, given=given: given.append(out[0]))  # type: ignore[misc]
        own = loss()
        handle.remove()
        handle = encoder.register_forward_hook(swap)
        other = loss()
        handle.remove()
        every = torch.cat(given)
        spread = float(every.std(0).mean() / every.mean(0).abs().mean())
        yield (
            f"TimeSeriesTransformer, width {width}: loss {own:.4f}, with what its encoder gives of other rows"
            f" {other:.4f}; spread of that over rows {spread:.1g} of its mean"
        )


PROOFS = {"transformers": (mobilebert, mobilenet, time_series_transformer), "darts": (tcn,), "neuralforecast": (tide,)}


def main() -> None:
    """Print the proofs for a library."""
    mine = parser(__doc__)
    mine.add_argument("--library", choices=PROOFS, required=True)
    options = mine.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    for proof in PROOFS[options.library]:
        for line in proof():
            print(line, flush=True)


if __name__ == "__main__":
    main()
