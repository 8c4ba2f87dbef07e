"""The command that measures carriers over several horizons of the same blocks."""

import csv
import json

import pytest

from megactx.evaluation.bootstrap import recovery_intervals
from megactx.evaluation.measure import measure
from megactx.studies.horizons import BANDS, main, study
from megactx.studies.trained import held_out, load

SIZES = ["--horizons", "8", "16", "--tokens", "128", "--blocks", "6"]


def test_a_shorter_horizon_is_the_same_blocks_measured_over_fewer_tokens(trained_runs, texts):
    runs = load(trained_runs[:1])
    numbers = study(runs, str(texts), [16, 8], 128, 6)
    assert list(numbers["horizons"]) == [8, 16]
    batches = held_out(runs[0].base, str(texts), 8, 16, 128, 6)
    short = measure(runs[0].base, runs[0].nets, batches, 8)
    for band, first in BANDS.items():
        found, expected = numbers["horizons"][8][band], recovery_intervals(short, ["gistnet", "last token"], first)
        for name, value in expected.items():
            assert found["recovery"][name]["point"] == pytest.approx(value.point, abs=1e-4, nan_ok=True)
        assert found["cost"] == pytest.approx((short.drop - short.full)[:, first:].mean().item(), abs=1e-5)


def test_the_command_writes_tables_and_names_the_runs(trained_runs, texts, capsys):
    assert main([*map(str, trained_runs), "--path", str(texts), *SIZES]) == 0
    assert "H = 16" in capsys.readouterr().out
    text = (trained_runs[0] / "horizons.md").read_text()
    assert "prose: gistnet" in text and "code: blockmean_linear" in text and "cost of a dropped block" in text
    numbers = json.loads((trained_runs[0] / "horizons.json").read_text())
    assert numbers["subject"] == "prose: gistnet" and set(numbers["horizons"]) == {"8", "16"}
    with (trained_runs[0] / "horizons.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["horizon"] for row in rows} == {"8", "16"} and {row["first"] for row in rows} == {"1", "4"}
    assert len(rows) == 2 * 2 * len(numbers["horizons"]["8"]["body"]["recovery"])


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (["--horizons", "4"], "--horizons=[4]"),
        (["--horizons", "8", "8"], "--horizons=[8, 8]"),
        (["--blocks", "0"], "--blocks=0"),
        (["--horizons", "128", "--tokens", "128"], "--tokens=128"),
    ],
)
def test_a_setting_that_is_not_allowed_is_named(given, named, trained_runs, capsys):
    assert main([str(trained_runs[0]), *given]) == 2
    assert named in capsys.readouterr().err
