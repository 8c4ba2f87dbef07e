"""Gist caching: overlap of answers, domains, the command and its tables."""

import csv
import json
import random

import pytest
import torch

from megactx.evaluation.measure import LAST_TOKEN, measure
from megactx.evaluation.metrics import recovery_of_sums
from megactx.gist.carriers.avgpool import AvgPool
from megactx.lm import BaseLM
from megactx.studies import caching
from megactx.studies.caching import main
from megactx.studies.caching_overlap import measure_overlap, rouge_l
from megactx.studies.trained import NOTHING, Nothing, held_out, load
from megactx.studies.transfer import measure_transfer

SMALL = ["--tokens", "96", "--input", "8", "--answer", "4", "--documents", "3", "--blocks", "24", "--repeats", "1"]


def slow_rouge(text, reference):
    """F of the longest common subsequence, by trying all of them in turn."""

    def longest(a, b):
        if not a or not b:
            return 0
        if a[0] == b[0]:
            return 1 + longest(a[1:], b[1:])
        return max(longest(a[1:], b), longest(a, b[1:]))

    a, b = text.lower().split(), reference.lower().split()
    if not (common := longest(a, b)):
        return 0.0
    precision, recall = common / len(a), common / len(b)
    return 2 * precision * recall / (precision + recall)


def test_rouge_is_the_longest_common_subsequence_of_words():
    rng = random.Random(0)
    for _ in range(30):
        one, two = (" ".join(rng.choices(["The", "port", "of", "4821"], k=rng.randint(1, 7))) for _ in range(2))
        assert rouge_l(one, two) == pytest.approx(slow_rouge(one, two), abs=1e-6)
    assert rouge_l("a == b", "a, b") == 1, "words only"


def test_what_loses_nothing_continues_as_the_prompt_and_one_text_gives_no_interval(base_folder):
    base = BaseLM.from_pretrained(str(base_folder), "float32").freeze()
    generator = torch.Generator().manual_seed(0)
    batches = [
        {"ids": torch.randint(3, 512, (1, 72), generator=generator), "document": torch.tensor([text])}
        for text in (0, 1, 1)
    ]
    nets = {"every token": AvgPool(1), NOTHING: Nothing(8)}
    found = measure_overlap(base, nets, batches, 64, 8, {1.0: 0, 8.0: 7})
    assert found["documents"] == 3
    assert found["rouge"]["every token"][8.0]["point"] == found["rouge"][NOTHING][1.0]["point"] == 1
    assert found["rouge"][NOTHING][8.0]["point"] < 1
    alone = measure_overlap(base, nets, batches[:1], 64, 8, {1.0: 0})["rouge"][NOTHING][1.0]
    assert alone["point"] == 1 and alone["low"] != alone["low"]


@pytest.mark.slow
def test_a_run_stands_on_every_domain_beside_the_controls(trained_runs, texts):
    runs = load(trained_runs)
    assert [run.name for run in runs] == ["prose", "code"] and runs[0].weights == {"narrative": 1}
    first, second = (next(run.base.parameters()) for run in runs)
    assert first.data_ptr() == second.data_ptr(), "one base for all runs"
    batches = held_out(runs[0].base, str(texts), 8, 16, 128, 24)
    found = measure_transfer(runs, batches, 16)
    assert {"prose", "code", LAST_TOKEN} <= set(found["rows"])
    assert set(found["rows"]["code"]) == {"trained", "narrative", "code", "overall"}
    scores = measure(runs[0].base, {"own": runs[1].main}, [b for b in batches if b["domain"] == ["narrative"]], 16)
    sums = ((values - scores.full).double().sum(0) for values in (scores.carriers["own"], scores.drop))
    wanted = recovery_of_sums(*sums, torch.tensor(float(len(scores)))).item()
    assert found["rows"]["code"]["narrative"]["point"] == pytest.approx(wanted, abs=1e-6)


@pytest.mark.slow
def test_the_command_measures_runs_and_writes_its_tables(trained_runs, texts, tmp_path, capsys):
    runs = [str(folder) for folder in trained_runs]
    assert main([*runs, *SMALL, "--path", str(texts), "--drift", "0.05", "--out", str(tmp_path)]) == 0
    assert "stored gists after the base has changed" in capsys.readouterr().out
    numbers = json.loads((tmp_path / "caching.json").read_text())
    assert [row["form"] for row in numbers["costs"]][:3] == ["again", "cache", "keys"]
    assert {row["compression"] for row in numbers["costs"]} > {None, 1.0, 8.0}
    assert set(numbers["overlap"]["rouge"]) == {"prose", "code", "avgpool", LAST_TOKEN, NOTHING}
    assert {row["change"] for row in numbers["drift"]} == {"none", "0.05"}
    with (tmp_path / "caching.csv").open() as file:
        assert {row["table"] for row in csv.DictReader(file)} == {"cost", "making", "rouge", "domain", "drift"}
    assert "narrative 100%" in (tmp_path / "caching.md").read_text()


def test_without_a_run_another_base_has_no_trained_gist_which_is_said(base_folder, texts, tmp_path, capsys):
    small = [*SMALL, "--base", str(base_folder), "--path", str(texts), "--out", str(tmp_path)]
    assert main([*small, "--drift", "--compression", "1", "32"]) == 0
    assert "There is no trained gist here" in capsys.readouterr().out
    numbers = json.loads((tmp_path / "caching.json").read_text())
    assert "transfer" not in numbers and "drift" not in numbers


@pytest.mark.slow
def test_what_is_measured_is_written_before_the_next_part_begins(texts, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(caching, "measure_drift", stop)
    asked = [*SMALL, "--path", str(texts), "--out", str(tmp_path), "--drift", "0.05", "--compression", "32"]
    assert main(asked) == 130
    assert {"costs", "making", "overlap"} <= json.loads((tmp_path / "caching.json").read_text()).keys()
    assert "ROUGE-L" in (tmp_path / "caching.md").read_text()


def test_without_a_run_and_a_base_it_is_the_gistnet_that_ships_with_the_embedded_one(texts, tmp_path):
    assert main([*SMALL, "--path", str(texts), "--out", str(tmp_path), "--drift", "--compression", "32"]) == 0
    numbers = json.loads((tmp_path / "caching.json").read_text())
    assert {row["form"] for row in numbers["costs"]} == {"again", "cache", "vectors", "keys"}
    assert numbers["making"]["gistnet"]["vector_bytes"] == 2 * 256


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--tokens", "100"], "--tokens=100 is not allowed: a multiple of block_size=8"),
        (["--compression", "16"], "--compression=16 is not allowed: 1 to 8"),
        (["--tokens", "504"], "but the base takes 512"),
        (["--repeats", "0"], "--repeats=0"),
        (["--base", "asset:tiny-base"], "they name their own base"),
        (["--drift", "much"], "--drift=much"),
    ],
)
@pytest.mark.slow
def test_mistakes_are_told_in_one_message(trained_runs, texts, arguments, named, capsys):
    assert main([str(trained_runs[0]), "--path", str(texts), *arguments]) == 2
    error = capsys.readouterr().err
    assert named in error and len(error.splitlines()) == 1
