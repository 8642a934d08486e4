r"""Sequence layers and networks that come without a training of their own, each behind a readout of its newest output.

Those whose library is not installed are left out; `--no-deps` where a library asks for another torch:

python3.11 -m venv seq && seq/bin/pip install -c constraints.txt . einops scipy
seq/bin/pip install --no-deps ncps==1.0.1 minGRU-pytorch==0.2.1 mambapy==1.2.0 s5-pytorch==0.2.1 pytorch-tcn==1.2.3 \
    xlstm==2.0.6 torchcde==0.2.5 torchdiffeq torchsde trampoline
python3.11 -m venv qlib && qlib/bin/pip install -c constraints.txt . pandas scipy scikit-learn joblib && \
    qlib/bin/pip install --no-deps pyqlib==0.9.7    # and what importing it asks for
python3.11 -m venv tsai && tsai/bin/pip install torch==2.14.1 torchvision==0.29.1 && \
    tsai/bin/pip install . tsai==1.0.1 pyts==0.13.0    # fastai asks for torchvision, and no wheel of that is for 2.13.0
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

FEATURES = 4


TSAI = (
    "RNN LSTM GRU RNNPlus LSTMPlus GRUPlus RNNAttention LSTMAttention GRUAttention"
    " RNN_FCN LSTM_FCN GRU_FCN MRNN_FCN MLSTM_FCN MGRU_FCN"
    " RNN_FCNPlus LSTM_FCNPlus GRU_FCNPlus MRNN_FCNPlus MLSTM_FCNPlus MGRU_FCNPlus"
    " MLP FCN FCNPlus TCN ResCNN ResNet ResNetPlus xresnet1d18plus XCM XCMPlus OmniScaleCNN mWDN mWDNPlus"
    " InceptionTime InceptionTimePlus InCoordTime XCoordTime MultiInceptionTimePlus XceptionTime XceptionTimePlus"
    " TransformerModel TransformerRNNPlus TransformerLSTMPlus TransformerGRUPlus TST TSTPlus MultiTSTPlus TSiTPlus"
    " ConvTranPlus PatchTST gMLP TSSequencerPlus"
    " MiniRocket MiniRocketPlus InceptionRocketPlus MultiRocketPlus HydraPlus HydraMultiRocketPlus"
)
"""Architectures of tsai that can be built from the shapes alone; of two names for one class, one."""


class Layer(NamedTuple):
    """A network over (rows, timesteps, FEATURES) that gives one number for each row."""

    library: str
    name: str
    make: Callable[[int, int], nn.Module]
    """Takes width and timesteps."""


class Readout(nn.Module):
    """A linear layer, something that mixes timesteps, and a linear layer on its newest output."""

    def __init__(self, body: nn.Module, width: int, *, given: int | None = None, entered: int | None = None) -> None:
        """Build it; `given` and `entered` are the features that the body gives and takes, if these are others."""
        super().__init__()
        self.into, self.body, self.out = nn.Linear(FEATURES, entered or width), body, nn.Linear(given or width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return (rows, 1)."""
        return self.every(x)[:, -1]

    def every(self, x: Tensor) -> Tensor:
        """Return (rows, timesteps, 1)."""
        y = self.body(self.into(x))
        return self.out(y[0] if isinstance(y, tuple) else y)


class Flat(nn.Module):
    """Gives a network of qlib or tsai a window as it wants it: (rows, features x timesteps), or features first."""

    def __init__(self, network: nn.Module, *, flat: bool) -> None:
        """Wrap it."""
        super().__init__()
        self.network, self.flat = network, flat

    def forward(self, x: Tensor) -> Tensor:
        """Return (rows, 1)."""
        turned = x.transpose(1, 2)
        return self.network(turned.flatten(1) if self.flat else turned).view(len(x), -1)


def layers() -> Iterator[Layer]:
    """Yield those whose library is here."""
    yield from _torch()
    for name, some in (
        ("ncps.torch", _ncps),
        ("minGRU_pytorch", _mingru),
        ("mambapy.mamba", _mambapy),
        ("s5", _s5),
        ("pytorch_tcn", _tcn),
        ("xlstm", _xlstm),
        ("torchcde", _torchcde),
        ("qlib.contrib.model", _qlib),
        ("tsai.models.all", _tsai),
    ):
        try:
            library = importlib.import_module(name)
        except ImportError:
            continue
        yield from some(library)


def _torch() -> Iterator[Layer]:
    def recurrent(kind: Any, layers: int = 1) -> Callable[[int, int], nn.Module]:
        return lambda width, _: Readout(kind(width, width, layers, batch_first=True), width)

    def open_lstm(width: int, timesteps: int) -> nn.Module:
        model = Readout(lstm := nn.LSTM(width, width, batch_first=True), width)
        with torch.no_grad():
            lstm.bias_ih_l0[: 2 * width] = math.log(timesteps)
            lstm.bias_ih_l0[:width] *= -1
            lstm.bias_hh_l0[: 2 * width] = 0
        return model

    def encoder(width: int, _: int) -> nn.Module:
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, batch_first=True, dropout=0.0)
        return Readout(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), width)

    for name, make in (
        ("RNN", recurrent(nn.RNN)),
        ("GRU", recurrent(nn.GRU)),
        ("LSTM", recurrent(nn.LSTM)),
        ("LSTM, 4 layers", recurrent(nn.LSTM, 4)),
        ("LSTM, gate biases ±log T", open_lstm),
        ("TransformerEncoder, no positions", encoder),
    ):
        yield Layer("torch", name, make)


