"""The command that asks trained gists for exact facts: its numbers, its tables, what it says of a weak base."""

import csv
import json
import math

import pytest

from megactx.data.probes import KINDS
from megactx.evaluation.bootstrap import wilson
from megactx.evaluation.probes import READERS
from megactx.evaluation.table import Table
from megactx.studies.probes import ALL, main, notes_on, sheets, summarise
from megactx.studies.trained import load

ABOUT = {"run": "run", "subject": "gistnet", "blocks": 4, "block_size": 32, "recency": 64}


def answers(kind, *right):
    return {"kind": kind} | {name: {"right": r, "nll": 2.0 - r} for name, r in zip(READERS, right, strict=True)}


@pytest.mark.slow
def test_the_recency_window_is_that_of_the_run(trained_runs):
    assert [run.recency for run in load(trained_runs)] == [48, 48]


def test_a_share_and_its_interval_are_wilsons():
    """Against the definition: the shares from which what was seen is 1.96 standard errors away."""
    for right, of in ((0, 40), (40, 40), (7, 40), (1, 3)):
        share, *ends = wilson(right, of)
        assert share == right / of
        for end in ends:
            if 0 < end < 1:
                assert abs(right / of - end) == pytest.approx(1.96 * math.sqrt(end * (1 - end) / of), rel=1e-6)
    assert wilson(0, 40).low == 0 and wilson(40, 40).high == 1


def test_accuracy_is_counted_by_class_and_over_all():
    rows = [answers("uuid", 0, 1, 1), answers("uuid", 0, 0, 1), answers("word", 1, 1, 1)]
    table = summarise({"gistnet": rows, "nothing": rows})
    own, full = table.pick(carrier="gistnet"), table.pick(carrier=READERS[2])
    assert {row["domain"]: row["n"] for row in own} == {"uuid": 2, "word": 1, ALL: 3}
    assert own.point(span=READERS[0], domain=ALL, metric="accuracy") == pytest.approx(1 / 3)
    assert own.point(span=READERS[1], domain="uuid", metric="accuracy") == 0.5
    assert own.point(span=READERS[0], domain="uuid", metric="nll") == 2
    assert full.point(domain=ALL, metric="accuracy") == 1
    assert len(table) == 2 * (3 + 2 * 2 * 3), "accuracy and nats"
    assert [sheet.rows[0][0] for sheet in sheets(table, ABOUT)] == [READERS[2]] * 4
    assert notes_on(table) == []


def test_a_base_that_knows_nothing_is_named_as_the_blocker():
    one = summarise({"gistnet": [answers("uuid", 0, 0, 0), answers("word", 0, 0, 1)]})
    assert notes_on(one) == ["uuid: the base is the blocker, even with the full context it answers none of 1."]
    none = summarise({"gistnet": [answers("uuid", 0, 0, 0), answers("word", 0, 0, 0)]})
    assert "The base is the blocker: even with the full context it answers none of 2" in notes_on(none)[0]


def test_the_command_measures_a_run_and_its_controls(trained_runs, texts, capsys):
    settings = ["--path", str(texts), "--per-class", "1", "--blocks", "10", "--recency", "32"]
    assert main([str(trained_runs[0]), *settings]) == 0
    assert "the base is the blocker" in capsys.readouterr().out.lower()
    numbers = json.loads((trained_runs[0] / "probes.json").read_text())
    table = Table(numbers["table"])
    assert {*table.names("domain")} == {*KINDS, ALL} and table.one(domain=ALL)["n"] == 5
    assert {"gistnet", "blockmean_linear", "nothing", "last token", "random gist"} <= {*table.names("carrier")}
    with (trained_runs[0] / "probes.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(table)
    assert "**gistnet**" in (trained_runs[0] / "probes.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--per-class", "0"], "--per-class=0 is not allowed"),
        (["--seed", "-1"], "--seed=-1 is not allowed"),
        (["--recency", "12"], "--recency=12 is not allowed: a multiple of block_size=8"),
        (["--blocks", "2", "--recency", "32"], "blocks=2"),
        (["--blocks", "100"], "the base takes 512"),
    ],
)
def test_mistakes_are_told_in_one_message(trained_runs, texts, arguments, named, capsys):
    assert main([str(trained_runs[0]), "--path", str(texts), *arguments]) == 2
    error = capsys.readouterr().err
    assert named in error and len(error.splitlines()) == 1


def test_a_folder_that_is_no_run_of_a_gist_stage_is_refused(tmp_path, capsys):
    assert main([str(tmp_path / "none")]) == 2
    assert "there is no such run folder" in capsys.readouterr().err
    assert main([str(tmp_path)]) == 2
    assert "there is no checkpoint in it" in capsys.readouterr().err
