"""The command that asks trained gists for exact facts: its numbers, its tables, what it says of a weak base."""

import csv
import json
import math

import pytest

from megactx.data.probes import KINDS
from megactx.evaluation.probes import READERS
from megactx.studies.probes import main
from megactx.studies.probes_report import ALL, notes_on, rows_of, sheets, summarise, wilson

ABOUT = {"run": "run", "subject": "gistnet", "blocks": 4, "block_size": 32, "recency": 64}


def answers(kind, *right):
    return {"kind": kind} | {name: {"right": r, "nll": 2.0 - r} for name, r in zip(READERS, right, strict=True)}


def test_a_share_and_its_interval_are_wilsons():
    """Against the definition: the shares from which what was seen is 1.96 standard errors away."""
    for right, of in ((0, 40), (40, 40), (7, 40), (1, 3)):
        for end in wilson(right, of):
            if 0 < end < 1:
                assert abs(right / of - end) == pytest.approx(1.96 * math.sqrt(end * (1 - end) / of), rel=1e-6)
    assert wilson(0, 40)[0] == 0 and wilson(40, 40)[1] == 1


def test_accuracy_is_counted_by_class_and_over_all():
    rows = [answers("uuid", 0, 1, 1), answers("uuid", 0, 0, 1), answers("word", 1, 1, 1)]
    numbers = summarise({"gistnet": rows, "nothing": rows}, ABOUT)
    own = numbers["carriers"]["gistnet"]
    assert numbers["classes"] == {"uuid": 2, "word": 1, ALL: 3}
    assert own[READERS[0]][ALL]["right"] == 1 and own[READERS[1]]["uuid"]["point"] == 0.5
    assert numbers["full"][ALL]["point"] == 1 and own[READERS[0]]["uuid"]["nll"] == 2
    assert len(rows_of(numbers)) == 3 + 2 * 2 * 3
    assert [sheet.rows[0][0] for sheet in sheets(numbers)] == [READERS[2]] * 4
    assert len(notes_on(numbers)) == 1


def test_a_base_that_knows_nothing_is_named_as_the_blocker():
    one = summarise({"gistnet": [answers("uuid", 0, 0, 0), answers("word", 0, 0, 1)]}, ABOUT)
    assert notes_on(one)[1:] == ["uuid: the base is the blocker, even with the full context it answers none of 1."]
    none = summarise({"gistnet": [answers("uuid", 0, 0, 0), answers("word", 0, 0, 0)]}, ABOUT)
    assert "The base is the blocker: even with the full context it answers none of 2" in notes_on(none)[1]


def test_the_command_measures_a_run_and_its_controls(trained_runs, texts, capsys):
    settings = ["--path", str(texts), "--per-class", "1", "--blocks", "10", "--recency", "32"]
    assert main([str(trained_runs[0]), *settings]) == 0
    assert "the base is the blocker" in capsys.readouterr().out.lower()
    numbers = json.loads((trained_runs[0] / "probes.json").read_text())
    assert set(numbers["classes"]) == {*KINDS, ALL} and numbers["classes"][ALL] == 5
    assert {"gistnet", "blockmean_linear", "nothing", "last token", "random gist"} <= set(numbers["carriers"])
    with (trained_runs[0] / "probes.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {"carrier", "reader", "class", "right", "of", "point", "low", "high", "nll"} == set(rows[0])
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
