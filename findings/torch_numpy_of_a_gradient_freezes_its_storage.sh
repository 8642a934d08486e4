#!/usr/bin/env bash
# torch 2.13.0 with numpy 2.3.5: `tensor.numpy()` only seems to read. From then on the tensor's storage cannot be resized
# (`untyped_storage().resizable()` is False), for good, even when the array is gone, and `untyped_storage().resize_(0)`,
# by which sharded training frees gathered weights and gradients, raises "Trying to resize storage that is not resizable".
# So a monitor that takes the norm of a gradient by `grad.numpy()` can end a training that it only looks at.
# `numpy.from_dlpack(tensor)` gives the same view of the same memory and leaves the storage as it was.
#
# Fails if that is otherwise.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.3.5
cat > "$work/storage.py" <<'PY'
import gc
import sys

import numpy as np
import torch


def after(look):
    """Return whether a gradient can be resized once it was looked at, and what trying it says."""
    layer = torch.nn.Linear(64, 64)
    layer(torch.ones(2, 64)).sum().backward()
    gradient = layer.weight.grad
    norm = float(np.linalg.norm(look(gradient)))
    gc.collect()
    storage = gradient.untyped_storage()
    resizable, said = storage.resizable(), "resized"
    try:
        storage.resize_(0)
    except RuntimeError as error:
        said = str(error).splitlines()[0]
    return norm > 0, resizable, said


print(f"torch {torch.__version__}, numpy {np.__version__}: norm above 0, resizable, and what resize_(0) says")
found = {
    "not looked at": after(lambda g: np.ones(1)),
    "numpy.from_dlpack": after(np.from_dlpack),
    "Tensor.numpy": after(lambda g: g.numpy()),
    "Tensor.detach().numpy": after(lambda g: g.detach().numpy()),
}
for how, what in found.items():
    print(f"{how:22}", *what)
sound = (True, True, "resized")
frozen = [found["Tensor.numpy"], found["Tensor.detach().numpy"]]
expected = found["not looked at"] == found["numpy.from_dlpack"] == sound
sys.exit(not expected or any(what[1] or "not resizable" not in what[2] for what in frozen))
PY
"$work/venv/bin/python" "$work/storage.py"
