"""Operations are counted on a CPU too, attention and all, and a run that goes on counts on."""

import pytest
import torch
import torch.nn.functional as F

from megactx.framework.app import run
from megactx.framework.callbacks.flops import Counter


def test_attention_of_the_cpu_is_counted_forward_and_backward():
    q = torch.randn(1, 2, 16, 8, requires_grad=True)
    mask = torch.ones(1, 1, 16, 16, dtype=torch.bool).tril()
    with Counter() as counted:
        out = F.scaled_dot_product_attention(q, q, q, attn_mask=mask)
    assert counted.total == 2 * 2 * 2 * 16 * 16 * 8  # two products, two heads, multiply and add
    with Counter() as counted:
        out.sum().backward()
    assert counted.total == 5 * 2 * 2 * 16 * 16 * 8  # the scores again, and two products for each of two


@pytest.mark.slow
def test_a_run_counts_what_its_batches_take_and_nothing_else_changes(gist_settings, tmp_path):
    def last(name):
        return torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)

    short = [*gist_settings, "preset.steps=2", "stage.evaluate.controls=false", "stage.evaluate.copies=0"]
    assert run([*short, f"folder={tmp_path / 'plain'}"]) == 0
    assert run([*short, "callbacks=counted", f"folder={tmp_path / 'counted'}"]) == 0
    total = last("counted")["callbacks"]["Flops"]["total"]
    assert total > 1e6
    rows = (tmp_path / "counted" / "metrics.csv").read_text().splitlines()
    at = rows[0].split(",").index("train/flops")
    assert max(float(row.split(",")[at] or 0) for row in rows[1:]) == total
    for name, value in last("plain")["state_dict"].items():
        assert torch.equal(value, last("counted")["state_dict"][name])
    resumed = [*short, "callbacks=counted", "preset.steps=3", f"folder={tmp_path / 'on'}"]
    assert run([*resumed, f"resume={tmp_path / 'counted'}"]) == 0
    assert total < last("on")["callbacks"]["Flops"]["total"] < 2 * total
