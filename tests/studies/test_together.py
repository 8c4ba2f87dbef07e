"""Runs that learned together and apart, in one table; and the whole road in miniature."""

import json
import math
from pathlib import Path

import pytest
import torch

from megactx.evaluation.table import Report, Table
from megactx.framework.app import run
from megactx.studies.together import DROP, main, name_of, plot, sheet, summarise


def found(name: str, nll: list[float], own_full: list[float]) -> dict:
    given = {"lens": {"0.25": nll}, "recency": {"0.25": [value + 0.5 for value in nll]}, "own_full": own_full}
    given |= {"swap_rate": {"0.25": [0.1, 0.3]}, "base_lost": 0.1, "adapter_parameters": 7}
    return given | {"name": name, "steps": 10, "tokens": None, "flops": None, "recovery_body": {"point": 0.5}}


def test_cost_is_above_the_untouched_base_and_differences_are_paired_with_the_first_run():
    generator = torch.Generator().manual_seed(0)
    full = 2 + torch.rand(50, generator=generator, dtype=torch.float64)
    first = found("apart", (full + 0.4).tolist(), full.tolist())
    # Its own full context is worse, which must gain it nothing.
    seeds = [found("together", (full + cost).tolist(), (full + 1).tolist()) for cost in (0.1, 0.2)]
    dropped = {"0.25": (full + 0.3).tolist()}
    table = summarise([first, *seeds], full, torch.arange(50), dropped)
    apart, together, alone = (table.pick(run=name, carrier=None) for name in ("apart", "together", DROP))
    assert apart.point(metric="cost") == pytest.approx(0.4) and together.point(metric="cost") == pytest.approx(0.15)
    each = table.pick(run="together", metric="cost")[1:]
    assert [row["point"] for row in each] == pytest.approx([0.1, 0.2]) and together.point(metric="seeds") == 2
    paired = table.pick(run="together", metric="less")[1:]
    assert [row["point"] for row in paired] == pytest.approx([-0.3]), "with the seeds that there are"
    assert together.one(metric="less")["high"] == pytest.approx(-0.3) and apart.point(metric="less") == 0
    assert together.point(metric="recency") == pytest.approx(0.65)
    assert together.point(metric="own_full") == pytest.approx(1)
    assert together.point(metric="swap_rate") == pytest.approx(0.2)
    assert together.point(metric="base_lost") == pytest.approx(0.1)
    assert alone.point(metric="less") == pytest.approx(-0.1)
    lines = sheet(table, "0.25").rows
    assert [line[0] for line in lines] == ["apart", "together", DROP]
    assert lines[1][7] == "-0.300" and lines[2][8:] == ["-"] * 4


def test_folders_that_are_numbers_are_seeds_of_the_folder_above():
    assert name_of(Path("/a/runs/end/0")) == name_of(Path("/a/runs/end/1")) == name_of(Path("/a/runs/end")) == "end"
    assert name_of(Path("/a/study/end/0")) == "study/end"


def test_a_folder_that_is_no_run_is_told(tmp_path, capsys):
    assert main([str(tmp_path / "nothing")]) == 2
    assert "there is no such run folder" in capsys.readouterr().err
    assert main([str(tmp_path)]) == 2
    assert "there is no checkpoint in it" in capsys.readouterr().err


@pytest.mark.long
def test_from_a_gist_run_over_a_lens_run_to_parts_that_learn_together_and_are_exported(
    gist_settings, base_folder, texts, tmp_path, capsys
):
    """All runs have one GistNet architecture; each starts from the one before."""
    gist = [o for o in gist_settings if not o.startswith(("preset.min", "preset.max"))]
    gist += ["block_size=8", "horizon.tokens=8", "preset.min_tokens=200", "preset.max_tokens=256"]
    assert run([*gist, f"folder={tmp_path / 'gist'}", "stage.evaluate.controls=false"]) == 0
    shared = [
        *["preset=demo", "data=files", f"data.path={texts}", f"base.name={base_folder}", "block_size=8"],
        *["data.weights={narrative: 0.5, code: 0.5, structured: 0}", "horizon.tokens=8", "lensnet.num_heads=4"],
        *[f"stage.gistnet={tmp_path / 'gist'}", "datamodule.min_tokens=300", "datamodule.max_tokens=400"],
        *["preset.validate_every=2", "stage.budgets=[0.6]", "stage.evaluate.documents=2", "preset.warmup=1"],
        *["stage.evaluate.tokens=300", "stage.evaluate.budgets=[0.6]", "stage.evaluate.planted=0"],
        *["stage.evaluate.oracle=0", "trainer=cpu", "trainer.precision=32-true"],
    ]
    lens = ["experiment=lens", "preset.steps=2", "stage.windows={per_round: 2, rounds: 1, edits: 4}"]
    assert run([*shared, *lens, f"folder={tmp_path / 'lens'}"]) == 0
    start = f"stage.init={tmp_path / 'lens'}"
    turn = ["experiment=alternating", start, "stage.cycles=1", "stage.steps={gist: 1, lens: 2, lora: 1}"]
    turn += ["stage.windows.per_round=2", "datamodule.spans=2"]
    assert run([*shared, *turn, f"folder={tmp_path / 'turn'}"]) == 0
    assert "GistNet, LensNet" in capsys.readouterr().out
    once = ["experiment=end_to_end", f"stage.init={tmp_path / 'turn'}", "stage.train_base=lora", "stage.lora.rank=8"]
    once += ["preset.steps=2", "stage.windows={sources: 1, variants: 3, per_pass: 2}"]
    assert run([*shared, *once, f"folder={tmp_path / 'once'}"]) == 0
    assert "GistNet, LensNet, base LM" in capsys.readouterr().out
    folders = [str(tmp_path / name) for name in ("gist", "lens", "turn", "once")]
    sizes = ["--documents", "3", "--tokens", "300", "--budgets", "0.6", "--blocks", "8", "--path", str(texts)]
    assert main([*folders, *sizes, "--out", str(tmp_path / "table")]) == 0
    table = Table(json.loads((tmp_path / "table.json").read_text())["table"])
    runs = table.names("run")
    assert [name.split("/")[-1] for name in runs] == ["gist", "lens", "turn", "once", DROP]
    assert [math.isnan(table.point(run=name, metric="tokens")) for name in runs[:4]] == [True, True, False, False]
    assert (tmp_path / "table.png").read_bytes()[:4] == b"\x89PNG"
    assert table.point(run=runs[0], metric="base_lost") == table.point(run=runs[1], metric="base_lost") == 0
    assert table.point(run=runs[3], metric="adapter_parameters") > 0


def test_a_stem_with_a_dot_keeps_it(tmp_path):
    Report("Title", Table([{"metric": "a", "point": 1.0}]), []).write(tmp_path / "table_0.125")
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"table_0.125.{kind}" for kind in ("csv", "json", "md")]


def test_a_run_whose_tokens_were_not_counted_and_an_undefined_interval_do_not_stop_the_picture(tmp_path):
    nan = float("nan")
    table = Table()
    for name, taken, low in (("a", {"tokens": 100, "flops": None}, nan), ("b", {"tokens": None, "flops": 1e9}, 0.0)):
        table.add("less", {"point": 0.1, "low": low, "high": 2 * low}, run=name, span="0.25")
        for metric, value in taken.items():
            table.add(metric, value, run=name, span="0.25")
    table.add("less", {"point": 0.1, "low": 0.0, "high": 0.2}, run=DROP, span="0.25")
    plot(table, tmp_path / "a.png")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
