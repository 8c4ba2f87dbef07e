#!/usr/bin/env bash
# torchmetrics 1.9.0: a MetricCollection merges two metrics for good if their states agree after the first batch.
#
# Two metrics of one class that differ in what they count (here: all values, and values from the fourth on) share their
# states from then on, when the first batch happens not to tell them apart. Later batches do, and both give one result.
# compute_groups=False keeps them apart.
# Seen: 6.0 for both with the default, 6.0 and 4.0 without groups.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -q --disable-pip-version-check torch==2.13.0 torchmetrics==1.9.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import torch
from torchmetrics import Metric, MetricCollection


class Total(Metric):
    def __init__(self, first):
        super().__init__()
        self.first = first
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, values):
        self.total += values[self.first :].sum()

    def compute(self):
        return self.total


found = {}
for groups in (True, False):
    both = MetricCollection({"all": Total(0), "body": Total(2)}, compute_groups=groups)
    both.update(torch.tensor([0.0, 0.0, 1.0, 1.0]))
    both.update(torch.tensor([1.0, 1.0, 1.0, 1.0]))
    found[groups] = {name: value.item() for name, value in both.compute().items()}
print("with groups", found[True], "without", found[False])
assert found[False] == {"all": 6.0, "body": 4.0}
assert found[True]["all"] == found[True]["body"] == 6.0
PYTHON
