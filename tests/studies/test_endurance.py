"""One session through much text: rows on the way, the tree's formula, and going on after a stop."""

import csv
import json
import shutil

import pytest
import torch

from megactx.memory import MegaContextTree
from megactx.studies.endurance import formula, main, summary, text_of


@pytest.fixture
def command(exported, texts, tmp_path):
    model = shutil.copytree(exported, tmp_path / "model")
    shutil.copytree(exported.parent / "lensnet", model / "lensnet")
    own = ["--model", str(model), "--budget", "400", "--path", str(texts), "--every", "256"]
    return [*own, "--out", str(tmp_path / "out")]


def stretches(found):
    """The long table as a dict per stretch."""
    rows = {}
    for row in found["table"]:
        rows.setdefault(row["span"], {"tokens": row["span"]})[row["metric"]] = row["point"]
    return list(rows.values())


@pytest.mark.slow
def test_a_session_leaves_a_row_per_stretch_and_its_tree_takes_exactly_what_the_formula_says(command, tmp_path, capsys):
    assert main([*command, "--tokens", "1500"]) == 0
    assert "exactly its formula, all along" in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "endurance.json").read_text())
    rows = stretches(found)
    assert [row["tokens"] for row in rows] == [257, 513, 769, 1025, 1281, 1501]  # BOS, and a last piece
    assert all(row["tree"] == row["formula"] > 0 and row["ms"] > 0 and row["entries"] <= 400 for row in rows)
    assert 0 < rows[-1]["working"] < 1.2 * rows[-3]["working"], "the window was full by then"
    assert rows[-1]["swap"] is not None and 0 <= rows[-1]["reuse"] <= 1 and rows[-1]["nll"] > 0
    assert found["summary"]["exact"] and found["summary"]["refocuses"] == sum(row["refocuses"] for row in rows)
    with (tmp_path / "out" / "endurance.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(found["table"])
    for ending in (".md", ".png"):
        assert (tmp_path / "out" / f"endurance{ending}").stat().st_size > 500


@pytest.mark.long
def test_a_session_that_was_stopped_goes_on_with_the_same_rows(command, tmp_path):
    assert main([*command, "--tokens", "1024"]) == 0
    path = tmp_path / "out" / "endurance.json"
    before = stretches(json.loads(path.read_text()))
    assert main([*command, "--tokens", "1536"]) == 0
    rows = stretches(json.loads(path.read_text()))
    assert rows[: len(before)] == before and [row["tokens"] for row in rows[len(before) :]] == [1281, 1537]
    whole = [*command[:-1], str(tmp_path / "whole"), "--tokens", "1536"]
    assert main(whole) == 0
    other = stretches(json.loads((tmp_path / "whole" / "endurance.json").read_text()))
    assert [row["nll"] for row in rows] == pytest.approx([row["nll"] for row in other], abs=1e-4)


def test_the_formula_counts_every_level(models):
    tree = MegaContextTree(models.gistnet, models.base)
    for tokens in (1, 3, 4, 63, 64, 300):
        ids = torch.randint(2, 512, (1, tokens - int(tree.lengths[0])))
        tree.append(ids)
        of_a_number = tree.dtype.itemsize if tree.dtype else 0  # unknown before the first gist
        assert tree.bytes() == formula(tokens, tree.block_size, tree.width, of_a_number)


def test_the_text_is_in_an_order_of_its_seed_and_no_longer_than_asked_for(models, texts):
    tokenizer = models.base.tokenizer
    first, again, other = (text_of(tokenizer, str(texts), 700, seed) for seed in (0, 0, 1))
    assert len(first) == 700 and torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(text_of(tokenizer, str(texts), 300, 0), first[:300])


def test_the_first_and_last_tenth_are_compared_once_the_window_is_full():
    rows = [
        {"tokens": 100 * n, "ms": 1.0 if n < 20 else 4.0, "resident": 50 + n, "tree": n, "formula": n, "nll": 2.0}
        | {"refocuses": 3}
        for n in range(1, 41)
    ]
    found = summary(rows, full=400)
    assert found["ms_first"] == 1.0 and found["time"] == 4.0, "what came before the window was full does not count"
    assert found["memory"] == 1.0 and found["exact"] and found["refocuses"] == 120


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--tokens", "100000000"], "--tokens=100000000 is not allowed: the text has"),
        (["--tokens", "0"], "--tokens=0 is not allowed: at least 1"),
        (["--every", "0"], "--every=0 is not allowed: at least 1"),
        (["--megacontext", "none"], "--megacontext=none has an end"),
        (["--budget", "8"], "budget=8 is not allowed"),
    ],
)
def test_a_mistake_is_one_message(command, capsys, more, told):
    assert main([*command, *more]) == 2
    err = capsys.readouterr().err
    assert told in err and "Traceback" not in err


def test_a_folder_of_another_study_is_refused(command, capsys):
    assert main([*command, "--tokens", "300"]) == 0
    assert main([*command, "--tokens", "300", "--seed", "1"]) == 2
    assert "it holds a study with other settings: seed=0, not 1" in capsys.readouterr().err


def test_a_study_does_not_go_on_with_other_text_under_the_same_name(command, texts, tmp_path, capsys):
    shutil.copytree(texts, tmp_path / "own")
    command[command.index(str(texts))] = str(tmp_path / "own")
    assert main([*command, "--tokens", "300"]) == 0
    for path in (tmp_path / "own").iterdir():
        path.write_text(path.read_text().replace("e", "a"))
    assert main([*command, "--tokens", "600"]) == 2
    assert "it holds a study of other text" in capsys.readouterr().err
