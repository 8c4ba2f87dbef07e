"""The card of any base: one command, the figures of a base that was trained here."""

import json

import pytest

from megactx.studies.base_card import main


@pytest.mark.parametrize("rate", ["0", "inf", "nan", "-1"])
def test_a_rate_is_a_number_above_0(base_folder, rate, tmp_path, capsys):
    assert main([str(base_folder), f"--rate={rate}", "--length", "256", "--out", str(tmp_path)]) == 2
    assert "--rate=" in capsys.readouterr().err


def test_a_card_holds_the_four_measures_and_what_a_vector_holds(base_folder, texts, tmp_path, capsys):
    sizes = ["--length", "256", "--documents", "2", "--passages", "1", "--patience", "2", "--block", "8"]
    assert main([str(base_folder), "--path", str(texts), *sizes, "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "Loss by position" in shown and "What one vector can hold: 1 passages" in shown
    table = json.loads((tmp_path / "base_card.json").read_text())["table"]
    metrics = {row["metric"] for row in table}
    assert {"loss_by_position", "drop_cost", "capacity", "capacity_block"} <= metrics


def test_each_measure_is_in_the_tables_before_the_next_one_begins(base_folder, texts, tmp_path, monkeypatch):
    sizes = ["--length", "256", "--documents", "2", "--passages", "0"]

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("megactx.evaluation.context_use.drop_cost", stopped)
    main([str(base_folder), "--path", str(texts), *sizes, "--out", str(tmp_path)])
    table = json.loads((tmp_path / "base_card.json").read_text())["table"]
    assert {row["metric"] for row in table} == {"length", "loss_by_position"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--length", "100"], "--length=100 is not allowed: at least 256"),
        (["--length", "100000"], "--length=100000 is not allowed: the base takes"),
    ],
)
def test_what_cannot_be_measured_is_told_by_its_option(base_folder, options, said, tmp_path, capsys):
    assert main([str(base_folder), *options, "--out", str(tmp_path)]) == 2
    assert said in capsys.readouterr().err
