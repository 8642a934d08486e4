#!/usr/bin/env bash
# transformers 5.24.0: RWKV cannot be trained, nor asked for any derivative, in evaluation mode. There it keeps the state for
# the next call by default (`use_cache`), and writes it in place layer by layer into tensors that autograd still needs, so
# that backward raises a RuntimeError. In training mode it keeps none. So whoever turns dropout off by `eval()` while
# training something (an adapter, a prompt, an input), or asks what a word does to the output (saliency, a horizon), needs
# `use_cache=False`. Mamba and GPT-2, which keep a cache too, have their derivatives in both modes.
#
# Fails if that is otherwise.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0
cat > "$work/gradients.py" <<'PY'
import sys
import warnings

import torch
import transformers

warnings.simplefilter("ignore")
transformers.logging.set_verbosity_error()
from transformers import (  # noqa: E402
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
)


def differentiable(model, *, training, **how):
    """Return whether a loss goes back through a model, and what torch says."""
    torch.manual_seed(0)
    model.train(training).zero_grad()
    try:
        model(torch.randint(0, 32, (2, 12)), **how).logits.sum().backward()
    except RuntimeError as error:
        return False, str(error).split(":")[0]
    return all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters()), ""


print(f"transformers {transformers.__version__}, torch {torch.__version__}: does a loss go back?")
small = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2}
rwkv = RwkvForCausalLM(RwkvConfig(**small, attention_hidden_size=16, context_length=64))
mamba = MambaForCausalLM(MambaConfig(**small, state_size=4))
gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=64))
seen = {
    "RWKV, training": differentiable(rwkv, training=True),
    "RWKV, evaluation": differentiable(rwkv, training=False),
    "RWKV, evaluation, use_cache=False": differentiable(rwkv, training=False, use_cache=False),
    "Mamba, evaluation": differentiable(mamba, training=False),
    "GPT-2, evaluation": differentiable(gpt2, training=False),
}
for name, said in seen.items():
    print(f"{name}:", *said)
sys.exit([there for there, _ in seen.values()] != [True, False, True, True, True])
PY
"$work/venv/bin/python" "$work/gradients.py"
