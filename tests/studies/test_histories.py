"""The command that measures finished runs behind many compressed histories."""

import csv
import json

import pytest
import torch

from megactx.evaluation.scores import MORE_RAW, BlockScores
from megactx.evaluation.table import Table
from megactx.studies.histories import main, sheets, summarise

RUNS = {"0": ["net", "rare"], "1": ["net"]}
SIZES = ["--segment", "16", "--recency", "16", "--tokens", "128", "--count", "5"]


def scores():
    """Four histories of two documents: full 1, nothing 2 nats; two seeds of ``net``, ``rare`` in the first alone."""
    shape = (4, 3)
    values = {"0: net": 1.5, "1: net": 1.7, "0: rare": 1.2, "last token": 1.9, MORE_RAW: 1.8}
    carriers = {name: torch.full(shape, value) for name, value in values.items()}
    document, start = torch.tensor([0, 0, 1, 1]), torch.tensor([96, 160, 96, 160])
    about = {"domain": ["code"] * 4, "document": document, "start": start}
    return BlockScores(full=torch.ones(shape), drop=torch.full(shape, 2.0), carriers=carriers, **about)


def test_seeds_are_averaged_history_by_history_and_each_stands_beside():
    table = summarise(scores(), RUNS)
    assert {*table.pick(metric="gain").names("carrier")} == {"net", "rare", "last token"}
    assert table.point(carrier="net", metric="recovery", run=None) == pytest.approx(0.4)
    each = [row["point"] for row in table.pick(carrier="net", metric="recovery") if "run" in row]
    assert each == pytest.approx([0.5, 0.3])
    assert not [row for row in table.pick(carrier="last token") if "run" in row]
    assert table.point(carrier="net", metric="gain") == pytest.approx(0.2)
    assert table.point(metric="cost") == pytest.approx(1.0)
    assert table.point(carrier="rare", metric="behind") == pytest.approx(-0.4)
    assert table.point(carrier=MORE_RAW, metric="recovery") == pytest.approx(0.2)


def test_the_best_stands_first_and_the_verdict_is_that_of_the_paired_interval():
    (sheet,) = sheets(summarise(scores(), RUNS), scores(), {"segment": 3, "recency": 32}, "net")
    assert [row[0] for row in sheet.rows] == ["rare", "net", "last token"] and sheet.strong == (1,)
    assert [row[-1] for row in sheet.rows] == ["above", "", "below"]
    assert [row[2] for row in sheet.rows] == ["0.800", "0.500 0.300", ""]


@pytest.mark.slow
def test_the_command_measures_runs_and_controls(trained_runs, texts, capsys):
    assert main([*map(str, trained_runs), "--path", str(texts), *SIZES]) == 0
    assert "5 histories" in capsys.readouterr().out
    numbers = json.loads((trained_runs[0] / "histories.json").read_text())
    table = Table(numbers["table"])
    assert {"gistnet", "blockmean_linear", "avgpool", "last token", "random gist"} <= {*table.names("carrier")}
    assert table.pick(carrier="gistnet", metric="recovery").names("run") == numbers["runs"] == ["prose", "code"]
    with (trained_runs[0] / "histories.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(table)
    assert main([str(trained_runs[0]), "--path", str(texts), *SIZES, "--only", "blockmean_linear"]) == 0
    only = json.loads((trained_runs[0] / "histories.json").read_text())
    found = Table(only["table"])
    assert only["subject"] == "blockmean_linear" and "gistnet" not in found.names("carrier")
    assert only["hash"] == numbers["hash"]
    assert found.point(metric="cost") == pytest.approx(table.point(metric="cost"), rel=1e-5)
    assert "**blockmean_linear**" in (trained_runs[0] / "histories.md").read_text()


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (["--segment", "12"], "--segment=12"),
        (["--recency", "0"], "--recency=0"),
        (["--count", "0", "--recency", "16", "--segment", "16"], "--count=0"),
        (["--only", "nothing-of-it"], "--only=nothing-of-it"),
        (["--tokens", "40", "--recency", "16", "--segment", "16"], "--tokens=40"),
    ],
)
@pytest.mark.slow
def test_a_setting_that_is_not_allowed_is_named(given, named, trained_runs, capsys):
    assert main([str(trained_runs[0]), *given]) == 2
    assert named in capsys.readouterr().err
