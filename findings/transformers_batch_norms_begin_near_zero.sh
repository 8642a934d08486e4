#!/usr/bin/env bash
# transformers 5.24.0: EfficientNet, MobileViT and MobileViTV2, made from their configurations (not from a checkpoint), have
# batch normalizations whose weights are drawn from N(0, 0.02) in place of ones: _init_weights treats them as it does linear
# layers. Each of them lets a fiftieth of the signal through, and the gradient on its way back. Of the default EfficientNet
# (163 of them) what is left of a picture is 1e-28 at the head, and of the gradient of its convolutions 1e-20 or less of
# what it is with ones, a third of them exactly 0 in float32, so that it cannot be trained from scratch. RegNet and
# MobileNetV2 begin with ones.
#
# Fails if that is otherwise.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0
cat > "$work/norms.py" <<'PY'
import sys
import warnings

import torch
import transformers
from transformers import AutoConfig, AutoModelForImageClassification

warnings.simplefilter("ignore")
print(f"transformers {transformers.__version__}, torch {torch.__version__}: weights of batch normalizations")


def made(name):
    torch.manual_seed(0)
    return AutoModelForImageClassification.from_config(AutoConfig.for_model(name, num_labels=2)).train()


def norms(model):
    return [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]


def typical(model):
    """Return the mean size of their weights."""
    return torch.cat([m.weight.detach().abs() for m in norms(model)]).mean().item()


def trained(model):
    """Return the largest score of some pictures, the largest gradient of a convolution, and how many get none at all."""
    torch.manual_seed(0)
    out = model(pixel_values=torch.randn(4, 3, 224, 224), labels=torch.tensor([0, 1, 0, 1]))
    out.loss.backward()
    gradients = [m.weight.grad.abs().max().item() for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    return out.logits.abs().max().item(), max(gradients), gradients.count(0.0) / len(gradients)


sizes = {name: typical(made(name)) for name in ("efficientnet", "mobilevit", "mobilevitv2", "regnet", "mobilenet_v2")}
for name, size in sizes.items():
    print(f"{name:13} mean size {size:.3f}")
near_zero = [name for name, size in sizes.items() if size < 0.02]

model, other = made("efficientnet"), made("efficientnet")
with torch.no_grad():
    for norm in norms(other):
        norm.weight.fill_(1.0)
seen = near_zero == ["efficientnet", "mobilevit", "mobilevitv2"]
for what, one in (("as it is made", model), ("with ones", other)):
    score, largest, none = trained(one)
    print(f"efficientnet {what}: largest score {score:.0e}, largest gradient {largest:.0e}, none at {none:.0%}")
    seen &= (score < 1e-20 and largest < 1e-20 and none > 0.3) if one is model else (largest > 1e-3 and none == 0)
sys.exit(0 if seen else 1)
PY
"$work/venv/bin/python" "$work/norms.py"
