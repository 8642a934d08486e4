#!/usr/bin/env bash
# transformers 5.24.0: the additive attention of SwiftFormer attends to nothing. Its weights are a softmax over the last
# axis of query @ w_g, which has one entry (batch, tokens, 1), so that each token has the weight 1 whatever w_g is: what
# is summed over tokens is the plain sum of the queries. w_g gets a gradient of exactly 0, or of rounding, and never
# learns anything; with weight decay it only shrinks.
#
# What is seen: of a model from its configuration, with no weights loaded, every weight that the softmax gives is 1; the
# output stays the same when w_g is drawn anew; and in float64 the gradient of each w_g is 0 (below 1e-16 of that of
# to_query). Fails if that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 numpy
cat > "$work/attends.py" <<'PY'
import sys

import torch
import transformers
from transformers import SwiftFormerConfig, SwiftFormerForImageClassification

torch.manual_seed(0)
config = SwiftFormerConfig(
    image_size=64, depths=[1, 1, 1, 1], embed_dims=[16, 16, 16, 16], num_labels=4, drop_path_rate=0.0
)
model = SwiftFormerForImageClassification(config).double().eval()
pictures = torch.randn(8, 3, 64, 64, dtype=torch.float64)

weights, softmax = [], torch.Tensor.softmax


def seen(self, *args, **kwargs):
    weights.append(softmax(self, *args, **kwargs))
    return weights[-1]


torch.Tensor.softmax = seen
before = model(pictures).logits
torch.Tensor.softmax = softmax
named = dict(model.named_parameters())
queries = [name for name in named if name.endswith("w_g")]
torch.nn.functional.cross_entropy(before, torch.arange(8) % 4).backward()
shares = [
    float(named[name].grad.norm() / named[name.replace("w_g", "to_query.weight")].grad.norm()) for name in queries
]
with torch.no_grad():
    for name in queries:
        named[name].normal_(std=10.0)
    changed = float((model(pictures).logits - before).abs().max())
ones = all(bool((w == 1).all()) for w in weights)
print(f"transformers {transformers.__version__}, torch {torch.__version__}: {len(queries)} additive attentions, whose")
print(f"weights have the shapes {sorted({tuple(w.shape) for w in weights})}; all of them are 1: {ones}")
print(f"gradient of w_g over that of to_query: at most {max(shares):.1g}; logits change by {changed:.1g} with another w_g")
sys.exit(not (len(queries) == 4 and len(weights) == 4 and ones and max(shares) < 1e-16 and changed == 0))
PY
"$work/venv/bin/python" "$work/attends.py"
