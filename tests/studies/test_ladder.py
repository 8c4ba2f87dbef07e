"""The ladder: all carriers trained in one run, measured on the same blocks, combined over seeds."""

import csv
import json
import math

import pytest
import torch

from megactx.stages.gist import GistStage
from megactx.studies.ladder import Ladder, main
from megactx.studies.ladder_report import combine
from megactx.studies.trained import load

SMALL = [
    "block_size=8",
    "preset.min_tokens=200",
    "preset.max_tokens=256",
    "stage.evaluate.copies=0",
    "stage.evaluate.controls=false",
    "stage.evaluate.history=6",
    "loss.history.segment=16",
    "loss.history.recency=32",
    "stage.ladder.oracle=3",
    "stage.ladder.history_oracle=2",
    "stage.ladder.oracle_steps=2",
]


@pytest.fixture(scope="module")
def runs(gist_settings, tmp_path_factory):
    """Two seeds of experiment=ladder in miniature."""
    folder, out = tmp_path_factory.mktemp("ladder"), []
    own = [o for o in gist_settings if not o.startswith(("experiment=", "gistnet.", "preset.m"))]
    heads = [f"stage.controls.{name}.num_heads=4" for name in ("gistnet_original", "gistnet_hidden", "gistnet_context")]
    for seed in (0, 1):
        out.append(folder / f"seed{seed}")
        settings = [*own, *[f"+{head}" for head in heads], *SMALL, "gistnet.num_heads=4", f"seed={seed}"]
        assert main([*settings, f"folder={out[-1]}"]) == 0
    return out


@pytest.mark.long
def test_every_carrier_stands_on_the_same_blocks_with_its_bytes(runs):
    numbers = json.loads((runs[0] / "ladder.json").read_text())["runs"][0]
    carriers = numbers["carriers"]
    trained = {"gistnet", "blockmean_linear", "blockmean_mlp", "gistnet_original", "gistnet_hidden", "gistnet_context"}
    by_keys = {"gisting", "gisting_shift", "gisting_separate", "gistpool", "avgpool", "avgpool at the end"}
    untrained = {
        "last token",
        "random gist",
        "another block's gist",
        "untrained mean (raw)",
        "untrained mean (rescaled)",
    }
    assert set(carriers) == trained | by_keys | untrained
    assert all(carriers[name]["bytes_per_token"] == 2 * 32 / 8 for name in trained)
    assert all(carriers[name]["bytes_per_token"] == 2 * 2 * 2 * 32 / 8 for name in by_keys), "layers, keys and values"
    for key in ("all", "h0"):
        assert all((key in carrier) != (name in by_keys) for name, carrier in carriers.items()), "no row at h = 0"
    assert {name for name in carriers if "all_below_subject" in carriers[name]} == (trained | untrained) - {"gistnet"}
    assert {"oracle-fit", "oracle-transfer", "gistnet", "gistpool"} <= set(numbers["oracle"]["recovery"])
    assert {"oracle-fit", "oracle-transfer", "gistnet", "gistpool"} <= set(numbers["history oracle"]["recovery"])
    assert all("history" in carriers[name] for name in trained | by_keys | {"last token"})


@pytest.mark.long
def test_tables_csv_and_picture_are_written(runs):
    text = (runs[0] / "ladder.md").read_text()
    assert "the ladder" in text and "a vector fitted to every block" in text and "**gistnet**" in text
    assert "| all h | h >= 1 | h >= 4 | history |" in text and "| vs all h |" in text
    with (runs[0] / "ladder.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len({row["carrier"] for row in rows if row["span"] == "h >= 1"}) == 17
    assert {"recovery", "behind", "gain", "bytes_per_token", "parameters"} <= {row["metric"] for row in rows}
    assert {"all h", "h >= 1", "h >= 4", "history", "oracle, h >= 1"} <= {row["span"] for row in rows}
    assert (runs[0] / "ladder.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.long
def test_seeds_are_combined_into_mean_and_spread(runs, capsys):
    assert main([str(folder) for folder in runs]) == 0
    assert "±" in capsys.readouterr().out
    found = [json.loads((folder / "ladder.json").read_text())["runs"][0] for folder in runs]
    points = [run["carriers"]["gistnet"]["gain"]["point"] for run in found]
    gain = combine(found)["carriers"]["gistnet"]["gain"]
    assert math.isclose(gain["point"], sum(points) / 2) and math.isclose(
        gain["std"], torch.tensor(points).std().item(), rel_tol=1e-4
    )
    both = combine(found)["carriers"]
    assert "std" not in both["last token"]["gain"], "what learns nothing is the same in both"
    ends = [run["carriers"]["gistnet"]["gain"]["low"] for run in found]
    assert both["gistnet"]["gain"]["low"] == pytest.approx(sum(ends) / 2)
    assert (runs[0].parent / "ladder.md").exists()


@pytest.mark.long
def test_a_run_on_other_blocks_is_not_combined(runs):
    one, two = (json.loads((folder / "ladder.json").read_text())["runs"][0] for folder in runs)
    with pytest.raises(ValueError, match="the runs differ in block_hash"):
        combine([one, two | {"block_hash": "another"}])


@pytest.mark.long
def test_no_rung_is_favoured_by_a_checkpoint_that_the_validation_of_one_chose(runs):
    assert not (runs[0] / "checkpoints" / "best.ckpt").exists()
    numbers, ladder = json.loads((runs[0] / "ladder.json").read_text())["runs"][0], load([runs[0]])[0]
    last = torch.load(runs[0] / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(value, last[f"nets.gistnet.{key}"]) for key, value in ladder.main.state_dict().items())
    assert set(ladder.nets) <= set(numbers["carriers"])


@pytest.mark.long
def test_its_checkpoint_loads_from_its_path_alone_and_holds_no_weight_of_the_base(runs):
    path = runs[0] / "checkpoints" / "last.ckpt"
    stage = Ladder.load_from_checkpoint(path)
    assert isinstance(stage, GistStage) and stage.hparams.ladder["oracle"] == 3
    saved = torch.load(path, weights_only=True)["state_dict"]
    assert all(name.startswith("nets.") for name in saved)
    assert not any("base_layer" in name or "embed_tokens" in name for name in saved)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["no-such-run"], "no-such-run: there is no ladder.json"),
        (["no-such-run", "seed=1"], "not both"),
        (["stage.ladder.oracle=-1"], "stage.ladder.oracle=-1"),
        (["+stage.lrr=1"], "stage.lrr"),
    ],
)
def test_mistakes_are_told_in_one_message(arguments, named, capsys):
    assert main(arguments) == 2
    assert named in capsys.readouterr().err
