"""The study of presets: what each form of a prompt costs, and that the exact ones cost nothing."""

import json

import pytest
import torch

from megactx.evaluation.table import Table
from megactx.studies.presets import CACHE, COARSE, FINE, NEWEST, NOTHING, OTHER, WHOLE, Forms, main, report


def test_keys_and_values_of_a_prompt_say_what_the_prompt_says_and_a_preset_has_an_entry_per_block(models, tmp_path):
    ids = torch.randint(2, 512, (2, 1 + 64 + 16), generator=torch.Generator().manual_seed(0))
    ids[:, 0] = 0
    found = Forms(models, tmp_path, ids[0], ids[1], 64).measured()
    torch.testing.assert_close(found[CACHE]["nll"], found[WHOLE]["nll"], atol=1e-4, rtol=1e-4)
    entries = {name: form["entries"] for name, form in found.items()}
    assert entries == {WHOLE: 64, CACHE: 64, FINE: 16, COARSE: 1, NEWEST: 16, NOTHING: 0, OTHER: 16}
    assert all(form["nll"].isfinite().all() and form["ms"] > 0 for form in found.values())
    losses = [float(found[name]["nll"].mean()) for name in (FINE, COARSE, OTHER, NOTHING, NEWEST, WHOLE)]
    assert len({*losses}) == 6
    table = report([found, found], {"answer": 16, "prompt": 64}).table
    assert table.point(carrier=WHOLE, metric="above") == 0
    assert table.point(carrier=FINE, metric="above") == pytest.approx(losses[0] - losses[5], abs=1e-5)


@pytest.mark.slow
def test_the_command_leaves_tables_and_refuses_what_is_not_allowed(exported, texts, tmp_path, capsys):
    given = [str(exported), "--path", str(texts), "--documents", "2", "--answer", "16", "--out", str(tmp_path / "out")]
    assert main([*given, "--prompt", "64"]) == 0
    table = Table(json.loads((tmp_path / "out" / "presets.json").read_text())["table"])
    assert {FINE, WHOLE, CACHE} <= {*table.names("carrier")} and table.point(carrier=FINE, metric="entries") == 16
    assert main([*given, "--prompt", "63"]) == 2
    assert "--prompt=63 is not allowed: a multiple of block_size=4" in capsys.readouterr().err
