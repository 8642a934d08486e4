#!/usr/bin/env bash
# tsai 1.0.1: in five of its models a recurrent layer or attention goes along the batch in place of time, because it takes the
# first dimension for time and is given rows first: TSSequencerPlus (its LSTM), TransformerRNNPlus, TransformerLSTMPlus and
# TransformerGRUPlus (their recurrent layers, and their encoder, which is made with batch_first=True and given timesteps first),
# and TSSequencer. In evaluation mode, what such a model says of one series changes with what else is in the batch; LSTMPlus
# and TST of the same library, of which each row is told by itself, do not do that. Nothing warns of it, and training goes on.
# (pyts is pinned because tsai 1.0.1 takes pyts 0.14 too, with which `import tsai.all` fails: it has no pyts.image.gaf.)
#
# Fails if that is otherwise. fastai wants torchvision, which brings the CUDA build of torch: some gigabytes, half an hour.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.14.1 torchvision==0.29.1
"$work/venv/bin/pip" install --quiet tsai==1.0.1 pyts==0.13.0
cat > "$work/rows.py" <<'PY'
import sys
import warnings

import torch

warnings.simplefilter("ignore")
import tsai  # noqa: E402
from tsai.models import all as models  # noqa: E402
from tsai.models.utils import build_ts_model  # noqa: E402


def change(name):
    """Return by how much the answer for the first series changes when the others are drawn anew."""
    torch.manual_seed(0)
    model = build_ts_model(getattr(models, name), c_in=3, c_out=2, seq_len=20).eval()
    x, others = torch.randn(8, 3, 20), torch.randn(7, 3, 20)
    with torch.no_grad():
        before, after = model(x)[0], model(torch.cat([x[:1], others]))[0]
    return float((after - before).abs().max() / before.abs().max())


print(f"tsai {tsai.__version__}, torch {torch.__version__}: change of one answer when the other rows change, in evaluation mode")
names = ["TSSequencer", "TSSequencerPlus", "TransformerRNNPlus", "TransformerLSTMPlus", "TransformerGRUPlus", "LSTMPlus", "TST"]
seen = {name: change(name) for name in names}
for name, size in seen.items():
    print(f"{name:20} {size:.1e}")
sys.exit([size > 1e-3 for size in seen.values()] != [True] * 5 + [False] * 2)
PY
"$work/venv/bin/python" "$work/rows.py"
