#!/usr/bin/env bash
# torch 2.13.0: torch.optim.Muon orthogonalises in bfloat16 whatever the dtype of the parameter.
#
# The update of a float32 or float64 parameter holds only numbers that bfloat16 can represent. A CPU that has no bf16
# units emulates those products, some 20 times slower than float32. The documentation names no precision.
# Seen: rounding the update to bfloat16 changes nothing, for both dtypes; its singular values but the least lie between 0.5 and 1.3.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import torch

torch.manual_seed(0)
for dtype in (torch.float32, torch.float64):
    weight = torch.nn.Parameter(torch.zeros(64, 64, dtype=dtype))
    weight.grad = torch.randn(64, 64, dtype=dtype)
    torch.optim.Muon([weight], lr=1.0, weight_decay=0.0).step()
    update = weight.detach()
    assert torch.equal(update, update.bfloat16().to(dtype)), "the update has more bits than bfloat16 holds"
    values = torch.linalg.svdvals(update.double())[:-1]  # of a square matrix the last one is near 0
    assert 0.5 < values.min() and values.max() < 1.3, values
    print(dtype, "the update is exactly bfloat16, singular values", f"{values.min():.2f} to {values.max():.2f}")
PYTHON