def _ncps(library: Any) -> Iterator[Layer]:
    yield Layer("ncps", "CfC", lambda width, _: Readout(library.CfC(width, width), width))
    yield Layer("ncps", "CfC, mixed memory", lambda w, _: Readout(library.CfC(w, w, mixed_memory=True), w))
    yield Layer("ncps", "LTC", lambda width, _: Readout(library.LTC(width, width), width))


def _mingru(_: Any) -> Iterator[Layer]:
    for kind in ("minGRU", "minLSTM"):
        layer = getattr(importlib.import_module(f"minGRU_pytorch.{kind}"), kind)
        yield Layer("minGRU-pytorch", kind, lambda width, _, layer=layer: Readout(layer(width), width))


def _mambapy(library: Any) -> Iterator[Layer]:
    for layers in (1, 4):
        yield Layer(
            "mambapy",
            f"Mamba, {layers} layer{'s' * (layers > 1)}",
            lambda width, _, layers=layers: Readout(
                library.Mamba(library.MambaConfig(d_model=width, n_layers=layers)), width
            ),
        )


def _s5(library: Any) -> Iterator[Layer]:
    yield Layer("s5-pytorch", "S5", lambda width, _: Readout(library.S5(width, width), width))
    yield Layer("s5-pytorch", "S5Block", lambda width, _: Readout(library.S5Block(width, width, bidir=False), width))


def _tcn(library: Any) -> Iterator[Layer]:
    yield Layer(
        "pytorch-tcn", "TCN", lambda w, _: Readout(library.TCN(w, [w] * 6, 4, input_shape="NLC", dropout=0.0), w)
    )


def _xlstm(x: Any) -> Iterator[Layer]:
    def mlstm(width: int, timesteps: int) -> nn.Module:
        layer = x.mLSTMBlockConfig(mlstm=x.mLSTMLayerConfig(conv1d_kernel_size=4, qkv_proj_blocksize=4, num_heads=4))
        stack = x.xLSTMBlockStackConfig(mlstm_block=layer, context_length=timesteps, num_blocks=1, embedding_dim=width)
        return Readout(x.xLSTMBlockStack(stack), width)

    def slstm(width: int, timesteps: int) -> nn.Module:
        layer = x.sLSTMBlockConfig(
            slstm=x.sLSTMLayerConfig(backend="vanilla", num_heads=4, conv1d_kernel_size=4),
            feedforward=x.FeedForwardConfig(proj_factor=1.3, act_fn="gelu"),
        )
        stack = x.xLSTMBlockStackConfig(
            slstm_block=layer, context_length=timesteps, num_blocks=1, embedding_dim=width, slstm_at=[0]
        )
        return Readout(x.xLSTMBlockStack(stack), width)

    yield Layer("xlstm", "mLSTM block", mlstm)
    yield Layer("xlstm", "sLSTM block", slstm)


def _torchcde(library: Any) -> Iterator[Layer]:
    class Field(nn.Module):
        """The vector field of a neural controlled differential equation."""

        def __init__(self, width: int) -> None:
            super().__init__()
            self.linear, self.width = nn.Linear(width, width * FEATURES), width

        def forward(self, _: Tensor, z: Tensor) -> Tensor:
            return self.linear(z).tanh().view(len(z), self.width, FEATURES)

    class Controlled(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.field, self.begin = Field(width), nn.Linear(FEATURES, width)

        def forward(self, x: Tensor) -> Tensor:
            path = library.LinearInterpolation(library.linear_interpolation_coeffs(x))
            ends = {"t": path.interval, "method": "rk4", "options": {"step_size": 1.0}, "adjoint": False}
            return library.cdeint(X=path, func=self.field, z0=self.begin(path.evaluate(path.interval[0])), **ends)

    yield Layer("torchcde", "neural CDE", lambda w, _: Readout(Controlled(w), w, entered=FEATURES))


def _qlib(_: Any) -> Iterator[Layer]:
    def of(module: str, name: str) -> Any:
        return getattr(importlib.import_module(f"qlib.contrib.model.pytorch_{module}"), name)

    cpu = torch.device("cpu")
    made: list[tuple[str, Callable[[], nn.Module], bool | None]] = [
        ("LSTM", lambda: of("lstm", "LSTMModel")(FEATURES), True),
        ("ALSTM", lambda: of("alstm", "ALSTMModel")(FEATURES), True),
        ("TCN", lambda: of("tcn", "TCNModel")(FEATURES, 1, [32] * 5, 7, 0.5), True),
        ("TCN_ts", lambda: of("tcn_ts", "TCNModel")(FEATURES, 1, [32] * 5, 7, 0.5), False),
        ("Transformer", lambda: of("transformer", "Transformer")(FEATURES, device=cpu), True),
        ("Localformer", lambda: of("localformer", "Transformer")(FEATURES, device=cpu), True),
        ("KRNN", lambda: of("krnn", "KRNNModel")(FEATURES, 64, 3, 64, 3, 2, 0.0, cpu), None),
        ("Sandwich", lambda: of("sandwich", "SandwichModel")(FEATURES, 64, 32, 3, 16, 8, 3, 2, 0.0, cpu), None),
        ("SFM", lambda: of("sfm", "SFM_Model")(FEATURES, device="cpu"), True),
    ]
    for name, make, flat in made:
        whole = make if flat is None else (lambda make=make, flat=flat: Flat(make(), flat=flat))
        yield Layer("pyqlib", name, lambda _w, _t, whole=whole: whole())


def _tsai(library: Any) -> Iterator[Layer]:
    build = importlib.import_module("tsai.models.utils").build_ts_model
    shapes = {"c_in": FEATURES, "c_out": 1, "device": "cpu"}
    for name in TSAI.split():
        arch = getattr(library, name)
        yield Layer(
            "tsai", name, lambda _, timesteps, arch=arch: Flat(build(arch, seq_len=timesteps, **shapes), flat=False)
        )
