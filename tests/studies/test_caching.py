"""Gist caching: overlap of answers, domains, the command and its tables."""

import csv
import json
import random

import pytest
import torch

from megactx.evaluation.measure import LAST_TOKEN, measure
from megactx.evaluation.metrics import recovery_of_sums
from megactx.evaluation.table import Table
from megactx.gist.carriers.avgpool import AvgPool
from megactx.lm import BaseLM
from megactx.studies import caching
from megactx.studies.caching import main, measure_transfer
from megactx.studies.caching_overlap import measure_overlap, rouge_l
from megactx.studies.trained import NOTHING, Nothing, held_out, load

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
    table, alone = Table(), Table()
    found = measure_overlap(base, nets, batches, 64, 8, {1.0: 0, 8.0: 7}, table)
    assert found["prompts"] == 3
    assert table.point(carrier="every token", span=8.0) == table.point(carrier=NOTHING, span=1.0) == 1
    assert table.point(carrier=NOTHING, span=8.0) < 1
    measure_overlap(base, nets, batches[:1], 64, 8, {1.0: 0}, alone)
    row = alone.one(carrier=NOTHING, span=1.0)
    assert row["point"] == 1 and row["low"] != row["low"]


@pytest.mark.slow
def test_a_run_stands_on_every_domain_beside_the_controls(trained_runs, texts):
    runs = load(trained_runs)
    assert [run.name for run in runs] == ["prose", "code"] and runs[0].weights == {"narrative": 1}
    first, second = (next(run.base.parameters()) for run in runs)
    assert first.data_ptr() == second.data_ptr(), "one base for all runs"
    batches = held_out(runs[0].base, str(texts), 8, 16, 128, 24)
    table = Table()
    about = measure_transfer(runs, batches, 16, table)["transfer"]
    assert {"prose", "code", LAST_TOKEN} <= {*table.names("carrier")} and about["trained"]["prose"] == {"narrative": 1}
    assert {*table.names("domain")} == {"narrative", "code", "overall"}
    scores = measure(runs[0].base, {"own": runs[1].main}, [b for b in batches if b["domain"] == ["narrative"]], 16)
    sums = ((values - scores.full).double().sum(0) for values in (scores.carriers["own"], scores.drop))
    wanted = recovery_of_sums(*sums, torch.tensor(float(len(scores)))).item()
    assert table.point(carrier="code", domain="narrative") == pytest.approx(wanted, abs=1e-6)


@pytest.mark.slow
def test_the_command_measures_runs_and_writes_its_tables(trained_runs, texts, tmp_path, capsys):
    runs = [str(folder) for folder in trained_runs]
    assert main([*runs, *SMALL, "--path", str(texts), "--drift", "0.05", "--out", str(tmp_path)]) == 0
    assert "stored gists after the base has changed" in capsys.readouterr().out
    numbers = json.loads((tmp_path / "caching.json").read_text())
    table = Table(numbers["table"])
    costs = table.pick(metric="flops")
    assert costs.names("carrier") == ["again", "cache", "keys", "vectors"] and {*costs.names("span")} > {None, 1.0, 8.0}
    assert {*table.pick(metric="rouge").names("carrier")} == {"prose", "code", "avgpool", LAST_TOKEN, NOTHING}
    assert table.pick(metric="lost").names("run") == ["none", "0.05"]
    with (tmp_path / "caching.csv").open() as file:
        metrics = {row["metric"] for row in csv.DictReader(file)}
    assert {"flops", "seconds", "bytes", "made_flops", "rouge", "recovery", "lost"} <= metrics
    assert "narrative 100%" in (tmp_path / "caching.md").read_text()


def test_without_a_run_another_base_has_no_trained_gist_which_is_said(base_folder, texts, tmp_path, capsys):
    small = [*SMALL, "--base", str(base_folder), "--path", str(texts), "--out", str(tmp_path)]
    assert main([*small, "--drift", "--compression", "1", "32"]) == 0
    assert "There is no trained gist here" in capsys.readouterr().out
    metrics = {row["metric"] for row in json.loads((tmp_path / "caching.json").read_text())["table"]}
    assert "rouge" in metrics and not {"recovery", "lost"} & metrics


@pytest.mark.slow
def test_what_is_measured_is_written_before_the_next_part_begins(texts, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(caching, "measure_drift", stop)
    asked = [*SMALL, "--path", str(texts), "--out", str(tmp_path), "--drift", "0.05", "--compression", "32"]
    assert main(asked) == 130
    metrics = {row["metric"] for row in json.loads((tmp_path / "caching.json").read_text())["table"]}
    assert {"flops", "made_flops", "rouge"} <= metrics and "lost" not in metrics
    assert "ROUGE-L" in (tmp_path / "caching.md").read_text()


def test_without_a_run_and_a_base_it_is_the_gistnet_that_ships_with_the_embedded_one(texts, tmp_path):
    assert main([*SMALL, "--path", str(texts), "--out", str(tmp_path), "--drift", "--compression", "32"]) == 0
    table = Table(json.loads((tmp_path / "caching.json").read_text())["table"])
    assert {*table.pick(metric="flops").names("carrier")} == {"again", "cache", "vectors", "keys"}
    assert table.point(carrier="gistnet", metric="vector_bytes") == 2 * 256


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
