"""Questions that need the past: windows of equal entries, cells that are kept."""

import json
from types import SimpleNamespace

import pytest

from megactx.evaluation import rivals
from megactx.evaluation.rivals import BLOCK, Asked
from megactx.gist.parts import find
from megactx.studies.ruler import answer, main


@pytest.mark.parametrize("name", ["newest", "needed", "bm25"])
def test_a_policy_keeps_exactly_the_budget(name):
    blocks = [f"word{n} stands here" for n in range(20)]
    kept = find(rivals, name, "--policies")().keep(Asked(blocks, 20 * BLOCK, [5], "Where stands word5?"), 160)
    assert len(kept) == 160 and kept == sorted({*kept}) and kept[-1] < 20 * BLOCK
    assert name == "newest" or {*range(5 * BLOCK, 6 * BLOCK)} <= {*kept}


def test_a_stopped_study_goes_on_with_the_cells_that_are_missing(tmp_path, capsys):
    sizes = ["--lengths", "400", "--cases", "1", "--budget", "128", "--out", str(tmp_path), "--policies", "newest"]
    assert main(sizes) == 0
    cell = tmp_path / "cells" / "niah_single_1-400-newest.json"
    before = cell.stat().st_mtime_ns
    assert main([*sizes, "needed"]) == 0 and cell.stat().st_mtime_ns == before
    table = json.loads((tmp_path / "ruler.json").read_text())["table"]
    assert {row["point"] for row in table if row["metric"] == "entries"} == {128}
    assert (tmp_path / "ruler.png").exists()
    row = json.loads((tmp_path / "cases" / "niah_single_1-400.jsonl").read_text())
    assert {"context", "question", "answer_prefix", "answer", "max_new_tokens", "needles"} <= {*row}
    assert main([*sizes, "--seed", "5"]) == 2 and "--out" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--tasks", "--policies"])
def test_what_is_not_known_is_told_by_its_option(option, tmp_path, capsys):
    assert main([option, "nothing", "--out", str(tmp_path)]) == 2
    assert f"{option}=nothing is not known" in capsys.readouterr().err


def test_a_window_that_cannot_hold_the_needed_blocks_is_refused():
    asked = Asked([f"word{n}" for n in range(20)], 20 * BLOCK, [5, 6, 9], "Where?")
    with pytest.raises(ValueError, match="--budget=96: the blocks that hold the needles take 100 tokens"):
        find(rivals, "needed", "--policies")().keep(asked, 96)


def test_a_template_is_read_with_its_special_tokens_and_a_text_that_looks_like_one_is_text(tiny_tokenizer, monkeypatch):
    tokenizer, seen = tiny_tokenizer, []
    special = tokenizer.bos_token
    monkeypatch.setattr(
        tokenizer, "chat_template", "{{ bos_token }}{{ messages[0].content }}{{ bos_token }}", raising=False
    )
    row = {"context": f"a {special} b", "question": "c?", "answer_prefix": "d", "needles": [], "max_new_tokens": 1}

    class Model:
        device = "cpu"

        def generate(self, window, **settings):
            seen.append(window[0].tolist())
            return window

    base = SimpleNamespace(tokenizer=tokenizer, model=Model(), max_positions=512)
    answer(base, row, find(rivals, "full", "--policies")(), 64, plain=False)
    assert seen[0].count(tokenizer.bos_token_id) == 2 and seen[0][0] == tokenizer.bos_token_id


def test_a_budget_that_holds_all_of_a_text_is_no_measure_of_what_is_kept(tmp_path, capsys):
    assert main(["--lengths", "512", "--budget", "512", "--policies", "newest", "--out", str(tmp_path)]) == 2
    assert "--budget=512 is not allowed with --lengths=512" in capsys.readouterr().err
